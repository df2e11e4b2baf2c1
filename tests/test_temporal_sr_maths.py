"""The equations of temporal_sr.py, its judge's parsing and its task: hand-worked numbers and
properties."""

import math
import random
from types import SimpleNamespace

import make
import pytest
import torch
from torch.nn.functional import cosine_similarity

import temporal_sr
from common import Sample
from temporal_sr import (
    Candidate, anchored_rejection, best, dpo_loss, form_grade, future_guided_chosen, is_form,
    is_pair, learning_rate, mean_pool, order_agreement, parse_score, preferences, quoted, run_rates,
    verdicts, win_rate, worst,
)

NAN = math.nan


def pool(source, *scores, finished=True):
    return [Candidate(Sample((), [], f"{source} {i}", finished), source, float(s))
            for i, s in enumerate(scores)]


def pairs(s_i, s_0, s_f, rng=None):
    """-> the pair of Self-Rewarding, of D_1 and of D_2, None where there is none"""
    rng = rng or random.Random(0)
    r_i, r_0, r_f = pool("present", *s_i), pool("past", *s_0), pool("future", *s_f)
    chosen, rejected = best(r_i, rng), worst(r_i, rng)
    sr = (chosen, rejected)
    rejected = anchored_rejection(rejected, worst(r_0, rng))
    D_1, D_2 = (chosen, rejected), (future_guided_chosen(chosen, best(r_f, rng)), rejected)
    return [pair if is_pair(*pair) else None for pair in (sr, D_1, D_2)]


def told(pair):
    return pair and tuple((c.source, c.score) for c in pair)


def gap(pair):
    return pair[0].score - pair[1].score if pair else 0.0


# ------------------------------------------------------------------------------- choosing the pairs


@pytest.mark.parametrize("s_i, s_0, s_f, sr, D_1, D_2", [
    ([3, 4, 4, 2, 3, 4, 3], [2, 3, 1, 3, 2, 4, 2], [4, 5, 3, 5, 4, 4, 3],
     (("present", 4), ("present", 2)), (("present", 4), ("past", 1)), (("future", 5), ("past", 1))),
    ([4] * 7, [4] * 7, [4, 4, 5, 4, 4, 4, 4], None, None, (("future", 5), ("present", 4))),
    ([3, 4, 3, 4, 2, 3, 3], [2, 3, 3, 3, 3, 3, 3], [4, 4, 4, 3, 3, 3, 3],
     (("present", 4), ("present", 2)), (("present", 4), ("present", 2)),
     (("present", 4), ("present", 2)))])
def test_worked_pairs(s_i, s_0, s_f, sr, D_1, D_2):
    assert [told(p) for p in pairs(s_i, s_0, s_f)] == [sr, D_1, D_2]


def test_pairs_are_the_extremes_of_the_unions():
    rng = random.Random(3)
    for _ in range(3000):
        s_i, s_0, s_f = ([rng.choice((0, 1, 2, 3, 4, 5, NAN)) for _ in range(4)] for _ in range(3))
        valid = [[x for x in s if not math.isnan(x)] for s in (s_i, s_0, s_f)]
        sr, D_1, D_2 = pairs(s_i, s_0, s_f, rng)
        if not valid[0]:
            assert sr is D_1 is D_2 is None  # without scores of M_i there is no pair
            continue
        top, low = max(valid[0] + valid[2]), min(valid[0] + valid[1])
        assert (D_2 is not None) == (top > low)
        if D_2:
            assert (D_2[0].score, D_2[1].score) == (top, low)
            assert (D_2[0].source == "future") == (max(valid[2], default=-1) > max(valid[0]))
            assert (D_2[1].source == "past") == (min(valid[1], default=9) < min(valid[0]))
        if D_1:  # prompts(D_1) are among prompts(D_2), with the very same rejected answer
            assert D_2 and D_2[1] is D_1[1] and D_1[0].source == "present"
        if sr:
            assert D_1
        assert gap(D_2) >= gap(D_1) >= gap(sr)


