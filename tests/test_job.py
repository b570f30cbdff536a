"""Jobs: what a run loads, which input it refuses, and the cache of reference log-probs."""

import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, logp_alone, tiny_model, write_rows
from runs import metrics, parse_options, refused, run
from safetensors.torch import load_file, save_file

import train
from data import Pair, Pairs, epoch_order, load_pairs, make_batches
from mio import LOSSES
from support import job as job_module
from support import weights
from support.files import read_json
from support.job import (
    TrainingError,
    check_answers,
    describe,
    first_progress,
    load_job,
    mismatched_pairs,
    reference_logps,
)
from support.run_folder import Progress
from support.tokenizers import byte_tokenizer
from train import step_data


def job_of(checkpoint: Path, data: Path, *flags):
    flags = ["--init", checkpoint, "--data", data, "--out", checkpoint.parent / "out", *flags]
    options = parse_options([str(flag) for flag in flags])
    return load_job(options)


# --- What a job holds -----------------------------------------------------------------------------


def test_pairs_are_split_by_the_split_seed_or_held_out_in_a_file(checkpoint, pairs_file, tmp_path):
    pairs = list(load_pairs(pairs_file, byte_tokenizer()))
    splits = []
    for flags in ((), ("--seed", 1), ("--seed", 1, "--split_seed", 1)):
        job = job_of(checkpoint, pairs_file, *flags)
        assert len(job.pairs) == 21 and sorted([*job.pairs, *job.held_out]) == sorted(pairs)
        assert sorted([*job.pairs.lines, *job.held_out.lines]) == list(range(1, 24))
        splits.append(list(job.held_out))
    assert splits[0] == splits[1] != splits[2]
    file = write_rows(tmp_path / "held_out.jsonl", PAIR_ROWS[:4])
    job = job_of(checkpoint, pairs_file, "--eval_data", file)
    assert list(job.pairs) == pairs and list(job.held_out) == pairs[:4]
    job = job_of(checkpoint, pairs_file, "--eval_fraction", 0, "--max_length", 50)
    assert len(job.held_out) == 0 and max(map(sum, job.pairs.lengths()[:, :2])) == 50


def test_steps_epochs_and_evaluations(checkpoint, pairs_file):
    job = job_of(checkpoint, pairs_file, "--batch_size", 8, "--epochs", 5)
    assert (job.per_epoch, job.steps, job.stop, job.options.eval_every) == (3, 15, 15, 2)
    job = job_of(checkpoint, pairs_file, "--batch_size", 7, "--max_steps", 2, "--eval_every", 4)
    assert (job.per_epoch, job.steps, job.stop, job.options.eval_every) == (3, 3, 2, 4)
    job = job_of(checkpoint, pairs_file, "--batch_size", 7, "--max_steps", 9, "--row_tokens", 99)
    index = list(range(len(job.pairs)))
    expected = make_batches(job.pairs, index, 99, 4096)
    assert [b.index for b in job.batches(job.pairs, index)] == [b.index for b in expected]
    assert (job.steps, job.stop) == (3, 3)


def test_steps_deal_out_the_pairs(checkpoint, pairs_file):
    progress = Progress(0, 0, None, None, None, {})
    for size in (5, 20, 21):  # with 20 pairs in a step, the second step has a single pair
        job = job_of(checkpoint, pairs_file, "--loss", "kto", "--batch_size", size)
        order = epoch_order(21, seed=0, epoch=0).tolist()
        for step in range(1, job.steps + 1):
            data, index = step_data(job, progress, step), order[:size]
            order = order[size:]
            for batches in (data.batches, data.mismatched[0]):
                packed = [i for batch in batches for i in batch.index]
                assert sorted(packed) == sorted(index)
                assert batches is not data.batches or packed == data.index
        assert not order


