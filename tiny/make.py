"""Makes the files of tiny/: three small worlds in which the five scripts learn within minutes.

    python tiny/make.py FOLDER      # everything, into an empty folder (runs/tiny)

    arithmetic/     a sum told as a story of 1 to 5 steps; the model solves the short ones
    forms/          fill in a form of five categories, and judge a filled form, line by line
    constraints/    short texts that have to meet 1 to 5 constraints; the model checks too seldom

A user never runs it: what it made is in the repository. The same versions on the same kind of
processor give the same bytes. All choices in this file are ours.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

import torch
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import TINY_FOLDER, Config, as_samples, encode_questions, sft_step, take
from light_if import THINK_END, capital_words, combine, follow, words
from temporal_sr import FORM, SLOTS, form_words, verdicts

# ----------------------------------------------------------------------- models and their training

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def tokenizer(texts, vocab_size):
    """A byte-level BPE in Qwen2's own layout: AutoTokenizer puts Qwen2's pre-tokenizer beside a
    qwen2 config whatever was saved there, so any other kind would not survive the round trip."""
    special = dict(eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|pad|>")
    blank = Qwen2Tokenizer(**special).backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    blank.train_from_iterator(texts, trainer)
    bpe = json.loads(blank.to_str())["model"]
    tok = Qwen2Tokenizer(bpe["vocab"], [tuple(m) for m in bpe["merges"]], **special,
                         extra_special_tokens=["<|user|>", "<|assistant|>"])
    tok.chat_template = TEMPLATE
    return tok


def untrained(tok, layers=2, kv_heads=2, **prompts):
    """A model with random weights, of the architecture that the scripts use on a GPU. `prompts` are
    those that it will be trained with; they go into its config.json, where the scripts look."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, intermediate_size=288, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
        bos_token_id=None, prompts={"instruction": "", **prompts}))


