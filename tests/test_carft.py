"""carft.py end to end, in-process on small checkpoints: both stages, resumes, refuses."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from test_common import (  # noqa: F401 (a fixture)
    GSM,
    check_metrics,
    flat,
    jsonl,
    llama_folder,
    spy,
    write,
)
from transformers import AutoModelForCausalLM

import carft
import common

SMALL = "--prompts 8 --max_new_tokens 48 --eval_size 20 --save_every 0 --eval_every 0 " \
        "--head_only_steps 1 --sft_epochs 1".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """A CoT counts as correct here if it ends in an even digit: about half of them do, whatever the
    model has learned. Every CoT counts as a number. One test draws."""
    monkeypatch.setattr(carft, "answer_of", lambda text, problem: (text[-1:] in tuple("02468"),
                                                                   True))
    if request.node.name != "test_run_folder":
        monkeypatch.setattr(carft, "draw_vectors", lambda path, parts: None)
        monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)


def run(out, *argv, steps=3):
    carft.main([*SMALL, "--steps", str(steps), "--out", str(out), *map(str, argv)])
    return jsonl(out / "metrics.jsonl")


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


# --------------------------------------------------------------------------------- the run folder


def test_run_folder(tmp_path, capsys):
    folder = tmp_path / "r"
    rows = run(folder)
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


def test_every_declared_metric_is_logged(tmp_path):
    names = {k for r in run(tmp_path / "r", "--eval_samples", 2) for k in r}
    names |= {k for r in run(tmp_path / "s", "--method", "sft", steps=1) for k in r}
    check_metrics(names, carft.METRICS)


@pytest.mark.parametrize("argv, logged", [
    (["--method", "reft"], {"value/loss", "policy/kl"}),
    (["--method", "drgrpo", "--group", 4], {"policy/loss"}),
    (["--method", "drgrpo", "--group", 4, "--ppo_epochs", 2], {"policy/loss"}),
    (["--method", "sft"], {"sft/loss"}),
    (["--signal", "negative"], {"cl/loss"}), (["--signal", "both"], {"cl/loss"}),
    (["--partial_reward", "none"], {"cl/loss"}), (["--partial_reward", "embedding"], {"cl/loss"}),
    (["--head", "separate"], {"cl/loss"}), (["--code_parity"], {"cl/loss"}),
    (["--code_parity", "--signal", "both"], {"cl/loss"}),
    (["--kl_coef", 0], {"cl/loss"}), (["--hot"], {"cl/loss"}),
    (["--cl_coef", 0, "--partial_reward", "embedding"], {"value/loss"})])
def test_methods_and_switches_run(tmp_path, argv, logged):
    rows = run(tmp_path / "r", *argv)
    for r in rows[1:]:
        assert r["optim/grad_norm"] > 0 and r.get("policy/mismatch", 0) < 1e-4
        assert logged <= set(r)
        assert ("cl/loss" in r) == ("cl/loss" in logged)
        assert ("value/loss" in r) == bool({"cl/loss", "value/loss", "policy/kl"} & logged)


def test_hot_is_the_preset(tmp_path):
    cfg = carft.parse(["--hot"])
    assert (cfg.lr, cfg.vf_coef, cfg.head_only_steps, cfg.cl_coef) == (6e-4, 1., 0, .01)
    cfg = carft.parse(["--hot", "--lr", "1e-3", "--method", "reft"])
    assert (cfg.lr, cfg.vf_coef, cfg.cl_coef, cfg.head) == (1e-3, 1., 0, "separate")
    assert carft.parse([]).lr == carft.TINY["lr"]


def test_defaults_are_the_papers(tmp_path, tiny_folder):
    cfg = carft.parse(["--model", tiny_folder])
    assert (cfg.lr, cfg.head_lr, cfg.sft_lr, cfg.kl_coef, cfg.vf_coef, cfg.cl_coef, cfg.gamma,
            cfg.gae_lambda, cfg.ppo_epochs, cfg.prompts, cfg.group, cfg.sft_epochs) == (
        3e-7, pytest.approx(3e-6), 1e-5, .05, 5., .1, 1., .95, 2, 64, 1, 2)
    cfg = carft.parse(["--model", tiny_folder, "--method", "drgrpo"])
    assert (cfg.group, cfg.ppo_epochs, cfg.lr, cfg.partial_reward) == (8, 1, 1e-6, "none")
    assert carft.parse(["--model", tiny_folder, "--lr", "1e-5"]).head_lr == pytest.approx(1e-4)


# -------------------------------------------------------------------------------------- stage 1


def test_sft_is_cross_entropy_on_the_annotated_cot(policy, tiny):
    tok = tiny[1]
    cfg = SimpleNamespace(device="cpu", micro_tokens=100, max_grad_norm=1e9, warmup_steps=0, lr=0.)
    texts = ["1+2=3\n#### 3", "12-5+17=24\n24-4=20\n#### 20", "1+1=2\n#### 2"]
    prompts = common.encode_questions(tok, ["How?", "How many pens are there?", "Why"])
    samples = common.as_samples(tok, prompts, texts)
    total, n = 0, 0
    for prompt, s in zip(prompts, samples):
        logits = policy(torch.tensor([[*prompt, *s.tokens]])).logits[0, len(prompt) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(s.tokens), reduction="sum")
        n += len(s.tokens)
        assert s.tokens[-1] == tok.eos_token_id
    (total / n).backward()
    expected = {k: p.grad.clone() for k, p in policy.named_parameters()}
    policy.zero_grad()
    before = flat(policy)
    opt, found = common.MasterAdamW(policy, lr=1e-3), {}

    def keep(*a):
        found.update({k: p.grad.clone() for k, p in policy.named_parameters()})
        return update(*a)

    update = common.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "update", keep)
        loss, _ = carft.sft_step(policy, samples, opt, cfg, 1, [1e-3])
    assert loss == pytest.approx((total / n).item(), abs=1e-5)
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-5), name
    assert not torch.equal(before, flat(policy))


def test_sft_continues_where_stage_1_ended(tmp_path):
    rows = run(tmp_path / "r", "--method", "sft", "--lr", 1e-3, "--prompts", 64, steps=20)
    losses = [r["sft/loss"] for r in rows[1:]]
    assert sum(losses[-4:]) < sum(losses[:4]) - .2, "it goes on learning"
    assert not {"reward/mean", "sample/tokens"} & set(rows[5])


def test_the_critic_starts_alone(tmp_path):
    run(tmp_path / "r", "--head_only_steps", 3)
    assert torch.equal(weights(tmp_path / "r" / "model"), weights(tmp_path / "r" / "sft"))
    state = common.load_file(tmp_path / "r" / "checkpoint" / "weights.safetensors")
    assert state["1.value.weight"].abs().max() > 0, "it starts at zero"
    run(tmp_path / "d", "--head_only_steps", 3, "--method", "drgrpo", "--group", 4)
    assert not torch.equal(weights(tmp_path / "d" / "model"), weights(tmp_path / "d" / "sft"))


def test_stage_1_decays_its_rate_and_shuffles(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "sft_step")
    run(tmp_path / "r", "--sft_epochs", 2, steps=1)
    rates = [a[5][0] for a, _ in calls]
    assert rates == pytest.approx([1e-3 * (1 - i / 9) for i in range(9)])
    met = [s.prompt for a, _ in calls for s in a[1]]
    assert len(set(met[:300])) == 300 and met[:200] != met[300:500]


@pytest.mark.parametrize("argv", [["--method", "carft"], ["--method", "sft"], ["--lora"]])
def test_both_stages_in_bfloat16(tmp_path, argv, monkeypatch, tiny_folder):
    """As on CUDA: two optimizers in turn, each with float32 copies of the weights it trains."""
    load = common.load_model

    def in_bfloat16(*a, **k):
        model, tok = load(*a, **k)
        return model.bfloat16(), tok

    monkeypatch.setattr(common, "load_model", in_bfloat16)
    rows = run(tmp_path / "r", *argv, "--model", tiny_folder, "--dataset", "tiny", "--sft_lr",
               1e-3, "--lr", 1e-3, steps=2)
    assert rows[2]["optim/grad_norm"] > 0
    assert not torch.equal(weights(tmp_path / "r" / "sft"), weights(tiny_folder))


def test_value_loss_is_weighted(tmp_path):
    run(tmp_path / "r", "--method", "reft", "--vf_coef", 0, steps=2)
    state = common.load_file(tmp_path / "r" / "checkpoint" / "weights.safetensors")
    assert (state["1.value.weight"] == 0).all(), "without it the critic does not learn"
    run(tmp_path / "s", "--method", "reft", "--vf_coef", 1, steps=2)
    state = common.load_file(tmp_path / "s" / "checkpoint" / "weights.safetensors")
    assert state["1.value.weight"].abs().max() > 0


def test_annotated_cot_of_their_own_length(tiny):
    problems = [common.Problem("q", "3", "1+2=3\n#### 3", prompt=(5, 6)),
                common.Problem("q", "4", "2+2=4\n#### 4", prompt=(5, 6)),
                common.Problem("p", "3", "", prompt=(5, 7))]
    cfg = SimpleNamespace(max_new_tokens=1000)
    (problem, sample), = carft.annotate(problems, *tiny, cfg)
    assert problem.question == "q" and sample.prompt == (5, 6), "each question once"
    for longest, found in ((len(sample.tokens), 1), (len(sample.tokens) - 1, 0)):
        cfg.max_new_tokens = longest
        assert len(carft.annotate(problems, *tiny, cfg)) == found


def test_no_stage_1(tmp_path):
    run(tmp_path / "r", "--sft_epochs", 0)
    assert not (tmp_path / "r" / "sft").exists()


# -------------------------------------------------------------------------------- stage 2: the loop


@pytest.mark.parametrize("argv", [[], ["--signal", "both"], ["--code_parity"],
                                  ["--method", "drgrpo", "--group", 4, "--ppo_epochs", 2]])
def test_micro_batches_never_change_the_gradient(tmp_path, argv):
    large, small = (run(tmp_path / str(size), *argv, "--micro_tokens", size, "--cl_coef", 1,
                        "--vf_coef", 1) if "drgrpo" not in argv else
                    run(tmp_path / str(size), *argv, "--micro_tokens", size)
                    for size in (4096, 100))
    for a, b in zip(large, small):
        assert set(a) == set(b)
        for name in a:
            if name != "policy/mismatch":
                assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-3), name
    same = (weights(tmp_path / str(size) / "model") for size in (4096, 100))
    assert torch.allclose(*same, atol=2e-4)


@pytest.mark.parametrize("signal", ["positive", "both"])
def test_the_micro_batches_carry_the_gradient_of_the_whole_loss(policy, tiny, signal):
    """The loss on all rows at once, with autograd, against the two passes of the loop."""
    tok = tiny[1]
    torch.manual_seed(0)
    cfg = SimpleNamespace(device="cpu", micro_tokens=120, signal=signal, code_parity=False,
                          temperature=1.)
    prompts = common.encode_questions(tok, ["How?", "How many pens are there?", "Why", "Who"])
    texts = [["1+2=3\n#### 3", "2+2=4\n#### 4", "7-7=0\n#### 0", "1+1=2\n#### 2"],
             ["2+1=3\n#### 3", "2+20=22\n4-4=0\n#### 0", "7=7\n#### 7", "1+1=2\n#### 2"]]
    annotated, batch = (common.as_samples(tok, prompts, t) for t in texts)
    right = torch.tensor([True, False, False, True])
    heads = carft.Heads(96, "shared")
    torch.nn.init.normal_(heads.value.weight)
    sets, sets_ann = zip(*(carft.token_sets(s, a, cfg) for s, a in zip(batch, annotated)))
    Z_ann = carft.score(policy, heads, annotated, sets_ann, cfg, logps=False)[2]
    assert not Z_ann.requires_grad

    ids, _ = common.collate(batch, "cpu")
    V, e = heads(common.hidden_states(policy, ids))
    Z = carft.pool(V, e, carft.scope_mask(sets, ids.shape[1], "cpu"))
    carft.contrastive_loss(Z, Z_ann, sets, sets_ann, right, cfg).backward()
    both = torch.nn.ModuleList([policy, heads])
    expected = {k: p.grad.clone() for k, p in both.named_parameters() if p.grad is not None}
    both.zero_grad()

    _, dZ = carft.contrastive_gradient(carft.score(policy, heads, batch, sets, cfg)[2], Z_ann, sets,
                                       sets_ann, right, cfg)
    for rows in common.micro_batches(batch, 60):
        ids, _ = common.collate([batch[i] for i in rows], "cpu")
        V, e = heads(common.hidden_states(policy, ids))
        z = carft.pool(V, e, carft.scope_mask([sets[i] for i in rows], ids.shape[1], "cpu"))
        (z * dZ[rows]).sum().backward()
    assert "1.value.weight" in expected and "1.projection.weight" in expected
    for name, p in both.named_parameters():
        if name in expected:
            assert torch.allclose(p.grad, expected[name], atol=1e-5), name
    assert expected["1.value.weight"].abs().max() > 1e-5, "the weights of the pooling are trained"


def test_ratio_is_exactly_one_at_first_and_then_moves(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "policy_loss")
    rows = run(tmp_path / "r", "--head_only_steps", 0, "--lr", 1e-3, steps=1)
    (first, (loss, _)), (second, _) = calls
    logp, old, A, mask, weight = first
    assert torch.equal(logp, old) and logp.requires_grad and not old.requires_grad
    assert loss.item() == pytest.approx(-((A * mask).sum(1) / mask.sum(1)).mean().item(), abs=1e-6)
    assert torch.allclose(second[1], old, atol=1e-5), "the same old policy in both epochs"
    assert (second[0] - second[1]).abs().max() > 1e-3
    assert torch.equal(second[2], A) and torch.equal(weight, 1 / (8 * mask.sum(1)))
    assert rows[1]["policy/loss"] == pytest.approx((loss.item() + calls[1][1][0].item()) / 2)


def test_annotated_vectors_are_cached_and_the_samples_are_not(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "contrastive_loss")
    run(tmp_path / "r", "--head_only_steps", 0, "--lr", 1e-3, steps=1)
    (first, _), (second, _) = calls
    assert torch.equal(first[1], second[1]) and not first[1].requires_grad
    assert first[0].requires_grad and not torch.equal(first[0], second[0])


def test_ppo_gets_the_values_and_rewards_of_the_old_policy(tmp_path, monkeypatch):
    targets, loss = spy(monkeypatch, carft, "ppo_advantages"), spy(monkeypatch, carft, "value_loss")
    rows = run(tmp_path / "r", "--vf_coef", 1, "--head_only_steps", 2, steps=2)
    (r, old_logp, ref_logp, old_V, mask, cfg), (A, R) = targets[1]
    assert all(x in (1., pytest.approx(.1)) for x in r.tolist())
    assert r.mean().item() == pytest.approx(rows[2]["reward/mean"])
    assert torch.allclose(old_logp, ref_logp, atol=1e-5), "only the heads have moved"
    assert old_V.abs().max() > 0 and (old_V[mask == 0] == 0).all()
    rho = carft.kl_shaped_rewards(r, old_logp, ref_logp, mask, cfg.kl_coef)
    assert torch.allclose(rho.sum(1), r, atol=1e-4)
    expected, returns = carft.gae(rho, old_V, mask, 1., .95)
    assert torch.allclose(R, returns) and torch.allclose(A, carft.whiten(expected, mask))
    size = [int(row.nonzero().max()) for row in mask]
    order = sorted(range(8), key=lambda i: size[i])  # a micro-batch is sorted by length
    for (V, old, returns, m, n), _ in loss[2:]:  # of the second step
        assert n == 8 and V.requires_grad and torch.equal(m, mask[order])
        assert torch.equal(returns, R[order]) and torch.equal(old, old_V[order])
    first, second = (call[0][0] for call in loss[2:])
    assert torch.allclose(first, old_V[order], atol=1e-5)
    assert not torch.allclose(second, old_V[order], atol=1e-5)


def test_reft_is_carft_without_contrast_on_a_linear_critic(tmp_path):
    a = run(tmp_path / "a", "--method", "reft")
    b = run(tmp_path / "b", "--cl_coef", 0, "--head", "separate")
    assert a == b
    assert torch.equal(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
    c = run(tmp_path / "c", "--cl_coef", 0, steps=1)
    for name in ("sample/length", "reward/mean", "policy/entropy"):
        assert c[1][name] == a[1][name], "all methods sample alike at first"


def test_contrast_is_weighted(tmp_path):
    for name, argv in (("reft", ["--method", "reft"]), ("faint", ["--cl_coef", 1e-9]),
                       ("strong", ["--cl_coef", 10])):
        run(tmp_path / name, *argv, "--head", "separate", "--lr", 1e-3, steps=2)
    reft, faint, strong = (weights(tmp_path / x / "model") for x in ("reft", "faint", "strong"))
    assert torch.allclose(reft, faint, atol=1e-5)
    assert (reft - strong).abs().max() > 1e-3


def test_embedding_enhanced_reward(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "rewards")
    vectors = spy(monkeypatch, carft, "contrastive_gradient")
    run(tmp_path / "r", "--partial_reward", "embedding", steps=2)
    for ((right, number, partial), r), ((Z, Z_ann, *_), _) in zip(calls, vectors[::2]):
        cos = F.cosine_similarity(Z_ann[:, 0], Z[:, 0])
        assert torch.allclose(partial, .2 + .1 * cos)
        assert number.all() and 0 < right.sum() < 8
        assert ((r == 1) == right).all() and ((r[~right] >= .1) & (r[~right] <= .3)).all()
        assert len(set(partial.tolist())) > 4, "from each CoT's own cosine"
        assert r[~right].tolist() == partial[~right].tolist()


def test_the_contrast_is_minimised(tmp_path):
    """With nothing else in the loss (the critic's is 0, all rewards are equal, no KL)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carft, "answer_of", lambda text, problem: (True, True))
        rows = run(tmp_path / "r", "--cl_coef", 1, "--vf_coef", 0, "--kl_coef", 0, "--lr", 1e-3,
                   "--prompts", 32, steps=30)
    losses = [r["cl/loss"] for r in rows[1:]]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1
    assert rows[-1]["cl/cos_other"] < rows[1]["cl/cos_other"] - .2


def test_every_row_meets_its_own_problem_and_annotation(tmp_path, monkeypatch):
    answers, quick = [], carft.answer_of

    def recorded(text, problem):
        answers.append((text, problem.prompt))
        return quick(text, problem)

    monkeypatch.setattr(carft, "answer_of", recorded)
    samples, scored = spy(monkeypatch, carft, "sample"), spy(monkeypatch, carft, "score")
    run(tmp_path / "r", steps=1)
    batch = next(found for a, found in samples if a[5] > 0 and len(a[2]) == 8)
    judged = [(s.text, s.prompt) for s in batch]
    assert any(answers[i:i + 8] == judged for i in range(len(answers)))
    annotated, sets = next(a[2:4] for a, _ in scored if len(a[2]) == 8 and a[2] is not batch)
    for s, own, (cot,) in zip(batch, annotated, sets):
        assert own.prompt == s.prompt and cot == carft.columns(own)
        assert "####" in own.text


def test_no_question_is_in_a_batch_twice(tmp_path, monkeypatch, worlds):
    samples = spy(monkeypatch, carft, "sample")
    data = write(tmp_path / "a.jsonl", jsonl(worlds / "arithmetic/annotated.jsonl")[:20])
    flags = "--dataset", data, "--eval_dataset", "tiny"
    run(tmp_path / "r", *flags, steps=5)  # an epoch is two batches of 8, four are dropped
    batches = [a[2] for a, _ in samples if a[5] == 1. and len(a[2]) == 8]
    assert len(batches) == 5
    for first, second in zip(batches[::2], batches[1::2]):
        assert len({*first, *second}) == 16
    assert all(len(set(b)) == 8 for b in batches)


def test_log_probs_are_at_the_sampling_temperature(tmp_path, monkeypatch):
    samples, targets = spy(monkeypatch, carft, "sample"), spy(monkeypatch, carft, "ppo_advantages")
    for method in ("carft", "drgrpo"):
        rows = run(tmp_path / method, "--temperature", .6, "--method", method,
                   *(["--group", 4] if method == "drgrpo" else []), steps=2)
        assert all(r["policy/mismatch"] < 1e-4 for r in rows[1:])
    batch = next(found for a, found in samples if a[5] == .6 and len(a[2]) == 8)
    for s, old_logp in zip(batch, targets[0][0][1]):
        assert common.response_part(s, old_logp).tolist() == pytest.approx(s.logps, abs=1e-4)


def test_drgrpo(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "policy_loss")
    run(tmp_path / "r", "--method", "drgrpo", "--prompts", 8, "--group", 4, steps=1)
    (logp, old, A, mask, weight), _ = calls[0]
    assert torch.allclose(weight, torch.full_like(weight, 1 / (32 * 48)))
    assert torch.equal(logp, old)
    values = {round(abs(a), 4) for a in A[mask > 0].tolist()}
    assert values <= {.25, .5, .75} and len(values) > 1, "r - mean of groups of 4, not divided"


def test_ppo_learns(tmp_path):
    """The reward rises: here that of ending in an even digit."""
    rows = run(tmp_path / "r", "--prompts", 32, "--lr", 1e-3, "--kl_coef", 0, "--vf_coef", .1,
               "--head_only_steps", 2, steps=30)
    means = [r["reward/accuracy"] for r in rows[1:]]
    assert sum(means[-8:]) / 8 > sum(means[:8]) / 8 + .15


# ----------------------------------------------------------------------------- reference and --lora


def test_reference_is_the_sft_policy(tmp_path, monkeypatch):
    calls = spy(monkeypatch, carft, "ppo_advantages")
    run(tmp_path / "r", "--lr", 1e-3, steps=3)
    (_, old_logp, ref_logp, *_), _ = calls[0]
    assert torch.equal(old_logp, ref_logp), "at RL step 0"
    (_, old_logp, ref_logp, *_), _ = calls[2]
    assert not torch.allclose(old_logp, ref_logp, atol=1e-3)


def test_lora(tmp_path, monkeypatch, tiny_folder, tiny):
    """The SFT adapter is part of the reference, and the heads train in full."""
    calls = spy(monkeypatch, carft, "ppo_advantages")
    samples = spy(monkeypatch, carft, "sample")
    folder = tmp_path / "r"
    rows = run(folder, "--lora", "--model", tiny_folder, "--dataset", "tiny", "--sft_lr", 3e-3,
               "--lr", 1e-3, "--sft_epochs", 3, steps=3)
    (_, old_logp, ref_logp, _, mask, cfg), _ = calls[0]
    assert torch.equal(old_logp, ref_logp) and rows[1]["policy/kl"] == 0
    assert rows[3]["policy/kl"] != 0
    # the reference is the merged SFT policy, not the checkpoint it started from
    merged = AutoModelForCausalLM.from_pretrained(folder / "sft")
    batch = next(found for a, found in samples if a[5] > 0 and len(found) == 8)  # the first step
    sft, base = (common.batch_logps(m, batch, cfg) for m in (merged, tiny[0]))
    assert torch.allclose(sft, ref_logp, atol=1e-5)
    assert not torch.allclose(base, ref_logp, atol=1e-2)
    state = common.load_file(folder / "checkpoint" / "weights.safetensors")
    assert {k for k in state if k.startswith("1.")} == {
        "1.projection.weight", "1.projection.bias", "1.value.weight", "1.value.bias"}
    assert all("lora" in k for k in state if k.startswith("0.")), "else only adapters are trained"
    assert state["1.value.weight"].abs().max() > 0
    # model/ is an adapter on sft/: loaded with peft it is the trained policy
    adapter = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder.resolve() / "sft")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    trained = common.add_adapters(merged)
    names = {n: f"0.{n}" for n, p in trained.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in trained.named_parameters():
            if n in names:
                p.copy_(state[names[n]])
    assert torch.allclose(common.batch_logps(loaded, batch, cfg),
                          common.batch_logps(trained, batch, cfg), atol=1e-5)
    assert not torch.allclose(common.batch_logps(loaded, batch, cfg), sft, atol=1e-3)


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("argv", [[], ["--method", "drgrpo", "--group", 4], ["--lora"]])
def test_resume_is_exact(tmp_path, argv, monkeypatch, tiny_folder):
    if "--lora" in argv:
        argv = ["--lora", "--model", tiny_folder, "--dataset", "tiny"]
    argv = [*argv, "--lr", 1e-3, "--save_every", 2]
    whole = run(tmp_path / "whole", *argv, steps=4)
    real, count = carft.sample, [0]

    def killed(*a, **k):
        count[0] += a[5] > 0 and a[3] == (4 if "drgrpo" in argv else 1) and len(a[2]) == 8
        if count[0] == 4:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(carft, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *argv, steps=4)
    monkeypatch.setattr(carft, "sample", real)
    carft.main(["--resume", str(tmp_path / "cut")])
    rows = jsonl(tmp_path / "cut" / "metrics.jsonl")
    assert rows == whole


@pytest.mark.parametrize("argv", [[], ["--lora"]])
@pytest.mark.parametrize("when", ["during", "after"])
def test_killed_around_stage_1(tmp_path, argv, when, monkeypatch, tiny_folder):
    if argv:
        argv = ["--lora", "--model", tiny_folder, "--dataset", "tiny"]
    whole = run(tmp_path / "whole", *argv, steps=2)

    def killed(*a, **k):
        raise KeyboardInterrupt

    name = {"during": "keep_sft", "after": "evaluate"}[when]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(carft, name, killed)
        run(tmp_path / "cut", *argv, steps=2)
    assert (tmp_path / "cut" / "sft").exists() == (when == "after")
    carft.main(["--resume", str(tmp_path / "cut")])
    assert jsonl(tmp_path / "cut" / "metrics.jsonl") == whole


# --------------------------------------------------------------------------------------- real input

SVAMP = [{"item_id": f"svamp_{i}", "question": f"Ada has {i} figs . she gives 2 . how many ?",
          "answer_cot": f"Ada has {i} figs.\n\n{i} figs - 2 figs = {i - 2} figs\n\nTherefore, the "
                        f"answer is <{i - 2}>.", "answer_value": f"{i - 2}.0"}
         for i in range(10, 40)]


@pytest.mark.parametrize("rows", [SVAMP, GSM])
def test_real_input(tmp_path, rows, llama_folder, monkeypatch):  # noqa: F811
    train, model = write(tmp_path / "train.json", rows), llama_folder()
    prompts = spy(monkeypatch, carft, "sample")
    sft = spy(monkeypatch, carft, "sft_step")
    test = write(tmp_path / "t.json", [{**r, "question": f"{r['question']} now"} for r in rows[:5]])
    metrics = run(tmp_path / "r", "--model", model, "--dataset", train, "--eval_dataset", test,
                  "--prompts", 4, "--max_new_tokens", 120, steps=2)
    assert metrics[-1]["step"] == 2
    tok = common.AutoTokenizer.from_pretrained(model)
    prompt = tok.decode(prompts[0][0][2][0])
    assert prompt.startswith("Question:\n") and prompt.endswith("\nAnswer reasoning:\n")
    text = sft[0][0][1][0].text
    assert "####" not in text and text.count("\nTherefore, the answer is: ") == 1
    answer = text.rpartition("\nTherefore, the answer is: ")[2]
    assert text.endswith(answer) and float(answer.replace(",", ""))


def test_a_model_that_was_trained_with_another_prompt_keeps_it(tiny_folder, llama_folder):  # noqa: F811
    for folder, prompt in ((tiny_folder, "<|user|>{question}<|assistant|>"),
                           (llama_folder(), carft.PROMPT)):
        cfg = carft.parse(["--model", folder, "--dataset", "tiny", "--max_new_tokens", "40"])
        _, tok, (problem, *_), *_ = common.set_up(cfg, plain=carft.PROMPT)
        expected = tok(prompt.format(question=problem.question), add_special_tokens=False)
        assert problem.prompt == tuple(expected.input_ids)


def test_targets():
    p = common.Problem("q", "72", "48/2 = 24\n24+48 = 72\n#### 72")
    assert carft.annotated_cot(p, False) == "48/2 = 24\n24+48 = 72\nTherefore, the answer is: 72"
    assert carft.annotated_cot(p, True) == p.solution
    bare = common.Problem("q", "7", "12-5=7")
    assert carft.annotated_cot(bare, True) == "12-5=7\n#### 7", "the answer is always taught"
    assert carft.annotated_cot(common.Problem("q", "72"), False) == ""
    assert carft.annotated_cot(common.Problem("q", "72"), True) == ""
    p = common.Problem("q", "203.0", "29 * 7 = 203\n\nTherefore, the answer is <203>.")
    text = carft.annotated_cot(p, False)
    assert text.endswith("is <203>.\nTherefore, the answer is: 203.0")
    assert common.extract_answer(text) == "203.0"


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("argv, told", [
    (["--group", 4], "--group 4: carft has one sample"),
    (["--method", "drgrpo", "--group", 1], "at least 2"),
    (["--prompts", 1], "the other questions are the negatives"),
    (["--method", "reft", "--cl_coef", .1], "--cl_coef: the contrastive loss is of --method carft"),
    (["--method", "sft", "--code_parity"], "--code_parity"),
    (["--method", "reft", "--signal", "both"], "--signal"),
    (["--cl_coef", 0, "--signal", "negative"], "which is off here"),
    (["--method", "sft", "--sampled_tokens", 9], "--sampled_tokens"),
    (["--method", "reft", "--partial_reward", "embedding"], "--partial_reward embedding"),
    (["--vf_coef", -1], "--vf_coef -1.0"), (["--cl_coef", "nan"], "--cl_coef nan"),
    (["--head_lr", -1], "--head_lr -1.0"), (["--gamma", 1.5], "--gamma"),
    (["--gae_lambda", -.1], "--gae_lambda"), (["--ppo_epochs", 0], "--ppo_epochs 0"),
    (["--sft_epochs", -1], "--sft_epochs -1"), (["--head", "wide"], "--head")])
def test_refused_flags(tmp_path, refused, argv, told):
    assert told in refused(carft.main, *argv, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_refused_input(tmp_path, refused, tiny_folder):
    assert "--hot is a preset" in refused(carft.main, "--hot", "--model", tiny_folder)
    bare = write(tmp_path / "bare.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)}
                                           for i in range(60)])
    out = tmp_path / "r"
    told = refused(carft.main, "--model", tiny_folder, "--dataset", bare, "--out", out, "--prompts",
                   4, "--max_new_tokens", 40)
    assert "0 of 48 problems have a question of their own and an annotated CoT" in told
    assert not (out / "config.json").exists(), "a refused command leaves no run in the way"
    told = refused(carft.main, "--max_new_tokens", 6, "--out", out)
    assert "--max_new_tokens 6" in told
    shutil.rmtree(out, ignore_errors=True)
