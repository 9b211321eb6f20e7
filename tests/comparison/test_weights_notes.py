"""A comparison says which trained weights learned on another model than the one that is compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvprune_strategies.quecc import QueCC

from kvprune.comparison import Settings
from kvprune.comparison.execution.weights_notes import weights_notes
from kvprune.comparison.plan.grid import expand
from kvprune.policy.weights import save_weights

ON_ANOTHER = "Careful, trained on another model: weights {} of attnpred (digest {}): trained on {}"


def said(specs: list[str], model: str | None, digest: str = "sha256:1") -> list[str]:
    claimed: Any = SimpleNamespace(
        configurations=expand(specs, [0.5, 0.1]),
        settings=Settings(model=model),
        grid=SimpleNamespace(context={"model_digest": digest}),
    )
    return list(weights_notes(claimed))


@pytest.mark.parametrize("model", ["openai/whisper-base", "a/folder/whisper-base", "Whisper_Base"])
def test_weights_that_learned_on_another_model_are_named_once_with_those_that_fit(model: str) -> None:
    (note,) = said(["attnpred", "trim"], model)
    assert note.startswith(ON_ANOTHER.format("demo", "d2fa269a4adc", "the embedded model"))
    assert note.endswith("(attnpred also comes with weights=whisper-base, trained on whisper-base)")
    assert said(["attnpred:weights=whisper-base"], model) == []


def test_a_name_alone_is_no_proof() -> None:
    (note,) = said(["attnpred:weights=whisper-base"], "a/folder/mine")
    assert note.startswith("Careful, perhaps trained on another model: weights whisper-base of attnpred")


def test_weights_of_the_demo_are_right_for_the_demo() -> None:
    assert said(["attnpred", "quecc:k=4", "quecc then h2o", "attnpred:predictor=last"], None) == []
    (note,) = said(["attnpred:weights=whisper-base"], None)
    assert note.startswith(ON_ANOTHER.format("whisper-base", "d639fb680374", "whisper-base"))


def test_a_model_is_known_by_the_digest_that_training_writes(tmp_path: Path) -> None:
    path, policy = tmp_path / "w.safetensors", QueCC(weights="fresh")
    geometry = {"feature_width": 8, "question_width": 8}
    training = {"settings": {"model_digest": "sha256:123456789abcdef"}}
    save_weights(path, policy, policy.initial(geometry), geometry, training)
    specs = [f"quecc:weights={path} then h2o"]
    assert said(specs, "mine", "sha256:123456789abcdef") == []
    (note,) = said(specs, "mine", "sha256:2")
    assert "trained on a model with the digest sha256:123456789abc" in note
