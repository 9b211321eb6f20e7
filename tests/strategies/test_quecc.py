"""`quecc` against the same compressor in plain loops, and what holds whatever its weights are."""

import dataclasses
import math

import pytest
import torch
from generation import generate, mllama
from helpers import make_features, make_visibility
from kvprune_strategies import MeanPool, QueCC
from kvprune_strategies.cells import cells_of

import kvprune
from kvprune import Layout, Replacement
from kvprune.errors import PolicyOptionError, UnsupportedModelError, WeightsError
from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.weights import save_weights
from kvprune.testing import check_policy, mllama_inputs

C, W = 8, 6
SEEN = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching(QueCC):
    """Note the question."""

    name = "watching"

    def choose(self, view):
        SEEN.append(view.question)
        return super().choose(view)


def drawn(policy, seed=0, scale=1.0):
    """Weights that are far from those that training starts from."""
    random = torch.Generator().manual_seed(seed)
    initial = policy.initial({"feature_width": C, "question_width": W})
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=random) for name, tensor in initial.items()
    }


def tiled_view(tiles=2, side=4, batch=2, seed=0, exists=None, **fields):
    """Features of pictures of square tiles with a class token each, all seen."""
    see = make_visibility([[[1] * tiles]] * batch, side * side + 1)
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, see.columns, C, generator=random)
    question = torch.randn(batch, W, generator=random)
    widths = torch.full((batch, 1), tiles)
    layout = Layout.tiles(side, widths, tiles, class_token=True)
    given = {"captured_features": features, "captured_question": question, "layout_of": lambda: layout}
    return make_features(see, **(given | fields))


def chosen(policy, view, weights=None):
    held = None if weights is None else HeldWeights({"quecc": weights})
    view = view if held is None else dataclasses.replace(view, held=held)
    decision = policy.choose(view)
    assert decision.cache is None
    assert isinstance(decision.onward, Replacement)
    return decision.onward


