"""Write docs/reference from the source: `python scripts/make_reference.py`; with `--check`, fail if it is stale."""

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import tomli_w

import tunekit as tk
from tunekit.core import hookspecs, recipe
from tunekit.core.fields import describe, types_of
from tunekit.core.interfaces import INTERFACES
from tunekit.core.registry import default_registry
from tunekit.plugins import COMPONENTS

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- Written by scripts/make_reference.py. Change the docstring in the source, not this page. -->\n\n"
BUILTINS = {f"{lazy.kind}-{lazy.name}.md": getattr(tk, lazy.target.rpartition(":")[2]) for lazy in COMPONENTS}
REQUIRED: dict[str, dict[str, Any]] = {
    "json-lines": {"path": "train.jsonl"},
    "peft": {"type": "VERA", "options": {"target_modules": "all-linear"}},
    "table": {"path": "train.csv"},
    "hub": {"id": "openai/gsm8k", "subset": "main"},
    "text-files": {"path": "books/*.txt"},
    "mixture": {"sources": (tk.JsonLines(path="a.jsonl"), tk.JsonLines(path="b.jsonl")), "weights": (3.0, 1.0)},
    "filtered": {"source": tk.JsonLines(path="train.jsonl"), "min_length": 20},
    "retention": {"source": tk.TextFiles(path="general/*.txt")},
    "harness": {"metrics": {"arc_easy/acc_norm": "max", "wikitext/word_perplexity": "min"}},
    "pass-at-k": {"source": tk.JsonLines(path="HumanEval.jsonl.gz"), "allow_execution": True},
    "reverse-facts": {"forward": tk.JsonLines(path="forward.jsonl"), "reverse": tk.JsonLines(path="reverse.jsonl")},
    "samples": {"prompts": ("What is 2 + 3?", "Tell me of the sea.")},
    "split": {"source": tk.JsonLines(path="train.jsonl")},
    "in-memory": {"rows": [{"prompt": "What is 2 + 3?", "completion": "5"}]},
}
"""Fields of built-ins that have no default, for the snippets."""


def pages() -> dict[str, str]:
    """Every page by file name."""
    classes = (
        tk.Component,
        *INTERFACES.values(),
        tk.Measured,
        tk.AnswerEvaluator,
        tk.PeftMethod,
        tk.Context,
        tk.RunLog,
        tk.TrainResult,
    )
    interfaces = [line for cls in classes for line in lower(class_page(cls))]
    comparing = functions(
        {"tk.compare": tk.compare, "tk.open_comparison": tk.open_comparison, "tk.rank_models": tk.rank_models}
    )
    results = (
        *(tk.Comparison, tk.Arm, tk.ArmRun, tk.Steps, tk.Tokens, tk.Minutes),
        *(tk.ComparisonReport, tk.Ranking, tk.RankedModel),
    )
    comparison = ["# Comparison", "", *comparing, *(line for cls in results for line in lower(class_page(cls)))]
    followers = (tk.Csv, tk.TensorBoard, tk.Mlflow, tk.Wandb, tk.Trackio)
    observers = [line for cls in followers for line in lower(described(cls))]
    pipeline = [line for cls in (tk.Pipeline, tk.Run, tk.RunReport) for line in class_page(cls)]
    hooks = {name: found for name, found in vars(hookspecs).items() if name.startswith("tunekit_")}
    made = {
        "README.md": index(),
        "pipeline.md": [*pipeline, *described(tk.Ray)],
        "validation.md": ["# Validation", "", *functions({"tk.validate": tk.validate}), *lower(class_page(tk.Report))],
        "comparison.md": comparison,
        "observers.md": ["# Observers", "", *observers],
        "interfaces.md": ["# The interfaces of plugins", "", *interfaces],
        "hooks.md": ["# Hooks", "", prose(hookspecs), "", *functions(hooks)],
        **{file: component_page(cls) for file, cls in BUILTINS.items()},
    }
    return {file: MADE + "\n".join(lines).strip() + "\n" for file, lines in made.items()}


def index() -> list[str]:
    """The built-ins, the other pages, and every other public class and function."""
    lines = ["# Reference", "", "| component | kind | recipe name | what it is |", "|---|---|---|---|"]
    for file, cls in BUILTINS.items():
        lines.append(f"| [`tk.{cls.__name__}`]({file}) | {cls.kind} | `{cls.name}` | {summary(cls)} |")
    lines += ["", "Also: [the pipeline and its runs](pipeline.md), [validation](validation.md),"]
    lines += ["[comparison](comparison.md), [observers](observers.md), [the interfaces of plugins](interfaces.md),"]
    lines += ["[the hooks](hooks.md).", "", "| other public names | |", "|---|---|"]
    others = {name: getattr(tk, name) for name in dir(tk) if getattr(tk, name) not in BUILTINS.values()}
    lines += [f"| `tk.{name}` | {summary(found)} |" for name, found in others.items() if is_ours(found)]
    return lines


