"""Training: what is learned, what continues after an interruption, and what is refused."""

import dataclasses
import json

import pytest
import torch
from kvprune_strategies import QueCC
from typer.testing import CliRunner

from kvprune.cli import app
from kvprune.comparison.data.examples import Question
from kvprune.errors import TrainingError
from kvprune.policy.weights import read_weights
from kvprune.session.registry import find_adapter
from kvprune.training.command import Asked, learn, trainable
from kvprune.training.demo_lessons import DemoLessons
from kvprune.training.distillation import Distillation
from kvprune.training.file_lessons import require_apart, split
from kvprune.training.recipe import Recipe
from kvprune.training.train import Files, train

RECIPE = Recipe(steps=6, every=2, rate=1e-2, warm_up=1, patience=0)
POLICY = QueCC(weights="fresh", k=4)


@pytest.fixture(scope="module")
def demo():
    from kvprune import demo as package

    return package.load()


@pytest.fixture(scope="module")
def lessons(demo):
    return DemoLessons(*demo, pictures=2, batch=4, validation=1)


@pytest.fixture
def adapter(demo):
    return find_adapter(demo[0])(demo[0])


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


class StopHereError(Exception):
    """Stands for a user who presses Ctrl+C."""


def test_training_lowers_the_divergence_and_leaves_the_model_alone(tmp_path, demo, adapter, lessons):
    before = {name: tensor.clone() for name, tensor in demo[0].state_dict().items()}
    recipe = dataclasses.replace(RECIPE, steps=8)
    path = tmp_path / "w.safetensors"
    done = train(adapter, POLICY, lessons, recipe, Files(path), {}, half=False)
    assert [row["step"] for row in done.curve] == [0, 2, 4, 6, 8]
    assert all(torch.equal(tensor, before[name]) for name, tensor in demo[0].state_dict().items())
    assert all(parameter.grad is None for parameter in demo[0].parameters())
    file = read_weights(path)
    assert file == done.file
    assert file.options == {"k": 4, "query": "prompt"}
    assert file.geometry == {"feature_width": 96, "question_width": 96}
    assert file.training["settings"]["recipe"]["steps"] == 8
    best = min(done.curve, key=lambda row: row["divergence"])
    assert done.best_step == best["step"]
    assert file.training["validation"]["divergence"] == pytest.approx(best["divergence"])
    assert (tmp_path / "w.csv").read_text().count("\n") == 6
    assert sorted(one.name for one in tmp_path.iterdir()) == ["w.csv", "w.safetensors"]
    assert QueCC(weights=str(path), k=4).digest == file.digest


def test_an_interrupted_training_continues_bit_by_bit(tmp_path, adapter, lessons):
    whole = train(adapter, POLICY, lessons, RECIPE, Files(tmp_path / "whole.safetensors"), {}, half=False)

    def interrupt(step, row):
        if step == 3:
            raise StopHereError

    files = Files(tmp_path / "parts.safetensors")
    with pytest.raises(StopHereError):
        train(adapter, POLICY, lessons, RECIPE, files, {}, half=False, on_progress=interrupt)
    assert files.checkpoint.exists()
    assert not files.weights.exists()
    with pytest.raises(TrainingError, match="other settings"):
        train(adapter, POLICY, lessons, dataclasses.replace(RECIPE, rate=1e-3), files, {})
    parts = train(adapter, POLICY, lessons, RECIPE, files, {}, half=False)
    assert parts.curve == whole.curve
    assert parts.file.digest == whole.file.digest
    with pytest.raises(TrainingError, match=r"there is a file .*parts.safetensors' already"):
        train(adapter, POLICY, lessons, RECIPE, files, {})


def test_it_ends_early_when_validation_gets_no_better(tmp_path, adapter, lessons, monkeypatch):
    from kvprune.training import train as module

    values = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    row = {"right": 0.0, "right_full": 1.0}
    monkeypatch.setattr(module, "_measured", lambda *_: {"divergence": next(values), **row})
    monkeypatch.setattr(module, "_step", lambda *_: 1.0)
    monkeypatch.setattr(module, "_keep_moments", lambda *_: None)
    recipe = dataclasses.replace(RECIPE, steps=100, every=1, patience=2)
    done = train(adapter, POLICY, lessons, recipe, Files(tmp_path / "w.safetensors"), {})
    assert (done.best_step, done.stopped_early, len(done.curve)) == (1, True, 4)


