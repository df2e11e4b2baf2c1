"""light_if.py end to end, in-process on the tiny model: stages and their products, resumes,
gradients, real data, refuses."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from test_common import check_metrics, flat, jsonl, llama_folder, spy, write  # noqa: F401
from test_tiny import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import light_if

SMALL = "--pool 40 --pass_samples 4 --prompts 4 --group 4 --zero_steps 4 --steps 4 --cold_start 6" \
        " --sft_batch 4 --sft_epochs 1 --max_new_tokens 64 --eval_samples 1 --save_every 1".split()
LAST = {"zero_easy": 2, "zero_hard": 4, "sft": 6, "easy": 8, "hard": 10}  # step of each stage
ZERO = ["prompts.jsonl", "zero_easy", "zero_hard"]  # products of stages A, B, then C and D
COLD, SFT = [*ZERO, "cold_start.jsonl"], [*ZERO, "cold_start.jsonl", "sft"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)


def run(out, *argv, given=()):
    """Runs the script, in a folder that holds the `given` products. -> its metrics"""
    for product in given:
        out.mkdir(exist_ok=True)
        (shutil.copytree if product.is_dir() else shutil.copy)(product, out / product.name)
    light_if.main([*SMALL, "--out", str(out), *map(str, argv)])
    return rows_of(out)


def rows_of(out, name="metrics"):
    return jsonl(out / f"{name}.jsonl")


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, worlds):
    """-> the folder of a run of all stages, made once, and what its stages began with."""
    found = SimpleNamespace(folder=tmp_path_factory.mktemp("whole") / "r")
    with pytest.MonkeyPatch.context() as patch:
        found.begun = spy(patch, light_if, "begin")
        run(found.folder)
    return found


@pytest.fixture
def full(whole):
    """-> the folder of a run of all stages."""
    return whole.folder


@pytest.fixture
def given(full):
    """-> a function: names of products -> their paths in the whole run."""
    return lambda names: [full / name for name in names]


# --------------------------------------------------------------------------------- the run folder


def test_run_folder(full):
    rows = rows_of(full)
    assert [r["step"] for r in rows] == list(range(11))
    assert [r.get("stage/number") for r in rows] == [None, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    summary = json.loads((full / "summary.json").read_text())
    assert set(summary["stages"]) == set(LAST) and summary["steps"] == 10
    assert summary["after"] == summary["stages"]["hard"]
    for name, step in LAST.items():
        logged = {k.removeprefix("eval/"): v for k, v in rows[step].items() if "eval/" in k}
        assert summary["stages"][name] == logged
    assert {"accuracy", "prompt_loose", "instruction_strict", "instruction_loose", "greedy",
            "checked", "depth", "entropy", "length", "accuracy/level1_seen", "accuracy/level2",
            "accuracy/level5"} <= set(summary["before"])
    assert {p.name for p in full.iterdir()} == {
        "checkpoint", "cold_start.jsonl", "config.json", "curves.png", "metrics.jsonl", "model",
        "prompts.jsonl", "samples.jsonl", "summary.json", *LAST}
    for name in ("model", *LAST):
        tok = AutoTokenizer.from_pretrained(full / name)
        assert weights(full / name).isfinite().all() and "</think>" in tok.decode(
            tok("a</think>").input_ids, skip_special_tokens=True)
    assert torch.equal(weights(full / "model"), weights(full / "hard"))
    assert {"step", "prompt", "response", "reward"} == set(rows_of(full, "samples")[0])


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


def test_what_each_stage_starts_from(tmp_path, monkeypatch, whole, given):
    """Zero-RL and SFT from the first model, the rest from the stage before; RL's reference is what
    its half began with. --sft none goes on from Zero-RL's model."""
    out = whole.folder
    assert [(a[1], str(a[2])) for a, _ in whole.begun] == [
        ("zero_easy", "tiny"), ("zero_hard", str(out / "zero_easy")), ("sft", "tiny"),
        ("easy", str(out / "sft")), ("hard", str(out / "easy"))]
    kl = [r["policy/kl"] for r in rows_of(out) if "policy/kl" in r]
    assert max(kl[::2]) < 1e-6 < min(kl[1::2])  # of each half's two steps
    begun = spy(monkeypatch, light_if, "begin")
    run(tmp_path / "r", "--sft", "none", "--steps", 1, given=given(ZERO))
    assert [str(a[2]) for a, _ in begun] == [str(tmp_path / "r" / "zero_hard")]


