"""What a CPU can show of a GPU: the parts of tests/gpu.py that run on a CPU, steps on fake tensors
(on "cuda" if torch is built with CUDA), and compiled FlexAttention's forward pass."""

import contextlib
import itertools
import threading
from unittest import mock

import gpu
import pytest
import torch
from conftest import tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import train
from data import Batch, answer_states, make_batches
from mio import LOSSES
from model import Llama
from support.lora import LINEARS, LoraConfig, add_lora

torch.set_num_threads(1)


@pytest.fixture
def report(capsys):
    """A report for the CPU; afterwards, no row may have missed its bar."""
    found = gpu.Report(torch.device("cpu"))
    yield found
    printed = capsys.readouterr().out
    assert found.missed == 0, printed
    assert printed.count("\n") > 2, "the check has no row"


@pytest.mark.parametrize("name", ["--weights bfloat16", "compiled, LoRA", "window"])
def test_steps_are_as_exact_as_naive_code(name, report, monkeypatch):
    monkeypatch.setitem(gpu.VARIANTS, name, (*gpu.VARIANTS[name][:2], ["mio", "kto"]))
    gpu.check_right(report, [name])


@pytest.mark.parametrize("name", [*gpu.WAITS][1:])
def test_nothing_recompiles_after_the_second_step(name, report):
    gpu.check_waits(report, [name])


def test_a_recompilation_in_another_thread_is_an_error():
    with gpu.compiled_as_on_a_gpu(torch.device("cpu")):
        function = torch.compile(lambda x: x + 1)
        function(torch.zeros(3))
        again = threading.Thread(target=function, args=(torch.zeros(3, dtype=torch.float64),))
        guard = gpu.neither_waits_nor_recompiles(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="compiled again"), guard:
            again.start()
            again.join()


@pytest.mark.parametrize("check", ["generation", "head", "large"])
def test_the_other_checks_run(check, report):
    gpu.CHECKS[check](report)


def test_a_killed_run_resumes_to_the_bit(report):
    gpu.check_resume(report, ["bfloat16"])


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, capsys):
    def fails(report):
        raise ValueError("out of luck")

    monkeypatch.setattr(gpu, "CHECKS", {"right": fails, "head": gpu.check_head})
    assert gpu.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "| right | ValueError: out of luck | no error | MISSED |" in printed
    assert "| head over its three products |" in printed
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            gpu.main([])
        assert "torch finds no GPU; use --device cpu" in capsys.readouterr().err


def test_trl_is_timed_on_the_same_pairs(tmp_path):
    pairs = gpu.random_pairs(2, 20, 10, gpu.SMALL.vocab_size)
    report = mock.Mock(device=torch.device("cpu"), on_gpu=False)
    gpu.random_model(gpu.SMALL, "cpu", torch.float32).save_pretrained(tmp_path)
    seconds, _ = gpu.trl_step(report, str(tmp_path), pairs, torch.float32, 2)
    assert 0 < seconds < 60


# --- Fake tensors: no value exists, so reading one is an error ------------------------------------

FAKE = torch.device("cuda" if torch.version.cuda else "cpu")


@contextlib.contextmanager
def fakes():
    """Under FakeTensorMode, what needs a driver is replaced: autograd's engine, pinned memory and
    questions about the device."""

    def to(batch: Batch, device: torch.device) -> Batch:
        tensors = [x for x in batch if isinstance(x, torch.Tensor)]
        made = iter([torch.empty(x.shape, dtype=x.dtype, device=device) for x in tensors])
        return Batch(*(next(made) if isinstance(x, torch.Tensor) else x for x in batch))

    def gradients(_, x):
        return (torch.zeros_like(x),)

    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (Batch, "to", to),
            (torch.autograd, "grad", gradients),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.nn.Linear, "to", lambda module, _: module),  # add_lora, before the mode
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def fake_step(loss: str, rank: int | None = None, **flags):
    options = train.Options(loss=loss, beta=0.2, lr=1e-3, micro_tokens=48, row_tokens=24, **flags)
    pairs = gpu.random_pairs(6, 9, 8, 256)
    with fakes():
        model = gpu.random_model(tiny_config(), FAKE, getattr(torch, options.weights))
        if rank:
            add_lora(model, LoraConfig(rank, 8.0, list(LINEARS)))
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
                    frozen = module.weight.detach().to(getattr(torch, options.dtype))
                    module.weight = torch.nn.Parameter(frozen, requires_grad=False)
        gpu.prepared(model, options)
        optimizer = train.make_optimizer(model, options)

        def backward(_):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        with mock.patch.object(torch.Tensor, "backward", backward):
            work = gpu.step_data(model, pairs, options)
            return train.train_step(model, optimizer, work, options)


KINDS = [{"dtype": "bfloat16"}, {"weights": "bfloat16"}, {"rank": 4, "dtype": "bfloat16"},
         {"weights": "bfloat16", "dtype": "bfloat16", "checkpointing": "on"}]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "flags"), [(loss, {}) for loss in LOSSES] + [*itertools.product(gpu.FEW, KINDS)]
)
def test_a_step_reads_no_value_and_stays_on_its_device(loss, flags):
    losses, logps, norm = fake_step(loss, **flags)
    assert losses.shape == (6,) and logps.shape == (6, 2) and norm.shape == ()
    assert {x.device.type for x in (losses, logps, norm)} == {FAKE.type}
    assert logps.dtype == norm.dtype == torch.float32


def test_a_read_of_a_value_is_an_error(monkeypatch):
    grad = torch.full_like
    monkeypatch.setattr(torch, "full_like", lambda x, value: grad(x, value + 0 * x.item()))
    with pytest.raises(Exception, match="_local_scalar_dense"):
        fake_step("mio", weights="bfloat16")


# --- FlexAttention --------------------------------------------------------------------------------


def test_compiled_attention_equals_the_dense_mask(monkeypatch):
    """Forward only, because FlexAttention has no backward pass on a CPU."""
    config = tiny_config(sliding_window=9, num_hidden_layers=1, head_dim=16)
    pairs = gpu.random_pairs(7, 14, 12, 256)
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        (batch,) = make_batches(pairs, range(7), 128, 512)
        expected = answer_states(model, batch)
        model.compile_blocks()
        monkeypatch.setattr(data, "needs_fixed_length", lambda model: True)
        monkeypatch.setattr(data, "_compiled_block_mask", lambda: data.create_block_mask)
        (batch,) = make_batches(pairs, range(7), 128, 512, pad=True)
        assert batch.tokens.shape == (1, 512)
        torch.testing.assert_close(answer_states(model, batch), expected, rtol=1e-4, atol=1e-5)
