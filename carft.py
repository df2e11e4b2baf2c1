"""CARFT: contrastive learning with annotated chains of thought (EMNLP 2025, arXiv:2508.15868).

THE IDEA
    ReFT fine-tunes a reasoner in two stages: supervised on annotated chains of thought (CoT), then
    PPO on the correctness of its own answers, where the annotations no longer play a part. CARFT
    keeps both stages and lets the annotations back in: a small head beside the critic turns every
    CoT into one vector, and an InfoNCE loss pulls the vector of a correct sampled CoT to that of
    the annotated CoT of the same question, away from the CoTs of other questions.

THE LOOP                                               code                       source
    stage 1: SFT on the annotated CoT, two epochs      warm_up                    [code]
    stage 2, with the SFT policy as the reference:
    1. sample a CoT to each of B questions             common.sample              [code]
    2. old log-probs, values, vectors; the vectors     score, pool                [code]
       of the annotated CoT, cached without gradient
    3. reward 1 / partial / 0                          rewards, partial_rewards   [code: reft, v11]
    4. - beta (log pi - log pi_ref) per token, GAE,    kl_shaped_rewards, gae,    [code]
       whitened over the whole batch                   whiten
    5. two epochs of L_pg + alpha L_vf + lambda L_cl   policy_loss, value_loss,   [code]
                                                       positive_loss, negative_loss

METHODS  --method   stage 2
         carft      ReFT with the shared head and lambda > 0
         reft       PPO alone: a linear critic, lambda = 0
         sft        goes on with stage 1
         drgrpo     Dr.GRPO: G samples per question, A = r - mean r, no std, no length, no critic

WHAT IS KNOWN OF THE PAPER
    Only its abstract could be read. [code] is the official repository, WNQzhu/CARFT at e669155,
    whose my_cl_trainer_v4 "reproduces the results in the paper" (v11: embedding-enhanced partial
    reward, v7: negative signal, v9: both); [ReFT] lqtrung1998/mwp_ReFT, [DrGRPO] sail-sg's
    understand-r1-zero. None of what follows is the paper's own wording. Decided here:

    D1  L_cl is the masked InfoNCE that the code's formula means. The released code (1) multiplies
        losses (B,) by a mask (B, 1), so that it sums over all rows if any is correct, and (2)
        gathers the negatives without gradient; tests/test_carft_maths.py computes both
    D2  negatives are all other rows of the rollout batch; the code has those of a micro-batch on
        all GPUs, 32 rows. The loss couples all rows: their vectors are taken
        first, then the gradient with respect to them, of which each micro-batch passes on its
        share; --micro_tokens does not change it [ours]. No question is in a batch twice: an
        epoch's rest is dropped [code], and each question has one annotated CoT
    D3  lambda: the code sweeps {0, .001, .01, .1, 1}; .1 is its config's, .001 its launcher's
        default; which one the paper has is unknown. The tiny model has .01
    D4  vectors pool over token positions, EOS included; PPO acts on the states one before them
    D5  empty token sets (no common token, no token of its own) take no part; the code pools all
        positions, pads included
    D6  negative signal: the longest common subsequence of the two CoT; as released, of the
        whole sequences, prompt included
    D7  a critic that starts at zero, a learning rate of its own, ten times the policy's, and five
        steps in which the heads learn alone [ours; code: none of these]: otherwise a random critic
        throws the policy back at the start
    D8  reward as in [ReFT]: a parsed number within .01 is right, a wrong one is worth `partial`;
        truncated samples are scored on what they contain. "1,080" and "$18" parse here. The
        embedding-enhanced partial reward is .2 + .1 cos, so a larger constant, too
    D9  learning rates fall linearly to 0 over --steps, for all methods [code: by the HF default;
        ReFT and DrGRPO: constant]; stage 1 likewise. A finished run that is resumed with more
        --steps starts again on the line to the new end. Gradient norm 1 [ReFT]
    D10 prompts are the code's plain text, not a chat template, also for instruct models, and a
        CoT's closing "#### n" becomes the code's closing sentence; a model whose config.json says
        that it was trained with another prompt, as the tiny one's does, keeps both as they are
    D11 the tiny task's annotators are terse for half of the problems, two operations per step:
        more than the tiny model can compute, so that imitating is not enough [ours]
    D12 one sample per question in carft and reft [code]

SHAPES  B questions, G samples each (1 but for drgrpo), N = B*G rows, L columns, V (n, L) values,
        e (n, L, 64) embeddings, K token sets per CoT, z (n, 64) vectors. Column t of log-probs,
        rewards, advantages and state values belongs to token t, an action taken one column before.
RUN     python carft.py                              # tiny model, CPU, offline, minutes
        python carft.py --method reft                # a baseline in the same loop
        python carft.py --model Qwen2.5-1.5B         # one CUDA GPU, GSM8K
        python carft.py --model Qwen2.5-7B --lora    # LoRA adapters; the heads train in full
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import set_seed

import common
from common import (
    Run, adamw, arg, as_number, as_samples, causal_lm, collate, evaluate, extract_answer, fail,
    frozen_reference, hidden_states, load_model, micro_batches, mismatch, one_line, parse_config,
    product, reference_logps, response_logps, same_answer, sample, sampling_statistics, save_model,
    set_up, sft_step, take, trained_prompt, update,
)

# ------------------------------------------------------------------------------ 1. configuration


@dataclass
class Config(common.Config):
    tiny_files = dict(model="arithmetic", train="arithmetic/annotated.jsonl",
                      test="arithmetic/annotated_test.jsonl")  # solutions terse or not (D11)

    positive = (*common.Config.positive, "ppo_epochs", "head_lr", "sft_lr")

    method: Literal["carft", "reft", "sft", "drgrpo"] = arg("carft", "the paper's, or a baseline")
    # stage 1
    sft_epochs: int = arg(2, "epochs of SFT on the annotated CoT, 0 = none [code: 2]")
    sft_lr: float = arg(1e-5, "its learning rate [code: 1e-5]")
    # stage 2
    ppo_epochs: int = arg(2, "optimizer steps per rollout batch [code: 2, DrGRPO: 1]")
    kl_coef: float = arg(0.05, "beta of the KL in the reward, PPO only [code: 0.05]")
    gamma: float = arg(1.0, "discount [code: 1.0]")
    gae_lambda: float = arg(0.95, "of the advantage estimator [code: 0.95]")
    vf_coef: float = arg(5.0, "alpha, weight of the value loss [code: 5]")
    head_lr: float = arg(3e-6, "learning rate of the critic and the projection [ours: ten times "
                               "--lr; code: --lr] (D7)")
    head_only_steps: int = arg(5, "first steps in which only they learn [ours; code: 0] (D7)")
    head: Literal["shared", "separate"] = arg(
        "shared", "critic on the ReLU of the 64-d projection, or linear beside it [code: cl2, cl]")
    cl_coef: float = arg(0.1, "lambda, weight of the contrastive loss [code] (D3)")
    signal: Literal["positive", "negative", "both"] = arg(
        "positive", "contrast of correct CoT, of wrong ones, or half of each [code: v4, v7, v9]")
    partial_reward: Literal["none", "constant", "embedding"] = arg(
        "constant", "of a wrong number: 0, 0.1, or 0.2 + 0.1 cos(annotated, sampled) [code: v11]")
    # Other values than in the other scripts.
    steps: int = arg(600, "rollout steps [ours; code: 60 epochs, about 2,900 steps on SVAMP]")
    prompts: int = arg(64, "B, questions per step [code: 64]")
    group: int = arg(1, "G, samples per question [code: 1, DrGRPO: 8]")
    lr: float = arg(3e-7, "learning rate of the policy [code: RL 3e-7, SFT 1e-5; DrGRPO: 1e-6]")
    warmup_steps: int = arg(0, "linear warm-up of the learning rates, in steps [code: none]")


METHODS = {  # what differs from the defaults above
    "carft": {},
    "reft": dict(head="separate", cl_coef=0.0),                                         # [ReFT]
    "sft": dict(head="separate", cl_coef=0.0, lr=1e-5, head_lr=1e-4),                   # [code]
    "drgrpo": dict(head="separate", cl_coef=0.0, ppo_epochs=1, group=8, lr=1e-6, head_lr=1e-5,
                   partial_reward="none"),                                              # [DrGRPO]
}
# The tiny model's own values, used where no flag was given.
TINY = dict(dataset="tiny", device="cpu", steps=200, max_new_tokens=64, micro_tokens=1024,
            sft_lr=1e-3, lr=2e-4, head_lr=2e-3, kl_coef=0.01, vf_coef=0.1, eval_size=0,
            eval_every=25, save_every=50,
            carft=dict(cl_coef=0.01), sft=dict(lr=1e-4), drgrpo=dict(prompts=16, group=4))
SIZE = 64                  # of a CoT vector [code]
TEMPERATURE, CEILING = 0.2, 0.9  # tau, and the cosine from which a pair is pulled no more [code]
CLIP = 0.2                 # of the ratio and of the value [code]
SFT_BATCH = 64             # annotated CoT per step of stage 1 [code]
VECTORS = 256              # held-out CoT in the evaluation of the vectors [ours]
# Jinja drops the last \n [code: the prompt]
TEMPLATE = "Question:\n{{ messages[0].content }}\nAnswer reasoning:\n\n"
TRIGGER = "\nTherefore, the answer is: "                                                # [code]

METRICS = {
    "reward/mean": "mean reward: 1 correct, 0.1 (see --partial_reward) another number, 0 none",
    **common.SAMPLING_METRICS,
    "policy/loss": "PPO-clip loss, mean of the epochs; in the first minus the mean advantage",
    "policy/clipped": "share of ratios that are clipped, mean of the epochs; 0 in the first",
    "policy/kl": "mean log pi_old - log pi_ref per response, nats",
    "value/loss": "clipped value loss before alpha, mean of the epochs",
    "value/explained": "1 - var(return - value) / var(return) of the old values; 1 is perfect",
    "cl/loss": "contrastive loss before lambda, mean of the epochs",
    "cl/cos_correct": "mean cosine of a correct sampled CoT's vector to the annotated one",
    "cl/cos_wrong": "the same of wrong ones",
    "cl/cos_other": "the same of CoT of different questions",
    "sft/loss": "--method sft: cross-entropy per token of the annotated CoT",
    "optim/grad_norm": "before clipping, mean of the epochs",
    "eval/*": "on held-out problems: accuracy, accuracy/level<n>, mean@k, pass@k, maj@k, and as "
              "above cos_correct, cos_wrong, cos_other",
}
CURVES = {
    "held-out greedy accuracy": ["eval/accuracy", "eval/accuracy/level*"],
    "in training": ["reward/accuracy", "value/explained"],
    "cosine to the annotated CoT": ["cl/cos_*"],
    "KL to the SFT policy, nats": ["policy/kl"],
}


def parse(argv):
    cfg = parse_config(Config, "carft", __doc__, TINY, METHODS, argv)
    if cfg.method != "drgrpo" and cfg.group != 1:
        fail(f"--group {cfg.group}: {cfg.method} has one sample per question; raise --prompts")
    if cfg.method == "drgrpo" and cfg.group < 2:
        fail(f"--group {cfg.group}: an advantage compares samples, so a group needs at least 2")
    if cfg.method == "carft" and cfg.prompts < 2:
        fail(f"--prompts {cfg.prompts}: the other questions are the negatives, so at least 2")
    if cfg.method != "carft":
        if cfg.cl_coef:
            fail(f"--cl_coef: the contrastive loss is of --method carft, not of {cfg.method}")
        if cfg.partial_reward == "embedding":
            fail("--partial_reward embedding: the vectors are trained with --method carft only")
    if not cfg.cl_coef and cfg.signal != "positive":
        fail("--signal: is of the contrastive loss, which is off here")
    if cfg.gamma > 1 or cfg.gae_lambda > 1:
        fail("--gamma and --gae_lambda must be in [0, 1]")
    if cfg.method in ("carft", "reft") and cfg.steps <= cfg.head_only_steps:
        print(f"note: only the heads learn, --steps {cfg.steps} does not exceed --head_only_steps "
              f"{cfg.head_only_steps}")
    return cfg


# ---------------------------------------------------------------------------- 2. task and reward


def answer_of(text, problem):
    """-> is the final answer right, and is it a number at all?  [code: reft.py] (D8)"""
    given = extract_answer(text)
    number, truth = as_number(given or ""), as_number(problem.answer)
    if number is not None and truth is not None:
        return abs(number - truth) <= Fraction(1, 100), True
    return same_answer(given, problem.answer), number is not None


def correct(text, problem):
    """Does the final answer of `text` equal the problem's?"""
    return answer_of(text, problem)[0]