def test_products_are_used_and_not_made_again(tmp_path, full, given):
    """What a new run makes of them is what the whole run made."""
    for names, done in ((SFT, 6), (ZERO, 4)):
        out = tmp_path / str(done)
        rows = run(out, given=given(names))
        assert torch.equal(weights(out / "model"), weights(full / "model"))
        for r, s in zip(rows[1:], rows_of(full)[1 + done:], strict=True):
            ours = {k: v for k, v in r.items() if k not in ("step", "sample/tokens")}
            assert ours == {k: s[k] for k in ours}


@pytest.mark.parametrize("method, numbers", [("light_if", {1, 2, 3, 4, 5}), ("grpo", {4, 5}),
                                             ("sft_grpo", {3, 4, 5})])
def test_methods(tmp_path, method, numbers, full):
    rows = run(tmp_path / "r", "--method", method) if method != "light_if" else rows_of(full)
    assert {r["stage/number"] for r in rows[1:]} == numbers
    for r in rows[1:]:
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
    off = "--zero_rl false --sft none --tea off --steps 2".split()
    rows = run(tmp_path / "off", *off)
    assert rows == run(tmp_path / "grpo", "--method", "grpo", "--steps", 2)
    run(tmp_path / "zero", *off, "--tea", "uniform", "--tea_coef", 0)
    assert torch.equal(weights(tmp_path / "off/model"), weights(tmp_path / "grpo/model"))
    assert torch.equal(weights(tmp_path / "off/model"), weights(tmp_path / "zero/model"))


# -------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def killed_in(out, argv, owner, name, after=False, call=1):
    """Starts the run, or goes on with it, until the n-th call of a function, or its end."""
    real, calls = getattr(owner, name), []

    def dies(*a, **k):
        calls.append(1)
        if len(calls) < call or after:
            found = real(*a, **k)
        if len(calls) == call:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            light_if.main([*argv, "--resume", str(out)] if (out / "config.json").exists() else
                          [*SMALL, *argv, "--out", str(out)])


def same(out, full):
    """Do the two runs agree in whatever they left?"""
    assert rows_of(out) == rows_of(full)
    assert rows_of(out, "samples") == rows_of(full, "samples")
    for model in ("model", *LAST):
        assert torch.equal(weights(out / model), weights(full / model)), model
    a, b = (json.loads((f / "summary.json").read_text()) for f in (out, full))
    assert a["stages"] == b["stages"] and a["after"] == b["after"]
    return True


def test_a_run_that_is_killed_everywhere_goes_on_exactly(tmp_path, full):
    """One after the other: before the first product; in the middle of every training stage, with
    and without its last step; after its last step, but before its product; after its product."""
    out, start = tmp_path / "r", time.perf_counter()
    step, leave, Run = "end_step", "leave", common.Run
    for place in [(light_if, "make_prompts"), (Run, step, True), (light_if, leave),
                  (Run, step), (Run, step, True), (light_if, leave), (light_if, "extract", True),
                  (Run, step, True), (light_if, leave), (light_if, leave, True), (Run, step, True),
                  (light_if, leave), (light_if, "begin"), (Run, step, True), (light_if, leave),
                  (Run, "finish")]:
        killed_in(out, [], *place)
    light_if.main(["--resume", str(out)])
    assert same(out, full)
    seconds = json.loads((out / "summary.json").read_text())["seconds"]
    assert seconds < time.perf_counter() - start, "time is counted twice"


def test_checkpoints_far_apart(tmp_path, full):
    """None inside of a stage: it is made anew, as often as it is killed; also where the checkpoint
    of its end is damaged, and its product is there."""
    out = tmp_path / "r"
    killed_in(out, ["--save_every", "0"], common.Run, "end_step", True, call=3)  # in zero_hard
    killed_in(out, [], common.Run, "end_step", True, call=3)                     # in sft
    killed_in(out, [], light_if, "leave", True, call=2)                          # easy
    (out / "checkpoint/step_000008.pt").write_bytes(b"")
    light_if.main(["--resume", str(out)])
    assert same(out, full)


