"""The parity gate: arms that did other work than the reference are not compared."""

import math

LOSS = {"float32": 1e-5, "bfloat16": 1e-3}
"""How far the loss of the first step may be off, relative, by the dtype of the arithmetic."""
COSINE = 0.999
"""The least cosine of the gradient of all adapter parameters with the reference's."""
FINAL = 5e-3
"""How far the loss of the trained adapter on held-out rows may be off, relative."""


def faults(run, reference, computes):
    """What is wrong with a run beside the reference's; nothing where it did the same work.

    Args:
        run: figures of a run, with "cosine" and "final_loss".
        reference: the same of the reference.
        computes: the dtype of the run's arithmetic.
    """
    found = []
    if run["supervised"] != reference["supervised"]:
        found.append(f"supervised tokens a step are {run['supervised']}, not {reference['supervised']}")
    for name, ours, theirs, most in (
        ("the loss of the first step", run["losses"][0], reference["losses"][0], LOSS[computes]),
        ("the final loss", run["final_loss"], reference["final_loss"], FINAL),
    ):
        off = abs(ours - theirs) / abs(theirs)
        if not off <= most:  # not a number is no small difference
            found.append(f"{name} is {ours:.6f}, not {theirs:.6f}: {off:.1e} off, {most:.0e} is allowed")
    if not run["cosine"] > COSINE:
        found.append(f"the cosine of the first gradient with the reference's is {run['cosine']:.5f}")
    return found


def cosine(ours, theirs):
    """The cosine between the gradients in two files, all tensors as one vector; TypeError if they differ in names."""
    from safetensors.torch import load_file

    first, second = load_file(ours), load_file(theirs)
    if set(first) != set(second):
        raise TypeError(f"other parameters are trained: {sorted(set(first) ^ set(second))[:2]}")
    products = [
        (float(a.double() @ b.double()), float(a.double() @ a.double()), float(b.double() @ b.double()))
        for a, b in ((first[name].flatten(), second[name].flatten()) for name in first)
    ]
    both, one, other = map(sum, zip(*products, strict=True))
    return both / math.sqrt(one * other)
