"""The stages of curation that need weights of others or a server: tiny random models, and a server of our own."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from videofactory_train.cli import main
from videofactory_train.curate import caption, stage
from videofactory_train.curate.aesthetics import LAYERS, Aesthetics
from videofactory_train.curate.caption import Caption
from videofactory_train.curate.config import CurateConfig
from videofactory_train.curate.curation import Curation
from videofactory_train.curate.keyframe import Keyframe
from videofactory_train.curate.motion import Motion
from videofactory_train.curate.scenes import Scenes
from videofactory_train.curate.stage import Row, Stage
from videofactory_train.curate.store import Store
from videofactory_train.curate.text import Text
from videofactory_train.curate.work import Outcome, Task, carry_out

from videofactory_core.video import write_video

transformers = pytest.importorskip("transformers", "5.0")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
QUESTION = "w5 w6 w7"
TOKENS = 8


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A key frame as the stage before it makes it, in colours of its own."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


# Of several shapes, as videos are.
SIZES = ((64, 48), (48, 64), (96, 48), (64, 64), (40, 40))
ROWS: list[Row] = [{"image": picture(seed, size), "caption": None} for seed, size in enumerate(SIZES)]


def one_by_one(made: Stage, rows: Sequence[Row]) -> list[Row]:
    work = made.open()
    return [found for row in rows for found in work([row])]


# Tiny models


def tokenizer(*special: str, begins: bool = False) -> Any:
    """Words w0 to w59; with `begins`, a text begins with `<s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = [*SPECIAL, *special, *(f"w{number}" for number in range(60))]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)),
        additional_special_tokens=list(special),
        model_input_names=["input_ids", "attention_mask"],
    )


def spread(model: Any) -> Any:
    """Weights so large that different pictures and words give different answers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4, generator=generator)
    return model.eval()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEN = {**SMALL, "image_size": 32, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def template(image: str) -> str:
    """A chat of one question, after which the model speaks behind w1."""
    return (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}" + image + " {% else %}{{ part.text }} "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}w1{% endif %}"
    )


def make_clip(folder: Path) -> None:
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SEEN, projection_dim=16))
    spread(model).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)


def make_blip2(folder: Path) -> None:
    words = tokenizer("<image>", begins=True)
    language = {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64, "vocab_size": len(words)}
    language |= {"model_type": "opt", **IDS, **{key: SMALL[key] for key in SMALL if key != "intermediate_size"}}
    config = transformers.Blip2Config(
        vision_config=SEEN,
        qformer_config={**SMALL, "vocab_size": len(words), "cross_attention_frequency": 1},
        text_config=language,
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = spread(transformers.Blip2ForConditionalGeneration(config))
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.Blip2Processor(images, words, num_query_tokens=4).save_pretrained(folder)


def make_llava(folder: Path) -> None:
    words = tokenizer("<image>", begins=True)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **SEEN},
        text_config={"model_type": "llama", **SMALL, **IDS, "vocab_size": len(words), "max_position_embeddings": 256},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    model = spread(transformers.LlavaForConditionalGeneration(config))
    # It never says the picture's token, of which there would be too many then.
    model.get_output_embeddings().weight.data[4] = 0
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**sides),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ bos_token }} " + template("<image>"),
    ).save_pretrained(folder)


def make_qwen2_vl(folder: Path) -> None:
    """Takes pictures as they are, so that prompts differ in length."""
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*names)
    begin, end, image, video = words.convert_tokens_to_ids(list(names))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    language = {**SMALL, **IDS, "vocab_size": len(words), "max_position_embeddings": 256, "num_key_value_heads": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**language, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
    )
    spread(transformers.Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    patches = {"patch_size": 8, "merge_size": 2}
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**patches, size={"shortest_edge": 16**2, "longest_edge": 64**2}),
        words,
        transformers.Qwen2VLVideoProcessor(**patches),
        chat_template=template("<|vision_start|> <|image_pad|> <|vision_end|>"),
    ).save_pretrained(folder)


def make_llama(folder: Path, chats: bool) -> None:
    words = tokenizer(begins=True)
    if chats:
        words.chat_template = "{{ bos_token }} w2 {{ messages[0].content }} w3"
    config = transformers.LlamaConfig(**SMALL, **IDS, vocab_size=len(words), max_position_embeddings=256)
    spread(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    words.save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "clip": make_clip,
    "blip-2": make_blip2,
    "llava": make_llava,
    "qwen2-vl": make_qwen2_vl,
    "chat": lambda folder: make_llama(folder, True),
    "plain": lambda folder: make_llama(folder, False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers 16-32-16-8-4-1, as the authors save them."""
    generator = torch.Generator().manual_seed(1)
    widths = (16, 32, 16, 8, 4, 1)
    weights = {}
    for layer, before, after in zip(LAYERS, widths, widths[1:], strict=False):
        weights[f"{layer}.weight"] = 2 * torch.randn(after, before, generator=generator) / before**0.5
        weights[f"{layer}.bias"] = torch.randn(after, generator=generator)
    path = tmp_path_factory.mktemp("predictor") / "linear.pth"
    torch.save(weights, path)
    return path


# Aesthetics


def beauty(folder: Path, predictor: Path, image: bytes) -> float:
    """CLIP's features of the middle of a picture, in length 1, through one layer after the other."""
    with Image.open(io.BytesIO(image)) as opened:
        whole = opened.convert("RGB")
    factor = 32 / min(whole.size)
    whole = whole.resize((int(whole.width * factor), int(whole.height * factor)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    pixels = np.asarray(whole.crop((left, top, left + 32, top + 32)), np.float32) / 255
    pixels = (pixels - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    weights = torch.load(predictor, weights_only=True)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.inference_mode():
        pooled = model.vision_model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).pooler_output[0]
        x = model.visual_projection.weight @ pooled
        x = x / (x**2).sum() ** 0.5
        for layer in LAYERS:
            x = F.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
    return float(x)


def test_scores_are_those_of_the_written_out_computation(models: Path, predictor: Path) -> None:
    made = Aesthetics(clip=str(models / "clip"), predictor=str(predictor))
    assert made.missing() == ""
    rows: list[Row] = [*ROWS, {"image": picture(9, (32, 32))}]
    found = [row["aesthetic"] for row in made.open()(rows)]
    expected = [beauty(models / "clip", predictor, row["image"]) for row in rows]
    # The last is not scaled; the others are, rounded in other places.
    assert found[-1] == pytest.approx(expected[-1], abs=1e-5)
    assert found == pytest.approx(expected, abs=0.02)
    assert np.std(expected) > 0.1
    assert found == pytest.approx([row["aesthetic"] for row in one_by_one(made, rows)], abs=1e-6)
    assert all(row.keys() == made.columns().keys() for row in made.open()(rows))


def test_the_predictor_may_be_safetensors_and_clip_in_half_precision(
    models: Path, predictor: Path, tmp_path: Path
) -> None:
    made = Aesthetics(clip=str(models / "clip"), predictor=str(predictor))
    expected = [row["aesthetic"] for row in made.open()(ROWS)]
    save_file(torch.load(predictor, weights_only=True), tmp_path / "linear.safetensors")
    other = replace(made, predictor=str(tmp_path / "linear.safetensors"))
    assert [row["aesthetic"] for row in other.open()(ROWS)] == expected
    half = transformers.CLIPVisionModelWithProjection.from_pretrained(models / "clip", dtype=torch.float16)
    shutil.copytree(models / "clip", tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    found = [row["aesthetic"] for row in replace(made, clip=str(tmp_path / "half")).open()(ROWS)]
    assert found == pytest.approx(expected, abs=0.01)


def test_other_weights_than_those_of_the_predictor_and_clip_are_refused(
    models: Path, predictor: Path, tmp_path: Path
) -> None:
    made = Aesthetics(clip=str(models / "clip"), predictor=str(predictor))
    weights = torch.load(predictor, weights_only=True)
    for name, content, words in (
        ("wide", {**weights, "layers.0.weight": torch.zeros(32, 24)}, "features of 24 numbers and .* gives 16"),
        ("other", {"a.weight": torch.zeros(1)}, "is not the linear predictor"),
        ("classes", {**weights, "layers.7.weight": torch.zeros(5, 4)}, "is not the linear predictor"),
        ("torn", {**weights, "layers.2.weight": torch.zeros(16, 31)}, "is not the linear predictor"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path)
        with pytest.raises(ValueError, match=words):
            replace(made, predictor=str(path)).open()
    # Another model would be filled up with random weights.
    shutil.copytree(models / "llava", tmp_path / "other")
    with pytest.raises(ValueError, match=r"aesthetics\.clip: .* (is another model|cannot be loaded)"):
        replace(made, clip=str(tmp_path / "other")).open()
    shutil.copytree(models / "clip", tmp_path / "less")
    less = load_file(tmp_path / "less" / "model.safetensors")
    less.pop("visual_projection.weight")
    save_file(less, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks visual_projection\.weight and maybe more"):
        replace(made, clip=str(tmp_path / "less")).open()
    (tmp_path / "less" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"aesthetics\.clip: .*less cannot be loaded"):
        replace(made, clip=str(tmp_path / "less")).open()


# Captions


def captioner(models: Path, name: str, **settings: Any) -> Caption:
    return Caption(model=str(models / name), question=QUESTION, max_new_tokens=TOKENS, **settings)


def greedy(step: Callable[[list[int]], torch.Tensor], special: int, most: int) -> str:
    """The likeliest word after the words so far, again and again; `step` maps them to scores.

    Words have numbers from `special` on.
    """
    made: list[int] = []
    with torch.inference_mode():
        while len(made) < most:
            made.append(int(step(made).argmax()))
            if made[-1] == 2:
                break
    return " ".join(f"w{number - special}" for number in made if number >= special)


def seen(folder: Path, image: bytes) -> torch.Tensor:
    processor = transformers.AutoProcessor.from_pretrained(folder).image_processor
    pixels = processor([Image.open(io.BytesIO(image)).convert("RGB")], return_tensors="pt")["pixel_values"]
    return torch.as_tensor(pixels)


@pytest.mark.parametrize("name", ["blip-2", "llava", "qwen2-vl"])
def test_captions_in_batches_are_those_of_single_pictures(models: Path, name: str) -> None:
    made = captioner(models, name)
    assert made.missing() == ""
    found = made.open()(ROWS)
    assert len({row["caption_text"] for row in found}) == len(ROWS)
    assert found == one_by_one(made, ROWS)
    assert {(row["caption_original"], row["caption_by"]) for row in found} == {(None, name)}
    assert all(row.keys() == made.columns().keys() for row in found)
    beams = captioner(models, name, num_beams=2)
    assert beams.open()(ROWS) == one_by_one(beams, ROWS)


def test_captions_by_blip2_are_those_of_the_written_out_computation(models: Path) -> None:
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(models / "blip-2").eval()
    words = model.get_input_embeddings()

    def caption_of(image: bytes) -> str:
        with torch.inference_mode():
            features = model.vision_model(seen(models / "blip-2", image)).last_hidden_state
            asked = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=features).last_hidden_state
            looks = model.language_projection(asked)

        def step(made: list[int]) -> torch.Tensor:
            given = torch.cat([looks, words(torch.tensor([[1, *made]]))], 1)
            return model.language_model(inputs_embeds=given).logits[0, -1]

        return greedy(step, 5, TOKENS)

    found = [row["caption_text"] for row in captioner(models, "blip-2").open()(ROWS)]
    assert found == [caption_of(row["image"]) for row in ROWS]


def test_captions_by_a_chat_are_those_of_the_written_out_computation(models: Path) -> None:
    """The prompt begins with one `<s>`, though both the template and the tokenizer put one."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(models / "llava").eval()
    words = [5 + number for number in (5, 6, 7, 1)]

    def caption_of(image: bytes) -> str:
        pixels = seen(models / "llava", image)

        def step(made: list[int]) -> torch.Tensor:
            ids = torch.tensor([[1, *[4] * 16, *words, *made]])
            return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]

        return greedy(step, 5, 2 * TOKENS)

    found = [row["caption_text"] for row in captioner(models, "llava").open()(ROWS)]
    assert found == [caption_of(row["image"]) for row in ROWS]


def test_older_folders_of_blip2_do_not_name_the_pictures_token(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "blip-2", tmp_path / "blip-2")
    path = tmp_path / "blip-2" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config.pop("image_token_index") == 4
    path.write_text(json.dumps(config), encoding="utf-8")
    assert captioner(tmp_path, "blip-2").open()(ROWS) == captioner(models, "blip-2").open()(ROWS)


def test_captions_that_are_there_are_kept(models: Path) -> None:
    rows: list[Row] = [{**row, "caption": f"w{i} by hand" if i % 2 else row["caption"]} for i, row in enumerate(ROWS)]
    made = captioner(models, "qwen2-vl")
    alone = made.open()(ROWS)
    for i, row in enumerate(made.open()(rows)):
        by_hand = {"caption_text": f"w{i} by hand", "caption_original": None, "caption_by": "source"}
        assert row == (by_hand if i % 2 else alone[i])
    assert replace(made, replace=True).open()(rows) == alone


def test_models_that_cannot_caption_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caption\.model: .*plain cannot be loaded"):
        captioner(models, "plain").open()
    shutil.copytree(models / "llava", tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template for a picture"):
        captioner(tmp_path, "mute").open()
    with pytest.raises(ValueError, match=r"caption\.rewrite: .*clip cannot be loaded"):
        captioner(models, "blip-2", rewrite=str(models / "clip")).open()


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_a_language_model_rewrites_captions(models: Path, name: str) -> None:
    made = captioner(models, "blip-2", rewrite=str(models / name), rewrite_question="w8")
    assert made.missing() == ""
    # Of different lengths.
    texts = ["w9", "w10 w11 w12 w13 w14", "w15 w16 w17"]
    rows: list[Row] = [{"image": row["image"], "caption": text} for row, text in zip(ROWS, texts, strict=False)]
    model = transformers.LlamaForCausalLM.from_pretrained(models / name).eval()

    def better(text: str) -> str:
        numbers = [4 + int(word[1:]) for word in f"w8 {text}".split()]
        ids = [1, 6, *numbers, 7] if name == "chat" else [1, *numbers]
        return greedy(lambda said: model(torch.tensor([[*ids, *said]])).logits[0, -1], 4, 2 * TOKENS)

    found = made.open()(rows)
    expected = [better(text) for text in texts]
    assert len(set(expected)) == len(texts)
    for row, text, sentence in zip(found, texts, expected, strict=True):
        assert row == {"caption_text": sentence, "caption_original": text, "caption_by": "source"}
    assert found == one_by_one(made, rows)
    # Captions of a model are put better too.
    (plain,), (rewritten,) = (one.open()(ROWS[:1]) for one in (replace(made, rewrite=""), made))
    assert rewritten == {
        "caption_text": better(plain["caption_text"]),
        "caption_original": plain["caption_text"],
        "caption_by": "blip-2",
    }


def test_local_models_ask_no_network(
    models: Path, predictor: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for made in (
        Aesthetics(clip=str(models / "clip"), predictor=str(predictor)),
        captioner(models, "blip-2", rewrite=str(models / "chat")),
        captioner(models, "qwen2-vl"),
        # A server is not asked for captions that are there.
        Caption(endpoint="http://127.0.0.1:9/v1", endpoint_model="m"),
    ):
        rows = ROWS if not getattr(made, "endpoint", "") else [{**row, "caption": "w1"} for row in ROWS]
        assert len(made.open()(rows)) == len(rows)
    assert tried == []


# A server


class Server(ThreadingHTTPServer):
    """Speaks of pictures by name; pictures that are called after a misfortune meet it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pictures: dict[bytes, str] = {}
        # Names or texts that were asked about, and whole requests.
        self.asked: list[str] = []
        self.requests: list[tuple[str, str | None, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        text, *image = body["messages"][0]["content"]
        name = text["text"].partition("\n")[2]
        if image:
            data = base64.b64decode(image[0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
            name = self.server.pictures[data]
        self.server.asked.append(name)
        first = self.server.asked.count(name) == 1
        if name == "mute":
            self.close_connection = True
        elif name == "garbled":
            self.wfile.write(b"220 mail.example.org ESMTP\r\n\r\n")
        elif name == "late":
            time.sleep(2 * caption.PATIENCE)
            self.reply(200, said("too late"))
        elif name == "500" or (name == "hiccup" and first):
            self.reply(500, b'{"error": "out of memory"}')
        elif name == "401":
            self.reply(401, b'{"error": "wrong key"}')
        elif name == "redirect":
            self.reply(302, b"", {"Location": f"{self.server.address}/elsewhere"})
        else:
            odd = {"page": b"<html>", "empty": b'{"choices": []}', "list": b"[1]", "null": said(None), "": said(" ")}
            self.reply(200, odd.get(name, said(f'  "A picture\n of {name}." ')))

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Authorization"], None))
        self.reply(200, said("from elsewhere"))

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def said(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # Long enough for a machine that is busy.
    monkeypatch.setattr(caption, "PATIENCE", 3.0)
    monkeypatch.setattr(caption, "ATTEMPTS", 2)
    monkeypatch.setattr(caption, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def rows_for(server: Server, names: Sequence[str]) -> list[Row]:
    rows = []
    for number, name in enumerate(names):
        image = picture(100 + number, (16, 16))
        server.pictures[image] = name
        rows.append({"clip_id": f"{number} {name}", "image": image, "caption": None})
    return rows


def carried_out(folder: Path, made: Caption, rows: Sequence[Row]) -> tuple[Outcome, dict[str, Row]]:
    """What a worker makes of rows in one task, by their names."""
    columns = {"clip_id": pa.string(), "image": pa.binary(), "caption": pa.string(), "status": pa.string()}
    store = Store(folder)
    store.write("keyframe@0", [{**row, "status": "ok"} for row in rows], pa.schema(columns), "clip_id")
    (part,) = store.parts("keyframe@0")
    outcome = carry_out(Task(made, made.key(), folder, ((part, tuple(row["clip_id"] for row in rows)),)))
    (written,) = store.parts(made.key())
    return outcome, {row["clip_id"].partition(" ")[2]: row for row in pq.read_table(written).to_pylist()}


def test_a_server_is_asked_as_openais_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Caption(endpoint=f"{server.address}/", endpoint_model="small", question=QUESTION, max_new_tokens=TOKENS)
    assert made.missing() == ""
    rows = rows_for(server, ["cats", "dogs"])
    assert [row["caption_text"] for row in made.open()(rows)] == ["A picture of cats.", "A picture of dogs."]
    assert made.open()(rows)[0] == {
        "caption_text": "A picture of cats.",
        "caption_original": None,
        "caption_by": "small",
    }
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", None)
    assert (body["model"], body["max_tokens"], body["messages"][0]["role"]) == ("small", 2 * TOKENS, "user")
    assert body["messages"][0]["content"][0] == {"type": "text", "text": QUESTION}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    made.open()(rows)
    assert server.requests[-1][1] == "Bearer secret"
    # The key is for this server alone, wherever that leads.
    made.open()(rows_for(server, ["redirect"]))
    assert server.requests[-1] == ("/v1/elsewhere", None, None)


def test_what_a_server_does_wrong_is_named_for_the_row_and_the_rest_goes_on(server: Server, tmp_path: Path) -> None:
    wrong = {
        "500": 'does not answer (500 Internal Server Error: {"error": "out of memory"}): check that it runs',
        "late": "does not answer (timed out)",
        "mute": "does not answer (Remote end closed connection without response)",
        "garbled": "does not answer (220 mail.example.org ESMTP",
        "401": 'refuses (401 Unauthorized: {"error": "wrong key"}): check endpoint_model and OPENAI_API_KEY',
        "page": "gave an answer that is no chat completion (Expecting value",
        "empty": "gave an answer that is no chat completion (list index out of range)",
        "list": "gave an answer that is no chat completion (list indices must be integers",
        "null": "gave an answer that is no chat completion (its content is None)",
        "": "small gave no caption",
    }
    rows = rows_for(server, ["cats", *wrong, "hiccup", "dogs"])
    rows.append({"clip_id": "z by hand", "image": picture(0), "caption": "two birds"})
    made = Caption(endpoint=server.address, endpoint_model="small")
    outcome, found = carried_out(tmp_path, made, rows)
    assert (outcome.rows, outcome.failed) == (len(rows), len(wrong))
    for name, words in wrong.items():
        row = found.pop(name)
        assert (row["status"], row["caption_text"]) == ("error", None)
        assert words in row["error"], (name, row["error"])
        assert row["error"].startswith(server.address if name else "small")
    assert {name: row["caption_text"] for name, row in found.items()} == {
        "cats": "A picture of cats.",
        "hiccup": "A picture of hiccup.",
        "dogs": "A picture of dogs.",
        "by hand": "two birds",
    }
    assert {row["status"] for row in found.values()} == {"ok"}
    # What was answered in the batch is not asked for again, and what a server refuses, not twice.
    assert [server.asked.count(name) for name in ("cats", "hiccup", "dogs")] == [1, 2, 1]
    assert [server.asked.count(name) for name in ("401", "late")] == [1, caption.ATTEMPTS]


def test_a_server_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    rows = rows_for(server, ["cats"])
    rows.append({"clip_id": "z by hand", "image": picture(0), "caption": "two birds"})
    outcome, found = carried_out(tmp_path, Caption(endpoint=address, endpoint_model="small"), rows)
    assert outcome.failed == 1
    assert f"{address} does not answer" in found["cats"]["error"]
    assert "refused" in found["cats"]["error"]
    assert found["by hand"]["caption_text"] == "two birds"


def test_a_server_rewrites_captions(server: Server, models: Path, tmp_path: Path) -> None:
    made = Caption(endpoint=server.address, endpoint_model="small", rewrite="endpoint", rewrite_question="Better:")
    rows = rows_for(server, ["cats"])
    for name in ("two birds", "500"):
        rows.append({"clip_id": f"z {name}", "image": picture(0), "caption": name})
    outcome, found = carried_out(tmp_path, made, rows)
    assert outcome.failed == 1
    assert "500 Internal Server Error" in found["500"]["error"]
    cats, birds = found["cats"], found["two birds"]
    assert cats["caption_text"] == "A picture of A picture of cats.."
    assert (cats["caption_original"], cats["caption_by"]) == ("A picture of cats.", "small")
    assert (birds["caption_text"], birds["caption_original"]) == ("A picture of two birds.", "two birds")
    assert birds["caption_by"] == "source"
    texts = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert [{"type": "text", "text": "Better:\ntwo birds"}] in texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "a", "endpoint": "http://b"}, "a model is named too"),
        ({"endpoint": "localhost:8000"}, "is no address; write http://"),
        ({"endpoint": "file:///etc/passwd"}, "is no address; write http://"),
        ({"rewrite": "endpoint"}, "is to be done by an endpoint, and none is named"),
    ],
)
def test_settings_of_captions_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Caption(**settings)


# Weights that are not there


def test_stages_without_weights_are_left_out_with_a_line_that_names_the_file(
    models: Path, predictor: Path, tmp_path: Path
) -> None:
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    clip, blip2 = str(models / "clip"), str(models / "blip-2")
    for made, words in (
        (Aesthetics(), "aesthetics.clip: no folder is named; name one with CLIP ViT-L/14"),
        (Aesthetics(clip="none"), "aesthetics.clip: there is no folder none; name"),
        (Aesthetics(clip=str(empty)), f"aesthetics.clip: {empty} has no config.json; name"),
        (Aesthetics(clip=str(bare)), f"aesthetics.clip: {bare} has no weights (*.safetensors or *.bin); name"),
        (Aesthetics(clip=clip), "aesthetics.predictor: no file is named; name a local copy of sac+logos"),
        (Aesthetics(clip=clip, predictor="a.pth"), "aesthetics.predictor: there is no file a.pth; name"),
        (Caption(), "caption.model: no folder is named; name one with BLIP-2"),
        (Caption(model="none"), "caption.model: there is no folder none; name"),
        (Caption(model=blip2, rewrite="none"), "caption.rewrite: there is no folder none; name"),
        (Caption(endpoint="http://a"), "caption.endpoint_model: none is named; name the server's model"),
        (Text(detector="craft", weights="a.pth"), "text.weights: there is no a.pth; name CRAFT's craft_mlt_25k.pth"),
        (Text(detector="pp_ocr"), "text.weights: nothing is named; name a folder with a PP-OCR detector"),
        (Motion(estimator="raft_small", weights="b.pth"), "motion.weights: there is no file b.pth; name a local copy"),
    ):
        lines: list[str] = []
        ready = Curation(tmp_path, replace(CurateConfig(), **{made.name: made}), lines.append).stages()
        assert made.name not in [other.name for other in ready]
        (line,) = [line for line in lines if line.startswith(f"{made.name}: ")]
        assert line.startswith(f"{made.name}: left out, {words}")
    lines = []
    whole = replace(
        CurateConfig(), aesthetics=Aesthetics(clip=clip, predictor=str(predictor)), caption=Caption(model=blip2)
    )
    names = [made.name for made in Curation(tmp_path, whole, lines.append).stages()]
    assert {"aesthetics", "caption"} <= set(names)
    assert not [line for line in lines if line.startswith(("aesthetics", "caption"))]


# Names of results


def plain_key(made: Stage, before: Sequence[str] = ()) -> str:
    """Of version and settings alone."""
    facts = json.dumps([made.name, made.version, asdict(made), *before], sort_keys=True, default=str)
    return f"{made.name}@{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}"


def test_keys_of_stages_without_weights_are_of_their_settings() -> None:
    server = Caption(endpoint="http://localhost:8000/v1", endpoint_model="m", rewrite="endpoint")
    for made in (Scenes(), Keyframe(), Text(), Motion(), Aesthetics(), Caption(), server):
        assert made.key(["a@1"]) == plain_key(made, ["a@1"])
    # Weights that are not there, and what only looks like a place of weights.
    for made in (Aesthetics(clip="none"), Motion(estimator="a:b", weights="0.5"), Text(weights="craft")):
        assert made.key() == plain_key(made)
    assert Scenes().key() == "scenes@e04f7ee26d34"
    assert Motion().key(["scenes@0"]) == "motion@45f61b9c9326"


def test_keys_follow_weights_and_not_where_they_lie(models: Path, predictor: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "clip", tmp_path / "clip")
    shutil.copy(predictor, tmp_path / "linear.pth")
    made = Aesthetics(clip=str(tmp_path / "clip"), predictor=str(tmp_path / "linear.pth"))
    key = made.key()
    assert key == Aesthetics(clip=str(models / "clip"), predictor=str(predictor)).key()
    assert key != plain_key(made)
    (tmp_path / "clip").rename(tmp_path / "moved")
    (tmp_path / "linear.pth").rename(tmp_path / "moved.pth")
    assert made.key() != key
    made = Aesthetics(clip=str(tmp_path / "moved"), predictor=str(tmp_path / "moved.pth"))
    assert made.key() == key
    # What describes a model, or belongs to programs that fetched it, is not the model.
    (tmp_path / "moved" / "README.md").write_text("a model")
    (tmp_path / "moved" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "moved" / ".cache" / "huggingface" / "a.json").write_text("{}")
    assert made.key() == key
    # The same length in other bytes, at the end of one file of several.
    weights = tmp_path / "moved" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(4))
    assert made.key() != key
    weights.write_bytes(content)
    assert made.key() == key
    config = tmp_path / "moved" / "preprocessor_config.json"
    config.rename(config.with_name("other.json"))
    assert made.key() != key


def test_every_part_of_a_large_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    content = np.random.default_rng(0).integers(0, 256, 20 << 20, dtype=np.uint8)
    content.tofile(path)
    keys = {Caption(model=str(path)).key()}
    for place in range(0, len(content), len(content) // 8):
        # As much as a layer of a small model.
        content[place : place + (1 << 20)] ^= 1
        content.tofile(path)
        keys.add(Caption(model=str(path)).key())
    assert len(keys) == 9


def test_weights_are_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest_pieces = stage.digest_pieces

    def count(digest: Any, path: str, place: tuple[int, int]) -> int:
        read.append(Path(path).name)
        assert place[1] <= 1 << 20
        return digest_pieces(digest, path, place)

    monkeypatch.setattr(stage, "digest_pieces", count)
    for name in ("a.bin", "b.json"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    made = Caption(model=str(tmp_path))
    key = made.key()
    assert set(read) == {"a.bin", "b.json"}
    read.clear()
    assert made.key() == key
    assert read == []
    (tmp_path / "a.bin").write_bytes(b"other" * 1000)
    assert made.key() != key
    assert set(read) == {"a.bin"}


# From videos to scores


def test_videos_are_scored_and_captioned(models: Path, predictor: Path, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    colours = np.random.default_rng(3)
    for name in ("seen", "told"):
        shots = [np.kron(colours.random((6, 8, 3)), np.ones((8, 8, 1))) for _ in range(2)]
        frames = np.stack([shots[i // 20] for i in range(40)])
        write_video(videos / f"{name}.mp4", torch.from_numpy(frames).float(), 8)
    (videos / "told.txt").write_text("w9 w10", encoding="utf-8")
    (tmp_path / "curate.toml").write_text(
        f"""
        aesthetics = {{ clip = '{models / "clip"}', predictor = '{predictor}', device = "cpu" }}
        caption = {{ model = '{models / "qwen2-vl"}', rewrite = '{models / "chat"}', device = "cpu" }}
        """,
        encoding="utf-8",
    )
    command = ["curate", str(videos), "--out", str(out), "--workers", "1", "--config", str(tmp_path / "curate.toml")]
    assert main([*command, "--stages", "scenes,keyframe,aesthetics,caption"]) == 0
    config = Curation.read(out).config
    scores, captions = config.aesthetics.open(), config.caption.open()
    found: dict[str, dict[str, Row]] = {}
    for name in ("keyframe", "aesthetics", "caption"):
        for part in (out / "stages").glob(f"{name}@*/part-*.parquet"):
            for row in pq.read_table(part).to_pylist():
                assert (row.pop("status"), row.pop("error")) == ("ok", None)
                found.setdefault(row.pop("clip_id"), {})[name] = row
    assert len(found) == 4
    for row in found.values():
        assert row["aesthetics"]["aesthetic"] == pytest.approx(scores([row["keyframe"]])[0]["aesthetic"], abs=1e-5)
        assert row["caption"] == captions([row["keyframe"]])[0]
    by = sorted((row["caption"]["caption_by"], row["keyframe"]["caption"] or "") for row in found.values())
    assert by == [("qwen2-vl", "")] * 2 + [("source", "w9 w10")] * 2
    assert sum(row["caption"]["caption_original"] == "w9 w10" for row in found.values()) == 2
