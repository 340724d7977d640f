"""The command line: what it refuses, prints and writes, and its exit codes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from support.configs import checked
from vlmrl.cli.arguments import groups
from vlmrl.cli.main import main
from vlmrl.cli.past_runs import resumed
from vlmrl.cli.schemas import register_schemas
from vlmrl.cli.start import notes_on_unread
from vlmrl.config.conf_folder import CONF, PACKAGE
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ImportedTaskConfig
from vlmrl.errors import ConfigError
from vlmrl.record.run_dir import RunDir
from vlmrl.tasks.check import command

FAKE_RUN = """
import sys, types

fake = types.ModuleType("vlmrl.runs.lifecycle")
exec(sys.argv.pop(1), fake.__dict__)
sys.modules["vlmrl.runs.lifecycle"] = fake
from vlmrl.cli.main import main
sys.exit(main())
"""
"""Starts the command line with a fake `vlmrl.runs.lifecycle`, whose source is the first argument."""

PRINT_CONFIG = """
import json
def execute(config):
    print("RUN", json.dumps([config.seed, config.task.target, getattr(config.task, "args", None), config.output_dir]))
    return 0.5
"""


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    code: int
    out: str
    err: str


TASK = """
class {}:
    def __init__(self, config, *, seed): ...
    def problem(self, split, index): ...
    def env(self, problem): ...
    def demonstration(self, problem, *, random_answers, seed): ...
    def texts(self): ...
"""


@pytest.fixture(scope="module")
def their_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of the user's own: a.b:C, a.b:Counting, d:E."""
    folder = tmp_path_factory.mktemp("their_modules")
    (folder / "a").mkdir()
    (folder / "a/b.py").write_text(TASK.format("C") + TASK.format("Counting"))
    (folder / "d.py").write_text(TASK.format("E"))
    return folder


@pytest.fixture
def vlmrl(tmp_path: Path, their_modules: Path) -> Callable[..., Ended]:
    """`vlmrl("seed=1")`: `python -m vlmrl seed=1` in an empty folder; `run=` is the source of a fake run module."""

    def start(*arguments: str, run: str | None = None) -> Ended:
        command = [sys.executable, *(["-m", "vlmrl"] if run is None else ["-c", FAKE_RUN, run]), *arguments]
        environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{their_modules}"}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return start


