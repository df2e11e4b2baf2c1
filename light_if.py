"""Light-IF: generalizable reasoning via preview and self-checking for instruction following
(AAAI 2026, arXiv:2508.03178).

THE IDEA
    Reasoning models miss constraints because they think lazily: they restate the instruction and
    answer. Light-IF makes them preview every constraint, draft, and check the draft, in five
    stages. RL draws the pattern out of a lazy model, examples of it are filtered, taught to the
    model by an SFT that keeps its entropy, and sharpened by RL with a dense reward and an entropy
    term that is weighted token by token.

THE LOOP                                               code                    source
    A prompts with 1-5 verifiable constraints, hard,   make_prompts, conflict, [abstract]
      easy or passed, by K responses to each             hardness
    B Zero-RL: GRPO, length reward; easy, then hard    reinforce, reward       [readme; code]
    C cold start: responses of its model that are      extract, depth, fluent  [abstract; 2nd]
      correct, deep enough and fluent
    D Entropy-SFT of the first model, on the tokens    fine_tune,              [code]
      with the largest NLL - lambda_H entropy            select_tokens
    E TEA-RL on easy, then on hard prompts:            reinforce
      R = all met + weights of those met                 reward, dense_reward  [code]
      A = (R - mean R) / std R in a group of G           group_advantages      [code]
      dual-clip loss + .001 KL - TEA                     policy_loss, k3_kl    [code]
      TEA: entropy, weighted by a softmax of the         tea_weights,          [code]
      covariance of A and log-probability                tea_coefficients

METHODS  --method    B    C, D       E
         light_if    x    entropy    TEA, length-scaled
         grpo                        GRPO from the first model: what the released scripts run
         sft_grpo         plain      GRPO; the cold start is the first model's own

WHAT IS KNOWN OF THE PAPER
    Of the paper only the abstract could be read. [code] is the official repository,
    Qihoo360/Light-IF; [readme] its README and model cards, [2nd] third-party notes. The released
    code runs plain GRPO with the dense reward: its TEA cannot be reached, its length reward and its
    fluency judge are never used, and it has no code for A, C and evaluation. So, decided here:

    D1  A: 1 to 5 of IFEval's constraints behind a seed instruction, as sentences of our own. Types
        that exclude each other are IFEval's, and a few more; so are arguments that do
    D2  a model whose chat template knows no thinking is asked to think by a line of ours
    D3  IFEval's checkers give the original's verdict, but: sentences are split by a rule, not by
        NLTK's punkt data; words in capitals are found by a rule like its tokenizer's; keywords and
        other arguments are literal text, not regular expressions; a letter that is none (`#`) is
        counted as it is, where IFEval draws one at random; langdetect has a fixed seed
    D4  pass: all K responses are right, easy: some, hard: none, but they meet a constraint
        [2nd: three classes; the limits are ours]. Prompts that some response solved, pass and
        easy, are those that the cold start is sampled from
    D5  weights of the code's table: .10 for what is exact, .05 for a bound, .20 for a forbidden
        letter; types that are not in it likewise, and a list of keywords once
    D6  both stages of RL halve into an easy and a hard part with a reference and an optimizer of
        its own, as the scripts have them [code]; more --steps make the last half longer
    D7  Zero-RL: R = all met + length reward, L_max = --max_new_tokens; the code computes the length
        reward, with 8192, and adds it nowhere
    D8  deep enough: every constraint is named in the thinking before and after the draft, which is
        the longest passage that it shares with the answer
    D9  fluent: a rule on repetition [ours; the code's judge of fluency is never called]. One
        response per draw of a prompt; TRIES bounds the cost
    D10 D starts from the first model, not from Zero-RL's, whose responses it learns from. The
        selection is within each response [code: one per device]; the loss is the mean over the
        selected tokens of a step; 1 % linear warm-up, cosine [code]. --sft none goes on from
        Zero-RL's model
    D11 TEA: the code centres A over a micro-batch, so that a response alone in one has equal
        weights; here over the mini-batch. Weights have no gradient. `released` has a mean of 10/T
        per token, .0012 at the code's 8192 tokens but .2 at 50; `length_scaled` has the same mean
        at any length, by default that .0012 [2nd: .05]
    D12 the loss is a mean over the tokens of the mini-batch [code: of micro-batches, weighted by
        their responses]; groups without contrast stay in, for KL and TEA; no weight decay [code:
        .01]
    D13 the tiny task: eight of IFEval's types on texts of a few words. The model has learned to be
        thorough, and then to be lazy most of the time; what a check observes is written down

SHAPES  B prompts, G responses each, n rows of L columns; R (B, G), A (B*G,), log-probs, entropy H,
        weights w and coefficients (n, L). A constraint is (IFEval's id, its keyword arguments).
RUN     python light_if.py                              # tiny model, CPU, offline, minutes
        python light_if.py --method grpo                # the baseline in the same loop
        python light_if.py --model Qwen3-1.7B           # one CUDA GPU; IFEval is held out
        python light_if.py --model Qwen2.5-7B-Instruct --lora
"""

import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm
from transformers import set_seed

import common
from common import (
    Problem, Run, adamw, arg, as_samples, batch_logps, encode_prompts, fail, frozen_reference,
    generator_of, load_model, micro_batches, mismatch, one_line, parse_config, product, read_json,
    read_rows, reference_logps, response_logps, sample, sampling_statistics, save_model, take,
    text_columns, trained_prompt, update, write_rows,
)

# ------------------------------------------------------------------------------ 1. configuration


