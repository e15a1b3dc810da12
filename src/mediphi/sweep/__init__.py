"""Sweeps: every point judged before the first job, one process or Slurm job each, and a table."""

from mediphi.sweep.on_slurm import submit_sweep
from mediphi.sweep.plan import Plan, Point, expand, plan
from mediphi.sweep.runner import run_sweep

__all__ = ["Plan", "Point", "expand", "plan", "run_sweep", "submit_sweep"]
