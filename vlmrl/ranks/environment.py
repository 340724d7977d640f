"""Reading the variables that a launcher sets: whole, in range, and all of them or none."""

from __future__ import annotations

from collections.abc import Mapping

from vlmrl.errors import ConfigError

PORTS = 2**16


def text(environment: Mapping[str, str], name: str) -> str:
    """The value of a variable that is there and not empty. Raises `ConfigError`."""
    value = environment.get(name, "")
    if not value.strip():
        raise ConfigError(
            f"{name} is {'empty' if name in environment else 'not set'}, but other variables of its launcher are set, "
            "so this process does not know which of how many it is: start the run with torchrun or srun, or unset the "
            "variables that an earlier launcher left (env | grep -E 'RANK|WORLD_SIZE|SLURM_')."
        )
    return value


def number(
    environment: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None, default: int | None = None
) -> int:
    """The value of a variable as a whole number, `least` or more and less than `below`; `default` where it is not set.
    Raises `ConfigError`.

    >>> number({"WORLD_SIZE": "4"}, "WORLD_SIZE", least=1), number({}, "SLURM_STEP_NUM_TASKS", default=1)
    (4, 1)
    """
    if default is not None and name not in environment:
        return default
    value = text(environment, name)
    found = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else -1
    if found < least or (below is not None and found >= below):
        wanted = f"of at least {least}" if below is None else f"from {least} to {below - 1}"
        raise ConfigError(
            f"{name}={value!r} in the environment is not a whole number {wanted}, so this process does not know which "
            f"of how many it is: start the run with torchrun or srun, or unset {name}."
        )
    return found
