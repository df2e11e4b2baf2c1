"""Speed, memory and losses against the libraries that these scripts could have been written with.

    make bench                                      # in an environment of its own, with TRL
    python benchmarks/speed.py sampling memory      # some of the parts only
    python benchmarks/speed.py before --before DIR  # against another checkout
    python benchmarks/speed.py --rounds 1           # a quick check of all parts; nothing is written

PARTS, each into results/speed.json with the commit it was measured at
    sampling  common.sample against model.generate
    grpo      a GRPO step (sample, reward, log-probs, backward, AdamW) against TRL's GRPOTrainer
    dpo       a DPO step against TRL's DPOTrainer, with and without the reference pass
    memory    peak of log-probs, forward and backward, at a vocabulary of 151,936
    parity    loss and gradient of gcpo.policy_loss against TRL's, on the same batch
    dtype     bfloat16 against float32, ours alone: sampling and a training step, 100M parameters
    before    `python gcpo.py` of another checkout against this one

HOW CPU time on one thread: wall time where a core is free, and disturbed far less where none is.
    The sides take turns on the same weights and prompts, a round each; figures are medians over the
    rounds, to be compared only with each other. Sampling is random, so what counts is the time per
    sampled token, up to and including EOS, whatever else was decoded. Models of 1M to 100M
    parameters are Qwen2 shapes with random weights, which end a response at each token with
    probability 1/64: with at most 64 tokens, the mean response has 41. Those of 20M and 100M are
    trained in --dtype on both sides, the others in float32; bfloat16 is the same on both sides,
    float32 weights under autocast.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import gcpo
import temporal_sr

ROOT = Path(__file__).resolve().parent.parent
VOCAB, NEW = 64, 64  # of the random models unless told otherwise; most tokens of a response
SHAPES = {  # width, layers, attention heads, key/value heads, width of the MLP
    "1M": (128, 4, 4, 2, 512), "20M": (512, 6, 8, 4, 1536), "100M": (768, 12, 12, 4, 3072),
    "4 layers of 0.5B": (896, 4, 14, 2, 4864)}
NOISE = 0.2  # parity: standard deviation of log pi - log pi_old and of log pi - log pi_ref
TRL = {  # --method of gcpo.py -> the GRPOConfig that means the same
    "grpo": dict(loss_type="grpo"), "dapo": dict(loss_type="dapo"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence")}


# --------------------------------------------------------------------------------- what is timed


def qwen2(shape, vocab, tied=True):
    """A model with random weights; `shape` as in SHAPES."""
    width, layers, heads, kv_heads, mlp = shape
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, tie_word_embeddings=tied)).eval()


def random_model(size, vocab=VOCAB):
    """-> a model with random weights, and a tokenizer of the words <pad>, <eos>, t2, t3, ..."""
    model = qwen2(SHAPES[size], vocab)
    names = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, vocab))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    model.generation_config.eos_token_id = list(range(1, 1 + vocab // 64))
    return model, tok


def random_ids(number, vocab=VOCAB):
    return [random.randrange(1 + vocab // 64, vocab) for _ in range(number)]


def load(size, method, prompts, args, *flags):
    """-> the config of `python gcpo.py --method ...`, policy, tokenizer, and a
    function: number -> the next problems."""
    cfg = gcpo.parse(["--method", method, "--prompts", str(prompts), "--lr", "1e-6",
                      "--max_new_tokens", str(NEW), *precision(size, args), *flags])
    torch.manual_seed(0)
    random.seed(0)
    if size == "tiny":
        policy, tok = common.load_model("tiny", cfg)
        problems, _ = common.load_problems(cfg)
        problems = common.encode_prompts(problems, policy, tok, "", cfg.max_new_tokens, "tiny")
    else:
        policy, tok = random_model(size)
        policy.compute_dtype = getattr(torch, cfg.dtype)
        ids = [tuple(random_ids(random.randint(8, 16))) for _ in range(2000)]
        problems = [common.Problem(tok.decode(p), "t2", prompt=p) for p in ids]
    state = {"position": 0}
    return cfg, policy, tok, lambda number: common.take(problems, number, state, cfg.seed)


def precision(size, args):
    """Flags of a script: --dtype is for the large models; --micro_tokens the tiny model's own, or
    the default."""
    return ["--device", "cpu", "--dtype", args.dtype if size in ("20M", "100M") else "float32",
            *([] if size == "tiny" else ["--micro_tokens", str(common.Config.micro_tokens)])]


def timed(f, *args):
    """-> CPU seconds, and what `f` returned: the number of tokens that it sampled or trained on."""
    start = time.process_time()
    tokens = f(*args)
    return time.process_time() - start, tokens


def turns(sides, rounds, dropped=1):
    """{side: function} -> {side: [(CPU seconds, tokens), ...]}, the first rounds thrown away"""
    done = [[timed(f) for f in sides.values()] for _ in range(dropped + rounds)]
    return dict(zip(sides, zip(*done[dropped:])))


def compare(title, rounds):
    """{side: [(CPU seconds, tokens), ...]} -> medians, and how many times the last side's speed."""
    result = {side: {"ms": median(1e3 * s for s, _ in x),
                     "tokens_per_s": median(n / s for s, n in x), "rounds": len(x)}
              for side, x in rounds.items()}
    *_, peer = result.values()
    for side, r in result.items():
        r["ratio_per_token"] = r["tokens_per_s"] / peer["tokens_per_s"]
        r["ratio_per_round"] = peer["ms"] / r["ms"]
        print(f"{title}: {side:23} {r['tokens_per_s']:7,.0f} tokens per CPU second, "
              f"{r['ratio_per_token']:.2f}x; per round {r['ratio_per_round']:.2f}x", flush=True)
    return result


