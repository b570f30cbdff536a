"""The job of a run: loads and checks everything that training reads, before a file is written.
Stands on mio.py, model.py and data.py."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Pairs, check_answers, load_pairs, mismatched_pairs, split_pairs
from mio import LOSSES
from model import Llama
from support import lora
from support.checkpoints import check_resumed, newest_checkpoint
from support.distributed import World
from support.files import digest, read_json
from support.on_policy import draws, load_questions, prompts_per_step
from support.questions import Item
from support.tokenizers import Tokenizer
from support.trained_run import load_checkpoint
from support.weights import weight_files


class Job(NamedTuple):
    """Everything that training reads."""

    options: object  # train.Options
    model: Llama
    tokenizer: Tokenizer
    pairs: Pairs  # to train on; empty if the policy draws them
    held_out: Pairs
    inputs: dict[str, str]  # hashes of the files that the run started from
    checkpoint: Path | None  # from which the run resumes
    record: dict  # of the checkpoint; {} for a new run
    world: World
    mismatched: Pairs | None = None  # the prompts of `pairs` with the answers of other rows (kto)
    questions: list[Item] | None = None  # to which the policy draws answers
    reference: Llama | None = None  # stays in memory if the policy draws answers

    @property
    def per_epoch(self) -> int:
        rows = self.pairs if self.questions is None else self.questions
        return math.ceil(len(rows) / prompts_per_step(self.options))

    @property
    def steps(self) -> int:
        """The steps of all epochs, over which the schedule of the learning rate extends."""
        return self.options.epochs * self.per_epoch

    @property
    def stop(self) -> int:
        """The last step of this run, which --max_steps may bring forward."""
        most = self.options.max_steps
        return self.steps if most is None else min(self.steps, most)


def load_job(options, world: World) -> Job:
    """Raises OSError or ValueError that names the file or flag and the remedy."""
    checkpoint = newest_checkpoint(Path(options.out)) if options.resume else None
    record = read_json(checkpoint / "training.json") if checkpoint else {}
    model, tokenizer, reference = load_models(options, checkpoint, world)
    loss, held_out, questions = LOSSES[options.loss], Pairs(), None
    if options.eval_data:
        held_out = load_pairs(options.eval_data, tokenizer, options.max_length)
    if draws(options):
        pairs, questions = Pairs(), load_questions(options, model, tokenizer)
    else:
        pairs = load_pairs(options.data, tokenizer, options.max_length)
        if not options.eval_data:
            pairs, held_out = split_pairs(pairs, options.eval_fraction, options.seed)
        check_answers(pairs, loss.answers, options.data, options.loss)
        check_answers(held_out, loss.answers, options.eval_data or options.data, options.loss)
    lengths = np.concatenate([pairs.lengths(), held_out.lengths()])  # (all pairs, 3)
    longest = int(max(lengths[:, 0] + lengths[:, 1:].max(axis=1), default=0))
    if longest > (context := model.config.max_position_embeddings):
        raise ValueError(f"a prompt with its answer has {longest} tokens, but the model reads "
                         f"{context}; lower --max_length")  # fmt: skip
    inputs = record.get("inputs", {}) | hash_inputs(options, pairs, held_out, questions)
    if not record or reference or lora.lora_of(model) or options.init != record["options"]["init"]:
        weights = sorted(weight_files(Path(options.init)))  # a resumed run reads them only here
        inputs["init"] = digest(*weights, Path(options.init) / "config.json")
    job = Job(options, model, tokenizer, pairs, held_out, inputs, checkpoint, record, world)
    job = job._replace(questions=questions, reference=reference)
    every = options.eval_every or max(1, math.ceil(job.steps / 10))
    job = job._replace(options=dataclasses.replace(options, eval_every=every))
    if loss.shared_of_mismatched:
        job = job._replace(mismatched=mismatched_pairs(pairs, longest, tokenizer.bos_id))
    if record:
        check_resumed(job)
    return job


def hash_inputs(options, pairs: Pairs, held_out: Pairs, questions) -> dict[str, str]:
    """Hashes of everything but the initial weights, by the flags that name them."""
    folder = options.init_adapter
    adapter = digest(*(Path(folder) / name for name in lora.ADAPTER_FILES)) if folder else ""
    data = digest(questions) if questions else hash_pairs(pairs)
    return {"data": data, "eval_data": hash_pairs(held_out), "init_adapter": adapter}


def hash_pairs(pairs: Pairs) -> str:
    return digest(pairs.ids.tobytes(), pairs.ends.tobytes())


def load_models(options, checkpoint: Path | None, world: World):
    """The policy from --init or from a checkpoint, the tokenizer, and the reference if the policy
    draws answers, otherwise None."""
    device = "cpu" if world.count > 1 else options.device  # sharding moves the model by blocks
    reference = None
    if options.lora_rank or options.init_adapter:
        model, tokenizer = load_checkpoint(options.init, "cpu", torch.float32)
        _add_adapter(model, options)  # in --dtype, so less moves to the device
        model.to(device)
        if draws(options):  # shares the frozen weights
            frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
            reference = copy.deepcopy(model, frozen)
        if checkpoint:
            lora.load_adapter(model, checkpoint)
    else:
        model, tokenizer = load_checkpoint(checkpoint or options.init, device, torch.float32)
        if draws(options):
            reference = Llama.from_pretrained(options.init, device=device)
    model.checkpointing = options.checkpointing == "on"
    if options.compile == "on" or (options.compile == "auto" and options.device != "cpu"):
        model.compile_blocks()
    return model, tokenizer, reference


def _add_adapter(model: Llama, options) -> None:
    """Adds the adapter of --init_adapter, or a new one."""
    folder, targets = options.init_adapter, options.lora_targets
    if folder:
        config = lora.LoraConfig.from_pretrained(folder)
    else:
        targets = lora.LORA_TARGETS.get(targets) or targets.split(",")
        config = lora.LoraConfig(
            options.lora_rank, options.lora_alpha, targets, options.lora_rslora
        )
    torch.manual_seed(options.seed)
    try:
        lora.add_lora(model, config, getattr(torch, options.dtype))
    except ValueError as error:
        raise ValueError(f"{folder or options.init}: {error}") from None
    if folder:
        lora.load_adapter(model, folder)
