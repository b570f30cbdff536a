"""A transformer of the Llama family with Hugging Face's parameter names.

The file goes bottom up: configuration, rotary embedding, attention, block, model. Losses and
adapters are in other files. Shapes in comments use these letters: B rows, T tokens, S tokens that
can be attended to, D hidden size, H query heads, K key-value heads, E head size, V vocabulary size.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from support.bfloat16 import in_product_precision
from support.files import read_json, write_json
from support.hf_config import LLAMA3_ROPE, read_config, write_config
from support.sampling import generate
from support.weights import read_weights, write_weights


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture. Except qkv_bias and qk_norm, fields have Hugging Face's names."""

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
    rope_scaling: dict | None = None  # with rope_type "linear" or "llama3"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    model_type: str = "llama"
    attention_bias: bool = False  # biases of all four attention projections
    mlp_bias: bool = False
    qkv_bias: bool = False  # biases of the query, key and value projections (Qwen2)
    qk_norm: bool = False  # RMSNorm over each query and key head (Qwen3)
    sliding_window: int | None = None  # most tokens that a token attends to, itself included

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Reads the content of a config.json. Raises a ValueError that names a wrong value or a
        feature that is not implemented."""
        return cls(**read_config(hf, dataclasses.fields(cls)))

    def to_hf(self) -> dict:
        """Returns the content of a config.json that transformers 4 and 5 both read."""
        return write_config(dataclasses.asdict(self))


def rotary_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of the angles by which positions rotate pairs of a head's features.

    positions (B, T) -> two float32 tensors (B, 1, T, E), which broadcast over heads. Sources:
    RoFormer (arXiv 2104.09864) in Hugging Face's half-split layout; the llama3 scaling, which
    reduces the low frequencies, follows transformers' `modeling_rope_utils`."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)  # (E/2,)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        factor, low, high, context = (scaling[key] for key in LLAMA3_ROPE)
        turns = context * frequencies / (2 * torch.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: slowed by `factor`
        frequencies = keep * frequencies + (1 - keep) * frequencies / factor
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, E)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to x (B, heads, T, E)."""
    left, right = x.chunk(2, dim=-1)  # (B, heads, T, E/2) each
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in the more precise of the dtypes of its input and its weight."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class Linear(nn.Linear):
    """Converts the weight to the precision of the product, so that weights may be bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        weight = in_product_precision(self.weight, x)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(weight.dtype))


Mask = Tensor | list[Tensor] | BlockMask | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, grouped: bool) -> Tensor:
    """Computes attention: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E).

    mask: None for plain causal attention; (B, 1, T, S) bool, True where a query attends to a key; a
    list of such masks for concatenated rows, which attend only to themselves; or a BlockMask."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if isinstance(mask, list):
        return _attend_row_by_row(q, k, v, mask, grouped)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def _attend_row_by_row(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], grouped: bool):
    lengths = [mask.shape[-1] for mask in masks]
    rows = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), masks)  # (1, heads, t, E) each
    return torch.cat([attend(*row, grouped) for row in rows], dim=2)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.grouped = H != K
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = Linear(D, H * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(D, K * self.head_dim, bias=qkv_bias)
        self.v_proj = Linear(D, K * self.head_dim, bias=qkv_bias)
        self.o_proj = Linear(H * self.head_dim, D, bias=config.attention_bias)
        norm = RMSNorm if config.qk_norm else nn.Identity  # Identity ignores its arguments
        self.q_norm = norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary, mask: Mask, cache: Tensor | None, positions: Tensor):
        """x (B, T, D) -> (B, T, D). A cache (2, B, K, capacity, E) stores keys and values at
        `positions` (B, T). If T = 1, a mask (B, 1, 1, S) applies to the cache's first S places."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # the norms of Qwen3 may be more precise
        if cache is not None:
            row = torch.arange(B, device=x.device)[:, None]
            cache[0][row, :, positions] = k.transpose(1, 2)  # (B, T, K, E)
            cache[1][row, :, positions] = v.transpose(1, 2)  # (B, T, K, E)
            if T == 1 and mask is not None:
                k, v = cache[:, :, :, : mask.shape[-1]]  # (B, K, S, E) each
        y = attend(q, k, v, mask, self.grouped)  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * E) -> (B, T, D)


class MLP(nn.Module):
    """The SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, mask: Mask, cache: Tensor | None, positions: Tensor):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A language model whose forward pass stops before the head, because the objective (mio.py)
    decides which positions to project onto the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass to save memory
        self.compiled = False
        self.float32 = False  # compute in float32 even if the weights are bfloat16
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # As in transformers, matrices are normal(0, initializer_range), norms 1 and biases 0.
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
        """Compiles all blocks, which share compiled code. Names in the state_dict do not change."""
        global _attend_row_by_row  # not compiled: the rows and their lengths change in each batch
        _attend_row_by_row = torch.compiler.disable(_attend_row_by_row)
        self.compiled = True
        for block in self.model["layers"]:
            block.compile()

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Mask = None,
        cache: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns hidden states after the final norm: tokens (B, T) -> (B, T, D). positions (B, T)
        are 0, 1, 2, ... by default. mask: as in `attend`; a list or a BlockMask must already
        respect the sliding window. cache (layers, 2, B, K, capacity, E) stores keys and values."""
        assert tokens.dim() == 2, f"tokens must be (B, T), not {tuple(tokens.shape)}"
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        T, window = tokens.shape[1], self.config.sliding_window
        if window is not None and window < T and not isinstance(mask, (list, BlockMask)):
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            near = positions[:, :, None] - positions[:, None, :] < window  # (B, T, T)
            mask = (causal if mask is None else mask) & near[:, None]  # (B, 1, T, T)
        rotary = rotary_table(self.config, positions)
        x = self.model["embed_tokens"](tokens)  # (B, T, D)
        if self.float32 or torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32))  # sums need more than bfloat16
        for index, block in enumerate(self.model["layers"]):
            if self.checkpointing and torch.is_grad_enabled():
                kwargs = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout
                x = checkpoint(block, x, rotary, mask, None, positions, **kwargs)
            elif cache is None:
                x = block(x, rotary, mask, None, positions)
            else:  # block.forward skips compiled code: shapes change with every generated token
                x = block.forward(x, rotary, mask, cache[index], positions)
        return self.model["norm"](x)

    generate = generate  # samples an answer to each prompt; see support/sampling.py

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "Llama":
        """Loads a checkpoint folder. The tensors must have exactly the model's names and shapes.
        Raises OSError, or a ValueError that names the file and what is wrong."""
        folder = Path(folder)
        hf = read_json(folder / "config.json")
        try:
            config = ModelConfig.from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{folder}/{error}") from None
        with torch.device("meta"):  # allocates no memory for the weights
            model = cls(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        model.load_state_dict(read_weights(folder, shapes, dtype, device), strict=True, assign=True)
        return model

    def save_pretrained(self, folder) -> None:
        """Writes config.json and the weights (safetensors, sharded above 5 GB) for transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, self.state_dict())
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", self.config.to_hf() | {"dtype": dtype})
