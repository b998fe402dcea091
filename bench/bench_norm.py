"""The global L2 norm: ``cylora.grad_norm`` (float64 sums, finite or an error) against NumPy."""


def bench_norm(measure, case, peer):
    measure(case, peer)
