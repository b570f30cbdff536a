"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's format, added to an existing model:
y = W x + b + s B A x. A (r, in) and B (out, r) are trained; W, b and the scale s are fixed."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.files import write_json
from support.weights import save_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of weights in PEFT's files
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = "all"
LORA_TARGETS = {"all": LINEARS, "attention": LINEARS[:4]}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The rank, scale and target modules of a model's adapters; the fields have PEFT's names."""

    r: int
    lora_alpha: float
    target_modules: list[str]  # names, or ends of names, of linear modules in the blocks
    use_rslora: bool = False  # if set, s = alpha / sqrt(r) (arXiv 2312.03732), else alpha / r


def config_of(options) -> LoraConfig:
    """Returns the configuration of the adapters that the options request."""
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
            raise ValueError(f"--lora_targets {target!r:.60}: choose from {', '.join(LINEARS)}")
        found |= matches
    limit = min(min(linear.weight.shape) for linear in found.values())
    if lora.r > limit:
        raise ValueError(f"--lora_rank {lora.r}: choose 1 to {limit}, a target's smallest width")
    model.requires_grad_(False)
    model.lora = lora
    for name, linear in found.items():
        model.set_submodule(name, LoraLinear(linear, lora))


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
    return model.to(dtype)


def load_adapter(model: nn.Module, folder) -> None:
    """Loads the adapters that save_adapter wrote for a model with the same LoraConfig."""
    for name, tensor in load_file(Path(folder) / ADAPTER_WEIGHTS).items():
        model.get_parameter(name.removeprefix(PREFIX)).data.copy_(tensor)


def save_adapter(model: nn.Module, folder, base: str) -> None:
    """Writes the adapters to `folder` in PEFT's format. `base` is the base model's name or path."""
    Path(folder).mkdir(exist_ok=True)
    adapters = {PREFIX + n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    save_tensors(Path(folder) / ADAPTER_WEIGHTS, adapters, format="pt")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    write_json(Path(folder) / "adapter_config.json", config | dataclasses.asdict(model.lora))
