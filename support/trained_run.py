"""What evaluation knows of a run's training, on top of model.py and data.py."""

import functools
from pathlib import Path
from typing import NamedTuple

from data import Pairs, load_pairs, load_tokenizer, split_pairs
from model import Llama
from support.files import read_json
from support.lora import LoraConfig, add_lora, load_adapter, merge_lora
from support.questions import Item, read_items
from support.tokenizers import Tokenizer

# The keys of train_config.json that evaluation reads: type, and value if there is none.
TRAINING = {
    "init": (str | None, None), "init_adapter": (str | None, None), "data": (str | None, None),
    "eval_data": (str | None, None), "eval_fraction": (float, 0.0), "seed": (int, 0),
    "max_length": (int, 1024), "beta": (float, 1.0), "dtype": (str, "float32"),
}  # fmt: skip


class Run(NamedTuple):
    """A run or a checkpoint, with the data to evaluate it on."""

    folder: Path
    training: dict  # the values of TRAINING
    data: dict[str, tuple[str, list[Item] | Pairs]]  # title -> file and its rows
    is_demonstration: bool  # then the problems of the built-in task are data, too


def read_run(folder: Path, files: dict[str, list[Item] | None]) -> Run:
    """Reads a run and its data. `files` maps each data file to its questions, or to None if it
    holds pairs. Without files the data are the pairs that the run's training held out and, for a
    run of the demonstration, the problems of the built-in task.

    Raises ValueError if there are no data, or if the reference of a run is missing.
    """
    training, tokenizer = _read_training(folder / "train_config.json"), load_tokenizer(folder)
    init, path, fraction = training["init"], training["data"], training["eval_fraction"]
    is_demonstration = not files and (Path(init or folder) / "base.json").is_file()
    load = functools.partial(load_pairs, tokenizer=tokenizer, max_length=training["max_length"])
    data = {}
    if not files and training["eval_data"]:
        files = {training["eval_data"]: None}
    elif not files and path and fraction and read_items(path) is None:
        _, held_out = split_pairs(load(path), fraction, training["seed"])
        data = {f"{Path(path).name}, held out": (path, held_out)}
    for path, items in files.items():
        same_name = [other for other in files if Path(other).name == Path(path).name]
        title = Path(path).name if len(same_name) == 1 else path
        data[title] = path, load(path) if items is None else items
    if not (data or is_demonstration):
        raise ValueError(
            f"{folder}: its training held out no pairs; name a file to evaluate it on with --data"
        )
    has_pairs = any(isinstance(rows, Pairs) for _, rows in data.values())
    if init and has_pairs and not Path(init).is_dir():
        raise ValueError(
            f"{folder}: there is no folder {init}, its reference; run eval.py from the folder in "
            "which the run was started, or correct train_config.json"
        )
    return Run(folder, training, data, is_demonstration)


def _read_training(file: Path) -> dict:
    config = read_json(file) if file.is_file() else {}
    values = {name: config.get(name, default) for name, (_, default) in TRAINING.items()}
    for name, (kind, _) in TRAINING.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{file}: {name} is {values[name]!r:.60}")
    if values["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"{file}: dtype is {values['dtype']!r:.60}")
    return values


def load_checkpoint(folder, device: str, dtype) -> tuple[Llama, Tokenizer]:
    """Loads the model and the tokenizer of a folder. Raises OSError or ValueError that names the
    file, also if model and tokenizer do not belong together."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: there is no such checkpoint folder")
    tokenizer, model = load_tokenizer(folder), Llama.from_pretrained(folder, dtype, device)
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer or eos_token_id have ids up to {largest}, the model has "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model, tokenizer


def load_reference(training: dict, device: str) -> Llama | None:
    """The model that a run started from: a checkpoint, or a base model with an adapter."""
    if training["init"] is None:
        return None
    model = Llama.from_pretrained(training["init"], device=device)
    if adapter := training["init_adapter"]:
        add_lora(model, LoraConfig.from_pretrained(adapter))
        load_adapter(model, adapter)
        merge_lora(model, model.head_weight.dtype)
    return model
