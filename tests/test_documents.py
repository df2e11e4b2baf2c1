"""The documents are executed: every command of the README parses, every file keeps its shape."""

import ast
import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [p.stem for p in sorted(ROOT.glob("*.py")) if p.stem != "common"]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for b in BLOCKS for line in b.splitlines()
            if line.split("#")[0].strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands(command, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
        return
    assert words[0] == "python", "a command that no test knows"
    assert (ROOT / words[1]).is_file()
    if words[1].removesuffix(".py") in SCRIPTS:
        module = importlib.import_module(words[1].removesuffix(".py"))
        if "--resume" in words:  # the folder of another run
            del words[words.index("--resume"):words.index("--resume") + 2]
        try:
            module.parse(words[2:])
        except SystemExit as stop:
            assert stop.code == 0, capsys.readouterr().err


def test_readme_mentions_every_method_and_script():
    for name in SCRIPTS:
        assert f"{name}.py" in README
        for method in importlib.import_module(name).METHODS:
            assert f"`{method}`" in README


def test_readme_is_short_and_its_links_lead_where_they_say():
    assert len(README.splitlines()) < 350
    links = re.findall(r"\[([^\]]*)\]\(([^)]*)\)", README)
    to_lines = [(text.strip("`"), *link.split("#L")) for text, link in links if "#L" in link]
    assert len(to_lines) > 20
    for name, file, number in to_lines:
        lines = (ROOT / file).read_text().splitlines()
        real = [n for n, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", line)]
        assert int(number) in real, f"{name}: {file}#L{number} should be one of {real}"
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", README, re.M)}
    for text, link in links:
        if link.startswith("#"):
            assert link[1:] in headings, text
        elif "://" not in link and "#L" not in link:
            assert (ROOT / link).is_file(), link


def test_results_section_is_that_of_the_json_files(monkeypatch):
    """`python benchmarks/claims.py` brings it up to date."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims = importlib.import_module("claims")
    assert claims.section() == claims.SECTION.search(README)[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_tables_and_figures_are_those_of_the_json_files(name, monkeypatch):
    """`python benchmarks/reproduce.py` and `python benchmarks/figures.py` write them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims, reproduce = importlib.import_module("claims"), importlib.import_module("reproduce")
    text = (claims.RESULTS / f"{name}.json").read_bytes()
    table = reproduce.markdown(name, json.loads(text), reproduce.COLUMNS[name])
    assert (claims.RESULTS / f"{name}.md").read_text() == table
    assert hashlib.sha256(text).hexdigest().encode() in (
        claims.RESULTS / f"{name}.png").read_bytes(), "the figure is of other numbers"


METHODS = [(name, method) for name in SCRIPTS for method in importlib.import_module(name).METHODS]


@pytest.mark.parametrize("model", ["tiny", "Qwen2.5-1.5B"])
@pytest.mark.parametrize("name, method", METHODS)
def test_help_tells_every_flag_and_the_value_it_will_have(name, method, model, capsys):
    module, argv = importlib.import_module(name), ["--model", model, "--method", method]
    cfg = module.parse(argv)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        module.parse([*argv, "--help"])
    flags = {part.split(maxsplit=1)[0]: re.sub(r"\s+", " ", part)
             for part in capsys.readouterr().out.split("\n  --")}
    for field in module.Config.__dataclass_fields__:
        value = getattr(cfg, field)
        shown = re.search(r"\(default: (.*?)\)", flags[field])
        if field in ("device", "dtype") and (field == "dtype" or model != "tiny"):
            assert shown[1] == "auto"  # what it stands for is in the help
        elif field not in ("out", "model", "method", "eval_dataset") and value != "":
            assert shown and shown[1] == str(value), (field, value, flags[field])


def test_what_was_typed_comes_before_tiny_before_the_method_before_the_default():
    def of(script, *argv):
        return importlib.import_module(script).parse(list(argv))

    assert (of("gcpo").clip_low, of("gcpo").steps, of("gcpo").ratio) == (3e-4, 300, "sequence")
    dapo = of("gcpo", "--method", "dapo", "--lr", "1e-6")
    assert (dapo.clip_low, dapo.steps, dapo.ratio, dapo.lr) == (.2, 300, "token", 1e-6)
    assert (dapo.overlong_cache, dapo.dynamic_sampling, dapo.golden) == (.2, True, "off")
    large = of("gcpo", "--method", "dapo", "--model", "Qwen2.5-1.5B", "--clip_low", "0.1")
    assert (large.clip_low, large.clip_high, large.steps, large.lr) == (.1, .28, 200, 1e-6)
    assert of("gcpo", "--method", "dapo", "--dynamic_sampling", "no").dynamic_sampling is False
    # an entry of TINY that is named after a method comes before its others, and before METHODS
    assert (of("carft").lr, of("carft", "--method", "sft").lr) == (2e-4, 1e-4)
    assert of("carft", "--method", "sft", "--model", "x").lr == 1e-5
    assert (of("light_if").steps, of("light_if", "--method", "grpo").steps) == (40, 80)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_keep_their_shape(name):
    source = (ROOT / f"{name}.py").read_text()
    order = ["1. configuration", "2. task and reward", "3. the paper's maths", "4. evaluation",
             "5. the loop"]
    headings = re.findall(r"^# -+ (\d\. .*)$", source, re.M)
    assert ", ".join(headings).split(", ") == order
    tree = ast.parse(source)
    imported = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
                for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert not imported & (set(SCRIPTS) - {name}), "a script imports another script"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) or node.name in ("main", "test", "parse", "make")
            assert documented, node.name


def test_fixed_tree():
    allowed = {"README.md", "requirements.txt", "Makefile", "common.py", "tests", "benchmarks",
               "gcpo.py", "laser.py", "carft.py", "temporal_sr.py", "light_if.py", "tiny", "runs"}
    assert {p.name for p in ROOT.glob("[!._]*")} <= allowed


BUDGETS = {  # the most lines of a file, and of parts of it
    "common.py": {"": 1127},
    "gcpo.py": {"": 370, "docstring": 36, "main": 60},
}


@pytest.mark.parametrize("name, part", [(name, part) for name in BUDGETS for part in BUDGETS[name]])
def test_budgets(name, part):
    """A budget is kept by leaving things out, never by longer lines or fewer explanations."""
    source = (ROOT / name).read_text()
    body = ast.parse(source).body
    nodes = {"docstring": body[0], **{n.name: n for n in body if isinstance(n, ast.FunctionDef)}}
    lines = nodes[part].end_lineno - nodes[part].lineno + 1 if part else len(source.splitlines())
    assert lines <= BUDGETS[name][part]
