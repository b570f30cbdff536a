"""Tokenizers of every kind that is read; tokenizers and transformers are the oracles."""

import dataclasses
import json
import random
import unicodedata
from pathlib import Path

import pytest

import data
from data import byte_pairs, load_tokenizer, merge

hypothesis = pytest.importorskip("hypothesis", reason="draws the strings of property tests")
tokenizers = pytest.importorskip("tokenizers", reason="the oracle of every test here")
transformers = pytest.importorskip("transformers", reason="the oracle of every test here")
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402  # noqa: E402

QWEN_PATTERN = data.LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SAMPLES = [
    "Hello, world! It's 12345 apples; they'LL cost $6.50.\n\n  indented\ttab  \n",
    "naïve café cafe\u0301 — ½ × 3 ≠ 2 … “quotes” ﬁne Å A\u030a e\u0323\u0301",
    "你好，世界。こんにちは 안녕하세요 Привет мир שלום مرحبا हिन्दी ไทย ಕನ್ನಡ አማርኛ Ελληνικά",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇫🇷 \u200b\u200d\ufeff zero width",
    "<|begin|> <s> </s> <unk> <0x0A> <|end|><tool>x</tool> [INST] ▁under▁ Ġ ċ",
    "\x00\x01\x07 \x1b[0m control \r\n\r\n\x0b\x0c\x85\u2028 runs       of \u00a0\u3000 spaces",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x ** 2}  # comment\n\n\nclass A: ...\n",
    "1234567890 ١٢٣ Ⅷ ² ¾ 3.14159 1,000,000 0x1F 007",
    "I'm you're we've he'll she'd IT'S 'tis ſ 'ſ ’s",
    "aaaaaaaaaaaaaaaa bbbb      abababababab\n\n\n\n\n\n\t\t\t\t        ",
    "a", " ", "  ", " a", "a ", "\n", "", "▁", "▁▁a", "é", "e\u0301", "\ud7ff", "\U0010ffff", "'",
]  # fmt: skip


def strings(count: int, seed: int = 0) -> list[str]:
    """Text of many kinds: samples, slices of them joined anyhow, lines of code, random Unicode."""
    rng = random.Random(seed)
    lines = Path(data.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]

    def character():
        """Assigned in Python's own, older tables: libraries disagree about the newest ones."""
        while unicodedata.category(char := chr(rng.randrange(*rng.choice(ranges)))) == "Cn":
            pass
        return char

    def piece():
        kind = rng.randrange(6)
        if kind == 0:
            return rng.choice(lines)
        if kind == 1:
            return rng.choice(" \t\n\r  ") * rng.randrange(9)
        if kind == 2:
            return "".join(character() for _ in range(rng.randrange(8)))
        if kind == 3:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        text = rng.choice(SAMPLES)
        start = rng.randrange(len(text) + 1)
        return text[start : start + rng.randrange(20)]

    made = ["".join(piece() for _ in range(rng.randrange(1, 7))) for _ in range(count)]
    return SAMPLES + made[len(SAMPLES) :]


def byte_level(*before, normalizer=None, use_regex=False, **model):
    """A byte-level BPE trained here, with these steps before ByteLevel."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings(3000, seed=1), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"] |= model
    return spec


def split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def sentencepiece(normalizer, pre_tokenizer, all_splits: bool):
    """As conversions of SentencePiece models look: pieces, byte fallback, ranks by score.

    all_splits: merges are every way to make a piece of two, as the conversion lists them."""
    words = tokenizers.Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=300, show_progress=False)
    words.train_from_iterator([text for text in strings(3000, seed=1)], trainer)
    trained = json.loads(words.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = ["".join(m) for m in trained["merges"]]
    runs = ["▁" * 2**k for k in range(1, 5)]
    runs = [run for run in runs if run not in trained["vocab"]]
    pieces = made + runs
    chars = [token for token in trained["vocab"] if len(token) == 1]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces, *chars])}
    if all_splits:
        merges = [[p[:i], p[i:]] for p in pieces for i in range(1, len(p))
                  if p[:i] in vocab and p[i:] in vocab]  # fmt: skip
    else:
        merges = trained["merges"] + [[run[: len(run) // 2]] * 2 for run in runs]
    model = models.BPE(
        vocab, [tuple(m) for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())


def spaces(*steps):
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def metaspace(scheme: str, split: bool):
    return pre_tokenizers.Metaspace("▁", scheme, split)


def with_literals(spec: dict) -> dict:
    """Qwen's way: some added tokens are not special, so they are read out of any text."""
    extra = ["<tool>", "</tool>", "<tool>x"]
    spec["added_tokens"] += [
        {"id": i, "content": text, "special": False, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in enumerate(extra, start=len(spec["model"]["vocab"]))
    ]  # fmt: skip
    return spec


FAMILIES = {
    "gpt2": lambda: byte_level(use_regex=True),
    "llama3": lambda: byte_level(split(data.LLAMA3_PATTERN), ignore_merges=True),
    "qwen": lambda: with_literals(
        byte_level(split(QWEN_PATTERN), normalizer=normalizers.NFC(), ignore_merges=False)
    ),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=False), use_regex=True),
    "digits-last": lambda: byte_level(split(r"[A-Z]"), pre_tokenizers.Digits(True), use_regex=True),
    "two-splits": lambda: byte_level(split(r"\p{N}{1,3}"), split(r"[一-龥]+"), split(r"[A-Z]")),
    "llama2": lambda: sentencepiece(spaces(normalizers.Prepend("▁")), None, True),
    "llama2-trained": lambda: sentencepiece(spaces(normalizers.Prepend("▁")), None, False),
    "no-prefix": lambda: sentencepiece(spaces(), None, True),
    "mistral": lambda: sentencepiece(None, metaspace("first", False), True),
    "zephyr": lambda: sentencepiece(None, metaspace("always", False), True),
    "words": lambda: sentencepiece(None, metaspace("always", True), False),
}


