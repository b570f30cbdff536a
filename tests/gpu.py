"""Everything that needs a GPU, in one command: python tests/gpu.py [CHECK ...] [--device cpu]

    right       losses, log-probs and gradients against float64 on the CPU
    generation  greedy answers against those of transformers
    resume      a run that is killed and resumed against one that is not
    waits       steps that neither wait for the device nor recompile
    head        the fused head against its three matrix products
    speed       steps of a model of 1B parameters against TRL's
    large       a step of 8B parameters with --weights bfloat16 against --plan

Prints a row of a Markdown table for each measurement, as soon as it is known. A check that fails is
a row, too, and the checks after it go on. The exit status is 1 if a bar is missed. If a command may
take only some minutes, run "right generation resume waits head" and then "large speed". With
--device cpu the models are tiny and speeds have no bar: this tests the script, not the machine.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench import step_flops
from conftest import tiny_model
from runs import differences, make_inputs

import data
import eval as evaluation
import mio
import model as model_file
import train
from data import Pair, Pairs, StepData, autocast, make_batches, needs_fixed_length
from mio import LOSSES, find_loss, fused_pair_loss, naive_logps, pair_loss
from model import Llama, ModelConfig
from support import bfloat16
from support.bfloat16 import in_product_precision
from support.job import mismatched_pairs
from support.lora import LINEARS, LoraConfig, add_lora
from support.plan import PRESETS, cost_of_longest_pairs
from support.tokenizers import byte_tokenizer

COLUMNS = ("check", "measured", "bar", "")
SMALL = ModelConfig(512, 64, 128, 2, 4, 2, 16, initializer_range=0.1)


class Report:
    """Prints rows, and counts missed bars and checks that failed."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu, self.missed = device, device.type == "cuda", 0
        self.row(*COLUMNS)
        print("|---" * len(COLUMNS) + "|")

    def row(self, *cells: str) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    def add(self, check: str, measured: str, bar: str = "", holds: bool = True) -> None:
        self.missed += not holds
        self.row(check, measured, bar, ("holds" if holds else "MISSED") if bar else "")


def random_pairs(count: int, prompt: int, answer: int, vocabulary: int, spread=0.35) -> Pairs:
    """Pairs of random ids with log-normal lengths whose medians are `prompt` and `answer`."""
    random = np.random.default_rng(0)
    medians = np.log((prompt, answer, answer))
    lengths = random.lognormal(medians, spread, size=(count, 3)).astype(int) + 1
    return Pairs(
        Pair(*(random.integers(0, vocabulary, n).tolist() for n in row)) for row in lengths
    )


def prepared(model: Llama, options) -> Llama:
    """Sets what load_models sets by the options; the model has its weights and device already."""
    model.checkpointing, model.float32 = options.checkpointing == "on", options.dtype == "float32"
    if options.compile == "on":
        model.compile_blocks()
    return model


def batches_of(model: Llama, pairs: Pairs, options) -> list:
    layout = options.row_tokens, options.micro_tokens, needs_fixed_length(model)
    return make_batches(pairs, list(range(len(pairs))), *layout)


# --- Right ----------------------------------------------------------------------------------------

FEW = ["mio", "dv", "kto", "orpo", "rlhf"]  # losses of every kind
# Variants -> flags, changes of the architecture, losses. Each runs in float32 and in bfloat16, but
# compiled ones only in bfloat16, because each compilation takes many seconds.
VARIANTS = {
    "plain": ({}, {}, list(LOSSES)),
    "--weights bfloat16": ({"weights": "bfloat16"}, {}, list(LOSSES)),
    "tied": ({}, {"tie_word_embeddings": True, "qk_norm": True}, FEW),
    "checkpointing": ({"checkpointing": "on"}, {}, FEW),
    "LoRA": ({"lora_rank": 4}, {}, FEW),
    "window": ({}, {"sliding_window": 16}, FEW),
    "compiled, window": ({"compile": "on"}, {"sliding_window": 16}, FEW),
    "compiled, checkpointing": ({"compile": "on", "checkpointing": "on"}, {}, FEW),
    "compiled, LoRA": ({"compile": "on", "lora_rank": 4}, {"qk_norm": True}, FEW),
    "compiled, --weights bfloat16": ({"compile": "on", "weights": "bfloat16"}, {}, FEW),
}


