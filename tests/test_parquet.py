"""Parquet files give the same rows as JSONL, and the layouts of published data sets are read."""

import json
import sys

import pytest
from conftest import PAIR_ROWS, chat_tokenizer, write_rows

import data
import eval as evaluation
import train
from data import load_pairs, read_pairs
from support.files import read_rows
from support.questions import read_items
from support.rows import Example, data_rows, read_row
from support.tokenizers import byte_tokenizer

pa = pytest.importorskip("pyarrow", reason="writes the Parquet files")
from pyarrow import parquet  # noqa: E402

USER = {"role": "user", "content": "weather in Paris?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "Paris"}}}],
}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "1"}
OTHER = {"type": "function", "function": {"name": "w", "arguments": {"day": 3}}}
TEXT = {"role": "assistant", "content": "It rains."}
ANOTHER = {"role": "assistant", "content": "Dry."}
CHATS = [
    {"chosen": [USER, CALL, RESULT, TEXT], "rejected": [USER, CALL, RESULT, ANOTHER], "score": 1.0},
    {"chosen": [USER, CALL], "rejected": [USER, CALL | {"tool_calls": [OTHER]}], "score": 2.0},
    {"chosen": [USER, CALL], "rejected": [USER, TEXT]},
    {"chosen": [USER, TEXT], "rejected": [USER, TEXT]},
    {"chosen": [USER, TEXT], "rejected": [USER, {"role": "assistant", "content": " "}]},
]  # fmt: skip


def write_parquet(path, rows: list[dict], schema=None, **options):
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson(sort_keys=true) }}{% endif %}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)


@pytest.mark.parametrize("rows", [PAIR_ROWS + [PAIR_ROWS[0] | {"chosen": ""}], CHATS])
def test_parquet_and_jsonl_give_the_same_pairs_and_report(rows, tokenizer, tmp_path):
    """Arrow gives all messages the same keys and writes nulls for those that a message lacks, as
    does `Dataset.to_json` of the datasets library."""
    jsonl = write_rows(tmp_path / "x.jsonl", rows)
    file = write_parquet(tmp_path / "x.parquet", rows, row_group_size=3)
    nulls = write_rows(tmp_path / "nulls.jsonl", parquet.read_table(file).to_pylist())
    pairs, report = read_pairs(jsonl, tokenizer, 500)
    assert len(pairs) == report.rows - sum(map(len, report.dropped.values())) > 2
    unnamed = tmp_path / "without a suffix"
    unnamed.write_bytes(file.read_bytes())
    for other in (file, nulls, unnamed):
        found, found_report = read_pairs(other, tokenizer, 500)
        assert list(found) == list(pairs) and list(found.lines) == list(pairs.lines)
        assert found_report == report and found_report.lines() == report.lines()


def test_rows_are_numbered_from_1_over_all_row_groups(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "c", "rejected": "r"} for i in range(2500)]
    rows[2100]["chosen"] = "r"
    file = write_parquet(tmp_path / "x.parquet", rows, row_group_size=700)
    pairs, report = read_pairs(file, byte_tokenizer(), 99)
    assert report.dropped == {"chosen and rejected are identical": [2101]}
    assert [bytes(p.prompt[1:]) for p in pairs] == [b"%d" % (n - 1) for n in pairs.lines]
    write_parquet(file, [{"prompt": "p", "chosen": "c", "rejected": n} for n in (1, 2)])
    with pytest.raises(ValueError, match=r"x\.parquet:1: 'rejected' must be a string, not int"):
        load_pairs(file, byte_tokenizer())


def test_keys_that_a_row_lacks_are_not_null_at_any_depth(tmp_path):
    """Arrow gives all tools the same keys, but a tool's schema has only its own."""
    tools = [[{"name": "a", "parameters": {"x": {"type": "int"}}}, {"name": "b"}], [{"name": "c"}]]
    rows = [{"prompt": "p", "tools": tools[0]}, {"tools": tools[1]}]
    file = write_parquet(tmp_path / "x.parquet", rows)
    assert list(read_rows(file)) == [(1, rows[0]), (2, {"prompt": None} | rows[1])]


