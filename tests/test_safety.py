"""Nothing that was downloaded runs code, unless the user wrote `trust_remote_code=True`; and nobody is asked.

Every file that could be loaded holds a sentinel: a file that would be there if its code had run.
"""

import builtins
import io
import json
import pickle
import sys

import pytest
import torch
from safetensors import SafetensorError

import tunekit as tk
from tunekit.core.model.base import Base
from tunekit.core.run import adapter_files, checkpoint
from tunekit.testing import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]


class Payload:
    """Touches a file when it is unpickled carelessly."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


@pytest.fixture(autouse=True)
def sentinel(tmp_path, monkeypatch):
    """The file that hostile code would make; nobody answers a prompt, and a module named `evil` can be imported."""

    def asked(prompt=""):
        pytest.fail(f"somebody was asked: {prompt}")

    place = tmp_path / "sentinel"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "evil.py").write_text(code(place))
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtins, "input", asked)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    yield place
    sys.modules.pop("evil", None)


def code(sentinel):
    """A module that touches the sentinel, and has whatever it may be asked for."""
    return f"""
from pathlib import Path
Path({str(sentinel)!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **options):
    return options["input_ids"]
"""


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def make(model, **changes):
    parts = {"data": tk.InMemory(rows=ROWS), "validation": 0.25, "adapter": tk.LoRA(rank=2)}
    trainer = tk.SFT(max_steps=2, batch_size=2, save_every=1)
    return tk.Pipeline(model=str(model), trainer=trainer, **{**parts, **changes})


def use(pipeline, directory):
    """Everything that can be done with a pipeline; returns the error it ended with, if any."""
    try:
        pipeline.check()
        pipeline.plan()
        run = pipeline.run(directory / "run")
        run.generate("repeat 1", max_new_tokens=2)
        run.export(directory / "merged")
        tk.open_run(directory / "run").generate("repeat 1", max_new_tokens=2)
    except tk.TunekitError as error:
        return str(error)
    return None


# Model repositories --------------------------------------------------------------------------------------------------

AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}


def pickled_beside(base, sentinel):
    torch.save({"lm_head.weight": Payload(sentinel)}, base / "pytorch_model.bin")


def pickled_instead(base, sentinel):
    pickled_beside(base, sentinel)
    (base / "model.safetensors").unlink()


def pickled_elsewhere(base, sentinel):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "tokenizer.pkl", "scaler.pt"):
        torch.save({"state": Payload(sentinel)}, base / name)


def code_of_a_known_model(base, sentinel):
    change(base / "config.json", auto_map=AUTO)


def code_of_a_model(base, sentinel):
    change(base / "config.json", auto_map=AUTO, model_type="evil", architectures=["Model"])


def code_that_trusts_itself(base, sentinel):
    code_of_a_model(base, sentinel)
    change(base / "config.json", trust_remote_code=True, _trust_remote_code=True)
    change(base / "generation_config.json", trust_remote_code=True)
    change(base / "tokenizer_config.json", trust_remote_code=True)


def code_of_a_tokenizer(base, sentinel):
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    change(base / "tokenizer_config.json", tokenizer_class="EvilTokenizer")


def code_that_generates(base, sentinel):
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(code(sentinel))
    change(base / "generation_config.json", custom_generate=str(base))


def a_kernel(base, sentinel):
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
    change(base / "config.json", **dict.fromkeys(names, "evil/kernel"))


def a_quantizer(base, sentinel):
    change(base / "config.json", quantization_config={"quant_method": "evil", "modules": "evil"})


def an_adapter(base, sentinel):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
    megatron = {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    (base / "adapter_config.json").write_text(json.dumps({**config, **megatron}))
    torch.save({"weight": Payload(sentinel)}, base / "adapter_model.bin")


def yaml_tags(base, sentinel):
    tag = f"!!python/object/apply:os.system ['touch {sentinel}']"
    (base / "README.md").write_text(f"---\nlicense: {tag}\n---\n")
    for name in ("config.yaml", "adapter_config.yaml", "model.yaml"):
        (base / name).write_text(f"model: {tag}\n")


def modules_of_known_names(base, sentinel):
    for name in ("conftest.py", "setup.py", "__init__.py", "sitecustomize.py", "torch.py", "modeling_llama.py"):
        (base / name).write_text(code(sentinel))


BASES = {
    pickled_beside: None,
    pickled_instead: "safetensors",
    pickled_elsewhere: None,
    code_of_a_known_model: None,
    code_of_a_model: "trust_remote_code=True",
    code_that_trusts_itself: "trust_remote_code=True",
    code_of_a_tokenizer: "trust_remote_code=True",
    code_that_generates: None,
    a_kernel: "trust_remote_code=True",
    a_quantizer: None,
    an_adapter: "adapter_config.json",
    yaml_tags: None,
    modules_of_known_names: None,
}
"""What is in a model's directory, and what the error says; None where the file is left alone and all goes well."""


@pytest.fixture
def base(tmp_path, sentinel):
    place = tmp_path / "base"
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    (place / "evil.py").write_text(code(sentinel))
    return place


@pytest.mark.parametrize("spoil", BASES, ids=lambda spoil: spoil.__name__)
def test_no_code_of_a_model_repository_runs(base, tmp_path, monkeypatch, sentinel, spoil):
    spoil(base, sentinel)
    monkeypatch.chdir(base)
    error = use(make(base), tmp_path)
    assert not sentinel.exists()
    says = BASES[spoil]
    assert error is None if says is None else (error and says in error)


@pytest.mark.parametrize("spoil", [code_of_a_model, code_of_a_tokenizer, code_that_generates])
def test_code_of_a_model_repository_runs_where_the_user_allows_it(base, tmp_path, sentinel, spoil):
    spoil(base, sentinel)
    use(make(base, trust_remote_code=True), tmp_path)
    assert sentinel.exists(), "the sentinel would not tell"


def test_kernels_of_the_hub_are_named_by_the_user_alone_parts_of_a_configuration_included(base):
    change(base / "config.json", text_config={"_attn_implementation": {"": "evil/kernel"}})
    with pytest.raises(tk.ConfigError, match=r"text_config\._attn_implementation"):
        Base(model=str(base)).config()


# Adapters ------------------------------------------------------------------------------------------------------------


def adapter_pickled_beside(adapter, sentinel):
    torch.save({"weight": Payload(sentinel)}, adapter / "adapter_model.bin")


def adapter_pickled_instead(adapter, sentinel):
    adapter_pickled_beside(adapter, sentinel)
    (adapter / "adapter_model.safetensors").unlink()


def adapter_pickled_as_safetensors(adapter, sentinel):
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Payload(sentinel)))


