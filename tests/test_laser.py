"""laser.py end to end, in-process on small checkpoints: learns, resumes, scores, refuses."""

import json
import re
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

# c_ref of the tiny model is about -20, so its scale of the score is a larger one
SMALL = "--prompts 8 --group 4 --max_new_tokens 48 --eval_size 8 --eval_samples 2 --lr 1e-3 " \
        "--save_every 0 --eval_every 0 --beta_v .2 --std_threshold .01 " \
        "--reasoning_warmup_steps 1 --self_rewarding_warmup_steps 1".split()
NO_WARMUP = ["--reasoning_warmup_steps", 0, "--self_rewarding_warmup_steps", 0]
CORRECT = laser.correct


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """A solution counts as correct here if it ends in an even digit: about half of them do,
    whatever the model has learned, and a verifier can learn it. A short calibration, no pictures.
    """
    if request.function is not test_run_folder:
        monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)
        monkeypatch.setattr(laser, "draw_scores", lambda *a: None)
    monkeypatch.setattr(laser, "correct", lambda text, problem: text[-1:] in tuple("02468"))
    monkeypatch.setattr(laser, "PAIRS", 24)


def run(out, *argv, steps=3):
    laser.main([*SMALL, "--steps", str(steps), "--out", str(out), *map(str, argv)])
    return jsonl(out / "metrics.jsonl")


def files(out):
    """What must be the same, byte for byte, whether a run was interrupted or not."""
    weights, = (out / "model").glob("*.safetensors")  # of the model, or of LoRA's adapters
    return [p.read_bytes() for p in (out / "metrics.jsonl", out / "samples.jsonl", weights)]


@pytest.fixture
def gradients(monkeypatch):
    """-> a list of the gradients of all updates, which grows."""
    found, update = [], laser.update
    monkeypatch.setattr(laser, "update", lambda opt, *a: (
        found.append(torch.cat([p.grad.flatten() for g in opt.param_groups
                                for p in g["params"]])), update(opt, *a))[1])
    return found


# ------------------------------------------------------------------------ the run folder, switches


def test_run_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    rows = run(folder, "--eval_size", 20)
    printed = capsys.readouterr().out
    assert re.search(r"calibration: z_c = <\|pad\|>, c_ref = -\d\d\.\d+, standard deviation "
                     r"\d+\.\d+ over \d+ own solutions", printed)
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    names = {k for r in rows for k in r}
    check_metrics(names, laser.METRICS)
    for name in ("verify_correct", "verify_wrong", "auroc", "auroc/level1", "auroc_logp",
                 "auroc_logp/level1", "ece", "pass@2", "best_of@2", "weighted_maj@2"):
        assert f"eval/{name}" in names
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["alpha"], config["tau"]) == (laser.TINY["laser"]["alpha"], .1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["c_ref"] < -1 and summary["token"].startswith("<"), "what was measured, chosen"
    for when in ("before", "after"):
        assert {"accuracy", "accuracy/level1", "verify_f1", "auroc", "mean@2", "maj@2",
                "weighted_maj@2", "best_of@2"} <= set(summary[when])
    assert {"step", "prompt", "response", "reward", "score"} == set(
        jsonl(folder / "samples.jsonl")[0])
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl",
        "score.png", "summary.json"]
    assert (folder / "score.png").stat().st_size > 10_000 < (folder / "curves.png").stat().st_size


PLAIN = []  # the rows of a run without any switch, made once


@pytest.mark.parametrize("argv", [
    ["--tau", 0], ["--reference", "exact"], ["--balance", "false"], ["--verify_loss", "bce"],
    ["--reference", "exact", "--tau", 1], ["--alpha", 0, "--tau", .5]])
def test_switches_run(tmp_path, argv):
    rows = run(tmp_path / "r", *argv)
    for r in rows[1:]:
        assert r["optim/grad_norm"] > 0 and r["policy/mismatch"] < 1e-4
    if not PLAIN:
        PLAIN.extend(run(tmp_path / "plain"))
    if "bce" not in argv:  # suppresses z_i, too
        assert rows[1] == PLAIN[1], "plain GRPO whatever the switch"
    assert rows[3]["optim/grad_norm"] != PLAIN[3]["optim/grad_norm"], "the switch does nothing"


