"""Parses train.py's options, fills in defaults and checks combinations of flags. Imports mio.py."""

import dataclasses
import os
from pathlib import Path

import mio
from mio import LOSSES, find_loss
from support import builtin_task, cli, files, hub, lora, on_policy, run_folder
from support.builtin_task import is_demonstration

# The defaults of runs that start from a checkpoint (--init), and of the demonstration.
CHECKPOINT = {"epochs": 1, "batch_size": 32, "max_length": 1024, "lr": 1e-6, "max_new_tokens": 256}
DEMONSTRATION = {"epochs": 2, "batch_size": 48, "max_length": 96, "lr": 2e-4,
                 "max_new_tokens": builtin_task.ANSWER_TOKENS}  # fmt: skip
PLAN = {"gpu": "h100"}
# What --help shows for defaults that depend on other options.
SHOWN = {name: f"{CHECKPOINT[name]}, demonstration: {DEMONSTRATION[name]}" for name in CHECKPOINT}
SHOWN |= {"beta": "the loss's own", "out": "out/LOSS", "eval_every": "a tenth of the steps"}
SHOWN |= PLAN | {"lora_alpha": "twice the rank", "lora_targets": lora.DEFAULT_TARGETS}
LORA_FLAGS = {"lora_rank", "lora_alpha", "lora_targets", "lora_rslora"}


def options_of_losses() -> dict[str, list[str]]:
    """Maps each option of a loss, such as gamma, to the names of the losses with this option."""
    names = [name for loss in LOSSES.values() for name in loss.options]
    return {name: [loss for loss in LOSSES if name in LOSSES[loss].options] for name in names}


LOSS_FLAGS = options_of_losses().keys() | {"beta", "average_logps"}


def read_flags(argv: list[str] | None, cls: type, description: str):
    """Returns the parser and a dict from the flags given to their texts. A flag is a field of the
    dataclass `cls`. Prints the losses and exits for --loss help."""
    parser = cli.Parser("train.py", description)
    cli.add_options(parser, cls, SHOWN)
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if flags.get("loss") == "help":
        print(loss_table())
        parser.exit()
    return parser, flags


def make_options(flags: dict, cls: type):
    """Returns the options, an instance of the dataclass `cls`. Flags take precedence over the file
    of --config. Raises OSError or ValueError for bad input."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if "config" in flags:
        found, skipped = files.read_json(Path(flags["config"])), {*run_folder.PROVENANCE}
        for name in found.keys() - fields.keys() - skipped:
            raise ValueError(f"{flags['config']}: there is no option {name!r}; remove this key")
        if "loss" in flags and flags["loss"] != found.get("loss", flags["loss"]):
            skipped |= {"out", *LOSS_FLAGS}  # the file's values are for another loss
        flags = {name: x for name, x in found.items() if name not in skipped} | flags
    flags = {name: cli.check_value(fields[name], value) for name, value in flags.items()}
    if flags.get("init"):  # a name of a model becomes its folder, which a resumed run reads again
        flags["init"] = str(hub.find(flags["init"], weights=not flags.get("plan")))
    if flags.get("resume"):
        folder = Path(flags.get("out") or default_out(cls(**flags)))
        flags = run_folder.resumed_options(flags, cls, folder)
    if flags.get("weights") == "bfloat16":
        flags = {"dtype": "bfloat16"} | flags
    return resolve(cls(**flags))


def loss_table() -> str:
    """Returns mio.py's table of symbols, then two lines of at most 80 columns for each loss."""
    lines = [mio.__doc__.split("\n\n")[2], ""]
    for name, loss in LOSSES.items():
        facts = [loss.uses, "reference" if loss.needs_reference else "no reference"]
        facts += [f"beta {loss.beta:g}"] if loss.uses_beta else []
        facts += [f"{option} {default:g}" for option, default in loss.options.items()]
        lines += [f"{name:10}{loss.function.__doc__}", f"{'':10}{', '.join(facts)}; {loss.source}"]
    lines += ["A+0.1*B   a weighted sum of losses that split into pairs, such as mio+0.1*sft"]
    return "\n".join(lines)


def default_beta(loss, init) -> float:
    """Returns the default of --beta for a Loss. The demonstration multiplies the loss's own default
    by 5, because its short answers have small log-ratios."""
    is_scaled = loss.needs_reference and loss.uses != "means" and is_demonstration(init)
    return loss.beta * (5 if is_scaled else 1)


def default_out(options) -> str:
    return f"out/{options.loss}{'-on-policy' if options.on_policy else ''}"


def resolve(options):
    """Fills in defaults that depend on other options. Raises ValueError for unusable options."""
    check_together(options)
    loss, defaults = find_loss(options.loss), {"out": default_out(options)}
    demonstration = not options.plan and is_demonstration(options.init)
    defaults |= DEMONSTRATION if demonstration else CHECKPOINT
    # load_job multiplies the default of --average_logps by the mean length of the answers.
    defaults["beta"] = None if options.average_logps else default_beta(loss, options.init)
    defaults["lr"] *= 10 if options.lora_rank else 1
    defaults |= PLAN if options.plan else {}
    if options.lora_rank:
        alpha = lora.config_of(options).lora_alpha
        defaults |= {"lora_alpha": alpha, "lora_targets": lora.DEFAULT_TARGETS}
    defaults = {name: x for name, x in defaults.items() if getattr(options, name) is None}
    options = dataclasses.replace(options, **defaults, device=cli.pick_device(options.device))
    on_policy.check_draws(options)
    return options


def check_together(options) -> None:
    """Raises ValueError for a flag that needs or excludes another flag, and under torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("train.py trains on one GPU; start it without torchrun")
    loss, shortest = find_loss(options.loss), builtin_task.PAIR_TOKENS
    given = {name for name, x in vars(options).items() if x or type(x) in (int, float)}
    if options.plan and (options.plan == "init") != ("init" in given):
        raise ValueError("--plan needs a preset or --init FOLDER; give one, but not both")
    if options.plan and on_policy.is_on_policy(options):
        raise ValueError("--plan excludes --on_policy and --loss rlhf; leave out --plan")
    if not options.plan and ("init" in given) != ("data" in given):
        missing = "--data FILE.jsonl" if options.init else "--init FOLDER"
        raise ValueError(f"{missing} is missing; give both --init and --data, or neither")
    if options.jobs:
        raise ValueError("--jobs needs a flag with several values, such as --seed 0,1,2; add one")
    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it; choose one")
    needed = {"gpu": "plan", "eval_data": "data", "columns": "data", "chat_template_kwargs": "data"}
    for name, other in (needed | dict.fromkeys(LORA_FLAGS, "lora_rank")).items():
        if name in given and other not in given:
            raise ValueError(f"--{name} needs --{other}; add --{other} or leave out --{name}")
    if options.weights == "bfloat16" and options.lora_rank:
        raise ValueError("--weights bfloat16: with --lora_rank, --dtype sets the precision of "
                         "the frozen weights; leave out --weights")  # fmt: skip
    if options.average_logps and options.on_policy and options.beta is None:
        raise ValueError("--average_logps with --on_policy needs a --beta; give one")
    recorded = {"beta"} if options.beta == loss.beta else set()  # even if the loss has no beta
    for name in sorted(given & (LOSS_FLAGS - loss.flags - recorded)):
        raise ValueError(f"--{name}: --loss {options.loss} does not use it; leave out --{name}")
    if not (options.init or options.plan) and (options.max_length or shortest) < shortest:
        raise ValueError(f"--max_length: the demonstration needs {shortest} tokens; raise it")
