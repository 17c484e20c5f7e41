"""Passes: rows laid end to end without padding, computed together and kept apart; their losses and scores."""

import contextlib
import inspect
import math
from bisect import bisect_left, insort
from functools import lru_cache, partial
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from encoding_utils import IGNORED
from progress_utils import progress

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch, Windows or macOS
    triton = None


GRAPH_TOKENS = 128  # recorded passes have a multiple of this many tokens; GPUs multiply in tiles of so many rows
PASS_TOKENS = 320  # a pass takes the time of so many tokens more than it has, as measured at 7B's shape on an H200
LAST_PASSES = 3  # of a step: those whose lengths are chosen from all combinations


# ---- Rows laid end to end --------------------------------------------------------------------------------------------
def pack_rows(lengths, max_tokens):
    """Cut one optimizer step's rows into few passes of at most max_tokens tokens; returns lists of indices.

    First-fit decreasing. A row longer than max_tokens gets a pass of its own.
    """
    passes, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((p for p, free in enumerate(room) if lengths[index] <= free), None)
        if fitting is None:
            passes.append([])
            room.append(max_tokens)
            fitting = len(passes) - 1
        passes[fitting].append(index)
        room[fitting] -= lengths[index]
    return passes


def fit_rows(lengths, sizes):
    """Lay rows into passes of these sizes, in tokens; returns lists of indices, or None where some row finds no room.

    Best-fit decreasing.
    """
    passes, room = [[] for _ in sizes], sorted((size, number) for number, size in enumerate(sizes))
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = bisect_left(room, (lengths[index], 0))
        if fitting == len(room):
            return None
        free, chosen = room.pop(fitting)
        passes[chosen].append(index)
        insort(room, (free - lengths[index], chosen))
    return [group for group in passes if group]


def cost_of(sizes):
    """The time that passes of these sizes take together, in tokens."""
    return sum(sizes) + PASS_TOKENS * len(sizes)


@lru_cache
def combinations_of(sizes):
    """All that the last passes of a step may be: tuples of sizes, the cheapest first."""
    found = [some for count in range(1, LAST_PASSES + 1) for some in combinations_with_replacement(sizes[::-1], count)]
    return sorted(found, key=cost_of)


def tokens_of(groups, lengths):
    """The tokens of each group of rows; groups: lists of indices, lengths: those of the rows."""
    return [sum(lengths[index] for index in group) for group in groups]


def cut_step(lengths, max_tokens, sizes=()):
    """pack_rows, or the cheapest passes that are found where they are filled up to one of these sizes.

    sizes: in tokens, a tuple in ascending order, none larger than max_tokens.
    """
    usual = pack_rows(lengths, max_tokens)
    if not sizes or max(lengths) > sizes[-1]:
        return usual
    tokens = sum(lengths)
    usual_cost = cost_of([recorded_tokens(size, sizes) for size in tokens_of(usual, lengths)])
    whole = (sizes[-1],) * max(0, math.ceil(tokens / sizes[-1]) - LAST_PASSES)
    for last in combinations_of(sizes):
        filled = whole + last
        if cost_of(filled) >= usual_cost:
            break
        if sum(filled) >= tokens and (found := fit_rows(lengths, filled)):
            return found
    return usual


def cut_into_passes(rows, max_tokens, sizes=()):
    """cut_step of rows themselves: lists of their indices, one for each pass."""
    return cut_step([len(row["input_ids"]) for row in rows], max_tokens, sizes)


