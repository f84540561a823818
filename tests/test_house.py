"""One core, two doors: which part of the project imports what."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "latent_preview", "server", "spandrel"}
LIBRARIES = {
    "videofactory_core": {"torch", "einops", "safetensors", "numpy", "av", "tokenizers", "transformers"},
    "nodes": {"torch", "einops", "videofactory_core", *HOST},
    "train": {
        "torch",
        "einops",
        "safetensors",
        "numpy",
        "accelerate",
        "huggingface_hub",
        "tqdm",
        "tomli",
        "PIL",
        "psutil",
        "transformers",
        # Extras, imported where they are used.
        "pyarrow",
        "prodigyopt",
        "av",
        "cv2",
        "rapidocr",
        "ray",
        "scenedetect",
        "torchvision",
        "bitsandbytes",
        "torch_fidelity",
        "deepspeed",
        "videofactory_core",
        "videofactory_train",
    },
}


def imported(file: Path, room: str) -> Iterator[str]:
    """Top-level packages that a file imports; relative imports that leave its room by the name of where they lead."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - len(file.relative_to(ROOT / room).parts)
            if node.level == 0 and node.module:
                yield node.module.split(".")[0]
            elif up == 1:
                yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            else:
                assert up < 1, f"{file} imports from outside of the project"


@pytest.mark.parametrize("room", LIBRARIES)
def test_arrows_point_only_towards_the_core(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        found = set(imported(file, room)) - set(sys.stdlib_module_names)
        assert found <= LIBRARIES[room], f"{file.relative_to(ROOT)} imports {sorted(found - LIBRARIES[room])}"


def test_the_core_and_the_nodes_can_live_inside_another_package() -> None:
    for room in ("videofactory_core", "nodes"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert not (node.module or "").startswith(("videofactory_core", "videofactory_train")), file
