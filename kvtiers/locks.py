"""Files and folders that a process holds locked until it ends, so that others know what a killed one left behind."""

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

OURS = f"kvtiers-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"
"""How names begin that this machine may remove. Another one may see the same folder, and not the locks in it."""


def locked(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """What `make` makes, a new file or folder whose name has `OURS` in it, and the handle that locks it.

    Where nothing can be locked it is renamed, so that its name does not say that it may be removed; the handle is None.
    """
    while True:
        path = make()
        try:
            return path, _lock(path, wait=True)
        except FileNotFoundError:
            continue  # another process took it for one that was left, before it was locked
        except OSError:
            return path.rename(path.with_name(f"unlocked-{path.name}")), None


def left_behind(folder: Path, pattern: str) -> Iterator[tuple[Path, int]]:
    """What a process of this user left in `folder` when it was killed, each with a handle that locks it."""
    for path in folder.glob(pattern):
        try:
            handle = _lock(path, wait=False)
        except OSError:
            continue  # a process that lives holds it, or it is not ours
        yield path, handle


def _lock(path: Path, *, wait: bool) -> int:
    """Lock a private file or folder of this user. The lock ends with the last process that holds the handle.

    Raises FileNotFoundError if it is gone, another OSError if it is locked, not ours, or cannot be locked.
    """
    if sys.platform == "win32":
        raise OSError("folders cannot be locked")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = path.lstat()  # it may have been removed before it was locked
        if about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise PermissionError(f"{path} is not private")
    except BaseException:
        os.close(handle)
        raise
    return handle
