"""Latents and text features on disk: made once, read by every run that asks for the same."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from videofactory_core import checkpoint
from videofactory_core.autoencoder import Autoencoder
from videofactory_core.text import TextEncoder

from .samples import Sample, decode, fingerprint
from .sources import CACHE_MARK, CACHE_SIGNATURE

# Part of every key: files of another format are not found, and so made again.
FORMAT = "videofactory-cache-1"
# Latents do not depend on these parts of the autoencoder, so that models with a tuned decoder share them.
UNUSED = ("decoder.", "post_quant_conv.")
# Looking for files waits for the disk more than for the processor.
THREADS = 8
LOG_SECONDS = 30.0
# How long a file that another machine wrote may take to show on a network disk.
PATIENCE_SECONDS = 60.0

T = TypeVar("T")


class Broken(NamedTuple):
    """A sample that cannot be used: the clip's name and the reason, to be read behind it."""

    name: str
    reason: str

    @classmethod
    def of(cls, sample: Sample, reason: str) -> Broken:
        """With a reason that may already begin with the name."""
        return cls(sample.clip.name, reason.removeprefix(f"{sample.clip.name} "))


@torch.no_grad()
def encode_frames(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """Latents `[B, C, F, h, w]`, the scaled mean, of `frames [B, F, H, W, 3]` uint8 on the autoencoder's device."""
    weight = next(autoencoder.parameters())
    video = rearrange(frames, "B F H W C -> B C F H W").float() / 127.5 - 1
    return autoencoder.encode(video.to(weight.dtype)).float()


@dataclass(frozen=True)
class Cache:
    """A folder of safetensors files, `<2 hex>/<key>.safetensors`, that any number of runs may fill and read at once.

    One file a sample holds `latents [C, F, h, w]`, one a caption `context [chunks * max_tokens, D]`, both float16. A
    context is the encoder's output for the caption alone: how many chunks are padding is up to the batch. The key is a
    hash of what is encoded, of the part of the model that encodes it, and of the precision. Every sample goes through
    its encoder by itself, so that what a file holds does not depend on what else was made with it.
    """

    folder: Path

    def fill(
        self,
        samples: Sequence[Sample],
        captions: Iterable[str],
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        accelerator: Accelerator,
        workers: int,
        log: Callable[[str], None],
    ) -> Filled:
        """Make what is not there yet of the latents and captions of `samples`, of `captions`, and of the empty prompt.

        Each part of the model is on `accelerator.device` only while it works, and on the CPU after. All processes of
        the run call this together and share the work. A sample that cannot be decoded is left out, and logged with its
        reason. Work that was interrupted goes on where it was.

        Raises ValueError when no sample is left or the processes do not see the same folder, OSError when the disk
        does not take a file.
        """
        assert samples
        started = time.monotonic()
        wanted = dict.fromkeys(["", *captions, *(sample.clip.caption or "" for sample in samples)])
        self._open()
        contexts = self._fill_contexts(text_encoder, list(wanted), accelerator, log)
        found = self._look_for_latents(autoencoder, samples, accelerator, log)
        # Equal clips under two names have one key.
        missing = {look.key: sample for look, sample in zip(found, samples, strict=True) if look.key and not look.there}
        reasons = self._make_latents(autoencoder, missing, accelerator, workers, log)
        self._wait_for([key for key in missing if key not in reasons])

        latents: dict[Sample, str] = {}
        broken: dict[Sample, Broken] = {}
        for look, sample in zip(found, samples, strict=True):
            reason = look.reason or reasons.get(look.key)
            if reason:
                broken[sample] = Broken.of(sample, reason)
            else:
                latents[sample] = look.key
        if accelerator.is_main_process:
            for name, reason in broken.values():
                log(f"left out {name}: {reason}")
            made = [missing[key] for key in missing if key not in reasons]
            seconds = time.monotonic() - started
            frames = sum(sample.bucket.frames for sample in made)
            log(
                f"cache {self.folder}: {len(latents)} samples, {len(broken)} left out, {len(made)} made now"
                + (f" in {seconds:.0f} s, {frames / seconds:.1f} frames/s" if made else "")
            )
        if not latents:
            name, reason = next(iter(broken.values()))
            raise ValueError(f"none of the {len(broken)} samples can be used; {name}: {reason}")
        return Filled(self, tuple(latents), tuple(broken.values()), latents, contexts)

    def read(self, key: str, name: str) -> Tensor:
        """A file's tensor as float32; ValueError when it is not there or not whole."""
        path = self.path(key)
        try:
            # Not mapped into memory: Windows lets nobody replace a mapped file, and small files are read faster whole.
            return load(path.read_bytes())[name].float()
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} of the cache cannot be read ({error}): start again to have it made anew"
            ) from None

    def path(self, key: str) -> Path:
        """Where the file of a key stands."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the file of a key is there, whole, and of that shape."""
        try:
            with safe_open(self.path(key), "pt") as file:
                tensor = file.get_slice(name)
                return tuple(tensor.get_shape()) == shape and tensor.get_dtype() == "F16"
        except (OSError, SafetensorError):
            return False

    def _open(self) -> None:
        """Make the folder, marked as one that datasets and backups pass over."""
        mark = self.folder / CACHE_MARK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not mark.is_file():
                mark.write_text(f"{CACHE_SIGNATURE}\n", encoding="utf-8")
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OSError:
        return OSError(f"{self.folder} cannot hold the cache ({error.strerror}): choose another folder for it")

    def _write(self, key: str, name: str, tensor: Tensor) -> None:
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from error
        try:
            checkpoint.write(path, {name: tensor}, {"format": FORMAT})
        except OSError:
            # Two programs may write one file at once, and Windows refuses the second.
            if not self.holds(key, name, tuple(tensor.shape)):
                raise

    def _fill_contexts(
        self, text_encoder: TextEncoder, captions: list[str], accelerator: Accelerator, log: Callable[[str], None]
    ) -> dict[str, str]:
        """The keys of captions, the files of all of which are there afterwards."""
        part = _fingerprint(text_encoder)
        keys = {caption: _key("context", part, accelerator.mixed_precision, caption) for caption in captions}
        config = text_encoder.config

        def there(caption: str) -> bool:
            chunks = len(text_encoder.tokenizer(caption))
            return self.holds(keys[caption], "context", (chunks * config.max_tokens, config.width))

        def look() -> list[str]:
            with ThreadPoolExecutor(THREADS) as pool:
                mine = _share(captions, accelerator)
                return [caption for caption, found in zip(mine, pool.map(there, mine), strict=True) if not found]

        missing = _together(look, accelerator)

        def make() -> list[str]:
            mine = _share(missing, accelerator)
            with torch.no_grad(), _on(accelerator, text_encoder), accelerator.autocast():
                for caption in _progress(mine, len(mine), "encode captions", accelerator, log):
                    self._write(keys[caption], "context", text_encoder.encode([caption])[0].half())
            return []

        if missing:
            _together(make, accelerator)
            self._wait_for([keys[caption] for caption in missing])
        return keys

    def _look_for_latents(
        self,
        autoencoder: Autoencoder,
        samples: Sequence[Sample],
        accelerator: Accelerator,
        log: Callable[[str], None],
    ) -> list[Look]:
        part = _fingerprint(autoencoder)

        def look(sample: Sample) -> Look:
            try:
                key = _key("latents", part, accelerator.mixed_precision, fingerprint(sample))
            except OSError as error:
                return Look("", False, f"cannot be read ({error.strerror}): check the file and who may read it")
            return Look(key, self.holds(key, "latents", latent_shape(autoencoder, sample)), "")

        def looks() -> list[tuple[int, Look]]:
            mine = _share(range(len(samples)), accelerator)
            with ThreadPoolExecutor(THREADS) as pool:
                found = pool.map(look, (samples[i] for i in mine))
                return list(
                    zip(mine, _progress(found, len(mine), "look into the cache", accelerator, log), strict=True)
                )

        return [found for _, found in sorted(_together(looks, accelerator))]

    def _make_latents(
        self,
        autoencoder: Autoencoder,
        missing: dict[str, Sample],
        accelerator: Accelerator,
        workers: int,
        log: Callable[[str], None],
    ) -> dict[str, str]:
        """Write the latents of samples by key; why it cannot be done, by key, for those where it cannot."""

        def make() -> list[tuple[str, str]]:
            mine = _share(list(missing.items()), accelerator)
            loader: DataLoader[tuple[str, Tensor | str]] = DataLoader(
                Frames(mine),
                batch_size=None,
                num_workers=min(workers, len(mine)),
                # Else the loader takes a number from the generator of the run.
                generator=torch.Generator(),
            )
            failed = []
            with _on(accelerator, autoencoder), accelerator.autocast():
                for key, frames in _progress(loader, len(mine), "encode clips", accelerator, log):
                    if isinstance(frames, str):
                        failed.append((key, frames))
                        continue
                    latents = encode_frames(autoencoder, frames[None].to(accelerator.device))[0].half().cpu()
                    if latents.isfinite().all():
                        self._write(key, "latents", latents)
                    else:
                        failed.append((key, "the autoencoder's numbers overflow for it; set precision to bf16 or no"))
            return failed

        return dict(_together(make, accelerator)) if missing else {}

    def _wait_for(self, keys: list[str]) -> None:
        """ValueError when files that some process has written do not show here."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for key in keys:
            while not self.path(key).is_file():
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.path(key)} was written by one process and is not there for another: choose a folder "
                        "for the cache that all machines share"
                    )
                time.sleep(0.2)


@dataclass(frozen=True)
class Filled:
    """A cache with everything that a run needs of it.

    `samples` are there, in the order given, and `broken` are not; `latents` and `contexts` are the keys of samples and
    captions.
    """

    cache: Cache
    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...]
    latents: dict[Sample, str]
    contexts: dict[str, str]

    def read_latents(self, sample: Sample) -> Tensor:
        """`[C, F, h, w]` float32; ValueError when the file is broken."""
        return self.cache.read(self.latents[sample], "latents")

    def read_context(self, caption: str) -> Tensor:
        """`[chunks * max_tokens, D]` float32; ValueError when the file is broken."""
        return self.cache.read(self.contexts[caption], "context")


class Look(NamedTuple):
    """A sample's key and whether its file is there, or the reason why there is no key."""

    key: str
    there: bool
    reason: str


