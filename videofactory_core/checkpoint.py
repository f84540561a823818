"""The one file format: write it, read it, and say what any other file is.

A checkpoint is a safetensors file with the keys of Stable Diffusion's single files. Its header says how the model is
built, what clips it was trained on, whose weights these are and under which licence.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .atomic import replacing
from .autoencoder import Autoencoder
from .config import ModelConfig, from_json, to_json
from .detect import KEPT_HEADER, KINDS, PREFIXES, identify, infer_config, keys_by_part
from .text import TextEncoder
from .unet.model import VideoUNet

FORMAT = "videofactory"
FORMAT_VERSION = 1
# The model that comes with the package.
DEMO = Path(__file__).parent / "assets" / "demo.safetensors"

# The limit of the safetensors format itself.
MAX_HEADER_BYTES = 100_000_000
MAX_KEPT_BYTES = 1_000_000
# Metadata: a matrix from latents, and 1, to red, green and blue.
PREVIEW = "preview_colours"
# Metadata of what was trained: the recipe and the models that it was made from, both JSON, and the data's fingerprint.
HISTORY = ("recipe", "parents", "dataset")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class CheckpointError(ValueError):
    """A file is not what was asked for; the message says what is wrong with it and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


@dataclass(frozen=True)
class Metadata:
    """Whose weights these are. `date` is ISO 8601; `other` holds the header's remaining entries."""

    title: str
    licence: str
    origin: str
    date: str | None = None
    other: dict[str, str] = field(default_factory=dict)

    @property
    def notice(self) -> str:
        """What whoever uses these weights has to know: a licence that, by its name, forbids commercial use; or ""."""
        if re.search(r"\bNC\b|non-?commercial", self.licence, re.IGNORECASE):
            return f"These weights are for non-commercial use only ({self.licence})."
        return ""


@dataclass
class Model:
    """A whole model: prompt to context, latents to latents, latents to frames."""

    config: ModelConfig
    unet: VideoUNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    metadata: Metadata

    def parts(self) -> dict[str, nn.Module]:
        """The modules under the names of `PREFIXES`."""
        return {"unet": self.unet, "autoencoder": self.autoencoder, "text_encoder": self.text_encoder}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move and cast all parts in place."""
        for module in self.parts().values():
            module.to(device=device, dtype=dtype)
        return self


@dataclass(frozen=True)
class Header:
    """What stands in a file besides the numbers; `dtypes` are safetensors' names."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def build(config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """A model with fresh weights."""
    with torch.device(device):
        unet, autoencoder = VideoUNet(config.unet), Autoencoder(config.autoencoder)
        text_encoder = TextEncoder(config.text)
    metadata = Metadata(title="untitled", licence="unknown", origin="random initialisation")
    return Model(config, unet, autoencoder, text_encoder, metadata).to(dtype=dtype)


# Writing


def save(path: str | os.PathLike[str], model: Model, metadata: Metadata, dtype: torch.dtype | None = None) -> None:
    """Write `model` as one file, cast to `dtype` (None: as it is); raises what `write` raises."""
    tensors = {
        PREFIXES[part] + name: tensor
        for part, module in model.parts().items()
        for name, tensor in module.state_dict().items()
    }
    write(path, tensors, header_strings(model.config, metadata), dtype)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    strings: Mapping[str, str],
    dtype: torch.dtype | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write `tensors`, cast to `dtype` (None: as they are), and `strings` as metadata; equal input gives equal bytes.

    With `read`, which is called once for each key, `tensors` may be on "meta", so that one is in memory at a time.
    The file appears whole or not at all. Raises OSError when the disk does not take it.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            _write(file, tensors, strings, dtype, read or tensors.__getitem__)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} was not written ({reason}): check the free space and the folder") from error


