"""The cache of latents and text features: what is found again, what is made anew, and who shares the work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from videofactory_train.data import cache as cache_module
from videofactory_train.data.cache import Cache, Filled, encode_frames
from videofactory_train.data.samples import Bucket, Sample, decode
from videofactory_train.data.sources import CACHE_MARK, Clip, read_dataset

from videofactory_core import checkpoint
from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import PRESETS
from videofactory_core.text import TextEncoder
from videofactory_core.video import write_video

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = PRESETS["debug"]
BUCKET = Bucket(4, 16, 8)
FPS = 8.0
LONG_CAPTION = "a red square " * 40


def draw_clip(path: Path, number: int, num_frames: int = 6) -> None:
    """A square that moves over a background that differs from clip to clip."""
    frames = torch.full((num_frames, 16, 32, 3), 20 * number % 256, dtype=torch.uint8)
    for i in range(num_frames):
        frames[i, 4:12, 2 + 3 * i : 10 + 3 * i, number % 3] = 230
    write_video(path, frames, FPS)


def one_sample(path: Path, caption: str = "a square", bucket: Bucket = BUCKET, first: float = 0.0) -> Sample:
    times = tuple(first + i / FPS for i in range(bucket.frames))
    return Sample(Clip(path.name, path, caption), times, bucket, "bucket")


def parts() -> tuple[Autoencoder, TextEncoder]:
    torch.manual_seed(0)
    model = checkpoint.build(CONFIG)
    return model.autoencoder, model.text_encoder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five samples, one of them a picture, one with a caption of several chunks."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        draw_clip(folder / f"{number}.mp4", number)
    captions = ["a red square", "a green square", LONG_CAPTION, "", "a red square"]
    made = [one_sample(folder / f"{n}.mp4", caption) for n, caption in enumerate(captions)]
    return [*made[:4], one_sample(folder / "4.mp4", captions[4], Bucket(1, 16, 8))]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Log(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def fill(folder: Path, samples: list[Sample], accelerator: Accelerator, log: Any = print, **change: Any) -> Filled:
    autoencoder, text_encoder = parts()
    arguments: dict[str, Any] = {
        "captions": [],
        "autoencoder": autoencoder,
        "text_encoder": text_encoder,
        "accelerator": accelerator,
        "workers": 0,
        "log": log,
    }
    return Cache(folder).fill(samples, **{**arguments, **change})


def written(folder: Path) -> dict[str, int]:
    """When each file of the cache was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_what_is_read_is_what_the_model_gives(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    autoencoder, text_encoder = parts()
    filled = fill(tmp_path, samples, accelerator, captions=["a prompt"])
    assert filled.samples == tuple(samples)
    assert not filled.broken
    for sample in samples:
        video = decode(sample).permute(3, 0, 1, 2)[None] / 127.5 - 1
        expected = autoencoder.encode(video)[0]
        latents = filled.read_latents(sample)
        assert latents.dtype == torch.float32
        assert latents.shape == (4, sample.bucket.frames, 4, 8)
        assert latents.std() > 0
        torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(encode_frames(autoencoder, decode(sample)[None])[0], expected)
    for caption in ("", "a prompt", LONG_CAPTION):
        context = filled.read_context(caption)
        torch.testing.assert_close(context, text_encoder.encode([caption])[0], atol=2e-3, rtol=2e-3)
    assert filled.read_context(LONG_CAPTION).shape == (2 * 77, CONFIG.text.width)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.name != CACHE_MARK]
    # The samples have four captions, the empty one among them, and one more was asked for.
    assert len(files) == len(samples) + 5
    assert all(file.parent.name == file.name[:2] and file.suffix == ".safetensors" for file in files)
    assert {tensor.dtype for file in files for tensor in load_file(tmp_path / file).values()} == {torch.float16}


