"""LoRA: adapters against the dense sum W + s B A, against PEFT, and through complete runs."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_config, tiny_model, write_rows
from runs import differences, metrics, refused, run
from safetensors.torch import load_file
from torch.func import functional_call

import train
from model import Llama
from support.lora import (
    LINEARS,
    LORA_TARGETS,
    LoraConfig,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)

TOKENS = torch.arange(48).view(2, 24) * 5 % 256


def adapted(lora: LoraConfig, **changes) -> Llama:
    """A model with adapters that change its output: B is random, while training starts B at 0."""
    model = tiny_model(**changes)
    add_lora(model, lora)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        if "lora_B" in name:
            assert not p.any()
            torch.nn.init.normal_(p, std=0.1)
    return model


def logits(model: Llama) -> torch.Tensor:
    return model(TOKENS) @ model.head_weight.T


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "qkv_bias": True}])
def test_values_and_gradients_are_those_of_the_dense_sum(changes, rslora):
    lora = LoraConfig(3, 6.0, list(LINEARS), rslora)
    model = adapted(lora, **changes).double()
    dense = dict(tiny_model(**changes).double().named_parameters())
    adapters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()
                if ".lora_" in n}  # fmt: skip
    for name in [name for name in adapters if "lora_A" in name]:
        a, b = adapters[name], adapters[name.replace("lora_A", "lora_B")]
        weight = name.replace("lora_A.", "")
        dense[weight] = dense[weight].detach() + (6 / 3**0.5 if rslora else 2) * b @ a
    expected = functional_call(Llama(tiny_config(**changes)).double(), dense, (TOKENS,))
    hidden = model(TOKENS)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(expected.cos().sum(), list(adapters.values()))
    hidden.cos().sum().backward()
    for name, gradient in zip(adapters, gradients):
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
        assert found.any()
    merged = merge_lora(model, torch.float64)
    torch.testing.assert_close(merged(TOKENS), expected, rtol=0, atol=1e-12)
    assert merged.state_dict().keys() == tiny_model(**changes).state_dict().keys()
    assert torch.equal(merge_lora(merged, torch.float64)(TOKENS), merged(TOKENS))


def test_adapters_go_to_their_targets_and_start_as_in_peft():
    assert LORA_TARGETS["attention"] == ("q_proj", "k_proj", "v_proj", "o_proj")
    for targets in (LORA_TARGETS["attention"], ["v_proj"], ["layers.1.self_attn.k_proj"]):
        model = tiny_model()
        add_lora(model, LoraConfig(2, 4, list(targets)))
        found = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora" in name}
        every = [f"model.{name}" for name, _ in model.model.named_modules()]
        assert found == {name for name in every if name.endswith(tuple(targets))}
    assert torch.equal(tiny_model()(TOKENS), model(TOKENS))
    a = model.get_parameter("model.layers.1.self_attn.k_proj.lora_A.weight").detach()
    assert a.abs().max() <= 32**-0.5 and a.std() == pytest.approx((3 * 32) ** -0.5, rel=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_linear_weights_are_stored_in_the_precision_of_the_products(tied):
    model = tiny_model(tie_word_embeddings=tied)
    add_lora(model, LoraConfig(2, 4, ["v_proj"]), torch.bfloat16)
    for name, p in model.named_parameters():
        half = ("_proj" in name or name == "lm_head.weight") and ".lora_" not in name
        assert p.dtype == (torch.bfloat16 if half else torch.float32), name
    linear = model.model["layers"][0].self_attn.v_proj
    torch.nn.init.normal_(linear.lora_B.weight)
    weight, change = linear.weight, 2 * linear.lora_B.weight @ linear.lora_A.weight
    assert {p.dtype for p in merge_lora(model, torch.bfloat16).parameters()} == {torch.bfloat16}
    merged = model.model["layers"][0].self_attn.v_proj.weight
    assert torch.equal(merged, (weight + change).to(torch.bfloat16))  # summed in float32


def test_a_saved_adapter_comes_back(tmp_path):
    lora = LoraConfig(3, 7.5, ["v_proj", "mlp.up_proj"], use_rslora=True)
    model = adapted(lora)
    save_adapter(model, tmp_path / "adapter", "the/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"
    assert LoraConfig(*map(config.get, LoraConfig.__annotations__)) == lora
    back = tiny_model()
    add_lora(back, lora)
    load_adapter(back, tmp_path / "adapter")
    assert torch.equal(back(TOKENS), model(TOKENS))


@pytest.mark.parametrize(("lora", "message"), [
    (LoraConfig(17, 1, ["v_proj", "q_proj"]), "--lora_rank 17: choose 1 to 16, a target's small"),
    (LoraConfig(2, 1, ["q_proj", "c_attn"]), "--lora_targets 'c_attn': choose from q_proj, k_pro"),
    (LoraConfig(2, 1, ["lm_head"]), "--lora_targets 'lm_head': choose from q_proj"),
    (LoraConfig(2, 1, ["proj"]), "--lora_targets 'proj'"),
])  # fmt: skip
def test_adapters_without_a_place_are_refused(lora, message):
    with pytest.raises(ValueError) as error:
        add_lora(tiny_model(), lora)
    assert message in str(error.value)
    add_lora(tiny_model(), LoraConfig(16, 1, ["v_proj", "q_proj"]))  # the largest rank


# --- PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [
    LoraConfig(4, 8, list(LINEARS)), LoraConfig(4, 3, list(LINEARS), use_rslora=True),
    LoraConfig(4, 8, ["v_proj", "mlp.up_proj"]),
])  # fmt: skip
def test_an_adapter_of_peft_has_the_same_logits_here_and_back(lora, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(**dataclasses.asdict(lora), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Llama.from_pretrained(checkpoint)
    add_lora(ours, lora)
    load_adapter(ours, tmp_path / "theirs")
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)
    for name, p in ours.named_parameters():
        if ".lora_" in name:
            p.data.mul_(1.5)
    save_adapter(ours, tmp_path / "ours", str(checkpoint))
    back = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "ours")
    torch.testing.assert_close(logits(ours), back(TOKENS).logits, rtol=0, atol=1e-4)
    assert (logits(ours) - expected).abs().max() > 1e-2


# --- Runs -----------------------------------------------------------------------------------------

LORA = ("--lora_rank", "4", "--lr", "1e-2")


def test_a_run_trains_only_the_adapters_and_merges_them(checkpoint, pairs_file, tmp_path):
    flags = (*LORA, "--weight_decay", "0.1", "--save_every", "4", "--epochs", "2")
    out = run(checkpoint, pairs_file, tmp_path / "out", *flags)
    rows = metrics(out)
    assert rows[0]["eval_rewards/margins"] == 0 < 0.05 < rows[-1]["eval_rewards/margins"]
    base = load_file(checkpoint / "model.safetensors")
    adapters = load_file(out / "adapter/adapter_model.safetensors")
    newest = max((out / "checkpoints").iterdir())
    saved = {name for name in load_file(newest / "training.safetensors") if ".lora_" in name}
    assert len(saved) == 3 * len(adapters) and not (newest / "model.safetensors").exists()
    merged = load_file(out / "model.safetensors")
    for name, weight in base.items():  # frozen weights are unchanged to the bit
        a = f"base_model.model.{name.removesuffix('weight')}lora_A.weight"
        b = a.replace("lora_A", "lora_B")
        change = 2 * adapters[b] @ adapters[a] if a in adapters else 0
        assert torch.equal(merged[name], weight + change) and (a in adapters) == ("_proj" in name)


def test_each_flag_has_an_effect(checkpoint, pairs_file, tmp_path):
    first = run(checkpoint, pairs_file, tmp_path / "first", *LORA)
    for flags in [("--lora_rank", "2"), ("--lora_alpha", "2"), ("--lora_targets", "attention"),
                  ("--lora_rslora",), ("--checkpointing", "on")]:  # fmt: skip
        out = run(checkpoint, pairs_file, tmp_path / "out", *LORA, *flags, "--overwrite")
        assert (metrics(out) == metrics(first)) == (flags[0] == "--checkpointing"), flags
    run(checkpoint, pairs_file, out, "--overwrite", "--max_steps", "0")
    assert not (out / "adapter").exists()  # --overwrite removes the adapter of the run before


def test_a_bfloat16_base_has_the_reference_of_full_training(
    checkpoint, pairs_file, tmp_path, capsys
):
    half = ("--dtype", "bfloat16", "--max_steps", "2")
    run(checkpoint, pairs_file, tmp_path / "full", *half)
    capsys.readouterr()
    out = run(checkpoint, pairs_file, tmp_path / "out", *LORA, *half)
    printed = capsys.readouterr().out
    assert "rewards 0 within 0.0e+00" in printed
    change = float(printed.partition("log-probs change by at most ")[2].split()[0])
    assert 1e-4 < change < 1
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("flags", [[], ["--loss", "rlhf"]])
def test_n_steps_and_n_more_are_two_n_steps(flags, checkpoint, pairs_file, tmp_path, monkeypatch):
    data, own = pairs_file, [*LORA, *flags, "--save_every", "2"]
    if flags:
        rows = [{"prompt": f"{i}?", "answer": "1", "grade": "exact"} for i in range(20)]
        data = write_rows(tmp_path / "questions.jsonl", rows)
        own += ["--eval_data", str(pairs_file), "--max_new_tokens", "4", "--samples", "4"]
        # An exact answer is out of reach for a random model, so answers are graded by a byte.
        monkeypatch.setattr(
            "support.on_policy.grade_answer", lambda item, tokenizer, ids: float(ids[0] % 2)
        )
    own += ["--epochs", "4"]
    at_once = run(checkpoint, data, tmp_path / "at_once", *own, "--max_steps", "4")
    resumed = run(checkpoint, data, tmp_path / "resumed", *own, "--max_steps", "2")
    train.main(["--resume", "--out", str(resumed), "--max_steps", "4"])
    assert differences(resumed, at_once) == [] and len(metrics(resumed)) == 5
    tiny_model(seed=3).save_pretrained(checkpoint)  # the frozen weights are read from --init again
    error = refused("--resume", "--out", resumed, "--max_steps", "5")
    assert f"--init {checkpoint}: " in error


@pytest.mark.parametrize(("flags", "message"), [
    (["--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
    (["--lora_rank", "17"], "--lora_rank 17: choose 1 to 16, a target's smallest wi"),
    (["--lora_rank", "2", "--lora_targets", "q_proj,c_attn"], "'c_attn': choose from q_proj, k_pr"),
    (["--lora_rank", "2", "--lora_targets", "lm_head"], "'lm_head': choose from q_proj"),
    (["--lora_rank", "2", "--lora_alpha", "0"], "--lora_alpha 0: must be more than 0"),
    (["--lora_alpha", "8"], "--lora_alpha needs --lora_rank"),
    (["--lora_targets", "all"], "--lora_targets needs --lora_rank"),
    (["--lora_rslora"], "--lora_rslora needs --lora_rank"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_line(flags, message, checkpoint, pairs_file, tmp_path):
    command = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "out", *flags]
    assert message in refused(*command) and not (tmp_path / "out").exists()
