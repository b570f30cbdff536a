"""Preference optimisation of a language model, from pairs of answers.

    python train.py --loss mio                                    the demonstration
    python train.py --loss mio --init FOLDER --data FILE.jsonl    your model and pairs
    python train.py --resume --out out/mio                        goes on with a run

Five stages: base model, pairs, reference log-probs, training, evaluation. The
demonstration makes the first two itself, then runs as any other job does. What
a stage makes is kept under a hash of what went into it, for the next run to find.
"""

import contextlib
import copy
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import eval as evaluation
from data import (
    OPERATIONS,
    TOKENIZER_FILES,
    Batch,
    Pair,
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
from mio import (
    CHUNK_TOKENS,
    LOSSES,
    Answers,
    chunked_logps,
    chunks_of_pairs,
    fused_pair_loss,
    loss_table,
    pair_loss,
)
from model import (
    ADAPTER_FILES,
    LORA_TARGETS,
    Llama,
    LoraConfig,
    ModelConfig,
    flush_to_disk,
    read_json,
    save_tensors,
    weight_files,
    write_json,
    written_whole,
)

# --- Several processes: torchrun starts them, FSDP2 shards the model; one alone does none of it ---


@contextlib.contextmanager
def processes():
    """Joins torchrun's processes; all but the first are silent. One that fails waits for none, so
    that torchrun sees it and ends the others."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(minutes=30)  # the others wait while the first writes a checkpoint
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()


def several() -> bool:
    return dist.is_initialized()


def is_first() -> bool:
    return not several() or dist.get_rank() == 0


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, the first one's first; n may differ."""
    if not several():
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    every = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
    every.split(counts.tolist())[dist.get_rank()].copy_(rows)
    dist.all_reduce(every)
    return every


@contextlib.contextmanager
def agreed():
    """Bad input in one process is bad input in all: its OSError or ValueError is raised in each."""
    errors: list = [None]
    try:
        yield
    except (OSError, ValueError) as error:
        errors = [error]
    if several():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, errors[0])
    for error in filter(None, errors):
        raise error


def shard(model: Llama, options: "Options") -> None:
    """Each process keeps its part of every parameter and sees a block whole while it is at work.
    Gradients are sums over the processes, as they are over a step's batches. In bfloat16 blocks
    travel so; residual stream and head are of one process's precision."""
    if not several():
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(torch.device(options.device).type, (dist.get_world_size(),))
    half = torch.bfloat16 if options.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in (*model.model["layers"], model):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece; all processes take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors in one piece each, on the first process's CPU; the others have none."""
    if not several():
        return tensors
    pieces = ((name, full(tensor)) for name, tensor in tensors.items())
    return {name: piece.cpu() for name, piece in pieces if is_first()}


def whole_model(model: Llama) -> Llama:
    if not several():
        return model
    with torch.device("meta"):
        one = Llama(model.config)
        if model.lora:
            one.add_lora(model.lora)
    one.load_state_dict(whole(model.state_dict()), strict=is_first(), assign=True)
    return one


def own_batches(pairs: Pairs, index: list[int], *layout) -> list[Batch]:
    """make_batches of this process's share of the pairs: as many batches as any process has, since
    every pass is one of all processes. What lacks is filled up with a prompt without answers."""
    if not several():
        return make_batches(pairs, index, *layout)
    index = sorted(index, key=lambda i: row_length(pairs[i]))
    batches = make_batches(pairs, index[dist.get_rank() :: dist.get_world_size()], *layout)
    most = int(gathered(torch.tensor([len(batches)])).max())
    (idle,), none = make_batches(pairs, index[:1], *layout), torch.zeros(0, dtype=torch.long)
    idle = idle._replace(source=none, targets=none, lengths=none, index=[])
    return batches + [idle] * (most - len(batches))


# --- Options: a line each; the parser, its help and its checks are made from them -----------------


def option(default, text: str, **checks):
    """A field of Options. checks: choices=(...), above=x (exclusive), least=x, most=x."""
    return dataclasses.field(default=default, metadata={"help": text, **checks})


SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
# fmt: off
# --plan: width, inner width, layers, heads, key-value heads, whether the head is tied.
PRESETS = {"llama-3.2-1b": (2048, 8192, 16, 32, 8, True),
           "llama-3.2-3b": (3072, 8192, 28, 24, 8, True),
           "llama-3.1-8b": (4096, 14336, 32, 32, 8, False),
           "llama-3.1-70b": (8192, 28672, 80, 64, 8, False)}
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# By the makers' data sheets: GB (what a card has above that CUDA itself takes), TFLOP/s dense in
# bfloat16 and float32, GB/s.
GPUS = {"h100": (80, 989, 67, 3350), "a100": (80, 312, 19.5, 2039), "h200": (141, 989, 67, 4800),
        "rtx4090": (24, 165, 82.6, 1008)}
# What may differ from the run that --resume goes on with. The files' contents may not.
MAY_CHANGE = ("epochs", "max_steps", "eval_every", "log_every", "save_every", "keep", "out",
              "tensorboard")
FILES = ("init", "init_adapter", "data", "eval_data")


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
    out: str | None = option(None, "run folder (default: out/LOSS, or out/LOSS-on-policy)")
    epochs: int | None = option(None, "passes over the pairs", least=1)
    max_steps: int | None = option(None, "stop there; the schedule is that of --epochs", least=0)
    batch_size: int | None = option(None, "pairs in an optimizer step", least=1)
    on_policy: bool = option(False, "pairs are drawn from the policy at every step, and --data has "
                             "questions to grade their answers by, as eval.py's; so too rlhf")
    samples: int = option(8, "answers drawn to a prompt", least=2, most=1024)
    max_new_tokens: int | None = option(None, "of an answer drawn", least=1)
    max_length: int | None = option(None, "tokens of a prompt and its longer answer", least=2)
    row_tokens: int = option(evaluation.ROW_TOKENS, "up to which pairs share a row", least=1)
    micro_tokens: int = option(evaluation.MICRO_TOKENS, "tokens in a forward pass", least=1)
    lora_rank: int | None = option(None, "train adapters of this rank beside frozen weights, which "
                                   "are kept in --dtype", least=1)
    lora_alpha: float | None = option(None, "over the rank, it scales them (default: twice the "
                                      "rank)", above=0, most=1e6)
    lora_targets: str | None = option(None, "linear modules that get one: all, attention, or names "
                                      "as q_proj,v_proj (default: all)")
    lora_rslora: bool = option(False, "their scale is alpha over the square root of the rank")
    init_adapter: str | None = option(None, "folder of an adapter, as PEFT's, to train on; with it "
                                      "--init is also the reference")
    lr: float | None = option(None, "peak learning rate, by default ten times as high for adapters",
                              above=0)
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
    save_every: int | None = option(None, "steps from one checkpoint to the next", least=1)
    keep: int = option(2, "newest checkpoints that are kept", least=1)
    resume: bool = option(False, "go on from the newest checkpoint in --out. Of the run's flags "
                          f"only these may change: --{', --'.join(MAY_CHANGE)}")
    overwrite: bool = option(False, "replace the run that is in --out")
    tensorboard: bool = option(False, "write event files beside metrics.jsonl")
    device: str = option("auto", "cpu, cuda or cuda:N; auto is cuda where there is one")
    plan: str | None = option(None, "say what a run needs, and do no more: of --init's config.json "
                              "or of a model by name", const="init", choices=("init", *PRESETS))
    gpu: str | None = option(None, "of --plan (default: h100)", choices=tuple(GPUS))
    mfu: float | None = option(None, "of --plan: share of its peak speed that the GPU reaches "
                               "(default: 0.4)", above=0, most=1)
    config: str | None = option(None, "JSON file of options, as train_config.json; flags win")


# Where the two kinds of run differ. The demonstration's model is tiny: large steps, small batches.
DEMONSTRATION = {"epochs": 3, "batch_size": 64, "max_length": 96, "lr": 1e-4,
                 "max_new_tokens": evaluation.ANSWER_TOKENS}
