"""The denoising loop: from noise to latents by one of five samplers.

Every sampler works on x = x0 + sigma eps, so that it needs no schedule: it walks down the noise levels `sigmas`, which
end in 0, and calls `denoise(x, sigma)` for the network's estimate of x0 once a step. In these coordinates one formula
carries all of them. While the estimate stays put, the probability-flow ODE is a straight line to it,

    x(to) = x0 + to / sigma (x - x0),

and the samplers differ in the point that they move towards.

Every frame has a level of its own (FVDM, arXiv 2410.03160): `sigmas` is `[steps + 1, F]`, or `[steps + 1, 1]` where all
frames share theirs. A frame at level 0 is clean and stays as it is: one that is done, or one that was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from einops import rearrange
from torch import Tensor

from .diffusion import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoise, Tensor, Tensor, torch.Generator | None], Tensor]


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
    """Euler's method in sigma, which is also DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 14)."""
    for sigma, to in pairwise(sigmas):
        x = _move(x, denoise(x, sigma), sigma, to)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
    """Euler's method to below the next level, then fresh noise up to it, with the variance of the DDPM posterior."""
    for sigma, to in pairwise(sigmas):
        down = _over(to**2, sigma)
        up = (to**2 - down**2).sqrt()
        x = _move(x, denoise(x, sigma), sigma, down)
        # Drawn on the CPU: a seed is then the same noise on every device.
        x = x + _by_frame(up, x) * torch.randn(x.shape, generator=generator).to(x)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, alg. 2): move towards the estimate half a step ahead."""
    estimates: list[Tensor] = []
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        estimates = [*estimates[-1:], denoise(x, sigma)]
        x = _move(x, _half_step_ahead(estimates, sigmas, i), sigma, to)
    return x


def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
    """UniPC of order 2 with B_2(h) (Zhao et al., arXiv 2302.04867).

    The predictor is DPM-Solver++(2M). Once the network has seen where a step led, the corrector takes that step again
    with the new estimate; the network does not look at the corrected point.
    """
    start = x
    estimates: list[Tensor] = []
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        estimates = [*estimates[-2:], denoise(x, sigma)]
        if i > 0:
            x = _move(start, _corrected(estimates, sigmas, i), sigmas[i - 1], sigma)
        start = x
        x = _move(start, _half_step_ahead(estimates, sigmas, i), sigma, to)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddim": euler,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


@dataclass(frozen=True)
class Known:
    """Latents `[B, C, F, H, W]` of which the frames `given [F]` (bool) are conditions: the others do not matter.

    A model that was trained with a `Condition` is shown them clean, at level 0. For others they are not `clean`, but as
    noisy as the rest at each step, as in inpainting (Lugmayr et al., arXiv 2201.09865, without resampling).
    """

    latents: Tensor
    given: Tensor
    clean: bool = True

    def __post_init__(self) -> None:
        assert self.latents.ndim == 5
        assert self.given.shape == self.latents.shape[2:3]
        assert self.given.dtype == torch.bool


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: Schedule,
    *,
    sampler: str = "ddim",
    steps: int,
    known: Known | None = None,
    stagger: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Turn unit noise `[B, C, F, H, W]` into latents of that shape and type.

    model: `model(x_t, t)` returns the network's prediction, after guidance, for `x_t` = sqrt(abar) x0 + sqrt(1 - abar)
    eps in noise's type and `t [B]` (float32), or `t [B, F]` where levels differ between frames; a clean frame is shown
    as it is, at 0. sampler: a key of `SAMPLERS`. steps: evaluations of the model, from 1 to T. known: frames that are
    given, in noise's shape; they come back to the last bit. stagger: how far frames run ahead of those behind them, see
    `noise_levels`. generator: a CPU generator for the noise that `euler_ancestral` adds. callback: called after each
    evaluation with the step, from 0, and the estimate of x0 (float32 or wider).

    The first x_t is `noise` itself, the variance-preserving start that ComfyUI uses too, whatever the sampler.
    Raises ValueError for an unknown sampler, an impossible number of steps or a negative stagger.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    assert known is None or known.latents.shape == noise.shape
    at_zero = known.given if known is not None and known.clean else None
    levels = noise_levels(schedule, steps, noise.shape[2], at_zero, stagger)
    # Half precision would lose the picture under the noise: sigma reaches 4519.
    precise = torch.promote_types(noise.dtype, torch.float32)
    evaluation = count()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if known is not None and not known.clean:
            x = torch.where(given, original + _by_frame(sigma, x) * noise, x)
        x_t = x / _by_frame((1 + sigma**2).sqrt(), x)
        t = schedule.timestep(sigma).float().to(x.device)
        t = t.expand(x.shape[0]) if len(t) == 1 else t.expand(x.shape[0], -1)
        x0, _ = schedule.to_x0_eps(model(x_t.to(noise.dtype), t).to(precise), x_t, t)
        if (sigma == 0).any():
            x0 = torch.where(_by_frame(sigma, x) == 0, x, x0)
        if known is not None and not known.clean:
            x0 = torch.where(given, original, x0)
        if callback is not None:
            callback(next(evaluation), x0)
        return x0

    x = noise.to(precise) * _by_frame((1 + levels[0] ** 2).sqrt(), noise.to(precise))
    if known is not None:
        original, given = known.latents.to(x), rearrange(known.given.to(x.device), "F -> F 1 1")
        x = torch.where(given, original, x)
    return SAMPLERS[sampler](denoise, x, levels, generator).to(noise.dtype)


def noise_levels(
    schedule: Schedule, steps: int, num_frames: int, given: Tensor | None = None, stagger: float = 0.0
) -> Tensor:
    """sigma of every frame before each step and behind the last, float64: `[steps + 1, F]`, or `[steps + 1, 1]` where
    all frames share theirs.

    given: frames `[F]` (bool) that are clean throughout. stagger: 0 denoises the others all at once; above that they go
    one behind the other, the last by `stagger` times the way that each has, so that with 1 it begins when the first is
    done. Their steps are larger by 1 + stagger then. Raises ValueError for steps outside 1 to T and for a stagger that
    is no number from 0.
    """
    if not 0 <= stagger < float("inf"):
        raise ValueError(f"stagger is {stagger}; use 0, which denoises all frames at once, or more")
    late = torch.zeros(1, dtype=torch.float64)
    if stagger and num_frames > 1:
        new = torch.ones(num_frames, dtype=torch.bool) if given is None else ~given.cpu()
        place = new.cumsum(0).sub(1).clamp(min=0).double()
        late = stagger * place / place.max().clamp(min=1)
    timesteps = trailing_timesteps(schedule.num_timesteps, steps, late)
    sigmas = schedule.sigma(timesteps).masked_fill(timesteps < 0, 0)
    if given is not None and given.any():
        sigmas = sigmas.expand(-1, num_frames).masked_fill(given.cpu(), 0)
    return sigmas


def trailing_timesteps(num_timesteps: int, steps: int, late: Tensor | None = None) -> Tensor:
    """Whole timesteps before each of `steps` steps and behind the last, from T - 1 down to -1, which is clean:
    `[steps + 1, F]`, evenly spaced from the noisy end ("trailing", Lin et al., table 2).

    Starting at T - 1 is what makes a zero terminal SNR work: there, unit noise is what the network was trained on.
    late: `[F]` (float64), by how much of the way each frame begins behind the first; by default one frame that does
    not. Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}; choose a number from 1 to {num_timesteps}")
    late = torch.zeros(1, dtype=torch.float64) if late is None else late
    spacing = num_timesteps / steps
    steps_done = torch.arange(steps + 1, dtype=torch.float64)[:, None]
    done = (1 + late.max()) * spacing * steps_done - num_timesteps * late
    return (num_timesteps - done).clamp(0, num_timesteps).round().long() - 1


