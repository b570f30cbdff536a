"""Preference optimization of a language model from pairs of answers.

    python train.py --loss mio                              the demonstration
    python train.py --loss mio --init FOLDER --data FILE    your model and pairs
    python train.py --loss mio,dpo --seed 0,1,2 --jobs 2    a grid, compared
    python train.py --resume --out out/mio                  continue a run

rows -> pairs -> packed batch -> hidden states (N, D) -> log-probs (2B,)
     -> losses (B,) -> AdamW

A run has five stages: base model, pairs, reference log-probs, training,
evaluation. Only the demonstration creates its base model and its pairs;
other runs read them from --init and --data.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

import eval as evaluation
from data import LAYOUT, StepData, answer_states, autocast, epoch_order, row_length
from mio import OPTION_BOUNDS, Answers, find_loss, fused_pair_loss, pair_loss
from model import Llama
from support import builtin_task, lora, run_folder
from support.bfloat16 import StochasticAdamW
from support.cli import DataOptions, option, stage
from support.figures import table
from support.files import locked, write_json
from support.grid import find_grid, run_grid
from support.job import Job, TrainingError, describe, first_progress, load_job, logps_of
from support.on_policy import draw_pairs, is_on_policy, is_rlhf, prompts_per_step
from support.outcome import outcome, what_happened
from support.plan import GPUS, PRESETS, plan
from support.run_folder import MAY_CHANGE, Progress
from support.run_options import make_options, options_of_losses, read_flags


# fmt: off
@dataclasses.dataclass(frozen=True)
class RunOptions(DataOptions):
    """Each field is a flag. None means "not set", unless support/run_options.py has a default."""

    loss: str = option("mio", "objective; --loss help lists all losses")
    beta: float | None = option(None, "scale of the implicit reward", above=0, most=1e6)
    average_logps: bool = option(False, "average log-probs over tokens where the loss uses sums")
    init: str | None = option(None, "initial policy and reference: a folder or ORGANISATION/NAME")
    data: str | None = option(None, "JSONL or Parquet file of preference pairs to train on")
    eval_data: str | None = option(None, "JSONL or Parquet file of held-out preference pairs")
    eval_fraction: float = option(0.1, "share of the pairs to hold out if --eval_data is not given",
                                  least=0, most=0.9)
    out: str | None = option(None, "folder for the run's files")
    epochs: int | None = option(None, "number of passes over the pairs or questions", least=1)
    max_steps: int | None = option(None, "stop at this step; the schedule stays the same", least=0)
    batch_size: int | None = option(None, "number of pairs in each optimizer step", least=1)
    on_policy: bool = option(False, "sample pairs from the policy; --data then holds questions")
    samples: int = option(8, "answers that the policy samples per prompt", least=2, most=1024)
    max_new_tokens: int | None = option(None, "maximum tokens in a sampled answer", least=1)
    max_length: int | None = option(None, "maximum tokens in prompt plus longer answer", least=2)
    row_tokens: int = option(LAYOUT[0], "maximum number of tokens in a row of pairs", least=1)
    micro_tokens: int = option(LAYOUT[1], "maximum number of tokens in a forward pass", least=1)
    lora_rank: int | None = option(None, "train only LoRA adapters, with this rank", least=1)
    lora_alpha: float | None = option(None, "alpha in the scale alpha / rank", above=0, most=1e6)
    lora_targets: str | None = option(None, "modules to adapt: all, attention or q_proj,v_proj,...")
    lora_rslora: bool = option(False, "scale adapters by alpha / sqrt(rank), not alpha / rank")
    lr: float | None = option(None, "peak learning rate; 10 times this default with LoRA", above=0)
    warmup: float = option(0.1, "share of the steps with a rising learning rate", least=0, most=1)
    schedule: str = option("cosine", "learning-rate schedule after the warmup",
                           choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.0, "AdamW's weight decay, for matrices only", least=0)
    grad_clip: float = option(1.0, "clip the gradient to this norm; 0 for no limit", least=0)
    seed: int = option(0, "seed of the data order, of samples and of the demonstration", least=0)
    split_seed: int = option(0, "seed of the choice of held-out pairs (--eval_fraction)", least=0)
    dtype: str = option("float32", "precision of matrix products", choices=("float32", "bfloat16"))
    weights: str = option("float32", "precision of stored weights, gradients and moments; bfloat16 "
                          "rounds updates stochastically and changes the default of --dtype",
                          choices=("float32", "bfloat16"))
    compile: str = option("auto", "compile the transformer blocks; auto compiles on a GPU",
                          choices=("auto", "on", "off"))
    checkpointing: str = option("off", "save memory by recomputing blocks", choices=("off", "on"))
    eval_every: int | None = option(None, "steps between evaluations", least=1)
    log_every: int = option(1, "steps between rows of metrics.jsonl", least=1)
    save_every: int | None = option(None, "steps between checkpoints", least=1)
    keep: int = option(2, "number of checkpoints to keep", least=1)
    jobs: int | None = option(None, "runs of a grid at a time, which share the CPU (default: 1)",
                              least=1)
    resume: bool = option(False, "continue from the newest checkpoint in --out; these flags may "
                          f"change: --{', --'.join(MAY_CHANGE)}")
    overwrite: bool = option(False, "replace the run in --out")
    device: str = option("auto", "cpu, cuda, cuda:N, or auto for a GPU if there is one")
    plan: str | None = option(None, "predict the memory for --init or a preset, then exit",
                              const="init", choices=("init", *PRESETS))
    gpu: str | None = option(None, "GPU that --plan assumes", choices=tuple(GPUS))
    config: str | None = option(None, "JSON file of options, such as a train_config.json")


# The options of individual losses are also flags.
Options = dataclasses.make_dataclass("Options", [
    (name, float | None, option(None, f"option of --loss {' or '.join(losses)}; see --loss help",
     **dict(zip(("least", "most"), OPTION_BOUNDS.get(name, ())))))
    for name, losses in options_of_losses().items()
], bases=(RunOptions,), frozen=True)
# fmt: on


# --- The training step ----------------------------------------------------------------------------


def train_step(
    model: Llama, optimizer: torch.optim.Optimizer, data: StepData, options: Options,
    check: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Makes one optimizer step on the pairs of `data`. check(losses, logps) runs before the update.

    Returns the pairs' losses (B,) and log-probs (B, 2), and the gradient's norm before clipping. If
    a loss or the gradient is not finite, no weight changes."""
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
    losses, logps, loss_arguments = [], [], find_loss(options.loss).arguments(options)
    if not find_loss(options.loss).pairwise:
        loss_arguments["shared"] = shared_term(model, data, options)
    for batch in data.batches:
        batch = batch.with_values(data.ref_logps, data.advantages).to(device)  # b pairs
        with autocast(device, dtype):
            hidden = answer_states(model, batch)  # (N, D)
            loss, logp = fused_pair_loss(
                hidden, model.head_weight, batch.targets, batch.lengths, batch.ref_logps,
                options.loss, advantages=batch.advantages, counts=batch.counts,
                compiled=model.compiled, **loss_arguments,
            )  # (b,), (2b,)  # fmt: skip
        loss.sum().backward()
        losses.append(loss.detach())
        logps.append(logp.view(-1, 2))  # (b, 2)
    losses, logps = torch.cat(losses), torch.cat(logps).float()  # (B,), (B, 2)
    if check:
        check(losses, logps)
    B = len(losses)
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    norms = [vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    grad_norm = vector_norm(torch.stack(norms)) / B  # gradient of the mean loss over all pairs
    # The optimizer divides gradients by grad_scale and skips the update where found_inf is 1.
    excess = (grad_norm.float() + 1e-6) / (options.grad_clip or torch.inf)
    optimizer.grad_scale = B * excess.clamp(min=1)
    optimizer.found_inf = 1 - (losses.isfinite().all() & grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return losses, logps, grad_norm


def shared_term(model: Llama, data: StepData, options: Options) -> Tensor:
    """Computes the scalar () that couples the pairs of a step in dv and kto, without gradient."""
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
    batches, ref_logps = data.mismatched or (data.batches, data.ref_logps)
    batches = [batch.with_values(ref_logps).to(device) for batch in batches]
    logps = [evaluation.batch_logps(model, batch, dtype) for batch in batches]  # (2b,) each
    ref, lengths = ([getattr(b, name) for b in batches] for name in ("ref_logps", "lengths"))
    terms = [torch.cat(parts) for parts in (logps, ref, lengths)]  # (2B,) each
    sides = [Answers(*(x[side::2] for x in terms), options.beta) for side in (0, 1)]
    sides = [side.averaged() for side in sides] if options.average_logps else sides
    return find_loss(options.loss).shared(*sides)


def make_optimizer(model: Llama, options: Options) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, norms = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    adamw = functools.partial(torch.optim.AdamW, fused=True)
    if options.weights == "bfloat16":
        adamw = functools.partial(StochasticAdamW, seed=options.seed, compiled=model.compiled)
    return adamw(groups, options.lr, weight_decay=options.weight_decay)


def learning_rate(options: Options, step: int, steps: int) -> float:
    """Returns the learning rate of a step >= 1. It rises linearly, then follows the schedule."""
    warmup = math.ceil(options.warmup * steps)
    if step <= warmup:
        return options.lr * step / warmup
    done = (step - warmup - 1) / (steps - warmup)  # in [0, 1)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.lr * decay[options.schedule]


# --- The loop -------------------------------------------------------------------------------------
# A Job (support/job.py) holds all that training reads: options, model, tokenizer, pairs, held_out.
# Progress (support/run_folder.py) is what a checkpoint restores: step, num_tokens, AdamW's moments,
# ref_logps (training pairs under the reference) and start_logps (held-out pairs at step 0).

# Metrics that the progress bar shows -> their labels.
BAR = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy",
       "reward": "reward", "cut": "cut off"}  # fmt: skip


def train(job: Job, progress: Progress, signals: list[int]) -> tuple[Tensor, dict]:
    """Trains job.model in place from `progress` on, and stops early after a signal. Returns the
    held-out log-probs (pairs, 2) of the last evaluation and the metrics of the last step."""
    options, model, tokens = job.options, job.model, progress.num_tokens
    optimizer = make_optimizer(model, options)
    run_folder.restore_moments(model, optimizer, progress.moments)
    remaining = range(progress.step + 1, job.stop + 1)
    with run_folder.metrics_log(options) as (row, log):
        held_out_logps = logps_of(job, job.held_out) if not remaining else progress.start_logps
        if progress.step == 0 or not remaining:  # the start, or a resumed run that is at its end
            row |= {"step": progress.step, "epoch": progress.step / job.per_epoch}
            row |= held_out_metrics(job, held_out_logps, progress.start_logps)
        if progress.step == 0:
            log(row)
        unchecked, clock, clock_tokens = [], time.perf_counter(), tokens
        bar = tqdm(remaining, options.loss, job.stop, leave=False, disable=None, unit="step",
                   initial=progress.step)  # fmt: skip
        for step in bar:
            data = step_data(job, progress, step)
            lr = learning_rate(options, step, job.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            check = functools.partial(check_first_step, options, data) if step == 1 else None
            losses, logps, grad_norm = torch.zeros(0), torch.zeros(0, 2), torch.zeros(())
            if data.index:  # empty if the drawn answers to each prompt are all right or all wrong
                losses, logps, grad_norm = train_step(model, optimizer, data, options, check)
            tokens += sum(row_length(data.pairs[i]) for i in data.index)
            unchecked.append((step, data, losses, grad_norm))
            # Which steps are logged does not depend on where a run stops, so resuming is exact.
            evaluate = step % options.eval_every == 0 or step == job.steps
            is_last = step == job.stop
            is_logged = evaluate or step % options.log_every == 0
            stopped = bool(signals)
            save = stopped or saves(job, step)
            if not (is_logged or save or is_last):
                continue  # does not read the losses, because the CPU would wait for the GPU
            for each in unchecked:
                check_finite(job, *each)
            seconds = time.perf_counter() - clock
            row = {"step": step, "epoch": step / job.per_epoch, "num_tokens": tokens}
            row |= {"learning_rate": lr, "step_seconds": seconds / len(unchecked)}
            row |= {"tokens_per_second": (tokens - clock_tokens) / seconds}
            row |= training_metrics(job, data, losses, logps.cpu(), grad_norm)
            bar.set_postfix({label: f"{row[x]:.3g}" for x, label in BAR.items() if x in row})
            held_out = {}
            if evaluate or is_last:
                held_out_logps = logps_of(job, job.held_out)
                held_out = held_out_metrics(job, held_out_logps, progress.start_logps)
            if is_logged:
                log(row | held_out if evaluate else row)
            row |= held_out
            if save:
                check_weights(job, step)
                now = progress._replace(step=step, num_tokens=tokens)
                run_folder.save_checkpoint(job, optimizer, now)
            if stopped:
                break
            unchecked, clock, clock_tokens = [], time.perf_counter(), tokens
    check_weights(job, row["step"])
    return held_out_logps, row


def saves(job: Job, step: int) -> bool:
    """Tells whether a run saves a checkpoint after a step. Without --save_every it does so only if
    --max_steps ends the run early or if, as in the demonstration, a longer evaluation follows."""
    every, is_last = job.options.save_every, step == job.stop
    goes_on = job.stop < job.steps or builtin_task.is_demonstration(job.options.init)
    return bool(every and step % every == 0) or (is_last and bool(every or goes_on))


def step_data(job: Job, progress: Progress, step: int) -> StepData:
    """Returns a step's data. Rows depend on seed and step, drawn answers also on the weights."""
    epoch, place = divmod(step - 1, job.per_epoch)
    size = prompts_per_step(job.options)
    numbers = epoch_order(len(job.questions or job.pairs), job.options.seed, epoch).tolist()
    numbers = numbers[place * size : (place + 1) * size]
    data = StepData([], progress.ref_logps, pairs=job.pairs)
    if job.questions:
        data = draw_pairs(job, step, numbers)
        numbers = list(range(len(data.pairs)))
    if job.mismatched:
        batches = job.batches(job.mismatched, numbers)
        data = data._replace(mismatched=(batches, progress.ref_mismatched))
    batches = job.batches(data.pairs, numbers)
    return data._replace(batches=batches, index=[i for batch in batches for i in batch.index])


# --- Checks and metrics ---------------------------------------------------------------------------


def check_first_step(options: Options, data: StepData, losses: Tensor, logps: Tensor) -> None:
    """Raises TrainingError unless, before the first update, all rewards are 0 and the loss has its
    known value. This detects a reference with other weights, precision or packing."""
    if data.ref_logps is None or data.advantages is not None or not losses.isfinite().all():
        return  # check_finite reports losses that are not finite
    ref = data.ref_logps[data.index]
    drift = (logps.cpu() - ref).abs().max().item()
    # Rounding differs between packings, and grows with the length of a sum.
    allowed = (1e-4 if options.dtype == "float32" else 5e-3) * (1 + ref.abs().max())
    objective, loss = find_loss(options.loss), mean(losses)
    known = objective.loss_at_reference(**objective.arguments(options))
    if math.isnan(known):  # the value depends on the answers: that of the reference itself
        known = loss_of(options, ref, ref, data.pairs.lengths()[data.index])
    # The drift may explain a difference: slopes are about beta or, for ipo and sppo, 1 / beta.
    error = abs(loss - known) - 10 * max(options.beta, 1 / options.beta) * drift
    if not (drift <= allowed and error <= 1e-5 * (1 + abs(known))):
        found = f"policy and reference differ by {drift:.2g} nats, the loss is {loss:.6f}"
        remedy = "remove the cache folder next to --out and start again"
        raise TrainingError(f"step 0: {found}, but it should be {known:.6f}; {remedy}")
    tqdm.write(f"  step 0: rewards 0 within {drift * options.beta:.1e}, loss {loss:.6f}")


def loss_of(options: Options, logps: Tensor, ref_logps: Tensor, lengths: np.ndarray) -> float:
    """Returns the mean loss of pairs. logps, ref_logps: (pairs, 2); lengths: (pairs, 3)."""
    sums = *logps.unbind(dim=1), *ref_logps.unbind(dim=1)  # four tensors (pairs,)
    _, chosen, rejected = torch.from_numpy(lengths).unbind(dim=1)
    arguments = find_loss(options.loss).arguments(options)
    arguments |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
    return mean(pair_loss(options.loss, *sums, **arguments))


def check_finite(job: Job, step: int, data: StepData, losses: Tensor, grad_norm: Tensor) -> None:
    """Raises a TrainingError that names lines of --data if a loss or the gradient of a step is not
    finite. Such a step has changed no weight."""
    finite = losses.isfinite().tolist()
    if not (all(finite) and grad_norm.isfinite()):
        rows = [i for i, fine in zip(data.index, finite) if not fine] or data.index
        lines = ", ".join(str(data.pairs.lines[i]) for i in rows[:8])
        problem = f"the loss or the gradient is not finite for line {lines} of {job.options.data}"
        raise TrainingError(f"step {step}: {problem}; try a lower --lr")


def check_weights(job: Job, step: int) -> None:
    if not all(p.isfinite().all() for p in job.model.parameters()):
        raise TrainingError(f"step {step}: the weights are not finite; try a lower --lr")


def mean(values: Tensor) -> float:
    return values.double().mean().item()


def training_metrics(job: Job, data: StepData, losses, logps, grad_norm) -> dict[str, float]:
    """Returns the metrics of a step: means over its pairs, without missing answers. For rlhf, whose
    answers are neither chosen nor rejected, preference metrics are left out."""
    metrics = {"loss": mean(losses), "grad_norm": float(grad_norm)} | data.metrics
    if data.advantages is not None:
        return metrics
    lengths = torch.from_numpy(data.pairs.lengths()[data.index, 1:])  # (B, 2)
    logps = torch.where(lengths > 0, logps, torch.nan)
    ref = None if data.ref_logps is None else data.ref_logps[data.index]
    scale = evaluation.reward_scale(lengths, **vars(job.options))
    values = evaluation.preference_values(logps, ref, scale)
    return metrics | {name: mean(value[~value.isnan()]) for name, value in values.items()}


def held_out_metrics(job: Job, logps: Tensor, start_logps: Tensor) -> dict[str, float]:
    """Returns metrics of held-out pairs from their log-probs now and at step 0, (pairs, 2) each.
    The loss is NaN for kto, which needs mismatched pairs, and for rlhf, which needs advantages."""
    if not job.held_out:
        return {}
    options, metrics = job.options, {"loss": math.nan}
    lengths = torch.from_numpy(job.held_out.lengths()[:, 1:])  # (pairs, 2)
    if not job.mismatched and not is_rlhf(options):
        metrics["loss"] = loss_of(options, logps, start_logps, job.held_out.lengths())
    logps = torch.where(lengths > 0, logps, torch.nan)
    scale = evaluation.reward_scale(lengths, **vars(options))
    metrics |= evaluation.preference_metrics(logps, start_logps, scale)
    return {f"eval_{name}": value for name, value in metrics.items()}


# --- The whole run --------------------------------------------------------------------------------


def finish(job: Job, start_logps: Tensor, logps: Tensor, row: dict, started: float) -> None:
    """Writes the trained model and summary.json, and prints a table of results. start_logps, logps:
    the held-out pairs' log-probs at step 0 and now, (pairs, 2). row: metrics of the last step."""
    options, folder = job.options, Path(job.options.out)
    if options.lora_rank:
        lora.save_adapter(job.model, folder / "adapter", options.init)
        pairs = (job.held_out or job.pairs)[:2]
        unmerged = logps_of(job, pairs)
        lora.merge_lora(job.model, getattr(torch, options.dtype))
        merged = logps_of(job, pairs)
        change = max((merged - unmerged).abs().flatten().tolist(), default=0.0)
        print(f"  adapter merged in {options.dtype}: log-probs change by at most {change:.1e} nats")
    job.model.save_pretrained(folder)
    job.tokenizer.save(folder)
    rows = outcome(job, start_logps, logps)
    printed = {name: {k: f._asdict() for k, f in row.items()} for name, row in rows.items()}
    metrics = json.loads(run_folder.strict_json({"seconds": time.perf_counter() - started, **row}))
    write_json(folder / "summary.json", {"init": options.init, **metrics, "table": printed})
    if job.held_out:
        print(table(rows))
    if "base" in rows and sys.stdout.isatty():
        print(what_happened(job))


def main(argv: list[str] | None = None) -> Path:
    """Runs the command and returns the run folder. Bad input ends the process with status 2."""
    with contextlib.ExitStack() as stack:
        parser, flags = read_flags(argv, Options, __doc__)
        try:
            if grid := find_grid(flags, Options):
                return run_grid(grid, Options)
            options = make_options(flags, Options)
            folder, started = Path(options.out), time.perf_counter()
            if options.plan:
                print(plan(options))
                parser.exit()
            # Base model and pairs
            base = options.init or builtin_task.base_folder(options)
            sources = base, options.data, options.eval_data
            run_folder.check_out(options, sources)
            if not options.init:
                if options.lora_rank:  # finds a wrong rank or target before the base is trained
                    with torch.device("meta"):
                        lora.add_lora(Llama(builtin_task.BASE_MODEL), lora.config_of(options))
                drawn = is_on_policy(options)
                options = builtin_task.prepare(options, drawn, make_optimizer, train_step)
            job = load_job(options)
            job.check_room(sum(saves(job, step) for step in range(1, job.stop + 1)))
            stack.enter_context(locked(folder))
            run_folder.check_out(options, sources)
        except (OSError, ValueError) as error:
            parser.error(error)
        print(describe(job), flush=True)
        try:
            # Reference log-probs
            progress = run_folder.load_progress(job) if job.checkpoint else first_progress(job)
            run_folder.begin(job.options, job.record)
            # Training
            signals = stack.enter_context(run_folder.catch_signals())
            with stage(f"training: {options.loss}") as notes:
                logps, row = train(job, progress, signals)
                notes.append(f"metrics.jsonl in {folder}")
            # Evaluation
            if row["step"] == job.stop:
                finish(job, progress.start_logps, logps, row, started)
                return folder
        except OSError as error:
            saved = run_folder.newest_checkpoint(folder)
            remedy = f"; {saved} is complete, so --resume continues from it" if saved else ""
            parser.error(f"{error}{remedy}")
        except TrainingError as error:
            parser.error(error)
        command = f"python train.py --resume --out {folder}"
        parser.exit(128 + signals[0], f"step {row['step']} is saved; {command} resumes it\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the console may lack some characters, such as ±
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
