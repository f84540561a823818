"""A training step of preset sd21, with Swap-CA and without, against a plain loop on diffusers' network."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from videofactory_core.config import PRESETS, UNetConfig
from videofactory_core.unet.model import VideoUNet

from .memory import Held, pass_memory

SD21 = PRESETS["sd21"].unet
# Whose network; None is diffusers'.
SIDES: dict[str, UNetConfig | None] = {
    "diffusers UNet3DConditionModel": None,
    "no Swap-CA": replace(SD21, merge="fuse"),
    "Swap-CA, window": SD21,
}
# Frames, height and width of a clip: of the paper, for a GPU; and what a CPU does in minutes.
PAPER = (16, 24, 43)
SMALL = (8, 16, 24)
ROUNDS = 3
NEEDED_GIB = 16


def build(config: UNetConfig | None, checkpointing: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network to train, with weights that are small and nowhere zero.

    diffusers' is in evaluation mode, which leaves out its dropout and nothing else: ours has none. It has no
    checkpointing for this network either, so its layers get what its public trainers give them, one by one.
    """
    meta = torch.device("meta")
    if config is None:
        from diffusers import UNet3DConditionModel

        with meta:
            unet: nn.Module = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64).to(dtype).eval()
        layers = ("ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel")
        for module in unet.modules():
            if checkpointing and type(module).__name__ in layers:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    else:
        unet = VideoUNet(config, device=meta, dtype=dtype)
        unet.gradient_checkpointing = checkpointing
    if device.type == "meta":
        return unet
    unet = unet.to_empty(device=device)
    # A pattern, because a billion random numbers take a CPU half a minute.
    pattern = torch.randn(1 << 20, device=device, dtype=dtype) * 0.02
    with torch.no_grad():
        for weight in unet.parameters():
            repeats = -(-weight.numel() // len(pattern))
            weight.copy_(pattern.repeat(repeats)[: weight.numel()].view_as(weight))
        for module in unet.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                # Else gradients would vanish in numbers that a CPU is slow with.
                module.weight.fill_(1)
    return unet


def inputs(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One clip, its time step, and its text."""
    return (
        torch.randn(1, 4, *size, device=device, dtype=dtype),
        torch.full((1,), 500, device=device),
        torch.randn(1, 77, SD21.context_dim, device=device, dtype=dtype),
    )


def loss(unet: nn.Module, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """The squared error of a prediction, against the clip itself."""
    prediction = unet(x, timesteps, context)
    return F.mse_loss((prediction if isinstance(prediction, Tensor) else prediction.sample).float(), x.float())


class Step:
    """One step of a plain loop: forward, backward, clipping, AdamW; weights and moments have the network's type."""

    def __init__(self, unet: nn.Module, size: tuple[int, int, int], autocast: torch.dtype | None = None) -> None:
        weight = next(unet.parameters())
        self.unet = unet
        self.inputs = inputs(size, weight.device, weight.dtype)
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if autocast is not None:
            self.autocast = partial(torch.autocast, weight.device.type, autocast)

    def __call__(self) -> None:
        with self.autocast():
            error = loss(self.unet, *self.inputs)
        error.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def computed(config: UNetConfig | None, checkpointing: bool) -> tuple[Held, int]:
    """What the passes of a step hold on a GPU at the paper's size, in bf16 over float32 weights; how many those are."""

    def on(place: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        unet = build(config, checkpointing, place, torch.float32)
        return unet, partial(loss, unet, *inputs(PAPER, place, torch.float32))

    held = pass_memory(on, "cuda", torch.bfloat16)
    return held, held.weights // 4


def arithmetic(config: UNetConfig | None) -> int:
    """Floating-point operations of forward and backward pass at the paper's size."""
    meta = torch.device("meta")
    unet = build(config, False, meta, torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss(unet, *inputs(PAPER, meta, torch.float32)).backward()
    return counter.get_total_flops()


def computed_table() -> None:
    """Print what a step needs of a GPU at the paper's size, and its ratio to diffusers: bf16 over float32 weights."""
    frames, height, width = PAPER
    print(f"computed for a GPU, one clip of {frames} x {height} x {width}, bf16 over float32 weights, AdamW, GiB")
    print(f"{'network':<32}{'weights':>10}{'operations':>15}{'memory':>20}{'with checkpointing':>22}")
    first: list[float] = []
    for name, config in SIDES.items():
        operations = float(arithmetic(config))
        plain, count = computed(config, False)
        checkpointed, _ = computed(config, True)
        # Two moments of four bytes.
        memory = [(held.total + 8 * count) / 2**30 for held in (plain, checkpointed)]
        first = first or [operations, *memory]
        cells = [operations / 1e12, *memory]
        ratios = [value / base for value, base in zip([operations, *memory], first, strict=True)]
        columns = "".join(f"{cell:>13.2f} ({ratio:.3f})" for cell, ratio in zip(cells, ratios, strict=True))
        print(f"{name:<32}{count / 1e9:>8.3f} G{columns}", flush=True)


def run_side(name: str, checkpointing: bool) -> None:
    """Print, as JSON, the seconds of a step on the CPU in bf16, and the GiB that the process takes at its peak."""
    import resource

    def held() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = held()
    step = Step(build(SIDES[name], checkpointing, torch.device("cpu"), torch.bfloat16), SMALL)
    # The first step also makes room for gradients and moments.
    for _ in range(2):
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "gib": held() - before}))


def measured_table(checkpointing: bool) -> None:
    """Print seconds and memory on this CPU: the sides in turn, each in a process of its own, as both do not fit."""
    frames, height, width = SMALL
    print(f"\nmeasured, {frames} x {height} x {width}, weights, gradients and moments in bf16", end="")
    print(", checkpointing" if checkpointing else "")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name, results in found.items():
            code = f"from benchmarks.training import run_side; run_side({name!r}, {checkpointing})"
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout))
    first = next(iter(found.values()))
    for name, results in found.items():
        medians, ratios = [], []
        for key in ("seconds", "gib"):
            medians.append(statistics.median(result[key] for result in results))
            # Paired: each round's ratio, so that a machine whose speed drifts does not favour one side.
            ratios.append(statistics.median(a[key] / b[key] for a, b in zip(results, first, strict=True)))
        print(f"{name:<32}{medians[0]:8.2f} s ({ratios[0]:.3f}){medians[1]:10.2f} GiB ({ratios[1]:.3f})", flush=True)


def report() -> None:
    """Print both tables; the second takes minutes, and needs the memory that it names."""
    computed_table()
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free < NEEDED_GIB:
        sys.exit(f"the steps on the CPU need {NEEDED_GIB} GiB of free memory, and {free:.1f} GiB are free: make room")
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; ratios to diffusers")
    for checkpointing in (True, False):
        measured_table(checkpointing)
