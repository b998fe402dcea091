"""Training inside a server that is answering requests: published snapshots for those who serve while others train."""

from cylora.serving.hooks import vllm_hook
from cylora.serving.publisher import AdapterPublisher
from cylora.serving.snapshot import AdapterSnapshot

__all__ = ["AdapterPublisher", "AdapterSnapshot", "vllm_hook"]
