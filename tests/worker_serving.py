"""Train and publish at full rate into one root; tests/test_interop_serving.py starts it and loads what ``latest`` is.

``ROOT FORMAT KEEP BASE_CONFIG``; the first line of stdin is JSON, module name to [d_in, d_out]. Two publishers, "thin"
and "wide", of different rank and alpha take turns at ``latest``, so files of two versions do not go together. All
parameters of a version are equal, as in tests/test_serving_readers.py. Each further line of stdin says that another
load is done: between two of them at most KEEP / 2 versions of a name appear, so none is removed under a loader. At the
end of stdin it stops and prints how many versions there were.
"""

import json
import sys
import threading
from pathlib import Path

from training import make_trainer

from cylora import AdapterSet, Gradients, LoraConfig
from cylora.serving import AdapterPublisher

CONFIGS = {"thin": LoraConfig(rank=2, alpha=3.0), "wide": LoraConfig(rank=5, alpha=20.0)}


class Loads:
    """How many loads are done, and whether more will follow."""

    def __init__(self) -> None:
        self.changed, self.count, self.is_over = threading.Condition(), 0, False

    def follow(self) -> None:
        for _ in sys.stdin:
            with self.changed:
                self.count += 1
                self.changed.notify_all()
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def wait_beyond(self, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.count > count or self.is_over)


def publish(publisher: AdapterPublisher, adapters: AdapterSet, root: Path, options: dict, loads: Loads) -> None:
    trainer, gradients = publisher._trainer, Gradients(adapters)
    seen, since = 0, 0
    while not loads.is_over:
        gradients.vector.fill(1.0 if adapters.flat.vector[0] > 0.1 else -1.0)  # it swings between 0.05 and 0.15
        trainer.step(1.0, adapters, gradients)
        publisher.publish_to(root, **options)
        seen, since = (seen, since + 1) if loads.count == seen else (loads.count, 1)
        if since >= options["keep"] // 2:
            loads.wait_beyond(seen)


def main(root: Path, kind: str, keep: int, base_config: str) -> None:
    shapes = json.loads(sys.stdin.readline())
    options = {"format": kind, "keep": keep, "base_config": base_config or None}
    loads, failed, publishers = Loads(), [], []

    def guarded(*arguments: object) -> None:
        try:
            publish(*arguments)
        except BaseException as error:
            failed.append(repr(error))
            raise

    threads = [threading.Thread(target=loads.follow)]
    for name, config in CONFIGS.items():
        adapters = AdapterSet({module: tuple(shape) for module, shape in shapes.items()}, config, seed=0)
        adapters.flat.vector.fill(0.1)
        trainer = make_trainer(learning_rate=1e-3, history_limit=10)
        publishers.append(AdapterPublisher(adapters, trainer, name=name))
        threads.append(threading.Thread(target=guarded, args=(publishers[-1], adapters, root, options, loads)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"failed": failed, "published": [one.counters()["published"] for one in publishers]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
