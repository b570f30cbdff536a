"""Predicts the memory of a step from config.json (--plan). Imports mio.py and model.py."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mio import CHUNK_TOKENS, chunks_of_pairs
from model import Llama, ModelConfig
from support.files import read_json
from support.hub import named
from support.lora import add_lora, config_of

# The arguments are vocabulary, width, inner width, layers, heads, key-value heads, head width.
PRESETS = {
    "llama-3.2-1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True),
    "llama-3.2-3b": ModelConfig(128256, 3072, 8192, 28, 24, 8, 128, tie_word_embeddings=True),
    "llama-3.1-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128),
    "llama-3.1-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128),
}
GPUS = {"h100": 80, "a100": 80, "h200": 141, "rtx4090": 24}  # memory in GB, from data sheets


class StepCost(NamedTuple):
    """The bytes of memory that a step needs, by kind and at the peak."""

    parameters: int  # number of parameters of the whole model, adapters included
    weights: float
    gradients: float
    moments: float  # of AdamW
    activations: float  # saved by the forward pass for the backward pass
    head: float  # the logits of a chunk, and the gradients of the head and of its input states
    peak: float


def step_cost(config, options, rows: list[int], lengths: list[int], passes=1) -> StepCost:
    """Returns what a step of `passes` forward passes needs, without the overhead of the allocator
    and CUDA. rows, lengths: number of tokens of each row and each answer in a pass."""
    with torch.device("meta"):  # all blocks are alike, so the model has a single block
        model = Llama(dataclasses.replace(config, num_hidden_layers=1))
        model.to(getattr(torch, options.weights))
        if options.lora_rank:
            add_lora(model, config_of(options), getattr(torch, options.dtype))
    half, recompute = options.dtype == "bfloat16", options.checkpointing == "on"
    on_gpu, several_passes = options.device != "cpu", passes > 1
    compiled = on_gpu and options.compile != "off"
    # s is the number of bytes of a number in matrix products, n the tokens in a chunk of the head.
    D, L, T, s = config.hidden_size, config.num_hidden_layers, sum(rows), 2 if half else 4
    n = max(part.stop - part.start for _, part in chunks_of_pairs(lengths, CHUNK_TOKENS))

    head, layers = model.head_weight, model.model["layers"]
    linears = {name: m.weight for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    root = [p for name, p in model.named_parameters() if ".layers." not in name]
    block, trains_head = list(layers.parameters()), head.requires_grad
    trained = sum(p.numel() for p in root + L * block if p.requires_grad)
    weights = sum(p.nbytes for p in root + L * block)
    # A block saves a dense mask in eager attention, and weights that it converts for products.
    saved = 0 if compiled else s * sum(t * t for t in rows)
    saved += sum(s * w.numel() for w in linears.values() if w.element_size() != s)
    saved += _saved_by_token(config, linears, trains_head, s) * T
    activations = L * (4 * D * T if recompute else saved)
    activations += T * (8 * config.head_dim + 4 * D * (1 + trains_head))  # rotary table, last norm
    # The backward pass of an MLP holds gradients of two factors, the residual and the norm.
    at_work = T * (2 * config.intermediate_size * s + 8 * D) + recompute * saved
    grad_head = 4 * head.numel() * trains_head  # float32
    stored_head = head.nbytes * trains_head
    # After the head, a GPU scales a copy of this gradient, and autograd rounds it for the weight.
    copied = grad_head * on_gpu + stored_head * (head.dtype != torch.float32)
    logits = n * len(head) * (s + 4 * (half and on_gpu))  # a GPU also needs float32 logits
    logits += s * head.numel() * (head.element_size() != s)  # the converted head
    logits += 8 * D * (sum(lengths) + n)  # the states that the head reads, and their gradients
    number = 2 if options.weights == "bfloat16" else 4  # bytes of a gradient or a moment
    gradients, moments = number * trained, 2 * number * trained
    start = several_passes * gradients + activations + grad_head + max(logits, at_work, copied)
    # At the end of a pass, a tied matrix has two gradients and the sum of earlier passes.
    copies = config.tie_word_embeddings + several_passes
    peak = weights + moments + max(start, gradients + max(at_work, stored_head * copies))
    total = sum(p.numel() for p in root + L * block)
    return StepCost(total, weights, gradients, moments, activations, grad_head + logits, peak)


def _saved_by_token(config, linears: dict, trains_norms: bool, s: int) -> int:
    """Returns how many bytes autograd saves for each token in a transformer block."""
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inputs = {}  # the inputs of trained matrices
    for name, weight in linears.items():
        if weight.requires_grad:
            # q, k and v share an input, as do gate and up, unless autocast rounds a copy for each.
            alone = s == 2 or any(part in name for part in ("o_proj", "down_proj", "lora_B"))
            inputs[name if alone else name.split(".")[1]] = weight.shape[1]
    # A norm saves its input and, to train its weight, its output, both in float32.
    normed = 4 * (1 + trains_norms) * (2 * config.hidden_size + config.qk_norm * (H + K) * E)
    attention = s * (2 * H + 2 * K) * E + 4 * H  # q, k, v, the output and its log-sum-exp
    return normed + attention + s * (sum(inputs.values()) + 3 * config.intermediate_size)


def cost_of_longest_pairs(config: ModelConfig, options, **changes) -> StepCost:
    """Returns the `step_cost` of pairs of --max_length tokens; `changes` override the options."""
    options = dataclasses.replace(options, **changes)
    prompt, answer = options.max_length // 2, options.max_length - options.max_length // 2
    pair = prompt + 2 * (answer - 1)
    count = min(options.batch_size, max(1, options.micro_tokens // pair))  # pairs in a pass
    padding = 0 if options.compile == "off" else max(0, options.micro_tokens - pair * count)
    rows, lengths = [pair] * count + [padding], [answer] * 2 * count
    return step_cost(config, options, rows, lengths, -(-options.batch_size // count))


def plan(options) -> str:
    """Returns a table with a row for each way to save memory (--lora_rank, --dtype, --weights and
    --checkpointing): memory of a step, and whether the step fits into the memory of a --gpu."""
    init, options = Path(options.init or options.plan), dataclasses.replace(options, device="cuda")
    config = PRESETS.get(options.plan) or ModelConfig.from_hf(read_json(init / "config.json"))
    rank = options.lora_rank or min(16, config.num_key_value_heads * config.head_dim)
    names, rows = ("lora_rank", "dtype", "weights"), []
    settings = {
        "all float32": (None, "float32", "float32"),
        "all bfloat16": (None, "bfloat16", "float32"),
        "weights bfloat16": (None, "bfloat16", "bfloat16"),
        f"rank {rank} float32": (rank, "float32", "float32"),
        f"rank {rank} bfloat16": (rank, "bfloat16", "float32"),
    }
    for label, checkpointing in product(settings, ("off", "on")):
        changes = dict(zip(names, settings[label])) | {"checkpointing": checkpointing}
        cost = cost_of_longest_pairs(config, options, **changes)
        # About a tenth of the memory stays free, because the predicted peak is an estimate.
        fits = "yes" if 1.1 * cost.peak <= GPUS[options.gpu] * 1e9 else "no"
        label = label if checkpointing == "off" else "  recomputed"
        mark = ">" if changes.items() <= vars(options).items() else " "
        parts = "".join(f"{part / 1e9:7.1f}" for part in cost[1:])
        rows.append(f"{mark} {label:17}{parts}{fits:>5}")
    total = cost_of_longest_pairs(config, options, lora_rank=None).parameters
    pairs = f"{options.batch_size} pairs of up to {options.max_length} tokens"
    return f"""{Path(named(init).partition("@")[0]).name[-32:]}: {total:,} parameters,
{pairs} in a step on one {options.gpu} of {GPUS[options.gpu]} GB

{"GB":19} weight   grad moment   kept   head   peak fits
{chr(10).join(rows)}

kept: saved for the backward pass; recomputed: with --checkpointing on;
weights bfloat16: with --weights bfloat16, the other rows with float32;
fits: whether about a tenth of the memory stays free; >: with the given flags"""
