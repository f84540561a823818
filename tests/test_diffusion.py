"""The schedule and guidance against diffusers, and the identities that they must obey."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videofactory_core.config import BetaSchedule, DiffusionConfig, PredictionType
from videofactory_core.diffusion import TERMINAL_ALPHA_CUMPROD, Schedule, guide, guide_frames

BETA_SCHEDULES = get_args(BetaSchedule)
PREDICTION_TYPES = get_args(PredictionType)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def schedule(**options: Any) -> Schedule:
    return Schedule.from_config(DiffusionConfig(**options))


def peer(config: DiffusionConfig) -> Any:
    return DDIMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        prediction_type=config.prediction_type,
    )


def clips(batch: int = 2, frames: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x0 and noise, [B, C, F, H, W]."""
    x0, noise = torch.randn(2, batch, 4, frames, 5, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x0, noise


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_noise_levels_are_those_of_diffusers(beta_schedule: BetaSchedule, zero_terminal_snr: bool) -> None:
    config = DiffusionConfig(beta_schedule=beta_schedule, zero_terminal_snr=zero_terminal_snr)
    ours, theirs = Schedule.from_config(config).alphas_cumprod, peer(config).alphas_cumprod.double()
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(ours[900:-1], theirs[900:-1]) <= 1e-5


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_ends_in_noise_with_a_finite_sigma(beta_schedule: BetaSchedule) -> None:
    plain, rescaled = (
        schedule(beta_schedule=beta_schedule),
        schedule(beta_schedule=beta_schedule, zero_terminal_snr=True),
    )
    assert rescaled.alphas_cumprod[-1] == TERMINAL_ALPHA_CUMPROD
    assert torch.isclose(rescaled.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-12)
    assert rescaled.sigmas.isfinite().all()
    assert (rescaled.sigmas.diff() > 0).all()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_add_noise_and_velocity_equal_diffusers(zero_terminal_snr: bool) -> None:
    config = DiffusionConfig(zero_terminal_snr=zero_terminal_snr, prediction_type="v_prediction")
    ours, theirs = Schedule.from_config(config), peer(config)
    x0, noise = clips(batch=4)
    t = torch.tensor([0, 123, 500, 998])
    assert relative_error(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t)) <= 1e-5
    assert relative_error(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t)) <= 1e-5


