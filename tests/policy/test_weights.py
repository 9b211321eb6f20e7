"""Weights of policies: names, digests, what fits, and what is refused."""

import dataclasses
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from helpers import make_features, make_view, make_visibility
from safetensors.torch import save_file

import kvprune
from kvprune import FeatureView, LayerView, PolicySpec
from kvprune.errors import PolicyFailedError, WeightsError
from kvprune.policy import ScoringPolicy, TrainedPolicy
from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.weights import read_weights, save_weights
from kvprune.testing import check_policy

SEE = make_visibility([[[1, 1]]], 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(TrainedPolicy, ScoringPolicy):
    """Score each token by a learned direction of its values.

    Args:
        sign: Factor on the scores.
    """

    sign: int = 1

    name = "learned"
    trained_for = ("head_width",)
    trained_options = ("sign",)

    def initial(self, geometry):
        return {"direction": torch.linspace(-1, 1, geometry["head_width"])}

    def score(self, view: LayerView):
        return self.sign * (view.values.float() @ view.weights(self)["direction"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(ScoringPolicy):
    """Score as another policy does."""

    scorer: ScoringPolicy = dataclasses.field(default_factory=lambda: Learned(weights="fresh"))
    name = "outer"

    def score(self, view):
        return self.scorer.score(view)


def write(path: Path, policy=None, tensors=None, width=4):
    policy = policy or Learned(weights="fresh")
    tensors = tensors or {"direction": torch.arange(float(width))}
    return save_weights(path, policy, tensors, {"head_width": width}, {"steps": 3})


def test_a_policy_names_its_weights_by_their_digest(tmp_path):
    file = write(tmp_path / "one.safetensors")
    policy = Learned(weights=str(file.path))
    assert policy.digest == file.digest == read_weights(file.path).digest
    assert len(file.digest) == 12
    assert file.training == {"steps": 3}
    assert file.geometry == {"head_width": 4}
    assert f"digest={file.digest}" in str(policy.spec)
    again = Learned.from_options(PolicySpec.parse(str(policy.spec)).options)
    assert again == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    view = make_view(SEE)
    scores = policy.score(view)
    torch.testing.assert_close(scores, view.values.float() @ torch.arange(4.0))


def test_weights_reach_a_run_also_of_a_policy_in_a_policy(tmp_path):
    from kvprune.testing.problems import ModelProblem

    problem = ModelProblem(dtype="float32")
    model, inputs = problem.make_model(), problem.make_inputs()
    width = model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
    file = write(tmp_path / "w.safetensors", width=width)
    kept = []
    for policy in (Learned(weights=str(file.path)), Outer(scorer=Learned(weights=str(file.path)))):
        with kvprune.compress(model, policy) as run:
            model(**inputs, use_cache=True)
        assert file.digest in str(run.report)
        kept.append([selection.indices for selection in run.selections.values()])
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)
    other = write(tmp_path / "v.safetensors", width=width + 1)
    with pytest.raises(WeightsError, match=rf"of head_width {width + 1} .*, but this model has {width}"):
        kvprune.compress(model, Learned(weights=str(other.path)))
    with pytest.raises(WeightsError, match=rf"of head_width {width + 1} .*, but this model has 4"):
        make_view(SEE).weights(Learned(weights=str(other.path)))


def test_short_names_are_files_beside_the_module():
    with pytest.raises(WeightsError, match=r"comes with no weights 'demo': .*learned-demo.safetensors"):
        Learned()
    assert Learned(weights="fresh").digest == ""


def test_the_digest_must_match(tmp_path):
    file = write(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=rf"digest {file.digest}, but the spec asks for '0123456789ab'"):
        Learned(weights=str(file.path), digest="0123456789ab")
    with pytest.raises(WeightsError, match="reads no file"):
        Learned(weights="fresh", digest="0123456789ab")
    policy = Learned(weights=str(file.path))
    write(file.path, tensors={"direction": torch.ones(4)})
    with pytest.raises(WeightsError, match=rf"have changed: .*, but the policy was made with {file.digest}"):
        policy.score(make_view(SEE))
    with pytest.raises(WeightsError, match=rf"asks for '{file.digest}'"):
        Learned.from_options(policy.spec.options)


def test_weights_that_nobody_shipped_are_refused_with_those_that_were():
    with pytest.raises(
        WeightsError, match=r"no file 'quecc-demo-k3.*quecc-demo-k2\.safetensors \(k=2, query="
    ):
        kvprune.get_policy("quecc:k=3")


def test_a_run_that_has_read_them_does_not_notice_a_change(tmp_path):
    file = write(tmp_path / "w.safetensors")
    policy, held = Learned(weights=str(file.path)), HeldWeights()
    first = policy.score(make_view(SEE, held=held))
    write(file.path, tensors={"direction": torch.ones(4)})
    assert torch.equal(policy.score(make_view(SEE, held=held)), first)


def test_files_that_are_refused(tmp_path):
    right = "; train some .*, or take fresh, which is untrained, or weights that come with it: none$"
    with pytest.raises(
        WeightsError, match=rf"no file of weights '{tmp_path}/w.*' for policy 'learned'{right}"
    ):
        Learned(weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(
        WeightsError, match=rf"'w.safetensors' for policy 'learned' in '{os.getcwd()}'{right}"
    ):
        Learned(weights="w.safetensors")
    for other in (str(tmp_path / "v.pt"), "v.pt", "v.SAFETENSORS", "some/demo"):
        with pytest.raises(
            WeightsError, match=rf"'{other}' of .* reads the safetensors format only.*{right}"
        ):
            Learned(weights=other)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(WeightsError, match=r"not in the safetensors format \(.*\); copy or train it again"):
        Learned(weights=str(bad))
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(WeightsError, match="cannot be read"):
        Learned(weights=str(folder))
    bare = tmp_path / "bare.safetensors"
    save_file({"direction": torch.ones(4)}, bare)
    with pytest.raises(WeightsError, match="does not say in its header for which geometry"):
        Learned(weights=str(bare))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Learned):
        name = "other"

    foreign = write(tmp_path / "other.safetensors", Other(weights="fresh"))
    with pytest.raises(WeightsError, match="those of policy 'other', not of 'learned'"):
        Learned(weights=str(foreign.path))
    file = write(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"trained with sign=1, but the policy 'learned' has sign=2"):
        Learned(weights=str(file.path), sign=2)
    with pytest.raises(WeightsError, match="ends in"):
        write(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction": torch.ones(5)}, r"of shape \[5\], expected \[4\]"),
        ({"other": torch.ones(4)}, "lack the tensor 'direction'"),
        ({"direction": torch.ones(4), "more": torch.ones(1)}, "have the tensor 'more'"),
        ({"direction": torch.full((4,), torch.nan)}, "NaN"),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, message):
    policy = Learned(weights=str(write(tmp_path / "w.safetensors", tensors=tensors).path))
    with pytest.raises(WeightsError, match=message):
        policy.score(make_view(SEE))


def test_the_moment_must_know_the_geometry():
    view = make_features(SEE)
    assert isinstance(view, FeatureView)
    with pytest.raises(WeightsError, match="unknown at this moment"):
        view.weights(Learned(weights="fresh"))


def test_half_precision_files_are_held_in_float32(tmp_path):
    file = write(tmp_path / "w.safetensors", tensors={"direction": torch.ones(4, dtype=torch.bfloat16)})
    held = make_view(SEE).weights(Learned(weights=str(file.path)))
    assert held["direction"].dtype == torch.float32
    with pytest.raises(TypeError):
        held["direction"] = torch.ones(4)


def test_two_threads_get_the_same_tensors(tmp_path):
    policy, held = Learned(weights=str(write(tmp_path / "w.safetensors").path)), HeldWeights()
    view, found = make_view(SEE, held=held), []
    threads = [threading.Thread(target=lambda: found.append(view.weights(policy))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one["direction"]) for one in found}) == 1


def test_writing_to_the_weights_is_found():
    from kvprune.engine.read_only import unchanged

    policy, held = Learned(weights="fresh"), HeldWeights()
    view = make_view(SEE, held=held)
    view.weights(policy)
    with (
        pytest.raises(PolicyFailedError, match=r"changed view.weights in place"),
        unchanged("p", "here", [view]),
    ):
        view.weights(policy)["direction"].add_(1)


def test_conformance_takes_weights_that_fit_any_model():
    assert check_policy(Learned, only=["class", "KV01"], examples=1).passed


PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
EXAMPLE = re.search(r"<!-- test: weights -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_example_of_the_page_runs(tmp_path):
    space = {"__name__": "example"}
    exec(compile(EXAMPLE, "write-a-policy.md", "exec", dont_inherit=True), space)
    fresh = space["Learned"](weights="fresh")
    path, view = tmp_path / "w.safetensors", make_view(SEE)
    save_weights(path, fresh, {"direction": torch.ones(4)}, view.geometry, {})
    policy = space["Learned"](weights=str(path), keep_tokens=2)
    kept = policy.select(view).cache
    assert kept.counts.tolist() == [[2, 2]]
    scores = view.values.float().sum(-1)[0]
    assert kept.indices[0].tolist() == scores.topk(2).indices.sort().values.tolist()


def test_a_results_folder_does_not_go_on_with_other_weights(tmp_path):
    from kvprune_strategies import QueCC

    from kvprune.comparison.plan.grid import exactly, expand, unite

    fresh = QueCC(weights="fresh", k=4)
    geometry = {"feature_width": 8, "question_width": 8}
    path, tensors = tmp_path / "w.safetensors", dict(fresh.initial(geometry))
    save_weights(path, fresh, tensors, geometry, {})
    before = expand([f"quecc:weights={path},k=4"], [])
    save_weights(path, fresh, tensors | {"gamma": torch.ones(1)}, geometry, {})
    after = expand([f"quecc:weights={path},k=4"], [])
    assert before[1].spec != after[1].spec
    _, gone = unite([before[1].spec], after, with_answer_attention=False)
    assert "the spec asks for" in gone[before[1].spec]
    with pytest.raises(WeightsError, match="the file is another one, or has changed since"):
        exactly([before[1].spec])
