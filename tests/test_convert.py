"""Public weights become our models exactly: the same outputs as their own classes, and every tensor found again."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from videofactory_train.cli import main

from videofactory_core import checkpoint
from videofactory_core.checkpoint import PREFIXES, CheckpointError
from videofactory_core.config import PRESETS
from videofactory_core.convert import Conversion, convert
from videofactory_core.text import TextEncoder
from videofactory_core.unet.model import VideoUNet

WIDTH = 64
UNET: dict[str, Any] = {
    "block_out_channels": (64, 64, 128),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
DOWN_2D, UP_2D = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D",)
LEVELS_2D = {"down_block_types": DOWN_2D, "up_block_types": (*UP_2D, "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
LEVELS_3D = {key: tuple(name.replace("2D", "3D") for name in names) for key, names in LEVELS_2D.items()}
LEVELS_MOTION = {key: tuple(name.replace("2D", "Motion") for name in names) for key, names in LEVELS_2D.items()}
# Heads are counted or measured by a setting of the same name: eight heads in 1.x, heads of 64 channels in 2.x.
SD1 = {"attention_head_dim": 8, "use_linear_projection": False, "cross_attention_dim": WIDTH}
SD2 = {"attention_head_dim": (1, 1, 2), "use_linear_projection": True, "cross_attention_dim": WIDTH}


def randomise(module: Any, seed: int = 0) -> Any:
    """Weights at which every layer has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.ndim == 1))
    return module.eval()


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def image_unet(settings: dict[str, Any]) -> Any:
    return randomise(diffusers.UNet2DConditionModel(**UNET, **LEVELS_2D, **settings))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


TEXT_1 = replace(PRESETS["sd15"].text, width=WIDTH, layers=2, heads=1)
TEXT_2 = replace(PRESETS["sd21"].text, width=WIDTH, layers=3, heads=1)


def text_encoder(kind: str) -> TextEncoder:
    encoder: TextEncoder = randomise(TextEncoder(TEXT_2 if kind == "2.x" else TEXT_1))
    return encoder


def autoencoder() -> Any:
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """An autoencoder and a text encoder that go with every U-Net here."""
    found = {"autoencoder": tmp_path / "vae.safetensors", "text_encoder": tmp_path / "text.safetensors"}
    save_file(tensors(autoencoder()), found["autoencoder"])
    save_file(tensors(text_encoder("1.x")), found["text_encoder"])
    return found


