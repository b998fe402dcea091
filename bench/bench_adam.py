"""``cylora.Adam.step`` on one vector, no clipping, against NumPy; cylora checks its gradient for NaN as well."""


def bench_adam(measure, case, peer):
    measure(case, peer)
