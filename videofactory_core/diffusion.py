"""The noise schedule, what the network predicts, and classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from .config import DiffusionConfig, PredictionType

# Algorithm 1 of Lin et al. ends at exactly 0, where sigma is infinite. This is the last value that ComfyUI samples with
# (sigma 4518.7), so that a clip is the same from the command line and from a graph.
TERMINAL_ALPHA_CUMPROD = 4.8973451890853435e-08


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of a variance-preserving diffusion: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

    Throughout, `t` is `[B]` (one level a clip) or `[B, F]` (one a frame), integer or fractional, from 0 to T - 1; what
    lies outside is clamped. Between two integers log(sigma) is linear. Video tensors are `[B, C, F, H, W]`.
    """

    alphas_cumprod: Tensor  # abar [T], float64, on the CPU
    prediction_type: PredictionType

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Schedule:
        """Build the schedule; raises ValueError for fewer than two timesteps."""
        if config.num_timesteps < 2:
            raise ValueError(f"num_timesteps is {config.num_timesteps}; a noise schedule needs at least 2")
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas = torch.linspace(*ends, config.num_timesteps, dtype=torch.float64) ** power
        alphas_cumprod = (1 - betas).cumprod(0)
        if config.zero_terminal_snr:
            alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T, the number of levels."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt((1 - abar) / abar), noise over signal, rising: [T], float64."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sigma at `t`, in t's shape and on its device, float64 where the device has it."""
        log_sigmas = self._log_sigmas(t.device)
        position = t.to(log_sigmas.dtype).clamp(0, self.num_timesteps - 1)
        low = position.long().clamp(max=self.num_timesteps - 2)
        return torch.lerp(log_sigmas[low], log_sigmas[low + 1], position - low).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The fractional `t` at which `sigma(t)` is `sigma`, in sigma's shape and on its device."""
        log_sigmas = self._log_sigmas(sigma.device)
        log_sigma = sigma.to(log_sigmas.dtype).log().clamp(log_sigmas[0], log_sigmas[-1])
        low = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, self.num_timesteps - 2)
        return low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
        a, s = self._signal_and_noise(t, x0)
        return a * x0 + s * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans and Ho 2022, appendix D)."""
        a, s = self._signal_and_noise(t, x0)
        return a * noise - s * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to return for `add_noise(x0, noise, t)`."""
        return noise if self.prediction_type == "epsilon" else self.velocity(x0, noise, t)

    def to_x0_eps(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The estimates of x0 and eps that `model_output` stands for, given its input `x_t`."""
        a, s = self._signal_and_noise(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - s * model_output) / a, model_output
        return a * x_t - s * model_output, a * model_output + s * x_t

    def _log_sigmas(self, device: torch.device) -> Tensor:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self.sigmas.log().to(dtype).to(device)

    def _signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), ready to multiply x `[B, C, F, H, W]`."""
        assert t.ndim in (1, 2), f"timesteps must be [B] or [B, F], got {list(t.shape)}"
        sigma = rearrange(self.sigma(t), "B -> B 1 1 1 1" if t.ndim == 1 else "B F -> B 1 F 1 1")
        signal = (1 + sigma**2).rsqrt()
        return signal.to(x), (sigma * signal).to(x)


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last step is noise and the first is kept (arXiv 2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = TERMINAL_ALPHA_CUMPROD
    return rescaled


def guide(cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond), with the spread of `cond` restored by `rescale`.

    cond, uncond: the network's outputs with and without the prompt, [B, ...]. scale: 1 returns `cond`, more follows the
    prompt harder. rescale: phi of Lin et al. (arXiv 2305.08891, sec. 3.4) from 0 (off) to 1 (the standard deviation of
    each clip is that of `cond`), against the over-exposure of large scales.
    """
    guided = cond + (scale - 1) * (cond - uncond)
    if rescale == 0:
        return guided
    dims = tuple(range(1, cond.ndim))
    spread = guided.std(dims, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    return guided * (1 - rescale + rescale * cond.std(dims, keepdim=True) / spread)


def guide_frames(both: Tensor, frames: Tensor, neither: Tensor, scale: float, frame_scale: float) -> Tensor:
    """Guidance over text and over given frames separately (Brooks et al., arXiv 2211.09800, eq. 3).

    both, frames, neither: the network's outputs with prompt and frames, with frames alone and without any. scale,
    frame_scale: how closely to follow the prompt and the frames; 1 and 1 return `both`.
    """
    return neither + frame_scale * (frames - neither) + scale * (both - frames)
