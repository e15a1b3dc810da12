"""Hydra's view of a sweep: `-m` and `hydra.sweeper.params` end in `mediphi.sweep`.

Hydra takes sweepers only from the name space `hydra_plugins` and imports this file at the start of
every Hydra program, so nothing but Hydra is imported above. `conf/config.yaml` picks it.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessSweeper(Sweeper):
    """Judge the whole grid of points, then run each in its own process or as a job of Slurm."""

    def __init__(self, params: dict[str, Any], jobs: int) -> None:
        self.params = params
        self.jobs = jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config_loader = hydra_context.config_loader
        self.config_name = str(config.hydra.job.config_name)

    def sweep(self, arguments: list[str]) -> None:
        """Plan, run, print the table; ends in `SystemExit` when a job failed or a signal came."""
        from mediphi.cluster import wanted
        from mediphi.launch import one_voice, refuse_sweep_in_ranks
        from mediphi.sweep import expand, plan, run_sweep, submit_sweep

        with one_voice():
            refuse_sweep_in_ranks()
        chosen = [f"{key}={value}" for key, value in self.params.items()]
        planned = plan(
            self.config_loader,
            config_name=self.config_name,
            points=expand([*chosen, *arguments]),
        )
        first = planned.points[0].config
        if (slurm := wanted(first)) is not None and not first.check_only:
            submit_sweep(planned, slurm)
        else:
            run_sweep(planned, num_jobs=self.jobs)


@dataclass
class ProcessSweeperConf:
    """`hydra.sweeper`: the grid, and how many jobs run side by side."""

    _target_: str = "hydra_plugins.mediphi_sweeper.ProcessSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1


ConfigStore.instance().store(
    group="hydra/sweeper", name="processes", node=ProcessSweeperConf, provider="mediphi"
)
