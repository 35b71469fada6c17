"""A component whose module imports a heavy package at its top."""

import attrs
import numpy

from tunekit import DataSource


@attrs.frozen(kw_only=True)
class Heavy(DataSource):
    """Rows of numbers."""

    name = "heavy"

    def load(self, split):
        yield {"text": str(numpy.pi)}