def adapter_states(adapter, sentinel):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": Payload(sentinel)}, adapter / name)


def adapter_auto_mapping(adapter, sentinel):
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    change(adapter / "adapter_config.json", auto_mapping=mapping, task_type=None)


def adapter_megatron(adapter, sentinel):
    change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")


def retyped(adapter, **fields):
    """The adapter's configuration, of another type of PEFT."""
    common = {"task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps({**common, **fields}))


def adapter_of_text(adapter, sentinel):
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "num_virtual_tokens": 2}
    tokenizer = {"tokenizer_name_or_path": str(adapter), "tokenizer_kwargs": {"trust_remote_code": True}}
    retyped(adapter, peft_type="PROMPT_TUNING", **text, **tokenizer)
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    (adapter / "evil.py").write_text(code(sentinel))


def adapter_of_adapters(adapter, sentinel):
    other = adapter.parent / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    adapter_pickled_beside(other, sentinel)
    retyped(adapter, peft_type="XLORA", adapters={"0": str(other)}, hidden_size=32)


ADAPTERS = [
    adapter_pickled_beside,
    adapter_pickled_instead,
    adapter_pickled_as_safetensors,
    adapter_states,
    adapter_auto_mapping,
    adapter_megatron,
    adapter_of_text,
    adapter_of_adapters,
]
HARMLESS = [adapter_pickled_beside, adapter_states, adapter_auto_mapping]
"""What is left alone: PEFT takes the base that it is given."""


@pytest.mark.parametrize("spoil", ADAPTERS, ids=lambda spoil: spoil.__name__)
def test_no_code_of_an_adapter_runs(base, tmp_path, sentinel, spoil):
    adapter = make(base).run(tmp_path / "run").directory / "adapter"
    stated = json.loads((adapter / adapter_files.PROVENANCE).read_text())
    spoil(adapter, sentinel)
    with pytest.raises(tk.TunekitError):  # whoever changed it, it is not what was saved
        tk.open_run(tmp_path / "run").generate("repeat 1", max_new_tokens=2)
    if spoil is not adapter_pickled_as_safetensors:
        adapter_files.seal(adapter, stated)  # as the one who made it would
    run = tk.open_run(tmp_path / "run")
    if spoil in HARMLESS:
        run.generate("repeat 1", max_new_tokens=2)
        run.export(tmp_path / "merged")
    else:
        for act in (lambda: run.generate("repeat 1", max_new_tokens=2), lambda: run.export(tmp_path / "merged")):
            with pytest.raises(tk.TunekitError):
                act()
    assert not sentinel.exists()
    assert "evil" not in sys.modules