@dataclass
class Config(common.Config):
    tiny_files = dict(model="constraints", train="constraints/train.jsonl",
                      test="constraints/test.jsonl")
    positive = (*common.Config.positive, "updates", "pool", "pass_samples", "cold_start",
                "sft_epochs", "sft_batch", "sft_lr", "token_ratio")

    method: Literal["light_if", "grpo", "sft_grpo"] = arg("light_if", "the paper's, or a baseline")
    dataset: str = arg("dolly", "seed instructions: tiny; dolly = databricks/databricks-dolly-15k; "
                                "a Hub id or .jsonl/.json/.parquet file with a column instruction, "
                                "prompt or question; rows in IFEval's layout are taken as they "
                                "are, the first --pool of them")
    eval_dataset: str = arg("", "held-out prompts: tiny; ifeval = google/IFEval, or data in its "
                                "layout: prompt, instruction_id_list, kwargs; default: tiny with "
                                "the tiny model or --dataset tiny, else ifeval")
    # A: prompts
    pool: int = arg(5000, "prompts to synthesise [code: rl/README.md: 5k in stage 1]")
    pass_samples: int = arg(8, "K, responses per prompt that measure its pass rate [ours]")
    # B, C, D
    zero_rl: bool = arg(True, "Zero-RL: the cold start is sampled from a model that has learned "
                              "to check, not from --model itself")
    zero_steps: int = arg(100, "rollout steps of Zero-RL, half easy, half hard prompts [ours]")
    cold_start: int = arg(2000, "examples of the cold start [code: cold-start-2k.json]")
    sft: Literal["entropy", "plain", "none"] = arg(
        "entropy", "Entropy-SFT, cross-entropy of all tokens, or no cold start")
    sft_epochs: int = arg(3, "[code: coldstart/README.md: 3]")
    sft_batch: int = arg(8, "examples per step [ours; code: 1 per device, devices unknown]")
    sft_lr: float = arg(1e-5, "peak of a cosine [code: 1e-5]")
    token_ratio: float = arg(0.8, "rho, share of tokens that Entropy-SFT trains [code: 0.8]")
    entropy_coef: float = arg(0.8, "lambda_H, of the entropy in their selection [code: 0.8]")
    # E, and the loss of B
    reward: Literal["dense", "sparse"] = arg("dense", "all met + weights of those met, or all met")
    tea: Literal["released", "length_scaled", "uniform", "off"] = arg(
        "length_scaled", "token-wise entropy term of TEA-RL (D11)")
    tea_coef: float = arg(10 / 8192, "its strength; what the code's 10 is per token at its 8192 "
                                     "tokens; default with --tea released: 10 [code] (D11)")
    curriculum: bool = arg(True, "easy prompts first, then hard ones; off: always both [code]")
    updates: int = arg(4, "optimizer steps per rollout batch [code: 128 prompts, 32 per step]")
    kl_coef: float = arg(0.001, "of the k3 KL to the policy that a stage began with [code: 0.001]")
    # Other values than in the other scripts.
    steps: int = arg(200, "rollout steps of RL after SFT, half easy, half hard prompts [ours]")
    prompts: int = arg(32, "B, prompts per step [ours, for one GPU; code: 128]")
    max_new_tokens: int = arg(2048, "longest response, in tokens [ours, one GPU; code: 8192]")
    lr: float = arg(5e-6, "AdamW learning rate of RL [code: 5e-6]")
    warmup_steps: int = arg(0, "linear warm-up of the learning rate in each stage [code: none]")
    eval_samples: int = arg(1, "k: responses per held-out prompt, sampled at --temperature, which "
                               "all numbers but `greedy` are from; 0 = greedy only [ours]")


METHODS = {  # what differs from the defaults above
    "light_if": {},
    "grpo": dict(zero_rl=False, sft="none", tea="off"),
    "sft_grpo": dict(zero_rl=False, sft="plain", tea="off"),
}
# The tiny model's own values, used where no flag was given.
TINY = dict(dataset="tiny", eval_dataset="tiny", device="cpu", steps=40, zero_steps=40, pool=1500,
            prompts=32, max_new_tokens=160, micro_tokens=1024, lr=3e-4, updates=1, cold_start=384,
            sft_batch=16, sft_lr=5e-4, eval_size=0, eval_samples=2, eval_every=20, save_every=20,
            grpo=dict(steps=80), sft_grpo=dict(steps=80))
RL_STAGES = {"zero_easy": 1, "zero_hard": 2, "easy": 4, "hard": 5}
SEED_COLUMNS = ("instruction", "prompt", "question")
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 1.0, 1.0, 10.0  # of the ratio [code: recipe/Light-IF/*.sh]
TEA_RELEASED, TEA_CAP = 10.0, 5.0  # strength and cap of the released form [code] (D11)
TEA_BOUND = 100            # cap of the length-scaled form, in means [2nd: the whetstone project]
DRAFT = 300                # words of the answer that are looked for in the thinking [ours]
TRIES = 20                 # responses per example that the cold start may cost [ours]
PIECE = 256                # prompts of stages A and C that are answered at a time
THINK_END = "</think>"
THINK = ("Before you answer, think between <think> and </think>: plan how to meet every "
         "requirement, write a draft, and check the draft against each requirement.")  # (D2)

METRICS = {
    "stage/number": "1, 2 Zero-RL on easy, hard prompts; 3 SFT; 4, 5 RL on easy, hard prompts",
    "reward/mean": "mean reward of the sampled responses",
    "reward/length": "Zero-RL: mean length reward",
    **common.SAMPLING_METRICS,
    "sample/tokens": "tokens sampled in RL since the start; the pass rates and the cold start not",
    "sample/checked": "share of responses whose thinking checks a constraint: it is previewed "
                      "before the draft, and there again after it",
    "sample/depth": "mean share of the constraints that are checked in this sense",
    "policy/loss": "dual-clip loss per token; in the first update of a step minus the mean "
                   "advantage of a token",
    "policy/clipped": "mean share of a response's tokens whose ratio is clipped; 0 with one update",
    "policy/kl": "k3 KL per token to the policy that the stage began with",
    "tea/coefficient": "mean coefficient of a token's entropy",
    "tea/uniformity": "mean 1 / (T sum w^2) of a response's weights: 1 is a plain entropy bonus",
    "sft/loss": "cross-entropy per selected token",
    "sft/nll": "the same of all tokens",
    "sft/entropy": "of the policy, nats per token of the cold start",
    "sft/dropped_nll": "cross-entropy per token that Entropy-SFT leaves out",
    "sft/dropped_entropy": "entropy of the policy at those",
    "optim/grad_norm": "before clipping, the largest of the updates",
    "eval/*": "on held-out prompts, by IFEval's rules: accuracy (all constraints of a prompt met), "
              "accuracy/level<n> (n constraints), prompt_loose, instruction_strict, "
              "instruction_loose, greedy (accuracy of greedy decoding); checked, depth, entropy, "
              "length",
}
CURVES = {
    "held-out accuracy, sampled": ["eval/accuracy", "eval/accuracy/level*"],
    "responses that check": ["eval/checked"],
    "tokens per response": ["eval/length"],
    "entropy, nats per token": ["eval/entropy"],
    "stage": ["stage/number"],
}


def parse(argv):
    cfg = parse_config(Config, "light_if", __doc__, TINY, METHODS, argv)
    cfg.eval_dataset = cfg.eval_dataset or ("tiny" if cfg.dataset == "tiny" else "ifeval")
    if cfg.tea == "released" and cfg.tea_coef == Config.tea_coef:
        cfg.tea_coef = TEA_RELEASED
    if cfg.group < 2:
        fail(f"--group {cfg.group}: an advantage compares responses, so a group needs at least 2")
    if cfg.updates > cfg.prompts:
        fail(f"--updates {cfg.updates}: the batch is split by prompts, so 1 to --prompts")
    if cfg.token_ratio > 1:
        fail(f"--token_ratio {cfg.token_ratio}: is a share, so in (0, 1]")
    return cfg


# ---------------------------------------------------------------------------- 2. task and reward

# 2a. The constraints: IFEval's 25 instruction types.


def compare(count, number, relation):
    """IFEval's two relations: `less than` and `at least`."""
    return count < number if relation == "less than" else count >= number


def occurrences(keyword, text):
    """How often a keyword stands in the text, in any case, inside words too (D3)."""
    return len(re.findall(re.escape(keyword.strip()), text, re.I))


def has_word(word, text):
    """Does it stand in the text, in any case, between two word boundaries?"""
    return bool(re.search(rf"\b{re.escape(word)}\b", text, re.I))


