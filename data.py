"""Turns the rows of a data file into packed batches.

    row of the file -> Example (support/rows.py) -> Pair of token ids -> Batch

One function implements each of these rules: where the end token goes
(`encode_example`), how a pair that is too long is cut (`truncate`), which
tokens attend to which (`attention_rule`), which hidden state predicts which
token (`pack_batch`), and the order of pairs in an epoch (`epoch_order`).

    python data.py FILE --tokenizer FOLDER    how training uses a file
"""

import functools
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from support.cli import DataOptions, Parser, add_options
from support.hub import find
from support.rows import COLUMNS, ROW_FORMS, Example, Report, UnusableError, data_rows, read_row
from support.tokenizers import Tokenizer, load_tokenizer

# --- Pairs of token ids ---------------------------------------------------------------------------


class Pair(NamedTuple):
    """Token ids of one prompt and two answers. A missing answer is an empty list."""

    prompt: list[int]  # begins with the BOS token if the tokenizer has one
    chosen: list[int]  # ends with the end token, or with the token that ends a chat turn
    rejected: list[int]


class Pairs(Sequence):
    """A list of pairs, stored in arrays that take four bytes per token. pairs[i] returns a Pair."""

    def __init__(self, pairs: Iterable[Pair] = ()):
        self.ids = array("i")  # prompt, chosen, rejected of each pair, end to end
        self.ends = array("q", [0])  # 0, then the end of each of these parts in `ids`
        self.lines = array("i")  # the line number of each pair in its file; 0 if there is no file
        for pair in pairs:
            self.append(pair)

    def append(self, pair: Pair, line: int = 0) -> None:
        for part in pair:
            self.ids.extend(part)
            self.ends.append(len(self.ids))
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        first = 3 * range(len(self))[index]  # range handles negative indices and IndexError
        ends = self.ends[first : first + 4]
        return Pair(*(self.ids[a:b].tolist() for a, b in zip(ends, ends[1:])))

    def take(self, indices: Iterable[int]) -> "Pairs":
        taken = Pairs()
        for i in indices:
            taken.append(self[i], self.lines[i])
        return taken

    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each prompt, chosen and rejected answer: (pairs, 3)."""
        return np.diff(np.array(self.ends)).reshape(len(self), 3)


def encode_example(example: Example, tokenizer: Tokenizer) -> Pair:
    """Encodes the prompt without the answers, because generation sees the prompt alone. Appends the
    end token to each answer; in a conversation, the chat template decides how an answer ends."""
    answers = example.chosen, example.rejected
    if isinstance(example.prompt, list):
        prompt, found = tokenizer.turns(example.prompt, [a for a in answers if a], example.values)
        ids = iter(found)
        return Pair(prompt, *([] if answer is None else next(ids) for answer in answers))
    encode = tokenizer.continue_ids if example.continues else tokenizer.encode
    ids = ([] if text is None else [*encode(text), tokenizer.end_id] for text in answers)
    return Pair(tokenizer.prompt_ids(example.prompt), *ids)


def truncate(pair: Pair, max_length: int, bos_id: int | None) -> Pair:
    """Drops the oldest tokens of the prompt, except its BOS token, until the prompt and the longer
    answer together have at most `max_length` tokens. Answers stay complete. Raises UnusableError if
    no token of the prompt besides BOS would be left."""
    room = max_length - max(len(pair.chosen), len(pair.rejected))
    if room >= len(pair.prompt):
        return pair
    bos = pair.prompt[:1] if pair.prompt[0] == bos_id else []
    if room <= len(bos):
        raise UnusableError("the longer answer leaves no room for the prompt; raise --max_length")
    return pair._replace(prompt=bos + pair.prompt[len(pair.prompt) - room + len(bos) :])


def read_pairs(path, tokenizer: Tokenizer, max_length: int, columns=None) -> tuple[Pairs, Report]:
    """Returns the usable pairs of a JSONL or Parquet file, and a report on all of its rows.
    Raises OSError, or a ValueError that names the file and the line."""
    pairs, report = Pairs(), Report()
    # A chat template may write the BOS token of a tokenizer that adds none itself.
    bos_id = tokenizer.added.get(tokenizer.names.get("bos_token"), tokenizer.bos_id)
    for line, row in data_rows(path, columns):
        report.rows += 1
        report.unused |= dict.fromkeys(row.keys() - COLUMNS)
        try:
            example = read_row(row)
            complete = encode_example(example, tokenizer)
            if not complete.prompt:
                raise UnusableError("the prompt is empty, and this tokenizer has no BOS token")
            pair = truncate(complete, max_length, bos_id)
        except UnusableError as reason:
            report.dropped.setdefault(str(reason), []).append(line)
            continue
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        report.forms[example.form] += 1
        pairs.append(pair, line)
        if pair is not complete:
            report.truncated.append(line)
    return pairs, report


def load_pairs(path, tokenizer: Tokenizer, max_length: int = 1024, columns=None) -> Pairs:
    """Calls read_pairs and prints to standard error which rows were dropped or truncated. Raises
    the same errors, and a ValueError that names the file and says why if no row can be used."""
    pairs, report = read_pairs(path, tokenizer, max_length, columns)
    if not pairs:
        why = "; ".join(report.lines()) or f"the file is empty; {ROW_FORMS}"
        raise ValueError(f"{path}: no rows to train on: {why}")
    for line in report.lines():
        print(f"{path}: {line}", file=sys.stderr)
    return pairs


def split_pairs(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Splits pairs into training pairs and held-out pairs; about `fraction` of the pairs are held
    out. No prompt is in both parts. Raises ValueError if there are too few prompts."""
    by_prompt: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(hash(tuple(pair.prompt)), []).append(index)
    groups = list(by_prompt.values())
    wanted = max(1, round(fraction * len(pairs))) if fraction else 0
    held_out: set[int] = set()
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[group]) <= wanted:
            held_out.update(groups[group])
    if len(held_out) == len(pairs) or (wanted and not held_out):
        raise ValueError(f"{len(groups)} different prompts are too few to hold out {fraction:.0%} "
                         "of the pairs; use --eval_fraction 0 or --eval_data")  # fmt: skip
    train = (index for index in range(len(pairs)) if index not in held_out)
    return pairs.take(train), pairs.take(sorted(held_out))


