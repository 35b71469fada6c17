"""A run that is to be made elsewhere: what is sent to the processes that make it, and whether it can be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.run.resume import Resume
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from tunekit.core.pipeline import Pipeline


@attrs.frozen(kw_only=True)
class Job:
    """The arguments of one `Pipeline.run`.

    Args:
        pipeline: what is to be run.
        directory: the run directory; on a file system that all machines see.
        resume: as for `Pipeline.run`.
        observers: as for `Pipeline.run`; copies of them observe, and no state of theirs comes back.
        working_directory: the present one, to which paths in the pipeline may be relative.
    """

    pipeline: Pipeline
    directory: Path
    resume: Resume = False
    observers: tuple[object, ...] = ()
    working_directory: Path = attrs.field(factory=Path.cwd)

    def packed(self) -> bytes:
        """All of it as bytes. ConfigError naming the part of which none can be made."""
        from ray import cloudpickle

        try:
            return bytes(cloudpickle.dumps(attrs.evolve(self, directory=self.directory.absolute())))
        except Exception as error:  # whatever the pickling code of a class raises
            parts = {f"run.observers[{at}]": observer for at, observer in enumerate(self.observers)}
            for where, part in {**parts, "Pipeline": self.pipeline}.items():
                try:
                    cloudpickle.dumps(part)
                except Exception as its_own:
                    raise ConfigError(
                        f"{type(part).__name__} cannot be sent to another process ({type(its_own).__name__}: "
                        f"{its_own}); it must not hold what belongs to this one, as open files and locks do",
                        where,
                    ) from None
            raise error

    @staticmethod
    def unpacked(packed: bytes) -> Job:
        """The job again, in a process that may be another machine's. ConfigError for what is not there."""
        from ray import cloudpickle

        try:
            job = cloudpickle.loads(packed)
        except ImportError as error:
            raise ConfigError(f"{error}; what a pipeline is made of must be installed wherever it runs") from None
        assert isinstance(job, Job)
        if job.working_directory.is_dir():
            os.chdir(job.working_directory)
        if not job.directory.is_dir():
            raise ConfigError(
                f"{job.directory} is not there; it must be on a file system that all machines see", "directory"
            )
        return job

    def make(self) -> None:
        """Make the run, in this process. The finished run, and its model with it, is not kept."""
        self.pipeline.run(self.directory, resume=self.resume, observers=self.observers)