def language_is(text, language):
    """langdetect's verdict, made deterministic; a text without any letter passes, as in IFEval."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|etc|e\.g|i\.e|"
                          r"a\.m|p\.m|No|Fig|U\.S|Ph\.D)\.$")


def sentences(text):
    """Pieces that end in . ! or ? before a space, but not in an abbreviation (D3)."""
    found, goes_on = [], False
    for piece in re.split(r"(?<=[.!?])[\"'\u201d\u2019)\]*_]*\s+", text.strip()):
        if goes_on:
            found[-1].append(piece)
        elif piece:
            found.append([piece])
        goes_on = bool(found) and ABBREVIATION.search(piece)
    return [" ".join(pieces) for pieces in found]


def words(text):
    """What IFEval counts as words."""
    return re.findall(r"\w+", text)


def capital_words(text):
    """Words all in capitals. `WELL-KNOWN` is one, `DON'T` two, as for the Penn Treebank (D3)."""
    text = re.sub(r"(?i)(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)", r" \1", text)
    return [w for w in re.findall(r"[\w'][\w'./-]*", text) if w.isupper()]


def paragraphs(text, num_paragraphs):
    """`***` stands between exactly so many paragraphs; only the outermost may be blank."""
    pieces = [bool(p.strip()) for p in re.split(r"\s?\*\*\*\s?", text)]
    return all(pieces[1:-1]) and sum(pieces) == num_paragraphs


def nth_begins(text, num_paragraphs, nth_paragraph, first_word):
    """So many paragraphs between blank lines, and the n-th begins with the word."""
    pieces = text.split("\n\n")
    full = sum(bool(p.strip()) for p in pieces)
    if nth_paragraph > full or not pieces[nth_paragraph - 1].strip():
        return False
    word = pieces[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split("[.,?!'\"]", word)[0].lower()
    return full == num_paragraphs and word == first_word.lower()


def postscript(text, postscript_marker):
    """The marker anywhere; P.S. and P.P.S may have a space between their letters."""
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, re.escape(marker)), text, re.I))


def highlights(text):
    """How many `*parts*` and `**parts**` are not blank."""
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    return (sum(bool(x.strip("*").strip()) for x in single)
            + sum(bool(x[2:-2].strip()) for x in double))


def bullets(text):
    """How many lines begin with `*`, not followed by another one, or with `-`."""
    text = re.sub(r"\n\s*\n", "\n\n", text)  # long runs of blank lines would take long
    return sum(len(re.findall(p, text, re.M)) for p in (r"^\s*\*[^*].*$", r"^\s*-.*$"))


def has_title(text):
    """Something between the first `<<` and the last `>>` of a line."""
    ends = [(line, line.find("<<"), line.rfind(">>")) for line in text.split("\n")]
    return any(line[a:b + 2].lstrip("<").rstrip(">").strip() for line, a, b in ends if 0 <= a < b)


def is_json(text):
    """JSON, in a markdown fence or without."""
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip())
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def two_responses(text):
    """`******` between exactly two different responses."""
    pieces = [p.strip() for p in text.split("******")]
    full = [p for p in pieces if p]
    return all(pieces[1:-1]) and len(full) == 2 and full[0] != full[1]


@dataclass(frozen=True)
class Kind:
    """One of IFEval's instruction types."""

    check: Callable   # (text, **kwargs) -> bool
    request: str      # how a synthesised prompt asks for it [ours]
    cue: str          # a regular expression that finds it in a thinking block [ours]
    weight: float     # of the dense reward (D5)
    draw: Callable    # (rng, seed instruction) -> kwargs [ours]


WORDS = ("river garden music summer bridge market winter story coffee letter window school travel "
         "forest engine silver island ticket camera doctor").split()
ENDINGS = ("That is all for now.", "Any more questions?", "I hope that this helps.")
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
EXACT, BOUND, ABSENT = 0.10, 0.05, 0.20  # weights of the code's table: equality or format, a bound
                                         # on one side, a forbidden letter [code: IF.py]


def bound(rng, name, numbers, relation="relation"):
    """kwargs of a count: a number and one of the two relations."""
    return {name: rng.choice(numbers), relation: rng.choice(("at least", "less than"))}


