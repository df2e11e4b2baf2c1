"""Draws the figure of each paper from benchmarks/results/<script>.json, in the style of its own.

    python benchmarks/figures.py [script ...]        (reproduce.py calls it, too)

Bars, points and lines are means over the seeds, whiskers and bands standard deviations. Nothing but
the .json is read, and its SHA-256 is kept in the picture.
"""

import hashlib
import json
import sys
from pathlib import Path

import claims
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BEFORE = "before training"
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b"]
colours = {BEFORE: "#9e9e9e"}  # label: its colour in the figure being drawn


def colour(label):
    return colours.setdefault(label, COLOURS[len(colours) - 1])


def of(result, row, metric):
    """-> mean and standard deviation; None for a stage that the row does not have"""
    if row == "before":
        return result["before"][metric], 0.0
    found = result["rows"][row].get(metric)
    return found and (found["mean"], found["sd"])


def style(ax, title, **labels):
    ax.set_title(title, fontsize=11)
    ax.set(**labels)
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)


def bars(ax, result, rows, groups, title, **labels):
    """Grouped bars. rows: {row: its label}; groups: {metric: its label}"""
    width = 0.8 / len(rows)
    for n, (row, label) in enumerate(rows.items()):
        x = [m + (n - (len(rows) - 1) / 2) * width for m in range(len(groups))]
        y, sd = zip(*(of(result, row, metric) for metric in groups))
        ax.bar(x, y, width, yerr=sd if any(sd) else None, capsize=2, label=label,
               color=colour(label), error_kw={"lw": 1})
    style(ax, title, xticks=range(len(groups)), **labels)
    ax.set_xticklabels(groups.values())


def lines(ax, result, rows, metric, title, x="step", shift=None, **labels):
    """A curve with its band per row. rows: {row: its label}; shift: {row: its first step}"""
    for row, label in rows.items():
        curve = result["curves"][row][metric]
        at = [n + (shift or {}).get(row, 0) for n in curve[x]]
        lower, upper = ([m + s * sd for m, sd in zip(curve["mean"], curve["sd"])]
                        for s in (-1, 1))
        ax.plot(at, curve["mean"], label=label, color=colour(label),
                marker="o" if len(at) < 15 else None, ms=3)
        ax.fill_between(at, lower, upper, color=colour(label), alpha=0.15, lw=0)
    style(ax, title, **labels)


def gcpo(result, axes):
    """a reference solution joins every group of responses that is all wrong"""
    rows = {"gcpo": "GCPO", "dapo": "DAPO", "gspo, lr 1e-4": "GSPO at its best rate"}
    bars(axes[0], result, {"before": BEFORE, **rows},
         {"accuracy": "all", **{f"accuracy/level{n}": str(n) for n in range(1, 6)}},
         "after training", xlabel="steps that a problem takes (warmed up on 1 to 3)",
         ylabel="held-out accuracy", ylim=(0, 1.3), yticks=[n / 5 for n in range(6)])
    axes[0].legend(fontsize=8, ncol=2, loc="upper center")
    for ax, metric, title, ylabel in (
            (axes[1], "eval/accuracy/level4", "problems of 4 steps", "held-out accuracy"),
            (axes[2], "groups/all_wrong", "groups without a right response",
             "share of the sampled groups")):
        lines(ax, result, rows, metric, title, "tokens", xlabel="sampled tokens, millions",
              ylabel=ylabel)
        ax.set_ylim(0)


