"""Preference optimisation of a language model, from pairs of answers.

    python train.py --loss mio                                    the demonstration
    python train.py --loss mio --init FOLDER --data FILE.jsonl    your model and pairs

Five stages: base model, pairs, reference log-probs, training, evaluation. The
demonstration makes the first two itself, then runs as any other job does. What
a stage makes is kept under a hash of what went into it, for the next run to find.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import eval as evaluation
from data import (
    OPERATIONS,
    Batch,
    Pairs,
    Parser,
    Tokenizer,
    byte_tokenizer,
    epoch_order,
    is_correct,
    load_pairs,
    load_tokenizer,
    make_batches,
    make_pair,
    problems,
    row_length,
    solution,
    split_pairs,
    truncate,
)
from mio import LOSSES, Answers, chunked_logps, fused_pair_loss, loss_table, pair_loss
from model import Llama, ModelConfig, read_json, weight_files, write_json

# --- Options: a line each; the parser, its help and its checks are made from them -----------------


def option(default, text: str, **checks):
    """A field of Options. checks: choices=(...), above=x (exclusive), least=x, most=x."""
    return dataclasses.field(default=default, metadata={"help": text, **checks})


SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Options:
    loss: str = option("mio", "the objective; help lists them", choices=tuple(LOSSES))
    beta: float | None = option(None, "of the rewards (default: the loss's own)", above=0, most=1e6)
    label_smoothing: float | None = option(None, "of cdpo and robust", least=0, most=0.49)
    epsilon: float | None = option(None, "of exo, its label smoothing", above=0, most=0.49)
    gamma: float | None = option(None, "of simpo, its target margin", least=0, most=1e6)
    alpha: float | None = option(None, "of rpo and cpo, weight of the sft term", least=0, most=1e6)
    dpop_lambda: float | None = option(None, "of dpop, weight of the penalty", least=0, most=1e6)
    init: str | None = option(None, "checkpoint folder; its weights are also the reference")
    data: str | None = option(None, "JSONL file of preference pairs to train on")
    eval_data: str | None = option(None, "JSONL file of held-out preference pairs")
    eval_fraction: float = option(0.1, "of pairs, held out without --eval_data", least=0, most=0.9)
    out: str | None = option(None, "run folder (default: out/LOSS)")
    epochs: int | None = option(None, "passes over the pairs", least=1)
    max_steps: int | None = option(None, "steps after which to stop all the same", least=0)
    batch_size: int | None = option(None, "pairs in an optimizer step", least=1)
    max_length: int | None = option(None, "tokens of a prompt and its longer answer", least=2)
    row_tokens: int = option(evaluation.ROW_TOKENS, "up to which pairs share a row", least=1)
    micro_tokens: int = option(evaluation.MICRO_TOKENS, "tokens in a forward pass", least=1)
    lr: float | None = option(None, "peak learning rate", above=0)
    warmup: float = option(0.1, "of the steps, in which the learning rate rises", least=0, most=1)
    schedule: str = option("cosine", "of the learning rate after that", choices=SCHEDULES)
    weight_decay: float = option(0.0, "AdamW's, on matrices only", least=0)
    grad_clip: float = option(1.0, "largest norm of a gradient; 0 for any", least=0)
    seed: int = option(0, "of order, held-out split and base model", least=0)
    dtype: str = option("float32", "of matrix products; weights stay float32", choices=DTYPES)
    compile: str = option("auto", "auto is on with CUDA", choices=("auto", "on", "off"))
    checkpointing: str = option("off", "recompute blocks to save memory", choices=("off", "on"))
    eval_every: int | None = option(None, "steps from one evaluation to the next", least=1)
    log_every: int = option(1, "steps between rows of metrics.jsonl", least=1)
    device: str = option("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")
    config: str | None = option(None, "JSON file of options, as train_config.json; flags win")


# Where the two kinds of run differ. The demonstration's model is tiny: large steps, small batches.
DEMONSTRATION = {"epochs": 3, "batch_size": 64, "max_length": 96, "lr": 1e-4}
CHECKPOINT = {"epochs": 1, "batch_size": 32, "max_length": 1024, "lr": 1e-6}  # 1B to 8B parameters
# The demonstration's answers are short, so its summed log-ratios are too: their beta times this.
DEMONSTRATION_BETA = 5
# fmt: on
LOSS_OPTIONS = {name for loss in LOSSES.values() for name in loss.options}  # fields of Options


def loss_options(options: Options) -> dict[str, float]:
    """Beta, and what was given of the loss's own options: for pair_loss and fused_pair_loss."""
    own = {name: getattr(options, name) for name in LOSS_OPTIONS}
    return {"beta": options.beta} | {name: own[name] for name in own if own[name] is not None}


