"""What a base model is known by: its configuration and its weights, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunekit.core.model.base import Base
from tunekit.errors import ConfigError

BLOCK, BLOCKS = 4096, 16
"""Of a tensor, so many blocks of so many bytes are hashed, evenly spread from its first byte to its last."""

_INCIDENTAL = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache"})
"""Fields of a configuration that say nothing about what the model computes."""


def fingerprint(base: Base) -> dict[str, Any]:
    """Name, revision, configuration and weights of `base`, as JSON values.

    The weights are taken from the files, not from the loaded model: so they are the same on every device, in every
    dtype and under every quantizer, and known before the model is loaded. None where the model has no safetensors
    files of its own (the Hub converts some on the fly).
    """
    config = base.config()
    whole = json.loads(config.to_json_string(use_diff=False))
    fields = {name: value for name, value in whole.items() if name not in _INCIDENTAL}
    files = base.weight_files()
    return {
        "model": base.label,
        "revision": base.revision,
        "commit": getattr(config, "_commit_hash", None),
        "config_sha256": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": hash_weights(files) if files else None,
        "config": fields,
    }


def hash_weights(files: Iterable[Path]) -> str:
    """A hash of safetensors files that is quick for models of any size.

    It covers name, dtype and shape of every tensor, tensors up to 64 KiB whole, and of larger ones 16 blocks of 4 KiB;
    how the tensors are divided among files does not matter. It tells apart any two trainings, which move every
    weight of what they train. It does not see a change that keeps between the blocks, such as one edited number.
    """
    found: dict[str, tuple[Path, int, int, Any]] = {}
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = (file, 8 + size + start, end - start, [name, entry["dtype"], entry["shape"]])
    digest = hashlib.sha256()
    for name in sorted(found):
        file, start, length, described = found[name]
        digest.update(json.dumps(described).encode())
        with file.open("rb") as stream:
            if length <= BLOCK * BLOCKS:
                stream.seek(start)
                digest.update(stream.read(length))
                continue
            for number in range(BLOCKS):
                stream.seek(start + number * (length - BLOCK) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def is_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are known to be of the same base: the hashes of its weights say so.

    Then it does not matter what it is called, where it lies and which revision it is.
    """
    hashed = then["weights_sha256"] is not None and then["weights_sha256"] == now["weights_sha256"]
    return hashed and not _differing(then, now)


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, naming what differs, unless two fingerprints are of the same base.

    A name may differ: a directory that was moved is still the same base, and so is one that a Hub model was copied to.
    Where there is no hash of the weights, the revision must be the same.
    """
    if is_same(then, now):
        return
    if then["revision"] != now["revision"]:
        revisions = [found["revision"] or "main" for found in (now, then)]
        raise ConfigError(f"is of another revision of its base: {revisions[0]!r} here, {revisions[1]!r} there", where)
    if differing := _differing(then, now):
        shown = "; ".join(f"{name} is {now['config'][name]!r}, not {then['config'][name]!r}" for name in differing)
        raise ConfigError(f"is of another base than {now['model']!r}: {shown}", where)
    if then["weights_sha256"] != now["weights_sha256"]:
        commits = f" (commit {then['commit']}, here {now['commit']})" if then["commit"] else ""
        raise ConfigError(
            f"is of another base than {now['model']!r}: the configuration is the same, the weights are not{commits}",
            where,
        )


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields that both configurations have, and differently; one that only one has is of another transformers."""
    common = then["config"].keys() & now["config"].keys()
    return sorted(name for name in common if then["config"][name] != now["config"][name])
