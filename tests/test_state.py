"""Saving and resuming: the same numbers after any interruption, and no state that is half written."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from videofactory_train import state
from videofactory_train.optimizer import Name, build
from videofactory_train.state import States

PACKAGES = {"adamw8bit": "bitsandbytes", "paged_adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# The first that steps on a CPU.
VERSIONS = {"bitsandbytes": "0.50"}
RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "paged_adamw8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0}


class Net(nn.Module):
    """A trained part with a buffer that changes, on a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 4096).requires_grad_(False)
        self.middle = nn.Linear(4096, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 1)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.calls.sin() + self.head(torch.tanh(self.norm(self.middle(self.base(x))))) - 1).square().mean()


class Average:
    """A moving average as a loop would have it: tensors and a number."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        torch._foreach_lerp_(self.average, self.weights, 1 / (1 + self.step))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **{str(i): tensor for i, tensor in enumerate(self.average)}}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.step = values["step"]
        for i, tensor in enumerate(self.average):
            tensor.copy_(values[str(i)])


class Run:
    """A short training run in a folder, as one process has it."""

    def __init__(
        self, folder: Path, name: Name = "adamw", *, offload: bool = False, scaled: bool = False, keep: int = 2
    ) -> None:
        self.lines: list[str] = []
        self.accelerator = Accelerator(cpu=True)
        if scaled:
            # Accelerate has no fp16 for CPUs, but the scaler is the same.
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
            self.accelerator.native_amp = True
        self.module: Any = Net()
        optimizer = build(name, self.module, RATES[name], 0.01, offload=offload)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.average = Average(self.module)
        self.accelerator.register_for_checkpointing(self.average)
        self.states = States(folder, "swap", self.accelerator, keep, self.lines.append)
        self.losses: list[float] = []

    def resume(self) -> int:
        progress = self.states.load()
        self.losses = progress["losses"] if progress else []
        return len(self.losses)

    def step(self) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        clips = torch.randn(8, 8, generator=torch.Generator().manual_seed(len(self.losses))).chunk(world)[rank]
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("highest", group["lr"]) / (1 + len(self.losses))
        loss = self.model(clips)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.losses.append(self.accelerator.reduce(loss.detach().double(), "mean").item())

    def until(self, count: int) -> Run:
        while len(self.losses) < count:
            self.step()
        return self

    def save(self) -> bool:
        return self.states.save(len(self.losses), {"losses": self.losses})

    def everything(self) -> list[Any]:
        """All numbers of the run."""
        weights = [tensor.clone() for tensor in self.module.state_dict().values()]
        return [self.losses, self.average.step, weights, [tensor.clone() for tensor in self.average.average]]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        (name, offload)
        for name in get_args(Name)
        for offload in (False, True)
        if not (offload and name.endswith("8bit"))
    ],
)
def test_two_halves_are_one_run(tmp_path: Path, name: Name, offload: bool) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], VERSIONS.get(PACKAGES[name]))
    whole = Run(tmp_path / "never", name, offload=offload).until(8)
    assert Run(tmp_path, name, offload=offload).until(4).save()
    second = Run(tmp_path, name, offload=offload)
    assert second.resume() == 4
    assert equal(second.until(8).everything(), whole.everything())


def test_offloading_may_change_between_halves(tmp_path: Path) -> None:
    whole = Run(tmp_path / "never").until(8)
    Run(tmp_path, offload=True).until(4).save()
    second = Run(tmp_path)
    assert second.resume() == 4
    assert equal(second.until(8).everything(), whole.everything())


def test_the_loss_scale_goes_on(tmp_path: Path) -> None:
    whole = Run(tmp_path / "never", scaled=True).until(12)
    first = Run(tmp_path, scaled=True).until(6)
    scale = first.accelerator.scaler.get_scale()
    assert scale < 2.0**127
    first.save()
    second = Run(tmp_path, scaled=True)
    second.resume()
    assert equal(second.until(12).everything(), whole.everything())
    assert second.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() != scale


def test_progress_comes_back_exactly(tmp_path: Path) -> None:
    progress = {
        "losses": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float("inf")],
        "recipe": {"title": "ä"},
        "bad": 3,
    }
    run = Run(tmp_path).until(1)
    run.states.save(1, progress)
    assert run.states.load() == progress
    head = json.loads((tmp_path / "swap-step000001" / "progress.json").read_text(encoding="utf-8"))
    assert head["step"] == 1
    assert head["progress"] == progress


def test_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    run = Run(tmp_path).until(1)
    run.save()
    trained = sum(p.nbytes for p in run.module.parameters() if p.requires_grad)
    # Weights, average and two moments.
    assert 4 * trained < size_of(tmp_path) < 4 * trained + 20_000


def test_large_states_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FILE_BYTES", 200_000)
    whole = Run(tmp_path / "never").until(4)
    Run(tmp_path).until(2).save()
    assert len(list(tmp_path.glob("swap-step000002/tensors-*.safetensors"))) > 3
    second = Run(tmp_path)
    second.resume()
    assert equal(second.until(4).everything(), whole.everything())


def test_the_last_states_stay(tmp_path: Path) -> None:
    other = tmp_path / "swap-step-notes"
    other.mkdir()
    run = Run(tmp_path, keep=2)
    for _ in range(4):
        run.step()
        run.save()
    assert names(tmp_path) == ["swap-step-notes", "swap-step000003", "swap-step000004"]
    # Once more under the same name.
    assert run.save()
    assert names(tmp_path) == ["swap-step-notes", "swap-step000003", "swap-step000004"]
    run.states.clear()
    assert names(tmp_path) == ["swap-step-notes"]
    assert Run(tmp_path).resume() == 0


def test_stages_do_not_see_each_other(tmp_path: Path) -> None:
    run = Run(tmp_path).until(2)
    run.save()
    States(tmp_path, "swa", run.accelerator).clear()
    assert States(tmp_path, "swa", run.accelerator).load() is None
    assert States(tmp_path, "addition", run.accelerator).load() is None
    assert run.resume() == 2


def damage_tensors(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_header(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)


def damage_json(folder: Path) -> None:
    (folder / "progress.json").write_text('{"step": 4', encoding="utf-8")


def damage_listing(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [damage_tensors, damage_header, damage_json, damage_listing])
def test_a_damaged_state_is_passed_over(tmp_path: Path, damage: Any) -> None:
    whole = Run(tmp_path / "never").until(6)
    first = Run(tmp_path, keep=1).until(2)
    first.save()
    shutil.copytree(tmp_path / "swap-step000002", tmp_path / "kept")
    first.until(4).save()
    (tmp_path / "kept").rename(tmp_path / "swap-step000002")
    damage(tmp_path / "swap-step000004")
    second = Run(tmp_path, keep=1)
    assert second.resume() == 2
    assert "swap-step000004 is damaged" in second.lines[0]
    # What is saved now is the newest, whatever lies there under a later step.
    assert second.until(3).save()
    assert names(tmp_path) == ["swap-step000003"]
    assert equal(second.until(6).everything(), whole.everything())


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    Run(tmp_path).until(2).save()
    with pytest.raises(ValueError, match="made with AdamW, this run has Adafactor"):
        Run(tmp_path, "adafactor").resume()
    other = Run(tmp_path)
    other.module.head.weight = nn.Parameter(torch.zeros(1, 17))
    with pytest.raises(ValueError, match=r"modules\.0\.head\.weight is \(1, 16\) in it and \(1, 17\) in this run"):
        other.resume()
    other = Run(tmp_path)
    other.module.base.requires_grad_(True)
    with pytest.raises(ValueError, match=r"modules\.0\.base\.bias is absent in it"):
        other.resume()


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    run = Run(tmp_path / "states").until(2)
    run.save()
    run.until(3).save()
    fired = tmp_path / "fired"
    folder = tmp_path / "states" / "swap-step000003"
    data = pickle.dumps(Bomb(fired))
    pickle.loads(data)
    assert fired.exists()
    fired.unlink()
    for name in ("optimizer.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(data)
        torch.save(Bomb(fired), folder / f"zip-{name}")
    assert Run(tmp_path / "states").resume() == 3
    # In the place of a file that is read, it counts as damage.
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(data.ljust(file.stat().st_size, b"\0"))
    assert Run(tmp_path / "states").resume() == 2
    assert not fired.exists()


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """A limit on the size of files, which fails a write as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Fails in the tensors, and in the progress, which is written after them.
@pytest.mark.parametrize("room", [100_000, 2_000_000])
def test_a_full_disk_stops_nothing(tmp_path: Path, file_limit: Any, room: int) -> None:
    whole = Run(tmp_path / "never").until(6)
    first = Run(tmp_path).until(2)
    assert first.save()
    first.until(4)
    file_limit(room)
    progress = {"losses": first.losses, "text": "x" * 3_000_000}
    assert not first.states.save(4, progress)
    assert "the state of step 4 could not be written" in first.lines[-1]
    assert names(tmp_path) == ["swap-step000002"]
    second = Run(tmp_path)
    assert second.resume() == 2
    file_limit(-1)
    assert first.states.save(4, progress)
    assert equal(first.until(6).everything(), whole.everything())
    third = Run(tmp_path)
    assert third.resume() == 4
    assert equal(third.until(6).everything(), whole.everything())


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run(tmp_path / "file" / "states").until(1)
    assert not run.save()
    assert run.lines


