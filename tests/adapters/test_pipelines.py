"""Pipelines of transformers inside a compression: used as they are, they answer as the oracle does.

Speech is given as arrays, because a pipeline reads files with ffmpeg, which need not be here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from own_processors import FAMILIES, load, recordings

import kvprune
from kvprune.demo import model_path
from kvprune.errors import CompressionStateError
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle
from kvprune.testing.oracle_steps import masked_steps

pytestmark = pytest.mark.usefixtures("quiet")

SPECS = "norm:keep_ratio=0.1", "divprune:keep_ratio=0.1"
"""By each head, and onward from features."""
LENGTH = {"min_new_tokens": 3, "max_new_tokens": 6}

Folder = Callable[[str], Path]
Ask = Callable[[], Any]


def answers(pipe: Any, ask: Ask, spec: str, prefills: int = 1) -> Any:
    """Return what a pipeline answers under a policy, after checking that the policy took part."""
    with kvprune.compress(pipe.model, spec) as run:
        answer = ask()
    assert run.report.prefills == prefills
    if spec == "full":
        assert run.report.bytes_held <= run.report.bytes_full
        return answer
    assert run.report.bytes_held < 0.2 * run.report.bytes_full
    if prefills == 1:  # an oracle knows one selection
        with masked_oracle(
            pipe.model, run.selections, run.prefill_selections, adapter=find_adapter(pipe.model)
        ):
            assert answer == ask()
    return answer


def check(pipe: Any, ask: Ask) -> None:
    """Compare a pipeline that makes one batch with stock transformers and with the oracle."""
    stock = ask()
    assert answers(pipe, ask, "full") == stock
    others = [answers(pipe, ask, spec) for spec in SPECS]
    assert any(answer != stock for answer in others)  # the answer depends on what is pruned


# Speech.

SPEECH = (
    "Whisper",
    "Moonshine",
    "Moonshine Streaming",
    "Speech2Text",
    "SeamlessM4T",
    "Canary",
    "Cohere ASR",
    "speech encoder-decoder",
)


def listener(name: str, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline made of a loaded model and its parts, and what it passes on to ``generate``."""
    own = load(name, folder)
    pipe = transformers.pipeline(
        "automatic-speech-recognition",
        model=own.model,
        feature_extractor=own.processor.feature_extractor,
        tokenizer=own.tokenizer,
        **options,
    )
    return pipe, {"generate_kwargs": {**LENGTH, **own.options}}


def sounds(name: str, number: int) -> list[Any]:
    """Return recordings, cut to what some tiny models read at once."""
    longest = {"Whisper": 47_000, "Cohere ASR": 31_000}.get(name)
    return [sound[:longest].copy() for sound in recordings()[:number]]


@pytest.mark.parametrize("name", SPEECH)
def test_speech_recognition_of_one_recording_and_of_a_batch(name: str, folder_of: Folder) -> None:
    pipe, options = listener(name, folder_of(name))
    one, two = sounds(name, 1), sounds(name, 2)
    as_dict = {"raw": one[0], "sampling_rate": 16_000}
    check(pipe, lambda: pipe(two, batch_size=2, **options))
    assert answers(pipe, lambda: pipe(dict(as_dict), **options), SPECS[0]) == answers(
        pipe, lambda: pipe(one[0], **options), SPECS[0]
    )


@pytest.mark.parametrize("name", ["Moonshine", "Whisper"])
def test_speech_recognition_under_a_policy_that_decides_in_steps(name: str, folder_of: Folder) -> None:
    pipe, options = listener(name, folder_of(name))
    two = sounds(name, 2)

    def ask() -> Any:
        return pipe(two, batch_size=2, **options)

    with kvprune.compress(pipe.model, "quest:keep_ratio=0.1,page=4") as run:
        run.record_steps()
        answer = ask()
    assert run.report.kept_fraction == 1
    assert run.report.read_of_visible == pytest.approx(0.1, abs=0.02)
    adapter = find_adapter(pipe.model)
    with (
        masked_oracle(pipe.model, run.selections, run.prefill_selections, adapter=adapter),
        masked_steps(adapter(pipe.model).sites, run.step_reads),
    ):
        assert answer == ask()


