"""Models of others in local folders, as transformers keeps them; nothing is looked for anywhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.bin")
# The first version of transformers that calls a type `dtype`.
LEAST_VERSION = (4, 56)


def lacking(folder: str) -> str:
    """What keeps `folder` from being a model's, "" when nothing is seen to."""
    if not folder:
        return "no folder is named"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return f"{folder} has no config.json"
    if not any(next(Path(folder).glob(pattern), None) for pattern in WEIGHTS):
        return f"{folder} has no weights ({' or '.join(WEIGHTS)})"
    return ""


def load(setting: str, kind: Any, folder: str, **options: Any) -> Any:
    """`kind.from_pretrained(folder)`; ValueError that names the `setting` when the folder does not hold one."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # damaged files meet libraries of several makers
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{setting}: {folder} cannot be loaded ({lines[0]}): get it again") from error


def load_model(setting: str, kind: Any, folder: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model, for use alone, in `dtype`; None is float32 on a CPU, else the half type that it is made for.

    ValueError as `load`, when the folder lacks some of its weights, as another model's does, and with a transformers
    that is too old.
    """
    from transformers import __version__
    from transformers.utils import logging

    if tuple(int(part) for part in __version__.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"{setting}: transformers is {__version__} and must be {least} or newer: update it")
    # The bar is the command's.
    logging.disable_progress_bar()
    if dtype is None:
        dtype = _dtype(setting, folder, device)
    model, told = load(setting, kind, folder, dtype=dtype, output_loading_info=True)
    if told["missing_keys"]:
        first = sorted(told["missing_keys"])[0]
        raise ValueError(
            f"{setting}: {folder} lacks {first} and maybe more, so it is another model or not whole: name another"
        )
    return model.to(device).eval().requires_grad_(False)


def _dtype(setting: str, folder: str, device: torch.device) -> torch.dtype:
    import torch
    from transformers import AutoConfig

    if device.type == "cpu":
        return torch.float32
    # What was trained in bfloat16 may overflow in float16.
    config = load(setting, AutoConfig, folder)
    return torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float16
