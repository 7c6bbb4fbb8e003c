"""How much memory a run will take and how much its processes will send, worked out before anything is launched."""

from __future__ import annotations

from alignment.parallel.plan.arguments import Sizes
from alignment.parallel.plan.models import find_shapes
from alignment.parallel.plan.planning import Plan, plan

__all__ = ["Plan", "Sizes", "find_shapes", "plan"]
