"""The run directory: names of its files, config.yaml, summary.json and the other small files.

    outputs/latest -> 2026-03-01/12-00-00_qwen3vl_tiny_color_codeword
    outputs/2026-03-01/12-00-00_qwen3vl_tiny_color_codeword/
        config.yaml                   the resolved RunConfig; versions and git commit under `environment`
        metrics.jsonl                 one JSON object per optimizer step
        supervised.jsonl              one JSON object per supervised step (warm-up, mode=sft); absent without any
        faults.jsonl                  one JSON object per fault of the user's code or data; absent without any
        bad_rows.jsonl                one JSON object per row of the data that cannot be used; absent without any
        faults.json                   what mode=faults found in it
        rollouts/step_000012.parquet  every training rollout of step 12
        rollouts/eval_000012.parquet  every evaluation rollout after step 12, sampled and greedy
        deleted_rollouts.json         which of them monitor.max_rollouts_mib has deleted; absent while none is
        images/<hash>.png             each distinct image once
        seen/                         mode=play: images as the processor made them
        tokens.jsonl                  the spelling of every token in rollouts/
        checkpoints/step_000020/      weights, optimizer and random state after step 20
        checkpoints/best.json         step, metric and value of the best checkpoint, with trainer.keep_best
        logs/main.log                 the main process; every other process has a file of its own
        wandb/                        Weights & Biases; wandb/run_id keeps its run id for a resume
        tensorboard/                  TensorBoard's event files, where monitor.tensorboard is enabled
        report.html                   the whole run on one page
        replay/step_000021/           mode=replay: a run directory of its own, with the table in replay.json
        export/step_000020/           mode=export: the model as a Hugging Face folder
        doctor.json                   mode=doctor, or a short certificate: versions, checkpoint, settings, verdicts
        serve.json                    mode=serve, while it serves: address and key, for their owner only
        summary.json                  final metrics, wall-clock time, exit reason
        overrides.json                a job of a sweep: its overrides (vlmrl/cli/sweep)
        .lock                         while a process writes here: its pid, host, mode and start (lock.py)

Most files are written under a temporary name and then renamed, so a killed run leaves no half-written file. Only
metrics.jsonl, supervised.jsonl, faults.jsonl, bad_rows.jsonl, tokens.jsonl and logs grow in place. Left out on purpose:
environment variables and the command line, which may contain secrets.
"""

from __future__ import annotations

import errno
import importlib.metadata
import io
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import orjson
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError

from vlmrl.config.parse import tree_of, without_references
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.record.files import disk_errors, is_number, read_json, read_small, write_bytes_atomically
from vlmrl.record.lock import RunLock
from vlmrl.record.yaml_text import yaml_of

log = logging.getLogger(__name__)

BEST_CHECKPOINT = "best.json"
"""The file that says which checkpoint is the best."""

RecordKind: TypeAlias = Literal["step", "eval"]

CHECKPOINT_NAME = re.compile("step_([0-9]{6,12})")
ROLLOUTS_NAME = re.compile(r"(step|eval)_([0-9]{6,12})\.(parquet|jsonl)")

PACKAGES = ("vlmrl", "torch", "transformers", "renderers", "hydra-core", "numpy")


def run_name(choices: Mapping[str, Any], target: str, mode: Mode) -> str:
    """The name of a single run's folder, without its time: the experiment, or model and task; then the mode, unless it
    is `rl`. A user's task is called by its class.

    >>> chosen = {"experiment": None, "model": "qwen3vl_tiny", "task": "color_codeword"}
    >>> run_name(chosen, "vlmrl.tasks.color_codeword:ColorCodeword", Mode.eval)
    'qwen3vl_tiny_color_codeword_eval'
    >>> run_name({**chosen, "task": "my_package.my_module:Counting"}, "my_package.my_module:Counting", Mode.rl)
    'qwen3vl_tiny_Counting'
    >>> run_name({**chosen, "experiment": "color_codeword_4b"}, "vlmrl.tasks.color_codeword:ColorCodeword", Mode.rl)
    'color_codeword_4b'
    """
    task = choices["task"] or ""
    if task == "imported" or ":" in task:
        task = target.rpartition(":")[2]
    name = choices["experiment"] or f"{choices['model']}_{task}"
    return name if mode is Mode.rl else f"{name}_{mode.name}"