def slow(weights, features, members, pool, question, k):
    """One new token, ``[C]``, in loops: ``members`` maps the place in the square to the column."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    features = features.double()
    mean = sum(features[column] for column in members.values()) / len(members)
    if not pool:
        return mean

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return torch.stack([(row * x).sum() for row in w[f"{name}.weight"]]) + w[f"{name}.bias"]

    def mlp(x, name):
        inner = linear(x, f"{name}.1")
        inner = torch.stack([v * (1 + math.erf(float(v) / math.sqrt(2))) / 2 for v in inner])
        return norm(linear(inner, f"{name}.2"), f"{name}.norm")

    patches = {place: norm(features[column], "input") for place, column in members.items()}
    asked = 0 if question is None else norm(linear(question.double(), "question"), "question.norm")
    query = w["conv.bias"].clone()
    for place, patch in patches.items():
        query = query + mlp(patch + asked, "query") * w["conv.weight"][:, place]
    query = linear(query, "query.in")
    keys = [linear(mlp(patch, "key"), "key.in") for patch in patches.values()]
    values = [linear(mlp(patch, "value"), "value.in") for patch in patches.values()]
    heads, width = 8, len(query) // 8
    read = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [math.exp(float((query[part] * key[part]).sum()) / math.sqrt(width)) for key in keys]
        for logit, value in zip(logits, values, strict=True):
            read[part] += logit / sum(logits) * value[part]
    return mean + w["gamma"] * linear(read, "out")


@pytest.mark.parametrize(("k", "query"), [(1, "prompt"), (2, "prompt"), (3, "prompt"), (2, "none")])
def test_it_is_the_compressor_in_plain_loops(k, query):
    policy, view, side = QueCC(weights="fresh", k=k, query=query), tiled_view(), 4
    weights = drawn(policy)
    new = chosen(policy, view, weights)
    for sample in range(2):
        wanted, places = [], []
        for tile in range(2):
            start = tile * (side * side + 1)
            wanted.append(slow(weights, view.features[sample], {0: start}, False, None, k))
            places.append(start)
            for top in range(0, side, k):
                for left in range(0, side, k):
                    members = {
                        row * k + column: start + 1 + (top + row) * side + left + column
                        for row in range(k)
                        for column in range(k)
                        if top + row < side and left + column < side
                    }
                    question = view.question[sample] if query == "prompt" else None
                    wanted.append(slow(weights, view.features[sample], members, True, question, k))
                    places.append(min(members.values()))
        order = sorted(range(len(places)), key=places.__getitem__)
        assert new.places.indices[sample, 0].tolist() == sorted(places)
        torch.testing.assert_close(
            new.features[sample], torch.stack([wanted[i] for i in order]).float(), rtol=1e-4, atol=1e-4
        )


def test_untrained_it_is_mean_pooling_and_class_tokens_stay():
    view = tiled_view(batch=1)
    new = chosen(QueCC(weights="fresh", k=2), view)
    assert new.features.shape == (1, 2 * (4 + 1), C)
    grid = view.features[0, 1:17].view(4, 4, C).permute(2, 0, 1)[None]
    pooled = torch.nn.functional.avg_pool2d(grid, 2)[0].flatten(1).T  # [4, C]
    torch.testing.assert_close(new.features[0, 1:5], pooled)
    assert torch.equal(new.features[0, 0], view.features[0, 0])
    assert torch.equal(new.features[0, 5], view.features[0, 17])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_untrained_it_does_what_meanpool_does(k):
    model, inputs, found = mllama(), mllama_inputs(["tt4ttt", "1tt"]), []
    for policy in (QueCC(weights="fresh", k=k), MeanPool(k=k)):
        with kvprune.compress(model, policy) as run:
            tokens, *_ = generate(model, inputs, steps=3)
        found.append((tokens, {name: one.indices for name, one in run.selections.items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], one) for name, one in found[1][1].items())


def test_it_may_come_first_in_a_pair():
    model, inputs = mllama(), mllama_inputs(["tt4ttt", "1tt"])
    pair = kvprune.get_policy("quecc:weights=fresh,k=2 then h2o:keep_ratio=0.5")
    with kvprune.compress(model, pair) as run:
        generate(model, inputs, steps=2)
    with kvprune.compress(model, "quecc:weights=fresh,k=2") as first:
        generate(model, inputs, steps=2)
    assert run.report.kept_fraction < first.report.kept_fraction


def test_a_patch_changes_only_its_own_cell():
    policy, view = QueCC(weights="fresh", k=2), tiled_view(batch=1)
    weights = drawn(policy)
    before = chosen(policy, view, weights)
    touched = view.features.clone()
    touched[0, 3] += 1  # the third patch of the first row: the second cell
    after = chosen(policy, view.capturing(features=touched), weights)
    changed = (before.features != after.features).any(-1)[0].nonzero()[:, 0].tolist()
    assert changed == [before.places.indices[0, 0].tolist().index(3)]


def test_permuted_tiles_give_permuted_tokens():
    policy, view = QueCC(weights="fresh", k=2), tiled_view(batch=1)
    weights = drawn(policy)
    turned = view.features.view(1, 2, 17, C).flip(1).flatten(1, 2)
    before = chosen(policy, view, weights).features.view(1, 2, 5, C)
    after = chosen(policy, view.capturing(features=turned), weights).features.view(1, 2, 5, C)
    torch.testing.assert_close(after, before.flip(1))


def test_the_question_matters_and_belongs_to_its_sample():
    policy, view = QueCC(weights="fresh", k=2), tiled_view()
    weights = drawn(policy)
    before = chosen(policy, view, weights).features
    question = view.question.clone()
    question[0] += torch.randn(W, generator=torch.Generator().manual_seed(1))
    after = chosen(policy, view.capturing(question=question), weights).features
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_padding_tiles_and_unseen_columns_are_left_out():
    see = make_visibility([[[1, 0]], [[1, 1]]], 17)
    layout = Layout.tiles(4, torch.tensor([[1], [2]]), 2, class_token=True)
    view = make_features(
        see,
        captured_features=torch.randn(2, 34, C, generator=torch.Generator().manual_seed(0)),
        captured_question=torch.zeros(2, W),
        layout_of=lambda: layout,
    )
    new = chosen(QueCC(weights="fresh", k=2), view)
    assert new.places.counts.tolist() == [[5], [10]]
    assert new.places.indices[0, 0, :5].tolist() == [0, 1, 3, 9, 11]


def test_on_a_line_cells_are_frames():
    see = make_visibility([[[1]]], 10)
    view = make_features(
        see,
        captured_features=torch.randn(1, 10, C, generator=torch.Generator().manual_seed(0)),
        layout_of=lambda: Layout.line(10),
    )
    policy = QueCC(weights="fresh", k=4, query="none")
    cells = cells_of(view, 4)
    assert cells.members[0].tolist()[0] == [0, 1, 2, 3]
    assert cells.there[0, 2].tolist() == [True, True, False, False]
    new = chosen(policy, view)
    assert new.places.indices[0, 0].tolist() == [0, 4, 8]
    torch.testing.assert_close(new.features[0, 0], view.features[0, :4].mean(0))


def test_gradients_reach_the_weights_alone():
    policy, view = QueCC(weights="fresh", k=2), tiled_view()
    weights = {name: tensor.requires_grad_() for name, tensor in drawn(policy).items()}
    chosen(policy, view, weights).features.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in weights.values())
    assert not view.features.requires_grad


def test_the_model_reads_the_question_without_the_picture():
    model, inputs = mllama(), mllama_inputs(["tt4ttt", "1tt"])
    SEEN.clear()
    with kvprune.compress(model, Watching(weights="fresh")) as run:
        generate(model, inputs, steps=2)
    assert len(SEEN) == 1
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    alone = model.model.language_model(**text, use_cache=False).last_hidden_state[:, -1]
    torch.testing.assert_close(SEEN[0], alone)
    assert run.report.layers[0].seconds > 0


def test_refusals(tmp_path):
    with pytest.raises(PolicyOptionError, match="at least 1"):
        QueCC(k=0, weights="fresh")
    with pytest.raises(WeightsError, match="there is no file"):
        QueCC(weights=str(tmp_path / "none.safetensors"))
    fresh = QueCC(weights="fresh", k=2)
    geometry = {"feature_width": C, "question_width": W}
    path = tmp_path / "w.safetensors"
    save_weights(path, fresh, fresh.initial(geometry), geometry, {})
    with pytest.raises(WeightsError, match="trained with k=2, but the policy 'quecc' has k=3"):
        QueCC(weights=str(path), k=3)
    with pytest.raises(WeightsError, match="trained for a model of feature_width 8"):
        kvprune.compress(mllama(), QueCC(weights=str(path)))


def test_a_narrow_compressor_is_as_wide_as_its_weights_say(tmp_path):
    geometry, path = {"feature_width": C, "question_width": W}, tmp_path / "w.safetensors"
    narrow = QueCC(weights="fresh", width=2)
    assert narrow.initial(geometry)["out.weight"].shape == (C, 2)
    view, weights = tiled_view(), drawn(narrow)
    save_weights(path, narrow, weights, geometry, {})
    policy = QueCC(weights=str(path))
    assert policy.width == 2
    assert policy == QueCC(weights=str(path), width=2) == kvprune.get_policy(str(policy.spec))
    new = chosen(policy, view, weights).features
    assert new.shape == chosen(QueCC(weights="fresh"), view).features.shape
    with pytest.raises(WeightsError, match="trained with width=2, but the policy 'quecc' has width=4"):
        QueCC(weights=str(path), width=4)
    with pytest.raises(PolicyOptionError, match="width of policy 'quecc' counts channels, at least 1"):
        QueCC(weights="fresh", width=0)
    wide = QueCC(weights="fresh")  # as weights were made before there was a width
    save_weights(path, wide, wide.initial(geometry), geometry, {})
    assert QueCC(weights=str(path)).width is None


@pytest.mark.parametrize(
    "spec",
    ["quecc", "quecc:k=4", "quecc:k=8", "quecc:k=4,query=none", "quecc:weights=whisper-base,k=10,query=none"],
)
def test_weights_that_come_with_it_fit_its_docstring(spec):
    policy = kvprune.get_policy(spec)
    assert policy.digest
    assert policy.weights in QueCC.__doc__
    assert policy.weights_file.geometry["feature_width"] == {"demo": 96, "whisper-base": 512}[policy.weights]
    assert policy.width == (96 if policy.weights == "whisper-base" else None)
    folder = policy.weights_path.parent
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 2_000_000


def test_families_without_a_text_only_pass_are_refused():
    from kvprune.testing.problems import ModelProblem

    problem = ModelProblem(model="bart", layouts=("ttttt",), dtype="float32")
    with pytest.raises(UnsupportedModelError, match=r"needs 'question'.*query=none"):
        kvprune.compress(problem.make_model(), QueCC(weights="fresh"))
    pair = "quecc:weights=fresh then h2o:keep_ratio=0.5"
    with pytest.raises(UnsupportedModelError, match=f"policy 'quecc' in '{pair}' needs 'question', which"):
        kvprune.compress(problem.make_model(), pair)
    with kvprune.compress(problem.make_model(), QueCC(weights="fresh", query="none")) as run:
        pass
    assert run.policy.query == "none"


@pytest.mark.parametrize("spec", ["quecc:k=2", "quecc:k=4 then h2o:keep_ratio=0.5"])
def test_a_check_of_weights_that_fit_one_model_says_what_to_check(spec):
    with pytest.raises(PolicyOptionError, match=r"fit one geometry; check it with weights=fresh"):
        check_policy(spec)
