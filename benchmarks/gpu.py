"""Every figure that needs a GPU, in under ten minutes, with torch, einops and safetensors alone.

Each row stands beside what the card itself was measured to do: its share of the matrix products' rate. diffusers'
ModelScope network runs between ours where diffusers is installed.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import PRESETS, ModelConfig, UNetConfig
from videofactory_core.diffusion import Schedule, guide
from videofactory_core.sampling import sample
from videofactory_core.unet.model import VideoUNet

from .training import SIDES, Step, build

ROUNDS = 5
FRAMES, HEIGHT, WIDTH = 16, 24, 43
STEPS = 20
GUIDANCE = 9.0
# No row starts behind this, so that the whole stays under ten minutes; the rows left out are named.
LATEST_START = 480.0


class Float8Weights:
    """Layers that keep their weights in 8 bits and compute in the type of their input."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    class Conv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return self._conv_forward(x, self.weight.to(x.dtype), bias)

    class GroupNorm(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    Embedding = nn.Embedding


@dataclass(frozen=True)
class Row:
    """One line of the table: what runs, in which type its weights lie, and whether it is compiled."""

    name: str
    dtype: torch.dtype
    config: UNetConfig | None
    compiled: bool = False


def rows(unet: UNetConfig) -> list[Row]:
    """What is timed, the most telling first; `config` None is diffusers' network."""
    window, none, everywhere = unet, replace(unet, merge="fuse"), replace(unet, swap_window=None)
    bf16, fp16, fp8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    eager = [
        Row(name, dtype, config)
        for dtype in (bf16, fp16, fp8)
        for name, config in (
            ("diffusers UNet3DConditionModel", None),
            ("no Swap-CA", none),
            ("Swap-CA, window", window),
            ("Swap-CA, global", everywhere),
        )
        if config is not None or dtype is not fp8
    ]
    compiled = [
        Row("Swap-CA, window", bf16, window, True),
        Row("no Swap-CA", bf16, none, True),
        Row("Swap-CA, window", fp8, window, True),
        Row("Swap-CA, window", fp16, window, True),
        Row("Swap-CA, global", bf16, everywhere, True),
    ]
    return eager + compiled


def build_unet(row: Row, device: torch.device) -> nn.Module | None:
    """The network of a row, with random weights that are nowhere zero; None for diffusers when it is not installed."""
    if row.config is None:
        try:
            from diffusers import UNet3DConditionModel
        except ImportError:
            return None
        with torch.device(device):
            unet: nn.Module = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64).to(row.dtype)
    else:
        eight_bits = row.dtype is torch.float8_e4m3fn
        operations = Float8Weights if eight_bits else nn
        unet = VideoUNet(
            row.config,
            operations=operations,  # type: ignore[arg-type]
            device=device,
            dtype=torch.bfloat16 if eight_bits else row.dtype,
        )
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(std=0.02)
    return unet.to(row.dtype).eval()


class Clock:
    """Seconds and peak bytes on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Median seconds of `run` behind one round of warm-up."""
        seconds = []
        for _ in range(rounds + 1):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def peak(self, run: Callable[[], object]) -> float:
        """Peak GiB while `run` runs, with everything that was there before; nan where the device does not tell."""
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """Gives the memory of a row back before the next."""
    yield
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def count_flops(config: UNetConfig, inputs: tuple[Tensor, ...]) -> float:
    """Floating-point operations of one forward pass, counted on shapes alone."""
    unet = VideoUNet(config, device="meta")
    on_meta = [x.to("meta", torch.float32) if x.is_floating_point() else x.to("meta") for x in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*on_meta)
    return counter.get_total_flops()


