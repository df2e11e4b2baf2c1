"""Draws the figure of each paper's claim from benchmarks/results/<script>.json.

    python benchmarks/figures.py [script ...]        (reproduce.py calls it, too)

Each is in the style of the paper's own headline figure; bars and lines are means over the seeds,
whiskers and bands standard deviations. Nothing but the .json is read.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BEFORE = "#9e9e9e"
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b"]


def colour(result, row):
    """The same for a row in every panel: the method blue, the start grey."""
    return BEFORE if row == "before" else COLOURS[list(result["rows"]).index(row) % len(COLOURS)]


def bars(ax, result, rows, groups, title, names=None):
    """Grouped bars. rows: {row: its label}; groups: {metric: its label}; `before` has no spread."""
    width = 0.8 / len(rows)
    for n, (row, label) in enumerate(rows.items()):
        x, y, sd = [], [], []
        for m, metric in enumerate(groups):
            found = ({"mean": result["before"].get(metric), "sd": 0} if row == "before"
                     else result["rows"][row].get(metric))
            if found and found["mean"] is not None:
                x.append(m + (n - (len(rows) - 1) / 2) * width)
                y.append(found["mean"])
                sd.append(found["sd"])
        ax.bar(x, y, width, yerr=sd if row != "before" else None, capsize=2, label=label,
               color=colour(result, row), error_kw={"lw": 1})
    ax.set(title=title, xticks=range(len(groups)))
    ax.set_xticklabels(groups.values())
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def lines(ax, result, rows, metric, title, x="step", xlabel="step"):
    """A curve with its band per row. rows: {row: its label}"""
    for row, label in rows.items():
        curve = result["curves"].get(row, {}).get(metric)
        if curve:
            lower, upper = ([m + s * sd for m, sd in zip(curve["mean"], curve["sd"])]
                            for s in (-1, 1))
            ax.plot(curve[x], curve["mean"], label=label, color=colour(result, row),
                    marker="o" if len(curve[x]) < 15 else None, ms=3)
            ax.fill_between(curve[x], lower, upper, color=colour(result, row), alpha=0.15, lw=0)
    ax.set(title=title, xlabel=xlabel)
    ax.grid(alpha=0.3)


def gcpo(result, axes):
    """Accuracy per difficulty level, and how many groups are all wrong, over what was sampled."""
    rows = {"gcpo": "GCPO", "dapo": "DAPO", "gspo, lr 1e-4": "GSPO (its best rate)"}
    bars(axes[0], result, {"before": "before training", **rows},
         {"accuracy": "all", **{f"accuracy/level{n}": f"{n} step{'s' * (n > 1)}"
                                for n in range(1, 6)}}, "held-out accuracy per difficulty")
    axes[0].legend(fontsize=8)
    for ax, metric, title in ((axes[1], "eval/accuracy/level4", "held-out accuracy, 4 steps"),
                              (axes[2], "groups/all_wrong",
                               "share of sampled groups that are all wrong")):
        lines(ax, result, rows, metric, title, "tokens", "sampled tokens, millions")
        ax.set_ylim(0)
    axes[2].legend(fontsize=8)


def laser(result, axes):
    """Self-verification, its calibration, and votes weighted by it."""
    rows = {"before": "before training", "grpo": "GRPO", "laser": "LaSeR"}
    bars(axes[0], result, rows, {"accuracy": "accuracy", "verify_f1": "F1 of the verdict",
                                 "auroc": "AUROC", "auroc/level4": "AUROC, 4 steps"},
         "is the model's own score right about its solutions?")
    axes[0].legend(fontsize=8)
    ax = axes[1]
    ax.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", label="perfect")
    for row in ("grpo", "laser"):
        bins = [(n, sum(score) / n, sum(right) / n)
                for n, score, right in result["calibration"][row] if n >= 20]
        ax.plot([b[1] for b in bins], [b[2] for b in bins], marker="o", label=rows[row],
                color=colour(result, row))
    ax.set(title="reliability of the score", xlabel="score of a solution (bins of 0.1)",
           ylabel="share that is correct", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    bars(axes[2], result, rows, {"mean@8": "one", "maj@8": "majority", "weighted_maj@8": "weighted",
                                 "best_of@8": "best score"},
         "accuracy of 8 samples: one, votes, best by score")
    axes[2].set_ylim(0.4)


def carft(result, axes):
    """Accuracy curves with the spread over the seeds, and the vectors' cosines."""
    rows = {"carft": "CARFT", "reft": "ReFT", "sft": "SFT", "drgrpo": "Dr. GRPO"}
    lines(axes[0], result, rows, "eval/accuracy", "held-out accuracy, gentle rates")
    lines(axes[1], result, {"carft, hot": "CARFT", "reft, hot": "ReFT",
                            "carft, hot, lambda 0": "CARFT without its contrast"}, "eval/accuracy",
          "held-out accuracy, three times the rate (--hot)")
    lines(axes[2], result, {"carft": "CARFT", "carft, lambda 0": "CARFT without its contrast",
                            "reft": "ReFT", "drgrpo": "Dr. GRPO"}, "eval/accuracy/level4",
          "held-out accuracy, 4 steps")
    for ax in axes:
        ax.legend(fontsize=8)