def parse_options(argv: list[str] | None) -> tuple[Options, Parser]:
    parser = Parser("train.py", __doc__)
    fields = {field.name: field for field in dataclasses.fields(Options)}
    for name, field in fields.items():
        default = f" (default: {field.default})" if field.default is not None else ""
        if name in CHECKPOINT:
            default = f" (default: {CHECKPOINT[name]}, demonstration: {DEMONSTRATION[name]})"
        metavar = "|".join(field.metadata.get("choices", [])) or _kind(field).__name__.upper()
        parser.add_argument(f"--{name}", metavar=metavar, help=field.metadata["help"] + default)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if given.get("loss") == "help":
        print(loss_table())
        parser.exit()
    try:
        if "config" in given:
            file = read_json(Path(given["config"]))
            for name in file.keys() - fields.keys() - provenance().keys():
                raise ValueError(f"{given['config']}: there is no option {name!r}")
            given = {name: file[name] for name in fields.keys() & file.keys()} | given
        options = Options(**{name: _checked(fields[name], value) for name, value in given.items()})
        return _resolved(options), parser
    except (OSError, ValueError) as error:
        parser.error(error)


def _kind(field: dataclasses.Field) -> type:
    return (get_args(field.type) or (field.type,))[0]  # float of float | None


def _checked(field: dataclasses.Field, value):
    """A value from the command line or a JSON file, in the field's type and within its bounds."""
    kind, checks = _kind(field), field.metadata
    if value is None and field.default is None:
        return None
    given = value
    try:
        value = kind(given)
        if isinstance(given, bool) or (kind is int and value != float(given)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"--{field.name} {given}: expected {kind.__name__}") from None
    if "choices" in checks and value not in checks["choices"]:
        raise ValueError(f"--{field.name} {value}: choose from {', '.join(checks['choices'])}")
    if kind is not str:
        least, above = checks.get("least", -math.inf), checks.get("above", -math.inf)
        most = checks.get("most", 2**31 if kind is int else math.inf)
        if not math.isfinite(value) or not (value > above and least <= value <= most):
            low = f"more than {above}" if "above" in checks else f"at least {least}"
            high = f", at most {most}" if most < math.inf else ""
            raise ValueError(f"--{field.name} {value}: must be {low}{high or ' and finite'}")
    return value


def _resolved(options: Options) -> Options:
    """Fills in the defaults that depend on other options."""
    if bool(options.init) != bool(options.data):
        absent = "--data FILE.jsonl" if options.init else "--init FOLDER"
        raise ValueError(f"{absent} is missing: --init and --data go together, or leave out both "
                         "for the built-in demonstration")  # fmt: skip
    if options.eval_data and not options.data:
        raise ValueError("--eval_data needs --init and --data")
    if not options.init:
        # The longest problem with its BOS, and answers that were cut off and so are not used.
        prompt, answer = 2 * OPERATIONS + 3, evaluation.ANSWER_TOKENS
        if (options.max_length or prompt + answer) < prompt + answer:
            raise ValueError(f"--max_length {options.max_length}: the demonstration's pairs need "
                             f"{prompt + answer}")  # fmt: skip
    loss = LOSSES[options.loss]
    for name in LOSS_OPTIONS - loss.options.keys():
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: --loss {options.loss} does not use it; see --loss help")
    own = CHECKPOINT if options.init else DEMONSTRATION
    sums = loss.needs_reference and loss.uses != "means"
    scale = DEMONSTRATION_BETA if sums and not options.init else 1
    own = own | {"beta": scale * loss.beta, "out": f"out/{options.loss}"}
    own = {name: value for name, value in own.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **own, device=evaluation.pick_device(options.device))


