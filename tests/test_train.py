"""Options, stages and the training loop, against a loop that does everything one at a time."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, tiny_model, write_rows
from safetensors.torch import load_file, save_file
from test_data import single_logp

import data
import model as model_module
import train
from data import byte_tokenizer, epoch_order, load_pairs, make_batches, solution
from mio import LOSSES, loss_table, pair_loss
from train import Options, learning_rate, make_optimizer, train_step

TIMINGS = ("step_seconds", "tokens_per_second")


def run(checkpoint: Path, pairs_file: Path, out: Path, *flags: str) -> Path:
    command = ["--init", str(checkpoint), "--data", str(pairs_file), "--out", str(out)]
    return train.main([*command, "--batch_size", "8", "--lr", "1e-3", "--seed", "1", *flags])


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


# --- A step ---------------------------------------------------------------------------------------


def naive_logps(model, pairs):
    """Every sequence alone: (pairs, 2)."""
    return torch.stack([single_logp(model, p, side) for p in pairs for side in (1, 2)]).view(-1, 2)


def naive_step(model, optimizer, pairs, ref_logps, name, beta, grad_clip=1.0, mismatched=None):
    """The oracle of train_step: every sequence alone, the published formula, autograd.
    mismatched: prompts with other rows' answers, and their log-probs under the reference."""
    logps = naive_logps(model, pairs).flatten()
    lengths = torch.tensor([len(answer) for pair in pairs for answer in pair[1:]])
    shared = {}
    if mismatched:
        with torch.no_grad():
            logratios = naive_logps(model, mismatched[0]) - mismatched[1]
        present = torch.tensor([[len(a) > 0 for a in pair[1:]] for pair in mismatched[0]])
        shared["shared"] = max(0, beta * logratios[present].mean().item())
    losses = pair_loss(
        *(name, logps[0::2], logps[1::2], *ref_logps.unbind(dim=1)),
        beta=beta,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        **shared,
    )
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return losses.mean().item(), norm.item()


# Micro-batches of a row each, of some rows, of the whole step.
CUTS = [("mio", 1), ("mio", 100_000), ("dv", 1), ("dv", 100_000), ("kto", 1), ("kto", 100_000)]


