"""The timeline of decode steps in `design.md`: a drawing of the order in which things happen, not a measurement.

python docs/draw_timeline.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGE = Path(__file__).parent / "img" / "decode_step.png"
LANES = {"host\n(scheduler thread)": 2, "schedule stream": 1, "forward stream": 0}
STOCK, OURS = "#d7dbe0", "#f5a55a"
STEP = 10.0  # length of a step, in no unit
HEIGHT = 0.5

# lane, start and end within a step, text, whether the work is ours
HOST = ((0.2, 1.5, "next\nbatch", STOCK), (1.5, 3.0, "plan\nevents", OURS), (3.0, 4.6, "launch\nstep", STOCK))
PREVIOUS = (
    (4.6, 5.8, "wait", "white"),
    (5.8, 7.5, "results of\nstep {previous}", STOCK),
    (7.5, 8.8, "settle\ncounts", OURS),
)
SCHEDULE = ((1.9, 3.3, "alloc,\nfree", OURS), (3.3, 4.6, "slots of\nthe step", STOCK))


def bar(axes: Axes, lane: int, start: float, end: float, text: str, color: str) -> None:
    """One piece of work."""
    axes.barh(lane, end - start, left=start, height=HEIGHT, color=color, edgecolor="#444444", linewidth=0.7)
    axes.text((start + end) / 2, lane, text, ha="center", va="center", fontsize=7)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, at: tuple[float, float]) -> None:
    """What waits for what."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#1f5fa8", "linewidth": 1.1})
    axes.text(*at, text, fontsize=7, color="#1f5fa8", ha="center", va="center")


def draw_step(axes: Axes, number: int, events: str) -> None:
    """One pass of the scheduler's loop, and its forward, which starts when the step is launched."""
    origin = STEP * number
    name = "n" if number == 0 else f"n+{number}"
    previous = "n-1" if number == 0 else ("n" if number == 1 else f"n+{number - 1}")
    for start, end, text, color in HOST + PREVIOUS:
        bar(axes, 2, origin + start, origin + end, text.format(previous=previous), color)
    for start, end, text, color in SCHEDULE:
        bar(axes, 1, origin + start, origin + end, text, color)
    forward = origin + 5.6
    if events:
        bar(axes, 0, forward, forward + 1.8, events, OURS)
    bar(axes, 0, forward + 1.8 * bool(events), forward + STEP, f"step {name}: metadata, layers, sampling", STOCK)
    axes.axvline(origin, color="#bbbbbb", linewidth=0.7, linestyle=":")
    axes.text(origin + 0.1, 2.55, f"iteration {name}", fontsize=8, color="#555555")


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, events in enumerate(("select", "", "condense")):
        draw_step(axes, number, events)
    for number in range(3):
        launch = STEP * number + 4.6
        arrow(axes, (launch, 1.73), (launch + 1.0, 0.27), "", (0, 0))
    arrow(
        axes, (15.6, 0.27), (16.4, 1.73), "counts of the select event, with\nthe other results of step n", (18.7, 0.85)
    )
    arrow(axes, (17.9, 2.28), (22.2, 2.28), "the condense event may run", (20.0, 2.42))
    note = "freed when planned: whoever gets the pages\nwrites them after the copy, on the same stream"
    axes.text(25.4, 1.0, note, fontsize=7, color="#1f5fa8", va="center")
    axes.set_yticks(list(LANES.values()), list(LANES), fontsize=9)
    axes.set(xlim=(0, 3.6 * STEP), ylim=(-0.45, 2.75), xticks=[])
    axes.barh(0, 0, color=OURS, label="HARD-KV")
    axes.barh(0, 0, color=STOCK, label="SGLang")
    axes.legend(loc="upper right", fontsize=8, ncols=2)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    figure.savefig(IMAGE, dpi=110)


if __name__ == "__main__":
    main()
