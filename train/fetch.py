"""Known public weights: the table of `weights.toml`, and getting one of them when somebody asks for it by name.

Nothing here touches the network but `fetch`. The transfer is huggingface_hub's: it goes on behind a cut connection, and
honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and a login. Over HTTP it compares the size of what arrives and nothing
else, so every file is hashed here before it gets its name.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from videofactory_core.config import from_dict

from .data.content import checksum

# How often a transfer is taken up before the next source is asked.
ATTEMPTS = 3


@dataclass(frozen=True)
class File:
    """A file and where it is to be had: `sources` are "owner/repository/path", tried in turn."""

    name: str
    sources: tuple[str, ...]
    # In hexadecimal digits; "" where it is not publicly known.
    sha256: str = ""


@dataclass(frozen=True)
class Weight:
    """An entry of the table; `folder` is a folder's name in ComfyUI's models folder."""

    name: str
    title: str
    folder: str
    licence: str
    gigabytes: float
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        for part in (self.name, self.folder, *(file.name for file in self.files)):
            # They become a path, which must not lead anywhere else.
            if not re.fullmatch(r"\w[\w.-]*", part):
                raise ValueError(f"{self.name}: {part!r} is not a plain name; use letters, digits, '.', '-' and '_'")

    @property
    def notice(self) -> str:
        """What to know before it is fetched, in one line or two."""
        text = f"{self.name}: {self.title}; about {self.gigabytes:g} GB; licence {self.licence}"
        if "-NC" in self.licence:
            text += "\nIts licence is non-commercial: so are the models and the clips that are made with it."
        return text


def read_table() -> dict[str, Weight]:
    """All known weights by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    path = Path(__file__).with_name("weights.toml")
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: from_dict(Weight, {"name": name, **entry}, (name,)) for name, entry in entries.items()}


def find(name: str) -> Weight:
    """The weight of this name; ValueError, with the nearest name, when there is none."""
    table = read_table()
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
        raise ValueError(
            f"there is no weight {name!r}; the nearest name is {nearest}, and `videofactory fetch` lists them all"
        )
    return table[name]


def models_folder() -> Path:
    """ComfyUI's models folder: in the first folder of COMFYUI_PATH, else in comfy-cli's workspace, else `models`."""
    if named := os.environ.get("COMFYUI_PATH"):
        return Path(named.split(os.pathsep)[0]) / "models"
    workspace = Path.home() / "comfy" / "ComfyUI" / "models"
    return workspace if workspace.is_dir() else Path("models")


def fetch(weight: Weight, models: Path) -> list[Path]:
    """Bring the files of `weight` to where they belong in the folder `models`, and return them.

    A file appears whole, with the SHA-256 that the table or the hub states, or not at all. One that is there already is
    not fetched again, so that a second call goes on behind the last whole file, and never overwritten. Raises OSError
    when no source has a file, naming each of them and why, and when the disk does not take it.
    """
    folder = models / weight.folder
    if len(weight.files) > 1:
        folder /= weight.name
    return [_fetch_file(file, folder / file.name) for file in weight.files]


def _fetch_file(file: File, path: Path) -> Path:
    if file.sha256 and path.is_file() and checksum(path) == file.sha256:
        return path
    failures = []
    for source in file.sources:
        owner, name, inside = source.split("/", 2)
        try:
            _fetch_from(f"{owner}/{name}", inside, path, file.sha256)
            return path
        except Exception as error:  # of huggingface_hub, or of the HTTP library that its version uses
            if _is_of_the_disk(error):
                raise OSError(f"{path} was not written ({error}): check the free space and the folder") from error
            failures.append(f"{owner}/{name} ({_reason(error)})")
    raise OSError(
        f"{file.name} was not to be had from {' or '.join(failures)}; any copy of it that you find elsewhere serves as "
        "well with `videofactory convert --base FILE`"
    )


def _fetch_from(repository: str, inside: str, path: Path, sha256: str) -> None:
    """Bring one file from one source to `path`; ValueError when it is another file than it should be."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    found = get_hf_file_metadata(hf_hub_url(repository, inside, endpoint=endpoint))
    # The hub's etag is the SHA-256 of a large file, and something else of a small one.
    stated = found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag or "") else None
    if sha256 and stated and stated != sha256:
        raise ValueError("has another file of this name")
    expected = sha256 or stated
    if path.exists():
        if found.size not in (None, path.stat().st_size) or (expected and checksum(path) != expected):
            raise ValueError(f"{path} is in the way and is another file: move it away")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as staging:
        arrived = _download(repository, inside, found.commit_hash, staging, endpoint)
        if expected and checksum(arrived) != expected:
            raise ValueError("sent a damaged file: its checksum is wrong")
        os.replace(arrived, path)


def _download(repository: str, inside: str, commit: str | None, folder: str, endpoint: str | None) -> Path:
    """`hf_hub_download`, asked again when the connection is cut: not every version goes on behind the cut by itself."""
    from huggingface_hub import hf_hub_download

    attempts = ATTEMPTS
    while True:
        try:
            return Path(hf_hub_download(repository, inside, revision=commit, local_dir=folder, endpoint=endpoint))
        except Exception as error:
            attempts -= 1
            if not attempts or _is_of_the_disk(error):
                raise


def _is_of_the_disk(error: Exception) -> bool:
    """Whether this machine is at fault and no source: only then an error has a number of the operating system."""
    return isinstance(error, OSError) and error.errno is not None


def _reason(error: Exception) -> str:
    """Why a source failed, in a few words."""
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "gated: accept its terms there and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "no such file in it"
    if isinstance(error, HfHubHTTPError):
        return f"it answered {error.response.status_code}"
    if isinstance(error, ValueError):
        return str(error)
    return f"no connection: {' '.join(str(error).split())}"
