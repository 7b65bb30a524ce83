"""The processes of a run: their ranks and sums, and one model trained by all of them.

    torchrun --standalone --nproc_per_node=2 train.py config/pretrain_sanguo.py

torchrun sets environment variables that tell each process its rank. All take the same steps, each
on its share of the rows; the first one writes files and prints. Replicas are those of
DistributedDataParallel, a sharded model is FSDP2's. A run of one process imports nothing for this
and takes none of these paths.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

PATIENCE = 10  # seconds that a failed process waits for the error message of another


@dataclass(frozen=True)
class World:
    """The processes of a run; by default there is one."""

    rank: int = 0  # of this process
    size: int = 1
    local_rank: int = 0  # of this process on its machine
    local_size: int = 1  # processes on its machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command line before a script's name."""
        if self.size == 1:
            return "python"
        flags = f"--standalone --nproc_per_node={self.local_size}"
        return f"torchrun {flags if self.local_size == self.size else '(as before)'}"

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's share of the rows; sizes of shares differ by one at most."""
        return np.array_split(rows, self.size)[self.rank]

    def deal(self, batches: Iterable) -> Iterator[tuple[object, bool]]:
        """Every size-th batch, and whether it counts. All processes get the same number, since a
        sharded model runs on all of them at once; a filler does not count."""
        batches = iter(batches)
        while dealt := list(islice(batches, self.size)):
            counts = self.rank < len(dealt)
            yield dealt[self.rank if counts else 0], counts

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor on the CPU, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sums(self, numbers: list[float]) -> list[float]:
        """The sum of each number over all processes: exact for whole numbers, else in float64."""
        if self.size == 1:
            return numbers
        is_whole = all(isinstance(number, int) for number in numbers)
        dtype = torch.int64 if is_whole else torch.float64
        return self.add(torch.tensor(numbers, dtype=dtype)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All wait for each other here."""
        return self.sums([int(flag)])[0] > 0

    def check_same(self, facts: dict[str, object]) -> None:
        """Raises UserError if the processes differ in one of the facts."""
        if self.size == 1:
            return
        everyone = [None] * self.size
        torch.distributed.all_gather_object(everyone, {n: repr(fact) for n, fact in facts.items()})
        for name in facts:
            if any(other[name] != everyone[0][name] for other in everyone):
                raise UserError(
                    f"the processes differ in their {name}; start them with the same command, and "
                    "let all machines see the same out_dir and data/, on a shared disk"
                )


ALONE = World()


def world_of(environment: dict[str, str]) -> World:
    """The World that torchrun's variables describe; ALONE without them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(environment.get(name, "").isdigit() for name in names):
        return ALONE
    return World(*(int(environment[name]) for name in names))


@contextmanager
def together() -> Iterator[World]:
    """The processes of this run. Only the output and the errors of the first one are shown:
    torchrun ends the others as soon as one has failed."""
    world = world_of(os.environ)
    if world.size == 1:
        yield world
        return
    with nullcontext() if world.is_first else redirect_stdout(io.StringIO()):
        try:
            yield world
            _leave(world)
        except KeyboardInterrupt:
            if world.is_first:
                raise
            raise SystemExit(130) from None
        except SystemExit:  # a signal has stopped all, or this one after another had failed
            with suppress(RuntimeError):
                _leave(world)
            raise
        except Exception as error:
            lost = _is_lost_connection(error)
            if lost or not world.is_first:
                time.sleep(PATIENCE)  # torchrun ends it here if the first or the lost one failed
                print(file=sys.stderr)  # ends the line of the first one's progress bar
            if lost:
                raise UserError(
                    f"process {world.rank} has lost the others ({_line(error)}); see what they say"
                ) from None
            raise


def join(world: World, device: str) -> str:
    """Connects the processes -> the device of this one: the GPU of its local rank, or the CPU."""
    if world.size == 1:
        return device
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device}: several processes train on cuda or on cpu; name one")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if world.local_rank >= gpus:
            raise UserError(
                f"{world.local_size} processes, but this machine has {gpus} GPUs; start it with "
                f"--nproc_per_node={gpus}"
            )
        device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(device)
    try:
        # numbers are summed on the CPU, which waits for no GPU
        torch.distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {world.rank} cannot reach the others ({_line(error)}); start them with "
            "torchrun, and look at --master_addr and the network"
        ) from None
    return device


def _leave(world: World) -> None:
    if torch.distributed.is_initialized():
        world.any(False)  # waits until the first has written everything
        # Gloo's threads need the GIL to release the tensors of the last sums. DistributedData-
        # Parallel, if it frees the process group, joins these threads and holds the GIL: they must
        # be done before.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    words = ("gloo", "connection closed", "connection reset", "nccl", "socket")
    is_network = isinstance(error, torch.distributed.DistError)
    is_runtime = isinstance(error, RuntimeError)
    return is_network or (is_runtime and any(word in str(error).lower() for word in words))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- gradients ---------------------------------------------------------------------------------


class LossModule(torch.nn.Module):
    """The loss as a forward pass of its own, which DistributedDataParallel wraps to reduce the
    gradients. Without a batch it is 0, and depends on every trained parameter."""

    def __init__(self, model: torch.nn.Module, compute: Callable):
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *batch: object) -> object:
        if batch:
            return self.compute(self.model, *batch)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return 0 * torch.stack([parameter.sum() for parameter in trained]).sum()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients inside accumulate in this process only."""
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(False)
        yield
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(True)


def replicate(loss: LossModule) -> DistributedDataParallel:
    """The same; a backward pass outside no_sync leaves the mean of gradients over processes."""
    replica = DistributedDataParallel(
        loss, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    # After the first backward pass DDP rearranges its buckets, once, and the bits of a sum depend
    # on the bucket: the first step after a resume would differ from that of a run without a stop.
    # So this is the first pass, and it changes nothing.
    replica().backward()
    replica.zero_grad()
    return replica


# --- a sharded model ---------------------------------------------------------------------------


def shard(model: torch.nn.Module, device: str, world: World) -> None:
    """Shards weights, gradients and moments over the processes (FSDP2): a block's weights are whole
    only while they are in use. A backward pass gives means, as in replicate."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "reshard")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor if it is sharded, in all processes; any other unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that all of them hold, if `like` is sharded."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # a view would keep the whole in memory


def gather(model: torch.nn.Module, tensors: Callable[[], dict], world: World) -> dict:
    """tensors(), which belong to the model: for the first process, whole, and on the CPU if they
    were sharded; nothing for the others, who must call this too.

    torch.distributed.checkpoint.state_dict gives the same bits, by one function for models and
    another for optimizers, whose setter takes a step to make their state; it is no shorter.
    """
    if not is_sharded(model):
        return tensors() if world.is_first else {}
    model.reshard()  # the last computation may have left some weights whole
    wholes = ((name, whole(tensor.detach()).cpu()) for name, tensor in tensors().items())
    return {name: tensor for name, tensor in wholes if world.is_first}
