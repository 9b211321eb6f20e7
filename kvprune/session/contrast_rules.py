"""Rules that combine what two branches of a model say about the next token: `mint` and `mod`.

One branch reads the whole picture (full), the other one a pruned cache (pruned). A rule is a frozen dataclass
whose fields are its options. It gets natural logarithms of probabilities, and what it returns may miss a
constant in each row: the result is normalised afterwards. So adding a constant to the logits of a branch
changes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvprune.errors import ContrastError
from kvprune.policy.options import default_of, is_option_type, policy_types
from kvprune.policy.spec import PolicySpec
from kvprune.text import shown

__all__ = [
    "RULES",
    "CombineRule",
    "Mint",
    "Mod",
    "js_divergence",
    "option_types",
    "plausible",
    "require_rule_class",
]


@dataclass(frozen=True, kw_only=True)
class CombineRule(ABC):
    """Base class of rules. Derive a frozen dataclass, and pass an instance of it as ``combine``.

    Class attributes:
        name: Name in specs such as ``"mint:alpha=1"``.
        paper: Where the method comes from; empty if nowhere.
        bibtex: The entry of that paper, for `kvprune cite`.
        fidelity: How close it is to what was published.
        pruned_as: What the method would have as the second branch, for readers.
        takes_logits: Whether `combine` answers the same, but for a constant in each row, if a constant is
            added to what a branch says. Then `combine` gets logits of the pruned branch from the second
            token on, which saves the time of normalising them. `begin` always gets log-probabilities.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
    pruned_as: ClassVar[str] = ""
    takes_logits: ClassVar[bool] = False

    def begin(self, full: Tensor, pruned: Tensor) -> Tensor | None:
        """Decide at the first token what holds for the whole answer of each row.

        Args:
            full: Log-probabilities ``[B, V]`` of the branch that reads everything.
            pruned: Log-probabilities ``[B, V]`` of the branch that reads the pruned cache.

        Returns:
            A tensor ``[B, ...]``, one entry for each row; it follows the rows when beams are reordered.
            None if nothing is decided.
        """
        return None

    @abstractmethod
    def combine(self, full: Tensor, pruned: Tensor, decided: Tensor | None) -> Tensor:
        """Return scores ``[B, V]`` of the next token, higher = more likely, -inf = forbidden.

        A forbidden token is written only if other logits processors forbid all others.

        Args:
            full: Log-probabilities ``[B, V]`` of the branch that reads everything.
            pruned: Log-probabilities ``[B, V]`` of the branch that reads the pruned cache; see
                `takes_logits`.
            decided: What `begin` has returned.
        """

    @property
    def spec(self) -> str:
        """The rule as text, with all options."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{self.name}:" + ",".join(f"{name}={value}" for name, value in values)

    @property
    def short_spec(self) -> PolicySpec:
        """The rule as a spec of the options that differ from their defaults."""
        return PolicySpec(
            self.name,
            {
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if getattr(self, field.name) != default_of(field)
            },
        )


def plausible(scores: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Forbid tokens that a branch finds much less likely than its favourite (-inf).

    The adaptive plausibility constraint of contrastive decoding (Li et al. 2023, arXiv 2210.15097, eq. 3): a
    token stays if ``p_ref(v) >= beta * max p_ref``.

    Args:
        scores: ``[B, V]``.
        reference: Log-probabilities ``[B, V]`` of the branch that decides.
        beta: In [0, 1]; 0 forbids nothing, 1 leaves the favourite only.
    """
    if beta == 0:
        return scores
    least = reference.amax(-1, keepdim=True) + math.log(beta)  # [B, 1]
    return scores.masked_fill(reference < least, -torch.inf)


