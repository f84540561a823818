"""A curation's settings: one table for each stage, and one for the rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from videofactory_core.atomic import write_text
from videofactory_core.config import SettingError, from_dict

from ..data.sources import CACHE_MARK, CACHE_SIGNATURE, CURATION
from .aesthetics import Aesthetics
from .caption import Caption
from .decide import Rules
from .keyframe import Keyframe
from .motion import Motion
from .scenes import Scenes
from .stage import Stage
from .text import Text

# Beside the settings in the file that `keep` writes.
KEYS = "keys"


@dataclass(frozen=True)
class CurateConfig:
    """Everything has a default; weights that the user has to supply are named here."""

    scenes: Scenes = field(default_factory=Scenes)
    keyframe: Keyframe = field(default_factory=Keyframe)
    text: Text = field(default_factory=Text)
    motion: Motion = field(default_factory=Motion)
    aesthetics: Aesthetics = field(default_factory=Aesthetics)
    caption: Caption = field(default_factory=Caption)
    decide: Rules = field(default_factory=Rules)

    def stages(self) -> list[Stage]:
        """The stages, in the order in which they are carried out."""
        return [stage for f in fields(self) if isinstance(stage := getattr(self, f.name), Stage)]


def keep(config: CurateConfig, keys: Mapping[str, str], folder: Path) -> None:
    """Write the settings, and what the stages' folders are called under them, for those who read the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    # So that it is no source of another curation.
    (folder / CACHE_MARK).write_text(f"{CACHE_SIGNATURE}\n", encoding="utf-8")
    write_text(folder / CURATION, json.dumps({**asdict(config), KEYS: dict(keys)}, indent=2))


def kept(folder: Path) -> tuple[CurateConfig, dict[str, str]]:
    """What `keep` wrote; ValueError where there is nothing, or it cannot be used."""
    path = folder / CURATION
    if not path.is_file():
        raise ValueError(f"{folder} is no curation: name the folder that `videofactory curate --out` wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = found.pop(KEYS)
        return from_dict(CurateConfig, found), keys
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error}): run `videofactory curate` again") from error


def read_config(path: Path | None) -> CurateConfig:
    """Settings from a TOML file, or the defaults; ValueError with file and setting when they cannot be used."""
    if path is None:
        return CurateConfig()
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a .toml file with settings")
    try:
        return from_dict(CurateConfig, tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    except SettingError as error:
        raise ValueError(f"{path}: {error}") from error
