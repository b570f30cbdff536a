"""Task, tokenizers, pairs and packed rows; transformers and tiktoken are the oracles."""

import base64
import json

import numpy as np
import pytest
import tiktoken
import torch
from conftest import PAIR_ROWS, SHARED, needs_shared, tiny_model, write_rows
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import data
from data import (
    Pair,
    Pairs,
    byte_tokenizer,
    epoch_order,
    is_correct,
    load_pairs,
    load_tokenizer,
    make_batches,
    make_pair,
    pack,
    problems,
    row_length,
    row_masks,
    sees,
    solution,
    split_pairs,
)
from eval import answer_states
from mio import naive_logps

# --- The task -------------------------------------------------------------------------------------


def test_solution_is_worked_out_and_verified():
    assert solution("7+9-3+5\n") == "7+9=16\n16-3=13\n13+5=18\n#### 18"
    assert solution("0-9-9+1\n") == "0-9=-9\n-9-9=-18\n-18+1=-17\n#### -17"
    for problem in problems("train", 200, seed=0):
        answer = solution(problem)
        assert answer.endswith(f"\n#### {eval(problem)}")
        assert is_correct(problem, answer)
        assert not is_correct(problem, answer + "0")
        assert not is_correct(problem, answer + "\n")
        assert not is_correct(problem, answer.replace("#### ", ""))


def test_splits_are_disjoint_whatever_the_seed_and_reproducible():
    splits = [
        set(problems(s, 900, seed)) for s in ("train", "validation", "test") for seed in (0, 1)
    ]
    assert all(len(split) == 900 for split in splits)
    for i, left in enumerate(splits):
        for j, right in enumerate(splits):
            if i // 2 != j // 2:
                assert not left & right
    assert problems("test", 50, 3) == problems("test", 50, 3) != problems("test", 50, 4)


# --- Tokenizers -----------------------------------------------------------------------------------

TEXTS = [
    "",
    "Hello, world! It's 12345 apples; they'll cost $6.50.\n\n  indented\ttab  \n",
    "naïve café — ½ × 3 ≠ 2 … “quotes” 你好，世界 Привет мир مرحبا हिन्दी 🙂👩‍👩‍👧",
    "<|begin_of_text|> <|end|> <|begin|> in plain text",
    "\x00\x01 control \r\n\r\n runs     of spaces",
]


def test_byte_tokenizer_reads_no_special_token_out_of_text():
    tokenizer = byte_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.end_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.stop_ids == {257}
    assert tokenizer.decode([104, 300, 105]) == "hi"  # an id of a padded vocabulary


def test_saved_tokenizer_is_the_same_to_us_and_to_transformers(checkpoint):
    transformers = pytest.importorskip("transformers")
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(checkpoint),
        load_tokenizer(checkpoint),
    )
    for text in TEXTS[:3]:
        assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]
        assert theirs.encode(text, add_special_tokens=False) == byte_tokenizer().encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.end_id)


