"""What happens to a run at night: kills, signals, full disks, damaged files, a second process, a
folder from somebody else, numbers that are not finite."""

import importlib
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fault
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_common import flat, llama_folder  # noqa: F401 (a fixture)
from test_gcpo import SMALL, run, weights

import common
import gcpo
import light_if
import temporal_sr

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing takes longer than such a run; in the background a shell ignores SIGINT."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, worlds):
    """-> the folders of a run of six steps, and of one that ended after four."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "draw_curves", lambda run: None)
        for steps in (6, 4):
            run(folder / str(steps), steps=steps)
    return folder / "6", folder / "4"


@pytest.fixture
def whole(runs):
    """The run of six steps."""
    return runs[0]


@pytest.fixture
def four(runs, tmp_path):
    """A copy of the run that ended after four."""
    return common.shutil.copytree(runs[1], tmp_path / "r")


def text_of(out):
    """The two logs of a run."""
    return [(out / name).read_text() for name in common.LOGS]


def stopped(main, argv, code, capsys):
    """Calls main, which a signal ends. -> what it says"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == code
    return capsys.readouterr().err


def on_call(monkeypatch, owner, name, number, act):
    """Does something before the n-th call of a function."""
    real, calls = getattr(owner, name), []

    def call(*a, **k):
        calls.append(0)
        if len(calls) == number:
            act()
        return real(*a, **k)

    monkeypatch.setattr(owner, name, call)


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("name", sorted(fault.FLAGS))
def test_killed_at_a_random_moment(tmp_path, name):
    """`make fault` does the same 60 times."""
    whole, seen = fault.undisturbed(name, tmp_path)
    for n in range(9):  # a run may be faster than the one that said when to kill it
        seed = random.randrange(10**6)
        told, differs = fault.trial(name, tmp_path / f"{n}", whole, seen, random.Random(seed), 1)
        assert not differs, (seed, told)
        if told:
            return
    raise AssertionError("never killed")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(tmp_path, monkeypatch, capsys, number, code):
    flags = ["--save_every", 4]
    run(tmp_path / "whole", *flags, steps=5)
    on_call(monkeypatch, gcpo, "roll_out", 2, send(number))
    argv = [*SMALL, *flags, "--steps", 5, "--out", tmp_path / "r"]
    said = stopped(gcpo.main, argv, code, capsys)
    assert f"{number.name}: stopping after this step" in said
    assert f"the last good checkpoint is of step 2; go on with: python gcpo.py --resume " \
           f"{tmp_path}/r" in said
    assert [json.loads(x)["step"] for x in text_of(tmp_path / "r")[0].splitlines()] == [0, 1, 2]
    monkeypatch.undo()
    gcpo.main(["--resume", str(tmp_path / "r")])
    assert text_of(tmp_path / "r") == text_of(tmp_path / "whole")
    assert torch.equal(weights(tmp_path / "r"), weights(tmp_path / "whole"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "given back at the end"


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch, capsys):
    run(tmp_path / "whole", steps=4)
    on_call(monkeypatch, gcpo, "roll_out", 3, lambda: (send(signal.SIGTERM)(),
                                                       send(signal.SIGTERM)()))
    said = stopped(gcpo.main, [*SMALL, "--steps", 4, "--out", tmp_path / "r"], 143, capsys)
    assert "checkpoint is of step 2" in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and common.Run.lock is None
    monkeypatch.undo()
    gcpo.main(["--resume", str(tmp_path / "r")])
    assert text_of(tmp_path / "r") == text_of(tmp_path / "whole")


def test_a_signal_outside_of_training_ends_it_at_once(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        on_call(patch, gcpo, "golden_answers", 1, send(signal.SIGTERM))
        said = stopped(gcpo.main, [*SMALL, "--out", tmp_path / "r"], 143, capsys)
    assert "nothing is lost yet: give the same command again" in said
    with monkeypatch.context() as patch:
        on_call(patch, gcpo, "evaluate", 1, send(signal.SIGINT))
        said = stopped(gcpo.main, [*SMALL, "--steps", 2, "--out", tmp_path / "r"], 130, capsys)
    assert "no checkpoint was written yet; go on with" in said
    gcpo.main(["--resume", str(tmp_path / "r")])
    run(tmp_path / "whole")
    assert text_of(tmp_path / "r") == text_of(tmp_path / "whole")


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        on_call(monkeypatch, gcpo, "roll_out", 1, send(signal.SIGINT))
        assert len(run(tmp_path / "r", steps=1)) == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name, function, call", [
    ("carft", "sft_step", 2), ("temporal_sr", "sft_step", 3), ("temporal_sr", "update", 22),
    ("temporal_sr", "sample", 9), ("light_if", "update", 3)])
