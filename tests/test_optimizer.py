"""Optimizers by name: what they are, what they do to weights, and stepping on the CPU."""

from __future__ import annotations

import copy
import sys
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from videofactory_train.optimizer import Name, Offloaded, build

RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "paged_adamw8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0}
PACKAGES = {"adamw8bit": "bitsandbytes", "paged_adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# The first that steps on a CPU.
VERSIONS = {"bitsandbytes": "0.50"}
NAMES = list(get_args(Name))


class Net(nn.Module):
    """Weights of every number of dimensions, one of them large enough for eight bits, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 16, 3)
        self.wide = nn.Linear(16, 512)
        self.head = nn.Linear(512, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.frozen(x).transpose(1, 2)).mean(2)
        return (self.scale * self.head(torch.tanh(self.wide(x))) - 1).square().mean()


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, share: Any, count: int) -> list[float]:
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(count):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share(step)
        loss = module(torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(name: Name, module: nn.Module, weight_decay: float = 0.01, **settings: bool) -> torch.optim.Optimizer:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], VERSIONS.get(PACKAGES[name]))
    return build(name, module, RATES[name], weight_decay, **settings)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_adamw_is_that_of_pytorch_with_decay_for_matrices_alone() -> None:
    ours, theirs = Net(), Net()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.5},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.99),
        fused=True,
    )
    assert steps(ours, make("adamw", ours, 0.5), lambda _: 1.0, 5) == steps(theirs, reference, lambda _: 1.0, 5)
    assert same(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_learns_and_leaves_frozen_weights_alone(name: Name) -> None:
    module = Net()
    frozen = module.frozen.weight.clone()
    losses = steps(module, make(name, module), lambda step: min(1.0, (step + 1) / 5), 120 if name == "prodigy" else 30)
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(module.frozen.weight, frozen)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_one_dimension_do_not_decay(name: Name) -> None:
    groups = make(name, Net()).param_groups
    assert [{p.ndim > 1 for p in group["params"]} for group in groups] == [{True}, {False}]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_of_zero_changes_nothing(name: Name) -> None:
    module = Net()
    steps(module, make(name, module), lambda _: 0.0, 3)
    assert same(module, Net())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_offloaded_steps_are_the_same_steps(name: Name) -> None:
    plain, offloaded = Net(), Net()

    def share(step: int) -> float:
        return 1.0 - step / 10

    optimizer = make(name, offloaded, offload=True)
    assert steps(plain, make(name, plain), share, 6) == steps(offloaded, optimizer, share, 6)
    assert same(plain, offloaded)
    assert isinstance(optimizer, Offloaded)
    # The moments belong to the copies, which are no views of the weights.
    assert not optimizer.state
    assert optimizer.host.state
    weights = {p.data_ptr() for p in offloaded.parameters()}
    assert not weights & {p.data_ptr() for group in optimizer.host.param_groups for p in group["params"]}


def test_offloaded_follows_weights_that_are_loaded() -> None:
    first, second = Net(), Net()
    one, two = make("adamw", first, offload=True), make("adamw", second, offload=True)
    steps(first, one, lambda _: 1.0, 3)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert steps(first, one, lambda _: 1.0, 3) == steps(second, two, lambda _: 1.0, 3)
    assert same(first, second)


def test_offloaded_leaves_out_steps_whose_gradients_overflow() -> None:
    module = Net()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    accelerator.native_amp = True
    optimizer = accelerator.prepare_optimizer(make("adamw", module, offload=True))
    for _ in range(4):
        before = [p.clone() for p in module.parameters()]
        accelerator.backward(module(torch.ones(4, 7, 8)) * 1e3)
        optimizer.step()
        optimizer.zero_grad()
        moved = any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        assert moved != optimizer.step_was_skipped
    assert accelerator.scaler.get_scale() < 2.0**127


def test_only_adamw_steps_on_weights_that_are_split() -> None:
    with pytest.raises(ValueError, match="only optimizer 'adamw'"):
        build("adafactor", Net(), 1e-3, 0.0, sharded=True)
    with pytest.raises(ValueError, match="fsdp_offload_params"):
        build("adamw", Net(), 1e-3, 0.0, offload=True, sharded=True)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="use 'adamw' with offload"):
        build("adamw8bit", Net(), 1e-3, 0.0, offload=True)
    with pytest.raises(ValueError, match=r"set learning_rate = 1\.0"):
        build("prodigy", Net(), 1e-4, 0.0)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [PACKAGES[name], *(m for m in sys.modules if m.startswith(f"{PACKAGES[name]}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {PACKAGES[name]}"):
        build(name, Net(), 1.0, 0.0)
