"""Makes the built-in task: math problems, base model and pairs. Imports data.py and model.py."""

import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import StepData, encode_example, make_batches
from model import Llama, ModelConfig
from support.cli import stage
from support.figures import Column
from support.files import digest, locked, read_json, write_json, write_rows
from support.grading import pass_at_k, powers_of_two
from support.rows import Example
from support.sampling import ANSWER_TOKENS, sample_answers
from support.tokenizers import byte_tokenizer, load_tokenizer

OPERATIONS = 3  # number of additions and subtractions in a problem
PAIR_TOKENS = 2 * OPERATIONS + 3 + ANSWER_TOKENS  # of BOS, problem, newline and answer
TEST_PROBLEMS, SAMPLES = 1000, 4  # SAMPLES answers to each test problem give pass@1 and pass@4
# A model of this width learns slowly with the usual initializer_range of 0.02.
BASE_MODEL = ModelConfig(vocab_size=258, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=24,
                         max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=256,
                         eos_token_id=257, initializer_range=0.05)  # fmt: skip
# Training stops at a target accuracy, because the accuracy after N steps varies with the seed.
BASE = {"lr": 2e-3, "batch_size": 64, "problems": 200, "first_check": 150, "check_every": 10,
        "target": 0.5, "max_steps": 2000}  # fmt: skip
PAIRS = {"prompts": 4500, "held_out": 500, "samples": 4, "per_prompt": 2}


def split_of(problem: str) -> str:
    """Returns a problem's split, chosen by a hash of the text, so that splits never overlap."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(problem.encode()) % 16, "train")


def problems(split: str, count: int, seed) -> list[str]:
    """Returns `count` different problems of a split (see split_of), such as "7+9-3+5\\n"."""
    random, found = np.random.default_rng(seed), {}  # a set that keeps its order
    while len(found) < count:
        first, *rest = random.integers(0, 10, size=OPERATIONS + 1)
        signs = random.choice(["+", "-"], size=OPERATIONS)
        problem = f"{first}" + "".join(f"{s}{n}" for s, n in zip(signs, rest)) + "\n"
        if split_of(problem) == split:
            found[problem] = None
    return list(found)


def solution(problem: str) -> str:
    """Returns the worked answer: one line for each operation, then "#### " and the result."""
    total, *rest = (int(number) for number in re.findall(r"[+-]?\d+", problem))
    lines = []
    for number in rest:
        lines.append(f"{total}{number:+d}={total + number}")
        total += number
    return "\n".join([*lines, f"#### {total}"])


def is_correct(problem: str, answer: str) -> bool:
    """Tells whether the answer's last line is "#### " and the right result."""
    return answer.rpartition("\n")[2] == solution(problem).rpartition("\n")[2]


def base_folder(options) -> Path:
    """Returns the base model's folder beside the run folder: base, or base-seedN if N is not 0."""
    return Path(options.out).parent / (f"base-seed{options.seed}" if options.seed else "base")


def is_demonstration(init) -> bool:
    """Tells whether a run from the folder `init` is a run of the demonstration. None: no --init."""
    return init is None or (Path(init) / "base.json").is_file()


def solves_problems(folder) -> bool:
    """Tells whether a folder holds the demonstration's base model or one of its runs."""
    config = Path(folder) / "train_config.json"
    return is_demonstration((config.is_file() and read_json(config).get("init")) or folder)


def prepare(options, drawn: bool, make_optimizer, train_step):
    """Makes the base model and preference pairs unless they exist. Returns the options with their
    paths: `data` is problems.jsonl if the policy draws the answers (`drawn`), else pairs.jsonl."""
    folder = base_folder(options)
    sft = type(options)(loss="sft", lr=BASE["lr"], seed=options.seed, device=options.device)
    with locked(folder, "waiting for the run that makes this base model"):
        make_base(folder, sft, make_optimizer, train_step)
        make_pairs(folder, options.seed, options.device)
    data, held_out = "problems.jsonl" if drawn else "pairs.jsonl", "heldout_pairs.jsonl"
    paths = {"data": str(folder / data), "eval_data": str(folder / held_out)}
    return dataclasses.replace(options, init=str(folder), **paths)


def make_base(folder: Path, options, make_optimizer, train_step) -> None:
    """Trains the base model and saves it in `folder`, unless the folder already holds this model:
    base.json stores a hash of the model and of its training settings. Raises ValueError if the
    folder holds files but no base.json, or if the model misses its target accuracy."""
    record, recipe = folder / "base.json", (dataclasses.asdict(BASE_MODEL), BASE, options.seed)
    if _up_to_date(record, _hash(folder, *recipe)):
        print(f"base model: found in {folder}")
        return
    if any(folder.iterdir()) and not record.exists():
        raise ValueError(f"{folder}: has files but no base model; choose --out in another folder")
    with stage(f"base model: supervised training to {BASE['target']:.0%} accuracy") as notes:
        torch.manual_seed(options.seed)
        model, tokenizer = Llama(BASE_MODEL).to(options.device), byte_tokenizer()
        steps, accuracy = _train_base(model, tokenizer, options, make_optimizer, train_step)
        write_json(record, {})  # marks the folder as a base model's, in case of a crash
        model.save_pretrained(folder)
        tokenizer.save(folder)
        key = _hash(folder, *recipe)
        write_json(record, {"key": key, "steps": steps, "validation_accuracy": accuracy})
        notes += [f"{steps} steps", f"{accuracy:.1%} right", f"in {folder}"]


