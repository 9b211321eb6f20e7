"""The embedded models: they load offline, are small, and answer held-out questions, alone as in a batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvprune.demo import TASKS, examples, guide_path, load, model_path
from kvprune.demo.architecture import CHAT_TEMPLATE, SIZES, build_model, build_processor
from kvprune.demo.evaluate import accuracy, answer, encode

FOLDERS = {"model": (model_path(), 6), "guide": (guide_path(), 2)}
"""Each model's folder, and how many megabytes it may have."""

ASKED = 16


@pytest.fixture(scope="module")
def demo():
    return load()


def record(folder: Path):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def least(share: float) -> float:
    """Return what a model that answers a share of all questions gets of ASKED ones, even with bad luck."""
    cautious = (share * ASKED + 1) / (ASKED + 2)  # no share is so large that no error is possible
    return share - 3 * (cautious * (1 - cautious) / ASKED) ** 0.5


@pytest.mark.parametrize(("folder", "megabytes"), FOLDERS.values(), ids=FOLDERS)
def test_the_folder_is_an_ordinary_small_model_folder(folder, megabytes):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < megabytes * 10**6


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, (folder, _) in FOLDERS.items()])
def test_the_folder_holds_what_training_would_write(name, folder):
    model, processor = load(path=folder)
    expected = build_processor()
    assert record(folder)["recipe"]["size"] == name
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert processor.tokenizer.padding_side == "left"
    assert processor.chat_template == CHAT_TEMPLATE
    assert processor.image_processor.to_dict() == expected.image_processor.to_dict()
    built = build_model(expected.tokenizer, name).state_dict()
    assert {one: value.shape for one, value in model.state_dict().items()} == {
        one: value.shape for one, value in built.items()
    }
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(one).dtype for one in stored.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text("utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize("folder", [folder for folder, _ in FOLDERS.values()], ids=FOLDERS)
def test_the_training_record_tells_how_to_train_again(folder):
    found = record(folder)
    assert found["steps"] == found["recipe"]["see_steps"] + found["recipe"]["answer_steps"]
    assert found["recipe"]["size"] in SIZES
    assert set(found["held_out_accuracy"]) == set(TASKS)
    assert min(found["held_out_accuracy"].values()) > 0.6
    assert found["held_out_examples_per_task"] >= 200
    assert found["minutes"] < 24 * 60
    assert found["parameters"] == load(path=folder)[0].num_parameters()


@pytest.mark.parametrize("folder", [folder for folder, _ in FOLDERS.values()], ids=FOLDERS)
def test_it_loads_without_network_and_without_options(monkeypatch, folder):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    assert type(processor).__name__ == "MllamaProcessor"
    assert model.dtype == torch.float32
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads


@pytest.mark.parametrize(
    ("name", "task"), [*(("model", task) for task in TASKS), *(("guide", task) for task in TASKS[::3])]
)
def test_it_answers_held_out_questions(name, task):
    folder, _ = FOLDERS[name]
    expected = record(folder)["held_out_accuracy"][task]
    model, processor = load(path=folder)
    found = accuracy(model, processor, examples(task, ASKED, seed=11), batch_size=ASKED)
    assert found >= least(expected)


def test_every_picture_has_260_columns_in_the_cache(demo):
    model, processor = demo
    inputs = encode(processor, examples("count", 1))
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    for layer in model.config.text_config.cross_attention_layers:
        assert output.past_key_values.layers[layer].keys.shape[2] == 4 * 65 == 260


def test_it_needs_the_picture(demo):
    model, processor = demo
    questions, (_, *others) = (examples("place", count, seed=11) for count in (ASKED, ASKED + 1))
    swapped = [
        type(one)(one.task, other.image, one.question, one.answers)
        for one, other in zip(questions, others, strict=True)
    ]
    assert accuracy(model, processor, swapped, batch_size=ASKED) < 0.3


def test_a_left_padded_batch_answers_as_each_example_alone(demo):
    model, processor = demo
    batch = [example for task in TASKS for example in examples(task, 2, seed=12)]
    assert len(set(encode(processor, batch)["attention_mask"].sum(1).tolist())) > 1
    alone = [answer(model, processor, [example])[0] for example in batch]
    assert answer(model, processor, batch) == alone


def test_options_of_load_are_honoured():
    model, _ = load(dtype=torch.float64, attn_implementation="eager", path=guide_path())
    assert model.dtype == torch.float64
    assert model.config.text_config._attn_implementation == "eager"
    assert not model.training
