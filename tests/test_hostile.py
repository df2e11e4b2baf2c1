"""Hostile or broken data and texts: one clear line or a good result, in time, never executed."""

import contextlib
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import make
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_common import word_tokenizer

import carft
import common
import gcpo
import laser
import light_if
import temporal_sr
from common import Problem, extract_answer, same_answer
from light_if import KINDS, follow
from temporal_sr import parse_score

SECONDS = 2.0  # for texts of 60 kB, which take a linear algorithm some hundredths of it


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


# ----------------------------------------------------------------------------------------- data

WHAT = "--dataset data"
TEXTS = st.text(st.characters(), max_size=20)  # lone surrogates and NUL are among them
CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**15, 10**40), st.floats(), TEXTS,
    st.sampled_from(["", " ", "nan", "#### 5", "\\boxed{", "#### ####", "1e400", "\0"]))
VALUES = st.recursive(CELLS, lambda x: st.lists(x, max_size=3)
                      | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6)
NAMES = st.sampled_from(["question", "Question", "answer", "solution", "level", "prompt", "body",
                         "response", "judgement", "instruction", "context", "kwargs",
                         "instruction_id_list"])
ROWS = st.lists(st.dictionaries(NAMES | TEXTS, VALUES, max_size=5), min_size=1, max_size=4)
USUAL = st.lists(st.fixed_dictionaries({"question": CELLS, "answer": CELLS, "level": CELLS}),
                 min_size=1, max_size=4)


def check_problems(rows):
    problems, line = outcome(common.to_problems, rows, WHAT)
    if line:
        assert WHAT in line
    for p in problems or []:
        assert p.question and p.answer and p.answer not in ("inf", "-inf")
        assert all(isinstance(x, str) for x in (p.question, p.answer, p.solution, p.level))
        assert len(p.level) <= 40 and p.level.isprintable()


@pytest.mark.parametrize("rows", [ROWS, USUAL])
def test_rows_of_anything(rows, tmp_path):
    @examples(150)
    @given(rows)
    def check(rows):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        read, line = outcome(common.read_rows, str(path), "train", "--dataset")
        if line:
            assert str(path) in line
            return
        check_problems(read)
        for f in (lambda: temporal_sr.columns(read, WHAT, ("prompt", "response")),
                  lambda: light_if.to_tasks(read, WHAT)):
            assert WHAT in (outcome(f)[1] or WHAT)
    check()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_files_of_anything(name, tmp_path):
    @examples(150)
    @given(spliced("{", "}", '{"question": "a", "answer": "1"}', "\n", "[", "]", "null", '"', "5",
                   "\0", "\ufeff", "NaN", ",", "1e400", '"\\ud800"', "9" * 5000, "[" * 5000)
           .map(lambda x: x.encode(errors="surrogatepass")) | st.binary(max_size=60))
    def check(data):
        path = tmp_path / name
        path.write_bytes(data)
        rows, line = outcome(common.read_rows, str(path), "train", "--dataset")
        if line:
            assert str(path) in line
        else:
            check_problems(rows)
    check()


@pytest.mark.parametrize("data, says", [
    ("null", "row 1 is not an object"), ("5", "row 1 is not an object"),
    ("[1, 2]", "row 1 is not an object"), ("[]", "no rows"), ("{}\n{}", "no rows"),
    ("[" * 10**5, "not valid JSON"), ('{"a": "\\ud800"}', "not valid JSON"), (" \n", "no rows"),
    ('{"question": ' + "9" * 5000 + "}", "line 1 is not valid JSON"), ("", "empty"),
    ('{"a": 1}\n{"a"', "line 2 is not valid JSON"), ('[{"a": 1},\n{"a"]', "line 2 is not valid"),
    (b"\xff\xfea\0", "not UTF-8"), ('{"a": "b\0"}', "line 1 is not valid JSON"),
    (json.dumps({f"c{i}": 1 for i in range(3000)}), "no question column"),
    ('{"question": "q", "answer": 1e20}', "row 1 has something else"),
    ('{"question": "q", "answer": NaN}', "no row has both"),
    ('{"question": "q", "answer": 1e400}', "no row has both"),
    ('{"question": ["q"], "answer": 1}', "row 1 has something else"),
    ('{"question": "q", "body": [1], "answer": 1}', "no row has both"),
    ('{"question": null, "body": "a", "answer": 1}', "no row has both"),
    ('{"question": "q", "body": null, "answer": 1}', "no row has both")])
