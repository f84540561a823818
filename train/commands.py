"""What each command does, from its options to its files."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from videofactory_core.upscaler import Upscaler


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype say, else the best device, and half precision but on a CPU."""
    import torch

    from videofactory_core.memory import pick_device

    device = pick_device(options.device or "auto")
    return device, getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))


def load_upscaler(path: Path | None, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """The network of a file, or of this package."""
    from videofactory_core.upscaler import BUNDLED, load

    return load(path or BUNDLED).prepare(device, dtype)


def run_upscale(options: argparse.Namespace) -> None:
    """File to file, a few frames at a time."""
    from videofactory_core.video import check_writable

    check_writable(options.out)
    if options.batch < 1:
        raise ValueError(f"a batch of {options.batch} holds no frames; use 1 or more")

    import torch
    from tqdm import tqdm

    from videofactory_core.upscaler import check_tile, upscale_video

    check_tile(options.tile)
    if options.out.exists() and options.video.exists() and options.out.samefile(options.video):
        raise ValueError(f"{options.out} is the video to read; name another file to write")
    device, dtype = device_and_dtype(options)
    model = load_upscaler(options.model, device, dtype)
    damage = upscale_video(
        torch.compile(model) if options.compile else model,
        options.video,
        options.out,
        model.config.scale,
        device=device,
        tile=options.tile,
        batch=options.batch,
        repeat_damaged=options.repeat_damaged,
        watch=lambda frames, count: tqdm(frames, options.out.name, count, unit="frame"),
    )
    if damage:
        print(f"videofactory: {damage}", file=sys.stderr)
    print(options.out)


def run_inspect(options: argparse.Namespace) -> None:
    """Print what `checkpoint.explain` finds."""
    from videofactory_core.checkpoint import explain

    found = explain(options.file)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
        return
    rows = [("file", found.path), ("what", found.description), ("use", found.use)]
    rows += [(name, value) for name, value in (("title", found.title), ("origin", found.origin)) if value]
    rows += [("licence", found.licence or "not stated")]
    if found.config is not None:
        config = found.config
        rows += [("trained on", f"{config.frames} frames of {config.width}x{config.height} at {config.fps:g} a second")]
        rows += [("predicts", config.diffusion.prediction_type)]
    for part in found.parts:
        rows += [(part.name, f"{part.parameters / 1e6:,.2f} M parameters, {', '.join(part.dtypes)}")]
    for name in ("missing", "extra", "mismatched"):
        keys = getattr(found.differences, name)
        if keys:
            rows += [(name, f"{len(keys)} keys, such as {', '.join(keys[:3])}")]
    rows += [("made from", found.history["parents"])] if "parents" in found.history else []
    rows += [("trained with", found.history["dataset"])] if "dataset" in found.history else []
    rows += [("recipe", "see --json")] if "recipe" in found.history else []
    rows += [("note", note) for note in found.notes]
    for name, value in rows:
        print(f"{name:<14}{value}")


def run_train(options: argparse.Namespace) -> None:
    """Train a recipe."""
    from .run import run_recipe

    run_recipe(options.recipe, resume=options.resume, dry_run=options.dry_run, changes=options.changes)


def check_result(out: Path, inputs: list[Path], verb: str) -> None:
    """ValueError, before anything is read, when a checkpoint cannot be written as `out`."""
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} would be a checkpoint of another kind: end its name with .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} does not exist: make it first")
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"{out} is one of the files to {verb}; name another file to write")


def run_convert(options: argparse.Namespace) -> None:
    """Public weights to one checkpoint."""
    import torch
    from tqdm import tqdm

    from videofactory_core.convert import convert

    sources = (options.base, options.motion, options.text_encoder, options.vae)
    check_result(options.out, [path for path in sources if path is not None], "convert")
    made = convert(
        options.base,
        options.motion,
        options.text_encoder,
        options.vae,
        swap_attention=options.swap_ca,
        prediction_type=options.prediction_type,
        frames=options.frames,
        size=options.size,
    )
    if made.note:
        print(f"videofactory: {made.note}", file=sys.stderr)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    with tqdm(desc=options.out.name, unit="tensor") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update()

        made.save(options.out, dtype, show)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    """A checkpoint with LoRAs in its weights, in the types that it is stored in."""
    from videofactory_core import adapters, checkpoint

    check_result(options.out, [options.checkpoint, *(file for file, _ in options.lora)], "merge")
    loras = [(adapters.read(file), strength) for file, strength in options.lora]
    model = checkpoint.load(options.checkpoint, dtype=None)
    for change, strength in loras:
        adapters.merge(model, change, strength)
    checkpoint.save(options.out, model, model.metadata)
    print(options.out)


