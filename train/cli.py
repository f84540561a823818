"""The `videofactory` command: what it understands."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import commands
from .arguments import add_chunks, add_device, add_given, add_sampling, lora, size
from .evaluate import command as evaluate
from .generate import run_generate

EPILOG = """\
examples:
  videofactory generate "a red circle moving right on a black background"
  videofactory generate "a blue square moving up on a white background" --seed 7 --out square.gif
  videofactory generate "a red circle moving right on a black background" --first-frame circle.png
  videofactory generate "a red circle moving right on a black background" --extend clip.mp4 --length 5
  videofactory upscale clip.mp4 --out large.mp4
  videofactory inspect model.safetensors
  videofactory data check clips --sheet clips.jpg
  videofactory curate videos --out curated
  videofactory train train/recipes/lora-12gb.toml --set datasets.path=curated --dry-run
  videofactory evaluate score clips --real videos --weights fvd-i3d=i3d_pretrained_400.pt
  videofactory fetch animatediff-v3
  videofactory convert --base sd15.safetensors --motion v3_sd15_mm.ckpt --out clip15.safetensors
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done, 1 a check that found too much, 2 something that the user can mend, 130 interrupted.
    """
    options = build_parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    warnings.showwarning = lambda message, *_, **__: print(f"videofactory: warning: {message}", file=sys.stderr)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        print(f"videofactory: {sentence}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from videofactory_core.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "videofactory: memory ran out; ask for a smaller size, or for fewer frames or clips at once",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"videofactory: interrupted{options.after_interrupt}", file=sys.stderr)
        return 130


def _joined(arguments: Sequence[str]) -> list[str]:
    """`curate report` and `curate export` are commands of their own, whatever else follows `curate`.

    And `--frame -1=IMAGE` has a value that looks like an option.
    """
    joined = list(arguments)
    if joined[:1] == ["curate"] and joined[1:2] and joined[1] in ("report", "export"):
        return [f"curate-{joined[1]}", *joined[2:]]
    for place in range(len(joined) - 1, 0, -1):
        if joined[place - 1] == "--frame" and re.match(r"-\d+=", joined[place]):
            joined[place - 1 : place + 1] = [f"--frame={joined[place]}"]
    return joined


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videofactory",
        description="Make short videos from text, look into model files, and train models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(after_interrupt="")
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = kinds.add_parser("generate", help="make a video from a prompt", description="Make a video.")
    generate.add_argument(
        "prompt",
        help="what the video shows, in quotes; or prompts for frames of the clip, those that it is shown counted too:"
        ' \'"0": "a cat", "8": "a dog"\'',
    )
    generate.add_argument("--out", type=Path, help="file to write: .mp4, .webm or .gif (default: named by the prompt)")
    generate.add_argument("--seed", type=int, default=0, help="number of the noise to start from (default: 0)")
    add_sampling(generate)
    add_device(generate)
    add_given(generate)
    add_chunks(generate)
    generate.add_argument(
        "--batch", type=int, default=1, metavar="N", help="clips to make, with seeds counting up (default: 1)"
    )
    generate.add_argument(
        "--upscale",
        action="store_true",
        help="make the frames four times as wide and high (a video keeps its size, and new frames get finer)",
    )
    generate.add_argument(
        "--upscaler", type=Path, metavar="FILE", help="upscaler to use, an RCAN (default: that of this package)"
    )
    generate.set_defaults(run=run_generate)

    upscale = kinds.add_parser(
        "upscale",
        help="make a video larger",
        description="Make a video four times as wide and high, frame by frame; its sound and its times stay.",
    )
    upscale.add_argument("video", type=Path, help="file to read")
    upscale.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write: .mp4, .webm or .gif")
    upscale.add_argument("--model", type=Path, metavar="FILE", help="an RCAN (default: that of this package)")
    upscale.add_argument(
        "--tile",
        type=int,
        default=0,
        metavar="N",
        help="work in squares of so many pixels a side (default: whole frames, and tiles when memory asks)",
    )
    upscale.add_argument("--batch", type=int, default=1, metavar="N", help="frames at once on a GPU (default: 1)")
    add_device(upscale)
    upscale.add_argument(
        "--compile", action="store_true", help="let PyTorch compile the network first, which pays for long videos"
    )
    upscale.add_argument(
        "--repeat-damaged",
        action="store_true",
        help="show the last good frame where one cannot be decoded, instead of stopping",
    )
    upscale.set_defaults(run=commands.run_upscale)

    inspect = kinds.add_parser("inspect", help="say what a model file is", description="Say what a model file is.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=commands.run_inspect)

    convert = kinds.add_parser(
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
    convert.set_defaults(run=commands.run_convert)

    merge = kinds.add_parser("merge", help="merge LoRAs into a model file", description="Merge LoRAs into a model.")
    merge.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="model to change")
    merge.add_argument(
        "--lora", type=lora, action="append", required=True, metavar="FILE[:STRENGTH]", help="LoRA; may be repeated"
    )
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    merge.set_defaults(run=commands.run_merge)

    fetch = kinds.add_parser("fetch", help="get a known public weight", description="Get a known public weight.")
    fetch.add_argument("name", nargs="?", metavar="NAME", help="which one (without it, they are listed)")
    fetch.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="a ComfyUI models folder (default: that of COMFYUI_PATH, else ~/comfy/ComfyUI/models, else models)",
    )
    fetch.set_defaults(run=commands.run_fetch)

    train = kinds.add_parser("train", help="train a model", description="Train what a recipe (TOML) says.")
    train.add_argument("recipe", type=Path)
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a setting of the recipe, such as datasets.path=clips or schedule.steps=500; may be repeated",
    )
    train.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="take two steps, and say how long the recipe will take and how much memory",
    )
    train.set_defaults(run=commands.run_train, after_interrupt="; --resume goes on from the last state")

    curate = kinds.add_parser(
        "curate",
        help="cut, measure, caption and filter raw videos",
        description="Cut videos into scenes, measure text, motion and beauty, write captions, and say which clips stay."
        " What is done is kept: run it again after it was stopped, with more videos, or with other thresholds.",
        epilog="`videofactory curate report DIR` makes the page again, `videofactory curate export DIR` cuts clips.",
    )
    curate.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="videos, folders, shards (.tar), or lists of a dataset"
    )
    curate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything that is found")
    curate.add_argument("--config", type=Path, metavar="FILE", help="settings (.toml); see train/curate/curate.toml")
    curate.add_argument(
        "--stages", default="", metavar="LIST", help="only these, such as scenes,keyframe,motion (default: all)"
    )
    curate.add_argument(
        "--look-in",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where the videos of a list are; may be repeated (default: beside the list)",
    )
    curate.add_argument(
        "--hdvg",
        choices=["stream_copy", "approx"],
        default="stream_copy",
        help="how scenes of HD-VG-130M are found in whole videos (default: %(default)s)",
    )
    curate.add_argument("--runner", choices=["local", "ray"], default="local", help="(default: %(default)s)")
    curate.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    curate.add_argument(
        "--gpus",
        type=float,
        default=0.0,
        metavar="N",
        help="with ray: GPUs of each process, such as 1 or 0.5 (default: 0)",
    )
    curate.add_argument("--retry", action="store_true", help="do again what failed, such as while a server was down")
    curate.set_defaults(run=commands.run_curate, after_interrupt="; run the same command again to go on")

    report = kinds.add_parser("curate-report", prog="videofactory curate report", description="Make the pages again.")
    report.add_argument("folder", type=Path, metavar="DIR", help="what `videofactory curate --out` wrote")
    report.set_defaults(run=commands.run_curate_report)

    export = kinds.add_parser(
        "curate-export", prog="videofactory curate export", description="Write the clips that stay for other programs."
    )
    export.add_argument("folder", type=Path, metavar="DIR", help="what `videofactory curate --out` wrote")
    export.add_argument(
        "--format",
        choices=["folder", "jsonl", "webdataset"],
        default="folder",
        help="clips cut out with captions beside them, a list that points into the sources, or shards"
        " (default: %(default)s)",
    )
    export.add_argument("--to", type=Path, metavar="DIR", help="folder to write (default: DIR/export)")
    export.set_defaults(run=commands.run_curate_export)

    evaluate.add(kinds)

    data = kinds.add_parser("data", help="look at what would be trained on", description="Look at training data.")
    looks = data.add_subparsers(required=True, metavar="COMMAND")
    check = looks.add_parser(
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
    check.set_defaults(run=commands.run_data_check)
    return parser
