"""The job of a run: everything that training reads, loaded and checked before a file is written.
Stands on the core, without train.py."""

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import Pairs, load_pairs, needs_fixed_length, split_pairs, truncate
from eval import pair_logps
from mio import LOSSES
from model import Llama
from support import lora
from support.checkpoints import Progress, check_resumed, newest_checkpoint
from support.cli import stage
from support.files import digest, read_json
from support.on_policy import draws, load_questions, prompts_per_step
from support.trained_run import load_checkpoint
from support.weights import save_tensors, weight_files


class TrainingError(Exception):
    """Training cannot go on; the message says why and names the remedy."""


class Job(NamedTuple):
    """Everything that training reads."""

    options: object  # train.Options
    model: Llama
    tokenizer: object
    pairs: Pairs  # to train on; empty if the policy draws them
    held_out: Pairs
    inputs: dict[str, str]  # hashes of the files that the run started from
    checkpoint: Path | None  # from which the run resumes
    record: dict  # of the checkpoint; {} for a new run
    world: object  # support.distributed.World
    mismatched: Pairs | None = None  # the prompts of `pairs` with the answers of other rows (kto)
    questions: list | None = None  # to which the policy draws answers
    reference: Llama | None = None  # stays in memory if the policy draws answers

    @property
    def layout(self) -> tuple[int, int, bool]:
        """The last arguments of data.make_batches."""
        return self.options.row_tokens, self.options.micro_tokens, needs_fixed_length(self.model)

    @property
    def per_epoch(self) -> int:
        rows = self.pairs if self.questions is None else self.questions
        return math.ceil(len(rows) / prompts_per_step(self.options))

    @property
    def steps(self) -> int:
        """The steps of all epochs, over which the schedule of the learning rate extends."""
        return self.options.epochs * self.per_epoch

    @property
    def stop(self) -> int:
        """The last step of this run, which --max_steps may bring forward."""
        limit = self.options.max_steps
        return self.steps if limit is None else min(self.steps, limit)


def load_job(options, world) -> Job:
    """Raises OSError or ValueError that names the file or flag and the remedy."""
    checkpoint = newest_checkpoint(Path(options.out)) if options.resume else None
    record = read_json(checkpoint / "training.json") if checkpoint else {}
    model, tokenizer, reference = load_models(options, checkpoint, world)
    loss, pairs, held_out, questions = LOSSES[options.loss], Pairs(), Pairs(), None
    if options.eval_data:
        held_out = load_pairs(options.eval_data, tokenizer, options.max_length)
    if draws(options):
        questions = load_questions(options, model, tokenizer)
    else:
        pairs = load_pairs(options.data, tokenizer, options.max_length)
        if not options.eval_data:
            pairs, held_out = split_pairs(pairs, options.eval_fraction, options.seed)
        check_answers(pairs, loss.answers, options.data, options.loss)
        check_answers(held_out, loss.answers, options.eval_data or options.data, options.loss)
    lengths = np.concatenate([pairs.lengths(), held_out.lengths()])  # (all pairs, 3)
    longest = int(max(lengths[:, 0] + lengths[:, 1:].max(axis=1), default=0))
    if longest > (context := model.config.max_position_embeddings):
        raise ValueError(f"a prompt with its answer has {longest} tokens, but the model reads "
                         f"{context}; lower --max_length")  # fmt: skip
    init, adapter = Path(options.init), options.init_adapter
    inputs = record.get("inputs", {}) | {
        "data": digest(questions) if questions else hash_pairs(pairs),
        "eval_data": hash_pairs(held_out),
        "init_adapter": digest(*map(Path(adapter).joinpath, lora.ADAPTER_FILES)) if adapter else "",
    }
    # A resumed run does not read the initial weights, unless they are frozen or the reference.
    if not record or reference or lora.lora_of(model) or options.init != record["options"]["init"]:
        inputs["init"] = digest(*sorted(weight_files(init)), init / "config.json")
    mismatched = None
    if loss.shared_of_mismatched:
        mismatched = mismatched_pairs(pairs, longest, tokenizer.bos_id)
    more = {"mismatched": mismatched, "questions": questions, "reference": reference}
    read = model, tokenizer, pairs, held_out, inputs, checkpoint, record, world
    job = Job(options, *read, **more)
    every = options.eval_every or max(1, math.ceil(job.steps / 10))
    job = job._replace(options=dataclasses.replace(options, eval_every=every))
    if record:
        check_resumed(job)
    return job


def load_models(options, checkpoint: Path | None, world):
    """The policy from --init or from a checkpoint, the tokenizer, and the reference if the policy
    draws answers, otherwise None."""
    device = "cpu" if world.count > 1 else options.device  # sharding moves the model by blocks
    reference = None
    if options.lora_rank or options.init_adapter:
        model, tokenizer = load_checkpoint(options.init, "cpu", torch.float32)
        _add_adapter(model, options)  # which converts weights to --dtype, so less has to move
        model.to(device)
        if draws(options):  # shares the frozen weights
            frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
            reference = copy.deepcopy(model, frozen)
        if checkpoint:
            lora.load_adapter(model, checkpoint)
    else:
        model, tokenizer = load_checkpoint(checkpoint or options.init, device, torch.float32)
        if draws(options):
            reference = Llama.from_pretrained(options.init, device=device)
    model.checkpointing = options.checkpointing == "on"
    if options.compile == "on" or (options.compile == "auto" and options.device != "cpu"):
        model.compile_blocks()
    return model, tokenizer, reference


