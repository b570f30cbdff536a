"""Speed, as ratios within one run: python tests/bench.py [tokenizers] [loading]

Each figure is the best of several rounds that alternate between the contenders, on one thread.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import conftest  # noqa: F401 puts the project on the path
import tokenizers
from test_tokenizers import FAMILIES, SAMPLES, strings, write_tokenizer

from data import load_pairs, load_tokenizer, problems, solution

ROUNDS = 5


def best_of(contenders: dict) -> dict[str, float]:
    """Seconds of each, the contenders taking turns."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, (run, *arguments) in contenders.items():
            start = time.perf_counter()
            run(*arguments)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def one_by_one(encode, texts: list[str], *arguments) -> None:
    for text in texts:
        encode(text, *arguments)


def bench_tokenizers() -> None:
    """Ours against the tokenizers library: texts one by one, and its batches."""
    prose = [solution(problem) + problem for problem in problems("train", 3000, seed=0)]
    code = Path(__file__).read_text(encoding="utf-8").split("\n\n") * 40
    corpora = {"arithmetic": prose, "code": code, "all sorts": strings(3000), "long": SAMPLES * 3}
    corpora["long"] = ["".join(corpora["long"])] * 40
    print(f"{'':16}{'':12}{'ours':>12}{'one by one':>14}{'batches':>12}   (MB/s, ratio)")
    for family in ("gpt2", "llama3", "qwen", "smollm", "llama2", "mistral"):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), FAMILIES[family]())
            ours = load_tokenizer(folder)
            theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        for name, texts in corpora.items():
            seconds = best_of(
                {
                    "ours": (one_by_one, ours.encode, texts),
                    "one": (one_by_one, theirs.encode, texts, None, False, False),
                    "batch": (theirs.encode_batch_fast, texts, False, False),
                }
            )
            size = sum(len(text.encode()) for text in texts) / 1e6
            cells = [
                f"{size / seconds[k]:.1f} ({seconds[k] / seconds['ours']:.2f})" for k in seconds
            ]
            print(f"{family:16}{name:12}" + "".join(f"{cell:>13}" for cell in cells))


def bench_loading() -> None:
    """100,000 rows of the built-in task, with the tokenizer's own share taken out and left in."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), FAMILIES["llama3"]())
        tokenizer, file = load_tokenizer(folder), Path(folder) / "rows.jsonl"
        texts = []
        with open(file, "w", encoding="utf-8") as rows:
            for problem in problems("train", 10_000, seed=0) * 10:
                texts += [problem, solution(problem), solution(problem) + "0"]
                row = dict(zip(("prompt", "chosen", "rejected"), texts[-3:]))
                rows.write(json.dumps(row) + "\n")
        seconds = best_of(
            {
                "load": (load_pairs, file, tokenizer),
                "encode": (one_by_one, tokenizer.encode, texts),
            }
        )
        pairs = load_pairs(file, tokenizer)
        held = sum(part.itemsize * len(part) for part in (pairs.ids, pairs.ends, pairs.lines))
        print(f"{len(pairs):,} rows of {file.stat().st_size / len(pairs):.0f} bytes: "
              f"{len(pairs) / seconds['load']:,.0f} rows/s, without encoding "
              f"{len(pairs) / (seconds['load'] - seconds['encode']):,.0f} rows/s; "
              f"{held / len(pairs.ids):.1f} bytes an id")  # fmt: skip


if __name__ == "__main__":
    known = {"tokenizers": bench_tokenizers, "loading": bench_loading}
    for name in sys.argv[1:] or known:
        known[name]()