def component_page(cls: Any) -> list[str]:
    """What it is, its fields, and the same component in Python and in a recipe."""
    made = cls(**REQUIRED.get(cls.name, {}))
    table = recipe.to_table(made, default_registry())
    key = {"source": "data", "evaluator": "evaluators"}.get(cls.kind, cls.kind)
    toml = tomli_w.dumps({key: table})
    if cls.kind == "evaluator":  # a pipeline has several
        toml = toml.replace(f"[{key}]", f"[[{key}]]", 1)
    values = {field.name: getattr(made, field.name) for field in attrs.fields(cls)}
    call = "".join(f"\n    {name}={show(value)}," for name, value in values.items() if value is not None)
    lines = [f"# `tk.{cls.__name__}`", "", f'{cls.kind}; in a recipe `use = "{cls.name}"`.', "", prose(cls), ""]
    lines += fields(cls) if values else ["It has no fields.", ""]
    lines += ["```python", "import tunekit as tk", "", f"tk.{cls.__name__}({call}{chr(10) if call else ''})", "```", ""]
    return [*lines, "```toml", toml.strip(), "```", "", "What is left out has its default."]


def class_page(cls: Any) -> list[str]:
    """What it is, its fields and its methods."""
    public = {name: found for name, found in vars(cls).items() if not name.startswith("_")}
    table = fields(cls) if attrs.has(cls) and attrs.fields(cls) else []
    figures = {name: found for name, found in public.items() if isinstance(found, property) or hasattr(found, "func")}
    listed = [f"- `{name}`: {summary(found)}" for name, found in figures.items()]
    methods = {name: getattr(cls, name) for name, found in public.items() if callable(getattr(cls, name))}
    methods = {name: found for name, found in methods.items() if inspect.isroutine(found)}
    return [f"# `tk.{cls.__name__}`", "", prose(cls), "", *table, *listed, "", *functions(methods)]


def described(cls: Any) -> list[str]:
    """What an observer is and its fields; its methods are hooks, which have a page of their own."""
    own = [field for field in attrs.fields(cls) if field.init]
    return [f"# `tk.{cls.__name__}`", "", prose(cls), "", *(fields(cls) if own else [])]


def lower(lines: list[str]) -> list[str]:
    """Lines of a page with their headings one level lower."""
    return [f"#{line}" if line.startswith("#") else line for line in lines]


def fields(cls: Any) -> list[str]:
    """A table of the fields, with what the docstring says of each under `Args:`."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # an inherited field is described where it is defined
        doc = inspect.cleandoc(vars(base).get("__doc__") or "")
        said |= dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", doc, re.MULTILINE))
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in (field for field in attrs.fields(cls) if field.init and not field.name.startswith("_")):
        value = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore
        default = "required" if value is attrs.NOTHING else f"`{show(value)}`"
        meaning = " ".join(said[field.name].split())
        lines.append(f"| `{field.name}` | {describe(types_of(cls)[field.name])} | {default} | {meaning} |")
    return [*lines, ""]


def show(value: Any) -> str:
    """A default value as a user would write it."""
    if isinstance(value, tuple) and value:
        return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
    if isinstance(value, tk.Component):
        told = {field.name: (getattr(value, field.name), field.default) for field in attrs.fields(type(value))}
        given = ", ".join(f"{name}={show(mine)}" for name, (mine, default) in told.items() if mine != default)
        return f"tk.{type(value).__name__}({given if type(value).kind == 'source' else ''})"
    quoted = isinstance(value, str | dict) and '"' not in repr(value)
    return repr(value).replace("'", '"') if quoted else repr(value)


def functions(found: dict[str, Any]) -> Iterable[str]:
    """For each, a heading, the exact signature and the docstring; `Args:` become a list, an example a code block."""
    for name, function in found.items():
        text, _, example = (inspect.getdoc(function) or "").partition("@tunekit.hookimpl")
        text = re.sub(r"\n {8,}", " ", text).replace("Args:\n", "Arguments:\n\n").replace("Raises:\n", "Raises:\n\n")
        text = re.sub(r"^ {4}([\w, ]+): ", r"- `\1`: ", text, flags=re.MULTILINE).strip()
        signature = re.sub(r"'|tunekit\.core\.[\w.]+\.", "", str(inspect.signature(function)))
        required = getattr(function, "__isabstractmethod__", False)
        yield from (f"## `{name}`", "", "```text", name + signature, "```", "")
        yield from (text, "", *(["Every plugin writes this one.", ""] if required else []))
        yield from ("```text", "@tunekit.hookimpl" + example, "```", "") if example else ()


def prose(found: Any) -> str:
    """A docstring up to its `Args:`, with links that can be clicked."""
    text = (inspect.getdoc(found) or "").partition("\nArgs:\n")[0].strip()
    return re.sub(r"https://\S+[^\s.]", r"<\g<0>>", text)


def summary(found: Any) -> str:
    """The first sentence of a docstring, on one line."""
    return re.split(r"(?<=\.)\s", " ".join((inspect.getdoc(found) or "").partition("\n\n")[0].split()))[0]


def is_ours(found: Any) -> bool:
    return inspect.isroutine(found) or (inspect.isclass(found) and found.__module__.startswith("tunekit"))


if __name__ == "__main__":
    made = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")}
    stale = sorted(name for name in {*made, *there} if made.get(name) != there.get(name))
    if "--check" in sys.argv and stale:
        sys.exit(f"stale in docs/reference: {', '.join(stale)}; run python scripts/make_reference.py")
    for name in stale:
        if name in made:
            (REFERENCE / name).write_text(made[name], encoding="utf-8")
        else:
            (REFERENCE / name).unlink()
    print(f"{len(stale)} of {len(made)} pages were stale")
