"""Weight files: written tensors read back unchanged, and damaged or foreign files are refused."""

import json

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import Llama
from support import weights
from support.weights import read_weights, save_tensors, weight_files, write_weights

STATE = {name: torch.arange(12.0).view(3, 4) + i for i, name in enumerate("abcde")}
SHAPES = {name: (3, 4) for name in STATE}


def read(folder, shapes=SHAPES) -> dict:
    return read_weights(folder, shapes, torch.float32)


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
        assert back.get_parameter(name).dtype == dtype
        assert wide.get_parameter(name).dtype == torch.float32
        assert wide.get_parameter(name).requires_grad


def test_shards_are_written_read_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 100)  # two tensors of 48 bytes
    write_weights(tmp_path, STATE)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in weight_files(tmp_path)] == files
    assert [len(load_file(tmp_path / file)) for file in files] == [2, 2, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 48
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    back = read(tmp_path)
    assert back.keys() == STATE.keys() and all(torch.equal(back[n], STATE[n]) for n in STATE)
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 30)  # less than a tensor: one in each file
    write_weights(tmp_path, STATE)
    assert len(weight_files(tmp_path)) == 5 and read(tmp_path).keys() == STATE.keys()
    assert len(list(tmp_path.glob("model*"))) == 6
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 5 * 48)
    write_weights(tmp_path, {name: tensor.t() for name, tensor in STATE.items()})  # not contiguous
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(read(tmp_path, {n: (4, 3) for n in STATE})["c"], STATE["c"].t())


def test_a_weight_file_has_the_permissions_and_metadata_of_transformers(tmp_path):
    save_tensors(tmp_path / "a.safetensors", STATE, format="pt")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_inverse_frequencies_of_older_checkpoints_are_skipped(tmp_path):
    save_file(STATE | {"layers.0.rotary_emb.inv_freq": torch.ones(2)},
              tmp_path / "model.safetensors")  # fmt: skip
    assert read(tmp_path).keys() == STATE.keys()


def test_a_tied_checkpoint_may_not_bring_a_head(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(258, 32)}, file)
    with pytest.raises(
        ValueError, match="lm_head.weight has shape .* needs no tensor of this name"
    ):
        Llama.from_pretrained(tmp_path)


def test_tensors_that_are_not_those_of_the_model_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    for changes, message in [
        ({"b": None}, f"{tmp_path}: lacks b; copy the folder"),
        ({"f": torch.zeros(2)}, f"{file}: f has shape (2,), but the configuration needs no tensor"),
        ({"b": torch.zeros(4, 3)}, "b has shape (4, 3), but the configuration needs (3, 4)"),
        ({"b": torch.zeros(0)}, f"{file}: b has shape (0,)"),
        ({"b": torch.zeros(3, 4, dtype=torch.int32)}, f"{file}: b has type torch."),
        ({"b": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, f"{file}: b has type torch."),
        ({"b": torch.full((3, 4), float("nan"))}, f"{file}: b has values that are not finite"),
        ({"b": STATE["b"].where(STATE["b"] != 5, float("inf"))}, "not finite"),
        ({"b": STATE["b"].where(STATE["b"] != 5, -float("inf"))}, "not finite"),
    ]:
        tensors = {n: t for n, t in (STATE | changes).items() if t is not None}
        save_file(tensors, file)
        with pytest.raises(ValueError) as error:
            read(tmp_path)
        assert message in str(error.value)
    save_file(STATE, file)
    content = file.read_bytes()
    for damaged in (b"", content[:7], content[:-1], content + b"\0", b"{}", b"\x80\x02cos\n"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            read(tmp_path)
        assert str(error.value).startswith(f"{file}: is damaged or missing; copy it again (")
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors: is damaged or missing; copy it"):
        read(tmp_path)


def test_an_index_that_does_not_describe_the_folder_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(STATE, tmp_path / "outside.safetensors")
    save_file({name: STATE[name] for name in "abc"}, folder / "1.safetensors")
    save_file({name: STATE[name] for name in "de"}, folder / "2.safetensors")
    good = {name: "1.safetensors" if name in "abc" else "2.safetensors" for name in STATE}
    for weight_map, message in [
        (None, "index.json: weight_map must name files of the folder; copy the index again"),
        ([], "weight_map must"),
        ({}, "lacks a, b, c, d, e;"),
        ({"a": 1}, "weight_map must"),
        (good | {"e": "3.safetensors"}, "3.safetensors: is damaged or missing"),
        (good | {"e": "../outside.safetensors"}, "must name files of the folder"),
        ({"a": "1.safetensors"}, "lacks d, e;"),
    ]:
        content = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError) as error:
            read(folder)
        assert message in str(error.value)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": good}))
    assert read(folder).keys() == STATE.keys()
    save_file({name: STATE[name] for name in "cde"}, folder / "2.safetensors")
    with pytest.raises(
        ValueError, match="2.safetensors: c has shape .* no tensor"
    ):  # in both shards
        read(folder)
