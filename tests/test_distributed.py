"""Several processes under torchrun train as one process does.

`python tests/test_distributed.py` prints a table: losses, models, processes, differences.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from conftest import PAIR_ROWS, byte_tokenizer, tiny_model, write_rows
from runs import metrics
from safetensors.torch import load_file

import train
from data import Pairs, answer_states, epoch_order, load_pairs, make_batches, row_length
from eval import pair_logps
from support import distributed
from support.job import Job, logps_of
from support.run_folder import Progress, checkpoints

# Micro-batches of a pair or two, and 5 pairs in a step: one process has two passes, another three.
# 21 pairs: in the last step of an epoch one of two processes has none.
FLAGS = ["--batch_size", "5", "--micro_tokens", "150", "--lr", "1e-3", "--weight_decay", "0.1",
         "--eval_every", "3"]  # fmt: skip
LAYOUT = 100, 150  # row_tokens, micro_tokens


# --- Methods of World in each of two processes ----------------------------------------------------


def gather_joins_rows_in_the_order_of_the_processes(world, folder):
    rows = torch.arange(6.0).view(3, 2)
    parts = [rows[:1], rows[1:1]] if world.first else [rows[1:2], rows[2:]]
    assert torch.equal(world.gather(parts), rows)
    votes = world.gather([torch.tensor([world.first])])
    assert votes.tolist() == [True, False]
    assert world.gather([torch.zeros(0, dtype=torch.long)]).tolist() == []
    alone = world.gather([torch.eye(2)] if world.first else [])  # a process without a batch
    assert torch.equal(alone, torch.eye(2))


def job_of(world, folder, size: int) -> Job:
    pairs = load_pairs(folder / "pairs.jsonl", byte_tokenizer())
    options = train.Options(batch_size=size, epochs=1, row_tokens=100, micro_tokens=150)
    return Job(options, tiny_model(), None, pairs, Pairs(), {}, None, {}, world, mismatched=pairs)


def steps_deal_out_the_pairs(world, folder):
    count = len(job_of(world, folder, 1).pairs)
    for size in (5, count, count - 1):  # at last, the second step has a single pair
        job, progress = job_of(world, folder, size), Progress(0, 0, None, None, None, {})
        order = epoch_order(count, seed=0, epoch=0).tolist()
        for step in range(1, job.steps + 1):
            data, index = train.step_data(job, progress, step), order[:size]
            order = order[size:]
            for batches in (data.batches, data.mismatched[0]):
                own = [i for batch in batches for i in batch.index]
                everyone = world.gather([torch.tensor(own, dtype=torch.long)]).tolist()
                assert sorted(everyone) == sorted(data.index) == sorted(index)
                assert batches is not data.batches or everyone == data.index
                for batch in batches:
                    assert len(batch.lengths) == 2 * len(batch.index) > 0
            tokens = sum(row_length(job.pairs[i]) for batch in data.batches for i in batch.index)
            loads = world.gather([torch.tensor([tokens])]).tolist()
            assert len(index) <= 5 or max(loads) <= 1.5 * min(loads)
        assert not order


def log_probs_are_those_of_one_process(world, folder):
    job = job_of(world, folder, 5)
    for pairs in (job.pairs, job.pairs[:1], Pairs()):
        found, expected = logps_of(job, pairs), pair_logps(job.model, pairs, *LAYOUT, torch.float32)
        torch.testing.assert_close(found, expected)


def gradients_are_sums_over_all_pairs(world, folder):
    pairs = load_pairs(folder / "pairs.jsonl", byte_tokenizer())
    for index in ([3, 1, 4, 15, 9], [7]):  # with a single pair, the second process has no batch
        sums = []
        for one in (distributed.World(), world):
            model = tiny_model()
            model.head_weight.requires_grad_(False)  # the states do not depend on the head
            for batch in make_batches(pairs, index[one.rank :: one.count], *LAYOUT):
                answer_states(model, batch).sum().backward()
            sums.append(one.sum_gradients(model.parameters()))
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(a is b for a, b in zip(gradients, sums[-1], strict=True))
            assert model.head_weight.grad is None
        for found, expected in zip(*reversed(sums), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


METHODS = (
    gather_joins_rows_in_the_order_of_the_processes,
    steps_deal_out_the_pairs,
    log_probs_are_those_of_one_process,
    gradients_are_sums_over_all_pairs,
)


def test_one_process_needs_none_of_it():
    world, model = distributed.World(), tiny_model()
    assert (world.rank, world.count, world.first) == (0, 1, True)
    assert world.sum_gradients(model.parameters()) == []
    with distributed.join() as world:
        assert type(world) is distributed.World


# --- Jobs under torchrun --------------------------------------------------------------------------


def start(folder: Path, count: int, name: str, commands: list) -> subprocess.Popen:
    """torchrun of `count` processes. Each does all the commands as if torchrun had just started it:
    (a signal that the last process sends itself in step 3, or 0; flags of train.py), or the name of
    one of METHODS."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    (folder / f"{name}.json").write_text(json.dumps(list(zip(ports, commands))))
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    with open(folder / f"{name}.out", "w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", *torchrun, __file__, folder / f"{name}.json"],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )


