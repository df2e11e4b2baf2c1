"""Plumbing shared by the five scripts. Nothing in here carries an equation number of a paper.

In order: command line, models, data, sampling, log-probabilities, answers, evaluation, run folder.
SHAPES  B prompts, G responses each, N = B*G rows, L columns (prompt + response), V vocabulary.
        Row i belongs to prompt i // G. Log-probabilities are in nats.
"""

import argparse
import copy
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import huggingface_hub
import matplotlib
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, set_seed
from transformers.hf_argparser import HfArg, HfArgumentParser

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, not ours
matplotlib.rcParams["text.parse_math"] = False  # a level of the data may have a $ in it

# --------------------------------------------------------------------------------- command line


def arg(default, help):
    """A dataclass field whose help says what it is and, in brackets, where its value is from."""
    return HfArg(default=default, help=help.replace("%", "%%"))


@dataclass
class Config:
    """The flags that mean the same in every script. Each script adds those of its paper."""

    # Without type annotations these are no flags: what the name `tiny` stands for in the folder
    # tiny/, and which numbers must be above 0. The others must not be below, except for `negative`.
    tiny_files = dict(model="arithmetic", train="arithmetic/train.jsonl",
                      test="arithmetic/test.jsonl")
    positive = ("prompts", "group", "max_new_tokens", "micro_tokens", "temperature", "lr")
    negative = ()

    model: str = arg("tiny", "tiny, a folder, a Hub id, or a bare name such as Qwen2.5-1.5B")
    dataset: str = arg("gsm8k", "tiny, gsm8k, svamp, math500, aime24, aime25, amc23, a Hub id, or "
                                "a .jsonl/.json/.parquet file")
    eval_dataset: str = arg("", "held-out problems; default: the test split of --dataset, or rows "
                                "held out from it")
    eval_size: int = arg(200, "evaluate on the first so many held-out problems, 0 = all [ours]")
    eval_samples: int = arg(0, "k: also sample k responses per held-out problem (mean@k, ...)")
    # sampling
    steps: int = arg(200, "rollout steps [ours]")
    prompts: int = arg(16, "B, prompts per step [ours]")
    group: int = arg(8, "G, responses per prompt [ours]")
    max_new_tokens: int = arg(1024, "longest response, in tokens [ours]")
    temperature: float = arg(1.0, "of sampling and of RL's log-probabilities [DAPO code: 1.0]")
    # optimisation
    lr: float = arg(1e-6, "AdamW learning rate [DAPO Sec. 4.1: 1e-6]")
    warmup_steps: int = arg(20, "linear warm-up of the learning rate [DAPO Sec. 4.1: 20]")
    micro_tokens: int = arg(2048, "padded tokens per forward: memory, never the gradient [ours]")
    lora: bool = arg(False, "train LoRA adapters (peft), which usually want a larger --lr")
    # run
    seed: int = arg(0, "of data order and sampling")
    device: str = arg("auto", "what torch knows: cpu, cuda, cuda:1, mps; auto: cuda, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto", "of matrix products (autocast); auto: float32 on a CPU, else bfloat16")
    out: str = arg("", "run folder; default: runs/<script>-<model>-<method>-s<seed>")
    eval_every: int = arg(20, "evaluate every so many steps, 0 = only before and after")
    save_every: int = arg(20, "checkpoint every so many steps, 0 = only at the end")
    resume: str = arg("", "go on with the run in this folder, exactly where it was")


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the docstring as it is, and the value that a flag will have."""

    def _get_help_string(self, action):
        return action.help if action.default == "" else super()._get_help_string(action)


def parse_config(cls, script, doc, tiny, methods, argv=None):
    """The command line -> a `cls`. A flag's value is, in this order: what was typed, that of `tiny`
    (with the tiny model only; entries named after a method hold for that method), that of
    methods[--method], the default of its field. With --resume DIR the values of DIR/config.json
    take the place of the last three, and only --steps and --device may be typed with another."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, default in (("--model", "tiny"), ("--method", cls.method), ("--resume", "")):
        peek.add_argument(flag, nargs="?", default=default)
    chosen = peek.parse_known_args(argv)[0]
    values = methods.get(chosen.method, {})
    if chosen.model == "tiny":
        values = values | tiny | tiny.get(chosen.method, {})
    if chosen.resume:
        values = saved_config(chosen.resume, script)
    parser = HfArgumentParser(cls, description=doc, allow_abbrev=False, formatter_class=Formatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    parser.set_defaults(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
    cfg = cls(**vars(parser.parse_args(argv)))
    for name, x in asdict(cfg).items():
        if chosen.resume and x != values.get(name, x) and name not in ("steps", "device"):
            fail(f"--{name} {x}: the run in --resume {cfg.resume} has {values[name]}")
        if isinstance(x, int | float) and not (name in cls.negative or 0 <= x < math.inf):
            fail(f"--{name} {x}: must be a number from 0 on")
        if name in cls.positive and x <= 0:
            fail(f"--{name} {x}: must be positive")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=cfg.device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        fail(f"--device {cfg.device}: {e!s:.200}")
    if cfg.dtype == "auto":
        cfg.dtype = "float32" if cfg.device == "cpu" else "bfloat16"
    model = re.sub(r"[^\w.-]+", "_", Path(cfg.model).name) or "model"
    cfg.out = cfg.out or f"runs/{script}-{model}-{cfg.method}-s{cfg.seed}"
    return cfg


def saved_config(folder, script):
    """The flags of the run in a folder."""
    try:
        about = json.loads((Path(folder) / "config.json").read_text())
        if about["script"] == script:
            return about["config"] | {"out": folder, "resume": folder}
    except (OSError, ValueError, TypeError, KeyError) as e:
        fail(f"--resume {folder}: no config.json of a run in it ({e})")
    fail(f"--resume {folder}: was made by {about['script']}.py, not by {script}.py")


# --------------------------------------------------------------------------------------- models

TINY_FOLDER = Path(__file__).parent / "tiny"
ONE_THREAD = 10**6  # parameters up to which a second CPU thread mostly waits [ours]
MAX_GRAD_NORM = 1.0  # the gradient is clipped to it [ours]
ORGANISATIONS = {"Qwen": "Qwen", "Llama-3": "meta-llama", "Mistral": "mistralai",
                 "DeepSeek-R1-Distill": "deepseek-ai", "OctoThinker": "OctoThinker"}


@functools.cache
def find_hub():
    """Asks the Hub for a sign of life, once; without one the libraries use their cache only.
    Left to themselves they retry for the better part of a minute per file."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # whatever is wrong, the Hub is out of reach
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def load_model(name, cfg, lora=False, flag="--model"):
    """`name` -> (model, tokenizer). The weights of --model are float32 and run under autocast
    (--dtype). With `lora` they have the compute dtype, below float32 adapters on every linear
    layer; so have the weights of other models, which are not trained. Dropout is off:
    log-probabilities must be those of the policy that sampled."""
    path, what = name, f"{flag} {name}"
    if name == "tiny":
        path = str(TINY_FOLDER / cfg.tiny_files["model"])
    elif not Path(name).is_dir():
        organisation = [org for x, org in ORGANISATIONS.items() if name.startswith(x)]
        path = name if "/" in name else "/".join([*organisation, name])
        find_hub()
    if (Path(path) / "adapter_config.json").is_file():
        fail(f"{what}: holds LoRA adapters; merge them into their model (peft: merge_and_unload)")
    in_full = flag == "--model" and not lora
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for key in [k for k, v in vars(config).items() if "drop" in k and isinstance(v, float)]:
            setattr(config, key, 0.0)
        if in_full and torch.device(cfg.device).type == "cuda":
            check_memory(config, cfg, what)
        tok = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype="float32" if in_full else cfg.dtype, use_safetensors=True,
            trust_remote_code=False).to(cfg.device).eval()
    except Exception as e:  # many libraries' errors, all bad input here
        fail(f"{what}: {str(e) or repr(e):.400}")
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1.0):
            fail(f"{what}: has logits behind the LM head ({key}), which is not supported")
    if tok.eos_token_id is None:
        fail(f"{what}: its tokenizer has no EOS token, so no response could ever end")
    tok.pad_token = tok.pad_token or tok.eos_token  # harmless: masks are built from positions
    more = model.generation_config.eos_token_id  # None, a number or a list
    model.generation_config.eos_token_id = sorted(
        {tok.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})
    model.generation_config.suppress_tokens = None  # a script's choice, not the checkpoint's
    model.compute_dtype = getattr(torch, cfg.dtype)
    if flag == "--model" and model.num_parameters() <= ONE_THREAD:
        torch.set_num_threads(1)
    if not lora:
        return model, tok
    from peft import LoraConfig, get_peft_model

    model.activation_checkpointing_enable()
    # Rank and alpha [ours]: common values; every linear layer except the LM head. Training mode,
    # since activation checkpointing acts in no other.
    lora_config = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    return get_peft_model(model, lora_config).train(), tok


def check_memory(config, cfg, what):
    """Ends the program if a GPU cannot hold what training in full takes per weight: 4 bytes for the
    weight, 4 for its gradient, 8 for AdamW's moments, 2 for the copy of bfloat16 autocast."""
    with torch.device("meta"):  # takes no memory
        n = AutoModelForCausalLM.from_config(config).num_parameters()
    need = n * (18 if cfg.dtype == "bfloat16" else 16) / 1e9
    have = torch.cuda.get_device_properties(cfg.device).total_memory / 1e9
    if need > have:
        fail(f"{what}: training its {n / 1e9:.2f} billion weights in full takes {need:.1f} GB and "
             f"activations, and --device {cfg.device} has {have:.1f} GB; give --lora")


def causal_lm(model):
    """The transformers model itself, without the peft wrapper (the adapters stay active)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def autocast(model):
    """Inside it, matrix products are in the model's compute dtype, whatever that of its weights."""
    dtype = getattr(causal_lm(model), "compute_dtype", torch.float32)
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)


def trained_prompt(model, name, default=None):
    """A prompt that the model was trained with, in its config.json under "prompts": `instruction`
    follows a question whose answer is verified, `judge` asks temporal_sr.py's judge. [ours: a small
    model knows the words of its training only]"""
    return (getattr(model.config, "prompts", None) or {}).get(name, default)


def trained(model):
    """The parameters that training changes -> [(name, parameter)]"""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def frozen_reference(model):
    """The reference policy: a frozen copy in the compute dtype; None under LoRA, where switching
    the adapters off gives it back (`reference_policy`)."""
    if hasattr(model, "disable_adapter"):
        return None
    reference = copy.deepcopy(model).requires_grad_(False)
    for p in reference.parameters():  # not the buffers: RoPE's frequencies stay float32
        p.data = p.data.to(model.compute_dtype)
    return reference


@contextmanager
def reference_policy(model, reference):
    """`with reference_policy(...) as ref:` gives the model to run without gradient."""
    with torch.no_grad(), model.disable_adapter() if reference is None else nullcontext():
        yield reference or model


def adamw(lr, *models):
    """AdamW on what is trained of the models, a parameter group each; no weight decay [ours]."""
    groups = [{"params": [p for _, p in trained(model)]} for model in models]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)