def partial_rewards(kind, cos):
    """What a wrong number is worth: 0, 0.1, or 0.2 + 0.1 cos. cos: (N,) -> (N,)  [code: v11]"""
    return {"none": 0 * cos, "constant": 0 * cos + 0.1, "embedding": 0.2 + 0.1 * cos}[kind]


def rewards(right, number, partial):
    """r = 1 if right, `partial` if a wrong number, else 0. (N,) each -> (N,)"""
    return torch.where(right, 1.0, torch.where(number, partial, 0.0))


def annotated_cot(problem, keep_form):
    """The annotated CoT in the form that SFT teaches, "" if the problem has none. `keep_form`: with
    its closing "#### n", for a model that was trained so (D10)."""
    cot = problem.solution
    if keep_form and extract_answer(cot):
        return cot
    cot = re.sub(r"\s*####[^\n]*\s*$", "", cot)
    return cot and cot + ("\n#### " if keep_form else TRIGGER) + problem.answer


def annotate(problems, policy, tok, cfg):
    """-> [(problem, its annotated CoT as a Sample)] of those that have one that a response may be
    as long as; each question once."""
    keep_form = trained_prompt(policy, "instruction") is not None
    texts = {p.question: (p, annotated_cot(p, keep_form)) for p in problems}
    have = [(p, text) for p, text in texts.values() if text]
    found = as_samples(tok, [p.prompt for p, _ in have], [text for _, text in have])
    return [(p, s) for (p, _), s in zip(have, found) if len(s.tokens) <= cfg.max_new_tokens]


