"""Grids of runs: flags with several values, the runs that they mean, and their comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from runs import make_inputs, metrics, refused

import train
from support.figures import Column, write_columns
from support.files import read_json
from support.grid import MAX_RUNS, TRAIN, Run, arguments, find_grid, summarize
from train import Options


def grid_of(**flags):
    return find_grid(flags, Options)


def names(**flags) -> list[str]:
    return [run.folder.name for run in grid_of(**flags).runs()]


def test_the_runs_of_a_grid_are_all_combinations_with_the_seed_fastest():
    found = names(seed="0,1", loss="mio,dpo", lr="1e-4,3e-4")
    assert found[:3] == [
        "loss=mio,lr=0.0001,seed=0", "loss=mio,lr=0.0001,seed=1", "loss=mio,lr=0.0003,seed=0",
    ]  # fmt: skip
    assert len(found) == len(set(found)) == 8
    run = grid_of(seed="0,1", loss="mio,dpo", epochs="3").runs()[3]
    assert run.flags == {"loss": "dpo", "seed": 1, "epochs": 3}
    assert (run.setting, run.seed) == ("dpo", 1)
    given = arguments(run.flags | {"lora_rslora": True, "lr": [0.1, 0.2]})
    assert " ".join(given[-3:]) == "--lora_rslora --lr 0.1,0.2"
    assert names(init="a/b,c") == ["init=a_b", "init=c"]
    assert [run.setting for run in grid_of(seed="3,4").runs()] == ["all", "all"]


def test_a_run_leaves_out_the_flags_that_its_loss_does_not_use():
    assert names(loss="mio,sft", beta="0.5,1") == [
        "loss=mio,beta=0.5", "loss=mio,beta=1.0", "loss=sft",
    ]  # fmt: skip
    runs = grid_of(loss="simpo,dpo+0.1*sft", gamma="0.4").runs()
    assert [run.flags.get("gamma") for run in runs] == [0.4, None]
    runs = grid_of(loss="mio,sft,ipo", average_logps=True).runs()
    assert [run.flags.get("average_logps") for run in runs] == [True, None, None]
    sums = names(loss="mio+0.1*sft,mio")
    assert sums == ["loss=mio+0.1*sft", "loss=mio"]


def test_a_flag_with_one_value_makes_no_grid(tmp_path, monkeypatch):
    assert grid_of(loss="mio", lr="1e-4", lora_targets="q_proj,v_proj") is None
    folder = tmp_path / "loss=mio,seed=0"
    folder.mkdir()
    assert grid_of(loss="mio", init=str(folder), out=str(folder)) is None


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--loss", "mio,,dpo"], "--loss mio,,dpo: a value is empty or repeated"),
        (["--loss", "mio,"], "--loss mio,: a value is empty or repeated"),
        (["--lr", "1e-4,0.0001"], "--lr 1e-4,0.0001: a value is empty or repeated"),
        (["--lr", "1e-4,x"], "--lr x: must be of type float"),
        (["--loss", "mio,nosuch"], "--loss nosuch: choose from"),
        (["--out", "a,b"], "--out a,b: takes one value"),
        (["--config", "a,b"], "--config a,b: takes one value"),
        (["--seed", "0,1", "--resume"], "--resume: a grid goes on by itself"),
        (["--seed", "0,1", "--overwrite"], "--overwrite: a grid goes on by itself"),
        (["--seed", "0,1", "--plan", "llama-3.2-1b"], "--plan: a grid goes on by itself"),
        (["--data", "a/b,a_b", "--init", "x"], "a_b: the name of two runs, or too long"),
        (["--seed", "0,1", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--jobs", "2"], "--jobs needs a flag with several values"),
        (["--loss", "mio,dpo", "--gamma", "0.5"], "--gamma: no loss of the grid uses it"),
        (["--lora_alpha", "1,2"], "--lora_alpha needs --lora_rank"),
        (["--seed", ",".join(map(str, range(MAX_RUNS + 1)))], f"has {MAX_RUNS + 1} runs"),
    ],
)
def test_bad_grids_are_refused_before_anything_starts(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*flags)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_refused(tmp_path):
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "holds other files, but no grid" in refused("--seed", "0,1", "--out", folder)
    record = {"axes": {"loss": ["mio", "dpo"], "seed": [0, 1]}, "fixed": {"epochs": 1}}
    (folder / "grid.json").write_text(json.dumps(record))
    write_run(folder / "loss=mio,seed=0", "mio", 0, [0.0])
    (folder / "loss=mio,seed=0" / "summary.json").write_text("{}")
    for flags in (
        ["--loss", "mio,sft", "--seed", "0,1", "--epochs", "1"],  # without dpo
        ["--loss", "mio,dpo", "--seed", "0,1"],  # with other epochs
        ["--loss", "mio,dpo", "--lr", "1,2", "--epochs", "1"],  # with another flag
    ):
        assert "holds another grid" in refused(*flags, "--out", folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "grid.json", "loss=mio,seed=0", "notes.txt",
    ]  # fmt: skip


def write_run(folder: Path, setting: str, seed: int, values, base=None) -> Run:
    folder.mkdir()
    rows = {} if base is None else {"base": {"greedy": Column(np.array(base))}}
    items = {"greedy": Column(np.array(values)), "Δ chosen": Column(np.array(values) - 1)}
    write_columns(folder / "items.json", rows | {"run": items})
    return Run(folder, setting, seed, {})


def test_a_table_averages_over_seeds_and_pairs_the_seeds_that_two_settings_share(tmp_path):
    runs = [
        write_run(tmp_path / "a0", "a", 0, [0.0, 1.0, 1.0, 0.0], base=[0.0, 0.0, 0.0, 0.0]),
        write_run(tmp_path / "a1", "a", 1, [1.0, 1.0, 1.0, 0.0], base=[1.0, 0.0, 0.0, 0.0]),
        write_run(tmp_path / "b1", "b", 1, [1.0, 0.0, 0.0, 0.0]),
    ]
    rows, seeds = summarize(runs)
    assert list(rows) == ["base", "a", "b", "b - a"] and seeds == 2
    assert rows["a"]["greedy"].mean == 0.625 and rows["base"]["greedy"].mean == 0.125
    assert rows["a"]["greedy"].error == pytest.approx(np.std([0.5, 0.75], ddof=1))
    assert rows["b - a"]["greedy"].mean == -0.5  # on seed 1 only
    assert rows["b - a"]["Δ chosen"].n == 4


# --- Whole grids ----------------------------------------------------------------------------------


def command(init: Path, data: Path, out: Path, *flags) -> list[str]:
    given = ["--init", init, "--data", data, "--out", out, "--batch_size", "8", "--lr", "1e-3"]
    return [str(x) for x in (*given, "--loss", "mio,dpo", "--jobs", "2", *flags)]


def result(out: Path) -> str:
    """The final table, without the command and thereby without the name of the folder."""
    return (out / "grid.md").read_text(encoding="utf-8").split("\n\n", 1)[1]


def test_a_killed_grid_goes_on_with_the_same_command_to_the_same_table(tmp_path, capsys):
    init, data = make_inputs(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train.main(command(init, data, whole)) == whole
    out = capsys.readouterr().out
    assert "2 runs (2 of --loss)" in out and "the rest (1 of 2) takes about" in out
    table = out[out.rindex("\n\n") :]
    assert "dpo - mio" in out and max(map(len, table.splitlines())) <= 80
    argv = [sys.executable, str(TRAIN), *command(init, data, killed)]
    process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(killed.glob("*.log")):  # until a run starts
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # its runs, in sessions of their own, live on
    process.wait()
    train.main(command(init, data, killed))
    assert result(killed) == result(whole)
    stored = [read_json(out / "grid.json") for out in (whole, killed)]
    assert stored[0]["rows"] == stored[1]["rows"] and stored[0]["axes"] == stored[1]["axes"]
    for name in ("loss=mio", "loss=dpo"):
        assert metrics(whole / name) == metrics(killed / name)
    assert len(list((whole / "cache").iterdir())) == 1  # one pass of the reference for all runs
    capsys.readouterr()
    train.main(command(init, data, whole, "--loss", "mio,dpo,sft"))  # finds the finished runs
    assert "2 are finished" in capsys.readouterr().out
    rows = read_json(whole / "grid.json")["rows"]
    assert stored[0]["rows"].items() <= rows.items() and "sft" in rows
    if (whole / "grid.png").exists():
        assert (whole / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_fails_is_reported_and_does_not_stop_the_others(tmp_path, capsys):
    init, data = make_inputs(tmp_path)
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": 1, "chosen": "a", "rejected": "b"}])
    flags = ["--init", init, "--data", f"{data},{bad}", "--batch_size", "8", "--max_steps", "1"]
    with pytest.raises(SystemExit) as stop:
        train.main([str(x) for x in (*flags, "--out", tmp_path / "grid")])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "bad.jsonl:1: 'prompt' must be a string" in out and "pairs.jsonl" in out
    assert len(read_json(tmp_path / "grid" / "grid.json")["runs"]) == 1
    # A file that has changed since the grid started is refused: its runs would not be comparable.
    with open(data, "a") as file:
        file.write("\n")
    assert f"{data}: has changed since the grid" in refused(*flags, "--out", tmp_path / "grid")
    missing = [
        *flags[:2],
        "--data",
        tmp_path / "no.jsonl",
        "--seed",
        "0,1",
        "--out",
        tmp_path / "x",
    ]
    assert "no.jsonl: No such file or directory" in refused(*missing)
    assert not (tmp_path / "x").exists()


def test_after_ctrl_c_the_runs_are_saved_and_the_same_command_continues(tmp_path):
    init, data = make_inputs(tmp_path)
    out = tmp_path / "grid"
    argv = [sys.executable, str(TRAIN), *command(init, data, out, "--epochs", "400")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    first = out / "loss=mio" / "metrics.jsonl"
    while not first.exists() or len(first.read_text().splitlines()) < 3:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command continues" in text
    assert list((out / "loss=mio" / "checkpoints").glob("step-*"))
    assert not (out / "grid.md").exists()


def test_flags_that_hold_commas_make_no_grid(tmp_path):
    values = {"columns": "prompt=a,chosen=b", "chat_template_kwargs": '{"a": 1, "b": 2}'}
    assert find_grid(values, Options) is None
    grid = find_grid(values | {"seed": "0,1", "out": str(tmp_path)}, Options)
    assert grid.fixed == values
