"""LaSeR: RL with Last-Token Self-Rewarding (Yang et al. 2025, arXiv:2510.14943v1), the whole loop.

THE IDEA
    The optimal policy of an RL problem "say whether this solution is right" has its reward in
    closed form: beta_v log[pi(z_c|x,y) / pi_ref(z_c|x,y)] + beta_v log Z, z_c being any token that
    means "correct". For a token nobody uses, log Z is about 0 and log pi_ref(z_c|x,y) practically a
    constant c_ref. So the log-probability of ONE token, read right after the solution's <EOS>, is a
    score of the solution. An MSE term ties that score to the verifier's 0/1 while GRPO trains the
    reasoning; once it is good, the score also enters the advantage. At test time it verifies and
    weighs the answers.

THE LOOP                                               code                       source
    0. measure c_ref once with the initial policy      calibrate                  [paper*]
    1. sample G solutions to each of B prompts         common.sample              [code]
    2. verify them: r_v = 0 or 1                       reward                     Eq. 2
    3. group advantage of r_v                          group_advantages           Eq. 4
    4. after both warm-ups: mix in that of r_s,        mixed_advantages           Eq. 15
       the old policy's scores                         verification_score
    5. after the first: weights of the two classes     class_weights              Eq. 14
    6. PPO-clip loss + alpha MSE(r_s, r_v), AdamW      policy_loss                Eq. 3-4, [code]
                                                       verification_loss          Eq. 12-14
    test time: F1, AUROC, ECE, weighted votes          self_verification          [paper*], [code]

METHODS  --method   alpha   tau    phases
         laser      .1      .1     GRPO | + MSE after w_r steps | + mixing after w_sr more
         grpo       0       0      GRPO; z_c stays untrained, and is read all the same
         (on the tiny model laser has alpha 1: it has few steps to learn to verify)

WHAT IS KNOWN OF THE PAPER
    [paper]  abstract and Figure 1, read. [paper*] its numbered equations and Algorithm 1, from a
    public transcription. [code] the official repository, RUCBM/LaSeR at 48996f7. [2nd] reviews and
    third-party notes. Where these disagree or are silent, it is decided here:

    D1  what is read: the column z_c of the logits AT the EOS position, addressed by the length of
        the response [paper Fig. 1]. The released mixing path reads the next row's first token
        under packing; the released MSE reads one slot too late where pad and EOS differ
    D2  the logits are unscaled, whatever --temperature is, and their log-softmax is in float32. On
        CUDA the logits themselves are bfloat16: near 20 they are rounded by .06, .006 of score
    D3  truncated solutions: no MSE, score 0 in every statistic of A_s, their own included; the
        released code gives them a score read elsewhere. At test time score 0, too ("wrong"), and
        never the best of k. An EOS in the last slot is finished [ours]
    D4  r_s is clamped to [0, 1] in A_s and in votes [code, paper*], never in the MSE
    D5  A_s, the advantage of r_s as A_v is that of r_v: unbiased std, no epsilon; groups with
        std <= T (--std_threshold) keep A_v [code; the paper says below T]
    D6  the MSE is divided by N_c + N_i, correct and wrong finished solutions of the batch
        [Eq. 14]; the code divides by all rows
    D7  token mean over the whole batch [code: per micro-batch of 2]
    D8  warm-ups are strict and relative: MSE if s > w_r, mixing if s > w_r + w_sr [code; Alg. 1
        has >= and absolute]
    D9  KL: Eq. 13 has it, the code's coefficient is 0: left out
    D10 one optimizer step per rollout batch [code], so the ratio is 1 and the clip never acts;
        it stands here as the paper's loss has it
    D11 z_c (with bce z_i, too) is never sampled: neither here nor, except with --lora, by
        whoever generates from model/ [ours]
    D12 --verify_loss bce is Eq. 16. The released branch cannot be reached. Ours: its score is the
        probability pi(z_c|x,y) itself, the class weights apply to it, too, and z_i is the next
        token after z_c that ends no response and is in no prompt
    D13 beta_v must exceed 1/|c_ref|, or the target log pi = c_ref + 1/beta_v would be positive,
        and beta_v log Z must be near 0 (at most OFFSET): else an error names what works
    D14 reward: correct AND exactly one final-answer mark [code: one \\boxed{; "####" ours];
        accuracy does not ask for the form [evaluation: code; in training: ours]
    D15 votes: sum per class of equal answers; ties by the larger class, then the first [ours]
    D16 of the common flags, lr, temperature, group and the gradient clip equal the code's; it has
        128 prompts, 8192 new tokens and weight decay 0.01 where we have 16, 1024 and none

SHAPES  B prompts, G solutions each, N = B*G rows, L columns; row i belongs to prompt i // G.
RUN     python laser.py                               # tiny model, CPU, offline, minutes
        python laser.py --method grpo                 # the baseline in the same loop
        python laser.py --model Qwen2.5-1.5B          # one CUDA GPU, GSM8K
        python laser.py --model Qwen2.5-7B --lora     # LoRA adapters
"""

