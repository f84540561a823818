"""`videofactory data check`: what datasets give to train on, clip by clip, and why the rest is left out."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from videofactory_core.config import ModelConfig
from videofactory_core.text import END_TOKEN, START_TOKEN, Tokenizer

from ..contact_sheet import contact_sheet
from .samples import DatasetConfig, Planned, decode, plan
from .sources import read_dataset, without_captions

COLUMNS = ("clip", "frames", "fps", "size", "samples", "tokens", "note")
LONGEST_NAME = 40
# The contact sheet.
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")
SHEET_CLIPS = 60


def check(
    datasets: Sequence[DatasetConfig],
    model: ModelConfig,
    *,
    captions: bool = True,
    sheet: Path | None = None,
    decoding: bool = True,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> float:
    """Log a line for each clip and a summary, and write a contact sheet; returns the share of clips that is left out.

    Clips need `captions`, unless what is trained learns from pictures alone. With `decoding`, the first sample of every
    clip is decoded, for a file may be damaged behind a good beginning. `workers` files are looked at at a time
    (default: one for each core). Raises ValueError with the remedy when a dataset cannot be read at all, the model does
    not take a size, or the sheet cannot be written there.
    """
    if sheet is not None:
        _check_sheet(sheet, datasets)
    workers = workers or os.cpu_count() or 1
    clips: list[Planned] = []
    rates: list[float] = []
    for config in datasets:
        found = read_dataset(Path(config.path), config.caption_extension)
        clips += plan(found if captions else without_captions(found), config, model, workers)
        rates += [config.fps or model.fps] * (len(clips) - len(rates))
    usable = [number for number, clip in enumerate(clips) if clip.samples]
    shown = usable[:: max(1, math.ceil(len(usable) / SHEET_CLIPS))] if sheet is not None else []
    frames: dict[int, Tensor] = {}
    for number, sample in _first_samples(clips, usable if decoding else shown, workers):
        if isinstance(sample, str):
            clips[number] = replace(clips[number], samples=(), reason=sample)
        elif number in shown:
            frames[number] = sample
    tokenizer = Tokenizer(END_TOKEN, model.text.max_tokens)
    for line in _aligned([COLUMNS, *(_row(clip, fps, tokenizer) for clip, fps in zip(clips, rates, strict=True))]):
        log(line)
    kept = [(clip, fps) for clip, fps in zip(clips, rates, strict=True) if clip.samples]
    samples = [sample for clip, _ in kept for sample in clip.samples]
    share = 1 - len(kept) / len(clips)
    length = timedelta(seconds=round(sum(clip.used / fps for clip, fps in kept)))
    out = f"{len(clips) - len(kept)} ({share:.0%})"
    log(f"clips: {len(clips)}, left out: {out}, samples: {len(samples)}, length: {length}")
    for bucket, count in sorted(Counter(sample.bucket for sample in samples).items()):
        log(f"samples of {bucket}: {count}")
    if sheet is not None and frames:
        labels = (f"{clips[number].clip.name}\n{clips[number].clip.caption}" for number in frames)
        contact_sheet(list(zip(labels, frames.values(), strict=True))).save(sheet)
        log(f"{sheet} shows {len(frames)} of {len(kept)} clips")
    return share


def _first_samples(
    clips: Sequence[Planned], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, Tensor | str]]:
    """The numbered clips' first samples, or why they cannot be decoded, in order."""

    def look(number: int) -> tuple[int, Tensor | str]:
        try:
            return number, decode(clips[number].samples[0])
        except ValueError as error:
            return number, str(error).removeprefix(f"{clips[number].clip.name} ")

    with ThreadPool(workers) as pool:
        yield from tqdm(pool.imap(look, numbers), "decode", len(numbers), unit="clip", disable=None)


# The table


def _row(planned: Planned, fps: float, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A line of the table: what is known of a clip, and what becomes of it."""
    clip, found = planned.clip, planned.probe
    notes = [f"left out: {planned.reason}"] if planned.reason else []
    notes += [planned.note] if planned.note else []
    tokens = ""
    if clip.caption is not None:
        chunks = tokenizer(clip.caption)
        number = int((chunks < START_TOKEN).sum())
        tokens = str(number)
        if len(chunks) > 1:
            notes.append(f"the caption takes {len(chunks)} chunks of {tokenizer.max_tokens - 2} tokens")
    frames = rate = size = ""
    if found is not None:
        moves = found.frames > 1
        frames, rate = f"{planned.used}/{planned.available}", f"{found.fps:.4g} -> {fps:.4g}" if moves else "picture"
        size = f"{found.width}x{found.height}"
        if planned.samples:
            size += f" -> {planned.samples[0].bucket.width}x{planned.samples[0].bucket.height}"
    name = clip.name if len(clip.name) <= LONGEST_NAME else f"...{clip.name[3 - LONGEST_NAME :]}"
    return name, frames, rate, size, str(len(planned.samples)), tokens, "; ".join(notes)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        # Names of files need not be text.
        yield line.encode("utf-8", "replace").decode()


# The contact sheet


def _check_sheet(path: Path, datasets: Sequence[DatasetConfig]) -> None:
    """ValueError when the sheet cannot be written to `path`, or would be taken for a clip the next time."""
    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise ValueError(f"{path} does not name a picture: end it with {' or '.join(SHEET_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: create it, or choose another place for {path.name}")
    for config in datasets:
        if Path(config.path).resolve() in path.resolve().parents:
            raise ValueError(f"{path} would become part of the dataset {config.path}: choose another place for it")
