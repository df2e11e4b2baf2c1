"""Speed and losses against the libraries that these scripts could have been written with.

    python benchmarks/speed.py     # a minute or two -> results/speed.json; 2 and 3 need trl

WHAT with the warmed-up tiny model, float32, groups of 8, at most 64 tokens per response
    1. sampling   common.sample against model.generate of transformers
    2. step       a GRPO step (sample, reward, log-probs, backward, AdamW) against TRL's GRPOTrainer
    3. parity     loss and gradient of gcpo.policy_loss against TRL's, on the same batch

HOW CPU time of this process on one thread: wall time where a core is free, and disturbed far less
    where none is. The sides take turns, a round each; figures are medians over the rounds, to be
    compared only with each other. Sampling is random, so what counts is the time per sampled token,
    up to and including EOS, whatever else was decoded or padded.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import gcpo

ROUNDS, DROPPED = 11, 2  # measured rounds; rounds before them, thrown away
SIZES = (8, 32)  # prompts per batch
NOISE = 0.2  # part 3: standard deviation of log pi - log pi_old and of log pi - log pi_ref
TRL = {  # --method of gcpo.py -> the GRPOConfig that means the same
    "grpo": dict(loss_type="grpo"), "dapo": dict(loss_type="dapo"),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence")}


def load(method, prompts, *flags):
    """-> the config of `python gcpo.py --method ...`, policy, tokenizer, endless problems."""
    cfg = gcpo.parse(["--method", method, "--prompts", str(prompts), "--group", "8", "--lr", "1e-6",
                      "--max_new_tokens", "64", "--device", "cpu", *flags])
    torch.manual_seed(0)
    policy, tok = common.load_model("tiny", cfg)
    problems, _ = common.load_problems(cfg)
    problems = common.encode_prompts(problems, policy, tok, "", cfg.max_new_tokens, "tiny")
    return cfg, policy, tok, common.problem_stream(problems, 0, cfg.seed)


def timed(f, *args):
    """-> CPU seconds, and what `f` returned: the number of tokens that it sampled."""
    start = time.process_time()
    tokens = f(*args)
    return time.process_time() - start, tokens


def compare(title, rounds):
    """{side: [(CPU seconds, tokens), ...]} -> medians, and how many times the last side's speed."""
    result = {side: {"ms": median(1e3 * s for s, _ in x[DROPPED:]),
                     "tokens_per_s": median(n / s for s, n in x[DROPPED:])}
              for side, x in rounds.items()}
    *_, peer = result.values()
    for side, r in result.items():
        r["ratio_per_token"] = r["tokens_per_s"] / peer["tokens_per_s"]
        r["ratio_per_round"] = peer["ms"] / r["ms"]
        print(f"{title}: {side:23} {r['tokens_per_s']:7,.0f} tokens per CPU second, "
              f"{r['ratio_per_token']:.2f}x; per round {r['ratio_per_round']:.2f}x", flush=True)
    return result


def sampling(n_prompts):
    """Problems of 1 to 5 steps: prompts and responses have mixed lengths. generate gets left-padded
    prompts, and returns ids; sample also returns texts, log-probabilities and entropies."""
    cfg, policy, tok, stream = load("grpo", n_prompts)
    prompts, end = [[*p.prompt] for p in islice(stream, n_prompts)], tok.eos_token_id
    inputs = tok.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    policy.generation_config = GenerationConfig(  # the plain softmax, nothing else applied
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=cfg.max_new_tokens,
        num_return_sequences=cfg.group, pad_token_id=tok.pad_token_id, eos_token_id=end)

    def ours():
        found = common.sample(policy, tok, prompts, cfg.group, cfg.max_new_tokens, 1.0)
        return sum(len(s.tokens) for s in found)

    def generate():
        ended = policy.generate(**inputs)[:, inputs["input_ids"].shape[1]:] == end
        return int((ended.cumsum(1) - ended.long() == 0).sum())  # no EOS before it

    rounds = zip(*[(timed(ours), timed(generate)) for _ in range(DROPPED + ROUNDS)])
    return compare(f"sampling, {n_prompts:2} prompts", dict(zip(("ours", "generate"), rounds)))


