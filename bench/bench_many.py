"""``cylora.step_many`` over adapters with a trainer each, against a loop of ``step``."""


def bench_many(measure, case, peer):
    measure(case, peer)
