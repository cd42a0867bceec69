"""A second English text that every Python carries: what modules of the standard library say about themselves.

It shares no source with the help topics of the language, so it serves as text of another kind: prose, reference and
examples of about forty modules, some 350,000 characters. The wording follows the Python version.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "argparse", "ast", "bdb", "calendar", "codecs", "collections", "concurrent.futures", "configparser", "contextlib",
    "copy", "csv", "difflib", "doctest", "email.message", "enum", "fileinput", "fractions", "ftplib", "gettext",
    "heapq", "http.client", "http.cookiejar", "imaplib", "inspect", "ipaddress", "logging", "mimetypes", "optparse",
    "pickletools", "pkgutil", "pprint", "random", "shutil", "smtplib", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "traceback", "turtle", "typing", "uuid",
    "zipfile",
)  # fmt: skip


def docstrings() -> Iterator[str]:
    """The docstrings of each module in the order of its source, one document a module; absent modules are left out."""
    for name in MODULES:
        path = _source(name)
        if path is not None:
            found = [text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if (text := _text(node))]
            yield "\n\n".join(found)


def _source(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    path = Path(spec.origin) if spec and spec.origin else None
    return path if path and path.suffix == ".py" and path.is_file() else None


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node)
    return None
