"""Batches mask by length, steps see every row, and the order is a pure function of the seed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.core.data.batching import chunks, collate, epoch_order, rows_of_step, steps_per_epoch, supervised_tokens
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


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 3))
def test_an_epoch_sees_every_row_once(rows, batch_size, seed):
    steps = steps_per_epoch(rows, batch_size)
    for epoch in range(2):
        seen = [
            at
            for step in range(epoch * steps + 1, (epoch + 1) * steps + 1)
            for at in rows_of_step(step, rows, batch_size, seed, "shuffled")
        ]
        assert Counter(seen) == Counter(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own_and_as_given_has_none():
    orders = {tuple(epoch_order(20, epoch, seed, "shuffled")) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert epoch_order(5, 3, 7, "as-given") == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 200), st.one_of(st.none(), st.integers(1, 5)))
def test_chunks_hold_every_row_once_within_their_limits(lengths, tokens, most):
    groups = list(chunks(lengths, tokens, most))
    assert Counter(at for group in groups for at in group) == Counter(range(len(lengths)))
    for group in groups:
        assert most is None or len(group) <= most
        assert len(group) == 1 or len(group) * max(lengths[at] for at in group) <= tokens


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (1, 16, 1)])
def test_the_last_step_of_an_epoch_takes_what_is_left(rows, batch_size, steps):
    assert steps_per_epoch(rows, batch_size) == steps
