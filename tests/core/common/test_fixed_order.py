"""While the bits of two runs on a GPU are compared, torch adds up in a fixed order; afterwards as before."""

from contextlib import suppress

import pytest
import torch

from tunekit.core.common.fixed_order import in_fixed_order


def asked():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_on_a_gpu_the_order_is_fixed_and_torch_is_afterwards_as_it_was(before):
    usual = asked()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        with suppress(ZeroDivisionError), in_fixed_order("cuda:1"):
            assert asked() == (True, True)
            1 / 0  # noqa: B018
        assert asked() == before
        with in_fixed_order("cpu"):
            assert asked() == before
    finally:
        torch.use_deterministic_algorithms(usual[0], warn_only=usual[1])