@pytest.mark.parametrize("name", ["Moonshine", "Whisper"])
def test_an_iterator_in_batches_answers_as_batches_by_hand(name: str, folder_of: Folder) -> None:
    pipe, options = listener(name, folder_of(name))
    spoken = sounds(name, 4)

    def stream() -> Iterator[dict[str, Any]]:
        for sound in spoken:
            yield {"raw": sound, "sampling_rate": 16_000}

    by_hand = [
        answer
        for first in (0, 2)
        for answer in answers(
            pipe, lambda first=first: pipe(spoken[first : first + 2], batch_size=2, **options), SPECS[0]
        )
    ]
    assert by_hand == answers(pipe, lambda: list(pipe(stream(), batch_size=2, **options)), SPECS[0], 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_long_recording_in_pieces(batch: int, folder_of: Folder) -> None:
    pipe, options = listener("Moonshine", folder_of("Moonshine"))
    sound = recordings()[2].copy()  # 5.3 seconds
    pieces = {**options, "chunk_length_s": 2, "batch_size": batch}
    stock = pipe(sound, **pieces)
    prefills = 4 if batch == 1 else 2
    assert answers(pipe, lambda: pipe(sound, **pieces), "full", prefills) == stock
    assert answers(pipe, lambda: pipe(sound, **pieces), SPECS[0], prefills) != stock


def test_a_pipeline_that_searches_with_five_beams_holds_a_recording_once(folder_of: Folder) -> None:
    """It does so unless told otherwise."""
    pipe, options = listener("Moonshine", folder_of("Moonshine"))
    (sound,) = sounds("Moonshine", 1)
    with kvprune.compress(pipe.model, "full") as full:
        pipe(sound, **options)
    assert full.report.bytes_full == 5 * full.report.bytes_held
    with kvprune.compress(pipe.model, SPECS[0]) as run:
        pipe(sound, **options)
    assert run.report.bytes_held < 0.2 * full.report.bytes_held


# Pictures.


def viewer(name: str, folder: Path, task: str = "image-text-to-text", **options: Any) -> Any:
    """Return a pipeline that loads a folder."""
    return transformers.pipeline(task, model=str(folder), **options)


@pytest.fixture(scope="module")
def captions(folder_of: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Pix2Struct that describes pictures: its text begins the answer, and is no header."""
    own = load("Pix2Struct", folder_of("Pix2Struct"))
    own.processor.image_processor.is_vqa = False
    folder = tmp_path_factory.mktemp("captions")
    own.model.save_pretrained(folder)
    own.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Florence-2", "BLIP", "Donut", "Pix2Struct"])
def test_pictures_to_text(name: str, folder_of: Folder, captions: Path, pictures: list[Path]) -> None:
    pipe = viewer(name, captions if name == "Pix2Struct" else folder_of(name))
    options: dict[str, Any] = {"generate_kwargs": LENGTH}
    if name == "Pix2Struct":
        options["max_patches"] = 24
    texts = ["what is on the page ?", "a picture of"] if name == "Florence-2" else ["a picture of"] * 2
    files = [str(picture) for picture in pictures[:2]]
    check(pipe, lambda: pipe(images=files[0], text=texts[0], **options))
    check(pipe, lambda: pipe(images=files, text=texts, **options))


def test_the_old_name_of_the_task(folder_of: Folder, pictures: list[Path]) -> None:
    try:
        pipe = viewer("BLIP", folder_of("BLIP"), "image-to-text")
    except KeyError:
        pytest.skip("this release of transformers does not know the old name")
    check(pipe, lambda: pipe(images=str(pictures[0]), text="a picture of", generate_kwargs=LENGTH))


def test_questions_about_a_document(
    folder_of: Folder, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load("Donut", folder_of("Donut"))
    pipe = transformers.pipeline(
        "document-question-answering",
        model=own.model,
        tokenizer=own.tokenizer,
        feature_extractor=own.processor.image_processor,
        image_processor=own.processor.image_processor,
    )
    for owner in (pipe.model, pipe):  # the pipeline passes no options on
        if hasattr(owner, "generation_config"):  # a pipeline has one in old releases
            owner.generation_config.max_new_tokens = 6
    # An answer has a tag at its end, which a random model does not write: all tokens are compared.
    monkeypatch.setattr(
        pipe, "postprocess_encoder_decoder_single", lambda out: {"answer": out["sequences"].tolist()}
    )
    check(pipe, lambda: pipe(image=str(pictures[0]), question="what is on the page ?"))


def test_pictures_from_a_generator_in_batches(folder_of: Folder, pictures: list[Path]) -> None:
    pipe = viewer("Florence-2", folder_of("Florence-2"))

    def ask(batch: int) -> Any:
        stream = ({"images": str(picture), "text": "<OD>"} for picture in pictures)
        return list(pipe(stream, batch_size=batch, generate_kwargs=LENGTH))

    stock = ask(1)
    for batch, prefills in ((1, 3), (2, 2)):
        assert answers(pipe, lambda batch=batch: ask(batch), "full", prefills) == stock
    one, two = (
        answers(pipe, lambda batch=batch: ask(batch), SPECS[0], prefills)
        for batch, prefills in ((1, 3), (2, 2))
    )
    assert one == two != stock


@pytest.fixture(scope="module")
def demo() -> Any:
    """A pipeline of the trained demo, an Mllama."""
    return transformers.pipeline("image-text-to-text", model=str(model_path()))


def chat(picture: Path, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_chats_with_an_mllama(demo: Any, pictures: list[Path]) -> None:
    chats = [chat(pictures[0], "Where is the 3?"), chat(pictures[1], "Read it all.")]
    options = {"max_new_tokens": 6, "return_full_text": False}
    check(demo, lambda: demo(text=chats[0], **options))
    check(demo, lambda: demo(text=chats, batch_size=2, **options))
    one = answers(demo, lambda: demo(text=chats, **options), SPECS[0], 2)
    assert one == answers(demo, lambda: demo(text=chats, batch_size=2, **options), SPECS[0])


def test_pictures_and_texts_with_an_mllama(demo: Any, pictures: list[Path]) -> None:
    from PIL import Image

    images = [[Image.open(picture)] for picture in pictures[:2]]
    texts = ["<|image|>Where is the 3?", "<|image|>Read it all."]
    check(demo, lambda: demo(images=images, text=texts, max_new_tokens=6))


# Ways of running a pipeline.


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"dtype": torch.bfloat16, "device": "cpu"}])
def test_a_pipeline_that_places_its_model(
    options: dict[str, Any], folder_of: Folder, pictures: list[Path]
) -> None:
    pipe = viewer("Florence-2", folder_of("Florence-2"), **options)

    def ask() -> Any:
        return pipe(images=str(pictures[0]), text="<OD>", generate_kwargs=LENGTH)

    stock = ask()
    assert answers(pipe, ask, "full") == stock
    if "dtype" in options:  # tokens of the oracle may flip in bfloat16
        with kvprune.compress(pipe.model, SPECS[0]) as run:
            ask()
        assert run.report.bytes_held < 0.2 * run.report.bytes_full
    else:
        check(pipe, ask)


def test_a_pipeline_in_another_thread(folder_of: Folder) -> None:
    pipe, options = listener("Moonshine", folder_of("Moonshine"))
    (sound,) = sounds("Moonshine", 1)

    def ask() -> Any:
        return pipe(sound, **options)

    def in_a_thread() -> Any:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(ask).result()

    assert answers(pipe, in_a_thread, SPECS[0]) == answers(pipe, ask, SPECS[0])


def test_threads_that_share_a_pipeline_take_turns_with_a_lock(folder_of: Folder) -> None:
    pipe, options = listener("Moonshine", folder_of("Moonshine"))
    lock, spoken = threading.Lock(), sounds("Moonshine", 4)

    def ask(sound: Any) -> Any:
        with lock:
            return pipe(sound, **options)

    with kvprune.compress(pipe.model, SPECS[0]) as run, ThreadPoolExecutor(2) as threads:
        together = list(threads.map(ask, spoken))
    assert run.report.prefills == 4
    with kvprune.compress(pipe.model, SPECS[0]):
        assert together == [pipe(sound, **options) for sound in spoken]


def test_a_second_thread_in_the_middle_of_a_call_is_refused(folder_of: Folder) -> None:
    pipe, options = listener("Moonshine", folder_of("Moonshine"))
    (sound,) = sounds("Moonshine", 1)
    refused: list[BaseException] = []

    def ask_as_well(module: Any, args: Any) -> None:
        if threading.current_thread() is main and not refused:
            with ThreadPoolExecutor(1) as threads:
                error = threads.submit(pipe, sound, **options).exception()
            refused.append(error or AssertionError("not refused"))

    main = threading.current_thread()
    with kvprune.compress(pipe.model, SPECS[0]):
        handle = pipe.model.get_decoder().layers[0].register_forward_pre_hook(ask_as_well)
        answer = pipe(sound, **options)
        handle.remove()
        assert isinstance(refused[0], CompressionStateError)
        assert answer == pipe(sound, **options)


def test_every_family_of_speech_is_in_a_pipeline() -> None:
    assert {name for name, family in FAMILIES.items() if family.auto == "SpeechSeq2Seq"} == {*SPEECH}
