"""The models of a finished run, loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.interfaces import AdapterMethod, Quantizer
from tunekit.core.model import attaching
from tunekit.core.model.base import Base, Loaded, load_base
from tunekit.core.model.plain import plain, where
from tunekit.core.run import adapter_files, files


@attrs.frozen(kw_only=True)
class Reopening:
    """What it takes to load the models of a run again.

    Args:
        directory: the run directory.
        base: where the base is.
        adapter: the method that was trained.
        quantizer: how the base was stored; None for a plain one.
        template: the pipeline's own; None for the model's.
        context: the facts of the run, from its codec.
    """

    directory: Path
    base: Base
    adapter: AdapterMethod
    quantizer: Quantizer | None
    template: str | None
    context: Callable[[Codec], Context]

    def load(self, tuned: bool) -> Loaded:
        """The tuned model, or its base, fresh from disk and in the dtype of the run."""
        codec, context = self._facts()
        found = self._load_base(codec, context)
        at = self.directory / files.ADAPTER
        model = attaching.load(self.adapter, found.model, at, found.context) if tuned else found.model
        return attrs.evolve(found, model=model.eval())

    def load_plain(self, dtype: str | None) -> Loaded:
        """The tuned model over the very base of the run, dequantized and in float32, to be merged into `dtype`.

        It is on the CPU where the device of the run has no room for it.
        """
        codec, context = self._facts()
        bare = self.base.empty(added_ids=context.added_ids)
        device = where(sum(parameter.numel() for parameter in bare.parameters()), context.device)
        # A quantized base is packed where it was trained: elsewhere, its numbers may be others.
        found = self._load_base(codec, context if self.quantizer else attrs.evolve(context, device=device))
        base = plain(found.model, self.quantizer, device)
        context = attrs.evolve(context, quantization=None, dtype=dtype or context.dtype, device=device)
        model = attaching.load(self.adapter, base, self.directory / files.ADAPTER, context)
        return attrs.evolve(found, model=model.eval(), context=context)

    def _facts(self) -> tuple[Codec, Context]:
        """Of the run, its adapter being found whole, and of this base and template."""
        codec = self.base.codec(self.template)
        context = self.context(codec)
        adapter_files.check(self.directory / files.ADAPTER, self.adapter, self.base, codec)
        return codec, context

    def _load_base(self, codec: Codec, context: Context) -> Loaded:
        return Loaded(model=load_base(self.base, self.quantizer, codec, context), codec=codec, context=context)
