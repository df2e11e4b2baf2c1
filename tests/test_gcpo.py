"""gcpo.py end to end, in-process on small checkpoints: learns, resumes, refuses bad input."""

import json
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_common import (  # noqa: F401 (a fixture)
    GSM,
    check_metrics,
    flat,
    jsonl,
    llama_folder,
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


# --------------------------------------------------------------------------------- the run folder


def test_run_folder(tmp_path, capsys, tiny):
    rows = run(tmp_path / "r", "--eval_samples", 2)
    folder = tmp_path / "r"
    printed = capsys.readouterr().out
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert all(isinstance(v, (int, float)) for r in rows for v in r.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["golden"] == "dataset" and config["config"]["clip_high"] == 4e-4
    assert torch.__version__.startswith(config["versions"]["torch"]) and config["device"] == "cpu"
    summary = json.loads((folder / "summary.json").read_text())
    assert {k: summary[k] for k in ("script", "method", "model", "seed", "steps")} == {
        "script": "gcpo", "method": "gcpo", "model": "tiny", "seed": 0, "steps": 2}
    for when in ("before", "after"):
        assert {"accuracy", "accuracy/level4", "mean@2", "pass@2", "maj@2"} <= set(summary[when])
    samples = jsonl(folder / "samples.jsonl")
    assert {"step", "prompt", "response", "reward", "golden"} == set(samples[0])
    assert any(s["golden"] and s["reward"] == 1 for s in samples)
    assert (folder / "curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl",
        "summary.json"]
    tok = AutoTokenizer.from_pretrained(folder / "model")
    text = "12-5=7\n#### 7 figs, two  spaces"
    assert tok.decode(tok(text).input_ids) == text
    assert not torch.equal(weights(folder), flat(tiny[0]))
    table = printed[printed.index("held-out"):].splitlines()
    assert table[0].split() == ["held-out", "before", "after"] and "r/" in table[-1]


def test_every_declared_metric_is_logged(tmp_path):
    names = {k for method, extra in (("gcpo", []), ("grpo", ["--updates", "2"]))
             for r in run(tmp_path / method, "--method", method, *extra) for k in r}
    check_metrics(names, gcpo.METRICS)


@pytest.mark.parametrize("argv", [
    ["--method", "gspo"], ["--method", "dapo"], ["--method", "grpo", "--updates", 2],
    ["--dynamic_sampling", "--ratio", "token"], ["--golden_old", "one", "--golden_clip", "false"],
    ["--ratio", "sequence_sum", "--updates", 4, "--overlong_cache", 5]])
def test_methods_and_switches_run(tmp_path, argv):
    for r in run(tmp_path / "r", *argv)[1:]:
        assert r["optim/grad_norm"] >= 0 and abs(r["loss/total"]) < 100


def test_one_update_has_ratio_one_and_no_loss(tmp_path):
    for r in run(tmp_path / "r", "--prompts", 8)[1:]:
        assert abs(r["loss/total"]) < 1e-5 < r["optim/grad_norm"]
        assert r["policy/clipped"] == 0 and r["golden/clipped"] == 0
        assert r["policy/mismatch"] < 1e-4  # rounding, at logits of up to 30


def test_several_updates_move_the_ratio_and_clip_the_golden_answer(tmp_path):
    r = run(tmp_path / "r", "--prompts", 8, "--updates", 4, steps=1)[1]
    assert r["golden/clipped"] > 0 and r["policy/clipped"] > 0
    free = run(tmp_path / "free", "--prompts", 8, "--updates", 4, "--golden_clip", "false",
               steps=1)[1]
    assert free["golden/clipped"] == 0 < free["policy/clipped"]


# ----------------------------------------------------------------- GCPO against GSPO, exactly


def all_correct(monkeypatch, right):
    """Every sampled response is scored `right`; solutions of the data stay right."""
    real = gcpo.roll_out

    def scored(*a):
        groups = real(*a)
        for g in groups:
            g.correct = [right(i) for i in range(len(g.samples))]
            g.rewards = [float(c) for c in g.correct]
        return groups

    monkeypatch.setattr(gcpo, "roll_out", scored)


def test_without_all_wrong_groups_gcpo_is_gspo(tmp_path, monkeypatch):
    all_correct(monkeypatch, lambda i: i == 1)
    for method in ("gcpo", "gspo"):
        rows = run(tmp_path / method, "--method", method, "--updates", 2)
        assert all(r["groups/golden"] == 0 < r["optim/grad_norm"] for r in rows[1:])
    same = [(tmp_path / m / "metrics.jsonl").read_text() for m in ("gcpo", "gspo")]
    assert same[0] == same[1]
    assert torch.equal(weights(tmp_path / "gcpo"), weights(tmp_path / "gspo"))


@pytest.mark.parametrize("right", [False, True])
def test_a_batch_without_contrast_has_exactly_zero_gradient(tmp_path, monkeypatch, tiny, right):
    all_correct(monkeypatch, lambda i: right)
    off = run(tmp_path / "off", "--golden", "off")
    assert all(r["optim/grad_norm"] == 0 and r["loss/total"] == 0 for r in off[1:])
    assert torch.equal(weights(tmp_path / "off"), flat(tiny[0]))
    on = run(tmp_path / "on")
    assert all((r["optim/grad_norm"] == 0) == right for r in on[1:])
    assert all(r["groups/golden"] == (0 if right else 1) for r in on[1:])


def test_golden_answers_stay_out_of_the_statistics(tmp_path, monkeypatch):
    all_correct(monkeypatch, lambda i: False)
    r = run(tmp_path / "r", steps=1)[1]
    assert r["reward/accuracy"] == r["reward/mean"] == 0 and r["groups/all_wrong"] == 1
    off = run(tmp_path / "off", "--golden", "off", steps=1)[1]
    for name in ("sample/length", "policy/entropy", "sample/tokens", "sample/truncated"):
        assert r[name] == off[name]


def test_dynamic_sampling_drops_flat_groups_and_gives_up_in_the_end(tmp_path, monkeypatch, capsys):
    for right in (True, False):
        all_correct(monkeypatch, lambda i, right=right: right)
        r = run(tmp_path / str(right), "--method", "dapo", steps=1)[1]
        assert r["sample/rounds"] == gcpo.MAX_BATCHES and r["optim/grad_norm"] == 0
        assert "step 1: only 0 of 40 sampled groups have contrast" in capsys.readouterr().out
    all_correct(monkeypatch, lambda i: i == 0)
    assert run(tmp_path / "s", "--method", "dapo", steps=1)[1]["sample/rounds"] == 1


def test_dynamic_sampling_skips_no_problem(tmp_path, monkeypatch):
    real, stream, asked, starts = gcpo.roll_out, gcpo.problem_stream, [], []

    def half_flat(*a):
        groups = real(*a)
        for i, g in enumerate(groups):
            g.correct = [i % 2 == 0, True, True]
        asked.extend(g.problem.question for g in groups)
        return groups

    monkeypatch.setattr(gcpo, "roll_out", half_flat)
    monkeypatch.setattr(gcpo, "problem_stream", lambda train, *a: starts.append(train) or
                        stream(train, *a))
    run(tmp_path / "r", "--method", "dapo")
    expected = [p.question for p in islice(stream(starts[0], 0, 0), len(asked))]
    assert asked == expected and len(asked) > 8


def test_repaired_groups_pass_the_filter(tmp_path, monkeypatch):
    all_correct(monkeypatch, lambda i: False)
    r = run(tmp_path / "r", "--dynamic_sampling", steps=1)[1]
    assert r["sample/rounds"] == 1 and r["groups/golden"] == 1


def test_micro_batches_are_small_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for flags, size in (([], 1024), (["--device", "cuda"], 2048), (["--micro_tokens", "77"], 77)):
        assert gcpo.parse(flags).micro_tokens == size


@pytest.mark.parametrize("method", ["gcpo", "dapo", "grpo"])
def test_training_does_not_depend_on_micro_tokens(tmp_path, method):
    found = []
    for n in (64, 100_000):
        rows = run(tmp_path / str(n), "--method", method, "--micro_tokens", n, "--updates", 2,
                   steps=1)
        found.append((rows[1]["optim/grad_norm"], weights(tmp_path / str(n))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-4


def spy(monkeypatch):
    """Records the arguments of every policy_loss."""
    real, calls = gcpo.policy_loss, []

    def recorded(*a, **k):
        calls.append(a)
        return real(*a, **k)

    monkeypatch.setattr(gcpo, "policy_loss", recorded)
    return calls


def test_normalisers_count_the_whole_mini_batch(tmp_path, monkeypatch):
    all_correct(monkeypatch, lambda i: i == 1)
    real, calls = gcpo.roll_out, spy(monkeypatch)
    sizes = []

    def half_flat(*a):  # of each mini-batch of two groups, one has no contrast and still counts
        groups = real(*a)
        for g in groups[::2]:
            g.correct, g.rewards = [True] * 3, [1.0] * 3
        sizes.extend(sum(len(s.tokens) for s in g.samples) for g in groups)
        return groups

    monkeypatch.setattr(gcpo, "roll_out", half_flat)
    run(tmp_path / "r", "--updates", 2, "--micro_tokens", 10**6, steps=1)
    assert [(c[6], c[7]) for c in calls] == [(6, sum(sizes[:2])), (6, sum(sizes[2:]))]
    assert [int(c[4].sum()) for c in calls] == [sizes[1], sizes[3]]
    assert [len(c[3]) for c in calls] == [3, 3]


def test_old_probability_one_is_for_golden_answers_only(tmp_path, monkeypatch):
    calls = spy(monkeypatch)
    r = run(tmp_path / "r", "--golden_old", "one", "--micro_tokens", 10**6, "--prompts", 8, steps=1)
    (logp, old, _, A, mask, *_), = calls
    golden = (old == 0).all(1)
    assert 0 < golden.sum() < len(golden) and (A[golden] > 0).all()
    assert torch.equal(old[~golden], logp[~golden].detach())
    assert r[1]["golden/logp"] < 0, "the log-prob under the policy, not the stand-in"


def test_one_step_on_a_repaired_group_learns_the_golden_answer(tiny, policy):
    _, tok = tiny
    problem = tiny_problems((4,), 1)[0]
    problem.prompt = tuple(common.encode_questions(tok, [problem.question])[0])
    torch.manual_seed(0)
    samples = common.sample(policy, tok, [problem.prompt], 4, 40, 1.0)
    group = gcpo.Group(problem, samples, [False] * 4, [0.0] * 4)
    answer, = common.as_samples(tok, [problem.prompt], [problem.solution])
    group = gcpo.replace_golden(group, answer, 2)
    A = gcpo.group_advantages(torch.tensor([group.rewards])).flatten()
    ids, mask = common.collate(group.samples, "cpu")
    cfg = gcpo.Config(**gcpo.METHODS["gcpo"])
    logp = common.response_logps(policy, ids, mask, 1.0)[0]
    loss, _, _ = gcpo.policy_loss(logp, logp.detach(), None, A, mask, cfg, 4, int(mask.sum()))
    loss.backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-4 * p.grad
        change = (common.response_logps(policy, ids, mask, 1.0)[0] - logp).sum(1)
    assert change[2] > 0 > change[[0, 1, 3]].mean()


# -------------------------------------------------------------------------------- golden answers


def golden(problems, tok, tmp_path, instruction="", **kw):
    cfg = gcpo.Config(**{"golden": "dataset", "max_new_tokens": 40, "device": "cpu", **kw})
    found = gcpo.golden_answers(problems, tok, cfg, SimpleNamespace(folder=tmp_path), instruction)
    assert all(p.answer == a for p in problems for q, a in found if q == p.question)
    return {q: s for (q, a), s in found.items()}


def test_golden_answers_are_verified_continuations(tiny, tmp_path, capsys):
    _, tok = tiny
    exact = "1+1=2\n" * 9 + "1 \n" + "#### 2"  # as long as allowed, EOS included
    texts = ["1+1=2\n#### 2", "1+1=3\n#### 3", "", "1+1=2, so 2", exact, "x" + exact, "#### 2",
             "1+1=2, so the answer is <2>."]
    length = len(tok(exact).input_ids) + 1
    assert len(tok("x" + exact).input_ids) + 1 == length + 1
    problems = [common.Problem(f"q{i}", "2", t, prompt=(i, 5)) for i, t in enumerate(texts)]
    found = golden(problems, tok, tmp_path, max_new_tokens=length)
    assert list(found) == ["q0", "q3", "q4", "q7"]
    assert len(found["q4"].tokens) == length
    assert found["q3"].text == "1+1=2, so 2\n#### 2", "D15: the form that the prompt asks for"
    assert found["q7"].text == "1+1=2, so the answer is <2>.\n#### 2"
    assert found["q0"].prompt == problems[0].prompt and found["q0"].tokens[-1] == tok.eos_token_id
    assert found["q0"].text == texts[0]
    assert "4 of 8 problems; rejected: 1 fail the verifier, 1 are longer than --max_new_tokens, " \
        "1 have no reasoning; 1 have no solution" in capsys.readouterr().out
    boxed = golden(problems[:1], tok, tmp_path, instruction=common.BOXED, max_new_tokens=99)
    assert boxed["q0"].text == "1+1=2\n#### 2\n\\boxed{2}"
    assert golden(problems, tok, tmp_path, golden="off") == {}


def test_golden_answer_closes_a_thought_that_the_template_opened(tiny, tmp_path):
    _, tok = tiny
    prompt = tuple(tok("<|user|>q<|assistant|><think>\n").input_ids)
    p = common.Problem("q", "2", "1+1=2\n#### 2", "", prompt)
    assert golden([p], tok, tmp_path)["q"].text == "1+1=2\n#### 2\n</think>\n\n#### 2"


def test_golden_answers_from_a_model(tmp_path, tiny_folder, monkeypatch):
    problems = tiny_problems((1, 4), 100)
    data = write(tmp_path / "a.jsonl", [vars(p) for p in problems])
    flags = ["--golden", tiny_folder, "--prompts", 8, "--dataset", data]
    rows = run(tmp_path / "r", *flags)
    lines = jsonl(tmp_path / "r" / "golden.jsonl")
    problems = {p.question: p for p in problems}
    right = [x for x in lines if x["text"]]
    assert len(lines) == 16, "one line for every problem that the run can meet"
    assert {"model", "question", "answer", "text"} == set(lines[0]) and right
    assert all(gcpo.correct(x["text"], problems[x["question"]]) for x in right)
    assert rows[-1]["step"] == 2
    calls = []
    monkeypatch.setattr(gcpo, "load_model",
                        lambda *a, **k: calls.append(a[0]) or common.load_model(*a))
    gcpo.main(["--resume", str(tmp_path / "r")])
    assert calls == [], "the golden answers were generated again"
    # killed while they were written: the same command goes on where it was
    (tmp_path / "s").mkdir()
    cut = "".join(json.dumps(x) + "\n" for x in lines[:5]) + '{"question": "half a l'
    (tmp_path / "s" / "golden.jsonl").write_text(cut)
    assert run(tmp_path / "s", *flags) == rows
    assert calls == [tiny_folder]
    assert jsonl(tmp_path / "s" / "golden.jsonl")[5:] == lines


def test_a_truncated_answer_of_the_model_is_no_golden_answer(tmp_path, tiny_folder, monkeypatch):
    problem, = tiny_problems((1,), 1)
    cfg = gcpo.Config(golden=tiny_folder, device="cpu", max_new_tokens=40, steps=1, prompts=1)
    for finished in (False, True):
        monkeypatch.setattr(gcpo, "sample", lambda *a, finished=finished: [
            common.Sample((1,), [2], problem.solution, finished)] * gcpo.GOLDEN_TRIES)
        folder = tmp_path / str(finished)
        folder.mkdir()
        found = gcpo.written_by_model([problem], cfg, SimpleNamespace(folder=folder), "")
        assert found[problem.question, problem.answer] == (problem.solution if finished else "")


# ------------------------------------------------------------------------------------ real input


@pytest.mark.parametrize("kw", [{"template": True}, {"pad_is_eos": True}, {"bos": True}])
def test_gsm8k_file_with_a_random_checkpoint(tmp_path, llama_folder, kw):  # noqa: F811
    data, test = write(tmp_path / "a.jsonl", GSM), write(tmp_path / "b.jsonl", [
        {"question": "Bo has 1. How many?", "answer": "#### 1"}])
    rows = run(tmp_path / "r", "--model", llama_folder(**kw), "--dataset", data, "--eval_dataset",
               test, "--max_new_tokens", 60)
    assert rows[2]["groups/golden"] == 1 and rows[2]["policy/mismatch"] < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "r" / "model").eos_token == "</s>"


def test_lora_run(tmp_path, llama_folder):  # noqa: F811
    from peft import AutoPeftModelForCausalLM

    data, folder = write(tmp_path / "a.jsonl", GSM), llama_folder()
    flags = ["--model", folder, "--dataset", data, "--max_new_tokens", 60, "--lora", "--method",
             "grpo", "--golden", "dataset"]
    whole = run(tmp_path / "r", *flags, steps=4)
    assert whole[2]["policy/kl"] > 0, "the reference follows the policy"
    run(tmp_path / "s", *flags, steps=2)
    gcpo.main(["--resume", str(tmp_path / "s"), "--steps", "4"])
    assert jsonl(tmp_path / "s" / "metrics.jsonl") == whole
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "r" / "model")


# ---------------------------------------------------------------------------------- crash, resume


def test_resume_is_exact(tmp_path):
    flags = ["--method", "dapo", "--updates", 2]  # dynamic sampling: the position in the data moves
    whole = run(tmp_path / "whole", *flags, steps=5)
    run(tmp_path / "r", *flags, steps=3)
    gcpo.main(["--resume", str(tmp_path / "r"), "--steps", "5"])
    text = [(tmp_path / x / "metrics.jsonl").read_text() for x in ("whole", "r")]
    # step 3 was the last one once, and so it was evaluated
    drop = [[{k: v for k, v in json.loads(line).items() if "eval" not in k}
             for line in t.splitlines()] for t in text]
    assert drop[0] == drop[1] and len(whole) == 6
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_killed_at_a_random_moment_and_resumed(tmp_path, tiny_folder):
    data = write(tmp_path / "a.jsonl", [
        {"question": p.question, "answer": p.answer, "solution": p.solution}
        for p in tiny_problems((1, 2), 300)])
    flags = ["--model", tiny_folder, "--dataset", data, "--save_every", 2, "--eval_every", 9]
    run(tmp_path / "whole", *flags, steps=20)
    argv = [*SMALL, *map(str, flags), "--steps", "20", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, ROOT / "gcpo.py", *argv], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log, at = tmp_path / "r" / "metrics.jsonl", random.randint(1, 16)
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) <= at):
        time.sleep(.01)
    time.sleep(random.random() * .1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    gcpo.main(["--resume", str(tmp_path / "r")])
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "r" / name).read_text() == (tmp_path / "whole" / name).read_text(), at
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_killed_between_the_two_renames_of_a_checkpoint(tmp_path):
    run(tmp_path / "r", steps=2)
    (tmp_path / "r" / "checkpoint").rename(tmp_path / "r" / "checkpoint.old")
    gcpo.main(["--resume", str(tmp_path / "r"), "--steps", "3"])
    rows = jsonl(tmp_path / "r" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]


