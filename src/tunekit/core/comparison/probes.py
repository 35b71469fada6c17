"""How fast each method of a comparison trains, from a few steps that are thrown away: for a budget of minutes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs

from tunekit.core.common.secrets import redacted
from tunekit.core.comparison.arms import Method, with_fields
from tunekit.core.comparison.budget import Minutes, Tokens
from tunekit.core.model.base import LoadBase
from tunekit.core.pipeline import Pipeline
from tunekit.core.run import files
from tunekit.core.run.gauge import measured

PROBES = "probes.json"
STEPS = 9
"""Steps of a probe. The first is not timed: much is set up in it."""
NOT_PROBED = {
    **dict.fromkeys(("evaluate_every", "keep_best", "patience", "stop_beyond", "save_minutes")),
    "restore_best": False,
    "save_every": STEPS,
    "log_every": 1,
}
"""What a probe leaves out, of the fields that the trainer has."""


def budgets(
    methods: Sequence[Method],
    minutes: Minutes,
    seed: int,
    directory: Path,
    load: LoadBase,
    between: Callable[[], object],
) -> tuple[dict[str, Tokens], dict[str, str]]:
    """The tokens that each method can learn from in the time, by name; and why a probe failed, where one did.

    A probe is made once: its speed is kept in `probes.json`, so that the same comparison, called again, plans the same
    steps for what is left to do.

    Args:
        methods: those to be probed.
        minutes: of training.
        seed: of the probes.
        directory: of the comparison.
        load: gives the base.
        between: called after each probe.
    """
    known = files.read_json(directory / PROBES) if (directory / PROBES).is_file() else {}
    failures = {}
    for method in sorted(methods, key=lambda method: method.stored):  # by base, as the runs
        made_of = _digest(method.pipeline)
        if known.get(method.name, {}).get("made_of") == made_of:
            continue
        try:
            speed = _speed(attrs.evolve(method.pipeline, seed=seed), directory, load)
        except Exception as error:  # as with a run of a method that fails
            failures[method.name] = redacted(f"{type(error).__name__}: {error}")
        else:
            known[method.name] = {"tokens_per_second": speed, "steps": STEPS - 1, "made_of": made_of}
            files.write_json(directory / PROBES, known)
        between()
    names = {method.name for method in methods} - failures.keys()
    return {name: minutes.tokens(known[name]["tokens_per_second"]) for name in names}, failures


def _speed(pipeline: Pipeline, directory: Path, load: LoadBase) -> float:
    """Tokens of training rows a second, in the steps of a probe but the first."""
    fields = attrs.fields_dict(type(pipeline.trainer))
    changes = {name: value for name, value in NOT_PROBED.items() if name in fields}
    trainer = with_fields(pipeline.trainer, max_steps=STEPS, **changes)
    with TemporaryDirectory(dir=directory, prefix=".probe-", ignore_cleanup_errors=True) as place:
        probe = attrs.evolve(pipeline, trainer=trainer, evaluators=(), baselines=())
        probe._run(Path(place) / "run", False, (), load)
        return float(measured(Path(place) / "run")["tokens_per_second"])


def _digest(pipeline: Pipeline) -> str:
    """A hash of what is trained on what and how, so that a speed is not taken for that of another pipeline."""
    return hashlib.sha256(json.dumps(pipeline.to_dict(), sort_keys=True).encode()).hexdigest()
