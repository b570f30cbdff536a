"""Text to batches: the built-in task, tokenizers on tiktoken, preference pairs, packed rows.

One rule each, with one home here: where the BOS goes (`Tokenizer.prompt_ids`) and the end token
(`make_pair`), what is cut when a pair is too long (`truncate`), what a token sees
(`attention_mask`), which state predicts which token (`pack_batch`), in what order pairs come
(`epoch_order`).
"""

import base64
import binascii
import dataclasses
import json
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

# --- The built-in task: chains of additions and subtractions, with the steps written out ---------

OPERATIONS = 3
LARGEST = 9
# Of a problem's hash, modulo this: 0 is for testing, 1 for validation, the rest for training.
SPLIT_MODULUS = 16


def split_of(problem: str) -> str:
    """A hash of its text says where a problem belongs: no seed can make two splits meet."""
    part = zlib.crc32(problem.encode()) % SPLIT_MODULUS
    return {0: "test", 1: "validation"}.get(part, "train")


def problems(split: str, count: int, seed) -> list[str]:
    """`count` distinct problems of "train", "validation" or "test", like "7+9-3+5\\n"."""
    random = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        numbers = random.integers(0, LARGEST + 1, size=OPERATIONS + 1)
        signs = random.choice(["+", "-"], size=OPERATIONS)
        text = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:])) + "\n"
        if split_of(text) == split:
            found[text] = None
    return list(found)


def solution(problem: str) -> str:
    """The worked answer: one line a step, then the result after "####"."""
    total, *rest = (int(number) for number in re.findall(r"[+-]?\d+", problem))
    lines = []
    for number in rest:
        lines.append(f"{total}{number:+d}={total + number}")
        total += number
    return "\n".join([*lines, f"#### {total}"])


def is_correct(problem: str, answer: str) -> bool:
    """The verifier: the answer's last line is "#### " and the right result."""
    return answer.rpartition("\n")[2] == solution(problem).rpartition("\n")[2]


# --- Tokenizers -------------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Published with Llama 3's tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 249)),
]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
]
# GPT-2's way to write any byte as a visible character: the printable ones stand for themselves.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF_CHAR = {chr(byte): byte for byte in VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(HIDDEN)
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Adds no special token and reads none out of text."""

    encoding: tiktoken.Encoding  # its tokens are merge priorities
    ids: np.ndarray  # merge priority -> id
    token_bytes: dict[int, bytes]  # id -> what it stands for, special tokens included
    bos_id: int | None  # None where sequences start without one
    end_id: int  # ends an answer
    stop_ids: frozenset[int]  # any of these ends a generated answer
    files: dict[str, bytes]  # as they lay on disk, to be saved beside a checkpoint

    @property
    def vocab_size(self) -> int:
        return max(self.token_bytes) + 1

    def encode(self, text: str) -> list[int]:
        return self.ids[self.encoding.encode_ordinary(text)].tolist()

    def prompt_ids(self, text: str) -> list[int]:
        """The beginning of a sequence: one BOS, where there is one, and the text."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def decode(self, ids) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's: such an id stands for nothing.
        return b"".join(self.token_bytes.get(i, b"") for i in ids).decode(errors="replace")

    def save(self, folder) -> None:
        """Writes the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(path) -> Tokenizer:
    """Reads a folder, a `tokenizer.json` (byte-level BPE) or a tiktoken rank file (Llama 3's).

    What the vocabulary file does not say, such as which token ends an answer, is taken from the
    JSON files beside it. Raises OSError or ValueError that names the file and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES[:2] if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer.json and no tokenizer.model in it")
        path = found[0]
    content = path.read_bytes()
    kind = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
    beside = {name: path.parent / name for name in (*TOKENIZER_FILES[2:], "config.json")}
    files = {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
    settings = {
        name: _parse_object(files[name], beside[name]) for name in files if name.endswith(".json")
    }
    files = {name: files[name] for name in files if name != "config.json"} | {kind: content}
    read = _read_tokenizer_json if kind == "tokenizer.json" else _read_rank_file
    try:
        return read(content, settings, files)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not laid out as a {kind} is ({error!r})") from None


def byte_tokenizer() -> Tokenizer:
    """The built-in tokenizer: the 256 bytes, a token that begins and one that ends a sequence."""
    begin, end = (
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for id, text in ((256, "<|begin|>"), (257, "<|end|>"))
    )  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    first, text = ({"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}})  # fmt: skip
    spec = {
        "version": "1.0",
        "added_tokens": [begin, end],
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|begin|>": {"id": "<|begin|>", "ids": [256], "tokens": ["<|begin|>"]}
            },
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": BYTE_OF_CHAR, "merges": []},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
              "eos_token": "<|end|>", "clean_up_tokenization_spaces": False}  # fmt: skip
    content, settings = json.dumps(spec).encode(), {"tokenizer_config.json": config}
    files = {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config).encode()}
    return _read_tokenizer_json(content, settings, files)


def _read_tokenizer_json(content: bytes, settings: dict, files: dict) -> Tokenizer:
    spec = _parse_object(content, "tokenizer.json")
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError("only byte-level BPE is supported, without byte_fallback")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} = {model[key]!r} is not supported")
    if spec.get("normalizer") is not None:
        raise ValueError(f"normalizer {spec['normalizer'].get('type')!r} is not supported")
    priorities = {bytes([byte]): byte for byte in range(256)}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        # The first merge that builds a token is its priority; others that build it come later.
        priorities.setdefault(_token_bytes(left) + _token_bytes(right), len(priorities))
    added = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    for token in spec.get("added_tokens", []):
        if not token["special"]:
            raise ValueError(f"added token {token['content']!r}, not special, is not supported")
    ids = {_token_bytes(text): i for text, i in model["vocab"].items() if text not in added}
    if ids.keys() != priorities.keys():
        odd = min(ids.keys() ^ priorities.keys())
        raise ValueError(f"token {odd!r} is listed in only one of vocab and merges")
    pattern = _pattern(spec.get("pre_tokenizer"))
    bos = _template_bos(spec.get("post_processor"))
    return _build(priorities, ids, added, pattern, bos, settings, files)


def _read_rank_file(content: bytes, settings: dict, files: dict) -> Tokenizer:
    priorities: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"line {number} is not a tiktoken rank (base64, number); of a SentencePiece model "
                "make a tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(...)"
            ) from None
        if rank != len(priorities) or token in priorities:
            raise ValueError(f"line {number}: expected rank {len(priorities)} and a new token")
        priorities[token] = rank
    if not priorities:
        raise ValueError("the file is empty")
    added = {text: len(priorities) + i for i, text in enumerate(LLAMA3_SPECIALS)}
    bos, end = LLAMA3_SPECIALS[:2]
    config = {"eos_token": end} | settings.get("tokenizer_config.json", {})
    settings = settings | {"tokenizer_config.json": config}
    return _build(priorities, priorities, added, LLAMA3_PATTERN, bos, settings, files)


