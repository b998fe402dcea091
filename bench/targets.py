"""What cylora must reach, in one place: the ratio of a peer's time to cylora's on a case, both in the same run."""

from collections.abc import Iterable
from dataclasses import dataclass

from roster import BF16, CYLORA, EIGHT_BIT, IN_PLACE, NUMBA, THINC, TORCH, TORCH_MANY
from turns import OK, Result

RUST = "the Rust original"  # is not a Python peer; its figures are not measured here


@dataclass(frozen=True, slots=True)
class Target:
    """``against`` must take at least ``wanted`` times as long as ``peer``."""

    case: str
    against: str
    wanted: float
    threads: int = 1
    against_threads: int = 1
    peer: str = CYLORA
    subject: str = "trainer"
    cache: str = "warm"

    def needs(self) -> list[tuple[str, int]]:
        """Return the peers, with their threads, that this target compares."""
        return [(self.peer, self.threads), (self.against, self.against_threads)]


def _both(case: str, against: str, wanted: float, **more: str) -> Target:
    return Target(case, against, wanted, 2, 2, **more)


def _cold(case: str, against_torch: float, against_numpy: float) -> list[Target]:
    """Against torch with its two threads, cylora with one."""
    return [
        Target(case, TORCH, against_torch, 1, 2, cache="cold"),
        Target(case, IN_PLACE, against_numpy, cache="cold"),
    ]


TARGETS = (
    Target("192", IN_PLACE, 8.7),
    Target("192", TORCH, 80),
    Target("192", THINC, 4),
    Target("192", RUST, 1.0),
    Target("8,192", IN_PLACE, 6.3),
    Target("8,192", TORCH, 28),
    Target("8,192", NUMBA, 2.1),
    Target("131,072", IN_PLACE, 3.5),
    Target("131,072", TORCH, 3.4),
    Target("131,072", NUMBA, 1.0),
    _both("131,072", TORCH, 5),
    _both("131,072", NUMBA, 1.0),
    Target("1,048,576", TORCH, 2.0),
    _both("1,048,576", TORCH, 2.3),
    Target("448 x 4,096", TORCH, 4.5),
    Target("448 x 4,096", IN_PLACE, 6),
    Target("448 x 4,096", NUMBA, 1.5),
    _both("10,485,760", TORCH, 1.3),
    _both("10,485,760", TORCH, 1.9, peer=BF16),
    _both("10,485,760", TORCH, 2.5, peer=EIGHT_BIT),
    _both("448 x 65,536", TORCH, 1.5),
    _both("448 x 65,536", TORCH, 2, peer=BF16),
    _both("448 x 65,536", TORCH, 2, peer=EIGHT_BIT),
    *_cold("192", 60, 8),
    *_cold("8,192", 30, 5),
    *_cold("131,072", 8, 3.5),
    Target("10,000 adapters", TORCH_MANY, 30, subject="many"),
)


def verdicts(results: Iterable[Result]) -> list[dict[str, str | float | None]]:
    """Return a row for each target: what is compared, the ratio wanted and measured, and whether it is reached."""
    found = {(r.subject, r.cache, r.case, r.peer, r.threads): r for r in results}
    rows = []
    for target in TARGETS:
        own, other = (found.get((target.subject, target.cache, target.case, *need)) for need in target.needs())
        ratio, reached = None, "not measured"
        if other is not None and other.status != OK:
            reached = f"not measured: {target.against} {other.status}"
        elif own is not None and other is not None:
            ratio = other.median_us / own.median_us
            reached = "yes" if ratio >= target.wanted else "NO"
        suffix = "" if target.against_threads == target.threads else f", {target.against_threads} threads"
        rows.append(
            {
                "case": target.case + (", cold caches" if target.cache == "cold" else ""),
                "threads": target.threads,
                "cylora": target.peer,
                "against": target.against + suffix,
                "wanted": target.wanted,
                "measured": ratio,
                "reached": reached,
            }
        )
    return rows
