"""The equations of laser.py: worked by hand, and by what must hold for any input."""

import math
from types import SimpleNamespace

import pytest
import torch

import laser
from common import Sample, collate, hidden_states, response_logps
from laser import (
    auroc,
    batch_last_token_logps,
    calibration_bins,
    class_weights,
    ece,
    group_advantages,
    last_token_logps,
    log_z_offset,
    mixed_advantages,
    phases,
    policy_loss,
    self_verification,
    smallest_beta_v,
    verification_loss,
    verification_score,
    verify_f1,
    well_formed,
)

C = -23.0


def config(**kw):
    return laser.Config(**{"alpha": .1, "tau": .1, "device": "cpu", **kw})


def column(values):
    """Log-probabilities of z_c as `last_token_logps` gives them."""
    return torch.tensor(values)[:, None]


# ----------------------------------------------------------------------------- the score, Eq. 8-12


def test_score_by_hand():
    logp = column([-13.5, -21, -18, -12, -22.5, -16])
    score = verification_score(logp, C, config())
    assert score.tolist() == pytest.approx([.95, .2, .5, 1.1, .05, .7], abs=1e-6)
    special = column([C, C + 10, 0.0])  # c_ref, its target for a correct solution, certainty
    assert verification_score(special, C, config()).tolist() == pytest.approx([0, 1, 2.3], abs=1e-6)
    exact = verification_score(logp, torch.tensor([-13.5] * 6), config())
    assert exact.tolist() == pytest.approx([0, -.75, -.45, .15, -.9, -.25], abs=1e-6)
    probability = verification_score(column([math.log(.25)]), C, config(verify_loss="bce"))
    assert probability.item() == pytest.approx(.25)


@pytest.mark.parametrize("beta_v,correct,wrong", [
    (.1, .99999977, -.00000023), (.05, .99757, -.00243), (.0435, .9701, -.0299),
    (.03, .690, -.310)])
def test_closed_form(beta_v, correct, wrong):
    """Eq. 8: the optimum pi* ~ pi_ref exp(r/beta_v) has the verifier reward as its score, up to
    beta_v log Z."""
    torch.manual_seed(0)
    ref = torch.log_softmax(torch.randn(50, dtype=torch.double), 0) + math.log1p(-2 * math.exp(C))
    ref = torch.cat([ref, torch.tensor([C, C], dtype=torch.double)])  # z_c and z_i come last
    cfg = config(beta_v=beta_v)
    for hit, expected in ((-2, correct), (-1, wrong)):
        r_hat = torch.zeros(52, dtype=torch.double)
        r_hat[hit] = 1.0
        best = torch.log_softmax(ref + r_hat / beta_v, 0)
        score = verification_score(best[None, -2:], C, cfg).item()
        assert score == pytest.approx(expected, abs=6e-4 if beta_v < .05 else 6e-6)
        offset = log_z_offset(ref[-2:-1], beta_v)
        assert score == pytest.approx((hit == -2) - offset, abs=1e-9)


def test_smallest_beta_v():
    for p, correct in ((1e-4, .884), (1e-2, .460), (.1, .230)):  # the scores of a natural token
        assert 1 - log_z_offset(torch.tensor([math.log(p)]), .1) == pytest.approx(correct, abs=1e-3)
    for c in (-23.0, -12.0, -6.2, -3.2):
        works = smallest_beta_v(torch.tensor([c]))
        assert works >= -1 / c
        assert log_z_offset(torch.tensor([c]), works * 1.0001) <= laser.OFFSET
        below = works * .999
        assert log_z_offset(torch.tensor([c]), below) > laser.OFFSET or below < -1 / c
    assert smallest_beta_v(torch.tensor([-1.0])) == smallest_beta_v(torch.tensor([-3.0])) == \
        math.inf, "the offset tends to pi_ref(z_c)"
    spread = smallest_beta_v(torch.tensor([-8.0, -38.0]))
    assert spread > smallest_beta_v(torch.tensor([-23.0])), "rare likely tokens count"


# ----------------------------------------------------------------------------- where it is read


def samples_of(tok, lengths=(3, 9, 5)):
    """Responses of several lengths to prompts of several lengths, EOS at the end."""
    torch.manual_seed(0)
    eos = tok.eos_token_id
    return [Sample(tuple(torch.randint(5, 250, (2 + 2 * i,)).tolist()),
                   [*torch.randint(5, 250, (n - 1,)).tolist(), eos], "", True)
            for i, n in enumerate(lengths)]


