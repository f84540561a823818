"""From shell to file: how long `videofactory generate` takes, and where the time goes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from videofactory_core.checkpoint import DEMO

ROUNDS = 3
THREADS = "2"
PROMPT = "a red circle moving right on a black background"
COMMAND = "import sys; from videofactory_train.cli import main; sys.exit(main())"

# Runs in a process of its own, because only the first import costs anything; prints a name and seconds a line.
PARTS = """
import sys, time
laps = [("start", time.perf_counter())]
def lap(name):
    laps.append((name, time.perf_counter()))
import av, torch
from videofactory_core import checkpoint
from videofactory_core.pipeline import generate
from videofactory_core.video import write_video
lap("import")
model = checkpoint.load(sys.argv[1], dtype=torch.float32)
lap("load")
steps = 25
frames = generate(model, sys.argv[2], steps=steps, on_step=lambda step, _: step == steps - 1 and lap("sample"))
lap("decode")
write_video(sys.argv[3], frames, model.config.fps)
lap("encode")
for (_, before), (name, after) in zip(laps, laps[1:]):
    print(name, after - before)
"""


def report(checkpoint: Path = DEMO) -> None:
    """Medians of whole commands and of their parts, with two threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "clip.mp4")
        command = [sys.executable, "-c", COMMAND, "generate", PROMPT, "--checkpoint", str(checkpoint), "--out", out]
        for _ in range(ROUNDS):
            start = time.perf_counter()
            subprocess.run(command, check=True, env=environment, capture_output=True)
            whole.append(time.perf_counter() - start)
            printed = subprocess.run(
                [sys.executable, "-c", PARTS, str(checkpoint), PROMPT, out],
                check=True,
                env=environment,
                capture_output=True,
                text=True,
            ).stdout
            for line in printed.splitlines():
                name, seconds = line.split()
                parts.setdefault(name, []).append(float(seconds))
    print(f"{THREADS} threads, medians of {ROUNDS}")
    for name, values in {"videofactory generate": whole, **parts}.items():
        print(f"{name:<24}{statistics.median(values):7.2f} s")
