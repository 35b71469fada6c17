"""The loss of some rows, by the quickest of several ways to the same number that is right for the model.

The plainest pads the rows and makes logits of every token. The quicker ones lay the rows end to end without padding,
make logits only where there is a label, a few tokens at a time, compute once what rows begin with alike, and have lean
forwards for adapters. Whether a model can be trained so is not looked up in a list: it is tried on rows of the user's
own, or on excerpts of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.data.batching import lengths, on_device, shortest_and_longest
from tunekit.core.evaluation.predicting import drops, evaluating, trying
from tunekit.core.interfaces import Encoded
from tunekit.core.lean.forwards import can_be_lean, lean_forwards, usual_forwards
from tunekit.core.lean.trial import fault
from tunekit.core.model.masters import computing_dtype, rounded
from tunekit.core.training import compiled
from tunekit.core.training.accuracy import as_accurate
from tunekit.core.training.batch import Batch, end_to_end, padded
from tunekit.core.training.excerpts import beginning_alike, excerpt, excerpts
from tunekit.core.training.frozen import FrozenLayers
from tunekit.core.training.leaks import leak, not_as_alone, parted
from tunekit.core.training.padding import told, unwatched
from tunekit.core.training.prefixes import LEAST, Layout
from tunekit.core.training.segments import ATTENTION, attending
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = {"float32": 1e-5}
"""Relative difference of two ways to a loss that is rounding alone; of bfloat16 and float16, which round more, 1e-2."""
WAYS = {"padding_free": "rows without padding", "chunked": "logits in chunks"}
WAYS |= {"lean": "lean forwards", "compiled": "compiled layers", "shared": "shared prefixes"}
"""The fields that say which way it is; and what each is in words."""
SETTLED = (*WAYS, "apart")  # what of a way is part of a checkpoint


@attrs.define(kw_only=True, eq=False)
class RowsLoss:
    """How the loss of rows is computed: calling it gives the cross-entropy summed over their supervised tokens.

    Args:
        model: the module to train, without the wrappers of a parallel run.
        pad_id: fills shorter rows where rows are padded.
        device: where tensors are made.
        padding_free: rows are laid end to end; within `training()` only.
        apart: each row goes through the model by itself: it would be another one beside others.
        chunked: logits are made where there is a label, a chunk at a time.
        lean: layers of PEFT's have lean forwards; within `training()` only.
        compiled: the layers of the model are compiled; within `training()` only.
        shared: where rows laid end to end begin alike and it pays, that is computed once.
        frozen: layers below what is trained, which are computed once a row; None to compute them each time.
        kept_bytes: what dequantized weights may take where layers are lean; None for a share of what is free.
        notes: why a quicker way was not taken.
    """

    model: nn.Module
    pad_id: int
    device: str
    padding_free: bool = False
    apart: bool = False
    chunked: bool = False
    lean: bool = False
    compiled: bool = False
    shared: bool = False
    frozen: FrozenLayers | None = None
    kept_bytes: int | None = None
    notes: Sequence[str] = ()
    _usual: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._usual = getattr(self.model.config, "_attn_implementation", "")

    def __call__(self, model: nn.Module, rows: Sequence[Encoded]) -> Tensor:
        """The summed loss of `rows`, a float32 scalar with a graph; `model` is the module, or what wraps it."""
        if self.apart:
            return sum((self.of(model, self.batch([row])) for row in rows[1:]), self.of(model, self.batch(rows[:1])))
        return self.of(model, self.batch(rows))

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """`rows` as `of` takes them; a thread may make it beside whatever the model does meanwhile."""
        if not self.padding_free:
            return padded(rows, self.pad_id, self.device)
        return end_to_end(rows, self.device, self.shared, computing_dtype(self.model))

    def of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of the rows of `batch`."""
        from torch.nn.functional import cross_entropy

        inputs, places, wanted = batch.inputs, batch.places, batch.wanted
        starting = self.frozen.left_out(self._states(batch)) if self.frozen else nullcontext()
        telling = told(batch.padded)
        if not self.chunked:
            with starting, telling:
                logits = model(**inputs, use_cache=False).logits
            return cross_entropy(logits.flatten(0, 1)[places].float(), wanted, reduction="sum")

        from tunekit.core.training.head_loss import head_loss, without_head, without_softcap

        head = self.model.get_output_embeddings()
        with (
            starting,
            told(batch.padded),
            without_head(head) as plain,
            without_softcap(self.model.config, plain) as real,
        ):
            hidden = model(**inputs, use_cache=False).logits
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        with rounded(head, trained=True) as copies:
            seen = [copies.get(parameter, parameter) for parameter in trained]
            return head_loss(hidden.flatten(0, 1)[places], wanted, real, trained, self.model.config.vocab_size, seen)

    def _states(self, batch: Batch) -> Tensor:
        """What the frozen layers make of its inputs, shape (rows, tokens, features); of padding, zeros."""
        assert self.frozen
        shape = batch.inputs["input_ids"].shape
        found = self.frozen.states(batch.rows, lambda row: self.batch([row]).inputs, self.device)
        places = batch.places_of_tokens()
        if len(sources := {place: at for at, place in enumerate(places)}) < len(places):  # one prefix of several rows
            places, found = list(sources), found[on_device(list(sources.values()), self.device)]
        states = found.new_zeros(shape.numel(), found.shape[1])
        states[on_device(places, self.device)] = found
        return states.view(*shape, -1)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it, the model computes as this way to the loss needs."""
        attention = attending(self.model, ATTENTION, self.compiled) if self.padding_free else None
        with (
            attention or unwatched(self.model, self.device),
            lean_forwards(self.model, self.kept_bytes) if self.lean else nullcontext(),
            compiled.compiled(self.model) if self.compiled else nullcontext(),
        ):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, inside of `training()`, the model computes as it does otherwise: to evaluate it."""
        otherwise = getattr(self.model.config, "_attn_implementation", "") != self._usual
        with (
            attending(self.model, self._usual, self.compiled) if otherwise else nullcontext(),
            usual_forwards(self.model) if self.lean else nullcontext(),
            compiled.plain(self.model) if self.compiled else nullcontext(),
        ):
            yield