def test_a_signal_inside_of_a_stage(tmp_path, name, function, call):
    """Stopped in an SFT, in a DPO run or in a part of an iteration it goes on from there."""
    place = next(k for k, names in fault.PLACES.items() if function in names)
    assert fault.start(name, tmp_path / "whole", False).returncode == 0
    done = fault.start(name, tmp_path / "r", False, place=place, call=call, delay=0,
                       signal=signal.SIGTERM)
    assert done.returncode == 143 and "go on with" in done.stderr, done.stderr
    if name != "light_if" and function != "sample":
        assert (tmp_path / "r" / "checkpoint.stage").is_dir()
        assert "the last good checkpoint is of step" in done.stderr
    seen = tmp_path / "seen.json"
    done = fault.start(name, tmp_path / "r", True, seen=str(seen))
    assert done.returncode == 0, done.stderr
    assert fault.contents(tmp_path / "r") == fault.contents(tmp_path / "whole")
    assert not (tmp_path / "r" / "checkpoint.stage").exists()


# ------------------------------------------------------------------------------------------ storage


@pytest.fixture
def limit():
    """-> a function: no file of this process may pass so many bytes any more; raised at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [400_000, 3_000, 1_000])  # below weights, samples, metrics
def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch, refused, limit, size,
                                                  whole):
    on_call(monkeypatch, gcpo, "roll_out", 3, lambda: limit(size))
    error = refused(gcpo.main, *SMALL, "--steps", 6, "--out", tmp_path / "r")
    assert "cannot be written (File too large)" in error or "os error 27" in error
    assert "checkpoint is of step 2; go on with: python gcpo.py --resume" in error
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    monkeypatch.undo()
    assert not list((tmp_path / "r").glob("*.new"))
    gcpo.main(["--resume", str(tmp_path / "r")])
    assert text_of(tmp_path / "r") == text_of(whole)
    assert torch.equal(weights(tmp_path / "r"), weights(whole))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "about.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(four, whole, capsys, name, damage):
    path = four / "checkpoint" / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-7] if damage == "cut" else data)
    capsys.readouterr()
    gcpo.main(["--resume", str(four), "--steps", "6"])
    said = [x for x in capsys.readouterr().out.splitlines() if re.search("is damaged|^resuming", x)]
    assert len(said) == 2 and "checkpoint is damaged" in said[0] and "after step 2" in said[1]
    assert text_of(four) == text_of(whole)


def test_nothing_good_is_left(four, refused):
    for folder in ("checkpoint", "checkpoint/before"):
        (four / folder / "state.pt").write_bytes(b"")
    logs = text_of(four)
    error = refused(gcpo.main, "--resume", four, "--steps", 6)
    assert "checkpoint is damaged" in error and "checkpoint/before is damaged" in error
    assert text_of(four) == logs, "it was not thrown away"


@pytest.mark.parametrize("log", common.LOGS)
def test_lost_rows_are_noticed(four, whole, capsys, log):
    (four / log).write_text("".join((four / log).read_text().splitlines(keepends=True)[:-1]))
    gcpo.main(["--resume", str(four), "--steps", "6"])
    assert f"{log} has lost rows" in capsys.readouterr().out
    assert text_of(four) == text_of(whole)


def test_a_bad_checkpoint_is_never_the_only_one(four, monkeypatch):
    """The good one before a damaged one takes its name before the next one is written."""
    (four / "checkpoint" / "state.pt").write_bytes(b"")

    def killed(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            gcpo.main(["--resume", str(four), "--steps", "6"])
    gcpo.main(["--resume", str(four), "--steps", "6"])
    assert len(text_of(four)[0].splitlines()) == 7


def test_two_processes_in_one_folder(four, refused):
    """The second refuses, whatever it was to do there; and may begin when the first is gone."""
    code = f"import sys, common; run = object.__new__(common.Run)\n" \
           f"run.folder = common.Path({str(four)!r}); run.hold()\n" \
           "print('held', flush=True); sys.stdin.read()"
    before = text_of(four)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    for argv in (["--resume", four, "--steps", 5], ["--out", four]):
        assert "another process is at work" in refused(gcpo.main, *argv)
    assert text_of(four) == before
    other.kill()
    other.communicate()
    gcpo.main(["--resume", str(four), "--steps", "5"])
    assert len(text_of(four)[0].splitlines()) == 6


def mounted(tmp_path, options, command):
    """Runs a shell command where tmp_path/disk is a mount of its own; skips where none may be."""
    (tmp_path / "disk").mkdir(exist_ok=True)
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no mounts for this user")
    script = f"mount {options} {tmp_path}/disk && cd {ROOT} && {command}"
    return subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)


def test_a_full_disk(tmp_path):
    argv = " ".join([sys.executable, "benchmarks/fault.py", "child", "gcpo", "'{}'",
                     fault.FLAGS["gcpo"], "--out", f"{tmp_path}/disk/r"])
    done = mounted(tmp_path, "-t tmpfs -o size=5m tmpfs",
                   f"{argv}; code=$?; cp -r {tmp_path}/disk/r {tmp_path}/r; exit $code")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in error and "checkpoint is of step 2" in error
    assert fault.start("gcpo", tmp_path / "r", True).returncode == 0
    assert fault.start("gcpo", tmp_path / "whole", False).returncode == 0
    assert fault.contents(tmp_path / "r") == fault.contents(tmp_path / "whole")


def test_a_read_only_folder(tmp_path):
    run(tmp_path / "disk" / "r", steps=2)
    argv = [sys.executable, "gcpo.py", "--resume", f"{tmp_path}/disk/r", "--steps", "3"]
    done = mounted(tmp_path, f"--bind -o ro {tmp_path}/disk", " ".join(argv))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be written (Read-only file system)" in done.stderr


def test_a_run_that_has_lost_its_checkpoint_is_left_alone(tmp_path, refused):
    run(tmp_path / "r", "--save_every", 1, steps=3)
    before = text_of(tmp_path / "r")
    common.shutil.rmtree(tmp_path / "r" / "checkpoint")
    error = refused(gcpo.main, "--resume", tmp_path / "r")
    assert "has made 3 steps, but has no checkpoint/" in error
    assert text_of(tmp_path / "r") == before


def test_a_kill_never_costs_a_golden_answer(tmp_path, tiny_folder, monkeypatch):
    """Neither in the first start nor in the next one."""
    argv = [*SMALL, "--golden", tiny_folder, "--prompts", "64", "--steps", "2", "--out",
            str(tmp_path / "r")]
    sizes = []
    for call in (2, 1):  # the first of two pieces is written; nothing is
        with monkeypatch.context() as patch:
            on_call(patch, gcpo, "sample", call, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                gcpo.main(argv)
        sizes.append((tmp_path / "r" / "golden.jsonl").stat().st_size)
    assert sizes[0] == sizes[1] > 0


# -------------------------------------------------------------------------- folders of other people


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def rewrite(folder, **state):
    """Puts something into a checkpoint, with the right hashes."""
    about = json.loads((folder / "about.json").read_text())
    found = torch.load(folder / "state.pt", weights_only=True)
    torch.save(found | state, folder / "state.pt")
    about["sha256"]["state.pt"] = common.sha256_of(folder / "state.pt")
    (folder / "about.json").write_text(json.dumps(about))


@pytest.mark.parametrize("state", [
    {"logs": {"/tmp/victim": 0}}, {"logs": [1]}, {"state": {}}, {"state": []}, {"rng": 3},
    {"state": {"step": 4, "seconds": 1.0, "tokens": 3, "position": "x", "before": {}}},
    {"optimizer": "none"}])
def test_a_checkpoint_with_other_contents(four, refused, state):
    rewrite(four / "checkpoint", **state)
    before = text_of(four)
    assert "not a checkpoint of th" in refused(gcpo.main, "--resume", four, "--steps", 6)
    assert text_of(four)[0].startswith(before[0][:100])


def test_a_log_that_is_a_link(four, tmp_path, refused):
    (four / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (four / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_text()
    assert "is a link" in refused(gcpo.main, "--resume", four, "--steps", 6)
    assert (tmp_path / "elsewhere").read_text() == before


def test_the_folder_that_a_run_is_started_in_is_no_source_of_code(tmp_path):
    """LaTeX answers are compared in a process of its own: not with a module that lies about."""
    for name in ("math_verify", "resource", "contextlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "ask.py").write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\nimport common\n"
        "print(common.same_answer('\\\\frac{1}{2}', '0.5'))\n")
    done = subprocess.run([sys.executable, tmp_path / "script" / "ask.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cannot_run_code(tmp_path, four, refused):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "would")))
    assert (tmp_path / "would").exists()
    rewrite(four / "checkpoint", state=Bomb(tmp_path / "ran"))
    error = refused(gcpo.main, "--resume", four, "--steps", 6)
    assert "state.pt holds more than numbers" in error and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["weights", "pickle", "code", "adapter"])
def test_a_model_folder_cannot_run_code(tmp_path, tiny_folder, refused, kind, monkeypatch):
    folder = tmp_path / "model"
    common.shutil.copytree(tiny_folder, folder)
    bomb = Bomb(tmp_path / "ran")
    config = json.loads((folder / "config.json").read_text())
    if kind == "code":
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
                                        "class Evil: pass\n")
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil",
                                                      "AutoModelForCausalLM": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "pickle":  # even a good one is no safetensors file
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "weights":
        (folder / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": bomb}, folder / "pytorch_model.bin")
    else:
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "base_model_name_or_path": tiny_folder, "r": 2,
            "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}))
        torch.save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": bomb},
                   folder / "adapter_model.bin")
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # what a user might answer
    refused(gcpo.main, *SMALL, "--model", folder, "--dataset", "tiny", "--steps", 1, "--out",
            tmp_path / "r")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, says", [
    ({"lr": "fast"}, "--lr"), ({"method": "ppo"}, "--method"), ({"steps": [1]}, "--steps"),
    ({"group": 2.5}, "--group"), ({"golden_clip": "perhaps"}, "golden_clip"),
    ({"lr": -1}, "--lr"), ({"seed": 2**63}, "--seed"), ({"model": 3.5}, "--model")])
def test_a_config_from_somebody_else(four, refused, change, says):
    path = four / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"config": about["config"] | change}))
    assert says in refused(gcpo.main, "--resume", four, "--steps", 6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"script": "gcpo", "config": []}', "\x00",
                                  '{"script": "gcpo", "config": {"model": "tiny"}', "[" * 10**5])
def test_a_config_that_is_none(tmp_path, refused, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(gcpo.main, "--resume", tmp_path)


def test_a_checkpoint_of_another_model(four, refused):
    folder = four / "checkpoint"
    saved = load_file(folder / "weights.safetensors")
    saved.pop(sorted(saved)[0])
    save_file(saved, folder / "weights.safetensors")
    rewrite(folder)
    about = json.loads((folder / "about.json").read_text())
    about["sha256"]["weights.safetensors"] = common.sha256_of(folder / "weights.safetensors")
    (folder / "about.json").write_text(json.dumps(about))
    assert "is not a checkpoint of this run" in refused(gcpo.main, "--resume", four, "--steps", 6)


TINY_DAMAGE = [
    (gcpo, "arithmetic", None, "arithmetic is missing"),
    (gcpo, "arithmetic/chat_template.jinja", None, "chat_template.jinja is missing"),
    (gcpo, "arithmetic/tokenizer.json", None, "tokenizer.json is missing"),
    (gcpo, "arithmetic/model.safetensors", 1000, "--model tiny"),
    (gcpo, "arithmetic/train.jsonl", None, "train.jsonl is missing"),
    (gcpo, "arithmetic/train.jsonl", 1000, "is not valid JSON"),
    (gcpo, "arithmetic/train.jsonl", 0, "cannot be read (Is a directory)"),
    (light_if, "constraints/test.jsonl", None, "test.jsonl is missing"),
    (light_if, "constraints/test.jsonl", 1000, "is not valid JSON"),
    (temporal_sr, "forms/base/model.safetensors", 1000, "--model"),
    (temporal_sr, "forms/prompts.jsonl", 1000, "is not valid JSON"),
    (temporal_sr, "forms/eft.jsonl", {"prompt": "q", "response": "a"}, "no judgement column"),
    (temporal_sr, "forms/words.json", 100, "words.json cannot be read")]


@pytest.mark.parametrize("script, name, left, says", TINY_DAMAGE)
def test_a_missing_or_damaged_tiny_says_so(tmp_path, worlds, refused, monkeypatch, script, name,
                                           left, says):
    """`left`: None of it, so many bytes, a folder in its place (0), or this row only"""
    folder = tmp_path / "tiny"
    path = folder / name
    common.shutil.copytree(worlds, folder)
    monkeypatch.setattr(common, "TINY_FOLDER", folder)
    temporal_sr.form_words.cache_clear()
    if path.is_dir():
        common.shutil.rmtree(path)
    elif isinstance(left, dict):
        path.write_text(json.dumps(left))
    else:
        content = path.read_bytes()
        path.unlink()
        if left:
            path.write_bytes(content[:left])
        elif left == 0:
            path.mkdir()
    flags = ["--sft_steps", 2] if script is temporal_sr else []
    if "words" in name:
        flags = ["--prompts", 2]
    error = refused(script.main, "--out", tmp_path / "r", "--eval_size", 4, *flags)
    temporal_sr.form_words.cache_clear()
    assert says in error and str(folder) in error and "copy it anew" in error




# ---------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_end_the_sampling(tiny, policy, capsys, bad, temperature):
    with torch.no_grad():
        policy.get_output_embeddings().weight[7, 3] = bad
    with pytest.raises(SystemExit) as stop:
        common.sample(policy, tiny[1], [(5, 6, 7)], 4, 8, temperature)
    assert stop.value.code == 2 and "logits of the model are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("where, says", [
    ("gradient", "the gradient norm nan"), ("weights", "log-probability nan"),
    ("metric", "optim/grad_norm is inf")])
def test_the_step_the_number_and_the_checkpoint_are_named(tmp_path, monkeypatch, refused, where,
                                                          says):
    real, seen = gcpo.update, []

    def breaks(opt, *a):
        seen.append(0)
        if len(seen) == 3 and where == "gradient":
            opt.masters[0].grad[0, 0] = float("nan")
        norm = real(opt, *a)
        if len(seen) == 3 and where == "weights":
            opt.masters[0].data.fill_(float("nan"))
        return float("inf") if len(seen) == 3 and where == "metric" else norm

    monkeypatch.setattr(gcpo, "update", breaks)
    error = refused(gcpo.main, *SMALL, "--steps", 6, "--out", tmp_path / "r", "--eval_every", 0)
    assert says in error and "the last good checkpoint is of step 2" in error
    assert ("step 4" if where == "weights" else "step 3") in error
    saved = load_file(tmp_path / "r" / "checkpoint" / "weights.safetensors")
    assert all(w.isfinite().all() for w in saved.values())


@pytest.mark.parametrize("name", sorted(fault.FLAGS))
def test_no_response_ever_ends(tmp_path, name):
    """All responses are cut off after their first token: nothing to learn, and no accident."""
    code = """if True:
        import sys; sys.path[:0] = [".", "benchmarks"]
        import common, fault, temporal_sr
        def cut(*a):
            found = real(*a)
            for s in found:
                s.tokens, s.logps, s.finished, s.read = s.tokens[:1], s.logps[:1], False, ()
                s.text = "x"
            return found
        if sys.argv[1] == "temporal_sr":  # answers, not judgements
            real, temporal_sr.Models.sample = temporal_sr.Models.sample, cut
        else:
            real, common.decode = common.decode, cut
        fault.child(sys.argv[1], {}, sys.argv[2:])"""
    argv = [*fault.FLAGS[name].split(), "--out", str(tmp_path / "r")]
    argv += {"light_if": ["--sft", "none"], "gcpo": ["--golden", "off"],
             "laser": ["--c_ref", "-12"]}.get(name, [])
    done = subprocess.run([sys.executable, "-c", code, name, *argv], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in text_of(tmp_path / "r")[0].splitlines()]
    assert all(r["sample/truncated"] == 1 for r in rows if "sample/truncated" in r)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["after"].get("accuracy", 0) == 0


@pytest.mark.parametrize("name", ["gcpo", "laser", "light_if"])
def test_a_group_of_one_has_nothing_to_compare(tmp_path, refused, name):
    main = importlib.import_module(name).main
    assert "at least 2" in refused(main, "--group", 1, "--out", tmp_path / "r")


def test_empty_batches(tiny, policy):
    assert list(common.micro_batches([], 10)) == [] and common.as_samples(tiny[1], [], []) == []
    assert common.sample(policy, tiny[1], [], 2, 4, 1.0) == []
    cfg = SimpleNamespace(micro_tokens=10, device="cpu", temperature=1.0)
    end = tiny[1].eos_token_id  # a response that is nothing but its end
    one = common.Sample((5,), [end], "", True)
    assert common.batch_logps(policy, [one], cfg).shape == (1, 2)
    ids, mask = common.collate([one], "cpu")
    logp, _ = common.response_logps(policy, ids, torch.zeros_like(mask), 1.0)
    assert logp.shape == (1, 2) and not logp.any(), "no response position at all"
