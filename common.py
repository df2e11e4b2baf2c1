"""Plumbing shared by the five scripts. Nothing in here carries an equation number of a paper.

In the order a run meets it:
    config and CLI - models - data - sampling - log-probabilities - answer checking - evaluation -
    run folder, metrics, checkpoints

SHAPES  B prompts, G responses each, N = B*G rows, L columns (prompt + response), V vocabulary.
        Row i belongs to prompt i // G. Log-probabilities are in nats.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from decimal import Decimal
from fnmatch import fnmatch
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.hf_argparser import HfArg, HfArgumentParser, string_to_bool

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ------------------------------------------------------------------------------ config and CLI


def arg(default, help, **kw):
    """A dataclass field whose help says what it is and, in brackets, where its value is from."""
    return HfArg(default=default, help=help.replace("%", "%%"), **kw)


@dataclass
class Config:
    """The flags that mean the same in every script. Each script adds its paper's own."""

    # What the names `--model tiny` and `--dataset tiny` stand for in the folder tiny/. Without a
    # type annotation this is no flag.
    tiny_files = dict(model="arithmetic", train="arithmetic/train.jsonl",
                      test="arithmetic/test.jsonl")

    model: str = arg("tiny", "tiny, a folder, a Hub id, or a bare name such as Qwen2.5-1.5B")
    dataset: str = arg("gsm8k", "built-in name ({data}), Hub id, or .jsonl/.json/.parquet file")
    eval_dataset: str = arg("", "held-out problems, named the same way; default: the test split "
                                "of --dataset, or rows held out from it")
    eval_size: int = arg(200, "evaluate on the first so many held-out problems, 0 = all [ours]")
    eval_samples: int = arg(0, "k: also sample k responses per held-out problem and report "
                               "mean@k, pass@k, maj@k; 0 = greedy accuracy only [ours]")
    # sampling
    steps: int = arg(200, "rollout steps [ours]")
    sampled_tokens: int = arg(0, "stop at the first step that has sampled so many tokens, so that "
                                 "methods can be compared at equal sampling; 0 = --steps decides")
    prompts: int = arg(16, "B, prompts per step [ours]")
    group: int = arg(8, "G, responses per prompt [ours]")
    max_new_tokens: int = arg(1024, "longest response, in tokens [ours]")
    temperature: float = arg(1.0, "of sampling and of RL's log-probabilities [DAPO code: 1.0]")
    # optimisation
    lr: float = arg(1e-6, "AdamW learning rate [DAPO Sec. 4.1: 1e-6]")
    warmup_steps: int = arg(20, "linear warm-up of the learning rate, in steps; constant after it "
                                "[DAPO Sec. 4.1: 20]")
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm [ours]")
    micro_tokens: int = arg(0, "padded tokens per forward: memory and speed, never the gradient; "
                               "0 = 2048 on a GPU, 1024 on a CPU, whose caches are small [ours]")
    lora: bool = arg(False, "train LoRA adapters (peft) with gradient checkpointing; they usually "
                            "want a larger --lr than full weights")
    # run
    seed: int = arg(0, "of data order and sampling")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; auto is cuda where there is one")
    out: str = arg("", "run folder; default runs/<script>-<model>-<method>-s<seed>")
    eval_every: int = arg(20, "evaluate every so many steps, 0 = only before and after")
    save_every: int = arg(20, "checkpoint every so many steps, 0 = only at the end")
    resume: str = arg("", "go on with the run in this folder, exactly where it was")


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(HfArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def parse_config(cls, script, doc, tiny, methods, argv=None):
    """The command line -> a `cls`: explicit flags > `tiny` (tiny model only) > dataclass defaults;
    what is still None is filled from methods[cfg.method].

    A dict in `tiny` is named after a method or a switch, and holds only where that is chosen.
    With --resume DIR the config is DIR/config.json; a flag that contradicts it is an error, except
    --steps, so that a finished run can be trained longer. A script's --score DIR evaluates a
    finished run: only flags of the evaluation may be given with it.
    """
    parser = Parser(cls, prog=f"{script}.py", description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    data = ["tiny", *(f"{name} = {source[0]}" for name, source in HUB_DATA.items())]
    for action in parser._actions:
        if action.dest in cls.__dataclass_fields__:
            action.help = action.help.replace("{data}", ", ".join(data))
            if action.default != "" and f"--{action.dest}" in action.option_strings:
                default = "by --method" if action.default is None else action.default
                values = {"": tiny, **{f" with {k}": v for k, v in tiny.items()
                                       if isinstance(v, dict)}}
                own = "".join(f", tiny model{k}: {v[action.dest]}" for k, v in values.items()
                              if action.dest in v and not isinstance(v[action.dest], dict))
                action.help += f" (default: {default}{own})"
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True
            action.default = argparse.SUPPRESS  # what remains in the namespace was typed
    typed = vars(parser.parse_args(argv))
    if typed.get("resume") and typed.get("score"):
        fail("--resume goes on with a run, --score evaluates a finished one: give one of the two")
    if typed.get("resume"):
        folder, known = Path(typed["resume"]), saved_config(cls, script, typed, "resume")
        for k, v in typed.items():
            same = v == known.get(k) or (k in ("model", "out", "dataset", "eval_dataset")
                                         and Path(v) == Path(known.get(k, "")))
            if k not in ("resume", "steps", "device") and not same:
                fail(f"--resume {folder}: it was run with --{k} {known.get(k)}, not {v}; leave "
                     "the flag out, or start a new run")
        cfg = cls(**{**known, **typed, "resume": str(folder), "out": str(folder)})
    elif typed.get("score"):
        known = saved_config(cls, script, typed, "score") | {"resume": ""}
        known["device"] = tiny["device"] if known["model"] == "tiny" else "auto"
        for k in typed.keys() - {"score", "device", "eval_dataset", "eval_size", "eval_samples",
                                 "max_new_tokens", "temperature"}:
            fail(f"--score {typed['score']}: --{k} is of the training; leave it out")
        cfg = cls(**{**known, **typed, "out": typed["score"]})
    else:
        is_tiny = typed.get("model", "tiny") == "tiny"
        chosen = {typed.get("method", cls.method), *(k for k, v in typed.items() if v is True)}
        own = {}
        for name, value in tiny.items():
            if not isinstance(value, dict):
                own[name] = value
            elif name in chosen:
                own |= value
        cfg = cls(**{**(own if is_tiny else {}), **typed})
        name = re.sub(r"[^\w.-]+", "_", Path(cfg.model).name) or "model"
        cfg.out = cfg.out or f"runs/{script}-{name}-{cfg.method}-s{cfg.seed}"
    for name, value in methods[cfg.method].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = re.fullmatch(r"cpu|cuda(?::(\d+))?", cfg.device)
    if not device:
        fail(f"--device {cfg.device}: give auto, cpu, cuda or cuda:N")
    if cfg.device != "cpu" and int(device[1] or 0) >= torch.cuda.device_count():
        fail(f"--device {cfg.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    resolve_model(cfg.model, cfg)
    cfg.micro_tokens = cfg.micro_tokens or (1024 if cfg.device == "cpu" else 2048)
    for name in ("prompts", "group", "max_new_tokens", "micro_tokens"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} {getattr(cfg, name)}: must be at least 1")
    for name in ("temperature", "lr", "max_grad_norm"):
        if not 0 < getattr(cfg, name) < math.inf:
            fail(f"--{name} {getattr(cfg, name)}: must be a positive number")
    for name in ("steps", "sampled_tokens", "eval_size", "eval_samples", "eval_every", "save_every",
                 "warmup_steps", "seed"):
        if getattr(cfg, name) < 0:
            fail(f"--{name} {getattr(cfg, name)}: must not be negative")
    if cfg.seed >= 2**63:
        fail(f"--seed {cfg.seed}: must be below 2^63")
    return cfg


def saved_config(cls, script, typed, flag):
    """The flags of the run in the folder that --`flag` names, as a dict."""
    what = f"--{flag} {typed[flag]}"
    try:
        saved = json.loads((Path(typed[flag]) / "config.json").read_text())
        known = {k: v for k, v in saved["config"].items()
                 if k in cls.__dataclass_fields__ and v is not None}
        made_by = saved["script"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        fail(f"{what}: no config.json of a run in it ({e}); name a run folder")
    if made_by != script:
        fail(f"{what}: was made by {made_by}.py, not by {script}.py")
    parser = Parser(cls)  # a folder may be from anywhere
    parser.error = lambda message: fail(f"{what}: in its config.json, {message}")
    checked = vars(parser.parse_args([f"--{k}={v}" for k, v in known.items()]))
    return {k: checked[k] for k in known}


def seed_everything(cfg):
    """Seeds the generators that a checkpoint keeps."""
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)


# --------------------------------------------------------------------------------------- models

TINY_FOLDER = Path(__file__).parent / "tiny"
TINY_HINT = "the folder tiny/ comes with these scripts: copy it anew"
ONE_THREAD = 10**6  # parameters up to which a second CPU thread mostly waits [ours]
ORGANISATIONS = {"Qwen": "Qwen", "Llama-3": "meta-llama", "Mistral": "mistralai",
                 "CodeLlama": "codellama", "DeepSeek-R1-Distill": "deepseek-ai",
                 "OctoThinker": "OctoThinker"}


def tiny_path(cfg, part, flag):
    """What the name `tiny` stands for: the model folder, or one of the data files, of tiny/."""
    path = TINY_FOLDER / cfg.tiny_files[part]
    needed = [path]
    if not path.suffix:  # a model that lacks one of these may load and answer nonsense
        needed += [path / name for name in ("config.json", "generation_config.json",
                                            "model.safetensors", "tokenizer.json",
                                            "tokenizer_config.json", "chat_template.jinja")]
    for file in needed:
        if not file.exists():
            fail(f"{flag} tiny: {file} is missing; {TINY_HINT}")
    return path


def resolve_model(name, cfg, flag="--model"):
    """A folder or a Hub id as they are; `tiny` becomes its folder, a bare name gets its
    organisation."""
    if name == "tiny":
        return str(tiny_path(cfg, "model", flag))
    if Path(name).is_dir():
        if not any((Path(name) / f).is_file() for f in ("config.json", "adapter_config.json")):
            fail(f"{flag} {name}: no config.json in this folder; give a save_pretrained folder")
        return name
    if "/" in name:
        return name
    for prefix, organisation in ORGANISATIONS.items():
        if name.startswith(prefix):
            return f"{organisation}/{name}"
    fail(f"{flag} {name}: no such folder, and not a name I know an organisation for "
         f"({', '.join(ORGANISATIONS)}...); give the full Hub id")


@functools.cache
def find_hub():
    """Asks the Hub for a sign of life, once; without one the libraries use their cache only.
    Left to themselves they retry for the better part of a minute per file."""
    constants = huggingface_hub.constants
    if not constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # whatever is wrong, the Hub is out of reach
            constants.HF_HUB_OFFLINE = True


def hub_failure(what, error):
    """Turns whatever a Hub library raised into the one line that says what to do."""
    chain, e = [], error
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__
    names = {c.__name__ for e in chain for c in type(e).__mro__}
    endpoint = huggingface_hub.constants.ENDPOINT
    if "GatedRepoError" in names or "is a gated dataset" in str(error):
        fail(f"{what}: gated on the Hub; accept its licence there and run `hf auth login`")
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"}:
        fail(f"{what}: not on the Hub at {endpoint}, or private; check the name")
    if "HTTPStatusError" in names:
        fail(f"{what}: the Hub at {endpoint} answered {str(chain[-1]).splitlines()[0]}")
    if names & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        fail(f"{what}: the Hub at {endpoint} cannot be reached, and there is no cached copy and no "
             "such local path; check the network or the path")
    fail(f"{what}: {(str(error).strip() or repr(error)).splitlines()[0]}")


def load_model(name, cfg, lora=False, flag="--model"):
    """`name` -> (model, tokenizer), weights from safetensors, bfloat16 on CUDA, float32 on CPU.

    Dropout is off: log-probabilities must be those of the policy that sampled. `lora` wraps the
    model with peft adapters on every linear layer and checkpoints activations.
    """
    path = resolve_model(name, cfg, flag)
    what = f"{flag} {name}"
    if TINY_FOLDER in Path(path).parents:
        what += f" ({path}; if it is damaged: {TINY_HINT})"
    if not Path(path).is_dir():
        find_hub()
    dtype = torch.float32 if cfg.device == "cpu" else torch.bfloat16
    try:
        tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True,
                                                     trust_remote_code=False)
    except Exception as e:  # many libraries' errors, all bad input here
        hub_failure(what, e)
    if tok.eos_token_id is None:
        fail(f"{what}: its tokenizer has no EOS token, so no response could ever end")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token  # masks are built from positions, so this is harmless
    model.generation_config.suppress_tokens = None  # a script's choice, not the checkpoint's
    model = model.to(cfg.device).eval()
    if flag == "--model" and cfg.device == "cpu" and model.num_parameters() <= ONE_THREAD:
        torch.set_num_threads(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    probe = torch.tensor([tok("1 + 1 = 2").input_ids], device=cfg.device)
    if probe.numel() == 0:
        fail(f"{what}: no tokenizer in it")
    with torch.no_grad():
        direct = model.get_output_embeddings()(model.base_model(probe).last_hidden_state)
        if not torch.allclose(direct, model(probe).logits, rtol=1e-2, atol=1e-2):
            fail(f"{flag} {name}: {model.config.model_type} changes its logits after the LM head "
                 "(soft-capping or scaling), which these scripts do not support")
    return add_adapters(model) if lora else model, tok


def add_adapters(model):
    """Fresh LoRA adapters, which change nothing yet, and activation checkpointing."""
    from peft import LoraConfig, get_peft_model

    model.activation_checkpointing_enable()
    with warnings.catch_warnings():  # peft asks for it by a name that transformers has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Rank and alpha [ours]: common values; every linear layer except the LM head.
        model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
    return model.train()  # activation checkpointing acts in training mode only


def causal_lm(model):
    """The transformers model itself, without the peft wrapper (the adapters stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trained_prompt(model, name, default=None):
    """A prompt that the model was trained with: what its config.json has under "prompts" and
    `name`; `default` where it has nothing there. `instruction` is what follows a question whose
    answer is verified, `judge` asks temporal_sr.py's judge. [ours: a small model knows the words of
    its training only]"""
    prompts = getattr(causal_lm(model).config, "prompts", None)
    prompt = prompts.get(name) if isinstance(prompts, dict) else None
    return prompt if isinstance(prompt, str) else default


def stop_ids(model, tok):
    """Every id that ends a response: the tokenizer's EOS and those of the generation config."""
    more = causal_lm(model).generation_config.eos_token_id
    return sorted({tok.eos_token_id, *([more] if isinstance(more, int) else more or [])})


def frozen_reference(model):
    """The reference policy: a frozen copy; None under LoRA, where switching the adapters off
    gives it back (`reference_policy`)."""
    if hasattr(model, "disable_adapter"):
        return None
    return copy.deepcopy(model).requires_grad_(False)


@contextmanager
def reference_policy(model, reference):
    """`with reference_policy(...) as ref:` gives the model to run without gradient."""
    with torch.no_grad(), model.disable_adapter() if reference is None else nullcontext():
        yield reference or model


def reference_logps(model, reference, ids, mask, temperature):
    """Log-probabilities under the reference policy. (n, L), (n, L) -> (n, L)"""
    with reference_policy(model, reference) as ref:
        return response_logps(ref, ids, mask, temperature)[0]


# A GPU with less memory per trained weight leaves the optimizer to the host's. 18 are: weight 2,
# gradient 4, copy 4, AdamW's moments 8; the rest is for activations and a reference model. [ours]
BYTES_PER_WEIGHT = 24


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of bfloat16 weights, fed with gradients accumulated in float32. Where
    the GPU is too small for them, copies and moments live in the host's memory: 6 instead of 18
    bytes per weight on the GPU; a step then waits for the CPU.

    [ours: a step of 1e-6 is far below bfloat16's rounding, so stepping the weights themselves would
    train nothing, and sums of micro-batch gradients in bfloat16 would depend on their number.]
    """

    def __init__(self, *models, lr):
        weights = [[p for _, p in trained(m)] for m in models]  # a parameter group per model
        self.far, self.sums = too_large_for_gpu(sum(weights, [])), {}
        groups = [[p if p.dtype == torch.float32 else
                   p.detach().to("cpu" if self.far else p.device, torch.float32) for p in group]
                  for group in weights]
        self.masters = sum(groups, [])
        self.pairs = [(p, m) for p, m in zip(sum(weights, []), self.masters) if p is not m]
        self.hooks = [p.register_post_accumulate_grad_hook(lambda p, m=m: self.collect(p, m))
                      for p, m in self.pairs]
        groups = [{"params": g} for g in groups]
        super().__init__(groups, lr=lr, weight_decay=0.0)  # no decay [ours]

    def release(self):
        """Lets go of the weights, so that another optimizer can have them."""
        for hook in self.hooks:
            hook.remove()

    def collect(self, p, m):
        if self.far:  # the sum stays on the GPU until the step
            self.sums[m] = self.sums[m].add_(p.grad) if m in self.sums else p.grad.float()
        else:
            m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
        p.grad = None

    def clip(self, max_norm):
        """Clips the gradient. -> its norm before that"""
        for m in list(self.sums):
            m.grad = self.sums.pop(m).to(m.device)
        return torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()

    @torch.no_grad()
    def step(self):
        super().step()
        self.zero_grad()
        for p, m in self.pairs:
            p.copy_(m)


def too_large_for_gpu(weights):
    """Whether the optimizer's share of these has to stay in the host's memory."""
    device = weights[0].device
    if device.type != "cuda":
        return False
    need = BYTES_PER_WEIGHT * sum(p.numel() for p in weights if p.dtype != torch.float32)
    return torch.cuda.get_device_properties(device).total_memory < need


def update(opt, cfg, step, loss, rates=None):
    """One clipped optimizer step. Returns the gradient norm before clipping. A loss or gradient
    that is not finite ends the program before it can touch the weights. `rates`: the learning rate
    of each parameter group; default cfg.lr after its linear warm-up."""
    norm = opt.clip(cfg.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        fail(f"step {step}: the loss is {loss}, the gradient norm {norm}; no weight was touched by "
             f"them; {Run.left()}")
    rates = rates or [cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))]
    for group, rate in zip(opt.param_groups, rates):
        group["lr"] = rate
    opt.step()
    return norm


def cross_entropy_backward(model, samples, micro_tokens, device):
    """Adds the gradient of the cross-entropy of the samples' responses, EOS included, a mean over
    all their tokens. -> that loss"""
    n_tok, total = sum(len(s.tokens) for s in samples), 0.0
    for rows in micro_batches(samples, micro_tokens):
        ids, mask = collate([samples[i] for i in rows], device)
        loss = -response_logps(model, ids, mask, 1.0)[0].sum() / n_tok
        loss.backward()
        total += loss.item()
    return total


def sft_step(policy, samples, opt, cfg, step, rates):
    """One optimizer step of supervised fine-tuning on samples. -> loss, gradient norm"""
    loss = cross_entropy_backward(policy, samples, cfg.micro_tokens, cfg.device)
    return loss, update(opt, cfg, step, loss, rates)


def keep_sft(policy, tok, cfg, folder):
    """Leaves the SFT policy in `folder`, LoRA adapters merged, and -> that policy, with fresh
    adapters under --lora: switched off they give back what stands in the folder."""
    if cfg.lora:
        policy = policy.merge_and_unload()
        policy.name_or_path = str(folder)  # what the adapters in model/ are for
    with writing(folder.parent):
        save_folder(folder, lambda to: (policy.save_pretrained(to), tok.save_pretrained(to)))
    seed_everything(cfg)
    return add_adapters(policy) if cfg.lora else policy


# ----------------------------------------------------------------------------------------- data

HASHES = "Reason step by step. Write the final answer on the last line, after ####."
BOXED = "Reason step by step, and put the final answer within \\boxed{}."
# name: (Hub id, config, train split, test split, instruction that follows the question)
HUB_DATA = {
    "gsm8k": ("openai/gsm8k", "main", "train", "test", HASHES),
    "svamp": ("ChilleD/SVAMP", None, "train", "test", HASHES),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test", BOXED),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "train", BOXED),
    "aime25": ("math-ai/aime25", None, "test", "test", BOXED),
    "amc23": ("math-ai/amc23", None, "test", "test", BOXED),
}
COLUMNS = {  # first match wins, upper and lower case alike
    "question": ("question_concat", "question", "problem", "prompt"),
    "answer": ("answer", "answer_value", "final_answer"),
    "solution": ("solution", "answer_cot", "rationale"),
}


@dataclass
class Problem:
    """One task: `solution` is the annotated reasoning, ends in the answer, and may be empty."""

    question: str
    answer: str
    solution: str = ""
    level: str = ""  # difficulty, where the data has one; evaluation reports it apart
    prompt: tuple = ()  # token ids, filled in by `encode_prompts`


def read_rows(name, split, flag, built_in=("tiny", *HUB_DATA)):
    """Rows of a built-in name, a Hub id or a local file, as a list of dicts; None where `split` is
    test and the data has none of its own."""
    path, what = Path(name), f"{flag} {name}"
    local = path.suffix.lower() in (".jsonl", ".json", ".parquet")
    name = next((k for k, v in HUB_DATA.items() if v[0] == name), name)
    hub_id, config, train, test, _ = HUB_DATA.get(name, (name, None, "train", "test", ""))
    if split == "test" and flag == "--dataset" and (local or train == test):
        return None
    if not local:
        if "/" not in hub_id:
            known = f"not a built-in name ({', '.join(built_in)}), " if built_in else ""
            fail(f"{what}: {known}not a .jsonl/.json/.parquet file, not a Hub id (owner/name)")
        find_hub()
    elif not path.is_file():
        fail(f"{what}: no such file")
    elif not path.stat().st_size:
        fail(f"{what}: the file is empty")
    elif path.suffix.lower() != ".parquet":
        return read_json(path, what)
    import datasets  # after find_hub: it reads the offline switch on import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if local:
            rows = list(datasets.load_dataset("parquet", data_files=str(path), split="train"))
        else:
            parts = datasets.load_dataset(hub_id, config)
            wanted = train if split == "train" else test
            if split == "test" and wanted not in parts and flag == "--dataset":
                return None
            rows = list(parts[wanted] if wanted in parts else next(iter(parts.values())))
    except Exception as e:  # many libraries' errors, all bad input here
        if not local:
            hub_failure(what, e)
        fail(f"{what}: {str(e.__cause__ or e).strip()[:300]}")
    if not rows or not rows[0]:
        fail(f"{what}: no rows in it")
    return rows


def tiny_rows(cfg, part, flag):
    """The rows of one of the files that the name `tiny` stands for, and what to call the file in
    an error."""
    path = tiny_path(cfg, part, flag)
    what = f"{flag} tiny ({path}; if it is damaged: {TINY_HINT})"
    return read_json(path, what), what


def read_json(path, what):
    """Rows of a JSON file, a list of objects, or of a JSON lines file; all have all columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(f"{what}: not UTF-8 text")
    except OSError as e:
        fail(f"{what}: cannot be read ({e.strerror})")
    whole = text.lstrip().startswith("[")
    rows = []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                json.dumps(rows[-1], ensure_ascii=False).encode()  # raises at half a surrogate pair
        except (ValueError, RecursionError) as e:
            fail(f"{what}: line {e.lineno if whole and hasattr(e, 'lineno') else number} is not "
                 f"valid JSON ({getattr(e, 'msg', str(e)[:200])})")
    rows = rows[0] if whole else rows
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{what}: row {number} is not an object with a value for every column")
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        fail(f"{what}: no rows in it")
    return [{name: row.get(name) for name in names} for row in rows]


def to_problems(rows, what):
    """Dicts -> Problems. The answer may stand in its own column or at the end of the solution."""
    have = {c.lower(): c for c in rows[0]}
    column = {k: next((have[c] for c in names if c in have), None) for k, names in COLUMNS.items()}
    if column["question"] is None or (column["answer"] is None and column["solution"] is None):
        missing = "question" if column["question"] is None else "answer"
        fail(f"{what}: no {missing} column; it needs one of {COLUMNS['question']} and one of "
             f"{COLUMNS['answer'] + COLUMNS['solution']}, but has {tuple(rows[0])[:20]}")
    if "body" in have and column["question"].lower() == "question":
        for row in rows:  # SVAMP tells its story in a column of its own
            story, question = (as_text(row[c]) for c in (have["body"], column["question"]))
            row[column["question"]] = story and question and f"{story} {question}"
    problems = []
    for number, row in enumerate(rows, 1):
        values = [row.get(column[k]) for k in ("question", "answer", "solution")]
        values = [as_text(v) for v in [*values, row.get(have.get("level"))]]
        if None in values:
            fail(f"{what}: row {number} has something else than a text or an exact number; "
                 f"question, answer and solution are read from the columns {column}")
        question, answer, solution, level = values
        marked = extract_answer(answer or solution)
        if marked:  # the answer stands at the end of a solution, as in GSM8K
            answer, solution = marked, solution or answer
        solution = re.sub(r"<<[^<>]*>>", "", solution)  # GSM8K's calculator marks
        problems.append(Problem(question, answer, solution, level))
    levels = {p.level for p in problems}
    if len(levels) > 20 or any(len(level) > 40 or not level.isprintable() for level in levels):
        for p in problems:  # no levels of difficulty
            p.level = ""
    good = [p for p in problems if p.question and p.answer]
    if not good:
        fail(f"{what}: no row has both a question and an answer")
    if len(good) < len(problems):
        print(f"{what}: {len(problems) - len(good)} of {len(problems)} rows left out: no question "
              "or no answer")
    return good


def as_text(value):
    """A cell of the data; "" for what stands for a missing value, None for another type, or for a
    number that a float has rounded."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, float):
        return f"{Decimal(str(value)):f}" if abs(value) < 2**53 else None  # 1e-05 as 0.00001
    return str(value).strip() if isinstance(value, str | int) else None


def load_problems(cfg):
    """-> (training problems, held-out problems); the two share no question."""
    def load(name, split, flag):
        if name == "tiny":
            return to_problems(*tiny_rows(cfg, split, flag))
        rows = read_rows(name, split, flag)
        return rows and to_problems(rows, f"{flag} {name}")

    train = load(cfg.dataset, "train", "--dataset")
    if cfg.eval_dataset:
        held_out = load(cfg.eval_dataset, "test", "--eval_dataset")
    else:
        held_out = load(cfg.dataset, "test", "--dataset")
    if held_out is None:
        random.Random(0).shuffle(train)  # not cfg.seed: every seed holds out the same rows
        n = min(200, len(train) // 5)
        held_out, train = train[:n], train[n:]
        print(f"{cfg.dataset} has no test split: {n} rows held out for evaluation")
    asked = {p.question for p in held_out}
    overlap = [p for p in train if p.question in asked]
    if overlap:
        train = [p for p in train if p.question not in asked]
        print(f"{len(overlap)} training rows left out: their questions are held out")
    if not train or not held_out:
        fail(f"--dataset {cfg.dataset}: no problem left to {'evaluate' if train else 'train'} on")
    return train, held_out[:cfg.eval_size or None]


def instruction_for(problems, name, model):
    """What follows each question: what the model was trained with, else the form of the final
    answer, as the solutions have it."""
    boxed = any("\\boxed" in p.solution for p in problems)
    ours = HUB_DATA[name][-1] if name in HUB_DATA else BOXED if boxed else HASHES
    return trained_prompt(model, "instruction", ours)


def encode_prompts(problems, model, tok, instruction, max_new_tokens, what, plain=None):
    """Renders every question into `problem.prompt` and drops those too long for the context.
    `plain`: a prompt with a {question} in it, taken as it is instead of the chat template."""
    context = getattr(causal_lm(model).config, "max_position_embeddings", math.inf)
    if plain:
        ids = tok([plain.replace("{question}", defuse(tok, p.question)) for p in problems],
                  add_special_tokens=False).input_ids
    else:
        ids = encode_questions(tok, [f"{p.question}\n{instruction}".strip() for p in problems])
    for p, prompt in zip(problems, ids):
        p.prompt = tuple(prompt)
    kept = [p for p in problems if len(p.prompt) + max_new_tokens <= context]
    if not kept:
        fail(f"{what}: every prompt + --max_new_tokens {max_new_tokens} is longer than the model's "
             f"context of {context} tokens")
    if len(kept) < len(problems):
        print(f"{what}: {len(problems) - len(kept)} of {len(problems)} prompts skipped: with "
              f"--max_new_tokens {max_new_tokens} they do not fit the context of {context} tokens")
    return kept


def set_up(cfg, path=None, plain=None):
    """Seeds, loads, renders: -> policy (from the folder `path`, or cfg.model), tokenizer, training
    problems, held-out problems, and the instruction that follows their questions. `plain`: the
    paper's own prompt, see `encode_prompts`; a model that was trained with another keeps that."""
    seed_everything(cfg)
    train, held_out = load_problems(cfg)
    policy, tok = load_model(str(path or cfg.model), cfg, cfg.lora)
    instruction = instruction_for(train, cfg.dataset, policy)
    plain = plain if trained_prompt(policy, "instruction") is None else None
    train, held_out = (
        encode_prompts(problems, policy, tok, instruction, cfg.max_new_tokens, what, plain)
        for problems, what in ((train, "training"), (held_out, "evaluation")))
    return policy, tok, train, held_out, instruction


def defuse(tok, text):
    """The text with a space inside whatever the tokenizer would read as one of its special tokens:
    what stands in data or in a response never becomes a control token. Half a surrogate pair, which
    no tokenizer takes, becomes a question mark."""
    text = text.encode(errors="replace").decode()
    while found := [t for t in special_tokens(tok) if t in text]:
        start = len(found[0]) - len(found[0].lstrip()) + 1
        text = text.replace(found[0], f"{found[0][:start]} {found[0][start:]}")
    return text


@functools.lru_cache(2)  # the policy's and another model's; it keeps a tokenizer in memory
def special_tokens(tok):
    """What the tokenizer reads as special tokens, longest first; none of one character or blank."""
    found = {t.content for t in tok.added_tokens_decoder.values() if t.special}
    found = {t for t in found | set(tok.all_special_tokens) if len(t.strip()) > 1}
    return sorted(found, key=len, reverse=True)


def encode_questions(tok, questions, system=""):
    """Each as one user turn, after a system turn if one is given -> ids: through the chat template
    if there is one (it brings its own BOS), else as plain text, with BOS where the tokenizer adds
    one and without any EOS."""
    questions = [defuse(tok, q) for q in questions]
    if tok.chat_template:
        chats = [[{"role": "user", "content": q}] for q in questions]
        turn = [{"role": "system", "content": system}] if system else []
        try:
            texts = tok.apply_chat_template([turn + chat for chat in chats], tokenize=False,
                                            add_generation_prompt=True)
        except Exception as e:  # a template is a program of its own
            if system:  # it may know no system turn
                return encode_questions(tok, [f"{system}\n\n{q}" for q in questions])
            fail(f"the model's chat template cannot render a single user turn: {e}")
        if system and system not in texts[0]:  # or leave it out
            return encode_questions(tok, [f"{system}\n\n{q}" for q in questions])
        return tok(texts, add_special_tokens=False).input_ids
    rows = tok([f"{system}\n\n{q}\n" if system else f"{q}\n" for q in questions]).input_ids
    return [ids[:-1] if ids[-1] == tok.eos_token_id else ids for ids in rows]


def problem_stream(problems, position, seed):
    """Endless problems from `position` on, reshuffled every epoch: a function of its arguments,
    so that a resumed run needs only the position."""
    while True:
        epoch, start = divmod(position, len(problems))
        order = list(range(len(problems)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for i in order[start:]:
            position += 1
            yield problems[i]


# ------------------------------------------------------------------------------------- sampling

KV_BYTES = 4 * 2**30  # of the KV cache while sampling [ours: leaves room on a 24 GB card]
GRAPHED = ("cuda",)  # devices on which decoding is launched as CUDA graphs
CACHE_FLOATS = 2**18  # 1 MiB, see `few_rows` [ours: a core's second-level cache]
LOG_ZERO = -200  # a log p whose p is 0 in float32, as it is from -104 on


@dataclass
class Sample:
    """A prompt with one response. `tokens` include EOS when `finished`."""

    prompt: tuple
    tokens: list
    text: str
    finished: bool
    logps: list = dataclasses.field(default_factory=list)  # of the sampler, per token
    entropy: float = 0.0  # of the sampler's distributions, summed over the tokens, in nats
    read: tuple = ()  # log-probabilities of a token that was asked for, before and after EOS


def as_samples(tok, prompts, texts):
    """Texts that no policy sampled, as continuations of the very same prompt ids, EOS added."""
    if not texts:
        return []
    texts = [defuse(tok, text) for text in texts]
    tokens = [ids + [tok.eos_token_id] for ids in tok(texts, add_special_tokens=False).input_ids]
    texts = tok.batch_decode(tokens, skip_special_tokens=True)
    return [Sample(tuple(p), ids, text, True) for p, ids, text in zip(prompts, tokens, texts)]


def generator_of(cfg, *names):
    """A generator for a part of a run that these names tell from all others, so that a resumed run,
    and one that has other parts, draws the same."""
    key = hashlib.sha256("/".join(map(str, (cfg.seed, *names))).encode()).digest()
    return torch.Generator(cfg.device).manual_seed(int.from_bytes(key[:6], "big"))


@torch.inference_mode()
def sample(model, tok, prompts, group, max_new_tokens, temperature, generator=None, read=None,
           rows=256):
    """`group` responses to each prompt from softmax(logits / temperature), nothing else applied
    (but see `suppress`).

    temperature 0 is greedy. `read` is a token id: the log-probability that the model gives it at
    the end of a finished response comes with the Sample, see `decode`. At most `rows` responses
    are decoded at a time, fewer where their KV cache would pass KV_BYTES, prompts of similar length
    together. Returns B*G Samples; sample i answers prompt i // group.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max_new_tokens + max(map(len, prompts), default=0)
    step = max(1, min(rows, KV_BYTES // (kv_bytes(model) * longest)) // group)
    done = {}
    starts = range(0, len(order), step)
    for start in tqdm(starts, "sampling", leave=False, disable=None if len(starts) > 9 else True):
        chosen = order[start:start + step]
        found = decode(model, tok, [prompts[i] for i in chosen], group, max_new_tokens,
                       temperature, generator, read)
        for n, i in enumerate(chosen):
            done[i] = found[n * group:(n + 1) * group]
    return [s for i in range(len(prompts)) for s in done[i]]


def kv_bytes(model):
    """What a token of a row takes in the KV cache."""
    c = causal_lm(model).config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return 2 * c.num_hidden_layers * kv_heads * head * model.dtype.itemsize


def decode(model, tok, prompts, group, max_new_tokens, temperature, generator, read):
    """The decoding loop. Each prompt is prefilled once and its KV cache shared by its group;
    finished rows are dropped once they are a quarter of the batch, half of it with a CUDA graph.

    With `read`, a token id, a finished row goes through one more forward, of its EOS, and its
    Sample.read is log softmax(logits)[read], unscaled, of the distribution that EOS was drawn from
    and of the one after EOS.
    """
    lm, device = causal_lm(model), model.device
    was_training = lm.training
    lm.eval()  # gradient checkpointing switches the KV cache off in training mode
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tok.pad_token_id)
    mask = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.bool)
    mask[:, width:] = True
    for r, p in enumerate(prompts):  # left-padded, so that all rows go on at the same column
        ids[r, width - len(p):] = torch.tensor(p)
        mask[r, width - len(p):width] = True
    ids, mask, padded = ids.to(device), mask.to(device), not bool(mask.all())
    position = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=lm.config)
    logits = lm(input_ids=ids, attention_mask=mask[:, :width].long(), position_ids=position,
                cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    # sdpa takes what it adds to its scores as it is: that skips transformers' mask code
    layers = set(getattr(lm.config, "layer_types", None) or ["full_attention"])
    ready = (lm.config._attn_implementation == "sdpa" and layers == {"full_attention"}
             and not getattr(lm.config, "sliding_window", None))
    if ready:
        lowest = torch.finfo(lm.dtype).min
        mask = torch.zeros_like(mask, dtype=lm.dtype).masked_fill(~mask, lowest)[:, None, None]
    graphed = ready and device.type in GRAPHED
    forward = (GraphedForward if graphed else Forward)(lm, cache, mask.shape[-1])
    n = len(prompts) * group
    row = torch.arange(n, device=device)  # which response each live row is
    forward.select(row // group)
    logits, mask, position = (x[row // group] for x in (logits, mask, position[:, -1:]))
    stop = torch.tensor(stop_ids(model, tok), device=device)
    tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    entropy = torch.zeros(n, device=device)
    length = torch.full((n,), max_new_tokens, device=device)
    found = torch.zeros(n, 2, device=device)  # what `read` asks for: before EOS, after it
    open_ = torch.ones(n, dtype=torch.bool, device=device)  # live rows that have not ended
    for t in range(max_new_tokens):
        token, logp, h = draw(suppress(model, logits), temperature, generator)
        tokens[row, t], logps[row, t] = token, logp
        entropy[row] += h * open_
        ended = open_ & torch.isin(token, stop)
        length[row] = torch.where(ended, t + 1, length[row])
        open_ = open_ & ~ended
        needed, last = open_, t + 1 == max_new_tokens
        if read is not None:
            found[row, 0] = torch.where(ended, logp_of(read, logits), found[row, 0])
            needed = open_ | ended
        elif last:
            break
        if not graphed or last or t % 8 == 7:  # asking a GPU for a number stops the queue
            alive = int(needed.sum())
            if alive == 0:
                break
            if alive <= (0.5 if graphed else 0.75) * len(row):
                keep = needed.nonzero().squeeze(1)
                forward.select(keep)
                row, mask, position, token = row[keep], mask[keep], position[keep], token[keep]
                open_, ended = open_[keep], ended[keep]
        position = position + 1
        seen = mask[..., :width + t + 1] if padded or graphed or not ready else None
        logits = forward(token[:, None], position, seen)
        if read is not None:
            found[row, 1] = torch.where(ended, logp_of(read, logits), found[row, 1])
    lm.train(was_training)
    if not logps.isfinite().all():
        fail(f"step {Run.current.step if Run.current else 0}: a sampled token has log-probability "
             f"nan, the logits of the model are not finite; {Run.left()}")
    tokens, logps, length, entropy, found = (
        x.tolist() for x in (tokens, logps, length, entropy, found))
    tokens = [row[:k] for row, k in zip(tokens, length)]
    texts = tok.batch_decode(tokens, skip_special_tokens=True)
    ends = set(stop.tolist())
    return [Sample(tuple(prompts[i // group]), tokens[i], texts[i], tokens[i][-1] in ends,
                   logps[i][:length[i]], entropy[i],
                   tuple(found[i]) if read is not None and tokens[i][-1] in ends else ())
            for i in range(n)]


class Forward:
    """`lm` of one more token per row: (n, 1) tokens, (n, 1) positions, mask with the new column
    -> logits (n, V). `columns`: the most that the KV cache will hold."""

    def __init__(self, lm, cache, columns):
        self.lm, self.cache, self.columns = lm, cache, columns

    def select(self, rows):
        """Goes on with these rows only, or several times with the same."""
        self.cache.batch_select_indices(rows)

    def __call__(self, token, position, seen):
        return self.lm(input_ids=token, attention_mask=seen, position_ids=position,
                       cache=self.cache, use_cache=True).logits[:, -1]


class GraphedForward(Forward):
    """The same as a CUDA graph: one launch per token instead of a thousand, which a fast GPU would
    wait for. A graph reads and writes fixed memory: inputs are copied into `token`, `position` and
    `seen`; the KV cache has spare columns, masked. When they run out, or the rows change, one
    forward runs without a graph, and a new graph is captured."""

    room, rows = 0, slice(None)  # columns of the cache; its rows to go on with

    def select(self, rows):
        self.room, self.rows = 0, rows

    def __call__(self, token, position, seen):
        columns = seen.shape[-1]
        if columns > self.room:
            self.make_room(columns, token, position, seen)
            logits = self.forward()
            self.replay = self.capture() if token.is_cuda else self.forward
            return logits
        self.token.copy_(token)
        self.position.copy_(position)
        self.seen[..., :columns] = seen
        return self.replay()

    def forward(self):
        return super().__call__(self.token, self.position, self.seen)

    def make_room(self, columns, token, position, seen):
        """New inputs, and a larger static cache with what the old one holds of `rows`."""
        self.replay = None
        self.room = -(-min(max(256, 2 * columns), self.columns) // 8) * 8  # aligned, for sdpa
        self.token, self.position = token.clone(), position.clone()
        self.seen = seen.new_full((*seen.shape[:-1], self.room), torch.finfo(seen.dtype).min)
        self.seen[..., :columns] = seen
        old, self.cache = self.cache, StaticCache(config=self.lm.config, max_cache_len=self.room)
        for i, layer in enumerate(old.layers):
            self.cache.update(layer.keys[self.rows, :, :columns - 1],
                              layer.values[self.rows, :, :columns - 1], i)
            layer.keys = layer.values = None  # of one layer only there are two at a time
        self.rows = slice(None)

    def capture(self):
        """-> a function that replays `forward`, without running it now; without a graph where the
        model's forward cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.token.device), torch.cuda.graph(graph):
                logits = self.forward()
        except RuntimeError as e:  # a model whose forward asks the GPU for a number
            tqdm.write(f"decoding without CUDA graphs, slowly: {str(e).splitlines()[0]}")
            return self.forward

        def replay():
            graph.replay()
            return logits
        return replay


def logp_of(token, logits):
    """(n, V) -> log softmax(logits)[token], (n,)"""
    return few_rows(lambda x: (torch.log_softmax(x.float(), -1)[:, token],), logits)[0]


def suppress(model, logits):
    """(n, V) -> the same, with -inf for what a script put in generation_config.suppress_tokens:
    the policy never draws those tokens, so they have no part in its distribution."""
    tokens = causal_lm(model).generation_config.suppress_tokens
    if not tokens:
        return logits
    tokens = torch.tensor(tokens).to(logits.device, non_blocking=True)
    return logits.index_fill(1, tokens, -math.inf)


def draw(logits, temperature, generator=None):
    """(n, V) -> token, its log-probability, entropy, (n,) each. One uniform number per row looked
    up in the cumulative distribution: torch.multinomial draws V of them."""
    def look_up(logits, u):
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        p = logp.exp()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            cdf = p.cumsum(-1)
            token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1)
            token = token.clamp(max=logits.shape[1] - 1)  # beyond it if the logits are nan
        return token, logp.gather(1, token[:, None]).squeeze(1), entropy_of(p, logp)

    u = torch.zeros(len(logits), 1, device=logits.device)
    if temperature:
        u = torch.rand(len(u), 1, device=u.device, generator=generator).clamp(max=1 - 1e-6)
    return few_rows(look_up, logits, u)


def few_rows(f, logits, *more):
    """`f` of all rows; on a CPU of a few at a time, so that its many passes over the vocabulary
    stay in the cache, and concatenated. (n, V), (n, ...) each -> what f returns, (n, ...) each"""
    size = CACHE_FLOATS // logits.shape[1] if logits.device.type == "cpu" else len(logits)
    parts = zip(*(x.split(max(1, size)) for x in (logits, *more)))
    return tuple(torch.cat(x) for x in zip(*(f(*part) for part in parts)))


def entropy_of(p, logp):
    """- sum p log p over the last axis, in nats. A p of 0 adds 0, where 0 * -inf would be nan."""
    return -(p * logp.clamp(min=LOG_ZERO)).sum(-1)


# ---------------------------------------------------------------------------- log-probabilities

HEAD_FLOATS = 2**24  # logits that exist at a time: 64 MiB in float32


def collate(samples, device):
    """-> ids (n, L), mask (n, L), right-padded. mask is 1 on response tokens, EOS included, and
    is built from positions: pad and EOS may be the same id. The pad id itself never matters."""
    length = max(len(s.prompt) + len(s.tokens) for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    mask = torch.zeros(len(samples), length)
    for r, s in enumerate(samples):
        end = len(s.prompt) + len(s.tokens)
        ids[r, :end] = torch.tensor([*s.prompt, *s.tokens])
        mask[r, len(s.prompt):end] = 1
    return ids.to(device), mask.to(device)


def micro_batches(samples, micro_tokens):
    """Indices of rows of similar length, at most `micro_tokens` padded tokens (or one row) each."""
    size = [len(s.prompt) + len(s.tokens) for s in samples]
    rows = []
    for i in sorted(range(len(samples)), key=lambda i: size[i]):
        if rows and (len(rows) + 1) * size[i] > micro_tokens:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def hidden_states(model, ids):
    """What the LM head turns into logits: column t predicts token t + 1. (n, L) -> (n, L, H)

    Rows are right-padded, so causal attention alone keeps padding out of every response.
    """
    return causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state


def response_logps(model, ids, mask, temperature, with_entropy=False, hidden=None,
                   entropy_grad=False):
    """log pi(ids[:, t] | ids[:, <t]) and the entropy of that distribution. -> 2 x (n, L), float32

    Zero outside `mask`; the entropy is all zero unless asked for, and carries gradient only with
    `entropy_grad`. Only masked positions reach the LM head, where they are many in chunks, so that
    (n, L, V) never exists. `hidden` are the `hidden_states` of `ids`, where they are at hand.
    """
    hidden = hidden_states(model, ids) if hidden is None else hidden
    row, column = mask[:, 1:].nonzero(as_tuple=True)
    hidden, target = hidden[row, column], ids[row, column + 1]
    head = causal_lm(model).get_output_embeddings()
    if type(head) is torch.nn.Linear and len(target) * len(head.weight) > HEAD_FLOATS:
        weight = head.weight
        if head.bias is not None:  # one more column, for a hidden state that is always 1
            weight = torch.cat([weight, head.bias[:, None]], 1)
            hidden = torch.nn.functional.pad(hidden, (0, 1), value=1.0)
        found = ChunkedHead.apply(hidden, weight, target, model, temperature, with_entropy,
                                  entropy_grad)
    else:
        found = score_logits(model, head(hidden), target, temperature, with_entropy, entropy_grad)
    blank = torch.zeros(mask.shape, device=mask.device)
    return tuple(blank.index_put((row, column + 1), x) for x in found)


def scaled_log_softmax(model, logits, temperature):
    """(n, V) -> log of the distribution that the policy samples from, (n, V) float32"""
    return torch.log_softmax(suppress(model, logits.float()) / temperature, -1)


def score_logits(model, logits, target, temperature, with_entropy, entropy_grad):
    """`response_logps` of P positions from their logits. (P, V), (P,) -> 2 x (P,)"""
    logp = scaled_log_softmax(model, logits, temperature)
    entropy = torch.zeros(len(target), device=logits.device)
    if with_entropy:
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = entropy_of(logp.exp(), logp)
    return logp.gather(1, target[:, None]).squeeze(1), entropy


class ChunkedHead(torch.autograd.Function):
    """log p(target) and the entropy, p = softmax(hidden weight^T / temperature), with HEAD_FLOATS
    logits in memory at a time: the backward pass makes them again, and turns them in place into

        d log p(target) / d logits = onehot(target) - p             both divided by temperature
        d entropy / d logits       = - p (log p + entropy)

    (P, H), (V, H), (P,) -> 2 x (P,) float32. The gradient of the weight is summed over the chunks
    in float32. [ours: what autograd keeps of a head with a large vocabulary, some (P, V) tensors,
    takes more memory than the whole backbone.]
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, model, temperature, with_entropy, entropy_grad):
        def score(logits, y):
            return score_logits(model, logits, y, temperature, with_entropy, entropy_grad)

        logp, entropy = torch.zeros(2, len(target), device=hidden.device)
        for at, logits in ChunkedHead.chunks(hidden, weight):
            logp[at], entropy[at] = few_rows(score, logits, target[at])
        ctx.save_for_backward(hidden, weight, target, entropy)
        ctx.model, ctx.temperature, ctx.entropy_grad = model, temperature, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        def differentiate(logits, y, H, g, g_H):
            logp = scaled_log_softmax(ctx.model, logits, ctx.temperature)
            p = logp.exp()
            d = (-g * p).scatter_add_(1, y, g)
            if ctx.entropy_grad:
                d -= g_H * p * (logp.clamp(min=LOG_ZERO) + H)
            logits.copy_(d / ctx.temperature)
            return ()

        hidden, weight, target, entropy = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        columns = [x[:, None] for x in (target, entropy, d_logp, d_entropy)]
        for at, logits in ChunkedHead.chunks(hidden, weight):
            few_rows(differentiate, logits, *(x[at] for x in columns))
            d_hidden[at] = logits @ weight
            if d_weight is None:
                continue
            if weight.dtype == torch.float32:  # without a second (V, H)
                d_weight.addmm_(logits.T, hidden[at])
            else:
                d_weight += logits.T @ hidden[at]
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None

    @staticmethod
    def chunks(hidden, weight):
        """-> slices of the P rows with their logits (n, V), always in the same memory"""
        size = max(1, HEAD_FLOATS // len(weight))
        buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
        for start in range(0, len(hidden), size):
            at = slice(start, start + size)
            yield at, torch.mm(hidden[at], weight.T, out=buffer[:len(hidden[at])])


@torch.no_grad()
def batch_logps(model, samples, cfg, temperature=None):
    """`response_logps` of any number of samples without gradient, at cfg.temperature unless told
    otherwise. -> (n, L)"""
    length = max(len(s.prompt) + len(s.tokens) for s in samples)
    out = torch.zeros(len(samples), length, device=cfg.device)
    temperature = temperature or cfg.temperature
    for rows in micro_batches(samples, cfg.micro_tokens):
        ids, mask = collate([samples[i] for i in rows], cfg.device)
        out[rows, :ids.shape[1]] = response_logps(model, ids, mask, temperature)[0]
    return out


def response_part(sample, row):
    """The entries of `row` (L,) that belong to the response of `sample`."""
    return row[len(sample.prompt):len(sample.prompt) + len(sample.tokens)]


# ------------------------------------------------------------------------------ answer checking

UNIT = r"(?!(?i:and|to)\b|.*\b(?i:or|not)\b)[a-zA-Z]{2}[a-zA-Z .]*"  # no second candidate
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"


def extract_answer(text):
    """The final answer: what follows the last `####`, `\\boxed{...}`, `the answer is` or
    `Answer:`, whichever comes last. None if there is no such mark."""
    hashes = boxed = said = (-1, 0, 0)  # of the last one: start, start and end of the answer
    for m in re.finditer(r"####[ \t]*([^\n]+)", text):
        hashes = m.start(), *m.span(1)
    opened = []
    for m in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if m[0] != "}":
            opened.append(m.span() if len(m[0]) > 1 else None)
        elif opened and (mark := opened.pop()):
            boxed = max(boxed, (*mark, m.start()))
    for m in re.finditer(r"(?:\banswer is:?|\banswer:)\s*(?!\\boxed|####)(?=[^\n])", text, re.I):
        said = *m.span(), len(text)
    last = max(hashes, boxed, said)
    answer = text[last[1]:last[2]]
    if last is said:  # up to the end of the sentence
        answer = re.split(r"\n|\.(?:\s|$)", answer, maxsplit=1)[0]
    return answer.strip().strip("<>*").strip() or None


def as_number(text):
    """`1,080`, `$18`, `5 apples`, `50%`, `3/4`, `1 1/2`, `x = 5` -> a Fraction; else None."""
    if len(text) > 100:
        return None
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\u2212", "-").strip()
    m = re.fullmatch(rf"(?:[a-zA-Z]\s*=\s*)?(-?)[$€£]?\s*\+?(?:({NUMBER})\s*/\s*(\d+)|"
                     rf"(-?\d+)\s+(\d+)/(\d+)|({NUMBER}))(?:\s*(?:%|°|{UNIT})|"
                     rf"\s+[a-zA-Z])?\.?", text)
    if not m:
        return None
    minus, top, bottom, whole, part, parts, plain = m.groups()
    try:
        if plain:
            value = Fraction(plain.replace(",", ""))
        elif whole:
            value = int(whole) + Fraction(int(part), int(parts)) * (-1 if whole[0] == "-" else 1)
        else:
            value = Fraction(top.replace(",", "")) / int(bottom)
    except ZeroDivisionError:
        return None
    return -value if minus else value


@functools.lru_cache(10**5)
def same_answer(given, truth):
    """Equality of two final answers: as numbers, as texts, else as LaTeX by math-verify."""
    if given is None or truth is None:
        return False
    if max(len(given), len(truth)) > 500:  # the patterns below would take long
        return given.split() == truth.split()
    given, truth = (re.sub(r"^(\$\$?|\\\(|\\\[)\s*(.+?)\s*(\1|\\\)|\\\])$", r"\2", x.strip())
                    for x in (given, truth))  # $18$, \(18\)
    a, b = as_number(given), as_number(truth)
    if a is not None and b is not None:
        return a == b
    tight = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", x) for x in (given, truth)]
    if tight[0] == tight[1]:
        return True
    if not re.search(r"[\\^_{}()\[\]]", given + truth):
        return False
    bases = [re.findall(r"\d_\{?(\d+)", x) for x in (given, truth)]  # math-verify ignores them
    if all(bases) and bases[0] != bases[1]:
        return False
    return same_latex(truth, given)


def same_latex(truth, given):
    """math-verify's verdict, False where it takes more than CHECK_SECONDS of a processor or
    CHECK_MEMORY. `9^{9^{9^9}}` is one multiplication, which no exception or signal handler can
    interrupt, so it is asked in a process of its own."""
    for _ in range(2):  # a process that someone else killed has said nothing
        checker, said = answer_checker(os.getpid()), ""
        try:
            checker.stdin.write(json.dumps([truth, given]) + "\n")
            checker.stdin.flush()
            said = checker.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not said:
                answer_checker.cache_clear()
                end_process(checker)
        if said or checker.returncode == -signal.SIGPROF:
            break
    return said == "True\n"


@functools.lru_cache(1)
def answer_checker(pid):
    """Starts `check_answers` as a process that ends with this one, whose id is `pid`; Ctrl-C, which
    reaches all of a terminal's session, is left to this one."""
    code = (f"import sys\nsys.path[:] = {sys.path!r}\n"  # not the folder that it is started in
            f"{inspect.getsource(check_answers)}\ncheck_answers({CHECK_SECONDS}, {CHECK_MEMORY})")
    checker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    atexit.register(end_process, checker)
    if checker.stdout.readline() != "ready\n":
        fail("math-verify, which compares LaTeX answers, does not start; try: python -c 'import "
             "math_verify'")
    return checker


def end_process(process):
    """Ends a process, if it has not ended, and closes its pipes."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()


CHECK_SECONDS, CHECK_MEMORY = 3, 4 << 30  # most checks take some hundredths of a second


def check_answers(seconds, memory):
    """[truth, given] as JSON, line by line -> are they equal as LaTeX? What math-verify's `parse`
    does besides is left out: it looks for an answer inside the text, and evaluates as Python
    (sympy's parse_expr) what is no LaTeX."""
    import contextlib
    import json
    import logging
    import resource
    import signal
    import sys

    from math_verify import LatexExtractionConfig, verify
    from math_verify.parser import normalize_latex, parse_latex_cached

    def read(text):
        text = normalize_latex(text, LatexExtractionConfig().normalization_config)
        try:
            return [parse_latex_cached(text), text]
        except Exception:  # many kinds, all of them no LaTeX
            return [text]

    logging.disable()
    answers, sys.stdout = sys.stdout, sys.stderr
    verify(read("\\frac{1}{2}"), read("0.5"), timeout_seconds=None)  # loads what is loaded late
    with contextlib.suppress(ValueError):  # a lower limit than this is in force
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        equal = False
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        with contextlib.suppress(Exception):
            truth, given = map(read, json.loads(line))
            equal = verify(truth, given, timeout_seconds=None)
        print(bool(equal), file=answers, flush=True)


# ----------------------------------------------------------------------------------- evaluation


def evaluate(model, tok, problems, cfg, correct):
    """Greedy accuracy on held-out problems, overall and per level; with cfg.eval_samples = k also
    mean@k, pass@k and maj@k of k samples. `correct(text, problem)` -> bool.
    """
    result = greedy_accuracy(model, tok, problems, cfg, correct)
    if cfg.eval_samples:
        result |= at_k(*sample_solutions(model, tok, problems, cfg, correct), cfg.eval_samples)
    return result


def greedy_accuracy(model, tok, problems, cfg, correct):
    """The share of correct greedy responses, overall and per level."""
    greedy = sample(model, tok, [p.prompt for p in problems], 1, cfg.max_new_tokens, 0)
    right = [correct(s.text, p) for s, p in zip(greedy, problems)]
    result = {"accuracy": sum(right) / len(right)}
    for level in sorted({p.level for p in problems if p.level}):
        of_level = [r for r, p in zip(right, problems) if p.level == level]
        result[f"accuracy/level{level}"] = sum(of_level) / len(of_level)
    return result


def sample_solutions(model, tok, problems, cfg, correct, read=None):
    """cfg.eval_samples = k responses to each problem -> B*k Samples, and which are correct.

    Draws from a generator of its own, so that evaluating never changes training.
    """
    generator = torch.Generator(cfg.device).manual_seed(1234)
    drawn = sample(model, tok, [p.prompt for p in problems], cfg.eval_samples, cfg.max_new_tokens,
                   cfg.temperature, generator, read)
    return drawn, [correct(s.text, problems[i // cfg.eval_samples]) for i, s in enumerate(drawn)]


def at_k(samples, right, k):
    """mean@k, pass@k and maj@k of B*k samples."""
    rows = [right[i:i + k] for i in range(0, len(right), k)]
    return {f"mean@{k}": sum(right) / len(right),
            f"pass@{k}": sum(map(any, rows)) / len(rows),
            f"maj@{k}": vote(samples, right, k)}


def vote(samples, right, k, weights=None):
    """The share of problems whose `majority` of k samples is correct; weights: of the samples."""
    won = []
    for part in (slice(i, i + k) for i in range(0, len(samples), k)):
        answers = [extract_answer(s.text) for s in samples[part]]
        won.append(right[part][majority(answers, weights and weights[part])])
    return sum(won) / len(won)


def majority(answers, weights=None):
    """Index of the first answer of the class of equal ones with the largest summed weight (the
    larger class where sums are equal); None is no vote."""
    def votes(i):
        same = [same_answer(answers[i], a) for a in answers]
        return sum(w for w, x in zip(weights or same, same) if x), sum(same)

    return max(range(len(answers)), key=votes)


# ------------------------------------------------------- run folder, metrics, checkpoints


def save_folder(folder, write, keep_old=False):
    """`write(temporary folder)`, then rename: the folder is whole or not there, after a power cut,
    too. What it replaces is `<folder>.old` until the new one has its name, and then, if it is to be
    kept, `<folder>/before`."""
    folder = Path(folder)
    new, old = (folder.with_name(f"{folder.name}.{x}") for x in ("new", "old"))
    for path in (new, folder / "before"):  # room for two is enough
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        for path in [*new.rglob("*"), new]:
            flush(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    flush(folder.parent)
    if keep_old and old.exists():
        old.rename(folder / "before")
    shutil.rmtree(old, ignore_errors=True)


def save_file_whole(path, write):
    """The same for a file: `write(temporary file)`, then rename."""
    new = path.with_name(f"{path.name}.new")
    write(new)
    flush(new)
    os.replace(new, path)


def save_figure(fig, path):
    """A picture as a .png file, and no longer in memory."""
    with writing(path.parent):
        save_file_whole(path, lambda to: fig.savefig(to, dpi=110, format="png"))
    sys.modules["matplotlib.pyplot"].close(fig)


def flush(path):
    """Waits until a file or folder is on the disk, and not only in a buffer of the system."""
    found = os.open(path, os.O_RDONLY)
    try:
        os.fsync(found)
    finally:
        os.close(found)


def sha256_of(path):
    """The SHA-256 of a file, as a hexadecimal text."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def writing(folder):
    """Turns a failed write in `folder` into one line that says what is left."""
    try:
        yield
    except Exception as e:  # tokenizers and safetensors have errors of their own
        if not isinstance(e, OSError) and "os error" not in str(e):
            raise
        fail(f"{folder}: cannot be written ({getattr(e, 'strerror', None) or e}); {Run.left()}")


def append_rows(path, rows):
    """Adds rows to a file, one line of JSON each."""
    with writing(path.parent), open(path, "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def kept_rows(path, **columns):
    """The rows of a file that `append_rows` made, each a dict with these columns of these types;
    none if there is no file. A last line that was cut off is taken away."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows, whole = [], [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(whole, 1):
        try:
            rows.append(json.loads(line))
            good = all(isinstance(rows[-1][name], kind) for name, kind in columns.items())
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            fail(f"{path}: line {number} is not what this script wrote; delete the file, and it is "
                 "made anew")
    if len(whole) < len(lines):
        with writing(path.parent):
            save_file_whole(path, lambda to: to.write_bytes(b"".join(whole)))
    return rows


SAMPLING_METRICS = {  # what `sampling_statistics` tells, and the script's policy/mismatch
    "reward/accuracy": "share of sampled responses that are correct: the number to watch",
    "groups/all_wrong": "share of sampled groups without a correct response",
    "groups/all_correct": "share of sampled groups without a wrong response; in groups of two "
                          "or more there is no signal in them",
    "policy/entropy": "of the sampling distribution, nats per sampled token; 0 is collapse",
    "policy/mismatch": "largest |sampler's - trainer's log-prob| of a token: rounding error",
    "sample/length": "mean tokens per sampled response",
    "sample/truncated": "share of sampled responses cut off by --max_new_tokens",
    "sample/tokens": "tokens sampled since the start, responses never trained on included",
}


def sampling_statistics(samples, right, group, tokens):
    """SAMPLING_METRICS of B*G samples; right: which are correct; tokens: sampled so far."""
    groups = [right[i:i + group] for i in range(0, len(right), group)]
    new = sum(len(s.tokens) for s in samples)
    return {"reward/accuracy": sum(right) / len(right),
            "groups/all_wrong": sum(not any(g) for g in groups) / len(groups),
            "groups/all_correct": sum(all(g) for g in groups) / len(groups),
            "policy/entropy": sum(s.entropy for s in samples) / new,
            "sample/length": new / len(samples),
            "sample/truncated": sum(not s.finished for s in samples) / len(samples),
            "sample/tokens": tokens}


LOGS = ("metrics.jsonl", "samples.jsonl")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STAGE_SECONDS = 600  # of training between two checkpoints inside a stage, see `stage` [ours]


class Run:
    """The run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/ and in it before/, the
    one before it, and at the end curves.png, summary.json and model/.

    `metrics` maps every loggable name (shell wildcards allowed) to a sentence; `curves` maps the
    title of a panel to the names drawn in it. A process has one run at a time.
    """

    current, lock = None, None  # this process's, and the open folder that it holds

    def __init__(self, cfg, script, metrics, curves):
        self.cfg, self.script, self.metrics, self.curves = cfg, script, metrics, curves
        self.folder, self.started = Path(cfg.out), time.perf_counter()
        self.end = cfg.steps  # a script of several stages sets the end of each
        self.step, self.training, self.stopping = 0, False, None
        self.good, self.handlers = set(), {}  # verified checkpoints; whom signals went to before
        if Run.current:  # it did not get to its end
            Run.current.close()
        Run.current = self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.hold()
            if not cfg.resume and (self.folder / "config.json").exists():
                fail(f"--out {self.folder} holds a run: go on with --resume {self.folder}, or "
                     "choose another --out")
            names = {p.name.removesuffix(".new") for p in self.folder.iterdir()}
            if not cfg.resume and names - {"golden.jsonl", "config.json"}:  # killed at once
                fail(f"--out {self.folder} is not empty; choose another --out")
            for path in self.folder.glob("*.new"):  # half-written, when it was killed
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (self.folder / "config.json.new").touch()
            (self.folder / "config.json.new").unlink()
        except OSError as e:
            fail(f"--out {self.folder}: cannot be written ({e.strerror or e})")
        if any((self.folder / log).is_symlink() for log in LOGS):
            fail(f"--out {self.folder}: one of {LOGS} is a link to another file")
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # a job in the background has it
                    self.handlers[number] = signal.signal(number, self.ask_to_stop)
        shown = {k: v for k, v in asdict(cfg).items() if v not in ("", None, False)}
        print(f"{script}: " + " ".join(f"{k}={v}" for k, v in shown.items()))

    def hold(self):
        """Keeps other processes out of the folder until this one ends, however it ends."""
        Run.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(Run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {self.folder}: another process is at work in this folder; wait for its "
                 "end, or choose another --out")
        except OSError:  # a file system that knows no locks
            pass

    def ask_to_stop(self, number, frame):
        """A signal ends the program after the step that is being trained, and its checkpoint; a
        second one, and one outside of training, at once."""
        if self.stopping or not self.training:
            self.stop(number)
        self.stopping = number
        print(f"\n{signal.Signals(number).name}: stopping after this step (once more: at once)",
              file=sys.stderr)

    def stop(self, number):
        """Ends the program as the shell knows it of this signal, and says how to go on."""
        print(f"\nstopped by {signal.Signals(number).name}; {Run.left()}", file=sys.stderr)
        self.close()
        raise SystemExit(128 + number)

    @staticmethod
    def left():
        """What this process's run, if it has one, can go on from, in words."""
        run = Run.current
        if run is None:
            return "nothing else was touched"
        if not (run.folder / "config.json").exists():
            return "nothing is lost yet: give the same command again"
        where = "no checkpoint was written yet"
        # the newer, the later
        for name in ("checkpoint/before", "checkpoint.old", "checkpoint", "checkpoint.stage"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                about = json.loads((run.folder / name / "about.json").read_text())
                where = f"the last good checkpoint is of {about['of']}"
        return (f"{where}; go on with: python {run.script}.py --resume "
                f"{shlex.quote(str(run.folder))}")

    def describe(self):
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"],
                                 cwd=Path(__file__).parent, capture_output=True, text=True).stdout
        except OSError:  # no git on this machine
            git = ""
        cuda = self.cfg.device != "cpu"
        libraries = ("torch", "transformers", "tokenizers", "datasets", "peft", "math-verify",
                     "langdetect")
        return {"script": self.script, "config": asdict(self.cfg),
                "versions": {"python": platform.python_version(),
                             **{x: importlib.metadata.version(x) for x in libraries}},
                "commit": git.strip() or "unknown",
                "device": torch.cuda.get_device_name(self.cfg.device) if cuda else "cpu"}

    def log(self, step, **values):
        """One row of metrics.jsonl. Every name must be declared and every value finite."""
        for name, value in values.items():
            if not any(fnmatch(name, known) for known in self.metrics):
                raise KeyError(f"{name} is not declared in METRICS")
            if not math.isfinite(value):
                fail(f"step {step}: {name} is {value}; {Run.left()}")
        row = {"step": step, **{k: float(v) for k, v in values.items()}}
        append_rows(self.folder / "metrics.jsonl", [row])

    def report(self, step, result):
        """One line of an evaluation; of the numbers per level only the accuracies."""
        shown = {k: v for k, v in result.items() if "/" not in k or k.startswith("accuracy/")}
        tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))

    def seconds(self):
        return time.perf_counter() - self.started

    def save(self, model, opt, state, name="checkpoint"):
        """Writes checkpoint/: trained weights, optimizer (None where none lives on), every RNG
        state, the caller's `state`, and the sizes of the log files, so that rows written after it
        can be cut off; in about.json the SHA-256 of these files, and what they are of."""
        state = {**state, "seconds": self.seconds()}
        weights = {n: p.detach().contiguous() for n, p in trained(model)}

        def write(to):
            for log in LOGS:
                (self.folder / log).touch()
                flush(self.folder / log)
            extra = {"state": state, "rng": rng_state(),
                     "logs": {log: (self.folder / log).stat().st_size for log in LOGS}}
            if opt:
                extra |= {"optimizer": opt.state_dict(), "masters": [m for _, m in opt.pairs]}
            save_file(weights, to / "weights.safetensors")
            with open(to / "state.pt", "wb") as f:
                try:
                    torch.save(extra, f)
                except RuntimeError as e:  # the write's own error is below it
                    raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
            about = {"of": state.get("of", f"step {state['step']}"),
                     "sha256": {p.name: sha256_of(p) for p in to.iterdir()}}
            (to / "about.json").write_text(json.dumps(about))

        with writing(self.folder):
            save_folder(self.folder / name, write, keep_old=name == "checkpoint")
        if name == "checkpoint":  # newer than what a stage had
            shutil.rmtree(self.folder / "checkpoint.stage", ignore_errors=True)

    def checkpoint(self, due, model, opt, state, name="checkpoint"):
        """`save`, if it is due or a signal has asked for the end, which then is here."""
        asked = self.stopping
        if due or asked:
            self.save(model, opt, state, name)
        if asked:
            self.stop(asked)

    def restore(self, model, opt):
        """The last checkpoint's `state`; None for a new run or one killed before its first
        checkpoint. Cuts the logs back to the rows that the checkpoint knows. Without a model the
        weights are left alone, see `load`."""
        if not self.cfg.resume:
            return None
        logs, state = dict.fromkeys(LOGS, 0), None
        if extra := self.load(model, opt):
            logs, state = extra["logs"], extra["state"]
            self.started -= state["seconds"]
        elif 0 < self.cfg.save_every < (steps := len(kept_rows(self.folder / LOGS[0])) - 1):
            fail(f"--resume {self.folder}: it has made {steps} steps, but has no checkpoint/ any "
                 "more; nothing was touched; bring it back, or start anew with another --out")
        with writing(self.folder):
            for name in LOGS:
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, logs[name])
        where = f"after step {state['step']}" if state else "at the start (no checkpoint yet)"
        print(f"resuming {self.folder} {where}")
        return state

    def load(self, model, opt, name="checkpoint"):
        """Puts the last good checkpoint's weights, optimizer and RNG states back, into a model if
        there is one; a script of several stages calls it in the stage that the checkpoint is of.
        -> the checkpoint's other contents, None without one"""
        folder = self.good_checkpoint(name)
        if folder is None:
            return None
        extra = read_state(folder, mmap=model is None)  # then only the counters are read
        if model is None:
            return extra
        try:
            saved = load_file(folder / "weights.safetensors")
            with torch.no_grad():
                for key, p in trained(model):
                    p.copy_(saved[key])
                for (_, m), s in zip(opt.pairs if opt else [], extra.get("masters", [])):
                    m.copy_(s)
            if opt:
                opt.load_state_dict(extra["optimizer"])
            rng_state(extra["rng"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError,
                SafetensorError) as e:
            fail(f"{folder}: is not a checkpoint of this run ({type(e).__name__}: {e})")
        return extra

    def good_checkpoint(self, name):
        """The checkpoint, or the one before it, if it is as it was written, and then from now on in
        its place; None where there is none."""
        folder = self.folder / name
        if name in self.good and folder.is_dir():
            return folder
        old, found, told = folder.with_name(f"{name}.old"), None, []
        for path in (folder, old, folder / "before"):
            if found is None and path.is_dir():
                damage = self.damage(path)
                found = None if damage else path
                told += [f"{path.relative_to(self.folder)} is damaged ({damage})"] if damage else []
        told = " and ".join(told)
        if found is None and told and name == "checkpoint":
            fail(f"--resume {self.folder}: {told}, and there is no other; start anew with --out")
        if told:
            print(f"{self.folder}: {told}; going on from what was before it")
        if found == folder / "before":
            shutil.rmtree(old, ignore_errors=True)
            found.rename(old)
        if found and found != folder:
            shutil.rmtree(folder, ignore_errors=True)
            old.rename(folder)
        if found:
            self.good.add(name)
            if old.is_dir():  # it was killed before the last of the renames
                old.rename(folder / "before")
        return found and folder

    def damage(self, folder):
        """What is wrong with a checkpoint, "" if nothing is."""
        try:
            known = json.loads((folder / "about.json").read_text())["sha256"]
            for name in ("state.pt", "weights.safetensors"):
                if sha256_of(folder / name) != known[name]:
                    return f"{name} is not what was written"
            logs = read_state(folder, mmap=True)["logs"]
            for name in LOGS:
                if (self.folder / name).stat().st_size < logs[name]:
                    return f"{name} has lost rows since"
        except OSError as e:
            return f"{Path(e.filename or folder).name}: {e.strerror}"
        except (ValueError, KeyError, TypeError):
            return "about.json is not what was written"
        return ""

    def open(self):
        """Writes config.json: the folder counts as a run from here on, when all input has proved
        good."""
        config = self.folder / "config.json"
        about = json.loads(config.read_text()) if self.cfg.resume else self.describe()
        about["config"]["steps"] = self.cfg.steps  # the one flag that --resume may change
        with writing(self.folder):
            save_file_whole(config, lambda to: to.write_text(json.dumps(about, indent=2)))

    def start(self, model, opt, evaluate):
        """The state to go on from: the checkpoint's, or a new one with its `before` evaluation."""
        self.open()
        state = self.restore(model, opt)
        if state is None:
            state = {"step": 0, "position": 0, "tokens": 0, "before": evaluate()}
            self.log(0, **{f"eval/{k}": v for k, v in state["before"].items()})
            self.report(0, state["before"])
        return state

    def steps(self, state):
        """Counts state["step"] up to the end of the run, with one bar (silent when piped)."""
        bar = tqdm(total=self.end, initial=state["step"], desc=self.script, disable=None)
        self.training = True
        while state["step"] < self.end and not self.sampled_enough(state):
            state["step"] += 1
            self.step, self.step_started = state["step"], time.process_time()
            yield state["step"]
            bar.update()
        bar.close()
        self.training = False
        if self.stopping:  # asked after the checkpoint of the last step
            self.stop(self.stopping)

    def stage(self, name, model, opt, steps, found):
        """Counts the steps 1 to `steps` of a training before the first step of the run or inside
        one (SFT, DPO). It has a checkpoint of its own, checkpoint.stage/, every STAGE_SECONDS, from
        which a resumed run goes on. `name`: no other stage of the run has it; `found`: a dict of
        lists that the training fills with numbers, which are brought back, too."""
        done, state = 0, {}
        if self.cfg.resume and (saved := self.load(None, None, "checkpoint.stage")):
            state = saved["state"]
        if state.get("name") == name:
            self.load(model, opt, "checkpoint.stage")
            for key, values in state["found"].items():
                found[key][:] = values
            done, self.started = state["done"], time.perf_counter() - state["seconds"]
        before, self.training, saved_at = self.training, True, time.perf_counter()
        for step in tqdm(range(done + 1, steps + 1), name, initial=done, total=steps, disable=None,
                         leave=not before):
            yield step
            due = bool(self.cfg.save_every) and time.perf_counter() - saved_at > STAGE_SECONDS
            state = {"step": self.step, "of": f"step {step} of {name}", "name": name, "done": step,
                     "found": found}
            self.checkpoint(due, model, opt, state, "checkpoint.stage")
            saved_at = time.perf_counter() if due else saved_at
        self.training = before

    def save_model(self, name, model, tok):
        """save_pretrained in a folder of the run."""
        with writing(self.folder):
            save_folder(self.folder / name,
                        lambda to: (model.save_pretrained(to), tok.save_pretrained(to)))

    def sampled_enough(self, state):
        return 0 < self.cfg.sampled_tokens <= state["tokens"]

    def end_step(self, state, values, samples, model, opt, evaluate):
        """Logs a step; evaluates, checkpoints and draws where it is due."""
        cfg, step = self.cfg, state["step"]
        spent = time.process_time() - self.step_started
        state["train_cpu_seconds"] = state.get("train_cpu_seconds", 0.0) + spent
        last = step == self.end or self.sampled_enough(state)
        if last or (cfg.eval_every and step % cfg.eval_every == 0):
            state |= {"after": evaluate(), "evaluated": step}
            values = values | {f"eval/{k}": v for k, v in state["after"].items()}
            self.report(step, state["after"])
        self.log(step, **values)
        append_rows(self.folder / "samples.jsonl", [{"step": step, **row} for row in samples])
        due = bool(cfg.save_every) and step % cfg.save_every == 0
        self.checkpoint(last or due, model, opt, state)
        if due and not last:  # `finish` draws the last one
            self.draw_curves()
            gc.collect()  # a figure has megabytes of cycles, which Python leaves lying for long

    def draw_curves(self):
        """curves.png: a panel per entry of `curves`, thin lines as logged, thick ones smoothed."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        plt.rcParams["text.parse_math"] = False  # a level may have a $ in it
        metrics = self.folder / "metrics.jsonl"  # read twice: all its rows would take much memory
        with open(metrics) as f:
            logged = sorted({k for line in f for k in json.loads(line)})
        panels = {title: [k for pattern in names for k in logged if fnmatch(k, pattern)]
                  for title, names in self.curves.items()}
        panels = {title: names for title, names in panels.items() if names}
        points = {name: ([], []) for names in panels.values() for name in names}
        with open(metrics) as f:
            for row in map(json.loads, f):
                for name in points.keys() & row.keys():
                    points[name][0].append(row["step"])
                    points[name][1].append(row[name])
        fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
        for ax, (title, names) in zip(axes[0], panels.items()):
            for name in names:
                x, y = points[name]
                label = name.split("/", 1)[1].removeprefix("accuracy/")
                if name.startswith("eval/"):
                    ax.plot(x, y, marker="o", ms=3, label=label)
                    continue
                first = [max(0, i - len(y) // 20) for i in range(len(y))]
                total = [0, *accumulate(y)]
                recent = [(total[i + 1] - total[n]) / (i + 1 - n) for i, n in enumerate(first)]
                line, = ax.plot(x, recent, lw=2, label=label)
                ax.plot(x, y, lw=0.5, alpha=0.4, color=line.get_color())
            ax.set(title=title, xlabel="step")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        name = Path(self.cfg.model).name
        fig.suptitle(f"{self.script} --method {self.cfg.method}, {name}, seed {self.cfg.seed}")
        fig.tight_layout()
        save_figure(fig, self.folder / "curves.png")

    def finish(self, state, model, tok, evaluate):
        """model/, curves.png, summary.json, and the before/after table."""
        before = state["before"]
        after = state["after"] if state.get("evaluated") == state["step"] else evaluate()
        self.save_model("model", model, tok)
        self.draw_curves()
        summary = {"script": self.script, "method": self.cfg.method, "model": self.cfg.model,
                   "seed": self.cfg.seed, "steps": state["step"], "seconds": self.seconds(),
                   "train_cpu_seconds": state.get("train_cpu_seconds", 0.0), "before": before,
                   "after": after}
        if "stages" in state:
            summary["stages"] = state["stages"]
        if self.cfg.device != "cpu":
            summary["peak_gpu_gb"] = torch.cuda.max_memory_allocated(self.cfg.device) / 1e9
        with writing(self.folder):
            save_file_whole(self.folder / "summary.json",
                            lambda to: to.write_text(json.dumps(summary, indent=2)))
        width = max(18, *(len(name) + 1 for name in after))
        print(f"\n{'held-out':<{width}}{'before':>8}{'after':>8}")
        for name in after:
            was = f"{before[name]:.3f}" if name in before else "-"
            print(f"{name:<{width}}{was:>8}{after[name]:>8.3f}")
        print(f"\n{state['step']} steps, {self.seconds():.0f} s; everything is in {self.folder}/")
        self.close()

    def close(self):
        """Gives the folder and the signals back."""
        if Run.lock is not None:
            os.close(Run.lock)
        Run.current = Run.lock = None
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def stage(name, model, opt, steps, found):
    """`Run.stage` of this process's run; just the steps where there is none."""
    if Run.current:
        return Run.current.stage(name, model, opt, steps, found)
    return range(1, steps + 1)


def read_state(folder, mmap):
    """A checkpoint's state.pt. Ends the program where it is somebody else's, and above all where
    loading it could run code."""
    try:
        extra = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=mmap)
        state, kinds = extra["state"], {"step": int, "seconds": float}
        if "found" not in state:  # not of a stage
            kinds |= {"position": int, "tokens": int, "before": dict}
        if (all(isinstance(state[k], kind) for k, kind in kinds.items())
                and all(isinstance(extra["logs"][log], int) for log in LOGS)):
            return extra
        what = "has other contents"
    except pickle.UnpicklingError:
        what = "holds more than numbers and texts, and could run code if it were loaded"
    except (LookupError, TypeError, RuntimeError, EOFError) as e:
        what = f"has other contents ({type(e).__name__}: {e})"
    fail(f"{folder}/state.pt {what}: not a checkpoint of these scripts")


def trained(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def rng_state(state=None):
    """Reads, or with `state` sets, every generator that training draws from."""
    if state is None:
        return {"python": random.getstate(), "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
