"""Prompts and packed rows: words are tokens, and a packed question is read as if it were alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvprune.demo import TASKS, examples
from kvprune.demo.architecture import SIZES, build_model, build_processor
from kvprune.demo.evaluate import encode
from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.losses import answer_loss, see
from kvprune.demo.pictures import CELLS, COLOURS, Picture, draw
from kvprune.demo.prompts import IGNORED, pack, prompt
from kvprune.demo.tasks import LESSONS, WORDS, Query, ask
from kvprune.demo.tiles import to_tiles

FLOAT32 = 2e-6
"""Error of a loss, which is computed in float32 from a model in float64."""


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor.tokenizer, "guide").double().eval()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(2)
    return [draw(rng, "train") for _ in range(2)]


@pytest.fixture(scope="module")
def queries(pictures):
    """Three questions about the first picture, and five about the second."""
    rng = np.random.default_rng(3)
    tasks = (("row", "count", "presence"), ("beside", "read", "place", "where", "count"))
    return [
        [ask(task, rng, picture.glyphs) for task in asked]
        for asked, picture in zip(tasks, pictures, strict=True)
    ]


def seen(model, pictures):
    """Return the projected features of pictures in float64."""
    tiles = to_tiles(pictures)
    return see(model, replace(tiles, pixel_values=tiles.pixel_values.double()))


def test_every_word_is_one_token_and_no_id_is_unused(processor):
    vocabulary = processor.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary["<|image|>"] == len(vocabulary) - 1, "its id is the vocabulary size of the text model"
    for word in (*GLYPHS, *COLOURS, *CELLS, *WORDS):
        assert processor.tokenizer(word).input_ids == [vocabulary[word]]
    assert processor.tokenizer("giraffe").input_ids == [processor.tokenizer.unk_token_id]


def test_questions_and_answers_have_no_unknown_word(processor):
    rng = np.random.default_rng(0)
    for _ in range(20):
        glyphs = draw(rng, "held-out").glyphs
        for query in filter(None, (ask(task, rng, glyphs) for task in LESSONS)):
            ids = processor.tokenizer([prompt(processor, query.question), query.answer]).input_ids
            assert processor.tokenizer.unk_token_id not in ids[0] + ids[1]
            assert len(ids[1]) == len(query.answer.split())
            assert processor.tokenizer.decode(ids[1]) == query.answer


def test_prompts_begin_with_text_rows_that_see_no_image(processor):
    example = examples("read", 1)[0]
    assert prompt(processor, example.question).startswith("<|begin_of_text|><|start_header_id|>user")
    inputs = encode(processor, [example])
    text = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert text[:5] == ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "<|image|>"]
    assert text[-4:] == ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>"]
    seen = inputs["cross_attention_mask"][0].sum((1, 2)) > 0
    assert not seen[:4].any()
    assert seen[4:].all()


def test_the_template_puts_turns_behind_each_other(processor):
    turns = [
        {"role": "user", "content": "what is at a1?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": [{"type": "text", "text": "which is red, a1 or b2?"}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert text == (
        f"<|begin_of_text|>{header('user')}what is at a1?<|eot_id|>{header('assistant')}7<|eot_id|>"
        f"{header('user')}which is red, a1 or b2?<|eot_id|>{header('assistant')}"
    )


def test_packed_questions_are_the_prompts_of_evaluation(processor, queries):
    (example,) = examples("row", 1)
    packed = pack(processor, queries)
    answers = packed.labels != IGNORED
    for row, asked in enumerate(queries):
        copies = [type(example)(one.task, example.image, one.question, (one.answer,)) for one in asked]
        starts = (answers[row] & ~answers[row].roll(1)).nonzero()[:, 0].tolist()
        for query, start, alone in zip(asked, starts, copies, strict=True):
            inputs = encode(processor, [alone])
            length = inputs["input_ids"].shape[1]
            before = slice(start - length, start)
            assert packed.input_ids[row, before].tolist() == inputs["input_ids"][0].tolist()
            assert (packed.cross_attention_mask[row, before] == inputs["cross_attention_mask"][0]).all()
            assert packed.position_ids[row, before].tolist() == list(range(length))
            said = processor.tokenizer(query.answer + "<|eot_id|>").input_ids
            answer = slice(start, start + len(said))
            assert packed.input_ids[row, answer].tolist() == packed.labels[row, answer].tolist() == said
            assert packed.position_ids[row, answer].tolist() == list(range(length, length + len(said)))
        assert int(answers[row].sum()) == sum(len(one.answer.split()) + 1 for one in asked)


def test_no_question_sees_another_one(processor, queries):
    packed = pack(processor, queries)
    for row, asked in enumerate(queries):
        begins = [
            place
            for place, token in enumerate(packed.input_ids[row].tolist())
            if token == processor.tokenizer.bos_token_id
        ]
        used = int((packed.cross_attention_mask[row].sum((1, 2)) > 0).nonzero().max()) + 1
        assert len(begins) == len(asked)
        for begin, end in zip(begins, [*begins[1:], used], strict=True):
            seen = packed.attention_mask[row, 0, begin:end]
            assert not seen[:, :begin].any()
            assert not seen[:, end:].any()
            assert (seen[:, begin:end] == torch.ones(end - begin, end - begin).tril().bool()).all()


@torch.no_grad()
def test_the_loss_of_packed_questions_is_that_of_single_prompts(model, processor, pictures, queries):
    features = seen(model, pictures)
    together = answer_loss(model, features, pack(processor, queries))
    total, tokens = 0.0, 0
    for row, asked in enumerate(queries):
        for query in asked:
            length = len(query.answer.split()) + 1
            total += float(answer_loss(model, features[row : row + 1], pack(processor, [[query]]))) * length
            tokens += length
    assert float(together) == pytest.approx(total / tokens, abs=FLOAT32)


@torch.no_grad()
def test_features_for_training_are_what_the_model_computes_from_the_processors_inputs(model, processor):
    (example,) = examples("place", 1)
    inputs = encode(processor, [example])
    text = pack(processor, [[Query("place", example.question, example.answers[0])]])
    logits = model(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).logits[0, -1]
    first = int(processor.tokenizer(example.answers[0]).input_ids[0])
    text.labels[0, -1] = IGNORED  # leaves the answer's first token
    picture = Picture(np.asarray(example.image), example.glyphs, np.zeros((224, 224), dtype=np.int16))
    loss = answer_loss(model, seen(model, [picture]), text)
    assert float(loss) == pytest.approx(-float(logits.log_softmax(-1)[first]), abs=FLOAT32)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_share_their_vision_geometry_and_their_words(processor, size):
    model = build_model(processor.tokenizer, size)
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.patch_size, vision.max_num_tiles) == (112, 14, 4)
    assert vision.supported_aspect_ratios[5] == [2, 2]
    assert text.vocab_size == len(processor.tokenizer) - 1
    chosen = SIZES[size]
    assert (vision.hidden_size, vision.num_hidden_layers) == (chosen.vision_width, chosen.vision_layers)
    assert (text.hidden_size, text.num_hidden_layers) == (chosen.text_width, chosen.text_layers)
    assert tuple(text.cross_attention_layers) == chosen.cross_layers
    assert text.num_key_value_heads < text.num_attention_heads


def test_the_guide_is_the_smaller_model(processor):
    large, small = (
        sum(one.numel() for one in build_model(processor.tokenizer, size).parameters())
        for size in ("model", "guide")
    )
    assert list(SIZES) == ["model", "guide"]
    assert small < 0.6 * large


def test_cross_attention_is_open_from_the_start(model):
    gates = [
        value.item() for name, value in model.named_parameters() if name.endswith(("attn_gate", "mlp_gate"))
    ]
    assert len(gates) == 2 * len(SIZES["guide"].cross_layers)
    assert set(gates) == {0.5}


def test_tasks_have_prompts_of_several_lengths(processor):
    drawn = [examples(task, 1)[0] for task in TASKS]
    assert len(set(encode(processor, drawn)["attention_mask"].sum(1).tolist())) > 2
