"""Graphs on the real server."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_server import Host
from einops import rearrange
from graphs import PROMPT, Graph, clip_latent, filmed, native, saved
from safetensors.torch import load_file
from torch import Tensor

import videofactory_core
from videofactory_core import checkpoint
from videofactory_core.diffusion import Schedule, guide
from videofactory_core.sampling import sample
from videofactory_core.video import read_video

DEMO_FILE = Path(videofactory_core.__file__).parent / "assets" / "demo.safetensors"


def latents(host: Host, graph: Graph, *names: str) -> list[Tensor]:
    """The latents that nodes of a graph give, `[(B F), C, H, W]`."""
    outputs = host.run(saved(graph, *names))
    return [load_file(host.files({name: outputs[f"save {name}"]})[0])["latent_tensor"] for name in names]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


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


def test_the_graph_gives_what_the_command_gives(host: Host) -> None:
    (ours,) = latents(host, clip_latent(seed=5), "sample")
    model = checkpoint.load(DEMO_FILE)
    noise = torch.randn(16, 4, 9, 16, generator=torch.Generator().manual_seed(5))
    context = model.text_encoder.encode([PROMPT, ""])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        return guide(cond, uncond, 4.0)

    schedule = Schedule.from_config(model.config.diffusion)
    expected = sample(predict, rearrange(noise, "F C H W -> 1 C F H W"), schedule, sampler="euler", steps=25)
    expected = rearrange(expected, "1 C F H W -> F C H W") / model.config.autoencoder.scale_factor
    assert relative_error(ours, expected) <= 1e-4
