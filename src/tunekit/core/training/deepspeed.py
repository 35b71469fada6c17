"""DeepSpeed, for trainers that can hand the model over to it: what it is asked to do, and what cannot work with it.

How much each process keeps for itself is the stage of ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054):
0 nothing, 1 a piece of the optimizer's states, 2 of the gradients too, 3 of the parameters too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunekit.core.interfaces import AdapterMethod, Quantizer, Trainer
from tunekit.core.training.parallel import asks_for_deepspeed
from tunekit.errors import ConfigError

FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
"""Where `accelerate launch` leaves the path of a configuration, or else the stage; without both it is 2."""


def stage_of(configuration: Mapping[str, Any] | str, where: str) -> int:
    """The stage of ZeRO that a configuration asks for.

    Args:
        configuration: the table, or the path of a JSON file with it.
        where: what named it, for errors.

    Raises:
        ConfigError: the file cannot be read, or the stage is none.
    """
    table: Any = configuration
    if isinstance(configuration, str):
        try:
            table = json.loads(Path(configuration).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read DeepSpeed's configuration {configuration}: {error}", where) from None
    zero = table.get("zero_optimization", {}) if isinstance(table, Mapping) else None
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        raise ConfigError("is no configuration of DeepSpeed: zero_optimization.stage must be 0, 1, 2 or 3", where)
    return int(stage)


def launched_stage() -> int | None:
    """The stage that `accelerate launch --use_deepspeed` asks for; None where nothing was launched so."""
    if not asks_for_deepspeed():
        return None
    file = os.environ.get(FILE, "none")
    if file != "none":
        return stage_of(file, FILE)
    return stage_of({"zero_optimization": {"stage": int(os.environ.get(STAGE, "2"))}}, STAGE)


def check(trainer: Trainer, adapter: AdapterMethod, quantizer: Quantizer | None) -> None:
    """Raise ConfigError where `trainer` hands the model to DeepSpeed, and method or quantizer cannot work with that."""
    stage = trainer.zero_stage
    if stage is None:
        return
    for slot in ("extra_loss", "after_step"):
        if getattr(type(adapter), slot) is not getattr(AdapterMethod, slot):
            raise ConfigError(
                f"{adapter.name} looks at gradients or parameters between steps ({slot}), and DeepSpeed keeps them to "
                "itself; take LoRA, or leave DeepSpeed out",
                "Pipeline.adapter",
            )
    if stage == 3 and quantizer:
        raise ConfigError(
            f"{quantizer.name} needs its weights whole, and ZeRO 3 cuts them; take stage 2, or "
            "SFT(parallel='sharded') with NF4",
            "Pipeline.quantizer",
        )
