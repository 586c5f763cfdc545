"""What every test shares: hypothesis without deadlines, since a busy machine is not a bug."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

settings.register_profile("superserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# For `make mutants`: the same examples each time, and none made smaller, since only whether one fails counts.
settings.register_profile(
    "mutants",
    settings.get_profile("superserve"),
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("superserve")
