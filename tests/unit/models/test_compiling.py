"""Nothing is compiled again in the middle of a run, whatever the micro-batches look like."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes

from support import gpu_path as path
from support.compiling import compile_as_on_a_gpu, count_compilations
from support.helpers import Part, Sampled, image, sample
from vlmrl.config.trainer import Packing
from vlmrl.models import blocks, compiling, head
from vlmrl.models.attention import fused
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.families.positions import position_function
from vlmrl.models.logit_map import IDENTITY
from vlmrl.models.policy import Policy
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.packing import pack
from vlmrl.types import TrainingSample

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own warnings

OPTIONS = compiling.COMPILER["options"]
STEPS = 60
STEPS_TO_COMPILE = 3


@torch.library.custom_op("vlmrl_tests::varlen", mutates_args=())
def varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: list[int]
) -> Tensor:
    """Flash attention by its definition. A compiled layer does not look into it, nor into torch's kernel."""
    return path.flash_by_definition(
        query, key, value, starts, starts, longest, longest, scale=scale, window_size=(window[0], window[1])
    )


@varlen.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: list[int]) -> Any:
    return torch.empty_like(query)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU compiles is compiled here, and the head has one or several chunks of the vocabulary."""
    torch.set_num_threads(1)
    compile_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(head, "MAX_LOGITS", 1 << 15)
    monkeypatch.setattr(
        fused,
        "varlen_attn",
        lambda q, k, v, starts, _, longest, __, *, scale, window_size, **___: varlen(
            q, k, v, starts, longest, scale, list(window_size)
        ),
    )
    yield
    torch.compiler.reset()


def samples_of_step(step: int) -> list[TrainingSample]:
    """Groups of 1 to 5 siblings with none, one or several images, and answers of 1 to 40 tokens."""
    draw = random.Random(step)
    samples = []
    for group in range(draw.choice([1, 1, 2])):
        sizes = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.choice([0, 1, 1, 3]))]
        shown: list[Part] = [image(*size, seed=group) for size in sizes]
        prompt: list[Part] = [[1 + group] * draw.choice([1, 7, 64, 127, 128, 129, 300]), *shown, 5]
        for sibling in range(draw.choice([1, 2, 5])):
            answer = [draw.randint(100, 103) for _ in range(draw.choice([1, 1, 2, 17, 40]))]
            samples.append(sample(f"{step}/{group}/{sibling}", *prompt, Sampled(answer), seed=sibling))
    return samples


def steps_that_compile(step: Callable[[int], None]) -> list[int]:
    """The steps in which torch compiles something, one entry per function, up to the first that is too late."""
    late: list[int] = []
    with count_compilations() as compiled:
        for number in range(STEPS):
            before = len(compiled)
            step(number)
            late += [number] * (len(compiled) - before)
            if late and late[-1] >= STEPS_TO_COMPILE:
                break
    return late


def layers(kernel: Kernel, model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A step of a policy whose layers and head are compiled. Only `blocks` has a backward pass on a CPU."""
    monkeypatch.setattr(Policy, "_is_fused", kernel is not Kernel.blocks)
    policy = Policy(model, position_function("mrope", 2), [])
    blocks.compile_blocks(policy.model)
    packing = Packing.varlen if kernel is Kernel.varlen else Packing.tree

    def step(number: int) -> None:
        samples = samples_of_step(number)
        with torch.set_grad_enabled(kernel is Kernel.blocks):
            for batch in pack(
                samples, packing, 600, policy.positions, policy.device, kernel=kernel, rules=policy.rules
            ):
                logprobs, entropies = loss_logprobs(policy, batch, 1.0)
                if kernel is Kernel.blocks:
                    (logprobs.sum() + entropies.sum()).backward()  # type: ignore[no-untyped-call]

    return step


