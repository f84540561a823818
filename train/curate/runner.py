"""Where tasks are carried out: in processes of this machine, or on a cluster by Ray Data."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

from ..processes import end_with_command
from .work import Outcome, Task, carry_out, give_up

# Carries out tasks and gives their outcomes as they come.
Runner = Callable[[Iterable[Task]], Iterator[Outcome]]


def local(workers: int) -> Runner:
    """In `workers` processes; a row that ends its process is noted as failed, and the rest goes on in new ones."""

    def run(tasks: Iterable[Task]) -> Iterator[Outcome]:
        waiting, broken = iter(tasks), True
        while broken:
            unfinished: list[Task] = []
            with _pool(workers) as pool:
                running: dict[Future[Outcome], Task] = {}
                broken = False
                while not broken:
                    for task in islice(waiting, 2 * workers - len(running)):
                        try:
                            running[pool.submit(carry_out, task)] = task
                        except BrokenProcessPool:
                            unfinished.append(task)
                            broken = True
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        task = running.pop(done)
                        try:
                            yield done.result()
                        except BrokenProcessPool:
                            unfinished.append(task)
                            broken = True
                unfinished += running.values()
            yield from _one_by_one(unfinished)

    return run


def _one_by_one(tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Tasks that were under way when a process ended: row by row, which shows the row that ends it."""
    rows = deque(alone for task in tasks for alone in task.alone())
    while rows:
        with _pool(1) as pool:
            while rows:
                row = rows.popleft()
                try:
                    yield pool.submit(carry_out, row).result()
                except BrokenProcessPool:
                    yield give_up(row, "the process that worked on it ended without a word")
                    break


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one; an exception does not wait for what they are at."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread for each, since there are as many as cores; and Ctrl-C is for the command alone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_command()


def ray(workers: int | None, gpus: float = 0.0) -> Runner:
    """On the cluster that Ray finds, or on this machine; `gpus` is what each of its processes gets."""

    def run(tasks: Iterable[Task]) -> Iterator[Outcome]:
        import ray.data

        made = [{"task": task} for task in tasks]
        if not made:
            return
        # A block for each, because Ray does not split one.
        rows = ray.data.from_items(made, override_num_blocks=len(made))
        for row in rows.map(_carry_out_row, num_cpus=1, num_gpus=gpus, concurrency=workers).iter_rows():
            yield Outcome(row["rows"], row["failed"])

    return run


def _carry_out_row(row: dict[str, Task]) -> dict[str, int]:
    return vars(carry_out(row["task"]))
