"""Run folders: what --out may name, and that no run or file is lost without a word."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from runs import make_inputs, metrics, refused, run

import train
from support import job, run_folder
from support.files import read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """init, pairs.jsonl, and a finished run with checkpoints in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    run(*make_inputs(folder), folder / "out", "--save_every", "1")
    return folder


@pytest.fixture
def inputs(finished):
    return ["--init", finished / "init", "--data", finished / "pairs.jsonl"]


# --- What --out may name --------------------------------------------------------------------------


def test_a_run_is_replaced_only_with_overwrite(finished, inputs, tmp_path):
    out = shutil.copytree(finished / "out", tmp_path / "out")
    (out / "notes.txt").write_text("dear")
    error = refused(*inputs, "--out", out, "--loss", "dpo")
    assert f"--out {out}: holds a run; use --resume, --overwrite or another --out" in error
    assert read_json(out / "train_config.json")["loss"] == "mio" and metrics(out)
    flags = ("--loss", "dpo", "--overwrite", "--max_steps", "1", "--out")
    train.main([*map(str, inputs), *flags, str(out)])
    assert read_json(out / "train_config.json")["loss"] == "dpo" and len(metrics(out)) == 2
    assert not (out / "checkpoints").exists() and (out / "notes.txt").read_text() == "dear"


def test_a_folder_with_other_files_or_with_inputs_is_refused(finished, inputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "mine" / "thesis.txt.5.partial").touch()
    before = sorted(finished.rglob("*"))
    assert "holds other files" in refused(*inputs, "--out", tmp_path / "mine")
    assert "is a file" in refused(*inputs, "--out", tmp_path / "mine" / "thesis.txt")
    init, data = finished / "init", finished / "pairs.jsonl"
    for place, source in ((init, init), (finished, init), (data, data)):
        error = refused(*inputs, "--out", place, "--overwrite")
        assert f"--out {place}: contains {source}, which the run reads; change --out" in error
    held_out = ["--eval_data", tmp_path / "mine" / "x.jsonl", "--out", tmp_path]
    assert "contains" in refused(*inputs, *held_out)
    run_of_run = ["--init", finished / "out", "--data", data, "--out", finished / "out"]
    assert "contains" in refused(*run_of_run, "--overwrite")
    assert sorted(finished.rglob("*")) == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_a_bad_folder_is_refused_before_the_demonstration_makes_anything(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "theirs" / "base").mkdir(parents=True)
    (tmp_path / "theirs" / "base" / "model.safetensors").write_text("a model of mine")
    before = sorted(tmp_path.rglob("*"))
    for out in ("mine", "mine/thesis.txt", "base", "theirs/run"):
        assert "--out" in refused("--out", tmp_path / out)
    assert "--max_length: the demonstration needs" in refused(
        "--out", tmp_path / "run", "--max_length", "40"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_free_and_so_is_what_a_killed_run_was_writing(inputs, tmp_path):
    for name in ("empty", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / "train_config.json.77.partial").write_text("{")
    run_folder.check_out(train.Options(out=str(tmp_path / "empty")), [])
    run_folder.check_out(train.Options(out=str(tmp_path / "nothing")), [])
    train.main([*map(str, inputs), "--out", str(tmp_path / "killed"), "--max_steps", "0"])
    assert not list((tmp_path / "killed").glob("*.partial"))


# --- What is in it --------------------------------------------------------------------------------


def test_a_resumed_run_removes_results_and_a_new_run_removes_progress_too(finished, tmp_path):
    out, names = shutil.copytree(finished / "out", tmp_path / "out"), {"train_config.json", "mine"}
    for name in (
        "mine",
        "eval.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.1.partial",
    ):
        (out / name).touch()
    for name in ("adapter", "checkpoints/step-000007.1.partial"):
        (out / name).mkdir()
    options = train.Options(out=str(out))
    run_folder.begin(options, {"metrics": {"bytes": 100}})
    kept = names | {"metrics.jsonl", "checkpoints"}
    assert {path.name for path in out.iterdir()} == kept
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-000002", "step-000003"}
    run_folder.begin(options, {})
    assert {path.name for path in out.iterdir()} == names


def test_a_run_goes_on_from_the_rows_of_its_checkpoint(finished, tmp_path):
    options = train.Options(out=str(shutil.copytree(finished / "out", tmp_path / "out")))
    rows = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    run_folder.begin(options, {"metrics": {"bytes": 100}})
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == rows[:100]
    config = read_json(tmp_path / "out" / "train_config.json")
    assert config["seed"] == 0 and config["commit"] != ""
    assert set(run_folder.PROVENANCE) == set(config) - set(vars(options))
    run_folder.begin(options, {})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_without_git_the_commit_is_null(finished, inputs, tmp_path, monkeypatch):
    """A held-out pair alone has a mean without a standard error, which is null, too."""
    commit = read_json(finished / "out" / "train_config.json")["commit"]
    assert commit is None or len(commit) == 40
    monkeypatch.setenv("PATH", "")
    flags = ("--eval_fraction", "0.04", "--max_steps", "1", "--out", str(tmp_path / "out"))
    folder = train.main([*map(str, inputs), *flags])
    assert read_json(folder / "train_config.json")["commit"] is None
    reward = read_json(folder / "summary.json")["table"]["mio"]["reward"]
    assert reward["n"] == 1 and reward["error"] is None


def test_numbers_that_are_not_finite_become_null():
    row = run_folder.strict_json({"eval_mi/nwj": -math.inf, "loss": 1.0, "x": math.nan})
    assert json.loads(row) == {"eval_mi/nwj": None, "loss": 1.0, "x": None}


def test_the_log_goes_on_after_its_last_row(tmp_path):
    options = train.Options(out=str(tmp_path))
    with run_folder.metrics_log(options) as (last, log):
        log({"step": 1, "loss": 0.5})
    assert last == {}
    with run_folder.metrics_log(options) as (last, log):
        log({"step": 3, "loss": math.inf})
    assert last == {"step": 1, "loss": 0.5}
    with run_folder.metrics_log(options) as (last, log):
        assert last == {"step": 3, "loss": None}
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3]


