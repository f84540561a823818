"""LoRA (Hu et al., arXiv 2106.09685): changes of layers, small enough to train and to share on their own.

While it is trained, an `Adapter` calculates beside the model. A finished one is merged into the weights, whichever
program wrote it: then nothing is calculated twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import lora_names
from .checkpoint import CheckpointError, Metadata, Model, modelspec, write
from .convert.sources import open_source
from .detect import identify
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
        # A layer may compute in fewer bits than its change is trained in.
        down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        return F.linear(F.linear(x, down), up) * self.scale


class Adapter(nn.Module):
    """The changes of every linear layer of `model` whose name `layers`, a regular expression, finds.

    Until `remove` the model calculates with them; its own weights and their names stay as they are. Raises ValueError
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
        self.hooks = [
            layer.register_forward_hook(lambda _, inputs, output, change=change: output + change(inputs[0]))
            for layer, change in zip(chosen.values(), self.changes, strict=True)
        ]

    def remove(self) -> None:
        """Let the model calculate without the changes again."""
        for hook in self.hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that programs which load a LoRA know."""
        return {
            f"{PREFIX}{name}.{key}": value
            for name, change in zip(self.names, self.changes, strict=True)
            for key, value in change.state_dict().items()
        }


def save(
    path: str | os.PathLike[str],
    adapter: Adapter,
    title: str,
    licence: str,
    origin: str,
    other: Mapping[str, str] | None = None,
) -> None:
    """Write `adapter` in half precision, with `other` entries in its header; raises what `checkpoint.write` raises."""
    strings = {
        **(other or {}),
        "format": "videofactory-lora",
        **modelspec("videofactory-v1/lora", title, licence, origin),
    }
    write(path, adapter.tensors(), strings, torch.float16)


# Reading

# A layer's name and which half of its change a key holds, as kohya, PEFT and diffusers (three ways) write it.
HALF = re.compile(
    r"(?P<layer>.+?)(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(?P<half>down|up|A|B)(?:\.default)?\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
# Changes that are more than two matrices, by what only their keys have.
UNSUPPORTED = {
    ".hada_w": "a LoHa",
    ".lokr_w": "a LoKr",
    ".lora_mid.": "a LoCon with middle layers (lora_mid)",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
}


@dataclass(frozen=True)
class Change:
    """What is added to one layer's weight, its kernel flattened: `alpha / rank * up @ down`, `[out, in]` in float32.

    `down [rank, in]`, `up [out, rank]`; `keys` are where they stand in the file.
    """

    down: Tensor
    up: Tensor
    alpha: float
    keys: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


@dataclass(frozen=True)
class LoRA:
    """A file's changes by the names that it gives to layers, and its keys that belong to none."""

    path: Path
    metadata: Metadata
    changes: dict[str, Change]
    other_keys: tuple[str, ...]


