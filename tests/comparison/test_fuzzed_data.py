"""Damaged rows and pictures: a comparison of them ends with results or with a typed error."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_foreign_text import HOSTILE

from kvprune.comparison import Settings, compare
from kvprune.comparison.data.examples import read_examples
from kvprune.errors import DataError, KVPruneError
from kvprune.text import is_printable

TEXTS = (
    *HOSTILE[:-3],
    "<|image|>",
    "<|eot_id|>",
    "<unk>",
    "\ud800",
    "",
    "\0",
    "{{ 7*7 }}",
    "{% raw %}",
    "a" * 2000,
)
VALUES = (None, True, 0, -1, 1e308, [], {}, [[]], ["red", None], {"a": "b"}, "x", 7, [7], [""], ["red"] * 50)
FORMATS = (
    ("RGB", "PNG"),
    ("RGB", "JPEG"),
    ("L", "PNG"),
    ("I;16", "PNG"),
    ("RGBA", "PNG"),
    ("P", "GIF"),
    ("F", "TIFF"),
    ("CMYK", "TIFF"),
    ("1", "BMP"),
    ("RGB", "WEBP"),
    ("I", "PPM"),
)
SIZES = ((1, 1), (1, 3000), (3000, 1), (40, 30), (7, 500))


def picture(draw: random.Random) -> bytes:
    """Return a picture of any kind and shape, often damaged."""
    mode, kind = draw.choice(FORMATS)
    buffer, options = io.BytesIO(), {}
    if draw.random() < 0.3:
        exif = Image.Exif()
        exif[274] = draw.choice([1, 3, 6, 8, 0, 99])
        options = {"exif": exif.tobytes()[: draw.choice([4, 12, 10**6])]}
    made = Image.new(mode, draw.choice(SIZES))
    made.save(buffer, kind, **(options if kind in ("PNG", "JPEG", "WEBP") else {}))
    content = bytearray(buffer.getvalue())
    damage = draw.random()
    if damage < 0.2:
        return bytes(content[: draw.randrange(len(content))])
    if damage < 0.5:
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def line(draw: random.Random) -> bytes:
    """Return a row in which some things are wrong, or everything is right."""
    row: dict[str, Any] = {"image": "picture", "question": "what?", "answers": ["red"], "task": "read"}
    for _ in range(draw.choice([0, 1, 1, 2])):
        field = draw.choice(["image", "question", "answers", "task", "id", "other"])
        kind = draw.random()
        if kind < 0.2:
            row.pop(field, None)
        elif kind < 0.4:
            row[field] = draw.choice(VALUES)
        else:
            text = draw.choice(TEXTS)
            row[field] = [text] if field == "answers" else text
    content = bytearray(json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass"))
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def damaged_data(folder: Path, number: int, seed: int) -> Iterator[Path]:
    """Yield data files of two rows, one of them good, with pictures that may be damaged."""
    draw = random.Random(seed)
    Image.new("RGB", (40, 40), "red").save(folder / "good.png")
    good = json.dumps({"image": "good.png", "question": "what?", "answers": ["red"]}).encode()
    for _ in range(number):
        (folder / "picture").write_bytes(picture(draw))
        rows = [line(draw), good]
        draw.shuffle(rows)
        path = folder / "data.jsonl"
        path.write_bytes(b"\n".join(rows))
        yield path


@pytest.mark.filterwarnings("ignore::UserWarning")  # of decoders about what was damaged
def test_damaged_data_is_read_or_a_data_error(tmp_path: Path) -> None:
    read = 0
    for path in damaged_data(tmp_path, 300, 0):
        refused = ""
        try:
            read += len(read_examples(path)) == 2
        except DataError as error:
            refused = str(error)
        assert is_printable(refused), ascii(refused)
        assert len(refused) < 5000
    assert 30 < read < 270


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 16))])
def test_a_comparison_of_damaged_data_ends_with_results_or_a_typed_error(tmp_path: Path, seed: int) -> None:
    for number, path in enumerate(damaged_data(tmp_path, 4, seed)):
        output = tmp_path / f"results-{number}"
        settings = Settings(data=path, output=output, max_new_tokens=1, repetitions=0)
        refused = ""
        try:
            compare(["lossless"], [], settings)
        except KVPruneError as error:
            refused = str(error)
        except Exception as error:
            raise AssertionError(f"{path.read_bytes()!r}: {type(error).__name__}: {error}") from error
        assert is_printable(refused), ascii(refused)
        assert refused or (output / "accuracy_vs_kept.png").exists()
