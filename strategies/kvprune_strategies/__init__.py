"""The built-in policies, one file each. They come through the same entry point as anybody else's.

A new policy is named once, below: `kvprune_policies` returns all that is imported here.
"""

from __future__ import annotations

import kvprune
from kvprune_strategies.adakv import AdaKV as AdaKV
from kvprune_strategies.aircache import AirCache as AirCache
from kvprune_strategies.answer_attention import AnswerAttention as AnswerAttention
from kvprune_strategies.attnpred import AttnPred as AttnPred
from kvprune_strategies.cdpruner import CDPruner as CDPruner
from kvprune_strategies.csp import CSP as CSP
from kvprune_strategies.divprune import DivPrune as DivPrune
from kvprune_strategies.elastic import Elastic as Elastic
from kvprune_strategies.expected import Expected as Expected
from kvprune_strategies.fastv import FastV as FastV
from kvprune_strategies.full import Full as Full
from kvprune_strategies.guided import Guided as Guided
from kvprune_strategies.h2o import H2O as H2O
from kvprune_strategies.keydiff import KeyDiff as KeyDiff
from kvprune_strategies.kvzip import KVzip as KVzip
from kvprune_strategies.lossless import Lossless as Lossless
from kvprune_strategies.meanpool import MeanPool as MeanPool
from kvprune_strategies.norm import Norm as Norm
from kvprune_strategies.prefixkv import PrefixKV as PrefixKV
from kvprune_strategies.prumerge import PruMerge as PruMerge
from kvprune_strategies.pyramid import Pyramid as Pyramid
from kvprune_strategies.quecc import QueCC as QueCC
from kvprune_strategies.quest import Quest as Quest
from kvprune_strategies.random_keep import Random as Random
from kvprune_strategies.snapkv import SnapKV as SnapKV
from kvprune_strategies.then import Then as Then
from kvprune_strategies.topv import TopV as TopV
from kvprune_strategies.trim import Trim as Trim
from kvprune_strategies.uniform import Uniform as Uniform
from kvprune_strategies.vatp import VATP as VATP
from kvprune_strategies.visionzip import VisionZip as VisionZip
from kvprune_strategies.vlcache import VLCache as VLCache
from kvprune_strategies.zipvl import ZipVL as ZipVL


@kvprune.hookimpl
def kvprune_policies() -> list[type[kvprune.CrossKVPolicy]]:
    """Return the policies that ship with kvprune."""
    return [
        found
        for found in globals().values()
        if isinstance(found, type) and issubclass(found, kvprune.CrossKVPolicy)
    ]
