"""Train the demo's models: `python -m kvprune.demo.train --output FOLDER`, with `--size guide` the guide.

There are two stages. First the vision tower learns to see: heads that are used in training only classify each
patch from the features that the text layers will read. Then all weights learn to answer questions, one
question per prompt as in evaluation, while the patch losses fade. All layers are trained alike.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from kvprune.demo.architecture import build_model, build_processor
from kvprune.demo.batches import Batch, Batches
from kvprune.demo.evaluate import accuracy
from kvprune.demo.examples import examples
from kvprune.demo.losses import PatchHeads, answer_loss, float32_attention, see
from kvprune.demo.recipe import RECIPES, Recipe, fade, optimizers, rate
from kvprune.demo.tasks import LESSONS, TASKS

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration

_FLOAT32 = "kvprune_demo_float32"  # name of the attention used while training
_Part = TypeVar("_Part")

REPORT = 500
"""Held-out examples of each task that are answered after training."""

_GLANCE = 32  # held-out examples of each task that are answered at a save


class Training:
    """A training run that can be saved and resumed.

    Args:
        recipe: The numbers of the run; everything is built from its seed.
        threads: Number of threads to compute with.
        device: Where to train.
    """

    def __init__(self, recipe: Recipe, threads: int, device: str = "cpu") -> None:
        from transformers import AttentionInterface

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(recipe.seed)
        AttentionInterface.register(_FLOAT32, float32_attention)
        self.recipe = recipe
        self.device = torch.device(device)
        self.step = 0
        self.seconds = 0.0
        self.processor = build_processor()
        self.model = _to_device(build_model(self.processor.tokenizer, recipe.size), self.device)
        self.model.set_attn_implementation(_FLOAT32)
        self.heads = PatchHeads(self.model.model.hidden_size).to(self.device)
        self.optimizers = optimizers(self.model, self.heads, recipe)
        factor = rate(recipe)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in self.optimizers]

    def learn(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Make one step; return the weighted losses of the patches and the loss of the answers, by name."""
        started = time.monotonic()
        # bfloat16 products are faster on a CPU; on a GPU, a model this small gains nothing from them
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cpu"):
            features = see(self.model, _to(batch.tiles, self.device))
            losses = self.heads(features, _to(batch.labels, self.device))
            loss = fade(self.recipe, self.step) * sum(losses.values())
            if batch.text is not None:
                losses["answers"] = answer_loss(self.model, features, _to(batch.text, self.device))
                loss = loss + losses["answers"]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        return {name: part.detach() for name, part in losses.items()}

    def save(self, output: Path, state: Path | None) -> None:
        """Write the model's folder and, if `state` is given, everything that is needed to resume.

        The weights are stored in half precision; the configuration says float32, in which they are computed
        with.
        """
        build_processor().save_pretrained(output)  # a new one, since calls change a tokenizer's settings
        half = {name: value.half() for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(output, state_dict=half)
        if state is not None:
            parts = [part.state_dict() for part in self._parts()]
            partial = state.with_name(state.name + ".partial")  # an interruption leaves the state whole
            torch.save(
                {
                    "recipe": asdict(self.recipe),
                    "step": self.step,
                    "seconds": self.seconds,
                    "random": torch.get_rng_state(),
                    "parts": parts,
                },
                partial,
            )
            partial.replace(state)

    def resume(self, state: Path) -> None:
        """Resume the training that `save` wrote to `state`.

        Raises:
            ValueError: If that training had another recipe.
        """
        saved = torch.load(state, weights_only=True, map_location=self.device)
        recipe = asdict(self.recipe)
        if saved["recipe"] != recipe:
            differing = ", ".join(name for name in recipe if saved["recipe"].get(name) != recipe[name])
            raise ValueError(
                f"{state} holds a training with another {differing}; give the same options or another --state"
            )
        self.step, self.seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["random"].cpu())
        for part, values in zip(self._parts(), saved["parts"], strict=True):
            part.load_state_dict(values)

    def _parts(self) -> list[Any]:
        return [self.model, self.heads, *self.optimizers, *self.schedules]


