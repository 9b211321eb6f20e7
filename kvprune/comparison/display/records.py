"""Rows and answers as flat records: what `kvprune results export` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvprune.comparison.plan.settings import NO_GUIDE
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.statistics.power import POINTS
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.speed import Ratio, Speed
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.stored_run import StoredRun

__all__ = ["Provenance", "Record", "Value", "answer_records", "provenance", "row_records"]

Value = str | int | float | bool | None
Record = dict[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where exported results come from.

    Attributes:
        model: hub id or folder of the model.
        model_digest: what identifies it.
        guide: hub id or folder of the guide; "self" where there is none.
        data: file of the examples.
        device: torch device.
        dtype: data type of the weights.
        machine: operating system and processor.
        versions: versions of Python and of the libraries, in words.
        created: date and time when the folder was made.
    """

    model: str
    model_digest: str
    guide: str = NO_GUIDE
    data: str
    device: str
    dtype: str
    machine: str
    versions: str
    created: str


def provenance(stored: StoredRun) -> Provenance:
    """Return where the results of a folder come from."""
    context = stored.grid.context
    about = stored.manifest.get("about")
    known: Mapping[str, Any] = about if isinstance(about, dict) else {}
    versions = {"kvprune": known.get("kvprune"), **context["versions"], "Python": known.get("python")}
    return Provenance(
        model=str(known.get("model")),
        model_digest=str(context["model_digest"]),
        guide=str(known.get("guide", NO_GUIDE)),
        data=str(known.get("data")),
        device=str(context["device"]),
        dtype=str(context["dtype"]),
        machine=str(known.get("platform")),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        created=str(stored.manifest.get("created")),
    )


def row_records(summary: Summary) -> list[Record]:
    """Return one record for each row; all have the same fields, and rates are fractions."""
    return [_record(row, summary) for row in summary.rows]


def answer_records(answers: Iterable[Answer]) -> list[Record]:
    """Return one record for each answer, with the fields of results.jsonl."""
    return [asdict(answer) for answer in answers]


def _record(row: Row, summary: Summary) -> Record:
    window = summary.window_seconds
    return {
        "spec": row.spec,
        "policy": row.label,
        "budget": row.budget,
        "keep_ratio": row.keep_ratio,
        "reach": row.reach,
        "reference": row.is_reference,
        "guide": row.guide,
        "examples": summary.examples,
        "draws": row.draws,
        "seeds": " ".join(map(str, row.seeds)),
        "kept_fraction": row.kept_fraction,
        **({} if window is None else {"kept_seconds": window * row.kept_fraction}),
        "read_fraction": row.read,
        **({} if window is None else {"read_seconds": window * row.read}),
        "bytes_held": row.bytes_held,
        "bytes_full": row.bytes_full,
        **_rates(row),
        **{
            f"{summary.metric}[{task}]{ending}": value
            for task, rate in row.tasks.items()
            for ending, value in (("", rate.value), ("_low", rate.low), ("_high", rate.high))
        },
        **_rate("agreement", row.agreement),
        **_contrast("versus_full", row.versus_full),
        "partner": summary.partner,
        **_contrast("versus_partner", row.versus_baseline),
        **_contrast("versus_answer_attention", row.versus_answer_attention),
        **_contrast("versus_self_guided", row.versus_self_guided),
        "unfinished": row.unfinished,
        **({} if row.speech is None else {"loops": row.speech.loops}),
        **_speed(row.speed),
    }


def _rates(row: Row) -> Record:
    found = _rate("accuracy", row.accuracy, counts=("right", "answers"))
    if row.speech is not None:
        found |= _rate("word_error_rate", row.speech.word_error_rate, counts=("word_errors", "words"))
        found |= _rate(
            "character_error_rate", row.speech.character_error_rate, counts=("character_errors", "characters")
        )
        found |= _rate("mean_word_error_rate", row.speech.mean_word_error_rate)
        found |= _rate("mean_character_error_rate", row.speech.mean_character_error_rate)
    return found


def _rate(name: str, rate: Rate, counts: tuple[str, str] | None = None) -> Record:
    found: Record = {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}
    if counts is not None:
        found |= {counts[0]: rate.hits, counts[1]: rate.total}
    return found


def _contrast(name: str, found: Contrast | None) -> Record:
    fields = ("value", "low", "high", "lost", "gained", "pairs", "p_value", "p_adjusted", "disagreement")
    record: Record = {f"{name}_{field}": getattr(found, field, None) for field in fields}
    for points in POINTS:
        record[f"{name}_needed_{points}"] = None if found is None else found.needed[str(points)]
    return record


def _speed(speed: Speed | None) -> Record:
    def ratio(name: str, found: Ratio | None) -> Record:
        values = (None,) * 3 if found is None else (found.median, found.low, found.high)
        return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))

    return {
        "prefill_ms": speed.prefill_ms if speed else None,
        "token_ms": speed.token_ms if speed else None,
        **ratio("prefill_ratio", speed.prefill_ratio if speed else None),
        **ratio("token_ratio", speed.token_ratio if speed else None),
        **ratio("guide_ratio", speed.guide_ratio if speed else None),
        "guide_bytes": speed.guide_bytes if speed else None,
    }