def _by_frame(values: Tensor, x: Tensor) -> Tensor:
    """Numbers `[F]` or `[1]` ready to meet `x [B, C, F, H, W]`."""
    # First the type: not every device has float64.
    return rearrange(values, "F -> F 1 1").to(x.dtype).to(x.device)


def _over(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where `below` is: for frames that are clean."""
    return torch.where(below == 0, 0, above / below)


def _move(x: Tensor, target: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """From noise level `sigma` to level `to` along the straight line to `target`."""
    return target + _by_frame(_over(to, sigma), x) * (x - target)


def _log_step(sigmas: Tensor, i: int) -> Tensor:
    """h: step i in half the log of the signal-to-noise ratio, `[F]`; 0 for frames that wait, or are clean before it."""
    return torch.where(sigmas[i] == sigmas[i + 1], 0, (sigmas[i] / sigmas[i + 1]).log())


def _half_step_ahead(estimates: list[Tensor], sigmas: Tensor, i: int) -> Tensor:
    """The newest estimate, extrapolated in log sigma to the middle of step i from the one before.

    A frame's first step has none before and its last is infinitely long: there it is the estimate itself.
    """
    newest = estimates[-1]
    if i == 0 or not (sigmas[i + 1] > 0).any():
        return newest
    share = torch.where(sigmas[i + 1] == 0, 0, 0.5 * _over(_log_step(sigmas, i), _log_step(sigmas, i - 1)))
    return newest + _by_frame(share, newest) * (newest - estimates[-2])


def _corrected(estimates: list[Tensor], sigmas: Tensor, i: int) -> Tensor:
    """What step i - 1 should have moved towards, by UniC of the order that the step had.

    With m the estimates, newest last, r = -h_(i-2) / h_(i-1) and D = (m_(-3) - m_(-2)) / r it is m_(-2) + a D +
    b (m_(-1) - m_(-2)), where a + b = g_1 and r a + b = g_2 (eq. 11 for the data estimate). A frame's first step has
    order 1, and its last is not corrected.
    """
    old, new = estimates[-2:]
    done = sigmas[i] == 0
    if i == 1:
        return old + _by_frame(torch.where(done, 0, 0.5), old) * (new - old)
    h = _log_step(sigmas, i - 1)
    r = -_over(_log_step(sigmas, i - 2), h)
    phi_1 = -torch.expm1(-h) / h
    phi_2 = (1 - phi_1) / h
    g_1, g_2 = phi_2 / phi_1, (1 - 2 * phi_2) / (h * phi_1)
    a = (g_1 - g_2) / (1 - r)
    still = done | (h == 0)
    to_older = torch.where(still | (r == 0), 0, a / r)
    to_new = torch.where(still, 0, torch.where(r == 0, 0.5, g_1 - a))
    return old + _by_frame(to_older, old) * (estimates[-3] - old) + _by_frame(to_new, old) * (new - old)
