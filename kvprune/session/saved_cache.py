"""Saved caches: a prompt is compressed once, kept in a file, and asked many times.

`Compression.save` writes what a pruned cache holds, and what one must know to read it again: the policy, the
model, the selections and digests of everything. `load_cache` gives a `SavedCache`, which is never changed:
each question gets a cache of its own, which shares what is held of the encoder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.fingerprint import require_same_model
from kvprune.adapters.questions import AbsentStates, encoder_question, text_question
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.file import read_file
from kvprune.cache.stored import StoredLayer, fresh_layer, restored_layer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.loaded import digests, restore, selections_of
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import SavedCacheError, WeightsError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import takes_steps
from kvprune.policy.nesting import parts
from kvprune.policy.spec import PolicySpec
from kvprune.policy.trained import TrainedPolicy, files_may_be_gone
from kvprune.policy.weights import SUFFIX
from kvprune.session.registry import Registry, load
from kvprune.text import shown
from kvprune.tokens.selection import Selection

__all__ = ["SavedCache", "load_cache", "require_loaded"]


class SavedCache:
    """A pruned cache from a file, ready for questions; `load_cache` makes it.

    Attributes:
        path: The file.
        model: The model that it was loaded for.
        policy: The policy that pruned it.
        seed: The policy's seed.
        reread: Whether the last token of the prompt was read again from the pruned cache.
        rows: Rows of the batch that was compressed.
        tokens: Text tokens of the prompt that it holds; 0 for an encoder-decoder model, whose decoder reads
            each prompt anew.
        header: What the file says about itself: ``kvprune``, ``transformers`` and ``torch`` (versions),
            ``policy``, ``seed``, ``model``, ``inputs`` (a SHA-256 of each tensor of the inputs),
            ``selections`` (a SHA-256 for each layer), ``tensors`` (a SHA-256 of each).
    """

    def __init__(
        self,
        path: Path,
        adapter: ModelAdapter,
        policy: CrossKVPolicy,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.path, self.model, self.policy, self.header = path, adapter.model, policy, header
        self.seed, self.reread = int(header["seed"]), bool(header["reread"])
        self.rows, self.tokens = int(header["rows"]), int(header["tokens"])
        self._adapter = adapter
        self._layers = {
            int(index): _layer(adapter, index, facts, tensors) for index, facts in header["layers"].items()
        }
        self._cross = {index: one for index, one in self._layers.items() if isinstance(one, CrossKVLayer)}
        self._places = {index: _place(adapter, index) for index in self._layers}
        device = self.device
        self._read = {name: tensor.to(device) for name, tensor in _within("inputs.", tensors).items()}
        kept = {name: tensor.to(device) for name, tensor in _within("selections.", tensors).items()}
        self._kept = selections_of(header["report"], kept)
        if digests(self._kept) != header["selections"]:
            raise SavedCacheError(f"{path} was changed: its selections have other digests; save it again")

    @property
    def device(self) -> torch.device:
        """Device of the first cross-attention layer."""
        return _place(self._adapter, self._adapter.layer_indices[0])[0]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an ``EncoderDecoderCache``."""
        return bool(self.header["is_encoder_decoder"])

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Encoder columns that it holds, by layer index."""
        return self._kept.selections

    @property
    def bytes_held(self) -> int:
        """Bytes of cross-attention keys and values that it holds."""
        return sum(layer.bytes_held for layer in self._cross.values())

    @property
    def bytes_full(self) -> int:
        """Bytes of cross-attention keys and values that stock transformers would hold."""
        return sum(layer.bytes_full for layer in self._cross.values())

    def require(self, model: nn.Module, seed: int) -> None:
        """Raise unless this cache was loaded for a model, and a run names no other seed than 0 or its own.

        Raises:
            SavedCacheError: Says what would be right.
        """
        if model is not self.model:
            raise SavedCacheError(
                f"{self.path} was loaded for another {type(self.model).__name__} object than this "
                f"{type(model).__name__}; load it with kvprune.load_cache(path, model)"
            )
        if seed not in (0, self.seed):
            raise SavedCacheError(
                f"{self.path} was pruned with seed {self.seed}, got seed={seed}; leave seed out"
            )

    def begin(self, manager: CrossKVManager) -> None:
        """Let the report and the selections of a run begin with this cache."""
        text = {index: one for index, one in self._layers.items() if isinstance(one, TextKVLayer)}
        restore(manager, self.path.name, self.header["report"], self._kept, self._cross, text)

    def copy(self, repeats: int = 1) -> Cache:
        """Return a cache for one call of `generate`, as its ``past_key_values``.

        Args:
            repeats: Rows of the call for each row of this cache: questions, beams or return sequences. They
                share what is held of the encoder.

        Raises:
            SavedCacheError: If the model was moved or converted after the cache was loaded.
        """
        self._require_same_place()
        flat = DynamicCache()
        flat.layers = [
            fresh_layer(self._layers[index]) if index in self._layers else DynamicLayer()
            for index in range(max(self._layers) + 1)
        ]
        cache: Cache = flat
        if self.is_encoder_decoder:
            config: Any = self.model.config
            cache = EncoderDecoderCache(DynamicCache(config=config.get_text_config(decoder=True)), flat)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return cache

    def inputs(self, tokens: Tensor | Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Return the arguments of `generate` for a question, a fresh `copy` of the cache included.

        Args:
            tokens: The tokens after the prompt that was saved, without special tokens before them: int64
                ``[Q, n]``, or what a tokenizer returns, with an ``attention_mask`` if rows are padded (on the
                left). Q is `rows`, or any number of questions if `rows` is 1. For an encoder-decoder model,
                the decoder's whole prompt; leave it out if `generate` makes it.
            options: Options of `generate`, passed through. The number of beams or of return sequences is read
                from them, or from the model's generation config.

        Raises:
            SavedCacheError: If there is no question, or its rows do not fit.

        Example:
            >>> with kvprune.compress(model, saved) as run:  # doctest: +SKIP
            ...     out = model.generate(**saved.inputs(question, max_new_tokens=20))
        """
        ids, mask = self._question(tokens)
        asked = self.rows if ids is None else len(ids)
        repeats = asked // self.rows
        cache = self.copy(repeats * self._beams(options))
        if self.is_encoder_decoder:
            columns = next(iter(self._cross.values())).columns
            like = next(iter(self._cross.values())).keys
            states = like.new_zeros(self.rows, columns, 0).as_subclass(AbsentStates)
            arguments = encoder_question(self._read, ids, mask, states, repeats)
        else:
            assert ids is not None
            arguments = text_question(self._read, ids, mask, self.device, repeats)
        return {**arguments, "past_key_values": cache, **self._adapter.asking, **options}

    def _question(self, tokens: Tensor | Mapping[str, Any] | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the ids and the mask of a question, checked."""
        ids, mask = tokens, None
        if isinstance(tokens, Mapping):
            ids, mask = tokens.get("input_ids"), tokens.get("attention_mask")
        if ids is None and self.is_encoder_decoder:
            return None, mask
        whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex())
        if not (isinstance(ids, Tensor) and whole and ids.ndim == 2 and ids.shape[1]):
            raise SavedCacheError(
                "a question is the tokens after the prompt that was saved, [Q, n], or what a tokenizer "
                f"returns with return_tensors='pt'; got {shown(tokens)}"
            )
        if len(ids) != self.rows and self.rows != 1:
            raise SavedCacheError(
                f"{self.path} holds {self.rows} rows, but the question has {len(ids)}; ask one question for "
                "each row, or save each row in a file of its own"
            )
        return ids, mask

    def _beams(self, options: Mapping[str, Any]) -> int:
        """Return how many rows `generate` makes of each sample."""
        given = options.get("generation_config", getattr(self.model, "generation_config", None))
        names = "num_beams", "num_return_sequences"
        return max(options.get(name) or getattr(given, name, None) or 1 for name in names)

    def _require_same_place(self) -> None:
        """Raise unless the model's weights are where and what they were when the cache was loaded."""
        for index, then in self._places.items():
            if (now := _place(self._adapter, index)) != then:
                raise SavedCacheError(
                    f"the model is on {now[0]} in {now[1]} now, but was on {then[0]} in {then[1]} when "
                    f"{self.path} was loaded; load the cache again"
                )

    def __repr__(self) -> str:
        held, full = self.bytes_held / 2**20, self.bytes_full / 2**20
        return (
            f"SavedCache({str(self.path)!r}, {str(self.policy.spec)!r}, {self.rows} rows, "
            f"{self.tokens} tokens, {held:.2f} of {full:.2f} MiB)"
        )


def load_cache(
    path: str | os.PathLike[str], model: nn.Module, *, policy: CrossKVPolicy | None = None
) -> SavedCache:
    """Load a cache that `Compression.save` has written.

    Its tensors are put where the model's layers are.

    Args:
        path: The file.
        model: The model that it was saved with: same class, config, weights and dtype, on any device.
        policy: The policy that pruned it, if no installed plugin provides it.

    Returns:
        The cache. Pass it to `kvprune.compress`, and its `SavedCache.inputs` to ``generate``.

    Raises:
        SavedCacheError: If the file cannot be read, was changed, has another format version, or was saved
            with another model; or if `policy` is not the one that pruned it.
        UnsupportedModelError: If no adapter supports the model.
        SpecError, UnknownPolicyError, PolicyOptionError, PluginError: If the policy is not installed, or in
            another version.

    Example:
        >>> saved = kvprune.load_cache("page.safetensors", model)  # doctest: +SKIP
        >>> with kvprune.compress(model, saved) as run:  # doctest: +SKIP
        ...     for question in questions:
        ...         out = model.generate(**saved.inputs(question, max_new_tokens=20))
    """
    registry, file = load(), Path(path)
    adapter = registry.adapter_for(model)(model)
    header, tensors = read_file(file)
    try:
        require_same_model(adapter, header["model"], str(file))
        spec = PolicySpec.from_dict(header["policy"])
        if policy is not None and not isinstance(policy, CrossKVPolicy):
            raise SavedCacheError(
                f"policy is the policy object that pruned {file}, got {shown(policy)}; leave it out for "
                f"{spec}, unless no installed plugin provides that"
            )
        if policy is not None and policy.spec != spec:
            raise SavedCacheError(
                f"{file} was pruned by {spec}, but policy is {policy.spec}; pass that policy"
            )
        if policy is None:
            policy = _policy_of(registry, spec, file)
        return SavedCache(file, adapter, policy, header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SavedCacheError(
            f"{file} was not written by run.save of this version ({type(error).__name__}: {error}); save it "
            "again"
        ) from error


def require_loaded(policy: object) -> None:
    """Raise if the path of a file is given where a policy or a loaded cache belongs.

    Raises:
        SavedCacheError: Says how to load it.
    """
    named = isinstance(policy, str) and policy.endswith(SUFFIX) and "=" not in policy
    if named or isinstance(policy, os.PathLike):
        raise SavedCacheError(
            f"{shown(str(policy))} is the path of a file; load a saved cache with kvprune.load_cache(path, "
            "model), and pass what that returns"
        )


def _policy_of(registry: Registry, spec: PolicySpec, path: Path) -> CrossKVPolicy:
    """Return the policy that pruned a cache.

    What is pruned already needs no trained weights, so their file may be gone, unless the policy decides in
    decode steps. If another image arrives, the policy says what became of the file.

    Raises:
        SavedCacheError: If decode steps need weights that are gone, or have changed.
    """
    with files_may_be_gone():
        policy = registry.get_policy(spec)
    for part in parts(policy):
        if takes_steps(part) and isinstance(part, TrainedPolicy):
            try:
                registry.get_policy(part.spec)
            except WeightsError as error:
                raise SavedCacheError(
                    f"{path} was pruned by {spec}, which needs its weights in each decode step; put the file "
                    f"with the digest {part.digest} back to {shown(str(part.weights_path))} ({error})"
                ) from error
    return policy


def _layer(
    adapter: ModelAdapter, index: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> DynamicLayer:
    """Return a layer of a file, on the device of the decoder layer that reads it."""
    device, _ = _place(adapter, int(index))
    own = _within(f"layers.{index}.", tensors)
    return restored_layer(StoredLayer(facts, {name: tensor.to(device) for name, tensor in own.items()}))


def _within(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start like this, by the rest of their names."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _place(adapter: ModelAdapter, index: int) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of the first weight of a decoder layer.

    The layer is a neighbour of the one that holds the first cross-attention module.
    """
    site, model = adapter.sites[0], adapter.model
    name = next(name for name, module in model.named_modules() if module is site.module)
    before, found, _ = name.rpartition(f".{site.layer_idx}.")
    weight = next(model.get_submodule(f"{before}.{index}" if found else name).parameters())
    return weight.device, weight.dtype
