"""What every test shares: hypothesis without deadlines, since a busy machine is not a bug."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("superserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("superserve")
