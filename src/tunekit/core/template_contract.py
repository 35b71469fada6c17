"""What a tuned model expects of its input: the template and the tokenizer it was trained with, told by what they do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tunekit.core.codec import Codec
from tunekit.errors import ConfigError

CONVERSATION = (
    {"role": "user", "content": "What is 2 + 3?\n\tGrüße, 你好 🙂 x[i] += 1;"},
    {"role": "assistant", "content": "It's 5, i.e. five."},
)
"""What is rendered and encoded: letters of several scripts, digits, blanks and code."""

_FIXED_CLOCK = "{%- macro strftime_now(format) -%}1 January 2024{%- endmacro -%}"
"""Put before a template, so that one that writes the date renders the same tomorrow."""


def contract(codec: Codec) -> dict[str, Any]:
    """The template, a conversation rendered with it and its tokens, and a hash of the vocabulary, as JSON values."""
    tokenizer = codec.tokenizer
    text = tokenizer.apply_chat_template(
        list(CONVERSATION), chat_template=_FIXED_CLOCK + codec.template, tokenize=False
    )
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "template": codec.template,
        "template_sha256": hashlib.sha256(codec.template.encode()).hexdigest(),
        "golden": {"text": text, "ids": list(tokenizer.encode(text, add_special_tokens=False))},
        "vocabulary_sha256": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        "stop_ids": list(codec.stop_ids),
    }


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, naming what was and what is, unless both contracts are the same."""
    if then["template_sha256"] != now["template_sha256"]:
        was, here = _around_difference(then["template"], now["template"])
        raise ConfigError(f"was trained with another chat template: {was} there, {here} here", where)
    golden = [found["golden"] for found in (then, now)]
    if golden[0]["text"] != golden[1]["text"]:
        was, here = _around_difference(golden[0]["text"], golden[1]["text"])
        raise ConfigError(f"its chat template now renders a conversation otherwise: {was} there, {here} here", where)
    if golden[0]["ids"] != golden[1]["ids"]:
        was, here = _around_difference(golden[0]["ids"], golden[1]["ids"])
        raise ConfigError(
            f"was trained with another tokenizer: the same text is {was} there and {here} here, from the first token "
            "that differs",
            where,
        )
    for name in ("vocabulary_sha256", "stop_ids"):
        if then[name] != now[name]:
            raise ConfigError(
                f"was trained with another tokenizer: its {name} is {then[name]} there, {now[name]} here", where
            )


def _around_difference(one: Any, other: Any) -> tuple[str, str]:
    """Both from shortly before the first difference on, shortened."""
    same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(one), len(other)) if same is None else same
    start = max(0, start - 20) if isinstance(one, str) else start
    shown = [
        found[start : start + 40] if isinstance(found, str) else found[start : start + 5] for found in (one, other)
    ]
    return repr(shown[0]), repr(shown[1])
