"""Where text comes from: a file, a folder, a Hugging Face data set, a name, or nothing to download at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.data.docstrings import docstrings
from layerwise.data.split import Split
from layerwise.errors import BadData, BadFile, MissingExtra

READ_LIMIT = 16_000_000
SUFFIXES = (".txt", ".md", ".jsonl")
WIKITEXT = {"wikitext-2": False, "wikitext-2-detokenized": True}
_WIKITEXT_FILES: dict[Split | None, str] = {
    "calibration": "valid.txt",
    "verification": "test.txt",
    None: "test.txt",
}


def documents(source: str | Path, field: str = "text") -> Iterator[str]:
    """The documents of a source in a stable order, each ending in a blank line, up to READ_LIMIT characters.

    `source` is "default", "docstrings", a .txt, .md or .jsonl file, a folder of them, or
    "hf:<namespace>/<data set>[/<configuration>]:<split>", or "hf:<saved folder>:<split>". `field` names the
    text of a JSON line or of a data set's row. Raises BadFile for what cannot be read, BadData for what
    holds no text, MissingExtra for "hf:" without the extra `datasets`.
    """
    read = 0
    for document in _all_documents(source, field):
        if not document.strip():
            continue
        yield document[: READ_LIMIT - read].strip("\n") + "\n\n"
        read += len(document)
        if read >= READ_LIMIT:
            return
    if not read:
        raise BadData(
            f"{source} holds no text",
            expected="at least one paragraph",
            do="check the path, or the name of the text field",
        )


def default_text() -> Iterator[str]:
    """English that every Python carries: the help topics of the language.

    About 465,000 characters; the wording follows the Python version.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def data_folder() -> Path | None:
    """The folder named by the environment variable LAYERWISE_DATA, or None."""
    named = os.environ.get("LAYERWISE_DATA")
    return Path(named) if named else None


def wikitext(name: str, split: Split | None) -> tuple[str, str]:
    """(text, path) of WikiText-2: its own validation text to calibrate, its test text to verify.

    Raises BadData if the folder LAYERWISE_DATA does not hold it.
    """
    folder = data_folder()
    path = folder / "wikitext-2" / _WIKITEXT_FILES[split] if folder else None
    if path is None or not path.is_file():
        raise BadData(
            f"{name!r}, but there is no {path or 'folder LAYERWISE_DATA'}",
            expected="wikitext-2/valid.txt and wikitext-2/test.txt in the folder LAYERWISE_DATA",
            do="set LAYERWISE_DATA to a folder that holds them, or use 'default'",
        )
    text = _read(path)
    return (detokenized(text) if WIKITEXT[name] else text), str(path)


def detokenized(text: str) -> str:
    """WikiText with ordinary spacing: joins ` @-@ `, punctuation, brackets and quotes to their words."""
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    text = re.sub(r" ('(?:s|re|ve|ll|d|m|t))(?=\s)", r"\1", text)
    text = re.sub(r" ([.,:;!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


def _all_documents(source: str | Path, field: str) -> Iterator[str]:
    if source == "default":
        yield from default_text()
    elif source == "docstrings":
        yield from docstrings()
    elif str(source).startswith("hf:"):
        yield from _dataset(str(source), field)
    else:
        for path in _files(Path(source)):
            yield from _lines(path, field) if path.suffix == ".jsonl" else [_read(path)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadData(
            f"no text at {path}",
            expected=f"'default', 'docstrings', {', '.join(WIKITEXT)}, hf:<data set>:<split>, "
            f"or a {'/'.join(SUFFIXES)} file or folder",
            do="check the path; text itself goes through TextData.from_text",
        )
    found = sorted(child for child in path.rglob("*") if child.suffix in SUFFIXES and child.is_file())
    if not found:
        raise BadData(
            f"the folder {path} holds no text files",
            expected=f"files ending in {', '.join(SUFFIXES)}",
            do="convert the documents to one of these",
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(
            f"{path} is not text (byte {error.start} is not UTF-8)",
            expected="UTF-8 text",
            do="convert the file to UTF-8",
        ) from error


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(
                f"{path}, line {number}, is not JSON", expected="one JSON object a line", do="repair the line"
            ) from error
        yield _field(row, field, f"{path}, line {number},")


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise BadData(
            f"{where} has no text field {field!r}",
            expected=f"one of the fields it has: {keys}",
            do="name the right one with field=",
        )
    return str(row[field])


def _dataset(source: str, field: str) -> Iterator[str]:
    """Rows of a data set folder saved by `datasets`, or of one on the hub, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets", f"reading {source!r}") from error
    place, _, part = source.removeprefix("hf:").rpartition(":")
    if not place or not part:
        raise BadData(
            f"{source!r} names no split",
            expected="hf:<data set>[/<configuration>]:<split>",
            do="write for instance hf:Salesforce/wikitext/wikitext-2-raw-v1:validation",
        )
    try:
        if Path(place).is_dir():
            saved = datasets.load_from_disk(place)
            rows = saved[part] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            namespace_and_name, configuration = _hub_name(place)
            rows = datasets.load_dataset(namespace_and_name, configuration, split=part, streaming=True)
    except (ValueError, KeyError, OSError) as error:
        raise BadData(
            f"{source!r} could not be read: {error}",
            expected="a data set and one of its splits",
            do="check the name, the split and the network, or give a local file",
        ) from error
    for number, row in enumerate(rows):
        yield _field(row, field, f"{source}, row {number},")


def _hub_name(place: str) -> tuple[str, str | None]:
    """`namespace/name` and the configuration that may follow it."""
    parts = place.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None
