"""The result in sentences: what a reader should know before looking at any chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerwise.report.layers import GONE
from layerwise.report.report import Report
from layerwise.report.table import size, speed


def summary(report: Report, tried: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Three to seven sentences: size, quality, speed, what the layers got, healing, and how controls fared."""
    made = [_layers(report), *_healing(report), *_controls(tried)]
    sentences = [_size(report), _quality(report), *_speed(report), *made]
    return [sentence for sentence in sentences if sentence]


def _size(report: Report) -> str:
    a, b = report.before, report.after
    share = 100 * b.bytes / a.bytes
    cache = ""
    if a.cache_bytes is not None and b.cache_bytes is not None and b.cache_bytes < a.cache_bytes:
        cache = f", and {100 * b.cache_bytes / a.cache_bytes:.1f} % of its cache"
    return f"{report.model} takes {size(b.bytes)} instead of {size(a.bytes)}: {share:.1f} % of its bytes{cache}."


def _quality(report: Report) -> str:
    ratio = report.perplexity_ratio
    low, value, high = (100 * (part - 1) for part in (ratio.low, ratio.value, ratio.high))
    tokens = report.provenance.get("blocks", 0) * report.provenance.get("tokens per block", 0)
    where = f" on {tokens:,} tokens of text" if tokens else ""
    if low <= 0 <= high:
        verdict = "which cannot be told from no change"
    else:
        verdict = "worse than before" if value > 0 else "better than before"
    return (
        f"Perplexity{where} goes from {report.before.perplexity:.2f} to {report.after.perplexity:.2f}: "
        f"{value:+.2f} % (95 % interval {low:+.2f} to {high:+.2f}), {verdict}. "
        f"Both models put the same token first at {100 * report.agreement.value:.1f} % of positions."
    )


def _speed(report: Report) -> Iterator[str]:
    a, b = report.before, report.after
    if a.decode_tokens_per_s and b.decode_tokens_per_s:
        yield (
            f"It writes {speed(b.decode_tokens_per_s)} tokens/s instead of {speed(a.decode_tokens_per_s)} "
            f"({b.decode_tokens_per_s / a.decode_tokens_per_s:.2f} times as fast) on this machine."
        )
    if a.peak_memory_bytes and b.peak_memory_bytes:
        yield (
            f"A process that runs it peaks at {size(b.peak_memory_bytes)} of memory instead of "
            f"{size(a.peak_memory_bytes)}, Python and PyTorch included."
        )


def _layers(report: Report) -> str:
    rows = [change for change in report.layers if isinstance(change.layer, int)]
    dropped = sum(change.got == "dropped" for change in rows)
    widths = [bits for change in rows for bits in change.bits.values() if bits != GONE]
    words = []
    if dropped:
        words.append(f"{dropped} of {len(rows)} layers were dropped")
    if widths:
        counted = sorted(((widths.count(width), width) for width in set(widths)), reverse=True)
        held = ", ".join(f"{count} at {width:g}" for count, width in counted)
        words.append(f"bits of the {len(widths)} matrices in the layers: {held}")
    text = "; ".join(words)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _healing(report: Report) -> Iterator[str]:
    if report.healing:
        yield f"It was healed by learning from the original: {report.healing}."


def _controls(tried: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    chosen = next((point for point in tried if point["kind"] == "plan"), None)
    controls = [point for point in tried if point["kind"] == "control"]
    if not chosen or not controls:
        return
    best = min(controls, key=lambda point: point["kl"])
    relation = "nearer to" if chosen["kl"] < best["kl"] else "no nearer to"
    yield (
        f"The chosen plan is {relation} the original than the best of {len(controls)} controls within the "
        f"same budget ({best['name']}): KL {chosen['kl']:.4f} against {best['kl']:.4f} nats/token on "
        "calibration text."
    )
