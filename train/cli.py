"""The `videofactory` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

EPILOG = """\
examples:
  videofactory generate "a red circle moving right on a black background"
  videofactory generate "a blue square moving up on a white background" --seed 7 --out square.gif
  videofactory inspect model.safetensors
  videofactory data check clips --sheet clips.jpg
  videofactory train train/recipes/lora-12gb.toml --dry-run
  videofactory fetch animatediff-v3
  videofactory convert --base sd15.safetensors --motion v3_sd15_mm.ckpt --out clip15.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done, 1 a check that found too much, 2 something that the user can mend, 130 interrupted.
    """
    options = build_parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"videofactory: warning: {message}", file=sys.stderr)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        print(f"videofactory: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"videofactory: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videofactory",
        description="Make short videos from text, look into model files, and train models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(after_interrupt="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make a video from a prompt", description="Make a video.")
    generate.add_argument("prompt", help="what the video shows, in quotes")
    generate.add_argument("--out", type=Path, help="file to write: .mp4, .webm or .gif (default: named by the prompt)")
    generate.add_argument("--checkpoint", type=Path, help="model to use (default: the demo model of this package)")
    generate.add_argument("--frames", type=int, help="length in frames (default: as trained)")
    generate.add_argument("--size", type=size, metavar="WxH", help="width x height in pixels (default: as trained)")
    generate.add_argument("--fps", type=float, help="frames a second of the file (default: as trained)")
    generate.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    generate.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        metavar="G",
        help="how closely to follow the prompt; 1 is no guidance (default: %(default)s)",
    )
    generate.add_argument(
        "--sampler",
        default="ddim",
        metavar="NAME",
        help="ddim, euler, euler_ancestral, dpmpp_2m or unipc (default: %(default)s)",
    )
    generate.add_argument("--seed", type=int, default=0, help="number of the noise to start from (default: 0)")
    generate.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    generate.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    generate.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type to compute in")
    generate.add_argument(
        "--batch", type=int, default=1, metavar="N", help="clips to make, with seeds counting up (default: 1)"
    )
    generate.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to merge into the model first; may be repeated (default strength: 1)",
    )
    generate.set_defaults(run=run_generate)

    inspect = commands.add_parser("inspect", help="say what a model file is", description="Say what a model file is.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=run_inspect)

    convert = commands.add_parser(
        "convert",
        help="make a model from public weights",
        description="Make a VideoFactory model from Stable Diffusion, ModelScope, ZeroScope and AnimateDiff weights.",
    )
    convert.add_argument("--base", type=Path, required=True, help="image or video model: a file, or a diffusers folder")
    convert.add_argument("--motion", type=Path, help="AnimateDiff motion module: a file or a folder")
    convert.add_argument("--text-encoder", type=Path, metavar="FILE", help="where the base has none, or another")
    convert.add_argument("--vae", type=Path, metavar="FILE", help="where the base has none, or another")
    convert.add_argument(
        "--swap-ca",
        action=argparse.BooleanOptionalAction,
        help="end blocks with Swap-Attention, to be trained (default: where the base has no motion)",
    )
    convert.add_argument(
        "--prediction-type", choices=["epsilon", "v_prediction"], help="needed for single files of Stable Diffusion 2"
    )
    convert.add_argument("--frames", type=int, default=16, help="length that it was trained on (default: %(default)s)")
    convert.add_argument("--size", type=size, metavar="WxH", help="size that it was trained on (default: by its kind)")
    convert.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16", help="(default: %(default)s)")
    convert.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    convert.set_defaults(run=run_convert)

    merge = commands.add_parser("merge", help="merge LoRAs into a model file", description="Merge LoRAs into a model.")
    merge.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="model to change")
    merge.add_argument(
        "--lora", type=lora, action="append", required=True, metavar="FILE[:STRENGTH]", help="LoRA; may be repeated"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    merge.set_defaults(run=run_merge)

    fetch = commands.add_parser("fetch", help="get a known public weight", description="Get a known public weight.")
    fetch.add_argument("name", nargs="?", metavar="NAME", help="which one (without it, they are listed)")
    fetch.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="a ComfyUI models folder (default: that of COMFYUI_PATH, else ~/comfy/ComfyUI/models, else models)",
    )
    fetch.set_defaults(run=run_fetch)

    train = commands.add_parser("train", help="train a model", description="Train what a recipe (TOML) says.")
    train.add_argument("recipe", type=Path)
    train.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="take two steps, and say how long the recipe will take and how much memory",
    )
    train.set_defaults(run=run_train, after_interrupt="; --resume goes on from the last state")

    data = commands.add_parser("data", help="look at what would be trained on", description="Look at training data.")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    check = kinds.add_parser(
        "check",
        help="say of every clip how it would be used, or why not",
        description="Say of every clip how it would be used, or why not. Exit code 1 when too many are left out.",
    )
    check.add_argument("path", type=Path, help="a recipe (.toml), or a folder, metadata.jsonl, .csv, .parquet or .tar")
    check.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="whose length, size and rate to use for a folder"
    )
    check.add_argument("--sheet", type=Path, metavar="FILE", help="picture to write with frames of every clip")
    check.add_argument(
        "--max-dropped",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of clips that may be left out (default: %(default)s)",
    )
    check.set_defaults(run=run_data_check)
    return parser


def size(text: str) -> tuple[int, int]:
    """`WxH` as two numbers."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"write the size as WIDTHxHEIGHT, for example 128x72, not {text!r}")
    return int(match[1]), int(match[2])


def lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (Path(match[1]), float(match[2])) if match else (Path(text), 1.0)


def output_files(options: argparse.Namespace) -> list[Path]:
    """One file a clip; several get their number before the suffix."""
    if options.batch < 1:
        raise ValueError(f"a batch of {options.batch} makes nothing; ask for 1 or more")
    name = re.sub(r"[^a-z0-9]+", "-", options.prompt.lower()).strip("-")[:60].strip("-") or "clip"
    out = options.out or Path(f"{name}-seed{options.seed}.mp4")
    if options.batch == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(options.batch)]


def best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def run_generate(options: argparse.Namespace) -> None:
    """Prompt to file: everything that can be refused is refused before the model is loaded."""
    from videofactory_core.video import check_writable

    files = output_files(options)
    for file in files:
        check_writable(file)

    import torch
    from tqdm import tqdm

    from videofactory_core import adapters, checkpoint
    from videofactory_core.pipeline import generate
    from videofactory_core.video import check_fps, write_video

    path = options.checkpoint or checkpoint.DEMO
    try:
        device = torch.device(options.device or best_device())
    except RuntimeError as error:
        raise ValueError(f"there is no device {options.device!r}; try cpu, cuda or mps") from error
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))
    loras = [(adapters.read(file), strength) for file, strength in options.lora]
    model = checkpoint.load(path, device=device, dtype=dtype)
    for change, strength in loras:
        adapters.merge(model, change, strength)
    width, height = options.size or (model.config.width, model.config.height)
    num_frames = model.config.frames if options.frames is None else options.frames
    fps = model.config.fps if options.fps is None else options.fps
    for file in files:
        check_fps(file, fps)

    for i, file in enumerate(files):
        request: dict[str, Any] = {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "num_frames": num_frames,
            "width": width,
            "height": height,
            "steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "sampler": options.sampler,
            "seed": options.seed + i,
        }
        with tqdm(total=options.steps, desc=file.name, unit="step") as bar:
            frames = generate(model, **request, on_step=lambda *_, bar=bar: bar.update())  # type: ignore[misc]
        settings = {
            **request,
            "fps": fps,
            "checkpoint": Path(path).name,
            "title": model.metadata.title,
            "loras": [f"{change.path.name}:{strength:g}" for change, strength in loras],
        }
        write_video(file, frames, fps, {"videofactory": json.dumps(settings, ensure_ascii=False)})
        print(file)


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

    run_recipe(options.recipe, resume=options.resume, dry_run=options.dry_run)


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


def run_data_check(options: argparse.Namespace) -> int:
    """Say how data would be used; exit code 1 when too much of it would not be."""
    from videofactory_core import checkpoint

    from .data.check import check
    from .data.samples import DatasetConfig
    from .recipe import TuningRecipe, read_recipe

    path, model = options.path, options.checkpoint or checkpoint.DEMO
    datasets = [DatasetConfig(path=str(path))]
    if path.suffix == ".toml":
        recipe = read_recipe(path)
        if not isinstance(recipe, TuningRecipe) or not recipe.datasets:
            raise ValueError(f"{path} trains on no datasets: name a recipe with [[datasets]], or a folder of clips")
        stages = getattr(recipe, "stages", ())
        datasets = [*recipe.datasets, *(dataset for stage in stages for dataset in stage.datasets)]
        model = options.checkpoint or recipe.checkpoint
    config = checkpoint.check(model)[0].config
    return int(check(datasets, config, sheet=options.sheet) > options.max_dropped)
