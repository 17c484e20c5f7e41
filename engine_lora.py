"""LoRA over frozen layers as one operation: NF4 weights, dropout, the adapter; and the layers that compute with it.

Each operation is written in plain PyTorch, which runs anywhere and which the tests compare with, and where that is slow
also in Triton, which runs on CUDA. All are exact: they are the mathematics of peft and bitsandbytes in fewer kernels
and without copies.
"""

from collections import Counter
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from types import MethodType

import torch
from bitsandbytes.functional import get_4bit_type
from peft.tuners.lora import LoraLayer
from torch.library import custom_op

from engine_passes import decoder_layers
from engine_shards import is_sharded
from message_utils import say

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch, Windows or macOS
    triton = None

if triton:

    @triton.jit
    def _dequantize_kernel(packed, absmax, levels, absmax2, offset, values, out, count, BLOCKS: tl.constexpr):
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < count
        level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(levels + level) * tl.load(absmax2 + block // 256, mask=inside, other=0.0) + tl.load(offset)
        byte = block.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
        pair = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(values + (pair >> 4)) * scale[:, None]
        low = tl.load(values + (pair & 15)) * scale[:, None]
        both = tl.interleave(high, low).to(out.dtype.element_ty)
        element = block.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out + element, both, mask=inside[:, None])

    @triton.jit
    def _drop_kernel(x, out, seed, count, threshold, scale, SPAN: tl.constexpr):
        # each draw gives four words, hence sixteen random bits to each of eight elements, SPAN apart
        program = tl.program_id(0)
        lane = tl.arange(0, SPAN)
        a, b, c, d = tl.randint4x(tl.load(seed), program * SPAN + lane)
        for part in tl.static_range(8):
            word = a if part < 2 else (b if part < 4 else (c if part < 6 else d))
            bits = (word >> (16 * (part % 2))) & 0xFFFF
            at = program.to(tl.int64) * (8 * SPAN) + part * SPAN + lane
            value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
            value = tl.where(bits >= threshold, value * scale, 0.0)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def _few_rows_kernel(
        x,
        packed,
        absmax,
        levels,
        absmax2,
        offset,
        sums,
        inputs,
        outputs,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        SPLITS: tl.constexpr,
        DECODE: tl.constexpr,
    ):
        # one program: some outputs of all rows, over one part of the inputs; a weight is read once, as four bits
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        row, lane = tl.arange(0, ROWS), tl.arange(0, 32)
        known = output < outputs
        blocks = inputs // 64  # in a row of the weight
        part = tl.cdiv(blocks, SPLITS)
        begin = tl.program_id(1) * part
        shift = tl.load(offset)
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        kind = x.dtype.element_ty
        for number in tl.range(begin, tl.minimum(begin + part, blocks), num_stages=3):
            block = output * blocks + number
            byte = tl.load(packed + block.to(tl.int64)[:, None] * 32 + lane[None, :], mask=known[:, None], other=0)
            level = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
            scale = tl.load(levels + level) * tl.load(absmax2 + block // 256, mask=known, other=0.0) + shift
            where = (number * 32 + lane)[:, None] * ROWS + row[None, :]
            first, second = tl.load(x + where), tl.load(x + inputs // 2 * ROWS + where)
            high, low = tl.inline_asm_elementwise(
                DECODE, "=r,=r,=r,=r,r", [byte], dtype=(kind, kind), is_pure=True, pack=4
            )
            total += tl.dot(low, second, tl.dot(high, first)) * scale[:, None]
        where = (tl.program_id(1) * outputs + output)[:, None] * ROWS + row[None, :]
        tl.store(sums + where, total, mask=known[:, None] & (row < ROWS)[None, :])

    @triton.jit
    def _few_rows_end_kernel(
        sums,
        down,
        b,
        bias,
        out,
        rows,
        outputs,
        down_row,
        rank,
        ROWS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        SPLITS: tl.constexpr,
        RANKS: tl.constexpr,
        BIAS: tl.constexpr,
    ):
        # one program: adds up the parts of some outputs, the adapter's share and the bias
        output, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
        inside = (output < outputs)[:, None] & (row < rows)[None, :]
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(sums + (split * outputs + output)[:, None] * ROWS + row[None, :], mask=inside, other=0.0)
        if RANKS:
            lane = tl.arange(0, RANKS)
            up = (output < outputs)[:, None] & (lane < rank)[None, :]
            up = tl.load(b + output[:, None] * rank + lane[None, :], mask=up, other=0.0)
            low = (row < rows)[None, :] & (lane < rank)[:, None]
            low = tl.load(down + row[None, :] * down_row + lane[:, None], mask=low, other=0.0)
            total = tl.dot(up, low, total)
        if BIAS:
            total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(out + row[None, :] * outputs + output[:, None], total.to(out.dtype.element_ty), mask=inside)


# ---- Frozen weights --------------------------------------------------------------------------------------------------
def dequantize(frozen, out):
    """Fill out, an (out, in) weight matrix, from a frozen layer's NF4 tensors with double quantization; returns it.

    Bytes hold two values, the first in the high half; 64 values share a scale, itself one of 256 levels times a factor
    of 256 scales, plus an offset.
    """
    packed, absmax, levels, absmax2, offset, values = frozen
    count = absmax.numel()
    if packed.is_cuda and triton:
        _dequantize_kernel[(triton.cdiv(count, 32),)](
            *frozen, out, count, BLOCKS=32, num_warps=2, enable_fp_fusion=False
        )
        return out
    scale = levels[absmax.int()] * absmax2.repeat_interleave(256)[:count] + offset
    packed = packed.view(-1).int()
    pairs = torch.stack([values[packed >> 4], values[packed & 15]], dim=-1)
    return out.copy_((pairs.view(count, 64) * scale[:, None]).view(out.shape))


def count_frozen(layer):
    """How many tensors frozen_tensors gives of a linear layer; 0 where its kind is not known."""
    state = quant_state(layer)
    if state is None:
        return int(layer.weight.is_floating_point())
    if state.quant_type != "nf4" or not state.nested or state.blocksize != 64 or state.state2.blocksize != 256:
        return 0
    return 0 if state.shape.numel() % 64 else 6


def quant_state(layer):
    """What bitsandbytes knows of a layer's 4-bit weight, or None; FSDP2 gathers weights that do not know it."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def frozen_tensors(layer):
    """A linear layer's frozen weight: [itself], or the six tensors of dequantize; None where its kind is not known."""
    count, state = count_frozen(layer), quant_state(layer)
    if count < 2:
        return [layer.weight] if count else None
    packed = layer.weight.data.view(torch.uint8)  # they may be stored as numbers of another format
    return [packed, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code]


def matrices(frozen, copies, inputs):
    """The frozen weights, (outputs, inputs) each, of layers whose frozen_tensors stand one after the other.

    copies: of each layer's B, (outputs, rank), whose number format is taken.
    """
    kind = len(frozen) // len(copies)
    for copy, start in zip(copies, range(0, len(frozen), kind), strict=True):
        if kind == 1:
            yield frozen[start].to(copy.dtype)
        else:
            yield dequantize(frozen[start : start + kind], copy.new_empty(len(copy), inputs))


# ---- Frozen weights and few rows -------------------------------------------------------------------------------------
FEW_ROWS = 64


def few_rows_linear(x, layers):
    """The outputs of frozen layers that read x, (rows, inputs), for few rows: the weights' way through memory is all.

    layers: of each its frozen_tensors, its bias or None, and its adapter: down, (rows, rank), and b, (outputs, rank),
    where down @ b.T is added, or None twice. On CUDA NF4 weights are read as they are, and never dequantized in memory.
    """
    fused = x.is_cuda and triton and x.dtype in (torch.bfloat16, torch.float16)
    fused = fused and 0 < len(x) <= FEW_ROWS and x.shape[1] % 64 == 0
    laid_out = lay_out(x) if fused and any(len(frozen) > 1 for frozen, *_ in layers) else None
    outs = []
    for frozen, bias, down, b in layers:
        if laid_out is not None and len(frozen) > 1:
            outs.append(_nf4_linear(x, laid_out, frozen, bias, down, b))
            continue
        outputs = len(frozen[0]) if len(frozen) == 1 else frozen[0].numel() * 2 // x.shape[1]
        weight = frozen[0].to(x.dtype) if len(frozen) == 1 else dequantize(frozen, x.new_empty(outputs, x.shape[1]))
        out = x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)
        outs.append(out if down is None else out.addmm_(down, b.T))
    return outs


def lay_out(x):
    """x, (rows, inputs), as the kernel reads it: (2, inputs / 2, 16, 32 or 64), the even inputs before the odd ones.

    What lies beyond the rows is left as it is; it comes to outputs that nobody reads.
    """
    rows, inputs = x.shape
    out = x.new_empty(2, inputs // 2, max(16, triton.next_power_of_2(rows)))
    out[:, :, :rows].copy_(x.view(rows, inputs // 2, 2).permute(2, 1, 0))
    return out


def _nf4_linear(x, laid_out, frozen, bias, down, b):
    (rows, inputs), width = x.shape, laid_out.shape[2]
    outputs = frozen[0].numel() * 2 // inputs
    tile, splits, warps = few_rows_sizes(width, inputs, outputs)
    sums = torch.empty(splits, outputs, width, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(triton.cdiv(outputs, tile), splits)](
        laid_out,
        *frozen[:5],
        sums,
        inputs,
        outputs,
        ROWS=width,
        OUTPUTS=tile,
        SPLITS=splits,
        DECODE=nf4_decoding(x.dtype),
        num_warps=warps,
    )
    out = x.new_empty(rows, outputs)
    rank = 0 if b is None else b.shape[1]
    _few_rows_end_kernel[(triton.cdiv(outputs, 64),)](
        sums,
        out if b is None else down,
        out if b is None else b,
        out if bias is None else bias,
        out,
        rows,
        outputs,
        0 if b is None else down.stride(0),
        rank,
        ROWS=width,
        OUTPUTS=64,
        SPLITS=splits,
        RANKS=max(16, triton.next_power_of_2(rank)) if rank else 0,
        BIAS=bias is not None,
        num_warps=4,
    )
    return out


def few_rows_sizes(width, inputs, outputs):
    """Outputs a program computes, parts that the inputs are cut into, and warps: the fastest of some 60 on an H200.

    Each part writes a sum for each output and row, which with many rows counts for more than programs to fill the GPU.
    """
    if width < 64:
        return 64, 8 if inputs <= 8192 else 16, 2
    return 128, min(16, max(1, 256 // triton.cdiv(outputs, 128))), 4


@lru_cache
def nf4_decoding(dtype):
    """PTX that turns four bytes of NF4 into four first and four second values of a 16-bit number format.

    A lookup in memory for each value would take longer than reading the weights. prmt picks bytes out of two registers,
    each by three bits: so the table of 16 values is four registers of their low bytes and four of their high ones.
    """
    values = get_4bit_type("nf4", device="cpu").to(dtype).view(torch.uint8).view(16, 2)
    lines = ["{ .reg .b32 pairs, index, upper, a, b, bytes0, bytes1;"]
    for half in range(2):
        lines += [
            f"shr.b32 pairs, $4, {16 * half};",
            "and.b32 index, pairs, 0x7777;",  # of eight values
            "shr.b32 upper, pairs, 1;",
            "and.b32 upper, upper, 0x4444;",  # the fourth bit: of which eight
            "or.b32 upper, upper, 0x3210;",
        ]
        for byte in range(2):
            table = [
                int.from_bytes(bytes(values[start : start + 4, byte].tolist()), "little") for start in (0, 4, 8, 12)
            ]
            lines += [
                f"{{ .reg .b32 t<4>; {' '.join(f'mov.b32 t{i}, {word};' for i, word in enumerate(table))}",
                "prmt.b32 a, t0, t1, index; prmt.b32 b, t2, t3, index;",
                f"prmt.b32 bytes{byte}, a, b, upper; }}",
            ]
        # the values come in the order low half, high half of each byte; the high half is the first value
        lines += [f"prmt.b32 ${half}, bytes0, bytes1, 0x7351;", f"prmt.b32 ${2 + half}, bytes0, bytes1, 0x6240;"]
    return "\n".join([*lines, "}"])


# ---- Dropout ---------------------------------------------------------------------------------------------------------
def drop(x, seed, p, out=None):
    """x with a share p of its elements zeroed, the others divided by 1 - p; seed, a tensor of one integer, decides.

    x is contiguous; out, which may be x, takes the result.
    """
    out = torch.empty_like(x) if out is None else out
    if x.is_cuda and triton:
        grid = (triton.cdiv(x.numel(), 8 * 256),)
        _drop_kernel[grid](x, out, seed, x.numel(), round(p * 65536), 1 / (1 - p), SPAN=256, num_warps=4)
        return out
    draw = torch.Generator().manual_seed(int(seed))
    kept = torch.rand(x.shape, generator=draw).to(x.device) >= p
    return out.copy_(torch.where(kept, x / (1 - p), 0))


# ---- LoRA over frozen linear layers ----------------------------------------------------------------------------------
@custom_op("lora::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scaled_a: torch.Tensor,
    fast_b: list[torch.Tensor],
    biases: list[torch.Tensor],
    seed: torch.Tensor,
    dropout: float,
    scaling: float,
    frozen: list[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of LoRA layers that read the same x, (..., inputs), and x times their A's, (rows, ranks of all).

    a, b: the adapter's weights, which get the gradients. scaled_a: copies of the A's times the scaling, one below the
    other. fast_b: copies of the B's. biases: none, or one of each layer. frozen: the frozen_tensors of all layers. One
    dropout mask serves them all.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # a dropout mask follows the order of the elements in memory
    down = (drop(rows, seed, dropout) if dropout else rows) @ scaled_a.T
    outs = []
    for copy, rank, matrix in zip(fast_b, ranks(fast_b), matrices(frozen, fast_b, x.shape[-1]), strict=True):
        # the small product comes first: adding it to the large one would read and write the large one again
        outs.append((down[:, rank] @ copy.T).addmm_(rows, matrix.T))
    if biases:
        outs = [out.add_(bias) for out, bias in zip(outs, biases, strict=True)]
    return [out.view(*x.shape[:-1], -1) for out in outs], down


@_linear.register_fake
def _(x, a, b, scaled_a, fast_b, *others):
    outs = [x.new_empty(*x.shape[:-1], copy.shape[0]) for copy in fast_b]
    return outs, x.new_empty(x.numel() // x.shape[-1], scaled_a.shape[0])


@custom_op("lora::linear_backward", mutates_args=())
def _linear_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    down: torch.Tensor,
    scaled_a: torch.Tensor,
    fast_b: list[torch.Tensor],
    seed: torch.Tensor,
    dropout: float,
    scaling: float,
    frozen: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients of x, of the A's one below the other, and of each B."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    up, grads_b = torch.empty_like(down), []
    for grad, copy, rank in zip(grads, fast_b, ranks(fast_b), strict=True):
        grads_b.append(matmul32(grad.T, down[:, rank]))
        torch.mm(grad, copy, out=up[:, rank])
    grad_a = matmul32(up.T, drop(rows, seed, dropout) if dropout else rows).mul_(scaling)
    grad_x = up @ scaled_a
    if dropout:
        drop(grad_x, seed, dropout, out=grad_x)
    for grad, matrix in zip(grads, matrices(frozen, fast_b, x.shape[-1]), strict=True):
        grad_x.addmm_(grad, matrix)
    return grad_x.view(x.shape), grad_a, grads_b


@_linear_backward.register_fake
def _(grads, x, down, scaled_a, fast_b, *others):
    grads_b = [copy.new_empty(copy.shape, dtype=torch.float32) for copy in fast_b]
    return x.new_empty(x.shape), scaled_a.new_empty(scaled_a.shape, dtype=torch.float32), grads_b


def ranks(copies):
    """Where each layer's ranks stand among those of all layers; copies: of the B's, (outputs, rank) each."""
    ends = accumulate((copy.shape[1] for copy in copies), initial=0)
    return [slice(begin, end) for begin, end in pairwise(ends)]


def matmul32(left, right):
    """left @ right in float32, whatever number format the operands have."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _remember(ctx, inputs, output):
    x, _, _, scaled_a, fast_b, biases, seed, ctx.dropout, ctx.scaling, frozen = inputs
    ctx.count, ctx.biases = len(fast_b), len(biases)
    ctx.save_for_backward(x, output[1], scaled_a, seed, *fast_b, *frozen)


def _backward(ctx, grads, _):
    x, down, scaled_a, seed, *others = ctx.saved_tensors
    fast_b, frozen = others[: ctx.count], others[ctx.count :]
    grad_x, grad_a, grads_b = torch.ops.lora.linear_backward(
        grads, x, down, scaled_a, fast_b, seed, ctx.dropout, ctx.scaling, frozen
    )
    grads_a = grad_a.split([copy.shape[1] for copy in fast_b])
    others = None, [None] * len(fast_b), [None] * ctx.biases, None, None, None, [None] * len(frozen)
    return grad_x, list(grads_a), grads_b, *others


_linear.register_autograd(_backward, setup_context=_remember)


def try_lora(device, dtype):
    """Whether the fused operation computes what plain float32 does, tried on small tensors; says so if it does not.

    On a GPU it takes Triton, and Triton takes a C compiler.
    """
    draw, shapes = torch.Generator().manual_seed(0), ((48, 64), (32, 64), (8, 64), (32, 8))
    x, weight, a, b = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
    seed = torch.zeros(1, dtype=torch.long, device=device)

    def plain(x, a, b):
        return x @ weight.T + (x @ a.T) @ b.T

    def fused(x, a, b):
        drop(x.detach().to(dtype), seed, 0.5)
        copies, frozen = (a.detach().to(dtype), [b.detach().to(dtype)]), [weight.to(dtype)]
        return torch.ops.lora.linear(x.to(dtype), [a], [b], *copies, [], seed, 0.0, 1.0, frozen)[0][0]

    def results(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]

    try:
        pairs = zip(results(fused), results(plain), strict=True)
        problem = None if all((found - wanted).norm() < 0.05 * wanted.norm() for found, wanted in pairs) else "wrong"
    except Exception as error:  # noqa: BLE001  Triton's own errors are of many types
        problem = type(error).__name__
    if problem:
        say(
            f"The fused LoRA kernels do not serve here ({problem}), which is slower; they need a C compiler and a GPU"
            " that this PyTorch supports"
        )
    return problem is None


# ---- A model's LoRA layers -------------------------------------------------------------------------------------------
class FastLora:
    """A model's LoRA layers, computing with the fused operation while they train.

    The optimizer keeps the adapter in float32. The layers multiply with copies in the model's own number format, which
    refresh() renews after each optimizer step. draw_dropout() decides the masks of the next pass by the CPU's random
    numbers, so that a checkpointed layer that is computed again meets the same masks.

    compute_once: a function that lets the model compute once, by which the layers that read the same tensor are found.
    patches: what the layers are changed through. replying: to compute replies instead, without dropout. shared: the
    layers that read the same tensor, lists of them, where they were found before.
    """

    def __init__(self, model, compute_once, patches, replying=False, shared=None):
        lora_layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        layers = [layer for layer in lora_layers if is_plain(layer)]
        self.covers_all = len(layers) == len(lora_layers)
        self.shared = share_inputs(model, layers, compute_once) if shared is None else shared
        self.seeds = torch.zeros(len(self.shared), dtype=torch.int64, device=model.device)
        self.groups = [
            LoraGroup(group, self.seeds[number : number + 1], model.dtype, replying)
            for number, group in enumerate(self.shared)
        ]
        for group in self.groups:
            for number, layer in enumerate(group.layers):
                patches.set(layer, "fast_group", group)
                patches.set(layer, "fast_number", number)
                patches.set(layer, "forward", MethodType(lora_forward, layer))
        self.weights = [weight for group in self.groups for weight in group.a + group.b]
        self.copies = [copy for group in self.groups for copy in group.copies_of_a + group.fast_b]
        self.copies_of_a = [copy for group in self.groups for copy in group.copies_of_a]
        self.scalings = [group.scaling for group in self.groups for _ in group.copies_of_a]
        self.refresh()

    def set_dequantized(self, dequantized):
        """Keep frozen 4-bit weights dequantized, two bytes more for each, or dequantize them in every pass."""
        for group in self.groups:
            group.set_dequantized(dequantized)

    @torch.no_grad()
    def refresh(self):
        """Copy the adapter as the optimizer left it; the A's are multiplied by the scaling."""
        if self.groups:
            torch._foreach_copy_(self.copies, self.weights)
            torch._foreach_mul_(self.copies_of_a, self.scalings)

    def forget(self):
        """Drop the outputs that a pass which broke off had computed for layers that it did not reach."""
        for group in self.groups:
            group.waiting = None

    def draw_dropout(self):
        seeds = torch.randint(2**31, self.seeds.shape, pin_memory=self.seeds.is_cuda)
        self.seeds.copy_(seeds, non_blocking=True)


class LoraGroup:
    """LoRA layers that read the same tensor. The first one that is called computes all; the others take their outputs.

    They share a dropout mask, which has the same distribution for each layer as a mask of its own.
    """

    def __init__(self, layers, seed, dtype, replying=False):
        self.layers, self.replying = layers, replying
        self.a = [layer.lora_A["default"].weight for layer in layers]
        self.b = [layer.lora_B["default"].weight for layer in layers]
        self.scaled_a = torch.cat([weight.detach() for weight in self.a]).to(dtype)
        self.copies_of_a = list(self.scaled_a.split([len(weight) for weight in self.a]))
        self.fast_b = [weight.detach().to(dtype, copy=True) for weight in self.b]
        self.gathered = is_sharded(layers[0])  # then the frozen tensors are there only while the layers compute
        self.stored, self.biases = (None, None) if self.gathered else self.read_frozen()
        self.frozen = self.stored
        self.seed, self.scaling = seed, layers[0].scaling["default"]
        self.dropout = 0.0 if replying else dropout_of(layers[0])
        self.waiting = None  # the tensor that was read, and the outputs of all layers, until the last has taken its own

    def read_frozen(self):
        """The frozen_tensors of all layers, and their biases."""
        frozen = [tensor for layer in self.layers for tensor in frozen_tensors(layer.base_layer)]
        return frozen, [layer.base_layer.bias for layer in self.layers if layer.base_layer.bias is not None]

    def set_dequantized(self, dequantized):
        if not dequantized:
            self.frozen = self.stored
        elif self.frozen is self.stored:
            self.frozen = list(matrices(self.stored, self.fast_b, self.scaled_a.shape[1]))

    def compute(self, x):
        """The outputs of all layers."""
        if self.replying and x.shape[-2] == 1:
            return self.compute_few(x)
        frozen, biases = self.read_frozen() if self.gathered else (self.frozen, self.biases)
        outputs, _ = torch.ops.lora.linear(
            x.to(self.scaled_a.dtype),
            self.a,
            self.b,
            self.scaled_a,
            self.fast_b,
            biases,
            self.seed,
            self.dropout,
            self.scaling,
            frozen,
        )
        return outputs

    def compute_few(self, x):
        """The same for one token of each row, x (rows, 1, inputs)."""
        rows = x.reshape(-1, x.shape[-1]).to(self.scaled_a.dtype)
        down, kind = rows @ self.scaled_a.T, len(self.stored) // len(self.layers)
        biases = self.biases or [None] * len(self.layers)
        layers = [
            (self.stored[kind * number : kind * (number + 1)], bias, down[:, rank], copy)
            for number, (copy, rank, bias) in enumerate(zip(self.fast_b, ranks(self.fast_b), biases, strict=True))
        ]
        return [out.view(*x.shape[:-1], -1) for out in few_rows_linear(rows, layers)]


def lora_forward(layer, x, *args, **kwargs):
    """The forward of a LoRA layer: the fused operation while the layer trains or replies, peft's own otherwise."""
    group, number = layer.fast_group, layer.fast_number
    if layer.training == group.replying or layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x, *args, **kwargs)
    if number == 0 or group.waiting is None or group.waiting[0] is not x:
        group.waiting = (x, group.compute(x))
    out = group.waiting[1][number]
    if number == len(group.a) - 1:
        group.waiting = None
    return out


def dropout_of(layer):
    return getattr(layer.lora_dropout["default"], "p", 0.0)


def is_plain(layer):
    """Whether a LoRA layer is plain: one adapter, no variant such as DoRA, over a linear layer of a known kind."""
    base = layer.get_base_layer()
    return (
        isinstance(base, torch.nn.Linear)
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and layer.lora_B["default"].bias is None
        and not layer.fan_in_fan_out
        and count_frozen(base) > 0
    )


def all_plain(model):
    """Whether every LoRA layer of the model is plain."""
    return all(is_plain(layer) for layer in model.modules() if isinstance(layer, LoraLayer))


def share_inputs(model, layers, compute_once):
    """Group the layers that read the same tensor one after the other, as query, key and value do; found by trying.

    A group's layers have the same kind of weight, the same scaling and dropout, and either all have a bias or none has.
    """
    calls = []  # it keeps the tensors alive, so that none of their ids can come to mean another tensor
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0]))) for layer in layers
    ]
    try:
        compute_once()
    finally:
        for hook in hooks:
            hook.remove()
    count = Counter(layer for layer, _ in calls)
    # checkpointing computes a decoder layer again by itself, so that no group may reach into another
    owners = {module: number for number, layer in enumerate(decoder_layers(model)) for module in layer.modules()}

    def kind(call):
        layer, x = call
        base, scaling = layer.base_layer, layer.scaling["default"]
        return id(x), owners.get(layer), count_frozen(base), base.bias is None, scaling, dropout_of(layer)

    once = [(layer, x) for layer, x in calls if count[layer] == 1]
    groups = [[layer for layer, _ in group] for _, group in groupby(once, kind)]
    return groups + [[layer] for layer in layers if count[layer] != 1]
