"""The job of a run: everything that training reads, loaded and checked before any file is written.
This module imports the core files except train.py, which imports this module."""

import contextlib
import copy
import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data import Batch, Pairs, load_pairs, make_batches, needs_fixed_length, split_pairs, truncate
from eval import pair_logps
from mio import find_loss
from model import Llama
from support import hub, lora, on_policy, run_folder, run_options, weights
from support.cli import stage, wrapped
from support.files import digest, locked, read_json
from support.trained_run import load_checkpoint


class TrainingError(Exception):
    """Training cannot go on; the message says why and names the remedy."""


class Job(NamedTuple):
    """Everything that training reads."""

    options: object  # train.Options
    model: Llama
    tokenizer: object
    pairs: Pairs  # training pairs; empty if the policy draws the answers
    held_out: Pairs
    inputs: dict[str, str]  # hashes of the files that the run started from
    checkpoint: Path | None  # the checkpoint from which the run resumes, if any
    record: dict  # the checkpoint's training.json; {} for a new run
    mismatched: Pairs | None = None  # the prompts of `pairs` with the answers of other rows (kto)
    questions: list | None = None  # the questions to which the policy draws answers
    reference: Llama | None = None  # kept in memory only if the policy draws answers

    @property
    def per_epoch(self) -> int:
        prompts = len(self.questions or self.pairs)
        return math.ceil(prompts / on_policy.prompts_per_step(self.options))

    @property
    def steps(self) -> int:
        """Returns the number of steps in all epochs, which the learning-rate schedule spans."""
        return self.options.epochs * self.per_epoch

    @property
    def stop(self) -> int:
        """Returns the last step of this run: `steps`, or --max_steps if this is smaller."""
        limit = self.options.max_steps
        return self.steps if limit is None else min(self.steps, limit)

    def batches(self, pairs: Pairs, index: list[int]) -> list[Batch]:
        """Packs pairs[i] for i in index into the batches of a step."""
        layout = self.options.row_tokens, self.options.micro_tokens, needs_fixed_length(self.model)
        return make_batches(pairs, index, *layout)

    def check_room(self, saves: int) -> None:
        """Raises ValueError if --out or the cache beside it cannot be written, or if the disk lacks
        room for --keep of `saves` checkpoints and for the final model or one more checkpoint."""
        out, keep, tensors = Path(self.options.out), self.options.keep, [*self.model.parameters()]
        cached = find_loss(self.options.loss).needs_reference and not self.checkpoint
        for path in (out.parent / "cache", out) if cached else (out,):
            folder = next(p for p in (path / "x").absolute().parents if p.is_dir())
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(f"--out {out}: cannot write to {folder}; change --out")
        final = sum(p.nbytes for p in tensors)
        checkpoint = 3 * sum(p.nbytes for p in tensors if p.requires_grad)  # and two moments
        needed = min(saves, keep) * checkpoint + max(final, checkpoint * (saves > keep))
        replaced = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        room = shutil.disk_usage(folder).free + replaced
        if needed > room and self.record.get("step") != self.stop:
            problem = f"the run needs {needed / 1e9:.3g} GB of disk, but has {room / 1e9:.3g} GB"
            raise ValueError(f"--out {out}: {problem}; free some, lower --keep or change --out")


def load_job(options) -> Job:
    """Loads and checks a job. OSError and ValueError name the file or flag, and a remedy."""
    checkpoint = run_folder.newest_checkpoint(Path(options.out)) if options.resume else None
    record = read_json(checkpoint / "training.json") if checkpoint else {}
    model, tokenizer, reference = load_models(options, checkpoint)
    loss, pairs, held_out = find_loss(options.loss), Pairs(), Pairs()
    questions = mismatched = None
    if options.eval_data:
        held_out = load_pairs(options.eval_data, tokenizer, options.max_length, options.columns)
    if on_policy.is_on_policy(options):
        questions = on_policy.load_questions(options, model, tokenizer)
    else:
        pairs = load_pairs(options.data, tokenizer, options.max_length, options.columns)
        if not options.eval_data:
            pairs, held_out = split_pairs(pairs, options.eval_fraction, options.split_seed)
        check_answers(pairs, loss.answers, options.data, options.loss)
        check_answers(held_out, loss.answers, options.eval_data or options.data, options.loss)
    if options.beta is None:  # --average_logps without --beta
        answers = pairs.lengths()[:, 1:]
        tokens, beta = answers[answers > 0].mean(), run_options.default_beta(loss, options.init)
        options = dataclasses.replace(options, beta=float(beta * tokens))
        print(f"--average_logps: beta is {beta:g} times {tokens:.1f}, the mean tokens of an answer")
    lengths = np.concatenate([pairs.lengths(), held_out.lengths()])  # (all pairs, 3)
    longest = int(max(lengths[:, 0] + lengths[:, 1:].max(axis=1), default=0))
    if longest > (context := model.config.max_position_embeddings):
        raise ValueError(f"--max_length: a pair exceeds the model's context; lower it to {context}")
    if loss.shared_of_mismatched:
        mismatched = mismatched_pairs(pairs, longest, tokenizer.bos_id)
    inputs = record.get("inputs", {}) | {
        "data": digest(questions) if questions else hash_pairs(pairs),
        "eval_data": hash_pairs(held_out),
    }
    # A resumed run reads the initial weights only if they are frozen, replaced, or the reference.
    if not record or reference or options.lora_rank or options.init != record["options"]["init"]:
        inputs["init"] = weights.hash_model(hub.find(options.init))
    job = Job(options, model, tokenizer, pairs, held_out, inputs, checkpoint, record, mismatched,
              questions, reference)  # fmt: skip
    every = options.eval_every or max(1, math.ceil(job.steps / 10))
    job = job._replace(options=dataclasses.replace(options, eval_every=every))
    if record:
        run_folder.check_resumed(job)
    return job


