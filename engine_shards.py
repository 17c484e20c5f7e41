"""Shards: a frozen base model that the processes of a launcher share out, for models that no single GPU holds.

FSDP2 or DeepSpeed does it, as `accelerate launch` asks for it: each process holds its part of every frozen weight,
and a layer's weights are gathered while the layer computes. The adapter stays whole in each process, with its gradients
and its optimizer, so that steps, checkpoints and the saved adapter are those of any other run. Since a layer that is
gathered waits for all processes, all of them must compute equally many passes.
"""

import contextlib
import logging
import os
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from engine_passes import Patches, decoder_layers
from message_utils import UserError, say

FSDP, ZERO = "FSDP2", "DeepSpeed's ZeRO-3"
DEEPSPEED_EXTRA = "pip install -r requirements-deepspeed.txt"
# What accelerate launch may ask for besides, and the setting that decides it here
DECIDED_HERE = {
    "ACCELERATE_MIXED_PRECISION": "USE_FP16",
    "ACCELERATE_DYNAMO_BACKEND": "TORCH_COMPILE",
    "FSDP_ACTIVATION_CHECKPOINTING": "GRADIENT_CHECKPOINTING",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING": "MAX_GRAD_NORM",
}
NEUTRAL = ("", "no", "none", "false", "1", "1.0")  # what a launcher writes where nothing is asked for


class ShardEngine(NamedTuple):
    """What shards the base model."""

    name: str
    processes: int
    plugin: object  # Accelerate's, with the options of the launcher's configuration

    @property
    def whole_layers(self):
        """Whether all weights of a decoder layer are gathered while it computes, and not each matrix by itself."""
        return self.name == FSDP


def find_engine(dtype):
    """The ShardEngine that accelerate launch asks for in the environment, or None; dtype: that of the passes.

    The wish is taken out of the environment, since only the frozen base is sharded: the Trainer and its Accelerator see
    processes that each hold the whole of what is trained.
    """
    leave_to_settings(dtype)
    fsdp, zero = parse_flag_from_env("ACCELERATE_USE_FSDP"), parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if not (fsdp or zero):
        return None
    check_fsdp() if fsdp else check_deepspeed()
    plugin = read_plugin(FullyShardedDataParallelPlugin if fsdp else DeepSpeedPlugin)
    if zero:
        check_zero(plugin)
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        say("One process was started, so that there is nothing to share out: it holds the whole model")
        return None
    return ShardEngine(FSDP if fsdp else ZERO, processes, plugin)


def read_plugin(kind):
    """Accelerate's plugin of a kind, with what the launcher has written into the environment for it."""
    try:
        return kind()
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"accelerate launch's configuration does not serve ({error}); correct it, or take one of the files in"
            " launch/ with --config_file"
        ) from error


def leave_to_settings(dtype):
    """Take out of the environment what the settings decide, and say so where a launcher wants it otherwise.

    Raises UserError for ways to share out a model that there are not here.
    """
    others = {"MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism_config (tensor, context or sequence)"}
    for name, what in others.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate launch asks for {what}, expected FSDP2, DeepSpeed's ZeRO-3 or a model on each GPU; take"
                " one of the files in launch/ with --config_file"
            )
    format_here = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    wanted = {name: os.environ.pop(name, "").lower() for name in DECIDED_HERE}
    asked = {name: value for name, value in wanted.items() if value not in (*NEUTRAL, format_here)}
    if asked:
        shown = ", ".join(f"{name.removeprefix('ACCELERATE_').lower()} {value}" for name, value in asked.items())
        deciding = ", ".join(DECIDED_HERE[name] for name in asked)
        say(f"accelerate launch asks for {shown}, which is not used: here {deciding} in config.py decides")


def check_fsdp():
    """Raise UserError unless the launcher's FSDP is one that serves; decoder layers are wrapped, whatever it says."""
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
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    # else all layers would be gathered at once: a size is that of their list, which FSDP2 refuses, or of no layer
    if policy in ("NO_WRAP", "SIZE_BASED_WRAP"):
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    if policy == "SIZE_BASED_WRAP":
        say("accelerate launch asks for SIZE_BASED_WRAP, which is not used: here each decoder layer is wrapped")


