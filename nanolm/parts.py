"""A model in parts: what each process holds of it, and applies.

This is done to a model without weights, so that no process ever holds more of them than its part:
first its matrices are split, then what is left of them is sharded, and then the weights are drawn,
one whole tensor after the other, as a process alone would draw them.

The parameters become DTensors, which know how they lie among the processes: PyTorch's optimizers
work on them as on others, and full_tensor() puts one together.
"""

import logging
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nanolm.attention import MultiHeadAttention
from nanolm.layers import MLP, Block
from nanolm.model import EncoderDecoder, Transformer, init_weights
from nanolm.optim import part_of
from nanolm.parallel import World
from nanolm.precision import DTYPES, Engine

# How the gradients of a layer's weight and bias lie among the processes that split it: along an
# axis, as the parameter itself (PyTorch's weights are (out, in)); or each of them has the whole
# parameter, and its gradient is the sum of theirs (Partial), or the same in all (Replicate).
PLANS = {
    **dict.fromkeys(("q", "k", "v", "up", "gate"), (Shard(0), Shard(0))),  # columns
    **dict.fromkeys(("out", "down"), (Shard(1), Partial())),  # rows
    **dict.fromkeys(("tokens", "head"), (Shard(0), Shard(0))),  # tokens
    **dict.fromkeys(("q_norm", "k_norm"), (Partial(), Partial())),  # of heads that are split
}
WHOLE = (Replicate(), Replicate())


def split_model(model: Transformer, world: World, engine: Engine) -> None:
    """Give this process its part of a model without weights, on its device, freshly drawn."""
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it is chatty
    shape, buffers = (world.replicas, world.tensor), dict(model.named_buffers())
    mesh = init_device_mesh(engine.device_type, shape, mesh_dim_names=("data", "tensor"))
    if world.tensor > 1:
        for path, layer in list(model.named_modules()):
            labels = layer is model.head and model.config.head != "tokens"  # they may be too few
            split_layer(layer, "labels" if labels else path.rpartition(".")[2], mesh["tensor"])
        model.tie()
    if world.shard:
        narrow = None if engine.dtype == "float32" else DTYPES[engine.dtype]
        policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        for block in (module for module in model.modules() if isinstance(module, Block)):
            fully_shard(block, mesh=mesh["data"], mp_policy=policy)
        fully_shard(model, mesh=mesh["data"])
        if isinstance(model, EncoderDecoder):
            register_fsdp_forward_method(model, "encode")
    model.to_empty(device=engine.device)  # DTensors are swapped in place: ties stay
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    init_weights(model, normal_)


def split_layer(layer: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Let each process of the mesh, (n,), hold and apply its part of a layer."""
    plan = dict(zip(("weight", "bias"), PLANS.get(name, WHOLE), strict=True))
    for key, p in list(layer.named_parameters(recurse=False)):
        place = plan[key] if plan[key].is_shard() else Replicate()
        own = nn.Parameter(distribute_tensor(p, mesh, [place], src_data_rank=None))
        layer.register_parameter(key, own)
    if next(layer.parameters(recurse=False), None) is not None:
        layer.forward = partial(apply_part, layer, name, plan, mesh)
    if isinstance(layer, (MultiHeadAttention, MLP)):  # begin with columns
        layer.register_forward_pre_hook(partial(share_inputs, mesh=mesh), with_kwargs=True)
    if isinstance(layer, MultiHeadAttention):
        layer.first_head = mesh.get_local_rank() * layer.n_head // mesh.size()


def share_inputs(layer: nn.Module, inputs: tuple, options: dict, mesh: DeviceMesh) -> tuple:
    """The same inputs for all processes, whose gradients are summed in the backward pass."""
    if options.get("memory") is not None:
        options = {**options, "memory": share_inputs(layer, (options["memory"],), {}, mesh)[0][0]}
    x = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return (x.to_local(grad_placements=[Partial()]), *inputs[1:]), options


def apply_part(layer: nn.Module, name: str, plan: dict, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """What a layer makes of x, with this process's parts of its parameters."""
    forward = partial(type(layer).forward, layer)
    if name in ("tokens", "head"):  # PyTorch knows how
        return forward(DTensor.from_local(x, mesh, [Replicate()], run_check=False)).full_tensor()
    split = dict(layer.named_parameters(recurse=False))
    own = {key: p.to_local(grad_placements=[plan[key]]) for key, p in split.items()}
    if name in ("out", "down") and "bias" in own:  # the first process alone adds it
        own["bias"] = own["bias"] * (mesh.get_local_rank() == 0)
    layer._parameters.update(own)
    try:
        y = forward(x)
    finally:
        layer._parameters.update(split)
    if name in ("out", "down"):
        y = DTensor.from_local(y, mesh, [Partial()], run_check=False).full_tensor()
    return y


def normal_(own: Tensor, *, std: float) -> None:
    """Draw a whole tensor as one process would, and keep of it what is this one's."""
    own.copy_(part_of(nn.init.normal_(torch.empty(own.shape), std=std), own))
