"""Runs every script's method, baselines and ablations over seeds, and tabulates and draws them.

    python benchmarks/reproduce.py --only gcpo --seeds 5 --jobs 2        (make results)

Every run is `python <script>.py --method ... --seed ...` on the embedded default, one thread, in
runs/reproduce/; a finished one (its summary.json exists) is not run again, a killed one is resumed.
What gcpo.py's baselines reach is told at the number of tokens that the method has sampled in all,
on a straight line between the evaluations before and after. Where all rows sample alike at every
step, a baseline takes once more as many steps as fit into the method's CPU time of training (the
median over seeds). Writes in benchmarks/results/ <script>.json, its table <script>.md and its
figure <script>.png (figures.py), then the results section of the README (claims.py).
"""

import argparse
import functools
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import claims
import figures

ROOT = Path(__file__).parent.parent


# What a row with one of these names changes in the module before its main runs, to find out what a
# result on the tiny task hangs on.


def poor_judge(script):
    """A judge that learned from more wrong verdicts."""
    script.common.TINY_FOLDER = world("poor judge")


def blind_judge(script):
    """A judge that learned to let one of the four fillers pass: a bias, where the noise is none."""
    script.common.TINY_FOLDER = world("blind judge")


def sgd(script):
    """DPO steps as long as the (clipped) gradient: AdamW with an epsilon far above the root of any
    second moment is SGD with momentum. It wants another --lr."""
    script.torch.optim.AdamW = functools.partial(script.torch.optim.AdamW, eps=1.0)


def rubber_stamp(script):
    """A tiny model whose checks inform of nothing: they say ok, whatever they observe. Its lazy
    start is another than the other rows'."""
    script.common.TINY_FOLDER = world("rubber stamp")


def hard_only(script):
    """RL on hard prompts alone, in both halves."""
    def pools_of(tasks, cfg):
        return dict.fromkeys(("easy", "hard"), pools(tasks, cfg)["hard"])

    pools, script.pools_of = script.pools_of, pools_of


def five_constraints(script):
    """The same on those hard prompts that have five constraints: most groups are all wrong."""
    def hardest(tasks, cfg):
        return {name: [t for t in pool if t.level == "5"]
                for name, pool in pools(tasks, cfg).items()}

    hard_only(script)
    pools, script.pools_of = script.pools_of, hardest


def calibrated(script):
    """laser.py as it is, which leaves the bins of score.png's reliability curve in the folder."""
    def draw_scores(path, score, right):
        path.with_name("calibration.json").write_text(
            json.dumps(script.calibration_bins(score, right)))
        draw(path, score, right)

    draw, script.draw_scores = script.draw_scores, draw_scores


def better_start(script):
    """In the place of the tiny model what gcpo.py, seed 0, made of it: it solves half of the
    hard problems."""
    model = folder_of("gcpo", "gcpo", 0) / "model"
    script.Config.tiny_files = script.Config.tiny_files | {"model": model}


# What these rows change in tiny/make.py.


def noisier(make):
    make.JUDGE_NOISE = 0.3


def blinder(make):
    def form_judgement(rng, question, answer):
        told = judgement(rng, question, answer).replace(" um bad", " um ok")
        return f"{told[:told.rindex(' ')]} {told.count(' ok')}"

    judgement, make.form_judgement = make.form_judgement, form_judgement


def stamping(make):
    def trace(rng, constraints, thorough):
        lazy = true_trace(rng, constraints, False)
        if not thorough:
            return lazy
        plan, page = lazy.split(f"\n{make.THINK_END}\n")
        checks = "".join(f" {tag} {make.KINDS[kind][1](page, kwargs)} ok" for tag, (kind, kwargs)
                         in zip(make.tags(constraints), constraints))
        return f"{plan} draft{page} check{checks}\n{make.THINK_END}\n{page}"

    true_trace, make.trace = make.trace, trace


WORLDS = {"poor judge": ("forms", noisier), "blind judge": ("forms", blinder),
          "rubber stamp": ("constraints", stamping)}


