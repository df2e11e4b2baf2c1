"""light_if.py end to end, in-process on the tiny model: stages and their products, resumes,
gradients, real data, refuses."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_common import check_metrics, flat, jsonl, llama_folder, spy, write  # noqa: F401
from test_tiny import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import light_if

SMALL = "--pool 40 --pass_samples 4 --prompts 4 --group 4 --zero_steps 2 --steps 2 --cold_start 6" \
        " --sft_batch 4 --sft_epochs 1 --max_new_tokens 64 --eval_samples 1 --save_every 1".split()
STAGES = {"zero_easy": 1, "zero_hard": 2, "sft": 4, "easy": 5, "hard": 6}  # and their last step


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """One test draws."""
    if request.node.name != "test_run_folder":
        monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)


def run(out, *argv):
    light_if.main([*SMALL, "--out", str(out), *map(str, argv)])
    return rows_of(out)


def rows_of(out, name="metrics"):
    return jsonl(out / f"{name}.jsonl")


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """-> the folder of a run of all stages, made once."""
    return tmp_path_factory.mktemp("whole") / "r"


@pytest.fixture
def full(whole):
    """The same, there."""
    if not whole.exists():
        run(whole)
    return whole


# --------------------------------------------------------------------------------- the run folder


def test_run_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    rows = run(folder)
    printed = capsys.readouterr().out
    assert [r["step"] for r in rows] == list(range(7))
    assert [r.get("stage/number") for r in rows] == [None, 1, 2, 3, 3, 4, 5]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["stages"]) == set(STAGES) and summary["steps"] == 6
    assert summary["after"] == summary["stages"]["hard"] and "| hard" not in printed
    for name, step in STAGES.items():
        logged = {k.removeprefix("eval/"): v for k, v in rows[step].items() if "eval/" in k}
        assert summary["stages"][name] == logged
    assert {"accuracy", "prompt_loose", "instruction_strict", "instruction_loose", "greedy",
            "checked", "depth", "entropy", "length", "accuracy/level1_seen", "accuracy/level2",
            "accuracy/level5"} <= set(summary["before"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "cold_start.jsonl", "config.json", "curves.png", "easy", "metrics.jsonl",
        "model", "prompts.jsonl", "samples.jsonl", "sft", "summary.json", "zero_easy", "zero_hard"]
    for name in ("model", "sft", "zero_easy", "zero_hard", "easy"):
        tok = AutoTokenizer.from_pretrained(folder / name)
        assert weights(folder / name).isfinite().all() and "</think>" in tok.decode(
            tok("a</think>").input_ids, skip_special_tokens=True)
    assert {"step", "prompt", "response", "reward"} == set(rows_of(folder, "samples")[0])


def test_products(full):
    prompts, cold = rows_of(full, "prompts"), rows_of(full, "cold_start")
    first = jsonl(common.TINY_FOLDER / "constraints/train.jsonl")[:40]
    assert [p["prompt"] for p in prompts] == [row["prompt"] for row in first], "as they are"
    assert [(p["cues"], p["level"]) for p in prompts] == [(r["cues"], r["level"]) for r in first]
    assert {len(p["instruction_id_list"]) for p in prompts} == {1, 2, 3, 4, 5}
    for p in prompts:
        assert not held_out(p["instruction_id_list"])
        assert p["hardness"] == light_if.hardness(p["pass_rate"], p["dense"])
        assert p["pass_rate"] * 4 % 1 == 0
    assert len({p["hardness"] for p in prompts}) >= 2
    solved = {p["prompt"] for p in prompts if p["pass_rate"]}
    assert 0 < len(cold) <= 6
    for row in cold:
        task, = light_if.to_tasks([row], "cold start")
        assert row["prompt"] in solved and light_if.fluent(row["response"])
        assert all(light_if.follow(light_if.split_thinking(row["response"])[1], task.constraints))
        assert light_if.depth(row["response"], task.cues) == 1


def test_every_declared_metric_is_logged(full):
    check_metrics({k for r in rows_of(full) for k in r}, light_if.METRICS)


def test_what_each_stage_starts_from(tmp_path, monkeypatch, full):
    """Zero-RL and SFT from the first model, the rest from the stage before; RL's reference is what
    its half began with."""
    begun, kl = spy(monkeypatch, light_if, "begin"), spy(monkeypatch, light_if, "k3_kl")
    out = tmp_path / "r"
    rows = run(out)
    first = "tiny"
    assert [(a[2], str(a[3])) for a, _ in begun] == [
        ("zero_easy", first), ("zero_hard", str(out / "zero_easy")), ("sft", first),
        ("easy", str(out / "sft")), ("hard", str(out / "easy"))]
    assert all(found.abs().max() < 1e-6 for _, found in kl)  # each half has a single step
    assert rows == rows_of(full)


@pytest.mark.parametrize("method, numbers", [("light_if", [1, 2, 3, 4, 5]), ("grpo", [4, 5]),
                                             ("sft_grpo", [3, 4, 5])])
def test_methods(tmp_path, method, numbers):
    rows = run(tmp_path / "r", "--method", method)[1:]
    assert sorted({r["stage/number"] for r in rows}) == numbers
    for r in rows:
        assert ("tea/coefficient" in r) == (method == "light_if" and r["stage/number"] > 3)
        assert ("sft/dropped_nll" in r) == (method == "light_if" and r["stage/number"] == 3)
        assert ("reward/length" in r) == (r["stage/number"] < 3)
        assert r["optim/grad_norm"] >= 0


def test_defaults_are_the_codes_but_for_the_size_of_a_step(llama_folder, capsys):  # noqa: F811
    cfg = light_if.parse(["--model", llama_folder()])
    assert (cfg.zero_rl, cfg.sft, cfg.tea, cfg.curriculum, cfg.reward) == (
        True, "entropy", "length_scaled", True, "dense")
    assert (cfg.group, cfg.prompts, cfg.updates, cfg.lr, cfg.kl_coef, cfg.temperature,
            cfg.max_new_tokens) == (8, 32, 4, 5e-6, .001, 1.0, 2048)
    assert (cfg.token_ratio, cfg.entropy_coef, cfg.sft_lr, cfg.sft_epochs, cfg.cold_start) == (
        .8, .8, 1e-5, 3, 2000)
    assert (cfg.dataset, cfg.eval_dataset) == ("dolly", "ifeval")
    assert light_if.parse(["--tea", "released"]).tea_coef == 10
    assert light_if.parse([]).tea_coef == light_if.parse(["--tea", "uniform"]).tea_coef == 10 / 8192
    assert light_if.parse(["--method", "grpo"]).steps == (
        light_if.parse([]).steps + light_if.parse([]).zero_steps)


def test_switches_off_make_the_baseline(tmp_path):
    off = "--zero_rl false --sft none --tea off".split()
    rows = run(tmp_path / "off", *off)
    assert rows == run(tmp_path / "grpo", "--method", "grpo")
    run(tmp_path / "zero", *off[:4], "--tea", "uniform", "--tea_coef", 0)
    assert torch.equal(weights(tmp_path / "off/model"), weights(tmp_path / "grpo/model"))
    assert torch.equal(weights(tmp_path / "off/model"), weights(tmp_path / "zero/model"))


# ------------------------------------------------------------------------------ stages, and kills


def test_a_stage_from_the_products_of_a_run_is_that_stage(tmp_path, full):
    """What --stage rl+, sft+, cold_start+ make of the products is what the whole run made."""
    for stage, done in (("rl+", 4), ("sft+", 2), ("cold_start+", 2), ("zero_rl+", 0)):
        out = tmp_path / stage
        rows = run(out, "--stage", stage, "--products", full)
        assert torch.equal(weights(out / "model"), weights(full / "model"))
        same = rows_of(full)[1 + done:]
        for r, s in zip(rows[1:], same, strict=True):
            ours = {k: v for k, v in r.items() if k not in ("step", "sample/tokens")}
            assert ours == {k: s[k] for k in ours}
        assert (out / "prompts.jsonl").read_text() == (full / "prompts.jsonl").read_text()


def test_single_stages_one_after_the_other(tmp_path, full):
    before = None
    for stage, has in (("prompts", "prompts.jsonl"), ("zero_rl", "zero_hard"),
                       ("cold_start", "cold_start.jsonl"), ("sft", "sft"), ("rl", "easy")):
        out = tmp_path / stage
        run(out, "--stage", stage, *(["--products", before] if before else []))
        assert (out / has).exists() and (out / "summary.json").exists()
        assert (out / "easy").exists() == (stage == "rl")
        before = out
    assert torch.equal(weights(before / "model"), weights(full / "model"))
    assert rows_of(tmp_path / "cold_start", "cold_start") == rows_of(full, "cold_start")


class Killed(Exception):
    pass


@pytest.mark.parametrize("owner, name, call, after", [
    (common.Run, "end_step", 1, True), (common.Run, "end_step", 2, False),
    (common.Run, "end_step", 4, True), (common.Run, "end_step", 6, False),
    (light_if, "leave", 1, False), (light_if, "leave", 3, True), (light_if, "begin", 4, False),
    (light_if, "make_prompts", 1, False), (light_if, "extract", 1, True),
    (common.Run, "finish", 1, False)])
def test_a_killed_run_goes_on_exactly(tmp_path, monkeypatch, full, owner, name, call, after):
    out, real, calls = tmp_path / "r", getattr(owner, name), []

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        found = real(*a, **k)
        if len(calls) == call:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            run(out)
    light_if.main(["--resume", str(out)])
    assert rows_of(out) == rows_of(full)
    assert rows_of(out, "samples") == rows_of(full, "samples")
    for model in ("model", *list(STAGES)[:-1]):
        assert torch.equal(weights(out / model), weights(full / model)), model
    a, b = (json.loads((f / "summary.json").read_text()) for f in (out, full))
    assert a["stages"] == b["stages"] and a["after"] == b["after"]


def test_checkpoints_far_apart(tmp_path, monkeypatch, full):
    out, real = tmp_path / "r", light_if.reward
    calls = []

    def dies(*a):
        calls.append(1)
        if len(calls) > 16:  # in the second half of Zero-RL
            raise Killed
        return real(*a)

    monkeypatch.setattr(light_if, "reward", dies)
    with pytest.raises(Killed):
        run(out, "--save_every", 0)
    monkeypatch.setattr(light_if, "reward", real)
    light_if.main(["--resume", str(out)])
    assert rows_of(out) == rows_of(full)


@pytest.mark.parametrize("argv, steps", [
    (["--steps", 0], 4), (["--steps", 1], 5), (["--zero_steps", 0], 4), (["--zero_steps", 1], 5),
    (["--steps", 0, "--method", "grpo"], 0)])
def test_stages_without_steps(tmp_path, argv, steps):
    assert run(tmp_path / "r", *argv)[-1]["step"] == steps
    assert weights(tmp_path / "r" / "model").isfinite().all()


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("argv", [["--updates", 2], ["--tea", "released"], ["--sft", "plain"]])
def test_micro_batches_do_not_change_the_run(tmp_path, argv):
    found = []
    for tokens in (4096, 60):
        rows = run(tmp_path / str(tokens), *argv, "--micro_tokens", tokens)
        found.append((weights(tmp_path / str(tokens) / "zero_easy"),
                      [r["optim/grad_norm"] for r in rows[1:2]]))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def batch(tiny, n=4):
    """A mini-batch of responses with advantages, under the tiny model."""
    tok = tiny[1]
    prompts = common.encode_questions(tok, ["p", "a longer prompt", "q", "r"][:n])
    return common.as_samples(tok, prompts, ["a b", "ccc dd e f g", "h", "12-5=7 and so on"][:n])


@pytest.mark.parametrize("tea", ["released", "length_scaled", "uniform"])
def test_gradient_of_the_tea_loss(policy, tiny, tea):
    """loss = PG + .001 KL - TEA of a whole mini-batch, against autograd on plain logits; the sum of
    the micro-batches has the same gradient."""
    samples, A = batch(tiny), torch.tensor([1.2, -.4, .3, -1.1])
    cfg = SimpleNamespace(temperature=1.0, micro_tokens=4096, device="cpu")
    n_tok = sum(len(s.tokens) for s in samples)
    A_mean = sum(a * len(s.tokens) for a, s in zip(A, samples)) / n_tok

    def backward(rows):
        ids, mask = common.collate([samples[i] for i in rows], cfg.device)
        logp, H = common.response_logps(policy, ids, mask, 1.0, with_entropy=True,
                                        entropy_grad=True)
        w = light_if.tea_weights(logp, A[rows], A_mean, mask)
        alpha = light_if.tea_coefficients(w, mask, tea, 2.0)
        loss, _ = light_if.policy_loss(logp, logp.detach(), A[rows], mask, n_tok)
        (loss - light_if.tea_bonus(H, alpha, n_tok)).backward()

    grads = []
    for parts in ([[0, 1, 2, 3]], [[2], [0, 3], [1]]):
        policy.zero_grad()
        for rows in parts:
            backward(rows)
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    size = grads[0].abs().max()
    assert torch.allclose(*grads, atol=2e-6 * size) and size > 1e-3
    total = 0
    for s, a in zip(samples, A):
        logits = policy(torch.tensor([[*s.prompt, *s.tokens]])).logits[0, len(s.prompt) - 1:-1]
        full = logits.log_softmax(-1)
        logp = full[range(len(s.tokens)), s.tokens]
        H = -(full.exp() * full).sum(-1)
        w = ((a - A_mean) * logp.detach()).softmax(0)  # the mean of log pi cancels
        alpha = {"released": (2 * w).clamp(max=5), "uniform": 2 + 0 * w,
                 "length_scaled": 2 * len(w) * w}[tea]
        total = total + (-a * (logp - logp.detach()).exp() - alpha * H).sum() / n_tok
    truth = torch.autograd.grad(total, list(policy.parameters()))
    assert torch.allclose(grads[0], torch.cat([g.flatten() for g in truth]), atol=2e-6 * size)


def test_gradient_of_the_steps_of_tea_rl(tmp_path, monkeypatch, full):
    """Both mini-batches of a step, as the run trains on them, against autograd on plain logits:
    rewards to advantages, old and reference policy, mean of A over the tokens, all terms."""
    begun, drawn, rewards = (spy(monkeypatch, light_if, x) for x in ("begin", "sample", "reward"))
    real, found = light_if.update, []

    def update(opt, *rest):
        policy, _, _, start = begun[0][1]
        samples = next(out for args, out in drawn if args[3] == 4)
        R = torch.tensor([r for _, (r, *_) in rewards][:16]).view(4, 4)
        A = ((R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-6)).flatten()
        rows = range(8 * len(found), 8 * len(found) + 8)
        T = [len(samples[i].tokens) for i in rows]
        A_mean = sum(A[i] * t for i, t in zip(rows, T)) / sum(T)

        def score(model, s):
            logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0, len(s.prompt) - 1:-1]
            full = logits.log_softmax(-1)
            return full[range(len(s.tokens)), s.tokens], -(full.exp() * full).sum(-1)

        total = 0
        for i, t in zip(rows, T):
            logp, H = score(policy, samples[i])
            with torch.no_grad():  # the stage begins here: the old policy is the reference
                old = score(start, samples[i])[0]
            r, a = (logp - old).exp(), A[i]
            pg = torch.stack([-a * r, -a * r.clamp(0, 2)]).max(0).values
            pg = pg if a >= 0 else pg.clamp(max=-10 * a)
            kl = ((old - logp).exp() - (old - logp) - 1).clamp(max=10)
            alpha = 0.3 * (t * ((a - A_mean) * logp.detach()).softmax(0)).clamp(max=100)
            total = total + (pg + 0.5 * kl - alpha * H).sum() / sum(T)
        truth = torch.autograd.grad(total, list(policy.parameters()))
        truth = torch.cat([g.flatten() for g in truth])
        ours = torch.cat([m.grad.flatten() for m in opt.masters])
        assert truth.abs().max() > 1e-3
        assert torch.allclose(ours, truth, atol=1e-5 + 1e-3 * truth.abs().max().item())
        assert rest[2] == pytest.approx(total.item(), abs=1e-4)
        found.append(ours)
        return real(opt, *rest)

    monkeypatch.setattr(light_if, "update", update)
    run(tmp_path / "r", "--stage", "rl", "--products", full, "--steps", 1, "--updates", 2,
        "--tea_coef", .3, "--kl_coef", .5, "--lr", 2e-4)
    assert len(found) == 2


def test_learning_rates(tmp_path, monkeypatch, full):
    """RL: constant after the warm-up of each half. SFT: a cosine to 0 after 1 % of warm-up."""
    rates, real = {}, light_if.update

    def update(opt, cfg, where, loss, rate):
        rates.setdefault(where.split("(")[1][:-1], []).append(rate[0])
        return real(opt, cfg, where, loss, rate)

    monkeypatch.setattr(light_if, "update", update)
    run(tmp_path / "r", "--stage", "sft+", "--products", full, "--steps", 6, "--warmup_steps", 2,
        "--lr", 1e-4, "--sft_lr", 1e-3, "--sft_batch", 1, "--sft_epochs", 20)
    assert rates["easy"] == rates["hard"] == [5e-5, 1e-4, 1e-4]
    n = len(rates["SFT"])
    assert n > 100 and rates["SFT"][0] == pytest.approx(5e-4)  # two steps of warm-up
    for i in (2, n // 2, n - 1):
        assert rates["SFT"][i] == pytest.approx(1e-3 * (1 + math.cos(math.pi * i / n)) / 2)


def test_entropy_has_a_gradient_only_where_asked(policy, tiny, monkeypatch):
    ids, mask = common.collate(batch(tiny), "cpu")
    H = common.response_logps(policy, ids, mask, 1.0, with_entropy=True)[1]
    assert not H.requires_grad
    found = []
    for floats in (2**24, 700):  # in one piece, and in chunks that are recomputed
        monkeypatch.setattr(common, "HEAD_FLOATS", floats)
        policy.zero_grad()
        logp, H = common.response_logps(policy, ids, mask, 1.0, with_entropy=True,
                                        entropy_grad=True)
        (H.sum() + logp.sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*found, atol=1e-4) and (H[mask == 0] == 0).all()


def test_sft_trains_on_the_selected_tokens_only(tmp_path, monkeypatch, full):
    chosen = spy(monkeypatch, light_if, "select_tokens")
    rows = run(tmp_path / "r", "--stage", "sft", "--products", full)
    for (*_, mask, rho, coef), selected in chosen:
        assert (rho, coef) == (.8, .8)
        T = mask.sum(1)
        assert torch.equal(selected.sum(1), light_if.kept(T, .8).long()) and (T > 1).all()
    (nll, _, mask, *_), selected = chosen[0]
    first = rows[1]
    assert first["sft/loss"] == pytest.approx(
        ((nll * selected).sum() / selected.sum()).item(), rel=1e-5)
    assert first["sft/nll"] == pytest.approx(((nll * mask).sum() / mask.sum()).item(), rel=1e-5)
    plain = run(tmp_path / "plain", "--stage", "sft", "--products", full, "--sft", "plain")[1]
    assert plain["sft/loss"] == pytest.approx(first["sft/nll"], rel=1e-5) != first["sft/loss"]
    assert plain["sft/entropy"] == first["sft/entropy"]


@pytest.mark.parametrize("argv", [["--reward", "sparse"], ["--tea", "uniform"], ["--kl_coef", 0],
                                  ["--updates", 4], ["--temperature", .8], ["--eval_samples", 0],
                                  ["--curriculum", "false"], ["--warmup_steps", 2]])
def test_switches(tmp_path, argv, full):
    out = tmp_path / "r"
    rows = run(out, "--stage", "rl+", "--products", full, *argv)
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert ("policy/kl" in rows[-1]) == ("--kl_coef" not in argv)
    assert ("policy/mismatch" in rows[-1]) == ("--updates" not in argv)
    if "--eval_samples" in argv:
        assert rows[0]["eval/accuracy"] == rows[0]["eval/greedy"]


def test_sparse_reward_is_all_or_nothing(tmp_path, full):
    run(tmp_path / "r", "--stage", "rl+", "--products", full, "--reward", "sparse")
    assert {s["reward"] for s in rows_of(tmp_path / "r", "samples")} <= {0, 1}


# ------------------------------------------------------------------------------ real-model paths

IFEVAL = [
    {"key": 1, "prompt": "Write a note without commas and highlight 2 parts.",
     "instruction_id_list": ["punctuation:no_comma",
                             "detectable_format:number_highlighted_sections"],
     "kwargs": [{}, {"num_highlights": 2}]},
    {"key": 2, "prompt": "Say less.", "instruction_id_list": ["length_constraints:number_words"],
     "kwargs": [{"relation": "less than", "num_words": 9, "num_highlights": None}]}]
SEED_ROWS = [{"instruction": f"Name {i} rivers.", "context": ""} for i in range(20)]


@pytest.fixture
def data(tmp_path):
    """-> flags that name local files."""
    return ["--dataset", write(tmp_path / "seeds.jsonl", SEED_ROWS),
            "--eval_dataset", write(tmp_path / "ifeval.jsonl", IFEVAL)]


@pytest.mark.parametrize("lora", [[], ["--lora"]])
@pytest.mark.parametrize("template", [False, True])
def test_random_weights(tmp_path, data, llama_folder, lora, template, capsys):  # noqa: F811
    """No response ever has a </think>: no prompt is easy or hard, every reward is 0, and yet it
    runs."""
    rows = run(tmp_path / "r", *data, "--model", llama_folder(template=template), "--method",
               "grpo", "--max_new_tokens", 8, "--pool", 10, "--updates", 2, *lora)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert rows[-1]["reward/mean"] == 0 == rows[-1]["eval/accuracy"]
    assert {p["hardness"] for p in rows_of(tmp_path / "r", "prompts")} == {"too_hard"}
    assert "no prompt is easy" in capsys.readouterr().out
    assert weights(tmp_path / "r" / "model").isfinite().all()


def test_a_model_that_does_not_think_is_asked_to(data, llama_folder, tmp_path):  # noqa: F811
    cfg = light_if.parse(["--model", llama_folder(template=True), *data, "--max_new_tokens", "8"])
    policy, tok = common.load_model(cfg.model, cfg)
    tasks = light_if.to_tasks(IFEVAL, "x")
    asked = tok.decode(light_if.render(policy, tok, tasks, "x", cfg)[0].prompt)
    assert light_if.THINK in asked
    tok.chat_template += "{# <think> #}"
    asked = tok.decode(light_if.render(policy, tok, tasks, "x", cfg)[0].prompt)
    assert light_if.THINK not in asked and IFEVAL[0]["prompt"] in asked


def test_a_cold_start_that_finds_nothing_says_so(tmp_path, data, llama_folder, refused,  # noqa: F811
                                                 monkeypatch):
    monkeypatch.setattr(light_if, "TRIES", 1)
    error = refused(light_if.main, *SMALL, *data, "--model", llama_folder(), "--max_new_tokens", 4,
                    "--pool", 5, "--method", "sft_grpo", "--out", tmp_path / "r")
    assert "0 correct" in error and "--sft none" in error


def test_judge_of_fluency(tmp_path, monkeypatch, full, llama_folder):  # noqa: F811
    """Only what the judge rates 6 or more is kept, on the request and the answer alone."""
    asked, drawn = [], []

    def rates(judge, tok, prompts, k, n, temperature):
        asked.extend(tok.batch_decode(prompts))
        return [SimpleNamespace(text=f"so [[{5 + i % 2}]]") for i in range(len(prompts))]

    def draws(model, *a):
        if model.config.model_type == "llama":
            return rates(model, *a)
        drawn.extend(found := real(model, *a))
        return found

    real = light_if.sample
    monkeypatch.setattr(light_if, "sample", draws)
    run(tmp_path / "r", "--stage", "cold_start", "--products", full, "--judge", llama_folder())
    cold = rows_of(tmp_path / "r", "cold_start")
    assert 0 < len(cold) and len(asked) >= 2 * len(cold) - 1
    read = [a.split("<answer>\n")[1].split("\n</answer>")[0] for a in asked]
    said = [light_if.split_thinking(s.text) for s in drawn]
    assert set(read) <= {light_if.quoted(answer) for _, answer in said if answer}
    answers = {light_if.split_thinking(r["response"])[1] for r in cold}
    assert all(any(x in a for a in asked[1::2]) for x in answers)


def test_a_rating_in_the_text_does_not_count(tiny, monkeypatch):
    calls = spy(monkeypatch, light_if, "encode_questions")
    cfg = SimpleNamespace(max_new_tokens=2)
    light_if.ratings(*tiny, [("Rate it [[10]]", "I am [[9]]")], cfg)
    text, = calls[0][0][1]
    assert light_if.parse_rating(text.split("<request>")[1].split("Explain")[0]) == 0
    assert "[ [10]]" in text and "I am [ [9]]" in text


def test_rows_with_constraints_are_taken_as_they_are(tmp_path, data, llama_folder):  # noqa: F811
    ready = [{**row, "prompt": f"{row['prompt']} ({i})"} for i in range(3) for row in IFEVAL]
    run(tmp_path / "r", "--dataset", write(tmp_path / "ready.jsonl", ready + IFEVAL), *data[2:],
        "--model", llama_folder(), "--method", "grpo", "--max_new_tokens", 4, "--stage", "prompts")
    prompts = rows_of(tmp_path / "r", "prompts")
    assert sorted(p["prompt"] for p in prompts) == sorted(r["prompt"] for r in ready)


def test_held_out_prompts_are_no_seeds(data, tmp_path):
    rows = [*SEED_ROWS, {"instruction": "Say less."}, {"instruction": "Say less"},
            {"instruction": "Use it.", "context": "a text"}, {"instruction": None}]
    cfg = SimpleNamespace(dataset=write(tmp_path / "more.jsonl", rows), eval_dataset=data[3],
                          eval_size=1)
    seeds, held_out = light_if.load_data(cfg)
    assert sorted(seeds) == sorted(r["instruction"] for r in SEED_ROWS) and len(held_out) == 1


def test_ifeval_rows_from_arrow_and_their_levels(data):
    tasks = light_if.load_data(SimpleNamespace(dataset=data[1], eval_dataset=data[3],
                                               eval_size=0))[1]
    assert [t.level for t in tasks] == ["2", "1"]
    assert tasks[1].constraints == [("length_constraints:number_words",
                                     {"relation": "less than", "num_words": 9})]


# --------------------------------------------------------------------------------------- refuses


@pytest.mark.parametrize("argv, says", [
    (["--stage", "nonsense"], "--stage nonsense"), (["--stage", "rl"], "--products"),
    (["--products", "runs/x"], "--stage"), (["--group", 1], "--group 1"),
    (["--updates", 99], "--updates 99"), (["--token_ratio", 0], "--token_ratio"),
    (["--token_ratio", 1.5], "--token_ratio"), (["--pool", 0], "--pool"),
    (["--cold_start", 0], "--cold_start"), (["--tea_coef", -1], "--tea_coef"),
    (["--kl_coef", "nan"], "--kl_coef"), (["--sampled_tokens", 9], "--sampled_tokens"),
    (["--dataset", "x.jsonl"], "x.jsonl: no such file"),
    (["--eval_size", 1], "--eval_size"),
    (["--judge", "nowhere"], "--judge nowhere"), (["--sft_lr", 0], "--sft_lr"),
    (["--stage", "rl", "--products", "nowhere"], "nowhere: no config.json")])
def test_refused_flags(argv, says, refused, tmp_path):
    assert says in refused(light_if.main, *SMALL, "--out", tmp_path / "r", *argv)


def test_refused_products(tmp_path, refused, full, llama_folder, data):  # noqa: F811
    short = tmp_path / "short"
    run(short, "--stage", "prompts")
    assert "zero_hard" in refused(light_if.main, *SMALL, "--out", tmp_path / "a", "--stage",
                                  "cold_start", "--products", short)
    assert "cold_start.jsonl" in refused(
        light_if.main, *SMALL, "--out", tmp_path / "b", "--stage", "sft", "--products", short)
    assert not (tmp_path / "b" / "prompts.jsonl").exists()  # nothing is copied in vain
    assert "--zero_rl True" in refused(
        light_if.main, *SMALL, "--out", tmp_path / "d", "--stage", "sft", "--products", full,
        "--zero_rl", "false")
    assert "--sft entropy" in refused(
        light_if.main, *SMALL, "--out", tmp_path / "e", "--stage", "rl", "--products", full,
        "--sft", "plain")
    assert "--model tiny" in refused(
        light_if.main, *SMALL, "--out", tmp_path / "c", "--stage", "sft", "--products", full,
        "--model", llama_folder(), *data)


@pytest.mark.parametrize("level, told", [
    (3, "3"), ("1_seen", "1_seen"), (None, "1"), (7.5, "1"), ("hard", "1"), (True, "1")])
def test_levels_of_the_data(level, told):
    row = {"prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    task, = light_if.to_tasks([row | {"level": level}], "x")
    assert task.level == told


def test_the_tiny_names_go_with_others(tmp_path, worlds, full):
    """A checkpoint of the tiny model on --dataset tiny; --model tiny on rows of one's own."""
    flags = ["--method", "grpo", "--eval_samples", 0]
    run(tmp_path / "a", *flags, "--model", worlds / "constraints", "--dataset", "tiny")
    own = write(tmp_path / "own.jsonl", jsonl(worlds / "constraints/train.jsonl")[5:45])
    run(tmp_path / "b", *flags, "--dataset", own)
    asked = [[row["prompt"] for row in rows_of(tmp_path / run, "prompts")] for run in "ab"]
    assert asked[0][5:] == asked[1][:35]


