"""The equations of carft.py: hand-worked numbers and properties."""

import math
import random
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from carft import (
    Heads, answer_of, common_subsequence, contrastive_gradient, contrastive_loss, correct,
    cosine_parts, cosines, critic_statistics, gae, group_advantages, kl_shaped_rewards,
    learning_rates, negative_loss, partial_rewards, policy_loss, pool, positive_loss,
    ppo_advantages, rewards, row_weights, scope_mask, state_values, token_sets, value_loss, whiten,
)
from common import Problem, Sample

approx = lambda x: pytest.approx(x, abs=1e-5)  # noqa: E731


def rows(*values):
    return torch.tensor(values, dtype=torch.float)


def close(a, *b, atol=1e-5):
    return torch.allclose(a, torch.tensor(b if len(b) > 1 else b[0], dtype=a.dtype), atol=atol)


# --------------------------------------------------------------------------- the unified CoT vector

V = rows([.5, -1, .2, .9, .1, 7])
E = rows([(5, 5), (5, 5), (0, 1), (1, 1), (-1, 1), (9, 9)])
S = scope_mask([[[2, 3, 4]]], 6, "cpu")


def test_pooling_by_hand():
    v, e = V.clone().requires_grad_(), E.clone().requires_grad_()
    z = pool(v, e, S)
    assert z.shape == (1, 1, 2) and close(z[0, 0], .282988, 1.)
    z.sum().backward()
    assert close(v.grad[0], 0, 0, -.072217, .368470, -.296253, 0)
    assert close(e.grad[0, :, 0], 0, 0, .255194, .513897, .230909, 0)
    assert close(e.grad[0, :, 1], 0, 0, .255194, .513897, .230909, 0)


def test_an_empty_token_set_is_a_zero_vector_and_takes_no_part():
    v, e = V.clone().requires_grad_(), E.clone().requires_grad_()
    z = pool(v, e, scope_mask([[[], [2]]], 6, "cpu"))
    assert close(z[0, 0], 0., 0.) and close(z[0, 1], 0., 1.)
    cosines(z[0], z[0]).sum().backward()
    assert v.grad.isfinite().all() and e.grad.isfinite().all()
    # of three wrong CoT row 1 has none of its own tokens, row 2 none in common with its annotation
    torch.manual_seed(0)
    z_a, z_c, z_d = torch.randn(3, 3, 4)
    wrong = torch.ones(3).bool()
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    loss = negative_loss(z_a, z_c, z_d, wrong, present)
    assert loss == negative_loss(z_a, z_c, z_d, torch.tensor([True, True, False]), present)
    for z, row in ((z_d, 1), (z_c, 2), (z_a, 2)):
        z[row] = torch.randn(4)
        assert negative_loss(z_a, z_c, z_d, wrong, present) == loss, "it is in no sum"
    z_d[2] = torch.randn(4)
    assert negative_loss(z_a, z_c, z_d, wrong, present) != loss
    # nor has a row a loss whose annotation has nothing in addition
    present[1, 0] = False
    assert negative_loss(z_a, z_c, z_d, wrong, present) == negative_loss(
        z_a, z_c, z_d, torch.tensor([True, False, False]), present)
    nothing = torch.zeros(3, 3).bool()
    loss, grad = gradient(lambda c: negative_loss(z_a, c, z_d, wrong, nothing), z_c)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_heads(kind):
    torch.manual_seed(0)
    heads, h = Heads(10, kind), torch.randn(2, 3, 10)
    v, e = heads(h.bfloat16())
    assert v.dtype == e.dtype == torch.float32 and v.shape == (2, 3) and e.shape == (2, 3, 64)
    assert (v == 0).all(), "the critic starts at zero"
    with torch.no_grad():
        heads.value.weight.normal_()
        heads.value.bias.fill_(.5)
    v, e = heads(h)
    assert torch.allclose(e, h @ heads.projection.weight.T + heads.projection.bias, atol=1e-6)
    assert (e < 0).any(), "the embedding is taken before the ReLU"
    x = e.clamp(min=0) if kind == "shared" else h
    assert torch.allclose(v, x @ heads.value.weight[0] + .5, atol=1e-5)
    for part in (0, 1):  # both reach the policy
        h = torch.randn(2, 3, 10, requires_grad=True)
        heads(h)[part].sum().backward()
        assert (h.grad != 0).any(2).all()


