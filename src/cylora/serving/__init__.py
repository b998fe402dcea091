"""Training inside a server that is answering requests: what is served while others learn, and learning beside it."""

from cylora.serving.hooks import vllm_hook
from cylora.serving.jobs import Ticket
from cylora.serving.metrics import ServingMetrics
from cylora.serving.online import OnlineTrainer
from cylora.serving.publisher import AdapterPublisher
from cylora.serving.snapshot import AdapterSnapshot
from cylora.serving.stepping import StepTarget
from cylora.serving.store import AdapterStore

__all__ = [
    "AdapterPublisher",
    "AdapterSnapshot",
    "AdapterStore",
    "OnlineTrainer",
    "ServingMetrics",
    "StepTarget",
    "Ticket",
    "vllm_hook",
]
