"""`then`: one policy prunes by features, and then another decides at the layers about what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor

from kvprune import (
    CrossKVPolicy,
    Decision,
    DecodePolicy,
    FeaturePolicy,
    FeatureView,
    HeldView,
    LayerView,
    PolicySpec,
    Selection,
    StepView,
)
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need, PrefillPolicy, State, TextView, takes_steps
from kvprune_strategies.divprune import DivPrune
from kvprune_strategies.h2o import H2O


@dataclass(frozen=True, kw_only=True)
class Then(FeaturePolicy, DecodePolicy):
    """Prune by features first, and then at each layer what is left.

    Written with the word between two specs: ``divprune:keep_ratio=0.5 then h2o:keep_ratio=0.2``. The first
    policy decides before the first cross-attention layer, without knowing the question. All layers project,
    attend to and store only what it keeps. The second one decides at the layers, from what their queries
    attend to, and sees no other tokens.

    The second budget counts what the first one left. Of n visible tokens, n1 = ceil(0.5 * n) reach the layers
    in this example, and ceil(0.2 * n1) stay in their caches: a tenth of n, up to rounding.

    The second one may decide in decode steps instead, and its budget counts the same tokens. Under
    ``divprune:keep_ratio=0.5 then quest:keep_ratio=0.2``, caches hold n1 tokens, and each step reads
    ceil(0.2 * n1) of them.

    A larger budget need not keep a superset: if the first policy keeps more tokens, the second one may prefer
    the new ones.

    Args:
        first: Decides before the first cross-attention layer, as `divprune` does.
        second: Decides at the layers, as `h2o` does, or in decode steps, as `quest` does. With
            ``reach=onward`` in its options, later layers receive only what it keeps.
    """

    first: FeaturePolicy = field(default_factory=DivPrune)
    second: CrossKVPolicy = field(default_factory=H2O)

    name = "then"
    version = 1

    @property
    def needs(self) -> frozenset[Need]:
        """What either of them needs."""
        return frozenset(self.first.needs | self.second.needs)

    def choose(self, view: FeatureView) -> Decision:
        """Let the first policy decide."""
        return self.first.choose(view)

    def select(self, view: LayerView) -> Decision:
        """Let the second policy decide about what the first one left."""
        early = self.first.select(view)
        if early.cache is not None or early.onward is not None:
            raise PolicyOptionError(
                f"policy {self.name!r}: its first policy must decide before the first cross-attention layer "
                f"alone, but {self.first.spec} also decides {view.where}"
            )
        return self.second.select(view)

    def select_text(self, view: TextView) -> Selection | None:
        """Let the second policy decide about the text, if it prunes text."""
        return self.second.select_text(view)

    @property
    def takes_steps(self) -> bool:
        """Whether the second policy decides in decode steps."""
        return takes_steps(self.second)

    @property
    def observes(self) -> bool:
        """Whether the second policy wants to see the attention of each step."""
        return self.takes_steps and self._stepping.observes

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        """Whether the steps of the second policy can be traced."""
        return self.takes_steps and self._stepping.compiles

    @property
    def foresees(self) -> bool:  # type: ignore[override]
        """Whether the second policy knows what a step reads before the step begins."""
        return self.takes_steps and self._stepping.foresees

    @property
    def offloads(self) -> bool:
        """Whether what the first policy left lies in host memory while the model decodes."""
        return self.takes_steps and self._stepping.offloads

    @property
    def _stepping(self) -> DecodePolicy:
        """The second policy, of which only one that decides in decode steps is asked there."""
        assert isinstance(self.second, DecodePolicy)
        return self.second

    def prepare(self, view: HeldView) -> State:
        """Let the second policy prepare for decode steps, from what the first one left."""
        return self._stepping.prepare(view)

    def attend(self, step: StepView, state: State) -> Selection | None:
        """Let the second policy choose what a step reads."""
        return self._stepping.attend(step, state)

    def observe(self, step: StepView, attention: Tensor, state: State) -> tuple[State, Selection | None]:
        """Show the attention of a step to the second policy."""
        return self._stepping.observe(step, attention, state)

    @property
    def requested(self) -> Mapping[str, float | int]:
        """The product of two fractions that both count what is held; otherwise, what each policy states."""
        first, second = self.first.requested, self.second.requested
        if not self.takes_steps and set(first) == set(second) == {"keep_ratio"}:
            product = Fraction(str(first["keep_ratio"])) * Fraction(str(second["keep_ratio"]))
            return {"keep_ratio": float(product)}
        return {
            **{f"first {name}": asked for name, asked in first.items()},
            **{f"second {name}": asked for name, asked in second.items()},
        }

    @property
    def spec(self) -> PolicySpec:
        """The spec that builds this policy again; both policies and their budgets are always written."""
        return PolicySpec(self.name, {"first": self.first.spec, "second": self.second.spec}, self.version)

    @property
    def nested_spec(self) -> PolicySpec:
        """The same, as an option of another policy's."""
        return self.spec

    def __post_init__(self) -> None:
        super().__post_init__()
        for policy, why in (
            (self.first, _why_not_first(self.first)),
            (self.second, _why_not_second(self.second)),
        ):
            if why:
                raise PolicyOptionError(
                    f"in '{self.first.spec} then {self.second.spec}', {policy.name!r} {why}; first comes a "
                    "policy that decides before the first cross-attention layer, such as divprune, and then "
                    "one that decides at the layers, such as h2o, or in decode steps, such as quest"
                )

    cost = "that of both; the second one sees only what the first one left"


def _why_not_first(policy: FeaturePolicy) -> str:
    """Return why a policy cannot come first, or ""."""
    if isinstance(policy, Then):
        return "is such a pair itself, and only two policies may follow each other"
    if policy.reads_answer:
        return "has seen the answer"
    if takes_steps(policy):
        return "also decides in decode steps, which only the second one may"
    if "text_cache" in policy.needs:
        return "also prunes the text, which only the second one may"
    return ""


def _why_not_second(policy: CrossKVPolicy) -> str:
    """Return why a policy cannot come second, or ""."""
    if isinstance(policy, Then):
        return "is such a pair itself, and only two policies may follow each other"
    if isinstance(policy, FeaturePolicy):
        return "decides before the first cross-attention layer, too"
    if isinstance(policy, PrefillPolicy):
        return "decides only when all layers have attended, which is not possible here yet"
    if policy.reads_answer:
        return "has seen the answer"
    if policy.keeps_invisible:
        return "keeps all that there is, so nothing would follow"
    return ""
