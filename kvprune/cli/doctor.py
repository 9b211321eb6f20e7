"""The command that checks an installation, or a model: doctor.

It looks at versions, plugins, what adapters rely on in transformers, and the demo model. `doctor_model` looks
at a checkpoint.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from kvprune.cli.common import Debug, hide_progress_bars, hide_warnings, one_line_errors
from kvprune.cli.doctor_model import examine_model
from kvprune.cli.findings import Check, print_checks, printable_checks
from kvprune.errors import KVPruneError
from kvprune.text import error_line, shown

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from kvprune.session.plugins import AdapterEntry

__all__ = ["Check", "doctor", "examine"]

_OPTIONAL = ("matplotlib", "scipy", "sklearn", "PIL")
_INSTALL_EXTRA = 'pip install "kvprune[demo]"'


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint, or its name in the local cache of the Hugging Face Hub. Only "
            "config.json is read: no weights, no network, no code of the model's own."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check this installation, or with --model, a checkpoint.

    Looks at versions, plugins, what adapters rely on in transformers, and the demo model. With --model, says
    which adapter a checkpoint has, where it attends to encoder states, what its cache costs, and which
    policies and settings would be refused. The exit code is 1 if something is wrong.
    """
    with one_line_errors(debug), redirect_stdout(sys.stderr), hide_warnings():
        hide_progress_bars()
        checks = examine() if model is None else examine_model(model)
    failed = print_checks(checks)
    if model is None:
        print(f"{failed} of {len(checks)} checks failed." if failed else "All is well.")
    raise typer.Exit(1 if failed else 0)


def examine() -> tuple[Check, ...]:
    """Check everything. Returns printable text, and never raises: an error is a failed check."""
    checks: list[Check] = []
    for section, look in _SECTIONS:
        try:
            checks += look()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # foreign code may raise anything; the error is the finding
            checks.append(_failure(section, error))
    return printable_checks(checks)


def _failure(section: str, error: BaseException, subject: str = "") -> Check:
    """Return the failed check for something that raised while it was examined."""
    return Check(
        section=section,
        name=f"{subject} could not be examined".strip(),
        ok=False,
        detail=error_line(error),
        remedy="repair what the error names, then run `kvprune doctor` again",
    )


def _versions() -> Iterator[Check]:
    """Compare installed versions with those that kvprune requires."""
    from packaging.requirements import Requirement

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
    """Name the packages of the extra "demo" that are missing."""
    missing = _missing()
    detail = f"not installed: {', '.join(missing)} ({_INSTALL_EXTRA})" if missing else "all there"
    yield Check(section="versions", name="for the demo and compare", ok=None, detail=detail)


def _missing() -> list[str]:
    """Return the modules of the extra "demo" that cannot be imported because they are not installed."""
    missing = []
    for module in _OPTIONAL:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(module)
    return missing


def _plugins() -> Iterator[Check]:
    """List what each plugin provides, and the plugins that failed to load."""
    from kvprune.session import registry

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
    """Find hooks on all modules of torch, which would change every model."""
    from kvprune.session.plugins import global_hooks

    hooks = [f"{table.strip('_')}: {shown(hook, 80)}" for (table, _), hook in global_hooks()]
    yield Check(
        section="torch",
        name="hooks on all modules",
        ok=not hooks,
        detail=", ".join(hooks) or "none",
        remedy="they change every model in this process; remove what registers them" if hooks else "",
    )


def _adapters() -> Iterator[Check]:
    """Probe what each adapter relies on in transformers."""
    from kvprune.session import registry

    sharing: dict[int, list[AdapterEntry]] = {}  # declared families rely on the same
    for entry in registry.load().adapters:
        probe = getattr(entry.cls, "probe", None)
        sharing.setdefault(id(getattr(probe, "__func__", entry.cls)), []).append(entry)
    for entries in sharing.values():
        families = ", ".join(entry.cls.family for entry in entries)
        try:
            yield from _probes(entries, f"adapter {families}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # foreign code; go on with the other adapters
            entry = entries[0]
            yield _failure(f"adapter {families}", error, f"{entry.cls.__name__} of {entry.plugin}")


def _probes(entries: Sequence[AdapterEntry], section: str) -> Iterator[Check]:
    classes = [name for entry in entries for name in entry.cls.model_classes]
    for probe in entries[0].cls.probe():
        yield Check(
            section=section,
            name=str(probe.name),
            ok=bool(probe.ok),
            detail=str(probe.detail),
            remedy=""
            if probe.ok
            else (
                "install a transformers version that kvprune supports (see versions above); until then "
                f"compress() refuses {', '.join(classes)}"
            ),
        )


def _demo() -> Iterator[Check]:
    """Load the demo model and find its adapter."""
    from kvprune.session.registry import find_adapter

    try:
        from kvprune import demo  # it draws pictures, so it imports packages of the extra

        model, _ = demo.load()
        find_adapter(model)
    except (OSError, ValueError, ImportError, RuntimeError, KVPruneError) as error:
        if isinstance(error, ImportError) and (missing := _missing()):
            # Nobody needs the demo to compress a model, so an extra that was left out is no failure.
            detail = f"not examined, since {', '.join(missing)} is not installed ({_INSTALL_EXTRA})"
            yield Check(section="demo", name="model", ok=None, detail=detail)
            return
        reason = (str(error).strip().splitlines() or [""])[0]
        yield Check(
            section="demo",
            name="model",
            ok=False,
            detail=f"{type(error).__name__}: {reason}",
            remedy=f"run `{_INSTALL_EXTRA}`; if files are missing, reinstall kvprune",
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
