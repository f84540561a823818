"""Which frames training gives, what the network is shown, and what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from videofactory_core.condition import Condition, GivenFrames
from videofactory_core.config import PRESETS, DiffusionConfig, from_dict
from videofactory_core.diffusion import Schedule
from videofactory_core.objective import Objective, Process
from videofactory_core.unet.model import VideoUNet

CLIPS, FRAMES = 3000, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def like(num_frames: int = FRAMES, clips: int = CLIPS) -> Tensor:
    return torch.randn(clips, 2, num_frames, 1, 1)


def given(num_frames: int = FRAMES, **weights: float) -> Tensor:
    return Condition(GivenFrames(**weights)).draw(like(num_frames), Process().uniform).given


def patterns(masks: Tensor) -> set[str]:
    return {"".join("x" if frame else "." for frame in mask) for mask in masks.tolist()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", {"........"}),
        ("first", {"x......."}),
        ("first_and_last", {"x......x"}),
        ("prefix", {"xx......", "xxx.....", "xxxx...."}),
        ("suffix", {"......xx", ".....xxx", "....xxxx"}),
        ("every_nth", {"x.x.x.x.", "x..x..x.", "x...x..."}),
    ],
)
def test_each_kind_gives_its_frames(kind: str, expected: set[str]) -> None:
    assert patterns(given(8, **{kind: 1.0})) == expected


def test_random_frames_are_of_every_number() -> None:
    counts = given(random=1.0).sum(dim=1)
    assert set(counts.tolist()) == set(range(FRAMES))


@pytest.mark.parametrize("kind", ["first", "first_and_last", "prefix", "suffix", "every_nth", "random"])
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_something_is_left_to_make(kind: str, num_frames: int) -> None:
    masks = given(num_frames, **{kind: 1.0})
    assert not masks.all(dim=1).any()
    if num_frames == 1:
        assert not masks.any()


def test_kinds_come_as_often_as_weighed() -> None:
    counts = given(none=2, first=1, first_and_last=1).sum(dim=1)
    for count, share in ((0, 0.5), (1, 0.25), (2, 0.25)):
        assert (counts == count).float().mean() == pytest.approx(share, abs=0.03)


def test_processes_draw_what_one_would() -> None:
    condition = Condition(GivenFrames(prefix=1, random=1), independent=0.5, frame_dropout=0.5)
    clips = like(4, 6)

    def draw(process: Process, part: Tensor) -> list[Tensor]:
        torch.manual_seed(3)
        return [values.nan_to_num(-1).float() for values in condition.draw(part, process.uniform)]

    parts = zip(*(draw(Process(rank, 2), clips.chunk(2)[rank]) for rank in range(2)), strict=True)
    for whole, pieces in zip(draw(Process(), clips), parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_given_frames_are_shown_clean_at_level_zero_and_do_not_count(prediction_type: Any) -> None:
    schedule = Schedule.from_config(DiffusionConfig(prediction_type=prediction_type))
    latents = like()
    objective = Objective(condition=Condition(GivenFrames(first=1)), min_snr_gamma=5.0)
    noised = objective.noised(latents, schedule, Process())
    assert torch.equal(noised.latents[:, :, 0], latents[:, :, 0])
    assert not noised.timesteps[:, 0].any()
    # The others share their level, and are as noisy as it says.
    assert (noised.timesteps[:, 1:] == noised.timesteps[:, 1:2]).all()
    _, noise = schedule.to_x0_eps(noised.target, noised.latents, noised.timesteps)
    again = schedule.add_noise(latents, noise, noised.timesteps)
    assert torch.allclose(noised.latents[:, :, 1:], again[:, :, 1:], atol=1e-5)
    # A wrong answer for a given frame costs nothing, and the others weigh as much as all did.
    wrong = noised.target.clone()
    wrong[:, :, 0] += 100
    assert objective.loss(wrong, noised) == 0
    plain = Objective(condition=Condition(GivenFrames(first=1)))
    noised = plain.noised(latents, schedule, Process())
    assert plain.loss(noised.target + 1, noised) == pytest.approx(1.0, rel=1e-5)


def test_the_loss_of_a_clip_does_not_depend_on_the_others() -> None:
    """So several processes have, in the mean, the loss of one with all their clips."""
    schedule = Schedule.from_config(DiffusionConfig())
    objective = Objective(condition=Condition(GivenFrames(none=1, first=1, prefix=1, random=1)))
    latents = like(8, 8)

    def losses(world: int) -> list[Tensor]:
        found = []
        for rank in range(world):
            torch.manual_seed(3)
            noised = objective.noised(latents.chunk(world)[rank], schedule, Process(rank, world))
            found.append(objective.loss(noised.latents, noised))
        return found

    whole = torch.stack(losses(1)).mean()
    for world in (2, 8):
        assert torch.stack(losses(world)).mean() == pytest.approx(whole.item(), rel=1e-5)


def test_hidden_frames_are_pure_noise_and_do_not_count() -> None:
    schedule = Schedule.from_config(DiffusionConfig())
    latents = torch.full((CLIPS, 2, 4, 1, 1), 50.0)
    objective = Objective(condition=Condition(GivenFrames(prefix=1), frame_dropout=0.25))
    noised = objective.noised(latents, schedule, Process())
    hidden = (noised.timesteps[:, :2] == schedule.num_timesteps - 1).all(dim=1)
    assert hidden.float().mean() == pytest.approx(0.25, abs=0.03)
    assert noised.latents[hidden][:, :, :2].mean() == pytest.approx(0, abs=0.1)
    assert noised.latents[hidden][:, :, :2].std() == pytest.approx(1, abs=0.05)
    assert not noised.weight[:, :2].any()


def test_independent_frames_have_levels_of_their_own() -> None:
    schedule = Schedule.from_config(DiffusionConfig())
    objective = Objective(condition=Condition(GivenFrames(none=1), independent=0.3), timestep_shift=3.0)
    timesteps = objective.noised(like(), schedule, Process()).timesteps
    own = (timesteps != timesteps[:, :1]).any(dim=1)
    assert own.float().mean() == pytest.approx(0.3, abs=0.03)
    # Shifted as the others are.
    for part in (timesteps[own], timesteps[~own]):
        assert (part.float() / 1000).mean() == pytest.approx(0.676, abs=0.02)


def test_without_a_condition_nothing_else_is_drawn() -> None:
    """Golden losses say the same; here it is seen why."""
    schedule = Schedule.from_config(DiffusionConfig())
    latents = like()
    torch.manual_seed(1)
    noised = Objective().noised(latents, schedule, Process())
    torch.manual_seed(1)
    timesteps = (torch.rand(CLIPS) * 1000).long()
    assert torch.equal(noised.timesteps, timesteps)
    assert torch.equal(noised.latents, schedule.add_noise(latents, torch.randn_like(latents), timesteps))


def test_equal_levels_of_frames_are_that_of_the_clip_exactly() -> None:
    config = PRESETS["debug"].unet
    unet = VideoUNet(config).eval()
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, context = torch.randn(2, 4, 5, 4, 6), torch.randn(2, 77, config.context_dim)
    timesteps = torch.tensor([3.0, 800.5])
    with torch.no_grad():
        assert torch.equal(unet(x, timesteps, context), unet(x, timesteps[:, None].expand(2, 5), context))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"frames": {"first": -1.0}}, "first.*use 0 or more"),
        ({"frames": {}}, "all weights are 0"),
        ({"frames": {"frist": 1.0}}, "did you mean 'first'"),
        ({"frames": {"first": 1.0}, "independent": 2.0}, "independent.*is not a share"),
        ({"frames": {"first": 1.0}, "frame_dropout": -0.1}, "frame_dropout.*is not a share"),
    ],
)
def test_tables_that_mean_nothing_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(Condition, table)
