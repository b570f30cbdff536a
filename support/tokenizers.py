"""Tokenizers that encode with tiktoken and give the same ids as transformers. `load_tokenizer`
reads `tokenizer.json` or Llama 3's `tokenizer.model`; other kinds of tokenizers are an error."""

import base64
import dataclasses
import datetime
import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex  # a dependency of tiktoken
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.files import parse_json, read_json
from support.rows import UnusableError

TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja"]  # fmt: skip
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Meta publishes this pattern and these special tokens in Llama 3's tokenizer.py.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
KNOWN_PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""))  # Qwen's
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 249)),
]  # fmt: skip
SPLIT_SECONDS = 10  # time limit of a pattern on one piece of text; known models need far less
# PORTABLE matches the patterns that `regex` and Oniguruma (in tokenizers) interpret alike.
ESCAPE = r"\\[pP]\{\^?\w+\}|\\[sSdDnrt]|\\[^\w]"
PORTABLE = regex.compile(
    rf"(?:{ESCAPE}|\[\^?(?:{ESCAPE}|(?!&&)[^\[\]\\])+\]|\(\?(?:[:=!]|<[=!]|i:)|\)"
    r"|\{\d+(?:,\d*)?\}(?!\+)|[^\\\[\](){}.^$])+"
)
# GPT-2 writes a printable byte as its own character, and other bytes as characters 256, 257, ...
HIDDEN = [byte for byte in range(256) if not chr(byte).isprintable() or chr(byte) == " "]
BYTE_CHARS = [chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)]
BYTE_OF_CHAR = {char: byte for byte, char in enumerate(BYTE_CHARS)}
FALLBACK_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's byte tokens
SPACE = "▁"  # the character that SentencePiece writes for a space
# What precedes a text -> the prefix schemes (Tokenizer.space) that write SPACE before the text.
PREFIXED = {"nothing": ("first", "always", "legacy"), "token": ("always", "legacy"), "text": ()}


