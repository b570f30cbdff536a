"""Converts a row of a data file to a prompt and answers. ROW_FORMS lists the allowed columns."""

import dataclasses
from collections import Counter
from typing import NamedTuple

from support.files import parse_json, read_rows, without_nulls

ANSWER_COLUMNS = {"chosen", "rejected", "completion", "label", "messages"}
COLUMNS = ANSWER_COLUMNS | {"prompt", "tools", "chat_template_kwargs"}
ROW_FORMS = ("rows must be {prompt, chosen, rejected}, {chosen, rejected} of messages or of Human/"
             "Assistant transcripts, {prompt, completion}, {prompt, completion, label} or "
             "{messages}; --columns prompt=NAME renames a column")  # fmt: skip
# The keys in which two messages must agree to be equal. Others, such as an id, may differ.
MESSAGE_KEYS = ("role", "content", "tool_calls", "reasoning_content", "name", "tool_call_id")
ROLES = {"human": "user", "gpt": "assistant"}  # the names of roles in ShareGPT's messages
ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
# An Anthropic-HH transcript is one text, whose turns begin with these markers.
ASSISTANT_TURN, HUMAN_TURN = "\n\nAssistant:", "\n\nHuman:"


class UnusableError(ValueError):
    """A well-formed row cannot be used for training. data.py drops such rows and counts them."""


class Example(NamedTuple):
    """A prompt and two answers, one of which may be None. If the prompt is a list of messages, the
    answers are messages too: dicts with the keys "role" and "content", and perhaps others."""

    form: str  # the name of the row's form in reports
    prompt: str | list[dict]
    chosen: str | dict | None
    rejected: str | dict | None
    continues: bool = False  # the answers continue the prompt's text, as in a transcript
    values: dict = {}  # values for the chat template, such as tools


def data_rows(path, columns: str | None = None):
    """Yields the line number and the dict of each row of a data file, under the names in COLUMNS.
    columns: --columns, such as "prompt=question,chosen=good". Raises the errors of `read_rows`."""
    pairs = [pair.partition("=")[::2] for pair in columns.split(",")] if columns else []
    names = dict(pairs)
    if len(names) < len(pairs) or not names.keys() <= COLUMNS:
        known = ", ".join(sorted(COLUMNS))
        raise ValueError(f"--columns {columns}: write NAME=COLUMN, each NAME once, of {known}")
    for line, row in read_rows(path):
        if missing := {*names.values()} - row.keys():
            found = f"no column {min(missing)!r} among {', '.join(row):.200}"
            raise ValueError(f"{path}:{line}: --columns {columns}: {found}")
        kept = {k: x for k, x in row.items() if k not in names.values()}
        renamed = kept | {name: row[column] for name, column in names.items()}
        row = {k: x for k, x in renamed.items() if x is not None or k == "label"}
        other = next((n for n in ("question", "instruction", "conversations") if n in row), None)
        if other and "prompt" not in row and row.keys() >= {"chosen", "rejected"}:
            row["prompt"] = row.pop(other)
            if isinstance(text := row.get("input"), str) and text and other == "instruction":
                row["prompt"] = f"{text_of(row, 'prompt')}\n{row.pop('input')}"
        elif other == "conversations" and not row.keys() & {"prompt", "messages"}:
            row["messages"] = row.pop(other)
        yield line, row


def read_row(row: dict) -> Example:
    """Converts a row to an example. Raises ValueError if the row is malformed, and UnusableError if
    an answer is empty or missing, the answers are identical, or their prompts differ."""
    if row.keys() >= {"chosen", "rejected"}:
        lists = isinstance(row["chosen"], list | dict) or isinstance(row.get("prompt"), list)
        example = _read_conversations(row) if lists else _read_texts(row)
    elif row.keys() >= {"prompt", "completion"} or "messages" in row:
        example = _read_completion(row)
    else:
        raise ValueError(f"the row's columns are {', '.join(row) or 'none':.200}; {ROW_FORMS}")
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        text = answer["content"] if isinstance(answer, dict) else answer
        if text is not None and not text.strip() and "tool_calls" not in answer:
            raise UnusableError(f"the {name} answer is empty")
    if example.chosen == example.rejected:
        raise UnusableError("chosen and rejected are identical")
    return example._replace(values=_template_values(row, example))