# ------------------------------------------------------------------------------ the positive signal

Z_ANN = rows((1, 0), (0, 1), (-1, .5))
Z = rows((.8, .6), (.3, 1), (1, .2))
RIGHT = torch.tensor([True, False, True])


def gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    value.backward()
    return value.item(), z.grad


def test_positive_loss_by_hand():
    assert torch.allclose(F.cosine_similarity(Z_ANN, Z), rows(.8, .957826, -.789352), atol=1e-5)
    for i, expected in enumerate((1.265202, .462484, 4.855658)):
        only = torch.arange(3) == i
        assert positive_loss(Z_ANN, Z, only).item() == approx(expected)
    value, grad = gradient(lambda z: positive_loss(Z_ANN, z, RIGHT), Z)
    assert value == approx(3.060430)
    assert close(grad, (-.703818, .938424), (-2.096984, .629095), (.358496, -1.792483))


def test_positive_loss_properties():
    one, yes = rows((1, 2)), torch.ones(1).bool()
    assert positive_loss(one, one, yes).item() == approx((1 - .9) / .2)
    torch.manual_seed(0)
    z_ann, z, right = torch.randn(8, 64), torch.randn(8, 64), torch.rand(8) < .6
    loss, grad = gradient(lambda z: positive_loss(z_ann, z, right), z)
    assert (grad[~right] != 0).any(1).all(), "wrong CoT are negatives with gradient"
    assert torch.allclose((grad * z).sum(1), torch.zeros(8), atol=1e-6), "gradient _|_ z"
    assert positive_loss(5 * z_ann, 3 * z, right).item() == approx(loss), "no scale"
    z_ann = z_ann.requires_grad_()
    positive_loss(z_ann, z.requires_grad_(), right).backward()
    assert z_ann.grad is None, "no gradient into the annotated vectors"


# ------------------------------------------------------------------------------ the negative signal

Z_A, Z_C, Z_D = rows((1, 0), (0, 1)), rows((.8, .6), (.6, .8)), rows((-1, .2), (.5, -1))
ALL = torch.ones(2, 3, dtype=torch.bool)


def test_negative_loss_gradients():
    torch.manual_seed(0)
    a, c, d = (torch.randn(6, 8).requires_grad_() for _ in range(3))
    anchor, every = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.ones(6, 3).bool()
    negative_loss(a, c, d, anchor, every).backward()
    assert a.grad is None, "no gradient into the annotated vectors"
    assert (c.grad != 0).any(1).all() and (d.grad != 0).any(1).all()
    assert torch.allclose((c.grad * c).sum(1), torch.zeros(6), atol=1e-5), "gradient _|_ z"


def test_negative_loss_formula():
    torch.manual_seed(1)
    a, c, d = torch.randn(3, 4, 8)
    cos, losses = (lambda x, y: (x @ y / x.norm() / y.norm()).item()), []  # noqa: E731
    for i in range(4):
        pull = math.exp(min(cos(a[i], c[i]), .9) / .2)
        losses.append(-math.log(pull / sum(math.exp(cos(c[i], z[k]) / .2)
                                           for z in (c, d) for k in range(4))))
    wrong = torch.tensor([True, False, True, True])
    assert negative_loss(a, c, d, wrong, torch.ones(4, 3).bool()).item() == approx(
        (losses[0] + losses[2] + losses[3]) / 3)


def test_negative_pull_ends_at_the_ceiling():
    a = rows((1, 0), (0, 1))
    near, far = rows((1, .1), (.1, 1)), rows((1, 1), (1, 1))
    d = torch.zeros(2, 2)
    own = torch.tensor([[True, True, False], [True, False, False]])
    only = torch.tensor([True, False])
    still, moved = (gradient(lambda c: negative_loss(a, c, d, only, own), x)[1]  # noqa: B023
                    for x in (near, far))
    assert still.abs().max() < 1e-5 and moved.abs().max() > .5


