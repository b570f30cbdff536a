"""--average_logps on a real checkpoint, against a plain loop over the logits of transformers."""

import math

import pytest
import torch
from conftest import SHARED, needs_shared
from torch.nn.functional import softplus

import train
from data import LAYOUT, StepData, load_pairs, load_tokenizer, make_batches
from eval import pair_logps
from model import Llama

BETA = 0.5


def mean_logp(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The mean log-prob () of an answer's tokens, its end token included."""
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0].double().log_softmax(-1)
    first = len(prompt) - 1  # this position predicts the answer's first token
    return torch.stack([logps[first + i, id] for i, id in enumerate(answer)]).mean()


@needs_shared
@torch.no_grad()
def test_mio_with_average_logps_is_a_loop_over_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "models" / "gsm-llama"
    tokenizer, model = load_tokenizer(folder), Llama.from_pretrained(folder)
    pairs = load_pairs(SHARED / "data" / "gsm8k-pairs.jsonl", tokenizer)[:8]
    ref_logps = pair_logps(model, pairs, *LAYOUT, torch.float32)
    flags = {"loss": "mio", "beta": BETA, "average_logps": True, "lr": 0.0, "device": "cpu"}
    options = train.Options(**flags)
    data = StepData(make_batches(pairs, range(8), *LAYOUT), ref_logps, pairs=pairs)

    def losses_of(model) -> torch.Tensor:
        with torch.enable_grad():
            return train.train_step(model, train.make_optimizer(model, options), data, options)[0]

    torch.testing.assert_close(losses_of(model), torch.full((8,), math.log(4)), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    index = [i for batch in data.batches for i in batch.index]
    found = dict(zip(index, losses_of(model).tolist()))
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        t_w, t_l = (
            BETA * (mean_logp(policy, prompt, y) - mean_logp(reference, prompt, y))
            for y in (chosen, rejected)
        )
        expected = softplus(-t_w) + softplus(t_w) / 2 + softplus(t_l) / 2
        assert found[i] == pytest.approx(expected.item(), abs=1e-5)
        assert abs(expected - math.log(4)) > 1e-3  # the policy has moved
