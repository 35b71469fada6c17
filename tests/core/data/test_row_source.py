"""A source that only reads rows gets schemas, checks and errors from its base."""

import attrs
import pytest

import tunekit as tk
from tunekit.testing import parametrize


@attrs.frozen(kw_only=True)
class Colon(tk.RowSource):
    """Questions and answers with a colon between them.

    Args:
        lines: the lines.
    """

    name = "colon"

    lines: tuple[str, ...] = ("2 + 3: 5", "1 + 1: 2")

    def read(self, split):
        """Each line as a row."""
        for number, line in enumerate(self.lines, start=1):
            asked, colon, answer = line.partition(": ")
            place = f"lines:{number}"
            yield place, {"q": asked, "a": answer} if colon else tk.DataError(f"{place}: no colon")


COLUMNS = {"prompt": "q", "completion": "a"}


@parametrize(Colon(columns=COLUMNS))
def test_a_source_of_a_third_party_passes_the_kit(component, check):
    check(component)


def test_bad_rows_come_with_their_place_and_do_not_end_the_reading():
    source = Colon(lines=("2 + 3: 5", "nothing", "1 + 1: ", "2 + 2: 4"), columns=COLUMNS)
    found = [
        (place, str(row) if isinstance(row, tk.DataError) else row["messages"][1]["content"])
        for place, row in source.examine("train")
    ]
    assert found == [
        ("lines:1", "5"),
        ("lines:2", "lines:2: no colon"),
        ("lines:3", "lines:3: empty answer, nothing to learn from (completion)"),
        ("lines:4", "4"),
    ]
    with pytest.raises(tk.DataError, match="lines:2: no colon"):
        list(source.load("train"))


def test_no_rows_is_an_error():
    with pytest.raises(tk.DataError, match="Colon: there are no rows"):
        list(Colon(lines=(), columns=COLUMNS).load("train"))


def test_a_split_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(tk.ConfigError, match="there is no split 'test'; there is 'train'"):
        list(Colon(columns=COLUMNS).load("test"))


def test_the_group_of_a_row_goes_with_it():
    rows = [{"text": "a", "doc": 1}, {"text": "b", "doc": "x"}]
    source = tk.InMemory(rows=rows, group="doc")
    assert list(source.load("train")) == [{"text": "a", "group": "1"}, {"text": "b", "group": "x"}]
    with pytest.raises(tk.DataError, match=r"row 1: expected text or a whole number that names the group \(topic\)"):
        list(tk.InMemory(rows=rows, group="topic").load("train"))


@attrs.frozen(kw_only=True)
class Loads(tk.DataSource):
    """Only `load`."""

    name = "loads"

    def load(self, split):
        """Two rows and a bad one."""
        yield {"text": "a"}
        yield {"text": "b"}
        raise tk.DataError("somewhere: bad")


def test_a_source_that_only_loads_is_examined_up_to_its_first_error():
    found = list(Loads().examine("train"))
    assert found[:2] == [("row 1", {"text": "a"}), ("row 2", {"text": "b"})]
    assert [(place, str(error)) for place, error in found[2:]] == [("row 3", "somewhere: bad")]
