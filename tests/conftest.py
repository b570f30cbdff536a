"""Small models and files that several tests share. Nothing here needs a network."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project has no package to install
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from model import Llama, ModelConfig  # noqa: E402
from support import files  # noqa: E402
from support.tokenizers import byte_tokenizer, load_tokenizer  # noqa: E402

# A folder of real data that may lie beside the project. Without it, tests on real data are skipped.
SHARED = Path(__file__).parent.parent.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data beside us")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # so that logits are far from uniform
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return ModelConfig(**values | changes)


def tiny_model(seed: int = 0, **changes) -> Llama:
    torch.manual_seed(seed)
    return Llama(tiny_config(**changes))


PAIR_ROWS = [
    {
        "prompt": f"Question {i}: what is {i} + {i}?\n",
        "chosen": f"It is {2 * i}, " + "surely " * (i % 4),
        "rejected": f"I think that {2 * i + 1} might be it" + "." * (i % 3),
    }
    for i in range(23)
]


def write_rows(path: Path, rows: list) -> Path:
    files.write_rows(path, rows)
    return path


def chat_tokenizer(folder: Path, template: str):
    """The byte tokenizer with a chat template, read from the folder to which it is written."""
    byte_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def logp_alone(model, pair, side: int) -> torch.Tensor:
    """The summed log-prob () of an answer, pair[side], as the only answer of the only sequence."""
    if not pair[side]:
        return torch.zeros((), dtype=model.head_weight.dtype)
    ids = torch.tensor([[*pair[0], *pair[side]]])  # (1, T)
    logps = (model(ids[:, :-1])[0] @ model.head_weight.T).log_softmax(-1)  # (T - 1, V)
    token_logps = logps.gather(1, ids[0, 1:, None])[:, 0]  # (T - 1,)
    return token_logps[len(pair[0]) - 1 :].sum()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with a tiny model and the byte tokenizer, in the form of a user's checkpoint."""
    tiny_model().save_pretrained(tmp_path / "init")
    byte_tokenizer().save(tmp_path / "init")
    return tmp_path / "init"


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", PAIR_ROWS)