def test_the_loss_may_look_at_attention_outputs(adapter, lessons):
    weights = {
        name: tensor.clone().requires_grad_()
        for name, tensor in POLICY.initial({"feature_width": 96, "question_width": 96}).items()
    }
    measures = Distillation(adapter, POLICY, weights, attention=1.0).measure(lessons.validation()[0])
    assert measures.loss > measures.divergence > 0
    measures.loss.backward()
    assert weights["gamma"].grad.abs() > 0


def test_with_all_tokens_nothing_diverges(adapter, lessons):
    policy = QueCC(weights="fresh", k=1)
    weights = policy.initial({"feature_width": 96, "question_width": 96})
    measures = Distillation(adapter, policy, weights).measure(lessons.validation()[0])
    assert abs(measures.divergence) < 1e-5
    assert torch.equal(measures.right, measures.right_full)


def question(name, picture):
    return Question(id=name, task="t", file=None, question="?", answers=("a",), file_sha256=picture)


def test_validation_shares_no_picture_with_what_is_learned():
    examples = [question(f"{picture}{number}", picture) for picture in "abcdefghij" for number in range(2)]
    learning, held = split(examples, 0.2, seed=0)
    assert len(held) == 4
    assert {one.file_sha256 for one in held}.isdisjoint(one.file_sha256 for one in learning)
    assert split(examples, 0.2, seed=0) == (learning, held)
    require_apart(learning, held)
    with pytest.raises(TrainingError, match=r"2 of its examples show one .*: 'a0' and 'a1'"):
        require_apart(examples, [examples[0], examples[1]])
    with pytest.raises(TrainingError, match="no examples to validate with"):
        require_apart(examples, [])
    with pytest.raises(TrainingError, match="about one picture"):
        split(examples[:2], 0.5, seed=0)
    with pytest.raises(TrainingError, match="between 0 and 1"):
        split(examples, 1.0, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "trim"}, r"'trim' has no weights to train \(kvprune train can train: quecc\)"),
        ({"policy": "attnpred"}, r"'attnpred' has weights, but decides after .*how.*\(.*can train: quecc\)"),
        ({"policy": "quecc:weights=demo"}, "names weights, but training starts afresh"),
        ({"out": "w.bin"}, "ends in .safetensors"),
        ({"out": "nowhere/w.safetensors"}, "there is no folder"),
        ({"answers": "both"}, "answers are those of full or of data"),
        ({"batch": 0}, "at least one question"),
        ({"model": "x"}, "--model takes data of its own"),
    ],
)
def test_what_cannot_be_trained(tmp_path, options, message):
    from pathlib import Path

    given = {"policy": "quecc:k=4", "out": "w.safetensors", **options}
    given["out"] = tmp_path / Path(given["out"])
    with pytest.raises(TrainingError, match=message):
        learn(Asked(**given), RECIPE)


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": -1.0}, {"attention": -1.0}, {"every": 0}])
def test_recipes_that_are_refused(options):
    with pytest.raises(TrainingError, match=f"{next(iter(options))} is a"):
        Recipe(**options)


def test_foreign_files_are_not_overwritten(tmp_path):
    files = Files(tmp_path / "w.safetensors")
    files.curve.write_text("mine")
    with pytest.raises(TrainingError, match=r"w.csv' already"):
        files.require_free({})
    files.checkpoint.write_bytes(b"mine")
    with pytest.raises(TrainingError, match="no checkpoint"):
        files.require_free({})


def test_a_spec_names_what_is_trained():
    assert trainable("quecc:k=4,query=none").spec.options == {"k": 4, "query": "none", "weights": "fresh"}


@pytest.mark.slow
def test_the_command_trains_on_a_file(tmp_path):
    from kvprune import demo as package

    data = package.write_dataset(
        tmp_path / "data", tasks=("read", "place"), per_task=4, seed=7, split="train"
    )
    out = tmp_path / "w.safetensors"
    options = ["--data", str(data), "--out", str(out), "--steps", "2", "--every", "1", "--batch-size", "4"]
    run = CliRunner().invoke(app, ["train", "quecc:k=4", *options, "--held-out", "0.25"])
    assert run.exit_code == 0, run.output
    file = read_weights(out)
    assert file.digest in run.output
    assert "6 examples to learn from and 2" in json.dumps(dict(file.training))
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, ["train", "quecc:k=4", *options])
    assert again.exit_code == 2
    assert "already" in again.output
