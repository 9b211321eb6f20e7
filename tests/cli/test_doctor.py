"""The doctor finds what is wrong and says what to do; it never falls ill itself."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
from typer.testing import CliRunner

from kvprune.adapters.probes import Probe
from kvprune.cli import app, doctor
from kvprune.session import registry


def failures() -> list[doctor.Check]:
    return [check for check in doctor.examine() if check.ok is False]


def test_all_is_well_here() -> None:
    checks = doctor.examine()
    assert [check for check in checks if check.ok is False] == []
    names = {check.name for check in checks}
    assert {"python", "kvprune", "torch", "transformers", "einops", "pluggy", "model"} <= names
    assert any(check.section.startswith("adapter") for check in checks)


def test_exit_code_is_0_when_all_is_well() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.output.endswith("All is well.\n")


def test_failing_probe_is_explained_and_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = registry.load().adapters[0].cls
    broken = [Probe("cache layer", False, "transformers has no DynamicLayer")]
    monkeypatch.setattr(adapter, "probe", classmethod(lambda cls: broken))
    (found,) = failures()
    assert (found.name, found.detail) == ("cache layer", "transformers has no DynamicLayer")
    assert "install a transformers version that kvprune supports" in found.remedy
    assert adapter.model_classes[0] in found.remedy
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL  cache layer: transformers has no DynamicLayer" in result.output
    assert "to do: install a transformers version" in result.output
    assert "1 of " in result.output


def test_versions_out_of_range_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.requires("kvprune") or []
    extra = ["torch>=99", "no-such-package>=2", 'no-such-extra; extra == "demo"']
    monkeypatch.setattr(metadata, "requires", lambda _: [*real, *extra])
    found = {check.name: check for check in failures()}
    assert set(found) == {"torch", "no-such-package"}
    assert "is outside >=99" in found["torch"].detail
    assert found["no-such-package"].detail == "not installed; kvprune needs >=2"
    assert found["no-such-package"].remedy == 'run `pip install "no-such-package>=2"`'


def test_uninstalled_kvprune_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise metadata.PackageNotFoundError("kvprune")

    monkeypatch.setattr(metadata, "requires", missing)
    (found,) = failures()
    assert found.name == "kvprune"
    assert found.remedy == "run `pip install -e .` in the repository"


def test_no_policies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRUNE_PLUGINS", "")
    found = {check.name: check for check in failures()}
    assert "no installed plugin provides any" in found["policies"].detail
    assert "KVPRUNE_PLUGINS" in found["policies"].remedy


def test_whatever_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRUNE_PLUGINS", "no-such-plugin")
    found = failures()
    assert found
    assert all("no-such-plugin" in check.detail for check in found)


def test_demo_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no file model.safetensors")

    monkeypatch.setattr("kvprune.demo.load", broken)
    (found,) = failures()
    assert (found.section, found.detail) == ("demo", "OSError: no file model.safetensors")
    assert 'pip install "kvprune[demo]"' in found.remedy
