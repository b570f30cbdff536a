"""The command line: flags from a dataclass, checks of values, one-line errors, stages, devices."""

import dataclasses
import math

import pytest
import torch

from support.cli import Parser, add_options, check_value, option, pick_device, stage


@dataclasses.dataclass(frozen=True)
class Options:
    name: str = option("a", "a letter", choices=("a", "b"))
    long: str | None = option(None, "one of many", choices=tuple(f"choice-{i}" for i in range(20)))
    rate: float = option(0.5, "a positive number", above=0, most=10)
    share: float = option(0.1, "may be zero", least=0)
    count: int | None = option(None, "a number", least=1)
    k: int = option(5, "a short name", least=-3)
    quick: bool = option(False, "a switch")
    plan: str | None = option(None, "may stand alone", const="here")


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def parse(*argv: str) -> dict:
    parser = Parser("x.py", "Says what it does.")
    add_options(parser, Options)
    return vars(parser.parse_args(argv))


def test_each_field_is_a_flag_and_flags_that_are_not_given_are_none():
    assert parse() == dict.fromkeys(FIELDS)
    assert parse("--rate", "2", "-k", "7", "--quick")["k"] == parse("--k", "7")["k"] == "7"
    assert parse("--quick")["quick"] is True
    assert parse("--plan")["plan"] == "here" and parse("--plan", "there")["plan"] == "there"


def test_help_shows_defaults_and_choices(capsys):
    parser = Parser("x.py", "First line.\n\n    python x.py     kept as it is")
    add_options(parser, Options, {"count": "as many as fit"})
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "First line. python x.py kept as it is" in text
    assert "--name a|b a letter (default: a)" in text
    assert "--long NAME one of many --rate" in text  # too many choices to show; no default
    assert "--rate FLOAT a positive number (default: 0.5)" in text
    assert "--count INT a number (default: as many as fit)" in text
    assert "--quick a switch --plan [STR] may stand alone" in text
    assert "--k INT, -k INT a short name (default: 5)" in text


def test_values_are_converted_to_the_type_of_their_field():
    for name, value, expected in (
        ("name", "b", "b"),
        ("rate", "1e-3", 1e-3),
        ("rate", 2, 2.0),
        ("rate", "10", 10.0),
        ("share", "0", 0.0),
        ("count", "1", 1),
        ("count", 3.0, 3),  # as a JSON file may have it
        ("count", 2**31, 2**31),
        ("count", None, None),
        ("k", "-3", -3),
        ("quick", True, True),
        ("quick", False, False),
        ("plan", "x", "x"),
    ):
        converted = check_value(FIELDS[name], value)
        assert converted == expected and type(converted) is type(expected)


def test_values_of_another_type_or_out_of_bounds_are_refused_by_flag():
    for name, value, message in (
        ("name", "c", "--name c: choose from a, b"),
        ("rate", "much", "--rate much: must be of type float"),
        ("rate", "", "--rate : must be of type float"),
        ("rate", True, "--rate True: must be of type float"),
        ("rate", [1], "--rate [1]: must be of type float"),
        ("rate", None, "--rate None: must be of type float"),
        ("rate", "0", "--rate 0: must be more than 0 and at most 10"),
        ("rate", "10.1", "--rate 10.1: must be more than 0 and at most 10"),
        ("rate", "nan", "--rate nan: must be more than 0 and at most 10"),
        ("share", "-1", "--share -1: must be at least 0 and finite"),
        ("share", math.inf, "--share inf: must be at least 0 and finite"),
        ("count", "0", "--count 0: must be at least 1 and at most 2.14748e+09"),
        ("count", 2**31 + 1, "must be at least 1 and at most"),
        ("count", "1" + 400 * "0", "must be of type int"),
        ("count", "2.5", "--count 2.5: must be of type int"),
        ("count", 2.7, "--count 2.7: must be of type int"),
        ("count", True, "--count True: must be of type int"),
        ("count", math.inf, "--count inf: must be of type int"),
        ("k", "-4", "--k -4: must be at least -3 and at most"),
        ("quick", "yes", "--quick yes: must be of type bool"),
        ("quick", 1, "--quick 1: must be of type bool"),
    ):
        with pytest.raises(ValueError) as error:
            check_value(FIELDS[name], value)
        assert message in str(error.value)


def test_an_error_is_one_line_with_exit_status_2(capsys):
    parser, missing = Parser("x.py", ""), FileNotFoundError(2, "No such file", "gone.json")
    for message, line in (
        ("a\nb\r  c", "a b c; --help lists the flags"),  # of argparse
        (ValueError("an escape \x1b[31m, a bell \a"), r"an escape \x1b[31m, a bell \x07"),
        (missing, "gone.json: No such file; check the path and its permissions"),
        (OSError("without a file"), "without a file"),
        (ValueError("äöü 你好"), "äöü 你好"),
        ("x" * 5000, "x" * 1000),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.error(message)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"x.py: error: {line}\n"


def test_unknown_and_abbreviated_flags_are_refused(capsys):
    for argv, message in (
        (["--nope", "1"], "unrecognized arguments: --nope 1"),
        (["--rat", "1"], "unrecognized arguments: --rat 1"),
        (["--rate"], "argument --rate: expected one argument"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_stage_prints_its_title_and_then_its_notes(capsys, monkeypatch):
    clock = iter((10.0, 12.5))
    monkeypatch.setattr("support.cli.time.perf_counter", lambda: next(clock))
    with stage("training") as notes:
        assert capsys.readouterr().out == "training ...\n"
        notes += ["3 steps", "in out"]
    assert capsys.readouterr().out == "  2.5 s, 3 steps, in out\n"


def test_a_device_that_is_missing_is_refused(monkeypatch):
    assert pick_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    for name in ("warp", "meta", "", "cuda:99"):
        with pytest.raises(
            ValueError, match=f"--device {name}: not available on this machine; use"
        ):
            pick_device(name)
