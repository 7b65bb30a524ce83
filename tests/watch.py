"""What a GPU would feel of a computation, counted as its operations are dispatched on a CPU."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operations that start no kernel
VIEWS = {"alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice"}
VIEWS |= {"split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}
VIEWS |= {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "narrow"}
# operations whose result the host must know before it goes on
WAITS = {"_local_scalar_dense", "is_nonzero", "masked_select", "nonzero", "unique", "_unique2"}
WAITS |= {"masked_scatter"}


class Watch(TorchDispatchMode):
    """kernels: how often each operation ran; waits: those that wait for a GPU, and where;
    doubles: those that made float64 on a device, which MPS has not."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.doubles = Counter(), [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in VIEWS:
            self.kernels[name] += 1
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(x is not None and x.dtype == torch.bool for x in places)
        if masked or name.rstrip("_") in WAITS:
            self.waits.append(f"{name} in {caller()}")
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            kinds = {x.device.type for x in args if isinstance(x, torch.Tensor)}
            if name == "_to_copy" and kinds != {out.device.type} and not kwargs.get("non_blocking"):
                self.waits.append(f"copy in {caller()}")
            if out.dtype == torch.float64 and out.device.type != "cpu":
                self.doubles.append(f"{name} in {caller()}")
        return out


def caller() -> str:
    """The innermost function that is not torch's, nor this file's."""
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return frame.f_code.co_qualname if frame else "the backward pass"