KINDS = {
    "keywords:existence": Kind(
        lambda x, keywords: all(occurrences(k, x) for k in keywords),
        "Use each of the words {keywords}.", "{keywords}|keyword", BOUND,
        lambda rng, _: {"keywords": rng.sample(WORDS, 2)}),
    "keywords:frequency": Kind(
        lambda x, keyword, frequency, relation:
            compare(occurrences(keyword, x), frequency, relation),
        'Use the word "{keyword}" {relation} {frequency} times.', "{keyword}|times", BOUND,
        lambda rng, _: {"keyword": rng.choice(WORDS), **bound(rng, "frequency", (2, 3, 4))}),
    "keywords:forbidden_words": Kind(
        lambda x, forbidden_words: not any(has_word(w, x) for w in forbidden_words),
        "Avoid the words {forbidden_words}.", "{forbidden_words}|avoid|forbid", BOUND,
        lambda rng, _: {"forbidden_words": rng.sample(WORDS, 2)}),
    "keywords:letter_frequency": Kind(
        lambda x, letter, let_frequency, let_relation:
            compare(x.lower().count(letter.strip().lower()), let_frequency, let_relation),
        'The letter "{letter}" appears {let_relation} {let_frequency} times.', "letter", BOUND,
        lambda rng, _: {"letter": rng.choice("bcfghkpuvw"),
                        **bound(rng, "let_frequency", (1, 4, 8, 12), "let_relation")}),
    "language:response_language": Kind(
        language_is,
        "Write everything in {language}.", r"language|\b{language}\b", EXACT,
        lambda rng, _: {"language": rng.choice([*LANGUAGES])}),
    "length_constraints:number_sentences": Kind(
        lambda x, num_sentences, relation: compare(len(sentences(x)), num_sentences, relation),
        "Write {relation} {num_sentences} sentences.", "sentence", BOUND,
        lambda rng, _: bound(rng, "num_sentences", (4, 6, 8, 12))),
    "length_constraints:number_paragraphs": Kind(
        paragraphs,
        "Write exactly {num_paragraphs} paragraphs, and put the markdown divider *** between them.",
        "paragraph|divider", EXACT, lambda rng, _: {"num_paragraphs": rng.randint(2, 5)}),
    "length_constraints:number_words": Kind(
        lambda x, num_words, relation: compare(len(words(x)), num_words, relation),
        "Write {relation} {num_words} words.", "word", BOUND,
        lambda rng, _: bound(rng, "num_words", (50, 100, 150, 200, 300))),
    "length_constraints:nth_paragraph_first_word": Kind(
        nth_begins,
        "Write exactly {num_paragraphs} paragraphs with one blank line between them, and begin "
        'paragraph {nth_paragraph} with the word "{first_word}".', "paragraph|{first_word}", EXACT,
        lambda rng, _: {"num_paragraphs": 3, "nth_paragraph": rng.randint(1, 3),
                        "first_word": rng.choice(WORDS)}),
    "detectable_content:number_placeholders": Kind(
        lambda x, num_placeholders: len(re.findall(r"\[[^][\n]*\]", x)) >= num_placeholders,
        "Leave at least {num_placeholders} placeholders in square brackets, such as [name].",
        "placeholder|bracket", BOUND, lambda rng, _: {"num_placeholders": rng.randint(1, 4)}),
    "detectable_content:postscript": Kind(
        postscript,
        "Close with a postscript that begins with {postscript_marker}", r"postscript|P\.S|P\.P\.S",
        EXACT, lambda rng, _: {"postscript_marker": rng.choice(("P.S.", "P.P.S"))}),
    "detectable_format:number_bullet_lists": Kind(
        lambda x, num_bullets: bullets(x) == num_bullets,
        "Include exactly {num_bullets} markdown bullet points (lines that begin with *).", "bullet",
        EXACT, lambda rng, _: {"num_bullets": rng.randint(2, 5)}),
    "detectable_format:constrained_response": Kind(
        lambda x: any(f"My answer is {a}." in x for a in ("yes", "no", "maybe")),
        'Reply with "My answer is yes.", "My answer is no." or "My answer is maybe."', "my answer",
        EXACT, lambda rng, _: {}),
    "detectable_format:number_highlighted_sections": Kind(
        lambda x, num_highlights: highlights(x) >= num_highlights,
        "Highlight at least {num_highlights} passages with markdown, like *this*.", "highlight",
        BOUND, lambda rng, _: {"num_highlights": rng.randint(1, 4)}),
    "detectable_format:multiple_sections": Kind(
        lambda x, section_spliter, num_sections:
            len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", x)) >= num_sections,
        "Divide the text into {num_sections} sections that begin with {section_spliter} 1, "
        "{section_spliter} 2 and so on.", "section", BOUND,
        lambda rng, _: {"section_spliter": rng.choice(("Section", "Part")),
                        "num_sections": rng.randint(2, 4)}),
    "detectable_format:json_format": Kind(
        is_json, "Give the whole answer as JSON.", "json", EXACT, lambda rng, _: {}),
    "detectable_format:title": Kind(
        has_title,
        "Give it a title in double angular brackets, such as <<my title>>.", "title|<<", EXACT,
        lambda rng, _: {}),
    "combination:two_responses": Kind(
        two_responses, "Give two different responses with ****** between them, and nothing else.",
        "two responses|different response", EXACT, lambda rng, _: {}),
    "combination:repeat_prompt": Kind(
        lambda x, prompt_to_repeat:
            x.strip().lower().startswith(prompt_to_repeat.strip().lower()),
        "Before you answer, repeat the request above word for word, without this sentence.",
        "repeat", EXACT, lambda rng, seed: {"prompt_to_repeat": seed}),
    "startend:end_checker": Kind(
        lambda x, end_phrase:
            x.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
        'The very last words are: "{end_phrase}"', "{end_phrase}|last words|the end", EXACT,
        lambda rng, _: {"end_phrase": rng.choice(ENDINGS)}),
    "startend:quotation": Kind(
        lambda x: len(x.strip()) > 1 and x.strip()[0] == x.strip()[-1] == '"',
        "Put the whole answer in double quotation marks.", "quot", EXACT, lambda rng, _: {}),
    "change_case:capital_word_frequency": Kind(
        lambda x, capital_frequency, capital_relation:
            compare(len(capital_words(x)), capital_frequency, capital_relation),
        "Words all in capital letters appear {capital_relation} {capital_frequency} times.",
        "capital", BOUND,
        lambda rng, _: bound(rng, "capital_frequency", (2, 4, 6), "capital_relation")),
    "change_case:english_capital": Kind(
        lambda x: x.isupper() and language_is(x, "en"),
        "Write in English, in capital letters only.", "capital", EXACT, lambda rng, _: {}),
    "change_case:english_lowercase": Kind(
        lambda x: x.islower() and language_is(x, "en"),
        "Write in English, in lowercase letters only.", "lowercase|lower case", EXACT,
        lambda rng, _: {}),
    "punctuation:no_comma": Kind(
        lambda x: "," not in x, "Use no commas.", "comma", EXACT, lambda rng, _: {}),
}


def follow(text, constraints, loose=False):
    """Which constraints [(kind, kwargs)] an answer meets, by IFEval's strict or loose rule; a blank
    text, or None, meets none. -> a list of bools"""
    texts = [text or ""]
    if loose:
        lines = texts[0].split("\n")
        texts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        texts += [t.replace("*", "") for t in texts]
    return [any(bool(t.strip()) and bool(KINDS[kind].check(t, **kwargs)) for t in texts)
            for kind, kwargs in constraints]


# 2b. Prompts with constraints.


@dataclass
class Task(Problem):
    """A prompt with its constraints, and how hard it proved in stage A."""

    constraints: list = field(default_factory=list)  # of (kind, kwargs)
    cues: list = field(default_factory=list)  # regular expressions that find them in the thinking
    pass_rate: float = 0.0
    dense: float = 0.0  # mean reward
    hardness: str = ""

    def row(self):
        """As it stands in prompts.jsonl, in IFEval's layout."""
        kinds, kwargs = zip(*self.constraints)
        return {"prompt": self.question, "instruction_id_list": kinds, "kwargs": kwargs,
                "cues": self.cues, "level": self.level, "hardness": self.hardness,
                "pass_rate": self.pass_rate, "dense": self.dense}


def to_tasks(rows, what):
    """Rows in IFEval's layout -> Tasks. Keyword arguments that are None are left out, as the Hub's
    copy has them. Rows may bring `cues` and a `level` of their own. Ends the program at a
    constraint that cannot be checked."""
    tasks = []
    for number, row in enumerate(rows, 1):
        try:
            prompt, kinds = row["prompt"], row["instruction_id_list"]
            kwargs = [{k: v for k, v in (given or {}).items() if v is not None}
                      for given in row["kwargs"]]
            if not (isinstance(kinds, list) and kinds and isinstance(prompt, str)
                    and prompt.strip() and len(kinds) == len(kwargs)):
                raise ValueError("a prompt, and as many kwargs as instruction ids, are needed")
            constraints = list(zip(kinds, kwargs))
            for _, given in constraints:
                check_values(given)
            follow(f"A probe: {prompt}", constraints)
            cues = row.get("cues") or [cue(*c) for c in constraints]
            if len(cues) != len(constraints):
                raise ValueError("as many cues as instruction ids are needed")
            for pattern in cues:
                re.compile(pattern)
        except KeyError as e:
            fail(f"{what}: row {number} has no {e}; it needs prompt, kwargs and "
                 f"instruction_id_list, of the types {', '.join(KINDS)}")
        except (TypeError, ValueError, AttributeError, re.error) as e:
            fail(f"{what}: row {number} cannot be checked: {e}")
        known = {k: row[k] for k in ("hardness", "pass_rate", "dense") if k in row}
        level = str(row.get("level"))  # of tiny/; of other data it means something else
        level = level if re.fullmatch(r"\d(_seen)?", level) else str(len(kinds))
        tasks.append(Task(prompt, "", level=level, constraints=constraints, cues=cues, **known))
    return tasks


def check_values(kwargs):
    """Raises ValueError at a keyword argument of another type than IFEval's."""
    for name, value in kwargs.items():
        if name in ("keywords", "forbidden_words"):
            good = isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)
        elif name.endswith("relation"):
            good = value in ("less than", "at least")
        elif re.match("num_|nth_|(let_|capital_)?frequency", name):
            good = type(value) is int and value >= (name == "nth_paragraph")
        else:
            good = isinstance(value, str) and bool(value.strip())
        if not good:
            raise ValueError(f"{name} cannot be {value!r:.100}")


