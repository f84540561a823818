"""The file format: round trips, recognition without metadata, other programs' files, and hostile ones."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from videofactory_core import checkpoint
from videofactory_core.checkpoint import CheckpointError, Metadata, Model
from videofactory_core.config import PRESETS, ModelConfig, to_json
from videofactory_core.detect import identify

torch.set_num_threads(1)

METADATA = Metadata("A title", "MIT", "the tests", "2024-05-01", {"note": "kept, é"})
Shapes = dict[str, tuple[int, ...]]


def tensors_of(model: Model) -> dict[str, Tensor]:
    return {
        checkpoint.PREFIXES[part] + name: tensor
        for part, module in model.parts().items()
        for name, tensor in module.state_dict().items()
    }


def shapes_of(config: ModelConfig) -> Shapes:
    return {key: tuple(x.shape) for key, x in tensors_of(checkpoint.build(config, device="meta")).items()}


def equal(a: Model, b: Model) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def model() -> Model:
    """A debug model without zeros, so that a tensor in the wrong place shows."""
    torch.manual_seed(0)
    model = checkpoint.build(PRESETS["debug"])
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.copy_(torch.randn(tensor.shape))
    return model


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "debug.safetensors"
    checkpoint.save(path, model, METADATA)
    return path


def rewrite(
    whole: Path,
    path: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    metadata: Callable[[dict[str, str]], dict[str, str]] = dict,
) -> Path:
    """A changed copy of a checkpoint, made by the safetensors library."""
    with safe_open(whole, framework="pt") as file:
        strings = dict(file.metadata())
    save_file(tensors(load_file(whole)), path, metadata(strings) or None)
    return path


def raw(path: Path, tensors: Shapes, dtype: str = "F16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file whose data is a hole of any size."""
    size, header = 0, {"__metadata__": metadata or {}}
    for key, shape in tensors.items():
        end = size + 2 * int(torch.Size(shape).numel())
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, end]}  # type: ignore[dict-item]
        size = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


# Round trips


