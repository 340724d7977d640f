"""`python -m vlmrl init my_task`: copy the example task in template/ into a new folder, under another name.

    template/my_task.py                      ─▶ counting/counting.py            (class MyTask becomes Counting)
    template/test_my_task.py                 ─▶ counting/test_counting.py
    template/conf/experiment/my_task.yaml    ─▶ counting/conf/experiment/counting.yaml
    template/README.md                       ─▶ counting/README.md

The template is a task that runs as it is. README.md and docs/ show the same file.
"""

from __future__ import annotations

import importlib.util
import keyword
from collections.abc import Sequence
from pathlib import Path

from vlmrl.config.conf_folder import PACKAGE
from vlmrl.errors import ConfigError
from vlmrl.record.files import disk_errors

TEMPLATE = PACKAGE / "cli" / "template"
TEMPLATE_MODULE, TEMPLATE_CLASS = "my_task", "MyTask"
TEMPLATE_NAMES = ("Disk", "Env", "Image", "ImageDraw", "Message", "PILImage", "Reply", "Task", "COLORS", "QUESTION")
"""Other names in template/my_task.py, which the new class must not hide."""


def init(words: Sequence[str]) -> str:
    """Write the folder that `words` names; returns what to do next. Raises ConfigError, VlmrlError."""
    if len(words) != 1 or words[0].startswith("-") or "=" in words[0]:
        raise ConfigError(
            f"init takes exactly one name, and was given {' '.join(words) or 'none'}: "
            f"write python -m vlmrl init {TEMPLATE_MODULE}"
        )
    folder = Path(words[0])
    module = folder.name
    check_identifier(module)
    if folder.exists():
        raise ConfigError(f"init {folder}: {folder} exists and is not overwritten: choose another name or remove it")
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(
            f"init {folder}: a Python module of the name {module} exists, and the new file would hide it: "
            f"choose another name, for example {module}_task"
        )
    for source in sorted(TEMPLATE.rglob("*")):
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        target = folder / renamed(source.relative_to(TEMPLATE).as_posix(), module)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(source.read_text(encoding="utf-8"), module), encoding="utf-8")
    return (
        f"{folder} is a task that runs. Next:\n\n"
        f"    cd {folder}\n"
        f"    python -m vlmrl.tasks.check {module}:{class_name(module)}\n"
        f"    python -m vlmrl --config-dir conf experiment={module}\n\n"
        f"Then change {module}.py to what you want the model to learn; README.md has all commands."
    )


def check_identifier(module: str) -> None:
    """Raise ConfigError unless `module` can be the name of a Python module."""
    if not module.isidentifier() or not module.isascii() or keyword.iskeyword(module) or not module[0].isalpha():
        suggestion = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in module).strip("_")
        remedy = suggestion if suggestion[:1].isalpha() and not keyword.iskeyword(suggestion) else TEMPLATE_MODULE
        raise ConfigError(
            f"init {module}: {module!r} cannot be the name of a Python module: use letters, digits and underscores "
            f"and start with a letter, for example {remedy}"
        )


def class_name(module: str) -> str:
    """The name of the task's class, other than the names that the template itself uses.

    >>> class_name("count_the_dots"), class_name("chess2"), class_name("disk")
    ('CountTheDots', 'Chess2', 'DiskTask')
    """
    name = "".join(part[:1].upper() + part[1:] for part in module.split("_"))
    return f"{name}Task" if name in TEMPLATE_NAMES else name


def renamed(text: str, module: str) -> str:
    """A text of the template with the names of the new task."""
    return text.replace(TEMPLATE_CLASS, class_name(module)).replace(TEMPLATE_MODULE, module)
