"""Pairs of token ids, their split and order, and packed batches against unpacked sequences."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import logp_alone, tiny_model, write_rows
from torch.nn.attention.flex_attention import create_mask

import data
from data import (
    Pair,
    Pairs,
    answer_states,
    attention_rule,
    encode_example,
    epoch_order,
    load_pairs,
    make_batches,
    pack,
    read_pairs,
    row_length,
    row_masks,
    split_pairs,
    truncate,
)
from mio import naive_logps
from support.rows import Example, UnusableError
from support.tokenizers import byte_tokenizer

WITHOUT_BOS = dataclasses.replace(byte_tokenizer(), bos_id=None)


def example(prompt, chosen, rejected, **changes) -> Example:
    return Example("", prompt, chosen, rejected, **changes)


# --- Pairs ----------------------------------------------------------------------------------------


def test_pairs_behave_as_a_list_of_pairs():
    rows = [Pair([256, i], [i] * (i % 3), [7] * (i % 4)) for i in range(10)]
    pairs = Pairs(rows)
    assert len(pairs) == 10 and list(pairs) == rows and pairs[-1] == rows[-1]
    assert list(pairs[2:9:3]) == rows[2:9:3]
    assert pairs.lengths().tolist() == [[2, i % 3, i % 4] for i in range(10)]
    with pytest.raises(IndexError):
        pairs[10]


def test_pairs_keep_their_lines_when_they_are_taken_sliced_or_split(tmp_path):
    pairs = Pairs()
    for i in range(12):
        pairs.append(Pair([256, i], [i], [257]), line=2 * i + 5)
    assert list(pairs.take([3, 0]).lines) == [11, 5]
    assert list(pairs[4:6].lines) == [13, 15]
    for part in split_pairs(pairs, 0.25, seed=0):
        assert [2 * pair.prompt[1] + 5 for pair in part] == list(part.lines)
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    file = write_rows(tmp_path / "pairs.jsonl", [row, row | {"chosen": "r"}, row])
    assert list(load_pairs(file, byte_tokenizer()).lines) == [1, 3]  # line 2 is dropped


def test_a_pair_has_one_bos_token_and_one_end_token_an_answer():
    for tokenizer, bos in ((byte_tokenizer(), [256]), (WITHOUT_BOS, [])):
        pair = encode_example(example("It is <|end|> 2", "2, sure", "22"), tokenizer)
        assert pair.prompt == [*bos, *b"It is <|end|> 2"]
        assert pair.chosen == [*b"2, sure", 257] and pair.rejected == [*b"22", 257]


def test_a_missing_answer_is_an_empty_list():
    tokenizer = dataclasses.replace(
        byte_tokenizer(),
        template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    prompt, answer = [{"role": "user", "content": "p"}], {"role": "assistant", "content": "a"}
    for question, text, ids in (("p", "a", [256, *b"p"]), (prompt, answer, [*b"p", 257])):
        end = [*b"a", 257]
        assert encode_example(example(question, text, None), tokenizer) == (ids, end, [])
        assert encode_example(example(question, None, text), tokenizer) == (ids, [], end)


def test_answers_of_a_transcript_go_on_within_its_text():
    class Recorder:
        end_id, prompt_ids = 0, staticmethod(lambda text: ["prompt", text])
        encode = staticmethod(lambda text: ["encode", text])
        continue_ids = staticmethod(lambda text: ["continue", text])

    assert encode_example(example("p", "a", "b"), Recorder).chosen == ["encode", "a", 0]
    pair = encode_example(example("p", "a", "b", continues=True), Recorder)
    assert pair == (["prompt", "p"], ["continue", "a", 0], ["continue", "b", 0])


# --- Truncation -----------------------------------------------------------------------------------


def test_truncation_keeps_answers_and_the_bos_token_and_the_newest_tokens_of_the_prompt():
    pair = Pair([256, 1, 2, 3, 4], [5, 6, 257], [7, 257])
    assert truncate(pair, 8, 256) is pair
    assert truncate(pair, 7, 256) == ([256, 2, 3, 4], *pair[1:])
    assert truncate(pair, 5, 256) == ([256, 4], *pair[1:])
    with pytest.raises(UnusableError, match="longer answer leaves no room.*raise --max_length"):
        truncate(pair, 4, 256)  # only the BOS token would be left
    assert truncate(pair, 5, None) == ([3, 4], *pair[1:])
    assert truncate(pair, 4, None) == ([4], *pair[1:])
    assert truncate(Pair(pair.prompt, [5], [6, 7, 257]), 7, 256).prompt == [256, 2, 3, 4]
    with pytest.raises(UnusableError):
        truncate(pair, 3, None)


def test_truncated_and_dropped_rows_are_reported_by_line(tmp_path, capsys):
    row = {"prompt": "abcdefgh", "chosen": "XYZ", "rejected": "no"}
    file = write_rows(tmp_path / "pairs.jsonl", [row, row | {"prompt": "h"}])
    long, short = load_pairs(file, byte_tokenizer(), max_length=8)
    assert long.prompt == [256, *b"fgh"] and short.prompt == [256, *b"h"]
    assert long.chosen == [*b"XYZ", 257] and long.rejected == [*b"no", 257]
    assert "1 of 2 rows cut: the prompt lost its oldest" in capsys.readouterr().err
    assert read_pairs(file, byte_tokenizer(), 8)[1].truncated == [1]
    assert load_pairs(file, byte_tokenizer(), max_length=13)[0].prompt == [256, *b"abcdefgh"]
    assert capsys.readouterr().err == ""
    file = write_rows(file, [row, {**row, "chosen": "X"}])
    assert list(load_pairs(file, byte_tokenizer(), 5)) == [
        ([256, *b"h"], [*b"X", 257], [*b"no", 257])
    ]
    error = capsys.readouterr().err
    assert "1 of 2 rows dropped because the longer answer leaves no" in error and "line 1" in error
    with pytest.raises(ValueError, match=r"pairs.jsonl: no rows to train on: 2 of 2 .*max_length"):
        load_pairs(file, byte_tokenizer(), max_length=2)


def test_a_bos_token_that_the_chat_template_writes_stays_too(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = dataclasses.replace(WITHOUT_BOS, template=template)
    messages = [{"role": "user", "content": "abcdef"}, {"role": "assistant", "content": "yes"}]
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": messages}])
    (pair,) = load_pairs(file, tokenizer, max_length=8)
    assert pair == ([256, *b"ef", 257], [*b"yes", 257], [])


# --- Reading --------------------------------------------------------------------------------------

GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows to train on: the file is empty; rows must be"),
        ("\n \n", "no rows to train on: the file is empty"),
        (GOOD + "{", ":2: not valid JSON"),
        (GOOD + "\n[1]\n", ":3: expected a JSON object"),
        ("[" * 100_000, ":1: not valid JSON"),
        ('{"prompt": "p", "chosen": "c"}', ":1: the row's columns are prompt, chosen; rows"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', ":1: 'prompt' must be a string, not int"),
        ('{"prompt": "p", "chosen": " ", "rejected": "r"}', "chosen answer is empty: line 1"),
        ('\n{"prompt": "p", "chosen": "c", "rejected": ""}', "rejected answer is empty: line 2"),
        ('{"prompt": "p", "chosen": "c", "rejected": "c"}', "are identical: line 1"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "c"}', ":1: .*surrogates"),
        (GOOD.encode() + b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}', ":2: .*utf-8"),
    ],
)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="bad.jsonl.*" + message) as error:
        load_pairs(file, byte_tokenizer())
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_prompt_without_a_bos_token_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        load_pairs(tmp_path / "gone.jsonl", byte_tokenizer())
    file = write_rows(tmp_path / "x.jsonl", [{"prompt": "", "chosen": "c", "rejected": "r"}])
    assert load_pairs(file, byte_tokenizer())[0].prompt == [256]
    with pytest.raises(ValueError, match="the prompt is empty, and this tokenizer has no BOS"):
        load_pairs(file, WITHOUT_BOS)


# --- Held-out split and order ---------------------------------------------------------------------


def test_the_held_out_split_keeps_prompts_together_and_loses_no_pair():
    pairs = Pairs(Pair([256, i // 3], [i, 257], [i + 1, 257]) for i in range(100))
    train, held_out = map(list, split_pairs(pairs, 0.1, seed=0))
    assert sorted(train + held_out) == sorted(pairs)
    assert train == sorted(train) and held_out == sorted(held_out)  # the order of the file
    assert len(held_out) in (9, 10)
    assert not {tuple(p.prompt) for p in train} & {tuple(p.prompt) for p in held_out}
    assert list(split_pairs(pairs, 0.1, seed=0)[1]) == held_out
    assert list(split_pairs(pairs, 0.1, seed=1)[1]) != held_out
    assert [list(part) for part in split_pairs(pairs, 0.0, seed=0)] == [list(pairs), []]


def test_a_split_that_leaves_a_side_empty_is_refused():
    mostly_one = Pairs([Pair([256], [i], [i, 1]) for i in range(99)] + [Pair([1], [2], [3])])
    assert [len(part) for part in split_pairs(mostly_one, 0.1, seed=0)] == [99, 1]
    for few in (mostly_one[:1], mostly_one[:3]):
        with pytest.raises(ValueError, match="1 different prompts are too few to hold out 10%"):
            split_pairs(few, 0.1, seed=0)


def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = {(s, e): epoch_order(50, s, e).tolist() for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert (
        len(set(map(tuple, orders.values()))) == 9
    )  # seed 1, epoch 0 differs from seed 0, epoch 1
    assert epoch_order(50, 1, 2).tolist() == orders[1, 2]


# --- Packed batches -------------------------------------------------------------------------------


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Short pairs; every fifth has no rejected answer."""
    random = np.random.default_rng(seed)

    def ids(low, high):
        return random.integers(0, 256, size=random.integers(low, high)).tolist()

    return [
        Pair([256, *ids(0, 9)], [*ids(0, 7), 257], [*ids(0, 12), 257] if i % 5 else [])
        for i in range(count)
    ]


