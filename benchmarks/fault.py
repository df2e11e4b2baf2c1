"""Kills real runs of all five scripts at random moments and goes on with --resume.

    python benchmarks/fault.py --kills 60 --jobs 2        (make fault)

Each script runs once without disturbance, with settings that make it short and its checkpoints
frequent; that run tells how often each of PLACES is passed and how long it takes there. Then every
trial starts the same run anew, draws a place, one of its passes and a moment in it, and the process
kills itself with SIGKILL at that moment; with --resume it is killed once more, or runs to its end.
What it leaves has to be, byte for byte, what the undisturbed run left. Prints a table, writes
benchmarks/results/fault.json; exit code 1 if a single trial differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = {
    "gcpo": "--prompts 4 --group 3 --max_new_tokens 48 --eval_size 10 --lr 1e-3 --warmup_steps 0 "
            "--steps 6 --save_every 2 --eval_every 2 --golden tiny",
    "laser": "--prompts 8 --group 4 --max_new_tokens 48 --eval_size 20 --eval_samples 2 --lr 1e-3 "
             "--steps 4 --save_every 1 --eval_every 2 --beta_v .2 --std_threshold .01 "
             "--reasoning_warmup_steps 1 --self_rewarding_warmup_steps 1",
    "carft": "--prompts 8 --max_new_tokens 48 --eval_size 20 --steps 4 --save_every 1 "
             "--eval_every 2 --head_only_steps 1 --sft_epochs 1 --lora",
    "temporal_sr": "--prompts 8 --group 3 --batch 4 --sft_steps 20 --max_new_tokens 64 --steps 2 "
                   "--eval_size 4 --eval_samples 2 --save_every 1 --lr 1e-3",
    "light_if": "--pool 40 --pass_samples 4 --prompts 4 --group 4 --zero_steps 2 --steps 2 "
                "--cold_start 6 --sft_batch 4 --sft_epochs 1 --max_new_tokens 64 --eval_samples 1 "
                "--save_every 1",
}
# What is going on: the functions of the script, or of common.py, that a kill falls into.
PLACES = {
    "sampling": ("sample",), "evaluation": ("evaluate", "Grader.evaluate"),
    "update": ("update", "sft_step"), "log": ("Run.log",), "checkpoint": ("Run.save",),
    "curves": ("Run.draw_curves",), "end": ("Run.finish",), "config": ("Run.open",),
    "resume": ("Run.restore",), "part of an iteration": ("part", "Models.learn"),
    "SFT": ("warm_up", "supervise", "keep_sft"),
    "between stages": ("begin", "leave", "product"), "set-up": ("set_up", "load_data"),
    "golden answers": ("golden_answers",),
}


# ------------------------------------------------------------------------- in the killed process


def shorten(name, script, common):
    """What makes a run of a second of it: few problems, checkpoints inside every stage; and another
    idea of what is right, by which groups differ."""
    read = common.read_json
    common.read_json = lambda path, what: read(path, what)[:300 if path.stem != "test" else 20]
    common.STAGE_SECONDS = 0

    def hat(text):
        return hashlib.md5(text.encode()).digest()[0] % 5 + 1.0

    if name in ("gcpo", "laser"):
        script.correct = lambda text, problem: text[-1:] in tuple("02468")
        script.PAIRS = 24  # of laser's calibration
    if name == "carft":
        script.answer_of = lambda text, problem: (text[-1:] in tuple("02468"), True)
    if name == "temporal_sr":
        script.PIECE, script.parse_score = 4, hat
        script.form_grade = lambda question, text: hat(f"{text}?")
    if name == "light_if":
        script.PIECE = 16


def watched(place, function, plan, seen):
    """`function`, which notes when it is passed, and starts what kills the process in it."""
    def call(*a, **k):
        seen.setdefault(place, []).append(0.0)
        n = len(seen[place])
        if plan.get("place") == place and plan["call"] == n:
            def die():
                time.sleep(plan["delay"])
                os.kill(os.getpid(), plan.get("signal", signal.SIGKILL))

            if plan["delay"]:
                threading.Thread(target=die, daemon=True).start()
            else:
                die()
        start = time.perf_counter()
        try:
            return function(*a, **k)
        finally:
            seen[place][n - 1] = time.perf_counter() - start

    return call


def child(name, plan, argv):
    """Runs a script's main with the places watched; a run that gets to its end leaves what it saw
    in the file plan["seen"]."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    common, script = importlib.import_module("common"), importlib.import_module(name)
    shorten(name, script, common)
    seen = {}
    for place, functions in PLACES.items():
        for function in functions:
            for owner in (script, common):
                *path, last = function.split(".")
                holder = getattr(owner, path[0], None) if path else owner
                if holder is not None and last in vars(holder):
                    setattr(holder, last, watched(place, vars(holder)[last], plan, seen))
                    break
    script.main(argv)
    if plan.get("seen"):
        Path(plan["seen"]).write_text(json.dumps(seen))