# Which types exclude which [code: IFEval's instructions_registry], then ours.
ALONE = {"detectable_format:constrained_response": (),  # all but these
         "detectable_format:json_format": ("keywords:forbidden_words", "keywords:existence"),
         "combination:two_responses": (
             "keywords:forbidden_words", "keywords:existence", "language:response_language",
             "detectable_format:title", "punctuation:no_comma"),
         "combination:repeat_prompt": ("keywords:existence", "detectable_format:title",
                                       "punctuation:no_comma")}
EXCLUDES = {"language:response_language": (
                "detectable_format:multiple_sections", "keywords:existence", "keywords:frequency",
                "keywords:forbidden_words", "startend:end_checker", "change_case:english_capital",
                "change_case:english_lowercase"),
            "length_constraints:number_paragraphs": (
                "length_constraints:nth_paragraph_first_word",
                "length_constraints:number_sentences"),
            "detectable_format:multiple_sections": (
                "detectable_format:number_highlighted_sections",
                "change_case:english_capital", "change_case:english_lowercase"),    # [ours]
            "change_case:capital_word_frequency": ("change_case:english_capital",
                                                   "change_case:english_lowercase"),
            "change_case:english_capital": ("change_case:english_lowercase",),
            "startend:quotation": ("detectable_format:title",)}


def conflict(constraints):
    """Do the constraints contradict each other: by their types, by a word that one wants and
    another forbids, or by a limit of words below what the others need?"""
    kinds = [kind for kind, _ in constraints]
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds):
            if i != j and (a == b or b in EXCLUDES.get(a, ()) or a in ALONE and b not in ALONE[a]):
                return True
    given = {k: v for _, kwargs in constraints for k, v in kwargs.items()}
    texts = [*given.get("keywords", []), given.get("keyword", ""), given.get("first_word", ""),
             given.get("end_phrase", ""), given.get("prompt_to_repeat", "")]
    wanted = " ".join(texts)
    if any(has_word(w, wanted) for w in given.get("forbidden_words", [])):
        return True
    if "punctuation:no_comma" in kinds and "," in wanted:
        return True
    if given.get("let_relation") == "less than" and (
            occurrences(given["letter"], wanted) >= given["let_frequency"]):
        return True
    slots = given.get("num_placeholders", 0)
    capitals = given["capital_frequency"] if given.get("capital_relation") == "at least" else 0
    least = max(slots + len(given.get("keywords", [])), slots + capitals,
                given.get("num_paragraphs", 1))
    limits = [k["num_words"] for kind, k in constraints
              if kind.endswith("number_words") and k["relation"] == "less than"]
    return any(limit <= least for limit in limits)


def combine(rng, size, draw, kinds):
    """`size` constraints of different kinds that do not conflict; draw(kind) -> kwargs."""
    while True:
        constraints = [(kind, draw(kind)) for kind in rng.sample(kinds, size)]
        if not conflict(constraints):
            return constraints


def synthesise(seeds, number, rng):
    """Stage A without ready prompts: seed instructions with 1 to 5 constraints each -> Tasks"""
    tasks = []
    for n in range(number):
        seed = seeds[n % len(seeds)]
        constraints = combine(rng, 1 + n % 5, lambda kind, seed=seed: KINDS[kind].draw(rng, seed),
                              list(KINDS))
        # what is to be repeated stands above the request to repeat it
        constraints.sort(key=lambda c: c[0] != "combination:repeat_prompt")
        requests = " ".join(ask(*c) for c in constraints)
        tasks.append(Task(f"{seed}\n\n{requests}", "", level=str(len(constraints)),
                          constraints=constraints, cues=[cue(*c) for c in constraints]))
    return tasks


def shown(kwargs, join=", ", spell=str):
    """Keyword arguments as a text has them, each spelled by a function."""
    kwargs = {k: LANGUAGES.get(v, "that language") if k == "language" else v
              for k, v in kwargs.items()}
    return {k: join.join(map(spell, v)) if isinstance(v, list) else spell(str(v))
            for k, v in kwargs.items()}


def ask(kind, kwargs):
    """How a synthesised prompt asks for a constraint."""
    return KINDS[kind].request.format(**shown(kwargs))


def cue(kind, kwargs):
    """The regular expression that finds a constraint in a thinking block."""
    return KINDS[kind].cue.format(**shown(kwargs, "|", re.escape))


# 2c. Rewards, and what the cold start selects.


def split_thinking(text):
    """-> the thinking, and the answer after the last </think>, stripped; None without one"""
    thinking, mark, answer = text.rpartition(THINK_END)
    return (thinking, answer.strip()) if mark else (text, None)


def dense_reward(met, constraints):
    """-> acc, 1 if all constraints are met, and point, the sum of the weights of those met
    [code: IF.py compute_score]"""
    return float(all(met)), sum(weight(*c) for c, m in zip(constraints, met) if m)


def weight(kind, kwargs):
    """Of a constraint in the dense reward; the code's for a forbidden letter is higher."""
    forbidden = kind == "keywords:letter_frequency" and (
        kwargs["let_frequency"], kwargs["let_relation"]) == (1, "less than")
    return ABSENT if forbidden else KINDS[kind].weight


def length_reward(c, length, longest):
    """The cosine length reward of Zero-RL, c = acc + point: longer is better for what is partly
    right, worse for what is wrong, and cut off is worst  [code: IF.py cosine_length_reward]"""
    f = (1 - math.cos(math.pi * length / longest)) / 2
    if length >= longest:
        return -2.0
    return 2 * c * f if c >= 0.2 else -f


def judged(s, task):
    """A response -> acc and point; 0 and 0 without </think>."""
    answer = split_thinking(s.text)[1]
    return dense_reward(follow(answer, task.constraints), task.constraints)


def reward(s, task, cfg, zero):
    """R = acc + point, or with --reward sparse acc; in Zero-RL acc + length reward (D7).
    -> R, acc, length reward"""
    acc, point = judged(s, task)
    if zero:
        r_length = length_reward(acc + point, len(s.tokens), cfg.max_new_tokens)
        return acc + r_length, acc, r_length
    return acc + point * (cfg.reward == "dense"), acc, 0.0


def depth(text, cues):
    """The share of the constraints that the thinking previews before the draft and checks after
    it. The draft is the longest passage of words that it shares with the answer (D8)."""
    thinking, answer = split_thinking(text)
    if not answer:
        return 0.0
    places = [m.span() for m in re.finditer(r"\S+", thinking)]
    draft = SequenceMatcher(None, thinking.split(), answer.split()[:DRAFT], autojunk=False)
    draft = draft.find_longest_match()
    if not draft.size:
        return 0.0
    before = thinking[:places[draft.a][0]]
    after = thinking[places[draft.a + draft.size - 1][1]:]
    return statistics.fmean(bool(re.search(c, before, re.I) and re.search(c, after, re.I))
                            for c in cues)


def fluent(text):
    """The rule for fluency: the answer does not repeat itself: no word thrice in a row, and nine
    in ten of its runs of four words are new (D9)."""
    found = (split_thinking(text)[1] or "").lower().split()
    runs = list(zip(*(found[i:] for i in range(4))))
    stutter = any(a == b == c for a, b, c in zip(found, found[1:], found[2:]))
    return bool(found) and not stutter and len(set(runs)) >= 0.9 * len(runs)


