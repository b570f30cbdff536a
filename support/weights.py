"""Reads and writes the weights of a model as safetensors files in the layout of transformers."""

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
    Raises FileNotFoundError or ValueError that names the folder or the index."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{folder}: has no {single.name} and no {INDEX}")
        return [single]
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
    folder: Path, shapes: dict, dtype, device="cpu", files: list[Path] | None = None
) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint folder, name -> tensor of `dtype` on `device`.

    shapes: the shape of each parameter, name -> tuple. files: the files to read, by default
    weight_files(folder). They must hold exactly these tensors, with their shapes, finite values and
    a floating-point type of at least 16 bits. Raises OSError or ValueError that names the file.
    """
    missing, state = dict(shapes), {}
    for file in weight_files(folder) if files is None else files:
        with opened(file, device) as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # older files store this constant; the configuration determines it
                if name not in missing:
                    raise ValueError(
                        f"{file}: unexpected tensor {name}; config.json has no such weight"
                    )
                where, needed = f"{file}: {name}", missing.pop(name)
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != needed:
                    raise ValueError(f"{where} has shape {shape}, the configuration needs {needed}")
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point() or tensor.element_size() < 2:
                    raise ValueError(f"{where} has the unsupported type {tensor.dtype}")
                if not all(extreme.isfinite() for extreme in tensor.aminmax()):
                    raise ValueError(f"{where} has values that are not finite; copy the file again")
                state[name] = tensor.to(dtype)
    if missing:
        raise ValueError(f"{folder}: tensor {min(missing)} is missing, {len(missing)} in all")
    return state


@contextlib.contextmanager
def opened(file: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """Opens a safetensors file. A damaged file raises ValueError that names it."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a complete safetensors file; copy it again ({error})"
        ) from None


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Writes one file, or shards of at most MAX_SHARD_BYTES and their index. Removes the
    weight files of a model that was saved in the folder earlier."""
    shards, room = [{}], MAX_SHARD_BYTES
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
        size = sum(tensor.nbytes for tensor in state.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file with the permissions of a file that Python creates."""
    with written_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # save_file removes the permissions of group and others
