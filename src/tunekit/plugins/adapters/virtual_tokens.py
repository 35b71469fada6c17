"""What prompt and prefix tuning share: a model whose virtual tokens are seen by nobody but its base."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model.base import Base
from tunekit.core.model.peft_method import PeftMethod, task_of
from tunekit.errors import ConfigError, NotSupported

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

CACHES = ("cache", "past_key_values")
"""What models call their cache of keys and values: as transformers does from 5.24 on, and as it did before."""


@attrs.frozen(kw_only=True)
class VirtualTokens(PeftMethod):
    """Base of the methods that put virtual tokens before each row; a subclass says what they start from.

    Args:
        virtual_tokens: how many; they use up as much of the context.
        init_text: a text to start from; None starts from tokens drawn from the vocabulary by the seed.
    """

    supports = frozenset({"nf4", "int8"})
    learning_rate = 3e-2
    starts_as_base = False

    virtual_tokens: int = attrs.field(default=20, validator=at_least(1))
    init_text: str | None = None

    def extra_tokens(self) -> int:
        """The virtual tokens."""
        return self.virtual_tokens

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """See `PeftMethod.load`."""
        return hide(super().load(model, directory))

    merge = AdapterMethod.merge


def check_causal(model: PreTrainedModel, where: str) -> None:
    """Raise ConfigError for a model that does not predict each token from those before it, virtual ones included."""
    counted = next(model.parameters()).is_meta  # where nothing can be run, any model's parameters can be counted
    if task_of(model) != "CAUSAL_LM" and not counted:
        kind = type(model).__name__
        raise ConfigError(f"{kind} is no causal language model to put virtual tokens before; LoRA adapts it", where)


def hide(model: PeftModel) -> PeftModel:
    """`model`, from now on with one row of logits a given token, and with positions that ignore padding.

    PEFT's own forward pass answers for the virtual tokens too, so that logits no longer stand beside their labels; and
    its generation counts the padding on the left between virtual tokens and prompt as a distance, so that a prompt's
    answer depends on what it is batched with.
    """
    # The object's class alone: its tensors and their names stay, and with them what is saved.
    model.__class__ = _model_class()
    return model


def rows(model: PreTrainedModel, count: int, text: str | None, context: Context) -> Tensor:
    """Ids of `count` tokens to start from, (count,): those of `text`, cut or repeated, or drawn from the vocabulary.

    They are drawn by torch's global generator, which the pipeline seeds.

    Raises:
        ConfigError: `text` has no tokens, or one that the model does not know.
    """
    import torch

    weight = model.get_input_embeddings().weight
    if text is None:
        # Drawn on the CPU: the same on every device, the meta device too.
        return torch.randint(len(weight), (count,)).to(weight.device)
    base = Base(model=context.model_id, revision=context.revision, trust_remote_code=context.trust_remote_code)
    ids = base.tokenizer()(text, add_special_tokens=False)["input_ids"]
    if not ids or max(ids) >= len(weight):
        raise ConfigError(f"{text!r} has no tokens that the model knows", "init_text")
    return torch.tensor([ids[at % len(ids)] for at in range(count)], device=weight.device)


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache of keys and values, in its arguments and in what it returns."""
    import inspect

    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in known), CACHES[-1])


