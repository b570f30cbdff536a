"""The options of train.py: defaults that depend on other options, and flags that exclude each
other. Stands on mio.py."""

import dataclasses
import importlib.util
from pathlib import Path

from mio import LOSSES, loss_table
from support.builtin_task import ANSWER_TOKENS, PAIR_TOKENS
from support.checkpoints import resumed_options
from support.cli import Parser, add_options, check_value, pick_device
from support.files import read_json
from support.on_policy import check_draws, draws
from support.plan import check_plan
from support.run_folder import PROVENANCE

# The defaults of the two kinds of run. The model of the demonstration is tiny, and its answers are
# short, so the log-ratios of losses that use sums are small and beta is five times as large.
CHECKPOINT = {"epochs": 1, "batch_size": 32, "max_length": 1024, "lr": 1e-6, "max_new_tokens": 256}
DEMONSTRATION = {"epochs": 3, "batch_size": 64, "max_length": 96, "lr": 1e-4,
                 "max_new_tokens": ANSWER_TOKENS}  # fmt: skip
DEMONSTRATION_BETA = 5
LORA_LR = 10  # the default learning rate of adapters is this many times as large
LORA_FLAGS = {"lora_rank", "lora_alpha", "lora_targets", "lora_rslora"}
LOSS_OPTIONS = {name for loss in LOSSES.values() for name in loss.options}


def parse_options(argv: list[str] | None, cls: type, description: str, world):
    """The parser and the options, an instance of the dataclass `cls`. Flags take precedence over
    the file of --config. Bad input ends the program with one line."""
    parser = Parser("train.py", description)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    shown = {n: f"{CHECKPOINT[n]}, demonstration: {DEMONSTRATION[n]}" for n in CHECKPOINT}
    add_options(parser, cls, shown | {"beta": "the loss's own", "out": "out/LOSS"})
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if flags.get("loss") == "help":
        print(loss_table())
        parser.exit()
    try:
        if "config" in flags:
            flags = _read_config(Path(flags["config"]), flags, fields.keys()) | flags
        flags = {name: check_value(fields[name], value) for name, value in flags.items()}
        if flags.get("resume"):
            flags = resumed_options(flags, cls, default_out)
        return parser, resolve(cls(**flags), world)
    except (OSError, ValueError) as error:
        parser.error(error)


def _read_config(file: Path, flags: dict, names) -> dict:
    """The options in a JSON file; those of its loss only if the flags name no other loss."""
    found = read_json(file)
    for name in found.keys() - names - set(PROVENANCE):
        raise ValueError(f"{file}: there is no option {name!r}")
    other_loss = flags.get("loss", found.get("loss")) != found.get("loss", flags.get("loss"))
    skipped = {*PROVENANCE, *(("beta", "out", *LOSS_OPTIONS) if other_loss else ())}
    return {name: value for name, value in found.items() if name not in skipped}


def default_out(options) -> str:
    return f"out/{options.loss}{'-on-policy' if options.on_policy else ''}"


def resolve(options, world):
    """Fills in the defaults that depend on other options. Raises ValueError as check_together."""
    check_together(options)
    loss, defaults = LOSSES[options.loss], {"out": default_out(options)}
    defaults |= CHECKPOINT if options.init or options.plan else DEMONSTRATION
    is_scaled = loss.needs_reference and loss.uses != "means" and not options.init
    defaults["beta"] = loss.beta * (DEMONSTRATION_BETA if is_scaled else 1)
    defaults["lr"] *= LORA_LR if options.lora_rank or options.init_adapter else 1
    if options.plan:
        defaults |= {"gpu": "h100", "mfu": 0.4}
    if options.lora_rank:
        defaults |= {"lora_alpha": 2.0 * options.lora_rank, "lora_targets": "all"}
    defaults = {name: x for name, x in defaults.items() if getattr(options, name) is None}
    options = dataclasses.replace(options, **defaults, device=pick_device(options.device))
    check_draws(options)
    if not options.plan:
        world.check(options.init, options.batch_size, draws(options))
    return options


def check_together(options) -> None:
    """Raises ValueError for a flag that needs or excludes another flag."""
    loss, is_demonstration = LOSSES[options.loss], not (options.init or options.plan)
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    if options.plan:
        check_plan(options, draws(options))
    elif ("init" in given) != ("data" in given):
        missing = "--data FILE.jsonl" if options.init else "--init FOLDER"
        raise ValueError(f"{missing} is missing: --init and --data go together; leave out both for "
                         "the built-in demonstration")  # fmt: skip
    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: choose one")
    if options.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs a package: pip install tensorboard")
    for name in given & LORA_FLAGS if options.init_adapter else ():
        raise ValueError(f"--{name}: the adapter of --init_adapter sets it; leave it out")
    needed = {"gpu": "plan", "mfu": "plan", "eval_data": "data", "init_adapter": "data"}
    for name, other in (needed | dict.fromkeys(LORA_FLAGS, "lora_rank")).items():
        if name in given and other not in given:
            raise ValueError(f"--{name} needs --{other}")
    unused = LOSS_OPTIONS - loss.options.keys()
    if not loss.uses_beta and options.beta != loss.beta:  # which the run's records hold
        unused.add("beta")
    for name in sorted(given & unused):
        raise ValueError(f"--{name}: --loss {options.loss} does not use it; see --loss help")
    if is_demonstration and (options.max_length or PAIR_TOKENS) < PAIR_TOKENS:
        raise ValueError(f"--max_length {options.max_length}: the demonstration's pairs need "
                         f"{PAIR_TOKENS}")  # fmt: skip
