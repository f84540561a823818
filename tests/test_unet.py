"""The U-Net: sizes, identity at the start, Swap-CA against a loop over tokens, image U-Nets against diffusers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from videofactory_core import ops
from videofactory_core.config import PRESETS, UNetConfig
from videofactory_core.unet import windows
from videofactory_core.unet.attention import CrossAttention
from videofactory_core.unet.conditioning import Hooks
from videofactory_core.unet.model import VideoUNet
from videofactory_core.unet.swap_attention import SparseCausalAttention, SwapAttention
from videofactory_core.unet.temporal import TemporalTransformer

DEBUG = PRESETS["debug"].unet
MERGES = ["swap", "window_self", "sparse_causal", "mixture", "fuse", "add"]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every weight, the zero-initialised ones too, with small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


def inputs(config: UNetConfig, frames: int = 5, height: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, frames, height, width, generator=generator)
    return x, torch.tensor([7, 800]), torch.randn(2, 9, config.context_dim, generator=generator)


def parameters(config: UNetConfig) -> float:
    return sum(p.numel() for p in VideoUNet(config, device="meta").parameters()) / 1e9


@pytest.mark.parametrize("window", [(8, 3, 6), None])
def test_parameters_match_table_2(window: tuple[int, int, int] | None) -> None:
    sd21 = PRESETS["sd21"].unet
    assert parameters(replace(sd21, swap_window=window)) == pytest.approx(1.601, abs=0.002)


def test_parameters_match_table_2_without_swap_attention() -> None:
    assert parameters(replace(PRESETS["sd21"].unet, merge="fuse")) == pytest.approx(1.480, abs=0.002)


def image_config(config: UNetConfig) -> UNetConfig:
    return replace(config, temporal_conv=False, temporal_attention=False, temporal_skips=False)


@pytest.mark.parametrize("merge", MERGES)
def test_fresh_video_network_is_the_image_network_frame_by_frame(merge: str) -> None:
    torch.manual_seed(0)
    config = replace(DEBUG, merge=merge)
    video, image = VideoUNet(config), VideoUNet(image_config(config))
    image.load_state_dict({k: v for k, v in video.state_dict().items() if k in image.state_dict()})
    x, t, context = inputs(config)
    frames = [image(x[:, :, i : i + 1], t, context) for i in range(x.shape[2])]
    assert relative_error(video(x, t, context), torch.cat(frames, dim=2)) <= 1e-6


@pytest.mark.parametrize("merge", [m for m in MERGES if m not in ("add", "mixture", "fuse")])
def test_merge_with_zero_output_is_addition(merge: str) -> None:
    config = replace(DEBUG, merge=merge)
    merged, added = VideoUNet(config), VideoUNet(replace(config, merge="add"))
    randomise(merged)
    for module in merged.modules():
        if isinstance(module, (SwapAttention, SparseCausalAttention)) or hasattr(module, "norm_query"):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    added.load_state_dict({k: v for k, v in merged.state_dict().items() if k in added.state_dict()})
    x, t, context = inputs(config)
    assert relative_error(merged(x, t, context), added(x, t, context)) <= 1e-6


@pytest.mark.parametrize(("length", "place"), [(0, "attention"), (32, "attention"), (32, "input")])
def test_only_positions_tell_attention_which_frame_is_which(length: int, place: str) -> None:
    config = replace(DEBUG, temporal_positions=length, position_place=place)
    layer = TemporalTransformer(8, 8, 2, config, nn, ops.attention)
    randomise(layer)
    x = torch.randn(5, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    turned = layer(x.flip(0), 5).flip(0)
    same = relative_error(turned, layer(x, 5)) <= 1e-5
    assert same == (length == 0)


def test_without_swap_strength_swap_attention_is_addition() -> None:
    full, added = VideoUNet(DEBUG), VideoUNet(replace(DEBUG, merge="add"))
    randomise(full)
    added.load_state_dict({k: v for k, v in full.state_dict().items() if k in added.state_dict()})
    x, t, context = inputs(DEBUG)
    assert relative_error(full(x, t, context, swap_strength=0.0), added(x, t, context)) <= 1e-6
    assert relative_error(full(x, t, context, swap_strength=0.5), full(x, t, context)) > 1e-3


def test_without_motion_a_network_that_adds_is_the_image_network() -> None:
    config = replace(DEBUG, merge="add", fusion="add", temporal_attention_in=True)
    video, image = VideoUNet(config), VideoUNet(replace(image_config(config), temporal_attention_in=False))
    randomise(video)
    image.load_state_dict({k: v for k, v in video.state_dict().items() if k in image.state_dict()})
    x, t, context = inputs(config)
    assert relative_error(video(x, t, context, motion_scale=0.0), image(x, t, context)) <= 1e-6
    assert relative_error(video(x, t, context, motion_scale=0.5), video(x, t, context)) > 1e-3


class Recorder(Hooks):
    """Notes where it is asked, and adds `change` at the place `at`."""

    def __init__(self, at: str = "", change: float = 0.0) -> None:
        self.at = at
        self.change = change
        self.seen: list[str] = []

    def note(self, place: str, x: Tensor) -> Tensor:
        self.seen.append(place)
        return x + self.change if place == self.at else x

    def embedding(self, emb: Tensor) -> Tensor:
        return self.note("embedding", emb)

    def enter(self, part: str, index: int) -> None:
        self.seen.append(f"{part} {index}")

    def attend(self, name: str, depth: int, layer: CrossAttention, x: Tensor, context: Tensor | None) -> Tensor:
        return self.note(f"{name} {depth}", layer(x, context))

    def between(self, x: Tensor) -> Tensor:
        return self.note("between", x)

    def after_input(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.note("skip", h), self.note("input", h)

    def after_middle(self, h: Tensor) -> Tensor:
        return self.note("middle", h)

    def before_output(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return self.note("output", h), self.note("met", skip)


def test_hooks_are_asked_in_the_order_of_the_forward_pass() -> None:
    unet, recorder = VideoUNet(DEBUG), Recorder()
    unet(*inputs(DEBUG), hooks=recorder)
    attention = ["attn1 0", "between", "attn2 0"]
    encoder = [["input 0"], ["input 1", *attention], ["input 2"], ["input 3", *attention]]
    expected = ["embedding"]
    for block in encoder:
        expected += [*block, "skip", "input"]
    expected += ["middle 0", *attention, "middle"]
    for i in range(4):
        expected += [f"output {i}", "output", "met", *attention]
    assert recorder.seen == expected


@pytest.mark.parametrize(
    "place", ["embedding", "attn1 0", "attn2 0", "between", "skip", "input", "middle", "output", "met"]
)
def test_what_a_hook_returns_is_what_the_network_goes_on_with(place: str) -> None:
    unet = VideoUNet(DEBUG)
    randomise(unet)
    x, t, context = inputs(DEBUG)
    plain = unet(x, t, context)
    assert torch.equal(unet(x, t, context, hooks=Recorder(place, 0.0)), plain)
    # GroupNorm takes away what is the same everywhere, so a shift of everything shows through biases only slightly.
    assert not torch.equal(unet(x, t, context, hooks=Recorder(place, 1.0)), plain)


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_mixes_frames_once_trained(merge: str) -> None:
    unet = VideoUNet(replace(DEBUG, merge=merge))
    randomise(unet)
    x, t, context = inputs(DEBUG)
    changed = x.clone()
    changed[:, :, 0] += 1
    assert not torch.allclose(unet(x, t, context)[:, :, -1], unet(changed, t, context)[:, :, -1])


def swap_attention_token_by_token(block: SwapAttention, s: Tensor, t: Tensor) -> Tensor:
    """Eq. 1-4 for one clip, one query token at a time; `s, t [F, C, H, W]`."""
    frames, channels, height, width = s.shape

    def project(x: Tensor) -> Tensor:
        return block.proj_in(block.norm(x).permute(0, 2, 3, 1))

    asking, answering = (project(s), project(t)) if block.query == "spatial" else (project(t), project(s))
    wf, wh, ww = (
        (frames, height, width)
        if block.window is None
        else (min(block.window[0], frames), min(block.window[1], height), min(block.window[2], width))
    )
    shift = math.ceil(wf / 2) if block.shifted and frames > wf else 0

    def window_of(f: int, h: int, w: int) -> tuple[int, int, int]:
        return (f - shift) // wf, h // wh, w // ww

    places = [(f, h, w) for f in range(frames) for h in range(height) for w in range(width)]
    out = torch.empty(frames, height, width, channels)
    for f, h, w in places:
        mates = [p for p in places if window_of(*p) == window_of(f, h, w)]
        context = block.norm_context(torch.stack([answering[p] for p in mates]))
        q = block.to_q(block.norm_query(asking[f, h, w])).view(block.heads, -1)
        k = block.to_k(context).view(len(mates), block.heads, -1)
        v = block.to_v(context).view(len(mates), block.heads, -1)
        weights = (torch.einsum("hd,mhd->hm", q, k) / math.sqrt(q.shape[1])).softmax(dim=-1)
        hidden = block.to_out(torch.einsum("hm,mhd->hd", weights, v).flatten()) + asking[f, h, w]
        hidden = block.ff(block.norm_ff(hidden)) + hidden
        out[f, h, w] = block.proj_out(hidden)
    return s + t + out.permute(0, 3, 1, 2)


def check_swap_attention(size: windows.Size, window: windows.Size | None, query: str, shifted: bool) -> None:
    block = SwapAttention(8, 2, 4, window, query, shifted, ops.bind(nn, None, None), ops.attention)  # type: ignore[arg-type]
    randomise(block)
    generator = torch.Generator().manual_seed(3)
    s, t = torch.randn(2, size[0], 8, *size[1:], generator=generator)
    with torch.no_grad():
        expected = swap_attention_token_by_token(block, s, t)
        # Two clips in a batch, so that a window that reached into the neighbour would show.
        both = block(torch.cat([s, t]), torch.cat([t, s]), size[0])
    assert relative_error(both[: size[0]], expected) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 7)),
    window=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))),
    query=st.sampled_from(["spatial", "temporal"]),
    shifted=st.booleans(),
)
def test_swap_attention_equals_the_equations(
    size: windows.Size, window: windows.Size | None, query: str, shifted: bool
) -> None:
    check_swap_attention(size, window, query, shifted)


@pytest.mark.parametrize("shifted", [False, True])
def test_swap_attention_equals_the_equations_43_wide(shifted: bool) -> None:
    check_swap_attention((5, 2, 43), (4, 3, 6), "temporal", shifted)


@settings(max_examples=50, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    shift=st.integers(0, 4),
)
def test_merge_undoes_partition(size: windows.Size, window: windows.Size, shift: int) -> None:
    window = windows.fit(window, size)
    x = torch.randn(2, *size, 3)
    assert torch.equal(windows.merge(windows.partition(x, window, shift), window, size, shift), x)


def test_roles_swap_and_windows_shift_at_every_second_block_end() -> None:
    ends = [m for m in VideoUNet(PRESETS["sd21"].unet, device="meta").modules() if isinstance(m, SwapAttention)]
    assert [m.query for m in ends] == ["spatial", "temporal"] * 4
    assert [m.shifted for m in ends] == [False, True] * 4


@pytest.mark.parametrize("query", ["spatial", "temporal"])
def test_query_switch_fixes_the_roles(query: str) -> None:
    ends = [m for m in VideoUNet(replace(DEBUG, swap_query=query)).modules() if isinstance(m, SwapAttention)]
    assert {m.query for m in ends} == {query}


def test_frames_may_have_their_own_noise_levels_and_prompts() -> None:
    unet = VideoUNet(DEBUG)
    randomise(unet)
    x, t, context = inputs(DEBUG)
    same = unet(x, t, context)
    per_frame_t = t[:, None].expand(-1, x.shape[2])
    per_frame_context = context[:, None].expand(-1, x.shape[2], -1, -1)
    assert relative_error(unet(x, per_frame_t, context), same) <= 1e-6
    assert relative_error(unet(x, t, per_frame_context), same) <= 1e-6
    clean_first = per_frame_t.clone()
    clean_first[:, 0] = 0
    assert relative_error(unet(x, clean_first, context), same) > 1e-4


def test_odd_sizes_come_back_as_they_went_in() -> None:
    config = PRESETS["demo"].unet
    x = torch.randn(1, 4, 2, 11, 43)
    assert VideoUNet(config)(x, torch.tensor([1]), torch.randn(1, 3, config.context_dim)).shape == x.shape


def test_gradient_checkpointing_changes_no_gradient() -> None:
    unet = VideoUNet(DEBUG)
    randomise(unet)
    x, t, context = inputs(DEBUG)
    grads = []
    for on in (False, True):
        unet.gradient_checkpointing = on
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        grads.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == len(list(unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_forward_compiles_without_graph_breaks() -> None:
    unet = VideoUNet(DEBUG)
    randomise(unet)
    x, t, context = inputs(DEBUG)
    with torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert relative_error(compiled(x, t, context), unet(x, t, context)) <= 1e-5


def test_every_layer_with_weights_comes_from_operations() -> None:
    class Recorded:
        pass

    made: list[type] = []

    def record(base: type) -> type:
        made.append(type(base.__name__, (base, Recorded), {}))
        return made[-1]

    class Operations:
        Linear = record(nn.Linear)
        Conv2d = record(nn.Conv2d)
        GroupNorm = record(nn.GroupNorm)
        LayerNorm = record(nn.LayerNorm)
        Embedding = record(nn.Embedding)

    for merge in MERGES:
        unet = VideoUNet(replace(DEBUG, merge=merge, temporal_attention_in=True), operations=Operations)  # type: ignore[arg-type]
        for module in unet.modules():
            own = list(module.parameters(recurse=False))
            assert isinstance(module, Recorded) if own else True
            # A bare parameter beside children is skipped by hosts that move weights layer by layer.
            assert not (own and list(module.children()))


def test_attention_is_injected() -> None:
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        calls.append(q.shape)
        return ops.attention(q, k, v, heads, mask)

    unet = VideoUNet(DEBUG, attention=attention)
    x, t, context = inputs(DEBUG)
    unet(x, t, context)
    # Four in each transformer, which are 2 in the encoder, 1 in the middle, 4 in the decoder; and 4 block ends.
    assert len(calls) == 4 * (2 + 1 + 4) + 4


def test_attention_in_batches_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 10, 6, 8)
    mask = torch.rand(10, 6, 6) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    whole = ops.attention(q, k, v, 2, mask)
    monkeypatch.setattr(ops, "MAX_ATTENTION_BATCH", 6)
    assert relative_error(ops.attention(q, k, v, 2, mask), whole) <= 1e-6


def test_temporal_skip_reaches_the_next_level() -> None:
    unet = VideoUNet(DEBUG)
    randomise(unet)
    skips = [name for name, module in unet.named_modules() if name.endswith("temporal_skip")]
    assert len(skips) == 2 * (len(DEBUG.channel_mult) - 1)
    x, t, context = inputs(DEBUG)
    before = unet(x, t, context)
    for name in skips:
        nn.init.zeros_(unet.get_submodule(name).conv.weight)
    assert relative_error(unet(x, t, context), before) > 1e-4


DIFFUSERS = {
    "sd15": {"cross_attention_dim": 24, "attention_head_dim": 8, "use_linear_projection": False},
    "sd21": {"cross_attention_dim": 32, "attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True},
}


def diffusers_key(key: str, levels: int, num_res_blocks: int) -> str:
    """The name of an image U-Net weight in diffusers."""
    for ours, theirs in (
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ):
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    parts = key.split(".")
    if parts[0] == "middle_block":
        place = int(parts[1])
        prefix = "mid_block." + ("attentions.0" if place == 1 else f"resnets.{place // 2}")
        rest, kind = parts[2:], "attention" if place == 1 else "res"
    else:
        number, place = int(parts[1]), int(parts[2])
        down = parts[0] == "input_blocks"
        per_level = num_res_blocks + 1
        level, index = divmod(number - 1, per_level) if down else divmod(number, per_level)
        rest = parts[3:]
        kind = "res" if place == 0 else "attention" if rest[0] != "conv" else "sample"
        if down and index == num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0.conv.{rest[-1]}"
        if kind == "sample":
            return f"up_blocks.{level}.upsamplers.0.conv.{rest[-1]}"
        side = "down_blocks" if down else "up_blocks"
        prefix = f"{side}.{level}.{'resnets' if kind == 'res' else 'attentions'}.{index}"
    if kind == "res":
        names = {
            "in_layers.0": "norm1",
            "in_layers.2": "conv1",
            "emb_layers.1": "time_emb_proj",
            "out_layers.0": "norm2",
            "out_layers.3": "conv2",
        }
        layer = ".".join(rest[:-1])
        return f"{prefix}.{names.get(layer, 'conv_shortcut')}.{rest[-1]}"
    return f"{prefix}.{'.'.join(rest)}"


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_image_network_equals_diffusers(name: str) -> None:
    from diffusers import UNet2DConditionModel

    settings_ = DIFFUSERS[name]
    config = image_config(
        replace(
            PRESETS[name].unet,
            model_channels=32,
            context_dim=settings_["cross_attention_dim"],
            head_dim=32 if name == "sd21" else 0,
        )
    )
    theirs = UNet2DConditionModel(block_out_channels=(32, 64, 128, 128), norm_num_groups=32, **settings_).eval()
    randomise(theirs)
    ours = VideoUNet(config)
    state = theirs.state_dict()
    converted = {key: state[diffusers_key(key, 4, 2)] for key in ours.state_dict()}
    assert len(set(map(id, converted.values()))) == len(state)
    ours.load_state_dict(converted)
    x, t, context = inputs(config, frames=3, height=16, width=24)
    with torch.no_grad():
        expected = torch.stack([theirs(x[:, :, i], t, context).sample for i in range(3)], dim=2)
        assert relative_error(ours(x, t, context), expected) <= 1e-5