def _require(condition, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is not supported; use BPE as in Llama, Mistral, Qwen or GPT-2")


def piece_encoder(tokens: list[bytes], ids: list[tuple[int, ...]], splits: list) -> Callable:
    """Returns a function that converts a piece of text to ids. tiktoken forms earlier `tokens`
    first. `ids[i]` holds the ids of `tokens[i]`: several if the token is part of a character. If
    the last of `splits` is in KNOWN_PATTERNS, it is removed, and tiktoken applies it."""
    known = bool(splits) and splits[-1].pattern[1:-1] in KNOWN_PATTERNS
    split = splits.pop() if known else regex.compile(r"[\s\S]+")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    bpe = tiktoken.Encoding("mio", pat_str=split.pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_piece(piece: str) -> tuple[int, ...]:
        # tiktoken's regular expressions may overflow their stack on longer texts.
        parts = split.findall(piece) if len(piece) > 50_000 else [piece]
        return tuple(id for part in parts for rank in bpe.encode_ordinary(part) for id in ids[rank])

    return functools.lru_cache(2**16)(encode_piece) if splits and not known else encode_piece


def merge(token: str, ranks: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """Joins a token's characters as the tokenizers library does: always the adjacent pair of lowest
    rank, the leftmost if tied. Returns the final symbols and the last pair's rank (-1: no pair)."""
    symbols, last = list(token), -1
    while found := [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]:
        last, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols, last


def byte_pairs(vocab: dict, merges: list, ignore_merges: bool, byte_level: bool) -> tuple:
    """Returns the tokens and ids with which `piece_encoder` encodes as a tokenizer.json says.
    Symbols are bytes (written as in BYTE_CHARS) if `byte_level`, else characters (or bytes of
    characters outside the vocabulary). With `ignore_merges`, a piece that is a token is not split.

    tiktoken joins two neighbors whenever they form a token, but a tokenizer.json lists the pairs to
    join. The ids are the same if tiktoken knows only the tokens that `merge` can form, sorted by
    the rank of the pair that `merge` joins last: in a longer text, the symbols of a token are
    joined as in the token alone, until one of them is joined with a symbol outside the token."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    alphabet = BYTE_OF_CHAR.keys() if byte_level else {token for token in vocab if len(token) == 1}
    last_rank = {}
    for token in vocab if ignore_merges else {left + right for left, right in merges}:
        if len(token) > 1 and alphabet >= set(token):
            symbols, rank = merge(token, ranks)
            if len(symbols) == 1 or ignore_merges:
                last_rank[token] = rank
            # Within a longer piece, tiktoken would join these two symbols, but no merge does.
            _require(len(symbols) != 2 or not ignore_merges, f"a missing merge of {token!r}")
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    for char in () if byte_level else alphabet:  # the bytes of a character are joined first
        tokens |= dict.fromkeys(char.encode()[:end] for end in range(2, len(char.encode()) + 1))
    tokens |= dict.fromkeys(_to_bytes(t, byte_level) for t in sorted(last_rank, key=last_rank.get))
    known = {_to_bytes(t, byte_level): (id,) for t, id in vocab.items() if alphabet >= set(t)}
    byte_ids = [vocab[token] for token in (BYTE_CHARS if byte_level else FALLBACK_TOKENS)]
    ids = [known.get(token) or tuple(byte_ids[byte] for byte in token) for token in tokens]
    return list(tokens), ids


def _to_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level and BYTE_OF_CHAR.keys() >= set(token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode()


def raise_exception(message):
    raise UnusableError(f"the chat template refuses the messages: {message}")


JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
JINJA.add_extension("jinja2.ext.loopcontrols")
JINJA.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
JINJA.globals["raise_exception"] = raise_exception
JINJA.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)


@functools.lru_cache(8)
def compile_template(source: str):
    # In transformers, {% generation %} marks the model's turns. Here the tag only opens a scope.
    return JINJA.from_string(regex.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source))


def render_template(source: str, messages: list[dict], add_generation_prompt: bool, names) -> str:
    """Formats messages with a chat template, a Jinja program that may use `names`. Raises
    UnusableError if the template refuses the messages, and ValueError if the template crashes."""
    values = {"tools": None, "documents": None, **names, "messages": messages}
    try:
        return compile_template(source).render(values, add_generation_prompt=add_generation_prompt)
    except UnusableError:
        raise
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"the chat template fails ({error!r:.200}); correct it") from None


# --- Tokenizers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Converts text to ids and back. `encode` adds no special tokens and recognizes none."""

    encode_piece: Callable[[str], tuple[int, ...]]  # piece of text -> its ids
    token_bytes: dict[int, bytes]  # id -> text in bytes; includes added tokens
    added: dict[str, int]  # added tokens: text -> id
    reserved: dict[str, int]  # special added tokens: text -> id
    special: regex.Pattern  # finds all added tokens, in the output of a chat template
    literal: regex.Pattern  # finds the added tokens that are not special, in any text
    bos_id: int | None  # None if sequences begin without a BOS token
    end_id: int  # ends an answer in training
    stop_ids: frozenset[int]  # generation stops at any of these ids
    names: dict[str, str]  # bos_token, eos_token and so on, for chat templates
    template: str | None  # the chat template
    files: dict[str, bytes]  # the files that `save` writes
    form: str | None = None  # Unicode normalization of text: "NFC" or None
    splits: list[regex.Pattern] = ()  # patterns that cut text into pieces, one after another
    space: str = ""  # SentencePiece's prefix: a scheme in PREFIXED, or "never"; "" for byte level
    strip: bool = False  # whether decoding removes the prefix
    template_values: dict = dataclasses.field(default_factory=dict)  # --chat_template_kwargs

    @property
    def vocab_size(self) -> int:
        return max(self.token_bytes) + 1

    def encode(self, text: str) -> list[int]:
        """Encodes like transformers with add_special_tokens=False, split_special_tokens=True."""
        return self._encode(text, self.literal)

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a sequence, with the BOS token if there is one."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def continue_ids(self, text: str) -> list[int]:
        """Returns the ids of a text that follows another text, so SPACE is not put in front."""
        return self._encode(text, self.literal, after="text")

    def _encode(self, text: str, added, mark: str = "", after: str = "nothing") -> list[int]:
        """Encodes a text: matches of the pattern `added` become added tokens, and the rest becomes
        ordinary tokens, without `mark`. `after`, a key of PREFIXED, says what precedes the text."""
        ids, start = [], 0
        for match in added.finditer(text):
            ids += self._encode_plain(text[start : match.start()].replace(mark, ""), after)
            ids.append(self.added[match[match.lastindex]])
            start, after = match.end(), "token"
        return ids + self._encode_plain(text[start:].replace(mark, ""), after)

    def _encode_plain(self, text: str, after: str) -> list[int]:
        text = unicodedata.normalize(self.form, text) if self.form else text
        text = text.replace(" ", SPACE) if self.space else text
        if text and self.space in PREFIXED[after]:
            text = text if text.startswith(SPACE) and self.space != "legacy" else SPACE + text
        pieces = [text]
        try:
            for split in self.splits:  # the group in a pattern makes `split` keep the matches
                parts = [split.split(piece, timeout=SPLIT_SECONDS) for piece in pieces]
                pieces = [piece for part in parts for piece in part if piece]
        except TimeoutError:
            raise ValueError("a Split in tokenizer.json is too slow; simplify it") from None
        return [id for piece in pieces for id in self.encode_piece(piece)]

    def decode(self, ids) -> str:
        """Converts ids to text. Invalid UTF-8 becomes U+FFFD; unknown ids are skipped."""
        text = b"".join(self.token_bytes.get(id, b"") for id in ids).decode(errors="replace")
        text = text.replace(SPACE, " ") if self.space else text
        return text.removeprefix(" ") if self.strip else text

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Formats messages with the chat template and returns the ids, which equal the ids that
        transformers' apply_chat_template returns, except that the text of a special token in a
        message is encoded as text. Raises ValueError if the template is missing or fails."""
        messages, mark = self._break_up(messages)
        values = self.names | self.template_values
        text = render_template(self.template, messages, add_generation_prompt, values)
        return self._encode(text, self.special, mark)

    def turns(self, messages: list[dict], answers: list[dict], values: dict) -> tuple:
        """Returns the ids of a conversation, and the ids that the template adds for each answer, up
        to the first stop token or else the last special token, or with `end_id` appended if there
        is neither. values: the row's values for the template. Raises UnusableError if the template
        refuses the conversation, does not use a value or tool calls, or writes answers alike."""
        broken, mark = self._break_up([*messages, *answers])
        messages, answers, answer_ids = broken[: len(messages)], broken[len(messages) :], []
        values = self.template_values | values
        for name in sorted({*values} | {"tool_calls" for m in broken if "tool_calls" in m}):
            used = regex.search(rf"\b{regex.escape(name)}\b", self.template)
            if not used or name in ("messages", "add_generation_prompt"):
                raise UnusableError(f"the chat template does not use {name}")
        values = self.names | values
        render = functools.partial(render_template, self.template, names=values)
        head = render(messages, True)
        special_ends = [match.end() for match in self.special.finditer(head)]
        after = "token" if len(head) in special_ends else "text"
        for answer in answers:
            text, start = render([*messages, answer], False), head
            if not text.startswith(head) and messages[1:] and messages[0]["role"] == "system":
                # Mistral's template leaves out the system message once an answer follows.
                start = render(messages[1:], True)
            if not text.startswith(start):
                why = "check the answer's reasoning and --chat_template_kwargs"
                raise UnusableError(f"the chat template changes the prompt before an answer; {why}")
            ids = self._encode(text[len(start) :], self.special, mark, after)
            ends = [i for i, id in enumerate(ids) if id in self.stop_ids]
            ends = ends or [i for i, id in enumerate(ids) if id in self.reserved.values()][-1:]
            answer_ids.append(ids[: ends[0] + 1] if ends else [*ids, self.end_id])
        if answer_ids[1:] == answer_ids[:-1] != []:
            raise UnusableError("the chat template writes the chosen and the rejected answer alike")
        return self._encode(head, self.special, mark), answer_ids

    def _break_up(self, messages: list[dict]) -> tuple[list[dict], str]:
        """Inserts a mark, a character that no message contains, into special tokens' texts in the
        messages, so that `special` does not match them. Returns the new messages and the mark."""
        if self.template is None:
            raise ValueError("messages need a template; add a chat_template.jinja to the tokenizer")
        keys = ("content", "reasoning_content")
        text = "".join(message.get(key) or "" for message in messages for key in keys)
        mark = next((char for char in map(chr, range(0xFDD0, 0xFDF0)) if char not in text), "")
        for token in (token for token in self.reserved if token in text):
            change = token, token[:1] + mark + token[1:]
            messages = [m | {k: m[k].replace(*change) for k in keys if m.get(k)} for m in messages]
        return messages, mark

    def save(self, folder) -> None:
        """Writes the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


# --- Reading a tokenizer's files ------------------------------------------------------------------


def load_tokenizer(path, template_kwargs: str | None = None) -> Tokenizer:
    """Reads a tokenizer from a folder, a `tokenizer.json` or a tiktoken rank file (Llama 3's
    `tokenizer.model`), and settings beside it. Raises OSError, or a ValueError with a remedy.
    template_kwargs: --chat_template_kwargs; None for those of the run in the folder, if any."""
    path = Path(path)
    if path.is_dir():
        found = [name for name in TOKENIZER_FILES[:2] if (path / name).is_file()]
        path = path / (found or TOKENIZER_FILES)[0]
    files = {TOKENIZER_FILES[path.suffix != ".json"]: path.read_bytes()}
    beside = [path.parent / name for name in (*TOKENIZER_FILES[2:], "config.json")]
    files |= {file.name: file.read_bytes() for file in beside if file.is_file()}
    config = path.parent / "train_config.json"
    if template_kwargs is None and config.is_file():
        template_kwargs = read_json(config).get("chat_template_kwargs")
    try:
        values = parse_json(template_kwargs or "{}", f"--chat_template_kwargs {template_kwargs}")
        return dataclasses.replace(_read(files), template_values=values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, regex.error) as error:
        raise ValueError(f"{path}: invalid tokenizer ({error!r:.99}); restore the files") from None


def byte_tokenizer() -> Tokenizer:
    """Returns the built-in tokenizer: a token for each byte, a BOS token and an end token."""
    return load_tokenizer(Path(__file__).parent / "byte_tokenizer")


def _read(files: dict[str, bytes]) -> Tokenizer:
    """Builds a tokenizer from the contents of its files, which may include config.json."""
    settings = {name: parse_json(files[name], name) for name in files if name.endswith(".json")}
    config = settings.get("special_tokens_map.json", {}) | settings.get("tokenizer_config.json", {})
    names = {key: value for key, value in config.items() if key.endswith("_token") and value}
    names = {key: v["content"] if isinstance(v, dict) else v for key, v in names.items()}
    if "tokenizer.json" in files:
        fields, added_tokens, bos = _read_spec(settings)
    else:
        fields, added_tokens, bos = _read_ranks(files["tokenizer.model"])
        names = {"bos_token": bos, "eos_token": LLAMA3_SPECIALS[1]} | names
    added = {token["content"]: token["id"] for token in added_tokens}
    if (end := names.get("eos_token")) not in added:
        raise ValueError(f"eos_token in tokenizer_config.json must be an added token, not {end!r}")
    stop_ids = {added[end]}
    for name in ("config.json", "generation_config.json"):
        eos = settings.get(name, {}).get("eos_token_id")
        stop_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode(errors="replace")
    fields["token_bytes"] |= {id: text.encode() for text, id in added.items()}
    for id in (*stop_ids, *fields["token_bytes"]):
        if type(id) is not int or not 0 <= id < 2**31:
            raise ValueError(f"{id!r:.60} is no token id; correct tokenizer.json or eos_token_id")
    return Tokenizer(
        added=added, names=names, template=template, special=_any_of(added_tokens),
        bos_id=None if bos is None else added[bos], end_id=added[end], stop_ids=frozenset(stop_ids),
        reserved={token["content"]: token["id"] for token in added_tokens if token["special"]},
        literal=_any_of([token for token in added_tokens if not token["special"]]),
        files={name: content for name, content in files.items() if name != "config.json"}, **fields,
    )  # fmt: skip


def _any_of(added_tokens: list[dict]) -> regex.Pattern:
    """Returns a pattern that finds added tokens, longest first; its group is the token's text."""
    parts = []
    for token in sorted(added_tokens, key=lambda token: -len(token["content"])):
        left, right = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
        parts.append(f"{left}({regex.escape(token['content'])}){right}")
    return regex.compile("|".join(parts) or r"\A(?!)")


def _read_ranks(content: bytes) -> tuple[dict, list[dict], str]:
    """Reads lines of a base64 token and its rank. Returns the same three values as `_read_spec`."""
    try:
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        remedy = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise ValueError(f"is not a tiktoken file; convert SentencePiece with {remedy}") from None
    _require(list(ranks.values()) == list(range(len(lines))), "a rank other than 0, 1, 2, ...")
    _require(ranks.keys() >= {bytes([byte]) for byte in range(256)}, "a byte without a rank")
    numbered = enumerate(LLAMA3_SPECIALS, start=len(ranks))
    added_tokens = [{"id": id, "content": text, "special": True} for id, text in numbered]
    splits = [regex.compile(f"({LLAMA3_PATTERN})")]
    encode_piece = piece_encoder(list(ranks), [(rank,) for rank in ranks.values()], splits)
    fields = {"encode_piece": encode_piece, "splits": splits, "token_bytes": dict(enumerate(ranks))}
    return fields, added_tokens, LLAMA3_SPECIALS[0]


def _read_spec(settings: dict) -> tuple[dict, list[dict], str | None]:
    """Returns a dict of Tokenizer's fields, the added tokens, and the BOS token's text or None."""
    spec = settings["tokenizer.json"]
    model, added_tokens = spec["model"], spec.get("added_tokens") or []
    _require(model.get("type", "BPE") == "BPE", f"a model of type {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(key), f"{key} = {model.get(key)!r}")
    for token in added_tokens:
        _require(token["content"] and not token.get("single_word"), f"the added token {token}")
    vocab = model["vocab"]
    ids = vocab | {token["content"]: token["id"] for token in added_tokens}
    _require(len(set(ids.values())) == len(ids), "one id for two tokens")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    unknown = [m for m in merges if len(m) != 2 or not vocab.keys() >= {*m, "".join(m)}]
    _require(not unknown, f"the merge {unknown[:1]} outside the vocabulary")
    normalizer = _steps(spec.get("normalizer"), "normalizers")
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    token_bytes = {id: _to_bytes(token, byte_level) for token, id in vocab.items()}
    if byte_level:
        fields = _read_byte_level(normalizer, steps)
    else:
        _require(model.get("byte_fallback"), "a model with neither ByteLevel nor byte_fallback")
        fields = _read_sentencepiece([*normalizer, *steps], settings)
        decoders = {step["type"] for step in _steps(spec.get("decoder"), "decoders")}
        fields["strip"] = fields["space"] != "never" and bool(decoders & {"Strip", "Metaspace"})
        token_bytes |= {vocab[token]: bytes([i]) for i, token in enumerate(FALLBACK_TOKENS)}
    pairs = byte_pairs(vocab, merges, bool(model.get("ignore_merges")), byte_level)
    fields |= {"encode_piece": piece_encoder(*pairs, fields["splits"]), "token_bytes": token_bytes}
    steps = _steps(spec.get("post_processor"), "processors")
    first = [step["single"][0].get("SpecialToken") for step in steps if "single" in step]
    return fields, added_tokens, next((token["id"] for token in first if token), None)


def _steps(spec: dict | None, key: str) -> list[dict]:
    """Returns the steps of a normalizer, pre-tokenizer, post-processor or decoder in one list."""
    if spec is None:
        return []
    return [step for part in spec[key] for step in _steps(part, key)] if key in spec else [spec]


def _read_byte_level(normalizer: list[dict], steps: list[dict]) -> dict:
    """Returns the fields of Tokenizer that say how to normalize and split text before ByteLevel."""
    kinds = [step["type"] for step in normalizer]
    _require(kinds in ([], ["NFC"]), f"a normalizer {', '.join(kinds)}")
    *before, last = steps
    plain = last["type"] == "ByteLevel" and not last.get("add_prefix_space")
    _require(plain, "a pre-tokenizer that does not end in ByteLevel without a prefix space")
    splits = []
    for step in before:
        kind, behavior = step["type"], step.get("behavior", "")
        isolated = kind == "Split" and behavior == "Isolated" and not step.get("invert")
        _require(kind == "Digits" or isolated, f"a pre-tokenizer {kind} {behavior}")
        digits = r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        pattern = {"Regex": digits} if kind == "Digits" else step["pattern"]
        pattern = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
        portable = PORTABLE.fullmatch(pattern) and not regex.fullmatch(pattern, "")
        _require(portable, f"a Split by {pattern!r:.60}, which libraries read differently,")
        splits.append(regex.compile(f"({pattern})"))
    if last.get("use_regex", True):
        splits.append(regex.compile(f"({GPT2_PATTERN})"))
    return {"form": "NFC" if kinds else None, "splits": splits}


def _read_sentencepiece(steps: list[dict], settings: dict) -> dict:
    """Returns the fields of Tokenizer that say where to insert SPACE and where to split text."""
    config = settings.get("tokenizer_config.json", {})
    llama = settings.get("config.json", {}).get("model_type", "llama") == "llama"
    if llama and config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        scheme = "always" if config.get("legacy") else "first"  # as transformers 5 does
        scheme = "never" if config.get("add_prefix_space") is False else scheme
        return {"space": scheme, "splits": []}
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps in ([prepend, replace], [replace]):
        return {"space": "legacy" if len(steps) == 2 else "never", "splits": []}
    is_metaspace = [(s["type"], s.get("replacement")) for s in steps] == [("Metaspace", SPACE)]
    _require(is_metaspace, f"byte_fallback with the steps {steps!r:.200}")
    splits = [regex.compile(f"({SPACE}[^{SPACE}]*)")] if steps[0].get("split", True) else []
    return {"space": steps[0].get("prepend_scheme", "always"), "splits": splits}