CHECKPOINT = {"epochs": 1, "batch_size": 32, "max_length": 1024, "lr": 1e-6,  # 1B to 8B parameters
              "max_new_tokens": 256}
# The demonstration's answers are short, so its summed log-ratios are too: their beta times this.
DEMONSTRATION_BETA = 5
LORA_LR = 10  # times the default of --lr, for adapters
# fmt: on
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets", "lora_rslora")
LOSS_OPTIONS = {name for loss in LOSSES.values() for name in loss.options}  # fields of Options


def loss_options(options: Options) -> dict[str, float]:
    """Beta, and what was given of the loss's own options: for pair_loss and fused_pair_loss."""
    own = {name: getattr(options, name) for name in LOSS_OPTIONS}
    return {"beta": options.beta} | {name: own[name] for name in own if own[name] is not None}


def draws(options: Options) -> bool:
    """Whether answers are drawn from the policy, and --data has only questions."""
    return options.on_policy or LOSSES[options.loss].answers == "drawn"


def adapts(options: Options) -> bool:
    """Whether adapters are trained, beside weights that stay."""
    return bool(options.lora_rank or options.init_adapter)


def default_out(options: Options) -> str:
    return f"out/{options.loss}{'-on-policy' if options.on_policy else ''}"


def parse_options(argv: list[str] | None) -> tuple[Options, Parser]:
    parser = Parser("train.py", __doc__)
    fields = {field.name: field for field in dataclasses.fields(Options)}
    for name, field in fields.items():
        default = f" (default: {field.default})" if field.default not in (None, False) else ""
        if name in CHECKPOINT:
            default = f" (default: {CHECKPOINT[name]}, demonstration: {DEMONSTRATION[name]})"
        metavar = "|".join(field.metadata.get("choices", [])) or _kind(field).__name__.upper()
        how = {"metavar": metavar if name != "loss" else "NAME"}
        if field.type is bool:
            how = {"action": "store_true", "default": None}
        if "const" in field.metadata:
            how |= {"nargs": "?", "const": field.metadata["const"]}
        parser.add_argument(f"--{name}", help=field.metadata["help"] + default, **how)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if given.get("loss") == "help":
        print(loss_table())
        parser.exit()
    try:
        with agreed():
            if "config" in given:
                file = read_json(Path(given["config"]))
                for name in file.keys() - fields.keys() - provenance().keys():
                    raise ValueError(f"{given['config']}: there is no option {name!r}")
                file = {name: file[name] for name in fields.keys() & file.keys()}
                if given.get("loss", file.get("loss")) != file.get("loss", given.get("loss")):
                    own = ("beta", "out", *LOSS_OPTIONS)
                    file = {name: value for name, value in file.items() if name not in own}
                given = file | given
            given = {name: _checked(fields[name], value) for name, value in given.items()}
            if given.get("resume"):
                given = _resumed(given)
            options = _resolved(Options(**given))
        return options, parser
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
        if isinstance(given, bool) != (kind is bool) or (kind is int and value != float(given)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"--{field.name} {given}: expected {kind.__name__}") from None
    if "choices" in checks and value not in checks["choices"]:
        raise ValueError(f"--{field.name} {value}: choose from {', '.join(checks['choices'])}")
    if kind in (int, float):
        least, above = checks.get("least", -math.inf), checks.get("above", -math.inf)
        most = checks.get("most", 2**31 if kind is int else math.inf)
        if not math.isfinite(value) or not (value > above and least <= value <= most):
            low = f"more than {above}" if "above" in checks else f"at least {least}"
            high = f", at most {most}" if most < math.inf else ""
            raise ValueError(f"--{field.name} {value}: must be {low}{high or ' and finite'}")
    return value


def _resumed(given: dict) -> dict:
    """The options of the run that --resume goes on with, and those given that may differ."""
    folder = Path(given.get("out") or default_out(Options(**given)))
    checkpoint = newest_checkpoint(folder)
    record = checkpoint / "training.json" if checkpoint else folder / "train_config.json"
    if not (checkpoint or record.is_file()):
        raise ValueError(f"--resume: there is no run in {folder}; leave out --resume to start one, "
                         "or name its folder with --out")  # fmt: skip
    if not checkpoint and (folder / "summary.json").is_file():
        raise ValueError(f"--resume: the run in {folder} is finished and kept no checkpoints, as "
                         "with --save_every; --overwrite runs it again")  # fmt: skip
    found = read_checkpoint(checkpoint)["options"] if checkpoint else read_json(record)
    stored = {}
    for field in dataclasses.fields(Options):
        stored[field.name] = _checked(field, found.get(field.name, field.default))
    if "device" in given:
        given["device"] = evaluation.pick_device(given["device"])
    for name, value in given.items():
        free = name in (*MAY_CHANGE, "resume", "overwrite", "config")
        free |= name in FILES and stored[name] is not None
        if value != stored[name] and not free:
            raise ValueError(f"--{name} {value}: the run in {folder} has {stored[name]}; with "
                             f"--resume leave out --{name}")  # fmt: skip
    return stored | given | {"out": str(folder)}


def _resolved(options: Options) -> Options:
    """Fills in the defaults that depend on other options."""
    if options.plan:
        check_plan(options)
    elif bool(options.init) != bool(options.data):
        absent = "--data FILE.jsonl" if options.init else "--init FOLDER"
        raise ValueError(f"{absent} is missing: --init and --data go together, or leave out both "
                         "for the built-in demonstration")  # fmt: skip
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite replaces it: choose one")
    if options.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs a package: pip install tensorboard")
    for name in ("gpu", "mfu"):
        if getattr(options, name) and not options.plan:
            raise ValueError(f"--{name} needs --plan")
    for name in ("eval_data", "init_adapter"):
        if getattr(options, name) and not options.data:
            raise ValueError(f"--{name} needs --init and --data")
    for name in (name for name in LORA_OPTIONS if getattr(options, name)):
        if options.init_adapter:
            raise ValueError(f"--{name}: --init_adapter has its own; leave out --{name}")
        if not options.lora_rank:
            raise ValueError(f"--{name} needs --lora_rank")
    if not (options.init or options.plan):
        # The longest problem with its BOS, and answers that were cut off and so are not used.
        prompt, answer = 2 * OPERATIONS + 3, evaluation.ANSWER_TOKENS
        if (options.max_length or prompt + answer) < prompt + answer:
            raise ValueError(f"--max_length {options.max_length}: the demonstration's pairs need "
                             f"{prompt + answer}")  # fmt: skip
    loss = LOSSES[options.loss]
    for name in LOSS_OPTIONS - loss.options.keys():
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: --loss {options.loss} does not use it; see --loss help")
    if options.samples % 2 and loss.answers == "drawn":
        raise ValueError(f"--samples {options.samples}: must be even for --loss {options.loss}")
    if options.on_policy and (loss.mismatched or loss.answers == "drawn"):
        raise ValueError(f"--on_policy: --loss {options.loss} is not one of pairs")
    own = CHECKPOINT if options.init or options.plan else DEMONSTRATION
    sums = loss.needs_reference and loss.uses != "means"
    scale = DEMONSTRATION_BETA if sums and not options.init else 1
    own = own | {"beta": scale * loss.beta, "out": default_out(options)}
    own |= {"gpu": "h100", "mfu": 0.4} if options.plan else {}
    own["lr"] *= LORA_LR if adapts(options) else 1
    if options.lora_rank:
        own |= {"lora_alpha": 2.0 * options.lora_rank, "lora_targets": "all"}
    own = {name: value for name, value in own.items() if getattr(options, name) is None}
    options = dataclasses.replace(options, **own, device=evaluation.pick_device(options.device))
    if several() and not options.plan:
        check_several(options)
    return options


