"""AdaLoRA: low-rank adaptation that moves its rank to where it matters."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least, between, positive
from tunekit.core.model.peft_method import PeftMethod
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's RankAllocator keeps of each parameter: its last importance, and the moving averages of it."""


@attrs.frozen(kw_only=True)
class AdaLoRA(PeftMethod):
    """Adaptive low-rank adaptation: W becomes W + (alpha / initial_rank) * B @ diag(E) @ A, and rank is moved around.

    A has shape (initial_rank, in_features), B (out_features, initial_rank), E (initial_rank, 1) and starts at zero, so
    the model starts as its base; trained are initial_rank * (in_features + out_features + 1) numbers a matrix. Each
    entry of E with its row of A and column of B is a triplet. Importance is measured at every step, and after the
    warm-up the least important triplets of all matrices together are cut, a few more each interval by a cubic
    schedule, until target_rank times the number of matrices are left; the cool-down trains these. What is saved has
    the ranks that are left. Zhang et al. 2023, https://arxiv.org/abs/2303.10512.

    The triplets stay like singular ones by an extra loss, orthogonality times the mean of ||A A^T - I|| and
    ||B^T B - I|| (Frobenius) over all A and B, as in the authors' code and in PEFT; the paper writes the norms squared.

    Its learning rate, where the trainer leaves it open, is ten times LoRA's: E starts at zero between two small
    matrices. In 90 steps on `tunekit.ORDERS` the held-out loss of `tunekit.TINY` falls from 7.21 to 7.20 at 2e-4 and to
    1.44 at 2e-3 (LoRA at 2e-4: 2.40); the authors take 5e-4 to 2.2e-3.

    Besides the optimizer's state it holds three numbers for each trained one until the last cut. Where no count of
    saved parameters has to be met, LoRA is simpler.

    Args:
        initial_rank: rank of each update at the start; parameters and memory grow with it.
        target_rank: mean rank of the updates at the end.
        alpha: scale of the update, divided by the initial rank; None means twice the initial rank.
        dropout: probability of dropping an input of A while training.
        targets: "all-linear" (every linear layer but the output head), "attention", "mlp", names of modules, or a
            regular expression for the whole name of linear layers.
        warmup: share of the planned steps before the first cut.
        cooldown: share of the planned steps after the last cut.
        interval: steps from one cut to the next.
        orthogonality: weight of the extra loss; 0 for none.
    """

    name = "adalora"
    supports = frozenset({"nf4", "int8"})
    trains_added_tokens = True
    learning_rate = 2e-3

    initial_rank: int = attrs.field(default=12, validator=at_least(1))
    target_rank: int = attrs.field(default=8, validator=at_least(1))
    alpha: float | None = attrs.field(default=None, validator=positive)
    dropout: float = attrs.field(default=0.0, validator=between(0, 1))
    targets: str | tuple[str, ...] = "all-linear"
    warmup: float = attrs.field(default=0.1, validator=between(0, 1))
    cooldown: float = attrs.field(default=0.3, validator=between(0, 1))
    interval: int = attrs.field(default=10, validator=at_least(1))
    orthogonality: float = attrs.field(default=0.5, validator=at_least(0))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.initial_rank < self.target_rank:
            raise ConfigError(f"must be at most initial_rank={self.initial_rank}", "AdaLoRA.target_rank")
        if self.warmup + self.cooldown >= 1:
            raise ConfigError("warmup and cooldown must leave steps between them to cut ranks in", "AdaLoRA.cooldown")

    def peft_config(self, context: Context) -> PeftConfig:
        """PEFT's AdaLoraConfig for the planned steps; ConfigError if they are too few to measure once and then cut."""
        from peft import AdaLoraConfig

        steps = context.total_steps
        if not self._fits(steps):
            needed = next(filter(self._fits, itertools.count(1)))
            raise ConfigError(f"its schedule needs {needed} optimizer steps, and {steps} are planned", "AdaLoRA")
        return AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=self.initial_rank,
            target_r=self.target_rank,
            lora_alpha=2 * self.initial_rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            total_step=steps,
            tinit=int(self.warmup * steps),
            tfinal=int(self.cooldown * steps),
            deltaT=self.interval,
            # PEFT would add the term to the loss of every forward pass with labels: in evaluation too, and once a
            # micro-batch. Here it comes by extra_loss alone.
            orth_reg_weight=0.0,
        )

    def earliest_end(self, steps: int) -> int:
        """The step that cuts down to the target rank: what is stopped before has no adapter of that size."""
        return steps - int(self.cooldown * steps) if self.initial_rank > self.target_rank else 0

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """See `PeftMethod.attach`."""
        attached = super().attach(model, context)
        for layer in _layers(attached):
            # PEFT's divisor of alpha: where it has to be moved to the base's device or dtype, PEFT makes it trainable.
            layer.ranknum.requires_grad_(False)
        return attached

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """The orthogonality term; its weight included."""
        import torch

        if not self.orthogonality:
            return None
        products = []
        for layer in _layers(model):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            products += [a @ a.T, b.T @ b]  # (rank, rank)
        found = torch.stack(products)  # (2 * layers, rank, rank): together, a GPU is asked once and not for each
        identity = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
        return self.orthogonality * torch.linalg.matrix_norm(found - identity).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Measure importance and cut ranks, as far as the schedule asks for it at this step."""
        if self.initial_rank == self.target_rank:
            return  # nothing to cut, at which PEFT's allocator fails
        if any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters()):
            raise TrainingError(
                "AdaLoRA found parameters without a gradient after a step: importance is measured on gradients, so "
                "after_step must come before zero_grad(), and every adapted module must be in use"
            )
        model.base_model.update_and_allocate(step)

    def train_state(self, model: nn.Module) -> Mapping[str, Any]:
        """The allocator's moving averages and the ranks so far."""
        allocator = model.base_model.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in AVERAGES}
        return {**averages, "rank_pattern": model.peft_config["default"].rank_pattern}

    def load_train_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what `train_state` returned."""
        allocator = model.base_model.rankallocator
        devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
        for kept in AVERAGES:
            setattr(allocator, kept, {name: value.to(devices[name]) for name, value in state[kept].items()})
        model.peft_config["default"].rank_pattern = state["rank_pattern"]

    def save(self, model: nn.Module, directory: Path) -> None:
        """Save the triplets that are left, in PEFT's layout; TrainingError unless the budget is spent."""
        layers = _layers(model)
        goal = self.target_rank * len(layers)
        kept = sum(map(sum, (model.peft_config["default"].rank_pattern or {}).values()))
        live = sum(int(layer.lora_E["default"].count_nonzero()) for layer in layers)
        if self.initial_rank > self.target_rank and not live <= kept == goal:
            raise TrainingError(
                f"AdaLoRA's budget is not spent: {live} triplets are in use and {kept} allotted, where {goal} should "
                "be left; the trainer must take all planned steps and call after_step after each"
            )
        with warnings.catch_warnings():
            # A matrix may well lose all its rank. PEFT takes that for a shard of DeepSpeed's.
            warnings.filterwarnings("ignore", message=r".*have invalid shape")
            super().save(model, directory)

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """See `PeftMethod.load`."""
        with warnings.catch_warnings():
            # PEFT reads the keys as LoRA's, and says that they "were ignored". AdaLoRA's own code applies them.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            loaded = super().load(model, directory)
        # PEFT's forward pass asks for it where labels are given, and sets it for training only.
        loaded.base_model.trainable_adapter_name = "default"
        return loaded

    def _fits(self, steps: int) -> bool:
        """Whether there is a step to measure importance on before the step that cuts down to the target."""
        return steps - int(self.cooldown * steps) >= 2


def _layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
