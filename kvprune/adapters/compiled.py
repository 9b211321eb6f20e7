"""Finds code that was compiled from a model: torch.compile skips hooks that are added later."""

from __future__ import annotations

import gc
import sys

from torch import nn

__all__ = ["compiled_part"]


def compiled_part(model: nn.Module) -> str | None:
    """Return which part of a model has been compiled, for a message; None if nothing is known of it.

    Args:
        model: The model itself, not what ``torch.compile(model)`` returned.
    """
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if module._compiled_call_impl is not None:
            return f"{where} ({type(module).__name__}.compile())"
        if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            return f"the forward method of {where}"
    if "torch._dynamo" not in sys.modules:  # nothing was compiled in this process
        return None
    from torch._dynamo.eval_frame import OptimizedModule  # slow to import

    parts = {id(module) for module in model.modules()}
    for found in gc.get_objects():
        if type(found) is OptimizedModule and id(found._modules.get("_orig_mod")) in parts:
            return "torch.compile() was called on it"
    return None