@pytest.mark.parametrize(("name", "micro_tokens"), [*((name, 250) for name in LOSSES), *CUTS])
def test_steps_equal_the_naive_loop_however_they_are_cut_up(name, micro_tokens, pairs_file):
    pairs = load_pairs(pairs_file, byte_tokenizer())[:10]
    if name == "kto":  # which takes rows with one answer, too
        pairs = data.Pairs([*pairs[:4], pairs[4]._replace(chosen=[]), *pairs[5:]])
    others = train.mismatch(pairs, 100, None)
    options = Options(loss=name, beta=0.5, lr=1e-2, weight_decay=0.1)
    fast, slow = (tiny_model(initializer_range=0.15).double() for _ in range(2))
    with torch.no_grad():
        # Off the policy: some losses have a kink where the two are the same, and so has kto's K.
        ref_logps, ref_others = naive_logps(fast, pairs) - 0.2, naive_logps(fast, others) - 3
    optimizers = [make_optimizer(model, options) for model in (fast, slow)]
    for index in ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9], [0, 9, 4]):  # a short step counts as any other
        batches = make_batches(pairs, index, 120, micro_tokens)
        ref = ref_logps if LOSSES[name].needs_reference else None
        fast_others = slow_others = None
        if LOSSES[name].mismatched:
            fast_others = make_batches(others, index, 120, micro_tokens), ref_others
            slow_others = [others[i] for i in index], ref_others[index]
        losses, _, norm = train_step(fast, optimizers[0], batches, options, ref, fast_others)
        assert fast.head_weight.grad is None
        pairs_of_step = [pairs[i] for i in index]
        expected = naive_step(
            *(slow, optimizers[1], pairs_of_step, ref_logps[index], name, 0.5),
            mismatched=slow_others,
        )
        # Where the gradient is clipped, the fused update takes the factor in float32.
        assert (losses.mean().item(), norm.item()) == pytest.approx(expected, rel=1e-7)
    for a, b in zip(fast.parameters(), slow.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_mismatched_pairs_have_another_prompt_and_fit():
    rows = [data.Pair([1], [7], [8, 8]), data.Pair([1], [9], [10]), data.Pair([2, 3], [11], [])]
    mismatched = list(train.mismatch(data.Pairs(rows), 3, None))
    assert mismatched == [([1], [11], []), ([1], [11], []), ([3], [7], [8, 8])]
    assert list(train.mismatch(data.Pairs(rows[:2]), 3, None)) == rows[:2]  # there is no other


def test_only_matrices_decay():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, Options(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1.0 if "norm" in name else 0.95)
        torch.testing.assert_close(parameter, expected)


def test_learning_rate_schedules():
    def curve(**changes):
        options = Options(lr=2.0, **changes)
        return [learning_rate(options, step, 10) for step in range(1, 11)]

    assert curve(schedule="constant", warmup=0.0) == [2.0] * 10
    assert curve(schedule="constant", warmup=0.4)[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert curve(schedule="linear", warmup=0.0) == pytest.approx([2 - 0.2 * i for i in range(10)])
    cosine = curve(schedule="cosine", warmup=0.2)
    assert cosine[2] == 2.0 and cosine[6] == pytest.approx(1.0) and cosine[-1] > 0
    assert sorted(cosine[2:], reverse=True) == cosine[2:]
    assert curve(warmup=1.0)[-1] == 2.0


# --- A run ----------------------------------------------------------------------------------------


def test_run_folder_loads_in_transformers_and_holds_what_it_promises(
    checkpoint, pairs_file, tmp_path
):
    folder = run(checkpoint, pairs_file, tmp_path / "out", "--epochs", "2", "--eval_every", "4")
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(7))  # 20 pairs in steps of 8, 8, 4; twice
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 6]
    start = rows[0]
    assert start["eval_rewards/chosen"] == start["eval_rewards/accuracies"] == 0.0
    assert start["eval_loss"] == pytest.approx(math.log(4), abs=1e-6)
    assert start["eval_mi/js"] == pytest.approx(0.0, abs=1e-6)
    sides = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    sides |= {"logps/chosen", "logps/rejected", "loss"}
    mi = {"eval_mi/dv", "eval_mi/js", "eval_mi/nwj"}
    figures = {"step", "epoch", "learning_rate", "grad_norm", "num_tokens"}
    assert set(rows[1]) == figures | sides
    assert set(rows[4]) == figures | sides | mi | {f"eval_{name}" for name in sides}
    assert rows[1]["loss"] == pytest.approx(math.log(4), abs=1e-5)
    assert rows[-1]["epoch"] == 2.0
    config = json.loads((folder / "train_config.json").read_text())
    assert {field.name for field in dataclasses.fields(Options)} <= set(config)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 6
    for side in ("chosen", "rejected"):
        moved = rows[-1][f"eval_logps/{side}"] - start[f"eval_logps/{side}"]
        assert summary["table"]["mio"][f"Δ {side}"]["mean"] == pytest.approx(moved, abs=1e-5)

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = train.Llama.from_pretrained(folder)
    ids = tokenizer.encode(PAIR_ROWS[0]["prompt"])
    assert ids == load_pairs(pairs_file, byte_tokenizer())[0].prompt
    with torch.no_grad():
        tokens = torch.tensor([ids])
        assert (theirs(tokens).logits - ours(tokens) @ ours.head_weight.T).abs().max() <= 1e-4


def test_every_pair_is_trained_on_once_an_epoch_and_metrics_cover_all_of_a_step(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    seen, lengths = [], []
    step = train.train_step

    def spy(model, optimizer, batches, options, ref_logps, mismatched):
        spy.lrs.append([group["lr"] for group in optimizer.param_groups])
        seen.append([i for batch in batches for i in batch.index])
        lengths.append(sum(int((batch.pair >= 0).sum()) for batch in batches))
        losses, logps, norm = step(model, optimizer, batches, options, ref_logps, mismatched)
        assert len(batches) > 1 and len(losses) == len(seen[-1])
        spy.means.append((losses.double().mean().item(), logps[:, 0].double().mean().item()))
        return losses, logps, norm

    spy.means, spy.lrs = [], []
    monkeypatch.setattr(train, "train_step", spy)
    flags = ("--epochs", "2", "--micro_tokens", "100", "--eval_fraction", "0.13")
    rows = metrics(run(checkpoint, pairs_file, tmp_path / "out", *flags))[1:]
    assert [len(index) for index in seen] == [8, 8, 4] * 2
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(20))
    for epoch in (0, 1):
        order = epoch_order(20, 1, epoch).tolist()
        assert sorted(order[8:16]) == sorted(seen[3 * epoch + 1])
    assert [(row["loss"], row["logps/chosen"]) for row in rows] == spy.means
    assert rows[-1]["num_tokens"] == sum(lengths)
    assert spy.lrs == [[row["learning_rate"]] * 2 for row in rows]
    assert len({row["learning_rate"] for row in rows}) == 5  # the first two are at the peak


