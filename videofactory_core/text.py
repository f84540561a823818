"""CLIP's tokenizer and text transformer: prompts to the features that the U-Net's cross-attention reads."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import ops
from .config import TextConfig
from .ops import Attention, Operations

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BytePairEncoder

START, END = "<|startoftext|>", "<|endoftext|>"
START_TOKEN, END_TOKEN = 49406, 49407
# The vocabulary is 256 bytes, the same 256 at the end of a word, the merges in order of their rank, and START and END.
NUM_MERGES = START_TOKEN - 2 * 256
# CLIP's definition of a word: contractions, runs of letters, single digits, runs of anything else that is not blank.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-pair tokenizer; a prompt of any length becomes whole chunks of `max_tokens`.

    Text is treated as in transformers' CLIPTokenizer: Unicode NFC, blanks joined, lower case. Unlike open_clip, it
    repairs no broken encodings and decodes no HTML entities.
    """

    def __init__(self, pad_token: int = END_TOKEN, max_tokens: int = 77) -> None:
        self.pad_token = pad_token
        self.max_tokens = max_tokens

    def __call__(self, prompt: str) -> Tensor:
        """Token ids `[chunks, max_tokens]` (int64), each chunk with its own start and end, then padding.

        Every `max_tokens - 2` tokens open a new chunk; an empty prompt is one chunk.
        """
        ids = _byte_pair_encoder().encode(prompt, add_special_tokens=False).ids
        window = self.max_tokens - 2
        return torch.stack([self._chunk(ids[i : i + window]) for i in range(0, max(1, len(ids)), window)])

    def batch(self, prompts: Sequence[str]) -> Tensor:
        """Token ids `[B, chunks, max_tokens]` of all prompts, the shorter ones followed by empty chunks."""
        tokens = [self(prompt) for prompt in prompts]
        longest = max(len(chunks) for chunks in tokens)
        empty = self._chunk([])
        return torch.stack([torch.cat([chunks, empty.expand(longest - len(chunks), -1)]) for chunks in tokens])

    def _chunk(self, ids: list[int]) -> Tensor:
        framed = [START_TOKEN, *ids, END_TOKEN]
        return torch.tensor(framed + [self.pad_token] * (self.max_tokens - len(framed)))


@lru_cache(maxsize=1)
def _byte_pair_encoder() -> BytePairEncoder:
    """CLIP's byte-pair encoding, with the merges that open_clip_torch carries as a data file."""
    # The bare library imports in milliseconds, transformers' CLIPTokenizer around it in seconds.
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as BytePairEncoder

    merges = _read_merges()
    # OpenAI numbered the 256 bytes by the characters that stand for them.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {word: token for token, word in enumerate(words)}
    encoder = BytePairEncoder(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    encoder.add_special_tokens([START, END])
    return encoder


def _read_merges() -> list[tuple[str, str]]:
    # Finding the package is enough for its data file; importing it takes seconds.
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError("CLIP's vocabulary comes with the package open_clip_torch: run `pip install open_clip_torch`")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : NUM_MERGES + 1]
    return [(a, b) for a, b in (line.split() for line in lines)]


def pad_token(config: TextConfig) -> int:
    """The id behind a prompt's end: OpenAI's models (quick_gelu) repeat the end token, open_clip's (gelu) use 0."""
    return END_TOKEN if config.activation == "quick_gelu" else 0


class TextEncoder(nn.Module):
    """CLIP's causal text transformer, under the key names of transformers' CLIPTextModel before version 5.

    Own lines and not transformers' class: that one renamed its keys, and takes no `operations`.
    """

    def __init__(self, config: TextConfig, operations: Operations = nn, attention: Attention = ops.attention) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(pad_token(config), config.max_tokens)
        self.text_model = TextTransformer(config, operations, attention)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features `[B, chunks * max_tokens, width]` of `tokens [B, chunks, max_tokens]` or `[B, max_tokens]`.

        Chunks do not see each other.
        """
        if tokens.ndim == 2:
            tokens = tokens.unsqueeze(1)
        features = self.text_model(rearrange(tokens, "B chunks L -> (B chunks) L"))
        return rearrange(features, "(B chunks) L D -> B (chunks L) D", B=len(tokens))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features `[B, chunks * max_tokens, width]` of prompts, on the weights' device and in their dtype.

        All prompts get the chunks of the longest, so encode a prompt and its negative prompt in one call.
        """
        device = self.text_model.embeddings.token_embedding.weight.device
        return self(self.tokenizer.batch(prompts).to(device))


class TextTransformer(nn.Module):
    """Embeddings, the layers that are not skipped, and the final norm: `tokens [N, L]` to `[N, L, D]`."""

    def __init__(self, config: TextConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, operations)
        self.encoder = Encoder(config, operations, attention)
        self.final_layer_norm = operations.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))


class Embeddings(nn.Module):
    """The sum of a learned vector for the token and one for its position."""

    def __init__(self, config: TextConfig, operations: Operations) -> None:
        super().__init__()
        self.token_embedding = operations.Embedding(config.vocab_size, config.width)
        self.position_embedding = operations.Embedding(config.max_tokens, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.token_embedding(tokens) + self.position_embedding(positions)


class Encoder(nn.Module):
    """The transformer layers under a causal mask."""

    def __init__(self, config: TextConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.depth = config.layers - config.skip_last_layers
        # Skipped layers keep their weights: a file that is read and written again loses nothing.
        self.layers = nn.ModuleList(Layer(config, operations, attention) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers[: self.depth]:
            x = layer(x, causal)
        return x


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: TextConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(config.width)
        self.self_attn = SelfAttention(config, operations, attention)
        self.layer_norm2 = operations.LayerNorm(config.width)
        self.mlp = FeedForward(config, operations)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: TextConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention = attention
        self.q_proj = operations.Linear(config.width, config.width)
        self.k_proj = operations.Linear(config.width, config.width)
        self.v_proj = operations.Linear(config.width, config.width)
        self.out_proj = operations.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out_proj(self.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class FeedForward(nn.Module):
    """Two linear layers around the activation, four times as wide in between."""

    def __init__(self, config: TextConfig, operations: Operations) -> None:
        super().__init__()
        self.activation = quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.fc1 = operations.Linear(config.width, 4 * config.width)
        self.fc2 = operations.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, OpenAI's approximation of the Gaussian error linear unit."""
    return x * torch.sigmoid(1.702 * x)


def _initialise(module: nn.Module) -> None:
    """Scales for narrow encoders trained from nothing: words start far apart, or the rarer ones drown in training.

    CLIP's own 0.02 for embeddings let every word but the colours and backgrounds vanish from the demo's features.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