def annotated_set(problems, policy, tok, cfg):
    """The training problems as `annotate` gives them, enough for a batch; says how many."""
    train = annotate(problems, policy, tok, cfg)
    have = (f"{len(train)} of {len(problems)} problems have a question of their own and an "
            f"annotated CoT (a solution) of at most --max_new_tokens {cfg.max_new_tokens} tokens")
    print(have)
    if len(train) < cfg.prompts:
        fail(f"--dataset {cfg.dataset}: {have}, and every step needs --prompts {cfg.prompts}")
    return train


# -------------------------------------------------------------------------- 3. the paper's maths


class Heads(torch.nn.Module):
    """Critic and projection on the policy's last hidden states, in float32.

    e_t = W_p h_t + b_p, the embedding, and the value  w_v . ReLU(e_t) + b_v  (shared)
    [code: modeling_hidden_head_v2] or  w_v . h_t + b_v  (separate; modeling_hidden_head, TRL).
    """

    def __init__(self, hidden_size, kind):
        """The value starts at zero (D7)."""
        super().__init__()
        self.shared = kind == "shared"
        self.projection = torch.nn.Linear(hidden_size, SIZE)
        self.value = torch.nn.Linear(SIZE if self.shared else hidden_size, 1)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def forward(self, hidden):
        """(n, L, H) -> V (n, L), e (n, L, 64)"""
        hidden = hidden.float()
        e = self.projection(hidden)
        return self.value(e.relu() if self.shared else hidden).squeeze(-1), e


