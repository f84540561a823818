"""Metrics of clips that are not a distance of sets: CLIPSIM, STREAM, warping error and flicker."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from videofactory_train.evaluate import clipsim, steadiness, stream
from videofactory_train.evaluate.clipsim import ClipSim
from videofactory_train.evaluate.metrics import ClipMetric
from videofactory_train.evaluate.score import measure
from videofactory_train.evaluate.stream import Encoder, Stream, covered, load_encoder, signals
from videofactory_train.evaluate.videos import Sampling, read_videos

from videofactory_core.video import write_video

transformers = pytest.importorskip("transformers", "4.56")
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = 60


def texture(height: int, width: int, seed: int = 0, grain: int = 8) -> Tensor:
    """A picture `[H, W, 3]` in 40..215 that is smooth over about `grain` pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // grain + 2, width // grain + 2, generator=generator)
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    return 40 + 175 * fine[0].permute(1, 2, 0)


def as_frames(pictures: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(pictures)).round().clamp(0, 255).to(torch.uint8)


def noise_frames(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return as_frames([texture(height, width, 100 * seed + number) for number in range(count)])


def spread(model: Any) -> Any:
    """Weights so large that different pictures and words give different answers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4, generator=generator)
    return model.eval()


# CLIPSIM


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 20 tokens and pictures of 32 x 32; its words are w0 to w59."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    # The end has the largest number, as in CLIP's vocabulary.
    names = ["<pad>", "<s>", "<unk>", *(f"w{number}" for number in range(WORDS)), "</s>"]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", len(names) - 1)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    )
    end = made.eos_token_id
    config = transformers.CLIPConfig(
        text_config={
            **SMALL,
            "vocab_size": len(names),
            "max_position_embeddings": 20,
            "bos_token_id": 1,
            "eos_token_id": end,
            "projection_dim": 16,
        },
        vision_config={**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    spread(transformers.CLIPModel(config)).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def similarity(folder: Path, frames: Tensor, words: Sequence[int]) -> float:
    """CLIPSIM in single steps: words are numbers of tokens."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    end = model.config.text_config.eos_token_id
    with torch.inference_mode():
        # The text is read off its last token.
        hidden = model.text_model(torch.tensor([[1, *(3 + word for word in words), end]])).last_hidden_state[0, -1]
        text = model.text_projection.weight @ hidden
        text = text / (text**2).sum() ** 0.5
        cosines = []
        for frame in frames.numpy():
            whole = Image.fromarray(frame)
            factor = 32 / min(whole.size)
            whole = whole.resize((int(whole.width * factor), int(whole.height * factor)), Image.Resampling.BICUBIC)
            left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
            pixels = np.asarray(whole.crop((left, top, left + 32, top + 32)), np.float32) / 255
            pixels = (pixels - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
            seen = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
            image = model.visual_projection.weight @ model.vision_model(seen).pooler_output[0]
            cosines.append(float(image @ text / (image**2).sum() ** 0.5))
    return sum(cosines) / len(cosines)


def test_clipsim_is_the_mean_of_the_frames_cosines(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    found = ClipSim(str(clip), CPU, told.append)
    values = []
    for seed, words in enumerate(((5, 6, 7), (8,), (20, 21, 5, 30))):
        frames = noise_frames(5, 32, 32, seed)
        values.append(found(frames, " ".join(f"w{word}" for word in words)))
        assert values[-1] == pytest.approx(similarity(clip, frames, words), abs=1e-5)
        assert -1 <= values[-1] <= 1
    assert np.std(values) > 0.01
    # Wider ones are made small first, which rounds in other places.
    wide = noise_frames(5, 48, 80)
    assert found(wide, "w5 w6") == pytest.approx(similarity(clip, wide, (5, 6)), abs=5e-3)
    expected = found(wide, "w5 w6")
    monkeypatch.setattr(clipsim, "FRAMES_AT_A_TIME", 2)
    assert found(wide, "w5 w6") == pytest.approx(expected, abs=1e-6)
    assert not told


def test_long_captions_are_cut_and_that_is_said_once(clip: Path) -> None:
    told: list[str] = []
    found = ClipSim(str(clip), CPU, told.append)
    frames = noise_frames(2, 32, 32)
    words = [number % WORDS for number in range(30)]
    # 20 tokens are 18 words, a begin and an end.
    expected = similarity(clip, frames, words[:18])
    caption = " ".join(f"w{word}" for word in words)
    assert found(frames, caption) == pytest.approx(expected, abs=1e-5)
    assert found(frames, f"{caption} w1") == pytest.approx(expected, abs=1e-5)
    assert found(frames, caption) == pytest.approx(expected, abs=1e-5)
    assert told == [f"clipsim compares the first 20 of 32 tokens of: {caption}"]
    assert found.cut == {caption, f"{caption} w1"}
    found(frames, " ".join(f"w{word}" for word in words[:18]))
    assert len(found.cut) == 2


def test_clipsim_says_by_what_it_is_measured(clip: Path) -> None:
    made = clipsim.metric(clip, CPU)
    digest = hashlib.sha256((clip / "model.safetensors").read_bytes()).hexdigest()
    assert made.settings["weights"] == digest
    assert made.settings["captions"] == "their first 20 tokens"
    frames = noise_frames(2, 32, 32)
    assert made.keyed(frames, "w5") == {"clipsim": ClipSim(str(clip), CPU)(frames, "w5")}
    assert made.keyed(frames, "") == {}
    assert not made.less_is_better("clipsim")


@pytest.mark.parametrize("kind", ["vision", "bert"])
def test_a_folder_of_another_model_is_refused_with_one_sentence(kind: str, tmp_path: Path) -> None:
    if kind == "vision":
        config = transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
        transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    else:
        transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^clipsim: .* holds a '\w+' model, not CLIP with both its encoders: name"):
        ClipSim(str(tmp_path), CPU)


def test_clipsim_without_a_whole_folder(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^clipsim: there is no folder .*; name a local copy of openai/clip-vit"):
        ClipSim(str(tmp_path / "none"), CPU)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ValueError, match=r"^clipsim: .* cannot be loaded") as caught:
        ClipSim(str(tmp_path), CPU)
    assert "\n" not in str(caught.value)


# STREAM


def drawn(count: int, frames: int, size: int, seed: int, slope: float = -1.0) -> Tensor:
    """Embeddings `[N, F, D]` whose amplitudes in time follow a power law with random phases, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, frames // 2 + 1, size)
    phases = 2 * math.pi * torch.rand(shape, generator=generator)
    k = torch.arange(shape[1]).clamp_min(1)[:, None]
    amplitudes = 4 * k**slope * (0.5 + torch.rand(shape, generator=generator))
    spectrum = torch.polar(amplitudes, phases)
    spectrum[:, 0] = 0
    if frames % 2 == 0:
        # Of a complex value only the real part would count, which may be nearly none: rounded, its logarithm is noise.
        spectrum[:, -1] = amplitudes[:, -1]
    means = torch.randn(count, 1, size, generator=generator)
    return torch.fft.irfft(spectrum, frames, dim=1) + 3 + means


def compared(generated: Tensor, real: Tensor) -> dict[str, float]:
    return dict(stream.compare(signals(generated).numpy(), signals(real).numpy()))


def slow_signals(clip: np.ndarray[Any, Any]) -> tuple[list[float], list[float]]:
    """Skewness and mean of `[F, D]`, one dimension after the other."""
    count = len(clip)
    half = count // 2
    skewness, means = [], []
    for signal in clip.T.astype(np.float64):
        amplitudes = []
        for k in range(half + 1):
            turned = sum(value * np.exp(-2j * np.pi * k * t / count) for t, value in enumerate(signal))
            amplitudes.append(2 * abs(turned) / (1 + half))
        k = np.arange(1, half + 1)
        slope, height = np.polyfit(np.log(k), np.log(np.array(amplitudes[1:]) + 1e-6), 1)
        fitted = np.exp(height) * k**slope
        norm = np.exp(height) / fitted.sum()
        skewness.append((k ** (slope + 3)).sum() / (np.sqrt(norm) * np.sqrt((k ** (slope + 2)).sum())))
        means.append(amplitudes[0])
    return skewness, means


def slow_stream(generated: Tensor, real: Tensor) -> dict[str, float]:
    (ours, our_means), (theirs, their_means) = (
        (np.array(some, np.float32) for some in zip(*map(slow_signals, clips.numpy()), strict=True))
        for clips in (generated, real)
    )
    squares = []
    for x, y in zip(ours.T, theirs.T, strict=True):
        ends = int(min(x.min(), y.min())) - 1, int(max(x.max(), y.max())) + 1
        histograms = [np.histogram(values, 50, ends)[0] / len(values) for values in (x, y)]
        squares.append(np.corrcoef(*histograms)[0, 1] ** 2)

    def share(points: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> float:
        radii = [sorted(np.linalg.norm(others - other, axis=1))[5] for other in others]
        inside = [
            any(np.linalg.norm(point - other) < radius for other, radius in zip(others, radii, strict=True))
            for point in points
        ]
        return sum(inside) / len(inside)

    return {
        "temporal": float(np.mean(squares)),
        "fidelity": share(our_means, their_means),
        "diversity": share(their_means, our_means),
    }


@pytest.mark.parametrize("frames", [4, 9, 16])
def test_stream_is_that_of_the_written_out_computation(frames: int) -> None:
    generated, real = drawn(40, frames, 4, 1, -0.7), drawn(30, frames, 4, 2)
    generated[:, :, 0] += 2
    found = compared(generated, real)
    assert found == pytest.approx(slow_stream(generated, real), abs=1e-6)
    assert all(0 < value < 1 for value in found.values())
    whole = np.array([slow_signals(clip) for clip in real.numpy()])
    np.testing.assert_allclose(signals(real), whole, rtol=1e-5)


def published(frames: int, size: int) -> Any:
    """The authors' own, from `pip install v-stream`."""
    module = pytest.importorskip("stream")
    if not hasattr(module, "STREAM"):
        pytest.skip("another package is called stream")
    return module.STREAM(num_frame=frames, num_embed=size)


@pytest.mark.parametrize(("frames", "size"), [(16, 24), (9, 8), (32, 5)])
def test_stream_is_that_of_the_authors_package(frames: int, size: int) -> None:
    theirs = published(frames, size)
    real, generated = drawn(150, frames, size, 3), drawn(120, frames, size, 4, -0.8)
    generated[:, :, 0] += 2
    pairs = [[theirs._calculate_skewness(clip) for clip in clips] for clips in (real, generated)]
    (skewness, means), (other_skewness, other_means) = (
        tuple(torch.stack([pair[part] for pair in some]).float() for part in (0, 1)) for some in pairs
    )
    torch.testing.assert_close(signals(real), torch.stack([skewness, means], 1), rtol=2e-5, atol=1e-5)
    spatial = theirs.stream_S(means, other_means)
    expected = {
        "temporal": float(theirs.stream_T(skewness, other_skewness)),
        "fidelity": spatial["stream_F"],
        "diversity": spatial["stream_D"],
    }
    assert compared(generated, real) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["fidelity"] < 1
    assert 0 < expected["temporal"] < 1


class Colours(nn.Module):
    """Embeds pictures by four random looks at each part of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.look = nn.Conv2d(3, 4, 56, 56)

    def forward(self, pictures: Tensor) -> Tensor:
        seen: Tensor = self.look(pictures).relu().mean((2, 3))
        return seen


def test_pictures_become_what_the_authors_package_makes_of_them(tmp_path: Path) -> None:
    theirs = published(8, 4)
    theirs.embedder = Colours()
    ours = Stream(Encoder("colours", "", "", Colours().eval()), CPU)
    clips = [noise_frames(8, 224, 280, seed) for seed in range(3)]
    for number, frames in enumerate(clips):
        np.save(tmp_path / f"vid_{number:05}.npy", frames.numpy())
    skewness, means = theirs.calculate_skewness(str(tmp_path), batch_size=2, num_workers=0)
    expected = torch.stack([skewness.float(), means.float()], 1)
    torch.testing.assert_close(ours(torch.stack(clips)), expected, rtol=1e-4, atol=1e-4)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stream(Encoder("colours", "", "", Colours().eval()), CPU)
    clips = torch.stack([noise_frames(6, 64, 48, seed) for seed in range(3)])
    whole = made(clips)
    assert whole.shape == (3, 2, 4)
    monkeypatch.setattr(stream, "PICTURES_AT_A_TIME", 4)
    torch.testing.assert_close(made(clips), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([made(clip[None]) for clip in clips]), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(224, 230), (120, 90), (300, 257), (64, 107)])
def test_pictures_are_fitted_as_by_pillow(height: int, width: int) -> None:
    frames = noise_frames(2, height, width)
    found, expected = stream.fit(frames.permute(0, 3, 1, 2), 14), prepared(frames, 14)
    assert found.shape == expected.shape
    # A level of 8 bits, to which Pillow rounds in between.
    level = 1 / 255 / 0.224
    assert (found - expected).abs().max() < 1.01 * level
    assert (found - expected).abs().mean() < level / 3
    if min(height, width) == 224:
        torch.testing.assert_close(found, expected)


def test_stream_tells_time_from_looks() -> None:
    real, second = drawn(256, 16, 8, 6), drawn(256, 16, 8, 7)
    assert compared(real, real) == {"temporal": pytest.approx(1), "fidelity": 1, "diversity": 1}
    other = compared(second, real)
    assert other["temporal"] > 0.6
    assert min(other["fidelity"], other["diversity"]) > 0.7
    shuffled = compared(real[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))], real)
    assert shuffled["temporal"] < other["temporal"] / 3
    assert shuffled["fidelity"] == shuffled["diversity"] == 1
    frozen = compared(second[:, :1].expand(-1, 16, -1), real)
    assert frozen["temporal"] < 0.1
    # What repeats a few clips is true and not varied, and what shows anything else is neither.
    few = compared(real[:8].repeat(32, 1, 1) + 0.1 * torch.randn(256, 16, 8), real)
    assert few["fidelity"] > 0.9
    assert few["diversity"] < 0.3
    elsewhere = compared(real + 30, real)
    assert elsewhere["fidelity"] == elsewhere["diversity"] == 0


def test_sets_larger_than_a_block_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    points, others = torch.randn(50, 3), torch.randn(40, 3) + 0.5
    whole = covered(points, others)
    assert 0 < int(whole.sum()) < 50
    monkeypatch.setattr(stream, "ROWS_AT_A_TIME", 7)
    assert torch.equal(covered(points, others), whole)


def test_too_few_frames_for_frequencies() -> None:
    with pytest.raises(ValueError, match=r"^STREAM needs 4 frames or more, not 3"):
        signals(torch.randn(2, 3, 4))


# STREAM's encoders


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(
        **{key: SMALL[key] for key in SMALL if key != "intermediate_size"}, image_size=70, patch_size=14
    )
    spread(transformers.Dinov2Model(config)).save_pretrained(folder)
    return folder


def prepared(frames: Tensor, multiple: int) -> Tensor:
    """`[F, 3, H, W]` by Pillow and torchvision."""
    from torchvision import transforms

    steps = transforms.Compose(
        [
            transforms.Resize(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pictures = torch.stack([steps(Image.fromarray(frame)) for frame in frames.numpy()])
    height, width = (side - side % multiple for side in pictures.shape[-2:])
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def test_dinov2_from_a_folder(dinov2: Path) -> None:
    made = stream.metric(dinov2, CPU)
    assert made.name == made.extractor.variant == "stream-dinov2"
    described = made.extractor.describe()
    assert described["weights"] == hashlib.sha256((dinov2 / "model.safetensors").read_bytes()).hexdigest()
    assert described["features"] == "32 of dinov2"
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    frames = noise_frames(4, 224, 290)
    with torch.inference_mode():
        tokens = model(prepared(frames, 14)).last_hidden_state[:, 0]
    torch.testing.assert_close(made.extractor(frames[None]), signals(tokens[None]), rtol=1e-4, atol=1e-4)


def test_another_encoder_from_a_folder(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=32)
    model = spread(transformers.CLIPVisionModel(config))
    model.save_pretrained(tmp_path)
    made = Stream(load_encoder(tmp_path, CPU), CPU)
    assert made.variant == "stream-clip_vision_model"
    frames = noise_frames(4, 224, 256)
    with torch.inference_mode():
        pooled = model(prepared(frames, 32), interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(made(frames[None]), signals(pooled[None]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50(weights=None).eval()


def test_swav_from_its_file(resnet: nn.Module, tmp_path: Path) -> None:
    weights = {key: weight for key, weight in resnet.state_dict().items() if not key.startswith("fc.")}
    path = tmp_path / "swav_800ep_pretrain.pth.tar"
    heads = {"projection_head.0.weight": torch.zeros(4, 4), "prototypes.weight": torch.zeros(4, 4)}
    torch.save({f"module.{key}": weight for key, weight in (weights | heads).items()}, path)
    made = Stream(load_encoder(path, CPU), CPU)
    assert made.variant == "stream-swav"
    assert made.describe()["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    frames = noise_frames(4, 224, 224)
    inner: list[Tensor] = []
    hook = resnet.get_submodule("avgpool").register_forward_hook(lambda *call: inner.append(call[2].flatten(1)))
    with torch.inference_mode():
        resnet(prepared(frames, 1))
    hook.remove()
    assert inner[0].shape == (4, 2048)
    torch.testing.assert_close(made(frames[None]), signals(inner[0][None]), rtol=1e-3, atol=1e-3)


def test_a_classifier_is_not_called_swav(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    torch.save(resnet.state_dict(), path)
    assert load_encoder(path, CPU).name == "resnet50"


def test_files_and_folders_that_are_no_encoder(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stream: there is no folder .*; name a folder with DINOv2-S"):
        load_encoder(tmp_path / "none", CPU)
    with pytest.raises(ValueError, match=r"holds a 'clip' model, which gives no embedding for a picture alone"):
        load_encoder(clip, CPU)
    path = tmp_path / "file.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^stream: .* holds more than weights or is damaged"):
        load_encoder(path, CPU)
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(ValueError, match=r"is no ResNet-50, bn1.weight does not fit: get https"):
        load_encoder(path, CPU)


def test_a_deeper_resnet_is_not_taken_for_one_of_50(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet101.pth"
    torch.save(resnet.state_dict() | {"layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"is no ResNet-50, layer3\.6\.conv1\.weight does not fit"):
        load_encoder(path, CPU)


# Warping error and flicker

HEIGHT, WIDTH = 96, 160


@pytest.fixture(scope="module")
def steady() -> dict[str, ClipMetric]:
    pytest.importorskip("cv2")
    return {made.name: made for made in steadiness.metrics()}


def value(made: ClipMetric, frames: Tensor) -> float:
    return made.keyed(frames, "")[made.name]


def panned(dx: int, dy: int, count: int = 5) -> Tensor:
    """A window `[F, 96, 160, 3]` that goes over a picture."""
    whole = texture(HEIGHT + 80, WIDTH + 80, grain=10)
    starts = [(40 + dy * t, 40 + dx * t) for t in range(count)]
    return as_frames([whole[y : y + HEIGHT, x : x + WIDTH] for y, x in starts])


def with_noise(frames: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))
    return (frames + deviation * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, 0), (0, -2), (5, 4)])
def test_a_translation_is_followed(steady: dict[str, ClipMetric], dx: int, dy: int) -> None:
    frames = panned(dx, dy)
    found = value(steady["warping-error"], frames)
    # A level of 8 bits.
    assert found < (1 / 255) ** 2
    if dx or dy:
        unmoved = (frames[1:] / 255 - frames[:-1] / 255).square().mean()
        assert found < unmoved / 500


def test_the_warping_error_grows_with_noise(steady: dict[str, ClipMetric]) -> None:
    frames = panned(3, 1)
    values = [value(steady["warping-error"], with_noise(frames, deviation)) for deviation in (0, 2, 4, 8, 16)]
    assert values == sorted(values)
    # Of two pictures with noise, the second smoothed by what is between its pixels.
    for found, deviation in zip(values[1:], (2, 4, 8, 16), strict=True):
        assert 0.5 < found / (2 * (deviation / 255) ** 2) < 1.1


def test_points_are_compared_where_the_flow_leads_them() -> None:
    first, second = (texture(40, 60, seed) for seed in (1, 2))
    frames = as_frames([first, second])

    def right(one: Any, other: Any) -> Any:
        step = 7.5 if np.array_equal(one, frames[0].numpy()) else -7.5
        return np.full((40, 60, 2), (step, 0), np.float32)

    pictures = frames.double() / 255
    between = (pictures[1][:, 7:-1] + pictures[1][:, 8:]) / 2
    expected = (between[:, :52] - pictures[0][:, :52]).square().mean()
    assert steadiness.warping_error(frames, right) == pytest.approx(float(expected), rel=1e-4)


def test_what_does_not_come_back_is_left_out() -> None:
    frames = as_frames([texture(40, 60, seed) for seed in (1, 2)])

    def half(one: Any, other: Any) -> Any:
        """Nothing moves; but on the way back the lower half does."""
        flow = np.zeros((40, 60, 2), np.float32)
        if np.array_equal(one, frames[1].numpy()):
            flow[20:, :, 0] = 0.9
        return flow

    expected = (frames[1, :20] / 255 - frames[0, :20] / 255).double().square().mean()
    assert steadiness.warping_error(frames, half) == pytest.approx(float(expected), rel=1e-4)

    def lost(one: Any, other: Any) -> Any:
        return np.full((40, 60, 2), 5, np.float32)

    assert math.isnan(steadiness.warping_error(frames, lost))


@pytest.mark.parametrize("step", [6, 20])
def test_flicker_is_the_step_of_the_brightness(steady: dict[str, ClipMetric], step: int) -> None:
    picture = texture(HEIGHT, WIDTH)
    still = as_frames([picture] * 6)
    assert value(steady["flicker"], still) == 0
    alternating = as_frames([picture + step * (t % 2) for t in range(6)])
    assert value(steady["flicker"], alternating) == pytest.approx(step / 255, rel=1e-6)
    # Even changes do not flicker.
    fading = as_frames([picture.round() + 3 * t for t in range(6)])
    assert value(steady["flicker"], fading) == pytest.approx(0, abs=1e-6)


def test_flicker_is_looked_for_where_nothing_moves(steady: dict[str, ClipMetric]) -> None:
    picture = texture(HEIGHT, WIDTH)
    moving = panned(4, 0, 6)
    # The left half stands still and flickers, the right one moves.
    frames = as_frames([picture + 10 * (t % 2) for t in range(6)])
    frames[:, :, WIDTH // 2 :] = moving[:, :, WIDTH // 2 :]
    assert value(steady["flicker"], frames) == pytest.approx(10 / 255, rel=0.2)
    assert math.isnan(value(steady["flicker"], moving))


def test_stillness_is_looked_for_two_frames_apart() -> None:
    def brighter(one: Any, other: Any) -> Any:
        """Takes what is brighter for what has moved to the right."""
        step = (other.astype(np.float32) - one).mean(-1)
        return np.stack([step, 0 * step], -1)

    picture = texture(40, 60)
    alternating = as_frames([picture.round() + 10 * (t % 2) for t in range(5)])
    assert steadiness.flicker(alternating, brighter) == pytest.approx(10 / 255, rel=1e-6)
    fading = as_frames([picture.round() + 10 * t for t in range(4)])
    assert math.isnan(steadiness.flicker(fading, brighter))


def test_clips_to_which_steadiness_does_not_apply(steady: dict[str, ClipMetric]) -> None:
    assert math.isnan(value(steady["warping-error"], panned(0, 0, 1)))
    assert math.isnan(value(steady["flicker"], panned(0, 0, 2)))
    small = panned(0, 0)[:, :8, :8]
    assert math.isnan(value(steady["warping-error"], small))
    assert math.isnan(value(steady["flicker"], small))


# All of them on files


def test_all_are_measured_on_files(clip: Path, dinov2: Path, steady: dict[str, ClipMetric], tmp_path: Path) -> None:
    for number in range(7):
        frames = panned(number % 3, number % 2, 6) / 255
        write_video(tmp_path / f"{number}.mp4", frames, 8)
        (tmp_path / f"{number}.txt").write_text(f"w{number}", encoding="utf-8")
    videos = read_videos(tmp_path, Sampling(frames=6))
    made = stream.metric(dinov2, CPU)
    found = measure(videos, [clipsim.metric(clip, CPU), made, *steady.values()], batch=3, workers=1)
    assert found.features["stream-dinov2"].shape == (7, 2, 32)
    assert {key: len(values) for key, values in found.scores.items()} == {
        "clipsim": 7,
        "warping-error": 7,
        "flicker": 7,
    }
    assert made.keyed(found.features[made.name], found.features[made.name]) == {
        "stream-dinov2-temporal": pytest.approx(1),
        "stream-dinov2-fidelity": 1,
        "stream-dinov2-diversity": 1,
    }
    frames = next(iter(videos))
    assert found.scores["clipsim"][0] == pytest.approx(ClipSim(str(clip), CPU)(frames, "w0"), abs=1e-6)
