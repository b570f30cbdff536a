"""Run folders: what --out may name, and that no run or file is lost without a word."""

import json
import math
import shutil

import pytest
from runs import make_inputs, metrics, refused, run

import train
from support import run_folder
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
