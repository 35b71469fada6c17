"""The fastest matrix product of this machine, on the shapes of the model: what the speed of a step is held against."""

import time

REPEATS = 3
HEAD_ROWS = 256
"""Tokens in a product with the head, which is large."""


def gemm_rates(workload, tokens, dtype):
    """Operations a second of each product of the model, (tokens, in) by (in, out); the best of a few tries."""
    import torch

    size = workload.size
    head = (size["hidden_size"], size["vocabulary"], min(tokens, HEAD_ROWS))
    shapes = sorted({(n, m, tokens) for n, m in workload.matrices} | {head})
    rates = {}
    for inner, outer, rows in shapes:
        left = torch.randn(rows, inner).to(getattr(torch, dtype))
        right = torch.randn(outer, inner).to(getattr(torch, dtype))
        seconds = []
        for _ in range(REPEATS + 1):  # the first lays out memory
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            seconds.append(time.perf_counter() - began)
        rates[f"{rows}x{inner}x{outer}"] = 2 * rows * inner * outer / min(seconds)
    return rates