def card_rates(clock: Clock, size: int = 8192) -> dict[torch.dtype, float]:
    """Print and return the card's own rates of matrix products in FLOP/s, and print its rate of copies."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
        rates[dtype] = 2 * size**3 / clock.time(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        print(f"matrix product {str(dtype)[6:]:<10}{rates[dtype] / 1e12:10.1f} TFLOP/s")
    source = torch.empty(size * size * 2, device=clock.device, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = clock.time(lambda: target.copy_(source))
    print(f"copy{'':<21}{2 * source.numel() * 4 / seconds / 1e9:10.1f} GB/s read and written")
    return rates


def unet_table(unet: UNetConfig, clock: Clock, rates: dict[torch.dtype, float], started: float) -> None:
    """One forward pass of one clip for every row: time, peak memory, share of the card's rate."""
    device = clock.device
    print(f"\none forward pass, {FRAMES} x {HEIGHT} x {WIDTH}, batch 1")
    print(f"{'network':<32}{'weights':<15}{'':<10}{'ms':>9}{'peak GiB':>10}{'TFLOP':>8}{'of card':>9}")
    for row in rows(unet):
        label = f"{row.name:<32}{str(row.dtype)[6:]:<15}{'compiled' if row.compiled else 'eager':<10}"
        if time.perf_counter() - started > LATEST_START:
            print(f"{label} left out: no time left")
            continue
        with freed(device):
            model = build_unet(row, device)
            if model is None:
                print(f"{label} diffusers is not installed")
                continue
            compute = torch.bfloat16 if row.dtype is torch.float8_e4m3fn else row.dtype
            inputs = (
                torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, device=device, dtype=compute),
                torch.tensor([500], device=device),
                torch.randn(1, 77, unet.context_dim, device=device, dtype=compute),
            )
            if row.compiled:
                model.compile(dynamic=False)

            def forward(model: nn.Module = model, inputs: tuple[Tensor, ...] = inputs) -> object:
                return model(*inputs)

            with torch.no_grad():
                seconds = clock.time(forward)
                peak = clock.peak(forward)
            share = ""
            if row.config is not None:
                flops = count_flops(row.config, inputs)
                share = f"{flops / 1e12:8.2f}{flops / seconds / rates[compute]:9.1%}"
            print(f"{label}{seconds * 1e3:9.1f}{peak:10.2f}{share}", flush=True)
            del model, forward


def training_step(config: UNetConfig | None, checkpointing: bool, clock: Clock) -> tuple[float, float]:
    """Milliseconds and peak GiB of a step of one clip; `config` None is diffusers' network."""
    unet = build(config, checkpointing, clock.device, torch.float32)
    step = Step(unet, (FRAMES, HEIGHT, WIDTH), torch.bfloat16)
    return clock.time(step) * 1e3, clock.peak(step)


def training_table(clock: Clock, started: float) -> None:
    """One training step of one clip: time, peak memory, and their ratios to diffusers'."""
    print(f"\none training step, {FRAMES} x {HEIGHT} x {WIDTH}, batch 1, bf16 over float32 weights, AdamW")
    print(f"{'network':<32}{'':<15}{'ms':>9}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}")
    for checkpointing in (True, False):
        base: tuple[float, float] | None = None
        for name, config in SIDES.items():
            label = f"{name:<32}{'checkpointing' if checkpointing else '':<15}"
            if time.perf_counter() - started > LATEST_START:
                print(f"{label} left out: no time left")
                continue
            with freed(clock.device):
                try:
                    found = training_step(config, checkpointing, clock)
                except ImportError:
                    print(f"{label} diffusers is not installed")
                    continue
                except torch.cuda.OutOfMemoryError:
                    print(f"{label} does not fit")
                    continue
            base = found if config is None else base
            ratios = [f"{value / first:.3f}" for value, first in zip(found, base, strict=True)] if base else ["", ""]
            print(f"{label}{found[0]:9.1f}{ratios[0]:>8}{found[1]:10.2f}{ratios[1]:>8}", flush=True)


def clip(config: ModelConfig, clock: Clock) -> None:
    """Decoding, and a whole guided clip from noise to frames, in bf16."""
    device, dtype = clock.device, torch.bfloat16
    factor = config.autoencoder.downscale
    with freed(device), torch.no_grad():
        autoencoder = Autoencoder(config.autoencoder).to(device, dtype).eval()
        latents = torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, device=device, dtype=dtype)
        seconds = clock.time(lambda: autoencoder.decode(latents))
        peak = clock.peak(lambda: autoencoder.decode(latents))
        print(f"\ndecode {FRAMES} frames of {WIDTH * factor} x {HEIGHT * factor}: {seconds:.3f} s, peak {peak:.2f} GiB")

        unet = build_unet(Row("clip", dtype, config.unet), device)
        assert unet is not None
        context = torch.randn(2, 77, config.unet.context_dim, device=device, dtype=dtype)

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            both = unet(torch.cat([x, x]).to(dtype), torch.cat([timesteps, timesteps]), context).float()
            return guide(*both.chunk(2), GUIDANCE)

        def whole() -> None:
            schedule = Schedule.from_config(config.diffusion)
            noise = torch.randn(1, 4, FRAMES, HEIGHT, WIDTH, device=device)
            autoencoder.decode(sample(predict, noise, schedule, steps=STEPS).to(dtype))

        print(
            f"guided clip, {STEPS} steps and decoding: {clock.time(whole, 3):.2f} s, peak {clock.peak(whole):.2f} GiB"
        )


def report() -> None:
    """Print every table."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: run this benchmark on a machine with one")
    started = time.perf_counter()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, medians of {ROUNDS}")
    clock = Clock(device)
    config = PRESETS["sd21"]
    with freed(device):
        rates = card_rates(clock)
    clip(config, clock)
    training_table(clock, started)
    unet_table(config.unet, clock, rates, started)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
