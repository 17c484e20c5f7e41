"""LoRA layers that compute with the fused operation of kernel_utils while they train."""

from collections import Counter
from itertools import groupby
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer

from kernel_utils import frozen_tensors, matrices
from pass_utils import decoder_layers, probe_losses, probe_rows


class FastLora:
    """A model's LoRA layers, computing with the fused operation while they train.

    The optimizer keeps the adapter in float32; the layers multiply with copies in the model's own number format, which
    refresh() renews after each optimizer step. draw_dropout() decides the masks of the next pass, from the CPU's random
    numbers, so that the recomputation of a checkpointed layer meets the same.
    """

    def __init__(self, model):
        lora_layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        layers = [layer for layer in lora_layers if is_plain(layer)]
        self.covers_all = len(layers) == len(lora_layers)
        shared = share_inputs(model, layers)
        self.seeds = torch.zeros(len(shared), dtype=torch.int64, device=model.device)
        self.groups = [
            LoraGroup(group, self.seeds[number : number + 1], model.dtype) for number, group in enumerate(shared)
        ]
        self.weights = [weight for group in self.groups for weight in group.a + group.b]
        self.copies = [copy for group in self.groups for copy in group.copies_of_a + group.copies_of_b]
        self.copies_of_a = [copy for group in self.groups for copy in group.copies_of_a]
        self.scalings = [group.scaling for group in self.groups for _ in group.copies_of_a]
        self.refresh()

    def set_dequantized(self, dequantized):
        """Keep frozen 4-bit weights dequantized, two bytes more for each, or dequantize them in every pass."""
        for group in self.groups:
            group.set_dequantized(dequantized)

    @torch.no_grad()
    def refresh(self):
        if self.groups:
            torch._foreach_copy_(self.copies, self.weights)
            torch._foreach_mul_(self.copies_of_a, self.scalings)

    def forget(self):
        """Let go of what a pass that broke off left for layers that it did not reach."""
        for group in self.groups:
            group.waiting = None

    def draw_dropout(self):
        seeds = torch.randint(2**31, self.seeds.shape, pin_memory=self.seeds.is_cuda)
        self.seeds.copy_(seeds, non_blocking=True)


class LoraGroup:
    """LoRA layers that read the same tensor. The first that is called computes them all; the others take theirs.

    They share dropout's mask, each drop of which has the same distribution as with masks of their own.
    """

    def __init__(self, layers, seed, dtype):
        self.a = [layer.lora_A["default"].weight for layer in layers]
        self.b = [layer.lora_B["default"].weight for layer in layers]
        self.fast_a = torch.cat([weight.detach() for weight in self.a]).to(dtype)
        self.copies_of_a = list(self.fast_a.split([len(weight) for weight in self.a]))
        self.copies_of_b = [weight.detach().to(dtype, copy=True) for weight in self.b]
        self.biases = [layer.base_layer.bias for layer in layers if layer.base_layer.bias is not None]
        self.stored = [tensor for layer in layers for tensor in frozen_tensors(layer.base_layer)]
        self.frozen = self.stored
        self.seed, self.dropout, self.scaling = seed, dropout_of(layers[0]), layers[0].scaling["default"]
        self.waiting = None  # the tensor that was read, and the outputs that the other layers will ask for
        for number, layer in enumerate(layers):
            layer.fast_group, layer.fast_number = self, number
            layer.forward = MethodType(lora_forward, layer)

    def set_dequantized(self, dequantized):
        if not dequantized:
            self.frozen = self.stored
        elif self.frozen is self.stored:
            self.frozen = list(matrices(self.stored, self.copies_of_b, self.fast_a.shape[1]))

    def compute(self, x):
        """The outputs of all layers."""
        outputs, _ = torch.ops.lora.linear(
            x.to(self.fast_a.dtype),
            self.a,
            self.b,
            self.fast_a,
            self.copies_of_b,
            self.biases,
            self.seed,
            self.dropout,
            self.scaling,
            self.frozen,
        )
        return outputs


def lora_forward(layer, x, *args, **kwargs):
    """What takes the place of a plain LoRA layer's forward: the fused operation while the layer trains."""
    if not layer.training or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    group, number = layer.fast_group, layer.fast_number
    if number == 0 or group.waiting is None or group.waiting[0] is not x:
        group.waiting = (x, group.compute(x))
    out = group.waiting[1][number]
    if number == len(group.a) - 1:
        group.waiting = None
    return out


def dropout_of(layer):
    return getattr(layer.lora_dropout["default"], "p", 0.0)


def is_plain(layer):
    """Whether a LoRA layer is plain: one adapter, no variant such as DoRA, over a linear layer known here."""
    base = layer.get_base_layer()
    return (
        isinstance(base, torch.nn.Linear)
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and layer.lora_B["default"].bias is None
        and not layer.fan_in_fan_out
        and frozen_tensors(base) is not None
    )


def share_inputs(model, layers):
    """The layers in groups that read the same tensor one after the other, as query, key and value do; found by trying.

    A group's layers have the same kind of weight, the same scaling and dropout, and biases all or none.
    """
    calls = []  # keeps the tensors, so that no other can take the place of one
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0]))) for layer in layers
    ]
    try:
        probe_losses(model, probe_rows(model))
    finally:
        for hook in hooks:
            hook.remove()
    count = Counter(layer for layer, _ in calls)
    # a decoder layer may be computed again by itself, so that no group reaches into another
    owners = {module: number for number, layer in enumerate(decoder_layers(model)) for module in layer.modules()}

    def kind(call):
        layer, x = call
        base, scaling = layer.base_layer, layer.scaling["default"]
        return id(x), owners.get(layer), len(frozen_tensors(base)), base.bias is None, scaling, dropout_of(layer)

    once = [(layer, x) for layer, x in calls if count[layer] == 1]
    groups = [[layer for layer, _ in group] for _, group in groupby(once, kind)]
    return groups + [[layer] for layer in layers if count[layer] != 1]
