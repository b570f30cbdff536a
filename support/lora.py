"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's format, added to an existing model:
y = W x + b + s B A x. A (r, in) and B (out, r) are trained; W, b and the scale s are fixed."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from support.files import read_json, write_json
from support.weights import read_weights, save_tensors

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = "all"
LORA_TARGETS = {"all": LINEARS, "attention": LINEARS[:4]}
# Keys of an adapter_config.json that PEFT uses only to create or train an adapter.
INERT_KEYS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "qalora_group_size",
              "lora_dropout", "megatron_core", "peft_version", "revision", "task_type"}  # fmt: skip
# The implemented values of keys. Other values of init_lora_weights change the base weights.
IMPLEMENTED = {"peft_type": ("LORA",), "bias": ("none",), "use_rslora": (True,),
               "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The rank, scale and target modules of a model's adapters; the fields have PEFT's names."""

    r: int
    lora_alpha: float
    target_modules: list[str]  # names, or ends of names, of linear modules in the blocks
    use_rslora: bool = False  # if set, s = alpha / sqrt(r) (arXiv 2312.03732), else alpha / r

    @classmethod
    def from_pretrained(cls, folder) -> "LoraConfig":
        """Reads an adapter_config.json. Raises OSError, or a ValueError that names file and key."""
        file = Path(folder) / ADAPTER_FILES[0]
        hf = {"peft_type": None} | read_json(file)
        r, alpha, targets = (hf.pop(key, None) for key in ("r", "lora_alpha", "target_modules"))
        for key, value in hf.items():
            off = not value and key != "peft_type"  # an empty value switches a feature off
            if key not in INERT_KEYS and not off and value not in IMPLEMENTED.get(key, ()):
                what = f"{key} = {value!r:.60} is not implemented"
                raise ValueError(f"{file}: {what}; merge the adapter into its base model with PEFT")
        if type(r) is not int or r < 1:
            raise ValueError(f"{file}: r must be an integer above 0, not {r!r:.60}")
        if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
            raise ValueError(f"{file}: lora_alpha must be a number above 0, not {alpha!r:.60}")
        if not isinstance(targets, list) or {*map(type, targets)} != {str} or "" in targets:
            raise ValueError(f"{file}: target_modules must be a list of names, not {targets!r:.60}")
        return cls(r, alpha, targets, bool(hf.get("use_rslora")))


def config_of(options) -> LoraConfig:
    """Returns the configuration of the adapters that the options request."""
    if options.init_adapter:
        return LoraConfig.from_pretrained(options.init_adapter)
    targets = options.lora_targets or DEFAULT_TARGETS
    targets = LORA_TARGETS.get(targets, targets.split(","))
    alpha = options.lora_alpha or 2.0 * options.lora_rank
    return LoraConfig(options.lora_rank, alpha, targets, options.lora_rslora)


class LoraLinear(nn.Linear):
    """A linear module with an adapter. As in PEFT, A is random (uniform) at first, and B is 0."""

    def __init__(self, base: nn.Linear, lora: LoraConfig):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
        self.lora_A = nn.Linear(base.in_features, lora.r, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(lora.r, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.scaling * self.lora_A(x))


def add_lora(model: nn.Module, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
    """Freezes a model and adds float32 adapters to its target modules. The frozen weights of linear
    modules are stored in `dtype`, because autocast would round float32 weights at every use. Raises
    ValueError for a target that matches no module, and if the rank exceeds a target's dimension."""
    linears = {n: m.to(dtype) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears.pop("lm_head", None)
    found = {}
    for target in lora.target_modules:
        matches = {n: m for n, m in linears.items() if f".{n}".endswith(f".{target}")}
        if not matches:
            raise ValueError(f"LoRA target {target!r:.60}: choose from {', '.join(LINEARS)}")
        found |= matches
    limit = min(min(linear.weight.shape) for linear in found.values())
    if not 0 < lora.r <= limit:
        raise ValueError(f"LoRA rank {lora.r}: choose 1 to {limit} (a target's smallest dimension)")
    model.requires_grad_(False)
    model.lora = lora
    for name, linear in found.items():
        model.set_submodule(name, LoraLinear(linear, lora))


def lora_of(model: nn.Module) -> LoraConfig | None:
    """Returns the configuration of the model's adapters, or None for a model without adapters."""
    return getattr(model, "lora", None)


@torch.no_grad()
def merge_lora(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Adds s B A to each W, rounds the sum to W's dtype, and returns the model in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            merged = nn.Linear(module.in_features, module.out_features, device="meta")
            change = module.scaling * (module.lora_B.weight @ module.lora_A.weight)  # (out, in)
            merged.weight = nn.Parameter((module.weight + change).to(module.weight.dtype))
            merged.bias = module.bias
            model.set_submodule(name, merged)
    model.lora = None
    return model.to(dtype)


def load_adapter(model: nn.Module, folder) -> None:
    """Loads adapter_model.safetensors into the adapters. Raises ValueError as read_weights does."""
    adapters, files = _adapters(model), [Path(folder) / ADAPTER_FILES[1]]
    shapes = {name: tuple(p.shape) for name, p in adapters.items()}
    for name, tensor in read_weights(folder, shapes, torch.float32, files=files).items():
        adapters[name].copy_(tensor)


def save_adapter(model: nn.Module, folder, base: str) -> None:
    """Writes the adapters to `folder` in PEFT's format. `base` is the base model's name or path."""
    Path(folder).mkdir(exist_ok=True)
    save_tensors(Path(folder) / ADAPTER_FILES[1], _adapters(model), format="pt")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    write_json(Path(folder) / ADAPTER_FILES[0], config | dataclasses.asdict(lora_of(model)))


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    """Returns a dict from PEFT's names to the adapters' weights, which share the model's memory."""
    named = model.named_parameters()
    return {f"base_model.model.{name}": p.detach() for name, p in named if ".lora_" in name}
