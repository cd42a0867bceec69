"""A report as words and as a plain table, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from layerwise.data.bootstrap import Interval
from layerwise.report.layers import LayerChange, runs
from layerwise.report.report import Measurement, Paired, Report

Row = tuple[str, str, str, str]


def text(report: Report) -> str:
    """The whole report: sizes, speeds and quality before and after, what each layer got, and notes."""
    parts = [
        _aligned([("", "before", "after", "change"), *rows(report)]),
        predictions(report),
        got(report.layers),
    ]
    if report.tests:
        parts.append("\n".join(f"{name}: {answer}" for name, answer in negligible(report)))
    if report.healing:
        parts.append(f"healing: {report.healing}")
    if report.notes:
        parts.append("\n".join(f"note: {note}" for note in report.notes))
    return "\n\n".join(parts)


def rows(report: Report) -> list[Row]:
    """(quantity, before, after, change), ready to print."""
    a, b = report.before, report.after
    return [
        ("stored bytes", size(a.bytes), size(b.bytes), share(a.bytes, b.bytes)),
        ("parameters", millions(a.parameters), millions(b.parameters), share(a.parameters, b.parameters)),
        *_cache(a, b),
        ("decode tokens/s", *_speeds(a.decode_tokens_per_s, b.decode_tokens_per_s)),
        ("prefill tokens/s", *_speeds(a.prefill_tokens_per_s, b.prefill_tokens_per_s)),
        ("peak memory", *_memory(a, b)),
        ("perplexity", _perplexity(a), _perplexity(b), percent_change(report.perplexity_ratio)),
        *_text_rows(report),
        *_task_rows(report),
    ]


def predictions(report: Report) -> str:
    """How far the new predictions are from the old, in one line."""
    return (
        f"predictions: KL {report.kl.value:.4f} nats/token [{report.kl.low:.4f}, {report.kl.high:.4f}], "
        f"same first choice {100 * report.agreement.value:.1f} % "
        f"[{100 * report.agreement.low:.1f}, {100 * report.agreement.high:.1f}]"
    )


def negligible(report: Report) -> list[tuple[str, str]]:
    """(what was compared, whether its difference is negligible and after how many items that was known)."""
    return [(name, _answer(test, name.startswith("accuracy"))) for name, test in report.tests.items()]


def _answer(test: Paired, accuracy: bool) -> str:
    size = f"{100 * test.tolerance:g} points" if accuracy else f"{100 * math.expm1(test.tolerance):.1f} %"
    worse = "below" if accuracy else "above"
    said = {"within": f"the same to within {size}", "open": f"whether it changed by less than {size} cannot be told"}
    answer = said.get(test.verdict, f"{'worse' if test.verdict == worse else 'better'} by more than {size}")
    early = f"{test.items} of {test.available} items" if test.items < test.available else f"all {test.items} items"
    return f"{answer}, after {early}"


def got(changes: Sequence[LayerChange]) -> str:
    """Which layers got what, neighbours with the same merged."""
    lines = list(runs(changes))
    width = max(len("layers"), *(len(span) for span, _ in lines)) if lines else 0
    return "\n".join(f"{span:<{width}}  {words}" for span, words in [("layers", "got"), *lines])


def size(count: float) -> str:
    """Bytes for people: `148.0 MB`."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def share(before: float, after: float) -> str:
    """`55.0 %`."""
    return f"{100 * after / before:.1f} %" if before else ""


def percent_change(ratio: Interval) -> str:
    """`+0.7 % [+0.4, +1.0]`, from an interval of a ratio."""
    low, value, high = (100 * (part - 1) for part in (ratio.low, ratio.value, ratio.high))
    return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"


def speed(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return "not measured"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 100 else f"{tokens_per_s:.0f}"


def _speeds(before: float | None, after: float | None) -> tuple[str, str, str]:
    change = f"{after / before:.2f}x" if before and after else ""
    return speed(before), speed(after), change


def _memory(a: Measurement, b: Measurement) -> tuple[str, str, str]:
    before, after = a.peak_memory_bytes, b.peak_memory_bytes
    words = [size(value) if value else "not measured" for value in (before, after)]
    return words[0], words[1], share(before, after) if before and after else ""


def _cache(a: Measurement, b: Measurement) -> Iterator[Row]:
    """Reports of earlier versions do not say."""
    if a.cache_bytes is not None and b.cache_bytes is not None:
        words = [f"{value / 1e3:.2f} kB" for value in (a.cache_bytes, b.cache_bytes)]
        yield "cache per token", words[0], words[1], share(a.cache_bytes, b.cache_bytes)


def _perplexity(m: Measurement) -> str:
    low, high = m.perplexity_interval
    return f"{m.perplexity:.3f} [{low:.3f}, {high:.3f}]"


def _text_rows(report: Report) -> Iterator[Row]:
    for name, result in report.texts.items():
        change = percent_change(result.log_perplexity_change.map(math.exp))
        yield f"perplexity, {name}", f"{result.before:.3f}", f"{result.after:.3f}", change


def _task_rows(report: Report) -> Iterator[Row]:
    for name, result in report.tasks.items():
        change = result.change
        points = f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}] points"
        yield name, f"{100 * result.before:.1f} %", f"{100 * result.after:.1f} %", points


def _aligned(table: Sequence[Row]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in table
    )
