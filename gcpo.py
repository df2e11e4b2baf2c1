"""GCPO: Group Contrastive Policy Optimization (Wu & Liu 2025, arXiv:2510.07790v1), the whole loop.

THE IDEA
    GRPO-style training learns from the contrast inside a group of the model's own responses. A
    group that is all wrong has no contrast, so the hardest problems teach nothing. GCPO puts a
    reference solution, the golden answer, in the place of one response of every all-wrong group:
    the group then says "this, not that". Ratios are taken per sequence, and there is no KL term.

THE LOOP                                             code                    source
    1. sample G responses to each of B prompts       common.sample           DAPO Alg. 1
    2. verify them: correct c, reward r              correct, reward         DAPO Eq. 7, 13
    3. all wrong? golden answer replaces one         replace_golden          [2nd: KR], abstract
       (DAPO: drop all-equal groups, sample again)   main                    DAPO Eq. 11
    4. advantage of each response in its group       group_advantages        GSPO Eq. 6
    5. log-probabilities under the old policy        common.batch_logps      GSPO Eq. 7
    6. ratio, clip, aggregate, AdamW                 policy_loss             GSPO Eq. 5, DAPO Eq. 8

METHODS  --method   golden   ratio      aggregation   clip            KL       flat groups
         gcpo       yes      sequence   sequence      3e-4 / 4e-4     none     golden / kept
         gspo       no       sequence   sequence      3e-4 / 4e-4     none     kept
         dapo       no       token      token         0.2 / 0.28      none     sampled again
         grpo       no       token      sequence      0.2 / 0.2       .04 k3   kept

WHAT IS KNOWN OF THE PAPER
    Only its abstract and the start of its introduction could be read; from them is that a golden
    answer supplies the right response where the model cannot solve a problem. That it replaces ONE
    response of an all-wrong group, that ratios are per sequence and that the KL term is gone is
    from reviews [2nd: KR = a Korean one] and from a table in another paper [2nd: HOB = "On the
    Hidden Objective Biases of Group-based RL"]. The equations are those of the papers it builds on:
    GSPO (2507.18071, Sec. 2-5.1 read), DAPO (2503.14476, Sec. 1-4.3 read); GRPO (2402.03300) is
    taken from DAPO Eq. 4-6, its KL estimator from trl and verl. The rest is ours, decided here:

    D1  trigger: every response of the group is wrong, by correctness, never by shaped reward
    D2  which response is replaced: uniformly random; with equal wrong rewards the expected
        gradient is the same for any choice that does not look at the responses
    D3  old log-probs of the golden answer: recomputed under the old policy, so its ratio starts
        at 1; --golden_old one takes 1 as its old probability instead (LUFFY's choice)
    D4  sequence ratio: length-normalised as in GSPO Eq. 7; --ratio sequence_sum as HOB prints it
    D5  all-correct groups: left with zero advantage, counted in the denominator; the abstract
        names them, no source has a mechanism. --dynamic_sampling samples others in their place
    D6  with --dynamic_sampling the golden answer comes first: a repaired group passes the filter
    D7  clip range: GSPO's. It only matters with --updates > 1, and then cuts off the golden answer
        first (it moves most): --golden_clip false exempts it, golden/clipped shows it
    D8  every golden answer passes the verifier once, at load, or is rejected and counted; its
        reward is that of a correct answer, without length penalty
    D9  one longer than --max_new_tokens is rejected, not truncated: truncated it has no answer
    D10 rewards for format or length: none; --overlong_cache adds DAPO's soft length penalty
    D11 the golden answer is the whole solution; one without any reasoning is rejected
    D12 no schedule: golden answers are used at full strength throughout
    D13 --updates N: the batch is split by prompts into N mini-batches of one AdamW step each, as
        GSPO and DAPO do; the first has ratio 1 exactly
    D14 std with ddof 1 and 1e-6 in the denominator [code: verl]. Normalisers count the whole
        mini-batch [code: verl]; DAPO Eq. 8 is written per group
    D15 the golden answer has the form that the prompt asks for: a final-answer line is added where
        its mark is missing, and </think> before it where the chat template opened <think>

SHAPES  B prompts, G responses each, N = B*G rows, L columns; row i belongs to prompt i // G.
RUN     python gcpo.py                               # tiny model, CPU, offline, minutes
        python gcpo.py --method dapo                 # a baseline in the same loop
        python gcpo.py --model Qwen2.5-1.5B          # one CUDA GPU, GSM8K
        python gcpo.py --model Qwen2.5-7B --lora     # LoRA adapters
"""