def build_pass(rows):
    """Lay rows end to end, without padding, as one batch of size 1 for a causal LM.

    input_ids and position_ids have shape (1, tokens); positions restart at 0 with each row, which is how transformers'
    masks keep the rows apart (it needs attention_mask=None and use_cache=False; masking_utils.py); a row that is tried
    out at other positions has its "first_position". `row_starts`, one
    more than there are rows, says the same to varlen attention, its last being the end; `longest`, rounded up to a
    power of two, bounds the rows' lengths. `predicting` holds the positions whose next token is trained, `targets` that
    token, `row_of_target` the row's index: (targets,) each.
    """
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    labels = torch.cat([as_tensor(row["labels"]) for row in rows])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    offsets = starts[:-1] - torch.tensor([row.get("first_position", 0) for row in rows])
    row_of_token = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    trained = labels != IGNORED
    trained[starts[:-1]] = False  # nothing comes before a row's first token
    targets = trained.nonzero()[:, 0]
    return {
        "input_ids": torch.cat([as_tensor(row["input_ids"]) for row in rows])[None],
        "position_ids": (torch.arange(len(labels)) - offsets[row_of_token])[None],
        "row_starts": starts.int(),
        "longest": 1 << (int(lengths.max()) - 1).bit_length(),
        "predicting": targets - 1,
        "targets": labels[targets],
        "row_of_target": row_of_token[targets],
    }


def as_tensor(ids):
    return torch.as_tensor(ids, dtype=torch.long)