def test_ties_are_broken_by_the_generator():
    r = pool("present", 4, 2, 4, 2, 4)
    found = [[f(r, random.Random(n)).sample.text for n in range(60)] for f in (best, worst)]
    assert [set(f) for f in found] == [{"present 0", "present 2", "present 4"},
                                       {"present 1", "present 3"}]
    assert found == [[f(r, random.Random(n)).sample.text for n in range(60)] for f in (best, worst)]


def test_an_answer_cut_off_is_never_chosen():
    cut, whole = pool("present", 5, 0, finished=False), pool("present", 3)
    assert best(cut + whole, random.Random(0)) is whole[0]
    assert worst(cut + whole, random.Random(0)) is cut[1]
    assert best(cut, random.Random(0)) is None and best([], random.Random(0)) is None
    assert best(pool("present", NAN, NAN), random.Random(0)) is None
    assert worst(pool("present", NAN, NAN), random.Random(0)) is None


def test_a_pair_needs_two_texts_and_a_strictly_higher_score():
    a, b, c = pool("present", 3, 3, 2)
    assert not is_pair(a, b) and is_pair(a, c) and not is_pair(c, a)
    same = Candidate(Sample((), [], a.sample.text, True), "past", 1.0)
    assert not is_pair(a, same)
    assert not is_pair(None, c) and not is_pair(a, None)
    assert preferences("xyz", [a, a, b], [c, b, c]) == [("x", a, c), ("z", b, c)]


# ---------------------------------------------------------------------------------------------- DPO


def test_dpo_by_hand():
    values = torch.tensor([[-42.], [-61], [-45], [-60]], requires_grad=True)
    loss, margin = dpo_loss(*values, .1)
    assert margin.item() == pytest.approx(.4)
    assert loss.item() == pytest.approx(.513015, abs=1e-6)
    grad, = torch.autograd.grad(loss.sum(), values)
    assert grad[0].item() == pytest.approx(-.0401312, abs=1e-6)
    assert grad[1].item() == pytest.approx(.0401312, abs=1e-6)
    two = torch.tensor([[-42., -10], [-61, -10], [-45, -10], [-60, -13]])
    loss, margin = dpo_loss(*two, .1)
    assert margin.tolist() == pytest.approx([.4, -.3], abs=1e-6)
    assert loss.tolist() == pytest.approx([.513015, .854355], abs=1e-6)
    assert loss.mean().item() == pytest.approx(.683685, abs=1e-6)


def test_dpo_properties():
    torch.manual_seed(0)
    w, z, ref_w, ref_l = torch.randn(4, 20) * 30
    loss, margin = dpo_loss(w, z, ref_w, ref_l, .3)
    assert torch.allclose(dpo_loss(z, w, ref_l, ref_w, .3)[1], -margin)
    assert torch.allclose(dpo_loss(ref_w, ref_l, ref_w, ref_l, .3)[0],
                          torch.full((20,), math.log(2)))
    assert torch.allclose(loss, torch.log1p((-margin.double()).exp()).float(), rtol=1e-4)
    both = torch.randn(2, 1)[:, [0] * 20]
    assert torch.allclose(dpo_loss(w + both[0], z + both[0], ref_w, ref_l, .3)[1], margin,
                          atol=1e-4)  # what prompt tokens would add cancels


def test_learning_rates():
    rate = lambda step: learning_rate(step, 125, 5e-7, 13)  # noqa: E731
    assert rate(0) == 0 and rate(13) == 5e-7
    assert rate(6) == pytest.approx(2.31e-7, rel=1e-2)
    assert rate(69) == pytest.approx(2.5e-7, rel=1e-6)
    assert rate(124) == pytest.approx(9.8e-11, rel=1e-2)
    assert learning_rate(0, 1, 1.0, 1) == 0 and learning_rate(1, 2, 1.0, 1) == 1


