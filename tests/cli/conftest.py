"""A tiny random model with a tokenizer, as a folder, and the command line as it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.spec import Attention, FeedForward, LayerSpec, StateSpace
from layerwise.testing.stacks import random_stack


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers over a byte-level vocabulary."""
    return saved(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state space, attention, and a state space alone."""
    space = StateSpace(heads=8, head_dim=16, state=8, groups=2)
    attention = LayerSpec(Attention(heads=4, kv_heads=2, head_dim=16), FeedForward(width=128))
    rows = (replace(attention, mixer=space), attention, LayerSpec(space, None))
    return saved(tmp_path_factory.mktemp("cli") / "hybrid", rows)


def saved(folder: Path, rows: tuple[LayerSpec, ...] = ()) -> Path:
    """A random model in bfloat16 with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<end>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    folder = random_stack(4, vocabulary=len(vocabulary), dtype="bfloat16", rows=rows).save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def layerwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, check: bool = True) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        done = Ran(end.value.code or 0, *capsys.readouterr())
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
