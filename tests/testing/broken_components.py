"""Components that each break one promise of their interface, beside the healthy ones they are derived from.

Where a class has a field `fault`, the empty one is healthy. Nothing heavy is imported at the top: that is a promise.
"""

import copy
import itertools
import os
import random
from pathlib import Path

import attrs

from tunekit import AdapterMethod, ConfigError, DataSource, Evaluator, Measured, Quantizer, Trainer, TrainResult
from tunekit.core.evaluation.predicting import evaluating, predictions

COUNTER = itertools.count()


def remember(component):
    """Write to a frozen component by the back door."""
    object.__setattr__(component, "_memory", next(COUNTER))


@attrs.frozen(kw_only=True)
class Words(DataSource):
    """A few words.

    Args:
        fault: what is wrong.
    """

    name = "words"
    fault: str = ""

    def splits(self):
        return {"list": ["train"], "no train": ("test",)}.get(self.fault, ("train",))

    def load(self, split):
        if split not in self.splits() and self.fault != "any split":
            raise ConfigError(f"there is no split {split!r}")
        if self.fault == "memory":
            remember(self)
        if self.fault == "no rows":
            return
        yield {"text": f"{next(COUNTER)}" if self.fault == "new rows" else "one"}
        rows = {
            "columns": {"question": "?"},
            "tokens": {"text": [1, 2]},
            "blank": {"text": " "},
            "roles": {"messages": [{"role": "user", "content": "?"}]},
            "set": {"text": "two", "tags": {1}},
        }
        yield rows.get(self.fault, {"text": "two"})

    def examine(self, split):
        for place, row in super().examine(split):
            yield ("" if self.fault == "no place" else place), ({"text": "three"} if self.fault == "other" else row)


@attrs.frozen(kw_only=True)
class Thawed(Words):
    """Words that can be changed."""


Thawed.__setattr__ = object.__setattr__


@attrs.frozen(kw_only=True)
class WithList(Words):
    """Words with a list."""

    some: list = attrs.field(factory=list)


class Undecorated(Words):
    """Words with a field that is none."""

    size: int = 1


@attrs.frozen
class Positional(Words):
    """Words with a field by position."""

    size: int = 1


@attrs.frozen(kw_only=True)
class CamelCase(Words):
    """Words with a name in the wrong case."""

    name = "CamelCase"


@attrs.frozen(kw_only=True)
class Taken(Words):
    """Words with the name of another component."""

    name = "in-memory"


@attrs.frozen(kw_only=True)
class Undescribed(Words):
    """Words with a field that is not described."""

    size: int = 1


@attrs.frozen(kw_only=True)
class Growing(Words):
    """Words with a converter that changes what it is given a second time."""

    size: int = attrs.field(default=1, converter=lambda size: size + 1)


@attrs.frozen(kw_only=True, init=False)
class Lenient(Words):
    """Words that take whatever they are given."""

    def __init__(self, fault="", **others):
        object.__setattr__(self, "fault", fault)


@attrs.frozen(kw_only=True)
class NeverNone(Words):
    """Words with a field that a recipe cannot set to None."""

    size: int | None = 1