def test_a_second_run_makes_nothing(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    fill(tmp_path, samples, accelerator)
    before, log = written(tmp_path), Log()
    filled = fill(tmp_path, samples, accelerator, log)
    assert written(tmp_path) == before
    assert "0 made now" in log[-1]
    assert filled.samples == tuple(samples)


def test_the_name_of_a_file_does_not_matter(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    filled = fill(tmp_path / "cache", samples[:1], accelerator)
    moved = tmp_path / "other.mp4"
    moved.write_bytes(samples[0].clip.path.read_bytes())
    twin = replace(samples[0], clip=replace(samples[0].clip, path=moved, name="other.mp4"))
    before = written(tmp_path / "cache")
    again = fill(tmp_path / "cache", [samples[0], twin], accelerator)
    assert written(tmp_path / "cache") == before
    assert again.latents[twin] == filled.latents[samples[0]]


def other_encoder(autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.mul_(1.01)


def other_decoder(autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.mul_(1.01)


def other_scale(autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
    autoencoder.config = replace(autoencoder.config, scale_factor=0.5)


def other_text(autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
    with torch.no_grad():
        text_encoder.text_model.final_layer_norm.bias.add_(0.1)


@pytest.mark.parametrize(
    ("change", "latents", "contexts"),
    [(other_encoder, 5, 0), (other_scale, 5, 0), (other_text, 0, 4), (other_decoder, 0, 0)],
)
def test_another_model_makes_its_own(
    tmp_path: Path,
    samples: list[Sample],
    accelerator: Accelerator,
    change: Callable[[Autoencoder, TextEncoder], None],
    latents: int,
    contexts: int,
) -> None:
    before = fill(tmp_path, samples, accelerator)
    autoencoder, text_encoder = parts()
    change(autoencoder, text_encoder)
    after = fill(tmp_path, samples, accelerator, autoencoder=autoencoder, text_encoder=text_encoder)
    assert sum(after.latents[sample] != before.latents[sample] for sample in samples) == latents
    assert sum(after.contexts[caption] != before.contexts[caption] for caption in before.contexts) == contexts
    assert len(written(tmp_path)) == len(samples) + len(before.contexts) + latents + contexts


def test_other_times_sizes_and_precisions_make_their_own(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    sample = samples[0]
    path = sample.clip.path
    kinds = [sample, one_sample(path, first=1 / FPS), one_sample(path, bucket=Bucket(4, 8, 8))]
    filled = fill(tmp_path, kinds, accelerator)
    assert len(set(filled.latents.values())) == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    half = fill(tmp_path, kinds, Accelerator(cpu=True, mixed_precision="bf16"))
    assert not {*half.latents.values(), *half.contexts.values()} & {*filled.latents.values(), *filled.contexts.values()}
    torch.testing.assert_close(half.read_latents(sample), filled.read_latents(sample), atol=0.02, rtol=0.05)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_another_shape(path: Path) -> None:
    save_file({"latents": torch.zeros(4, 4, 3, 3, dtype=torch.float16)}, path)


def replace_by_another_type(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path)


def replace_by_text(path: Path) -> None:
    path.write_text("not a tensor at all, but a text of some length")


@pytest.mark.parametrize(
    "harm", [shorten, empty, replace_by_another_shape, replace_by_another_type, replace_by_text, Path.unlink]
)
def test_a_harmed_file_is_made_again(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator, harm: Callable[[Path], None]
) -> None:
    filled = fill(tmp_path, samples, accelerator)
    expected = contents(tmp_path)
    before = written(tmp_path)
    harmed = [tmp_path / key[:2] / f"{key}.safetensors" for key in (filled.latents[samples[1]], filled.contexts[""])]
    for path in harmed:
        harm(path)
    fill(tmp_path, samples, accelerator)
    assert contents(tmp_path) == expected
    assert {name for name, when in written(tmp_path).items() if when != before[name]} == {path.name for path in harmed}


def test_reading_a_harmed_file_is_a_sentence(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    filled = fill(tmp_path, samples, accelerator)
    for harm in (shorten, empty, replace_by_text, Path.unlink):
        harm(filled.cache.path(filled.latents[samples[0]]))
        with pytest.raises(ValueError, match="start again"):
            filled.read_latents(samples[0])
        fill(tmp_path, samples, accelerator)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_clips_are_left_out_and_named(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator, workers: int
) -> None:
    noise, cut, gone = (tmp_path / name for name in ("noise.mp4", "cut.mp4", "gone.mp4"))
    noise.write_bytes(b"no video" * 1000)
    # The index is whole and says more than the file holds.
    whole = samples[0].clip.path.read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    mixed = [one_sample(noise), samples[0], one_sample(cut), samples[1], one_sample(gone)]
    log = Log()
    filled = fill(tmp_path / "cache", mixed, accelerator, log, workers=workers)
    assert filled.samples == (samples[0], samples[1])
    assert {name for name, _ in filled.broken} == {"noise.mp4", "cut.mp4", "gone.mp4"}
    for name, reason in filled.broken:
        assert reason
        assert name not in reason
        assert f"left out {name}: {reason}" in log
    assert "2 samples, 3 left out, 2 made now" in log[-1]
    with pytest.raises(ValueError, match=r"none of the 2 samples.*noise\.mp4"):
        fill(tmp_path / "cache", [mixed[0], mixed[2]], accelerator)


def test_numbers_that_overflow_are_a_broken_sample(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    autoencoder, _ = parts()
    autoencoder.config = replace(autoencoder.config, scale_factor=9e5)
    with pytest.raises(ValueError, match="precision"):
        fill(tmp_path, samples, accelerator, autoencoder=autoencoder)


def test_filling_draws_nothing_from_the_run_and_leaves_the_model_on_the_cpu(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    autoencoder, text_encoder = parts()
    state = torch.get_rng_state()
    fill(tmp_path, samples, accelerator, autoencoder=autoencoder, text_encoder=text_encoder, workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert {weight.device.type for part in (autoencoder, text_encoder) for weight in part.parameters()} == {"cpu"}


def test_what_a_file_holds_does_not_depend_on_the_others(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    fill(tmp_path / "whole", samples, accelerator)
    for sample in reversed(samples):
        fill(tmp_path / "parts", [sample], accelerator)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_file_that_another_program_wrote_meanwhile_will_do(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = os.replace

    def refuse(source: Path, target: Path) -> None:
        """What Windows says when the other program has opened its file."""
        move(source, target)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(fill(tmp_path, samples, accelerator).samples) == len(samples)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_takes_nothing_is_a_sentence(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OSError, match=r"was not written \(File too large\): check the free space"):
            fill(tmp_path, samples, accelerator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*/*"))


def test_a_folder_that_cannot_be_made_is_a_sentence(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another folder"):
        fill(tmp_path / "file", samples, accelerator)


def test_a_cache_inside_a_dataset_is_no_part_of_it(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    before = read_dataset(samples[0].clip.path.parent)
    cache = samples[0].clip.path.parent / "cache"
    fill(cache, samples, accelerator)
    (cache / "looks like a clip.mp4").write_bytes(b"")
    assert read_dataset(samples[0].clip.path.parent) == before
    shutil.rmtree(cache)


def test_a_long_fill_says_how_far_it_is(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LOG_SECONDS", 0.0)
    log = Log()
    fill(tmp_path, samples, accelerator, log)
    assert "encode clips: 4/5" in log


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def run_process(rank: int, port: int, folders: list[Path], samples: list[Sample], ready: Any, results: Any) -> None:
    """One of two processes of a run, or with port 0 a run of its own."""
    torch.set_num_threads(1)
    if port:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
    cache_module.PATIENCE_SECONDS = 0.5
    accelerator = Accelerator(cpu=True)
    parts()[1].encode([""])
    ready.wait()
    for folder in folders:
        log = Log()
        try:
            filled = fill(folder, samples, accelerator, log)
            results.put((rank, [s.clip.name for s in filled.samples], filled.broken, list(log)))
        except (ValueError, OSError) as error:
            results.put((rank, str(error), None, list(log)))
    accelerator.end_training()


def run_two(port: int, folders: list[list[Path]], samples: list[Sample]) -> list[list[Any]]:
    """What two processes say, each in order."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=run_process, args=(rank, port, folders[rank], samples, ready, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    said = [results.get(timeout=120) for _ in folders[0] + folders[1]]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [[answer[1:] for answer in said if answer[0] == rank] for rank in range(2)]


def test_processes_of_a_run_share_the_work(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(b"no video" * 1000)
    mixed = [one_sample(noise), *samples, one_sample(tmp_path / "gone.mp4")]
    alone = fill(tmp_path / "alone", mixed, accelerator)
    # A file stands where one process, and only that, needs a folder.
    prefixes = [key[:2] for key in (*alone.latents.values(), *alone.contexts.values())]
    single = next(key[:2] for key in alone.latents.values() if prefixes.count(key[:2]) == 1)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / single).write_text("")
    # Folders that the processes do not share, where either the text features or the latents are there already.
    for rank in range(2):
        fill(tmp_path / f"{rank}-text", [mixed[1]], accelerator, captions=alone.contexts)
        shutil.copytree(tmp_path / "alone", tmp_path / f"{rank}-latents")
        for key in alone.contexts.values():
            Cache(tmp_path / f"{rank}-latents").path(key).unlink()
    folders = [[tmp_path / name for name in ("shared", "blocked", f"{n}-text", f"{n}-latents")] for n in range(2)]
    said = run_two(free_port(), folders, mixed)
    assert "5 samples, 2 left out, 5 made now" in said[0][0][2][-1]
    assert not said[1][0][2]
    for shared, blocked, *own in said:
        assert shared[0] == [sample.clip.name for sample in samples]
        assert [name for name, _ in shared[1]] == ["noise.mp4", "gone.mp4"]
        assert "choose another folder" in blocked[0]
        assert all("all machines share" in answer[0] for answer in own)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_two_programs_fill_one_folder_at_once(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    said = run_two(0, [[tmp_path / "both"]] * 2, samples)
    for (answer,) in said:
        assert answer[0] == [sample.clip.name for sample in samples]
    fill(tmp_path / "alone", samples, accelerator)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
