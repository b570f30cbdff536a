"""The command line: options and their bounds, one-line errors, and stages with their duration."""

import argparse
import contextlib
import dataclasses
import math
import textwrap
import time
from typing import get_args

import torch


class Parser(argparse.ArgumentParser):
    """Refuses abbreviated flags. On bad input, prints a line to stderr and exits with status 2."""

    def __init__(self, prog: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str | Exception):
        hint = "; --help lists the flags" if isinstance(message, str) else ""  # from argparse
        if isinstance(message, OSError) and message.filename:
            message = f"{message.filename}: {message.strerror}; check the path and its permissions"
        line = " ".join(f"{message}{hint}".split())[:1000]
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        self.exit(2, f"{self.prog}: error: {line}\n")


def option(default, help: str, **checks):
    """Returns a dataclass field for a flag. checks: choices=(...) are the allowed values; above=x
    (exclusive), least=x and most=x are bounds; const=x is the value of a flag with no argument."""
    return dataclasses.field(default=default, metadata={"help": help, **checks})


@dataclasses.dataclass(frozen=True)
class DataOptions:  # the flags of all commands that read pairs
    columns: str | None = option(None, "other names of columns, as in prompt=question,chosen=good")
    chat_template_kwargs: str | None = option(None, 'template values: {"enable_thinking": false}')


def add_options(parser: Parser, options: type, shown_defaults: dict[str, str] | None = None):
    """Adds a flag for each field of a dataclass. A flag that is not given has the value None.
    shown_defaults: the text that --help shows for defaults that depend on other options."""
    for field in dataclasses.fields(options):
        name, checks = field.name, field.metadata
        default = (shown_defaults or {}).get(name, field.default)
        default = "" if default is None or default is False else f" (default: {default})"
        metavar = "|".join(checks.get("choices", ())) or kind_of(field).__name__.upper()
        kwargs = {"metavar": metavar if len(metavar) < 50 else "NAME"}
        if field.type is bool:
            kwargs = {"action": "store_true", "default": None}
        if "const" in checks:
            kwargs |= {"nargs": "?", "const": checks["const"]}
        flags = [f"--{name}", f"-{name}"] if len(name) == 1 else [f"--{name}"]
        parser.add_argument(*flags, help=checks["help"] + default, **kwargs)


def kind_of(field: dataclasses.Field) -> type:
    return (get_args(field.type) or (field.type,))[0]  # float for float | None


def check_value(field: dataclasses.Field, value):
    """Converts a text or JSON value to the field's type and checks it; errors name the flag."""
    kind, checks, flag = kind_of(field), field.metadata, f"--{field.name} {value}"
    if value is None and field.default is None:
        return None
    try:
        converted = kind(value)
        if isinstance(value, bool) != (kind is bool) or (kind is int and converted != float(value)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{flag}: must be of type {kind.__name__}") from None
    if "choices" in checks and converted not in checks["choices"]:
        raise ValueError(f"{flag}: choose from {', '.join(checks['choices'])}")
    if kind in (int, float):
        least, above = checks.get("least", -math.inf), checks.get("above", -math.inf)
        most = checks.get("most", 2**31 if kind is int else math.inf)
        if not (math.isfinite(converted) and above < converted and least <= converted <= most):
            low = f"more than {above:g}" if "above" in checks else f"at least {least:g}"
            high = f" and at most {most:g}" if most < math.inf else " and finite"
            raise ValueError(f"{flag}: must be {low}{high}")
    return converted


@contextlib.contextmanager
def stage(title: str):
    """Prints the title and, after the stage, its duration and the notes in the yielded list."""
    print(f"{title} ...", flush=True)
    start, notes = time.perf_counter(), []
    yield notes
    seconds = f"{time.perf_counter() - start:.1f} s"
    print(wrapped("  " + ", ".join([seconds, *notes])), flush=True)


def wrapped(line: str) -> str:
    """Breaks a line between words where it has 80 characters; long paths stay whole."""
    form = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, 80, subsequent_indent="  ", **form)


def pick_device(name: str) -> str:
    """Resolves "auto" to cuda or, without a GPU, to cpu. Raises ValueError for a missing device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError, AssertionError):  # torch without CUDA raises the latter
        if torch.empty(1, device=name).device.type in ("cpu", "cuda"):
            return name
    raise ValueError(f"--device {name}: not available on this machine; use --device cpu")
