"""Counting what is alive, against sums by hand."""

import torch

from tunekit.core.memory.live_bytes import LiveBytes

KIB = 256  # float32 numbers


def test_the_peak_is_what_was_alive_at_once_by_part():
    held = torch.zeros(4 * KIB)
    live = LiveBytes("work")
    live.hold([held, held.view(2, -1)], "held")
    with live:
        a = torch.zeros(KIB)
        with live.making("other"):
            b = a + 1
        a.add_(1)
        del a
        c = torch.zeros(KIB)
    assert live.live == {"held": 4096, "work": 1024, "other": 1024}
    assert live.at_peak == {"held": 4096, "work": 1024, "other": 1024}
    assert live.peak == 6 * 1024
    del b, c
    assert live.live.total() == 4096


def test_what_the_graph_keeps_is_alive_until_the_backward_pass():
    weight = torch.zeros(KIB, requires_grad=True)
    live = LiveBytes("kept")
    with live:
        loss = weight.exp().sum()
        assert live.live["kept"] == 1024 + 4, "exp keeps its result"
        loss.backward()
        assert live.live["kept"] == 1024 + 4, "that is gone, and the gradient is there"
        live.hold([weight.grad], "gradients")
    assert live.live == {"kept": 4, "gradients": 1024}


def test_a_tensor_on_the_meta_device_counts_like_any_other():
    live = LiveBytes("work")
    with live:
        kept = torch.empty(KIB, device="meta")
    assert live.live["work"] == 1024
    del kept
