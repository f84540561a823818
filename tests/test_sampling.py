"""The samplers against diffusers step by step, and against a distribution whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videofactory_core.config import DiffusionConfig, PredictionType
from videofactory_core.diffusion import Schedule
from videofactory_core.sampling import SAMPLERS, Known, noise_levels, sample, trailing_timesteps

Model = Callable[[Tensor, Tensor], Tensor]

PREDICTION_TYPES = get_args(PredictionType)
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
}


def unit_noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 4, 3, 5, 6), generator=torch.Generator().manual_seed(1), dtype=dtype)


def fake_model(x: Tensor, t: Tensor) -> Tensor:
    """A smooth function of the input, the neighbouring pixels and the time, like a network's."""
    time = (t / 1000).view(-1, 1, 1, 1, 1)
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) + time) - 0.2 * time * x


def fake_model_by_frame(x: Tensor, t: Tensor) -> Tensor:
    """The same for times of clips or of frames."""
    time = (t / 1000).view(len(x), 1, -1, 1, 1)
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) + time) - 0.2 * time * x


def recorded(model: Model) -> tuple[Model, list[Tensor]]:
    """`model`, and the list of the inputs that it will have been given."""
    inputs: list[Tensor] = []

    def recording(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return model(x, t)

    return recording, inputs


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def diffusers_path(name: str, config: DiffusionConfig, noise: Tensor, steps: int) -> list[Tensor]:
    """What diffusers' scheduler shows the model at each step, then the latents that it ends with."""
    kind, options = PEERS[name]
    scheduler = kind(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing",
        **options,
    )
    # The two end a zero terminal SNR schedule in different tiny values.
    scheduler.alphas_cumprod[-1] = Schedule.from_config(config).alphas_cumprod[-1]
    scheduler.set_timesteps(steps)
    x = noise
    if name.startswith("euler"):
        x = noise * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    generator = torch.Generator().manual_seed(7)
    path = []
    for t in scheduler.timesteps:
        path.append(scheduler.scale_model_input(x, t))
        output = fake_model(path[-1], t.expand(noise.shape[0]))
        noisy = {"generator": generator} if name == "euler_ancestral" else {}
        x = scheduler.step(output, t, x, **noisy).prev_sample
    return [*path, x]


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(name: str, prediction_type: PredictionType, steps: int) -> None:
    config = DiffusionConfig(prediction_type=prediction_type)
    model, inputs = recorded(fake_model)
    end = sample(
        model,
        unit_noise(),
        Schedule.from_config(config),
        sampler=name,
        steps=steps,
        generator=torch.Generator().manual_seed(7),
    )
    theirs = diffusers_path(name, config, unit_noise(), steps)
    assert len(inputs) == steps
    errors = [relative_error(a, b) for a, b in zip([*inputs, end], theirs, strict=True)]
    assert max(errors) <= 1e-5, errors


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers_from_a_zero_terminal_snr(name: str) -> None:
    config = DiffusionConfig(zero_terminal_snr=True)
    model, inputs = recorded(fake_model)
    generator = torch.Generator().manual_seed(7)
    end = sample(model, unit_noise(), Schedule.from_config(config), sampler=name, steps=10, generator=generator)
    errors = [
        relative_error(a, b)
        for a, b in zip([*inputs, end], diffusers_path(name, config, unit_noise(), 10), strict=True)
    ]
    assert max(errors) <= 1e-5, errors


# diffusers' two Euler schedulers recover eps from v at sigma 4519 by subtracting in float32, which alone costs them
# 2e-5; its DDIM takes the same steps as Euler without that.
@pytest.mark.parametrize(("name", "peer"), [("ddim", "ddim"), ("euler", "ddim"), ("dpmpp_2m",) * 2, ("unipc",) * 2])
def test_v_prediction_from_a_zero_terminal_snr_equals_diffusers(name: str, peer: str) -> None:
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    model, inputs = recorded(fake_model)
    end = sample(model, unit_noise(), Schedule.from_config(config), sampler=name, steps=10)
    errors = [
        relative_error(a, b)
        for a, b in zip([*inputs, end], diffusers_path(peer, config, unit_noise(), 10), strict=True)
    ]
    assert max(errors) <= 1e-5, errors


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_single_precision_equals_double(name: str, prediction_type: PredictionType, zero_terminal_snr: bool) -> None:
    schedule = Schedule.from_config(
        DiffusionConfig(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    )
    single, double = (
        sample(
            fake_model,
            unit_noise().to(dtype),
            schedule,
            sampler=name,
            steps=10,
            generator=torch.Generator().manual_seed(7),
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert relative_error(single.double(), double) <= 1e-5


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 1000])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_finite(name: str, prediction_type: PredictionType, zero_terminal_snr: bool, steps: int) -> None:
    schedule = Schedule.from_config(
        DiffusionConfig(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    )
    assert sample(fake_model, unit_noise(1, 1, 1, 2, 2), schedule, sampler=name, steps=steps).isfinite().all()


# Data whose every value is normal with this mean and deviation, and its exact denoiser E[x0 | x0 + sigma eps].
MEAN, DEVIATION = 0.7, 0.6


def gaussian_x0(x: Tensor, sigma: float | Tensor) -> Tensor:
    return MEAN + DEVIATION**2 / (DEVIATION**2 + sigma**2) * (x - MEAN)


def gaussian_flow(x: Tensor, sigma: float, to: float) -> Tensor:
    """Where the probability-flow ODE takes `x` from level `sigma` to level `to`."""
    return MEAN + math.sqrt((DEVIATION**2 + to**2) / (DEVIATION**2 + sigma**2)) * (x - MEAN)


def gaussian_model(schedule: Schedule) -> Model:
    """A network that is the exact denoiser, in the schedule's prediction type."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.sigma(t).view(-1, 1, 1, 1, 1).to(x)
        noisy = x * (1 + sigma**2).sqrt()
        x0 = gaussian_x0(noisy, sigma)
        return schedule.target(x0, (noisy - x0) / sigma, t)

    return model


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2), ("unipc", 3)])
def test_each_solver_converges_with_its_order(name: str, order: int) -> None:
    x = 10 * unit_noise(dtype=torch.float64)
    errors = []
    for steps in (80, 160):
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        end = SAMPLERS[name](gaussian_x0, x, sigmas[:, None], None)
        errors.append(relative_error(end, gaussian_flow(x, float(sigmas[0]), float(sigmas[-1]))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_the_exact_denoiser_leads_to_the_analytic_answer(
    name: str, prediction_type: PredictionType, zero_terminal_snr: bool
) -> None:
    schedule = Schedule.from_config(
        DiffusionConfig(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    )
    noise, top = unit_noise(dtype=torch.float64), float(schedule.sigmas[-1])
    answer = gaussian_flow(noise * math.sqrt(1 + top**2), top, 0)
    errors = [
        relative_error(sample(gaussian_model(schedule), noise, schedule, sampler=name, steps=steps), answer)
        for steps in (10, 40, 160, 640)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 0.01


def test_ancestral_sampling_draws_from_the_distribution() -> None:
    schedule = Schedule.from_config(DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True))
    noise = unit_noise(8, 4, 8, 16, 16)
    gaps = []
    for steps in (10, 40, 160, 640):
        generator = torch.Generator().manual_seed(0)
        end = sample(
            gaussian_model(schedule), noise, schedule, sampler="euler_ancestral", steps=steps, generator=generator
        )
        # Four standard errors of the mean of 65,536 values.
        assert float(end.mean()) == pytest.approx(MEAN, abs=4 * DEVIATION / 256)
        gaps.append(abs(float(end.std()) - DEVIATION))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= 0.02 * DEVIATION


def test_only_a_zero_terminal_snr_reaches_the_mean_of_the_data() -> None:
    def mean(zero_terminal_snr: bool) -> float:
        config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=zero_terminal_snr)
        schedule = Schedule.from_config(config)
        noise = unit_noise(dtype=torch.float64)
        noise = noise - noise.mean()
        return float(sample(gaussian_model(schedule), noise, schedule, steps=50).mean())

    assert mean(True) == pytest.approx(MEAN, abs=1e-3)
    assert MEAN - mean(False) > 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        schedule = Schedule.from_config(DiffusionConfig())
        return sample(fake_model, unit_noise(), schedule, sampler=name, steps=5, generator=generator)

    assert torch.equal(run(3), run(3))
    assert torch.equal(run(3), run(4)) == (name != "euler_ancestral")


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"euler_ancestral"}))
def test_deterministic_samplers_draw_no_noise(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    schedule = Schedule.from_config(DiffusionConfig())
    sample(fake_model, unit_noise(), schedule, sampler=name, steps=5, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_sees_the_noise_first_and_each_timestep_once(name: str) -> None:
    seen: list[Tensor] = []
    first: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert (x.dtype, t.dtype, t.shape) == (torch.float16, torch.float32, (2,))
        first.append(x)
        seen.append(t)
        return 0.1 * x

    noise = unit_noise().half()
    end = sample(model, noise, Schedule.from_config(DiffusionConfig()), sampler=name, steps=4)
    assert torch.stack(seen).tolist() == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert torch.equal(first[0], noise)
    assert end.dtype == torch.float16


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_gets_each_step_and_the_estimate_that_ends_the_clip(name: str) -> None:
    calls: list[tuple[int, Tensor]] = []
    schedule = Schedule.from_config(DiffusionConfig())
    end = sample(
        fake_model,
        unit_noise(),
        schedule,
        sampler=name,
        steps=4,
        callback=lambda step, x0: calls.append((step, x0)),
    )
    assert [step for step, _ in calls] == [0, 1, 2, 3]
    assert torch.equal(calls[-1][1], end)


@pytest.mark.parametrize("stagger", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("name", SAMPLERS)
def test_known_frames_come_back_to_the_last_bit(name: str, steps: int, clean: bool, stagger: float) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        if clean:
            assert torch.equal(x[:, :, [0, 3]], known.latents[:, :, [0, 3]])
            assert not t[:, [0, 3]].any()
        return fake_model_by_frame(x, t)

    noise = unit_noise(2, 4, 5, 6, 7)
    known = Known(noise.flip(0), torch.tensor([True, False, False, True, False]), clean)
    schedule = Schedule.from_config(DiffusionConfig(zero_terminal_snr=True, prediction_type="v_prediction"))
    generator = torch.Generator().manual_seed(1)
    end = sample(model, noise, schedule, sampler=name, steps=steps, known=known, stagger=stagger, generator=generator)
    assert torch.equal(end[:, :, [0, 3]], known.latents[:, :, [0, 3]])
    assert end.isfinite().all()
    assert len(seen) == steps


@pytest.mark.parametrize("stagger", [0.0, 1.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_known_frame_is_plain_sampling_and_only_known_ones_come_back(name: str, stagger: float) -> None:
    schedule = Schedule.from_config(DiffusionConfig())
    noise = unit_noise()

    def run(known: Known | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return sample(
            fake_model_by_frame,
            noise,
            schedule,
            sampler=name,
            steps=6,
            known=known,
            stagger=stagger,
            generator=generator,
        )

    for clean in (True, False):
        assert torch.equal(run(Known(noise.flip(0), torch.zeros(3, dtype=torch.bool), clean)), run(None))
        assert torch.equal(run(Known(noise.flip(0), torch.ones(3, dtype=torch.bool), clean)), noise.flip(0))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"euler_ancestral"}))
def test_frames_that_nothing_connects_are_sampled_as_if_alone(name: str) -> None:
    """Also when they begin later and with larger steps."""
    schedule = Schedule.from_config(DiffusionConfig(zero_terminal_snr=True, prediction_type="v_prediction"))
    noise = unit_noise(1, 4, 4, 5, 6)
    # A frame has a third of the steps, and the next begins when it is done.
    end = sample(fake_model_by_frame, noise, schedule, sampler=name, steps=40, stagger=3.0)
    for frame in range(4):
        alone = sample(fake_model_by_frame, noise[:, :, [frame]], schedule, sampler=name, steps=10)
        assert relative_error(end[:, :, [frame]], alone) <= 1e-5


def test_staggered_frames_go_one_behind_the_other() -> None:
    schedule = Schedule.from_config(DiffusionConfig())
    given = torch.tensor([False, True, False, False])
    levels = noise_levels(schedule, 20, 4, given, stagger=1.0)
    assert levels.shape == (21, 4)
    assert not levels[:, 1].any()
    assert (levels[0, [0, 2, 3]] == schedule.sigma(torch.tensor(999))).all()
    assert not levels[-1].any()
    assert (levels.diff(dim=0) <= 0).all()
    assert (levels[:, 0] <= levels[:, 2]).all()
    assert (levels[:, 2] <= levels[:, 3]).all()
    # With 1 the last begins when the first is done.
    done, begun = (levels[:, 0] == 0).nonzero()[0], (levels[:, 3] < levels[0, 3]).nonzero()[0]
    assert begun == done + 1
    with pytest.raises(ValueError, match="stagger is -1"):
        noise_levels(schedule, 20, 4, stagger=-1)


def test_sampling_keeps_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    end = sample(lambda x, t: weight * x, unit_noise(), Schedule.from_config(DiffusionConfig()), steps=2)
    assert not end.requires_grad


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 30, 50, 400, 1000])
def test_timesteps_are_those_of_diffusers(steps: int) -> None:
    scheduler: Any = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(1000, steps).flatten().tolist() == [*scheduler.timesteps.tolist(), -1]


@settings(deadline=None)
@given(st.data())
def test_timesteps_fall_from_the_last_one_without_repeats(data: st.DataObject) -> None:
    num_timesteps = data.draw(st.integers(2, 2000))
    steps = data.draw(st.integers(1, num_timesteps))
    timesteps = trailing_timesteps(num_timesteps, steps).flatten()
    assert len(timesteps) == steps + 1
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] == -1
    assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        sample(fake_model, unit_noise(), Schedule.from_config(DiffusionConfig()), steps=steps)


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'heun'.*ddim, euler, euler_ancestral, dpmpp_2m, unipc"):
        sample(fake_model, unit_noise(), Schedule.from_config(DiffusionConfig()), sampler="heun", steps=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_the_same_clip_on_a_gpu(name: str) -> None:
    schedule = Schedule.from_config(DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True))
    cpu, gpu = (
        sample(
            fake_model,
            unit_noise().to(device),
            schedule,
            sampler=name,
            steps=10,
            generator=torch.Generator().manual_seed(7),
        )
        for device in ("cpu", "cuda")
    )
    assert relative_error(gpu.cpu(), cpu) <= 1e-5
