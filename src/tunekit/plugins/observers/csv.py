"""Csv: what was logged, as a table for spreadsheets."""

from __future__ import annotations

import attrs

from tunekit.core.common.writing import replace
from tunekit.core.hookspecs import hookimpl
from tunekit.core.run.files import history
from tunekit.core.run.run_log import RunLog


@attrs.frozen(eq=False)
class Csv:
    """An observer that writes `metrics.csv` into the run directory when the run ends, whether or not it failed.

    A row has all that was logged at one step, a column a metric; what was not logged at that step is empty. While the
    run goes on, the same is in `metrics.jsonl`.
    """

    @hookimpl
    def tunekit_run_finished(self, run: RunLog) -> None:
        """Write the table of the whole run, the steps before a resume included."""
        import csv
        import io

        steps: dict[float, dict[str, float]] = {}
        for line in history(run.directory):
            steps.setdefault(line["step"], {}).update(line)
        text = io.StringIO()
        columns = dict.fromkeys(["step", *(name for row in steps.values() for name in row)])
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(steps.values())
        replace(run.directory / "metrics.csv", text.getvalue())
