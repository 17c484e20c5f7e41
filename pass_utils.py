"""Passes: rows laid end to end without padding, computed together and kept apart; their losses and scores."""

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from generation_utils import autocast
from kernel_utils import VARLEN, LinearCrossEntropy, lora_works
from run_utils import say
from token_utils import build_pass, count_trained_tokens, pack_rows


class PassKernels:
    """What computes a model's passes: varlen attention, a loss that never stores the logits whole, fused LoRA layers.

    choose_kernels sets one on the transformers model; peft's and Accelerate's wrappers are seen through.
    """

    varlen = fused_loss = fused_lora = False


def transformers_model(model):
    """The transformers model inside the wrappers of distributed training and peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def chosen_attention(base):
    """The attention that was chosen for passes; the model's own is back in place afterwards, as generation needs it."""
    usual = base.config._attn_implementation
    if kernels_of(base).varlen:
        base.config._attn_implementation = VARLEN
    try:
        yield
    finally:
        base.config._attn_implementation = usual


@contextlib.contextmanager
def chosen_loss(base, targets):
    """The output layer gives each target's loss in the place of logits, where the fused loss was chosen."""
    if not kernels_of(base).fused_loss:
        yield
        return
    head = base.get_output_embeddings()
    head.forward = lambda hidden: LinearCrossEntropy.apply(hidden[0], head.weight, targets)[None]
    try:
        yield
    finally:
        del head.forward


def kernels_of(base):
    return getattr(base, "pass_kernels", PassKernels)


def row_arguments(base, batch):
    """What tells the chosen attention where rows begin, beyond the position ids."""
    if not kernels_of(base).varlen:
        return {}
    return {"cu_seq_lens_q": batch["row_starts"], "max_length_q": batch["longest"]}


def pass_losses(model, rows):
    """Cross entropy of every trained token of rows laid end to end; returns (losses, row of each), (targets,) each.

    use_cache=False and no attention mask: only then do transformers' masks keep the rows apart. Logits are computed
    only where a trained token follows.
    """
    base = transformers_model(model)
    batch = to_device(build_pass(rows), base.device)
    with chosen_attention(base), chosen_loss(base, batch["targets"]):
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            logits_to_keep=batch["predicting"],
            use_cache=False,
            **row_arguments(base, batch),
        ).logits[0]
    if not kernels_of(base).fused_loss:
        outputs = F.cross_entropy(outputs.float(), batch["targets"], reduction="none")
    return outputs, batch["row_of_target"]