def work(file: Path) -> None:
    """One of the processes: writes how every command ended, as (status, standard error)."""
    rank, ended = int(os.environ["RANK"]), []
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # this store allows only one start
    for port, command in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        ended.append(
            method(command, file.parent) if isinstance(command, str) else trained(*command)
        )
        file.with_suffix(f".{rank}").write_text(json.dumps(ended))


def method(name: str, folder: Path) -> tuple[int, str]:
    try:
        with distributed.join() as world:
            assert isinstance(world, distributed.Processes) and world.count == 2
            globals()[name](world, folder)
        return 0, ""
    except BaseException:
        torch.distributed.destroy_process_group()
        return 1, traceback.format_exc()


def trained(number: int, argv: list[str]) -> tuple[int, str]:
    step, last = train.train_step, os.environ["RANK"] != "0"
    numbers = iter([0, 0, number if last else 0])

    def signalled(*args, **more):
        if number := next(numbers, 0):
            os.kill(os.getpid(), number)
        return step(*args, **more)

    status, error, train.train_step = 0, io.StringIO(), signalled
    with contextlib.redirect_stderr(error):
        try:
            train.main(argv)
        except SystemExit as stop:
            status = stop.code
            torch.distributed.destroy_process_group()
    train.train_step = step
    return status, error.getvalue().rpartition("\r")[2]


def inputs(folder: Path) -> None:
    for name, changes in {"init": {}, "tied": {"tie_word_embeddings": True}}.items():
        tiny_model(**changes).save_pretrained(folder / name)
        byte_tokenizer().save(folder / name)
    write_rows(folder / "pairs.jsonl", PAIR_ROWS)


def command(folder: Path, out: str, kind: str, *flags: str) -> list[str]:
    init = "tied" if kind == "tied" else "init"
    files = ("--init", folder / init, "--data", folder / "pairs.jsonl", "--out", folder / out)
    return [*map(str, files), *FLAGS, *flags, *(("--lora_rank", "4") if kind == "lora" else ())]


def differences(one: Path, other: Path) -> tuple[float, float, float]:
    """The largest difference of a loss and of another figure in metrics.jsonl, relative above 1,
    and of a weight."""
    rows = [metrics(folder) for folder in (one, other)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    figures = {
        (name, a["step"]): abs(a[name] - b[name]) / max(1, abs(a[name]))
        for a, b in zip(*rows)
        for name in a
        if a[name] is not None or b[name] is not None
    }
    losses = {key: figures.pop(key) for key in list(figures) if key[0].endswith("loss")}
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    largest = max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0])
    return max(losses.values()), max(figures.values()), largest


def assert_same(one: Path, other: Path) -> None:
    losses, figures, weights = differences(one, other)
    assert losses <= 1e-5 and weights <= 1e-5
    assert figures <= 1e-4  # gradient norms, and small sums of large terms, are less exact


# --- Tests: one job of two processes, which ends when one of them dies ----------------------------

