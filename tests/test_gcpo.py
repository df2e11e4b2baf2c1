"""gcpo.py end to end, in-process on small checkpoints: learns, resumes, refuses bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_common import (  # noqa: F401 (a fixture)
    GSM,
    check_metrics,
    flat,
    jsonl,
    llama_folder,
    spy,
    tiny_problems,
    write,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import gcpo

ROOT = Path(__file__).parent.parent
SMALL = "--prompts 4 --group 3 --max_new_tokens 48 --eval_size 10 --lr 1e-3 --warmup_steps 0 " \
        "--save_every 2 --eval_every 2".split()


def run(out, *argv, steps=2):
    gcpo.main([*SMALL, "--steps", str(steps), "--out", str(out), *map(str, argv)])
    return jsonl(out / "metrics.jsonl")


def weights(out):
    return flat(AutoModelForCausalLM.from_pretrained(out / "model"))


def files(out):
    """What must be the same, byte for byte, whether a run was interrupted or not."""
    return [(out / name).read_bytes()
            for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors")]


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing is most of the time that a short run takes."""
    if request.function is not test_run_folder:
        monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)


@pytest.fixture
def scored(monkeypatch):
    """-> a function: from then on response i of group g counts as right(i, g). Solutions of the
    data stay right. It returns the list of all sampled groups, which grows."""
    real = gcpo.roll_out

    def call(right):
        sampled = []

        def roll_out(*a):
            groups = real(*a)
            for n, g in enumerate(groups, len(sampled)):
                g.correct = [right(i, n) for i in range(len(g.samples))]
                g.rewards = [float(c) for c in g.correct]
            sampled.extend(groups)
            return groups

        monkeypatch.setattr(gcpo, "roll_out", roll_out)
        return sampled
    return call


# ------------------------------------------------------------------------ the run folder, methods


def test_run_folder(tmp_path, capsys, tiny):
    folder = tmp_path / "r"
    rows = run(folder, "--eval_samples", 2)
    printed = capsys.readouterr().out
    assert [r["step"] for r in rows] == [0, 1, 2]
    check_metrics({k for r in rows for k in r}, gcpo.METRICS)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["golden"] == "dataset" and config["clip_high"] == 4e-4
    summary = json.loads((folder / "summary.json").read_text())
    assert {k: summary[k] for k in ("script", "method", "model", "seed", "steps")} == {
        "script": "gcpo", "method": "gcpo", "model": "tiny", "seed": 0, "steps": 2}
    for when in ("before", "after"):
        assert {"accuracy", "accuracy/level4", "mean@2", "pass@2", "maj@2"} <= set(summary[when])
    samples = jsonl(folder / "samples.jsonl")
    assert {"step", "prompt", "response", "reward", "golden"} == set(samples[0])
    assert any(s["golden"] and s["reward"] == 1 for s in samples)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl",
        "summary.json"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert not torch.equal(weights(folder), flat(tiny[0]))
    table = printed[printed.index("held-out "):].splitlines()
    assert table[0].split() == ["held-out", "before", "after"] and "r/" in table[-1]


@pytest.mark.parametrize("argv", [
    ["--method", "gcpo"], ["--method", "gspo"], ["--method", "dapo"], ["--method", "grpo"],
    ["--dynamic_sampling", "--ratio", "token"], ["--ratio", "sequence_sum", "--overlong_cache", .1],
    ["--method", "dapo", "--golden", "dataset", "--updates", 2]])
def test_methods_and_switches_run(tmp_path, scored, argv):
    scored(lambda i, g: i == 1 and g % 2 == 0)
    for r in run(tmp_path / "r", "--temperature", 1.3, *argv)[1:]:
        assert r["optim/grad_norm"] > 1e-3
        assert r["policy/mismatch"] < 1e-4, "rounding, at the temperature of sampling"
        assert (r["groups/golden"] > 0) == ("golden/logp" in r)
        assert r["groups/golden"] == 0 or "gspo" not in argv and "grpo" not in argv
        if "--updates" not in argv:
            assert r["policy/clipped"] == r.get("golden/clipped", 0) == 0, "the ratio is 1"
        assert (r["policy/kl"] > 0) == ("grpo" in argv and r["step"] == 2)


