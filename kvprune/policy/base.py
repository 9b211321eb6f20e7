"""The root of all policies: `CrossKVPolicy`, its class attributes, options and specs.

A policy is a pure function from a read-only view to a decision. It holds options and nothing else: a
frozen keyword-only dataclass whose fields are its options. `kvprune.policy` says which base class to take.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from kvprune.errors import PolicyOptionError
from kvprune.policy.options import (
    AnyPolicy,
    check_option,
    default_of,
    is_option_type,
    parse_option,
    required_options,
)
from kvprune.policy.reconstruction import Reconstruction
from kvprune.policy.spec import OptionValue, PolicySpec
from kvprune.policy.text_view import TextView
from kvprune.policy.view import LayerView
from kvprune.text import shown, suggestion
from kvprune.tokens.budget import Budget
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = [
    "CrossKVPolicy",
    "Need",
    "require_policy_class",
]

Need = Literal[
    "queries",
    "raw_keys",
    "features",
    "text",
    "text_cache",
    "guidance",
    "reconstruction",
    "class_attention",
    "grid",
    "question",
]
"""What must be captured for a view beyond keys, values and visibility.

"text_cache" captures nothing: it asks for calls of `CrossKVPolicy.select_text`. "guidance" costs a forward
pass of a guide (`kvprune.Guide`). "reconstruction" costs a generation and a forward pass of the model itself
(`CrossKVPolicy.reconstructs_from`). "grid" captures nothing, either: models whose columns are no patches of a
picture are refused. "question" costs a pass of the text layers over the prompt, without the picture.
"""


@dataclass(frozen=True, kw_only=True)
class CrossKVPolicy(AnyPolicy, ABC):
    """Decides which encoder tokens the cross-attention caches of a model keep.

    ``select`` is called once for each cross-attention layer in each prefill, in layer order, right after the
    layer's attention. It returns a `Decision` about this layer's cache and about what later layers receive.
    Columns that decoding cannot see are evicted as well, unless the class sets ``keeps_invisible``.

    Class attributes:
        name: The name in specs.
        version: Raised whenever the same seed and input would select other tokens than before.
        needs: What must be captured beyond keys and values (see `Need`); nothing by default. Write
            ``needs = frozenset({"queries"})``, or a property where it depends on options.
        paper: Where the method comes from, or "".
        bibtex: A BibTeX entry of that paper, which ``kvprune cite`` prints, or "".
        fidelity: How close the policy is to the paper: "faithful", "adapted", "inspired-by" or "baseline".
        deviations: Where the policy differs from the paper, or "".
        differs: The same in one line for ``kvprune show``: what is not as published, or "".
        checked_against: What the selections were compared with: the authors' code with its commit, another
            implementation, or a transcription of the paper; "unverified" if with nothing.
        presets: Published settings by name: options for ``preset=NAME`` in a spec, as a spec writes them.
        cost: What one decision costs, in words.
        ranks_tokens: Whether a larger budget keeps a superset (KV14).
        reads_answer: Whether the policy ranks tokens by the answer that the model gave. Such a policy is a
            reference, not a method: whoever uses it knows the answer already. It takes only guidance that
            was made from an answer (`kvprune.answer_attention`), and no other policy takes that.
        keeps_invisible: Whether caches about which the policy decides nothing also keep what decoding
            cannot see (padding tiles, earlier images).
        moment: When the policy decides, for tables: "layer", or what its base class says.
        budget_scope: Over what `exact_budget` is exact: each "head" of each layer, the mean over the heads of
            each "layer", or the mean over all layers of the "model".
        on_any_model: Options with which the policy runs on a model of any geometry, if its defaults do not:
            checks and measurements take them.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    fidelity: ClassVar[str] = "baseline"
    deviations: ClassVar[str] = ""
    differs: ClassVar[str] = ""
    checked_against: ClassVar[str] = ""
    presets: ClassVar[typing.Mapping[str, typing.Mapping[str, OptionValue]]] = MappingProxyType({})
    cost: ClassVar[str] = ""
    ranks_tokens: ClassVar[bool] = False
    reads_answer: ClassVar[bool] = False
    keeps_invisible: ClassVar[bool] = False
    moment: ClassVar[str] = "layer"
    budget_scope: ClassVar[Literal["head", "layer", "model"]] = "head"
    on_any_model: ClassVar[typing.Mapping[str, OptionValue]] = MappingProxyType({})

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Decide by inheritance alone.

        An abstract class would ask all classes derived from it, and one plugin's class with a broken
        metaclass would fail `isinstance` for everybody.
        """
        return cls in type.__getattribute__(other, "__mro__")

    def __post_init__(self) -> None:
        self.check_class()
        hints = self.option_types()
        for option in dataclasses.fields(self):
            check_option(self.name, option.name, hints[option.name], getattr(self, option.name))
        self.nested_spec  # noqa: B018  raises if policies in policies are too deep for a spec

    @abstractmethod
    def select(self, view: LayerView) -> Decision:
        """Decide at one layer. Pure: neither writes to the view's tensors nor keeps references to them."""

    def select_text(self, view: TextView) -> Selection | None:
        """Decide which text entries one self-attention layer keeps for decoding; pure, as `select` is.

        Called once for each self-attention layer in each prefill that has a cache, right after its attention,
        if the policy needs "text_cache".

        Returns:
            A selection out of the view's entries, ``[B, Hkv or 1, K]``; None keeps them all. It holds real
            entries only, among them the last row's own. A sample keeps equally many entries in all heads and
            layers, because they share one mask.
        """
        return None

    @property
    def reconstructs_from(self) -> Reconstruction:
        """How the text is found that the model reads for a policy that needs "reconstruction"."""
        return Reconstruction()

    # A property here, so that a derived class may have a class attribute or a property of its own.
    @property
    def needs(self) -> frozenset[Need]:
        """What must be captured beyond keys and values (see `Need`). Nothing by default."""
        return frozenset()

    @property
    def exact_budget(self) -> Budget | None:
        """The budget that what each sample keeps meets exactly (KV02); None where a method has none."""
        return None

    @property
    def requested(self) -> typing.Mapping[str, float | int]:
        """What the options ask to keep, by name, for receipts: that of `exact_budget` unless overridden."""
        budget = self.exact_budget
        if budget is None:
            return {}
        if budget.keep_tokens is not None:
            return {"keep_tokens": budget.keep_tokens}
        assert budget.keep_ratio is not None
        return {"keep_ratio": budget.keep_ratio}

    @property
    def option_values(self) -> dict[str, Any]:
        """The value of each option by its name; a budget that nobody stated is filled in (`BudgetPolicy`)."""
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}

    @property
    def spec(self) -> PolicySpec:
        """The spec that builds this policy again: every option that differs from its default."""
        return self._write(self.option_values)

    @property
    def nested_spec(self) -> PolicySpec:
        """The spec as an option of another policy's: without a budget that nobody stated."""
        return self._write({option.name: getattr(self, option.name) for option in dataclasses.fields(self)})

    def _write(self, values: typing.Mapping[str, Any]) -> PolicySpec:
        options: dict[str, OptionValue] = {}
        for option in dataclasses.fields(self):
            value, default = values[option.name], default_of(option)
            if default is dataclasses.MISSING or value != default:
                options[option.name] = value.nested_spec if isinstance(value, CrossKVPolicy) else value
        return PolicySpec(self.name, options, self.version)

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """Return the type annotation of each option by its name."""
        return dict(_option_types(cls))

    @classmethod
    def with_preset(
        cls, options: typing.Mapping[str, OptionValue | CrossKVPolicy]
    ) -> dict[str, OptionValue | CrossKVPolicy]:
        """Return options in which ``preset`` is replaced by the options that it stands for.

        Options that are given beside the preset win. The policy does not remember the preset: its spec has
        the options.

        Raises:
            PolicyOptionError: If the class has no preset of this name; lists its presets.

        Example:
            >>> import kvprune
            >>> str(kvprune.get_policy("snapkv:preset=published,window=8").spec)
            'snapkv:keep_ratio=0.5,window=8,kernel=7,reduction=max'
        """
        own = dict(options)
        if "preset" not in own or any(option.name == "preset" for option in dataclasses.fields(cls)):
            return own
        name = own.pop("preset")
        if not isinstance(name, str) or name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            hint = suggestion(name, cls.presets) if isinstance(name, str) else ""
            raise PolicyOptionError(
                f"policy {cls.name!r} has no preset {shown(name)}{hint} (presets: {known})"
            )
        return {**cls.presets[name], **own}

    @classmethod
    def from_options(cls, options: typing.Mapping[str, OptionValue | CrossKVPolicy]) -> Self:
        """Build the policy from option values, reading those that are text by the type of their field.

        Options that are policies are policies here; `kvprune.get_policy` makes them of nested specs. The
        option ``preset`` stands for the options of a preset of the class.

        Raises:
            PolicyOptionError: If an option is unknown or its value is wrong; lists what would be right.
        """
        types, options = cls.option_types(), cls.with_preset(options)
        for option in options:
            if option not in types:
                known = ", ".join(sorted(types)) or "none"
                raise PolicyOptionError(
                    f"policy {cls.name!r} has no option {shown(option)}{suggestion(option, types)} "
                    f"(options: {known})"
                )
        missing = [option for option in required_options(cls) if option not in options]
        if missing:
            raise PolicyOptionError(
                f"policy {cls.name!r} needs option {missing[0]!r}, got {shown(dict(options))}"
            )
        for option, value in options.items():
            if isinstance(value, PolicySpec):  # fits no field; before the author's own code meets it
                check_option(cls.name, option, types[option], value)
        values = {
            option: parse_option(cls.name, option, types[option], value) if isinstance(value, str) else value
            for option, value in options.items()
        }
        return cls(**values)

    @classmethod
    def check_class(cls) -> None:
        """Raise unless the class can be used as a policy: concrete, named, a frozen dataclass.

        Raises:
            TypeError: With the class and what is missing.
        """
        require_policy_class(cls)