def js_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions, in nats (at most ln 2), ``[B]``.

    Args:
        one: Log-probabilities ``[B, V]``; -inf is allowed.
        other: Log-probabilities ``[B, V]``.
    """
    middle = torch.logaddexp(one, other) - math.log(2)  # [B, V]

    def kl(log: Tensor) -> Tensor:
        return torch.where(log.isneginf(), 0.0, log.exp() * (log - middle)).sum(-1)

    return (kl(one) + kl(other)) / 2


@dataclass(frozen=True, kw_only=True)
class Mint(CombineRule):
    """Token reduction and contrastive decoding, after MINT (arXiv 2502.00717). Reconstructed.

    The expert is the branch that reads only the tokens that matter:
    ``(1 + alpha) * log p_pruned - alpha * log p_full``, on the tokens that the full branch finds plausible.

    What the abstract says: a small set of key image tokens is chosen by the attention of shallow layers, the
    rest is masked, and contrastive decoding moves the answer toward the key regions. There is no public code,
    and the equations, their sign and every number could not be read. So the formula is that of contrastive
    decoding, the sign follows from the abstract, and alpha, beta are those of VCD (arXiv 2311.16922). The
    paper may choose tokens anew at each step, and mask deep layers only. Here the policy decides both: most
    choose once, in prefill, ``quest`` anew at each step; ``fastv:keep_ratio=0.2`` leaves the shallow layers
    whole.

    Args:
        alpha: Strength of the contrast, 0 or more. With 0, the expert alone decides.
        beta: Plausibility in [0, 1], see `plausible`.
        expert: ``"pruned"``, or ``"full"`` for the opposite sign, which is that of VCD: the pruned branch is
            the one to move away from.
    """

    name = "mint"
    paper = "Wang et al. 2025, MINT, arXiv 2502.00717"
    bibtex = """\
@article{mint,
  title = {{MINT}: Mitigating Hallucinations in Large Vision-Language Models via Token Reduction},
  author = {Wang, Chao and Yang, Jianming and Zhou, Yang},
  year = {2025},
  journal = {arXiv preprint arXiv:2502.00717},
}"""
    fidelity = "reconstructed: no public code, and neither equations, sign nor numbers could be read"
    takes_logits = True
    pruned_as = "the few tokens to which a shallow layer attends most, such as fastv:keep_ratio=0.2"

    alpha: float = 1.0
    beta: float = 0.1
    expert: Literal["pruned", "full"] = "pruned"

    def __post_init__(self) -> None:
        _require(self, "alpha", 0.0, math.inf)
        _require(self, "beta", 0.0, 1.0)

    def combine(self, full: Tensor, pruned: Tensor, decided: Tensor | None) -> Tensor:
        """Return the contrast of the two branches where the full branch finds tokens plausible."""
        expert, amateur = (pruned, full) if self.expert == "pruned" else (full, pruned)
        scores = _contrast(expert, amateur, self.alpha)
        return _possible(plausible(scores, full, self.beta), expert, self.beta)


@dataclass(frozen=True, kw_only=True)
class Mod(CombineRule):
    """Mixture of Decoding (arXiv 2505.17061): agree and add, or disagree and contrast.

    If the two branches agree about the first token, ``JS(p_full, p_pruned) < threshold`` in nats, then
    attention has found the right tokens, and the pruned branch is added to the full one for the whole answer:
    ``log p_full + agree * log p_pruned``. Otherwise it is contrasted:
    ``(1 + disagree) * log p_full - disagree * log p_pruned``. Both on the tokens that the full branch finds
    plausible.

    Formulas, defaults and the time of the decision were read in the authors' code (xlchen0205/MoD, commit
    c603060). That code decides by the first sample of a batch; here each sample decides for itself. It
    chooses the 20 % of image tokens that the last prompt row attends to most, summed over all layers, and
    sets the embeddings of the others to zero, which stay in the cache; here they are dropped. Weights that
    add up to ``1 + agree`` sharpen the distribution that sampling draws from, there as here.

    Args:
        agree: Weight of the pruned branch where the branches agree, 0 or more.
        disagree: Strength of the contrast where they do not, 0 or more.
        threshold: Divergence below which they agree, in nats, 0 or more; ln 2 = 0.69 is the largest there is.
        beta: Plausibility in [0, 1], see `plausible`.
    """

    name = "mod"
    paper = "Chen et al. 2025, Mixture of Decoding, arXiv 2505.17061"
    bibtex = """\
