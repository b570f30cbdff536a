"""Shows the outcome of runs: a run's table, what happened in the demonstration, and the answers of
several models side by side (eval.py --prompt). Imports data.py, eval.py and model.py."""

import shlex
import textwrap
from pathlib import Path

import torch

from data import LAYOUT
from eval import answer_logps, preference_columns, reward_scale
from model import Llama
from support import builtin_task
from support.cli import stage
from support.curves import read_curves
from support.figures import Column, Row, write_columns
from support.questions import Item
from support.sampling import answer_text, sample_answers, sample_ids
from support.trained_run import load_checkpoint

BLOCKS = "▁▂▃▄▅▆▇█"


def answers_of(folder, prompts: list[str], options) -> list[list[str]]:
    """Returns options.n answers of the model in a folder to each prompt. With a chat template, a
    prompt is a user's message. Raises OSError or ValueError for a bad folder or a long prompt."""
    dtype, values = getattr(torch, options.dtype), options.chat_template_kwargs
    model, tokenizer = load_checkpoint(folder, options.device, dtype, values)
    if tokenizer.template:
        items = [[{"role": "user", "content": prompt}] for prompt in prompts]
    else:  # a problem of the built-in task ends with a newline
        newline = "\n" if builtin_task.solves_problems(folder) else ""
        items = [prompt + newline for prompt in prompts]
    ids = [Item(0, item, "", None).ids(tokenizer) for item in items for _ in range(options.n)]
    room = model.config.max_position_embeddings - max(map(len, ids))
    if room < 1:
        raise ValueError("--prompt: fills the model's context; shorten it")
    kwargs = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    kwargs |= {"rows": options.batch_size, "stop_ids": tokenizer.stop_ids}
    answers = sample_ids(model, ids, min(options.max_new_tokens, room), **kwargs)
    texts = [answer_text(tokenizer, answer)[0] for answer in answers]
    return [texts[i : i + options.n] for i in range(0, len(texts), options.n)]


def side_by_side(runs: dict[str, Path], prompts: list[str], options) -> str:
    """Returns text of at most 80 columns: each prompt, and below it the answers of each run."""
    answers, lines = {name: answers_of(run, prompts, options) for name, run in runs.items()}, []
    width = min(max(map(len, runs)), 46)
    for i, prompt in enumerate(prompts):
        lines += [x for line in prompt.splitlines() for x in textwrap.wrap(line, 80)] + [""]
        for name, of_prompts in answers.items():
            for text in of_prompts[i]:
                parts = [x for line in text.splitlines() for x in textwrap.wrap(line, 76 - width)]
                lines += [f"  {name[-width:]:{width}}  {x}" for x in parts[:1] or ["(empty)"]]
                lines += [f"  {'':{width}}  {x}" for x in parts[1:]]
        lines.append("")
    return "\n".join(lines)


def outcome(job, start_logps: torch.Tensor, logps: torch.Tensor) -> dict[str, Row]:
    """Writes items.json, the values of each held-out pair and problem, and returns the rows of the
    run's table. start_logps, logps: held-out log-probs at step 0 and now, (pairs, 2) in nats."""
    options, init = job.options, Path(job.options.init)
    scale = reward_scale(torch.from_numpy(job.held_out.lengths()[:, 1:]), **vars(options))
    path = options.eval_data or options.data
    columns = preference_columns(logps, start_logps, job.held_out, scale, path)
    found = {"run": {n: columns[n] for n in ("Δ chosen", "Δ rejected", "reward") if n in columns}}
    change = {}
    if builtin_task.is_demonstration(init):
        base = builtin_task.base_columns(init, options.device)
        with stage("evaluation: the trained model on the held-out problems"):
            # float32 also after --weights bfloat16, as in eval.py
            trained = builtin_task.task_columns(job.model.float(), job.tokenizer)
        found = {"base": base, "run": trained | found["run"]}
        # Both models answered the same problems, so the differences are paired.
        change = {n: Column(trained[n].values - base[n].values) for n in trained}
    write_columns(Path(options.out) / "items.json", found)
    found[options.loss] = found.pop("run")
    found |= {"change": change} if change else {}
    return {n: {c: x.estimate() for c, x in columns.items()} for n, columns in found.items()}


def what_happened(job) -> str:
    """Returns text on a run of the demonstration: the first three test problems that the base and
    the trained model answer differently, log-probs over training, and two commands to try next."""
    run, base, loss = Path(job.options.out), job.options.init, job.options.loss
    model, tokenizer = job.model, job.tokenizer
    before = Llama.from_pretrained(base, device=model.head_weight.device)
    models, lines = {"base": before, loss: model}, ["", "Greedy answers that changed:"]
    questions = builtin_task.problems("test", 200, seed=0)
    found = [sample_answers(m, tokenizer, questions, temperature=0) for m in models.values()]
    changed = [i for i, (a, b) in enumerate(zip(*found)) if a != b and all(a + b)]
    for i in changed[:3]:
        lines.append(f"  {questions[i].strip()}")
        for (name, of_run), answers in zip(models.items(), found):
            (text,) = answers[i]
            ids = tokenizer.prompt_ids(questions[i]), [*tokenizer.encode(text), tokenizer.end_id]
            (logp,) = answer_logps(of_run, [ids], *LAYOUT, torch.float32)[0].tolist()
            verdict = "right" if builtin_task.is_correct(questions[i], text) else "wrong"
            line = " | ".join(text.splitlines())
            lines.append(f"    {name[:9]:9} {line:42.42} {verdict}, log-prob {logp:.1f}")
    curves = {side: read_curves(run)[f"logps/{side}"][1] for side in ("chosen", "rejected")}
    changes = {side: values - values[0] for side, values in curves.items()}
    low = min(values.min() for values in changes.values())
    scale = 7 / max(max(values.max() for values in changes.values()) - low, 1e-9)
    lines += ["", "Mean log-prob of held-out answers over training, in nats, on one scale:"]
    for side, change in changes.items():
        blocks = "".join(BLOCKS[round(scale * (x - low))] for x in change)
        lines.append(f"  {side:9} {curves[side][0]:6.2f} {blocks} {curves[side][-1]:.2f}")
    grid = f"python train.py --loss {shlex.quote(','.join(dict.fromkeys((loss, 'dpo', 'sft'))))}"
    folders = shlex.join([str(base), str(run)])
    lines += ["", "Next:", f'  python eval.py {folders} --prompt "7+9-3+5"']
    return "\n".join([*lines, f"  {grid} --seed 0,1,2 --jobs 2"])
