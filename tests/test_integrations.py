"""Without torch: cylora does without it, and what needs it says what to install."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

TORCH = "cylora.integrations.torch"


@pytest.fixture
def without_ours(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Forget that our modules were ever imported; afterwards they are as before."""
    for name in [name for name in sys.modules if name.startswith("cylora.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def test_torch_missing_says_what_to_install(without_ours: pytest.MonkeyPatch) -> None:
    without_ours.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"integrations.torch needs torch: pip install 'cylora\[torch\]'") as info:
        importlib.import_module(TORCH)
    assert "https://download.pytorch.org/whl/cpu" in str(info.value)
    assert isinstance(info.value.__cause__, ImportError)


def test_an_old_torch_is_refused(without_ours: pytest.MonkeyPatch) -> None:
    old = ModuleType("torch")
    old.Tensor, old.__version__ = type("Tensor", (), {}), "2.4.0"
    without_ours.setitem(sys.modules, "torch", old)
    with pytest.raises(ImportError, match=r"needs a torch with DLPack's C exchange \(2.10 or newer\), got 2.4.0"):
        importlib.import_module(TORCH)


def test_cylora_works_while_torch_cannot_be_imported() -> None:
    """Everything but the integration, in a process where importing torch, PEFT or transformers would fail."""
    program = """
import sys
for name in ("torch", "peft", "transformers", "accelerate"):
    sys.modules[name] = None
import numpy as np, cylora, cylora.formats, cylora.cli, cylora.integrations
adapter = cylora.LoraAdapter(8, 4, seed=0)
trainer = cylora.LoraTrainer(cylora.LoraTrainingConfig(warmup_steps=0))
print(trainer.step(1.0, adapter, np.ones((8, 8), np.float32), np.ones((4, 8), np.float32)).grad_norm ** 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert round(float(done.stdout)) == 96
