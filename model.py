"""The transformer of the Llama family, Hugging Face's parameter names, safetensors on disk.

Read from leaf to root: configuration, rotary embedding, attention, block, model, generation, files.
Sizes in comments: B rows, T tokens, S tokens seen so far, D width, H query heads, K key-value
heads, E width of a head, V vocabulary.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

MAX_SHARD_BYTES = 5_000_000_000
LARGEST_JSON = 2**24  # bytes of a config.json or an index

# model_type -> architecture, and the features that its name decides whatever config.json says.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"sliding_window": None}),
    "mistral": ("MistralForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "qkv_bias": True},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"mlp_bias": False, "sliding_window": None, "qk_norm": True},
    ),
}
# Keys of a config.json that do not change what the forward pass computes.
INERT_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "pad_token_id", "rope_parameters"),
    *("torch_dtype", "transformers_version", "unk_token_id", "use_cache", "is_llama_config"),
    "max_window_layers",  # matters with use_sliding_window alone, which is refused
}
# Features that a config may name, with the one value that this file implements.
ONLY_VALUE = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
}
# An adapter_config.json: keys that matter only while an adapter is made, and values that do.
INERT_ADAPTER_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
}
ADAPTER_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others change the base
}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = {"all": LINEARS, "attention": LINEARS[:4]}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_SCALINGS = {"linear": ("factor",), "llama3": LLAMA3_ROPE}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is made of, under Hugging Face's names where it has one. `rope_scaling` is
    None, linear or llama3's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    model_type: str = "llama"
    attention_bias: bool = False  # on all four projections of attention
    mlp_bias: bool = False
    qkv_bias: bool = False  # on three of them
    qk_norm: bool = False  # RMSNorm over each query and key head
    sliding_window: int | None = None  # a token sees this many, itself included

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Reads the contents of a config.json, as transformers 4 or 5 writes it.

        Raises ValueError that names the key when a value is wrong or a feature is not implemented.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        hf = _known_features(hf, fields)
        values = {key: hf[key] for key in fields & hf.keys() if hf[key] is not None}
        for key in ("hidden_size", "num_attention_heads"):
            _check_number(key, values.get(key), int)
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values |= _read_rope(hf) | FAMILIES[hf["model_type"]][1]
        if values.get("sliding_window") is not None:
            _check_number("sliding_window", values["sliding_window"], int)
        for field in dataclasses.fields(cls):
            if field.type in (int, float) and (
                field.name in values or field.default is dataclasses.MISSING
            ):
                _check_number(field.name, values.get(field.name), field.type)
            if field.type is bool and not isinstance(values.get(field.name, False), bool):
                raise ValueError(f"config.json: {field.name} must be true or false")
        bos = values.get("bos_token_id", 0)
        if type(bos) is not int or bos < 0:
            raise ValueError(f"config.json: bos_token_id must be an id, not {bos!r:.60}")
        if values["num_attention_heads"] % values["num_key_value_heads"]:
            raise ValueError("config.json: num_attention_heads must be a multiple of "
                             "num_key_value_heads")  # fmt: skip
        width = values["num_attention_heads"] * values["head_dim"]
        _check_number("num_attention_heads times head_dim", width, int)
        if values["head_dim"] % 2:
            raise ValueError("config.json: head_dim must be even, rotary embedding turns pairs")
        return cls(**values)

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 both read."""
        implied = ("qkv_bias", "qk_norm")
        hf = {k: v for k, v in dataclasses.asdict(self).items() if k not in implied}
        rope = {"rope_type": "default"} | (self.rope_scaling or {})
        return hf | {
            "architectures": [FAMILIES[self.model_type][0]],
            **ONLY_VALUE,
            "rope_parameters": {"rope_theta": self.rope_theta} | rope,
        }


