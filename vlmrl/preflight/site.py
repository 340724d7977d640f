"""The place where a run will start, as far as it is known when a configuration is checked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.preflight.machine import Machine, find_machine
from vlmrl.ranks import slurm
from vlmrl.ranks.place import find_place


@dataclass(frozen=True)
class Submission:
    """The processes that a launcher will start for one job."""

    nodes: int = 1
    """Hosts of the job."""
    tasks_per_node: int | None = None
    """Slurm tasks on each host; None for a launcher that runs the job in a single process."""


@dataclass(eq=False)
class Site:
    """Processes and hardware of one run."""

    ranks: int = 1
    """Processes that train."""
    nodes: int = 1
    """Hosts that the tasks of the Slurm job are on."""
    submission: Submission | None = None
    """Set where a launcher will start the run; None where this process is the run."""
    serves: bool = False
    """This process is a Slurm task that runs a vLLM server and does not train."""

    @cached_property
    def machine(self) -> Machine:
        """The GPUs, cores and memory of this host."""
        return find_machine()


def this_site() -> Site:
    """The site of this process, from the variables that torchrun or Slurm have set. Raises `ConfigError` where a
    launcher's variables are incomplete."""
    return Site(ranks=find_place().size, nodes=slurm.nodes(), serves=slurm.server_index() is not None)


def submitted_site(config: RunConfig, submission: Submission) -> Site:
    """The site that a launcher will make for `config`: its tasks, less those that serve, are ranks."""
    if submission.tasks_per_node is None:
        return Site(submission=submission)
    tasks = submission.nodes * submission.tasks_per_node
    return Site(ranks=tasks - tasks_that_serve(config), nodes=submission.nodes, submission=submission)


def tasks_that_serve(config: RunConfig) -> int:
    """`inference.slurm_tasks`; 0 for an engine without servers."""
    return config.inference.slurm_tasks if isinstance(config.inference, VllmConfig) else 0
