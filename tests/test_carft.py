"""carft.py end to end, in-process on small checkpoints: both stages, roles, resume, refusals."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from test_common import (  # noqa: F401 (a fixture)
    GSM, check_metrics, flat, jsonl, llama_folder, spy, write,
)
from transformers import AutoModelForCausalLM

import carft
import common

SMALL = "--prompts 8 --max_new_tokens 48 --eval_size 6 --save_every 0 --eval_every 0 " \
        "--head_only_steps 1 --sft_epochs 0".split()  # no stage 1 where it is not what is tested
DRGRPO = ["--method", "drgrpo", "--group", 4]


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """A CoT counts as correct here if it ends in an even digit: about half of them do, whatever the
    model has learned. Every CoT counts as a number. One test draws."""
    monkeypatch.setattr(carft, "answer_of", lambda text, problem: (text[-1:] in tuple("02468"),
                                                                   True))
    if request.node.name != "test_run_folder":
        monkeypatch.setattr(carft, "draw_vectors", lambda path, parts: None)
        monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)


def run(out, *argv, steps=2):
    carft.main([*SMALL, "--steps", str(steps), "--out", str(out), *map(str, argv)])
    return jsonl(out / "metrics.jsonl")


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


def checkpoint(out):
    """The trained weights in the newest checkpoint: 0.* of the policy, 1.* of the heads."""
    return torch.load(max((out / "checkpoint").glob("*.pt")), weights_only=True)["weights"]


def rollouts(samples):
    """Of recorded calls of `sample` those of the loop: it has no generator of its own."""
    return [batch for a, batch in samples if len(a) == 6]


# --------------------------------------------------------------------- the run folder and the flags


def test_run_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    rows = run(folder, "--sft_epochs", 1, "--eval_samples", 2, "--eval_size", 20, steps=3)
    printed = capsys.readouterr().out
    assert "300 of 300 problems have" in printed
    assert "stage 1: SFT on 300 annotated CoT, 4 steps, loss" in printed
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["head"], config["cl_coef"], config["group"]) == ("shared", .01, 1)
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"accuracy", "accuracy/level2", "accuracy/level4", "cos_other"} <= set(summary[when])
        assert "accuracy/level1" not in summary[when]
    samples = jsonl(folder / "samples.jsonl")
    assert {"step", "prompt", "response", "reward", "annotated"} == set(samples[0])
    assert all("####" in s["annotated"] for s in samples)
    terse = [re.search(r"^\d+[+-]\d+[+-]", s["annotated"], re.M) for s in samples]
    assert any(terse) and not all(terse)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "samples.jsonl", "sft",
        "summary.json", "vectors.png"]
    assert (folder / "vectors.png").stat().st_size > 10_000
    assert not torch.equal(weights(folder / "sft"), weights(folder / "model"))
    assert rows[1]["policy/kl"] == 0 and rows[3]["policy/kl"] != 0
    more = run(tmp_path / "s", "--method", "sft", steps=1)
    check_metrics({k for r in rows + more for k in r}, carft.METRICS)


@pytest.mark.parametrize("argv, logged", [
    (["--method", "reft"], {"value/loss", "policy/kl"}), (DRGRPO, {"policy/loss"}),
    (["--method", "sft"], {"sft/loss"}), (["--dtype", "bfloat16"], {"cl/loss"}),
    (["--signal", "negative", "--partial_reward", "none"], {"cl/loss"}),
    (["--signal", "both", "--head", "separate", "--kl_coef", 0], {"cl/loss"}),
    (["--cl_coef", 0, "--partial_reward", "embedding"], {"value/loss"})])
def test_methods_and_switches_run(tmp_path, argv, logged):
    rows = run(tmp_path / "r", *argv)
    rounding = .1 if "bfloat16" in argv else 1e-4
    for r in rows[1:]:
        assert r["optim/grad_norm"] > 0 and r.get("policy/mismatch", 0) < rounding
        assert logged <= set(r)
        assert ("cl/loss" in r) == ("cl/loss" in logged)
        assert ("value/loss" in r) == bool({"cl/loss", "value/loss", "policy/kl"} & logged)
    assert not (tmp_path / "r" / "sft").exists(), "no stage 1 with --sft_epochs 0"


def test_defaults_are_the_papers(tiny_folder):
    cfg = carft.parse(["--model", tiny_folder])
    assert (cfg.lr, cfg.head_lr, cfg.sft_lr, cfg.kl_coef, cfg.vf_coef, cfg.cl_coef, cfg.gamma,
            cfg.gae_lambda, cfg.ppo_epochs, cfg.prompts, cfg.group, cfg.sft_epochs) == (
        3e-7, 3e-6, 1e-5, .05, 5., .1, 1., .95, 2, 64, 1, 2)
    cfg = carft.parse(["--model", tiny_folder, "--method", "drgrpo"])
    assert (cfg.group, cfg.ppo_epochs, cfg.lr, cfg.partial_reward) == (8, 1, 1e-6, "none")
    cfg = carft.parse(["--model", tiny_folder, "--method", "sft"])
    assert (cfg.lr, cfg.cl_coef) == (1e-5, 0)


# -------------------------------------------------------------------------------------- stage 1


def test_stage_1_decays_its_rate_shuffles_and_sft_goes_on_from_there(tmp_path, monkeypatch):
    steps, started = spy(monkeypatch, carft, "sft_step"), []
    monkeypatch.setattr(common.Run, "evaluate", lambda run: (
        started.append(flat(run.model[0])), run.state.update(after={}, evaluated=0)))
    rows = run(tmp_path / "r", "--method", "sft", "--sft_epochs", 2, steps=4)
    (first, second) = steps[:9], steps[9:]
    assert [a[5] for a, _ in first] == [[pytest.approx(1e-3 * (1 - i / 9))] for i in range(9)]
    met = [s.prompt for a, _ in first for s in a[1]]
    assert len(set(met[:300])) == 300 and met[:200] != met[300:500]
    assert torch.equal(started[0], weights(tmp_path / "r" / "sft"))
    assert not torch.equal(started[0], weights(tmp_path / "r" / "model"))
    assert [a[5][0] for a, _ in second] == pytest.approx([1e-4 * (1 - i / 4) for i in range(4)])
    for (a, (loss, _)), r in zip(second, rows[1:], strict=True):
        assert len(a[1]) == 8 and all("####" in s.text for s in a[1])
        assert r["sft/loss"] == loss and not {"reward/mean", "sample/tokens"} & set(r)


# -------------------------------------------------------------------------------- stage 2: the loop


def whole_loss(policy, heads, batch, old_logp, A, critic, contrast, cfg):
    """L_pg + alpha L_vf + lambda L_cl of all rows at once. critic: old values and returns, or None;
    contrast: what `contrastive_loss` gets besides the vectors, or None"""
    ids, mask = common.collate(batch, "cpu")
    hidden = policy.base_model(ids).last_hidden_state
    logp = (policy.lm_head(hidden)[:, :-1] / cfg.temperature).log_softmax(-1)
    ratio = (F.pad(logp.gather(2, ids[:, 1:, None])[..., 0], (1, 0)) - old_logp).exp()
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(.8, 1.2))
    V, e = heads(hidden)
    if critic:
        (old_V, R), new_V = critic, F.pad(V[:, :-1], (1, 0))
        clipped = old_V + (new_V - old_V).clamp(-.2, .2)
        loss = loss + cfg.vf_coef / 2 * torch.maximum((new_V - R) ** 2, (clipped - R) ** 2)
    length = 48 if cfg.method == "drgrpo" else mask.sum(1)
    loss = ((loss * mask).sum(1) / length).mean()
    if contrast:
        Z_ann, sets, *rest = contrast
        Z = torch.stack([torch.stack([V[i, s].softmax(0) @ e[i, s] for s in row])
                         for i, row in enumerate(sets)])
        loss = loss + cfg.cl_coef * carft.positive_and_negative(Z, Z_ann, sets, *rest)
    return loss


@pytest.mark.parametrize("size", [100, 10**6])
@pytest.mark.parametrize("argv", [["--signal", "both", "--cl_coef", 2], ["--method", "reft"],
                                  [*DRGRPO, "--ppo_epochs", 2]])
def test_the_gradient_is_that_of_the_whole_loss(tmp_path, argv, size, monkeypatch):
    """What the micro-batches have summed up, against autograd on all rows at once: in both epochs
    of two steps, so that policy, critic and vectors have moved away from the old ones."""
    monkeypatch.setattr(carft, "positive_and_negative", carft.contrastive_loss, raising=False)
    samples, scores, targets, scored, contrasts = (spy(monkeypatch, carft, name) for name in (
        "sample", "score", "ppo_advantages", "rewards", "contrastive_loss"))
    started, values = spy(monkeypatch, common.Run, "start"), spy(monkeypatch, carft, "value_loss")
    update, norms = carft.update, []

    def check(opt, cfg, step, rates):
        learners, batch = started[0][0][1], rollouts(samples)[-1]
        old_logp = [found[0] for _, found in scores if found[0].any()][-1]
        A, R = targets[-1][1] if targets else (None, None)
        if cfg.method == "drgrpo":
            A = scored[-1][1].view(8, 4)
            A = (A - A.mean(1, keepdim=True)).view(32, 1)
        loss = whole_loss(*learners, batch, old_logp, A, targets and (targets[-1][0][3], R),
                          contrasts and contrasts[-1][0][1:], cfg)
        params = [p for p in learners.parameters() if p.grad is not None]
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            assert (p.grad - grad).norm() < 1e-3 * grad.norm() + 1e-6
        norms.append(update(opt, cfg, step, rates))
        return norms[-1]

    monkeypatch.setattr(carft, "update", check)
    rows = run(tmp_path / "r", *argv, "--temperature", 1.4, "--vf_coef", .7, "--lr", 2e-3,
               "--head_lr", .05, "--head_only_steps", 0, "--micro_tokens", size)
    assert len(norms) == 4 and min(norms) > 0
    assert all(r["policy/mismatch"] < 1e-4 for r in rows[1:]), "at the temperature of sampling"
    assert rows[1]["policy/clipped"] > 0, "the clip is in the gradient"
    assert not values or max((V - old).abs().max() for (V, old, *_), _ in values) > .2, "as is V's"


def test_rewards_values_and_references(tmp_path, monkeypatch):
    """All are of the policy that sampled, and the reference is the SFT policy. In the first two
    steps the heads learn alone."""
    samples, targets = spy(monkeypatch, carft, "sample"), spy(monkeypatch, carft, "ppo_advantages")
    values, losses = spy(monkeypatch, carft, "value_loss"), spy(monkeypatch, carft, "policy_loss")
    rows = run(tmp_path / "r", "--vf_coef", 1, "--lr", 1e-3, "--head_only_steps", 2,
               "--sft_epochs", 1, "--micro_tokens", 10**6, steps=4)
    sft = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "sft")
    assert rows[1]["policy/kl"] == 0
    for step, batch in enumerate(rollouts(samples), 1):
        (r, old_logp, ref_logp, old_V, mask, cfg), _ = targets[step - 1]
        assert r.tolist() == pytest.approx([1 if s.text[-1:] in "02468" else .1 for s in batch])
        assert rows[step]["reward/mean"] == pytest.approx(r.mean().item())
        assert old_logp[mask > 0].tolist() == pytest.approx(
            [x for s in batch for x in s.logps], abs=1e-4)
        assert torch.allclose(ref_logp, common.batch_logps(sft, batch, cfg), atol=1e-5)
        assert torch.allclose(old_logp, ref_logp, atol=1e-4) == (step <= 3), "the heads come first"
        assert (old_V[mask == 0] == 0).all() and (old_V.abs().max() > 0) == (step > 1)
        (first, old, *_), (second, same, *_) = (a for a, _ in values[2 * step - 2:2 * step])
        assert first.requires_grad and torch.allclose(first, old, atol=1e-5)
        assert torch.equal(old, same) and not torch.allclose(second, old, atol=1e-5)
        first, second = losses[2 * step - 2:2 * step]
        assert torch.equal(*first[0][:2]), "the ratio is exactly 1 at first"
        assert rows[step]["policy/loss"] == pytest.approx((first[1][0] + second[1][0]).item() / 2)


def test_every_row_meets_its_own_problem_and_annotation(tmp_path, monkeypatch):
    answers, quick = [], carft.answer_of

    def recorded(text, problem):
        answers.append((text, problem.prompt))
        return quick(text, problem)

    monkeypatch.setattr(carft, "answer_of", recorded)
    samples, scores, losses = (spy(monkeypatch, carft, name)
                               for name in ("sample", "score", "contrastive_loss"))
    run(tmp_path / "r", "--head_only_steps", 0, "--lr", 1e-3, steps=1)
    batch, = rollouts(samples)
    judged = [(s.text, s.prompt) for s in batch]
    assert any(answers[i:i + 8] == judged for i in range(len(answers)))
    (annotated, sets), vectors = next((a[2:4], found[2]) for a, found in scores
                                      if len(a[2]) == 8 and a[2] is not batch)
    for s, annotation, (cot,) in zip(batch, annotated, sets, strict=True):
        assert annotation.prompt == s.prompt and cot == carft.columns(annotation)
        assert "####" in annotation.text
    (Z, Z_ann, *_), (later, Z_ann_later, *_) = (a for a, _ in losses)
    assert Z_ann is Z_ann_later is vectors and not Z_ann.requires_grad, "cached for all epochs"
    assert Z.requires_grad and not torch.equal(Z, later)


def test_embedding_enhanced_reward(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "rewards")
    vectors = spy(monkeypatch, carft, "contrastive_gradient")
    run(tmp_path / "r", "--partial_reward", "embedding")
    for ((right, number, partial), r), ((Z, Z_ann, *_), _) in zip(calls, vectors[::2], strict=True):
        assert torch.allclose(partial, .2 + .1 * F.cosine_similarity(Z_ann[:, 0], Z[:, 0]))
        assert number.all() and 0 < right.sum() < 8
        assert (r[right] == 1).all() and r[~right].tolist() == partial[~right].tolist()
        assert ((partial >= .1) & (partial <= .3)).all() and len(set(partial.tolist())) > 4


def test_reft_is_carft_without_contrast_on_a_linear_critic(tmp_path):
    a = run(tmp_path / "a", "--method", "reft")
    b = run(tmp_path / "b", "--cl_coef", 0, "--head", "separate")
    assert a == b
    assert torch.equal(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
    c = run(tmp_path / "c", steps=1)
    for name in ("sample/length", "reward/mean", "policy/entropy"):
        assert c[1][name] == a[1][name], "all methods sample alike at first"


def test_drgrpo(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "policy_loss")
    run(tmp_path / "r", *DRGRPO, "--micro_tokens", 10**6, steps=1)
    ((logp, old, A, mask, weight), _), = calls
    assert torch.allclose(weight, torch.full_like(weight, 1 / (32 * 48)))
    assert torch.equal(logp, old) and len(A) < 32, "a flat group needs no forward"
    values = {round(abs(a), 4) for a in A[mask > 0].tolist()}
    assert values <= {.25, .5, .75} and len(values) > 1, "r - mean of groups of 4, not divided"


def test_no_question_is_in_a_batch_twice(tmp_path, monkeypatch, worlds):
    samples = spy(monkeypatch, carft, "sample")
    data = write(tmp_path / "a.jsonl", jsonl(worlds / "arithmetic/annotated.jsonl")[:20])
    run(tmp_path / "r", "--dataset", data, "--eval_dataset", "tiny", steps=5)
    batches = [[s.prompt for s in batch] for batch in rollouts(samples)]
    assert len(batches) == 5 and all(len(set(b)) == 8 for b in batches)
    for first, second in zip(batches[::2], batches[1::2]):
        assert len({*first, *second}) == 16, "an epoch is two batches of 8, four are dropped"


# -------------------------------------------------------------------------------- --lora and resume


def test_lora(tmp_path, monkeypatch, tiny_folder, tiny):
    """The SFT adapter is part of the reference, and the heads train in full."""
    targets, samples = spy(monkeypatch, carft, "ppo_advantages"), spy(monkeypatch, carft, "sample")
    folder = tmp_path / "r"
    rows = run(folder, "--lora", "--model", tiny_folder, "--dataset", "tiny", "--sft_lr", 3e-3,
               "--lr", 3e-3, "--sft_epochs", 1, "--head_only_steps", 0)
    assert rows[1]["policy/kl"] == 0 != rows[2]["policy/kl"]
    # the reference is the merged SFT policy, not the checkpoint it started from
    merged = AutoModelForCausalLM.from_pretrained(folder / "sft")
    (_, _, ref_logp, *_, cfg), _ = targets[-1]
    batch = rollouts(samples)[-1]
    assert torch.allclose(common.batch_logps(merged, batch, cfg), ref_logp, atol=1e-5)
    assert not torch.allclose(common.batch_logps(tiny[0], batch, cfg), ref_logp, atol=1e-2)
    state = checkpoint(folder)
    assert {k for k in state if k.startswith("1.")} == {
        "1.projection.weight", "1.projection.bias", "1.value.weight", "1.value.bias"}
    assert all("lora" in k for k in state if k.startswith("0.")), "else only adapters are trained"
    assert state["1.value.weight"].abs().max() > 0
    # model/ is an adapter on sft/: loaded with peft it is the trained policy
    adapter = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder.resolve() / "sft")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    adapters = {f"0.{n}": p for n, p in loaded.named_parameters() if "lora" in n}
    assert adapters and all(torch.equal(p, state[n]) for n, p in adapters.items())
    assert not torch.allclose(common.batch_logps(loaded, batch, cfg), ref_logp, atol=1e-3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("argv", [[], DRGRPO, ["--lora", "--model", "tiny_folder"]])
def test_resume_is_exact(tmp_path, argv, monkeypatch, tiny_folder):
    """Killed in stage 1, before the first evaluation, and in a step between two checkpoints."""
    argv = [tiny_folder if x == "tiny_folder" else x for x in argv]
    argv = [*argv, "--dataset", "tiny", "--sft_epochs", 1, "--lr", 1e-3, "--save_every", 2]
    whole, out = run(tmp_path / "whole", *argv, steps=3), tmp_path / "cut"

    def kill(module, name, when):
        """Runs or resumes until the call number `when` of module.<name>."""
        real, calls = getattr(module, name), []

        def call(*a, **k):
            calls.append(a)
            if len(calls) == when:
                raise Killed
            return real(*a, **k)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, call)
            carft.main(["--resume", str(out)]) if out.exists() else run(out, *argv, steps=3)

    kill(carft, "sft_step", 3)
    assert not (out / "sft").exists()
    kill(common.Run, "evaluate", 1)
    made = (out / "sft").stat().st_mtime_ns
    kill(carft, "update", 3 if "drgrpo" in argv else 6)  # of step 3
    carft.main(["--resume", str(out)])
    assert jsonl(out / "metrics.jsonl") == whole
    for name in ("samples.jsonl", *(f"{f}/{p.name}" for f in ("sft", "model")
                                    for p in (out / f).glob("*.safetensors"))):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (out / "sft").stat().st_mtime_ns == made, "made once"


# ------------------------------------------------------------------------- real input, and refused

SVAMP = [{"item_id": f"svamp_{i}", "question": f"Ada has {i} figs . she gives 2 . how many ?",
          "answer_cot": f"Ada has {i} figs.\n\n{i} figs - 2 figs = {i - 2} figs\n\nTherefore, the "
                        f"answer is <{i - 2}>.", "answer_value": f"{i - 2}.0"}
         for i in range(10, 40)]


@pytest.mark.parametrize("rows", [SVAMP, GSM])
def test_real_input(tmp_path, rows, llama_folder, monkeypatch):  # noqa: F811
    train, model = write(tmp_path / "train.json", rows), llama_folder()
    samples, sft = spy(monkeypatch, carft, "sample"), spy(monkeypatch, carft, "sft_step")
    test = write(tmp_path / "t.json", [{**r, "question": f"{r['question']} now"} for r in rows[:5]])
    metrics = run(tmp_path / "r", "--model", model, "--dataset", train, "--eval_dataset", test,
                  "--prompts", 4, "--max_new_tokens", 120, "--sft_epochs", 1)
    assert metrics[-1]["step"] == 2
    tok = common.AutoTokenizer.from_pretrained(model)
    prompt = tok.decode(samples[0][0][2][0])
    assert prompt.startswith("Question:\n") and prompt.endswith("\nAnswer reasoning:\n")
    text = sft[0][0][1][0].text
    assert "####" not in text and text.count("\nTherefore, the answer is: ") == 1
    answer = text.rpartition("\nTherefore, the answer is: ")[2]
    assert float(answer.replace(",", ""))


def test_a_model_that_was_trained_with_another_prompt_keeps_it(tiny_folder, llama_folder):  # noqa: F811
    for folder, prompt in ((tiny_folder, "<|user|>{}<|assistant|>"),
                           (llama_folder(), "Question:\n{}\nAnswer reasoning:\n")):
        cfg = carft.parse(["--model", folder, "--dataset", "tiny", "--max_new_tokens", "40"])
        _, tok, (problem, *_), *_ = common.set_up(cfg, carft.TEMPLATE)
        expected = tok(prompt.format(problem.question), add_special_tokens=False)
        assert problem.prompt == tuple(expected.input_ids)


def test_targets(tiny):
    p = common.Problem("q", "72", "48/2 = 24\n24+48 = 72\n#### 72", prompt=(5, 6))
    assert carft.annotated_cot(p, False) == "48/2 = 24\n24+48 = 72\nTherefore, the answer is: 72"
    assert carft.annotated_cot(p, True) == p.solution
    bare = common.Problem("q", "7", "12-5=7", prompt=(5, 6))
    assert carft.annotated_cot(bare, True) == "12-5=7\n#### 7", "the answer is always taught"
    none = common.Problem("p", "72", prompt=(5, 7))
    assert carft.annotated_cot(none, False) == "" == carft.annotated_cot(none, True)
    svamp = common.Problem("q", "203.0", "29 * 7 = 203\n\nTherefore, the answer is <203>.")
    text = carft.annotated_cot(svamp, False)
    assert text.endswith("is <203>.\nTherefore, the answer is: 203.0")
    assert common.extract_answer(text) == "203.0"
    cfg = SimpleNamespace(max_new_tokens=1000)
    (problem, sample), = carft.annotate([p, bare, none], *tiny, cfg)
    assert problem is bare and sample.prompt == (5, 6), "each question once"
    for cfg.max_new_tokens in (len(sample.tokens), len(sample.tokens) - 1):
        found = carft.annotate([p, bare, none], *tiny, cfg)
        assert len(found) == (cfg.max_new_tokens == len(sample.tokens))


@pytest.mark.parametrize("argv, told", [
    (["--group", 4], "--group 4: carft has one sample"),
    (["--method", "drgrpo", "--group", 1], "at least 2"),
    (["--prompts", 1], "the other questions are the negatives"),
    (["--method", "reft", "--cl_coef", .1], "--cl_coef: the contrastive loss is of --method carft"),
    (["--method", "reft", "--signal", "both"], "--signal"),
    (["--cl_coef", 0, "--signal", "negative"], "which is off here"),
    (["--method", "reft", "--partial_reward", "embedding"], "--partial_reward embedding"),
    (["--cl_coef", "nan"], "--cl_coef nan"), (["--head_lr", -1], "--head_lr -1.0"),
    (["--gamma", 1.5], "--gamma"), (["--ppo_epochs", 0], "--ppo_epochs 0"),
    (["--sft_epochs", -1], "--sft_epochs -1"), (["--head", "wide"], "--head")])
def test_refused_flags(tmp_path, refused, argv, told):
    assert told in refused(carft.main, *argv, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_refused_data(tmp_path, refused, tiny_folder):
    bare = write(tmp_path / "bare.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)}
                                           for i in range(60)])
    out = tmp_path / "r"
    told = refused(carft.main, "--model", tiny_folder, "--dataset", bare, "--out", out, "--prompts",
                   4, "--max_new_tokens", 40)
    assert "0 of 48 problems have a question of their own and an annotated CoT" in told
    told = refused(carft.main, "--max_new_tokens", 6, "--out", out)
    assert "--max_new_tokens 6" in told
    assert len(run(out, steps=1)) == 2, "a refused command leaves no run in the way"
