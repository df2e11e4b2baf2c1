"""Fixtures: the tiny model, and tiny/ with fewer rows; warnings of our calls are errors."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "tiny", ROOT / "benchmarks"))
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses: the thread count changes the last digits
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may reach for the network; test_hub.py brings its own

import common  # noqa: E402

torch.set_num_threads(1)


ROWS = {"train": 300, "annotated": 300, "ift": 200, "eft": 200, "prompts": 200}
OTHER_ROWS = 20


def pytest_configure(config):
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning",
                 "pytest.PytestUnraisableExceptionWarning"):  # a ResourceWarning ends up as one
        config.addinivalue_line("filterwarnings", f"error::{kind}")
    # peft's call of transformers, when a test loads adapters with it
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(autouse=True)
def signals():
    """What a Run does with SIGINT and SIGTERM ends with its test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def worlds(tmp_path_factory):
    """tiny/ with the first rows of its files only, so that runs start within a second."""
    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    shutil.copytree(common.TINY_FOLDER, folder)
    for path in folder.rglob("*.jsonl"):
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rows[:ROWS.get(path.stem, OTHER_ROWS)]))
    common.TINY_FOLDER = folder
    os.environ["HF_DATASETS_CACHE"] = str(folder.parent / "datasets")  # before that is imported
    return folder


@pytest.fixture(scope="session")
def tiny(worlds):
    """-> (model, tokenizer) of tiny/arithmetic"""
    return common.load_model("tiny", common.Config(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def tiny_folder(worlds):
    return str(worlds / "arithmetic")


@pytest.fixture
def policy(tiny):
    """A copy of the tiny model that a test may train."""
    return common.frozen_reference(tiny[0]).requires_grad_(True)


@pytest.fixture
def refused(capsys):
    """-> a function: calls main(argv), expects exit code 2 and one line, returns the line."""
    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return call
