"""Memory: what scoring holds alive at the dimensions of Llama-3.2-11B-Vision, and what caches really free."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from generation import generate, mllama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kvprune
from kvprune import Layout
from kvprune.testing import mllama_inputs
from kvprune.view import LayerView
from kvprune.visibility import Visibility

MIB = 1024 * 1024


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that are created and alive at the same time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()._cdata) for t in tree_iter(args) if isinstance(t, torch.Tensor)}
        known = {t.untyped_storage().data_ptr() for t in tree_iter(args) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in known | self._seen
            ):
                self._enter(tensor)
        del given
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size, pointer = storage.nbytes(), storage.data_ptr()
        self._seen.add(pointer)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

        def leave() -> None:
            self._seen.discard(pointer)
            self.alive -= size

        weakref.finalize(storage, leave)


def eleven_billion(rows: int, dtype: torch.dtype) -> LayerView:
    """One cross layer of Llama-3.2-11B-Vision: 6404 columns, 32 query heads, 8 KV heads of width 128."""
    random = torch.Generator().manual_seed(0)
    units = torch.arange(4).repeat_interleave(1601)[None]
    visibility = Visibility(
        rows=torch.ones(1, rows, 4, dtype=torch.bool),
        units=units,
        images=torch.zeros(4, dtype=torch.int64),
        live=torch.ones(1, rows, dtype=torch.bool),
    )
    keys = torch.randn(1, 8, 6404, 128, generator=random).to(dtype)
    return LayerView(
        keys=keys,
        values=keys.clone(),
        visibility=visibility,
        layer_idx=3,
        rank=0,
        num_layers=8,
        scaling=128**-0.5,
        captured_queries=torch.randn(1, 32, rows, 128, generator=random).to(dtype),
        captured_raw_keys=keys.clone(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["trim:k_ratio=0.05", "random", "uniform", "norm", "norm:of=raw_keys"])
def test_scoring_needs_at_most_32_mib_at_11b_dimensions(spec, dtype):
    view, policy = eleven_billion(64, dtype), kvprune.get_policy(spec)
    with PeakMemory() as memory:
        policy.select(view)
    assert memory.peak <= 32 * MIB, f"{memory.peak / MIB:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        "fastv",
        "fastv:rows=mean",
        "h2o",
        "h2o:reach=onward",
        "keydiff",
        "snapkv",
        "snapkv:pool=2d,reduction=max",
    ],
)
def test_scoring_of_published_methods_needs_at_most_64_mib_at_11b_dimensions(spec, dtype):
    grid = Layout.tiles(40, torch.tensor([[2]]), 4, class_token=True)
    view = dataclasses.replace(eleven_billion(64, dtype), layout_of=lambda: grid)
    policy = kvprune.get_policy(spec)
    with PeakMemory() as memory:
        policy.select(view)
    assert memory.peak <= 64 * MIB, f"{memory.peak / MIB:.1f} MiB"


def test_attention_is_never_held_as_a_whole():
    view = eleven_billion(256, torch.float32)  # all heads and rows at once would be 200 MiB
    with PeakMemory() as memory:
        view.attention_mass()
    assert memory.largest <= 32 * 64 * 6404 * 4 // 8
    assert memory.peak <= 32 * MIB


def test_dropped_tokens_are_freed():
    """The cache owns its memory: no kept tensor is a window onto the full one."""
    with kvprune.compress(mllama(), "trim:keep_ratio=0.25") as run:
        _, _, cache = generate(mllama(), mllama_inputs(["t4ttt", "1ttt"]), steps=2)
    layers = [cache.layers[layer_idx] for layer_idx in (1, 3, 5)]
    owned = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
    assert run.report.bytes_held == owned
    assert run.report.bytes_held == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert (
        run.report.bytes_full == 2 * 2 * 20 * 8 * 2 * 4 * 3
    )  # B, Hkv, S, D, keys and values, float32, layers
    assert (
        run.report.bytes_held == 2 * 2 * 5 * 8 * 2 * 4 * 3
    )  # a quarter of the 20 columns of the first sample
