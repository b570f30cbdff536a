"""Input from strangers: the corpus of strangers.py, and valid files damaged anywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PAIR_ROWS, write_rows

from data import load_pairs, load_tokenizer
from model import Llama

hypothesis = pytest.importorskip("hypothesis", reason="draws the damage of property tests")
from hypothesis import strategies as st  # noqa: E402


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every case is a fork")
def test_every_case_of_the_corpus_is_refused_cleanly():
    command, halves = [sys.executable, Path(__file__).with_name("strangers.py")], []
    for part in ("0/2", "1/2"):
        environment = os.environ | {"PART": part}
        halves.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    tried = 0
    for half in halves:
        said, _ = half.communicate()
        assert half.returncode == 0, said
        tried += int(re.search(r"^all +(\d+)", said, re.MULTILINE)[1])
    assert tried >= 200


def damaged(content: bytes):
    """Bytes replaced, and the file cut off or not; mostly near the beginning, where headers are."""
    place = st.integers(0, min(2000, len(content) - 1)) | st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(place, st.integers(0, 255)), max_size=4)

    def damage(changes, end):
        result = bytearray(content)
        for position, byte in changes:
            result[position] = byte
        return bytes(result[:end])

    return st.builds(damage, changes, st.none() | place)


LOADERS = {
    "model.safetensors": Llama.from_pretrained,
    "config.json": Llama.from_pretrained,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "pairs.jsonl": lambda folder: load_pairs(folder / "pairs.jsonl", load_tokenizer(folder)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_loads_or_is_refused_by_name(name, checkpoint):
    file = checkpoint / name
    write_rows(checkpoint / "pairs.jsonl", PAIR_ROWS)

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(damaged(file.read_bytes()))
    def same(content):
        file.write_bytes(content)
        try:
            LOADERS[name](checkpoint)
        except (ValueError, OSError) as error:
            hypothesis.event("refused")
            assert name in str(error) or str(checkpoint) in str(error)
            assert len(str(error)) < 2000

    same()
