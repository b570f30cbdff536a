"""Checkpoints: what is resumed equals what was never stopped, and no damage goes unnoticed."""

import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows
from crash import crash_table, differences, metrics
from test_train import run

import model as model_module
import train

SAVED = ("--save_every", "2", "--epochs", "3", "--log_every", "2", "--eval_every", "4")


def refused(capsys, *argv) -> str:
    """The one line on standard error with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(arg) for arg in argv])
    error = capsys.readouterr().err.rpartition("\r")[2]
    assert stop.value.code == 2 and error.startswith("train.py: error: "), error
    assert error.count("\n") == 1
    return error


def steps(folder: Path) -> list[int]:
    return sorted(map(train.step_of, train.checkpoints(folder)))


# --- Exact resume ---------------------------------------------------------------------------------


# Pairwise, of the whole batch, of its own pairs and others, without a reference, of one answer.
KINDS = [("mio", "bfloat16"), *((name, "float32") for name in ("mio", "dv", "kto", "simpo", "sft"))]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_n_steps_and_n_more_after_a_resume_are_two_n_steps(
    name, dtype, checkpoint, pairs_file, tmp_path, monkeypatch
):
    flags = ("--loss", name, "--dtype", dtype, "--micro_tokens", "200", *SAVED)
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *flags, "--max_steps", "8")
    half = run(checkpoint, pairs_file, tmp_path / "half", *flags, "--max_steps", "4")
    before = torch.get_rng_state()
    torch.manual_seed(99)
    monkeypatch.setattr(train, "reference_logps", None)  # it is still that of step 0
    shutil.rmtree(checkpoint)  # a checkpoint holds all that is needed
    train.main(["--resume", "--out", str(half), "--max_steps", "8"])
    assert differences(whole, half) == [] and torch.equal(torch.get_rng_state(), before)
    assert [row["step"] for row in metrics(half)] == [0, 2, 4, 6, 8]
    assert steps(half) == [6, 8]


@pytest.mark.parametrize("flags", [["--loss", "rlhf"], ["--on_policy"]])
def test_draws_after_a_resume_are_those_of_a_run_never_stopped(
    flags, checkpoint, pairs_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.evaluation, "grade_drawn", lambda i, t, answer: answer[0] % 2 / 1)
    rows = [{"prompt": f"{i}?", "answer": "1", "grade": "exact"} for i in range(20)]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    flags += ["--eval_data", str(pairs_file), "--max_new_tokens", "4", "--samples", "4", *SAVED]
    whole = run(checkpoint, questions, tmp_path / "whole", *flags, "--max_steps", "8")
    half = run(checkpoint, questions, tmp_path / "half", *flags, "--max_steps", "4")
    train.main(["--resume", "--out", str(half), "--max_steps", "8"])
    assert differences(whole, half) == []


def test_a_run_with_fewer_steps_is_the_beginning_of_the_whole_run(
    checkpoint, pairs_file, tmp_path, capsys
):
    every = ("--log_every", "1")
    flags = (*SAVED, *every)
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *flags)
    part = run(checkpoint, pairs_file, tmp_path / "part", *flags, "--max_steps", "5")
    assert metrics(part) == [row for row in metrics(whole) if row["step"] <= 5]
    assert json.loads((part / "summary.json").read_text())["step"] == 5
    moved = part.rename(tmp_path / "moved")
    (moved / "checkpoints/step-000001").touch()  # no checkpoints of ours
    (moved / "checkpoints/step-٣").mkdir()
    train.main(["--resume", "--out", str(moved), "--max_steps", "100", "--keep", "1"])
    assert metrics(whole) == metrics(moved) and steps(moved) == [9]
    error = refused(capsys, "--resume", "--out", moved, "--max_steps", "7")
    assert "step-000009: is beyond the 7 steps" in error
    for name in ("summary.json", "model.safetensors"):  # as if it had died before these
        (moved / name).unlink()
    train.main(["--resume", "--out", str(moved)])
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, moved))
    assert a["table"] == b["table"] and a["loss"] == b["loss"]
    longer = train.main(["--resume", "--out", str(moved), "--epochs", "4"])
    assert metrics(longer)[:-3] == metrics(whole) and metrics(longer)[-1]["step"] == 12


def test_a_changed_flag_or_file_is_refused_by_name(checkpoint, pairs_file, tmp_path, capsys):
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED, "--max_steps", "2")
    resume = ("--resume", "--out", out, "--max_steps", "4")
    changes = {"loss": "dpo", "schedule": "linear", "dtype": "bfloat16", "compile": "off"}
    changes |= {"checkpointing": "on", "warmup": "0.7", "eval_fraction": "0.3"}
    changes |= {"label_smoothing": "0.2", "epsilon": "0.2"}
    changes |= {"plan": "llama-3.2-1b", "gpu": "a100", "mfu": "0.5"}
    same = {*train.MAY_CHANGE, *train.FILES, "device", "config", "resume", "overwrite"}
    for name in {field.name for field in dataclasses.fields(train.Options)} - same:
        value = [] if name in ("on_policy", "lora_rslora") else [changes.get(name, "77")]
        error = refused(capsys, *resume, f"--{name}", *value)
        assert f"--{name}" in error and f"leave out --{name}" in error
    other = write_rows(tmp_path / "other.jsonl", PAIR_ROWS[1:])
    assert "--data" in refused(capsys, *resume, "--data", other)
    tiny_model(seed=3).save_pretrained(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "another")
    assert "--init" in refused(capsys, *resume, "--init", tmp_path / "another")
    assert "choose one" in refused(capsys, *resume, "--overwrite")
    done = run(checkpoint, pairs_file, tmp_path / "done", "--max_steps", "1")
    assert "kept no checkpoints" in refused(capsys, "--resume", "--out", done)
    assert (done / "model.safetensors").is_file()
    error = refused(capsys, "--resume", "--out", tmp_path / "nothing")
    assert "there is no run in" in error and not (tmp_path / "nothing").exists()
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(f"--{name}" in help_text for name in train.MAY_CHANGE)
    same_file = shutil.copy(pairs_file, tmp_path / "moved.jsonl")  # what it holds is what counts
    train.main([*map(str, resume), "--data", str(same_file), "--loss", "mio", "--lr", "1e-3"])
    assert steps(out) == [2, 4]


# --- Crashes --------------------------------------------------------------------------------------


def test_killed_again_and_again_a_run_ends_as_if_left_alone(checkpoint, pairs_file, tmp_path):
    counts = crash_table(4, tmp_path)
    assert counts["kills"] == 4 and counts["runs compared"] >= 1
    assert counts["failures"] == counts["differences"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    number, checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *SAVED)
    step, handlers = train.train_step, [signal.getsignal(number)]

    def interrupted(*args):
        interrupted.steps += 1
        if interrupted.steps == 3:
            os.kill(os.getpid(), number)
        return step(*args)

    interrupted.steps = 0
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, pairs_file, tmp_path / "out", *SAVED)
    assert stop.value.code == 128 + number and interrupted.steps == 3
    assert f"train.py --resume --out {tmp_path / 'out'}" in capsys.readouterr().err
    assert handlers == [signal.getsignal(number)] and steps(tmp_path / "out") == [2, 3]
    train.main(["--resume", "--out", str(tmp_path / "out")])
    assert differences(whole, tmp_path / "out") == []


def test_a_second_signal_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        with train.noted_signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_what_takes_a_name_was_flushed_and_the_old_goes_after_the_new(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    flushed, named, removed = set(), [], []
    flush, replace, remove = model_module.flush_to_disk, os.replace, shutil.rmtree

    def flushing(path):
        flush(path)
        flushed.add(Path(path))

    def naming(source, target):
        inner = [Path(source), *Path(source).rglob("*")]
        assert flushed.issuperset(inner), source
        replace(source, target)
        named.append(Path(target))

    def removing(path, **options):
        assert len(train.checkpoints(tmp_path / "out")) == 2  # the newer ones are there
        removed.append(Path(path).name)
        remove(path, **options)

    monkeypatch.setattr(model_module, "flush_to_disk", flushing)
    monkeypatch.setattr(train, "flush_to_disk", flushing)
    monkeypatch.setattr(os, "replace", naming)
    monkeypatch.setattr(shutil, "rmtree", removing)
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED)
    assert removed == [f"step-{step:06}.partial" for step in (2, 4, 6)] and steps(out) == [8, 9]
    whole = {path for path in tmp_path.rglob("*") if path.is_file()}
    inputs = {*checkpoint.iterdir(), pairs_file, *out.glob("tokenizer*")}
    in_folders = {path for path in whole if path.parent in named}
    assert whole - inputs - in_folders <= set(named)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    out, step = tmp_path / "out", train.train_step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        if steps(out) == [2]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return step(*args)

    monkeypatch.setattr(train, "train_step", full)
    command = ["--init", checkpoint, "--data", pairs_file, "--out", out, "--batch_size", "8"]
    try:
        error = refused(capsys, *command, "--lr", "1e-3", "--seed", "1", *SAVED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000004" in error and "File too large" in error and "--resume" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert differences(run(checkpoint, pairs_file, tmp_path / "whole", *SAVED), out) == []


def test_one_run_to_a_folder_and_a_dead_one_holds_no_lock(checkpoint, pairs_file, tmp_path, capsys):
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED, "--max_steps", "2")
    ready, child = os.pipe(), os.fork()
    if child == 0:
        handle = os.open(out, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(ready[1], b"!")
        signal.pause()
    os.read(ready[0], 1)
    for flag in ("--resume", "--overwrite"):
        command = ["--init", checkpoint, "--data", pairs_file, "--out", out] * (flag[2] == "o")
        assert "another run is at work there" in refused(capsys, *command, "--out", out, flag)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with train.claimed(out), pytest.raises(ValueError), train.claimed(out):
        pass
    train.main(["--resume", "--out", str(out), "--max_steps", "4"])
    assert steps(out) == [2, 4]


def test_one_flipped_bit_in_any_file_is_noticed(checkpoint, pairs_file, tmp_path, capsys):
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED, "--max_steps", "4")
    newest = train.newest_checkpoint(out)
    names = {file.name for file in newest.iterdir()}
    assert names >= {"model.safetensors", "training.safetensors", "training.json", "SHA256SUMS"}
    for file in [*newest.iterdir(), out / "metrics.jsonl"]:
        truth = file.read_bytes()
        for place in (0, len(truth) // 2, len(truth) - 1):
            damaged = bytearray(truth)
            damaged[place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            error = refused(capsys, "--resume", "--out", out, "--max_steps", "6")
            # A wrong line and a wrong file look alike: the file is named.
            assert (file.name if file.name != "SHA256SUMS" else str(newest)) in error, error
        file.unlink()
        assert str(file) in refused(capsys, "--resume", "--out", out, "--max_steps", "6")
        file.write_bytes(truth)
    (newest / "extra").write_text("")
    assert "extra" in refused(capsys, "--resume", "--out", out, "--max_steps", "6")
    shutil.rmtree(newest)  # as the message says: on from the one before
    train.main(["--resume", "--out", str(out), "--max_steps", "4"])
    assert steps(out) == [2, 4] and [row["step"] for row in metrics(out)] == [0, 2, 4]


def test_numbers_that_blow_up_leave_the_last_good_checkpoint(
    checkpoint, pairs_file, tmp_path, capsys
):
    flags = ("--save_every", "1", "--schedule", "constant", "--warmup", "0", "--epochs", "2")
    command = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "bad"]
    error = refused(capsys, *command, "--batch_size", "8", "--lr", "1e30", *flags)
    assert "step 2: loss or gradient not finite, from line" in error
    assert steps(tmp_path / "bad") == [1]
    train.read_checkpoint(train.newest_checkpoint(tmp_path / "bad"))


def test_no_pickle_is_read_or_written(checkpoint, pairs_file, tmp_path):
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert path.suffix in (".safetensors", ".json", ".jsonl") or path.name == "SHA256SUMS"
    root = Path(train.__file__).parent
    for name in ("mio", "model", "data", "train", "eval"):
        text = (root / f"{name}.py").read_text()
        assert "pickle" not in text and "torch.load" not in text and "torch.save" not in text
    assert out.is_dir()
