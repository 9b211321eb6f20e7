"""What `kvprune train` asks for: finds policy, model and data, and trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from kvprune.adapters.base import ModelAdapter
from kvprune.comparison.data.examples import kind_of, read_examples
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.identity import model_digest
from kvprune.demo import SPEECH_MODEL
from kvprune.errors import TrainingError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.spec import PolicySpec
from kvprune.policy.trained import TrainedPolicy
from kvprune.policy.weights import FRESH
from kvprune.session.registry import find_adapter, get_policy, load
from kvprune.text import shown
from kvprune.training.curve import draw_curve
from kvprune.training.file_lessons import FileLessons, split
from kvprune.training.lessons import Lessons
from kvprune.training.recipe import Recipe
from kvprune.training.speech_lessons import SpeechLessons
from kvprune.training.train import Files, Trained, train

__all__ = ["Asked", "learn"]

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to train, on what, and where to write it; see the options of `kvprune train`."""

    policy: str
    out: Path
    model: str | None = None
    data: Path | None = None
    validation: Path | None = None
    held_out: float = 0.1
    answers: str = "full"
    pictures: int = 1000
    batch: int = 64
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    half: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.answers not in ("full", "data"):
            raise TrainingError(f"answers are those of full or of data, got {shown(self.answers)}")
        if self.batch < 1 or self.pictures < 1:
            raise TrainingError(
                "a lesson has at least one question or recording, and the demo at least one picture, got "
                f"{self.batch} and {self.pictures}"
            )
        if self.data is None and (self.model is not None or self.validation is not None):
            given = "--model" if self.model is not None else "--validation"
            raise TrainingError(f"{given} takes data of its own; name a file with --data")


def learn(asked: Asked, recipe: Recipe, on_progress: OnProgress = lambda what, done, total: None) -> Trained:
    """Train a policy.

    Args:
        asked: What to train.
        recipe: The numbers of the training.
        on_progress: Called with what is being done, how much of it is done, and how much there is.

    Raises:
        TrainingError: If the policy or the data are not fit for training, or a file would be overwritten.
        KVPruneError: If policy, model or data are wrong in another way.
    """
    policy, files = trainable(asked.policy), Files(asked.out)
    files.require_new()  # before anything is loaded
    hears = asked.data is not None and kind_of(asked.data) == "speech"
    kind: type[Generator] = SpeechGenerator if hears else PictureGenerator
    model = SPEECH_MODEL if asked.model is None and hears else asked.model
    generator = kind.load(
        model,
        device=resolve_device(asked.device),
        dtype=asked.dtype,
        attn_implementation=None,
        max_new_tokens=None,
        trust_remote_code=asked.trust_remote_code,
    )
    adapter = find_adapter(generator.model)(generator.model)
    adapter.require_needs(policy)
    lessons = _lessons(asked, generator, adapter, on_progress)
    about = {"model_digest": model_digest(sources.weights(model))}

    told = "training"

    def progress(step: int, row: Mapping[str, float] | None) -> None:
        nonlocal told
        if row is not None:
            told = f"training, divergence {row['divergence']:.3g}, right {100 * row['right']:.1f} %"
        on_progress(told, step, recipe.steps)

    done = train(adapter, policy, lessons, recipe, files, about, half=asked.half, on_progress=progress)
    title = f"{replace(policy.spec, options=_own(policy))}, digest {done.file.digest}"
    draw_curve(files.picture, title, done.curve, done.best_step)
    return done


def trainable(spec: str) -> TrainedPolicy:
    """Return the policy of a spec, with fresh weights.

    Raises:
        TrainingError: If it has no weights, does not decide before the first cross-attention layer, or the
            spec names weights.
        KVPruneError: If there is no such policy.
    """
    parsed = PolicySpec.parse(spec)
    named = [name for name in ("weights", "digest") if name in parsed.options]
    if named:
        raise TrainingError(
            f"the spec {shown(spec)} names {' and '.join(named)}, but training starts afresh; leave that out"
        )
    installed = load()
    cls = installed.policy_class(parsed.name)
    if not _learns(cls):
        learn = (name for name, entry in installed.policies.items() if _learns(entry.cls))
        why = (
            "has weights, but decides after the first cross-attention layer, and kvprune train trains "
            f"policies that decide before it; kvprune show {parsed.name} says how its weights are made"
            if issubclass(cls, TrainedPolicy)
            else "has no weights to train"
        )
        raise TrainingError(
            f"policy {shown(parsed.name)} {why} (kvprune train can train: {', '.join(learn) or 'none'})"
        )
    made = get_policy(replace(parsed, options={**parsed.options, "weights": FRESH}))
    return cast(TrainedPolicy, made)


def _learns(cls: type[CrossKVPolicy]) -> bool:
    return issubclass(cls, TrainedPolicy) and issubclass(cls, FeaturePolicy)


def _own(policy: TrainedPolicy) -> dict[str, Any]:
    return {name: value for name, value in policy.spec.options.items() if name != "weights"}


def _lessons(asked: Asked, generator: Generator, adapter: ModelAdapter, on_progress: OnProgress) -> Lessons:
    """Return the lessons that the options ask for."""
    if asked.data is None:
        from kvprune.training.demo_lessons import DemoLessons  # needs an extra

        return DemoLessons(
            generator.model,
            generator.processor,
            seed=asked.seed,
            pictures=asked.pictures,
            batch=asked.batch,
            on_progress=lambda done, total: on_progress("drawing pictures", done, total),
        )
    examples = read_examples(asked.data)
    if asked.validation is None:
        learning, held = split(examples, asked.held_out, asked.seed)
    else:
        learning, held = examples, read_examples(asked.validation)
    doing = "listening" if generator.kind == "speech" else "answering"
    lessons = SpeechLessons if generator.kind == "speech" else FileLessons
    return lessons(
        generator,
        adapter,
        learning,
        held,
        seed=asked.seed,
        batch=asked.batch,
        answers=cast(Literal["full", "data"], asked.answers),
        on_progress=lambda done, total: on_progress(doing, done, total),
    )
