"""Speed and memory, as ratios within one run: python tests/bench.py [PART ...]

    training     steps of optimisation: ours, transformers twice, TRL; a process each
    lora         steps of adapters against steps of all weights
    head         the fused head against three bare matrix products, and how it grows
    prompts      shared prompts against a prompt for each answer
    generation   greedy answers to GSM8K questions: ours against transformers
    tokenizers   encoding: ours against the tokenizers library
    loading      rows of JSONL a second
    saving       a checkpoint against a training step, and against the disk alone

Peers that are not installed are left out. Figures are the best of rounds in which the contenders
take turns, or, for training, medians of steps.
"""

import dataclasses
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

import eval as evaluation
import train
from data import (
    Pair,
    Pairs,
    byte_tokenizer,
    load_pairs,
    load_tokenizer,
    make_batches,
    problems,
    solution,
)
from mio import fused_pair_loss
from model import LINEARS, Llama, LoraConfig, ModelConfig

ROUNDS = 5


def best_of(contenders: dict) -> dict[str, float]:
    """Seconds of each, the contenders taking turns."""
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
    """Ours against the tokenizers library: texts one by one, and its batches."""
    import tokenizers
    from test_tokenizers import FAMILIES, SAMPLES, strings, write_tokenizer

    prose = [solution(problem) + problem for problem in problems("train", 3000, seed=0)]
    code = Path(__file__).read_text(encoding="utf-8").split("\n\n") * 40
    corpora = {"arithmetic": prose, "code": code, "all sorts": strings(3000), "long": SAMPLES * 3}
    corpora["long"] = ["".join(corpora["long"])] * 40
    print(f"{'':16}{'':12}{'ours':>12}{'one by one':>14}{'batches':>12}   (MB/s, ratio)")
    for family in ("gpt2", "llama3", "qwen", "smollm", "llama2", "mistral"):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), FAMILIES[family]())
            ours = load_tokenizer(folder)
            theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        for name, texts in corpora.items():
            seconds = best_of(
                {
                    "ours": (one_by_one, ours.encode, texts),
                    "one": (one_by_one, theirs.encode, texts, None, False, False),
                    "batch": (theirs.encode_batch_fast, texts, False, False),
                }
            )
            size = sum(len(text.encode()) for text in texts) / 1e6
            cells = [
                f"{size / seconds[k]:.1f} ({seconds[k] / seconds['ours']:.2f})" for k in seconds
            ]
            print(f"{family:16}{name:12}" + "".join(f"{cell:>13}" for cell in cells))


def bench_loading() -> None:
    """100,000 rows of the built-in task, with the tokenizer's own share taken out and left in."""
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
        seconds = best_of(
            {
                "load": (load_pairs, file, tokenizer),
                "encode": (one_by_one, tokenizer.encode, texts),
            }
        )
        pairs = load_pairs(file, tokenizer)
        held = sum(part.itemsize * len(part) for part in (pairs.ids, pairs.ends, pairs.lines))
        print(f"{len(pairs):,} rows of {file.stat().st_size / len(pairs):.0f} bytes: "
              f"{len(pairs) / seconds['load']:,.0f} rows/s, without encoding "
              f"{len(pairs) / (seconds['load'] - seconds['encode']):,.0f} rows/s; "
              f"{held / len(pairs.ids):.1f} bytes an id")  # fmt: skip


# --- Training: the same pairs in the same order, a process for each contender --------------------

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
}  # fmt: skip
STEPS, BATCH, BETA, LR, TURNS = 4, 4, 0.2, 1e-5, 2
QUICK, SLOW = ["ours", "lean", "ours-bf16", "lean-bf16"], ["ours-compiled", "full", "trl"]


def bench_training(sizes=("W1", "W2")) -> None:
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
            ratio, rate = (one["seconds"] / found["ours"]["seconds"], 1 / one["seconds"])
            print(f"    {name:14}{one['seconds']:8.2f}{ratio:7.2f}{one['tokens'] * rate:10.0f}"
                  f"{one['flops'] * rate / one['peak']:7.0%}{one['memory'] / 2**20:10.0f}"
                  f"{one['losses'][-1]:11.5f}")  # fmt: skip
            off = max(abs(a - b) for a, b in zip(one["losses"], found["ours"]["losses"]))
            assert off < (0.014 if "bf16" in name else 1e-3), f"{name}: losses off by {off}"
    print("ours: float32, no compilation; lean, full: transformers with logits of the completions")
    print("or of all tokens; tokens: prompts once, and answers; peak: share of a measured matrix")
    print("product; MB above: most memory of a step beyond weights, gradients, moments, imports")


