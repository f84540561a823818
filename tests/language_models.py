"""Language models for tests: a server on this machine, and a tiny one in a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

# What the server does about the prompts with these words in them, besides being slow or closing the connection.
STATUS = {"wrong key": 401, "out of memory": 500}
BODIES = {"a page": b"<html>", "no choices": b'{"choices": []}', "a list": b"[1]"}
ANSWERS: dict[str, str | None] = {
    "nothing": " ",
    "null": None,
    "numbers": "1 2 3",
    "refusal": "I'm sorry, but I can't help with that.",
    "chapters": "First chapter.\n\nSecond chapter.",
    "long": "a dog and " * 100,
    "code": "```a dog```",
    "endless thoughts": "<think>the user wants a dog",
}


class LanguageServer(ThreadingHTTPServer):
    """Speaks as OpenAI's do, and puts prompts that are not called after a misfortune into better words."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        # Prompts that were asked about, and with them the key, and the whole request.
        self.asked: list[str] = []
        self.keys: list[str | None] = []
        self.bodies: list[Any] = []
        self.slowness = 1.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none."""


class Handler(BaseHTTPRequestHandler):
    server: LanguageServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (part,) = body["messages"][0]["content"]
        _, _, prompt = part["text"].rpartition("\n")
        self.server.asked.append(prompt)
        self.server.keys.append(self.headers["Authorization"])
        self.server.bodies.append(body)
        met = [word for word in (*STATUS, *BODIES, *ANSWERS, "slow", "closed") if word in prompt]
        word = met[0] if met else ""
        if word == "closed":
            self.close_connection = True
            return
        if word == "slow":
            time.sleep(self.server.slowness)
        answer = ANSWERS.get(word, f'Here it is:\n\n"{prompt.capitalize()},\nseen from afar."')
        message = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
        content = BODIES.get(word, message)
        self.send_response(STATUS.get(word, 200))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def better(prompt: str) -> str:
    """What becomes of a prompt without a misfortune."""
    return f"{prompt.capitalize()}, seen from afar."


@contextmanager
def language_server() -> Iterator[LanguageServer]:
    with LanguageServer() as made:
        thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def make_language_model(folder: Path) -> Path:
    """A causal model with random weights that knows the words w0 to w59, and speaks when it has read w2 and w3."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ("<pad>", "<s>", "</s>", "<unk>")
    names = [*special, *(f"w{number}" for number in range(60))]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True)),
        model_input_names=["input_ids", "attention_mask"],
    )
    words.chat_template = "{{ bos_token }} w2 {{ messages[0].content }} w3"
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(names),
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        # It never ends by itself, so that tests know how long it speaks.
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4, generator=generator)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