def _build(priorities, ids, added, pattern, bos, settings, files) -> Tokenizer:
    """priorities: bytes -> merge priority; ids: bytes -> id; added: special text -> id."""
    for byte in range(256):
        if bytes([byte]) not in priorities:
            raise ValueError(f"byte {byte} is not a token: not a byte-level vocabulary")
    encoding = tiktoken.Encoding(
        "mio", pat_str=pattern, mergeable_ranks=priorities, special_tokens={}
    )
    table = [ids[token] for token in priorities]  # a dict keeps its order: by priority
    numbers = {*table, *added.values()}
    if len(numbers) < len(table) + len(added) or not all(_is_id(i) for i in numbers):
        raise ValueError("ids of tokens must be different whole numbers from 0 on")
    token_bytes = {i: token for token, i in ids.items()}
    token_bytes |= {i: text.encode() for text, i in added.items()}
    end = settings.get("tokenizer_config.json", {}).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end not in added:
        raise ValueError(
            f"the token that ends an answer, eos_token in tokenizer_config.json, is {end!r}: "
            "name one of the added tokens there"
        )
    stop_ids = {added[end]}
    for name in ("config.json", "generation_config.json"):
        eos = settings.get(name, {}).get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        if not all(i is None or _is_id(i) for i in eos):
            raise ValueError(f"eos_token_id = {eos!r} in {name} beside it: expected ids")
        stop_ids |= set(eos) - {None}
    bos_id = None if bos is None else added[bos]
    return Tokenizer(
        encoding, np.array(table), token_bytes, bos_id, added[end], frozenset(stop_ids), files
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _token_bytes(text: str) -> bytes:
    """The bytes behind a token as byte-level BPE writes it."""
    if not all(char in BYTE_OF_CHAR for char in text):
        raise ValueError(f"token {text!r} is not written in the byte-level alphabet")
    return bytes(BYTE_OF_CHAR[char] for char in text)


def _pattern(pre_tokenizer: dict | None) -> str:
    """The regular expression that cuts text into the pieces within which tokens merge."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *before, byte_level = steps
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError("its pre-tokenizer does not end in ByteLevel without a prefix space")
    if not before:
        return GPT2_PATTERN if byte_level.get("use_regex", True) else r"[\s\S]+"
    (split,) = before if len(before) == 1 else [{}]
    regex = split.get("pattern", {}).get("Regex")
    plain = split.get("behavior") == "Isolated" and not split.get("invert")
    if split.get("type") != "Split" or not plain or not regex or byte_level.get("use_regex", True):
        raise ValueError("its pre-tokenizer is not one Split by a regex followed by ByteLevel")
    return rf"(?:{regex})|(?:(?!{regex})[\s\S])+"  # what lies between matches is a piece, too


def _template_bos(post_processor: dict | None) -> str | None:
    """The special token that a tokenizer.json puts before every text, if it puts one."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def _parse_object(content: bytes | str, where) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


# --- Preference pairs ---------------------------------------------------------------------------


class Pair(NamedTuple):
    """Ids of one prompt and two answers. For supervised training `rejected` is empty."""

    prompt: list[int]  # begins with the BOS, where the tokenizer has one
    chosen: list[int]  # ends with the end token
    rejected: list[int]


def make_pair(tokenizer: Tokenizer, prompt: str, chosen: str, rejected: str | None) -> Pair:
    """Each segment is encoded alone, so that training and generation cut at the same place."""
    return Pair(
        tokenizer.prompt_ids(prompt),
        tokenizer.encode(chosen) + [tokenizer.end_id],
        [] if rejected is None else tokenizer.encode(rejected) + [tokenizer.end_id],
    )


def truncate(pair: Pair, max_length: int, bos_id: int | None) -> Pair:
    """The one rule: answers stay whole, the prompt loses its oldest tokens after the BOS.

    max_length counts the tokens of a prompt and its longer answer. Raises ValueError where not
    even one token of the prompt would be left.
    """
    keep = max_length - max(len(pair.chosen), len(pair.rejected))
    if keep >= len(pair.prompt):
        return pair
    bos = pair.prompt[:1] if bos_id is not None else []
    if keep <= len(bos):
        raise ValueError(
            f"the longer answer has {max_length - keep} tokens and leaves the prompt no room in "
            f"{max_length}; raise --max_length or remove the row"
        )
    return pair._replace(prompt=bos + pair.prompt[len(pair.prompt) - keep + len(bos) :])


def load_pairs(path, tokenizer: Tokenizer, max_length: int = 1024) -> list[Pair]:
    """Reads preference pairs from JSONL: {"prompt": str, "chosen": str, "rejected": str} a line.

    Blank lines are passed over; prompts that had to be cut are counted on standard error. Raises
    OSError, or ValueError that names file and line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    pairs, cut = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            texts = _read_row(line)
            whole = make_pair(tokenizer, *texts)
            if not whole.prompt:
                raise ValueError("the prompt is empty, and this tokenizer has no BOS to begin with")
            pair = truncate(whole, max_length, tokenizer.bos_id)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        cut += pair is not whole
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no rows in it; expected a JSON object with prompt, chosen and "
                         "rejected on each line")  # fmt: skip
    if cut:
        print(f"{path}: {cut} of {len(pairs)} prompts lost their oldest tokens to --max_length "
              f"{max_length}", file=sys.stderr)  # fmt: skip
    return pairs


def _read_row(line: bytes) -> tuple[str, str, str]:
    try:
        row = _parse_object(line.decode("utf-8"), "row")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    for column in ("prompt", "chosen", "rejected"):
        if column not in row:
            raise ValueError(f"no column {column!r}; the row has {', '.join(row) or 'none'}")
        if not isinstance(row[column], str):
            raise ValueError(f"{column!r} must be a string, not {type(row[column]).__name__}")
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    for column in ("chosen", "rejected"):
        if not row[column].strip():
            raise ValueError(f"the {column} answer is empty; remove the row")
    if chosen == rejected:
        raise ValueError("chosen and rejected are identical; remove the row")
    return prompt, chosen, rejected


def split_pairs(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: about `fraction` of them held out, no prompt in both. Raises
    ValueError where the prompts are too few for that."""
    by_prompt: dict[tuple, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(tuple(pair.prompt), []).append(index)
    groups = list(by_prompt.values())
    wanted = max(1, round(fraction * len(pairs))) if fraction else 0
    held_out: set[int] = set()
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[group]) <= wanted:
            held_out.update(groups[group])
    if len(held_out) == len(pairs) or (wanted and not held_out):
        raise ValueError(f"{len(groups)} different prompts are too few to hold out {fraction:.0%} "
                         "of the pairs; use --eval_fraction 0 or --eval_data")  # fmt: skip
    train = [pair for index, pair in enumerate(pairs) if index not in held_out]
    return train, [pairs[index] for index in sorted(held_out)]


# --- Batches: packed rows with a shared prompt ----------------------------------------------------


class Batch(NamedTuple):
    """R rows of T tokens that hold B whole pairs, each laid out once as prompt, chosen, rejected.

    The last token of an answer is predicted but predicts nothing, so it is not laid out.
    """

    tokens: Tensor  # (R, T) ids
    positions: Tensor  # (R, T); the rejected answer starts again after the prompt
    pair: Tensor  # (R, T) number of the pair within its row, -1 at padding
    segment: Tensor  # (R, T) 0 prompt, 1 chosen, 2 rejected
    source: Tensor  # (N,) where in the flattened rows the state lies that predicts each target
    targets: Tensor  # (N,) the answers' ids end to end: chosen_0, rejected_0, chosen_1, ...
    lengths: Tensor  # (2B,) tokens of each answer; stays on the CPU
    index: list[int]  # (B,) which pairs these are

    def to(self, device) -> "Batch":
        moved = [tensor.to(device, non_blocking=True) for tensor in self[:6]]
        return Batch(*moved, self.lengths, self.index)


def attention_mask(pair: Tensor, segment: Tensor) -> Tensor:
    """A token sees the earlier tokens of its own pair that are prompt or of its own segment.

    pair and segment (R, T) -> (R, 1, T, T) bool, True where the row's query sees the column's key.
    """
    T = pair.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=pair.device).tril()
    same_pair = pair[:, :, None] == pair[:, None, :]
    same_segment = segment[:, :, None] == segment[:, None, :]
    return (earlier & same_pair & (same_segment | (segment == 0)[:, None, :]))[:, None]


