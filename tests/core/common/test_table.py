"""Tables line up."""

from hypothesis import given
from hypothesis import strategies as st

from tunekit.core.common.table import table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_have_no_blanks_at_the_end() -> None:
    assert table(["name", "rank"], [["lora", "8"], ["bottleneck", ""]]).splitlines() == [
        "name        rank",
        "----------  ----",
        "lora        8",
        "bottleneck",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["plugin"], []) == "plugin\n------"


@given(st.lists(st.lists(st.text("ab", min_size=1), min_size=3, max_size=3), min_size=1))
def test_every_column_starts_at_one_place(rows: list[list[str]]) -> None:
    lines = table(["one", "two", "three"], rows).splitlines()
    starts = [[at for at in range(len(line)) if line[at] != " " and line[:at][-2:] in ("", "  ")] for line in lines]
    assert starts == [starts[0]] * (len(rows) + 2)
