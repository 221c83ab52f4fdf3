"""The processes of one site that train together, a GPU each: who they are, and what they tell each other.

Without a process group every function is that of a lone process and costs nothing.  All ranks must call
the functions below in the same order; what one rank leaves out, the others wait for.

Shapes: W ranks, N rows (of this rank), D width.  A loss is a mean of the ranks' losses, as their
gradients are: what is differentiated through here sends each rank's gradient to the rank that the value
came from, so that the mean is the joint batch's gradient.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chexfound.errors import ConfigError
from chexfound.host import machine
from chexfound.parallel.environment import RENDEZVOUS, follow_parent, to_come

# ---- who


def rank() -> int:
    """This process's number, 0 … W − 1."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """W."""
    return dist.get_world_size() if _joined() else 1


def first() -> bool:
    """Whether this is the rank that writes files and talks."""
    return rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that the environment names, if it names one, and leave it at the end.

    Raises: ConfigError if there is no GPU for this rank.
    """
    if to_come() == 1:
        yield
        return
    follow_parent()
    on_gpu = machine.device().startswith("cuda")
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        machine.check_gpus(local + 1)
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=os.environ[RENDEZVOUS],
        rank=int(os.environ["RANK"]),
        world_size=to_come(),
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    yield  # after an error the process ends without ceremony: the others may be gone
    dist.destroy_process_group()


def share(images: int, of: int) -> int:
    """Images of a joint batch that each of so many ranks takes.

    Raises: ConfigError if it cannot be divided equally.
    """
    if images % of:
        near = -(-images // of) * of
        raise ConfigError(
            f"a batch of {images} images cannot be divided equally among the {of} GPUs of the site; choose a "
            f"multiple of {of} (such as {near}) for train.batch_size or train.pooled_batch_size, or another --gpus"
        )
    return images // of


# ---- plain values


def total(number: int) -> int:
    """The sum over ranks of a count."""
    return int(_reduced(torch.tensor(number, device=_device()))) if size() > 1 else number


def any_of(flag: bool) -> bool:
    """Tell whether the flag of any rank is set; all ranks call this together."""
    return total(int(flag)) > 0


def broadcast(number: int) -> int:
    """The first rank's number, on all."""
    return total(number if first() else 0)


def barrier() -> None:
    """Wait for all."""
    total(0)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _reduced(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


# ---- tensors


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduced(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduced(gradients[0])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduced(gradients[0]).chunk(size())[rank()]


def summed(x: Tensor) -> Tensor:
    """The sum over ranks, with its gradient."""
    return cast(Tensor, _Sum.apply(x)) if size() > 1 else x


def average(x: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    return _reduced(x.detach()) / size() if size() > 1 else x.detach()


def gathered(x: Tensor) -> Tensor:
    """Rows (N, …) of all ranks, rank by rank: (W·N, …), with their gradient; N is the same at all."""
    return cast(Tensor, _Gather.apply(x)) if size() > 1 else x


def mean_row(x: Tensor) -> Tensor:
    """The mean (1, D) over the rows (N, D) of all ranks, with its gradient; a rank may have no row."""
    if size() == 1:
        return x.mean(dim=0, keepdim=True)
    count = x.new_full((1, 1), len(x), dtype=torch.float32)
    sums = summed(torch.cat([x.float().sum(dim=0, keepdim=True), count], dim=1))
    return (sums[:, :-1] / sums[:, -1:].clamp_min(1)).to(x.dtype)


# ---- a model on all ranks


def spread(model: nn.Module, parts: Iterable[nn.ModuleDict], strategy: str) -> nn.Module:
    """Make the ranks' gradients those of the joint batch; what is returned is called in the model's place.

    Args:
        model: it and its parts are changed where they are, if they are to be sharded.
        parts: student and teacher, each a backbone with `blocks`, and heads.
        strategy: NO_SHARD (DDP), SHARD_GRAD_OP or FULL_SHARD (FSDP2: weights stay gathered from the
            forward to the backward pass, or are gathered anew).
    """
    if size() == 1:
        return model
    if strategy != "NO_SHARD":
        _shard(model, list(parts), again=strategy == "FULL_SHARD")
        return model
    ddp = nn.parallel.DistributedDataParallel
    # Buffers are equal at all ranks, or each rank's own; older releases of PyTorch know the option by another name.
    known = inspect.signature(ddp).parameters
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    # Without `find_unused_parameters` DDP deals the gradients into other buckets after its first step, and so
    # adds them up in another order with three ranks and more: a resumed run would differ in the last bits.  And
    # a step without any masked patch leaves iBOT's head out.
    return ddp(model, find_unused_parameters=True, **buffers)


def _shard(model: nn.Module, parts: list[nn.ModuleDict], again: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # we change none in place
    mesh = init_device_mesh(_device().type, (size(),))
    for part in parts:
        # The teacher sees no backward pass, which is what would take its gathered weights away again.
        again_here = again or not any(parameter.requires_grad for parameter in part.parameters())
        for module in (*cast(nn.ModuleList, part["backbone"].blocks), *part.values()):
            fully_shard(module, mesh=mesh, reshard_after_forward=again_here)
        for method in ("forward_features", "get_intermediate_layers", "tokens_at"):
            register_fsdp_forward_method(part["backbone"], method)
        for block in cast(nn.ModuleList, part["backbone"].blocks):
            register_fsdp_forward_method(block, "at")
    fully_shard(model, mesh=mesh, reshard_after_forward=again)


def gathered_no_more(model: nn.Module) -> None:
    """Let go of gathered weights that a forward pass without a backward pass left behind."""
    if size() > 1:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard; a tensor that is not sharded, itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All shards together, on every rank; a tensor that is not sharded, itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, as `like` is: on its device, and this rank's shard if it is sharded."""
    tensor = tensor.to(like.device, copy=True)
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, like)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def collected(tensors: Iterable[tuple[str, Tensor]], *, copy: bool = True) -> dict[str, Tensor]:
    """Copies, whole and in the CPU's memory, of tensors by name: on the first rank, nothing on the others.

    Without `copy`, what is whole and there already is given as it is.
    """
    result = {}
    for name, tensor in tensors:
        tensor = whole(tensor.detach())
        if first():
            result[name] = tensor.to("cpu", copy=copy)
    return result