def test_longest_common_subsequence():
    assert common_subsequence("AGTAB", "GXTXAY") == ([1, 2, 3], [0, 2, 4])
    assert common_subsequence("", "AB") == ([], []) == common_subsequence("AB", "")
    assert common_subsequence("AB", "CD") == ([], [])
    assert common_subsequence("AB", "BA") == ([1], [0]), "a tie goes left"
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(9))] for _ in range(2))
        i, j = common_subsequence(a, b)
        assert [a[x] for x in i] == [b[x] for x in j] and i == sorted(i) and j == sorted(j)
        subsequences = {c for n in range(len(a) + 1) for c in combinations(a, n)}
        longest = max((len(c) for n in range(len(b) + 1) for c in combinations(b, n)
                       if c in subsequences), default=0)
        assert len(i) == longest


def made(tokens):
    """A CoT of the question 2 + 3, whose prompt has columns 0 to 7."""
    prompt, tokens = ([ord(t[0]) for t in text.split()] for text in ("Q : 2 + 3 A : |", tokens))
    return Sample(tuple(prompt), tokens, "", True)


def test_token_sets():
    annotated, sampled = made("2 + 3 = 5 </s>"), made("2 * 3 = 6 </s>")
    cfg = SimpleNamespace(signal="both")
    own, theirs = token_sets(sampled, annotated, cfg)
    assert own == [[8, 9, 10, 11, 12, 13], [8, 10, 11, 13], [9, 12]]
    assert theirs == [[8, 9, 10, 11, 12, 13], [9, 12]]
    cfg.signal = "positive"
    assert token_sets(sampled, annotated, cfg) == ([[*range(8, 14)]], [[*range(8, 14)]])
    longer = made("2 + 3 = 5 = 5 </s>")
    assert token_sets(sampled, longer, cfg)[1] == [[*range(8, 16)]]


def test_the_signals_are_put_together():
    torch.manual_seed(0)
    Z, Z_ann = torch.randn(4, 3, 64), torch.randn(4, 2, 64)
    right = torch.tensor([True, False, False, False])
    sets = [[[5], [5], [6]], [[5], [5], [6]], [[5], [], [6]], [[5], [5], []]]
    sets_ann = [[[5], [6]], [[5], [6]], [[5], [6]], [[5], []]]
    present = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
    arguments = {signal: (Z_ann, sets, sets_ann, right, SimpleNamespace(signal=signal))
                 for signal in ("positive", "negative", "both")}
    of = {signal: contrastive_loss(Z, *rest).item() for signal, rest in arguments.items()}
    assert of["positive"] == approx(positive_loss(Z_ann[:, 0], Z[:, 0], right).item())
    assert of["negative"] == approx(
        negative_loss(Z_ann[:, 1], Z[:, 1], Z[:, 2], ~right, present).item())
    assert of["both"] == approx((of["positive"] + of["negative"]) / 2)
    loss, dZ = contrastive_gradient(Z, *arguments["both"])
    assert loss == approx(of["both"])
    assert torch.equal(dZ, gradient(lambda Z: contrastive_loss(Z, *arguments["both"]), Z)[1])


# ------------------------------------------------------- what the released code computes (D1, D6)


def released(pull, others, mask):
    """- log(pull / others), (B,), times a mask (B, 1): each row of the (B, B) product holds all
    losses, so a single row of the mask that is 1 lets the losses of all rows in."""
    product = -(pull / others).log() * mask[:, None].float()
    return product.sum() / (mask.sum() + 1e-8)


def exp_cos(x, y):
    return (F.cosine_similarity(x[:, None], y[None], dim=-1) / .2).exp()


def pull_of(x, y):
    return (F.cosine_similarity(x, y).clamp(max=.9) / .2).exp()


def released_positive(z_ann, z, right):
    gathered = z.detach()  # torch.distributed.all_gather returns vectors without gradient
    return released(pull_of(z_ann, z), exp_cos(z_ann, gathered).sum(1), right)


def released_negative(z_a, z_c, z_d, wrong):
    gathered = z_d.detach()
    others = exp_cos(z_c, z_c).sum(1) + exp_cos(z_c, gathered).sum(1)
    return released(pull_of(z_a, z_c), others, wrong)


@pytest.mark.parametrize("right, ours, theirs", [
    ((0, 0, 0), 0, 0), ((1, 1, 1), 2.194448, 6.583344), ((1, 0, 0), 1.265202, 6.583344),
    ((1, 0, 1), 3.060430, 6.583344)])
