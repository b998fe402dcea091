"""``cylora.clip_grad_norm_``, clipping on every call, against NumPy."""


def bench_clip(measure, case, peer):
    measure(case, peer)
