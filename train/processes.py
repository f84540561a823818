"""Worker processes of a command."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_command() -> None:
    """In a worker: end as soon as the command does that started it, also when that was killed."""
    command = parent_process()
    assert command is not None

    def leave() -> None:
        command.join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()
