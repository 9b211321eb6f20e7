"""Rows of a comparison in which a contrast answers."""

from __future__ import annotations

import pytest
from command_line import kvprune_command
from speech_helpers import load, speech_file, tiny_checkpoint

from kvprune.comparison import Settings, compare, read_run, verify
from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.execution.batches import ask
from kvprune.comparison.plan.grid import exactly, expand
from kvprune.comparison.storage.identity import policy_identities
from kvprune.errors import ContrastError

SPEC = "snapkv:contrast=mint(expert=full)"


def test_a_spec_with_a_rule_is_crossed_with_ratios_and_read_again():
    _, first, second = expand([SPEC], [0.2, 0.4])
    assert first.contrast.expert == "full"
    assert first.spec.startswith("snapkv:contrast=mint(expert=full),keep_ratio=0.2")
    assert first.label == second.label
    assert exactly([first.spec])[0] == first
    assert expand(["snapkv:contrast=mint(alpha=1.0)"], [0.2])[1].spec.startswith("snapkv:contrast=mint,")


def test_the_rule_is_a_part_of_what_identifies_a_row():
    plain, mint, mod = policy_identities(
        expand(["snapkv", "snapkv:contrast=mint", "snapkv:contrast=mod"], [0.2])[1:]
    )
    assert len({str(one) for one in (plain, mint, mod)}) == 3
    assert plain["source_sha256"] != mint["source_sha256"]


@pytest.mark.parametrize("spec", ["answer-attention:contrast=mint", "snapkv:contrast=mimt"])
def test_what_is_no_second_branch_is_refused(spec):
    with pytest.raises(ContrastError):
        expand([spec], [0.2])


def test_a_contrast_answers_and_its_bytes_are_those_of_both_branches(tmp_path):
    generator = load(tiny_checkpoint(tmp_path / "model"), reread=True)
    examples = read_examples(speech_file(tmp_path))
    inputs = generator.encode(examples)
    whole, alone, both = expand(["snapkv", "snapkv:contrast=mod"], [0.2])
    full = {one.id: one for one in ask(generator, examples, inputs, whole, 0, {})}
    pruned = ask(generator, examples, inputs, alone, 0, full)
    for one, other in zip(pruned, ask(generator, examples, inputs, both, 0, full), strict=True):
        assert other.spec == both.spec
        assert other.kept_fraction == one.kept_fraction
        assert other.bytes_held == one.bytes_held + one.bytes_full


def test_a_folder_with_a_contrast_grows_by_another_rule_and_is_verified_and_exported(tmp_path):
    data, model = speech_file(tmp_path), tiny_checkpoint(tmp_path / "model")
    folder = tmp_path / "results"
    settings = Settings(
        model=str(model),
        data=data,
        output=folder,
        batch_size=2,
        repetitions=0,
        device="cpu",
        answer_attention=False,
    )
    compare(["snapkv", "snapkv:contrast=mint"], [0.3], settings)
    before = (folder / "results.jsonl").read_text()
    compare(["snapkv", "snapkv:contrast=mint", "snapkv:contrast=mod"], [0.3], settings)
    assert (folder / "results.jsonl").read_text().startswith(before)
    found = verify(folder, sample=None)
    assert found.reproduces
    assert found.answers == len(read_run(folder).answers) == 4 * 3
    for form in ("markdown", "latex", "csv"):
        text = kvprune_command("results", "export", str(folder), "--format", form)
        assert "contrast=mint" in text
        assert "contrast=mod" in text
        assert form == "csv" or "two branches" in text
