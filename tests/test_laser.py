"""laser.py end to end, in-process on small checkpoints: learns, resumes, scores, refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from make import tokenizer
from test_common import (  # noqa: F401 (a fixture)
    GSM,
    check_metrics,
    flat,
    jsonl,
    llama_folder,
    spy,
    word_tokenizer,
    write,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

import common
import laser

ROOT = Path(__file__).parent.parent
# c_ref of the tiny model is about -20, so its scale of the score is a larger one
SMALL = "--prompts 8 --group 4 --max_new_tokens 48 --eval_size 20 --eval_samples 2 --lr 1e-3 " \
        "--save_every 0 --eval_every 0 --beta_v .2 --std_threshold .01 " \
        "--reasoning_warmup_steps 1 --self_rewarding_warmup_steps 1".split()


CORRECT = laser.correct


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A solution counts as correct here if it ends in an even digit: about half of them do,
    whatever the model has learned, and a verifier can learn it. A short calibration."""
    monkeypatch.setattr(laser, "correct", lambda text, problem: text[-1:] in tuple("02468"))
    monkeypatch.setattr(laser, "PAIRS", 24)
    monkeypatch.setattr(laser, "TIMING", 0)


def run(out, *argv, steps=3):
    laser.main([*SMALL, "--steps", str(steps), "--out", str(out), *map(str, argv)])
    return jsonl(out / "metrics.jsonl")


def weights(out):
    return flat(AutoModelForCausalLM.from_pretrained(out / "model"))


# --------------------------------------------------------------------------------- the run folder


def test_run_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    rows = run(folder)
    printed = capsys.readouterr().out
    assert re.search(r"calibration: z_c = <\|pad\|>, c_ref = -\d\d\.\d+, standard deviation "
                     r"\d+\.\d+ over \d+ own solutions", printed)
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["token"] == "<|pad|>" and config["c_ref"] < -10
    assert (config["alpha"], config["tau"]) == (laser.TINY["laser"]["alpha"], .1)
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"accuracy", "accuracy/level1", "verify_f1", "auroc", "auroc_logp", "ece", "mean@2",
                "maj@2", "weighted_maj@2", "best_of@2"} <= set(summary[when])
    assert {"step", "prompt", "response", "reward", "score"} == set(
        jsonl(folder / "samples.jsonl")[0])
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl",
        "score.png", "summary.json"]
    assert (folder / "score.png").stat().st_size > 10_000
    table = printed[printed.index("held-out  "):]
    assert "verify_f1" in table and "before   after" in table


def test_every_declared_metric_is_logged(tmp_path):
    names = {k for r in run(tmp_path / "r", "--kl_beta", .1) for k in r}
    check_metrics(names, laser.METRICS)
    for name in ("verify_correct", "verify_wrong", "auroc", "auroc/level1", "auroc_logp",
                 "auroc_logp/level1", "ece", "pass@2", "best_of@2", "weighted_maj@2"):
        assert f"eval/{name}" in names


PLAIN = []  # the rows of a run without any switch, made once


@pytest.mark.parametrize("argv", [
    ["--tau", 0], ["--reference", "exact"], ["--balance", "false"], ["--verify_loss", "bce"],
    ["--read", "before_eos"], ["--reference", "exact", "--read", "before_eos", "--tau", 1],
    ["--alpha", 0, "--tau", .5]])
def test_switches_run(tmp_path, argv):
    rows = run(tmp_path / "r", *argv)
    for r in rows[1:]:
        assert r["optim/grad_norm"] > 0 and r["policy/mismatch"] < 1e-4
    if not PLAIN:
        PLAIN.extend(run(tmp_path / "plain"))
    if "bce" not in argv:  # suppresses z_i, too
        assert rows[1] == PLAIN[1], "plain GRPO whatever the switch"
    assert rows[3]["optim/grad_norm"] != PLAIN[3]["optim/grad_norm"], "the switch does nothing"


