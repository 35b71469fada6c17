"""The five interfaces a plugin implements: DataSource, AdapterMethod, Quantizer, Trainer, Evaluator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunekit.core.component import Component, Context
from tunekit.core.outcomes import TrainResult
from tunekit.errors import ConfigError, DataError, NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tunekit.core.data.codec import Codec
    from tunekit.core.memory.memory_plan import MemoryPlan
    from tunekit.core.run.run_log import RunLog

Example = Mapping[str, Any]
"""One row, never as tokens: `{"messages": [...]}` (with `tools` where there are any), `{"text": ...}`, or a preference,
`{"prompt": [...], "chosen": [...], "rejected": [...]}`; with `group`, a text, where rows belong together."""

Encoded = Mapping[str, Sequence[int]]
"""One row as tokens: `{"input_ids": (time,), "labels": (time,)}`; a label of -100 carries no loss."""


class DataSource(Component):
    """Where rows come from. Making one does no I/O; loading it gives the same rows in the same order each time."""

    kind: ClassVar[Literal["source"]] = "source"
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a run stops at a row that cannot be used, or skips it; skipped rows are counted in plan and result."""

    def splits(self) -> tuple[str, ...]:
        """Names of the splits that `load` takes; "train" is one of them."""
        return ("train",)

    @abstractmethod
    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows of `split`. Raises DataError with `file:line` for a row that cannot be used."""

    def fingerprint(self, split: str) -> str | None:
        """What stands for the content of `split`, where that is quicker to say than to load every row; else None.

        Encoded rows are taken from the cache as long as it stays the same, so it must change whenever what `examine`
        gives changes: by the data, and by the component's own fields. None has the rows hashed at the start of a run.
        """
        return None

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """Yield every row of `split` with its place, `file:line` or `row N`; a bad row as the DataError it gives.

        The sound rows are those of `load`, in the same order. Default: numbers what `load` gives, and ends at the first
        DataError; a source that can go on after a bad row does.
        """
        number = 0
        try:
            for number, row in enumerate(self.load(split), start=1):
                yield f"row {number}", row
        except DataError as error:
            yield f"row {number + 1}", error


class Quantizer(Component):
    """How the base weights are stored in fewer bits."""

    kind: ClassVar[Literal["quantizer"]] = "quantizer"
    scheme: str
    """The storage scheme ("nf4", "int8") that adapter methods list in `supports`."""
    shardable: ClassVar[bool] = False
    """Whether a layer still works with a weight that was cut into pieces and put together by FSDP2: plain bytes."""

    @abstractmethod
    def load_kwargs(self, context: Context) -> dict[str, Any]:
        """Keyword arguments merged into `AutoModelForCausalLM.from_pretrained`."""

    def prepare(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Touch the loaded model before an adapter is attached. Default: leave it as it is."""
        return model

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module`, one of a base without an adapter, is a linear layer that `dequantize` takes.

        Default: it has a weight that is not of a floating-point dtype.
        """
        import torch

        weight = getattr(module, "weight", None)
        return isinstance(weight, torch.Tensor) and not weight.is_floating_point()

    def stored_bytes(self, weight: Tensor) -> tuple[int, int]:
        """Bytes of a linear layer's weight as it is stored, and of what belongs to it, such as scales: for the plan.

        `weight` is on the meta device, of shape (out_features, in_features). Default: as large as it is unquantized.
        """
        return weight.numel() * weight.element_size(), 0

    @abstractmethod
    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight of a quantized linear module as float32, shape (out_features, in_features).

        Exported models are merged onto it, so it must be what the module computes with.
        """


class AdapterMethod(Component):
    """What is trained on top of a base model: parameters added (LoRA), or chosen (biases, the last layers, all)."""

    kind: ClassVar[Literal["adapter"]] = "adapter"
    supports: ClassVar[frozenset[str]] = frozenset()
    """Quantization schemes it can train on; checked before anything is loaded."""
    learning_rate: float = 2e-4
    """A good peak learning rate for it with AdamW; used where the trainer leaves its own open."""
    starts_as_base: bool = True
    """Whether the model predicts what its base does until the first step."""
    trains_base: ClassVar[bool] = False
    """Whether it trains weights of the base itself; they are float32 then, and computed with in the base's dtype."""
    trains_added_tokens: ClassVar[bool] = False
    """Whether it trains, saves and loads the rows of the tokens in `Context.added_ids`, of embedding and head."""

    def earliest_end(self, steps: int) -> int:
        """The step, of so many planned, before which training must not be stopped early. Default: any will do."""
        return 0

    def extra_tokens(self) -> int:
        """Positions of the context it takes from every row, for virtual tokens. Default: none.

        Asked before anything is loaded: ConfigError for fields that `check` cannot judge without a heavy import.
        """
        return 0

    def default_quantizer(self) -> Quantizer | None:
        """The quantizer used when the pipeline names none. Default: no quantization."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Freeze `model`, add parameters, and return the module to train; its `requires_grad` says what is trained."""

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """A scalar added to the loss once per optimizer step, never in evaluation. Default: None."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after `optimizer.step()` and before `zero_grad()`; `step` counts from 1."""

    def train_state(self, model: nn.Module) -> Mapping[str, Any]:
        """What exact resume needs beyond the trained parameters: JSON values and tensors. Default: nothing."""
        return {}

    def load_train_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what `train_state` returned: after `attach` and before the first step, or after the last one."""
        if state:
            raise NotSupported(f"{self.name}: has a train state to restore, but no load_train_state")

    @abstractmethod
    def save(self, model: nn.Module, directory: Path) -> None:
        """Write what was trained, and nothing else, as safetensors into the existing `directory`."""

    @abstractmethod
    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """Put what `save` wrote onto a fresh base `model` and return it, ready for inference."""

    def merge(self, model: nn.Module, context: Context) -> PreTrainedModel:
        """A plain model with the training folded into its weights; `model` is used up: it may be changed for it."""
        raise NotSupported(f"{self.name}: cannot be merged into its base; keep the adapter and the base side by side")


class Trainer(Component):
    """The loop: which rows make a step, how the loss is made, and when the parameters move."""

    kind: ClassVar[Literal["trainer"]] = "trainer"
    max_length: int | None = None
    """Longest row in tokens; None means the context length of the model."""
    on_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a longer row ("split": plain texts, into windows); each is counted in the plan and the result."""
    several_processes: ClassVar[bool] = False
    """Whether `fit` shares the rows of a step among the processes of a run; if not, a run over several is refused."""

    @property
    def sharded(self) -> bool:
        """Whether several processes keep a piece of the model each; `fit` is given one in pieces. Default: no."""
        return False

    @property
    def zero_stage(self) -> int | None:
        """The stage of ZeRO at which `fit` hands the model over to DeepSpeed, 0 to 3. Default: None, it does not."""
        return None

    @abstractmethod
    def planned_steps(self, rows: int) -> int:
        """Optimizer steps that `fit` takes on `rows` training rows, exactly."""

    def peak_learning_rate(self, context: Context) -> float | None:
        """The highest learning rate of a run with these facts, for the plan to show. Default: None, not known."""
        return None

    def checkpoint_bytes(self, model: nn.Module) -> int | None:
        """Bytes of tensors in one checkpoint of `model`, which is on the meta device. Default: None, not known."""
        return None

    def checkpoints_kept(self) -> int:
        """How many checkpoints are on disk at once, at most. Default: 1."""
        return 1

    def plan_memory(
        self,
        model: Callable[[], nn.Module],
        train: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        quantizer: Quantizer | None,
        context: Context,
        *,
        unless_roomy: PretrainedConfig | None = None,
    ) -> MemoryPlan | None:
        """What a step will need of memory, counted before any weights are loaded. Default: None, not known.
        ConfigError, with what is needed by part, where the memory that the user allows does not suffice.

        Args:
            model: makes the model with the method attached, on the meta device; a new one each time.
            train: encoded rows.
            tokenizer: for its pad token.
            quantizer: how the base will be stored.
            context: the facts of the run, its device and dtype among them.
            unless_roomy: the model's configuration, where None will do if there is plenty of memory: for a run.
        """
        return None

    def encode(self, example: Example, codec: Codec) -> Encoded:
        """Turn one row into tokens and labels. Default: supervised fine-tuning on what the assistant says."""
        return codec.encode(example)

    def encoding(self) -> str:
        """What `encode` depends on besides the row and the codec; encoded rows are kept for it. Default: all fields."""
        return repr(self)

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Encoded],
        *,
        after_step: Callable[[nn.Module, int], None],
        extra_loss: Callable[[nn.Module], Tensor | None],
        validate: Callable[[], Mapping[str, float]] | None,
        run: RunLog,
        context: Context,
    ) -> TrainResult:
        """Train `model` in place.

        Args:
            model: what `AdapterMethod.attach` returned, on its device.
            tokenizer: for its pad token and decoding.
            train: encoded rows, each at most `max_length` tokens.
            after_step: to be called once per optimizer step with the step's number, counted from 1, after
                `optimizer.step()` and before `zero_grad()`.
            extra_loss: to be called once per optimizer step; its result, if any, is added to that step's loss.
            validate: evaluates on the validation rows; None where there are none.
            run: `run.log(step, ...)` and `run.save(step, ...)`, and what a resumed run starts from (`run.resumed`).
            context: the facts of the run.
        """


class Evaluator(Component):
    """A measure of a model on held-out rows."""

    kind: ClassVar[Literal["evaluator"]] = "evaluator"
    better: ClassVar[Mapping[str, Literal["min", "max"]]]
    """Every metric that `evaluate` returns, and which direction is better; a property where it depends on fields."""
    reads_rows: ClassVar[bool] = True
    """Whether it measures the held-out rows; one with rows of its own is not asked again for a `Prompted` baseline."""

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """Raise DataError if these rows cannot be measured; called before any weights are loaded. Default: all can."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Measure `model` on encoded rows; finite numbers, one for each name in `better`, best as `Measured`.

        Leaves the model's parameters, gradients and mode, and all random states, as they were.
        """


INTERFACES: Mapping[str, type[Component]] = {
    cls.kind: cls for cls in (DataSource, AdapterMethod, Quantizer, Trainer, Evaluator)
}
"""The five interfaces by kind."""


def interface_of(kind: str) -> type[Component]:
    """The interface of a kind; raises ConfigError for a kind that is none of the five."""
    if kind not in INTERFACES:
        raise ConfigError(f"{kind!r} is no kind of component; the kinds are {', '.join(INTERFACES)}")
    return INTERFACES[kind]
