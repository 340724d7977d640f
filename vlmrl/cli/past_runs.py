"""Commands about a run that exists. They use the run's own config.yaml; Hydra does not compose a new one.

    resume=<run> …                  resumed     single values may be overridden; mode=eval and mode=export also take one
                                                checkpoint, resume=<run>/checkpoints/step_000020, and mode=eval new sets
    mode=replay run=<run> step=N …  replayed    single values, and another engine
    mode=report run=… | runs=[…]    write_page  only writes the page
    mode=faults run=… [rollout=…]   show_faults lists what went wrong, or plays one row again

main.py calls these functions and starts the result.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, Node, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from vlmrl.cli.arguments import groups
from vlmrl.cli.hydra_errors import composing
from vlmrl.cli.recipe import RECIPE
from vlmrl.cli.resume_changes import leaves_of, notes_on_changes
from vlmrl.cli.schemas import register_schemas
from vlmrl.cli.words import folders_in
from vlmrl.config.conf_folder import CONF
from vlmrl.config.keys import is_free_form, known_keys
from vlmrl.config.parse import parse, typed
from vlmrl.config.run import READ_A_CHECKPOINT, Mode
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.mode import REPLAY_HAS_NO_BATCH
from vlmrl.record.files import read_errors, read_json
from vlmrl.record.run_dir import RunDir

log = logging.getLogger(__name__)

BEST = "best"
"""`resume=<run>/checkpoints/best` names the best checkpoint."""

REPORT = f"mode={Mode.report.name}"

READS_A_PAST_RUN = ("run", "runs", "step", "rollout")
"""Keys that name what modes other than a resumed run's read."""


# ── mode=report ─────────────────────────────────────────────────────────────────────────────────────────────


@read_errors()
def write_page(arguments: list[str]) -> Path:
    """Write the page of `mode=report run=<dir>` or `mode=report runs=[<dir>,<dir>]`; returns its path.

    One run gets report.html in its own folder; several get side_by_side.html next to the first. Raises ConfigError.
    """
    from vlmrl.cli.sweep.compare import names
    from vlmrl.cli.sweep.jobs import runs_in
    from vlmrl.monitor.report.page import write_report

    given = [argument for argument in arguments if argument != REPORT]
    if len(given) != 1 or not given[0].startswith(("run=", "runs=")):
        raise ConfigError(
            f"mode=report takes either run= or runs= and nothing else, and was given {' '.join(given) or 'neither'}: "
            "write run=outputs/latest, 'runs=[outputs/a,outputs/b]' or runs=outputs/multirun/<name>"
        )
    key, _, value = given[0].partition("=")
    if key == "run":
        run_dir = RunDir(folder_of(value))
        write_report({run_dir.name: run_dir}, run_dir.report, default_config())
        return run_dir.report
    folders = [folder_of(folder) for folder in folders_in(value)]
    runs = [run for folder in folders for run in runs_in(folder) if run.config.exists()]
    if len(runs) < 2:
        raise ConfigError(f"{given[0]} names fewer than two runs, so nothing can be compared: set run=<folder>")
    called = names(runs)
    if len(set(called)) < len(called):
        called = [f"{name} ({number})" for number, name in enumerate(called, 1)]
    target = runs[0].path.parent / "side_by_side.html"
    write_report(dict(zip(called, runs, strict=True)), target, default_config())
    return target


def folder_of(value: str) -> Path:
    """The folder that `resume=`, `run=` or `runs=` names, absolute; `~` is the home folder."""
    return Path(value).expanduser().resolve()


def default_config() -> dict[str, object]:
    """The config of `python -m vlmrl` without arguments, as a tree, without `output_dir`."""
    register_schemas()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", [RECIPE])
    tree = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "output_dir"}


# ── mode=faults ─────────────────────────────────────────────────────────────────────────────────────────────

FAULTS = f"mode={Mode.faults.name}"


@read_errors()
def show_faults(arguments: list[str]) -> int:
    """List the faults of the run `run=`, or play the row of `rollout=` again; returns the exit code.

    Other arguments are values of the run's config, with which a row is played. Raises ConfigError.
    """
    named = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("run=", "rollout=")))
    overrides = [text for text in arguments if text != FAULTS and not text.startswith(("run=", "rollout="))]
    wrong = [text for text in overrides if "rollout" not in named or text.lstrip("+~").partition("=")[0] in groups()]
    if "run" not in named or wrong:
        raise ConfigError(
            f"mode=faults takes run=, and rollout= to play one row again, and was given {' '.join(arguments)}: write "
            "python -m vlmrl mode=faults run=outputs/latest"
        )
    from vlmrl.runs.faults import faults_in, list_faults

    run_dir = RunDir(folder_of(named["run"]))
    recorded = run_dir.read_config(key="run")
    if "rollout" not in named:
        list_faults(run_dir)
        return 0
    config = typed(recorded)
    override(config, overrides)
    from vlmrl.runs.fault_again import play_again

    return play_again(run_dir, parse(config), faults_in(run_dir, recorded), named["rollout"])


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


