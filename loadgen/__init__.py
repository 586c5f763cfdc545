"""The load generator: open-loop arrivals, due-time latency, honest reports."""

from superserve.moved import moved

# Names that docs/ or README have shown.
moved(
    __name__,
    {
        "agreement": "study.agreement", "chaos": "simulator.chaos.__main__", "figures": "paper.figures",
        "reproduce": "paper.reproduce",
    },
)  # fmt: skip
