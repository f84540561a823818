"""What can only be seen from inside the host: see `inside.py`."""

from __future__ import annotations

from typing import Any


def test_a_partly_loaded_model_gives_the_same(inside: Any) -> None:
    found = inside("partial_load")
    assert found["waiting"] > 50
    assert found["changed"] > 1e-3
    assert found["error"] <= 1e-5
    assert found["restored"] == 0


def test_weights_of_fewer_bits_stay_close(inside: Any) -> None:
    found = inside("weight_types")
    assert found["float16"] <= 1e-3
    assert found["bfloat16"] <= 2e-2
    assert found["float8_e4m3fn"] <= 2e-1


def test_attention_patches_see_every_place_and_every_frame(inside: Any) -> None:
    found = inside("attention_patches")
    assert found["error"] <= 1e-5
    assert found["changed"] > 1e-3
    assert found["rows"] == {name: [8] for name in ("attn1", "attn1_output", "attn2", "attn2_output")}
    blocks = [("input", i) for i in (1, 3, 5)] + [("middle", 0)] + [("output", i) for i in range(6)]
    assert found["places"] == [[*block, 0] for block in blocks]
    assert {"n_heads", "dim_head", "attn_precision", "original_shape", "block"} <= set(found["keys"])


def test_a_compiled_model_is_whole_and_gives_the_same(inside: Any) -> None:
    found = inside("compiled")
    # One graph asks whether all frames have the same prompt, the other is the network.
    assert found["graphs"] == 2
    assert max(found["errors"]) <= 1e-6


def test_the_hosts_text_encoder_is_the_cores(inside: Any) -> None:
    assert max(inside("text_encoder")["errors"]) <= 1e-5


def test_a_controlnet_of_the_same_family_acts(inside: Any) -> None:
    found = inside("controlnet")
    assert found["off"] <= 1e-6
    assert found["on"] > 1e-3
    assert found["one hint"] <= 1e-6
    assert found["other hints"] > 1e-4
    assert found["in windows"] <= 1e-5
    assert found["by halves"] > 1e-4
    assert found["last hint, first chunk"] == 0
    assert found["last hint, second chunk"] > 1e-4


def test_long_clips_are_upscaled_in_the_memory_of_short_ones(inside: Any) -> None:
    found = inside("upscale_memory")
    # The frames alone are 94 MiB; the rest is for what the allocator keeps.
    assert found["rise"] <= found["output"] + 16


def test_the_host_samples_about_as_fast_as_the_core(inside: Any) -> None:
    # The project's bar is 1.05 on an idle machine; tests run on busy ones.
    assert inside("sampling_speed")["ratio"] <= 1.25


def test_a_missing_library_costs_only_the_nodes_that_need_it(inside: Any) -> None:
    found = inside("missing_library")
    assert "VideoFactoryLoader" in found["nodes"]
    assert "VideoFactoryExtendVideo" in found["nodes"]
    assert not {"VideoFactorySampler", "VideoFactoryLongSampler"} & {*found["nodes"]}
    lines = [line for line in found["said"] if line.startswith("VideoFactory")]
    for room, line in zip(("sample", "long"), lines, strict=True):
        assert f"the nodes of {room} are missing" in line
        assert "latent_preview" in line