def test_the_released_positive_loss_is_the_sum_of_all_rows(right, ours, theirs):
    right = torch.tensor(right).bool()
    loss, grad = gradient(lambda z: positive_loss(Z_ANN, z, right), Z)
    released_loss, released_grad = gradient(lambda z: released_positive(Z_ANN, z, right), Z)
    assert (loss, released_loss) == (approx(ours), approx(theirs))
    if not right.any():
        return
    # row 1 is above the ceiling: as released it has no gradient at all, right or wrong
    assert close(released_grad, (-1.8, 2.4), (0, 0), (.590328, -2.951638))
    assert (grad != 0).any(1).all(), "ours pushes it off the annotations of the other rows"
    # what is left of the released loss is attraction, - 1/tau grad cos below the ceiling
    attraction = gradient(lambda z: -(F.cosine_similarity(Z_ANN, z)[[0, 2]] / .2).sum(), Z)[1]
    assert torch.allclose(released_grad, attraction, atol=1e-6)


def test_the_released_negative_loss_is_the_sum_of_all_rows_without_gradient_into_z_d():
    one, none = torch.tensor([True, False]), torch.zeros(2).bool()
    assert released_negative(Z_A, Z_C, Z_D, one).item() == pytest.approx(1.5998 + 1.5990, abs=1e-4)
    assert negative_loss(Z_A, Z_C, Z_D, one, ALL).item() == pytest.approx(1.5998, abs=1e-4)
    assert released_negative(Z_A, Z_C, Z_D, none) == 0
    c, d = Z_C.clone().requires_grad_(), Z_D.clone().requires_grad_()
    released_negative(Z_A, c, d, one).backward()
    assert (c.grad != 0).any(1).all() and d.grad is None
    negative_loss(Z_A, c, d, one, ALL).backward()
    assert (d.grad != 0).any(1).all()


def test_the_released_common_tokens_are_also_those_of_the_prompt():
    annotated, sampled = made("2 + 3 = 5 </s>"), made("2 * 3 = 6 </s>")
    (_, shared, own), (_, extra) = token_sets(sampled, annotated, SimpleNamespace(signal="both"))
    in_ann, in_cot = common_subsequence(*([*s.prompt, *s.tokens] for s in (annotated, sampled)))
    assert shared == [8, 10, 11, 13] and in_cot == [*range(8), *shared]
    assert own == [9, 12] and {9, 12}.isdisjoint(in_cot)
    assert extra == [9, 12] and {9, 12}.isdisjoint(in_ann)


# ----------------------------------------------------------------------------------------- PPO

# prompt of 3 tokens, EOS at column 5; the state of the action in column t is column t - 1
MASK = rows([0, 0, 0, 1, 1, 1, 0])


def placed(*values):
    return rows([0, 0, 0, *values])


def test_ppo_bookkeeping_by_hand():
    positions = rows([9, 9, .2, .3, .5, 9, 9])  # values per position; those of EOS are never used
    values = state_values(positions, MASK)
    assert torch.equal(values, placed(.2, .3, .5, 0))
    rho = kl_shaped_rewards(rows(1)[0:1], placed(.2, -.1, .4, 0), torch.zeros(1, 7), MASK, .05)
    assert torch.allclose(rho, placed(-.01, .005, .98, 0))
    A, R = gae(rho, values, MASK, 1., .95)
    assert torch.allclose(A, placed(.71795, .661, .48, 0), atol=1e-6)
    assert torch.allclose(R, placed(.91795, .961, .98, 0), atol=1e-6)
    assert torch.allclose(whiten(A, MASK), placed(.791163, .332804, -1.123967, 0), atol=1e-5)
    cfg = SimpleNamespace(kl_coef=.05, gamma=1., gae_lambda=.95)
    white, returns = ppo_advantages(rows(1)[0:1], placed(.2, -.1, .4, 0), torch.zeros(1, 7), values,
                                    MASK, cfg)
    assert torch.equal(white, whiten(A, MASK)) and torch.equal(returns, R), "R of the raw A"


def test_the_score_is_on_the_last_token_and_counts_once():
    mask = rows([0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0])
    r = rows(1., .1, 0.)
    s = kl_shaped_rewards(r, torch.zeros(3, 7), torch.zeros(3, 7), mask, .05)
    assert torch.equal(s.sum(1), r) and s[0, 6] == 1 and s[1, 5] == r[1]
    noise = torch.randn(3, 7)
    rho = kl_shaped_rewards(r, noise, torch.zeros(3, 7), mask, .05)
    assert torch.allclose(rho, s - .05 * noise * mask) and (rho[mask == 0] == 0).all()


