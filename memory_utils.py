"""What a model needs before it is loaded: parameters and memory from its shapes; and what a run really used."""

import os
import platform
import sys

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from hub_utils import hub_errors
from kernel_utils import LinearCrossEntropy, triton
from model_utils import attach_lora
from pass_utils import decoder_layers, transformers_model
from run_utils import UserError

GIB = 2**30
ALLOCATOR = 1.06  # reserved by PyTorch over what tensors take, as measured on an H200
NF4_BYTES = 1 / 2 + (1 + 4 / 256) / 64  # a weight: four bits, and of each 64 a scale of one byte with its own scale


def empty_model(path, settings, models_dir=None):
    """The model with its adapter, without memory for its weights: shapes only, from its config."""
    with hub_errors(path):
        model_config = AutoConfig.from_pretrained(path, cache_dir=models_dir, trust_remote_code=False)
        if getattr(model_config, "quantization_config", None) is not None:
            raise UserError(
                f"{path} is stored quantized, and an adapter could not be merged into it; give the model that it was"
                " made from, which is quantized to 4 bits while it is loaded"
            )
        with torch.device("meta"):
            return attach_lora(AutoModelForCausalLM.from_config(model_config), settings)


def count_parameters(model):
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def weight_bytes(model, settings, dtype):
    """Memory of the base's weights as they will be loaded: linear layers but the output in NF4 where quantized."""
    base = transformers_model(model)
    head, seen, total = base.get_output_embeddings(), set(), 0
    for module in base.modules():
        quantized = settings.use_4bit_quantization and isinstance(module, torch.nn.Linear) and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel() * (NF4_BYTES if quantized and name == "weight" else dtype.itemsize)
    return total


def dequantized_bytes(model, dtype):
    """Memory of the 4-bit weights of LoRA's layers once more, dequantized."""
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    head = transformers_model(model).get_output_embeddings()
    linear = [base.weight for base in bases if isinstance(base, torch.nn.Linear) and base.weight is not head.weight]
    return sum(weight.numel() for weight in linear) * dtype.itemsize


def dora_shapes(model):
    """Of all linear layers with an adapter: their outputs, their weights' elements, and the most inputs of one."""
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    shapes = [base.weight.shape for base in bases if isinstance(base, torch.nn.Linear)]
    outputs, weights = sum(shape[0] for shape in shapes), sum(shape.numel() for shape in shapes)
    return outputs, weights, max((shape[1] for shape in shapes), default=0)


def expected_peak(model, settings, dtype, tokens, checkpointing, compiled):
    """Expected peak of PyTorch's memory on a CUDA GPU in bytes, when passes of so many tokens are trained.

    Counted: the weights; the adapter in float32 with gradients, AdamW's two moments (a byte each in 8 bits) and the
    copies that the layers multiply with; what each layer keeps for its backward pass, or with checkpointing its input
    and one layer whole; the largest weight dequantized; a chunk of logits. peft's DoRA computes in float32, keeps more
    of each output, with dropout each weight dequantized too, and multiplies with unit matrices. The allocator rounds up
    and leaves gaps.
    """
    base = transformers_model(model)
    config, unit = base.config.get_text_config(), dtype.itemsize
    # configs differ in what they name; the layers' own matrices always tell the widest one
    shapes = {p.shape for layer in decoder_layers(base) for p in layer.parameters() if not p.requires_grad}
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or max((max(shape) for shape in shapes), default=4 * hidden)
    trainable = count_parameters(model)[1]
    moments = 2 if settings.optimizer == "paged_adamw_8bit" else 8
    fixed = weight_bytes(model, settings, dtype) + trainable * (4 + 4 + moments + unit)
    # two residuals and norms; query, key, value and attention's output; gate, up and their product
    kept = unit * (4 * hidden + 2 * (heads + groups) * width + 3 * inner)
    if compiled:  # a recorded pass has gradients of its own, which are then added to the step's
        fixed += trainable * 4
    else:  # the norms' copies in float32
        kept += 2 * (4 + unit) * hidden
    inputs, constant = unit * hidden, 0
    working = tokens * unit * (3 * inner + 3 * hidden)
    if settings.use_dora:
        outputs, weights, widest = dora_shapes(model)
        inputs, kept = 4 * hidden, kept + 8 * outputs / layers
        constant = unit * weights / layers if settings.lora_dropout else 0
        working += (4 + unit) * widest**2
    saved = tokens * (layers * inputs + kept) + constant if checkpointing else layers * (tokens * kept + constant)
    largest = max((shape.numel() for shape in shapes), default=hidden * inner) * unit
    logits = min(tokens * config.vocab_size, LinearCrossEntropy.LOGITS) * (unit if triton else 4 + 4 + unit)
    return (fixed + saved + max(working + largest, logits)) * ALLOCATOR


def grow_gpu_memory(device):
    """Have PyTorch grow its blocks of memory on a CUDA GPU in place, which leaves fewer gaps; nothing is allocated yet.

    Left alone are WSL and Arm machines, where it fails late, drivers of virtual GPUs, which refuse the first block, and
    what the user has set.
    """
    given = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    system = platform.uname()
    usual = (system.system, system.machine) == ("Linux", "x86_64") and "microsoft" not in system.release.lower()
    if device.type != "cuda" or given or not usual:
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def measured_peak(device):
    """Peak memory of this process in GiB: reserved by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    try:
        import resource
    except ImportError:  # Windows has no such figure in the standard library
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
