"""Work that goes on behind training: the files of a checkpoint, which take seconds on a slow disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gdd_fast.errors import CheckpointError


class Behind:
    """Runs one job at a time on a thread.

    What a job raises is raised again by the next `start` or `wait`: after each of them whatever was given is done.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, then begin this one."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the job that was started last, if any. Raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> CheckpointError | OSError | None:
        """Wait for the job in progress and end the thread; for whoever has an error of its own to raise.

        Returns what the job raised for want of a place to write, if nobody has been told.
        """
        self._pool.shutdown()
        try:
            self.wait()
        except (CheckpointError, OSError) as error:
            return error
        return None
