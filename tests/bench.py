"""Measures speed and memory, as ratios between contenders: python tests/bench.py [PART ...]

    training     optimizer steps: ours, transformers in two ways, TRL; one process each
    plan         the memory that train.py --plan predicts against that of a step
    lora         steps that train adapters against steps that train all weights
    head         the fused head against three bare matrix products, and how its memory grows
    prompts      one prompt for both answers of a pair against a prompt for each answer
    generation   greedy answers to GSM8K questions: ours against transformers
    tokenizers   encoding: ours against the tokenizers library
    loading      rows of JSONL and, with pyarrow, of Parquet per second
    saving       a checkpoint against a training step, and against the disk alone

Peers that are not installed are left out. A figure is the best of several rounds in which the
contenders take turns or, for training, the median over steps.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from conftest import SHARED
from torch.nn.functional import softplus

import eval as evaluation
import train
from data import Pair, Pairs, StepData, load_pairs, load_tokenizer, make_batches
from mio import fused_pair_loss
from model import Llama, ModelConfig
from support.builtin_task import problems, solution
from support.files import read_rows
from support.job import Job
from support.lora import LINEARS, LoraConfig, add_lora
from support.plan import step_cost
from support.questions import read_items
from support.run_folder import Progress, save_checkpoint
from support.sampling import sample_ids
from support.tokenizers import byte_tokenizer

ROUNDS = 5


def best_of(contenders: dict[str, tuple]) -> dict[str, float]:
    """Seconds of each contender (function, *arguments), which take turns."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, (run, *arguments) in contenders.items():
            start = time.perf_counter()
            run(*arguments)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def one_by_one(encode, texts: list[str], *arguments) -> None:
    for text in texts:
        encode(text, *arguments)


def bench_tokenizers() -> None:
    """Ours against the tokenizers library, which gets the texts one by one and in one batch."""
    import tokenizers
    from test_tokenizers import FAMILIES, SAMPLES, strings, write_tokenizer

    prose = [solution(problem) + problem for problem in problems("train", 3000, seed=0)]
    code = Path(__file__).read_text(encoding="utf-8").split("\n\n") * 40
    corpora = {"arithmetic": prose, "code": code, "all sorts": strings(3000)}
    corpora["long"] = ["".join(SAMPLES * 3)] * 40
    print(f"{'':16}{'':12}{'ours':>12}{'one by one':>14}{'batches':>12}   (MB/s, ratio)")
    for family in ("gpt2", "llama3", "qwen", "smollm", "llama2", "mistral"):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), FAMILIES[family]())
            ours = load_tokenizer(folder)
            theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        for name, texts in corpora.items():
            seconds = best_of({
                "ours": (one_by_one, ours.encode, texts),
                "one": (one_by_one, theirs.encode, texts, None, False, False),
                "batch": (theirs.encode_batch_fast, texts, False, False),
            })  # fmt: skip
            size = sum(len(text.encode()) for text in texts) / 1e6
            cells = [f"{size / s:.1f} ({s / seconds['ours']:.2f})" for s in seconds.values()]
            print(f"{family:16}{name:12}" + "".join(f"{cell:>13}" for cell in cells))


def bench_loading() -> None:
    """100,000 rows of the built-in task, with and without the time to encode them."""
    from test_tokenizers import FAMILIES, write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), FAMILIES["llama3"]())
        tokenizer, file = load_tokenizer(folder), Path(folder) / "rows.jsonl"
        texts = []
        with open(file, "w", encoding="utf-8") as rows:
            for problem in problems("train", 10_000, seed=0) * 10:
                texts += [problem, solution(problem), solution(problem) + "0"]
                row = dict(zip(("prompt", "chosen", "rejected"), texts[-3:]))
                rows.write(json.dumps(row) + "\n")
        files = {"JSONL": file}
        if importlib.util.find_spec("pyarrow"):
            import pyarrow.parquet

            files["Parquet"] = file.with_suffix(".parquet")
            table = pyarrow.Table.from_pylist([row for _, row in read_rows(file)])
            pyarrow.parquet.write_table(table, files["Parquet"])
        contenders = {name: (load_pairs, path, tokenizer) for name, path in files.items()}
        seconds = best_of(contenders | {"encode": (one_by_one, tokenizer.encode, texts)})
        for name, path in files.items():
            pairs = load_pairs(path, tokenizer)
            held = sum(part.itemsize * len(part) for part in (pairs.ids, pairs.ends, pairs.lines))
            print(f"{name}: {len(pairs):,} rows of {path.stat().st_size / len(pairs):.0f} bytes: "
                  f"{len(pairs) / seconds[name]:,.0f} rows/s, without encoding "
                  f"{len(pairs) / (seconds[name] - seconds['encode']):,.0f} rows/s; "
                  f"{held / len(pairs.ids):.1f} bytes an id")  # fmt: skip