def read_alone(model, s, z, position):
    """log softmax of the logits at one position of one unpadded sequence, no code of ours."""
    with torch.no_grad():
        logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0, position]
    return torch.log_softmax(logits.double(), -1)[z].tolist()


def test_z_is_read_at_the_last_token_of_each_row(tiny):
    """Under padding or packing the slot after EOS belongs to somebody else."""
    model, tok = tiny
    samples, z = samples_of(tok), [tok.pad_token_id, 93]
    expected, before = (torch.tensor([read_alone(model, s, z, at) for s in samples])
                        for at in (-1, -2))
    ids, mask = collate(samples, "cpu")
    ids[0, len(samples[0].prompt) + 3:] = 7  # padding never matters
    with torch.no_grad():
        got = last_token_logps(model, hidden_states(model, ids), mask, z)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch_last_token_logps(model, samples, z, config(micro_tokens=12)),
                               expected, atol=1e-4, rtol=0)
    assert (expected - before).abs().min() > 1e-3, "positions must differ"
    # it is the label log-probability of an appended z_c, which is the code's way
    appended = [Sample(s.prompt, [*s.tokens, z[0]], "", True) for s in samples]
    ids, mask = collate(appended, "cpu")
    with torch.no_grad():
        label = response_logps(model, ids, mask, 1.0)[0]
    last = [len(s.prompt) + len(s.tokens) for s in samples]
    torch.testing.assert_close(label[torch.arange(3), last], expected[:, 0], atol=1e-4, rtol=0)


class Toy:
    """A model whose hidden states are its logits."""

    compute_dtype = torch.float32

    def get_output_embeddings(self):
        return lambda h: h


def test_logits_are_unscaled_and_in_float32():
    logits = torch.tensor([8., 3, -14, 1])
    hidden = logits.bfloat16()[None, None].repeat(1, 3, 1)
    mask = torch.tensor([[0., 1, 1]])
    got = last_token_logps(Toy(), hidden, mask, [2])
    assert got.dtype == torch.float32 and got.item() == pytest.approx(-22.00762, abs=2e-5)
    shifted = last_token_logps(Toy(), hidden.float() + 7.5, mask, [2])
    assert shifted.item() == pytest.approx(got.item(), abs=1e-5)


# --------------------------------------------------------------------------- Eq. 14, 16 and weights


def batch_of_six():
    logp = column([-13.5, -21, -18, -12, -22.5, -16.])
    return logp, torch.tensor([1., 0, 0, 1, 0, 0]), torch.ones(6, dtype=torch.bool)


def test_mse_by_hand():
    logp, r, finished = batch_of_six()
    logp.requires_grad_()
    weight = class_weights(r, finished, True)
    assert weight.tolist() == [1.5, .75, .75, 1.5, .75, .75]
    cfg = config()
    plain = verification_loss(logp, r, class_weights(r, finished, False), C, 6, cfg)
    loss = verification_loss(logp, r, weight, C, 6, cfg)
    assert plain.item() == pytest.approx(.1325) and loss.item() == pytest.approx(.1009375)
    loss.backward()
    assert logp.grad.flatten().tolist() == pytest.approx(
        [-2.5e-3, 5e-3, .0125, 5e-3, 1.25e-3, .0175], rel=1e-4), \
        "the score of 1.1 must pull back: it is not clamped"
    score = verification_score(logp, C, cfg)
    error = (score - r).square()  # balanced: the mean of the means of the two classes
    assert loss.item() == pytest.approx((error[r == 1].mean() + error[r == 0].mean()).item() / 2)


def test_truncated_rows_have_no_part_in_the_mse():
    logp, r, finished = batch_of_six()
    logp = torch.cat([logp, column([-14.])]).requires_grad_()
    r, finished = torch.cat([r, r[:1]]), torch.cat([finished, torch.tensor([False])])
    weight = class_weights(r, finished, True)
    assert weight[6] == 0 and class_weights(r, finished, False)[6] == 0
    loss = verification_loss(logp, r, weight, C, int(finished.sum()), config())
    assert loss.item() == pytest.approx(.1009375)
    loss.backward()
    assert logp.grad[6] == 0 and (logp.grad[:6] != 0).all()