def resumes(arguments: list[str]) -> bool:
    """Whether the command continues a run."""
    return any(argument.startswith("resume=") for argument in arguments) and not {"-h", "--help"} & set(arguments)


def resumed(arguments: list[str]) -> tuple[DictConfig, Callable[[], list[str]]]:
    """The config of the run that `resume=` names, with the other arguments applied, and a function that judges the
    changed values: it returns notes on those that may bend the curves (`Resume.noted`) and raises ConfigError for a
    value that the run cannot go on with (`Resume.refused`). Raises ConfigError."""
    folder = [argument for argument in arguments if argument.startswith("resume=")][-1].removeprefix("resume=")
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    sets = [text for text in overrides if SET_CHOICE.match(text) and f"mode={Mode.eval.name}" in overrides]
    overrides = [text for text in overrides if text not in sets]
    for text in overrides:
        refuse_beside_resume(text, folder)
    run_dir, step = checkpoint_of(folder)
    config = typed(run_dir.read_config())
    mode, recorded = config.mode, leaves_of(config)
    add_sets(config, sets)
    choose(config, [text for text in overrides if is_choice(text)])
    override(config, [text for text in overrides if not is_choice(text)])
    if config.mode not in (mode, *READ_A_CHECKPOINT):
        raise ConfigError(
            f"mode={config.mode.name} cannot continue resume={folder}, because its steps would be mixed with those of "
            f"mode={mode.name}: remove mode=, or start a new run without resume="
        )
    if step is not None and config.mode not in READ_A_CHECKPOINT:
        raise ConfigError(
            f"resume={folder} is one checkpoint of a run, which can only be evaluated, served and exported, because "
            "the files of the run are those of its newest step: add mode=eval, mode=serve or mode=export, or set "
            f"resume={run_dir.path}"
        )
    config.step = step
    # An evaluation or an export adds no step to the run, so it may use other values.
    with composing(overrides):  # an override may refer to another key
        after = leaves_of(config)
    now = after if config.mode is mode else recorded
    config.output_dir, config.resume = str(run_dir.path), str(run_dir.path)
    return config, lambda: notes_on_changes(recorded, now, folder)


def checkpoint_of(folder: str) -> tuple[RunDir, int | None]:
    """The run that `resume=` names and, where it names a checkpoint of the run (`checkpoints/step_000020`, or
    `checkpoints/best`), the step of that. Raises ConfigError where there is no such checkpoint."""
    path = folder_of(folder)
    run_dir = RunDir(path.parent.parent)
    if path.parent.name != run_dir.checkpoints.name or not run_dir.config.exists():
        return RunDir(path), None
    named = re.fullmatch(r"step_(\d+)", path.name)
    if path.name == BEST:
        content = read_json(run_dir.best_checkpoint, lambda content: isinstance(content, dict), log.warning) or {}
        step = content.get("step")
    else:
        step = int(named[1]) if named is not None else None
    if not isinstance(step, int) or not (run_dir.checkpoints / f"step_{step:06d}").is_dir():
        steps = sorted(each.name for each in run_dir.checkpoints.glob("step_*"))
        raise ConfigError(
            f"resume={folder} names no checkpoint of {run_dir.path}, so there is nothing to load: choose one of "
            f"{', '.join(steps) or 'another run, because this one has none'}"
            + ("; trainer.keep_best=eval/reward keeps a best one" if path.name == BEST else "")
        )
    return run_dir, step


SET_CHOICE = re.compile(r"\+?(?:eval_set|task|reward)@orchestrator\.eval\.sets\.[^=]+=")
"""An argument of mode=eval that adds a named set to those of the run, or a task or a reward to such a set."""


def add_sets(config: DictConfig, choices: list[str]) -> None:
    """Add named evaluation sets to a run's config, in place. Raises ConfigError."""
    if not choices:
        return
    register_schemas()
    with composing(choices):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", choices)
        for text in choices:
            place = text.partition("=")[0].partition("@")[2]
            with open_dict(config):
                OmegaConf.update(config, place, OmegaConf.select(composed, place), merge=False, force_add=True)


def refuse_beside_resume(text: str, folder: str) -> None:
    """Raise ConfigError for an argument that says nothing about the values of a resumed run."""
    key = re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]
    if key in READS_A_PAST_RUN:
        raise ConfigError(
            f"{text} has no effect next to resume={folder}, because {key} names what other modes read "
            f"(python -m vlmrl explain {key}): remove it"
        )
    names_no_value = key in ("output_dir", "experiment", "sweep") or "@" in text.partition("=")[0]
    if names_no_value or key.startswith(("-", "hydra.", "hydra/")):
        raise ConfigError(
            f"{text} is not a value that a resumed run can change, because the files of resume={folder} would no "
            "longer belong to one run: remove it, or start a new run without resume="
        )


def is_choice(text: str) -> bool:
    """Whether an override chooses an option of a group.

    >>> [is_choice(text) for text in ("algorithm=gspo", "~model/lora", "trainer.eps=1e-6", "trainer={eps: 1e-6}")]
    [True, True, False, False]
    """
    key, _, value = text.lstrip("+~").partition("=")
    return key in groups() and not value.startswith("{")


