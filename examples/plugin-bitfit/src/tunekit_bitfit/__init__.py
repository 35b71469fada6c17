"""BitFit for tunekit: train the biases, and the norms where there are none."""

import attrs
import tunekit


@attrs.frozen(kw_only=True)
class BitFit(tunekit.AdapterMethod):
    """Train only the biases of the model, in place. Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199.

    Args:
        norms: whether all other vectors, the weights of norms, are trained; Llama and its kind have no biases.
    """

    name = "bitfit"
    trains_base = True
    norms: bool = True

    def attach(self, model, context):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias") or (self.norms and parameter.dim() == 1)
        return model

    def save(self, model, directory):
        """Write the trained vectors, a thousandth of the model."""
        from safetensors.torch import save_file

        save_file({n: p for n, p in model.named_parameters() if p.requires_grad}, directory / "bitfit.safetensors")

    def load(self, model, directory):
        from safetensors.torch import load_file

        model.load_state_dict(model.state_dict() | load_file(directory / "bitfit.safetensors"))
        return model


@tunekit.hookimpl
def tunekit_components():
    return [BitFit]