def step_data(model: Llama, pairs: Pairs, options) -> StepData:
    """The data of a step, with made-up reference log-probs and advantages."""
    loss, count = find_loss(options.loss), len(pairs)
    ref = torch.linspace(-190, -150, 2 * count).view(count, 2)
    advantages = (
        torch.linspace(-1, 2, 2 * count).view(count, 2) if loss.answers == "drawn" else None
    )
    data = StepData(batches_of(model, pairs, options), ref, advantages, pairs=pairs)
    if loss.shared_of_mismatched:
        batches = batches_of(model, mismatched_pairs(pairs, 1000, None), options)
        data = data._replace(mismatched=(batches, ref - 1))
    return data


def results_of_step(model: Llama, pairs: Pairs, options) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (pairs, 2) and the gradient of the mean loss (parameters,), by train_step."""
    step, gradients = step_data(model, pairs, options), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(model, dataclasses.replace(options, lr=0.0))
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in trained))
    _, logps, _ = train.train_step(model, optimizer, step, options)
    order = torch.tensor([i for batch in step.batches for i in batch.index]).argsort()
    flat = torch.cat([g.flatten().double().cpu() for g in gradients])
    for p in trained:  # removes the hooks of StochasticAdamW
        p._backward_hooks = None
    return logps.double().cpu()[order], flat / len(pairs)


def naive_results(model: Llama, pairs: Pairs, options) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, each answer alone and with all of its logits. For kto, K is set to 0."""
    device, dtype = model.head_weight.device, getattr(torch, options.dtype)
    model.zero_grad()
    logps, lengths = [], torch.from_numpy(pairs.lengths())[:, 1:].to(device)
    for prompt, *answers in pairs:
        for answer in answers:
            tokens = torch.tensor([prompt + answer], device=device)
            with autocast(device, dtype):
                hidden = model(tokens[:, :-1])[0, len(prompt) - 1 :]
                head = in_product_precision(model.head_weight, hidden)
                target, length = tokens[0, len(prompt) :], torch.tensor([len(answer)])
                logps.append(naive_logps(hidden.to(head.dtype), head, target, length))
    logps = torch.cat(logps).view(-1, 2)
    step = step_data(model, pairs, options)
    ref = step.ref_logps.to(device, logps.dtype)
    loss, more = find_loss(options.loss), {}
    if loss.shared_of_mismatched:
        more["shared"] = torch.zeros((), device=device)
    if step.advantages is not None:
        more["advantages"] = step.advantages.to(device, logps.dtype).unbind(1)
    losses = pair_loss(
        options.loss, *logps.unbind(1), *ref.unbind(1), chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1], **loss.arguments(options), **more,
    )  # fmt: skip
    losses.mean().backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return logps.detach().double().cpu(), torch.cat(gradients)


def errors(found: tuple, exact: tuple) -> tuple[float, float]:
    """The largest error of a log-prob in nats, and the relative error of the gradient."""
    (logps, gradient), (exact_logps, exact_gradient) = found, exact
    off = (gradient - exact_gradient).norm() / exact_gradient.norm().clamp(min=1e-12)
    return (logps - exact_logps).abs().max().item(), off.item()