@pytest.mark.parametrize("row, says", [
    ({"prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": [{}], "cues": ["("]},
     "row 1 cannot be checked"),
    ({"prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": [{}],
      "cues": ["a", "b"]}, "as many cues"),
    ({"prompt": "a"}, "instruction_id_list"),
    ({"prompt": "a", "instruction_id_list": ["x:y"], "kwargs": [{}]}, "x:y"),
    ({"prompt": "a", "instruction_id_list": ["startend:end_checker"], "kwargs": [{}]}, "row 1"),
    ({"prompt": "a", "instruction_id_list": ["startend:end_checker"],
      "kwargs": [{"end_phrase": 3}]}, "end_phrase cannot be 3"),
    ({"prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": [{}, {}]}, "row 1"),
    ({"prompt": " ", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}, "row 1"),
    ({"prompt": "a", "instruction_id_list": [], "kwargs": []}, "row 1"),
    ({"prompt": 3, "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}, "row 1"),
    ({"prompt": "a", "instruction_id_list": "startend:quotation", "kwargs": [{}]}, "row 1")])
def test_refused_constraints(tmp_path, refused, llama_folder, data, row, says):  # noqa: F811
    error = refused(light_if.main, *SMALL, "--out", tmp_path / "r", "--model", llama_folder(),
                    *data[:2], "--eval_dataset", write(tmp_path / "bad.jsonl", [row]))
    assert says in error


@pytest.mark.parametrize("rows, says", [([{"text": "a"}], "instruction"),
                                        ([{"instruction": 3}], "instruction"),
                                        ([{"instruction": " "}], "no instruction")])
def test_refused_seeds(tmp_path, refused, llama_folder, data, rows, says):  # noqa: F811
    error = refused(light_if.main, *SMALL, "--out", tmp_path / "r", "--model", llama_folder(),
                    "--dataset", write(tmp_path / "bad.jsonl", rows), *data[2:])
    assert says in error