def to_device(batch, device):
    """A pass's tensors on the device, to a GPU without waiting for it; what is no tensor stays."""
    cuda = device.type == "cuda"
    return {
        name: (value.pin_memory() if cuda else value).to(device, non_blocking=cuda) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def count_tokens(rows):
    return sum(len(row["input_ids"]) for row in rows)


def count_trained_tokens(rows):
    """Number of tokens whose prediction is trained: labels other than IGNORED, without a row's first token."""
    return sum(int((np.asarray(row["labels"][1:]) != IGNORED).sum()) for row in rows)


def longest_pass(rows, max_tokens, sizes=()):
    """Of the passes into which cut_into_passes cuts these rows, the rows of the longest."""
    passes = [[rows[index] for index in group] for group in cut_into_passes(rows, max_tokens, sizes)]
    return max(passes, key=count_tokens)


def recorded_tokens(count, lengths=()):
    """The tokens of the recorded pass that serves a pass of so many: the next of the lengths that are planned."""
    return min((length for length in lengths if length >= count), default=-(-count // GRAPH_TOKENS) * GRAPH_TOKENS)


def planned_length(plan, count):
    """The tokens of the recorded pass that serves a pass of so many: the next of the plan's lengths.

    Of those, the memory ran out with the ones that are longer than passes may be; only a row that is longer itself, and
    is a pass of its own, is served by them.
    """
    lengths = plan.lengths if count > recorded_tokens(plan.max_pass_tokens) else lengths_in_use(plan)
    return recorded_tokens(count, lengths)


def lengths_in_use(plan):
    """The plan's lengths of recorded passes but those that the memory ran out with; () where none is recorded."""
    return tuple(length for length in plan.lengths if length <= plan.max_pass_tokens) if plan.recorded else ()


def block_mask_tokens(base):
    """How many tokens a pass may have where a block mask keeps the rows apart.

    Its cost grows with the square of the pass, and outweighs the rest of a layer from some multiple of its width on;
    earlier where the scores are stored.
    """
    hidden = base.config.get_text_config().hidden_size
    return hidden // 2 if stores_scores(base) else 2 * hidden


def stores_scores(base):
    """Whether attention stores the scores of all pairs of tokens, since no fused kernel has its soft caps or sinks."""
    return base.config.get_text_config()._attn_implementation == "eager"


# ---- Attention -------------------------------------------------------------------------------------------------------
VARLEN = "varlen"


# torch 2.13 wants to be told that key and value may have fewer heads; older releases just allow it
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """An attention function for transformers, rows end to end: (1, heads, tokens, width) -> (1, tokens, heads, width).

    cu_seq_lens_q: where each row starts, and where the last one ends, int32. max_length_q: no row is longer.
    """
    query, key, value = (states.transpose(1, 2)[0] for states in (query, key, value))
    if unknown := [name for name in ("softcap", "s_aux", "dropout") if kwargs.get(name)]:
        raise NotImplementedError(f"varlen attention without {unknown}")
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's own attention: DoRA's layers give float32
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
if triton:

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


# ---- What is set on objects of other libraries -----------------------------------------------------------------------
class Patches(contextlib.ExitStack):
    """Attributes that are set on objects of other libraries, and all taken back together by close()."""

    def __init__(self):
        super().__init__()
        self._known = {}  # keeps the owners, so that none of their ids can come to mean another object

    def set(self, owner, name, value):
        """Set an attribute; close() brings back what was there before the first time."""
        if (id(owner), name) not in self._known:
            self._known[id(owner), name] = owner
            if name in vars(owner) or isinstance(getattr(type(owner), name, None), property):
                self.callback(setattr, owner, name, getattr(owner, name))
            else:
                self.callback(delattr, owner, name)
        setattr(owner, name, value)


# ---- Passes ----------------------------------------------------------------------------------------------------------
class Kernels(NamedTuple):
    """Which fast kernels compute a model's passes; without them transformers, peft and PyTorch do."""

    attention: bool = False  # varlen flash attention, for rows laid end to end
    loss: bool = False  # the output layer and cross entropy together, which never store the logits whole
    lora: bool = False  # a LoRA layer and its frozen weight as one operation, in training


PLAIN = Kernels()


def transformers_model(model):
    """The transformers model inside the wrappers of distributed training and of peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def autocast(model, cached=True):
    """Compute in the model's half precision, as training does; this changes nothing for a float32 model.

    cached: whether the adapter's copies in half precision are kept until the outermost autocast ends.
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, dtype=model.dtype, enabled=half, cache_enabled=cached)


@contextlib.contextmanager
def chosen_attention(base, kernels):
    """Use the passes' attention inside. Generation needs the model's own one, which is back in place afterwards."""
    with Patches() as patches:
        if kernels.attention:
            patches.set(base.config, "_attn_implementation", VARLEN)
        yield


@contextlib.contextmanager
def chosen_loss(base, kernels, targets):
    """Let the output layer return the loss of each target instead of logits, where the fused loss is used."""
    with Patches() as patches:
        if kernels.loss:
            head = base.get_output_embeddings()
            patches.set(head, "forward", lambda hidden: LinearCrossEntropy.apply(hidden[0], head.weight, targets)[None])
        yield


def attention_arguments(kernels, batch):
    """The model arguments that tell varlen attention where rows begin; other attention reads the position ids."""
    return {"cu_seq_lens_q": batch["row_starts"], "max_length_q": batch["longest"]} if kernels.attention else {}


def pass_losses(model, rows, kernels=PLAIN):
    """Cross entropy in nats of every trained token of rows laid end to end, and the index of its row: (targets,) each.

    transformers' masks keep the rows apart only with use_cache=False and no attention mask. Logits are computed only
    where a trained token follows.
    """
    base = transformers_model(model)
    forget_longer_rows(base)
    batch = to_device(build_pass(rows), base.device)
    with chosen_attention(base, kernels), chosen_loss(base, kernels, batch["targets"]):
        outputs = base(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            logits_to_keep=batch["predicting"],
            use_cache=False,
            **attention_arguments(kernels, batch),
        ).logits[0]
    if not kernels.loss:
        outputs = F.cross_entropy(outputs.float(), batch["targets"], reduction="none")
    return outputs, batch["row_of_target"]


def forget_longer_rows(base):
    """Bring back the rotary frequencies of a short row.

    With rope_type "dynamic" they follow the longest position met, and stay when a shorter row comes that is beyond the
    original length too (transformers, dynamic_rope_update).
    """
    if "'dynamic'" not in str(getattr(base.config.get_text_config(), "rope_parameters", "")):
        return
    for module in base.modules():
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, frequencies in module.named_buffers(recurse=False):
            if name.endswith("original_inv_freq"):
                getattr(module, name.replace("original_inv_freq", "inv_freq")).copy_(frequencies)


def own_dropout(base):
    """Whether the model's config has dropout of its own, beside LoRA's; a mere likeness of names costs speed alone."""
    config = base.config.get_text_config().to_dict()
    return any("drop" in name and isinstance(value, (int, float)) and value for name, value in config.items())


# ---- Trying a model on two short rows --------------------------------------------------------------------------------
def probe_rows(model, seed=0):
    """Two rows of 24 random tokens, all trained; the seed decides the first, the second is always the same."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draws = [torch.Generator().manual_seed(number) for number in (seed, 1000)]
    ids = [torch.randint(vocabulary, (24,), generator=draw).tolist() for draw in draws]
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def probe_losses(model, rows, kernels=PLAIN):
    """The losses of the last row's 23 trained tokens, in eval mode, with the other rows laid before it."""
    training = model.training
    try:
        model.eval()
        with autocast(model):
            return pass_losses(model, rows, kernels)[0][-23:]
    finally:
        model.train(training)


def probe_backward(model, rows, kernels):
    """Whether the gradients of the rows' mean loss are finite, and so they count where no weight is trained.

    It leaves no trace. Decoder layers are checkpointed meanwhile: DoRA keeps weights dequantized for the backward pass.
    """
    base, trained = transformers_model(model), [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return True
    with Patches() as patches, torch.enable_grad(), autocast(model), chosen_attention(base, kernels):
        for layer in decoder_layers(base):
            patches.set(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
        loss = pass_losses(model, rows, kernels)[0].mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return all(bool(gradient.isfinite().all()) for gradient in found if gradient is not None)


def same_losses(model, found, expected):
    """Whether losses agree. In half precision the order of summation alone moves one by some tenths at times."""
    return (found - expected).abs().mean().item() <= (1e-3 if model.dtype == torch.float32 else 0.15)


def mixes_rows(model, kernels, longest_row=1):
    """Whether a row's losses depend on the row that is laid before it.

    What the first row says, that it is there at all, or that it stands where a row of longest_row tokens ends, must not
    move the second row's losses. Attention layers with rotary positions keep rows apart; recurrent and convolutional
    layers, and learned absolute positions in some families, let a row read the one before it; rope_type "dynamic" and
    "longrope" scale the positions of all rows by the longest.
    """
    rows = probe_rows(model)
    found, alone = probe_losses(model, rows, kernels), probe_losses(model, rows[1:], kernels)
    others = [probe_rows(model, seed=1)]
    first = max(longest_row - len(rows[0]["input_ids"]), 0)
    if first:
        others.append([rows[0] | {"first_position": first}, rows[1]])
    behind_others = [probe_losses(model, other, kernels) for other in others]
    unmoved = all((found - behind).abs().max() <= 1e-3 for behind in behind_others)
    return not (unmoved and same_losses(model, found, alone))


# ---- Scores ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score_rows(
    model, rows, max_pass_tokens, kernels=PLAIN, before_pass=lambda: None, what="Evaluating", compute=pass_losses
):
    """Return [(negative log-likelihood in nats, trained tokens) for each row], however the rows are cut into passes.

    what: the name under which its progress is shown. compute: what gives a pass's losses, called as pass_losses is.
    """
    scores = [None] * len(rows)
    model.eval()
    with progress(what, len(rows), "rows") as bar:
        for indices in cut_into_passes(rows, max_pass_tokens):
            before_pass()
            group = [rows[index] for index in indices]
            with autocast(model):
                losses, row_of_target = compute(model, group, kernels)
            sums = torch.zeros(len(group), dtype=torch.float64)
            sums.index_add_(0, row_of_target.cpu(), losses.cpu().double())
            for index, row, total in zip(indices, group, sums.tolist(), strict=True):
                scores[index] = (total, count_trained_tokens([row]))
            bar.update(len(group))
    return scores


def mean_loss(scores):
    """Token-weighted mean of score_rows' result, in nats a token; its exponential is the perplexity."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def perplexity(loss):
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
