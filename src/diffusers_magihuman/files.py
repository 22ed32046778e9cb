# SPDX-License-Identifier: Apache-2.0
"""What is written appears under its name only when it is complete, and a process that was killed leaves nothing.

Imports nothing heavy, as the command checks paths before anything else.
"""

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from reprlib import Repr

from filelock import FileLock, Timeout

SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 120
show = SHORT.repr  # a path as errors name it, see `checks`, which is not light
LOCK_NAME = ".magihuman-lock"  # marks a folder as ours; held while its process lives


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, to write what is then moved into place; removed at the end, as are those of
    processes that are no more. `OSError` where nothing can be written."""
    for stale in target.parent.glob(f".*.incomplete/{LOCK_NAME}"):
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            if not stale.is_symlink() and not stale.parent.is_symlink():  # which may lead to what is not ours
                with FileLock(stale, timeout=0):
                    shutil.rmtree(stale.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=".incomplete", dir=target.parent))
    lock = FileLock(folder / "new")
    try:
        # On a file system without locks there is no mark, so nobody takes the folder away.
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock.acquire(timeout=0)
            (folder / "new").rename(folder / LOCK_NAME)  # only now do others see it
        (folder / "files").mkdir()
        yield folder / "files"
    finally:
        shutil.rmtree(folder / "files", ignore_errors=True)  # first, for without its mark nobody would remove the rest
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def reading(
    path: object,
    fault: str = "is damaged, or holds more than plain tensors or settings",
    caught: type[Exception] = Exception,  # what parsers raise of a damaged file can be anything
    raised: type[Exception] = OSError,
) -> Iterator[None]:
    """Puts the file that is at fault before the reason."""
    try:
        yield
    except (MemoryError, ImportError):  # no fault of the file
        raise
    except caught as error:
        raise raised(f"{str(path)!r} {fault}: {str(error)[:1000] or type(error).__name__}") from error


naming = functools.partial(reading, fault="does not fit", caught=ValueError, raised=ValueError)


def move_into_place(new: Path, target: Path) -> None:
    """Gives a finished file its name; one that it replaces keeps its mode."""
    if target.exists():
        shutil.copymode(target, new)
    os.replace(new, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file that appears when it is complete; of a link its target."""
    target = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a terminal; of a folder the error
        Path(path).write_text(text, encoding="utf-8")
        return
    with unfinished_folder(target) as folder:
        (folder / "text").write_text(text, encoding="utf-8")
        move_into_place(folder / "text", target)


def check_mp4_path(path: str | os.PathLike[str]) -> Path:
    """Returns the absolute path, behind links, or raises what [`export_to_mp4`] raises for it, to learn of it before
    long work: that the directory can be written is tried."""
    shown = show(str(path) if isinstance(path, os.PathLike) else path)
    if not isinstance(path, str | os.PathLike) or Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"`path` is {shown}, it must be a path that ends in '.mp4'.")
    try:
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise FileNotFoundError(f"the directory {str(target.parent)!r} does not exist")
        with contextlib.suppress(FileNotFoundError):  # other errors are of names that the system does not take
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise FileExistsError("it is no regular file")
        with tempfile.TemporaryFile(dir=target.parent):
            return target
    except (OSError, ValueError) as error:  # ValueError: what no name can hold
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"`path` is {shown}, which cannot be written: {error}.") from error


def check_file(name: str, path: str | os.PathLike[str]) -> str:
    """Returns the absolute path of a file; neither a folder, nor what never ends, nor a URL."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"`{name}` is a {type(path).__name__}, which is neither a path nor another kind of {name}.")
    path = os.fsdecode(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{name}` is {show(path)}, but there is no such file, or no regular one.")
    return os.path.abspath(path)
