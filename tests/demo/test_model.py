"""The embedded model: loads offline, is small, answers held-out questions, alone as in a batch."""

import json

import pytest
import torch

from kvprune.demo import TASKS, examples, load, model_path
from kvprune.demo.evaluate import accuracy, answer, encode
from kvprune.demo.prompts import pack, prompt
from kvprune.demo.tasks import ask


@pytest.fixture(scope="module")
def demo():
    return load()


def test_the_folder_is_an_ordinary_small_model_folder():
    names = {path.name for path in model_path().iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training.json"}
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 12 * 10**6


def test_it_loads_without_network(monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model_path())
    model = MllamaForConditionalGeneration.from_pretrained(model_path())
    assert type(processor).__name__ == "MllamaProcessor"
    assert processor.tokenizer.padding_side == "left"
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads


def test_a_full_size_picture_has_260_columns_in_the_cache(demo):
    model, processor = demo
    example = next(example for example in examples("count", 40) if min(example.image.size) > 112)
    output = model.generate(
        **encode(processor, [example]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    layer = model.config.text_config.cross_attention_layers[0]
    assert output.past_key_values.layers[layer].keys.shape[2] == 4 * 65 == 260


def test_prompts_begin_with_text_rows_that_see_no_image(demo):
    _, processor = demo
    example = examples("read", 1)[0]
    assert prompt(processor, example.question).startswith("<|begin_of_text|><|start_header_id|>user")
    inputs = encode(processor, [example])
    text = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert text[:5] == ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "<|image|>"]
    assert text[-4:] == ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>"]
    seen = inputs["cross_attention_mask"][0].sum((1, 2)) > 0
    assert not seen[:4].any()
    assert seen[4:].all()


def test_every_word_is_one_token(demo):
    _, processor = demo
    for task in TASKS:
        for example in examples(task, 10):
            ids = processor.tokenizer(prompt(processor, example.question)).input_ids
            assert processor.tokenizer.unk_token_id not in ids
            assert len(processor.tokenizer(example.answers[0]).input_ids) == len(example.answers[0].split())
    assert processor.tokenizer("giraffe").input_ids == [processor.tokenizer.unk_token_id]


def test_packed_questions_are_the_prompts_of_evaluation(demo):
    model, processor = demo
    (example,) = examples("row", 1)
    queries = [ask("count", colour, example.digits) for colour in ("red", "blue", "purple")]
    asked = [type(example)("count", example.image, query.question, (query.answer,)) for query in queries]
    inputs = encode(processor, asked)
    packed = pack(processor, [queries], [int(inputs["aspect_ratio_mask"][0].sum())])
    first = (packed.labels[0] != -100) & (packed.labels[0].roll(1) == -100)
    starts = first.nonzero()[:, 0]
    for row, start in enumerate(starts.tolist()):
        length = int(inputs["attention_mask"][row].sum())
        before = slice(start - length, start)
        assert packed.input_ids[0, before].tolist() == inputs["input_ids"][row, -length:].tolist()
        assert (packed.cross_attention_mask[0, before] == inputs["cross_attention_mask"][row, -length:]).all()
        assert packed.position_ids[0, before].tolist() == list(range(length))
        said = packed.input_ids[0, start : start + 2].tolist()
        assert said == processor.tokenizer(queries[row].answer + "<|eot_id|>").input_ids
        assert packed.labels[0, start : start + 2].tolist() == said
    picture = {name: inputs[name][:1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        alone = model(**inputs).logits[:, -1]
        together = model(
            **picture,
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=packed.attention_mask,
            cross_attention_mask=packed.cross_attention_mask,
        ).logits[0, starts - 1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_held_out_questions(demo, task):
    model, processor = demo
    assert accuracy(model, processor, examples(task, 48, seed=11), batch_size=48) >= 0.85


def test_it_needs_the_picture(demo):
    model, processor = demo
    questions = examples("read", 48, seed=11)
    others = examples("read", 49, seed=11)[1:]
    swapped = [
        type(one)(one.task, other.image, one.question, one.answers)
        for one, other in zip(questions, others, strict=True)
    ]
    assert accuracy(model, processor, swapped, batch_size=48) < 0.4


def test_a_left_padded_batch_answers_as_each_example_alone(demo):
    model, processor = demo
    batch = [example for task in TASKS for example in examples(task, 4, seed=12)]
    assert len(set(encode(processor, batch)["attention_mask"].sum(1).tolist())) > 1
    alone = [answer(model, processor, [example])[0] for example in batch]
    assert answer(model, processor, batch) == alone


def test_options_of_load_are_honoured():
    model, _ = load(dtype=torch.float64, attn_implementation="eager")
    assert model.dtype == torch.float64
    assert model.config.text_config._attn_implementation == "eager"
    assert not model.training


def test_the_training_record_tells_how_to_train_again():
    record = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))
    stages = ("see_steps", "answer_steps", "polish_steps")
    assert record["steps"] == sum(record["recipe"][stage] for stage in stages)
    assert set(record["held_out_accuracy"]) == set(TASKS)
    assert min(record["held_out_accuracy"].values()) >= 0.9
    assert record["minutes"] < 60
