"""Offers an evaluator whose author forgot the attrs decorator."""

import tunekit


class Bare(tunekit.Evaluator):
    name = "bare"

    def evaluate(self, model, tokenizer, data, context):
        return {}


@tunekit.hookimpl
def tunekit_components():
    return [Bare]
