"""Batches mask by length, steps see every row, and the order is a pure function of the seed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.core.data.batching import RowOrder, chunks, collate, steps_per_epoch, supervised_tokens
from tunekit.core.data.codec import IGNORED


def row(length):
    return {"input_ids": list(range(1, length + 1)), "labels": [IGNORED, *range(2, length + 1)]}


def test_padding_is_masked_by_length_and_carries_no_loss():
    batch = collate([row(2), row(4)], pad_id=2)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 2, 3, 4]]


def test_the_first_token_is_never_predicted_and_so_never_counted():
    assert supervised_tokens({"input_ids": [5, 6, 7], "labels": [5, IGNORED, 7]}) == 1


def order(lengths, batch_size=4, seed=0, kind="shuffled"):
    return RowOrder(lengths=lengths, batch_size=batch_size, seed=seed, order=kind)


@pytest.mark.parametrize("kind", ["shuffled", "by-length", "as-given"])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), batch_size=st.integers(1, 12))
def test_an_epoch_sees_every_row_once_and_a_step_needs_none_before_it(kind, lengths, batch_size):
    steps = steps_per_epoch(len(lengths), batch_size)
    going = order(lengths, batch_size, kind=kind)
    for epoch in range(2):
        numbers = range(epoch * steps + 1, (epoch + 1) * steps + 1)
        seen = [going.of_step(step) for step in numbers]
        assert Counter(at for rows in seen for at in rows) == Counter(range(len(lengths)))
        assert seen == [order(lengths, batch_size, kind=kind).of_step(step) for step in reversed(numbers)][::-1]


def test_epochs_and_seeds_have_orders_of_their_own_and_as_given_has_none():
    for kind in ("shuffled", "by-length"):
        made = {tuple(order([5] * 20, seed=seed, kind=kind).epoch(epoch)) for epoch in range(3) for seed in range(3)}
        assert len(made) == 9
    assert order([1] * 5, seed=7, kind="as-given").epoch(3) == [0, 1, 2, 3, 4]


def test_by_length_rows_of_like_length_share_a_step_and_the_steps_are_shuffled():
    lengths = [at * 37 % 101 for at in range(101)]  # 0 to 100, each once
    made = order(lengths, 5, kind="by-length")
    steps = [sorted(lengths[at] for at in made.of_step(step)) for step in range(1, 21)]
    left = lengths[made.of_step(21)[0]]
    assert sorted(steps) == [list(part) for part in zip(*[iter(sorted({*range(101)} - {left}))] * 5, strict=True)]
    assert steps != sorted(steps)


def test_what_makes_no_whole_step_is_not_always_the_longest_rows():
    made = order(list(range(9)), 4, kind="by-length")
    assert len({made.epoch(epoch)[-1] for epoch in range(20)}) > 4


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 200), st.one_of(st.none(), st.integers(1, 5)))
def test_chunks_hold_every_row_once_within_their_limits(lengths, tokens, most):
    groups = list(chunks(lengths, tokens, most))
    assert Counter(at for group in groups for at in group) == Counter(range(len(lengths)))
    for group in groups:
        assert most is None or len(group) <= most
        assert len(group) == 1 or len(group) * max(lengths[at] for at in group) <= tokens


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 200), st.one_of(st.none(), st.integers(1, 5)))
def test_without_padding_no_row_would_have_found_room_in_a_group_begun_before(lengths, tokens, most):
    groups = list(chunks(lengths, tokens, most, padded=False))
    assert Counter(at for group in groups for at in group) == Counter(range(len(lengths)))
    held = [sum(lengths[at] for at in group) for group in groups]
    for number, group in enumerate(groups):
        assert most is None or len(group) <= most
        assert len(group) == 1 or held[number] <= tokens
        room = [left for left, other in zip(held[:number], groups, strict=False) if len(other) != most]
        assert all(left + lengths[group[0]] > tokens for left in room)


def test_rows_go_where_the_least_room_is_left():
    made = chunks([6, 5, 4, 3, 2], 10, padded=False)
    assert [[[6, 5, 4, 3, 2][at] for at in group] for group in made] == [[6, 4], [5, 3, 2]]


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (1, 16, 1)])
def test_the_last_step_of_an_epoch_takes_what_is_left(rows, batch_size, steps):
    assert steps_per_epoch(rows, batch_size) == steps
