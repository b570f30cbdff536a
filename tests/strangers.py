"""What strangers send: checkpoints, tokenizers, rows, templates and flags, each with one fault.

    python tests/strangers.py             a table: how many of each kind were refused cleanly
    python tests/strangers.py NAME ...    only the cases with such a name, and what they say

Clean is: exit status 2; one line on standard error that names file or flag, and the fault; within
10 s of work, in less than 1 GB; nothing written. Every case runs in a fork of one process, through
`main`.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import os
import resource
import signal
import struct
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from conftest import PAIR_ROWS, tiny_model  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402

SECONDS, MEGABYTES = 10, 1000
DEEP = b"[" * 200_000
MAINS = {"train": train.main, "data": data.main, "eval": evaluation.main}
ARGUMENTS = {
    "train": ["--init", "init", "--data", "pairs.jsonl", "--out", "out"],
    "data": ["pairs.jsonl", "--tokenizer", "init"],
    "eval": ["init", "--data", "pairs.jsonl"],
}


class Case(NamedTuple):
    kind: str
    name: str
    command: str
    argv: list[str]
    files: dict[str, bytes | None]  # written into the folder of `good_files`, None: removed
    says: tuple[str, ...]  # all of these are in the line


def checkpoint(name: str, **changes) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(**changes).save_pretrained(folder)
        data.byte_tokenizer().save(folder)
        return {f"{name}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}


def good_files() -> dict[str, bytes]:
    """A checkpoint, pairs and conversations that each command accepts."""
    files = checkpoint("init")
    chats = [{"messages": [{"role": "user", "content": f"aaaaaaaa {i}"},
                           {"role": "assistant", "content": "b"}]} for i in range(9)]  # fmt: skip
    for name, rows in (("pairs.jsonl", PAIR_ROWS), ("chats.jsonl", chats)):
        files[name] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return files


GOOD, OTHER = good_files(), checkpoint("other", vocab_size=300)
CONFIG = json.loads(GOOD["init/config.json"])
TOKENIZER = json.loads(GOOD["init/tokenizer.json"])
ROW = json.dumps(PAIR_ROWS[0]).encode() + b"\n"


def dump(value) -> bytes | None:
    return value if isinstance(value, bytes | None) else json.dumps(value).encode()


NOT_JSON = {
    "empty": b"",
    "cut off": b'{"a": 1',
    "a list": b"[1]",
    "null": b"null",
    "NUL": b"\0\0\0\0",
    "bad UTF-8": b'{"a": "\xff"}',
    "deep": DEEP,
    "deep objects": b'{"a":' * 200_000,
    "NaN": b'{"a": NaN}',
    "-Infinity": b'{"a": -Infinity}',
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "markup": b"<!DOCTYPE html>",
}


# --- Weights --------------------------------------------------------------------------------------


def unpack(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {n: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for n, t in header.items()}


def pack(tensors: dict[str, tuple[str, list[int], bytes]], change=lambda header: None) -> bytes:
    header, body = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += raw
    return framed(dump(change(header) or header), body)


def framed(header: bytes, body: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + body


WEIGHTS = GOOD["init/model.safetensors"]
TENSORS = unpack(WEIGHTS)
NORM = "model.norm.weight"
FIRST, SECOND = list(TENSORS)[:2]


def weights():
    """The faults of model.safetensors: name -> content, words of the refusal."""
    for size in (0, 1, 10**9, 2**40, 2**63, 2**64 - 1):
        yield f"header of {size}", struct.pack("<Q", size) + WEIGHTS[8:], "not a whole"
    for end in (0, 1, 7, 8, 9, 200, len(WEIGHTS) // 2, -1):
        yield f"ends at {end}", WEIGHTS[:end], "not a whole"
    yield "a byte too many", WEIGHTS + b"\0", "not a whole"
    yield "pickle", b"\x80\x02ccollections\nOrderedDict\n", "not a whole"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a whole"
    for name, content in NOT_JSON.items():
        yield f"header {name}", framed(content), "not a whole"
    for offsets in ([1, 129], [0, 2**40], [-4, 124], [128, 0], [0, 2**64], ["0", "128"], [0.5, 1],
                    [0], None, [0, 0]):  # fmt: skip
        changed = pack(TENSORS, lambda h, o=offsets: h[SECOND].update(data_offsets=o))
        yield f"offsets {offsets}", changed, "not a whole"
    for shape in ([31], [2**63], [-1], ["32"], None, [2**32, 2**32]):
        changed = pack(TENSORS, lambda h, s=shape: h[NORM].update(shape=s))
        yield f"shape {shape}", changed, "not a whole"
    for shape in ([1, 32], [32, 1], [2, 16]):
        yield f"shape {shape}", pack(TENSORS | {NORM: ("F32", shape, bytes(128))}), "has shape"
    for shape in ([], [0], [31]):
        tensor = ("F32", shape, bytes(4 * (shape or [1])[0]))
        yield f"tensor of shape {shape}", pack(TENSORS | {NORM: tensor}), "has shape"
    sizes = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
             "F8_E8M0": 1, "C64": 8, "U64": 8}  # fmt: skip
    for dtype, size in sizes.items():
        tensor = (dtype, [32], bytes(32 * size))
        yield f"type {dtype}", pack(TENSORS | {NORM: tensor}), "unsupported type"
    for dtype, size in {"F4": 16, "F6_E2M3": 24}.items():
        yield f"type {dtype}", pack(TENSORS | {NORM: (dtype, [32], bytes(size))}), ""
    for dtype in ("F33", 4, None, "f32", "BF16"):
        changed = pack(TENSORS, lambda h, d=dtype: h[NORM].update(dtype=d))
        yield f"called {dtype}", changed, "not a whole"
    for value in ("nan", "inf", "-inf"):
        tensor = ("F32", [32], struct.pack("<32f", *[float(value)] * 32))
        yield f"a {value}", pack(TENSORS | {NORM: tensor}), "not finite"
    yield "extra", pack(TENSORS | {"extra": ("F32", [1], bytes(4))}), "unexpected tensor extra"
    yield "odd name", pack(TENSORS | {"\0\x1b[2J\n": ("F32", [1], bytes(4))}), "unexpected tensor"
    lacking = {name: tensor for name, tensor in TENSORS.items() if name != NORM}
    yield "no norm", pack(lacking), "is missing"
    yield "no tensors", pack({}), "0 tensors"
    yield "no file", None, "no model.safetensors"
    twice = pack(TENSORS, lambda h: dump(h)[:-1] + b"," + dump({NORM: h[FIRST]})[1:])
    yield "name twice", twice, ""


def shards():
    """The faults of an index: name -> it, changes of the shards a and b, words of the refusal."""
    names = sorted(TENSORS)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    whole = {name: shard for shard, part in parts.items() for name in part}
    files = {s: pack({name: TENSORS[name] for name in part}) for s, part in parts.items()}
    for name, content in NOT_JSON.items():
        yield name, content, files, "JSON"
    for value in (None, [], "a.safetensors", 3, {"a": 1}, {"a": None}, {"a": ["a.safetensors"]}):
        yield f"map {value}", {"weight_map": value}, files, "weight_map must"
    for path in ("../model.safetensors", "/etc/passwd", "..", ".", "", "sub/a.safetensors",
                 "gone.safetensors", "a\0", "x" * 300, "~/a.safetensors", "file:///etc/passwd",
                 "a.safetensors ", "..\\a.safetensors", "init"):  # fmt: skip
        yield f"path {path:.30}", {"weight_map": whole | {NORM: path}}, files, "is not a file of"
    yield "not weights", {"weight_map": whole | {NORM: "config.json"}}, files, NORM
    yield "no map", {"metadata": {}}, files, "weight_map must"
    yield "empty map", {"weight_map": {}}, files, "0 tensors"
    other = {shard: "ab"[shard[0] == "a"] + shard[1:] for shard in files}
    yield "other shard", {"weight_map": whole | {NORM: other[whole[NORM]]}}, files, NORM
    yield "listed, not held", {"weight_map": whole | {"extra": "a.safetensors"}}, files, "extra"
    less = {name: shard for name, shard in whole.items() if name != NORM}
    yield "held, not listed", {"weight_map": less}, files, NORM
    both = {s: pack({n: TENSORS[n] for n in {*part, NORM}}) for s, part in parts.items()}
    yield "in both shards", {"weight_map": whole}, both, NORM
    yield "shard cut off", {"weight_map": whole}, files | {"b.safetensors": b"\0"}, "b.safetensors"


# --- config.json ----------------------------------------------------------------------------------


def configs():
    """name -> content, words of the refusal."""
    yield from ((name, content, "JSON") for name, content in NOT_JSON.items())
    whole = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "head_dim",
             "max_position_embeddings")  # fmt: skip
    real = ("rms_norm_eps", "rope_theta", "initializer_range")
    for key in whole:
        for value in ("x", -1, 0, 2**40, 1.5, [1]):
            yield f"{key} {value}", CONFIG | {key: value}, key
    plain = {k: v for k, v in CONFIG.items() if k not in ("rope_parameters", "rope_scaling")}
    for key in real:
        for value in ("x", -1, 0, 1e300, {}):
            yield f"{key} {value}", plain | {key: value}, key
        yield f"{key} overflows", dump(plain | {key: "?"}).replace(b'"?"', b"1e999"), key
        yield f"{key} NaN", dump(plain | {key: "?"}).replace(b'"?"', b"NaN"), "NaN"
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        for value in ("yes", 2, []):
            yield f"{key} {value}", CONFIG | {key: value}, key
    for key, value in {"vocab_size": 2**24 - 1, "hidden_size": 2**24 - 2, "head_dim": 2**23,
                       "intermediate_size": 2**24 - 1, "num_hidden_layers": 4095,
                       "num_attention_heads": 2**22, "num_key_value_heads": 1}.items():  # fmt: skip
        words = "num_" if key.startswith("num_h") else ""
        yield f"absurd {key}", CONFIG | {key: value}, words
    wide = {"hidden_size": 2**23, "num_attention_heads": 2**23, "head_dim": 2**23}
    yield "absurd product", CONFIG | wide, "num_attention_heads"
    yield "all absurd", CONFIG | dict.fromkeys(whole, 2**23), ""
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        yield f"no {key}", {k: v for k, v in CONFIG.items() if k != key}, key
    for value in ("gpt2", "", 1, None, [], {}, "LLAMA", "x" * 10**6):
        yield f"model_type {value!s:.9}", CONFIG | {"model_type": value}, "model_type"
    for key, value in (
        ("rope_scaling", "linear"), ("rope_scaling", {"type": "yarn"}),
        ("rope_scaling", {"type": ["x"]}), ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": -1}),
        ("rope_scaling", {"type": "linear", "factor": "x"}),
        ("bos_token_id", -1), ("bos_token_id", "x"), ("bos_token_id", 1.5), ("bos_token_id", [1]),
        ("eos_token_id", -1), ("eos_token_id", "x"), ("eos_token_id", {}), ("eos_token_id", 10**9),
        ("sliding_window", 5), ("layer_types", [[]]), ("hidden_act", []),
        ("quantization_config", {"bits": 4}), ("attention_dropout", 0.5), ("pretraining_tp", "x"),
    ):  # fmt: skip
        words = "eos_token_id" if value == 10**9 else "rope" if "rope" in key else key
        content = (plain if "rope" in key else CONFIG) | {key: value}
        yield f"{key} {value}", content, words
    yield "no file", None, "No such file"
    yield "17 MiB", b" " * (17 << 20), "more than 16 MiB"


# --- Tokenizers -----------------------------------------------------------------------------------


def split_by(pattern) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": {"type": "Sequence",
                              "pretokenizers": [split, TOKENIZER["pre_tokenizer"]]}}  # fmt: skip


def tokenizers():
    """tokenizer.json: name -> content, words of the refusal."""
    yield from ((name, content, "JSON") for name, content in NOT_JSON.items())
    for pattern in ("(a+)+b", "(a|aa)+b", "(?:a+(?!c))+b"):
        yield f"slow {pattern}", TOKENIZER | split_by(pattern), "takes more than"
    for pattern in ("(", "a{1000000000}", "(?:(?:(?:a{99}){99}){99}){99}", "(?R)a", "(a)\\1", "x*",
                    "(" * 3000 + "a" + ")" * 3000, "[" * 200_000, "(?:abc){e<=9}", "(?s)a",
                    "\\p{Nonsense}", "(*FAIL)", "a{99999999999999999999}", 5, None):  # fmt: skip
        yield f"pattern {pattern!s:.20}", TOKENIZER | split_by(pattern), ""
    for key, values in {
        "model": (None, [], 1, {}, {"type": "BPE"}, {"type": []}, {"type": "Unigram"}),
        "pre_tokenizer": (None, 1, [], {}, {"type": "Whitespace"}),
        "added_tokens": (1, "x", {"a": 1}, [1], [{}], [{"content": "x"}]),
        "normalizer": (1, "x", {"type": "Lowercase"}, {"type": []}, {}),
        "post_processor": (1, "x", {"type": "TemplateProcessing"}),
        "decoder": (1, "x", {}),
    }.items():
        for value in values:
            yield f"{key} {value!s:.30}", TOKENIZER | {key: value}, ""
    model, vocab = TOKENIZER["model"], TOKENIZER["model"]["vocab"]
    for name, value in {
        "dangling": ["a b"], "half": ["a"], "number": [5], "nothing": [None], "three": ["a b c"],
        "list of numbers": [[1, 2]], "cyclic": [["ab", "a"], ["a", "ab"]], "empty": [["", ""]],
        "no list": 5, "a string": "ab", "unhashable": [[[], []]], "many": [["a", "b"]] * 10**5,
    }.items():  # fmt: skip
        yield f"merges {name}", TOKENIZER | {"model": model | {"merges": value}}, ""
    for name, value in {
        "id -1": {"a": -1}, "id 2**40": {"a": 2**40}, "id 1.5": {"a": 1.5}, "id text": {"a": "1"},
        "id true": {"a": True}, "id null": {"a": None}, "id twice": {"a": 98}, "id list": {"a": []},
        "id huge": {"new": 2**31 - 1}, "surrogate": {"\ud800": 300},
    }.items():  # fmt: skip
        yield f"vocab {name}", TOKENIZER | {"model": model | {"vocab": vocab | value}}, ""
    for value in ({}, [], None, 1, {k: v for k, v in vocab.items() if k != "a"}):
        yield f"vocab {value!s:.9}", TOKENIZER | {"model": model | {"vocab": value}}, ""
    begin, end = TOKENIZER["added_tokens"]
    for name, value in {
        "id -1": {"id": -1}, "id text": {"id": "x"}, "id taken": {"id": 65},
        "id huge": {"id": 2**33},
        "no text": {"content": None}, "number": {"content": 5}, "list": {"content": []},
        "surrogate": {"content": "\udfff"}, "single_word": {"single_word": True},
        "special list": {"special": None, "content": "x"}, "strip": {"lstrip": []},
    }.items():  # fmt: skip
        yield f"added {name}", TOKENIZER | {"added_tokens": [begin | value, end]}, ""
    yield "no end", TOKENIZER | {"added_tokens": [begin]}, "eos_token"
    yield "dropout", TOKENIZER | {"model": model | {"dropout": 0.1}}, "dropout"
    yield (
        "fallback",
        TOKENIZER | {"model": model | {"byte_fallback": True}, "pre_tokenizer": None},
        "",
    )


def beside():
    """Files beside the tokenizer: their name, name of the case, content."""
    config = json.loads(GOOD["init/tokenizer_config.json"])
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        for name, content in NOT_JSON.items():
            yield file, name, content
    for key in ("eos_token", "bos_token"):
        for value in (5, [], "gone", {"content": 5}, {"content": []}, {"content": None}, {}):
            if not (
                key == "bos_token" and value in (5, [], "gone")
            ):  # which the code places itself
                yield "tokenizer_config.json", f"{key} {value}", config | {key: value}
    for value in ("x", -1, 1.5, [[]], {}, [None, "x"], True, 2**40):
        yield "generation_config.json", f"eos {value}", {"eos_token_id": value}
    for value in ([1], [{}], [{"name": "x"}], [{"name": [], "template": 1}]):
        yield "tokenizer_config.json", f"template {value}", config | {"chat_template": value}


def ranks():
    """Rank files, tokenizer.model: name -> content, words of the refusal."""
    good = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    for name, line, words in (
        ("gap", b"YWI= 300", "expected rank 256"), ("twice", b"YQ== 256", "line 257"),
        ("rank twice", b"YWI= 255", "line 257"), ("negative", b"YWI= -1", "line 257"),
        ("huge", b"YWI= " + b"9" * 30, "line 257"), ("long", b"YWI= " + b"9" * 5000, "line 257"),
        ("not base64", b"%%% 256", "line 257"), ("no rank", b"YWI=", "line 257"),
        ("three words", b"YWI= 256 1", "line 257"), ("float", b"YWI= 256.0", "line 257"),
        ("bad UTF-8", b"\xff\xfe 256", "line 257"), ("NUL", b"\0", "line 257"),
        ("padding", b"YWI 256", "line 257"), ("blank", b"", "line 257"),
    ):  # fmt: skip
        yield name, b"\n".join([*good, line, b""]), words
    yield "no bytes", b"", "byte 0"
    yield "absent byte", b"\n".join(good[:200]), "byte 200"
    yield "SentencePiece", b"\x0a\x09<unk>", "line 1"
    yield "large", b"\n" * (65 << 20), "64 MiB"


# --- Rows, templates, flags -----------------------------------------------------------------------


def rows():
    """pairs.jsonl: name -> content, words of the refusal."""
    for name, line in NOT_JSON.items():
        if name != "empty":
            yield f"row {name}", ROW + line + b"\n", ":2: "
    for name, row in {
        "no answer": {"prompt": "p"}, "no columns": {}, "other columns": {"x": 1},
        "number": {"prompt": 1, "chosen": "c", "rejected": "r"},
        "null": {"prompt": None, "chosen": "c", "rejected": "r"},
        "list": {"prompt": "p", "chosen": ["c"], "rejected": ["r"]},
        "mixed": {"prompt": "p", "chosen": "c", "rejected": [1]},
        "label": {"prompt": "p", "completion": "c", "label": 1},
        "label null": {"prompt": "p", "completion": "c", "label": None},
        "messages": {"messages": "x"}, "no messages": {"messages": []},
        "no content": {"messages": [{"role": "user"}]},
        "content list": {"messages": [{"role": "user", "content": [1]}]},
        "role number": {"messages": [{"role": 1, "content": "x"}]},
        "surrogate": {"prompt": "\ud800", "chosen": "c", "rejected": "r"},
        "surrogate role": {"messages": [{"role": "\udfff", "content": "x"}]},
        "no template": {"messages": [{"role": "user", "content": "x"},
                                     {"role": "assistant", "content": "y"}]},
        "no transcript": {"chosen": "a", "rejected": "b"},
        "many columns": {"x" * 1000 + str(i): 1 for i in range(999)},
    }.items():  # fmt: skip
        yield name, ROW + dump(row) + b"\n", ":2: "
    yield "overflow", ROW + b'{"prompt": 1e999, "chosen": "c", "rejected": "r"}', ":2: "
    yield "control character", ROW + b'{"prompt": "a\0", "chosen": "c", "rejected": "r"}', ":2: "
    yield "UTF-16", ROW.decode().encode("utf-16"), ":1: "
    yield "long line", ROW + b'{"prompt": "' + b"a" * (17 << 20) + b'"}', ":2: a row of more"
    yield "compressed", gzip.compress(ROW), "is compressed"


def unusable():
    """pairs.jsonl without a row to train on: name -> content, words of the refusal."""
    yield "empty file", b"", "empty"
    yield "blank lines", b"\n \n\t\n", "empty"
    for name, change, words in (
        ("empty answers", {"chosen": " "}, "is empty"),
        ("no prompt left", {"chosen": "x" * 2000}, "room"),
        ("identical", {"chosen": "x", "rejected": "x"}, "identical"),
        ("7 MiB", {"rejected": "x" * (7 << 20)}, "room"),
    ):  # fmt: skip
        yield name, dump(PAIR_ROWS[0] | change), words
    yield "one prompt", ROW * 20, "--eval_fraction"


def archives():
    """pairs.jsonl.gz: name -> content."""
    packed = gzip.compress(ROW * 2000)
    yield "plain", ROW
    yield "cut off", packed[:-9]
    yield "cut early", packed[:20]
    yield "wrong sum", packed[:-8] + bytes(8)
    yield "damaged", packed[:30] + b"\xff" * 30 + packed[60:]
    yield "NUL", bytes(100)
    yield "long line", gzip.compress(b"a" * (2**27))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    LOOP: "not end in",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{{ ''.__class__ }}": "__class__",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}": "__class__",
    "{{ raise_exception.__globals__ }}": "__globals__",
    "{{ strftime_now.__code__ }}": "__code__",
    "{{ ''|attr('__class__') }}": "No filter named 'attr'",
    "{{ messages|map(attribute='__class__')|list }}": "__class__",
    "{{ self._TemplateReference__context }}": "fails",
    "{{ namespace.__init__.__globals__ }}": "__init__",
    "{% for a in range(10**9) %}{% endfor %}": "too much",
    "{% for a in range(1000000000) %}{% endfor %}": "Range too big",
    "{{ 'x' * 10**10 }}": "too much",
    "{{ 'x' * 9999999999 }}": "too much",
    "{{ [0] * 9999999999 }}": "too much",
    "{{ 'x'.ljust(10000000000) }}": "ljust",
    "{{ '%09999999999d' % 1 }}": "too much",
    "{{ '{:9999999999}'.format(1) }}": "fails",
    "{{ 'x'" + "|replace('x', 'x' * 1000)" * 5 + " }}": "MemoryError",
    "{{ range(99999)|join('x' * 1000000) }}": "MemoryError",
    "{% set n = namespace(i=3) %}"
    "{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}": "too much",
    "{% set n = namespace(s='xx') %}"
    "{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "writes too much",
    "{% set tick = 1 %}" + LOOP: "not end in",
    "{{ cycler.__init__.__globals__ }}": "__init__",
    "{{ 1.5 | round(1000000000, 'ceil') }}": "No filter named 'round'",
    "{{ messages | tojson(indent=2000000000) | length / 0 }}": "division by zero",
    "{% set a = ['x'] * 1000 %}{% set b = [a] * 1000 %}{{ [b] * 1000 }}": "MemoryError",
    "{% if %}": "Expected an expression",
    "{% for %}": "fails",
    "{{ 'x' ": "fails",
    "{% nonsense %}": "unknown tag",
    "{{ " + "(" * 5000 + " }}": "fails",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ nothing() }}": "undefined",
    "{{ nothing.at.all }}": "undefined",
    "{{ lipsum(n=99999999) }}": "undefined",
    "{{ 1|pprint }}": "No filter named",
    "{{ 1|format }}": "No filter named",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages.append(1) }}": "fails",
    "{{ messages[0].update(a=1) }}": "fails",
    "{{ messages[99].content }}": "no element 99",
    "{{ strftime_now(1) }}": "fails",
}  # fmt: skip


def flags():
    """command, arguments, words of the refusal."""
    for flag, values in {
        "--beta": ("nan", "inf", "-1", "0", "x", "1e9", ""),
        "--lr": ("nan", "-inf", "0", "-1", "x", "1e999"),
        "--epochs": ("0", "-1", "1.5", "x", "1e10", "9" * 5000),
        "--max_steps": ("-1", "x", "99999999999"),
        "--batch_size": ("0", "-5", "1.5"),
        "--max_length": ("1", "x", "-1", "nan"),
        "--row_tokens": ("0", "x"),
        "--micro_tokens": ("0", "x"),
        "--warmup": ("1.5", "-0.1", "nan"),
        "--weight_decay": ("-1", "nan", "inf"),
        "--grad_clip": ("-1", "nan"),
        "--eval_fraction": ("1", "-0.1", "nan"),
        "--eval_every": ("0", "x"),
        "--log_every": ("0", "-1"),
        "--seed": ("-1", "x", "1.5"),
        "--loss": ("nonsense", "", "MIO"),
        "--schedule": ("nonsense",),
        "--dtype": ("float16", "x"),
        "--compile": ("yes",),
        "--checkpointing": ("1",),
        "--device": ("tpu", "cuda:99", "meta", "", "x:y"),
        "--config": ("gone.json", "init"),
    }.items():
        for value in values:
            yield (
                "train",
                [*ARGUMENTS["train"], flag, value],
                (value if "--c" in flag else flag)[:9],
            )
    for argv, words in (
        (["--nonsense", "1"], "--nonsense"), (["--bet", "1"], "--bet"), (["--beta"], "--beta"),
        (["stray"], "stray"), (["--init", "gone"], "gone"), (["--data", "gone"], "gone"),
        (["--eval_data", "gone"], "gone"), (["--data", "init"], "init"),
        (["--out", "init"], "init"), (["--out", "pairs.jsonl"], "--out"),
        (["--init", "pairs.jsonl"], "pairs.jsonl"),
        (["--out", "."], "--out"), (["--init", ""], "--init"), (["--data", ""], "--data"),
        (["--data", "x" * 5000], "xxx"),
    ):  # fmt: skip
        yield "train", [*ARGUMENTS["train"], *argv], words
    yield "train", ["--init", "init", "--out", "out"], "--data"
    yield "train", ["--data", "pairs.jsonl", "--out", "out"], "--init"
    yield "train", ["--eval_data", "pairs.jsonl", "--out", "out"], "--eval_data"
    yield "train", ["--max_length", "5", "--out", "out"], "--max_length"
    for argv, words in (
        ([], "FILE.jsonl"), (["pairs.jsonl"], "--tokenizer"),
        (["--tokenizer", "init"], "FILE.jsonl"),
        (["gone", "--tokenizer", "init"], "gone"), (["init", "--tokenizer", "init"], "init"),
        (["pairs.jsonl", "--tokenizer", "gone"], "gone"),
        *((["pairs.jsonl", "--tokenizer", "init", "--max_length", value], "--max_length")
          for value in ("1", "0", "-5", "x", "nan", "1.5", "")),
        (["pairs.jsonl", "--tokenizer", "init", "--nonsense"], "--nonsense"),
        (["pairs.jsonl", "--tokenizer", "init", "--max_len", "5"], "--max_len"),
    ):  # fmt: skip
        yield "data", argv, words
    for argv, words in (
        ([], "RUN_OR_CHECKPOINT"), (["gone"], "gone"), (["pairs.jsonl"], "pairs.jsonl"),
        (["init", "--data", "gone"], "gone"), (["init", "--data", "init"], "init"),
        (["init", "--device", "tpu"], "--device"), (["init", "--device", "cuda:99"], "--device"),
        (["init", "--nonsense", "1"], "--nonsense"),
        (["init", "gone", "--data", "pairs.jsonl"], "gone"),
        (["init", "--data"], "--data"), ([""], ""), (["."], ""),
    ):  # fmt: skip
        yield "eval", argv, words


def options():
    """JSON files for train.py --config: name -> content, words of the refusal."""
    yield from ((name, content, "JSON") for name, content in NOT_JSON.items())
    for key, value in (("nonsense", 1), ("beta", "x"), ("beta", [1]), ("beta", True),
                       ("epochs", 1.5),
                       ("epochs", {}), ("seed", None), ("loss", []), ("loss", None), ("lr", -1),
                       ("device", 1), ("max_length", 10**400)):  # fmt: skip
        yield f"{key} {value!s:.9}", {key: value}, key


def run_configs():
    """train_config.json of a run folder, read by eval.py: name -> content, words of the refusal."""
    yield from ((name, content, "JSON") for name, content in NOT_JSON.items())
    for key, values in {"eval_data": (1, [], "gone", {}, "init"), "max_length": ("x", 0, [], 1.5),
                        "init": (1, [], "gone", {}, "pairs.jsonl")}.items():  # fmt: skip
        for value in values:
            words = value if key != "max_length" and isinstance(value, str) else key
            yield f"{key} {value}", {"eval_data": "pairs.jsonl", key: value}, words
    yield "another init", {"eval_data": "pairs.jsonl", "init": "other"}, "other: has 300 ids"


# --- Checkpoints to resume from -------------------------------------------------------------------


def stopped_run() -> dict[str, bytes]:
    """The files of a run that stopped at a checkpoint, made in a fork."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as error:
        for name, content in GOOD.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        child = os.fork()
        if child == 0:
            begin(Path(folder), error.fileno())
            more = ["--save_every", "2", "--max_steps", "2", "--batch_size", "4"]
            os._exit(call(Case("", "", "train", [*ARGUMENTS["train"], *more], {}, ())))
        assert os.waitpid(child, 0)[1] == 0
        return {name: content for name, content in contents(Path(folder)).items()
                if name.startswith("out/") and content is not None}  # fmt: skip


