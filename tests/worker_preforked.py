"""A WSGI application that a pre-fork server loads in its parent: it trains there, and goes on in every child.

Loading trains with two threads, so that at the fork the pool has a helper, which no child inherits. Each request does
one step in the child that got it and answers: which process, how many steps it has behind it, what bits that gave.
"""

import hashlib
import json
import os
import threading

import numpy as np

from cylora import AdapterSet, Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.kernels.threads import configure, started

STEPS_IN_PARENT = 3
SIZE = 8192  # 131,072 parameters in two matrices: more than one thread's work


class Training:
    """A trainer, its adapters and its gradients, which the number of the step decides."""

    def __init__(self, threads):
        self.adapters = AdapterSet({"layer": (SIZE, SIZE)}, LoraConfig(rank=8), seed=0)
        self.gradients = Gradients(self.adapters)
        self.trainer = LoraTrainer(LoraTrainingConfig(warmup_steps=0, log_every=0, threads=threads))
        self._lock = threading.Lock()  # of the server's threads, if it has several

    def step(self):
        """Do the next step; return its number and the fingerprint of parameters and moments after it."""
        with self._lock:
            number = self.trainer.total_steps()
            rng = np.random.default_rng(number)
            rng.standard_normal(dtype=np.float32, out=self.gradients.vector)
            self.trainer.step(1.0, self.adapters, self.gradients)
            adam = self.trainer.state_dict()["adam"]
            parts = (self.adapters.flat.vector, np.asarray(adam["m"]), np.asarray(adam["v"]))
            return number + 1, hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def loaded():
    """Train as an application does that a server preloads, and return it."""
    configure("always")  # a helper for every step, also where this machine's cores would not pay for it
    training = Training(threads=2)
    for _ in range(STEPS_IN_PARENT):
        training.step()
    origin = {"loaded_in": os.getpid(), "helpers_at_the_fork": started()}

    def application(environ, start_response):
        """Step once and answer."""
        steps, fingerprint = training.step()
        answer = {**origin, "process": os.getpid(), "helpers": started(), "steps": steps, "fingerprint": fingerprint}
        body = json.dumps(answer).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return application