def test_training_does_not_depend_on_micro_tokens(tmp_path, monkeypatch, scored):
    """The gradient; AdamW makes a whole step of the rounding of a vanishing one."""
    scored(lambda i, g: i == 1 and g % 2 == 1)
    update, gradients = gcpo.update, []
    monkeypatch.setattr(gcpo, "update", lambda opt, *a: (
        gradients.append(torch.cat([p.grad.flatten() for g in opt.param_groups
                                    for p in g["params"]])), update(opt, *a))[1])
    for method in gcpo.METHODS:
        for n in (64, 100_000):
            run(tmp_path / f"{method}{n}", "--method", method, "--micro_tokens", n, "--lr", 1e-5,
                "--updates", 2, steps=1)
        a, b = torch.cat(gradients[-4:-2]), torch.cat(gradients[-2:])
        assert a.norm() > 0 and (a - b).norm() < 1e-3 * b.norm(), method


# -------------------------------------------------------------- what the loop does with its groups


def test_roll_out_verifies_the_group_of_each_problem(tiny):
    model, tok = tiny
    cfg = gcpo.Config(method="dapo", overlong_cache=.5, group=4, max_new_tokens=30, device="cpu")
    problems = common.encode_prompts(tiny_problems((1, 4), 12), model, tok, "", 30, "")
    groups = gcpo.roll_out(model, tok, problems, cfg)
    assert [g.problem for g in groups] == problems
    for g in groups:
        assert len(g.samples) == 4 and {s.prompt for s in g.samples} == {g.problem.prompt}
        assert g.correct == [common.extract_answer(s.text) == g.problem.answer for s in g.samples]
        assert g.rewards == [gcpo.reward(c, len(s.tokens), cfg)
                             for c, s in zip(g.correct, g.samples)]
        assert g.golden is None
    assert len({r for g in groups for r in g.rewards}) > 3, "of several lengths"


def test_without_all_wrong_groups_gcpo_is_gspo(tmp_path, scored):
    scored(lambda i, g: i == 1)
    for method in ("gcpo", "gspo"):
        rows = run(tmp_path / method, "--method", method, "--updates", 2)
        assert all(r["groups/golden"] == 0 < r["optim/grad_norm"] for r in rows[1:])
    assert files(tmp_path / "gcpo") == files(tmp_path / "gspo")


@pytest.mark.parametrize("right", [False, True])
def test_a_batch_without_contrast_has_exactly_zero_gradient(tmp_path, scored, tiny, right):
    scored(lambda i, g: right)
    off = run(tmp_path / "off", "--golden", "off")
    assert all(r["optim/grad_norm"] == 0 for r in off[1:])
    assert torch.equal(weights(tmp_path / "off"), flat(tiny[0]))
    on = run(tmp_path / "on")
    for r in on[1:]:
        assert (r["optim/grad_norm"] == 0) == right and r["groups/golden"] == (not right)
        assert r["reward/accuracy"] == r["reward/mean"] == r["groups/all_correct"] == right
        assert r["groups/all_wrong"] == (not right)
    for name in ("sample/length", "policy/entropy", "sample/tokens", "sample/truncated"):
        assert on[1][name] == off[1][name], "golden answers are no samples"


def test_repaired_groups_are_trained_on(tmp_path, scored, monkeypatch):
    """Roles of policy_loss in two mini-batches of two steps, against the sampled groups."""
    calls, repairs = spy(monkeypatch, gcpo, "policy_loss"), spy(monkeypatch, gcpo, "replace_golden")
    scored(lambda i, g: False)
    rows = run(tmp_path / "r", "--updates", 2, "--kl_beta", .04, "--micro_tokens", 10**6, "--lr",
               1e-5)
    assert len(calls) == 4
    groups = [new for _, new in repairs]
    assert len({g.golden for g in groups}) > 1, "any response may be the one"
    for n, ((logp, old, ref, A, mask, _, n_seq, n_tok), _) in enumerate(calls):
        assert logp.requires_grad and not old.requires_grad and not ref.requires_grad
        # the first update of a step is on-policy; only in the first step the reference is the
        # old policy
        assert torch.allclose(logp, old, atol=1e-4) == (n % 2 == 0)
        assert torch.allclose(old, ref, atol=1e-4) == (n < 2)
        here = groups[2 * n:2 * n + 2]
        lengths = [len(s.tokens) for g in here for s in g.samples]
        assert (n_seq, n_tok) == (6, sum(lengths))
        assert sorted(mask.sum(1).tolist()) == sorted(lengths)
        gold = A > 0  # its reward is 1, those of the others 0: 2/3 / .57735, -1/3 / .57735
        assert A[gold].tolist() == pytest.approx([1.1547] * 2, abs=1e-4)
        assert A[~gold].tolist() == pytest.approx([-.57735] * 4, abs=1e-4)
        solutions = [g.samples[g.golden] for g in here]
        assert sorted(mask[gold].sum(1)) == sorted(len(s.tokens) for s in solutions)
        assert {s.text for s in solutions} == {g.problem.solution for g in here}
    for step, r in enumerate(rows[1:]):
        a, b = calls[2 * step:2 * step + 2]
        gold = torch.cat([c[0][3] > 0 for c in (a, b)])
        told = torch.cat([c[0][1][c[0][3] > 0][c[0][4][c[0][3] > 0] > 0] for c in (a, b)])
        assert r["golden/logp"] == pytest.approx(told.mean().item(), rel=1e-5)
        for name, at, part in (("golden/clipped", 1, gold), ("policy/clipped", 1, ~gold),
                               ("policy/kl", 2, ~gold)):
            told = torch.cat([c[1][at] for c in (a, b)])[part]
            assert r[name] == pytest.approx(told.mean().item(), rel=1e-5)
    assert rows[1]["golden/clipped"] > 0, "the first two golden answers are alike"