import math
import re
import statistics
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure

import common
from common import (
    Run, adamw, arg, autocast, causal_lm, extract_answer, fail, frozen_reference, hidden_states,
    micro_batches, mismatch, one_line, parse_config, reference_policy, response_logps, same_answer,
    sample, sampling_statistics, set_up, take, update, vote,
)

# ------------------------------------------------------------------------------ 1. configuration


@dataclass
class Config(common.Config):
    positive = (*common.Config.positive, "beta_v", "eval_samples")
    negative = ("c_ref",)

    method: Literal["laser", "grpo"] = arg("laser", "the paper's, or its baseline")
    alpha: float = arg(0.1, "weight of the verification loss [code: 0.1; the tiny model 1, ours]")
    tau: float = arg(0.1, "share of A_s in the advantage, 0 = `LaSeR -SWA` [code: 0.1]")
    beta_v: float = arg(0.1, "scale of the score, KL weight of the verification RL [code: 0.1]")
    std_threshold: float = arg(0.1, "T: groups with a smaller std of scores keep A_v [code: 0.1]")
    reasoning_warmup_steps: int = arg(200, "w_r: steps of plain GRPO [code: 200, ORZ-7B 0]")
    self_rewarding_warmup_steps: int = arg(200, "w_sr: further steps without mixing [code: 200]")
    token: str = arg("", "z_c; default: an unused special token of the tokenizer [code: "
                         "<|vision_start|> for Qwen, <|reserved_special_token_0|> for Llama-3]")
    c_ref: float = arg(0.0, "mean log pi_ref(z_c|x,y), 0 = measured at the start [paper*]; "
                            "[code: -23 for Qwen2.5, -25 for OctoThinker]")
    reference: Literal["constant", "exact"] = arg(
        "constant", "log pi_ref(z_c|x,y): c_ref, or of each solution by a reference forward")
    balance: bool = arg(True, "re-weight the two classes [Eq. 14, code: true]")
    verify_loss: Literal["mse", "bce"] = arg("mse", "Eq. 14, or Eq. 16 (ablation)")
    # Other values than in the other scripts.
    steps: int = arg(600, "rollout steps [ours: room for both warm-ups]")
    warmup_steps: int = arg(0, "linear warm-up of the learning rate, in steps [code: none]")
    eval_every: int = arg(100, "evaluate every so many steps, 0 = only before and after; k "
                                "solutions per problem take a while")
    eval_samples: int = arg(8, "k: solutions per held-out problem, sampled, scored and voted on; "
                               "[code: 2 to 32, by data set]")


METHODS = {"laser": {}, "grpo": dict(alpha=0.0, tau=0.0)}
# The tiny model's own values, used where no flag was given.
TINY = dict(dataset="tiny", device="cpu", steps=300, prompts=32, group=8, max_new_tokens=64,
            lr=1e-4, micro_tokens=1024, eval_size=0, save_every=50, reasoning_warmup_steps=20,
            self_rewarding_warmup_steps=60, token="<|pad|>",
            laser=dict(alpha=1.0))  # it has few steps to learn to verify
