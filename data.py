"""Text to batches: the built-in task, tokenizers on tiktoken, preference pairs, packed rows.

One rule each, with one home here: where the BOS goes (`Tokenizer.prompt_ids`) and the end token
(`make_pair`), what is cut when a pair is too long (`truncate`), what a token sees
(`sees`), which state predicts which token (`pack_batch`), in what order pairs come
(`epoch_order`).
"""

import argparse
import base64
import binascii
import contextlib
import dataclasses
import datetime
import functools
import gzip
import heapq
import itertools
import json
import math
import re
import sys
import textwrap
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from jinja2 import nodes  # comes with torch
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer
from torch import Tensor
from tqdm import tqdm

try:
    import resource
except ImportError:  # Unix alone has it
    resource = None

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
# Whatever the text, these end soon, in tiktoken as here; each leaves nothing between its matches.
KNOWN_PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""))  # Qwen's
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
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
SPACE = "▁"  # SentencePiece's way to write a space
CUT_SECONDS = 2  # of work on a text by a stranger's pattern; ours take far less
LARGEST_VOCABULARY = 2**26  # bytes of its file; the largest there are take half of it
LARGEST_BESIDE = 2**24  # and of each file beside it
LONG_TEXT = 50_000  # characters from which on tiktoken's regular expressions may run out of stack