def tampered():
    """Faults of a run to resume: name -> files, words of the refusal."""
    good, inner = stopped_run(), "out/checkpoints/step-000002/"
    files = {name: content for name, content in good.items() if name.startswith(inner)}
    record = json.loads(files[f"{inner}training.json"])
    sums = f"{inner}SHA256SUMS"

    def signed(name: str, content: bytes | None) -> dict:
        """Another file of the checkpoint, with SHA256SUMS to match."""
        changed = {n: c for n, c in (files | {inner + name: content}).items() if c is not None}
        lines = (f"{hashlib.sha256(c).hexdigest()}  {n.removeprefix(inner)}\n"
                 for n, c in sorted(changed.items()) if n != sums)  # fmt: skip
        return good | {inner + name: content, sums: "".join(lines).encode()}

    for name, content in [*files.items(), ("out/metrics.jsonl", good["out/metrics.jsonl"])]:
        bare = "" if name == sums else name.removeprefix(inner)
        for place in (0, len(content) // 3, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            yield f"{name}, a bit of byte {place}", good | {name: bytes(flipped)}, bare
        for cut in (None, b"", content[:-1]):
            length = "absent" if cut is None else len(cut)
            yield f"{name}, {length}", good | {name: cut}, bare
    yield "a file more", good | {f"{inner}x.py": b""}, "x.py"
    for name, content in NOT_JSON.items():
        yield f"signed {name}", signed("training.json", content), "training.json"
    for key in record:
        for value in (None, -1, "x", [], {}, 1.5, True):
            if type(value) is not type(record[key]) or key == "step":
                content = dump(record | {key: value})
                yield f"signed {key} {value}", signed("training.json", content), "training.json"
    for key, value in (("loss", "x"), ("beta", -1), ("epochs", "x"), ("data", []), ("lr", {})):
        content = dump(record | {"options": record["options"] | {key: value}})
        words = "No such file" if key == "data" else f"--{key}"
        yield f"signed options {key}", signed("training.json", content), words
    tensors = unpack(files[f"{inner}training.safetensors"])
    for name in list(tensors)[:: len(tensors) // 6]:
        dtype, shape, raw = tensors[name]
        for word, one in (("flat", (dtype, [len(raw) // 4, 1, 1], raw[: len(raw) // 4 * 4])),
                          ("int", ("I32", shape, raw))):  # fmt: skip
            changed = pack(tensors | {name: one}) if one[0] != "I32" or dtype == "F32" else b""
            words = "training.safetensors"
            yield f"signed {name} {word}", signed(words, changed), words
        left = {n: t for n, t in tensors.items() if n != name}
        yield f"signed without {name}", signed("training.safetensors", pack(left)), name
    for size in (10**9, 2**63):
        content = framed(b"{}", size=size)
        yield f"signed header of {size}", signed("training.safetensors", content), "not a whole"


# --- All of them ----------------------------------------------------------------------------------


def cases():
    """Kinds that more than one command reads are given to them in turn."""

    def of(kind, name, commands, number, files, *says, argv=None):
        command = commands[number % len(commands)]
        return Case(kind, name, command, argv or ARGUMENTS[command], files, says)

    both, all_ = ("train", "eval"), ("train", "eval", "data")
    for i, (name, content, words) in enumerate(weights()):
        where = (
            "init"
            if "missing" in words or content is None or "tensors" in words
            else "model.safetensors"
        )
        yield of("safetensors", name, both, i, {"init/model.safetensors": content}, where, words)
    for i, (name, index, files, words) in enumerate(shards()):
        files = {f"init/{shard}": content for shard, content in files.items()}
        files["init/model.safetensors"] = None
        files["init/model.safetensors.index.json"] = dump(index)
        yield of("index", name, both, i, files, words)
    for i, (name, content, words) in enumerate(configs()):
        where = "init" if "1000000000" in name else "config.json"
        yield of("config.json", name, both, i, {"init/config.json": dump(content)}, where, words)
    for i, (name, content, words) in enumerate(tokenizers()):
        commands = ("train", "eval") if "huge" in name else all_  # in itself an id may be large
        where = "" if "huge" in name else "tokenizer.json"
        files = {"init/tokenizer.json": dump(content)}
        if name.startswith("slow"):
            row = {"prompt": "a" * 3000, "chosen": "c", "rejected": "r"}
            files["pairs.jsonl"] = dump(row)
        yield of("tokenizer", name, commands, i, files, where, words)
    for i, (file, name, content) in enumerate(beside()):
        yield of("tokenizer", f"{file} {name}", all_, i, {f"init/{file}": dump(content)}, file)
    for i, (name, content, words) in enumerate(ranks()):
        files = {"init/tokenizer.json": None, "init/tokenizer_config.json": None}
        files["init/tokenizer.model"] = content
        yield of("tokenizer", f"ranks {name}", all_, i, files, "tokenizer.model", words)
    for i, (name, content, words) in enumerate(rows()):
        yield of("rows", name, all_, i, {"pairs.jsonl": content}, "pairs.jsonl", words)
    for i, (name, content, words) in enumerate(unusable()):
        commands = ("train",) if name == "one prompt" else both
        where = "" if name == "one prompt" else "pairs.jsonl"
        yield of("rows", name, commands, i, {"pairs.jsonl": content}, where, words)
    for i, (name, content) in enumerate(archives()):
        argv = ["pairs.jsonl.gz", "--tokenizer", "init"]
        yield of(
            "rows", f"gzip {name}", ("data",), i, {"pairs.jsonl.gz": content}, "jsonl.gz", argv=argv
        )
    for i, (source, words) in enumerate(TEMPLATES.items()):
        argv = ["chats.jsonl", "--tokenizer", "init"]
        files = {"init/chat_template.jinja": source.encode()}
        yield of("template", f"{source:.50}", ("data",), i, files, "template", words, argv=argv)
    for command, argv, words in flags():
        yield Case("flags", f"{command} {' '.join(argv)[-50:]}", command, argv, {}, (words,))
    for name, content, words in options():
        argv = [*ARGUMENTS["train"], "--config", "o.json"]
        yield Case("flags", f"config {name}", "train", argv, {"o.json": dump(content)}, (words,))
    for name, files, words in tampered():
        yield Case("checkpoint", name, "train", ["--resume", "--out", "out"], files, (words,))
    for name, content, words in run_configs():
        files = OTHER | {"init/train_config.json": dump(content)}
        yield Case("run folder", name, "eval", ["init"], files, (words,))


class Outcome(NamedTuple):
    fault: str  # "" where the case was refused cleanly
    error: str
    seconds: float
    megabytes: float


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}  # fmt: skip


def run(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as error:
        folder, given = Path(folder), GOOD | case.files
        for name, content in given.items():
            if content is not None:
                (folder / name).parent.mkdir(exist_ok=True, parents=True)
                (folder / name).write_bytes(content)
        before = contents(folder)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                begin(folder, error.fileno())
            os._exit(call(case))
        _, status, usage = os.wait4(child, 0)
        seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        error.seek(0)
        text, code = error.read().decode(errors="replace"), os.waitstatus_to_exitcode(status)
        written = contents(folder) != before
    lacking = [word for word in case.says if word not in text]
    faults = {
        "killed": code < 0,
        f"exit status {code}": code >= 0 and code != 2,
        "traceback": "Traceback" in text,
        f"{text.count(chr(10))} lines": text.count("\n") != 1,
        "another beginning": not text.startswith(f"{case.command}.py: error: "),
        f"does not say {lacking}": lacking,
        "wrote files": written,
        "too slow": seconds > SECONDS,
        "too much memory": megabytes > MEGABYTES,
    }
    fault = ", ".join(fault for fault, there in faults.items() if there)
    return Outcome(fault, text, seconds, megabytes)


def begin(folder: Path, error: int) -> None:
    """In the child: its folder, its streams, its limits."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(error, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # the machine is to survive
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
    signal.alarm(10 * SECONDS)  # in case it sleeps


def call(case: Case) -> int:
    try:
        MAINS[case.command](list(case.argv))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    return code


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    part, parts = map(int, os.environ.get("PART", "0/1").split("/"))  # to share the work
    named = [c for c in cases() if not names or any(n in f"{c.kind} {c.name}" for n in names)]
    chosen = named[part::parts]
    results: dict[str, list[Outcome]] = {}
    for case in chosen:
        outcome = run(case)
        results.setdefault(case.kind, []).append(outcome)
        if names or outcome.fault:
            print(f"{case.kind}: {case.name}\n  {outcome.fault or 'refused cleanly'}, "
                  f"{outcome.seconds:.1f} s, {outcome.megabytes:.0f} MB\n"
                  f"  {outcome.error[-600:].strip()}", flush=True)  # fmt: skip
    print(f"{'':12} {'tried':>6} {'refused':>8} {'else':>5} {'seconds':>8} {'MB':>5}")
    results["all"] = [outcome for outcomes in results.values() for outcome in outcomes]
    for kind, outcomes in results.items():
        clean, count = sum(not outcome.fault for outcome in outcomes), len(outcomes)
        seconds, most = (max(o[i] for o in outcomes) for i in (2, 3))
        print(f"{kind:12} {count:6} {clean:8} {count - clean:5} {seconds:8.1f} {most:5.0f}")
    return int(any(outcome.fault for outcome in results["all"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
