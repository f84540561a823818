"""The training loss: what is drawn, what counts how much, and that processes share one draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from videofactory_core.config import DiffusionConfig, PredictionType
from videofactory_core.diffusion import Schedule
from videofactory_core.objective import Noised, Objective, Process, quantile_levels, seed_for

SCHEDULE = Schedule.from_config(DiffusionConfig(prediction_type="v_prediction"))


def ask(objective: Objective, latents: Tensor, process: Process = Process(), seed: int = 0) -> Noised:  # noqa: B008
    torch.manual_seed(seed)
    return objective.noised(latents, SCHEDULE, process)


@pytest.mark.parametrize(
    ("shift", "part"), [(1.0, (0.0, 1.0)), (1.0, (0.55, 0.8)), (6.0, (0.0, 1.0)), (3.0, (0.5, 1.0))]
)
def test_noise_levels_are_drawn_where_the_recipe_says(shift: float, part: tuple[float, float]) -> None:
    objective = Objective(timestep_shift=shift, timestep_range=part)
    shares = ask(objective, torch.zeros(4000, 4, 1, 1, 1)).timesteps / 1000
    assert shares.min() >= part[0]
    assert shares.max() < part[1]
    # The median of the uniform share, 1/2, is moved to s / (s + 1).
    median = part[0] + (part[1] - part[0]) * shift / (shift + 1)
    assert float(shares.median()) == pytest.approx(median, abs=0.02)


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(shared_noise=0.5, offset_noise=0.1, min_snr_gamma=5.0)], ids=["plain", "all"]
)
def test_processes_take_rows_of_the_same_draw(objective: Objective) -> None:
    latents = torch.randn(6, 4, 3, 2, 5)
    whole = ask(objective, latents)
    for rank, rows in enumerate(latents.chunk(3)):
        part = ask(objective, rows, Process(rank, 3))
        for found, expected in zip(part, whole, strict=True):
            if expected is None:
                assert found is None
            else:
                assert torch.equal(found, expected.chunk(3)[rank])


def test_a_process_takes_its_part_of_every_batch() -> None:
    parts = [list(Process(rank, 2).items(3, 1, 20)) for rank in range(2)]
    assert parts == [[6, 7, 8, 12, 13, 14, 18, 19], [9, 10, 11, 15, 16, 17]]
    assert list(Process().items(3, 1, 20)) == list(range(3, 20))


def test_every_number_counts_in_a_seed() -> None:
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1 << 32, 0), (1 << 40, 0), (3, 2, 1)]
    drawn = {float(torch.rand((), generator=torch.Generator().manual_seed(seed_for(*n)))) for n in numbers}
    assert len(drawn) == len(numbers)


def test_captions_are_dropped_as_often_as_asked() -> None:
    torch.manual_seed(0)
    like = torch.zeros(20000, 1)
    assert Objective(caption_dropout=0.3).drops(like, Process()).float().mean() == pytest.approx(0.3, abs=0.01)
    assert not Objective(caption_dropout=0.0).drops(like, Process()).any()
    assert Objective(caption_dropout=1.0).drops(like, Process()).all()


def noise_of(objective: Objective, latents: Tensor) -> Tensor:
    """The noise that `latents` of zeros got."""
    noised = ask(objective, latents)
    sigma = SCHEDULE.sigma(noised.timesteps).float()
    return noised.latents / (sigma / (1 + sigma**2).sqrt())[:, None, None, None, None]


def test_shared_noise_is_common_to_the_frames_and_keeps_its_variance() -> None:
    noise = noise_of(Objective(shared_noise=0.75), torch.zeros(64, 4, 2, 16, 16))
    assert float(noise.var()) == pytest.approx(1.0, abs=0.02)
    first, second = noise.unbind(2)
    assert float((first * second).mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(*noise_of(Objective(shared_noise=1.0), torch.zeros(1, 4, 2, 16, 16)).unbind(2))


def test_offset_noise_moves_the_mean_of_a_clip() -> None:
    means = noise_of(Objective(offset_noise=0.5), torch.zeros(500, 4, 2, 16, 16)).mean((2, 3, 4))
    # 512 cells add a little of their own.
    assert float(means.std()) == pytest.approx((0.5**2 + 1 / 512) ** 0.5, abs=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_clean_clip_alike(kind: PredictionType) -> None:
    """By the paper's eq. 9 the loss on x0 weighs min(SNR, gamma), whatever the network predicts."""
    schedule = Schedule.from_config(DiffusionConfig(prediction_type=kind))
    timesteps = torch.tensor([10, 300, 700])
    x0, noise, wrong = torch.randn(3, 3, 4, 2, 5, 5).unbind(0)
    x_t = schedule.add_noise(x0, noise, timesteps)
    target = schedule.target(x0, noise, timesteps)
    prediction = target + 0.1 * wrong
    weight = Objective(min_snr_gamma=5.0).weight(timesteps, schedule)
    assert weight is not None
    found = Objective().loss(prediction, Noised(x_t, timesteps, target, weight))
    estimate, _ = schedule.to_x0_eps(prediction, x_t, timesteps)
    snr = schedule.sigma(timesteps).float() ** -2
    expected = ((estimate - x0).square().mean((1, 2, 3, 4)) * snr.clamp(max=5.0)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_validation_asks_the_same_question_every_time() -> None:
    latents = torch.randn(2, 4, 3, 5, 5)
    once = quantile_levels(latents, SCHEDULE, 4, seed=7)
    torch.manual_seed(123)
    again = quantile_levels(latents, SCHEDULE, 4, seed=7)
    assert [level.timesteps.tolist() for level in once] == [[t, t] for t in (125, 375, 625, 875)]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0].latents, quantile_levels(latents, SCHEDULE, 4, seed=8)[0].latents)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timestep_range": (0.5, 0.5)},
        {"timestep_range": (0.5, 1.5)},
        {"timestep_shift": 0.0},
        {"caption_dropout": 1.5},
        {"shared_noise": -0.1},
        {"min_snr_gamma": -1.0},
        {"offset_noise": float("nan")},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Objective(**wrong)