@pytest.mark.parametrize("kernel", Kernel)
def test_layers_are_compiled_for_all_micro_batches(
    kernel: Kernel, tiny_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = steps_that_compile(layers(kernel, tiny_model(), monkeypatch))
    assert compiled, "nothing is compiled here, so this test shows nothing"
    assert max(compiled) < STEPS_TO_COMPILE


def head_step(number: int) -> None:
    """The head's functions with 1 to 300 rows, some with several targets, a temperature for all or one for each."""
    draw = random.Random(number)
    rows = 300 if number == 0 else draw.choice([1, 2, 3, 5, 16, 17, 64, 127, 128, 300])
    vocabulary = draw.choice([129, 700])
    hidden, weight = torch.randn(rows, 12, requires_grad=True), torch.randn(vocabulary, 12, requires_grad=True)
    entry = torch.cat([torch.arange(rows), torch.zeros(draw.choice([0, 1, 4]), dtype=torch.int64)])
    targets, banned = torch.randint(1, vocabulary, entry.shape), torch.arange(vocabulary) == 0
    temperature = 0.7 if draw.random() < 0.5 else torch.rand(rows) + 0.5
    first = (hidden, weight, None, banned, entry, targets, temperature)
    with torch.no_grad():
        ids = head.most_likely(*first, IDENTITY, 3)[1][0]  # type: ignore[index]
    for outputs in (head.token_logprobs(*first), head.token_and_top_logprobs(*first, IDENTITY, ids)):
        torch.stack([each.sum() for each in outputs]).sum().backward()  # type: ignore[no-untyped-call]


def test_the_head_is_compiled_for_all_sizes() -> None:
    compiled = steps_that_compile(head_step)
    assert compiled
    assert max(compiled) < STEPS_TO_COMPILE


def test_plain_compiling_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal sizes as one, one tensor for two sums, and no exception for single rows."""
    no_columns = head._no_columns

    def shared(hidden: Tensor, targets: Tensor) -> Any:
        largest, total, _, at_target = no_columns(hidden, targets)
        return largest, total, total, at_target

    monkeypatch.setattr(compiling, "for_all_sizes", plainly_compiled)
    monkeypatch.setattr(compiling, "_compiled", cache(plainly_compiled))
    monkeypatch.setattr(head, "_no_columns", shared)
    for name in ("_final_logits", "_add_final", "_add_given_columns", "_add_columns", "_logit_gradient"):
        monkeypatch.setattr(head, name, plainly_compiled(getattr(head, name).__wrapped__))
    assert max(steps_that_compile(head_step)) >= STEPS_TO_COMPILE


def plainly_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        shapes.use_duck_shape = True
        return compiled(*arguments)

    compiled = torch.compile(function, dynamic=True, backend="eager")
    return call


def test_the_options_are_known_to_torch() -> None:
    assert set(OPTIONS) <= set(torch._inductor.list_options())


def test_too_many_variants_are_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """torch runs the ninth variant uncompiled and says so in a logger that no run listens to."""

    def add_length(x: Tensor, kind: str) -> Tensor:
        return x + len(kind)

    before = compiling.functions_given_up()
    of_kind = compiling.for_all_sizes(add_length)
    for kind in range(9):
        assert float(of_kind(torch.ones(2), "x" * kind)[0]) == 1 + kind
    assert compiling.functions_given_up() == before + 1
    (warning,) = [record.message for record in caplog.records if record.name == compiling.__name__]
    assert "runs further kinds uncompiled" in warning


def test_the_compilers_start_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; on a CPU, whose functions are not compiled, no process starts."""
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    AsyncCompile.process_pool.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "compiles_on", lambda device: False)
        compiling.start_compilers(torch.device("cpu"))
    assert not AsyncCompile.process_pool.cache_info().currsize
    with torch._inductor.config.patch(compile_threads=2):
        compiling.start_compilers(torch.device("cpu"))
        assert AsyncCompile.process_pool.cache_info().currsize
        AsyncCompile.wait_pool_ready()
        assert AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]
        shutdown_compile_workers()
