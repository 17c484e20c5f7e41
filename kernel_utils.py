"""The training step's kernels: LoRA over a frozen linear layer, NF4 weights, dropout, attention, loss.

Each operation is written in plain PyTorch, which runs anywhere and which the tests compare with, and where that is slow
also in Triton, which runs on CUDA. All are exact: the mathematics of transformers, peft and bitsandbytes in fewer
kernels and without copies.
"""

import inspect
from itertools import accumulate, pairwise

import torch
from torch.library import custom_op
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from run_utils import say

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
    def _cross_entropy_kernel(logits, targets, losses, words, GRADIENT: tl.constexpr, SPAN: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        largest, total = -3.4e38, 0.0
        for start in range(0, words, SPAN):
            word = start + tl.arange(0, SPAN)
            value = tl.load(logits + row * words + word, mask=word < words, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(value, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(value - larger), 0)
            largest = larger
        normalizer = largest + tl.log(total)
        tl.store(losses + row, normalizer - tl.load(logits + row * words + target).to(tl.float32))
        if GRADIENT:
            tl.debug_barrier()  # the target's logit has been read
            for start in range(0, words, SPAN):
                word = start + tl.arange(0, SPAN)
                value = tl.load(logits + row * words + word, mask=word < words, other=0.0).to(tl.float32)
                gradient = tl.exp(value - normalizer) - tl.where(word == target, 1.0, 0.0)
                tl.store(logits + row * words + word, gradient.to(logits.dtype.element_ty), mask=word < words)


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


def frozen_tensors(layer):
    """A linear layer's frozen weight: [itself], or the six tensors of dequantize; None where its kind is not known."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return [layer.weight] if layer.weight.is_floating_point() else None
    if state.quant_type != "nf4" or not state.nested or state.blocksize != 64 or state.state2.blocksize != 256:
        return None
    if state.shape.numel() % 64:
        return None
    return [layer.weight.data, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code]


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
    a16: torch.Tensor,
    b16: list[torch.Tensor],
    biases: list[torch.Tensor],
    seed: torch.Tensor,
    dropout: float,
    scaling: float,
    frozen: list[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of LoRA layers that read the same x, (..., inputs); and x times their A's.

    a, b: the adapter, which the gradients belong to. a16: copies of the A's times the scaling, one below the other;
    b16: copies of the B's. One dropout mask serves all. biases: none, or one of each. frozen: their frozen_tensors.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # dropout's masks go by memory
    down = (drop(rows, seed, dropout) if dropout else rows) @ a16.T
    outs = []
    for copy, rank, matrix in zip(b16, ranks(b16), matrices(frozen, b16, x.shape[-1]), strict=True):
        # the small product first: to add it to the large one would read and write all again
        outs.append((down[:, rank] @ copy.T).addmm_(rows, matrix.T))
    if biases:
        outs = [out.add_(bias) for out, bias in zip(outs, biases, strict=True)]
    return [out.view(*x.shape[:-1], -1) for out in outs], down


@_linear.register_fake
def _(x, a, b, a16, b16, *others):
    outs = [x.new_empty(*x.shape[:-1], copy.shape[0]) for copy in b16]
    return outs, x.new_empty(x.numel() // x.shape[-1], a16.shape[0])


@custom_op("lora::linear_backward", mutates_args=())
def _linear_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    down: torch.Tensor,
    a16: torch.Tensor,
    b16: list[torch.Tensor],
    seed: torch.Tensor,
    dropout: float,
    scaling: float,
    frozen: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The gradients of x, of the A's one below the other, and of each B."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    up, grads_b = torch.empty_like(down), []
    for grad, copy, rank in zip(grads, b16, ranks(b16), strict=True):
        grads_b.append(matmul32(grad.T, down[:, rank]))
        torch.mm(grad, copy, out=up[:, rank])
    grad_a = matmul32(up.T, drop(rows, seed, dropout) if dropout else rows).mul_(scaling)
    grad_x = up @ a16
    if dropout:
        drop(grad_x, seed, dropout, out=grad_x)
    for grad, matrix in zip(grads, matrices(frozen, b16, x.shape[-1]), strict=True):
        grad_x.addmm_(grad, matrix)
    return grad_x.view(x.shape), grad_a, grads_b


@_linear_backward.register_fake
def _(grads, x, down, a16, b16, *others):
    grads_b = [copy.new_empty(copy.shape, dtype=torch.float32) for copy in b16]
    return x.new_empty(x.shape), a16.new_empty(a16.shape, dtype=torch.float32), grads_b


def ranks(copies):
    """Where each layer's ranks stand among all, by the copies of the B's, (outputs, rank) each."""
    ends = accumulate((copy.shape[1] for copy in copies), initial=0)
    return [slice(begin, end) for begin, end in pairwise(ends)]


def matmul32(left, right):
    """left @ right, the result in float32 whatever the operands are."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _remember(ctx, inputs, output):
    x, _, _, a16, b16, biases, seed, ctx.dropout, ctx.scaling, frozen = inputs
    ctx.count, ctx.biases = len(b16), len(biases)
    ctx.save_for_backward(x, output[1], a16, seed, *b16, *frozen)


def _backward(ctx, grads, _):
    x, down, a16, seed, *others = ctx.saved_tensors
    b16, frozen = others[: ctx.count], others[ctx.count :]
    grad_x, grad_a, grads_b = torch.ops.lora.linear_backward(
        grads, x, down, a16, b16, seed, ctx.dropout, ctx.scaling, frozen
    )
    grads_a = grad_a.split([copy.shape[1] for copy in b16])
    others = None, [None] * len(b16), [None] * ctx.biases, None, None, None, [None] * len(frozen)
    return grad_x, list(grads_a), grads_b, *others


_linear.register_autograd(_backward, setup_context=_remember)


def lora_works(device, dtype):
    """Whether the fused operation runs on a GPU, which takes Triton and a C compiler; says so if it fails."""
    return triton is not None and dtype != torch.float32 and try_lora(device, dtype)


def try_lora(device, dtype):
    """Compare the fused operation with plain float32 on small tensors; says what is wrong, returns whether it fits."""
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


# ---- Attention -------------------------------------------------------------------------------------------------------
VARLEN = "varlen"
# torch 2.13 asks whether key and value may have fewer heads; before, they simply may
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """transformers' attention function for rows end to end: (1, heads, tokens, width) -> (1, tokens, heads, width).

    cu_seq_lens_q: where each row starts, and the end, int32; max_length_q: no row is longer.
    """
    query, key, value = (states.transpose(1, 2)[0] for states in (query, key, value))
    if unknown := [name for name in ("softcap", "s_aux", "dropout") if kwargs.get(name)]:
        raise NotImplementedError(f"varlen attention without {unknown}")
    if torch.is_autocast_enabled(query.device.type):  # which treats PyTorch's own attention so: DoRA gives float32
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    starts, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    window = (-1, 0) if sliding_window is None or sliding_window >= longest else (sliding_window - 1, 0)
    out = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **_GROUPED
    )
    return out.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)


