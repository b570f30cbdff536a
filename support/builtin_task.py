"""The built-in task, on top of model.py and data.py: short sums, a base model that learns to solve
about half of them, and preference pairs of the base model's right and wrong answers."""

import copy
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
from support.files import digest, locked, read_json, write_json, write_rows
from support.grading import pass_at_k, powers_of_two
from support.rows import Example
from support.sampling import sample_answers
from support.tokenizers import byte_tokenizer, load_tokenizer
from support.weights import weight_files

OPERATIONS = 3  # number of operations in a problem
ANSWER_TOKENS = 48  # most tokens that a model may generate; a solution has at most 35
PAIR_TOKENS = 2 * OPERATIONS + 3 + ANSWER_TOKENS  # the BOS, a problem with its newline, an answer
TEST_PROBLEMS, SAMPLES = 1000, 8  # SAMPLES answers to each test problem give pass@1 and pass@8
# With the usual initializer_range of 0.02, a model this narrow learns slowly.
BASE_MODEL = ModelConfig(vocab_size=258, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, head_dim=24,
                         max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=256,
                         eos_token_id=257, initializer_range=0.05)  # fmt: skip
# Training stops at a target accuracy, because the accuracy after N steps varies with the seed.
BASE = {"lr": 2e-3, "batch_size": 64, "problems": 300, "check_every": 10, "target": 0.55,
        "upper_limit": 0.62, "max_steps": 4000}  # fmt: skip
PAIRS = {"prompts": 6000, "held_out": 500, "samples": 8, "per_prompt": 2}


def split_of(problem: str) -> str:
    """A hash of the problem's text determines the split, so splits never overlap."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(problem.encode()) % 16, "train")


def problems(split: str, count: int, seed) -> list[str]:
    """`count` different problems of "train", "validation" or "test", like "7+9-3+5\\n"."""
    random, found = np.random.default_rng(seed), {}  # a set that keeps its order
    while len(found) < count:
        first, *rest = random.integers(0, 10, size=OPERATIONS + 1)
        signs = random.choice(["+", "-"], size=OPERATIONS)
        problem = f"{first}" + "".join(f"{s}{n}" for s, n in zip(signs, rest)) + "\n"
        if split_of(problem) == split:
            found[problem] = None
    return list(found)


def solution(problem: str) -> str:
    """The worked answer: one line for each operation, then "#### " and the result."""
    total, *rest = (int(number) for number in re.findall(r"[+-]?\d+", problem))
    lines = []
    for number in rest:
        lines.append(f"{total}{number:+d}={total + number}")
        total += number
    return "\n".join([*lines, f"#### {total}"])


def is_correct(problem: str, answer: str) -> bool:
    """Whether the answer's last line is "#### " and the right result."""
    return answer.rpartition("\n")[2] == solution(problem).rpartition("\n")[2]


def base_folder(options) -> Path:
    """The base model's folder lies beside the run folder; each seed has a base model of its own."""
    return Path(options.out).parent / (f"base-seed{options.seed}" if options.seed else "base")


def prepare(options, draws: bool, make_optimizer, train_step):
    """Makes the base model and its pairs unless they exist. Returns options with the paths set:
    `data` is the file of pairs or, if the policy draws the answers (`draws`), of problems."""
    folder = base_folder(options)
    sft = type(options)(loss="sft", lr=BASE["lr"], seed=options.seed, device=options.device)
    with locked(folder, "waiting for the run that makes it"):
        make_base(folder, sft, make_optimizer, train_step)
        make_pairs(folder, options.seed, options.device)
    data, held_out = "problems.jsonl" if draws else "pairs.jsonl", "heldout_pairs.jsonl"
    paths = {"data": str(folder / data), "eval_data": str(folder / held_out)}
    return dataclasses.replace(options, init=str(folder), **paths)


def make_base(folder: Path, options, make_optimizer, train_step) -> None:
    """Trains the base model with `options` and saves it in the folder, unless it exists. Raises
    ValueError if the folder holds other files, or if the model does not learn."""
    record, key = folder / "base.json", digest(dataclasses.asdict(BASE_MODEL), BASE, options.seed)
    if _up_to_date(record, key, folder / "model.safetensors"):
        print(f"base model: found in {folder}")
        return
    if any(folder.iterdir()) and not record.exists():
        raise ValueError(f"{folder}: has no base model but holds other files; choose another --out")
    title = f"base model: supervised training until {BASE['target']:.0%} of validation is right"
    with stage(title) as notes:
        torch.manual_seed(options.seed)
        model, tokenizer = Llama(BASE_MODEL).to(options.device), byte_tokenizer()
        steps, accuracy = _train_base(model, tokenizer, options, make_optimizer, train_step)
        write_json(record, {})  # marks the folder as a base model's, in case of a crash
        model.save_pretrained(folder)
        tokenizer.save(folder)
        write_json(record, {"key": key, "steps": steps, "validation_accuracy": accuracy})
        notes += [f"{steps} steps", f"{accuracy:.1%} right", f"in {folder}"]


