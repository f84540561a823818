"""Prompts that change over the frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videofactory_core import checkpoint
from videofactory_core.long import generate_long
from videofactory_core.pipeline import context_of, encode_prompts, generate
from videofactory_core.prompts import PromptSchedule, build, parse

RED, BLUE = "a red circle", "a blue circle"


def test_key_frames_are_read_in_rising_order() -> None:
    assert parse('"8": "a dog", "0": "a cat",') == {0: "a cat", 8: "a dog"}
    assert parse('{\n"0": "a \\"cat\\""\n"8": "line\nbreak"\n}') == {0: 'a "cat"', 8: "line\nbreak"}


@pytest.mark.parametrize("text", ["", "a cat", "0: a cat", '"zero": "a cat"', "{a cat}", "8 cats: two dogs"])
def test_plain_text_stays_plain(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"0": "a", "8": b', "breaks off at '\"8\": b': write"),
        ('"0": a cat', "breaks off at"),
        (r'"0": "a\q"', "has a stray backslash"),
        ('"0": "a", "1000000": "b"', "names frame 1000000: use frames up to 100000"),
    ],
)
def test_what_begins_like_a_schedule_and_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).map(sorted))
def test_straight_lines_lead_from_key_frame_to_key_frame(keys: list[int]) -> None:
    values = [float(key**2) for key in keys]
    schedule = PromptSchedule(tuple(keys), torch.tensor(values)[:, None, None])
    for frame, value in enumerate(schedule.spread(45).flatten().tolist()):
        before = max((key for key in keys if key <= frame), default=keys[0])
        after = min((key for key in keys if key >= frame), default=keys[-1])
        share = (frame - before) / (after - before) if after > before else 0.0
        assert value == pytest.approx(before**2 + share * (after**2 - before**2), rel=1e-5)
    assert torch.equal(schedule.part([3, 7, 20]).spread(3), schedule.at([3, 7, 20]))


def test_shorter_prompts_are_repeated() -> None:
    schedule = build({0: torch.zeros(1, 2, 1), 4: torch.ones(1, 5, 1)})
    assert schedule.frames == (0, 4)
    assert schedule.features.shape == (2, 5, 1)


def test_a_schedule_of_one_prompt_is_that_prompt(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    plain = generate(model, RED, steps=2)
    assert torch.equal(generate(model, f'"0": "{RED}"', steps=2), plain)
    torch.testing.assert_close(generate(model, f'"0": "{RED}", "3": "{RED}"', steps=2), plain)


def test_either_prompt_may_change(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    changing = f'"0": "{RED}", "2": "{BLUE}"'
    red, blue = (context_of(encode_prompts(model, text, "", 2.0), range(4)) for text in (RED, BLUE))
    context = context_of(encode_prompts(model, changing, "", 2.0), range(4))
    assert context.shape == (2, 4, *red.shape[1:])
    torch.testing.assert_close(context[0, [0, 2, 3]], torch.stack([red[0], blue[0], blue[0]]))
    torch.testing.assert_close(context[0, 1], (red[0] + blue[0]) / 2)
    torch.testing.assert_close(context[1], red[1].expand_as(context[1]))
    opposite = context_of(encode_prompts(model, RED, changing, 2.0), range(4))
    torch.testing.assert_close(opposite[1], context[0])


def test_every_chunk_gets_the_prompts_of_its_frames(debug_checkpoint: Path) -> None:
    loaded = checkpoint.load(debug_checkpoint)
    model = replace(loaded, config=replace(loaded.config, given_frames=True))

    def long(prompt: str) -> torch.Tensor:
        return torch.cat([*generate_long(model, prompt, num_frames=10, chunk=4, overlap=1, steps=2)])

    plain, changing = long(RED), long(f'"0": "{RED}", "6": "{RED}", "7": "{BLUE}"')
    torch.testing.assert_close(changing[:7], plain[:7])
    # The chunk behind them is made for the other prompt, from the same noise.
    assert (changing[7:] - plain[7:]).abs().amax((1, 2, 3)).min() > 1e-3
