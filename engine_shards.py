"""Shards: a frozen base model that the processes of a launcher share out, for models that no single GPU holds.

Accelerate and PyTorch do it, as `accelerate launch` asks for it: each process holds its part of every frozen weight,
and a layer's weights are gathered while the layer computes. The adapter stays whole in each process, with its gradients
and its optimizer, so that steps, checkpoints and the saved adapter are those of any other run. Since a layer that is
gathered waits for all processes, all of them must compute equally many passes.
"""

import contextlib
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from engine_passes import Patches, transformers_model
from message_utils import UserError, say


class ShardEngine(NamedTuple):
    """What shards the base model."""

    name: str
    processes: int
    plugin: object  # Accelerate's, with the options of the launcher's configuration


def find_engine():
    """The ShardEngine that accelerate launch asks for in the environment, or None.

    The wish is taken out of the environment, since only the frozen base is sharded: the Trainer and its Accelerator see
    processes that each hold the whole of what is trained.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate launch asks for DeepSpeed, which is not supported; what shards a model here is FSDP2: run"
            " accelerate launch --config_file launch/fsdp.yaml train.py"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate launch asks for FSDP in version {version}, expected version 2; write fsdp_version: 2 into its"
            " configuration (accelerate to-fsdp2 does it), or add --fsdp_version 2"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "accelerate launch is to keep the shards in the host's memory, which is not supported; write"
            " fsdp_offload_params: false into its configuration"
        )
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        say("One process was started, so that there is nothing to share out: the GPU holds the whole model")
        return None
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper() == "NO_WRAP":
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"  # else all layers would be gathered at once
    return ShardEngine("FSDP2", processes, FullyShardedDataParallelPlugin())


@contextlib.contextmanager
def quantizing_on(device):
    """Make the 4-bit weights of a model that is loaded onto the CPU on a device, which is much faster."""
    plain = Bnb4bitQuantize.convert

    def convert(self, weights, *args, **kwargs):
        moved = {name: weight[0] if isinstance(weight, list) else weight for name, weight in weights.items()}
        moved = {name: weight.to(device) for name, weight in moved.items()}
        return {name: weight.to("cpu") for name, weight in plain(self, moved, *args, **kwargs).items()}

    with Patches() as patches:
        patches.set(Bnb4bitQuantize, "convert", convert)
        yield


def shard(model, engine, device):
    """Share the frozen weights of a model with its adapter out over the processes; what is trained stays whole.

    The weights lie on the CPU, those of 16 bits in pages of their file, which the processes of a machine have in
    common. A layer at a time comes to the device, of which each process keeps its part.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    engine.plugin.ignored_modules = [torch.nn.ParameterList(trained)]
    engine.plugin.cpu_ram_efficient_loading = False  # each process has read the weights
    dimension = ("dp_shard",)
    # what fsdp2_prepare_model reads of an Accelerator
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=engine.plugin),
        torch_device_mesh=init_device_mesh(device.type, (engine.processes,), mesh_dim_names=dimension),
        parallelism_config=SimpleNamespace(fsdp_dim_names=dimension),
        device=device,
        mixed_precision="no",  # the weights have their number format already
        is_main_process=PartialState().is_main_process,
    )
    try:
        fsdp2_prepare_model(accelerator, transformers_model(model))
    except ValueError as error:
        if "transformer layer class" not in str(error):
            raise
        raise UserError(
            f"accelerate launch is to wrap layers that this model has not ({error}); leave"
            " fsdp_transformer_layer_cls_to_wrap out of its configuration"
        ) from error
    return model


def is_sharded(model):
    """Whether the model's weights are shared out over several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