TOKENS = ("<|vision_start|>", "<|reserved_special_token_0|>")  # z_c: Qwen's, Llama-3's [code]
CLIP, DUAL_CLIP = 0.2, 3.0  # [verl's defaults, which the code keeps]
PAIRS = 256   # own solutions that c_ref is measured on [ours; 2nd: 300]
OFFSET = 0.05  # largest beta_v log Z: a tenth of the way from a target to the threshold [ours]

METRICS = {
    "reward/mean": "mean r_v: correct, and with exactly one final-answer mark",
    **common.SAMPLING_METRICS,
    "verify/loss": "Eq. 14 (bce: Eq. 16) before alpha, from the first warm-up on",
    "verify/score_correct": "mean r_s of the finished solutions with r_v = 1; target 1",
    "verify/score_wrong": "mean r_s of those with r_v = 0; target 0",
    "verify/f1": "harmonic mean of the two classes' accuracies at r_s > 0.5, on the batch",
    "verify/mixed": "share of groups whose advantage has A_s in it: std of scores above T",
    "optim/grad_norm": "before clipping",
    "eval/*": "on held-out problems: accuracy (greedy), accuracy/level<n>, mean@k, pass@k, maj@k, "
              "weighted_maj@k, best_of@k, verify_f1, verify_correct, verify_wrong, auroc, "
              "auroc_logp, both also /level<n>, ece",
}
CURVES = {
    "held-out greedy accuracy": ["eval/accuracy", "eval/accuracy/level*"],
    "held-out verification": ["eval/verify_f1", "eval/auroc", "eval/auroc_logp"],
    "held-out answers": ["eval/mean@*", "eval/maj@*", "eval/weighted_maj@*"],
    "mean score in training": ["verify/score_*"],
    "shares of the sampled": ["reward/accuracy", "groups/all_wrong", "groups/all_correct"],
}


def parse(argv):
    cfg = parse_config(Config, "laser", __doc__, TINY, METHODS, argv)
    if cfg.group < 2:
        fail(f"--group {cfg.group}: an advantage compares solutions, so a group needs at least 2")
    if cfg.tau > 1:
        fail(f"--tau {cfg.tau}: is a share, so 0 to 1")
    if not -math.inf < cfg.c_ref <= 0:
        fail(f"--c_ref {cfg.c_ref}: is a log-probability, so negative")
    return cfg


# ---------------------------------------------------------------------------- 2. task and reward


def correct(text, problem):
    """Does the final answer of `text` equal the problem's?  I{a = a*}, Eq. 2"""
    return same_answer(extract_answer(text), problem.answer)


def well_formed(text, prompt):
    """The code's format gate. A prompt that names the tags <answer> </answer> (the template of
    Open-Reasoner-Zero) wants one </think> and one tagged, boxed answer; any other exactly one
    final-answer mark. [code: reward_score/math_verify.py] (D14)"""
    if "<answer>" in prompt and "</answer>" in prompt:
        return (all(text.count(tag) == 1 for tag in ("</think>", "<answer>", "</answer>"))
                and re.fullmatch(r".*</think>.*<answer>.*\\boxed\{.*\}.*</answer>\s*", text, re.S)
                is not None)
    return text.count("\\boxed{") + text.count("####") == 1


def reward(right, text, prompt):
    """r_v: 1 for a correct answer in the right form, else 0. It is the target of the score, too."""
    return float(right and well_formed(text, prompt))


