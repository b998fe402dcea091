"""Files: adapters that servers load, checkpoints, and how they are written whole or not at all."""

from cylora.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cylora.formats.durable import publish_directory, published, replace_file
from cylora.formats.generations import list_generations, load_generation, save_generation
from cylora.formats.gguf import gguf_bytes, save_gguf
from cylora.formats.inspection import inspect, verify
from cylora.formats.peft import load_peft, peft_files, save_peft
from cylora.formats.trainer_state import save_trainer_state, trainer_state

__all__ = [
    "Checkpoint",
    "gguf_bytes",
    "inspect",
    "list_generations",
    "load_checkpoint",
    "load_generation",
    "load_peft",
    "peft_files",
    "publish_directory",
    "published",
    "replace_file",
    "save_checkpoint",
    "save_generation",
    "save_gguf",
    "save_peft",
    "save_trainer_state",
    "trainer_state",
    "verify",
]
