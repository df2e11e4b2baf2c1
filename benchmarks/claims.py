"""The papers' claims against benchmarks/results/: writes the results section of the README.

    python benchmarks/claims.py        (reproduce.py calls it, too)

A claim says that one number is above another: of two rows of a table, or of one row at two times,
seed by seed. It holds if the whole 95 % interval of the difference (paired, Student's t) is above
0. What the table says of a claim is tied to its verdict: where new runs turn one around, this
program stops and asks for a new reason.
"""

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(?<=<!-- results: python benchmarks/claims.py -->\n).*"
                     r"(?=<!-- end of results -->)", re.S)
NUMBER = re.compile(r"\{([^{}|]+)\|([^{}|]+)\}")  # {row|metric}, its mean
# Student's t, two-sided 95 %, by the number of seeds
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Claim:
    text: str
    paper: str  # its number, with the source
    a: tuple[str, str] = ()  # (row, metric) that is to be above ...
    b: tuple[str, str] = ()  # ... this one; "before" is the row before training; (): not tested
    holds: bool | None = None  # the verdict that `why` explains
    why: str = ""


TITLES = {"gcpo": "GCPO", "laser": "LaSeR", "carft": "CARFT",
          "temporal_sr": "Temporal Self-Rewarding", "light_if": "Light-IF"}
