"""The model card of an export: plain facts of the run, without a path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tunekit.core import recipe
from tunekit.core.hookspecs import DISTRIBUTION
from tunekit.core.run import adapter_files, files

PACKAGES = (DISTRIBUTION, "torch", "transformers", "peft", "bitsandbytes")


def model_card(run: Path, report: Mapping[str, Any]) -> str:
    """The text of `README.md`.

    Args:
        run: the run directory: its recipe, environment, result and adapter are read.
        report: what `export.json` says.
    """
    stated = files.read_json(run / files.ADAPTER / adapter_files.PROVENANCE)
    result, environment = files.read_json(run / files.RESULT), files.read_json(run / files.ENVIRONMENT)
    table, base, rows = recipe.read(run / files.RECIPE), stated["base"], result["rows"]
    names = [component["component"] for component in result["components"]]
    made = f"{stated['component']} of {stated['distribution']} {stated['version']}"
    parts = [
        ["base model", base["model"]],
        ["revision", base["revision"] or base["commit"] or "not stated"],
        ["base weights", f"sha256 of samples {str(base['weights_sha256'])[:16]}"],
        ["method", f"{made}: {_component(table['adapter'])}"],
        ["quantizer in training", next((name for name in names if name.startswith("quantizer/")), "none")],
        ["data", _component(table["data"])],
        ["rows", f"{rows['train']} trained on, {rows['validation']} held out"],
        ["trainer", _component(table["trainer"])],
        ["steps", result["training"]["steps"]],
        ["seed", environment["seed"]],
        ["dtype in training", environment["dtype"]],
        ["dtype here", report["dtype"]],
        ["quantization here", report["quantization"] or "none"],
        ["versions", ", ".join(_versions(environment["packages"]))],
    ]
    columns = {"base": result["base_metrics"], **result.get("prompted", {}), "tuned": result["metrics"]}
    metrics = [
        [name, *(f"{found[name]:.4g}" if name in found else "-" for found in columns.values())]
        for name in result["metrics"]
    ]
    return "\n".join(
        [
            f"# {base['model']}, fine-tuned",
            "",
            f"Made by tunekit: {made}, merged into the base in float32.",
            "",
            *_table(["what", "which"], parts),
            "",
            "## Measured on the held-out rows",
            "",
            *(_table(["metric", *columns], metrics) if metrics else ["Nothing was measured."]),
            *_cost(report),
            "",
        ]
    )


def _cost(report: Mapping[str, Any]) -> list[str]:
    if not report["quantization"]:
        return []
    scheme, nll = report["quantization"], report["nll"]
    measured = (
        f"the mean negative log-likelihood of the held-out rows was {nll['before']:.4g} before and is "
        f"{nll['after']:.4g} here"
        if nll
        else "there are no held-out rows to measure what that cost"
    )
    return ["", f"The metrics are those before the merged weights were quantized to {scheme} again: {measured}."]


def fields_line(table: Mapping[str, Any]) -> str:
    """The fields of a component of a recipe in one line; rows that stand in it are left out."""
    return ", ".join(f"{name}={portable(value)}" for name, value in table.items() if name not in ("use", "rows"))


def _component(table: Mapping[str, Any]) -> str:
    return f"`{table['use']}` {fields_line(table)}".strip()


def portable(value: Any) -> Any:
    """A path as its last name: the way there is of one machine only."""
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name
    return value


def _versions(packages: Mapping[str, str]) -> list[str]:
    return [f"{name} {packages[name]}" for name in PACKAGES if name in packages]


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