def check_right(report: Report, variants=tuple(VARIANTS), dtypes=("float32", "bfloat16")) -> None:
    """No error is larger than twice the largest naive error in the same precision."""
    pairs = random_pairs(6, 12, 20, SMALL.vocab_size)
    for name in variants:
        flags, changes, losses = VARIANTS[name]
        config = dataclasses.replace(SMALL, **changes)
        for dtype in dtypes[-1:] if "compile" in flags else dtypes:
            settings = {"beta": 0.1, "dtype": dtype, "grad_clip": 0.0, "lr": 1e-3}
            settings |= {"row_tokens": 128, "micro_tokens": 256} | flags
            compiles = compiled_as_on_a_gpu(report.device)
            with compiles if "compile" in flags else contextlib.nullcontext():
                worst, naive = worst_errors(config, settings, losses, pairs, report.device)
            report.add(
                f"{name}, {dtype}, {len(losses)} losses",
                f"log-probs {worst[0]:.1e} nats, gradient {worst[1]:.1e}",
                f"twice {naive[0]:.1e}, {naive[1]:.1e}",
                bool((worst <= 2 * naive + 1e-6).all()),
            )


def worst_errors(config, settings, losses, pairs, device) -> np.ndarray:
    """The largest `errors` over losses of a training step and of the naive code: (2, 2)."""
    options, worst = train.Options(**settings), np.zeros((2, 2))
    model = prepared(model_for(config, settings).to(device), options)
    eager = dataclasses.replace(options, compile="off", checkpointing="off")
    naive = prepared(model_for(config, settings).to(device), eager)
    exact = model_for(config, settings).double()
    for loss in losses:
        options = dataclasses.replace(options, loss=loss)
        plain = {"weights": "float32", "dtype": "float32", "compile": "off"}
        oracle = dataclasses.replace(options, **plain)
        cases = (results_of_step, model), (naive_results, naive)
        for row, (function, tested) in enumerate(cases):
            found = errors(function(tested, pairs, options), function(exact, pairs, oracle))
            worst[row] = np.maximum(worst[row], found)
    return worst


def model_for(config: ModelConfig, settings: dict) -> Llama:
    torch.manual_seed(0)
    model, weights = Llama(config), getattr(torch, settings.get("weights", "float32"))
    if settings.get("lora_rank"):
        add_lora(model, LoraConfig(4, 8.0, list(LINEARS)), getattr(torch, settings["dtype"]))
        for name, p in model.named_parameters():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(p, std=0.1)  # so that A has a gradient
        return model
    return model.to(weights)


# --- Generation and resuming ----------------------------------------------------------------------


def check_generation(report: Report) -> None:
    if not importlib.util.find_spec("transformers"):
        return report.add("generation", "left out: transformers is not installed")
    import transformers

    ours, random = tiny_model().to(report.device), np.random.default_rng(0)
    prompts = [random.integers(0, 256, n).tolist() for n in random.integers(1, 40, 24)]
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.to(report.device)
    answers, same = ours.generate(prompts, 32, temperature=0), 0
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt], device=report.device)
        mask = torch.ones_like(ids)
        kwargs = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": None, "pad_token_id": 0}
        found = theirs.generate(ids, attention_mask=mask, **kwargs)[0, len(prompt) :].tolist()
        same += found == answer
    measured = f"{same} of {len(prompts)} the same token for token"
    report.add("greedy answers, transformers", measured, "all", same == len(prompts))


def check_resume(report: Report, kinds=("float32", "bfloat16")) -> None:
    """Kills a run with SIGKILL after a checkpoint, resumes it, and compares it with a whole run."""
    for weights in kinds:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            init, file = make_inputs(Path(place))
            flags = ["--init", init, "--data", file, "--batch_size", 4, "--lr", 1e-3, "--epochs", 2]
            flags += ["--save_every", 2, "--keep", 99, "--weights", weights, "--compile", "off"]
            whole, killed = Path(place) / "whole", Path(place) / "killed"
            argv = [str(x) for x in (*flags, "--device", report.device, "--out")]
            train.main([*argv, str(whole)])
            command = [sys.executable, train.__file__, *argv, str(killed)]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while not (killed / "checkpoints" / "step-000002").is_dir():
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            train.main(["--resume", "--out", str(killed)])
            found = differences(whole, killed)
        measured = ", ".join(found) or "the same files to the bit"
        report.add(f"killed and resumed, {weights} weights", measured, "no difference", not found)


# --- Steps that do not wait -----------------------------------------------------------------------


