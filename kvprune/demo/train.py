"""Train the demo model: `python -m kvprune.demo.train --output FOLDER`.

First the vision tower learns to see: from the features that the text layers will read, throw-away heads tell
what each patch shows. Then everything learns to answer, one question a prompt as in evaluation, while the
patch losses fade out. Last it is polished: the same, at lower rates, without the patch losses.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kvprune.demo.batches import SIDE, PatchLabels, Tiles, crowd, label_patches, to_tiles
from kvprune.demo.build import build_model, build_processor
from kvprune.demo.evaluate import accuracy
from kvprune.demo.examples import examples
from kvprune.demo.handwriting import Handwriting, handwriting
from kvprune.demo.pictures import COLOURS, Picture
from kvprune.demo.prompts import Packed, pack
from kvprune.demo.tasks import TASKS, Query, ask, compose

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration, ProcessorMixin


_FLOAT32 = "kvprune_demo_float32"  # name of the attention used while training

_MIX = ("row", "count", "row", "read")  # pictures of the second stage; the hardest task is half of them


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run; `see_steps`, `answer_steps` and `polish_steps` are its stages.

    `first_look` and `polish_look` are the shares of questions for which the first cross-attention layer
    speaks while the model learns to answer, and while it is polished. Where it is silent, later layers have
    to find the answer in the picture themselves. Without this, the first layer alone reads most answers, and
    a benchmark of what later layers still see tells nothing.
    """

    seed: int = 0
    see_steps: int = 900
    answer_steps: int = 1800
    pictures: int = 16
    questions: int = 6
    adamw_rate: float = 1.5e-3
    muon_rate: float = 5e-3
    weight_decay: float = 0.02
    warm_up: int = 50
    first_look: float = 0.3
    polish_steps: int = 1500
    polish_look: float = 0.7
    polish_rate: float = 0.5

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.see_steps + self.answer_steps + self.polish_steps


@dataclass(frozen=True)
class Batch:
    """Pictures, what their patches show and, in the second stage, questions about them."""

    tiles: Tiles
    labels: PatchLabels
    text: Packed | None


class Batches(torch.utils.data.Dataset[Batch]):
    """Batch i of a recipe, made on demand from a seed of its own."""

    def __init__(self, recipe: Recipe, processor: ProcessorMixin, first: int = 0) -> None:
        """Start at step `first`."""
        self.recipe = recipe
        self.processor = processor
        self.first = first

    def __len__(self) -> int:
        """Number of batches left."""
        return self.recipe.steps - self.first

    def __getitem__(self, index: int) -> Batch:
        """Make batch `index`."""
        torch.set_num_threads(1)  # in the process that makes batches: leave the cores to the training
        step = self.first + index
        hand = handwriting("train")
        rng = np.random.default_rng([self.recipe.seed, step])
        if step < self.recipe.see_steps:
            pictures = []
            for _ in range(self.recipe.pictures):
                large = rng.random() < 0.8
                pictures.append(crowd(rng, hand, (2, 2) if large else None))
            return Batch(to_tiles(pictures), label_patches(pictures), None)
        return self._with_questions(rng, hand)

    def _with_questions(self, rng: np.random.Generator, hand: Handwriting) -> Batch:
        pictures: list[Picture] = []
        queries: list[list[Query]] = []
        for number in range(self.recipe.pictures):
            picture, query = compose(_MIX[number % len(_MIX)], rng, hand)
            pictures.append(picture)
            queries.append([query, *_more_queries(rng, picture, query, self.recipe.questions - 1)])
        tiles = to_tiles(pictures)
        text = pack(self.processor, queries, tiles.aspect_ratio_mask.sum((1, 2)).tolist())
        return Batch(tiles, label_patches(pictures), text)


class PatchHeads(nn.Module):
    """Throw-away linear heads on the projected features of each patch, and what their losses weigh."""

    weights: ClassVar = {"value": 1.0, "colour": 0.5, "centre": 0.3, "column": 0.1, "rank": 0.5}

    def __init__(self, width: int) -> None:
        """Heads on features of `width`."""
        super().__init__()
        sizes = {"value": 11, "colour": len(COLOURS) + 1, "centre": 2, "column": 2 * SIDE, "rank": 6}
        self.classes = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.balance = {name: torch.ones(size) for name, size in sizes.items()}
        self.balance["value"][-1] = self.balance["colour"][-1] = 0.05  # most patches show no digit
        self.balance["centre"][0] = 0.3

    def forward(self, features: torch.Tensor, labels: PatchLabels) -> dict[str, torch.Tensor]:
        """Losses of features [B, 4, 65, width], class token first, each already weighted."""
        patches = features[:, :, 1:]
        losses = {}
        for name, head in self.classes.items():
            logits, wanted = head(patches).float().flatten(0, 2), getattr(labels, name).flatten()
            losses[name] = self.weights[name] * functional.cross_entropy(logits, wanted, self.balance[name])
        return losses


def _more_queries(rng: np.random.Generator, picture: Picture, first: Query, count: int) -> list[Query]:
    """Up to `count` other questions that the picture answers, those about rare facts first."""
    asked = [ask(task, colour, picture.digits) for task in TASKS for colour in COLOURS]
    possible = [query for query in asked if query is not None and query != first]
    kinds = [query.answer if query.task == "count" else query.task for query in possible]
    chances = np.array([1 / kinds.count(kind) for kind in kinds])
    picks = rng.choice(len(possible), min(count, len(possible)), replace=False, p=chances / chances.sum())
    return [possible[int(pick)] for pick in picks]


