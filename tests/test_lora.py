"""LoRA: adapters against the dense sum W + s B A, against PEFT, and through a whole run."""

import json
import shutil

import pytest
import torch
from conftest import tiny_config, tiny_model, write_rows
from safetensors.torch import load_file, save_file
from test_resume import SAVED, refused, steps
from test_train import metrics, run
from torch.func import functional_call

import eval as evaluation
import mio
import train
from model import LINEARS, LORA_TARGETS, Llama, LoraConfig

TOKENS = torch.arange(48).view(2, 24) * 5 % 256
LORA = ("--lora_rank", "4", "--lr", "1e-2")


def adapted(lora: LoraConfig, **changes) -> Llama:
    """A model with adapters that do something: B is 0 only at the start."""
    model = tiny_model(**changes)
    model.add_lora(lora)
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
    model = adapted(LoraConfig(3, 6.0, list(LINEARS), rslora), **changes).double()
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
    merged = model.merge_lora(torch.float64)
    torch.testing.assert_close(merged(TOKENS), expected, rtol=0, atol=1e-12)
    assert merged.state_dict().keys() == tiny_model(**changes).state_dict().keys()
    assert torch.equal(merged.merge_lora(torch.float64)(TOKENS), merged(TOKENS))  # nothing is left


def test_adapters_go_where_they_are_asked_to_and_start_as_peft_has_them():
    for targets in (LORA_TARGETS["attention"], ["v_proj"], ["layers.1.self_attn.k_proj"]):
        model = tiny_model()
        model.add_lora(LoraConfig(2, 4, list(targets)))
        found = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora" in name}
        every = [f"model.{name}" for name, _ in model.model.named_modules()]
        assert found == {name for name in every if name.endswith(tuple(targets))}
    assert torch.equal(tiny_model()(TOKENS), model(TOKENS))
    a = model.get_parameter("model.layers.1.self_attn.k_proj.lora_A.weight").detach()
    assert a.abs().max() <= 32**-0.5 and a.std() == pytest.approx((3 * 32) ** -0.5, rel=0.2)


def test_a_frozen_head_costs_no_gradient(monkeypatch):
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    rest = (torch.arange(9), torch.tensor([4, 5]), torch.zeros(2), "mio")
    mio.fused_pair_loss(hidden, head, *rest, beta=1.0)[0].sum().backward()
    expected, hidden.grad = hidden.grad, None
    monkeypatch.setattr(mio, "_add_product", None)  # would make the head's
    losses, _ = mio.fused_pair_loss(hidden, head.detach(), *rest, beta=1.0)
    saved = [x for x in losses.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in saved] == [hidden.shape]
    losses.sum().backward()
    torch.testing.assert_close(hidden.grad, expected)


# --- A run ----------------------------------------------------------------------------------------


