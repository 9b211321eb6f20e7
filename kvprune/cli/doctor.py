"""Is this installation sound? Versions, plugins, what adapters rely on, and the demo model."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement

from kvprune.errors import KVPruneError
from kvprune.session import registry
from kvprune.session.plugins import AdapterEntry, global_hooks
from kvprune.text import error_line, printable, shown

__all__ = ["Check", "examine"]

_OPTIONAL = ("typer", "rich", "matplotlib", "scipy", "sklearn", "PIL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        section: what it belongs to, such as "versions".
        name: what was looked at.
        ok: whether it is as it should be; None where it is only worth knowing.
        detail: what was found.
        remedy: what to do, where `ok` is False.
    """

    section: str
    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def examine() -> tuple[Check, ...]:
    """Look at everything; never raises because of what it finds, and what it returns is printable."""
    checks: list[Check] = []
    for section, look in _SECTIONS:
        try:
            checks += look()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever is broken here is the finding
            checks.append(_failure(section, error))
    return tuple(
        Check(
            section=printable(check.section, 80),
            name=printable(check.name, 200),
            ok=check.ok,
            detail=printable(check.detail, 1000),
            remedy=printable(check.remedy, 400),
        )
        for check in checks
    )


def _failure(section: str, error: BaseException, subject: str = "") -> Check:
    return Check(
        section=section,
        name=f"{subject} could not be examined".strip(),
        ok=False,
        detail=error_line(error),
        remedy="repair what the error names, then run `kvprune doctor` again",
    )


def _versions() -> Iterator[Check]:
    yield Check(section="versions", name="python", ok=None, detail=platform.python_version())
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("kvprune") or []]
        own = importlib.metadata.version("kvprune")
        yield Check(section="versions", name="kvprune", ok=True, detail=own)
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            section="versions",
            name="kvprune",
            ok=False,
            detail="imported from a folder, but not installed, so its policies cannot be found",
            remedy="run `pip install -e .` in the repository",
        )
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield _version(requirement)


def _version(requirement: Requirement) -> Check:
    range_ = str(requirement.specifier) or "any version"
    remedy = f'run `pip install "{requirement.name}{requirement.specifier}"`'
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        detail = f"not installed; kvprune needs {range_}"
        return Check(section="versions", name=requirement.name, ok=False, detail=detail, remedy=remedy)
    ok = requirement.specifier.contains(found, prereleases=True)
    detail = found if ok else f"{found} is outside {range_}"
    return Check(section="versions", name=requirement.name, ok=ok, detail=detail, remedy="" if ok else remedy)


def _optional() -> Iterator[Check]:
    missing = []
    for module in _OPTIONAL:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(module)
    detail = (
        "all there" if not missing else f'not installed: {", ".join(missing)} (pip install "kvprune[demo]")'
    )
    yield Check(section="versions", name="for the demo and compare", ok=None, detail=detail)


def _plugins() -> Iterator[Check]:
    found = registry.load()
    names: dict[tuple[str, str], list[str]] = {}
    for policy in found.policies.values():
        names.setdefault((policy.plugin, policy.distribution), []).append(policy.name)
    for adapter in found.adapters:
        names.setdefault((adapter.plugin, adapter.distribution), []).append(f"adapter {adapter.cls.family}")
    for (plugin, distribution), provided in names.items():
        yield Check(
            section="plugins", name=f"{plugin} ({distribution})", ok=True, detail=", ".join(sorted(provided))
        )
    for broken in found.broken:
        yield Check(
            section="plugins",
            name=f"{broken.name} ({broken.distribution})",
            ok=False,
            detail=broken.problem,
            remedy=f"repair, update or uninstall {broken.distribution}",
        )
    if not found.policies:
        yield Check(
            section="plugins",
            name="policies",
            ok=False,
            detail="no installed plugin provides any",
            remedy=f"run `pip install -e .` in the repository; is {registry.PLUGINS_VARIABLE} set?",
        )


def _hooks() -> Iterator[Check]:
    hooks = [f"{table.strip('_')}: {shown(hook, 80)}" for (table, _), hook in global_hooks()]
    yield Check(
        section="torch",
        name="hooks on all modules",
        ok=not hooks,
        detail=", ".join(hooks) or "none",
        remedy="they change every model in this process; remove what registers them" if hooks else "",
    )


def _adapters() -> Iterator[Check]:
    for entry in registry.load().adapters:
        try:
            yield from _probes(entry)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's own code; the other adapters are still of interest
            yield _failure(f"adapter {entry.cls.family}", error, f"{entry.cls.__name__} of {entry.plugin}")


def _probes(entry: AdapterEntry) -> Iterator[Check]:
    for probe in entry.cls.probe():
        yield Check(
            section=f"adapter {entry.cls.family}",
            name=str(probe.name),
            ok=bool(probe.ok),
            detail=str(probe.detail),
            remedy=""
            if probe.ok
            else (
                "install a transformers version that kvprune supports (see versions above); until then "
                f"compress() refuses {', '.join(entry.cls.model_classes)}"
            ),
        )


def _demo() -> Iterator[Check]:
    from kvprune import demo
    from kvprune.session.registry import find_adapter

    try:
        model, _ = demo.load()
        find_adapter(model)
    except (OSError, ValueError, ImportError, RuntimeError, KVPruneError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        yield Check(
            section="demo",
            name="model",
            ok=False,
            detail=f"{type(error).__name__}: {reason}",
            remedy='run `pip install "kvprune[demo]"`; if files are missing, reinstall kvprune',
        )
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Check(section="demo", name="model", ok=True, detail=f"loads; {parameters / 1e6:.1f} M parameters")


_SECTIONS: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
    ("versions", _versions),
    ("versions", _optional),
    ("plugins", _plugins),
    ("torch", _hooks),
    ("adapters", _adapters),
    ("demo", _demo),
)
