"""Everything that training changes from iteration to iteration, in one place."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel


@dataclass
class TrainState:
    """What a step changes and a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # a disabled one hands everything through
    ema: AveragedModel | None = None  # moving averages of the model's weights