def test_refused_files(data, says, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    _, line = outcome(lambda: common.to_problems(
        common.read_rows(str(path), "train", "--dataset"), f"--dataset {path}"))
    assert says in line and str(path) in line


def test_numbers_and_columns_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "a", "answer": 10**30}, {"question": "b", "answer": 1e-05},
            {"Question": "c", "answer": 2.50}, {"question": "d\0", "answer": "2020-01-01"}, {},
            {"question": "e\u2028", "answer": 18.0}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    read = common.read_rows(str(path), "train", "--dataset")
    found, _ = outcome(common.to_problems, [
        {"question": r["question"] or r["Question"], "answer": r["answer"]} for r in read], WHAT)
    assert [(p.question, p.answer) for p in found] == [
        ("a", "1" + "0" * 30), ("b", "0.00001"), ("c", "2.5"), ("d\0", "2020-01-01"),
        ("e", "18.0")]


def test_parquet_files(tmp_path):
    path, column = tmp_path / "a.parquet", pyarrow.array
    for columns, want in [
            ({"question": ["a", "b"], "answer": [1.0, math.nan]}, [("a", "1.0")]),
            ({"question": ["a", None], "answer": ["1", "2"]}, [("a", "1")]),
            ({"question": column([b"\xff"]), "answer": ["1"]}, "row 1 has something else"),
            ({"question": ["a"], "answer": column([0], pyarrow.timestamp("s"))}, "row 1 has"),
            ({"question": column([], pyarrow.string())}, str(path))]:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        problems, line = outcome(lambda: common.to_problems(
            common.read_rows(str(path), "train", "--dataset"), WHAT))
        assert want in line if line else [(p.question, p.answer) for p in problems] == want
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"] * 99, "answer": ["1"] * 99}), path)
    whole = path.read_bytes()

    @examples(12)
    @given(st.integers(0, len(whole)), st.binary(max_size=8))
    def check(cut, tail):
        path.write_bytes(whole[:cut] + tail)
        rows, line = outcome(common.read_rows, str(path), "train", "--dataset")
        assert str(path) in line if line else len(rows) == 99
    check()


def test_many_levels_are_no_levels():
    def levels(values):
        rows = [{"question": "q", "answer": "1", "level": x} for x in values]
        return [p.level for p in common.to_problems(rows, WHAT)]

    assert levels(["$1_", 2, None, math.nan, 2.5]) == ["$1_", "2", "", "", "2.5"]
    assert levels(range(20)) == [str(x) for x in range(20)]
    for bad in (range(21), ["x" * 41, "1"], ["a\nb"], ["\0"], ["\u202e"]):
        assert set(levels(bad)) == {""}