CLAIMS = {
    "gcpo": [
        Claim("A reference solution teaches problems on which every response fails",
              "its purpose, no number [abstract]",
              ("gcpo", "accuracy/level4"), ("gspo, lr 1e-4", "accuracy/level4"), True,
              "4 steps, where the start is at {before|accuracy/level4}. `gspo` is the loop without "
              "it, at its best rate (at gcpo's own {gspo|accuracy/level4})"),
        Claim("Better than DAPO", "36.95 against 30.37, ten benchmarks [2nd: KR]",
              ("gcpo", "accuracy"), ("dapo", "accuracy"), True,
              "as many sampled tokens, most of which DAPO throws away"),
        Claim("Better than the untrained model", "MQA +54 % [2nd: KR]",
              ("gcpo", "accuracy"), ("before", "accuracy"), True,
              "but level 3 falls from {before|accuracy/level3} to {gcpo|accuracy/level3}"),
        Claim("On the hardest problems, too", "AIME24 +25 % [2nd: KR]",
              ("gcpo", "accuracy/level5"), ("dapo", "accuracy/level5"), True,
              "5 steps, 2 more than in the warm-up"),
        Claim("Converges faster", "no number [2nd: SS]",
              ("gcpo", "accuracy at half"), ("dapo", "accuracy at half"), True,
              "after half of the tokens; it falls first (figure)"),
        Claim("Needs no KL term", "no number [2nd: HOB]",
              ("gcpo", "accuracy"), ("gcpo, KL", "accuracy"), True,
              "--kl_beta 0.04 holds it near a model that fails: 4 steps "
              "{gcpo, KL|accuracy/level4} instead of {gcpo|accuracy/level4}"),
        Claim("A ratio of the sequence is better than of the token", "no number [2nd: SS]",
              why="one update per batch, as by default, and every ratio is 1"),
    ],
    "laser": [
        Claim("The model learns to verify its own solutions in one token",
              "F1 49.2 → 79.6, Qwen2.5-7B [2nd: papernotes]",
              ("laser", "verify_f1"), ("grpo", "verify_f1"), True,
              "`grpo` reads the same token, untrained; the paper's is asked in a prompt"),
        Claim("The score is calibrated", "ECE .090, a reward model's .251 [2nd: papernotes]",
              ("grpo", "ece"), ("laser", "ece"), True, "error of the score's bins"),
        Claim("Within one level of difficulty, too", "no number",
              ("laser", "auroc/level4"), ("grpo", "auroc/level4"), True,
              "AUROC, 4 steps. The solution's mean log-probability costs nothing and ranks all "
              "levels together as well: {laser|auroc_logp} against {laser|auroc}"),
        Claim("Reasoning gains, too", "41.8 → 42.7, Qwen2.5-7B [2nd: papernotes]",
              ("laser", "accuracy"), ("grpo", "accuracy"), False,
              "alpha 0.1 {laser, alpha 0.1|accuracy}, tau 0 {laser, tau 0|accuracy}; a better "
              "start, gcpo.py's model, {laser, better start|accuracy} against {grpo, better "
              "start|accuracy}"),
        Claim("Votes weighted by the score beat the majority", "a figure, no number read",
              ("laser", "weighted_maj@8"), ("laser", "maj@8"), True,
              "by a hair: the score tells problems apart, hardly the 8 solutions of one. The best "
              "of 8 by the score has {laser|best_of@8}; from the better start, votes have {laser, "
              "better start|weighted_maj@8} against {laser, better start|maj@8}"),
        Claim("As good as an external verifier of its size", "F1 77.6 against 78.9 "
              "[2nd: papernotes]", why="no second verifier is trained here"),
    ],
    "carft": [
        Claim("Better than SFT", "+2.5 SVAMP, +7.1 GSM8K, CodeLlama-7B [2nd: review]",
              ("carft", "accuracy"), ("sft", "accuracy"), True,
              "SFT goes on imitating the terse annotators, too"),
        Claim("Better than ReFT", "+2.3 SVAMP, +0.7 GSM8K, CodeLlama-7B [2nd: review]",
              ("carft", "accuracy"), ("reft", "accuracy"), True,
              "equal steps; hot {carft, hot|accuracy} against {reft, hot|accuracy}"),
        Claim("... because of the contrast with the annotated CoT", "the method [abstract]",
              ("carft", "accuracy"), ("carft, lambda 0", "accuracy"), False,
              "the shared head alone gains as much; hot {carft, hot|accuracy} with, "
              "{carft, hot, lambda 0|accuracy} without"),
        Claim("Better than Dr. GRPO", "up to 10.15 % over the baselines [abstract]",
              ("carft", "accuracy"), ("drgrpo", "accuracy"), False,
              "equal steps; in equal CPU time {drgrpo, equal seconds|accuracy}: no critic, no "
              "second epoch"),
        Claim("More stable than ReFT", "no number [abstract]",
              ("reft, hot", "worst_drop"), ("carft, hot", "worst_drop"), False,
              "largest fall of the accuracy, hot; without contrast "
              "{carft, hot, lambda 0|worst_drop}; at the gentle rates {reft|worst_drop} and "
              "{carft|worst_drop}"),
        Claim("More efficient", "up to 30.62 % [abstract]",
              ("carft", "accuracy"), ("reft, equal seconds", "accuracy"), False,
              "ReFT in equal CPU time: head and contrast make a step dearer; at equal steps it "
              "holds, against Dr. GRPO in equal time ({drgrpo, equal seconds|accuracy}) it does "
              "not"),
    ],
    "temporal_sr": [
        Claim("Self-Rewarding's chosen and rejected converge: the score gap shrinks",
              ".871 → .085 in four iterations [Fig. 1, digitised]",
              ("sr", "first gap"), ("sr", "last gap"), True, "grade of 0 to 5, by a fixed grader"),
        Claim("Past and future keep it", ".915 → 1.171 [Fig. 1, digitised]",
              ("tsr", "last gap"), ("sr", "last gap"), True,
              "from {tsr|first gap} at first; past alone {past_only|last gap}, future alone "
              "{future_only|last gap}"),
        Claim("Its answers become alike", "cosine .742 → .863 [Fig. 1, digitised]",
              ("sr", "similarity"), ("sr", "first similarity"), False,
              "five lines that repeat the form are .99 alike whatever is in them"),
        Claim("Better after as many updates", "win rate 29.44 against 15.71 [Tab. 1]",
              ("tsr", "win_rate of M_2"), ("sr", "win_rate of M_2"), True,
              "M_2 of both; `tsr` has made four DPO runs for it, `sr` two"),
        Claim("Better after as many DPO runs", "win rate 29.44 against 19.69 [Tab. 1]",
              ("tsr", "win_rate"), ("sr", "win_rate"), False,
              "a small gap does not stop Self-Rewarding here. Poor judge {tsr, poor "
              "judge|win_rate} against {sr, poor judge|win_rate}, biased judge {tsr, blind "
              "judge|win_rate}, {sr, blind judge|win_rate}, SGD {tsr, sgd|win_rate}, "
              "{sr, sgd|win_rate}"),
        Claim("Past alone helps", "29.06 against 19.69 [Tab. 2]",
              ("past_only", "win_rate"), ("sr", "win_rate"), False,
              "falls back in late iterations: its rejected answers are ever less likely"),
        Claim("SPIN stays behind", "6.83 against 29.44 [Tab. 1]",
              ("tsr", "win_rate"), ("spin", "win_rate"), True,
              "the data's answers are no better than M_0's"),
        Claim("SFT on the best answers stays behind", "5.59 against 29.44 [Tab. 1]",
              ("tsr", "win_rate"), ("rs_sft", "win_rate"), False,
              "lines are right or wrong, so imitating the best ones works"),
        Claim("Other models, other judges, other tasks", "Tab. 4, 5, 6", why="one tiny model"),
    ],
    "light_if": [
        Claim("Zero-RL makes a lazy reasoner check", "no number [abstract]",
              ("light_if", "checked of zero_rl"), ("before", "checked"), True,
              "share of responses; where checks do not inform, accuracy stays at "
              "{zero_rl, rubber stamp|accuracy}"),
        Claim("The pipeline raises strict accuracy", "IFEval .877 → .938, 32B [readme]",
              ("light_if", "accuracy"), ("before", "accuracy"), True,
              "on combinations of constraints that were never trained"),
        Claim("Entropy-SFT keeps the policy's entropy", "no number [abstract]",
              ("light_if", "entropy of sft"), ("sft plain", "entropy of sft"), True,
              "nats per token after stage D; accuracy there {light_if|accuracy of sft} against "
              "{sft plain|accuracy of sft}"),
        Claim("... and so the RL after it ends higher", "no number [abstract]",
              ("light_if", "accuracy"), ("sft plain", "accuracy"), False,
              "the entropy is worth no more than the accuracy that it costs; RL without TEA "
              "{tea off|accuracy}, without curriculum {no curriculum|accuracy}, with sparse "
              "rewards {reward sparse|accuracy}, the cold start from M_0 {no zero_rl|accuracy}"),
        Claim("The cold start pays", "no number [abstract]",
              ("light_if", "accuracy"), ("sft none", "accuracy"), False,
              "Zero-RL's {light_if|accuracy of zero_rl} falls to {light_if|accuracy of sft} in it "
              "(plain SFT: {sft plain|accuracy of sft}), and 40 steps of RL bring back little "
              "more: the warm-up has taught checking already"),
        Claim("Better than plain GRPO", "no number", ("light_if", "accuracy"),
              ("grpo", "accuracy"), False,
              "80 steps of RL, both, and none of it lost to a cold start; no part of Light-IF, "
              "left out, closes the distance (rows above and below)"),
        Claim("TEA helps", "no number [abstract]", ("light_if", "accuracy"),
              ("tea off", "accuracy"), False,
              "coefficient x 10 {tea x 10|accuracy}; the released code's drives entropy to "
              "{tea released|entropy}, accuracy to {tea released|accuracy}"),
        Claim("Dense rewards are better than sparse ones", "no number [abstract]",
              ("dense, hard only", "accuracy"), ("sparse, hard only", "accuracy"), False,
              "GRPO on hard prompts; on five constraints alone, where most groups are all wrong "
              "at first, {dense, five constraints|accuracy} against {sparse, five "
              "constraints|accuracy}; in the pipeline {light_if|accuracy} against "
              "{reward sparse|accuracy}: the sparse one is what is measured"),
        Claim("Easy prompts first", "no number", ("light_if", "accuracy"),
              ("no curriculum", "accuracy"), True, "than all of them mixed in every step"),
        Claim("Zero-RL's model should give the cold start", "no number",
              ("light_if", "accuracy"), ("no zero_rl", "accuracy"), False,
              "rejection keeps what M_0 gets right after a check, and it is as good"),
        Claim("Generalises to other benchmarks", "SuperCLUE, CFBench, IFBench [readme]",
              why="one tiny task"),
    ],
}