def attention_for_cpu(q, k, v, block_mask, enable_gqa):
    """FlexAttention, which has no backward pass on a CPU, by a dense mask of the same rule."""
    place = torch.arange(q.shape[2], device=q.device)
    mask = block_mask.mask_mod(0, 0, place[:, None], place[None])
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, mask, enable_gqa=enable_gqa)


@contextlib.contextmanager
def compiled_as_on_a_gpu(device: torch.device):
    """On a CPU: fixed lengths and BlockMasks as on a GPU, traced and guarded but not compiled."""
    caches = mio._compiled_residual_of_rows, data._compiled_block_mask, bfloat16._compiled
    [cache.cache_clear() for cache in caches]
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            real = torch.compile
            traced = lambda f=None, **how: real(f, **how | {"backend": "eager"})  # noqa: E731
            fixed = lambda model: model.compiled  # noqa: E731
            for where, name, value in (
                (torch, "compile", traced), (model_file, "flex_attention", attention_for_cpu),
                (data, "needs_fixed_length", fixed), (evaluation, "needs_fixed_length", fixed),
                (sys.modules[__name__], "needs_fixed_length", fixed),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(where, name, value))
        yield
    [cache.cache_clear() for cache in caches]
    torch._dynamo.reset()


@contextlib.contextmanager
def neither_waits_nor_recompiles(device: torch.device):
    """Raises an error at a wait for the device, or if a function was compiled again, in whatever
    thread: on a GPU the backward pass has its own."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    if compiled:
        raise RuntimeError(f"{compiled} functions were compiled again")


WAITS = {
    "mio": {}, "dv, checkpointing": {"checkpointing": "on", "dtype": "bfloat16"},
    "mio, --weights bfloat16": {"weights": "bfloat16", "dtype": "bfloat16"},
    "kto, LoRA": {"lora_rank": 4, "dtype": "bfloat16"},
}  # fmt: skip


def check_waits(report: Report, names=tuple(WAITS)) -> None:
    for name in names:
        settings = {"dtype": "float32", "beta": 0.1, "lr": 1e-3, "micro_tokens": 256}
        settings |= {"compile": "on", "loss": name.partition(",")[0]} | WAITS[name]
        options = train.Options(**settings)
        with compiled_as_on_a_gpu(report.device):
            model = prepared(model_for(SMALL, settings).to(report.device), options)
            optimizer = train.make_optimizer(model, options)
            for step in range(4):
                pairs = random_pairs(7 + 3 * step, 9 + step, 12, SMALL.vocab_size)
                work = step_data(model, pairs, options)
                guard = neither_waits_nor_recompiles(report.device)
                with guard if step >= 2 else contextlib.nullcontext():
                    train.train_step(model, optimizer, work, options)
        report.add(f"waits and recompilations, {name}", "none after step 2", "none")


# --- Fast -----------------------------------------------------------------------------------------


def seconds_of(run, repeats: int, device: torch.device) -> float:
    """The median of the seconds of run(), after two calls that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


def matmul_peak(device: torch.device) -> float:
    """Floating-point operations per second of a large product in bfloat16."""
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds_of(lambda: a @ b, 10, device)


def check_head(report: Report) -> None:
    N, D, V = (8192, 2048, 128256) if report.on_gpu else (64, 16, 512)
    make = {"device": report.device, "dtype": torch.bfloat16}
    hidden, weight = torch.randn(N, D, **make), 0.05 * torch.randn(V, D, **make)
    targets = torch.randint(0, V, (N,), device=report.device)
    counts = [32] * (N // 32)
    lengths = torch.tensor(counts, device=report.device)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), targets, lengths, 0.0 * lengths

    def fused():
        hidden.grad = weight.grad = None
        losses, _ = fused_pair_loss(*inputs, "mio", beta=0.1, counts=counts, compiled=report.on_gpu)
        losses.sum().backward()

    def bare():
        with torch.no_grad():
            for states in hidden.split(1024):
                logits = states @ weight.T
                logits @ weight, logits.T @ states

    ratio = (head := seconds_of(fused, 5, report.device)) / seconds_of(bare, 5, report.device)
    report.add("head over its three products", f"{ratio:.2f} ({1e3 * head:.1f} ms)")


