"""The training loop: what it does when a loss, a disk or the user gets in its way, and that it goes on exactly."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from videofactory_train.loop import MAX_BAD_STEPS, Event, Schedule, train
from videofactory_train.state import States

SCHEDULE = Schedule(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, save_every=2)


class Line(nn.Module):
    """Learns a line; `wrong(step)` is what the loss becomes, and `heard(step)` is called, at every step."""

    def __init__(self, wrong: Callable[[int], float] = lambda step: 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.wrong = wrong
        self.heard: Callable[[int], None] = lambda step: None
        self.sizes: list[int] = []

    def forward(self, batch: tuple[int, Tensor]) -> Tensor:
        number, x = batch
        self.heard(number)
        # What forward draws must not depend on what was drawn before.
        noise = torch.randn(len(x), 1)
        return (self.layer(x) - x.sum(1, keepdim=True) - 0.1 * noise).square().mean() * self.wrong(number)


def batches(size: int) -> Callable[[int], Iterator[tuple[int, Tensor]]]:
    def start(first: int) -> Iterator[tuple[int, Tensor]]:
        for number in itertools.count(first):
            yield number, torch.randn(size, 3, generator=torch.Generator().manual_seed(number))

    return start


def run(
    module: nn.Module, folder: Path, schedule: Schedule = SCHEDULE, lines: list[str] | None = None, **options: Any
) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=schedule.gradient_accumulation_steps)
    said = [] if lines is None else lines
    states = States(folder, "line", accelerator, schedule.keep, said.append)
    return train(module, batches(schedule.batch_size), schedule, accelerator, states, said.append, seed=3, **options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def test_every_step_has_a_line_and_its_figures(tmp_path: Path) -> None:
    lines: list[str] = []
    figures: dict[int, dict[str, float]] = {}
    losses = run(
        Line(), tmp_path, lines=lines, note=lambda step, found: figures.update({step: found}), frames_in=lambda b: 8
    )
    assert len(lines) == 8
    assert re.fullmatch(
        r"step 3/8  loss \d\.\d{4}  lr 1\.00e-02  [\d.]+ clips/s  [\d.]+ frames/s  peak [\d.]+ GiB"
        r"  data wait [\d.]+%  ETA \d:\d\d:\d\d",
        lines[2],
    )
    assert [figures[step]["loss"] for step in range(1, 9)] == losses
    assert figures[1]["learning_rate"] == 5e-3
    assert figures[1]["frames_per_second"] == pytest.approx(2 * figures[1]["clips_per_second"])
    assert all(0 <= found["data_wait"] <= 1 and found["peak_gib"] > 0.05 for found in figures.values())
    lines.clear()
    run(Line(), tmp_path / "rarely", replace(SCHEDULE, log_every=3), lines)
    assert [line.split()[1] for line in lines] == ["3/8", "6/8", "8/8"]


def test_another_seed_draws_other_numbers(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = []
    for seed in (0, 1, 1 << 32):
        states = States(tmp_path / str(seed), "line", accelerator)
        found.append(train(Line(), batches(4), SCHEDULE, accelerator, states, lambda line: None, seed=seed)[0])
    assert len(set(found)) == 3


def test_constant_learning_rate_stays_behind_its_warmup() -> None:
    constant = replace(SCHEDULE, lr_scheduler="constant")
    assert [constant.share_at(step) for step in (0, 1, 2, 7)] == [0.5, 1.0, 1.0, 1.0]
    assert [round(SCHEDULE.share_at(step), 3) for step in (0, 1, 2, 5, 8)] == [0.5, 1.0, 1.0, 0.525, 0.05]


def test_accumulated_batches_teach_like_one_large_batch(tmp_path: Path) -> None:
    """Without noise of its own, the gradient of two halves is that of the whole."""

    class Silent(Line):
        def forward(self, batch: tuple[int, Tensor]) -> Tensor:
            return (self.layer(batch[1]) - batch[1].sum(1, keepdim=True)).square().mean()

    def halves(first: int) -> Iterator[tuple[int, Tensor]]:
        whole = batches(4)(first // 2)
        for number, x in whole:
            yield from ((number, half) for half in x.chunk(2))

    one, two = Silent(), Silent()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    schedule = replace(SCHEDULE, batch_size=2, gradient_accumulation_steps=2)
    states = States(tmp_path / "two", "line", accelerator)
    parts = train(two, halves, schedule, accelerator, states, lambda line: None, seed=3)
    assert parts == pytest.approx(run(one, tmp_path / "one"), rel=1e-5)
    torch.testing.assert_close(weights(one), weights(two))


def test_a_step_without_a_finite_loss_is_left_out(tmp_path: Path) -> None:
    module = Line(lambda step: math.nan if step == 3 else 1.0)
    before: list[Tensor] = []
    module.heard = lambda step: before.append(weights(module))
    losses = run(module, tmp_path)
    assert [math.isnan(loss) for loss in losses] == [step == 3 for step in range(8)]
    assert torch.equal(before[3], before[4])
    assert not torch.equal(before[4], before[5])
    assert weights(module).isfinite().all()


def test_training_stops_when_no_loss_is_finite_and_the_last_good_state_stays(tmp_path: Path) -> None:
    module = Line(lambda step: math.inf if step >= 5 else 1.0)
    schedule = replace(SCHEDULE, steps=50)
    with pytest.raises(ValueError, match=rf"no finite number in {MAX_BAD_STEPS} steps up to 10; lower learning_rate"):
        run(module, tmp_path, schedule)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line-step000002", "line-step000004"]
    lines: list[str] = []
    run(Line(), tmp_path, schedule, lines)
    assert lines[0] == "going on from step 4"


def test_infinite_gradients_of_a_finite_loss_are_left_out_too(tmp_path: Path) -> None:
    class Steep(Line):
        def forward(self, batch: tuple[int, Tensor]) -> Tensor:
            loss = super().forward(batch)
            # The slope of a root at 0 is infinite.
            return loss + ((loss - loss.detach()).abs() if batch[0] != 2 else (loss - loss.detach()).abs().sqrt())

    module = Steep()
    losses = run(module, tmp_path)
    assert all(math.isfinite(loss) for loss in losses)
    assert weights(module).isfinite().all()


def test_ctrl_c_ends_behind_a_saved_step_and_resuming_changes_nothing(tmp_path: Path) -> None:
    whole = Line()
    expected = run(whole, tmp_path / "whole")
    module = Line()
    module.heard = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(module, tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "parts" / "line-step000005").is_dir()
    again, lines = Line(), list[str]()
    assert run(again, tmp_path / "parts", lines=lines) == expected
    assert lines[0] == "going on from step 5"
    assert torch.equal(weights(again), weights(whole))


def test_a_disk_that_takes_nothing_is_tried_again(tmp_path: Path) -> None:
    whole = Line()
    expected = run(whole, tmp_path / "whole")
    module, folder, lines = Line(), tmp_path / "states", list[str]()
    # A file where the folder should be: nothing can be written there until it is gone.
    folder.write_text("in the way")
    module.heard = lambda step: folder.unlink() if step == 5 else None
    assert run(module, folder, lines=lines) == expected
    assert torch.equal(weights(module), weights(whole))
    failures = [line for line in lines if "could not be written" in line]
    assert any("step 2 could not be written; the next try is at step 3" in line for line in failures)
    assert [path.name for path in folder.iterdir()] == ["line-step000006"]


def test_events_happen_at_the_start_on_time_and_at_the_end_with_the_averaged_weights(tmp_path: Path) -> None:
    module, plain = Line(), Line()
    seen: list[int] = []
    during: list[Tensor] = []

    def look(step: int) -> dict[str, float]:
        seen.append(step)
        during.append(weights(module))
        module.eval()
        torch.rand(5)
        return {"looked": step}

    noted: list[tuple[int, dict[str, float]]] = []
    losses = run(module, tmp_path / "a", events=[Event(3, look)], note=lambda step, found: noted.append((step, found)))
    assert seen == [0, 3, 6, 8]
    assert [(step, found) for step, found in noted if "looked" in found] == [(s, {"looked": s}) for s in seen]
    # Looking changes nothing, and what is seen is what comes out in the end.
    assert losses == run(plain, tmp_path / "b")
    assert torch.equal(weights(module), weights(plain))
    assert torch.equal(during[-1], weights(module))


def test_without_an_average_the_last_weights_stay(tmp_path: Path) -> None:
    module = Line()
    last: list[Tensor] = []
    module.register_forward_hook(lambda *_: last.append(weights(module)))
    run(module, tmp_path, replace(SCHEDULE, ema_decay=0.0))
    assert not torch.equal(last[-1], weights(module))
    assert float((last[-1] - weights(module)).abs().max()) < 2 * SCHEDULE.learning_rate


def test_offloading_changes_no_number(tmp_path: Path) -> None:
    here, there = Line(), Line()
    assert run(here, tmp_path / "a") == run(there, tmp_path / "b", replace(SCHEDULE, offload=True))
    assert torch.equal(weights(here), weights(there))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"keep": 0},
        {"gradient_accumulation_steps": 0},
    ],
)
def test_schedules_that_teach_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SCHEDULE, **wrong)