def test_pack_fills_rows_and_loses_no_item():
    sizes = [5, 3, 8, 2, 2, 7, 1, 8]
    rows = pack(sizes, 10)
    assert sorted(item for row in rows for item in row) == list(range(8))
    assert all(sum(sizes[item] for item in row) <= 10 for row in rows)
    assert len(rows) == 4
    assert pack([3, 11, 7], 10) == [[1], [2, 0]]  # an item longer than a row has its own


def test_batches_hold_at_most_micro_tokens_or_one_row_and_are_padded_to_them():
    pairs = random_pairs(20)
    sizes = [row_length(pair) for pair in pairs]
    for micro_tokens in (1, 30, 60, 10_000):
        batches = make_batches(pairs, list(range(20)), 25, micro_tokens)
        assert sorted(i for batch in batches for i in batch.index) == list(range(20))
        for batch in batches:
            T = sum(batch.row_lengths)
            assert T == batch.tokens.shape[1] == sum(sizes[i] for i in batch.index)
            assert len(batch.row_lengths) == 1 or sum(batch.row_lengths) <= micro_tokens
        padded = make_batches(pairs, list(range(20)), 25, micro_tokens, pad=True)
        for plain, batch in zip(batches, padded, strict=True):
            T = sum(plain.row_lengths)
            assert batch.tokens.shape == (1, max(T, micro_tokens))
            assert (batch.pair[T:] == -1).all() and torch.equal(batch.pair[:T], plain.pair)
            assert torch.equal(batch.source, plain.source)


