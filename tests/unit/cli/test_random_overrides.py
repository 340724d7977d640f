"""Three hundred random overrides of single keys: each is taken or refused in words, and soon."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from vlmrl.cli.arguments import rewrite
from vlmrl.cli.past_runs import override
from vlmrl.config.keys import known_keys
from vlmrl.config.parse import parse
from vlmrl.errors import VlmrlError
from vlmrl.preflight.check import Stage, check
from vlmrl.preflight.estimate.plan import dry_run

BASES = (
    (),
    ("model=qwen3vl", "inference=vllm", "weight_sync=nccl", "model/lora=all_linear"),
    ("model=qwen3vl_moe", "model.init=random", "algorithm=dapo"),
)

VALUES = (
    *(
        "0",
        "1",
        "-1",
        "-5",
        "2",
        "3",
        "16",
        "0.25",
        "0.5",
        "-0.0",
        "1e-300",
        "5e-324",
        "1e20",
        "9e18",
        "1e308",
        "1e400",
        "inf",
        "-inf",
        "nan",
    ),
    *("9223372036854775807", "9223372036854775808", "null", "true", "false", "yes", "''", "' '", "abc", "日本", "a=b"),
    *("[]", "[1]", "[a]", "[[]]", "[null]", "[-1]", "[1e20]", "[nan]", "[0.9,0.999]", "{}", "{a:1}", "{a:{b:[1]}}"),
    *(
        "a,b",
        "a:b",
        "~",
        "~/x",
        "/dev/null",
        "/proc/x",
        "..",
        "???",
        "${seed}",
        "${nope}",
        r"\${x}",
        "${",
        "}",
        "(",
        "[",
    ),
    *("'", '"', "\\", "%", "#x", "@", "0x10", "007", "1_000", "12:30", "x" * 3000, "range(3)", "int(x)", "glob(*)"),
    *("\x01", "-", "--help", "<|im_end|>", "bfloat16", "cuda", "cuda:99", "cpu", "a\udc80b", "https://u:pw@h", "10**9"),
)

SEED = 20261128

COUNT = 300

LIMIT_S = 10.0
"""Processor seconds that one may take; the slowest takes a tenth of one."""


def test_each_is_taken_or_refused_in_words(composed: Callable[..., DictConfig]) -> None:
    bases = [composed(*base) for base in BASES]
    keys = [key.replace(".*", "") for key in known_keys()]
    keys += ["model.lora", "model.vlm", "model.size", "model.tiny", "trainer", "orchestrator.eval", "task.args.x.y"]
    keys += [
        "model.size.text.hidden_size",
        "model.size.text.anything",
        "model.size.vision.depth",
        "inference.extra_args.q",
    ]
    choice = random.Random(SEED)
    taken = 0
    for _ in range(COUNT):
        base = choice.choice(bases)
        words = [f"{choice.choice(('', '', '++'))}{choice.choice(keys)}={choice.choice(VALUES)}"]
        began = time.process_time()
        taken += is_taken(base, words)
        assert time.process_time() - began < LIMIT_S, words
    assert 10 <= taken <= 200, f"{taken}: most are nonsense, and some are not"


def is_taken(base: DictConfig, words: list[str]) -> bool:
    config = copy.deepcopy(base)
    try:
        override(config, rewrite(words))
        run_config = parse(config)
        check(run_config, Stage.composed)
        dry_run(run_config)
    except VlmrlError:
        return False
    except BaseException as error:
        raise AssertionError(f"{words} ends in a traceback") from error
    return True


@pytest.mark.parametrize("words", [["model.lora.rank=abc"], ["model.size.name=x"], ["model.tiny.vision_depth=1e20"]])
def test_what_once_ended_in_a_traceback_or_never(words: list[str], composed: Callable[..., DictConfig]) -> None:
    assert not is_taken(composed(), words)
