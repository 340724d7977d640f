"""Hand the dataclasses of `vlmrl.config` to Hydra."""

from __future__ import annotations

import functools
from typing import Any

from hydra.core.config_store import ConfigStore

from vlmrl.cli.conf_files import read_conf_files
from vlmrl.config.eval_set import EvalSet
from vlmrl.config.run import SCHEMAS, RunConfig


@functools.cache
def register_schemas() -> None:
    """Put the schemas where the defaults lists of conf/ find them, `schema/run`, `schema/task/color_codeword`, …; not
    among the groups' own files, so that they are no options. A process does it once."""
    read_conf_files()
    share_store()
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    for group, options in SCHEMAS.items():
        for option, schema in options.items():
            store.store(group=f"schema/{group}", name=option, node=schema)
    store.store(group="schema/eval_set", name="default", node=EvalSet)


def share_store() -> None:
    """Let Hydra's copies of its config sources share the one store of schemas.

    Hydra copies the sources, and the store with them, for each group whose options it lists, 190 times for `--help`:
    3 s of processor time. It changes no schema in a store, because `ConfigStore.load` returns a copy.
    """

    def itself(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
        return store

    ConfigStore.__deepcopy__ = itself  # type: ignore[attr-defined]
