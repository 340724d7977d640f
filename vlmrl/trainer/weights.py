"""The trainable weights in two forms: float32 for the optimizer, and the model's dtype for forward and backward.

    PlainWeights     every rank holds the whole model (trainer.sharding=none, and a run of one process)
    ShardedWeights   every rank holds a slice of each tensor (FSDP2); a layer is whole only while it is computed
                     (trainer.sharding=full), or through all passes of a step, with the sum of its gradients (optimizer)

A policy gradient's step is of the order of the learning rate, 1e-6 of a weight, and bfloat16 rounds such a step to
nothing. So whatever dtype the model computes in, trainable weights are kept in float32 ("master weights"), as are the
optimizer's averages and the sum of the gradients over micro-batches. `trainer.cpu_offload` keeps all of these in the
host's memory.

    micro-batch: gradient in the model's dtype ─▶ added to the float32 gradient ─▶ summed over ranks ─▶ optimizer step
    on the float32 weights ─▶ publish: copied, or gathered, into the weights that the next forward pass computes with

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
from vlmrl.models.value_head import is_of_value_head, value_head
from vlmrl.models.vision_encoder import image_parameters

T = TypeVar("T")


class PlainWeights:
    """Weights that every rank holds whole. Where the model computes in float32 and is not offloaded, the optimizer
    changes the model's parameters themselves; otherwise it changes float32 master weights."""

    def __init__(self, model: Any, *, offload: bool, ranks: int) -> None:
        self._model = model
        self._offload = offload
        self._ranks = ranks

    @cached_property
    def _masters(self) -> dict[str, nn.Parameter]:
        """The master weights by the names of their parameters; empty where none are needed. Created on first use, since
        they are a second copy of the weights."""
        masters = {}
        for name, parameter in self._model.named_parameters():
            moves = self._offload and parameter.device.type != "cpu"
            if parameter.requires_grad and (parameter.dtype != torch.float32 or moves):
                place = torch.device("cpu") if self._offload else parameter.device
                masters[name] = nn.Parameter(parameter.detach().to(place, torch.float32))
                parameter.register_post_accumulate_grad_hook(partial(_add_to_master_gradient, masters[name]))
        return masters

    def trainable(self) -> dict[str, Tensor]:
        """The tensors that the optimizer changes, by name; float32."""
        return {name: self._masters.get(name, p) for name, p in self._model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores: those of `trainable`, and frozen parameters in the model's dtype."""
        return {name: self._masters.get(name, p) for name, p in self._model.named_parameters()}

    def compute(self, function: Callable[[], T], *, last: bool) -> T:
        """Run a forward pass. `last`: the last of a step, or of a series of passes without gradients."""
        return function()

    def with_whole(self, function: Callable[[], T]) -> T:
        """Call `function`, which computes with whole weights."""
        return function()

    def sum_gradients(self) -> None:
        """Sum the gradients over the ranks, after the last backward pass of a step."""
        if self._ranks > 1:
            under_way = [
                dist.all_reduce(tensor.grad, async_op=True)
                for tensor in self.trainable().values()
                if tensor.grad is not None  # on all ranks or on none, as all run the same parts of the model
            ]
            for work in under_way:
                assert work is not None
                work.wait()

    def publish(self) -> None:
        """Copy the master weights into the parameters that the next forward pass computes with."""
        with torch.no_grad():
            parameters = dict(self._model.named_parameters())
            for name, master in self._masters.items():
                parameters[name].copy_(master)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the forward pass computes with, by name, one after the other. They are copies only where
        LoRA adapters are merged into them."""
        yield from merged(self._model)


def _add_to_master_gradient(master: nn.Parameter, parameter: Tensor) -> None:
    """Move the gradient of one micro-batch, in the model's dtype, into the float32 sum over micro-batches."""
    assert parameter.grad is not None
    grad = parameter.grad.to(master.device)
    parameter.grad = None
    if master.grad is None:
        master.grad = grad.to(master.dtype)
    else:
        master.grad += grad  # adds in float32


class ShardedWeights:
    """Weights of which every rank holds a slice (FSDP2).

    A part that is frozen as a whole (what makes the features of images, or everything else) is replicated, not sharded,
    so that a rank may skip it: the features of an image may be cached, and a layer may need no backward pass.

    Between steps, all sharded parameters are slices. With `kept_whole`, an FSDP unit is gathered in the first pass of a
    step that computes it and stays whole until the backward pass of the last micro-batch, which reduces the gradients
    that all passes of the step have summed.
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
        head = value_head(model)
        for module in [*blocks(model), *([] if head is None else [head]), self._root]:
            parameters = [p for p in module.parameters() if p not in whole]
            if not parameters:
                continue
            for parameter in parameters:
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            in_float32 = {"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)} if module is head else {}
            sharded: Any = fully_shard(module, **(arguments | in_float32))
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            self._units.append(sharded)
        if kept_whole:
            # FSDP asks every unit whether it has summed gradients, also one that no pass has computed (the vision tower
            # of a run that has seen no image), and a unit can answer only after it was gathered once.
            for unit in self._units:
                unit.unshard()
                unit.reshard()
        for module in model.modules():
            # With this flag set, torch.compile treats a layer's integers, such as its head size, as dynamic sizes, and
            # has no attention kernel for a dynamic head size.
            module._is_fsdp_managed_module = False

    def trainable(self) -> dict[str, Tensor]:
        """The tensors that the optimizer changes, by name: this rank's slices, float32."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores."""
        return dict(self._model.named_parameters())

    def compute(self, function: Callable[[], T], *, last: bool) -> T:
        """Run a forward pass with the weights that belong to no layer gathered. `last`: the last of a step, or of a
        series of passes without gradients."""
        if self._kept_whole:
            for unit in self._units:
                unit.set_requires_gradient_sync(last, recurse=False)
                unit.set_reshard_after_backward(last, recurse=False)
        found: T = self._root(function)
        if last and not torch.is_grad_enabled():
            self._slice()
        return found

    def with_whole(self, function: Callable[[], T]) -> T:
        """Call `function` with all weights gathered. Its passes wait for no other rank, so ranks may make different
        numbers of them. Every rank must call this."""
        for unit in self._units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            found: T = self._root(function)
        finally:
            for unit in self._units:
                is_sliced_again = not self._kept_whole and unit is not self._root
                unit.set_reshard_after_forward(is_sliced_again, recurse=False)
            self._slice()
        return found

    def sum_gradients(self) -> None:
        """Make sure that the gradients are summed over the ranks. FSDP does it in the last backward pass, and slices
        the weights again. Where the last loss involved no trainable parameter, that pass did not run, so a backward
        pass of a constant zero runs here instead."""
        from torch.distributed.tensor import DTensor

        if not all(isinstance(p, DTensor) for p in self.trainable().values()):
            zero = torch.zeros((), device=self._device, requires_grad=True)
            torch.autograd.backward(self.compute(lambda: 1.0 * zero, last=True))
            self._slice()

    def publish(self) -> None:
        """Slice all weights, so that the next forward pass gathers the new values."""
        self._slice()

    def _slice(self) -> None:
        """Free all gathered weights. After a pass without gradients FSDP frees those of the layers but not those of the
        root, and `model.parameters()` would then return the root's whole tensors, which the optimizer does not
        change."""
        for unit in self._units:
            unit.reshard()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors in the model's dtype, by name, gathered one after the other. Every rank must iterate to the
        end."""
        yield from merged(self._model, lambda parameter: gathered(parameter, self._device, self._dtype))


class _Root(nn.Module):
    """Wraps the model as FSDP's root module. The parts of the model (vision tower, layers, head) are called one by one,
    and FSDP requires that this happens within the forward pass of its root."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def gathered(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The whole tensor in `dtype`, from the slices of all ranks; the tensor itself where it is not sharded."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local().detach().to(device, dtype)
    placed = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return placed.full_tensor()


def _frozen(model: Any) -> set[nn.Parameter]:
    """The parameters that make the features of images, if all of them are frozen, and the others, if all of those
    are. A value head is no part of either: it always learns."""
    of_images = set(image_parameters(model))
    of_head = {parameter for name, parameter in model.named_parameters() if is_of_value_head(name)}
    parts = (of_images, set(model.parameters()) - of_images - of_head)
    return {p for part in parts if not any(each.requires_grad for each in part) for p in part}