def test_a_method_of_peft_reads_no_pickle(base, tmp_path, sentinel):
    method = tk.LoRA(rank=2)
    model = method.attach(tiny_model(), tk.Context(model_id="tiny"))
    method.save(model, tmp_path)
    adapter_pickled_instead(tmp_path, sentinel)
    with pytest.raises(tk.ConfigError, match=r"in a pickle \(adapter_model\.bin\), which is not read"):
        method.load(tiny_model(), tmp_path)
    assert not sentinel.exists()


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["state.pt", "parameters.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
)
def test_no_code_of_a_checkpoint_runs(base, tmp_path, sentinel, name):
    class Stop:
        @tk.hookimpl
        def tunekit_saved(self):
            raise KeyboardInterrupt

    pipeline = make(base)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path / "run", observers=[Stop()])
    (place,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    known = (place / name).exists()
    torch.save({"trainer": Payload(sentinel), "random": Payload(sentinel)}, place / name)
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    manifest["sha256"][name] = checkpoint.sha256(place / name)
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    if known:
        with pytest.raises((tk.TunekitError, SafetensorError)):
            pipeline.run(tmp_path / "run", resume=True)
    else:
        assert pipeline.run(tmp_path / "run", resume=True).metrics
    assert not sentinel.exists()


# Recipes -------------------------------------------------------------------------------------------------------------

NAMES = [
    "os.system",
    "evil",
    "evil:Model",
    "evil.Model",
    "tunekit.plugins:os",
    "../evil",
    "evil/Model",
    "builtins/exec",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["data", "adapter", "trainer", "quantizer", "evaluators"])
def test_a_recipe_names_components_and_nothing_that_could_be_imported(base, tmp_path, sentinel, part, name):
    table = make(base).to_dict()
    table[part] = [{"use": name}] if part == "evaluators" else {"use": name}
    with pytest.raises(tk.TunekitError, match="named"):
        tk.Pipeline.from_dict(table)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.toml", "recipe.json"])
@pytest.mark.parametrize("kind", ["tags", "pickle"])
def test_a_recipe_is_toml_whatever_it_is_called(tmp_path, sentinel, name, kind):
    tags = f"model: !!python/object/apply:os.system ['touch {sentinel}']\n".encode()
    (tmp_path / name).write_bytes(tags if kind == "tags" else pickle.dumps(Payload(sentinel)))
    with pytest.raises(tk.ConfigError, match="is no TOML"):
        tk.load(tmp_path / name)
    assert not sentinel.exists()


# Templates and data --------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch SENTINEL') }}",
    "{{ lipsum.__globals__['os'].system('touch SENTINEL') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (namespace() | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__[os]}'.format(namespace) }}",
    "{{ self.__init__.__globals__.__builtins__.open('SENTINEL', 'w') }}",
    "{{ raise_exception.__globals__['json'].codecs.open('SENTINEL', 'w') }}",
    "{% include 'SENTINEL' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "pipeline"])
def test_no_template_leaves_its_sandbox(base, tmp_path, sentinel, template, place):
    text = template.replace("SENTINEL", str(sentinel))
    (base / "chat_template.jinja").unlink()
    if place == "chat_template.jinja":
        (base / place).write_text(text)
    elif place == "tokenizer_config.json":
        change(base / place, chat_template=text)
    with pytest.raises(tk.TunekitError):
        make(base, template=text if place == "pipeline" else None).plan()
    assert not sentinel.exists()


SOURCES = {
    "json-lines": lambda path: tk.JsonLines(path=str(path)),
    "table": lambda path: tk.Table(path=str(path)),
    "table, named": lambda path: tk.Table(path=str(path), format="parquet"),
    "text": lambda path: tk.TextFiles(path=str(path)),
    "hub": lambda path: tk.Hub(id=str(path)),
}


@pytest.mark.parametrize(
    "name", ["data.py", "data", "data.pkl", "data.jsonl", "data.csv", "data.parquet", "data.arrow"]
)
@pytest.mark.parametrize("source", SOURCES)
def test_no_code_of_a_data_set_runs(base, tmp_path, monkeypatch, sentinel, source, name):
    if source == "hub":
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    elif source.startswith("table"):
        pytest.importorskip("pyarrow")
    place = tmp_path / name
    if name == "data":  # as a data set with a loading script was published
        place.mkdir()
        (place / "data.py").write_text(code(sentinel))
        tag = f"!!python/object/apply:os.system ['touch {sentinel}']"
        (place / "README.md").write_text(f"---\nconfigs: {tag}\n---\n")
        (place / "dataset_infos.json").write_text("{}")
    elif name == "data.py":
        place.write_text(code(sentinel))
    else:
        place.write_bytes(pickle.dumps(Payload(sentinel)))
    try:
        make(base, data=SOURCES[source](place)).plan()
    except tk.TunekitError:
        pass
    else:
        assert source == "text", "any file is text"
    assert not sentinel.exists()


def test_a_name_is_given_to_no_shell(base, tmp_path, monkeypatch, sentinel):
    monkeypatch.chdir(tmp_path)
    make(base).run("run; touch sentinel").export("merged$(touch sentinel)")
    assert not sentinel.exists()
    assert {"run; touch sentinel", "merged$(touch sentinel)"} <= {path.name for path in tmp_path.iterdir()}
