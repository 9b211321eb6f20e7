"""Hooks that wait leave their modules and come back in order; decode steps share masks of the same tiles."""

from __future__ import annotations

import pytest
import torch
from families import inputs_of, model_of
from torch import nn

import kvprune
from kvprune.adapters.attachment import Attachment
from kvprune.adapters.mllama.tile_mask import TileMask


def attached(model):
    """Return an attachment with a hook before and one after a module, and what they note."""
    seen, attachment = [], Attachment(model, "test")
    attachment.before(model, lambda *call: seen.append("before"))
    attachment.after(model, lambda *call: seen.append("after"))
    return attachment, seen


def test_a_module_has_no_hooks_while_they_wait():
    model = nn.Identity()
    attachment, seen = attached(model)
    attachment.wait()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    model(1)
    with attachment.resumed():
        model(1)
    model(1)
    assert seen == ["before", "after"]
    attachment.detach()
    assert not model._forward_pre_hooks_with_kwargs
    assert not model._forward_hooks_with_kwargs


def test_hooks_of_others_stay_where_they_are():
    model = nn.Identity()
    order = []
    attachment = Attachment(model, "test")
    attachment.before(model, lambda *call: order.append("ours"))
    attachment.wait()
    model.register_forward_pre_hook(lambda *call: order.append("later"))
    model(1)
    with attachment.resumed():
        model(1)
    assert order == ["later", "ours", "later"]
    attachment.detach()
    assert len(model._forward_pre_hooks) == 1


def test_a_module_that_somebody_has_hooked_keeps_all_hooks():
    model = nn.Identity()
    order = []
    model.register_forward_pre_hook(lambda *call: order.append("earlier"))
    attachment = Attachment(model, "test")
    attachment.before(model, lambda *call: order.append("ours"), first=True)
    attachment.wait()
    assert len(model._forward_pre_hooks) == 2
    model(1)
    with attachment.resumed():
        model(1)
    assert order == ["earlier", "ours", "earlier"]


def test_a_hook_that_watches_also_runs_while_others_wait_but_not_in_a_pause():
    model, seen = nn.Identity(), []
    attachment = Attachment(model, "test")
    attachment.after(model, lambda *call: seen.append(1), watches=True)
    attachment.wait()
    model(1)
    with attachment.paused():
        model(1)
    assert seen == [1]


def test_hooks_leave_again_after_an_error():
    model = nn.Identity()
    attachment, _ = attached(model)
    attachment.wait()
    with pytest.raises(ZeroDivisionError), attachment.resumed():
        raise ZeroDivisionError
    assert not model._forward_pre_hooks
    with attachment.resumed():
        assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_shared_masks_of_decode_steps_change_nothing(monkeypatch, beams):
    model, inputs = model_of("Mllama"), inputs_of("Mllama")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    held = []

    def generated():
        with kvprune.compress(model, "snapkv:keep_ratio=0.3") as run:
            out = model.generate(**inputs, **options)
            held.append(run._adapter._masks)
        assert run._adapter._masks is None
        return out

    shared = generated()
    assert len(held[0]._made) == len(model.config.text_config.cross_attention_layers)
    monkeypatch.setattr(TileMask, "serves", lambda self, rows, dtype: False)
    fresh = generated()
    assert torch.equal(shared.sequences, fresh.sequences)
    assert all(map(torch.equal, shared.logits, fresh.logits))


def test_masks_serve_only_decode_steps_of_the_same_tiles():
    rows = torch.tensor([[[True, False]]])
    masks = TileMask(rows, 2, torch.float32, layers=1)
    assert masks.serves(rows.clone(), torch.float32)
    assert not masks.serves(rows.clone(), torch.float64)
    assert not masks.serves(~rows, torch.float32)
    assert not masks.serves(rows.expand(2, -1, -1), torch.float32)
    assert not masks.serves(None, torch.float32)
    with torch.inference_mode():
        assert not masks.serves(rows.clone(), torch.float32)
    prompt = rows.expand(-1, 3, -1)
    assert not TileMask(prompt, 2, torch.float32, layers=1).serves(prompt, torch.float32)
