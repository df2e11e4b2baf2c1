"""The arithmetic behind the README's results, and that the rows of its tables can be run."""

import importlib
import json
import types

import claims
import figures
import pytest
import reproduce
import torch


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


def test_accuracy_at_a_number_of_tokens_lies_between_two_evaluations():
    rows = [{"step": 0, "eval/accuracy": .2}, {"step": 1, "sample/tokens": 30},
            {"step": 2, "sample/tokens": 40, "eval/accuracy": .6},
            {"step": 3, "sample/tokens": 100, "eval/accuracy": .9}]
    assert reproduce.at_half(rows) == pytest.approx(.6 + (50 - 40) / (100 - 40) * .3)
    for tokens, expected in ((10, .3), (40, .6), (100, .9), (300, .9)):
        assert reproduce.at(rows, tokens, "accuracy") == pytest.approx(expected)
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


@pytest.mark.parametrize("script", reproduce.ROWS)
def test_every_row_is_made_of_flags_that_the_script_has(script):
    module = importlib.import_module(script)
    for row, flags in reproduce.ROWS[script].items():
        assert module.parse([*flags, "--seed", "3"]).seed == 3, row


@pytest.mark.parametrize("name", reproduce.VARIATIONS)
def test_a_variation_changes_what_the_script_has(name, monkeypatch):
    monkeypatch.setattr(reproduce, "world", lambda _: None)
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.AdamW)  # both are put back after it
    script, = (s for s, rows in reproduce.ROWS.items() if reproduce.ALL_ROWS.get(s) == name
               or any(reproduce.variation_of(row) == name for row in rows))
    module = importlib.import_module(script)
    monkeypatch.setattr(module.Config, "tiny_files", module.Config.tiny_files)
    before = vars(module) | {"common": types.SimpleNamespace(**vars(module.common))}
    after = types.SimpleNamespace(**before)
    files, adamw, folder = module.Config.tiny_files, torch.optim.AdamW, module.common.TINY_FOLDER
    reproduce.VARIATIONS[name](after)
    changed = {k for k in vars(after) if vars(after)[k] is not before.get(k)}
    assert changed <= before.keys()
    assert changed or (files, adamw, folder) != (
        module.Config.tiny_files, torch.optim.AdamW, after.common.TINY_FOLDER)


def test_a_row_of_light_if_goes_on_from_products_of_the_first(tmp_path, monkeypatch):
    assert reproduce.SHARED.keys() <= reproduce.ROWS["light_if"].keys()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    first = reproduce.folder_of("light_if", "light_if", 0)
    for name in reproduce.ZERO[1:]:
        (first / name).mkdir(parents=True)
        (first / name / "model.safetensors").write_text(name)
    (first / "prompts.jsonl").write_text("{}")
    (tmp_path / "light_if.py").write_text(
        "import sys, os; print(*sys.argv); open(sys.argv[-1] + '/summary.json', 'w').write('{}')")
    folder = reproduce.run("light_if", "sft none", ["--sft", "none"], 0)
    assert {p.name for p in folder.iterdir()} == {*reproduce.ZERO, "summary.json"}
    assert (folder / "zero_hard/model.safetensors").read_text() == "zero_hard"
