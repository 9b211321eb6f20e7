"""How the spec of a rule of `kvprune.contrast` becomes the rule."""

from __future__ import annotations

from kvprune.errors import ContrastError, KVPruneError, PluginError
from kvprune.policy.options import check_option, describe_type, parse_option
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.session.contrast_rules import CombineRule, option_types
from kvprune.text import error_line, shown, suggestion

__all__ = ["get_rule"]


def get_rule(rule: str | CombineRule) -> CombineRule:
    """Return a rule from a spec such as ``"mod:beta=0.1"``.

    Args:
        rule: A spec, or a rule, which is returned itself.

    Raises:
        SpecError: If the spec does not follow the grammar of policies.
        ContrastError: If there is no such rule or option (lists them), or a value is out of range.
        PolicyOptionError: If a value has the wrong type.
        PluginError: If the code of a rule of others fails while it is built.
    """
    if isinstance(rule, CombineRule):
        return rule
    if not isinstance(rule, str):
        raise ContrastError(f"combine is a spec such as 'mint:alpha=1', or a CombineRule, got {shown(rule)}")
    spec, rules = PolicySpec.parse(rule), registry.load().rules
    entry = rules.get(spec.name)
    if entry is None:
        raise ContrastError(
            f"there is no rule {shown(spec.name)}; there are {', '.join(rules)}{suggestion(spec.name, rules)}"
        )
    options, values = option_types(entry.cls), {}
    for name, text in spec.options.items():
        if name not in options:
            known = ", ".join(f"{one} ({describe_type(kind)})" for one, kind in options.items()) or "none"
            raise ContrastError(
                f"rule {spec.name!r} has no option {shown(name)}; it has {known}{suggestion(name, options)}"
            )
        value = parse_option(spec.name, name, options[name], str(text), of="rule")
        check_option(spec.name, name, options[name], value, of="rule")
        values[name] = value
    try:
        return entry.cls(**values)
    except (KVPruneError, KeyboardInterrupt):
        raise
    except ValueError as error:  # how authors who do not know our errors refuse a value
        raise ContrastError(f"rule {spec.name!r} refuses {shown(rule)}: {error_line(error)}") from error
    except BaseException as error:
        raise PluginError(
            f"rule {spec.name!r} of plugin {entry.plugin!r} cannot be built from {shown(rule)}: "
            f"{error_line(error)}"
        ) from error
