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
        help="how closely to follow the prompt; 1 is no guidance (default: %(default)s)",
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


def named(text: str) -> tuple[str, Path]:
    """`NAME=PATH`."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"write NAME=PATH, not {text!r}")
    return name, Path(path)
