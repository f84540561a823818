"""Public weights on request: from a small hub on this machine, over every kind of bad day that a hub can have."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from videofactory_train.fetch import File, Weight, fetch, find, models_folder, read_table

CONTENT = os.urandom(100_000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDERS = {"checkpoints", "animatediff_models", "videofactory", "loras"}


class Hub(ThreadingHTTPServer):
    """Answers like the Hugging Face hub for `files`, whose keys are "owner/repository/path"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        # What is sent of a file where it is not what the hub states.
        self.sent: dict[str, bytes] = {}
        self.gated: set[str] = set()
        # Bytes after which the next transfer breaks off.
        self.cut: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        repository, _, file = self.path.partition("/resolve/")
        name = f"{repository[1:]}/{file.partition('/')[2]}"
        self.server.requests.append((self.command, name, self.headers.get("Range")))
        if repository[1:] in self.server.gated:
            return self.refuse(401, "GatedRepo")
        if not any(known.startswith(f"{repository[1:]}/") for known in self.server.files):
            return self.refuse(401, "RepoNotFound")
        if name not in self.server.files:
            return self.refuse(404, "EntryNotFound")
        content = self.server.files[name]
        body = self.server.sent.get(name, content)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        offset = int(start[1]) if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {offset}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - offset))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        # As of a large file; small ones have the hash of git, which is no SHA-256.
        if not name.endswith(".json"):
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut, self.server.cut = self.server.cut, None
        self.wfile.write(body[offset:cut])
        self.close_connection = cut is not None
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name, value in {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    # It was read when the library was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def weight(*files: File) -> Weight:
    return Weight("w", "a weight", "checkpoints", "Apache-2.0", 0.1, files)


def everything(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


ONE = weight(File("a.safetensors", ("some/where/sub/a.safetensors",)))


def test_a_file_arrives_where_it_belongs(hub: Hub, tmp_path: Path) -> None:
    hub.files["some/where/sub/a.safetensors"] = CONTENT
    assert fetch(ONE, tmp_path / "models") == [tmp_path / "models" / "checkpoints" / "a.safetensors"]
    assert everything(tmp_path / "models") == [tmp_path / "models" / "checkpoints" / "a.safetensors"]
    assert (tmp_path / "models" / "checkpoints" / "a.safetensors").read_bytes() == CONTENT


def test_several_files_get_a_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files.update({"some/where/u.pth": CONTENT, "some/where/c.json": b"{}"})
    both = weight(File("u.pth", ("some/where/u.pth",)), File("c.json", ("some/where/c.json",)))
    paths = fetch(both, tmp_path)
    assert paths == [tmp_path / "checkpoints" / "w" / "u.pth", tmp_path / "checkpoints" / "w" / "c.json"]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"{}"]
    del hub.requests[:]
    assert fetch(both, tmp_path) == paths
    assert not hub.bodies()


def test_a_cut_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    # The library counts in blocks of 10 MiB.
    hub.files["some/where/sub/a.safetensors"] = content = os.urandom(12 << 20)
    hub.cut = 11 << 20
    (path,) = fetch(ONE, tmp_path)
    assert path.read_bytes() == content
    assert [bytes_ for method, _, bytes_ in hub.requests if method == "GET"] == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("first", ["no/repository/a.safetensors", "some/where/no-file", "not/yours/a.safetensors"])
def test_the_second_source_serves_when_the_first_does_not(first: str, hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("not/yours")
    hub.files["some/where/a.safetensors"] = CONTENT
    (path,) = fetch(weight(File("a.safetensors", (first, "some/where/a.safetensors"))), tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.bodies() == ["some/where/a.safetensors"]


def test_when_all_sources_fail_each_is_named_with_its_reason(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("not/yours")
    hub.files["some/where/b"] = CONTENT
    with pytest.raises(OSError, match="was not to be had") as caught:
        fetch(weight(File("a", ("no/repository/a", "some/where/a", "not/yours/a"))), tmp_path / "models")
    for part in (
        "no/repository (no such repository)",
        "some/where (no such file in it)",
        "not/yours (gated: accept its terms there and log in with `hf auth login`)",
        "`videofactory convert --base FILE`",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_no_connection_is_a_reason(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as closed:
        monkeypatch.setenv("HF_ENDPOINT", closed.url)
    with pytest.raises(OSError, match=r"some/where \(no connection: .*refused"):
        fetch(ONE, tmp_path)
    assert not everything(tmp_path)


def test_offline_is_a_reason(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = """
import sys, pathlib
from videofactory_train.fetch import fetch, find
try:
    fetch(find("motion-lora-zoom-in"), pathlib.Path(sys.argv[1]))
except OSError as error:
    assert "HF_HUB_OFFLINE" in str(error), error
else:
    raise AssertionError("fetched")
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "models"], check=True)
    assert not hub.requests
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("sent", [CONTENT[::-1], CONTENT[:-1]])
def test_a_damaged_file_is_refused(sent: bytes, hub: Hub, tmp_path: Path) -> None:
    hub.files["some/where/sub/a.safetensors"] = CONTENT
    hub.sent["some/where/sub/a.safetensors"] = sent
    with pytest.raises(OSError, match=r"some/where \(.*(checksum|size)"):
        fetch(ONE, tmp_path)
    assert not everything(tmp_path)


def test_a_mirror_with_another_file_is_refused_before_it_sends_it(hub: Hub, tmp_path: Path) -> None:
    hub.files.update({"some/where/a": CONTENT[::-1], "else/where/a": CONTENT})
    known = File("a", ("some/where/a", "else/where/a"), hashlib.sha256(CONTENT).hexdigest())
    (path,) = fetch(weight(known), tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.bodies() == ["else/where/a"]
    with pytest.raises(OSError, match="has another file of this name"):
        fetch(weight(replace(known, sources=("some/where/a",))), tmp_path / "b")


def test_a_file_that_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.files["some/where/sub/a.safetensors"] = CONTENT
    path = tmp_path / "checkpoints" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(ONE, tmp_path) == [path]
    assert not hub.bodies()
    del hub.requests[:]
    fetch(weight(replace(ONE.files[0], sha256=hashlib.sha256(CONTENT).hexdigest())), tmp_path)
    assert not hub.requests


def test_another_file_of_the_name_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    hub.files["some/where/sub/a.safetensors"] = CONTENT
    path = tmp_path / "checkpoints" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(OSError, match="is in the way"):
        fetch(ONE, tmp_path)
    assert path.read_bytes() == CONTENT[::-1]
    assert not hub.bodies()


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_source(hub: Hub, tmp_path: Path) -> None:
    hub.files["some/where/sub/a.safetensors"] = CONTENT
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(OSError, match=r"was not written .*: check the free space and the folder"):
        fetch(ONE, tmp_path)


def test_an_unknown_name_gets_the_nearest() -> None:
    assert find("sd21-base").folder == "checkpoints"
    with pytest.raises(ValueError, match=r"no weight 'sd2\.1-base'; the nearest name is sd21-base"):
        find("sd2.1-base")
    with pytest.raises(ValueError, match="no weight ''"):
        find("")


@pytest.mark.parametrize("name", ["", "..", "/a", "a/b", "../a", "a\\b", "C:a", ".hidden", "a\n"])
def test_no_name_of_the_table_leads_out_of_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain name"):
        weight(File(name, ("some/where/a",)))


def test_the_table_is_whole() -> None:
    table = read_table()
    assert {"sd15", "sd21-base", "sd21", "modelscope", "zeroscope-576w", "zeroscope-xl"} <= set(table)
    assert {"animatediff-v1", "animatediff-v2", "animatediff-v3"} <= set(table)
    for entry in table.values():
        assert entry.title
        assert entry.licence
        assert entry.folder in FOLDERS
        assert 0 < entry.gigabytes < 100
        assert entry.files
        for file in entry.files:
            assert file.sources
            for source in file.sources:
                assert re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}", source)
                assert ".." not in source
                assert Path(source).name == file.name
            assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256)


def test_the_notice_says_what_is_non_commercial() -> None:
    for entry in read_table().values():
        free = entry.licence in ("Apache-2.0", "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M")
        assert ("non-commercial" in entry.notice) != free
        for part in (entry.name, f"{entry.gigabytes:g} GB", entry.licence):
            assert part in entry.notice


def test_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert models_folder() == tmp_path / "a" / "models"
    monkeypatch.delenv("COMFYUI_PATH")
    assert models_folder() == Path("models")
    (tmp_path / "comfy" / "ComfyUI" / "models").mkdir(parents=True)
    assert models_folder() == tmp_path / "comfy" / "ComfyUI" / "models"


def test_the_table_is_read_without_a_network() -> None:
    code = """
import socket, sys
def refuse(*_): raise AssertionError("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from videofactory_train.fetch import read_table
assert read_table()
assert "huggingface_hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