def test_the_same_command_twice_gives_the_same_metrics_to_the_last_digit(
    checkpoint, pairs_file, tmp_path
):
    first = run(checkpoint, pairs_file, tmp_path / "a" / "run")
    again = run(checkpoint, pairs_file, tmp_path / "a" / "again")  # finds the reference
    fresh = run(checkpoint, pairs_file, tmp_path / "b" / "run")
    assert metrics(first) == metrics(again) == metrics(fresh)
    a, b = (load_file(folder / "model.safetensors") for folder in (first, fresh))
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = load_file(checkpoint / "model.safetensors")
    assert not torch.equal(a["model.norm.weight"], before["model.norm.weight"])


BASE_FLAGS = {"--loss": "mio", "--eval_every": "2"}
CHANGES = {
    "--loss": "dpo",
    "--beta": "0.9",
    "--epochs": "2",
    "--max_steps": "2",
    "--batch_size": "5",
    "--max_length": "50",
    "--lr": "2e-3",
    "--warmup": "0.9",
    "--schedule": "constant",
    "--weight_decay": "0.5",
    "--grad_clip": "0.01",
    "--seed": "2",
    "--dtype": "bfloat16",
    "--eval_fraction": "0.4",
    "--eval_every": "1",
    "--log_every": "3",
    "--eval_data": "other",
}
# Those of a loss: beside that loss they change the metrics, beside another they are refused.
OWN = {
    "--label_smoothing": ("0.3", "cdpo robust"),
    "--epsilon": ("0.3", "exo"),
    "--gamma": ("3", "simpo"),
    "--alpha": ("0.2", "rpo cpo"),
    "--dpop_lambda": ("1", "dpop"),
}
# Memory and place, not mathematics: the metrics stay, up to rounding.
NO_CHANGE = {
    "--row_tokens": "400",
    "--micro_tokens": "90",
    "--checkpointing": "on",
    "--compile": "on",
    "--device": "cpu",
    "--save_every": "2",
    "--keep": "1",
}


def test_every_flag_does_what_it_says(checkpoint, pairs_file, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", PAIR_ROWS[:3])

    def trained(flags):
        argv = [x for flag in flags.items() for x in flag]
        return metrics(run(checkpoint, pairs_file, tmp_path / "out", "--overwrite", *argv))

    plain = trained(BASE_FLAGS)
    named = {f"--{field.name}" for field in dataclasses.fields(Options)}
    others = {"--init", "--data", "--out", "--config", "--resume", "--overwrite", "--tensorboard"}
    others |= {"--on_policy", "--samples", "--max_new_tokens"}
    others |= {f"--{name}" for name in (*train.LORA_OPTIONS, "init_adapter")}  # test_lora.py
    others |= {"--plan", "--gpu", "--mfu"}  # test_plan.py
    assert named == set(CHANGES) | set(OWN) | set(NO_CHANGE) | others
    for flag, value in CHANGES.items():
        changed = trained(BASE_FLAGS | {flag: str(other) if value == "other" else value})
        assert changed != plain, flag
    for flag, (value, losses) in OWN.items():
        for loss in losses.split():
            quick = {"--loss": loss, "--max_steps": "3", "--lr": "1e-2"}
            assert trained(quick | {flag: value}) != trained(quick), (flag, loss)
        with pytest.raises(SystemExit):
            trained(BASE_FLAGS | {flag: value})
    for flag, value in NO_CHANGE.items():
        for a, b in zip(trained(BASE_FLAGS | {flag: value}), plain, strict=True):
            if a["step"] == 1:  # rewards are rounding errors, of either sign
                a["rewards/accuracies"] = b["rewards/accuracies"]
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5), flag