def write(path: Path, state: dict[str, Tensor], how: str) -> Path:
    """A state dict in one of the ways in which weights travel."""
    if how == "pickle":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": state, "global_step": 7}, path)
    elif how == "shards":
        path.mkdir()
        names = sorted(state)
        halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for name, keys in halves.items():
            save_file({key: state[key] for key in keys}, path / name)
        table = {key: name for name, keys in halves.items() for key in keys}
        (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    else:
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    return path


def clip(width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 6, 8, width, generator=generator)
    return x, torch.tensor([100, 700]), torch.randn(2, 7, WIDTH, generator=generator)


@torch.no_grad()
def ours(conversion: Conversion, width: int = 9, **changes: Any) -> Tensor:
    """What the converted network predicts."""
    unet: VideoUNet = conversion.load().unet
    if changes:
        changed = VideoUNet(replace(conversion.config.unet, **changes)).eval()
        changed.load_state_dict(unet.state_dict())
        unet = changed
    return unet(*clip(width))


def per_frame(model: Any, width: int = 9) -> Tensor:
    x, t, context = clip(width)
    with torch.no_grad():
        return torch.stack([model(x[:, :, f], t, context).sample for f in range(x.shape[2])], 2)


def given_back(conversion: Conversion, part: str) -> dict[str, Tensor]:
    """The source's tensors, made again from ours."""
    state = conversion.read(part)
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, piece in conversion.pieces[part].items():
        key = piece.source.prefix + piece.name
        if piece.third is None:
            found[key] = state[name].reshape(piece.source.shapes[piece.name])
        else:
            thirds.setdefault(key, {})[piece.third] = state[name]
    joined = {key: torch.cat([value for _, value in sorted(three.items())]) for key, three in thirds.items()}
    return {**found, **joined}


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# The original names, written from the authors' files; the converter has its own tables.


def ldm_names(settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers U-Net of this file's sizes under the names of latent diffusion."""
    res = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    res |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    fixed |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    out = {}
    for key, value in state.items():
        name = key
        for a, b in fixed.items():
            name = re.sub(rf"^{a}\.", f"{b}.", name)
        if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", name):
            side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
            number = 3 * block + layer + (side == "down")
            half = "input_blocks" if side == "down" else "output_blocks"
            name = f"{half}.{number}.{int(kind == 'attentions')}." + name[match.end() :]
        name = re.sub(
            r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op", name
        )
        name = re.sub(
            r"^up_blocks\.(\d)\.upsamplers\.0\.",
            lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{2 if int(m[1]) else 1}.",
            name,
        )
        name = name.replace("mid_block.attentions.0.", "middle_block.1.")
        name = name.replace("mid_block.resnets.0.", "middle_block.0.").replace(
            "mid_block.resnets.1.", "middle_block.2."
        )
        if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", name):
            for a, b in res.items():
                name = re.sub(rf"\.{a}\.", f".{b}.", name)
        out[name] = value
    return out


def modelscope_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `UNet3DConditionModel` of this file's sizes under the names and shapes of `text2video_pytorch_model.pth`."""
    plain = {k: v for k, v in state.items() if not re.search(r"temp_|transformer_in", k)}
    out = {}
    for name, value in ldm_names(SD2, plain).items():
        name = re.sub(r"^(input_blocks\.\d)\.0\.op", r"\1.op", name)
        name = name.replace("middle_block.2.", "middle_block.3.")
        name = re.sub(r"^(output_blocks\.\d)\.2\.conv", r"\1.3.conv", name)
        out[name] = value
    for name, value in state.items():
        key = name.replace("transformer_in.", "input_blocks.0.1.")
        for side, half, first in (("down", "input", 1), ("up", "output", 0)):
            pattern = rf"^{side}_blocks\.(\d)\.temp_(convs|attentions)\.(\d)\."
            if match := re.match(pattern, key):
                number = 3 * int(match[1]) + int(match[3]) + first
                inner = "0.temopral_conv" if match[2] == "convs" else "2"
                key = f"{half}_blocks.{number}.{inner}." + key[match.end() :]
        key = key.replace("mid_block.temp_attentions.0.", "middle_block.2.")
        key = key.replace("mid_block.temp_convs.0.", "middle_block.0.temopral_conv.")
        key = key.replace("mid_block.temp_convs.1.", "middle_block.3.temopral_conv.")
        if key != name:
            # Projections of the temporal transformers are convolutions over one frame there.
            out[key] = value[:, :, None] if re.search(r"\.proj_(in|out)\.weight$", key) else value
    assert len(out) == len(state)
    return out


def animatediff_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `MotionAdapter`'s weights under the names of `mm_sd_v15_v2.ckpt`."""
    inner = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1", "norm1": "norms.0", "norm2": "norms.1"}
    inner |= {"norm3": "ff_norm"}
    out = {}
    for key, value in state.items():
        name = re.sub(r"(motion_modules\.\d)\.", r"\1.temporal_transformer.", key)
        for a, b in inner.items():
            name = name.replace(f"transformer_blocks.0.{a}.", f"transformer_blocks.0.{b}.")
        if ".pos_embed.pe" in name:
            for block in (0, 1):
                out[name.replace("pos_embed", f"attention_blocks.{block}.pos_encoder")] = value
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("how", ["file", "pickle", "shards"])
@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("settings", [SD1, SD2], ids=["1.x", "2.x"])
def test_an_image_model_predicts_frame_by_frame_what_its_own_class_does(
    tmp_path: Path, parts: dict[str, Path], settings: dict[str, Any], layout: str, how: str
) -> None:
    peer = image_unet(settings)
    state = tensors(peer)
    if layout == "ldm":
        state = {"model.diffusion_model." + name: value for name, value in ldm_names(settings, state).items()}
    path = write(tmp_path / "base", state, how)
    plain = convert(path, **parts, temporal=False, prediction_type="epsilon")
    assert relative_error(ours(plain), per_frame(peer)) <= 1e-5
    assert_the_same(given_back(plain, "unet"), state)
    inflated = convert(path, **parts, prediction_type="epsilon")
    assert inflated.config.unet.merge == "swap"
    assert relative_error(ours(inflated), per_frame(peer)) <= 1e-5


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_modelscope_predicts_what_its_own_class_does(
    tmp_path: Path, parts: dict[str, Path], layout: str, swap: bool
) -> None:
    peer: Any = randomise(
        diffusers.UNet3DConditionModel(**UNET, **LEVELS_3D, attention_head_dim=64, cross_attention_dim=WIDTH)
    )
    state = tensors(peer) if layout == "diffusers" else modelscope_names(tensors(peer))
    conversion = convert(write(tmp_path / "base", state, "file"), **parts, swap_attention=swap)
    x, t, context = clip(12)
    with torch.no_grad():
        expected = torch.cat([peer(x[i : i + 1], t[i : i + 1], context[i : i + 1]).sample for i in range(2)])
    assert relative_error(ours(conversion, 12), expected) <= 1e-5
    assert_the_same(given_back(conversion, "unet"), state)
    assert "non-commercial" in conversion.note
    conversion.save(tmp_path / "made.safetensors")
    with pytest.warns(UserWarning, match=r"for non-commercial use only \(CC-BY-NC-4.0\)"):
        checkpoint.load(tmp_path / "made.safetensors")
    # Where their classes need multiples of four.
    assert ours(conversion, 11).isfinite().all()


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_modelscopes_video_parts_go_with_another_image_model(
    tmp_path: Path, parts: dict[str, Path], layout: str
) -> None:
    video: Any = randomise(
        diffusers.UNet3DConditionModel(**UNET, **LEVELS_3D, attention_head_dim=64, cross_attention_dim=WIDTH), seed=1
    )
    image = image_unet(SD2)
    folder = tmp_path / "modelscope"
    if layout == "original":
        folder.mkdir()
        torch.save(modelscope_names(tensors(video)), folder / "text2video_pytorch_model.pth")
    else:
        video.save_pretrained(folder / "unet")
    base = write(tmp_path / "base", tensors(image), "file")
    conversion = convert(base, folder, **parts, prediction_type="epsilon")
    # Their class with the image model's weights in the place of its own.
    video.load_state_dict(tensors(image), strict=False)
    x, t, context = clip(12)
    with torch.no_grad():
        expected = torch.cat([video(x[i : i + 1], t[i : i + 1], context[i : i + 1]).sample for i in range(2)])
    assert relative_error(ours(conversion, 12), expected) <= 1e-5
    assert "CC-BY-NC-4.0" in conversion.metadata.licence
    with pytest.raises(CheckpointError, match=r"was made for Stable Diffusion 2.x and .* is 1.x: change one"):
        convert(write(tmp_path / "old", tensors(image_unet(SD1)), "file"), folder, **parts)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(("middle", "length"), [(True, 32), (False, 32), (False, 24)], ids=["v2", "v3", "v1"])
@pytest.mark.parametrize("settings", [SD1, SD2], ids=["1.x", "2.x"])
def test_animatediff_predicts_what_its_own_class_does(
    tmp_path: Path, parts: dict[str, Path], settings: dict[str, Any], middle: bool, length: int, layout: str
) -> None:
    image = image_unet(settings)
    adapter: Any = randomise(
        diffusers.MotionAdapter(
            block_out_channels=UNET["block_out_channels"],
            motion_layers_per_block=UNET["layers_per_block"],
            motion_norm_num_groups=UNET["norm_num_groups"],
            use_motion_mid_block=middle,
            motion_max_seq_length=length,
        ),
        seed=1,
    )
    peer: Any = diffusers.UNetMotionModel.from_unet2d(image, adapter).eval()
    state = tensors(adapter) if layout == "diffusers" else animatediff_names(tensors(adapter))
    base = write(tmp_path / "base", tensors(image), "file")
    motion = write(tmp_path / "motion", state, "pickle")
    conversion = convert(base, motion, **parts, prediction_type="epsilon", swap_attention=True)
    x, t, context = clip()
    with torch.no_grad():
        expected = torch.cat(
            [peer(x[i : i + 1], t[i : i + 1], context[i : i + 1].expand(6, -1, -1)).sample for i in range(2)]
        )
    # diffusers' norms run over the clip, the authors' over a frame.
    assert relative_error(ours(conversion, temporal_norm="clip"), expected) <= 1e-5
    assert conversion.config.unet.temporal_norm == "frame"
    assert conversion.config.unet.temporal_positions == length
    assert conversion.config.diffusion.beta_schedule == "linear"
    assert not conversion.note
    learned = {key: value for key, value in {**tensors(image), **state}.items() if not key.endswith(".pe")}
    assert_the_same(given_back(conversion, "unet"), learned)


def test_a_motion_module_acts_and_its_scale_turns_it_off(tmp_path: Path, parts: dict[str, Path]) -> None:
    image = image_unet(SD1)
    adapter: Any = randomise(
        diffusers.MotionAdapter(
            block_out_channels=UNET["block_out_channels"], motion_norm_num_groups=32, motion_layers_per_block=2
        )
    )
    base, motion = (
        write(tmp_path / "base", tensors(image), "file"),
        write(tmp_path / "motion", tensors(adapter), "file"),
    )
    unet = convert(base, motion, **parts).load().unet
    with torch.no_grad():
        assert relative_error(unet(*clip()), per_frame(image)) > 0.1
        assert relative_error(unet(*clip(), motion_scale=0.0), per_frame(image)) <= 1e-5


@pytest.mark.parametrize("old", [False, True])
def test_the_autoencoder_is_the_peers(tmp_path: Path, parts: dict[str, Path], old: bool) -> None:
    peer = autoencoder()
    state = tensors(peer)
    if old:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for a, b in names.items():
            state = {key.replace(f"attentions.0.{a}.", f"attentions.0.{b}."): value for key, value in state.items()}
        save_file(state, parts["autoencoder"])
    conversion = convert(write(tmp_path / "base", tensors(image_unet(SD1)), "file"), **parts)
    model = conversion.load().autoencoder
    frames = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = peer.encode(frames).latent_dist
        assert relative_error(model.encode_moments(frames)[0], posterior.mean) <= 1e-5
        assert relative_error(model.decode_frames(posterior.mean), peer.decode(posterior.mean).sample) <= 1e-5
    assert_the_same(given_back(conversion, "autoencoder"), state)


def peer_text(activation: str, layers: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act=activation,
    )
    return randomise(transformers.CLIPTextModel(config))


def test_openais_text_encoder_is_the_peers(tmp_path: Path, parts: dict[str, Path]) -> None:
    peer = peer_text("quick_gelu", 2)
    folder = tmp_path / "text_encoder"
    peer.save_pretrained(folder)
    base = write(tmp_path / "base", tensors(image_unet(SD1)), "file")
    conversion = convert(base, **{**parts, "text_encoder": folder})
    tokens = torch.tensor([[49406, 320, 1929, *[49407] * 74]])
    with torch.no_grad():
        expected = peer(tokens).last_hidden_state
        assert relative_error(conversion.load().text_encoder(tokens), expected) <= 1e-5
    state = load_file(folder / "model.safetensors")
    assert_the_same(given_back(conversion, "text_encoder"), state)


def test_open_clips_text_encoder_is_the_peers(tmp_path: Path, parts: dict[str, Path]) -> None:
    import open_clip

    peer: Any = randomise(
        open_clip.model.CLIP(
            embed_dim=WIDTH,
            vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"width": WIDTH, "heads": 1, "layers": 24, "vocab_size": 49408},
        )
    )
    torch.save(tensors(peer), tmp_path / "open_clip_pytorch_model.bin")
    base = write(tmp_path / "base", tensors(image_unet(SD2)), "file")
    conversion = convert(
        base, **{**parts, "text_encoder": tmp_path / "open_clip_pytorch_model.bin"}, prediction_type="epsilon"
    )
    assert conversion.config.text.skip_last_layers == 1
    tokens = torch.tensor([[49406, 320, 1929, 49407, *[0] * 73]])
    with torch.no_grad():
        x = peer.token_embedding(tokens) + peer.positional_embedding
        for block in peer.transformer.resblocks[:-1]:
            x = block(x, attn_mask=peer.attn_mask)
        assert relative_error(conversion.load().text_encoder(tokens), peer.ln_final(x)) <= 1e-5
    text = {
        key: value
        for key, value in tensors(peer).items()
        if not re.match(r"visual\.|logit_scale|text_projection|attn_mask", key)
    }
    assert_the_same(given_back(conversion, "text_encoder"), text)


def single_file(path: Path) -> Path:
    """A whole 1.x checkpoint as one file, with what such files carry along."""
    vae, text = autoencoder(), text_encoder("1.x")
    import videofactory_core.convert.stable_diffusion as names
    from videofactory_core.autoencoder import Autoencoder
    from videofactory_core.config import AutoencoderConfig

    config = AutoencoderConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    theirs = tensors(vae)
    table = names.diffusers_autoencoder(config, {})
    ours = {
        name: theirs[names.lookup(table, name) or ""].reshape(tensor.shape)
        for name, tensor in Autoencoder(config).state_dict().items()
    }
    state = {
        **{PREFIXES["unet"] + k: v for k, v in ldm_names(SD1, tensors(image_unet(SD1))).items()},
        **{PREFIXES["autoencoder"] + k: v for k, v in ours.items()},
        **{PREFIXES["text_encoder"] + k: v for k, v in tensors(text).items()},
        PREFIXES["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.zeros(()),
        "alphas_cumprod": torch.zeros(1000),
    }
    return write(path, state, "file")


def test_a_whole_file_becomes_a_whole_model_and_the_same_bytes_again(tmp_path: Path) -> None:
    base = single_file(tmp_path / "sd")
    seen: list[tuple[int, int]] = []
    for name in ("a.safetensors", "b.safetensors"):
        convert(base).save(tmp_path / name, torch.float32, lambda *done: seen.append(done))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert seen[-1][0] == seen[-1][1] == len(seen) // 2
    model = checkpoint.load(tmp_path / "a.safetensors")
    assert model.metadata.licence == "CreativeML OpenRAIL-M"
    with torch.no_grad():
        assert relative_error(model.unet(*clip()), per_frame(image_unet(SD1))) <= 1e-5
    assert checkpoint.explain(tmp_path / "a.safetensors").loadable


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    base = single_file(tmp_path / "sd")
    before = set(tmp_path.iterdir())

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(base).save(tmp_path / "out.safetensors", on_tensor=stop)
    assert set(tmp_path.iterdir()) == before


def test_a_folder_of_diffusers_tells_what_it_predicts(tmp_path: Path) -> None:
    folder = tmp_path / "sd2"
    image_unet(SD2).save_pretrained(folder / "unet")
    autoencoder().save_pretrained(folder / "vae")
    peer_text("gelu", 2).save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    settings = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.001}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    conversion = convert(folder)
    assert conversion.config.diffusion.prediction_type == "v_prediction"
    assert conversion.config.diffusion.beta_start == 0.001
    assert conversion.config.text.activation == "gelu"
    assert conversion.config.width == 768
    with torch.no_grad():
        assert relative_error(ours(conversion), per_frame(image_unet(SD2))) <= 1e-5


class Trap:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


Bad = Callable[[Path, dict[str, Path]], dict[str, Any]]


def other_motion(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64, 64), motion_norm_num_groups=32, motion_layers_per_block=2
    )
    return {"motion": write(folder / "motion", tensors(adapter), "file")}