@inproceedings{mod,
  title = {Mixture of Decoding: An Attention-Inspired Adaptive Decoding Strategy to Mitigate Hallucinations in
           Large Vision-Language Models},
  author = {Chen, Xinlong and Zhang, Yuanxing and Liu, Qiang and Wu, Junfei and Zhang, Fuzheng and
            Tan, Tieniu},
  year = {2025},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  pages = {8525--8542},
  note = {arXiv:2505.17061},
}"""
    fidelity = "formulas, defaults and time of the decision as in the authors' code (c603060)"
    takes_logits = True
    pruned_as = "the 20 % of tokens to which the last prompt row attends most, such as snapkv:keep_ratio=0.2"

    agree: float = 4.0
    disagree: float = 1.0
    threshold: float = 0.05
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("agree", "disagree", "threshold"):
            _require(self, name, 0.0, math.inf)
        _require(self, "beta", 0.0, 1.0)

    def begin(self, full: Tensor, pruned: Tensor) -> Tensor:
        """Return whether the branches agree about the first token, bool ``[B]``."""
        return js_divergence(full, pruned) < self.threshold

    def combine(self, full: Tensor, pruned: Tensor, decided: Tensor | None) -> Tensor:
        """Return the sum or the contrast of the two branches, as `begin` has decided for each row."""
        assert decided is not None
        added = full.add(pruned, alpha=self.agree) if self.agree else full  # 0 * -inf is NaN
        scores = torch.where(decided[:, None], added, _contrast(full, pruned, self.disagree))
        return _possible(plausible(scores, full, self.beta), full, self.beta)


RULES: Mapping[str, type[CombineRule]] = {rule.name: rule for rule in (Mint, Mod)}
"""The rules that come with kvprune, by name."""


def require_rule_class(cls: type[CombineRule]) -> None:
    """Raise unless a class can be used as a rule by name: concrete, named, a frozen dataclass.

    Raises:
        TypeError: With the class and what is missing.
        SpecError: If its name cannot stand in a spec.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"{where} is abstract: it does not define {missing}")
    if not isinstance(getattr(cls, "name", None), str):
        raise TypeError(f'{where} has no name; add the class attribute `name = "..."`')
    PolicySpec(cls.name)
    for fact in ("paper", "bibtex", "fidelity", "pruned_as"):
        if not isinstance(getattr(cls, fact), str):
            raise TypeError(f"{where} has the {fact} {shown(getattr(cls, fact))}; it is text, or empty")
    own = cls.__dict__.get("__dataclass_params__")
    if own is None or not own.frozen:
        raise TypeError(f"{where} is no frozen dataclass; add @dataclass(frozen=True, kw_only=True)")
    for option, kind in option_types(cls).items():
        if not is_option_type(kind) or policy_types(kind):
            raise TypeError(f"{where}: option {option!r} is {kind}, not bool, int, float, str or Literal")


def option_types(cls: type[CombineRule]) -> dict[str, Any]:
    """Return the types of a rule's options by name."""
    types = typing.get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def _contrast(expert: Tensor, amateur: Tensor, strength: float) -> Tensor:
    """Return ``(1 + strength) * expert - strength * amateur``; NaN where both are -inf."""
    if strength == 0:
        return expert
    # amateur + (1 + strength) * (expert - amateur), in one kernel: these small ones are what a token costs
    return torch.lerp(amateur, expert, 1 + strength)


def _possible(scores: Tensor, expert: Tensor, beta: float) -> Tensor:
    """Forbid what the expert never says (-inf), if `plausible` has not done so: it forbids -inf of full."""
    if beta > 0:
        return scores
    return scores.masked_fill(expert.isneginf(), -torch.inf)


def _require(rule: CombineRule, name: str, least: float, most: float) -> None:
    value = getattr(rule, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        right = f"a number of {least:g} or more" if math.isinf(most) else f"in [{least:g}, {most:g}]"
        raise ContrastError(f"option {name!r} of rule {rule.name!r} must be {right}, got {shown(value)}")