def visible(mask: torch.Tensor) -> list[list[int]]:
    """The tokens to which each token of a row attends, from a mask (1, 1, t, t)."""
    return [row.nonzero().flatten().tolist() for row in mask[0, 0]]


def test_a_packed_row_token_by_token():
    pairs = [Pair([256, 1, 2], [3, 4, 257], [5, 257]), Pair([256], [6, 257], [257])]
    (batch,) = make_batches(pairs, [0, 1], row_tokens=8, micro_tokens=8)
    assert batch.row_lengths == [8]
    assert batch.tokens.tolist() == [[256, 1, 2, 3, 4, 5, 256, 6]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert batch.segment.tolist() == [0, 0, 0, 1, 1, 2, 0, 1]
    assert batch.pair.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch.source.tolist() == [2, 3, 4, 2, 5, 6, 7, 6]
    assert batch.targets.tolist() == [3, 4, 257, 5, 257, 6, 257, 257]
    assert batch.lengths.tolist() == [3, 2, 2, 1]
    (mask,) = row_masks(batch)
    attends = visible(mask)
    assert attends[3] == [0, 1, 2, 3] and attends[4] == [0, 1, 2, 3, 4]
    assert attends[5] == [0, 1, 2, 5]  # the rejected answer: the prompt, but not the chosen answer
    assert attends[6] == [6] and attends[7] == [6, 7]  # the second pair: nothing of the first
    (mask,) = row_masks(batch, window=2)
    attends = visible(mask)
    assert attends[2] == [1, 2] and attends[4] == [3, 4] and attends[7] == [6, 7]
    assert attends[5] == [2, 5]  # by position the rejected answer stands next to the prompt


def test_a_pair_takes_the_tokens_of_its_row_length():
    for pair in random_pairs(10):
        (batch,) = make_batches([pair], [0], row_tokens=64, micro_tokens=64)
        assert batch.tokens.shape == (1, row_length(pair))


@pytest.mark.parametrize("window", [None, 5])
def test_rows_and_flex_attention_follow_one_rule(window, monkeypatch):
    """FlexAttention takes the rule over a whole padded batch; plain attention takes rows apart."""
    pairs = random_pairs(12)
    (padded,) = make_batches(pairs, list(range(12)), 25, 300, pad=True)
    (plain,) = make_batches(pairs, list(range(12)), 25, 300)
    T, used = 300, sum(plain.row_lengths)
    mask = create_mask(attention_rule(padded, window), None, None, T, T, device="cpu")[0, 0]
    rows = torch.block_diag(*(row[0, 0] for row in row_masks(plain, window)))
    assert len(plain.row_lengths) > 3 and torch.equal(mask[:used, :used], rows.bool())
    assert not mask[:used, used:].any() and not mask[used:, :used].any()
    model = tiny_model(sliding_window=window, initializer_range=0.15)
    with torch.no_grad():
        dense = model(padded.tokens, padded.positions, mask[None, None])[0, padded.source]
        by_rows = answer_states(model, plain)
        monkeypatch.setattr(data, "needs_fixed_length", lambda model: True)
        flex = answer_states(model, padded)
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_rows, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bound", "window"),
    [(torch.float32, 1e-5, None), (torch.float64, 1e-12, None), (torch.float64, 1e-12, 5)],
)
def test_packed_pairs_with_shared_prompts_equal_one_sequence_at_a_time(dtype, bound, window):
    """Compares log-probs and gradients of all parameters with unpacked sequences without a mask."""
    model = tiny_model(initializer_range=0.15, sliding_window=window).to(dtype)
    pairs = random_pairs(12)
    alone = torch.stack([logp_alone(model, pair, side) for pair in pairs for side in (1, 2)])
    alone = alone.view(-1, 2)
    weights = torch.linspace(-1, 1, 24, dtype=dtype).view(-1, 2)
    expected = torch.autograd.grad((weights * alone).sum(), model.parameters())
    for micro_tokens in (40, 10_000):
        packed, index = [], []
        for batch in make_batches(pairs, list(range(12)), row_tokens=40, micro_tokens=micro_tokens):
            hidden = answer_states(model, batch)
            packed.append(naive_logps(hidden, model.head_weight, batch.targets, batch.lengths))
            index += batch.index
        packed = torch.cat(packed).view(-1, 2)[np.argsort(index)]
        assert sorted(index) == list(range(12))
        assert (packed - alone).abs().max() <= bound * alone.abs().max()
        gradients = torch.autograd.grad((weights * packed).sum(), model.parameters())
        for a, b in zip(gradients, expected):
            assert (a - b).norm() <= bound * b.norm()


def test_padding_goes_to_a_multiple_so_that_few_lengths_occur():
    pairs = [Pair([1] * n, [2] * 3, [3] * 4) for n in (4, 40, 9)]
    batches = make_batches(pairs, [0, 1, 2], 16, 32, pad=True)
    assert sorted(batch.tokens.shape[1] for batch in batches) == [32, 64]
