"""The template contract: what training and use must have in common, saved with an adapter and checked later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.errors import ConfigError

GOLDEN: tuple[Mapping[str, str], ...] = (
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5."},
    {"role": "user", "content": "Gr\u00fc\u00dfe an 3 B\u00e4ume \U0001f333:\n  und 12 + 30?"},
)
"""What a contract is made with: digits, blanks, a line break and letters of two to four bytes, that tokenizers cut."""

SAID = {"template_sha256": "template reads", "prompt": "prompt is rendered", "prompt_ids": "prompt is tokenized"}


def contract(template: str, prompt: str | None, prompt_ids: Sequence[int] | None) -> dict[str, Any]:
    """A contract in JSON values.

    Args:
        template: the template's text, kept as its sha256.
        prompt: `GOLDEN`, or its end, rendered up to the answer; None for a template that refuses both.
        prompt_ids: the tokens of that prompt.
    """
    digest = hashlib.sha256(template.encode()).hexdigest()
    return {"template_sha256": digest, "prompt": prompt, "prompt_ids": None if prompt_ids is None else [*prompt_ids]}


def check(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless two contracts are the same."""
    for name, said in SAID.items():
        if saved.get(name) != own[name]:
            raise ConfigError(
                f"the {said} otherwise than where the model was trained, so it would be asked what it never saw: "
                f"{_difference(name, saved.get(name), own[name])}",
                "template",
            )


def _difference(name: str, old: Any, new: Any) -> str:
    if old is None or new is None:
        return f"none {'there' if old is None else 'here'}"
    if name == "template_sha256":
        return f"sha256 {old[:12]} there, {new[:12]} here"
    unlike = (at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    at = next(unlike, min(len(old), len(new)))
    unit = "character" if name == "prompt" else "token"
    return f"from {unit} {at} on, {old[at : at + 12]!r} there, {new[at : at + 12]!r} here"
