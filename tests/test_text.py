"""Tokenizer and text encoder against open_clip and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from videofactory_core.config import PRESETS, TextConfig
from videofactory_core.text import START_TOKEN, TextEncoder, Tokenizer, from_open_clip

PROMPTS = [
    "",
    "a red circle moving right on a black background",
    "A CAT, 3 dogs & 42 mice!",
    "it's the dog's; they've won't",
    "  many   blanks\tand\nlines ",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe",
    "\u732b\u304c\u8d70\u308b \u041a\u043e\u0448\u043a\u0430",
    "emoji \U0001f600 and \u2014 dashes",
    "semi-colon;colon:slash/back\\under_score (brackets) [8k] {x} 1.5:1",
    "antidisestablishmentarianism pneumonoultramicroscopic",
]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def randomised(encoder: TextEncoder) -> TextEncoder:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return encoder


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_open_clip(prompt: str) -> None:
    import open_clip

    assert torch.equal(Tokenizer(pad_token=0)(prompt), open_clip.get_tokenizer("ViT-H-14")(prompt))


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer with the vocabulary that open_clip reads."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    vocabulary = SimpleTokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {names.get(word, word): number for word, number in vocabulary.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in vocabulary.bpe_ranks)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_transformers(prompt: str, clip_tokenizer: Any) -> None:
    theirs = clip_tokenizer(prompt, padding="max_length", max_length=77).input_ids
    assert Tokenizer()(prompt)[0].tolist() == theirs


def test_long_prompts_become_chunks_that_lose_no_token() -> None:
    tokenizer = Tokenizer()
    whole = tokenizer("red " * 200)
    assert whole.shape == (3, 77)
    assert whole[:, 0].tolist() == [START_TOKEN] * 3
    red = tokenizer("red")[0, 1]
    assert int((whole == red).sum()) == 200


def test_prompts_encoded_together_get_the_chunks_of_the_longest() -> None:
    encoder = randomised(TextEncoder(PRESETS["debug"].text))
    both = encoder.encode(["red", "red " * 100])
    assert both.shape == (2, 2 * 77, 16)
    # The first chunk of the short prompt is what it is alone.
    assert relative_error(both[:1, :77], encoder.encode(["red"])) <= 1e-6


def small(activation: str, skip: int) -> TextConfig:
    return TextConfig(width=32, layers=3, heads=4, activation=activation, skip_last_layers=skip)  # type: ignore[arg-type]


@pytest.mark.parametrize(("activation", "skip"), [("quick_gelu", 0), ("gelu", 1)])
def test_encoder_equals_transformers(activation: str, skip: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = small(activation, skip)
    ours = randomised(TextEncoder(config))
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.width * 4,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_tokens,
            hidden_act=activation,
        )
    ).eval()
    prefix = "text_model." if any(k.startswith("text_model.") for k in theirs.state_dict()) else ""
    state = {prefix + k.removeprefix("text_model."): v for k, v in ours.state_dict().items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    tokens = Tokenizer()("a red circle moving right")
    with torch.no_grad():
        hidden = theirs(tokens, output_hidden_states=True).hidden_states
        norm = theirs.get_submodule(f"{prefix}final_layer_norm")
        # The norm applied here is theirs, to the hidden state before any norm.
        expected = norm(hidden[config.layers - skip]) if skip else theirs(tokens).last_hidden_state
        assert relative_error(ours(tokens), expected) <= 1e-5


@pytest.mark.parametrize("skip", [0, 1])
def test_encoder_equals_the_text_tower_of_open_clip(skip: int) -> None:
    from open_clip.transformer import TextTransformer

    config = small("gelu", skip)
    torch.manual_seed(0)
    theirs = TextTransformer(context_length=77, width=32, heads=4, layers=3, output_dim=32, pool_type="argmax").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    ours = TextEncoder(config)
    ours.load_state_dict(from_open_clip(theirs.state_dict()))
    tokens = Tokenizer(pad_token=0)("a red circle moving right")
    with torch.no_grad():
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in list(theirs.transformer.resblocks)[: config.layers - skip]:
            x = block(x, attn_mask=theirs.attn_mask)
        assert relative_error(ours(tokens), theirs.ln_final(x)) <= 1e-5


def test_a_token_does_not_see_what_comes_after_it() -> None:
    encoder = randomised(TextEncoder(PRESETS["debug"].text))
    a, b = (encoder.encode([text]) for text in ("red circle", "red square"))
    assert relative_error(a[:, :2], b[:, :2]) <= 1e-6
    assert relative_error(a[:, 2], b[:, 2]) > 1e-3


@pytest.mark.parametrize(("preset", "parameters"), [("sd15", 123_060_480), ("sd21", 352_984_064)])
def test_parameters_match_the_public_encoders(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        encoder = TextEncoder(PRESETS[preset].text)
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, videofactory_core.text as t; t.Tokenizer()('red');"
        "print(sorted({'transformers', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
