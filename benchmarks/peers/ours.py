"""The engine as a worker: `python -m benchmarks.peers.ours MODEL [--lookup] [--cache int8]`."""

from __future__ import annotations

import argparse

import layerwise as lw
from benchmarks.peers.worker import work
from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.serve.table import layer_table

if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("--lookup", action="store_true")
    options.add_argument("--cache")
    given = options.parse_args()
    stack = lw.open(given.model)
    engine = Engine(stack, drafter=Lookup() if given.lookup else None,
                    table=layer_table(stack.spec, precision=given.cache) if given.cache else None)
    work(lambda prompts, new: [list(completion.tokens) for completion in engine.generate(
        prompts, Params(max_tokens=new, stop_ids=()))])
