"""The report on a data file: every figure of a small file, and one pair token by token."""

import pytest

import data
from data import Pair, Pairs
from support.files import write_rows
from support.report import describe_file, token_grid
from support.tokenizers import byte_tokenizer

PAIR = {"prompt": "ab\n", "chosen": "cde", "rejected": "fghi"}
GOOD = {"prompt": "p", "completion": "cc", "label": True}
BAD = {"prompt": "pq", "completion": "ddddddd", "label": False}


@pytest.fixture
def report_on(tmp_path):
    """Writes rows to a file and returns the lines of the report on it."""

    def report(rows, max_length=60):
        write_rows(tmp_path / "x.jsonl", rows)
        text = describe_file(tmp_path / "x.jsonl", byte_tokenizer(), max_length)
        return [line.rstrip() for line in text.splitlines()]

    return report


def test_a_report_counts_rows_repeats_lengths_and_shared_prompts(report_on):
    lines = report_on(
        [
            PAIR,
            PAIR,
            PAIR | {"chosen": "fghi"},  # is dropped
            PAIR | {"chosen": "x" * 99},  # leaves no room for the prompt
            PAIR | {"prompt": "x" * 70},  # is cut to a prompt of 55 tokens
            GOOD,
            BAD,
            PAIR | {"source": "here"},
            PAIR | {"rejected": "ihgf"},
            GOOD,
        ]
    )
    assert all(len(line) < 80 for line in lines)
    # Prompts have 4, 4, 55, 2, 3, 4, 4, 2 tokens, chosen answers 4, 4, 4, 3, 4, 4, 3 and rejected
    # answers 5, 5, 5, 8, 5, 5. A pair takes 4 + 3 + 4 tokens, and 7 + 8 without sharing its prompt.
    assert lines == [
        "10 rows, of which training uses 5 of prompt, chosen, rejected, 3 of unpaired",
        "columns not used: source",
        "1 of 10 rows dropped because chosen and rejected are identical: line 3",
        "1 of 10 rows dropped because the longer answer leaves no room for the prompt;",
        "  raise --max_length: line 4",
        "1 of 10 rows cut: the prompt lost its oldest tokens to --max_length: line 5",
        "8 pairs to train on, at most 60 tokens each",
        "3 of them repeat an earlier pair",
        "tokens         0 %    25 %    50 %    75 %    95 %   100 %",
        "prompt           2       3       4       4      37      55",
        "chosen           3       4       4       4       4       4",
        "rejected         5       5       5       5       7       8",
        "sharing prompts: 124 tokens to compute instead of 195 (-36%)",
        "",
        "line 1 (^ marks scored tokens):",
        "prompt       0 <|begin|> a b \\n",
        "chosen       4 c d e <|end|>",
        "               ^ ^ ^ ^^^^^^^",
        "rejected     4 f g h i <|end|>",
        "               ^ ^ ^ ^ ^^^^^^^",
    ]


def test_an_answer_that_no_row_has_gets_no_quantiles(report_on):
    lines = report_on([GOOD, GOOD | {"completion": "a b"}])
    assert lines[2] == "0 of them repeat an earlier pair"
    assert lines[5] == "chosen           3       3       4       4       4       4"
    assert lines[6] == "rejected"
    assert lines[7] == "sharing prompts: 9 tokens to compute instead of 9 (+0%)"
    assert lines[9:] == [
        "line 1 (^ marks scored tokens):",
        "prompt       0 <|begin|> p",
        "chosen       2 c c <|end|>",
        "               ^ ^ ^^^^^^^",
    ]


def test_a_grid_shows_the_ends_of_a_long_segment_and_the_positions_of_its_lines():
    prompt, rejected = list(b"x y" * 200), list(b"a\xff" * 48)
    grid = token_grid(Pairs([Pair(prompt, [1, 257], rejected)]), byte_tokenizer())
    assert all(len(line) < 80 for line in grid)
    # 32 tokens of one character fit a line; 3 of the prompt's 19 lines are shown from each end.
    starts = [0, 32, 64, None, 512, 544, 576]
    assert [line[:14] for line in grid[:7]] == [
        "prompt     ..." if start is None else f"prompt   {start:5}" for start in starts
    ]
    assert grid[0] == "prompt       0" + " x · y" * 10 + " x ·"
    assert grid[6] == "prompt     576" + " x · y" * 8
    assert grid[7:9] == ["chosen     600 \\x01 <|end|>", "               ^^^^ ^^^^^^^"]
    # Eight times "a" and a byte that is no text fit a line; none of the 6 + 6 lines is left out.
    assert grid[9::2] == [f"rejected   {600 + 16 * i}" + r" a \\xff" * 8 for i in range(6)]
    assert grid[10::2] == [" " * 14 + " ^ ^^^^^" * 8] * 6


def test_a_file_without_usable_rows_and_bad_input(tmp_path, capsys):
    file, folder = tmp_path / "x.jsonl", tmp_path / "tokenizer"
    folder.mkdir()
    byte_tokenizer().save(folder)
    write_rows(file, [PAIR | {"chosen": "fghi"}])
    data.main([str(file), "--tokenizer", str(folder)])
    assert capsys.readouterr().out.splitlines() == [
        "1 rows, of which training uses none",
        "1 of 1 rows dropped because chosen and rejected are identical: line 1",
        "0 pairs to train on, at most 1024 tokens each",
    ]
    for argv, fault in [
        (["gone.jsonl", "--tokenizer", str(folder)], "gone.jsonl: No such file"),
        ([str(file), "--tokenizer", "gone"], "gone: No such file"),
        ([str(file), "--tokenizer", str(folder), "--max_length", "1"], "--max_length 1: must"),
        ([str(file)], "--tokenizer"),
    ]:
        with pytest.raises(SystemExit) as stop:
            data.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and fault in error
