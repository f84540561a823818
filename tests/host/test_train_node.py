"""VideoFactory Train LoRA: on the real server, and inside the host's own Python (see `inside_train.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import HOW_TO_GET_A_HOST, Failed, Host, host_folders, interpreter
from graphs import Graph, clip_latent, node, saved
from safetensors.torch import load_file
from torch import Tensor
from videofactory_train.data.moving_shapes import Combination, object_mask, random_scene

from videofactory_core.video import write_video

# A look that the demo has never seen.
CAPTION = "a black circle moving right on a yellow background"
STEPS, FRAMES = 24, 8


def clip_of(host: Host) -> str:
    """A video of what the caption says, where the host looks for it."""
    scene = random_scene(Combination("red", "circle", "right", "black"), torch.Generator().manual_seed(3))
    black, yellow = torch.tensor([0.05, 0.1, 0.1]), torch.tensor([0.9, 0.8, 0.1])
    frames = torch.lerp(yellow, black, object_mask(scene, FRAMES)[..., None])
    write_video(host.base / "input" / "clip.mp4", frames, fps=8)
    return "clip.mp4"


def sampled(graph: Graph, name: str, model: list[object]) -> Graph:
    """The graph with another sampler, for this model."""
    return {**graph, name: node("VideoFactorySampler", **{**graph["sample"]["inputs"], "model": model})}


def plain() -> Graph:
    return clip_latent(CAPTION, frames=FRAMES, steps=6)


def training(host: Host, **changes: object) -> Graph:
    """Load, read a video, train; the LoRA is output 1 of "train"."""
    graph = plain()
    del graph["sample"]
    settings = {
        "captions": CAPTION,
        "steps": STEPS,
        "learning_rate": 3e-3,
        "rank": 8,
        "layers": "motion and look",
        "batch_size": 1,
        "length": 0,
        "seed": 0,
        "training_dtype": "fp32",
        "gradient_checkpointing": False,
    }
    return {
        **graph,
        "file": node("LoadVideo", file=clip_of(host)),
        "clip": node("GetVideoComponents", video=["file", 0]),
        "train": node(
            "VideoFactoryTrainLoRA",
            **{
                "model": ["load", 0],
                "clip": ["load", 1],
                "vae": ["load", 2],
                "frames": ["clip", 0],
                **settings,
                **changes,
            },
        ),
    }


def text(outputs: dict[str, Any], name: str) -> Any:
    return json.loads(outputs[name]["text"][0])


def latent(host: Host, outputs: dict[str, Any], name: str) -> Tensor:
    return load_file(host.files({name: outputs[f"save {name}"]})[0])["latent_tensor"]


def base_sample(host: Host) -> Tensor:
    return latent(host, host.run(saved(plain(), "sample")), "sample")


@dataclass(frozen=True)
class Trained:
    """What came of one training, and of the model before it."""

    losses: list[float]
    steps: int
    plot: Path
    lora: Path
    target: Tensor
    before: Tensor
    # By the node's own MODEL, and by the host's Load LoRA Model at strength 1 and at 0.
    after: Tensor
    loaded: Tensor
    off: Tensor
    log: str


@pytest.fixture(scope="module")
def trained(host: Host) -> Trained:
    before = base_sample(host)
    told = len(host.log.read_text(errors="replace"))
    graph = {
        **plain(),
        **training(host),
        "encode": node("VideoFactoryEncode", frames=["clip", 0], vae=["load", 2], frames_per_chunk=0),
        "keep": node("SaveLoRANode", lora=["train", 1], prefix="loras/trained", steps=["train", 3]),
        "plot": node("LossGraphNode", loss=["train", 2], filename_prefix="loss"),
        "losses": node("PreviewAny", source=["train", 2]),
        "steps": node("PreviewAny", source=["train", 3]),
        "on": node("LoraModelLoader", model=["load", 0], lora=["train", 1], strength_model=1.0),
        "off": node("LoraModelLoader", model=["load", 0], lora=["train", 1], strength_model=0.0),
    }
    if "SaveLoRA" in host.get("object_info"):
        # The host's name for it since it is a node of the third version.
        graph["keep"]["class_type"] = "SaveLoRA"
    for name, model in (("after", "train"), ("loaded", "on"), ("without", "off")):
        graph = sampled(graph, name, [model, 0])
    del graph["sample"]
    outputs = host.run(saved(graph, "after", "loaded", "without", "encode"))
    return Trained(
        losses=text(outputs, "losses")["loss"],
        steps=text(outputs, "steps"),
        plot=host.files({"plot": outputs["plot"]})[0],
        lora=next((host.base / "output" / "loras").glob("trained*.safetensors")),
        target=latent(host, outputs, "encode"),
        before=before,
        after=latent(host, outputs, "after"),
        loaded=latent(host, outputs, "loaded"),
        off=latent(host, outputs, "without"),
        log=host.log.read_text(errors="replace")[told:],
    )


def test_the_loss_falls(trained: Trained) -> None:
    assert len(trained.losses) == trained.steps == STEPS
    quarter = STEPS // 4
    assert sum(trained.losses[-quarter:]) < 0.7 * sum(trained.losses[:quarter])


def test_the_sample_comes_nearer_to_the_clip(trained: Trained) -> None:
    before, after = ((found - trained.target).norm() for found in (trained.before, trained.after))
    assert after < 0.8 * before


def test_the_host_plots_the_loss(trained: Trained) -> None:
    assert trained.plot.stat().st_size > 1000


def test_the_model_that_was_given_stays_as_it_is(host: Host, trained: Trained) -> None:
    assert torch.equal(trained.off, trained.before)
    assert torch.equal(base_sample(host), trained.before)


def test_the_hosts_own_nodes_take_the_lora(host: Host, trained: Trained) -> None:
    """In memory, and from the file that Save LoRA Weights wrote where Load LoRA finds it."""
    assert f"_{STEPS}_steps_" in trained.lora.name
    assert torch.equal(trained.loaded, trained.after)
    told = len(host.log.read_text(errors="replace"))
    graph = plain()
    graph["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name=trained.lora.name, strength_model=1.0)
    graph["sample"]["inputs"]["model"] = ["lora", 0]
    from_file = latent(host, host.run(saved(graph, "sample")), "sample")
    assert torch.equal(from_file, trained.after)
    for log in (trained.log, host.log.read_text(errors="replace")[told:]):
        assert "not loaded" not in log.lower()


def test_an_interrupt_leaves_the_model_as_it_was(host: Host, trained: Trained) -> None:
    told = len(host.log.read_text(errors="replace"))
    prompt = host.queue({**training(host, steps=5000), "show": node("PreviewAny", source=["train", 3])})
    for _ in range(300):
        # The network is loaded when the clip is encoded and the first step is next.
        if "load HostModel" in host.log.read_text(errors="replace")[told:]:
            break
        time.sleep(0.1)
    time.sleep(1.5)
    host.post("interrupt", {})
    with pytest.raises(Failed, match="interrupted"):
        host.wait(prompt, 60)
    assert torch.equal(base_sample(host), trained.before)


def test_lists_of_clips_need_as_many_captions(host: Host) -> None:
    graph = training(host, steps=1, frames=["clips", 0], captions="one\ntwo\nthree")
    graph["clips"] = node("RebatchImages", images=["clip", 0], batch_size=FRAMES // 2)
    graph["show"] = node("PreviewAny", source=["train", 3])
    with pytest.raises(Failed, match=r"not as many captions \(3\) as clips \(2\)"):
        host.run(graph)
    graph["train"]["inputs"]["captions"] = "one\ntwo"
    assert text(host.run(graph), "show") == 1


def test_a_rank_of_nothing_is_refused(host: Host) -> None:
    graph = {**training(host, rank=0), "show": node("PreviewAny", source=["train", 3])}
    with pytest.raises(Failed, match="smaller than min"):
        host.run(graph)


@pytest.fixture(scope="module", params=[*enumerate(host_folders())] or [None], ids=lambda p: p and p[1].name)
def inside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of `inside_train.py`."""
    if request.param is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    number, folder = request.param
    script = Path(__file__).parent / "inside_train.py"
    command = [interpreter(number, folder), str(script), str(folder), str(tmp_path_factory.mktemp("inside"))]
    # Small sizes: threads would wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report