def check_several(options: Options) -> None:
    count = dist.get_world_size()
    if not options.init:
        raise ValueError("torchrun: the demonstration is made by one process; run it without "
                         "torchrun, or name --init and --data")  # fmt: skip
    if draws(options):
        raise ValueError("torchrun: answers are drawn by one process; run --on_policy and --loss "
                         "rlhf without torchrun")  # fmt: skip
    if options.batch_size < count:
        raise ValueError(f"--batch_size {options.batch_size}: {count} processes need a pair each; "
                         f"start {options.batch_size}, or raise --batch_size")  # fmt: skip


def check_plan(options: Options) -> None:
    if (options.plan == "init") != bool(options.init):
        raise ValueError("--plan: name a model, or none and --init FOLDER with a config.json")
    if draws(options) or options.init_adapter:
        name = "init_adapter" if options.init_adapter else "on_policy, --loss rlhf"
        raise ValueError(f"--plan: is of pairs and new adapters; leave out --{name}")


# --- Stages: what they make is kept, with the hash of what went into it ---------------------------


@contextlib.contextmanager
def stage(title: str):
    """Says what a stage does, and afterwards how long it took and what it left (notes)."""
    print(f"{title} ...", flush=True)
    start, notes = time.perf_counter(), []
    yield notes
    print(f"  {time.perf_counter() - start:.1f} s", *notes, sep=", ", flush=True)


