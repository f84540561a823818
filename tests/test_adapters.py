"""LoRA: nothing at first, then exactly the change of weights that its file holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from videofactory_train.cli import main

from videofactory_core import adapters, checkpoint, lora_names
from videofactory_core.adapters import Adapter
from videofactory_core.checkpoint import DEMO, CheckpointError, Model
from videofactory_core.config import PRESETS, ModelConfig, UNetConfig
from videofactory_core.unet.model import VideoUNet
from videofactory_core.video import read_video

CONFIG = PRESETS["debug"].unet


def opened(module: nn.Module) -> nn.Module:
    """A layer that starts at zero would let no change through."""
    for parameter in module.parameters():
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval()


def network() -> VideoUNet:
    torch.manual_seed(0)
    model = VideoUNet(CONFIG)
    opened(model)
    return model


@torch.no_grad()
def predict(model: VideoUNet) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, CONFIG.in_channels, 4, 4, 8, generator=generator)
    context = torch.randn(1, 5, CONFIG.context_dim, generator=generator)
    return model(x, torch.tensor([500]), context)


@pytest.mark.parametrize("layers", ["temporal", "merge", "attn2", ".", r"^input_blocks\.1\..*ff"])
def test_a_file_holds_what_the_model_calculates_with(tmp_path: Path, layers: str) -> None:
    plain, model = network(), network()
    adapter = Adapter(model, layers, rank=2, alpha=3.0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(predict(model), predict(plain))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.half().float()
    changed = predict(model)
    assert (changed - predict(plain)).abs().max() > 1e-2

    adapters.save(tmp_path / "lora.safetensors", adapter, "a title", "MIT", "a test")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file, torch.no_grad():
        names = {key.rsplit(".lora_", 1)[0] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
        assert len(names) == len(adapter.names)
        for name in names:
            down, up = (file.get_tensor(f"{name}.lora_{part}.weight").float() for part in ("down", "up"))
            layer = plain.get_submodule(name.removeprefix("diffusion_model."))
            layer.weight += up @ down * file.get_tensor(f"{name}.alpha") / len(down)
        assert file.metadata()["modelspec.license"] == "MIT"
    assert torch.allclose(predict(plain), changed, rtol=1e-5, atol=1e-5)


def test_a_change_can_be_taken_away_again_and_keeps_to_the_layers_type() -> None:
    model = network()
    before = predict(model)
    adapter = Adapter(model, "attn", rank=2, alpha=2.0)
    for weight in adapter.parameters():
        nn.init.normal_(weight, std=0.1)
    assert not torch.equal(predict(model), before)
    adapter.remove()
    assert torch.equal(predict(model), before)
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    change = Adapter(nn.Sequential(layer), "0", rank=2, alpha=2.0).changes[0]
    assert change(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert next(change.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [("temporal", 0, "rank"), ("nowhere", 4, "no linear layer"), ("(", 4, "regular expression")],
)
def test_what_changes_nothing_is_refused(layers: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(network(), layers, rank, 1.0)


# Merging: numbers

# Stable Diffusion 1.5 in narrow: every block, every kind of layer.
NARROW = replace(
    PRESETS["sd15"],
    unet=replace(PRESETS["sd15"].unet, model_channels=16, context_dim=16, norm_groups=8, swap_window=(2, 2, 3)),
    autoencoder=PRESETS["debug"].autoencoder,
    text=replace(PRESETS["debug"].text, layers=2),
)
# With motion modules wherever AnimateDiff has some.
MOVED = replace(NARROW, unet=replace(NARROW.unet, temporal_conv=False, temporal_attention_behind="blocks", merge="add"))
CONFIGS = {"debug": PRESETS["debug"], "sd15": NARROW, "animatediff": MOVED}

# Layers, one of each kind: diffusers' name of a place, ours, and what both call the layer inside.
LAYERS = {
    "debug": [
        ("conv_in", "input_blocks.0.0", ""),
        ("time_embedding.linear_2", "time_embed.2", ""),
        ("down_blocks.0.attentions.0", "input_blocks.1.1", ".proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op", ""),
        ("down_blocks.1.resnets.0.time_emb_proj", "input_blocks.3.0.emb_layers.1", ""),
        ("down_blocks.1.attentions.0", "input_blocks.3.1", ".transformer_blocks.0.attn2.to_k"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3", ""),
        ("mid_block.attentions.0", "middle_block.1", ".transformer_blocks.0.attn1.to_out.0"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv", ""),
        ("up_blocks.1.resnets.1.conv_shortcut", "output_blocks.3.0.skip_connection", ""),
        ("up_blocks.1.attentions.0", "output_blocks.2.1", ".transformer_blocks.0.ff.net.0.proj"),
        ("down_blocks.0.motion_modules.0", "input_blocks.1.1.temporal", ".transformer_blocks.0.attn1.to_q"),
        ("mid_block.motion_modules.0", "middle_block.1.temporal", ".transformer_blocks.0.attn2.to_k"),
        ("up_blocks.1.motion_modules.1", "output_blocks.3.1.temporal", ".transformer_blocks.0.attn2.to_out.0"),
    ],
    "sd15": [
        ("conv_out", "out.2", ""),
        ("time_embedding.linear_1", "time_embed.0", ""),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", ""),
        ("down_blocks.1.resnets.1.conv1", "input_blocks.5.0.in_layers.2", ""),
        ("down_blocks.2.attentions.0", "input_blocks.7.1", ".proj_out"),
        ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3", ""),
        ("mid_block.attentions.0", "middle_block.1", ".transformer_blocks.0.attn2.to_v"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv", ""),
        ("up_blocks.1.attentions.2", "output_blocks.5.1", ".transformer_blocks.0.attn1.to_out.0"),
        ("up_blocks.2.upsamplers.0.conv", "output_blocks.8.2.conv", ""),
        ("up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection", ""),
        ("down_blocks.1.motion_modules.1", "input_blocks.5.1.temporal", ".transformer_blocks.0.attn1.to_v"),
        ("up_blocks.3.motion_modules.0", "output_blocks.9.1.temporal", ".transformer_blocks.0.attn2.to_out.0"),
    ],
    "animatediff": [
        ("down_blocks.0.attentions.1", "input_blocks.2.1", ".transformer_blocks.0.attn1.to_q"),
        ("down_blocks.2.motion_modules.1", "input_blocks.8.1.temporal", ".transformer_blocks.0.attn1.to_k"),
        ("down_blocks.3.motion_modules.1", "input_blocks.11.0.temporal", ".transformer_blocks.0.attn2.to_out.0"),
        ("mid_block.motion_modules.0", "middle_block.1.temporal", ".transformer_blocks.0.attn1.to_v"),
        ("up_blocks.0.motion_modules.2", "output_blocks.2.0.temporal", ".transformer_blocks.0.attn2.to_q"),
    ],
}
TEXT_LAYERS = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc2"]
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def flat(name: str) -> str:
    return name.replace(".", "_")


def processor(name: str) -> str:
    return name.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")


def original(name: str) -> str:
    """AnimateDiff's own name of a layer."""
    name = processor(name).replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")
    return name.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")