def _write(
    file: Any,
    tensors: Mapping[str, Tensor],
    strings: Mapping[str, str],
    dtype: torch.dtype | None,
    read: Callable[[str], Tensor],
) -> None:
    """The safetensors format by hand: the library's writer orders metadata at random, and holds all tensors at once."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
    # Wide types first, so that every tensor stays aligned to its type.
    order = sorted(tensors, key=lambda key: (-(dtype or tensors[key].dtype).itemsize, key))
    offset = 0
    for key in order:
        kind = dtype or tensors[key].dtype
        end = offset + tensors[key].numel() * kind.itemsize
        header[key] = {"dtype": DTYPES[kind], "shape": list(tensors[key].shape), "data_offsets": [offset, end]}
        offset = end
    # Half a surrogate pair in a title would make a file that no reader accepts.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        tensor = read(key).detach().to("cpu", dtype or tensors[key].dtype).contiguous()
        file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def modelspec(architecture: str, title: str, licence: str, origin: str) -> dict[str, str]:
    """What every file that we write says of itself, in the keys of Stability AI's ModelSpec 1.0.0, and its origin."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.title": title,
        "modelspec.license": licence,
        "origin": origin,
    }


def header_strings(config: ModelConfig, metadata: Metadata) -> dict[str, str]:
    """The header's metadata: our own keys, and those that other programs read."""
    velocity = config.diffusion.prediction_type == "v_prediction"
    strings = {
        **metadata.other,
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": to_json(config),
        "licence": metadata.licence,
        **modelspec(
            f"videofactory-v{FORMAT_VERSION}" + ("-v" if velocity else ""),
            metadata.title,
            metadata.licence,
            metadata.origin,
        ),
        "modelspec.implementation": "videofactory",
        "modelspec.resolution": f"{config.width}x{config.height}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.usage_hint": f"{config.frames} frames of {config.width}x{config.height} at {config.fps:g} a second",
    }
    if metadata.date is not None:
        strings["modelspec.date"] = metadata.date
    return strings


def _read_metadata(strings: Mapping[str, str], path: Path) -> Metadata:
    own = {"format", "format_version", "config", "licence", "origin"}
    return Metadata(
        title=strings.get("modelspec.title", path.stem),
        licence=strings.get("licence", strings.get("modelspec.license", "unknown")),
        origin=strings.get("origin", "unknown"),
        date=strings.get("modelspec.date"),
        other={k: v for k, v in strings.items() if k not in own and not k.startswith("modelspec.")},
    )


# Reading


