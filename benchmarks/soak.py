"""Memory and open files of each script over a long run of tiny steps: both have to stay flat.

    python benchmarks/soak.py                        # all five, one after the other; on Linux
    python benchmarks/soak.py --only gcpo --steps 500

HOW The paper's full step on two to four prompts of the tiny model, without
    evaluations in between; 25 times a checkpoint and the curves. With each row of metrics.jsonl
    goes the memory (resident set) and the number of open files. The slope is that of least squares
    over the rows of a stage after its first quarter and the run's first tenth: light_if loads
    another model in each of its five stages, the others have one. glibc is told to give freed
    memory back at once, or some megabytes of slack come and go. The tokenizer's caches (10,000
    words, 4 MB, per thread of its pool) are filled at the start: the texts of a random model are
    full of new words, which would fill them over 1,500 steps. Into results/soak.json; exit code 1
    if memory grows by more than BOUND or files stay open.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import ROOT, about

import common

BOUND = 2.0  # KB per step; the points of the curves and the cache of `same_answer` take about .5
RL = "--prompts 2 --group 2 --max_new_tokens 12 --eval_size 4 --lr 1e-6 --eval_every 0"
FLAGS = {
    "gcpo": f"{RL} --max_new_tokens 24 --updates 2",  # no golden answer is shorter
    "laser": f"{RL} --max_new_tokens 24 --eval_samples 2 --reasoning_warmup_steps 0 "
             "--self_rewarding_warmup_steps 0",
    "carft": f"{RL} --max_new_tokens 32 --prompts 4 --group 1 --sft_epochs 1 --head_only_steps 0",
    "temporal_sr": f"{RL} --max_new_tokens 8 --batch 2 --sft_steps 0 --eval_samples 2",
    "light_if": f"{RL} --pool 40 --pass_samples 4 --cold_start 4 --sft_batch 4"}


def whole(*args):
    """`sample`, of which every response counts as finished."""
    found = common.sample(*args)
    for s in found:
        s.finished = True
    return found


def filled(load_model):
    """load_model, which fills the tokenizer's caches, too"""
    def load(*args, **kwargs):
        model, tok = load_model(*args, **kwargs)
        rng = random.Random(0)
        for _ in range(400):  # little at a time, or it leaves free memory, in which growth hides
            words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(100)]
            tok(words)  # the pool's threads
            tok(" ".join(words))  # this thread
        return model, tok

    return load


def child(script, steps, folder):
    """One run in this process. Appends [step, stage, KB, open files, seconds] to folder/memory."""
    module, log = importlib.import_module(script), common.Run.log
    read = common.read_json
    common.read_json = lambda path, what: read(path, what)[:300 if path.stem != "test" else 20]
    flags = [*FLAGS[script].split(), "--save_every", str(max(1, steps // 25))]
    if script == "temporal_sr":  # whatever is cut off at 8 tokens: its hash is its score
        module.sample = whole
        module.parse_score = lambda text: hashlib.md5(text.encode()).digest()[0] % 5 + 1.0
    if script == "light_if":  # a fifth of the steps each: Zero-RL, twice; SFT; RL, twice
        sys.path.append(str(ROOT / "tiny"))
        make = importlib.import_module("make")
        module.extract = lambda model, tasks, cfg, done: iter([{"rows": [  # 12 tokens are too few
            t.row() | {"response": make.trace(random, t.constraints, True)}
            for t in tasks[:cfg.cold_start]]}])
        flags += ["--sft_epochs", str(steps // 5), "--zero_steps", str(2 * steps // 5)]
        steps = 2 * steps // 5

    def noting(run, step, **values):
        log(run, step, **values)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = [step, int(values.get("stage/number", 1)), pages * os.sysconf("SC_PAGE_SIZE") / 1024,
               len(os.listdir("/proc/self/fd")), time.perf_counter()]
        with open(f"{folder}/memory", "a") as f:
            f.write(json.dumps(row) + "\n")

    common.Run.log = noting
    common.load_model = module.load_model = filled(common.load_model)
    common.same_answer("(1)", "[2")  # loads math-verify: five megabytes, when an answer needs it
    module.main([*flags, "--steps", str(steps), "--out", f"{folder}/run"])


def measure(script, steps):
    """-> {stage: what its rows say}"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, "--steps", str(steps), "--child", script,
                               folder], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1",
                                   "MALLOC_TRIM_THRESHOLD_": "131072",
                                   "MALLOC_MMAP_THRESHOLD_": "131072"})
        if done.returncode:
            sys.exit(f"{script}: {done.stderr.strip()}")
        rows = [json.loads(line) for line in open(f"{folder}/memory")][1:]
    found = {}
    for stage, part in itertools.groupby(rows, lambda row: row[1]):
        step, _, kb, files, seconds = zip(*part)
        early, settled = min(200, len(step) // 4), max(len(step) // 4, steps // 10 - step[0])
        slope = statistics.linear_regression(step[settled:], kb[settled:]).slope
        found[stage] = {
            "steps": len(step), "seconds_per_step": (seconds[-1] - seconds[0]) / (len(step) - 1),
            "early": early, "mb": [kb[early] / 1024, kb[-1] / 1024], "kb_per_step": slope,
            "files": [files[early], files[-1]], "mb_along": [
                round(x / 1024, 2) for x in kb[::max(1, len(kb) // 20)]]}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FLAGS), nargs="+", default=list(FLAGS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], args.steps, args.child[1])
    path, info, bad = ROOT / "benchmarks/results/soak.json", about(), []
    print("  ".join(f"{k} {v}" for k, v in info.items()))
    print(f"{'':<18}{'steps':>6}{'s/step':>8}{'early MB':>10}{'end MB':>8}{'KB/step':>9}    files",
          flush=True)
    for script in args.only:
        stages = measure(script, args.steps)
        for stage, x in stages.items():
            name = f"{script} {stage}" if len(stages) > 1 else script
            print(f"{name:<18}{x['steps']:>6}{x['seconds_per_step']:>8.3f}{x['mb'][0]:>10.1f}"
                  f"{x['mb'][1]:>8.1f}{x['kb_per_step']:>9.2f}{x['files'][0]:>6}{x['files'][1]:>3}",
                  flush=True)
            if x["kb_per_step"] > BOUND or x["files"][1] > x["files"][0]:
                bad.append(name)
        result = json.loads(path.read_text()) if path.exists() else {}  # another may be at work
        result[script] = {"about": info, "bound": BOUND, "stages": stages}
        path.write_text(json.dumps(result, indent=1) + "\n")
    if bad:
        sys.exit(f"memory or open files grow: {', '.join(bad)}")


if __name__ == "__main__":
    main()
