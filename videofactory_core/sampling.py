"""The denoising loop: from noise to latents by one of five samplers.

Every sampler works on x = x0 + sigma eps, so that it needs no schedule: it walks down the noise levels `sigmas`, which
end in 0, and calls `denoise(x, sigma)` for the network's estimate of x0 once a step. In these coordinates one formula
carries all of them. While the estimate stays put, the probability-flow ODE is a straight line to it,

    x(to) = x0 + to / sigma (x - x0),

and the samplers differ in the point that they move towards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count, pairwise

import torch
from torch import Tensor

from .diffusion import Schedule

Denoise = Callable[[Tensor, float], Tensor]
Sampler = Callable[[Denoise, Tensor, Sequence[float], torch.Generator | None], Tensor]


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], generator: torch.Generator | None) -> Tensor:
    """Euler's method in sigma, which is also DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 14)."""
    for sigma, to in pairwise(sigmas):
        x = _move(x, denoise(x, sigma), sigma, to)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], generator: torch.Generator | None) -> Tensor:
    """Euler's method to below the next level, then fresh noise up to it, with the variance of the DDPM posterior."""
    for sigma, to in pairwise(sigmas):
        down = to**2 / sigma
        up = math.sqrt(to**2 - down**2)
        x = _move(x, denoise(x, sigma), sigma, down)
        # Drawn on the CPU: a seed is then the same noise on every device.
        x = x + up * torch.randn(x.shape, generator=generator).to(x)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], generator: torch.Generator | None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, alg. 2): move towards the estimate half a step ahead."""
    estimates: list[Tensor] = []
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        estimates = [*estimates[-1:], denoise(x, sigma)]
        x = _move(x, _half_step_ahead(estimates, sigmas, i), sigma, to)
    return x


def unipc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], generator: torch.Generator | None) -> Tensor:
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


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: Schedule,
    *,
    sampler: str = "ddim",
    steps: int,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Turn unit noise `[B, C, F, H, W]` into latents of that shape and type.

    model: `model(x_t, t)` returns the network's prediction, after guidance, for `x_t` = sqrt(abar) x0 + sqrt(1 - abar)
    eps in noise's type and `t [B]` (float32). sampler: a key of `SAMPLERS`. steps: evaluations of the model, from 1 to
    T. generator: a CPU generator for the noise that `euler_ancestral` adds. callback: called after each evaluation with
    the step, from 0, and the estimate of x0 (float32 or wider).

    The first x_t is `noise` itself, the variance-preserving start that ComfyUI uses too, whatever the sampler.
    Raises ValueError for an unknown sampler or an impossible number of steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    sigmas = [*schedule.sigma(trailing_timesteps(schedule.num_timesteps, steps)).tolist(), 0.0]
    # Half precision would lose the picture under the noise: sigma reaches 4519.
    precise = torch.promote_types(noise.dtype, torch.float32)
    evaluation = count()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        x_t = x / math.sqrt(1 + sigma**2)
        t = schedule.timestep(torch.tensor(sigma, dtype=torch.float64)).float().to(x.device).expand(x.shape[0])
        x0, _ = schedule.to_x0_eps(model(x_t.to(noise.dtype), t).to(precise), x_t, t)
        if callback is not None:
            callback(next(evaluation), x0)
        return x0

    x = noise.to(precise) * math.sqrt(1 + sigmas[0] ** 2)
    return SAMPLERS[sampler](denoise, x, sigmas, generator).to(noise.dtype)


def trailing_timesteps(num_timesteps: int, steps: int) -> Tensor:
    """`steps` integers from T - 1 down, evenly spaced from the noisy end ("trailing", Lin et al., table 2), int64.

    Starting at T - 1 is what makes a zero terminal SNR work: there, unit noise is what the network was trained on.
    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}; choose a number from 1 to {num_timesteps}")
    spacing = num_timesteps / steps
    return torch.tensor([round(num_timesteps - i * spacing) - 1 for i in range(steps)])


def _move(x: Tensor, target: Tensor, sigma: float, to: float) -> Tensor:
    """From noise level `sigma` to level `to` along the straight line to `target`."""
    return target + (to / sigma) * (x - target)


def _log_step(sigmas: Sequence[float], i: int) -> float:
    """h: step i in half the log of the signal-to-noise ratio."""
    return math.log(sigmas[i] / sigmas[i + 1])


def _half_step_ahead(estimates: list[Tensor], sigmas: Sequence[float], i: int) -> Tensor:
    """The newest estimate, extrapolated in log sigma to the middle of step i from the one before.

    The first step has none before and the last is infinitely long: there it is the estimate itself.
    """
    newest = estimates[-1]
    if i == 0 or sigmas[i + 1] == 0:
        return newest
    return newest + 0.5 * _log_step(sigmas, i) / _log_step(sigmas, i - 1) * (newest - estimates[-2])


def _corrected(estimates: list[Tensor], sigmas: Sequence[float], i: int) -> Tensor:
    """What step i - 1 should have moved towards, by UniC of the order that the step had.

    With m the estimates, newest last, r = -h_(i-2) / h_(i-1) and D = (m_(-3) - m_(-2)) / r it is m_(-2) + a D +
    b (m_(-1) - m_(-2)), where a + b = g_1 and r a + b = g_2 (eq. 11 for the data estimate).
    """
    old, new = estimates[-2:]
    if i == 1:
        return old + 0.5 * (new - old)
    h = _log_step(sigmas, i - 1)
    r = -_log_step(sigmas, i - 2) / h
    phi_1 = -math.expm1(-h) / h
    phi_2 = (1 - phi_1) / h
    g_1, g_2 = phi_2 / phi_1, (1 - 2 * phi_2) / (h * phi_1)
    a = (g_1 - g_2) / (1 - r)
    return old + (a / r) * (estimates[-3] - old) + (g_1 - a) * (new - old)
