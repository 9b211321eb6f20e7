"""References that may look at the answer, and reading the last prompt token again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speech_helpers import load, speech_file, tiny_checkpoint

import kvprune
from kvprune import demo
from kvprune.comparison.data.examples import Example, read_examples
from kvprune.comparison.execution.answer_guidance import with_ends
from kvprune.comparison.execution.batches import ask
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.storage.answers import Answer
from kvprune.errors import UnsupportedModelError

REFERENCE = "answer-attention:keep_ratio=0.3"
Asked = tuple[Generator, tuple[Example, ...]]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("guided")
    generator = load(tiny_checkpoint(folder / "model"), reread=True)
    return generator, read_examples(speech_file(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    demo.write_dataset(folder, tasks=("read",), per_task=6, seed=0)
    plain: dict[str, Any] = {"device": "cpu", "dtype": "auto", "attn_implementation": None}
    generator = PictureGenerator.load(None, max_new_tokens=4, reread=True, **plain)
    return generator, read_examples(folder / "data.jsonl")


@pytest.fixture(params=["speech", "pictures"])
def asked(request: pytest.FixtureRequest) -> Asked:
    found: Asked = request.getfixturevalue(request.param)
    return found


def full_and(
    asked: Asked, inputs: Any, spec: str, full: dict[str, Answer] | None = None
) -> list[list[Answer]]:
    """Ask the full cache, unless its answers are given, and a configuration."""
    generator, examples = asked
    whole, one = expand([spec], [])
    first = [] if full else ask(generator, examples, inputs, whole, 0, {})
    full = full or {answer.id: answer for answer in first}
    return [list(full.values()), ask(generator, examples, inputs, one, 0, full)]


def guided_by_hand(asked: Asked, inputs: Any) -> list[str]:
    """Return what the reference answers if guidance is made step by step."""
    generator, _ = asked
    model, ends = generator.model, generator.model.generation_config.eos_token_id
    end = ends if isinstance(ends, int) else ends[0]
    rows = []
    with torch.inference_mode():
        new = generator.generate(inputs)
        for number, length in enumerate(generator.lengths(new)):
            finished = length < generator.max_new_tokens
            rows.append(new[number, :length].tolist() + ([end] if finished else []))
        answer = torch.tensor([one + [end] * (max(map(len, rows)) - len(one)) for one in rows])
        written = torch.tensor([[number < len(one) for number in range(answer.shape[1])] for one in rows])
        guide = kvprune.answer_attention(model, inputs, answer, written)
        with kvprune.compress(model, REFERENCE, guide=guide, reread=True):
            return generator.texts(generator.generate(inputs))


def test_the_reference_is_guided_by_the_full_caches_answers(asked: Asked) -> None:
    generator, examples = asked
    inputs = generator.encode(examples)
    _, found = full_and(asked, inputs, REFERENCE)
    wanted = guided_by_hand(asked, inputs)
    assert all(text.startswith(one.answer) for text, one in zip(wanted, found, strict=True))
    assert all(one.answer == text for text, one in zip(wanted, found, strict=True) if one.finished)
    assert [one.kept_fraction for one in found] == pytest.approx([0.3] * len(found), abs=0.02)
    assert {one.seed for one in found} == {None}


def test_answers_that_are_not_at_hand_are_generated_again(asked: Asked) -> None:
    """A run that resumes has the full cache's answers on disk, as text."""
    generator, examples = asked
    full, found = full_and(asked, generator.encode(examples), REFERENCE)
    again = generator.encode(examples)
    assert not generator.answers.knows(again)
    known = {answer.id: answer for answer in full}
    assert full_and(asked, again, REFERENCE, known)[1] == found
    assert generator.answers.knows(again)


def test_guidance_is_made_once_a_batch(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvprune.comparison.execution import answer_guidance

    generator, examples = asked
    calls, make = [], answer_guidance.answer_attention
    monkeypatch.setattr(answer_guidance, "answer_attention", lambda *args: calls.append(1) or make(*args))
    inputs = generator.encode(examples)
    before = generator.encoder.computed
    full, _ = full_and(asked, inputs, REFERENCE)
    known = {answer.id: answer for answer in full}
    full_and(asked, inputs, "answer-attention:keep_ratio=0.1", known)
    assert len(calls) == 1
    assert generator.encoder.computed == before + 1, "guidance reuses what the encoder said"
    full_and(asked, generator.encode(examples), REFERENCE, known)
    assert len(calls) == 2


def test_ends_belong_to_answers() -> None:
    new = torch.tensor([[5, 6, 9, 0], [5, 6, 7, 8], [9, 0, 0, 0], [5, 8, 0, 0]])
    answer, written = with_ends(new, [2, 4, 0, 1], 4, [9, 8])
    assert [row[kept].tolist() for row, kept in zip(answer, written, strict=True)] == [
        [5, 6, 9],
        [5, 6, 7, 8],
        [9],
        [5, 8],  # the other end
    ]
    answer, written = with_ends(torch.tensor([[5, 0], [5, 6]]), [1, 2], 5, 9)  # Whisper's ends are cut off
    assert [row[kept].tolist() for row, kept in zip(answer, written, strict=True)] == [[5, 9], [5, 6, 9]]
    answer, written = with_ends(torch.tensor([[5, 6]]), [2], 2, None)
    assert (answer.tolist(), written.tolist()) == ([[5, 6]], [[True, True]])


def test_the_full_cache_answers_as_the_untouched_model(asked: Asked) -> None:
    generator, examples = asked
    inputs = generator.encode(examples)
    full, _ = full_and(asked, inputs, "lossless")
    assert [answer.answer for answer in full] == generator.texts(generator.generate(inputs))


def test_the_last_token_is_read_again(pictures: Asked) -> None:
    """After prefill, pruning by layer cannot change the first token, unless the last row is read again."""
    generator, examples = pictures
    spec, inputs = "random:keep_tokens=1", generator.encode(examples)
    policy = kvprune.get_policy(spec)
    first = {}
    for reread in (False, True):
        with kvprune.compress(generator.model, policy, reread=reread):
            first[reread] = generator.generate(inputs, limit=1)[:, 0].tolist()
    assert first[True] != first[False]
    _, found = full_and(pictures, inputs, spec)
    with generator.compress(policy, inputs, 0):
        new = generator.generate(inputs)
    assert new[:, 0].tolist() == first[True]
    assert [answer.answer for answer in found] == generator.texts(new)


def test_what_a_family_refuses_stays_refused(speech: Asked) -> None:
    generator, examples = speech
    with pytest.raises(UnsupportedModelError, match="needs 'class_attention', which the Whisper adapter"):
        full_and(speech, generator.encode(examples), "visionzip:keep_ratio=0.5")