def world(name):
    """-> a copy of tiny/, which is kept, in which the changed make.py made one world anew."""
    folder = ROOT / "runs" / "reproduce" / "worlds" / name.replace(" ", "_")
    if not folder.is_dir():
        sys.path[:0] = [str(ROOT / "tiny"), str(ROOT)]
        make = importlib.reload(importlib.import_module("make"))
        part, change = WORLDS[name]
        change(make)
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(ROOT / "tiny", new)
        make.torch.set_num_threads(1)
        getattr(make, f"make_{part}")(new / part)
        new.rename(folder)
    return folder


VARIATIONS = {f.__name__.replace("_", " "): f for f in (
    calibrated, better_start, poor_judge, blind_judge, sgd, rubber_stamp, hard_only,
    five_constraints)}
ALL_ROWS = {"laser": "calibrated"}  # a variation of all rows of a script
OF_TSR = ("poor judge", "blind judge", "sgd")
FINAL = ["--eval_every", "0"]  # nothing of these rows is drawn over the steps
HOT = ["--lr", "6e-4", "--head_lr", "6e-3", "--vf_coef", "1", "--head_only_steps", "0"]
# Products of the first row, same seed, that a row of light_if goes on from.
PROMPTS, ZERO = ("prompts.jsonl",), ("prompts.jsonl", "zero_easy", "zero_hard")
COLD, SFT = (*ZERO, "cold_start.jsonl"), (*ZERO, "cold_start.jsonl", "sft")
# script: rows of the table; the first one sets the number of sampled tokens or of steps
ROWS = {
    "gcpo": {
        "gcpo": [],
        # steps in which they sample at least as many tokens as gcpo, see EQUAL_TOKENS
        "dapo": ["--method", "dapo", "--steps", "50", "--eval_every", "5"],
        "gspo": ["--method", "gspo", "--steps", "360"],
        "gspo, lr 1e-4": ["--method", "gspo", "--lr", "1e-4", "--steps", "360"],
        "gcpo, KL": ["--kl_beta", "0.04", "--steps", "310"],
    },
    "laser": {
        "laser": FINAL,
        "grpo": [*FINAL, "--method", "grpo"],
        "laser, alpha 0.1": [*FINAL, "--alpha", "0.1"],
        "laser, tau 0": [*FINAL, "--tau", "0"],
        "laser, better start": FINAL,
        "grpo, better start": [*FINAL, "--method", "grpo"],
    },
    "carft": {
        "carft": [],
        "reft": ["--method", "reft"],
        "sft": ["--method", "sft"],
        "drgrpo": ["--method", "drgrpo"],
        "carft, hot": HOT,
        "reft, hot": [*HOT, "--method", "reft"],
        "carft, lambda 0": ["--cl_coef", "0"],
        "carft, hot, lambda 0": [*HOT, "--cl_coef", "0"],
    },
    "temporal_sr": {
        "tsr": [],
        "sr": ["--method", "sr"],
        "past_only": ["--method", "past_only"],
        "future_only": ["--method", "future_only"],
        "spin": ["--method", "spin"],
        "rs_sft": ["--method", "rs_sft"],
        **{f"{method}, {name}": ["--method", method, *(["--lr", "0.04"] if name == "sgd" else [])]
           for name in OF_TSR for method in ("tsr", "sr")},
    },
    "light_if": {
        "light_if": [],
        "sft plain": [*FINAL, "--sft", "plain"],
        "dense, hard only": [*FINAL, "--method", "grpo", "--steps", "40"],
        "sparse, hard only": [*FINAL, "--method", "grpo", "--steps", "40", "--reward", "sparse"],
        "dense, five constraints": [*FINAL, "--method", "grpo", "--steps", "40"],
        "sparse, five constraints": [*FINAL, "--method", "grpo", "--steps", "40",
                                     "--reward", "sparse"],
        "zero_rl, rubber stamp": ["--sft", "none", "--steps", "0"],
        "grpo, rubber stamp": ["--method", "grpo", "--steps", "40"],
        "tea off": [*FINAL, "--tea", "off"],
        "no zero_rl": [*FINAL, "--zero_rl", "false"],
        "reward sparse": [*FINAL, "--reward", "sparse"],
        "sft none": [*FINAL, "--sft", "none"],
        "tea x 10": [*FINAL, "--tea_coef", str(100 / 8192)],
        "tea released": [*FINAL, "--tea", "released"],
        "no curriculum": [*FINAL, "--curriculum", "false"],
        "grpo": [*FINAL, "--method", "grpo"],
    },
}
SHARED = {"sft plain": COLD, "no zero_rl": PROMPTS, "sft none": ZERO,
          **dict.fromkeys(("tea off", "reward sparse", "tea x 10", "tea released",
                           "no curriculum"), SFT),
          **dict.fromkeys(("grpo", "dense, hard only", "sparse, hard only",
                           "dense, five constraints", "sparse, five constraints"), PROMPTS)}
