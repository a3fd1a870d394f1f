# SPDX-License-Identifier: MIT
"""Tensors that a device without a driver would hold: whatever would make the host wait for it raises.

Their values are there, so what is computed of them can be compared. `Device` is a mode: in it tensors that are made
on DEVICE are such tensors, and so is what is computed of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # "cuda" would look for a driver
aten = torch.ops.aten
# reads a value, or has as many rows as the values say
WAIT = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique_dim,
    aten._unique2,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.bincount,
}


COPY = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.to}


class Waits(RuntimeError):
    """The host would wait."""


class OnDevice(Tensor):
    """A tensor of the device; ``held`` are its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        raise Waits("tolist")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        name = func.overloadpacket
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if name in WAIT:
            raise Waits(str(func))
        if name in (aten.index, aten.index_put, aten.index_put_):
            if any(x is not None and x.dtype == torch.bool for x in args[1]):
                raise Waits(f"{func} with a mask")
        elif name in (aten._to_copy, aten.copy_):
            target = kwargs.get("device")
            if (target is not None and target.type == "cpu") or any(not isinstance(x, OnDevice) for x in given):
                raise Waits(f"{func} between host and device")
        if any(not isinstance(x, OnDevice) and x.dim() and not _is_weight(x) for x in given):
            raise Waits(f"{func} on tensors of the host and of the device")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        done = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name is aten.copy_:
            return args[0]
        return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, done)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _is_weight(x: Tensor) -> bool:
    """A model's weights are on the device, whatever they say."""
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


def held(x: Tensor) -> Tensor:
    """The values of a tensor of the device, which nobody but a test may see."""
    assert isinstance(x, OnDevice), "a tensor of the host"
    return x.held


class Device(TorchFunctionMode):
    """While it lasts, factories make tensors of the device where they are asked to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in COPY and not any(map(_is_ours, args)) and DEVICE in (device, *args):
            raise Waits(f"{func} from the host, which no pinned memory holds")
        if device is not None and torch.device(device) == DEVICE and not any(map(_is_ours, args)):
            return OnDevice(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def _is_ours(x: Any) -> bool:
    return isinstance(x, OnDevice)
