"""Secrets of the environment: kept out of every file that a run writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tunekit.errors import ConfigError

_WORDS = "TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?"
VARIABLE = re.compile(rf"(^|_)({_WORDS})($|_)(?!.*(PATH|FILE|DIR)$)", re.IGNORECASE)
"""Names of variables that hold a secret: HF_TOKEN, WANDB_API_KEY; not HF_TOKEN_PATH."""
SHORTEST = 8
"""Characters of a secret: a shorter value would be found in words that are none."""
FIELD = re.compile(r"(^|_)(hub_token|auth_token|access_token|api_key|password|secret)$")
"""Names of fields whose value can be nothing else."""
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""The user and the password in a URL."""
PARAMETER = re.compile(r"(?<=[?&])([\w-]*(?:token|key|secret|password|signature)=)[^&\s'\"]+", re.IGNORECASE)
HUB = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
"""A token of the Hugging Face Hub, wherever it comes from."""
HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` with `***` for every secret in it: values of variables, passwords in URLs, tokens of the Hub."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    text = PARAMETER.sub(rf"\1{HIDDEN}", USER.sub(HIDDEN, text))
    return HUB.sub(HIDDEN, text)


def check_recipe(table: Mapping[str, Any], where: str = "recipe") -> None:
    """Raise ConfigError, naming the field, for a recipe with a secret in it: every run directory would hold it.

    Rows are training data, in which a URL with a password is text; but the value of a variable is refused there, too.
    """
    values = _values()
    for place, value in _texts(table, where):
        found = any(secret in value for secret in values) or HUB.search(value)
        if ".rows[" not in place:
            found = found or any(":" in user for user in USER.findall(value)) or PARAMETER.search(value)
            found = found or FIELD.search(place.rpartition(".")[2])
        if found:
            raise ConfigError(
                "holds a secret, and a recipe is written into every run directory; leave it out, and give it by a "
                "variable of the environment (HF_TOKEN for the Hub)",
                place,
            )


def _values() -> list[str]:
    """The values of all variables that hold a secret, longest first: one may be part of another."""
    found = {value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text in a table, with its dotted path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{where}[{index}]")
