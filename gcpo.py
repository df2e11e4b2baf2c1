"""GCPO: Group Contrastive Policy Optimization (Wu & Liu 2025, arXiv:2510.07790v1), the whole loop.

GRPO learns from the contrast inside a group of the model's own responses. A group that is all wrong
has no contrast, so the hardest problems teach nothing. GCPO puts a reference solution, the golden
answer, in the place of one response of every all-wrong group: the group then says "this, not that".
Does it help? huggingface/trl#2680 asked for it, and was closed for want of evidence.

THE LOOP                                             code                    source
    1. sample G responses to each of B prompts       common.sample           DAPO Alg. 1
    2. verify them: correct c, reward r              correct, reward         DAPO Eq. 7, 13
    3. all wrong? golden answer replaces one         replace_golden          [2nd: KR], abstract
       (DAPO: drop all-equal groups, sample again)   main                    DAPO Eq. 11
    4. advantage of each response in its group       group_advantages        GSPO Eq. 6
    5. log-probabilities under the old policy        common.batch_logps      GSPO Eq. 7
    6. ratio, clip, aggregate, AdamW                 policy_loss             GSPO Eq. 5, DAPO Eq. 8

METHODS  --method   golden   ratio      aggregation   clip            KL       flat groups
         gcpo       yes      sequence   sequence      3e-4 / 4e-4     none     repaired or kept
         gspo       no       sequence   sequence      3e-4 / 4e-4     none     kept
         dapo       no       token      token         0.2 / 0.28      none     sampled again
         grpo       no       token      sequence      0.2 / 0.2       .04 k3   kept

Of the paper only the abstract and the start of its introduction could be read. That one response is
replaced, that ratios are per sequence and that there is no KL term comes from a Korean review
[2nd: KR] and a table in "On the Hidden Objective Biases of Group-based RL" [2nd: HOB]. The
equations are those of the papers that it builds on: GSPO (2507.18071), DAPO (2503.14476) and GRPO
(2402.03300). What none of them tells is marked [ours] where it acts.

    python gcpo.py                               # tiny model, CPU, offline, minutes
    python gcpo.py --method dapo                 # a baseline in the same loop
    python gcpo.py --model Qwen2.5-1.5B          # one CUDA GPU, GSM8K
    python gcpo.py --model Qwen2.5-7B --lora     # LoRA adapters
"""

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

import common
from common import (
    Run, adamw, arg, as_samples, batch_logps, encode_prompts, evaluate, extract_answer, fail,
    frozen_reference, generator_of, load_model, micro_batches, mismatch, one_line, parse_config,
    product, read_json, reference_logps, response_logps, same_answer, sample, sampling_statistics,
    set_up, take, trained_prompt, update, write_rows,
)

# ------------------------------------------------------------------------------ 1. configuration


@dataclass
class Config(common.Config):
    positive = (*common.Config.positive, "clip_low", "clip_high", "updates")

    method: Literal["gcpo", "gspo", "dapo", "grpo"] = arg("gcpo", "the paper's, or a baseline")
    golden: str = arg("dataset", "golden answers: dataset (its solutions), a model that writes "
                                 "them, or off [2nd: KR: ground truth or a larger model]")
    ratio: Literal["sequence", "sequence_sum", "token"] = arg(
        "sequence", "importance ratio: GSPO Eq. 7, the same without 1/|y| [2nd: HOB], or per token")
    aggregation: Literal["sequence", "token"] = arg(
        "sequence", "mean over each response, then over responses, or mean over all tokens")
    clip_low: float = arg(3e-4, "epsilon_low [GSPO Sec. 5.1]")
    clip_high: float = arg(4e-4, "epsilon_high [GSPO Sec. 5.1]")
    kl_beta: float = arg(0.0, "beta of the k3 KL term")
    dynamic_sampling: bool = arg(False, "sample again for flat groups [DAPO Eq. 11]")
    overlong_cache: float = arg(0.0, "L_cache of the length penalty, a share of --max_new_tokens")
    updates: int = arg(1, "optimizer steps per rollout batch [GSPO 4, DAPO 16, ours 1]")


