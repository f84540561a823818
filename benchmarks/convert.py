"""Public weights at full size, random ones: the same outputs as their own classes, time and memory, and the command."""

from __future__ import annotations

import filecmp
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import PRESETS, UNetConfig
from videofactory_core.convert import convert
from videofactory_core.text import TextEncoder
from videofactory_core.unet.model import VideoUNet

from .unet import DTYPE, build, compare, describe_machine, forward

Inputs = tuple[Tensor, Tensor, Tensor]


def fill(module: Any) -> Any:
    """Random weights that let every layer have an effect, also those that start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1, generator=generator)
    return module.eval()


def inputs(width: int, num_frames: int, side: int = 16) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, num_frames, side, side, generator=generator)
    return x, torch.tensor([600]), torch.randn(1, 77, width, generator=generator)


def image(width: int) -> Any:
    from diffusers import UNet2DConditionModel

    if width == 768:
        return fill(UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8))
    heads = (5, 10, 20, 20)
    return fill(UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True))


def frames(unet: Any, given: Inputs) -> Tensor:
    """An image network on every frame."""
    x, t, context = given
    return torch.stack([unet(x[:, :, f], t, context).sample for f in range(x.shape[2])], 2)


# Modules by the file that they are written to, an input, and what they make of it.
Case = tuple[dict[str, Any], Inputs, Callable[[], Tensor]]


def stable_diffusion(width: int) -> Case:
    unet, given = image(width), inputs(width, 2)
    return {"base": unet}, given, lambda: frames(unet, given)


def modelscope_case() -> Case:
    from diffusers import UNet3DConditionModel

    unet, given = fill(UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64)), inputs(1024, 16)
    return {"base": unet}, given, lambda: unet(*given).sample


def animatediff(middle: bool) -> Case:
    from diffusers import MotionAdapter, UNetMotionModel

    base, motion = image(768), fill(MotionAdapter(use_motion_mid_block=middle))
    whole: Any = UNetMotionModel.from_unet2d(base, motion).eval()
    x, t, context = given = inputs(768, 16)
    # Their class wants the prompt once a frame.
    return {"base": base, "motion": motion}, given, lambda: whole(x, t, context.expand(16, -1, -1)).sample


CASES: dict[str, Callable[[], Case]] = {
    "Stable Diffusion 1.5": lambda: stable_diffusion(768),
    "Stable Diffusion 2.1": lambda: stable_diffusion(1024),
    "ModelScope, ZeroScope": modelscope_case,
    "AnimateDiff 2": lambda: animatediff(True),
    "AnimateDiff 3": lambda: animatediff(False),
}


def write_case(case: Case, folder: Path) -> tuple[dict[str, Path], Inputs, Tensor]:
    """The weights as files, an input, and what their own class makes of it; afterwards memory is free again."""
    modules, given, run = case
    paths = {part: folder / f"{part}.safetensors" for part in modules}
    for part, module in modules.items():
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, paths[part])
    return paths, given, run()


def write_rest(folder: Path, width: int) -> dict[str, Path]:
    """The two parts that these networks lack, at their released sizes."""
    preset = PRESETS["sd15" if width == 768 else "sd21"]
    found = {"autoencoder": folder / "vae.safetensors", "text_encoder": folder / f"text-{width}.safetensors"}
    save_file(Autoencoder(preset.autoencoder).state_dict(), found["autoencoder"])
    save_file(TextEncoder(preset.text).state_dict(), found["text_encoder"])
    return found


@torch.no_grad()
def parity() -> None:
    """Relative errors in float32, with Swap-Attention at its start."""
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            paths, given, expected = write_case(case(), Path(folder))
            rest = write_rest(Path(folder), given[2].shape[-1])
            conversion = convert(**paths, **rest, prediction_type="epsilon", swap_attention=True)
            # As diffusers' norms run over the clip, AnimateDiff's own over a frame.
            with torch.device("meta"):
                unet = VideoUNet(replace(conversion.config.unet, temporal_norm="clip")).eval()
            unet.load_state_dict(conversion.read("unet"), assign=True)
        found = unet(*given)
        size = sum(p.numel() for p in unet.parameters()) / 1e9
        print(
            f"{name:<24}{size:6.3f} G   relative error {float((found - expected).norm() / expected.norm()):.1e}",
            flush=True,
        )


@torch.no_grad()
def parity_of_parts() -> None:
    """Autoencoder and text encoders at their released sizes, against diffusers, transformers and open_clip."""
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae: Any = fill(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels))
    settings = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    openai: Any = fill(CLIPTextModel(CLIPTextConfig(**settings)))
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    laion: Any = fill(open_clip.model.CLIP(1024, vision, {"width": 1024, "heads": 16, "layers": 24}))
    tokens = torch.tensor([[49406, 320, 1929, *[49407] * 74]])
    x = laion.token_embedding(tokens) + laion.positional_embedding
    for block in laion.transformer.resblocks[:-1]:
        x = block(x, attn_mask=laion.attn_mask)
    features = {768: (openai, openai(tokens).last_hidden_state), 1024: (laion, laion.ln_final(x))}
    picture = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = vae.encode(picture).latent_dist.mean

    def report_error(name: str, found: Tensor, expected: Tensor) -> None:
        print(f"{name:<24}{'':9}relative error {float((found - expected).norm() / expected.norm()):.1e}", flush=True)

    for width, (text, expected) in features.items():
        base = UNet2DConditionModel(
            block_out_channels=(64, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            use_linear_projection=width == 1024,
        )
        with tempfile.TemporaryDirectory() as folder:
            modules = {"base": base, "autoencoder": vae, "text_encoder": text}
            paths = {name: Path(folder) / f"{name}.safetensors" for name in modules}
            for name, module in modules.items():
                save_file({key: value.contiguous() for key, value in module.state_dict().items()}, paths[name])
            model = convert(**paths, temporal=False, prediction_type="epsilon").load()
        report_error(f"text encoder {width}", model.text_encoder(tokens), expected)
    report_error("encoder", model.autoencoder.encode_moments(picture)[0], mean)
    report_error("decoder", model.autoencoder.decode_frames(mean), vae.decode(mean).sample)


MODELSCOPE = UNetConfig(temporal_attention_in=True, temporal_skips=False, fusion="add", merge="add")


def modelscope(ours: bool) -> nn.Module:
    if ours:
        return build(MODELSCOPE)
    from diffusers import UNet3DConditionModel

    # Memory for half precision alone: building in float32 first would be the peak.
    with torch.device("meta"):
        unet: Any = UNet3DConditionModel(cross_attention_dim=1024, attention_head_dim=64).to(DTYPE)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(std=0.02)
    return unet.eval()  # type: ignore[no-any-return]


def modelscope_inputs() -> Inputs:
    return torch.randn(1, 4, 16, 24, 40, dtype=DTYPE), torch.tensor([500]), torch.randn(1, 77, 1024, dtype=DTYPE)


def peak(ours: bool) -> None:
    """Print the GiB that one forward pass adds to a process that holds the weights."""
    unet = modelscope(ours)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        unet(*modelscope_inputs())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


def speed() -> None:
    """The same network in our classes and in diffusers'."""
    given = modelscope_inputs()
    nets = {"diffusers UNet3DConditionModel": modelscope(False), "ours": modelscope(True)}
    compare({name: forward(net, *given) for name, net in nets.items()})


