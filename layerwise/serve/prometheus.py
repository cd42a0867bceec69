"""Counters and gauges in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping

from layerwise.serve.service import Service


def text(service: Service, statuses: Mapping[int, int]) -> str:
    """The engine's numbers, answers by status, and times, each with its type."""
    lines = []
    for name, value in service.engine.engine.metrics().items():
        lines += [f"# TYPE layerwise_{name} {'counter' if name.endswith('_total') else 'gauge'}",
                  f"layerwise_{name} {value:g}" if isinstance(value, float) else f"layerwise_{name} {value}"]
    lines.append("# TYPE layerwise_http_responses_total counter")
    lines += [f'layerwise_http_responses_total{{status="{status}"}} {count}'
              for status, count in sorted(statuses.items())]
    for name, spread in (("first_token", service.first_token), ("request", service.answered)):
        lines += [f"# TYPE layerwise_{name}_seconds summary", f"layerwise_{name}_seconds_sum {spread.total:.6f}",
                  f"layerwise_{name}_seconds_count {spread.count}"]
    return "\n".join(lines) + "\n"
