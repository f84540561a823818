"""Many clips from a list of prompts, on one GPU or several; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from videofactory_core import adapters, checkpoint
from videofactory_core.atomic import write_text
from videofactory_core.config import ModelConfig
from videofactory_core.pipeline import check_request, generate
from videofactory_core.video import check_fps, check_writable, read_video, write_frames

from ..curate.tables import Record, read_records
from ..data.content import checksum
from ..data.sources import CAPTION_COLUMNS, decode_text
from ..workspace import PATIENCE
from .refine import Refinement, read_refined, refine, summary

# In the folder of the clips: how they are made, what was made, and refined prompts.
SETTINGS, METADATA, REFINED = "generate.json", "metadata.jsonl", "refined.jsonl"


class Job(NamedTuple):
    """A clip that is to be made."""

    # Of the prompt in its list, from 0 on.
    number: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.number:05d}-{self.seed}.mp4"


def jobs_for(prompts: Sequence[str], clips: int = 1, seed: int = 0) -> list[Job]:
    """`clips` of each prompt; seeds count up from `seed` through all of them, so that each has noise of its own."""
    if not prompts:
        raise ValueError("there are no prompts: write one in each line")
    if clips < 1 or seed < 0:
        raise ValueError(f"{clips} clips of each prompt from seed {seed} on cannot be made; use 1 or more, from 0 on")
    places = product(enumerate(prompts), range(clips))
    return [Job(number, prompt, seed + number * clips + clip) for (number, prompt), clip in places]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one in each line of a `.txt`, or the captions of a `.jsonl`, `.csv` or `.parquet`.

    Raises ValueError with the remedy when there are none or a row has none, OSError when it cannot be opened.
    """
    if path.suffix.lower() == ".txt":
        text, _ = decode_text(path.read_bytes())
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        prompts = [prompt for _, prompt in read_captions(path)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one in each line")
    return prompts


def read_captions(path: Path) -> Iterator[tuple[Record, str]]:
    """The rows of a table with their captions; ValueError for what is none, and for a row without."""
    records = read_records(path)
    if records is None:
        raise ValueError(f"{path} holds no prompts: name a .txt with one in each line, a .jsonl or a .csv")
    for record in records:
        if not isinstance(record, Record):
            raise ValueError(f"{path}, {record.name}: {record.reason}: mend or remove it")
        caption = next((record.values[key] for key in CAPTION_COLUMNS if record.values.get(key)), None)
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"{path}, {record.where} has no prompt: call its column {' or '.join(map(repr, CAPTION_COLUMNS))}"
            )
        # Bytes that are no text stand there as what no file can hold.
        yield record, caption.strip().encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Settings:
    """How every clip is made; None is as trained."""

    checkpoint: Path = checkpoint.DEMO
    # With their strengths.
    loras: tuple[tuple[Path, float], ...] = ()
    negative_prompt: str = ""
    frames: int | None = None
    # Pixels.
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    steps: int = 25
    guidance_scale: float = 2.0
    sampler: str = "ddim"
    device: Literal["auto", "cpu"] = "auto"
    # None is float16, on a CPU float32.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def make_clips(
    jobs: Sequence[Job],
    out: Path,
    settings: Settings,
    refinement: Refinement | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Write the clips of `jobs` into the folder `out`; returns how many this process had to make.

    What is there and whole is kept. Of several processes, as `accelerate launch` starts them, each takes every n-th
    clip; which processes there are changes no byte. In the end `metadata.jsonl` names every clip with its prompt, the
    refined one and its seed, as `read_dataset` reads it.

    Raises ValueError for what the model cannot make, and for a folder with clips that were made in another way.
    """
    cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    maker = Maker(settings, state.device)
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / jobs[0].file)
    if state.is_main_process:
        _claim(out, maker.describe(refinement))
        if refinement:
            found = refine([job.prompt for job in jobs], refinement, out / REFINED, settings.device)
            log(summary(list(dict.fromkeys(found)), refinement.by))
    state.wait_for_everyone()
    better = read_refined(out / REFINED) if refinement else {}
    mine = jobs[state.process_index :: state.num_processes]
    made = 0
    for job in tqdm(mine, out.name, unit="clip", disable=None if state.is_main_process else True):
        made += maker.make(out / job.file, better.get(job.prompt, job.prompt), job.seed)
    state.wait_for_everyone()
    if state.is_main_process:
        rows = (
            {"file_name": job.file, "prompt": job.prompt, "refined": better.get(job.prompt), "seed": job.seed}
            for job in jobs
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(out / METADATA, lines, errors="replace")
        log(f"{out}: {len(jobs)} clips")
    return made


class Maker:
    """A model that makes one clip after the other, each in the same way. ValueError for what it cannot make."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        dtype = settings.dtype or ("float32" if device.type == "cpu" else "float16")
        loras = [(adapters.read(path), strength) for path, strength in settings.loras]
        self.model = checkpoint.load(settings.checkpoint, device=device, dtype=getattr(torch, dtype))
        for change, strength in loras:
            adapters.merge(self.model, change, strength)
        config: ModelConfig = self.model.config
        self.fps = config.fps if settings.fps is None else settings.fps
        check_fps("clip.mp4", self.fps)
        self.request: dict[str, Any] = {
            "negative_prompt": settings.negative_prompt,
            "num_frames": config.frames if settings.frames is None else settings.frames,
            "width": config.width if settings.width is None else settings.width,
            "height": config.height if settings.height is None else settings.height,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "sampler": settings.sampler,
        }
        shape = {name: self.request[name] for name in ("num_frames", "width", "height")}
        check_request(
            config, **shape, guidance_scale=settings.guidance_scale, sampler=settings.sampler, steps=settings.steps
        )
        # What every clip says about itself, as those of `videofactory generate` do.
        self.about = {
            "fps": self.fps,
            "checkpoint": settings.checkpoint.name,
            "title": self.model.metadata.title,
            "loras": [f"{path.name}:{strength:g}" for path, strength in settings.loras],
        }
        self.dtype = dtype

    def describe(self, refinement: Refinement | None) -> dict[str, Any]:
        """All that decides how a clip looks besides its prompt and its seed."""
        return {
            **self.request,
            **self.about,
            "dtype": self.dtype,
            "sha256": [
                checksum(path) for path in (self.settings.checkpoint, *(path for path, _ in self.settings.loras))
            ],
            "refined_by": refinement.by if refinement else None,
            "instruction": refinement.instruction if refinement else None,
        }

    def make(self, path: Path, prompt: str, seed: int) -> bool:
        """Write a clip unless it is there already and whole; whether it was written."""
        told = json.dumps({"prompt": prompt, **self.request, "seed": seed, **self.about}, ensure_ascii=False)
        if path.is_file():
            with suppress(ValueError, OSError):
                there = read_video(path)
                if there.metadata.get("videofactory") == told and len(there.frames) == self.request["num_frames"]:
                    return False
        frames = generate(self.model, prompt, **self.request, seed=seed)
        write_frames(path, frames, self.fps, {"videofactory": told})
        return True


def _claim(out: Path, now: dict[str, Any]) -> None:
    """Make the folder that of clips made in this way; ValueError when it is that of others."""
    file = out / SETTINGS
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key in now if before.get(key) != json.loads(json.dumps(now[key]))]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} says not how the clips were made ({error}): name another folder") from error
        if changed:
            key = changed[0]
            more = ", and others" if len(changed) > 1 else ""
            raise ValueError(
                f"{out} holds clips that were made in another way ({key} is {before.get(key)!r} there and {now[key]!r}"
                f" here{more}): name another folder, or delete it"
            )
    write_text(file, json.dumps(now, indent=1, ensure_ascii=False), errors="replace")