def test_a_seed_gives_the_same_lora(inside: dict[str, Any]) -> None:
    found = inside["ways"]
    assert found["repeatable"]
    assert found["seed counts"]
    assert found["dtypes"] == ["torch.float16"]
    assert found["finite"]
    assert found["moved"]


def test_saving_memory_does_not_change_the_losses(inside: dict[str, Any]) -> None:
    found = inside["ways"]
    assert found["checkpointed"] == pytest.approx(found["losses"], rel=1e-4)
    assert found["bf16"] == pytest.approx(found["losses"], rel=1e-2)


def test_layers_are_chosen_in_words(inside: dict[str, Any]) -> None:
    found = inside["layers"]
    time, merge, look = found["motion and look"]
    assert min(time, merge, look) > 0
    assert found["motion"] == [time, merge, 0]
    assert found["look"] == [0, 0, look]


def test_models_stored_in_fewer_bits_or_partly_loaded_are_trained(inside: dict[str, Any]) -> None:
    found, losses = inside["weight_types"], inside["ways"]["losses"]
    assert found["partly loaded"] == pytest.approx(losses, rel=1e-4)
    assert min(found["waiting"]) > 50
    for dtype, near in (("float16", 1e-2), ("bfloat16", 1e-2), ("float8_e4m3fn", 5e-2)):
        assert found[dtype] == pytest.approx(losses, rel=near)