def test_the_phases_are_grpo_mse_and_mixing(tmp_path):
    grpo = run(tmp_path / "grpo", "--method", "grpo", steps=4)
    run(tmp_path / "off", "--alpha", 0, "--tau", 0, steps=4)
    assert files(tmp_path / "grpo") == files(tmp_path / "off")
    rows = run(tmp_path / "laser", "--reasoning_warmup_steps", 2, steps=4)
    assert rows[:3] == grpo[:3] and rows[3]["optim/grad_norm"] != grpo[3]["optim/grad_norm"]
    assert rows[3]["reward/mean"] == grpo[3]["reward/mean"], "sampled before the first MSE step"
    assert [(("verify/loss" in r), ("verify/mixed" in r)) for r in rows[1:]] == [
        (False, False), (False, False), (True, False), (True, True)]


def test_the_score_learns(tmp_path, monkeypatch):
    """On the sampled solutions, within seconds; whether it generalises from so few is another
    question. Without GRPO, which makes every solution end in an even digit before the score has
    learned what that is."""
    monkeypatch.setattr(laser, "group_advantages", torch.zeros_like)
    rows = run(tmp_path / "r", "--eval_samples", 8, "--tau", 0, "--alpha", 1, "--lr", 3e-4,
               *NO_WARMUP, "--prompts", 16, "--max_new_tokens", 16, steps=50)

    def mean(name, rows):
        found = [r[name] for r in rows if name in r]
        return sum(found) / len(found)

    assert mean("verify/loss", rows[-10:]) < .8 * mean("verify/loss", rows[1:6])
    first, last = (mean("verify/score_correct", part) - mean("verify/score_wrong", part)
                   for part in (rows[1:6], rows[-10:]))
    assert -1 < first < .1 < last


