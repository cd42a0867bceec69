"""How an engine is measured in a process and an environment of its own.

A worker loads a model once. Every line it reads is a job, `{"prompts": [[token, ...], ...], "new": n}`: continue each
prompt by n tokens, the likeliest ones, with no end before that. Every line it writes is a result: seconds, the tokens,
and the bytes that the process had resident at most. Only the standard library is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def work(generate: Generate) -> None:
    """Answer jobs from standard input until it is closed; what libraries print goes to standard error."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        start = time.perf_counter()
        tokens = generate(job["prompts"], job["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak": peak()}), file=replies, flush=True)


def peak() -> int:
    """Bytes that this process had resident at most."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
