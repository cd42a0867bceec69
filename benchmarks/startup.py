"""How long a user waits for the command line's help, and for a model to open."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import Row, interleaved

HELP, OPEN = 0.5, 1.0
COMMANDS = {
    "help": [sys.executable, "-m", "layerwise", "--help"],
    "torch": [sys.executable, "-c", "import torch"],
    "open": [sys.executable, "-c", "import layerwise as lw; lw.open('smollm2')"],
}


def rows() -> list[Row]:
    """Wall time of whole processes."""
    seconds = interleaved({
        name: lambda command=command: subprocess.run(command, capture_output=True, check=True)
        for name, command in COMMANDS.items()
    }, repeats=5)
    opening = seconds["open"] - seconds["torch"]
    return [
        Row("`layerwise --help`", f"{seconds['help']:.2f} s", seconds["help"] / HELP, 1.0, "less", "Python alone"),
        Row("open smollm2, beyond `import torch`", f"{opening:.2f} s; import torch {seconds['torch']:.2f} s",
            opening / OPEN, 1.0, "less", "reads headers only"),
    ]