def damage(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 3
    return {
        "empty": b"",
        "cut": content[:-9],
        "text": b'{"prompt": "p"}\n',
        "page": content[:middle] + bytes(40) + content[middle + 40 :],
    }


@pytest.mark.parametrize("kind", damage(b""))
def test_a_damaged_file_is_refused_in_one_line(kind, tmp_path, capsys):
    file = write_parquet(tmp_path / "x.parquet", PAIR_ROWS * 30, use_dictionary=False)
    file.write_bytes(damage(file.read_bytes())[kind])
    byte_tokenizer().save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main([str(file), "--tokenizer", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith(f"data.py: error: {file}: broken Parquet file; write it again (")


def test_without_pyarrow_the_message_names_the_remedy(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "x.parquet", PAIR_ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x\.parquet: Parquet needs pyarrow; pip install pyarrow"):
        load_pairs(file, byte_tokenizer())


def test_the_three_commands_read_parquet(checkpoint, tmp_path, capsys):
    renamed = [{"prompt": row["prompt"], "good": row["chosen"], "bad": row["rejected"]}
               for row in PAIR_ROWS]  # fmt: skip
    file = write_parquet(tmp_path / "x.parquet", renamed)
    columns = ["--columns", "chosen=good,rejected=bad"]
    flags = ["--init", str(checkpoint), "--data", str(file), *columns, "--save_every", "1"]
    run = train.main([*flags, "--out", str(tmp_path / "run"), "--device", "cpu"])
    config = json.loads((run / "train_config.json").read_text())
    assert config["columns"] == columns[1]
    held_out = evaluation.main([str(run)])[str(run)]
    everything = evaluation.main([str(run), "--data", str(file), *columns])[str(run)]
    assert held_out["chosen"] != everything["chosen"] < 0
    data.main([str(file), "--tokenizer", str(checkpoint), *columns])
    assert f"{len(PAIR_ROWS)} rows, of which training uses" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluation.main([str(run), "--data", str(file)])
    assert "the row's columns are prompt, good, bad; " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(run), "--columns", "chosen=bad,rejected=good"])
    assert "--columns: the resumed run uses chosen=good,rejected=bad" in capsys.readouterr().err


def test_questions_are_read_from_parquet(tmp_path):
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
    jsonl, file = tmp_path / "q.jsonl", tmp_path / "q.parquet"
    assert read_items(write_parquet(file, rows)) == read_items(write_rows(jsonl, rows)) != None  # noqa: E711


# --- Published layouts: their columns and types, with made-up rows --------------------------------

MESSAGES = pa.list_(pa.struct({"content": pa.string(), "role": pa.string()}))
TURNS = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
Q = {"role": "user", "content": "Sky?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Blue.", "No."))
HH = "\n\nHuman: Sky?\n\nAssistant:"
# name -> columns that are not messages and their types, row, --columns, example
LAYOUTS = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "string", "prompt_id": "string", "chosen": MESSAGES, "rejected": MESSAGES,
         "messages": MESSAGES, "score_chosen": "double", "score_rejected": "double"},
        {"prompt": "Sky?", "prompt_id": "0f", "chosen": [Q, YES], "rejected": [Q, NO],
         "messages": [Q, YES], "score_chosen": 8.5, "score_rejected": 2.0},
        None, Example("conversations", [Q], YES, NO),
    ),
    "Anthropic/hh-rlhf": (
        {"chosen": "string", "rejected": "string"},
        {"chosen": HH + " Blue.", "rejected": HH + " No."},
        None, Example("transcripts", HH, " Blue.", " No.", continues=True),
    ),
    "argilla/dpo-mix-7k": (
        {"dataset": "string", "chosen": MESSAGES, "rejected": MESSAGES,
         "chosen_rating": "double", "rejected_rating": "double"},
        {"dataset": "x", "chosen": [Q, YES, Q, YES], "rejected": [Q, YES, Q, NO],
         "chosen_rating": 5.0, "rejected_rating": 4.0},
        None, Example("conversations", [Q, YES, Q], YES, NO),
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        {"source": "string", "chosen": MESSAGES, "rejected": MESSAGES, "prompt": "string",
         "question": "string"},
        {"source": "x", "chosen": [Q, YES], "rejected": [Q, NO], "prompt": "Sky?",
         "question": "Sky?"},
        None, Example("conversations", [Q], YES, NO),
    ),
    "openbmb/UltraInteract_pair": (
        {"task": "string", "dataset": "string", "trajectory": TURNS, "chosen": "string",
         "rejected": "string", "id": "string", "parent_id": "string"},
        {"task": "Logic", "dataset": "x", "trajectory": [{"from": "user", "value": "Sky?"}],
         "chosen": "Blue.", "rejected": "No.", "id": "1", "parent_id": "0"},
        "prompt=trajectory", Example("prompt and messages", [Q], YES, NO),
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "string", "question": "string", "chosen": "string", "rejected": "string"},
        {"system": "", "question": "Sky?", "chosen": "Blue.", "rejected": "No."},
        None, Example("prompt, chosen, rejected", "Sky?", "Blue.", "No."),
    ),
}  # fmt: skip
SHP = {"post_id": "a", "domain": "b_train", "upvote_ratio": 0.9, "history": "Sky?",
       "c_root_id_A": "x", "c_root_id_B": "y", "created_at_utc_A": 1, "created_at_utc_B": 2,
       "score_A": 3, "score_B": 4, "human_ref_A": "No.", "human_ref_B": "Blue.", "labels": 0,
       "seconds_difference": 1.0, "score_ratio": 1.3}  # fmt: skip


