"""What only an adapter can break: its declaration, what policies see, and how it lets go of a model.

Each check is a function of a policy and a `Setting`; those that need no policy of the caller's ignore it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.probes import Probe
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import LayerView
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.common.isolation import model_state, process_state
from kvprune.testing.conformance.models.calls import forward
from kvprune.testing.conformance.models.decoding import require_unchanged
from kvprune.testing.conformance.models.setting import Setting, difference, run_under
from kvprune.tokens.decision import Decision

__all__ = [
    "check_batch",
    "check_declaration",
    "check_every_layer_decides",
    "check_failed_attach",
    "check_failed_policy",
    "check_layer_indices",
]


def check_declaration(policy: CrossKVPolicy, setting: Setting) -> None:
    """The class says what it is for, knows its models, and finds in transformers what it relies on."""
    adapter, model = setting.adapter_class, setting.pristine
    family, names = getattr(adapter, "family", None), getattr(adapter, "model_classes", None)
    if not isinstance(family, str) or not family.strip():
        raise Violation("family to be text", repr(family))
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        raise Violation("model_classes to be a tuple of names of classes", repr(names))
    stranger = nn.Linear(1, 1)
    kinds = {type(model).__name__: bool({base.__name__ for base in type(model).__mro__} & set(names))}
    for made, listed in ((model, kinds[type(model).__name__]), (stranger, "Linear" in names)):
        if bool(adapter.matches(made)) != listed:
            raise Violation(
                f"matches({type(made).__name__}) to say {listed}, as model_classes {names} does",
                repr(adapter.matches(made)),
            )
    if not kinds[type(model).__name__]:
        raise Violation(f"a model of model_classes {names}", f"a {type(model).__name__}")
    probes = adapter.probe()
    if not isinstance(probes, list) or not probes or not all(isinstance(one, Probe) for one in probes):
        raise Violation("probe() to return a list of Probe, one at least", repr(probes)[:200])
    failed = [f"{probe.name}: {probe.detail}" for probe in probes if not probe.ok]
    if failed:
        raise Violation("all probes to hold in the installed transformers", "; ".join(failed))


def check_batch(policy: CrossKVPolicy, setting: Setting) -> None:
    """The model and the batch can show a mistake."""
    tensors = [tensor for tensor in setting.inputs.values() if isinstance(tensor, torch.Tensor)]
    if not tensors or len(tensors[0]) < 2 or all(torch.equal(tensor[0], tensor[1]) for tensor in tensors):
        raise Violation(
            "make_inputs to return two samples at least that differ",
            f"tensors {[list(tensor.shape) for tensor in tensors]}",
        )
    if setting.pristine.training:
        raise Violation("make_model to return a model in eval mode", "one in training mode")
    if not setting.stock.logits.isfinite().all():
        raise Violation("finite logits of the untouched model on this batch", "NaN or infinity")
    _, generated = run_under(policy, setting)
    if not difference(generated, setting.stock) > setting.tolerance:
        raise Violation(
            "a model whose logits depend on what it attends to (see kvprune.testing.enliven)",
            f"the same logits with all columns and under {policy.spec}",
        )


def check_layer_indices(policy: CrossKVPolicy, setting: Setting) -> None:
    """The layer indices are, in order, those of the layers that do not grow while tokens are generated."""
    model = copy.deepcopy(setting.pristine)
    before = model_state(model)
    indices = list(setting.adapter_class(model).layer_indices)
    require_unchanged("after the adapter was made", before, model_state(model))
    if not indices or any(one >= other for one, other in pairwise(indices)):
        raise Violation("layer_indices to be increasing, one at least", str(indices))
    with torch.no_grad():
        first = forward(model, setting.batch())
    grown = setting.stock.cache
    if isinstance(first, EncoderDecoderCache):
        found = list(range(len(first.cross_attention_cache.layers)))
    else:
        lengths = [[layer.keys.shape[-2] for layer in cache.layers] for cache in (first, grown)]
        found = [i for i, (early, late) in enumerate(zip(*lengths, strict=True)) if early == late]
    if indices != found:
        raise Violation(f"layer_indices {found}, the layers that cache encoder states", str(indices))


def check_every_layer_decides(policy: CrossKVPolicy, setting: Setting) -> None:
    """The policy is asked once about each layer, in order of rank, and the receipt covers all."""
    views: list[LayerView] = []
    run, _ = setting.prefill(recorder(views))
    wanted = list(enumerate(setting.layer_indices))
    asked = [(view.rank, view.layer_idx) for view in views]
    if asked != wanted:
        raise Violation(f"the policy to be asked about (rank, layer_idx) {wanted}", str(asked))
    receipts = {receipt.layer_idx: receipt.decisions for receipt in run.report.layers}
    if receipts != dict.fromkeys(setting.layer_indices, 1) or run.report.prefills != 1:
        raise Violation(
            f"a receipt of one prefill with one decision for each of layers {list(setting.layer_indices)}",
            f"{run.report.prefills} prefills, decisions by layer {receipts}",
        )
    if run.is_attached:
        raise Violation("the compression to be detached after its block", "attached")


def recorder(views: list[LayerView]) -> CrossKVPolicy:
    """Return a policy that decides nothing, needs all there is to see, and notes what it is shown."""

    @dataclass(frozen=True, kw_only=True)
    class Recorder(CrossKVPolicy):
        name = "recorder"
        keeps_invisible = True

        @property
        def needs(self) -> Any:
            return frozenset({"queries", "raw_keys"})

        def select(self, view: LayerView) -> Decision:
            views.append(view)
            return Decision()

    return Recorder()


def check_failed_policy(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV12: the model is as before, also after a policy raised in the last layer of a prefill."""

    @dataclass(frozen=True, kw_only=True)
    class Fails(CrossKVPolicy):
        name = "fails"

        @property
        def needs(self) -> Any:
            return frozenset({"queries", "raw_keys"})

        def select(self, view: LayerView) -> Decision:
            if view.rank == view.num_layers - 1:
                raise MemoryError("raised by the check")
            return Decision()

    model = copy.deepcopy(setting.pristine)
    before = {**model_state(model), **process_state()}
    try:
        with Compression(setting.adapter_class(model), Fails(), setting.seed):
            setting.generate(model)
    except MemoryError:
        pass
    else:
        raise Violation("an error that a policy raises in the last layer to reach the caller", "no error")
    require_unchanged("after a policy raised", before, {**model_state(model), **process_state()})


