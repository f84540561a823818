"""The autoencoder against diffusers' AutoencoderKL, and what it promises about chunks, sizes and injected layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn

from videofactory_core import autoencoder, ops
from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import PRESETS, AutoencoderConfig

DEBUG = PRESETS["debug"].autoencoder
STABLE_DIFFUSION_PARAMETERS = 83_653_863


def random_model(config: AutoencoderConfig, **seams: object) -> Autoencoder:
    """Norms get random weights too, which ones and zeros would leave untested."""
    torch.manual_seed(0)
    model = Autoencoder(config, **seams)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def random_video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().norm() / b.detach().norm())


def diffusers_twin(model: Autoencoder) -> Any:
    """diffusers' model with our weights, which its own reader of Stable Diffusion checkpoints takes by their names."""
    config = model.config
    levels = len(config.channel_mult)
    twin: Any = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * mult for mult in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale_factor,
    ).eval()
    file = {f"first_stage_model.{key}": value for key, value in model.state_dict().items()}
    twin.load_state_dict(convert_ldm_vae_checkpoint(file, twin.config), strict=True)
    return twin


@pytest.mark.parametrize(
    "config",
    [AutoencoderConfig(channels=32), PRESETS["demo"].autoencoder, DEBUG],
    ids=["stable-diffusion", "demo", "debug"],
)
@torch.no_grad()
def test_agrees_with_diffusers_in_both_directions(config: AutoencoderConfig) -> None:
    model = random_model(config)
    twin = diffusers_twin(model)
    frames = random_video(2, 3, 32, 48)
    mean, logvar = model.encode_moments(frames)
    theirs = twin.encode(frames).latent_dist
    assert relative_error(mean, theirs.mean) <= 1e-5
    assert relative_error(logvar, theirs.logvar) <= 1e-5

    latents = torch.randn(2, 4, 32 // config.downscale, 48 // config.downscale)
    assert relative_error(model.decode_frames(latents), twin.decode(latents).sample) <= 1e-5


def test_default_has_stable_diffusions_parameter_count() -> None:
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == STABLE_DIFFUSION_PARAMETERS


def test_videos_are_their_frames_scaled_on_the_way_in_and_clamped_on_the_way_out() -> None:
    model = random_model(DEBUG)
    video = random_video(2, 3, 3, 8, 12)
    latents = model.encode(video)
    assert latents.shape == (2, 4, 3, 4, 6)
    mean, _ = model.encode_moments(video[1, :, 2].unsqueeze(0))
    assert relative_error(latents[1, :, 2], mean[0] * DEBUG.scale_factor) <= 1e-5

    # Far from any real latent, so that frames leave -1..1.
    latents = 100 * torch.randn_like(latents)
    frame = model.decode_frames(latents[1, :, 2].unsqueeze(0) / DEBUG.scale_factor)[0]
    assert frame.abs().max() > 1
    decoded = model.decode(latents)
    assert decoded.shape == video.shape
    assert relative_error(decoded[1, :, 2], frame.clamp(-1, 1)) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 100, None])
# A convolution may take another kernel for another batch: in float32 two chunk sizes lie about as far apart as each
# lies from float64, and float64 shows that nothing but rounding differs.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_chunks_change_nothing_but_rounding(chunk: int | None, dtype: torch.dtype, bound: float) -> None:
    model = random_model(PRESETS["demo"].autoencoder).to(dtype)
    video = random_video(1, 3, 5, 16, 24).to(dtype)
    encoded = model.encode(video, chunk=5)
    decoded = model.decode(encoded, chunk=5)
    assert relative_error(model.encode(video, chunk=chunk), encoded) <= bound
    assert relative_error(model.decode(encoded, chunk=chunk), decoded) <= bound