# -------------------------------------------------------------------------------------- sampling


def sampling(args):
    """8 prompts, groups of 8; then the tiny model on its own problems, 8 and 32 prompts."""
    cells = [("1M", VOCAB, 8, 16, 11), ("1M", VOCAB, 48, 64, 7), ("20M", VOCAB, 8, 16, 5),
             ("100M", VOCAB, 8, 16, 2), ("1M", 151936, 8, 16, 2), ("20M", 151936, 8, 16, 2),
             ("100M", 151936, 8, 16, 1)]
    result = {}
    for size, vocab, short, long, rounds in cells:
        policy, tok = random_model(size, vocab)
        random.seed(0)
        lengths = [round(short + i * (long - short) / 7) for i in range(8)]
        title = f"sampling, {size}, vocabulary {vocab:,}, prompts of {short}-{long}"
        result[title] = sampling_cell(title, policy, tok, [random_ids(n, vocab) for n in lengths],
                                      args.rounds or rounds)
    for n in (8, 32):
        _, policy, tok, take = load("tiny", "grpo", n, args)
        title = f"sampling, tiny, its problems, {n} prompts"
        prompts = [[*p.prompt] for p in take(n)]
        result[title] = sampling_cell(title, policy, tok, prompts, args.rounds or 9)
    return result


def plain_sampling(policy, tok, group, most, **more):
    """For generate: the plain softmax, nothing else applied."""
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most,
        num_return_sequences=group, pad_token_id=tok.pad_token_id,
        eos_token_id=policy.generation_config.eos_token_id, **more)


def sampling_cell(title, policy, tok, prompts, rounds, group=8):
    """generate gets left-padded prompts, and returns ids; sample also returns texts,
    log-probabilities and entropies."""
    inputs = tok.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    stop = torch.tensor(policy.generation_config.eos_token_id)
    plain = plain_sampling(policy, tok, group, NEW)

    def ours():
        return sum(len(s.tokens) for s in common.sample(policy, tok, prompts, group, NEW, 1.0))

    def generate():
        found = policy.generate(**inputs, generation_config=plain)
        ended = torch.isin(found[:, inputs["input_ids"].shape[1]:], stop)
        return int((ended.cumsum(1) - ended.long() == 0).sum())  # no EOS before it

    return compare(title, turns({"ours": ours, "generate": generate}, rounds))


# ------------------------------------------------------------------------------------ GRPO steps


def trl_flags(cfg, folder):
    """What both trainers of TRL need to do what `cfg` says, and nothing else. With bf16 they keep
    float32 weights, too, and run every forward pass, generate's included, under autocast."""
    return dict(output_dir=folder, use_cpu=True, bf16=cfg.dtype == "bfloat16", num_train_epochs=1,
                model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False,
                learning_rate=cfg.lr, max_grad_norm=common.MAX_GRAD_NORM, report_to="none",
                logging_strategy="no", save_strategy="no", disable_tqdm=True)