METHODS = {  # what differs from the defaults above
    "gcpo": {},                                                               # [2nd: KR, HOB]
    "gspo": dict(golden="off"),                                               # [GSPO Eq. 5, 7]
    "dapo": dict(golden="off", ratio="token", aggregation="token",            # [DAPO Eq. 8, 9]
                 clip_low=0.2, clip_high=0.28, overlong_cache=0.2,            # [DAPO Sec. 4.1]
                 dynamic_sampling=True),
    "grpo": dict(golden="off", ratio="token",                                 # [DAPO Eq. 4-6]
                 clip_low=0.2, clip_high=0.2,                                 # [ours: not stated]
                 kl_beta=0.04),                                               # [DSMath Sec. 4.2]
}
# The tiny model's own values, used where no flag was given.
TINY = dict(dataset="tiny", device="cpu", steps=300, prompts=64, group=4, max_new_tokens=64,
            lr=5e-4, micro_tokens=1024, eval_size=0, eval_every=25, save_every=50)
MAX_BATCHES = 10  # of prompts that dynamic sampling tries in one step [ours]
GOLDEN_TRIES = 4  # responses per problem of a golden-answer model [ours]

METRICS = {
    "reward/mean": "mean reward of the sampled responses, golden answers not included",
    **common.SAMPLING_METRICS,
    "groups/golden": "share of trained groups that hold a golden answer",
    "golden/logp": "mean log-probability per token of the golden answers under the old policy",
    "golden/clipped": "share of golden answers whose ratio is clipped: 0 with one update",
    "policy/clipped": "share of the trained ratios of sampled responses that are clipped, likewise",
    "policy/kl": "k3 KL to the reference policy per token; 0 without --kl_beta",
    "sample/rounds": "rounds of sampling; more than 1 only with --dynamic_sampling",
    "optim/grad_norm": "before clipping, mean of the updates; 0 when no group has contrast",
    "eval/*": "on held-out problems: accuracy, accuracy/level<n>, mean@k, pass@k, maj@k",
}
CURVES = {
    "held-out greedy accuracy": ["eval/accuracy", "eval/accuracy/level*"],
    "shares of the sampled": ["reward/accuracy", "groups/all_wrong", "groups/all_correct"],
    "golden answers, log-prob per token": ["golden/logp"],
    "entropy, nats per sampled token": ["policy/entropy"],
}


def parse(argv):
    cfg = parse_config(Config, "gcpo", __doc__, TINY, METHODS, argv)
    if cfg.group < 2:
        fail(f"--group {cfg.group}: an advantage compares responses, so a group needs at least 2")
    if cfg.updates > cfg.prompts:
        fail(f"--updates {cfg.updates}: the batch is split by prompts, so 1 to --prompts")
    if cfg.overlong_cache > 1 or cfg.clip_low >= 1:
        fail("--overlong_cache, a share of --max_new_tokens, is at most 1, --clip_low below 1")
    if cfg.aggregation == "token" and cfg.ratio != "token":
        fail("--aggregation token: is for the ratio of each token, so it needs --ratio token")
    return cfg


# ---------------------------------------------------------------------------- 2. task and reward


@dataclass
class Group:
    """G responses to one problem. `golden` is the index of the golden answer, if it has one."""

    problem: common.Problem
    samples: list
    correct: list
    rewards: list
    golden: int | None = None


def correct(text, problem):
    """c of DAPO's is_equivalent(a, o): does the final answer of `text` equal the problem's?"""
    return same_answer(extract_answer(text), problem.answer)


def overlong_penalty(length, l_max, l_cache):
    """DAPO Eq. 13, R_length: 0 up to l_max - l_cache tokens, then linear to -1 at l_max."""
    if length <= l_max - l_cache:
        return 0.0
    return (l_max - l_cache - length) / l_cache if length <= l_max else -1.0


def reward(right, length, cfg):
    """r: 1 or 0; for dapo 1 or -1 (DAPO Eq. 7), plus R_length (Eq. 13) where it is on. There is no
    other reward for format or length [ours]."""
    r = (1.0 if right else -1.0) if cfg.method == "dapo" else float(right)
    l_cache = int(cfg.overlong_cache * cfg.max_new_tokens)
    return r + overlong_penalty(length, cfg.max_new_tokens, l_cache) if l_cache else r