def state_values(V, mask):
    """The value of the state in which token t was chosen is read one column before it: (n, L)
    values of positions -> of actions, 0 outside the mask (D4)."""
    return F.pad(V[:, :-1], (1, 0)) * mask


def kl_shaped_rewards(r, logp, ref_logp, mask, beta):
    """rho_t = s_t - beta (log pi_old(a_t) - log pi_ref(a_t)), s_t = r at the last token (EOS, if
    there is one), else 0: the k1 KL is in the reward. r: (n,), the rest (n, L) -> (n, L)"""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return (-beta * (logp - ref_logp) * mask).index_put(
        (torch.arange(len(r), device=r.device), last), r, accumulate=True)


def gae(rho, V, mask, gamma, lam):
    """Generalised advantage estimation, V (n, L) the state values, 0 outside the mask:

        delta_t = rho_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}

    -> A and the returns A + V, (n, L) each, not whitened
    """
    A, following = torch.zeros_like(V), torch.zeros_like(V[:, 0])
    for t in reversed(range(V.shape[1])):
        next_V = V[:, t + 1] if t + 1 < V.shape[1] else 0.0
        following = (rho[:, t] + gamma * next_V - V[:, t] + gamma * lam * following) * mask[:, t]
        A[:, t] = following
    return A, (A + V) * mask


def whiten(A, mask):
    """(A - mean) / sqrt(var + 1e-8) over all response tokens of the batch, unbiased. (N, L)"""
    n = mask.sum()  # a lone token keeps its advantage of 0
    centred = (A - (A * mask).sum() / n) * mask
    return centred / (centred.square().sum() / (n - 1).clamp(min=1) + 1e-8).sqrt()


def ppo_advantages(r, old_logp, ref_logp, old_V, mask, cfg):
    """r: (N,), the rest (N, L) -> advantages, whitened, and the critic's returns, which are not"""
    rho = kl_shaped_rewards(r, old_logp, ref_logp, mask, cfg.kl_coef)
    A, R = gae(rho, old_V, mask, cfg.gamma, cfg.gae_lambda)
    return whiten(A, mask), R


def row_weights(mask, cfg):
    """What each row counts in the policy loss: PPO 1/(N |y_i|), the mean over a response's tokens
    and then over responses; Dr.GRPO 1/(N max_new_tokens), whatever the length. (N, L) -> (N,)"""
    length = mask.sum(1)
    if cfg.method == "drgrpo":
        length = torch.full_like(length, cfg.max_new_tokens)
    return 1 / (len(mask) * length)


