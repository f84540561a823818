"""LoRA (Hu et al., arXiv 2106.09685): changes of linear layers, small enough to train and to share on their own."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor, nn

from .checkpoint import modelspec, write
from .ops import zeroed

# The name of the U-Net in a file, as the host's own reader expects it.
PREFIX = "diffusion_model."


class LowRank(nn.Module):
    """What is added to a linear layer's output: `alpha / rank * up(down(x))`, which is zero at first."""

    alpha: Tensor

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = zeroed(nn.Linear(rank, layer.out_features, bias=False))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_up(self.lora_down(x)) * self.scale


class Adapter(nn.Module):
    """The changes of every linear layer of `model` whose name `layers`, a regular expression, finds.

    From now on the model calculates with them; its own weights and their names stay as they are. Raises ValueError
    when no layer is found or the rank is not that of a change.
    """

    def __init__(self, model: nn.Module, layers: str, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: {rank} changes nothing; use 1 or more")
        try:
            chosen = {
                name: module
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and re.search(layers, name)
            }
        except re.error as error:
            raise ValueError(f"layers: {layers!r} is no regular expression ({error})") from error
        if not chosen:
            raise ValueError(f"layers: no linear layer has a name with {layers!r} in it")
        self.names = tuple(chosen)
        self.changes = nn.ModuleList(LowRank(layer, rank, alpha) for layer in chosen.values())
        for layer, change in zip(chosen.values(), self.changes, strict=True):
            layer.register_forward_hook(lambda _, inputs, output, change=change: output + change(inputs[0]))

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that programs which load a LoRA know."""
        return {
            f"{PREFIX}{name}.{key}": value
            for name, change in zip(self.names, self.changes, strict=True)
            for key, value in change.state_dict().items()
        }


def save(path: str | os.PathLike[str], adapter: Adapter, title: str, licence: str, origin: str) -> None:
    """Write `adapter` in half precision; raises what `checkpoint.write` raises."""
    strings = {"format": "videofactory-lora", **modelspec("videofactory-v1/lora", title, licence, origin)}
    write(path, adapter.tensors(), strings, torch.float16)
