"""The transformer against transformers': logits, files, generation; and what it must refuse."""

import json

import pytest
import torch
from conftest import LLAMA3_ROPE, SHARED, needs_shared, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

import model as model_module
from model import Llama, ModelConfig, sample

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
    """Norms and biases too, which start at one and zero."""
    model = tiny_model(seed=1, **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator))
    return model


def logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens) @ model.head_weight.T


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers_in_both_directions(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(changes)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(0, 258, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.abs().max() > 3  # logits that could disagree
        assert (logits(ours, tokens) - expected).abs().max() <= 1e-4
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        back = Llama.from_pretrained(tmp_path / "theirs")
        assert (logits(back, tokens) - expected).abs().max() <= 1e-4
    assert back.config == ours.config
    prompts = [[256, *range(n)] for n in (3, 30)]
    for prompt, answer in zip(prompts, ours.generate(prompts, 12, temperature=0)):
        more = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answer == more[0, len(prompt) :].tolist()


@needs_shared
def test_real_checkpoint_has_transformers_logits_and_greedy_answers():
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "models/gsm-llama"
    ours = Llama.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 900), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (logits(ours, tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    prompts = [[4080, *range(300, 300 + n)] for n in (1, 40, 7)]
    answers = ours.generate(prompts, 30, temperature=0, stop_ids={4081})
    for prompt, answer in zip(prompts, answers):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        assert answer == expected[0, len(prompt) :].tolist()


def test_initialisation_is_normal_with_the_configured_deviation():
    model = tiny_model(hidden_size=128, head_dim=32, initializer_range=0.02, attention_bias=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == ("norm" in name)).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(parameter.mean().item()) < 0.002


def test_a_token_does_not_depend_on_later_ones():
    model = tiny_model()
    embedded = model.model["embed_tokens"].weight
    hidden = model(torch.arange(10)[None])
    for position in (0, 4, 8):
        (gradient,) = torch.autograd.grad(hidden[0, position].sum(), embedded, retain_graph=True)
        assert (gradient[position + 1 : 10] == 0).all() and (gradient[: position + 1] != 0).any()


def test_checkpointing_changes_no_gradient():
    model, tokens = tiny_model(), torch.arange(20)[None]
    gradients, calls = [], []
    model.model["layers"][0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(calls) == 3  # once, then twice: forward and again going back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_float_type_come_back_as_they_were(dtype, tmp_path):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] in str(dtype)
    back = Llama.from_pretrained(tmp_path, dtype=dtype)
    wide = Llama.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, back.get_parameter(name))
        assert torch.equal(parameter.float(), wide.get_parameter(name))
        assert wide.get_parameter(name).requires_grad


def test_shards_are_written_read_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "MAX_SHARD_BYTES", 20_000)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    back = Llama.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    monkeypatch.undo()
    tiny_model(seed=5).save_pretrained(tmp_path)  # no old shard may be found again
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == (
        tmp_path / "config.json"
    ).stat().st_mode & 0o044


# --- Configurations -------------------------------------------------------------------------------


def test_config_reads_old_and_new_rope_and_survives_a_round_trip():
    hf = tiny_config().to_hf()
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        hf.pop(key)
    new = hf | {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}}
    old = hf | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    older_scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"} | {"type": "llama3"}
    expected = tiny_config(rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    for form in (new, old, old | {"rope_scaling": older_scaling}):
        assert ModelConfig.from_hf(form) == expected
    assert ModelConfig.from_hf(expected.to_hf()) == expected
    assert ModelConfig.from_hf(hf).rope_theta == 10000.0
    zero = tiny_config(bos_token_id=0, eos_token_id=0)  # an id, not a feature switched off
    assert ModelConfig.from_hf(zero.to_hf()) == zero
    qwen = hf | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 9}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    few = {k: v for k, v in hf.items() if k not in ("num_key_value_heads", "head_dim")}
    assert ModelConfig.from_hf(few).num_key_value_heads == 4
    assert ModelConfig.from_hf(few).head_dim == 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": []}, "model_type"),
        ({"layer_types": 3}, "layer_types"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"sliding_window": 5}, "sliding_window = 5 is not implemented for llama"),
        ({"model_type": "mistral", "sliding_window": -5}, "sliding_window"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
        ({"rope_parameters": [1]}, "rope_scaling"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"hidden_size": 2**39}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"bos_token_id": "x"}, "bos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_configurations_that_would_be_computed_wrongly_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(tiny_config().to_hf() | change)


