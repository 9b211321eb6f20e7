"""A failure as Python code that can be pasted: the policy, the problem, and the check again."""

from __future__ import annotations

from kvprune.policy import CrossKVPolicy
from kvprune.registry import load
from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["snippet"]


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


def _policy(policy: CrossKVPolicy | type[CrossKVPolicy]) -> tuple[str, str]:
    """Return the import and the expression that make a policy (or name its class)."""
    cls = policy if isinstance(policy, type) else type(policy)
    options = "" if isinstance(policy, type) else _options(policy)
    entry = load().policies.get(getattr(cls, "name", ""))
    if entry is not None and entry.cls is cls and not isinstance(policy, type):
        return "import kvprune", f"kvprune.get_policy({str(policy.spec)!r})"
    outer, _, _ = cls.__qualname__.partition(".")
    made = cls.__qualname__ if isinstance(policy, type) else f"{cls.__qualname__}({options})"
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        made = made.rpartition("<locals>.")[2]
        return f"# {cls.__qualname__} of {cls.__module__} must be defined here", made
    return f"from {cls.__module__} import {outer}", made


def _options(policy: CrossKVPolicy) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in policy.spec.options.items())
