"""Master weights: what is trained is held in float32, and seen by its module in the dtype of what stands around it.

A step of training is smaller than the distance of two bfloat16 numbers, and would be rounded away (Micikevicius et al.
2018, https://arxiv.org/abs/1710.03740, section 3.1). So a trained weight of a bfloat16 model is made float32, and for
as long as its module computes, a copy rounded to bfloat16 stands in its place. The model computes to the last bit what
it computed before it was to be trained, products are as quick, and the gradient goes through the rounding as it is.

The copy is an attribute of the module, which Python finds before the parameter of that name. Parameters, their names
and whatever is saved are the float32 ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.model.hooks import needless_where_lean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SEEN = "_tunekit_seen_in"
"""The attribute of a module that says by name in which dtype it sees its parameters."""


def train_in_float32(model: nn.Module) -> None:
    """Make all that is trained float32; what was in fewer bits is seen in the dtype that it had."""
    see_rounded(model, widen(parameter for parameter in model.parameters() if parameter.requires_grad))


def widen(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.dtype]:
    """Make those of fewer bits float32, in place; the dtypes that these had."""
    found = {p: p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4}
    for parameter in found:
        parameter.data = parameter.data.float()
    return found


def see_rounded(model: nn.Module, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Have the modules of `model` see these of its parameters in these dtypes whenever they compute."""
    modules = dict(model.named_modules())
    units: dict[nn.Module, bool] = {}
    for name, module in modules.items():
        seen = {at: dtypes[p] for at, p in module._parameters.items() if p is not None and p in dtypes}
        if seen:
            setattr(module, SEEN, getattr(module, SEEN, {}) | seen)
            units |= {modules[unit]: layer for unit, layer in _units(name, modules)}
    for unit, layer in units.items():
        if not any(isinstance(hook, _Rounding) for hook in unit._forward_pre_hooks.values()):
            rounding = _Rounding(layer)
            unit.register_forward_pre_hook(rounding)
            unit.register_forward_hook(rounding.end, always_call=True)


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which `model` multiplies: that of its first parameter, as its module sees it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                found: torch.dtype = vars(module).get(SEEN, {}).get(name, parameter.dtype)
                return found
    return next(model.parameters()).dtype


def are_in(model: nn.Module) -> bool:
    """Whether any of its modules sees parameters rounded."""
    return bool(parameters_of(model))


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Those that modules of `model` see rounded."""
    return [module._parameters[name] for module in model.modules() for name in vars(module).get(SEEN, ())]


@contextmanager
def rounded(model: nn.Module, *, trained: bool = False) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within it, the modules see one copy all along, where they would make one whenever they compute; yields them.

    Args:
        model: the modules that are meant.
        trained: whether the copies collect gradients of their own; else they have none.
    """
    # One that is in pieces is whole only while its module computes.
    places = [one for one in _places(model) if not hasattr(one[0]._parameters[one[1]], "placements")]
    copies: dict[nn.Parameter, Tensor] = {}
    for module, name, dtype in places:
        parameter = module._parameters[name]
        if parameter not in copies:
            copies[parameter] = parameter.detach().to(dtype).requires_grad_(trained and parameter.requires_grad)
        vars(module)[name] = copies[parameter]
    try:
        yield copies
    finally:
        for module, name, _ in places:
            del vars(module)[name]


def forget(model: nn.Module) -> None:
    """Have every module see its parameters as they are: for a model that is no longer trained."""
    for module in model.modules():
        vars(module).pop(SEEN, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                rounding = getattr(hook, "__self__", hook)
                if isinstance(rounding, _Rounding):
                    rounding.take_away()
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


@needless_where_lean
@attrs.define(eq=False)
class _Rounding:
    """The hooks of one module, before and after it computes; a deep copy of the module has its own.

    Args:
        layer: whether the module is a layer, of those that repeat.
        made: where copies were put for the call that is under way.
    """

    layer: bool
    made: list[tuple[nn.Module, str]] = attrs.field(factory=list)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Put copies in the places where none are yet; the gradient goes through them."""
        self.take_away()  # KeyboardInterrupt ends a call without its hooks
        places = _places(module, within_layers=self.layer)
        for owner, name, dtype in places:
            self.made.append((owner, name))
            vars(owner)[name] = owner._parameters[name].to(dtype)

    @needless_where_lean
    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take them away."""
        self.take_away()

    def take_away(self) -> None:
        """Take away what copies there are of a call."""
        while self.made:
            owner, name = self.made.pop()
            vars(owner).pop(name, None)


def _places(model: nn.Module, within_layers: bool = True) -> list[tuple[Any, str, torch.dtype]]:
    """The parameters within `model` that are to be seen in another dtype and are not yet: module, name, dtype.

    With or without those of its layers that repeat.
    """
    return [
        (module, name, dtype)
        for module in (model.modules() if within_layers else _outside_of_layers(model))
        for name, dtype in vars(module).get(SEEN, {}).items()
        if name not in vars(module)
    ]


def _outside_of_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that are in none of its layers that repeat."""
    from torch import nn

    yield model
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield from _outside_of_layers(child)


def _units(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, bool]]:
    """The modules at whose call the parameters of the module of that name are rounded, and whether each is a layer.

    It itself, or what it is a part of, for tables that are never called. And the layer that it is in, of those that
    repeat, or the whole model if it is in none: some models multiply with the weight of a module without calling it,
    or cast to its dtype before they call it. The layer, since what is computed again in a backward pass is a layer.
    """
    from torch import nn

    tables = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    own = name
    while own and isinstance(modules[own], tables):
        own = own.rpartition(".")[0]
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:end])], nn.ModuleList):
            layer = ".".join(parts[: end + 1])
            yield own, own == layer
            yield layer, True
            return
    yield own, False
    yield "", False