def _template_values(row: dict, example: Example) -> dict:
    """Returns the values for the chat template in the columns tools and chat_template_kwargs."""
    tools, values = row.get("tools") or [], row.get("chat_template_kwargs") or {}
    tools = parse_json(f'{{"tools": {tools}}}', "tools")["tools"] if type(tools) is str else tools
    if not isinstance(tools, list) or not isinstance(values, dict):
        raise ValueError("'tools' must be a list or its JSON, 'chat_template_kwargs' an object")
    values = values | ({"tools": tools} if tools else {})
    if values and not isinstance(example.prompt, list):
        raise UnusableError(f"{min(values)} needs a prompt of messages, but the prompt is a text")
    return values


def text_of(row: dict, column: str) -> str:
    """Returns the string in a column. Raises ValueError for another type, and for a string with a
    lone surrogate, which UTF-8 cannot encode."""
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} must be a string, not {type(text).__name__}")
    text.encode()
    return text


def messages_of(row: dict, column: str) -> list[dict]:
    """Returns the messages in a column, a list, a single one or its text, with texts as contents
    and without nulls. Raises ValueError for other values, UnusableError for parts without text."""
    messages = row[column]
    if isinstance(messages, str) and column != "messages":
        messages = {"role": "user" if column == "prompt" else "assistant", "content": messages}
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} must be a list of messages, not {messages!r:.40}")
    return [_read_message(message, column) for message in messages]


def _read_message(value, column: str) -> dict:
    message = without_nulls(value) if isinstance(value, dict) else {}
    if message.keys() >= {"from", "value"}:  # as in ShareGPT
        if (role := str(message["from"])) not in ROLES:
            raise UnusableError(f"a message is from {role!r:.40}, not from {', '.join(ROLES)}")
        message = {"role": ROLES[role], "content": message["value"]}
    for name in [name for name in ("thinking", "reasoning") if name in message]:
        message.setdefault("reasoning_content", message[name])  # as in transformers
    without_content = {"content": ""} if message.get("tool_calls") else {}
    message = without_content | {k: x for k, x in message.items() if (k, x) != ("tool_calls", [])}
    if not message.keys() >= {"role", "content"}:
        raise ValueError(f"{column!r} must hold {{role, content}}, not {value!r:.40}")
    if isinstance(parts := message["content"], list) and all(isinstance(p, dict) for p in parts):
        if kinds := {str(part.get("type")) for part in parts} - {"text"}:
            raise UnusableError(f"a message has a part of type {min(kinds):.40}, not only text")
        message["content"] = "".join(text_of({"text": None} | part, "text") for part in parts)
    for name in ("role", "content", "reasoning_content"):
        text_of({"reasoning_content": ""} | message, name)
    return message


def _read_texts(row: dict) -> Example:
    """Reads a prompt and two answers, or two transcripts, which both begin with the prompt."""
    answers, prompts = {column: text_of(row, column) for column in ("chosen", "rejected")}, set()
    if "prompt" in row:
        return Example("prompt, chosen, rejected", text_of(row, "prompt"), **answers)
    for column, transcript in answers.items():
        before, turn, answers[column] = transcript.rpartition(ASSISTANT_TURN)
        if not turn:
            found = f"{column!r} is no transcript, and the columns are {', '.join(row):.200}"
            raise ValueError(f"{found}; {ROW_FORMS}")
        if HUMAN_TURN in answers[column]:
            raise UnusableError("the transcript does not end in an assistant's turn")
        prompts.add(before + turn)
    if len(prompts) > 1:
        raise UnusableError("the transcripts differ before their last answer")
    return Example("transcripts", *prompts, **answers, continues=True)


def _read_conversations(row: dict) -> Example:
    """Reads two conversations. The messages at the start that agree in MESSAGE_KEYS are the prompt,
    and the next message of each is its answer. Later messages are ignored."""
    form = "conversations"
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    if "prompt" in row and chosen[0]["role"] == "assistant":
        form = "prompt and messages"
        chosen, rejected = (messages_of(row, "prompt") + side for side in (chosen, rejected))
    turns = [[[m.get(key) for key in MESSAGE_KEYS] for m in side] for side in (chosen, rejected)]
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