def row_length(pair: Pair) -> int:
    """Tokens that a pair takes in a packed row."""
    return len(pair.prompt) + sum(len(answer) - 1 for answer in pair[1:] if answer)


def pack(sizes: list[int], row_tokens: int) -> list[list[int]]:
    """First fit, longest first: which sizes share a row of `row_tokens`. Every size must fit."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        assert sizes[item] <= row_tokens, f"{sizes[item]} tokens do not fit a row of {row_tokens}"
        row = next((r for r, free in enumerate(room) if free >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def make_batches(
    pairs: list[Pair], index: list[int], row_tokens: int, micro_tokens: int
) -> list[Batch]:
    """Packs pairs[i] for i in index into rows, and rows into batches of about `micro_tokens`."""
    rows = pack([row_length(pairs[i]) for i in index], row_tokens)
    group = max(1, micro_tokens // row_tokens)
    return [
        pack_batch(pairs, [[index[item] for item in row] for row in rows[start : start + group]])
        for start in range(0, len(rows), group)
    ]


def pack_batch(pairs: list[Pair], rows: list[list[int]]) -> Batch:
    """Lays out each row's pairs one after the other; rows are as long as the longest of them."""
    T = max(sum(row_length(pairs[i]) for i in row) for row in rows)
    tokens, positions, segment = np.zeros((3, len(rows), T), dtype=np.int64)
    pair_number = np.full((len(rows), T), -1)
    source, targets, lengths = [], [], []
    for r, row in enumerate(rows):
        column = 0
        for number, i in enumerate(row):
            prompt, *answers = pairs[i]
            last = r * T + column + len(prompt) - 1  # it predicts the first token of both answers
            parts = [(0, prompt, 0)]
            parts += [(kind, ids[:-1], len(prompt)) for kind, ids in enumerate(answers, start=1)]
            for kind, ids, position in parts:
                here = slice(column, column + len(ids))
                tokens[r, here], segment[r, here], pair_number[r, here] = ids, kind, number
                positions[r, here] = np.arange(position, position + len(ids))
                if kind and answers[kind - 1]:
                    source += [last, *range(r * T + here.start, r * T + here.stop)]
                column = here.stop
            targets += [token for answer in answers for token in answer]
            lengths += [len(answer) for answer in answers]
    arrays = (tokens, positions, pair_number, segment, source, targets, lengths)
    return Batch(*(torch.as_tensor(array) for array in arrays), [i for row in rows for i in row])


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's pairs, a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)
