"""The maths of gcpo.py, by hand-worked numbers and by properties.

The numbers of examples A and B follow from the formulas in the docstrings with a pocket calculator;
the derivation stands beside the first of each kind.
"""

import math
import re
from dataclasses import replace

import pytest
import torch

import common
import gcpo


def settings(method="gcpo", **kw):
    """The method's configuration with the clip range of DAPO, unless told otherwise."""
    return gcpo.Config(**gcpo.METHODS[method] | {
        "method": method, "clip_low": .2, "clip_high": .28, "kl_beta": 0.0, **kw})


def rows(values):
    """Ragged lists -> (padded tensor, mask)."""
    width = max(map(len, values))
    x, mask = torch.zeros(len(values), width), torch.zeros(len(values), width)
    for r, v in enumerate(values):
        x[r, :len(v)], mask[r, :len(v)] = torch.tensor(v), 1
    return x.double(), mask.double()


# Example A: a repaired group of 4, the golden answer in row 2, lengths 4, 6, 3, 5.
DELTA, MASK = rows([[.02, -.01, .03, 0], [-.02, -.04, .01, -.03, 0, -.04], [.30, .10, .20],
                    [0, .01, -.02, 0, -.04]])
A = torch.tensor([-.57735, -.57735, 1.73205, -.57735]).double()


def example(cfg, delta=DELTA, A=A, mask=MASK, n_seq=4, n_tok=18):
    """-> loss, d J / d logp, share clipped per row, with logp - old_logp = delta."""
    logp = delta.clone().requires_grad_()
    loss, cut, _ = gcpo.policy_loss(logp, torch.zeros_like(delta), None, A, mask, cfg, n_seq, n_tok)
    loss.backward()
    return loss.item(), -logp.grad, cut


# --------------------------------------------------------------------------- ratio, clip, aggregate


def test_the_methods_are_those_of_the_table():
    table = re.findall(r"^ +(\w+) +(yes|no) +(\w+) +(\w+) +(\S+) / (\S+) +(none|\S+) k?3? +(.+)$",
                       gcpo.__doc__, re.M)
    assert [row[0] for row in table] == list(gcpo.METHODS)
    for method, golden, ratio, aggregation, low, high, beta, flat in table:
        cfg = gcpo.parse(["--method", method])
        assert (cfg.golden != "off") == (golden == "yes")
        assert (cfg.ratio, cfg.aggregation) == (ratio, aggregation)
        assert (cfg.clip_low, cfg.clip_high) == (float(low), float(high))
        assert cfg.kl_beta == (0 if beta == "none" else float(beta))
        assert cfg.dynamic_sampling == (flat == "sampled again") == (cfg.overlong_cache > 0)


def test_sequence_ratio_by_hand():
    # row 0: exp((.02 - .01 + .03 + 0) / 4) = exp(.01)
    s = gcpo.importance_ratio(DELTA, torch.zeros_like(DELTA), MASK, "sequence").squeeze()
    assert s.tolist() == pytest.approx([1.010050, .980199, 1.221403, .990050], abs=1e-6)
    s = gcpo.importance_ratio(DELTA, torch.zeros_like(DELTA), MASK, "sequence_sum").squeeze()
    assert s.tolist() == pytest.approx([1.040811, .886920, 1.822119, .951229], abs=1e-6)
    one, mask = rows([[.1], [-.2]])  # of a single token, all three are the same
    for kind in ("sequence", "sequence_sum"):
        assert torch.equal(gcpo.importance_ratio(one, 0 * one, mask, kind),
                           gcpo.importance_ratio(one, 0 * one, mask, "token"))