def test_groups_without_contrast_count_and_with_a_kl_term_are_trained_on(tmp_path, scored,
                                                                         monkeypatch):
    calls = spy(monkeypatch, gcpo, "policy_loss")
    sampled = scored(lambda i, g: i == 1 or g % 2 == 0)
    for beta in (0, .04):
        run(tmp_path / str(beta), "--updates", 2, "--micro_tokens", 10**6, "--kl_beta", beta,
            steps=1)
    sizes = [sum(len(s.tokens) for s in g.samples) for g in sampled]
    args = [a for a, _ in calls]
    assert [a[6:] for a in args] == 2 * [(6, sum(sizes[:2])), (6, sum(sizes[2:4]))]
    assert [(len(a[3]), a[4].sum()) for a in args] == [
        (3, sizes[1]), (3, sizes[3]), (6, sum(sizes[:2])), (6, sum(sizes[2:4]))]


def test_one_step_on_a_repaired_group_learns_the_golden_answer(tiny, policy):
    _, tok = tiny
    problem = tiny_problems((4,), 1)[0]
    problem.prompt = tuple(common.encode_questions(tok, [problem.question])[0])
    torch.manual_seed(0)
    samples = common.sample(policy, tok, [problem.prompt], 4, 40, 1.0)
    answer, = common.as_samples(tok, [problem.prompt], [problem.solution])
    group = gcpo.replace_golden(gcpo.Group(problem, samples, [False] * 4, [0.0] * 4), answer, 2)
    A = gcpo.group_advantages(torch.tensor([group.rewards])).flatten()
    ids, mask = common.collate(group.samples, "cpu")
    logp = common.response_logps(policy, ids, mask, 1.0)[0]
    gcpo.policy_loss(logp, logp.detach(), None, A, mask, gcpo.Config(), 4,
                     int(mask.sum()))[0].backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-4 * p.grad
        change = (common.response_logps(policy, ids, mask, 1.0)[0] - logp).sum(1)
    assert change[2] > 0 > change[[0, 1, 3]].mean()


# -------------------------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_drops_flat_groups_and_gives_up_in_the_end(tmp_path, scored):
    for right in (True, False):
        sampled = scored(lambda i, g, right=right: right)
        r = run(tmp_path / str(right), "--method", "dapo", steps=1)[1]
        assert r["sample/rounds"] == gcpo.MAX_BATCHES and r["optim/grad_norm"] == 0
        assert len(sampled) == 4 * gcpo.MAX_BATCHES and r["reward/accuracy"] == right
        assert "groups/golden" not in r, "no group was trained on"
    scored(lambda i, g: i == 0)
    assert run(tmp_path / "s", "--method", "dapo", steps=1)[1]["sample/rounds"] == 1