def test_killed_before_the_first_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", steps=2)
    run(tmp_path / "r", steps=2)
    common.shutil.rmtree(tmp_path / "r" / "checkpoint")
    gcpo.main(["--resume", str(tmp_path / "r")])
    assert jsonl(tmp_path / "r" / "metrics.jsonl") == whole


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys):
    run(tmp_path / "r")
    kept = {f: (tmp_path / "r" / f).read_text() for f in ("metrics.jsonl", "samples.jsonl")}
    before = json.loads((tmp_path / "r" / "summary.json").read_text())
    gcpo.main(["--resume", str(tmp_path / "r") + "/"])
    assert {f: (tmp_path / "r" / f).read_text() for f in kept} == kept
    after = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert before.pop("seconds") > 0 < after.pop("seconds") and before == after


def test_sampled_tokens_ends_the_run(tmp_path):
    rows = run(tmp_path / "r", "--sampled_tokens", 500, steps=50)
    assert rows[-2]["sample/tokens"] < 500 <= rows[-1]["sample/tokens"]
    assert "eval/accuracy" in rows[-1] and len(rows) < 20


def test_a_non_finite_loss_keeps_the_last_checkpoint(tmp_path, monkeypatch, refused):
    real, calls = gcpo.policy_loss, []

    def breaks(*a, **k):
        loss, cut, kl = real(*a, **k)
        calls.append(0)
        return loss * float("nan") if len(calls) > 4 else loss, cut, kl

    monkeypatch.setattr(gcpo, "policy_loss", breaks)
    error = refused(gcpo.main, *SMALL, "--micro_tokens", 10**6, "--steps", 9, "--out",
                    tmp_path / "r")
    assert "step 5" in error and "nan" in error
    state = torch.load(tmp_path / "r" / "checkpoint" / "state.pt", weights_only=True)
    assert state["state"]["step"] == 4
    saved = common.load_file(tmp_path / "r" / "checkpoint" / "weights.safetensors")
    assert all(w.isfinite().all() for w in saved.values())


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv,says", [
    (["--steps", "many"], "--steps"), (["--group", 1], "at least 2"), (["--prompts", 0], "prompts"),
    (["--method", "ppo"], "ppo"), (["--nope"], "--nope"), (["--model", "nope"], "no such folder"),
    (["--dataset", "nope"], "built-in name"), (["--dataset", "nope.jsonl"], "no such file"),
    (["--temperature", 0], "--temperature"), (["--lr", "nan"], "--lr"), (["--lr", -1], "--lr"),
    (["--updates", 99], "--updates"), (["--device", "tpu"], "--device tpu"),
    (["--aggregation", "token"], "--ratio token"), (["--device", "cuda:9"], "CUDA"),
    (["--overlong_cache", 999], "--overlong_cache"), (["--clip_low", 2], "--clip_low"),
    (["--max_new_tokens", 256], "every prompt"), (["--resume", "/nowhere"], "config.json"),
    (["--golden", "nope"], "no such folder"), (["--out", "/proc/x"], "cannot be written"),
    (["--method", "dapo", "--seed", -1], "--seed")])