# --- Training: the same pairs in the same order, one process for each contender -------------------

SIZES = {
    "W1": ModelConfig(
        vocab_size=128256, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "W2": ModelConfig(
        vocab_size=128256, hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "W3": ModelConfig(
        vocab_size=128256, hidden_size=384, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, head_dim=64, max_position_embeddings=2048,
    ),
}  # fmt: skip
STEPS, BATCH, BETA, LR, TURNS = 4, 4, 0.2, 1e-5, 2
LAYOUT = 128, 4096  # tokens of a row and of a forward pass
QUICK, SLOW = ["ours", "lean", "ours-bf16", "lean-bf16"], ["ours-compiled", "full", "trl"]


def bench_training(sizes=("W1", "W2")) -> None:
    """Seconds and memory of a step, and the losses, which must agree with ours."""
    print(f"mio, {BATCH} pairs a step, {STEPS} steps after one; {torch.get_num_threads()} threads; "
          f"the better of {TURNS} turns, one for {', '.join(SLOW)}")  # fmt: skip
    names = QUICK + SLOW + QUICK * (TURNS - 1)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("bf16: left out, this CPU has no instructions for it")
        names = [name for name in names if "bf16" not in name]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), SIZES[size])
            found: dict[str, dict] = {}
            for name in names:
                if one := in_process(name, folder):
                    found[name] = min(one, found.get(name, one), key=lambda one: one["seconds"])
        print(f"{size:18}{'s/step':>8}{'ratio':>7}{'tokens/s':>10}{'peak':>7}{'MB above':>10}"
              f"{'last loss':>11}")  # fmt: skip
        for name, one in found.items():
            seconds = one["seconds"]
            print(f"    {name:14}{seconds:8.2f}{seconds / found['ours']['seconds']:7.2f}"
                  f"{one['tokens'] / seconds:10.0f}{one['flops'] / seconds / one['peak']:7.0%}"
                  f"{one['memory'] / 2**20:10.0f}{one['losses'][-1]:11.5f}")  # fmt: skip
            off = max(abs(a - b) for a, b in zip(one["losses"], found["ours"]["losses"]))
            assert off < (0.014 if "bf16" in name else 1e-3), f"{name}: losses off by {off}"
    print("ours: float32, not compiled; lean, full: transformers, with logits of the answers or of")
    print("all tokens; tokens: each prompt once, and the answers; peak: share of the speed of a")
    print("matrix product; MB above: peak of a step beyond weights, gradients, moments, imports")


def in_process(name: str, folder: str, **environment: str) -> dict | None:
    """What a contender measures in a process of its own; prints why and returns None on failure."""
    command = [sys.executable, __file__, "--worker", name, folder]
    environment = os.environ | environment
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        print(f"{name}: left out ({run.stderr.strip().splitlines()[-1]:.60})")
        return None
    return json.loads(run.stdout.splitlines()[-1])


def bench_lora() -> None:
    """W2 in float32: all weights against adapters of rank 8 on all linear modules."""
    found = {"ours": [], "ours-lora": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), SIZES["W2"])
        for name in list(found) * TURNS:
            found[name].append(in_process(name, folder))
    threads = torch.get_num_threads()
    print(f"W2, {threads} threads: s/step, MB beyond imports, the better of {TURNS}")
    for name, ones in found.items():
        seconds, resident = (min(one[key] for one in ones) for key in ("seconds", "resident"))
        print(f"    {name:14}{seconds:8.2f}{resident / 2**20:10.0f}")
    assert abs(found["ours"][0]["losses"][0] - found["ours-lora"][0]["losses"][0]) < 1e-5