def temporal_sr(result, axes):
    """The paper's Fig. 1: score gap and likeness of chosen and rejected; and what it leads to."""
    rows = {"tsr": "Temporal Self-Rewarding", "sr": "Self-Rewarding", "past_only": "past only",
            "future_only": "future only"}
    lines(axes[0], result, rows, "gap/grader", "score gap of the pairs, by a fixed grader",
          xlabel="iteration")
    lines(axes[1], result, rows, "pairs/similarity", "cosine of chosen and rejected",
          xlabel="iteration")
    lines(axes[2], result, rows, "eval/win_rate", "held-out win rate against M_0",
          xlabel="updates of the model")
    for ax in axes:
        ax.set_xticks(range(5))
    axes[0].set(xlim=(0.8, 4.2), ylim=0)
    axes[1].set_xlim(0.8, 4.2)
    axes[2].legend(fontsize=8)


def light_if(result, axes):
    """Strict accuracy after every stage, and the entropy over the steps."""
    rows = {"light_if": "Light-IF", "sft plain": "with plain SFT", "sft none": "without SFT",
            "grpo": "plain GRPO"}
    bars(axes[0], result, {"before": "lazy start", **rows},
         {"accuracy of zero_rl": "B: Zero-RL", "accuracy of sft": "D: SFT",
          "accuracy": "E: final"}, "held-out accuracy (all constraints met)")
    axes[0].axhline(result["before"]["accuracy"], color=BEFORE, ls="--", lw=1)
    lines(axes[1], result, rows, "entropy", "entropy of the policy, nats per token")
    lines(axes[2], result, rows, "sample/checked", "share of responses that check their draft")
    for ax in axes[1:]:
        for start, name in result["stage_starts"].items():
            ax.axvline(int(start), color="black", lw=0.6, ls=":")
            ax.text(int(start) + 1, 1.0, name, transform=ax.get_xaxis_transform(), va="bottom",
                    fontsize=7)
    axes[1].legend(fontsize=8)


def draw(script):
    """-> the path of the picture"""
    result = json.loads((RESULTS / f"{script}.json").read_text())
    fig, axes = plt.subplots(1, 3, figsize=(15, 4))
    globals()[script](result, axes)
    seeds = max(len(row["steps"]["seeds"]) for row in result["rows"].values())
    fig.suptitle(f"{script}.py on the embedded tiny model and task, {seeds} seeds", fontsize=11)
    fig.tight_layout()
    path = RESULTS / f"{script}.png"
    fig.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(fig)
    return path


if __name__ == "__main__":
    for script in sys.argv[1:] or ("gcpo", "laser", "carft", "temporal_sr", "light_if"):
        print(draw(script))
