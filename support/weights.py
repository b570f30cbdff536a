"""Reads and writes the weights of a model as safetensors files in the layout of transformers."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.files import atomic_write, digest, read_json, write_json

MAX_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Returns the paths of a checkpoint's weights: model.safetensors, or the shards that the index
    lists. Raises ValueError if the index lists anything but names of files in the folder."""
    index, names = folder / INDEX, ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name files of the folder; copy the index again")
    return [folder / name for name in sorted(set(names))]


def hash_model(folder: Path) -> str:
    """Returns a hash of the weights and of config.json. Raises OSError if a file is missing."""
    return digest(*weight_files(folder), folder / "config.json")


def read_weights(folder: Path, shapes: dict, dtype, device="cpu") -> dict[str, Tensor]:
    """Returns a dict from names to the tensors in weight_files(folder), in `dtype` on `device`. The
    files must hold exactly the names and shapes in `shapes`, as finite floats of at least 16 bits;
    otherwise, a ValueError names the file and the tensor."""
    missing, state = dict(shapes), {}
    for file in weight_files(folder):
        try:
            tensors = load_file(file)  # maps the file into memory
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: is damaged or missing; copy it again ({error})") from None
        for name, tensor in tensors.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # older files store this constant; the configuration determines it
            where, needed = f"{file}: {name}", missing.pop(name, "no tensor of this name")
            if tensor.shape != needed:
                problem = f"has shape {tuple(tensor.shape)}, but the configuration needs {needed}"
                raise ValueError(f"{where} {problem}; copy all files from one checkpoint")
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ValueError(f"{where} has type {tensor.dtype}; convert it to bfloat16")
            if not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise ValueError(f"{where} has values that are not finite; copy the file again")
            state[name] = tensor.to(device).to(dtype)
    if missing:
        raise ValueError(f"{folder}: lacks {', '.join(missing):.80}; copy the folder again")
    return state


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Writes the weights to one file, or to shards of at most MAX_SHARD_BYTES with an index.
    Removes the weight files of a model that was saved in the folder earlier."""
    shards = [{}]
    for name, tensor in state.items():
        size = sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes
        if shards[-1] and size > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    count, files = len(shards), ["model.safetensors"]
    if count > 1:
        files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for stale in {*folder.glob("model*.safetensors*")} - {folder / file for file in files}:
        stale.unlink()
    for file, shard in zip(files, shards):
        save_tensors(folder / file, shard, format="pt")
    if count > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file with the permissions that Python gives to new files."""
    with atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # save_file removes the permissions of group and others
