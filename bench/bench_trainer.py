"""The whole public ``LoraTrainer.step``, record and history included, against the bare update in NumPy."""


def bench_trainer(measure, case, peer):
    measure(case, peer)