def write_tokenizer(folder: Path, spec: dict, **config) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp(request.param), FAMILIES[request.param]())


def same_text(texts: list[str]) -> list[str]:
    """Without those that the oracle normalises by older tables of combining marks than Python's."""
    nfc = normalizers.NFC()
    same = [t for t in texts if nfc.normalize_str(t) == unicodedata.normalize("NFC", t)]
    assert len(same) > 0.999 * len(texts)
    return same


def oracle_ids(theirs, texts: list[str]) -> list[list[int]]:
    return theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids


def test_ids_and_texts_equal_transformers_on_20000_strings(family):
    ours, theirs = load_tokenizer(family), transformers.AutoTokenizer.from_pretrained(family)
    texts = same_text(strings(20_020))
    assert len(texts) >= 20_000
    expected = oracle_ids(theirs, texts)
    for text, ids in zip(texts, expected):
        assert ours.encode(text) == ids, ascii(text)
        if theirs.decode(ids) == text:
            assert ours.decode(ids) == text
    assert ours.prompt_ids("x") == theirs("x").input_ids
    assert ours.end_id == theirs.eos_token_id
    assert ours.bpe.encoding is not None  # all of this on tiktoken


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
@pytest.mark.parametrize("rules", [{"legacy": True}, {}, {"add_prefix_space": False}])
def test_the_prefix_rules_of_the_llama_class(model_type, rules, tmp_path):
    """transformers 5 takes a LlamaTokenizer's rules from its class and `legacy`, not the file."""
    folder = write_tokenizer(tmp_path, FAMILIES["llama2"](), bos_token="<s>",
                             tokenizer_class="LlamaTokenizer", **rules)  # fmt: skip
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = strings(1000, seed=4)
    assert [ours.encode(text) for text in texts] == oracle_ids(theirs, texts)
    assert ours.prompt_ids("x") == theirs("x").input_ids
    for text in ("a", "  a", " "):
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids[1:])


def test_random_unicode(family):
    ours, theirs = load_tokenizer(family), transformers.AutoTokenizer.from_pretrained(family)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
    def same(text):
        hypothesis.assume(
            normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text)
        )
        assert [ours.encode(text)] == oracle_ids(theirs, [text])

    same()


def test_long_texts_and_ids_beyond_the_vocabulary(family):
    """Longer than tiktoken's regular expressions bear, and the oracle's merges of every piece."""
    ours, theirs = load_tokenizer(family), transformers.AutoTokenizer.from_pretrained(family)
    long = [" " * 1_000_000, "a" * 60_000, " \n" * 40_000, "".join(strings(2000, seed=2))]
    assert all(len(text) > data.LONG_TEXT for text in long)
    assert [ours.encode(text) for text in long] == oracle_ids(theirs, long)
    slow = dataclasses.replace(ours, bpe=ours.bpe._replace(encoding=None))
    for text in strings(500, seed=3):
        assert slow.encode(text) == ours.encode(text)
    assert ours.decode([*ours.encode("hi"), 10**6]) == "hi"


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data(), st.booleans(), st.booleans())
def test_merges_in_any_order_equal_the_library(draw, whole, shuffled):
    """Vocabularies that no training makes: several pairs for a token, pairs ranked before the pairs
    that form their parts, tokens that nothing forms. tiktoken alone gets many of them wrong."""
    vocab = {char: i for i, char in enumerate(data.BYTE_OF_CHAR)}
    merges = []
    for _ in range(draw.draw(st.integers(0, 12))):
        tokens = [t for t in vocab if set(t) <= set("abc")]
        pair = draw.draw(st.sampled_from(tokens)), draw.draw(st.sampled_from(tokens))
        if pair not in merges:
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    for token in draw.draw(st.lists(st.text("abc", min_size=2, max_size=5), max_size=3)):
        vocab.setdefault(token, len(vocab))
    if shuffled:
        merges = draw.draw(st.permutations(merges))
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    ours = byte_pairs(vocab, merges, whole, True, r"[\s\S]+")
    hypothesis.event("tiktoken" if ours.encoding else "merge")
    for text in draw.draw(st.lists(st.text("abc", max_size=12), min_size=5, max_size=5)):
        assert ours.encode(text) == theirs.encode(text).ids
        assert list(ours.merged(text)) == theirs.encode(text).ids if text else True


def test_merge_joins_the_leftmost_of_the_best_ranked():
    ranks = {("a", "b"): 0, ("b", "c"): 1, ("a", "bc"): 2, ("a", "a"): 3}
    assert merge("abc", ranks) == (["ab", "c"], 0)
    assert merge("bcabc", ranks) == (["bc", "ab", "c"], 1)
    assert merge("aaaaa", ranks) == (["aa", "aa", "a"], 3)
    assert merge("", ranks) == ([], -1)
    vocab = {char: i for i, char in enumerate(data.BYTE_OF_CHAR)} | {"bc": 300, "abc": 301}
    # tiktoken alone would join a and bc, whatever the rank of the pair that the file lists.
    assert byte_pairs(vocab, [("b", "c")], False, True, r"[\s\S]+").encode("abc") == [
        vocab["a"], 300,
    ]  # fmt: skip
