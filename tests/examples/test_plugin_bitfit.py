"""The example plugin works as an installed distribution: it is listed, found by name, trains, and can be used after."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-bitfit"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SCRIPT = """
import json, sys
import pytest
import tunekit as tk

recipe, directory, tests = sys.argv[1:]
pipeline = tk.load(recipe)
plan = pipeline.plan()
run = pipeline.run(directory)
again = tk.open_run(directory)
trained = [record for record in run.result["components"] if record["component"] == "adapter/bitfit"]
plugins = {plugin.name: [plugin.distribution, plugin.version, plugin.status] for plugin in tk.plugins()}
print("\\n" + json.dumps({
    "plugins": plugins,
    "adapter": type(pipeline.adapter).__module__,
    "planned": plan.trainable_parameters,
    "trained": run.result["parameters"]["trainable"],
    "losses": [line["loss"] for line in run.history],
    "metrics": [run.base_metrics["nll"], run.metrics["nll"]],
    "answers": [model.generate("three", max_new_tokens=4) for model in (run, again)],
    "base": again.generate("three", max_new_tokens=4, tuned=False),
    "made by": trained,
    "tests": int(pytest.main(["-q", "-W", "error", "-p", "no:cacheprovider", tests])),
}))
"""

RECIPE = """
tunekit = 1
model = "{model}"
validation = {{ use = "in-memory", rows = [{rows}] }}
data = {{ use = "in-memory", rows = [{rows}] }}
adapter = {{ use = "bitfit" }}
trainer = {{ use = "sft", max_steps = 12, batch_size = 4, learning_rate = 0.05 }}
evaluators = [{{ use = "perplexity" }}]
device = "cpu"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that has the example installed, as pip would lay it out, and no other plugin."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE / "src", site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # The name of the directory has an underscore, or importlib.metadata takes it for another distribution.
    info = site / f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n", encoding="utf-8"
    )
    groups = PROJECT["entry-points"]
    lines = [
        line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Whatever pytest plugins this machine has are none of the example's business.
    alone = {"TUNEKIT_STRICT_PLUGINS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {**os.environ, "PYTHONPATH": str(site), **alone}


@pytest.fixture(scope="module")
def seen(environment, tiny_directory: Path, made_once) -> dict:
    """What a short run shows in a process where the plugin is installed."""
    rows = ", ".join(
        f'{{ prompt = "{ask}", completion = "{answer}" }}' for ask, answer in (("one", "1"), ("three", "3"))
    )

    def fill(place: Path) -> None:
        recipe = place / "recipe.toml"
        recipe.write_text(RECIPE.format(model=tiny_directory.as_posix(), rows=rows), encoding="utf-8")
        arguments = map(str, (recipe, place / "run", EXAMPLE / "tests"))
        command = [sys.executable, "-W", "error", "-c", SCRIPT, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        (place / "output.txt").write_text(done.stdout, encoding="utf-8")

    output = (made_once("bitfit", fill) / "output.txt").read_text(encoding="utf-8")
    return {**json.loads(output.splitlines()[-1]), "output": output}


def test_it_is_listed_with_its_distribution_and_version(seen):
    assert seen["plugins"]["bitfit"] == [PROJECT["name"], PROJECT["version"], "loaded"]


def test_a_recipe_finds_it_by_name(seen):
    assert seen["adapter"] == "tunekit_bitfit"


def test_it_trains_what_the_plan_says_and_learns(seen):
    # Two layers with two norms of width 32 each, and the last norm: Llama has no biases.
    assert seen["planned"] == seen["trained"] == 5 * 32
    assert seen["losses"][-1] < seen["losses"][0]
    before, after = seen["metrics"]
    assert after < before


def test_the_run_is_used_again_from_disk(seen):
    now, later = seen["answers"]
    assert now == later != seen["base"]


def test_the_run_says_who_made_it(seen):
    made = {"component": "adapter/bitfit", "distribution": PROJECT["name"], "version": PROJECT["version"]}
    assert seen["made by"] == [made]


def test_its_own_tests_pass(seen):
    assert seen["tests"] == 0, seen["output"][-4000:]
    assert " passed" in seen["output"]


def test_the_whole_method_is_under_forty_lines():
    source = EXAMPLE / "src" / "tunekit_bitfit" / "__init__.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) < 40