@attrs.frozen(kw_only=True, eq=False)
class Unequal(Words):
    """Words that are not equal to their copies."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def local_class():
    @attrs.frozen(kw_only=True)
    class Local(Words):
        """Words of a class that no other process finds."""

    return Local()


@attrs.frozen(kw_only=True)
class Reading(Words):
    """Words that are read when they are made."""

    def __attrs_post_init__(self):
        Path(os.devnull).read_bytes()


@attrs.frozen(kw_only=True)
class Norms(AdapterMethod):
    """Trains the norms of a model.

    Args:
        fault: what is wrong.
    """

    name = "norms"
    supports = frozenset({"int8"})
    fault: str = ""

    @property
    def starts_as_base(self):
        return self.fault != "says it moves"

    def attach(self, model, context):
        import torch

        for parameter in model.parameters():
            parameter.requires_grad = parameter.dim() == 1
        norms = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.fault == "moved":
            norms[0].data += 1
        if self.fault == "rounded lengths" and norms[0].dtype == torch.bfloat16:
            norms[0].data *= 1.004
        if self.fault == "blind to bits" and context.quantization:
            model.requires_grad_(False)
        if self.fault == "nothing":
            model.requires_grad_(False)
        if self.fault in ("all and more", "unused"):
            model.register_parameter("more", torch.nn.Parameter(torch.zeros(3)))
        if self.fault == "all and more":
            model.requires_grad_(True)
        if self.fault == "values" and norms[0].is_meta:
            norms[0].requires_grad = False
        if self.fault == "noise":
            generator = torch.Generator()
            generator.seed()
            norms[0].data += torch.rand(norms[0].shape, generator=generator)
        if self.fault == "wrong sign":
            for norm in norms:
                norm.register_hook(torch.neg)
        if self.fault == "evaluations count":
            model.evaluations = 0
            next(model.children()).register_forward_hook(lambda module, inputs, output: self._count(model, output))
        if self.fault == "computed once":
            model.calls = 0
            layer = model.get_submodule("model.layers.1.mlp")
            layer.register_forward_hook(lambda module, inputs, output: self._odd(model, output))
        if self.fault == "coarse" and norms[0].dtype == torch.bfloat16:
            model.register_parameter("more", torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
        if self.fault == "widens":
            layer = model.get_submodule("model.layers.0.self_attn.q_proj")
            layer.register_forward_hook(lambda module, inputs, output: output.float())
        if self.fault == "widens the end":
            model.lm_head.register_forward_hook(lambda module, inputs, output: output.float())
        if self.fault == "more logits":
            model.lm_head.register_forward_hook(lambda module, inputs, output: torch.cat([output[:, :1], output], 1))
        if self.fault == "memory":
            remember(self)
        if self.fault == "shared":
            SHARED[:] = norms
        return model

    def _count(self, model, output):
        model.evaluations += not model.training
        output.last_hidden_state = output.last_hidden_state * (1 + model.evaluations)
        return output

    def _odd(self, model, output):
        model.calls += 1
        return output * (1 + model.calls % 2)

    def extra_loss(self, model):
        return next(model.parameters()).sum(dim=0) if self.fault == "vector" else None

    def after_step(self, model, step):
        first = next(model.parameters()).data
        if self.fault == "writes" or (self.fault == "writes late" and step == 5):
            first += 1
        if self.fault == "stops" and step > 5:
            raise ValueError("no more")
        if self.fault == "forgets":
            model.steps = getattr(model, "steps", 0) + 1
            model.get_parameter("model.norm.weight").data *= 1 + 0.01 * model.steps
        if self.fault == "shared":
            SHARED[0].data *= 1.1

    def train_state(self, model):
        return {"object": Words()} if self.fault == "objects" else {}

    def save(self, model, directory):
        from safetensors.torch import save_file

        trained = {n: p for n, p in model.named_parameters() if p.requires_grad or self.fault == "whole model"}
        if self.fault == "half":
            trained.popitem()
        save_file(trained, directory / "norms.safetensors")
        if self.fault == "pickle":
            (directory / "norms.pt").write_bytes(b"")

    def load(self, model, directory):
        from safetensors.torch import load_file

        model.load_state_dict(load_file(directory / "norms.safetensors"), strict=False)
        if self.fault == "knows bits only" and all(p.is_floating_point() for p in model.parameters()):
            model.get_parameter("model.norm.weight").data *= 2
        return model

    def merge(self, model, context):
        import torch

        if self.fault == "same model":
            model.get_parameter("model.norm.weight").data *= 2
        merged = copy.deepcopy(model)
        if self.fault == "wrong merge":
            merged.get_parameter("model.norm.weight").data *= 2
        if self.fault == "module left":
            merged.adapter = torch.nn.Identity()
        return merged


SHARED = []


@attrs.frozen(kw_only=True)
class EagerNorms(Norms):
    """Imports what it requires before the pipeline could say that it is missing."""

    requires = ("rich",)

    def default_quantizer(self):
        import rich  # noqa: F401


@attrs.frozen(kw_only=True)
class Loop(Trainer):
    """A plain loop over batches.

    Args:
        fault: what is wrong.
        micro_batch_size: rows in one forward pass.
    """

    name = "loop"
    fault: str = ""
    micro_batch_size: int = 2

    def planned_steps(self, rows):
        return -(-rows // 4) + (self.fault == "plans more")

    def fit(self, model, tokenizer, train, *, after_step, extra_loss, validate, run, context):
        import torch

        from tunekit.core.data.batching import supervised_tokens
        from tunekit.core.training.rows_loss import RowsLoss

        chosen = [p for p in model.parameters() if p.requires_grad or self.fault == "trains all"]
        model.requires_grad_(True) if self.fault in ("trains all", "unfreezes") else None
        optimizer = torch.optim.SGD(chosen, lr=0.1)
        if self.fault == "memory":
            remember(self)
        summed_loss = RowsLoss(model=model, pad_id=0, device="cpu")
        rows = list(train)
        if self.fault == "own order":
            random.Random(next(COUNTER)).shuffle(rows)
        end = len(rows) // 4 * 4 if self.fault == "drops" else len(rows)
        step = 0
        for begin in range(0, end, 4):
            step += 1
            batch = rows[begin : begin + 4]
            parts = [batch[at : at + self.micro_batch_size] for at in range(0, len(batch), self.micro_batch_size)]
            for part in parts:
                tokens = sum(map(supervised_tokens, batch))
                if self.fault == "means of means":
                    tokens = len(parts) * sum(map(supervised_tokens, part))
                (summed_loss(model, part) / tokens).backward()
                if self.fault == "extra each part":
                    extra_loss(model)
            extra = extra_loss(model)
            if extra is not None and self.fault != "extra ignored":
                extra.backward()
            if self.fault == "slot before":
                after_step(model, step)
            optimizer.step()
            if self.fault == "slot without gradients":
                optimizer.zero_grad()
            if not self.fault.startswith("slot before"):
                after_step(model, step - (self.fault == "from zero"))
            optimizer.zero_grad()
            if self.fault != "silent":
                run.log(step, {} if self.fault == "empty lines" else {"loss": 1.0})
        return TrainResult(steps=step + (self.fault == "says more"))


@attrs.frozen(kw_only=True)
class Surprise(Evaluator):
    """The mean loss of a token.

    Args:
        fault: what is wrong.
    """

    name = "surprise"
    better = {"surprise": "min"}  # noqa: RUF012
    fault: str = ""

    def evaluate(self, model, tokenizer, data, context):
        import torch
        from torch.nn.functional import cross_entropy

        if self.fault == "memory":
            remember(self)
        if self.fault == "mode":
            model.eval()
        if self.fault == "writes":
            next(model.parameters()).data += 1
        if self.fault == "gradients":
            model.zero_grad()
        if self.fault == "freezes":
            model.requires_grad_(False)
        if self.fault == "draws":
            torch.rand(1)
        with evaluating(model):
            batches = list(predictions(model, tokenizer, data))
        losses = torch.cat([cross_entropy(logits, labels, reduction="none") for logits, labels in batches])
        value = float(losses.mean())
        if self.fault == "first tokens":
            with evaluating(model):
                logits, labels = next(iter(predictions(model, tokenizer, data[:2])))
            value = float(cross_entropy(logits, labels))
        if self.fault == "random":
            value += next(COUNTER)
        if self.fault == "not finite":
            value = float("nan")
        if self.fault == "direction":
            value = -value
        if self.fault == "not JSON":
            return Measured({"surprise": value}, details={"losses": losses})
        if self.fault == "scores of tokens":
            return Measured({"surprise": value}, scores={"surprise": [value, value + 1]})
        if self.fault == "unknown scores":
            return Measured({"surprise": value}, scores={"other": [value]})
        return {
            "other" if self.fault == "another name" else "surprise": losses.mean() if self.fault == "tensor" else value
        }


@attrs.frozen(kw_only=True)
class Int8(Quantizer):
    """Each linear weight as int8 with one scale a row.

    Args:
        fault: what is wrong.
    """

    name = "rounded"
    scheme = "rounded"
    fault: str = ""

    def load_kwargs(self, context):
        if self.fault == "same dict":
            return KWARGS
        return {"dtype": "auto"} if self.fault == "own dtype" else {}

    def prepare(self, model, context):
        import torch

        class Rounded(torch.nn.Module):
            def __init__(self, linear, wrong):
                super().__init__()
                self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
                self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
                self.scale = self.scale * (3 if wrong else 1)

            def forward(self, inputs):
                return inputs @ (self.weight * self.scale).T

        if self.fault == "memory":
            remember(self)
        if self.fault == "does nothing":
            return model
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                model.set_submodule(name, Rounded(module, self.fault == "wrong scale"))
        return model

    def is_quantized(self, module):
        return super().is_quantized(module) or (self.fault == "claims all" and hasattr(module, "weight"))

    def dequantize(self, module):
        weight = module.weight * module.scale
        if self.fault == "half":
            weight = weight.half()
        if self.fault == "doubled":
            weight = weight * 2
        return weight.T if self.fault == "transposed" else weight


@attrs.frozen(kw_only=True)
class BadScheme(Int8):
    """A scheme that no `supports` would list."""

    scheme = "Int 8"


KWARGS: dict = {}
