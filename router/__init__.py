"""The router: one global earliest-deadline-first queue, policies, and the sockets around them."""

from superserve.moved import moved

# Names that docs/ or README have shown, or that users' policies import.
moved(
    __name__,
    {
        "baselines": "policies.baselines", "demand": "policies.demand", "demandfit": "policies.demandfit",
        "policy": "policies", "registry": "policies.registry", "slackfit": "policies.slackfit",
    },
)  # fmt: skip
