"""One process at a time on a run folder."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gdd_fast.errors import CheckpointError

LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def only_process(run_dir: Path, enabled: bool = True) -> Iterator[None]:
    """Within the block no other process trains in `run_dir`; the lock ends with this process, however it ends.

    The folder is made if it is not there, and goes again if the block leaves it empty. A disk without locks is said on
    stderr, and the block runs without one. `enabled`: False on every rank but the main one, for which nothing happens.

    Raises `CheckpointError` if another process has the folder.
    """
    if not enabled:
        yield
        return
    made = [folder for folder in (run_dir, *run_dir.absolute().parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = run_dir / LOCK
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        file = stack.enter_context(lock.open("ab"))
        if _take(file.fileno(), lock):
            stack.callback(lock.unlink, missing_ok=True)
        yield


def _take(descriptor: int, lock: Path) -> bool:
    """Whether the lock is held now; False where the disk has none."""
    try:
        # A record lock: forked processes, such as those that read images, do not share it, and may outlive this one.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            print(f"{lock} cannot be locked ({error.strerror}): see that nothing else trains there", file=sys.stderr)
            return False
    else:
        # else it was of a process that removed the file as it ended, before this one came to lock it
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return True
    raise CheckpointError(f"another process is training in {lock.parent}; let it end, or choose another --run-dir")


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # there is something in it
        for folder in folders:
            folder.rmdir()
