"""The built-in components, named without importing them. They enter the registry as anybody's do.

The package is callable: `tunekit.plugins()` prints what is installed.
"""

import sys
from types import ModuleType

from tunekit.core.hookspecs import Lazy, hookimpl
from tunekit.core.plugin import Plugins
from tunekit.core.registry import default_registry

COMPONENTS: tuple[Lazy, ...] = (
    Lazy("source", "in-memory", "tunekit.plugins.sources.in_memory:InMemory"),
    Lazy("source", "json-lines", "tunekit.plugins.sources.json_lines:JsonLines"),
    Lazy("source", "table", "tunekit.plugins.sources.table:Table"),
    Lazy("source", "hub", "tunekit.plugins.sources.hub:Hub"),
    Lazy("source", "text-files", "tunekit.plugins.sources.text_files:TextFiles"),
    Lazy("source", "mixture", "tunekit.plugins.sources.mixture:Mixture"),
    Lazy("source", "filtered", "tunekit.plugins.sources.filtered:Filtered"),
    Lazy("source", "split", "tunekit.plugins.sources.split:Split"),
    Lazy("adapter", "lora", "tunekit.plugins.adapters.lora:LoRA"),
    Lazy("adapter", "ia3", "tunekit.plugins.adapters.ia3:IA3"),
    Lazy("adapter", "loha", "tunekit.plugins.adapters.loha:LoHa"),
    Lazy("adapter", "lokr", "tunekit.plugins.adapters.lokr:LoKr"),
    Lazy("adapter", "full", "tunekit.plugins.adapters.full:Full"),
    Lazy("adapter", "last-layers", "tunekit.plugins.adapters.last_layers:LastLayers"),
    Lazy("adapter", "bottleneck", "tunekit.plugins.adapters.bottleneck:Bottleneck"),
    Lazy("adapter", "adalora", "tunekit.plugins.adapters.adalora:AdaLoRA"),
    Lazy("adapter", "prompt-tuning", "tunekit.plugins.adapters.prompt_tuning:PromptTuning"),
    Lazy("adapter", "prefix-tuning", "tunekit.plugins.adapters.prefix_tuning:PrefixTuning"),
    Lazy("adapter", "peft", "tunekit.plugins.adapters.peft:Peft"),
    Lazy("adapter", "qlora", "tunekit.plugins.adapters.qlora:QLoRA"),
    Lazy("quantizer", "nf4", "tunekit.plugins.quantizers.nf4:NF4"),
    Lazy("quantizer", "int8", "tunekit.plugins.quantizers.int8:Int8"),
    Lazy("trainer", "sft", "tunekit.plugins.trainers.sft:SFT"),
    Lazy("trainer", "transformers", "tunekit.plugins.trainers.transformers:Transformers"),
    Lazy("evaluator", "perplexity", "tunekit.plugins.evaluators.perplexity:Perplexity"),
    Lazy("evaluator", "exact-match", "tunekit.plugins.evaluators.exact_match:ExactMatch"),
    Lazy("evaluator", "token-accuracy", "tunekit.plugins.evaluators.token_accuracy:TokenAccuracy"),
    Lazy("evaluator", "classification", "tunekit.plugins.evaluators.classification:Classification"),
    Lazy("evaluator", "token-f1", "tunekit.plugins.evaluators.token_f1:TokenF1"),
    Lazy("evaluator", "numeric-answer", "tunekit.plugins.evaluators.numeric_answer:NumericAnswer"),
    Lazy("evaluator", "bleu", "tunekit.plugins.evaluators.bleu:Bleu"),
    Lazy("evaluator", "chrf", "tunekit.plugins.evaluators.chrf:Chrf"),
    Lazy("evaluator", "rouge", "tunekit.plugins.evaluators.rouge:Rouge"),
    Lazy("evaluator", "retention", "tunekit.plugins.evaluators.retention:Retention"),
    Lazy("evaluator", "pass-at-k", "tunekit.plugins.evaluators.pass_at_k:PassAtK"),
    Lazy("evaluator", "reverse-facts", "tunekit.plugins.evaluators.reverse_facts:ReverseFacts"),
    Lazy("evaluator", "harness", "tunekit.plugins.evaluators.harness:Harness"),
    Lazy("evaluator", "samples", "tunekit.plugins.evaluators.samples:Samples"),
)
"""Every built-in; the class behind `module:Class` is `tunekit.Class`."""


@hookimpl
def tunekit_components() -> tuple[Lazy, ...]:
    """The built-in components."""
    return COMPONENTS


class _CallablePackage(ModuleType):
    """`tunekit.plugins` is this package, and users write `tunekit.plugins()`: so the package can be called."""

    def __call__(self) -> Plugins:
        """Print a table of the installed plugins and return them."""
        found = default_registry().plugins()
        print(found)
        return found


sys.modules[__name__].__class__ = _CallablePackage
