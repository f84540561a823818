"""Optimizers by the names that recipes use, and stepping in the computer's memory instead of the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Name = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy"]

Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]

BETAS = (0.9, 0.99)


def build(
    name: Name,
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    offload: bool = False,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer over the trained weights of `module`, of which those with one dimension do not decay.

    A schedule sets `group["lr"]` of every group before each step. With `offload` the moments stay in the computer's
    memory; `sharded` says that FSDP will split the weights. ValueError with one sentence for what cannot work: a
    package that is not installed, or settings that contradict each other.
    """
    if sharded and (name != "adamw" or offload):
        raise ValueError(
            "FSDP splits every weight, which only optimizer 'adamw' without offload can step on;"
            " use that, and fsdp_offload_params of accelerate to save memory"
        )
    if offload and name.endswith("8bit"):
        raise ValueError(
            f"optimizer {name!r} steps on the GPU; to keep its moments elsewhere, use 'adamw' with offload"
        )
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: Groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    make = _maker(name, learning_rate)
    return Offloaded(groups, make) if offload else make(groups)


def _maker(name: Name, learning_rate: float) -> Make:
    """What makes the optimizer of a name from parameter groups."""
    if name == "adamw":
        return partial(torch.optim.AdamW, betas=BETAS, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # The schedule alone sets the step, in the units of the other optimizers.
        return partial(Adafactor, scale_parameter=False, relative_step=False)
    if name == "prodigy":
        if learning_rate < 0.01:
            raise ValueError(
                f"optimizer 'prodigy' finds the step itself and multiplies it by learning_rate, which is"
                f" {learning_rate:g}; set learning_rate = 1.0"
            )
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ValueError("optimizer 'prodigy' needs a package; run: pip install prodigyopt") from error
        # Without the safeguard, the small steps of a warm-up make its estimate far too large.
        return partial(Prodigy, betas=BETAS, use_bias_correction=True, safeguard_warmup=True)
    try:
        import bitsandbytes.optim as bnb
    except ImportError as error:
        raise ValueError(
            f"optimizer {name!r} needs a package, and a GPU to be fast; run: pip install bitsandbytes"
        ) from error
    return partial(bnb.PagedAdamW8bit if name == "paged_adamw8bit" else bnb.AdamW8bit, betas=BETAS)


class Offloaded(torch.optim.Optimizer):
    """Steps on the CPU with the optimizer `make` builds there, so that the GPU holds weights and gradients alone.

    `host` is that optimizer: it has a copy of every weight, and the moments. The groups of both hold the same numbers.
    """

    def __init__(self, groups: Groups, make: Make) -> None:
        self.host = make([group | {"params": [_host_like(p) for p in group["params"]]} for group in groups])
        host_groups: Groups = self.host.param_groups
        super().__init__(
            [inner | {"params": group["params"]} for inner, group in zip(host_groups, groups, strict=True)], {}
        )
        self._copy_weights()

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every weight and its copy."""
        return [
            pair
            for group, inner in zip(self.param_groups, self.host.param_groups, strict=True)
            for pair in zip(group["params"], inner["params"], strict=True)
        ]

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for weight, copy in self._pairs():
            copy.copy_(weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Fetch the gradients, step, and send the weights back."""
        assert closure is None
        for weight, copy in self._pairs():
            if weight.grad is None:
                copy.grad = None
                continue
            if copy.grad is None:
                copy.grad = _host_like(weight)
            copy.grad.copy_(weight.grad)
        _copy_numbers(self.param_groups, self.host.param_groups)
        self.host.step()
        _copy_numbers(self.host.param_groups, self.param_groups)
        for weight, copy in self._pairs():
            weight.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """The state of `host`, which does not tell that it is offloaded."""
        return self.host.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, and the weights as they are now."""
        self.host.load_state_dict(state_dict)
        _copy_numbers(self.host.param_groups, self.param_groups)
        self._copy_weights()


def _host_like(weight: Tensor) -> Tensor:
    """Memory for `weight` on the CPU that a GPU can copy from and to at full speed."""
    return torch.empty_like(weight, device="cpu", pin_memory=torch.cuda.is_available(), requires_grad=False)


def _copy_numbers(source: Groups, target: Groups) -> None:
    """Learning rate and everything else but the weights, group by group."""
    for old, new in zip(source, target, strict=True):
        new.update({key: value for key, value in old.items() if key != "params"})