# --- Packed batches: the two answers of a pair share the prompt's computation ---------------------

LAYOUT = (128, 4096)  # default row_tokens, micro_tokens: most tokens in a row, in a forward pass


class Batch(NamedTuple):
    """B complete pairs in rows that lie end to end; each pair is laid out as prompt, chosen,
    rejected. The last token of an answer is a target but not an input, so it is not laid out. T is
    the number of tokens in all rows, plus padding if the batch has a fixed length."""

    tokens: Tensor  # (1, T) ids
    positions: Tensor  # (1, T); both answers start at the position after the prompt
    pair: Tensor  # (T,) number of the pair within the batch, -1 for padding
    segment: Tensor  # (T,) 0 for the prompt, k for the k-th answer: 1 chosen, 2 rejected
    source: Tensor  # (N,) which of the T hidden states predicts each target
    targets: Tensor  # (N,) the ids of the answers end to end: chosen_0, rejected_0, chosen_1, ...
    lengths: Tensor  # (S,) number of tokens of each answer, S = 2B for pairs
    counts: list[int]  # `lengths` as a list, which the CPU reads without waiting for a GPU
    row_lengths: list[int]  # number of tokens of each row
    index: list[int]  # (B,) the index of each pair in the list that was packed
    ref_logps: Tensor | None = None  # (2B,) nats, in the order of `lengths`
    advantages: Tensor | None = None  # (2B,), for rlhf

    def with_values(self, ref_logps: Tensor | None, advantages: Tensor | None = None) -> "Batch":
        """Adds the rows of this batch from tensors (pairs, 2)."""
        rows = [x if x is None else x[self.index].flatten() for x in (ref_logps, advantages)]
        return self._replace(ref_logps=rows[0], advantages=rows[1])  # (B, 2) -> (2B,)

    def to(self, device: torch.device) -> "Batch":
        """Copies the tensors to a device. On a GPU, a pass needs nothing else from the CPU, and the
        CPU does not wait: copies from pinned memory are queued behind earlier work."""

        def moved(value):
            if not isinstance(value, Tensor):
                return value
            value = value.pin_memory() if device.type == "cuda" else value
            return value.to(device, non_blocking=True)

        return Batch(*map(moved, self))


class StepData(NamedTuple):
    """The data of a training step. Batch.index gives a batch's rows in the (pairs, 2) tensors."""

    batches: list[Batch]
    ref_logps: Tensor | None = None  # (pairs, 2) nats
    advantages: Tensor | None = None  # (pairs, 2), for rlhf
    mismatched: tuple[list[Batch], Tensor] | None = None  # for kto: batches and their ref_logps
    pairs: Pairs = ()
    index: Sequence[int] = ()  # Batch.index of all batches
    metrics: dict[str, float] = {}  # metrics of the answers that the policy draws


def attention_rule(batch: Batch, window: int | None = None) -> Callable:
    """Returns a mask_mod of FlexAttention: a token attends to itself and to the earlier tokens of
    its pair that belong to the prompt or to its own segment. With a sliding window, the token
    attends only to tokens fewer than `window` positions back."""
    pair, segment, position = batch.pair, batch.segment, batch.positions[0]

    def rule(_batch, _head, query, key):
        visible = (segment[key] == 0) | (segment[key] == segment[query])
        allowed = (query >= key) & (pair[key] == pair[query]) & visible
        return allowed if window is None else allowed & (position[query] - position[key] < window)

    return rule


