"""Decoding speed and peak memory on one CUDA GPU, on random weights in the shapes of Qwen2.5.

    python benchmarks/speed_cuda.py               # both parts -> results/speed_cuda.json
    python benchmarks/speed_cuda.py decode        # tokens per second: ours, generate, the bound
    python benchmarks/speed_cuda.py memory        # peak memory of one step of each script

Wall time. The bound is that of the memory: the weights and half of the final KV cache read once per
token, at the bandwidth that a copy reaches here.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import ROOT, about, plain_sampling, qwen2

import common

SHAPES = {  # width, layers, attention heads, key/value heads, width of the MLP, tied embeddings
    "0.5B": (896, 24, 14, 2, 4864, True), "1.5B": (1536, 28, 12, 2, 8960, True),
    "7B": (3584, 28, 28, 4, 18944, False)}
VOCAB, PROMPT, NEW, BATCHES, ROUNDS = 151936, 128, 256, (8, 64, 256), 3
STEP = ["--steps", "1", "--prompts", "2", "--eval_size", "2", "--eval_every", "0"]
LONG = ["--group", "8", "--max_new_tokens", "1024"]
SCRIPTS = {  # one step of each; spin: random weights judge nothing
    "gcpo": LONG, "laser": [*LONG, "--token", "<|pad|>", "--c_ref", "-20"],
    "carft": ["--max_new_tokens", "1024", "--sft_epochs", "1"],
    "temporal_sr": [*LONG, "--method", "spin", "--sft_steps", "0", "--batch", "2"],
    "light_if": [*LONG, "--method", "grpo", "--pool", "64", "--updates", "1"]}


def random_model(size, device):
    """-> a model with random weights, bfloat16 on a GPU, and the tiny model's tokenizer."""
    *shape, tied = SHAPES[size]
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        model = qwen2(shape, VOCAB, tied)
    torch.set_default_dtype(torch.float32)
    tok = AutoTokenizer.from_pretrained(common.TINY_FOLDER / "arithmetic")
    model.generation_config.eos_token_id = tok.eos_token_id
    return model, tok


def seconds(f, device):
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device):
    """Bytes per second, read and written."""
    a = torch.empty(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / median(seconds(lambda: b.copy_(a), device) for _ in range(10))


def decode(device="cuda"):
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:,.0f} GB/s")
    result = {"bytes_per_s_of_a_copy": bandwidth}
    for size in SHAPES:
        policy, tok = random_model(size, device)
        policy.generation_config.suppress_tokens = [tok.eos_token_id]
        for batch in BATCHES:
            result[f"{size}, batch {batch}"] = speed = decode_cell(policy, tok, batch, bandwidth)
            print(f"{size}, batch {batch}: " + ", ".join(
                f"{side} {x:,.0f}" for side, x in speed.items()) + " tokens/s; ours is "
                f"{speed['ours'] / speed['generate']:.1f} times generate, "
                f"{speed['ours'] / speed['bound']:.0%} of the bound", flush=True)
        del policy
    return result


def decode_cell(policy, tok, batch, bandwidth):
    """Groups of 8, prompts of 128 tokens, 256 new ones, no EOS. -> tokens per second"""
    device = policy.device.type
    prompts = torch.randint(0, len(tok), (batch // 8, PROMPT)).tolist()
    plain = plain_sampling(policy, tok, 8, NEW, min_new_tokens=NEW)

    def ours(graphed):
        before, common.GRAPHED = common.GRAPHED, graphed
        common.sample(policy, tok, prompts, 8, NEW, 1.0)
        common.GRAPHED = before

    def generate():
        ids = torch.tensor(prompts, device=device)
        policy.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)

    sides = {"ours": lambda: ours((device,)), "ours, without graphs": lambda: ours(()),
             "generate": generate}
    spent = [[seconds(f, device) for f in sides.values()] for _ in range(1 + ROUNDS)]
    weights = sum(p.nbytes for p in policy.parameters())
    if not policy.config.tie_word_embeddings:  # only single rows of these are read
        weights -= policy.get_input_embeddings().weight.nbytes
    read = weights + batch * (PROMPT + NEW / 2) * common.kv_bytes(policy)
    return {side: batch * NEW / median(x[1:]) for side, x in zip(sides, zip(*spent))} | {
        "bound": batch * bandwidth / read}


def memory(device="cuda", cells=(("1.5B", []), ("7B", ["--lora"]))):
    """Of one step of each script as a user runs it: sampling, loss, update, evaluation."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows, _ = common.tiny_rows(common.Config(), "train", "--dataset")
        rows = [{**row, "prompt": row["question"], "response": row["solution"],
                 "instruction": row["question"]} for row in rows[:66]]
        ifeval = [{"prompt": f"{r['question']} Do not use any commas.", "kwargs": [{}],
                   "instruction_id_list": ["punctuation:no_comma"]} for r in rows[64:]]
        for name, part in (("train", rows[:64]), ("test", rows[64:]), ("ifeval", ifeval)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
        for size, flags in cells:
            model, tok = random_model(size, device)
            model.save_pretrained(folder / size)
            tok.save_pretrained(folder / size)
            del model
            if device != "cpu":
                torch.cuda.empty_cache()  # the steps below run in processes of their own
            for script, more in SCRIPTS.items():
                held_out = "ifeval" if script == "light_if" else "test"
                out = folder / "-".join([script, size, *flags])
                done = subprocess.run(
                    [sys.executable, ROOT / f"{script}.py", "--model", folder / size, "--dataset",
                     folder / "train.jsonl", "--eval_dataset", folder / f"{held_out}.jsonl",
                     "--device", device, "--out", out, *STEP, *more, *flags],
                    capture_output=True, text=True)
                name = " ".join([script, size, *flags])
                if done.returncode:
                    result[name] = {"error": done.stderr.strip().splitlines()[-1]}
                else:
                    summary = json.loads((out / "summary.json").read_text())
                    result[name] = {k: summary.get(k) for k in ("peak_gpu_gb", "seconds")}
                print(name, result[name], flush=True)
    return result


def main():
    parts = {f.__name__: f for f in (decode, memory)}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        common.fail(f"{', '.join(sorted(unknown))}: no such part; give decode or memory")
    if not torch.cuda.is_available():
        common.fail("speed_cuda.py: this machine has no CUDA GPU")
    path = ROOT / "benchmarks/results/speed_cuda.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    info = {**about(), "gpu": torch.cuda.get_device_name()}
    for part in chosen:
        result[part] = {"about": info, "found": parts[part]()}
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
