"""What every arm is given: a model, rows, an initial adapter, on disk; and how much arithmetic a token of it needs."""

import json
import shutil
from pathlib import Path

import attrs

from harness import rows

LLAMA_135M = {"hidden_size": 576, "layers": 30, "heads": 9, "key_heads": 3, "mlp": 1536, "vocabulary": 49152}
SHAPES = {
    "135m": LLAMA_135M,
    "0.5b": {"hidden_size": 896, "layers": 24, "heads": 14, "key_heads": 2, "mlp": 4864, "vocabulary": 151936},
    "small": {"hidden_size": 256, "layers": 8, "heads": 8, "key_heads": 4, "mlp": 704, "vocabulary": 32000},
    "tiny": {"hidden_size": 32, "layers": 2, "heads": 4, "key_heads": 2, "mlp": 64, "vocabulary": 600},
    # Published weights, of ../shared; its own numbers are only needed for counting.
    "stories260k": {"hidden_size": 64, "layers": 5, "heads": 8, "key_heads": 4, "mlp": 172, "vocabulary": 512},
}
"""Shapes of SmolLM2-135M and Qwen2.5-0.5B, with a Llama's layers and random weights, and smaller ones."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@attrs.frozen(kw_only=True)
class Workload:
    """A piece of work that arms are compared on.

    Args:
        shape: the model's, a key of `SHAPES`.
        layers: how many of its layers are kept; None for all.
        vocabulary: its vocabulary; None for the shape's own.
        rank: of LoRA on all linear layers.
        rows_per_step: rows of an optimizer step.
        steps: optimizer steps of one run, of which the first is not measured.
        data: "gsm8k" (the file of ../shared, else rows of its lengths) or "drawn" (random tokens).
        length: tokens of every drawn row; None for the lengths of GSM8K.
        supervised: the share of a drawn row that carries loss; None for GSM8K's.
    """

    shape: str = "135m"
    layers: int | None = None
    vocabulary: int | None = None
    rank: int = 16
    rows_per_step: int = 8
    steps: int = 3
    data: str = "gsm8k"
    length: int | None = None
    supervised: float | None = None

    @property
    def size(self):
        """The shape with what was set otherwise."""
        found = dict(SHAPES[self.shape])
        found["layers"] = self.layers or found["layers"]
        found["vocabulary"] = self.vocabulary or found["vocabulary"]
        return found

    @property
    def reduced(self):
        """What is smaller than in the shape and the usual step of 8 rows, in words."""
        full, parts = SHAPES[self.shape], []
        if self.size["layers"] != full["layers"]:
            parts.append(f"{self.size['layers']} of {full['layers']} layers")
        if self.rows_per_step != 8:
            parts.append(f"{self.rows_per_step} rows a step instead of 8")
        return parts

    @property
    def matrices(self):
        """(in, out) of every linear layer of a block."""
        size = self.size
        width, mlp = size["hidden_size"], size["mlp"]
        keys = width * size["key_heads"] // size["heads"]
        return [(width, width), (width, keys), (width, keys), (width, width), (width, mlp), (width, mlp), (mlp, width)]

    def flops(self, step_rows):
        """Floating-point operations that LoRA on these rows needs: no recomputation, no padding, causal attention.

        4 N + 6 P + 4 s V d + 3 A a token, with N the weights of the blocks, P those of the adapter, V d those of the
        head, which the share s of tokens with loss needs, and A = 2 d S layers the attention of a row of S tokens.
        Full fine-tuning would need 6 N.
        """
        size = self.size
        blocks = size["layers"] * sum(n * m for n, m in self.matrices)
        adapter = size["layers"] * self.rank * sum(n + m for n, m in self.matrices)
        head = size["vocabulary"] * size["hidden_size"]
        total = 0
        for row in step_rows:
            tokens, learned = len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:])
            attention = 2 * size["hidden_size"] * tokens * size["layers"]
            total += tokens * (4 * blocks + 6 * adapter + 3 * attention) + 4 * learned * head
        return total


def prepare(workload, directory):
    """Write `model`, `adapter`, `rows.json` and `workload.json` into `directory`, unless they are there."""
    done = directory / "workload.json"
    if done.exists() and json.loads(done.read_text()) == attrs.asdict(workload):
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tokenizer = rows.tokenizer(workload.shape)
    tokenizer.save_pretrained(directory / "model")
    train, held_out = rows.rows(workload, tokenizer)
    (directory / "rows.json").write_text(json.dumps({"train": train, "held_out": held_out}))
    _write_model(workload, directory)
    done.write_text(json.dumps(attrs.asdict(workload)))


def steps_of(workload, directory):
    """The rows of each step, in the order in which every arm takes them."""
    train = json.loads((directory / "rows.json").read_text())["train"]
    return [train[at : at + workload.rows_per_step] for at in range(0, len(train), workload.rows_per_step)]


def lora(workload):
    """PEFT's configuration of the adapter that every arm trains."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=workload.rank, lora_alpha=2 * workload.rank, target_modules=list(TARGETS)
    )


def _write_model(workload, directory):
    """The model in bfloat16, as such models are published, and an adapter whose B is not zero, so that A learns too."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    size = workload.size
    if workload.shape == "stories260k":
        model = AutoModelForCausalLM.from_pretrained(rows.shared() / "models" / "stories260k", dtype=torch.bfloat16)
    else:
        config = LlamaConfig(
            hidden_size=size["hidden_size"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["key_heads"],
            intermediate_size=size["mlp"],
            vocab_size=size["vocabulary"],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / "model")
    adapted = get_peft_model(model, lora(workload))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    adapted.save_pretrained(directory / "adapter")
    (Path(directory) / "adapter" / "README.md").unlink(missing_ok=True)