@pytest.mark.parametrize("value,weights", [(1., [.5, .5, 0]), (0., [.5, .5, 0])])
def test_single_class_batches(value, weights):
    r, finished = torch.full((3,), value), torch.tensor([True, True, False])
    assert class_weights(r, finished, True).tolist() == weights
    nothing = class_weights(r, torch.zeros(3, dtype=torch.bool), True)
    assert nothing.tolist() == [0, 0, 0]
    loss = verification_loss(column([-20., -20, -20]), r, nothing, C, 1, config())
    assert loss.item() == 0


def test_bce_by_hand():
    logp = torch.tensor([[math.log(.5), math.log(.25)], [math.log(.125), math.log(.75)]])
    r, one = torch.tensor([1., 0.]), torch.ones(2)
    loss = verification_loss(logp, r, one, C, 2, config(verify_loss="bce"))
    assert loss.item() == pytest.approx(-(math.log(.5) + math.log(.75)) / 2)
    weight = torch.tensor([1.5, 0])  # the second one is truncated
    loss = verification_loss(logp, r, weight, C, 1, config(verify_loss="bce"))
    assert loss.item() == pytest.approx(-1.5 * math.log(.5))


# -------------------------------------------------------------------------------- Eq. 4 and Eq. 15

R = torch.tensor([[1., 1, 1, 0, 0, 0, 0, 0]])


def scores(*logp):
    return verification_score(column(logp), C, config())[None]


def test_mixed_advantages_by_hand():
    A = group_advantages(R)
    assert A[0].tolist() == pytest.approx([1.2076] * 3 + [-.7246] * 5, abs=1e-4)
    s = scores(-13.2, -15, -11, -20, -22.6, -19, -24, -21.5)
    finished = torch.ones_like(R, dtype=torch.bool)
    mixed, where = mixed_advantages(A, s, finished, .1, .1)
    assert where.tolist() == [True]
    assert mixed[0].tolist() == pytest.approx(
        [1.2132, 1.1696, 1.2181, -.6906, -.7536, -.6664, -.7633, -.7270], abs=1e-4)
    only, _ = mixed_advantages(A, s, finished, 1.0, .1)
    assert only[0].tolist() == pytest.approx(
        [1.2637, .8273, 1.3122, -.3849, -1.0152, -.1424, -1.1122, -.7485], abs=1e-4)
    assert only.sum().item() == pytest.approx(0, abs=1e-5)
    assert only.std().item() == pytest.approx(1, abs=1e-5)


def test_flat_groups_mix_too_and_the_filter_keeps_the_rest():
    assert (group_advantages(torch.full((2, 7), .1)) == 0).all()  # exactly, whatever the rounding
    A = torch.zeros(2, 8)
    s = torch.cat([scores(-13, -14, -16, -12.5, -13.5, -19, -13, -15),
                   scores(-13, -13.2, -13.4, -12.5, -13.5, -13.9, -13, -13.1)])
    finished = torch.ones(2, 8, dtype=torch.bool)
    mixed, where = mixed_advantages(A, s, finished, .1, .1)
    assert where.tolist() == [True, False]
    assert mixed[0].tolist() == pytest.approx(
        [.0746, .0269, -.0686, .0746, .0507, -.2118, .0746, -.0209], abs=1e-4)
    assert (mixed[1] == 0).all()
    contrast = group_advantages(R.repeat(2, 1))
    assert torch.equal(mixed_advantages(contrast, s, finished, .1, .1)[0][1], contrast[1])
    exactly, where = mixed_advantages(A, s, finished, .1, s[1].clamp(0, 1).std().item())
    assert where.tolist() == [True, False], "a std of exactly T is filtered"
    assert mixed_advantages(A, s * 0 + .5, finished, .1, 0.0)[0].isfinite().all()


def test_truncated_rows_count_as_score_zero():
    """In the row's own numerator, too, not only in the statistics."""
    s = torch.tensor([[.9, .1, .8, 1.5]])
    finished = torch.tensor([[True, True, True, False]])
    A = group_advantages(torch.tensor([[1., 0, 1, 0]]))
    got, _ = mixed_advantages(A, s, finished, 1.0, .1)
    x = torch.tensor([.9, .1, .8, 0])
    assert got[0].tolist() == pytest.approx(((x - x.mean()) / x.std()).tolist(), abs=1e-6)
    assert got[0, 3] < 0
    nan = torch.tensor([[.9, .1, .8, math.nan]])
    assert torch.equal(mixed_advantages(A, nan, finished, 1.0, .1)[0], got)