import random
import re
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean as mean
from typing import Literal

import torch
from tqdm import tqdm

import common
from common import (
    MasterAdamW,
    Run,
    append_rows,
    arg,
    as_samples,
    batch_logps,
    collate,
    encode_prompts,
    evaluate,
    extract_answer,
    fail,
    frozen_reference,
    generator_of,
    kept_rows,
    load_model,
    micro_batches,
    parse_config,
    problem_stream,
    reference_logps,
    response_logps,
    response_part,
    same_answer,
    sample,
    sampling_statistics,
    set_up,
    trained_prompt,
    update,
)

# ------------------------------------------------------------------------------ 1. configuration


@dataclass
class Config(common.Config):
    method: Literal["gcpo", "gspo", "dapo", "grpo"] = arg("gcpo", "the paper's, or a baseline")
    # Left out, these follow --method (the table above).
    golden: str | None = arg(None, "golden answers: dataset (its solutions), a model that writes "
                                      "them, or off [2nd: KR: ground truth or a larger model]")
    ratio: Literal["sequence", "sequence_sum", "token"] | None = arg(
        None, "importance ratio: GSPO Eq. 7, the same without 1/|y| (D4), or per token")
    aggregation: Literal["sequence", "token"] | None = arg(
        None, "mean over each response, then over responses, or mean over all tokens")
    clip_low: float | None = arg(None, "epsilon_low; its source stands in METHODS")
    clip_high: float | None = arg(None, "epsilon_high, likewise")
    kl_beta: float | None = arg(None, "beta of the k3 KL term [DeepSeekMath Sec. 4.2: 0.04]")
    dynamic_sampling: bool | None = arg(None, "sample again for flat groups [DAPO Eq. 11] (D5)")
    overlong_cache: int | None = arg(None, "L_cache of the soft length penalty, in tokens, 0 = "
                                              "none [DAPO Sec. 4.1: a fifth of the budget]")
    # Of the golden answer.
    golden_old: Literal["policy", "one"] = arg("policy", "its old probability (D3)")
    golden_clip: bool = arg(True, "clip its ratio like any other (D7)")
    updates: int = arg(1, "optimizer steps per rollout batch [GSPO 4, DAPO 16, ours 1] (D13)")


METHODS = {
    "gcpo": dict(golden="dataset", ratio="sequence", aggregation="sequence",  # [2nd: KR, HOB]
                 clip_low=3e-4, clip_high=4e-4,                               # GSPO's (D7)
                 kl_beta=0.0, dynamic_sampling=False, overlong_cache=0),
    "gspo": dict(golden="off", ratio="sequence", aggregation="sequence",      # [GSPO Eq. 5, 7]
                 clip_low=3e-4, clip_high=4e-4,                               # [GSPO Sec. 5.1]
                 kl_beta=0.0, dynamic_sampling=False, overlong_cache=0),
    "dapo": dict(golden="off", ratio="token", aggregation="token",            # [DAPO Eq. 8, 9]
                 clip_low=0.2, clip_high=0.28,                                # [DAPO Sec. 4.1]
                 kl_beta=0.0, dynamic_sampling=True, overlong_cache=None),    # a fifth
    "grpo": dict(golden="off", ratio="token", aggregation="sequence",         # [DAPO Eq. 4-6]
                 clip_low=0.2, clip_high=0.2,                                 # [ours: not stated]
                 kl_beta=0.04, dynamic_sampling=False, overlong_cache=0),     # [DSMath Sec. 4.2]
}
# The tiny model's own values, used where no flag was given.
TINY = dict(dataset="tiny", device="cpu", steps=300, prompts=64, group=4, max_new_tokens=64,
            lr=5e-4, eval_size=0, eval_every=25, save_every=50)