def policy_loss(logp, old_logp, A, mask, weight):
    """sum_i weight_i sum_t max(-A rho, -A clip(rho, .8, 1.2)),  rho = pi(a_t) / pi_old(a_t)

    logp, old_logp, A, mask: (n, L); weight: (n,) of `row_weights`. -> the loss, and the share of
    clipped ratios per row (n,)
    """
    ratio = (logp - old_logp).exp()
    plain, clipped = -A * ratio, -A * ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = (torch.maximum(plain, clipped) * mask).sum(1)
    return (loss * weight).sum(), ((clipped > plain) * mask).sum(1) / mask.sum(1)


def value_loss(V, old_V, R, mask, n):
    """1/2 1/n sum_i 1/|y_i| sum_t max((V - R)^2, (V_clip - R)^2), V_clip within .2 of the old value

    (rows, L) each; n counts the rows of the whole batch."""
    clipped = old_V + (V - old_V).clamp(-CLIP, CLIP)
    loss = torch.maximum((V - R).square(), (clipped - R).square()) * mask
    return 0.5 * (loss.sum(1) / mask.sum(1)).sum() / n


def pool(V, e, scope):
    """The unified CoT vector:  z = sum_{t in S} w_t e_t,  w = softmax of V over the token set S.

    V (n, L), e (n, L, 64), scope (n, K, L) bool, K token sets per row -> (n, K, 64). The weights
    are not detached: the contrast trains the critic, too. An empty set gives a zero vector (D5).
    """
    V = V[:, None].masked_fill(~scope, torch.finfo(V.dtype).min)
    return (V.softmax(-1) * scope) @ e


def cosines(a, b):
    """cos(a_i, b_j), (n, d), (m, d) -> (n, m); 0 with a zero vector."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def masked_mean(loss, mask):
    """sum m l / (sum m + 1e-8). As released, (B,) times (B, 1), it is the sum of all l if any m
    (D1). loss: (N,), mask: (N,) bool -> a scalar"""
    return (loss * mask).sum() / (mask.sum() + 1e-8)


def positive_loss(z_ann, z, right):
    """Masked InfoNCE of the correct CoT, tau = .2; the pull ends at cosine .9:

        l_i = -log  exp(min(cos(z_ann_i, z_i), .9) / tau) / sum_j exp(cos(z_ann_i, z_j) / tau)

    z_ann, z: (N, 64), right: (N,) bool; no gradient into z_ann. As released the z_j have none
    either, which leaves cosine attraction (D1).
    """
    z_ann = z_ann.detach()
    pull = F.cosine_similarity(z_ann, z, dim=-1).clamp(max=CEILING)
    others = cosines(z_ann, z) / TEMPERATURE
    return masked_mean(others.logsumexp(1) - pull / TEMPERATURE, right)


def negative_loss(z_a, z_c, z_d, wrong, present):
    """The negative signal, for wrong CoT: what they share with the annotated CoT (z_c) is pulled
    to what that has in addition (z_a), and away from what they have of their own (z_d):

        l_i = -log  exp(min(cos(z_a_i, z_c_i), .9) / tau)
                    / [sum_k exp(cos(z_c_i, z_c_k) / tau) + sum_k exp(cos(z_c_i, z_d_k) / tau)]

    z_*: (N, 64); wrong: (N,) bool; present: (N, 3) bool, which rows have a z_a, a z_c and a z_d at
    all (D5). No gradient into z_a, as released into z_d neither. The pair in the numerator is not
    in the denominator, the term k = i is [code: v7].
    """
    z_a, usable = z_a.detach(), present[:, 0] & present[:, 1]
    pull = F.cosine_similarity(z_a, z_c, dim=-1).clamp(max=CEILING)
    shared, own = cosines(z_c, z_c), cosines(z_c, z_d)
    others = torch.cat([shared.masked_fill(~present[:, 1], -math.inf),
                        own.masked_fill(~present[:, 2], -math.inf)], 1) / TEMPERATURE
    loss = torch.where(usable, others.logsumexp(1) - pull / TEMPERATURE, 0.0)
    return masked_mean(loss, wrong & usable)


def common_subsequence(a, b):
    """A longest common subsequence of two lists -> its indices in a and in b, two lists of equal
    length; ties go left, as in the code's backtracking."""
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        above, here = length[i - 1], length[i]
        for j, y in enumerate(b, 1):
            here[j] = above[j - 1] + 1 if x == y else max(above[j], here[j - 1])
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append((i, j))
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return [i for i, _ in reversed(found)], [j for _, j in reversed(found)]