def _known_features(hf: dict, fields: set[str]) -> dict:
    """A config.json without the keys that switch nothing on; refuses what is not implemented."""
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise ValueError("config.json: not a JSON object with a model_type")
    if hf["model_type"] not in FAMILIES:
        raise ValueError(f"config.json: model_type {hf['model_type']!r:.60} is not supported, only "
                         f"{', '.join(FAMILIES)}")  # fmt: skip
    off = {key for key, value in hf.items() if value is None or value is False}
    kinds = hf.get("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        off.add("layer_types")
    if hf.get("use_sliding_window") is False:  # Qwen names a window and switches it off
        off.add("sliding_window")
    hf = {key: value for key, value in hf.items() if key not in off}
    implied = FAMILIES[hf["model_type"]][1]
    for key, value in hf.items():
        only = ONLY_VALUE.get(key, implied.get(key, value))
        if value != only:
            raise ValueError(f"config.json: {key} = {value!r:.60} is not implemented for "
                             f"{hf['model_type']}, only {only!r}")  # fmt: skip
        if key not in fields | INERT_KEYS | ONLY_VALUE.keys():
            raise ValueError(f"config.json: {key} = {value!r:.60} is not known here; "
                             "remove the key if it does not change the model")  # fmt: skip
    return hf


def _check_number(name: str, value: object, kind: type) -> None:
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    most = 4096 if name == "num_hidden_layers" else 2**24 if kind is int else 2**40
    if not number or not 0 < value < most:
        raise ValueError(
            f"config.json: {name} must be a positive {kind.__name__}, not {value!r:.60}"
        )


def _read_rope(hf: dict) -> dict:
    """rope_theta and rope_scaling, from transformers 5's `rope_parameters` or the older keys."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling must be an object, not {rope!r:.60}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", hf.get("rope_theta", ModelConfig.rope_theta))
    _check_number("rope_theta", theta, float)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not implemented")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(f"config.json: rope type {kind!r:.60} is not implemented, only default, "
                         f"{', '.join(ROPE_SCALINGS)}")  # fmt: skip
    for key in ROPE_SCALINGS[kind]:
        _check_number(f"rope_scaling.{key}", rope.get(key), float)
    scaling = {"rope_type": kind} | {key: rope[key] for key in ROPE_SCALINGS[kind]}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("config.json: high_freq_factor must be above low_freq_factor")
    return {"rope_theta": theta, "rope_scaling": scaling}


def rotary_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each position turns each pair of a head's numbers.

    positions (B, T) -> two float32 tensors (B, 1, T, E), ready to broadcast over heads.
    Sources: RoFormer (arXiv 2104.09864) in the half-split layout of Hugging Face; the llama3
    scaling is that of transformers' `modeling_rope_utils`, which slows the low frequencies.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)  # (E/2,)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        factor, low, high, context = (scaling[key] for key in LLAMA3_ROPE)
        turns = context * frequencies / (2 * torch.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, as it is; 0: slow, stretched
        frequencies = keep * frequencies + (1 - keep) * frequencies / factor
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to x (B, heads, T, E)."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def within_window(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Positions (B, T) and (B, S) -> (B, 1, T, S), True where a key is at most window - 1 back."""
    return (queries[:, :, None] - keys[:, None, :] < window)[:, None]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask, grouped: bool) -> Tensor:
    """q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E).

    mask: None for plain causal; (B, 1, T, S) bool, True where a query sees a key; a list of such
    for rows that lie end to end and see nothing of each other; or FlexAttention's BlockMask.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if isinstance(mask, list):
        return _attend_in_rows(q, k, v, mask, grouped)
    if grouped and q.shape[2] == 1:  # heads that share keys stand as queries: keys are read once
        shared = q.view(len(q), k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).view(q.shape)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


@torch.compiler.disable  # the number of rows and their lengths differ from batch to batch
def _attend_in_rows(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], grouped: bool) -> Tensor:
    lengths = [mask.shape[-1] for mask in masks]
    rows = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), masks)
    return torch.cat([attend(*row, grouped) for row in rows], dim=2)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.grouped = H != K
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(D, H * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(D, K * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(D, K * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(H * self.head_dim, D, bias=config.attention_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary, mask: Tensor | None, cache: Tensor | None, place):
        """x (B, T, D); mask as in `attend`, T queries and S keys, or None for plain causal;
        cache (2, rows, K, capacity, E) of keys and values, `place` says where these go: row and
        position (B, 1), (B, T). A token that comes alone with a mask sees S of what is there."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        if cache is not None:
            row, position = place
            cache[0][row, :, position] = k.transpose(1, 2)
            cache[1][row, :, position] = v.transpose(1, 2)
            if T == 1 and mask is not None:
                k, v = cache[:, :, :, : mask.shape[-1]]  # (B, K, S, E) each
        y = attend(q, k, v, mask, self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, mask=None, cache=None, place=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, place)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What the adapters of a model are, under PEFT's names."""

    r: int
    lora_alpha: float
    target_modules: list[str]  # names, or their ends, of linear modules of the blocks
    use_rslora: bool = False

    @property
    def scaling(self) -> float:  # alpha / sqrt(r) is that of arXiv 2312.03732
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @classmethod
    def from_pretrained(cls, folder) -> "LoraConfig":
        """Reads an adapter_config.json. Raises ValueError that names a feature not implemented."""
        file, fields = Path(folder) / "adapter_config.json", dataclasses.fields(cls)
        hf = {key: value for key, value in read_json(file).items() if value}
        known = {field.name for field in fields} | INERT_ADAPTER_KEYS
        for key, value in ({"peft_type": None} | hf).items():
            if key not in known and value not in ADAPTER_VALUES.get(key, ()):
                raise ValueError(f"{file}: {key} = {value!r:.60} is not implemented")
        for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", list)):
            if not isinstance(hf.get(key), kind):
                what = "a list of names" if kind is list else "a number above 0"
                raise ValueError(f"{file}: {key} must be {what}, not {hf.get(key)!r:.60}")
        return cls(**{field.name: hf[field.name] for field in fields if field.name in hf})