@pytest.fixture(scope="module")
def trained_bpe(tmp_path_factory):
    """A byte-level BPE trained here by the tokenizers library, in Llama 3's shape."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(data.LLAMA3_PATTERN), behavior="isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = [row[key] for row in PAIR_ROWS for key in row] + TEXTS
    tokenizer.train_from_iterator(lines, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_byte_level_bpe_gives_transformers_ids(trained_bpe):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(trained_bpe)
    theirs = transformers.AutoTokenizer.from_pretrained(trained_bpe)
    for text in TEXTS[:3] + TEXTS[4:] + [row["rejected"] for row in PAIR_ROWS]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.bos_id is None  # nothing in the file puts one there
    assert ours.end_id == theirs.eos_token_id


def test_text_between_the_matches_of_a_pattern_is_kept(checkpoint):
    transformers = pytest.importorskip("transformers")
    spec = json.loads((checkpoint / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "[0-9]"},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    (checkpoint / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": steps}))
    ours, theirs = (
        load_tokenizer(checkpoint),
        transformers.AutoTokenizer.from_pretrained(checkpoint),
    )
    text = "abc 12 def\n"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


def rank_lines(extra=()):
    tokens = [bytes([byte]) for byte in range(256)] + [b"an", b" an", b"and", b" and", *extra]
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def test_rank_file_equals_tiktoken_with_the_published_pattern(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(rank_lines()) + b"\n")
    ours = load_tokenizer(file)
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in rank_lines())}
    published = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding("x", pat_str=published, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, "an answer and another and\n\n and"]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.end_id, ours.vocab_size) == (260, 261, 260 + 256)
    assert ours.decode([260 + 9]) == "<|eot_id|>"


@needs_shared
def test_real_tokenizers_give_the_oracles_ids_on_real_text():
    transformers = pytest.importorskip("transformers")
    folder, file = SHARED / "models/gsm-llama", SHARED / "data/llama3-tokenizer.model"
    texts = []
    for name in ("gsm8k-pairs", "gsm8k-test"):
        lines = (SHARED / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [text for line in lines for text in json.loads(line).values()]
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text) for text in texts] == theirs(
        texts, add_special_tokens=False
    ).input_ids
    assert (ours.bos_id, ours.end_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ranks = {
        base64.b64decode(a): int(b) for a, b in map(bytes.split, file.read_bytes().splitlines())
    }
    llama3 = tiktoken.Encoding(
        "x", pat_str=data.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    ours = load_tokenizer(file)
    assert [ours.encode(text) for text in texts] == [llama3.encode_ordinary(t) for t in texts]
    assert (ours.bos_id, ours.end_id, ours.vocab_size) == (128000, 128001, 128256)


def test_tokenizers_that_would_be_read_wrongly_are_refused(tmp_path, checkpoint):
    spec = json.loads((checkpoint / "tokenizer.json").read_text())

    def refused(change, match):
        (checkpoint / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(ValueError, match=match) as error:
            load_tokenizer(checkpoint)
        assert "tokenizer.json" in str(error.value)

    refused({"model": {"type": "Unigram"}}, "its model is Unigram; only BPE")
    refused({"model": {"type": "WordPiece"}}, "its model is WordPiece; only BPE")
    refused({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase")
    refused({"pre_tokenizer": {"type": "Whitespace"}}, "neither ByteLevel nor byte_fallback")
    level, split = spec["pre_tokenizer"], {"type": "Split", "pattern": {"Regex": "a"}}
    for step, match in (
        ({"type": "Punctuation"}, "pre-tokenizer Punctuation"),
        (split | {"behavior": "Removed", "invert": False}, "Split Removed"),
        *(
            (split | {"behavior": "Isolated", "pattern": {"Regex": pattern}}, match)
            for pattern, match in {
                "(": "fails",
                r"\p{Foo}": "fails",
                "x*": "not supported",
                "a.b": "not supported",
                r"\p{N}{1,3}+": "not supported",
                r"(a)\1": "not supported",
                "^a": "not supported",
                "[[:punct:]]": "not supported",
            }.items()
        ),
        (split | {"behavior": "Isolated", "invert": True}, "Split Isolated"),
    ):
        steps = {"type": "Sequence", "pretokenizers": [step, level]}
        refused({"pre_tokenizer": steps}, match)
    refused({"pre_tokenizer": level | {"add_prefix_space": True}}, "without a prefix space")
    refused({"model": spec["model"] | {"merges": ["a b"]}}, "merge of 'a' and 'b'")
    refused({"model": spec["model"] | {"vocab": {"a": 0}}}, "byte 0 has no token")
    refused({"model": spec["model"] | {"merges": [5]}}, "not laid out as a tokenizer.json")
    refused({"model": spec["model"] | {"dropout": 0.5}}, "dropout")
    refused({"post_processor": {"type": "TemplateProcessing", "single": []}}, "not laid out")
    begin, end = spec["added_tokens"]
    refused({"added_tokens": [begin | {"id": 65}, end]}, "ids of tokens")
    refused({"added_tokens": [begin | {"id": "a"}, end]}, "ids of tokens")
    refused({"added_tokens": [begin | {"single_word": True}, end]}, "single_word")
    byte_tokens = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = spec["model"] | {"byte_fallback": True, "vocab": byte_tokens}
    piecewise = {"model": model, "pre_tokenizer": None}
    refused(piecewise, "does not write a space as '▁'")
    refused(piecewise | {"model": model | {"vocab": {"<0x00>": 0}}}, "byte 1 has no token")
    refused(piecewise | {"pre_tokenizer": {"type": "Whitespace"}}, "one Metaspace")
    (checkpoint / "tokenizer.json").write_text(json.dumps(spec))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [257, "x"]}')
    with pytest.raises(ValueError, match="eos_token_id"):
        load_tokenizer(checkpoint)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [257, 9]}')
    assert load_tokenizer(checkpoint).stop_ids == {257, 9}
    for name, content, match in [
        ("tokenizer.model", b"", "byte 0 is not a token"),
        ("tokenizer.model", b"\n".join(rank_lines()[1:]), "expected rank 0"),
        ("tokenizer.model", b"\x0a\x09<unk> sentencepiece", "AutoTokenizer"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[]", "JSON object"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load_tokenizer(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        load_tokenizer(tmp_path / "nothing-here")


# --- Pairs ----------------------------------------------------------------------------------------


def test_a_pair_has_one_bos_and_one_end_and_segments_encoded_alone(trained_bpe):
    for tokenizer in (byte_tokenizer(), load_tokenizer(trained_bpe)):
        pair = make_pair(tokenizer, "It is <|end|> 2", "2, sure", "22")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert pair.prompt == bos + tokenizer.encode("It is <|end|> 2")
        assert pair.chosen == tokenizer.encode("2, sure") + [tokenizer.end_id]
        assert pair.rejected == tokenizer.encode("22") + [tokenizer.end_id]
        assert sum(pair, []).count(tokenizer.end_id) == 2


def test_truncation_keeps_answers_bos_and_the_newest_of_the_prompt(tmp_path, capsys):
    row = {"prompt": "abcdefgh", "chosen": "XYZ", "rejected": "no"}
    file = write_rows(tmp_path / "pairs.jsonl", [row, row | {"prompt": "h"}])
    long, short = load_pairs(file, byte_tokenizer(), max_length=8)
    assert long.prompt == [256, *b"fgh"] and short.prompt == [256, *b"h"]
    assert long.chosen == [*b"XYZ", 257] and long.rejected == [*b"no", 257]
    assert "1 of 2 rows cut, the prompt lost its oldest" in capsys.readouterr().err
    assert load_pairs(file, byte_tokenizer(), max_length=13)[0].prompt == [256, *b"abcdefgh"]
    assert load_pairs(file, byte_tokenizer(), max_length=6)[0].prompt == [256, *b"h"]
    capsys.readouterr()
    (left,) = load_pairs(write_rows(file, [row, {**row, "chosen": "X"}]), byte_tokenizer(), 5)
    assert left.chosen == [*b"X", 257] and left.prompt == [256, *b"h"]
    err = capsys.readouterr().err
    assert "1 of 2 rows dropped, the longer answer leaves no room" in err and "line 1" in err
    with pytest.raises(ValueError, match=r"pairs.jsonl: no rows to train on: 2 of 2 .*max_length"):
        load_pairs(file, byte_tokenizer(), max_length=2)


GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "no rows"),
        ("\n \n", "no rows"),
        (GOOD + "{", ":2: row: not valid JSON"),
        (GOOD + "\n[1]\n", ":3: row: expected a JSON object"),
        ("[" * 100_000, ":1: row: not valid JSON"),
        ('{"prompt": "p", "chosen": "c"}', ":1: its columns are prompt, chosen; rows are"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', ":1: 'prompt' must be a string, not int"),
        ('{"prompt": "p", "chosen": " ", "rejected": "r"}', "chosen answer is empty: line 1"),
        ('\n{"prompt": "p", "chosen": "c", "rejected": ""}', "rejected answer is empty: line 2"),
        ('{"prompt": "p", "chosen": "c", "rejected": "c"}', "are identical: line 1"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "c"}', ":1: .*surrogates"),
        (GOOD.encode() + b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}', ":2: .*utf-8"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, content, match):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="bad.jsonl.*" + match) as error:
        load_pairs(file, byte_tokenizer())
    assert "\n" not in str(error.value)


def test_missing_file_and_empty_prompt_without_bos(tmp_path, trained_bpe):
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        load_pairs(tmp_path / "gone.jsonl", byte_tokenizer())
    file = write_rows(tmp_path / "x.jsonl", [{"prompt": "", "chosen": "c", "rejected": "r"}])
    assert load_pairs(file, byte_tokenizer())[0].prompt == [256]
    with pytest.raises(ValueError, match="prompt is empty"):
        load_pairs(file, load_tokenizer(trained_bpe))


def test_held_out_split_keeps_prompts_together_and_loses_nothing():
    pairs = Pairs(Pair([256, i // 3], [i, 257], [i + 1, 257]) for i in range(100))
    train, held_out = map(list, split_pairs(pairs, 0.1, seed=0))
    assert sorted(train + held_out) == sorted(pairs)
    assert len(held_out) in (9, 10)
    assert not {tuple(p.prompt) for p in train} & {tuple(p.prompt) for p in held_out}
    assert list(split_pairs(pairs, 0.1, seed=0)[1]) == held_out
    assert list(split_pairs(pairs, 0.1, seed=1)[1]) != held_out
    assert [list(part) for part in split_pairs(pairs, 0.0, seed=0)] == [list(pairs), []]
    mostly_one = Pairs([Pair([256], [i], [i, 1]) for i in range(99)] + [Pair([1], [2], [3])])
    assert [len(part) for part in split_pairs(mostly_one, 0.1, seed=0)] == [99, 1]
    for few in (pairs.take([0]), pairs.take([0, 1, 2])):
        with pytest.raises(ValueError, match="1 different prompts are too few"):
            split_pairs(few, 0.1, seed=0)


# --- Packed rows ----------------------------------------------------------------------------------


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    random = np.random.default_rng(seed)

    def ids(low, high):
        return random.integers(0, 256, size=random.integers(low, high)).tolist()

    return [
        Pair([256, *ids(0, 9)], [*ids(0, 7), 257], [*ids(0, 12), 257] if i % 5 else [])
        for i in range(count)
    ]


def test_pack_fills_rows_and_loses_nothing():
    sizes = [5, 3, 8, 2, 2, 7, 1, 8]
    rows = pack(sizes, 10)
    assert sorted(item for row in rows for item in row) == list(range(8))
    assert all(sum(sizes[item] for item in row) <= 10 for row in rows)
    assert len(rows) == 4
    assert pack([3, 11, 7], 10) == [[1], [2, 0]]  # too long to share a row: alone in one


def test_batches_hold_at_most_micro_tokens_or_one_row_and_pad_to_them():
    pairs = random_pairs(20)
    sizes = [row_length(pair) for pair in pairs]
    for micro_tokens in (1, 30, 60, 10_000):
        batches = make_batches(pairs, list(range(20)), 25, micro_tokens)
        assert sorted(i for batch in batches for i in batch.index) == list(range(20))
        for batch in batches:
            assert sum(batch.rows) == batch.tokens.shape[1] == sum(sizes[i] for i in batch.index)
            assert sum(batch.rows) <= micro_tokens or len(batch.rows) == 1
        padded = make_batches(pairs, list(range(20)), 25, micro_tokens, pad=True)
        for plain, batch in zip(batches, padded):
            T = sum(plain.rows)
            assert batch.tokens.shape == (1, max(T, micro_tokens))
            assert (batch.pair[T:] == -1).all() and torch.equal(batch.pair[:T], plain.pair)
            assert torch.equal(batch.source, plain.source)


def test_a_packed_row_token_by_token():
    pairs = [Pair([256, 1, 2], [3, 4, 257], [5, 257]), Pair([256], [6, 257], [257])]
    (batch,) = make_batches(pairs, [0, 1], row_tokens=8, micro_tokens=8)
    assert batch.rows == [8]
    assert batch.tokens.tolist() == [[256, 1, 2, 3, 4, 5, 256, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert batch.segment.tolist() == [0, 0, 0, 1, 1, 2, 0, 1]
    assert batch.pair.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.source.tolist() == [2, 3, 4, 2, 5, 6, 7, 6]
    assert batch.targets.tolist() == [3, 4, 257, 5, 257, 6, 257, 257]
    assert batch.lengths.tolist() == [3, 2, 2, 1]
    (mask,) = row_masks(batch)
    seen = [[c for c in range(8) if row[c]] for row in mask[0, 0]]
    assert seen[3] == [0, 1, 2, 3] and seen[4] == [0, 1, 2, 3, 4]
    assert seen[5] == [0, 1, 2, 5]  # the rejected answer sees the prompt, not the chosen one
    assert seen[6] == [6] and seen[7] == [6, 7]  # the second pair sees nothing of the first
    (mask,) = row_masks(batch, window=2)
    seen = [[c for c in range(8) if row[c]] for row in mask[0, 0]]
    assert seen[2] == [1, 2] and seen[4] == [3, 4] and seen[7] == [6, 7]
    assert seen[5] == [2, 5]  # in positions: the rejected answer stands next to the prompt


@pytest.mark.parametrize("window", [None, 5])
def test_the_rule_is_the_same_for_rows_and_for_flex_attention(window):
    """FlexAttention takes the rule over a whole batch, padding included; rows take it apart."""
    pairs = random_pairs(12)
    (batch,) = make_batches(pairs, list(range(12)), 25, 300, pad=True)
    (plain,) = make_batches(pairs, list(range(12)), 25, 300)
    T, used = 300, sum(plain.rows)
    whole = create_mask(sees(batch, window), None, None, T, T, device="cpu")[0, 0]
    rows = torch.block_diag(*(mask[0, 0] for mask in row_masks(plain, window)))
    assert len(plain.rows) > 3 and torch.equal(whole[:used, :used], rows.bool())
    assert not whole[:used, used:].any() and not whole[used:, :used].any()
    model = tiny_model(sliding_window=window, initializer_range=0.15)
    blocks = create_block_mask(sees(batch, window), None, None, T, T, device="cpu")
    with torch.no_grad():
        flex = model(batch.tokens, batch.positions, blocks)[0, batch.source]
        dense = model(batch.tokens, batch.positions, whole[None, None])[0, batch.source]
        in_rows = model(plain.tokens, plain.positions, row_masks(plain, window))[0, plain.source]
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_rows, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_shared_prompts_equal_one_sequence_at_a_time(dtype, bound):
    """Log-probs and gradients of every parameter, against unpacked rows without any mask."""
    model = tiny_model(num_hidden_layers=3, initializer_range=0.15).to(dtype)
    pairs = random_pairs(12)
    for micro_tokens in (40, 10_000):
        packed, index = [], []
        for batch in make_batches(pairs, list(range(12)), row_tokens=40, micro_tokens=micro_tokens):
            hidden = answer_states(model, batch)
            packed.append(naive_logps(hidden, model.head_weight, batch.targets, batch.lengths))
            index += batch.index
        packed = torch.cat(packed).view(-1, 2)
        alone = torch.stack([single_logp(model, pairs[i], side) for i in index for side in (1, 2)])
        alone = alone.view(-1, 2)
        assert sorted(index) == list(range(12))
        assert (packed - alone).abs().max() <= bound * alone.abs().max()
        weights = torch.linspace(-1, 1, 24, dtype=dtype).view(-1, 2)
        for name, parameter in model.named_parameters():
            a, b = (
                torch.autograd.grad((weights * x).sum(), parameter, retain_graph=True)[0]
                for x in (packed, alone)
            )
            assert (a - b).norm() <= bound * b.norm(), name


def single_logp(model, pair: Pair, side: int) -> torch.Tensor:
    """The oracle of packing: one prompt, one answer, nothing else."""
    answer = pair[side]
    if not answer:
        return torch.zeros((), dtype=model.head_weight.dtype)
    ids = torch.tensor([[*pair.prompt, *answer]])
    logps = (model(ids[:, :-1])[0] @ model.head_weight.T).log_softmax(-1)  # (T - 1, V)
    scored = logps.gather(1, ids[0, 1:, None])[:, 0]
    return scored[len(pair.prompt) - 1 :].sum()


def test_row_length_is_what_is_laid_out():
    pairs = random_pairs(10)
    for pair in pairs:
        (batch,) = make_batches([pair], [0], row_tokens=64, micro_tokens=64)
        assert batch.tokens.shape == (1, row_length(pair))


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(50, 1, 2).tolist()
    assert sorted(order) == list(range(50)) and order == epoch_order(50, 1, 2).tolist()
    assert order != epoch_order(50, 1, 3).tolist() and order != epoch_order(50, 2, 2).tolist()