def test_example_a_of_gcpo():
    loss, grad, cut = example(settings())
    assert loss == pytest.approx(-.098714, abs=1e-6) and cut.tolist() == [0, 0, 0, 0]
    # d J / d logp = s A / (G |y|), e.g. row 0: 1.010050 * -.57735 / (4 * 4)
    for r, g in enumerate([-.036447, -.023580, .176294, -.028580]):
        n = int(MASK[r].sum())
        assert grad[r, :n].tolist() == pytest.approx([g] * n, abs=1e-6)
        assert (grad[r, n:] == 0).all()
    # the paper's narrow clip silences the golden answer, and two more
    loss, grad, cut = example(settings(clip_low=3e-4, clip_high=4e-4))
    assert loss == pytest.approx(.001191, abs=1e-6) and cut.tolist() == [0, 1, 1, 1]
    assert grad[0, 0].item() == pytest.approx(-.036447, abs=1e-6) and (grad[1:] == 0).all()
    assert example(settings(ratio="sequence_sum"))[0] == pytest.approx(-.138714, abs=1e-6)


def test_example_a_of_dapo_and_grpo():
    loss, grad, cut = example(settings("dapo"))
    assert loss == pytest.approx(.130042, abs=1e-6)
    assert grad[2, :3].tolist() == pytest.approx([0, .106345, .117530], abs=1e-6)
    assert cut[2].item() == pytest.approx(1 / 3)
    loss, grad, _ = example(settings("grpo", clip_high=0.2))
    assert loss == pytest.approx(-.075692, abs=1e-6)
    assert grad[2, :3].tolist() == pytest.approx([0, .159518, 0], abs=1e-6)


def test_on_policy_loss_is_zero_and_gradient_is_reinforce():
    loss, grad, _ = example(settings(), delta=torch.zeros_like(DELTA))
    assert abs(loss) < 1e-5  # A of the example is rounded to 5 digits
    assert torch.allclose(grad, A[:, None] * MASK / (4 * MASK.sum(1, keepdim=True)))
    assert grad[2, 0].item() == pytest.approx(.144338, abs=1e-6)


@pytest.mark.parametrize("old,ratio,gradient", [
    ((-2, -3, -1), 1.0, .144338),           # recomputed under the policy
    ((-.1, -.2, -.1), .154638, .022320),    # of a writer who was surer
    ((-2.5, -3.5, -1.5), 1.648721, 0.0),    # stale by half a nat per token: clipped, silent
])
def test_example_b_old_log_probs_of_the_golden_answer(old, ratio, gradient):
    logp, mask = rows([[-2, -3, -1]])
    old = torch.tensor([old]).double()
    assert gcpo.importance_ratio(logp, old, mask, "sequence").item() == pytest.approx(ratio, 1e-5)
    logp.requires_grad_()
    gcpo.policy_loss(logp, old, None, A[2:3], mask, settings(), 4, 18)[0].backward()
    assert -logp.grad[0, 0].item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("method", ["gcpo", "dapo", "grpo"])
@pytest.mark.parametrize("sign,delta,moves", [(1, .5, False), (1, -.5, True), (-1, .5, True),
                                              (-1, -.5, False)])
def test_the_clip_has_two_sides_that_never_clip(method, sign, delta, moves):
    d, mask = rows([[delta]])  # one token: sequence and token ratio are the same
    _, grad, cut = example(settings(method), d, torch.tensor([float(sign)]).double(), mask, 1, 1)
    assert bool(grad.abs().sum() > 0) == moves == (cut.item() == 0)
    if moves:
        assert grad.item() == pytest.approx(sign * math.exp(delta))


@pytest.mark.parametrize("sign,delta,clipped", [(1, .23, 0), (1, .26, 1), (-1, -.2, 0),
                                                (-1, -.25, 1)])
def test_the_clip_bounds_are_not_swapped(sign, delta, clipped):
    # exp(.23) = 1.26 < 1.28 < exp(.26) = 1.30;  exp(-.2) = .82 > .8 > exp(-.25) = .78
    d, mask = rows([[delta]])
    assert example(settings("dapo"), d, torch.tensor([float(sign)]).double(), mask, 1,
                   1)[2] == clipped


