"""Training on a CPU, a few tiny steps: batches, saving, resuming, interrupting, and what is reported."""

import json
import signal
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open

from kvprune.demo import TASKS, Example, evaluate, load, train
from kvprune.demo.architecture import SIZES, build_processor
from kvprune.demo.batches import Batches
from kvprune.demo.evaluate import chance
from kvprune.demo.recipe import RECIPES, Recipe, fade, rate
from kvprune.demo.tasks import LESSONS

TINY = Recipe(size="guide", see_steps=1, answer_steps=3, pictures=2, questions=3, warm_up=1)


@pytest.fixture(autouse=True)
def settings_of_torch(monkeypatch):
    """Few examples are answered, and settings of the process are as before afterwards."""
    monkeypatch.setattr(train, "REPORT", 1)
    monkeypatch.setattr(train, "_GLANCE", 1)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def whole():
    """The weights after all steps of an uninterrupted training."""
    training = train.Training(TINY, threads=1)
    learn(training, TINY.steps)
    return weights(training)


def learn(training, until):
    batches = Batches(training.recipe, training.processor)
    for step in range(training.step, until):
        training.learn(batches[step])


def weights(training):
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def arrays(batch):
    parts = [batch.tiles, batch.labels, *([] if batch.text is None else [batch.text])]
    return [value for part in parts for value in vars(part).values()]


def test_a_batch_depends_on_its_number_alone():
    processor = build_processor()
    one, again = Batches(TINY, processor), Batches(TINY, processor, first=2)
    assert (len(one), len(again)) == (4, 2)
    assert all(map(torch.equal, arrays(one[2]), arrays(again[0])))
    assert not torch.equal(one[1].tiles.pixel_values, one[2].tiles.pixel_values)
    other = Batches(replace(TINY, seed=1), processor)
    assert not torch.equal(one[2].tiles.pixel_values, other[2].tiles.pixel_values)


def test_questions_are_asked_from_the_second_stage_on():
    batches = Batches(TINY, build_processor())
    assert batches[0].text is None
    assert batches[1].text.input_ids.shape[0] == TINY.pictures


def test_every_lesson_is_asked():
    assert set(TINY.mix) == set(LESSONS)
    assert sum(TINY.shares) == pytest.approx(1)


def test_a_resumed_training_gives_the_weights_of_an_uninterrupted_one(whole, tmp_path):
    first = train.Training(TINY, threads=1)
    learn(first, 2)
    first.save(tmp_path / "model", tmp_path / "state")
    assert not same(weights(first), whole)
    second = train.Training(TINY, threads=1)
    torch.manual_seed(99)
    second.resume(tmp_path / "state")
    assert second.step == 2
    assert same(weights(first), weights(second))
    learn(second, TINY.steps)
    assert same(weights(second), whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"answer_steps": 4, "hold": 0.1}, "answer_steps, hold"),
        ({"mix": {"row": 1.0}}, "mix"),
    ],
)
def test_another_recipe_is_refused(tmp_path, changes, named):
    train.Training(TINY, threads=1).save(tmp_path / "model", tmp_path / "state")
    other = train.Training(replace(TINY, **changes), threads=1)
    with pytest.raises(
        ValueError, match=f"a training with another {named}; give the same options or another"
    ):
        other.resume(tmp_path / "state")


def test_weights_are_stored_in_half_precision_and_computed_with_in_float32(whole, tmp_path):
    training = train.Training(TINY, threads=1)
    learn(training, 1)
    training.save(tmp_path, None)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["dtype"] == "float32"
    model, processor = load(path=tmp_path)
    assert model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, training.model.state_dict()[name].half().float()), name
    assert processor.tokenizer.get_vocab() == training.processor.tokenizer.get_vocab()
    assert processor.chat_template == training.processor.chat_template


@pytest.mark.parametrize("written", [0, 1000])
def test_a_training_killed_while_it_saves_leaves_the_state_before(tmp_path, monkeypatch, written):
    state, save = tmp_path / "state", torch.save
    training = train.Training(TINY, threads=1)
    learn(training, 1)
    training.save(tmp_path / "model", state)
    before = weights(training)
    learn(training, 2)

    def killed(values, path):
        save(values, path)
        path.write_bytes(path.read_bytes()[:written])
        raise SystemExit

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(SystemExit):
        training.save(tmp_path / "model", state)
    monkeypatch.undo()
    again = train.Training(TINY, threads=1)
    again.resume(state)
    assert again.step == 1
    assert same(weights(again), before)
    again.save(tmp_path / "model", state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "state"]


