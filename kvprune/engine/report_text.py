"""A report as text for readers."""

from __future__ import annotations

from kvprune.engine.receipts import LayerReceipt
from kvprune.engine.report_facts import ReportFacts
from kvprune.text import printable

__all__ = ["report_text"]

_MIB = 1024 * 1024


def report_text(report: ReportFacts) -> str:
    """Return the report as a readable table."""
    if not report.prefills and report.loaded is None:
        seen = f"{report.encoder_inputs} encoder inputs seen"
        return printable(f"{report.policy}: nothing compressed yet ({seen})")
    held, full = report.bytes_held / _MIB, report.bytes_full / _MIB
    share = f" ({held / full:.1%})" if full else ""
    asked = ", ".join(f"{name} {value}" for name, value in report.requested.items()) or "no budget"
    lines = [
        f"{report.policy}  seed {report.seed}  prefills {report.prefills}"
        + f"  loaded from {report.loaded}" * (report.loaded is not None),
        f"asked: {asked}; kept {report.kept_fraction:.1%} of visible {report.unit.many}, "
        f"{report.kept_of_stored:.1%} of those that stock holds",
        f"cross-attention cache {held:.2f} MiB of {full:.2f} MiB stock{share}; "
        f"at most {report.bytes_peak / _MIB:.2f} MiB in prefill",
        f"{'layer':>5}  {'decided':>7}  {'held':>6}  {'stock':>6}  {'MiB held':>9}  {'MiB stock':>9}"
        + ("  held by bits" if any(layer.quantized for layer in report.layers) else ""),
    ]
    lines += [
        f"{layer.layer_idx:>5}  {layer.decisions:>7}  {layer.width:>6}  {layer.columns:>6}  "
        f"{layer.bytes_held / _MIB:>9.3f}  {layer.bytes_full / _MIB:>9.3f}{_by_bits(layer)}"
        for layer in report.layers
    ]
    if report.kept_seconds is not None:
        kept, heard = report.kept_seconds
        lines.insert(2, f"kept {kept:.2f} s of {heard:.2f} s of sound in the latest prefill")
    if report.text_layers and report.text_kept_fraction is not None:
        lines.append(
            f"text cache {report.text_bytes_held / _MIB:.3f} MiB of "
            f"{report.text_bytes_full / _MIB:.3f} MiB stock, in {len(report.text_layers)} layers; "
            f"kept {report.text_kept_fraction:.1%} of text entries"
        )
    if any(layer.any_steps for layer in report.steps):
        lines.append(_on_steps(report))
    if report.rereads:
        lines.append(
            f"the last token of {_count(report.rereads, 'prompt')} was read again from the pruned cache"
        )
    lines += report.weights
    lines.append(f"deciding took {report.seconds:.3g} s")
    if report.guide is not None:
        lines.append(str(report.guide))
    # A spec may hold text of others, and so may what a policy says it requested.
    return "\n".join(printable(line) for line in [*lines, *(f"warning: {w}" for w in report.warnings)])


def _on_steps(report: ReportFacts) -> str:
    read = sum(layer.bytes_read_per_step for layer in report.steps) / _MIB
    state = sum(layer.bytes_of_state for layer in report.steps) / _MIB
    steps = _count(max(layer.steps for layer in report.steps), "step")
    rejected = max(layer.rejected for layer in report.steps)
    drafts = f" and {_count(rejected, 'rejected draft')}" if rejected else ""
    host = sum(layer.bytes_on_host for layer in report.steps) / _MIB
    staged = sum(layer.bytes_staged for layer in report.steps) / _MIB
    away = f"; {host:.2f} MiB lie in host memory, with copies of at most {staged:.2f} MiB" if host else ""
    return (
        f"a decode step reads {report.read_fraction:.1%} of what is held ({read:.2f} MiB, mean over "
        f"{steps}{drafts}), and frees only what the policy "
        f"drops; the policy's state takes {state:.3f} MiB{away}"
    )


def _by_bits(layer: LayerReceipt) -> str:
    if not layer.quantized:
        return ""
    return "  " + ", ".join(f"{width} at {bits}" for bits, width in layer.widths.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
