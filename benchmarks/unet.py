"""Time of one forward pass: against diffusers' ModelScope network, and the cost of Swap-CA (Table 2)."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from videofactory_core.config import PRESETS, UNetConfig
from videofactory_core.unet.model import VideoUNet

ROUNDS = 3
DTYPE = torch.bfloat16
Pass = Callable[[], object]


def describe_machine() -> None:
    """Print what the figures were measured on."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {DTYPE}")


def compare(passes: dict[str, Pass]) -> None:
    """Run every pass in turn, after one round of warm-up, and print medians and ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.no_grad():
        for round_ in range(ROUNDS + 1):
            for name, run in passes.items():
                start = time.perf_counter()
                run()
                if round_:
                    seconds[name].append(time.perf_counter() - start)
    first = next(iter(passes))
    for name, values in seconds.items():
        # Paired: each round's ratio, so that a machine whose speed drifts does not favour one side.
        ratios = [value / base for value, base in zip(values, seconds[first], strict=True)]
        print(f"{name:<32}{statistics.median(values):8.2f} s   ratio {statistics.median(ratios):.3f}")


def build(config: UNetConfig) -> nn.Module:
    """A network whose weights are small but not zero: nothing may be skipped for being zero."""
    unet = VideoUNet(config, dtype=DTYPE).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(std=0.02)
    return unet


def forward(unet: nn.Module, *inputs: Tensor) -> Pass:
    return lambda: unet(*inputs)


def against_diffusers() -> None:
    """Preset sd21 at 4 x 16 x 24 x 40 with Swap-CA on, against `UNet3DConditionModel` of ModelScope's shape."""
    from diffusers import UNet3DConditionModel

    describe_machine()
    x = torch.randn(1, 4, 16, 24, 40, dtype=DTYPE)
    context = torch.randn(1, 77, 1024, dtype=DTYPE)
    inputs = (x, torch.tensor([500]), context)
    theirs = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64).to(DTYPE).eval()
    sd21 = PRESETS["sd21"].unet
    compare(
        {
            "diffusers UNet3DConditionModel": forward(theirs, *inputs),
            "sd21, Swap-CA in windows": forward(build(sd21), *inputs),
            "sd21, without Swap-CA": forward(build(replace(sd21, merge="fuse")), *inputs),
        }
    )


TABLE_2 = {
    "none": replace(PRESETS["sd21"].unet, merge="fuse"),
    "window": PRESETS["sd21"].unet,
    "global": replace(PRESETS["sd21"].unet, swap_window=None),
}


def table_2_inputs() -> tuple[Tensor, ...]:
    """4 x 16 x 32 x 32, a time step and text features."""
    return torch.randn(1, 4, 16, 32, 32, dtype=DTYPE), torch.tensor([500]), torch.randn(1, 77, 1024, dtype=DTYPE)


def peak_memory(name: str) -> None:
    """Print the GiB that a process holds with the weights of a row of Table 2, and at its peak in a forward pass."""
    import resource

    def held() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = held()
    # Weights come in place, one at a time: building in float32 first would be the peak.
    unet = build(TABLE_2[name])
    weights = held()
    with torch.no_grad():
        unet(*table_2_inputs())
    print(weights - before, held() - before)


def cost_of_swap_attention() -> None:
    """Table 2: time and peak memory of a forward pass without Swap-CA, in windows and global."""
    describe_machine()
    inputs = table_2_inputs()
    for name in TABLE_2:
        code = f"from benchmarks.unet import peak_memory; peak_memory({name!r})"
        printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        weights, peak = (float(number) for number in printed.split())
        print(f"{name:<32}{weights:8.2f} GiB of weights, {peak:.2f} GiB at the peak")
    compare({name: forward(build(config), *inputs) for name, config in TABLE_2.items()})
