"""Reading every row of a source once, as a run would: what is wrong with it, how long it is, what a run takes of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, islice

from tunekit.core.data.batching import lengths, supervised_tokens, windows
from tunekit.core.data.codec import Codec
from tunekit.core.data.rows import rank, reason
from tunekit.core.inspection.corrected import chain
from tunekit.core.inspection.data_figures import Tally
from tunekit.core.inspection.findings import Finding, from_error
from tunekit.core.inspection.row_hashes import take_apart
from tunekit.core.inspection.row_rules import warnings_of
from tunekit.core.interfaces import DataSource, Encoded, Example, Trainer
from tunekit.errors import DataError, LeftOut

AT_ONCE = 64
"""So many rows are in memory at a time: many together are checked faster than one by one."""

_FATE = {
    "error": "a run stops there",
    "drop": "a run drops it",
    "truncate": "a run cuts it",
    "split": "a run splits it",
}


class Examination:
    """Reads splits; what it finds is in `findings`, in the order of the rows.

    Args:
        trainer: encodes rows, and says how long they may be.
        codec: of the model; None leaves tokens alone.
        context: tokens of the model's context that rows may take; None where it is unknown.
        seed: by which a share of the training rows is held out; None where none is.
    """

    def __init__(self, trainer: Trainer, codec: Codec | None, context: int | None, seed: int | None) -> None:
        self.codec, self.context = codec, context
        self.findings: list[Finding] = []
        self.over_length = 0
        self.longest = 0
        bounds = [bound for bound in (trainer.max_length, context) if bound is not None]
        self.limit = min(bounds, default=None) if codec else None
        self._trainer, self._seed = trainer, seed
        # Tokenizers may have any text for a control token; a blank one would be found in every row.
        self._special = [token for token in codec.tokenizer.all_special_tokens if token.strip()] if codec else []

    def read(self, source: DataSource, split: str, name: str) -> Tally:
        """Read a split of `source` whole; `name` is what the run calls it ("train", "validation")."""
        tally = Tally(name)
        stops = source.on_error == "stop"
        rows = source.examine(split)
        while some := list(islice(rows, AT_ONCE)):
            tally.first_place = tally.first_place or some[0][0]
            sound: list[tuple[str, Example]] = []
            for place, row in some:
                if not isinstance(row, DataError):
                    sound.append((place, row))
                elif isinstance(row, LeftOut):
                    tally.rows += 1
                    tally.left_out[reason(row, place)] += 1
                else:
                    found = from_error(row, place, name, stops=stops)
                    tally.rows += found.place[-1:].isdigit()  # else it is about a whole file
                    self.findings.append(found)
            tally.rows += len(sound)
            self._take(sound, tally)
        return tally

    def _take(self, placed: Sequence[tuple[str, Example]], tally: Tally) -> None:
        parts = [take_apart(row) for _, row in placed]
        tally.checksum = chain(tally.checksum, parts)
        if self.codec is None:
            for some in parts:
                length = len(some.prompt) + len(some.answer)
                tally.add_lengths(length, 0, length, 0, pieces=1)
        else:
            ahead = self.codec.ahead([row for _, row in placed])
            usable = [self._measure(place, next(ahead), tally) for place, _ in placed]
            placed, parts = list(compress(placed, usable)), list(compress(parts, usable))
        if not placed:
            return
        rows = [row for _, row in placed]
        tally.add([place for place, _ in placed], parts)
        if self._seed is not None and tally.split == "train":
            tally.ranks.extend([rank(row, self._seed) for row in rows])
        for at, warned, field in warnings_of(rows, parts, self._special):
            self.findings.append(Finding(placed[at][0], warned, field, split=tally.split))

    def _measure(self, place: str, row: Example, tally: Tally) -> bool:
        """Count the tokens of a row; False, with the error found, if a run could not take it."""
        assert self.codec is not None
        try:
            encoded = self._trainer.encode(row, self.codec)
            supervised = supervised_tokens(encoded)
            if not supervised:
                raise DataError("no token of it carries loss, so nothing can be learned from it")
        except DataError as error:
            self.findings.append(from_error(error, place, tally.split, stops=True))
            return False
        length = len(encoded["input_ids"])
        self.longest = max(self.longest, length)
        taken = [encoded]
        if self.limit is not None and length > self.limit:
            self.over_length += 1
            taken = self._shortened(place, row, encoded, tally.split)
        tally.add_lengths(
            length, supervised, sum(lengths(taken)), sum(map(supervised_tokens, taken)), pieces=len(taken)
        )
        return True

    def _shortened(self, place: str, row: Example, encoded: Encoded, split: str) -> list[Encoded]:
        """What a run makes of a row that is too long; and the finding that says so."""
        assert self.codec is not None
        assert self.limit is not None
        fate, stops = _FATE[self._trainer.on_long], self._trainer.on_long == "error"
        taken: list[Encoded] = []
        if self._trainer.on_long == "truncate":
            cut = {name: values[: self.limit] for name, values in encoded.items()}
            taken = [cut] if supervised_tokens(cut) else []
            fate = fate if taken else "a run drops it, since nothing before the cut can be learned"
        elif self._trainer.on_long == "split":
            try:
                if "text" not in row:
                    raise DataError("a run stops there, since only plain texts can be split")
                taken = windows(encoded, self.limit, self.codec.tokenizer.bos_token_id)
            except DataError as error:
                fate, stops = str(error), True
        found = Finding(
            place,
            f"{len(encoded['input_ids']):,} tokens, more than the {self.limit:,} that are taken; {fate}",
            severity="error" if stops else "warning",
            group=f"longer than {self.limit:,} tokens; {fate}",
            split=split,
            left_out=not taken,
        )
        self.findings.append(found)
        return taken
