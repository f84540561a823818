"""Given frames and long clips inside the host's own Python (see `inside_frames.py`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfy_server import HOW_TO_GET_A_HOST, host_folders, interpreter

from videofactory_core.checkpoint import DEMO


@pytest.fixture(scope="module", params=[*enumerate(host_folders())] or [None], ids=lambda p: p and p[1].name)
def found(request: pytest.FixtureRequest) -> Any:
    """What the checks found."""
    if request.param is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    number, folder = request.param
    command = [interpreter(number, folder), str(Path(__file__).parent / "inside_frames.py"), str(folder), str(DEMO)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["told", "untold", "epsilon"])
def test_a_noise_mask_gives_frames_as_the_core_does(found: Any, kind: str) -> None:
    """Clean where the model knows given frames, noised where it does not; for velocity and for noise."""
    seen = found["as_in_the_core"][kind]
    assert seen["error"] <= 1e-4
    assert seen["the other way"] > 1e-2
    assert seen["native"] <= 1e-6
    assert seen["given"]


@pytest.mark.parametrize("case", ["told, 2.0", "told, 1.0", "epsilon, 2.0"])
def test_guidance_over_given_frames_is_the_cores(found: Any, case: str) -> None:
    seen = found["guided_frames"][case]
    assert seen["error"] <= 1e-4
    assert seen["without"] > 1e-2
    assert seen["native"] <= 1e-6
    assert seen["nothing given"]


def test_guidance_over_given_frames_of_one_is_none_and_windows_have_their_own(found: Any) -> None:
    assert found["guided_frames"]["one"]
    assert found["guided_frames"]["windows"] <= 1e-5


def test_latents_with_a_dimension_for_time_are_given_frames_too(found: Any) -> None:
    seen = found["as_in_the_core"]
    assert seen["five"] <= 1e-6
    assert seen["five, given"]


def test_a_mask_inside_a_frame_means_what_it_always_means(found: Any) -> None:
    seen = found["masks_inside_frames"]
    assert seen["partly"] == 0
    assert seen["beside it"] > 1e-3
    assert seen["given"]
    assert seen["kept"] <= 1e-6
    assert seen["not kept"] > 0.1


def test_context_windows_know_the_given_frames_inside_them(found: Any) -> None:
    assert found["windows"]["error"] <= 1e-5
    assert found["windows"]["without"] > 1e-2


def test_the_hosts_context_windows_know_them_too_or_it_is_said(found: Any) -> None:
    """For latents with a dimension for time; old hosts do not cut conditions for them."""
    seen = found["windows"]["of the host"]
    if isinstance(seen, str):
        assert "do not cut given frames: use Empty VideoFactory Latent with VideoFactory Context Windows" in seen
    else:
        assert seen <= 1e-5


def test_one_chunk_is_what_the_sampler_makes(found: Any) -> None:
    seen = found["chunked"]
    names = [f"one chunk, {name}, {how}" for name in ("plain", "given") for how in ("euler", "euler_ancestral")]
    for name in (*names, "one chunk, free noise", "untold", "all given", "usual"):
        assert seen[name], name


def test_chunks_go_on_from_one_another(found: Any) -> None:
    seen = found["chunked"]
    assert seen["the plan"] == [[0, 16], [12, 28]]
    assert seen["by hand"] <= 1e-6
    assert seen["the chunk before matters"] > 1e-2
    assert seen["given"] == [True, True]
    assert seen["backward"]


def test_long_clips_in_a_batch_and_in_a_dimension_of_their_own(found: Any) -> None:
    seen = found["chunked"]
    assert seen["two clips"] <= 1e-6
    assert seen["and the second is another"] > 1e-2
    assert seen["five"] == [1, 4, 28, 9, 16]
    assert seen["five, given"]


def test_anchors_and_colours_act_on_later_chunks(found: Any) -> None:
    seen = found["chunked"]
    assert seen["anchors"][0] == 0
    assert seen["anchors"][1] > 1e-3
    first, matched, plain = seen["colours"]
    assert first == 0
    assert matched <= 1e-5
    assert plain > 1e-3


def test_prompts_of_frames_go_on_across_chunks(found: Any) -> None:
    seen = found["schedules"]
    assert seen["before it changes"] <= 1e-6
    assert seen["where it changes"] > 1e-2
    assert seen["one chunk"]
    assert seen["rows"] <= 1e-6
    assert seen["part"] == pytest.approx([0, 0.4, 0.5, 1])


def test_one_bar_for_all_chunks_and_a_stop_inside_any(found: Any) -> None:
    seen = found["progress"]
    assert seen["whole"] == [[step, 8] for step in range(1, 9)]
    assert seen["ended"] == "interrupted"
    assert seen["steps"] == 5


REFUSED = {
    "overlap": "chunks of 8 frames cannot overlap by 8: use fewer than 8",
    "positions": "a chunk with its anchors has 34; make chunks shorter, or show fewer anchors",
    "clips": "20 latent frames do not divide into clips of 16",
    "short": "the clip has 3 frames and 4 of it are to be shown: set context to 3 or less",
    "short second": "the second clip has 3 frames and 4 of it are to be shown: set context to 3 or less",
    "one frame": "give at least 2",
    "size": "width and height must be multiples of 8, not 20 x 16: try 16 x 16",
    "tiny": "these frames are 24x4 and the model needs 8x8 or more: scale them",
    "other vae": "this VAE belongs to another family of models: connect the VAE of Load VideoFactory",
    "join length": "these are 5 frames, and the latent between the clips has 4",
    "frame guidance": "this model knows no given frames: train it with train/recipes/image-to-video-16gb.toml",
    "join size": "these frames are 48x32 and the clips 24x16",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(found: Any, case: str) -> None:
    assert REFUSED[case] in found["refusals"][case]


GIVEN = {
    "image": (5, [0]),
    "first and last": (6, [0, 5]),
    "forward": (5, [0, 1]),
    "backward": (5, [3, 4]),
    "in-between": (16, [0, 3, 6, 9, 12, 15]),
    "transition": (7, [0, 1, 5, 6]),
    "cut": (5, [0, 1]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_nodes_give_frames_and_leave_room(found: Any, case: str) -> None:
    seen = found["conditions"][case]
    count, given = GIVEN[case]
    assert seen["shape"] == [count, 4, 2, 3]
    assert seen["frames"] == count
    assert seen["given"] == given
    assert seen["all"]
    assert seen["empty"]
    assert seen["error"] <= 1e-5
    assert seen["said"] == ("Of the clip, 25x18 was cut to 24x16." if case == "cut" else "")


def test_nodes_say_what_was_fitted_and_what_the_model_never_learned(found: Any) -> None:
    seen = found["conditions"]
    assert seen["info, fitted"] == (
        "Of the picture, the first of 2 was taken; what is transparent became black;"
        " 20x20 was set between black bars to the shape of 24x16."
    )
    assert seen["info, second clip"] == "Of the second clip, 48x20 was pulled to the shape of 24x16."
    size, long, untrained = seen["info, untold"].splitlines()
    assert seen["info, told"].splitlines() == [size, long]
    assert size.endswith("40 frames of 24 x 16 may look worse.")
    assert "VideoFactory Long Sampler" in long
    assert "recipes/image-to-video-16gb.toml" in untrained


def test_what_is_joined_has_every_frame_once(found: Any) -> None:
    assert found["conditions"]["joined"] == [True, True, True, True]
    assert found["conditions"]["cut, the rest"]