def verification_tokens(tok, model, problems, cfg):
    """-> ids of z_c and, for bce, of z_i, the next one that is fit for it [code: the next]; names
    z_c in cfg. Each must be a token of the model that ends no response and is in no prompt."""
    vocab, used = tok.get_vocab(), {i for p in problems for i in p.prompt}
    rows = causal_lm(model).get_output_embeddings().weight.shape[0]
    taken = {*causal_lm(model).generation_config.eos_token_id, *used}
    free = [t for t, i in tok.get_added_vocab().items() if i not in taken and i < rows]
    perhaps = f"an unused one, such as {', '.join(free[:8])}" if free else "an unused one"
    cfg.token = cfg.token or next((t for t in TOKENS if t in vocab), "")
    if not cfg.token:
        fail(f"--model {cfg.model}: its tokenizer has none of {', '.join(TOKENS)}; give --token, "
             f"{perhaps}")
    z_c = vocab.get(cfg.token, rows)
    if z_c >= rows:
        fail(f"--token {cfg.token}: {cfg.model} has no such token; give {perhaps}")
    if z_c in taken:
        what = "is in the prompts" if z_c in used else "ends a response"
        fail(f"--token {cfg.token}: {what}; give {perhaps}")
    if cfg.verify_loss == "mse":
        return [z_c]
    return [z_c, next(i for i in (*range(z_c + 1, rows), *range(z_c)) if i not in taken)]


def calibrate(policy, tok, problems, z, cfg):
    """Step 0: c_ref = E log pi_ref(z_c|x,y) over PAIRS own, finished solutions; into cfg.

    Raises the error of D13 where the token and beta_v do not fit; a given --c_ref is checked, too.
    """
    if not cfg.c_ref:
        generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        state, pairs, drawn = {"position": 0}, [], 0
        while len(pairs) < PAIRS and drawn < 8 * PAIRS:
            prompts = [p.prompt for p in take(problems, PAIRS, state, cfg.seed)]
            new = sample(policy, tok, prompts, 1, cfg.max_new_tokens, cfg.temperature, generator)
            pairs, drawn = pairs + [s for s in new if s.finished], drawn + PAIRS
        if len(pairs) < PAIRS:
            fail(f"only {len(pairs)} of {drawn} sampled solutions end within --max_new_tokens "
                 f"{cfg.max_new_tokens}, {PAIRS} are needed to measure c_ref: raise it, or give "
                 "--c_ref")
        logp = batch_last_token_logps(policy, pairs, z, cfg)[:, 0]
        cfg.c_ref = logp.mean().item()
        print(f"calibration: z_c = {cfg.token}, c_ref = {cfg.c_ref:.3f}, standard deviation "
              f"{logp.std():.3f} over {len(pairs)} own solutions ({drawn} sampled)")
    else:
        logp = torch.tensor([cfg.c_ref])
    if cfg.verify_loss == "mse":
        offset, works = log_z_offset(logp, cfg.beta_v), smallest_beta_v(logp)
        rounded = (math.floor(works * 1e4) + 1) / 1e4 if works < math.inf else works
        if cfg.beta_v <= -1 / cfg.c_ref or offset > OFFSET:
            fail(f"--beta_v {cfg.beta_v} is too small for --token {cfg.token}: log pi_ref of it is "
                 f"{cfg.c_ref:.2f} on average, beta_v must exceed {-1 / cfg.c_ref:.4f}, and "
                 f"beta_v log Z is {offset:.3f} where at most {OFFSET} can be neglected; "
                 + ("no --beta_v works: take a --token that is used less" if works == math.inf else
                    f"the smallest that works is --beta_v {rounded:g}, or take "
                    "a --token that is used less"))


@torch.no_grad()
def batch_last_token_logps(model, samples, z, cfg):
    """`last_token_logps` of any number of samples, without gradient. -> (N, len(z))"""
    out = torch.zeros(len(samples), len(z), device=cfg.device)
    for rows, ids, mask in micro_batches(samples, cfg):
        out[rows] = last_token_logps(model, hidden_states(model, ids), mask, z)
    return out


def reference_logp_z(policy, reference, samples, z, cfg):
    """log pi_ref(z_c|x,y): c_ref, or with --reference exact by a reference forward. -> (N,)"""
    if cfg.reference == "constant":
        return torch.full((len(samples),), cfg.c_ref, device=cfg.device)
    with reference_policy(policy, reference) as ref:
        return batch_last_token_logps(ref, samples, z, cfg)[:, 0]


