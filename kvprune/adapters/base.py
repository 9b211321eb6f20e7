"""The interface of an adapter, the only code that knows a model family.

An adapter hooks the model's modules and turns its forward calls into calls of the cache manager. One prefill,
from the model's forward call to the pruned cache:

1. The model is called. The adapter's first hook calls `begin_call`, which discards what an interrupted call
   has left and refuses a second thread, and makes a `kvprune.adapters.call.Call`. If the arguments bring
   encoder states, it calls `CrossKVManager.begin` with the visibility of the columns, and adds the hooks that
   capture what the policy needs.
2. Before each cross-attention layer, a hook puts a `CrossKVLayer` in the cache and calls `Call.before_layer`.
   The layer's arguments are replaced: only the features that arrive, and a mask of the same width.
3. The stock layer projects the features, updates the cache and attends.
4. After the layer, a hook calls `Call.after_layer`. The manager asks the policy
   (`kvprune.engine.policy_calls`) and prunes the cache layer (`kvprune.engine.application`).
5. After the model, also if it raised, a hook calls `finish_prefill`, which discards the `Call` and calls
   `CrossKVManager.end`. Before that, it may call the model again (`kvprune.adapters.rereading`).

Decode steps read the pruned cache layers; hooks only cut the mask to what each layer holds. Under a
`DecodePolicy`, they also pass each module only what the policy chooses (`kvprune.adapters.stepping`).
"""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.arguments import cache_of, named_arguments, with_states
from kvprune.adapters.attachment import Attachment
from kvprune.adapters.call import Call
from kvprune.adapters.declaration import Declaration
from kvprune.adapters.generation import WHY_EAGER, running_generation
from kvprune.adapters.reconstruction import Reconstructing
from kvprune.adapters.rereading import Rereading, last_row, require_rereadable
from kvprune.adapters.sites import Site
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import CompressionStateError, GuideError, PluginError, UnsupportedModelError
from kvprune.tokens.layout import Unit

__all__ = ["ModelAdapter", "Site"]

