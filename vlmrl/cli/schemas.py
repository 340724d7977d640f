"""Hand the dataclasses of `vlmrl.config` to Hydra."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from vlmrl.cli.conf_files import read_conf_files
from vlmrl.config.eval_set import EvalSet
from vlmrl.config.run import SCHEMAS, RunConfig


def register_schemas() -> None:
    """Put the schemas where the defaults lists of conf/ find them, `schema/run`, `schema/task/color_codeword`, …; not
    among the groups' own files, so that they are no options."""
    read_conf_files()
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    for group, options in SCHEMAS.items():
        for option, schema in options.items():
            store.store(group=f"schema/{group}", name=option, node=schema)
    store.store(group="schema/eval_set", name="default", node=EvalSet)
