"""A checkpoint is data: nothing that comes with it runs unless the user says so, and pickles are not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvprune import demo
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.storage.manifest import model_digest
from kvprune.errors import UnsupportedModelError
from kvprune.testing import tiny_mllama


def load(model: Path | str | None, **options: Any) -> PictureGenerator:
    plain = {"device": "cpu", "dtype": "auto", "attn_implementation": None, "max_new_tokens": 2}
    return PictureGenerator.load(None if model is None else str(model), **{**plain, **options})


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_mllama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The demo model as somebody else's checkpoint."""
    return shutil.copytree(demo.model_path(), tmp_path / "copy")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a checkpoint writes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "trap-has-sprung"


def add_code(model: Path, config: str, auto_class: str, trap: Path) -> None:
    """Let a checkpoint's configuration name a class in a module that writes `trap` when it is imported."""
    path = model / config
    content = json.loads(path.read_text()) if path.exists() else {}
    content["auto_map"] = {auto_class: "sprung.Sprung"}
    path.write_text(json.dumps(content))
    (model / "sprung.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Sprung: pass\n")


@pytest.mark.parametrize(
    ("config", "auto_class"),
    [
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForImageTextToText"),
        ("processor_config.json", "AutoProcessor"),
        ("preprocessor_config.json", "AutoImageProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ],
)
def test_code_of_a_checkpoint_is_refused_by_name(
    tiny: Path, trap: Path, config: str, auto_class: str
) -> None:
    add_code(tiny, config, auto_class, trap)
    with pytest.raises(UnsupportedModelError, match=rf"{config} names sprung\.Sprung.*--trust-remote-code"):
        load(tiny)
    model_digest(str(tiny))
    assert not trap.exists(), "nothing ran"


def test_code_of_a_checkpoint_runs_if_the_user_says_so(tiny: Path, trap: Path) -> None:
    add_code(tiny, "config.json", "AutoConfig", trap)
    with pytest.raises(UnsupportedModelError, match="cannot load model"):  # the class in it is a dummy
        load(tiny, trust_remote_code=True)
    assert trap.exists(), "the trap works"


def test_code_for_generate_never_runs(copy: Path, trap: Path) -> None:
    (copy / "custom_generate").mkdir()
    code = f"open({str(trap)!r}, 'w').close()\ndef generate(model, **_): raise RuntimeError\n"
    (copy / "custom_generate" / "generate.py").write_text(code)
    assert load(copy).model.generation_config.eos_token_id is not None
    assert not trap.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_a_remedy(copy: Path, name: str) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / name)
    (copy / "model.safetensors").unlink()
    message = rf"has {name} but no \*.safetensors; .*pickles, which can run code.*save_pretrained"
    with pytest.raises(UnsupportedModelError, match=message):
        load(copy)


def test_pickles_beside_safetensors_are_not_read(copy: Path) -> None:
    digest = model_digest(str(copy))
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert model_digest(str(copy)) == digest
    ours, own = load(copy).model.state_dict(), load(None).model.state_dict()
    assert all(torch.equal(ours[name], own[name]) for name in own)


@pytest.mark.parametrize("content", [b"", b"rubbish" * 9, b"\xff" * 64])
def test_damaged_weights_are_a_typed_error(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="cannot load model"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"model_type": NaN}', b"[]", b"\xff"])
def test_damaged_configurations_are_a_typed_error(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="cannot load model"):
        load(copy)


def test_devices_that_are_not_there_are_a_typed_error(copy: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for model in (None, copy):
        with pytest.raises(UnsupportedModelError, match=r"cannot load model .* on 'cuda'"):
            load(model, device="cuda")


def test_models_that_are_not_there_are_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot find model 'no/such-model'"):
        model_digest("no/such-model")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "new.py"]
)
def test_model_digest_sees_what_can_change_an_answer(copy: Path, name: str) -> None:
    before = model_digest(str(copy))
    with (copy / name).open("a") as file:
        file.write(" ")
    assert model_digest(str(copy)) != before
