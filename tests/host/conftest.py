"""One running host for all tests in this folder; without one they are skipped."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import HOW_TO_GET_A_HOST, Host, host_folders, interpreter

from videofactory_core.checkpoint import DEMO


@pytest.fixture(scope="session", params=[*enumerate(host_folders())] or [None], ids=lambda p: p and p[1].name)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if request.param is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    number, folder = request.param
    base = tmp_path_factory.mktemp("host")
    server = Host(folder, interpreter(number, folder), base)
    yield server
    server.stop()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(params=[*enumerate(host_folders())] or [None], ids=lambda p: p and p[1].name)
def inside(request: pytest.FixtureRequest) -> Any:
    """Runs one of the checks of `inside.py` and returns what it found."""
    if request.param is None:
        pytest.skip(HOW_TO_GET_A_HOST)
    number, folder = request.param

    def run(check: str) -> dict[str, Any]:
        script = Path(__file__).parent / "inside.py"
        command = [interpreter(number, folder), str(script), str(folder), check, str(DEMO)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
        assert ran.returncode == 0, ran.stderr[-3000:]
        result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return result

    return run
