"""Checkpoints: a resumed run equals one that never stopped, and no damage goes unnoticed."""

import dataclasses
import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows
from crash import crash_table
from runs import differences, make_inputs, metrics, refused, run

import train
from support import files, on_policy, run_folder, weights
from support.files import locked
from support.run_folder import catch_signals, newest_checkpoint, read_record

# 9 steps; the checkpoints of steps 8 and 9 remain.
SAVED = ("--save_every", "2", "--epochs", "3", "--log_every", "2", "--eval_every", "4")


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run_folder.checkpoints(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """init, pairs.jsonl, and the run of SAVED in `out`, which tests copy before they change it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(*make_inputs(folder), folder / "out", *SAVED)
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    return shutil.copytree(undisturbed / "out", tmp_path / "copied")


# --- Exact resumption -----------------------------------------------------------------------------

# Pairwise with a reference, with answers of other rows, without a reference, with adapters, with a
# default of --beta that comes from the data.
KINDS = {
    "mio": ("--loss", "mio"),
    "bfloat16": ("--loss", "mio", "--dtype", "bfloat16"),
    "kto": ("--loss", "kto"),
    "simpo": ("--loss", "simpo"),
    "lora": ("--loss", "mio", "--lora_rank", "2"),
    "weights": ("--loss", "mio", "--weights", "bfloat16"),
    "averages": ("--loss", "mio", "--average_logps"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_n_steps_and_n_after_a_resume_equal_two_n_steps(kind, checkpoint, pairs_file, tmp_path):
    flags = (*KINDS[kind], "--micro_tokens", "200", *SAVED)
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *flags, "--max_steps", "4")
    half = run(checkpoint, pairs_file, tmp_path / "half", *flags, "--max_steps", "2")
    torch.manual_seed(99)  # no random number depends on the state of this generator
    if kind != "lora":
        shutil.rmtree(checkpoint)  # the saved checkpoint holds all that is needed
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # and the reference of step 0
    train.main(["--resume", "--out", str(half), "--max_steps", "4"])
    assert not (tmp_path / "cache").exists()
    assert differences(whole, half) == []
    assert [row["step"] for row in metrics(half)] == [0, 2, 4] and steps(half) == [2, 4]


@pytest.mark.parametrize("flags", [["--loss", "rlhf"], ["--on_policy"]])
def test_draws_after_a_resume_equal_those_of_a_run_that_never_stopped(
    flags, checkpoint, pairs_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(on_policy, "grade_answer", lambda i, t, answer: answer[0] % 2 / 1)
    rows = [{"prompt": f"{i}?", "answer": "1", "grade": "exact"} for i in range(20)]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    flags += ["--eval_data", str(pairs_file), "--max_new_tokens", "4", "--samples", "4", *SAVED]
    whole = run(checkpoint, questions, tmp_path / "whole", *flags, "--max_steps", "4")
    half = run(checkpoint, questions, tmp_path / "half", *flags, "--max_steps", "2")
    train.main(["--resume", "--out", str(half), "--max_steps", "4"])
    assert differences(whole, half) == []


def test_a_run_with_fewer_steps_is_the_beginning_of_a_longer_one(undisturbed, tmp_path, capsys):
    whole, flags = undisturbed / "out", (*SAVED, "--log_every", "1")
    init, data = undisturbed / "init", undisturbed / "pairs.jsonl"
    part = run(init, data, tmp_path / "part", *flags, "--max_steps", "5")
    assert [row["step"] for row in metrics(part)] == [0, 1, 2, 3, 4, 5]
    assert [row for row in metrics(part) if row["step"] % 2 == 0] == metrics(whole)[:3]
    assert json.loads((part / "summary.json").read_text())["step"] == 5
    moved = part.rename(tmp_path / "moved")
    (moved / "checkpoints/step-000013").touch()  # neither of these is a checkpoint
    (moved / "checkpoints/step-٣").mkdir()
    more = ("--max_steps", "100", "--keep", "1", "--log_every", "2", "--device", "auto")
    train.main(["--resume", "--out", str(moved), *more])
    assert metrics(moved)[6:] == metrics(whole)[3:] and steps(moved) == [9]
    error = refused("--resume", "--out", moved, "--max_steps", "7")
    assert "step-000009: is beyond step 7; raise --epochs or --max_steps" in error
    for name in ("summary.json", "model.safetensors"):  # as if the run had died before both
        (moved / name).unlink()
    train.main(["--resume", "--out", str(moved)])
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, moved))
    assert one["table"] == other["table"] and one["loss"] == other["loss"]
    assert "the learning-rate schedule" not in capsys.readouterr().out
    longer = train.main(["--resume", "--out", str(moved), "--epochs", "4"])
    assert metrics(longer)[-1]["step"] == 12 and steps(longer) == [12]
    schedule = "--epochs 4: the learning-rate schedule now spans 12 steps, so the learning rate "
    assert schedule + "jumps at step 10\n" in capsys.readouterr().out
    # Step 9 was the last of 9, and step 10 is as far as if there had been 12 from the beginning.
    options, rows = train.Options(lr=1e-3), metrics(longer)
    found = {row["step"]: row["learning_rate"] for row in rows[1:]}
    assert found[8] == train.learning_rate(options, 8, 9)
    assert found[10] == train.learning_rate(options, 10, 12) > found[8]


def test_a_run_that_max_steps_ended_can_go_on_to_its_end(checkpoint, pairs_file, tmp_path):
    flags = ("--epochs", "2", "--log_every", "3", "--eval_every", "4")  # 6 steps
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *flags)
    half = run(checkpoint, pairs_file, tmp_path / "half", *flags, "--max_steps", "2")
    assert steps(whole) == [] and steps(half) == [2]
    train.main(["--resume", "--out", str(half), "--max_steps", "1000"])
    assert metrics(half) == metrics(whole) and metrics(half)[-1]["step"] == 6
    assert differences(whole, half) == sorted(
        str(path.relative_to(half)) for path in half.glob("checkpoints/step-000002/*")
    )
    one, other = (json.loads((f / "summary.json").read_text()) for f in (whole, half))
    assert one["table"] == other["table"]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(undisturbed, copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "summary.json").unlink()
    train.main(["--resume", "--out", str(copied)])
    assert differences(undisturbed / "out", copied) == []


def test_a_changed_flag_is_refused_by_name(copied):
    resume = ("--resume", "--out", copied)
    values = {"loss": "dpo", "schedule": "linear", "dtype": "bfloat16", "compile": "off"}
    values |= {"checkpointing": "on", "warmup": "0.7", "eval_fraction": "0.3"}
    values |= {"label_smoothing": "0.2", "epsilon": "0.2"}
    values |= {"plan": "llama-3.2-1b", "gpu": "a100", "weights": "bfloat16"}
    free = {*run_folder.MAY_CHANGE, *run_folder.FILES, "device", "config", "resume", "overwrite"}
    for field in dataclasses.fields(train.Options):
        if field.name not in free:
            value = [] if field.type is bool else [values.get(field.name, "77")]
            error = refused(*resume, f"--{field.name}", *value)
            assert f"--{field.name}" in error and f"leave out --{field.name}" in error
    assert "--eval_data" in refused(*resume, "--eval_data", "gone.jsonl")  # the run had none
    assert "--device cuda:99" in refused(*resume, "--device", "cuda:99")
    assert "choose one" in refused(*resume, "--overwrite")
    assert steps(copied) == [8, 9]


def test_a_changed_file_is_refused_by_name(checkpoint, pairs_file, tmp_path):
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED, "--max_steps", "2")
    resume = ("--resume", "--out", out, "--max_steps", "4")
    other = write_rows(tmp_path / "other.jsonl", PAIR_ROWS[1:])
    remedy = "has changed since the run started; restore the input, or start again with --overwrite"
    assert f"--data {other}: {remedy}" in refused(*resume, "--data", other)
    tiny_model(seed=3).save_pretrained(checkpoint)
    other = shutil.copytree(checkpoint, tmp_path / "another")
    assert f"--init {other}: {remedy}" in refused(*resume, "--init", other)
    same = shutil.copy(pairs_file, tmp_path / "moved.jsonl")  # a name does not count
    train.main([*map(str, resume), "--data", str(same), "--loss", "mio", "--lr", "1e-3"])
    assert steps(out) == [2, 4]


def test_held_out_pairs_count_as_input(checkpoint, pairs_file, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", PAIR_ROWS[:4])
    flags = ("--eval_data", str(held_out), "--save_every", "1", "--max_steps", "1")
    out = run(checkpoint, pairs_file, tmp_path / "out", *flags)
    write_rows(held_out, PAIR_ROWS[:3])
    assert f"--eval_data {held_out}: has changed" in refused("--resume", "--out", out)


def test_without_anything_to_resume_the_reason_is_named(undisturbed, copied, tmp_path):
    shutil.rmtree(copied / "checkpoints")
    error = refused("--resume", "--out", copied)
    assert "is finished and has no checkpoints" in error and "--overwrite" in error
    assert (copied / "model.safetensors").is_file()
    error = refused("--resume", "--out", tmp_path / "nothing")
    assert "there is no run in" in error and not (tmp_path / "nothing").exists()


def test_without_out_a_run_is_looked_for_in_its_default_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "no run in out/dpo;" in refused("--resume", "--loss", "dpo")
    (tmp_path / "out/dpo").mkdir(parents=True)
    options = run_folder.recorded(train.Options(loss="dpo", beta=0.3, seed=5, overwrite=True))
    assert not options["resume"] and not options["overwrite"]
    (tmp_path / "out/dpo/train_config.json").write_text(json.dumps(options))
    flags = {"resume": True, "loss": "dpo", "epochs": 9}
    found = run_folder.resumed_options(flags, train.Options, Path("out/dpo"))
    assert train.Options(**found) == train.Options(
        loss="dpo", beta=0.3, seed=5, epochs=9, resume=True, out="out/dpo"
    )


def test_help_says_what_may_change(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split()).partition("these flags may change")[2]
    assert stop.value.code == 0 and all(f"--{name}" in text for name in run_folder.MAY_CHANGE)


# --- Crashes --------------------------------------------------------------------------------------


def test_killed_again_and_again_a_run_ends_as_if_undisturbed(checkpoint, pairs_file, tmp_path):
    counts = crash_table(4, tmp_path, flags="--lr 1e-3 --batch_size 8 --save_every 1 --epochs 2")
    assert counts["kills"] == 4 and counts["in a write"] > 0 and counts["runs compared"] >= 1
    assert counts["failures"] == counts["differences"] == 0


@pytest.mark.parametrize("victim", ["step-000004", "run/model.safetensors"])
def test_killed_while_it_writes_weights_a_run_resumes(victim, undisturbed, tmp_path, monkeypatch):
    """The last complete checkpoint is found again, and a half-written file is never read."""
    out, save_file = tmp_path / "run", weights.save_file

    def killed(tensors, path, **metadata):
        save_file(tensors, path, **metadata)
        if victim in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        weights.save_file = killed
        run(undisturbed / "init", undisturbed / "pairs.jsonl", out, *SAVED)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert steps(out) == ([2] if "step" in victim else [8, 9])
    assert list(out.rglob("*.partial")) and not (out / "model.safetensors").exists()
    read_record(newest_checkpoint(out))
    train.main(["--resume", "--out", str(out)])
    assert differences(undisturbed / "out", out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number, undisturbed, tmp_path, monkeypatch, capsys):
    step, handlers, count = train.train_step, [signal.getsignal(number)], [0]

    def interrupted(*args, **more):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), number)
        return step(*args, **more)

    monkeypatch.setattr(train, "train_step", interrupted)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(undisturbed / "init", undisturbed / "pairs.jsonl", out, *SAVED)
    assert stop.value.code == 128 + number and count == [3]
    assert f"train.py --resume --out {out}" in capsys.readouterr().err
    assert handlers == [signal.getsignal(number)] and steps(out) == [2, 3]
    train.main(["--resume", "--out", str(out)])
    assert differences(undisturbed / "out", out) == []


def test_a_second_signal_ends_the_process_at_once():
    child = os.fork()
    if child == 0:
        with catch_signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_files_are_flushed_before_they_take_their_name_and_old_ones_go_last(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    flushed, named, removed = set(), [], []
    flush, replace, remove = files.flush_to_disk, os.replace, shutil.rmtree

    def flushing(path):
        flush(path)
        flushed.add(Path(path))

    def naming(source, target):
        assert flushed.issuperset([Path(source), *Path(source).rglob("*")]), source
        replace(source, target)
        named.append(Path(target))

    def removing(path, **options):
        if Path(path).exists():
            assert len(run_folder.checkpoints(tmp_path / "out")) == 2  # the newer ones exist
            removed.append(Path(path).name)
        remove(path, **options)

    monkeypatch.setattr(files, "flush_to_disk", flushing)
    monkeypatch.setattr(run_folder, "flush_to_disk", flushing)
    monkeypatch.setattr(os, "replace", naming)
    monkeypatch.setattr(shutil, "rmtree", removing)
    out = run(checkpoint, pairs_file, tmp_path / "out", *SAVED)
    assert removed == [f"step-{step:06}.partial" for step in (2, 4, 6)] and steps(out) == [8, 9]
    assert out / "metrics.jsonl" in flushed
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    inputs = {*checkpoint.iterdir(), pairs_file, *out.glob("tokenizer*")}
    in_folders = {path for path in written if path.parent in named}
    assert written - inputs - in_folders <= {*named, out / "metrics.jsonl"}


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(undisturbed, tmp_path, monkeypatch):
    out, step = tmp_path / "out", train.train_step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(*args, **more):
        if steps(out) == [2]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return step(*args, **more)

    monkeypatch.setattr(train, "train_step", fill_disk)
    command = ["--init", undisturbed / "init", "--data", undisturbed / "pairs.jsonl", "--out", out]
    try:
        error = refused(*command, "--batch_size", "8", "--lr", "1e-3", "--seed", "1", *SAVED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000004" in error and "File too large" in error and "--resume" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert differences(undisturbed / "out", out) == []


def test_numbers_that_blow_up_leave_the_last_good_checkpoint(checkpoint, pairs_file, tmp_path):
    flags = ("--save_every", "1", "--schedule", "constant", "--warmup", "0", "--epochs", "2")
    command = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "bad"]
    error = refused(*command, "--batch_size", "8", "--lr", "1e30", *flags)
    assert "step 2: the loss or the gradient is not finite for line" in error
    assert steps(tmp_path / "bad") == [1]
    read_record(newest_checkpoint(tmp_path / "bad"))


# --- A folder has one run, and what is damaged is noticed -----------------------------------------


def forked_holder(folder: Path):
    """A process that locks a folder once `go` is closed, and holds the lock until it is killed.
    Returns its id, and functions to let it go and to wait for its lock."""
    (go, go_end), (ready, ready_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go_end)
        os.read(go, 1)
        with locked(folder, "waiting"):
            os.write(ready_end, b"!")
            signal.pause()
    return child, lambda: os.close(go_end), lambda: os.read(ready, 1)


def test_a_folder_has_one_run_at_a_time_and_a_dead_one_holds_no_lock(undisturbed, copied):
    init, data = undisturbed / "init", undisturbed / "pairs.jsonl"
    child, go, wait = forked_holder(copied)
    go()
    wait()
    for flags in (["--resume"], ["--overwrite", "--init", init, "--data", data]):
        assert "another run" in refused("--out", copied, *flags)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train.main(["--resume", "--out", str(copied), "--epochs", "4", "--max_steps", "10"])
    assert steps(copied) == [9, 10]


def test_a_lock_that_was_waited_for_keeps_others_out(tmp_path):
    child, go, wait = forked_holder(tmp_path)
    with locked(tmp_path):
        with pytest.raises(ValueError, match="another run"), locked(tmp_path):
            pass
        go()
        time.sleep(0.1)  # the other process most likely waits now; the test passes in either case
    wait()
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):  # the lock that the process waited for is exclusive
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(handle)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass


def test_one_flipped_bit_in_any_file_is_noticed(copied):
    newest = newest_checkpoint(copied)
    names = {file.name for file in newest.iterdir()}
    assert names >= {"model.safetensors", "training.safetensors", "training.json", "SHA256SUMS"}
    for file in [*newest.iterdir(), copied / "metrics.jsonl"]:
        truth = file.read_bytes()
        for place in (0, len(truth) // 2, len(truth) - 1):
            damaged = bytearray(truth)
            damaged[place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            error = refused("--resume", "--out", copied)
            # A wrong line in SHA256SUMS looks like a wrong file, which is then named.
            assert (file.name if file.name != "SHA256SUMS" else str(newest)) in error, error
            assert "remove" in error or "restore" in error
        file.unlink()
        assert str(file) in refused("--resume", "--out", copied)
        file.write_bytes(truth)
    (newest / "extra").write_text("")
    assert "extra" in refused("--resume", "--out", copied)
    shutil.rmtree(newest)  # as the message says, to resume from the checkpoint before
    train.main(["--resume", "--out", str(copied)])
    assert steps(copied) == [8, 9] and [r["step"] for r in metrics(copied)] == [0, 2, 4, 6, 8, 9]


def test_a_record_of_another_step_or_format_is_refused(copied):
    newest = newest_checkpoint(copied)
    renamed = newest.rename(newest.with_name("step-000011"))
    assert "training.json: is not a record of this step" in refused("--resume", "--out", copied)
    newest = renamed.rename(newest)
    record = json.loads((newest / "training.json").read_text())
    for wrong in (record | {"extra": 1}, {k: v for k, v in record.items() if k != "inputs"}):
        (newest / "training.json").write_text(json.dumps(wrong))
        (newest / "SHA256SUMS").write_text("".join(run_folder.checksums(newest)))
        error = refused("--resume", "--out", copied)
        assert "training.json: is not a record" in error and f"remove {newest}" in error


def test_no_pickle_is_read_or_written(undisturbed, copied, monkeypatch):
    """Unpickling runs code, so a checkpoint with a pickle could run a stranger's program."""

    def refuse(*args, **more):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    with pytest.raises(AssertionError, match="pickle was used"):
        torch.save({}, io.BytesIO())
    shutil.rmtree(newest_checkpoint(copied))
    train.main(["--resume", "--out", str(copied)])
    found = [path for path in undisturbed.rglob("*") if path.is_file()]
    assert len(found) > 20
    for path in found:
        head = path.read_bytes()[:9]
        if path.suffix == ".safetensors":  # the length of a JSON header, then the header
            assert head[8:] == b"{" and int.from_bytes(head[:8], "little") < 10_000, path
        else:  # text: a protocol of pickle starts with byte 0x80, a zip file of torch.save with PK
            assert head.isascii() and head[:1] in b"{0123456789abcdef", path
            path.read_bytes().decode()
