"""Every mutant."""

from __future__ import annotations

from tests.mutants.client import CLIENT
from tests.mutants.lending import LENDING
from tests.mutants.policies import POLICIES
from tests.mutants.router import CORE
from tests.mutants.worker import WORKER

MUTANTS = (*CORE, *POLICIES, *CLIENT, *WORKER, *LENDING)