def _add_adapter(model: Llama, options) -> None:
    """Adds the adapter of --init_adapter, or a new one."""
    folder, targets = options.init_adapter, options.lora_targets
    if folder:
        config = lora.LoraConfig.from_pretrained(folder)
    else:
        targets = lora.LORA_TARGETS.get(targets) or targets.split(",")
        config = lora.LoraConfig(
            options.lora_rank, options.lora_alpha, targets, options.lora_rslora
        )
    torch.manual_seed(options.seed)
    try:
        lora.add_lora(model, config, getattr(torch, options.dtype))
    except ValueError as error:
        raise ValueError(f"{folder or options.init}: {error}") from None
    if folder:
        lora.load_adapter(model, folder)


def mismatched_pairs(pairs: Pairs, max_length: int, bos_id: int | None) -> Pairs:
    """Each prompt with the answers of the next row that has another prompt, for kto's K."""
    mismatched = Pairs()
    for i, pair in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((other for other in others if other.prompt != pair.prompt), pair)
        mixed = truncate(other._replace(prompt=pair.prompt), max_length, bos_id)
        mismatched.append(mixed, pairs.lines[i])
    return mismatched


def check_answers(pairs: Pairs, needed: str, path, loss: str) -> None:
    """Raises ValueError for the first row without the answers that a loss needs (Loss.answers)."""
    present = pairs.lengths()[:, 1:] > 0  # (pairs, 2)
    complete = {"both": present.all(axis=1), "chosen": present[:, 0], "any": present.any(axis=1)}
    for row in np.flatnonzero(~complete[needed])[:1]:
        answers = "a chosen and a rejected answer" if needed == "both" else "a chosen answer"
        raise ValueError(f"{path}:{pairs.lines[row]}: --loss {loss} needs {answers} in each row")


def describe(job: Job) -> str:
    """What is about to be trained, so that a wrong flag is seen before it costs anything."""
    options, loss = job.options, LOSSES[job.options.loss]
    own = ({"beta": options.beta} if loss.uses_beta else {}) | loss.options
    own |= {name: x for name in loss.options if (x := getattr(options, name)) is not None}
    own = "".join(f", {name} {value:g}" for name, value in own.items())
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in job.model.parameters()]
    total, trained = map(sum, zip(*sizes))
    processes = f", {job.world.count} processes" if job.world.count > 1 else ""
    rows, unit = f"{len(job.pairs)} pairs", "pairs"
    if job.questions:
        rows, unit = f"{len(job.questions)} questions, {options.samples} answers to each", "prompts"
    first, steps = job.record.get("step", 0) + 1, f"{job.stop} of {job.steps}"
    reference = "with" if loss.needs_reference else "without"
    return (
        f"{options.loss}: {loss.formula}   [{loss.source}]\n"
        f"  log-probs as {loss.uses} over an answer's tokens{own}, {reference} a reference\n"
        f"  {options.init}: {total:,} parameters, {trained:,} of them trained, {options.dtype} "
        f"products on {options.device}{processes}\n"
        f"  {rows}, {len(job.held_out)} held out; steps {first} to {steps}, "
        f"{prompts_per_step(options)} {unit} each; lr {options.lr:g}, {options.schedule}, seed "
        f"{options.seed}"
    )


# --- Log-probs under the reference ----------------------------------------------------------------


def logps_of(job: Job, pairs: Pairs) -> Tensor:
    """Log-probs of pairs under job.model (pairs, 2), in nats, by the code path of training."""
    dtype, world = getattr(torch, job.options.dtype), job.world
    logps = world.sum(pair_logps(job.model, pairs, *job.layout[:2], dtype, world.batches))
    world.reshard(job.model)
    return logps


def first_progress(job: Job) -> Progress:
    """The state at step 0: log-probs of training and held-out pairs under the initial weights."""
    ref_logps = ref_mismatched = None
    if LOSSES[job.options.loss].needs_reference and not job.questions:
        ref_logps = reference_logps(job, job.pairs)
    if job.mismatched:
        ref_mismatched = reference_logps(job, job.mismatched)
    return Progress(0, 0, ref_logps, ref_mismatched, logps_of(job, job.held_out), {})


def hash_pairs(pairs: Pairs) -> str:
    return digest(pairs.ids.tobytes(), pairs.ends.tobytes())


def reference_logps(job: Job, pairs: Pairs) -> Tensor:
    """Log-probs of training pairs under the initial weights (pairs, 2), in nats. The cache's key
    holds weights, token ids and precision. Nothing else of the reference stays in memory."""
    options, cached = job.options, None
    weights = job.inputs["init"], job.inputs["init_adapter"]
    key = digest(*weights, hash_pairs(pairs), options.dtype)
    file = Path(options.out).parent / "cache" / f"reference-{key[:16]}.safetensors"
    if file.is_file():
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            logps, stored = tensors.get_tensor("logps"), (tensors.metadata() or {}).get("key")
            cached = logps if stored == digest(key, logps.numpy().tobytes()) else None
    if job.world.cat([torch.tensor([cached is not None])]).all():
        print(f"reference log-probs: found in {file}")
        return cached
    with stage("reference log-probs: the initial weights on the training pairs") as notes:
        logps = logps_of(job, pairs)
        if not logps.isfinite().all():
            raise TrainingError(f"{options.init}: its log-probs are not finite; check its weights")
        if job.world.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"logps": logps}, key=digest(key, logps.numpy().tobytes()))
        notes.append(f"in {file}")
    return logps
