"""train.py --plan: every count against a real step or arithmetic by hand."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from conftest import tiny_config

import train
from data import Pair, StepData, answer_states, autocast, make_batches
from model import Llama
from support.lora import LORA_TARGETS, LoraConfig, add_lora
from support.plan import PRESETS, cost_of_longest_pairs, step_cost
from train import Options

TOTALS = {
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
}
CONFIGS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    {"model_type": "qwen3", "qk_norm": True},
]
RNG = np.random.default_rng(0)
PAIRS = [Pair(*(RNG.integers(0, 256, n).tolist() for n in (20, 30 + i, 27))) for i in range(3)]
LORA = {"lora_rank": 4, "lora_alpha": 4.0, "lora_targets": "all"}
RECOMPUTED = {"checkpointing": "on"}
BFLOAT16 = {"dtype": "bfloat16", "weights": "bfloat16"}


def options_of(**changes) -> Options:
    return Options(**{"beta": 0.2, "lr": 1e-3, "device": "cpu"} | changes)


def model_of(config, options) -> Llama:
    model = Llama(config)
    if options.lora_rank:
        lora = LoraConfig(options.lora_rank, options.lora_alpha, LORA_TARGETS["all"])
        add_lora(model, lora, getattr(torch, options.dtype))
    if options.weights == "bfloat16":
        model.to(torch.bfloat16)
    model.checkpointing = options.checkpointing == "on"
    model.float32 = options.dtype == "float32"
    return model


def planned(config, options, batches):
    lengths = batches[0].lengths.tolist()
    return step_cost(config, options, batches[0].row_lengths, lengths, len(batches))


# --- Against a real step --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, more",
    [(c, {}) for c in CONFIGS] + [(CONFIGS[2], LORA), (CONFIGS[1], BFLOAT16)],
)
def test_weights_gradients_and_moments_are_those_of_a_step(changes, more):
    config, options = tiny_config(**changes), options_of(**more)
    model, batches = model_of(config, options), make_batches(PAIRS, [0, 1], 128, 4096)
    optimizer, found = train.make_optimizer(model, options), planned(config, options, batches)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad for p in trained))
    train.train_step(model, optimizer, StepData(batches, torch.zeros(3, 2)), options)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(gradient.nbytes for gradient in gradients)
    states = [optimizer.state[p] for p in trained]
    assert found.moments == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)


@pytest.mark.parametrize(
    "changes, more",
    [(changes, {}) for changes in CONFIGS]
    + [
        (changes, more)
        for changes in (CONFIGS[0], CONFIGS[3])
        for more in (RECOMPUTED, LORA, {"weights": "bfloat16"})
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_saves(changes, dtype, more):
    """The storages that the forward pass saves, rounded weights included, other weights not."""
    config, options = tiny_config(num_hidden_layers=4, **changes), options_of(dtype=dtype, **more)
    model, (batch,) = model_of(config, options), make_batches(PAIRS, [0, 1, 2], 128, 4096)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast(torch.device("cpu"), getattr(torch, dtype)):
        hidden = answer_states(model, batch)  # must stay alive: it holds the storages
    tensors = [t for at, t in saved.items() if at not in weights and t.is_floating_point()]
    expected = sum(t.untyped_storage().nbytes() for t in tensors)
    if options.checkpointing == "on":  # holds more, which the hooks do not see:
        expected += 8 * config.head_dim * len(batch.pair)  # the rotary table, in a tuple
    found = planned(config, options, [batch]).activations
    # The factors of norms are left out; with adapters the first norm saves less than the others.
    assert found == pytest.approx(expected, rel=0.06 if options.lora_rank else 0.025)
    del hidden


# --- Against arithmetic by hand -------------------------------------------------------------------
# A block of tiny_config has 2 * 32 * (32 + 16) + 3 * 32 * 48 = 7,680 weights in matrices and 64 in
# norms; embedding and head have 258 * 32 = 8,256 each, the last norm 32. Two blocks: 32,032.


def test_bytes_by_hand():
    """16 tokens in rows of 10 and 6, with answers of 4 and 5, in float32 on a CPU."""
    found = step_cost(tiny_config(), options_of(), [10, 6], [4, 5])
    # For each token a block saves 32 + 32 + 32 + 48 inputs of matrices, two norms twice, q, k, v
    # and the output of attention, its log-sum-exp for 4 heads, and three factors of the MLP.
    per_token = 4 * (144 + 2 * 2 * 32 + (32 + 16 + 16 + 32) + 4 + 3 * 48)
    assert per_token == 2064
    blocks = 2 * (16 * per_token + 4 * (10**2 + 6**2))  # with the masks
    activations = blocks + 16 * 4 * (2 * 8 + 2 * 32)  # rotary table; the last norm saves 2 * 32
    assert (found.parameters, found.weights, found.gradients) == (32032, 128128, 128128)
    assert (found.moments, found.activations) == (256256, activations) == (256256, 72256)
    # 9 rows of logits; 9 states for the answers and 9 in a chunk, with their gradients.
    head = 4 * 8256 + 4 * 9 * 258 + 2 * 4 * 32 * (9 + 9)
    assert found.head == head == 46920
    # The peak comes in the backward pass of the last block: all gradients, and besides those of two
    # factors of the MLP, of the residual stream and of the norm.
    assert found.peak == 128128 + 256256 + 128128 + 16 * 4 * (2 * 48 + 2 * 32)
    # With long answers it comes in the head: activations, the head's gradient, logits and states.
    many = step_cost(tiny_config(), options_of(), [1000], [400, 500])
    assert many.head == 4 * 8256 + 4 * 900 * 258 + 8 * 32 * (900 + 900)
    assert many.peak == 128128 + 256256 + many.activations + many.head


def test_a_gpu_needs_what_its_kernels_need():
    """bfloat16 on one GPU: compiled attention has no mask."""
    step = [10, 6], [4, 5]
    cpu, eager, compiled, recomputed = (
        step_cost(tiny_config(), options_of(dtype="bfloat16", **changes), *step)
        for changes in (
            {},
            {"device": "cuda", "compile": "off"},
            {"device": "cuda"},
            {"device": "cuda", "checkpointing": "on"},
        )
    )
    assert eager.head - cpu.head == 4 * 9 * 258  # logits in float32 beside those in bfloat16
    masks = 2 * 2 * (10**2 + 6**2)  # bytes of a number, blocks
    assert eager.activations - compiled.activations == masks
    assert recomputed.activations == 2 * 16 * 4 * 32 + 16 * 4 * (2 * 8 + 2 * 32)  # no weights
    assert compiled.activations - recomputed.activations > 2 * 2 * 7680


def test_gradients_of_earlier_passes_wait():
    """With a vocabulary of 50,000 the gradient of the head is larger than all activations."""
    config = tiny_config(vocab_size=50_000)
    one, two, three = (step_cost(config, options_of(), [9], [4, 4], passes) for passes in (1, 2, 3))
    stored, head = one.weights + one.moments, 4 * 50_000 * 32
    assert one.peak == stored + one.gradients + 9 * 640
    assert two.peak == three.peak == stored + one.gradients + one.activations + one.head
    # A tied matrix has one gradient from the head, one from the embedding, one of earlier passes.
    config = tiny_config(vocab_size=50_000, tie_word_embeddings=True)
    one, two, three = (step_cost(config, options_of(), [9], [4, 4], passes) for passes in (1, 2, 3))
    assert one.peak == one.weights + one.moments + one.gradients + head
    assert two.peak == three.peak == one.peak + head


def test_a_gpu_copies_and_rounds_the_gradient_of_the_head():
    config, count = tiny_config(vocab_size=50_000), 50_000 * 32
    options = options_of(device="cuda", **RECOMPUTED, **BFLOAT16)
    found = step_cost(config, options, [9], [4, 4], passes=2)
    kept = found.weights + found.moments + found.gradients + found.activations
    assert found.peak == kept + (4 + 4 + 2) * count  # the gradient, its scaled copy, rounded


def test_pairs_are_as_long_as_they_may_be_and_passes_are_padded():
    """max_length 100: a prompt of 50 and two answers of 50 take 50 + 2 * 49 = 148 tokens."""
    config = tiny_config(max_position_embeddings=4096)
    flags = {"max_length": 100, "batch_size": 10, "micro_tokens": 500}
    options = options_of(**flags, compile="off")
    found = cost_of_longest_pairs(config, options)  # 3 pairs in a pass, 4 passes
    assert found == step_cost(config, options, [148] * 3, [50] * 6, passes=4)
    options = options_of(**flags | {"max_length": 101, "batch_size": 1})
    found = cost_of_longest_pairs(config, options)  # 50 + 2 * 50, and answers of 51
    assert found == step_cost(config, options, [150, 350], [51] * 2, passes=1)
    recomputed = cost_of_longest_pairs(config, options, checkpointing="on")
    assert recomputed.activations < found.activations


# --- The text -------------------------------------------------------------------------------------


def printed(capsys, *flags: str) -> list[str]:
    with pytest.raises(SystemExit, match="0"):
        train.main(["--plan", *flags])
    return capsys.readouterr().out.splitlines()


def table_of(lines: list[str]) -> list[list[str]]:
    """The mark, the label and the fields of each row."""
    start = next(i for i, line in enumerate(lines) if " weight " in line) + 1
    rows = lines[start : lines.index("", start)]
    return [[line[0], line[2:19].strip(), *line[19:].split()] for line in rows]


def test_presets_have_their_makers_count_of_parameters():
    assert list(PRESETS) == list(TOTALS)
    for name, config in PRESETS.items():
        found = cost_of_longest_pairs(config, options_of(batch_size=32, max_length=1024))
        assert found.parameters == TOTALS[name]


def test_the_text_of_a_plan(capsys):
    first, second, _, *lines = printed(capsys, "llama-3.1-8b")
    assert first == "llama-3.1-8b: 8,030,261,248 parameters,"
    assert second == "32 pairs of up to 1024 tokens in a step on one h100 of 80 GB"
    assert max(map(len, lines)) <= 80
    table = table_of(lines)
    labels = ["all float32", "all bfloat16", "weights bfloat16", "rank 16 float32",
              "rank 16 bfloat16"]  # fmt: skip
    assert [row[1] for row in table[::2]] == labels
    assert {row[1] for row in table[1::2]} == {"recomputed"}
    assert [row[0] for row in table] == [">"] + [" "] * 9
    # In bytes: 8.03e9 weights of 4 bytes, as many gradients, and twice as many moments.
    assert table[0][2:5] == ["32.1", "32.1", "64.2"]
    options = options_of(batch_size=32, max_length=1024, device="cuda", compile="auto")
    pairs = (None, "float32"), (None, "bfloat16"), (None, "both"), (16, "float32"), (16, "bfloat16")
    for row, ((lora_rank, dtype), checkpointing) in zip(table, product(pairs, ("off", "on"))):
        changes = {"lora_rank": lora_rank, "dtype": dtype, "checkpointing": checkpointing}
        if dtype == "both":
            changes |= {"dtype": "bfloat16", "weights": "bfloat16"}
        changes |= {"lora_targets": "all"}
        cost = cost_of_longest_pairs(PRESETS["llama-3.1-8b"], options, **changes)
        assert row[2:8] == [f"{part / 1e9:.1f}" for part in cost[1:]]
        assert row[8] == ("yes" if 1.1 * cost.peak <= 80e9 else "no")
    assert [row[8] for row in table] == 5 * ["no"] + ["yes", "no"] + 3 * ["yes"]


def test_the_given_flags_are_marked(capsys):
    adapters = ["--lora_rank", "8", "--dtype", "bfloat16", "--checkpointing", "on"]
    table = table_of(printed(capsys, "llama-3.1-70b", *adapters))
    assert [row[0] for row in table] == [" "] * 9 + [">"]
    assert table[8][1] == "rank 8 bfloat16"


def test_a_plan_reads_config_json_alone_and_writes_nothing(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "init"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    monkeypatch.chdir(tmp_path)
    lines = printed(capsys, "--init", "init", "--gpu", "rtx4090", "--batch_size", "3")
    assert lines[0] == "init: 32,032 parameters,"
    assert lines[1] == "3 pairs of up to 1024 tokens in a step on one rtx4090 of 24 GB"
    assert {row[8] for row in table_of(lines)} == {"yes"}
    assert [path.name for path in tmp_path.rglob("*")] == ["init", "config.json"]


BAD = {
    "unknown": (["--plan", "llama-9"], "--plan llama-9: choose from init, llama-3.2-1b, "),
    "no folder": (["--plan"], "--init FOLDER"),
    "both": (["--plan", "llama-3.2-1b", "--init", "x"], "--init FOLDER"),
    "nothing there": (["--plan", "--init", "empty"], "config.json"),
    "no object": (["--plan", "--init", "list"], "expected a JSON object"),
    "other model": (["--plan", "--init", "gpt2"], "model_type 'gpt2' is not"),
    "rank": (["--plan", "llama-3.2-1b", "--lora_rank", "4096"], "--lora_rank 4096"),
    "target": (["--plan", "llama-3.2-1b", "--lora_rank", "4", "--lora_targets", "x,y"], "'x'"),
    "drawn": (["--plan", "llama-3.2-1b", "--loss", "rlhf"], "leave out"),
    "on policy": (["--plan", "llama-3.2-1b", "--on_policy"], "leave out"),
    "alone": (["--gpu", "h100"], "--gpu needs --plan"),
}


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    for name, text in {"list": "[]", "gpt2": '{"model_type": "gpt2"}', "empty": None}.items():
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    for case, (argv, message) in BAD.items():
        with pytest.raises(SystemExit, match="2"):
            train.main(argv)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and message in captured.err, case
        assert not captured.out and not (tmp_path / "out").exists(), case
