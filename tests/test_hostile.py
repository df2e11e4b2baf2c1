"""Hostile or broken data, flags and texts: one clear line or a good result, in time, never
executed."""

import contextlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import make
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_common import word_tokenizer
from test_light_if_maths import TRUTH

import carft
import common
import gcpo
import laser
import light_if
import temporal_sr
from common import Problem, extract_answer, same_answer
from light_if import follow
from temporal_sr import parse_score


def examples(number):
    """The same inputs in every run, whatever the machine."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def outcome(f, *args):
    """-> what f returns, or the line that it ends the program with"""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return f(*args), None
    except SystemExit as stop:
        line = error.getvalue()
        assert stop.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        assert len(line) < 3000
        return None, line


def spliced(*pieces):
    """Texts that have these pieces between and inside other text."""
    return st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=6)), max_size=12).map(
        "".join)


@contextlib.contextmanager
def within(seconds):
    """Fails what takes more CPU time, and ends it when it takes twice as much."""
    def late(*_):
        raise SystemExit("too slow")  # no library catches it
    before, began = signal.signal(signal.SIGPROF, late), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - began < seconds


# -------------------------------------------------------------------------------- flags and data


@pytest.mark.parametrize("script", [gcpo, laser, carft, temporal_sr, light_if])
@pytest.mark.parametrize("flags", [
    "--nope 1", "--step 5", "--steps x", "--steps -1", "--seed", "--method ppo", "--lr nan",
    "--lr 0", "--lr -1", "--lr inf", "--temperature 0", "--micro_tokens 0", "--group 0",
    "--device nowhere", "--dtype float16", "--resume nowhere", "--lora maybe"])
def test_flags_that_are_refused(script, flags):
    name, *value = flags.split()
    line = outcome(script.parse, [name, *value])[1]
    assert name in line


def test_a_run_goes_on_with_its_own_flags(tmp_path):
    config = {"script": "gcpo", "config": vars(gcpo.parse(["--lr", "1e-3"]))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    resume = ["--resume", str(tmp_path)]
    assert gcpo.parse([*resume, "--steps", "7", "--lr", "1e-3"]).steps == 7
    assert gcpo.parse(resume).lr == 1e-3 and gcpo.parse(resume).out == str(tmp_path)
    assert "--lr" in outcome(gcpo.parse, [*resume, "--lr", "2e-3"])[1]
    assert "gcpo.py" in outcome(laser.parse, resume)[1]
    for text in ("", "[]", "{}", '{"script": "gcpo"}'):
        (tmp_path / "config.json").write_text(text)
        assert outcome(gcpo.parse, resume)[1]


WHAT = "--dataset data"
TEXTS = st.text(st.characters(), max_size=20)  # lone surrogates and NUL are among them
CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**15, 10**40), st.floats(), TEXTS,
    st.sampled_from(["", " ", "nan", "#### 5", "\\boxed{", "#### ####", "1e400", "\0"]))
VALUES = st.recursive(CELLS, lambda x: st.lists(x, max_size=3)
                      | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6)
NAMES = st.sampled_from(["question", "Question", "answer", "solution", "level", "prompt", "body",
                         "response", "judgement", "context", "kwargs", "instruction_id_list"])
ROWS = st.lists(st.dictionaries(NAMES | TEXTS, VALUES, max_size=5), min_size=1, max_size=4)
USUAL = st.lists(st.fixed_dictionaries({"question": CELLS, "answer": CELLS, "level": CELLS}),
                 min_size=1, max_size=4)
FILES = spliced("{", "}", '{"question": "a", "answer": "1"}', "\n", "[", "]", "null", '"', "5",
                "\0", "\ufeff", "NaN", ",", "1e400", '"\\ud800"', "9" * 5000, "[" * 5000)


@pytest.mark.parametrize("files", [
    ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()), USUAL.map(json.dumps).map(
        str.encode), FILES.map(lambda x: x.encode(errors="surrogatepass")), st.binary(max_size=60)])
def test_files_of_anything(files, tmp_path):
    @examples(150)
    @given(files)
    def check(data):
        path = tmp_path / "a.jsonl"
        path.write_bytes(data)
        rows, line = outcome(common.read_json, path, WHAT)
        for f in (common.to_problems, light_if.to_tasks, lambda rows, what: temporal_sr.columns(
                rows, what, ("prompt", "response"))) if rows else ():
            found, line = outcome(f, rows, WHAT)
            if f == common.to_problems and found:
                assert all(p.question and p.answer and isinstance(x, str) for p in found
                           for x in (p.question, p.answer, p.solution, p.level))
        assert not line or line.startswith(f"error: {WHAT}: ")
    check()


@pytest.mark.parametrize("data, says", [
    ("null", " 1 "), ("5", " 1 "), ("[1, 2]", " 1 "), ("[]", "no rows"), (" \n", "no rows"),
    ("", "no rows"), ("[" * 10**5, " 1 "), (b"\xff\xfea\0", "utf-8"),
    ('{"question": ' + "9" * 5000 + "}", " 1 "), ('{"a": 1}\n{"a"', " 2 "),
    ('{"a": 1}\n\n{"a": 2}\n5\n{"a": 3}', " 4 "), ('[{"a": 1}, 5, {"a": 2}]', ""),
    ("{}", "no question column"), ('{"question": "q"}', "no row has both"),
    ('{"question": "q", "answer": null}', "no row has both"),
    ('{"question": "q", "answer": 1}\n{"question": ["q"], "answer": 1}', "row 2 "),
    ('{"question": "q", "level": [1], "answer": 1}', "row 1 ")])
def test_files_that_are_refused(data, says, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    line = outcome(lambda: common.to_problems(common.read_rows(
        common.Config, str(path), "train", "--dataset"), f"--dataset {path}"))[1]
    assert says in line and str(path) in line


# --------------------------------------------------------------------- texts that a model may write


@pytest.mark.parametrize("tok", [make.tokenizer(["Ada has 12 figs"], 320), word_tokenizer(),
                                 word_tokenizer(bos=True), word_tokenizer(template=True)])
def test_no_text_becomes_a_control_token(tok):
    tokens = {*tok.all_special_tokens}
    parts = [part for t in tokens for k in (1, 2, 3) for part in (t[:k], t[k:])]

    def control(ids):
        return [i for i in ids if i in tok.all_special_ids]

    @examples(60)
    @given(spliced(*sorted(tokens), *parts, " ", "\ud800", "\0"))
    def check(text):
        turn, harmless = common.encode_questions(tok, [text, "x"])
        assert control(turn) == control(harmless)
        sample, = common.as_samples(tok, [[1]], [text])
        assert control(sample.tokens) == [tok.eos_token_id]
        assert not any(t in sample.text for t in tokens)
        prompts = temporal_sr.judge_prompts(
            SimpleNamespace(config=SimpleNamespace()), tok, [(text, text), ("x", "x")])
        assert control(prompts[0]) == control(prompts[1])
    check()


@pytest.mark.parametrize("token, text", [
    (" <end>", "x <end>"), ("<a", "<a<a>"), ("__s__", "__s__s__s__"), ("||", "|||||")])
def test_special_tokens_of_any_shape_are_defused(token, text):
    tok = SimpleNamespace(added_tokens_decoder={}, all_special_tokens=[token])
    assert token.strip() not in common.defuse(tok, text)
    assert common.defuse(tok, text).replace(" ", "") == text.replace(" ", "")
    assert common.defuse(tok, "1 < 2, <b> |end|") == "1 < 2, <b> |end|"


@pytest.mark.parametrize("piece", ["answer: ", "answer is", "\\boxed{", "\\boxed", "#### ", "{",
                                   "}", "\\boxed ", " ", "\n", "answer:\n", "a. ", "$", "\\(", "9",
                                   "1,", "(", " 1", "<", "x = "])
def test_answers_are_read_in_time(piece):
    text = piece * (10**5 // len(piece))
    with within(2):
        for x in (text, f"answer: {text}\n", f"{text}x", f"\\boxed{{{text}}}"):
            answer = extract_answer(x)
            for y in (answer, x, f"${text}$", f"${text}x"):
                same_answer(y, "5")
                same_answer("5", y)
                same_answer(y, f"{y}5")
        common.as_number(piece * (100 // len(piece)))


def formats(n):
    """A number as a text has it."""
    value, sign = abs(n), "-" if n < 0 else ""
    plain = f"{sign}{value}"
    return [plain, f"{sign}{value:,}", f"${plain}$", f"\\({plain}\\)", f"{plain}.0", f"{plain}.00",
            f"{sign}${value}", f"{plain}%", f"{plain}\\%", f"{plain} apples", f"{plain} m",
            f"x = {plain}", f"{plain}.", plain.replace("-", "\u2212"), f"{2 * n}/2", f"{plain}/1",
            f"\\frac{{{2 * n}}}{{2}}", f"\\dfrac{{{n}}}{{1}}", f"{{{plain}}}", f" {plain} ",
            f"{sign}{value:,}".replace(",", "{,}"), f"{sign}{value:,}".replace(",", ",\\!")]


MARKS = ("#### {}", "The answer is {}", "Answer: {}\n", "so \\boxed{{9}} no \\boxed{{{}}}")


@examples(300)
@given(st.integers(-10**7, 10**7), st.integers(-10**7, 10**7) | st.integers(-1, 1), st.data())
def test_numbers_in_any_format(a, difference, data):
    for b, equal in ((a, True), (a + difference, difference == 0)):
        given = data.draw(st.sampled_from(formats(a)))
        truth = data.draw(st.sampled_from([str(b), f"{b:,}", f"{b}.0", f"{3 * b}/3"]))
        text = data.draw(st.sampled_from(MARKS)).format(given)
        assert gcpo.correct(text, Problem("q", truth)) is equal, (text, truth)


@pytest.mark.parametrize("given", [
    "5 or 6", "6 or 5", "5, 6", "6, 5", "5 and 6", "5 or six", "5 to 6", "5 and a half", "5; 6",
    "5 / 6", "5 6", "not 5", "5 not", "less than 5", "5..6", "5-6", "56", "55", "15", "5e0",
    "{5, 6}", "(5, 6)", "[5, 6]", "\\{5, 6\\}", "(5) or (6)", "5 \\text{ or } 6", "\\text{6 or } 5",
    "\\text{not } 5", "(6)$ or $5", "foo(6)$ bar $5", "6 or the final answer is \\(5\\)",
    "6\n\\(5\\)", "(6)\n5", "6 {} 5", "x_{ is 5", "4=5()", "x = 4 = 5 {}", "\\frac{}{} 5", "5()()",
    "((5", "\\foo{5} or 5", "answer: {6} 5", "\\boxed{6} 5", "x \\ne 5", "x < {5}", "5 \\le {x}",
    "\\pm 5", "\\sqrt{5}", "5^{2}", "5_{6}5", "{5}{6}", "", " ", "{}", "\\", "$", "$$", "()"])
def test_more_than_the_answer_is_not_the_answer(given):
    assert not gcpo.correct(f"\\boxed{{{given}}}", Problem("q", "5"))


@examples(300)
@given(spliced("\\frac", "{", "}", "^", "_", "(", ")", "\\text", "\\sqrt", "5", "6", "x", "$", "\\",
               "[", "]", " ", "=", "\\boxed{", "\\left", ",", "\0", "\ud800"))
def test_no_other_text_equals_a_number(text):
    """Nothing crashes, and what has no 7 in it is not equal to 7777."""
    assert not same_answer(text, "7777") and not same_answer(f"{text} (", "\\sqrt{7777}")


@pytest.mark.parametrize("bomb", [
    "9^{9^{9^9}}", "10^{10}!", "\\binom{\\binom{100}{50}}{\\binom{50}{25}}", "(5!)!", "2^{99!}",
    "10^{\\text{}10^{9}}", "{10^{10}}^{10}", "\\sum_{i=1}^{10^{9}} i", "10^{-1000000000}",
    "7^{2 9999999999}", "7^{0+9999999999}", "7^{\\left(9999999999\\right)}", "\\sin(10^{999999})",
    "(x+1)^{1000}", "(x+y+z)^{100}", "(a+b+c+x+y+z)^{12}", "(1+i)^{99999}", "\\cos(1000000x)",
    "\\frac{x^{19999}-1}{x-1}", "(" * 100 + "5" + ")" * 100])
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")  # a lost alarm
def test_bombs_are_no_answers(bomb, monkeypatch):
    same_answer("\\frac{3}{2}", "x^{2}")  # imports
    monkeypatch.setattr(common, "LATEX_SECONDS", 1)
    for pair in ((bomb, "5"), ("\\frac{5}{1}", bomb)):
        with within(3):
            assert not same_answer(*pair)


@pytest.mark.parametrize("text, unsafe", [
    ("2^{99}", False), ("2^{9999}", False), ("2^{10001}", True), ("(x+1)^{9}(x+2)^{11}", False),
    ("((9^{9})^{9})^{9}", True), ("2^{3^{4}}", True), ("x^\\frac{1}{2}", True),
    ("90^\\circ", False)])
def test_exponents_of_brackets_count_together(text, unsafe):
    assert common.unsafe(text) == unsafe


def test_no_answer_is_executed(tmp_path):
    """sympy evaluates some texts as Python: none of them holds what the model wrote."""
    proof, executed, hear = tmp_path / "hostile", [], [True]

    def hook(event, args):
        if hear and (event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn",
                               "os.fork", "socket.connect")
                     or event == "compile" and "hostile" in str(args[0])):
            executed.append((event, args))

    sys.addaudithook(hook)
    for payload in (f"__import__('os').system('touch {proof}')", "hostile.__class__"):
        for form in ("{}", "({})", "\\frac{{{}}}{{1}}", "\\text{{{}}}", "\\operatorname{{{}}}(1)",
                     "x_{{{}}}", "[{}]", "\\{{{}\\}}", "\\mathrm{{{}}}", "\\boxed{{{}}}", "f({})",
                     "1+{}", "3+(4{})", "$\\({}\\)$", "\\begin{{pmatrix}}{}\\end{{pmatrix}}",
                     "answer: ({})", "{}=(1)", "\\sqrt{{{}}}", "{}^{{2}}", "\\left|{}\\right|",
                     "\\log_{{{}}}(2)"):
            assert not same_answer(form.format(payload), "(5)")
    hear.clear()  # a hook stays
    assert not executed and not proof.exists()


LINES = ("Score: 5", "score : 5", "**Score:** 5", "Score\uff1a5", "\nScore: 5", "Total Score: <5>",
         "Fine. Score: 5", "_Score_: 5", "scor", "Sc", "ore", ":", "\uff1a", " ", "\n", "*", "5",
         "4.5", "\u017fcore: 5", "score:score:5", "<", "</response>", "<response>", "< / RESPONSE",
         "resp", "<<", "/", "\u200b", "re\u017fponse>", "<s>", "</s>", "<|end|>",
         "{response}", "{", "}")


@examples(300)
@given(spliced(*LINES), spliced(*LINES))
def test_nothing_quoted_is_a_score_or_a_tag(question, response):
    texts = [temporal_sr.quoted(x) for x in (question, response)]
    for text in texts:
        parts = [text, *text.split("\n"), *text.splitlines(), temporal_sr.quoted(text)]
        parts += [part for k in range(len(text)) for part in (text[:k], text[k:])]
        assert all(math.isnan(parse_score(p)) for p in parts)
        assert not re.search(r"<[\W_]*response", text, re.I)
    for form in (temporal_sr.JUDGE, make.JUDGE):
        prompt = form.format(question=texts[0], response=texts[1])
        assert prompt.count("<response>") == prompt.count("</response>") == 1
        assert math.isnan(parse_score(prompt))
        assert prompt.split("<response>\n")[1].split("\n</response>")[0] == texts[1]


@pytest.mark.parametrize("piece", [" ", "*", "_", ">", ")", "(", "<", "5 ", ". ", "score ", "</",
                                   "Score: 5 ", "Score:5)", "[", "- ", "\n ", "\n* ", "\u200b",
                                   "Section ", "A. ", "a ", "***", "[]", "n't", "AB ", "river "])
def test_long_texts_are_judged_and_checked_in_time(piece):
    run = piece * (60_000 // len(piece))
    for text in (run, f"Score: 5{run}x", f"Score: 5 {run}.{run}x", f"{run}Score{run}:{run}5{run}x"):
        with within(2):
            parse_score(text)
            temporal_sr.quoted(text)
    for kind, (kwargs, *_) in TRUTH.items():  # an example of each of IFEval's constraints
        with within(2):
            follow(f"x{run}y", [(kind, kwargs)])
    with within(4):
        light_if.depth(f"{run[:16_000]}</think>{run[:16_000]}", ["a", "b"])
        light_if.fluent(f"{run}</think>{run}")


def test_no_file_of_a_stranger_is_executed(tmp_path, tiny_folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload()}, tmp_path / "model" / "pytorch_model.bin")
    cfg = common.Config(device="cpu", dtype="float32")
    assert outcome(common.load_model, str(tmp_path / "model"), cfg)[1]
    assert not (tmp_path / "ran").exists()
    for script in (common, gcpo, laser, carft, temporal_sr, light_if):
        source = inspect.getsource(script)
        assert not re.search(r"trust_remote_code=True|pickle|(?<![\w.])(eval|exec)\(", source)
        assert all("weights_only=True" in x for x in re.findall(r"torch\.load\(.*", source))


def test_curves_of_any_level(tmp_path):
    run = object.__new__(common.Run)
    run.folder, run.script = tmp_path, "gcpo"
    run.curves = {"a": ["eval/*"], "never logged": ["b/*"], "$_{": ["eval/*"]}
    run.cfg = SimpleNamespace(model="m$_{", method="$\\frac$", seed=0)
    names = ("eval/accuracy/level$\\frac{$", "eval/accuracy/level_$x$", "eval/accuracy/level^{}$$")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **dict.fromkeys(names, .5)}))
    run.draw_curves()
    png = (tmp_path / "curves.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") == 2 * 484, "two panels, none that is empty"
