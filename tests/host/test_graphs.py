"""Graphs on the real server."""

from __future__ import annotations

import re
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch
from comfy_server import Failed, Host
from einops import rearrange
from graphs import PROMPT, Graph, clip_latent, filmed, native, node, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from videofactory_core import checkpoint, upscaler
from videofactory_core.diffusion import Schedule, guide
from videofactory_core.pipeline import generate
from videofactory_core.sampling import sample
from videofactory_core.video import read_video


def latents(host: Host, graph: Graph, *names: str) -> list[Tensor]:
    """The latents that nodes of a graph give, `[(B F), C, H, W]`."""
    outputs = host.run(saved(graph, *names))
    return [load_file(host.files({name: outputs[f"save {name}"]})[0])["latent_tensor"] for name in names]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def clip_file(host: Host, kind: str, name: str, tensors: dict[str, Tensor]) -> str:
    """Put tensors as a file where the host looks for it; returns its name in the list."""
    save_file(tensors, host.base / kind / name)
    return name


def test_every_node_explains_itself(host: Host) -> None:
    nodes = {name: told for name, told in host.get("object_info").items() if name.startswith("VideoFactory")}
    assert len(nodes) == 20
    translated = host.get("i18n")["en"]["nodeDefs"]
    for name, told in nodes.items():
        assert told["description"], name
        assert all(told["output_tooltips"]), name
        for group in ("required", "optional"):
            for field, (_, options) in told["input"].get(group, {}).items():
                assert options.get("tooltip"), (name, field)
                assert translated[name]["inputs"][field]["tooltip"] == options["tooltip"], (name, field)
        assert translated[name]["display_name"] == told["display_name"]
        assert host.text(f"extensions/VideoFactory/docs/{name}.md").startswith(f"# {told['display_name']}\n")


def test_the_pack_is_imported_within_a_second(host: Host) -> None:
    found = re.search(r"([\d.]+) seconds: \S*VideoFactory", host.log.read_text(errors="replace"))
    assert found is not None
    assert float(found[1]) < 1.0


def test_text_becomes_a_video(host: Host) -> None:
    outputs = host.run(filmed(clip_latent()))
    (file,) = host.files(outputs)
    video = read_video(file)
    assert video.frames.shape == (16, 72, 128, 3)
    assert video.fps == 8


def test_our_sampler_gives_what_the_hosts_gives(host: Host) -> None:
    (ours,) = latents(host, clip_latent(seed=3, steps=4), "sample")
    (hosts,) = latents(host, native(clip_latent(seed=3, steps=4)), "sample")
    assert torch.equal(ours, hosts)