def bench_plan(sizes=("W1", "W2", "W3")) -> None:
    """The peak memory that train.py --plan predicts for a step, against that of a process."""
    print("MB beyond weights, gradients, moments, if malloc returns freed memory (and as it does)")
    print(f"{'':39}{'planned':>9}{'measured':>18}{'ratio':>15}{'of all':>15}")
    for size in sizes:
        batch, micro = (10, 1024) if size == "W3" else (BATCH, 4096)
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), SIZES[size])
            for checkpointing, weights in itertools.product(("off", "on"), ("float32", "bfloat16")):
                name = f"plan-{checkpointing}-{batch}-{micro}-{weights}"
                returned = in_process(name, folder, MALLOC_MMAP_THRESHOLD_="65536")
                malloc, planned = in_process(name, folder), returned["planned"]
                measured = [one["memory"] for one in (returned, malloc)]
                state = malloc["resident"] - malloc["memory"]
                cells = [
                    [f"{m / 2**20:.0f}" for m in measured],
                    [f"{planned / m:.2f}" for m in measured],
                    [f"{(planned + state) / (m + state):.2f}" for m in measured],
                ]
                line = f"{size}, {batch} pairs, checkpointing {checkpointing:4}{weights:9}"
                line += f"{planned / 2**20:7.0f}"
                print(line + "".join(f"{a:>8} ({b})" for a, b in cells))


