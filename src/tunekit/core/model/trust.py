"""What a downloaded file could make run, and how it is refused: nothing does, unless the user allowed it.

transformers and PEFT keep most of it from running themselves, and are asked to by arguments; what they leave is here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunekit.errors import ConfigError

ALLOW = "trust_remote_code=True"


def check_repository(source: str, revision: str | None) -> None:
    """Refuse a model repository that names code elsewhere: an adapter in it, or kernels from the Hub.

    transformers would load the adapter, and what its configuration names, with the model; and fetch and run the kernels
    that `attn_implementation` in config.json names, whatever `trust_remote_code` says.

    Args:
        source: a Hub id or a directory.
        revision: branch, tag or commit of a Hub model.
    """
    from transformers import PretrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    revision = revision or "main"
    if find_adapter_config_file(source, revision=revision):
        raise ConfigError(
            f"{source!r} holds an adapter (adapter_config.json), which would be loaded with the model: merge it first, "
            "or name a directory with the base model alone",
            "Pipeline.model",
        )
    config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    for name, value in _entries(config):
        if re.search(r"(attn|experts)_implementation", name) and "/" in str(value):
            raise ConfigError(
                f"the config.json of {source!r} names code to be fetched from the Hub ({name}: {value!r}); take that "
                f"line away, or allow it by {ALLOW}",
                "Pipeline.model",
            )


def reason_of(error: Exception, source: str) -> str:
    """Why transformers could not load something from `source`, in one line; how to allow code if that is what it is."""
    if "trust_remote_code" in str(error):
        return (
            f"its repository holds code of its own, which runs only where you write {ALLOW}; read the .py files in "
            f"{source!r} first, and pin a commit by `revision`"
        )
    return str(error).strip().splitlines()[0]


def check_adapter(directory: Path, method: str) -> None:
    """Refuse an adapter directory that PEFT would read a pickle from, or that names a module for it to import.

    Without safetensors it looks for a pickle, there and on the Hub; before 0.21 it imported any `megatron_core`.
    """
    if not (directory / "adapter_model.safetensors").is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        why = "has its weights in a pickle (adapter_model.bin), which is not read" if pickled else "holds no weights"
        raise ConfigError(f"the adapter in {directory} {why}; they belong in adapter_model.safetensors", method)
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", method) from None
    if isinstance(config, dict) and config.get("megatron_config"):
        raise ConfigError(f"{path} names a module to import (megatron_core), which no adapter may", method)


def _entries(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with its dotted name, those of its parts included."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _entries(value, f"{where}.{name}".lstrip("."))
    else:
        yield where, config
