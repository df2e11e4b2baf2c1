"""Kills real runs of all five scripts at random moments and goes on with --resume.

    python benchmarks/fault.py --kills 30 --jobs 1

Each script runs once without disturbance. Then every trial starts the same run anew and kills it
with SIGKILL at a moment that is uniform over the duration of the undisturbed run; every third trial
is killed once more while it goes on. It goes on with --resume, or with the same command where no
config.json was written yet. Whatever the trial leaves, logs, products and weights, has to be that
of the undisturbed run, byte for byte. Prints a table, writes benchmarks/results/fault.json; exit
code 1 if a single trial differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "gcpo": "--prompts 8 --max_new_tokens 48 --eval_size 40 --warmup_steps 0 --golden tiny "
            "--steps 60 --save_every 4 --eval_every 8",
    "laser": "--prompts 8 --max_new_tokens 48 --eval_size 20 --lr 1e-3 --steps 40 --save_every 4 "
             "--eval_every 8 --reasoning_warmup_steps 4 --self_rewarding_warmup_steps 4",
    "carft": "--prompts 8 --max_new_tokens 48 --eval_size 20 --steps 24 --save_every 3 "
             "--eval_every 6 --head_only_steps 1 --sft_epochs 1 --lora",
    "temporal_sr": "--prompts 48 --group 4 --batch 8 --steps 4 --eval_size 40 --eval_samples 2 "
                   "--lr 1e-3 --sft_steps 60 --judge tiny",
    "light_if": "--pool 60 --pass_samples 4 --prompts 8 --group 4 --zero_steps 8 --steps 8 "
                "--cold_start 16 --sft_batch 4 --max_new_tokens 100 --eval_samples 1 "
                "--eval_size 40 --eval_every 4 --save_every 3",
}


def start(name, out, resume=False, moment=None):
    """Runs a script; kills it after `moment` seconds, if it is still running then. -> exit code"""
    argv = ["--resume", str(out)] if resume else [*FLAGS[name].split(), "--out", str(out)]
    with open(f"{out}.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, f"{name}.py", *argv], cwd=ROOT, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        try:
            return process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def contents(out):
    """What a finished run has left: the hashes of its logs, products and weights, its numbers."""
    found = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in sorted(out.rglob("*")) if p.suffix in (".jsonl", ".safetensors", ".pt")
             and p.parent.name != "checkpoint"}
    summary = json.loads((out / "summary.json").read_text())
    return found | {k: summary.get(k) for k in ("steps", "before", "after", "stages")}


def place(out):
    """Where a run was when it was killed, as its folder shows."""
    if not (out / "config.json").exists():
        return "no config.json yet"
    log = out / "metrics.jsonl"
    rows = log.read_text().count("\n") if log.exists() else 0
    kept = [p.stem for p in sorted(out.glob("checkpoint/step_*.pt"))][-1:] or ["no checkpoint"]
    halfway = [p.name for p in out.rglob("*new") if p.name != "config.new"]
    return f"{rows} rows, {kept[0]}" + "".join(f", in {name}" for name in halfway)


def trial(name, number, folder, seconds, whole, seed):
    """One run that is killed, goes on, and is compared. -> what happened"""
    rng, out = random.Random(f"{seed}/{name}/{number}"), folder / str(number)
    kills, killed, code = 2 if number % 3 == 2 else 1, [], None
    while code != 0:
        moment = rng.uniform(0, seconds) if len(killed) < kills else None
        code = start(name, out, (out / "config.json").exists(), moment)
        if code == -signal.SIGKILL:
            killed.append(f"{moment:.1f} s: {place(out)}")
        elif code:
            return {"killed": killed, "differs": [f"exit code {code}, see {out}.log"]}
        elif not killed:  # it was faster than the one that said when to kill it
            shutil.rmtree(out)
            code = None
    found = contents(out)
    differs = sorted(k for k in found | whole if found.get(k) != whole.get(k))
    return {"killed": killed, "differs": differs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--kills", type=int, default=30, help="trials of all scripts together")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result, bad = {}, 0
    for name in args.only:
        folder = ROOT / "runs" / "fault" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.perf_counter()
        if start(name, folder / "whole"):
            sys.exit(f"{name}: the undisturbed run failed, see {folder}/whole.log")
        seconds, whole = time.perf_counter() - began, contents(folder / "whole")
        print(f"{name}: {seconds:.0f} s, {len(whole)} files and numbers to compare", flush=True)
        about = json.loads((folder / "whole" / "config.json").read_text())
        with ThreadPoolExecutor(args.jobs) as pool:
            trials = list(pool.map(
                lambda n: trial(name, n, folder, seconds, whole, args.seed),  # noqa: B023
                range(-(-args.kills // len(args.only)))))
        for n, done in enumerate(trials):
            bad += bool(done["differs"])
            print(f"  {n}  killed at {'; '.join(done['killed'])}: "
                  f"{', '.join(done['differs']) or 'identical'}", flush=True)
        result[name] = {"flags": FLAGS[name], "seconds": round(seconds, 1), "trials": trials}
    print(f"{sum(len(x['trials']) for x in result.values())} runs, {bad} of them differ")
    if len(args.only) == len(FLAGS):
        result = {k: about[k] for k in ("commit", "versions")} | {"seed": args.seed} | result
        (ROOT / "benchmarks/results/fault.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