@pytest.mark.parametrize("method", gcpo.METHODS)
def test_the_gradient_does_not_depend_on_rows_padding_or_micro_batches(method):
    torch.manual_seed(0)
    cfg, delta = settings(method), .3 * torch.randn(4, 6).double() * MASK
    loss, grad, cut = example(cfg, delta)
    order = torch.tensor([2, 0, 3, 1])
    loss2, grad2, _ = example(cfg, delta[order], A[order], MASK[order])
    assert loss2 == pytest.approx(loss, abs=1e-12) and torch.allclose(grad2, grad[order])
    wide, mask = torch.randn(4, 9).double(), torch.zeros(4, 9).double()  # rubbish outside the mask
    wide[:, :6], mask[:, :6] = torch.where(MASK > 0, delta, wide[:, :6]), MASK
    loss3, grad3, cut3 = example(cfg, wide, mask=mask)
    assert loss3 == pytest.approx(loss, abs=1e-12) and torch.allclose(grad3[:, :6], grad)
    assert (grad3[:, 6:] == 0).all() and torch.allclose(cut3, cut)
    parts = [example(cfg, delta[i:i + 1], A[i:i + 1], MASK[i:i + 1]) for i in range(4)]
    assert sum(p[0] for p in parts) == pytest.approx(loss, abs=1e-12)
    assert torch.allclose(torch.cat([p[1] for p in parts]), grad)


def test_gspo_token_form_has_the_same_gradient():
    # GSPO Eq. 13-14: s_it = sg[s_i] * pi(y_it) / sg[pi(y_it)], averaged over tokens, then sequences
    logp = DELTA.clone().requires_grad_()
    s = gcpo.importance_ratio(logp.detach(), torch.zeros_like(logp), MASK, "sequence")
    s = s * (logp - logp.detach()).exp()
    J = torch.minimum(s * A[:, None], s.clamp(.8, 1.28) * A[:, None]) * MASK
    (-(J.sum(1) / MASK.sum(1)).mean()).backward()
    assert torch.allclose(-logp.grad, example(settings())[1], atol=1e-12)


def test_k3_kl_is_positive_and_pulls_towards_the_reference():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -9.0]], dtype=torch.double, requires_grad=True)
    ref = torch.tensor([[-1.0, -1.0, -4.0, -1.0]], dtype=torch.double)
    # pi_ref/pi - log(pi_ref/pi) - 1: 0; e - 1 - 1; 1/e + 1 - 1; the fourth is padding
    assert gcpo.k3_kl(logp, ref)[0, :3].tolist() == pytest.approx([0, math.e - 2, 1 / math.e])
    mask = torch.tensor([[1.0, 1, 1, 0]]).double()
    loss, _, kl = gcpo.policy_loss(logp, logp.detach(), ref, torch.zeros(1).double(), mask,
                                   settings("grpo", kl_beta=.5), 1, 3)
    loss.backward()
    assert loss.item() == pytest.approx(.5 * (math.e - 2 + 1 / math.e) / 3)
    assert kl.item() == pytest.approx(loss.item() / .5) and not kl.requires_grad
    # d k3 / d logp = 1 - pi_ref / pi
    assert logp.grad[0].tolist() == pytest.approx(
        [0, .5 / 3 * (1 - math.e), .5 / 3 * (1 - 1 / math.e), 0])


# ------------------------------------------------------------------------------ reward, advantage


@pytest.mark.parametrize("length,penalty", [(16384, 0), (17408, -.25), (18432, -.5), (20480, -1),
                                            (20481, -1)])
def test_dapo_eq_13(length, penalty):
    assert gcpo.overlong_penalty(length, 20480, 4096) == penalty


def test_rewards():
    for method, wrong in (("gcpo", 0), ("gspo", 0), ("grpo", 0), ("dapo", -1)):  # DAPO Eq. 7
        cfg = settings(method, max_new_tokens=100, overlong_cache=0.0)
        assert [gcpo.reward(c, 100, cfg) for c in (True, False)] == [1, wrong]
    cfg = settings("dapo", max_new_tokens=100)  # its cache is a fifth of the longest response
    assert [gcpo.reward(True, n, cfg) for n in (80, 90, 100)] == [1, .5, 0]
    assert gcpo.reward(False, 90, cfg) == -1.5