def check_failed_attach(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV12: the model is as before if attaching failed at any hook, and harmless detaching stays so."""
    model = copy.deepcopy(setting.pristine)
    before = {**model_state(model), **process_state()}
    with _failing_at(None) as counted:
        run = Compression(setting.adapter_class(model), policy, setting.seed).attach()
    run.detach()
    run.detach()
    require_unchanged("after detaching twice", before, {**model_state(model), **process_state()})
    for number in sorted({1, (counted[0] + 1) // 2, counted[0]} - {0}):
        with _failing_at(number):
            try:
                Compression(setting.adapter_class(model), policy, setting.seed).attach()
            except MemoryError:
                pass
            else:
                raise Violation("an error while attaching to reach the caller", "no error")
        when = f"when attaching failed at hook {number} of {counted[0]}"
        require_unchanged(when, before, {**model_state(model), **process_state()})


@contextmanager
def _failing_at(number: int | None) -> Iterator[list[int]]:
    """Let the registration of a hook fail, counted from 1; yields how many there were so far."""
    counted = [0]
    names = ("register_forward_pre_hook", "register_forward_hook")
    real: dict[str, Any] = {name: getattr(nn.Module, name) for name in names}

    def counting(register: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == number:
                raise MemoryError("raised by the check")
            return register(*args, **kwargs)

        return instead

    try:
        for name, register in real.items():
            setattr(nn.Module, name, counting(register))
        yield counted
    finally:
        for name, register in real.items():
            setattr(nn.Module, name, register)