class RunDir:
    """Names, reads and writes the files of one run. The constructor does not touch the disk; `create` does.

    >>> run_dir = RunDir("/tmp/outputs/2026-03-01/12-00-00_tiny")
    >>> run_dir.rollouts_file("eval", 12).relative_to(run_dir.path).as_posix()
    'rollouts/eval_000012.parquet'
    >>> run_dir.checkpoint(20).name
    'step_000020'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.supervised = self.path / "supervised.jsonl"
        self.faults = self.path / "faults.jsonl"
        self.bad_rows = self.path / "bad_rows.jsonl"
        self.faults_json = self.path / "faults.json"
        self.preview_page = self.path / "preview.html"
        self.preview_json = self.path / "preview.json"
        self.rollouts = self.path / "rollouts"
        self.deleted_rollouts = self.path / "deleted_rollouts.json"
        self.images = self.path / "images"
        self.seen = self.path / "seen"
        self.tokens = self.path / "tokens.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best_checkpoint = self.checkpoints / BEST_CHECKPOINT
        self.logs = self.path / "logs"
        self.main_log = self.logs / "main.log"
        self.wandb = self.path / "wandb"
        self.wandb_run_id = self.wandb / "run_id"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self.report_log = self.logs / "report.log"
        self.doctor = self.path / "doctor.json"
        self.export = self.path / "export"
        self.replay = self.path / "replay.json"
        self.summary = self.path / "summary.json"
        self.overrides = self.path / "overrides.json"
        self._config_written: bytes | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    def rollouts_file(self, kind: RecordKind, step: int) -> Path:
        """The file of the training rollouts of `step` ("step"), or of the evaluation after it ("eval")."""
        return self.rollouts / f"{kind}_{step:06d}.parquet"

    def recorded_rollouts(self, kind: RecordKind, step: int) -> Path:
        """`rollouts_file`, or in a run of an older version the .jsonl file of the same name."""
        path = self.rollouts_file(kind, step)
        older = path.with_suffix(".jsonl")
        return older if older.exists() and not path.exists() else path

    def image(self, hash: str) -> Path:
        """The PNG of the `ImageItem` with this hash."""
        return self.images / f"{hash}.png"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step`."""
        return self.checkpoints / f"step_{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, in ascending order. Temporary folders do not count."""
        names = (CHECKPOINT_NAME.fullmatch(folder.name) for folder in self.checkpoints.glob("*") if folder.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def rollouts_steps(self, kind: RecordKind) -> list[int]:
        """Steps that have a file of training rollouts ("step") or of an evaluation ("eval"), in ascending order. Other
        files in rollouts/ do not count."""
        return sorted({int(name[2]) for name in self._rollouts_names() if name[1] == kind})

    def rollouts_after(self, step: int) -> list[Path]:
        """Rollout files of steps after `step`, which a resumed run writes again."""
        return sorted(self.rollouts / name[0] for name in self._rollouts_names() if int(name[2]) > step)

    @property
    def is_of_older_version(self) -> bool:
        """Whether the run recorded its rollouts as .jsonl files, as versions did before Parquet."""
        return any(name[3] == "jsonl" for name in self._rollouts_names())

    def _rollouts_names(self) -> Iterator[re.Match[str]]:
        names = (ROLLOUTS_NAME.fullmatch(path.name) for path in self.rollouts.glob("*"))
        return (name for name in names if name)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The subfolders of every run."""
        return self.rollouts, self.images, self.checkpoints, self.logs

    # ── the folder ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def lock(self, mode: str) -> Iterator[None]:
        """Create the folder and hold its lock (`RunLock`) while the block runs. Every mode that writes into the folder
        does. Raises ConfigError while another process holds it, or where the folder cannot be written."""
        with ExitStack() as stack:
            with self._writable():
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(RunLock(self.path, mode))
            yield

    def create(self, *, resume: bool = False) -> None:
        """Create the folder and its subfolders. Call it inside `lock`, so that no other process does the same.

        Raises ConfigError where the folder cannot be written and, unless `resume`, where it already holds the metrics
        of a run.
        """
        if not resume and (self.metrics.exists() or self.supervised.exists()):
            raise ConfigError(
                f"output_dir={self.path} already holds a run, so two runs would mix in one folder: "
                f"set another output_dir, or continue that run with resume={self.path}"
            )
        with self._writable():
            for folder in (self.path, *self.folders):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output_dir={self.path} cannot be written ({error.strerror}), so the run cannot be recorded: "
                "set output_dir to a folder that you may write to"
            ) from error

    def point_latest(self) -> None:
        """Point the link `latest` at this run, in the nearest ancestor called `outputs`, or else in the parent.

        Where that fails (no symbolic links, another file called `latest`), the log has a warning.
        """
        home = next((parent for parent in self.path.parents if parent.name == "outputs"), self.path.parent)
        temporary = home / f".latest.{os.getpid()}"
        try:
            if os.path.lexists(home / "latest") and not (home / "latest").is_symlink():
                raise FileExistsError(errno.EEXIST, "it is not a link, so it stays as it is")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self.path.relative_to(home), target_is_directory=True)
            try:
                temporary.replace(home / "latest")
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s does not point to this run (%s): name its folder instead", home / "latest", error)

    # ── config.yaml ─────────────────────────────────────────────────────────────────────────────────────────

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml: the resolved config, and under `environment` versions and the git commit."""
        tree = tree_of(config)
        tree["environment"] = environment()
        content = yaml_of(tree).encode()
        with disk_errors(self.config):
            write_bytes_atomically(self.config, content)
        self._config_written = content

    def keep_config(self) -> bool:
        """Write config.yaml again where it is not as `write_config` has written it; returns whether it was not."""
        if self._config_written is None:
            return False
        with suppress(OSError):
            if read_small(self.config) == self._config_written:
                return False
        with disk_errors(self.config):
            write_bytes_atomically(self.config, self._config_written)
        return True

    def read_config(self, *, key: str = "resume") -> DictConfig:
        """Read config.yaml without `environment`; the caller merges it into the schema. No `${…}` in it is resolved.
        Raises ConfigError; its message starts with `key`, the config key that named the folder."""
        try:
            config = self.read_config_and_environment()
        except ValueError as error:
            raise ConfigError(
                f"{key}={self.path} holds no readable config.yaml ({error}), so there is no run to continue: "
                "name the folder of a run, for example outputs/latest"
            ) from error
        config.pop("environment", None)
        return DictConfig(without_references(OmegaConf.to_container(config)))

    def read_config_and_environment(self) -> DictConfig:
        """Read all of config.yaml. Raises ValueError with the reason why it is not the file of a run."""
        try:
            text = read_small(self.config).decode()
            if any(isinstance(token, AliasToken) for token in (yaml.scan(text) if "*" in text else ())):
                raise ValueError("it has a YAML alias, which no run writes and which may stand for billions of values")
            config = OmegaConf.load(io.StringIO(text))
        except (OSError, YAMLError, OmegaConfBaseException, TypeError) as error:
            raise ValueError(str(error)) from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(config, DictConfig):
            raise ValueError("it is not a mapping")
        return config

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json. Numbers that are not finite become null."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        with disk_errors(self.summary):
            write_bytes_atomically(self.summary, orjson.dumps(summary, option=options))

    def write_doctor(self, certificate: dict[str, Any]) -> None:
        """Write doctor.json (runs/doctor/certificate.py). Numbers that are not finite become null."""
        with disk_errors(self.doctor):
            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            write_bytes_atomically(self.doctor, orjson.dumps(certificate, option=options))

    def write_replay(self, content: dict[str, object]) -> None:
        """Write replay.json. Numbers that are not finite become null."""
        with disk_errors(self.replay):
            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
            write_bytes_atomically(self.replay, orjson.dumps(content, option=options))

    def read_summary(self, warn: Callable[[str], None] = log.warning) -> dict[str, Any] | None:
        """Read summary.json; None where the run has not ended, or was killed. A damaged one counts as none: `warn` is
        called with a sentence about it."""
        summary: dict[str, Any] | None = read_json(self.summary, _is_summary, warn)
        return summary

    def write_overrides(self, overrides: list[str]) -> None:
        """Write overrides.json."""
        with disk_errors(self.overrides):
            write_bytes_atomically(self.overrides, orjson.dumps(overrides, option=orjson.OPT_APPEND_NEWLINE))

    def read_overrides(self) -> list[str] | None:
        """Read overrides.json; None where the run is not a job of a sweep. A damaged one counts as none."""
        overrides: list[str] | None = read_json(self.overrides, _are_overrides, log.warning)
        return overrides

    def read_doctor(self) -> dict[str, Any] | None:
        """Read doctor.json; None where the run has none. A damaged one counts as none."""
        found: dict[str, Any] | None = read_json(self.doctor, is_certificate, log.warning)
        return found


def _is_summary(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("exit_reason"), str)
        and all(is_number(content.get(key)) for key in ("wall_clock_s", "objective", "step"))
        and isinstance(content.get("metrics", {}), dict)
        and isinstance(content.get("warnings", []), list)
    )


def _are_overrides(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(text, str) for text in content)


def is_certificate(content: Any) -> bool:
    """Whether the content of a JSON file is that of doctor.json."""
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(part), dict) for part in ("versions", "checkpoint", "settings"))
        and isinstance(content.get("checks"), list)
        and all(isinstance(line, dict) and {"name", "verdict", "says"} <= set(line) for line in content["checks"])
    )


def environment() -> dict[str, Any]:
    """Versions of Python and the main packages, and the git commit. A package that is not installed has None."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parent),
    }


def package_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{"commit": 40 hex digits, "dirty": bool}` of the checkout that tracks `folder`.

    None without git, or where git does not track `folder`: a package in a virtual environment inside some other
    checkout has no commit of its own.
    """
    tracked = _git(folder, "ls-files", "--", ".")
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    if not tracked or not commit or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