def roll_out(policy, tok, problems, cfg):
    """Steps 1 and 2 for a list of problems -> a Group each."""
    samples = sample(policy, tok, [p.prompt for p in problems], cfg.group, cfg.max_new_tokens,
                     cfg.temperature)
    groups = []
    for i, problem in enumerate(problems):
        own = samples[i * cfg.group:(i + 1) * cfg.group]
        right = [correct(s.text, problem) for s in own]
        groups.append(Group(problem, own, right,
                            [reward(c, len(s.tokens), cfg) for c, s in zip(right, own)]))
    return groups


def replace_golden(group, golden, index):
    """Step 3: the golden answer takes the place of response `index` of an all-wrong group: by
    correctness, never by shaped reward [ours]. Its reward is 1, without length penalty [ours]. Any
    other group, and one without a golden answer (None), is returned as it is."""
    if any(group.correct) or golden is None:
        return group
    new = Group(group.problem, [*group.samples], [*group.correct], [*group.rewards], index)
    new.samples[index], new.correct[index], new.rewards[index] = golden, True, 1.0
    return new


def golden_answers(problems, tok, cfg, instruction):
    """Whole solutions as continuations of the policy's prompt ids -> {(question, answer): Sample}.
    Rejected [ours]: those that are wrong, bare answers, or longer than --max_new_tokens."""
    if cfg.golden == "off":
        return {}
    if cfg.golden != "dataset":
        path = product(f"{cfg.out}/golden.jsonl",
                       lambda to: write_solutions(problems, cfg, instruction, to))
        written = {(r["question"], r["answer"]): r["solution"] for r in read_json(path, path)}
        problems = [replace(p, solution=written.get((p.question, p.answer), "")) for p in problems]
    have = [p for p in problems if p.solution]
    texts = [in_form(p, instruction, tok.decode(p.prompt[-8:])) for p in have]
    golden, rejected = {}, dict.fromkeys(("wrong", "bare", "too long"), 0)
    for p, s in zip(have, as_samples(tok, [p.prompt for p in have], texts)):
        solution, answer = (re.sub(r"####|\\boxed|[{}$.,*%\s]", "", x)
                            for x in (p.solution, p.answer))
        if not correct(s.text, p):
            rejected["wrong"] += 1
        elif not solution.replace(answer, ""):
            rejected["bare"] += 1
        elif len(s.tokens) > cfg.max_new_tokens:
            rejected["too long"] += 1
        else:
            golden[p.question, p.answer] = s
    print(f"golden answers: {len(golden)} of {len(problems)} problems; rejected: {rejected}")
    return golden or fail(f"--golden {cfg.golden}: none can be used; give a model, or off")


def in_form(problem, instruction, prompt):
    """The solution in the form that the prompt asks for: the line of the final answer is added
    where its mark is missing, and </think> where the prompt's end opened <think> [ours]. One that
    states another answer stays as it is, for the verifier to reject."""
    text, mark, final = problem.solution, "####", f"#### {problem.answer}"
    if "\\boxed" in instruction:
        mark, final = "\\boxed", f"\\boxed{{{problem.answer}}}"
    if extract_answer(text) is None or mark not in text and correct(text, problem):
        text = f"{text}\n{final}"
    if prompt.rstrip().endswith("<think>") and "</think>" not in text:
        text = f"{text}\n</think>\n\n{final}"
    return text


