"""llama.cpp as a worker: `PYTHON -m benchmarks.peers.llamacpp_generate FILE`, with llama-cpp-python 0.3.36.

One sequence at a time, as its Python interface has it. Tokens are taken by `argmax` of the logits of the last position.
"""

from __future__ import annotations

import os
import sys

import llama_cpp
import numpy as np

from benchmarks.peers.worker import work


def main(path: str) -> None:
    threads = os.cpu_count() or 1
    model = llama_cpp.Llama(path, n_ctx=2048, n_batch=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    vocabulary = model.n_vocab()

    def last() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def follow(prompt: list[int], new: int) -> list[int]:
        model.reset()
        model.eval(prompt)
        tokens = [last()]
        while len(tokens) < new:
            model.eval(tokens[-1:])
            tokens.append(last())
        return tokens

    work(lambda prompts, new: [follow(prompt, new) for prompt in prompts])


if __name__ == "__main__":
    main(sys.argv[1])