def trl_trainer(method, cfg, policy, tok, rows, reward):
    """TRL's GRPOTrainer on a copy of `policy`, with every setting that matters as in `cfg`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        trainer = GRPOTrainer(
            model=folder, reward_funcs=reward, processing_class=tok,
            train_dataset=Dataset.from_list(rows), args=GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
                model_init_kwargs={"dtype": "float32"}, num_generations=cfg.group,
                per_device_train_batch_size=cfg.prompts * cfg.group, num_train_epochs=1,
                max_completion_length=cfg.max_new_tokens, temperature=cfg.temperature,
                beta=cfg.kl_beta, use_bias_correction_kl=False,  # its default is not k3 alone
                epsilon=cfg.clip_low, epsilon_high=cfg.clip_high, learning_rate=cfg.lr,
                max_grad_norm=cfg.max_grad_norm, report_to="none", logging_strategy="no",
                save_strategy="no", disable_tqdm=True, **TRL[method]))
    trainer.remove_callback(PrinterCallback)
    return trainer


def our_step(cfg, policy, tok, opt, problems, skip_flat):
    """A step of gcpo.main with --method grpo --kl_beta 0, without logging. -> tokens sampled"""
    groups = gcpo.roll_out(policy, tok, problems, cfg)
    batch = [s for g in groups for s in g.samples]
    n, tokens = len(batch), sum(len(s.tokens) for s in batch)
    A = gcpo.group_advantages(torch.tensor([g.rewards for g in groups])).flatten()
    active = [i for i in range(n) if A[i] != 0 or not skip_flat]
    for micro in common.micro_batches([batch[i] for i in active], cfg.micro_tokens):
        rows = [active[j] for j in micro]
        ids, mask = common.collate([batch[i] for i in rows], cfg.device)
        logp, _ = common.response_logps(policy, ids, mask, cfg.temperature)
        gcpo.policy_loss(logp, logp.detach(), None, A[rows], mask, cfg, n, tokens)[0].backward()
    common.update(opt, cfg, 0, 0.0)
    return tokens


def step(n_prompts):
    """After each step of TRL (on_step_begin to on_step_end) come two of ours on the same prompts:
    with every row, which is equal work, and as gcpo.py does it, without the rows of advantage 0,
    which add nothing to the gradient; how many those are depends on the policy."""
    cfg, policy, tok, stream = load("grpo", n_prompts, "--kl_beta", "0")
    problems = list(islice(stream, (DROPPED + ROUNDS) * n_prompts))
    rows = [{"prompt": tok.decode(p.prompt), "number": i} for i, p in enumerate(problems)]
    assert all(tok(r["prompt"]).input_ids == [*p.prompt] for r, p in zip(rows, problems))
    opt = common.MasterAdamW(policy, lr=cfg.lr)
    rounds, now = {"ours": [], "ours, flat rows skipped": [], "trl": []}, {}

    def reward(completions, completion_ids, number, **_):
        now["tokens"] = sum(map(len, completion_ids))
        now["problems"] = [problems[i] for i in dict.fromkeys(number)]
        return [float(gcpo.correct(c, problems[i])) for c, i in zip(completions, number)]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now["start"] = time.process_time()

        def on_step_end(self, *_, **__):
            rounds["trl"].append((time.process_time() - now["start"], now["tokens"]))
            for skip, side in enumerate(("ours", "ours, flat rows skipped")):
                rounds[side].append(timed(our_step, cfg, policy, tok, opt, now["problems"], skip))

    trainer = trl_trainer("grpo", cfg, policy, tok, rows, reward)
    trainer.add_callback(Turns())
    trainer.train()
    return compare(f"GRPO step, {n_prompts:2} prompts", rounds)


def parity(method):
    """Sampled responses, random advantages; old and reference log-probabilities are the policy's
    own plus noise, so that ratios are not 1 and many are clipped. TRL pads prompts on the left, and
    float32 rounds both gradients: each is about 1e-5 from what float64 would give."""
    cfg, policy, tok, stream = load(method, 4)
    batch = common.sample(policy, tok, [p.prompt for p in islice(stream, 4)], cfg.group, 64, 1.0)
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


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # TRL's, of transformers
    root, info = Path(__file__).resolve().parent.parent, Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    git = subprocess.run("git describe --always --dirty".split(), cwd=root, capture_output=True)
    result = {"command": "python benchmarks/speed.py", "commit": git.stdout.decode().strip(),
              "cpu": cpu[1] if cpu else "unknown", "python": sys.version.split()[0],
              **{x: importlib.metadata.version(x) for x in ("torch", "transformers")},
              "threads": 1, "rounds": ROUNDS, "sampling": {n: sampling(n) for n in SIZES}}
    try:
        from trl import GRPOTrainer  # noqa: F401
    except ImportError as e:
        print(f"GRPO step and parity skipped: TRL cannot be imported ({e}); pip install trl")
    else:
        result |= {"trl": importlib.metadata.version("trl"), "step": {n: step(n) for n in SIZES},
                   "parity": {method: parity(method) for method in TRL}}
    (root / "benchmarks/results/speed.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
