"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type to compute in")


def add_sampling(command: argparse.ArgumentParser) -> None:
    """How a clip is sampled, besides its prompt and its seed."""
    command.add_argument("--checkpoint", type=Path, help="model to use (default: the demo model of this package)")
    command.add_argument("--frames", type=int, help="number of frames (default: as trained)")
    command.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels (default: as trained)")
    command.add_argument("--fps", type=float, help="frames a second (default: as trained)")
    command.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    command.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        metavar="G",
        help="how closely to follow the prompt; 1 is no guidance (default: 2)",
    )
    command.add_argument(
        "--sampler",
        default="ddim",
        metavar="NAME",
        help="ddim, euler, euler_ancestral, dpmpp_2m or unipc (default: %(default)s)",
    )
    command.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    command.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA to merge into the model first; may be repeated (default strength: 1)",
    )


def add_given(command: argparse.ArgumentParser) -> None:
    """Pictures and videos that the model begins with, leads up to or connects."""
    given = command.add_argument_group(
        "frames that are given",
        'The model makes the others to fit them and PROMPT, which may be "". A video keeps its frames, its size and its'
        " rate, and what is added gets them too.",
    )
    given.add_argument("--first-frame", type=Path, metavar="IMAGE", help="picture that the clip begins with")
    given.add_argument("--last-frame", type=Path, metavar="IMAGE", help="picture that it ends with")
    given.add_argument(
        "--frame",
        type=placed,
        action="append",
        default=[],
        metavar="INDEX=IMAGE",
        help="picture at another place, from 0, or from -1 at the end; may be repeated",
    )
    given.add_argument("--extend", type=Path, metavar="VIDEO", help="go on behind the end of a video")
    given.add_argument("--backward", action="store_true", help="with --extend: before its start")
    given.add_argument(
        "--between", type=Path, nargs=2, metavar=("A", "B"), help="lead from the end of a video to the start of another"
    )
    given.add_argument(
        "--fps-times",
        nargs=2,
        metavar=("N", "VIDEO"),
        help="make the frames in between, for N times as many a second",
    )
    given.add_argument(
        "--new-frames",
        type=int,
        metavar="N",
        help="with --extend and --between: how many to add (default: what a chunk has room for)",
    )
    given.add_argument(
        "--fit",
        choices=["crop", "pad", "stretch"],
        default="crop",
        help="what becomes of pictures and videos of another shape (default: %(default)s)",
    )
    given.add_argument(
        "--frame-guidance-scale",
        type=float,
        metavar="G",
        help="how closely to follow the frames; takes longer where both are above 1 (default: 1; with two frames or"
        " more 2, and the prompt's 1)",
    )
    # What is usual depends on the frames that are given.
    command.set_defaults(guidance_scale=None)


def add_chunks(command: argparse.ArgumentParser) -> None:
    """How clips are made that are longer than those that the model was trained on."""
    chunks = command.add_argument_group(
        "clips of any length",
        "Made in chunks that begin with the last frames of the one before. --frames alone makes all at once.",
    )
    chunks.add_argument(
        "--length", type=float, metavar="SECONDS", help="how long the clip is, or what is added to a video"
    )
    chunks.add_argument(
        "--chunk", type=int, metavar="N", help="frames of a chunk (default: as many as the model learned)"
    )
    chunks.add_argument(
        "--overlap", type=int, metavar="K", help="frames that a chunk knows before its own (default: a quarter of it)"
    )
    chunks.add_argument(
        "--anchors", type=int, default=0, metavar="N", help="show every chunk the first N frames too (default: 0)"
    )
    chunks.add_argument(
        "--match-colours", action="store_true", help="give every chunk the colours of the first, against drift"
    )
    chunks.add_argument(
        "--stagger",
        type=float,
        default=0.0,
        metavar="S",
        help="denoise frames one behind the other, the last by S of the way of each (default: 0, all at once)",
    )


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


def placed(text: str) -> tuple[int, Path]:
    """`INDEX=IMAGE`."""
    match = re.fullmatch(r"([-+]?\d{1,9})=(.+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"write INDEX=IMAGE, for example 8=middle.png, not {text!r}")
    return int(match[1]), Path(match[2])


def named(text: str) -> tuple[str, Path]:
    """`NAME=PATH`."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"write NAME=PATH, not {text!r}")
    return name, Path(path)
