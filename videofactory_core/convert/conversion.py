"""A model whose tensors still lie in the files that they come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import Metadata, Model
from ..config import ModelConfig
from ..detect import PREFIXES
from ..unet.model import VideoUNet
from .sources import Source

# Fixed, so that the same sources give the same bytes.
SEED = 0


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours comes from; `third` is which third of theirs it is, None for the whole."""

    source: Source
    name: str
    shape: tuple[int, ...]
    third: int | None = None

    def read(self) -> Tensor:
        tensor = self.source.read(self.name)
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        # Linear layers and convolutions over one pixel differ in dimensions of length one alone.
        return tensor.reshape(self.shape)


@dataclass(frozen=True)
class Conversion:
    """A model whose tensors still lie in the files that they come from; reads like `checkpoint.Checkpoint`."""

    config: ModelConfig
    metadata: Metadata
    # The model without memory for its weights.
    skeleton: Model
    # For each part our names and where they come from; what is missing here starts fresh.
    pieces: Mapping[str, Mapping[str, Piece]]

    @property
    def note(self) -> str:
        """What the licence forbids, or nothing."""
        return self.metadata.notice

    def read(
        self, part: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The state dict of "unet", "autoencoder" or "text_encoder", as `dtype` (None: as it is stored)."""
        found = {name: piece.read().to(device, dtype, copy=True) for name, piece in self.pieces[part].items()}
        if part == "unet":
            found |= {name: tensor.to(device) for name, tensor in self.fresh(next(iter(found.values())).dtype).items()}
        return found

    def fresh(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights of the U-Net that no source has, as a new model starts with them."""
        names = self.skeleton.unet.state_dict().keys() - self.pieces["unet"].keys()
        if not names:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            weights = VideoUNet(self.config.unet, dtype=dtype).state_dict()
        return {name: weights[name] for name in names}

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
        """The model in memory, in eval mode."""
        model = replace(self.skeleton, metadata=self.metadata)
        for part, module in model.parts().items():
            module.load_state_dict(self.read(part, device, dtype), assign=True)
            module.eval()
        return model

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float16,
        on_tensor: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write a checkpoint, one tensor after the other; raises what `checkpoint.write` raises.

        `on_tensor` is told how many tensors are written, of how many.
        """
        fresh = self.fresh(dtype)
        places = {
            PREFIXES[part] + name: (part, name, tensor)
            for part, module in self.skeleton.parts().items()
            for name, tensor in module.state_dict().items()
        }
        done = 0

        def read(key: str) -> Tensor:
            nonlocal done
            part, name, _ = places[key]
            tensor = self.pieces[part][name].read() if name in self.pieces[part] else fresh[name]
            done += 1
            on_tensor(done, len(places))
            return tensor

        shapes = {key: tensor for key, (_, _, tensor) in places.items()}
        checkpoint.write(path, shapes, checkpoint.header_strings(self.config, self.metadata), dtype, read)