def in_file(naming: str, theirs: str, ours: str) -> str | None:
    """A U-Net's layer as a file calls it, None where files of this naming have no such layer."""
    match naming:
        case "ours":
            return f"diffusion_model.{ours}"
        case "kohya over ldm":
            return f"lora_unet_{flat(ours)}"
        case "kohya over diffusers":
            return f"lora_unet_{flat(theirs)}"
        case "peft alone":
            return f"base_model.model.{theirs}"
        case "peft inside":
            return f"unet.base_model.model.{theirs}"
        case "processors":
            return f"unet.{processor(theirs)}" if ".to_" in theirs else None
        case "motion":
            return original(theirs) if "motion" in theirs else None
    return f"unet.{theirs}"


# How files call a text encoder's layer, and the ends of the keys.
NAMINGS: dict[str, tuple[Callable[[str], str | None], tuple[str, str]]] = {
    "ours": (lambda name: f"text_encoders.clip_l.transformer.{name}", KOHYA),
    "kohya over ldm": (lambda name: f"lora_te_{flat(name)}", KOHYA),
    "kohya over diffusers": (lambda name: f"lora_te_{flat(name)}", KOHYA),
    "peft": (lambda name: f"text_encoder.{name}", PEFT),
    "peft of transformers 5": (lambda name: f"text_encoder.{name.removeprefix('text_model.')}", PEFT),
    "peft alone": (lambda name: None, PEFT),
    "peft inside": (lambda name: f"text_encoder.base_model.model.{name}", PEFT),
    "diffusers": (lambda name: f"text_encoder.{name}", (".lora.down.weight", ".lora.up.weight")),
    "linear layers": (
        lambda name: f"text_encoder.{name}",
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "processors": (lambda name: None, ("_lora.down.weight", "_lora.up.weight")),
    "motion": (lambda name: None, ("_lora.down.weight", "_lora.up.weight")),
}


def layers_of(naming: str, config: str) -> Iterator[tuple[str, str]]:
    """Names of layers in a file and in our model."""
    for theirs, ours, inside in LAYERS[config]:
        if (name := in_file(naming, theirs + inside, ours + inside)) is not None:
            yield name, f"unet.{ours}{inside}"
    for layer in TEXT_LAYERS:
        if (name := NAMINGS[naming][0](layer)) is not None:
            yield name, f"text_encoder.{layer}"


def built(config: ModelConfig) -> Model:
    torch.manual_seed(0)
    model = checkpoint.build(config)
    for module in model.parts().values():
        opened(module)
    return model


def part(model: Model, path: str) -> nn.Module:
    return nn.ModuleDict(model.parts()).get_submodule(path)


@torch.no_grad()
def sampled(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    return model.unet(x, torch.tensor([500]), model.text_encoder(torch.tensor([[49406, 320, 1125, 49407]])))


def halves(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """Random `down` and `up` for a linear layer or a convolution, as programs train them."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    ones = (1,) * (layer.weight.ndim - 2)
    return (
        torch.randn(rank, *layer.weight.shape[1:]) * layer.weight[0].numel() ** -0.5,
        torch.randn(len(layer.weight), rank, *ones) * 0.3,
    )


def add_beside(layer: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
    """Calculate with a change without touching the weight."""

    def added(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return output + scale * F.linear(F.linear(inputs[0], down), up)
        return output + scale * F.conv2d(F.conv2d(inputs[0], down, None, module.stride, module.padding), up)

    layer.register_forward_hook(added)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_changes_the_layers_that_it_names(tmp_path: Path, naming: str, config: str) -> None:
    merged = built(CONFIGS[config])
    beside, plain = deepcopy(merged), deepcopy(merged)
    down_end, up_end = NAMINGS[naming][1]
    tensors = {}
    for name, ours in layers_of(naming, config):
        down, up = halves(part(merged, ours), rank=2)
        tensors |= {name + down_end: down, name + up_end: up}
        scale = 1.0
        if down_end == ".lora_down.weight":
            # kohya writes it as a number of either kind.
            tensors[f"{name}.alpha"] = torch.tensor(3.0 if config == "debug" else 3)
            scale = 1.5
        add_beside(part(beside, ours), down, up, 0.7 * scale)
    save_file(tensors, tmp_path / "lora.safetensors")

    report = adapters.merge(merged, adapters.read(tmp_path / "lora.safetensors"), 0.7)
    assert set(report.matched) == set(tensors)
    assert report.unmatched == ()
    assert (sampled(beside) - sampled(plain)).abs().max() > 1e-2
    assert torch.allclose(sampled(merged), sampled(beside), rtol=1e-4, atol=1e-4)

    adapters.merge(merged, adapters.read(tmp_path / "lora.safetensors"), -0.7)
    for name, module in merged.parts().items():
        for restored, before in zip(module.parameters(), plain.parts()[name].parameters(), strict=True):
            assert torch.allclose(restored, before, rtol=0, atol=1e-6)


def image_config(config: UNetConfig) -> UNetConfig:
    return replace(config, temporal_conv=False, temporal_attention=False, temporal_skips=False)


def diffusers_twin(config: UNetConfig) -> Any:
    attention = [depth > 0 for depth in config.transformer_depth]
    return diffusers.UNet2DConditionModel(
        block_out_channels=[config.model_channels * m for m in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        cross_attention_dim=config.context_dim,
        attention_head_dim=[config.heads(config.model_channels * m) for m in config.channel_mult],
        norm_num_groups=config.norm_groups,
        use_linear_projection=config.use_linear_in_transformer,
    ).eval()


def changeable(module: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize("config", [CONFIG, NARROW.unet, PRESETS["demo"].unet], ids=["debug", "sd15", "demo"])
def test_every_layer_of_the_image_network_has_diffusers_name(tmp_path: Path, config: UNetConfig) -> None:
    torch.manual_seed(0)
    model = built(PRESETS["debug"])
    model.unet = VideoUNet(image_config(config)).eval()
    model.config = replace(
        model.config, unet=model.unet.config, text=replace(model.config.text, width=config.context_dim)
    )
    opened(model.unet)
    twin = diffusers_twin(config)
    state = {f"model.diffusion_model.{key}": value for key, value in model.unet.state_dict().items()}
    twin.load_state_dict(convert_ldm_unet_checkpoint(state, dict(twin.config)))

    ours, theirs = changeable(model.unet), changeable(twin)
    names = lora_names.layers(model.unet, model.text_encoder)
    text = changeable(model.text_encoder.text_model)
    assert set(names) == {flat(name) for name in (*ours, *theirs, *text)}
    assert {names[flat(name)] for name in theirs} == set(ours.values())

    tensors = {}
    with torch.no_grad():
        for name, layer in theirs.items():
            down, up = halves(layer, rank=3)
            tensors |= {f"lora_unet_{flat(name)}{end}": half for end, half in zip(KOHYA, (down, up), strict=True)}
            layer.weight += 0.5 * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert len(adapters.merge(model, adapters.read(tmp_path / "lora.safetensors"), 0.5).matched) == len(tensors)
    for layer, other in ((names[flat(name)], layer) for name, layer in theirs.items()):
        assert torch.allclose(layer.weight, other.weight, atol=1e-6)
    x, context = torch.randn(1, 4, 1, 16, 16), torch.randn(1, 5, config.context_dim)
    with torch.no_grad():
        expected = twin(x[:, :, 0], 500, context).sample
        found = model.unet(x, torch.tensor([500]), context)[:, :, 0]
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_motion_modules_have_diffusers_names() -> None:
    names = lora_names.layers(VideoUNet(MOVED.unet), built(PRESETS["debug"]).text_encoder)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32, 64, 64), motion_num_attention_heads=8, motion_norm_num_groups=8
    )
    assert {name for name in names if "motion" in name} == {flat(name) for name in changeable(adapter)}


def test_the_demo_takes_its_lora() -> None:
    path = DEMO.parent / "loras" / "videofactory-demo-boomerang.safetensors"
    model, plain = checkpoint.load(DEMO), checkpoint.load(DEMO)
    lora = adapters.read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = adapters.merge(model, lora)
    assert len(report.matched) == len(checkpoint.read_header(path).shapes)
    assert (sampled(model) - sampled(plain)).abs().max() > 1e-2
    assert model.metadata.title == plain.metadata.title
    assert model.metadata.licence == "Apache-2.0"
    assert model.metadata.origin.startswith(f"{plain.metadata.origin}; LoRA VideoFactory demo LoRA: there and back at")
    assert model.metadata.other == plain.metadata.other


def test_a_model_in_half_precision_keeps_it(tmp_path: Path) -> None:
    write(
        tmp_path / "lora.safetensors",
        {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (8, 2, 1, 1)},
    )
    lora = adapters.read(tmp_path / "lora.safetensors")
    whole, half = built(PRESETS["debug"]), built(PRESETS["debug"]).to(dtype=torch.float16)
    before = half.unet.state_dict()["input_blocks.0.0.weight"].clone()
    adapters.merge(whole, lora)
    adapters.merge(half, lora)
    weight = half.unet.state_dict()["input_blocks.0.0.weight"]
    assert weight.dtype == torch.float16
    assert not torch.equal(weight, before)
    assert torch.allclose(weight.float(), whole.unet.state_dict()["input_blocks.0.0.weight"], atol=2e-3)


def test_a_host_may_flatten_kernels(tmp_path: Path) -> None:
    write(
        tmp_path / "a.safetensors",
        {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (8, 2, 1, 1)},
    )
    write(tmp_path / "b.safetensors", {"unet.conv_in.lora_A.weight": (2, 36), "unet.conv_in.lora_B.weight": (8, 2)})
    a, b = built(PRESETS["debug"]), built(PRESETS["debug"])
    adapters.merge(a, adapters.read(tmp_path / "a.safetensors"))
    adapters.merge(b, adapters.read(tmp_path / "b.safetensors"))
    assert torch.equal(sampled(a), sampled(b))


@pytest.mark.parametrize(
    ("stated", "alpha"),
    [
        ('{"unet.lora_alpha": 8}', 8),
        ('{"unet.lora_alpha": null}', 2),
        ("[]", 2),
        ("{", 2),
        ('{"text_encoder.lora_alpha": 8}', 2),
    ],
)
def test_alpha_is_the_header_s_or_the_rank(tmp_path: Path, stated: str, alpha: float) -> None:
    write(
        tmp_path / "lora.safetensors",
        {"unet.conv_in.lora_A.weight": (2, 36), "unet.conv_in.lora_B.weight": (8, 2)},
        {"lora_adapter_metadata": stated},
    )
    assert adapters.read(tmp_path / "lora.safetensors").changes["unet.conv_in"].alpha == alpha


# Merging: what a file is not


def write(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    save_file({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, path, metadata)
    return path


def pair(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_down.weight": (2, into), f"{name}.lora_up.weight": (out, 2)}


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn"
FITTING = pair(f"{KEY}1_to_q", 8, 8)


def refusal(call: Callable[[], Any]) -> str:
    """The message of an error, which is one line with what to do."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "; " in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (pair(f"{KEY}2_to_k", 8, 2048), "was made for Stable Diffusion XL, with text features of 2048 numbers"),
        (FITTING | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 8, 8), "was made for Stable Diffusion XL"),
        (pair(f"{KEY}2_to_v", 8, 768), "was made for Stable Diffusion 1.x, with text features of 768 numbers where"),
        (pair(f"{KEY}2_to_v", 8, 1024), "was made for Stable Diffusion 2.x"),
        (pair(f"{KEY}2_to_v", 8, 99), "was made for another model, with text features of 99 numbers"),
        (FITTING | pair(f"{KEY}1_to_k", 320, 320), "as 320 x 320 numbers where this model has 8 x 8"),
        (
            pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 768),
            "as 8 x 768 numbers where this model has 64 x 16",
        ),
        (
            pair("transformer.double_blocks.0.img_attn.proj", 8, 8),
            "changes no layer of this model, only others such as",
        ),
    ],
)
def test_a_lora_for_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    model, plain = built(PRESETS["debug"]), built(PRESETS["debug"])
    lora = adapters.read(write(tmp_path / "lora.safetensors", shapes))
    found = refusal(lambda: adapters.merge(model, lora))
    assert message in found
    assert found.endswith("use a LoRA that was made for this model")
    assert torch.equal(sampled(model), sampled(plain))
    assert model.metadata == plain.metadata