def command() -> None:
    """Memory of `videofactory convert`, and whether it gives the same bytes again."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        unet = fill(VideoUNet(replace(PRESETS["sd21"].unet, temporal_conv=False, temporal_attention=False)))
        save_file(unet.state_dict(), here / "sd21.safetensors")
        del unet
        rest = write_rest(here, 1024)
        made = [here / f"out{number}.safetensors" for number in range(2)]
        for out in made:
            arguments = ["convert", "--base", here / "sd21.safetensors", "--vae", rest["autoencoder"]]
            arguments += ["--text-encoder", rest["text_encoder"], "--prediction-type", "epsilon", "--out", out]
            code = (
                "import resource, sys; from videofactory_train.cli import main; code = main(sys.argv[1:]);"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
            )
            ran = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)
            peak_bytes = int(ran.stdout.split()[-1]) * 1024
            size = out.stat().st_size
            print(f"convert: {size / 1e9:.2f} GB written, peak memory {peak_bytes / size:.2f} of that", flush=True)
        print("the same bytes again" if filecmp.cmp(*made, shallow=False) else "other bytes the second time")


def report() -> None:
    describe_machine()
    command()
    parity_of_parts()
    parity()
    for ours in (False, True):
        code = f"from benchmarks.convert import peak; peak({ours})"
        ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        print(f"{'ours' if ours else 'diffusers':<12}{float(ran.stdout.split()[-1]):6.2f} GiB more in a forward pass")
    speed()