def load_models(options, checkpoint: Path | None):
    """Loads policy, tokenizer, and the reference, which is None unless the policy draws answers."""
    device, drawn, reference = options.device, on_policy.is_on_policy(options), None
    kwargs = {"dtype": torch.float32, "values": options.chat_template_kwargs or "{}"}
    if options.lora_rank:
        model, tokenizer = load_checkpoint(options.init, "cpu", **kwargs)
        torch.manual_seed(options.seed)
        lora.add_lora(model, lora.config_of(options), getattr(torch, options.dtype))
        model.to(device)  # after the conversion of weights to --dtype, which saves memory
        if drawn:  # the reference shares the frozen weights
            frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
            reference = copy.deepcopy(model, frozen)
        if checkpoint:
            lora.load_adapter(model, checkpoint)
    else:
        kwargs["dtype"] = dtype = getattr(torch, options.weights)
        model, tokenizer = load_checkpoint(checkpoint or options.init, device, **kwargs)
        if drawn:
            reference = Llama.from_pretrained(options.init, dtype, device)
    model.checkpointing = options.checkpointing == "on"
    for each in filter(None, (model, reference)):
        each.float32 = options.dtype == "float32"
    if options.compile == "on" or (options.compile == "auto" and options.device != "cpu"):
        model.compile_blocks()
    return model, tokenizer, reference


def mismatched_pairs(pairs: Pairs, max_length: int, bos_id: int | None) -> Pairs:
    """Combines each prompt with the answers to the next different prompt, for K in kto (mio.py)."""
    mismatched = Pairs()
    for i, pair in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next((other for other in others if other.prompt != pair.prompt), pair)
        mixed = other._replace(prompt=pair.prompt)
        mismatched.append(truncate(mixed, max_length, bos_id), pairs.lines[i])
    return mismatched


def check_answers(pairs: Pairs, needed: str, path, loss: str) -> None:
    """Raises ValueError for the first row without the answers that a loss needs (Loss.answers)."""
    answers = "a chosen and a rejected answer" if needed == "both" else "a chosen answer"
    for line, (_, chosen, rejected) in zip(pairs.lines, pairs.lengths()):
        if (needed != "any" and not chosen) or (needed == "both" and not rejected):
            raise ValueError(f"{path}:{line}: --loss {loss} needs {answers} in each row")


def describe(job: Job) -> str:
    """Returns a summary of the run to print before training, which shows a wrong flag early."""
    options, loss = job.options, find_loss(job.options.loss)
    used = loss.flags - {"average_logps"}
    arguments = [f", {n} {x:g}" for n, x in loss.arguments(options).items() if n in used]
    total = sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    rows, unit = f"{len(job.pairs)} pairs", "pairs"
    if job.questions:
        rows, unit = f"{len(job.questions)} questions, {options.samples} answers to each", "prompts"
    lines = [
        f"{options.loss}: {loss.function.__doc__}   [{loss.source}]",
        f"  log-probs as {'means' if options.average_logps else loss.uses} over an answer's tokens"
        f"{''.join(arguments)}, {'with' if loss.needs_reference else 'without'} a reference",
        f"  {hub.named(options.init)}: {total:,} parameters, {trained:,} of them trained, "
        f"{options.weights} weights, {options.dtype} products on {options.device}",
        f"  {rows}, {len(job.held_out)} held out; steps {job.record.get('step', 0) + 1} to "
        f"{job.stop} of {job.steps}, {on_policy.prompts_per_step(options)} {unit} each; lr "
        f"{options.lr:g}, {options.schedule}, seed {options.seed}",
    ]
    return "\n".join(map(wrapped, lines))


def logps_of(job: Job, pairs: Pairs) -> Tensor:
    """Returns log-probs of answers under job.model, (pairs, 2) in nats, computed as in training."""
    options, dtype = job.options, getattr(torch, job.options.dtype)
    return pair_logps(job.model, pairs, options.row_tokens, options.micro_tokens, dtype)


def first_progress(job: Job) -> run_folder.Progress:
    """Computes the state at step 0, with the log-probs of pairs under the initial weights."""
    compared = job.pairs if find_loss(job.options.loss).needs_reference else None
    refs = [reference_logps(job, pairs) if pairs else None for pairs in (compared, job.mismatched)]
    return run_folder.Progress(0, 0, *refs, logps_of(job, job.held_out), {})


def hash_pairs(pairs: Pairs) -> str:
    return digest(pairs.ids.tobytes(), pairs.ends.tobytes())


def reference_logps(job: Job, pairs: Pairs) -> Tensor:
    """Returns the log-probs of training pairs under the initial weights: (pairs, 2) in nats. A
    folder whose name contains a hash of weights, token ids and precision caches the log-probs."""
    options = job.options
    key = digest(job.inputs["init"], hash_pairs(pairs), options.dtype, options.weights)
    folder = Path(options.out).parent / "cache" / f"reference-{key[:16]}"
    file = folder / "logps.safetensors"
    with locked(folder, "waiting for another run that computes these log-probs"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
            logps, stored = tensors.get_tensor("logps"), (tensors.metadata() or {}).get("key")
            if stored == digest(key, logps.numpy().tobytes()):
                print(f"reference log-probs: found in {file}")
                return logps
        with stage("reference log-probs: the initial weights on the training pairs") as notes:
            logps = logps_of(job, pairs)
            if not logps.isfinite().all():
                raise TrainingError(f"{options.init}: log-probs are not finite; check the weights")
            weights.save_tensors(file, {"logps": logps}, key=digest(key, logps.numpy().tobytes()))
            notes.append(f"cached in {file}")
    return logps
