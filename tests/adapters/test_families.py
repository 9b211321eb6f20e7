"""Every declared family: `full` is bit-identical to stock, and pruning equals the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation import generate

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.families.pictures import VisionEncoderDecoderAdapter
from kvprune.adapters.families.speech import CohereAsrAdapter, MoonshineAdapter
from kvprune.adapters.families.texts import LedAdapter, M2M100Adapter, T5Adapter
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.session.compression import Compression
from kvprune.testing import check_adapter, masked_oracle

STEPS = 4
MOST = 1e-5
"""Largest difference of logits in float32, relative to the largest logit."""

ONWARD = ("trim:keep_ratio=0.5", "divprune:keep_ratio=0.5")
"""Policies whose heads share tokens: by queries and by features, both also for later layers."""
BY_HEAD = ("norm:keep_ratio=0.5", "h2o:keep_ratio=0.5")


def adapter_of(name: str) -> Any:
    return next(adapter for adapter in FAMILIES if name.split()[0] in adapter.model_classes)


def settings_of(name: str) -> list[tuple[str, bool, int]]:
    """Return attention, padding and beams of each setting that stock transformers has."""
    tiny = TINY_FAMILIES[name]
    return [
        (attention, padded, beams)
        for attention in (("sdpa", "eager") if tiny.sdpa else ("eager",))
        for padded in ((False, True) if tiny.pads else (False,))
        for beams in ((1, 3) if tiny.beams else (1,))
    ]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; Dia forbids tokens by logits of -inf, which are equal."""
    differ = one != other
    return float((one - other)[differ].abs().max()) if differ.any() else 0.0


def check(name: str, attention: str, padded: bool, beams: int, specs: tuple[str, ...]) -> None:
    """Compare a class in one setting with stock transformers and with the oracle."""
    tiny, adapter = TINY_FAMILIES[name], adapter_of(name)
    model = tiny.model(name, torch.float32, attention)
    inputs = tiny.batch(torch.float32, padded)
    sequences, stock, _ = generate(model, inputs, STEPS, num_beams=beams)

    def run(spec: str) -> tuple[Any, Any, Any]:
        with Compression(adapter(model), kvprune.get_policy(spec), seed=0) as run:
            return *generate(model, inputs, STEPS, num_beams=beams)[:2], run

    with kvprune.compress(model, "full") as found:  # which finds the adapter
        same, logits, _ = generate(model, inputs, STEPS, num_beams=beams)
    assert found.report.bytes_held <= found.report.bytes_full
    assert torch.equal(same, sequences)
    assert torch.equal(logits, stock)
    for spec in specs:
        got, logits, pruned = run(spec)
        with masked_oracle(model, pruned.selections, pruned.prefill_selections, adapter=adapter):
            expected, wanted, _ = generate(model, inputs, STEPS, num_beams=beams)
        assert torch.equal(got, expected), spec
        largest = wanted[wanted.isfinite()].abs().max()
        assert apart(logits, wanted) <= MOST * largest, spec
        assert pruned.report.bytes_held < pruned.report.bytes_full, spec
        # The model depends on what it attends to, so the comparison above says something.
        assert logits.shape != stock.shape or apart(logits, stock) > 10 * MOST * largest, spec


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_class_equals_stock_and_the_oracle(name: str) -> None:
    attention, padded, beams = settings_of(name)[-1]
    check(name, "sdpa" if TINY_FAMILIES[name].sdpa else attention, padded, beams, (*BY_HEAD, *ONWARD))


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
    "BlipForConditionalGeneration": "its forward call is for training; `generate` calls its decoder",
    "ProphetNetForConditionalGeneration": "it returns logits where others return attention weights",
}
"""Classes whose attention the suite cannot see, and why."""


@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if name not in NOT_CALLED])
def test_policies_see_the_attention_of_a_class(name: str) -> None:
    tiny = TINY_FAMILIES[name]
    report = check_adapter(
        adapter_of(name),
        lambda dtype: tiny.model(name, dtype, "eager"),
        lambda dtype: tiny.batch(dtype, True),
        only=["view"],
    )
    assert [result.outcome for result in report.results] == ["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_FAMILIES)
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


@pytest.mark.parametrize("name", [name for name, tiny in TINY_FAMILIES.items() if tiny.pads])
def test_lossless_drops_padding_of_the_encoder(name: str) -> None:
    tiny, adapter = TINY_FAMILIES[name], adapter_of(name)
    model = tiny.model(name, torch.float32, "sdpa" if tiny.sdpa else "eager")
    inputs = {key: tensor[1:] for key, tensor in tiny.batch(torch.float32, True).items()}  # the padded one
    _, stock, _ = generate(model, inputs, 3)
    with Compression(adapter(model), kvprune.get_policy("lossless"), seed=0) as run:
        _, logits, _ = generate(model, inputs, 3)
    assert apart(logits, stock) <= 1e-5 * stock[stock.isfinite()].abs().max()
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


DECODERS = {
    "bert",
    "bert_generation",
    "camembert",
    "data2vec",
    "electra",
    "ernie",
    "gpt2",
    "megatron_bert",
    "rembert",
    "roberta",
    "roberta_prelayernorm",
    "roc_bert",
    "roformer",
    "tapas",
    "trocr",
    "xglm",
    "xlm_roberta",
    "xlm_roberta_xl",
    "xmod",
}
"""Families whose decoders are part of an EncoderDecoderModel or of its kin for pictures and speech."""

NOT_DECLARED = {
    "autoformer": "forecasts numbers; `generate` is its own",
    "informer": "forecasts numbers; `generate` is its own",
    "time_series_transformer": "forecasts numbers; `generate` is its own",
    "decision_transformer": "predicts actions; nothing is cached between calls",
    "bridgetower": "two encoders that attend to each other; nothing is generated",
    "blt": "attends to patches of its own text",
    "flaubert": "stock transformers generates with it without encoder states",
    "xlm": "stock transformers generates with it without encoder states",
    "kosmos2": "reads its picture among the tokens of the text",
    "fsmt": "its attention takes time first, and other arguments",
    "t5gemma2": "self-attention and cross-attention are one softmax",
    "musicgen": "rows of codebooks: not yet",
    "musicgen_melody": "no cross-attention: the condition precedes the text",
    "pop2piano": "needs a composer in its generation config: not yet",
    "speecht5": "its decoder takes input_values: not yet",
}
"""Folders of transformers' models that build an ``EncoderDecoderCache``, and why no adapter is for them."""


def test_every_family_of_transformers_with_such_a_cache_is_known() -> None:
    """A new release of transformers shows here what it added."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files = (file for file in models.glob("*/modeling_*.py"))
    building = {file.parent.name for file in files if "EncoderDecoderCache(" in file.read_text("utf-8")}
    classes = [name for adapter in FAMILIES for name in adapter.model_classes]
    declared = {getattr(transformers, name).__module__.split(".")[2] for name in classes}
    assert building - declared - DECODERS - NOT_DECLARED.keys() == set()
    assert not declared & NOT_DECLARED.keys()