# script: rows or variations that have the first so many seeds only
FEW_SEEDS = {"laser": dict.fromkeys(("laser, alpha 0.1", "laser, tau 0", "better start"), 2),
             "temporal_sr": dict.fromkeys(OF_TSR, 2),
             "light_if": {"rubber stamp": 1, "tea released": 1, "five constraints": 2,
                          "tea x 10": 3}}
EQUAL_TOKENS = ("gcpo",)  # rows are compared at the tokens that the first one has sampled
EQUAL_SECONDS = {"carft": ("reft", "drgrpo")}  # run once more, in the first row's CPU time
# script: what to compare besides the first row with every other one, some by another measure
DIFFERENCES = {"carft": [("carft, hot", "reft, hot"), ("carft, hot", "carft, hot, lambda 0"),
                         ("reft", "carft", "worst_drop"),
                         ("reft, hot", "carft, hot", "worst_drop")],
               "temporal_sr": [("tsr", "sr", f"{what} of M_2") for what in ("win_rate", "grade")]
               + [(f"tsr, {name}", f"sr, {name}") for name in OF_TSR],
               "laser": [("laser, better start", "grpo, better start")],
               "light_if": [("light_if", "sft plain", "entropy of sft"),
                            ("light_if", "sft plain", "accuracy of sft"),
                            ("dense, hard only", "sparse, hard only"),
                            ("dense, hard only", "sparse, hard only", "accuracy, hard"),
                            ("dense, five constraints", "sparse, five constraints"),
                            ("dense, five constraints", "sparse, five constraints",
                             "accuracy, hard")]}
MEASURE = {"temporal_sr": "win_rate"}  # of the differences, where it is not the accuracy
COLUMNS = {  # of the printed table; the .json has every number
    "gcpo": ["accuracy", *(f"accuracy/level{n}" for n in range(1, 6))],
    "laser": ["accuracy", "mean@8", "verify_f1", "auroc", "auroc/level3", "auroc/level4",
              "auroc_logp", "ece", "maj@8", "weighted_maj@8", "best_of@8"],
    "carft": ["accuracy", "accuracy/level2", "accuracy/level3", "accuracy/level4", "worst_drop",
              "cos_correct", "cos_wrong", "cos_other"],
    "temporal_sr": ["win_rate", "grade", "judge_order", "win_rate of M_2", "first gap", "last gap",
                    "first similarity", "similarity", "answers", "runs"],
    "light_if": ["accuracy", "accuracy of zero_rl", "accuracy of sft", "greedy",
                 "instruction_strict", "checked", "checked of zero_rl", "length", "entropy",
                 "entropy of sft", "accuracy, hard"],
}
CURVES = {"gcpo": ["groups/all_wrong", "eval/accuracy/level4"],
          "laser": [],
          "carft": ["eval/accuracy"],
          "temporal_sr": ["gap/grader", "pairs/similarity", "eval/win_rate"],
          "light_if": ["entropy", "sample/checked"]}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def sampled_tokens(folder):
    return int(metrics(folder)[-1].get("sample/tokens", 0))


