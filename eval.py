"""Evaluation: log-probs of answers, preference metrics, comparison of runs.

    python eval.py out/base out/mio out/dpo             the demonstration's runs
    python eval.py out/mio BASE --data FILE             questions, choices, pairs
    python eval.py out/base out/mio --prompt "7+9-3+5"  answers side by side

A table shows the mean and the standard error of each column over the items of
a file. The value of every item is kept, so two runs share the same items.
"""

import dataclasses
import functools
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import LAYOUT, Batch, Pairs, answer_states, autocast, make_batches, needs_fixed_length
from mio import chunked_logps, find_loss, pair_loss
from model import Llama
from support.builtin_task import SAMPLES, TEST_PROBLEMS, task_columns
from support.cli import DataOptions, Parser, add_options, check_value, option, pick_device
from support.curves import plot
from support.figures import Column, compared, table
from support.files import digest_file, write_json
from support.questions import answer_columns, choice_columns, choice_rows, read_items
from support.trained_run import Run, load_checkpoint, read_run

# --- Log-probs of answers -------------------------------------------------------------------------


def answer_logps(model: Llama, items: Sequence, row_tokens, micro_tokens, dtype) -> list[Tensor]:
    """Returns, for each item, the summed log-probs of its answers: (answers,) in nats, on the CPU.
    An item holds the ids of a prompt and any number of answers. Items are packed as in training."""
    device, pad = model.head_weight.device, needs_fixed_length(model)
    logps = [torch.zeros(len(item) - 1) for item in items]
    with tqdm(total=len(items), desc="log-probs", unit="item", leave=False, disable=None) as bar:
        for start in range(0, len(items), 256):  # packs 256 items at a time
            index = list(range(start, min(start + 256, len(items))))
            for batch in make_batches(items, index, row_tokens, micro_tokens, pad):
                sums = batch_logps(model, batch.to(device), dtype)
                answers = [len(items[i]) - 1 for i in batch.index]
                for i, part in zip(batch.index, sums.float().cpu().split(answers)):
                    logps[i] = part
                bar.update(len(batch.index))
    return logps