RUNS = {"mio": "init", "dv": "tied", "kto": "lora"}
HALF = ("--max_steps", "4", "--save_every", "2")
REFUSED = {
    "--batch_size must be at least 2": ("--batch_size", "1"),
    "without torchrun": ("--on_policy",),
    "gone.jsonl: No such file": ("--data", "gone.jsonl"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of all runs, and how the commands of both processes ended, by name."""
    folder = tmp_path_factory.mktemp("distributed")
    inputs(folder)
    train.main(command(folder, "half-1", "init", *HALF))
    resume = ["--resume", "--max_steps", "10", "--out"]
    commands = {check.__name__: check.__name__ for check in METHODS}
    commands |= {f"{loss}-2": (0, command(folder, f"{loss}-2", kind, "--loss", loss))
                 for loss, kind in RUNS.items()}  # fmt: skip
    commands["stopped"] = signal.SIGTERM, command(folder, "stopped", "init")
    commands["half-1"] = 0, [*resume, str(folder / "half-1")]
    commands |= {word: (0, command(folder, "bad", "init", *bad)) for word, bad in REFUSED.items()}
    commands["plan"] = 0, ["--plan", "llama-3.2-1b"]
    commands["killed"] = signal.SIGKILL, command(folder, "killed", "init")
    job = start(folder, 2, "job", list(commands.values()))
    for loss, kind in RUNS.items():
        train.main(command(folder, f"{loss}-1", kind, "--loss", loss))
    assert job.wait(300) != 0
    processes = [json.loads((folder / f"job.{rank}").read_text()) for rank in (0, 1)]
    assert len(processes[0]) == len(commands) - 1, (folder / "job.out").read_text()[-3000:]
    return folder, dict(zip(commands, zip(*processes)))


@pytest.mark.parametrize("name", [check.__name__ for check in METHODS])
def test_in_each_of_two_processes(name, ended):
    for status, error in ended[1][name]:
        assert status == 0, error


@pytest.mark.parametrize("loss", RUNS)
def test_two_processes_train_as_one_does(loss, ended):
    folder, _ = ended
    assert_same(folder / f"{loss}-1", folder / f"{loss}-2")


def test_a_signal_to_one_process_stops_all_and_any_number_of_them_goes_on(ended):
    folder, how = ended
    (first, said), (second, unsaid) = how["stopped"]
    assert first == second == 128 + signal.SIGTERM and "step 3 is saved" in said and unsaid == ""
    assert [path.name for path in checkpoints(folder / "stopped")] == ["step-000003"]
    train.main(["--resume", "--out", str(shutil.copytree(folder / "stopped", folder / "one"))])
    for resumed in ("one", "half-1"):  # by one process, by two
        assert_same(folder / "mio-1", folder / resumed)


@pytest.mark.parametrize("word", REFUSED)
def test_bad_input_is_one_line_of_the_first_process(word, ended):
    folder, how = ended
    (first, said), (second, unsaid) = how[word]
    assert first == second == 2 and unsaid == ""
    assert word in said and said.startswith("train.py: error: ") and said.count("\n") == 1
    assert not (folder / "bad").exists()


def test_a_plan_needs_one_process_and_is_printed_once(ended):
    folder, how = ended
    assert how["plan"] == ([0, ""], [0, ""])
    assert (folder / "job.out").read_text().count("1,235,814,400 parameters") == 1


def test_where_one_process_dies_the_job_ends(ended):
    folder, _ = ended
    assert "SIGKILL" in (folder / "job.out").read_text()
    assert (folder / "killed" / "metrics.jsonl").exists()
    assert not (folder / "killed" / "summary.json").exists()


# --- The table ------------------------------------------------------------------------------------


def table() -> None:
    losses, kinds = ("mio", "dpo", "ipo", "kto", "sft", "dv"), ("init", "tied", "lora")
    runs = list(itertools.product(losses, kinds))
    flags = ("--epochs", "4", "--eval_every", "7", "--loss")
    print("| loss | model | processes | steps | loss | others | weights |\n" + 7 * "|---" + "|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inputs(folder)
        for loss, kind in runs:
            with contextlib.redirect_stdout(io.StringIO()):
                train.main(command(folder, f"{loss}-{kind}-1", kind, *flags, loss))
        for count in (2, 3):
            commands = [(0, command(folder, f"{loss}-{kind}-{count}", kind, *flags, loss))
                        for loss, kind in runs]  # fmt: skip
            assert start(folder, count, f"table-{count}", commands).wait() == 0
            for loss, kind in runs:
                one, many = (folder / f"{loss}-{kind}-{n}" for n in (1, count))
                found = " | ".join(f"{value:.1e}" for value in differences(one, many))
                steps = json.loads((many / "summary.json").read_text())["step"]
                print(f"| {loss} | {kind} | {count} | {steps} | {found} |")


if __name__ == "__main__":
    if torch.distributed.is_torchelastic_launched():
        work(Path(sys.argv[1]))
    else:
        table()