def trl_trainer(method, cfg, policy, tok, rows, reward):
    """TRL's GRPOTrainer on a copy of `policy`, with every setting that matters as in `cfg`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        trainer = GRPOTrainer(
            model=folder, reward_funcs=reward, processing_class=tok,
            train_dataset=Dataset.from_list(rows), args=GRPOConfig(
                **trl_flags(cfg, folder), num_generations=cfg.group,
                per_device_train_batch_size=cfg.prompts * cfg.group,
                max_completion_length=cfg.max_new_tokens, temperature=cfg.temperature,
                beta=cfg.kl_beta, use_bias_correction_kl=False,  # its default is not k3 alone
                epsilon=cfg.clip_low, epsilon_high=cfg.clip_high, **TRL[method]))
    trainer.remove_callback(PrinterCallback)
    assert (trainer.accelerator.mixed_precision == "bf16") == (cfg.dtype == "bfloat16")
    return trainer


def our_step(cfg, policy, tok, opt, problems, reward, skip_flat):
    """A step of gcpo.main with --method grpo --kl_beta 0, without logging. -> tokens sampled"""
    batch = common.sample(policy, tok, [p.prompt for p in problems], cfg.group, cfg.max_new_tokens,
                          cfg.temperature)
    n, tokens = len(batch), sum(len(s.tokens) for s in batch)
    rewards = torch.tensor([reward(s.text, problems[i // cfg.group]) for i, s in enumerate(batch)])
    A = gcpo.group_advantages(rewards.view(-1, cfg.group)).flatten()
    active = [i for i in range(n) if A[i] != 0 or not skip_flat]
    for rows, ids, mask in common.micro_batches(batch, cfg, active):
        logp, _ = common.response_logps(policy, ids, mask, cfg.temperature)
        gcpo.policy_loss(logp, logp.detach(), None, A[rows], mask, cfg, n, tokens)[0].backward()
    common.update(opt, cfg, cfg.warmup_steps)
    return tokens


def is_right(text, problem):
    return float(gcpo.correct(text, problem))


def is_even(text, _):
    """For random models: half of all responses, so that hardly a group is flat."""
    return float(len(text.split()) % 2 == 0)


def grpo(args):
    result = {}
    for size, prompts, rounds in (("tiny", 8, 9), ("tiny", 32, 9), ("1M", 8, 9), ("20M", 8, 5),
                                  ("100M", 4, 3)):
        cfg, *loaded = load(size, "grpo", prompts, args, "--kl_beta", "0")
        title = f"GRPO step, {size}, {cfg.dtype}, {prompts} prompts x {cfg.group}"
        result[title] = grpo_step(title, size, cfg, *loaded, args.rounds or rounds)
    return result


def grpo_step(title, size, cfg, policy, tok, take, rounds, dropped=1):
    """After each step of TRL (on_step_begin to on_step_end) come two of ours on the same prompts:
    with every row, which is equal work, and as gcpo.py does it, without the rows of advantage 0,
    which add nothing to the gradient; how many those are depends on the policy."""
    judge = is_right if size == "tiny" else is_even
    problems = take((dropped + rounds) * cfg.prompts)
    rows = [{"prompt": tok.decode(p.prompt), "number": i} for i, p in enumerate(problems)]
    assert all(tok(r["prompt"]).input_ids == [*p.prompt] for r, p in zip(rows, problems))
    opt = common.adamw(cfg.lr, policy)
    done, now = {"ours": [], "ours, flat rows skipped": [], "trl": []}, {}

    def reward(completions, completion_ids, number, **_):
        now["tokens"] = sum(map(len, completion_ids))
        now["problems"] = [problems[i] for i in dict.fromkeys(number)]
        return [judge(c, problems[i]) for c, i in zip(completions, number)]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now["start"] = time.process_time()

        def on_step_end(self, *_, **__):
            done["trl"].append((time.process_time() - now["start"], now["tokens"]))
            for skip, side in enumerate(("ours", "ours, flat rows skipped")):
                done[side].append(timed(our_step, cfg, policy, tok, opt, now["problems"], judge,
                                        skip))

    trainer = trl_trainer("grpo", cfg, policy, tok, rows, reward)
    trainer.add_callback(Turns())
    trainer.train()
    return compare(title, {side: x[dropped:] for side, x in done.items()})


# ------------------------------------------------------------------------------------- DPO steps


def dpo(args):
    """After each step of TRL comes ours on the same pairs, temporal_sr.dpo on one batch: reference
    pass, micro-batches, AdamW; then both with reference log-probs that were computed before. Pairs
    of random models: responses of 3 to 48 tokens to prompts of 4 to 6."""
    result = {}
    for size, pairs, rounds in (("tiny", 64, 7), ("1M", 64, 7), ("20M", 64, 5), ("100M", 16, 3)):
        _, policy, tok, take = load(size, "grpo", 1, args)
        cfg = temporal_sr.parse(["--batch", str(pairs), "--lr", "1e-6", *precision(size, args)])
        number = (1 + (args.rounds or rounds)) * pairs
        if size == "tiny":  # chosen: the solution; rejected: another one's
            problems = take(number)
            found = tok([p.solution for p in problems]).input_ids
            data = [[[*p.prompt], *both] for p, *both in zip(problems, found, found[1:] + found)]
        else:
            lengths = [(random.randint(4, 6), *random.choices(range(2, 48), k=2))
                       for _ in range(number)]
            data = [[random_ids(n) for n in row] for row in lengths]
        for precomputed in (False, True):
            title = (f"DPO step, {size}, {cfg.dtype}, {pairs} pairs"
                     f"{', reference precomputed' if precomputed else ''}")
            done = dpo_steps(policy, tok, data, cfg, precomputed)
            result[title] = compare(title, {side: x[1:] for side, x in done.items()})
    return result


def dpo_steps(policy, tok, data, cfg, precomputed):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    opt = common.adamw(cfg.lr, policy)
    done, space = {"ours": [], "trl": []}, "" if tok.chat_template else " "
    rows = [{name: tok.decode(x) + space for name, x in zip(("prompt", "chosen", "rejected"), row)}
            for row in data]
    samples = [[common.Sample(p, [*y, tok.eos_token_id], "", True) for y in both]
               for p, *both in data]
    pairs = [[temporal_sr.Candidate(s, "data") for s in both] for both in samples]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, _, state, *__, **___):
            spent, part = time.process_time() - self.start, slice(
                (state.global_step - 1) * cfg.batch, state.global_step * cfg.batch)
            both = sum(samples[part], [])
            tokens = sum(len(s.tokens) for s in both)
            ref = common.batch_logps(policy, both, cfg, 1.0)

            def step():
                temporal_sr.dpo(policy, [pairs[part]], cfg, "bench")
                return tokens

            with (patch.object(torch.optim, "AdamW", return_value=opt),  # the one of all steps
                  patch.object(temporal_sr, "batch_logps", lambda *_: ref) if precomputed
                  else nullcontext()):
                done["ours"].append(timed(step))
            done["trl"].append((spent, tokens))

    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        trainer = DPOTrainer(
            model=folder, processing_class=tok, train_dataset=Dataset.from_list(rows),
            args=DPOConfig(
                **trl_flags(cfg, folder), per_device_train_batch_size=cfg.batch, beta=cfg.beta,
                precompute_ref_log_probs=precomputed, train_sampling_strategy="sequential"))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns())
        ids = [(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"]) for x in trainer.train_dataset]
        assert ids == [(p, [*w, tok.eos_token_id], [*x, tok.eos_token_id]) for p, w, x in data]
        trainer.train()
    return done


# ---------------------------------------------------------------------------------------- memory


def memory(args):
    """8 rows of 512 tokens, of which the response has 64 to 256: 1,280 positions of 4,096. A
    process of its own per figure; peak above what it held before."""
    sides = ["backbone", "ours", "full logits"] + ["trl"] * has_trl()
    result = {}
    for grad in (True, False):
        found = {}
        for side in sides:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[side] = pool.apply(memory_cell, (side, grad))
        title = f"memory, {'forward and backward' if grad else 'forward without gradient'}"
        floor = found["backbone"]["peak_mb"]
        for side, x in found.items():
            x["above_backbone_mb"] = x["peak_mb"] - floor
            print(f"{title}: {side:12} peak {x['peak_mb']:6,.0f} MB, {x['above_backbone_mb']:6,.0f}"
                  f" above the backbone, {x['cpu_s']:.0f} CPU s, loss {x['loss']:.5f}", flush=True)
        ours, full = found["ours"], found["full logits"]
        result[title] = {**found, "full_over_ours": full["peak_mb"] / ours["peak_mb"]}
        print(f"{title}: full logits take {result[title]['full_over_ours']:.1f} times ours",
              flush=True)
    return result


def memory_cell(side, grad):
    torch.set_num_threads(1)
    policy, tok = random_model("4 layers of 0.5B", 151936)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 151936, (8, 512), generator=generator)
    mask = torch.zeros(8, 512)
    for row, length in enumerate((64, 96, 128, 128, 160, 192, 256, 256)):
        mask[row, 256:256 + length] = 1
    for p in policy.parameters():
        p.grad = torch.zeros_like(p) if grad else None
    if side == "trl":
        cfg = gcpo.parse(["--method", "grpo", "--kl_beta", "0", "--device", "cpu"])
        trainer = trl_trainer("grpo", cfg, policy, tok, [{"prompt": "-"}], lambda **_: 0.0)
        policy = trainer.model
        for p in policy.parameters():
            p.grad = torch.zeros_like(p) if grad else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident_mb("VmRSS"), time.process_time()
    with torch.set_grad_enabled(grad):
        if side == "backbone":
            loss = common.hidden_states(policy, ids).square().mean()
        elif side == "ours":
            loss = -common.response_logps(policy, ids, mask, 1.0)[0].sum() / mask.sum()
        elif side == "full logits":
            logp = policy(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
            loss = -(logp * mask[:, 1:]).sum() / mask.sum()
        else:
            logp = trainer._get_per_token_logps_and_entropies(
                policy, ids, (torch.arange(512) < 256 + mask.sum(1, keepdim=True)).long(), 256)[0]
            loss = -(logp * mask[:, 256:]).sum() / mask.sum()
        if grad:
            loss.backward()
    return {"peak_mb": resident_mb("VmHWM") - before, "cpu_s": time.process_time() - start,
            "loss": loss.item()}


def resident_mb(what):
    """VmRSS: of this process now; VmHWM: its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