# -------------------------------------------------------------------------- 3. the paper's maths


def group_advantages(rewards, ddof=1, eps=1e-6):
    """Eq. 4, GRPO:  A_i = (r_i - mean r) / (std r + eps), inside each group. (B, G) -> (B, G)

    A flat group gets exact zeros: no contrast, no gradient.
    """
    rewards = rewards - rewards[:, :1]  # so that no rounding of the mean makes contrast of none
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (rewards.shape[1] - ddof)
    return centred / (variance.sqrt() + eps)


def last_token_logps(model, hidden, mask, z):
    """log pi(z|x,y) of each token of z, after the last response token. (D1, D2)

    hidden (n, L, H), mask (n, L) -> (n, len(z)) in float32. For a finished response that last token
    is EOS, whose logits predict the first position after the response.
    """
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)                                # (n,)
    row = torch.arange(len(mask), device=mask.device)
    with autocast(model):
        logits = causal_lm(model).get_output_embeddings()(hidden[row, last])         # (n, V)
    return torch.log_softmax(logits.float(), -1)[:, z]


def verification_score(logp_z, c, cfg):
    """r_s = beta_v (log pi(z_c|x,y) - c),  c = c_ref or log pi_ref(z_c|x,y)   [Eq. 10-12]

    logp_z: (n, 1 or 2), c: a float or (n,) -> (n,). With --verify_loss bce: pi(z_c|x,y) (D12).
    """
    return logp_z[:, 0].exp() if cfg.verify_loss == "bce" else cfg.beta_v * (logp_z[:, 0] - c)


def log_z_offset(ref_logp, beta_v):
    """beta_v log Z, what Eq. 9 neglects in the score: Z = 1 + pi_ref(z_c)(e^{1/beta_v} - 1), the
    exact form for a correct solution. (n,) log-probabilities -> their mean offset, a float."""
    p = ref_logp.double()
    log_z = torch.logaddexp(torch.log1p(-p.exp()), p + 1 / beta_v)
    return beta_v * log_z.mean().item()


def smallest_beta_v(ref_logp):
    """The smallest beta_v with beta_v > 1/|c_ref| and an offset of at most OFFSET, by bisection:
    the offset falls as beta_v grows, towards the mean of pi_ref(z_c). inf if 10 is not enough.
    """
    low, high = -1 / ref_logp.double().mean().item(), 10.0
    if log_z_offset(ref_logp, high) > OFFSET:
        return math.inf
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if log_z_offset(ref_logp, middle) > OFFSET else (low, middle)
    return high


def mixed_advantages(A, score, finished, tau, threshold):
    """Eq. 15:  (1 - tau) A + tau (r_s - mean r_s) / std r_s, where std r_s > T; else A. (B, G) each

    The scores are those of the old policy, clamped to [0, 1], 0 for truncated solutions (D3-D5).
    -> the advantages (B, G), and which groups are mixed (B,)
    """
    score = torch.where(finished, score.clamp(0, 1), 0.0)
    std = score.std(1, keepdim=True)                                                 # unbiased
    A_s = (score - score.mean(1, keepdim=True)) / std
    return torch.where(std > threshold, (1 - tau) * A + tau * A_s, A), (std > threshold).squeeze(1)


def class_weights(r, finished, balance):
    """w_c = N/(2 N_c), w_i = N/(2 N_i) of Eq. 14 for each solution of the batch, N = N_c + N_i
    counting finished ones; 0 for truncated ones. (N,) each -> (N,). Without `balance` 1 and 0."""
    right, wrong = finished & (r == 1), finished & (r == 0)
    if not balance:
        return finished.float()
    n = finished.sum()
    return sum(x * n / (2 * x.sum().clamp(min=1)) for x in (right, wrong))