def read(path: str | os.PathLike[str]) -> LoRA:
    """Read a LoRA file in any of the namings that `merge` knows.

    Raises CheckpointError for what is neither safetensors nor a pickle of tensors alone, holds no LoRA, or one that is
    more than two matrices a layer.
    """
    path = Path(path)
    source = open_source(path)
    for mark, kind in UNSUPPORTED.items():
        if any(mark in key for key in source.shapes):
            raise CheckpointError(f"{path} is {kind}, which cannot be merged here; use a plain LoRA")
    halves: dict[str, dict[str, str]] = {}
    for key in source.shapes:
        if match := HALF.fullmatch(key):
            half = {"A": "down", "B": "up"}.get(match["half"], match["half"])
            halves.setdefault(match["layer"], {})[half] = key
    if not halves:
        kind = identify(source.shapes).description
        raise CheckpointError(f"{path} has no LoRA under names known here (it looks like {kind}); name a LoRA file")
    for key in source.shapes:
        if (match := ALPHA.fullmatch(key)) and match["layer"] in halves:
            halves[match["layer"]]["alpha"] = key
    stated = _stated_alphas(source.metadata)
    changes = {}
    for layer, keys in halves.items():
        _check_halves(path, source.shapes, layer, keys)
        tensors = {half: source.read(key) for half, key in keys.items()}
        if not (tensors["down"].is_floating_point() and tensors["up"].is_floating_point()):
            raise CheckpointError(f"{path} is damaged: the numbers of {layer} are no weights; get it again")
        down, up = (tensors[half].float().flatten(1) for half in ("down", "up"))
        alpha = tensors["alpha"].item() if "alpha" in keys else stated.get(layer.partition(".")[0], len(down))
        if not (math.isfinite(alpha) and down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(f"{path} has numbers in {layer} that are not finite; get another version")
        changes[layer] = Change(down, up, alpha, tuple(keys.values()))
    used = {key for keys in halves.values() for key in keys.values()}
    strings = source.metadata
    metadata = Metadata(
        title=strings.get("modelspec.title", path.stem),
        licence=strings.get("modelspec.license", "unknown"),
        origin=strings.get("origin", "unknown"),
    )
    return LoRA(path, metadata, changes, tuple(key for key in source.shapes if key not in used))


def _stated_alphas(strings: Mapping[str, str]) -> dict[str, float]:
    """For "unet" and "text_encoder" the alpha that diffusers' training scripts state in the header, not in tensors."""
    try:
        table = json.loads(strings.get("lora_adapter_metadata", "{}"))
        stated = [part for part in ("unet", "text_encoder") if f"{part}.lora_alpha" in table]
        return {part: float(table[f"{part}.lora_alpha"]) for part in stated}
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return {}


def _check_halves(path: Path, found: Mapping[str, tuple[int, ...]], layer: str, keys: Mapping[str, str]) -> None:
    """CheckpointError unless the two halves of a layer's change are there and fit each other."""
    shapes = {half: found[key] for half, key in keys.items()}
    down, up = shapes.get("down", ()), shapes.get("up", ())
    if min(len(down), len(up)) < 2 or not 0 < down[0] == math.prod(up[1:]) or math.prod(shapes.get("alpha", ())) != 1:
        halves = ", ".join(f"{half} {list(shape)}" for half, shape in shapes.items())
        raise CheckpointError(f"{path} is damaged: {layer} has {halves}, which is no pair of matrices; get it again")


# Merging

# The width of a model's text features tells which one it was made from.
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class Report:
    """The keys of a file that changed the model, and those that did not."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]


def merge(model: Model, lora: LoRA, strength: float = 1.0) -> Report:
    """Add `strength` times the changes of `lora` to the weights of `model`, in place but calculated in float32.

    Layers may have our names (`diffusion_model.input_blocks...`), kohya's over latent diffusion's or diffusers' names
    (`lora_unet_...`, `lora_te_...`), diffusers' or PEFT's (`unet.down_blocks...`), or those of AnimateDiff's motion
    LoRAs. The model's metadata says from now on what is in it. Warns of keys that no layer is named by; raises
    CheckpointError, with the model unchanged, when no key fits or a shape does not, and ValueError when `strength` is
    not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"a LoRA's strength cannot be {strength}; use a number such as 1")
    own = BASES.get(model.config.unet.context_dim, "this model")
    _check_text_width(lora, model.config.unet.context_dim, own)
    layers = lora_names.layers(model.unet, model.text_encoder)
    named = {name: layers.get(lora_names.spelled(name)) for name in lora.changes}
    chosen = {name: layer for name, layer in named.items() if layer is not None}
    matched = tuple(key for name in chosen for key in lora.changes[name].keys)
    strangers = [name for name, layer in named.items() if layer is None]
    unmatched = (*(key for name in strangers for key in lora.changes[name].keys), *lora.other_keys)
    if not chosen:
        raise CheckpointError(
            f"{lora.path} changes no layer of this model, only others such as {', '.join(strangers[:3])}; use a LoRA "
            f"that was made for {own}"
        )
    for name, layer in chosen.items():
        change = lora.changes[name]
        theirs, ours = (len(change.up), change.down.shape[1]), (len(layer.weight), layer.weight[0].numel())
        if theirs != ours:
            raise CheckpointError(
                f"{lora.path} changes {name} as {theirs[0]} x {theirs[1]} numbers where this model has {ours[0]} x "
                f"{ours[1]}; use a LoRA that was made for {own}"
            )
    with torch.no_grad():
        for name, layer in chosen.items():
            change, weight = lora.changes[name], layer.weight
            difference = change.up.to(weight.device) @ change.down.to(weight.device)
            weight.copy_(weight.float() + strength * change.scale * difference.view_as(weight))
    model.metadata = _with_lora(model.metadata, lora.metadata, strength)
    if unmatched:
        keys = "1 key" if len(unmatched) == 1 else f"{len(unmatched)} keys"
        # `repr`, because a file's own names could steer the terminal that shows them.
        names = ", ".join(map(repr, unmatched[:3]))
        warnings.warn(f"{lora.path} has {keys} without a layer in this model, such as {names}", stacklevel=2)
    return Report(matched, unmatched)


def _with_lora(base: Metadata, lora: Metadata, strength: float) -> Metadata:
    """Whose weights these are once `lora` is in them."""
    licence = base.licence if lora.licence == base.licence else f"{base.licence}; {lora.title}: {lora.licence}"
    origin = f"{base.origin}; LoRA {lora.title} at strength {strength:g}: {lora.origin}"
    return replace(base, licence=licence, origin=origin)


def _check_text_width(lora: LoRA, context_dim: int, own: str) -> None:
    """CheckpointError when a LoRA was made for other text features than `context_dim`.

    It comes before all else because related models share most names, so that a part of the LoRA would fit.
    """
    for name, change in lora.changes.items():
        if name.startswith(("lora_te2_", "text_encoder_2.")):
            width = 2048
        # Attention over time knows no text, although it has the same name.
        elif re.search(r"^(?!.*(motion_modules|temporal)).*_attn2_to_[kv]$", lora_names.spelled(name)):
            width = change.down.shape[1]
        else:
            continue
        if width != context_dim:
            raise CheckpointError(
                f"{lora.path} was made for {BASES.get(width, 'another model')}, with text features of {width} numbers "
                f"where this model has {context_dim}; use a LoRA that was made for {own}"
            )
