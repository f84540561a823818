"""Clips of moving shapes, and the checker that reads them back."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from itertools import combinations as choose

import av
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from videofactory_train.data.moving_shapes import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    HELD_OUT,
    MAX_SIZE,
    MIN_SIZE,
    SHAPES,
    TRAINING,
    Combination,
    MovingShapes,
    Scene,
    draw,
    object_mask,
    random_scene,
)
from videofactory_train.data.shape_checker import Verdict, check, summarise

WORDS = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(BACKGROUNDS))
RED_SQUARE = Combination("red", "square", "right", "black")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scenes(combinations: tuple[Combination, ...], seed: int, aspect: float = 16 / 9) -> list[Scene]:
    generator = torch.Generator().manual_seed(seed)
    return [random_scene(combination, generator, aspect) for combination in combinations]


def blur(video: Tensor, sigma: float) -> Tensor:
    kernel = 2 * round(3 * sigma) + 1
    return gaussian_blur(video.transpose(0, 1), [kernel, kernel], [sigma, sigma]).transpose(0, 1)


def noise(video: Tensor, sigma: float) -> Tensor:
    return video + sigma * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


def through_mp4(video: Tensor) -> Tensor:
    frames = video.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "30"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), "rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in source.decode(video=0)]
    return torch.stack(decoded).permute(3, 0, 1, 2).float() / 127.5 - 1


def right(combination: Combination) -> Verdict:
    return Verdict(**combination._asdict(), steady=True)


# --- combinations


def test_combinations_are_every_choice_of_words_once_split_into_training_and_held_out():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 216
    assert len(HELD_OUT) == 36
    assert len(TRAINING) == 180
    assert set(TRAINING) | set(HELD_OUT) == set(COMBINATIONS)


def test_every_word_is_held_out_equally_often():
    for position, words in enumerate(WORDS):
        counts = Counter(combination[position] for combination in HELD_OUT)
        assert counts == dict.fromkeys(words, 36 // len(words))


@pytest.mark.parametrize("together", [2, 3])
def test_words_that_are_held_out_together_also_meet_in_training(together):
    for positions in choose(range(4), together):
        trained = {tuple(combination[i] for i in positions) for combination in TRAINING}
        held_out = {tuple(combination[i] for i in positions) for combination in HELD_OUT}
        assert held_out <= trained


# --- scenes


def test_caption_names_all_four_words():
    scene = Scene("red", "circle", "left", "grey", size=0.2, start_x=1.0, start_y=0.5, travel=0.4)
    assert scene.caption == "a red circle moving left on a grey background"
    assert scene.combination == ("red", "circle", "left", "grey")


@pytest.mark.parametrize(("height", "width"), [(72, 128), (64, 64)])
def test_object_stays_wholly_inside_the_picture(height, width):
    for scene in scenes(COMBINATIONS, seed=1, aspect=width / height):
        mask = object_mask(scene, num_frames=5, height=height, width=width)
        rim = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], dim=1)
        assert rim.max() == 0, scene


def test_object_is_as_large_as_its_size_says_and_keeps_its_area():
    for scene in scenes(COMBINATIONS, seed=2):
        assert MIN_SIZE <= scene.size <= MAX_SIZE
        areas = object_mask(scene).sum(dim=(1, 2)) / 72**2
        circle = torch.pi * scene.size**2
        share = 1.4**2 * 3 * 3**0.5 / 4 / torch.pi if scene.shape == "triangle" else 1.0
        assert torch.allclose(areas, torch.tensor(share * circle), rtol=0.02), scene


def test_object_moves_at_constant_speed_along_its_direction_only():
    x, y = (torch.arange(128) + 0.5) / 72, (torch.arange(72)[:, None] + 0.5) / 72
    for scene in scenes(COMBINATIONS, seed=3):
        mask = object_mask(scene)
        centres = torch.stack([(mask * at).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)) for at in (x, y)], dim=1)
        step = torch.tensor(DIRECTIONS[scene.direction]) * scene.travel / 15
        assert torch.allclose(centres.diff(dim=0), step.expand(15, 2), atol=2e-3), scene
        assert scene.travel >= 0.2


def test_clip_has_the_colours_of_its_words_and_ranges_from_minus_one_to_one():
    scene = Scene("orange", "circle", "left", "grey", size=0.25, start_x=1.0, start_y=0.5, travel=0.4)
    video = draw(scene, num_frames=3, height=72, width=128)
    assert video.shape == (3, 3, 72, 128)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    background = (video[:, 0, 0, 0] + 1) * 127.5
    colour = (video[:, 0, 36, 72] + 1) * 127.5
    assert background.tolist() == pytest.approx(BACKGROUNDS["grey"], abs=1e-3)
    assert colour.tolist() == pytest.approx(COLOURS["orange"], abs=1e-3)


def test_scene_is_the_same_at_every_resolution():
    for scene in scenes(COMBINATIONS[::7], seed=4):
        small = draw(scene, num_frames=4)
        large = draw(scene, num_frames=4, height=288, width=512)
        assert (F.avg_pool2d(large, 4) - small).abs().mean() < 0.01, scene


def test_portrait_pictures_are_refused():
    with pytest.raises(ValueError, match="at least as wide as it is high"):
        random_scene(RED_SQUARE, torch.Generator(), aspect=9 / 16)


# --- dataset


def test_item_depends_on_seed_and_index_only():
    clips = MovingShapes(10, num_frames=4, seed=3)
    again = MovingShapes(1000, num_frames=4, seed=3)
    torch.manual_seed(99)
    for i in (7, 0, 3):
        assert torch.equal(clips[i]["video"], again[i]["video"])
        assert torch.equal(clips[i]["mask"], again[i]["mask"])
        assert clips[i]["caption"] == again[i]["caption"]


def test_clips_differ_between_indices_and_seeds():
    seen = {MovingShapes(200, seed=seed).scene(i) for seed in (0, 1, 2**32) for i in range(200)}
    assert len(seen) == 600


def test_an_object_that_returns_ends_where_it_began():
    clips = MovingShapes(1, num_frames=15, returns=True)
    there_and_back = clips[0]["video"]
    assert torch.allclose(there_and_back, there_and_back.flip(1), atol=1e-4)
    one_way = draw(replace(clips.scene(0), returns=False), num_frames=8)
    assert torch.allclose(there_and_back[:, :8], one_way, atol=1e-4)


def test_item_holds_clip_caption_and_mask_of_one_scene():
    clips = MovingShapes(3, num_frames=4, height=36, width=64)
    item = clips[2]
    scene = clips.scene(2)
    assert item["caption"] == scene.caption
    assert torch.equal(item["video"], draw(scene, 4, 36, 64))
    assert torch.equal(item["mask"], object_mask(scene, 4, 36, 64))


def test_every_lap_shows_each_combination_once_in_another_order():
    clips = MovingShapes(360)
    laps = [[clips.scene(i).combination for i in range(start, start + 180)] for start in (0, 180)]
    assert set(laps[0]) == set(laps[1]) == set(TRAINING)
    assert laps[0] != laps[1]


def test_dataset_shows_only_the_combinations_it_is_given_and_ends():
    captions = [clip["caption"] for clip in MovingShapes(5, num_frames=1, combinations=[RED_SQUARE])]
    assert captions == ["a red square moving right on a black background"] * 5


# --- checker, right clips


def test_checker_is_right_about_ideal_clips_of_all_combinations():
    for scene in scenes(COMBINATIONS, seed=5):
        assert check(draw(scene, num_frames=8)) == right(scene.combination), scene


def test_checker_is_right_about_blurred_and_noisy_clips_of_all_combinations():
    for scene in scenes(COMBINATIONS, seed=6):
        assert check(noise(blur(draw(scene, num_frames=5), sigma=2), 0.05)) == right(scene.combination), scene


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(through_mp4, id="mp4"),
        pytest.param(lambda video: F.interpolate(video, scale_factor=4, mode="bilinear"), id="four times larger"),
        pytest.param(lambda video: F.avg_pool2d(video, 2), id="half the size"),
        pytest.param(lambda video: noise(video, 0.3), id="strong noise"),
        pytest.param(lambda video: 0.6 * video, id="faded"),
    ],
)
def test_checker_is_right_about_changed_clips(change):
    for scene in scenes(COMBINATIONS[::17], seed=7):
        assert check(change(draw(scene))) == right(scene.combination), scene


@pytest.mark.parametrize("num_frames", [2, 5, 40])
def test_checker_is_right_at_other_lengths(num_frames):
    for scene in scenes(COMBINATIONS[::17], seed=8):
        assert check(draw(scene, num_frames)) == right(scene.combination), scene


# --- checker, wrong clips


@pytest.fixture(params=[0, 1, 2])
def wrong(request) -> tuple[Scene, Tensor]:
    """A scene and its clip of 16 frames, to be spoilt."""
    scene = scenes(COMBINATIONS[::80], seed=9)[request.param]
    return scene, draw(scene)


@pytest.mark.parametrize(("attribute", "words"), list(zip(Combination._fields, WORDS, strict=True)))
def test_another_word_than_the_caption_s_is_seen(wrong, attribute, words):
    scene, _ = wrong
    if attribute == "direction":
        scene = replace(scene, start_x=0.9, start_y=0.5, travel=0.2)
    for word in set(words) - {getattr(scene, attribute)}:
        other = replace(scene, **{attribute: word})
        verdict = check(draw(other, num_frames=4))
        assert verdict == right(other.combination)
        assert not verdict.agrees(scene.combination)


def test_object_of_no_colour_has_none(wrong):
    scene, _ = wrong
    mask = object_mask(scene)
    verdict = check((1 - 2 * mask).expand(3, -1, -1, -1))
    assert verdict == Verdict(None, scene.shape, scene.direction, "white", steady=True)


def test_motionless_object_has_no_direction(wrong):
    scene, video = wrong
    verdict = check(video[:, :1].expand(-1, 16, -1, -1))
    assert verdict == Verdict(scene.colour, scene.shape, None, scene.background, steady=True)


def test_single_frame_has_no_direction(wrong):
    scene, video = wrong
    assert check(video[:, :1]) == Verdict(scene.colour, scene.shape, None, scene.background, steady=True)


def test_reversed_clip_moves_the_other_way(wrong):
    scene, video = wrong
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert check(video.flip(1)).direction == opposite[scene.direction]


def test_diagonal_motion_has_no_direction():
    scene = Scene("red", "circle", "right", "black", size=0.2, start_x=0.5, start_y=0.3, travel=0.3)
    video = draw(scene)
    falling = torch.stack([video[:, frame].roll(frame, dims=1) for frame in range(16)], dim=1)
    assert check(falling) == Verdict("red", "circle", None, "black", steady=True)


@pytest.mark.parametrize("frame", [0, 9, 15])
def test_object_missing_in_one_frame_is_not_steady(wrong, frame):
    scene, video = wrong
    video[:, frame] = video[:, frame, :1, :1]
    assert check(video) == Verdict(*scene.combination, steady=False)


def test_jump_is_not_steady():
    scene = Scene("red", "circle", "right", "black", size=0.2, start_x=0.3, start_y=0.3, travel=0.9)
    video = draw(scene)
    assert check(video).steady
    video[:, 8] = video[:, 8].roll(20, dims=1)
    assert check(video) == Verdict("red", "circle", "right", "black", steady=False)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_object_that_shrinks_or_grows_for_one_frame_is_not_steady(factor):
    sizes = [0.2] * 7 + [0.2 * factor] + [0.2] * 8
    frames = [
        draw(Scene("blue", "square", "right", "white", size, 0.4 + 0.03 * i, 0.5, 0), num_frames=1)
        for i, size in enumerate(sizes)
    ]
    assert check(torch.cat(frames, dim=1)) == Verdict("blue", "square", "right", "white", steady=False)


def test_second_object_is_not_steady():
    first, second = (draw(Scene("green", "circle", "right", "white", 0.17, 0.3, y, travel=0.5)) for y in (0.25, 0.75))
    assert check(first).steady
    assert not check(torch.minimum(first, second)).steady


@pytest.mark.parametrize("turn", [pytest.param(2, id="upside down"), pytest.param(3, id="left to right")])
def test_only_an_upright_triangle_is_a_triangle(turn):
    for scene in scenes(tuple(c for c in COMBINATIONS[::5] if c.shape == "triangle"), seed=10):
        expected = "triangle" if turn == 3 else None
        assert check(draw(scene, num_frames=4).flip(turn)).shape == expected, scene


def test_stretched_square_is_no_shape():
    video = F.interpolate(draw(scenes((RED_SQUARE,), seed=11)[0]), scale_factor=(1.0, 1.7))
    assert check(video).shape is None


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_blank_clip_shows_a_background_only(background):
    value = BACKGROUNDS[background][0] / 127.5 - 1
    verdict = check(noise(torch.full((3, 16, 72, 128), value), 0.05))
    assert verdict == Verdict(None, None, None, background, steady=False)


def test_coloured_background_is_none_of_the_three():
    scene = scenes((RED_SQUARE,), seed=12)[0]
    video = draw(scene)
    video[2] = 1 - (1 - video[2]) * object_mask(scene)
    assert check(video) == Verdict("red", "square", "right", None, steady=True)


@pytest.mark.parametrize("spoil", [lambda x: x, lambda x: x * torch.nan], ids=["static", "not a number"])
def test_clips_of_nothing_have_no_shape_and_no_direction(spoil):
    verdict = check(spoil(torch.rand(3, 8, 72, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1))
    assert (verdict.shape, verdict.direction) == (None, None)


@pytest.mark.parametrize("shape", [(16, 3, 72, 128), (3, 72, 128), (3, 0, 72, 128)])
def test_other_layouts_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[3, F, H, W\]"):
        check(torch.zeros(shape))


# --- verdicts


def test_verdict_agrees_only_when_every_word_matches_steadily():
    assert right(RED_SQUARE).agrees(RED_SQUARE)
    assert not Verdict(*RED_SQUARE, steady=False).agrees(RED_SQUARE)
    other = Verdict("red", "circle", None, "black", steady=True)
    assert other.matches(RED_SQUARE) == {"colour": True, "shape": False, "direction": False, "background": True}
    assert not other.agrees(RED_SQUARE)


def test_summary_gives_the_share_of_clips_right_in_each_attribute():
    verdicts = [
        right(RED_SQUARE),
        Verdict("red", "square", "left", "black", steady=True),
        Verdict("red", "circle", None, "black", steady=True),
        Verdict("red", "square", "right", "black", steady=False),
    ]
    assert summarise((RED_SQUARE, verdict) for verdict in verdicts) == {
        "colour": 1.0,
        "shape": 0.75,
        "direction": 0.5,
        "background": 1.0,
        "steady": 0.75,
        "all": 0.25,
    }


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no results"):
        summarise([])
