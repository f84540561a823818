"""Which device there is, how much memory it has, and what it looks like when that is not enough."""

from __future__ import annotations

import os

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`, or the best there is for "auto"; ValueError for one that is not there."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=name)
    # A PyTorch that was built without CUDA asserts that it was built with it.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} that this PyTorch can use; try cpu, cuda or mps") from error
    return torch.device(name)


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    # On CPUs and on Apple's devices it is a plain RuntimeError that says so.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