_RETURN_NO_WEIGHTS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention that return no weights, so that decoding needs no hook for them."""


class ModelAdapter(Attachment, Declaration, Reconstructing):
    """Translates the forward calls of one model family into calls of the manager.

    An adapter hooks modules of one model, and `detach` restores every attribute (KV12). It makes no decisions
    and keeps no keys or values: policies decide, cache layers hold the state. `Declaration` lists the class
    attributes that a family sets.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, type(self).family)
        self._manager: CrossKVManager | None = None
        self._call: Call | None = None
        self._reread: Rereading | None = None  # while it runs
        self._noted = threading.local()  # arguments of the call in each thread, if there is re-reading
        self._spreads_weights = False
        # Made here: as a decorator, it would load the compiler whenever kvprune is imported, for seconds.
        self._generation_of = torch.compiler.disable(running_generation, reason=WHY_EAGER)

    @property
    def manager(self) -> CrossKVManager:
        """The manager that the hooks call.

        Raises:
            CompressionStateError: If the adapter is not attached.
        """
        if self._manager is None:
            raise CompressionStateError(f"the {self.family} adapter is not attached to a model")
        return self._manager

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Decide by inheritance alone, so that `isinstance` works on a broken metaclass."""
        return cls in type.__getattribute__(other, "__mro__")

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the family in eval mode, and a batch for it; `kvprune check` uses them.

        Optional. Without it, call `kvprune.testing.check_adapter` with functions that make both.

        Args:
            dtype: Dtype of the weights and of floating-point inputs.

        Raises:
            PluginError: If the adapter does not define it.
        """
        raise PluginError(
            f"adapter {cls.__name__} does not say how to make a tiny example; give it a classmethod "
            "example(cls, dtype) that returns (model, inputs), or call kvprune.testing.check_adapter("
            f"{cls.__name__}, make_model, make_inputs) in a test"
        )

    @property
    def sites(self) -> Sequence[Site]:
        """The cross-attention modules of the model, in the order of their layers.

        Raises:
            UnsupportedModelError: If the adapter does not define it. Checks against the stock model need it.
        """
        raise UnsupportedModelError(
            f"adapter {type(self).__name__} does not say where {self.family} attends to encoder states; "
            "give it a property `sites` that returns one Site for each cross-attention module"
        )

    @property
    def encoder(self) -> nn.Module | None:
        """The module whose output depends on no policy, such as a vision tower; None if there is none."""
        return None

    @property
    def column_unit(self) -> Unit:
        """What one encoder column is, for readers."""
        return Unit("token")

    @property
    def column_seconds(self) -> float | None:
        """Seconds of sound that one column adds; None if columns are no sound, or it is unknown."""
        return None

    @property
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers in the decoder, in order."""
        return tuple(site.layer_idx for site in self.sites)

    @abstractmethod
    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model, so that prefill calls the manager and decoding reads the pruned cache.

        Set ``self._manager`` first: hooks read it as ``self.manager``.
        """

    def detach(self) -> None:
        """Undo `attach`, and forget a forward call that was interrupted."""
        super().detach()
        self._noted = threading.local()
        self._spreads_weights = False
        self._forget_call()

    @property
    def is_rereading(self) -> bool:
        """Whether the last token of a prefill is read again now, in this thread."""
        return self._reread is not None and self._reread.thread == threading.get_ident()

    def hook_calls(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Hook each call of the module that returns the last hidden state, also if it raises."""
        if self.manager.rereads:
            self.before(module, self._note_arguments, first=True)
        self.before(module, before)
        self.after(module, after, always=True)

    def _note_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a call as its caller passes them: hooks of others may change them."""
        first = next(iter(module._forward_pre_hooks.values()))
        if getattr(first, "attachment", None) is not self:
            raise UnsupportedModelError(
                f"reread=True calls {type(module).__name__} again with the arguments it gets, but a hook "
                "that was added with prepend=True inside the block may have changed them; add it before"
            )
        if not self.is_rereading and not torch.compiler.is_compiling():  # a compiled step is no prefill
            self._noted.arguments = dict(named_arguments(module, args, kwargs))

    def begin_call(self) -> None:
        """Start a forward call of the model; the first thing that a hook does.

        Raises:
            CompressionStateError: If another thread is inside a forward call.
        """
        if self.is_rereading:
            return
        self.open_call()
        self._forget_call()

    @property
    def spreads_weights(self) -> bool:
        """Whether attention weights that cross-attention returns are put back to their columns."""
        return self._spreads_weights

    def spread_weights(self, config: Any) -> None:
        """Put attention weights that cross-attention returns back to their columns, from now on.

        Call it in each forward call: it adds hooks once, and only if the model's attention returns weights.

        Args:
            config: The config of the decoder.
        """
        if self._spreads_weights or config._attn_implementation in _RETURN_NO_WEIGHTS:
            return
        self._spreads_weights = True
        for site in self.sites:
            self.after(site.module, functools.partial(self._spread, site), first=True)

    def _spread(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return None if self._call is None else self._call.all_columns(output, site)

    def finish_call(self, *, completed: bool, reread: bool = False) -> None:
        """End a forward call, and its prefill if it was one.

        Args:
            completed: Whether the model returned; false if it raised.
            reread: Whether the last token was read again.
        """
        if self.is_rereading:
            self._call = None
        elif self.in_call:
            try:
                self._call = None
                if self.manager.rereads and not torch.compiler.is_compiling():
                    vars(self._noted).clear()
                if self.manager.in_prefill:
                    self.manager.end(completed=completed, reread=reread)
            finally:
                self.close_call()  # last: from now on another thread may call

    def _forget_call(self) -> None:
        """Discard the state of a forward call that never ended."""
        self._call = self._reread = None
        if self._manager is not None:
            self._manager.end(completed=False)

    def prepare_reread(
        self, call: Call, named: Mapping[str, Any], *, cached: bool, cross_layers: Collection[int] = ()
    ) -> None:
        """Prepare to read the last token of a prefill again, if asked; call it before any layer runs.

        Args:
            call: The current call.
            named: Its arguments by name.
            cached: Whether it has a cache.
            cross_layers: Indices of layers in the text's cache that hold encoder tokens.

        Raises:
            UnsupportedCacheError, UnsupportedModelError: See `require_rereadable` and `last_row`.
        """
        if self.manager.rereads:
            require_rereadable(named, self.family, cached=cached, cross_layers=cross_layers)
            passed = getattr(self._noted, "arguments", named)
            call.again = Rereading(self.last_row(passed), cache_of(named))

    def last_row(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a forward call for its last token alone, without the cache.

        Args:
            named: Arguments of the call by name.

        Raises:
            UnsupportedModelError: If it is not known how an argument looks for one row.
        """
        return last_row(named, self.family)

    def finish_prefill(self, module: nn.Module, output: Any) -> Any:
        """End a forward call, and its prefill if it was one; before that, read the last token again if asked.

        Args:
            module: The module that returns the last hidden state; a hook runs after it.
            output: What it returned; None if it raised.

        Returns:
            The output with the last row replaced; None if nothing changes.
        """
        if self._reread is not None and self.is_rereading:
            self._reread.keep(output)
            self._call = None
            return None
        again = None if self._call is None or output is None else self._call.again
        if again is None:
            self.finish_call(completed=output is not None)
            return None
        self._reread = again
        try:
            changed = again.read(self, self.manager, module, output)
        except BaseException:
            self.finish_call(completed=False)
            raise
        finally:
            self._reread = None
        self.finish_call(completed=True, reread=True)
        return changed

    @property
    def encoding(self) -> nn.Module | None:
        """The module whose output a second call can bring instead of a picture; None if it needs none."""
        return None

    def second_call(self, named: Mapping[str, Any], encoding: Any) -> dict[str, Any]:
        """Return the arguments of a call that repeats another one, but does not run the encoder again.

        Args:
            named: Arguments of the call of the model that generates, by name.
            encoding: What the module `encoding` has returned in it; None if it did not run.

        Raises:
            UnsupportedModelError: If the arguments do not say what the encoder has returned.
        """
        return with_states(named, self.family)

    def geometry(self) -> Mapping[str, object] | None:
        """Return the properties that a guide must share with its target; None if unknown.

        Models of the same geometry have the same encoder tokens in the same order, and the same token ids.
        """
        return None

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the model over a prompt and an answer, in one forward call that leaves no cache.

        Optional; without it, the family supports no policy that needs guidance.

        Args:
            prompt: Inputs of the target's forward call.
            answer: int64 ``[R, n]``, tokens after the prompt; the last one is only predicted, not read.
            written: bool ``[R, n]``, which of them belong to the answer; the rest is padding.

        Returns:
            Logits ``[R, n, V]`` of the rows that predict the answer; None without an answer.

        Raises:
            GuideError: If the model cannot read the prompt.
        """
        raise GuideError(f"the adapter for {self.family} cannot run a guide: it does not define replay()")

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Generate an answer to a prompt greedily.

        Args:
            prompt: Inputs of the target's forward call.
            max_new_tokens: Most tokens to generate.

        Returns:
            New tokens, int64 ``[R, n]``, and which of them belong to the answer, bool ``[R, n]``.

        Raises:
            GuideError: If the model cannot read the prompt, or cannot generate.
        """
        raise GuideError(
            f"a guide of the family {self.family} cannot generate, it only reads the prompt; "
            f"use max_new_tokens=0, got {max_new_tokens}"
        )
