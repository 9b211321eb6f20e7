"""Checks that a policy is a pure function of one layer's view (KV10), and leaves its answers alone (KV06)."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import fields

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import answer, pose, selections_of
from kvprune.testing.cutting import cut_to_sample
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_bits, same_by_head, takers
from kvprune.tokens.decision import Decision
from kvprune.tokens.merging import Merge
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = [
    "ask",
    "check_alone",
    "check_answers_stay",
    "check_inputs",
    "check_instance",
    "check_order",
    "check_references",
    "require_same",
]

Written = tuple[object, ...]
_ROUNDING = 256
"""Features of new tokens may differ by this many times the precision of their dtype."""


def written(decision: Decision) -> Written:
    """Return a decision as plain numbers, which nobody can change afterwards."""

    def plain(selection: Selection | None) -> object:
        return selection and (
            selection.columns,
            selection.indices.tolist(),
            selection.valid.tolist(),
            merged(selection.merge),
            selection.bits_by_column().tolist(),
        )

    def merged(merge: Merge | None) -> object:
        return merge and (
            merge.into.tolist(),
            merge.weights.tolist(),
            merge.renormalize_keys,
            merge.size_bias,
        )

    onward = decision.onward
    features = onward.features.tolist() if isinstance(onward, Replacement) else None
    return plain(decision.cache), plain(decision.received), features


def ask(policy: CrossKVPolicy, problem: LayerProblem) -> Written:
    """Return what a policy decides about a problem, as plain numbers."""
    return written(answer(policy, pose(policy, problem)))


def require_same(expected: str, first: Written, second: Written) -> None:
    """Raise unless two answers are the same."""
    if first != second:
        raise Violation(expected, f"first {_short(first)}, then {_short(second)}")


def _short(decision: Written) -> str:
    text = repr(decision)
    return text if len(text) <= 200 else text[:200] + "..."


def check_inputs(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the policy leaves the view's tensors unchanged, those derived from visibility included."""
    view, fresh = pose(policy, problem), pose(policy, problem)
    tensors = _tensors(view)
    versions = {name: tensor._version for name, tensor in tensors.items()}
    answer(policy, view)
    after, before = _tensors(view), _tensors(fresh)
    for name, tensor in after.items():
        if tensor is not tensors[name] or not torch.equal(tensor, before[name]):
            raise Violation(f"view.{name} unchanged", "other contents")
        if tensor._version != versions[name]:
            raise Violation(f"no writing to view.{name}", "it was written to and restored")
    for name in ("visible", "visible_in_prefill", "groups", "strata"):
        if not torch.equal(getattr(view, name), getattr(fresh, name)):
            raise Violation(f"view.{name} unchanged", "other contents")


