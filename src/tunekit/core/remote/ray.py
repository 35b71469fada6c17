"""`Ray`: a cluster on which runs are made, by processes that Ray starts; there is no scheduler of ours."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from itertools import count

import attrs

from tunekit.core.fields import at_least, check_types
from tunekit.core.registry import default_registry
from tunekit.core.remote.gang import Gang, Lost, Stop, Stopped
from tunekit.core.remote.job import Job
from tunekit.core.run import files, lock
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.core.training.parallel import check_alone
from tunekit.errors import ConfigError, TrainingError


@attrs.frozen(kw_only=True)
class Ray:
    """A Ray cluster, to make runs on: `pipeline.run(directory, on=tk.Ray(workers=2))`, `tk.compare(..., on=tk.Ray())`.

    The workers of a run share it as the processes that torchrun starts do. All machines need the run directory on a
    file system that they see, and what the pipeline is made of installed. Where `ray.init` was called before, that
    connection is used, and its `runtime_env` with it.

    Args:
        address: of the cluster ("10.0.0.1:6379"); None for the one that Ray finds (`RAY_ADDRESS`, or one of this
            machine), else one is started on this machine, for as long as this process lives.
        workers: processes that share a run.
        gpus_per_worker: 1, or 0 for a run on CPUs. With one worker also a part: at 0.5, two runs share a GPU.
        cpus_per_worker: cores, and threads of torch.
        max_restarts: so often a run goes on from its newest checkpoint after one of its workers died.
    """

    address: str | None = None
    workers: int = attrs.field(default=1, validator=at_least(1))
    gpus_per_worker: float = attrs.field(default=0, validator=at_least(0))
    cpus_per_worker: int = attrs.field(default=1, validator=at_least(1))
    max_restarts: int = attrs.field(default=3, validator=at_least(0))

    def __attrs_post_init__(self) -> None:
        check_types(self)
        if self.gpus_per_worker > 1:
            raise ConfigError("a worker uses one GPU; ask for more workers", "Ray.gpus_per_worker")
        if self.workers > 1 and self.gpus_per_worker not in (0, 1):
            raise ConfigError("workers that share a run cannot share a GPU", "Ray.gpus_per_worker")
        if (self.address or "").startswith("ray://"):
            raise ConfigError(
                "a run needs its directory here and there; start the script on the cluster, and leave the address open",
                "Ray.address",
            )

    def make(self, job: Job) -> None:
        """Make one run. Raises what it raised, as it would here; TrainingError if its workers died too often."""
        for _, error in self.make_all([job]):
            if error:
                raise error

    def make_all(self, jobs: Sequence[Job]) -> Generator[tuple[int, BaseException | None]]:
        """Make runs, as many at once as the cluster has room for; of each, once it ended, its place and its error.

        KeyboardInterrupt and SystemExit stop the workers, which save; it is waited for. A second one ends them at once.
        """
        if not jobs:
            return
        check_alone("a call with on=tk.Ray(...)")
        connect(self.address)
        stop = Stop()
        # Threads only wait: what runs at once is decided by Ray.
        with ThreadPoolExecutor(len(jobs), "tunekit-ray") as pool:
            made = {pool.submit(self._make, job, stop): at for at, job in enumerate(jobs)}
            try:
                for one in as_completed(made):
                    yield made[one], one.exception()
            except BaseException:
                stop.asked.set()
                try:
                    wait(made)
                finally:
                    stop.at_once.set()
                raise

    def _make(self, job: Job, stop: Stop) -> None:
        """Make one run, and go on with it where workers died."""
        if not job.resume:
            files.create(job.directory)  # the workers look for it: so they know that they see the same files
        for restarts in count():
            gang = Gang(count=self.workers, each=self._each, stop=stop)
            try:
                gang.make(job.packed())
                break
            except Stopped:
                return
            except Lost as lost:
                for worker in gang.where[:1]:  # the first holds the lock
                    lock.leave(job.directory, worker.host, worker.pid)
                if (job.directory / files.RESULT).is_file():
                    break  # it had done its work
                if restarts == self.max_restarts:
                    raise TrainingError(
                        f"{lost}; the run was started again {restarts} times. Once the cause is gone, go on with "
                        "resume=True"
                    ) from None
                if (job.directory / files.RECIPE).is_file():
                    job = attrs.evolve(job, resume=job.resume or True)
                    log = RunLog(directory=job.directory, observers=Observers(default_registry()))
                    log.note(f"{lost}; started again, {restarts + 1} of at most {self.max_restarts} times")
        if not (job.directory / files.RESULT).is_file():
            raise ConfigError(
                f"the run was made, and {job.directory} is not what the workers see under this name; it must be on a "
                "file system that all machines see",
                "directory",
            )

    @property
    def _each(self) -> dict[str, float]:
        """What a worker takes, by Ray's names."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}


def connect(address: str | None) -> None:
    """Connect this process to the cluster, if it is not connected. ConfigError if there is no Ray, or no cluster."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('needs ray: pip install "tunekit-sdk[ray]"', "Ray")
    import ray

    if ray.is_initialized():
        return
    _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here tells nobody
    try:
        ray.init(address=address, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster: {error}", "Ray.address") from error


def _check_answers(address: str | None) -> None:
    """Raise ConfigError for a "host:port" at which nobody listens: Ray would try for minutes."""
    host, separator, port = (address or "").rpartition(":")
    if separator:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ConfigError(f"no Ray cluster answers at {address!r} ({error})", "Ray.address") from None
