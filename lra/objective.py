"""What training minimises: cross-entropy of the labels, and with `train.denoise` that of hidden tokens beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra.config import DenoiseConfig, TrainConfig
from lra.model import Classifier
from lra.packing import Packed
from tasks.batches import Batch

Finish = Callable[["Objective", Tensor, Packed, Batch, Tensor | None], Tensor]


class Objective(nn.Module):
    """The loss of a batch, a scalar: mean cross-entropy with label smoothing plus the denoising loss.

    Denoising, as the joint loss of accuracy notes' LOC runs and the pretraining of "Never Train from Scratch" (Amos et
    al. 2023): a random share of the tokens is hidden, and the encoder guesses them from the rest in the same pass that
    classifies. Share and weight fall linearly to 0 over the first `until` of all steps.
    """

    def __init__(self, model: Classifier, train: TrainConfig) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, train.label_smoothing
        self.denoise, self.steps = train.denoise, train.steps
        # On the device, so that a recorded step (CUDA graph) finds the factor of its own time here.
        self.register_buffer("factor", torch.ones(()), persistent=False)
        self.factor: Tensor
        # As the model's `parts`: its own function or a compiled form.
        self.finish: Finish = Objective.loss

    def begin(self, step: int) -> None:
        """Set what depends on the step; the host calls it before each one."""
        if self.denoise is not None:
            self.factor.fill_(denoise_factor(step, self.steps, self.denoise))

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss, float32."""
        hidden_T = None if self.denoise is None else hidden_tokens(batch, self.denoise.rate * self.factor)
        x_TE, packed = self.model.through(batch, hidden_T)
        return self.finish(self, x_TE, packed, batch, hidden_T)

    def loss(self, x_TE: Tensor, packed: Packed, batch: Batch, hidden_T: Tensor | None) -> Tensor:
        """Return the loss of what the layers gave."""
        x_TE = self.model.final_norm(x_TE)
        label_loss = self.label_loss(self.model.classify(x_TE, packed), batch)
        if self.denoise is None or hidden_T is None:
            return label_loss
        guessed = self.model.denoising_loss(x_TE, batch.tokens_T, hidden_T)
        return label_loss + self.denoise.weight * self.factor * guessed

    def label_loss(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of the labels."""
        return F.cross_entropy(logits_BC, batch.labels_B, label_smoothing=self.label_smoothing)


def denoise_factor(step: int, steps: int, denoise: DenoiseConfig) -> float:
    """Return the factor of share and weight at a step, counted from 0: 1 at first, 0 from `until` on."""
    return max(0.0, 1.0 - step / (denoise.until * steps))


def hidden_tokens(batch: Batch, rate: Tensor) -> Tensor:
    """Draw which rows are hidden, (T,) boolean: each token with probability `rate`, a CLS row or a spare one never."""
    device = batch.tokens_T.device
    rows = torch.arange(batch.tokens_T.shape[0], device=device)
    hidden_T = (torch.rand(rows.shape[0], device=device) < rate) & (rows < batch.cu_seqlens[-1])
    if batch.cls:
        hidden_T = hidden_T.index_fill(0, batch.cu_seqlens[1:].to(torch.int64) - 1, False)
    return hidden_T
