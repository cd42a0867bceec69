"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_names() -> list[str]:
    """What completes a model's name besides paths."""
    return ["smollm2", "gemma3-270m", "tiny-vlm"]


def words(text: str) -> list[str]:
    """`a, b` as ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def full(name: str) -> str:
    """A path in full, since the same one means another place in another folder; other names as they are."""
    return str(Path(name).resolve()) if Path(name).exists() else name


Model = Annotated[
    str,
    typer.Argument(help="Demo name, Hugging Face folder or id, or .gguf file.", autocompletion=demo_names),
]
AnyModel = Annotated[
    str,
    typer.Argument(help="Demo name, Hugging Face folder or id, .gguf file, or code that makes a module: "
                        "package.module:name or FILE.py:name.", autocompletion=demo_names),
]
Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Folder for everything the command makes; by default one under runs/ by its arguments.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew instead of resuming the run in the folder.")]
Data = Annotated[
    str,
    typer.Option("--data", help="Text: default, a .txt/.md/.jsonl file or a folder of them, hf:<data set>:<split>."),
]
AnyData = Annotated[
    str,
    typer.Option("--data", help="Text: default, a .txt/.md/.jsonl file or a folder of them, hf:<data set>:<split>. For "
                                "modules FILE.py:name, batches of (inputs, labels) or inputs, or what makes them."),
]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:1.")]
CachePrecision = Annotated[
    str, typer.Option("--cache-precision", help="What caches hold: model (as computed), int8 or int4.")
]
Layers = Annotated[
    Path | None,
    typer.Option("--layers", help="JSON file that says layer by layer what caches hold; see docs/serve.md."),
]
Seed = Annotated[int, typer.Option("--seed", help="Draws the text blocks and everything random.")]