@pytest.fixture
def fork() -> Iterator[Any]:
    """Runs its argument in a child of this process and returns the process id."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    # Threads of OpenMP do not live in a child.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    children = []

    def forked(work: Any) -> int:
        children.append(os.fork())
        if children[-1] == 0:
            try:
                work()
            finally:
                os._exit(1)
        return children[-1]

    yield forked
    torch.set_num_threads(before)


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Any
) -> None:
    whole = Run(tmp_path / "never").until(5)
    original = tmp_path / "original"
    run = Run(original, keep=1).until(2)
    run.save()
    run.until(3)
    calls = 0
    fatal = -1

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    # Between any two of these the disk looks different.
    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (Path, "replace")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    reached = []
    while True:
        folder = tmp_path / f"killed-{fatal}"
        shutil.copytree(original, folder)
        run.states.folder = folder
        calls, fatal = 0, len(reached) + 1
        _, status = os.waitpid(fork(lambda: os._exit(0 if run.save() else 2)), 0)
        fatal = -1
        second = Run(folder, keep=1)
        reached.append(second.resume())
        assert not second.lines
        assert not list(folder.glob("*.tmp"))
        if reached[-1] != reached[-2:][0] or not os.WIFSIGNALED(status):
            assert equal(second.until(5).everything(), whole.everything())
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        shutil.rmtree(folder)
    assert sorted(reached) == reached
    assert set(reached) == {2, 3}
    assert len(reached) > 8


def test_kills_at_random_moments_lose_nothing(tmp_path: Path, fork: Any) -> None:
    last = 20
    whole = Run(tmp_path / "never").until(last)
    folder = tmp_path / "states"
    folder.mkdir()

    def work() -> None:
        run = Run(folder)
        run.resume()
        while len(run.losses) < last:
            run.step()
            run.save()
        os._exit(0)

    moments = random.Random(5)
    kills = 0
    while True:
        before = set(folder.glob("*[0-9]"))
        child = fork(work)
        ended = False
        while not ended and set(folder.glob("*[0-9]")) <= before:
            ended = os.waitpid(child, os.WNOHANG) != (0, 0)
        if ended:
            break
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills > 2
    end = Run(folder)
    assert end.resume() == last
    assert equal(end.everything(), whole.everything())


PROCESSES = """
    import json
    import sys
    from pathlib import Path

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from test_state import Run, names
    from videofactory_train import state

    state.FILE_BYTES = 50_000
    folder = Path(sys.argv[1])

    run = Run(folder / "ddp").until(2)
    rank = run.accelerator.process_index
    assert run.accelerator.num_processes == 2
    assert run.save()
    run.until(4)
    again = Run(folder / "ddp")
    assert again.resume() == 2
    assert again.until(4).losses == run.losses

    def full(*_):
        raise OSError("the disk is full")

    write = state._write
    if rank == 1:
        state._write = full
    assert not run.save()
    state._write = write
    assert names(folder / "ddp") == ["swap-step000002"]

    def split(path):
        # What accelerate does under FSDP2, which it refuses to do on a CPU.
        run = Run(path)
        fully_shard(run.module, mesh=init_device_mesh("cpu", (2,)))
        run.model = run.accelerator._models[0] = run.module
        trained = [p for p in run.module.parameters() if p.requires_grad]
        matrices, vectors = run.optimizer.param_groups
        matrices["params"] = [p for p in trained if p.ndim > 1]
        vectors["params"] = [p for p in trained if p.ndim <= 1]
        run.average.weights = trained
        run.average.average = [p.detach().clone() for p in trained]
        return run

    run = split(folder / "fsdp").until(2)
    assert run.save()
    run.until(4)
    again = split(folder / "fsdp")
    assert again.resume() == 2
    assert hasattr(again.optimizer.state_dict()["state"][0]["exp_avg"], "full_tensor")
    assert again.until(4).losses == run.losses
    for one, other in zip(run.average.average, again.average.average):
        assert torch.equal(one.to_local(), other.to_local())
    print(json.dumps(run.losses))
"""


def test_two_processes_save_together_and_one_goes_on(tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("needs FSDP2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    shared = os.environ | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESSES), str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    whole = Run(tmp_path / "never").until(4)
    assert json.loads(ends[0][0].splitlines()[-1]) == pytest.approx(whole.losses, rel=1e-5)
    for kind in ("ddp", "fsdp"):
        single = Run(tmp_path / kind)
        assert single.resume() == 2
        assert single.until(4).losses == pytest.approx(whole.losses, rel=1e-5)
