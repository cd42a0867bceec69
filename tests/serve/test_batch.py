"""Files of prompts: in order, every line exactly once, whatever interrupts the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import main
from layerwise.errors import BadFile
from layerwise.serve.batch import Results, read
from layerwise.serve.engine import Engine
from layerwise.serve.offline import in_groups
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack

ROOT = Path(__file__).parents[2]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def batch(folder: Path, model: Path, *options: str) -> dict[str, Any]:
    """Run the command; its JSON."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["batch", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "-m", str(model), "--json", *options])
    assert not end.value.code, out.getvalue()
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found


def write(folder: Path, values: list[Any]) -> None:
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    (folder / "in.jsonl").write_text("\n".join(texts) + "\n")


def test_every_form_of_line_is_answered_in_order(
    tmp_path: Path, tiny_folder: Path, talker: DecoderStack
) -> None:
    wrapped = {"custom_id": "mine", "method": "POST", "url": "/v1/chat/completions",
               "body": {"model": "gpt-4", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}}
    write(tmp_path, [{"prompt": "zebra", "max_tokens": 6}, wrapped, "", {"prompt": "abc", "custom_id": "x"},
                     {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "abc", "n": 2}])
    done = batch(tmp_path, tiny_folder, "-n", "4")
    found = lines(tmp_path / "out.jsonl")
    assert [entry["line"] for entry in found] == [1, 2, 4, 5, 6] and done["failed"] == [] and done["lines"] == 5
    engine = Engine(talker, cache_tokens=1024)
    texts = [each.text for each in engine.generate(["zebra", "abc", "[user]hi\n[assistant]"], [
        Params(max_tokens=6), Params(max_tokens=4), Params(max_tokens=4)])]
    assert [found[0]["text"], found[2]["text"], found[3]["text"]] == texts
    answer = found[1]["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == texts[2] and found[1]["custom_id"] == "mine" and found[2]["custom_id"] == "x"
    assert [choice["text"] for choice in found[4]["choices"]] == [texts[1]] * 2
    assert not list(tmp_path.glob(".*"))


def test_wrong_lines_are_named_and_harm_no_other(
    tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, ["{", {"prompt": "abc"}, [], {"prompt": "a" * 999}, {"prompt": "a", "max_tokens": -1},
                     {"body": 5}, {"body": {"prompt": "a"}, "url": "/v1/embeddings", "custom_id": "c"}, "\ud83d{"[1:],
                     {"prompt": "a", "stream": True}, {"prompt": [99999]}, {"custom_id": 5, "prompt": "a"}])
    done = batch(tmp_path, tiny_folder, "-n", "2")
    found = lines(tmp_path / "out.jsonl")
    assert [entry["line"] for entry in found] == list(range(1, 12))
    assert [entry["line"] for entry in found if entry.get("error")] == [1, *range(3, 12)]
    assert sorted(entry["line"] for entry in done["failed"]) == [1, *range(3, 12)]
    said = capfd.readouterr().err
    assert "line 4: " in said and "999" in said and "256" in said
    assert found[6]["custom_id"] == "c" and found[6]["response"] is None


def test_what_is_done_is_not_done_again(tmp_path: Path, tiny_folder: Path) -> None:
    write(tmp_path, [{"prompt": f"p{number}"} for number in range(6)])
    batch(tmp_path, tiny_folder, "-n", "3")
    first = lines(tmp_path / "out.jsonl")
    again = batch(tmp_path, tiny_folder, "-n", "3")
    assert again["before"] == 6 and again["tokens"] == 0 and lines(tmp_path / "out.jsonl") == first
    write(tmp_path, [{"prompt": f"p{number}"} for number in (0, 1, 9, 3, 4, 5)])
    changed = batch(tmp_path, tiny_folder, "-n", "3")
    found = lines(tmp_path / "out.jsonl")
    assert changed["before"] == 5 and found[:2] + found[3:] == first[:2] + first[3:] and found[2] != first[2]
    assert batch(tmp_path, tiny_folder, "-n", "4", "-o", str(tmp_path / "other.jsonl"))["before"] == 0


def test_a_file_with_other_results_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": "a"}])
    (tmp_path / "out.jsonl").write_text('{"id": "mine"}\n')
    results = Results(tmp_path / "out.jsonl")
    with pytest.raises(BadFile, match="other results"):
        results.resume(read(tmp_path / "in.jsonl", {}))
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "mine"}\n'


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_file_with_nothing_in_it_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(BadFile, match=r"in\.jsonl"):
        read(tmp_path / "in.jsonl", {})


def test_a_killed_batch_goes_on_without_losing_or_repeating_a_line(tmp_path: Path, tiny_folder: Path) -> None:
    count = 60
    write(tmp_path, [{"prompt": f"{number} times", "max_tokens": 20, "ignore_eos": True} for number in range(count)])
    command = [sys.executable, "-m", "layerwise", "batch", "in.jsonl", "-o", "out.jsonl", "-m", str(tiny_folder),
               "--running", "1"]
    partial = tmp_path / ".out.jsonl.partial"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as running:
        while not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    kept = partial.read_bytes()
    assert 3 <= kept.count(b"\n") < count and not (tmp_path / "out.jsonl").exists()
    partial.write_bytes(kept + b'{"id": "line-cut off in the mid')
    done = batch(tmp_path, tiny_folder)
    found = lines(tmp_path / "out.jsonl")
    assert done["before"] == kept.count(b"\n") and [entry["line"] for entry in found] == list(range(1, count + 1))
    assert [text for text in kept.decode().splitlines() if json.loads(text) not in found] == []
    (tmp_path / "out.jsonl").unlink()
    assert batch(tmp_path, tiny_folder)["before"] == 0
    assert [entry["text"] for entry in lines(tmp_path / "out.jsonl")] == [entry["text"] for entry in found]


def test_torn_answers_are_given_again(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    given = read(tmp_path / "in.jsonl", {})
    results = Results(tmp_path / "out.jsonl")
    results.resume(given)
    results.add(given[1].id, {"id": given[1].id, "text": "é"})
    with results.partial.open("ab") as file:
        file.write(b'{"id": "' + given[0].id.encode())
    again = Results(tmp_path / "out.jsonl")
    again.resume(given)
    assert set(again.done) == {given[1].id}
    again.add(given[0].id, {"id": given[0].id, "text": "x"})
    again.finish(given)
    assert [entry["text"] for entry in lines(tmp_path / "out.jsonl")] == ["x", "é"]


def test_equal_beginnings_are_worked_on_together(tmp_path: Path) -> None:
    beginning, other = "a" * 200, "b" * 200
    write(tmp_path, [{"prompt": f"{beginning}{number} {'c' * 70}", "max_tokens": 2} for number in range(2)]
          + [{"prompt": f"{other}{number}", "max_tokens": 90} for number in range(2)]
          + [{"prompt": beginning + "9", "max_tokens": 2}, {"messages": [{"role": "user", "content": "hi"}]}, "{"])
    found = in_groups(read(tmp_path / "in.jsonl", {}))
    assert [line.number for line in found] == [6, 3, 4, 5, 1, 2, 7]
