"""State of the process and of a model, which a policy must leave unchanged (KV12, and KV10 for generators).

`isolated` restores it, so that a policy that changes it affects neither later checks nor the caller.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from kvprune.testing.conformance.common.results import Violation

__all__ = [
    "isolated",
    "model_state",
    "process_state",
    "random_state",
    "require_unchanged",
    "restore_random_state",
    "whole_state",
]

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_parameter_registration_hooks",
    "_global_buffer_registration_hooks",
    "_global_module_registration_hooks",
)
_MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _global_hooks() -> dict[str, dict[Any, Any]]:
    return {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS if hasattr(torch_module, name)}


def random_state() -> dict[str, Any]:
    """Return the state of each global generator, by name: torch, random, and numpy if it is loaded."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["random"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


def process_state() -> dict[str, object]:
    """Return the global state of torch and transformers, by names that a message can show."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return {
        **{f"torch's {name}": list(hooks) for name, hooks in _global_hooks().items()},
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.nn.Module.__call__": id(nn.Module.__call__),
        "torch.nn.functional.scaled_dot_product_attention": id(nn.functional.scaled_dot_product_attention),
        "transformers' attention functions": {
            name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS
        },
        "warnings.filters": list(warnings.filters),
    }


def model_state(model: Any) -> dict[str, object]:
    """Return what an attachment could change in a model: hooks, attributes, weights, configuration."""
    state: dict[str, object] = {"configuration": model.config.to_dict()}
    for name, module in model.named_modules():
        where = name or type(model).__name__
        own = module.__dict__
        state[f"class and forward of {where}"] = (type(module), getattr(module.forward, "__func__", None))
        state[f"hooks of {where}"] = [(hook, list(own[hook])) for hook in _MODULE_HOOKS if hook in own]
        state[f"attributes of {where}"] = sorted(own)
        state[f"settings of {where}"] = [
            (key, value) for key, value in sorted(own.items()) if isinstance(value, bool | int | float | str)
        ]
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        state[f"weights {name}"] = (parameter.data_ptr(), parameter._version, parameter.requires_grad)
    return state


def whole_state(model: Any) -> dict[str, object]:
    """Return `model_state` and `process_state` together."""
    return {**model_state(model), **process_state()}


def require_unchanged(when: str, before: dict[str, object], after: dict[str, object]) -> None:
    """Raise `Violation`, with the names of what differs, unless two states are equal."""
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Violation(f"model and process unchanged {when}", f"changed: {', '.join(changed[:3])}{more}")


@contextmanager
def isolated() -> Iterator[None]:
    """Restore, after the block, global state that a policy changed."""
    generators = random_state()
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    hooks = {name: dict(found) for name, found in _global_hooks().items()}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        restore_random_state(generators)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name, found in _global_hooks().items():
            for key in set(found) - set(hooks[name]):
                del found[key]
