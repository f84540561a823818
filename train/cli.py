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
  videofactory train train/recipes/demo.toml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 something that the user can mend, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"videofactory: warning: {message}", file=sys.stderr)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        print(f"videofactory: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("videofactory: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videofactory",
        description="Make short videos from text, look into model files, and train models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    generate.set_defaults(run=run_generate)

    inspect = commands.add_parser("inspect", help="say what a model file is", description="Say what a model file is.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=run_inspect)

    train = commands.add_parser("train", help="train a model", description="Train what a recipe (TOML) says.")
    train.add_argument("recipe", type=Path)
    train.set_defaults(run=run_train)
    return parser


def size(text: str) -> tuple[int, int]:
    """`WxH` as two numbers."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"write the size as WIDTHxHEIGHT, for example 128x72, not {text!r}")
    return int(match[1]), int(match[2])


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

    from videofactory_core import checkpoint
    from videofactory_core.pipeline import generate
    from videofactory_core.video import check_fps, write_video

    path = options.checkpoint or checkpoint.DEMO
    try:
        device = torch.device(options.device or best_device())
    except RuntimeError as error:
        raise ValueError(f"there is no device {options.device!r}; try cpu, cuda or mps") from error
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))
    model = checkpoint.load(path, device=device, dtype=dtype)
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
        settings = {**request, "fps": fps, "checkpoint": Path(path).name, "title": model.metadata.title}
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
    rows += [("note", note) for note in found.notes]
    for name, value in rows:
        print(f"{name:<14}{value}")


def run_train(options: argparse.Namespace) -> None:
    """Train a recipe."""
    from .recipe import run_recipe

    print(run_recipe(options.recipe))