@dataclass(frozen=True)
class Checkpoint:
    """A whole, intact VideoFactory file whose tensors are not read yet."""

    path: Path
    config: ModelConfig
    metadata: Metadata
    # What had to be assumed because the file's metadata is gone, and what the licence forbids; or nothing.
    note: str
    # For each part the names of its state dict and their keys in the file.
    keys: dict[str, dict[str, str]]

    def read(
        self, part: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The state dict of "unet", "autoencoder" or "text_encoder", as `dtype` (None: as it is stored)."""
        try:
            with safe_open(self.path, framework="pt") as file:
                # A copy even where nothing changes: the reader's tensors are windows onto the file.
                return {
                    name: file.get_tensor(key).to(device, dtype, copy=True) for name, key in self.keys[part].items()
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} changed or broke while it was read ({error}); try again") from error


def check(path: str | os.PathLike[str]) -> tuple[Checkpoint, Model]:
    """Hold a file against its configuration without reading its tensors; the model that comes along is on "meta".

    A file whose metadata is gone is recognised by its keys and shapes. Raises CheckpointError for everything that is
    not a whole, intact VideoFactory checkpoint.
    """
    path = Path(path)
    header = read_header(path)
    config, note = _read_config(header, path)
    model = _skeleton(config, header, path)
    _compare(model, header).check(path)
    metadata = _read_metadata(header.metadata, path)
    note = " ".join(filter(None, (note, metadata.notice)))
    return Checkpoint(path, config, metadata, note, keys_by_part(header.shapes)), model


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Model:
    """Read a checkpoint onto `device` as `dtype` (None: as it is stored), in eval mode; raises what `check` raises.

    Warns of what had to be assumed about a file whose metadata is gone, and of a licence that forbids commercial use.
    """
    file, model = check(path)
    if file.note:
        warnings.warn(file.note, stacklevel=2)
    for part, module in model.parts().items():
        module.load_state_dict(file.read(part, device, dtype), assign=True)
        module.eval()
    model.metadata = file.metadata
    return model


def read_header(path: str | os.PathLike[str]) -> Header:
    """Keys, shapes, types and metadata of a safetensors file, without its tensors; CheckpointError for any other."""
    path = Path(path)
    if container(path) == "pickle":
        raise CheckpointError(
            f"{path} is a pickle, a format that can run code when it is opened; convert it to .safetensors first"
        )
    try:
        # The reader for torch would ask for memory of the file's size.
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
            dtypes = {key: s.get_dtype() for key, s in slices.items()}
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT and dtypes.get(KEPT_HEADER) == "U8":
                length = math.prod(shapes[KEPT_HEADER])
                metadata = metadata | (_unpack(file.get_tensor(KEPT_HEADER)) if length <= MAX_KEPT_BYTES else {})
            return Header(shapes, dtypes, metadata)
    except (SafetensorError, OSError) as error:
        if "not fully covered" in str(error):
            raise CheckpointError(f"{path} is truncated or has bytes too many; copy or download it again") from error
        raise CheckpointError(f"{path} has a broken safetensors header ({error}); get it again") from error


def pack_header(config: ModelConfig, metadata: Metadata) -> Tensor:
    """A file's metadata as a tensor of bytes `[N]`, for programs that keep tensors and drop metadata.

    Saved under `KEPT_HEADER` it is found again when the metadata is gone.
    """
    text = json.dumps(header_strings(config, metadata), sort_keys=True).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def preview_colours(metadata: Metadata) -> tuple[list[list[float]], list[float]] | None:
    """From a latent cell to its colour in -1..1: a matrix `[C][3]` and a bias `[3]`; None if the file has none."""
    try:
        table = torch.tensor(json.loads(metadata.other.get(PREVIEW, "")), dtype=torch.float32)
    except (ValueError, TypeError, RecursionError):
        return None
    if table.ndim != 2 or table.shape[1] != 3 or len(table) < 2 or not table.isfinite().all():
        return None
    return table[:-1].tolist(), table[-1].tolist()


def _unpack(packed: Any) -> dict[str, str]:
    """What `pack_header` packed, nothing when it is damaged."""
    try:
        strings = json.loads(packed.tobytes())
    except (ValueError, RecursionError):
        return {}
    plain = isinstance(strings, dict) and all(isinstance(value, str) for value in strings.values())
    return strings if plain else {}


def container(path: Path) -> str:
    """By its first bytes a file is "safetensors" or "pickle"; anything else raises CheckpointError."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a folder; name the .safetensors file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; name a .safetensors file")
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the name and the folder") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}); check its permissions") from error
    length, opening = int.from_bytes(start[:8], "little"), start[8:9]
    # A header's length may happen to begin like a pickle, so this comes first.
    if opening == b"{" and length <= MAX_HEADER_BYTES:
        if 8 + length > status.st_size:
            raise CheckpointError(f"{path} is truncated inside its header; copy or download it again")
        return "safetensors"
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return "pickle"
    if opening == b"{":
        raise CheckpointError(
            f"{path} claims a header of {length} bytes, more than safetensors allows; do not trust it"
        )
    raise CheckpointError(f"{path} is not a safetensors file (it begins with {start!r}); get the right file")


