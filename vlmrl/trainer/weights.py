"""The weights as the optimizer and the forward pass hold them: float32 to learn in, the model's dtype to compute in.

    PlainWeights     every rank holds the whole model (trainer.sharding=none, and a run of one process)
    ShardedWeights   every rank holds a slice of each tensor (FSDP2); a layer is whole only while it is computed
                     (trainer.sharding=full), or through all passes of a step, with the sum of its gradients (optimizer)

A policy gradient's step is of the order of the learning rate, 1e-6 of a weight, and bfloat16 rounds such a step to
nothing. So whatever the model computes in, what learns is held in float32, as are the optimizer's averages and the sum
of the gradients over micro-batches. `trainer.cpu_offload` holds all of these in the host's memory.

The loss is a sum over micro-batches and ranks (loss.py), so gradients are summed and never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmrl.models.blocks import blocks
from vlmrl.models.lora import merged

T = TypeVar("T")


class PlainWeights:
    """See the module. Where the model computes in float32 and stays where it is, its parameters are what learns."""

    def __init__(self, model: Any, *, offload: bool, ranks: int) -> None:
        self._model = model
        self._offload = offload
        self._ranks = ranks

    @cached_property
    def _masters(self) -> dict[str, nn.Parameter]:
        """What learns in place of a parameter, by its name. Not made before something is learned: it is a second copy
        of the weights."""
        masters = {}
        for name, parameter in self._model.named_parameters():
            moves = self._offload and parameter.device.type != "cpu"
            if parameter.requires_grad and (parameter.dtype != torch.float32 or moves):
                place = torch.device("cpu") if self._offload else parameter.device
                masters[name] = nn.Parameter(parameter.detach().to(place, torch.float32))
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, masters[name]))
        return masters

    def learning(self) -> dict[str, Tensor]:
        """What the optimizer changes, by name; float32."""
        return {name: self._masters.get(name, p) for name, p in self._model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: `learning`, and what does not learn as it is."""
        return {name: self._masters.get(name, p) for name, p in self._model.named_parameters()}

    def compute(self, function: Callable[[], T], *, last: bool) -> T:
        """Run a forward pass; `last` of a step, or of a number of passes without gradients."""
        return function()

    def sum_gradients(self) -> None:
        """Over the ranks; to be called after the last backward pass of a step."""
        if self._ranks > 1:
            under_way = [
                dist.all_reduce(tensor.grad, async_op=True)
                for tensor in self.learning().values()
                if tensor.grad is not None  # of all ranks or of none: they run the same parts of the model
            ]
            for work in under_way:
                assert work is not None
                work.wait()

    def publish(self) -> None:
        """What learned is what is computed with."""
        with torch.no_grad():
            parameters = dict(self._model.named_parameters())
            for name, master in self._masters.items():
                parameters[name].copy_(master)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are computed with, one after the other; not copies, unless adapters are merged into them."""
        yield from merged(self._model)


def _hand_over(master: nn.Parameter, parameter: Tensor) -> None:
    """The gradient of one micro-batch, in the model's dtype, to the sum of them."""
    assert parameter.grad is not None
    grad = parameter.grad.to(master.device)
    parameter.grad = None
    if master.grad is None:
        master.grad = grad.to(master.dtype)
    else:
        master.grad += grad  # in the sum's dtype


class ShardedWeights:
    """See the module.

    What is frozen as a whole, the vision tower or all but the tower, is left on every rank as it is: the ranks need not
    run it together. The features of an image may be there already, and no gradient may have to come through a layer.

    Parameters are slices between steps, whoever asks for them. With `kept_whole`, units are whole from the first pass
    that computes them to the backward pass of the last one, which reduces what all passes of the step have summed.
    """

    def __init__(self, model: Any, device: torch.device, *, offload: bool, kept_whole: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        self._model = model
        self._device = device
        self._kept_whole = kept_whole
        dtype = self._dtype = next(model.parameters()).dtype
        whole = _frozen(model)
        arguments: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy(),
            "ignored_params": whole,
            "reshard_after_forward": False if kept_whole else None,
        }
        self._root = _Root(model)
        self._units: list[Any] = []
        for module in [*blocks(model), self._root]:
            parameters = [p for p in module.parameters() if p not in whole]
            if not parameters:
                continue
            for parameter in parameters:
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            sharded: Any = fully_shard(module, **arguments)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            self._units.append(sharded)
        for module in model.modules():
            # A compiler that sees this takes a layer's integers, its head size among them, for sizes that change, and
            # then has no attention kernel for them.
            module._is_fsdp_managed_module = False

    def learning(self) -> dict[str, Tensor]:
        """What the optimizer changes, by name; float32, this rank's slices."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return dict(self._model.named_parameters())

    def compute(self, function: Callable[[], T], *, last: bool) -> T:
        """Run a forward pass, with the weights that belong to no layer gathered; `last` of a step, or of a number of
        passes without gradients."""
        if self._kept_whole:
            for unit in self._units:
                unit.set_requires_gradient_sync(last, recurse=False)
                unit.set_reshard_after_backward(last, recurse=False)
        found: T = self._root(function)
        if last and not torch.is_grad_enabled():
            self._slice()
        return found

    def sum_gradients(self) -> None:
        """The backward pass of the last one did, and sliced everything again. Unless there was none, since nothing that
        learns had a part in the last loss: then one through nothing does."""
        from torch.distributed.tensor import DTensor

        if not all(isinstance(p, DTensor) for p in self.learning().values()):
            nothing = torch.zeros((), device=self._device, requires_grad=True)
            torch.autograd.backward(self.compute(lambda: 1.0 * nothing, last=True))
            self._slice()

    def publish(self) -> None:
        """The next forward pass gathers what learned."""
        self._slice()

    def _slice(self) -> None:
        """Let go of what is whole. FSDP leaves the root so even where it lets go of the layers: without this, whoever
        asks for parameters after a pass without gradients is given the root's whole ones, which do not learn."""
        for unit in self._units:
            unit.reshard()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are computed with, gathered one after the other; every rank must come to the end."""
        yield from merged(self._model, lambda parameter: gathered(parameter, self._device, self._dtype))


class _Root(nn.Module):
    """Holds the model, so that what is called of it (its vision tower, its layers, its head) is called within the
    forward pass of the one module that FSDP takes for the root."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def gathered(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The whole of a tensor of which each rank holds a slice, in `dtype`; the tensor itself where it is no slice."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local().detach().to(device, dtype)
    placed = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return placed.full_tensor()


def _frozen(model: Any) -> set[nn.Parameter]:
    """Those of the vision tower, if nothing of it learns; those of the rest, if nothing of that does."""
    tower = model.get_encoder(modality="image")
    of_tower = set() if tower is model else set(tower.parameters())
    parts = (of_tower, set(model.parameters()) - of_tower)
    return {p for part in parts if not any(each.requires_grad for each in part) for p in part}