def core_latents(model: checkpoint.Model, seed: int = 0, steps: int = 25) -> Tensor:
    """What the core makes of the noise that the host draws, `[F, C, H, W]` in the host's scale."""
    noise = torch.randn(16, 4, 9, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        context = model.text_encoder.encode([PROMPT, ""])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        return guide(cond, uncond, 2.0)

    schedule = Schedule.from_config(model.config.diffusion)
    made = sample(predict, rearrange(noise, "F C H W -> 1 C F H W"), schedule, sampler="euler", steps=steps)
    return rearrange(made, "1 C F H W -> F C H W") / model.config.autoencoder.scale_factor


def test_the_graph_gives_what_the_command_gives(host: Host) -> None:
    (ours,) = latents(host, clip_latent(seed=5), "sample")
    assert relative_error(ours, core_latents(checkpoint.load(checkpoint.DEMO), seed=5)) <= 1e-4


def test_latents_with_a_dimension_for_time_are_taken_too(host: Host) -> None:
    """And there a seed is the same noise as on the command line."""
    empty = clip_file(
        host,
        "input",
        "five.latent",
        {"latent_tensor": torch.zeros(1, 4, 16, 9, 16), "latent_format_version_0": torch.tensor([])},
    )
    graph = clip_latent(seed=2, steps=5)
    graph["empty"] = node("LoadLatent", latent=empty)
    (five,) = latents(host, native(graph), "sample")
    model = checkpoint.load(checkpoint.DEMO)
    found: list[Tensor] = []
    generate(model, PROMPT, steps=5, seed=2, sampler="euler", on_step=lambda _, x: found.append(x))
    assert relative_error(five, found[-1] / model.config.autoencoder.scale_factor) <= 1e-4


def test_clips_of_a_batch_do_not_see_each_other(host: Host) -> None:
    one, two = clip_latent(frames=8, steps=4), clip_latent(frames=8, clips=2, steps=4)
    (alone,) = latents(host, one, "sample")
    (both,) = latents(host, two, "sample")
    assert relative_error(both[:8], alone) <= 1e-6
    hosts = native(two)
    hosts["write"]["inputs"]["frames"] = 8
    (both_there,) = latents(host, hosts, "sample")
    assert torch.equal(both, both_there)
    (as_one,) = latents(host, native(two), "sample")
    assert relative_error(both, as_one) > 1e-3


def test_a_prompt_may_change_over_the_frames(host: Host) -> None:
    blue = PROMPT.replace("red", "blue")
    (plain,) = latents(host, clip_latent(steps=4), "sample")
    (constant,) = latents(host, clip_latent(f'"0": "{PROMPT}", "15": "{PROMPT}"', steps=4), "sample")
    assert relative_error(constant, plain) <= 1e-5
    (changing,) = latents(host, clip_latent(f'{{"0": "{PROMPT}", "8": "{blue}"}}', steps=4), "sample")
    (first, last) = (relative_error(changing[i], plain[i]) for i in (0, -1))
    assert first < last
    (in_ksampler,) = latents(host, native(clip_latent(f'"0": "{PROMPT}", "8": "{blue}"', steps=4)), "sample")
    assert torch.equal(in_ksampler, changing)


def windowed(graph: Graph, length: int = 16, overlap: int = 8, closed_loop: bool = False) -> Graph:
    inputs = {**graph["sample"]["inputs"], "model": ["windows", 0]}
    windows = node(
        "VideoFactoryContextWindows", model=["load", 0], length=length, overlap=overlap, closed_loop=closed_loop
    )
    return {**graph, "windows": windows, "sample": {**graph["sample"], "inputs": inputs}}


def test_a_clip_of_one_window_is_what_it_is_without_windows(host: Host) -> None:
    (plain,) = latents(host, clip_latent(steps=4), "sample")
    (inside,) = latents(host, windowed(clip_latent(steps=4)), "sample")
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("closed_loop", [False, True])
def test_long_clips_are_sampled_in_windows(host: Host, closed_loop: bool) -> None:
    with pytest.raises(Failed, match="32 frame positions"):
        host.run(saved(clip_latent(frames=40, steps=2), "sample"))
    (long,) = latents(host, windowed(clip_latent(frames=40, steps=3), closed_loop=closed_loop), "sample")
    assert long.shape[0] == 40
    assert long.isfinite().all()


def test_windows_see_the_prompts_of_their_frames(host: Host) -> None:
    """Without overlap a window is a clip of its own."""
    blue = PROMPT.replace("red", "blue")
    schedule = f'"0": "{PROMPT}", "15": "{PROMPT}", "16": "{blue}"'
    (both,) = latents(host, windowed(clip_latent(schedule, frames=32, steps=4), overlap=0), "sample")
    (one,) = latents(host, windowed(clip_latent(frames=32, steps=4), overlap=0), "sample")
    assert relative_error(both[:16], one[:16]) <= 1e-5
    assert relative_error(both[16:], one[16:]) > 1e-2


def test_strengths_of_motion_and_swap_attention(host: Host) -> None:
    (plain,) = latents(host, clip_latent(steps=2), "sample")
    (still,) = latents(host, clip_latent(steps=2, motion_scale=0.0), "sample")
    (added,) = latents(host, clip_latent(steps=2, swap_strength=0.0), "sample")
    assert relative_error(still, plain) > 1e-2
    assert relative_error(added, plain) > 1e-4


def test_free_noise_repeats_shuffled_frames(host: Host) -> None:
    (plain,) = latents(host, windowed(clip_latent(frames=32, steps=2)), "sample")
    (free,) = latents(host, windowed(clip_latent(frames=32, steps=2, free_noise=True)), "sample")
    assert relative_error(free[:8], plain[:8]) < relative_error(free[24:], plain[24:])
    (short,) = latents(host, clip_latent(steps=2), "sample")
    (short_free,) = latents(host, clip_latent(steps=2, free_noise=True), "sample")
    assert torch.equal(short, short_free)


def test_any_chunk_decodes_to_the_same_frames(host: Host) -> None:
    graph = clip_latent(steps=2)
    for chunk in (0, 1, 5):
        graph[f"decode {chunk}"] = node(
            "VideoFactoryDecode", latent=["sample", 0], vae=["load", 2], frames_per_chunk=chunk
        )
        graph[f"encode {chunk}"] = node(
            "VideoFactoryEncode", frames=[f"decode {chunk}", 0], vae=["load", 2], frames_per_chunk=chunk
        )
    whole, *others = latents(host, graph, "encode 0", "encode 1", "encode 5")
    for other in others:
        assert relative_error(other, whole) <= 1e-5


def test_a_saved_checkpoint_comes_back_whole(host: Host) -> None:
    graph = clip_latent(steps=2)
    graph["keep"] = node("CheckpointSave", model=["load", 0], clip=["load", 1], vae=["load", 2], filename_prefix="kept")
    (before,) = latents(host, graph, "sample")
    (file,) = (host.base / "output").glob("kept*.safetensors")
    file.rename(host.base / "models" / "videofactory" / "kept.safetensors")
    again = clip_latent(steps=2)
    again["load"] = node("VideoFactoryLoader", checkpoint="kept.safetensors")
    (after,) = latents(host, again, "sample")
    assert torch.equal(after, before)
    told = checkpoint.explain(host.base / "models" / "videofactory" / "kept.safetensors")
    assert told.loadable
    assert told.config == checkpoint.explain(checkpoint.DEMO).config
    assert told.licence == "Apache-2.0"


LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
SWAP_LAYER = "input_blocks.1.1.merge.to_q"
NAMES = {
    "ours": f"diffusion_model.{LAYER}",
    "kohya's": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "ours, Swap-Attention": f"diffusion_model.{SWAP_LAYER}",
}


@pytest.mark.parametrize("style", NAMES)
def test_a_lora_changes_the_layer_that_it_names(host: Host, style: str) -> None:
    model = checkpoint.load(checkpoint.DEMO)
    layer = model.unet.get_submodule(SWAP_LAYER if "Swap" in style else LAYER)
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, layer.in_features), (layer.out_features, 4)))
    weights = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(2.0)}
    name = clip_file(
        host, "models/loras", "test.safetensors", {NAMES[style] + key: value for key, value in weights.items()}
    )

    def graph(strength: float) -> Graph:
        plain = clip_latent(steps=2)
        loader = node(
            "LoraLoader",
            model=["load", 0],
            clip=["load", 1],
            lora_name=name,
            strength_model=strength,
            strength_clip=strength,
        )
        inputs = {**plain["sample"]["inputs"], "model": ["lora", 0]}
        return {**plain, "lora": loader, "sample": {**plain["sample"], "inputs": inputs}}

    (plain,) = latents(host, clip_latent(steps=2), "sample")
    (changed,) = latents(host, graph(1.0), "sample")
    (without,) = latents(host, graph(0.0), "sample")
    (again,) = latents(host, clip_latent(steps=2, seed=0, cfg=2.0), "sample")
    assert torch.equal(without, plain)
    assert torch.equal(again, plain)
    with torch.no_grad():
        layer.weight += up @ down * (2.0 / 4)
    assert relative_error(changed, core_latents(model, steps=2)) <= 1e-4
    assert relative_error(changed, plain) > 1e-3