def run_fetch(options: argparse.Namespace) -> None:
    """Get a public weight, or list those that there are."""
    from .fetch import fetch, find, models_folder, read_table

    if options.name is None:
        for weight in read_table().values():
            print(f"{weight.name:<22}{weight.gigabytes:>6.2f} GB  {weight.licence:<26}{weight.title}")
        return
    weight = find(options.name)
    print(weight.notice, flush=True)
    for path in fetch(weight, options.to or models_folder()):
        print(path)


def run_curate(options: argparse.Namespace) -> None:
    """Carry out what is not done yet, then say which clips stay."""
    from .curate import runner
    from .curate.config import read_config
    from .curate.curation import Curation
    from .curate.report import write_report
    from .curate.sources import Tally, find_sources

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"{options.workers} processes do nothing; use 1 or more")
    if not 0 <= options.gpus < math.inf:
        raise ValueError(f"{options.gpus} GPUs cannot be had; use 0 or more")
    processes = options.workers or os.cpu_count() or 1
    config = read_config(options.config)
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    known = [stage.name for stage in config.stages()]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no stage {name!r}; choose of {', '.join(known)}")
    curation = Curation(options.out, config)

    def tell(tally: Tally) -> None:
        print(*tally.lines(), sep="\n")

    rows = find_sources(options.sources, options.look_in, options.hdvg, tell)
    curation.keep()
    if options.retry:
        curation.forget_failures(names)
    curation.add_sources(rows)
    run = runner.local(processes) if options.runner == "local" else runner.ray(options.workers, options.gpus)
    curation.run(run, processes, names)
    print(write_report(curation))


def run_curate_report(options: argparse.Namespace) -> None:
    """The pages, from what is on disk."""
    from .curate.curation import Curation
    from .curate.report import write_report

    print(write_report(Curation.read(options.folder)))


def run_curate_export(options: argparse.Namespace) -> None:
    """The clips that stay, for other programs."""
    from tqdm import tqdm

    from .curate.curation import Curation
    from .curate.export import export

    out = options.to or options.folder / "export"
    curation = Curation.read(options.folder)
    count = export(curation, options.format, out, lambda rows: tqdm(rows, "export", unit="clip", disable=None))
    print(f"{out}: {count} clips")


def run_data_check(options: argparse.Namespace) -> int:
    """Say how data would be used; exit code 1 when too much of it would not be."""
    from videofactory_core import checkpoint

    from .data.check import check
    from .data.samples import DatasetConfig
    from .recipe import TuningRecipe, UpscalerRecipe, read_recipe
    from .upscaler import large_frames, planning

    path, model = options.path, options.checkpoint or checkpoint.DEMO
    if path.suffix != ".toml":
        datasets, config, captions = [DatasetConfig(path=str(path))], checkpoint.check(model)[0].config, True
    else:
        recipe = read_recipe(path)
        if not isinstance(recipe, (TuningRecipe, UpscalerRecipe)) or not recipe.datasets:
            raise ValueError(f"{path} trains on no datasets: name a recipe with [[datasets]], or a folder of clips")
        model = options.checkpoint or recipe.checkpoint
        if isinstance(recipe, UpscalerRecipe):
            found = checkpoint.check(model)[0].config if model else None
            datasets, config, captions = list(large_frames(recipe, found)), planning(found), False
        else:
            stages = getattr(recipe, "stages", ())
            datasets = [*recipe.datasets, *(dataset for stage in stages for dataset in stage.datasets)]
            config, captions = checkpoint.check(model)[0].config, True
    return int(check(datasets, config, captions=captions, sheet=options.sheet) > options.max_dropped)