def test_the_score_learns(tmp_path, monkeypatch):
    """On the sampled solutions, within seconds; whether it generalises from so few is another
    question. Without GRPO, which makes every solution end in an even digit before the score has
    learned what that is."""
    monkeypatch.setattr(laser, "group_advantages", torch.zeros_like)
    rows = run(tmp_path / "r", "--eval_samples", 8, "--tau", 0, "--alpha", 1, "--lr", 3e-4,
               "--reasoning_warmup_steps", 0, "--prompts", 16, "--max_new_tokens", 16, steps=50)

    def mean(name, rows):
        found = [r[name] for r in rows if name in r]
        return sum(found) / len(found)

    assert mean("verify/loss", rows[-10:]) < .8 * mean("verify/loss", rows[1:6])
    first, last = (mean("verify/score_correct", part) - mean("verify/score_wrong", part)
                   for part in (rows[1:6], rows[-10:]))
    assert -1 < first < .1 < last


# ---------------------------------------------------------------------------- LaSeR against GRPO


def test_without_alpha_and_tau_laser_is_grpo(tmp_path):
    for name, flags in (("a", ["--alpha", 0, "--tau", 0]), ("b", ["--method", "grpo"])):
        run(tmp_path / name, *flags)
    same = [(tmp_path / x / "metrics.jsonl").read_text() for x in "ab"]
    assert same[0] == same[1] and torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_first_warm_up_is_grpo(tmp_path):
    a, b = (run(tmp_path / m, "--method", m, "--reasoning_warmup_steps", 2, steps=4)
            for m in ("laser", "grpo"))
    assert a[:3] == b[:3] and "verify/loss" not in a[2]
    assert a[3]["optim/grad_norm"] != b[3]["optim/grad_norm"] and "verify/loss" in a[3]
    assert a[3]["reward/mean"] == b[3]["reward/mean"], "sampled before the first MSE step"
    assert "verify/mixed" in a[4] and "verify/mixed" not in a[3]


def test_alpha_weighs_the_verification_loss(tmp_path):
    a, b = (run(tmp_path / str(alpha), "--alpha", alpha, "--tau", 0, "--reasoning_warmup_steps", 0,
                steps=1)[1] for alpha in (.1, 1))
    assert a["verify/loss"] == b["verify/loss"] > .01
    assert b["loss/total"] - a["loss/total"] == pytest.approx(.9 * a["verify/loss"], rel=1e-3)
    assert b["optim/grad_norm"] > a["optim/grad_norm"]


