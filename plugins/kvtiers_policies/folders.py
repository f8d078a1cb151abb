"""The private folders of the disk archive: each is locked by the process that uses it, and removed when that ends."""

import contextlib
import os
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

from kvtiers.errors import ArchiveFullError
from kvtiers.locks import OURS, left_behind, locked


class Folder:
    """A private folder that this process holds locked. It is removed with the last store and file that use it."""

    def __init__(self, parent: Path) -> None:
        self.process = os.getpid()
        self.path, handle = locked(lambda: Path(tempfile.mkdtemp(prefix=OURS, dir=parent)))
        weakref.finalize(self, _leave, self.path, handle, self.process)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Folder":
        return self


class Home:
    """Where the stores of one archive find their folder: they share one while any of them lives."""

    def __init__(self, directory: str | None) -> None:
        self.directory = directory
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._turn = threading.Lock()
        self._folder: weakref.ref[Folder] | None = None

    def folder(self) -> Folder:
        """The folder of this process, made if there is none yet or another program removed it."""
        if self._process != os.getpid():  # a fork has a folder of its own, and a lock that no thread took with it
            self._forget()
        with self._turn:
            found = None if self._folder is None else self._folder()
            if found is None or not found.path.is_dir():
                found = self._made()
                self._folder = weakref.ref(found)
            return found

    def _made(self) -> Folder:
        try:
            if self.directory is None:
                parent = Path(tempfile.gettempdir())
            else:
                parent = Path(self.directory).absolute()
                parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path, handle in left_behind(parent, f"{OURS}*"):
                _leave(path, handle, os.getpid())
            return Folder(parent)
        except OSError as error:
            raise ArchiveFullError(
                f"archive 'disk' cannot make its folder: {error}; choose another directory"
            ) from error

    def __reduce__(self) -> tuple[type["Home"], tuple[str | None]]:
        return Home, (self.directory,)  # a copy of an archive has a folder of its own


def _leave(path: Path, handle: int | None, process: int) -> None:
    """Remove a folder of ours, unless `process` is not this one but its parent; and let go of its lock."""
    with contextlib.suppress(OSError):  # whatever else lies in it stays
        if process == os.getpid():
            for file in path.glob("*.safetensors"):
                file.unlink(missing_ok=True)
            path.rmdir()
    if handle is not None:
        with contextlib.suppress(OSError):  # a program may have closed all its handles
            os.close(handle)