def _tensors(view: FeatureView | LayerView) -> dict[str, torch.Tensor]:
    see = view.visibility
    found = {
        **{field.name: getattr(view, field.name) for field in fields(view)},
        **{field.name: getattr(view.captured, field.name) for field in fields(view.captured)},
        **{f"visibility.{field.name}": getattr(see, field.name) for field in fields(see)},
    }
    text = found.get("text")
    if isinstance(text, TextView):
        found |= {f"text.{field.name}": getattr(text, field.name) for field in fields(text)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def check_order(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the answers do not depend on what was asked before, nor on the order of layers."""
    layers = [dataclasses.replace(problem, rank=rank) for rank in range(problem.num_layers)]
    forwards = [ask(policy, layer) for layer in layers]
    ask(policy, dataclasses.replace(problem, seed=problem.seed + 1))
    backwards = [ask(policy, layer) for layer in reversed(layers)][::-1]
    for layer, first, second in zip(layers, forwards, backwards, strict=True):
        require_same(f"the same answer again at rank {layer.rank}", first, second)
    anew = [ask(dataclasses.replace(policy), layer) for layer in layers]
    for layer, first, second in zip(layers, forwards, anew, strict=True):
        require_same(f"the same answer from an equal policy at rank {layer.rank}", first, second)


def check_references(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the policy keeps no reference to the view or its tensors, which would keep their memory."""
    view = pose(policy, problem)
    watched: dict[str, Callable[[], bool]] = {}
    for name, tensor in _tensors(view).items():
        if not name.startswith("visibility."):
            watched[name] = StorageWeakRef(tensor.untyped_storage()).expired
    reference = weakref.ref(view)
    watched["itself"] = lambda: reference() is None
    answer(policy, view)
    del view, tensor  # this also releases the view's text
    if not all(gone() for gone in watched.values()):
        gc.collect()  # a cycle, such as that of an exception or a closure, is no reference to keep
    alive = [name for name, gone in watched.items() if not gone()]
    if alive:
        raise Violation("no reference to the view after the call", f"still alive: {', '.join(alive)}")


def check_instance(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the call leaves the policy and its class unchanged: a policy holds options and nothing else."""
    policy = dataclasses.replace(policy)  # a new instance: caching on it shows in its first call
    before = _held_by(policy)
    answer(policy, pose(policy, problem))
    after = _held_by(policy)
    changed = sorted(
        name for name in before.keys() | after.keys() if not _is_same(before.get(name), after.get(name))
    )
    if changed:
        raise Violation("a policy that holds its options and nothing else", f"changed: {', '.join(changed)}")


def _held_by(policy: CrossKVPolicy) -> dict[str, tuple[object, object]]:
    """Return what a policy and its classes hold by name: each object, and its contents if these can change.

    Our own base classes are looked at as well: a policy could write to these, and the name of a class's
    module says nothing about who wrote the class. The objects themselves are kept, because the number that
    `id` returns may belong to a new object as soon as the old one is gone.
    """
    held = {f"instance attribute {name}": (None, repr(value)) for name, value in vars(policy).items()}
    return held | {
        f"class attribute {cls.__name__}.{name}": (value, _contents(value))
        for cls in type(policy).__mro__
        for name, value in vars(cls).items()
    }


def _contents(value: object) -> object:
    """Return what is in a container or a tensor, in a form that does not change with it; else None."""
    if isinstance(value, torch.Tensor):
        return value._version
    return repr(value) if isinstance(value, list | dict | set | deque | bytearray) else None


def _is_same(before: tuple[object, object] | None, after: tuple[object, object] | None) -> bool:
    if before is None or after is None:
        return before is after
    return before[0] is after[0] and before[1] == after[1]


def check_alone(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: a sample selects alone what it selects in a batch, without the padding that the batch needs."""
    decision = answer(policy, pose(policy, problem))
    together = dict(selections_of(decision))
    for sample in range(len(problem.layouts)):
        alone_view = cut_to_sample(pose(policy, problem), problem, sample)
        by_itself = answer(policy, alone_view)
        alone = dict(selections_of(by_itself))
        for part in ("cache", "onward"):
            if (part in together) != (part in alone):
                raise Violation(f"{part} of sample {sample} alone as in the batch", "one is None, one is not")
            if part in together:
                _require_same_sample(f"{part} of sample {sample} alone", together[part], sample, alone[part])
        if isinstance(decision.onward, Replacement) and isinstance(by_itself.onward, Replacement):
            _require_same_features(decision.onward, sample, by_itself.onward)


def _require_same_features(together: Replacement, sample: int, alone: Replacement) -> None:
    """Raise unless new tokens of a sample are the same alone as in a batch, up to rounding."""
    in_batch = together.features[sample, together.places.valid[sample, 0]]  # [n, C]
    by_itself = alone.features[0, alone.places.valid[0, 0]]
    bound = _ROUNDING * torch.finfo(in_batch.dtype).eps * float(in_batch.abs().max().clamp(min=1))
    apart = float((in_batch - by_itself).abs().max())
    if not apart <= bound:
        raise Violation(
            f"new tokens of sample {sample} alone as in the batch, to {bound:.2g}",
            f"features that differ by {apart:.2g}",
        )


def _require_same_sample(where: str, together: Selection, sample: int, alone: Selection) -> None:
    """Raise unless a sample of a batch keeps and merges what the only sample of another selection does."""
    in_batch, by_itself = kept_bits(together)[sample], kept_bits(alone)[0]
    if not same_by_head(in_batch, by_itself):
        raise Violation(f"{where} as in the batch, {_listed(in_batch)}", _listed(by_itself))
    merged_in_batch, merged_alone = takers(together)[sample], takers(alone)[0]
    if not same_by_head(merged_in_batch, merged_alone):
        raise Violation(f"{where} to merge as in the batch, {merged_in_batch}", f"{merged_alone}")


def _listed(by_head: list[set[tuple[int, int]]]) -> str:
    """Write kept columns by head, with the bits of those that are quantized."""
    return "; ".join(
        f"[{', '.join(f'{c}' if bits == OWN_BITS else f'{c} at {bits} bits' for c, bits in sorted(kept))}]"
        for kept in by_head
    )


def check_answers_stay(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV06: an answer given at one layer does not change when another layer is asked."""
    given: list[tuple[int, Decision, Written]] = []
    for rank in range(problem.num_layers):
        decision = answer(policy, pose(policy, dataclasses.replace(problem, rank=rank)))
        given.append((rank, decision, written(decision)))
        for earlier, kept, as_given in given:
            if written(kept) != as_given:
                raise Violation(
                    f"the answer given at rank {earlier} unchanged", f"another answer after rank {rank}"
                )