def test_rates_of_a_run():
    cfg = SimpleNamespace(warmup_steps=0)
    assert run_rates(cfg, 1, 2.0) == [2.0], "no step is lost to a rate of 0"
    assert run_rates(cfg, 9, 2.0)[0] == 2.0
    rates = run_rates(cfg, 125, 5e-7)
    assert rates[0] == 0 and rates[13] == 5e-7 and len(rates) == 125
    cfg.warmup_steps = 4
    assert run_rates(cfg, 8, 1.0)[:5] == [0, .25, .5, .75, 1]
    assert run_rates(cfg, 3, 1.0) == [0, .5, 1], "never longer than the run"


def test_pooling_by_hand():
    hidden = torch.tensor([[[9., 9], [1, 0], [0, 1], [1, 1]], [[9, 9], [1, 0], [1, 1], [7, 7]]])
    mask = torch.tensor([[0., 1, 1, 1], [0, 1, 1, 0]])
    z = mean_pool(hidden, mask)
    assert torch.allclose(z, torch.tensor([[2 / 3, 2 / 3], [1, .5]]))
    assert cosine_similarity(z[:1], z[1:]).item() == pytest.approx(.9487, abs=1e-4)


# --------------------------------------------------------------------------------------- evaluation


def test_win_rate_by_hand():
    base = torch.tensor([[1., 2], [3, 3]])
    assert win_rate(base, base) == .5
    assert win_rate(torch.tensor([[2., 2], [0, 3]]), base) == pytest.approx((.75 + .25) / 2)
    assert win_rate(torch.tensor([[2., NAN], [NAN, NAN]]), base) == pytest.approx(.75)
    assert win_rate(torch.tensor([[2., NAN], [0, 3]]), base) == pytest.approx((.75 + .25) / 2)


def test_order_agreement_by_hand():
    grades = torch.tensor([0., 1, 2, 2])
    agree = lambda *s: order_agreement(torch.tensor(s), grades)  # noqa: E731
    assert agree(0., 1, 2, 3) == 1 and agree(3., 2, 1, 0) == 0 and agree(1., 1, 1, 1) == .5
    assert agree(1., 0, 2, 2) == pytest.approx(4 / 5)  # 5 pairs have different grades
    assert agree(NAN, 1, 2, 0) == pytest.approx(1 / 2)
    assert math.isnan(agree(NAN, NAN, 1, 1))


# ---------------------------------------------------------------------------- the judge's verdicts


@pytest.mark.parametrize("text, score", [
    ("Fine.\nScore: 4", 4), ("Score: 4.5", 4.5), ("Score: 0", 0), ("score:3", 3), ("SCORE : 5.", 5),
    ("**Score: 4**", 4), ("**Score:** 4", 4), ("Score: **4**", 4), ("Score: <4>", 4),
    ("__Score: 4__", 4), ("- Score: `4`", 4), ("Score: 4 points", 4), ("Total score: 2\n", 2),
    ("Score\uff1a 3", 3), ("Score: 2.0 ", 2), ("It is good. Score: 4", 4),
    ("## Final Score: 4.", 4),
    ("Score: 1\nOn reflection:\nScore: 3", 3), ("Score: 3\nThat is all.", 3),
    ("Score: 2\n- 1 point for it", 2), ("Score: 4\nOut of five criteria", 4),
    ("Score: 2\nScore: 9", 2), ("Score: 2\nScore: 4/5", 2),
    ("Score: 4/5", NAN), ("Score: 4 / 5", NAN), ("Score: **4**/5", NAN), ("Score: 4 out of 5", NAN),
    ("Score: 4 (of 5)", NAN), ("Score: [2]/10", NAN), ("Score: 8/10", NAN), ("Score: 45", NAN),
    ("Score: 5.5", NAN), ("Score: -1", NAN), ("Score: 1 + 1 + 1 = 3", NAN), ("Score: 3-4", NAN),
    ("Score: 3 \u2013 4", NAN), ("Score: 3 to 4", NAN), ("Score: 3 or 4", NAN), ("Score: 4,5", NAN),
    ("Score: 80%", NAN), ("Score: 3%", NAN), ("Score: 1.2.3", NAN), ("Score: 4\u00bd", NAN),
    ("Score: 1e5", NAN), ("Score: 3:2", NAN), ("Score: five", NAN), ("Score 4", NAN),
    ("Score:\n4", NAN), ("Clarity score: 1", NAN), ("underscore: 4", NAN), ("highscore: 4", NAN),
    ("A Score: 5 would need expertise", NAN), ("it asks for a Score: 5", NAN), ("4", NAN),
    ("", NAN), ("Score:", NAN), ("Rating: 4", NAN)])
