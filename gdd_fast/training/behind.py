"""Background work during training: writing a checkpoint's files, which takes seconds on a slow disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gdd_fast.errors import CheckpointError


class Behind:
    """Runs one job at a time on a thread.

    An error of a job is raised again by the next `start` or `wait`; when either returns, all earlier jobs are done.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the previous job, then start this one. Raises what the previous one raised."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the last job, if any. Raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> CheckpointError | OSError | None:
        """Wait for the job in progress and end the thread, for callers that may have an error of their own to raise.

        Returns the job's CheckpointError or OSError, if it was not raised yet.
        """
        self._pool.shutdown()
        try:
            self.wait()
        except (CheckpointError, OSError) as error:
            return error
        return None
