"""Clips of any length from chunks, and what lies between and around given frames."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videofactory_core import checkpoint
from videofactory_core.checkpoint import Model
from videofactory_core.long import chunks, generate_long, match, usual_chunk, usual_overlap
from videofactory_core.pipeline import decode_latents, encode_frames, generate, latent_shape, usual_guidance

PROMPT = "a red circle"


@pytest.fixture
def model(debug_checkpoint: Path) -> Model:
    """The debug model, whose clips have 4 frames, as if it knew given frames."""
    loaded = checkpoint.load(debug_checkpoint)
    return replace(loaded, config=replace(loaded.config, given_frames=True))


def drawn(count: int) -> Tensor:
    return torch.rand(count, 8, 16, 3, generator=torch.Generator().manual_seed(3))


def long(model: Model, **settings) -> Tensor:
    return torch.cat([*generate_long(model, PROMPT, **{"steps": 2, **settings})])


@settings(deadline=None)
@given(st.data())
def test_chunks_make_every_frame_once_and_know_what_is_done(data: st.DataObject) -> None:
    num_frames = data.draw(st.integers(1, 80))
    length = data.draw(st.integers(2, 20))
    overlap = data.draw(st.integers(1, length - 1))
    known = set(data.draw(st.sets(st.integers(0, num_frames - 1))))
    done = set(known)
    made: set[int] = set()
    for chunk in chunks(num_frames, length, overlap, known):
        assert 0 <= chunk.start <= chunk.first < chunk.last <= chunk.end <= num_frames
        assert chunk.end - chunk.start == min(length, num_frames)
        new = set(range(chunk.first, chunk.last)) - known
        assert new
        assert not new & made
        # Those before it are done, or where it goes backward those behind it.
        before, behind = range(max(0, chunk.first - overlap), chunk.first), range(chunk.last, num_frames)[:overlap]
        assert any(done.issuperset(side) and set(side) <= {*range(chunk.start, chunk.end)} for side in (before, behind))
        made |= new
        done |= new
    assert done == set(range(num_frames))


def test_in_betweens_end_at_a_given_frame() -> None:
    assert [(chunk.first, chunk.last) for chunk in chunks(61, 16, 4, range(0, 61, 4))] == [
        (1, 13),
        (13, 25),
        (25, 37),
        (37, 49),
        (49, 61),
    ]


def test_frames_given_at_the_end_alone_are_led_up_to() -> None:
    assert [(chunk.first, chunk.last) for chunk in chunks(40, 16, 4, range(36, 40))] == [(24, 36), (12, 24), (0, 12)]


def test_chunks_that_would_add_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot overlap by 4"):
        list(chunks(20, 4, 4))
    with pytest.raises(ValueError, match="use 2 or more"):
        list(chunks(20, 1, 1))


def test_chunks_are_usually_as_long_as_the_model_learned_and_leave_room_for_anchors(model: Model) -> None:
    longer = replace(model.config, chunk_frames=8)
    assert [usual_chunk(config) for config in (model.config, longer)] == [4, 8]
    assert [usual_overlap(length) for length in (3, 4, 5, 16, 24, 32)] == [2, 3, 4, 4, 6, 8]
    short = replace(longer, unet=replace(longer.unet, temporal_positions=8))
    assert [usual_chunk(short, anchors) for anchors in (0, 2, 6)] == [8, 6, 4]
    made = long(replace(model, config=longer), num_frames=12)
    assert torch.equal(made, long(model, num_frames=12, chunk=8, overlap=4))
    with pytest.raises(ValueError, match="chunk_frames 3 are fewer than the 4 frames of a clip"):
        replace(model.config, chunk_frames=3)


def test_one_chunk_is_what_the_pipeline_makes(model: Model) -> None:
    frames = {0: drawn(1)[0], 3: drawn(2)[1]}
    for known in ({}, frames):
        assert torch.equal(long(model, num_frames=4, given=known), generate(model, PROMPT, steps=2, given=known))


@pytest.mark.parametrize("settings", [{}, {"anchors": 1, "match_colours": True, "frame_guidance_scale": 2.0}])
@pytest.mark.parametrize(
    ("num_frames", "where"), [(11, ()), (9, (0, 1)), (9, (7, 8)), (9, (0, 8)), (9, range(0, 9, 2)), (2, (1,))]
)
def test_given_frames_come_back_as_the_autoencoder_has_them(model: Model, num_frames, where, settings) -> None:
    known = dict(zip(where, drawn(len(where)), strict=True))
    made = long(model, num_frames=num_frames, given=known, overlap=2, **settings)
    assert made.shape == (num_frames, 8, 16, 3)
    assert made.isfinite().all()
    for index, frame in known.items():
        assert torch.allclose(made[index], decode_latents(model, encode_frames(model, frame[None]))[0], atol=1e-6)


def test_pieces_come_one_by_one_in_order(model: Model) -> None:
    pieces = list(generate_long(model, PROMPT, num_frames=10, overlap=2, steps=2))
    assert [len(piece) for piece in pieces] == [4, 2, 2, 2]
    again = generate_long(model, PROMPT, num_frames=4, overlap=2, steps=2)
    assert torch.equal(next(again), pieces[0])


def test_anchors_are_frames_given_before_the_first_chunk_too(model: Model) -> None:
    frames = drawn(7)
    known = dict(enumerate(frames))
    other = known | {0: frames[1]}
    for anchors in (0, 1):
        one, two = (long(model, num_frames=9, overlap=2, given=given, anchors=anchors)[7:] for given in (known, other))
        assert torch.equal(one, two) == (anchors == 0)


def test_a_chunk_follows_what_it_knows(model: Model) -> None:
    frames = drawn(2)
    known = {0: frames[0], 1: frames[1]}
    other = {0: frames[0], 1: frames[0]}
    one, two = (long(model, num_frames=8, overlap=2, given=frames)[2:] for frames in (known, other))
    assert not torch.equal(one, two)


def test_guidance_over_frames_changes_what_is_made_and_one_does_not(model: Model) -> None:
    known = {0: drawn(1)[0]}
    for guidance_scale in (1.0, 3.0):
        plain, one, two = (
            generate(model, PROMPT, steps=2, guidance_scale=guidance_scale, given=known, **settings)
            for settings in ({}, {"frame_guidance_scale": 1.0}, {"frame_guidance_scale": 2.0})
        )
        assert torch.equal(plain, one)
        assert not torch.equal(plain, two)


def test_frames_guide_where_they_show_the_motion(model: Model) -> None:
    untold = replace(model, config=replace(model.config, given_frames=False))
    for known, scales, changed in ((1, (2.0, 1.0), (2.0, 1.0)), (2, (2.0, 1.0), (1.0, 2.0))):
        frames = dict(enumerate(drawn(known)))
        for asked, (scale, frame_scale) in ((untold, scales), (model, changed)):
            made = generate(asked, PROMPT, steps=2, given=frames)
            named = {"guidance_scale": scale, "frame_guidance_scale": frame_scale}
            assert torch.equal(made, generate(asked, PROMPT, steps=2, given=frames, **named))
            assert torch.equal(made, long(asked, num_frames=4, given=frames))
    assert usual_guidance(model.config, 2, 5.0) == (5.0, 2.0)
    assert usual_guidance(model.config, 2, None, 1.0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({4: drawn(1)[0]}, "frame 4 is given and the clip has frames 0 to 3"),
        ({0: torch.zeros(9, 16, 3)}, "is 16x9 and the clip 16x8; scale it first"),
        ({0: torch.zeros(16, 3)}, r"is \[16, 3\]"),
        (dict(enumerate(drawn(4))), "all 4 frames are given"),
    ],
)
def test_frames_that_do_not_belong_are_refused(model: Model, known: dict[int, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, given=known)
    with pytest.raises(ValueError, match=message):
        next(generate_long(model, PROMPT, num_frames=4, given=known))


def test_a_model_that_never_learned_it_works_with_a_warning(debug_checkpoint: Path) -> None:
    untrained = checkpoint.load(debug_checkpoint)
    with pytest.warns(UserWarning, match="image-to-video-16gb"):
        made = generate(untrained, PROMPT, steps=2, given={0: drawn(1)[0]})
    assert made.isfinite().all()
    with pytest.warns(UserWarning, match="image-to-video-16gb"):
        long(untrained, num_frames=8, overlap=2)


@pytest.mark.parametrize("where", [(), (58, 59)], ids=["forward", "backward"])
def test_memory_does_not_grow_with_the_length(model: Model, where, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a chunk's latents are kept of frames that were made, and no frames but those of a chunk."""
    from videofactory_core import long as module

    latents, frames = [], []
    denoise, decode = module.denoise, module.decode_latents
    one = latent_shape(model.config, 1, 16, 8)

    def watched(*arguments, **settings):
        held = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (1, *one)]
        latents.append(len(held))
        return denoise(*arguments, **settings)

    def counted(model, part):
        frames.append(part.shape[2])
        return decode(model, part)

    monkeypatch.setattr(module, "denoise", watched)
    monkeypatch.setattr(module, "decode_latents", counted)
    known = dict(zip(where, drawn(len(where)), strict=True))
    pieces = generate_long(model, PROMPT, num_frames=60, overlap=2, steps=1, given=known)
    assert len(next(pieces)) <= 4
    # Backward too, nothing is decoded before its turn.
    assert len(frames) == 1
    assert sum(len(piece) for piece in pieces) == sum(frames) - frames[0]
    assert max(frames) <= 4
    assert max(latents[3:]) <= 8


