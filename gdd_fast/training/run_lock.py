"""Lets only one process at a time use a run folder."""

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

    The folder is created if missing, and removed if the block leaves it empty. If the disk does not support locks,
    stderr says so and the block runs without. `enabled`: False on all ranks but the main one; then nothing happens.

    Raises `CheckpointError` if another process uses the folder.
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
    """Whether the lock is held now; False if the disk does not support locks."""
    try:
        # A record lock: forked processes, such as image readers, may outlive this one and must not share it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            print(f"{lock} cannot be locked ({error.strerror}): see that nothing else trains there", file=sys.stderr)
            return False
    else:
        # else a process that was ending removed the file before this one locked it
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return True
    raise CheckpointError(f"another process is training in {lock.parent}; let it end, or choose another --run-dir")


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()