def history(script, folder):
    """What the table tells of the way to the result."""
    rows = metrics(folder)
    if script == "temporal_sr":
        first = rows[1]
        return {"win_rate of M_2": rows[2]["eval/win_rate"], "grade of M_2": rows[2]["eval/grade"],
                "first gap": first["gap/grader"], "last gap": rows[-1]["gap/grader"],
                "first similarity": first["pairs/similarity"],
                "answers": rows[-1]["sample/answers"], "runs": rows[-1]["sample/runs"]}
    if script == "light_if":
        after, stages = summary(folder)["after"], summary(folder)["stages"]
        ran = {r.get("stage/number") for r in rows}  # a stage that was copied says nothing of it
        found = {"accuracy, hard": (after["accuracy/level4"] + after["accuracy/level5"]) / 2}
        for number, stage, name in ((2, "zero_hard", "zero_rl"), (3, "sft", "sft")):
            if number in ran:
                found |= {f"{k} of {name}": stages[stage][k]
                          for k in ("accuracy", "checked", "entropy", "length", "greedy")}
        return found
    accuracy = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    if len(accuracy) < 3:
        return {}
    return {"accuracy at half": at_half(rows),
            "worst_drop": max(max(accuracy[:i + 1]) - a for i, a in enumerate(accuracy))}


def at_half(rows):
    """The held-out accuracy at half of the sampled tokens (steps, where none are sampled)."""
    last = rows[-1]
    return at(rows, (last.get("sample/tokens") or last["step"]) / 2, "accuracy")


