"""Where weights come from: files and folders of other programs, read one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import CheckpointError, container, open_pickle, read_header

INDEX = ".index.json"
# Left by wrappers around the model that was saved.
WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Source:
    """Tensors of one file, or of the shards of one; memory holds those alone that are being read."""

    path: Path
    # Without `prefix`.
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    # The safetensors file of each key.
    files: Mapping[str, Path]
    # A pickle's tensors, windows onto the file.
    opened: Mapping[str, Tensor]
    prefix: str = ""

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored; CheckpointError when the file changed or broke meanwhile."""
        key = self.prefix + name
        if key in self.opened:
            return self.opened[key]
        try:
            with safe_open(self.files[key], framework="pt") as file:
                # A copy, because the reader's tensors keep the pages of the file that they lie on.
                tensor: Tensor = file.get_tensor(key).clone()
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} changed or broke while it was read ({error}); try again") from error

    def under(self, prefix: str) -> Source:
        """Only the tensors whose names begin with `prefix`, and without it."""
        shapes = {name.removeprefix(prefix): s for name, s in self.shapes.items() if name.startswith(prefix)}
        return replace(self, shapes=shapes, prefix=self.prefix + prefix)


def open_source(path: Path) -> Source:
    """A safetensors file, a pickle that holds nothing but tensors, an index of shards, or a folder with one of these.

    Raises CheckpointError for anything else.
    """
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if container(path) == "pickle":
        tensors = open_pickle(path, "cpu")
        return _unwrapped(Source(path, {key: tuple(t.shape) for key, t in tensors.items()}, {}, {}, tensors))
    header = read_header(path)
    return _unwrapped(Source(path, header.shapes, header.metadata, dict.fromkeys(header.shapes, path), {}))


def _unwrapped(source: Source) -> Source:
    for wrapper in WRAPPERS:
        if source.shapes and all(name.startswith(wrapper) for name in source.shapes):
            source = source.under(wrapper)
    return source


def _weights_in(folder: Path) -> Path:
    """The one file of weights in a folder of diffusers or transformers; full precision goes before half."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in stems:
            # Of shards stands `model.safetensors.index.json`, and of the half ones `model.safetensors.index.fp16.json`.
            kind = ending.removeprefix(".fp16")
            variant = ".fp16" if ending.startswith(".fp16") else ""
            for name in (f"{stem}{ending}", f"{stem}{kind}.index{variant}.json"):
                if (folder / name).is_file():
                    return folder / name
    raise CheckpointError(
        f"{folder} has no weights ({stems[0]}.safetensors or the like): name the file, or get the folder again"
    )


def _open_shards(index: Path) -> Source:
    try:
        table = json.loads(index.read_text())["weight_map"]
        files = {str(key): str(name) for key, name in table.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error}); get the folder again") from error
    shapes: dict[str, tuple[int, ...]] = {}
    opened: dict[str, Tensor] = {}
    paths: dict[str, Path] = {}
    for name in sorted(set(files.values())):
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise CheckpointError(f"{index} names a shard outside its folder ({name!r:.60}); do not trust it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {name}; download the folder again")
        shard = open_source(index.parent / name)
        shapes.update(shard.shapes)
        opened.update(shard.opened)
        paths.update(shard.files)
    lacking = sorted(set(files) - set(shapes))
    if lacking:
        raise CheckpointError(f"{index.parent} lacks {lacking[0]} and maybe more; download the folder again")
    return Source(index, shapes, {}, paths, opened)


def read_settings(folder: Path, *names: str) -> dict[str, Any]:
    """A JSON file below a folder, nothing where there is none; CheckpointError when it is damaged."""
    path = folder.joinpath(*names)
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings; get it again")
    return settings