def interval(values):
    """Half the 95 % interval of the mean; None for one value"""
    if len(values) < 2:
        return None
    return T_975.get(len(values), 2.26) * statistics.stdev(values) / len(values) ** 0.5


def seeds(result):
    """How many there are; some rows have fewer."""
    return max(len(row["steps"]["seeds"]) for row in result["rows"].values())


def values_of(result, row, metric, like=()):
    """-> a value per seed; before training there is one for all seeds, those of `like`"""
    if row == "before":
        return [result["before"][metric]] * max(1, len(like))
    return result["rows"][row][metric]["seeds"]


def decimal(x, form=".3f"):
    """.123, as the papers write it"""
    return re.sub(r"^([+-]?)0\.", r"\1.", format(x, form))


def row_of(result, claim):
    """-> the claim's row of the table"""
    if not claim.a:
        return f"| {claim.text} | {claim.paper} | - | **not tested**: {claim.why} |"
    why = NUMBER.sub(lambda m: decimal(statistics.fmean(values_of(result, *m.groups()))), claim.why)
    a = values_of(result, *claim.a)
    b = values_of(result, *claim.b, like=a)
    a, b = zip(*zip(a, b))  # the seeds that both have
    differences = [x - y for x, y in zip(a, b)]
    mean, half = statistics.fmean(differences), interval(differences)
    holds = half is not None and mean - half > 0
    if holds != claim.holds:
        sys.exit(f"claims.py: \"{claim.text}\" {'holds' if holds else 'does not hold'} now "
                 f"({mean:+.3f} ± {half}): its verdict and reason are out of date")
    same = claim.a[1] == claim.b[1]
    what = ", ".join(f"`{row}` {'' if same else metric + ' '}{decimal(statistics.fmean(x))}"
                     for (row, metric), x in ((claim.a, a), (claim.b, b)))
    here = (f"{claim.a[1] + ': ' if same else ''}{what}; {decimal(mean, '+.3f')}"
            + (f" ± {decimal(half)}" if half is not None else ""))
    verdict = "holds" if holds else "does not hold"
    return f"| {claim.text} | {claim.paper} | {here} | **{verdict}**{': ' * bool(why)}{why} |"


def section():
    """-> the README's section, from the .json files alone"""
    lines = []
    for script, mine in CLAIMS.items():
        result = json.loads((RESULTS / f"{script}.json").read_text())
        lines += [f"### {TITLES[script]}", "", f"![{script}](benchmarks/results/{script}.png)", "",
                  "| claim | paper, not comparable | here | |", "|---|---|---|---|",
                  *(row_of(result, claim) for claim in mine), "",
                  f"{seeds(result)} seeds, commit {result['commit']}; all rows and metrics: "
                  f"[{script}.md](benchmarks/results/{script}.md).", ""]
    return "\n".join(lines)


def main():
    path = ROOT / "README.md"
    text = path.read_text()
    if not SECTION.search(text):
        sys.exit("claims.py: README.md has no <!-- results ... --> section")
    path.write_text(SECTION.sub(lambda m: section(), text))


if __name__ == "__main__":
    main()
