"""transformers' own `generate` as a worker: `python -m benchmarks.peers.transformers_generate FOLDER DTYPE`.

Several prompts are one batch, padded on the left.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import work


def main(folder: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, pad_token_id=0)
        return found[:, longest:].tolist()

    work(generate)


if __name__ == "__main__":
    main(*sys.argv[1:])