def test_the_gradient_is_linear_in_alpha_and_whatever_the_micro_batches(tmp_path, gradients):
    for n, flags in enumerate((["--alpha", 0], ["--alpha", .1], ["--alpha", 1],
                               ["--alpha", 1, "--micro_tokens", 64])):
        run(tmp_path / str(n), "--tau", 0, "--micro_tokens", 10**6, *NO_WARMUP, *flags, steps=1)
    policy, tenth, whole, parts = gradients
    verify = whole - policy
    assert min(policy.norm(), verify.norm()) > 0
    assert (10 * (tenth - policy) - verify).norm() < 1e-3 * verify.norm()
    assert (parts - whole).norm() < 1e-4 * whole.norm()
    rows = [jsonl(tmp_path / x / "metrics.jsonl")[1] for x in "23"]
    for name in ("verify/loss", "verify/f1", "verify/score_correct"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


# ------------------------------------------------------- what the loop hands to the equations


def test_the_policy_loss_counts_every_token_of_the_batch(tmp_path, monkeypatch):
    """Rows without advantage need no forward, but count."""
    calls, sampled = spy(monkeypatch, laser, "policy_loss"), spy(monkeypatch, laser, "sample")
    run(tmp_path / "r", "--group", 2, steps=1)
    batch = next(found for _, found in sampled if len(found) == 8 * 2)
    assert {a[4] for a, _ in calls} == {sum(len(s.tokens) for s in batch)}
    assert 0 < sum(len(a[2]) for a, _ in calls) < len(batch)
    for (logp, old, A, *_), _ in calls:
        assert logp.requires_grad and not old.requires_grad and (A != 0).all()
        assert torch.equal(logp, old)


@pytest.mark.parametrize("balance", [True, False])
def test_the_verification_loss_counts_finished_solutions_of_the_batch(tmp_path, monkeypatch,
                                                                      balance):
    weight = spy(monkeypatch, laser, "class_weights")
    loss = spy(monkeypatch, laser, "verification_loss")
    rows = run(tmp_path / "r", "--max_new_tokens", 14, "--micro_tokens", 64, "--prompts", 16,
               "--c_ref", -12, *NO_WARMUP, "--temperature", 1.3, "--balance", balance, steps=1)
    assert rows[1]["policy/mismatch"] < 1e-4, "trained at the temperature of sampling"
    (r, finished, asked), w = weight[0]
    assert len(r) == 64 and asked == balance and 0 < finished.sum() < 64 and len(loss) > 5
    assert all(a[4] == finished.sum() and a[0].requires_grad for a, _ in loss)
    assert (w[~finished] == 0).all() and len(set(w.tolist())) == (3 if balance else 2)
    logp, label, weights, c = (torch.cat([a[i] for a, _ in loss]) for i in range(4))
    assert weights.sum().item() == pytest.approx(w.sum().item()) and (c == -12).all()
    score = .2 * (logp[:, 0] + 12).detach()[weights > 0]  # truncated ones are in no statistic
    right = label[weights > 0] == 1
    f1 = laser.verify_f1(score, right)[0]
    for name, value in (("score_correct", score[right].mean()), ("f1", f1),
                        ("score_wrong", score[~right].mean()),
                        ("loss", sum(x.item() for _, x in loss))):
        assert rows[1][f"verify/{name}"] == pytest.approx(float(value), rel=1e-4), name


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


def test_z_is_never_sampled(tmp_path, monkeypatch, tiny):
    """Neither in training, calibration and evaluation nor by whoever loads model/."""
    tok, sampled = tiny[1], spy(monkeypatch, laser, "sample")
    z = tok.convert_tokens_to_ids("=")  # in every solution of the model
    monkeypatch.setattr(laser, "verification_tokens", lambda *a: [z])
    run(tmp_path / "r", "--c_ref", -12, steps=1)
    assert all(z not in s.tokens for _, found in sampled for s in found)
    assert "=" not in "".join(x["response"] for x in jsonl(tmp_path / "r" / "samples.jsonl"))
    saved = json.loads((tmp_path / "r" / "model" / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [z]


def test_z_i_is_the_next_token_that_is_free(tmp_path, monkeypatch, tiny):
    """It neither ends a response nor is in a prompt; after the last token comes the first. The
    tiny model's z_c is followed by the tokens of its chat template."""
    tok, used = tiny[1], spy(monkeypatch, laser, "verification_tokens")
    run(tmp_path / "r", "--verify_loss", "bce", steps=0)
    (_, model, problems, cfg), (z_c, z_i) = used[0]
    taken = {tok.eos_token_id, z_c, *(i for p in problems for i in p.prompt)}
    order = [*range(z_c + 1, model.config.vocab_size), *range(z_c)]
    assert z_c == tok.pad_token_id and order[0] in taken
    assert z_i == min(set(order) - taken, key=order.index)
    saved = json.loads((tmp_path / "r" / "model" / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [z_c, z_i]
    cfg.token = tok.convert_ids_to_tokens(8)
    problem = SimpleNamespace(prompt=(9, 10, 12))
    assert laser.verification_tokens(tok, model, [problem], cfg) == [8, 11]


def test_c_ref_is_measured_on_own_finished_solutions(tmp_path, monkeypatch, tiny, capsys):
    read = spy(monkeypatch, laser, "batch_last_token_logps")
    made = spy(monkeypatch, laser, "reference_logp_z")
    flags = ["--temperature", 1.3, "--max_new_tokens", 24]
    rows = run(tmp_path / "r", *flags, *NO_WARMUP, steps=1)
    (_, pairs, z, _), logps = read[0]
    assert len(pairs) >= laser.PAIRS and all(s.finished for s in pairs)
    assert len({s.prompt for s in pairs}) > laser.PAIRS // 2 and z == [tiny[1].pad_token_id]
    c_ref = logps[:, 0].mean().item()
    assert f"c_ref = {c_ref:.3f}," in capsys.readouterr().out
    assert torch.cat([c for _, c in made]).unique().tolist() == [pytest.approx(c_ref)]
    given = run(tmp_path / "given", "--c_ref", -9, *flags, steps=1)
    for name in ("sample/length", "policy/entropy"):
        assert given[1][name] == rows[1][name], "measuring changes no sample of the training"
    printed = capsys.readouterr().out
    assert "calibration" not in printed
    assert "note: plain GRPO throughout, --steps 1 does not exceed" in printed


def test_the_smallest_beta_v_is_named_and_works(tmp_path, refused):
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
    (["--c_ref", 3], "negative"), (["--beta_v", "inf"], "--beta_v"), (["--beta_v", 0], "--beta_v"),
    (["--eval_samples", 0], "--eval_samples"), (["--group", 1], "at least 2"),
    (["--alpha", -1], "--alpha"), (["--tau", 2], "--tau"), (["--method", "ppo"], "ppo"),
    (["--std_threshold", -1], "--std_threshold"), (["--max_new_tokens", 2], "raise it"),
    (["--reasoning_warmup_steps", -1], "warmup"), (["--score", "x"], "--score")])
def test_bad_flags(tmp_path, refused, argv, says):
    assert says in refused(laser.main, *SMALL, "--steps", 1, "--out", tmp_path / "r", *argv)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------ real input

LATEX = [{"problem": f"What is $\\frac{{{i}}}{{7}}$ as a fraction?",
          "answer": f"\\frac{{{i}}}{{7}}", "level": 1 + i % 5,
          "solution": f"It is $\\boxed{{\\frac{{{i}}}{{7}}}}$."}
         for i in range(1, 13)]


@pytest.fixture(scope="session")
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
        return folder
    return make


@pytest.mark.parametrize("layout", ["tiny", "pad", "pad_is_eos"])
def test_every_score_reads_z_c_at_the_end(tmp_path, monkeypatch, qwen_folder, layout):
    """In the loop: the scores in the advantage, in the MSE and at test time, by brute force on
    every row by itself, with the initial weights."""
    mixed = spy(monkeypatch, laser, "mixed_advantages")
    used, loss = (spy(monkeypatch, laser, f"{x}_loss") for x in ("policy", "verification"))
    sampled = spy(monkeypatch, laser, "sample")
    judged = spy(monkeypatch, laser, "self_verification")
    folder = "tiny" if layout == "tiny" else str(qwen_folder(layout == "pad_is_eos"))
    flags = [] if layout == "tiny" else ["--model", folder, "--dataset", write(
        tmp_path / "a.jsonl", GSM), "--max_new_tokens", 60]
    run(tmp_path / "r", *NO_WARMUP, "--micro_tokens", 10**6, "--beta_v", .3, "--c_ref", -15, *flags,
        steps=1)
    model, tok = common.load_model(folder, laser.Config(device="cpu", dtype="float32"))
    z = tok.convert_tokens_to_ids("<|pad|>" if layout == "tiny" else "<|vision_start|>")

    def brute_force(s):
        with torch.no_grad():
            logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0, -1].double()
        return (.3 * (torch.log_softmax(logits, -1)[z] + 15)).item()

    (A, score, finished, tau, threshold), (mixed_A, where) = mixed[0]
    batch = next(found for _, found in sampled if len(found) == 8 * 4)
    expected = [brute_force(s) for s in batch]
    assert score.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert finished.flatten().tolist() == [s.finished for s in batch]
    assert score.shape == A.shape == (8, 4) and not score.requires_grad
    assert (tau, threshold) == (.1, .01)
    assert jsonl(tmp_path / "r" / "metrics.jsonl")[1]["verify/mixed"] == where.double().mean()
    pairs = zip(mixed_A.flatten().tolist(), (len(s.tokens) for s in batch))
    trained = [x for a, _ in used for x in zip(a[2].tolist(), a[3].sum(1).tolist())]
    assert sorted(x for x in trained if x[0]) == sorted(x for x in pairs if x[0])
    # one update: the scores with gradient are the same numbers
    logp_z, weight = (torch.cat([a[i] for a, _ in loss]) for i in (0, 2))
    again = (.3 * (logp_z[:, 0] + 15))[weight > 0].tolist()
    assert logp_z.requires_grad and {a[4] for a, _ in loss} == {int(finished.sum())} != {0}
    assert sorted(again) == pytest.approx(sorted(
        e for e, s in zip(expected, batch) if s.finished), abs=1e-4)
    (drawn, _, score, levels, k), _ = judged[0]
    assert score.tolist() == pytest.approx(
        [brute_force(s) if s.finished else 0.0 for s in drawn], abs=1e-4)
    if layout == "tiny":  # a problem of level n tells of n changes
        assert levels == [str(tok.decode(s.prompt).count(",")) for s in drawn] and k == 2


def test_truncated_solutions(tmp_path, monkeypatch):
    judged = spy(monkeypatch, laser, "self_verification")
    run(tmp_path / "r", "--max_new_tokens", 14, "--c_ref", -12, steps=0)
    (drawn, _, score, *_), result = judged[0]
    unfinished = [x for x, s in zip(score.tolist(), drawn) if not s.finished]
    assert 0 < len(unfinished) < len(drawn) and set(unfinished) == {0.0}
    for r in run(tmp_path / "none", "--max_new_tokens", 1, "--c_ref", -12)[2:]:
        assert r["sample/truncated"] == 1 and r["verify/loss"] == 0
        assert "verify/f1" not in r and r.get("verify/mixed", 0) == 0


@pytest.mark.parametrize("pad_is_eos,rows", [(False, GSM), (True, LATEX)])
def test_qwen_layout(tmp_path, qwen_folder, monkeypatch, pad_is_eos, rows):
    """Answers are verified, in LaTeX too; z_c is Qwen's own; several tokens may end a response."""
    monkeypatch.setattr(laser, "correct", CORRECT)
    folder = qwen_folder(pad_is_eos)
    tok = AutoTokenizer.from_pretrained(folder)
    assert (tok.eos_token_id == tok.pad_token_id) == pad_is_eos
    ends = tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    about = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**about, "eos_token_id": ends}))
    chosen, seen = spy(monkeypatch, laser, "verification_tokens"), set()
    loss, real = spy(monkeypatch, laser, "verification_loss"), laser.sample

    def some_right(model, tok, prompts, group, *a, **k):  # a random model is never right
        found = real(model, tok, prompts, group, *a, **k)
        seen.update(s.tokens[-1] for s in found if s.finished)
        for s in found[::2]:
            text = rows[0]["solution"] if "solution" in rows[0] else rows[0]["answer"]
            s.tokens = [*tok(text).input_ids, tok.eos_token_id]
            s.text, s.finished, s.logps = text, True, [-1.0] * len(s.tokens)
        return found

    monkeypatch.setattr(laser, "sample", some_right)
    found = run(tmp_path / "r", "--model", folder, "--dataset",
                write(tmp_path / "a.jsonl", rows[:1]), "--eval_dataset",
                write(tmp_path / "b.jsonl", rows[1:]), "--max_new_tokens", 60, "--beta_v", .3)
    assert chosen[0][1] == [tok.convert_tokens_to_ids("<|vision_start|>")] and seen == set(ends)
    assert found[2]["reward/mean"] == .5 and "verify/f1" in found[3]
    assert (torch.cat([a[1] for a, _ in loss]) == 1).sum() == 2 * 16