def _see(model: MllamaForConditionalGeneration, tiles: Tiles) -> torch.Tensor:
    """Projected features of pictures, [B, 4, 65, width]."""
    seen = model.model.vision_model(
        pixel_values=tiles.pixel_values,
        aspect_ratio_ids=tiles.aspect_ratio_ids,
        aspect_ratio_mask=tiles.aspect_ratio_mask,
    ).last_hidden_state
    features: torch.Tensor = model.model.multi_modal_projector(seen)[:, 0]
    return features


@contextmanager
def _silenced(layer: nn.Module, speaks: torch.Tensor) -> Iterator[None]:
    """Multiply what a cross-attention layer adds at each text row by ``speaks`` [B, T]."""

    def silence(_: nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return output[0] * speaks[..., None].to(output[0].dtype), output[1]

    handle = layer.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def _answer_loss(model: MllamaForConditionalGeneration, features: torch.Tensor, text: Packed) -> torch.Tensor:
    """Mean loss of the answers' tokens, given projected features [B, 4, 65, width]."""
    logits = model(
        input_ids=text.input_ids,
        position_ids=text.position_ids,
        attention_mask=text.attention_mask,
        cross_attention_mask=text.cross_attention_mask,
        cross_attention_states=features.flatten(0, 1),
        use_cache=False,
    ).logits
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), text.labels[:, 1:].flatten())


def _speaks(text: Packed, share: float) -> torch.Tensor:
    """Draw, for all rows of a question together, whether the first layer speaks: 0 or 1, [B, T]."""
    question = (text.position_ids == 0).cumsum(1)
    drawn = (torch.rand(question.shape[0], int(question.max()) + 1) < share).float()
    return drawn.gather(1, question)


def _float32_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in float32, whose gradient is faster on a CPU than in bfloat16; it needs a mask."""
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        mixed = functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return mixed.transpose(1, 2), None


def _optimizers(
    model: MllamaForConditionalGeneration, heads: nn.Module, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for everything else."""
    inside = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ".layers." in name
    }
    outside = [p for p in [*model.parameters(), *heads.parameters()] if id(p) not in inside]
    return [
        torch.optim.Muon(
            list(inside.values()),
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(outside, lr=recipe.adamw_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)),
    ]


def _rate(recipe: Recipe) -> Callable[[int], float]:
    """Warm up and stay while learning to see; then, twice, warm up and fall as a cosine to nothing."""

    def fall(step: int, steps: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return min(1.0, (step + 1) / recipe.warm_up) * (0.5 + 0.5 * float(np.cos(np.pi * done)))

    def factor(step: int) -> float:
        answered = step - recipe.see_steps
        polished = answered - recipe.answer_steps
        if answered < 0:
            return min(1.0, (step + 1) / recipe.warm_up)
        if polished < 0:
            return fall(answered, recipe.answer_steps)
        return recipe.polish_rate * fall(polished, recipe.polish_steps)

    return factor


def _fade(recipe: Recipe, step: int) -> float:
    """Weight of the patch losses: 1 up to the middle of the second stage, 0 from 85 % of it."""
    answered = (step - recipe.see_steps) / max(recipe.answer_steps, 1)
    return min(1.0, max(0.0, (0.85 - answered) / 0.35))


class Training:
    """A training run, how far it got, and how to save it and take it up again."""

    def __init__(self, recipe: Recipe, threads: int) -> None:
        """Build everything from the recipe's seed."""
        from transformers import AttentionInterface

        torch.set_num_threads(threads)
        torch.manual_seed(recipe.seed)
        AttentionInterface.register(_FLOAT32, _float32_attention)
        self.recipe = recipe
        self.step = 0
        self.seconds = 0.0
        self.processor = build_processor()
        self.model = build_model(self.processor.tokenizer)
        self.model.set_attn_implementation(_FLOAT32)
        text: Any = self.model.model.language_model
        self.first_cross = text.layers[text.config.cross_attention_layers[0]].cross_attn
        self.heads = PatchHeads(self.model.model.hidden_size)
        self.optimizers = _optimizers(self.model, self.heads, recipe)
        factor = _rate(recipe)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in self.optimizers]

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step; returns the weighted losses of the patches and that of the answers."""
        started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            features = _see(self.model, batch.tiles)
            losses = self.heads(features, batch.labels)
            loss = _fade(self.recipe, self.step) * sum(losses.values())
            if batch.text is not None:
                polishing = self.step >= self.recipe.see_steps + self.recipe.answer_steps
                share = self.recipe.polish_look if polishing else self.recipe.first_look
                with _silenced(self.first_cross, _speaks(batch.text, share)):
                    losses["answers"] = _answer_loss(self.model, features, batch.text)
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
        """Write the model folder and, where `state` is given, all that is needed to go on."""
        build_processor().save_pretrained(output)  # a fresh one: calls leave traces in a tokenizer
        self.model.save_pretrained(output)
        if state is not None:
            parts = [part.state_dict() for part in self._parts()]
            torch.save({"step": self.step, "seconds": self.seconds, "parts": parts}, state)

    def resume(self, state: Path) -> None:
        """Take up the training that `save` wrote to `state`."""
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
        recipe: the numbers.
        output: folder to write; made if missing.
        threads: cores to use.
        save_every: steps between two saves.
        state: file that holds a training cut short, to go on from if it exists and to write at every save.

    Raises:
        ImportError: scikit-learn or tqdm is not installed.
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
    """Make batches in one process beside the training, a few ahead."""
    return iter(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))


def _held_out(training: Training, count: int, seed: int = 0) -> dict[str, float]:
    """Accuracy of each task on `count` held-out examples."""
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
    """Command line."""
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
    parser.add_argument("--state", type=Path, help="file to keep the whole state in, and to go on from")
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
