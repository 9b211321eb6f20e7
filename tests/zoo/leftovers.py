"""KV12: policies that leave hooks, attributes or settings behind."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from kvprune import CrossKVPolicy, Decision, ScoringPolicy
from zoo.helpers import by_norm


def calling_modules():
    """Yield the modules that are running now, found in the frames of the callers."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module
        frame = frame.f_back


def do_nothing(*call):
    return None


@dataclass(frozen=True, kw_only=True)
class GlobalHook(ScoringPolicy):
    """A hook on every module of the process, never removed."""

    name = "global-hook"
    caught_by = ("KV12",)

    def score(self, view):
        nn.modules.module.register_module_forward_hook(do_nothing)
        return by_norm(view)


@dataclass(frozen=True, kw_only=True)
class ModelHook(CrossKVPolicy):
    name = "model-hook"
    caught_by = ("KV12",)

    def select(self, view):
        for module in calling_modules():
            module.register_forward_hook(do_nothing)
        return Decision()


@dataclass(frozen=True, kw_only=True)
class ModelAttribute(CrossKVPolicy):
    name = "model-attribute"
    caught_by = ("KV12",)

    def select(self, view):
        for module in calling_modules():
            module.last_rank = view.rank
        return Decision()


@dataclass(frozen=True, kw_only=True)
class ModelWeights(CrossKVPolicy):
    name = "model-weights"
    caught_by = ("KV12",)

    def select(self, view):
        for module in calling_modules():
            for parameter in module.parameters():
                parameter.mul_(1.0)
        return Decision()


@dataclass(frozen=True, kw_only=True)
class DefaultDtype(ScoringPolicy):
    name = "default-dtype"
    caught_by = ("KV12",)

    def score(self, view):
        torch.set_default_dtype(torch.float64)
        return by_norm(view)