def digest(*parts) -> str:
    """SHA-256 over JSON values, bytes and files (as Path), in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            one = evaluation.digest_file(part)
        else:
            raw = part if isinstance(part, bytes) else json.dumps(part).encode()
            one = hashlib.sha256(raw).hexdigest()
        total.update(one.encode())
    return total.hexdigest()


def digest_pairs(pairs: Pairs) -> str:
    return digest(pairs.ids.tobytes(), pairs.ends.tobytes())


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
    step = 0  # bar.n stays 0 where bars are switched off
    title = f"base model: supervised training until {BASE['target']:.0%} of validation is right"
    with stage(title) as notes, tqdm(desc="supervised", unit="step", leave=False) as bar:
        while accuracy < BASE["target"]:
            batch = [
                make_pair(tokenizer, problem, solution(problem), None)
                for problem in problems("train", BASE["batch_size"], seed=[seed, step])
            ]
            set_lr(optimizer, pace * min(1, (step + 1) / 50))
            index = list(range(len(batch)))
            batches = make_batches(batch, index, options.row_tokens, options.micro_tokens)
            train_step(model, optimizer, batches, options, None)
            bar.update()
            step += 1
            if step % BASE["check_every"] == 0:
                answers = evaluation.sample_answers(model, tokenizer, questions, temperature=0)
                right = [is_correct(q, a) for q, (a,) in zip(questions, answers)]
                accuracy = sum(right) / len(right)
                bar.set_postfix(accuracy=f"{accuracy:.1%}")
                if accuracy > BASE["most"]:
                    model.load_state_dict(last)
                    accuracy, pace = 0.0, pace / 2
                last = copy.deepcopy(model.state_dict())
            assert step < BASE["max_steps"], "the base model does not learn"
        write_json(folder / "base.json", {})  # ours from here on, though not finished
        model.save_pretrained(folder)
        tokenizer.save(folder)
        record = {"key": key, "steps": step, "validation_accuracy": accuracy, "seed": seed}
        write_json(folder / "base.json", record)
        notes += [f"{step} steps", f"{accuracy:.1%} right", f"in {folder}"]
    return record


def make_pairs(folder: Path, seed: int, device: str) -> None:
    """Draws answers to training problems from the base, grades them, and pairs right with wrong:
    pairs.jsonl, and heldout_pairs.jsonl from test problems."""
    key = digest(*weight_files(folder), PAIRS, seed)
    files = [folder / "pairs.jsonl", folder / "heldout_pairs.jsonl"]
    write_rows(folder / "problems.jsonl", [
        {"prompt": question, "answer": solution(question), "grade": "gsm8k"}
        for question in problems("train", PAIRS["prompts"], seed=[seed, 1])
    ])  # fmt: skip
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
            write_rows(file, rows)
            counts[file.name] = len(rows)
            notes.append(f"{len(rows)} in {file}")
        write_json(folder / "pairs.json", {"key": key, **counts})


def write_rows(file: Path, rows: list[dict]) -> None:
    with written_whole(file) as partial:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        partial.write_text(text, encoding="utf-8")


def base_folder(options: Options) -> Path:
    name = "base" if options.seed == 0 else f"base-seed{options.seed}"
    return Path(options.out).parent / name


def demonstration(options: Options) -> Options:
    """Makes base model and pairs, and names them as any user would name theirs."""
    folder = base_folder(options)
    with claimed(folder, "waiting for the run that makes it"):
        make_base(folder, options.seed, options.device)
        make_pairs(folder, options.seed, options.device)
    data = folder / ("problems.jsonl" if draws(options) else "pairs.jsonl")
    files = {"data": str(data), "eval_data": str(folder / "heldout_pairs.jsonl")}
    return dataclasses.replace(options, init=str(folder), **files)


# --- The job: everything that can be wrong with the input is found here, before a file is written -


class Job(NamedTuple):
    options: Options
    model: Llama
    tokenizer: Tokenizer
    pairs: Pairs  # to train on; none where they are drawn
    held_out: Pairs
    inputs: dict[str, str]  # hashes of what options.init, data and eval_data held at step 0
    checkpoint: Path | None  # that the run goes on from, and its record
    record: dict
    mismatched: Pairs | None = None  # prompts of `pairs` with other rows' answers, for kto
    questions: list[evaluation.Item] | None = None  # whose answers are drawn and graded
    reference: Llama | None = None  # stays in memory for these

    @property
    def per_step(self) -> int:
        """Rows of data in a step: pairs, prompts of a pair each, or prompts of `samples` answers,
        twice batch_size in all."""
        drawn = LOSSES[self.options.loss].answers == "drawn"
        per_step = 2 * self.options.batch_size // self.options.samples
        return max(1, per_step) if drawn else self.options.batch_size

    @property
    def per_epoch(self) -> int:
        return math.ceil(
            len(self.pairs if self.questions is None else self.questions) / self.per_step
        )

    @property
    def steps(self) -> int:
        """Of all epochs: what the schedule spans."""
        return self.options.epochs * self.per_epoch

    @property
    def stop(self) -> int:
        """The last step of this run: its steps are the first ones of a run without --max_steps."""
        most = self.options.max_steps
        return self.steps if most is None else min(self.steps, most)


def load_job(options: Options) -> Job:
    checkpoint = newest_checkpoint(Path(options.out)) if options.resume else None
    record = read_json(checkpoint / "training.json") if checkpoint else {}  # checked by _resumed
    model, tokenizer, reference = load_model(options, checkpoint)
    held_out, questions = Pairs(), None
    if options.eval_data:
        held_out = load_pairs(options.eval_data, tokenizer, options.max_length)
    if draws(options):
        pairs, questions = Pairs(), load_questions(options, tokenizer)
    else:
        pairs = load_pairs(options.data, tokenizer, options.max_length)
        if not options.eval_data:
            pairs, held_out = split_pairs(pairs, options.eval_fraction, options.seed)
        check_answers(options, pairs, held_out)
    lengths = np.concatenate([pairs.lengths(), held_out.lengths()])
    asked = [len(item.ids(tokenizer, "")) + options.max_new_tokens for item in questions or ()]
    context = max([*(lengths[:, 0] + lengths[:, 1:].max(axis=1)), *asked])
    if context > model.config.max_position_embeddings:
        raise ValueError(f"a prompt with its answer has {context} tokens, the model reads "
                         f"{model.config.max_position_embeddings}; lower --max_length or "
                         "--max_new_tokens")  # fmt: skip
    found = {"data": digest_pairs(pairs), "eval_data": digest_pairs(held_out)}
    found |= {"data": digest(questions)} if questions else {}
    folder = options.init_adapter
    adapter = [Path(folder) / name for name in ADAPTER_FILES] if folder else []
    found |= {"init_adapter": digest(*adapter) if folder else ""}
    inputs = record.get("inputs", {}) | found
    if not record or reference or model.lora or options.init != record["options"]["init"]:
        weights = sorted(weight_files(Path(options.init)))
        inputs["init"] = digest(*weights, Path(options.init) / "config.json")
    job = Job(options, model, tokenizer, pairs, held_out, inputs, checkpoint, record,
              None, questions, reference)  # fmt: skip
    every = options.eval_every or max(1, math.ceil(job.steps / 10))
    job = job._replace(options=dataclasses.replace(options, eval_every=every))
    if LOSSES[options.loss].mismatched:
        job = job._replace(mismatched=mismatch(pairs, context, tokenizer.bos_id))
    if record:
        check_resumed(job)
    return job


def load_model(options: Options, checkpoint: Path | None) -> tuple[Llama, Tokenizer, Llama | None]:
    """The policy as --init or a checkpoint has it, and where answers are drawn the reference."""
    device = "cpu" if several() else options.device  # sharding moves it, a block at a time
    reference = None
    if adapts(options):
        model, tokenizer = evaluation.load_checkpoint(options.init, "cpu")  # smaller when it moves
        add_adapters(model, options)
        model.to(device)
        if draws(options):  # the same frozen weights, and adapters that stay
            frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
            reference = copy.deepcopy(model, frozen)
        if checkpoint:
            model.load_adapter(checkpoint)
    else:
        start = checkpoint or options.init
        model, tokenizer = evaluation.load_checkpoint(start, device)
        if draws(options):
            reference = Llama.from_pretrained(options.init, device=device)
    model.checkpointing = options.checkpointing == "on"
    if options.compile == "on" or (options.compile == "auto" and options.device != "cpu"):
        model.compile_blocks()
    return model, tokenizer, reference


def add_adapters(model: Llama, options: Options) -> None:
    """Those of --init_adapter, or new ones by the flags; raises ValueError that names a folder."""
    folder, targets = options.init_adapter, options.lora_targets
    if folder:
        lora = LoraConfig.from_pretrained(folder)
    else:
        targets = LORA_TARGETS.get(targets) or targets.split(",")
        lora = LoraConfig(options.lora_rank, options.lora_alpha, targets, options.lora_rslora)
    torch.manual_seed(options.seed)
    try:
        model.add_lora(lora, getattr(torch, options.dtype))
    except ValueError as error:
        raise ValueError(f"{folder or options.init}: {error}") from None
    if folder:
        model.load_adapter(folder)


def load_questions(options: Options, tokenizer: Tokenizer) -> list[evaluation.Item]:
    questions = evaluation.read_items(Path(options.data))
    if questions is None or questions[0].choices:
        raise ValueError(f"{options.data}: answers are drawn for --loss {options.loss}, so its "
                         "rows must be questions with an answer to grade by")  # fmt: skip
    return questions


def check_resumed(job: Job) -> None:
    """Refuses to go on from a checkpoint with other inputs, or beyond the last step."""
    options, record = job.options, job.record
    for name, found in job.inputs.items():
        if found != record["inputs"][name]:
            what = getattr(options, name) or options.data
            raise ValueError(f"--{name} {what}: not what the run in {options.out} began with")
    check_tensors(job)
    if record["step"] > job.stop:
        raise ValueError(f"{job.checkpoint}: is beyond the {job.stop} steps of --epochs "
                         f"{options.epochs} and --max_steps {options.max_steps}")  # fmt: skip


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
    """Refuses an --out that holds anything but a run, or what this run starts from."""
    folder = Path(options.out)
    base = options.init or base_folder(options)
    for source in (base, options.init_adapter, options.data, options.eval_data):
        if source and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {folder}: {source} lies there; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; choose another name")
    if not folder.is_dir() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return
    if not (folder / "train_config.json").is_file():
        raise ValueError(f"--out {folder}: holds other files; choose an empty folder")
    with claimed(folder):
        check_free(options)


def check_free(options: Options) -> None:
    """Refuses a folder with a run in it, without --resume or --overwrite."""
    folder = Path(options.out)
    if (folder / "train_config.json").is_file() and not (options.resume or options.overwrite):
        state, remedy = "a finished run", ""
        if not (folder / "summary.json").is_file():
            state, remedy = "an unfinished run", "--resume goes on with it, "
        raise ValueError(f"--out {folder}: holds {state}; {remedy}--overwrite replaces it, another "
                         "--out keeps it")  # fmt: skip


@contextlib.contextmanager
def claimed(folder: Path, wait: str = ""):
    """Holds a folder for this process alone: a lock of the system's, so that a dead process holds
    none. Where another one has it, waits with a word, or raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(f"--out {folder}: another run is at work there") from None
            print(f"{folder}: {wait}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def clear(folder: Path, checkpoints: bool) -> None:
    """Takes a run's results out of its folder, with its checkpoints or without."""
    names = ("summary.json", "eval.json", "config.json", "model*.safetensors*", "*.partial",
             "adapter")  # fmt: skip
    everything = ("metrics.jsonl", "checkpoints", "tensorboard")
    names += everything if checkpoints else ("checkpoints/*.partial",)
    for path in [path for name in (*names, *TOKENIZER_FILES) for path in folder.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- Checkpoints ----------------------------------------------------------------------------------


class Progress(NamedTuple):
    """What a run has beside its weights; a checkpoint holds all of it. The order of pairs follows
    from seed and step."""

    step: int
    num_tokens: int
    ref_logps: Tensor | None  # (pairs, 2) under the weights of step 0
    ref_mismatched: Tensor | None  # the same of job.mismatched
    start: Tensor  # (held-out pairs, 2) under the weights of step 0
    moments: dict[str, Tensor]  # AdamW's, "exp_avg.NAME" and so on; {} at step 0


# What training.json holds, by examples; options is made anew by the parser's own checks.
RECORD = {"step": 0, "num_tokens": 0, "inputs": dict.fromkeys(FILES, ""),
          "metrics": {"bytes": 0, "sha256": ""}, "options": {}}  # fmt: skip


def alike(value, example) -> bool:
    """The same types throughout, and the same keys."""
    if not isinstance(example, dict) or not isinstance(value, dict) or not example:
        return type(value) is type(example)
    return value.keys() == example.keys() and all(alike(value[k], example[k]) for k in example)


def newest_checkpoint(folder: Path) -> Path | None:
    return max(checkpoints(folder), key=step_of, default=None)


def checkpoints(folder: Path) -> list[Path]:
    named = (p for p in folder.glob("checkpoints/step-*") if re.fullmatch("step-[0-9]+", p.name))
    return [path for path in named if path.is_dir()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(job: Job, progress: Progress) -> None:
    """checkpoints/step-NNNNNN/: a model folder as any other, or an adapter's without the frozen
    weights, and what training needs to go on."""
    folder = Path(job.options.out)
    tensors = {f"moments.{name}": moment for name, moment in progress.moments.items()}
    tensors |= {"start": progress.start, "random.cpu": torch.get_rng_state()}
    for name in ("ref_logps", "ref_mismatched"):
        if (values := getattr(progress, name)) is not None:
            tensors[name] = values
    if job.options.device != "cpu":
        tensors["random.cuda"] = torch.cuda.get_rng_state(job.options.device)
    flush_to_disk(folder / "metrics.jsonl")
    metrics = (folder / "metrics.jsonl").read_bytes()
    record = {
        "step": progress.step,
        "num_tokens": progress.num_tokens,
        "inputs": job.inputs,
        "metrics": {"bytes": len(metrics), "sha256": hashlib.sha256(metrics).hexdigest()},
        "options": recorded(job.options),
    }
    target = folder / "checkpoints" / f"step-{progress.step:06}"
    target.parent.mkdir(exist_ok=True)
    with written_whole(target) as partial:
        if job.model.lora:
            job.model.save_adapter(partial, job.options.init)
        else:
            job.model.save_pretrained(partial)
            job.tokenizer.save(partial)
        save_tensors(partial / "training.safetensors", tensors)
        write_json(partial / "training.json", record)
        (partial / "SHA256SUMS").write_text(checksums(partial))
    for old in sorted(checkpoints(folder), key=step_of)[: -job.options.keep]:
        aside = old.with_name(f"{old.name}.partial")  # never seen half removed
        shutil.rmtree(old.rename(aside))


def checksums(folder: Path) -> str:
    """A line for each file, as sha256sum writes and checks them."""
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    return "".join(f"{evaluation.digest_file(file)}  {file.name}\n" for file in files)


def read_checkpoint(folder: Path) -> dict:
    """The record of a checkpoint. Raises ValueError unless every file, and the metrics up to its
    step, are to the bit what was written."""
    found = checksums(folder).encode()
    stored = (folder / "SHA256SUMS").read_bytes() if (folder / "SHA256SUMS").is_file() else b""
    if stored != found:
        lines = sorted(set(stored.split(b"\n")) ^ set(found.split(b"\n")), key=lambda x: x[64:])
        name = lines[0][66:].decode(errors="replace") if len(lines) < 3 else "SHA256SUMS"
        raise ValueError(f"{folder / name}: is not what was saved, by SHA256SUMS; remove {folder} "
                         "to go on from the checkpoint before it")  # fmt: skip
    record, file = read_json(folder / "training.json"), folder.parent.parent / "metrics.jsonl"
    if not (alike(record, RECORD) and record["step"] == step_of(folder)):
        raise ValueError(f"{folder / 'training.json'}: is not a record as train.py writes it")
    metrics = file.read_bytes()[: record["metrics"]["bytes"]] if file.is_file() else b""
    if hashlib.sha256(metrics).hexdigest() != record["metrics"]["sha256"]:
        raise ValueError(f"{file}: is not what was written up to step {record['step']}; restore "
                         "it, or start again with --overwrite")  # fmt: skip
    return record


def check_tensors(job: Job) -> None:
    """Raises ValueError unless training.safetensors holds what this job needs, in its shapes."""
    file, loss = job.checkpoint / "training.safetensors", LOSSES[job.options.loss]
    wanted = {"start": ("F32", [len(job.held_out), 2])}
    wanted["random.cpu"] = ("U8", list(torch.get_rng_state().shape))
    kept = loss.needs_reference and job.questions is None
    for name, there in (("ref_logps", kept), ("ref_mismatched", job.mismatched)):
        wanted |= {name: ("F32", [len(job.pairs), 2])} if there else {}
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
            found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    found.pop("random.cuda", None)
    if any(name.startswith("moments") for name in found):  # none before a step has found pairs
        for name, parameter in job.model.named_parameters():
            if not parameter.requires_grad:
                continue
            shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": ()}
            wanted |= {f"moments.{key}.{name}": ("F32", list(s)) for key, s in shapes.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{file}: {name} is {found.get(name)}, not {wanted.get(name)}")


def load_progress(job: Job) -> Progress:
    """Where the run stands: at step 0, or as job.checkpoint says. The model has its weights."""
    if job.checkpoint is None:
        needed = LOSSES[job.options.loss].needs_reference and job.questions is None
        ref_logps = reference_logps(job) if needed else None
        other = job.mismatched and reference_logps(job._replace(pairs=job.mismatched))
        return Progress(0, 0, ref_logps, other, logps_of(job, job.held_out), {})
    tensors = load_file(job.checkpoint / "training.safetensors")
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], job.options.device)
    moments = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments")}
    record = job.record
    refs = tensors.get("ref_logps"), tensors.get("ref_mismatched")
    return Progress(record["step"], record["num_tokens"], *refs, tensors["start"], moments)


@contextlib.contextmanager
def noted_signals():
    """Yields a list that SIGINT and SIGTERM are added to; a second one ends the process at once."""
    noted: list[int] = []

    def note(number, _frame):
        if noted:
            os._exit(128 + number)
        noted.append(number)
        os.write(2, b"\nfinishing this step; once more to stop at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reference_logps(job: Job) -> Tensor:
    """Log-probs of the training pairs under the initial weights (pairs, 2), from the cache if
    weights, ids and dtype are the same. Nothing else of the reference stays in memory."""
    options = job.options
    start = job.inputs["init"], job.inputs["init_adapter"]
    key = digest(*start, digest_pairs(job.pairs), options.dtype)
    file = Path(options.out).parent / "cache" / f"reference-{key[:16]}.safetensors"
    same = False
    if file.is_file():
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            logps = tensors.get_tensor("logps")
            said = (tensors.metadata() or {}).get("key")
            same = said == digest(key, logps.numpy().tobytes())
            same = same and logps.shape == (len(job.pairs), 2) and bool(logps.isfinite().all())
    if gathered(torch.tensor([int(same)])).all():
        print(f"reference log-probs: found in {file}")
        return logps
    with stage("reference log-probs: the initial weights on the training pairs") as notes:
        logps = logps_of(job, job.pairs)
        if not logps.isfinite().all():
            raise FloatingPointError(f"{options.init}: its log-probs are not finite")
        if is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"logps": logps}, key=digest(key, logps.numpy().tobytes()))
        notes.append(f"in {file}")
    return logps


def logps_of(job: Job, pairs: Pairs, model: Llama | None = None) -> Tensor:
    """(pairs, 2) by the policy or another model."""
    options = job.options
    layout = options.row_tokens, options.micro_tokens, getattr(torch, options.dtype)
    logps = evaluation.pair_logps(model or job.model, pairs, *layout, own_batches)
    if several():
        dist.all_reduce(logps)
        job.model.reshard()  # which the backward pass does else
    return logps


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(model: Llama, options: Options) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, norms = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, options.lr, weight_decay=options.weight_decay, fused=True)


