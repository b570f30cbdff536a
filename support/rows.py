"""Converts a row of a data file to a prompt and answers. ROW_FORMS lists the allowed columns."""

import dataclasses
from collections import Counter
from typing import NamedTuple

COLUMNS = {"prompt", "chosen", "rejected", "completion", "label", "messages"}
ROW_FORMS = ("rows must be {prompt, chosen, rejected}, {chosen, rejected} of messages or of Human/"
             "Assistant transcripts, {prompt, completion}, {prompt, completion, label} or "
             "{messages}")  # fmt: skip
# An Anthropic-HH transcript is one text, whose turns begin with these markers.
ASSISTANT_TURN, HUMAN_TURN = "\n\nAssistant:", "\n\nHuman:"


class UnusableError(ValueError):
    """A well-formed row cannot be used for training. data.py drops such rows and counts them."""


class Example(NamedTuple):
    """A prompt and two answers, one of which may be None. If the prompt is a list of messages, the
    answers are messages too: dicts with the keys "role" and "content"."""

    form: str  # the name of the row's form in reports
    prompt: str | list[dict]
    chosen: str | dict | None
    rejected: str | dict | None
    continues: bool = False  # the answers continue the prompt's text, as in a transcript


def read_row(row: dict) -> Example:
    """Converts a row to an example. Raises ValueError if the row is malformed, and UnusableError if
    an answer is empty or missing, the answers are identical, or their prompts differ."""
    if row.keys() >= {"chosen", "rejected"}:
        example = _read_conversations(row) if isinstance(row["chosen"], list) else _read_texts(row)
    elif row.keys() >= {"prompt", "completion"} or "messages" in row:
        example = _read_completion(row)
    else:
        raise ValueError(f"the row's columns are {', '.join(row) or 'none':.200}; {ROW_FORMS}")
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        text = answer["content"] if isinstance(answer, dict) else answer
        if text is not None and not text.strip():
            raise UnusableError(f"the {name} answer is empty")
    if example.chosen == example.rejected:
        raise UnusableError("chosen and rejected are identical")
    return example


def text_of(row: dict, column: str) -> str:
    """Returns the string in a column. Raises ValueError for another type, and for a string with a
    lone surrogate, which UTF-8 cannot encode."""
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} must be a string, not {type(text).__name__}")
    text.encode()
    return text


def messages_of(row: dict, column: str) -> list[dict]:
    """Returns the list of messages in a column. Raises ValueError for other values."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} must be a list of messages, not {messages!r:.40}")
    for message in messages:
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise ValueError(f"{column!r} must hold {{role, content}}, not {message!r:.40}")
        for name in ("role", "content"):
            text_of(message, name)
    return messages


def _read_texts(row: dict) -> Example:
    """Reads a prompt and two answers, or two transcripts, which both begin with the prompt."""
    answers, prompts = {column: text_of(row, column) for column in ("chosen", "rejected")}, set()
    if "prompt" in row:
        return Example("prompt, chosen, rejected", text_of(row, "prompt"), **answers)
    for column, transcript in answers.items():
        before, turn, answers[column] = transcript.rpartition(ASSISTANT_TURN)
        if not turn:
            raise ValueError(f"a row without a 'prompt' needs {ASSISTANT_TURN!r} in {column!r}")
        if HUMAN_TURN in answers[column]:
            raise UnusableError("the transcript does not end in an assistant's turn")
        prompts.add(before + turn)
    if len(prompts) > 1:
        raise UnusableError("the transcripts differ before their last answer")
    return Example("transcripts", *prompts, **answers, continues=True)


def _read_conversations(row: dict) -> Example:
    """Reads two conversations. The messages at the start that agree in role and content are the
    prompt, and the next message of each is its answer. Later messages are ignored."""
    form = "conversations"
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    if "prompt" in row and chosen[0]["role"] == "assistant":
        form = "prompt and messages"
        if isinstance(row["prompt"], str):
            row = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        chosen, rejected = (messages_of(row, "prompt") + side for side in (chosen, rejected))
    turns = [[(m["role"], m["content"]) for m in side] for side in (chosen, rejected)]
    same = [ours == theirs for ours, theirs in zip(*turns)]
    shared = [*same, False].index(False)
    answers = [side[shared] for side in (chosen, rejected) if shared < len(side)]
    if shared == 0 or [answer["role"] for answer in answers] != ["assistant", "assistant"]:
        raise UnusableError("conversations do not diverge at an assistant's turn after a prompt")
    return Example(form, chosen[:shared], *answers)


def _read_completion(row: dict) -> Example:
    """Reads a row with one answer, which is the chosen answer unless the label is false."""
    form, label = "unpaired" if "label" in row else "supervised", row.get("label", True)
    if not isinstance(label, bool):
        raise ValueError(f"'label' must be true or false, not {label!r:.40}")
    if not row.keys() >= {"prompt", "completion"}:
        form = f"{form} messages"
        *prompt, answer = messages_of(row, "messages")
    elif isinstance(row["prompt"], list):
        *prompt, answer = messages_of(row, "prompt") + messages_of(row, "completion")
    else:
        prompt, answer = text_of(row, "prompt"), text_of(row, "completion")
    if isinstance(answer, dict) and (not prompt or answer["role"] != "assistant"):
        raise UnusableError("the conversation does not end in an assistant's turn after a prompt")
    return Example(form, prompt, *((answer, None) if label else (None, answer)))


@dataclasses.dataclass
class Report:
    """How read_pairs (data.py) used the rows of a file. The lists hold line numbers."""

    rows: int = 0  # number of rows in the file
    forms: Counter = dataclasses.field(default_factory=Counter)  # form -> number of used rows
    unused: dict[str, None] = dataclasses.field(default_factory=dict)  # columns that no form has
    truncated: list[int] = dataclasses.field(default_factory=list)  # rows whose prompt was cut
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # reason -> lines

    def lines(self) -> list[str]:
        """Returns text lines on unused columns, dropped rows by reason, and truncated rows."""
        losses = {f"dropped because {reason}": lines for reason, lines in self.dropped.items()}
        if self.truncated:
            losses["cut: the prompt lost its oldest tokens to --max_length"] = self.truncated
        unused = f"columns not used: {', '.join(sorted(self.unused))}"
        return ([f"{unused:.200}"] if self.unused else []) + [
            f"{len(lines)} of {self.rows} rows {loss}: line {', '.join(map(str, lines[:5]))}"
            f"{', ...' if len(lines) > 5 else ''}"
            for loss, lines in losses.items()
        ]
