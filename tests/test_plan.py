"""train.py --plan against what a model and its step really have: its counts are derived by hand."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import eval as evaluation
import train
from data import Pair, make_batches
from model import Llama
from train import Options, needs

TOTALS = {"1b": 1235814400, "3b": 3212749824, "8b": 8030261248, "70b": 70553706496}
CONFIGS = [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True},
           {"model_type": "qwen3", "qk_norm": True}, {"num_key_value_heads": 4}]  # fmt: skip
RNG = np.random.default_rng(0)
PAIRS = [Pair(*(RNG.integers(0, 256, n).tolist() for n in (20, 30 + i, 27))) for i in range(3)]
LORA = {"lora_rank": 4, "lora_alpha": 4.0, "lora_targets": "all"}


def built(config, options) -> Llama:
    model = Llama(config)
    if options.lora_rank:
        train.add_adapters(model, options)
    model.checkpointing = options.checkpointing == "on"
    return model


def planned(config, options, batches):
    return needs(config, options, batches[0].rows, batches[0].lengths.tolist(), len(batches))


def options_of(**changes) -> Options:
    return Options(beta=0.2, lr=1e-3, device="cpu", **changes)


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("lora", [{}, LORA])
def test_weights_gradients_and_moments_are_those_of_a_step(changes, lora):
    config, options = tiny_config(**changes), options_of(**lora)
    model, batches = built(config, options), make_batches(PAIRS, [0, 1], 128, 4096)
    optimizer, found = train.make_optimizer(model, options), planned(config, options, batches)
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    )
    train.train_step(model, optimizer, batches, options, torch.zeros(3, 2))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(gradients)
    moments = train.get_moments(model, optimizer).items()
    assert found.moments == sum(m.nbytes for name, m in moments if name.startswith("exp_avg"))


def test_presets_have_their_makers_count_of_parameters(capsys):
    assert [name.split("-")[2] for name in train.PRESETS] == list(TOTALS)
    for name, total in zip(train.PRESETS, TOTALS.values()):
        with pytest.raises(SystemExit, match="0"):
            train.main(["--plan", name])
        text = capsys.readouterr().out
        assert f"{total:,} parameters" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("dtype", train.DTYPES)
@pytest.mark.parametrize("more", [{}, {"checkpointing": "on"}, LORA])
def test_activations_are_what_autograd_keeps(changes, dtype, more):
    """Storages that the forward pass saves, the weights aside; rounded weights count."""
    config, options = tiny_config(num_hidden_layers=4, **changes), options_of(dtype=dtype, **more)
    model, (batch,) = built(config, options), make_batches(PAIRS, [0, 1, 2], 128, 4096)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, evaluation.autocast(torch.device("cpu"), getattr(torch, dtype)):
        hidden = evaluation.answer_states(model, batch)  # kept alive: so are the storages
    saved = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    if options.checkpointing == "on":  # what lies out of the hooks' sight
        saved += 8 * config.head_dim * len(batch.pair)  # the rotary table, in a tuple
        if dtype == "bfloat16":  # rounded weights, in autocast's cache
            saved += sum(2 * p.numel() for p in model.model["layers"].parameters() if p.dim() > 1)
    found = planned(config, options, [batch]).activations
    # Without ids and norms' factors, a few bytes a token; with a frozen model's first norm.
    assert found == pytest.approx(saved, rel=0.06 if options.lora_rank else 0.025)
    del hidden


@pytest.mark.parametrize("changes", CONFIGS[:1] + CONFIGS[3:])
@pytest.mark.parametrize("more", [{}, {"checkpointing": "on"}, {"loss": "dv"}, LORA])
def test_operations_are_those_of_the_counter(changes, more):
    def product(_, a, b, **__):
        return 2 * a[0] * a[1] * b[1]

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))

    def backward(gradient, q, k, v, *_, **__):
        return sdpa_backward_flop_count(gradient, q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))

    ops = torch.ops.aten
    mapping = {ops._scaled_dot_product_flash_attention_for_cpu: attention, ops.addmm_: product,
               ops._scaled_dot_product_flash_attention_for_cpu_backward: backward}  # fmt: skip
    config, options = tiny_config(num_hidden_layers=4, **changes), options_of(**more)
    model, batches = built(config, options), make_batches(PAIRS, [0, 1, 2], 128, 4096)
    optimizer = train.make_optimizer(model, options)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        train.train_step(model, optimizer, batches, options, torch.zeros(3, 2))
    found = planned(config, options, batches).flops
    # Nothing flows into a frozen embedding: the first block computes less than the others.
    assert found == pytest.approx(
        counter.get_total_flops(), rel=0.06 if options.lora_rank else 1e-9
    )


def test_the_head_has_its_gradient_a_chunk_of_logits_and_states():
    options, batches = options_of(), make_batches(PAIRS, [0, 1, 2], 128, 4096)
    V, D = 4096, 32
    config = tiny_config(vocab_size=V)
    N = sum(map(int, batches[0].lengths))
    assert N < train.CHUNK_TOKENS  # one chunk
    head = 4 * (V * D + N * V + 4 * N * D)
    assert planned(config, options, batches).head == head
    one, many = (needs(config, options, [99], [40, 40], micros) for micros in (1, 2))
    assert many.peak - one.peak == pytest.approx(one.gradients)  # that wait for the second pass


def test_gpus_share_what_stays_and_borrow_what_is_at_work():
    step = (tiny_config(), options_of(), [99], [40, 40])
    one, two, four = (needs(*step, gpus=gpus) for gpus in (1, 2, 4))
    assert (two.gradients, two.moments) == (one.gradients / 2, one.moments / 2)
    assert two.weights - four.weights == one.weights / 4  # they borrow alike
    assert two.weights > one.weights / 2


def test_plan_reads_config_alone_and_writes_nothing(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "init"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        train.main(["--plan", "--init", "init", "--gpu", "rtx4090", "--batch_size", "3"])
    assert capsys.readouterr().out.startswith("init, float32, on one rtx4090 of 24 GB: fits\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["init", "config.json"]


def printed(capsys, *flags: str) -> list[str]:
    with pytest.raises(SystemExit, match="0"):
        train.main(["--plan", "llama-3.1-8b", *flags])
    return capsys.readouterr().out.splitlines()


def test_what_a_verdict_advises_fits_and_fewer_gpus_do_not(capsys):
    first, full, lora, *_ = table = printed(capsys)
    assert first == "llama-3.1-8b, float32, on one h100 of 80 GB: does not fit"
    assert full == "  it does with 4 GPUs --checkpointing on"
    recomputed = next(i for i, line in enumerate(table) if line.startswith("  recomputed"))
    assert ["*" in line for line in table[recomputed:][:4]] == [False, False, True, True]
    assert printed(capsys, *lora.removeprefix("  it does with ").split())[0].endswith(": fits")


BAD = {
    "unknown": (["--plan", "llama-9"], "--plan llama-9: choose from init, llama-3.2-1b, "),
    "no folder": (["--plan"], "--init FOLDER"),
    "both": (["--plan", "llama-3.2-1b", "--init", "x"], "--init FOLDER"),
    "nothing there": (["--plan", "--init", "empty"], "config.json"),
    "no object": (["--plan", "--init", "list"], "expected a JSON object"),
    "other model": (["--plan", "--init", "gpt2"], "model_type 'gpt2' is not supported"),
    "rank": (["--plan", "llama-3.2-1b", "--lora_rank", "4096"], "LoRA rank 4096"),
    "drawn": (["--plan", "llama-3.2-1b", "--loss", "rlhf"], "leave out"),
    "alone": (["--mfu", "0.5"], "--mfu needs --plan"),
    "share": (["--plan", "llama-3.2-1b", "--mfu", "2"], "at most 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, capsys, monkeypatch):
    for name, text in {"list": "[]", "gpt2": '{"model_type": "gpt2"}', "empty": None}.items():
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    argv, message = BAD[case]
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and not captured.out
    assert not (tmp_path / "out").exists()
