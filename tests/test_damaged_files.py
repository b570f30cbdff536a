"""Every file that a user brings, damaged anywhere, loads or is refused by its name."""

import random

import pytest
from conftest import PAIR_ROWS, write_rows

from data import load_pairs
from model import Llama
from support.tokenizers import load_tokenizer

LOADERS = {
    "model.safetensors": Llama.from_pretrained,
    "config.json": Llama.from_pretrained,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "pairs.jsonl": lambda folder: load_pairs(folder / "pairs.jsonl", load_tokenizer(folder)),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes replaced, and sometimes cut off. The damage is mostly near the
    beginning, where headers are."""
    result = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(min(2000, len(content)) if rng.random() < 0.7 else len(content))
        result[place] = rng.choice([rng.randrange(256), ord(rng.choice('"{}[]:,0-9'))])
    return bytes(result[: rng.choice([None, None, None, rng.randrange(len(content))])])


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_loads_or_is_refused_by_name(name, checkpoint):
    file, rng, refused = checkpoint / name, random.Random(name), 0
    write_rows(checkpoint / "pairs.jsonl", PAIR_ROWS)
    content = file.read_bytes()
    for _ in range(40):
        file.write_bytes(damaged(content, rng))
        try:
            LOADERS[name](checkpoint)
        except (ValueError, OSError) as error:
            refused += 1
            assert name in str(error) or str(checkpoint) in str(error)
            assert len(str(error)) < 2000 and "\n" not in str(error).strip()
    assert refused > 10


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\0" * 9, b"\x80\x02cos\nsystem\n", b"[" * 99_999]
)
def test_another_content_is_refused_by_name(name, content, checkpoint):
    write_rows(checkpoint / "pairs.jsonl", PAIR_ROWS)
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        LOADERS[name](checkpoint)
    assert len(str(error.value)) < 2000
