"""Attaching and loading an adapter method as a run does: whatever it trains is float32, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import masters
from tunekit.core.model.dequantize import empty
from tunekit.errors import ConfigError, TunekitError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

WORDS = {"bfloat16": "bfloat16", "float16": "half"}
"""What torch calls a dtype in its errors, in small letters."""
MANY = 10**6
"""Steps enough for any schedule, where none are planned since a finished run is opened: AdaLoRA needs some."""


def attach(method: AdapterMethod, base: PreTrainedModel, context: Context) -> nn.Module:
    """`base` with `method` attached; all that is trained is float32, and seen in the base's dtype where that is."""
    model = method.attach(base, context)
    masters.train_in_float32(model)
    return model


def load(method: AdapterMethod, base: PreTrainedModel, directory: Path, context: Context) -> nn.Module:
    """`base` with what `method` saved in `directory`; weights of the base that were trained are float32, as they were.

    Read into a weight of fewer bits they would be rounded. Which they are, a model without weights tells.
    """
    widened = {}
    if any(parameter.is_floating_point() and parameter.dtype.itemsize < 4 for parameter in base.parameters()):
        bare = empty(base)
        names = {id(parameter): name for name, parameter in bare.named_parameters()}
        planned = attrs.evolve(context, total_steps=context.total_steps or MANY)
        trained = [parameter for parameter in method.attach(bare, planned).parameters() if parameter.requires_grad]
        here = dict(base.named_parameters())
        widened = masters.widen(here[names[id(parameter)]] for parameter in trained if id(parameter) in names)
    model = method.load(base, directory)
    masters.see_rounded(model, widened)
    return model


@contextmanager
def explained(method: AdapterMethod, context: Context) -> Iterator[None]:
    """Within it, torch's complaint of two dtypes becomes one of the method that brought them together."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TunekitError) or WORDS.get(context.dtype, "\0") not in str(error).lower():
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{method.name} does not compute over a base in {context.dtype} ({reason}): it must return activations in "
            "the dtype of those that it is given; until it does, set dtype='float32'",
            "Pipeline.adapter",
        ) from error
