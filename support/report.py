"""Reports on a file for `python data.py FILE`: rows, lengths, the first pair. Imports data.py."""

import numpy as np

from data import Pair, Pairs, pack_batch, read_pairs, row_length
from support.cli import wrapped

QUANTILES = (0, 25, 50, 75, 95, 100)  # percent
MAX_LINES = 12  # most lines for a prompt or an answer; the middle of a longer text is left out


def describe_file(path, tokenizer, max_length: int, columns: str | None = None) -> str:
    """Returns a report on a data file as text. Raises the same errors as read_pairs."""
    pairs, report = read_pairs(path, tokenizer, max_length, columns)
    forms = ", ".join(f"{count} of {form}" for form, count in report.forms.items())
    lines = [f"{report.rows} rows, of which training uses {forms or 'none'}"]
    lines += map(wrapped, report.lines())
    lines += [f"{len(pairs)} pairs to train on, at most {max_length} tokens each"]
    if not pairs:
        return "\n".join(lines)
    distinct = len({hash(tuple(map(tuple, pair))) for pair in pairs})  # hashes save memory
    lines += [f"{len(pairs) - distinct} of them repeat an earlier pair"]
    lines += ["tokens    " + "".join(f"{f'{q} %':>8}" for q in QUANTILES)]
    for name, lengths in zip(Pair._fields, pairs.lengths().T):
        lengths = lengths[lengths > 0]  # rows for kto and sft lack an answer
        quantiles = np.percentile(lengths, QUANTILES) if len(lengths) else []
        lines += [f"{name:10}" + "".join(f"{tokens:8.0f}" for tokens in quantiles)]
    shared = sum(row_length(pair) for pair in pairs)
    separate = sum(row_length((pair[0], answer)) for pair in pairs for answer in pair[1:] if answer)
    saving = f"{shared:,} tokens to compute instead of {separate:,} ({shared / separate - 1:+.0%})"
    lines += [f"sharing prompts: {saving}", "", f"line {pairs.lines[0]} (^ marks scored tokens):"]
    return "\n".join([*lines, *token_grid(pairs, tokenizer)])


def token_grid(pairs: Pairs, tokenizer) -> list[str]:
    """Returns lines that show the first pair as pack_batch lays it out. A line of tokens begins
    with the position of its first token; in the line below, ^ marks the tokens that are scored."""
    targets, pair, grid = iter(pack_batch(pairs, [[0]]).targets.tolist()), pairs[0], []
    for name, ids in zip(Pair._fields, pair):
        lines = []  # lines of tokens alternate with lines of marks
        for offset, id in enumerate(ids):
            text = tokenizer.token_bytes[id].decode(errors="backslashreplace")
            text = repr(text)[1:-1].replace(" ", "·")
            if not lines or len(lines[-2]) + len(text) >= 79:
                position = offset + (0 if name == "prompt" else len(pair.prompt))
                lines += [f"{name:8} {position:5}", " " * 14]
            mark = "^" if name != "prompt" and id == next(targets) else " "
            lines[-2] += f" {text}"
            lines[-1] += f" {mark * len(text)}"
        if len(lines) > MAX_LINES:
            lines[MAX_LINES // 2 : -MAX_LINES // 2] = [f"{name:8}   ..."]
        grid += [line.rstrip() for line in lines if line.strip()]
    return grid