@torch.no_grad()
def batch_logps(model: Llama, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Returns the summed log-prob of each answer in a batch: (S,) in nats."""
    with autocast(batch.tokens.device, dtype):
        hidden, head = answer_states(model, batch), model.head_weight  # (N, D), (V, D)
        return chunked_logps(hidden, head, batch.targets, batch.lengths, compiled=model.compiled)


def pair_logps(model: Llama, pairs: Pairs, *layout) -> Tensor:
    """Returns the summed log-probs of chosen and rejected answers, (pairs, 2) in nats, on the CPU.
    layout: row_tokens, micro_tokens and dtype."""
    logps = answer_logps(model, pairs, *layout)
    return torch.stack(logps) if logps else torch.empty(0, 2)


# --- Preference metrics ---------------------------------------------------------------------------


def reward_scale(lengths: Tensor, loss: str, beta: float, average_logps: bool, **_):
    """Returns the ratio of an answer's reward to its log-ratio: beta, or beta divided by the tokens
    of the answer if the loss averages log-ratios. lengths: (pairs, 2). Keywords: run options."""
    averages = find_loss(loss).uses == "means" and find_loss(loss).needs_reference
    return beta / lengths.clamp(min=1) if averages or average_logps else beta


def preference_values(logps: Tensor, ref_logps: Tensor | None, beta) -> dict[str, Tensor]:
    """Returns the preference metrics of each pair, (pairs,), under TRL's names. logps, ref_logps:
    (pairs, 2), NaN for a missing answer. Without a reference there are no rewards. beta is a number
    or, as `reward_scale` returns it, (pairs, 2)."""
    values = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}
    if ref_logps is not None:
        chosen, rejected = (beta * (logps - ref_logps)).unbind(dim=1)
        known = chosen.isfinite() & rejected.isfinite()
        accurate = torch.where(known, (chosen > rejected).to(logps.dtype), torch.nan)
        values |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
        values |= {"rewards/margins": chosen - rejected, "rewards/accuracies": accurate}
    return values


def information(rewards: Tensor) -> dict[str, Tensor]:
    """Returns values (pairs,) whose means estimate mutual information by the rewards (pairs, 2).

    `dv` and `nwj` are the negated losses of the same names, in nats; both are lower bounds and at
    most log 2. `js` is log 4 minus the mio loss; it estimates twice the Jensen-Shannon divergence
    and is at most 0.4315. All three are 0 if the policy equals the reference. The values of `dv`,
    less their mean, are its influence function (see mio.dv), so its error is that of a mean."""

    def bound(name: str, **options) -> Tensor:
        return -pair_loss(name, *rewards.unbind(dim=1), zero, zero, beta=1.0, **options)  # (pairs,)

    rewards, zero = rewards.double(), torch.zeros(len(rewards), dtype=torch.float64)
    critics = rewards[~rewards.isnan().any(dim=1)].flatten()  # of pairs with both answers
    c = critics.logsumexp(dim=0) - math.log(max(len(critics), 1))
    c = torch.where(c.isfinite(), c, torch.nan)  # dv is then inf - inf, for every pair
    return {"dv": bound("dv", shared=c), "js": math.log(4) + bound("mio"), "nwj": bound("nwj")}


def preference_metrics(logps: Tensor, ref_logps: Tensor, beta) -> dict[str, float]:
    """Returns the means of preference_values, and mi/dv, mi/js and mi/nwj from `information`."""
    values = preference_values(logps, ref_logps, beta)
    values |= {f"mi/{n}": v for n, v in information(beta * (logps - ref_logps)).items()}
    return {n: Column(v.double().numpy()).estimate().mean for n, v in values.items()}


def preference_columns(logps, ref_logps: Tensor | None, pairs, beta, path) -> dict[str, Column]:
    """Returns table columns from log-probs (pairs, 2): the accuracy and margin of the rewards, the
    rewards T, log-ratios Δ per answer and per token, and log-probs. Missing answers are NaN. A hash
    of the file `path` and a line name a pair in all runs, even if their tokenizers differ."""
    lengths, first, columns = torch.from_numpy(pairs.lengths()[:, 1:]), {}, {}
    file = digest_file(path)[:16] if pairs else ""
    names = np.array([f"{file}:{line}" for line in pairs.lines])
    prompts = np.array([first.setdefault(tuple(p.prompt), name) for p, name in zip(pairs, names)])
    logps = torch.where(lengths > 0, logps, torch.nan)
    values, sides = preference_values(logps, ref_logps, beta), {"": logps}
    if ref_logps is not None:
        columns = {"reward": values["rewards/accuracies"], "margin": values["rewards/margins"]}
        ratios = logps - ref_logps
        sides = {"T ": beta * ratios, "Δ ": ratios, "Δ/token ": ratios / lengths} | sides
    for name, side in sides.items():
        columns |= {f"{name}chosen": side[:, 0], f"{name}rejected": side[:, 1]}
    columns = {n: Column(v.double().numpy(), prompts, names) for n, v in columns.items()}
    return {name: column for name, column in columns.items() if column.estimate().n}


def pair_columns(model, reference, path, title, pairs: Pairs, training) -> dict:
    """Returns a dict from table titles to columns: preferences and mutual information."""
    layout = *LAYOUT, getattr(torch, training["dtype"])
    if reference and reference.config.vocab_size != (size := model.config.vocab_size):
        sizes = f"the reference has {reference.config.vocab_size} token ids, but the run has {size}"
        raise ValueError(f"{training['init']}: {sizes}; restore the model that the run began from")
    logps = pair_logps(model, pairs, *layout)
    ref_logps = pair_logps(reference, pairs, *layout) if reference else None
    scale = reward_scale(torch.from_numpy(pairs.lengths()[:, 1:]), **training)
    columns = preference_columns(logps, ref_logps, pairs, scale, path)
    critic = {f"{title}: critic": critic_columns(columns)} if "margin" in columns else {}
    return {title: columns} | critic


def critic_columns(columns: dict[str, Column]) -> dict[str, Column]:
    """Returns `information` of the rewards in `columns`; each name ends with the upper bound."""
    rewards = np.stack([columns[f"T {side}"].values for side in ("chosen", "rejected")], axis=1)
    bounds = information(torch.from_numpy(rewards))  # from (pairs, 2)
    limits = {"dv ≤0.693": "dv", "nwj ≤0.693": "nwj", "js ≤0.4315": "js"}
    return {c: columns["margin"]._replace(values=bounds[n].numpy()) for c, n in limits.items()}


def evaluate(run: Run, options: "Options") -> tuple[dict, dict]:
    """Evaluates a run on its data. Returns two dicts by table title: the columns, and each item's
    answers or choice log-probs. A plain checkpoint has no reference."""
    by_title, answers, dtype = {}, {}, getattr(torch, options.dtype)
    init, device, values = run.training["init"], options.device, options.chat_template_kwargs
    load = functools.cache(lambda dtype: load_checkpoint(run.folder, device, dtype, values))
    stored = getattr(torch, run.training["weights"])  # rounds the reference as in training
    reference = functools.cache(
        lambda: init and Llama.from_pretrained(init, stored, device).float()
    )
    for title, (path, rows) in run.data.items():
        if isinstance(rows, Pairs):
            model, _ = load(torch.float32)
            by_title |= pair_columns(model, reference(), path, title, rows, run.training)
            continue
        model, tokenizer = load(dtype)
        questions = model, tokenizer, path, rows
        if rows[0].choices:
            logps = answer_logps(model, choice_rows(*questions), *LAYOUT, dtype)
            by_title[title] = choice_columns(rows, [x.double().numpy() for x in logps])
            answers[title] = [x.tolist() for x in logps]
        else:
            title += f", temperature {options.temperature:g}" if options.temperature else ", greedy"
            by_title[title], answers[title] = answer_columns(*questions, options)
    if run.is_demonstration:
        samples = options.n if options.n > 1 else SAMPLES
        columns = task_columns(*load(torch.float32), TEST_PROBLEMS, samples)
        by_title = {"problems": columns} | by_title
    return by_title, answers


# --- The command ----------------------------------------------------------------------------------


# fmt: off
@dataclasses.dataclass(frozen=True)
class Options(DataOptions):
    n: int = option(1, "answers to sample per question, for pass@k and maj@n", least=1, most=1024)
    temperature: float | None = option(None, "sampling temperature; 0 is greedy (default: 0, or 1 "
                                       "with --n > 1)", least=0)
    top_p: float = option(1.0, "probability mass kept by nucleus sampling", least=1e-6, most=1)
    max_new_tokens: int = option(256, "maximum number of tokens in a generated answer", least=1)
    batch_size: int | None = option(None, "answers to generate at a time (default: as many as "
                                    "a cache of 65,536 tokens holds)", least=1)
    seed: int = option(0, "seed of the sampled answers", least=0)
    dtype: str | None = option(None, "dtype for answering questions (default: bfloat16 on a GPU)",
                               choices=("float32", "bfloat16"))
    device: str = option("auto", "cpu, cuda, cuda:N, or auto for a GPU if there is one")
    plot: str | None = option(None, "file (.png, .pdf or .svg) for the curves of training")
    out: str | None = option(None, "JSON file for all results (default: eval.json in each run)")
# fmt: on


def parse_options(parser: Parser, argv: list[str] | None) -> tuple:
    """Returns the runs, the files of --data, the texts of --prompt (None without the flag), and the
    Options with defaults filled in. Raises OSError or ValueError for bad input."""
    help = "runs or checkpoints, by folder or ORGANISATION/NAME; the first is the baseline"
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help=help)
    help = "files of questions, of questions with choices, or of pairs"
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help=help)
    help = "show the runs' answers to texts, or to the lines of standard input if there is no TEXT"
    parser.add_argument("--prompt", nargs="*", action="extend", metavar="TEXT", help=help)
    add_options(parser, Options)
    flags = vars(parser.parse_args(argv))
    runs, data, prompts = flags.pop("runs"), flags.pop("data"), flags.pop("prompt")
    fields = {field.name: field for field in dataclasses.fields(Options)}
    flags = {name: check_value(fields[name], v) for name, v in flags.items() if v is not None}
    options = Options(**flags)
    device, temperature = pick_device(options.device), options.temperature
    temperature = float(options.n > 1) if temperature is None else temperature
    if options.n > 1 and temperature == 0:
        raise ValueError(f"--n {options.n}: all greedy answers are equal; use --temperature 1")
    if prompts is not None and (data or options.out or options.plot):
        raise ValueError("--prompt only shows answers; leave out --data, --out and --plot")
    folders = [Path(run).resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{max(folders, key=folders.count)}: is named twice; name it once")
    for file in filter(None, (options.plot, options.out)):
        if Path(file).is_dir() or not Path(file).parent.is_dir():
            raise ValueError(f"{file}: must be the name of a file in a folder that exists")
    if options.out and Path(options.out).exists():
        raise ValueError(f"--out {options.out}: the file exists; choose another name")
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    filled = {"temperature": temperature, "device": device, "dtype": dtype}
    return runs, data, prompts, dataclasses.replace(options, **filled)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Evaluates and compares runs, prints tables and writes results. Returns a dict from runs to
    dicts from columns to means. With several files, the columns are called "FILE: column"."""
    parser = Parser("eval.py", __doc__)
    try:
        runs, data, prompts, options = parse_options(parser, argv)
        names = {Path(run).name: run for run in runs}
        names = names if len(names) == len(runs) else {run: run for run in runs}
        if prompts is not None:
            from support.outcome import side_by_side  # imports this file

            prompts = prompts or [line.strip() for line in sys.stdin if line.strip()]
            if not all(text.strip() for text in prompts or [""]):
                raise ValueError("--prompt: there is no text; write a TEXT or a line of input")
            print(side_by_side(names, prompts, options))
            return {}
        files = {path: read_items(path, options.columns) for path in data}
        parsed = {name: read_run(Path(run), files, options) for name, run in names.items()}
        if options.plot:
            plot({name: [Path(run)] for name, run in names.items()}, Path(options.plot))
        results = {name: evaluate(run, options) for name, run in parsed.items()}
    except (OSError, ValueError) as error:
        parser.error(error)
    tables = {}
    for title in dict.fromkeys(title for found, _ in results.values() for title in found):
        columns = {name: found[title] for name, (found, _) in results.items() if title in found}
        tables[title] = compared(columns)
        print(f"{title}\n\n{table(tables[title], markdown=not sys.stdout.isatty())}\n")
    provenance = {
        "argv": sys.argv[1:] if argv is None else argv,
        "options": {"runs": runs, "data": data, **dataclasses.asdict(options)},
        "sha256": {file: digest_file(file) for file in data},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    records, means = {}, {}
    for name, run in names.items():
        by_title, answers = results[name]
        figures = {title: rows[name] for title, rows in tables.items() if name in rows}
        record = provenance | {
            "figures": {t: {c: f._asdict() for c, f in row.items()} for t, row in figures.items()},
            "items": {t: {c: x.values.tolist() for c, x in b.items()} for t, b in by_title.items()},
            "answers": answers,
        }
        records[run] = json.loads(json.dumps(record), parse_constant=lambda nan: None)
        if not options.out and (Path(run) / "train_config.json").is_file():
            write_json(Path(run) / "eval.json", records[run])
        means[run] = {
            f"{title.split(',')[0]}: {column}" if len(files) > 1 else column: figure["mean"]
            for title, row in records[run]["figures"].items()
            for column, figure in row.items()
        }
    if options.out:
        write_json(Path(options.out), records)
    return means


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the console may lack some characters, such as ±
    main()