def _read_config(header: Header, path: Path) -> tuple[ModelConfig, str]:
    """The configuration, and a note on what had to be assumed."""
    strings = header.metadata
    if strings.get("format") != FORMAT:
        kind = identify(header.shapes)
        if kind.name != FORMAT:
            raise CheckpointError(f"{path} is {kind.description}, not a VideoFactory checkpoint; {kind.use}")
        try:
            return infer_config(header.shapes, strings)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    version = strings.get("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise CheckpointError(f"{path} has no valid format version (it says {version!r:.40}); get the file again")
    if int(version) > FORMAT_VERSION:
        raise CheckpointError(f"{path} was made by a newer version of VideoFactory (format {version}); update")
    try:
        return from_json(strings.get("config", "")), ""
    except Exception as error:  # the text is untrusted: whatever it provokes is its fault
        raise CheckpointError(f"{path} has a damaged configuration ({error}); get the file again") from error


def _skeleton(config: ModelConfig, header: Header, path: Path) -> Model:
    """The model without memory for its weights."""
    unet, autoencoder, text = config.unet, config.autoencoder, config.text
    layers = (
        unet.num_res_blocks * (len(unet.channel_mult) + sum(unet.transformer_depth))
        + max(unet.transformer_depth, default=0)
        + autoencoder.num_res_blocks * len(autoencoder.channel_mult)
        + text.layers
    )
    # Every layer has weights; more layers than tensors would only keep us busy for hours.
    if layers > len(header.shapes):
        raise CheckpointError(
            f"{path} describes {layers} layers and has {len(header.shapes)} tensors; it is no whole checkpoint, get "
            "the file again"
        )
    try:
        return build(config, device="meta")
    except Exception as error:  # the sizes are untrusted: whatever they provoke is their fault
        raise CheckpointError(f"{path} describes a model that cannot be built ({error}); get the file again") from error


@dataclass(frozen=True)
class Differences:
    """What a file has and its configuration does not know, and the reverse; `mismatched` are whole phrases."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def check(self, path: Path) -> None:
        """CheckpointError unless all is empty."""
        if self.missing:
            raise CheckpointError(
                f"{path} lacks {listing(self.missing)}; it is a part of a model or damaged, get the whole checkpoint"
            )
        if self.extra:
            raise CheckpointError(
                f"{path} has {listing(self.extra)} that its configuration does not know; convert it again from its "
                "source"
            )
        if self.mismatched:
            raise CheckpointError(
                f"{path} does not fit its configuration in {listing(self.mismatched)}; convert it again from its source"
            )


def listing(items: tuple[str, ...]) -> str:
    """How many tensors, and the names of the first three."""
    tensors = "1 tensor" if len(items) == 1 else f"{len(items)} tensors"
    return f"{tensors} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"


def _compare(model: Model, header: Header) -> Differences:
    """Hold a file's keys, shapes and types against a model."""
    found = keys_by_part(header.shapes)
    missing, mismatched, extra = [], [], list(found[""].values())
    for part, module in model.parts().items():
        expected = module.state_dict()
        missing += [PREFIXES[part] + name for name in expected if name not in found[part]]
        extra += [key for name, key in found[part].items() if name not in expected]
        for name, key in found[part].items():
            if name not in expected:
                continue
            shape, dtype = header.shapes[key], header.dtypes[key]
            if shape != tuple(expected[name].shape):
                mismatched.append(f"{key} is {list(shape)} instead of {list(expected[name].shape)}")
            elif dtype not in DTYPES.values():
                mismatched.append(f"{key} is of type {dtype} instead of a floating-point type")
    return Differences(tuple(missing), tuple(extra), tuple(mismatched))


def detect(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> ModelConfig:
    """The configuration that a file's keys and shapes tell (see `infer_config`), warning of what they do not tell.

    Raises CheckpointError when a part is absent.
    """
    try:
        config, note = infer_config(shapes, metadata or {})
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    warnings.warn(note, stacklevel=2)
    return config


# Saying what any file is


@dataclass(frozen=True)
class Part:
    """One part of a file: the tensors under one prefix."""

    name: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What a file is; `dataclasses.asdict` gives plain data for JSON."""

    path: str
    # "safetensors" or "pickle".
    container: str
    # A name of `KINDS`, or "unknown".
    kind: str
    description: str
    # What can be done with it.
    use: str
    # Key names: "ldm", "diffusers" or "".
    layout: str
    # Whether `load` takes it.
    loadable: bool
    title: str
    licence: str
    origin: str
    date: str | None
    # None unless it is a VideoFactory model whose configuration could be read or detected.
    config: ModelConfig | None
    parts: tuple[Part, ...]
    differences: Differences
    # How it was trained, where the file tells: entries of `HISTORY`.
    history: dict[str, str]
    # Whole sentences: what was assumed, what is wrong.
    notes: tuple[str, ...]


def explain(path: str | os.PathLike[str]) -> Explanation:
    """Say what the file at `path` is from its header alone; CheckpointError when it is neither safetensors nor pickle.

    A pickle is opened by PyTorch's restricted reader, which runs no code, and only to name it.
    """
    path = Path(path)
    kept_in = container(path)
    notes = []
    if kept_in == "pickle":
        header, note = _read_pickle(path)
        notes += [note]
    else:
        header = read_header(path)
    kind = identify(header.shapes)
    config, differences, loadable = None, Differences(), False
    if kept_in == "safetensors" and FORMAT in (header.metadata.get("format"), kind.name):
        kind = next(kind for kind in KINDS if kind.name == FORMAT)
        try:
            config, note = _read_config(header, path)
            differences = _compare(_skeleton(config, header, path), header)
            notes += [note] if note else []
            differences.check(path)
            loadable = True
        except CheckpointError as error:
            notes.append(str(error))
    metadata = _read_metadata(header.metadata, path)
    has_ldm_keys = any("input_blocks." in key for key in header.shapes)
    has_diffusers_keys = any("down_blocks." in key for key in header.shapes)
    return Explanation(
        path=str(path),
        container=kept_in,
        kind=kind.name,
        description=kind.description,
        use=kind.use,
        layout="ldm" if has_ldm_keys else "diffusers" if has_diffusers_keys else "",
        loadable=loadable,
        title=_printable(metadata.title),
        licence=_printable(metadata.licence),
        origin=_printable(metadata.origin),
        date=metadata.date and _printable(metadata.date),
        config=config,
        parts=_parts(header),
        differences=differences,
        history={key: _printable(header.metadata[key]) for key in HISTORY if key in header.metadata},
        notes=tuple(notes),
    )


def _read_pickle(path: Path) -> tuple[Header, str]:
    """Keys and shapes of a pickle, as far as they can be had without running it, and a note."""
    note = "It is a pickle, a format that can run code when it is opened; convert it to .safetensors before use."
    try:
        tensors = open_pickle(path, "meta")
    except CheckpointError as error:
        return Header({}, {}, {}), f"{note} It was not opened: {error}."
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: DTYPES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in tensors.items()}
    return Header(shapes, dtypes, {}), note


def open_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a pickle by PyTorch's restricted reader, which runs no code: on "cpu" as windows onto the file.

    On "meta" they are shapes and types alone. The format before PyTorch 1.6 is read into memory. Raises CheckpointError
    for a pickle that holds anything else.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    # Which PyTorch before 2.6 would hand to `torch.jit.load`, and that runs it.
    if zipped and _is_program(path):
        raise CheckpointError(
            f"{path} is a program in TorchScript, not weights; get the state dict or a .safetensors file"
        )
    # The restricted reader could be tricked with the older format before 2.6.
    if not zipped and torch.__version__ < "2.6":  # compared as versions
        raise CheckpointError(
            f"{path} is a pickle of an old format, which PyTorch reads safely from 2.6 on; update it, or get a "
            ".safetensors file"
        )
    try:
        data = torch.load(path, map_location=device, weights_only=True, mmap=zipped)
    except Exception as error:  # the reader meets hostile input with exceptions of many kinds
        raise CheckpointError(
            f"{path} is a pickle that holds more than tensors or is damaged; get a .safetensors file"
        ) from error
    tables = [data, *data.values()] if isinstance(data, dict) else []
    return max(
        ({str(k): v for k, v in table.items() if isinstance(v, Tensor)} for table in tables if isinstance(table, dict)),
        key=len,
        default={},
    )


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _parts(header: Header) -> tuple[Part, ...]:
    """The file's tensors by the part that they belong to."""
    owners = (
        ("unet", ("model.diffusion_model.", "diffusion_model.")),
        ("autoencoder", ("first_stage_model.", "vae.")),
        ("text_encoder", ("cond_stage_model.", "conditioner.", "text_encoders.")),
    )
    groups: dict[str, list[str]] = {}
    for key in header.shapes:
        name = next((name for name, prefixes in owners if key.startswith(prefixes)), "other")
        groups.setdefault(name, []).append(key)
    return tuple(
        Part(
            name,
            tensors=len(keys),
            parameters=sum(math.prod(header.shapes[key]) for key in keys),
            dtypes=tuple(sorted({header.dtypes[key] for key in keys})),
        )
        for name, keys in groups.items()
    )


def _printable(text: str) -> str:
    """Without the control characters by which a file could steer the terminal that shows it."""
    return "".join(c if c.isprintable() else " " for c in text)