def columns(s):
    """The columns of a sample's response, as a list."""
    return list(range(len(s.prompt), len(s.prompt) + len(s.tokens)))


def token_sets(sampled, annotated, cfg):
    """The columns that each vector pools, of the sampled and of the annotated CoT, K lists each:
    all tokens of the CoT; for the negative signal also the common ones and the sampled CoT's own,
    and the annotated CoT's own (D6)."""
    cot, cot_ann = columns(sampled), columns(annotated)
    if cfg.signal == "positive":
        return [cot], [cot_ann]
    start = cot[0]
    in_ann, in_cot = common_subsequence(*([*s.prompt, *s.tokens][start:]
                                          for s in (annotated, sampled)))
    in_ann, in_cot = ({start + i for i in x} for x in (in_ann, in_cot))
    return ([cot, sorted(in_cot), [t for t in cot if t not in in_cot]],
            [cot_ann, [t for t in cot_ann if t not in in_ann]])


def contrastive_loss(Z, Z_ann, sets, sets_ann, right, cfg):
    """L_cl of the whole batch. Z: (N, K, 64), Z_ann: (N, K', 64), the vectors of `sets` and
    `sets_ann`; right: (N,) bool -> a scalar"""
    signals = []
    if cfg.signal in ("positive", "both"):
        signals.append(positive_loss(Z_ann[:, 0], Z[:, 0], right))
    if cfg.signal in ("negative", "both"):
        present = torch.tensor([[bool(extra), bool(shared), bool(own)] for (_, extra), (
            _, shared, own) in zip(sets_ann, sets)], device=Z.device)
        signals.append(negative_loss(Z_ann[:, 1], Z[:, 1], Z[:, 2], ~right, present))
    return sum(signals) / len(signals)


def contrastive_gradient(Z, *rest):
    """-> L_cl, a float, and its gradient dL_cl/dZ (N, K, 64), of which each micro-batch passes its
    rows on: sum(z * dL_cl/dz) has the gradient of L_cl (D2)."""
    Z = Z.detach().requires_grad_()
    loss = contrastive_loss(Z, *rest)
    return loss.item(), torch.autograd.grad(loss, Z)[0]


def group_advantages(r):
    """Dr.GRPO: A_i = r_i - mean r inside each group, not divided by the std. (B, G) -> (B, G)"""
    r = r - r[:, :1]  # so that no rounding of the mean makes contrast of none
    return r - r.mean(1, keepdim=True)


# --------------------------------------------------------------------------------- 4. evaluation


def cosine_parts(z_ann, z, right):
    """Cosines of the vectors of sampled CoT to annotated ones: of the same question, correct or
    wrong, and of different questions. (n, 64), (n, 64), (n,) bool -> a dict of 1-d tensors"""
    cos = cosines(z_ann, z)
    same = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return {"cos_correct": cos[same][right], "cos_wrong": cos[same][~right],
            "cos_other": cos[~same]}


def evaluate_vectors(policy, heads, tok, pairs, cfg, folder):
    """Mean `cosine_parts` of a sampled CoT to each of `pairs`; draws folder/vectors.png."""
    generator = torch.Generator(cfg.device).manual_seed(1234)
    drawn = sample(policy, tok, [p.prompt for p, _ in pairs], 1, cfg.max_new_tokens,
                   cfg.temperature, generator)
    right = torch.tensor([correct(s.text, p) for s, (p, _) in zip(drawn, pairs)])
    z, z_ann = (score(policy, heads, samples, [[columns(s)] for s in samples], cfg, False)[2][:, 0]
                for samples in (drawn, [s for _, s in pairs]))
    parts = cosine_parts(z_ann.cpu(), z.cpu(), right)
    draw_vectors(folder / "vectors.png", parts)
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


def draw_vectors(path, parts):
    """The picture: histograms of the cosines, by kind of pair; `parts` of `cosine_parts`."""
    fig = Figure(figsize=(5.6, 3.6), layout="tight")
    ax = fig.subplots()
    edges = torch.linspace(-1, 1, 51).tolist()
    for label, part in zip(("correct", "wrong", "other questions"), parts.values()):
        if len(part):
            ax.hist(part.tolist(), edges, alpha=0.6, density=True,
                    label=f"{label}: mean {part.mean():.2f} ({len(part)})")
    ax.set(title="annotated and sampled CoT, each kind of area 1", xlabel="cosine of the vectors")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------- 5. the loop


def scope_mask(sets, length, device):
    """n times K lists of columns -> (n, K, length) bool"""
    mask = torch.zeros(len(sets), len(sets[0]), length, dtype=torch.bool)
    for i, row in enumerate(sets):
        for k, one in enumerate(row):
            mask[i, k, one] = True
    return mask.to(device)


