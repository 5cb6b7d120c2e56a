"""Checks with libraries that own the training loop, on tiny models made from configurations; nothing is downloaded."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import torch
from torch import Tensor

import l2o
from l2o.types import ConfigurationError, UpdateRule
from meta_train.library_checks.problem import STEPS, Net, alone, check_equal, check_same, loss_at, make, values


def language_model() -> Any:
    """A GPT-2 of one block, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, **none))


def sentences() -> list[dict[str, Tensor]]:
    """Of tokens ``[8]``, each its own target."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def hugging_face(rule: UpdateRule) -> None:
    """`transformers.Trainer` with a schedule of its own trains, saves, and goes on as if never stopped."""
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.optimization import get_cosine_schedule_with_warmup
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def trainer(folder: str) -> Any:
        model = language_model()
        optimizer = make(model.parameters(), rule)
        arguments = TrainingArguments(
            folder, max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[], disable_tqdm=True,
            use_cpu=True, logging_steps=4, dataloader_pin_memory=False,
        )  # fmt: skip
        optimizers = (optimizer, get_cosine_schedule_with_warmup(optimizer, 1, 8))
        made = Trainer(model, arguments, train_dataset=sentences(), optimizers=optimizers)
        made.remove_callback(PrinterCallback)
        return made

    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = trainer(folder), trainer(folder)
        whole.train()
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    check_equal(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))
    assert whole.optimizer.param_groups[0]["run"]["step"] == 8
    assert not torch.equal(whole.model.lm_head.weight, language_model().lm_head.weight)


def low_rank() -> None:
    """Under LoRA of `peft` the adapters train, by the trainer's own loop or not, and the model under them stays."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(language_model(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = l2o.LearnedOptimizer(l2o.param_groups(model), "default", total_steps=40)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {key: torch.stack([each[key] for each in sentences()]) for key in ("input_ids", "labels")}
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for name, p in model.named_parameters():
        assert p.requires_grad is not torch.equal(p, before[name]), name


def accelerated(rule: UpdateRule) -> None:
    """`accelerate` trains as a loop of one's own does, with accumulation, and saves and loads what it trains.

    A loss goes in as a closure, which it passes on; by name it does not, and a loss in the closure's place is an error.
    """
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = _prepared(accelerator, rule)
    with tempfile.TemporaryDirectory() as folder:
        for step in range(STEPS):
            if step == 2:
                accelerator.save_state(folder)
                accelerator.free_memory()
                model, optimizer = _prepared(accelerator, rule)
                accelerator.load_state(folder)
            losses = []
            for start in (0, 4):
                with accelerator.accumulate(model):
                    losses.append(loss_at(model, step, slice(start, start + 4)))
                    accelerator.backward(losses[-1])
                    mean = torch.stack(losses).mean().detach()
                    optimizer.step(lambda mean=mean: mean)
                    optimizer.zero_grad()
    check_same(values(accelerator.unwrap_model(model)), alone(rule))
    try:
        optimizer.step(torch.ones(()))
        said = "no error"
    except ConfigurationError as error:
        said = str(error)
    assert "lambda: loss" in said, said


def _prepared(accelerator: Any, rule: UpdateRule) -> Any:
    model = Net()
    return accelerator.prepare(model, make(model.parameters(), rule))