def verification_loss(logp_z, r, weight, c, n, cfg):
    """mse, Eq. 14:  1/(N_c + N_i) sum w (r_s - r_v)^2,  r_s with gradient and not clamped
    bce, Eq. 16: -1/(N_c + N_i) sum w [r_v log pi(z_c|x,y) + (1 - r_v) log pi(z_i|x,y)]

    logp_z: (rows, 1 or 2), r, weight: (rows,); n = N_c + N_i counts the whole batch (D6).
    """
    if cfg.verify_loss == "bce":
        return -(weight * (r * logp_z[:, 0] + (1 - r) * logp_z[:, 1])).sum() / n
    return (weight * (verification_score(logp_z, c, cfg) - r).square()).sum() / n


def policy_loss(logp, old_logp, A, mask, n_tok):
    """The negated PPO-clip objective of GRPO, a mean over all tokens; only `logp` has gradient.

        J = 1/n_tok sum_i sum_t  min(w A, clip(w, 1 - .2, 1 + .2) A),  w = pi(y_it) / pi_old(y_it)
        and not below 3 A where A < 0 (dual clip)              [code: verl compute_policy_loss]

    logp, old_logp, mask: (n, L); A: (n,). n_tok counts the response tokens of the whole batch, of
    which these n rows may be a part (D7). Returns the loss, a scalar.
    """
    w = ((logp - old_logp) * mask).clamp(-20, 20).exp()                              # (n, L)
    A = A[:, None]                                                                   # (n, 1)
    J = torch.minimum(w * A, w.clamp(1 - CLIP, 1 + CLIP) * A)
    J = torch.where(A < 0, torch.maximum(J, DUAL_CLIP * A), J)
    return -(J * mask).sum() / n_tok


# --------------------------------------------------------------------------------- 4. evaluation


def verify_f1(score, right):
    """Self-verification: "correct" iff r_s > 0.5. -> F1, the share of the correct solutions that
    are called so, and that of the wrong ones; F1 is the harmonic mean of the two shares [code:
    calculate_self_rewarding_scores.py], not that of precision and recall. (n,) each, both classes
    must be present."""
    said = score > 0.5
    a, b = said[right].double().mean().item(), (~said)[~right].double().mean().item()
    return 2 * a * b / (a + b) if a + b else 0.0, a, b


def auroc(score, right):
    """The chance that a correct solution has a higher score than a wrong one, ties half. (n,) each,
    both classes must be present."""
    wrong = score[~right].sort().values
    below, up_to = (torch.searchsorted(wrong, score[right].contiguous(), right=x)
                    for x in (False, True))
    return (below + up_to).double().mean().item() / (2 * len(wrong))


def calibration_bins(score, right, bins=10):
    """The score clipped to [0, 1], as a probability of being correct, in bins of equal width.
    -> [(mean score, share of correct, solutions)] of the bins that are not empty"""
    score = score.clamp(0, 1)
    which = (score * bins).long().clamp(max=bins - 1)
    return [(score[which == b].mean().item(), right[which == b].double().mean().item(),
             int((which == b).sum())) for b in which.unique().tolist()]


def ece(score, right):
    """Expected calibration error: the mean gap between score and share of correct over the bins,
    weighted by their sizes."""
    return sum(n * abs(s - a) for s, a, n in calibration_bins(score, right)) / len(score)


