"""`PeftMethod`: an adapter method that PEFT implements needs one method, `peft_config`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tunekit.core.component import Context
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import added_tokens, masters, packed, targets
from tunekit.core.model.base import label_of
from tunekit.core.model.dequantize import empty
from tunekit.core.model.quick_imports import import_bitsandbytes
from tunekit.core.model.trust import check_adapter
from tunekit.errors import ConfigError, NotSupported

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


class PeftMethod(AdapterMethod):
    """An adapter method of PEFT: attaching, saving in PEFT's own file layout, loading and merging are done here.

    A subclass gives `peft_config(context)`: a fresh configuration each time, since PEFT writes into it. Its
    `target_modules` may be what `targets` of the built-in methods may be; `attach` finds the modules they stand for,
    and has the task say "SEQ_2_SEQ_LM", or nothing, where it says "CAUSAL_LM" of a model that is none.
    """

    adapts_conv1d: ClassVar[bool] = True
    """Whether it can adapt the Conv1D layers of GPT-2, whose weights stand transposed."""
    reads_shapes: ClassVar[bool] = False
    """Whether PEFT's code for it takes the shape of a layer from its weight, which a packed weight does not have."""

    @abstractmethod
    def peft_config(self, context: Context) -> PeftConfig:
        """The PEFT configuration for a run with these facts (`context.total_steps` are known by now)."""

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Wrap `model` by PEFT; the adapter's parameters are float32, whatever the base's dtype."""
        import_bitsandbytes()  # as PEFT does, only quicker
        from peft import get_peft_model

        config = self.peft_config(context)
        if config.task_type == "CAUSAL_LM":
            config.task_type = task_of(model)
        if hasattr(config, "target_modules"):
            self.place(config, model)
        if context.added_ids:
            self._train_rows(config, model, context.added_ids)
        try:
            with _quiet():
                wrapped = get_peft_model(self._shown(model), config)
        except ValueError as error:
            raise ConfigError(f"{error}", self.name) from error
        masters.train_in_float32(wrapped)
        # PEFT notes the path the base was loaded from, which others have not, and no revision at all.
        config.base_model_name_or_path = label_of(context.model_id)
        config.revision = getattr(model.config, "_commit_hash", None)
        packed.keep_dtypes(wrapped)
        return wrapped

    def place(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Put the names of the modules of `model` that are to be adapted into `config`, for PEFT to find exactly them.

        Where `config` names none, those that PEFT lists for the architecture are left to it.

        Raises:
            ConfigError: a target matches nothing, cannot be adapted by this method, or could not be merged.
        """
        if config.target_modules is None:
            return
        where = f"{type(self).__name__}.targets"
        names = targets.select(model, config.target_modules, where)
        if layers := getattr(config, "layers_to_transform", None):
            names = targets.of_layers(names, layers, f"{type(self).__name__}.layers")
            config.layers_to_transform = None  # PEFT does not apply it to full names
        transposed = [] if self.adapts_conv1d else _conv1d(model, names)
        if transposed:
            raise ConfigError(f"{self.name} cannot adapt the Conv1D layer {transposed[0]}; LoRA and IA3 can", where)
        whole = getattr(config, "modules_to_save", None) or []
        if whole:  # PEFT passes over a name that is not there
            targets.select(model, whole, f"{type(self).__name__}.trained_modules")
        for name in targets.tied(model):
            if name in names or any(targets.ends_with(name, module) for module in whole):
                raise ConfigError(
                    f"{name} shares its weight with the other end of the model (tie_word_embeddings): adapting one end "
                    "alone would be undone or doubled when it is merged or loaded; leave it out",
                    where,
                )
        config.target_modules = targets.shorten(names, model)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them."""
        # It writes inference_mode=True by itself; set here, p-tuning would save, and go on with, its network's input.
        # PEFT's "auto" asks the Hub on every save whether the vocabulary was resized, to then save all of its rows;
        # those of added tokens are saved in any case.
        model.save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """A PeftModel over `model` with the saved adapter, for inference; ConfigError if its tensors do not fit."""
        import_bitsandbytes()
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        check_adapter(directory, self.name)
        try:
            with _quiet():
                warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error here
                # By itself, PEFT reads everything into the first GPU that it sees.
                loaded = PeftModel.from_pretrained(self._shown(model), directory, torch_device=str(model.device))
                if _hold_whole(loaded):  # PEFT has rounded what it put there
                    set_peft_model_state_dict(loaded, load_file(directory / "adapter_model.safetensors"))
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ConfigError(f"cannot load the adapter in {directory}: {error}", self.name) from error
        _check_names(loaded, directory)
        packed.keep_dtypes(loaded)
        return loaded

    def merge(self, model: PeftModel, context: Context) -> PreTrainedModel:
        """A plain model: the product of the adapter added in float32 to the base, which is used up, then cast once."""
        if context.quantization:
            raise NotSupported(f"{self.name}: merging onto a {context.quantization} base is not supported")
        masters.forget(model)
        dtype = next(model.base_model.parameters()).dtype
        return model.float().merge_and_unload(safe_merge=True).to(dtype)

    def _train_rows(self, config: PeftConfig, model: PreTrainedModel, ids: Sequence[int]) -> None:
        """Have PEFT train the rows of `ids`, in float32, unless the whole module is trained.

        Raises:
            ConfigError: the configuration has no field for it, or PEFT would compute something else.
        """
        where = added_tokens.WHERE
        if not hasattr(config, "trainable_token_indices"):
            raise ConfigError(f"PEFT's {type(config).__name__} has no trainable_token_indices", where)
        names = {module: name for name, module in model.named_modules()}
        indices = {}
        for end in added_tokens.ends(model):
            name = names[end]
            if any(targets.ends_with(name, whole) for whole in config.modules_to_save or []):
                continue
            if any(targets.ends_with(name, target) for target in config.target_modules or []):
                raise ConfigError(f"{name} is adapted, so its rows cannot be trained besides; train it whole", where)
            if getattr(end, "bias", None) is not None:
                # PEFT's wrapper multiplies with the weight, and adds no bias.
                raise ConfigError(f"{name} has a bias, which PEFT loses where it trains rows; Full can do it", where)
            indices[name] = list(ids)
        config.trainable_token_indices = indices or None

    def _shown(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model as PEFT can adapt it."""
        if self.reads_shapes:
            packed.show_shapes(model)
        return model


