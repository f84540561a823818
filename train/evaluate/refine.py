"""Prompts in better words, by a language model that the user names; where it fails, a prompt stays as it is."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from videofactory_core.atomic import write_text
from videofactory_core.language import (
    INSTRUCTION,
    KEY,
    MAX_TOKENS,
    LocalModel,
    Server,
    is_address,
    refined,
    request,
)
from videofactory_core.memory import pick_device
from videofactory_core.pretrained import lacking

# Prompts that are asked about at once. When a server fails all of them, it is asked no more.
AT_ONCE = 8
# How often a server is asked about a prompt, and seconds that it may keep silent.
ATTEMPTS, PATIENCE = 2, 60.0
# Reasons that are told.
TOLD = 3

# An answer to each message, or why there is none.
Ask = Callable[[Sequence[str]], list["str | Exception"]]


@dataclass(frozen=True)
class Refinement:
    """Who is asked for better prompts, and for what."""

    # The address of a server that speaks as OpenAI's do, such as http://localhost:8000/v1, or a folder with a causal
    # language model, as transformers keeps it.
    source: str
    # What the server calls its model.
    model: str = ""
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if is_address(self.source):
            if not self.model:
                raise ValueError(f"refine_prompts: {self.source} has many models: name one of them (refine_model)")
            return
        if reason := lacking(self.source):
            raise ValueError(
                f"refine_prompts: {reason}; name a folder with a language model, or a server as http://localhost:8000/v1"
            )
        if self.model:
            raise ValueError(f"refine_model: {self.source} is a folder with one model; leave the name out")

    @property
    def by(self) -> str:
        """The model's name."""
        return self.model or Path(self.source).name

    def open(self, device: str = "auto") -> Ask:
        """What asks. ValueError when the folder's model cannot be loaded."""
        if not is_address(self.source):
            local = LocalModel("refine_prompts", self.source, pick_device(device))
            return lambda messages: list(local.ask(messages, MAX_TOKENS))
        server = Server(
            self.source,
            self.model,
            os.environ.get(KEY, ""),
            ATTEMPTS,
            patience=PATIENCE,
            setting="refine_model",
        )

        def answer(message: str) -> str | Exception:
            try:
                return server.ask(message, MAX_TOKENS)
            except (OSError, ValueError) as error:
                return error

        def ask(messages: Sequence[str]) -> list[str | Exception]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return list(pool.map(answer, messages))

        return ask


class Refined(NamedTuple):
    """A prompt, and the better one: "" when there is none, for this reason."""

    prompt: str
    better: str
    reason: str = ""


def refine(
    prompts: Sequence[str], refinement: Refinement, file: Path | None = None, device: str = "auto"
) -> list[Refined]:
    """What becomes of every prompt; equal ones are asked about once.

    Better prompts go to `file` as they come, and are found there by a later call, which asks about the others again.
    Raises ValueError when the folder's model cannot be loaded, or the file holds something else.
    """
    found = {prompt: Refined(prompt, better) for prompt, better in read_refined(file).items()} if file else {}
    left = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
    ask = refinement.open(device) if left else None
    with tqdm(total=len(left), desc="refine", unit="prompt", disable=None) as bar:
        while left and ask:
            asked, left = left[:AT_ONCE], left[AT_ONCE:]
            answers = ask([request(refinement.instruction, prompt) for prompt in asked])
            found |= {prompt: _outcome(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)}
            bar.update(len(asked))
            if file:
                _write(file, found)
            if all(isinstance(answer, Exception) for answer in answers):
                reason = f"it was not asked any more: {answers[-1]}"
                found |= {prompt: Refined(prompt, "", reason) for prompt in left}
                break
    return [found[prompt] for prompt in prompts]


def _outcome(prompt: str, answer: str | Exception) -> Refined:
    if isinstance(answer, Exception):
        return Refined(prompt, "", str(answer))
    try:
        return Refined(prompt, refined(answer))
    except ValueError as error:
        return Refined(prompt, "", str(error))


def _write(file: Path, found: Mapping[str, Refined]) -> None:
    rows = ({"prompt": one.prompt, "refined": one.better} for one in found.values() if one.better)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), errors="replace")


def read_refined(file: Path) -> dict[str, str]:
    """Prompts and their better ones that `refine` has written; none when there is no file."""
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return {row["prompt"]: row["refined"] for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not hold refined prompts ({error}): delete it to ask again") from error


def summary(found: Sequence[Refined], by: str) -> str:
    """How many prompts were refined, how many stay and why, in a sentence."""
    kept = Counter(one.reason for one in found if not one.better)
    said = f"{len(found) - kept.total()} of {len(found)} prompts refined by {by}"
    if kept:
        reasons = "; ".join(f"{count} because {reason}" for reason, count in kept.most_common(TOLD))
        said += f", {kept.total()} stay as they were ({reasons}{'; and so on' if len(kept) > TOLD else ''})"
    return said