class LoraLinear(nn.Linear):
    """y = W x + b + s B A x with A (r, in) and B (out, r) to be trained, W and b as they were
    (arXiv 2106.09685). B is 0 at the start and A uniform, as PEFT has them."""

    def __init__(self, base: nn.Linear, lora: LoraConfig):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scaling = base.weight, base.bias, lora.scaling
        self.lora_A = nn.Linear(base.in_features, lora.r, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(lora.r, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.scaling * self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same in one matrix, summed in the adapters' precision and rounded to W's."""
        base = nn.Linear(self.in_features, self.out_features, device="meta")
        change = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        base.weight = nn.Parameter((self.weight + change).to(self.weight.dtype))
        base.bias = self.bias
        return base


class Llama(nn.Module):
    """A Llama-compatible language model. Its forward pass ends before the head: which positions
    are worth projecting onto the vocabulary is for the objective to say (`mio.py`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass to save memory
        self.compiled = False
        self.lora: LoraConfig | None = None
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # As transformers' LlamaPreTrainedModel: normal(0, initializer_range), norms 1, biases 0.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        tied = self.config.tie_word_embeddings
        return self.model["embed_tokens"].weight if tied else self.lm_head.weight

    def compile_blocks(self) -> None:
        """torch.compile of each block: the same code for all of them, and state_dict as it was."""
        self.compiled = True
        for block in self.model["layers"]:
            block.compile()

    def add_lora(self, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
        """Freezes all weights and puts float32 adapters beside the targets. `dtype` is that of the
        products: linear modules keep their weights in it, which autocast would round to it anyway.
        Raises ValueError for a target that is no linear module of a block, or a rank above it."""
        linears = {n: m.to(dtype) for n, m in self.named_modules() if isinstance(m, nn.Linear)}
        linears.pop("lm_head", None)
        found = {}
        for target in lora.target_modules:
            ends = [name for name in linears if f".{name}".endswith(f".{target}")]
            if not ends:
                raise ValueError(f"LoRA target {target!r:.60}: choose from {', '.join(LINEARS)}")
            found |= {name: linears[name] for name in ends}
        most = min(min(linear.weight.shape) for linear in found.values())
        if not 0 < lora.r <= most:
            raise ValueError(f"LoRA rank {lora.r}: must be from 1 to {most}, a target's width")
        self.requires_grad_(False)
        self.lora = lora
        for name, linear in found.items():
            self.set_submodule(name, LoraLinear(linear, lora))

    def merge_lora(self, dtype: torch.dtype) -> "Llama":
        """Turns the adapters into a change of the weights, and all weights into dtype."""
        for name, module in list(self.named_modules()):
            if isinstance(module, LoraLinear):
                self.set_submodule(name, module.merged())
        self.lora = None
        return self.to(dtype)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | list[Tensor] | BlockMask | None = None,
        cache: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        tokens (B, T) ids; positions (B, T), 0, 1, 2, ... when None; mask as in `attend`, where a
        list or a BlockMask must know of a sliding window already; cache (layers, 2, rows, K,
        capacity, E) receives the tokens in its `rows` (B,) at their positions: first whole
        sequences, then one token a row with a mask over what is there. Returns (B, T, D).
        """
        assert tokens.dim() == 2, f"tokens must be (B, T), not {tuple(tokens.shape)}"
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        T, window = tokens.shape[1], self.config.sliding_window
        known = isinstance(mask, (list, BlockMask))
        if window is not None and window < T and not known:  # T tokens have positions below T
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            mask = causal if mask is None else mask
            mask = mask & within_window(positions, positions, window)
        rotary = rotary_table(self.config, positions)
        place = None if cache is None else (rows[:, None], positions)
        x = self.model["embed_tokens"](tokens)  # (B, T, D)
        for index, block in enumerate(self.model["layers"]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                # Generation's shapes change with every token: there compiled code is of no use.
                run = block if cache is None else block.forward
                x = run(x, rotary, mask, None if cache is None else cache[index], place)
        return self.model["norm"](x)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_ids=(),
        seed: int = 0,
        *,
        rows: int | None = None,
        is_over: Callable[[int, list[int]], bool] | None = None,
        progress: Callable[[list[int]], None] = lambda answer: None,
    ) -> list[list[int]]:
        """Continues each prompt until a stop id or `max_new_tokens`.

        prompts: lists of ids of any lengths, none empty; temperature 0 is greedy; top_p keeps the
        smallest set of tokens whose probability reaches it. Returns the new ids of each prompt,
        the stop id included when one was produced. The same seed and prompts give the same answers.
        rows: as many are at work at a time, all when None; the next prompts take the place of those
        that are done, so like lengths should be neighbours. is_over(prompt's number, ids so far),
        asked every few tokens, ends an answer too. progress is told of each answer that is done.
        """
        assert prompts and all(prompts), "every prompt needs at least one token"
        config, weight = self.config, self.head_weight
        device, count = weight.device, len(prompts)
        R = min(rows or count, count)
        shape = (R, config.num_key_value_heads, max(map(len, prompts)) + max_new_tokens)
        shape = (config.num_hidden_layers, 2, *shape, config.head_dim)
        cache = torch.zeros(shape, dtype=weight.dtype, device=device)
        columns = torch.arange(shape[4], device=device)
        stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        # A draw for every token of every prompt: its luck does not depend on its neighbours'.
        luck = torch.rand(max_new_tokens, count, generator=torch.Generator().manual_seed(seed))
        luck = luck.to(device)
        # What each row of the cache is at: prompt, tokens of prompt and answer, the answer's ids
        # (and a place for what comes after it), whether it has ended.
        owner, length, made, ended = torch.zeros(4, R, dtype=torch.long, device=device)
        new = torch.zeros(R, max_new_tokens + 1, dtype=torch.long, device=device)
        busy: dict[int, int] = {}  # row -> prompt, of answers that are not done
        answers: list[list[int]] = [[] for _ in prompts]
        begun = steps = 0
        every = 8 if device.type == "cuda" or is_over else 1  # steps between looks at who is done
        while begun < count or busy:
            free = [row for row in range(R) if row not in busy]
            if begun < count and len(free) * 8 >= R:
                fresh = range(begun, min(begun + len(free), count))
                at, begun = torch.tensor(free[: len(fresh)], device=device), fresh.stop
                busy |= {row: (i, steps) for row, i in zip(free, fresh)}
                owner[at] = torch.tensor(fresh, device=device)
                length[at] = torch.tensor([len(prompts[i]) for i in fresh], device=device)
                made[at] = ended[at] = 0
                hidden = self._read([prompts[i] for i in fresh], cache, at)
            else:
                steps += 1
                at, here = torch.arange(R, device=device), length + made - 1
                seen = max(len(prompts[i]) + steps - begin for i, begin in busy.values())
                mask = columns[:seen] <= here[:, None]  # (R, S)
                if config.sliding_window is not None:
                    mask &= here[:, None] - columns[:seen] < config.sliding_window
                tokens = new.gather(1, made[:, None] - 1)
                hidden = self(tokens, here[:, None], mask[:, None, None], cache, at)[:, 0]
            chance = luck[made[at] % max_new_tokens, owner[at]]
            new[at, made[at]] = sample((hidden @ weight.T).float(), temperature, top_p, chance)
            is_last = torch.isin(new[at, made[at]], stop) | (made[at] + 1 == max_new_tokens)
            made[at] += 1 - ended[at]
            ended[at] |= is_last
            if steps % every and max(steps - begin for _, begin in busy.values()) < max_new_tokens:
                continue
            for row, over, made_here in zip(range(R), ended.tolist(), made.tolist()):
                if row in busy and (over or is_over):
                    i, answer = busy[row][0], new[row, :made_here].tolist()
                    if over or is_over(i, answer):
                        answers[i] = answer
                        ended[row] = 1
                        del busy[row]
                        progress(answer)
            if begun == count and 0 < len(busy) <= R // 2:  # half of the work would be for nothing
                keep = torch.tensor(sorted(busy), device=device)
                busy = {new_row: busy[row] for new_row, row in enumerate(sorted(busy))}
                R, cache, new = len(keep), cache[:, :, keep], new[keep]
                owner, length, made, ended = (x[keep] for x in (owner, length, made, ended))
        return answers

    def _read(self, prompts: list[list[int]], cache: Tensor, rows: Tensor) -> Tensor:
        """Prompts into the cache, a row each; the states of their last tokens, (prompts, D). What
        is asked several times is read once."""
        first: dict[tuple, int] = {}
        source = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
        lengths = torch.tensor([len(prompt) for prompt in first], device=rows.device)
        T = int(lengths.max())
        # Padding stands at the end, where no token of the prompt sees it and no answer will.
        tokens = torch.tensor([[*p, *[0] * (T - len(p))] for p in first], device=rows.device)
        at = rows[torch.tensor(list(first.values()), device=rows.device)]
        hidden = self(tokens, None, None, cache, at)[torch.arange(len(first)), lengths - 1]
        if len(first) < len(prompts):
            cache[:, :, rows, :, :T] = cache[:, :, rows[source], :, :T]
            number = {row: place for place, row in enumerate(first.values())}
            hidden = hidden[[number[row] for row in source]]
        return hidden

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Llama":
        """Loads a checkpoint folder, one safetensors file or shards with an index.

        Every tensor must be there, in its shape, and none beside. Raises OSError or ValueError
        that names the file and what is wrong with it.
        """
        config = ModelConfig.from_hf(read_json(Path(folder) / "config.json"))
        shards = _shards(Path(folder))
        held = sum(len(_tensor_names(file, listed)) for file, listed in shards.items())
        if config.num_hidden_layers > held:
            file, layers = Path(folder) / "config.json", config.num_hidden_layers
            raise ValueError(f"{file}: num_hidden_layers is {layers}, but there are {held} tensors")
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        missing = {name: tuple(p.shape) for name, p in model.named_parameters()}
        state = {}
        for file in shards:
            with _opened(file, str(device)) as tensors:
                for name in sorted(tensors.keys()):
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # older files carry it; it follows from the configuration
                    state[name] = _checked_tensor(file, tensors, name, missing).to(dtype)
        if missing:
            raise ValueError(f"{folder}: tensor {min(missing)} is missing, {len(missing)} in all")
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def save_pretrained(self, folder) -> None:
        """Writes config.json and safetensors for transformers to load, shards when above 5 GB."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[dict[str, Tensor]] = [{}]
        room = MAX_SHARD_BYTES
        for name, tensor in self.state_dict().items():
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = MAX_SHARD_BYTES
            shards[-1][name] = tensor.contiguous()
            room -= tensor.nbytes
        names = ["model.safetensors"]
        if len(shards) > 1:
            last = len(shards)
            names = [f"model-{i:05}-of-{last:05}.safetensors" for i in range(1, last + 1)]
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        for stale in set(folder.glob("model*.safetensors*")) - {folder / name for name in names}:
            if len(shards) == 1 or stale.name != "model.safetensors.index.json":
                stale.unlink()  # of a larger model saved here before
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", self.config.to_hf() | {"dtype": dtype})
        for name, shard in zip(names, shards):
            save_tensors(folder / name, shard, format="pt")

    def load_adapter(self, folder) -> None:
        """Reads adapters as PEFT names them into those that are here. Raises as from_pretrained."""
        file = Path(folder) / "adapter_model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no adapter_model.safetensors in it, and no other "
                                    "form of an adapter is read")  # fmt: skip
        adapters = self._adapters()
        missing = {name: tuple(p.shape) for name, p in adapters.items()}
        with _opened(file) as tensors:
            for name in sorted(tensors.keys()):
                tensor = _checked_tensor(file, tensors, name, missing)
                adapters[name].data.copy_(tensor)
        if missing:
            raise ValueError(f"{file}: tensor {min(missing)} is missing, {len(missing)} in all")

    def save_adapter(self, folder, base: str) -> None:
        """Writes the adapters for PEFT to load; base: what it says that they belong to."""
        Path(folder).mkdir(exist_ok=True)
        tensors = {name: p.detach() for name, p in self._adapters().items()}
        save_tensors(Path(folder) / "adapter_model.safetensors", tensors, format="pt")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        write_json(Path(folder) / "adapter_config.json", config | dataclasses.asdict(self.lora))

    def _adapters(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters()
        return {f"base_model.model.{name}": p for name, p in named if ".lora_" in name}


def sample(logits: Tensor, temperature: float, top_p: float, luck: Tensor) -> Tensor:
    """Picks a token a row by inverting the cumulative distribution at `luck`, uniform in [0, 1).

    logits (B, V) float32, luck (B,) -> ids (B,).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    order = None
    if top_p < 1:
        # A whole vocabulary is sorted only where its first thousand tokens are not enough.
        best = probabilities.topk(min(1024, probabilities.shape[-1]), dim=-1)
        enough = bool((best.values.sum(dim=-1) >= top_p).all())
        probabilities, order = best if enough else probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    # Strictly above: a token of probability zero is never picked, not even at luck 0.
    above = cumulative > luck[:, None] * cumulative[:, -1:]
    choice = above.to(torch.uint8).argmax(dim=-1)
    return choice if order is None else order.gather(1, choice[:, None])[:, 0]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    return list(_shards(folder))


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that the index puts there; None without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise FileNotFoundError(f"{folder}: no model.safetensors and no index of shards in it")
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or len(name) > 255 or not (folder / name).is_file():
            raise ValueError(f"{index}: shard {name!r:.60} is not a file of this folder")
    shards: dict[Path, set[str]] = {folder / name: set() for name in sorted(weight_map.values())}
    for tensor, name in weight_map.items():
        shards[folder / name].add(tensor)
    return shards


@contextlib.contextmanager
def _opened(file: Path, device: str = "cpu"):
    """A safetensors file; the errors name it."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _checked_tensor(file: Path, tensors, name: str, missing: dict[str, tuple]) -> Tensor:
    """A tensor of those that are `missing`, by name and shape, which it is no longer."""
    if name not in missing:
        raise ValueError(f"{file}: unexpected tensor {name}")
    shape, wanted = tuple(tensors.get_slice(name).get_shape()), missing.pop(name)
    if shape != wanted:
        raise ValueError(f"{file}: {name} has shape {shape}, this model's is {wanted}")
    tensor = tensors.get_tensor(name)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{file}: {name} has unsupported type {tensor.dtype}")
    if not all(end.isfinite() for end in tensor.aminmax()):
        raise ValueError(f"{file}: {name} has values that are not finite")
    return tensor


def _tensor_names(file: Path, listed: set[str] | None) -> set[str]:
    """Names from a file's header; those that the index lists, where there is one."""
    with _opened(file) as tensors:
        names = set(tensors.keys())
    if listed is not None and names != listed:
        raise ValueError(f"{file}: {min(names ^ listed)} is in one of file and "
                         "model.safetensors.index.json, not in the other")  # fmt: skip
    return names


def read_json(path: Path) -> dict:
    """A JSON object from a file; the errors name the file."""

    def refuse(name):
        raise ValueError(f"{name} is no number")

    def once(items):
        if len(value := dict(items)) < len(items):
            raise ValueError(f"an object has a key twice, of {', '.join(value):.60}")
        return value

    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: has more than {LARGEST_JSON >> 20} MiB")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def written_whole(path: Path):
    """Yields a name to write a file or a folder under. Afterwards that is flushed to the disk and
    takes the name `path`: whoever looks, after a crash too, finds it whole or not at all.

    Raises OSError that names `path`, a full disk's included.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        written = [*partial.rglob("*"), partial]
        for file in written:
            flush_to_disk(file)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), reason, str(path)) from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    with written_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # save_file lets the owner alone read