def _conv1d(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the modules that are Conv1D, or would be without quantization: exports are merged onto a plain base."""
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    plain = empty(model) if quantized else model
    return [name for name in names if type(plain.get_submodule(name)).__name__ == "Conv1D"]


def _hold_whole(model: PeftModel) -> bool:
    """Have modules that were trained whole in float32, which PEFT copies in the base's dtype; whether any is."""
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    widened = masters.widen(parameter for wrapper in wrappers for parameter in wrapper.modules_to_save.parameters())
    masters.see_rounded(model, widened)
    return bool(widened)


def _check_names(model: PeftModel, directory: Path) -> None:
    """Raise ConfigError unless the model has all that is stored, and no more: PEFT at most warns of it."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    path = directory / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        stored = set(file.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it thinks of the shapes: only names are asked for
        needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if lacking := sorted(needed - stored):
        raise ConfigError(f"it lacks {len(lacking)} tensors that the model needs: {lacking[0]}, ...", str(path))
    if strange := sorted(stored - needed):
        raise ConfigError(f"it has {len(strange)} tensors that fit nowhere: {strange[0]}, ...", str(path))


def task_of(model: PreTrainedModel) -> str | None:
    """PEFT's word for what `model` generates; None for one that does not, which its wrappers for the others refuse."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's call of a name that transformers renamed, and its note that GPT-2's weights stand transposed.

    It handles both by itself: nothing a user could do about them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        yield
