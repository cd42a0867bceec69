"""`Run`: a folder with everything one command produced, which the same command resumes after a kill.

    run.json         command, arguments, versions, what the model was, and which steps are finished
    scores.parquet   what was measured
    plan.json        what was decided
    model/           the result
    report.html      before and after
    log.txt          when each step began and ended

A step is finished once its file is in place and `run.json` says so, both written whole or not at all. The
value of a step is always read back from its file, so a resumed run continues from exactly what an
uninterrupted one had.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from layerwise.errors import BadFile, BadOption, LayerwiseError
from layerwise.io import atomic
from layerwise.report.machine import versions

S = TypeVar("S")
T = TypeVar("T")
FORMAT = "layerwise-run-1"


class Run:
    """An open run folder, locked against other processes until it is closed.

    `arguments` are what decides the result; `facts` what was noted along the way, such as the model's
    fingerprint. Use `Run.open`.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lock: int) -> None:
        self.folder, self._record, self._lock = folder, record, lock

    @classmethod
    def open(cls, folder: str | Path, command: str, arguments: Mapping[str, Any], *, fresh: bool = False) -> Run:
        """Start a run in `folder`, or resume the one that is there.

        `arguments` hold plain JSON values. `fresh` begins anew. Raises BadOption where the folder holds a
        run with other arguments, another version, or that another process is working on; BadFile where
        it holds something that is no run.
        """
        folder = Path(folder)
        _refuse_foreign(folder)
        _make(folder)
        lock = _locked(folder)
        try:
            if fresh:
                _clear(folder)
            wanted = {"command": command, "arguments": _plain(arguments), "versions": versions()}
            record = _read(folder)
            if record is None:
                record = {"format": FORMAT, **wanted, "facts": {}, "steps": {}}
                _write(folder, record)
            else:
                _compare(folder, record, wanted)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, record, lock)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._record["arguments"])

    @property
    def versions(self) -> dict[str, str]:
        return dict(self._record["versions"])

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self._record["facts"])

    @property
    def finished(self) -> dict[str, float]:
        """Seconds that each finished step took, in the order they were finished."""
        return {name: step["seconds"] for name, step in self._record["steps"].items()}

    def path(self, name: str) -> Path:
        """A place in the folder."""
        return self.folder / name

    def step(
        self,
        name: str,
        produce: Callable[[], S],
        *,
        file: str,
        save: Callable[[S, Path], Any],
        load: Callable[[Path], T],
    ) -> T:
        """The value of a step: from its file where it is finished, otherwise produced, saved and read back.

        `save` must write `file` (or folder) whole or not at all. Steps come in order: redoing one, because
        its file is gone, forgets the steps after it.
        """
        path = self.path(file)
        if name in self._record["steps"] and path.exists():
            self.log(f"{name}: already finished")
            return load(path)
        self._forget_from(name)
        self.log(f"{name}: begins")
        began = time.monotonic()
        save(produce(), path)
        seconds = round(time.monotonic() - began, 3)
        self._record["steps"][name] = {"file": file, "seconds": seconds}
        _write(self.folder, self._record)
        self.log(f"{name}: finished after {seconds:.1f} s")
        return load(path)

    def note(self, name: str, value: Any) -> None:
        """Record a plain value that must stay the same for the finished steps to be of use.

        Raises BadOption where the run has recorded another value, such as the fingerprint of another model.
        """
        facts = self._record["facts"]
        if name in facts and facts[name] != value:
            raise _other(self.folder, f"{name} {value!r}", f"{name} {facts[name]!r}")
        if name not in facts:
            facts[name] = value
            _write(self.folder, self._record)

    def log(self, text: str) -> None:
        """Append one line with the time to log.txt."""
        with self.path("log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that is under way
                self.log(f"stopped: {type(error).__name__}: {error}".splitlines()[0])
        if isinstance(error, LayerwiseError) and not self._record["steps"]:
            _abandon(self.folder)
        self.close()

    def _forget_from(self, name: str) -> None:
        steps = self._record["steps"]
        if name in steps:
            names = list(steps)
            for later in names[names.index(name) :]:
                del steps[later]
            _write(self.folder, self._record)


def default_folder(command: str, model: str, arguments: Mapping[str, Any]) -> Path:
    """`runs/<command>-<model>-<hash of the arguments>`: the same command finds its own run again."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or "model").strip("-.") or "model"
    text = json.dumps([command, _plain(arguments)], sort_keys=True)
    return Path("runs") / f"{command}-{short}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(arguments))
    return plain


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadFile(f"{folder} is a file", expected="a folder for the run", do="choose another folder with -o")
    if folder.is_dir() and not (folder / "run.json").exists():
        other = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if other:
            raise BadFile(
                f"{folder} holds {', '.join(other[:3])} but no run",
                expected="an empty folder, or a run",
                do="choose another folder with -o",
            )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(
            f"cannot make {folder}: {error.strerror}",
            expected="a writable place",
            do="choose another folder with -o",
        ) from error


def _locked(folder: Path) -> int:
    try:
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise BadFile(
            f"cannot write in {folder}: {error.strerror}",
            expected="a writable folder",
            do="choose another folder with -o",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise BadOption(
            f"{folder}, in which another process is working",
            expected="one process in a run folder",
            do="wait for it to end, or choose another folder with -o",
        ) from error
    return lock


def _clear(folder: Path) -> None:
    """Remove a run's own files; run.json goes last, so that a kill meanwhile leaves a run."""
    try:
        record = _read(folder) or {}
    except BadFile:
        record = {}
    files = {step["file"] for step in record.get("steps", {}).values()}
    files |= {"scores.parquet", "plan.json", "model", "healing", "healing.json", "report.html", "log.txt"}
    for name in [*sorted(files), "run.json"]:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _abandon(folder: Path) -> None:
    """Remove a run that was refused before it made anything; a folder with more in it stays."""
    made = {path.name for path in folder.iterdir()}
    if made <= {"run.json", "log.txt", ".lock"}:
        for name in sorted(made):
            (folder / name).unlink()
        folder.rmdir()


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        for key in ("command", "arguments", "versions", "facts", "steps"):
            record[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(
            f"{path} cannot be read: {error}",
            expected=f"a file in the format {FORMAT}",
            do="start anew with --fresh, or choose another folder with -o",
        ) from error
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    atomic.write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _compare(folder: Path, record: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if record["command"] != wanted["command"]:
        raise _other(folder, f"the command {wanted['command']!r}", f"the command {record['command']!r}")
    for part, word in (("arguments", ""), ("versions", "version ")):
        old, new = record[part], wanted[part]
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                raise _other(folder, f"{word}{name} = {new.get(name)!r}", f"{word}{name} = {old.get(name)!r}")


def _other(folder: Path, given: str, recorded: str) -> BadOption:
    return BadOption(
        f"{given} for the run in {folder}",
        expected=f"{recorded}, with which that run was started",
        do="choose another folder with -o, or start anew with --fresh",
    )
