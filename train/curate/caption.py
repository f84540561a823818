"""A sentence for each clip: by a model from a local folder, or by a server that the user names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from videofactory_core.language import KEY, LocalModel, Server, is_address, line, no_thoughts, pad_in_front
from videofactory_core.memory import pick_device
from videofactory_core.pretrained import lacking, load, load_model

from .keyframe import read_pictures
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

# How often it is asked, and seconds: until it is asked again, times the attempt, and that it may keep silent.
ATTEMPTS, PAUSE, PATIENCE = 3, 2.0, 120.0
QUESTION = "Describe this frame of a video in one sentence of at most 60 words. Say what is seen and what happens."
REWRITE = "Rewrite this caption of a video as one clear sentence of at most 60 words. Answer with the sentence alone."

# Map pictures to captions, and texts to better ones.
Look = Callable[[Sequence[bytes]], list[str]]
Say = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Caption(Stage):
    """What the key frame shows; a caption that the source has already is kept as it is."""

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes", "keyframe")
    rows_per_part: ClassVar[int] = 32
    weights_in: ClassVar[tuple[str, ...]] = ("model", "rewrite")

    # A folder with BLIP-2 or any image-text model with a chat template, as transformers keeps them.
    model: str = ""
    # Or the address of an OpenAI-compatible server, such as http://localhost:8000/v1, and the name of its model.
    endpoint: str = ""
    endpoint_model: str = ""
    question: str = QUESTION
    # Of a caption by BLIP-2; whoever is asked in words gets twice as many.
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
        if self.endpoint and not is_address(self.endpoint):
            raise ValueError(f"endpoint: {self.endpoint!r} is no address; write http://localhost:8000/v1")
        if self.rewrite == "endpoint" and not self.endpoint:
            raise ValueError("rewrite: it is to be done by an endpoint, and none is named; add one, or name a folder")

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {"caption_text": pa.string(), "caption_original": pa.string(), "caption_by": pa.string()}

    def missing(self) -> str:
        if self.endpoint and not self.endpoint_model:
            return "caption.endpoint_model: none is named; name the server's model"
        if not self.endpoint and (reason := lacking(self.model)):
            return f"caption.model: {reason}; name one with BLIP-2 or another image-text model, or an endpoint"
        if self.rewrite not in ("", "endpoint") and (reason := lacking(self.rewrite)):
            return f"caption.rewrite: {reason}; name one with a language model, or leave it out"
        return ""

    def open(self) -> Work:
        by = self.endpoint_model if self.endpoint else Path(self.model).name
        look = self._server_look() if self.endpoint else self._local_look()
        say = (self._server_say() if self.rewrite == "endpoint" else self._local_say()) if self.rewrite else None

        def work(rows: Sequence[Row]) -> list[Row]:
            texts = [row.get("caption") or "" for row in rows]
            asked = [i for i, text in enumerate(texts) if self.replace or not text]
            found = look([rows[i]["image"] for i in asked]) if asked else []
            for i, text in zip(asked, found, strict=True):
                if not text:
                    raise ValueError(f"{by} gave no caption")
                texts[i] = text
            better = say(texts) if say else texts
            return [
                {
                    "caption_text": new or old,
                    "caption_original": old if new and new != old else None,
                    "caption_by": by if i in asked else "source",
                }
                for i, (old, new) in enumerate(zip(texts, better, strict=True))
            ]

        return work

    def _local_look(self) -> Look:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = pick_device(self.device)
        processor: Any = load("caption.model", AutoProcessor, self.model)
        model = load_model("caption.model", AutoModelForImageTextToText, self.model, device)
        if model.config.model_type == "blip-2":
            prompt, most = "", self.max_new_tokens
            if model.config.image_token_id is None:
                # Older folders do not say which of its tokens stands for the picture.
                model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        else:
            prompt, most = self._prompt(processor), 2 * self.max_new_tokens
            pad_in_front(processor.tokenizer)
        begin = processor.tokenizer.bos_token
        # A prompt may have its first token already.
        more = {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}

        @torch.inference_mode()
        def look(images: Sequence[bytes]) -> list[str]:
            pictures = read_pictures(images)
            if prompt:
                nested, texts = [[picture] for picture in pictures], [prompt] * len(pictures)
                given = processor(images=nested, text=texts, padding=True, return_tensors="pt", **more)
            else:
                given = processor(images=pictures, return_tensors="pt")
            ids = model.generate(
                **given.to(device, model.dtype), max_new_tokens=most, num_beams=self.num_beams, do_sample=False
            )
            if prompt:
                ids = ids[:, given["input_ids"].shape[1] :]
            return [line(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]

        return look

    def _prompt(self, processor: Any) -> str:
        """The question about a picture as the model wants it put; ValueError when it has no way."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}
        try:
            return str(
                processor.apply_chat_template(
                    [message], add_generation_prompt=True, **no_thoughts(processor.chat_template)
                )
            )
        except Exception as error:  # templates are programs
            raise ValueError(
                f"caption.model: {self.model} has no chat template for a picture ({error}): name another model"
            ) from error

    def _local_say(self) -> Say:
        model = LocalModel("caption.rewrite", self.rewrite, pick_device(self.device))

        def say(texts: Sequence[str]) -> list[str]:
            messages = [f"{self.rewrite_question}\n{text}" for text in texts]
            return [line(text) for text in model.ask(messages, 2 * self.max_new_tokens)]

        return say

    def _server_look(self) -> Look:
        ask = self._server(self.question)
        return lambda images: [ask(image, "") for image in images]

    def _server_say(self) -> Say:
        ask = self._server(self.rewrite_question)
        return lambda texts: [ask(b"", text) for text in texts]

    def _server(self, question: str) -> Callable[[bytes, str], str]:
        server = Server(
            self.endpoint,
            self.endpoint_model,
            os.environ.get(KEY, ""),
            ATTEMPTS,
            PAUSE,
            PATIENCE,
            setting="endpoint_model",
        )

        # A batch in which one fails is asked for again, row by row.
        @lru_cache(maxsize=2 * self.rows_per_part)
        def ask(image: bytes, text: str) -> str:
            return line(server.ask(f"{question}\n{text}".strip(), 2 * self.max_new_tokens, image))

        return ask
