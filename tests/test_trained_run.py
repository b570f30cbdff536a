"""What evaluation reads from a run: the data, the checkpoint and the reference."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows

from data import Pairs, load_pairs, split_pairs
from support import trained_run
from support.files import write_json
from support.questions import read_items
from support.tokenizers import byte_tokenizer
from support.trained_run import TRAINING, load_checkpoint, read_run

QUESTION = {"question": "1 + 1?", "answer": "#### 2"}


@pytest.fixture
def make_run(checkpoint, tmp_path):
    """Makes a folder as a run of train.py leaves it, with the weights that it started from."""

    def make(name: str = "run", **config) -> Path:
        shutil.copytree(checkpoint, tmp_path / name)
        write_json(tmp_path / name / "train_config.json", {"init": str(checkpoint), **config})
        return tmp_path / name

    return make


def lines_of(run) -> dict[str, list[int]]:
    return {title: rows.lines.tolist() for title, (_, rows) in run.data.items()}


def test_without_files_the_data_are_the_pairs_that_training_held_out(make_run, pairs_file):
    data = {"data": str(pairs_file), "eval_fraction": 0.3, "seed": 4, "split_seed": 5, "beta": 0.7}
    run = read_run(make_run(**data), {})
    _, held_out = split_pairs(load_pairs(pairs_file, byte_tokenizer()), 0.3, 5)
    assert lines_of(run) == {"pairs.jsonl, held out": held_out.lines.tolist()}
    assert run.data["pairs.jsonl, held out"][0] == str(pairs_file)
    assert run.training["beta"] == 0.7 and run.training["dtype"] == "float32"
    assert not run.is_demonstration
    other = read_run(make_run("another", **data | {"seed": 5}), {})  # the seed makes no difference
    assert lines_of(other) == lines_of(run)
    _, default = split_pairs(load_pairs(pairs_file, byte_tokenizer()), 0.3, 0)
    del data["split_seed"]
    run = read_run(make_run("default", **data), {})
    assert lines_of(run) == {"pairs.jsonl, held out": default.lines.tolist()} != lines_of(other)


def test_a_file_of_held_out_pairs_comes_before_a_share_and_rows_are_truncated(
    make_run, pairs_file, tmp_path
):
    rows = [*PAIR_ROWS[:3], {"prompt": "long?", "chosen": "x" * 70, "rejected": "y"}]
    other = write_rows(tmp_path / "other.jsonl", rows)
    data = {"data": str(pairs_file), "eval_fraction": 0.3, "eval_data": str(other)}
    assert lines_of(read_run(make_run(**data), {})) == {"other.jsonl": [1, 2, 3, 4]}
    short = read_run(make_run("short", **data, max_length=60), {})
    assert lines_of(short) == {"other.jsonl": [1, 2, 3]}


def test_files_replace_the_data_of_training_and_have_different_titles(
    make_run, checkpoint, pairs_file, tmp_path
):
    folder = make_run(data=str(pairs_file), eval_fraction=0.3, eval_data=str(pairs_file))
    write_json(checkpoint / "base.json", {})
    questions = write_rows(tmp_path / "gsm.jsonl", [QUESTION])
    same_name = write_rows(tmp_path / "run" / "pairs.jsonl", PAIR_ROWS[:2])
    files = {str(pairs_file): None, str(questions): read_items(questions), str(same_name): None}
    run = read_run(folder, files)
    assert list(run.data) == [str(pairs_file), "gsm.jsonl", str(same_name)]
    assert run.data["gsm.jsonl"] == (str(questions), read_items(questions))
    assert len(run.data[str(same_name)][1]) == 2 and not run.is_demonstration
    assert list(read_run(folder, {str(questions): read_items(questions)}).data) == ["gsm.jsonl"]


def test_a_run_of_the_demonstration_has_its_problems_and_its_pairs(
    make_run, checkpoint, pairs_file
):
    write_json(checkpoint / "base.json", {})
    run = read_run(make_run(eval_data=str(pairs_file)), {})
    assert run.is_demonstration and list(run.data) == ["pairs.jsonl"]
    base = read_run(checkpoint, {})
    assert base.is_demonstration and base.data == {} and base.training == TRAINING


def test_a_run_without_data_or_reference_is_refused(make_run, checkpoint, pairs_file, tmp_path):
    questions = write_rows(tmp_path / "gsm.jsonl", [QUESTION])
    for number, data in enumerate(
        ({}, {"data": str(pairs_file), "eval_fraction": 0.0}, {"data": str(questions)})
    ):
        folder = make_run(f"none{number}", **{"eval_fraction": 0.1} | data)
        with pytest.raises(ValueError, match=f"none{number}: has no held-out pairs; name"):
            read_run(folder, {})
    with pytest.raises(ValueError, match="init: has no held-out pairs"):
        read_run(checkpoint, {})
    moved = make_run("moved", init="gone")
    with pytest.raises(ValueError, match="reference gone is missing; correct the path in .*moved"):
        read_run(moved, {str(pairs_file): None})
    files = {str(questions): read_items(questions)}
    assert list(read_run(moved, files).data) == ["gsm.jsonl"]  # questions need no reference
    assert isinstance(read_run(checkpoint, {str(pairs_file): None}).data["pairs.jsonl"][1], Pairs)


def test_model_and_tokenizer_must_belong_together(checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint, "cpu", torch.bfloat16)
    assert model.head_weight.dtype == torch.bfloat16 and tokenizer.end_id == 257
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder; correct"):
        load_checkpoint(tmp_path / "nowhere", "cpu", torch.float32)
    tiny_model(vocab_size=257, bos_token_id=None, eos_token_id=None).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="lacks id 257; use the"):
        load_checkpoint(checkpoint, "cpu", torch.float32)
    tiny_model(vocab_size=258, bos_token_id=300).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="lacks id 300; use the"):
        load_checkpoint(checkpoint, "cpu", torch.float32)
    tiny_model(vocab_size=258, eos_token_id=[257, 300]).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="lacks id 300; use the"):
        load_checkpoint(checkpoint, "cpu", torch.float32)


def test_broken_json_of_a_run_is_refused_by_name(make_run):
    folder = make_run()
    (folder / "train_config.json").write_text(json.dumps({"beta": 1})[:-1])
    with pytest.raises(ValueError, match="train_config.json: not valid JSON"):
        read_run(folder, {})


def test_a_relative_reference_is_never_a_model_of_the_cache(
    make_run, checkpoint, pairs_file, tmp_path, monkeypatch
):
    """A missing folder org/tiny must not become the cached model of the same name."""
    monkeypatch.setattr(
        trained_run, "find", lambda path: checkpoint if path == "org/tiny" else path
    )
    run = make_run(init="org/tiny")
    with pytest.raises(ValueError, match="the reference org/tiny is missing"):
        read_run(run, {str(pairs_file): None})
