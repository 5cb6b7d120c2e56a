"""The check with Lightning, which is imported here alone."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from l2o.types import UpdateRule
from meta_train.library_checks.problem import STEPS, Net, alone, check_same, loss_at, make, values

_SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of the trainer under which it shows and writes nothing."""


class Lit(LightningModule):
    """`Net` on the batch of each step.  manual: steps are taken by hand, with ``step(loss=...)``."""

    def __init__(self, rule: UpdateRule, manual: bool) -> None:
        super().__init__()
        self.net, self.rule, self.automatic_optimization = Net(), rule, not manual

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss."""
        loss = loss_at(self.net, self.trainer.global_step)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step(loss=loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The plug-in."""
        return make(self.net.parameters(), self.rule)


def lightning(rule: UpdateRule, manual: bool = False) -> None:
    """Lightning's `Trainer` trains as a loop of one's own does, by its closures or by hand, and goes on as if never
    stopped."""
    batches = DataLoader(TensorDataset(torch.arange(STEPS // 2)))
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (1, 2):  # the second from the first one's checkpoint
            module, path = Lit(rule, manual), f"{folder}/half.ckpt"
            trainer = Trainer(max_epochs=epochs, default_root_dir=folder, **_SILENT)
            trainer.fit(module, batches, ckpt_path=path if epochs == 2 else None)
            trainer.save_checkpoint(path)
    check_same(values(module.net), alone(rule))
