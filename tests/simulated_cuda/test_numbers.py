"""What is computed on the device is right: the numerics of a pipeline, sampling, attention of rows end to end."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

import simulated_cuda
from tunekit.core.evaluation import predicting
from tunekit.core.evaluation.sampling import sample
from tunekit.core.training.attention import can_be_varlen, causal_attention, varlen_attention

pytestmark = pytest.mark.filterwarnings("ignore")


def test_its_numerics_are_right_there_too(pipeline: Any) -> None:
    found = pipeline(validation=0.2).verify()
    assert not [line for line in found.lines if line.status == "fail"], str(found)


def test_what_is_sampled_follows_the_seed_in_any_company_and_is_drawn_on_the_device(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline().run(tmp_path / "run")
    loaded = run._model(tuned=True)
    prompts, options = [[1, 5, 7], [4, 9], [6]], {"count": 3, "temperature": 1.0, "seed": 0}
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with simulated_cuda.counting() as counts:
        together = sample(loaded.model, loaded.codec.tokenizer, prompts, 4, **options)
    assert all(map(torch.equal, (torch.get_rng_state(), torch.cuda.get_rng_state()), states))
    assert not [place for _, place in counts.waits if place.startswith("core/evaluation/sampling.py")], counts.report()
    assert len({str(answer) for answers in together for answer in answers}) > 3
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 1)
    assert sample(loaded.model, loaded.codec.tokenizer, prompts[::-1], 4, **options) == together[::-1]


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
