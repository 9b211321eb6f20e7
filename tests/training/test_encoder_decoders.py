"""Training on encoder-decoder models: tiny Whisper and BART, and the command on recordings."""

import dataclasses
import json

import pytest
import torch
from kvprune_strategies import QueCC
from speech_helpers import load, recording, speech_file, tiny_checkpoint

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.tiny.models import example_bart, example_whisper
from kvprune.comparison.data.examples import read_examples
from kvprune.engine.guidance import Prompt
from kvprune.errors import KVPruneError, TrainingError, UnsupportedModelError
from kvprune.policy.weights import read_weights
from kvprune.session import registry
from kvprune.session.registry import find_adapter
from kvprune.training import command
from kvprune.training.command import Asked, learn
from kvprune.training.distillation import Distillation, read_in_full
from kvprune.training.lessons import Lesson, answer_tensors, prompt_of
from kvprune.training.predictions import predictions
from kvprune.training.recipe import Recipe
from kvprune.training.speech_lessons import SpeechLessons
from kvprune.training.train import Files, train

RECIPE = Recipe(steps=6, every=2, rate=1e-2, warm_up=1, patience=0)
POLICY = QueCC(weights="fresh", k=4, query="none", width=8)
ANSWERS = ([5, 9, 7, 2], [8, 2], [6, 6, 2])


def example(kind):
    """A model with a bias on its tokens if it has one, the encoder's output, and a lesson about it."""
    model, inputs = {"bart": example_bart, "whisper": example_whisper}[kind](torch.float32)
    if kind == "bart":
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state  # [R, S, C]
    rows = len(states)
    arguments = {"input_ids": torch.tensor([[2, 4]]).expand(rows, -1)}
    if kind == "bart":
        arguments["encoder_attention_mask"] = inputs["attention_mask"]
    tokens, written = answer_tensors(ANSWERS[:rows], states.device)
    return model.eval(), inputs, Lesson(Prompt(arguments, states), tokens, written)


class Fixed:
    """The same lesson always."""

    source = "one lesson"

    def __init__(self, lesson):
        self.one = lesson

    def lesson(self, number):
        return self.one

    def validation(self):
        return [self.one]


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_predictions_are_those_of_the_whole_model(kind):
    model, inputs, lesson = example(kind)
    adapter = find_adapter(model)(model)
    with torch.no_grad():
        found = predictions(adapter, lesson.prompt, lesson.answer, lesson.written)
        ids = torch.cat([lesson.prompt.text, lesson.answer[:, :-1]], 1)
        wanted = model(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, 1:]
    torch.testing.assert_close(found[lesson.written], wanted[lesson.written])
    assert not model.get_decoder()._forward_pre_hooks


NOT_IN_ONE_CALL = {"BLIP", "Cohere ASR", "Dia", "Moonshine Streaming", "MusicGen"}
"""Families that make no prompt, write several streams of tokens, or read the encoder's output in parts."""

