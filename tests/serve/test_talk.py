"""Conversations in the terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.errors import BadData
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.serve.talk import Talk
from layerwise.stack.decoder import DecoderStack


def talk(stack: DecoderStack, tokens: int = 8, system: str | None = None) -> Talk:
    return Talk(Engine(stack, running=1, cache_tokens=2048), Params(max_tokens=tokens), system)


def test_an_answer_sees_the_turns_before_it(talker: DecoderStack) -> None:
    one = talk(talker, system="s")
    first, second = "".join(one.say("hi")), "".join(one.say("more"))
    roles = [message["role"] for message in one.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"] and one.written == 8
    prompt = f"[system]s\n[user]hi\n[assistant]{first}\n[user]more\n[assistant]"
    [expected] = Engine(talker, cache_tokens=1024).generate([prompt], Params(max_tokens=8))
    assert second == expected.text
    one.clear()
    assert [message["role"] for message in one.messages] == ["system"]
    assert "".join(one.say("hi")) == first


def test_an_interrupted_answer_stays_as_far_as_it_came(talker: DecoderStack) -> None:
    one = talk(talker, 100)
    pieces = one.say("hi")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert one.messages[-1] == {"role": "assistant", "content": shown}
    assert not one.engine.busy
    assert "".join(one.say("and?"))
    one.engine.check_integrity()


def test_turns_that_no_longer_fit_are_forgotten(talker: DecoderStack) -> None:
    one = talk(talker, 40, system="s")
    for _ in range(4):
        "".join(one.say("a" * 60))
    assert one.forgotten >= 2 and len(one.messages) == 9
    with pytest.raises(BadData, match="408"):
        list(one.say("a" * 380))
    assert len(one.messages) == 9 and "".join(one.say("b"))


def test_the_command_answers_piped_lines(
    tiny_folder: object, talker: DecoderStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/clear\n/help\nhi\n/exit\nnever\n"))
    with pytest.raises(SystemExit) as end:
        main(["chat", str(tiny_folder), "-t", "0", "-n", "6", "--json"])
    assert not end.value.code
    said = capsys.readouterr()
    messages = json.loads(said.out)["messages"]
    expected = "".join(talk(talker, 6).say("hi"))
    assert messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": expected}]
    assert said.err.count("> hi") == 2 and "6 tokens" in said.err and "never" not in said.err
    assert said.err.count("Ctrl-C") == 1


def _at_a_terminal() -> None:
    """What a shell does for a command in the foreground, whatever started the tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The command in a terminal of its own: what is on the screen so far, and a keyboard."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = os.openpty()
        self.running = subprocess.Popen(
            [sys.executable, "-m", "layerwise", *command], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_at_a_terminal,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm"})
        os.close(theirs)
        self.screen, self._seen = "", 0

    def until(self, text: str, key: str = "") -> None:
        """Wait until `text` is on the screen after what was waited for before; `key` is pressed until it is."""
        end = time.monotonic() + 60
        self.type(key)
        while (place := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"{text!r} does not come: {self.screen!r}"
            if select.select([self._ours], [], [], 0.5)[0]:
                self.screen += os.read(self._ours, 1 << 16).decode(errors="replace")
            else:
                self.type(key)
        self._seen = place + len(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ends(self, key: str) -> int:
        """Press `key` until the command ends; its status."""
        for _ in range(60):
            self.type(key)
            with suppress(subprocess.TimeoutExpired):
                return self.running.wait(1)
        raise AssertionError(f"it goes on: {self.screen!r}")

    def close(self) -> None:
        self.running.kill()
        self.running.wait()
        os.close(self._ours)


def test_a_terminal_interrupts_an_answer_and_goes_on(tiny_folder: Path) -> None:
    terminal = Terminal("chat", str(tiny_folder), "-t", "0", "-n", "200")
    try:
        terminal.until("Ctrl-C interrupts")
        terminal.until("> ")
        terminal.type("/what\n")
        terminal.until("Ctrl-C interrupts")
        terminal.type("hi\n")
        terminal.until("tokens/s")
        terminal.until("> ")
        terminal.type("more\n")
        terminal.until("more")
        terminal.until("> ", key="\x03")  # in the midst of the answer, or after it where that was fast
        terminal.until("Ctrl-D ends", key="\x03")
        terminal.until("> ")
        assert terminal.ends("\x04") == 0
    finally:
        terminal.close()
