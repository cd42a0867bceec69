"""llama.cpp's own quantizer as a baseline: its mixtures, read back into the decoder that runs everything else.

    python -m benchmarks.peers.llamacpp smollm2 build/llamacpp/smollm2

Needs the program `llama-quantize` of llama.cpp, on the path or named by LLAMA_QUANTIZE. The importance matrix is
the mean square of every input channel over calibration text, in llama.cpp's own file format; as with its own
tool, embedding and head have none. Files that are there already are used again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import layerwise as lw
from layerwise.data.text import TextData, text_blocks
from layerwise.export.gguf import GGUF
from layerwise.export.gguf_tensors import INNER
from layerwise.export.source import Source
from layerwise.io.gguf import GGUFFile
from layerwise.nets.decoder import MATRICES, Block
from layerwise.stack.decoder import DecoderStack
from layerwise.transform.moments import watching

MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
BLOCKS, LENGTH = 64, 512


def llamacpp_mixtures(stack: DecoderStack, folder: str | Path, calibration: TextData | None = None
                      ) -> dict[str, tuple[int, DecoderStack]]:
    """Name of a mixture to the bytes of its weights and the model opened from its file.

    Bytes are those of the tensors; the file also holds the tokenizer, which no other method is charged for.
    `calibration` defaults to 64 blocks of 512 tokens of the default text's calibration split.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dense, matrix = folder / "dense.gguf", folder / "imatrix.gguf"
    if not dense.exists():
        GGUF().write(Source(stack), dense)
    if not matrix.exists():
        assert stack.tokenizer is not None
        data = calibration or text_blocks("default", stack.tokenizer, length=LENGTH, blocks=BLOCKS)
        write_importance(importance(stack, data), data, matrix)
    found = {}
    for name in MIXTURES:
        path = folder / f"{name}.gguf"
        if not path.exists():
            quantize(dense, matrix, name, path)
        opened = lw.open(path)
        assert isinstance(opened, DecoderStack)
        opened.tokenizer = stack.tokenizer
        found[name] = weight_bytes(path), opened
    return found


@torch.inference_mode()
def importance(stack: DecoderStack, data: TextData) -> dict[str, Tensor]:
    """Sum of squares of every input channel, [I], by GGUF tensor name, over all tokens."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x_NI: Tensor) -> None:
        square_I = x_NI.float().square().sum(0)
        sums[name] = sums[name] + square_I if name in sums else square_I

    states = [stack.start(batch.tokens_BT, batch.mask_BT) for batch in data.batches(8)]
    for layer in range(len(stack)):
        block = stack.block(layer)
        assert isinstance(block, Block)
        named = {f"blk.{layer}.{INNER[f'{MATRICES[name]}.body.{name}']}.weight": module
                 for name, module in block.matrices().items()}
        with watching(named, see):
            states = [stack.run(state, slice(layer, layer + 1)) for state in states]
    return sums


def write_importance(sums: dict[str, Tensor], data: TextData, path: Path) -> None:
    """llama.cpp's imatrix file: sums of squares and the number of tokens they are over."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [data.name])
    writer.add_uint32("imatrix.chunk_count", len(data))
    writer.add_uint32("imatrix.chunk_size", data.length)
    for name, sum_I in sums.items():
        writer.add_tensor(f"{name}.in_sum2", sum_I[None].numpy().astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[data.tokens_NT.numel()]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(dense: Path, matrix: Path, mixture: str, path: Path) -> None:
    """Run llama-quantize. Raises RuntimeError with what it said where it fails."""
    beside = path.with_suffix(".partial")
    command = [program(), "--imatrix", str(matrix), str(dense), str(beside), mixture, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-500:]}")
    beside.replace(path)


def program() -> str:
    """Where llama-quantize is. Raises RuntimeError where it is nowhere."""
    found = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if found is None:
        raise RuntimeError("llama-quantize is not on the path: build llama.cpp, or set LLAMA_QUANTIZE")
    return found


def weight_bytes(path: Path) -> int:
    """Bytes of the tensors in a GGUF file."""
    return sum(tensor.stop - tensor.start for tensor in GGUFFile(path).tensors.values())


def types(path: Path) -> Counter[str]:
    """How many matrices have which type."""
    file = GGUFFile(path)
    return Counter(file.type_name(name) for name, tensor in file.tensors.items() if len(tensor.shape) > 1)


def main(model: str, folder: str) -> None:
    stack = lw.open(model)
    assert isinstance(stack, DecoderStack)
    print("| mixture | file | weights | bits a weight | types |\n|---|---|---|---|---|")
    for name, (size, opened) in llamacpp_mixtures(stack, folder).items():
        path = Path(folder) / f"{name}.gguf"
        kinds = ", ".join(f"{count} {kind}" for kind, count in types(path).most_common())
        print(f"| {name} | {path.stat().st_size:,} | {size:,} | {8 * size / opened.spec.parameters():.2f} | {kinds} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