def choose(
    model: nn.Module,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    *,
    padding_free: bool,
    chunked: bool,
    lean: bool = False,
    compiling: bool = False,
    sharing: Sequence[Encoded] = (),
    kept_bytes: int | None = None,
) -> RowsLoss:
    """The quickest way that is right for `model`: each is tried against the plain one.

    Args:
        model: the module to train.
        rows: some of the user's rows, at best of several lengths.
        pad_id: the pad token.
        device: where the model is.
        padding_free: whether rows may be laid end to end.
        chunked: whether logits may be made a chunk at a time.
        lean: whether layers of PEFT's may have lean forwards.
        compiling: whether the layers may be compiled.
        sharing: rows of the user's that begin alike, for which it pays to compute that once; none for never.
        kept_bytes: what dequantized weights may take; None for a share of what is free.
    """
    import torch

    short = excerpts(rows, model.config)
    plainly = RowsLoss(model=model, pad_id=pad_id, device=device, kept_bytes=kept_bytes)
    with evaluating(model):
        if padding_free:
            reason = leak(attrs.evolve(plainly, padding_free=True), parted(shortest_and_longest(rows)))
            plainly = attrs.evolve(plainly, notes=[f"no {WAYS['padding_free']}: {reason}"] if reason else ())
            padding_free = not reason
        plain = float(plainly(model, short))
        chosen = _laid_out(plainly, short, plain, padding_free, chunked)
        if len(chosen.notes) > len(plainly.notes) and short is not rows:  # it may be rounding: whole rows settle it
            short, plain = rows, float(plainly(model, rows))
            chosen = _laid_out(plainly, rows, plain, padding_free, chunked)
        # What depends on lengths, or on padding, no gradient shows.
        if reason := not_as_alone(chosen, short):
            free, chosen = chosen.padding_free, attrs.evolve(chosen, padding_free=False)
            apart = not free or not_as_alone(chosen, short) is not None
            told = f"no rows {'together' if apart else 'without padding'}: {reason}"
            chosen = attrs.evolve(chosen, apart=apart, notes=[*chosen.notes, told])
            plain = float((plainly := attrs.evolve(plainly, apart=apart))(model, short))
        if sharing and chosen.padding_free:
            chosen = _sharing(chosen, sharing)
    if compiling:
        way = attrs.evolve(chosen, compiled=True)
        # As in training, with gradients: what is compiled for an evaluation would have to be compiled again.
        with evaluating(model), trying(model), torch.enable_grad():
            model.train()
            chosen = _tried(way, chosen, "compiled layers", short, plain)
    # Not both: the compiler takes out what PEFT's forwards waste, and would compile each lean forward by itself.
    if lean and not chosen.compiled and can_be_lean(model):
        with chosen.training():
            reason = fault(model, partial(chosen, model, short[:1]), kept_bytes)
            if reason and short is not rows:
                reason = fault(model, partial(chosen, model, rows[:1]), kept_bytes)
        notes = [*chosen.notes, f"no {WAYS['lean']}: {reason}"] if reason else chosen.notes
        chosen = attrs.evolve(chosen, lean=not reason, notes=notes)
    few = beginning_alike(sharing) if chosen.shared else [excerpt(row) for row in rows]
    return as_accurate(chosen, plainly, few, WAYS)