# -------------------------------------------------------------------------- 3. the paper's maths


def select_tokens(nll, entropy, mask, rho, coef):
    """Entropy-SFT: of every response the k = max(floor(rho T), 1) tokens with the largest

        Delta_t = -log pi(y_t) - lambda_H H_t                [code: custom_entropy_trainer.py]

    nll, entropy, mask: (n, L) -> bool (n, L). It only selects: no gradient passes through it.
    """
    delta = (nll - coef * entropy).detach().masked_fill(mask == 0, -math.inf)
    rank = delta.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < kept(mask.sum(1), rho)[:, None]


def kept(length, rho):
    """k = max(floor(rho T), 1) of a response of T tokens. (n,) -> (n,)"""
    return (rho * length + 1e-4).floor().clamp(min=1)  # 0.57 of 100 are 57, in float32 less


def group_advantages(R):
    """GRPO: A_i = (R_i - mean R) / (std R + 1e-6), std with ddof 1, inside each group; a flat group
    has exact zeros. (B, G) -> (B, G)  [code: verl]"""
    R = R - R[:, :1]  # so that no rounding of the mean makes contrast of none
    return (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-6)


def policy_loss(logp, old_logp, A, mask, n_tok):
    """The dual-clip loss, summed over tokens and divided by the n_tok of the whole mini-batch:

        A >= 0    max(-A r, -A clip(r, 0, 2))                    r = pi / pi_old per token
        A < 0     min(-10 A, max(-A r, -A clip(r, 0, 2)))        [code: core_algos.py, scripts]

    (n, L) each but A (n,) -> the loss, a scalar, and the share of clipped tokens per row (n,)
    """
    r = (logp - old_logp).clamp(-20, 20).exp()
    A = A[:, None]
    plain, clipped = -A * r, -A * r.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    loss = torch.maximum(plain, clipped)
    loss = torch.where(A < 0, torch.minimum(-DUAL_CLIP * A, loss), loss)
    cut = ((loss != plain) * mask).sum(1) / mask.sum(1)
    return (loss * mask).sum() / n_tok, cut