@pytest.mark.parametrize("gamma, lam", [(1., .95), (.9, .8), (1., 1.), (.99, 0.)])
def test_gae_against_the_sum(gamma, lam):
    torch.manual_seed(0)
    start, end = (2, 3, 1), (8, 5, 2)
    mask = torch.zeros(3, 8)
    for i, (a, b) in enumerate(zip(start, end)):
        mask[i, a:b] = 1
    rho, values = torch.randn(2, 3, 8) * mask
    A, R = gae(rho, values, mask, gamma, lam)
    for i, (a, b) in enumerate(zip(start, end)):
        v = [*values[i, a:b].tolist(), 0.]
        delta = [rho[i, a + t].item() + gamma * v[t + 1] - v[t] for t in range(b - a)]
        for t in range(b - a):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(b - a - t))
            assert A[i, a + t].item() == approx(expected)
            assert R[i, a + t].item() == approx(expected + v[t])
    assert (A[mask == 0] == 0).all() and (R[mask == 0] == 0).all()


def test_whitening_is_of_all_tokens_of_the_batch():
    torch.manual_seed(0)
    mask, A = (torch.rand(5, 9) < .6).float(), 3 + 2 * torch.randn(5, 9)
    white = whiten(A, mask)
    assert white[mask > 0].mean().item() == approx(0) and white[mask > 0].var().item() == approx(1)
    assert (white[mask == 0] == 0).all() and torch.equal(white, whiten(A * mask, mask))
    assert (whiten(rows([0, 3]), rows([0, 1])) == 0).all(), "a lone token"


def test_policy_loss_by_hand():
    ratio, A = rows([1.5, .5, 1.5, .5]), rows([1, 1, -1, -1])
    for t, (expected, moves) in enumerate([(-1.2, False), (-.5, True), (1.5, True), (.8, False)]):
        only, logp = (torch.arange(4) == t).float()[None], ratio.log().requires_grad_()
        loss, cut = policy_loss(logp, torch.zeros(1, 4), A, only, torch.ones(1))
        loss.backward()
        assert loss.item() == approx(expected) and cut.item() == (not moves)
        assert (logp.grad[0, t] != 0) == moves and logp.grad.count_nonzero() <= 1
    loss, cut = policy_loss(ratio.log(), torch.zeros(1, 4), A, torch.ones(1, 4), rows(1 / 4))
    assert loss.item() == approx((-1.2 - .5 + 1.5 + .8) / 4) and cut.item() == .5


def test_policy_loss_gradient_and_the_weights_of_rows():
    torch.manual_seed(0)
    mask = rows([0, 1, 1, 0], [0, 1, 1, 1])
    logp, A = (torch.randn(2, 4) * mask).requires_grad_(), torch.randn(2, 4) * mask
    weight = row_weights(mask, SimpleNamespace(method="reft"))
    assert close(weight, 1 / 4, 1 / 6)
    assert close(row_weights(mask, SimpleNamespace(method="drgrpo", max_new_tokens=16)),
                 1 / 32, 1 / 32), "no length in its loss"
    loss, cut = policy_loss(logp, logp.detach(), A, mask, weight)
    # ratio 1: minus the mean over rows of the mean over tokens of A, and REINFORCE's gradient
    assert loss.item() == approx(-((A.sum(1) / mask.sum(1)).mean()).item()) and (cut == 0).all()
    loss.backward()
    assert torch.allclose(logp.grad, -A * weight[:, None])


def test_value_loss_by_hand():
    v, old, R, mask = rows([1], [.1]), rows([.5], [0]), rows([1], [1]), torch.ones(2, 1)
    for i, expected in enumerate((.045, .405)):
        at = slice(i, i + 1)
        assert value_loss(v[at], old[at], R[at], mask[at], 1).item() == approx(expected)
    assert value_loss(v, old, R, mask, 2).item() == approx((.045 + .405) / 2)
    mask = rows([0, 1, 1, 0], [0, 1, 1, 1])  # a mean over each row, then over rows
    v = rows([5, 1, 3, 5], [5, 2, 2, 2])
    assert value_loss(v, v, 0 * v, mask, 2).item() == approx(.5 * ((1 + 9) / 2 + 4) / 2)
    assert value_loss(v, v, 0 * v, mask, 8).item() == approx(.5 * ((1 + 9) / 2 + 4) / 8)