@functools.lru_cache(maxsize=256)
def _option_types(cls: type[CrossKVPolicy]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)  # slow, and a comparison makes hundreds of policies
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}


def require_policy_class(cls: type[CrossKVPolicy]) -> None:
    """Raise unless a class can be used as a policy: `CrossKVPolicy.check_class`, but no class overrides it.

    Raises:
        TypeError: With the class and what is missing.
        SpecError: If its name or version cannot stand in a spec.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"{where} is abstract: it does not define {missing}")
    if not isinstance(getattr(cls, "name", None), str):
        raise TypeError(f'{where} has no name; add the class attribute `name = "..."`')
    if isinstance(cls.version, bool) or not isinstance(cls.version, int):
        raise TypeError(f"{where} has the version {shown(cls.version)}; a version is a whole number")
    PolicySpec(cls.name, version=cls.version)
    for fact in ("paper", "bibtex", "fidelity", "deviations", "differs", "checked_against", "cost"):
        if not isinstance(getattr(cls, fact), str):
            raise TypeError(f"{where} has the {fact} {shown(getattr(cls, fact))}; it is text, or empty")
    if not isinstance(cls.reads_answer, bool):
        raise TypeError(f"{where} has the reads_answer {shown(cls.reads_answer)}; it is True or False")
    own = cls.__dict__.get("__dataclass_params__")
    if own is None or not own.frozen:
        raise TypeError(f"{where} is no frozen dataclass; add @dataclass(frozen=True, kw_only=True)")
    for option, annotation in cls.option_types().items():
        if option in ("name", "version"):
            raise TypeError(
                f"{where} annotates {option!r}, which makes it an option; "
                f"leave the annotation out, or write {option}: ClassVar[...]"
            )
        if not is_option_type(annotation):
            raise TypeError(
                f"{where} has the option {option!r} of type {shown(annotation)}; options are bool, int, "
                "float, str, None, Literal, or a union of these, or a policy class (or None), "
                "so that a spec can hold them"
            )
    _require_presets(cls, where)


def _require_presets(cls: type[CrossKVPolicy], where: str) -> None:
    """Raise unless presets are options by name."""
    presets = cls.presets
    if not isinstance(presets, typing.Mapping) or not all(
        isinstance(options, typing.Mapping) for options in presets.values()
    ):
        raise TypeError(f"{where} has the presets {shown(presets)}; they are options by name of the preset")
    types = cls.option_types()
    for name, options in presets.items():
        if unknown := [option for option in options if option not in types]:
            known = ", ".join(types) or "none"
            raise TypeError(
                f"preset {shown(name)} of {where} sets {shown(unknown[0])}, which is no option "
                f"(options: {known})"
            )