def write_solutions(problems, cfg, instruction, path):
    """--golden MODEL: solutions sampled from it, only verified ones, for the problems that --steps
    will meet (and a run made longer later has no others) -> a file of a data set's columns"""
    teacher, tok = load_model(cfg.golden, cfg, flag="--golden")
    n = len(problems) if cfg.dynamic_sampling else min(len(problems), cfg.steps * cfg.prompts)
    met = [replace(p) for p in take(problems, n, {"position": 0}, cfg.seed)]
    met = encode_prompts(met, teacher, tok, trained_prompt(teacher, "instruction", instruction),
                         cfg.max_new_tokens, f"--golden {cfg.golden}")
    samples = sample(teacher, tok, [p.prompt for p in met], GOLDEN_TRIES, cfg.max_new_tokens,
                     cfg.temperature, generator_of(cfg, "golden"))
    rows = {}
    for i, s in enumerate(samples):
        p = met[i // GOLDEN_TRIES]
        if s.finished and correct(s.text, p):  # of several, the last
            rows[p.question, p.answer] = dict(question=p.question, answer=p.answer, solution=s.text)
    if not rows:
        fail(f"--golden {cfg.golden}: it solves none of {n} problems; give --golden off")
    write_rows(path, rows.values())


# -------------------------------------------------------------------------- 3. the paper's maths


def group_advantages(rewards, ddof=1, eps=1e-6):
    """GSPO Eq. 6, GRPO:  A_i = (r_i - mean r) / (std r + eps), inside each group. (B, G) -> (B, G)

    A flat group gets exact zeros: no contrast, no gradient. ddof and eps are verl's [code: verl].
    """
    rewards = rewards - rewards[:, :1]  # a flat group is 0 here, whatever its mean rounds to
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (rewards.shape[1] - ddof)
    return centred / (variance.sqrt() + eps)


def importance_ratio(logp, old_logp, mask, kind):
    """How much likelier the policy makes each response than the old policy did. (n, L) each.

    token:         w_it = pi(y_it) / pi_old(y_it)                          DAPO Eq. 9  -> (n, L)
    sequence:      s_i  = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|)            GSPO Eq. 7  -> (n, 1)
    sequence_sum:  the same without the exponent                           [2nd: HOB]  -> (n, 1)
    """
    log_ratio = (logp - old_logp) * mask
    if kind == "token":
        return log_ratio.exp()
    total = log_ratio.sum(1, keepdim=True)
    return (total if kind == "sequence_sum" else total / mask.sum(1, keepdim=True)).exp()


def k3_kl(logp, ref_logp):
    """k3: pi_ref/pi - log(pi_ref/pi) - 1 >= 0, per token. (n, L) -> (n, L)  [DSMath Eq. 4]"""
    return (ref_logp - logp).exp() - (ref_logp - logp) - 1


def policy_loss(logp, old_logp, ref_logp, A, mask, cfg, n_seq, n_tok):
    """The negated objective of all four methods; only `logp` carries gradient.

        J = aggregate over tokens of  min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) - beta KL
        gcpo, gspo   GSPO Eq. 5    1/N sum_i 1/|y_i| sum_t          w = s_i, the same for all t
        grpo         DAPO Eq. 5    1/N sum_i 1/|y_i| sum_t          w = w_it
        dapo         DAPO Eq. 8    1/(sum_i |y_i|) sum_i sum_t      w = w_it

    logp, old_logp, ref_logp (None without KL), mask: (n, L); A: (n,). n_seq and n_tok count the
    whole mini-batch [code: verl; DAPO Eq. 8 is per group], of which these n rows may be a part.
    -> the loss, a scalar, and per row (n,) the share of ratios clipped and the mean KL
    """
    w = importance_ratio(logp, old_logp, mask, cfg.ratio)             # (n, L) or (n, 1)
    A = A[:, None]                                                    # (n, 1)
    clipped = w.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)            # golden answers, too [ours]
    objective = torch.minimum(w * A, clipped * A)
    cut = (clipped * A < w * A).expand_as(mask)
    kl = k3_kl(logp, ref_logp) * mask if cfg.kl_beta else torch.zeros_like(mask)
    objective = (objective - cfg.kl_beta * kl) * mask                 # (n, L)
    length = mask.sum(1)                                              # |y_i|
    if cfg.aggregation == "token":
        J = objective.sum() / n_tok
    else:
        J = (objective.sum(1) / length).sum() / n_seq
    return -J, (cut * mask).sum(1) / length, kl.detach().sum(1) / length


# --------------------------------------------------------------------------------- 4. evaluation
# common.evaluate with the verifier above; --eval_samples 32 gives the paper's mean@32 [2nd: KR].

# ---------------------------------------------------------------------------------- 5. the loop