def test_a_run_trains_the_adapters_alone_and_merges_them(checkpoint, pairs_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = run(checkpoint, pairs_file, tmp_path / "out", *LORA, *SAVED)
    rows = metrics(out)
    assert rows[0]["eval_rewards/margins"] == 0 and rows[-1]["eval_rewards/margins"] > 0.1
    base, newest = load_file(checkpoint / "model.safetensors"), train.newest_checkpoint(out)
    moments = load_file(newest / "training.safetensors").keys()
    adapters = load_file(out / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in adapters}
    assert {n.split(".", 2)[2] for n in moments if n.startswith("moments.")} == names
    assert not (newest / "model.safetensors").exists()
    merged = load_file(out / "model.safetensors")
    for name, weight in base.items():
        a = f"base_model.model.{name.removesuffix('weight')}lora_A.weight"
        b = a.replace("lora_A", "lora_B")
        change = 2 * adapters[b] @ adapters[a] if a in adapters else 0
        assert torch.equal(merged[name], weight + change) and (a in adapters) == ("_proj" in name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits
    torch.testing.assert_close(logits(Llama.from_pretrained(out)), theirs, rtol=0, atol=1e-4)


def test_frozen_weights_stay_to_the_bit(checkpoint, pairs_file, tmp_path):
    flags = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "out", *LORA]
    options, _ = train.parse_options([*map(str, flags), "--weight_decay", "0.1"])
    job = train.load_job(options)
    (tmp_path / "out").mkdir()
    train.train(job, train.load_progress(job), [])
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(job.model.get_parameter(name), weight)
    assert all(p.any() for n, p in job.model.named_parameters() if "lora_B" in n)


def test_each_flag_does_something(checkpoint, pairs_file, tmp_path):
    first = run(checkpoint, pairs_file, tmp_path / "first", *LORA)
    changes = [("--lora_rank", "2"), ("--lora_alpha", "2"), ("--lora_targets", "attention"),
               ("--lora_rslora",), ("--checkpointing", "on"),
               ("--init_adapter", str(first / "adapter"))]  # fmt: skip
    for flags in changes:
        own = LORA[2:] if flags[0] == "--init_adapter" else LORA
        out = run(checkpoint, pairs_file, tmp_path / "out", *own, *flags, "--overwrite")
        assert (metrics(out) == metrics(first)) == (flags[0] == "--checkpointing"), flags
    assert metrics(out)[0]["eval_rewards/margins"] == 0  # the reference has the adapter, too
    before, after = metrics(first)[-1]["eval_logps/chosen"], metrics(out)[0]["eval_logps/chosen"]
    assert after == pytest.approx(before)
    start = run(checkpoint, pairs_file, tmp_path / "start", *own, *flags, "--max_steps", "0")
    argv = [str(start), "--data", str(pairs_file), "--kl_samples", "0"]
    (figures,) = evaluation.main(argv).values()
    assert abs(figures["Δ chosen"]) < 1e-4


def test_a_bfloat16_base_has_the_reference_of_full_training(
    checkpoint, pairs_file, tmp_path, capsys
):
    half = ("--dtype", "bfloat16", "--max_steps", "2")
    run(checkpoint, pairs_file, tmp_path / "full", *half)
    capsys.readouterr()
    out = run(checkpoint, pairs_file, tmp_path / "out", *LORA, *half)
    said = capsys.readouterr().out
    assert "reference log-probs: found" in said and "rewards 0 within 0.0e+00" in said
    move = float(said.partition("merged in bfloat16: logits move by at most ")[2].split()[0])
    assert 1e-4 < move < 1
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("flags", [[], ["--init_adapter"], ["--loss", "rlhf"], ["--on_policy"]])
def test_n_steps_and_n_more_are_two_n_steps(
    flags, checkpoint, pairs_file, tmp_path, monkeypatch, capsys
):
    data, own = pairs_file, [*LORA, *flags]
    if "--init_adapter" in flags:
        first = run(checkpoint, pairs_file, tmp_path / "first", *LORA)
        own = [*LORA[2:], *flags, str(shutil.copytree(first / "adapter", tmp_path / "adapter"))]
    elif flags:
        monkeypatch.setattr(train.evaluation, "grade_drawn", lambda i, t, answer: answer[0] % 2 / 1)
        rows = [{"prompt": f"{i}?", "answer": "1", "grade": "exact"} for i in range(20)]
        data = write_rows(tmp_path / "questions.jsonl", rows)
        own += ["--eval_data", str(pairs_file), "--max_new_tokens", "4", "--samples", "4"]
    whole = run(checkpoint, data, tmp_path / "whole", *own, *SAVED, "--max_steps", "4")
    half = run(checkpoint, data, tmp_path / "half", *own, *SAVED, "--max_steps", "2")
    train.main(["--resume", "--out", str(half), "--max_steps", "4"])
    assert metrics(half) == metrics(whole) and steps(half) == [2, 4]
    for name in ("adapter_model.safetensors", "training.safetensors", "../../model.safetensors"):
        a, b = (folder / "checkpoints" / "step-000004" / name for folder in (half, whole))
        assert a.read_bytes() == b.read_bytes()
    tiny_model(seed=3).save_pretrained(checkpoint)  # a checkpoint has no frozen weights of its own
    again = ("--resume", "--out", half, "--max_steps", "5")
    assert f"--init {checkpoint}: not what the run" in refused(capsys, *again)


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.fixture
def peft(checkpoint):
    """A maker of PEFT models over the checkpoint, with random B."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def make(**changes):
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
        model = library.get_peft_model(base, library.LoraConfig(**config))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return model

    return make


@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True, "lora_alpha": 3}, {"target_modules": ["v_proj", "mlp.up_proj"]},
])  # fmt: skip
def test_peft_to_ours_and_back(changes, peft, checkpoint, pairs_file, tmp_path):
    theirs = peft(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    flags = ("--init_adapter", str(tmp_path / "theirs"), "--max_steps")
    out = run(checkpoint, pairs_file, tmp_path / "none", *flags, "0")
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits(Llama.from_pretrained(out)), expected, rtol=0, atol=1e-4)
    out = run(checkpoint, pairs_file, tmp_path / "out", *flags, "3")
    base = theirs.unload()
    again = pytest.importorskip("peft").PeftModel.from_pretrained(base, out / "adapter")
    ours = logits(Llama.from_pretrained(out))
    torch.testing.assert_close(ours, again(TOKENS).logits, rtol=0, atol=1e-4)
    assert (ours - expected).abs().max() > 1e-2


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "match"), [
    (["--lora_rank", "0"], "--lora_rank 0: must be at least 1"),
    (["--lora_rank", "-1"], "--lora_rank -1: must be at least 1"),
    (["--lora_rank", "17"], "init: LoRA rank 17: must be from 1 to 16, a target's width"),
    (["--lora_rank", "2", "--lora_targets", "q_proj,c_attn"], "'c_attn': choose from q_proj, k_pr"),
    (["--lora_rank", "2", "--lora_targets", "lm_head"], "'lm_head': choose from q_proj"),
    (["--lora_rank", "2", "--lora_alpha", "0"], "--lora_alpha 0.0: must be more than 0"),
    (["--lora_alpha", "8"], "--lora_alpha needs --lora_rank"),
    (["--lora_targets", "all"], "--lora_targets needs --lora_rank"),
    (["--lora_rslora"], "--lora_rslora needs --lora_rank"),
    (["--init_adapter", "ADAPTER", "--lora_rank", "2"], "--lora_rank: --init_adapter has its own"),
    (["--init_adapter", "gone"], "gone/adapter_config.json: No such file"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, match, checkpoint, pairs_file, tmp_path, capsys):
    command = ["--init", checkpoint, "--data", pairs_file, "--out", tmp_path / "out", *flags]
    assert match in refused(capsys, *command) and not (tmp_path / "out").exists()


def test_adapters_that_would_be_computed_wrongly_are_refused(
    checkpoint, pairs_file, tmp_path, capsys
):
    first = run(checkpoint, pairs_file, tmp_path / "first", *LORA, "--max_steps", "1")
    adapter, argv = tmp_path / "adapter", ["--init", checkpoint, "--data", pairs_file]
    argv += ["--out", tmp_path / "out", "--init_adapter", adapter]
    config = json.loads((first / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(first / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    def refusal(changes=None, tensors=tensors):
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
        save_file(tensors, adapter / "adapter_model.safetensors")
        return refused(capsys, *argv)

    for key, value in {
        "peft_type": "IA3", "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"],
        "rank_pattern": {"q_proj": 2}, "init_lora_weights": "pissa", "fan_in_fan_out": True,
        "layers_to_transform": [0], "target_modules": ".*proj", "r": None, "new": 1,
    }.items():  # fmt: skip
        assert f"adapter_config.json: {key} " in refusal({key: value})
    assert "LoRA rank 17" in refusal({"r": 17})
    assert f"adapter_model.safetensors: {name} has shape (4, 8)" in refusal(
        tensors=tensors | {name: torch.zeros(4, 8)}
    )
    assert f"tensor {name} is missing, 1 in all" in refusal(
        tensors={n: t for n, t in tensors.items() if n != name}
    )
    assert "unexpected tensor base_model.model.model.layers.2" in refusal(
        tensors=tensors | {name.replace("1", "2"): tensors[name] + 0}
    )
    assert "not finite" in refusal(tensors=tensors | {name: tensors[name] / 0})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "no adapter_model.safetensors in it" in refused(capsys, *argv)
    inside = ["--init_adapter", first / "adapter", "--out", first, "--overwrite"]
    assert "lies there" in refused(capsys, *argv[:4], *inside)
    assert not (tmp_path / "out").exists()