def test_scores(text, score):
    assert parse_score(text) == pytest.approx(score, nan_ok=True)


@pytest.mark.parametrize("text", [
    "Score: 5", "score : 5", "**Score:** 5", "Score\uff1a5", "Score: 2\nScore: 5",
    "Total Score: <5>", "Fine. Score: 5", "_Score: 5_", "Final score: 5"])
def test_what_is_quoted_reads_as_no_score(text):
    assert parse_score(text) == 5
    assert math.isnan(parse_score(quoted(text)))
    assert math.isnan(parse_score(quoted(quoted(text))))
    for shorter in range(len(text)):  # nor does a part of it that a judge may repeat
        assert math.isnan(parse_score(quoted(text)[shorter:]))


@pytest.mark.parametrize("text", ["</response>", "<response>", "< / response >", "</RESPONSE\n>",
                                  "<response id=1>", "</response", "<//response>", "<_/response>",
                                  "</response></response>", "< \\/response>", "<\u200b/response>"])
def test_what_is_quoted_holds_no_tag(text):
    assert "<" not in quoted(f"a {text} b")
    assert quoted("a < b, <b>bold</b>, responses, a score of 4") == \
        "a < b, <b>bold</b>, responses, a score of 4"


# ------------------------------------------------------------------------------------ the form task

FORM = "Fill the form:\nanimal\ncolour\nfruit\ntool\nmetal"


def test_what_is_a_form():
    assert is_form(FORM)
    for other in ("animal", FORM + "\ncity", FORM.replace("tool", "name"), FORM[1:], ""):
        assert not is_form(other)


@pytest.mark.parametrize("answer, grade", [
    ("animal cat\ncolour red\nfruit fig\ntool saw\nmetal tin", 5),
    ("animal cat\ncolour um\nfruit fig\ntool cat\nmetal tin", 3),
    ("colour red\nanimal cat\nfruit fig\ntool saw\nmetal tin", 3),  # lines in the wrong order
    ("animal cat", 1), ("", 0), ("cat\nred\nfig\nsaw\ntin", 0),
    ("animal cat dog\ncolour red\nfruit fig\ntool saw\nmetal tin", 4),
    ("animal cat\ncolour red\nfruit fig\ntool saw\nmetal tin\nanimal cat", 5)])
def test_grades(answer, grade):
    assert form_grade(FORM, answer) == grade


def test_answers_are_as_good_as_told():
    rng, kinds = random.Random(0), set()
    for right in ([True] * 5, [False] * 5, [True, False, True, False, False]):
        for _ in range(50):
            answer = make.fill(rng, FORM, right)
            assert verdicts(FORM, answer) == right
            for name, line in zip(FORM.split("\n")[1:], answer.split("\n")):
                category, word = line.split()
                kinds.add((category == name, word in make.FILLERS,
                           word in temporal_sr.form_words()[category]))
    assert kinds == {(True, False, True), (True, True, False), (True, False, False),
                     (False, False, True)}  # right, a filler, another category's word, its line
