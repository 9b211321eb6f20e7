"""Broken adapters whose defects show only beside plain generation: `kvprune.testing` has a row for each.

``ADAPTERS_IN_RUNS`` lists them. Each has one defect, and derives from an adapter without defects.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading

import torch

from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.generation import CANDIDATES
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.cache.shared_rows import SharedRows
from kvprune.tokens.randomness import fingerprint


class SeedsByTheLastInput(BartAdapter):
    """Seeds random policies with what the encoder read last, even if that was for another call."""

    caught_by = ("history",)

    def attach(self, manager):
        super().attach(manager)
        self._seeds = None
        self.before(self.model.get_encoder(), self._before_encoder)

    def _before_encoder(self, module, args, kwargs):
        self._seeds = fingerprint(kwargs["input_ids"])

    def _begin(self, call, named, states):
        super()._begin(call, named, states)
        seeds, rows = self._seeds, call.manager._prefill.visibility.batch
        if seeds is None or len(seeds) != rows:
            seeds = torch.zeros(rows, dtype=torch.int64)
        call.manager._prefill.fingerprints = lambda: seeds


class KeepsHooksOfAnInterrupt(BartAdapter):
    """Leaves the hooks of a call that was interrupted to the next call, which runs them twice."""

    caught_by = ("history",)

    def open_call(self):
        left, self._call_handles = self._call_handles, []
        super().open_call()
        self._call_handles = left


class SharesEqualRows(BartAdapter):
    """Holds rows once that have equal inputs, whoever made them."""

    caught_by = ("rows",)

    def _begin(self, call, named, states):
        alike = all(torch.equal(row, states[0]) for row in states)
        begin = call.manager.begin

        def share(visibility, *args, shared_rows, **kwargs):
            if alike:
                shared_rows = SharedRows(len(states))
                visibility = dataclasses.replace(
                    visibility, rows=visibility.rows[:1], units=visibility.units[:1], live=visibility.live[:1]
                )
            begin(visibility, *args, shared_rows=shared_rows, **kwargs)

        call.manager.begin = share
        try:
            super()._begin(call, named, states)
        finally:
            del call.manager.begin

    def _receive(self, call, rank, site, cache, named):
        before = call.before_layer
        # The text is not shown to the core, which would compare the rows.
        call.before_layer = lambda rank, layer, features, text: before(rank, layer, features)
        try:
            return super()._receive(call, rank, site, cache, named)
        finally:
            del call.before_layer


class DropsTheMaskForEmptySamples(BartAdapter):
    """Takes a mask that leaves nothing of a sample for no mask, so that all samples see their padding."""

    caught_by = ("padding",)

    def _visibility(self, tokens, states, encoder_mask, decoder_mask, copies):
        if encoder_mask is not None and not encoder_mask.any(-1).all():
            encoder_mask = torch.ones_like(encoder_mask)
        return super()._visibility(tokens, states, encoder_mask, decoder_mask, copies)


class IgnoresNewTokens(BartAdapter):
    """Gives layers the encoder's own features of the columns whose places new tokens take."""

    caught_by = ("KV13",)

    def _receive(self, call, rank, site, cache, named):
        before = call.manager.before_layer
        call.manager.before_layer = lambda *args: dataclasses.replace(before(*args), replaced=None)
        try:
            return super()._receive(call, rank, site, cache, named)
        finally:
            del call.manager.before_layer


class RereadsWithTheFirstMask(MllamaAdapter):
    """Reads the last token again with the cross-attention mask of the first one."""

    caught_by = ("reread",)

    def last_row(self, named):
        row, mask = super().last_row(named), named["cross_attention_mask"]
        return {**row, "cross_attention_mask": mask[:, :1]}


class RereadsPadding(BartAdapter):
    """Reads the last token again without the encoder's mask."""

    caught_by = ("reread",)

    def last_row(self, named):
        return {**super().last_row(named), "encoder_attention_mask": None}


class NeverLeavesTheSecondCall(MllamaAdapter):
    """Takes any call for the second one of a prefill that was interrupted while it was read again."""

    caught_by = ("reread",)

    def finish_prefill(self, module, output):
        again = None if self._call is None else self._call.again
        try:
            return super().finish_prefill(module, output)
        except BaseException:
            self._reread, again.thread = again, threading.get_ident()
            raise


class CountsKeptLogitsAsDrafts(MllamaAdapter):
    """Takes the last rows of a call that wants several logits for drafts, which are not live."""

    caught_by = ("logits",)

    def attach(self, manager):
        self._drafts = 0
        self.before(self.model, self._before_model)
        super().attach(manager)

    def _before_model(self, module, args, kwargs):
        self._drafts = max(kwargs.get("logits_to_keep") or 0, 1) - 1

    def _visibility(self, call, rows, attention_mask, length, copies):
        see = super()._visibility(call, rows, attention_mask, length, copies)
        live = see.live.clone()
        live[:, max(0, length - self._drafts) :] = False
        return dataclasses.replace(see, live=live)


class DraftsInThePrefill(BartAdapter):
    """Lets assisted decoding verify its first drafts in the prefill, where they see what is dropped next."""

    caught_by = ("drafts",)

    def around(self, module, method, call):
        if method != CANDIDATES:
            super().around(module, method, call)


class ReturnsNarrowWeights(BartAdapter):
    """Returns attention weights over what is held, in place of all columns."""

    caught_by = ("weights",)

    def _spread(self, site, module, args, kwargs, output):
        return None


class SpreadsWeightsLate(MllamaAdapter):
    """Puts weights back to their columns after those hooks have run that were there before."""

    caught_by = ("weights",)

    def after(self, module, hook, *, for_one_call=False, always=False, first=False):
        super().after(module, hook, for_one_call=for_one_call, always=always)


class HooksSurviveCopies(BartAdapter):
    """Registers plain functions, which a copy of the model calls as the model does."""

    caught_by = ("copies",)

    def attach(self, manager):
        super().attach(manager)
        for site in self.sites:
            self.after(site.module, self._after_any_attention)

    def before(self, module, hook, *, for_one_call=False):
        handles, _ = self._kind(for_one_call)
        handles.append(module.register_forward_pre_hook(plainly(hook), with_kwargs=True))

    def after(self, module, hook, *, for_one_call=False, always=False, first=False):
        if for_one_call and hook == self._after_attention:
            return  # the hooks of `attach` are enough
        handles, _ = self._kind(for_one_call)
        options = {"with_kwargs": True, "always_call": always, "prepend": first}
        handles.append(module.register_forward_hook(plainly(hook), **options))

    def _after_any_attention(self, module, args, kwargs, output):
        if self._manager.in_prefill:
            self._after_attention(module, args, kwargs, output)


def plainly(hook):
    def call(*arguments):
        return hook(*arguments)

    return call


class CannotBePickled(MllamaAdapter):
    """Leaves a function on the model that pickle cannot write."""

    caught_by = ("copies",)

    def attach(self, manager):
        super().attach(manager)
        self.override(self._inner, "unused", lambda: None)


class AnswersTwoThreads(BartAdapter):
    """Does not look which thread calls the model."""

    caught_by = ("threads",)

    def open_call(self):
        self.calls += 1
        self.end_of_call()

    def close_call(self):
        self.end_of_call()
        return True


ADAPTERS_IN_RUNS = [
    cls for cls in list(globals().values()) if inspect.isclass(cls) and hasattr(cls, "caught_by")
]