FAMILIES = {
    found.cls.family: found.cls
    for found in registry.load().adapters
    if issubclass(found.cls, EncoderDecoderAdapter)
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_whole_model_in_every_family(family):
    model, inputs = FAMILIES[family].example(torch.float32)
    adapter, rows = FAMILIES[family](model), len(next(iter(inputs.values())))
    given = {"decoder_input_ids": torch.tensor([[3, 4]]).expand(rows, -1), **inputs}
    answer, written = answer_tensors([[5, 9, 7]] * rows, torch.device("cpu"))

    def predicted():
        with torch.no_grad(), prompt_of(adapter) as prompts:
            model(**given)
        with torch.no_grad():
            return predictions(adapter, prompts[0], answer, written)

    if family in NOT_IN_ONE_CALL:
        with pytest.raises(KVPruneError):
            predicted()
        return
    found = predicted()
    given["decoder_input_ids"] = torch.cat([given["decoder_input_ids"], answer[:, :-1]], 1)
    if "decoder_attention_mask" in given:
        more = torch.ones_like(answer[:, :-1])
        given["decoder_attention_mask"] = torch.cat([given["decoder_attention_mask"], more], 1)
    with torch.no_grad():
        wanted = model(**given, use_cache=False).logits[:, -3:]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_training_lowers_the_divergence_and_leaves_the_model_alone(kind, tmp_path):
    model, _, lesson = example(kind)
    adapter, before = find_adapter(model)(model), {n: t.clone() for n, t in model.state_dict().items()}
    path = tmp_path / "w.safetensors"
    recipe = dataclasses.replace(RECIPE, steps=12, every=12, attention=0.1)
    done = train(adapter, POLICY, Fixed(lesson), recipe, Files(path), {}, half=False)
    first, last = done.curve
    assert last["divergence"] < 0.9 * first["divergence"]
    assert done.file.geometry == {"feature_width": lesson.prompt.states.shape[-1]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_gradients_reach_every_weight_and_with_all_tokens_nothing_diverges(kind):
    model, _, lesson = example(kind)
    adapter, geometry = find_adapter(model)(model), {"feature_width": lesson.prompt.states.shape[-1]}
    weights = {name: tensor.requires_grad_() for name, tensor in POLICY.initial(geometry).items()}
    with torch.no_grad():
        weights["gamma"].fill_(1.0)
    Distillation(adapter, POLICY, weights).measure(lesson).loss.backward()
    # What is added to all keys of a cell alike changes no softmax.
    assert {name for name, tensor in weights.items() if not tensor.grad.any()} <= {"key.in.bias"}
    all_tokens = dataclasses.replace(POLICY, k=1)
    measures = Distillation(adapter, all_tokens, all_tokens.initial(geometry)).measure(lesson)
    assert abs(measures.divergence) < 1e-5
    assert torch.equal(measures.right, measures.right_full)


def test_a_reading_that_was_kept_is_used(monkeypatch):
    model, _, lesson = example("whisper")
    adapter, geometry = find_adapter(model)(model), {"feature_width": lesson.prompt.states.shape[-1]}
    teacher = Distillation(adapter, POLICY, POLICY.initial(geometry), attention=1.0)
    anew = teacher.measure(lesson)
    kept = dataclasses.replace(lesson, full=read_in_full(adapter, lesson, outputs=True))
    monkeypatch.setattr("kvprune.training.distillation.read_in_full", None)
    again = teacher.measure(kept)
    assert torch.equal(again.loss, anew.loss)
    assert again.loss > again.divergence


def test_a_model_without_a_head_predicts_nothing():
    model, _, lesson = example("whisper")
    adapter = find_adapter(model.model)(model.model)
    with pytest.raises(TrainingError, match="a WhisperModel does not predict one token"):
        predictions(adapter, lesson.prompt, lesson.answer, lesson.written)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("whisper"))


def asked(folder, whisper, **changes):
    given = {"out": folder / "w.safetensors", "model": str(whisper), "batch": 2, "held_out": 0.4}
    return Asked(policy="quecc:k=4,query=none,width=8", **given | changes)


def test_the_command_trains_on_recordings_and_continues_bit_by_bit(tmp_path, whisper, monkeypatch):
    data, read = speech_file(tmp_path, ("en",) * 5), []
    forward = command.SpeechGenerator.encode
    monkeypatch.setattr(
        command.SpeechGenerator, "encode", lambda self, some: read.extend(some) or forward(self, some)
    )
    whole = learn(asked(tmp_path, whisper, data=data), RECIPE)
    assert sorted(one.id for one in read) == ["s0", "s1", "s2", "s3", "s4"]  # each of them once
    assert [row["step"] for row in whole.curve] == [0, 2, 4, 6]
    assert min(row["divergence"] for row in whole.curve) < whole.curve[0]["divergence"]
    file = read_weights(whole.file.path)
    assert file.options == {"k": 4, "query": "none", "width": 8}
    assert file.geometry == {"feature_width": 32}
    assert "3 examples to learn from and 2" in json.dumps(dict(file.training))
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")

    class StopHereError(Exception):
        pass

    def interrupt(what, done, total):
        if what.startswith("training") and done == 3:
            raise StopHereError

    parts = asked(tmp_path, whisper, data=data, out=tmp_path / "parts.safetensors")
    with pytest.raises(StopHereError):
        learn(parts, RECIPE, interrupt)
    with pytest.raises(TrainingError, match="other settings"):
        learn(dataclasses.replace(parts, seed=1), RECIPE)
    again = learn(parts, RECIPE)
    assert again.curve == whole.curve
    assert again.file.digest == whole.file.digest


def test_recordings_of_two_files_may_have_the_same_ids(tmp_path, whisper):
    (tmp_path / "other").mkdir()
    data, other = speech_file(tmp_path, ("en", "en")), tmp_path / "other" / "speech.jsonl"
    name = recording(tmp_path / "other" / "x.flac", 0.4, seed=7).name
    other.write_text(json.dumps({"id": "s0", "audio": name, "text": "may"}) + "\n")
    generator = load(whisper)
    lessons = SpeechLessons(
        generator, find_adapter(generator.model)(generator.model), read_examples(data), read_examples(other)
    )
    (held,) = lessons.validation()
    learned = lessons.lesson(0).prompt.states
    assert not any(torch.equal(held.prompt.states[0], row) for row in learned)


def test_what_was_said_is_learned_if_asked(tmp_path, whisper):
    data, found = speech_file(tmp_path, ("en", "de"), text="may be"), []
    learn(
        asked(tmp_path, whisper, data=data, answers="data", held_out=0.5),
        dataclasses.replace(RECIPE, steps=1),
        lambda what, done, total: found.append((what, done, total)),
    )
    assert found[:2] == [("listening", 1, 2), ("listening", 2, 2)]
    training = read_weights(tmp_path / "w.safetensors").training
    assert "answers of data" in training["settings"]["lessons"]


def test_what_cannot_be_trained(tmp_path, whisper):
    data = speech_file(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"needs 'question'.*query=none"):
        learn(dataclasses.replace(asked(tmp_path, whisper, data=data), policy="quecc:k=4"), RECIPE)
    with pytest.raises(TrainingError, match=r"must hold recordings .* 3 of its examples hold one"):
        learn(asked(tmp_path, whisper, data=data, validation=data), RECIPE)
    (tmp_path / "one").mkdir()
    with pytest.raises(TrainingError, match="are about one recording"):
        learn(asked(tmp_path, whisper, data=speech_file(tmp_path / "one", ("en",))), RECIPE)
    row = {"id": "long", "audio": recording(tmp_path / "long.flac", 1.5).name, "text": "a"}
    long, timed = tmp_path / "long.jsonl", tiny_checkpoint(tmp_path / "timed", times=60)
    long.write_text(data.read_text() + json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=r"'long' lasts 1.50 s, but training reads"):
        learn(asked(tmp_path, timed, data=long), RECIPE)


def test_files_and_models_of_two_kinds_are_refused(tmp_path, whisper):
    from kvprune import demo

    spoken = speech_file(tmp_path)
    pictures = demo.write_dataset(tmp_path / "pictures", tasks=("read",), per_task=2, seed=7, split="train")
    with pytest.raises(UnsupportedModelError, match="a whisper cannot be asked about pictures"):
        learn(asked(tmp_path, whisper, data=pictures), RECIPE)
    with pytest.raises(UnsupportedModelError, match="cannot be asked about speech"):
        learn(asked(tmp_path, demo.model_path(), data=spoken), RECIPE)
    with pytest.raises(TrainingError, match="must be of one kind, got speech and pictures"):
        learn(asked(tmp_path, whisper, data=spoken, validation=pictures), RECIPE)
    assert not list(tmp_path.glob("w.*"))
