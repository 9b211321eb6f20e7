"""LED, MVP and TrOCR accept one mask for all heads; `OneMask` gives each head its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import generate

import kvprune
from kvprune.adapters.one_mask import OneMask
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import UnsupportedCacheError
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle

RIGID = ("LEDForConditionalGeneration", "MvpForConditionalGeneration", "VisionEncoderDecoderModel")


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def site_of(name: str) -> Any:
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    return find_adapter(model)(model).sites[0]


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_it_is_used_where_a_module_accepts_one_mask(name: str) -> None:
    site = site_of(name)
    assert site.one_mask == (name in RIGID)
    mask = site.fit_mask(torch.zeros(2, site.heads, 1, 5), 3)
    assert isinstance(mask, OneMask) == (name in RIGID)
    assert not isinstance(site.fit_mask(torch.zeros(2, 1, 1, 5), 3), OneMask)


def test_it_is_added_to_logits_of_all_heads() -> None:
    by_head, logits = draws(2, 4, 3, 5), torch.ones(2, 4, 3, 5)
    mask = OneMask(by_head)
    assert mask.shape == mask.size() == (2, 1, 3, 5)
    for found in (logits + mask, mask + logits, torch.add(logits, mask), logits.clone().add_(mask)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, logits + by_head)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_stays_itself_in_another_dtype(dtype: torch.dtype) -> None:
    by_head = draws(2, 4, 3, 5)
    mask = OneMask(by_head).to(dtype)
    assert isinstance(mask, OneMask)
    assert (mask.shape, mask.dtype) == ((2, 1, 3, 5), dtype)
    assert torch.equal(torch.zeros(2, 4, 3, 5, dtype=dtype) + mask, by_head.to(dtype))


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask.expand(2, 4, 3, 5),
        lambda mask: mask + 1,
        lambda mask: mask + mask,
        lambda mask: mask * 2,
        lambda mask: mask[0],
        lambda mask: mask.sum(),
        lambda mask: torch.zeros(2, 1, 3, 5) + mask,
    ],
)
def test_anything_else_is_refused(use: Any) -> None:
    with pytest.raises(
        UnsupportedCacheError, match=r"\(2, 4, 3, 5\).* use a policy whose heads share tokens"
    ):
        use(OneMask(draws(2, 4, 3, 5)))


def test_masks_with_gradients_are_refused() -> None:
    with pytest.raises(UnsupportedCacheError, match="a mask with gradients"):
        OneMask(draws(2, 4, 3, 5).requires_grad_())


@pytest.mark.parametrize("name", RIGID)
def test_it_compiles_into_one_graph(name: str) -> None:
    attention = site_of(name).module
    text, states, by_head = draws(2, 3, 32), draws(2, 5, 32), draws(2, 4, 3, 5)
    torch._dynamo.reset()
    compiled = torch.compile(attention.forward, backend="aot_eager", fullgraph=True)
    for mask in (OneMask(by_head), OneMask(2 * by_head), by_head[:, :1]):
        expected = attention(text, key_value_states=states, attention_mask=mask)[0]
        assert torch.equal(compiled(text, key_value_states=states, attention_mask=mask)[0], expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", RIGID)
def test_heads_that_differ_equal_the_oracle(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tiny = TINY_FAMILIES[name]
    model, inputs = tiny.model(name, dtype, "eager"), tiny.batch(dtype, tiny.pads)
    with kvprune.compress(model, "norm:keep_ratio=0.5") as run:
        sequences, logits, _ = generate(model, inputs, 4, **options)
    assert any(one.mask.any(1).logical_xor(one.mask.all(1)).any() for one in run.selections.values())
    with masked_oracle(model, run.selections, run.prefill_selections, adapter=find_adapter(model)):
        expected, wanted, _ = generate(model, inputs, 4, **options)
    assert torch.equal(sequences, expected)
    assert (logits - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * wanted.abs().max()


def test_gradients_flow_through_logits() -> None:
    logits = draws(2, 4, 3, 5).requires_grad_()
    (logits + OneMask(draws(2, 4, 3, 5))).softmax(-1).square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
