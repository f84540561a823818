"""What several test files share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from videofactory_core import checkpoint
from videofactory_core.config import PRESETS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several processes would wait for each other; and for the processes that tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def debug_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model with random weights everywhere, the zero-initialised layers too."""
    torch.manual_seed(0)
    model = checkpoint.build(PRESETS["debug"])
    with torch.no_grad():
        for part in (model.unet, model.autoencoder, model.text_encoder):
            for weight in part.parameters():
                if not weight.any():
                    weight.normal_(std=0.05)
    path = tmp_path_factory.mktemp("models") / "debug.safetensors"
    checkpoint.save(path, model, checkpoint.Metadata(title="debug", licence="Apache-2.0", origin="a test"))
    return path


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Accelerator; no test gets that of another."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in processes that tests start: how sums are rounded depends on how they are spread over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chromium() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Playwright's Chromium, and the settings with which it starts here, without a window and without calling home."""
    playwright = pytest.importorskip("playwright.sync_api", reason="for tests in a browser: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("for tests in a browser install Chromium")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        yield started.chromium, {"executable_path": program, "args": switches, "headless": True}


@pytest.fixture(scope="module")
def browser(chromium: tuple[Any, dict[str, Any]]) -> Iterator[Any]:
    """A real browser, without a window."""
    program, settings = chromium
    browser = program.launch(**settings)
    yield browser
    browser.close()