@torch.no_grad()
def score(policy, heads, samples, sets, cfg, logps=True):
    """N samples under the current policy and heads, without gradient.

    -> log-probs (N, L), zero unless asked for; state values (N, L); vectors (N, K, 64)
    """
    length = max(len(s.prompt) + len(s.tokens) for s in samples)
    logp, V = torch.zeros(2, len(samples), length, device=cfg.device)
    Z = torch.zeros(len(samples), len(sets[0]), SIZE, device=cfg.device)
    for rows, ids, mask in micro_batches(samples, cfg):
        n = ids.shape[1]
        hidden = hidden_states(policy, ids)
        if logps:
            logp[rows, :n] = response_logps(policy, ids, mask, cfg.temperature, hidden=hidden)[0]
        v, e = heads(hidden)
        V[rows, :n] = state_values(v, mask)
        Z[rows] = pool(v, e, scope_mask([sets[i] for i in rows], n, cfg.device))
    return logp, V, Z


def warm_up(policy, tok, train, cfg, folder):
    """Stage 1: SFT on the annotated CoT. Leaves the policy in `folder`, LoRA adapters merged."""
    steps = max(1, cfg.sft_epochs * len(train) // SFT_BATCH)
    opt = adamw(cfg.sft_lr, policy)
    state, losses = {"position": 0}, []
    for step in tqdm(range(1, steps + 1), "stage 1, SFT", disable=None):
        samples = [s for _, s in take(train, SFT_BATCH, state, f"sft{cfg.seed}")]
        rate = cfg.sft_lr * (1 - (step - 1) / steps)
        losses.append(sft_step(policy, samples, opt, cfg, f"{step} of stage 1", [rate])[0])
    print(f"stage 1: SFT on {len(train)} annotated CoT, {steps} steps, loss {losses[0]:.3f} -> "
          f"{losses[-1]:.3f}; kept in {cfg.out}/sft/")
    save_model(folder, policy.merge_and_unload() if cfg.lora else policy, tok)


def learning_rates(step, cfg):
    """[of the policy, of the heads]: linear to 0; at first the heads learn alone (D7, D9)."""
    scale = (1 - (step - 1) / cfg.steps) * min(1.0, step / max(1, cfg.warmup_steps))
    alone = cfg.method in ("carft", "reft") and step <= cfg.head_only_steps
    return [0.0 if alone else scale * cfg.lr, scale * cfg.head_lr]


@one_line
def main(argv=None):
    cfg = parse(argv)
    run = Run(cfg, "carft", METRICS, CURVES)
    policy, tok, problems, held_out, _ = set_up(cfg, TEMPLATE)
    train = annotated_set(problems, policy, tok, cfg)

    # stage 1; with --lora, switching the fresh adapters off gives the SFT policy back
    if cfg.sft_epochs:
        sft = product(Path(cfg.out).resolve() / "sft",
                      lambda to: warm_up(policy, tok, train, cfg, to))
        set_seed(cfg.seed)  # for the adapters, whether the SFT policy was there or not
        policy, tok = load_model(str(sft), cfg, cfg.lora)

    # stage 2
    ppo, contrast = cfg.method in ("carft", "reft"), cfg.cl_coef > 0
    heads = Heads(causal_lm(policy).config.hidden_size, cfg.head).to(cfg.device)
    set_seed(cfg.seed)  # whatever was drawn so far, all methods sample alike from here on
    learners = torch.nn.ModuleList([policy, heads])
    reference = frozen_reference(policy) if ppo else None
    opt = adamw(cfg.lr, *learners)
    pairs = annotate(held_out, policy, tok, cfg)[:VECTORS] if contrast else []

    def test():
        vectors = evaluate_vectors(policy, heads, tok, pairs, cfg, run.folder) if pairs else {}
        return evaluate(policy, tok, held_out, cfg, correct)[0] | vectors

    state = run.start(learners, opt, test)
    for step in run.steps(cfg.steps):
        rates = learning_rates(step, cfg)
        rest = -state["position"] % len(train)  # of the epoch; too few for a batch are dropped
        state["position"] += rest if rest < cfg.prompts else 0
        problems, annotated = zip(*take(train, cfg.prompts, state, cfg.seed))
        if cfg.method == "sft":
            loss, norm = sft_step(policy, annotated, opt, cfg, step, rates)
            run.add({"sft/loss": loss, "optim/grad_norm": norm})
            run.end_step()
            continue

        # 1. sample
        batch = sample(policy, tok, [p.prompt for p in problems], cfg.group, cfg.max_new_tokens,
                       cfg.temperature)                                              # N Samples
        n, mask = len(batch), collate(batch, cfg.device)[1]                          # (N, L)
        right, number = torch.tensor([answer_of(s.text, problems[i // cfg.group])
                                      for i, s in enumerate(batch)], device=cfg.device).T  # (N,)
        run.add(sampling_statistics(batch, right.tolist(), cfg.group, state))

        # 2. log-probs, values and vectors of the old policy; annotated vectors for all epochs
        sets, sets_ann = zip(*(token_sets(s, annotated[i // cfg.group], cfg)
                               for i, s in enumerate(batch)))
        if ppo or cfg.ppo_epochs > 1:
            old_logp, old_V, old_Z = score(policy, heads, batch, sets, cfg)          # (N, L) (N, L)
        if contrast or cfg.partial_reward == "embedding":
            Z_ann = score(policy, heads, annotated, sets_ann, cfg, logps=False)[2]   # (N, K', 64)

        # 3. reward
        cos = torch.zeros(n, device=cfg.device)
        if cfg.partial_reward == "embedding":
            cos = F.cosine_similarity(Z_ann[:, 0], old_Z[:, 0])
        r = rewards(right, number, partial_rewards(cfg.partial_reward, cos))         # (N,)
        run.add({"reward/mean": r})

        # 4. advantages of tokens, weights of rows
        if ppo:
            ref_logp = reference_logps(policy, reference, batch, cfg)                # (N, L)
            A, R = ppo_advantages(r, old_logp, ref_logp, old_V, mask, cfg)           # (N, L) each
            run.add(critic_statistics(old_logp, ref_logp, old_V, R, mask))
        else:
            A = group_advantages(r.view(-1, cfg.group)).view(-1, 1) * mask           # (N, L)
        if contrast:
            parts = cosine_parts(Z_ann[:, 0], old_Z[:, 0], right)
            run.add({f"cl/{name}": part for name, part in parts.items()})
        weight = row_weights(mask, cfg)                                              # (N,)

        # 5. one optimizer step per epoch; a row without advantage (drgrpo) needs no forward
        active = [i for i in range(n) if ppo or A[i].any()]
        for epoch in range(cfg.ppo_epochs):
            L_pg, L_vf = 0.0, 0.0
            if contrast:
                Z = score(policy, heads, batch, sets, cfg, logps=False)[2] if epoch else old_Z
                L_cl, dZ = contrastive_gradient(Z, Z_ann, sets, sets_ann, right, cfg)
                run.add({"cl/loss": L_cl})
            for rows, ids, m in micro_batches(batch, cfg, active):                   # (rows, w)
                w = ids.shape[1]
                hidden = hidden_states(policy, ids)                                  # (rows, w, H)
                logp, _ = response_logps(policy, ids, m, cfg.temperature, hidden=hidden)
                old = old_logp[rows, :w] if epoch else logp.detach()  # at first the ratio is 1
                loss, cut = policy_loss(logp, old, A[rows, :w], m, weight[rows])
                L_pg += loss.item()
                if ppo:
                    V, e = heads(hidden)
                    vf = value_loss(state_values(V, m), old_V[rows, :w], R[rows, :w], m, n)
                    L_vf += vf.item()
                    loss = loss + cfg.vf_coef * vf
                if contrast:
                    z = pool(V, e, scope_mask([sets[i] for i in rows], w, cfg.device))
                    loss = loss + cfg.cl_coef * (z * dZ[rows]).sum()  # gradient of L_cl (D2)
                loss.backward()
                run.add({"policy/clipped": cut})
                if epoch == 0:
                    run.add({"policy/mismatch": mismatch(logp, m, [batch[i] for i in rows])})
            run.add({"policy/loss": L_pg, "optim/grad_norm": update(opt, cfg, step, rates)})
            if ppo:
                run.add({"value/loss": L_vf})

        run.end_step([
            {"prompt": problems[i // cfg.group].question, "response": batch[i].text,
             "reward": r[i].item(), "annotated": annotated[i // cfg.group].text}
            for i in range(0, n, cfg.group)][:4])
    run.finish(policy, tok)


def critic_statistics(old_logp, ref_logp, V, R, mask):
    """The KL to the reference, and how good the critic is: 1 - var(R - V) / var(R) over tokens,
    if the returns R differ at all. (N, L) each"""
    values = {"policy/kl": ((old_logp - ref_logp) * mask).sum(1)}
    R, V = R[mask > 0], V[mask > 0]
    if R.max() > R.min():
        values["value/explained"] = 1 - (R - V).var() / R.var()
    return values


if __name__ == "__main__":
    main()