def train(
    recipe: Recipe,
    output: Path,
    threads: int = 2,
    save_every: int = 200,
    state: Path | None = None,
    device: str = "cpu",
    workers: int = 1,
) -> None:
    """Train, save the model every `save_every` steps and at the end, and add `training.json`.

    Args:
        recipe: The numbers of the run.
        output: Folder to write; created if missing.
        threads: Number of threads to compute with.
        save_every: Steps between two saves.
        state: File with the state of an interrupted training. The training resumes from it if it exists, and
            writes it at each save.
        device: Where to train.
        workers: Processes that make batches.

    Raises:
        ImportError: If scikit-learn, matplotlib or tqdm is not installed.
        KeyboardInterrupt: If it was interrupted, after saying how to resume.
        ValueError: If `state` holds a training with another recipe, or `save_every` is less than 1.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    for folder in (output, *([] if state is None else [state.parent])):
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is found out now
    training = Training(recipe, threads, device)
    if state is not None and state.exists():
        training.resume(state)
        print(f"{state} is resumed at step {training.step} of {recipe.steps}")
    try:
        _run(training, output, save_every, state, workers)
        training.save(output, state)
        _report(training, output)
    except KeyboardInterrupt:
        print(f"\ninterrupted at step {training.step} of {recipe.steps}: {_how_to_resume(state)}")
        raise


def _run(training: Training, output: Path, save_every: int, state: Path | None, workers: int) -> None:
    """Make all steps that are left, save now and then, and show the losses and held-out accuracy."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('training needs tqdm: pip install "kvprune[demo]"') from error

    recipe = training.recipe
    batches = _prefetch(Batches(recipe, training.processor, first=training.step), workers)
    bar = tqdm(batches, total=recipe.steps, initial=training.step, unit="step", mininterval=5.0)
    smooth: dict[str, torch.Tensor] = {}
    for batch in bar:
        for name, part in training.learn(batch).items():
            smooth[name] = torch.lerp(smooth.get(name, part), part, 0.03)
        if training.step % save_every == 0 and training.step < recipe.steps:
            training.save(output, state)
            losses = " ".join(f"{name} {float(part):.3f}" for name, part in smooth.items())
            bar.write(f"step {training.step}: loss {losses}")
            if batch.text is not None:
                found = _held_out(training, _GLANCE, seed=1)
                shares = ", ".join(f"{task} {share:.0%}" for task, share in found.items())
                bar.write(f"step {training.step}: held-out accuracy {shares}")
                bar.set_postfix_str(f"held-out accuracy {sum(found.values()) / len(found):.0%}")


def _how_to_resume(state: Path | None) -> str:
    """Return what somebody can do who interrupted a training."""
    if state is None:
        return "it cannot be resumed, since no --state FILE was given"
    if not state.exists():
        return "nothing was saved yet, so the same command begins again; --save-every N saves more often"
    step = torch.load(state, weights_only=True, map_location="cpu")["step"]
    return f"{state} holds step {step}; the same command resumes there"


def _to_device(model: Any, device: torch.device) -> MllamaForConditionalGeneration:
    """Return a model on another device; its own `to` is not typed for that."""
    moved: MllamaForConditionalGeneration = model.to(device)
    return moved


def _to(part: _Part, device: torch.device) -> _Part:
    """Return a dataclass of tensors on another device."""
    values: Any = part
    moved = {one.name: getattr(values, one.name).to(device, non_blocking=True) for one in fields(values)}
    return type(part)(**moved)


def _prefetch(batches: Batches, workers: int) -> Iterator[Batch]:
    """Make batches in other processes, a few ahead of the training; without workers, in this one."""
    ahead = 4 if workers else None
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=_ignore_interrupts,
    )
    return iter(loader)


def _ignore_interrupts(_: int) -> None:
    """Leave Ctrl-C to the training, which ends the processes that make batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _held_out(training: Training, count: int, seed: int = 0) -> dict[str, float]:
    """Return the accuracy of each task on `count` held-out examples."""
    training.model.train(False)
    training.model.set_attn_implementation("sdpa")
    found = {
        task: accuracy(training.model, training.processor, examples(task, count, seed=seed)) for task in TASKS
    }
    training.model.set_attn_implementation(_FLOAT32)
    training.model.train()
    return found


def _report(training: Training, output: Path) -> None:
    """Measure held-out accuracy, print it and write `training.json`."""
    import sklearn
    import transformers

    count = REPORT
    found = {task: round(share, 4) for task, share in _held_out(training, count).items()}
    record = {
        "recipe": asdict(training.recipe),
        "steps": training.step,
        "seed": training.recipe.seed,
        "device": _device_name(training.device),
        "minutes": round(training.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "held_out_accuracy": found,
        "held_out_examples_per_task": count,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
            "numpy": np.__version__,
        },
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for task, share in found.items():
        print(f"{task:8} {share:6.1%} of {count} held-out examples")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _asked(text: str) -> tuple[str, float]:
    """Read `TASK=WEIGHT`, how often training asks a task."""
    task, _, weight = text.partition("=")
    try:
        asked = float(weight)
    except ValueError:
        asked = math.nan
    if task not in LESSONS or not 0 <= asked < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not TASK=WEIGHT with a weight of at least 0 and a task of {', '.join(LESSONS)}"
        )
    return task, asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--size", default="model", choices=tuple(RECIPES), help="which of the models")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--see-steps", type=int, help="steps of the first stage; default: the recipe's")
    parser.add_argument("--answer-steps", type=int, help="steps of the second stage; default: the recipe's")
    parser.add_argument(
        "--ask",
        type=_asked,
        action="append",
        default=[],
        metavar="TASK=WEIGHT",
        help="how often a task is asked, relative to the others; default: the recipe's",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saves")
    parser.add_argument("--state", type=Path, help="file with the state to resume an interrupted training")
    given = parser.parse_args(arguments)
    usual = RECIPES[given.size]
    recipe = replace(
        usual,
        seed=given.seed,
        see_steps=usual.see_steps if given.see_steps is None else given.see_steps,
        answer_steps=usual.answer_steps if given.answer_steps is None else given.answer_steps,
        mix={**usual.mix, **dict(given.ask)},
    )
    try:
        train(recipe, given.output, given.threads, given.save_every, given.state, given.device, given.workers)
    except KeyboardInterrupt:
        sys.exit(130)  # what shells expect after Ctrl-C


if __name__ == "__main__":
    main()