def test_training_does_not_depend_on_micro_tokens(tmp_path, monkeypatch):
    """The gradient; AdamW makes a whole step of the rounding of a vanishing one."""
    found, update = [], laser.update
    monkeypatch.setattr(laser, "update", lambda opt, *a: (
        found.append(torch.cat([m.grad.flatten() for m in opt.masters])), update(opt, *a))[1])
    rows = [run(tmp_path / str(n), "--micro_tokens", n, "--reasoning_warmup_steps", 0,
                "--self_rewarding_warmup_steps", 0, steps=1)[1] for n in (64, 100_000)]
    for name in ("optim/grad_norm", "verify/loss", "loss/total"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


# ------------------------------------------------------- what the loop hands to the equations


@pytest.mark.parametrize("kl_beta", [0, .1])
def test_the_policy_loss_counts_every_token_of_the_batch(tmp_path, monkeypatch, kl_beta):
    """Rows without advantage need no forward, but count; with a KL term they are trained on."""
    calls, sampled = spy(monkeypatch, laser, "policy_loss"), spy(monkeypatch, laser, "sample")
    run(tmp_path / "r", "--kl_beta", kl_beta, "--group", 2, steps=1)
    batch = sampled[-1][1]
    assert {a[6] for a, _ in calls} == {sum(len(s.tokens) for s in batch)}
    rows = sum(len(a[3]) for a, _ in calls)
    assert rows == len(batch) if kl_beta else 0 < rows < len(batch)


def test_class_weights_count_finished_solutions_of_the_whole_batch(tmp_path, monkeypatch):
    weight = spy(monkeypatch, laser, "class_weights")
    loss = spy(monkeypatch, laser, "verification_loss")
    rows = run(tmp_path / "r", "--max_new_tokens", 14, "--micro_tokens", 64, "--prompts", 16,
               "--c_ref", -12, "--reasoning_warmup_steps", 0, "--temperature", 1.3, steps=1)
    assert rows[1]["policy/mismatch"] < 1e-4, "trained at the temperature of sampling"
    (r, finished, balance), w = weight[0]
    assert len(r) == 64 and balance and 0 < finished.sum() < 64 and len(loss) > 5
    assert all(a[4] == finished.sum() for a, _ in loss)
    assert (w[~finished] == 0).all() and len(set(w.tolist())) == 3 and \
        torch.cat([a[2] for a, _ in loss]).sum().item() == pytest.approx(w.sum().item())


def test_without_balance_the_classes_weigh_alike(tmp_path, monkeypatch):
    weight = spy(monkeypatch, laser, "class_weights")
    run(tmp_path / "r", "--balance", "false", steps=1)
    (_, finished, _), w = weight[0]
    assert torch.equal(w, finished.float())


def test_score_statistics_leave_truncated_rows_out():
    batch = [common.Sample((1,), [2], "", x, logps=[-1.0]) for x in (True, True, False)]
    seen = [(i, [0.0, -1.5, 0.0], 0.0, score) for i, score in enumerate((.8, .2, .9))]
    got = laser.row_statistics(batch, [1.0, 0.0, 0.0], seen, laser.Config())
    assert got == pytest.approx({"policy/mismatch": .5, "verify/score_correct": .8,
                                 "verify/score_wrong": .2, "verify/f1": 1.0})


def test_exact_reference_is_the_initial_policy(tmp_path, monkeypatch):
    calls = spy(monkeypatch, laser, "verification_score")
    run(tmp_path / "r", "--reference", "exact", "--reasoning_warmup_steps", 0, steps=2)
    (before, first, *rest) = [found for _, found in calls]
    assert before.abs().max() < 1e-3 and first.abs().max() < 1e-4
    assert rest[-1].abs().max() > .01


def test_a_format_without_one_mark_is_reward_zero(tmp_path, monkeypatch):
    calls = spy(monkeypatch, laser, "reward")
    monkeypatch.setattr(laser, "correct", lambda text, problem: True)
    monkeypatch.setattr(laser, "well_formed", lambda text, prompt: len(text) % 2 == 0)
    rows = run(tmp_path / "r", steps=1)
    assert rows[1]["reward/accuracy"] == 1 > rows[1]["reward/mean"] > 0
    assert all(prompt.startswith("<|user|>") for (_, _, prompt), _ in calls)


# ------------------------------------------------------------------------------- z_c and c_ref


def test_z_c_is_never_sampled(tiny, policy, tmp_path):
    model, tok = tiny
    prompts = common.encode_questions(tok, ["Ada has 1 figs, gets 1. How many figs?"])
    z = tok.convert_tokens_to_ids("=")
    for banned in (False, True):
        policy.generation_config.suppress_tokens = [z] if banned else None
        for temperature in (0, 1.0):
            found = common.sample(policy, tok, prompts, 8, 20, temperature, read=z)
            assert any(z in s.tokens for s in found) != banned
    assert all(s.read[0] > -50 for s in found if s.finished), "read from the logits as they are"
    run(tmp_path / "r", steps=1)
    saved = json.loads((tmp_path / "r" / "model" / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [tok.pad_token_id]
    run(tmp_path / "bce", "--verify_loss", "bce", steps=0)
    saved = json.loads((tmp_path / "bce" / "model" / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [tok.pad_token_id, tok.convert_tokens_to_ids("~")]
    again = common.load_model(str(tmp_path / "r" / "model"), SimpleNamespace(device="cpu"))[0]
    assert again.generation_config.suppress_tokens is None, "another script samples everything"


def test_c_ref_is_measured_on_own_finished_solutions(tmp_path, monkeypatch, tiny):
    model, tok = tiny
    read = spy(monkeypatch, laser, "batch_last_token_logps")
    run(tmp_path / "r", "--temperature", 1.3, "--max_new_tokens", 24, steps=1)
    (_, pairs, z, _), logps = read[0]
    assert len(pairs) >= laser.PAIRS and all(s.finished for s in pairs)
    assert len({s.prompt for s in pairs}) > laser.PAIRS // 2
    config = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
    assert config["c_ref"] == pytest.approx(logps[:, 0].mean().item()) and z == [tok.pad_token_id]


def test_a_given_c_ref_is_not_measured(tmp_path, capsys):
    run(tmp_path / "r", "--c_ref", -9, steps=1)
    printed = capsys.readouterr().out
    assert "calibration" not in printed
    assert "note: plain GRPO throughout, --steps 1 does not exceed" in printed
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["c_ref"] == -9


def test_the_smallest_beta_v_is_named_and_works(tmp_path, refused, capsys):
    for beta_v in (.01, .045):
        error = refused(laser.main, *SMALL, "--beta_v", beta_v, "--out", tmp_path / "r")
        assert "must exceed 0.0" in error and "log Z" in error
    works = re.search(r"--beta_v (0\.\d+),", error)[1]
    run(tmp_path / "r", "--beta_v", works, steps=0)
    run(tmp_path / "bce", "--beta_v", .01, "--verify_loss", "bce", steps=0)  # has no beta_v
    error = refused(laser.main, *SMALL, "--c_ref", -25, "--beta_v", .04, "--out", tmp_path / "q")
    assert "--beta_v 0.0401," in error, "more than 1/25"
    run(tmp_path / "q", "--c_ref", -25, "--beta_v", .0401, steps=0)
    error = refused(laser.main, *SMALL, "--c_ref", -6, "--beta_v", .17, "--out", tmp_path / "t")
    assert "log Z is 0.1" in error, "above 1/6, and still too small"
    error = refused(laser.main, *SMALL, "--token", "=", "--beta_v", .1, "--out", tmp_path / "s")
    assert "--token =" in error and "token that is used less" in error


@pytest.mark.parametrize("argv,says", [
    (["--token", "<|nope|>"], "no such token"), (["--token", "<|end|>"], "ends a response"),
    (["--token", "<|user|>"], "is in the prompts"), (["--c_ref", -3], "no --beta_v works"),
    (["--verify_loss", "bce", "--wrong_token", "<|pad|>"], "already"), (["--c_ref", 3], "negative"),
    (["--verify_loss", "bce", "--wrong_token", "<|user|>"], "--wrong_token <|user|>: is in the"),
    (["--verify_loss", "bce", "--read", "before_eos"], "use --read after_eos"),
    (["--beta_v", "inf"], "--beta_v"), (["--alpha", "inf"], "--alpha"),
    (["--eval_samples", 0], "--eval_samples"), (["--group", 1], "at least 2"),
    (["--alpha", -1], "--alpha"), (["--tau", 2], "--tau"), (["--beta_v", 0], "--beta_v"),
    (["--std_threshold", -1], "--std_threshold"), (["--max_new_tokens", 2], "raise it"),
    (["--reasoning_warmup_steps", -1], "warmup"), (["--score", "/nowhere"], "--score /nowhere"),
    (["--method", "ppo"], "ppo"), (["--read", "middle"], "middle")])
def test_bad_flags(tmp_path, refused, argv, says):
    assert says in refused(laser.main, *([] if "--score" in argv else [
        *SMALL, "--steps", 1, "--out", tmp_path / "r"]), *argv)
    assert not (tmp_path / "r" / "config.json").exists()


# ------------------------------------------------------------------------------------ real input

LATEX = [{"problem": f"What is $\\frac{{{i}}}{{7}}$ as a fraction?",
          "answer": f"\\frac{{{i}}}{{7}}", "level": 1 + i % 5,
          "solution": f"It is $\\boxed{{\\frac{{{i}}}{{7}}}}$."}
         for i in range(1, 13)]


@pytest.fixture
def qwen_folder(tmp_path_factory):
    """-> a function: a random-weights Qwen2 checkpoint with Qwen's special tokens, of the Instruct
    (EOS <|im_end|>, pad <|endoftext|>) or the Base layout (pad == EOS)."""
    def make(pad_is_eos):
        folder = tmp_path_factory.mktemp("qwen")
        eos = "<|endoftext|>" if pad_is_eos else "<|im_end|>"
        text = [r["problem"] + r["solution"] for r in LATEX] + [r["answer"] for r in GSM]
        blank = tokenizer(text, 320).backend_tokenizer
        bpe = json.loads(blank.to_str())["model"]
        extra = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
        tok = Qwen2Tokenizer(bpe["vocab"], [tuple(m) for m in bpe["merges"]], eos_token=eos,
                             pad_token="<|endoftext|>", unk_token="<|endoftext|>",
                             extra_special_tokens=[t for t in extra if t != eos])
        tok.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tok) + 10, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512,
            tie_word_embeddings=True, eos_token_id=tok.eos_token_id, bos_token_id=None,
            pad_token_id=tok.pad_token_id)).save_pretrained(folder)
        tok.save_pretrained(folder)
        return str(folder)
    return make


@pytest.mark.parametrize("layout,read", [
    ("tiny", "after_eos"), ("tiny", "before_eos"), ("pad", "after_eos"),
    ("pad_is_eos", "after_eos")])
def test_every_score_reads_z_c_at_the_end(tmp_path, monkeypatch, qwen_folder, layout, read):
    """Defects A and C, in the loop: the scores in the advantage, in the MSE and at test time, by
    brute force on every row by itself, with the initial weights."""
    mixed = spy(monkeypatch, laser, "mixed_advantages")
    loss = spy(monkeypatch, laser, "verification_loss")
    sampled = spy(monkeypatch, laser, "sample")
    judged = spy(monkeypatch, laser, "self_verification")
    folder = "tiny" if layout == "tiny" else qwen_folder(layout == "pad_is_eos")
    flags = [] if layout == "tiny" else ["--model", folder, "--dataset", write(
        tmp_path / "a.jsonl", GSM), "--max_new_tokens", 60]
    run(tmp_path / "r", "--reasoning_warmup_steps", 0, "--self_rewarding_warmup_steps", 0,
        "--micro_tokens", 10**6, "--beta_v", .3, "--read", read, *flags, steps=1)
    model, tok = common.load_model(folder, laser.Config(device="cpu"))
    config = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
    z = tok.convert_tokens_to_ids(config["token"])

    def brute_force(s):
        with torch.no_grad():
            logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0]
        logits = logits[-1 if read == "after_eos" else -2].double()
        return (.3 * (torch.log_softmax(logits, -1)[z] - config["c_ref"])).item()

    (A, score, finished, tau, threshold), _ = mixed[0]
    batch = sampled[-1][1]
    expected = [brute_force(s) for s in batch]
    assert score.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert finished.flatten().tolist() == [s.finished for s in batch]
    assert score.shape == (8, 4) and not score.requires_grad and (tau, threshold) == (.1, .01)
    # one update: the scores with gradient are the same numbers
    (logp_z, _, weight, c, n, _), _ = loss[0]
    assert logp_z.requires_grad and n == finished.sum() > 0
    again = (.3 * (logp_z[:, 0] - config["c_ref"])).tolist()
    assert sorted(again) == pytest.approx(sorted(
        e for e, s in zip(expected, batch) if s.finished), abs=1e-4)
    (drawn, _, score, levels, k), _ = judged[0]
    assert score.tolist() == pytest.approx(
        [brute_force(s) if s.finished else 0.0 for s in drawn], abs=1e-4)
    if layout == "tiny":  # a problem of level n tells of n changes
        assert levels == [str(tok.decode(s.prompt).count(",")) for s in drawn] and k == 2


def test_truncated_solutions_at_test_time(tmp_path, monkeypatch):
    judged = spy(monkeypatch, laser, "self_verification")
    run(tmp_path / "r", "--max_new_tokens", 14, "--c_ref", -12, steps=0)
    (drawn, _, score, *_), result = judged[0]
    unfinished = [x for x, s in zip(score.tolist(), drawn) if not s.finished]
    assert 0 < len(unfinished) < len(drawn) and set(unfinished) == {0.0}


def test_nothing_finished_is_no_accident(tmp_path):
    for r in run(tmp_path / "r", "--max_new_tokens", 1, "--c_ref", -12)[2:]:
        assert r["sample/truncated"] == 1 and r["verify/loss"] == 0
        assert "verify/f1" not in r and r.get("verify/mixed", 0) == 0


def test_several_stop_tokens(tmp_path, qwen_folder, monkeypatch):
    folder = Path(qwen_folder(False))
    about = json.loads((folder / "generation_config.json").read_text())
    tok = AutoTokenizer.from_pretrained(folder)
    ends = tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (folder / "generation_config.json").write_text(json.dumps({**about, "eos_token_id": ends}))
    sampled = spy(monkeypatch, laser, "sample")
    run(tmp_path / "r", "--model", folder, "--dataset", write(tmp_path / "a.jsonl", GSM),
        "--max_new_tokens", 60, "--beta_v", .3, steps=1)
    assert {s.tokens[-1] for _, found in sampled for s in found if s.finished} == set(ends)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("rows", [GSM, LATEX])
def test_qwen_layout(tmp_path, qwen_folder, monkeypatch, pad_is_eos, rows):
    monkeypatch.setattr(laser, "correct", CORRECT)
    folder = qwen_folder(pad_is_eos)
    tok = AutoTokenizer.from_pretrained(folder)
    assert (tok.eos_token_id == tok.pad_token_id) == pad_is_eos
    loss = spy(monkeypatch, laser, "verification_loss")
    real = laser.sample

    def some_right(model, tok, prompts, group, *a, **k):  # a random model is never right
        found = real(model, tok, prompts, group, *a, **k)
        for s in found[::2]:
            text = rows[0]["solution"] if "solution" in rows[0] else rows[0]["answer"]
            s.tokens = [*tok(text).input_ids, tok.eos_token_id]
            s.text, s.finished, s.logps = text, True, [-1.0] * len(s.tokens)
        return found

    monkeypatch.setattr(laser, "sample", some_right)
    found = run(tmp_path / "r", "--model", folder, "--dataset",
                write(tmp_path / "a.jsonl", rows[:1]), "--eval_dataset",
                write(tmp_path / "b.jsonl", rows[1:]), "--max_new_tokens", 60, "--beta_v", .3)
    config = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
    assert config["token"] == "<|vision_start|>"
    assert found[2]["reward/mean"] == .5 and "verify/f1" in found[3]
    r = torch.cat([a[1] for a, _ in loss])
    assert (r == 1).sum() == 2 * 16, "answers, in LaTeX too, are verified"


def test_llama_3_layout_and_a_tokenizer_without_spare_tokens(tmp_path, llama_folder, refused):  # noqa: F811
    tok = word_tokenizer()
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    cfg = laser.parse(["--model", "Qwen2.5-7B"])
    assert (cfg.alpha, cfg.tau, cfg.beta_v, cfg.std_threshold) == (.1, .1, .1, .1)
    assert laser.parse(["--method", "grpo"]).alpha == laser.parse(["--method", "grpo"]).tau == 0
    cfg.model = "x"
    tok.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>",
                                                          "<|reserved_special_token_1|>"]})
    cfg.verify_loss = "bce"
    head = SimpleNamespace(weight=torch.zeros(len(tok), 1))
    model.get_output_embeddings = lambda: head
    z = laser.verification_tokens(tok, model, [], cfg)
    assert tok.convert_ids_to_tokens(z) == [cfg.token, cfg.wrong_token] == [
        "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    head.weight = head.weight[:-1]  # a token that was never given an embedding
    with pytest.raises(SystemExit):
        laser.verification_tokens(tok, model, [], cfg)
    data = write(tmp_path / "a.jsonl", GSM)
    error = refused(laser.main, *SMALL, "--model", llama_folder(), "--dataset", data, "--out",
                    tmp_path / "r")
    assert "give --token" in error and "<|vision_start|>" in error


# --------------------------------------------------------------------- resume, LoRA, --score


def test_resume_is_exact(tmp_path, monkeypatch):
    flags = ["--save_every", 2, "--reference", "exact"]
    whole = run(tmp_path / "whole", *flags, steps=5)
    run(tmp_path / "r", *flags, steps=2)
    monkeypatch.setattr(laser, "PAIRS", 10**9)  # measuring again would fail
    laser.main(["--resume", str(tmp_path / "r"), "--steps", "5"])
    rows = jsonl(tmp_path / "r" / "metrics.jsonl")
    drop = [[{k: v for k, v in r.items() if "eval" not in k} for r in x] for x in (whole, rows)]
    assert drop[0] == drop[1] and len(rows) == 6
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_score_of_a_finished_run(tmp_path, capsys, refused):
    folder = tmp_path / "r"
    run(folder)
    after = json.loads((folder / "summary.json").read_text())["after"]
    (folder / "score.png").unlink()
    capsys.readouterr()
    laser.main(["--score", str(folder)])
    printed = capsys.readouterr().out
    result = json.loads((folder / "score.json").read_text())
    cost = result.pop("cost")
    assert result == pytest.approx(after, abs=1e-6)
    assert cost["solutions"] == 20 < cost["tokens"] and cost.keys() == {
        "solutions", "tokens", "generation_s", "with_score_s"}
    assert "cost: generating 20 solutions takes" in printed and "verify_f1" in printed
    assert (folder / "score.png").exists()
    laser.main(["--score", str(folder), "--eval_samples", "3", "--eval_size", "4"])
    assert "weighted_maj@3" in json.loads((folder / "score.json").read_text())
    assert "--lr" in refused(laser.main, "--score", folder, "--lr", 1)
    assert "one of the two" in refused(laser.main, "--score", folder, "--resume", folder)
    common.shutil.rmtree(folder / "model")
    assert "no model/" in refused(laser.main, "--score", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "script": "gcpo"}))
    assert "gcpo.py" in refused(laser.main, "--score", folder)


@pytest.mark.parametrize("reference", ["constant", "exact"])
def test_lora_run_resumes_and_scores(tmp_path, qwen_folder, reference):
    flags = ["--model", qwen_folder(False), "--dataset", write(tmp_path / "a.jsonl", GSM),
             "--max_new_tokens", 60, "--lora", "--beta_v", .3, "--reference", reference,
             "--eval_every", 2]
    whole = run(tmp_path / "r", *flags, steps=4)
    run(tmp_path / "s", *flags, steps=2)
    laser.main(["--resume", str(tmp_path / "s"), "--steps", "4"])
    assert jsonl(tmp_path / "s" / "metrics.jsonl") == whole
    after = json.loads((tmp_path / "r" / "summary.json").read_text())["after"]
    laser.main(["--score", str(tmp_path / "r")])
    score = json.loads((tmp_path / "r" / "score.json").read_text())
    assert {k: score[k] for k in after} == pytest.approx(after, abs=1e-4)
