"""Tokens that a model does not have yet: into its tokenizer, and into its embeddings, where they start at the mean.

A token is a control token if the chat template itself writes it, as the mark of a turn: no content can then spell it.
Any other is a word, which contents are written with and answers are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tunekit.core.data.template import Template
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.registry import default_registry
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHERE = "Pipeline.added_tokens"
CONTENT = "\ue002"
"""What is said in the conversations below: nothing that a token could be."""
ROWS = 4096
"""Rows of an embedding that are summed at a time."""

_USER, _ANSWER, _SYSTEM = ({"role": role, "content": CONTENT} for role in ("user", "assistant", "system"))
_CALL = {"type": "function", "function": {"name": CONTENT, "arguments": {CONTENT: CONTENT}}}
PROBES: tuple[Sequence[dict[str, Any]], ...] = (
    (_USER, _ANSWER, _USER),
    (_USER,),
    (_SYSTEM, _USER, _ANSWER, _USER),
    (_USER, {**_ANSWER, "tool_calls": [_CALL]}, {"role": "tool", "name": CONTENT, "content": CONTENT}),
)
"""Conversations by which it is found what a template writes; one that it refuses is passed over."""


def check_texts(tokens: Sequence[str]) -> None:
    """Raise ConfigError for what can be no token: empty, blank at an end, or there twice."""
    for token in tokens:
        if not token or token != token.strip():
            raise ConfigError(f"{token!r} is no token: it must have a letter, and no blank at its ends", WHERE)
        if tokens.count(token) > 1:
            raise ConfigError(f"{token!r} is there twice", WHERE)


def check_method(tokens: Sequence[str], method: AdapterMethod) -> None:
    """Raise ConfigError if there are tokens to train and `method` would leave their embeddings frozen."""
    if tokens and not method.trains_added_tokens:
        registry = default_registry()
        kinds = [registry.find("adapter", name) for name in registry.names("adapter")]
        able = ", ".join(kind.name for kind in kinds if getattr(kind, "trains_added_tokens", False))
        raise ConfigError(
            f"{method.name} does not train embeddings, so that {tokens[0]!r} would mean nothing; {able} do", WHERE
        )


def add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], template: str) -> None:
    """Give the tokenizer these tokens, in their order; those that `template` writes become control tokens.

    Raises ConfigError for one that it has: by another meaning, which is trained already.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    if there := [token for token in tokens if token in known]:
        raise ConfigError(f"{there[0]!r} is a token of this model as it is; leave it out", WHERE)
    rendering = Template(template, tokenizer.special_tokens_map)
    texts = [rendering.render(probe, None, [(len(probe), True)])[0] for probe in PROBES]
    for token in tokens:
        control = any(token in text for text in texts if isinstance(text, str))
        # Not normalized: found in the text as it stands, before a tokenizer changes case or blanks.
        tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)], special_tokens=control)


def make_room(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Lengthen embedding and head to have a row for each of `ids`; a padded vocabulary has them, and stays as it is.

    Raises ConfigError for embeddings that are quantized, or tied otherwise than the configuration says.
    """
    if not ids:
        return
    first, *others = ends(model)
    if any(not weight.is_floating_point() for _, weight in _tensors([first, *others])):
        raise ConfigError("the embeddings of this base are quantized, so that tokens cannot be added to them", WHERE)
    if model.get_output_embeddings() is not None and bool(others) == bool(model.config.tie_word_embeddings):
        said = "says" if others else "does not say"
        raise ConfigError(f"the configuration {said} that embedding and head are tied, and its weights differ", WHERE)
    if max(ids) >= len(first.weight):
        # Drawn at random by transformers, and then set: its own mean would be that of the padding, too.
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)


def start_at_mean(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Set the rows of `ids`, of the embedding and of a head of its own, to the mean of the rows of all other tokens.

    Rows that stand for no token, the padding of a vocabulary, do not count. A token so begins as likely as the others
    are on average, where random rows might begin as the likeliest of all. Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    import torch

    if not ids:
        return
    others = sorted(set(tokenizer.get_vocab().values()) - set(ids))
    with torch.no_grad():
        for _, weight in _tensors(ends(model)):
            rows = [at for at in others if at < len(weight)]
            # Summed in float64: in bfloat16, a sum of 150,000 rows has no correct digit.
            total = torch.zeros(weight.shape[1:], dtype=torch.float64, device=weight.device)
            for some in torch.tensor(rows, device=weight.device).split(ROWS):
                total += weight[some].double().sum(0)
            weight[list(ids)] = (total / len(rows)).to(weight.dtype)


def ends(model: PreTrainedModel) -> list[nn.Module]:
    """The embedding, and the head if it has weights of its own."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    return [first] if last is None or last.weight is first.weight else [first, last]


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Weights, and biases where there are."""
    for module in modules:
        yield from module.named_parameters(recurse=False)