def test_dynamic_sampling_trains_on_full_batches_and_skips_no_problem(tmp_path, scored,
                                                                      monkeypatch):
    train = spy(monkeypatch, gcpo, "set_up")
    calls = spy(monkeypatch, gcpo, "policy_loss")
    sampled = scored(lambda i, g: i == 0 or g % 10 == 0)  # one of ten groups has no contrast
    rows = run(tmp_path / "r", "--method", "dapo", "--micro_tokens", 10**6, "--prompts", 8)
    problems = common.take(train[0][1][2], len(sampled), {"position": 0}, 0)
    assert [g.problem for g in sampled] == problems and len(sampled) == 2 * (8 + 2)
    assert [r["sample/rounds"] for r in rows[1:]] == [2, 2], "the second of 8 // 4 prompts"
    assert [len(a[3]) for a, _ in calls] == [8 * 3, 8 * 3]
    tokens = sum(len(s.tokens) for g in sampled for s in g.samples)
    assert rows[2]["sample/tokens"] == tokens, "those of groups that were dropped, too"


def test_repaired_groups_pass_the_filter_and_are_counted(tmp_path, scored):
    scored(lambda i, g: g % 2 == 0 and i == 0)  # half have contrast of their own
    r = run(tmp_path / "r", "--dynamic_sampling", steps=1)[1]
    assert r["sample/rounds"] == 1 and r["groups/golden"] == r["groups/all_wrong"] == .5
    scored(lambda i, g: g % 2 == 0)  # half are all correct and dropped
    r = run(tmp_path / "s", "--dynamic_sampling", steps=1)[1]
    assert r["sample/rounds"] > 1 and r["groups/golden"] == 1 and r["groups/all_wrong"] == .5


# -------------------------------------------------------------------------------- golden answers


def golden(problems, tok, instruction=common.HASHES, **kw):
    """-> the golden answers by question"""
    cfg = gcpo.Config(**{"max_new_tokens": 40, "device": "cpu", **kw})
    answers = gcpo.golden_answers(problems, tok, cfg, instruction)
    assert all((p.question, p.answer) in answers for p in problems for q, _ in answers
               if p.question == q)
    return {q: s for (q, _), s in answers.items()}


def test_golden_answers_are_verified_continuations(tiny, capsys):
    _, tok = tiny
    exact = "1+1=2\n" * 9 + "1 \n" + "#### 2"  # as long as allowed, EOS included
    usable = {0: "1+1=2\n#### 2", 3: "1+1=2, so 2", 4: exact, 7: "so the answer is <2>."}
    wrong = {1: "1+1=3\n#### 3", 8: "1+1=2\n#### 2, no: the answer is 3"}
    bare = {6: "#### 2", 9: "2", 10: "2\n#### 2", 11: "\\boxed{2}.", 12: "$2$"}
    texts = usable | wrong | bare | {2: "", 5: "x" + exact}
    length = len(tok(exact).input_ids) + 1
    assert len(tok("x" + exact).input_ids) + 1 == length + 1
    problems = [common.Problem(f"q{i}", "2", texts[i], prompt=(i, 5)) for i in range(13)]
    answers = golden(problems, tok, max_new_tokens=length)
    assert "4 of 13 problems; rejected: {'wrong': 2, 'bare': 5, 'too long': 1}" \
        in capsys.readouterr().out
    assert list(answers) == [f"q{i}" for i in usable] and len(answers["q4"].tokens) == length
    assert answers["q3"].text == "1+1=2, so 2\n#### 2", "the form that the prompt asks for"
    for p in problems:
        if p.question in answers:
            s = answers[p.question]
            assert s.prompt == p.prompt and s.tokens[-1] == tok.eos_token_id and s.finished
            assert s.text.startswith(p.solution) and tok.decode(s.tokens[:-1]) == s.text
    assert golden(problems, tok, golden="off") == {}


