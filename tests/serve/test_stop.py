"""How the server ends: what runs may finish, within limits, and the process leaves quietly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from layerwise.stack.decoder import DecoderStack
from tests.serve.served import serving
from tests.serve.test_clients import body, post

ROOT = Path(__file__).parents[2]


@contextmanager
def process(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`layerwise serve` as a user starts it, and its address."""
    command = [sys.executable, "-m", "layerwise", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if "serving" in line:
                    yield running, line.split(" on ")[1].split()[0]
                    break
        finally:
            running.kill()


def test_sigterm_lets_a_stream_finish(tiny_folder: Path) -> None:
    with process(tiny_folder, "--grace", "20", "--json") as (running, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=200, temperature=0, stream=True,
                                           extra_body={"ignore_eos": True})
        first = next(stream).choices[0].text
        running.send_signal(signal.SIGTERM)
        pieces = [first, *(chunk.choices[0].text for chunk in stream)]
        out, _ = running.communicate(timeout=20)
        assert running.returncode == 0
        assert json.loads(out.splitlines()[-1])["requests_finished_total"] == 1
        assert len("".join(pieces)) > 100


def test_after_the_grace_a_stream_is_ended_with_an_error(talker: DecoderStack) -> None:
    async def last(served: object) -> str:
        reader, writer = await post(served, body("abc", 250, n=16))  # type: ignore[arg-type]
        await reader.readuntil(b"data: ")
        stopping.set()
        text = (await reader.read()).decode()
        writer.close()
        return [line for line in text.splitlines() if line.startswith("data: ")][-1]

    stopping = threading.Event()
    began = 0.0
    found: list[str] = []
    with serving(talker, grace=0.05) as served:
        asking = threading.Thread(target=lambda: found.append(asyncio.run(last(served))))
        asking.start()
        assert stopping.wait(20)
        began = time.monotonic()
    asking.join(20)
    assert "stopping" in found[0] and time.monotonic() - began < 10


def test_an_address_in_use_is_told_before_the_model_is_read(
    served: object, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from layerwise.cli import main
    from tests.serve.served import Served

    assert isinstance(served, Served)
    with pytest.raises(SystemExit) as end:
        main(["serve", "nowhere", "--port", str(served.port)])
    assert end.value.code == 2 and f":{served.port}" in capsys.readouterr().err.splitlines()[0]
    assert urllib.request.urlopen(f"{served.url}/health", timeout=10).status == 200


def test_a_missing_package_names_the_extra(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from layerwise.cli import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as end:
        main(["serve", str(tiny_folder), "--port", "0"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "'uvicorn'" in said and "pip install 'layerwise[serve]'" in said
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_folder), "--port", "0", "--dtype", "int3"])
    assert "--dtype int3" in capsys.readouterr().err