def in_process(name: str, folder: str) -> dict | None:
    """What a contender measured in a process of its own; None, with a word, if it failed."""
    command = [sys.executable, __file__, "--worker", name, folder]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(f"{name}: left out ({run.stderr.strip().splitlines()[-1]:.60})")
        return None
    return json.loads(run.stdout.splitlines()[-1])


def bench_lora() -> None:
    """W2 in float32, all weights and adapters of rank 8 at all linear modules, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), SIZES["W2"])
        found = {name: [in_process(name, folder) for _ in range(TURNS)]
                 for name in ("ours", "ours-lora")}  # fmt: skip
    print(
        f"W2, {torch.get_num_threads()} threads: s/step, MB beyond imports, the better of {TURNS}"
    )
    for name, ones in found.items():
        seconds, resident = (min(one[key] for one in ones) for key in ("seconds", "resident"))
        print(f"    {name:14}{seconds:8.2f}{resident / 2**20:10.0f}")
    assert abs(found["ours"][0]["losses"][0] - found["ours-lora"][0]["losses"][0]) < 1e-5


def bench_head() -> None:
    """The fused head, forward and backward, over three bare products of its shapes."""

    def fused(hidden, weight, targets, lengths, ref, chunk):
        hidden.grad = weight.grad = None
        losses, _ = fused_pair_loss(
            hidden, weight, targets, lengths, ref, "mio", beta=BETA, chunk_tokens=chunk
        )
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
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        fused(*inputs)
        print(f"{N:8} tokens: {(_resident('VmHWM') - before) / 2**20:.0f} MB")


def bench_prompts() -> None:
    """Shared prompts against a prompt for each answer, both packed by us, in training steps."""
    config = dataclasses.replace(SIZES["W2"], vocab_size=8192)
    rng = np.random.default_rng(0)
    print("prompt, answer: seconds of steps with a prompt for each answer over shared ones")
    for prompt, answer in ((64, 64), (256, 64), (1024, 64)):
        ids = [[rng.integers(0, 8000, n).tolist() for n in (prompt, answer, answer)]
               for _ in range(2)]  # fmt: skip
        shared = Pairs(Pair(*parts) for parts in ids)
        alone = Pairs(half for p, c, r in ids for half in (Pair(p, c, []), Pair(p, [], r)))
        model, options = Llama(config), train.Options(loss="mio", beta=BETA, lr=0.0)
        optimizer = train.make_optimizer(model, options)

        def step(pairs, model=model, options=options, optimizer=optimizer):
            batches = make_batches(pairs, list(range(len(pairs))), 128, 4096)
            train.train_step(model, optimizer, batches, options, torch.zeros(len(pairs), 2))

        seconds = best_of({"shared": (step, shared), "alone": (step, alone)})
        print(f"{prompt:6}{answer:6}: {seconds['alone'] / seconds['shared']:.2f}")


def bench_saving(sizes=("W1", "W2")) -> None:
    """save_checkpoint against train_step, and against bytes of its size written and flushed."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prepare(folder, SIZES[size])
            content = json.loads((folder / "pairs.json").read_text())
            pairs, ref = Pairs(Pair(*p) for p in content["pairs"]), torch.tensor(content["ref"])
            options = train.Options(lr=LR, beta=BETA, out=place, init=place, device="cpu", keep=1)
            model, parts = Llama.from_pretrained(folder), (byte_tokenizer(), pairs, pairs)
            job = train.Job(options, model, *parts, STEPS, {}, None, {})
            optimizer = train.make_optimizer(model, options)
            (folder / "metrics.jsonl").touch()
            batches = make_batches(pairs, list(range(BATCH)), 128, 4096)
            step = train.train_step, model, optimizer, batches, options, ref
            step[0](*step[1:])
            moments, number, start = (
                train.get_moments(model, optimizer),
                itertools.count(1),
                ref + 0,
            )

            def save(job=job, number=number, rest=(0, ref, None, start, moments)):
                train.save_checkpoint(job, train.Progress(next(number), *rest))

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
    """Greedy answers, float32, sorted by length: ours with `rows` at work at a time, transformers
    in batches of as many. The answers must be the same; tokens are those up to the end."""
    import transformers

    folder, file = SHARED / "models/gsm-llama", SHARED / "data/gsm8k-test.jsonl"
    if not folder.is_dir():
        return print("generation: left out, needs the folder of real data")
    ours, tokenizer = evaluation.load_checkpoint(folder, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    items, stop = evaluation.read_items(file)[:questions], sorted(tokenizer.stop_ids)
    prompts = sorted((item.ids(tokenizer, "") for item in items), key=len)
    begun = time.perf_counter()
    mine = evaluation.draw(ours, prompts, most, stop_ids=stop, temperature=0, rows=rows)
    seconds, begun, other = time.perf_counter() - begun, time.perf_counter(), []
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        found = theirs.generate(ids, attention_mask=attend, do_sample=False, max_new_tokens=most,
                                eos_token_id=stop, pad_token_id=0)[:, width:].tolist()  # fmt: skip
        ends = [next((i + 1 for i, t in enumerate(ids) if t in stop), most) for ids in found]
        other += [ids[:end] for ids, end in zip(found, ends)]
    ratio, tokens = (time.perf_counter() - begun) / seconds, sum(map(len, mine))
    same = sum(a == b for a, b in zip(mine, other))
    print(f"{same} of {len(mine)} answers the same token for token, {tokens} tokens; "
          f"{tokens / seconds:.0f} tokens/s, {ratio:.2f} times transformers'")  # fmt: skip


def prepare(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights, GSM8K pairs or ids of like lengths, reference log-probs."""
    torch.manual_seed(0)
    model = Llama(config)
    model.save_pretrained(folder)
    file, tokenizer = SHARED / "data/gsm8k-pairs.jsonl", SHARED / "data/llama3-tokenizer.model"
    if file.exists():
        pairs = load_pairs(file, load_tokenizer(tokenizer))[: BATCH * (STEPS + 1)]
    else:
        rng = np.random.default_rng(0)
        pairs = Pairs(
            Pair(*(rng.integers(0, 128000, size=int(rng.lognormal(np.log(m), 0.35))).tolist()
                   for m in (58, 97, 91)))
            for _ in range(BATCH * (STEPS + 1))
        )  # fmt: skip
    ref = evaluation.pair_logps(model, pairs, 128, 4096, torch.float32)
    content = {"pairs": list(pairs), "ref": ref.tolist()}
    (folder / "pairs.json").write_text(json.dumps(content))


def worker(name: str, folder: Path) -> None:
    content = json.loads((folder / "pairs.json").read_text())
    pairs, ref = Pairs(Pair(*pair) for pair in content["pairs"]), torch.tensor(content["ref"])
    losses: list[float] = []
    run = {"ours": run_ours, "lean": run_transformers, "full": run_transformers, "trl": run_trl}
    mark = Clock(folder)
    run[name.split("-")[0]](name, folder, pairs, ref, losses, mark)
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    tokens = int(pairs.lengths()[BATCH:].sum()) / STEPS
    body = config.num_hidden_layers * (
        2 * config.hidden_size * config.head_dim
        * (config.num_attention_heads + config.num_key_value_heads)
        + 3 * config.hidden_size * config.intermediate_size
    )  # fmt: skip
    head = config.vocab_size * config.hidden_size
    flops = 6 * (body * tokens + head * pairs.lengths()[BATCH:, 1:].sum() / STEPS)
    result = {
        "seconds": float(np.median(mark.steps[1:])), "losses": losses, "tokens": tokens,
        "flops": float(flops), "peak": matmul_peak("bf16" in name), "memory": mark.memory(),
        "resident": mark.memory() + mark.state,
    }  # fmt: skip
    print(json.dumps(result))


class Clock:
    """Marks the steps: seconds of each, and memory beyond weights, gradients and moments."""

    def __init__(self, folder: Path):
        self.steps, self.begun = [], 0.0
        weights = sum(p.numel() for p in Llama(_config_of(folder)).parameters())
        self.state = 16 * weights
        self.imported = 0

    def imports_done(self) -> None:
        self.imported = _resident("VmRSS")

    def start(self) -> None:
        if len(self.steps) == 1:  # from the second step on, all that stays is there
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.steps.append(time.perf_counter() - self.begun)

    def memory(self) -> int:
        return _resident("VmHWM") - self.imported - self.state


def _config_of(folder: Path) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def matmul_peak(bf16: bool) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in "ab")
    return 2 * 2048**3 / best_of({"": (torch.mm, a, b)})[""]


def run_ours(name, folder, pairs, ref, losses, mark) -> None:
    mark.imports_done()
    model = Llama.from_pretrained(folder)
    if "compiled" in name:
        model.compile_blocks()
    if "lora" in name:
        model.add_lora(LoraConfig(8, 16, list(LINEARS)))
    options = train.Options(
        loss="mio", beta=BETA, lr=LR, dtype="bfloat16" if "bf16" in name else "float32"
    )
    optimizer = train.make_optimizer(model, options)
    for start in range(0, len(pairs), BATCH):
        mark.start()
        index = list(range(start, start + BATCH))
        batches = make_batches(pairs, index, options.row_tokens, options.micro_tokens)
        loss, _, _ = train.train_step(model, optimizer, batches, options, ref)
        losses.append(loss.mean().item())
        mark.stop()


def run_transformers(name, folder, pairs, ref, losses, mark) -> None:
    """The step as people write it: padded rows, each with its prompt, logits of all tokens or, as
    `lean`, of the completions' alone."""
    import transformers

    mark.imports_done()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=True)
    for start in range(0, len(pairs), BATCH):
        mark.start()
        chunk = [pairs[i] for i in range(start, start + BATCH)]
        rows = [(p.prompt, answer) for p in chunk for answer in p[1:]]
        width = max(len(p) + len(a) for p, a in rows)
        ids, scored = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        attend = torch.zeros(len(rows), width, dtype=torch.long)
        for r, (prompt, answer) in enumerate(rows):
            ids[r, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            attend[r, : len(prompt) + len(answer)] = 1
            scored[r, len(prompt) : len(prompt) + len(answer)] = 1
        scored = scored[:, 1:].bool()
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in name):
            if name.startswith("lean"):
                hidden = model.model(ids, attention_mask=attend).last_hidden_state[:, :-1][scored]
                logits = model.lm_head(hidden).float()
                logps = logits.gather(1, ids[:, 1:][scored][:, None])[:, 0] - logits.logsumexp(-1)
                logps = torch.stack([part.sum() for part in logps.split(scored.sum(1).tolist())])
            else:
                logits = model(ids, attention_mask=attend).logits[:, :-1].float()
                logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
                logps = (logps * scored).sum(1)
        t_w, t_l = (BETA * (logps.view(-1, 2) - ref[start : start + BATCH])).unbind(1)
        sp = torch.nn.functional.softplus
        loss = (sp(-t_w) + 0.5 * sp(t_w) + 0.5 * sp(t_l)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        mark.stop()


def run_trl(name, folder, pairs, ref, losses, mark) -> None:
    """TRL's DPOTrainer, `nca_pair`, on ids prepared by us."""
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            mark.start()

        def on_step_end(self, *_, **__):
            mark.stop()

        def on_log(self, _args, _state, _control, logs, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    mark.imports_done()
    from data import byte_tokenizer

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
        disable_tqdm=True, remove_unused_columns=False, precompute_ref_log_probs=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows),
                      processing_class=tokenizer, callbacks=[Marks()])  # fmt: skip
    trainer.ref_model = None
    trainer.precompute_ref_logps = True
    trainer.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], Path(sys.argv[3])))
    known = {
        "training": bench_training,
        "lora": bench_lora,
        "head": bench_head,
        "prompts": bench_prompts,
        "generation": bench_generation,
        "tokenizers": bench_tokenizers,
        "loading": bench_loading,
        "saving": bench_saving,
    }
    for name in sys.argv[1:] or known:
        known[name]()