# ---------------------------------------------------------------------------------------- parity


def parity(args):
    return {method: parity_of(method, args) for method in TRL}


def parity_of(method, args):
    """Sampled responses, random advantages; old and reference log-probabilities are the policy's
    own plus noise, so that ratios are not 1 and many are clipped. TRL pads prompts on the left, and
    float32 rounds both gradients: each is about 1e-5 from what float64 would give."""
    cfg, policy, tok, take = load("tiny", method, 4, args)
    batch = common.sample(policy, tok, [p.prompt for p in take(4)], cfg.group, NEW, 1.0)
    (ids, mask), A = common.collate(batch, cfg.device), torch.randn(len(batch))
    logp, _ = common.response_logps(policy, ids, mask, cfg.temperature)
    old, ref = ((logp.detach() + NOISE * torch.randn(mask.shape)) * mask for _ in range(2))
    loss, cut, _ = gcpo.policy_loss(logp, old, ref, A, mask, cfg, len(batch), int(mask.sum()))

    def responses(x):  # (n, L) -> (n, longest response), without the prompts
        return pad_sequence([row[m > 0] for row, m in zip(x, mask)], batch_first=True)

    prompts = tok.pad({"input_ids": [[*s.prompt] for s in batch]}, padding_side="left",
                      return_tensors="pt")
    trainer = trl_trainer(method, cfg, policy, tok, [{"prompt": "-"}], lambda **_: 0.0)
    trl_loss = trainer._compute_loss(trainer.model.eval(), {  # eval: no gradient accumulation
        "prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"],
        "completion_ids": responses(ids), "completion_mask": responses(mask).long(),
        "advantages": A, "old_per_token_logps": responses(old),
        "ref_per_token_logps": responses(ref), "num_items_in_batch": mask.sum()})
    g, trl_g = (torch.cat([x.flatten() for x in torch.autograd.grad(y, m.parameters())])
                for y, m in ((loss, policy), (trl_loss, trainer.model)))
    result = {"loss": loss, "loss_difference": (loss - trl_loss).abs(), "grad_norm": g.norm(),
              "grad_norm_difference": (g.norm() - trl_g.norm()).abs(),
              "grad_relative_difference": (g - trl_g).norm() / g.norm(), "clipped": cut.mean()}
    print(f"parity, {method}: " + ", ".join(f"{k} {v:.1e}" for k, v in result.items()), flush=True)
    return {"kl_beta": cfg.kl_beta, **{k: v.item() for k, v in result.items()}}


