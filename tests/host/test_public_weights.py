"""Stable Diffusion and AnimateDiff files in the host's own folders: the graph makes of them what the core makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfy_server import Failed, Host
from graphs import Graph, clip_latent, node
from safetensors.torch import save_file
from test_graphs import core_latents, latents, relative_error
from torch import Tensor

from videofactory_core import adapters, checkpoint
from videofactory_core.checkpoint import PREFIXES
from videofactory_core.config import PRESETS, AutoencoderConfig, DiffusionConfig, ModelConfig
from videofactory_core.convert import animatediff, convert
from videofactory_core.unet.temporal import frame_positions

# Stable Diffusion 1.5's design at a size that a processor samples in a second, as AnimateDiff's version 3 fits on it.
CONFIG = ModelConfig(
    replace(
        PRESETS["sd15"].unet,
        model_channels=32,
        context_dim=64,
        temporal_conv=False,
        temporal_attention_behind="blocks",
        temporal_middle=False,
        temporal_heads=animatediff.HEADS,
        temporal_positions=32,
        temporal_norm="frame",
        temporal_skips=False,
        fusion="add",
        merge="add",
    ),
    AutoencoderConfig(channels=32, num_res_blocks=1),
    replace(PRESETS["sd15"].text, width=64, layers=2, heads=1),
    DiffusionConfig(beta_schedule="linear"),
    width=512,
    height=512,
)
IMAGE, MOTION = "sd15-like.safetensors", "v3-like.safetensors"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def weights(host: Host) -> None:
    """An image model in `models/checkpoints` and a motion module in `models/animatediff_models`."""
    torch.manual_seed(0)
    model = checkpoint.build(CONFIG)
    for parameter in model.unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            # What starts at zero would leave the motion module without effect.
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    motion = {}
    image = {
        PREFIXES[part] + name: tensor
        for part in ("autoencoder", "text_encoder")
        for name, tensor in model.parts()[part].state_dict().items()
    }
    places = animatediff.motion_modules(CONFIG.unet)
    for name, tensor in model.unet.state_dict().items():
        place = next((ours for ours in places if name.startswith(f"{ours}.")), None)
        if place is None:
            image[PREFIXES["unet"] + name] = tensor
        else:
            motion[places[place] + name.removeprefix(place)] = tensor
    for name in [name for name in motion if name.endswith(".norm1.weight")]:
        channels = len(motion[name])
        motion[name.replace("norm1.weight", "pos_embed.pe")] = frame_positions(32, channels, torch.zeros(()))[None]
    wanted = (("checkpoints", IMAGE, image), ("animatediff_models", MOTION, motion), ("videofactory", MOTION, motion))
    for folder, name, tensors in wanted:
        (host.base / "models" / folder).mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, host.base / "models" / folder / name)


def graph(motion: str = MOTION, name: str = f"{IMAGE} [checkpoints]", **sampling: int) -> Graph:
    made = clip_latent(**{"steps": 3, **sampling})
    made["load"] = node("VideoFactoryLoader", checkpoint=name, motion=motion)
    return made


def made_by_the_core(host: Host, motion: str | None, lora: str | None = None) -> Tensor:
    folder = host.base / "models"
    moving = None if motion is None else folder / "animatediff_models" / motion
    model = convert(folder / "checkpoints" / IMAGE, moving, temporal=False).load()
    if lora is not None:
        adapters.merge(model, adapters.read(folder / "loras" / lora))
    return core_latents(model, steps=3)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("motion", [MOTION, None])
def test_the_graph_makes_what_the_core_makes(host: Host, motion: str | None) -> None:
    (found,) = latents(host, graph(motion or "none"), "sample")
    expected = made_by_the_core(host, motion)
    assert relative_error(found, expected) <= 1e-4
    assert relative_error(found, made_by_the_core(host, MOTION if motion is None else None)) > 1e-2


@pytest.mark.usefixtures("weights")
def test_a_motion_module_may_lie_among_our_checkpoints(host: Host) -> None:
    (one,) = latents(host, graph(), "sample")
    (other,) = latents(host, graph(f"{MOTION} [videofactory]"), "sample")
    assert torch.equal(one, other)


@pytest.mark.usefixtures("weights")
def test_a_lora_for_the_image_model_acts_as_in_the_core(host: Host) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.randn(4, 64, generator=generator),
        f"{KOHYA}.lora_up.weight": torch.randn(32, 4, generator=generator) * 0.2,
        f"{KOHYA}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, host.base / "models" / "loras" / "kohya.safetensors")
    patched = graph()
    patched["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name="kohya.safetensors", strength_model=1.0)
    patched["sample"]["inputs"]["model"] = ["lora", 0]
    plain, changed = (*latents(host, graph(), "sample"), *latents(host, patched, "sample"))
    assert relative_error(changed, plain) > 1e-3
    assert relative_error(changed, made_by_the_core(host, MOTION, "kohya.safetensors")) <= 1e-4


@pytest.mark.usefixtures("weights")
def test_an_inflated_model_is_saved_as_a_checkpoint(host: Host) -> None:
    made = graph()
    made["keep"] = node("CheckpointSave", model=["load", 0], clip=["load", 1], vae=["load", 2], filename_prefix="made")
    (before,) = latents(host, made, "sample")
    (file,) = (host.base / "output").glob("made*.safetensors")
    file.rename(host.base / "models" / "videofactory" / "made.safetensors")
    (after,) = latents(host, graph("none", "made.safetensors"), "sample")
    assert torch.equal(after, before)
    told = checkpoint.explain(host.base / "models" / "videofactory" / "made.safetensors")
    assert told.config is not None
    assert told.config.unet == CONFIG.unet
    assert told.licence == "CreativeML OpenRAIL-M and Apache-2.0"


@pytest.mark.usefixtures("weights")
def test_what_does_not_go_together_is_said(host: Host) -> None:
    with pytest.raises(Failed, match="has its own motion: set motion to none"):
        latents(host, graph(MOTION, "demo [bundled]"), "sample")
    save_file({"a": torch.ones(2)}, host.base / "models" / "checkpoints" / "other.safetensors")
    with pytest.raises(Failed, match="is a file of unknown kind and has no U-Net: choose another file"):
        latents(host, graph("none", "other.safetensors [checkpoints]"), "sample")