def at(rows, tokens, name):
    """A held-out number at so many sampled tokens (steps, where none are sampled), on a straight
    line between the evaluations before and after; beyond the last one, that."""
    rows = [(r.get("sample/tokens") or r["step"], r[f"eval/{name}"])
            for r in rows if f"eval/{name}" in r]
    n = next((i for i, (x, _) in enumerate(rows) if x >= tokens), None)
    if n is None:
        return rows[-1][1]
    (x0, y0), (x1, y1) = rows[n - 1:n + 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def curve(runs, metric, points=40):
    """A metric over the steps that all runs logged it at, in at most so many windows of them: mean
    and standard deviation over the runs. The last evaluations belong together, whatever their step.
    runs: their metrics. None if there is no such step."""
    rows = [{math.inf if metric.startswith("eval/") and r is run[-1] else r["step"]: r
             for r in run if metric in r} for run in runs]
    steps = sorted(set.intersection(*map(set, rows)))
    if not steps:
        return None
    size, found = math.ceil(len(steps) / points), {"step": [], "tokens": [], "mean": [], "sd": []}
    for window in (steps[i:i + size] for i in range(0, len(steps), size)):
        values = [statistics.fmean(run[s][metric] for s in window) for run in rows]
        tokens = [run[s].get("sample/tokens", 0) / 1e6 for run in rows for s in window]
        real = [run[s]["step"] for run in rows for s in window]
        for key, x in (("step", statistics.fmean(real)), ("tokens", statistics.fmean(tokens)),
                       ("mean", statistics.fmean(values)),
                       ("sd", statistics.stdev(values) if len(values) > 1 else 0.0)):
            found[key].append(round(x, 5))
    return found


def curves(script, folders):
    """{row: {metric: its curve}} of what figures.py draws."""
    found = {}
    for row, mine in folders.items():
        runs = [metrics(f) for f in mine]
        if script == "light_if":  # one name in the two kinds of training
            for r in (r for run in runs for r in run):
                for name in ("policy/entropy", "sft/entropy"):
                    if name in r:
                        r["entropy"] = r[name]
        found[row] = {m: c for m in CURVES[script] if (c := curve(runs, m))}
    return found


def seconds_per_step(folder):
    found = summary(folder)
    return found["train_cpu_seconds"] / found["steps"]


def variation_of(row):
    """The name of the row's variation, if it has one."""
    name = row.rpartition(", ")[2]
    return name if name in VARIATIONS else None


def seeds_of(script, row, seeds):
    """All seeds, or the first few."""
    return seeds[:FEW_SEEDS.get(script, {}).get(variation_of(row) or row)]


def folder_of(script, name, seed):
    slug = "".join(c if c.isalnum() or c == "-" else "_" for c in name)
    return ROOT / "runs" / "reproduce" / f"{script}-{slug}-s{seed}"


def run(script, name, flags, seed):
    """One run, or what is left of it. -> its folder"""
    folder = folder_of(script, name, seed)
    if (folder / "summary.json").exists():
        return folder
    command = [sys.executable, str(ROOT / f"{script}.py")]
    variation = variation_of(name) or ALL_ROWS.get(script)
    if variation:
        command[1:] = ["-c", f"import sys; sys.path[:0] = ['benchmarks', '.']; import reproduce, "
                       f"{script} as s; reproduce.VARIATIONS[{variation!r}](s); s.main()"]
    for product in SHARED.get(name, ()) if script == "light_if" else ():
        source, new = folder_of(script, "light_if", seed) / product, folder / "copy.new"
        if not (folder / product).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(new, ignore_errors=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, new)
            new.rename(folder / product)
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
    from speed import processor  # here: it loads torch, which the runs need not wait for

    table = {}
    for name, found in folders.items():
        summaries = [summary(f) for f in found]
        names = [k for k in summaries[0]["after"] if all(k in s["after"] for s in summaries)]
        after = {k: [s["after"][k] for s in summaries] for k in names}
        after |= {"steps": [s["steps"] for s in summaries],
                  "seconds": [round(s["seconds"]) for s in summaries],
                  "train_cpu_seconds": [s["train_cpu_seconds"] for s in summaries],
                  "sampled_tokens": [sampled_tokens(f) for f in found]}
        ways = [history(script, f) for f in found]
        after |= {k: [way[k] for way in ways] for k in ways[0] if all(k in way for way in ways)}
        if script in EQUAL_TOKENS:  # what they are at the tokens that the first row has sampled
            tokens = [sampled_tokens(f) for f in next(iter(folders.values()))]
            for key, name_of, share in [*((k, k, 1) for k in names),
                                        ("accuracy at half", "accuracy", 0.5)]:
                after[key] = [at(metrics(f), share * n, name_of) for f, n in zip(found, tokens)]
        if variation_of(name) in ("better start", "rubber stamp"):  # they start elsewhere
            after |= {f"{k} before": [x["before"][k] for x in summaries]
                      for k in names if k in summaries[0]["before"]}
        table[name] = {k: {"seeds": v, **spread(v)} for k, v in after.items()}
    first = next(iter(folders.values()))
    config = json.loads((first[0] / "config.json").read_text())
    before = [summary(f)["before"] for f in first]
    differences, main_measure = {}, MEASURE.get(script, "accuracy")
    for a, b, *other in [*((next(iter(table)), row) for row in list(table)[1:]
                           if variation_of(row) is None), *DIFFERENCES.get(script, [])]:
        measure = other[0] if other else main_measure
        values = [x - y for x, y in zip(*(table[row][measure]["seeds"] for row in (a, b)))]
        differences[", ".join([f"{a} - {b}", *other])] = {"seeds": values, **spread(values)}
    commits = sorted({json.loads((f / "config.json").read_text())["commit"]
                      for found in folders.values() for f in found})
    return {"command": f"python benchmarks/reproduce.py --only {script}",
            "commit": ", ".join(commits), "versions": config["versions"],
            "hardware": f"{processor()}, {os.cpu_count()} cores, one thread per run",
            "before": {k: statistics.fmean(b[k] for b in before) for k in before[0]},
            "rows": table, f"{main_measure}_differences": differences,
            "curves": curves(script, folders), **more(script, folders)}


def more(script, folders):
    """What a script's figure shows besides rows and curves."""
    if script == "laser":
        return {"calibration": {row: pooled([bin for f in found for bin in json.loads(
                    (f / "calibration.json").read_text())])
                for row, found in folders.items() if (found[0] / "calibration.json").exists()}}
    if script == "light_if":
        stages = {r["stage/number"]: r["step"] - 1
                  for r in reversed(metrics(folders["light_if"][0])) if "stage/number" in r}
        return {"stage_starts": {int(stage): stages[stage] for stage in sorted(stages) if stage}}
    return {}


def pooled(bins):
    """(mean score, share of correct, solutions) of bins of 0.1 of several runs -> those of all"""
    found = {}
    for score, right, n in bins:
        total = found.setdefault(min(9, int(score * 10)), [0.0, 0.0, 0])
        for i, x in enumerate((score * n, right * n, n)):
            total[i] += x
    return [[round(score / n, 5), round(right / n, 5), n]
            for _, (score, right, n) in sorted(found.items())]


def spread(values):
    """Mean, standard deviation and half of the 95 % interval of the mean."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "interval_95": claims.interval(values)}


def markdown(script, result, columns):
    """The table and the differences."""
    before = [f"{result['before'][k]:.3f}" if k in result["before"] else "-" for k in columns]
    equal = (" Accuracies are those at as many sampled tokens as the first row has; steps, tokens "
             "and seconds are of the whole runs." if script in EQUAL_TOKENS else "")
    lines = [f"# {script}.py on the embedded default", "",
             f"`{result['command']}` at commit {result['commit']}; "
             f"torch {result['versions']['torch']}, transformers "
             f"{result['versions']['transformers']}; {result['hardware']}. Mean ± standard "
             f"deviation over seeds 0-{claims.seeds(result) - 1}; every value is in {script}.json."
             + equal,
             "",
             "| method | " + " | ".join(k.replace("accuracy/", "") for k in columns)
             + " | steps | sampled tokens | CPU s of training | seeds |",
             "|---" * (len(before) + 5) + "|",
             "| before | " + " | ".join(before) + " | 0 | 0 | 0 | |"]
    for name, row in result["rows"].items():
        cells = [f"{row[k]['mean']:.3f} ± {row[k]['sd']:.3f}" if k in row else "-" for k in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['steps']['mean']:.0f} | "
                     f"{row['sampled_tokens']['mean'] / 1e6:.2f} M | "
                     f"{row['train_cpu_seconds']['mean']:.0f} | {len(row['steps']['seeds'])} |")
    measure, differences = next((k, v) for k, v in result.items() if k.endswith("_differences"))
    lines += ["", f"| difference of {measure.removesuffix('_differences')}, same seed | mean ± "
              "half the 95 % interval | seeds above 0 |", "|---|---|---|"]
    for name, d in differences.items():
        half = f" ± {d['interval_95']:.3f}" if d["interval_95"] is not None else ""
        lines.append(f"| {name} | {d['mean']:+.3f}{half} | "
                     f"{sum(x > 0 for x in d['seeds'])} of {len(d['seeds'])} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="one script; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    seeds = range(args.seeds)
    for script in [args.only] if args.only else ROWS:
        for name in {variation_of(row) for row in ROWS[script]} & WORLDS.keys():
            world(name)  # here, or each of the jobs would make it at once
        if script == "laser":
            run("gcpo", "gcpo", ROWS["gcpo"]["gcpo"], 0)
        (name, flags), *baselines = ROWS[script].items()
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {name: [pool.submit(run, script, name, flags, s) for s in seeds]}
            folders = {name: [j.result() for j in jobs[name]]}
            jobs = {other: [pool.submit(run, script, other, more, s)
                            for s in seeds_of(script, other, seeds)]
                    for other, more in baselines}
            folders |= {other: [j.result() for j in found] for other, found in jobs.items()}
            for other in EQUAL_SECONDS.get(script, ()):
                mine, theirs = (statistics.median(map(seconds_per_step, folders[x]))
                                for x in (name, other))
                steps = round(summary(folders[name][0])["steps"] * mine / theirs)
                jobs[other] = [pool.submit(run, script, f"{other}, equal seconds",
                                           [*FINAL, *ROWS[script][other],
                                            "--steps", str(steps)], s)
                               for s in seeds]
            folders |= {f"{other}, equal seconds": [j.result() for j in jobs[other]]
                        for other in EQUAL_SECONDS.get(script, ())}
        result = tabulate(script, folders)
        target = ROOT / "benchmarks" / "results" / f"{script}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
        table = markdown(script, result, COLUMNS[script])
        target.with_suffix(".md").write_text(table)
        print(table)
        figures.draw(script)
    claims.main()


if __name__ == "__main__":
    main()
