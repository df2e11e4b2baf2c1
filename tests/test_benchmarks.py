"""The arithmetic behind the README's results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import claims
import figures
import reproduce


def test_interval_by_hand():
    # sd of 1, 2, 3, 4, 5 is sqrt(2.5); t(.975, 4) = 2.776
    assert claims.interval([1, 2, 3, 4, 5]) == pytest.approx(2.776 * (2.5 / 5) ** .5)
    assert claims.interval([1.0]) is None


def table(**rows):
    return {"before": {"accuracy": .5}, "rows": {
        row: {"accuracy": {"seeds": seeds}} for row, seeds in rows.items()}}


def test_a_claim_holds_if_its_whole_interval_does():
    result = table(ours=[.7, .8, .9], theirs=[.6, .6, .7])  # .1, .2, .2 +- .143
    claim = claims.Claim("Better", "+1", ("ours", "accuracy"), ("theirs", "accuracy"), True,
                         "at {theirs|accuracy}")
    assert claims.row_of(result, claim) == (
        "| Better | +1 | accuracy: `ours` .800, `theirs` .633; +.167 ± .143 | "
        "**holds**: at .633 |")
    claim.b = ("before", "accuracy")  # .2, .3, .4 +- .248
    assert "`before` .500; +.300 ± .248 | **holds**" in claims.row_of(result, claim)
    few = table(ours=[.7, .9, .9], theirs=[.6, .6])  # of the same two seeds
    claim.b = ("theirs", "accuracy")
    claim.holds, claim.why = False, ""
    assert "`ours` .800, `theirs` .600; +.200 ± 1.271 | **does" in claims.row_of(few, claim)
    untested = claims.Claim("Better", "+1", why="no time")
    assert claims.row_of(result, untested) == "| Better | +1 | - | **not tested**: no time |"


@pytest.mark.parametrize("theirs", [[.6, .6, .9], [.7, .8, .9], [.8, .9, 1.]])
def test_a_claim_whose_verdict_turned_needs_a_new_reason(theirs):
    claim = claims.Claim("Better", "+1", ("ours", "accuracy"), ("theirs", "accuracy"), True)
    result = table(ours=[.7, .8, .9], theirs=theirs)
    with pytest.raises(SystemExit, match='"Better" does not hold now'):
        claims.row_of(result, claim)
    claim.holds = False
    assert "**does not hold** |" in claims.row_of(result, claim)


def test_accuracy_at_half_lies_between_two_evaluations():
    rows = [{"step": 0, "eval/accuracy": .2}, {"step": 1, "sample/tokens": 30},
            {"step": 2, "sample/tokens": 40, "eval/accuracy": .6},
            {"step": 3, "sample/tokens": 100, "eval/accuracy": .9}]
    assert reproduce.at_half(rows) == pytest.approx(.6 + (50 - 40) / (100 - 40) * .3)
    rows = [{"step": n, "eval/accuracy": n / 10} for n in (0, 4, 10)]  # nothing is sampled
    assert reproduce.at_half(rows) == pytest.approx(.5)


def test_a_curve_is_mean_and_deviation_over_the_runs():
    runs = [[{"step": s, "x": float(s + r), "sample/tokens": 10**6 * s} for s in range(1, 5)]
            for r in (0, 2)]
    runs[1].pop()  # only steps that all runs have
    assert reproduce.curve(runs, "x") == {"step": [1, 2, 3], "tokens": [1, 2, 3],
                                          "mean": [2, 3, 4], "sd": [round(2**.5, 5)] * 3}
    assert reproduce.curve(runs, "x", points=2)["mean"] == [2.5, 4]
    assert reproduce.curve(runs, "y") is None
    runs = [[{"step": s, "eval/x": 1.0} for s in steps] for steps in ((0, 5, 10), (0, 5, 8))]
    assert reproduce.curve(runs, "eval/x")["step"] == [0, 5, 9], "they end at different steps"


def test_bins_of_several_runs_are_pooled():
    assert reproduce.pooled([[.05, 0., 30], [1., 1., 10], [.01, .4, 10], [.95, .5, 10]]) == [
        [.04, .1, 40], [.975, .75, 20]]


def test_a_figure_tells_which_numbers_it_shows(tmp_path, monkeypatch):
    text = (figures.RESULTS / "gcpo.json").read_text()
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    found = []
    for n in (0, 1):
        (tmp_path / "gcpo.json").write_text(json.dumps(json.loads(text) | {"n": n}))
        found.append(figures.draw("gcpo").read_bytes())
    assert found[0] != found[1] and found[0][:4] == b"\x89PNG"
