"""The built-in policies, one file each. They come through the same door as anybody else's."""

from __future__ import annotations

import kvprune
from kvprune_strategies.adakv import AdaKV
from kvprune_strategies.aircache import AirCache
from kvprune_strategies.cdpruner import CDPruner
from kvprune_strategies.csp import CSP
from kvprune_strategies.divprune import DivPrune
from kvprune_strategies.elastic import Elastic
from kvprune_strategies.fastv import FastV
from kvprune_strategies.full import Full
from kvprune_strategies.guided import Guided
from kvprune_strategies.h2o import H2O
from kvprune_strategies.keydiff import KeyDiff
from kvprune_strategies.lossless import Lossless
from kvprune_strategies.norm import Norm
from kvprune_strategies.prefixkv import PrefixKV
from kvprune_strategies.prumerge import PruMerge
from kvprune_strategies.pyramid import Pyramid
from kvprune_strategies.random_keep import Random
from kvprune_strategies.snapkv import SnapKV
from kvprune_strategies.topv import TopV
from kvprune_strategies.trim import Trim
from kvprune_strategies.uniform import Uniform
from kvprune_strategies.visionzip import VisionZip
from kvprune_strategies.vlcache import VLCache
from kvprune_strategies.zipvl import ZipVL

__all__ = [
    "CSP",
    "H2O",
    "AdaKV",
    "AirCache",
    "CDPruner",
    "DivPrune",
    "Elastic",
    "FastV",
    "Full",
    "Guided",
    "KeyDiff",
    "Lossless",
    "Norm",
    "PrefixKV",
    "PruMerge",
    "Pyramid",
    "Random",
    "SnapKV",
    "TopV",
    "Trim",
    "Uniform",
    "VLCache",
    "VisionZip",
    "ZipVL",
    "kvprune_policies",
]


@kvprune.hookimpl
def kvprune_policies() -> list[type[kvprune.CrossKVPolicy]]:
    """Return the policies that ship with kvprune."""
    return [
        AdaKV,
        AirCache,
        CDPruner,
        CSP,
        DivPrune,
        Elastic,
        FastV,
        Full,
        Guided,
        H2O,
        KeyDiff,
        Lossless,
        Norm,
        PrefixKV,
        PruMerge,
        Pyramid,
        Random,
        SnapKV,
        TopV,
        Trim,
        Uniform,
        VLCache,
        VisionZip,
        ZipVL,
    ]