# --- Room and write access are checked before the run does any work -------------------------------


def disk_with(free: int, monkeypatch) -> None:
    monkeypatch.setattr(job.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


WEIGHTS = sum(p.nbytes for p in tiny_model().parameters())
# Flags of a run of three steps -> what lies on the disk at most, in multiples of WEIGHTS. A
# checkpoint takes 3, of which 2 are moments, and goes after the next checkpoint is complete.
ROOM = {
    "": 1,
    "--max_steps 1": 4,
    "--save_every 2 --keep 5": 7,
    "--save_every 2 --keep 1": 6,
    "--save_every 1 --keep 2": 9,
    "--save_every 1 --keep 3": 10,
}


@pytest.mark.parametrize("flags", ROOM)
def test_a_disk_without_room_is_refused(flags, inputs, tmp_path, monkeypatch):
    """The files, which also hold headers, log-probs and figures, are a little larger."""
    command, out = [*inputs, "--batch_size", "8", *flags.split(), "--out"], tmp_path / "out"
    disk_with(ROOM[flags] * WEIGHTS - 1, monkeypatch)
    error = refused(*command, out)
    assert f"--out {out}: the run needs {ROOM[flags] * WEIGHTS / 1e9:.3g} GB of disk" in error
    assert not list(tmp_path.iterdir())
    disk_with(ROOM[flags] * WEIGHTS, monkeypatch)
    found, replace = [], os.replace

    def measure(*args):
        replace(*args)
        found.append(sum(p.stat().st_size for p in out.rglob("*.safetensors") if p.is_file()))

    monkeypatch.setattr(os, "replace", measure)
    train.main([*map(str, (*command, out))])
    assert 0.95 < max(found) / (ROOM[flags] * WEIGHTS) < 1.15


def test_files_that_a_run_replaces_count_as_room(finished, inputs, tmp_path, monkeypatch):
    out = shutil.copytree(finished / "out", tmp_path / "out")  # two checkpoints and a model
    disk_with(0, monkeypatch)
    train.main(["--resume", "--out", str(out)])
    command = [*inputs, "--batch_size", "8", "--overwrite", "--out", out, "--save_every", "1"]
    disk_with(int(1.5 * WEIGHTS), monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "GB of disk" in refused(*command)  # because of a third checkpoint
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    train.main([*map(str, command), "--max_steps", "2"])
    resume = ["--resume", "--max_steps", "3", "--out", str(out)]
    assert "GB of disk" in refused(*resume)
    disk_with(2 * WEIGHTS, monkeypatch)
    train.main(resume)
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3]


def test_adapters_and_the_merged_model_need_room(finished, tmp_path, monkeypatch):
    disk_with(0, monkeypatch)
    flags = ("--init", finished / "init", "--data", finished / "pairs.jsonl", "--lora_rank", "2")
    found = {}
    for saved in ((), ("--max_steps", "1")):
        error = refused(*flags, "--batch_size", "8", "--out", tmp_path / "out", *saved)
        found[saved] = float(error.split("needs ")[1].split()[0]) * 1e9
    assert WEIGHTS < found[()] < 1.2 * WEIGHTS  # merged weights and adapters
    adapters = found[()] - WEIGHTS
    assert found["--max_steps", "1"] == pytest.approx(found[()] + 3 * adapters, rel=0.02)


@pytest.mark.parametrize("name", ["out/run", "out/cache", "out"])
def test_a_folder_that_cannot_be_written_is_refused(name, finished, inputs, tmp_path, monkeypatch):
    """Permissions do not bind every user, so the answer of os.access is made up."""
    for folder in ("out/run", "out/cache") if name != "out" else ():
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    closed = tmp_path / name
    monkeypatch.setattr(job.os, "access", lambda folder, mode: Path(folder) != closed)
    passes = []
    monkeypatch.setattr(job, "logps_of", lambda *args: passes.append(args))
    error = refused(*inputs, "--out", tmp_path / "out" / "run")
    assert f"cannot write to {closed}; change --out" in error and not passes
    assert sorted(tmp_path.rglob("*")) == before
    if name == "out/cache":  # a loss without a reference does not use the cache
        monkeypatch.undo()
        monkeypatch.setattr(job.os, "access", lambda folder, mode: Path(folder) != closed)
        flags = ("--out", tmp_path / "out" / "run", "--loss", "sft", "--max_steps", "0")
        train.main([*map(str, (*inputs, *flags))])
