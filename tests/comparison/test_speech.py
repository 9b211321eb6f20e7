"""A Whisper writes down recordings: caps, errors, languages, timed calls, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from speech_helpers import WORDS, load, recording, speech_file, tiny_checkpoint

from kvprune.comparison import Settings, compare
from kvprune.comparison.data.examples import Example, Utterance, read_examples
from kvprune.comparison.execution.batches import ask, batches, load_generator
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.comparison.execution.transcripts import cap_after
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.storage.answers import Transcript, from_row, to_row
from kvprune.errors import DataError, KVPruneError, UnsupportedModelError
from kvprune.testing import tiny_mllama

SPECS = ("trim:keep_ratio=0.1", "norm:keep_ratio=0.1,reach=onward", "random:keep_ratio=0.1,reach=onward")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whisper") / "model")


@pytest.fixture(scope="module")
def generator(model: Path) -> SpeechGenerator:
    return load(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speech_file(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def examples(data: Path) -> tuple[Example, ...]:
    return read_examples(data)


def transcripts(
    generator: SpeechGenerator, examples: tuple[Example, ...], spec: str = "full", seed: int = 0
) -> list[Transcript]:
    """Return what a configuration writes, after the full cache."""
    inputs, full = generator.encode(examples), {}
    found = []
    for one in expand([spec], []):
        found = ask(generator, examples, inputs, one, seed, full)
        full = full or {answer.id: answer for answer in found}
    assert all(isinstance(answer, Transcript) for answer in found)
    return found  # type: ignore[return-value]


def test_timestamps_that_nobody_asked_for_do_not_begin_another_call(
    tmp_path: Path, examples: tuple[Example, ...]
) -> None:
    generator = load(tiny_checkpoint(tmp_path / "model", times=20))
    quiet = {spec: transcripts(generator, examples, spec) for spec in SPECS}
    settings = generator.model.generation_config
    first = settings.no_timestamps_token_id + 1
    settings.suppress_tokens = [token for token in settings.suppress_tokens if token < first]

    def say_times(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        loud = logits.clone()  # [B, T, vocabulary]
        loud[:, -1, first:] = -torch.inf
        loud[0, -1, first + 1] = 1e4  # one recording of the batch writes nothing else
        return loud

    with generator.model.proj_out.register_forward_hook(say_times):
        for spec in SPECS:
            found = transcripts(generator, examples, spec)
            assert [one.id for one in found] == [one.id for one in examples]
            assert (found[0].answer, found[0].tokens, found[0].finished) == ("", found[0].cap, False)
            assert found[1:] == quiet[spec][1:]


def greedy(generator: SpeechGenerator, examples: tuple[Example, ...]) -> list[list[int]]:
    """Decode with the untouched model in a loop of forward calls, without a cache."""
    model, inputs = generator.model, generator.encode(examples)
    config = model.generation_config
    said = config.lang_to_id["<|en|>"], config.task_to_id["transcribe"], config.no_timestamps_token_id
    found = []
    with torch.inference_mode():
        for features in inputs["input_features"]:
            tokens = [config.decoder_start_token_id, *said]
            for _ in range(generator.max_new_tokens):
                given = {"input_features": features[None], "decoder_input_ids": torch.tensor([tokens])}
                logits = model(**given, use_cache=False).logits[0, -1]
                logits[config.suppress_tokens] = -torch.inf
                if int(logits.argmax()) == config.eos_token_id:
                    break
                tokens.append(int(logits.argmax()))
            found.append(tokens[4:])
    return found


def test_transcripts_are_those_of_a_plain_loop(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    wanted = greedy(generator, examples)
    assert len({len(tokens) for tokens in wanted}) > 1, "they end at different places"
    new = generator.generate(generator.encode(examples))
    lengths = generator.lengths(new)
    assert [row[:length].tolist() for row, length in zip(new, lengths, strict=True)] == wanted
    assert generator.texts(new) == [generator.processor.tokenizer.decode(tokens).strip() for tokens in wanted]


def test_the_full_cache_is_limited_by_the_model_alone(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    found = transcripts(generator, examples)
    assert {answer.cap for answer in found} == {generator.max_new_tokens} == {80 - 4}
    assert [answer.tokens for answer in found] == [len(tokens) for tokens in greedy(generator, examples)]
    assert all(answer.finished == (answer.tokens < answer.cap) for answer in found)


@pytest.mark.parametrize("spec", SPECS)
def test_each_transcript_is_that_of_a_run_with_its_cap_alone(
    generator: SpeechGenerator, examples: tuple[Example, ...], spec: str
) -> None:
    full, found = transcripts(generator, examples), transcripts(generator, examples, spec)
    assert [answer.cap for answer in found] == [cap_after(answer.tokens) for answer in full]
    assert len({answer.cap for answer in found}) > 1
    (one,) = (one for one in expand([spec], []) if one.spec != "full")
    inputs = generator.encode(examples)
    for number, answer in enumerate(found):
        short = dataclasses.replace(generator, max_new_tokens=answer.cap)
        alone = ask(short, examples, inputs, one, 0, {whole.id: whole for whole in full})[number]
        assert isinstance(alone, Transcript)
        for field in ("answer", "tokens", "finished", "loops", "word_errors", "character_errors", "receipt"):
            assert getattr(alone, field) == getattr(answer, field), field


def test_some_are_cut_at_their_cap_and_some_end_before(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    found = [answer for spec in SPECS for answer in transcripts(generator, examples, spec)]
    assert {answer.finished for answer in found} == {True, False}
    for answer in found:
        assert answer.finished == (answer.tokens < answer.cap)
        assert answer.tokens <= answer.cap


def test_a_cap_is_not_beyond_the_limit(model: Path, examples: tuple[Example, ...]) -> None:
    generator = load(model, max_new_tokens=12)
    assert {answer.cap for answer in transcripts(generator, examples)} == {12}
    assert max(answer.cap for answer in transcripts(generator, examples, SPECS[0])) == 12


def test_an_empty_transcript_has_every_word_deleted(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    empty = [
        answer for spec in SPECS for answer in transcripts(generator, examples, spec) if not answer.answer
    ]
    assert empty
    for answer in empty:
        assert (answer.tokens, answer.finished, answer.loops) == (0, True, False)
        assert (answer.word_errors, answer.words) == (len(WORDS.split()), len(WORDS.split()))
        assert (answer.character_errors, answer.characters) == (len(WORDS), len(WORDS))


def test_a_transcript_without_a_wrong_word_is_correct(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    written = transcripts(generator, examples)
    said = max(written, key=lambda answer: answer.tokens)
    text = f"{said.answer.upper()}!"
    right = [dataclasses.replace(one, answers=(text,)) for one in examples if one.id == said.id]
    (found,) = transcripts(generator, tuple(right))
    assert (found.correct, found.word_errors, found.words, found.character_errors) == (True, 0, 1, 0)
    assert not said.correct
    assert said.word_errors > 0


def test_the_spelling_of_the_tokenizer_is_used(
    generator: SpeechGenerator, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = max(transcripts(generator, examples), key=lambda answer: answer.tokens)
    asked = tuple(dataclasses.replace(one, answers=("colour",)) for one in examples if one.id == said.id)
    assert not transcripts(generator, asked)[0].correct
    spelling = {"colour": said.answer.lower()}
    monkeypatch.setattr(generator.processor.tokenizer, "english_spelling_normalizer", spelling)
    assert transcripts(generator, asked)[0].correct


def test_only_what_draws_has_a_seed(generator: SpeechGenerator, examples: tuple[Example, ...]) -> None:
    for seed in (0, 5):
        assert {one.seed for one in transcripts(generator, examples, "full", seed)} == {None}
        assert {one.seed for one in transcripts(generator, examples, SPECS[0], seed)} == {None}
        assert {one.seed for one in transcripts(generator, examples, SPECS[2], seed)} == {seed}
    first, second = (transcripts(generator, examples, SPECS[0], seed) for seed in (0, 5))
    assert [one.receipt for one in first] == [one.receipt for one in second]


def test_transcripts_survive_the_results_file(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    for answer in transcripts(generator, examples, SPECS[2]):
        assert from_row("line 1", json.loads(json.dumps(to_row(answer)))) == answer


@pytest.mark.parametrize("tokens", [1, 30, 76])
def test_timed_calls_write_exactly_as_many_tokens(
    generator: SpeechGenerator, examples: tuple[Example, ...], tokens: int
) -> None:
    new = generator.generate(generator.encode(examples), tokens)
    assert new.shape == (3, tokens)
    assert generator.lengths(new) == [tokens] * 3


def test_more_tokens_than_positions_are_refused(
    generator: SpeechGenerator, model: Path, examples: tuple[Example, ...]
) -> None:
    with pytest.raises(KVPruneError, match="77 new tokens are asked for, but the model can write at most 76"):
        generator.generate(generator.encode(examples), 77)
    with pytest.raises(UnsupportedModelError, match=r"max_new_tokens is 77, but .* write at most 76 tokens"):
        load(model, max_new_tokens=77)


def test_batches_have_one_language_each(tmp_path: Path) -> None:
    examples = read_examples(speech_file(tmp_path, ("en", "de", "en", "de", "en")))
    assert [[one.id for one in batch] for batch in batches(examples, 2)] == [
        ["s0", "s2"],
        ["s4"],
        ["s1", "s3"],
    ]


def test_languages_of_one_batch_do_not_mix(generator: SpeechGenerator, tmp_path: Path) -> None:
    """Timing spreads one batch over the data, so a batch may have several languages."""
    mixed = read_examples(speech_file(tmp_path, ("en", "de", "en")))
    inputs = generator.encode(mixed)
    assert inputs["language"] == ["en", "de", "en"]
    new = generator.generate(inputs, 20)
    for number, one in enumerate(mixed):
        assert generator.generate(generator.encode([one]), 20)[0].tolist() == new[number].tolist()
    german = [dataclasses.replace(one, language="de") for one in mixed if isinstance(one, Utterance)]
    assert generator.generate(generator.encode(german), 20).tolist() != new.tolist()


def test_a_language_that_the_model_does_not_know_is_named(generator: SpeechGenerator, tmp_path: Path) -> None:
    generator.check(read_examples(speech_file(tmp_path, ("en", "german"))))
    with pytest.raises(DataError, match=r"example 's1' is in the language 'fr', .*; it knows: de, en"):
        generator.check(read_examples(speech_file(tmp_path, ("en", "fr"))))


def test_a_long_recording_needs_a_model_with_timestamps(generator: SpeechGenerator, tmp_path: Path) -> None:
    path = speech_file(tmp_path)
    recording(tmp_path / "s1.flac", 1.25)
    with pytest.raises(DataError, match=r"example 's1' lasts 1.25 s, more than the 1 s .* has no timestamps"):
        generator.check(read_examples(path))


def test_other_rates_and_channels_are_heard(generator: SpeechGenerator, tmp_path: Path) -> None:
    path = speech_file(tmp_path, ("en",))
    same = generator.encode(read_examples(path))
    recording(tmp_path / "s0.flac", 0.3, rate=44_100)
    other = generator.encode(read_examples(path))
    assert other["input_features"].shape == same["input_features"].shape


def test_a_model_for_english_alone_hears_english_alone(tmp_path: Path) -> None:
    generator = load(tiny_checkpoint(tmp_path / "english", multilingual=False))
    examples = read_examples(speech_file(tmp_path, ("en", "en")))
    generator.check(examples)
    assert len(transcripts(generator, examples, SPECS[0])) == 2
    with pytest.raises(DataError, match="language 'de', which this model does not know; it knows: en"):
        generator.check(read_examples(speech_file(tmp_path, ("de",))))


def test_float16_is_float32_on_a_cpu(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "half", dtype=torch.float16)
    assert load(checkpoint).model.dtype == torch.float32
    assert load(checkpoint, dtype="float16").model.dtype == torch.float16
    assert load(tiny_checkpoint(tmp_path / "brain", dtype=torch.bfloat16)).model.dtype == torch.bfloat16


def test_generate_says_nothing_about_itself(
    generator: SpeechGenerator, examples: tuple[Example, ...], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers.generation.utils")
    before = list(logger.filters)
    with caplog.at_level(logging.WARNING):
        generator.generate(generator.encode(examples), 3)
    assert not caplog.messages
    assert logger.filters == before


def test_a_model_that_does_not_hear_is_refused(tmp_path: Path) -> None:
    tiny_mllama().save_pretrained(tmp_path / "mllama")
    with pytest.raises(UnsupportedModelError, match="a mllama cannot be asked about speech; recordings"):
        load(tmp_path / "mllama")


def test_a_speech_model_without_an_adapter_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        encoder_attention_heads=2, decoder_attention_heads=2, input_feat_per_channel=8, conv_channels=8,
    )  # fmt: skip
    Speech2TextForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    AutoProcessor.from_pretrained(model).save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match="Speech2TextForConditionalGeneration"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("lang_to_id", r"does not list languages \(lang_to_id\)"),
        ("no_timestamps_token_id", r"does not name the token .* \(no_timestamps_token_id\)"),
    ],
)
def test_a_model_with_old_settings_is_refused(tmp_path: Path, missing: str, said: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "old")
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    del settings[missing]
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=said):
        load(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_of_a_whisper_are_refused_with_its_own_remedy(tmp_path: Path, name: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "pickled")
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(UnsupportedModelError, match=r"AutoModelForSpeechSeq2Seq\.from_pretrained"):
        load(checkpoint)


def test_the_demo_without_the_hub_says_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"whisper-base.*hub can be reached.*--model FOLDER"):
        load(None)


@pytest.mark.parametrize("module", ["jiwer", "soundfile", "soxr"])
def test_a_missing_package_is_named_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'needs {module}, .*pip install "kvprune\[speech\]"'):
        load("anything")


def test_settings_choose_the_kind_and_its_limit(model: Path) -> None:
    found = load_generator(Settings(model=str(model)), "speech")
    assert isinstance(found, SpeechGenerator)
    assert found.max_new_tokens == 76
    assert load_generator(Settings(model=str(model), max_new_tokens=9), "speech").max_new_tokens == 9
    assert load_generator(Settings(), "pictures").max_new_tokens == 16


def test_the_encoder_runs_once_for_all_configurations(model: Path, examples: tuple[Example, ...]) -> None:
    generator, calls = load(model), []
    generator.model.get_encoder().conv1.register_forward_hook(lambda *_: calls.append(1))
    inputs, full = generator.encode(examples), {}
    for one in expand(["trim", "norm"], [0.5, 0.1]):
        answers = ask(generator, examples, inputs, one, 0, full)
        full = full or {answer.id: answer for answer in answers}
    assert len(calls) == 1
    assert (generator.encoder.computed, generator.encoder.reused) == (1, 4)
    generator.generate(inputs, 2)
    assert len(calls) == 2, "timed calls run it"


def test_a_whole_comparison_of_speech(model: Path, data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(model), "data": data, "batch_size": 2, "repetitions": 0}
    summary = compare(["trim", "norm"], [0.5], Settings(output=tmp_path / "out", **settings))
    assert summary.examples == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["words"] for row in rows if "words" in row} == {len(WORDS.split())}