# ------------------------------------------------------------------------ in the one that watches


def start(name, out, resume, **plan):
    """Runs a script with a plan. -> the finished process"""
    argv = ["--resume", str(out)] if resume else [*FLAGS[name].split(), "--out", str(out)]
    return subprocess.run(
        [sys.executable, __file__, "child", name, json.dumps(plan), *argv], text=True, cwd=ROOT,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def contents(out):
    """What a finished run has left: a hash per log, product and model, and its numbers."""
    found = {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in sorted(out.rglob("*")) if p.suffix in (".jsonl", ".safetensors")
             and not p.relative_to(out).parts[0].startswith("checkpoint")}
    summary = json.loads((out / "summary.json").read_text())
    return found | {k: summary.get(k) for k in ("steps", "before", "after", "stages")}


def undisturbed(name, folder):
    """-> contents of a whole run, and its passes: {place: [seconds]}. Two such runs have to be the
    same."""
    seen = folder / "seen.json"
    for out in (folder / "first", folder / "whole"):
        done = start(name, out, False, seen=str(seen))
        if done.returncode:
            sys.exit(f"{name}: the undisturbed run failed\n{done.stderr}")
    if contents(folder / "first") != contents(out):
        sys.exit(f"{name}: two undisturbed runs differ")
    return contents(out), json.loads(seen.read_text())


def trial(name, out, whole, seen, rng, kills):
    """One run that is killed up to `kills` times. -> {place: kills in it}, what differs"""
    told, resume, killed = Counter(), False, 0
    while True:
        plan = {}
        if killed < kills:
            place = rng.choice(sorted(seen))
            call = rng.randint(1, len(seen[place]))
            plan = {"place": place, "call": call,
                    "delay": rng.random() * seen[place][call - 1]}
        done = start(name, out, resume, **plan)
        if done.returncode == 0:
            break
        if done.returncode != -signal.SIGKILL:
            return told, f"exit code {done.returncode}: {done.stderr[-500:]}"
        told[plan["place"]] += 1
        killed += 1
        resume = (out / "config.json").exists()  # else it did not count as a run yet
    found = contents(out)
    return told, ", ".join(k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=sorted(FLAGS), choices=sorted(FLAGS))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base, found = ROOT / "runs" / "fault", {}
    shutil.rmtree(base, ignore_errors=True)
    for name in args.only:
        folder = base / name
        folder.mkdir(parents=True)
        whole, seen = undisturbed(name, folder)
        told, wrong, n = Counter(), [], 0
        share = -(-args.kills // len(args.only))
        with ThreadPoolExecutor(args.jobs) as pool:
            while sum(told.values()) < share:
                jobs = [pool.submit(trial, name, folder / f"{n + j}", whole, seen,
                                    random.Random(f"{args.seed}/{name}/{n + j}"), 2)
                        for j in range(args.jobs)]
                n += args.jobs
                for job in jobs:
                    kills, differs = job.result()
                    told += kills
                    wrong += [differs] if differs else []
        found[name] = {"runs": n, "kills": sum(told.values()), "in": dict(told),
                       "not identical": wrong}
        where = ", ".join(f"{k} {v}" for k, v in sorted(told.items()))
        print(f"{name:<12} {n:>3} runs, {sum(told.values()):>3} kills ({where}): "
              f"{n - len(wrong)} identical", flush=True)
        for line in wrong:
            print(f"    {line}")
    if len(args.only) == len(FLAGS):
        from speed import about  # torch is of no use to the one that watches

        result = about() | {"seed": args.seed, "scripts": found}
        path = ROOT / "benchmarks" / "results" / "fault.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(x["not identical"] for x in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:])
    else:
        main()
