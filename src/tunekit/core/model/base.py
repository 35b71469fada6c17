"""Finding and loading base models and tokenizers: safetensors only, no remote code unless the user allows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.assets import resolve
from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.interfaces import Quantizer
from tunekit.core.model import added_tokens, hub_kernels
from tunekit.core.model.trust import check_repository, reason_of
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class Base:
    """A base model by name, and how much of it is trusted.

    Args:
        model: a Hub id, a directory, or `tunekit:tiny`.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: whether code in the model's repository may run.
        added_tokens: tokens that it is to be given besides its own.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    added_tokens: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for a model that cannot exist: no download, no torch."""
        added_tokens.check_texts(self.added_tokens)
        path = self._path
        try:
            path.exists()
        except OSError as error:
            raise ConfigError(f"{self.model[:40]!r}...: {error.strerror}", "Pipeline.model") from None
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(f"the directory {path} holds no config.json, so it is no model", "Pipeline.model")
        elif path.exists():
            raise ConfigError(f"{path} is a file; name the model's directory", "Pipeline.model")
        elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.model):
            raise ConfigError(f"there is no directory {self.model!r}, and a Hub id it cannot be", "Pipeline.model")

    def model_type(self) -> str:
        """The architecture by transformers' name ("llama"), where it stands in a local directory; else empty."""
        path = self._path / "config.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", ""))
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"cannot read {path}: {error}", "Pipeline.model") from None

    def config(self) -> PretrainedConfig:
        """The model's configuration; ConfigError for one that is no causal language model."""
        from transformers import AutoConfig

        config: PretrainedConfig = self._load(AutoConfig)
        _check_causal(config, self.model)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, without added tokens."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    def codec(self, template: str | None = None) -> Codec:
        """How rows become tokens, added ones among them; `template` None takes the model's own, if any."""
        tokenizer = self.tokenizer()
        own = Codec(tokenizer, template)
        if not self.added_tokens:
            return own
        added_tokens.add(tokenizer, self.added_tokens, own.template)
        return Codec(tokenizer, template)

    def added_ids(self, codec: Codec) -> tuple[int, ...]:
        """The ids of the added tokens, in their order."""
        return tuple(codec.tokenizer.convert_tokens_to_ids(list(self.added_tokens)))

    def empty(self, dtype: str = "float32", added_ids: Sequence[int] = ()) -> PreTrainedModel:
        """The model without weights, on the meta device, with rows for added tokens: parameters can be counted.

        `dtype` is torch's name of theirs.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config(), trust_remote_code=self.trust_remote_code)
            added_tokens.make_room(model, added_ids)
        return model.to(getattr(torch, dtype))

    def load(self, *, device: str, dtype: str, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
        """The model with its weights on `device`, in evaluation mode.

        Args:
            device: where the weights go ("cpu", "cuda", "cuda:1").
            dtype: torch's name of their dtype.
            options: more arguments of `from_pretrained`: what a quantizer's `load_kwargs` returned.

        Raises:
            ConfigError: it cannot be found or read, or its file lacks weights that the architecture has.
        """
        import torch
        from transformers import AutoModelForCausalLM

        model, report = self._load(
            AutoModelForCausalLM,
            dtype=getattr(torch, dtype),
            device_map=device,
            use_safetensors=True,
            output_loading_info=True,
            **(options or {}),
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            # transformers would fill them with random numbers and only log it.
            lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ConfigError(
                f"{self.model!r} lacks {len(lacking)} weights of its architecture: {lacking[0]}, ...", "model"
            )
        return model.eval()

    def weight_files(self) -> list[Path]:
        """The safetensors files that its weights are in; none where the repository has none."""
        from transformers.utils import cached_file

        def find(name: str) -> Path:
            return Path(str(cached_file(self._source, name, revision=self.revision or "main")))

        try:
            return [find("model.safetensors")]
        except OSError:
            pass
        try:
            index = json.loads(find("model.safetensors.index.json").read_text(encoding="utf-8"))
        except OSError:
            return []
        names = sorted(set(index["weight_map"].values()))
        if strange := [name for name in names if PureWindowsPath(name).name != name]:
            raise ConfigError(
                f"{self.model!r} has weights in {strange[0]!r}, outside of its directory", "Pipeline.model"
            )
        return [find(name) for name in names]

    @property
    def label(self) -> str:
        """What to call it in files that others read: its id, or of a directory the last name, without the way there."""
        return label_of(self.model)

    @property
    def _source(self) -> str:
        """The directory if there is one, else the Hub id."""
        return str(self._path) if self._path.is_dir() else self.model

    @property
    def _path(self) -> Path:
        return Path(resolve(self.model)).expanduser()

    def _load(self, auto: Any, **options: Any) -> Any:
        """`from_pretrained` of one of transformers' Auto classes, from the directory if there is one, else the Hub."""
        hub_kernels.keep_out()  # before any of transformers' models is imported, its configuration included
        try:
            if not self.trust_remote_code:
                check_repository(self._source, self.revision)
            with no_progress_bars():
                return auto.from_pretrained(
                    self._source, revision=self.revision or "main", trust_remote_code=self.trust_remote_code, **options
                )
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            reason = reason_of(error, self._source)
            raise ConfigError(f"cannot load {self.model!r}: {reason}", "Pipeline.model") from error


@attrs.frozen(kw_only=True)
class Loaded:
    """A model in memory and what is needed to talk to it."""

    model: Any
    codec: Codec
    context: Context


def label_of(model: str) -> str:
    """A model's id; of a local directory the last name, since the way there is of one machine only."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _check_causal(config: PretrainedConfig, model: str) -> None:
    """Raise ConfigError unless it is a decoder by itself: one that predicts each token from those before it.

    transformers makes a causal language model of BERT, too: one that sees the tokens it is to predict.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    what = ""
    if config.is_encoder_decoder:
        what = "an encoder and a decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "an encoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        what = "no language model that transformers knows"
    if what:
        raise ConfigError(
            f"{model!r} is {what} ({config.model_type}), and a pipeline trains causal language models: Llama, Qwen, "
            "Mistral, Gemma, Phi, GPT-2 and their like; with a training loop of your own, use the method's attach",
            "Pipeline.model",
        )


def load_base(base: Base, quantizer: Quantizer | None, codec: Codec, context: Context) -> PreTrainedModel:
    """The base model as a run uses it: quantized if asked for, and stopping at every stop token of the template.

    Rows of embedding and head for the tokens of `context.added_ids` are the mean of those of all other tokens.
    """
    options = quantizer.load_kwargs(context) if quantizer else {}
    model = base.load(device=context.device, dtype=context.dtype, options=options)
    added_tokens.make_room(model, context.added_ids)
    added_tokens.start_at_mean(model, codec.tokenizer, context.added_ids)
    if quantizer:
        model = quantizer.prepare(model, context)
    stop_at(model, codec)
    return model


LoadBase = Callable[[Base, Quantizer | None, Codec, Context], Any]
"""`load_base`, or what gives the same without reading it again."""


def stop_at(model: PreTrainedModel, codec: Codec) -> None:
    """Have the model stop at every stop token of the template, besides its own."""
    own = model.generation_config.eos_token_id
    stops = [own] if isinstance(own, int) else list(own or [])
    model.generation_config.eos_token_id = list(dict.fromkeys([*stops, *codec.stop_ids]))


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens that the model was made for; None where its configuration does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        found = getattr(config.get_text_config(), name, None)
        if isinstance(found, int):
            return found
    return None


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would fight with ours; restored afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
