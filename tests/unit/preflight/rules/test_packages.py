"""Optional packages that are not installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight import installed
from vlmrl.preflight.rules.packages import packages_are_installed
from vlmrl.preflight.site import Site


@pytest.mark.parametrize(
    ("overrides", "package", "message"),
    [
        (("model/lora=nf4",), "bitsandbytes", r"base_dtype=nf4 needs the package bitsandbytes.*'vlmrl\[4bit\]', or"),
        (("model/lora=all_linear",), "peft", r"^model\.lora needs the package peft.*pip install 'vlmrl\[lora\]', or"),
        (
            ("trainer.optimizer=adamw_8bit",),
            "torchao",
            r"adamw_8bit needs the package torchao.*pip install 'vlmrl\[8bit\]'",
        ),
        (("inference=vllm",), "vllm", r"inference=vllm needs the package vllm.*pip install 'vlmrl\[vllm\]'.*urls"),
        (("inference=vllm",), "torchvision", r"inference=vllm needs the package torchvision.*fits the installed torch"),
        (
            ("inference=vllm", "inference.urls=[http://there:1]", "weight_sync=nccl"),
            "vllm",
            r"weight_sync=nccl needs the package vllm.*in the version of the servers",
        ),
        (
            ("task=dataset", "task.path=rows.jsonl", "task.columns.videos=clip"),
            "torchvision",
            r"^task\.columns\.videos needs the package torchvision.*no video can be shown.*'vlmrl\[video\]', or set",
        ),
        (
            ("monitor.wandb.mode=online",),
            "wandb",
            r"monitor\.wandb\.mode=online needs the package wandb.*'vlmrl\[wandb\]', or set .*=disabled",
        ),
        (
            ("monitor/logger=[wandb,tensorboard]",),
            "wandb",
            r"monitor\.wandb\.mode=offline needs the package wandb",
        ),
        (
            ("monitor/logger=[wandb,tensorboard]",),
            "tensorboard",
            r"monitor\.tensorboard\.enabled=true needs the package tensorboard.*'vlmrl\[tensorboard\]', or leave",
        ),
    ],
)
def test_a_missing_package_is_refused_with_its_pip_line(
    overrides: tuple[str, ...],
    package: str,
    message: str,
    run_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda name: name != package)
    with pytest.raises(ConfigError, match=message):
        packages_are_installed(run_config(*overrides), Site())
    monkeypatch.setattr(installed, "is_installed", lambda name: True)
    packages_are_installed(run_config(*overrides), Site())


def test_servers_that_run_already_need_no_vllm_here(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda name: name != "vllm")
    packages_are_installed(run_config("inference=vllm", "inference.urls=[http://there:1]"), Site())


def test_a_task_that_serves_needs_no_package_of_the_trainer(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "is_installed", lambda name: name != "torchao")
    packages_are_installed(run_config("inference=vllm", "trainer.optimizer=adamw_8bit"), Site(serves=True))


@pytest.mark.parametrize("package", ["no_such_package_here", "torch"])
def test_what_is_installed_is_found_without_an_import(package: str) -> None:
    assert installed.is_installed(package) is (package == "torch")