def test_drgrpo_by_hand():
    r = rows((1, .1, 0, 1))
    A = group_advantages(r)
    assert torch.allclose(A, rows((.475, -.425, -.525, .475))) and A.sum().item() == approx(0)
    assert torch.allclose(group_advantages(rows((1, 0), (0, 0))), rows((.5, -.5), (0, 0)))
    for n in range(2, 17):
        assert (group_advantages(torch.full((1, n), .1)) == 0).all(), "a flat group: exact zeros"
    assert torch.allclose(group_advantages(10 * r), 10 * A, atol=1e-6), "no division by the std"


# --------------------------------------------------------------------------------- reward and task


def test_rewards():
    right = torch.tensor([True, False, False])
    number = torch.tensor([True, True, False])
    cos = rows(1., 0., -1., .6)
    assert close(partial_rewards("embedding", cos), .3, .2, .1, .26)
    assert close(partial_rewards("constant", cos), .1, .1, .1, .1)
    assert close(partial_rewards("none", cos), 0., 0., 0., 0.)
    for kind, partial in (("none", 0.), ("constant", .1), ("embedding", .2)):
        assert close(rewards(right, number, partial_rewards(kind, torch.zeros(3))), 1., partial, 0.)
    assert partial_rewards("embedding", rows(1.)) < .5, "a wrong answer never counts as correct"


@pytest.mark.parametrize("text, found", [
    ("2+3=5\n#### 5", (True, True)), ("so\nTherefore, the answer is: 5.0", (True, True)),
    ("the answer is: 5.01", (True, True)), ("the answer is: 4.99", (True, True)),
    ("the answer is: 5.02", (False, True)),
    ("#### 1,005", (False, True)), ("five", (False, False)), ("#### five", (False, False)),
    ("The answer is 4. Therefore, the answer is: 5", (True, True)), ("", (False, False))])
def test_answer(text, found):
    problem = Problem("2+3?", "5")
    assert answer_of(text, problem) == found and correct(text, problem) == found[0]


def test_answers_that_are_no_numbers():
    assert answer_of("#### \\frac{\\pi}{2}", Problem("?", "\\pi/2")) == (True, False)
    assert answer_of("#### x+1", Problem("?", "x+2")) == (False, False)


def test_cosine_parts():
    z_ann, z = rows((1, 0), (0, 1), (1, 1)), rows((2, 0), (1, 0), (1, 1))
    right = torch.tensor([True, False, True])
    half = math.sqrt(.5)
    parts = cosine_parts(z_ann, z, right)
    assert close(parts["cos_correct"], 1., 1.) and close(parts["cos_wrong"], [0.])
    assert close(parts["cos_other"], 1., half, 0., half, half, half)


def test_critic_statistics():
    mask, R = rows([0, 1, 1, 1]), rows([9, 1, 2, 3])
    logp, ref = rows([7, -1, -2, -3]), rows([9, -2, -2, -2.5])
    for V, expected in ((R, 1), (R + 5, 1), (0 * R, 0), (-R, -3)):
        found = critic_statistics(logp, ref, V, R, mask)
        assert found["value/explained"] == approx(expected)
        assert found["policy/kl"] == approx(1 + 0 - .5)
    assert set(critic_statistics(logp, ref, R, 0 * R, mask)) == {"policy/kl"}
    assert set(critic_statistics(logp, ref, R, R, rows([0, 0, 0, 1]))) == {"policy/kl"}


def test_learning_rates():
    cfg = SimpleNamespace(method="carft", steps=10, lr=1., head_lr=5., head_only_steps=2,
                          warmup_steps=0)
    assert learning_rates(1, cfg) == [0, 5.]
    assert learning_rates(2, cfg) == [0, approx(4.5)]
    assert learning_rates(3, cfg) == [approx(.8), approx(4.)]
    assert learning_rates(10, cfg) == [approx(.1), approx(.5)]
    cfg.method = "drgrpo"
    assert learning_rates(1, cfg)[0] == 1, "it has no critic to wait for"
    cfg.warmup_steps = 4
    assert learning_rates(2, cfg)[0] == approx(.9 / 2)
