"""The picture of a run: above, nanoseconds per parameter over size with the machine's limits; below, the ratios."""

from pathlib import Path
from typing import Any

from limits import MEMORY_BINDS_FROM, Limits
from roster import BF16, CYLORA, EIGHT_BIT
from turns import OK, Result

OWN = (CYLORA, BF16, EIGHT_BIT)


def draw(results: list[Result], limits: dict[int, Limits], machine: dict[str, Any], path: Path) -> bool:
    """Draw the steps, one column for each cache and number of threads; False without matplotlib or without steps."""
    steps = [r for r in results if r.subject == "trainer" and r.status == OK]
    columns = sorted({(r.cache != "warm", r.threads) for r in steps})
    try:
        import matplotlib  # noqa: PLC0415 - last, so that the tables need none
    except ImportError:
        return False
    if not steps:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(
        2, len(columns), figsize=(1.5 + 4.6 * len(columns), 9.5), squeeze=False, sharex="col", sharey="row"
    )
    others = [name for name in dict.fromkeys(r.peer for r in steps) if name not in OWN]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"} for i, name in enumerate(others)
    }
    for name, line in zip(OWN, ("-", "--", ":"), strict=True):
        styles[name] = {"color": "black", "linewidth": 2.2, "linestyle": line}
    for (top, bottom), (is_cold, threads) in zip(panels.T, columns, strict=True):
        chosen = [r for r in steps if (r.cache != "warm", r.threads) == (is_cold, threads)]
        base = {r.case: r.median_us for r in chosen if r.peer == CYLORA}
        for name in (*others, *OWN):
            mine = sorted((r for r in chosen if r.peer == name), key=lambda r: r.parameters)
            _line(top, mine, [r.median_us * 1e3 / r.parameters for r in mine], name, styles[name])
            if name != CYLORA:
                _line(bottom, mine, [r.median_us / base[r.case] for r in mine], name, styles[name])
        _limits(top, limits[threads], max(r.parameters for r in chosen))
        bottom.axhline(1.0, color="black", linewidth=2.2)
        top.set_title(f"{'cold' if is_cold else 'warm'} cache, {threads} thread{'s' if threads > 1 else ''}")
        bottom.set_xlabel("parameters (hollow: a model of 448 matrices)")
        for panel in (top, bottom):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
    ticks = [0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 400]
    panels[1][0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    ticks = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
    panels[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for panel in panels.flat:
        panel.minorticks_off()
    panels[0][0].set_ylabel("nanoseconds per parameter")
    panels[1][0].set_ylabel("time of the peer / time of cylora")
    entries = {
        text: line for panel in panels.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(
        "one step: clip and AdamW. {cpu}, {isa}, Python {python}, NumPy {numpy}, {date}".format(**machine), fontsize=11
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _line(panel: Any, results: list[Result], values: list[float], name: str, style: dict[str, Any]) -> None:
    """Lone adapters on a line; models beside it, since it is the number of matrices that makes them slow."""
    lone = [(r.parameters, value) for r, value in zip(results, values, strict=True) if " x " not in r.case]
    models = [(r.parameters, value) for r, value in zip(results, values, strict=True) if " x " in r.case]
    if lone:
        panel.plot(*zip(*lone, strict=True), marker="o", markersize=4, label=name, **style)
    if models:
        panel.plot(*zip(*models, strict=True), "D", mfc="none", color=style["color"])


def _limits(panel: Any, limits: Limits, largest: int) -> None:
    if limits["divider_ns"] is not None:
        panel.axhline(limits["divider_ns"], color="crimson", linestyle="-.", label="limit: square root and division")
    if largest > MEMORY_BINDS_FROM:
        reach = [MEMORY_BINDS_FROM, largest * 1.3]
        panel.plot(
            reach, [limits["memory_ns"]] * 2, color="crimson", linestyle="-", linewidth=3, alpha=0.5,
            label="limit: memory, 32 bytes per parameter",
        )  # fmt: skip