# --- Stages: what they make is kept, with the hash of what went into it ---------------------------


@contextlib.contextmanager
def stage(title: str):
    """Says what a stage does, and afterwards how long it took and what it left (notes)."""
    print(f"{title} ...", flush=True)
    start, notes = time.perf_counter(), []
    yield notes
    print(f"  {time.perf_counter() - start:.1f} s", *notes, sep=", ", flush=True)


def digest(*parts) -> str:
    """SHA-256 over JSON values, bytes, arrays and files (as Path), in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                one = hashlib.file_digest(file, "sha256").digest()
        else:
            raw = part if isinstance(part, (bytes, np.ndarray)) else json.dumps(part).encode()
            one = hashlib.sha256(raw).digest()
        total.update(one)
    return total.hexdigest()


def kept(record: Path, key: str, *files: Path) -> dict | None:
    """The record of a finished stage, if it was made from the same things and is all there."""
    if all(file.is_file() for file in (record, *files)):
        found = read_json(record)
        if found.get("key") == key:
            return found
    return None


# --- The demonstration: a base model, and pairs drawn from it ------------------------------------

# fmt: off
BASE_MODEL = ModelConfig(
    vocab_size=258, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=24, max_position_embeddings=128,
    tie_word_embeddings=True, bos_token_id=256, eos_token_id=257,
    initializer_range=0.05,  # so narrow a model learns slowly from the usual 0.02
)
BASE = {"lr": 2e-3, "batch_size": 64, "check_every": 10, "problems": 300, "target": 0.55,
        "most": 0.62, "max_steps": 4000}
PAIRS = {"prompts": 6000, "held_out": 500, "samples": 8, "per_prompt": 2}
# fmt: on


def make_base(folder: Path, seed: int, device: str) -> dict:
    """Supervised training on worked solutions, up to a target accuracy on validation problems:
    after a fixed number of steps the accuracy depends too much on the seed. It may leap over the
    target from one check to the next: then back to the last check, and on at half the pace."""
    key = digest(dataclasses.asdict(BASE_MODEL), BASE, seed)
    record = kept(folder / "base.json", key, folder / "model.safetensors")
    if record:
        print(f"base model: found in {folder}")
        return record
    if folder.exists() and any(folder.iterdir()) and not (folder / "base.json").exists():
        raise ValueError(f"{folder}: the base model would go there, but it holds other files; "
                         "choose another --out")  # fmt: skip
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = Llama(BASE_MODEL).to(device)
    options = Options(loss="sft", lr=BASE["lr"], device=device)
    optimizer = make_optimizer(model, options)
    questions = problems("validation", BASE["problems"], seed=0)
    accuracy, pace, last = 0.0, BASE["lr"], copy.deepcopy(model.state_dict())
    title = f"base model: supervised training until {BASE['target']:.0%} of validation is right"
    with stage(title) as notes, tqdm(desc="supervised", unit="step", leave=False) as bar:
        while accuracy < BASE["target"]:
            batch = [
                make_pair(tokenizer, problem, solution(problem), None)
                for problem in problems("train", BASE["batch_size"], seed=[seed, bar.n])
            ]
            set_lr(optimizer, pace * min(1, (bar.n + 1) / 50))
            index = list(range(len(batch)))
            batches = make_batches(batch, index, options.row_tokens, options.micro_tokens)
            train_step(model, optimizer, batches, options, None)
            bar.update()
            if bar.n % BASE["check_every"] == 0:
                answers = evaluation.sample_answers(model, tokenizer, questions, temperature=0)
                right = [is_correct(q, a) for q, (a,) in zip(questions, answers)]
                accuracy = sum(right) / len(right)
                bar.set_postfix(accuracy=f"{accuracy:.1%}")
                if accuracy > BASE["most"]:
                    model.load_state_dict(last)
                    accuracy, pace = 0.0, pace / 2
                last = copy.deepcopy(model.state_dict())
            assert bar.n < BASE["max_steps"], "the base model does not learn"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "base.json").write_text("{}")  # ours from here on, though not finished
        model.save_pretrained(folder)
        tokenizer.save(folder)
        record = {"key": key, "steps": bar.n, "validation_accuracy": accuracy, "seed": seed}
        write_json(folder / "base.json", record)
        notes += [f"{bar.n} steps", f"{accuracy:.1%} right", f"in {folder}"]
    return record


def make_pairs(folder: Path, seed: int, device: str) -> None:
    """Draws answers to training problems from the base, grades them, and pairs right with wrong:
    pairs.jsonl, and heldout_pairs.jsonl from test problems."""
    key = digest(*weight_files(folder), PAIRS, seed)
    files = [folder / "pairs.jsonl", folder / "heldout_pairs.jsonl"]
    if kept(folder / "pairs.json", key, *files):
        print(f"pairs: found in {folder}")
        return
    model = Llama.from_pretrained(folder, device=device)
    tokenizer = load_tokenizer(folder)
    counts = {}
    with stage("pairs: drawn from the base model, graded, right against wrong") as notes:
        for file, split, count in zip(
            files, ("train", "test"), (PAIRS["prompts"], PAIRS["held_out"])
        ):
            questions = problems(split, count, seed=[seed, 1])
            answers = evaluation.sample_answers(
                model, tokenizer, questions, samples=PAIRS["samples"], seed=seed
            )
            rows = []
            for question, drawn in zip(questions, answers):
                drawn = list(dict.fromkeys(a for a in drawn if a.strip()))
                right = [a for a in drawn if is_correct(question, a)]
                wrong = [a for a in drawn if not is_correct(question, a)]
                for chosen, rejected in list(zip(right, wrong))[: PAIRS["per_prompt"]]:
                    rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            file.write_text(text, encoding="utf-8")
            counts[file.name] = len(rows)
            notes.append(f"{len(rows)} in {file}")
        write_json(folder / "pairs.json", {"key": key, **counts})


def base_folder(options: Options) -> Path:
    name = "base" if options.seed == 0 else f"base-seed{options.seed}"
    return Path(options.out).parent / name


def demonstration(options: Options) -> Options:
    """Makes base model and pairs, and names them as any user would name theirs."""
    folder = base_folder(options)
    make_base(folder, options.seed, options.device)
    make_pairs(folder, options.seed, options.device)
    data, held_out = (str(folder / name) for name in ("pairs.jsonl", "heldout_pairs.jsonl"))
    return dataclasses.replace(options, init=str(folder), data=data, eval_data=held_out)


# --- The job: everything that can be wrong with the input is found here, before a file is written -


class Job(NamedTuple):
    options: Options
    model: Llama
    tokenizer: Tokenizer
    pairs: Pairs  # to train on
    held_out: Pairs
    steps: int
    mismatched: Pairs | None = None  # prompts of `pairs` with other rows' answers, for kto


def load_job(options: Options) -> Job:
    model, tokenizer = evaluation.load_checkpoint(options.init, options.device)
    model.checkpointing = options.checkpointing == "on"
    if options.compile == "on" or (options.compile == "auto" and options.device != "cpu"):
        model.compile_blocks()
    pairs = load_pairs(options.data, tokenizer, options.max_length)
    if options.eval_data:
        held_out = load_pairs(options.eval_data, tokenizer, options.max_length)
    else:
        pairs, held_out = split_pairs(pairs, options.eval_fraction, options.seed)
    check_answers(options, pairs, held_out)
    lengths = np.concatenate([pairs.lengths(), held_out.lengths()])
    context = (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max()
    if context > model.config.max_position_embeddings:
        raise ValueError(f"a prompt with its answer has {context} tokens, the model reads "
                         f"{model.config.max_position_embeddings}; lower --max_length")  # fmt: skip
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    steps = steps if options.max_steps is None else min(steps, options.max_steps)
    mismatched = None
    if LOSSES[options.loss].mismatched:
        mismatched = mismatch(pairs, context, tokenizer.bos_id)
    return Job(options, model, tokenizer, pairs, held_out, steps, mismatched)


def mismatch(pairs: Pairs, max_length: int, bos_id: int | None) -> Pairs:
    """Each prompt with the answers of the next row of another prompt; after the last, the first."""
    mismatched = Pairs()
    for i, row in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((other for other in others if other.prompt != row.prompt), row)
        pair = truncate(other._replace(prompt=row.prompt), max_length, bos_id)
        mismatched.append(pair, pairs.lines[i])
    return mismatched


def check_answers(options: Options, pairs: Pairs, held_out: Pairs) -> None:
    """Refuses rows that lack an answer which the loss contrasts."""
    if LOSSES[options.loss].answers == "any":
        return
    both = LOSSES[options.loss].answers == "both"
    for file, part in ((options.data, pairs), (options.eval_data or options.data, held_out)):
        present = part.lengths()[:, 1:] > 0
        lacking = np.flatnonzero(~(present.all(axis=1) if both else present[:, 0]))
        if len(lacking):
            needed = "a chosen and a rejected answer" if both else "a chosen answer"
            where = f"{file}:{part.lines[lacking[0]]}"
            raise ValueError(f"{where}: --loss {options.loss} needs {needed} in a row")


def check_out(options: Options) -> None:
    """Refuses an --out that holds anything but an earlier run, or what this run starts from."""
    folder = Path(options.out)
    for source in (options.init or base_folder(options), options.data, options.eval_data):
        if source and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {folder}: {source} lies there; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "train_config.json").is_file():
        raise ValueError(f"--out {folder}: holds other files; choose an empty folder")


def fresh_folder(folder: Path) -> Path:
    """Makes the run folder; an earlier run in it is kept, as OUT.1, OUT.2, ..."""
    if folder.exists() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}.{i}") for i in itertools.count(1))
        old = next(name for name in names if not name.exists())
        folder.rename(old)
        print(f"the earlier run in {folder} is now {old}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def reference_logps(job: Job) -> Tensor:
    """Log-probs of the training pairs under the initial weights (pairs, 2), from the cache if
    weights, ids and dtype are the same. Nothing else of the reference stays in memory."""
    options = job.options
    weights = sorted(weight_files(Path(options.init)))
    ids = (job.pairs.ids.tobytes(), job.pairs.ends.tobytes())
    key = digest(*weights, Path(options.init) / "config.json", *ids, options.dtype)
    file = Path(options.out).parent / "cache" / f"reference-{key[:16]}.safetensors"
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as tensors:
                logps = tensors.get_tensor("logps")
                same = (tensors.metadata() or {}).get("key") == key
        except SafetensorError:
            same = False
        if same and logps.shape == (len(job.pairs), 2) and bool(logps.isfinite().all()):
            print(f"reference log-probs: found in {file}")
            return logps
    with stage("reference log-probs: the initial weights on the training pairs") as notes:
        logps = logps_of(job, job.pairs)
        if not logps.isfinite().all():
            raise FloatingPointError(f"{options.init}: its log-probs are not finite")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": logps}, f"{file}.partial", metadata={"key": key})
        Path(f"{file}.partial").replace(file)
        notes.append(f"in {file}")
    return logps


def logps_of(job: Job, pairs: Pairs) -> Tensor:
    options = job.options
    dtype = getattr(torch, options.dtype)
    return evaluation.pair_logps(job.model, pairs, options.row_tokens, options.micro_tokens, dtype)


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(model: Llama, options: Options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, options.lr, weight_decay=options.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(options: Options, step: int, steps: int) -> float:
    """Of step 1, 2, ..., steps: rises linearly, then falls as the schedule says, never to 0."""
    rising = math.ceil(options.warmup * steps)
    if step <= rising:
        return options.lr * step / rising
    done = (step - rising - 1) / (steps - rising)  # in [0, 1)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.lr * falling[options.schedule]


@torch.no_grad()
def shared_term(model: Llama, batches: list[Batch], ref_logps: Tensor, options: Options) -> Tensor:
    """What all pairs of a step share in a loss of the whole batch, from a pass of its own: ()."""
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
    logps = []
    for batch in (batch.to(device) for batch in batches):
        with evaluation.autocast(device, dtype):
            hidden, head = evaluation.answer_states(model, batch), model.head_weight
            sums = chunked_logps(
                hidden, head, batch.targets, batch.lengths, compiled=model.compiled
            )
        logps.append(sums)
    ref = torch.cat([ref_logps[batch.index].flatten() for batch in batches])
    lengths = torch.cat([batch.lengths for batch in batches])
    terms = [torch.cat(logps), ref.to(device), lengths.to(device)]  # (2B,) each
    sides = (Answers(*(x[side::2] for x in terms), options.beta) for side in (0, 1))
    return LOSSES[options.loss].shared(*sides)


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    options: Options,
    ref_logps: Tensor | None,
    mismatched: tuple[list[Batch], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step on the pairs of `batches`; ref_logps (all pairs, 2) or None; mismatched:
    the same of their prompts with other rows' answers, for a loss that asks for them.

    Returns the loss of each pair (B,), log-probs (B, 2), both in the order of the batches' index,
    and the gradient's norm before clipping, all on the model's device: nothing here waits for it.
    When a loss or the gradient is not finite, the weights stay as they are.
    """
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
    pairs = sum(len(batch.index) for batch in batches)
    losses, logps, own = [], [], loss_options(options)
    if not LOSSES[options.loss].pairwise:
        assert LOSSES[options.loss].mismatched == (mismatched is not None)
        own["shared"] = shared_term(model, *(mismatched or (batches, ref_logps)), options)
    for batch in batches:
        ref = None if ref_logps is None else ref_logps[batch.index].flatten().to(device)  # (2B,)
        batch = batch.to(device)
        with evaluation.autocast(device, dtype):
            hidden = evaluation.answer_states(model, batch)  # (N, D)
            loss, logp = fused_pair_loss(
                hidden, model.head_weight, batch.targets, batch.lengths, ref,
                options.loss, compiled=model.compiled, **own,
            )  # fmt: skip
        loss.sum().backward()
        losses.append(loss.detach())
        logps.append(logp.view(-1, 2))
    losses, logps = torch.cat(losses), torch.cat(logps)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = get_total_norm(gradients) / pairs  # of the mean, however the step was cut up
    # The fused update divides gradients by the one, which makes means of sums and clips them, and
    # does nothing at all where the other is 1.
    excess = (grad_norm.float() + 1e-6) / (options.grad_clip or torch.inf)
    optimizer.grad_scale = pairs * excess.clamp(min=1)
    optimizer.found_inf = 1 - (losses.isfinite().all() & grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return losses, logps.float(), grad_norm


def check_start(options: Options, losses: Tensor, logps: Tensor, ref_logps: Tensor) -> None:
    """The first step's figures are of the initial weights: rewards are 0, the loss is known."""
    drift = (logps - ref_logps).abs().max().item()
    # Float rounding differs between packings; the bound grows with the length of a sum.
    allowed = (1e-4 if options.dtype == "float32" else 5e-3) * (1 + ref_logps.abs().max())
    start, loss = LOSSES[options.loss].start, mean(losses)
    start = start(options.beta) if callable(start) else start
    assert drift <= allowed, f"step 0: policy and reference differ by {drift:.2g} nats"
    if start is not None and loss_options(options).keys() == {"beta"}:
        # By its slope in a log-ratio: about beta, or 1 / beta where it aims at 1 / (2 beta).
        slope = 10 * max(options.beta, 1 / options.beta)
        close = abs(loss - start) <= 1e-5 * (1 + abs(start)) + slope * drift
        assert close, f"step 0: loss {loss:.6f}, not {start:.6f}"
    print(f"  step 0: rewards 0 within {drift * options.beta:.1e}, loss {loss:.6f}")


def check_finite(job: Job, step: int, index: list[int], losses: Tensor, grad_norm: Tensor) -> None:
    """Raises FloatingPointError that names the rows, unless loss and gradient of a step are finite:
    then it has changed no weight."""
    finite = losses.isfinite().tolist()
    if not (all(finite) and grad_norm.isfinite()):
        bad = [i for i, fine in zip(index, finite) if not fine] or index
        lines = ", ".join(str(job.pairs.lines[i]) for i in bad[:8])
        raise FloatingPointError(f"step {step}: loss or gradient not finite, from line {lines} of "
                                 f"{job.options.data}; try a lower --lr")  # fmt: skip


def train(
    job: Job, folder: Path, ref_logps: Tensor | None, ref_mismatched: Tensor | None = None
) -> tuple[Tensor, Tensor, dict]:
    """Trains job.model in place and writes metrics.jsonl. Returns the held-out pairs' log-probs
    before and after, and the last row of metrics."""
    options, count, steps = job.options, len(job.pairs), job.steps
    per_epoch = math.ceil(count / options.batch_size)  # the last step of an epoch may be short
    eval_every = options.eval_every or max(1, math.ceil(steps / 10))
    optimizer, tokens = make_optimizer(job.model, options), 0
    present = torch.from_numpy(job.pairs.lengths()[:, 1:] > 0)
    start = end = logps_of(job, job.held_out)
    row = {"step": 0, "epoch": 0.0, **held_out_metrics(job, start, start)}
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        print(strict_json(row), file=metrics, flush=True)
        began, read, tokens_read, unread = time.perf_counter(), 0, 0, []
        for step in tqdm(range(1, steps + 1), desc=options.loss, unit="step", leave=False):
            epoch, place = divmod(step - 1, per_epoch)
            order = epoch_order(count, options.seed, epoch).tolist()
            index = order[place * options.batch_size : (place + 1) * options.batch_size]
            layout = options.row_tokens, options.micro_tokens, evaluation.fixed_length(job.model)
            batches = make_batches(job.pairs, index, *layout)
            index = [i for batch in batches for i in batch.index]  # as they come back
            lr = set_lr(optimizer, learning_rate(options, step, steps))
            others = []
            if job.mismatched:
                others = [(make_batches(job.mismatched, index, *layout), ref_mismatched)]
            losses, logps, grad_norm = train_step(
                job.model, optimizer, batches, options, ref_logps, *others
            )
            tokens += sum(row_length(job.pairs[i]) for i in index)
            unread.append((step, index, losses, grad_norm))
            evaluate = step % eval_every == 0 or step == steps
            wanted = evaluate or step % options.log_every == 0
            if not wanted and step > 1:
                continue
            for one in unread:
                check_finite(job, *one)
            unread.clear()
            losses, logps = losses.cpu(), logps.cpu()
            ref = None if ref_logps is None else ref_logps[index]
            if step == 1 and ref is not None:
                check_start(options, losses, logps, ref)
            seconds = (time.perf_counter() - began) / (step - read)  # a step since the last row
            row = {"step": step, "epoch": step / per_epoch, "loss": mean(losses)}
            row |= {"learning_rate": lr, "grad_norm": float(grad_norm), "num_tokens": tokens}
            row |= {"step_seconds": seconds}
            row |= {"tokens_per_second": (tokens - tokens_read) / (time.perf_counter() - began)}
            logps = torch.where(present[index], logps, torch.nan)
            values = evaluation.preference_values(logps, ref, options.beta)
            row |= {name: mean(value[~value.isnan()]) for name, value in values.items()}
            if evaluate:
                end = logps_of(job, job.held_out)
                row |= held_out_metrics(job, end, start)
            if wanted:
                print(strict_json(row), file=metrics, flush=True)
            began, read, tokens_read = time.perf_counter(), step, tokens
    if not all(p.isfinite().all() for p in job.model.parameters()) or not end.isfinite().all():
        raise FloatingPointError(f"step {steps}: weights not finite; try a lower --lr")
    return start, end, row


def held_out_metrics(job: Job, logps: Tensor, start: Tensor) -> dict[str, float]:
    """The figures of metrics.jsonl under eval_; `start` is the log-probs at step 0, (pairs, 2)."""
    if not job.held_out:
        return {}
    options = job.options
    n_w, n_l = torch.from_numpy(job.held_out.lengths()[:, 1:]).unbind(dim=1)
    own = loss_options(options)
    if job.mismatched:
        own["shared"] = torch.nan  # no held-out prompt is run with other rows' answers: no loss
    losses = pair_loss(
        options.loss, *logps.unbind(dim=1), *start.unbind(dim=1),
        chosen_lengths=n_w, rejected_lengths=n_l, **own,
    )  # fmt: skip
    logps = torch.where(torch.stack((n_w, n_l), dim=1) > 0, logps, torch.nan)
    metrics = {"loss": mean(losses)} | evaluation.preference_metrics(logps, start, options.beta)
    return {f"eval_{name}": value for name, value in metrics.items()}


def mean(values: Tensor) -> float:
    return values.double().mean().item()


def strict_json(row: dict) -> str:
    """JSON has no word for infinity or for nothing: an estimate that overflows is null, and so is
    the mean over rejected answers where no row has one."""
    finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


# --- The whole path -------------------------------------------------------------------------------


def describe(job: Job) -> str:
    """What is about to be trained, so that a wrong flag is seen before it costs anything."""
    options, loss = job.options, LOSSES[job.options.loss]
    own = {"beta": options.beta} | loss.options | loss_options(options)
    parameters = sum(p.numel() for p in job.model.parameters())
    return "\n".join(
        [
            f"{options.loss}: {loss.formula}   [{loss.source}]",
            f"  log-probs as {loss.uses} over an answer's tokens, "
            f"{', '.join(f'{name} {value:g}' for name, value in own.items())}, "
            f"{'with' if loss.needs_reference else 'without'} a reference",
            f"  {options.init}: {parameters:,} parameters, {options.dtype} products on "
            f"{options.device}",
            f"  {len(job.pairs)} pairs, {len(job.held_out)} held out; {job.steps} steps of "
            f"{options.batch_size}; lr {options.lr:g}, {options.schedule}, seed {options.seed}",
        ]
    )


def warn_of_slow_bfloat16(options: Options) -> None:
    slow = options.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if options.dtype == "bfloat16" and slow:
        print("--dtype bfloat16: this CPU has no instructions for it, float32 will be much faster",
              file=sys.stderr)  # fmt: skip


def provenance() -> dict:
    """What else a run depends on, for train_config.json."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def base_values(folder: Path, device: str) -> dict[str, list]:
    """The base model's answers to the test problems, graded; kept in its folder."""
    key = digest(*weight_files(folder), evaluation.TEST_PROBLEMS, evaluation.SAMPLES)
    found = kept(folder / "eval.json", key)
    if not found:
        with stage("evaluation: the base model on the held-out problems") as notes:
            model = Llama.from_pretrained(folder, device=device)
            found = evaluation.task_values(model, load_tokenizer(folder))
            write_json(folder / "eval.json", {"key": key, **found})
            notes.append(f"in {folder / 'eval.json'}")
    return {name: values for name, values in found.items() if name != "key"}


def main(argv: list[str] | None = None) -> Path:
    """Runs the command line `argv` and returns the run folder."""
    options, parser = parse_options(argv)
    demo, began = options.init is None, time.perf_counter()
    try:
        check_out(options)
        job = load_job(demonstration(options) if demo else options)
        folder = fresh_folder(Path(options.out))
    except (OSError, ValueError) as error:
        parser.error(error)
    options = job.options
    print(describe(job), flush=True)
    warn_of_slow_bfloat16(options)
    write_json(folder / "train_config.json", {**dataclasses.asdict(options), **provenance()})
    try:
        ref_logps = reference_logps(job) if LOSSES[options.loss].needs_reference else None
        other = job.mismatched and reference_logps(job._replace(pairs=job.mismatched))
        with stage(f"training: {options.loss}") as notes:
            start, end, last = train(job, folder, ref_logps, other)
            job.model.save_pretrained(folder)
            job.tokenizer.save(folder)
            notes.append(f"checkpoint and metrics.jsonl in {folder}")
    except FloatingPointError as error:
        parser.error(error)
    rows = {options.loss: evaluation.preference_row(end, start, job.held_out)}
    if demo:
        before = base_values(Path(options.init), options.device)
        with stage("evaluation: the trained model on the held-out problems") as notes:
            after = evaluation.task_values(job.model, job.tokenizer)
            notes.append(f"in {folder / 'summary.json'}")
        # The same problems for both, so the error of the change is that of their differences.
        change = {name: np.subtract(after[name], before[name]) for name in after}
        before, after, change = map(evaluation.task_row, (before, after, change))
        rows = {"base": before, options.loss: after | rows[options.loss], "change": change}
    table = {name: {k: f._asdict() for k, f in row.items()} for name, row in rows.items()}
    figures = json.loads(strict_json({"seconds": time.perf_counter() - began, **last}))
    write_json(folder / "summary.json", {**figures, "table": table})
    if job.held_out:
        print(evaluation.table(rows))
    return folder


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "±" is no reason to stop
    main()
