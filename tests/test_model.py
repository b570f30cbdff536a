"""The transformer against transformers': logits in both directions, gradients, generation."""

import pytest
import torch
from conftest import LLAMA3_ROPE, SHARED, needs_shared, tiny_model

from model import Llama
from support.sampling import sample

CONFIGS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral, no window": {"model_type": "mistral", "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 16},
    "qwen3 biases": {"model_type": "qwen3", "qk_norm": True, "attention_bias": True},
}


def random_model(changes: dict) -> Llama:
    """A model whose norms and biases are random, too; they start at one and zero."""
    model = tiny_model(seed=1, **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator))
    return model


def logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens) @ model.head_weight.T  # (B, T, V)


# --- The forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_those_of_transformers_in_both_directions(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(changes)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(0, 258, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.abs().max() > 3  # the logits are far from zero and could disagree
        assert (logits(ours, tokens) - expected).abs().max() <= 1e-4
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        back = Llama.from_pretrained(tmp_path / "theirs")
        assert (logits(back, tokens) - expected).abs().max() <= 1e-4
    assert back.config == ours.config
    prompts = [[256, *range(n)] for n in (3, 30)]
    for prompt, answer in zip(prompts, ours.generate(prompts, 8, temperature=0)):
        generated = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert answer == generated[0, len(prompt) :].tolist()


