"""Every declared family: `full` is bit-identical to stock, and pruning equals the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from decoder_pairs import PAIRS
from family_checks import (
    BY_HEAD,
    OLD,
    ONWARD,
    adapter_of,
    apart,
    check,
    equals_oracle,
    hardest_of,
    installed,
    largest,
    pads,
    settings_of,
)
from generation import generate

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.families.pictures import VisionEncoderDecoderAdapter
from kvprune.adapters.families.speech import CohereAsrAdapter, MoonshineAdapter
from kvprune.adapters.families.texts import LedAdapter, M2M100Adapter, T5Adapter
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.session.compression import Compression
from kvprune.testing import check_adapter


@pytest.mark.parametrize("name", installed([*TINY_FAMILIES, *PAIRS]))
def test_a_class_equals_stock_and_the_oracle(name: str) -> None:
    check(name, *hardest_of(name), (*BY_HEAD, *ONWARD))


@pytest.mark.parametrize("name", installed(name for name, tiny in TINY_FAMILIES.items() if not tiny.sdpa))
def test_transformers_itself_has_no_sdpa_for_a_class_that_is_compared_without(name: str) -> None:
    if OLD and name == "T5GemmaForConditionalGeneration":
        pytest.skip("this release has it")
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        TINY_FAMILIES[name].model(name, attn_implementation="sdpa")


def test_the_decoder_of_musicgen_may_have_sdpa() -> None:
    name = "MusicgenForConditionalGeneration"
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    model.decoder.set_attn_implementation("sdpa")
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    for guidance in (1.0, 3.0):
        for spec in (*BY_HEAD, *ONWARD):
            equals_oracle(name, model, inputs, spec, guidance_scale=guidance)


HEADLESS = [
    name
    for adapter in FAMILIES
    for name in adapter.model_classes
    if name.endswith("Model") and name not in TINY_FAMILIES
]
"""Declared classes without a language-model head, such as BartModel."""


@pytest.mark.parametrize("name", installed(HEADLESS))
def test_a_class_without_a_head_is_pruned_as_the_one_with_a_head(name: str) -> None:
    whole = (
        "MarianMTModel" if name == "MarianModel" else f"{name.removesuffix('Model')}ForConditionalGeneration"
    )
    tiny = TINY_FAMILIES[whole]
    config = tiny.config(transformers)
    config._attn_implementation = "sdpa" if tiny.sdpa else "eager"
    model = getattr(transformers, name)(config).eval()
    prompt: dict[str, Any] = {"decoder_input_ids": torch.full((2, 2), 3)}
    if name == "DiaModel":  # a token for each codebook, and no cache unless asked for
        prompt = {"decoder_input_ids": torch.full((2, 2, 2), 3), "use_cache": True}
    with torch.no_grad(), kvprune.compress(model, "trim:keep_ratio=0.5") as run:
        model(**tiny.batch(torch.float32, tiny.pads), **prompt)
    assert run.report.prefills == 1
    assert run.report.bytes_held < run.report.bytes_full


SUITE = (
    T5Adapter,
    M2M100Adapter,
    MoonshineAdapter,
    CohereAsrAdapter,
    VisionEncoderDecoderAdapter,
    LedAdapter,
)
"""One adapter of each kind, for the whole suite; the other declarations differ from these in names only."""

NOT_CALLED = {
    "SwitchTransformersForConditionalGeneration": "its encoder gets use_cache=True as well, and refuses it",
    "DiaForConditionalGeneration": "its decoder reads one token for each codebook",
    "MusicgenForConditionalGeneration": "its decoder reads one row of tokens for each codebook",
    "BlipForConditionalGeneration": "its forward call is for training; `generate` calls its decoder",
    "ProphetNetForConditionalGeneration": "it returns logits where others return attention weights",
}
"""Classes whose attention the suite cannot see, and why."""


@pytest.mark.parametrize("name", installed(name for name in TINY_FAMILIES if name not in NOT_CALLED))
def test_policies_see_the_attention_of_a_class(name: str) -> None:
    tiny = TINY_FAMILIES[name]
    report = check_adapter(
        adapter_of(name),
        lambda dtype: tiny.model(name, dtype, "eager"),
        lambda dtype: tiny.batch(dtype, pads(name, "eager")),
        only=["view"],
    )
    assert [result.outcome for result in report.results] == ["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", installed([*TINY_FAMILIES, *PAIRS]))
def test_a_class_equals_the_oracle_in_all_settings(name: str) -> None:
    for setting in settings_of(name):
        check(name, *setting, (*BY_HEAD, *ONWARD))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", SUITE)
def test_the_suite_passes(adapter: Any) -> None:
    report = check_adapter(adapter)
    assert {result.outcome for result in report.results} <= {"passed", "not applicable"}
    skipped = {result.id for result in report.results if result.outcome != "passed"}
    assert skipped <= {"logits", "drafts", "rows", "padding", "history"}


@pytest.mark.parametrize("name", installed(name for name, tiny in TINY_FAMILIES.items() if tiny.pads))
def test_lossless_drops_padding_of_the_encoder(name: str) -> None:
    tiny, adapter = TINY_FAMILIES[name], adapter_of(name)
    model = tiny.model(name, torch.float32, "sdpa" if tiny.sdpa else "eager")
    inputs = {key: tensor[1:] for key, tensor in tiny.batch(torch.float32, True).items()}  # the padded one
    _, stock, _ = generate(model, inputs, 3)
    with Compression(adapter(model), kvprune.get_policy("lossless"), seed=0) as run:
        _, logits, _ = generate(model, inputs, 3)
    assert apart(logits, stock) <= 1e-5 * largest(stock)
    assert run.report.kept_fraction == 1.0
    assert run.report.bytes_held < run.report.bytes_full


def test_a_softcap_is_said_to_policies_that_look_at_attention() -> None:
    name = "T5GemmaForConditionalGeneration"
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    for layer in model.get_decoder().layers:
        layer.cross_attn.attn_logit_softcapping = 50.0
    warnings = {}
    for spec in ("trim", "norm"):
        with kvprune.compress(model, spec) as run:
            generate(model, TINY_FAMILIES[name].batch(torch.float32, True), 2)
        warnings[spec] = " ".join(run.report.warnings)
    assert "T5Gemma caps attention logits at 50.0; policies see attention without the cap" in warnings["trim"]
    assert "caps" not in warnings["norm"]


def test_every_declared_class_is_tested() -> None:
    generating = {
        name for adapter in FAMILIES for name in adapter.model_classes if not name.endswith("Model")
    } | {"VisionEncoderDecoderModel", "SpeechEncoderDecoderModel", "EncoderDecoderModel"}
    assert {name.split()[0] for name in TINY_FAMILIES} == generating | {"MarianMTModel"}
