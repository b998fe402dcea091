"""cylora in torch and Hugging Face programs: an AdamW for their models, and PEFT models' adapters for a `LoraTrainer`.

Needs torch (extra ``torch``). PEFT and transformers are not needed: their objects are only looked at.
"""

import importlib

__all__ = ["CyloraAdamW", "wrap_peft_gradients", "wrap_peft_model"]


def _require_torch() -> None:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            "cylora.integrations.torch needs torch: pip install 'cylora[torch]'; for the build without CUDA, first "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        rule = "cylora.integrations.torch needs a torch with DLPack's C exchange (2.10 or newer)"
        raise ImportError(f"{rule}, got {torch.__version__}")


_require_torch()

from cylora.integrations.adamw import CyloraAdamW  # noqa: E402
from cylora.integrations.peft_model import wrap_peft_gradients, wrap_peft_model  # noqa: E402