@needs_shared
def test_a_real_checkpoint_has_the_logits_and_greedy_answers_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "models/gsm-llama"
    ours = Llama.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (logits(ours, tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    prompts = [[4080, *range(300, 300 + n)] for n in (1, 40, 7)]
    answers = ours.generate(prompts, 15, temperature=0, stop_ids={4081})
    for prompt, answer in zip(prompts, answers):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False)
        assert answer == expected[0, len(prompt) :].tolist()


def test_initialization_is_normal_with_the_configured_deviation():
    model = tiny_model(hidden_size=128, head_dim=32, initializer_range=0.02, attention_bias=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == ("norm" in name)).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(parameter.mean().item()) < 0.002


@pytest.mark.parametrize("window", [None, 3])
def test_a_token_depends_on_itself_and_the_tokens_of_its_window(window):
    changes = {"model_type": "mistral", "sliding_window": window, "num_hidden_layers": 1}
    model = tiny_model(**changes)
    embedded = model.model["embed_tokens"].weight
    hidden = model(torch.arange(10)[None])  # (1, 10, D)
    for position in (0, 4, 8):
        (gradient,) = torch.autograd.grad(hidden[0, position].sum(), embedded, retain_graph=True)
        seen = gradient[:10].any(dim=-1).nonzero()[:, 0].tolist()
        first = max(0, position + 1 - window) if window else 0
        assert seen == list(range(first, position + 1))


def test_a_mask_and_positions_separate_two_sequences_in_a_row():
    for changes in ({}, {"model_type": "mistral", "sliding_window": 4}):
        model = tiny_model(**changes)
        first, second = torch.arange(9)[None], torch.arange(50, 56)[None]
        tokens = torch.cat((first, second), dim=1)  # (1, 15)
        positions = torch.cat((torch.arange(9), torch.arange(6)))[None]
        mask = torch.block_diag(torch.ones(9, 9), torch.ones(6, 6)).bool().tril()[None, None]
        expected = torch.cat((model(first), model(second)), dim=1)
        torch.testing.assert_close(model(tokens, positions, mask), expected, rtol=0, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    model, tokens = tiny_model(), torch.arange(20)[None]
    gradients, calls = [], []
    model.model["layers"][0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(calls) == 3  # one forward pass, then one and its repetition in the backward pass


# --- Generation -----------------------------------------------------------------------------------


def generate_without_cache(model, prompt, count, stop_ids, uniform=None):
    """The oracle of generate: every token by a forward pass over all tokens before it. Greedy if
    uniform (count,) is None."""
    ids = list(prompt)
    for step in range(count):
        last = logits(model, torch.tensor([ids]))[0, -1:]  # (1, V)
        if uniform is None:
            ids.append(int(last.argmax()))
        else:
            ids.append(int(sample(last, 1.0, 1.0, uniform[step, None])))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_greedy_generation_of_mixed_lengths_equals_the_uncached_loop():
    prompts = [[256, *range(n)] for n in (0, 30, 3, 11, 12, 1, 50)]
    stop_ids = set(range(0, 258, 12))  # many, so that rows end at different times
    for changes in ({"rope_scaling": LLAMA3_ROPE}, {"model_type": "mistral", "sliding_window": 7}):
        model = tiny_model(**changes)
        expected = [generate_without_cache(model, p, 25, stop_ids) for p in prompts]
        assert model.generate(prompts, 25, temperature=0, stop_ids=stop_ids) == expected
        assert len({len(answer) for answer in expected}) > 3
        for answer in expected:
            assert len(answer) == 25 or answer[-1] in stop_ids
            assert not stop_ids & set(answer[:-1])


@torch.no_grad()
def test_sampled_answers_go_to_their_own_prompts():
    """40 prompts of mixed lengths, some of them equal, which finish at different times."""
    model = tiny_model(seed=7)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (40,), generator=generator).tolist()
    prompts = [torch.randint(0, 258, (n,), generator=generator).tolist() for n in lengths]
    prompts[10:14] = [prompts[3]] * 4
    stop_ids = set(range(0, 258, 12))
    uniform = torch.rand(20, 40, generator=torch.Generator().manual_seed(5))
    expected = [
        generate_without_cache(model, prompt, 20, stop_ids, uniform[:, i])
        for i, prompt in enumerate(prompts)
    ]
    assert len({len(answer) for answer in expected}) > 8
    finished = []
    how = {"stop_ids": stop_ids, "seed": 5, "progress": finished.append}
    for rows in (None, 1, 9):
        assert model.generate(prompts, 20, rows=rows, **how) == expected
        assert sorted(finished) == sorted(expected)
        finished.clear()
    how = {
        "stop_ids": stop_ids,
        "seed": 5,
        "is_done": lambda i, ids: i % 2 == 1 and len(ids) > 3,
    }
    for rows in (None, 9):
        for i, answer in enumerate(model.generate(prompts, 20, rows=rows, **how)):
            assert answer == expected[i][: len(answer)]
            if i % 2 == 0 or len(expected[i]) <= 3:
                assert answer == expected[i]
            else:
                assert 3 < len(answer) < 12


def test_sampling_is_seeded_and_an_answer_does_not_depend_on_the_rest_of_the_batch():
    model, prompts = tiny_model(), [[256, 5], [256, 7, 9], [256]]
    first = model.generate(prompts, 20, seed=3)
    assert first == model.generate(prompts, 20, seed=3) != model.generate(prompts, 20, seed=4)
    greedy = model.generate(prompts, 20, temperature=0)
    assert model.generate(prompts, 20, top_p=1e-6, seed=3) == greedy != first
    stop = {first[0][4]}
    for long, short in zip(first, model.generate(prompts, 20, seed=3, stop_ids=stop)):
        cut = next((i + 1 for i, token in enumerate(long) if token in stop), 20)
        assert short == long[:cut]
    asked = []

    def is_done(i, ids):
        asked.append((i, len(ids)))
        return i == 1 and len(ids) > 3

    answers = model.generate(prompts, 20, seed=3, is_done=is_done)
    assert answers[0] == first[0] and answers[2] == first[2]
    assert answers[1] == first[1][: len(answers[1])] and 3 < len(answers[1]) < 12
    assert {i for i, _ in asked} == {0, 1, 2} and max(length for _, length in asked) < 20


def test_sample_draws_from_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])).expand(20_000, 5)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    def shares(temperature, top_p):
        return sample(logits, temperature, top_p, uniform).bincount(minlength=5) / 20_000

    torch.testing.assert_close(shares(1.0, 1.0), logits[0].exp(), rtol=0, atol=0.015)
    torch.testing.assert_close(shares(0.5, 1.0), (2 * logits[0]).softmax(-1), rtol=0, atol=0.015)
    nucleus = torch.tensor([0.5, 0.2, 0.2, 0.0, 0.0]) / 0.9  # the smallest set that reaches 0.75
    torch.testing.assert_close(shares(1.0, 0.75), nucleus, rtol=0, atol=0.015)
    assert (sample(logits, 0.0, 1.0, uniform) == 0).all()
    # The nucleus of a uniform distribution is half of its 4,000 tokens.
    assert len(sample(torch.zeros(2000, 4000), 1.0, 0.5, uniform[:2000]).unique()) > 1024
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample(logits[:2].flip(-1), 1.0, 1.0, ends).tolist() == [1, 4]