MAX_BATCHES = 10  # of prompts that dynamic sampling tries in one step [ours]
GOLDEN_TRIES = 4  # responses per problem of a golden-answer model; the first right one is kept

METRICS = {
    "reward/mean": "mean reward of the sampled responses, golden answers not included",
    **common.SAMPLING_METRICS,
    "groups/golden": "share of trained groups that hold a golden answer",
    "groups/unrepaired": "share of sampled groups that stayed all wrong: --golden off, or none",
    "golden/logp": "mean log-probability per token of the golden answers under the old policy",
    "golden/clipped": "share of golden answers whose ratio is clipped: 0 with one update",
    "policy/clipped": "share of the trained ratios of sampled responses that are clipped, likewise",
    "policy/kl": "k3 KL to the reference policy per token; only with --kl_beta",
    "sample/rounds": "rounds of sampling; more than 1 only with --dynamic_sampling",
    "loss/total": "about 0 for one update of gcpo, gspo: the signal is in the gradient, not here",
    "optim/grad_norm": "before clipping, the largest of the updates; 0 when no group has contrast",
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
    if cfg.overlong_cache is None:
        cfg.overlong_cache = cfg.max_new_tokens // 5
    if cfg.group < 2:
        fail(f"--group {cfg.group}: an advantage compares responses, so a group needs at least 2")
    if not 1 <= cfg.updates <= cfg.prompts:
        fail(f"--updates {cfg.updates}: the batch is split by prompts, so 1 to --prompts")
    if not 0 <= cfg.overlong_cache <= cfg.max_new_tokens:
        fail(f"--overlong_cache {cfg.overlong_cache}: must be 0 to --max_new_tokens")
    if cfg.aggregation == "token" and cfg.ratio != "token":
        fail("--aggregation token with a sequence ratio would weight responses by their length; "
             "use --ratio token or --aggregation sequence")
    if not (0 < cfg.clip_low < 1 and cfg.clip_high > 0 and cfg.kl_beta >= 0):
        fail("--clip_low must be in (0, 1), --clip_high positive, --kl_beta not negative")
    return cfg


# ---------------------------------------------------------------------------- 2. task and reward


@dataclass
class Group:
    """G responses to one problem. `golden` is the index of the golden answer, if it has one."""

    problem: object
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
    """r: 1 or 0; for dapo 1 or -1 (DAPO Eq. 7), plus R_length (Eq. 13) where it is on."""
    r = (1.0 if right else -1.0) if cfg.method == "dapo" else float(right)
    if cfg.overlong_cache:
        r += overlong_penalty(length, cfg.max_new_tokens, cfg.overlong_cache)
    return r


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
    """Step 3: the golden answer takes the place of response `index` of an all-wrong group (D1).

    Its reward is 1, as for any correct answer (D8). Any other group, and one without a golden
    answer (None), is returned as it is.
    """
    if any(group.correct) or golden is None:
        return group

    def put(values, value):
        return [*values[:index], value, *values[index + 1:]]

    return replace(group, samples=put(group.samples, golden), correct=put(group.correct, True),
                   rewards=put(group.rewards, 1.0), golden=index)


def golden_answers(problems, tok, cfg, run, instruction):
    """The golden answer of each problem that has a usable one, collected once (D8, D9, D11).

    -> {(question, answer): Sample}, continuations of the very prompt ids that the policy sees.
    """
    if cfg.golden == "off":
        return {}
    if cfg.golden == "dataset":
        texts = {(p.question, p.answer): p.solution for p in problems}
    else:
        texts = written_by_model(problems, cfg, run, instruction)
    have = [p for p in problems if texts.get((p.question, p.answer))]
    # the chat template ends every prompt alike
    thinking = tok.decode(problems[0].prompt[-8:]).rstrip().endswith("<think>")
    full = [in_form(texts[p.question, p.answer], p, instruction, thinking) for p in have]
    golden, bare, wrong, long = {}, 0, 0, 0
    for p, answer in zip(have, as_samples(tok, [p.prompt for p in have], full)):
        if not re.sub(r"#### *|\\boxed|[{}$.]", "", answer.text).replace(p.answer, "", 1).strip():
            bare += 1
        elif not correct(answer.text, p):
            wrong += 1
        elif len(answer.tokens) > cfg.max_new_tokens:
            long += 1
        else:
            golden[p.question, p.answer] = answer
    counts = (f"{len(golden)} of {len(problems)} problems; rejected: {wrong} fail the verifier, "
              f"{long} are longer than --max_new_tokens, {bare} have no reasoning; "
              f"{len(problems) - len(have)} have no solution")
    print(f"golden answers: {counts}")
    if not golden:
        fail(f"--golden {cfg.golden}: no usable golden answer ({counts}); use --golden <model>, or "
             "--golden off")
    return golden


def in_form(text, problem, instruction, thinking):
    """D15: the golden answer as the prompt asks for it; `thinking`: the template opened <think>."""
    mark = "\\boxed" if "\\boxed" in instruction else "####"
    final = f"\\boxed{{{problem.answer}}}" if mark == "\\boxed" else f"#### {problem.answer}"
    # A solution that states another answer stays as it is, for the verifier to reject.
    if mark not in text and (extract_answer(text) is None or correct(text, problem)):
        text = f"{text}\n{final}"
    if thinking and "</think>" not in text:
        text = f"{text}\n</think>\n\n{final}"
    return text


def written_by_model(problems, cfg, run, instruction):
    """Solutions sampled from the model named by --golden, only verified ones, for the problems
    that this run can meet; kept in golden.jsonl as they come, so that nothing is written twice."""
    cache = run.folder / "golden.jsonl"
    rows = kept_rows(cache, model=str, question=str, answer=str, text=str)
    texts = {(r["question"], r["answer"]): r["text"] for r in rows if r["model"] == cfg.golden}
    n = len(problems) if cfg.dynamic_sampling else min(len(problems), cfg.steps * cfg.prompts)
    met = list(islice(problem_stream(problems, 0, cfg.seed), n))
    todo = [part for part in (met[i:i + 64] for i in range(0, n, 64))
            if any((p.question, p.answer) not in texts for p in part)]
    if not todo:
        return texts
    teacher, teacher_tok = load_model(cfg.golden, cfg, flag="--golden")
    instruction = trained_prompt(teacher, "instruction", instruction)
    for part in tqdm(todo, desc=f"golden answers by {cfg.golden}", disable=None):
        own = encode_prompts([replace(p) for p in part], teacher, teacher_tok, instruction,
                             cfg.max_new_tokens, f"--golden {cfg.golden}")
        found = sample(teacher, teacher_tok, [p.prompt for p in own], GOLDEN_TRIES,
                       cfg.max_new_tokens, cfg.temperature, generator_of(cfg, part[0].question))
        right = [s.text if s.finished and correct(s.text, own[i // GOLDEN_TRIES]) else ""
                 for i, s in enumerate(found)]
        best = {(p.question, p.answer): max(right[i * GOLDEN_TRIES:(i + 1) * GOLDEN_TRIES],
                                            key=bool) for i, p in enumerate(own)}
        new = {(p.question, p.answer): best.get((p.question, p.answer), "") for p in part}
        append_rows(cache, [{"model": cfg.golden, "question": question, "answer": answer,
                             "text": text} for (question, answer), text in new.items()])
        texts |= new
    return texts


# -------------------------------------------------------------------------- 3. the paper's maths


def group_advantages(rewards, ddof=1, eps=1e-6):
    """GSPO Eq. 6, GRPO:  A_i = (r_i - mean r) / (std r + eps), inside each group. (B, G) -> (B, G)

    A flat group gets exact zeros: no contrast, no gradient.
    """
    rewards = rewards - rewards[:, :1]  # so that no rounding of the mean makes contrast of none
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
    """The k3 estimator, pi_ref/pi - log(pi_ref/pi) - 1 >= 0, per sampled token. (n, L) -> (n, L)

    [DSMath Eq. 4 as trl and verl have it]
    """
    return (ref_logp - logp).exp() - (ref_logp - logp) - 1


def policy_loss(logp, old_logp, ref_logp, A, mask, cfg, n_seq, n_tok, unclipped=None):
    """The negated objective of all four methods; only `logp` carries gradient.

        J = aggregate over tokens of  min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) - beta KL
        gcpo, gspo   GSPO Eq. 5    1/N sum_i 1/|y_i| sum_t          w = s_i, the same for all t
        grpo         DAPO Eq. 5    1/N sum_i 1/|y_i| sum_t          w = w_it
        dapo         DAPO Eq. 8    1/(sum_i |y_i|) sum_i sum_t      w = w_it

    logp, old_logp, ref_logp (None without KL), mask: (n, L); A: (n,). n_seq and n_tok count the
    whole mini-batch, of which these n rows may be a part. `unclipped` (n,) marks rows that are
    never clipped. Returns the loss, a scalar, and per row (n,) the share of ratios clipped and the
    mean KL.
    """
    w = importance_ratio(logp, old_logp, mask, cfg.ratio)             # (n, L) or (n, 1)
    A = A[:, None]                                                    # (n, 1)
    clipped = w.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if unclipped is not None:
        clipped = torch.where(unclipped[:, None], w, clipped)
    J = torch.minimum(w * A, clipped * A)
    cut = (clipped * A < w * A).expand_as(mask)
    kl = k3_kl(logp, ref_logp) * mask if cfg.kl_beta else torch.zeros_like(mask)
    J = (J - cfg.kl_beta * kl) * mask                                 # (n, L)
    length = mask.sum(1)                                              # |y_i|
    loss = -(J.sum() / n_tok if cfg.aggregation == "token" else (J.sum(1) / length).sum() / n_seq)
    return loss, (cut * mask).sum(1) / length, (kl.detach().sum(1) / length)


# --------------------------------------------------------------------------------- 4. evaluation
# Greedy accuracy on held-out problems, and mean@k, pass@k, maj@k with --eval_samples k:
# common.evaluate with the verifier above. Mean@32 on AIME-2024 is the paper's [2nd: KR].

# ---------------------------------------------------------------------------------- 5. the loop


def main(argv=None):
    cfg = parse(argv)
    run = Run(cfg, "gcpo", METRICS, CURVES)
    policy, tok, train, held_out, instruction = set_up(cfg)
    golden = golden_answers(train, tok, cfg, run, instruction)
    reference = frozen_reference(policy) if cfg.kl_beta else None
    opt = MasterAdamW(policy, lr=cfg.lr)

    def test():
        return evaluate(policy, tok, held_out, cfg, correct)

    state = run.start(policy, opt, test)
    for step in run.steps(state):
        # 1-3. sample, verify, repair; with dynamic sampling until B groups have contrast
        sampled, groups, rounds = [], [], 0
        pool = min(len(train), MAX_BATCHES * cfg.prompts) if cfg.dynamic_sampling else 1
        while len(groups) < cfg.prompts and len(sampled) < pool:
            stream = problem_stream(train, state["position"], cfg.seed)
            wanted = max(cfg.prompts - len(groups), cfg.prompts // 4)
            new = roll_out(policy, tok, list(islice(stream, wanted)), cfg)
            repaired = [replace_golden(g, golden.get((g.problem.question, g.problem.answer)),
                                       random.randrange(cfg.group)) for g in new]          # D2
            if cfg.dynamic_sampling:                                                  # DAPO Eq. 11
                repaired = [g for g in repaired if 0 < sum(g.correct) < cfg.group]
            sampled, groups, rounds = sampled + new, groups + repaired, rounds + 1
            state["position"] += len(new)
        groups = groups[:cfg.prompts]
        if len(groups) < cfg.prompts:
            tqdm.write(f"step {step}: only {len(groups)} of {len(sampled)} sampled groups have "
                       f"contrast, the pool is exhausted: training on fewer than {cfg.prompts}")

        # 4. advantages, after the repair                                            # (N,)
        batch = [s for g in groups for s in g.samples]
        is_golden = torch.tensor([i == g.golden for g in groups for i in range(cfg.group)],
                                 dtype=torch.bool, device=cfg.device)
        rewards = torch.tensor([g.rewards for g in groups]).view(-1, cfg.group)
        A = group_advantages(rewards).flatten()
        flat, A = (A == 0).tolist(), A.to(cfg.device)

        # 5. log-probs of the repaired batch under the old policy; with one update they are the
        #    current ones, so that the first pass gives them for free
        old = batch_logps(policy, batch, cfg) if cfg.updates > 1 and batch else None

        # 6. one optimizer step per mini-batch; flat rows (A = 0) count but need no forward
        loss_total, norms, seen = 0.0, [], []
        minis = torch.arange(len(batch)).view(-1, cfg.group).tensor_split(cfg.updates)
        for mini in (m.flatten().tolist() for m in minis):
            n_tok = sum(len(batch[i].tokens) for i in mini)
            active = [i for i in mini if cfg.kl_beta or not flat[i]]
            for micro in micro_batches([batch[i] for i in active], cfg.micro_tokens):
                rows = [active[j] for j in micro]
                ids, mask = collate([batch[i] for i in rows], cfg.device)             # (n, L)
                logp, _ = response_logps(policy, ids, mask, cfg.temperature)
                old_logp = old[rows, :ids.shape[1]] if norms else logp.detach()       # D13
                denominator = old_logp if cfg.golden_old == "policy" else (
                    old_logp.masked_fill(is_golden[rows, None], 0.0))                 # D3
                ref_logp = (reference_logps(policy, reference, ids, mask, cfg.temperature)
                            if cfg.kl_beta else None)
                loss, cut, kl = policy_loss(
                    logp, denominator, ref_logp, A[rows], mask, cfg, len(mini), n_tok,
                    unclipped=None if cfg.golden_clip else is_golden[rows])
                loss.backward()
                loss_total += loss.item()
                seen += zip(rows, cut.tolist(), kl.tolist(), old_logp.tolist())
            norms.append(update(opt, cfg, step, loss_total))

        state["tokens"] += sum(len(s.tokens) for g in sampled for s in g.samples)
        values = step_statistics(sampled, groups, seen, cfg, state["tokens"]) | {
            "sample/rounds": rounds, "loss/total": loss_total, "optim/grad_norm": max(norms)}
        examples = [
            {"prompt": g.problem.question, "response": g.samples[i].text, "reward": g.rewards[i],
             "golden": i == g.golden} for g in groups[:4] for i in (0, g.golden) if i is not None]
        run.end_step(state, values, examples, policy, opt, test)
    run.finish(state, policy, tok, test)


def step_statistics(sampled, groups, seen, cfg, tokens):
    """What a step's METRICS say about sampling and about the rows that were trained on.

    `seen` holds per trained row: index, share of ratios clipped, mean KL, old log-probs (L).
    """
    rewards = [r for g in sampled for r in g.rewards]
    repaired = sum(g.golden is not None for g in groups)
    values = sampling_statistics([s for g in sampled for s in g.samples],
                                 [c for g in sampled for c in g.correct], cfg.group, tokens)
    values |= {"reward/mean": sum(rewards) / len(rewards),
               "groups/golden": repaired / max(1, len(groups)),
               "groups/unrepaired": values["groups/all_wrong"] - repaired / len(sampled)}
    rows = {True: [], False: []}  # by: is it a golden answer?
    for i, cut, kl, logp in seen:
        group, j = groups[i // cfg.group], i % cfg.group
        rows[j == group.golden].append((group.samples[j], cut, kl,
                                        response_part(group.samples[j], logp)))
    if rows[True]:
        values["golden/logp"] = mean(mean(logp) for _, _, _, logp in rows[True])
        values["golden/clipped"] = mean(cut for _, cut, _, _ in rows[True])
    if rows[False]:
        values["policy/clipped"] = mean(cut for _, cut, _, _ in rows[False])
        values["policy/mismatch"] = max(abs(a - b) for s, _, _, logp in rows[False]
                                        for a, b in zip(logp, s.logps))
        if cfg.kl_beta:
            values["policy/kl"] = mean(kl for _, _, kl, _ in rows[False])
    return values


if __name__ == "__main__":
    main()
