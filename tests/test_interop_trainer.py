"""Hugging Face's Trainer with our optimizer: the curves of torch's AdamW, resuming after kill -9, PEFT's LoRA+."""

import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LOSS_ULP = 2.0**-21  # of a float32 between 4 and 8
NOISE = 8 * LOSS_ULP  # what a loss in float32 may be off after 200 steps


@pytest.fixture(scope="module")
def hf() -> Iterator[SimpleNamespace]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hf_training
        import peft
        import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(training=hf_training, torch=torch, peft=peft, adamw=hf_training.CyloraAdamW)
    torch.set_num_threads(threads)


def lora(model: Any) -> list[Any]:
    return [param for param in model.parameters() if param.requires_grad]


def flat(model: Any) -> np.ndarray:
    return np.concatenate([param.detach().double().numpy().ravel() for param in lora(model)])


def test_curves_are_torchs_and_those_of_float64(hf: SimpleNamespace, tmp_path: Path, figures: Any) -> None:
    """200 steps each: ours with its own clipping, torch's fused AdamW with the Trainer's, and that in float64."""
    options, losses, weights = hf.training.OPTIONS, {}, {}
    for name in ("ours", "torch", "float64"):
        model = hf.training.llama(hf.torch.float64 if name == "float64" else hf.torch.float32)
        kind = (hf.torch.optim.AdamW, options | {"fused": True})
        if name == "ours":
            kind = (hf.adamw, options | {"max_grad_norm": 1.0})
        trainer = hf.training.make_trainer(
            model, tmp_path, 200, optimizer_cls_and_kwargs=kind, changes={"max_grad_norm": float(name != "ours")}
        )
        trainer.train()
        losses[name], weights[name] = np.array(trainer.losses), flat(model)
        if name == "ours":
            assert trainer.optimizer.optimizer.grad_norm > 0
    assert losses["float64"][:10].mean() - losses["float64"][-10:].mean() > 0.5
    off = {name: np.abs(losses[name] - losses["float64"]) for name in ("ours", "torch")}
    drift = {name: float(np.median(np.abs(weights[name] - weights["float64"]))) for name in off}
    figures(
        **{f"{name}_loss_off_mean": float(one.mean()) for name, one in off.items()},
        **{f"{name}_loss_off_max": float(one.max()) for name, one in off.items()},
        **{f"{name}_weights_off_median": one for name, one in drift.items()},
    )
    assert off["ours"].max() <= NOISE
    assert off["torch"].max() <= NOISE
    assert np.abs(losses["ours"] - losses["torch"]).max() <= NOISE


def test_the_optimizer_alone_is_closer_to_float64_than_torchs(hf: SimpleNamespace, figures: Any) -> None:
    """With gradients in float64 at the optimizer's own float32 parameters: its arithmetic is all that differs."""
    torch = hf.torch
    rows = hf.training.dataset()[: 8 * 40]
    batches = [torch.stack([row["input_ids"] for row in rows[i : i + 8]]) for i in range(0, len(rows), 8)]
    finals = {}
    for name in ("ours", "torch", "float64"):
        model = hf.training.llama(torch.float64, hidden=32, layers=1)
        names = [key for key, param in model.named_parameters() if param.requires_grad]
        dtype = torch.float64 if name == "float64" else torch.float32
        params = [torch.nn.Parameter(model.get_parameter(key).detach().float().to(dtype)) for key in names]
        optimizer = (hf.adamw if name == "ours" else torch.optim.AdamW)(params, **hf.training.OPTIONS, fused=True)
        for ids in (*batches, *batches, *batches):
            wide = [param.detach().double().requires_grad_() for param in params]
            given = dict(zip(names, wide, strict=True))
            torch.func.functional_call(model, given, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
            for param, source in zip(params, wide, strict=True):
                param.grad = source.grad.to(dtype)
            optimizer.step()
        finals[name] = np.concatenate([param.detach().double().numpy().ravel() for param in params])
    off = {name: float(np.median(np.abs(finals[name] - finals["float64"]))) for name in ("ours", "torch")}
    figures(**{f"{name}_off_median": one for name, one in off.items()})
    assert off["ours"] <= off["torch"]


def test_resuming_after_kill_9_continues_to_the_same_bits(hf: SimpleNamespace, tmp_path: Path) -> None:
    """Saved every 5 steps, killed after the 8th, resumed by another process, which also trains without a break."""
    program = Path(hf.training.__file__)
    killed = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "killed"), "12"], capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-5"]
    resumed = hf.training.saving_trainer(tmp_path / "killed", 12)
    resumed.train(resume_from_checkpoint=True)
    whole = hf.training.saving_trainer(tmp_path / "whole", 12)
    whole.train()
    assert resumed.losses == whole.losses[5:]
    assert flat(resumed.model).tobytes() == flat(whole.model).tobytes()
    ours, others = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == others["param_groups"]
    for index, entry in others["state"].items():
        assert all(hf.torch.equal(ours["state"][index][key], value) for key, value in entry.items())


def test_a_trainer_takes_a_ready_optimizer_and_schedule(hf: SimpleNamespace, tmp_path: Path) -> None:
    results = []
    for kind in (hf.adamw, hf.torch.optim.AdamW):
        model = hf.training.llama()
        optimizer = kind(lora(model), **hf.training.OPTIONS)
        schedule = hf.torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = hf.training.make_trainer(model, tmp_path, 10, optimizers=(optimizer, schedule))
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        assert optimizer.param_groups[0]["lr"] == hf.training.OPTIONS["lr"] / 11
        results.append(np.array(trainer.losses))
    assert np.abs(results[0] - results[1]).max() <= NOISE


def test_pefts_lora_plus_takes_it(hf: SimpleNamespace, tmp_path: Path) -> None:
    """Four groups, of which one is empty, B's rates 16 times A's."""
    from peft.optimizers import create_loraplus_optimizer

    results = []
    for kind, options in ((hf.adamw, {"max_grad_norm": 0.5}), (hf.torch.optim.AdamW, {})):
        model = hf.training.llama()
        optimizer = create_loraplus_optimizer(model, kind, lr=2e-4, loraplus_lr_ratio=16, **options)
        assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-6, 2e-4, 2e-4 * 16, 2e-4 * 16]
        changes = {"max_grad_norm": 0.0 if options else 0.5, "lr_scheduler_type": "constant"}
        trainer = hf.training.make_trainer(model, tmp_path, 20, optimizers=(optimizer, None), changes=changes)
        trainer.train()
        results.append(np.array(trainer.losses))
    assert results[0][-1] < results[0][0]
    assert np.abs(results[0] - results[1]).max() <= NOISE
