"""The adapter directory: the method's own files, and `tunekit.json`, by which it is known what they are, and if whole.

`tunekit.json` says who made the adapter, on which base, and with which template. It holds the sha256 of every other
file and, last, of itself, so that one file tells whether all are as they were written; and the names and shapes of all
tensors, so that it can be said what is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.core import recipe
from tunekit.core.common import distributions
from tunekit.core.data import contract
from tunekit.core.data.codec import Codec
from tunekit.core.hookspecs import DISTRIBUTION
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import fingerprint
from tunekit.core.model.base import Base
from tunekit.core.registry import default_registry
from tunekit.core.run.checkpoint import sha256
from tunekit.core.run.files import read_json, write_json
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import nn

PROVENANCE = "tunekit.json"
FIXED_CLOCK = "{%- macro strftime_now(format) -%}1 January 2024{%- endmacro -%}"
"""Put before a template to make its contract: one that writes the date would not be kept tomorrow."""
READ = (".safetensors", ".json", ".bin", ".pt")
"""A file of one of these kinds that was added might be read by a method, so it is refused. Others are left alone."""


def save(directory: Path, method: AdapterMethod, model: nn.Module, known: Mapping[str, Any], codec: Codec) -> None:
    """Write the adapter of `model` into `directory`, and beside it what is needed to use it, and to trust it.

    Args:
        directory: where to; made if it is not there.
        method: what was trained.
        model: what it was trained on, with the method attached.
        known: the fingerprint of the base.
        codec: with the template it was trained with.

    Raises:
        TrainingError: a trained number is not finite.
    """
    directory.mkdir(exist_ok=True)
    method.save(model, directory)
    if broken := _not_finite(directory):
        raise TrainingError(f"{broken} is not finite after training; nothing of use was learned")
    registry = default_registry()
    stated = {
        **registry.provenance(type(method)),
        "adapter": recipe.to_table(method, registry),
        "versions": {name: distributions.version(name) for name in (DISTRIBUTION, "torch", "transformers", "peft")},
        "base": known,
        "template": codec.template,
        "contract": _contract(codec),
    }
    seal(directory, stated)


def seal(directory: Path, stated: Mapping[str, Any]) -> None:
    """Write `stated` into `tunekit.json`, with the hashes of all files in the directory and of itself."""
    files = {name: sha256(directory / name) for name in _files(directory)}
    stated = {**stated, "tensors": _tensors(directory), "files": files}
    stated.pop("sha256", None)
    write_json(directory / PROVENANCE, {**stated, "sha256": _digest(stated)})


def check(directory: Path, method: AdapterMethod, base: Base, codec: Codec) -> None:
    """Refuse an adapter that is not as it was saved, or not for this method, base and template.

    Reads every file once and no weights of the base but samples.

    Raises:
        ConfigError: saying what differs: a file, a tensor, a number that is not finite, the method, the base's
            revision, configuration or weights, the template or the tokenizer.
    """
    where = str(directory)
    stated = check_files(directory)
    name = f"{method.kind}/{method.name}"
    if stated["component"] != name:
        raise ConfigError(f"is of {stated['component']}, and the pipeline has {name}", where)
    fingerprint.check_same(stated["base"], fingerprint.fingerprint(base), where)
    here = _contract(codec)
    contract.check(stated["contract"], here)
    for name in ("vocabulary_sha256", "stop_ids"):
        if stated["contract"][name] != here[name]:
            was = stated["contract"][name]
            raise ConfigError(
                f"was trained with another tokenizer: its {name} is {was} there, {here[name]} here", where
            )


def check_files(directory: Path) -> dict[str, Any]:
    """The content of `tunekit.json`, after every file was found as it was saved; ConfigError otherwise."""
    stated: dict[str, Any] = read_json(directory / PROVENANCE)
    rest = {name: value for name, value in stated.items() if name != "sha256"} if isinstance(stated, dict) else {}
    if not rest or stated.get("sha256") != _digest(rest):
        raise ConfigError("is not as it was saved (its sha256 of itself is another)", str(directory / PROVENANCE))
    here = _files(directory)
    for name in sorted({*stated["files"], *here}):
        where = str(directory / name)
        if name not in here:
            raise ConfigError("is missing", where)
        if name not in stated["files"]:
            if name.endswith(READ):
                raise ConfigError("was not there when the adapter was saved; take it away", where)
        elif sha256(directory / name) != stated["files"][name]:
            raise ConfigError(f"is not as it was saved: {_difference(directory, name, stated)}", where)
    if broken := _not_finite(directory):
        raise ConfigError(f"{broken} is not finite", str(directory))
    return stated


def _contract(codec: Codec) -> dict[str, Any]:
    """What template and tokenizer must do again, and a hash of all tokens: the golden prompt has but a few of them."""
    made = Codec(codec.tokenizer, FIXED_CLOCK + codec.template).contract()
    vocabulary = sorted(codec.tokenizer.get_vocab().items())
    return {
        **made,
        "template_sha256": hashlib.sha256(codec.template.encode()).hexdigest(),
        "vocabulary_sha256": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        "stop_ids": list(codec.stop_ids),
    }


def _files(directory: Path) -> list[str]:
    """Every file under `directory` but `tunekit.json`, by its path from there."""
    found = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != PROVENANCE)


def _tensors(directory: Path, only: str = "") -> dict[str, dict[str, list[int]]]:
    """The shape of every tensor by its name, by file."""
    from safetensors import safe_open

    found = {}
    for name in [only] if only else [name for name in _files(directory) if name.endswith(".safetensors")]:
        with safe_open(directory / name, "pt") as file:
            found[name] = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    return found


def _difference(directory: Path, name: str, stated: Mapping[str, Any]) -> str:
    """What is different about a file with another hash, as far as it can be told."""
    from safetensors import SafetensorError

    was = stated["tensors"].get(name)
    if was is None:
        return "its sha256 is another"
    try:
        here = _tensors(directory, name)[name]
    except (OSError, SafetensorError) as error:
        return f"it cannot be read ({error})"
    parts = [
        *(f"it lacks {key}" for key in was if key not in here),
        *(f"it has {key} besides" for key in here if key not in was),
        *(f"{key} is {here[key]}, not {was[key]}" for key in was if here.get(key, was[key]) != was[key]),
    ]
    more = f", and {len(parts) - 3} differences more" if len(parts) > 3 else ""
    return "; ".join(parts[:3]) + more if parts else "its sha256 is another, while its tensors have the same names"


def _not_finite(directory: Path) -> str:
    """The first tensor with a NaN or an infinity in it, with its file; empty if there is none."""
    from safetensors import safe_open

    for name in _files(directory):
        if name.endswith(".safetensors"):
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    if not file.get_tensor(key).isfinite().all():
                        return f"{key} in {name}"
    return ""


def _digest(stated: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