def test_phases_are_strict_and_relative():
    cfg = config(reasoning_warmup_steps=3, self_rewarding_warmup_steps=2)
    assert [phases(s, cfg) for s in (3, 4, 5, 6)] == [
        (False, False), (True, False), (True, False), (True, True)]
    cfg = config(reasoning_warmup_steps=0, self_rewarding_warmup_steps=0)
    assert phases(1, cfg) == (True, True)
    cfg.tau = 0.0
    assert phases(9, cfg) == (True, False)
    cfg.alpha, cfg.tau = 0.0, .5
    assert phases(9, cfg) == (False, True)


# ------------------------------------------------------------------------------------- policy loss


def test_policy_loss_by_hand():
    """Ratios 1, 1.5 (clipped for A > 0), .5 and 4 (A < 0: clip below, dual clip above), 1.1, .9."""
    old = torch.full((6, 2), -2.0)
    w = torch.tensor([1.0, 1.5, .5, 4, 1.1, .9])
    logp = torch.stack([w.log() - 2, torch.full((6,), 7.0)], 1).requires_grad_()  # 7: padding
    A, mask = torch.tensor([1., 2, -1, -1, 1, -1]), torch.tensor([[1., 0]] * 6)
    loss = policy_loss(logp, old, A, mask, 10)
    assert loss.item() == pytest.approx(-(1 + 2.4 - .8 - 3 + 1.1 - .9) / 10)
    loss.backward()
    assert logp.grad[:, 0].tolist() == pytest.approx([-.1, 0, 0, 0, -.11, .09], abs=1e-6)
    assert (logp.grad[:, 1] == 0).all()


