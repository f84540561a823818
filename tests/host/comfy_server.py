"""The real ComfyUI, started in a folder of its own with the pack linked in, and spoken to over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

PACK = Path(__file__).parent.parent.parent
HOW_TO_GET_A_HOST = (
    "no ComfyUI was found: set COMFYUI_PATH to its folder (several are separated like PATH), and COMFYUI_PYTHON to its"
    " interpreter where that is not its venv's"
)


def host_folders() -> list[Path]:
    """Every host to test: those named in COMFYUI_PATH, else the one around the pack, else comfy-cli's workspace."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = (
        [Path(p).expanduser() for p in named.split(os.pathsep)]
        if named
        else [PACK.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    )
    found = [path for path in candidates if (path / "main.py").is_file() and (path / "comfy").is_dir()]
    return found if named else found[:1]


def interpreter(number: int, folder: Path) -> str:
    """The Python that runs a host."""
    named = [p for p in os.environ.get("COMFYUI_PYTHON", "").split(os.pathsep) if p]
    if named:
        return named[min(number, len(named) - 1)]
    for name in ("venv", ".venv"):
        for inside in ("bin/python", "Scripts/python.exe"):
            if (folder / name / inside).is_file():
                return str(folder / name / inside)
    return sys.executable


class Failed(Exception):
    """A graph that the host refused or could not finish; the message is what its user reads."""


class Host:
    """A server that runs graphs in API form."""

    def __init__(self, folder: Path, python: str, base: Path) -> None:
        self.folder = folder
        self.base = base
        for name in ("custom_nodes", "input", "output", "models/videofactory", "models/loras", "models/upscale_models"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "VideoFactory").symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        # Which no server that a graph names may see.
        environment |= {"OPENAI_API_KEY": "secret", "no_proxy": "*"}
        arguments = [
            "main.py",
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    *arguments,
                    "--preview-method",
                    "latent2rgb",
                ],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"the host stopped:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                self.get("system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError("the host did not start in two minutes")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def text(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(f"{self.address}/{path}", json.dumps(data).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def queue(self, graph: dict[str, Any]) -> str:
        """Queue a graph; returns its id. Raises Failed when the host refuses it."""
        try:
            return str(self.post("prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"])
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            told = [f"{e['message']}: {e['details']}" for n in answer["node_errors"].values() for e in n["errors"]]
            raise Failed("; ".join(told) or answer["error"]["message"]) from error

    def wait(self, prompt: str, seconds: float = 300) -> dict[str, Any]:
        """The outputs by node of a queued graph. Raises Failed when it fails."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            entry = self.get(f"history/{prompt}").get(prompt)
            if entry and entry["status"]["completed"]:
                outputs: dict[str, Any] = entry["outputs"]
                return outputs
            if entry:
                for kind, told in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise Failed(f"{told['exception_type']}: {told['exception_message']}".strip())
                    if kind == "execution_interrupted":
                        raise Failed("interrupted")
            time.sleep(0.05)
        raise RuntimeError(f"the graph did not end in {seconds} s:\n{self.log.read_text(errors='replace')[-2000:]}")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Queue a graph and wait for its outputs by node."""
        return self.wait(self.queue(graph))

    def files(self, outputs: dict[str, Any]) -> list[Path]:
        """The files that a graph saved."""
        return [
            self.base / entry["type"] / entry["subfolder"] / entry["filename"]
            for node in outputs.values()
            for entries in node.values()
            if isinstance(entries, list)
            for entry in entries
            if isinstance(entry, dict) and "filename" in entry
        ]