def update(opt, cfg, step, rates=None):
    """One AdamW step on the gradient, clipped to MAX_GRAD_NORM. -> its norm before clipping. A
    gradient that is not finite ends the program before it can touch the weights. `rates`: of each
    parameter group; default: cfg.lr after its linear warm-up."""
    params = [p for group in opt.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM).item()
    if not math.isfinite(norm):
        fail(f"step {step}: the gradient norm is {norm}; no weight was touched by it, and --resume "
             "goes on from the last checkpoint; a smaller --lr may help")
    rates = rates or [cfg.lr * min(1.0, step / max(1, cfg.warmup_steps))]
    for group, rate in zip(opt.param_groups, rates):
        group["lr"] = rate
    opt.step()
    opt.zero_grad()
    return norm


def sft_step(policy, samples, opt, cfg, step, rates):
    """One optimizer step on the cross-entropy of the samples' responses, EOS included, a mean over
    all their tokens. -> loss, gradient norm"""
    n_tok, total = sum(len(s.tokens) for s in samples), 0.0
    for _, ids, mask in micro_batches(samples, cfg):
        loss = -response_logps(policy, ids, mask, 1.0)[0].sum() / n_tok
        loss.backward()
        total += loss.item()
    return total, update(opt, cfg, step, rates)


def save_model(folder, model, tok):
    """save_pretrained of a model (of LoRA's adapters, if it has some) and its tokenizer."""
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


# ----------------------------------------------------------------------------------------- data