def test_what_a_mask_covers_stays_frame_by_frame(host: Host) -> None:
    graph = clip_latent(steps=4)
    source = torch.randn(16, 4, 9, 16, generator=torch.Generator().manual_seed(1))
    graph["empty"] = node(
        "LoadLatent",
        latent=clip_file(
            host, "input", "source.latent", {"latent_tensor": source, "latent_format_version_0": torch.tensor([])}
        ),
    )
    graph["solid"] = node("SolidMask", value=0.0, width=128, height=72)
    graph["free"] = node("SolidMask", value=1.0, width=128, height=72)
    graph["masks"] = node("MaskToImage", mask=["solid", 0])
    graph["free images"] = node("MaskToImage", mask=["free", 0])
    graph["kept"] = node("RepeatImageBatch", image=["masks", 0], amount=8)
    graph["made"] = node("RepeatImageBatch", image=["free images", 0], amount=8)
    graph["all"] = node("ImageBatch", image1=["kept", 0], image2=["made", 0])
    graph["mask"] = node("ImageToMask", image=["all", 0], channel="red")
    graph["masked"] = node("SetLatentNoiseMask", samples=["empty", 0], mask=["mask", 0])
    graph["sample"]["inputs"]["latent"] = ["masked", 0]
    (out,) = latents(host, graph, "sample")
    assert relative_error(out[:8], source[:8]) <= 1e-6
    assert relative_error(out[8:], source[8:]) > 0.1


