"""Inputs of recomputed blocks in host memory: what a GPU's own memory cannot keep, copied while it computes.

A copy goes out on a stream of its own, behind the work that made the tensor, and comes back one block ahead of its
need. At most `_UNDERWAY` copies out are unfinished: computation waits for older ones, so that the memory which they
hold stays bounded. The bits are those that went out. (torch's `save_on_cpu` lets computation
wait for every copy.) On a CPU there is no other memory, and tensors stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

# Small tensors, such as the factors of drop path, are not worth a copy.
_SMALLEST_BYTES = 1 << 20
_UNDERWAY = 2


class InHostMemory(torch.autograd.graph.saved_tensors_hooks):
    """Within `with`, large tensors that autograd keeps lie in host memory; for the blocks of one stage, in order."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._sent: list[_Sent] = []

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.numel() * tensor.itemsize < _SMALLEST_BYTES or not has_own_memory(tensor):
            return tensor
        if isinstance(tensor, FakeTensor):
            return _Predicted(tensor)
        if len(self._sent) >= _UNDERWAY:
            self._sent[-_UNDERWAY].wait_until_out()
        self._sent.append(_Sent(tensor, self._sent[-1] if self._sent else None))
        return self._sent[-1]

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.back()


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies in other memory than the host's; one without numbers stands for one that would."""
    return torch.cuda.is_available() if isinstance(tensor, FakeTensor) else tensor.is_cuda


class _Sent:
    """A tensor on its way to host memory and back.

    Args:
        tensor: on a device.
        before: what was sent before it and is needed after it.
    """

    def __init__(self, tensor: torch.Tensor, before: _Sent | None) -> None:
        self._device, self._before = tensor.device, before
        self._returned: torch.Tensor | None = None
        self._stream = _stream_of(tensor.device)
        if self._stream is None:
            self._host = tensor.to("cpu", copy=True)
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._host.copy_(tensor, non_blocking=True)
            self._out = self._stream.record_event()
        tensor.record_stream(self._stream)  # its memory is not given to others before the copy has left it

    def wait_until_out(self) -> None:
        """Let what is computed from now on wait until the copy has left the device."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._out)

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self._returned is not None:
            return
        if self._stream is None:
            self._returned = self._host.to(self._device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            self._returned = torch.empty_like(self._host, device=self._device)
            self._returned.copy_(self._host, non_blocking=True)
            self._in = self._stream.record_event()

    def back(self) -> torch.Tensor:
        """Return the tensor on its device, and begin to fetch the one that is needed next."""
        self.fetch()
        returned, self._returned = self._returned, None
        assert returned is not None
        if self._before is not None:
            self._before.fetch()
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(self._in)
            returned.record_stream(now)
        return returned


class _Predicted:
    """As `_Sent`, of a tensor without numbers: measure.py counts it as memory of the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device, self._host = tensor.device, tensor.to("meta")

    def back(self) -> torch.Tensor:
        """Return a tensor of the same shape on the device."""
        return torch.empty_like(self._host, device=self._device)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that copies for a GPU; None for other devices, whose copies are done when they return."""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