# ── what it refuses ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["trainer.learning_rat=1"],
            ["trainer.learning_rat: there is no such key", "did you mean trainer.learning_rate"],
        ),
        (["trainer.max_steps=many"], ["trainer.max_steps: Value 'many'", "Integer"]),
        (["mode=train"], ["mode: Invalid value 'train'", "rl, sft, dpo, eval, check, preview, play, serve, doctor"]),
        (
            ["model=qwen3vl_tin"],
            ["model=qwen3vl_tin: model has only auto, qwen3vl, qwen3vl_moe", "did you mean qwen3vl_tiny?"],
        ),
        (
            ["orchestrator/renderer=none"],
            [
                "orchestrator.renderer=null leaves model.name=qwen3vl_tiny without a renderer",
                "set orchestrator/renderer=auto",
            ],
        ),
        (["+trainer.pace=1"], ["trainer.pace: there is no such key"]),
        (["output_dir=there"], ["output_dir=there cannot be set", "set hydra.run.dir=there"]),
        (["orchestrator.renderer.name=qwen3"], ["orchestrator.renderer.name=qwen3", "model.vlm.family=qwen3_vl"]),
        (["task=no_such.module:Task"], ["task.target=no_such.module:Task names a module that does not exist"]),
        (["algorithm=a.b:my_loss"], ["algorithm.loss=a.b:my_loss names 'my_loss', which a.b", "does not define"]),
    ],
)
def test_refused(arguments: list[str], messages: list[str], vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    ended = vlmrl(*arguments)
    assert ended.code == 2
    for message in messages:
        assert message in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 1, "one line"
    assert not ended.out
    assert list(tmp_path.iterdir()) == [], "nothing is made for a run that is refused"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=1"], "did you mean trainer.learning_rate or"),
        (["modle/vlm=qwen3_vl"], "modle/vlm: there is no such group; did you mean model/vlm?"),
        (["seed"], "seed does not parse as key=value"),
        (["seed=[1"], "seed=[1 does not parse as key=value"),
        (["seed=1,2"], "add --multirun"),
        (["trainer=null"], "trainer=null"),
        (["~trainer.max_steps"], "trainer.max_steps: TrainerConfig (DictConfig) does not support deletion"),
        (["model=qwen3vl", "model.tiny.seed=3"], "model.tiny.seed=3: model.tiny is null under these choices"),
        (
            ["model.lora.rank=4"],
            "model.lora is null under these choices, so it has no keys: choose",
        ),
        (
            ["experiment=null"],
            "is not how Hydra leaves a group out: write ~experiment or experiment=[]",
        ),
        (["model/lora=null"], "write ~model/lora or model/lora=[], or choose model/lora=<one of all_linear, nf4>"),
        (
            ["task=null"],
            "a run needs one: choose task=<one of clip_direction, color_codeword, dataset, gymnasium, imported, "
            "mixture, program, small_print, verifiers>",
        ),
        (["hydra.run.dirr=x"], "hydra.run.dirr: there is no such key"),
        (["algorithm=rloo,a.b:c"], "algorithm=rloo,a.b:c mixes import paths with names of options"),
        (["reward=null"], "reward=null is not how Hydra leaves a group out: write ~reward or reward=[], or choose"),
        (["monitor/logger=null"], "write ~monitor/logger or monitor/logger=[], or choose monitor/logger=<one of auto"),
        (["+reward@reward.terms.a=null"], "reward@reward.terms.a=null chooses no option, so there is nothing to add"),
        (["reward=exact,format"], "write reward=[exact,format] for one run, or add --multirun for a run with each"),
        (["reward=[exact,exact]"], "names exact twice, and equal names would be one: write one of them, or +reward@"),
        (["reward=[exact,formt]"], "reward has no option formt, only anls, choice, exact, f1, format, "),
        (["reward={exact: 1}"], "is no list of options of reward: write reward=[<option>,<option>], and set the keys"),
        (["reward.exact.weight=1"], "reward.exact.weight: there is no such key; did you mean reward.terms.<name>.we"),
        (["reward.terms.exact.weight=1"], "in the chosen option of reward.terms.exact; +reward@reward.terms.exact=exa"),
        (["task@task.tasks.a=dataset"], "To append to your default list use +task@task.tasks.a=dataset"),
        (["task=mixture", "task.tasks.a.path=x"], "in the chosen option of task.tasks.a; +task@task.tasks.a=dataset"),
        (["--multirun", "--cfg", "job"], "Only one of"),
        (
            ["orchestrator=[1]"],
            "orchestrator=[1] names no option of orchestrator: choose orchestrator=<one of default, f",
        ),
        (["orchestrator=1"], "orchestrator=1 names no option of orchestrator"),
        (["trainer.seq_len=a=b"], "put the value into quotes, inside the shell's: 'trainer.seq_len=\"a=b\"'"),
        (["task.args.x=[a=b]"], "task.args.x=[a=b] does not parse as key=value: no viable"),
        (
            ["task.args.x=[a=b]"],
            "put each text in it into quotes, or all of it if it is one text, inside the shell's: 'task.args.x=[\"a",
        ),
        (["hydra.verbose=[1]"], "these choices do not compose (TypeError: A logger name must be a string"),
        (["experiment=" + "x" * 300], "experiment has only"),
        (["task.args.x=${nope}"], "or write \\${ where the text itself holds ${"),
        (["--config-dir", "absent"], "absent' not found"),
    ],
)
def test_what_does_not_compose(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: Hydra raises before it touches logging or makes a folder."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_file_of_the_users_own_is_named(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "conf/task").mkdir(parents=True)
    (tmp_path / "conf/task/mine.yaml").write_text("defaults: [color_codeword, _self_]\nimage_sise: 64\n")
    ended = vlmrl("--config-dir", "conf", "task=mine")
    assert ended.code == 2
    assert "In 'task/mine'" in ended.err
    assert "image_sise" in ended.err
    (tmp_path / "conf/task/mine.yaml").write_text("defaults: [color_codeword, _self_]\nimage_size: 64\n")
    assert "image_size: 64" in vlmrl("--config-dir", "conf", "task=mine", "--cfg", "job").out


@pytest.mark.parametrize(("key", "arguments"), [("hydra.run.dir", []), ("hydra.sweep.dir", ["--multirun", "seed=0,1"])])
def test_an_output_folder_that_cannot_be_made(
    key: str, arguments: list[str], vlmrl: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = vlmrl(f"{key}=file/run", *arguments)
    assert ended.code == 2
    assert f"error: {key}: " in ended.err
    assert "Not a directory" in ended.err
    assert "Traceback" not in ended.err


# ── what it shows ───────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_group_and_option(vlmrl: Callable[..., Ended]) -> None:
    ended = vlmrl("--help")
    assert ended.code == 0
    assert not ended.err
    table = ended.out[ended.out.index("Groups") : ended.out.index("Modes")]
    rows = table.split("\n  ")
    for group in groups():
        if group.startswith("hydra"):
            continue
        row = next(index for index, row in enumerate(rows) if row.startswith(f"{group} "))
        following = [index for index, text in enumerate(rows) if index > row and not text.startswith(" ")]
        entry = " ".join(rows[row : following[0] if following else None])
        for option in sorted((CONF / group).glob("*.yaml")):
            assert option.stem in entry, f"{group}={option.stem}"
    assert ended.out.count("python -m vlmrl") >= 5
    assert "outputs/" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120


def test_cfg_job_is_what_would_run(vlmrl: Callable[..., Ended]) -> None:
    config = OmegaConf.create(vlmrl("--cfg", "job", "seed=7").out)
    assert isinstance(config, DictConfig)
    assert config.seed == 7
    assert config.model.name == "qwen3vl_tiny"
    assert "defaults" not in config


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--cfg", "job"], 0),
        (["--help"], 0),
        (["explain", "trainer"], 0),
        (["lr=1"], 2),
        (["trainer.max_steps=many"], 2),
        (["model=qwen3vl", "inference=vllm", "orchestrator.group_size=1"], 2),
        (["-m", "seed=0,1", "orchestrator.group_size=1"], 2),
        (["-sc", "install=bash"], 0),
        (["--version"], 0),
        (["init", "counting"], 0),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(arguments: list[str], code: int, tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "renderers", "wandb", "vllm", "numpy", "PIL")
    source = (
        "import atexit, sys; from vlmrl.cli.main import main; "
        f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", source, *arguments]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == "[]"


def test_mode_check_does_what_the_tasks_check_does(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    """The composed task config against the contract, the same table and exit code; no torch and no run folder."""
    source = (PACKAGE / "cli/template/my_task.py").read_text()
    (tmp_path / "sound.py").write_text(source)
    (tmp_path / "broken.py").write_text(source.replace("done=True", "done=False"))
    before = sorted(path.name for path in tmp_path.iterdir())
    sound = vlmrl("mode=check", "task=sound:MyTask", "task.args.level=2")
    assert (sound.code, sound.err) == (0, "")
    assert sound.out.startswith("ok    methods ")
    broken = vlmrl("mode=check", "task=broken:MyTask")
    assert broken.code == 1
    assert "FAIL  ends " in broken.out
    several = vlmrl("--multirun", "mode=check", "task=sound:MyTask,broken:MyTask")
    assert several.code == 1
    assert several.out.count("job ") == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_the_check_reads_settings_as_a_run_does(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    """YAML 1.1 would read yes as True, 12:30 as 750 and 010 as 8."""
    (tmp_path / "shows.py").write_text(
        "from vlmrl import ConfigError, Task\n"
        "class Shows(Task):\n"
        "    def __init__(self, config, *, seed): raise ConfigError(f'args={config.args}')\n"
        "    def problem(self, split, index): pass\n"
        "    def env(self, problem): pass\n"
    )
    settings = ["flag=yes", "t=12:30", "n=010", "on=on", "x=0x10", "h=off", "m={a:1}", "l=[1,2]", "s='a=b'"]
    short = command(["shows:Shows", *(f"args.{setting}" for setting in settings)])
    ended = vlmrl(*short)
    shown = {"flag": "yes", "t": "12:30", "n": "010", "on": "on", "x": "0x10", "h": "off", "m": {"a": 1}, "l": [1, 2]}
    assert ended.code == 2
    assert f"args={shown | {'s': 'a=b'}}" in ended.err


# ── what it starts ──────────────────────────────────────────────────────────────────────────────────────────


def runs(ended: Ended) -> list[list[object]]:
    """What PRINT_CONFIG printed, one entry per run."""
    return [json.loads(line.removeprefix("RUN ")) for line in ended.out.splitlines() if line.startswith("RUN ")]


def test_a_run_gets_its_folder(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    ended = vlmrl("seed=3", run=PRINT_CONFIG)
    assert (ended.code, ended.err) == (0, "")
    [[seed, target, _, output_dir]] = runs(ended)
    assert (seed, target) == (3, "vlmrl.tasks.color_codeword:ColorCodeword")
    folder = Path(str(output_dir))
    assert folder.is_absolute()
    assert folder.is_relative_to(tmp_path / "outputs")
    assert folder.name.endswith("_color_codeword_tiny")
    assert list(folder.iterdir()) == [], "Hydra leaves nothing of its own there"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["experiment=color_codeword_tiny"], "color_codeword_tiny"),
        (["task=a.b:Counting", "mode=eval"], "qwen3vl_tiny_Counting_eval"),
    ],
)
def test_a_folder_is_called_after_what_was_chosen(arguments: list[str], name: str, vlmrl: Callable[..., Ended]) -> None:
    [[*_, output_dir]] = runs(vlmrl(*arguments, run=PRINT_CONFIG))
    assert re.fullmatch(rf"\d\d-\d\d-\d\d_{name}", Path(str(output_dir)).name)


def test_multirun_over_import_paths(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    ended = vlmrl("--multirun", "task=a.b:C,d:E", "task.args.level=3", "seed=0,1", run=PRINT_CONFIG)
    assert ended.code == 0
    assert [run[:3] for run in runs(ended)] == [
        [seed, target, {"level": 3}] for target in ("a.b:C", "d:E") for seed in (0, 1)
    ]
    folders = [Path(str(run[3])) for run in runs(ended)]
    assert len(set(folders)) == 4
    assert all(folder.is_relative_to(tmp_path / "outputs/multirun") for folder in folders)


def test_a_sweeps_file_may_name_import_paths(vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "conf/sweep").mkdir(parents=True)
    (tmp_path / "conf/sweep/tasks.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      task: a.b:C,d:E\n      task.args.level: 1,2\n"
    )
    ended = vlmrl("--config-dir", "conf", "+sweep=tasks", run=PRINT_CONFIG)
    assert ended.code == 0, ended.err
    assert [run[1:3] for run in runs(ended)] == [
        [target, {"level": level}] for target in ("a.b:C", "d:E") for level in (1, 2)
    ]


def test_multirun_goes_on_after_a_failure(vlmrl: Callable[..., Ended]) -> None:
    fails_once = (
        f"import vlmrl.errors\n{PRINT_CONFIG}\nprint_config = execute\n"
        "def execute(config):\n"
        "    if config.seed == 0: raise vlmrl.errors.EngineError('the engine is gone')\n"
        "    return print_config(config)"
    )
    ended = vlmrl("--multirun", "seed=0,1", run=fails_once)
    assert ended.code == 1
    assert [run[0] for run in runs(ended)] == [1]
    assert "error: the engine is gone" in ended.err
    assert "seed=0" in ended.err, "the job is named"
    assert "Traceback" not in ended.err


def test_ctrl_c_ends_a_multirun(vlmrl: Callable[..., Ended]) -> None:
    interrupted = (
        "from vlmrl.errors import Interrupted\ndef execute(config):\n    raise Interrupted('stopped and saved')"
    )
    ended = vlmrl("--multirun", "seed=0,1", run=interrupted)
    assert (ended.code, ended.err) == (1, "interrupted: stopped and saved\n"), "once: the other job is not started"


@pytest.mark.parametrize(
    ("raised", "code", "message", "traceback"),
    [
        ("vlmrl.errors.EngineError('the engine is gone')", 1, "error: the engine is gone\n", False),
        ("vlmrl.errors.ConfigError('set it')", 2, "error: set it\n", False),
        ("OSError(2, 'No such file or directory', 'weights')", 1, "'weights'", True),
        ("ValueError('a slip')", 1, "ValueError: a slip", True),
        ("KeyboardInterrupt()", 1, "interrupted\n", False),
    ],
)
def test_how_a_run_that_raises_ends(
    raised: str, code: int, message: str, traceback: bool, vlmrl: Callable[..., Ended]
) -> None:
    ended = vlmrl(run=f"import vlmrl.errors\ndef execute(config):\n    raise {raised}")
    assert ended.code == code
    assert message in ended.err
    assert ("Traceback" in ended.err) == traceback
    if not traceback:
        assert ended.err == message


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run_dir(tmp_path: Path, run_config: Callable[..., RunConfig]) -> RunDir:
    """A run of a task of the user's own, with config.yaml and nothing else."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.write_config(run_config("task=imported", "task.target=a.b:C", "++task.args.level=3", "algorithm=gspo"))
    return run_dir


def test_resume_takes_the_runs_own_config(run_dir: RunDir) -> None:
    assert "environment" in OmegaConf.load(run_dir.config)
    config = parse(resumed([f"resume={run_dir.path}", "mode=eval", "trainer.max_steps=7", "++task.args.level=4"])[0])
    assert isinstance(config.task, ImportedTaskConfig)
    assert (config.task.target, config.task.args) == ("a.b:C", {"level": 4})
    assert config.algorithm.clip_high == 4e-4
    assert config.trainer.max_steps == 7
    assert config.resume == config.output_dir == str(run_dir.path)


def test_resume_follows_links(run_dir: RunDir, vlmrl: Callable[..., Ended]) -> None:
    link = run_dir.path.parent / "latest"
    link.symlink_to(run_dir.path)
    ended = vlmrl("resume=latest", "seed=0", "task.args.more=1", run=PRINT_CONFIG)
    assert (ended.code, ended.err) == (0, "")
    note = "task.args.more changes from null to 1, so the curves may bend from here on"
    assert f"note: {note}\n" in ended.out
    assert note in run_dir.main_log.read_text()
    assert runs(ended) == [[0, "a.b:C", {"level": 3, "more": 1}, str(run_dir.path.resolve())]]
    assert sorted(path.name for path in link.parent.iterdir()) == ["latest", "run"], "no folder but the run's"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=qwen3vl", "model.name=Qwen/Qwen3-VL-4B-Instruct cannot continue resume="),
        ("~model/vlm", "model.vlm.family=null cannot continue resume="),
        ("+trainer.pace=1", "trainer.pace: there is no such key"),
        ("--multirun", "--multirun is not a value that a resumed run can change"),
        ("hydra.run.dir=x", "hydra.run.dir=x is not a value that a resumed run can change"),
        ("output_dir=x", "output_dir=x is not a value that a resumed run can change"),
        ("mode=sft", "because its steps would be mixed with those of mode=rl"),
        ("seed=7", "seed=7 cannot continue resume="),
        ("model.tiny.hidden_size=96", "which ran with model.tiny.hidden_size=64: the checkpoint would not fit"),
        ("model.tiny={hidden_size: 96}", "model.tiny.hidden_size=96 cannot continue"),
        ("model.vlm=null", "model.vlm.family=null cannot continue"),
        ("seed=1,2", "seed=1,2 lists values to sweep over"),
        ("trainer.max_step=1", "did you mean trainer.max_steps"),
        ("trainer.max_steps=many", "trainer.max_steps: Value 'many'"),
        ("seed", "seed does not parse"),
    ],
)
def test_resume_refuses(override: str, message: str, run_dir: RunDir) -> None:
    with pytest.raises(ConfigError) as caught:
        resumed([f"resume={run_dir.path}", override])[1]()
    assert message in str(caught.value)


def test_what_a_resumed_run_may_change(run_dir: RunDir) -> None:
    """The metadata of a changed value decides: free, noted, refused. An unchanged value is never refused."""
    resume = f"resume={run_dir.path}"
    assert resumed([resume, "trainer.threads=2", "monitor.live=false", "seed=0"])[1]() == []
    config, judge_changes = resumed([resume, "trainer.learning_rate=1e-5", "++task.args.level=4"])
    assert judge_changes() == [
        "task.args.level changes from 3 to 4, so the curves may bend from here on",
        "trainer.learning_rate changes from 0.0015 to 1e-05, so the curves may bend from here on",
    ]
    assert config.trainer.learning_rate == 1e-5
    for mode in ("eval", "export"):  # adds no step
        assert resumed([resume, f"mode={mode}", "seed=7"])[1]() == []


def test_resume_is_checked(run_dir: RunDir) -> None:
    config, _ = resumed([f"resume={run_dir.path}", "orchestrator.renderer=null"])
    with pytest.raises(ConfigError, match=r"orchestrator\.renderer=null leaves model\.name"):
        checked(config)


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_resume_of_no_run(folder: str, vlmrl: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = vlmrl(f"resume={folder}")
    assert ended.code == 2
    assert f"{folder} holds no readable config.yaml" in ended.err
    assert "Traceback" not in ended.err


# ── packaging ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wheel_has_every_package() -> None:
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("not a checkout")
    setuptools = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]
    packages = {path.parent.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("__init__.py")}
    assert set(setuptools["packages"]) == {package.replace("/", ".") for package in packages} | {"vlmrl.conf"}
    assert setuptools["package-dir"] == {"vlmrl.conf": "conf"}


@pytest.mark.parametrize(
    ("mode", "more", "notes"),
    [
        ("check", (), ["reward has the terms exact, which mode=check does not read"]),
        (
            "compare",
            (),
            ["reward has the terms exact, which mode=compare does", "task.kind=dataset is not read with mode=compare"],
        ),
        ("sft", ("orchestrator.eval.problems=0",), ["reward has the terms exact, which mode=sft does not read"]),
        ("sft", (), []),
        ("rl", (), []),
    ],
)
def test_what_a_mode_does_not_read_is_said_and_not_refused(
    mode: str, more: tuple[str, ...], notes: list[str], run_config: Callable[..., RunConfig]
) -> None:
    data = ("task=dataset", "task.path=rows.jsonl", "reward=exact", "trainer.warmup.steps=1", "runs=[a]")
    config = run_config(f"mode={mode}", *data, *more)
    assert [note[: len(start)] for note, start in zip(notes_on_unread(config), notes, strict=True)] == notes


def test_hydra_copies_no_store_of_schemas() -> None:
    """Hydra copies its config sources, with the store, 190 times for `--help`, which took 3 s."""
    register_schemas()
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store
    assert store.load("schema/run.yaml").node is not store.load("schema/run.yaml").node, "no job changes another's"
