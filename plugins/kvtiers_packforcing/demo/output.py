"""A folder for results that is either filled whole or left as it was."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtiers.errors import KVTiersError, explain


class OutputError(KVTiersError, OSError):
    """When results cannot be written where they are wanted."""


@contextmanager
def filled_whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder. What is in it when the `with` block ends goes to `folder`, over what had the same names.

    If the block fails or is interrupted, nothing of it stays. Raises `OutputError` if `folder` cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    except OSError as error:
        _remove(made)
        raise OutputError(f"{folder} cannot be written ({explain(error)}); choose another folder") from error
    try:
        yield beside
        for path in sorted(beside.iterdir()):
            path.replace(folder / path.name)
    except BaseException:
        shutil.rmtree(beside)
        _remove(made)
        raise
    beside.rmdir()


def _remove(folders: list[Path]) -> None:
    """Folders that were made for nothing, innermost first."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
