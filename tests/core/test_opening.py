"""A file cannot allow code to run: who reads it does."""

import pytest

import tunekit as tk

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]


@pytest.fixture
def pipeline(tiny_directory):
    trainer = tk.SFT(max_steps=1, batch_size=2)
    parts = {"adapter": tk.LoRA(rank=2), "trainer": trainer, "validation": 0}
    return tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=ROWS), trust_remote_code=True, **parts)


def test_a_recipe_that_lets_code_run_is_refused_unless_its_reader_says_so(pipeline, tmp_path):
    path = tmp_path / "recipe.toml"
    pipeline.save(path)
    with pytest.raises(tk.ConfigError, match=r"trust_remote_code=True to the call that reads this file") as caught:
        tk.load(path)
    assert caught.value.where == f"{path}: recipe.trust_remote_code"
    assert tk.load(path, trust_remote_code=True) == pipeline


def test_a_run_that_let_code_run_is_opened_by_whoever_says_so_and_resumed_by_its_pipeline(pipeline, tmp_path):
    pipeline.run(tmp_path / "run")
    with pytest.raises(tk.ConfigError, match=r"recipe\.trust_remote_code"):
        tk.open_run(tmp_path / "run")
    assert tk.open_run(tmp_path / "run", trust_remote_code=True).generate("repeat 1", max_new_tokens=1) is not None


def test_who_reads_a_recipe_does_not_change_it(pipeline, tmp_path):
    changed = tk.Pipeline.from_dict({**pipeline.to_dict(), "trust_remote_code": False})
    changed.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml", trust_remote_code=True) == changed == tk.load(tmp_path / "recipe.toml")