def self_verification(drawn, right, score, levels, k):
    """What the score is worth, on k solutions to each problem; truncated ones have score 0 (D3).

    drawn, right, score, levels: of length B*k. auroc_logp is that of a score which costs nothing,
    the mean log pi(y_t) of the solution. Both are also given within each level, where the problem's
    difficulty is no clue. A number that needs both classes is left out where one is missing.
    """
    label, weight = torch.tensor(right), score.clamp(0, 1).tolist()
    best = torch.where(torch.tensor([s.finished for s in drawn]), score, -math.inf)
    result = {}
    if label.any() and not label.all():
        logp = torch.tensor([statistics.fmean(s.logps) for s in drawn])
        f1, of_correct, of_wrong = verify_f1(score, label)
        result = {"verify_f1": f1, "verify_correct": of_correct, "verify_wrong": of_wrong,
                  "auroc": auroc(score, label), "auroc_logp": auroc(logp, label)}
        for level in sorted(set(levels) - {""}):
            here = torch.tensor([x == level for x in levels])
            if 0 < label[here].sum() < here.sum():
                result[f"auroc/level{level}"] = auroc(score[here], label[here])
                result[f"auroc_logp/level{level}"] = auroc(logp[here], label[here])
    chosen = best.view(-1, k).argmax(1, keepdim=True)
    return result | {
        "ece": ece(score, label),
        f"weighted_maj@{k}": vote(drawn, right, k, weight),
        f"best_of@{k}": label.view(-1, k).gather(1, chosen).double().mean().item()}


def draw_scores(path, score, right):
    """The picture: reliability curve, and the histograms of the score of both classes."""
    fig = Figure(figsize=(8.8, 3.6), layout="tight")
    curve, histogram = fig.subplots(1, 2)
    bins = calibration_bins(score, right)
    curve.plot([0, 1], [0, 1], color="0.7", lw=1)
    curve.plot(*zip(*[(s, a) for s, a, _ in bins]), marker="o")
    curve.set(title=f"reliability, ECE {ece(score, right):.3f}", xlabel="score, clipped to [0, 1]",
              ylabel="share of correct solutions", xlim=(-.03, 1.03), ylim=(-.03, 1.03))
    edges = torch.linspace(-0.5, 1.5, 41).tolist()
    for name, rows in (("correct", right), ("wrong", ~right)):
        if not rows.any():
            continue
        histogram.hist(score[rows].clamp(-0.5, 1.5).tolist(), edges, alpha=0.6, density=True,
                       label=f"{name} ({int(rows.sum())})")
    histogram.axvline(0.5, color="0.3", lw=1, ls="--")
    histogram.set(title="score by class, each of area 1", xlabel="score (ends: and beyond)",
                  xticks=[-0.5, 0, 0.5, 1, 1.5])
    histogram.legend(fontsize=8)
    for ax in (curve, histogram):
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)


def evaluate(policy, reference, tok, problems, z, cfg, folder):
    """Greedy accuracy, then k solutions per problem, each scored by one more forward pass.

    -> the numbers; draws folder/score.png
    """
    k = cfg.eval_samples
    result, drawn, right = common.evaluate(policy, tok, problems, cfg, correct)
    logp_z = batch_last_token_logps(policy, drawn, z, cfg)                           # (B*k, 1)
    score = verification_score(logp_z, reference_logp_z(policy, reference, drawn, z, cfg), cfg)
    finished = torch.tensor([s.finished for s in drawn])
    score = torch.where(finished, score.cpu(), 0.0).double()
    draw_scores(folder / "score.png", score, torch.tensor(right))
    levels = [p.level for p in problems for _ in range(k)]
    return result | self_verification(drawn, right, score, levels, k)


# ---------------------------------------------------------------------------------- 5. the loop


def phases(step, cfg):
    """-> is the verification loss on, are the advantages mixed? (D8)"""
    loss_on = cfg.alpha > 0 and step > cfg.reasoning_warmup_steps
    mixing_on = (cfg.tau > 0
                 and step > cfg.reasoning_warmup_steps + cfg.self_rewarding_warmup_steps)
    return loss_on, mixing_on