def test_llama_3_layout_and_a_tokenizer_without_spare_tokens(tmp_path, llama_folder, refused):  # noqa: F811
    cfg = laser.parse(["--model", "Qwen2.5-7B"])
    assert (cfg.alpha, cfg.tau, cfg.beta_v, cfg.std_threshold) == (.1, .1, .1, .1)
    assert laser.parse(["--method", "grpo"]).alpha == laser.parse(["--method", "grpo"]).tau == 0
    tok, names = word_tokenizer(), [f"<|reserved_special_token_{i}|>" for i in (0, 1)]
    tok.add_special_tokens({"additional_special_tokens": names})
    head = SimpleNamespace(weight=torch.zeros(len(tok), 1))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[tok.eos_token_id]),
                            get_output_embeddings=lambda: head)
    cfg.verify_loss = "bce"
    assert tok.convert_ids_to_tokens(laser.verification_tokens(tok, model, [], cfg)) == names
    head.weight, cfg.token = head.weight[:-1], names[1]  # it was never given an embedding
    with pytest.raises(SystemExit):
        laser.verification_tokens(tok, model, [], cfg)
    error = refused(laser.main, *SMALL, "--model", llama_folder(), "--dataset",
                    write(tmp_path / "a.jsonl", GSM), "--out", tmp_path / "r")
    assert "give --token" in error and "<|vision_start|>" in error


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("lora", [False, True])
def test_resume_is_exact(tmp_path, qwen_folder, lora):
    """With the exact reference, which is not the policy that the run goes on from."""
    flags = ["--reference", "exact", "--eval_every", 2]
    if lora:
        flags += ["--model", qwen_folder(False), "--dataset", write(tmp_path / "a.jsonl", GSM),
                  "--max_new_tokens", 60, "--lora", "--beta_v", .3]
    run(tmp_path / "whole", *flags, steps=4)
    run(tmp_path / "r", *flags, steps=2)
    laser.main(["--resume", str(tmp_path / "r"), "--steps", "4"])
    assert files(tmp_path / "r") == files(tmp_path / "whole")
    if not lora:
        weights = [flat(AutoModelForCausalLM.from_pretrained(x))
                   for x in (tmp_path / "r" / "model", common.TINY_FOLDER / "arithmetic")]
        assert not torch.equal(*weights)
