"""Decoding speed and peak memory on one CUDA GPU, on random weights in the shapes of Qwen2.5.

    python benchmarks/speed_cuda.py               # both parts -> results/speed_cuda.json
    python benchmarks/speed_cuda.py decode        # tokens per second: ours, generate, the bound
    python benchmarks/speed_cuda.py memory        # peak memory of one step of each script

Wall time, bfloat16. The bound is that of the memory: the weights and half of the final KV cache
read once per token, at the bandwidth that a copy reaches here.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from speed import ROOT, about, common, plain_sampling, qwen2
from transformers import AutoTokenizer

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
TESTS = {"light_if": "ifeval"}


def random_model(size, device):
    """-> a model with random weights in bfloat16, and the tiny model's tokenizer."""
    *shape, tied = SHAPES[size]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = qwen2(shape, VOCAB, tied)
    torch.set_default_dtype(torch.float32)
    tok = AutoTokenizer.from_pretrained(common.TINY_FOLDER / "arithmetic")
    model.generation_config.eos_token_id = tok.eos_token_id
    return model, tok


def seconds(f, *args, **more):
    torch.cuda.synchronize()
    start = time.perf_counter()
    f(*args, **more)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode(device="cuda"):
    """Groups of 8, prompts of 128 tokens, 256 new ones, no EOS. -> tokens per second"""
    a, b = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    bandwidth = 2 * len(a) / median(seconds(a.copy_, b) for _ in range(10))
    result = {"bytes_per_s_of_a_copy": bandwidth}
    for size, (width, layers, heads, kv_heads, _, tied) in SHAPES.items():
        policy, tok = random_model(size, device)
        policy.generation_config.suppress_tokens = [tok.eos_token_id]
        weights = sum(p.nbytes for p in policy.parameters())
        if not tied:  # only single rows of these are read
            weights -= policy.get_input_embeddings().weight.nbytes
        for batch in BATCHES:
            prompts = torch.randint(0, len(tok), (batch // 8, PROMPT), device=device)
            plain = plain_sampling(policy, tok, 8, NEW, min_new_tokens=NEW)
            spent = [(seconds(common.sample, policy, tok, prompts.tolist(), 8, NEW, 1.0),
                      seconds(policy.generate, prompts, generation_config=plain,
                              attention_mask=torch.ones_like(prompts)))
                     for _ in range(1 + ROUNDS)]
            ours, generate = (batch * NEW / median(x[1:]) for x in zip(*spent))
            cache = batch * (PROMPT + NEW / 2) * 4 * layers * kv_heads * width // heads
            found = {"ours": ours, "generate": generate,
                     "bound": batch * bandwidth / (weights + cache)}
            print(f"{size}, batch {batch}, tokens/s:", found, flush=True)
            result[f"{size}, batch {batch}"] = found
        del policy
    return result


def memory(device="cuda", cells=(("1.5B", []), ("1.5B", ["--lora"]), ("7B", ["--lora"]))):
    """Of one step of each script as a user runs it: sampling, loss, update, evaluation."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = common.read_rows(common.Config(), "tiny", "train", "--dataset")
        rows = [{**row, "prompt": row["question"], "response": row["solution"],
                 "instruction": row["question"]} for row in rows[:66]]
        ifeval = [{"prompt": f"{r['question']} Do not use any commas.", "kwargs": [{}],
                   "instruction_id_list": ["punctuation:no_comma"]} for r in rows[64:]]
        for name, part in (("train", rows[:64]), ("test", rows[64:]), ("ifeval", ifeval)):
            common.write_rows(folder / f"{name}.jsonl", part)
        for size in dict(cells):
            common.save_model(folder / size, *random_model(size, device))
        torch.cuda.empty_cache()  # the steps below run in processes of their own
        for size, flags in cells:
            for script, more in SCRIPTS.items():
                name, test = " ".join([script, size, *flags]), TESTS.get(script, "test")
                done = subprocess.run(
                    [sys.executable, ROOT / f"{script}.py", "--model", folder / size, "--dataset",
                     folder / "train.jsonl", "--eval_dataset", folder / f"{test}.jsonl", "--device",
                     device, "--out", folder / name, *STEP, *more, *flags],
                    capture_output=True, text=True)
                if done.returncode:
                    result[name] = {"error": done.stderr.strip().splitlines()[-1]}
                else:
                    summary = json.loads((folder / name / "summary.json").read_text())
                    result[name] = {k: summary.get(k) for k in ("peak_gpu_gb", "seconds")}
                print(name, result[name], flush=True)
    return result


def main():
    parts = {f.__name__: f for f in (decode, memory)}
    if unknown := set(sys.argv[1:]) - set(parts):
        common.fail(f"{', '.join(sorted(unknown))}: no such part; give decode or memory")
    if not torch.cuda.is_available():
        common.fail("speed_cuda.py: this machine has no CUDA GPU")
    path = ROOT / "benchmarks/results/speed_cuda.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    info = {**about(), "gpu": torch.cuda.get_device_name()}
    for part in sys.argv[1:] or parts:
        result[part] = {"about": info, "found": parts[part]()}
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
