"""The arms: who trains, in which dtype, with which settings. The table is all there is to an arm."""

import importlib.util

import attrs


@attrs.frozen(kw_only=True)
class Arm:
    """One way to do the work.

    Args:
        trainer: "tunekit", "transformers" or "trl".
        dtype: of the base weights.
        computes: the dtype of the arithmetic; it differs under autocast.
        settings: fields of `tk.SFT`, `TrainingArguments` or `SFTConfig` that differ from its defaults.
        about: what it is, for the table.
        once: whether it is run in the first round alone: to show that another arm of the same trainer is the faster.
        lever: the field of `tk.SFT` that the arm is about; without that field there is no such arm.
    """

    trainer: str
    dtype: str
    computes: str
    settings: dict = attrs.field(factory=dict)
    about: str
    lever: str | None = None
    once: bool = False


EXACT = ("padding_free", "chunked_loss", "lean", "compile")
"""The levers of `tk.SFT` that leave the result as it is, in the order of the ablation."""
OFF = dict.fromkeys(EXACT, False)
TUNED = {"bf16": False, "gradient_checkpointing": False, "max_length": None}
"""What a user who knows TRL well sets on a CPU with enough memory."""


def _tunekit(about, dtype="float32", lever=None, **settings):
    return Arm(trainer="tunekit", dtype=dtype, computes=dtype, settings=settings, about=about, lever=lever)


def _with(*levers):
    """These levers on, the others off."""
    return {**OFF, **dict.fromkeys(levers, True)}


def _trl(about, dtype="float32", computes=None, once=False, **settings):
    return Arm(trainer="trl", dtype=dtype, computes=computes or dtype, settings=settings, about=about, once=once)


def _plain(about, dtype):
    return Arm(trainer="transformers", dtype=dtype, computes=dtype, about=about)


ARMS = {
    "tunekit": _tunekit("tk.SFT as it comes"),
    "tunekit-bfloat16": _tunekit("tk.SFT, bfloat16 base", "bfloat16"),
    "tunekit-recomputing": _tunekit("tk.SFT, activations computed again as by TRL", gradient_checkpointing=True),
    "tunekit-compiled": _tunekit("tk.SFT with compiled layers", compile=True),
    "transformers-float32": _plain("transformers.Trainer + PEFT, float32 base", "float32"),
    "trl-tuned-float32": _trl("TRL, float32 throughout, no checkpointing", **TUNED),
    "tunekit-levers-off": _tunekit("tk.SFT, padding, whole logits, PEFT's own forwards", **OFF),
    "transformers-bfloat16": _plain("transformers.Trainer + PEFT, bfloat16 base", "bfloat16"),
    "trl-tuned-padding-free": _trl("the same, padding-free", padding_free=True, **TUNED),
    "trl-tuned-bfloat16": _trl("TRL, bfloat16 base, no checkpointing, no autocast", "bfloat16", once=True, **TUNED),
    "trl": _trl("TRL as shipped: float32 base, bfloat16 autocast, checkpointing", computes="bfloat16"),
    # One lever after the other; all leave the result as it is but for the last, the dtype.
    "lever-padding-free": _tunekit("rows without padding", lever="padding_free", **_with(*EXACT[:1])),
    "lever-chunked-loss": _tunekit("+ logits where there is loss", lever="chunked_loss", **_with(*EXACT[:2])),
    "lever-lean": _tunekit("+ lean adapter forwards", lever="lean", **_with(*EXACT[:3])),
    "lever-compile": _tunekit("+ compiled layers", lever="compile", **_with(*EXACT)),
    "lever-bfloat16": _tunekit("all but compiled layers, base in bfloat16", "bfloat16", **_with(*EXACT[:3])),
}
MAIN = tuple(name for name in ARMS if "lever" not in name)
LEVERS = tuple(name for name in ARMS if "lever" in name)
REFERENCE = "transformers-float32"
"""What the others are held against: plain, unquantized, and of nobody who takes part."""
SETS = {
    "main": MAIN,
    "dtypes": ("tunekit", "tunekit-bfloat16", REFERENCE, "transformers-bfloat16", "trl-tuned-float32", "trl"),
    "levers": (REFERENCE, *LEVERS),
    "all": (*MAIN, *LEVERS),
    "two": ("tunekit", REFERENCE),
}


def missing(name):
    """Why this arm cannot be run here; None if it can."""
    arm = ARMS[name]
    if arm.trainer == "trl" and importlib.util.find_spec("trl") is None:
        return "TRL is not installed: make bench has an environment with it"
    if arm.lever and arm.lever not in fields_of_sft():
        return f"this tunekit has no SFT({arm.lever}=...)"
    return None


def fields_of_sft():
    """The fields that `tk.SFT` has."""
    import tunekit

    return {field.name for field in attrs.fields(tunekit.SFT)}
