"""Rounds: every arm once, in processes of their own, again and again while there is time; going on where it stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from harness import gate
from harness.arms import ARMS, REFERENCE, missing
from harness.clock import Watched

SCRIPTS = Path(__file__).parents[1]
ROOF = "roof"


class Rounds:
    """The runs of some arms on one prepared workload, kept in `runs.jsonl` beside it.

    Args:
        work: where the workload was prepared.
        names: the arms, in their order.
        threads: of each process.
        minutes: after them no round begins that would not be done in time; the first is made in any case.
        most_seconds: of one run, which fails when it takes longer.
        repeats: rounds at most.
    """

    def __init__(self, work, names, *, threads, minutes, most_seconds=900, repeats=5):
        self.work, self.threads, self.minutes, self.most_seconds = work, threads, minutes, most_seconds
        self.repeats = repeats
        self.failed = {name: reason for name in names if (reason := missing(name))}
        self.names = [name for name in names if name not in self.failed]
        if REFERENCE not in self.names:
            self.names.append(REFERENCE)
        self._log = work / "runs.jsonl"
        kept = map(json.loads, self._log.read_text().splitlines() if self._log.exists() else [])
        self.runs = [run for run in kept if run["arm"] in [ROOF, *self.names]]  # other arms had this workload too

    def make(self):
        """Make them; the gate stands after the first round, and arms that fail it are not run again."""
        began = time.monotonic()
        for number in range(self.repeats):
            if number and not self._in_time(number, time.monotonic() - began):
                break
            for name in [ROOF, *self.of_round(number)]:
                if not self._of(number, name):
                    self._one(number, name)
            if number == 0:
                self._judge()

    def complete(self):
        """How many rounds have all arms."""
        count = 0
        while count < self.repeats and all(self._of(count, name) for name in [ROOF, *self.of_round(count)]):
            count += 1
        return count

    def of_round(self, number):
        """The arms that are run in this round, from 0."""
        return [name for name in self.names if name not in self.failed and not (number and ARMS[name].once)]

    def _in_time(self, number, elapsed):
        """Whether a round as long as the last one is over before the time is."""
        arms = [ROOF, *self.of_round(number)]
        last = sum(run["wall"] for run in self.runs if run["round"] == number - 1 and run["arm"] in arms)
        return elapsed + last <= 60 * self.minutes

    def _of(self, number, name):
        return [run for run in self.runs if (run["round"], run["arm"]) == (number, name)]

    def _one(self, number, name):
        out = self.work / "run.json"
        out.unlink(missing_ok=True)
        record = self.work / "records" / name
        command = [sys.executable, str(SCRIPTS / "arm.py"), name, "--work", str(self.work), "--out", str(out)]
        if number == 0 and name != ROOF:
            record.mkdir(parents=True, exist_ok=True)
            command += ["--record", str(record)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        environment.pop("THP_MEM_ALLOC_ENABLE", None)  # tunekit, imported here, has set it: no arm has it from another
        began = time.time()
        with (self.work / f"{name}.log").open("w") as said:
            try:
                watched = Watched.run(
                    [*command, "--started", str(began)], self.most_seconds, env=environment, stdout=said, stderr=said
                )
            except subprocess.TimeoutExpired:
                self._fail(name, f"a run took more than {self.most_seconds} seconds")
                return
        if not out.exists():
            last = (self.work / f"{name}.log").read_text().strip().splitlines()[-1:]
            self._fail(name, f"stopped by {' '.join(last) or 'nothing it said'}")
            return
        run = {"round": number, **json.loads(out.read_text()), "wall": time.time() - began}
        run["peak_mib"] = max(run.get("peak_mib", 0.0), watched.peak_mib)
        run["cpu_seconds"] = round(watched.cpu_seconds, 2)
        run["others_busy"] = round(watched.others_busy, 3)
        self.runs.append(run)
        with self._log.open("a") as file:
            file.write(json.dumps(run) + "\n")
        steps = " ".join(f"{seconds:.2f}" for seconds in run.get("seconds", []))
        print(f"round {number + 1}  {name:26} {run['wall']:7.1f} s  steps: {steps}", flush=True)

    def _fail(self, name, reason):
        print(f"{name}: {reason}", flush=True)
        if name == ROOF:
            raise SystemExit(reason)
        self.failed[name] = reason

    def _judge(self):
        """Compare the first round with the reference's, and have the final losses measured by one script."""
        first = {run["arm"]: run for run in self.runs if run["round"] == 0 and run["arm"] != ROOF}
        if REFERENCE not in first:
            raise SystemExit(f"without {REFERENCE} there is nothing to hold the others against")
        paths = {name: self.work / "records" / name for name in first}
        losses = self._final_losses(paths)
        for name, run in first.items():
            run["final_loss"], run["start_loss"] = losses[name], losses["start"]
            run["cosine"] = gate.cosine(paths[name] / "gradient.safetensors", paths[REFERENCE] / "gradient.safetensors")
        for name, run in first.items():
            if wrong := gate.faults(run, first[REFERENCE], ARMS[name].computes):
                self._fail(name, "not the same work: " + "; ".join(wrong))

    def _final_losses(self, paths):
        """By arm, and "start"; measured once, then read."""
        kept = self.work / "final_losses.json"
        if kept.exists() and set(found := json.loads(kept.read_text())) >= set(paths):
            return found
        files = [str(path / "adapter.safetensors") for path in paths.values()]
        command = [sys.executable, str(SCRIPTS / "final_loss.py"), str(self.work), *files]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = list(json.loads(said.splitlines()[-1]).values())
        losses = dict(zip(["start", *paths], found, strict=True))
        kept.write_text(json.dumps(losses))
        return losses