def test_curves_of_any_level(tmp_path):
    run = object.__new__(common.Run)
    run.folder, run.script, run.curves = tmp_path, "gcpo", {"a": ["eval/*"]}
    run.cfg = SimpleNamespace(model="m$_{", method="$\\frac$", seed=0)
    names = ("eval/accuracy/level$\\frac{$", "eval/accuracy/level_$x$", "eval/accuracy/level^{}$$")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **dict.fromkeys(names, .5)}))
    run.draw_curves()
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_megabytes_are_read_in_time(tmp_path):
    path, big = tmp_path / "a.jsonl", 10**7
    for text in ("answer: " * (big // 8), "\\boxed{" * (big // 7), "x" * big, "<<" * (big // 2)):
        path.write_text(json.dumps({"question": text, "solution": text + "\n#### 7"}))
        began = time.process_time()
        problem, = common.to_problems(common.read_rows(str(path), "train", "--dataset"), WHAT)
        assert problem.answer == "7" and time.process_time() - began < 15


@pytest.mark.parametrize("script, data, says", [
    (light_if, "nowhere", "tiny, dolly"), (temporal_sr, "nowhere", "tiny, ultrafeedback")])
def test_the_names_that_a_script_knows(script, data, says, monkeypatch):
    monkeypatch.setattr(light_if, "to_tasks", lambda *a: [light_if.Task("q", "", level="2")])
    real = common.read_rows
    monkeypatch.setattr(light_if, "read_rows", lambda name, split, *a: (
        [] if split == "test" else real(name, split, *a)))
    cfg = SimpleNamespace(dataset=data, eval_dataset="", eft_dataset="", sft_steps=1, method="tsr",
                          eval_size=0)
    assert f"not a built-in name ({says})" in outcome(script.load_data, cfg)[1]


def test_a_changed_hub_layout_is_told(monkeypatch):
    cfg = SimpleNamespace(dataset="ultrafeedback")
    for rows in ([{"a": 1}], [{"completions": [{"overall_score": None}]}], [{"completions": [1]}]):
        monkeypatch.setattr(temporal_sr, "read_rows", lambda *a, rows=rows: rows)
        assert "UltraFeedback" in outcome(temporal_sr.load_data, cfg)[1]


@pytest.mark.parametrize("line", ["5", "{}", "{", '"a"', "null", "\0", "[" * 10**5, "\xff",
                                  '{"model": 1, "question": "q", "answer": "a", "text": "t"}',
                                  '{"model": "m", "question": "q", "answer": "a", "text": null}'])
def test_a_bad_line_of_golden_answers(line, tmp_path):
    good = json.dumps({"model": "m", "question": "q", "answer": "1", "text": "#### 1"})
    (tmp_path / "golden.jsonl").write_bytes(f"{good}\n{line}\n".encode("latin1"))
    cfg = SimpleNamespace(golden="m", dynamic_sampling=False, steps=1, prompts=1, seed=0)
    run, problems = SimpleNamespace(folder=tmp_path), [Problem("q", "1")]
    told = outcome(gcpo.written_by_model, problems, cfg, run, "")[1]
    assert f"{tmp_path / 'golden.jsonl'}: line 2 " in told
    (tmp_path / "golden.jsonl").write_bytes(f"{good}\n{line}".encode("latin1"))  # cut off
    assert gcpo.written_by_model(problems, cfg, run, "") == {("q", "1"): "#### 1"}


# ------------------------------------------------------------------------------ special tokens


TOKENIZERS = {"tiny": make.tokenizer(["Ada has 12 figs"], 320), "word": word_tokenizer(),
              "BOS": word_tokenizer(bos=True), "chat": word_tokenizer(template=True)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_becomes_a_control_token(name):
    tok, model = TOKENIZERS[name], SimpleNamespace(config=SimpleNamespace())
    special, tokens = set(tok.all_special_ids), common.special_tokens(tok)
    parts = [part for t in tokens for k in (1, 2, 3) for part in (t[:k], t[k:])]

    def control(ids):
        return [i for i in ids if i in special]

    @examples(60)
    @given(spliced(*tokens, *parts, " ", "\ud800", "\0"))
    def check(text):
        for system in ("", "Be brief."):
            turn, harmless = common.encode_questions(tok, [text, "x"], system)
            assert control(turn) == control(harmless)
        sample, = common.as_samples(tok, [[1]], [text])
        assert control(sample.tokens) == [tok.eos_token_id]
        assert not any(t in sample.text for t in tokens)
        prompts = temporal_sr.judge_prompts(model, tok, [(text, text), ("x", "x")])
        assert control(prompts[0]) == control(prompts[1])
    check()


def test_a_special_token_that_begins_with_a_space():
    tok = type("Tok", (), dict(added_tokens_decoder={}, all_special_tokens=[" <end>", "<a"]))()
    assert common.defuse(tok, "x <end> <a") == "x < end> < a"


# ------------------------------------------------------------------------------ answer checking


def slow_extract_answer(text):
    """The definition, a mark at a time."""
    found = [(m.start(), m[1]) for m in re.finditer(r"####[ \t]*([^\n]+)", text)]
    for m in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, m.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth == 0:
            found.append((m.start(), text[m.end():end - 1]))
    for m in re.finditer(r"(?:\banswer is:?|\banswer:)\s*(?!\\boxed|####)(?=([^\n]+))", text, re.I):
        found.append((m.start(), re.split(r"\.(?:\s|$)", m[1])[0]))
    answer = max(found)[1].strip().strip("<>*").strip() if found else ""
    return answer or None


@examples(400)
@given(spliced("#### ", "\\boxed{", "\\boxed {", "{", "}", "5", "the answer is ", "Answer: ", "\n",
               ". ", ".", " ", "<", "*"))
@example("\\boxed{a \\boxed{5} b}")
def test_the_last_mark_decides(text):
    assert extract_answer(text) == slow_extract_answer(text)


@pytest.mark.parametrize("piece", ["answer: ", "answer is", "\\boxed{", "\\boxed", "#### ", "{",
                                   "}", "\\boxed ", " ", "\n", "answer:\n", "a. ", "$", "\\(", "9",
                                   "1,", "(", " 1", "<", "x = "])
def test_answers_are_read_in_time(piece):
    text, began = piece * (10**6 // len(piece)), time.process_time()
    for x in (text, f"answer: {text}\n", f"{text}x", f"\\boxed{{{text}}}"):
        answer = extract_answer(x)
        for y in (answer, x, f"${text}$", f"${text}x"):
            same_answer(y, "5")
            same_answer("5", y)
            same_answer(y, f"{y}5")
    common.as_number(piece * (100 // len(piece)))
    assert time.process_time() - began < SECONDS + 2


def formats(n):
    """A number as a text has it."""
    value, sign = abs(n), "-" if n < 0 else ""
    plain = f"{sign}{value}"
    return [plain, f"{sign}{value:,}", f"${plain}$", f"\\({plain}\\)", f"{plain}.0", f"{plain}.00",
            f"{sign}${value}", f"{plain}%", f"{plain}\\%", f"{plain} apples", f"{plain} m",
            f"x = {plain}", f"{plain}.", plain.replace("-", "\u2212"), f"{2 * n}/2", f"{plain}/1",
            f"\\frac{{{2 * n}}}{{2}}", f"\\dfrac{{{n}}}{{1}}", f"{{{plain}}}", f" {plain} "]


MARKS = ("#### {}", "so \\boxed{{{}}}", "The answer is {}", "Answer: {}\n", "\\boxed{{9}} #### {}")


@examples(300)
@given(st.integers(-10**7, 10**7), st.integers(-10**7, 10**7) | st.integers(-1, 1), st.data())
def test_numbers_in_any_format(a, difference, data):
    for b, equal in ((a, True), (a + difference, difference == 0)):
        given = data.draw(st.sampled_from(formats(a)))
        truth = data.draw(st.sampled_from([str(b), f"{b:,}", f"{b}.0", f"{3 * b}/3"]))
        text = data.draw(st.sampled_from(MARKS)).format(given)
        problem = Problem("q", truth)
        for correct in (gcpo.correct, laser.correct, carft.correct):
            assert correct(text, problem) is equal, (text, truth)


@pytest.mark.parametrize("given", [
    "5 or 6", "6 or 5", "5, 6", "6, 5", "5 and 6", "5 or six", "5 to 6", "5 and a half", "5; 6",
    "5 / 6", "5 6", "not 5", "5 not", "less than 5", "5..6", "5-6", "56", "55", "15", "5e0",
    "{5, 6}", "(5, 6)", "[5, 6]", "\\{5, 6\\}", "(5) or (6)", "5 \\text{ or } 6", "\\text{6 or } 5",
    "\\text{not } 5", "(6)$ or $5", "foo(6)$ bar $5", "6 or the final answer is \\(5\\)",
    "6\n\\(5\\)", "(6)\n5", "6 {} 5", "x_{ is 5", "4=5()", "x = 4 = 5 {}", "\\frac{}{} 5", "5()()",
    "((5", "\\foo{5} or 5", "answer: {6} 5", "\\boxed{6} 5", "x \\ne 5", "x < {5}", "5 \\le {x}",
    "\\pm 5", "\\sqrt{5}", "5^{2}", "5_{6}5", "{5}{6}", "", " ", "{}", "\\", "$", "$$", "()"])
def test_more_than_the_answer_is_not_the_answer(given):
    for correct in (gcpo.correct, laser.correct, carft.correct):
        assert not correct(f"\\boxed{{{given}}}", Problem("q", "5"))


def test_the_base_of_a_number_counts():
    assert same_answer("2516_8", "2516_{8}") and same_answer("x_2 = {5}", "5")
    assert not same_answer("2516_9", "2516_8") and not same_answer("2516_{9}", "2516_8")


@examples(300)
@given(spliced("\\frac", "{", "}", "^", "_", "(", ")", "\\text", "\\sqrt", "5", "6", "x", "$", "\\",
               "[", "]", " ", "=", "\\boxed{", "\\left", ",", "\0", "\ud800"))
def test_no_other_text_equals_a_number(text):
    """Nothing crashes, and what has no 7 in it is not equal to 7777."""
    assert not same_answer(text, "7777") and not same_answer(f"{text} (", "\\sqrt{7777}")


BOMBS = ("9^{9^{9^9}}", "10^{10}!")


def test_bombs_are_cut_off(monkeypatch):
    monkeypatch.setattr(common, "CHECK_SECONDS", 1)
    common.answer_checker.cache_clear()
    began = time.process_time()
    for bomb in BOMBS:
        before = sum(os.times()[2:4])
        assert not same_answer(bomb, "7")
        assert sum(os.times()[2:4]) - before < 20  # of the process that checked, with its start
        assert common.same_latex("\\frac{3}{2}", "1.5")
    assert time.process_time() - began < 3  # this process only waits
    common.answer_checker.cache_clear()


def test_the_checking_process(monkeypatch):
    def right(n):
        return common.same_latex(f"\\frac{{{n}}}{{2}}", f"\\frac{{{2 * n}}}{{4}}")

    assert right(1)
    checker = common.answer_checker(os.getpid())
    assert right(2) and common.answer_checker(os.getpid()) is checker  # it is kept
    assert os.getsid(checker.pid) != os.getsid(0)  # Ctrl-C does not reach it
    if sys.platform == "linux":
        import resource
        assert resource.prlimit(checker.pid, resource.RLIMIT_AS)[0] == common.CHECK_MEMORY
    checker.kill()  # by someone else
    assert right(3)
    again = common.answer_checker(os.getpid())
    assert again is not checker
    os.kill(again.pid, signal.SIGSTOP)
    threading.Timer(2, os.kill, (again.pid, signal.SIGCONT)).start()
    assert right(5)  # a machine that is slow makes nothing wrong
    found = []
    thread = threading.Thread(target=lambda: found.append(right(4)))
    thread.start()
    thread.join()
    assert found == [True]

    class Interrupted:
        stdin = again.stdin
        stdout = SimpleNamespace(readline=lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
                                 close=again.stdout.close)
        kill, wait = again.kill, again.wait
    monkeypatch.setattr(common, "answer_checker", type("F", (), {
        "__call__": lambda self, pid: Interrupted, "cache_clear": lambda self: None})())
    with pytest.raises(KeyboardInterrupt):
        common.same_latex("(1)", "(2)")
    assert again.wait() == -signal.SIGKILL  # its late verdict is nobody's


def test_the_checking_process_ends_with_its_parent():
    common.answer_checker.cache_clear()
    assert common.same_latex("(1)", "{1}")
    checker = common.answer_checker(os.getpid())
    checker.stdin.close()  # as when its parent is gone
    assert checker.wait(20) == 0
    common.answer_checker.cache_clear()


HOOK = r"""
import os, sys
ready = []
def hook(event, args):
    if ready and (event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
                            "socket.connect") or event == "compile" and b"hostile" in (
                                args[0] if isinstance(args[0], bytes) else b"")):
        os.write(1, f"executed: {event} {args}\n".encode())
sys.addaudithook(hook)
"""


def test_no_answer_is_executed(tmp_path):
    """sympy evaluates some texts as Python: none of them holds what the model wrote."""
    proof = tmp_path / "hostile"
    payloads = [f"__import__('os').system('touch {proof}')", "hostile.__class__"]
    wrapped = [
        "{}", "({})", "\\frac{{{}}}{{1}}", "\\text{{{}}}", "\\operatorname{{{}}}(1)", "x_{{{}}}",
        "[{}]", "\\{{{}\\}}", "\\mathrm{{{}}}", "\\boxed{{{}}}", "f({})", "1+{}", "3+(4{})",
        "$\\({}\\)$", "\\begin{{pmatrix}}{}\\end{{pmatrix}}", "answer: ({})", "{}=(1)",
        "\\sqrt{{{}}}", "\\int {} dx", "{}^{{2}}", "\\left|{}\\right|", "\\log_{{{}}}(2)"]
    source = inspect.getsource(common.check_answers)
    told = 'print("ready", file=answers, flush=True)'
    assert source.count(told) == 1
    source = source.replace(told, f"{told}; ready.append(1)")
    lines = [json.dumps(["(5)", w.format(p)]) for p in payloads for w in wrapped]
    done = subprocess.run([sys.executable, "-c", f"{HOOK}{source}\ncheck_answers(60, {4 << 30})"],
                          input="\n".join(lines) + "\n", capture_output=True, text=True)
    assert done.stdout == "ready\n" + "False\n" * len(lines)
    assert not proof.exists()


# --------------------------------------------------------------------------- what a judge quotes

LINES = ("Score: 5", "score : 5", "**Score:** 5", "Score\uff1a5", "\nScore: 5", "Total Score: <5>",
         "Fine. Score: 5", "_Score_: 5", "scor", "Sc", "ore", ":", "\uff1a", " ", "\n", "*", "5",
         "4.5", "\u017fcore: 5", "score:score:5", "<", "</response>", "<response>", "< / RESPONSE",
         "resp", "<<", "/", "\u200b", "re\u017fponse>", "<s>", "</s>", "<|end|>",
         "{response}", "{", "}")


@examples(400)
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


@examples(200)
@given(spliced("[[5]]", "[", "]", "5", "10", "[[[", "[ [", "]]", "<answer>", "</answer>", "<", "/",
               "</ REQUEST>", "answer>", "\n", " "))
def test_nothing_quoted_is_a_rating_or_a_tag(text):
    quoted = light_if.quoted(text)
    parts = [quoted[k:] for k in range(len(quoted) + 1)]
    assert not any(light_if.parse_rating(p) for p in parts)
    prompt = light_if.FLUENCY.format(request=quoted, answer=quoted)
    for tag in ("<request>", "</request>", "<answer>", "</answer>"):
        assert prompt.count(tag) == 1
    assert not re.search(r"<\s*/?\s*(answer|request)", quoted, re.I)


@pytest.mark.parametrize("piece", [" ", "*", "_", "\t", "`", ">", ")", "(", "<", "#", "5", "5 ",
                                   ". ", "score", "score ", "Score: 5 ", "Score:5)", "<<", "</",
                                   "[[", "[[5", "-", "points ", "\n ", "<answer", "[", "\u200b"])
def test_judgements_are_read_in_time(piece):
    run, began = piece * (60_000 // len(piece)), time.process_time()
    for text in (run, f"Score: 5{run}x", f"Score: 5 {run}.{run}x", f"{run}Score{run}:{run}5{run}x",
                 f". {run}x", f"Score: 5 points{run}x"):
        for f in (parse_score, temporal_sr.quoted, light_if.quoted, light_if.parse_rating):
            f(text)
    assert time.process_time() - began < SECONDS


# -------------------------------------------------------------------------- IFEval's constraints

GIVEN = {"keywords": ["river"], "keyword": "river", "frequency": 2, "relation": "at least",
         "forbidden_words": ["river"], "letter": "a", "let_frequency": 2, "language": "de",
         "let_relation": "at least", "num_sentences": 3, "num_paragraphs": 3, "num_words": 3,
         "nth_paragraph": 2, "first_word": "a", "num_placeholders": 2, "postscript_marker": "P.S.",
         "num_bullets": 2, "num_highlights": 2, "section_spliter": "Section", "num_sections": 2,
         "prompt_to_repeat": "a", "end_phrase": "b", "capital_frequency": 2,
         "capital_relation": "at least"}
CONSTRAINTS = [(kind, {k: GIVEN[k] for k in inspect.signature(x.check).parameters if k in GIVEN})
               for kind, x in KINDS.items()]
RUNS = ["a", " ", "\n", "*", "**", "***", "* ", "-", "<", "<<", ">", "[", "[]", "]", '"', "'", ".",
        "! ", "A. ", "p. ", "\n ", "\n* ", "\n\n", "n't", "Section ", "1", "river ", "{", "@", "a@",
        "\r", "\u2028", "AB ", ".'", "`", "_", "\0"]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=list(KINDS))
def test_constraints_are_checked_in_time(constraint):
    for piece in RUNS:
        run = piece * (60_000 // len(piece))
        for text in (run, f"x{run}y"):
            began = time.process_time()
            follow(text, [constraint])
            assert time.process_time() - began < SECONDS, repr(piece)


@examples(150)
@given(spliced("[", "]", "<<", ">>", "<", ">", "\n", "a", " ", "***", "******", "*", '"', "P.S.",
               "{", "}", "A. ", "- ", "\0", "\ud800", "Section 1", "\r", "\u2028"))
def test_constraints_of_any_text(text):
    """No crash, and what was made faster finds what the original's expressions find."""
    follow(text, CONSTRAINTS, loose=True)
    titles = re.findall(r"<<[^\n]+>>", text)
    assert light_if.has_title(text) == any(t.lstrip("<").rstrip(">").strip() for t in titles)
    for n in range(4):
        slots = [("detectable_content:number_placeholders", {"num_placeholders": n})]
        assert follow(text, slots) == [
            bool(text.strip()) and len(re.findall(r"\[[^]\n]*\]", text)) >= n]


ODD = st.one_of(VALUES, st.sampled_from([" ", "", [" "], [""], [], ["a", " "], True, False, 1, 0,
                                         -1, 10**30, "at least", "less than", "(", "\\", "x{y}"]))


@examples(300)
@given(st.lists(st.tuples(
    st.sampled_from([*KINDS]) | VALUES,
    st.dictionaries(st.sampled_from([*GIVEN]) | TEXTS, ODD, max_size=3) | VALUES), max_size=3),
    st.just("Write.") | VALUES, st.booleans())
def test_constraints_of_any_layout(constraints, prompt, complete):
    kinds, kwargs = [k for k, _ in constraints], [v for _, v in constraints]
    if complete:
        kwargs = [{**given, **(v if isinstance(v, dict) else {})} for kind, v in constraints
                  for given in [dict(CONSTRAINTS).get(str(kind), {})]]
    rows = [{"prompt": prompt, "instruction_id_list": kinds, "kwargs": kwargs}]
    tasks, line = outcome(light_if.to_tasks, rows, WHAT)
    assert f"{WHAT}: row 1 " in line if line else tasks[0].question == prompt
    if tasks:
        follow("Some text.\n\n[a] b", tasks[0].constraints, loose=True)


@pytest.mark.parametrize("kind, given", [
    ("keywords:existence", {"keywords": [" "]}), ("keywords:forbidden_words",
                                                  {"forbidden_words": ["a", "\n"]}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": True}),
    ("detectable_format:number_bullet_lists", {"num_bullets": False}),
    ("punctuation:no_comma", {"unknown": "x"}), ("keywords:frequency", {"keyword": "a"}),
    ("length_constraints:number_words", {"num_words": 1.0, "relation": "at least"})])
def test_constraints_that_are_refused(kind, given):
    rows = [{"prompt": "Write.", "instruction_id_list": [kind], "kwargs": [given]}]
    assert "row 1 cannot be checked" in outcome(light_if.to_tasks, rows, WHAT)[1]


def test_thinking_is_read_in_time():
    began = time.process_time()
    for words in ("a " * 8000, "a b " * 4000, "< " * 8000):
        light_if.depth(f"{words}</think>{words}", ["a", "b"])
        light_if.fluent(f"{words}</think>{words}")
    assert time.process_time() - began < 3 * SECONDS
