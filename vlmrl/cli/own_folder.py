"""A folder of its own for every run and every sweep, also for those that start in the same second.

    for s in 0 1 2; do python -m vlmrl seed=$s & done

    outputs/2026-03-01/12-00-00_qwen3vl_tiny_color_codeword
    outputs/2026-03-01/12-00-00-2_qwen3vl_tiny_color_codeword
    outputs/2026-03-01/12-00-00-3_qwen3vl_tiny_color_codeword

A name with `${started:}` in it (conf/config.yaml) is free to change, so `reserve` makes the folder itself and takes the
next number where another process was faster: only one process can make a folder. A folder that the user names is used
as it is; if it holds a run, that run's lock or its metrics refuse the second one. In a Slurm batch job the name is the
job's and must stay the same after a requeue.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vlmrl.ranks import slurm

STARTED = "${started:}"

_number = 1
"""Which of the runs that started in the same second this one is."""


def started() -> str:
    """The resolver `${started:}`: `2026-03-01/12-00-00`, from the second run of that second on `…-2` and so on."""
    return slurm.run_folder_prefix() + (f"-{_number}" if _number > 1 else "")


def reserve(config: DictConfig, key: str) -> None:
    """Make the folder at `key` ("hydra.run.dir" or "hydra.sweep.dir") of Hydra's whole config, if its name is ours.

    Other problems with the folder are left to Hydra, which makes it too and reports them.
    """
    global _number
    parent, _, name = key.rpartition(".")
    spelled = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False)
    if not isinstance(spelled, dict) or STARTED not in str(spelled[name]) or slurm.in_step_of_batch_job():
        return
    HydraConfig.instance().set_config(config)  # the name may refer to ${hydra:…}; Hydra sets it again for the job
    for _number in count(1):
        OmegaConf.clear_cache(config)  # it holds the value of ${started:}
        try:
            Path(OmegaConf.select(config, key)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass
        return
