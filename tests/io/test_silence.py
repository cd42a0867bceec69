"""What C prints in silence reaches nobody, and what is printed before and after reaches everybody."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRINTING = """
import ctypes, os, sys
from layerwise.io.silence import silent
say = ctypes.CDLL(None).puts
print("before")
with silent():
    say(b"unwanted")
    os.write(1, b"unwanted")
print("after")
say(b"wanted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="loads the C library of POSIX")
def test_nothing_is_heard_and_nothing_else_is_lost() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["after", "before", "wanted"]


def test_without_standard_output_nothing_changes() -> None:
    closed = "import os\nfrom layerwise.io.silence import silent\nos.close(1)\nwith silent():\n    done = 1\n"
    subprocess.run([sys.executable, "-c", closed + "os._exit(0)"], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="closes it as a POSIX shell does")
def test_started_without_standard_output_nothing_changes() -> None:
    """Python has no `sys.stdout` then."""
    program = "import sys\nfrom layerwise.io.silence import silent\nassert sys.stdout is None\nwith silent(): pass"
    subprocess.run(["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program], check=True)