def test_event_files_hold_the_rows_of_metrics(checkpoint, pairs_file, tmp_path):
    pytest.importorskip("tensorboard", reason="for those who want event files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--tensorboard", "--save_every", "2")
    run(checkpoint, pairs_file, tmp_path / "out", *flags, "--max_steps", "2")
    train.main(["--resume", "--out", str(tmp_path / "out"), "--max_steps", "3"])
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for name in ("loss", "eval_logps/chosen"):
        rows = {r["step"]: r[name] for r in metrics(tmp_path / "out") if name in r}
        assert {e.step: e.value for e in found.Scalars(name)} == pytest.approx(rows)


def test_checkpointing_and_compile_reach_the_model(checkpoint, pairs_file):
    for flag, attribute in (("--checkpointing", "checkpointing"), ("--compile", "compiled")):
        for value in ("on", "off"):
            flags = ["--init", str(checkpoint), "--data", str(pairs_file), flag, value]
            options, _ = train.parse_options(flags)
            model = train.load_job(options).model
            assert getattr(model, attribute) == (value == "on")
    assert train.Options().compile == "auto" and not model.compiled  # which is off on a CPU


def test_every_loss_trains_something_else_and_without_need_no_reference(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    ends, of_pairs = {}, [name for name in LOSSES if LOSSES[name].answers != "drawn"]
    for name in of_pairs:
        flags = ("--loss", name, "--epochs", "1", "--max_steps", "2", "--warmup", "0")
        rows = metrics(run(checkpoint, pairs_file, tmp_path / name, *flags))
        ends[name] = (rows[-1]["eval_logps/chosen"], rows[-1]["eval_logps/rejected"])
        assert ("rewards/chosen" in rows[1]) == LOSSES[name].needs_reference
        assert (rows[1]["eval_loss"] is None) == LOSSES[name].mismatched
    assert len(set(ends.values())) == len(of_pairs)
    monkeypatch.setattr(train, "reference_logps", None)
    run(checkpoint, pairs_file, tmp_path / "sft-again", "--loss", "sft")


def test_kto_learns_from_answers_that_have_no_pair(checkpoint, tmp_path, monkeypatch):
    logratios, shared = [], LOSSES["kto"].shared

    def spy(*sides):
        logratios.append(torch.cat([side.logratios for side in sides]))
        return shared(*sides)

    monkeypatch.setitem(LOSSES, "kto", dataclasses.replace(LOSSES["kto"], shared=spy))
    sides = [(row, side) for row in PAIR_ROWS for side in ("chosen", "rejected")]
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in sides
    ]
    file = write_rows(tmp_path / "labels.jsonl", rows)
    rows = metrics(run(checkpoint, file, tmp_path / "out", "--loss", "kto", "--epochs", "3"))
    assert logratios[0].abs().max() < 1e-3 < logratios[-1].abs().max()  # of the reference's own
    assert len(logratios[0]) == 16 and rows[1]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[1]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["loss"] < 0.5
    with pytest.raises(SystemExit):
        run(checkpoint, file, tmp_path / "out", "--loss", "dpo")


