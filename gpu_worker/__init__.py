"""The GPU worker: one resident supernet, actuated in place, behind a pulling server."""

from superserve.moved import moved

# Names that docs/ or README have shown.
moved(
    __name__,
    {
        "actuation": "supernet.actuation", "calibration": "supernet.calibration",
        "control": "supernet.control", "eventlog": "serve.eventlog", "insertion": "supernet.insertion",
        "kinds": "models.kinds", "operators": "supernet.operators", "train_digits": "models.train_digits",
    },
)  # fmt: skip