@one_line
def main(argv=None):
    cfg = parse(argv)
    run = Run(cfg, "laser", METRICS, CURVES)
    policy, tok, train, held_out, _ = set_up(cfg)
    z = verification_tokens(tok, policy, train + held_out, cfg)
    causal_lm(policy).generation_config.suppress_tokens = z                              # D11
    reference = frozen_reference(policy) if cfg.reference == "exact" else None

    # 0. c_ref of the initial policy; it never moves again
    calibrate(policy, tok, train, z, cfg)
    if cfg.alpha and not phases(cfg.steps, cfg)[0]:
        print(f"note: plain GRPO throughout, --steps {cfg.steps} does not exceed "
              f"--reasoning_warmup_steps {cfg.reasoning_warmup_steps}")
    opt = adamw(cfg.lr, policy)
    state = run.start(policy, opt, lambda: evaluate(policy, reference, tok, held_out, z, cfg,
                                                    run.folder), token=cfg.token, c_ref=cfg.c_ref)
    for step in run.steps(cfg.steps):
        loss_on, mixing_on = phases(step, cfg)

        # 1-2. sample, verify
        problems = take(train, cfg.prompts, state, cfg.seed)
        batch = sample(policy, tok, [p.prompt for p in problems], cfg.group, cfg.max_new_tokens,
                       cfg.temperature)                                                  # N Samples
        prompts = tok.batch_decode([p.prompt for p in problems])
        right = [correct(s.text, problems[i // cfg.group]) for i, s in enumerate(batch)]
        r = torch.tensor([reward(x, s.text, prompts[i // cfg.group])
                          for i, (x, s) in enumerate(zip(right, batch))], device=cfg.device)  # (N,)
        finished = torch.tensor([s.finished for s in batch], device=cfg.device)
        run.add(sampling_statistics(batch, right, cfg.group, state))
        run.add({"reward/mean": r})

        # 3-4. advantages; mixed with those of the old policy's scores after both warm-ups
        A = group_advantages(r.view(-1, cfg.group))                                      # (B, G)
        if loss_on or mixing_on:
            c = reference_logp_z(policy, reference, batch, z, cfg)                       # (N,)
        if mixing_on:
            old_score = verification_score(batch_last_token_logps(policy, batch, z, cfg), c, cfg)
            A, mixed = mixed_advantages(A, old_score.view_as(A), finished.view_as(A), cfg.tau,
                                        cfg.std_threshold)
            run.add({"verify/mixed": mixed})
        A = A.flatten()

        # 5. class weights and counts of the whole batch
        weight = class_weights(r, finished, cfg.balance) * loss_on                       # (N,)
        n_finished, n_tok = max(1, int(finished.sum())), sum(len(s.tokens) for s in batch)

        # 6. one optimizer step; a row with neither advantage nor weight needs no forward
        verify_total, score = 0.0, torch.zeros_like(r)
        active = ((A != 0) | (weight != 0)).nonzero().flatten().tolist()
        for rows, ids, mask in micro_batches(batch, cfg, active):                        # (n, L)
            hidden = hidden_states(policy, ids)                                          # (n, L, H)
            logp, _ = response_logps(policy, ids, mask, cfg.temperature, hidden=hidden)
            loss = policy_loss(logp, logp.detach(), A[rows], mask, n_tok)
            if loss_on:
                logp_z = last_token_logps(policy, hidden, mask, z)                       # (n, 1)
                verify = verification_loss(logp_z, r[rows], weight[rows], c[rows], n_finished, cfg)
                loss = loss + cfg.alpha * verify
                verify_total += verify.item()
                score[rows] = verification_score(logp_z, c[rows], cfg).detach()
            loss.backward()
            run.add({"policy/mismatch": mismatch(logp, mask, [batch[i] for i in rows])})
        run.add({"optim/grad_norm": update(opt, cfg, step)})
        if loss_on:
            scored, right = score[weight > 0], r[weight > 0] == 1
            run.add({"verify/loss": verify_total, "verify/score_correct": scored[right],
                     "verify/score_wrong": scored[~right]})
            if right.any() and not right.all():
                run.add({"verify/f1": verify_f1(scored, right)[0]})

        run.end_step([
            {"prompt": problems[i // cfg.group].question, "response": batch[i].text,
             "reward": r[i].item(), "score": score[i].item() if loss_on else None}
            for i in range(0, len(batch), cfg.group)][:4])
    run.finish(policy, tok)


if __name__ == "__main__":
    main()