# ---- Loss ------------------------------------------------------------------------------------------------------------
def cross_entropy_(logits, targets, gradient):
    """Cross entropy in nats, (tokens,) float32, of logits (tokens, words), which become their gradient if wanted."""
    if logits.is_cuda and triton:
        losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        words = logits.shape[-1]
        _cross_entropy_kernel[(len(targets),)](logits, targets, losses, words, gradient, SPAN=4096, num_warps=8)
        return losses
    values, targets = logits.float(), targets[:, None]
    normalizer = torch.logsumexp(values, -1, keepdim=True)
    losses = (normalizer - values.gather(-1, targets))[:, 0]
    if gradient:
        probabilities = (values - normalizer).exp_()
        logits.copy_(probabilities.scatter_add_(-1, targets, probabilities.new_full(targets.shape, -1.0)))
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy in nats, (tokens,), of hidden states (tokens, width) against targets through the output layer.

    At most LOGITS logits exist at a time, in the forward pass only, which also computes the gradient of the hidden
    states. Exact for any weighting of the tokens. The output layer is frozen.
    """

    LOGITS = 2**25  # 64 MiB in half precision

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        count = max(1, LinearCrossEntropy.LOGITS // len(weight))
        for start in range(0, len(targets), count):
            part = slice(start, start + count)
            logits = hidden[part] @ weight.T
            losses[part] = cross_entropy_(logits, targets[part], gradient is not None)
            if gradient is not None:
                gradient[part] = logits @ weight  # autocast computes some models' hidden states in float32
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None
