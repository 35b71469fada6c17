"""Rows as the model will see them: which tokens are learned, which are control tokens, and how many there are."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.data.batching import collate
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.interfaces import DataSource, Encoded, Trainer
from tunekit.core.model.base import Base, context_length
from tunekit.core.registry import default_registry
from tunekit.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text

Kind = Literal["given", "learned", "control", "learned control"]
STYLES: dict[Kind, str] = {
    "given": "",
    "learned": "bold green",
    "control": "dim",
    "learned control": "green reverse",
}
COLOURS: dict[Kind, str] = {
    "given": "",
    "learned": "background:#b7ebc6;color:#06270f",
    "control": "color:#8a6d00;font-weight:bold",
    "learned control": "background:#54c176;color:#06270f;font-weight:bold",
}


@attrs.frozen
class Stretch:
    """Consecutive tokens of one kind, as text.

    Args:
        text: what they decode to. Characters that do not print are written as escapes, but for line breaks; text that
            looks like a control token and is none has a backslash before it.
        kind: whether they are learned, and whether they are control tokens.
    """

    text: str
    kind: Kind


@attrs.frozen
class PreviewedRow:
    """One row as the model will see it.

    Args:
        stretches: its tokens as text, padding left out.
        tokens: how many there are.
        learned: how many of them carry loss.
        padding: tokens that fill it up to the longest row beside it.
        too_long: the longest that the trainer or the model takes, where the row is longer; None where it is not.
    """

    stretches: Sequence[Stretch]
    tokens: int
    learned: int
    padding: int
    too_long: int | None

    @property
    def heading(self) -> str:
        """The counts as a line."""
        line = f"{self.tokens} tokens, {self.learned} learned, {self.padding} of padding"
        return line + (f"; longer than the {self.too_long} that fit" if self.too_long else "")


@attrs.frozen
class Preview:
    """What `tunekit.preview` returns: prints as plain text, shows itself in a notebook, and writes HTML.

    Args:
        rows: the rows, in order.
    """

    rows: Sequence[PreviewedRow]

    def __str__(self) -> str:
        """Plain text: what is learned stands between `{+` and `+}`."""
        parts = []
        for number, row in enumerate(self.rows, start=1):
            text = ""
            for learned, some in groupby(row.stretches, key=lambda stretch: "learned" in stretch.kind):
                joined = "".join(stretch.text for stretch in some)
                text += f"{{+{joined}+}}" if learned else joined
            parts.append(f"row {number}: {row.heading}\n{text.rstrip(chr(10))}\n")
        return "\n".join(parts)

    def show(self) -> None:
        """Print it: in colour where standard output is a terminal, else as plain text."""
        if not sys.stdout.isatty():
            print(self)
            return
        from rich.console import Console

        Console().print(self.__rich__())

    def __rich__(self) -> Text:
        """For rich: as text with styles, so that nothing in the data is read as markup."""
        from rich.text import Text

        text = Text()
        for number, row in enumerate(self.rows, start=1):
            text.append(f"row {number}: {row.heading}\n", "bold")
            for stretch in row.stretches:
                text.append(stretch.text, STYLES[stretch.kind])
            text.append("\n\n")
        return text

    def html(self) -> str:
        """An HTML fragment without scripts or links; everything from the data is escaped."""
        parts = []
        for number, row in enumerate(self.rows, start=1):
            spans = "".join(
                f'<span title="{stretch.kind}" style="{COLOURS[stretch.kind]}">{html.escape(stretch.text)}</span>'
                for stretch in row.stretches
            )
            parts.append(
                f"<p><b>row {number}</b>: {row.heading}</p>"
                f'<pre style="white-space:pre-wrap;border:1px solid #8888;padding:.5em">{spans}</pre>'
            )
        return f"<div>{''.join(parts)}</div>"

    def _repr_html_(self) -> str:
        return self.html()

    def save(self, path: str | Path) -> Path:
        """Write it as an HTML page, and return the path."""
        path = Path(path)
        head = '<!doctype html><meta charset="utf-8"><title>tunekit preview</title>'
        path.write_text(f"{head}\n{self.html()}\n", encoding="utf-8")
        return path


def preview(
    source: DataSource,
    *,
    model: str,
    revision: str | None = None,
    template: str | None = None,
    trainer: Trainer | None = None,
    rows: int = 3,
    added_tokens: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> Preview:
    """The first rows of a source as the model will see them, by the encoding and the batching of a run.

    Args:
        source: where the rows come from.
        model: a Hub id, a local directory, or `tunekit.TINY`; its tokenizer is loaded, and none of its weights.
        revision: branch, tag or commit of a Hub model.
        template: a Jinja chat template; None takes the model's own, as in a pipeline.
        trainer: says what is learned (`SFT(train_on="last")`) and how long a row may be; None takes SFT as it is.
        rows: how many.
        added_tokens: those of the pipeline.
        trust_remote_code: whether code in the model's repository may run.

    Raises:
        DataError: there are no rows, or one cannot be used.
        ConfigError: the model or the template cannot be used.
    """
    base = Base(model=model, revision=revision, trust_remote_code=trust_remote_code, added_tokens=tuple(added_tokens))
    base.check()
    return first_rows(base, source, template, trainer or default_registry().find("trainer", "sft")(), rows)


def first_rows(base: Base, source: DataSource, template: str | None, trainer: Any, rows: int) -> Preview:
    """What `preview` returns, for a base model and a trainer; see there."""
    codec = base.codec(template)
    bounds = [bound for bound in (trainer.max_length, context_length(base.config())) if bound is not None]
    encoded = []
    for number, row in enumerate(codec.ahead(islice(source.load("train"), rows)), start=1):
        try:
            encoded.append(trainer.encode(row, codec))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
    if not encoded:
        raise DataError("the data has no rows")
    return Preview(of_encoded(encoded, codec, min(bounds, default=None)))


def of_encoded(
    encoded: Sequence[Encoded], codec: Codec, limit: int | None = None, tokens: int | None = None
) -> list[PreviewedRow]:
    """From what the model is given, the padded batch, back to text.

    Args:
        encoded: the rows.
        codec: by which they were encoded.
        limit: the longest row that the trainer and the model take, in tokens; None where nothing bounds it.
        tokens: so many are shown of each row, the first, and what is left out is counted; None for all.
    """
    batch = {name: tensor.tolist() for name, tensor in collate(encoded, pad_id(codec.tokenizer)).items()}
    made = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        count = sum(mask)
        shown = count if tokens is None else tokens
        made.append(
            PreviewedRow(
                stretches=_stretches(ids[: min(count, shown)], labels[:count], codec) + _rest(count - shown),
                tokens=count,
                learned=sum(label != IGNORED for label in labels),
                padding=len(ids) - count,
                too_long=limit if limit is not None and count > limit else None,
            )
        )
    return made


def _stretches(ids: Sequence[int], labels: Sequence[int], codec: Codec) -> list[Stretch]:
    def kind(at: int) -> Kind:
        learned, control = labels[at] != IGNORED, ids[at] in codec.control_ids
        if learned:
            return "learned control" if control else "learned"
        return "control" if control else "given"

    names = sorted(codec.tokenizer.convert_ids_to_tokens(sorted(codec.control_ids)), key=len, reverse=True)
    lookalike = re.compile("|".join(map(re.escape, names)))
    made, before = [], ""
    for of, group in groupby(range(len(ids)), key=kind):
        # Decoded with all that stands before: some tokenizers leave a blank out at the beginning of a text.
        last = list(group)[-1]
        whole = str(codec.tokenizer.decode(ids[: last + 1], clean_up_tokenization_spaces=False))
        text = _visible(whole[len(before) :])
        made.append(Stretch(text if "control" in of else lookalike.sub(r"\\\g<0>", text), of))
        before = whole
    return made


def _rest(tokens: int) -> list[Stretch]:
    return [Stretch(f" ... and {tokens:,} tokens more", "given")] if tokens > 0 else []


def _visible(text: str) -> str:
    """`text` with characters that do not print as escapes: a row must not move the cursor of the reader's terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
