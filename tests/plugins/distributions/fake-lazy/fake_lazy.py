"""Names classes that cannot be had: no such module, no such class, another name, another kind, not concrete."""

import tunekit

TARGETS = {
    "no-module": "fake_nowhere:Thing",
    "no-class": "fake_lazy_classes:Thing",
    "other-name": "fake_lazy_classes:Honest",
    "no-component": "fake_lazy_classes:Plain",
}


@tunekit.hookimpl
def tunekit_components():
    return [tunekit.Lazy("evaluator", name, target) for name, target in TARGETS.items()] + [
        tunekit.Lazy("adapter", "honest", "fake_lazy_classes:Honest")
    ]
