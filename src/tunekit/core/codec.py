"""From rows to tokens and back: the only file that knows chat templates and the loss mask.

Training, evaluation and generation all encode here, so what the model is asked in use is, token for token, what it was
trained on. The mask is found from the template itself: an assistant's turn is what the template adds between "rendered
up to here, and now it is the assistant's turn" and "rendered with the turn". No marks in the template, no search.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tunekit.core import contract as contracts
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

Message = Mapping[str, Any]
TrainOn = Literal["assistant", "last", "all"]


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

    def encode(self, example: Mapping[str, Any], train_on: TrainOn = "assistant") -> dict[str, list[int]]:
        """Tokens and labels of one row, each of shape (time,).

        Args:
            example: `{"messages": [...]}` (optionally with "tools"), or `{"text": ...}`, which is supervised whole and
                gets an end token.
            train_on: "assistant": what the assistant says, each turn with its end token; "last": only the last turn;
                "all": every token. A message with `weight` 0 or `train` false is not trained on.

        Raises:
            DataError: the row has nothing to train on, or the template cannot be trained on with this row.
        """
        if "text" in example:
            ids = self._text_ids(example["text"])
            return {"input_ids": ids, "labels": list(ids)}
        messages, tools = example["messages"], example.get("tools")
        if train_on == "all":
            ids = self._with_bos(self._ids(self._render(self._neutral(messages), tools)))
            if not self._special_ids & set(ids):
                ids = [*ids, self.tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": list(ids)}
        return self._encode_turns(messages, tools, last_only=train_on == "last")

    def prompt(self, messages: Sequence[Message] | str, tools: Any = None) -> list[int]:
        """Tokens of a conversation up to where the assistant begins to speak; a string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._with_bos(self._ids(self._render(self._neutral(messages), tools, begin_answer=True)))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end token, and what the template puts after a turn."""
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        labels = self.encode({"messages": probe})["labels"]
        last = next(label for label in reversed(labels) if label != IGNORED)
        return tuple(dict.fromkeys((self.tokenizer.eos_token_id, last)))

    def contract(self) -> dict[str, Any]:
        """What training and use must have in common, in JSON values: to be saved with an adapter, and checked later.

        `template_sha256` (of the template's text), `prompt` (a fixed conversation rendered up to the answer) and
        `prompt_ids` (its tokens); the last two are None for a template that refuses that conversation.
        """
        for messages in (contracts.GOLDEN, contracts.GOLDEN[-1:]):
            try:
                text = self._render(messages, None, begin_answer=True)
            except DataError:  # of a template for single questions, or for conversations that begin otherwise
                continue
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

    def _encode_turns(self, messages: Sequence[Message], tools: Any, last_only: bool) -> dict[str, list[int]]:
        messages = self._neutral(messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        trained = [i for i in (turns[-1:] if last_only else turns) if _is_trained(messages[i])]
        if not trained:
            raise DataError("no assistant turn to train on (messages)")
        full = self._render(messages, tools)
        ids: list[int] = []
        labels: list[int] = []
        done = 0
        for start, end in self._spans(messages, tools, trained, full):
            # Before the answer: exactly what `prompt` gives, so training and use agree token for token.
            before = self._continue(ids, full[:done], full[done:start])
            ids, labels = ids + before, labels + [IGNORED] * len(before)
            answer = self._continue(ids, full[:start], full[start:end])
            supervised = self._through_end_token(answer)
            ids, labels = ids + answer, labels + supervised
            done = end
        rest = self._continue(ids, full[:done], full[done:])
        ids, labels = ids + rest, labels + [IGNORED] * len(rest)
        if not self._special_ids & set(labels):
            # The template marks no end: without one the model would never stop.
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        whole = self._with_bos(ids)
        return {"input_ids": whole, "labels": [IGNORED] * (len(whole) - len(labels)) + labels}

    def _spans(
        self, messages: Sequence[Message], tools: Any, turns: Sequence[int], full: str
    ) -> Iterator[tuple[int, int]]:
        """Where in `full` each turn stands: from where generation would begin to the end of the rendered turn."""
        for turn in turns:
            before = self._render(messages[:turn], tools, begin_answer=True)
            through = self._render(messages[: turn + 1], tools) if turn + 1 < len(messages) else full
            if not through.startswith(before):
                raise DataError(
                    "the chat template begins an answer differently in use than in training, so the model would be "
                    f"asked what it never saw: in use {before[-40:]!r}, in training "
                    f"{through[max(0, len(before) - 40) : len(before) + 20]!r}; give the pipeline another template"
                )
            if not full.startswith(through):
                raise DataError(
                    "the chat template rewrites an earlier turn when later ones follow, so it cannot be trained as it "
                    "was said; train on the last turn only (train_on='last')"
                )
            content = messages[turn].get("content") or ""
            if before == self._render(messages[:turn], tools) and not through[len(before) :].lstrip().startswith(
                content.strip()
            ):
                raise DataError(
                    "the chat template ignores add_generation_prompt, so the heading of the answer would be trained "
                    "as if the model had said it; give the pipeline a template that honours it"
                )
            yield len(before), len(through)

    def _through_end_token(self, answer: Sequence[int]) -> list[int]:
        """Labels of a rendered answer: all of it up to its last special token; a line break after it is layout."""
        ends = [at for at, token in enumerate(answer) if token in self._special_ids]
        supervised = ends[-1] + 1 if ends else len(answer)
        return [*answer[:supervised], *[IGNORED] * (len(answer) - supervised)]

    def _render(self, messages: Sequence[Message], tools: Any, begin_answer: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=begin_answer,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses this conversation: {error} (messages)") from None
        assert isinstance(text, str)
        return text

    def _neutral(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` with control tokens inside contents replaced by placeholders, which `_ids` spells out as text.

        Without this, a user who writes `<|im_end|>` would end the turn (and a row could train the model to be fooled).
        """
        return [
            _map_strings(message, lambda text: self._special_pattern.sub(self._placeholder, text))
            for message in messages
        ]

    def _placeholder(self, match: re.Match[str]) -> str:
        return f"\ue000{self._special_tokens.index(match.group())}\ue001"

    def _ids(self, text: str) -> list[int]:
        """Tokens of rendered text, without any added by the tokenizer itself."""
        first, *others = re.split("\ue000(\\d+)\ue001", text)
        ids = self._encode(first)
        for number, text_after in zip(others[::2], others[1::2], strict=True):
            ids += self._inner(self._special_tokens[int(number)], spell_out=True) + self._inner(text_after)
        return ids

    def _continue(self, ids: Sequence[int], before: str, text: str) -> list[int]:
        """Tokens of `text` as they follow `ids`, the tokens of `before`: tokenized jointly wherever that is possible.

        Where a token would straddle the border, `text` is tokenized on its own, as the model will have to write it.
        """
        if not text:
            return []
        joint = self._ids(before + text)
        if joint[: len(ids)] == list(ids):
            return joint[len(ids) :]
        return self._inner(text) if "\ue000" not in text else self._ids(text)

    def _inner(self, text: str, spell_out: bool = False) -> list[int]:
        """Tokens of `text` in the middle of a sequence: without the blank that some tokenizers put before a text."""
        if not text:
            return []
        for anchor in ("\n", "a", "."):
            left, both = self._encode(anchor, spell_out), self._encode(anchor + text, spell_out)
            if both[: len(left)] == left:
                return both[len(left) :]
        return self._encode(text, spell_out)

    def _encode(self, text: str, spell_out: bool = False) -> list[int]:
        # verbose: how long a row may be is checked, and said, where all rows are known.
        options = {"add_special_tokens": False, "split_special_tokens": spell_out, "verbose": False}
        return list(self.tokenizer.encode(text, **options))

    def _text_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer.encode(text, verbose=False))
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """`ids` beginning with exactly one BOS if the tokenizer begins texts with one."""
        return (
            [self.tokenizer.bos_token_id, *ids] if self._wants_bos and ids[:1] != [self.tokenizer.bos_token_id] else ids
        )

    @cached_property
    def _wants_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer.encode("x"))[:1] == [bos]

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        names = {str(token.content) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted(names, key=len, reverse=True)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(self._special_tokens))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special_tokens)))


def _is_trained(message: Message) -> bool:
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) if key != "role" else item for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
