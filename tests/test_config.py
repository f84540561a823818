"""Presets, and configurations that come from untrusted metadata."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videofactory_core.config import PRESETS, ModelConfig, from_json, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name: str) -> None:
    assert from_json(to_json(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "model_channels", 10**12),
        ("unet", "model_channels", -320),
        ("unet", "model_channels", "320"),
        ("unet", "model_channels", True),
        ("unet", "model_channels", 319),
        ("unet", "norm_groups", 0),
        ("unet", "channel_mult", []),
        ("unet", "channel_mult", [1] * 1000),
        ("unet", "swap_window", [8, 3]),
        ("unet", "merge", "exec"),
        ("unet", "secret", 1),
        ("autoencoder", "scale_factor", 0.0),
        ("autoencoder", "scale_factor", None),
        ("text", "width", 512),
        ("text", "heads", 7),
        ("text", "max_tokens", 2),
        ("text", "vocab_size", 49407),
        ("text", "skip_last_layers", 24),
        ("diffusion", "beta_start", 0.5),
        ("diffusion", "prediction_type", 3),
    ],
)
def test_settings_that_do_not_fit_are_refused(part: str, key: str, value: object) -> None:
    data = asdict(PRESETS["sd21"])
    data[part][key] = value
    with pytest.raises(ValueError, match=r"\w"):
        from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["frames", "width", "height", "fps"])
def test_trained_size_is_positive(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        from_json(json.dumps({**asdict(PRESETS["demo"]), key: 0}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["unet", "text", "fps"]), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_is_a_configuration_or_a_value_error(data: object) -> None:
    try:
        config = from_json(json.dumps(data))
    except ValueError:
        return
    assert isinstance(config, ModelConfig)


def test_nested_brackets_do_not_exhaust_the_stack() -> None:
    with pytest.raises(ValueError, match="JSON"):
        from_json("[" * 100_000)
