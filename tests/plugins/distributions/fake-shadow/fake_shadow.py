"""In order, but its adapter has the name of a built-in one."""

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class LoRA(tunekit.AdapterMethod):
    name = "lora"

    def attach(self, model, context):
        return model

    def save(self, model, directory):
        """Nothing to save."""

    def load(self, model, directory):
        return model


@tunekit.hookimpl
def tunekit_components():
    return [LoRA]