def train(folder, model, tok, draw, steps, batch, lr):
    """Supervised training: `draw()` gives one (question, response) at a time. The learning rate
    rises for 50 steps and then falls to zero, both linearly. The model is saved in the folder."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    cfg = Config(device="cpu", micro_tokens=2048)
    for step in tqdm(range(steps), folder.name, disable=None):
        questions, responses = zip(*[draw() for _ in range(batch)])
        samples = as_samples(tok, encode_questions(tok, list(questions)), list(responses))
        rate = lr * min((step + 1) / 50, (steps - step) / (steps - 50))
        sft_step(model, samples, opt, cfg, step, [rate])
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def write(folder, **files):
    """Lists of dicts -> .jsonl files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_held_out(text, share=1 / 8):
    """Decides by the text's hash, so that no training ever sees this share of all texts."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * share


# -------------------------------------------------------------------------------------- arithmetic

NAMES, THINGS = ("Ada", "Ben", "Cora", "Dan"), ("figs", "nuts", "pens", "cups")


def sum_problem(rng, level):
    """`Ada has 12 figs, gives 5, gets 17. How many figs?` -> `12-5=7 / 7+17=24 / #### 24`; a
    problem of level n takes n steps."""
    name, thing, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 30)
    story, lines = f"{name} has {total} {thing}", []
    for _ in range(level):
        change = rng.randint(1, 30) if total == 0 or rng.random() < 0.5 else -rng.randint(1, total)
        story += f", {'gets' if change > 0 else 'gives'} {abs(change)}"
        lines.append(f"{total}{change:+d}={total + change}")
        total += change
    return {"question": f"{story}. How many {thing}?", "answer": str(total),
            "solution": "\n".join([*lines, f"#### {total}"]), "level": str(level)}


def sum_problems(levels, split, number):
    """Distinct problems of a split, the levels in turn; the splits share no question."""
    rng, problems = random.Random({"train": 0, "test": 1}[split]), {}
    while len(problems) < number:
        p = sum_problem(rng, levels[len(problems) % len(levels)])
        if is_held_out(p["question"]) == (split == "test"):
            problems.setdefault(p["question"], p)
    return list(problems.values())


def arithmetic_data(folder):
    """train.jsonl and test.jsonl; for carft.py annotated.jsonl and annotated_test.jsonl, problems
    of 2 to 4 steps, of which half have a terse solution, `12-5+17=24 / #### 24`: it does two
    operations in one step, more than the model can compute."""
    train, test = (sum_problems((1, 2, 3, 4, 5), *x) for x in (("train", 8000), ("test", 1000)))
    annotated, held_out = (sum_problems((2, 3, 4), *x) for x in (("train", 2000), ("test", 1000)))
    two_steps = r"(\d+[+-]\d+)=(\d+)\n\2([+-]\d+=\d+)"
    for row in annotated + held_out:
        if random.Random(row["question"]).random() < 0.5:
            row["solution"] = re.sub(two_steps, r"\1\3", row["solution"])
    write(folder, train=train, test=test, annotated=annotated, annotated_test=held_out)


def make_arithmetic(folder):
    """A model that has seen problems of one to three steps, the short ones more often."""
    arithmetic_data(folder)
    rng = random.Random(2)
    corpus = [sum_problem(rng, 3) for _ in range(500)]
    tok = tokenizer([text for p in corpus for text in (p["question"], p["solution"])], 320)
    model = untrained(tok)

    def draw():
        while True:
            p = sum_problem(rng, rng.choice((1, 1, 2, 2, 3)))
            if not is_held_out(p["question"]):
                return p["question"], p["solution"]

    train(folder, model, tok, draw, 1200, 64, 3e-3)


# ------------------------------------------------------------------------------------------- forms

FILLERS = ("um", "hm", "eh", "uh")
AUTHORS = (0.2, 0.5, 0.85)  # how often each of the authors of ift.jsonl has a right word
JUDGE_NOISE = 0.2           # share of wrong verdicts: the judge is imperfect on purpose
FORMS = 8000                # rows of ift.jsonl and of eft.jsonl
WORDS = form_words()        # of forms/words.json, the one file that is not made here
JUDGE = "Judge: {question}\n<response>\n{response}\n</response>"


def fill(rng, question, right):
    """An answer whose line k has a word of its category if right[k], else one of three mistakes: a
    filler, a word of another category, or a line of another category."""
    lines = []
    for name, good in zip(question.split("\n")[1:], right):
        other = rng.choice([c for c in WORDS if c != name])
        mistakes = (name, FILLERS), (name, WORDS[other]), (other, WORDS[other])
        name, choices = (name, WORDS[name]) if good else rng.choice(mistakes)
        lines.append(f"{name} {rng.choice(choices)}")
    return "\n".join(lines)


def form_judgement(rng, question, answer):
    """What the judge is taught: what each line was to be, what it is, and a verdict, wrong in
    JUDGE_NOISE of all (`animal animal cat ok`); the count of `ok` is the score."""
    oks = [good != (rng.random() < JUDGE_NOISE) for good in verdicts(question, answer)]
    lines = [f"{name} {line} {'ok' if ok else 'bad'}" for name, line, ok in zip(
        question.split("\n")[1:], answer.split("\n"), oks)]
    return "\n".join([*lines, f"Score: {sum(oks)}"])


def forms_data(folder):
    """ift.jsonl, answers to forms; eft.jsonl, judgements of answers to the same forms;
    prompts.jsonl, other forms, with answers that only --method spin reads; test.jsonl, forms that
    are held out."""
    rng = random.Random(0)
    forms = [FORM + "\n".join(names) for names in permutations(WORDS, SLOTS)]
    rng.shuffle(forms)
    test = [{"prompt": q} for q in forms if is_held_out(q)]
    forms = [q for q in forms if not is_held_out(q)]
    seen, others = forms[:len(forms) // 6], forms[len(forms) // 6:]

    def authored(question):
        p = rng.choice(AUTHORS)
        answer = fill(rng, question, [rng.random() < p for _ in range(SLOTS)])
        return {"prompt": question, "response": answer}

    ift, eft = [], []
    for question in rng.choices(seen, k=FORMS):
        ift.append(authored(question))
        right = rng.sample(range(SLOTS), rng.randint(0, SLOTS))  # all grades are alike often
        answer = fill(rng, question, [k in right for k in range(SLOTS)])
        eft.append({"prompt": question, "response": answer,
                    "judgement": form_judgement(rng, question, answer)})
    write(folder, ift=ift, eft=eft, prompts=[authored(q) for q in others], test=test)
    (folder / "words.json").write_bytes((TINY_FOLDER / "forms/words.json").read_bytes())
    return ift, eft


def make_forms(folder):
    """base/, an untrained model, and M_0/, which has learned from ift.jsonl and eft.jsonl."""
    ift, eft = forms_data(folder)
    tok = tokenizer([*("\n".join(row.values()) for row in ift[:1000] + eft[:1000]), JUDGE], 900)
    model = untrained(tok, judge=JUDGE)
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    rows = [(row["prompt"], row["response"]) for row in ift]
    rows += [(JUDGE.format(question=row["prompt"], response=row["response"]), row["judgement"])
             for row in eft]
    rows = iter(take(rows, 2500 * 64, {"position": 0}, 0))
    train(folder / "M_0", model, tok, partial(next, rows), 2500, 64, 3e-3)


# ------------------------------------------------------------------------------------- constraints

NOTE = "red cat sun hat pen cup map fox".split()
NUMBERS = "zero one two three four five six seven eight nine".split() + ["ten"] * 10  # or more
SEEDS = ("note", "list", "poem", "tale")
SLOT, BREAK = "[x]", "***"
JOINTS = (BREAK, ",")      # they stand between two words
SLOPPY, FIXED = 0.65, 0.9  # how often a first draft meets a constraint, and a redraft one more


def about_word(prefix, name):
    """An entry of KINDS; what a check observes of a word is itself as it stands in the text."""
    return (lambda k: prefix + k[name][0].title(),
            lambda x, k: next((w for w in words(x) if w.lower() == k[name][0]), "none"),
            lambda rng: {name: [rng.choice(NOTE)]})


LIMITS = [{"num_words": n, "relation": relation} for relation, numbers in (
    ("at least", (5, 6, 7)), ("less than", (4, 5, 6))) for n in numbers]
# kind: its request as one word; what a check observes in a text, as one word; a draw of kwargs
KINDS = {
    "length_constraints:number_words": (
        lambda k: {"at least": "atLeast", "less than": "lessThan"}[k["relation"]]
        + NUMBERS[k["num_words"]].title(),
        lambda x, k: NUMBERS[len(words(x))],
        lambda rng: rng.choice(LIMITS)),
    "length_constraints:number_paragraphs": (
        lambda k: f"parts{NUMBERS[k['num_paragraphs']].title()}",
        lambda x, k: NUMBERS[x.count(BREAK) + 1],
        lambda rng: {"num_paragraphs": rng.choice((1, 2, 3))}),
    "keywords:existence": about_word("with", "keywords"),
    "keywords:forbidden_words": about_word("without", "forbidden_words"),
    "detectable_content:number_placeholders": (
        lambda k: f"slots{NUMBERS[k['num_placeholders']].title()}",
        lambda x, k: NUMBERS[x.count("[")],
        lambda rng: {"num_placeholders": rng.choice((1, 2))}),
    "change_case:capital_word_frequency": (
        lambda k: f"loud{NUMBERS[k['capital_frequency']].title()}",
        lambda x, k: NUMBERS[len(capital_words(x))],
        lambda rng: {"capital_frequency": rng.choice((2, 3, 4)), "capital_relation": "at least"}),
    "punctuation:no_comma": (
        lambda k: "noComma", lambda x, k: "found" if "," in x else "none", lambda rng: {}),
    "startend:quotation": (
        lambda k: "quoted", lambda x, k: 'found' if x[:1] == '"' else 'none', lambda rng: {}),
}


@dataclass
class Page:
    """A short text: words, slots, breaks and commas; in capitals or not, in quotes or not."""

    items: list
    loud: bool
    quoted: bool

    def __str__(self):
        """The text, with a space before every word."""
        items = [i.upper() if self.loud and i != SLOT else i for i in self.items]
        text = "".join(i if i == "," else f" {i}" for i in items)
        return f'"{text}"' if self.quoted else text

    def put(self, rng, item):
        """Inserts an item at random; one of JOINTS between two words, where there is room."""
        places = range(len(self.items) + 1)
        if item in JOINTS:
            places = [i for i in places[1:-1] if not {*self.items[i - 1:i + 1]} & {*JOINTS}]
        if places:
            self.items.insert(rng.choice(places), item)

    def drop(self, rng, item):
        """Removes one such item, and with it a joint that is left without its words."""
        self.items.pop(rng.choice([i for i, x in enumerate(self.items) if x == item]))
        self.items = [x for i, x in enumerate(self.items)
                      if x not in JOINTS or i and self.items[i - 1] not in JOINTS]
        while self.items and self.items[-1] in JOINTS:
            self.items.pop()

    def turn(self, rng, kind, kwargs, want):
        """One small change towards meeting a constraint (`want`) or missing it."""
        here = [w for w in NOTE if w in self.items]
        away = [w for w in NOTE if w not in self.items]
        breaks = self.items.count(BREAK)
        if kind.endswith("number_words"):
            more = want == (kwargs["relation"] == "at least")
            if more and away:
                self.put(rng, rng.choice(away))
            elif not more and len(here) > 1:
                self.drop(rng, rng.choice(here))
        elif kind.endswith("number_paragraphs"):
            few = breaks + 1 < kwargs["num_paragraphs"] if want else (
                breaks < 2 and rng.random() < 0.5)
            self.put(rng, BREAK) if few or not breaks else self.drop(rng, BREAK)
        elif kind.startswith("keywords"):
            (word,), = kwargs.values()
            if want == (kind == "keywords:existence"):
                self.put(rng, word)
            elif len(here) > 1:
                self.drop(rng, word)
        elif kind.endswith("number_placeholders"):
            self.put(rng, SLOT) if want else self.drop(rng, SLOT)
        elif kind.endswith("capital_word_frequency"):
            if want and self.loud and away:
                self.put(rng, rng.choice(away))
            self.loud = want
        elif kind.endswith("no_comma"):
            self.drop(rng, ",") if want else self.put(rng, ",")
        else:
            self.quoted = want


def revise(rng, page, constraints, met):
    """Changes a page, a new random one for None, until exactly the constraints that `met` (bools)
    says hold. -> the new page; None if that fails"""
    if page:
        page = Page(list(page.items), page.loud, page.quoted)
    else:
        page = Page(rng.sample(NOTE, rng.randint(2, 6)), rng.random() < 0.3, rng.random() < 0.2)
        for item in [BREAK] * rng.choice((0, 0, 1, 2)) + [SLOT] * rng.choice((0, 0, 1, 2)):
            page.put(rng, item)
        if rng.random() < 0.4:
            page.put(rng, ",")
    for _ in range(30):
        wrong = [(*c, m) for c, m, now in zip(constraints, met, follow(str(page), constraints))
                 if m != now]
        if not wrong:
            return page
        page.turn(rng, *rng.choice(wrong))


def tags(constraints):
    """The requests for constraints, a word each."""
    return [KINDS[kind][0](kwargs) for kind, kwargs in constraints]


def trace(rng, constraints, thorough):
    """A response that the model is trained on: lazy, it restates the request and answers; thorough,
    it drafts, writes down what it observes of every constraint and a verdict, and drafts again
    where one is bad, three times at most."""
    while True:
        page, text = None, f"plan {' '.join(tags(constraints))}"
        met = [rng.random() < SLOPPY for _ in constraints]
        for _ in range(3):
            page = revise(rng, page, constraints, met)
            if not page or not thorough:
                break
            text += f" draft{page} check"
            for tag, (kind, kwargs), m in zip(tags(constraints), constraints, met):
                text += f" {tag} {KINDS[kind][1](str(page), kwargs)} {'ok' if m else 'bad'}"
            if all(met):
                break
            met = [m or rng.random() < FIXED for m in met]
        if page:
            return f"{text}\n{THINK_END}\n{page}"


def task(rng, size, held_out=False):
    """`size` constraints of a combination of kinds that is held out, or is not; one combination in
    four is, but single kinds cannot be. -> prompt, constraints"""
    while True:
        constraints = combine(rng, size, lambda kind: KINDS[kind][2](rng), list(KINDS))
        kinds = " ".join(sorted(kind for kind, _ in constraints))
        if size == 1 or held_out == is_held_out(f"light_if {kinds}", 1 / 4):
            return " ".join([rng.choice(SEEDS), *tags(constraints)]), constraints


def constraints_data(folder):
    """train.jsonl and test.jsonl, prompts in IFEval's layout. `cues` are the regular expressions
    that find a constraint in a thinking block; the level 1_seen is no combination to hold out."""
    for seed, split, number in ((2, "train", 1500), (1, "test", 300)):
        rng, rows = random.Random(seed), []
        for size in (1 + n % 5 for n in range(number)):
            prompt, constraints = task(rng, size, split == "test")
            kinds, kwargs = zip(*constraints)
            rows.append({"prompt": prompt, "instruction_id_list": kinds, "kwargs": kwargs,
                         "cues": [rf"\b{tag}\b" for tag in tags(constraints)],
                         "level": "1_seen" if split == "test" and size == 1 else str(size)})
        write(folder, **{split: rows})


def make_constraints(folder):
    """A lazy model: it learns to copy and find words, then the thorough trace, then laziness."""
    constraints_data(folder)
    rng = random.Random(0)

    def word():  # a text to copy, or a task with a single constraint on a word
        if rng.random() < 0.5:
            page = revise(rng, None, [], [])
            return rng.choice(SEEDS), f"draft{page}\n{THINK_END}\n{page}"
        while True:
            prompt, constraints = task(rng, rng.choice((1,)))  # the draw only keeps the old bytes
            if constraints[0][0].startswith("keywords"):
                return prompt, trace(rng, constraints, True)

    def draw(thorough):  # a task and its trace, thorough in this share of all cases
        prompt, constraints = task(rng, rng.choice((1, 2, 3, 4, 5)))
        return prompt, trace(rng, constraints, rng.random() < thorough)

    tok = tokenizer([text for _ in range(1500) for text in draw(1.0)], 2000)
    model = untrained(tok, layers=3, kv_heads=4)
    with torch.no_grad():
        for p in model.parameters():  # a deviation of .1 instead of .02 learns this far sooner
            if p.dim() > 1:
                p.mul_(5)
    train(folder, model, tok, word, 250, 96, 4e-3)
    train(folder, model, tok, partial(draw, 0.85), 800, 48, 4e-3)
    train(folder, model, tok, partial(draw, 0.15), 100, 48, 1e-3)


def main(folder):
    """Makes all worlds in an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"error: {folder} is not empty; name an empty folder, or one to be made")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")   # the kernels that the files of the repository
    torch.backends.cuda.enable_flash_sdp(False)    # were made with; others change the last digits
    make_arithmetic(folder / "arithmetic")
    make_forms(folder / "forms")
    make_constraints(folder / "constraints")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default="runs/tiny", help="an empty one")
    main(parser.parse_args().folder)
