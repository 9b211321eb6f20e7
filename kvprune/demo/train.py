"""Train the demo model: `python -m kvprune.demo.train --output FOLDER`.

There are three stages. First the vision tower learns to see: heads that are used in training only classify
each patch from the features that the text layers will read. Then all weights learn to answer questions, one
question per prompt as in evaluation, while the patch losses fade out. The third stage is the same at lower
rates and without the patch losses.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kvprune.demo.architecture import build_model, build_processor
from kvprune.demo.batches import Batch, Batches
from kvprune.demo.evaluate import accuracy
from kvprune.demo.examples import examples
from kvprune.demo.losses import PatchHeads, answer_loss, float32_attention, see, silenced, speaks
from kvprune.demo.recipe import Recipe, fade, optimizers, rate
from kvprune.demo.tasks import TASKS

_FLOAT32 = "kvprune_demo_float32"  # name of the attention used while training


class Training:
    """A training run that can be saved and resumed.

    Args:
        recipe: The numbers of the run; everything is built from its seed.
        threads: Number of threads to compute with.
    """

    def __init__(self, recipe: Recipe, threads: int) -> None:
        from transformers import AttentionInterface

        torch.set_num_threads(threads)
        torch.manual_seed(recipe.seed)
        AttentionInterface.register(_FLOAT32, float32_attention)
        self.recipe = recipe
        self.step = 0
        self.seconds = 0.0
        self.processor = build_processor()
        self.model = build_model(self.processor.tokenizer)
        self.model.set_attn_implementation(_FLOAT32)
        text: Any = self.model.model.language_model
        self.first_cross = text.layers[text.config.cross_attention_layers[0]].cross_attn
        self.heads = PatchHeads(self.model.model.hidden_size)
        self.optimizers = optimizers(self.model, self.heads, recipe)
        factor = rate(recipe)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in self.optimizers]

    def learn(self, batch: Batch) -> dict[str, float]:
        """Make one step; return the weighted losses of the patches and the loss of the answers, by name."""
        started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            features = see(self.model, batch.tiles)
            losses = self.heads(features, batch.labels)
            loss = fade(self.recipe, self.step) * sum(losses.values())
            if batch.text is not None:
                polishing = self.step >= self.recipe.see_steps + self.recipe.answer_steps
                share = self.recipe.polish_look if polishing else self.recipe.first_look
                with silenced(self.first_cross, speaks(batch.text, share)):
                    losses["answers"] = answer_loss(self.model, features, batch.text)
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
        return {name: float(part.detach()) for name, part in losses.items()}

    def save(self, output: Path, state: Path | None) -> None:
        """Write the model's folder and, if `state` is given, everything that is needed to resume."""
        build_processor().save_pretrained(output)  # a new one, since calls change a tokenizer's settings
        self.model.save_pretrained(output)
        if state is not None:
            parts = [part.state_dict() for part in self._parts()]
            torch.save({"step": self.step, "seconds": self.seconds, "parts": parts}, state)

    def resume(self, state: Path) -> None:
        """Resume the training that `save` wrote to `state`."""
        saved = torch.load(state, weights_only=True)
        self.step, self.seconds = saved["step"], saved["seconds"]
        for part, values in zip(self._parts(), saved["parts"], strict=True):
            part.load_state_dict(values)

    def _parts(self) -> list[Any]:
        return [self.model, self.heads, *self.optimizers, *self.schedules]


def train(
    recipe: Recipe, output: Path, threads: int = 2, save_every: int = 200, state: Path | None = None
) -> None:
    """Train, save the model every `save_every` steps and at the end, and add `training.json`.

    Args:
        recipe: The numbers of the run.
        output: Folder to write; created if missing.
        threads: Number of threads to compute with.
        save_every: Steps between two saves.
        state: File with the state of an interrupted training. The training resumes from it if it exists, and
            writes it at each save.

    Raises:
        ImportError: If scikit-learn or tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('training needs tqdm: pip install "kvprune[demo]"') from error

    training = Training(recipe, threads)
    if state is not None and state.exists():
        training.resume(state)
    batches = _prefetch(Batches(recipe, training.processor, first=training.step))
    bar = tqdm(batches, total=recipe.steps, initial=training.step, unit="step", mininterval=5.0)
    smooth: dict[str, float] = {}
    for batch in bar:
        losses = training.learn(batch)
        for name, part in losses.items():
            smooth[name] = smooth.get(name, part) + 0.03 * (part - smooth.get(name, part))
        bar.set_postfix({name: f"{part:.2f}" for name, part in smooth.items()}, refresh=False)
        if training.step % save_every == 0:
            training.save(output, state)
            bar.write(
                f"step {training.step}: " + " ".join(f"{name} {part:.3f}" for name, part in smooth.items())
            )
            if batch.text is not None:
                found = _held_out(training, 64, seed=1)
                bar.write(", ".join(f"{task} {share:.0%}" for task, share in found.items()))
    training.save(output, None)
    _report(training, output)


def _prefetch(batches: Batches) -> Iterator[Batch]:
    """Make batches in a second process, a few ahead of the training."""
    return iter(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))


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

    count = 500
    found = {task: round(share, 4) for task, share in _held_out(training, count).items()}
    record = {
        "recipe": asdict(training.recipe),
        "steps": training.step,
        "seed": training.recipe.seed,
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
        print(f"{task:6} {share:6.1%} of {count} held-out examples")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--see-steps", type=int, default=Recipe.see_steps, help="steps of the first stage")
    parser.add_argument(
        "--answer-steps", type=int, default=Recipe.answer_steps, help="steps of the second stage"
    )
    parser.add_argument(
        "--polish-steps", type=int, default=Recipe.polish_steps, help="steps of the third stage"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200, help="steps between two saves")
    parser.add_argument("--state", type=Path, help="file with the state to resume an interrupted training")
    options = parser.parse_args(arguments)
    recipe = Recipe(
        seed=options.seed,
        see_steps=options.see_steps,
        answer_steps=options.answer_steps,
        polish_steps=options.polish_steps,
    )
    train(recipe, options.output, options.threads, options.save_every, options.state)


if __name__ == "__main__":
    main()
