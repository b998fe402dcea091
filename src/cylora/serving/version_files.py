"""The files of one published version, as a PEFT directory or with a GGUF adapter."""

from collections.abc import Mapping
from typing import Any

from cylora.errors import InputError
from cylora.formats.durable import Content
from cylora.formats.gguf import BaseConfig, gguf_bytes
from cylora.formats.peft import peft_files
from cylora.serving.snapshot import AdapterSnapshot

__all__ = ["GGUF_NAME", "BaseConfig", "version_files"]

FORMATS = ("peft", "gguf")
GGUF_NAME = "adapter.gguf"


def version_files(
    snapshot: AdapterSnapshot, kind: str, dtype: str, base_config: BaseConfig | None
) -> Mapping[str, Content]:
    """Return the files by name. Their content may be the snapshot's own memory, which does not change."""
    adapters: Any = snapshot.adapters  # that it is an AdapterSet they check themselves
    if kind not in FORMATS:
        raise InputError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {kind!r}")
    if kind == "peft":
        if base_config is not None:
            raise InputError(f"base_config must be None with format='peft', got {type(base_config).__name__}")
        return peft_files(adapters, dtype=dtype, step=snapshot.step)
    if base_config is None:
        raise InputError("base_config must be the base model's config with format='gguf', got None")
    return {GGUF_NAME: gguf_bytes(adapters, base_config, dtype=dtype)}
