"""Fixtures: a briefly warmed-up tiny model, built once per test session, and checkpoints of it."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses: the thread count changes the last digits
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may reach for the network; test_hub.py brings its own

import common

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps every cache in a folder of the session, and warm-up and problem lists short."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    common.TINY_SPLITS = {"train": (0, 300), "test": (1, 20)}
    common.WARM_UP = {"steps": 150, "batch": 32, "lr": 3e-3, "levels": (1, 1, 2)}
    return folder


@pytest.fixture(scope="session")
def tiny(cache):
    """-> (model, tokenizer): right on some of level 1, hardly ever above."""
    return common.load_model("tiny", SimpleNamespace(device="cpu"))


@pytest.fixture(scope="session")
def tiny_folder(cache):
    return str(common.tiny_model_folder())


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
