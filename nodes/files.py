"""Model files: where they are looked for, and the ones that come with the pack."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ..videofactory_core.checkpoint import DEMO
from ..videofactory_core.upscaler import BUNDLED as UPSCALER

CHECKPOINTS, UPSCALERS, LORAS = "videofactory", "upscale_models", "loras"
# Public weights that become a model when they are loaded.
IMAGE_MODELS, MOTION_MODULES = "checkpoints", "animatediff_models"
# In every list beside the user's own files; brackets keep them apart from a file of the same name.
BUNDLED = {
    CHECKPOINTS: {"demo [bundled]": DEMO},
    UPSCALERS: {"demo-x4 [bundled]": UPSCALER},
}


def register() -> None:
    """Add `models/videofactory` to the folders that the host searches; paths of extra_model_paths.yaml stay."""
    folder_paths.add_model_folder_path(CHECKPOINTS, os.path.join(folder_paths.models_dir, CHECKPOINTS))
    folders, _ = folder_paths.folder_names_and_paths[CHECKPOINTS]
    folder_paths.folder_names_and_paths[CHECKPOINTS] = (folders, {".safetensors", ".sft"})
    if MOTION_MODULES not in folder_paths.folder_names_and_paths:
        # No other pack has registered the folder.
        folder_paths.add_model_folder_path(MOTION_MODULES, os.path.join(folder_paths.models_dir, MOTION_MODULES))
        folders, _ = folder_paths.folder_names_and_paths[MOTION_MODULES]
        folder_paths.folder_names_and_paths[MOTION_MODULES] = (folders, folder_paths.supported_pt_extensions)
    # A folder more, behind the user's own, so that the host's Load LoRA offers the one for the demo.
    folder_paths.add_model_folder_path(LORAS, str(DEMO.parent / LORAS))


def names(kind: str) -> list[str]:
    """What a list of this kind offers."""
    return [*BUNDLED.get(kind, {}), *folder_paths.get_filename_list(kind)]


def guests(kind: str) -> list[str]:
    """The user's files of this kind as they stand in the list of another."""
    return [f"{name} [{kind}]" for name in folder_paths.get_filename_list(kind)]


def place(name: str, kind: str, guest: str) -> tuple[str, str]:
    """The kind and the name that stand behind a name of the list of `kind`, which has guests of kind `guest`."""
    mark = f" [{guest}]"
    return (guest, name.removesuffix(mark)) if name.endswith(mark) else (kind, name)


def find(kind: str, name: str) -> Path:
    """The file behind a name of the list; ValueError for a name that leaves the folder or a file that is gone."""
    bundled = BUNDLED.get(kind, {})
    if name in bundled:
        return bundled[name]
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise ValueError(f"{name} points outside of models/{kind}: choose a file of the list")
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(f"{name} is not in models/{kind} any more: press R to read the list again and choose a file")
    return Path(path)


def state(kind: str, name: str) -> str:
    """Changes when the file does, so that a graph reads it again."""
    try:
        status = find(kind, name).stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_mtime_ns} {status.st_size}"


def refusal(kind: str, name: str) -> bool | str:
    """True for a name that `find` finds, else its sentence."""
    try:
        find(kind, name)
    except ValueError as error:
        return str(error)
    return True
