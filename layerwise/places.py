"""Where downloaded, converted and compiled files are kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`LAYERWISE_CACHE` where it is set, else the platform's cache folder for this user."""
    if "LAYERWISE_CACHE" in os.environ:
        return Path(os.environ["LAYERWISE_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "layerwise"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "layerwise" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "layerwise"
