"""What is computed on the device is right: the numerics of a pipeline, sampling, attention of rows end to end."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit.core.evaluation.sampling import sample
from tunekit.core.training.attention import can_be_varlen, causal_attention, varlen_attention

pytestmark = pytest.mark.filterwarnings("ignore")


def test_its_numerics_are_right_there_too(pipeline: Any) -> None:
    found = pipeline(validation=0.2).verify()
    assert not [line for line in found.lines if line.status == "fail"], str(found)


def test_what_is_sampled_follows_the_seed(pipeline: Any, tmp_path: Path) -> None:
    run = pipeline().run(tmp_path / "run")
    loaded = run._model(tuned=True)
    given = (loaded.codec.tokenizer, [[1, 5, 7]], 4)
    options = {"count": 3, "temperature": 1.0, "seed": 0}
    assert sample(loaded.model, *given, **options) == sample(loaded.model, *given, **options)


def test_attention_of_rows_end_to_end_is_that_of_each_alone() -> None:
    lengths, make = [5, 1, 9], torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, 4, 15, 64, device="cuda", dtype=torch.bfloat16, generator=make)
    key, value = (torch.randn(1, 2, 15, 64, device="cuda", dtype=torch.bfloat16, generator=make) for _ in range(2))
    assert can_be_varlen(query, 0.0, None)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    found = varlen_attention(query, key, value, starts, starts, 9, 9)
    parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    alone = torch.cat([causal_attention(*part) for part in parts], dim=2)
    assert ((found.float() - alone).norm() / alone.norm()).item() < 1e-2
