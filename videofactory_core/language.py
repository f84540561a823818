"""Asking a language model, by a server that speaks as OpenAI's do or from a local folder; and for better prompts.

A server is asked when a function here is called with its address, and nothing else is asked over a network.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .pretrained import load, load_model

if TYPE_CHECKING:
    import torch

# Where a server's key is looked for.
KEY = "OPENAI_API_KEY"
# A server that has no time or is asked too often says so with these.
BUSY = (408, 429)
# Bytes of an answer, and characters of what an error says, that are read.
LONGEST_ANSWER, LONGEST_REASON = 1 << 20, 200


def is_address(text: str) -> bool:
    """Whether `text` is where a server may be, such as http://localhost:8000/v1."""
    return text.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Server:
    """A server that speaks as OpenAI's do."""

    # Such as http://localhost:8000/v1.
    address: str
    model: str
    key: str = field(default="", repr=False)
    # How often it is asked, and seconds: until it is asked again, times the attempt, and that it may keep silent.
    attempts: int = 3
    pause: float = 2.0
    patience: float = 120.0
    # What users call the setting of `model`.
    setting: str = "the name of the model"

    def ask(self, message: str, max_tokens: int, image: bytes = b"") -> str:
        """What it says to a message, and to a picture (JPEG) beside it.

        OSError when it does not answer, ValueError when it refuses or its answer is none.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": message}]
        if image:
            address = "data:image/jpeg;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": address}})
        body = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        request = urllib.request.Request(
            f"{self.address.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if self.key:
            # Not for a server that this one names instead of itself.
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        reason = ""
        for attempt in range(self.attempts):
            time.sleep(self.pause * attempt)
            try:
                with urllib.request.urlopen(request, timeout=self.patience) as answer:
                    return _content(answer.read(LONGEST_ANSWER))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                with error, suppress(OSError, http.client.HTTPException):
                    reason += f": {line(error.read(LONGEST_REASON).decode(errors='replace'))}"
                if error.code < 500 and error.code not in BUSY:
                    raise ValueError(f"{self.address} refuses ({reason}): check {self.setting} and {KEY}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{self.address} gave an answer that is no chat completion ({error})") from error
        raise OSError(f"{self.address} does not answer ({reason}): check that it runs")


def _content(answer: bytes) -> str:
    """The text in a chat completion; ValueError, LookupError or TypeError for anything else."""
    text = json.loads(answer)["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"its content is {text!r:.60}")
    return text


class LocalModel:
    """A causal language model of transformers in a local folder.

    Raises ValueError that names the `setting` when the folder does not hold one.
    """

    def __init__(self, setting: str, folder: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = load(setting, AutoTokenizer, folder)
        self.model = load_model(setting, AutoModelForCausalLM, folder, device)
        pad_in_front(self.tokenizer)

    def ask(self, messages: Sequence[str], max_tokens: int, watch: Callable[[], None] = lambda: None) -> list[str]:
        """What it says to each message, at most `max_tokens` long; `watch` is called after every token."""
        import torch

        def go_on(*_: Any, **__: Any) -> bool:
            watch()
            return False

        # Templates put the first token themselves.
        plain = not self.tokenizer.chat_template
        prompts = [self._prompt(message) for message in messages]
        given = self.tokenizer(prompts, add_special_tokens=plain, padding=True, return_tensors="pt")
        ids, seen = (given[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        with torch.inference_mode():
            made = self.model.generate(
                ids,
                attention_mask=seen,
                max_new_tokens=max_tokens,
                num_beams=1,
                do_sample=False,
                stopping_criteria=[go_on],
            )
        texts: list[str] = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    def _prompt(self, message: str) -> str:
        """A message as the model wants it put."""
        template = self.tokenizer.chat_template
        if not template:
            return f"{message}\n"
        chat = [{"role": "user", "content": message}]
        return str(
            self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **no_thoughts(template)
            )
        )


def pad_in_front(tokenizer: Any) -> None:
    """Let prompts of a batch end together, where the answers begin."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def no_thoughts(template: Any) -> dict[str, bool]:
    """Keeps models that can from thinking aloud, which would be taken for the answer."""
    return {"enable_thinking": False} if "enable_thinking" in str(template) else {}


def line(text: str) -> str:
    """A text in one line, without quotes around it."""
    return " ".join(text.split()).strip("\"' ")


# Prompts

# What is asked for; text encoders look at 77 tokens at a time.
INSTRUCTION = (
    "Rewrite this prompt for a text-to-video model as one clear English sentence of at most 50 words. Keep all that it"
    " asks for. Say what is seen, how it looks, how it moves and where it is. Answer with the sentence alone."
)
# Tokens of an answer, of which models that think first need the most; and characters of a prompt.
MAX_TOKENS, LONGEST_PROMPT = 512, 600
THOUGHTS = "</think>"
REFUSAL = re.compile(r"(i.?m|i am) (very )?sorry\b|sorry[,.!]|i (can.?t|cannot|won.t)\b|as an ai\b", re.IGNORECASE)


def request(instruction: str, prompt: str) -> str:
    """The message that asks for a better prompt."""
    return f"{instruction}\n{prompt}"


def refined(answer: str) -> str:
    """The prompt in an answer to `request`, in one line; ValueError that says why when there is none.

    A prompt is a single paragraph; before it there may be thoughts, and a paragraph that ends with a colon.
    """
    _, _, said = answer.rpartition(THOUGHTS)
    paragraphs = [line(paragraph) for paragraph in re.split(r"\n\s*\n", said.strip())]
    if len(paragraphs) > 1 and paragraphs[0].endswith(":"):
        del paragraphs[0]
    if len(paragraphs) > 1:
        raise ValueError(f"the answer has {len(paragraphs)} paragraphs, not one sentence ({said.strip()!r:.60})")
    (prompt,) = paragraphs
    if not any(character.isalpha() for character in prompt):
        raise ValueError(f"the answer has no words ({prompt!r:.60})" if prompt else "the answer is empty")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the answer has {len(prompt)} characters, over {LONGEST_PROMPT} ({prompt!r:.60})")
    if prompt.startswith(("<", "{", "[", "`")):
        raise ValueError(f"the answer is no sentence ({prompt!r:.60})")
    if REFUSAL.match(prompt):
        raise ValueError(f"the model refuses ({prompt!r:.80})")
    return prompt
