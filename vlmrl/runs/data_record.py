"""What a run says of its data: the commits of hub data sets, which a resumed run reads again, and the data table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmrl.config.run import RunConfig
from vlmrl.record.hub_commits import HUB_COMMITS, read_hub_commits, write_hub_commits
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import Run
from vlmrl.tasks.dataset.sources.hub import same_commits
from vlmrl.tasks.loading import data_table_of


@contextmanager
def same_data(config: RunConfig, run_dir: RunDir) -> Iterator[dict[str, str]]:
    """Inside the block, hub data sets are of the commits that the resumed or replayed run has read. Afterwards the run
    directory names all commits. Yields them by data set."""
    commits = read_hub_commits(Path(config.resume or config.run or run_dir.path) / HUB_COMMITS)
    with same_commits(commits):
        yield commits
    if commits:
        write_hub_commits(run_dir.path / HUB_COMMITS, commits)


def data_of(run: Run) -> dict[str, str]:
    """What the tasks of a run have read: of its own task, and of evaluation sets with a task of their own."""
    sets = run.config.orchestrator.eval.sets
    return data_table_of(run.task) | {
        f"set {player.name}, {fact}": text
        for player in run.evaluator.sets
        if sets[player.name].task is not None
        for fact, text in data_table_of(player.runner.envs.task).items()
    }
