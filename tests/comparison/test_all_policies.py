"""What `kvprune compare --all` runs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from speech_helpers import tiny_checkpoint
from typer.testing import CliRunner

import kvprune
from kvprune.cli import app
from kvprune.comparison import DEFAULT_POLICIES, Settings, every_policy
from kvprune.comparison.execution.support import adapter_for
from kvprune.comparison.plan.grid import DEFAULT_KEEP_RATIOS, expand
from kvprune.session import registry


@dataclass(frozen=True, kw_only=True)
class Needy(kvprune.ScoringPolicy):
    """Needs to be told something."""

    flavour: str
    name: ClassVar[str] = "needy"

    def score(self, view: kvprune.LayerView) -> Any:
        raise NotImplementedError


def with_needy(distribution: str) -> registry.Registry:
    installed = registry.load()
    entry = dataclasses.replace(
        installed.policies["norm"], name="needy", cls=Needy, distribution=distribution
    )
    return dataclasses.replace(installed, policies={**installed.policies, "needy": entry})


def test_every_built_in_policy_is_there_once_or_left_out_by_name() -> None:
    found = every_policy()
    everywhere = {"full", "lossless"}  # one is always compared, the other by default
    there = [spec.partition(":")[0] for spec in found.specs]
    assert sorted([*there, *found.left_out, *everywhere]) == kvprune.list_policies()
    assert len(found.specs) == len(set(found.specs))
    assert {"trim", "norm:reach=onward", "random:reach=onward", "uniform:reach=onward"} <= set(found.specs)
    for spec in found.specs:
        assert ("reach=onward" in spec) == hasattr(kvprune.get_policy(spec), "reach")


def test_with_the_default_ones_they_make_one_configuration_each() -> None:
    specs = [one.spec for one in expand([*DEFAULT_POLICIES, *every_policy().specs], DEFAULT_KEEP_RATIOS)]
    assert len(specs) == len(set(specs)) == 2 + len(DEFAULT_KEEP_RATIOS) * len(every_policy().specs)


def test_policies_that_need_an_option_are_left_out_by_name() -> None:
    found = every_policy(with_needy("kvprune"))
    assert found.left_out["needy"] == "needs flavour; add it with --policy"
    assert found.specs == every_policy().specs


def test_what_is_left_out_is_named_with_what_to_write_instead() -> None:
    assert every_policy().left_out == {
        "answer-attention": "is a reference, not a method: it reads the full cache's answer",
        "quecc": "has no keep_ratio; add it with a budget of its own, such as --policy quecc:k=2 "
        "(its weights demo fit one model; docs/train.md)",
        "then": "has no keep_ratio; add it with a budget of its own, such as --policy "
        "'divprune:keep_ratio=0.5 then h2o:keep_ratio=0.5'",
    }


def test_what_is_left_out_can_be_added_as_it_says() -> None:
    for reason in every_policy().left_out.values():
        for spec in re.findall(r"--policy ('[^']+'|\S+)", reason):
            (_, one) = expand([spec.strip("'")], DEFAULT_KEEP_RATIOS)
            assert one.policy.name in ("quecc", "then")


def test_the_command_names_what_it_leaves_out(asked: dict[str, Any], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", "--all", "--output", str(tmp_path / "out")])
    for name, reason in every_policy().left_out.items():
        assert f"left out: {name} {reason}" in done.stderr


def test_policies_of_others_are_not_meant() -> None:
    found = every_policy(with_needy("somebody"))
    assert "needy" not in found.left_out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks the library to do, instead of doing it."""
    seen: dict[str, Any] = {}

    def compare(policies: Any, ratios: Any, settings: Any, *_: Any, **__: Any) -> Any:
        seen.update(policies=list(policies), reread=settings.reread)

    def show(*_: Any, ranked: bool) -> None:
        seen["ranked"] = ranked

    monkeypatch.setattr("kvprune.comparison.compare", compare)
    monkeypatch.setattr("kvprune.comparison.display.console.show_summary", show)
    return seen


@pytest.mark.parametrize(
    ("arguments", "reread", "ranked"),
    [
        ([], True, False),
        (["--no-reread"], False, False),
        (["--all"], True, True),
        (["--all", "--no-reread"], False, True),
    ],
)
def test_all_adds_every_policy_and_ranks_them(
    asked: dict[str, Any], tmp_path: Path, arguments: list[str], reread: bool, ranked: bool
) -> None:
    done = CliRunner().invoke(app, ["compare", *arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (asked["reread"], asked["ranked"]) == (reread, ranked)
    more = list(every_policy().specs) if ranked else []
    assert asked["policies"] == [*DEFAULT_POLICIES, *more]


def test_all_comes_beside_what_is_named(asked: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["compare", "--all", "--policy", "trim:k_ratio=0.1", "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert asked["policies"][-1] == "trim:k_ratio=0.1"
    assert asked["policies"][0] == "lossless"


def test_policies_that_the_models_family_refuses_are_left_out_and_named(tmp_path: Path) -> None:
    whisper = adapter_for(Settings(model=str(tiny_checkpoint(tmp_path / "whisper"))))
    assert whisper is not None
    assert whisper.family == "Whisper"
    found, every = every_policy(adapter=whisper), every_policy()
    why = "needs class_attention, which the Whisper adapter does not provide"
    gone = {name: reason for name, reason in found.left_out.items() if name not in every.left_out}
    assert gone == {"prumerge": why, "visionzip": why}
    assert found.left_out["quecc"] == "needs question, which the Whisper adapter does not provide"
    assert set(every.specs) - set(found.specs) == {"prumerge", "visionzip"}


def test_the_adapter_is_found_without_weights(tmp_path: Path) -> None:
    embedded = adapter_for(Settings())
    assert embedded is not None
    assert embedded.family.startswith("Llama")
    assert every_policy(adapter=embedded) == every_policy()
    assert adapter_for(Settings(data=tmp_path / "nowhere.jsonl")) is None
    (tmp_path / "pictures.jsonl").write_text('{"image": "a.png"}')
    assert adapter_for(Settings(data=tmp_path / "pictures.jsonl")) is embedded
    assert adapter_for(Settings(model=str(tmp_path / "nowhere"))) is None
    for content in (b"", b"[]", b"\xff", b'{"architectures": 3}', b'{"architectures": ["Other"]}'):
        (tmp_path / "config.json").write_bytes(content)
        assert adapter_for(Settings(model=str(tmp_path))) is None