def merge(symbols: Iterable[str], ranks: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """Byte-pair encoding itself: the best-ranked adjacent pair joins first, the leftmost of equals.

    Returns the symbols that are left, and the rank of the last pair that joined, -1 for none. So
    merges the tokenizers library; it is the oracle of tiktoken's merging.
    """
    symbols = list(symbols)
    count = len(symbols)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    queue = [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]
    heapq.heapify(queue)
    last = -1
    while queue:
        rank, left = heapq.heappop(queue)
        right = after[left]
        if right == count or ranks.get((symbols[left], symbols[right])) != rank:
            continue  # one of the two has joined another symbol since
        last, symbols[left], symbols[right] = rank, symbols[left] + symbols[right], ""
        after[left] = after[right]
        if after[left] < count:
            before[after[left]] = left
        for a, b in ((before[left], left), (left, after[left])):
            if a >= 0 and b < count and (symbols[a], symbols[b]) in ranks:
                heapq.heappush(queue, (ranks[symbols[a], symbols[b]], a))
    return [symbol for symbol in symbols if symbol], last


class Bpe(NamedTuple):
    """Text to ids by merges within pieces, on tiktoken wherever that gives the same."""

    pieces: regex.Pattern  # the pieces of a text are its matches
    encoding: tiktoken.Encoding | None  # its tokens are merge priorities; None: use `merged`
    ids: list[int]  # priority -> id
    split: dict[int, list[int]]  # priorities that stand for several ids: unfinished characters
    merged: Callable[[str], tuple[int, ...]] | None  # a piece to ids by `merge`, the oracle

    def encode(self, text: str) -> list[int]:
        if self.encoding is None:
            return [i for match in self.pieces.finditer(text) for i in self.merged(match[0])]
        if len(text) > LONG_TEXT:
            single, pieces = self.encoding._encode_single_piece, self.pieces.finditer(text)
            found = [priority for match in pieces for priority in single(match[0])]
        else:
            found = self.encoding.encode_ordinary(text)
        if self.split and not self.split.keys().isdisjoint(found):
            return [i for p in found for i in self.split.get(p) or (self.ids[p],)]
        return list(map(self.ids.__getitem__, found))


def byte_pairs(
    vocab: dict[str, int], merges: list[tuple[str, str]], whole: bool, bytewise: bool, pattern: str
) -> Bpe:
    """The merges of a tokenizer.json on tiktoken. whole: a piece that is a token stays as it is;
    bytewise: symbols are bytes, written as in BYTE_OF_CHAR, else characters with byte fallback.

    tiktoken joins any two neighbours that together are a token; a tokenizer.json lists the pairs
    that may. But while no merge crosses a token's two ends, what happens between them depends on
    its own symbols alone. So `merge` of each token by itself tells whether text can ever form it,
    and by which pair, the only one into which it can fall at last: tiktoken with just the tokens
    that can be formed, at the ranks of those pairs, does the same as `merge` on any text.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}

    def is_text(token):
        return vocab.keys() >= set(token) and (not bytewise or BYTE_OF_CHAR.keys() >= set(token))

    def raw(token):
        return bytes(map(BYTE_OF_CHAR.get, token)) if bytewise else token.encode()

    def byte_token(byte):
        return CHAR_OF_BYTE[byte] if bytewise else f"<0x{byte:02X}>"

    @functools.lru_cache(maxsize=2**16)
    def merged(piece):
        symbols = "".join(map(CHAR_OF_BYTE.get, piece.encode())) if bytewise else piece
        if whole and symbols in vocab:
            return (vocab[symbols],)
        symbols = [[c] if c in vocab else map(byte_token, c.encode()) for c in symbols]
        return tuple(vocab[s] for s in merge(itertools.chain.from_iterable(symbols), ranks)[0])

    live, alone = {}, []
    for token in vocab if whole else {left + right for left, right in merges}:
        if len(token) > 1 and is_text(token):
            symbols, rank = merge(token, ranks)
            if len(symbols) == 1:
                live[token] = rank
            elif whole and len(symbols) > 2:  # found as a whole piece only, so ranked last
                alone.append(token)
            elif whole:  # two neighbours could make it, which is wrong within a longer piece
                return Bpe(regex.compile(pattern), None, [], {}, merged)

    priorities = {bytes([byte]): byte for byte in range(256)}
    for char in () if bytewise else filter(is_text, (c for c in vocab if len(c) == 1)):
        for end in range(2, len(char.encode()) + 1):  # its bytes join before all else
            priorities.setdefault(char.encode()[:end], len(priorities))
    for token in [*sorted(live, key=live.get), *alone]:
        priorities[raw(token)] = len(priorities)
    known = {raw(token): [id] for token, id in vocab.items() if is_text(token)}
    ids = [known.get(token) or [vocab[byte_token(byte)] for byte in token] for token in priorities]
    split = {priority: several for priority, several in enumerate(ids) if len(several) > 1}
    return Bpe(*_on_tiktoken(pattern, priorities), [one[0] for one in ids], split, merged)


def _on_tiktoken(pattern: str, priorities: dict[bytes, int]):
    tokens = {"mergeable_ranks": priorities, "special_tokens": {}}
    return regex.compile(pattern), tiktoken.Encoding("mio", pat_str=pattern, **tokens)


def cut(pattern: regex.Pattern, text: str) -> list[str]:
    """The matches of a stranger's pattern and what lies between them. Raises ValueError where that
    takes as long as only a catastrophic pattern does."""
    pieces, place = [], 0
    try:
        for match in pattern.finditer(text, timeout=CUT_SECONDS + len(text) / 1e5):
            pieces += [text[place : match.start()], match[0]]
            place = match.end()
    except (TimeoutError, MemoryError):
        raise ValueError(f"tokenizer.json: its Split by {pattern.pattern!r:.60} takes more than "
                         f"{CUT_SECONDS} s for a text like {text!r:.20}") from None  # fmt: skip
    return [piece for piece in (*pieces, text[place:]) if piece]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Adds no special token and reads none out of text."""

    bpe: Bpe
    form: str | None  # Unicode normal form that text is brought into
    space: str  # SentencePiece's prefix: never, first, always, legacy; "" where symbols are bytes
    cuts: list[regex.Pattern]  # text is cut by these, one after the other, before `bpe`
    added: dict[str, int]  # added tokens: text -> id
    reserved: dict[str, int]  # those of them that are special
    special: regex.Pattern | None  # any of them: what a chat template may have written
    literal: regex.Pattern | None  # those that are not special, which are read out of any text
    token_bytes: dict[int, bytes]  # id -> what it stands for, added tokens included
    byte_ids: frozenset[int]  # the tokens of byte fallback
    strip: bool  # decoding drops the prefix again
    bos_id: int | None  # None where sequences start without one
    end_id: int  # ends an answer
    stop_ids: frozenset[int]  # any of these ends a generated answer
    names: dict[str, str]  # bos_token, eos_token and so on, as chat templates call them
    template: str | None  # the chat template
    files: dict[str, bytes]  # as they lay on disk, to be saved beside a checkpoint

    @property
    def vocab_size(self) -> int:
        return max(self.token_bytes) + 1

    def encode(self, text: str) -> list[int]:
        """Ids as transformers gives with add_special_tokens=False, split_special_tokens=True."""
        return self._encode(text, self.literal)

    def prompt_ids(self, text: str) -> list[int]:
        """The beginning of a sequence: one BOS, where there is one, and the text."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def continue_ids(self, text: str) -> list[int]:
        """Ids of text that goes on from other text: as `encode`, without SentencePiece's prefix."""
        return self._encode(text, self.literal, after="text")

    def _encode(self, text: str, added, mark: str = "", after: str = "nothing") -> list[int]:
        """added: the tokens to find in text; mark: a sign to take out of it afterwards; after:
        what precedes the text, "nothing", "text" or a "token" from among the added ones."""
        if added is None:
            return self._plain(text, after)
        ids, place = [], 0
        for match in added.finditer(text):
            ids += self._plain(text[place : match.start()].replace(mark, ""), after)
            ids.append(self.added[match[match.lastindex]])
            place, after = match.end(), "token" if match.end() else after
        return ids + self._plain(text[place:].replace(mark, ""), after)

    def _plain(self, text: str, after: str) -> list[int]:
        if self.form:
            text = unicodedata.normalize(self.form, text)
        if self.space:
            text = text.replace(" ", SPACE)
            schemes = {"nothing": ("first", "always", "legacy"), "token": ("always", "legacy")}
            prefix = self.space in schemes.get(after, ())
            if text and prefix and (self.space == "legacy" or not text.startswith(SPACE)):
                text = SPACE + text
        if not self.cuts:
            return self.bpe.encode(text)
        pieces = [text]
        for pattern in self.cuts:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        return [id for piece in pieces for id in self.bpe.encode(piece)]

    def decode(self, ids) -> str:
        """Text; what is not UTF-8 becomes U+FFFD."""
        # A model's vocabulary may be padded beyond the tokenizer's: such an id stands for nothing.
        if not self.space:
            return b"".join(self.token_bytes.get(i, b"") for i in ids).decode(errors="replace")
        text = ""
        for is_byte, run in itertools.groupby(ids, key=self.byte_ids.__contains__):
            raw = b"".join(self.token_bytes.get(i, b"") for i in run)
            try:
                text += raw.decode() if is_byte else raw.decode().replace(SPACE, " ")
            except UnicodeDecodeError:
                text += "\ufffd" * len(raw)
        return text.removeprefix(" ") if self.strip else text

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Ids of [{"role": ..., "content": ...}, ...] by the chat template.

        The ids of transformers' apply_chat_template, but what reads like a special token inside a
        message stays text. Raises ValueError where there is no template or it fails.
        """
        mark = self._mark(messages)
        return self._encode(self._write(messages, add_generation_prompt, mark), self.special, mark)

    def turns(self, messages: list[dict], answers: list[dict]) -> tuple[list[int], list[list[int]]]:
        """Ids of a conversation up to its answer, and of each answer as the template goes on with
        it, up to and with the token that ends it. Joined they are the beginning of the whole's ids.
        Raises UnusableError where the template refuses the conversation.
        """
        mark, found = self._mark([*messages, *answers]), []
        head = self._write(messages, True, mark)
        ends = [match.end() for match in self.special.finditer(head)] if self.special else []
        after = "token" if ends and ends[-1] == len(head) else "text"
        for answer in answers:
            whole = self._write([*messages, answer], False, mark)
            if not whole.startswith(head):
                raise UnusableError("the chat template does not write the answer after its prompt")
            ids = self._encode(whole[len(head) :], self.special, mark, after)
            stops = [i for i, id in enumerate(ids) if id in self.stop_ids]
            closing = [i for i, id in enumerate(ids) if id in self.reserved.values()]
            end = stops[0] if stops else closing[-1] if closing else len(ids)
            found.append(ids[: end + 1] if end < len(ids) else [*ids, self.end_id])
        return self._encode(head, self.special, mark), found

    def _mark(self, messages: list[dict]) -> str:
        """A sign that is in no message, to break up what reads like a special token in one until it
        is encoded; "" where nothing does."""
        text = "".join(message["content"] for message in messages)
        if not any(token in text for token in self.reserved):
            return ""
        free = (chr(i) for i in range(0xFDD0, 0xFDF0) if chr(i) not in text)
        return next(free, "")  # no sane text has all of these noncharacters

    def _write(self, messages: list[dict], add_generation_prompt: bool, mark: str) -> str:
        if self.template is None:
            raise ValueError("messages need a chat template, and the tokenizer has none; put a "
                             "chat_template.jinja into its folder")  # fmt: skip
        for token in self.reserved if mark else ():
            broken = token[:1] + mark + token[1:]
            messages = [m | {"content": m["content"].replace(token, broken)} for m in messages]
        return render_template(self.template, messages, add_generation_prompt, self.names)

    def save(self, folder) -> None:
        """Writes the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(path) -> Tokenizer:
    """Reads a folder, a `tokenizer.json` (BPE, byte-level or SentencePiece-style) or a tiktoken
    rank file (Llama 3's).

    What the vocabulary file does not say, such as which token ends an answer, is taken from the
    JSON files beside it. Raises OSError or ValueError that names the file and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES[:2] if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer.json and no tokenizer.model in it")
        path = found[0]
    content = _read(path, LARGEST_VOCABULARY)
    kind = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
    beside = {name: path.parent / name for name in (*TOKENIZER_FILES[2:], "config.json")}
    files = {name: _read(file, LARGEST_BESIDE) for name, file in beside.items() if file.is_file()}
    settings = {
        name: _parse_object(files[name], beside[name]) for name in files if name.endswith(".json")
    }
    files = {name: files[name] for name in files if name != "config.json"} | {kind: content}
    read = _read_tokenizer_json if kind == "tokenizer.json" else _read_rank_file
    try:
        return read(content, settings, files)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: not laid out as a {kind} is ({error!r:.200})") from None


def _read(path: Path, most: int) -> bytes:
    if path.stat().st_size > most:
        raise ValueError(f"{path}: has more than {most >> 20} MiB")
    return path.read_bytes()


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
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}; only BPE can be read, as Llama, Mistral, "
                         "Qwen and SmolLM use it")  # fmt: skip
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} = {model[key]!r} is not supported")
    vocab, whole = model["vocab"], bool(model.get("ignore_merges"))
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    for left, right in merges:
        if not vocab.keys() >= {left, right, left + right}:
            raise ValueError(f"merge of {left!r} and {right!r}: they or what they make are not in "
                             "the vocabulary")  # fmt: skip
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    bytewise = any(step["type"] == "ByteLevel" for step in steps)
    own = None if bytewise else _llama_metaspace(settings)
    steps, normalizer = ([own], None) if own else (steps, spec.get("normalizer"))
    if not bytewise and not model.get("byte_fallback"):
        raise ValueError("neither ByteLevel nor byte_fallback: text beyond its vocabulary would be "
                         "lost")  # fmt: skip
    needed = BYTE_OF_CHAR if bytewise else [f"<0x{byte:02X}>" for byte in range(256)]
    for byte, token in enumerate(needed):
        if token not in vocab:
            raise ValueError(f"byte {byte} has no token {token!r} in the vocabulary")
    form, space = _normalizer(_steps(normalizer, "normalizers"), steps, bytewise)
    if bytewise:
        *cuts, pattern = _cuts(steps)
    else:
        cuts, pattern = [], _words(steps, merges, whole)
    added_tokens = spec.get("added_tokens") or []
    for token in added_tokens:
        if token.get("single_word"):
            raise ValueError(f"added token {token['content']!r}: single_word is not supported")
    decoder = _steps(spec.get("decoder"), "decoders")
    token_bytes = {i: _bytes_of(token, bytewise) for token, i in vocab.items()}
    return _tokenizer(
        byte_pairs(vocab, merges, whole, bytewise, pattern), token_bytes, added_tokens, settings,
        files, vocab=vocab, form=form, space=space, cuts=[regex.compile(cut) for cut in cuts],
        byte_ids=frozenset() if bytewise else frozenset(vocab[token] for token in needed),
        strip=any(step["type"] in ("Strip", "Metaspace") for step in decoder) and space != "never",
        bos=_template_bos(spec.get("post_processor")),
    )  # fmt: skip


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
    for byte in range(256):
        if bytes([byte]) not in priorities:
            raise ValueError(f"byte {byte} is not a token: not Llama 3's kind of rank file")
    added_tokens = [
        {"content": text, "id": len(priorities) + i, "special": True}
        for i, text in enumerate(LLAMA3_SPECIALS)
    ]
    bos, end = LLAMA3_SPECIALS[:2]
    config = {"bos_token": bos, "eos_token": end} | settings.get("tokenizer_config.json", {})
    settings = settings | {"tokenizer_config.json": config}
    bpe = Bpe(*_on_tiktoken(LLAMA3_PATTERN, priorities), list(priorities.values()), {}, None)
    token_bytes = {rank: token for token, rank in priorities.items()}
    return _tokenizer(bpe, token_bytes, added_tokens, settings, files, vocab={}, form=None,
                      space="", cuts=[], byte_ids=frozenset(), strip=False, bos=bos)  # fmt: skip


def _tokenizer(bpe, token_bytes, added_tokens, settings, files, *, vocab, bos, **fields):
    """What both kinds of file have in common: added tokens, and what lies beside the file."""
    added = {token["content"]: token["id"] for token in added_tokens}
    ids = [*token_bytes, *(i for text, i in added.items() if vocab.get(text) != i)]
    repeat = len(set(ids)) < len(ids) or len(token_bytes) < len(vocab)
    if repeat or not all(_is_id(i) for i in ids):
        raise ValueError("ids of tokens must be different whole numbers from 0 on")
    config = settings.get("special_tokens_map.json", {})
    config = config | settings.get("tokenizer_config.json", {})
    names = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    for name, text in names.items():
        if not isinstance(text, str):
            raise ValueError(f"the content of {name} in tokenizer_config.json must be a string")
    end = names.get("eos_token")
    for text, name in ((bos, "bos_token"), (end, "eos_token")):
        if text not in added and not (name == "bos_token" and text is None):
            raise ValueError(f"{name} in tokenizer_config.json is {text!r}: name one of the added "
                             "tokens there")  # fmt: skip
    stop_ids = {added[end]}
    for name in ("config.json", "generation_config.json"):
        eos = settings.get(name, {}).get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        if not all(i is None or _is_id(i) for i in eos):
            raise ValueError(f"eos_token_id = {eos!r} in {name} beside it: expected ids")
        stop_ids |= set(eos) - {None}
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        try:
            template = {one["name"]: one["template"] for one in template}.get("default")
        except (KeyError, TypeError):
            raise ValueError(
                "a chat_template in tokenizer_config.json is {name, template}"
            ) from None
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode(errors="replace")
    return Tokenizer(
        bpe=bpe, added=added,
        reserved={t["content"]: t["id"] for t in added_tokens if t["special"] and t["content"]},
        names=names, template=template, files=files,
        special=_any_of(added_tokens),
        literal=_any_of([token for token in added_tokens if not token["special"]]),
        token_bytes=token_bytes | {i: text.encode() for text, i in added.items()},
        bos_id=None if bos is None else added[bos], end_id=added[end],
        stop_ids=frozenset(stop_ids), **fields,
    )  # fmt: skip


def _any_of(added_tokens: list[dict]) -> regex.Pattern | None:
    """Finds added tokens in text, the longest at a place; the group is the token itself."""
    spaces = {True: r"\s*", False: "", None: ""}
    parts = [
        f"{spaces[token.get('lstrip')]}({regex.escape(token['content'])})"
        f"{spaces[token.get('rstrip')]}"
        for token in sorted(added_tokens, key=lambda token: -len(token["content"]))
        if token["content"]
    ]
    return regex.compile("|".join(parts)) if parts else None


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _bytes_of(token: str, bytewise: bool) -> bytes:
    """What a token of a vocabulary stands for."""
    if bytewise and all(char in BYTE_OF_CHAR for char in token):
        return bytes(map(BYTE_OF_CHAR.get, token))
    byte = None if bytewise else re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.encode()


def _steps(spec: dict | None, key: str) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if spec is None:
        return []
    return [s for part in spec[key] for s in _steps(part, key)] if key in spec else [spec]


def _normalizer(steps: list[dict], pre_tokenizer: list[dict], bytewise: bool):
    """Unicode form and SentencePiece's prefix rule: (str | None, str)."""
    form, prepends, replaces = None, False, False
    for step in steps:
        kind = step["type"]
        if kind == "NFC" and step is steps[0]:
            form = kind
        elif kind == "Prepend" and step["prepend"] == SPACE and not bytewise:
            prepends = True
        elif kind == "Replace" and not bytewise and step["pattern"] == {"String": " "}:
            replaces = step["content"] == SPACE
        else:
            raise ValueError(f"normalizer {kind} is not supported here")
    if bytewise:
        return form, ""
    if not pre_tokenizer:
        if not replaces:
            raise ValueError(f"its normalizer does not write a space as {SPACE!r}")
        return form, "legacy" if prepends else "never"
    (step,) = pre_tokenizer if len(pre_tokenizer) == 1 else [{}]
    if step.get("type") != "Metaspace" or step["replacement"] != SPACE or prepends or replaces:
        raise ValueError("with byte_fallback the only pre-tokenizer supported is one Metaspace")
    return form, step.get("prepend_scheme", "always")  # older files have no scheme


def _llama_metaspace(settings: dict) -> dict | None:
    """The pre-tokenizer that transformers 5 gives a Llama's LlamaTokenizer in place of the file's
    rules, if this is one."""
    config = settings.get("tokenizer_config.json", {})
    if settings.get("config.json", {}).get("model_type", "llama") != "llama" or (
        config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast")
    ):
        return None
    scheme = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    return {"type": "Metaspace", "replacement": SPACE, "split": False, "prepend_scheme": scheme}


def _words(pre_tokenizer: list[dict], merges: list[tuple[str, str]], whole: bool) -> str:
    """The pieces of a SentencePiece-style text: words with the spaces before them, where no token
    reaches over the beginning of a word."""
    if pre_tokenizer and pre_tokenizer[0].get("split", True):
        return f"{SPACE}[^{SPACE}]*|[^{SPACE}]+"
    across = regex.compile(f"[^{SPACE}]{SPACE}")
    if whole or any(across.search(left + right) for left, right in merges):
        return r"[\s\S]+"
    return f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"


def _cuts(steps: list[dict]) -> list[str]:
    """Regular expressions that cut text one after the other, the last of them one of ours, for
    tiktoken cannot stop; merges happen within the pieces."""
    *before, byte_level = steps
    if byte_level["type"] != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError("its pre-tokenizer does not end in ByteLevel without a prefix space")
    cuts = []
    for step in before:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Digits":
            cuts.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            one = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
            _check_regex(one)
            cuts.append(one)
        else:
            raise ValueError(f"pre-tokenizer {kind} {step.get('behavior', '')} is not supported")
    if byte_level.get("use_regex", True) and [step["type"] for step in before] == ["Digits"]:
        # The two cuts in one, for speed: spaces before a digit are at the end of their piece.
        within = GPT2_PATTERN.replace(r"| ?\p{N}+", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")
        return [f"{cuts[0]}|{within}"]
    if byte_level.get("use_regex", True):
        cuts.append(GPT2_PATTERN)
    return cuts if cuts and cuts[-1] in KNOWN_PATTERNS else [*cuts, r"[\s\S]+"]


def _check_regex(pattern: str) -> None:
    """Refuses what the regular expressions of tokenizers and ours read differently, and what is
    long or repeats so often that compiling it alone takes for ever."""
    if len(pattern) > 10_000:
        raise ValueError(f"its Split has a regular expression of {len(pattern)} characters")
    no_names = re.sub(r"\\[pP]\{\^?[\w=]+\}", "", pattern)
    bare = re.sub(r"\\\D|\[(?!\[:)\^?(?:\\.|[^\]\\])*\]", "", no_names)  # no escapes, no classes
    times = math.prod(int(number) or 1 for number in re.findall(r"\d+", bare))
    other = r"[.^$]|\{[\d,]+\}\+|\{(?!\d+,?\d*\})|\\\d|\(\?(?!:|>|i:|<?[=!])|\(\*"
    try:
        if "[[:" in pattern or re.search(other, bare) or times > 10**5 or (
            regex.compile(pattern).fullmatch("", timeout=CUT_SECONDS)
        ):  # fmt: skip
            raise ValueError(f"its Split by {pattern!r:.60} is not supported: libraries differ on "
                             "empty matches and on . ^ $ }+ [[:classes:]] and references, and "
                             "repetitions may be too many")  # fmt: skip
    except (regex.error, RecursionError, TimeoutError) as error:
        raise ValueError(f"its Split has a regular expression that fails: {error}") from None


def _template_bos(post_processor: dict | None) -> str | None:
    """The special token that a tokenizer.json puts before every text, if it puts one."""
    for step in _steps(post_processor, "processors"):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def _parse_object(content: bytes | str, where) -> dict:
    try:
        value = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number")


def _once(items: list[tuple[str, object]]) -> dict:
    if len(value := dict(items)) < len(items):
        raise ValueError(f"an object has a key twice, of {', '.join(value):.60}")
    return value


# --- Chat templates: programs of strangers -------------------------------------------------------

RENDER_SECONDS = 5
RENDER_BYTES = 2**28
# What templates need; more is only of use to do harm.
FILTERS = """abs capitalize count d default dictsort e escape first float int items join last
length list lower map max min reject rejectattr replace reverse safe select selectattr sort string
sum title tojson trim unique upper""".split()  # noqa: SIM905
METHODS_REFUSED = ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which reaching for Python's attributes is an error rather than empty,
    and no text or list grows without bound."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"it reaches for {attribute!r}")

    def is_safe_attribute(self, obj, attribute, value):
        return attribute not in METHODS_REFUSED and super().is_safe_attribute(obj, attribute, value)

    def call_binop(self, context, operator, left, right):
        sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        text = sizes != [left, right]
        most = 10**7 if text else 10**100  # characters or items; or the number itself
        if operator == "**" or (operator == "%" and text) or abs(math.prod(sizes)) > most:
            raise SecurityError(f"it computes too much by {operator!r}")
        return super().call_binop(context, operator, left, right)

    def joined(self, *parts):
        """`~`, within bounds."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > 10**7:
            raise SecurityError("it writes too much by '~'")
        return "".join(texts)

    def tick(self):
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it does not end in {RENDER_SECONDS} s")


class Bounds(NodeTransformer):
    """Has loops and macros look at the clock, and `~` at its size."""

    def visit_for(self, node):
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        return self.generic_visit(node)

    visit_For = visit_Macro = visit_for  # noqa: N815

    def visit_Concat(self, node):  # noqa: N802
        node = self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("joined")
        return nodes.Call(joined, node.nodes, [], None, None).set_lineno(node.lineno)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model writes; here it is nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    """The template, in a sandbox of its own."""

    def raise_exception(message):
        raise UnusableError(f"the chat template refuses it: {message}")

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        indent = None if indent is None else min(int(indent), 16)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters = {name: sandbox.filters[name] for name in FILTERS} | {"tojson": to_json}
    sandbox.globals = {name: sandbox.globals[name] for name in ("range", "dict", "namespace")} | {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    tree = Bounds().visit(sandbox.parse(source))
    return sandbox.from_string(tree.set_environment(sandbox))


@contextlib.contextmanager
def _little_memory():
    """Within it RENDER_BYTES more than now are a MemoryError, where the system can bound them."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, AttributeError):  # neither is everywhere
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [n for n in (used + RENDER_BYTES, *before) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def render_template(
    source: str, messages: list[dict], add_generation_prompt: bool, names: dict[str, str]
) -> str:
    """What a chat template writes, as in transformers (utils/chat_template_utils.py). Raises
    UnusableError where it refuses the messages, ValueError where it fails, reaches out of its
    sandbox or does not end."""
    try:
        with _little_memory():
            template = _compiled(source)
            template.environment.deadline = time.monotonic() + RENDER_SECONDS
            return template.render(
                messages=messages, tools=None, documents=None,
                add_generation_prompt=add_generation_prompt, **names,
            )  # fmt: skip
    except UnusableError:
        raise
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"the chat template fails: {str(error) or type(error).__name__}") from None


# --- Preference pairs ---------------------------------------------------------------------------


class Pair(NamedTuple):
    """Ids of one prompt and two answers, of which one may be missing: its list is empty."""

    prompt: list[int]  # begins with the BOS, where the tokenizer has one
    chosen: list[int]  # ends with the end token, or as a chat template ends a turn
    rejected: list[int]


class Pairs(Sequence):
    """A list of pairs in compact arrays, four bytes an id; pairs[i] makes the lists anew."""

    def __init__(self, pairs: Iterable[Pair] = ()):
        self.ids, self.ends = array("i"), array("q", [0])  # parts end to end, three a pair
        self.lines = array("i")  # of the file, 0 for none
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
        first = 3 * range(len(self))[index]  # which knows negative indices and IndexError
        ends = self.ends[first : first + 4]
        return Pair(*(self.ids[a:b].tolist() for a, b in zip(ends, ends[1:])))

    def take(self, index: Iterable[int]) -> "Pairs":
        taken = Pairs()
        for i in index:
            taken.append(self[i], self.lines[i])
        return taken

    def lengths(self) -> np.ndarray:
        """Tokens of prompts, chosen and rejected answers, (pairs, 3)."""
        return np.diff(np.array(self.ends)).reshape(len(self), 3)


class UnusableError(ValueError):
    """A row that is well-formed and cannot be trained on: it is left out and counted."""


def make_pair(
    tokenizer: Tokenizer, prompt: str, chosen: str | None, rejected: str | None,
    encode: Callable[[str], list[int]] | None = None,
) -> Pair:  # fmt: skip
    """Each segment is encoded alone, so that training and generation cut at the same place, an
    answer by `encode` if not by the tokenizer's, and ends with the end token, once."""
    encode, answers = encode or tokenizer.encode, (chosen, rejected)
    ids = ([] if text is None else [*encode(text), tokenizer.end_id] for text in answers)
    return Pair(tokenizer.prompt_ids(prompt), *ids)


def truncate(pair: Pair, max_length: int, bos_id: int | None) -> Pair:
    """The one rule: answers stay whole, the prompt loses its oldest tokens after the BOS.

    max_length counts the tokens of a prompt and its longer answer. Raises UnusableError where not
    even one token of the prompt would be left.
    """
    keep = max_length - max(len(pair.chosen), len(pair.rejected))
    if keep >= len(pair.prompt):
        return pair
    bos = pair.prompt[:1] if pair.prompt[0] == bos_id else []
    if keep <= len(bos):
        raise UnusableError("the longer answer leaves no room for the prompt; raise --max_length")
    return pair._replace(prompt=bos + pair.prompt[len(pair.prompt) - keep + len(bos) :])


# --- Rows of JSONL, told apart by their columns -------------------------------------------------

ROW_FORMS = (
    "rows are {prompt, chosen, rejected}, {chosen, rejected} of messages or of Human/Assistant "
    "transcripts, {prompt, completion, label}, {prompt, completion} or {messages}"
)
COLUMNS = {"prompt", "chosen", "rejected", "completion", "label", "messages"}
TURN = "\n\nAssistant:"
LONGEST_LINE = 2**23  # bytes


def row_to_pair(row: dict, tokenizer: Tokenizer) -> tuple[str, Pair]:
    """The form of a row, and its pair. Raises ValueError where it is malformed, UnusableError where
    it is well-formed and yet of no use."""
    columns = row.keys()
    if columns >= {"chosen", "rejected"}:
        if isinstance(row["chosen"], list):
            return _conversations(row, tokenizer)
        texts = {name: text_of(row, name) for name in Pair._fields if name in row}
        form, encode = "prompt, chosen, rejected", tokenizer.encode
        if "prompt" not in row:  # an answer goes on from its prompt within one text
            form, encode, texts = "transcripts", tokenizer.continue_ids, _transcripts(texts)
        _check_answers({name: texts[name] for name in ("chosen", "rejected")})
        return form, make_pair(tokenizer, **texts, encode=encode)
    completes = columns >= {"prompt", "completion"}
    if not completes and "messages" not in columns:
        raise ValueError(f"its columns are {', '.join(columns) or 'none':.200}; {ROW_FORMS}")
    form, label = "unpaired" if "label" in row else "supervised", row.get("label", True)
    if not isinstance(label, bool):
        raise ValueError(f"'label' must be true or false, not {label!r:.40}")
    if not completes:
        form, pair = f"{form} messages", _last_turn(messages_of(row, "messages"), tokenizer)
    elif isinstance(row["prompt"], list):
        pair = _last_turn(messages_of(row, "prompt") + messages_of(row, "completion"), tokenizer)
    else:
        _check_answers({"completion": text_of(row, "completion")})
        pair = make_pair(tokenizer, text_of(row, "prompt"), row["completion"], None)
    return form, pair if label else Pair(pair.prompt, [], pair.chosen)


def text_of(row: dict, column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} must be a string, not {type(text).__name__}")
    text.encode()  # half of a surrogate pair is no text: UnicodeEncodeError
    return text


def messages_of(row: dict, column: str) -> list[dict]:
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} must be a list of messages, not {messages!r:.40}")
    for message in messages:
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"{column!r}: a message is {{role, content}}, not {message!r:.40}")
        for name in ("role", "content"):
            text_of(message, name)
    return messages


