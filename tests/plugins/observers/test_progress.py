"""A run is shown where it runs: a bar in a terminal and in a notebook, a few plain lines elsewhere."""

import sys
import types

import pytest

from tunekit.core.registry import Registry
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.errors import PluginWarning
from tunekit.plugins.observers import progress


def show(directory, steps):
    """Tell the observers of a whole run, a log line for each step."""
    observers = Observers(Registry())
    run = RunLog(directory=directory, observers=observers)
    observers.emit("tunekit_run_started", run=run, steps=steps)
    for step in range(1, steps + 1):
        run.log(step, {"loss": 1 / step})
    observers.emit("tunekit_run_finished", run=run, error=None)


@pytest.mark.parametrize("steps", [1, 7, 10, 250])
def test_a_pipe_gets_about_ten_plain_lines_and_the_last_step(tmp_path, capsys, steps):
    show(tmp_path, steps)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 11
    assert lines[-1] == f"step {steps}/{steps}  loss {1 / steps:.4g}"


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(tmp_path, 20)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "loss 0.05" in shown
    assert " MiB" in shown


def test_a_notebook_gets_a_bar_without_widgets(tmp_path, capsys, monkeypatch):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content)

    def display(content, display_id):
        shown.append(content)
        return Handle()

    fake = types.SimpleNamespace(display=display, HTML=str)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    show(tmp_path, 2)
    assert [content.split(">")[0] for content in shown] == [f'<progress value="{n}" max="2"' for n in range(3)]
    assert "loss 0.5" in shown[-1]
    assert capsys.readouterr().err == ""


def test_it_is_quiet_or_prints_lines_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TUNEKIT_PROGRESS", "quiet")
    show(tmp_path, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TUNEKIT_PROGRESS", "lines")
    show(tmp_path, 3)
    assert capsys.readouterr().err.splitlines()[-1] == "step 3/3  loss 0.3333"
    monkeypatch.setenv("TUNEKIT_PROGRESS", "loud")
    with pytest.warns(PluginWarning, match="must be 'quiet', 'lines' or unset, got 'loud'"):
        show(tmp_path, 3)


def test_a_bar_tells_the_supervised_tokens_a_second_without_the_time_of_evaluations(tmp_path, monkeypatch):
    now, shown = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        progress, "_bar", lambda *_: types.SimpleNamespace(show=lambda *it: shown.append(it), close=int)
    )
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    observers = Observers(Registry())
    run = RunLog(directory=tmp_path, observers=observers)
    observers.emit("tunekit_run_started", run=run, steps=4)
    for step, metrics, seconds in [
        (1, {"tokens": 30}, 9),
        (2, {"tokens": 30}, 2),
        (2, {"validation/nll": 1}, 50),
        (4, {"tokens": 40}, 4),
    ]:
        now[0] += seconds
        run.log(step, metrics)
    said = [[part for part in text.split("  ") if "tokens/s" in part] for _, text in shown]
    assert said == [[], ["15 supervised tokens/s"], [], ["20 supervised tokens/s"]]