def test_loss_help_prints_the_table_and_stops(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--loss", "help"])
    assert stop.value.code == 0 and capsys.readouterr().out == loss_table() + "\n"


def test_a_run_says_with_what_it_trains(checkpoint, pairs_file, tmp_path, capsys):
    flags = ("--loss", "simpo", "--max_steps", "0")
    run(checkpoint, pairs_file, tmp_path / "out", *flags)
    assert "means over an answer's tokens, beta 2, gamma 0.5, without" in capsys.readouterr().out
    run(
        checkpoint,
        pairs_file,
        tmp_path / "out",
        *flags,
        "--gamma",
        "3",
        "--beta",
        "4",
        "--overwrite",
    )
    assert "beta 4, gamma 3, without" in capsys.readouterr().out


SUMMED_LOG_RATIOS = (
    "dpo mio bce nwj dv cdpo robust hinge apo_zero apo_down exo sppo dpop rpo kto rlhf"
)


def test_default_betas_and_the_demonstrations(checkpoint, pairs_file):
    for name, loss in LOSSES.items():
        demo, _ = train.parse_options(["--loss", name])
        own, _ = train.parse_options(
            ["--loss", name, "--init", str(checkpoint), "--data", str(pairs_file)]
        )
        assert own.beta == loss.beta
        assert demo.beta == loss.beta * (5 if name in SUMMED_LOG_RATIOS.split() else 1)


def test_reference_is_computed_once_and_never_taken_from_other_weights_or_pairs(
    checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    rows = metrics(run(checkpoint, pairs_file, tmp_path / "one", "--overwrite"))
    run(checkpoint, pairs_file, tmp_path / "two", "--loss", "dpo")
    assert "reference log-probs: found" in capsys.readouterr().out
    (file,) = (tmp_path / "cache").iterdir()
    truth = file.read_bytes()
    for damage in (b"", truth[:-8], truth[:-4] + b"\x00\x00\xc0\x7f"):  # empty, cut, a NaN
        file.write_bytes(damage)
        assert metrics(run(checkpoint, pairs_file, tmp_path / "one", "--overwrite")) == rows
        assert file.read_bytes() == truth
    flipped = bytearray(truth)
    flipped[-6] ^= 1  # a bit of a number: what was written is under a hash
    file.write_bytes(flipped)
    assert metrics(run(checkpoint, pairs_file, tmp_path / "one", "--overwrite")) == rows
    assert file.read_bytes() == truth
    save_file({"logps": torch.zeros(20, 2)}, file, metadata={"key": "of something else"})
    assert metrics(run(checkpoint, pairs_file, tmp_path / "one", "--overwrite")) == rows
    run(checkpoint, pairs_file, tmp_path / "one", "--overwrite", "--dtype", "bfloat16")
    write_rows(pairs_file, PAIR_ROWS[:-1])
    run(checkpoint, pairs_file, tmp_path / "one", "--overwrite")
    tiny_model(seed=7).save_pretrained(checkpoint)
    run(checkpoint, pairs_file, tmp_path / "one", "--overwrite")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_wrong_reference_or_loss_is_noticed_before_the_first_update(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    right = train.reference_logps
    monkeypatch.setattr(train, "reference_logps", lambda job: right(job).flip(1))
    with pytest.raises(AssertionError, match="policy and reference differ"):
        run(checkpoint, pairs_file, tmp_path / "out")
    monkeypatch.undo()
    wrong = dataclasses.replace(LOSSES["dpo"], function=LOSSES["mio"].function)
    monkeypatch.setitem(LOSSES, "dpo", wrong)
    with pytest.raises(AssertionError, match="step 0: loss 1.386294, not 0.693147"):
        run(checkpoint, pairs_file, tmp_path / "out", "--overwrite", "--loss", "dpo")


def test_no_run_or_file_is_lost_without_a_word(checkpoint, pairs_file, tmp_path, capsys):
    out = run(checkpoint, pairs_file, tmp_path / "out", "--save_every", "1")
    (out / "notes.txt").write_text("dear")
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, pairs_file, out, "--loss", "dpo")
    assert stop.value.code == 2
    error = "--out {}: holds a finished run; --overwrite replaces it, another --out keeps it"
    assert error.format(out) in capsys.readouterr().err
    run(checkpoint, pairs_file, out, "--loss", "dpo", "--overwrite")
    assert json.loads((out / "train_config.json").read_text())["loss"] == "dpo"
    assert not (out / "checkpoints").exists() and (out / "notes.txt").read_text() == "dear"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    for place in (tmp_path / "mine", checkpoint, tmp_path, pairs_file):
        with pytest.raises(SystemExit):
            run(checkpoint, pairs_file, place)
    with pytest.raises(SystemExit):  # it would move away what it starts from
        run(out, pairs_file, out)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_a_bad_folder_is_refused_before_the_demonstration_makes_anything(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "theirs" / "base").mkdir(parents=True)
    (tmp_path / "theirs" / "base" / "model.safetensors").write_text("a model of mine")
    before = sorted(tmp_path.rglob("*"))
    for flags in (
        ["--out", "mine"],
        ["--out", "mine/thesis.txt"],
        ["--out", "base"],
        ["--out", "theirs/run"],
        ["--out", "run", "--max_length", "40"],
    ):
        with pytest.raises(SystemExit) as stop:
            train.main([flags[0], str(tmp_path / flags[1]), *flags[2:]])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "--" in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_numbers_are_refused(checkpoint, pairs_file, tmp_path, capsys):
    model = tiny_model()
    torch.nn.init.constant_(model.model["norm"].weight, float("nan"))
    model.save_pretrained(checkpoint)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, pairs_file, tmp_path / "out")
    assert stop.value.code == 2 and "has values that are not finite" in capsys.readouterr().err


def test_zero_steps_leave_the_weights_alone(checkpoint, pairs_file, tmp_path):
    folder = run(checkpoint, pairs_file, tmp_path / "out", "--max_steps", "0")
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in metrics(folder)] == [0]