def _check_answers(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise UnusableError(f"the {name} answer is empty")
    if len(texts) > 1 and len(set(texts.values())) == 1:
        raise UnusableError("chosen and rejected are identical")


def _transcripts(texts: dict[str, str]) -> dict[str, str]:
    """Two transcripts as prompt, which both begin with, chosen and rejected, their last turns."""
    parts = {name: text.rpartition(TURN) for name, text in texts.items()}
    for name, (_, turn, answer) in parts.items():
        if not turn:
            raise ValueError(f"no column 'prompt', and {name!r} is no transcript: it has no "
                             f"{TURN!r} in it")  # fmt: skip
        if "\n\nHuman:" in answer:
            raise UnusableError("the transcript does not end in an assistant's turn")
    head, other = (head for head, _, _ in parts.values())
    if head != other:
        raise UnusableError("the transcripts differ before their last answer")
    return {"prompt": head + TURN} | {name: answer for name, (_, _, answer) in parts.items()}


def _conversations(row: dict, tokenizer: Tokenizer) -> tuple[str, Pair]:
    """Two conversations part at a turn: what they share is the prompt, the assistant's first turn
    that differs is the answer, and turns after it are left out."""
    sides = [messages_of(row, name) for name in ("chosen", "rejected")]
    form = "conversations"
    if "prompt" in row and sides[0][0]["role"] == "assistant":
        form = "prompt and messages"
        if isinstance(row["prompt"], list):
            prompt = messages_of(row, "prompt")
        else:
            prompt = [{"role": "user", "content": text_of(row, "prompt")}]
        sides = [prompt + side for side in sides]
    said = [[(message["role"], message["content"]) for message in side] for side in sides]
    if said[0] == said[1]:
        raise UnusableError("chosen and rejected are identical")
    shared = 0
    while shared < min(map(len, said)) and said[0][shared] == said[1][shared]:
        shared += 1
    answers = [side[shared] for side in sides if shared < len(side)]
    if shared == 0 or [answer["role"] for answer in answers] != ["assistant"] * 2:
        raise UnusableError("the conversations do not part at an assistant's turn after a prompt")
    _check_answers(dict(zip(("chosen", "rejected"), (answer["content"] for answer in answers))))
    prompt, answers = tokenizer.turns(sides[0][:shared], answers)
    return form, Pair(prompt, *answers)


def _last_turn(messages: list[dict], tokenizer: Tokenizer) -> Pair:
    *prompt, answer = messages
    if not prompt or answer["role"] != "assistant":
        raise UnusableError("the conversation does not end in an assistant's turn after a prompt")
    _check_answers({"last": answer["content"]})
    prompt, (ids,) = tokenizer.turns(prompt, [answer])
    return Pair(prompt, ids, [])


@dataclasses.dataclass
class Report:
    """What became of a file's rows; lists are of line numbers."""

    rows: int = 0
    forms: Counter = dataclasses.field(default_factory=Counter)
    unused: dict[str, None] = dataclasses.field(default_factory=dict)  # columns
    truncated: list[int] = dataclasses.field(default_factory=list)
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def losses(self) -> list[str]:
        """What was lost, a line each."""
        lost = {f"dropped, {reason}": lines for reason, lines in self.dropped.items()}
        if self.truncated:
            lost["cut, the prompt lost its oldest tokens to --max_length"] = self.truncated
        unused = f"columns not used: {', '.join(sorted(self.unused))}"
        return ([f"{unused:.200}"] if self.unused else []) + [
            f"{len(lines)} of {self.rows} rows {what}: line {', '.join(map(str, lines[:5]))}"
            f"{', ...' if len(lines) > 5 else ''}"
            for what, lines in lost.items()
        ]


def read_pairs(path, tokenizer: Tokenizer, max_length: int) -> tuple[Pairs, Report]:
    """The pairs of a JSONL file, plain or .gz, that can be used, and what became of all rows.
    Blank lines are passed over. Raises OSError, or ValueError that names file and line."""
    pairs, report = Pairs(), Report()
    # A chat template may write the BOS of a tokenizer that places none itself.
    bos = tokenizer.added.get(tokenizer.names.get("bos_token"), tokenizer.bos_id)
    for number, row in read_rows(path):
        report.rows += 1
        try:
            report.unused |= dict.fromkeys(row.keys() - COLUMNS)
            form, whole = row_to_pair(row, tokenizer)
            report.forms[form] += 1
            if not whole.prompt:
                raise UnusableError(
                    "the prompt is empty, and this tokenizer has no BOS to begin with"
                )
            pair = truncate(whole, max_length, bos)
        except UnusableError as reason:
            report.dropped.setdefault(str(reason), []).append(number)
            continue
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        pairs.append(pair, number)
        if pair is not whole:
            report.truncated.append(number)
    return pairs, report


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, with a progress bar over the bytes on disk."""
    with open(path, "rb") as raw, tqdm(
        desc=f"reading {path.name}", total=path.stat().st_size, unit="B", unit_scale=True,
        leave=False, delay=1,
    ) as bar:  # fmt: skip
        file = gzip.open(raw) if path.suffix == ".gz" else raw  # noqa: SIM115
        try:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}:{number}: a row of more than {LONGEST_LINE >> 20} MiB"
                    )
                if not line:
                    return
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                if number == 1 and line[:2] == b"\x1f\x8b":
                    raise ValueError(f"{path}: is compressed; give it a name that ends in .gz")
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: broken gzip file ({error})") from None


def read_rows(path) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a JSONL file, plain or .gz; ValueError names file and line."""
    for number, line in _lines(Path(path)):
        try:
            yield number, _parse_object(line, "row")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def load_pairs(path, tokenizer: Tokenizer, max_length: int = 1024) -> Pairs:
    """Reads the rows of a JSONL file, plain or .gz, in any of the forms of `row_to_pair`.

    Says on standard error how many rows were dropped or cut, and why. Raises OSError, or ValueError
    that names file and line: for a malformed row, or where no row is left.
    """
    pairs, report = read_pairs(path, tokenizer, max_length)
    if not pairs:
        why = "; ".join(report.losses()) or f"the file is empty; {ROW_FORMS}"
        raise ValueError(f"{path}: no rows to train on: {why}")
    for loss in report.losses():
        print(f"{path}: {loss}", file=sys.stderr)
    return pairs


def split_pairs(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: about `fraction` of them held out, no prompt in both. Raises
    ValueError where the prompts are too few for that."""
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


# --- Batches: packed rows with a shared prompt ----------------------------------------------------


class Batch(NamedTuple):
    """B whole pairs in rows that lie end to end, each pair once: prompt, chosen, rejected.

    The last token of an answer is predicted but predicts nothing, so it is not laid out. T tokens
    are those of the rows, and padding where a fixed length was asked for.
    """

    tokens: Tensor  # (1, T) ids
    positions: Tensor  # (1, T); the rejected answer starts again after the prompt
    pair: Tensor  # (T,) number of the pair within the batch, -1 at padding
    segment: Tensor  # (T,) 0 prompt, 1 chosen, 2 rejected
    source: Tensor  # (N,) which of the T states predicts each target
    targets: Tensor  # (N,) the answers' ids end to end: chosen_0, rejected_0, chosen_1, ...
    lengths: Tensor  # (2B,) tokens of each answer; stays on the CPU
    rows: list[int]  # tokens of each row
    index: list[int]  # (B,) which pairs these are

    def to(self, device: torch.device) -> "Batch":
        tensors = self[:6]
        if device.type == "cuda":  # from pinned memory a copy does not wait
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(*(t.to(device, non_blocking=True) for t in tensors), *self[6:])


def sees(batch: Batch, window: int | None = None):
    """The rule of attention, in the form of FlexAttention's mask_mod: a token sees the earlier
    tokens of its own pair that are prompt or of its own segment, with a sliding window those less
    than `window` positions back."""
    pair, segment, position = batch.pair, batch.segment, batch.positions[0]

    def rule(_batch, _head, query, key):
        same = (segment[key] == 0) | (segment[key] == segment[query])
        seen = (query >= key) & (pair[key] == pair[query]) & same
        return seen if window is None else seen & (position[query] - position[key] < window)

    return rule


def row_masks(batch: Batch, window: int | None = None) -> list[Tensor]:
    """The rule, row by row: (1, 1, t, t) bool for each row of t tokens."""
    masks, start, rule = [], 0, sees(batch, window)
    for length in batch.rows:
        place = torch.arange(start, start + length, device=batch.pair.device)
        masks.append(rule(0, 0, place[:, None], place[None, :])[None, None])
        start += length
    return masks


def row_length(pair: Sequence) -> int:
    """Tokens that a pair takes in a row, or a prompt with any number of answers."""
    prompt, *answers = pair
    return len(prompt) + sum(len(answer) - 1 for answer in answers if answer)


def pack(sizes: list[int], row_tokens: int) -> list[list[int]]:
    """First fit, longest first: which sizes share a row of `row_tokens`; a longer one is alone."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, free in enumerate(room) if free >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def make_batches(
    pairs: Sequence[Pair], index: list[int], row_tokens: int, micro_tokens: int, pad: bool = False
) -> list[Batch]:
    """Packs pairs[i] for i in index into rows, and rows into batches of at most `micro_tokens`
    tokens, or one row. pad: every batch that is not longer has just that many."""
    sizes = [row_length(pairs[i]) for i in index]
    groups, room = [], 0
    for row in pack(sizes, row_tokens):
        size = sum(sizes[item] for item in row)
        if size > room:
            groups.append([])
            room = micro_tokens
        groups[-1].append([index[item] for item in row])
        room -= size
    return [pack_batch(pairs, rows, micro_tokens if pad else 0) for rows in groups]


def pack_batch(pairs: Sequence[Pair], rows: list[list[int]], least: int = 0) -> Batch:
    """Lays out each row's pairs one after the other, and the rows; pads to `least` tokens."""
    row_tokens = [sum(row_length(pairs[i]) for i in row) for row in rows]
    index = [i for row in rows for i in row]
    T = max(sum(row_tokens), least)
    tokens, positions, segment = np.zeros((3, T), dtype=np.int64)
    pair_number = np.full(T, -1)
    source, targets, lengths, column = [], [], [], 0
    for number, i in enumerate(index):
        prompt, *answers = pairs[i]
        last = column + len(prompt) - 1  # it predicts the first token of both answers
        parts = [(0, prompt, 0)]
        parts += [(kind, ids[:-1], len(prompt)) for kind, ids in enumerate(answers, start=1)]
        for kind, ids, position in parts:
            here = slice(column, column + len(ids))
            tokens[here], segment[here], pair_number[here] = ids, kind, number
            positions[here] = np.arange(position, position + len(ids))
            if kind and answers[kind - 1]:
                source += [last, *range(here.start, here.stop)]
            column = here.stop
        targets += [token for answer in answers for token in answer]
        lengths += [len(answer) for answer in answers]
    arrays = (tokens[None], positions[None], pair_number, segment, source, targets, lengths)
    return Batch(*(torch.as_tensor(array) for array in arrays), row_tokens, index)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's pairs, a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


# --- The doctor: python data.py FILE --tokenizer PATH ---------------------------------------------


class Parser(argparse.ArgumentParser):
    """No abbreviated flags; bad input is one line on standard error and exit status 2."""

    def __init__(self, prog: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str | Exception):
        if isinstance(message, OSError) and message.filename:
            message = f"{message.filename}: {message.strerror}"
        line = " ".join(str(message).split())[:1000]
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        self.exit(2, f"{self.prog}: error: {line}\n")


def describe_file(path, tokenizer: Tokenizer, max_length: int) -> str:
    """What training would make of a file: rows kept, cut, dropped and why, lengths, one pair."""
    pairs, report = read_pairs(path, tokenizer, max_length)
    forms = ", ".join(f"{count} of {form}" for form, count in report.forms.items())
    lines = [
        f"{report.rows} rows, used are {forms or 'none'}",
        *(textwrap.fill(loss, 79, subsequent_indent="  ") for loss in report.losses()),
        f"{len(pairs)} pairs to train on, at most {max_length} tokens each",
    ]
    if not pairs:
        return "\n".join(lines)
    seen = Counter(hash((tuple(p), tuple(c), tuple(r))) for p, c, r in pairs)
    lines.append(f"{len(pairs) - len(seen)} of them repeat another one")
    lengths, quantiles = pairs.lengths(), [0, 25, 50, 75, 95, 100]
    lines.append("tokens    " + "".join(f"{f'{q} %':>8}" for q in quantiles))
    for name, column in zip(Pair._fields, lengths.T):
        values = np.percentile(column[column > 0], quantiles) if column.any() else []
        lines.append(f"{name:10}" + "".join(f"{value:8.0f}" for value in values))
    shared = sum(map(row_length, pairs))
    alone = sum(len(p) + len(answer) - 1 for p, *answers in pairs for answer in answers if answer)
    lines.append(f"prompts shared: {shared:,} tokens to compute instead of {alone:,} "
                 f"({shared / alone - 1:+.0%})")  # fmt: skip
    return "\n".join([*lines, "", f"line {pairs.lines[0]}, scored tokens marked ^:",
                      *token_grid(pairs, 0, tokenizer)])  # fmt: skip


def token_grid(pairs: Pairs, index: int, tokenizer: Tokenizer, width: int = 79) -> list[str]:
    """A pair as pack_batch lays it out, with each line's first position: tokens above, a mark below
    each one that is scored. A long segment is shown without its middle."""
    batch, pair, lines = pack_batch(pairs, [[index]]), pairs[index], []
    scored = iter(batch.targets.tolist())
    for name, ids in zip(Pair._fields, pair):
        above, below = [], []
        for offset, id in enumerate(ids):
            text = tokenizer.token_bytes[id].decode(errors="backslashreplace")
            text = repr(text)[1:-1].replace(" ", "·")
            if not above or len(above[-1]) + len(text) >= width:
                position = offset + (0 if name == "prompt" else len(pair.prompt))
                above.append(f"{name:8} {position:5}")
                below.append(" " * 14)
            mark = "^" if name != "prompt" and id == next(scored) else " "
            above[-1], below[-1] = f"{above[-1]} {text}", f"{below[-1]} {mark * len(text)}"
        rows = [line.rstrip() for pair_of_lines in zip(above, below) for line in pair_of_lines]
        rows = rows if len(rows) <= 12 else [*rows[:6], f"{name:8}   ...", *rows[-6:]]
        lines += [row for row in rows if row]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser("data.py", __doc__)
    parser.add_argument("file", metavar="FILE.jsonl", help="rows to look at, plain or .gz")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="folder or file")
    parser.add_argument("--max_length", type=int, default=1024, metavar="N", help="as in train.py")
    options = parser.parse_args(argv)
    if options.max_length < 2:
        parser.error(f"--max_length {options.max_length}: must be at least 2")
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        print(describe_file(options.file, tokenizer, options.max_length))
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