def row_masks(batch: Batch, window: int | None = None) -> list[Tensor]:
    """Returns a dense bool mask (1, 1, t, t) of the attention rule for each row of t tokens."""
    rule = attention_rule(batch, window)
    places = torch.arange(sum(batch.row_lengths), device=batch.pair.device)
    rows = places.split(batch.row_lengths)  # (t,) each
    return [rule(0, 0, row[:, None], row[None, :])[None, None] for row in rows]


def row_length(pair: Sequence) -> int:
    """Returns how many tokens a prompt and its answers, one or more, occupy in a packed row."""
    prompt, *answers = pair
    return len(prompt) + sum(len(answer) - 1 for answer in answers if answer)


def pack(sizes: list[int], row_tokens: int) -> list[list[int]]:
    """Packs items of given sizes into rows of up to `row_tokens` tokens by first-fit decreasing.
    Returns the indices of each row's items. An item with more tokens gets a row of its own."""
    rows, room = [], []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, free in enumerate(room) if free >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def make_batches(
    pairs: Sequence, index: list[int], row_tokens: int, micro_tokens: int, pad: bool = False
) -> list[Batch]:
    """Packs pairs[i] for i in index into rows, and rows into batches of at most `micro_tokens`
    tokens. A longer row becomes a batch of its own. `pad` pads to a multiple of `micro_tokens`."""
    sizes = [row_length(pairs[i]) for i in index]
    batches, room = [], 0
    for row in pack(sizes, row_tokens):
        size = sum(sizes[item] for item in row)
        if size > room:
            batches.append([])
            room = micro_tokens
        batches[-1].append([index[item] for item in row])
        room -= size
    return [pack_batch(pairs, rows, micro_tokens if pad else 1) for rows in batches]


def pack_batch(pairs: Sequence, rows: list[list[int]], multiple: int = 1) -> Batch:
    """Builds a batch from rows of indices into `pairs`, padded to a `multiple` of tokens."""
    row_lengths = [sum(row_length(pairs[i]) for i in row) for row in rows]
    index = [i for row in rows for i in row]
    T = -(-sum(row_lengths) // multiple) * multiple
    tokens, positions, segment = np.zeros((3, T), dtype=np.int64)
    pair_number = np.full(T, -1)
    source, targets, lengths, column = [], [], [], 0
    for number, i in enumerate(index):
        prompt, *answers = pairs[i]
        last = column + len(prompt) - 1  # the last prompt token predicts the first of each answer
        for kind, ids in enumerate([prompt, *answers]):
            inputs, position = (ids[:-1], len(prompt)) if kind else (prompt, 0)
            here = slice(column, column + len(inputs))
            tokens[here], segment[here], pair_number[here] = inputs, kind, number
            positions[here] = np.arange(position, position + len(inputs))
            if kind and ids:
                source += [last, *range(here.start, here.stop)]
            column = here.stop
        targets += [token for answer in answers for token in answer]
        lengths += [len(answer) for answer in answers]
    arrays = (tokens[None], positions[None], pair_number, segment, source, targets, lengths)
    return Batch(*(torch.as_tensor(array) for array in arrays), lengths, row_lengths, index)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the pairs in an epoch (count,). It depends only on the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


# --- The forward pass of a batch ------------------------------------------------------------------


def answer_states(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the hidden states that predict the tokens of the answers, end to end: (N, D)."""
    window = model.config.sliding_window
    if needs_fixed_length(model):
        T = batch.tokens.shape[1]
        rule = attention_rule(batch, window)
        mask = _compiled_block_mask()(rule, None, None, T, T, device=batch.tokens.device)
    else:
        mask = row_masks(batch, window)
    return model(batch.tokens, batch.positions, mask)[0, batch.source]


@functools.cache
def _compiled_block_mask() -> Callable:
    return torch.compile(create_block_mask)  # never stores the (T, T) mask


def needs_fixed_length(model: nn.Module) -> bool:
    """Tells whether batches must be padded to one length, for which FlexAttention is compiled."""
    return model.compiled and model.head_weight.is_cuda


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns a context that runs matrix products in `dtype`; float32 switches autocast off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# --- The command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    from support.report import describe_file  # imports this file

    parser = Parser("data.py", __doc__)
    parser.add_argument("file", metavar="FILE", help="JSONL file, plain or .gz, or Parquet file")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="folder, file or name")
    parser.add_argument("--max_length", type=int, default=1024, help="of prompt and longer answer")
    add_options(parser, DataOptions)
    options = parser.parse_args(argv)
    if options.max_length < 2:
        parser.error(f"--max_length {options.max_length}: must be at least 2")
    try:
        folder = find(options.tokenizer, weights=False)
        tokenizer = load_tokenizer(folder, options.chat_template_kwargs)
        print(describe_file(options.file, tokenizer, options.max_length, options.columns))
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the console may lack some characters
    main()
