"""One writer of a folder at a time."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PAUSE = 0.1  # seconds between two attempts


@contextlib.contextmanager
def only_writer(folder: Path, patience: float) -> Iterator[None]:
    """Inside the context, no other process that asks for the same can write to an existing folder.

    The lock belongs to the process and those that it forks, and ends with them, also if they are killed. Where the
    file system or the operating system (Windows) has no such locks, nothing is locked.

    Args:
        folder: an existing folder. Nothing is written to it.
        patience: how many seconds to wait for another process.

    Raises:
        ValueError: another process still writes to the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(f"another process is writing to {folder}: wait for it, or end it") from error
                time.sleep(PAUSE)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for forked processes, which have the handle too
        os.close(handle)
