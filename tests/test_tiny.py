"""tiny/: the files are what make.py makes, the worlds are what they say, and the weights are those
that README.md names."""

import hashlib
import json
import random
import re
from pathlib import Path

import make
import pytest
import torch

import carft
import common
import gcpo
import light_if
import temporal_sr

TINY = Path(make.__file__).parent  # the whole of it, which the fixtures shorten
WORLDS = {"arithmetic": make.arithmetic_data, "forms": make.forms_data,
          "constraints": make.constraints_data}


def rows(name):
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", WORLDS)
def test_the_data_are_what_make_makes(world, tmp_path):
    WORLDS[world](tmp_path)
    made = sorted(tmp_path.glob("*.jsonl"))
    assert [p.name for p in made] == sorted(p.name for p in (TINY / world).glob("*.jsonl"))
    assert (world == "forms") == (tmp_path / "words.json").exists()
    for path in made:
        assert path.read_bytes() == (TINY / world / path.name).read_bytes(), path.name


def test_the_weights_are_those_of_the_readme():
    sums = dict(re.findall(r"`(\w+(?:/\w+)?)/model.safetensors` *\| *`(\w{64})`",
                           (TINY / "README.md").read_text()))
    assert sums.keys() == {"arithmetic", "constraints", "forms/M_0", "forms/base"}
    for name, known in sums.items():
        weights = (TINY / name / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == known, name


def test_the_folder_is_small_and_make_is_readable():
    tracked = [p for p in TINY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in tracked) < 12e6
    assert len((TINY / "make.py").read_text().splitlines()) <= 450


def test_make_never_writes_into_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="is not empty"):
        make.main(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# -------------------------------------------------------------------------------------- arithmetic


def test_sums_are_right_distinct_and_held_out():
    train, test = rows("arithmetic/train"), rows("arithmetic/test")
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    for problems in (train, test):
        assert len({p["question"] for p in problems}) == len(problems)
        assert {p["level"] for p in problems} == set("12345")
        for p in problems:
            *steps, last = p["solution"].split("\n")
            assert len(steps) == int(p["level"]) == p["question"].count(",")
            total = re.search(r"has (\d+)", p["question"])[1]
            for step in steps:
                left, right = step.split("=")
                assert left.startswith(total) and eval(left) == int(right) >= 0
                total = right
            assert last == f"#### {total}" and p["answer"] == total


def test_half_of_the_annotators_are_terse_and_right():
    train, test = rows("arithmetic/annotated"), rows("arithmetic/annotated_test")
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    terse = 0
    for p in train + test:
        *steps, last = p["solution"].split("\n")
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        two = [len(re.findall("[+-]", step)) == 2 for step in steps]
        assert sum(map(len, re.findall("[+-]", p["solution"]))) == int(p["level"])
        assert two in ([False] * int(p["level"]), [True] * (int(p["level"]) // 2)
                       + [False] * (int(p["level"]) % 2))
        assert last == f"#### {p['answer']}"
        terse += any(two)
    assert .45 < terse / 3000 < .55


# ------------------------------------------------------------------------------------------- forms


def test_forms_are_of_three_kinds_that_share_none():
    parts = [{row["prompt"] for row in rows(f"forms/{name}")} for name in
             ("ift", "prompts", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert {row["prompt"] for row in rows("forms/eft")} <= parts[0]
    for prompt in set.union(*parts):
        assert prompt.startswith(temporal_sr.FORM)
        names = prompt.split("\n")[1:]
        assert temporal_sr.is_form(prompt) and len(set(names)) == temporal_sr.SLOTS


def test_authors_and_judgements():
    answers = [temporal_sr.form_grade(r["prompt"], r["response"]) for r in rows("forms/ift")]
    assert sum(answers) / len(answers) == pytest.approx(5 * sum(make.AUTHORS) / 3, abs=.05)
    wrong = verdicts = 0
    for row in rows("forms/eft"):
        *lines, last = row["judgement"].split("\n")
        oks = [line.split()[-1] == "ok" for line in lines]
        truth = temporal_sr.verdicts(row["prompt"], row["response"])
        assert temporal_sr.parse_score(row["judgement"]) == sum(oks) and last.startswith("Score: ")
        wrong += sum(a != b for a, b in zip(oks, truth))
        verdicts += len(truth)
    assert wrong / verdicts == pytest.approx(make.JUDGE_NOISE, abs=.01)
    grades = [temporal_sr.form_grade(r["prompt"], r["response"]) for r in rows("forms/eft")]
    assert min(map(grades.count, range(6))) > 8000 / 6 * .9, "all grades are alike often"


# ------------------------------------------------------------------------------------- constraints


def held_out(kinds):
    """Is no task with this combination of kinds ever trained on?"""
    return make.is_held_out(f"light_if {' '.join(sorted(kinds))}", 1 / 4) and len(kinds) > 1


def test_prompts_and_their_held_out_combinations():
    kinds = {}
    for name in ("train", "test"):
        tasks = light_if.to_tasks(rows(f"constraints/{name}"), name)
        for n, task in enumerate(tasks):
            size = len(task.constraints)
            assert size == 1 + n % 5 and not light_if.conflict(task.constraints)
            assert task.level == ("1_seen" if name == "test" and size == 1 else str(size))
            for cue in task.cues:
                assert len(re.findall(cue, task.question)) == 1
        kinds[name] = {tuple(sorted(kind for kind, _ in t.constraints)) for t in tasks}
    assert not any(map(held_out, kinds["train"]))
    assert all(map(held_out, (k for k in kinds["test"] if len(k) > 1)))
    assert {len(k) for k in kinds["train"] & kinds["test"]} == {1}
    several = [k for k in kinds["train"] | kinds["test"] if len(k) > 1]
    assert .15 < sum(map(held_out, several)) / len(several) < .35


def some_tasks(number, seed):
    rng = random.Random(seed)
    return rng, [make.task(rng, 1 + n % 5)[1] for n in range(number)]


def test_revise_does_what_it_is_told():
    rng, tasks = some_tasks(400, 0)
    made = changed = 0
    for constraints in tasks:
        met = [rng.random() < 0.6 for _ in constraints]
        page = make.revise(rng, None, constraints, met)
        if not page:
            continue
        made += 1
        before = str(page)
        assert light_if.follow(before, constraints) == met
        words = [x not in make.JOINTS for x in page.items]
        assert words[0] and words[-1], "a joint stands between two words"
        assert all(a or b for a, b in zip(words, words[1:]))
        after = make.revise(rng, page, constraints, [True] * len(met))
        assert str(page) == before, "it changes a copy"
        if after:
            changed += 1
            assert all(light_if.follow(str(after), constraints))
            assert all(met) <= (str(after) == before), "with as few changes as it takes"
    assert made > 380 and changed > 380
    page = make.Page(["red", ",", "[x]", "***", "cat"], True, True)
    assert str(page) == '" RED, [x] *** CAT"'


def test_traces():
    rng, tasks = some_tasks(500, 2)
    right = {True: [], False: []}
    for constraints in tasks:
        cues = [rf"\b{tag}\b" for tag in make.tags(constraints)]
        for thorough in (True, False):
            text = make.trace(rng, constraints, thorough)
            thinking, answer = light_if.split_thinking(text)
            assert light_if.depth(text, cues) == thorough, text
            right[thorough].append(all(light_if.follow(answer, constraints)))
            drafts = re.findall("draft(.*?) check", thinking)
            assert bool(drafts) == thorough
            if thorough:
                assert drafts[-1].strip() == answer and len(drafts) <= 3
                last = thinking.split(" check ")[-1].split()
                assert last[::3] == make.tags(constraints)
                assert [x == "ok" for x in last[2::3]] == light_if.follow(answer, constraints)
    assert sum(right[True]) > 470 and 120 < sum(right[False]) < 240  # .65 ** 1..5: .33


# --------------------------------------------------------------------------------- the models


def loaded(world, script):
    return common.load_model(str(TINY / world), script.Config(device="cpu", dtype="float32"))


def test_the_arithmetic_model_solves_what_it_has_seen():
    policy, tok = loaded("arithmetic", gcpo)
    problems = [common.Problem(**row) for row in rows("arithmetic/test")[:100]]
    problems = common.encode_prompts(problems, policy, tok, "", 64, "test")
    result, *_ = common.evaluate(policy, tok, problems, gcpo.parse([]), gcpo.correct)
    assert result["accuracy/level1"] == result["accuracy/level2"] == 1
    assert result["accuracy/level5"] < .2 < .9 < result["accuracy/level3"] + .1


def test_m_0_is_a_good_judge_that_errs(monkeypatch):
    """On the grades that it was not told, over a hundred answers of its own."""
    monkeypatch.setattr(common, "TINY_FOLDER", TINY)
    policy, tok = loaded("forms/M_0", temporal_sr)
    cfg = temporal_sr.parse(["--eval_samples", "4"])
    *_, held_out = temporal_sr.load_data(cfg)
    held_out = common.encode_prompts(held_out[:100], policy, tok, "", cfg.max_new_tokens, "test")
    models = temporal_sr.Models(policy, tok, None, cfg)
    result = temporal_sr.Grader(models, models.snapshot(), held_out, cfg).evaluate()
    assert .74 < result["judge_order"] < .82 and .6 < result["judge_error"] < .85
    assert 2.3 < result["grade"] < 3


def test_the_lazy_model_can_check():
    policy, tok = loaded("constraints", light_if)
    tasks = light_if.to_tasks(rows("constraints/test")[:100], "test")
    cfg = light_if.parse(["--eval_samples", "1"])
    result = light_if.evaluate(policy, tok, light_if.render(policy, tok, tasks, "test", cfg), cfg)
    assert .05 < result["checked"] < .3 and .1 < result["accuracy"] < .4


# --------------------------------------------------------------------------------- the two names


def test_all_rows_are_used_in_their_order(monkeypatch):
    """Single constraints stand in both files of their world; no row is left out for that."""
    monkeypatch.setattr(common, "TINY_FOLDER", TINY)
    tasks, held_out = light_if.load_data(light_if.parse([]))
    assert [t.question for t in tasks] == [r["prompt"] for r in rows("constraints/train")]
    assert len(held_out) == 300
    _, _, prompts, held_out = temporal_sr.load_data(temporal_sr.parse([]))
    assert (len(prompts), len(held_out)) == (4862, 886)
    for script, part in ((gcpo, "train"), (carft, "annotated")):
        problems, _ = common.load_problems(script.parse([]))
        assert [vars(p) | {"prompt": ()} for p in problems] == [
            {**row, "prompt": ()} for row in rows(f"arithmetic/{part}")]


@pytest.mark.parametrize("world", ["arithmetic", "constraints", "forms/M_0", "forms/base"])
def test_a_model_folder_is_an_ordinary_one(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY / world)
    tok = AutoTokenizer.from_pretrained(TINY / world)
    assert model.dtype == torch.float32 and len(tok) == model.config.vocab_size
    text = "12-5=7\n#### 7 figs, two  spaces</think>"
    assert tok.decode(tok(text).input_ids) == text
    assert common.trained_prompt(model, "instruction") == ""
    assert (common.trained_prompt(model, "judge") == make.JUDGE) == world.startswith("forms")