def get_moments(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state under the parameters' names: "exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"."""
    named = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {f"{key}.{name}": value for name, of in named.items() for key, value in of.items()}


def put_moments(model: Llama, optimizer: torch.optim.Optimizer, moments: dict) -> None:
    for name, moment in moments.items():
        key, _, parameter = name.partition(".")
        parameter = model.get_parameter(parameter)
        moment = moment.to(parameter.device)
        if several() and key != "step":
            from torch.distributed.tensor import distribute_tensor

            where = parameter.device_mesh, parameter.placements
            moment = distribute_tensor(moment, *where, src_data_rank=None)  # each has it whole
        optimizer.state[parameter][key] = moment


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
    terms = [gathered(x.to(device)) for x in (torch.cat(logps), ref, lengths)]  # (2B,) each
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
    of all processes, and the gradient's norm before clipping, all on the model's device: nothing
    here waits for it. When a loss or the gradient is not finite, the weights stay as they are.
    """
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
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
    losses, logps = gathered(torch.cat(losses)), gathered(torch.cat(logps))
    pairs = len(losses)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    grad_norm = full(get_total_norm(gradients)) / pairs  # of the mean, however the step was cut up
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


def train(job: Job, progress: Progress, noted: list[int]) -> tuple[Tensor, dict]:
    """Trains job.model in place from `progress` on, writes metrics.jsonl and checkpoints, and ends
    early once a signal is noted. Returns the held-out pairs' log-probs and a row of metrics, both
    of the last step."""
    options, steps, model = job.options, job.steps, job.model
    ref_logps, start, tokens = progress.ref_logps, progress.start, progress.num_tokens
    optimizer = make_optimizer(model, options)
    put_moments(model, optimizer, progress.moments)
    remaining = range(progress.step + 1, job.stop + 1)
    with metrics_log(job) as (row, log):
        end = start
        if progress.step == 0 or not remaining:
            end = logps_of(job, job.held_out) if progress.step else start
            row |= {"step": progress.step, "epoch": progress.step / job.per_epoch}
            row |= held_out_metrics(job, end, start)
        if progress.step == 0:
            log(row)
        began, read, tokens_read, unread = time.perf_counter(), progress.step, tokens, []
        bar = {"desc": options.loss, "unit": "step", "leave": False}
        for step in tqdm(remaining, initial=progress.step, total=job.stop, **bar):
            now, given, extra = job, ref_logps, {}  # `given` is the loss's, for rlhf not ref_logps
            if job.questions:
                now, ref_logps, given, extra = draw_pairs(job, step)
            batches = step_batches(now, step)
            index = [i for batch in batches for i in batch.index]
            index = gathered(torch.tensor(index, dtype=torch.long)).tolist()
            lr = set_lr(optimizer, learning_rate(options, step, steps))
            others = job.mismatched and step_batches(job, step, job.mismatched)
            losses, logps, grad_norm = torch.zeros(0), torch.zeros(0, 2), torch.zeros(())
            if batches:  # there are none where all answers drawn are right, or all wrong
                losses, logps, grad_norm = train_step(
                    *(model, optimizer, batches, options, given),
                    others and (others, progress.ref_mismatched),
                )
            tokens += sum(row_length(now.pairs[i]) for i in index)
            unread.append((now, step, index, losses, grad_norm))
            # What is written at a step depends on the step alone, not on where this run stops.
            evaluate = step % options.eval_every == 0 or step == steps
            wanted = evaluate or step % options.log_every == 0
            last, signals = step == job.stop, gathered(torch.tensor(noted, dtype=torch.long))
            stopped = len(signals) > 0
            every = options.save_every
            save = stopped if every is None else stopped or last or step % every == 0
            if not (wanted or save or last or step == 1):
                continue
            for one in unread:
                check_finite(*one)
            unread.clear()
            ref = None if ref_logps is None else ref_logps[index]
            if step == 1 and ref is not None and index and given is ref_logps:
                check_start(options, losses.cpu(), logps.cpu(), ref)
            seconds = time.perf_counter() - began
            row = {"step": step, "epoch": step / job.per_epoch, "loss": mean(losses)}
            row |= {"learning_rate": lr, "grad_norm": float(grad_norm), "num_tokens": tokens}
            row |= {"step_seconds": seconds / (step - read)}  # means since the last row
            row |= {"tokens_per_second": (tokens - tokens_read) / seconds}
            row |= extra | training_metrics(now, index, logps.cpu(), ref)
            held_out = {}
            if evaluate or last:
                end = logps_of(job, job.held_out)
                held_out = held_out_metrics(job, end, start)
            if wanted:
                log(row | held_out if evaluate else row)
            row |= held_out
            if save:
                check_weights(job, step)
                moments = whole(get_moments(model, optimizer))
                now = progress._replace(step=step, num_tokens=tokens, moments=moments)
                saved = job._replace(model=whole_model(model))
                if is_first():
                    save_checkpoint(saved, now)
            if stopped:
                noted[:] = gathered(signals).tolist()  # waits until that is saved
                break
            began, read, tokens_read = time.perf_counter(), step, tokens
    check_weights(job, row["step"])
    return end, row


def step_rows(job: Job, step: int) -> list[int]:
    """Which rows of data step 1, 2, ... takes; the last step of an epoch may be short."""
    epoch, place = divmod(step - 1, job.per_epoch)
    count = len(job.pairs if job.questions is None else job.questions)
    order = epoch_order(count, job.options.seed, epoch).tolist()
    return order[place * job.per_step : (place + 1) * job.per_step]


def step_batches(job: Job, step: int, pairs: Pairs | None = None) -> list[Batch]:
    """The pairs of a step, packed, or the same rows of other `pairs`."""
    options, pairs = job.options, pairs or job.pairs
    index = step_rows(job, step) if job.questions is None else list(range(len(pairs)))
    layout = options.row_tokens, options.micro_tokens, evaluation.fixed_length(job.model)
    return own_batches(pairs, index, *layout)


def draw_pairs(job: Job, step: int) -> tuple[Job, Tensor, Tensor, dict]:
    """The job with pairs drawn from the policy for a step, their log-probs under the reference,
    what the loss takes for these, and metrics. A function of weights, seed and step.

    For rlhf all answers, two by two. The return of an answer is its grade minus beta times its
    log-ratio, so that their mean is E[grade] - beta KL; its advantage that minus the mean return of
    the others to the same prompt (arXiv 2402.14740). Else a right and a wrong answer to each prompt
    that has both.
    """
    options, k = job.options, job.options.samples
    items = [job.questions[i] for i in step_rows(job, step)]
    prompts = [item.ids(job.tokenizer, "") for item in items for _ in range(k)]
    policy = job.model
    if policy.lora:
        policy = copy.deepcopy(policy).merge_lora(getattr(torch, options.dtype))
    answers = evaluation.draw(
        policy, prompts, options.max_new_tokens, stop_ids=job.tokenizer.stop_ids,
        seed=int(np.random.default_rng([options.seed, step]).integers(2**62)),
    )  # fmt: skip
    grades = [evaluation.grade_drawn(item, job.tokenizer, answers[i * k + j])
              for i, item in enumerate(items) for j in range(k)]  # fmt: skip
    extra = {"reward": sum(grades) / len(grades), "num_drawn": sum(map(len, answers))}
    pairs, all_pairs = Pairs(), LOSSES[options.loss].answers == "drawn"
    for i in range(0, len(answers), k):
        if all_pairs:
            found = zip(answers[i : i + k : 2], answers[i + 1 : i + k : 2])
        else:
            good, bad = ([a for a, g in zip(answers[i : i + k], grades[i : i + k]) if g == right]
                         for right in (1, 0))  # fmt: skip
            found = list(zip(good, bad))[:1]
        for one, other in found:
            pairs.append(Pair(prompts[i], one, other), items[i // k].line)
    now = job._replace(pairs=pairs)
    ref_logps = given = logps_of(job, pairs, job.reference)
    if all_pairs:
        logps = logps_of(job, pairs)
        logratios = (logps - ref_logps).view(-1, k)  # (prompts, samples)
        returns = torch.tensor(grades).view(-1, k) - options.beta * logratios
        advantages = (returns - returns.mean(dim=1, keepdim=True)) * k / (k - 1)
        given = logps + advantages.view(-1, 2) / options.beta
        extra["kl"] = mean(logratios)
    return now, ref_logps, given, extra


@contextlib.contextmanager
def metrics_log(job: Job):
    """Yields the last row of metrics.jsonl, or {}, and a function that adds one; with --tensorboard
    to event files too."""
    if not is_first():
        yield {}, lambda row: None
        return
    folder, board = Path(job.options.out), None
    if job.options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard", purge_step=job.record.get("step", -1) + 1)

    def log(row: dict) -> None:
        print(strict_json(row), file=file, flush=True)
        for name, value in row.items() if board else ():
            board.add_scalar(name, value, row["step"])

    with open(folder / "metrics.jsonl", "a+", encoding="utf-8") as file:
        file.seek(0)
        yield json.loads(([*file] or ["{}"])[-1]), log
    if board:
        board.close()


def training_metrics(job: Job, index: list[int], logps: Tensor, ref: Tensor | None) -> dict:
    """Means over the pairs of a step; missing answers count in none. Of draws that are no pairs of
    good and bad there are none."""
    if LOSSES[job.options.loss].answers == "drawn":
        return {}
    present = torch.from_numpy(job.pairs.lengths()[index, 1:] > 0)
    logps = torch.where(present, logps, torch.nan)
    values = evaluation.preference_values(logps, ref, job.options.beta)
    return {name: mean(value[~value.isnan()]) for name, value in values.items()}


def check_weights(job: Job, step: int) -> None:
    fine = all(p.isfinite().all() for p in job.model.parameters())  # of sharded ones the own part
    if not gathered(torch.tensor([int(fine)])).all():
        raise FloatingPointError(f"step {step}: weights not finite; try a lower --lr")


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
    drawn = LOSSES[options.loss].answers == "drawn"  # pairs have no advantages: no loss
    metrics = {"loss": math.nan if drawn else mean(losses)}
    metrics |= evaluation.preference_metrics(logps, start, options.beta)
    return {f"eval_{name}": value for name, value in metrics.items()}


def mean(values: Tensor) -> float:
    return values.double().mean().item()


def strict_json(row: dict) -> str:
    """JSON has no word for infinity or for nothing: an estimate that overflows is null, and so is
    the mean over rejected answers where no row has one."""
    finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


# --- What a run needs, on paper: --plan -----------------------------------------------------------


class Needs(NamedTuple):
    """Of a step: bytes in each GPU by part and most at once, and what each computes and moves."""

    parameters: int
    weights: float  # with those of others, where several GPUs share them, while they are at work
    gradients: float
    moments: float
    activations: float  # kept from the forward to the backward pass
    head: float  # logits of a chunk, gradients of the head and of what it reads
    peak: float
    flops: float
    traffic: float  # bytes read and written


def needs(config: ModelConfig, options: Options, rows: list[int], lengths: list[int],
          micros: int = 1, gpus: int = 1) -> Needs:  # fmt: skip
    """Of a step of `micros` forward passes in each GPU. rows: tokens of each row of a pass;
    lengths: of each of its answers. Counts tensors, not what an allocator or CUDA take beside them,
    and what autograd keeps of eager blocks: compiled ones keep less.
    """
    with torch.device("meta"):  # a block stands for all
        model = Llama(dataclasses.replace(config, num_hidden_layers=1))
        if options.lora_rank:
            add_adapters(model, options)
    half, recompute = options.dtype == "bfloat16", options.checkpointing == "on"
    cuda, sharded = options.device != "cpu", gpus > 1
    compiled = cuda and options.compile != "off"
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    T, N, squares, s = sum(rows), sum(lengths), sum(t * t for t in rows), 2 if half else 4
    n = max(part.stop - part.start for _, part in chunks_of_pairs(lengths, CHUNK_TOKENS))

    layer, head = model.model["layers"][0], model.head_weight
    every, block = list(model.parameters()), list(layer.parameters())
    of_block = sum(p.nbytes for p in block)
    root = sum(p.nbytes for p in every) - of_block
    trained, trained_block = (sum(p.numel() for p in one if p.requires_grad)
                              for one in (every, block))  # fmt: skip
    trained += (L - 1) * trained_block
    dense = head.requires_grad
    parameters = sum(p.numel() for p in every) + (L - 1) * sum(p.numel() for p in block)

    a_token, rounded = kept_of_block(model, half)
    # SDPA keeps a mask as numbers, FlexAttention has none.
    of_tokens = a_token * T + (0 if compiled else s * squares)
    # Autocast keeps each weight that it rounds until the pass is over, the head's work included.
    rounded *= 0 if sharded or (compiled and recompute) else L
    activations = L * (4 * D * T if recompute else of_tokens) + rounded
    activations += T * (8 * config.head_dim + 4 * D + 4 * D * dense)  # rotary table, last norm
    # Of an MLP's backward pass: gradients of both its factors, of the stream and of the norm.
    at_work = T * (2 * F * s + 8 * D) + recompute * of_tokens
    grad_head = 4 * head.numel() * dense
    logits = n * len(head) * (s + 4 * (half and cuda))  # and a float32 copy
    logits += 2 * head.numel() * (half and head.dtype == torch.float32)  # the head, rounded
    logits += 8 * D * (N + n)  # states and their gradients

    # The root; two blocks, one on its way; a block's gradient before and after it is summed.
    borrowed = sharded * (root + 2 * of_block / (2 if half and dense else 1) + 8 * trained_block)
    gradients = 4 * trained / gpus
    before = gradients * (micros > 1)  # a step begins without any
    # A tied matrix has two gradients up to the end of a pass, that of earlier passes is a third.
    last = grad_head * (config.tie_word_embeddings + (micros > 1))
    phases = (before + activations + grad_head + max(logits, at_work),
              gradients + max(at_work, last))  # fmt: skip
    weights, moments = (root + L * of_block) / gpus + borrowed, 8 * trained / gpus
    peak = weights + moments + max(phases)

    linears = [m.weight for m in layer.modules() if isinstance(m, nn.Linear)]
    matrices = 2 * T * L * sum(w.numel() for w in linears)
    learning = 2 * T * L * sum(w.numel() for w in linears if w.requires_grad)
    attention = 4 * L * config.num_attention_heads * config.head_dim * squares
    attention /= 2 if compiled else 1  # FlexAttention leaves out blocks of the future
    to_head = 2 * N * head.numel()
    # Backward: by inputs and by weights; attention has five products where it had two.
    flops = 2 * matrices + learning + 3.5 * attention + to_head * (2 + dense)
    # Recomputing stops at the last thing that was kept: eager code leaves out the last product.
    flops += recompute * (matrices + attention - (not compiled) * dense * 2 * T * L * D * F)
    flops += (not LOSSES[options.loss].pairwise) * (matrices + attention + to_head)
    chunks = -(-N // n)
    traffic = (2 + recompute) * s * matrices / (2 * T) + 2 * (activations + gradients)
    traffic += 4 * s * N * len(head) + chunks * head.numel() * (2 * s + 8 * dense)
    # AdamW reads weight, gradient and moments, and writes all but the gradient.
    return Needs(parameters, weights, gradients, moments, activations, grad_head + logits, peak,
                 micros * flops, micros * traffic + 28 * trained / gpus)  # fmt: skip


def kept_of_block(model: Llama, half: bool) -> tuple[int, int]:
    """What autograd keeps of a block: bytes a token, without a mask, and of weights rounded."""
    config, layer = model.config, model.model["layers"][0]
    D, F, E, s = config.hidden_size, config.intermediate_size, config.head_dim, 2 if half else 4
    H, K = config.num_attention_heads, config.num_key_value_heads
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    # A trained matrix keeps what it multiplies. Queries, keys and values read the same, and so do
    # gate and up, but autocast rounds it for each.
    inputs = {}
    for name, linear in linears.items():
        if linear.weight.requires_grad:
            alone = half or re.search("o_proj|down_proj|lora_B", name)
            inputs[name if alone else name.partition(".")[0]] = linear.in_features
    # A norm keeps its input, and normalised for its weight's sake, in float32.
    normed = 2 * D + config.qk_norm * (H + K) * E
    normed *= 8 if model.head_weight.requires_grad else 4
    attention = s * (2 * H + 2 * K) * E + 4 * H  # q, k, v, what comes out, its log-sum-exp
    rounded = sum(
        2 * m.weight.numel() for m in linears.values() if m.weight.dtype != torch.bfloat16
    )
    return s * sum(inputs.values()) + normed + attention + 3 * s * F, half * rounded


def needs_on(config: ModelConfig, options: Options, gpus: int) -> Needs:
    """Of pairs as long as --max_length lets them be, half of it prompt, one in a GPU at least."""
    prompt = options.max_length // 2
    answer = options.max_length - prompt
    pair, share = prompt + 2 * (answer - 1), -(-options.batch_size // gpus)
    count = min(share, max(1, options.micro_tokens // pair))  # in a pass
    rows = [pair] * count
    if options.compile != "off":  # passes have one length
        rows.append(max(0, options.micro_tokens - sum(rows)))
    return needs(config, options, rows, [answer] * 2 * count, -(-share // count), gpus)


def plan(options: Options) -> str:
    """What a run needs, in 80 columns: whether it fits --gpu, or what would; then by part."""
    if options.plan == "init":
        config = ModelConfig.from_hf(read_json(Path(options.init) / "config.json"))
    else:
        D, F, L, H, K, tied = PRESETS[options.plan]
        config = ModelConfig(128256, D, F, L, H, K, D // H, tie_word_embeddings=tied)
    options = dataclasses.replace(options, init=options.init or options.plan, device="cuda")
    memory, *peaks, bandwidth = GPUS[options.gpu]
    rank = options.lora_rank or min(16, config.num_key_value_heads * config.head_dim)
    lora = {"lora_rank": rank, "lora_alpha": 1.0, "lora_targets": options.lora_targets or "all"}
    recompute, half = {"checkpointing": "on"}, {"dtype": "bfloat16"}

    def of(changes: dict, gpus: int = 1) -> Needs:
        return needs_on(config, dataclasses.replace(options, **changes), gpus)

    def fits(found: Needs) -> bool:
        return 1.1 * found.peak <= memory * 1e9  # by as much the estimate may be off

    def first(ways) -> list[str]:
        """The first of (GPUs, changes of flags) that fits, in words."""
        for gpus, changes in (way for way in ways if fits(of(way[1], way[0]))):
            words = [f"--{k} {v}" for k, v in changes.items()
                     if k not in LORA_OPTIONS[1:] and v != getattr(options, k)]  # fmt: skip
            return [" ".join([f"{gpus} GPUs"] * (gpus > 1) + words)]
        return []

    lines = [
        f"{Path(options.init).name[-32:]}, {options.dtype}, on one {options.gpu} of {memory} GB: "
    ]
    if fits(of({})):
        lines[0] += "fits"
    else:
        # The fewest GPUs, then what takes the least time; of --lora_rank, too.
        counts = [gpus for gpus in GPU_COUNTS if gpus <= options.batch_size]
        flags = [{}, half, recompute, recompute | half]
        ways = first(itertools.product(counts, flags))
        ways += first(itertools.product(counts, [lora | changes for changes in flags]))
        lines[0] += "does not fit"
        lines += [f"  it does with {way}" for way in dict.fromkeys(ways)]
    kinds = {"all weights": {"lora_rank": None}, f"rank {rank}": lora}
    parameters = of(kinds["all weights"]).parameters
    lines += [
        "",
        f"{parameters:,} parameters, {options.batch_size} pairs a step of up to "
        f"{options.max_length} tokens.",
        "GB in each GPU, * fits with a tenth to spare; then of a step PFLOP, TB moved,",
        f"seconds at {options.mfu:.0%} of peak.",
        "",
        "            GPU weight   grad moment   kept   head   peak   PFLOP    TB       s",
    ]
    for (kind, changes), way in itertools.product(kinds.items(), ("off", "on")):
        name = kind if way == "off" else "  recomputed"
        for gpus in GPU_COUNTS:
            found = of(changes | {"checkpointing": way}, gpus)
            speed = 1e12 * options.mfu * peaks[options.dtype == "float32"]
            seconds = max(found.flops / speed, found.traffic / (1e9 * bandwidth))
            line = f"{name:12}{gpus:3}" + "".join(f"{part / 1e9:7.1f}" for part in found[1:7])
            line += f"{'*' if fits(found) else ' '}{found.flops / 1e15:7.2f}"
            lines.append(f"{line}{found.traffic / 1e12:6.2f}{seconds:8.1f}")
            name = ""
    return "\n".join(lines)


# --- The whole path -------------------------------------------------------------------------------


def describe(job: Job) -> str:
    """What is about to be trained, so that a wrong flag is seen before it costs anything."""
    options, loss = job.options, LOSSES[job.options.loss]
    own = {"beta": options.beta} | loss.options | loss_options(options)
    rows = f"{len(job.pairs)} pairs"
    if job.questions:
        rows = f"{len(job.questions)} questions, {options.samples} answers drawn to each"
    parameters = sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    processes = f", {dist.get_world_size()} processes" if several() else ""
    return "\n".join(
        [
            f"{options.loss}: {loss.formula}   [{loss.source}]",
            f"  log-probs as {loss.uses} over an answer's tokens, "
            f"{', '.join(f'{name} {value:g}' for name, value in own.items())}, "
            f"{'with' if loss.needs_reference else 'without'} a reference",
            f"  {options.init}: {parameters:,} parameters, {trained:,} of them trained, "
            f"{options.dtype} products on {options.device}{processes}",
            f"  {rows}, {len(job.held_out)} held out; steps "
            f"{job.record.get('step', 0) + 1} to {job.stop} of {job.steps}, {options.batch_size} "
            f"{'prompts' if job.questions else 'pairs'} each; lr {options.lr:g}, "
            f"{options.schedule}, seed {options.seed}",
        ]
    )


def warn_of_slow_bfloat16(options: Options) -> None:
    slow = options.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if options.dtype == "bfloat16" and slow:
        print("--dtype bfloat16: this CPU has no instructions for it, float32 will be much faster",
              file=sys.stderr)  # fmt: skip


def recorded(options: Options) -> dict:
    """The options as train_config.json and checkpoints hold them, for --config and --resume."""
    return dataclasses.asdict(options) | {"resume": False, "overwrite": False, "config": None}


def provenance() -> dict:
    """What else a run depends on, for train_config.json."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processes": dist.get_world_size() if several() else 1,
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


def begin(job: Job, progress: Progress) -> None:
    """Makes the run folder what it was at the step from which the run goes on."""
    folder = Path(job.options.out)
    clear(folder, checkpoints=job.checkpoint is None)
    write_json(folder / "train_config.json", {**recorded(job.options), **provenance()})
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_bytes()[: job.record["metrics"]["bytes"]] if job.checkpoint else b""
    with written_whole(metrics) as partial:
        partial.write_bytes(kept)


def merge(job: Job) -> None:
    """Writes the adapters and merges them into the weights, and says what that does to logits."""
    options = job.options
    job.model.save_adapter(Path(options.out) / "adapter", options.init)
    before = some_logits(job)
    job.model.merge_lora(getattr(torch, options.dtype))
    if len(before):
        change = (some_logits(job) - before).abs().max()
        print(f"  merged in {options.dtype}: logits move by at most {change:.1e}")


@torch.no_grad()
def some_logits(job: Job) -> Tensor:
    """Of the first tokens of a held-out pair or two: (tokens, V), none where there is no pair."""
    options, model = job.options, job.model
    pairs = (job.held_out or job.pairs)[:2]
    layout = options.row_tokens, options.micro_tokens, evaluation.fixed_length(model)
    for batch in make_batches(pairs, list(range(len(pairs))), *layout)[:1]:
        with evaluation.autocast(model.head_weight.device, getattr(torch, options.dtype)):
            hidden = evaluation.answer_states(model, batch.to(model.head_weight.device))[:64]
            return (hidden @ model.head_weight.T).float()
    return torch.zeros(0)


def finish(job: Job, start: Tensor, end: Tensor, last: dict, began: float) -> None:
    """Writes the checkpoint and summary.json, and prints the table."""
    options, folder = job.options, Path(job.options.out)
    if job.model.lora:
        merge(job)
    job.model.save_pretrained(folder)
    job.tokenizer.save(folder)
    rows = {options.loss: evaluation.preference_row(end, start, job.held_out)}
    if (Path(options.init) / "base.json").is_file():  # the demonstration's
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


def main(argv: list[str] | None = None) -> Path:
    """Runs the command line `argv` and returns the run folder."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes())
        options, parser = parse_options(argv)
        folder, began = Path(options.out), time.perf_counter()
        try:
            if options.plan:
                print(plan(options))
                parser.exit()
            with agreed():
                if is_first():
                    check_out(options)
                job = load_job(options if options.init else demonstration(options))
            with agreed():  # nothing is written before all have read their files
                if is_first():
                    stack.enter_context(claimed(folder))
                    check_free(options)
        except (OSError, ValueError) as error:
            parser.error(error)
        print(describe(job), flush=True)
        warn_of_slow_bfloat16(options)
        try:
            shard(job.model, options)
            progress = load_progress(job)
            if is_first():
                begin(job, progress)
            noted = stack.enter_context(noted_signals())
            with stage(f"training: {options.loss}") as notes:
                end, last = train(job, progress, noted)
                notes.append(f"metrics.jsonl in {folder}")
            if last["step"] == job.stop:
                job = job._replace(model=whole_model(job.model))
                if is_first():
                    finish(job, progress.start, end, last, began)
                return folder
        except OSError as error:
            saved = newest_checkpoint(folder)
            whole = f"; {saved} is whole, --resume goes on from there" if saved else ""
            parser.error(f"{error.filename or folder}: {error.strerror}{whole}")
        except FloatingPointError as error:
            parser.error(error)
        goes_on = f"python train.py --resume --out {folder}"
        parser.exit(128 + noted[0], f"train.py: step {last['step']} is saved; {goes_on} goes on\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "±" is no reason to stop
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
