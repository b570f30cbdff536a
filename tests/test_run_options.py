"""The options of train.py: defaults, flags that do not go together, --config, and new losses."""

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, write_rows
from runs import metrics, parse_options, run

import data
import train
from mio import LOSSES, Loss
from support.grid import find_grid
from support.run_options import loss_table, make_options, options_of_losses, read_flags
from train import Options


def parse(*argv) -> Options:
    return parse_options([str(arg) for arg in argv])


def refused(*argv) -> str:
    """The one line on standard error with which these options are refused."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = stderr.getvalue()
    assert stop.value.code == 2 and error.startswith("train.py: error: "), error
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


@pytest.fixture
def inputs(tmp_path):
    """Flags that name a model and data, which the options alone do not read."""
    return ["--init", tmp_path / "init", "--data", tmp_path / "pairs.jsonl"]


# --- Defaults -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_loss_and_of_the_kind_of_run(inputs):
    for name, loss in LOSSES.items():
        own, demonstration = parse("--loss", name, *inputs), parse("--loss", name)
        assert own.beta == loss.beta and own.out == demonstration.out == f"out/{name}"
        scaled = loss.needs_reference and "sums" in loss.uses
        assert demonstration.beta == loss.beta * (5 if scaled else 1)
    own, demonstration = parse(*inputs), parse()
    names = ("loss", "epochs", "batch_size", "max_length", "lr", "max_new_tokens")
    assert [getattr(own, name) for name in names] == ["mio", 1, 32, 1024, 1e-6, 256]
    assert [getattr(demonstration, name) for name in names] == ["mio", 2, 48, 96, 2e-4, 48]
    assert own.lora_alpha is own.lora_targets is own.gpu is own.max_steps is None
    assert own.jobs is None and own.split_seed == demonstration.split_seed == 0
    assert own.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_adapters_have_a_higher_learning_rate_and_twice_the_rank_as_alpha(inputs):
    options = parse(*inputs, "--lora_rank", 8)
    assert (options.lora_alpha, options.lora_targets) == (16.0, "all")
    assert options.lr == pytest.approx(1e-5)
    options = parse(*inputs, "--lora_rank", 8, "--lora_alpha", 3, "--lr", 1)
    assert (options.lr, options.lora_alpha) == (1.0, 3.0)


def test_averaged_log_probs_leave_the_default_of_beta_until_the_pairs_are_read(inputs):
    assert parse("--average_logps").beta is parse(*inputs, "--average_logps").beta is None
    assert parse("--average_logps", "--beta", 3).beta == 3.0
    assert parse("--average_logps", "--on_policy", "--beta", 3).beta == 3.0
    assert parse("--average_logps", "--loss", "rpo").average_logps  # sums and means


def test_flags_replace_defaults_even_by_zero(inputs):
    options = parse(
        *inputs, "--beta", 2, "--lr", 0.1, "--out", "x", "--epochs", 7, "--max_steps", 0
    )
    assert (options.beta, options.lr, options.out, options.epochs) == (2.0, 0.1, "x", 7)
    assert options.max_steps == 0
    assert parse("--loss", "simpo", "--gamma", 0).gamma == 0.0


def test_a_plan_has_a_gpu_and_needs_no_data():
    options = parse("--plan", "llama-3.2-1b")
    assert (options.gpu, options.epochs, options.lr) == ("h100", 1, 1e-6)


# --- Help -----------------------------------------------------------------------------------------


def test_loss_help_prints_the_table_and_stops(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--loss", "help"])
    assert stop.value.code == 0 and capsys.readouterr().out == loss_table() + "\n"


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--loss STR objective; --loss help lists all losses" in text
    assert "optimizer step (default: 32, demonstration: 48)" in text
    assert "implicit reward (default: the loss's own)" in text
    assert "folder for the run's files (default: out/LOSS)" in text
    assert "--gamma FLOAT option of --loss simpo; see --loss help" in text
    assert "--alpha FLOAT option of --loss rpo or cpo; see --loss help" in text


# --- Refusals -------------------------------------------------------------------------------------

INPUTS = ("--init", "init", "--data", "pairs.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*INPUTS, "--beta", "0"), "--beta 0: must be more than 0 and at most 1e+06"),
        ((*INPUTS, "--lr", "0"), "--lr 0: must be more than 0 and finite"),
        ((*INPUTS, "--batch_size", "0"), "--batch_size 0: must be at least 1"),
        ((*INPUTS, "--eval_fraction", "0.95"), "must be at least 0 and at most 0.9"),
        ((*INPUTS, "--grad_clip", "inf"), "--grad_clip inf: must be at least 0 and finite"),
        ((*INPUTS, "--row_tokens", "0"), "--row_tokens 0: must be at least 1"),
        ((*INPUTS, "--warmup", "1.5"), "--warmup 1.5: must be at least 0 and at most 1"),
        ((*INPUTS, "--max_length", "1"), "--max_length 1: must be at least 2"),
        ((*INPUTS, "--samples", "1"), "--samples 1: must be at least 2"),
        ((*INPUTS, "--loss", "nope"), "--loss nope: choose from mio, dpo"),
        ((*INPUTS, "--loss", "a\nb"), "--loss a b: choose from"),
        ((*INPUTS, "--loss", "robust", "--label_smoothing", "0.5"), "at least 0 and at most 0.49"),
        ((*INPUTS, "--loss", "exo", "--epsilon", "0"), "must be at least 1e-12 and at most 0.49"),
        ((*INPUTS, "--device", "warp"), "--device warp: not available"),
        ((*INPUTS, "--nope", "1"), "unrecognized arguments: --nope 1"),
        (("--init", "init"), "--data FILE.jsonl is missing; give both --init and --data"),
        (("--data", "pairs.jsonl"), "--init FOLDER is missing; give both --init and --data, or"),
        (("--init", "", "--data", "pairs.jsonl"), "--init FOLDER is missing"),
        (("--init", "init", "--data", ""), "--data FILE.jsonl is missing"),
        (("--resume", "--overwrite"), "--resume: there is no run in"),
        (
            ("--average_logps", "--loss", "simpo"),
            "--average_logps: --loss simpo does not use it; leave out",
        ),
        (
            ("--average_logps", "--loss", "ipo"),
            "--average_logps: --loss ipo does not use it; leave out",
        ),
        (
            ("--average_logps", "--loss", "rlhf"),
            "--average_logps: --loss rlhf does not use it; leave out",
        ),
        (("--average_logps", "--on_policy"), "--average_logps with --on_policy needs a --beta"),
        ((*INPUTS, "--gpu", "h100"), "--gpu needs --plan; add --plan or leave out --gpu"),
        (("--eval_data", "x"), "--eval_data needs --data"),
        (("--columns", "prompt=a"), "--columns needs --data"),
        ((*INPUTS, "--lora_alpha", "3"), "--lora_alpha needs --lora_rank"),
        ((*INPUTS, "--lora_targets", "all"), "--lora_targets needs --lora_rank"),
        ((*INPUTS, "--lora_rslora"), "--lora_rslora needs --lora_rank"),
        (("--max_length", "56"), "--max_length: the demonstration needs 57 tokens; raise it"),
        (("--config", "gone.json"), "gone.json: No such file or directory; check the path"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*flags)
    assert not list(tmp_path.iterdir())


def test_flags_that_a_loss_does_not_use_are_refused():
    options = {
        name: x.options.keys() | ({"beta"} if x.uses_beta else set()) for name, x in LOSSES.items()
    }
    flags = {f"--{name}": "0.3" for name in ("beta", *options_of_losses())}
    known = {"--beta", "--gamma", "--alpha", "--epsilon", "--label_smoothing", "--dpop_lambda"}
    assert known <= flags.keys()
    for name, used in options.items():
        for flag, value in flags.items():
            if flag[2:] in used:
                assert getattr(parse("--loss", name, flag, value), flag[2:]) == 0.3
            else:
                message = f"{flag}: --loss {name} does not use it; leave out {flag}"
                assert message in refused("--loss", name, flag, value)


def test_losses_without_beta_refuse_it_and_an_option_of_zero_is_refused_too():
    for name in ("sft", "lsif", "ukl"):
        assert f"--beta: --loss {name} does not use it" in refused("--loss", name, "--beta", "3")
    assert "--gamma: --loss mio does not use it" in refused("--gamma", "0")


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    (tmp_path / "train_config.json").write_text("{}")
    error = refused("--out", tmp_path, "--resume", "--overwrite")
    assert "--resume continues a run and --overwrite replaces it; choose one" in error


# --- A file of options ----------------------------------------------------------------------------


def test_a_config_file_is_read_and_flags_take_precedence(checkpoint, pairs_file, tmp_path):
    flags = ("--beta", "0.7", "--loss", "cpo", "--alpha", "0.3", "--max_steps", "1")
    first = run(checkpoint, pairs_file, tmp_path / "first", *flags)
    config = ("--config", first / "train_config.json")
    again = train.main([*map(str, config), "--out", str(tmp_path / "again")])
    assert metrics(first) == metrics(again)
    options = parse(*config, "--beta", "0.1", "--max_steps", "2", "--overwrite")
    assert (options.beta, options.loss, options.alpha, options.max_steps) == (0.1, "cpo", 0.3, 2)
    assert (options.data, options.batch_size, options.out) == (str(pairs_file), 8, str(first))
    assert parse(*config, "--loss", "cpo").beta == 0.7
    other = parse(*config, "--loss", "simpo")  # beta, options and folder belong to the other loss
    assert (other.beta, other.alpha, other.out) == (LOSSES["simpo"].beta, None, "out/simpo")
    assert (other.data, other.batch_size) == (str(pairs_file), 8)
    assert parse(*config, "--loss", "dpo").beta == LOSSES["dpo"].beta
    (checkpoint / "base.json").write_text("{}")  # the mark of the demonstration's base model
    assert parse(*config, "--loss", "dpo").beta == 5 * LOSSES["dpo"].beta == 0.5
    assert parse(*config, "--loss", "simpo").beta == LOSSES["simpo"].beta


def test_a_config_file_with_bad_options_is_refused(tmp_path):
    file = tmp_path / "c.json"
    for content, message in (
        ({"lrr": 1}, f"{file}: there is no option 'lrr'; remove this key"),
        ({"epochs": 2.7}, "--epochs 2.7: must be of type int"),
        ({"epochs": True}, "--epochs True: must be of type int"),
        ({"lr": "fast"}, "--lr fast: must be of type float"),
        ({"on_policy": 1}, "--on_policy 1: must be of type bool"),
        ({"loss": None}, "--loss None: choose from"),
        ({"epochs": float("inf")}, "Infinity is not allowed"),
    ):
        file.write_text(json.dumps(content))
        assert message in refused("--config", file)
    file.write_text(json.dumps({"epochs": None, "lr": 1, "versions": {}}))
    options = parse("--config", file)
    assert (options.epochs, options.lr) == (2, 1.0)
    file.write_text(json.dumps({"loss": "sft", "beta": 0.1}))  # as the run of sft records it
    assert parse("--config", file).beta == 0.1


# --- A loss of one's own --------------------------------------------------------------------------


def tilted(chosen, rejected, tilt: float = 0.5):
    """-(1-tilt) T_w + tilt T_l"""
    return tilt * rejected.rewards - (1 - tilt) * chosen.rewards


def test_a_new_loss_brings_its_own_flag(checkpoint, pairs_file, tmp_path, monkeypatch):
    """Imports train.py again after a row of LOSSES was added, as in a file that has the row."""
    row = Loss(tilted, "sums", 0.1, 0.0, "my notebook")
    monkeypatch.setitem(LOSSES, "tilted", row)
    for name in ("support.run_options", "train"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["support"], "run_options", None)
    fresh = importlib.import_module("train")
    names = [field.name for field in dataclasses.fields(fresh.Options)]
    assert "tilt" in names and "tilt" not in {f.name for f in dataclasses.fields(Options)}
    inputs = [
        "--init",
        str(checkpoint),
        "--data",
        str(pairs_file),
        "--lr",
        "1e-3",
        "--max_steps",
        "1",
    ]
    ends = {}
    for flags in (("tilted",), ("tilted", "--tilt", "0.2"), ("mio",)):
        out = fresh.main([*inputs, "--out", str(tmp_path / "out"), "--overwrite", "--loss", *flags])
        ends[flags] = metrics(out)[-1]["eval_loss"]
    assert len(set(ends.values())) == 3
    assert fresh.Options().tilt is None
    with pytest.raises(SystemExit):
        fresh.main([*inputs, "--loss", "mio", "--tilt", "0.2"])


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags in ((), ("--init", "x", "--data", "y"), ("--plan", "llama-3.2-1b")):
        assert "train.py trains on one GPU; start it without torchrun" in refused(*flags)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse("--init", "x", "--data", "y").init == "x"


# --- The page of remedies -------------------------------------------------------------------------


def test_the_commands_on_troubleshooting_are_valid(checkpoint, tmp_path, monkeypatch, capsys):
    """Their flags are read; only the short command, on a data file, is run."""
    page = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text("utf-8")
    base = checkpoint.rename(checkpoint.parent / "base")
    write_rows(base / "pairs.jsonl", PAIR_ROWS)
    (tmp_path / "out").mkdir()
    base.rename(tmp_path / "out" / "base")
    monkeypatch.chdir(tmp_path)
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("python ")]
    assert {script for script, *_ in commands} == {"train.py", "data.py"}
    for script, *argv in commands:
        if script == "data.py":
            data.main(argv)
            assert "23 pairs to train on" in capsys.readouterr().out
        elif grid := find_grid(read_flags(argv, train.Options, "")[1], train.Options):
            for run in grid.runs():
                make_options(run.flags | {"out": str(run.folder)}, train.Options)
        else:
            parse_options(argv)
