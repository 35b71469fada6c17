"""What processes of one run tell each other: from host to host, and errors as others can raise them."""

from __future__ import annotations

import datetime
import pickle
from functools import cache
from typing import Any

from tunekit.errors import TrainingError

PATIENCE = datetime.timedelta(hours=12)
"""So long a process waits for the others: the first one evaluates, encodes and saves while they do."""


@cache
def channel(world: Any) -> Any:
    """Of the processes of `world`, a group for messages, which go from host to host: by way of a GPU, it is waited for.

    None for `world` itself.
    """
    from torch import distributed

    if distributed.get_backend() == "gloo" or not distributed.is_gloo_available():
        return None
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def portable(error: Exception | None) -> Exception | None:
    """The error as other processes can raise it; one that cannot be sent is told in words."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))  # some errors can be written and not read
    except Exception:  # whatever the error's own code raises
        return TrainingError(f"another process stopped by {type(error).__name__}: {error}")
    return error
