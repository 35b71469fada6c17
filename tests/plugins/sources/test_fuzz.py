"""A few hundred of the files that `make fuzz` tries by the minute."""

import runpy
from pathlib import Path

import pytest

import tunekit as tk

FUZZ = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "fuzz_json_lines.py"))


def test_spoilt_files_give_rows_and_data_errors_and_nothing_else(tmp_path):
    assert FUZZ["fuzz"](60, 0, list(FUZZ["SEEDS"]), tmp_path, most=400) == 400


def test_an_error_that_is_no_data_error_would_be_seen(tmp_path, monkeypatch):
    def broken(self, split):
        raise KeyError("role")
        yield

    monkeypatch.setattr(tk.JsonLines, "read", broken)
    with pytest.raises(KeyError):
        FUZZ["fuzz"](60, 0, list(FUZZ["SEEDS"]), tmp_path, most=1)


def test_a_file_that_cannot_be_unpacked_does_not_hide_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x1f\x8b\x08 nothing of the kind")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (first, bad), second = tk.JsonLines(path=tmp_path / "*.jsonl").examine("train")
    assert first == str(tmp_path / "a.jsonl")
    assert str(bad).startswith(f"{first}: ")
    assert second == (f"{tmp_path / 'b.jsonl'}:1", {"text": "b"})