def test_checkpointing_and_compile_reach_the_model(checkpoint, pairs_file):
    for flag, attribute in (("--checkpointing", "checkpointing"), ("--compile", "compiled")):
        for value in ("on", "off"):
            model = job_of(checkpoint, pairs_file, flag, value).model
            assert getattr(model, attribute) == (value == "on")
    assert not job_of(checkpoint, pairs_file, "--device", "cpu").model.compiled


def test_inputs_are_hashed_by_content(checkpoint, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    model = tiny_model()
    model.save_pretrained(checkpoint)
    shards = sorted(checkpoint.glob("*.safetensors"))
    held_out = write_rows(tmp_path / "held_out.jsonl", PAIR_ROWS[:4])

    def hashes():
        return job_of(checkpoint, pairs_file, "--eval_data", held_out).inputs

    before = hashes()
    assert len(shards) > 2 and hashes() == before
    for name in (next(iter(load_file(shards[0]))), next(iter(load_file(shards[-1])))):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        model.save_pretrained(checkpoint)
        after = hashes()
        assert {name for name in before if before[name] != after[name]} == {"init"}
        before = after
    config = read_json(checkpoint / "config.json")
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert hashes()["init"] != before["init"]
    write_rows(held_out, PAIR_ROWS[:5])
    assert hashes()["eval_data"] != before["eval_data"] and hashes()["data"] == before["data"]
    write_rows(pairs_file, [*PAIR_ROWS[:5], PAIR_ROWS[5] | {"chosen": "It is 11"}, *PAIR_ROWS[6:]])
    assert hashes()["data"] != before["data"]


def test_pairs_that_split_their_ids_in_another_place_have_another_hash():
    one, two = Pairs([Pair([1, 2], [3], [4])]), Pairs([Pair([1], [2, 3], [4])])
    assert job_module.hash_pairs(one) != job_module.hash_pairs(two)


def test_a_run_says_with_what_it_trains(checkpoint, pairs_file):
    lines = describe(job_of(checkpoint, pairs_file, "--loss", "simpo", "--batch_size", 8))
    assert max(len(line) for line in lines.split("\n") if "/" not in line) <= 80  # paths stay whole
    text = " ".join(lines.split()).replace(" [", "   [")
    assert f"simpo: {LOSSES['simpo'].function.__doc__}   [arXiv 2405.14734]" in text
    assert (
        "log-probs as means over an answer's tokens, beta 2, gamma 0.5, without a reference" in text
    )
    assert "32,032 parameters, 32,032 of them trained, float32 weights, float32 products" in text
    assert "21 pairs, 2 held out; steps 1 to 3 of 3, 8 pairs each; lr 1e-06, cosine, seed 0" in text
    flags = ("--loss", "simpo", "--gamma", 0, "--beta", 4)
    assert "beta 4, gamma 0, without" in describe(job_of(checkpoint, pairs_file, *flags))
    text = describe(job_of(checkpoint, pairs_file, "--loss", "ukl", "--max_steps", 0))
    text = " ".join(text.split())
    assert "over an answer's tokens, with a reference" in text and "to 0 of 1" in text


# --- Mismatched pairs and missing answers ---------------------------------------------------------


def test_mismatched_pairs_have_the_answers_of_the_next_other_prompt_and_fit():
    rows = Pairs()
    for line, pair in enumerate([([1], [7], [8, 8]), ([1], [9], [10]), ([2, 3], [11], [])]):
        rows.append(Pair(*pair), line + 5)
    mismatched = mismatched_pairs(rows, 3, None)
    assert list(mismatched) == [([1], [11], []), ([1], [11], []), ([3], [7], [8, 8])]
    assert list(mismatched.lines) == [5, 6, 7]
    assert list(mismatched_pairs(rows[:2], 3, None)) == list(rows[:2])  # no row has another prompt
    rows = Pairs([([256, 1, 2], [3], [4]), ([256, 5], [6, 7, 8], [9])])
    assert mismatched_pairs(rows, 5, 256)[0] == ([256, 2], [6, 7, 8], [9])  # the BOS token stays


def test_only_kto_has_mismatched_pairs_and_they_fit_the_longest_pair(checkpoint, pairs_file):
    assert job_of(checkpoint, pairs_file).mismatched is None
    job = job_of(checkpoint, pairs_file, "--loss", "kto")
    lengths, mismatched = job.pairs.lengths(), job.mismatched.lengths()
    assert len(mismatched) == len(lengths) and job.mismatched.lines == job.pairs.lines

    def longest(lengths):
        return (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max()

    most = max(longest(lengths), longest(job.held_out.lengths()))
    assert longest(mismatched) <= most


def test_a_row_without_an_answer_that_the_loss_needs_is_refused_by_line():
    rows = Pairs()
    for pair in (([1], [2], [3]), ([1], [2], []), ([1], [], [3])):
        rows.append(Pair(*pair), line=len(rows) + 11)
    check_answers(rows, "any", "x.jsonl", "kto")
    check_answers(rows[:2], "chosen", "x.jsonl", "sft")
    check_answers(rows[:1], "both", "x.jsonl", "mio")
    for part, needed, loss, message in (
        (
            rows,
            "both",
            "mio",
            "x.jsonl:12: --loss mio needs a chosen and a rejected answer in each",
        ),
        (rows.take([0, 2]), "both", "mio", "x.jsonl:13: --loss mio needs a chosen and a rejected"),
        (rows, "chosen", "sft", "x.jsonl:13: --loss sft needs a chosen answer in each row"),
    ):
        with pytest.raises(ValueError, match=message):
            check_answers(part, needed, "x.jsonl", loss)


# --- Bad input ------------------------------------------------------------------------------------


def break_config(folder: Path) -> None:
    config = read_json(folder / "init" / "config.json")
    (folder / "init" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / "init" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "init" / "model.safetensors")


def break_tensor(folder: Path) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.model["norm"].weight, math.nan)
    model.save_pretrained(folder / "init")


def shrink_vocabulary(folder: Path) -> None:
    model = tiny_model(vocab_size=200, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder / "init")


def write_long_pair(folder: Path) -> None:
    """The rejected answer alone makes the first pair too long for the model's 256 positions."""
    rows = [PAIR_ROWS[0] | {"rejected": "x" * 240}, PAIR_ROWS[1]]
    write_rows(folder / "pairs.jsonl", rows)


def write_unpaired(folder: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    write_rows(folder / "pairs.jsonl", [PAIR_ROWS[0], row | {"label": False}, row, row])


BAD_INPUT = {
    "the folder of the model is missing": (
        ("--init", "gone"),
        "gone: there is no such folder",
    ),
    "the data are missing": (("--data", "gone.jsonl"), "gone.jsonl: No such file"),
    "the held-out data are missing": (("--eval_data", "gone.jsonl"), "gone.jsonl: No such file"),
    "the run folder would lie in a file": (("--out", "one.jsonl/out"), "out: Not a directory"),
    "no row is short enough": (
        ("--max_length", "20"),
        "no rows to train on: 23 of 23 rows dropped",
    ),
    "one prompt cannot be split": (("--data", "one.jsonl"), "1 different prompts are too few to"),
    "another family of models": (break_config, "model_type 'mamba'"),
    "a missing tensor": (remove_tensor, "lacks model.norm.weight"),
    "a tensor with NaN": (break_tensor, "model.norm.weight has values that are not finite"),
    "a tokenizer of another model": (shrink_vocabulary, "lacks id 257; use the tokenizer"),
    "a pair longer than the context": (write_long_pair, "the model's context; lower it to 256"),
    "a row without an answer": (write_unpaired, "pairs.jsonl:2: --loss mio needs a chosen and a"),
}


@pytest.fixture
def inputs(checkpoint, pairs_file, tmp_path, monkeypatch) -> list[str]:
    """Flags of a run in tmp_path. The names of other files are relative to this folder."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "one.jsonl", PAIR_ROWS[:1])
    return ["--init", "init", "--data", "pairs.jsonl", "--out", "out", "--eval_fraction", "0.01"]


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(name, inputs, tmp_path):
    change, message = BAD_INPUT[name]
    if callable(change):
        change(tmp_path)
        change = ("--eval_fraction", "0")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(*inputs, *change)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_refused_without_asserts_too(inputs, tmp_path):
    """`python -O` removes asserts, which therefore must not guard input."""
    commands = [[*inputs, *flags] for flags, _ in BAD_INPUT.values() if not callable(flags)]
    commands += [["--beta", "0"], ["--loss", "sft", "--beta", "3"], ["--data", "pairs.jsonl"]]
    write_long_pair(tmp_path)
    commands += [[*inputs, "--eval_fraction", "0"]]
    script = (
        "import sys, train\nfor argv in {}:\n  try: train.main(argv)\n  except SystemExit: pass"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", script.format(commands)],
        env={"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands) and all(x.startswith("train.py: error: ") for x in lines)
    assert done.returncode == 0 and not (tmp_path / "out").exists()


def test_a_lower_max_length_makes_a_long_pair_fit(checkpoint, tmp_path):
    row = PAIR_ROWS[0] | {"prompt": "x" * 300}
    file = write_rows(tmp_path / "long.jsonl", [row] * 2)
    flags = ("--eval_fraction", "0")
    with pytest.raises(ValueError, match="lower it to 256"):
        job_of(checkpoint, file, *flags)
    job_of(checkpoint, file, *flags, "--max_length", "256")
    with pytest.raises(ValueError, match="context; lower it to 256"):
        job_of(checkpoint, file, *flags, "--max_length", "257")
    held_out = write_rows(tmp_path / "short.jsonl", PAIR_ROWS)
    with pytest.raises(ValueError, match="lower it to 256"):
        job_of(checkpoint, held_out, "--eval_data", file)


# --- Reference log-probs --------------------------------------------------------------------------


def test_the_state_at_step_0_has_the_log_probs_that_the_loss_needs(checkpoint, pairs_file):
    def logps(pairs):
        with torch.no_grad():
            values = [logp_alone(tiny_model(), pair, side) for pair in pairs for side in (1, 2)]
        return torch.stack(values).view(-1, 2)

    for loss in ("mio", "kto", "sft"):
        job = job_of(checkpoint, pairs_file, "--loss", loss)
        progress = first_progress(job)
        assert progress.step == progress.num_tokens == 0 and progress.moments == {}
        torch.testing.assert_close(progress.start_logps, logps(job.held_out))
        assert (progress.ref_logps is None) == (loss == "sft")
        assert (progress.ref_mismatched is None) == (loss != "kto")
        for found, pairs in (
            (progress.ref_logps, job.pairs),
            (progress.ref_mismatched, job.mismatched),
        ):
            if found is not None:
                torch.testing.assert_close(found, logps(pairs))


def test_the_reference_is_computed_once_and_never_taken_from_a_damaged_file(
    checkpoint, pairs_file, tmp_path, capsys
):
    job = job_of(checkpoint, pairs_file)
    right = reference_logps(job, job.pairs)
    assert "the initial weights on the training pairs ..." in capsys.readouterr().out
    (file,) = (tmp_path / "cache").glob("reference-*/*")
    assert file.name == "logps.safetensors" and len(file.parent.name) == len("reference-") + 16
    assert torch.equal(reference_logps(job, job.pairs), right)
    assert f"reference log-probs: found in {file}" in capsys.readouterr().out
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-6] ^= 1
    # Empty, cut, with a NaN, with one bit of a number flipped.
    for damaged in (b"", content[:-8], content[:-4] + b"\x00\x00\xc0\x7f", flipped):
        file.write_bytes(damaged)
        assert torch.equal(reference_logps(job, job.pairs), right)
        assert file.read_bytes() == content and "found" not in capsys.readouterr().out
    save_file({"logps": torch.zeros(21, 2)}, file, metadata={"key": "of other pairs"})
    assert torch.equal(reference_logps(job, job.pairs), right)
    save_file({"logps": torch.zeros(21, 2)}, file)
    assert torch.equal(reference_logps(job, job.pairs), right)


def test_other_weights_pairs_or_precision_have_a_reference_of_their_own(
    checkpoint, pairs_file, tmp_path
):
    job, cache = job_of(checkpoint, pairs_file), tmp_path / "cache"
    options = dataclasses.replace(job.options, dtype="bfloat16")
    for other in (
        job,
        job._replace(options=options),
        job._replace(inputs=job.inputs | {"init": "0"}),
    ):
        reference_logps(other, job.pairs[:3])
    reference_logps(job, job.pairs[:2])
    assert len(list(cache.iterdir())) == 4
    for same in (dataclasses.replace(job.options, **{"seed": 9, "loss": "dpo", "lr": 1.0}),):
        reference_logps(job._replace(options=same), job.pairs[:3])
    assert len(list(cache.iterdir())) == 4


def test_a_reference_that_is_not_finite_ends_a_run_in_one_line(checkpoint, pairs_file, tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, 1e38)
    model.save_pretrained(checkpoint)
    job = job_of(checkpoint, pairs_file)
    with pytest.raises(TrainingError, match="log-probs are not finite; check the weights"):
        reference_logps(job, job.pairs)
    flags = ("--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "out")
    assert f"{checkpoint}: log-probs are not finite" in refused(*flags)
    assert [*(tmp_path / "cache").glob("*/*")] == [*(tmp_path / "out").iterdir()] == []


def test_losses_and_seeds_share_the_reference_and_another_split_has_its_own(
    checkpoint, pairs_file, tmp_path, capsys
):
    starts = []
    for flags, folders in (
        ("--loss mio --seed 1", 1),
        ("--loss dpo --seed 1", 1),
        ("--loss mio --seed 7", 1),
        ("--loss mio --seed 7 --split_seed 7", 2),
    ):
        out = tmp_path / f"run{len(starts)}"
        rows = metrics(run(checkpoint, pairs_file, out, *flags.split(), "--max_steps", "1"))
        is_new = len(starts) in (0, 3)
        assert ("reference log-probs: found in" in capsys.readouterr().out) == (not is_new)
        assert len([*(tmp_path / "cache").glob("reference-*/logps.safetensors")]) == folders
        assert rows[1]["loss"] == pytest.approx(math.log(2 if "dpo" in flags else 4), abs=1e-5)
        starts.append((rows[0]["eval_logps/chosen"], rows[0]["eval_logps/rejected"]))
    assert starts[0] == starts[1] == starts[2] and starts[2] != starts[3]


def test_two_runs_at_a_time_compute_the_reference_once(checkpoint, pairs_file, monkeypatch, capsys):
    """Threads open the folder one by one, so its lock separates them as it separates processes."""
    job, computed, begin = job_of(checkpoint, pairs_file), [], threading.Barrier(2, timeout=30)

    def logps_of(*of_pairs, original=job_module.logps_of):
        computed.append(threading.get_ident())
        time.sleep(0.5)  # in which the other thread would compute them, too
        return original(*of_pairs)

    def run_reference(_):
        begin.wait()
        return reference_logps(job, job.pairs)

    monkeypatch.setattr(job_module, "logps_of", logps_of)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run_reference, range(2))
    assert len(computed) == 1 and torch.equal(one, other)
    out = capsys.readouterr().out
    assert out.count("waiting for another run that computes these log-probs") == 1
    assert out.count("the initial weights on the training pairs ...") == 1
    assert out.count("reference log-probs: found in") == 1
