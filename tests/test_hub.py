"""The Hub as a user meets it: the one-GPU command, with a bare model name and the default data set,
against a Hub on loopback; then the same Hub out of reach, with a cache and without."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import make
import pyarrow
import pyarrow.parquet
import pytest
from hub import Hub
from test_common import jsonl

import common

QUICK = "--steps 1 --prompts 2 --group 2 --max_new_tokens 32 --eval_size 2 --device cpu".split()
NAMED = ["--model", "Qwen2.5-1.5B"]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
"""


def repositories(folder):
    """Random weights, and rows with the marks of GSM8K, in files named as in the originals."""
    rows = [{"question": f"Ada has {n} figs and buys {n + 1} bags of 4. How many has she?",
             "answer": f"In bags: 4*{n + 1}=<<4*{n + 1}={4 * n + 4}>>{4 * n + 4}\n#### {5 * n + 4}"}
            for n in range(2, 12)]
    tok = make.tokenizer([text for row in rows for text in row.values()], 320)
    tok.chat_template = "<|user|>\n{{ messages[0].content }}\n<|assistant|>\n"
    tok.save_pretrained(folder / "model")
    model = make.untrained(tok)
    del model.config.prompts  # it learned none
    model.save_pretrained(folder / "model")
    (folder / "gsm8k/main").mkdir(parents=True)
    (folder / "gsm8k/README.md").write_text(CARD)
    for split, part in (("train", rows[:6]), ("test", rows[6:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part),
                                    folder / f"gsm8k/main/{split}-00000-of-00001.parquet")
    return {"models/Qwen/Qwen2.5-1.5B": folder / "model",
            "datasets/openai/gsm8k": folder / "gsm8k"}


def run(folder, url, out, flags, home=None):
    """gcpo.py in a process of its own. `home` is what it may have downloaded before: nothing."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / (home or f"home-{out}")), "NO_PROXY": "*",
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "gcpo.py", *QUICK, *flags, "--out", str(folder / out)],
                          cwd=Path(common.__file__).parent, env=env, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every command of this module, once, the last ones side by side: most of their time is spent
    on imports. -> the finished processes by name, `folder` with their run folders, and what the Hub
    `saw`."""
    folder = tmp_path_factory.mktemp("hub")
    rows = str(folder / "gsm8k/main/train-00000-of-00001.parquet")
    with Hub(repositories(folder)) as hub:
        online = run(folder, hub.url, "online", NAMED, home="home")
    commands = {"cached": (NAMED, "home"), "lost_model": ([*NAMED, "--dataset", rows], None),
                "lost_data": (["--model", str(folder / "model"), "--dataset", "gsm8k"], None)}
    with ThreadPoolExecutor(3) as pool:
        gone = {name: pool.submit(run, folder, hub.url, name, flags, home)
                for name, (flags, home) in commands.items()}
    return SimpleNamespace(folder=folder, saw=hub.seen, online=online,
                           **{name: process.result() for name, process in gone.items()})


def trained(process, folder):
    """A whole run folder, whose all-wrong groups got golden answers made from the rows."""
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert "golden answers: 6 of 6 problems" in process.stdout
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl",
        "summary.json"]
    step = jsonl(folder / "metrics.jsonl")[-1]
    assert step["step"] == step["groups/all_wrong"] == step["groups/golden"] == 1
    golden = [row for row in jsonl(folder / "samples.jsonl") if row["golden"]]
    assert len(golden) == 2
    assert all(g["response"].startswith("In bags: 4*") and "<<" not in g["response"]
               for g in golden)
    return step


def test_downloads_and_then_needs_no_network(ran):
    online = trained(ran.online, ran.folder / "online")
    for file in ("/Qwen/Qwen2.5-1.5B/resolve/.+/model.safetensors",
                 "/datasets/openai/gsm8k/resolve/.+/main/train-00000-of-00001.parquet"):
        assert any(re.fullmatch(file, path) for path in ran.saw), ran.saw
    assert trained(ran.cached, ran.folder / "cached") == online


@pytest.mark.parametrize("name, what", [("lost_model", "--model Qwen2.5-1.5B"),
                                        ("lost_data", "--dataset gsm8k")])
def test_one_line_says_what_is_out_of_reach(ran, name, what):
    process = getattr(ran, name)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {what}: ") and process.stderr.count("\n") == 1