@pytest.mark.parametrize("G,golden,wrong,golden1,wrong1", [
    (2, 1, -1, .7071, -.7071), (4, 1.7321, -.5774, 1.5, -.5),
    (8, 2.6458, -.3780, 2.4749, -.3536), (16, 3.8730, -.2582, 3.75, -.25)])
def test_advantages_of_a_repaired_group(G, golden, wrong, golden1, wrong1):
    r = torch.tensor([[1.0] + [0.0] * (G - 1)])
    for how, best, rest in (({"ddof": 0}, golden, wrong), ({}, golden1, wrong1)):
        for scaled in (r, 2 * r - 1):  # 0/1 and -1/1 give the same
            a = gcpo.group_advantages(scaled, eps=0, **how)
            assert a[0].tolist() == pytest.approx([best] + [rest] * (G - 1), abs=1e-4)
            assert a.sum().item() == pytest.approx(0, abs=1e-5)


def test_advantages_stay_inside_their_group_and_vanish_without_contrast():
    r = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [5, 7, 5, 7]])
    a = gcpo.group_advantages(r)
    assert (a[:2] == 0).all()
    for value in (.7, -.3, 1 / 3):  # exactly, whatever the rounding of the mean
        assert (gcpo.group_advantages(torch.full((1, 8), value)) == 0).all()
    assert torch.equal(a[2], gcpo.group_advantages(r[2:3])[0])
    assert gcpo.group_advantages(r[2:3], eps=1.0)[0, 0] == pytest.approx(.75 / 1.5)  # + eps, below


# --------------------------------------------------------------------------------------- the repair

GOLD = common.Sample((1,), [9, 9, 0], "gold", True)


def group(correct, rewards=None):
    samples = [common.Sample((1,), [i + 2], f"{i}", True) for i in range(len(correct))]
    return gcpo.Group(None, samples, list(correct), rewards or [float(c) for c in correct])


def test_the_repair_touches_only_all_wrong_groups_and_one_row():
    for correct in ([True] * 4, [False, True, False, False]):
        g = group(correct)
        assert gcpo.replace_golden(g, GOLD, 1) is g
    g = group([False] * 4)
    assert gcpo.replace_golden(g, None, 1) is g
    for index in range(4):
        new = gcpo.replace_golden(g, GOLD, index)
        assert new.golden == index and len(new.samples) == 4
        assert new.samples[index] is GOLD and new.rewards[index] == 1 and new.correct[index]
        others = [i for i in range(4) if i != index]
        assert all(new.samples[i] is g.samples[i] for i in others)
        assert [new.rewards[i] for i in others] == [0, 0, 0]
    assert g == group([False] * 4) and g.golden is None, "the group of sampled responses changed"


def test_the_repair_ignores_shaped_rewards():
    """They do have contrast when all are wrong: why correctness decides."""
    g = group([False] * 4, [-1.0, -1.0, -1.5, -2.0])
    a = gcpo.group_advantages(torch.tensor([g.rewards]), ddof=0, eps=0)
    assert a[0].tolist() == pytest.approx([.9045, .9045, -.3015, -1.5076], abs=1e-4)
    new = gcpo.replace_golden(g, GOLD, 3)
    assert new.rewards == [-1, -1, -1.5, 1]
    a = gcpo.group_advantages(torch.tensor([new.rewards]), ddof=0, eps=0)
    assert a[0].tolist() == pytest.approx([-.391, -.391, -.911, 1.693], abs=1e-3)
    right = replace(g, correct=[False, True, False, False], rewards=[-1.0] * 4)
    assert gcpo.replace_golden(right, GOLD, 3) is right, "correct, whatever its length costs"
