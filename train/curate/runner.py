"""Where tasks are carried out: in processes of this machine, or of all machines that Ray has together.

Either way workers have one task each, so that it is known what a worker was at that has ended. Ray Data does not tell:
it starts the task again without end, and it wants a list of all tasks before the first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, Protocol

from ..processes import end_with_command
from .work import Outcome, Task, carry_out, give_up

# Carries out tasks and gives their outcomes as they come.
Runner = Callable[[Iterable[Task]], Iterator[Outcome]]

# How many workers a row may end while it is alone; one may end for another reason, such as a machine that goes away.
CHANCES = 2
# How many workers may end one after the other before they are ready.
FALSE_STARTS = 3
# Seconds after which the user is told that no worker is ready yet.
PATIENCE = 60.0


def local(workers: int) -> Runner:
    """In `workers` processes of this machine."""
    return partial(_share_out, _Process, lambda: workers)


def ray(workers: int | None, gpus: float = 0.0) -> Runner:
    """On the cluster that Ray finds (RAY_ADDRESS, or one started on this machine), else on one of its own here.

    There are as many workers as there is room for, or `workers`, of which some then wait until the cluster grows; each
    has a core and `gpus`. The curation's folder, sources and weights must have the same paths on all machines.
    ValueError when Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ValueError('Ray is not installed: run pip install "videofactory[ray]"')
    return partial(_share_out, partial(_Actor, gpus), lambda: _join_cluster(workers, gpus))


class Ended(Exception):
    """A worker's process is no more."""


class Worker(Protocol):
    """A process that carries out one task at a time."""

    # Done when the first may be given.
    ready: Future[Any]

    def give(self, task: Task) -> Future[Any]: ...

    def result(self, done: Future[Any]) -> Any:
        """What has come of being given something; raises Ended, and what the task has raised."""

    def stop(self) -> None:
        """End the process, whatever it is at."""


class Given(NamedTuple):
    """What a worker is at, None when that is to get ready, and how many workers this has ended."""

    worker: Worker
    task: Task | None = None
    ended: int = 0


def _share_out(start: Callable[[], Worker], count: Callable[[], int], tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Have up to `count` workers carry out tasks; a row that ends its worker is noted as failed, and the rest goes on.

    Of the tasks, which are read when they are needed, only as many are held as there are workers.
    """
    unread = iter(tasks)
    waiting = deque((task, 0) for task in islice(unread, 1))
    if not waiting:
        return
    waiting.extend((task, 0) for task in islice(unread, count() - 1))
    crew: set[Worker] = set()
    given: dict[Future[Any], Given] = {}

    def hire() -> None:
        worker = start()
        crew.add(worker)
        given[worker.ready] = Given(worker)

    def dismiss(worker: Worker) -> None:
        crew.remove(worker)
        worker.stop()

    def more() -> bool:
        if not waiting:
            waiting.extend((task, 0) for task in islice(unread, 1))
        return bool(waiting)

    try:
        for _ in range(len(waiting)):
            hire()
        if not wait(given, PATIENCE, FIRST_COMPLETED).done:
            warnings.warn(f"no worker is ready after {PATIENCE:.0f} seconds: is there room for one?", stacklevel=1)
        false_starts = 0
        while more() or any(one.task for one in given.values()):
            for done in wait(given, return_when=FIRST_COMPLETED).done:
                worker, task, ended = given.pop(done)
                try:
                    outcome = worker.result(done)
                except Ended as error:
                    dismiss(worker)
                    if task is None:
                        false_starts += 1
                        if false_starts == FALSE_STARTS:
                            raise OSError(f"workers end before they are ready: {error}") from error
                    elif len(rows := task.alone()) > 1:
                        waiting.extendleft((row, 0) for row in rows)
                    elif ended + 1 < CHANCES:
                        waiting.appendleft((task, ended + 1))
                    else:
                        yield give_up(task, "the process that worked on it ended without a word")
                    if more():
                        hire()
                    continue
                if task is None:
                    false_starts = 0
                else:
                    yield outcome
                if more():
                    task, ended = waiting.popleft()
                    given[worker.give(task)] = Given(worker, task, ended)
                else:
                    dismiss(worker)
    finally:
        for worker in crew:
            worker.stop()


# This machine


class _Process:
    """A worker here."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _start_worker)
        self.ready: Future[Any] = self.pool.submit(os.getpid)

    def give(self, task: Task) -> Future[Any]:
        try:
            return self.pool.submit(carry_out, task)
        except BrokenProcessPool as error:
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def result(self, done: Future[Any]) -> Any:
        try:
            return done.result()
        except BrokenProcessPool as error:
            raise Ended(str(error)) from error

    def stop(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread for each, since there are as many as cores; and Ctrl-C is for the command alone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_command()


# Ray


def _join_cluster(workers: int | None, gpus: float) -> int:
    """Connect to Ray; returns how many workers there are to be."""
    import ray

    if not ray.is_initialized():
        # Nothing is sent to its makers, and said only what goes wrong.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            try:
                ray.init(num_cpus=workers, **settings)
            except ValueError:
                # A cluster that is there already has its own number.
                ray.init(**settings)
        except Exception as error:
            # Nothing more special is raised when it does not come up in time.
            raise OSError(f"Ray cannot be used: {error}") from error
    room = ray.cluster_resources()
    fitting = [room.get("CPU", 0), *([room.get("GPU", 0) / gpus] if gpus else [])]
    return workers or max(1, int(min(fitting)))


class _Actor:
    """A worker on Ray."""

    def __init__(self, gpus: float) -> None:
        self.actor = _remote(gpus).remote(os.getcwd())
        self.ready: Future[Any] = self.actor.__ray_ready__.remote().future()

    def give(self, task: Task) -> Future[Any]:
        return self.actor.carry_out.remote(task).future()

    def result(self, done: Future[Any]) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return done.result()
        except RayActorError as error:
            # Of many lines, the last has the reason.
            raise Ended(str(error).strip().splitlines()[-1]) from error
        except RayTaskError as error:
            raise error.cause from error

    def stop(self) -> None:
        import ray

        ray.kill(self.actor)


@cache
def _remote(gpus: float) -> Any:
    import ray

    # `_share_out` sees to those that end.
    return ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Carrier)


class _Carrier:
    """What an actor's process does; relative paths mean what they do to the command, where its folder is known."""

    def __init__(self, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def carry_out(self, task: Task) -> Outcome:
        for part, _ in task.rows:
            if not part.is_file():
                raise FileNotFoundError(f"{platform.node()} has no {part}: give --out a folder that all machines share")
        return carry_out(task)
