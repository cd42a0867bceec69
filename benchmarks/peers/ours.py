"""The engine as a worker: `python -m benchmarks.peers.ours MODEL [--lookup]`."""

from __future__ import annotations

import sys

import layerwise as lw
from benchmarks.peers.worker import work
from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params

if __name__ == "__main__":
    engine = Engine(lw.open(sys.argv[1]), drafter=Lookup() if "--lookup" in sys.argv else None)
    work(lambda prompts, new: [list(completion.tokens) for completion in engine.generate(
        prompts, Params(max_tokens=new, stop_ids=()))])