def test_bad_flags(tmp_path, refused, argv, says):
    assert says in refused(gcpo.main, "--steps", 1, "--out", tmp_path / "r", *argv)


@pytest.mark.parametrize("text,says", [
    ("", "empty"), ("\n \n", "empty"),
    ('{"prompt": [{"role": "user"}], "answer": "1"}\n', "row 1"),
    ('{"question": "q", "answer": "1"}\n{"question": \n', "line 2"),
    ('{"text": "q"}\n', "question column"), ('{"question": "q", "label": "1"}\n', "answer column"),
    ('{"question": "", "answer": ""}\n', "no row has both")])
def test_bad_data(tmp_path, refused, text, says):
    (tmp_path / "a.jsonl").write_text(text)
    error = refused(gcpo.main, "--dataset", tmp_path / "a.jsonl", "--out", tmp_path / "r")
    assert says in error and "a.jsonl" in error


def test_bad_data_prints_one_line(tmp_path):
    """In a process of its own: other libraries log past pytest's capture."""
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\nnonsense\n')
    done = subprocess.run([sys.executable, "gcpo.py", "--dataset", tmp_path / "a.jsonl", "--out",
                           tmp_path / "r"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "line 2" in done.stderr and done.stderr.count("\n") == 1


def test_bad_json_array(tmp_path, refused):
    (tmp_path / "a.json").write_text('[{"question": "q",\n "answer": }]')
    assert "line 2" in refused(gcpo.main, "--dataset", tmp_path / "a.json", "--out", tmp_path / "r")


def test_bad_model_folders(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(gcpo.main, "--model", tmp_path / "empty", "--dataset",
                                       "tiny", "--out", tmp_path / "r")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen2"}')
    refused(gcpo.main, "--model", tmp_path / "empty", "--dataset", "tiny", "--out", tmp_path / "s")


def test_data_without_golden_answers(tmp_path, refused):
    data = write(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": str(i)} for i in range(9)])
    error = refused(gcpo.main, "--dataset", data, "--out", tmp_path / "r",
                    "--max_new_tokens", 200)
    assert "--golden dataset" in error and "off" in error
    # nothing is left that stands in the way of the corrected command
    run(tmp_path / "r", "--dataset", data, "--golden", "off", "--max_new_tokens", 9)


def test_long_prompts_are_counted_and_skipped(tmp_path, capsys):
    rows = [*GSM, {"question": "x " * 300, "answer": "#### 1"}]
    run(tmp_path / "r", "--dataset", write(tmp_path / "a.jsonl", rows), "--eval_dataset", "tiny",
        "--golden", "off", "--steps", 1, steps=1)
    assert "1 of 13 prompts skipped" in capsys.readouterr().out


def test_run_folders_are_not_mixed_up(tmp_path, refused):
    run(tmp_path / "r", steps=1)
    assert "--resume" in refused(gcpo.main, *SMALL, "--steps", 1, "--out", tmp_path / "r")
    assert "--lr" in refused(gcpo.main, "--resume", tmp_path / "r", "--lr", "0.5")
    assert "--method" in refused(gcpo.main, "--resume", tmp_path / "r", "--method", "gspo")
    gcpo.main(["--resume", str(tmp_path / "r"), "--device", "auto", "--out", f"{tmp_path}/r/"])
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps({**config, "script": "laser"}))
    assert "laser.py" in refused(gcpo.main, "--resume", tmp_path / "r")