def check_deepspeed():
    """Raise UserError unless DeepSpeed is there."""
    if find_spec("deepspeed") is None:
        raise UserError(
            f"accelerate launch asks for DeepSpeed, which is not installed; {DEEPSPEED_EXTRA}, or run accelerate"
            " launch --config_file launch/fsdp.yaml train.py, which shares a model out as well"
        )


def check_zero(plugin):
    """Raise UserError unless the launcher asks for DeepSpeed's third stage, in the memory of GPU or host."""
    options = plugin.deepspeed_config.get("zero_optimization", {})
    stage = options.get("stage", 0)
    if stage != 3:
        raise UserError(
            f"accelerate launch asks for DeepSpeed's ZeRO in stage {stage}, expected stage 3, which shares out the base"
            " model; write zero_stage: 3 into its configuration, or run accelerate launch --config_file launch/ddp.yaml"
            " train.py, where each GPU holds the model"
        )
    if (options.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(
            "accelerate launch is to keep the shards on an NVMe disk, which is not supported; write"
            " offload_param_device: none or cpu into its configuration"
        )


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


def shard(base, engine, device, attach):
    """Share the frozen weights of a base model out over the processes; returns it with its adapter, which stays whole.

    The weights lie on the CPU, those of 16 bits in pages of their file, which the processes of a machine have in
    common. They come to the device by and by, of which each process keeps its part. attach: gives the model with its
    adapter.
    """
    for parameter in base.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.to(device)
    if engine.name == ZERO:
        share_by_zero(base, engine.plugin, device)
        return attach(base)
    model = attach(base)  # of 4-bit weights peft must see what FSDP2 hides
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    share_by_fsdp(base, engine, device, trained)
    return model


def share_by_fsdp(base, engine, device, trained):
    """Have Accelerate share the weights of a model out, but for those that are trained."""
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
        fsdp2_prepare_model(accelerator, base)
    except ValueError as error:
        if "transformer layer class" not in str(error):
            raise
        raise UserError(
            f"accelerate launch is to wrap layers that this model has not ({error}); leave"
            " fsdp_transformer_layer_cls_to_wrap out of its configuration"
        ) from error


def share_by_zero(base, plugin, device):
    """Have DeepSpeed share the weights of a model out; they are frozen, and without an optimizer it only gathers."""
    import deepspeed  # few have it, and its import takes seconds
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    options = {name: value for name, value in plugin.deepspeed_config["zero_optimization"].items() if value != "auto"}
    options.pop("offload_optimizer", None)  # what is trained stays where it is
    check_options(DeepSpeedZeroConfig, options)
    limit_gathered(options, base)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it must be told, and counts nothing
        "zero_optimization": options,
        "bf16": {"enabled": base.dtype == torch.bfloat16},
        "fp16": {"enabled": base.dtype == torch.float16},
    }
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)  # names that DeepSpeed has yet to change
    for buffer in base.buffers():
        buffer.data = buffer.data.to(device)
    base.requires_grad_(False)
    deepspeed.zero.Init(module=base, config_dict_or_path=config, dtype=base.dtype)
    engine, *_ = deepspeed.initialize(model=base, config=config, dist_init_required=False)
    vars(base)["_shard_engine"] = engine  # which takes its hooks along when it goes


def check_options(kind, options):
    """Raise UserError unless the options make up a kind of DeepSpeed's configurations, which are pydantic's models."""
    try:
        kind(**options)
    except (ValueError, AssertionError) as error:
        wrong = str(error)  # of an option that is given by its old name too
        if isinstance(error, ValueError):
            wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(
            f"DeepSpeed's configuration has options in zero_optimization that do not serve ({wrong}); correct them in"
            " the file that deepspeed_config_file names"
        ) from error


def limit_gathered(options, base):
    """Let ZeRO's options keep two of the largest layer gathered, unless they say how much, by either of its names.

    DeepSpeed counts numbers as they are stored, four weights of four bits in each of 16, and by itself keeps a billion.
    """
    layers = decoder_layers(base) or [base]
    largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    for name, limit in (("max_live_parameters", 2 * largest), ("max_reuse_distance", largest)):
        if name not in options:
            options.setdefault(f"stage3_{name}", limit)


def is_sharded(model):
    """Whether the model's weights are shared out over several processes."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
