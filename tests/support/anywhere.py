"""Policies that run on a model of any geometry: with fresh weights, if they have weights."""

import kvprune
from kvprune.session.registry import load


def on_any_model(name: str, **options) -> kvprune.CrossKVPolicy:
    """A policy with default options, or those that fit any model."""
    return kvprune.get_policy(kvprune.PolicySpec(name, {**load().policy_class(name).on_any_model, **options}))