def test_float32_round_trip_is_bit_exact(model: Model, whole: Path) -> None:
    loaded = checkpoint.load(whole)
    assert equal(loaded, model)
    assert loaded.config == model.config
    assert loaded.metadata == METADATA
    assert not any(module.training for module in loaded.parts().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_round_trip_is_bit_exact(model: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "half.safetensors"
    checkpoint.save(path, model, METADATA, dtype)
    expected = {key: tensor.to(dtype) for key, tensor in tensors_of(model).items()}
    loaded = tensors_of(checkpoint.load(path, dtype=dtype))
    assert all(loaded[key].dtype == dtype and torch.equal(loaded[key], expected[key]) for key in expected)
    widened = tensors_of(checkpoint.load(path))
    assert all(torch.equal(widened[key], expected[key].float()) for key in expected)
    assert path.stat().st_size < 2.2 * sum(tensor.numel() for tensor in expected.values()) + 200_000


def test_saving_leaves_the_model_as_it_was(model: Model, tmp_path: Path) -> None:
    before = {key: tensor.clone() for key, tensor in tensors_of(model).items()}
    checkpoint.save(tmp_path / "a.safetensors", model, METADATA, torch.float16)
    assert all(x.dtype == torch.float32 and torch.equal(x, before[key]) for key, x in tensors_of(model).items())


def test_equal_models_give_equal_bytes(model: Model, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    checkpoint.save(path, checkpoint.load(whole), METADATA)
    assert path.read_bytes() == whole.read_bytes()


def test_the_order_in_which_metadata_is_given_does_not_matter(model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, keys in zip(paths, ("xyz", "zyx"), strict=True):
        checkpoint.save(path, model, Metadata("t", "l", "o", other=dict.fromkeys(keys, "1")))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_without_a_type_every_tensor_keeps_its_own_and_wide_ones_come_first(model: Model, tmp_path: Path) -> None:
    mixed = checkpoint.build(model.config)
    mixed.text_encoder.half()
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, mixed, METADATA)
    assert {key: x.dtype for key, x in load_file(path).items()} == {k: x.dtype for k, x in tensors_of(mixed).items()}
    data = path.read_bytes()
    header = json.loads(data[8 : header_bytes(data)])
    start = {kind: [x["data_offsets"][0] for x in header.values() if x.get("dtype") == kind] for kind in ("F32", "F16")}
    assert max(start["F32"]) < min(start["F16"])
    assert header_bytes(data) % 8 == 0


def test_the_safetensors_library_reads_the_same_tensors(model: Model, whole: Path) -> None:
    read = load_file(whole)
    expected = tensors_of(model)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_tensors_that_are_not_contiguous_are_written_in_order(model: Model, tmp_path: Path) -> None:
    turned = checkpoint.build(model.config)
    for a, b in zip(turned.parts().values(), model.parts().values(), strict=True):
        a.load_state_dict(b.state_dict())
    turned.unet.to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "a.safetensors", turned, METADATA)
    assert equal(checkpoint.load(tmp_path / "a.safetensors"), model)


def test_loaded_weights_outlive_their_file(model: Model, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    path.write_bytes(whole.read_bytes())
    loaded = checkpoint.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert equal(loaded, model)


def test_the_header_describes_the_file_to_other_programs(model: Model, whole: Path) -> None:
    with safe_open(whole, framework="pt") as file:
        strings = file.metadata()
    assert strings["format"] == "videofactory"
    assert strings["format_version"] == "1"
    assert strings["config"] == to_json(model.config)
    assert strings["licence"] == strings["modelspec.license"] == "MIT"
    assert strings["origin"] == "the tests"
    assert strings["note"] == "kept, é"
    assert strings["modelspec.sai_model_spec"] == "1.0.0"
    assert strings["modelspec.architecture"] == "videofactory-v1-v"
    assert strings["modelspec.implementation"] == "videofactory"
    assert strings["modelspec.title"] == "A title"
    assert strings["modelspec.date"] == "2024-05-01"
    assert strings["modelspec.resolution"] == "16x8"
    assert strings["modelspec.prediction_type"] == "v"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(title=st.text(max_size=20), licence=st.text(max_size=20), origin=st.text(max_size=20))
def test_any_text_in_the_metadata_comes_back(
    model: Model, tmp_path: Path, title: str, licence: str, origin: str
) -> None:
    path = tmp_path / "text.safetensors"
    checkpoint.save(path, model, Metadata(title, licence, origin))
    assert checkpoint.load(path).metadata == Metadata(title, licence, origin)


def test_half_a_surrogate_pair_does_not_make_an_unreadable_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, model, Metadata("a\ud800", "MIT", "x"))
    assert checkpoint.load(path).metadata.title == "a?"


def test_build_gives_the_asked_type(model: Model) -> None:
    built = checkpoint.build(PRESETS["debug"], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(built).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors_of(built.to(dtype=torch.float32)).values()} == {torch.float32}


# Writing is all or nothing


def breaks(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupts(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("where", "how", "raised"), [("fsync", breaks, OSError), ("replace", breaks, OSError),
                                                      ("fsync", interrupts, KeyboardInterrupt)])  # fmt: skip
def test_a_failed_save_leaves_the_old_file_and_no_other(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, how: Any, raised: type[BaseException]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, where, how)
    with pytest.raises(raised):
        checkpoint.save(path, model, METADATA)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_half_way_is_a_sentence(model: Model, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"was not written .*: check the free space"):
            checkpoint.save(path, model, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_no_folder_is_a_sentence(model: Model, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere.*was not written \(No such file or directory\)"):
        checkpoint.save(tmp_path / "nowhere" / "a.safetensors", model, METADATA)


# Recognition without metadata


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_recognised_by_its_shapes(name: str) -> None:
    with pytest.warns(UserWarning, match=f"the preset {name}, suggest unet.head_dim=.*prediction_type=.*frames of"):
        assert checkpoint.detect(shapes_of(PRESETS[name])) == PRESETS[name]


DEBUG = PRESETS["debug"]
VARIANTS: list[dict[str, Any]] = [
    {"merge": "add"},
    {"merge": "fuse"},
    {"merge": "mixture"},
    {"fusion": "add"},
    {"temporal_conv": False, "temporal_attention_behind": "blocks", "transformer_depth": (1, 0), "merge": "add"},
    {"temporal_middle": False},
    {"fusion": "add", "merge": "add", "temporal_attention_in": True},
    {"temporal_conv": False},
    {"temporal_attention": False},
    {"temporal_attention": False, "transformer_depth": (0, 2)},
    {"temporal_skips": False},
    {"use_linear_in_transformer": False},
    {"model_channels": 48, "channel_mult": (1, 2, 3), "transformer_depth": (2, 1, 0), "num_res_blocks": 2},
    {"in_channels": 9, "out_channels": 8},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_any_u_net_is_recognised_up_to_what_shapes_tell(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(DEBUG, unet=dataclasses.replace(DEBUG.unet, **changes))
    shapes = shapes_of(config)
    with pytest.warns(UserWarning, match="sizes that no preset has suggest"):
        detected = checkpoint.detect(shapes)
    assert {key: getattr(detected.unet, key) for key in changes} == changes
    assert shapes_of(detected) == shapes


def test_other_autoencoders_and_text_encoders_are_recognised() -> None:
    config = dataclasses.replace(
        DEBUG,
        unet=dataclasses.replace(DEBUG.unet, context_dim=24),
        autoencoder=dataclasses.replace(DEBUG.autoencoder, channels=12, channel_mult=(1, 3, 2), num_res_blocks=2),
        text=dataclasses.replace(DEBUG.text, width=24, layers=3, max_tokens=40),
    )
    shapes = shapes_of(config)
    with pytest.warns(UserWarning, match="no preset"):
        assert shapes_of(checkpoint.detect(shapes)) == shapes


def test_a_missing_part_is_named() -> None:
    shapes = {key: shape for key, shape in shapes_of(DEBUG).items() if not key.startswith("first_stage_model.")}
    with pytest.raises(CheckpointError, match=r"there is no autoencoder \(first_stage_model\.\*\)"):
        checkpoint.detect(shapes)


@pytest.mark.filterwarnings("ignore:The file does not say")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_detection_survives_any_subset_of_keys_and_any_shapes(data: st.DataObject) -> None:
    shapes = DEBUG_SHAPES.copy()
    for key in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=6)):
        shapes.pop(key, None)
    for key in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=6)):
        shapes[key] = tuple(data.draw(st.lists(st.integers(0, 2**40), max_size=5)))
    with contextlib.suppress(CheckpointError):
        checkpoint.detect(shapes)


DEBUG_SHAPES = shapes_of(DEBUG)


def as_the_host_saves(tensors: dict[str, Tensor], extras: tuple[str, ...] = ()) -> dict[str, Tensor]:
    text = "cond_stage_model.clip_l."
    renamed = {key.replace("cond_stage_model.", text): tensor for key, tensor in tensors.items()}
    added = {f"{text}logit_scale": torch.tensor(4.6), f"{text}transformer.text_projection.weight": torch.eye(16)}
    return {**renamed, **added, **{key: torch.tensor([]) for key in extras}}


def test_a_checkpoint_saved_by_the_host_loads(model: Model, whole: Path, tmp_path: Path) -> None:
    path = rewrite(whole, tmp_path / "host.safetensors", as_the_host_saves, lambda _: {"prompt": "{}"})
    with pytest.warns(UserWarning, match="the preset debug"):
        loaded = checkpoint.load(path)
    assert equal(loaded, model)
    assert loaded.config == model.config
    assert loaded.metadata == Metadata("host", "unknown", "unknown", None, {"prompt": "{}"})


@pytest.mark.parametrize(
    ("extras", "key", "prediction", "zero"),
    [
        (("v_pred", "ztsnr"), "v", "v_prediction", True),
        (("v_pred",), "v", "v_prediction", False),
        ((), "epsilon", "epsilon", False),
    ],
)
@pytest.mark.filterwarnings("ignore:The file does not say")
def test_the_host_s_marks_tell_the_prediction_type(
    whole: Path, tmp_path: Path, extras: tuple[str, ...], key: str, prediction: str, zero: bool
) -> None:
    path = rewrite(
        whole,
        tmp_path / "host.safetensors",
        lambda tensors: as_the_host_saves(tensors, extras),
        lambda _: {"modelspec.predict_key": key},
    )
    diffusion = checkpoint.load(path).config.diffusion
    assert (diffusion.prediction_type, diffusion.zero_terminal_snr) == (prediction, zero)


# Files that are wrong


def test_a_packed_header_stands_in_for_lost_metadata(model: Model, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    packed = checkpoint.pack_header(model.config, METADATA)
    save_file({**load_file(whole), checkpoint.KEPT_HEADER: packed}, path, {"modelspec.title": "the host's"})
    back = checkpoint.load(path)
    assert back.config == model.config
    assert back.metadata == METADATA
    assert equal(back, checkpoint.load(whole))
    assert checkpoint.explain(path).loadable


@pytest.mark.parametrize(
    "packed",
    [
        torch.frombuffer(bytearray(b"not JSON"), dtype=torch.uint8),
        torch.frombuffer(bytearray(b'{"format": 3}'), dtype=torch.uint8),
        torch.frombuffer(bytearray(b'["format"]'), dtype=torch.uint8),
        torch.zeros(checkpoint.MAX_KEPT_BYTES + 1, dtype=torch.uint8),
        torch.zeros(8),
        torch.zeros(0, dtype=torch.uint8),
    ],
    ids=["no JSON", "numbers", "a list", "too long", "floats", "empty"],
)
def test_a_damaged_packed_header_is_as_good_as_none(whole: Path, tmp_path: Path, packed: Tensor) -> None:
    path = tmp_path / "damaged.safetensors"
    save_file({**load_file(whole), checkpoint.KEPT_HEADER: packed}, path)
    with pytest.warns(UserWarning, match="does not say how it was made"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "[[1, 2, 3]]", "[[1, 2], [3, 4]]", '[["a", 1, 2], [1, 2, 3]]', "[[1, 2, NaN], [1, 2, 3]]", "{}"]
)
def test_preview_colours_that_make_no_sense_are_none(text: str) -> None:
    metadata = dataclasses.replace(METADATA, other={checkpoint.PREVIEW: text})
    assert checkpoint.preview_colours(metadata) is None
    good = dataclasses.replace(METADATA, other={checkpoint.PREVIEW: "[[1, 2, 3], [4, 5, 6]]"})
    assert checkpoint.preview_colours(good) == ([[1, 2, 3]], [4, 5, 6])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; check the name"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; name the"):
        checkpoint.load(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("the system has no named pipes")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        checkpoint.load(tmp_path / "pipe")


@pytest.mark.parametrize("text", [b"", b"short", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>"])
def test_a_file_that_is_not_safetensors(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(text)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("keep", "message"), [(1000, "truncated inside its header"), (-1, "truncated or")])
def test_a_truncated_file(whole: Path, tmp_path: Path, keep: int, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "a.safetensors")


def test_a_header_that_claims_more_than_the_format_allows(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims a header of 4611686018427387904 bytes"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_read(model: Model, whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    size = int.from_bytes(data[:8], "little")
    length = (size & ~0xFFFF) + 0x10280
    header = data[8 : 8 + size].ljust(length)
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert equal(checkpoint.load(path), model)


def first_three(keys: list[str]) -> str:
    return ", ".join(keys[:3])


def test_missing_tensors_are_counted_and_three_are_named(model: Model, whole: Path, tmp_path: Path) -> None:
    gone = [key for key in tensors_of(model) if key.startswith("first_stage_model.decoder.")]

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key not in gone}

    path = rewrite(whole, tmp_path / "a.safetensors", without)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert f"lacks {len(gone)} tensors ({first_three(gone)}, ...)" in str(caught.value)


def test_extra_tensors_are_counted_and_named(whole: Path, tmp_path: Path) -> None:
    extra = {"model.diffusion_model.alien": torch.ones(1), "stranger": torch.ones(1)}
    path = rewrite(whole, tmp_path / "a.safetensors", lambda tensors: {**tensors, **extra})
    with pytest.raises(CheckpointError, match=r"has 2 tensors \((stranger|model\.diffusion_model\.alien), "):
        checkpoint.load(path)


def test_shapes_that_do_not_fit_are_counted_and_named(whole: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.weight"
    path = rewrite(whole, tmp_path / "a.safetensors", lambda tensors: {**tensors, key: torch.ones(2, 3)})
    with pytest.raises(
        CheckpointError, match=r"in 1 tensor \(.*out\.2\.weight is \[2, 3\] instead of \[4, 8, 3, 3\]\)"
    ):
        checkpoint.load(path)


def test_integers_in_the_place_of_weights(whole: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    path = rewrite(whole, tmp_path / "a.safetensors", lambda tensors: {**tensors, key: tensors[key].int()})
    with pytest.raises(CheckpointError, match=r"out\.2\.bias is of type I32 instead of a floating-point type"):
        checkpoint.load(path)


def with_config(**changes: Any) -> dict[str, str]:
    """Metadata whose configuration differs by `part__setting=value`."""
    data = json.loads(to_json(DEBUG))
    for key, value in changes.items():
        *parts, name = key.split("__")
        target = data
        for part in parts:
            target = target[part]
        target[name] = value
    return {"format": "videofactory", "format_version": "1", "config": json.dumps(data)}


HOSTILE = {
    "no config": {"format": "videofactory", "format_version": "1"},
    "no json": {"format": "videofactory", "format_version": "1", "config": "{"},
    "deep json": {"format": "videofactory", "format_version": "1", "config": "[" * 100_000},
    "long integer": {"format": "videofactory", "format_version": "1", "config": '{"frames":' + "9" * 5000 + "}"},
    "no version": {"format": "videofactory"},
    "odd version": {"format": "videofactory", "format_version": "-1"},
    "endless version": {"format": "videofactory", "format_version": "9" * 10_000},
    "unknown key": with_config(unet__backdoor=1),
    "huge width": with_config(unet__model_channels=1 << 60),
    "largest width": with_config(unet__model_channels=1 << 17, unet__channel_mult=[1 << 17, 1 << 17]),
    "largest depth": with_config(unet__transformer_depth=[1 << 17, 1 << 17]),
    "many blocks": with_config(unet__num_res_blocks=1 << 17),
    "many layers": with_config(text__layers=1 << 17),
    "many autoencoder blocks": with_config(autoencoder__num_res_blocks=1 << 17),
    "no levels": with_config(unet__channel_mult=[], unet__transformer_depth=[]),
    "no autoencoder levels": with_config(autoencoder__channel_mult=[]),
    "zero groups": with_config(unet__norm_groups=0),
    "zero channels": with_config(unet__model_channels=0),
    "groups that do not divide": with_config(autoencoder__norm_groups=7),
    "text for a number": with_config(frames="4"),
    "fraction for a count": with_config(unet__num_res_blocks=1.5),
    "nan": with_config(fps=float("nan")),
    "wrong widths": with_config(unet__context_dim=32),
    "a list": {"format": "videofactory", "format_version": "1", "config": "[1]"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_refused_with_a_sentence(whole: Path, tmp_path: Path, name: str) -> None:
    path = rewrite(whole, tmp_path / "a.safetensors", metadata=lambda _: HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        checkpoint.load(path)
    explained = checkpoint.explain(path)
    assert not explained.loadable
    assert explained.notes


def test_a_newer_format_asks_for_an_update(whole: Path, tmp_path: Path) -> None:
    path = rewrite(whole, tmp_path / "a.safetensors", metadata=lambda strings: {**strings, "format_version": "2"})
    with pytest.raises(CheckpointError, match=r"made by a newer version of VideoFactory \(format 2\); update"):
        checkpoint.load(path)


def test_messages_cannot_steer_a_terminal(whole: Path, tmp_path: Path) -> None:
    path = rewrite(whole, tmp_path / "a.safetensors", lambda tensors: {**tensors, "\x1b[2J": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The header of the debug model over zeros in half precision, and where to write its corruptions."""
    folder = tmp_path_factory.mktemp("small")
    model = checkpoint.build(DEBUG)
    checkpoint.save(folder / "small.safetensors", model, METADATA, torch.float16)
    return folder, (folder / "small.safetensors").read_bytes()


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.filterwarnings("ignore:The file does not say")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_corruption_raises_anything_but_a_checkpoint_error(small: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, content = small
    damaged = bytearray(content)
    end = header_bytes(content)
    strings_end = content.index(b'"model.')
    # Half of the blows fall on the length and the metadata, a small share of the header.
    places = st.one_of(st.integers(0, strings_end), st.integers(0, end))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    for read in (checkpoint.load, checkpoint.explain):
        with contextlib.suppress(CheckpointError):
            read(path)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_truncation_is_a_checkpoint_error(small: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, content = small
    keep = data.draw(st.one_of(st.integers(0, 32), st.integers(0, len(content) - 1)))
    path = folder / "cut.safetensors"
    path.write_bytes(content[:keep])
    for read in (checkpoint.load, checkpoint.explain):
        with pytest.raises(CheckpointError):
            read(path)


# Pickles


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def zipped_pickle(path: Path, payload: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", "3")
    return path


@pytest.mark.parametrize("kind", ["zip", "bare"])
def test_a_malicious_pickle_is_named_and_not_run(tmp_path: Path, kind: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    if kind == "zip":
        zipped_pickle(path, Malicious(trace))
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps(Malicious(trace)))
        pickle.loads(path.read_bytes())
    assert trace.exists(), "the trap does not work"
    trace.unlink()

    with pytest.raises(CheckpointError, match=r"is a pickle, .*; convert it to \.safetensors first"):
        checkpoint.load(path)
    explained = checkpoint.explain(path)
    assert (explained.container, explained.kind, explained.loadable) == ("pickle", "unknown", False)
    assert "was not opened" in explained.notes[0]
    assert not trace.exists()


def test_a_program_in_torchscript_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"")
    with pytest.raises(CheckpointError, match="a program in TorchScript, not weights"):
        checkpoint.open_pickle(path, "cpu")


def test_a_pickle_of_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mm.ckpt"
    key = "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"
    torch.save({"epoch": 3, "state_dict": {key: torch.zeros(8, 8, dtype=torch.float16)}}, path)
    explained = checkpoint.explain(path)
    assert (explained.container, explained.kind, explained.loadable) == ("pickle", "animatediff", False)
    assert explained.parts == (checkpoint.Part("other", 1, 64, ("F16",)),)
    assert "convert it to .safetensors" in explained.notes[0]


# Other programs' files


U = "model.diffusion_model."
FOREIGN: dict[str, Shapes] = {
    "sd1": {f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    "sd2": {f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "sdxl": {f"{U}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
    "sd3": {f"{U}joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536)},
    "flux": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "svd": {f"{U}input_blocks.1.1.time_stack.0.attn2.to_k.weight": (320, 1024)},
    "modelscope": {"input_blocks.1.0.temopral_conv.conv1.0.weight": (320,)},
    "videocrafter": {f"{U}fps_embedding.0.weight": (9,), f"{U}input_blocks.1.0.temopral_conv.conv1.0.weight": (9,)},
    "animatediff": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
    "lora": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)},
    "controlnet": {"control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    "vae": {"decoder.mid.block_1.conv1.weight": (512, 512, 3, 3)},
    "clip": {"text_model.embeddings.token_embedding.weight": (49408, 768)},
    "rcan": {"head.0.weight": (64, 3, 3, 3), "body.0.body.0.body.3.conv_du.0.weight": (4, 64, 1, 1)},
    "wan": {"blocks.0.self_attn.norm_q.weight": (1536,)},
    "ltx": {f"{U}patchify_proj.weight": (2048, 128)},
    "hunyuanvideo": {"txt_in.individual_token_refiner.x": (9,), "double_blocks.0.img_attn.qkv.bias": (9,)},
    "unknown": {"layer.weight": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_models_are_named_and_refused(tmp_path: Path, kind: str) -> None:
    path = raw(tmp_path / "other.safetensors", FOREIGN[kind], metadata={"modelspec.license": "CC0"})
    explained = checkpoint.explain(path)
    assert (explained.kind, explained.loadable, explained.licence) == (kind, False, "CC0")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert f"is {explained.description}, not a VideoFactory checkpoint; " in str(caught.value)


@pytest.mark.parametrize("name", ["peft", "diffusers", "lycoris"])
def test_adapters_are_not_taken_for_the_model_that_they_change(name: str) -> None:
    suffix = {"peft": "lora_A.weight", "diffusers": "lora.down.weight", "lycoris": "hada_w1_a"}[name]
    assert identify({f"{U}input_blocks.1.0.temporal.convs.0.{suffix}": (4, 8)}).name == "lora"


SMALL_2D: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "attention_head_dim": 8,
}
UP_2D = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
PEERS: dict[str, Callable[[], Any]] = {
    "sd1": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768, **SMALL_2D, **UP_2D),
    "sd2": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=1024, **SMALL_2D, **UP_2D),
    "sdxl": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=2048, **SMALL_2D, **UP_2D),
    "controlnet": lambda: diffusers.ControlNetModel(cross_attention_dim=768, **SMALL_2D),
    "modelscope": lambda: diffusers.UNet3DConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    ),
    "svd": lambda: diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    "animatediff": lambda: diffusers.MotionAdapter(
        block_out_channels=(32, 32), motion_layers_per_block=1, motion_num_attention_heads=2
    ),
    "vae": lambda: diffusers.AutoencoderKL(block_out_channels=(32,)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(num_hidden_layers=1)),
}


@pytest.mark.parametrize("kind", PEERS)
def test_models_of_diffusers_and_transformers_are_named(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = PEERS[kind]().state_dict()
    explained = checkpoint.explain(raw(tmp_path / "a.safetensors", {k: tuple(x.shape) for k, x in state.items()}))
    assert explained.kind == kind
    assert explained.layout == ("" if kind == "clip" else "diffusers")


# Explaining our own


def test_a_whole_checkpoint_is_explained(model: Model, whole: Path) -> None:
    explained = checkpoint.explain(whole)
    assert (explained.kind, explained.container, explained.layout) == ("videofactory", "safetensors", "ldm")
    assert explained.loadable
    assert not explained.notes
    assert explained.config == DEBUG
    assert (explained.title, explained.licence, explained.origin) == ("A title", "MIT", "the tests")
    expected = {
        name: (len(module.state_dict()), sum(p.numel() for p in module.parameters()))
        for name, module in model.parts().items()
    }
    assert {part.name: (part.tensors, part.parameters) for part in explained.parts} == expected
    assert {part.dtypes for part in explained.parts} == {("F32",)}
    data = json.loads(json.dumps(dataclasses.asdict(explained)))
    assert (data["config"]["frames"], data["config"]["width"], data["config"]["fps"]) == (4, 16, 8.0)


def test_differences_are_explained_in_full(whole: Path, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.weight"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {k: x for k, x in tensors.items() if k != key}
        return {**kept, "stranger": torch.ones(1), "model.diffusion_model.out.2.bias": torch.ones(5)}

    explained = checkpoint.explain(rewrite(whole, tmp_path / "a.safetensors", change))
    assert not explained.loadable
    assert explained.differences.missing == (key,)
    assert explained.differences.extra == ("stranger",)
    assert explained.differences.mismatched == ("model.diffusion_model.out.2.bias is [5] instead of [4]",)


def test_a_checkpoint_without_metadata_is_explained_with_its_assumptions(whole: Path, tmp_path: Path) -> None:
    explained = checkpoint.explain(rewrite(whole, tmp_path / "a.safetensors", metadata=lambda _: {}))
    assert explained.loadable
    assert explained.config == DEBUG
    assert "diffusion.prediction_type=v_prediction" in explained.notes[0]
    assert explained.licence == "unknown"


def test_a_u_net_alone_is_explained(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in DEBUG_SHAPES.items() if key.startswith(U)}
    explained = checkpoint.explain(raw(tmp_path / "a.safetensors", shapes))
    assert (explained.kind, explained.loadable) == ("videofactory", False)
    assert [part.name for part in explained.parts] == ["unet"]
    assert "there is no autoencoder (first_stage_model.*) and no text_encoder" in explained.notes[0]


def test_explaining_reads_the_header_alone(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", {"layer.weight": (1 << 14, 1 << 21)})
    assert path.stat().st_size > 1 << 35
    assert checkpoint.explain(path).parts == (checkpoint.Part("other", 1, 1 << 35, ("F16",)),)
    path.unlink()


def test_metadata_cannot_steer_a_terminal(model: Model, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", model, Metadata("\x1b[2Jtitle", "l\r", "o\n"))
    explained = checkpoint.explain(tmp_path / "a.safetensors")
    assert (explained.title, explained.licence, explained.origin) == (" [2Jtitle", "l ", "o ")


def test_the_demo_model_fits_its_25_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "demo.safetensors"
    checkpoint.save(path, checkpoint.build(PRESETS["demo"]), METADATA, dtype=torch.float16)
    assert path.stat().st_size <= 25_000_000