KEYS_OF_GROUPS = {"monitor/logger": ("monitor.wandb.mode", "monitor.tensorboard.enabled")}
"""Groups without a node of their own, and the keys that their options set."""


def choose(config: DictConfig, choices: list[str]) -> None:
    """Replace groups of a run's config by other options, in place. Only the group itself changes, and its references to
    other keys follow the run's own values. Raises ConfigError."""
    for text in choices:
        key, _, option = text.lstrip("+~").partition("=")
        path = key.replace("/", ".")
        register_schemas()
        if key in KEYS_OF_GROUPS:
            chosen = f"{key}=[]" if text.startswith("~") else text.lstrip("+")
            with composing([text]), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                composed = hydra.compose("config", [chosen])
            for each in KEYS_OF_GROUPS[key]:
                OmegaConf.update(config, each, OmegaConf.select(composed, each))
            continue
        if path.partition(".")[0] not in config:
            raise ConfigError(
                f"{text} chooses nothing, because no key of a run is called {path}: remove it"
                + (
                    f", or add a set with mode=eval +{key}@orchestrator.eval.sets.<name>={option}"
                    if key == "eval_set"
                    else ""
                )
            )
        with composing([text]):
            if text.startswith("~") or option in ("", "null"):
                leave_out(config, path, text)
                continue
            with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                composed = hydra.compose("config", [f"{key}={option}"])
            OmegaConf.update(config, path, OmegaConf.select(composed, path), merge=False)


def leave_out(config: DictConfig, path: str, text: str) -> None:
    """Set a group to null. Raises ConfigError where every run has that group."""
    parent, _, name = path.rpartition(".")
    owner = OmegaConf.select(config, parent) if parent else config
    node = owner._get_node(name) if isinstance(owner, DictConfig) else None
    if not isinstance(node, Node) or not node._is_optional():
        raise ConfigError(f"{text} leaves out {path}, which every run has: choose another option, or remove {text}")
    OmegaConf.update(config, path, None)


def override(config: DictConfig, overrides: list[str]) -> None:
    """Apply overrides of values in place. Raises ConfigError."""
    with composing(overrides):
        for each in OverridesParser.create().parse_overrides(overrides):
            if each.is_sweep_override():
                raise ConfigError(
                    f"{each.input_line} lists values to sweep over, which only a new --multirun can do: set one value"
                )
            if each.is_delete():
                remove(config, each.key_or_group)
            else:
                apply(config, each.key_or_group, each.value(), force_add=each.is_force_add() or each.is_add())


def remove(config: DictConfig, key: str) -> None:
    """Remove a key from a free-form dictionary, such as a setting of a task. Raises ConfigError for any other key."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else None
    if not isinstance(node, DictConfig) or name not in node or key in known_keys() or not is_free_form(key):
        raise ConfigError(
            f"~{key} removes nothing, because only a key of a free-form dictionary such as task.args can be removed: "
            f"set {key} to another value, or remove ~{key}"
        )
    with open_dict(node):
        del node[name]


def apply(config: DictConfig, key: str, value: object, *, force_add: bool) -> None:
    """Set one key. Raises what Hydra raises for an unknown key, so that `in_words` explains it."""
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=force_add)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigCompositionException(f"Could not override '{key}'.") from error


# ── replay ──────────────────────────────────────────────────────────────────────────────────────────────────

REPLAYED_GROUPS = ("inference", "weight_sync")
"""Groups of which a replay may choose another option, because any engine can score a recorded batch."""


def replays(arguments: list[str]) -> bool:
    """Whether the command replays a recorded batch."""
    return f"mode={Mode.replay.name}" in arguments and not {"-h", "--help"} & set(arguments)


def replayed(arguments: list[str]) -> DictConfig:
    """The config of the run that `run=` names, with the other arguments applied. Raises ConfigError."""
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
                f"{text} cannot be used in a replay, because the batch would not be the one that run={named['run']} "
                f"recorded: remove it (a replay takes values, and the groups {', '.join(REPLAYED_GROUPS)})"
            )
        elif key not in ("mode", "run", "step"):
            overrides.append(text)
    run_dir = RunDir(folder_of(named["run"]))
    config = typed(run_dir.read_config(key="run"))
    if config.mode not in (Mode.rl, Mode.play):
        raise ConfigError(
            f"run={named['run']} was a run of mode={config.mode.name}, which records no batch of rollouts: "
            "name a run of mode=rl or mode=play"
        )
    if chosen:
        register_schemas()
        with composing(chosen), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", chosen)
        for group in REPLAYED_GROUPS:
            config[group] = composed[group]
    override(config, overrides)
    config.orchestrator.max_staleness = 0  # a replay learns nothing, so every engine fits
    config.mode, config.run, config.step = Mode.replay, str(run_dir.path), int(named["step"])
    config.monitor.report, config.monitor.wandb.mode, config.monitor.tensorboard.enabled = False, "disabled", False
    config.output_dir, config.resume = str(run_dir.path / "replay" / f"step_{config.step:06d}"), None
    return config