def test_an_interrupt_stops_between_steps(host: Host) -> None:
    prompt = host.queue(saved(clip_latent(steps=900), "sample"))
    for _ in range(200):
        if host.get("queue")["queue_running"]:
            break
    host.post("interrupt", {})
    with pytest.raises(Failed, match="interrupted"):
        host.wait(prompt, 60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": {"checkpoint": "../demo.safetensors"}}, "points outside of models/videofactory"),
        ({"load": {"checkpoint": "gone.safetensors"}}, "is not in models/videofactory any more: press R"),
        ({"load": {"checkpoint": "broken.safetensors"}}, "broken.safetensors is not a safetensors file"),
        ({"empty": {"frames": 0}}, "smaller than min"),
        ({"write": {"prompt": '"0": "a", "8": b'}}, "the prompt schedule breaks off at"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    host: Host, changes: dict[str, dict[str, object]], message: str
) -> None:
    (host.base / "models" / "videofactory" / "broken.safetensors").write_bytes(b"not a model" * 100)
    graph = clip_latent(steps=1)
    for name, inputs in changes.items():
        graph[name]["inputs"].update(inputs)
    with pytest.raises(Failed, match=re.escape(message)):
        host.run(saved(graph, "sample"))


def test_a_latent_of_another_family_is_refused(host: Host) -> None:
    graph = clip_latent(steps=1)
    graph["empty"] = node("EmptySD3LatentImage", width=128, height=72, batch_size=16)
    with pytest.raises(Failed, match="this latent has 16 channels and the model works on 4"):
        host.run(saved(graph, "sample"))
    graph["decode"] = node("VideoFactoryDecode", latent=["empty", 0], vae=["load", 2], frames_per_chunk=0)
    graph["show"] = node("PreviewImage", images=["decode", 0])
    del graph["sample"]
    with pytest.raises(Failed, match="this VAE belongs to another family"):
        host.run(graph)


class Payload:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.target, "run")


def test_upscalers_that_cannot_be_used_are_refused_in_a_sentence(host: Host) -> None:
    folder = host.base / "models" / "upscale_models"
    torch.manual_seed(0)
    double = upscaler.Upscaler(upscaler.UpscalerConfig(1, 1, 16, 4, scale=2))
    upscaler.save(folder / "x2.safetensors", double, "x2", "MIT", "a test")
    (folder / "broken.safetensors").write_bytes(b"no network" * 50)
    save_file({"weight": torch.zeros(3)}, folder / "foreign.safetensors")
    witness = host.base / "the pickle was run"
    torch.save({"params": Payload(witness)}, folder / "evil.pth")
    messages = {
        "x2.safetensors": "makes pictures 2 times as large and this node is for 4 times",
        "broken.safetensors": "broken.safetensors cannot be read",
        "foreign.safetensors": "foreign.safetensors is no upscaling network that is known here",
        "evil.pth": "evil.pth cannot be read",
        "../evil.pth": "points outside of models/upscale_models",
    }
    for name, message in messages.items():
        graph: Graph = {
            "picture": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
            "load": node("VideoFactoryUpscalerLoader", upscaler=name),
            "upscale": node("VideoFactoryUpscale", upscale_model=["load", 0], frames=["picture", 0], tile=512),
            "show": node("PreviewImage", images=["upscale", 0]),
        }
        with pytest.raises(Failed, match=re.escape(message)):
            host.run(graph)
    assert not witness.exists()