# ---------------------------------------------------------------------------- dtype, and before


def dtype(args):
    """64 responses to 8 prompts, vocabulary 151,936; then log-probs, backward and AdamW on them."""
    cfg = gcpo.parse(["--lr", "1e-6", *precision("1M", args)])
    policy, tok = random_model("100M", 151936)
    random.seed(0)
    prompts = [random_ids(12, 151936) for _ in range(8)]
    opt = common.adamw(cfg.lr, policy)

    def draw(name):
        policy.compute_dtype = getattr(torch, name)
        return common.sample(policy, tok, prompts, 8, NEW, 1.0)

    def count(name):
        return sum(len(s.tokens) for s in draw(name))

    def train(name):
        policy.compute_dtype = getattr(torch, name)
        for _, ids, mask in common.micro_batches(batch, cfg):
            (-common.response_logps(policy, ids, mask, 1.0)[0].sum() / tokens).backward()
        common.update(opt, cfg, cfg.warmup_steps)
        return tokens

    batch = draw("bfloat16")
    tokens = sum(len(s.tokens) for s in batch)
    return {title: compare(title, turns(
        {name: partial(f, name) for name in ("bfloat16", "float32")}, args.rounds or 2))
        for title, f in (("sampling, 100M", count), ("training step, 100M", train))}