def test_the_command_trains_reports_and_resumes(tmp_path, whole, capsys, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "guide", TINY)
    options = [
        "--size",
        "guide",
        "--output",
        str(tmp_path / "new" / "model"),
        "--state",
        str(tmp_path / "states" / "one"),
    ]
    options += ["--threads", "1", "--workers", "0", "--save-every", "2"]
    train.main(options)
    out = capsys.readouterr()
    assert "step 2: loss " in out.out
    assert "step 2: held-out accuracy read " in out.out
    assert "of 1 held-out examples" in out.out
    model, _ = load(path=tmp_path / "new" / "model")
    assert all(torch.equal(value, whole[name].half().float()) for name, value in model.state_dict().items())
    record = json.loads((tmp_path / "new" / "model" / "training.json").read_text("utf-8"))
    assert record["recipe"] == asdict(TINY)
    assert (record["steps"], record["device"], record["held_out_examples_per_task"]) == (4, "cpu", 1)
    assert set(record["held_out_accuracy"]) == set(TASKS)
    assert record["parameters"] == model.num_parameters()
    train.main(options)
    assert "is resumed at step 4 of 4" in capsys.readouterr().out


def test_options_change_the_recipe(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(train, "train", lambda recipe, *_: used.append(recipe))
    usual = ["--output", str(tmp_path)]
    train.main(usual)
    train.main([*usual, "--size", "guide"])
    train.main(
        [
            *usual,
            "--seed",
            "3",
            "--answer-steps",
            "7",
            "--see-steps",
            "0",
            "--ask",
            "row=0",
            "--ask",
            "read=2",
        ]
    )
    assert used[:2] == [RECIPES["model"], RECIPES["guide"]]
    mix = {**RECIPES["model"].mix, "row": 0.0, "read": 2.0}
    assert used[2] == replace(RECIPES["model"], seed=3, answer_steps=7, see_steps=0, mix=mix)


@pytest.mark.parametrize("asked", ["row", "row=", "row=-1", "row=nan", "row=inf", "rows=1", "=1"])
def test_a_weight_that_is_none_is_refused(tmp_path, capsys, asked):
    with pytest.raises(SystemExit):
        train.main(["--output", str(tmp_path), "--ask", asked])
    assert f"{asked!r} is not TASK=WEIGHT with a weight of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", RECIPES)
def test_each_size_has_a_recipe(size):
    assert RECIPES[size].size == size
    assert set(RECIPES) == set(SIZES)
    assert set(RECIPES[size].mix) == set(LESSONS)


@pytest.mark.parametrize(
    ("state", "save_every", "said"),
    [
        (False, 1, "interrupted at step 2 of 4: it cannot be resumed, since no --state FILE was given"),
        (True, 9, "interrupted at step 2 of 4: nothing was saved yet, so the same command begins again"),
        (True, 1, "state holds step 2; the same command resumes there"),
    ],
)
def test_an_interrupted_training_says_how_to_resume(
    tmp_path, capsys, monkeypatch, request, state, save_every, said
):
    # a process that was started in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    learned = train.Training.learn

    def interrupted(self, batch):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return learned(self, batch)

    monkeypatch.setattr(train.Training, "learn", interrupted)
    options = {"threads": 1, "workers": 1, "save_every": save_every}
    with pytest.raises(KeyboardInterrupt):
        train.train(TINY, tmp_path / "model", state=tmp_path / "state" if state else None, **options)
    assert said in capsys.readouterr().out


def test_the_command_ends_as_shells_expect_after_an_interrupt(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(["--output", str(tmp_path)])
    assert ended.value.code == 130


def test_saving_never_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        train.train(TINY, tmp_path, save_every=0)


def test_the_learning_rate_warms_up_twice_stays_and_falls_to_nothing():
    factor = rate(Recipe(see_steps=100, answer_steps=200, warm_up=10, hold=0.5))
    assert [factor(step) for step in (0, 9, 99)] == [0.1, 1.0, 1.0]
    assert [factor(step) for step in (100, 109, 199)] == [0.1, 1.0, 1.0]
    assert factor(250) == pytest.approx(0.5)
    assert factor(300) == 0.0


def test_the_losses_of_patches_fade():
    recipe = Recipe(see_steps=100, answer_steps=200)
    assert [fade(recipe, step) for step in (0, 100, 200)] == [1.0, 1.0, 1.0]
    assert fade(recipe, 250) == pytest.approx(0.1 / 0.35)
    assert fade(recipe, 290) == 0.1


def asked(*pairs):
    return [Example("any", None, question, (answer,)) for question, answer in pairs]


def test_chance_is_what_the_best_rule_without_a_picture_gets():
    assert chance(asked(("how many?", "2"), ("how many?", "2"), ("how many?", "0"))) == pytest.approx(2 / 3)
    compared = asked(
        ("which is red, a1 or b2?", "a1"),
        ("which is red, c1 or d2?", "c1"),
        ("which is red, a1 or f2?", "f2"),
    )
    assert chance(compared) == pytest.approx(2 / 3), "the first cell of the question"
    with pytest.raises(ValueError, match="chance needs examples"):
        chance([])


def test_evaluation_prints_accuracy_and_chance_of_each_task(capsys):
    evaluate.main(["--count", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS)
    assert all(" of 2, chance " in line for line in lines)