def _train_base(model, tokenizer, options, make_optimizer, train_step) -> tuple[int, float]:
    """Returns the steps and the validation accuracy, which ends between target and upper limit."""
    optimizer, lr, step, accuracy = make_optimizer(model, options), BASE["lr"], 0, 0.0
    prompts = problems("validation", BASE["problems"], seed=0)
    last_weights = copy.deepcopy(model.state_dict())
    with tqdm(desc="supervised", unit="step", leave=False) as bar:
        while not BASE["target"] <= accuracy <= BASE["upper_limit"]:
            if step >= BASE["max_steps"]:
                found = f"{accuracy:.0%} of the validation problems, not {BASE['target']:.0%}"
                raise ValueError(f"--seed {options.seed}: after {step} steps the base model solves "
                                 f"{found}; choose another --seed")  # fmt: skip
            for _ in range(BASE["check_every"]):
                texts = problems("train", BASE["batch_size"], seed=[options.seed, step])
                examples = [Example("solution", text, solution(text), None) for text in texts]
                pairs = [encode_example(example, tokenizer) for example in examples]
                layout = range(len(pairs)), options.row_tokens, options.micro_tokens
                step += 1
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1, step / 50)  # warms up for 50 steps
                train_step(model, optimizer, StepData(make_batches(pairs, *layout)), options)
                bar.update()
            greedy = sample_answers(model, tokenizer, prompts, temperature=0)
            accuracy = sum(is_correct(q, a) for q, (a,) in zip(prompts, greedy)) / len(prompts)
            bar.set_postfix(accuracy=f"{accuracy:.1%}")
            if accuracy > BASE["upper_limit"]:  # returns to the last check, halves the rate
                model.load_state_dict(last_weights)
                lr /= 2
            last_weights = copy.deepcopy(model.state_dict())
    return step, accuracy


def make_pairs(folder: Path, seed: int, device: str) -> None:
    """Samples answers of the base model and pairs right answers with wrong ones, unless the files
    exist: pairs.jsonl on the problems in problems.jsonl, heldout_pairs.jsonl on test problems."""
    key = digest(*weight_files(folder), PAIRS, seed)
    files = [folder / name for name in ("pairs.jsonl", "heldout_pairs.jsonl", "problems.jsonl")]
    if _up_to_date(folder / "pairs.json", key, *files):
        print(f"pairs: found in {folder}")
        return
    with stage("pairs: drawn from the base model, graded, right against wrong") as notes:
        model, tokenizer = Llama.from_pretrained(folder, device=device), load_tokenizer(folder)
        train = problems("train", PAIRS["prompts"], seed=[seed, 1])
        held_out = problems("test", PAIRS["held_out"], seed=[seed, 1])
        graded = [{"prompt": q, "answer": solution(q), "grade": "gsm8k"} for q in train]
        write_rows(folder / "problems.jsonl", graded)
        for file, prompts in zip(files, (train, held_out)):
            drawn = sample_answers(model, tokenizer, prompts, samples=PAIRS["samples"], seed=seed)
            rows = []
            for prompt, answers in zip(prompts, drawn):
                answers = dict.fromkeys(answer for answer in answers if answer.strip())
                right = [answer for answer in answers if is_correct(prompt, answer)]
                wrong = [answer for answer in answers if not is_correct(prompt, answer)]
                for chosen, rejected in list(zip(right, wrong))[: PAIRS["per_prompt"]]:
                    rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            write_rows(file, rows)
            notes.append(f"{len(rows)} in {file}")
        write_json(folder / "pairs.json", {"key": key})


def task_values(model, tokenizer, count: int = TEST_PROBLEMS, samples: int = SAMPLES) -> dict:
    """The greedy accuracy and pass@k as lists with one number for each test problem. With 8
    samples k is 1 and 8; otherwise k is the number of samples and all powers of two below."""
    questions = problems("test", count, seed=0)
    greedy = sample_answers(model, tokenizer, questions, temperature=0)
    sampled = sample_answers(model, tokenizer, questions, samples=samples)
    correct = [sum(is_correct(q, answer) for answer in row) for q, row in zip(questions, sampled)]
    values = {"greedy": [float(is_correct(q, answer)) for q, (answer,) in zip(questions, greedy)]}
    for k in (1, SAMPLES) if samples == SAMPLES else powers_of_two(samples):
        values[f"pass@{k}"] = pass_at_k(correct, samples, k).tolist()
    return values


def base_values(folder: Path, device: str) -> dict:
    """The base model's `task_values`, which are stored in eval.json in its folder."""
    record, key = folder / "eval.json", digest(*weight_files(folder), TEST_PROBLEMS, SAMPLES)
    if not _up_to_date(record, key):
        with stage("evaluation: the base model on the held-out problems") as notes:
            model = Llama.from_pretrained(folder, device=device)
            write_json(record, {"key": key} | task_values(model, load_tokenizer(folder)))
            notes.append(f"in {record}")
    return {name: values for name, values in read_json(record).items() if name != "key"}


def _up_to_date(record: Path, key: str, *files: Path) -> bool:
    """Whether all files exist and the record holds `key`, the hash of their inputs."""
    return all(file.is_file() for file in (record, *files)) and read_json(record).get("key") == key
