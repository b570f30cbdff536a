"""Reads and writes the weights of a model: safetensors files, laid out as transformers does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.files import read_json, write_json, written_whole

MAX_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: one, or the shards that its index names.

    Raises FileNotFoundError or ValueError that names the folder or the index.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder}: has no model.safetensors and no {INDEX}")
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(names))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: the shard {name!r:.60} is not a file of this folder")
    return [folder / name for name in names]


def read_weights(
    folder: Path, shapes: dict[str, tuple], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint folder, name -> tensor of `dtype` on `device`.

    shapes: the shape of each parameter of the model. Every parameter must be in the files, with
    its shape, and no other tensor. Raises OSError or ValueError that names the file.
    """
    return read_tensors(weight_files(folder), shapes, dtype, device)


def read_tensors(files: list[Path], shapes: dict, dtype, device="cpu") -> dict[str, Tensor]:
    """Reads the tensors named by `shapes` from files of one folder, as `read_weights` does."""
    missing, state = dict(shapes), {}
    for file in files:
        with opened(file, device) as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a constant in older files, which follows from the configuration
                state[name] = checked_tensor(file, tensors, name, missing).to(dtype)
    if missing:
        folder = files[0].parent
        raise ValueError(f"{folder}: tensor {min(missing)} is missing, {len(missing)} in all")
    return state


@contextlib.contextmanager
def opened(file: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """Opens a safetensors file. A damaged file raises ValueError that names it."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from None


def checked_tensor(file: Path, tensors: safe_open, name: str, missing: dict[str, tuple]) -> Tensor:
    """Reads a tensor and removes its name from `missing`, which holds names and shapes.

    Raises ValueError that names file and tensor if the name is not in `missing`, the shape is
    another one, the type is not a float of 16 bits or more, or a value is not finite.
    """
    if name not in missing:
        raise ValueError(f"{file}: unexpected tensor {name}")
    shape, expected = tuple(tensors.get_slice(name).get_shape()), missing.pop(name)
    if shape != expected:
        raise ValueError(f"{file}: {name} has shape {shape}, the configuration needs {expected}")
    tensor = tensors.get_tensor(name)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{file}: {name} has the unsupported type {tensor.dtype}")
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise ValueError(f"{file}: {name} has values that are not finite")
    return tensor


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Writes one file, or shards of at most MAX_SHARD_BYTES and their index.

    Removes the weight files of another model that was saved in the folder before.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = MAX_SHARD_BYTES
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in files:
            stale.unlink()
    for file, shard in zip(files, shards):
        save_tensors(folder / file, shard, format="pt")
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file with the permissions of a file that Python creates."""
    with written_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # save_file removes the permissions of group and others
