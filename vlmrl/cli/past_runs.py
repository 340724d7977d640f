"""Command lines about a run that is there already: its own config.yaml is taken instead of one that Hydra composes.

    resume=<run> …                  resumed     overrides of single values on top
    mode=replay run=<run> step=N …  replayed    and another engine
    mode=report run=… | runs=[…]    write_page  nothing is run

cli.py asks which of them it is, and starts it.
"""

from __future__ import annotations

import re
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vlmrl.cli.arguments import CONF, groups
from vlmrl.cli.hydra_errors import in_words
from vlmrl.cli.recipe import RECIPE
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.parse import typed
from vlmrl.config.run import Mode
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.mode import REPLAY_HAS_NO_BATCH
from vlmrl.record.run_dir import RunDir

REPORT = f"mode={Mode.report.name}"


# ── mode=report ─────────────────────────────────────────────────────────────────────────────────────────────


def write_page(arguments: list[str]) -> Path:
    """Write the page that `mode=report run=<dir>` or `runs=[<dir>,<dir>]` asks for → where it is. Raises ConfigError.

    Of one run it is report.html in its folder, of several side_by_side.html beside the first.
    """
    from vlmrl.cli.sweep.compare import names
    from vlmrl.cli.sweep.jobs import runs_in
    from vlmrl.monitor.report.page import write_report

    asked = [argument for argument in arguments if argument != REPORT]
    if len(asked) != 1 or not asked[0].startswith(("run=", "runs=")):
        raise ConfigError(
            f"mode=report requires one of run= and runs= and nothing else ({' '.join(asked) or 'nothing was given'}), "
            "else it is open which page is meant: say run=outputs/latest, 'runs=[outputs/a,outputs/b]', or "
            "runs=outputs/multirun/<name>"
        )
    key, _, value = asked[0].partition("=")
    if key == "run":
        run_dir = RunDir(Path(value).resolve())
        write_report({run_dir.name: run_dir}, run_dir.report, usual())
        return run_dir.report
    folders = [Path(folder.strip()).resolve() for folder in value.removeprefix("[").removesuffix("]").split(",")]
    runs = [run for folder in folders for run in runs_in(folder) if run.config.exists()]
    if len(runs) < 2:
        raise ConfigError(f"{asked[0]} requires two runs or more, else there is nothing to compare: set run=<folder>")
    called = names(runs)
    if len(set(called)) < len(called):
        called = [f"{name} ({number})" for number, name in enumerate(called, 1)]
    target = runs[0].path.parent / "side_by_side.html"
    write_report(dict(zip(called, runs, strict=True)), target, usual())
    return target


def usual() -> dict[str, object]:
    """The config that `python -m vlmrl` composes when nothing is set, as a tree; without a place to run in."""
    register_schemas()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", [RECIPE])
    tree = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "output_dir"}


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


def resumes(arguments: list[str]) -> bool:
    """Whether the command line continues a run."""
    return any(argument.startswith("resume=") for argument in arguments) and not {"-h", "--help"} & set(arguments)


def resumed(arguments: list[str]) -> DictConfig:
    """The config of the run that `resume=` names, the other overrides on top. Raises ConfigError."""
    folder = Path([argument for argument in arguments if argument.startswith("resume=")][-1].removeprefix("resume="))
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key.startswith(("-", "hydra.")) or key in ("output_dir", *groups()) or not re.match(r"(\+\+)?\w", text):
            raise ConfigError(
                f"{text} requires a new run, else what resume={folder} left there would not belong to it any more: "
                "drop it, or start without resume="
            )
    run_dir = RunDir(folder.resolve())
    config = typed(run_dir.read_config())
    mode = config.mode
    override(config, overrides)
    if config.mode not in (mode, Mode.eval, Mode.export):
        raise ConfigError(
            f"mode={config.mode.name} requires a new run, else its steps would stand among those of mode={mode.name} "
            f"in resume={folder}: drop mode=, or start without resume="
        )
    config.output_dir, config.resume = str(run_dir.path), str(run_dir.path)
    return config


def override(config: DictConfig, overrides: list[str]) -> None:
    """Set the values of `key=value` in place. Raises ConfigError."""
    try:
        for each in OverridesParser.create().parse_overrides(overrides):
            if each.is_sweep_override():
                raise ConfigError(f"{each.input_line} requires --multirun, which takes a new run: set one value")
            apply(config, each.key_or_group, each.value(), force_add=each.is_force_add())
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(in_words(error, overrides)) from error


def apply(config: DictConfig, key: str, value: object, *, force_add: bool) -> None:
    """Set one key, with Hydra's wording of what goes wrong."""
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=force_add)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigCompositionException(f"Could not override '{key}'.") from error


# ── replay ──────────────────────────────────────────────────────────────────────────────────────────────────

REPLAYED_GROUPS = ("inference", "weight_sync")
"""Groups that a replay may choose anew: any engine may answer a recorded batch."""


def replays(arguments: list[str]) -> bool:
    """Whether the command line replays a recorded batch."""
    return f"mode={Mode.replay.name}" in arguments and not {"-h", "--help"} & set(arguments)


def replayed(arguments: list[str]) -> DictConfig:
    """The config of the run that `run=` names, groups and overrides of the command line on top. Raises ConfigError."""
    named = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("run=", "step=")))
    if named.keys() != {"run", "step"} or not re.fullmatch(r"[1-9]\d*", named["step"]):
        raise ConfigError(REPLAY_HAS_NO_BATCH)
    chosen, overrides = [], []
    for text in arguments:
        key = text.lstrip("+~").partition("=")[0]
        if key in REPLAYED_GROUPS:
            chosen.append(text)
        elif key.startswith(("-", "hydra.")) or key in ("output_dir", "resume", *groups()):
            raise ConfigError(
                f"{text} requires a new run, else the batch would not be what run={named['run']} recorded: drop it "
                f"(a replay takes values, and the groups {', '.join(REPLAYED_GROUPS)})"
            )
        elif key not in ("mode", "run", "step"):
            overrides.append(text)
    run_dir = RunDir(Path(named["run"]).resolve())
    config = typed(run_dir.read_config(key="run"))
    if config.mode is not Mode.rl:
        raise ConfigError(
            f"run={named['run']} requires to have been of mode=rl, else it learned from no batch of rollouts "
            f"(it was of mode={config.mode.name}): name another run"
        )
    if chosen:
        register_schemas()
        try:
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                composed = hydra.compose("config", chosen)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(in_words(error, chosen)) from error
        for group in REPLAYED_GROUPS:
            config[group] = composed[group]
    override(config, overrides)
    config.orchestrator.max_staleness = 0  # every engine may answer: nothing is learned
    config.mode, config.run, config.step = Mode.replay, str(run_dir.path), int(named["step"])
    config.monitor.report, config.monitor.wandb.mode = False, "disabled"
    config.output_dir, config.resume = str(run_dir.path / "replay" / f"step_{config.step:06d}"), None
    return config