# --- Files ----------------------------------------------------------------------------------------


def tamper(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_tied_checkpoint_may_not_bring_a_head(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tamper(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(258, 32)}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        Llama.from_pretrained(tmp_path)


# --- Generation -----------------------------------------------------------------------------------


def greedy_without_cache(model: Llama, prompt, count, stop_ids):
    """The oracle of generate: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def test_greedy_generation_of_mixed_lengths_equals_the_uncached_loop():
    model = tiny_model(rope_scaling=LLAMA3_ROPE)
    prompts = [[256, *range(n)] for n in (0, 30, 3, 11, 12, 1, 50)]
    stop_ids = set(range(0, 258, 12))  # many, so that rows end at different times
    got = model.generate(prompts, 25, temperature=0, stop_ids=stop_ids)
    assert got == [greedy_without_cache(model, p, 25, stop_ids) for p in prompts]
    assert len({len(answer) for answer in got}) > 3
    many, done = prompts + prompts[:3] * 2, []  # the same ones again, few at work at a time
    for rows in (1, 3, 9):
        again = model.generate(many, 25, 0, stop_ids=stop_ids, rows=rows, progress=done.append)
        assert again == got + got[:3] * 2 and sorted(done) == sorted(again)
        done.clear()
    window = tiny_model(sliding_window=7, model_type="mistral")
    expected = [greedy_without_cache(window, p, 25, stop_ids) for p in prompts]
    assert window.generate(prompts, 25, 0, stop_ids=stop_ids, rows=2) == expected
    for answer in got:
        assert len(answer) == 25 or answer[-1] in stop_ids
        assert not stop_ids & set(answer[:-1])


def test_sampling_is_seeded_and_a_row_does_not_depend_on_who_stops():
    model, prompts = tiny_model(), [[256, 5], [256, 7, 9], [256]]
    first = model.generate(prompts, 20, seed=3)
    assert first == model.generate(prompts, 20, seed=3) != model.generate(prompts, 20, seed=4)
    stop = {first[0][4]}
    for long, short in zip(first, model.generate(prompts, 20, seed=3, stop_ids=stop)):
        cut = next((i + 1 for i, token in enumerate(long) if token in stop), 20)
        assert short == long[:cut]
    assert first == model.generate(prompts, 20, seed=3, rows=1)
    asked = model.generate(prompts, 20, seed=3, is_over=lambda i, ids: i == 1 and len(ids) > 3)
    assert asked[0] == first[0] and asked[2] == first[2]  # asked every eight tokens or sooner
    assert asked[1] == first[1][: len(asked[1])] and 3 < len(asked[1]) < 12


def test_sample_draws_from_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])).expand(20_000, 5)
    luck = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = sample(logits, 1.0, 1.0, luck).bincount(minlength=5) / 20_000
    torch.testing.assert_close(share, logits[0].exp(), rtol=0, atol=0.015)
    sharp = logits[0].mul(2).softmax(-1)
    share = sample(logits, 0.5, 1.0, luck).bincount(minlength=5) / 20_000
    torch.testing.assert_close(share, sharp, rtol=0, atol=0.015)
    nucleus = torch.tensor([0.5, 0.2, 0.2, 0.0, 0.0]) / 0.9  # the smallest set that reaches 0.75
    share = sample(logits, 1.0, 0.75, luck).bincount(minlength=5) / 20_000
    torch.testing.assert_close(share, nucleus, rtol=0, atol=0.015)
    assert (sample(logits, 0.0, 1.0, luck) == 0).all()
    flat = sample(torch.zeros(2000, 4000), 1.0, 0.5, luck[:2000])  # the nucleus is half of them all
    assert len(flat.unique()) > 1024
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample(logits[:2].flip(-1), 1.0, 1.0, ends).tolist() == [1, 4]
