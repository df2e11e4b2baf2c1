"""What happens to a run at night: signals, damaged checkpoints, a full disk, a full GPU, numbers
that are not finite. benchmarks/fault.py kills real runs."""

import errno
import math
import os
import shutil
import signal

import pytest
import torch

import common
import gcpo
import temporal_sr

FLAGS = "--prompts 4 --group 3 --max_new_tokens 48 --eval_size 10 --lr 1e-3 --warmup_steps 0" \
        " --steps 6 --save_every 2 --eval_every 2".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing takes longer than such a run. The handlers of signals are given back."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda run: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, worlds):
    """-> the folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "r"
    gcpo.main([*FLAGS, "--out", str(out)])
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "r"


def disturbed(argv, code, act, owner, name, call=1, main=gcpo.main):
    """Calls main; `act` comes before the n-th call of a function, and main ends with `code`."""
    real, calls = getattr(owner, name), []

    def acting(*a, **k):
        calls.append(0)
        if len(calls) == call:
            act(*a)
        return real(*a, **k)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(owner, name, acting)
        main([str(x) for x in argv])
    assert stop.value.code == code


def send(*numbers):
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


def raises(error):
    return lambda *_: (_ for _ in ()).throw(error)


def contents(out):
    """The logs and weights of a run."""
    return [(out / name).read_bytes() for name in (*common.LOGS, "model/model.safetensors")]


def resumed(out, main=gcpo.main):
    main(["--resume", str(out)])
    return contents(out)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(out, whole, capsys, damage):
    newest = shutil.copytree(whole, out) / "checkpoint/step_000006.pt"
    newest.write_bytes(newest.read_bytes()[:-99] if damage == "cut" else b"")
    if damage == "other":
        torch.save({"weights": {}}, newest)
    assert resumed(out) == contents(whole)
    said = capsys.readouterr().out.splitlines()
    assert sum("step_000006.pt cannot be used" in line for line in said) == 1
    assert [line for line in said if line.startswith("resuming") and "after step 4" in line]


def test_checkpoints_that_cannot_be_read_are_left_alone_and_run_no_code(out, whole, refused):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(out / 'ran')!r}, 'w').close()",)

    shutil.copytree(whole, out)
    [torch.save({"weights": Bomb()}, path) for path in out.glob("checkpoint/*")]
    assert "no checkpoint of it can be used" in refused(gcpo.main, "--resume", out)
    assert contents(out) == contents(whole) and not (out / "ran").exists()


def test_a_run_without_checkpoints_starts_again(out, whole):
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint")
    assert resumed(out) == contents(whole)


@pytest.mark.parametrize("numbers, last", [
    ([signal.SIGTERM], 3), ([signal.SIGINT], 3), ([signal.SIGTERM] * 2, 2)])
def test_a_signal_ends_the_run_after_its_step_and_a_second_one_at_once(out, whole, capsys, numbers,
                                                                       last):
    disturbed([*FLAGS, "--out", out], 130, send(*numbers), gcpo, "roll_out", 3)
    assert f"go on with: python gcpo.py --resume {out}" in capsys.readouterr().err
    assert max(out.glob("checkpoint/*")).stem == f"step_{last:06d}"
    assert resumed(out) == contents(whole)


def test_a_signal_in_a_product_costs_that_product_only(out, tmp_path, capsys):
    flags = [*FLAGS, "--golden", "tiny"]
    gcpo.main([*flags, "--out", str(tmp_path / "whole")])
    disturbed([*flags, "--out", out], 130, send(signal.SIGTERM), gcpo, "sample")
    assert "made anew; go on with: python gcpo.py --resume" in capsys.readouterr().err
    assert not (out / "golden.jsonl").exists() and not (out / "metrics.jsonl").exists()
    assert resumed(out) == contents(tmp_path / "whole")


def test_a_step_that_is_made_of_products_ends_at_once(out, tmp_path, capsys):
    flags = "--prompts 8 --group 3 --batch 4 --steps 2 --eval_size 4 --eval_samples 2".split()
    temporal_sr.main([*flags, "--out", str(tmp_path / "whole")])
    disturbed([*flags, "--out", out], 130, send(signal.SIGTERM), temporal_sr, "write_rows", 5,
              temporal_sr.main)
    assert "go on with: python temporal_sr.py --resume" in capsys.readouterr().err
    made = {p.name: p.stat().st_mtime_ns for p in out.glob("[12]-*") if p.suffix != ".new"}
    assert {"1-present.jsonl", "1-future.jsonl", "1-M_f.pt", "2-present.jsonl"} <= set(made)
    assert resumed(out, temporal_sr.main) == contents(tmp_path / "whole")
    assert all((out / name).stat().st_mtime_ns == time for name, time in made.items())


@pytest.mark.parametrize("owner, name, call, act, says", [
    (common.Run, "save", 2, lambda run: (run.folder / "checkpoint/new").symlink_to("/dev/full"),
     ""),  # torch hides what is wrong
    (common, "write_rows", 6, raises(OSError(errno.ENOSPC, "No space left on device")), "No space"),
    (gcpo, "roll_out", 3, raises(torch.OutOfMemoryError("CUDA out of memory")), "give --lora"),
    (gcpo, "update", 3, lambda opt, *_: opt.param_groups[0]["params"][0].grad.fill_(math.nan),
     "step 3: the gradient norm is nan")])
def test_one_line_says_what_is_wrong(out, whole, capsys, owner, name, call, act, says):
    disturbed([*FLAGS, "--out", out], 2, act, owner, name, call)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    (out / "checkpoint/new").unlink(missing_ok=True)
    assert resumed(out) == contents(whole)