def laser(result, axes):
    """one more token after a solution is the model's own verdict on it"""
    rows = {"before": BEFORE, "grpo": "GRPO", "laser": "LaSeR"}
    bars(axes[0], result, rows, {"accuracy": "answers:\naccuracy", "verify_f1": "verdicts:\nF1",
                                 "auroc": "verdicts:\nAUROC",
                                 "auroc/level4": "AUROC,\nhard problems"},
         "does it know when it is right?")
    axes[0].legend(fontsize=8)
    ax = axes[1]
    ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", label="perfectly calibrated")
    for row in ("grpo", "laser"):
        score, right = zip(*((score, right) for score, right, n in result["calibration"][row]
                             if n >= 20))
        ax.plot(score, right, marker="o", label=rows[row], color=colour(rows[row]))
    style(ax, "can the verdict be taken at its word?", xlabel="score of a solution (bins of 0.1)",
          ylabel="share of these that is correct", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.legend(fontsize=8)
    bars(axes[2], result, rows, {"mean@8": "one", "maj@8": "majority\nof 8",
                                 "weighted_maj@8": "weighted\nby score",
                                 "best_of@8": "best score\nof 8"},
         "do votes weighted by the score help?", ylabel="held-out accuracy (axis from 0.45)",
         ylim=(0.45, None))


def carft(result, axes):
    """PPO, with the vector of a correct chain of thought pulled to that of the annotated one"""
    names = {"carft": "CARFT", "carft, lambda 0": "CARFT without contrast", "reft": "ReFT",
             "sft": "SFT", "drgrpo": "Dr. GRPO"}
    lines(axes[0], result, names, "eval/accuracy", "gentle rates", xlabel="step",
          ylabel="held-out accuracy")
    lines(axes[1], result, {f"{row}, hot" if row != "carft, lambda 0" else "carft, hot, lambda 0":
                            names[row] for row in ("carft", "carft, lambda 0", "reft")},
          "eval/accuracy", "three times the rate (hot)", xlabel="step",
          ylabel="held-out accuracy")
    bars(axes[2], result, {"carft": "CARFT", "reft, equal seconds": "ReFT",
                           "drgrpo, equal seconds": "Dr. GRPO"},
         {"accuracy": "all", **{f"accuracy/level{n}": str(n) for n in (2, 3, 4)}},
         "after equal CPU time", xlabel="steps that a problem takes", ylabel="held-out accuracy")
    axes[0].legend(fontsize=8)


def temporal_sr(result, axes):
    """chosen from the future, rejected from the past, so that DPO's pairs stay apart"""
    rows = {"tsr": "Temporal Self-Rewarding, 2 runs an iteration", "sr": "Self-Rewarding",
            "past_only": "past only", "future_only": "future only, 2 runs an iteration"}
    for ax, metric, title, xlabel, ylabel in (
            (axes[0], "gap/grader", "how far apart the pairs are", "iteration",
             "grade of chosen - rejected (0 to 5)"),
            (axes[1], "pairs/similarity", "how alike the pairs are", "iteration",
             "cosine of chosen and rejected"),
            (axes[2], "eval/win_rate", "what it leads to", "updates of the model",
             "held-out win rate against the start")):
        lines(ax, result, rows, metric, title, xlabel=xlabel, ylabel=ylabel, xticks=range(5))
    axes[0].set(xlim=(0.8, 4.2), ylim=(0, None))
    axes[1].set(xlim=(0.8, 4.2), ylim=(0.9, 1.005))
    axes[2].legend(fontsize=8)


def light_if(result, axes):
    """Zero-RL draws checking out of a lazy reasoner, Entropy-SFT and RL install it"""
    rows = {"light_if": "Light-IF", "sft plain": "with plain SFT", "sft none": "without SFT",
            "grpo": "plain GRPO, as many steps"}
    stages = {"before": "lazy\nstart", "accuracy of zero_rl": "B\nZero-RL",
              "accuracy of sft": "D\nSFT", "accuracy": "E\nRL, final"}
    for row, label in rows.items():
        points = [(0, *of(result, "before", "accuracy"))]
        for n, metric in enumerate(stages):
            shared = "light_if" if metric == "accuracy of zero_rl" and row != "grpo" else row
            if n and of(result, shared, metric):
                points.append((n, *of(result, shared, metric)))
        x, y, sd = zip(*points)
        axes[0].errorbar(x, y, sd, marker="o", ms=4, capsize=3, color=colour(label), label=label)
    style(axes[0], "after each stage", xticks=range(len(stages)), ylim=(0, None),
          ylabel="held-out prompts with all constraints met")
    axes[0].set_xticklabels(stages.values())
    axes[0].legend(fontsize=8)
    starts = {int(stage): step for stage, step in result["stage_starts"].items()}
    shift = {"sft plain": starts[3], "sft none": starts[3]}  # they go on from Zero-RL's model
    for ax, metric, title, ylabel in (
            (axes[1], "entropy", "does the policy stay open?", "entropy, nats per token"),
            (axes[2], "sample/checked", "does it check its draft?", "share of the responses")):
        lines(ax, result, rows, metric, title, shift=shift, xlabel="training step", ylabel=ylabel)
        for step, name in zip(starts.values(), ("B easy", "B hard", "D", "E easy", "E hard")):
            ax.axvline(step, color="black", lw=0.6, ls=":")
            ax.text(step + 1, 0.01, name, transform=ax.get_xaxis_transform(), fontsize=7)


def draw(script):
    """-> the path of the picture"""
    text = (RESULTS / f"{script}.json").read_bytes()
    result = json.loads(text)
    colours.clear()
    colours[BEFORE] = "#9e9e9e"
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    globals()[script](result, axes)
    fig.suptitle(f"{script}.py: {globals()[script].__doc__}   (tiny model and task, "
                 f"{claims.seeds(result)} seeds)", fontsize=12)
    fig.tight_layout()
    path = RESULTS / f"{script}.png"
    fig.savefig(path, dpi=90, metadata={"Software": None,
                                        "Source": hashlib.sha256(text).hexdigest()})
    plt.close(fig)
    return path


if __name__ == "__main__":
    for script in sys.argv[1:] or claims.CLAIMS:
        print(draw(script))
