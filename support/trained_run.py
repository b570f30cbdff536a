"""Reads the options, data and model of a run. Imports model.py and data.py."""

from pathlib import Path
from typing import NamedTuple

from data import Pairs, load_pairs, split_pairs
from model import Llama
from support import builtin_task
from support.cli import DataOptions
from support.files import read_json
from support.hub import find
from support.questions import Item, read_items
from support.tokenizers import load_tokenizer

# The keys of train_config.json that evaluation reads, and their values if there is no such file.
TRAINING = {"init": None, "data": None, "eval_data": None, "split_seed": 0, "eval_fraction": 0.0,
            "max_length": 1024, "loss": "mio", "beta": 1.0, "average_logps": False,
            "dtype": "float32", "weights": "float32", "columns": None,
            "chat_template_kwargs": None}  # fmt: skip


class Run(NamedTuple):
    """A run or a checkpoint, with the data to evaluate it on."""

    folder: Path
    training: dict  # the run's values for the keys of TRAINING
    data: dict[str, tuple[str, list[Item] | Pairs]]  # title of a table -> file and its rows
    is_demonstration: bool  # if True, the problems of the built-in task are also data


def read_run(folder: Path, files: dict[str, list[Item] | None], options=None) -> Run:
    """Reads a run and its data. `files` maps each data file to its questions, or to None for pairs.
    Without files, the data are the pairs that training held out and, in the demonstration, the
    problems of the task. Raises OSError, or ValueError if data or the reference is missing."""
    options, config = options or DataOptions(), (folder := find(folder)) / "train_config.json"
    training = TRAINING | (read_json(config) if config.is_file() else {})
    for name, default in TRAINING.items():
        kind = str | None if default is None else type(default)
        precision = name not in ("dtype", "weights") or training[name] in ("float32", "bfloat16")
        if not isinstance(training[name], kind) or not precision:
            raise ValueError(f"{config}: {name} is malformed; restore the original file")
    init, path, fraction = training["init"], training["data"], training["eval_fraction"]
    kwargs = {"tokenizer": load_tokenizer(folder, options.chat_template_kwargs)}
    kwargs["columns"] = options.columns if files else training["columns"]
    kwargs["max_length"] = training["max_length"]
    is_demonstration = not files and builtin_task.solves_problems(folder)
    data = {}
    if not files and training["eval_data"]:
        files = {training["eval_data"]: None}
    elif not files and path and fraction and read_items(path, kwargs["columns"]) is None:
        _, held_out = split_pairs(load_pairs(path, **kwargs), fraction, training["split_seed"])
        data[f"{Path(path).name}, held out"] = path, held_out
    names = [Path(path).name for path in files]
    for path, items in files.items():
        title = path if names.count(Path(path).name) > 1 else Path(path).name
        data[title] = path, load_pairs(path, **kwargs) if items is None else items
    if not (data or is_demonstration):
        raise ValueError(f"{folder}: has no held-out pairs; name files with --data")
    has_pairs = any(isinstance(rows, Pairs) for _, rows in data.values())
    if has_pairs and init and Path(init).is_absolute():  # a snapshot, whose cache may have moved
        training["init"] = init = str(find(init))
    if has_pairs and init and not Path(init).is_dir():
        raise ValueError(f"the reference {init} is missing; correct the path in {config}")
    return Run(folder, training, data, is_demonstration)


def load_checkpoint(folder, device: str, dtype, values: str | None = None) -> tuple:
    """Loads a model by its folder or name, and its tokenizer; values: --chat_template_kwargs.
    Raises OSError or ValueError, for example if the tokenizer has an id that the model lacks."""
    if not (folder := find(folder)).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; correct the path")
    tokenizer, model = load_tokenizer(folder, values), Llama.from_pretrained(folder, dtype, device)
    ids = tokenizer.vocab_size - 1, model.config.bos_token_id or 0, *tokenizer.stop_ids
    if (largest := max(ids)) >= model.config.vocab_size:
        raise ValueError(f"{folder}: the model lacks id {largest}; use the tokenizer of the model")
    return model, tokenizer
