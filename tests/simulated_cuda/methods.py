"""Every method and quantizer, as parts of a pipeline by name."""

from collections.abc import Callable, Mapping
from typing import Any

import tunekit as tk

METHODS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "lora": lambda: {"adapter": tk.LoRA()},
    "dropout": lambda: {"adapter": tk.LoRA(dropout=0.1)},
    "qlora": lambda: {"adapter": tk.QLoRA()},
    "int8": lambda: {"quantizer": tk.Int8()},
    "adalora": lambda: {"adapter": tk.AdaLoRA()},
    "ia3": lambda: {"adapter": tk.IA3()},
    "loha": lambda: {"adapter": tk.LoHa()},
    "lokr": lambda: {"adapter": tk.LoKr()},
    "prompt": lambda: {"adapter": tk.PromptTuning()},
    "prefix": lambda: {"adapter": tk.PrefixTuning()},
    "bottleneck": lambda: {"adapter": tk.Bottleneck()},
    "last layers": lambda: {"adapter": tk.LastLayers()},
    "full": lambda: {"adapter": tk.Full()},
}
CANNOT_BE_MERGED = ("prompt", "prefix", "bottleneck")