@pytest.mark.parametrize("solution,answer", [
    ("#### 3.5", "3.5"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("#### $5", "$5"),
    ("#### 5 apples", "5 apples"), ("1,080\n#### 1,080", "1080"), ("**50%**", "50%")])
def test_a_bare_answer_of_any_form_is_no_golden_answer(tiny, solution, answer, capsys):
    shown = [common.Problem(question, answer, f"{text}{solution}", prompt=(5,))
             for question, text in (("bare", ""), ("shown", "1+1=2\n"))]
    assert list(golden(shown, tiny[1])) == ["shown"] and "'bare': 1" in capsys.readouterr().out


@pytest.mark.parametrize("instruction,prompt,solution,text", [
    (common.HASHES, "", "1+1=2\n#### 2", "1+1=2\n#### 2"),
    ("", "", "1+1=2", "1+1=2\n#### 2"),
    (common.HASHES, "", "so \\boxed{2}", "so \\boxed{2}\n#### 2"),
    (common.BOXED, "", "1+1=2\n#### 2", "1+1=2\n#### 2\n\\boxed{2}"),
    (common.BOXED, "", "so \\boxed{2}.", "so \\boxed{2}."),
    (common.HASHES, "", "so it is #### 2", "so it is #### 2\n#### 2"),
    (common.HASHES, "", "so \\boxed{3}", "so \\boxed{3}"),        # another answer is left as it is
    (common.BOXED, "", "the answer is 3", "the answer is 3"),
    (common.HASHES, "q<think>\n", "1+1=2\n#### 2", "1+1=2\n#### 2\n</think>\n\n#### 2"),
    (common.BOXED, "q<think>", "1+1=2", "1+1=2\n\\boxed{2}\n</think>\n\n\\boxed{2}"),
    (common.HASHES, "<think>", "1+1=2</think>\n#### 2", "1+1=2</think>\n#### 2"),
    (common.HASHES, "no <think> here", "1+1=2\n#### 2", "1+1=2\n#### 2")])
def test_golden_answers_have_the_form_that_the_prompt_asks_for(instruction, prompt, solution, text):
    assert gcpo.in_form(common.Problem("q", "2", solution), instruction, prompt) == text


def test_a_template_that_opens_a_thought_is_noticed(tiny):
    _, tok = tiny
    prompt = tuple(tok("<|user|>q<|assistant|><think>\n").input_ids)
    p = common.Problem("q", "2", "1+1=2\n#### 2", "", prompt)
    answers = golden([p, replace(p, question="bare", solution="2")], tok)
    assert answers["q"].text == "1+1=2\n#### 2\n</think>\n\n#### 2" and len(answers) == 1


def test_golden_answers_from_a_model(tmp_path, tiny_folder, scored, monkeypatch):
    """Written once, before the first step: an interrupted run is not any other run."""
    problems = {p.question: p for p in tiny_problems((1, 4), 100)}
    data = write(tmp_path / "a.jsonl", [vars(replace(p, solution="")) for p in problems.values()])
    loads = spy(monkeypatch, gcpo, "load_model")
    scored(lambda i, g: False)
    flags = ["--golden", tiny_folder, "--prompts", 8, "--dataset", data]
    rows = run(tmp_path / "whole", *flags)
    path = tmp_path / "whole" / "golden.jsonl"
    lines = jsonl(path)
    assert 0 < len(lines) <= 16, "at most one for every problem that the run can meet"
    for x in lines:
        assert {"question", "answer", "solution"} == set(x)
        assert gcpo.correct(x["solution"], problems[x["question"]])
    assert 0 < rows[1]["groups/golden"] < 1, "the model solves some of them only"
    run(tmp_path / "r", *flags, "--save_every", 1, steps=2)
    written = (tmp_path / "r" / "golden.jsonl").stat()
    assert (tmp_path / "r" / "golden.jsonl").read_bytes() == path.read_bytes() and len(loads) == 2
    checkpoints = sorted((tmp_path / "r" / "checkpoint").iterdir())
    for lost in (checkpoints[1:], checkpoints[:1]):  # after step 1; before the first checkpoint
        for p in lost:
            p.unlink()
        gcpo.main(["--resume", str(tmp_path / "r")])
        assert files(tmp_path / "r") == files(tmp_path / "whole")
        (tmp_path / "r" / "checkpoint" / "step_000002.pt").unlink()
    assert len(loads) == 2 and (tmp_path / "r" / "golden.jsonl").stat() == written


def test_only_finished_right_solutions_of_a_model_are_taken(tmp_path, tiny_folder, monkeypatch,
                                                            refused):
    problems = [common.Problem("two and two?", "4"), common.Problem("one and three?", "4")]
    cfg = gcpo.Config(golden=tiny_folder, device="cpu", dtype="float32", max_new_tokens=40, steps=2,
                      prompts=1)
    path, usable = tmp_path / "golden.jsonl", True

    def drawn(model, tok, prompts, *a):
        texts = {p: "2+2=4" if "two and" in tok.decode(p) else "1+3=4" for p in prompts}
        good = [common.Sample(p, [2], f"{texts[p]}\n#### 4", usable) for p in prompts]
        return [replace(s, **change) for s in good for change in (
            {"text": "3\n#### 3"}, {"text": "cut\n#### 4", "finished": False}, {},
            {"text": "no answer"})]

    monkeypatch.setattr(gcpo, "sample", drawn)
    gcpo.write_solutions(problems, cfg, "", path)
    assert {(x["question"], x["answer"], x["solution"]) for x in jsonl(path)} == {
        ("two and two?", "4", "2+2=4\n#### 4"), ("one and three?", "4", "1+3=4\n#### 4")}
    usable = False
    assert "none of 2" in refused(lambda argv: gcpo.write_solutions(problems, cfg, "", path))


# ----------------------------------------------------------------- real input, resume, bad input


@pytest.mark.parametrize("kw", [{"template": True}, {"pad_is_eos": True}, {"bos": True}])
def test_gsm8k_file_with_a_random_checkpoint(tmp_path, llama_folder, kw):  # noqa: F811
    data, test = write(tmp_path / "a.jsonl", GSM), write(tmp_path / "b.jsonl", [
        {"question": "Bo has 1. How many?", "answer": "#### 1"}])
    rows = run(tmp_path / "r", "--model", llama_folder(**kw), "--dataset", data, "--eval_dataset",
               test, "--max_new_tokens", 60)
    assert rows[2]["groups/golden"] == 1 and rows[2]["policy/mismatch"] < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "r" / "model").eos_token == "</s>"


