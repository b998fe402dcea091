"""Train LoRA adapters on the CPU: global-norm clipping and fused Adam in Cython, the trainer around them in Python.

>>> import cylora
>>> adapter = cylora.LoraAdapter(512, 512, seed=0)
>>> trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(learning_rate=1e-3))
>>> # for each batch: compute loss, grad_a, grad_b; then
>>> # record = trainer.step(loss, adapter, grad_a, grad_b)
"""

from cylora import trackers
from cylora.adapter import AdapterSet, GradientPair, Gradients, LoraAdapter
from cylora.config import LoraConfig, LoraTrainingConfig
from cylora.early_stopping import EarlyStopping
from cylora.errors import (
    ConfigError,
    CyloraError,
    DeadlineError,
    DivergenceError,
    DroppedError,
    FormatError,
    InputError,
    NonFiniteGradientError,
    PublishError,
    StateError,
    StoreError,
    TaskError,
    TrainerBusyError,
)
from cylora.flat import FlatBuffer
from cylora.history import TrainingHistory, TrainingStep
from cylora.many import step_many
from cylora.optimizer import Adam, clip_grad_norm_, grad_norm
from cylora.overrides import AdamParams
from cylora.trainer import LoraTrainer

__all__ = [
    "Adam",
    "AdamParams",
    "AdapterSet",
    "ConfigError",
    "CyloraError",
    "DeadlineError",
    "DivergenceError",
    "DroppedError",
    "EarlyStopping",
    "FlatBuffer",
    "FormatError",
    "GradientPair",
    "Gradients",
    "InputError",
    "LoraAdapter",
    "LoraConfig",
    "LoraTrainer",
    "LoraTrainingConfig",
    "NonFiniteGradientError",
    "PublishError",
    "StateError",
    "StoreError",
    "TaskError",
    "TrainerBusyError",
    "TrainingHistory",
    "TrainingStep",
    "clip_grad_norm_",
    "grad_norm",
    "step_many",
    "trackers",
]

__version__ = "0.1.0"