def half_a_folder(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    base = write(folder / "half", tensors(image_unet(SD1)), "shards")
    (base / "b.safetensors").unlink()
    return {"base": base}


def escaping_shards(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    base = write(folder / "half", tensors(image_unet(SD1)), "shards")
    index = base / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace("b.safetensors", "../b.safetensors"))
    return {"base": base}


def sdxl(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(**UNET, **LEVELS_2D, **{**SD2, "cross_attention_dim": 2048})
    return {"base": write(folder / "xl", tensors(unet), "file")}


def inpainting(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    return {
        "base": write(
            folder / "in", tensors(diffusers.UNet2DConditionModel(**UNET, **LEVELS_2D, **SD1, in_channels=9)), "file"
        )
    }


def code(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    torch.save({"state_dict": tensors(image_unet(SD1)), "callbacks": Trap(folder / "trace")}, folder / "bad.ckpt")
    return {"base": folder / "bad.ckpt"}


def old_pickle(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    (folder / "old.ckpt").write_bytes(pickle.dumps(Trap(folder / "trace")))
    return {"base": folder / "old.ckpt"}


def foreign_positions(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    adapter = diffusers.MotionAdapter(
        block_out_channels=UNET["block_out_channels"], motion_norm_num_groups=32, motion_layers_per_block=2
    )
    state = {key: value + 0.1 if key.endswith(".pe") else value for key, value in tensors(adapter).items()}
    return {"motion": write(folder / "motion", state, "file")}


def leftover(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    return {"base": write(folder / "more", {**tensors(image_unet(SD1)), "gate.weight": torch.ones(3)}, "file")}


def gap(folder: Path, parts: dict[str, Path]) -> dict[str, Any]:
    state = tensors(image_unet(SD1))
    del state["mid_block.resnets.1.conv1.weight"]
    return {"base": write(folder / "less", state, "file")}


BAD: dict[str, tuple[Bad, str]] = {
    "a motion module for other widths": (other_motion, r"is made for levels of \(32, 64, 64\) channels"),
    "half of a sharded folder": (half_a_folder, "lacks the shard b.safetensors; download"),
    "shards outside their folder": (escaping_shards, "names a shard outside its folder"),
    "sdxl": (
        sdxl,
        "is a Stable Diffusion XL image model; it cannot be used here, because it has two text encoders: choose",
    ),
    "inpainting": (inpainting, "takes 9 channels: choose one that is not made for inpainting"),
    "only an autoencoder": (
        lambda folder, parts: {"base": parts["autoencoder"]},
        "is an autoencoder alone and has no U-Net: choose",
    ),
    "no autoencoder": (lambda folder, parts: {"autoencoder": None}, "has no autoencoder: add one with --vae"),
    "no text encoder": (
        lambda folder, parts: {"text_encoder": None},
        "has no text encoder: add one with --text-encoder",
    ),
    "the wrong part": (lambda folder, parts: {"autoencoder": parts["text_encoder"]}, "and has no autoencoder: choose"),
    "motion that is none": (lambda folder, parts: {"motion": parts["autoencoder"]}, "not a motion module: choose"),
    "code in a pickle": (code, "holds more than tensors or is damaged; get"),
    "code in an old pickle": (old_pickle, "holds more than tensors or is damaged; get"),
    "an empty folder": (lambda folder, parts: {"base": folder / "empty"}, "has no weights"),
    "no file": (lambda folder, parts: {"base": folder / "nothing.safetensors"}, "does not exist"),
    "learned frame positions": (foreign_positions, "is no sinusoid of the frame number"),
    "tensors left over": (leftover, r"has 1 tensor \(gate.weight\) that no part of the network takes"),
    "a gap": (gap, "lacks mid_block.resnets.1.conv1.weight"),
}


@pytest.fixture
def no_trace(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("no_trace")
def test_what_cannot_be_converted_is_said_in_a_sentence(tmp_path: Path, parts: dict[str, Path], name: str) -> None:
    (tmp_path / "empty").mkdir()
    base = write(tmp_path / "base", tensors(image_unet(SD1)), "file")
    prepare, expected = BAD[name]
    with pytest.raises(CheckpointError, match=expected):
        convert(**{"base": base, **parts, **prepare(tmp_path, parts)})


def test_what_no_file_tells_has_to_be_said(tmp_path: Path, parts: dict[str, Path]) -> None:
    base = write(tmp_path / "base", tensors(image_unet(SD2)), "file")
    with pytest.raises(ValueError, match="does not say what it predicts: set the prediction type"):
        convert(base, **parts)


def test_the_command_writes_a_model_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = single_file(tmp_path / "sd"), tmp_path / "made.safetensors"
    assert main(["convert", "--base", str(base), "--out", str(out), "--no-swap-ca", "--size", "256x128"]) == 0
    config = checkpoint.load(out).config
    assert (config.width, config.height, config.unet.merge) == (256, 128, "fuse")
    before = set(tmp_path.iterdir())
    for arguments in (
        ["--base", str(tmp_path / "none"), "--out", str(tmp_path / "a.safetensors")],
        ["--base", str(base), "--motion", str(base), "--out", str(tmp_path / "a.safetensors")],
        ["--base", str(base), "--out", str(tmp_path / "a.ckpt")],
        ["--base", str(base), "--out", str(tmp_path / "none" / "a.safetensors")],
        ["--base", str(base), "--out", str(base)],
        ["--base", str(base), "--frames", "0", "--out", str(tmp_path / "a.safetensors")],
    ):
        capsys.readouterr()
        assert main(["convert", *arguments]) == 2, arguments
        assert capsys.readouterr().err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
