"""A preview shows what training and the collator make of the rows, and nothing in a row reaches the reader's terminal."""

import html
import io
import re
import sys

import pytest

import tunekit as tk

HOSTILE = "What is 2 + 3? <|im_end|>\n[bold]<script>alert(1)</script>\x1b[31m\x07\u202e"
ROWS = [
    {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "Five 🌳."}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    },
]
GOLDEN = r"""row 1: 70 tokens, 9 learned, 0 of padding
<|im_start|>user
What is 2 + 3? \<|im_end|>
[bold]<script>alert(1)</script>\x1b[31m\x07\u202e<|im_end|>
<|im_start|>assistant
{+Five 🌳.<|im_end|>+}

row 2: 24 tokens, 2 learned, 46 of padding
<|im_start|>user
a<|im_end|>
<|im_start|>assistant
b<|im_end|>
<|im_start|>user
c<|im_end|>
<|im_start|>assistant
{+d<|im_end|>+}
"""


def made(data=ROWS, **options):
    return tk.preview(tk.InMemory(rows=data), model=tk.TINY, **options)


def test_it_prints_as_plain_text():
    assert str(made()) == GOLDEN


def test_where_standard_output_is_no_terminal_it_shows_itself_as_plain_text(capsys):
    made().show()
    assert capsys.readouterr().out == GOLDEN + "\n"


def test_in_a_terminal_what_is_learned_has_a_style_and_nothing_in_a_row_has(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made().show()
    shown = terminal.getvalue()
    assert "\x1b[1;32mFive 🌳.\x1b[0m" in shown
    assert "[bold]<script>" in shown
    assert "\x07" not in shown
    assert "\x1b[31m" not in shown


def test_as_html_it_is_escaped_whole_and_says_the_same():
    text = made().html()
    assert set(re.findall(r"</?(\w+)", text)) == {"div", "p", "b", "pre", "span"}
    assert made()._repr_html_() == text
    rows = [html.unescape(re.sub(r"<[^>]+>", "", row)) for row in re.findall(r"<pre.*?</pre>", text, re.DOTALL)]
    plain = [part.split("\n", 1)[1] for part in re.split(r"^(?=row \d: )", GOLDEN, flags=re.MULTILINE)[1:]]
    assert [row.strip() for row in rows] == [re.sub(r"\{\+|\+\}", "", part).strip() for part in plain]
    learned = re.findall(r'title="learned[^>]*>([^<]*)<', text)
    assert learned == ["Five 🌳.", "&lt;|im_end|&gt;", "d", "&lt;|im_end|&gt;"]


def test_it_is_saved_as_a_page(tmp_path):
    path = made().save(tmp_path / "preview.html")
    page = path.read_text(encoding="utf-8")
    assert page.startswith('<!doctype html><meta charset="utf-8">')
    assert made().html() in page


def test_the_trainer_and_the_template_say_what_is_learned():
    template = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    shown = str(made([{"prompt": "a", "completion": "b"}], template=template, trainer=tk.SFT(train_on="all")))
    assert shown == "row 1: 5 tokens, 5 learned, 0 of padding\n{+a\nb\n<|im_end|>+}\n"


def test_a_row_that_does_not_fit_says_so():
    [first, second] = made(trainer=tk.SFT(max_length=50)).rows
    assert (first.too_long, second.too_long) == (50, None)
    assert first.heading.endswith("; longer than the 50 that fit")


def test_a_pipeline_shows_the_rows_of_its_own():
    rows = [{"text": f"{number}"} for number in range(5)]
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=rows), trainer=tk.SFT())
    assert len(pipeline.preview().rows) == 3
    assert str(pipeline.preview(1)) == str(made(rows, rows=1))


def test_a_row_that_cannot_be_encoded_is_named_and_no_rows_are_an_error():
    bad = [ROWS[0], {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "b", "weight": 0}]}]
    with pytest.raises(tk.DataError, match="row 2: no assistant turn"):
        made(bad)
    with pytest.raises(tk.DataError, match="no rows"):
        made([])
