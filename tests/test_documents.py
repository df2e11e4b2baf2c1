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
        if {"--resume", "--score"} & set(words):
            words += ["--help"]  # the folder of another run
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_tells_every_flag_and_its_default(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in module.Config.__dataclass_fields__.values():
        assert f"--{field.name}" in text and field.metadata["help"]
    if "{data}" in module.Config.__dataclass_fields__["dataset"].metadata["help"]:
        for built_in in ("tiny", "gsm8k", "svamp", "math500", "aime24"):
            assert built_in in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_keep_their_shape(name):
    source = (ROOT / f"{name}.py").read_text()
    order = ["1. configuration", "2. task and reward", "3. the paper's maths", "4. evaluation",
             "5. the loop"]
    assert re.findall(r"^# -+ (\d\. .*)$", source, re.M) == order
    tree = ast.parse(source)
    imported = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
                for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert not imported & (set(SCRIPTS) - {name}), "a script imports another script"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) or node.name in ("main", "test", "put", "parse")
            assert documented, node.name


def test_fixed_tree():
    allowed = {"README.md", "requirements.txt", "Makefile", "common.py", "tests", "benchmarks",
               "gcpo.py", "laser.py", "carft.py", "temporal_sr.py", "light_if.py", "tiny", "runs"}
    assert {p.name for p in ROOT.glob("[!._]*")} <= allowed