def test_the_checkpoint_before_a_damaged_one(tmp_path, full):
    """Also where it is older than the product of its stage, or in the stage before."""
    out = tmp_path / "r"
    for step, call, *place in [(2, 1, light_if, "leave"), (5, 4, common.Run, "end_step"),
                               (6, 1, light_if, "leave"), (10, 3, light_if, "leave")]:
        killed_in(out, [], *place, after=True, call=call)
        (out / f"checkpoint/step_{step:06d}.pt").write_bytes(b"")
    light_if.main(["--resume", str(out)])
    assert same(out, full)


def test_a_finished_run_goes_on_with_more_steps(tmp_path, full):
    """The last half becomes longer (D6)."""
    out = shutil.copytree(full, tmp_path / "r")
    light_if.main(["--resume", str(out), "--steps", "6"])
    rows = rows_of(out)
    assert rows[:11] == rows_of(full) and rows[11]["stage/number"] == 5
    assert not torch.equal(weights(out / "model"), weights(full / "model"))


@pytest.mark.parametrize("argv, steps", [
    ("--steps 0", 6), ("--zero_steps 1 --steps 1", 4), ("--steps 0 --method grpo", 0)])
def test_stages_without_steps(tmp_path, argv, steps):
    assert run(tmp_path / "r", *argv.split())[-1]["step"] == steps
    assert weights(tmp_path / "r" / "model").isfinite().all()


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("argv, products, stage", [
    ("--zero_steps 1 --sft none --steps 0 --updates 2", ZERO[:1], "zero_easy"),
    ("--steps 0", COLD, "sft"), ("--steps 1 --updates 2", SFT, "easy"),
    ("--steps 1 --tea released", SFT, "easy")])
def test_micro_batches_do_not_change_a_step(tmp_path, given, argv, products, stage):
    found = []
    for tokens in (4096, 60):
        out = tmp_path / str(tokens)
        row = run(out, *argv.split(), "--micro_tokens", tokens, given=given(products))[1]
        found.append((weights(out / stage), {k: v for k, v in row.items() if "/" in k
                                             and "eval" not in k}))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-5)


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
        logp, H = common.response_logps(policy, ids, mask, 1.0, with_entropy=True)
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


def test_gradient_of_the_steps_of_tea_rl(tmp_path, monkeypatch, given):
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

        total = pg_total = 0
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
            pg_total += pg.sum().item() / sum(T)
        truth = torch.autograd.grad(total, list(policy.parameters()))
        truth = torch.cat([g.flatten() for g in truth])
        ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
        assert truth.abs().max() > 1e-3
        assert torch.allclose(ours, truth, atol=1e-5 + 1e-3 * truth.abs().max().item())
        found.append(pg_total)
        return real(opt, *rest)

    monkeypatch.setattr(light_if, "update", update)
    rows = run(tmp_path / "r", "--steps", 1, "--updates", 2, "--tea_coef", .3, "--kl_coef", .5,
               "--lr", 2e-4, given=given(SFT))
    assert len(found) == 2 and rows[1]["policy/loss"] == pytest.approx(sum(found) / 2, abs=1e-4)