def test_draws_follow_the_moments_and_the_generator_whatever_the_chunk() -> None:
    model = random_model(DEBUG)
    video = random_video(1, 3, 4, 8, 12)
    mean, logvar = model.encode_moments(video[0].transpose(0, 1))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    expected = ((mean + logvar.exp().sqrt() * noise) * DEBUG.scale_factor).transpose(0, 1).unsqueeze(0)
    for chunk in (1, 3, 4):
        drawn = model.encode(video, chunk=chunk, generator=torch.Generator().manual_seed(7), sample=True)
        assert relative_error(drawn, expected) <= 1e-5


def test_log_variance_is_clamped() -> None:
    model = random_model(DEBUG)
    bias = model.quant_conv.bias
    assert bias is not None
    nn.init.constant_(bias[4:6], 1e4)
    nn.init.constant_(bias[6:], -1e4)
    _, logvar = model.encode_moments(random_video(1, 3, 8, 8))
    assert (logvar[:, :2] == 20).all()
    assert (logvar[:, 2:] == -30).all()


def test_training_methods_reach_every_parameter_and_video_methods_hold_no_graph() -> None:
    model = random_model(DEBUG)
    mean, logvar = model.encode_moments(random_video(1, 3, 8, 8))
    (model.decode_frames(mean + logvar).square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    latents = model.encode(random_video(1, 3, 1, 8, 8))
    assert not latents.requires_grad
    assert not model.decode(latents).requires_grad


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_as_many_frames_at_once_as_memory_allows(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DEBUG)
    inputs = random_video(1, 3, 6, 16, 24) if direction == "encode" else torch.randn(1, 4, 6, 8, 12)
    sizes: list[int] = []
    inner = model.encoder if direction == "encode" else model.decoder
    inner.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    # Four tensors of 16 channels at 16x24 in float32 a frame; half of what is free is used.
    frame_bytes = 4 * 16 * 16 * 24 * 4
    for free, expected in ((2 * 4 * frame_bytes, [4, 2]), (frame_bytes, [1] * 6), (1 << 40, [6])):
        monkeypatch.setattr(autoencoder, "_free_bytes", lambda _, free=free: free)
        sizes.clear()
        getattr(model, direction)(inputs)
        assert sizes == expected

    # Kernels with 32-bit indices limit a chunk even where memory does not.
    monkeypatch.setattr(autoencoder, "MAX_TENSOR_ELEMENTS", 5 * 16 * 16 * 24)
    sizes.clear()
    getattr(model, direction)(inputs)
    assert sizes == [5, 1]


def test_free_memory_is_known_or_assumed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autoencoder._free_bytes(torch.device("cpu")) > 0
    monkeypatch.delattr("os.sysconf_names", raising=False)
    assert autoencoder._free_bytes(torch.device("cpu")) == autoencoder.ASSUMED_FREE_BYTES


@pytest.mark.parametrize(("height", "width"), [(36, 64), (32, 60), (7, 7)])
def test_sizes_off_the_grid_are_refused_with_the_fix(height: int, width: int) -> None:
    model = random_model(PRESETS["demo"].autoencoder)
    with pytest.raises(ValueError, match=f"{width}x{height}.*multiples of 8"):
        model.encode(torch.zeros(1, 3, 1, height, width), chunk=1)
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode_moments(torch.zeros(1, 3, height, width))


def test_every_layer_with_weights_comes_from_the_injected_operations() -> None:
    class Conv2d(nn.Conv2d):
        pass

    class GroupNorm(nn.GroupNorm):
        pass

    model = random_model(DEBUG, operations=SimpleNamespace(Conv2d=Conv2d, GroupNorm=GroupNorm))
    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    assert owners
    assert {type(module) for module in owners} == {Conv2d, GroupNorm}


def test_attention_goes_through_the_injected_callable() -> None:
    calls: list[tuple[tuple[int, ...], int]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        calls.append((tuple(q.shape), heads))
        return ops.attention(q, k, v, heads, mask)

    model = random_model(DEBUG, attention=attention)
    model.decode(model.encode(random_video(1, 3, 2, 8, 12), chunk=2), chunk=2)
    # One in the encoder and one in the decoder, on 4x6 cells of 16 channels.
    assert calls == [((2, 24, 16), 1)] * 2
