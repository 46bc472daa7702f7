"""Is a module still the one that a kernel was written for? By exact type, down to the last layer.

Classes are named, not imported: this package knows no model. What is refused: subclasses (LoRA layers, parametrised and
quantised ones among them), other children, biases, hooks, a replaced `forward`, a compiled module.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Known:
    """A class by its name, the parameters of its own and its children."""

    name: str
    parameters: tuple[str, ...] = ()
    children: Mapping[str, "Known"] = field(default_factory=dict)


LINEAR = Known("torch.nn.modules.linear.Linear", ("weight",))  # without a bias
CONV = Known("torch.nn.modules.conv.Conv2d", ("weight", "bias"))


def why_changed(module: nn.Module, known: Known, where: str = "") -> str:
    """How `module` differs from `known`, in a few words; empty where it does not."""
    suffix = f" ({where})" if where else ""
    if not is_exactly(module, known.name):
        return f"{type(module).__module__}.{type(module).__qualname__} is not {known.name}{suffix}"
    if is_touched(module):
        return f"a hook on {type(module).__name__}{suffix}"
    replaced = module.__dict__.get("forward")
    if replaced is not None and not hasattr(replaced, "kernel"):
        return f"forward of a {type(module).__name__} is replaced{suffix}"
    if module._compiled_call_impl is not None:
        return f"torch.compile has this {type(module).__name__}{suffix}"
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if own != set(known.parameters):
        other = ", ".join(sorted(own ^ set(known.parameters)))
        return f"{type(module).__name__} has other parameters: {other}{suffix}"
    if set(module._modules) != set(known.children):
        other = ", ".join(sorted(set(module._modules) ^ set(known.children)))
        return f"{type(module).__name__} has other layers: {other}{suffix}"
    for name, child in known.children.items():
        if reason := why_changed(module._modules[name], child, f"{where}.{name}" if where else name):
            return reason
    return ""


def is_touched(module: nn.Module) -> bool:
    """Whether hooks of its own look at what it computes."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_exactly(module: nn.Module, name: str) -> bool:
    """Whether `type(module) is` the class of that name, and that class stands where its name says."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" != name:
        return False
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind


def named(name: str) -> type:
    """The class of that name, whose module is imported already."""
    module, _, kind = name.rpartition(".")
    return getattr(sys.modules[module], kind)
