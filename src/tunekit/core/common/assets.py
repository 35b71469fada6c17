"""What ships inside the package: the embedded model and data set, addressed as `tunekit:<name>`."""

from pathlib import Path

from tunekit.core.fields import did_you_mean
from tunekit.errors import ConfigError

TINY = "tunekit:tiny"
"""The embedded model: a small pretrained Llama with its tokenizer and chat template."""
ORDERS = "tunekit:orders"
"""The embedded data set: customer messages, and the record to extract from each."""

_ASSETS = Path(__file__).parents[2] / "assets"
_FILES = {TINY: _ASSETS / "tiny", ORDERS: _ASSETS / "orders.jsonl"}


def resolve(path: str) -> str:
    """The path of an embedded asset; any other path as it is. Raises ConfigError for an unknown `tunekit:` name."""
    if not path.startswith("tunekit:"):
        return path
    if path not in _FILES:
        raise ConfigError(f"{path!r} is no embedded asset{did_you_mean(path, _FILES)}")
    return str(_FILES[path])
