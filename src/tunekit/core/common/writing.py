"""Writing files that are whole or not there, and saying which one could not be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunekit.errors import TrainingError


def replace(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it, and rename it into place: a reader sees the old content or all the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        flush(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have the operating system write `path`, a file or a directory, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories, and has renamed files on the disk without
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path, advice: str) -> Iterator[None]:
    """Within it, a disk that is full, read-only or gone is a TrainingError with `path` and the `advice`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"cannot write {path}: {reason}. {advice}") from error
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        # torch.save hides what the disk said behind a message about positions.
        raise TrainingError(f"cannot write {path}: {error.__context__.strerror}. {advice}") from error
