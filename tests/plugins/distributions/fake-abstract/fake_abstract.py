"""Offers an evaluator that does not say how it evaluates."""

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Half(tunekit.Evaluator):
    name = "half"


@tunekit.hookimpl
def tunekit_components():
    return [Half]
