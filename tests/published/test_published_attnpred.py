"""`attnpred` reads in each step the blocks that the authors' code reads, with the same weights."""

import pytest
import torch
from kvprune_strategies import attention_blocks as blocks
from kvprune_strategies.attention_predictors import SHAPES
from kvprune_strategies.attnpred import AttnPred
from published import draw, load

import kvprune
from kvprune import StepView
from kvprune.policy.weights import save_weights


@pytest.mark.parametrize("case", load("attnpred"), ids=str)
def test_the_same_blocks_as_the_published_code(case, tmp_path):
    problem = case.problem
    seed, heads, edge = 100 * problem["seed"], problem["heads"], problem["edge"]
    spec = case.spec.removesuffix(",weights=fresh")  # the network is drawn here
    options = {
        name: int(value)
        for name, value in (option.split("=") for option in spec.partition(":")[2].split(","))
    }
    weights = {name: 0.3 * draw(seed + place, *shape) for place, (name, shape) in enumerate(SHAPES.items())}
    file = save_weights(
        tmp_path / "random.safetensors", AttnPred(weights="fresh", **options), weights, {}, {}
    )
    policy = kvprune.get_policy(f"{spec},weights={file.path}")
    entries = problem["blocks"] * policy.block
    columns, inside = entries + 2 * edge, slice(edge, edge + entries)  # the original always reads the edges
    prompt = (2 * draw(seed + 50, 1, heads, problem["rows"], columns)).softmax(-1)
    logits = 2 * draw(seed + 51, problem["steps"], 1, heads, 1, columns)
    state = {"history": blocks.pooled(prompt[..., inside], {}, policy.block)}
    for taken, (row, kept) in enumerate(zip(logits[:, :, :, 0], case.kept, strict=True)):
        expected = policy._expected(view(heads, entries, taken), state)  # also of steps that read all
        found = blocks.spread(expected, state, policy.block, entries)[0]  # [heads, K]
        count = policy.keep_tokens // policy.block
        chosen = [set(head.topk(count).indices.tolist()) for head in expected[0]]
        assert chosen == [set(head) for head in kept]
        read = policy.attend(view(heads, entries, taken), state)
        corrects = (taken + 1) % policy.interval == 0
        assert (read is None) == corrects
        mask = torch.ones_like(row, dtype=torch.bool)
        if read is not None:
            assert torch.equal(read.mask[0], found >= found.topk(policy.keep_tokens).values[:, -1:])
            mask[..., inside] = read.mask
        attention = row.masked_fill(~mask, -torch.inf).softmax(-1)
        state = policy.observe(view(heads, entries, taken), attention[..., inside], state)[0]


def view(heads, entries, taken):
    return StepView(
        queries_of=lambda: torch.zeros(1, heads, 1),
        text_rows=1,
        keys=torch.zeros(1, heads, entries, 1),
        values=torch.zeros(1, heads, entries, 1),
        slots_of=lambda: torch.arange(entries)[None, None],
        readable_of=lambda: torch.ones(1, 1, entries, dtype=torch.bool),
        number_of=lambda: torch.tensor(taken),
        taken=taken,
        layer_idx=0,
        rank=0,
        num_layers=1,
        scaling=1.0,
        unrestricted=True,
    )