def before(args):
    """User and system time of `python gcpo.py --seed 11 --steps 60` in both checkouts, in turns."""
    spent = {"before": [], "now": []}
    for _ in range(args.rounds or 3):
        for side, folder in (("before", args.before), ("now", ROOT)):
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            with tempfile.TemporaryDirectory() as out:
                subprocess.run(
                    [sys.executable, "gcpo.py", "--seed", "11", "--steps", "60", "--out",
                     f"{out}/run"], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent[side].append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
            print(f"gcpo.py --seed 11 --steps 60, {side}: {spent[side][-1]:.1f} CPU s", flush=True)
    ratio = median(spent["now"]) / median(spent["before"])
    print(f"gcpo.py takes {ratio:.2f} times the CPU time of before")
    return {"cpu_s": spent, "now_over_before": ratio}


# ------------------------------------------------------------------------------------------ main

PARTS = {f.__name__: f for f in (sampling, grpo, dpo, memory, parity, dtype, before)}
OF_TRL = ("grpo", "dpo", "parity")


def has_trl():
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def processor():
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return cpu[1] if cpu else "unknown"


def about():
    git = subprocess.run("git describe --always --dirty".split(), cwd=ROOT, capture_output=True)
    libraries = ["torch", "transformers"] + ["trl"] * has_trl()
    return {"commit": git.stdout.decode().strip(), "cpu": processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1,
            "python": sys.version.split()[0],
            **{x: importlib.metadata.version(x) for x in libraries}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--before", metavar="DIR", help="the other checkout of that part")
    parser.add_argument("--rounds", type=int, default=0, help="of every cell; nothing is written")
    args = parser.parse_args()
    chosen = args.parts or [part for part in PARTS if part != "before" or args.before]
    if unknown := set(chosen) - set(PARTS):
        common.fail(f"{', '.join(sorted(unknown))}: no such part; give some of {', '.join(PARTS)}")
    if "before" in chosen and not args.before:
        common.fail("before: give --before DIR, another checkout")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # TRL's, of transformers
    path = ROOT / "benchmarks/results/speed.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {part: x for part, x in result.items() if part in PARTS}
    info = about()  # once: the results themselves make the checkout dirty
    print("  ".join(f"{k} {v}" for k, v in info.items()))
    for part in chosen:
        if part in OF_TRL and not has_trl():
            print(f"{part} skipped: TRL is not installed; `make bench` has it in its environment")
            continue
        start = time.perf_counter()
        result[part] = {"about": info, "found": PARTS[part](args)}
        result[part]["seconds"] = time.perf_counter() - start
        print(f"{part}: {result[part]['seconds']:.0f} s")
        if not args.rounds:
            path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