@cache
def _model_class() -> type[PeftModel]:
    """Made when first used: its base class is in PEFT."""
    import torch
    from peft import PeftModelForCausalLM

    class ModelWithVirtualTokens(PeftModelForCausalLM):  # type: ignore[misc]
        """Virtual tokens are put before the given ones; what comes out belongs to the given ones alone."""

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            **options: Any,
        ) -> Any:
            """As the base model's; logits are (rows, given tokens, vocabulary)."""
            given: Any = input_ids if inputs_embeds is None else inputs_embeds
            if any(options.pop(name, None) is not None for name in CACHES):
                raise NotSupported("a model with virtual tokens cannot go on from a cache; use generate()")
            count, shape = self.active_peft_config.num_virtual_tokens, given.shape[:2]
            mask = self._mask(given.device, shape, attention_mask)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            if (own := options.pop("position_ids", None)) is not None:
                positions = torch.cat([positions[:, :count], own.expand(shape) + count], 1)
            if self._in_cache:
                self._refuse_checkpointing()
                inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
                inputs[cache_name(self.get_base_model())] = self.get_prompt(shape[0])
                positions = positions[:, count:]
            else:
                inputs = {"inputs_embeds": self._after_prompt(input_ids, inputs_embeds)}
                if labels is not None:
                    labels = torch.cat([labels.new_full((shape[0], count), -100), labels], 1)
            if labels is not None:
                inputs["labels"] = labels
            outputs = self.base_model(**inputs, **self._placed(mask, positions), **options)
            if not self._in_cache:
                outputs.logits = outputs.logits[:, -shape[1] :]
            return outputs

        def generate(self, inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
            """As the base model's: the given tokens, then the new ones."""
            ids = options.pop("input_ids", inputs)
            config = options.get("generation_config") or (args[0] if args else None) or self.generation_config
            copies = max(
                options.get(name, getattr(config, name)) or 1 for name in ("num_beams", "num_return_sequences")
            )
            count = self.active_peft_config.num_virtual_tokens
            mask = self._mask(ids.device, ids.shape, options.pop("attention_mask", None))
            if self._in_cache:
                # Ids in the place of those that are in the cache; first ones of the row, so that no penalty sees news.
                options[cache_name(self.get_base_model())] = self.get_prompt(len(ids) * copies)
                out = self.base_model.generate(
                    torch.cat([ids[:, :1].expand(-1, count), ids], 1), *args, attention_mask=mask, **options
                )
                return _replaced(out, lambda found: found[:, count:])
            embedded = self._after_prompt(ids, None)
            # Padding to the front, as everywhere: a sliding window would count what lies between prompt and tokens.
            order = mask.argsort(dim=1, stable=True)
            mask, embedded = mask.gather(1, order), embedded.gather(1, order[..., None].expand_as(embedded))
            out = self.base_model.generate(None, *args, inputs_embeds=embedded, attention_mask=mask, **options)
            before = ids.repeat_interleave(len(_sequences(out)) // len(ids), 0)
            return _replaced(out, lambda found: torch.cat([before, found], 1))

        def get_prompt(self, *args: Any, **options: Any) -> Any:
            """PEFT's; the numbers of the virtual tokens go to the device once, and not for every forward pass."""
            name = self.active_adapter
            device = self.prompt_encoder[name].embedding.weight.device
            self.prompt_tokens[name] = self.prompt_tokens[name].to(device)
            return super().get_prompt(*args, **options)

        @property
        def _in_cache(self) -> bool:
            return self.active_peft_config.peft_type in ("PREFIX_TUNING", "CARTRIDGE")

        def _mask(self, device: Any, shape: tuple[int, int], given: Tensor | None) -> Tensor:
            """1 for virtual tokens and for given ones that are no padding, (rows, virtual and given tokens)."""
            virtual = torch.ones(shape[0], self.active_peft_config.num_virtual_tokens, dtype=torch.long, device=device)
            given = torch.ones(shape, dtype=torch.long, device=device) if given is None else given.long()
            return torch.cat([virtual, given], 1)

        def _after_prompt(self, ids: Tensor | None, embedded: Tensor | None) -> Tensor:
            """The learned embeddings, then those of the given tokens."""
            embedded = self.get_input_embeddings()(ids) if embedded is None else embedded
            return torch.cat([self.get_prompt(len(embedded)).to(embedded), embedded], 1)

        def _placed(self, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
            """The mask, and the positions unless the architecture finds them by itself (ALiBi)."""
            import inspect

            known = inspect.signature(self.get_base_model().forward).parameters
            return {"attention_mask": mask} | ({"position_ids": positions} if "position_ids" in known else {})

        def _refuse_checkpointing(self) -> None:
            """Transformers drops the cache, and with it the prefix, where it computes activations twice."""
            if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
                raise NotSupported(
                    "keys and values in a cache do not go with gradient checkpointing: turn it off, or use PromptTuning"
                )

    return ModelWithVirtualTokens


def _sequences(out: Any) -> Tensor:
    return out if not hasattr(out, "sequences") else out.sequences


def _replaced(out: Any, change: Any) -> Any:
    """What `generate` returned, with its tokens changed."""
    if not hasattr(out, "sequences"):
        return change(out)
    out.sequences = change(out.sequences)
    return out