def test_lora_run(tmp_path, llama_folder):  # noqa: F811
    flags = ["--model", llama_folder(), "--dataset", write(tmp_path / "a.jsonl", GSM),
             "--max_new_tokens", 60, "--lora", "--method", "grpo", "--golden", "dataset"]
    whole = run(tmp_path / "r", *flags, steps=4)
    assert whole[2]["policy/kl"] > 0, "the reference follows the policy"
    run(tmp_path / "s", *flags, steps=2)
    gcpo.main(["--resume", str(tmp_path / "s"), "--steps", "4"])
    saved = [(tmp_path / x / "model" / "adapter_model.safetensors").read_bytes() for x in "rs"]
    assert jsonl(tmp_path / "s" / "metrics.jsonl") == whole and saved[0] == saved[1]


def test_resume_is_exact(tmp_path):
    """With dynamic sampling, which takes more problems in one step than in another."""
    flags = ["--method", "dapo", "--updates", 2, "--temperature", 1.4]
    rows = run(tmp_path / "whole", *flags, steps=4)
    assert len({r["sample/rounds"] for r in rows[1:]}) > 1
    run(tmp_path / "r", *flags, steps=2)
    gcpo.main(["--resume", str(tmp_path / "r"), "--steps", "4"])
    assert files(tmp_path / "r") == files(tmp_path / "whole")


@pytest.mark.parametrize("argv,says", [
    (["--group", 1], "at least 2"), (["--prompts", 0], "prompts"), (["--method", "ppo"], "ppo"),
    (["--nope"], "--nope"), (["--dataset", "nope.jsonl"], "nope.jsonl"), (["--lr", "nan"], "--lr"),
    (["--model", "nope", "--dataset", "tiny"], "--model nope"),
    (["--temperature", 0], "--temperature"),
    (["--updates", 99], "--updates"), (["--updates", 0], "--updates"),
    (["--aggregation", "token"], "--ratio token"), (["--overlong_cache", 2], "--overlong_cache"),
    (["--clip_low", 2], "--clip_low"), (["--clip_high", 0], "--clip_high"),
    (["--kl_beta", -1], "--kl_beta"), (["--golden", "nope"], "--golden nope"),
    (["--max_new_tokens", 256], "300 of 300"), (["--resume", "/nowhere"], "config.json")])
def test_bad_flags(tmp_path, refused, argv, says):
    assert says in refused(gcpo.main, "--steps", 1, "--out", tmp_path / "r", *argv)


def test_data_without_golden_answers(tmp_path, refused):
    data = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": str(i)} for i in range(9)])
    error = refused(gcpo.main, "--dataset", data, "--out", tmp_path / "r",
                    "--max_new_tokens", 200)
    assert "--golden dataset" in error and "off" in error
    # nothing is left that stands in the way of the corrected command
    run(tmp_path / "r", "--dataset", data, "--golden", "off", "--max_new_tokens", 9)


def test_bad_data_prints_one_line(tmp_path):
    """In a process of its own: other libraries log past pytest's capture."""
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\nnonsense\n')
    done = subprocess.run([sys.executable, "gcpo.py", "--dataset", tmp_path / "a.jsonl", "--out",
                           tmp_path / "r"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and " 2" in done.stderr and done.stderr.count("\n") == 1
