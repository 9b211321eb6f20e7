"""A slow reference for contrast: both branches read each whole prefix, without caches and without hooks.

The pruned branch is the untouched model with the dropped columns masked. A stock `generate` with this
processor must give what `kvprune.contrast` gives.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from transformers import LogitsProcessor

from kvprune.session.registry import find_adapter


class SlowContrast(LogitsProcessor):
    """Combines full and masked log-probabilities of whole prefixes.

    Args:
        model: An untouched model.
        inputs: What `generate` gets.
        run: The contrast that was run; says what its second branch kept.
        combine: Gets log-probabilities ``[B, V]`` of both branches, float64, and what it decided at the
            first token (None then); returns scores and what it decided.
        repeats: Rows that `generate` makes from each sample.
    """

    def __init__(self, model, inputs, run, combine, repeats=1):
        self.model, self.combine, self.repeats = model, combine, repeats
        self.prompt = 0  # tokens of the prompt, known when generate asks first
        self.inputs = inputs
        self.sites = {site.layer_idx: site for site in find_adapter(model)(model).sites}
        self.decode = {layer: one.to_mask() for layer, one in run.selections.items()}  # bool [B, H or 1, S]
        self.prefill = {
            layer: None if one is None else one.to_mask() for layer, one in run.prefill_selections.items()
        }
        self.rereads = run.rereads
        self.decided = None

    def __call__(self, input_ids, scores):
        is_first = not self.prompt
        self.prompt = self.prompt or input_ids.shape[1]
        full = self.logits(input_ids).double().log_softmax(-1)
        with self.masking():
            pruned = self.logits(input_ids).double().log_softmax(-1)
        combined, decided = self.combine(full, pruned, None if is_first else self.decided)
        if is_first:
            self.decided = decided  # the same for all rows of a sample
        combined = combined.log_softmax(-1)
        # What the rule forbids is as likely as the first branch says, but e**-100 times as likely as the rest.
        return torch.where(combined < full - 100, full - 100, combined).to(scores.dtype)

    def logits(self, prefix):
        """Return the logits of the last token of each row, read as a whole."""
        rows = {name: tensor.repeat_interleave(self.repeats, 0) for name, tensor in self.inputs.items()}
        rows.pop("decoder_input_ids", None)
        if self.model.config.is_encoder_decoder:
            rows |= {"decoder_input_ids": prefix}
        else:
            more = prefix.shape[1] - self.prompt
            mask = torch.cat([rows["attention_mask"], torch.ones_like(prefix[:, :more])], 1)
            rows |= {"input_ids": prefix, "attention_mask": mask}
            rows["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            cross = rows["cross_attention_mask"]
            last = cross[:, -1:].expand(-1, more, -1, -1)
            rows["cross_attention_mask"] = torch.cat([cross, last], 1)
        with torch.no_grad():
            return self.model(**rows, use_cache=False).logits[:, -1]

    @contextmanager
    def masking(self):
        """Mask the dropped columns in each cross-attention."""
        with ExitStack() as stack:
            for layer, site in self.sites.items():
                hook = self.masked(site, self.decode[layer], self.prefill[layer])
                stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def masked(self, site, decode, prefill):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            batch, length = hidden.shape[:2]
            answering = torch.arange(length) >= self.prompt - self.rereads  # rows that read the pruned cache
            dropped = self.rows(~decode, batch, site.heads)[:, :, None]  # [B, 1 or Hq, 1, S]
            before = torch.zeros_like(dropped)
            if prefill is not None:
                before = self.rows(~prefill, batch, site.heads)[:, :, None]
            gone = torch.where(answering[:, None], dropped, before)  # [B, 1 or Hq, T, S]
            mask = kwargs.get(site.mask)
            if mask is None:
                mask = torch.zeros(batch, 1, length, gone.shape[-1], dtype=hidden.dtype)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(
                    ~mask, torch.finfo(hidden.dtype).min
                )
            mask = mask.masked_fill(gone, torch.finfo(hidden.dtype).min)
            return args, {**kwargs, site.mask: mask}

        return hook

    @staticmethod
    def rows(flags, batch, heads):
        flags = flags.repeat_interleave(batch // flags.shape[0], 0)
        return flags if flags.shape[1] == 1 else flags.repeat_interleave(heads // flags.shape[1], 1)