def test_the_target_of_epsilon_prediction_is_the_noise() -> None:
    x0, noise = clips()
    assert schedule().target(x0, noise, torch.tensor([3, 700])) is noise


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@settings(deadline=None)
@given(t=st.floats(0, 999))
def test_a_perfect_prediction_gives_back_the_clip_and_the_noise(
    prediction_type: PredictionType, zero_terminal_snr: bool, t: float
) -> None:
    s = schedule(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    x0, noise = clips(dtype=torch.float64)
    at = torch.full((2,), t, dtype=torch.float64)
    found_x0, found_noise = s.to_x0_eps(s.target(x0, noise, at), s.add_noise(x0, noise, at), at)
    assert relative_error(found_x0, x0) <= 1e-10
    assert relative_error(found_noise, noise) <= 1e-10


@pytest.mark.parametrize("method", ["add_noise", "velocity"])
def test_frames_may_have_noise_levels_of_their_own(method: str) -> None:
    function = getattr(schedule(), method)
    x0, noise = clips(batch=2, frames=3)
    t = torch.tensor([[0, 400, 999], [10, 20, 30]])
    together = function(x0, noise, t)
    for f in range(3):
        alone = function(x0[:, :, f : f + 1], noise[:, :, f : f + 1], t[:, f])
        assert torch.equal(together[:, :, f : f + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_keep_the_type_of_the_clip(dtype: torch.dtype) -> None:
    x0, noise = clips(dtype=dtype)
    s, t = schedule(prediction_type="v_prediction"), torch.tensor([0, 999])
    assert {s.add_noise(x0, noise, t).dtype, *(x.dtype for x in s.to_x0_eps(noise, x0, t))} == {dtype}


def test_timesteps_of_a_wrong_shape_are_refused() -> None:
    x0, noise = clips()
    with pytest.raises(AssertionError, match=r"\[B\] or \[B, F\]"):
        schedule().add_noise(x0, noise, torch.tensor(5))


def test_a_schedule_of_one_level_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        schedule(num_timesteps=1)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_integer_timesteps_have_the_levels_of_the_table(zero_terminal_snr: bool) -> None:
    s = schedule(zero_terminal_snr=zero_terminal_snr)
    assert torch.allclose(s.sigma(torch.arange(1000)), s.sigmas, rtol=1e-12)
    assert torch.equal(s.timestep(s.sigmas).float(), torch.arange(1000).float())


@settings(deadline=None)
@given(t=st.floats(0, 999), zero_terminal_snr=st.booleans())
def test_sigma_and_timestep_invert_each_other(t: float, zero_terminal_snr: bool) -> None:
    s = schedule(zero_terminal_snr=zero_terminal_snr)
    assert float(s.timestep(s.sigma(torch.tensor(t, dtype=torch.float64)))) == pytest.approx(t, abs=1e-8)


def test_levels_outside_the_schedule_are_clamped() -> None:
    s = schedule()
    assert torch.allclose(s.sigma(torch.tensor([-5.0, 2000.0])), s.sigmas[[0, -1]])
    assert s.timestep(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]


def test_fractional_timesteps_equal_those_of_diffusers() -> None:
    s = schedule()
    sigma = torch.logspace(-1.5, 1.1, 200, dtype=torch.float64)
    scheduler: Any = EulerDiscreteScheduler()
    theirs = scheduler._sigma_to_t(sigma.numpy(), s.sigmas.log().numpy())
    assert relative_error(s.timestep(sigma), torch.from_numpy(theirs)) <= 1e-5


def test_guidance_scale_1_is_the_conditional_prediction_exactly() -> None:
    cond, uncond = clips()
    assert torch.equal(guide(cond, uncond, 1.0), cond)


@settings(deadline=None)
@given(scale=st.floats(-5, 20))
def test_guidance_extrapolates_from_the_unconditional_prediction(scale: float) -> None:
    cond, uncond = clips(dtype=torch.float64)
    assert torch.allclose(guide(cond, uncond, scale), uncond + scale * (cond - uncond), atol=1e-12)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_guidance_rescale_equals_diffusers(rescale: float) -> None:
    cond, uncond = clips()
    theirs = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    assert relative_error(guide(cond, uncond, 7.5, rescale), theirs) <= 1e-5


def test_full_rescale_keeps_the_standard_deviation_of_each_clip() -> None:
    cond, uncond = clips()
    cond = cond * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    dims = (1, 2, 3, 4)
    assert torch.allclose(guide(cond, uncond, 9.0, 1.0).std(dims), cond.std(dims), rtol=1e-5)
    assert not torch.allclose(guide(cond, uncond, 9.0).std(dims), cond.std(dims), rtol=0.5)


def test_rescaling_the_prediction_of_an_untrained_network_is_finite() -> None:
    zeros = torch.zeros(2, 4, 3, 5, 6)
    assert torch.equal(guide(zeros, zeros, 7.5, 0.7), zeros)


def test_guidance_over_text_and_frames_is_that_over_either_where_the_other_changes_nothing() -> None:
    both, frames, neither = torch.randn(3, 2, 4, 3, 5, 6, dtype=torch.float64)
    assert torch.allclose(guide_frames(both, frames, neither, 1.0, 1.0), both)
    assert torch.allclose(guide_frames(both, frames, neither, 7.5, 1.0), guide(both, frames, 7.5))
    assert torch.allclose(guide_frames(frames, frames, neither, 7.5, 3.0), guide(frames, neither, 3.0))