@one_line
def main(argv=None):
    cfg = parse(argv)
    run = Run(cfg, "gcpo", METRICS, CURVES)
    policy, tok, train, held_out, instruction = set_up(cfg)
    golden = golden_answers(train, tok, cfg, instruction)
    reference = frozen_reference(policy) if cfg.kl_beta else None
    opt = adamw(cfg.lr, policy)
    state = run.start(policy, opt, lambda: evaluate(policy, tok, held_out, cfg, correct)[0])
    for step in run.steps(cfg.steps):
        # 1-3. sample, verify, repair; with dynamic sampling until B groups have contrast
        sampled, groups, rounds = [], [], 0
        most = min(len(train), MAX_BATCHES * cfg.prompts) if cfg.dynamic_sampling else cfg.prompts
        while len(groups) < cfg.prompts and len(sampled) < most:
            wanted = max(cfg.prompts - len(groups), cfg.prompts // 4)  # few prompts decode slowly
            new = roll_out(policy, tok, take(train, wanted, state, cfg.seed), cfg)
            repaired = [replace_golden(g, golden.get((g.problem.question, g.problem.answer)),
                                       random.randrange(cfg.group)) for g in new]  # which: [ours]
            if cfg.dynamic_sampling:                                               # DAPO Eq. 11
                repaired = [g for g in repaired if 0 < sum(g.correct) < cfg.group]
            sampled, groups, rounds = sampled + new, groups + repaired, rounds + 1
        groups = groups[:cfg.prompts]

        # 4. advantages, after the repair
        batch = [s for g in groups for s in g.samples]                             # N Samples
        is_golden = torch.tensor([i == g.golden for g in groups for i in range(cfg.group)])  # (N,)
        rewards = torch.tensor([g.rewards for g in groups], device=cfg.device)
        A = group_advantages(rewards.view(-1, cfg.group)).flatten()                # (N,)

        # 5. log-probs (N, L) under the old policy, of golden answers, too [ours], and under the
        #    reference; with one update the old ones are the current ones, see step 6
        old = batch_logps(policy, batch, cfg) if cfg.updates > 1 and batch else None
        ref = reference_logps(policy, reference, batch, cfg) if cfg.kl_beta and batch else None

        # 6. one optimizer step per mini-batch; without advantage and KL no forward is needed
        for mini in torch.arange(len(batch)).view(-1, cfg.group).tensor_split(cfg.updates):
            mini = mini.flatten().tolist()
            n_tok = sum(len(batch[i].tokens) for i in mini)
            active = [i for i in mini if A[i] != 0 or cfg.kl_beta]
            for rows, ids, mask in micro_batches(batch, cfg, active):              # (n, L)
                logp, _ = response_logps(policy, ids, mask, cfg.temperature)
                old_logp = logp.detach() if old is None else old[rows, :mask.shape[1]]
                ref_logp = ref[rows, :mask.shape[1]] if cfg.kl_beta else None
                loss, cut, kl = policy_loss(logp, old_logp, ref_logp, A[rows], mask, cfg,
                                            len(mini), n_tok)
                loss.backward()
                gold = is_golden[rows].to(cfg.device)
                run.add({"golden/clipped": cut[gold], "policy/clipped": cut[~gold],
                         "golden/logp": old_logp[gold][mask[gold] > 0], "policy/kl": kl[~gold],
                         "policy/mismatch": mismatch(old_logp, mask, [batch[i] for i in rows])})
            run.add({"optim/grad_norm": update(opt, cfg, step)})

        run.add(sampling_statistics([s for g in sampled for s in g.samples],
                                    [c for g in sampled for c in g.correct], cfg.group, state))
        run.add({"reward/mean": [g.rewards for g in sampled], "sample/rounds": rounds,
                 "groups/golden": [g.golden is not None for g in groups]})
        run.end_step([
            {"prompt": g.problem.question, "response": g.samples[i].text, "reward": g.rewards[i],
             "golden": i == g.golden} for g in groups[:4] for i in sorted({0, g.golden or 0})])
    run.finish(policy, tok)


if __name__ == "__main__":
    main()