def test_one_pair_and_batches_larger_than_the_data(checkpoint, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", PAIR_ROWS[:1])
    flags = ("--eval_fraction", "0", "--batch_size", "64")
    rows = metrics(run(checkpoint, file, tmp_path / "out", *flags))
    assert [row["step"] for row in rows] == [0, 1] and "eval_loss" not in rows[1]


def test_config_file_is_read_and_flags_win(checkpoint, pairs_file, tmp_path):
    first = run(checkpoint, pairs_file, tmp_path / "out", "--beta", "0.7", "--loss", "bce")
    again = train.main(
        ["--config", str(first / "train_config.json"), "--out", str(tmp_path / "again")]
    )
    assert metrics(first) == metrics(again)
    config = ["--config", str(first / "train_config.json")]
    other = train.main([*config, "--out", str(again), "--beta", "0.1", "--overwrite"])
    written = json.loads((other / "train_config.json").read_text())
    assert (written["beta"], written["loss"]) == (0.1, "bce")
    options, _ = train.parse_options([*config, "--loss", "simpo"])  # another loss's beta is not its
    assert (options.beta, options.out) == (LOSSES["simpo"].beta, "out/simpo")
    assert options.data == str(pairs_file)


def test_config_with_an_unknown_option_is_refused(checkpoint, pairs_file, tmp_path, capsys):
    for content, match in (
        ({"lrr": 1}, "no option 'lrr'"),
        ({"epochs": 2.7}, "--epochs 2.7: expected int"),
        ({"epochs": True}, "expected int"),
        ({"epochs": float("inf")}, "Infinity is no number"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            run(checkpoint, pairs_file, tmp_path / "out", "--config", str(tmp_path / "c.json"))
        assert match in capsys.readouterr().err


def test_no_git_and_no_infinity_in_json(checkpoint, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    folder = run(checkpoint, pairs_file, tmp_path / "out", "--eval_fraction", "0.04")
    assert json.loads((folder / "train_config.json").read_text())["commit"] is None
    table = json.loads((folder / "summary.json").read_text())["table"]
    assert table["mio"]["reward"]["n"] == 1 and table["mio"]["reward"]["error"] is None
    row = train.strict_json({"eval_mi/nwj": -math.inf, "loss": 1.0})
    assert json.loads(row) == {"eval_mi/nwj": None, "loss": 1.0}


def test_every_shard_of_the_initial_weights_counts_for_the_reference(
    checkpoint, pairs_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(model_module, "MAX_SHARD_BYTES", 20_000)
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    for name in (names[0], names[-1]):  # in the first shard, in the last
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        model.save_pretrained(checkpoint)
        run(checkpoint, pairs_file, tmp_path / "out", "--max_steps", "1", "--overwrite")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_loss_that_is_not_finite_stops_with_step_and_pairs_named(
    checkpoint, pairs_file, tmp_path, capsys
):
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, pairs_file, tmp_path / "out", "--lr", "1e30", "--warmup", "0")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "train.py: error: step 2: " in error and "from line " in error and "--lr" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as stop:  # in the last step, which no other follows
        run(checkpoint, pairs_file, tmp_path / "last", "--lr", "1e39", "--max_steps", "1")
    assert stop.value.code == 2 and "weights not finite" in capsys.readouterr().err
    assert not (tmp_path / "last" / "model.safetensors").exists()
    assert (checkpoint / "model.safetensors").read_bytes() == before


# --- Bad input ------------------------------------------------------------------------------------


def break_config(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def break_weights(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, checkpoint / "model.safetensors")


def shrink_vocabulary(checkpoint):
    tiny_model(vocab_size=200, bos_token_id=0, eos_token_id=1).save_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--beta", "0"], "--beta 0.0: must be more than 0"),
        (["--beta", "-1"], "--beta -1.0: must be more than 0"),
        (["--beta", "nan"], "--beta nan: must be more than 0"),
        (["--beta", "inf"], "--beta inf: must be more than 0, at most"),
        (["--grad_clip", "inf"], "--grad_clip inf: must be at least 0 and finite"),
        (["--epochs", "1" + 20 * "0"], "must be at least 1, at most 2147483648"),
        (["--loss", "a\nb"], "--loss a b: choose from"),
        (["--eval_fraction", "0.01", "--data", "one"], "1 different prompts are too few"),
        (["--beta", "much"], "--beta much: expected float"),
        (["--lr", "0"], "--lr 0.0: must be more than 0"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--batch_size", "2.5"], "--batch_size 2.5: expected int"),
        (["--eval_fraction", "0.95"], "--eval_fraction 0.95: must be at least 0, at most 0.9"),
        (["--loss", "nope"], "--loss nope: choose from dpo, mio"),
        (["--gamma", "1"], "--gamma: --loss mio does not use it; see --loss help"),
        (["--loss", "robust", "--label_smoothing", "0.5"], "must be at least 0, at most 0.49"),
        (["--nope", "1"], "unrecognized arguments: --nope 1"),
        (["--bet", "1"], "unrecognized arguments: --bet 1"),
        (["--beta"], "argument --beta: expected one argument"),
        (["--device", "warp"], "--device warp: not available"),
        (["--device", "meta"], "--device meta: not available"),
        (["--beta", ""], "--beta : expected float"),
        (["--init", ""], "--init FOLDER is missing"),
        (["--init", "gone"], "gone: there is no such checkpoint folder"),
        (["--out", "one/out"], "one.jsonl/out: Not a directory"),
        (["--data", "gone.jsonl"], "gone.jsonl: No such file"),
        (["--data", ""], "--data FILE.jsonl is missing"),
        (["--eval_data", "gone.jsonl"], "gone.jsonl: No such file"),
        (["--config", "gone.json"], "gone.json: No such file"),
        (["--row_tokens", "0"], "--row_tokens 0: must be at least 1"),
        (["--max_length", "20"], "pairs.jsonl: no rows to train on: 23 of 23 rows dropped"),
        (break_config, "model_type 'mamba'"),
        (break_weights, "model.norm.weight is missing"),
        (shrink_vocabulary, "ids up to 257, the model has 200"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    flags, match, checkpoint, pairs_file, tmp_path, capsys
):
    if callable(flags):
        flags(checkpoint)
        flags = []
    one = write_rows(tmp_path / "one.jsonl", PAIR_ROWS[:1])
    flags = [flag.replace("one", str(one)) if flag[:3] == "one" else flag for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, pairs_file, tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("train.py: error: ") and match in error
    assert error.count("\n") == 1 and error.endswith("\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pair_beyond_the_models_positions_is_refused(checkpoint, tmp_path, capsys):
    file = write_rows(tmp_path / "long.jsonl", [PAIR_ROWS[0] | {"prompt": "x" * 300}] * 2)
    with pytest.raises(SystemExit):
        run(checkpoint, file, tmp_path / "out", "--eval_fraction", "0")
    assert "the model reads 256; lower --max_length" in capsys.readouterr().err
    run(checkpoint, file, tmp_path / "out", "--eval_fraction", "0", "--max_length", "200")


# --- The demonstration ----------------------------------------------------------------------------


def test_pairs_are_right_against_wrong_from_what_the_base_answered(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)

    def answers(model, tokenizer, prompts, samples, seed):
        wrong = ["1+1=2\n#### 1000", "", " ", "#### x", "1+1=2\n#### 1000"]
        return [
            [solution(p), *wrong, solution(p)] if i % 3 else wrong for i, p in enumerate(prompts)
        ]

    monkeypatch.setattr(train.evaluation, "sample_answers", answers)
    settings = {"prompts": 30, "held_out": 12, "samples": 7, "per_prompt": 2}
    monkeypatch.setattr(train, "PAIRS", settings)
    train.make_pairs(tmp_path, 0, "cpu")
    for name, count, split in (("pairs", 30, "train"), ("heldout_pairs", 12, "test")):
        rows = [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count - count // 3
        for row in rows:
            assert row["chosen"] == solution(row["prompt"])
            assert row["rejected"] == "1+1=2\n#### 1000"
            assert data.split_of(row["prompt"]) == split


def test_the_demonstration_from_end_to_end_in_small(tmp_path, monkeypatch, capsys):
    """Which problems are trained on and graded, how answers are drawn, and every sign of the
    table, with answers that are given instead of generated."""
    calls = []

    def answers(model, tokenizer, prompts, samples=1, temperature=1.0, seed=0):
        calls.append((data.split_of(prompts[0]), samples, temperature))
        assert len({data.split_of(prompt) for prompt in prompts}) == 1
        share = 2 if len([c for c in calls if c[0] == "test" and c[2] == 0]) < 2 else 1
        good = [i % share == 0 for i in range(len(prompts))]
        return [
            [solution(p)] * samples if right and samples != 3 else [solution(p), "#### 77", ""]
            if samples == 3 else ["#### 77"] * samples
            for p, right in zip(prompts, good)
        ]  # fmt: skip

    trained = []

    def pair(tokenizer, prompt, chosen, rejected):
        trained.append(data.split_of(prompt))
        assert chosen == solution(prompt) and rejected is None
        return data.make_pair(tokenizer, prompt, chosen, rejected)

    monkeypatch.setattr(train, "make_pair", pair)
    monkeypatch.setattr(train.evaluation, "sample_answers", answers)
    monkeypatch.setattr(train.evaluation, "TEST_PROBLEMS", 20)
    base = {"batch_size": 8, "check_every": 2, "problems": 10, "target": 0.5, "most": 1.0}
    monkeypatch.setattr(train, "BASE", train.BASE | base)
    monkeypatch.setattr(
        train, "PAIRS", {"prompts": 40, "held_out": 9, "samples": 3, "per_prompt": 2}
    )
    monkeypatch.setattr(train, "tqdm", functools.partial(train.tqdm, disable=True))  # as some do
    out = str(tmp_path / "sft")
    folder = train.main(["--loss", "sft", "--out", out, "--epochs", "1", "--max_steps", "2"])
    assert json.loads((tmp_path / "base" / "base.json").read_text())["steps"] == 2
    assert set(trained) == {"train"} and len(trained) == 16
    graded = [("test", 1, 0), ("test", 8, 1.0)]
    assert calls == [("validation", 1, 0), ("train", 3, 1.0), ("test", 3, 1.0), *graded, *graded]
    table = json.loads((folder / "summary.json").read_text())["table"]
    assert table["base"]["greedy"]["mean"] == 0.5 and table["sft"]["greedy"]["mean"] == 1.0
    assert table["change"]["greedy"]["mean"] == 0.5
    assert table["sft"]["Δ chosen"]["mean"] > 0  # supervised training on the chosen
    assert table["sft"]["Δ chosen"]["n"] == 9
    config = json.loads((folder / "train_config.json").read_text())
    assert config["init"] == str(tmp_path / "base")
    capsys.readouterr()
    train.main(["--loss", "mio", "--out", str(tmp_path / "mio"), "--max_steps", "1"])
    said = capsys.readouterr().out
    assert "base model: found" in said and "pairs: found" in said and "beta 1," in said
    assert "the base model on the held-out" not in said
    (tmp_path / "base" / "pairs.jsonl").unlink()  # what is gone is made again
    train.main(["--loss", "dpo", "--out", str(tmp_path / "dpo"), "--max_steps", "1"])
    said = capsys.readouterr().out
    assert "pairs: drawn" in said and "base model: found" in said and "beta 0.5," in said
    monkeypatch.setattr(train, "BASE", train.BASE | {"batch_size": 4})  # another base, other pairs
    train.main(["--loss", "dpo", "--out", str(tmp_path / "two"), "--max_steps", "1"])
    said = capsys.readouterr().out
    assert "base model: supervised" in said and "pairs: drawn" in said
    assert "the base model on the held-out" in said