def test_a_refusal_names_the_base_that_fits(tmp_path: Path) -> None:
    config = replace(NARROW, unet=replace(NARROW.unet, context_dim=768), text=replace(NARROW.text, width=768))
    lora = adapters.read(write(tmp_path / "lora.safetensors", pair(f"{KEY}2_to_k", 16, 1024)))
    message = refusal(lambda: adapters.merge(checkpoint.build(config), lora))
    assert message.endswith("where this model has 768; use a LoRA that was made for Stable Diffusion 1.x")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (FITTING | {f"{KEY}1_to_q.dora_scale": (8, 1)}, "is a DoRA, which cannot be merged"),
        (FITTING | {f"{KEY}1_to_q.lora_magnitude_vector": (8,)}, "is a DoRA, which cannot be merged"),
        (FITTING | {f"{KEY}1_to_q.lora_mid.weight": (2, 2, 3, 3)}, "is a LoCon with middle layers"),
        ({f"{KEY}1_to_q.hada_w1_a": (8, 2), f"{KEY}1_to_q.hada_w1_b": (2, 8)}, "is a LoHa, which"),
        ({f"{KEY}1_to_q.lokr_w1": (2, 2), f"{KEY}1_to_q.lokr_w2": (4, 4)}, "is a LoKr, which"),
        (
            {"first_stage_model.decoder.conv_in.weight": (2, 2)},
            "has no LoRA under names known here (it looks like a file of unknown kind)",
        ),
        ({f"{KEY}1_to_q.lora_down.weight": (2, 8)}, "is damaged"),
        ({f"{KEY}1_to_q.lora_down.weight": (2, 8), f"{KEY}1_to_q.lora_up.weight": (8, 3)}, "is damaged"),
        ({f"{KEY}1_to_q.lora_down.weight": (0, 8), f"{KEY}1_to_q.lora_up.weight": (8, 0)}, "is damaged"),
        ({f"{KEY}1_to_q.lora_down.weight": (2,), f"{KEY}1_to_q.lora_up.weight": (8, 2)}, "is damaged"),
        (FITTING | {f"{KEY}1_to_q.alpha": (3,)}, "is damaged"),
    ],
)
def test_what_is_no_pair_of_matrices_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    assert message in refusal(lambda: adapters.read(write(tmp_path / "lora.safetensors", shapes)))