def test_policy_loss_is_a_token_mean_over_the_whole_batch():
    torch.manual_seed(0)
    logp, A = torch.randn(4, 6), torch.randn(4)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [3], [5]])).float()
    whole = policy_loss(logp, logp, A, mask, 16)
    assert whole.item() == pytest.approx(-(A * mask.sum(1)).sum().item() / 16, abs=1e-6)
    parts = [policy_loss(logp[x], logp[x], A[x], mask[x], 16) for x in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_the_two_losses_touch_disjoint_logits():
    """PPO has no gradient at the EOS position, the MSE none at any other; truncated rows none."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 11, requires_grad=True)  # Toy: hidden states are logits
    samples = [Sample((1, 2), [3, 4, 5], "", True), Sample((1,), [6, 7, 8, 9, 10], "", True),
               Sample((1, 2), [3, 4, 5, 6, 7], "", False)]
    ids, mask = collate(samples, "cpu")
    eos = torch.zeros(3, 7, dtype=torch.bool)
    eos[0, 4] = eos[1, 5] = True
    logp = torch.log_softmax(hidden[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
    logp = torch.cat([torch.zeros(3, 1), logp], 1) * mask
    loss = policy_loss(logp, logp.detach(), torch.tensor([1., -1, 1]), mask, 13)
    grad, = torch.autograd.grad(loss, hidden)
    touched = grad.abs().sum(-1) > 0
    assert not touched[eos].any() and not touched[2, 6] and touched.sum() == 13
    r, finished = torch.tensor([1., 0, 1]), torch.tensor([True, True, False])
    weight = class_weights(r, finished, True)
    logp_z = last_token_logps(Toy(), hidden, mask, [0])
    grad, = torch.autograd.grad(verification_loss(logp_z, r, weight, C, 2, config()), hidden)
    assert torch.equal(grad.abs().sum(-1) > 0, eos)


# ---------------------------------------------------------------------------------- test-time maths


def test_f1_by_hand():
    right = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    score = torch.tensor([.9, .6, .4, .2, .5, .7, .1, -.3])
    f1, correct, wrong = verify_f1(score, right)
    assert (correct, wrong) == (pytest.approx(2 / 3), pytest.approx(4 / 5))
    assert f1 == pytest.approx(.72727, abs=1e-5)
    assert verify_f1(score - 1, right)[0] == 0


def test_auroc_by_hand():
    right = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([.9, .4, .5, .1]), right) == .75
    assert auroc(torch.tensor([.5, .5, .5, .5]), right) == .5
    assert auroc(torch.tensor([.5, .2, .5, .1]), right) == pytest.approx((.5 + 1 + 0 + 1) / 4)
    score = torch.rand(500, generator=torch.Generator().manual_seed(0))
    right = torch.arange(500) % 3 == 0
    pairs = (score[right][:, None] > score[~right][None]).double().mean().item()
    assert auroc(score, right) == pytest.approx(pairs)


def test_ece_by_hand():
    score = torch.tensor([-.4, .05, .31, .39, 1.0, 2.0])
    right = torch.tensor([False, True, True, False, True, True])
    bins = calibration_bins(score, right)
    assert [n for _, _, n in bins] == [2, 2, 2]
    assert [s for s, _, _ in bins] == pytest.approx([.025, .35, 1])
    assert [a for _, a, _ in bins] == pytest.approx([.5, .5, 1])
    assert ece(score, right) == pytest.approx((2 * .475 + 2 * .15 + 0) / 6)


def drawn(answers, logps=None):
    return [Sample((), [0], f"#### {a}", True, logps=[-1.0 if logps is None else logps[i]])
            for i, a in enumerate(answers)]


def test_weighted_vote_by_hand():
    answers, score = [7, 7, 7, 5, 5], [.10, .15, .05, .90, .80]
    got = self_verification(drawn(answers), [a == 5 for a in answers], torch.tensor(score),
                            [""] * 5, 5)
    assert got["weighted_maj@5"] == 1 and got["best_of@5"] == 1 and got["auroc"] == 1
    # clipped: a wrong answer's 3.0 counts 1, and three correct .6 win
    got = self_verification(drawn([7, 5, 5, 5]), [False, True, True, True],
                            torch.tensor([3.0, .6, .6, -.1]), [""] * 4, 4)
    assert got["weighted_maj@4"] == 1 and got["best_of@4"] == 0
    # a truncated solution has score 0, and is not the best where all others are below
    samples = drawn([7, 5])
    samples[0].finished = False
    got = self_verification(samples, [False, True], torch.tensor([0, -.5]), [""] * 2, 2)
    assert got["best_of@2"] == 1


def test_self_verification_within_levels_and_the_baseline():
    """A score that only knows the level has AUROC 1/2 within each."""
    right = [True] * 3 + [False] + [True] + [False] * 3
    got = self_verification(drawn(range(8), [-.1, -.2, -.3, -.9, -.2, -1, -1, -1]), right,
                            torch.tensor([1.] * 4 + [0.] * 4), ["1"] * 4 + ["2"] * 4, 4)
    assert got["auroc"] == .75 and got["auroc/level1"] == got["auroc/level2"] == .5
    assert got["auroc_logp"] == 1 and got["verify_f1"] == .75
    samples = drawn(range(2), [-.5, -.6])
    samples[0].logps *= 4  # a longer solution is not a worse one: per token
    assert self_verification(samples, [True, False], torch.zeros(2), ["", ""], 2)["auroc_logp"] == 1
    one = self_verification(drawn(range(2)), [True, True], torch.tensor([1., 0.]), ["", ""], 2)
    assert set(one) == {"ece", "weighted_maj@2", "best_of@2"}, "no number of a class that is absent"


# --------------------------------------------------------------------------------------- the reward


def test_format_gate():
    assert well_formed("so \\boxed{5}", "q") and well_formed("#### 5", "q")
    assert not well_formed("5", "q") and not well_formed("\\boxed{5}, \\boxed{5}", "q")
    assert not well_formed("#### 5\n#### 5", "q") and not well_formed("\\boxed{5}\n#### 5", "q")
    tags = "put it in <answer> </answer>"
    good = "hm </think> <answer> \\boxed{5} </answer>"
    assert well_formed(good, tags)
    for bad in (good + good, good.replace("</think>", ""), good.replace("\\boxed", ""),
                good + " 5", "\\boxed{5}"):
        assert not well_formed(bad, tags), bad
    problem = SimpleNamespace(answer="5")
    for text, r in ((good, 1.0), (good.replace("5", "6"), 0.0), ("\\boxed{5}", 0.0)):
        assert laser.reward(laser.correct(text, problem), text, tags) == r