class Frames(Dataset[tuple[str, "Tensor | str"]]):
    """The frames `[F, H, W, 3]` of samples with their keys, or the reason why there are none."""

    def __init__(self, samples: Sequence[tuple[str, Sample]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        key, sample = self.samples[index]
        try:
            return key, decode(sample)
        except ValueError as error:
            return key, str(error)


def latent_shape(autoencoder: Autoencoder, sample: Sample) -> tuple[int, int, int, int]:
    """`C F h w` of a sample."""
    frames, width, height = sample.bucket
    factor = autoencoder.config.downscale
    return autoencoder.config.latent_channels, frames, height // factor, width // factor


def _fingerprint(part: Autoencoder | TextEncoder) -> str:
    """Hash of the settings and weights that decide what a part encodes to."""
    digest = hashlib.blake2b(repr(part.config).encode(), digest_size=20)
    for name, tensor in sorted(part.state_dict().items()):
        if not name.startswith(UNUSED):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(*parts: str) -> str:
    # A caption may hold half a surrogate pair, which has no UTF-8.
    text = "\0".join([FORMAT, *parts]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=20).hexdigest()


def _share(items: Sequence[T], accelerator: Accelerator) -> Sequence[T]:
    """What of `items` this process works on."""
    return items[accelerator.process_index :: accelerator.num_processes]


def _together(work: Callable[[], list[T]], accelerator: Accelerator) -> list[T]:
    """The results of all processes in one list; an OSError in one of them is raised in all."""
    try:
        result, error = work(), None
    except OSError as raised:
        if accelerator.num_processes == 1:
            raise
        result, error = [], str(raised)
    failed: list[str] = [reason for reason in gather_object([error]) if reason]
    if failed:
        raise OSError(failed[0])
    gathered: list[T] = gather_object(result)
    return gathered


@contextmanager
def _on(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """The module on the device while this is open, on the CPU after."""
    module.to(accelerator.device)
    try:
        yield
    finally:
        module.to("cpu")
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _progress(
    items: Iterable[T], total: int, what: str, accelerator: Accelerator, log: Callable[[str], None]
) -> Iterator[T]:
    """`items`, with a bar on a terminal and else a line of the log now and then, in the first process."""
    if accelerator.is_main_process and sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total)
        return
    logged = time.monotonic()
    for done, item in enumerate(items):
        if accelerator.is_main_process and time.monotonic() - logged > LOG_SECONDS:
            log(f"{what}: {done}/{total}")
            logged = time.monotonic()
        yield item
