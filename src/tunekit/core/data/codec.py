"""From rows to tokens and back: where chat templates and the loss mask are understood.

Training, evaluation and generation all encode here, so what the model is asked in use is, token for token, what it was
trained on. The mask is found from the template itself: an assistant's turn is what the template adds between "rendered
up to here, and now it is the assistant's turn" and "rendered with the turn". No marks in the template, no search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tunekit.core.data import contract as contracts
from tunekit.core.data.template import Job, Template
from tunekit.core.data.tokens import Tokens
from tunekit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss."""

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] -}}"
    "{{- eos_token if message['role'] == 'assistant' -}}{{- '\\n\\n' -}}"
    "{%- endfor -%}"
    "{{- '### Assistant:\\n' if add_generation_prompt -}}"
)
"""Used where neither the user nor the model brings a chat template: "### User:" and "### Assistant:" headings."""

AHEAD = 64
"""Rows that are rendered at once."""

Message = Mapping[str, Any]
TrainOn = Literal["assistant", "last", "all"]


class Turn(NamedTuple):
    """Where an assistant's turn stands in a rendered conversation, or why it cannot be told from the rest."""

    message: int
    start: int
    end: int
    error: DataError | None


class Codec:
    """Encodes rows for one tokenizer and one chat template.

    Args:
        tokenizer: the model's tokenizer; it must have an end-of-sequence token.
        template: a Jinja chat template; None takes the tokenizer's own, else `PLAIN_TEMPLATE`.

    Raises:
        ConfigError: the tokenizer has no end token, so the model could never learn to stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, so the model could never learn to stop")
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        self.tokenizer = tokenizer
        self.template: str = template or own or PLAIN_TEMPLATE
        self._template = Template(self.template, tokenizer.special_tokens_map)
        self._tokens = Tokens(tokenizer)
        self._checked = False

    def encode(self, example: Mapping[str, Any], train_on: TrainOn = "assistant") -> dict[str, list[int]]:
        """Tokens and labels of one row, each of shape (time,).

        Args:
            example: `{"messages": [...]}` (optionally with "tools"), or `{"text": ...}`, which is supervised whole and
                gets an end token.
            train_on: "assistant": what the assistant says, each turn with its end token; "last": only the last turn;
                "all": every token. A message with `weight` 0 or `train` false is not trained on.

        Raises:
            DataError: the row has nothing to train on, or the template cannot be trained on with this row.
            ConfigError: the template takes too long, or the tokenizer joins its headings with answers.
        """
        if "text" in example:
            ids = self._tokens.whole_text(example["text"])
            return {"input_ids": ids, "labels": list(ids)}
        if "chosen" in example:
            raise DataError(
                "a preference between two answers, which this trainer does not learn from; to train on the chosen "
                "answers alone, give the source schema='prompt-completion', columns={'completion': 'chosen'}, or where "
                "they are whole conversations, schema='messages', columns={'messages': 'chosen'}"
            )
        self._check_template()
        messages, tools = example["messages"], example.get("tools")
        text, turns = self._rendered(messages, tools)
        ids, labels = [], []
        trained = _trained(messages, turns, train_on)
        for piece, turn in self._pieces(text, turns):
            learned = piece if train_on == "all" else [IGNORED] * len(piece)
            ids += piece
            labels += self._through_end_token(piece) if turn in trained else learned
        if (train_on == "all" or turns[-1].message in trained) and not self._tokens.special_ids & set(labels):
            # The template marks no end: without one the model would never stop.
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        whole = self._tokens.with_bos(ids)
        begin = whole[: len(whole) - len(labels)]
        return {"input_ids": whole, "labels": (begin if train_on == "all" else [IGNORED] * len(begin)) + labels}

    def ahead(self, examples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The same rows in the same order, about to be encoded: they are rendered many at a time, which is faster."""
        rest = iter(examples)
        while some := list(islice(rest, AHEAD)):
            talks = [row for row in some if "messages" in row]
            self._template.render_ahead(self._jobs(row["messages"], row.get("tools"), False) for row in talks)
            yield from some

    def prompt(self, messages: Sequence[Message] | str, tools: Any = None) -> list[int]:
        """Tokens of a conversation up to where the assistant begins to speak; a string is one user message.

        Exactly the tokens that stand before that answer in a training row: earlier answers are cut off there, too.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text, turns = self._rendered(messages, tools, begin_answer=True)
        return self._tokens.with_bos([token for piece, _ in self._pieces(text, turns) for token in piece])

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end token, and what the template puts after a turn."""
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            labels = self.encode({"messages": probe})["labels"]
        except DataError:  # of a template that wants more than a question and an answer
            return (self.tokenizer.eos_token_id,)
        last = next(label for label in reversed(labels) if label != IGNORED)
        return tuple(dict.fromkeys((self.tokenizer.eos_token_id, last)))

    @property
    def control_ids(self) -> frozenset[int]:
        """The tokens that steer the model (ends, beginnings, roles), which no text becomes."""
        return self._tokens.special_ids

    def contract(self) -> dict[str, Any]:
        """What training and use must have in common, in JSON values: to be saved with an adapter, and checked later.

        `template_sha256` (of the template's text), `prompt` (a fixed conversation rendered up to the answer) and
        `prompt_ids` (its tokens); the last two are None for a template that refuses that conversation.
        """
        for messages in (contracts.GOLDEN, contracts.GOLDEN[-1:]):
            text = self._template.render(messages, None, [(len(messages), True)])[0]
            if isinstance(text, str):  # else it is for single questions, or for conversations that begin otherwise
                return contracts.contract(self.template, text, self.prompt(messages))
        return contracts.contract(self.template, None, None)

    def check_contract(self, saved: Mapping[str, Any]) -> None:
        """Raise ConfigError, naming what differs, unless prompts are encoded as where `saved`, a contract, was made."""
        contracts.check(saved, self.contract())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _jobs(self, messages: Sequence[Message], tools: Any, begin_answer: bool) -> tuple[Any, Any, list[Job]]:
        """What to render: the conversation, and for each answer what stands before it and what ends with it."""
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        jobs = [(len(messages), begin_answer), *(job for at in answers for job in ((at, True), (at + 1, False)))]
        return self._tokens.neutral(messages), self._tokens.neutral(tools), jobs

    def _rendered(self, messages: Sequence[Message], tools: Any, begin_answer: bool = False) -> tuple[str, list[Turn]]:
        """The text of a conversation, and where the assistant's turns stand in it.

        A turn is what the template adds between "rendered up to here, and now it is the assistant's turn" and "rendered
        with the turn". DataError if the template refuses the conversation.
        """
        messages, tools, jobs = self._jobs(messages, tools, begin_answer)
        full, *parts = self._template.render(messages, tools, jobs)
        places = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if isinstance(full, DataError):
            raise full
        pairs = zip(places, parts[::2], parts[1::2], strict=True)
        return full, [self._turn(messages, tools, at, full, *pair) for at, *pair in pairs]

    def _turn(
        self,
        messages: Sequence[Message],
        tools: Any,
        at: int,
        full: str,
        before: str | DataError,
        through: str | DataError,
    ) -> Turn:
        if isinstance(before, DataError):
            return Turn(at, 0, 0, before)
        if isinstance(through, DataError):
            return Turn(at, 0, 0, through)
        return Turn(at, len(before), len(through), self._fault(messages, tools, at, full, before, through))

    def _fault(
        self, messages: Sequence[Message], tools: Any, at: int, full: str, before: str, through: str
    ) -> DataError | None:
        """Why a turn cannot be trained on as it is rendered; None if it can."""
        if not through.startswith(before):
            return DataError(
                "the chat template begins an answer differently in use than in training, so the model would be "
                f"asked what it never saw: in use {before[-40:]!r}, in training "
                f"{through[max(0, len(before) - 40) : len(before) + 20]!r}; give the pipeline another template"
            )
        if not full.startswith(through):
            return DataError(
                "the chat template rewrites an earlier turn when later ones follow, so it cannot be trained as it "
                "was said; train on the last turn only (train_on='last')"
            )
        content = str(messages[at].get("content") or "").strip()
        if through[len(before) :].lstrip().startswith(content):
            return None
        if before == self._template.render(messages, tools, [(at, False)])[0]:
            return DataError(
                "the chat template ignores add_generation_prompt, so the heading of the answer would be trained "
                "as if the model had said it; give the pipeline a template that honours it"
            )
        return None

    def _pieces(self, text: str, turns: Sequence[Turn]) -> Iterator[tuple[list[int], int | None]]:
        """Tokens of `text` turn by turn, each with the number of its message, or None between the assistant's turns.

        Turns that the template has rewritten are not told from what surrounds them, in training and in use alike.
        """
        cuts, numbers = [0], []
        for turn in turns:
            if turn.error is None and turn.start >= cuts[-1]:
                cuts += [turn.start, turn.end]
                numbers += [None, turn.message]
        pieces = self._tokens.pieces(text, [*cuts, len(text)])
        return zip(pieces, [*numbers, None], strict=True)

    def _through_end_token(self, answer: Sequence[int]) -> list[int]:
        """Labels of a rendered answer: all of it up to its last special token; a line break after it is layout."""
        ends = [at for at, token in enumerate(answer) if token in self._tokens.special_ids]
        supervised = ends[-1] + 1 if ends else len(answer)
        return [*answer[:supervised], *[IGNORED] * (len(answer) - supervised)]

    def _check_template(self) -> None:
        """Raise ConfigError if the tokenizer joins the template's heading of an answer with the answer itself.

        The model would be asked with other tokens than it was trained with by whoever tokenizes a conversation whole.
        Checked once, with answers that begin as most do. One that begins with white space may still be joined: it is
        cut, in training and in use.
        """
        if self._checked:
            return
        self._checked = True
        for answer in ("Yes.", "7", "a b"):
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}] * 2
            for probe in (messages, messages[:2]):
                try:
                    text, turns = self._rendered(probe, None)
                except DataError:  # of a template that wants other turns; rows will tell
                    continue
                self._check_borders(text, [turn for turn in turns if turn.error is None])
                break

    def _check_borders(self, text: str, turns: Sequence[Turn]) -> None:
        for turn in turns:
            prompt, whole = self._tokens.ids(text[: turn.start]), self._tokens.ids(text[: turn.end])
            if whole[: len(prompt)] != prompt:
                at = next(at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
                asked, trained = (self.tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (prompt, whole))
                raise ConfigError(
                    "the tokenizer joins the end of the chat template's heading with the beginning of the answer: "
                    f"after {text[max(0, turn.start - 30) : turn.start]!r} an answer {text[turn.start :][:10]!r} "
                    f"follows, and in use the prompt ends in the tokens {asked}, where the whole conversation has "
                    f"{trained}; let the heading end before its last white space",
                    "Pipeline.template",
                )
        if [token for piece, _ in self._pieces(text, turns) for token in piece] != self._tokens.ids(text):
            self._tokens.use_anchors = False  # a tokenizer that does not cut text at control tokens first


def _trained(messages: Sequence[Message], turns: Sequence[Turn], train_on: TrainOn) -> set[int]:
    """The numbers of the messages to train on; DataError if there is none, or one that cannot be trained on."""
    if train_on == "all":
        return set()
    chosen = [
        turn
        for turn in (turns[-1:] if train_on == "last" else turns)
        if messages[turn.message].get("weight", 1) != 0 and messages[turn.message].get("train", True) is not False
    ]
    if not chosen:
        raise DataError("no assistant turn to train on (messages)")
    for turn in chosen:
        if turn.error:
            raise turn.error
    return {turn.message for turn in chosen}