def test_a_damaged_workflow_is_refused_and_the_host_goes_on(host: Host) -> None:
    graph = saved(clip_latent(steps=1), "sample")
    damaged = [
        {**graph, "sample": {"class_type": "VideoFactorySampler"}},
        {**graph, "sample": {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "model": ["nowhere", 0]}}},
        {**graph, "sample": {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "positive": ["load", 0]}}},
        {**graph, "sample": {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "steps": "many"}}},
    ]
    for case in damaged:
        with pytest.raises((Failed, urllib.error.HTTPError)):
            host.run(case)
    host.run(graph)


def test_a_file_that_vanishes_before_its_turn_is_named(host: Host) -> None:
    copy = host.base / "models" / "videofactory" / "vanishing.safetensors"
    shutil.copy(checkpoint.DEMO, copy)
    slow = host.queue(saved(clip_latent(steps=40, seed=11), "sample"))
    graph = clip_latent(steps=1)
    graph["load"]["inputs"]["checkpoint"] = copy.name
    prompt = host.queue(saved(graph, "sample"))
    copy.unlink()
    host.wait(slow)
    with pytest.raises(Failed, match=r"vanishing.safetensors is not in models/videofactory any more"):
        host.wait(prompt)


def with_patch(graph: Graph, class_type: str, **inputs: object) -> Graph:
    """The graph with one of the host's model patches before the sampler."""
    sampling = {**graph["sample"]["inputs"], "model": ["patch", 0]}
    patch = node(class_type, model=["load", 0], **inputs)
    return {**graph, "patch": patch, "sample": {**graph["sample"], "inputs": sampling}}


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
        ("PerturbedAttentionGuidance", {"scale": 3.0}),
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
        ("RescaleCFG", {"multiplier": 0.7}),
        (
            "PatchModelAddDownscale",
            {
                "block_number": 1,
                "downscale_factor": 2.0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "downscale_after_skip": True,
                "downscale_method": "bicubic",
                "upscale_method": "bicubic",
            },
        ),
        ("HyperTile", {"tile_size": 32, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
        ("TomePatchModel", {"ratio": 0.5}),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_hosts_model_patches_act(host: Host, class_type: str, inputs: dict[str, object]) -> None:
    (plain,) = latents(host, clip_latent(steps=3), "sample")
    (patched,) = latents(host, with_patch(clip_latent(steps=3), class_type, **inputs), "sample")
    assert patched.isfinite().all()
    assert relative_error(patched, plain) > 1e-4


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("EasyCache", {"reuse_threshold": 0.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_patches_that_change_nothing_change_nothing(host: Host, class_type: str, inputs: dict[str, object]) -> None:
    (plain,) = latents(host, clip_latent(steps=3), "sample")
    (patched,) = latents(host, with_patch(clip_latent(steps=3), class_type, **inputs), "sample")
    assert relative_error(patched, plain) <= 1e-5


def test_every_sampler_and_scheduler_of_the_host_works(host: Host) -> None:
    known = host.get("object_info")["KSampler"]["input"]["required"]
    graph: Graph = clip_latent(frames=2, steps=2)
    names = []
    for field in ("sampler_name", "scheduler"):
        for choice in known[field][0]:
            name = f"{field} {choice}"
            graph[name] = node("VideoFactorySampler", **{**graph["sample"]["inputs"], field: choice})
            names.append(name)
    for name, latent in zip(names, latents(host, graph, *names), strict=True):
        assert latent.isfinite().all(), name


def test_custom_sampling_gives_the_same(host: Host) -> None:
    graph = clip_latent(steps=4)
    (plain,) = latents(host, graph, "sample")
    graph["noise"] = node("RandomNoise", noise_seed=0)
    graph["guider"] = node("CFGGuider", model=["load", 0], positive=["write", 0], negative=["write", 1], cfg=2.0)
    graph["sampler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("BasicScheduler", model=["load", 0], scheduler="simple", steps=4, denoise=1.0)
    graph["custom"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )
    (custom,) = latents(host, graph, "custom")
    assert torch.equal(custom, plain)