def _train_base(model, tokenizer, options, make_optimizer, train_step) -> tuple[int, float]:
    """Trains to the target accuracy in BASE. Returns the number of steps and the accuracy."""
    optimizer, lr, seed = make_optimizer(model, options), BASE["lr"], options.seed
    prompts = problems("validation", BASE["problems"], seed=0)
    steps = range(1, BASE["max_steps"] + 1)
    bar = tqdm(steps, "supervised", float("inf"), leave=False, disable=None, unit="step")
    for step in bar:
        texts = problems("train", BASE["batch_size"], seed=[seed, step - 1])
        examples = [Example("solution", text, solution(text), None) for text in texts]
        pairs = [encode_example(example, tokenizer) for example in examples]
        batches = make_batches(pairs, range(len(pairs)), options.row_tokens, options.micro_tokens)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 50)  # the warmup takes 50 steps
        train_step(model, optimizer, StepData(batches), options)
        if step < BASE["first_check"] or step % BASE["check_every"]:
            continue
        greedy = sample_answers(model, tokenizer, prompts, temperature=0)
        accuracy = sum(is_correct(q, a) for q, (a,) in zip(prompts, greedy)) / len(prompts)
        bar.set_postfix(accuracy=f"{accuracy:.1%}")
        if accuracy >= BASE["target"]:
            return step, accuracy
    raise ValueError(f"--seed {seed}: the base model misses its target accuracy; change --seed")


def make_pairs(folder: Path, seed: int, device: str) -> None:
    """Writes pairs of a right and a wrong base model answer, unless this model's pairs exist:
    pairs.jsonl for the problems in problems.jsonl, and heldout_pairs.jsonl for test problems."""
    key = _hash(folder, PAIRS, seed)
    files = [folder / name for name in ("pairs.jsonl", "heldout_pairs.jsonl", "problems.jsonl")]
    if all(file.is_file() for file in files) and _up_to_date(folder / "pairs.json", key):
        print(f"pairs: found in {folder}")
        return
    with stage("pairs: drawn from the base model's right and wrong answers") as notes:
        model, tokenizer = Llama.from_pretrained(folder, device=device), load_tokenizer(folder)
        train = problems("train", PAIRS["prompts"], seed=[seed, 1])
        held_out = problems("test", PAIRS["held_out"], seed=[seed, 1])
        graded = [{"prompt": q, "answer": solution(q), "grade": "gsm8k"} for q in train]
        write_rows(folder / "problems.jsonl", graded)
        for file, prompts in zip(files, (train, held_out)):
            drawn = sample_answers(model, tokenizer, prompts, samples=PAIRS["samples"], seed=seed)
            rows = []
            for prompt, answers in zip(prompts, drawn):
                # An answer that is not UTF-8 would not be encoded as the tokens that were drawn.
                texts = [text for text in answers if text.strip() and "\ufffd" not in text]
                correct = {text: is_correct(prompt, text) for text in texts}
                right = [text for text in correct if correct[text]]
                wrong = [text for text in correct if not correct[text]]
                pairs = zip(right[: PAIRS["per_prompt"]], wrong)
                rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in pairs]
            write_rows(file, rows)
            dropped = sum("\ufffd" in text for answers in drawn for text in answers)
            notes.append(f"{len(rows)} in {file} ({dropped} answers dropped: not UTF-8)")
        write_json(folder / "pairs.json", {"key": key})


def task_columns(model, tokenizer, count=TEST_PROBLEMS, samples=SAMPLES) -> dict[str, Column]:
    """Returns the columns "greedy" (accuracy) and "pass@k", with a value for each test problem. k
    is 1 or SAMPLES if `samples` equals SAMPLES; otherwise, k is one of powers_of_two(samples)."""
    questions = problems("test", count, seed=0)
    greedy = sample_answers(model, tokenizer, questions, temperature=0)
    sampled = sample_answers(model, tokenizer, questions, samples=samples)
    correct = [sum(is_correct(q, answer) for answer in row) for q, row in zip(questions, sampled)]
    values = {"greedy": [float(is_correct(q, answer)) for q, (answer,) in zip(questions, greedy)]}
    for k in (1, SAMPLES) if samples == SAMPLES else powers_of_two(samples):
        values[f"pass@{k}"] = [pass_at_k(c, samples, k) for c in correct]
    return {name: Column(np.array(value)) for name, value in values.items()}


def base_columns(folder: Path, device: str) -> dict[str, Column]:
    """Returns `task_columns` of the base model, which eval.json stores until the model changes."""
    record, key = folder / "eval.json", _hash(folder, TEST_PROBLEMS, SAMPLES)
    with locked(folder, "waiting for another run that evaluates this base model"):
        if not _up_to_date(record, key):
            with stage("evaluation: the base model on the held-out problems") as notes:
                model = Llama.from_pretrained(folder, device=device)
                columns = task_columns(model, load_tokenizer(folder))
                values = {name: column.values.tolist() for name, column in columns.items()}
                write_json(record, {"key": key} | values)
                notes.append(f"in {record}")
    return {name: Column(np.array(x)) for name, x in read_json(record).items() if name != "key"}


def _hash(folder: Path, *recipe) -> str:
    """Returns a hash of `recipe` and of the folder's model (weights, config.json, tokenizer)."""
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    return digest(*recipe, *(folder / name for name in names if (folder / name).is_file()))


def _up_to_date(record: Path, key: str) -> bool:
    """Tells whether the JSON file `record` exists and stores the hash `key`."""
    return record.is_file() and read_json(record).get("key") == key
