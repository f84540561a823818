"""Prompts in better words, by a language model of the user's."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.v0_0_2 import io

from ..videofactory_core import prompts
from ..videofactory_core.language import (
    INSTRUCTION,
    KEY,
    MAX_TOKENS,
    LocalModel,
    Server,
    is_address,
    refined,
    request,
)
from .load import CATEGORY

SERVER = "server"
# Folders below models in which language models are looked for.
KINDS = ("LLM", "text_encoders")
# Workflows come from anywhere, so the key goes to the server that it is for and to none that a workflow names.
KEY_IS_FOR, OPENAI = "OPENAI_BASE_URL", "https://api.openai.com/v1"
# How often a server is asked, and seconds that it may keep silent: it may have a model to load.
ATTEMPTS, PATIENCE = 2, 60.0
# Seconds until an interruption by the user is noticed.
NOTICE = 0.1

Ask = Callable[[str], str]
# How often each source has failed, so that the host asks again instead of keeping what it has.
failures: Counter[tuple[str, str, str]] = Counter()


class RefinePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryRefinePrompt",
            display_name="VideoFactory Refine Prompt",
            category=CATEGORY,
            description="Lets a language model put a prompt into better words. When it fails, the prompt stays as it"
            " is.",
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a red circle moving right on a black background",
                    tooltip="What the clip shows; prompts for frames are refined one by one.",
                ),
                io.Combo.Input(
                    "source",
                    options=[SERVER, *folders()],
                    default=SERVER,
                    tooltip="The server below, or a folder of models/LLM or models/text_encoders with a language"
                    " model.",
                ),
                io.String.Input(
                    "server",
                    default="",
                    tooltip="Address of a server that speaks as OpenAI's do, such as http://localhost:11434/v1. Nothing"
                    " is sent anywhere while this is empty.",
                ),
                io.String.Input("server_model", default="", tooltip="What the server calls its model."),
                io.String.Input(
                    "instruction", multiline=True, default=INSTRUCTION, tooltip="What the language model is told to do."
                ),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="For VideoFactory Text Encode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, source: str, server: str | None = None, server_model: str | None = None) -> bool | str:
        if source != SERVER:
            return source in folders() or f"{source} is not there any more: press R and choose a model of the list"
        # What another node gives is not known yet.
        if server is not None and not is_address(server.strip()):
            return "no server is named: write its address, such as http://localhost:11434/v1, or choose a model"
        if server_model is not None and not server_model.strip():
            return "the server has many models: name one of them in server_model"
        return True

    @classmethod
    def fingerprint_inputs(cls, source: str, server: str = "", server_model: str = "", **_: Any) -> int:
        return failures[source, server, server_model]

    @classmethod
    def execute(cls, prompt: str, source: str, server: str, server_model: str, instruction: str) -> io.NodeOutput:
        try:
            ask = at_server(server.strip(), server_model.strip()) if source == SERVER else in_folder(source)
            better = refine(prompt, lambda text: refined(ask(request(instruction, text))))
        except (OSError, ValueError, RuntimeError) as error:
            failures[source, server, server_model] += 1
            logging.warning("VideoFactory: the prompt stays as it is, because %s", error)
            better, shown = prompt, f"The prompt stays as it is: {error}"
        else:
            shown = better
        # Which a host has that serves graphs, and nothing else needs.
        from server import PromptServer

        PromptServer.instance.send_progress_text(shown, cls.hidden.unique_id)
        return io.NodeOutput(better)


def refine(prompt: str, ask: Ask) -> str:
    """The prompt, or each of the prompts for key frames, in the words of `ask`."""
    if not prompt.strip():
        return prompt
    keys = prompts.parse(prompt)
    if keys is None:
        return ask(prompt)
    return ",\n".join(f'"{frame}": {json.dumps(ask(text), ensure_ascii=False)}' for frame, text in keys.items())


def at_server(address: str, model: str) -> Ask:
    """Asks a server; the user may interrupt that."""
    known = os.environ.get(KEY_IS_FOR, OPENAI)
    key = os.environ.get(KEY, "") if address.rstrip("/") == known.rstrip("/") else ""
    server = Server(address, model, key, ATTEMPTS, patience=PATIENCE, setting="server_model")

    def ask(message: str) -> str:
        pool = ThreadPoolExecutor(1)
        try:
            answer = pool.submit(server.ask, message, MAX_TOKENS)
            while not wait([answer], NOTICE).done:
                comfy.model_management.throw_exception_if_processing_interrupted()
            return answer.result()
        finally:
            pool.shutdown(wait=False)

    return ask


def in_folder(source: str) -> Ask:
    """Asks the model of a folder; the user may interrupt that."""
    folder = folders().get(source)
    if folder is None:
        raise ValueError(f"{source} is not there any more: press R and choose a model of the list")
    management = comfy.model_management
    device = management.get_torch_device()
    management.free_memory(sum(file.stat().st_size for file in folder.glob("*.safetensors")), device)
    model = LocalModel("source", str(folder), device)

    def ask(message: str) -> str:
        bar = comfy.utils.ProgressBar(MAX_TOKENS)

        def watch() -> None:
            management.throw_exception_if_processing_interrupted()
            bar.update(1)

        (answer,) = model.ask([message], MAX_TOKENS, watch)
        return answer

    return ask


def folders() -> dict[str, Path]:
    """Folders with a causal language model, by the names that the list shows."""
    found: dict[str, Path] = {}
    for kind in KINDS:
        registered, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        for parent in (*registered, os.path.join(folder_paths.models_dir, kind)):
            for pattern in ("*/config.json", "*/*/config.json"):
                for config in sorted(Path(parent).glob(pattern)):
                    if _is_causal(config):
                        found.setdefault(f"{kind}/{config.parent.relative_to(parent).as_posix()}", config.parent)
    return found


def _is_causal(config: Path) -> bool:
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ()
        return any(name.endswith("ForCausalLM") for name in names)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


NODES = [RefinePrompt]