def to_device(batch, device):
    """A pass's tensors on the device, to a GPU without waiting for it; what is no tensor stays."""
    cuda = device.type == "cuda"
    return {
        name: (value.pin_memory() if cuda else value).to(device, non_blocking=cuda) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def own_dropout(base):
    """Whether a model's config has dropout of its own, beside LoRA's; a name that only sounds so costs speed alone."""
    config = base.config.get_text_config().to_dict()
    return any("drop" in name and isinstance(value, (int, float)) and value for name, value in config.items())


# ---- Choosing --------------------------------------------------------------------------------------------------------
def probe_rows(model, seed=0):
    """Two short rows of random tokens, every token trained; the seed decides the first."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draws = [torch.Generator().manual_seed(number) for number in (seed, 1000)]
    ids = [torch.randint(vocabulary, (24,), generator=draw).tolist() for draw in draws]
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def probe_losses(model, rows):
    """The losses of the last row's 23 trained tokens, with the others before it, in eval mode."""
    training = model.training
    try:
        model.eval()
        with autocast(model):
            return pass_losses(model, rows)[0][-23:]
    finally:
        model.train(training)


@contextlib.contextmanager
def recomputing(base):
    """Decoder layers are computed again in the backward pass: a DoRA layer keeps its weight dequantized until then."""
    layers = decoder_layers(base)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def probe_backward(model, rows):
    """Whether the gradients of the rows' mean loss are finite, without a trace; so are those of a model not trained."""
    base, trained = (
        transformers_model(model),
        [parameter for parameter in model.parameters() if parameter.requires_grad],
    )
    if not trained:
        return True
    with torch.enable_grad(), autocast(model), chosen_attention(base), recomputing(base):
        loss = pass_losses(model, rows)[0].mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return all(bool(gradient.isfinite().all()) for gradient in found if gradient is not None)


def same_losses(model, found, expected):
    """Whether losses agree; in half precision the order of summation alone moves one by some tenths at times."""
    return (found - expected).abs().mean().item() <= (1e-3 if model.dtype == torch.float32 else 0.15)


def choose_kernels(model):
    """Give the model the fast attention and loss as far as they compute what it computes by itself; say what is used.

    Each is tried on two short rows and left out if it fails or if the losses differ. Varlen flash attention needs a
    CUDA GPU of the Ampere generation or newer and half precision.
    """
    base, rows = transformers_model(model), probe_rows(model)
    device, kernels = base.device, PassKernels()
    if device.type != "cuda":
        return
    expected = probe_losses(model, rows[1:])
    base.pass_kernels = kernels
    kernels.fused_lora = lora_works(device, model.dtype)
    head, half = base.get_output_embeddings(), model.dtype != torch.float32
    for name, possible in (
        ("varlen", half and torch.cuda.get_device_capability(device)[0] >= 8 and not own_dropout(base)),
        ("fused_loss", type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad),
    ):
        setattr(kernels, name, possible)
        try:
            same = possible and same_losses(model, probe_losses(model, rows), expected)
            setattr(kernels, name, same and probe_backward(model, rows))
        except Exception:  # noqa: BLE001  whatever a kernel does not serve: head sizes, soft caps, sinks
            setattr(kernels, name, False)
    attention = "varlen flash attention" if kernels.varlen else "SDPA with a block mask"
    say(f"Attention: {attention}; loss: {'fused with' if kernels.fused_loss else 'after'} the output layer")


def choose_pass_tokens(model, max_tokens):
    """Return the tokens that a pass may hold: at most max_tokens; 0, a row a pass, if the model mixes rows.

    Tried on two short rows: what the first says must not move the second's losses at all, nor that it is there.
    Attention layers with rotary positions keep rows laid end to end apart; recurrent and convolutional layers, and
    learned absolute positions in some families, let a row read the one before it. A block mask costs as the square of
    the pass, which outweighs the rest of a layer from some multiple of its width on.
    """
    base, rows = transformers_model(model), probe_rows(model)
    found, expected = probe_losses(model, rows), probe_losses(model, rows[1:])
    other = probe_losses(model, probe_rows(model, seed=1))
    if same_losses(model, found, expected) and (found - other).abs().max() <= 1e-3:
        return max_tokens if kernels_of(base).varlen else min(max_tokens, 2 * base.config.get_text_config().hidden_size)
    say("This model mixes rows that are laid end to end, so each row is computed by itself, which is slower")
    return 0


# ---- Scores ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score_rows(model, rows, max_tokens, before_pass=lambda: None):
    """Return [(negative log-likelihood in nats, trained tokens) for each row], whatever the batching."""
    scores = [None] * len(rows)
    model.eval()
    for indices in pack_rows([len(row["input_ids"]) for row in rows], max_tokens):
        before_pass()
        group = [rows[index] for index in indices]
        with autocast(model):
            losses, row_of_target = pass_losses(model, group)
        sums = torch.zeros(len(group), dtype=torch.float64)
        sums.index_add_(0, row_of_target.cpu(), losses.cpu().double())
        for index, row, total in zip(indices, group, sums.tolist(), strict=True):
            scores[index] = (total, count_trained_tokens([row]))
    return scores


def mean_loss(scores):
    """Token-weighted mean of score_rows' result, in nats a token; exp of it is the perplexity."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def perplexity(loss):
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