def test_learning_rates(tmp_path, monkeypatch, given):
    """RL: constant after the warm-up of each half. SFT: a cosine to 0 after 1 % of warm-up."""
    rates = {}

    def update(opt, cfg, where, rate):
        rates.setdefault(where.split("(")[1][:-1], []).append(rate[0])
        opt.zero_grad()
        return 1.0

    monkeypatch.setattr(light_if, "update", update)
    run(tmp_path / "r", "--steps", 6, "--warmup_steps", 2, "--lr", 1e-4, "--sft_lr", 1e-3,
        "--sft_batch", 1, "--sft_epochs", 20, "--save_every", 0, given=given(COLD))
    assert rates["easy"] == rates["hard"] == [5e-5, 1e-4, 1e-4]
    n = len(rates["SFT"])
    assert n > 100 and rates["SFT"][0] == pytest.approx(5e-4)  # two steps of warm-up
    for i in (2, n // 2, n - 1):
        assert rates["SFT"][i] == pytest.approx(1e-3 * (1 + math.cos(math.pi * i / n)) / 2)


def test_sft_trains_on_the_selected_tokens_only(tmp_path, monkeypatch, given):
    chosen = spy(monkeypatch, light_if, "select_tokens")
    rows = run(tmp_path / "r", "--steps", 0, given=given(COLD))
    for (*_, mask, rho, coef), selected in chosen:
        assert (rho, coef) == (.8, .8)
        T = mask.sum(1)
        assert torch.equal(selected.sum(1), light_if.kept(T, .8).long()) and (T > 1).all()
    (nll, _, mask, *_), selected = chosen[0]
    first = rows[1]
    assert first["sft/loss"] == pytest.approx(
        ((nll * selected).sum() / selected.sum()).item(), rel=1e-5)
    assert first["sft/nll"] == pytest.approx(((nll * mask).sum() / mask.sum()).item(), rel=1e-5)
    plain = run(tmp_path / "plain", "--steps", 0, "--sft", "plain", given=given(COLD))[1]
    assert plain["sft/loss"] == pytest.approx(first["sft/nll"], rel=1e-5) != first["sft/loss"]
    assert plain["sft/entropy"] == first["sft/entropy"]


@pytest.mark.parametrize("argv", [
    "--reward sparse --kl_coef 0 --eval_samples 0",
    "--tea uniform --updates 4 --temperature .8 --curriculum false --warmup_steps 2"])
def test_switches(tmp_path, argv, given):
    out = tmp_path / "r"
    rows = run(out, *argv.split(), given=given(SFT))
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert ("policy/kl" in rows[-1]) == ("--kl_coef" not in argv)
    if "sparse" in argv:
        assert rows[0]["eval/accuracy"] == rows[0]["eval/greedy"]
        assert {s["reward"] for s in rows_of(out, "samples")} <= {0, 1}


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


@pytest.mark.parametrize("lora, template", [([], False), (["--lora"], True)])
def test_random_weights(tmp_path, data, llama_folder, lora, template, capsys):  # noqa: F811
    """No response ever has a </think>: no prompt is easy or hard, every reward is 0, and yet it
    runs."""
    rows = run(tmp_path / "r", *data, "--model", llama_folder(template=template), "--method",
               "grpo", "--max_new_tokens", 8, "--pool", 10, "--updates", 2, *lora)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
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
    assert "'correct': 0" in error and "--sft none" in error


def test_rows_with_constraints_are_taken_as_they_are(tmp_path, data, llama_folder):  # noqa: F811
    ready = [{**row, "prompt": f"{row['prompt']} ({i})"} for i in range(3) for row in IFEVAL]
    run(tmp_path / "r", "--dataset", write(tmp_path / "ready.jsonl", ready + IFEVAL), *data[2:],
        "--model", llama_folder(), "--method", "grpo", "--max_new_tokens", 4, "--steps", 0)
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
    (["--group", 1], "--group 1"), (["--stage", "rl"], "--stage"),
    (["--updates", 99], "--updates 99"), (["--token_ratio", 0], "--token_ratio"),
    (["--token_ratio", 1.5], "--token_ratio"), (["--pool", 0], "--pool"),
    (["--cold_start", 0], "--cold_start"), (["--tea_coef", -1], "--tea_coef"),
    (["--kl_coef", "nan"], "--kl_coef"), (["--sft_lr", 0], "--sft_lr"),
    (["--dataset", "x.jsonl"], "--dataset x.jsonl"), (["--eval_size", 1], "--eval_size")])
def test_refused_flags(argv, says, refused, tmp_path):
    assert says in refused(light_if.main, *SMALL, "--out", tmp_path / "r", *argv)


@pytest.mark.parametrize("level, told", [
    (3, "3"), ("1_seen", "1_seen"), (None, "1"), (7.5, "1"), ("hard", "1"), (True, "1")])
def test_levels_of_the_data(level, told):
    row = {"prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    task, = light_if.to_tasks([row | {"level": level}], "x")
    assert task.level == told


def test_the_tiny_names_go_with_others(tmp_path, worlds, full):
    """A checkpoint of the tiny model on --dataset tiny; --model tiny on rows of one's own."""
    flags = ["--method", "grpo", "--eval_samples", 0, "--steps", 0]
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
                                        ([{"instruction": [3]}], "instruction"),
                                        ([{"instruction": " "}], "no instruction")])
def test_refused_seeds(tmp_path, refused, llama_folder, data, rows, says):  # noqa: F811
    error = refused(light_if.main, *SMALL, "--out", tmp_path / "r", "--model", llama_folder(),
                    "--dataset", write(tmp_path / "bad.jsonl", rows), *data[2:])
    assert says in error
