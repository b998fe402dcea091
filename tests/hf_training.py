"""A small Llama with LoRA on all seven projections and Hugging Face's Trainer, on text that every Python has.

Run as a program it trains and is killed by SIGKILL after some steps: ``python hf_training.py FOLDER STEPS``.
"""

import ast
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from cylora.integrations.torch import CyloraAdamW

MODULES = ("argparse", "ast", "collections", "csv", "datetime", "decimal", "difflib", "email", "fractions", "functools",
           "heapq", "inspect", "json", "logging", "pathlib", "pickle", "random", "re", "statistics", "string",
           "textwrap", "threading", "typing", "unittest", "uuid", "zipfile")  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, BATCH = 48, 8
OPTIONS = {"lr": 2e-3, "weight_decay": 0.05, "betas": (0.9, 0.99)}


def corpus() -> bytes:
    """Return the documentation strings in the sources of some of Python's own modules."""
    texts = []
    for name in MODULES:
        tree = ast.parse(Path(str(importlib.util.find_spec(name).origin)).read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(texts).encode("ascii", "ignore")


def dataset() -> list[dict[str, Any]]:
    """Return the text as rows of bytes."""
    text = torch.frombuffer(bytearray(corpus()), dtype=torch.uint8).long()
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def llama(dtype: Any = torch.float32, hidden: int = 48, layers: int = 2) -> Any:
    """Return the same model at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=LENGTH, initializer_range=0.1,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).to(dtype)


class Recording(transformers.Trainer):
    """Keeps the loss of each step as it is; a Trainer's own log rounds it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def make_trainer(model: Any, folder: Path, steps: int, **options: Any) -> Recording:
    """Return a Trainer without clipping of its own, unless ``max_grad_norm`` is among the arguments' changes."""
    changes = options.pop("changes", {})
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "seed": 7,
        "lr_scheduler_type": "cosine", "warmup_steps": 10, "learning_rate": OPTIONS["lr"], "max_grad_norm": 0.0,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    } | changes  # fmt: skip
    return Recording(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=dataset(),
        data_collator=lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}, **options,
    )  # fmt: skip


def saving_trainer(folder: Path, steps: int, **options: Any) -> Recording:
    """Return one that uses our optimizer and saves every five steps."""
    kind = (CyloraAdamW, OPTIONS | {"max_grad_norm": 1.0})
    changes = {"save_strategy": "steps", "save_steps": 5}
    return make_trainer(llama(), folder, steps, optimizer_cls_and_kwargs=kind, changes=changes, **options)


class Killer(transformers.TrainerCallback):
    """Ends the process after so many steps, without a word."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    saving_trainer(Path(sys.argv[1]), int(sys.argv[2]), callbacks=[Killer(8)]).train()