def test_an_interrupt_or_a_failure_puts_everything_back(inside: dict[str, Any]) -> None:
    found = inside["interrupted"]
    assert found["said"] == ["1/1000", "2/1000", "3/1000", "interrupted"]
    assert found["refused"] == "the loss became nan at step 1: lower learning_rate, or train in fp32"
    for name in ("same weights", "same state", "same random numbers", "same result"):
        assert found[name], name


def test_clips_may_differ_and_all_get_their_turn(inside: dict[str, Any]) -> None:
    found = inside["several"]
    assert found["finite"]
    assert found["lines are a list"]
    assert found["stacked clips are a list"]
    turns = [place for step in found["places"] for place in step]
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_a_model_with_a_lora_is_trained_on_top_of_it(inside: dict[str, Any]) -> None:
    found = inside["on_top"]
    assert found["first"] > 1e-2
    assert 0 < found["second"] < found["first"]
    assert found["loss"] > 1e-4
    assert found["restored"] == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rank", "a LoRA of rank 0 changes nothing: set rank to 1 or more"),
        ("model", "this model is not a VideoFactory model: connect Load VideoFactory, or use Train LoRA"),
        ("clip", "the model reads 16: connect the CLIP of Load VideoFactory"),
        ("vae", "this VAE belongs to another family of models: connect the VAE of Load VideoFactory"),
        ("no clips", "there are no clips to learn from: connect the frames of at least 1"),
        ("no frames", "clip 2 has 0 frames: give at least 1"),
        ("captions", "there are not as many captions (3) as clips (2): write one line for each clip, or one for all"),
        ("small", "clip 1 has pictures of 48 x 7: make them at least 8 pixels wide and high"),
        ("length", "this model knows 32 frame positions, not 40: set length to 32 or less"),
        ("no motion", "this model has no layers for motion: set layers to look, or choose a motion module"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(inside: dict[str, Any], case: str, message: str) -> None:
    assert message in inside["refusals"][case]
