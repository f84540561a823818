"""A sentence for each clip: by a model from a local folder, or by a server that the user names."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .aesthetics import open_picture, pick_device
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

# Where a server's key is looked for.
KEY = "OPENAI_API_KEY"
ATTEMPTS, PAUSE, PATIENCE = 3, 2.0, 120.0
QUESTION = "Describe this frame of a video in one sentence of at most 60 words. Say what is seen and what happens."
REWRITE = "Rewrite this caption of a video as one clear sentence of at most 60 words. Answer with the sentence alone."

Ask = Callable[[Sequence[bytes], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Caption(Stage):
    """What the key frame shows; a caption that the source has already is kept as it is."""

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes", "keyframe")
    rows_per_part: ClassVar[int] = 32

    # A folder with BLIP-2 or any image-text model with a chat template, as transformers keeps them.
    model: str = ""
    # Or the address of an OpenAI-compatible server, such as http://localhost:8000/v1, and the name of its model.
    endpoint: str = ""
    endpoint_model: str = ""
    question: str = QUESTION
    max_new_tokens: int = 40
    num_beams: int = 1
    # Caption those too that have a caption.
    replace: bool = False
    # Let a language model put each caption into better words: a folder, or "endpoint" for the server above.
    rewrite: str = ""
    rewrite_question: str = REWRITE
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.model and self.endpoint:
            raise ValueError("endpoint: a model is named too; leave one of the two out")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: {self.endpoint!r} is no address; write http://localhost:8000/v1")
        if self.rewrite == "endpoint" and not self.endpoint:
            raise ValueError("rewrite: it is to be done by an endpoint, and none is named; add one, or name a folder")

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {"caption_text": pa.string(), "caption_original": pa.string(), "caption_by": pa.string()}

    def missing(self) -> str:
        if self.endpoint:
            return "" if self.endpoint_model else "name the server's model as `endpoint_model` in [caption]"
        if not self.model or not Path(self.model).is_dir():
            return "name the folder of BLIP-2 or another image-text model as `model` in [caption], or an `endpoint`"
        return ""

    def open(self) -> Work:
        look = self._server(self.question) if self.endpoint else self._local()
        by = self.endpoint_model if self.endpoint else Path(self.model).name
        say = self._rewriter()

        def work(rows: Sequence[Row]) -> list[Row]:
            texts = [row.get("caption") or "" for row in rows]
            asked = [i for i, text in enumerate(texts) if self.replace or not text]
            found = look([rows[i]["image"] for i in asked], [""] * len(asked)) if asked else []
            for i, text in zip(asked, found, strict=True):
                if not text:
                    raise ValueError(f"{by} gave no caption")
                texts[i] = text
            better = say([b""] * len(texts), texts) if say else texts
            return [
                {
                    "caption_text": new or old,
                    "caption_original": old if new and new != old else None,
                    "caption_by": by if i in asked else "source",
                }
                for i, (old, new) in enumerate(zip(texts, better, strict=True))
            ]

        return work

    def _rewriter(self) -> Ask | None:
        if not self.rewrite:
            return None
        return self._server(self.rewrite_question) if self.rewrite == "endpoint" else self._language_model()

    def _local(self) -> Ask:
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoProcessor,
            Blip2ForConditionalGeneration,
        )

        device = pick_device(self.device)
        settings: dict[str, Any] = {"local_files_only": True}
        kind = AutoConfig.from_pretrained(self.model, **settings).model_type
        processor: Any = AutoProcessor.from_pretrained(self.model, **settings)
        build: Any = Blip2ForConditionalGeneration if kind == "blip-2" else AutoModelForImageTextToText
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model: Any = build.from_pretrained(self.model, dtype=dtype, **settings).to(device).eval()

        @torch.inference_mode()
        def ask(images: Sequence[bytes], _: Sequence[str]) -> list[str]:
            pictures = [open_picture(image) for image in images]
            if kind == "blip-2":
                given = processor(images=pictures, return_tensors="pt")
            else:
                message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}]
                prompt = processor.apply_chat_template(message, add_generation_prompt=True)
                given = processor(
                    images=[[picture] for picture in pictures],
                    text=[prompt] * len(pictures),
                    padding=True,
                    return_tensors="pt",
                )
            given = given.to(device, dtype)
            ids = model.generate(**given, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, do_sample=False)
            if "input_ids" in given and kind != "blip-2":
                ids = ids[:, given["input_ids"].shape[1] :]
            return [_line(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]

        return ask

    def _language_model(self) -> Ask:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = pick_device(self.device)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.rewrite, local_files_only=True)
        build: Any = AutoModelForCausalLM
        model = build.from_pretrained(self.rewrite, local_files_only=True).to(device).eval()

        @torch.inference_mode()
        def ask(_: Sequence[bytes], texts: Sequence[str]) -> list[str]:
            found = []
            for text in texts:
                message = f"{self.rewrite_question}\n{text}"
                if tokenizer.chat_template:
                    given = tokenizer.apply_chat_template(
                        [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt"
                    )
                    ids = given if isinstance(given, torch.Tensor) else given["input_ids"]
                else:
                    ids = tokenizer(f"{message}\n", return_tensors="pt")["input_ids"]
                made = model.generate(ids.to(device), max_new_tokens=2 * self.max_new_tokens, do_sample=False)
                found.append(_line(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
            return found

        return ask

    def _server(self, question: str) -> Ask:
        def ask(images: Sequence[bytes], texts: Sequence[str]) -> list[str]:
            return [self._answer(question, image, text) for image, text in zip(images, texts, strict=True)]

        return ask

    def _answer(self, question: str, image: bytes, text: str) -> str:
        """What the server says of a picture, or of a text; OSError when it does not answer."""
        content: list[dict[str, Any]] = [{"type": "text", "text": f"{question}\n{text}".strip()}]
        if image:
            address = "data:image/jpeg;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": address}})
        body = {
            "model": self.endpoint_model,
            "max_tokens": 2 * self.max_new_tokens,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(
            f"{self.endpoint.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    told = json.loads(answer.read())
                return _line(str(told["choices"][0]["message"]["content"]))
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == ATTEMPTS:
                    raise OSError(f"{self.endpoint} does not answer ({error}): start it, or run again later") from error
                time.sleep(PAUSE * attempt)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{self.endpoint} gave an answer that is no chat completion ({error})") from error
        raise AssertionError("the last attempt returns or raises")


def _line(text: str) -> str:
    return " ".join(text.split()).strip("\"' ")
