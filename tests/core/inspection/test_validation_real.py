"""Validation of real, and really broken, data, against counts of its own by plain json and Counter."""

import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.common.assets import resolve

pytestmark = pytest.mark.real

SHARED = Path(os.environ.get("TUNEKIT_SHARED") or Path(__file__).parents[4] / "shared")
EXPECTED = SHARED / "data/malformed/expected.json"
BROKEN = json.loads(EXPECTED.read_text(encoding="utf-8"))["files"] if EXPECTED.exists() else []


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["file"])
def test_a_broken_file_gives_findings_where_it_is_broken(case):
    path = EXPECTED.parent / case["file"]
    report = tk.validate(tk.JsonLines(path=path))
    assert report.ok == (case["strict"] == "ok")
    assert report.splits["train"].sound == len(case["kept_lines"])
    for defect in case["defects"]:
        if defect["severity"] == "info":
            continue
        if defect["class"] == "too_few_rows":
            assert any("only 1 row " in finding.reason for finding in report.warnings)
            continue
        place = f"{path}:{defect['line']}" if defect["line"] else str(path)
        found = [finding for finding in report.problems if finding.place.startswith(place)]
        found = [finding for finding in found if finding.severity == defect["severity"]]
        if defect["field"] is not None and defect["class"] != "invalid_json":
            found = [finding for finding in found if finding.field == defect["field"]]
        assert found, [str(finding) for finding in report.problems]
    errors = {finding.place for finding in report.errors}
    assert len(errors) <= len(case["defects"]) + (not case["kept_lines"])
    str(report)


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def test_questions_and_answers_are_counted_as_they_are():
    path = SHARED / "data/medquad/medquad_a.jsonl"
    report = tk.validate(tk.JsonLines(path=path))
    rows = rows_of(path)
    questions, pairs = (
        Counter(row["question"] for row in rows),
        Counter((row["question"], row["answer"]) for row in rows),
    )
    figures = report.splits["train"]
    assert report.ok
    assert figures.sound == len(rows)
    assert figures.roles == {"user": len(rows), "assistant": len(rows)}
    assert figures.lengths.total == sum(len(row["question"]) + len(row["answer"]) for row in rows)
    assert figures.duplicates == sum(count - 1 for count in pairs.values())
    assert figures.duplicates + figures.repeated_prompts == sum(count - 1 for count in questions.values())


def test_what_leaks_from_a_random_share_of_repeated_questions_is_found():
    source = tk.JsonLines(path=SHARED / "data/medquad/medquad_a.jsonl")
    report = tk.validate(source, validation=0.1)
    train, held = tk.Pipeline(model=tk.TINY, data=source, validation=0.1).rows()
    asked = {row["messages"][0]["content"] for row in train}
    leaked = [row for row in held if row["messages"][0]["content"] in asked]
    assert leaked
    assert sum(finding.group == "held out, its prompt trained on" for finding in report.warnings) == len(leaked)
    assert (report.training_rows, report.validation_rows) == (len(train), len(held))


def test_sound_data_gives_no_error_and_no_leak():
    source = tk.JsonLines(path=SHARED / "data/gsm8k/train.jsonl")
    report = tk.validate(source, validation=tk.JsonLines(path=SHARED / "data/gsm8k/validation.jsonl"))
    assert report.ok
    assert (report.training_rows, report.validation_rows, report.leaked) == (4000, 300, 0)


def test_calls_of_functions_are_read_and_their_tools_found_wanting():
    path = SHARED / "data/openai_drone_functions/drone_training.jsonl"
    report = tk.validate(tk.JsonLines(path=path))
    rows = rows_of(path)
    undescribed = sum("description" not in tool["function"] for row in rows for tool in row["tools"])
    assert report.ok
    assert report.splits["train"].schemas == {"messages with tools": len(rows)}
    assert sum("without a description" in finding.reason for finding in report.warnings) == undescribed


def test_preferences_are_refused_where_they_cannot_be_told_apart():
    path = SHARED / "data/hh_rlhf_harmless/test_lines_517_1316.jsonl"
    report = tk.validate(tk.JsonLines(path=path))
    bad = set()
    for line, row in enumerate(rows_of(path), start=1):
        speakers = [re.findall(r"\n\n(Human|Assistant):", row[side]) for side in ("chosen", "rejected")]
        twice = any(one == other for side in speakers for one, other in pairwise(side))
        if twice or not row["chosen"].rpartition("Assistant:")[2].strip():
            bad.add(line)
    assert {1, 410, 588, 739} <= bad
    assert {int(finding.place.rpartition(":")[2]) for finding in report.errors} == bad
    assert report.splits["train"].schemas == {"preference": 800 - len(bad)}


def test_the_embedded_data_is_classification_like():
    report = tk.validate(tk.JsonLines(path=tk.ORDERS), model=tk.TINY, validation=0.1)
    answers = Counter(row["completion"] for row in rows_of(Path(resolve(tk.ORDERS))))
    assert report.ok
    assert sorted(report.splits["train"].labels.values()) == sorted(answers.values())