BETA, BATCH = 0.2, 32
# Workloads -> tokens of a prompt and of an answer, tokens of a pass (which 32 pairs almost fill),
# bar over TRL, precisions of the weights, numbers of pairs that TRL takes at a time.
WORKLOADS = {
    "GSM8K-like": (58, 94, 8448, 1.25, ["float32"], [8, 16]),
    "long prompts, short answers": (1024, 64, 8192, 1.5, ["float32", "bfloat16"], [8]),
}


def random_model(config: ModelConfig, device, dtype: torch.dtype) -> Llama:
    """A model of random weights that never exist in another precision or place."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Llama(config)
    finally:
        torch.set_default_dtype(torch.float32)


def free() -> None:
    """Frees the memory of earlier models, which hooks and compiled blocks keep in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else float("nan")


def our_step(report: Report, config: ModelConfig, pairs: Pairs, **flags) -> tuple[float, float]:
    """Seconds and peak bytes of a step."""
    free()
    compile = "on" if report.on_gpu else "off"
    options = train.Options(loss="mio", beta=BETA, lr=1e-6, compile=compile, **flags)
    model = random_model(config, report.device, getattr(torch, options.weights))
    prepared(model, options)
    optimizer = train.make_optimizer(model, options)
    ref = torch.full((len(pairs), 2), -900.0)
    if report.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(
        lambda: train.train_step(
            model, optimizer, StepData(batches_of(model, pairs, options), ref), options
        ),
        3, report.device,
    )  # fmt: skip
    return seconds, peak_memory(report.device)


def trl_step(report: Report, init: str, pairs: Pairs, dtype: torch.dtype, batch: int):
    """The same of TRL's DPOTrainer with SDPA, its own head and given reference log-probs. `init` is
    a checkpoint; `batch` pairs are in a forward pass."""
    free()
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, dataset, *_):
            return dataset

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if report.on_gpu:
                torch.cuda.synchronize()
            starts.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if report.on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    starts, ends, steps = [], [], 4
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save(Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|end|>")
        columns = "prompt_ids", "chosen_ids", "rejected_ids"
        refs = {"ref_chosen_logps": -900.0, "ref_rejected_logps": -900.0}
        rows = [dict(zip(columns, pair)) | refs for pair in pairs]
        args = trl.DPOConfig(
            output_dir=folder, loss_type=["nca_pair"], beta=BETA, learning_rate=1e-6,
            per_device_train_batch_size=batch, gradient_accumulation_steps=len(pairs) // batch,
            max_steps=steps, logging_steps=100, report_to=[], save_strategy="no", disable_tqdm=True,
            bf16=report.on_gpu, use_cpu=not report.on_gpu, gradient_checkpointing=False,
            optim="adamw_torch_fused", max_length=None, remove_unused_columns=False,
            precompute_ref_log_probs=True, lr_scheduler_type="constant", warmup_steps=0,
        )  # fmt: skip
        kwargs = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = transformers.AutoModelForCausalLM.from_pretrained(init, **kwargs)
        model.to(report.device)
        trainer = Trainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows * steps),
                          processing_class=tokenizer, callbacks=[Marks()])  # fmt: skip
        if report.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return float(np.median(np.subtract(ends, starts)[1:])), peak_memory(report.device)


