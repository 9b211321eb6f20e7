"""Writes a failure as Python code that can be pasted: the policy, the problem, and the check."""

from __future__ import annotations

from typing import Any

from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.session.registry import load
from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["adapter_snippet", "snippet"]


def snippet(
    invariant: str, policy: CrossKVPolicy | type[CrossKVPolicy], problem: LayerProblem | ModelProblem | None
) -> str:
    """Return code that poses the problem to the policy again and raises a ConformanceError."""
    imports, made = _policy(policy)
    if problem is None:
        return f"{imports}\nfrom kvprune.testing import recheck\n\nrecheck({invariant!r}, {made})"
    return (
        f"{imports}\nfrom kvprune.testing import {type(problem).__name__}, recheck\n\n"
        f"policy = {made}\nproblem = {problem!r}\nrecheck({invariant!r}, policy, problem)"
    )


def adapter_snippet(
    invariant: str,
    adapter: type[ModelAdapter],
    make_model: Any = None,
    make_inputs: Any = None,
    *,
    seed: int = 0,
    oracle: Any = None,
) -> str:
    """Return code that checks one invariant of an adapter again and raises a ConformanceError."""
    imports, names = [], []
    for thing in (adapter, make_model, make_inputs, oracle):
        line, name = ("", "None") if thing is None else _named(thing)
        imports += [line] if line and line not in imports else []
        names.append(name)
    arguments = names[:1] if make_model is None and make_inputs is None else names[:3]
    arguments.append(f"only=[{invariant!r}]")
    arguments += [f"seed={seed}"] if seed else []
    arguments += [f"oracle={names[3]}"] if oracle is not None else []
    lines = [
        *imports,
        "from kvprune.testing import check_adapter",
        "",
        f"check_adapter({', '.join(arguments)})",
    ]
    return "\n".join(lines)


def _named(thing: Any) -> tuple[str, str]:
    """Return the import of a class or function, and its name; or a comment if it cannot be imported."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module is None or name is None or "<" in name or module == "__main__":
        told = f"{name or type(thing).__name__} of {module}"
        short = (name or "").rpartition("<locals>.")[2]
        return f"# {told} must be defined here", short if short.isidentifier() else "..."
    return f"from {module} import {name.partition('.')[0]}", name


def _policy(policy: CrossKVPolicy | type[CrossKVPolicy]) -> tuple[str, str]:
    """Return the imports and the expression that make a policy (or name its class)."""
    cls = policy if isinstance(policy, type) else type(policy)
    if not isinstance(policy, type) and all(map(_is_installed, parts(policy))):
        return "import kvprune", f"kvprune.get_policy({str(policy.spec)!r})"
    imports, options = ([], "") if isinstance(policy, type) else _options(policy)
    made = cls.__qualname__.rpartition("<locals>.")[2]
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        imports.append(f"# {cls.__qualname__} of {cls.__module__} must be defined here")
    else:
        imports.append(f"from {cls.__module__} import {made.partition('.')[0]}")
    return "\n".join(dict.fromkeys(imports)), made if isinstance(policy, type) else f"{made}({options})"


def _is_installed(policy: CrossKVPolicy) -> bool:
    entry = load().policies.get(getattr(policy, "name", ""))
    return entry is not None and entry.cls is type(policy)


def _options(policy: CrossKVPolicy) -> tuple[list[str], str]:
    """Return the imports that a policy's options need, and the options as arguments."""
    imports, arguments = [], []
    for name, value in policy.spec.options.items():
        made = repr(value)
        if isinstance(inner := getattr(policy, name), CrossKVPolicy):
            needed, made = _policy(inner)
            imports.append(needed)
        arguments.append(f"{name}={made}")
    return imports, ", ".join(arguments)