def test_a_pickle_of_tensors_is_read_like_a_safetensors_file(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", FITTING)
    torch.save(load_file(path), tmp_path / "lora.ckpt")
    one, other = adapters.read(path), adapters.read(tmp_path / "lora.ckpt")
    assert one.changes.keys() == other.changes.keys()
    assert all(torch.equal(one.changes[name].up, other.changes[name].up) for name in one.changes)


def test_the_command_merges_and_generates_with_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boomerang = DEMO.parent / "loras" / "videofactory-demo-boomerang.safetensors"
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", "--checkpoint", str(DEMO), "--lora", f"{boomerang}:0.5", "--out", str(merged)]) == 0
    assert checkpoint.read_header(merged).dtypes == checkpoint.read_header(DEMO).dtypes
    assert "there and back at strength 0.5" in checkpoint.explain(merged).origin

    clips = {}
    for name, more in (
        ("plain", []),
        ("lora", ["--lora", f"{boomerang}:0.5"]),
        ("merged", ["--checkpoint", str(merged)]),
    ):
        out = tmp_path / f"{name}.mp4"
        command = ["generate", "a red circle moving up on a black background", "--out", str(out), "--steps", "4"]
        assert main([*command, *more]) == 0
        clips[name] = read_video(out).frames

    def distance(a: str, b: str) -> float:
        return float((clips[a] - clips[b]).abs().mean())

    # The merged file is in half precision, and video codecs round.
    assert distance("lora", "merged") < 0.2 * distance("lora", "plain")

    capsys.readouterr()
    assert main(["merge", "--checkpoint", str(merged), "--lora", str(boomerang), "--out", str(merged)]) == 2
    assert "is one of the files to merge" in capsys.readouterr().err


def test_broken_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a.lora_down.weight": torch.ones(2, 2), "run": print}, tmp_path / "lora.ckpt")
    assert "is a pickle that holds more than tensors" in refusal(lambda: adapters.read(tmp_path / "lora.ckpt"))
    whole = write(tmp_path / "lora.safetensors", FITTING).read_bytes()
    for length in (20, len(whole) - 1):
        (tmp_path / "lora.safetensors").write_bytes(whole[:length])
        assert "is truncated" in refusal(lambda: adapters.read(tmp_path / "lora.safetensors"))
    assert "does not exist" in refusal(lambda: adapters.read(tmp_path / "nowhere.safetensors"))
    save_file({key: torch.ones(shape, dtype=torch.int8) for key, shape in FITTING.items()}, tmp_path / "a.safetensors")
    assert "is damaged" in refusal(lambda: adapters.read(tmp_path / "a.safetensors"))
    assert "looks like a VideoFactory model" in refusal(lambda: adapters.read(DEMO))
    save_file({key: torch.full(shape, torch.nan) for key, shape in FITTING.items()}, tmp_path / "a.safetensors")
    assert "not finite" in refusal(lambda: adapters.read(tmp_path / "a.safetensors"))


def test_keys_without_a_layer_are_told(tmp_path: Path) -> None:
    strangers = pair("lora_unet_nowhere\x1b[2J", 8, 8) | {f"{KEY}1_to_q.diff_b": (8,), "lora_unet_conv_in.alpha": (1,)}
    lora = adapters.read(write(tmp_path / "lora.safetensors", FITTING | strangers))
    with pytest.warns(UserWarning, match=r"has 4 keys without a layer in this model, such as ") as caught:
        report = adapters.merge(built(PRESETS["debug"]), lora)
    assert set(report.matched) == set(FITTING)
    assert set(report.unmatched) == set(strangers)
    message = str(caught[0].message)
    assert message.count("lora_unet_") == 3
    assert message.isprintable()


def test_a_strength_is_a_number(tmp_path: Path) -> None:
    lora = adapters.read(write(tmp_path / "lora.safetensors", FITTING))
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            adapters.merge(built(PRESETS["debug"]), lora, strength)


def test_a_merged_model_says_so(tmp_path: Path) -> None:
    metadata = {"modelspec.title": "rain", "modelspec.license": "CC-BY-4.0", "origin": "a painter", "x": "y"}
    lora = adapters.read(write(tmp_path / "lora.safetensors", FITTING, metadata))
    nameless = adapters.read(write(tmp_path / "drops.safetensors", FITTING))
    model = built(PRESETS["debug"])
    adapters.merge(model, lora, 0.5)
    adapters.merge(model, nameless)
    checkpoint.save(tmp_path / "merged.safetensors", model, model.metadata)
    found = checkpoint.load(tmp_path / "merged.safetensors").metadata
    assert found.licence == "unknown; rain: CC-BY-4.0; drops: unknown"
    assert found.origin == (
        "random initialisation; LoRA rain at strength 0.5: a painter; LoRA drops at strength 1: unknown"
    )