def bench_head() -> None:
    """The fused head, forward and backward, over three bare products of its shapes."""

    def fused(hidden, weight, targets, lengths, ref, chunk):
        hidden.grad = weight.grad = None
        inputs = hidden, weight, targets, lengths, ref
        losses, _ = fused_pair_loss(*inputs, "mio", beta=BETA, chunk_tokens=chunk)
        losses.sum().backward()

    def bare(hidden, weight, logits):
        with torch.no_grad():
            torch.mm(hidden, weight.T, out=logits)
            return logits @ weight, logits.T @ hidden

    def case(N, D, V, chunk=1024):
        torch.manual_seed(0)
        hidden, weight = torch.randn(N, D, requires_grad=True), 0.05 * torch.randn(V, D)
        targets, lengths = torch.randint(0, V, (N,)), torch.full((2 * (N // 128),), 64)
        return hidden, weight.requires_grad_(), targets, lengths, torch.zeros(len(lengths)), chunk

    print("N, D, V, chunk: seconds of the head over those of three matrix products")
    shapes = [(1024, 576, 49152, 1024), (1024, 576, 49152, 256), (1024, 576, 128256, 1024),
              (1024, 256, 128256, 1024), (4096, 576, 49152, 1024)]  # fmt: skip
    for N, D, V, chunk in shapes:
        inputs = case(N, D, V, chunk)
        contenders = {"head": (fused, *inputs), "bare": (bare, *inputs[:2], torch.empty(N, V))}
        seconds = best_of(contenders)
        print(f"{N:6}{D:6}{V:8}{chunk:6}: {seconds['head'] / seconds['bare']:.2f}")
    print("memory of the head beyond inputs and gradients, D 64, V 8192:")
    for N in (4096, 65536):
        inputs = case(N, 64, 8192)
        fused(*inputs)
        before = resident("VmRSS")
        reset_peak()
        fused(*inputs)
        print(f"{N:8} tokens: {(resident('VmHWM') - before) / 2**20:.0f} MB")


def bench_prompts() -> None:
    """Steps on shared prompts against steps with a prompt for each answer; both are packed."""
    config = dataclasses.replace(SIZES["W2"], vocab_size=8192)
    random = np.random.default_rng(0)
    print("prompt, answer: seconds of steps with a prompt for each answer over shared ones")
    for prompt, answer in ((64, 64), (256, 64), (1024, 64)):
        ids = [[random.integers(0, 8000, n).tolist() for n in (prompt, answer, answer)]
               for _ in range(2)]  # fmt: skip
        shared = Pairs(Pair(*parts) for parts in ids)
        alone = Pairs(half for p, c, r in ids for half in (Pair(p, c, []), Pair(p, [], r)))
        model, options = Llama(config), train.Options(loss="mio", beta=BETA, lr=0.0)
        parts = model, train.make_optimizer(model, options), options
        seconds = best_of({
            name: (step_on, *parts, pairs, range(len(pairs)), torch.zeros(len(pairs), 2))
            for name, pairs in (("shared", shared), ("alone", alone))
        })  # fmt: skip
        print(f"{prompt:6}{answer:6}: {seconds['alone'] / seconds['shared']:.2f}")


def step_on(model, optimizer, options, pairs: Pairs, index, ref) -> torch.Tensor:
    """Packs pairs[i], i in index, and makes a training step. Returns the losses (B,)."""
    batches = make_batches(pairs, list(index), options.row_tokens, options.micro_tokens)
    return train.train_step(model, optimizer, StepData(batches, ref), options)[0]


def bench_saving(sizes=("W1", "W2")) -> None:
    """A checkpoint against a training step, and against bytes of its size written and flushed."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prepare(folder, SIZES[size])
            pairs, ref = read_prepared(folder)
            options = train.Options(lr=LR, beta=BETA, out=place, init=place, device="cpu", keep=1)
            model = Llama.from_pretrained(folder)
            job = Job(options, model, byte_tokenizer(), pairs, pairs, {}, None, {})
            optimizer = train.make_optimizer(model, options)
            (folder / "metrics.jsonl").touch()
            step = step_on, model, optimizer, options, pairs, range(BATCH), ref
            step[0](*step[1:])  # a first step gives the optimizer its moments
            numbers = itertools.count(1)

            def save(job=job, optimizer=optimizer, numbers=numbers, ref=ref):
                save_checkpoint(job, optimizer, Progress(next(numbers), 0, ref, None, ref + 0, {}))

            count = 12 * sum(p.numel() for p in model.parameters())
            seconds = best_of({"step": step, "save": (save,), "disk": (to_disk, folder, count)})
        print(f"{size}: {count / 1e6:,.0f} MB saved in {seconds['save']:.2f} s, "
              f"{seconds['save'] / seconds['step']:.2f} steps of {BATCH} pairs, "
              f"{seconds['save'] / seconds['disk']:.1f} times the disk alone")  # fmt: skip


def to_disk(folder: Path, count: int) -> None:
    with open(folder / "bytes", "wb") as file:
        file.write(bytes(count))
        os.fsync(file.fileno())


def bench_generation(questions: int = 200, rows: int = 32, most: int = 256) -> None:
    """Greedy answers in float32, to prompts sorted by length: ours with `rows` at a time,
    transformers in batches of as many. Tokens count up to the end of an answer."""
    import transformers

    folder, file = SHARED / "models/gsm-llama", SHARED / "data/gsm8k-test.jsonl"
    if not folder.is_dir():
        return print("generation: left out, needs the folder of real data")
    ours, tokenizer = evaluation.load_checkpoint(folder, "cpu", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    items, stop = read_items(file)[:questions], sorted(tokenizer.stop_ids)
    prompts = sorted((item.ids(tokenizer, "") for item in items), key=len)
    start = time.perf_counter()
    answers = sample_ids(ours, prompts, most, stop_ids=stop, temperature=0, rows=rows)
    seconds, start, expected = time.perf_counter() - start, time.perf_counter(), []
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        how = {"do_sample": False, "max_new_tokens": most, "eos_token_id": stop, "pad_token_id": 0}
        for new in theirs.generate(ids, attention_mask=mask, **how)[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(new) if token in stop), most)
            expected.append(new[:end])
    ratio, tokens = (time.perf_counter() - start) / seconds, sum(map(len, answers))
    same = sum(a == b for a, b in zip(answers, expected))
    print(f"{same} of {len(answers)} answers the same token for token, {tokens} tokens; "
          f"{tokens / seconds:.0f} tokens/s, {ratio:.2f} times transformers'")  # fmt: skip


def prepare(folder: Path, config: ModelConfig) -> None:
    """Writes a checkpoint of random weights, and pairs.json: pairs of GSM8K, or random ids of
    similar lengths, and their reference log-probs."""
    torch.manual_seed(0)
    model, count = Llama(config), BATCH * (STEPS + 1)
    model.save_pretrained(folder)
    file, tokenizer = SHARED / "data/gsm8k-pairs.jsonl", SHARED / "data/llama3-tokenizer.model"
    if file.exists():
        pairs = load_pairs(file, load_tokenizer(tokenizer))[:count]
    else:
        random = np.random.default_rng(0)
        lengths = random.lognormal(np.log((58, 97, 91)), 0.35, size=(count, 3)).astype(int)
        pairs = Pairs(
            Pair(*(random.integers(0, 128000, size=n).tolist() for n in row)) for row in lengths
        )
    ref = evaluation.pair_logps(model, pairs, *LAYOUT, torch.float32)
    content = {"pairs": list(pairs), "ref": ref.tolist()}
    (folder / "pairs.json").write_text(json.dumps(content))


def read_prepared(folder: Path) -> tuple[Pairs, torch.Tensor]:
    """The pairs that `prepare` wrote, and their reference log-probs (pairs, 2)."""
    content = json.loads((folder / "pairs.json").read_text())
    return Pairs(Pair(*pair) for pair in content["pairs"]), torch.tensor(content["ref"])


# --- In the process of a contender ----------------------------------------------------------------


def worker(name: str, folder: Path) -> None:
    """Runs a contender and prints its measurements as a line of JSON."""
    pairs, ref = read_prepared(folder)
    losses: list[float] = []
    run = {"ours": run_ours, "lean": run_transformers, "full": run_transformers, "trl": run_trl,
           "plan": run_planned}  # fmt: skip
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    clock = Clock(config, 8 if name.endswith("-bfloat16") else 16)
    run[name.split("-")[0]](name, folder, pairs, ref, losses, clock)
    tokens = int(pairs.lengths()[BATCH:].sum()) / STEPS
    result = {
        "seconds": float(np.median(clock.steps[1:])), "losses": losses, "tokens": tokens,
        "flops": step_flops(config, pairs[BATCH:]) / STEPS, "memory": clock.memory(),
        "peak": matmul_peak("bf16" in name),
        "resident": resident("VmHWM") - clock.imported, "planned": clock.planned - clock.state,
    }  # fmt: skip
    print(json.dumps(result))


def step_flops(config: ModelConfig, pairs: Pairs) -> float:
    """Floating-point operations of the matrix products with weights, forward and backward."""
    heads = config.num_attention_heads + config.num_key_value_heads
    body = config.num_hidden_layers * config.hidden_size * (
        2 * config.head_dim * heads + 3 * config.intermediate_size
    )  # fmt: skip
    head, lengths = config.vocab_size * config.hidden_size, pairs.lengths()
    return 6.0 * (body * int(lengths.sum()) + head * int(lengths[:, 1:].sum()))


class Clock:
    """Measures the seconds of each step, and memory beyond weights, gradients and moments."""

    def __init__(self, config: ModelConfig, stored: int):
        """stored: bytes of a weight, its gradient and its moments."""
        self.steps, self.started, self.imported, self.planned = [], 0.0, 0, 0
        self.state = stored * sum(p.numel() for p in Llama(config).parameters())

    def imports_done(self) -> None:
        self.imported = resident("VmRSS")

    def start(self) -> None:
        if len(self.steps) == 1:  # after the first step all lasting memory is allocated
            reset_peak()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.steps.append(time.perf_counter() - self.started)

    def memory(self) -> int:
        return resident("VmHWM") - self.imported - self.state


def resident(name: str) -> int:
    """Bytes of the process in memory: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def matmul_peak(bf16: bool) -> float:
    """Floating-point operations per second of a large matrix product."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(2, 2048, 2048, dtype=dtype)
    return 2 * 2048**3 / best_of({"": (torch.mm, a, b)})[""]


def run_ours(name, folder, pairs, ref, losses, clock) -> None:
    clock.imports_done()
    model, dtype = Llama.from_pretrained(folder), "bfloat16" if "bf16" in name else "float32"
    if "compiled" in name:
        model.compile_blocks()
    if "lora" in name:
        add_lora(model, LoraConfig(8, 16, list(LINEARS)))
    options = train.Options(loss="mio", beta=BETA, lr=LR, dtype=dtype)
    optimizer = train.make_optimizer(model, options)
    for start in range(0, len(pairs), BATCH):
        clock.start()
        loss = step_on(model, optimizer, options, pairs, range(start, start + BATCH), ref)
        losses.append(loss.mean().item())
        clock.stop()


def run_planned(name, folder, pairs, ref, losses, clock) -> None:
    """Two steps, of which the second counts. A step of a small model before them loads the code."""
    _, checkpointing, batch, micro, weights = name.split("-")
    options = train.Options(loss="mio", beta=BETA, lr=LR, device="cpu", micro_tokens=int(micro),
                            checkpointing=checkpointing, weights=weights)  # fmt: skip
    batch, dtype = int(batch), getattr(torch, weights)
    small = Llama(dataclasses.replace(SIZES["W1"], hidden_size=64, num_attention_heads=2))
    small.to(dtype).float32 = True
    step_on(small, train.make_optimizer(small, options), options, pairs, [0], ref)
    del small
    clock.imports_done()
    model = Llama.from_pretrained(folder, dtype)
    model.checkpointing, model.float32 = checkpointing == "on", True
    optimizer = train.make_optimizer(model, options)
    for start in (0, batch):
        clock.start()
        step_on(model, optimizer, options, pairs, range(start, start + batch), ref)
        clock.stop()
    layout = options.row_tokens, options.micro_tokens
    batches = make_batches(pairs, list(range(batch, 2 * batch)), *layout)
    clock.planned = max(
        step_cost(model.config, options, b.row_lengths, b.lengths.tolist(), len(batches)).peak
        for b in batches
    )


def run_transformers(name, folder, pairs, ref, losses, clock) -> None:
    """A step in the usual form: each answer with its prompt is a padded row, and the model computes
    the logits of all tokens ("full") or of the answers' tokens ("lean")."""
    import transformers

    clock.imports_done()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=True)
    for start in range(0, len(pairs), BATCH):
        clock.start()
        rows = [(p.prompt, answer) for p in pairs[start : start + BATCH] for answer in p[1:]]
        width = max(len(p) + len(a) for p, a in rows)
        ids, mask, scored = torch.zeros(3, len(rows), width, dtype=torch.long)  # (2B, T) each
        for r, (prompt, answer) in enumerate(rows):
            ids[r, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            mask[r, : len(prompt) + len(answer)] = 1
            scored[r, len(prompt) : len(prompt) + len(answer)] = 1
        scored = scored[:, 1:].bool()  # (2B, T - 1)
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in name):
            if name.startswith("lean"):
                hidden = model.model(ids, attention_mask=mask).last_hidden_state[:, :-1][scored]
                logits = model.lm_head(hidden).float()  # (N, V)
                logps = logits.gather(1, ids[:, 1:][scored][:, None])[:, 0] - logits.logsumexp(-1)
                logps = torch.stack([part.sum() for part in logps.split(scored.sum(1).tolist())])
            else:
                logits = model(ids, attention_mask=mask).logits[:, :-1].float()  # (2B, T - 1, V)
                logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
                logps = (logps * scored).sum(1)
        t_w, t_l = (BETA * (logps.view(-1, 2) - ref[start : start + BATCH])).unbind(1)
        loss = (softplus(-t_w) + 0.5 * softplus(t_w) + 0.5 * softplus(t_l)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.stop()


def run_trl(name, folder, pairs, ref, losses, clock) -> None:
    """TRL's DPOTrainer with the loss `nca_pair`, on our ids and reference log-probs."""
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, dataset, *_):
            return dataset  # has them already, so that TRL makes no reference model

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

        def on_log(self, _args, _state, _control, logs, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    clock.imports_done()
    (folder / "tok").mkdir(exist_ok=True)
    byte_tokenizer().save(folder / "tok")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tok", pad_token="<|end|>")
    rows = [
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected,
         "ref_chosen_logps": ref[i, 0].item(), "ref_rejected_logps": ref[i, 1].item()}
        for i, p in enumerate(pairs)
    ]  # fmt: skip
    args = trl.DPOConfig(
        output_dir=str(folder / "trl"), loss_type=["nca_pair"], beta=BETA, learning_rate=LR,
        per_device_train_batch_size=BATCH, max_steps=STEPS + 1, logging_steps=1, report_to=[],
        lr_scheduler_type="constant", warmup_steps=0, bf16=False, use_cpu=True, save_strategy="no",
        gradient_checkpointing=False, weight_decay=0.0, optim="adamw_torch_fused", max_length=None,
        disable_tqdm=True, remove_unused_columns=False, precompute_ref_log_probs=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows),
                      processing_class=tokenizer, callbacks=[Marks()])  # fmt: skip
    trainer.train()


PARTS = {"training": bench_training, "plan": bench_plan, "lora": bench_lora, "head": bench_head,
         "prompts": bench_prompts, "generation": bench_generation, "tokenizers": bench_tokenizers,
         "loading": bench_loading, "saving": bench_saving}  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], Path(sys.argv[3])))
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