HASHES = "Reason step by step. Write the final answer on the last line, after ####."
BOXED = "Reason step by step, and put the final answer within \\boxed{}."
# name: (Hub id, its config, instruction that follows a question)
HUB_DATA = {"gsm8k": ("openai/gsm8k", "main", HASHES), "svamp": ("ChilleD/SVAMP", None, HASHES),
            "math500": ("HuggingFaceH4/MATH-500", None, BOXED),
            "aime24": ("HuggingFaceH4/aime_2024", None, BOXED),
            "aime25": ("math-ai/aime25", None, BOXED), "amc23": ("math-ai/amc23", None, BOXED)}
# A value may stand in columns of these names; the first match wins.
QUESTION = {"question": ("question_concat", "question", "problem", "prompt")}
SOLUTION = {"answer": ("answer", "answer_value", "final_answer"),
            "solution": ("solution", "answer_cot", "rationale"),
            "level": ("level",)}


@dataclass
class Problem:
    """One task: `solution` is the annotated reasoning, ends in the answer, and may be empty."""

    question: str
    answer: str
    solution: str = ""
    level: str = ""  # difficulty, where the data has one; evaluation reports it apart
    prompt: tuple = ()  # token ids, filled in by `encode_prompts`


def read_rows(cfg, name, split, flag):
    """The rows that `name` stands for, as a list of dicts: tiny (`split` is a name in tiny_files),
    another built-in name, a Hub id or a local file. Data with a single split has `train` only;
    None where `split` is another."""
    file = TINY_FOLDER / cfg.tiny_files[split] if name == "tiny" else Path(name)
    if file.suffix in (".jsonl", ".json"):
        return read_json(file, f"{flag} {name}") if split == "train" or name == "tiny" else None
    if file.suffix != ".parquet":
        find_hub()
    import datasets  # after find_hub: it reads the offline switch on import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_id, config, _ = HUB_DATA.get(name, (name, None, None))
    try:
        parts = (datasets.load_dataset("parquet", data_files=name) if file.suffix == ".parquet"
                 else datasets.load_dataset(hub_id, config))
    except Exception as e:  # many libraries' errors, all bad input here
        fail(f"{flag} {name}: no built-in name, file or Hub id that could be read (see --help): "
             f"{str(e.__cause__ or e):.300}")
    parts = parts if "train" in parts else {"train": next(iter(parts.values()))}
    return list(parts[split]) if split in parts else None


def read_json(path, what):
    """Rows of a JSON lines file, or of a JSON file, a list of objects."""
    rows, number = [], 0
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [text] if text.lstrip().startswith("[") else text.split("\n")
        for line in lines:
            number += 1
            value = json.loads(line) if line.strip() else []
            value = value if isinstance(value, list) else [value]
            if not all(isinstance(row, dict) for row in value):
                raise ValueError("it is not an object with a value for every column")
            rows += value
    except (OSError, ValueError, RecursionError) as e:
        fail(f"{what}: row {number} cannot be read: {e}")
    return rows or fail(f"{what}: no rows in it")


def text_columns(rows, what, needed, optional=None):
    """The texts in the columns of rows. `needed` and `optional` map a name to the columns that may
    hold it: the first match wins, upper and lower case alike. -> a list of {name: text}, "" where a
    value is missing. Ends the program where a needed column is missing, or is not of text."""
    have = {c.lower(): c for row in rows for c in row}
    column = {name: next((have[c] for c in names if c in have), None)
              for name, names in (needed | (optional or {})).items()}
    for name in needed:
        if column[name] is None:
            fail(f"{what}: no {name} column; it needs one of {needed[name]}, but has {[*have]}")
    texts = []
    for number, row in enumerate(rows, 1):
        values = {name: row.get(c) for name, c in column.items()}
        if not all(isinstance(x, str | int | float | None) for x in values.values()):
            fail(f"{what}: row {number} has neither text nor a number in {[*column.values()]}")
        texts.append({k: "" if x is None else str(x).strip() for k, x in values.items()})
    return texts


def to_problems(rows, what):
    """Dicts -> Problems. The answer may stand in its own column or at the end of the solution."""
    problems = []
    for row in text_columns(rows, what, QUESTION, SOLUTION):
        answer, solution = row["answer"], row["solution"]
        marked = extract_answer(answer or solution)
        if marked:  # the answer stands at the end of a solution, as in GSM8K
            answer, solution = marked, solution or answer
        solution = re.sub(r"<<[^<>]*>>", "", solution)  # GSM8K's calculator marks
        if row["question"] and answer:
            problems.append(Problem(row["question"], answer, solution, row["level"]))
    return problems or fail(
        f"{what}: no row has both a question and an answer; answers are looked for in "
        f"{SOLUTION['answer'] + SOLUTION['solution']}, and it has {tuple(rows[0])}")