def check_speed(report: Report) -> None:
    config = PRESETS["llama-3.2-1b"] if report.on_gpu else SMALL
    peak, scale = matmul_peak(report.device), 1 if report.on_gpu else 16
    report.add("matrix product, bfloat16", f"{peak / 1e12:.3g} TFLOP/s")
    place = tempfile.TemporaryDirectory()
    random_model(config, report.device, torch.bfloat16).save_pretrained(place.name)
    for name, (prompt, answer, micro, bar, precisions, sizes) in WORKLOADS.items():
        count = BATCH if report.on_gpu else 4
        pairs = random_pairs(count, prompt // scale, answer // scale, config.vocab_size, 0.2)
        tokens, flops = int(pairs.lengths().sum()), step_flops(config, pairs)
        for weights in precisions:
            label = f"{name}, {weights} weights"
            flags = {"weights": weights, "dtype": "bfloat16", "micro_tokens": micro // scale}
            seconds, memory = our_step(report, config, pairs, **flags)
            share = flops / seconds / peak
            measured = f"{tokens / seconds:,.0f} tokens/s, {share:.0%} of the peak"
            text = f"{measured}, {memory / 2**30:.1f} GiB"
            report.add(f"ours: {label}", text, *(("45 %", share >= 0.45) if report.on_gpu else ()))
            if not importlib.util.find_spec("trl"):
                report.add(f"TRL: {label}", "left out: trl is not installed")
                continue
            found = []
            for batch in sizes if report.on_gpu else (2,):
                with contextlib.suppress(torch.OutOfMemoryError):
                    dtype = getattr(torch, weights)
                    found.append((*trl_step(report, place.name, pairs, dtype, batch), batch))
            assert found, f"TRL: {label}: out of memory"
            theirs, memory, batch = min(found)
            text = f"{tokens / theirs:,.0f} tokens/s, {memory / 2**30:.1f} GiB, {batch} at a time"
            report.add(f"TRL: {label}", text)
            ratio = theirs / seconds
            bars = (f"{bar}", ratio >= bar) if report.on_gpu else ()
            report.add(f"ours over TRL: {label}", f"{ratio:.2f}", *bars)


def check_large(report: Report) -> None:
    config = PRESETS["llama-3.1-8b"] if report.on_gpu else SMALL
    length, count = (1024, 32) if report.on_gpu else (64, 4)
    flags = {"weights": "bfloat16", "dtype": "bfloat16", "checkpointing": "on"}
    sizes = {"max_length": length, "batch_size": count, "micro_tokens": 4 * length}
    half = random_pairs(count, length // 2, length // 2, config.vocab_size, spread=0)
    pairs = Pairs(Pair(p.prompt[: length // 2], *(a[: length // 2] for a in p[1:])) for p in half)
    seconds, memory = our_step(report, config, pairs, micro_tokens=4 * length, **flags)
    options = train.Options(device=report.device.type, **flags, **sizes)
    planned = cost_of_longest_pairs(config, options).peak
    text = f"{seconds:.2f} s, {memory / 1e9:.1f} GB, planned {planned / 1e9:.1f}"
    bars = ("within 5 %", abs(memory / planned - 1) < 0.05) if report.on_gpu else ()
    report.add(f"a step of {count} pairs of {length} tokens, largest model", text, *bars)


# --- The command ----------------------------------------------------------------------------------

CHECKS = {"right": check_right, "generation": check_generation, "resume": check_resume,
          "waits": check_waits, "head": check_head, "large": check_large,
          "speed": check_speed}  # fmt: skip


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"A CPU, torch {torch.__version__}; this only tests the script.\n"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device)
    return f"{name}, driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}.\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the checks and returns the number of bars that were missed."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu.py", description=__doc__, formatter_class=form)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: {' '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda")
    flags = parser.parse_args(argv)
    if unknown := set(flags.checks) - CHECKS.keys():
        parser.error(f"{min(unknown)}: there is no such check; choose from {', '.join(CHECKS)}")
    if flags.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {flags.device}: torch finds no GPU; use --device cpu")
    device = torch.device(flags.device)
    print(describe(device))
    report = Report(device)
    for name in flags.checks or CHECKS:
        start = time.perf_counter()
        try:
            CHECKS[name](report)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            report.add(name, f"{text:.120}", "no error", False)
        free()
        report.row(f"({name})", f"{time.perf_counter() - start:.0f} s", "", "")
    return report.missed


if __name__ == "__main__":
    sys.exit(main() > 0)