def both_files(folder, rows: list[dict], schema=None) -> list:
    file = write_parquet(folder / "x.parquet", rows, schema)
    return [file, write_rows(folder / "x.jsonl", rows)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_gives_the_right_pairs(name, tokenizer, tmp_path):
    types, row, columns, expected = LAYOUTS[name]
    types = {n: pa.type_for_alias(t) if isinstance(t, str) else t for n, t in types.items()}
    for file in both_files(tmp_path, [row] * 3, pa.schema(types)):
        rows = dict(data_rows(file, columns))
        assert [read_row(found) for found in rows.values()] == [expected] * 3
        pairs = load_pairs(file, tokenizer, columns=columns)
        assert list(pairs.lines) == [1, 2, 3] and bytes(pairs[0].chosen[:-1]).strip() == b"Blue."


def test_a_layout_whose_label_says_which_answer_is_chosen_is_refused_by_its_columns(tmp_path):
    for file in both_files(tmp_path, [SHP]):
        with pytest.raises(ValueError) as error:
            load_pairs(file, byte_tokenizer())
        assert str(error.value).startswith(f"{file}:1: the row's columns are post_id, domain, ")
        assert "history, " in str(error.value) and "--columns prompt=NAME" in str(error.value)


def test_a_null_in_a_renamed_column_counts_as_missing(tokenizer, tmp_path):
    rows = [{"chosen": [USER, TEXT], "rejected": [USER, ANOTHER], "of": x} for x in (None, [USER])]
    files = write_rows(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)
    for file in files:
        assert [row.keys() for _, row in data_rows(file, "prompt=of")] == [
            {"chosen", "rejected"}, {"chosen", "rejected", "prompt"}
        ]  # fmt: skip
        assert len(load_pairs(file, tokenizer, columns="prompt=of")) == 2


def test_a_label_that_is_null_is_refused(tokenizer, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": x} for x in (True, None)]
    for file in (
        write_rows(tmp_path / "a.jsonl", rows),
        write_parquet(tmp_path / "a.parquet", rows),
    ):
        with pytest.raises(ValueError, match=":2: 'label' must be true or false, not None"):
            load_pairs(file, tokenizer)


def test_columns_of_dates_are_not_read(tmp_path):
    table = pa.table({"prompt": ["p"], "at": pa.array([2**62], pa.timestamp("us"))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [(1, {"prompt": "p"})]