def test_many_given_frames_are_decoded_a_chunk_at_a_time(model: Model) -> None:
    known = dict(enumerate(drawn(11)))
    pieces = [*generate_long(model, PROMPT, num_frames=13, overlap=2, steps=1, given=known)]
    assert sum(map(len, pieces)) == 13
    assert max(map(len, pieces)) == 4


def test_colours_are_matched_behind_the_first_chunk(model: Model) -> None:
    plain, matched = (long(model, num_frames=8, overlap=2, match_colours=match) for match in (False, True))
    assert torch.equal(plain[:4], matched[:4])
    assert not torch.equal(plain[4:6], matched[4:6])
    like, other = torch.randn(1, 4, 5, 6, 7) * 3 + 2, torch.randn(1, 4, 2, 6, 7)
    found = match(other, like)
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(found, dim=(2, 3, 4)), statistic(like, dim=(2, 3, 4)), atol=1e-5)


def test_frames_may_be_denoised_one_behind_the_other(model: Model) -> None:
    for make in (lambda **how: generate(model, PROMPT, steps=3, **how), lambda **how: long(model, num_frames=4, **how)):
        assert not torch.equal(make(), make(stagger=1.0))


def test_guidance_over_frames_hides_them_behind_pure_noise(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    forward = model.unet.forward

    def watched(x, timesteps, context):
        asked.append((x.clone(), timesteps.clone(), context))
        return forward(x, timesteps, context)

    monkeypatch.setattr(model.unet, "forward", watched)
    for guidance_scale in (3.0, 1.0):
        asked.clear()
        scales = {"guidance_scale": guidance_scale, "frame_guidance_scale": 2.0}
        generate(model, PROMPT, steps=2, given={0: drawn(1)[0]}, **scales)
        for x, timesteps, context in asked:
            rows = 3 if guidance_scale > 1 else 2
            assert len(x) == rows
            # The prompt has gone before the frame does, or stays where it is all that guides.
            assert torch.equal(context[-1], context[-2])
            assert torch.equal(context[0], context[1]) == (rows == 2)
            assert timesteps[:, 0].tolist() == [0] * (rows - 1) + [999]
            assert (timesteps[:, 1:] == timesteps[0, 1]).all()
            assert torch.equal(x[-1, :, 0], asked[0][0][-1, :, 0])
            assert not torch.equal(x[-1, :, 0], x[0, :, 0])
            assert (x[:, :, 1:] == x[:1, :, 1:]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0, "anchors": 1}, "needs at least 1 frame, not 0"),
        ({"num_frames": 8, "anchors": -3}, "-3 anchors cannot be shown"),
        ({"num_frames": 40, "anchors": 29}, "32 frame positions, and a chunk with its anchors has 33"),
        ({"num_frames": 8, "frame_guidance_scale": float("nan")}, "frame guidance scale nan is below 1"),
        ({"num_frames": 8, "stagger": -1.0}, "stagger is -1"),
    ],
)
def test_what_cannot_be_made_is_refused(model: Model, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long(model, **settings)
