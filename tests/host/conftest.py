"""One running host for all tests in this folder; without one they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from comfy_server import HOW_TO_GET_A_HOST, Host, host_folders, interpreter


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
