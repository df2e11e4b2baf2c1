"""Runs a script's method and baselines over seeds and tabulates the result.

    python benchmarks/reproduce.py --only gcpo --seeds 5 --jobs 2        (make results)

Every run is `python <script>.py --method ... --seed ...` on the embedded default, one thread, in
runs/reproduce/; a finished one (its summary.json exists) is not run again, a killed one is resumed.
The method itself runs first. A baseline of the same seed then stops at the first step that has
sampled as many tokens; where all rows sample alike at every step, it takes as many steps. Writes
benchmarks/results/<script>.json and the pictures of the first run, and prints the table.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
# script: rows of the table; the first one sets the number of sampled tokens or of steps
ROWS = {
    "gcpo": {
        "gcpo": [],
        "dapo": ["--method", "dapo"],
        "gspo": ["--method", "gspo"],
        "gspo, lr 1e-4": ["--method", "gspo", "--lr", "1e-4"],
    },
    "laser": {
        "laser": [],
        "grpo": ["--method", "grpo"],
        "laser, alpha 0.1": ["--alpha", "0.1"],
    },
}
EQUAL_STEPS = ("laser",)
COLUMNS = {  # of the printed table; the .json has every number
    "gcpo": ["accuracy", *(f"accuracy/level{n}" for n in range(1, 6))],
    "laser": ["accuracy", "mean@8", "verify_f1", "auroc", "auroc/level3", "auroc/level4",
              "auroc_logp", "ece", "maj@8", "weighted_maj@8", "best_of@8"],
}
PICTURES = {"gcpo": {"curves.png": ".png"},
            "laser": {"curves.png": ".png", "score.png": "_score.png"}}


def sampled_tokens(folder):
    with open(folder / "metrics.jsonl") as f:
        return int(json.loads(f.readlines()[-1])["sample/tokens"])


def run(script, name, flags, seed):
    """One run, or what is left of it. -> its folder"""
    slug = "".join(c if c.isalnum() or c == "-" else "_" for c in name)
    folder = ROOT / "runs" / "reproduce" / f"{script}-{slug}-s{seed}"
    if (folder / "summary.json").exists():
        return folder
    command = [sys.executable, str(ROOT / f"{script}.py")]
    if (folder / "config.json").exists():
        command += ["--resume", str(folder)]
    else:
        command += [*flags, "--seed", str(seed), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    print(f"{folder.name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return folder


def tabulate(script, folders):
    """Per row of ROWS and metric: the values of every seed, their mean and standard deviation."""
    table = {}
    for name, found in folders.items():
        summaries = [json.loads((f / "summary.json").read_text()) for f in found]
        names = [k for k in summaries[0]["after"] if all(k in s["after"] for s in summaries)]
        after = {k: [s["after"][k] for s in summaries] for k in names}
        after |= {"steps": [s["steps"] for s in summaries],
                  "seconds": [round(s["seconds"]) for s in summaries],
                  "sampled_tokens": [sampled_tokens(f) for f in found]}
        table[name] = {k: {"seeds": v, "mean": statistics.fmean(v),
                           "sd": statistics.stdev(v) if len(v) > 1 else 0.0}
                       for k, v in after.items()}
    first = next(iter(folders.values()))[0]
    config = json.loads((first / "config.json").read_text())
    return {"command": f"python benchmarks/reproduce.py --only {script}",
            "commit": config["commit"], "versions": config["versions"],
            "hardware": f"{platform.processor() or platform.machine()}, one thread per run",
            "before": json.loads((first / "summary.json").read_text())["before"], "rows": table}


def markdown(result, columns):
    """The table as the README shows it."""
    before = {k: result["before"][k] for k in columns}
    lines = ["| method | " + " | ".join(k.replace("accuracy/", "") for k in before)
             + " | steps | sampled tokens |", "|---" * (len(before) + 3) + "|",
             "| before | " + " | ".join(f"{v:.3f}" for v in before.values()) + " | 0 | 0 |"]
    for name, row in result["rows"].items():
        cells = [f"{row[k]['mean']:.3f} ± {row[k]['sd']:.3f}" for k in before]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['steps']['mean']:.0f} | "
                     f"{row['sampled_tokens']['mean'] / 1e6:.2f} M |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="one script; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    seeds = range(args.seeds)
    sys.path.insert(0, str(ROOT))
    import common

    common.tiny_model_folder()  # warmed up here, or every job would do it at once
    for script in [args.only] if args.only else ROWS:
        (name, flags), *baselines = ROWS[script].items()
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {name: [pool.submit(run, script, name, flags, s) for s in seeds]}
            folders = {name: [j.result() for j in jobs[name]]}
            stop = {s: [] if script in EQUAL_STEPS else [
                "--steps", "1000000", "--sampled_tokens", str(sampled_tokens(folders[name][s]))]
                for s in seeds}
            jobs = {other: [pool.submit(run, script, other, more + stop[s], s) for s in seeds]
                    for other, more in baselines}
            folders |= {other: [j.result() for j in found] for other, found in jobs.items()}
        result = tabulate(script, folders)
        target = ROOT / "benchmarks" / "results" / f"{script}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        for picture, ending in PICTURES[script].items():
            shutil.copy(folders[name][0] / picture, target.with_name(script + ending))
        print(markdown(result, COLUMNS[script]))


if __name__ == "__main__":
    main()