def k3_kl(logp, ref_logp):
    """e^d - d - 1 per token, d = log pi_ref - log pi, clamped. (n, L) -> (n, L)
    [code: low_var_kl]"""
    d = (ref_logp - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def tea_weights(logp, A, A_mean, mask):
    """TEA's weights of the tokens of each response:

        C_t = (A - mean A) (log pi(o_t) - mean log pi),   w = softmax over t of C

    mean A is over the tokens of the whole mini-batch, so that --micro_tokens changes nothing. mean
    log pi adds the same to all tokens of a response, which a softmax does not see (D11).
    (n, L), (n,), a scalar, (n, L) -> (n, L); rows sum to 1, no gradient
    """
    C = (A[:, None] - A_mean) * logp.detach()
    return C.masked_fill(mask == 0, -math.inf).softmax(1)


def tea_coefficients(w, mask, kind, coef):
    """What multiplies H_t in the loss. T is the length of the response. (n, L) -> (n, L)

        released        min(coef w, 5)             coef 10: a mean of 10 / T  [code: core_algos.py]
        length_scaled   coef min(T w, 100)         a mean of coef             [2nd: whetstone]
        uniform         coef                       the plain entropy bonus    [code: entropy_coeff]
    """
    if kind == "released":
        return (coef * w).clamp(max=TEA_CAP)
    if kind == "length_scaled":
        return coef * (mask.sum(1, keepdim=True) * w).clamp(max=TEA_BOUND)
    return coef * mask


def tea_bonus(entropy, coefficients, n_tok):
    """L_TEA = sum over tokens of coefficient_t H_t / n_tok, which the loss has with a minus: the
    entropy of tokens with a large weight is kept up. (n, L), (n, L), a number -> a scalar"""
    return (coefficients * entropy).sum() / n_tok


# --------------------------------------------------------------------------------- 4. evaluation


def evaluate(policy, tok, tasks, cfg):
    """IFEval's four accuracies on k = cfg.eval_samples responses per prompt, from a generator of
    their own; `greedy` is the first of the four of greedy decoding, as are all if k is 0. The
    sizes that no split can hold out (`level1_seen`) count in their own number only."""
    prompts, k = [t.prompt for t in tasks], max(1, cfg.eval_samples)
    drawn = greedy = sample(policy, tok, prompts, 1, cfg.max_new_tokens, 0)
    if cfg.eval_samples:
        generator = torch.Generator(cfg.device).manual_seed(1234)
        drawn = sample(policy, tok, prompts, k, cfg.max_new_tokens, cfg.temperature, generator)
    of_level = {t.level: [] for t in sorted(tasks, key=lambda t: t.level)}
    pairs, strict, loose, first = [], [], [], []  # of the tasks that count
    for i, t in enumerate(tasks):
        counts = not t.level.endswith("_seen")
        for s in drawn[i * k:(i + 1) * k]:
            answer = split_thinking(s.text)[1]
            met = follow(answer, t.constraints)
            of_level[t.level].append(all(met))
            if counts:
                pairs.append((t, s))
                strict.append(met)
                loose.append(follow(answer, t.constraints, loose=True))
        if counts:
            first.append(judged(greedy[i], t)[0])
    depths, mean = [depth(s.text, t.cues) for t, s in pairs], statistics.fmean
    result = {
        "accuracy": mean(map(all, strict)), "prompt_loose": mean(map(all, loose)),
        "instruction_strict": mean(sum(strict, [])), "instruction_loose": mean(sum(loose, [])),
        "greedy": mean(first),
        "checked": mean(d > 0 for d in depths), "depth": mean(depths),
        "entropy": sum(s.entropy for _, s in pairs) / sum(len(s.tokens) for _, s in pairs),
        "length": mean(len(s.tokens) for _, s in pairs)}
    return result | {f"accuracy/level{level}": mean(found) for level, found in of_level.items()}


# ---------------------------------------------------------------------------------- 5. the loop


def load_data(cfg):
    """-> seed instructions, or Tasks where the data have constraints, and held-out Tasks."""
    names = {"dolly": "databricks/databricks-dolly-15k", "ifeval": "google/IFEval"}
    name, what = names.get(cfg.eval_dataset, cfg.eval_dataset), f"--eval_dataset {cfg.eval_dataset}"
    held_out = to_tasks(read_rows(cfg, name, "test", "--eval_dataset")
                        or read_rows(cfg, name, "train", "--eval_dataset"), what)
    asked = {t.question for t in held_out if not t.level.endswith("_seen")}
    held_out = held_out[:cfg.eval_size or None]
    if all(t.level.endswith("_seen") for t in held_out):
        fail(f"{what}: of its first {len(held_out)} prompts none counts in the accuracy; give a "
             "larger --eval_size")
    rows = read_rows(cfg, names.get(cfg.dataset, cfg.dataset), "train", "--dataset")
    what = f"--dataset {cfg.dataset}"
    if "instruction_id_list" in rows[0]:
        seeds = [t for t in to_tasks(rows, what) if t.question not in asked]
    else:
        rows = text_columns(rows, what, {"instruction": SEED_COLUMNS}, {"context": ("context",)})
        seeds = {r["instruction"] for r in rows if r["instruction"] and not r["context"]}
        seeds = sorted(s for s in seeds if not any(q.startswith(s) for q in asked))
        random.Random(0).shuffle(seeds)  # not cfg.seed: every seed has the same prompts
    if not seeds:
        fail(f"{what}: no instruction in it that is not held out")
    return seeds, held_out


def halves(steps):
    """[(easy, steps), (hard, steps)]"""
    return [("easy", steps - steps // 2), ("hard", steps // 2)]


def render(policy, tok, tasks, what, cfg):
    """Prompts as ids, through the chat template; a model whose template knows no thinking, and
    which was not trained with an instruction of its own, is asked to think (D2). -> the Tasks that
    fit the context"""
    ours = "" if "think" in (tok.chat_template or "") else THINK
    instruction = trained_prompt(policy, "instruction", ours)
    return encode_prompts(tasks, policy, tok, instruction, cfg.max_new_tokens, what)


def make_prompts(policy, tok, seeds, cfg, path):
    """Stage A: prompts with 1 to 5 constraints that do not conflict, and how hard they are for the
    model to be trained, by K responses each (D4); a product, rows in IFEval's layout."""
    rng = random.Random(2)
    if isinstance(seeds[0], Task):
        tasks = seeds[:cfg.pool]
    else:
        tasks = synthesise(seeds, cfg.pool, rng)
    tasks, K = render(policy, tok, tasks, "prompts", cfg), cfg.pass_samples
    for start in tqdm(range(0, len(tasks), PIECE), "pass rates", disable=None):
        piece, generator = tasks[start:start + PIECE], generator_of(cfg, "prompts", start)
        drawn = sample(policy, tok, [t.prompt for t in piece], K, cfg.max_new_tokens,
                       cfg.temperature, generator)
        for i, t in enumerate(piece):
            rewards = [judged(s, t) for s in drawn[i * K:(i + 1) * K]]
            t.pass_rate = statistics.fmean(acc for acc, _ in rewards)
            t.dense = statistics.fmean(map(sum, rewards))
            t.hardness = hardness(t.pass_rate, t.dense)
    write_rows(path, (t.row() for t in tasks))


def hardness(pass_rate, dense):
    """pass: all K responses are right; easy: some; hard: none, but they meet some constraint;
    else too_hard, which is not trained on (D4)."""
    if pass_rate:
        return "pass" if pass_rate == 1 else "easy"
    return "hard" if dense else "too_hard"


def pools_of(tasks, cfg):
    """What the two halves of RL train on: {easy: Tasks, hard: Tasks}; without a curriculum, and
    where a class is empty, both classes in both."""
    pools = {h: [t for t in tasks if t.hardness == h] for h in ("easy", "hard")}
    both = sum(pools.values(), []) or tasks
    for name, pool in pools.items():
        if not pool and cfg.curriculum:
            print(f"no prompt is {name}: that half of RL has the others")
        if not pool or not cfg.curriculum:
            pools[name] = both
    return pools


def extract(model, tasks, cfg, path):
    """Stage C, thinking-pattern extraction: of responses to prompts that were solved before, those
    that are correct, deep enough and fluent (D8, D9); a product."""
    policy, tok = load_model(str(model), cfg)
    tasks = render(policy, tok, tasks, "prompts", cfg)
    solved = [t for t in tasks if t.pass_rate] or tasks
    rows, counts, tried = [], dict.fromkeys(("responses", "correct", "deep", "fluent"), 0), 0
    state = {"position": 0}
    bar = tqdm(total=cfg.cold_start, desc="cold start", disable=None)
    while len(rows) < cfg.cold_start and tried < TRIES * (
            cfg.cold_start if rows else min(100, cfg.cold_start)):
        batch = take(solved, PIECE, state, f"cold{cfg.seed}")
        generator = generator_of(cfg, "cold start", tried)
        drawn = sample(policy, tok, [t.prompt for t in batch], 1, cfg.max_new_tokens,
                       cfg.temperature, generator)
        right = [(t, s) for t, s in zip(batch, drawn) if s.finished and judged(s, t)[0]]
        deep = [(t, s) for t, s in right if depth(s.text, t.cues) == 1]
        good = [(t, s) for t, s in deep if fluent(s.text)]
        for name, some in zip(counts, (batch, right, deep, good)):
            counts[name] += len(some)
        good = good[:cfg.cold_start - len(rows)]
        rows, tried = rows + [t.row() | {"response": s.text} for t, s in good], tried + PIECE
        bar.update(len(good))
    bar.close()
    print(f"cold start: {len(rows)} examples ({counts})")
    if not rows:
        fail(f"no response is fit for the cold start ({counts}); a new run with --sft none goes on "
             "without one")
    write_rows(path, rows)


def begin(run, name, start, steps, test):
    """A training stage: the policy of the folder `start`, or, where the run was killed in this
    stage, what the checkpoint has. -> policy, tokenizer, optimizer, reference"""
    cfg = run.cfg
    torch.manual_seed(random.Random(f"{cfg.seed}/{name}").getrandbits(48))
    policy, tok = load_model(str(start), cfg, cfg.lora)
    reference = frozen_reference(policy) if cfg.kl_coef and name != "sft" else None
    opt = adamw(cfg.lr, policy)
    run.model, run.opt, run.test = policy, opt, partial(test, policy, tok)
    if run.state["stage"] == name:
        run.restore()
    else:
        run.state |= {"stage": name, "began": run.state["step"], "position": 0}
        print(f"stage {name}: {steps} steps from {start}")
    return policy, tok, opt, reference


def finished(run, name, start, steps):
    """Where the model of a stage is, if there is nothing left to do for it."""
    state, folder = run.state, run.folder / name
    if not steps:
        return start
    if run.cfg.resume and state["stage"] and name not in state["stages"] and not (
            state["stage"] == name and state["step"] >= state["began"] + steps):
        shutil.rmtree(folder, ignore_errors=True)  # it is ahead of the checkpoint
    if state["stage"] == name and state["step"] < state["began"] + steps:
        shutil.rmtree(folder, ignore_errors=True)  # a finished run goes on with more --steps
    if not folder.exists():
        return None
    state["stages"].setdefault(name, state["after"])  # killed before a next checkpoint
    return folder


def leave(run, name, policy, tok):
    """The end of a training stage -> the folder of its model, LoRA adapters merged; a product"""
    run.state["stages"][name] = run.state["after"]
    return product(run.folder / name, lambda to: save_model(
        to, policy.merge_and_unload() if run.cfg.lora else policy, tok))


def fine_tune(run, start, rows, test):
    """Stage D, Entropy-SFT on the cold start. -> the folder of its model"""
    cfg, name = run.cfg, "sft"
    steps = math.ceil(cfg.sft_epochs * len(rows) / cfg.sft_batch)
    if folder := finished(run, name, start, steps):
        return folder
    policy, tok, opt, _ = begin(run, name, start, steps, test)
    tasks = [Task(r["prompt"], "", r["response"]) for r in rows]
    tasks = render(policy, tok, tasks, "cold start", cfg)
    examples = as_samples(tok, [t.prompt for t in tasks], [t.solution for t in tasks])
    rho = cfg.token_ratio if cfg.sft == "entropy" else 1.0
    for step in run.steps(run.state["began"] + steps):
        batch = take(examples, cfg.sft_batch, run.state, f"{cfg.seed}/sft")
        n_kept = kept(torch.tensor([len(s.tokens) for s in batch]), rho).sum().item()
        total = 0.0
        for _, ids, mask in micro_batches(batch, cfg):                               # (n, L)
            logp, H = response_logps(policy, ids, mask, 1.0, with_entropy=True)      # (n, L) each
            selected = select_tokens(-logp, H, mask, rho, cfg.entropy_coef)          # (n, L)
            loss = -(logp * selected).sum() / n_kept
            loss.backward()
            total += loss.item()
            dropped = (mask > 0) & ~selected
            run.add({"sft/nll": -logp[mask > 0], "sft/entropy": H[mask > 0],
                     "sft/dropped_nll": -logp[dropped], "sft/dropped_entropy": H[dropped]})
        done = step - run.state["began"] - 1
        rate = cfg.sft_lr * min((done + 1) / math.ceil(steps / 100),
                                (1 + math.cos(math.pi * done / steps)) / 2)
        run.add({"stage/number": 3, "sft/loss": total,
                 "optim/grad_norm": update(opt, cfg, f"{step} (SFT)", [rate])})
        run.end_step()
    return leave(run, name, policy, tok)


def reinforce(run, name, start, tasks, steps, test):
    """Half of stage B (Zero-RL: GRPO with a length reward) or of stage E (TEA-RL). -> the folder
    of its model"""
    if folder := finished(run, name, start, steps):
        return folder
    cfg, zero = run.cfg, name.startswith("zero")
    policy, tok, opt, reference = begin(run, name, start, steps, test)
    state, tea = run.state, "off" if zero else cfg.tea
    tasks = render(policy, tok, tasks, "prompts", cfg)
    for step in run.steps(state["began"] + steps):
        # 1. sample, reward, advantage
        batch = take(tasks, cfg.prompts, state, f"{cfg.seed}/{name}")                # B Tasks
        samples = sample(policy, tok, [t.prompt for t in batch], cfg.group, cfg.max_new_tokens,
                         cfg.temperature)                                            # B*G Samples
        R, acc, r_length = zip(*(reward(s, batch[i // cfg.group], cfg, zero)
                                 for i, s in enumerate(samples)))
        R = torch.tensor(R, device=cfg.device).view(-1, cfg.group)                   # (B, G)
        A = group_advantages(R).view(-1)                                             # (B*G,)

        # 2. log-probs of the policy that sampled, and of the one that the stage began with
        old = batch_logps(policy, samples, cfg) if cfg.updates > 1 else None         # (B*G, L)
        ref = reference_logps(policy, reference, samples, cfg) if cfg.kl_coef else None

        # 3. one optimizer step per mini-batch of prompts
        for part in torch.arange(len(samples)).view(-1, cfg.group).tensor_split(cfg.updates):
            part = part.flatten().tolist()
            T = torch.tensor([len(samples[i].tokens) for i in part], device=cfg.device)
            n_tok, total = T.sum().item(), 0.0
            A_mean = (A[part] * T).sum() / n_tok       # over the tokens of the mini-batch
            for rows, ids, mask in micro_batches(samples, cfg, part):                # (n, L)
                logp, H = response_logps(policy, ids, mask, cfg.temperature,
                                         with_entropy=tea != "off")
                old_logp = logp.detach() if old is None else old[rows, :mask.shape[1]]
                loss, cut = policy_loss(logp, old_logp, A[rows], mask, n_tok)
                total += loss.item()
                if cfg.kl_coef:
                    kl = k3_kl(logp, ref[rows, :mask.shape[1]])                      # (n, L)
                    loss = loss + cfg.kl_coef * (kl * mask).sum() / n_tok
                    run.add({"policy/kl": kl[mask > 0]})
                if tea != "off":
                    w = tea_weights(logp, A[rows], A_mean, mask)                     # (n, L)
                    alpha = tea_coefficients(w, mask, tea, cfg.tea_coef)             # (n, L)
                    loss = loss - tea_bonus(H, alpha, n_tok)
                    run.add({"tea/coefficient": alpha[mask > 0],
                             "tea/uniformity": 1 / (mask.sum(1) * w.square().sum(1))})
                loss.backward()
                run.add({"policy/clipped": cut, "policy/mismatch": mismatch(
                    old_logp, mask, [samples[i] for i in rows])})
            rate = cfg.lr * min(1.0, (step - state["began"]) / max(1, cfg.warmup_steps))
            run.add({"policy/loss": total,
                     "optim/grad_norm": update(opt, cfg, f"{step} ({name})", [rate])})

        depths = [depth(s.text, batch[i // cfg.group].cues) for i, s in enumerate(samples)]
        run.add(sampling_statistics(samples, [a == 1 for a in acc], cfg.group, state))
        run.add({"reward/mean": R, "reward/length": r_length if zero else [],
                 "sample/checked": [d > 0 for d in depths], "sample/depth": depths,
                 "stage/number": RL_STAGES[name]})
        run.end_step([
            {"prompt": batch[i // cfg.group].question, "response": samples[i].text,
             "reward": R.view(-1)[i].item()} for i in range(0, len(samples), cfg.group)][:4])
    return leave(run, name, policy, tok)


@one_line
def main(argv=None):
    cfg = parse(argv)
    run = Run(cfg, "light_if", METRICS, CURVES)
    set_seed(cfg.seed)
    seeds, held_out = load_data(cfg)
    policy, tok = load_model(cfg.model, cfg)
    if THINK_END in tok.all_special_tokens:
        fail(f"--model {cfg.model}: {THINK_END} is a special token of its tokenizer, which no "
             "decoded response has")
    held_out = render(policy, tok, held_out, "evaluation", cfg)

    def test(policy, tok):
        return evaluate(policy, tok, held_out, cfg)

    run.start(None, None, partial(test, policy, tok), stage="", began=0, stages={})

    # A. hardness-aware prompts
    path = product(run.folder / "prompts.jsonl",
                   lambda to: make_prompts(policy, tok, seeds, cfg, to))
    prompts = to_tasks(read_json(path, path), path)
    pools = pools_of(prompts, cfg)                                      # {easy: ..., hard: ...}
    model = cfg.model

    # B. Zero-RL elicits the pattern
    if cfg.zero_rl:
        for half, steps in halves(cfg.zero_steps):
            model = reinforce(run, f"zero_{half}", model, pools[half], steps, test)

    if cfg.sft != "none":
        # C. the cold start: correct, deep and fluent responses show the pattern
        path = product(run.folder / "cold_start.jsonl",
                       lambda to: extract(model, prompts, cfg, to))
        # D. Entropy-SFT of the model that everything started from
        model = fine_tune(run, cfg.model, read_json(path, path), test)

    # E. TEA-RL, first on easy, then on hard prompts
    for half, steps in halves(cfg.steps):
        model = reinforce(run, half, model, pools[half], steps, test)
    policy, tok = load_model(str(model), cfg)
    run.test = partial(test, policy, tok)
    run.finish(policy, tok)


if __name__ == "__main__":
    main()