def over_frozen(way: RowsLoss, rows: Sequence[Encoded], directory: Path) -> RowsLoss:
    """`way` with the layers below what is trained computed once for each of `rows`, and kept in a file.

    Args:
        way: the way to the loss otherwise.
        rows: all that there are to train on.
        directory: where the file is made; it goes with the process.

    Raises:
        NotSupported: that cannot be done, or gives another loss.
    """
    some, tokens = shortest_and_longest(rows), sum(lengths(rows))
    with way.training():
        frozen = FrozenLayers.of(way.model, way.batch(some[:1]).inputs, tokens, directory)
        with evaluating(way.model):
            plain = float(way(way.model, some))
    found = attrs.evolve(way, frozen=frozen)
    with evaluating(way.model):
        if reason := _fault(found, some, plain):
            raise NotSupported(f"cache_frozen_layers: {reason}")
    size = frozen.kept.numel() * frozen.kept.element_size() / 2**20
    note = f"hidden states after {len(frozen.below)} frozen layers are kept, up to {size:,.1f} MiB in {directory}"
    return attrs.evolve(found, notes=[note])


def _laid_out(plainly: RowsLoss, rows: Sequence[Encoded], plain: float, padding_free: bool, chunked: bool) -> RowsLoss:
    """`plainly` without padding and with logits in chunks, as far as these are wanted and give the plain loss."""
    # Together first: where nothing is wrong, as mostly, that is one forward pass and not two.
    both = attrs.evolve(plainly, padding_free=padding_free, chunked=chunked)
    if padding_free and chunked and not _fault(both, rows, plain):
        return both
    found = plainly
    if chunked:
        found = _tried(attrs.evolve(found, chunked=True), found, "logits in chunks", rows, plain)
    if padding_free:
        found = _tried(attrs.evolve(found, padding_free=True), found, "rows without padding", rows, plain)
    return found


def _tried(way: RowsLoss, other: RowsLoss, name: str, rows: Sequence[Encoded], plain: float) -> RowsLoss:
    """`way` if it gives the plain loss, else `other` with a note of why not."""
    if reason := _fault(way, rows, plain):
        return attrs.evolve(other, notes=[*other.notes, f"no {name}: {reason}"])
    return way


def _sharing(chosen: RowsLoss, rows: Sequence[Encoded]) -> RowsLoss:
    """`chosen` with shared prefixes, if that gives the loss of `rows` without them."""
    if drops(chosen.model.modules()):
        return attrs.evolve(chosen, notes=[*chosen.notes, "no shared prefixes: rows would share their dropout, too"])
    with chosen.training():
        plain = float(chosen(chosen.model, rows))
    prefix = max(own for own, _, _ in Layout.of(rows, shared=True).begins)
    shared = attrs.evolve(chosen, shared=True)
    if reason := leak(shared, parted(rows[:2], prefix, before=LEAST)):
        return attrs.evolve(chosen, notes=[*chosen.notes, f"no {WAYS['shared']}: {reason}"])
    return _tried(shared, chosen, "shared prefixes", rows, plain)


def _fault(tried: RowsLoss, rows: Sequence[Encoded], plain: float) -> str | None:
    """Why this way is not right for its model; None if it is."""
    import torch

    try:
        with tried.training():
            loss = tried(tried.model, rows)
            if loss.requires_grad:  # nothing is done with the gradient; that it can be made is a part of the trial
                wanted = [parameter for parameter in tried.model.parameters() if parameter.requires_grad]
                torch.autograd.grad(loss, wanted, allow_unused=True)
            found = float(loss.detach())
    except Exception as error:  # whatever a model of somebody else's raises, there is the plain way
        return f"{type(error).__name__}: {error}"
    dtype = str(computing_dtype(tried.model)).removeprefix("torch.")
    if abs(found - plain) <= TOLERANCE.get(dtype, 1e-2) * abs(plain):
        return None
    return f"the loss is {found:.6g} so, and {plain:.6g} plainly"