def load_problems(cfg):
    """-> (training problems, held-out problems); the two share no question."""
    def load(flag, split):
        name = getattr(cfg, flag)
        rows = read_rows(cfg, name, split, f"--{flag}")
        return rows and to_problems(rows, f"--{flag} {name}")

    train = load("dataset", "train")
    if cfg.eval_dataset:
        held_out = load("eval_dataset", "test") or load("eval_dataset", "train")
    else:
        held_out = load("dataset", "test")
    if held_out is None:
        random.Random(0).shuffle(train)  # not cfg.seed: every seed holds out the same rows
        held_out = train[:min(200, len(train) // 5)]
    asked = {p.question for p in held_out}
    train, rows = [p for p in train if p.question not in asked], len(train)
    print(f"{cfg.dataset}: {len(train)} of {rows} problems to train on, {len(held_out)} held out")
    if not train or not held_out:
        fail(f"--dataset {cfg.dataset}: no problem left to {'evaluate' if train else 'train'} on")
    return train, held_out[:cfg.eval_size or None]


def encode_prompts(problems, model, tok, instruction, max_new_tokens, what):
    """Renders every question into `problem.prompt` and drops those too long for the context."""
    ids = encode_questions(tok, [f"{p.question}\n{instruction}".strip() for p in problems])
    for p, prompt in zip(problems, ids):
        p.prompt = tuple(prompt)
    context = getattr(model.config, "max_position_embeddings", math.inf)
    kept = [p for p in problems if len(p.prompt) + max_new_tokens <= context]
    if len(kept) < len(problems):
        (print if kept else fail)(f"{what}: {len(problems) - len(kept)} of {len(problems)} prompts "
                                  f"+ {max_new_tokens} tokens exceed the context of {context}")
    return kept


def set_up(cfg, template=None):
    """Seeds, loads, renders: -> policy, tokenizer, training problems, held-out problems, and the
    instruction that follows their questions: what the model was trained with, else the form of the
    final answer, as the solutions have it. `template`: the paper's own prompt, a chat template,
    which takes the place of both unless the model was trained with another."""
    set_seed(cfg.seed)
    train, held_out = load_problems(cfg)
    policy, tok = load_model(cfg.model, cfg, cfg.lora)
    form = BOXED if any("\\boxed" in p.solution for p in train) else HASHES
    form = HUB_DATA[cfg.dataset][-1] if cfg.dataset in HUB_DATA else form
    instruction = trained_prompt(policy, "instruction", "" if template else form)
    if template and trained_prompt(policy, "instruction") is None:
        tok.chat_template = template
    train, held_out = (
        encode_prompts(problems, policy, tok, instruction, cfg.max_new_tokens, what)
        for problems, what in ((train, "training"), (held_out, "evaluation")))
    return policy, tok, train, held_out, instruction


def defuse(tok, text):
    """The text with a space inside whatever the tokenizer would read as one of its special tokens:
    what stands in data or in a response never becomes a control token."""
    text = text.encode(errors="replace").decode()  # no tokenizer takes half a surrogate pair
    special = {t.content for t in tok.added_tokens_decoder.values() if t.special}
    for token in {t.strip() for t in special | {*tok.all_special_tokens}}:
        while len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_questions(tok, questions):
    """Each as one user turn -> ids: through the chat template if there is one (it brings its own
    BOS), else as plain text, with BOS where the tokenizer adds one and without any EOS."""
    questions = [defuse(tok, q) for q in questions]
    if tok.chat_template:
        chats = [[{"role": "user", "content": q}] for q in questions]
        texts = tok.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return tok(texts, add_special_tokens=False).input_ids
    rows = tok([f"{q}\n" for q in questions]).input_ids
    return [ids[:-1] if ids[-1] == tok.eos_token_id else ids for ids in rows]


def take(problems, number, state, seed):
    """The next `number` of endless problems, reshuffled every epoch. Moves state["position"] on,
    which is all that a resumed run needs."""
    taken = []
    while len(taken) < number:
        epoch, start = divmod(state["position"], len(problems))
        order = list(range(len(problems)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen = order[start:start + number - len(taken)]
        taken += [problems[i] for i in chosen]
        state["position"] += len(chosen)
    return taken


# ------------------------------------------------------------------------------------- sampling

ROWS = 256  # responses that are decoded at a time [ours]
KV_TOKENS = 2**16  # tokens in the KV cache: 4 GB for a model of 7B, 57 kB per token [ours]
DRAW_FLOATS = 2**20  # logits that are drawn from at a time: what a CPU's cache holds [ours]


@dataclass
class Sample:
    """A prompt with one response. `tokens` include EOS when `finished`."""

    prompt: tuple
    tokens: list
    text: str
    finished: bool
    logps: list = field(default_factory=list)  # of the sampler, per token
    entropy: float = 0.0  # of the sampler's distributions, summed over the tokens, in nats


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


@torch.no_grad()  # in inference mode autocast would keep no casts
def sample(model, tok, prompts, group, max_new_tokens, temperature, generator=None):
    """`group` responses to each prompt from softmax(logits / temperature), nothing else applied
    (but see `suppress`); temperature 0 is greedy. -> B*G Samples; sample i is of prompt i // group.
    Prompts of similar length are decoded together, as many as ROWS and KV_TOKENS allow."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max_new_tokens + max(map(len, prompts), default=0)
    size = max(1, min(ROWS, KV_TOKENS // longest) // group)
    starts, done, was_training = range(0, len(order), size), {}, model.training
    model.eval()  # activation checkpointing switches the KV cache off in training mode
    with autocast(model):  # one for all tokens: it casts each weight once
        for start in tqdm(starts, "sampling", leave=False, disable=len(starts) < 10 or None):
            chosen = order[start:start + size]
            responses = decode(causal_lm(model), tok, [prompts[i] for i in chosen], group,
                               max_new_tokens, temperature, generator)
            done |= {i: responses[n * group:(n + 1) * group] for n, i in enumerate(chosen)}
    model.train(was_training)
    return [s for i in range(len(prompts)) for s in done[i]]


def decode(lm, tok, prompts, group, max_new_tokens, temperature, generator):
    """The decoding loop. Each prompt is prefilled once and its KV cache shared by its group; rows
    that have ended are dropped once they are a quarter of the batch."""
    n, width = len(prompts) * group, max(map(len, prompts))
    new = partial(torch.zeros, device=lm.device)
    # left-padded, so that all rows go on at the same column
    ids = torch.tensor([[tok.pad_token_id] * (width - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ids, mask, padded = ids.to(lm.device), mask.to(lm.device), not bool(mask.all())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=lm.config)
    logits = lm(input_ids=ids, attention_mask=mask, position_ids=position, cache=cache,
                use_cache=True, logits_to_keep=1).logits[:, -1]
    row = torch.arange(n, device=lm.device)  # which response each row of the batch is
    cache.batch_select_indices(row // group)
    logits, mask, position = (x[row // group] for x in (logits, mask, position[:, -1:]))
    tokens, logps = new(n, max_new_tokens, dtype=torch.long), new(n, max_new_tokens)
    entropy, length = new(n), new(n, dtype=torch.long)
    alive = new(n, dtype=torch.bool).logical_not()  # rows of the batch that have not ended
    stop = torch.tensor(lm.generation_config.eos_token_id, device=lm.device)
    size = max(1, DRAW_FLOATS // logits.shape[1])
    for t in range(max_new_tokens):
        token, logp, h = map(torch.cat, zip(*(
            draw(suppress(lm, part), temperature, generator) for part in logits.split(size))))
        tokens[row, t], logps[row, t] = token, logp
        entropy[row] += h * alive
        length[row] += alive
        alive = alive & ~torch.isin(token, stop)
        left = int(alive.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= 0.75 * len(row):
            keep = alive.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            row, mask, position, token, alive = (
                x[keep] for x in (row, mask, position, token, alive))
        position, mask = position + 1, torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = lm(input_ids=token[:, None], attention_mask=mask if padded else None,
                    position_ids=position, cache=cache, use_cache=True).logits[:, -1]
    ids, logps = ([x[:k] for x, k in zip(rows.tolist(), length.tolist())]
                  for rows in (tokens, logps))
    texts, ends = tok.batch_decode(ids, skip_special_tokens=True), set(stop.tolist())
    return [Sample(tuple(prompts[i // group]), ids[i], texts[i], ids[i][-1] in ends, logps[i], h)
            for i, h in enumerate(entropy.tolist())]


def suppress(lm, logits):
    """(n, V) -> float32, with -inf for what a script put in generation_config.suppress_tokens: the
    policy never draws those tokens, so they have no part in its distribution."""
    tokens, logits = lm.generation_config.suppress_tokens, logits.float()
    if not tokens:
        return logits
    return logits.index_fill(1, torch.tensor(tokens, device=logits.device), -math.inf)


def draw(logits, temperature, generator=None):
    """(n, V) -> token, its log-probability, entropy, (n,) each. One uniform number per row looked
    up in the cumulative distribution: torch.multinomial draws V of them."""
    logp = torch.log_softmax(logits / (temperature or 1.0), -1)
    p = logp.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = p.cumsum(-1)
        u = torch.rand(len(p), 1, device=p.device, generator=generator).clamp(max=1 - 1e-6)
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1)
        token = token.clamp(max=p.shape[1] - 1)  # beyond it if the logits are nan
    return token, logp.gather(1, token[:, None]).squeeze(1), entropy_of(p, logp)


def entropy_of(p, logp):
    """- sum p log p over the last axis, in nats. A p of 0 adds 0, where 0 * -inf would be nan."""
    return -(p * logp.clamp(min=-200)).sum(-1)


# ---------------------------------------------------------------------------- log-probabilities

HEAD_FLOATS = 2**26  # logits that exist at a time: 256 MiB in float32


def collate(samples, device):
    """-> ids (n, L), mask (n, L), right-padded. mask is 1 on response tokens, EOS included, and
    is built from positions: pad and EOS may be the same id. The pad id itself never matters."""
    ids = [torch.tensor([*s.prompt, *s.tokens]) for s in samples]
    mask = [torch.tensor([0.0] * len(s.prompt) + [1.0] * len(s.tokens)) for s in samples]
    return tuple(pad_sequence(x, batch_first=True).to(device) for x in (ids, mask))


def micro_batches(samples, cfg, only=None, together=1):
    """Samples, or those with the indices `only`, in parts for a forward pass: rows of similar
    length, at most cfg.micro_tokens padded tokens each. `together` samples in a row, such as chosen
    and rejected, are never parted. -> for each part: indices, a list; ids, mask, see `collate`"""
    only = list(range(len(samples)) if only is None else only)
    units = [only[i:i + together] for i in range(0, len(only), together)]
    size = [max(len(samples[i].prompt) + len(samples[i].tokens) for i in unit) for unit in units]
    parts = []
    for length, unit in sorted(zip(size, units), key=lambda pair: pair[0]):
        if not parts or (len(parts[-1]) + together) * length > cfg.micro_tokens:
            parts.append([])
        parts[-1].extend(unit)
    for rows in parts:
        yield rows, *collate([samples[i] for i in rows], cfg.device)


def hidden_states(model, ids):
    """What the LM head turns into logits: column t predicts token t + 1. (n, L) -> (n, L, H). Rows
    are right-padded, so causal attention alone keeps padding out of every response."""
    with autocast(model):
        return causal_lm(model).base_model(input_ids=ids, use_cache=False).last_hidden_state


def response_logps(model, ids, mask, temperature, with_entropy=False, hidden=None):
    """log pi(ids[:, t] | ids[:, <t]) and, if asked for, the entropy of that distribution -> 2 x
    (n, L), float32, 0 outside `mask`. Only masked positions reach the LM head, in chunks whose
    logits are made again in the backward pass, so that (n, L, V) never exists. `hidden` are the
    `hidden_states` of `ids`, where they are at hand."""
    hidden = hidden_states(model, ids) if hidden is None else hidden
    row, column = mask[:, 1:].nonzero(as_tuple=True)
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    dtype = getattr(lm, "compute_dtype", head.weight.dtype)
    weight, bias = head.weight.to(dtype), getattr(head, "bias", None)  # once, not for every chunk
    bias = None if bias is None else bias.to(dtype)

    def score(hidden, target):
        logits = torch.nn.functional.linear(hidden.to(dtype), weight, bias)
        logp = torch.log_softmax(suppress(lm, logits) / temperature, -1)
        entropy = entropy_of(logp.exp(), logp) if with_entropy else torch.zeros_like(logp[:, 0])
        return logp.gather(1, target[:, None]).squeeze(1), entropy

    size = max(1, HEAD_FLOATS // lm.config.vocab_size)
    chunks = zip(hidden[row, column].split(size), ids[row, column + 1].split(size))
    scores = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    blank = torch.zeros(mask.shape, device=mask.device)
    return tuple(blank.index_put((row, column + 1), torch.cat(x)) for x in zip(*scores))


@torch.no_grad()
def batch_logps(model, samples, cfg, temperature=None):
    """`response_logps` of any number of samples without gradient, at cfg.temperature unless told
    otherwise. -> (N, L)"""
    length = max(len(s.prompt) + len(s.tokens) for s in samples)
    out = torch.zeros(len(samples), length, device=cfg.device)
    for rows, ids, mask in micro_batches(samples, cfg):
        logp, _ = response_logps(model, ids, mask, temperature or cfg.temperature)
        out[rows, :ids.shape[1]] = logp
    return out


def reference_logps(model, reference, samples, cfg):
    """`batch_logps` under the reference policy. -> (N, L)"""
    with reference_policy(model, reference) as ref:
        return batch_logps(ref, samples, cfg)


def mismatch(logp, mask, samples):
    """|log-probability under the trainer - under the sampler| of each token that was sampled: what
    rounding alone makes of the same weights. logp, mask: (n, L) of n samples -> 1-d"""
    rows = [i for i, s in enumerate(samples) if s.logps]  # no policy sampled the others
    sampler = torch.tensor([x for i in rows for x in samples[i].logps])
    return (logp[rows][mask[rows] > 0].detach().cpu() - sampler).abs()


# -------------------------------------------------------------------------------------- answers

UNIT = r"(?!(?i:and|to)\b|.*\b(?i:or|not)\b)[a-zA-Z]{2}[a-zA-Z .]*"  # no second candidate
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
EXPONENT = r"\{(?:[^{}]|\{[^{}]*\})*\}|\([^()]*\)|\\circ|\d+|[a-zA-Z]"
LATEX_SECONDS = 3  # for a comparison, which usually takes hundredths of a second [ours]


def extract_answer(text):
    """The final answer: what follows the last `\\boxed{`, `####` at the beginning of a line, `the
    answer is` or `Answer:`; None without one. What follows #### or a phrase may be a heading or a
    remark (`#### Check`, `the answer is right`): unless it is a number or a LaTeX expression, any
    box comes before it, and #### before a phrase."""
    marks, opened = [], []  # marks: (rank, place, answer)
    for m in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if m[0] != "}":
            opened.append(m.span() if len(m[0]) > 1 else None)
        elif opened and (box := opened.pop()) and text[box[1]:m.start()].strip():
            marks.append((2, box[0], text[box[1]:m.start()]))
    for m in re.finditer(r"^[ \t>*_]*####(?!#)[ \t]*([^\n]+)", text, re.M):
        marks.append((2 if is_answer(m[1]) else 1, m.start(1), m[1]))
    for m in re.finditer(r"\banswer\**(?: is:?|:)\s*(?!\\boxed|####)(?=[^\n])", text, re.I):
        said = re.split(r"\n|\.(?:\s|$)", text[m.end():m.end() + 500])[0]  # the rest of a sentence
        marks.append((2 if is_answer(said) else 0, m.end(), said))
    return marks and max(marks)[2].strip(" \t\n<>*") or None


def is_answer(text):
    """Is it surely an answer: a number, or nothing but an expression in dollars or \\boxed?"""
    text = text.strip(" \t<>*.")
    latex = re.fullmatch(r"\$+[^$]+\$+|\\\(.+\\\)|\$*\\boxed.*", text)
    return as_number(text) is not None or latex is not None


def as_number(text):
    """`1,080`, `$18`, `5 apples`, `50%`, `3/4`, `1 1/2`, `x = 5` -> a Fraction; else None."""
    text = re.sub(r"\\!\s*", "", text).replace("{,}", ",").replace("\u2212", "-")
    text = text.replace("\\$", "$").replace("\\%", "%")
    m = len(text) <= 100 and re.fullmatch(
        rf"(?:[a-zA-Z]\s*=\s*)?(-?)[$€£]?\s*\+?(?:({NUMBER})\s*/\s*(\d+)|(-?)(\d+)\s+(\d+)/(\d+)|"
        rf"({NUMBER}))(?:\s*(?:%|°|{UNIT})|\s+[a-zA-Z])?\.?", text.strip())
    if not m:
        return None
    minus, top, bottom, sign, whole, part, parts, plain = m.groups()
    try:
        if whole:
            value = int(whole) + Fraction(int(part), int(parts))
        else:
            value = Fraction((top or plain).replace(",", "")) / int(bottom or 1)
    except ZeroDivisionError:
        return None
    return -value if minus or sign else value


@functools.lru_cache(10**5)
def same_answer(given, truth):
    """Equality of two final answers: as numbers, as texts, else as LaTeX by math-verify."""
    if given is None or truth is None:
        return False
    if max(len(given), len(truth)) > 500:  # the patterns below would take long
        return given.split() == truth.split()
    given, truth = (re.sub(r"^(\$\$?|\\\(|\\\[)\s*(.+?)\s*(\1|\\\)|\\\])\.?$", r"\2", x.strip())
                    for x in (given, truth))  # $18$, \(18\)
    a, b = as_number(given), as_number(truth)
    if a is not None and b is not None:
        return a == b
    tight = [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", x) for x in (given, truth)]
    bases = [re.findall(r"\d_\{?(\d+)", x) for x in (given, truth)]  # math-verify ignores them
    if tight[0] == tight[1] or not re.search(r"[\\^_{}()\[\]]", given + truth):
        return tight[0] == tight[1]
    if all(bases) and bases[0] != bases[1] or unsafe(given) or unsafe(truth):
        return False
    return same_latex(given, truth)


def same_latex(given, truth):
    """Equality of two expressions by math-verify; what takes it LATEX_SECONDS is not equal."""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def late(*_):
        raise TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    alarm = hasattr(signal, "setitimer")  # Windows has none
    before = alarm and signal.signal(signal.SIGVTALRM, late)
    try:  # again every half second: an alarm inside a destructor is lost
        alarm and signal.setitimer(signal.ITIMER_VIRTUAL, LATEX_SECONDS, 0.5)
        values = [parse(f"\\boxed{{{x}}}", [LatexExtractionConfig()], "no_fallback",
                        parsing_timeout=None) for x in (truth, given)]
        return all(values) and verify(*values, timeout_seconds=None)
    except TimeoutException:
        return False
    finally:
        alarm and signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        alarm and signal.signal(signal.SIGVTALRM, before)


def unsafe(text):
    """Could math-verify take a part of the text for the whole, or could a number in it be too large
    for any time limit, which cannot interrupt the power of two integers? So: other mathematics
    inside, many brackets, factorials and the like, towers of exponents, exponents that are large.
    Those of brackets count together, as in ((9^9)^9)^9."""
    text, power = re.sub(r"\\(?:left|right|[!,;:])|\s", "", text), 1
    for bracket, exponent in re.findall(rf"([)}}\]]?)\^({EXPONENT}|)", text):
        n = math.prod(int(x) or 1 for x in re.findall(r"\d+", exponent))
        power = power * n if bracket else max(power, n)
        if not exponent or "^" in exponent or power > (99 if bracket else 10**4):
            return True
    return bool(re.search(r"\$|(?<!\\)\\[(\[]|!|binom|choose|Gamma|(?:[({\[][^)}\]]*){10}", text))


# ----------------------------------------------------------------------------------- evaluation


def evaluate(model, tok, problems, cfg, correct):
    """Greedy accuracy on held-out problems, overall and per level; with cfg.eval_samples = k also
    mean@k, pass@k and maj@k of k samples to each. `correct(text, problem)` -> bool. -> the numbers;
    the B*k Samples; which are correct. They are drawn from a generator of their own, so that
    evaluating never changes training."""
    def graded(k, temperature):
        samples = sample(model, tok, [p.prompt for p in problems], k, cfg.max_new_tokens,
                         temperature, torch.Generator(cfg.device).manual_seed(1234))
        return samples, [correct(s.text, problems[i // k]) for i, s in enumerate(samples)]

    right, k = graded(1, 0)[1], cfg.eval_samples
    result = {"accuracy": statistics.fmean(right)}
    for level in sorted({p.level for p in problems if p.level}):
        result[f"accuracy/level{level}"] = statistics.fmean(
            r for r, p in zip(right, problems) if p.level == level)
    if not k:
        return result, [], []
    samples, right = graded(k, cfg.temperature)
    solved = [any(right[i:i + k]) for i in range(0, len(right), k)]
    result |= {f"mean@{k}": statistics.fmean(right), f"pass@{k}": statistics.fmean(solved),
               f"maj@{k}": vote(samples, right, k)}
    return result, samples, right


def vote(samples, right, k, weights=None):
    """The share of problems whose answer with the most votes, the summed weights of the k samples
    that give it, is correct. Of equal sums the larger class wins; no answer is no vote."""
    won, weights = [], weights or [1.0] * len(samples)
    answers = [extract_answer(s.text) for s in samples]
    for part in (range(i, i + k) for i in range(0, len(samples), k)):
        same = {i: [j for j in part if same_answer(answers[i], answers[j])] for i in part}
        best = max(part, key=lambda i: (sum(weights[j] for j in same[i]), len(same[i])))
        won.append(right[best])
    return statistics.fmean(won)


# ----------------------------------------------------------------------------------- run folder

LOGS = ("metrics.jsonl", "samples.jsonl")
SAMPLING_METRICS = {  # what `sampling_statistics` tells, and the script's policy/mismatch
    "reward/accuracy": "share of sampled responses that are correct: the number to watch",
    "groups/all_wrong": "share of sampled groups without a correct response",
    "groups/all_correct": "share of sampled groups without a wrong response; in groups of two "
                          "or more there is no signal in them",
    "policy/entropy": "of the sampling distribution, nats per sampled token; 0 is collapse",
    "policy/mismatch": "mean |sampler's - trainer's log-prob| of a token: rounding error",
    "sample/length": "mean tokens per sampled response",
    "sample/truncated": "share of sampled responses cut off by --max_new_tokens",
    "sample/tokens": "tokens sampled since the start, responses never trained on included",
}


def sampling_statistics(samples, right, group, state):
    """SAMPLING_METRICS of B*G samples; right: which are correct. Counts their tokens in
    state["tokens"]."""
    groups = [right[i:i + group] for i in range(0, len(right), group)]
    tokens = [len(s.tokens) for s in samples]
    state["tokens"] += sum(tokens)
    return {"reward/accuracy": right, "groups/all_wrong": [not any(g) for g in groups],
            "groups/all_correct": [all(g) for g in groups],
            "policy/entropy": sum(s.entropy for s in samples) / sum(tokens),
            "sample/length": tokens, "sample/truncated": [not s.finished for s in samples],
            "sample/tokens": state["tokens"]}


def product(path, make):
    """What is made once: `make(temporary path)` writes a file or folder, which then gets the name
    `path`; it is whole or not there, and where it is there nothing is made. -> path"""
    path, new = Path(path), Path(f"{path}.new")
    if not path.exists():
        shutil.rmtree(new, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(new)
        new.rename(path)
    return path


def write_rows(path, rows, mode="w"):
    """Writes a JSON lines file, or with mode "a" adds to it."""
    with open(path, mode) as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def one_line(main):
    """Decorates `main`: a full disk or GPU ends the program with one line that says what to do."""
    @functools.wraps(main)
    def run(*args):
        try:
            return main(*args)
        except torch.OutOfMemoryError as e:
            fail(f"{e!s:.200}: give --lora, or a smaller --micro_tokens or --max_new_tokens")
        except Exception as e:  # torch, safetensors and tokenizers hide an OSError
            if isinstance(e, OSError) or "No space left" in f"{e} {e.__context__}":
                fail(f"{e!s:.200}; what is in the run folder is whole, --resume goes on from it")
            raise
    return run


class Run:
    """The run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, and at the end
    curves.png, summary.json and model/. `metrics` maps every loggable name (shell wildcards
    allowed) to a sentence; `curves` the title of a panel to the names drawn in it. `state` is a
    dict of plain values that checkpoints hold; state["step"] counts the steps."""

    def __init__(self, cfg, script, metrics, curves):
        self.cfg, self.script, self.metrics, self.curves = cfg, script, metrics, curves
        self.folder, self.started = Path(cfg.out), time.perf_counter()
        self.values, self.in_step, self.stopping = {}, False, False
        if not cfg.resume and (self.folder / LOGS[0]).exists():
            fail(f"--out {cfg.out} holds a run: give --resume {cfg.out}, or another --out")
        git = shutil.which("git") and subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=TINY_FOLDER.parent,
            capture_output=True, text=True).stdout.strip()
        about = {"script": script, "config": asdict(cfg), "commit": git or "unknown",
                 "versions": {m.__name__: m.__version__ for m in (torch, transformers)}}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.new").write_text(json.dumps(about, indent=2))
        (self.folder / "config.new").replace(self.folder / "config.json")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        print(f"{script}: " + " ".join(f"{k}={v}" for k, v in asdict(cfg).items() if v != ""))

    def ask_to_stop(self, *_):
        """SIGINT and SIGTERM end the program after the step that is being trained, and its
        checkpoint; a second one, and one between the steps, ends it at once."""
        if self.in_step and not self.stopping:
            self.stopping = True
            return print("\nstopping after this step (once more: at once)", file=sys.stderr)
        print(f"\nstopped; what was not finished will be made anew; go on with: python "
              f"{self.script}.py --resume {shlex.quote(str(self.folder))}", file=sys.stderr)
        raise SystemExit(130)

    def add(self, values):
        """Numbers of the step, by name: tensors, lists or single ones. What `end_step` logs is the
        mean of all that was added under a name."""
        for name, x in values.items():
            if not any(fnmatch(name, known) for known in self.metrics):
                raise KeyError(f"{name} is not declared in METRICS")
            x = x.detach().cpu() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=float)
            self.values.setdefault(name, []).append(x.double().flatten())

    def log(self):
        """A row of metrics.jsonl: the means of what was added. Each must be finite."""
        values = {name: torch.cat(x) for name, x in self.values.items()}
        row = {"step": self.state["step"]}
        row |= {name: x.mean().item() for name, x in values.items() if len(x)}
        if bad := {name: x for name, x in row.items() if not math.isfinite(x)}:
            fail(f"step {row['step']}: {bad}; --resume goes on from the last checkpoint")
        self.values = {}
        write_rows(self.folder / "metrics.jsonl", [row], "a")

    def evaluate(self):
        """Adds and prints what the script's evaluation finds; of numbers per level accuracies."""
        result, step = self.test(), self.state["step"]
        self.state |= {"after": result, "evaluated": step}
        self.add({f"eval/{k}": v for k, v in result.items()})
        shown = {k: v for k, v in result.items() if "/" not in k or k.startswith("accuracy/")}
        tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))

    def start(self, model, opt, test, **state):
        """-> the state to go on from: a checkpoint's, see `restore`, or a new one after its
        `before` evaluation. `model` and `opt` are what checkpoints are of; test() -> a dict."""
        self.model, self.opt, self.test = model, opt, test
        self.state = {"step": 0, "position": 0, "tokens": 0, "train_cpu_seconds": 0.0, **state}
        if not (self.cfg.resume and self.restore()):
            self.evaluate()
            self.state["before"] = self.state["after"]
            self.log()
        return self.state

    def steps(self, end, patient=True):
        """Counts state["step"] up to `end`. `patient`: a signal waits for the end of the step."""
        self.end = end
        for step in tqdm(range(self.state["step"] + 1, end + 1), self.script, disable=None):
            self.state["step"], self.in_step, self.step_started = step, patient, time.process_time()
            yield step

    def end_step(self, examples=()):
        """Logs a step; evaluates, checkpoints and draws where it is due."""
        cfg, step, last = self.cfg, self.state["step"], self.state["step"] == self.end
        self.state["train_cpu_seconds"] += time.process_time() - self.step_started
        if last or cfg.eval_every and step % cfg.eval_every == 0:
            self.evaluate()
        self.log()
        write_rows(self.folder / "samples.jsonl", [{"step": step, **x} for x in examples], "a")
        if last or self.stopping or cfg.save_every and step % cfg.save_every == 0:
            self.save()
            self.draw_curves()
        self.in_step = False
        if self.stopping:
            self.ask_to_stop()

    def save(self):
        """checkpoint/step_<n>.pt, under another name until it is whole: trained weights, optimizer,
        state, random numbers, and the sizes of the logs, so that later rows can be cut off."""
        self.state["seconds"] = time.perf_counter() - self.started
        saved = {"weights": {n: p.detach() for n, p in trained(self.model)}, "state": self.state,
                 "optimizer": self.opt and self.opt.state_dict(),
                 "rng": (random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all()),
                 "logs": {log: (self.folder / log).stat().st_size for log in LOGS}}
        path = self.folder / "checkpoint" / f"step_{self.state['step']:06d}.pt"
        path.parent.mkdir(exist_ok=True)
        try:
            torch.save(saved, path.with_name("new"))
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"{path} cannot be written: {e}") from e
        path.with_name("new").replace(path)
        for old in sorted(path.parent.glob("step_*.pt"))[:-2]:  # the last two stay
            old.unlink()

    def restore(self):
        """Goes back to the newest checkpoint that can be read: weights, optimizer, state, random
        numbers, sizes of the logs. -> was there one?"""
        saved, paths = None, sorted((self.folder / "checkpoint").glob("step_*.pt"))
        while paths and not saved:
            path = paths.pop()
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if self.model:
                    self.model.load_state_dict(saved["weights"], strict=False)
                if self.opt:
                    self.opt.load_state_dict(saved["optimizer"])
                random.setstate(saved["rng"][0])
                torch.set_rng_state(saved["rng"][1])
                torch.cuda.set_rng_state_all(saved["rng"][2])
                self.state = saved["state"]
            except Exception as e:  # whatever is wrong with the file
                saved = None
                print(f"{path} cannot be used ({e!s:.200}); going on from the one before it")
                if not paths:
                    fail(f"--resume {self.folder}: no checkpoint of it can be used; start anew")
        self.started = time.perf_counter() - self.state.get("seconds", 0)
        for log in [x for x in LOGS if (self.folder / x).exists()]:
            os.truncate(self.folder / log, saved["logs"][log] if saved else 0)
        print(f"resuming {self.folder} after step {self.state['step']}")
        return bool(saved)

    def finish(self, model, tok):
        """model/, curves.png, summary.json, and the before/after table."""
        state, cfg = self.state, self.cfg
        if state["evaluated"] != state["step"]:
            self.evaluate()
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        product(self.folder / "model", lambda to: save_model(to, model, tok))
        self.draw_curves()
        seconds, before, after = time.perf_counter() - self.started, state["before"], state["after"]
        summary = {"script": self.script, "method": cfg.method, "model": cfg.model,
                   "seed": cfg.seed, "steps": state["step"], **state, "seconds": seconds}
        if torch.device(cfg.device).type == "cuda":
            summary["peak_gpu_gb"] = torch.cuda.max_memory_allocated(cfg.device) / 1e9
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2))
        print(f"\n{'held-out':<20}{'before':>8}{'after':>8}")
        for name in after:
            print(f"{name:<20}{before.get(name, math.nan):>8.3f}{after[name]:>8.3f}")
        print(f"\n{state['step']} steps, {seconds:.0f} s; everything is in {self.folder}/")

    def draw_curves(self):
        """curves.png: a panel per entry of `curves`; numbers of training are running means."""
        rows = read_json(self.folder / "metrics.jsonl", "metrics.jsonl")
        logged = sorted({name for row in rows for name in row})
        panels = {title: [name for x in patterns for name in logged if fnmatch(name, x)]
                  for title, patterns in self.curves.items()}
        panels = {title: names for title, names in panels.items() if names}
        fig = Figure(figsize=(4.4 * len(panels), 3.6), layout="tight")
        for ax, title in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
            for name in panels[title]:
                x, y = zip(*((row["step"], row[name]) for row in rows if name in row))
                window = 1 if name.startswith("eval/") else 1 + len(y) // 20
                y = [statistics.fmean(y[max(0, i - window):i]) for i in range(1, len(y) + 1)]
                ax.plot(x, y, marker=".", label=name.split("/", 1)[1].removeprefix("accuracy/"))
            ax.legend(fontsize=8)
            ax.set(title=title, xlabel="step")
            ax.grid(alpha=0.3)
        fig.suptitle(f"{self.script} --method {self.cfg.method}, seed {self.cfg.seed}")
        fig.savefig(self.folder / "curves.png", dpi=110)
