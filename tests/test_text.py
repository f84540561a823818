from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from videofactory_core import ops, text
from videofactory_core.config import PRESETS, TextConfig
from videofactory_core.text import TextEncoder, Tokenizer, pad_token

SMALL = TextConfig(width=32, layers=3, heads=4, activation="quick_gelu", skip_last_layers=0)
PROMPTS = [
    "",
    "   \t\n ",
    "a red ball moves to the left",
    "A CAT in The RAIN, Tokyo 1987 -- 35mm film",
    "it's they're I'll we've he'd I'm don't CAN'T 'quoted'",
    "  leading,   double  spaces\tand\nnew lines  ",
    "1234567890 3.14159 50% 1,000,000",
    "semi;colon: (((very detailed))) [brackets] {braces} <lora:x:0.5> a_b-c/d\\e !!!??? ... @#$^&*+=~`|",
    "caf\u00e9 na\u00efve \u00fcber \u00c5ngstr\u00f6m S\u00e3o Paulo \u0141\u00f3d\u017a",
    "\u043a\u043e\u0442 \u0438\u0434\u0451\u0442 \u043f\u043e \u0443\u043b\u0438\u0446\u0435",
    "\u732b\u304c\u8857\u3092\u6b69\u304f \uace0\uc591\uc774 \u0642\u0637\u0629",
    "a dog \U0001f415 surfing \U0001f30a\U0001f3c4\u200d\u2642\ufe0f at sunset \u2600",
    "e\u0301 decomposed",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x",
]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def shake(module: nn.Module) -> None:
    """Move every parameter off its initial value, so that no norm or bias is neutral."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def transformers_tokenizer(open_clip_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Its type stubs do not know the name that versions 4 and 5 share.
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(word, word): token for word, token in open_clip_tokenizer.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in open_clip_tokenizer.bpe_ranks)]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_transformers(prompt: str, transformers_tokenizer: Any) -> None:
    expected = transformers_tokenizer(prompt, padding="max_length", max_length=77)["input_ids"]
    assert Tokenizer(pad_token=49407)(prompt).tolist() == [expected]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_open_clip(prompt: str, open_clip_tokenizer: Any) -> None:
    assert Tokenizer(pad_token=0)(prompt).tolist() == open_clip_tokenizer(prompt).tolist()


@settings(max_examples=300, deadline=None)
@given(prompt=st.text() | st.text(alphabet="aAzT'sSlLdD019 \t!?<|>_.\u00e9\u0301\u0130\u03a3\u1e9e"))
def test_any_text_has_the_tokens_of_transformers(prompt: str, transformers_tokenizer: Any) -> None:
    expected = transformers_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Chunks as long as the text hold it whole.
    assert Tokenizer(max_tokens=len(expected) + 3)(prompt)[0, 1:-2].tolist() == expected


def test_names_of_special_tokens_in_a_prompt_are_read_as_transformers_reads_them(transformers_tokenizer: Any) -> None:
    prompt = "one <|endoftext|> two<|startoftext|>!! <|ENDOFTEXT|>?"
    expected = transformers_tokenizer(prompt, padding="max_length", max_length=77)["input_ids"]
    assert Tokenizer()(prompt).tolist() == [expected]


def test_padding_follows_the_models_family() -> None:
    assert pad_token(PRESETS["sd15"].text) == 49407
    assert pad_token(PRESETS["sd21"].text) == 0
    with torch.device("meta"):
        encoder = TextEncoder(PRESETS["sd21"].text)
    assert encoder.tokenizer("a cat").tolist() == [[49406, 320, 2368, 49407] + [0] * 73]


@pytest.mark.parametrize(
    ("words", "chunks"), [(0, 1), (74, 1), (75, 1), (76, 2), (150, 2), (151, 3), (200, 3)], ids=lambda n: str(n)
)
def test_long_prompts_are_cut_into_windows_of_75_tokens(words: int, chunks: int) -> None:
    names = ["cat", "dog", "fish", "bird", "horse"]
    prompt = " ".join(names[i % 5] for i in range(words))
    tokens = Tokenizer()(prompt)
    assert tokens.shape == (chunks, 77)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == 49406).all()
    assert (tokens[:, -1] == 49407).all()
    inside = tokens[:, 1:-1].flatten()
    ids = [int(Tokenizer()(name)[0, 1]) for name in names]
    assert inside[:words].tolist() == [ids[i % 5] for i in range(words)]
    assert (inside[words:] == 49407).all()


def test_prompts_of_a_batch_get_the_chunks_of_the_longest() -> None:
    tokenizer = Tokenizer(pad_token=0)
    tokens = tokenizer.batch(["cat " * 200, "", "dog"])
    assert tokens.shape == (3, 3, 77)
    assert torch.equal(tokens[0], tokenizer("cat " * 200))
    assert torch.equal(tokens[1], tokenizer("").expand(3, -1))
    assert torch.equal(tokens[2], torch.cat([tokenizer("dog"), tokenizer(""), tokenizer("")]))


def test_a_prompt_of_200_tokens_gives_features_of_three_chunks() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL).eval()
    shake(encoder)
    with torch.no_grad():
        features = encoder.encode(["cat " * 200])
        assert features.shape == (1, 3 * 77, 32)
        first = encoder.encode(["cat " * 75])
        last = encoder.encode(["cat " * 50])
    torch.testing.assert_close(features[:, :77], first)
    torch.testing.assert_close(features[:, 77:154], first)
    torch.testing.assert_close(features[:, 154:], last)


def test_a_negative_prompt_is_filled_up_with_the_features_of_the_empty_prompt() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL).eval()
    shake(encoder)
    with torch.no_grad():
        features = encoder.encode(["cat " * 100, "blurry"])
        assert features.shape == (2, 154, 32)
        torch.testing.assert_close(features[1:, :77], encoder.encode(["blurry"]))
        torch.testing.assert_close(features[1:, 77:], encoder.encode([""]))


def test_tokens_without_a_chunk_axis_are_one_chunk() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL).eval()
    tokens = encoder.tokenizer.batch(["a cat", "two dogs"])
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens[:, 0]), encoder(tokens))


@pytest.mark.parametrize(
    ("activation", "skip", "width", "heads"), [("quick_gelu", 0, 48, 4), ("gelu", 1, 48, 4), ("quick_gelu", 0, 64, 2)]
)
def test_features_are_those_of_transformers(activation: Any, skip: int, width: int, heads: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    peer = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=heads,
            hidden_act=activation,
        )
    ).eval()
    shake(peer)
    config = TextConfig(width, 3, heads, activation=activation, skip_last_layers=skip)
    encoder = TextEncoder(config).eval()
    # Version 5 dropped the prefix from its own names, and version 4 kept the positions' numbers as a buffer.
    state = {"text_model." + name.removeprefix("text_model."): value for name, value in peer.state_dict().items()}
    state.pop("text_model.embeddings.position_ids", None)
    encoder.load_state_dict(state)

    tokens = torch.randint(49408, (2, 77))
    with torch.no_grad():
        hidden = peer(input_ids=tokens, output_hidden_states=True).hidden_states[-1 - skip]
        norm = dict(peer.named_modules())
        final_norm = norm.get("final_layer_norm") or norm["text_model.final_layer_norm"]
        expected = final_norm(hidden)
        assert relative_error(encoder(tokens), expected) <= 1e-5


def open_clip_tower(config: dict[str, Any]) -> nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        width=config["width"], heads=config["heads"], layers=config["layers"], output_dim=config["width"]
    )


def test_vit_l_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(PRESETS["sd15"].text)
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480


def test_vit_h_has_open_clips_number_of_parameters() -> None:
    import open_clip

    with torch.device("meta"):
        encoder = TextEncoder(PRESETS["sd21"].text)
        peer = open_clip_tower(open_clip.get_model_config("ViT-H-14")["text_cfg"])
    expected = sum(p.numel() for name, p in peer.named_parameters() if name != "text_projection")
    assert sum(p.numel() for p in encoder.parameters()) == expected


def test_state_dict_names_are_the_classic_ones() -> None:
    config = TextConfig(width=8, layers=1, heads=2, skip_last_layers=0)
    layer = "text_model.encoder.layers.0."
    parts = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    expected = {f"{layer}{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    expected |= {f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")}
    expected |= {f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")}
    assert set(TextEncoder(config).state_dict()) == expected


def test_a_new_encoder_starts_with_words_far_apart() -> None:
    torch.manual_seed(0)
    for name, parameter in TextEncoder(SMALL).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            expected = 1.0 if "embedding" in name else parameter.shape[1] ** -0.5
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL)
    target = torch.randn(2, 77, 32)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = (encoder.encode(["a cat", "two dogs"]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in encoder.named_parameters():
        # Softmax does not see a bias that all keys share.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_skipped_layers_are_not_computed() -> None:
    encoder = TextEncoder(TextConfig(width=16, layers=3, heads=2, skip_last_layers=1)).eval()
    calls: list[int] = []
    for i, layer in enumerate(encoder.text_model.encoder.layers):
        layer.register_forward_hook(lambda module, inputs, output, i=i: calls.append(i))
    with torch.no_grad():
        encoder.encode(["a cat"])
    assert calls == [0, 1]


def test_features_have_the_dtype_of_the_weights() -> None:
    encoder = TextEncoder(SMALL).to(torch.bfloat16)
    with torch.no_grad():
        assert encoder.encode(["a cat"]).dtype == torch.bfloat16


def test_layers_and_attention_come_from_the_host() -> None:
    calls: list[tuple[int, ...]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        calls.append((heads, *mask.shape))
        return ops.attention(q, k, v, heads, mask)

    encoder = TextEncoder(SMALL, ops.bind(nn, "meta", torch.float16), attention)
    assert {(p.device.type, p.dtype) for p in encoder.parameters()} == {("meta", torch.float16)}
    encoder(torch.zeros(2, 77, dtype=torch.int64, device="meta"))
    assert calls == [(4, 1, 77, 77)] * 3


def test_a_missing_vocabulary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    text._byte_pair_encoder.cache_clear()
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        Tokenizer()("a cat")


def test_neither_import_nor_tokenizing_loads_the_heavy_libraries() -> None:
    script = (
        "import sys, videofactory_core.text as text\n"
        "assert not {'transformers', 'open_clip', 'tokenizers'} & set(sys.modules)\n"
        "text.Tokenizer()('a cat')\n"
        "assert not {'transformers', 'open_clip', 'timm'} & set(sys.modules)\n"
    )
    root = Path(text.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
