"""How an optimizer step's passes are computed: LoRA kernels, gradient checkpointing, compilation and graph replay.

Everything here changes the speed and the memory of a pass and nothing else. What a model, a machine or a run is not fit
for is left out, and the plain way through transformers and peft remains.
"""

import contextlib
import gc
import math
import weakref
from collections import namedtuple
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

from engine_lora import FastLora, is_plain, lora_works
from engine_passes import (
    LinearCrossEntropy,
    PassKernels,
    build_pass,
    chosen_attention,
    decoder_layers,
    kernels_of,
    own_dropout,
    pass_losses,
    probe_backward,
    probe_losses,
    probe_rows,
    row_arguments,
    same_losses,
    to_device,
    transformers_model,
)
from message_utils import UserError, printable, say

GRAPH_TOKENS = 128  # recorded passes have a multiple of this many tokens


# ---- Choosing --------------------------------------------------------------------------------------------------------


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


def can_compile(model):
    """Whether a model on a CUDA GPU has what compilation and graph replay are made for: plain LoRA layers above all."""
    plain = all(is_plain(layer) for layer in model.modules() if isinstance(layer, LoraLayer))
    return kernels_of(transformers_model(model)).fused_lora and plain and bool(decoder_layers(model))


# ---- Decoder layers --------------------------------------------------------------------------------------------------


def wrap_layer(layer, runner):
    """Checkpoint and compile a decoder layer while it trains, as the runner has it."""
    plain = MethodType(type(layer).forward, layer)
    compiled = MethodType(torch.compile(type(layer).forward, dynamic=True), layer) if runner.compiled else plain

    def forward(*args, **kwargs):
        if not layer.training or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        inner = compiled if runner.compiled else plain
        if runner.checkpointing:
            keep = not runner.seeded_dropout
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=keep, **kwargs)
        return inner(*args, **kwargs)

    layer.forward = forward


@contextlib.contextmanager
def compiling():
    """Turn a compiler that fails, or that is not there, into one line."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        found = str(error).strip().split("\n")[0]
        raise UserError(f"the layers cannot be compiled: {found}; mend that, or add --torch_compile false") from error


# ---- Recorded passes -------------------------------------------------------------------------------------------------


def recorded_tokens(count):
    """The tokens of the recorded pass that serves a pass of so many."""
    return math.ceil(count / GRAPH_TOKENS) * GRAPH_TOKENS


class PassGraph:
    """Forward and backward of the decoder for passes of one length, recorded as CUDA graphs and replayed.

    A recorded pass costs the host a few launches instead of thousands. Shapes are fixed: a shorter pass is filled up
    with one more row, from which nothing is learned. The output layer and the loss stay outside.
    """

    def __init__(self, base, parameters, gradients, tokens, rows, longest, recordings):
        self.tokens, self.rows, device = tokens, rows, base.device
        self.ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self.positions = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self.starts = torch.full((rows + 1,), tokens, dtype=torch.int32, device=device)
        self.starts[0] = 0
        arguments = row_arguments(base, {"row_starts": self.starts, "longest": longest})
        decoder = base.get_decoder()

        def forward():
            return decoder(
                input_ids=self.ids, position_ids=self.positions, use_cache=False, **arguments
            ).last_hidden_state

        pool, stream = recordings.pool, recordings.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):  # compiles and loads what this length needs
            hidden = forward()
            with torch.autograd.set_multithreading_enabled(False):  # another thread would not allocate in the pool
                torch.autograd.grad(hidden, parameters, torch.zeros_like(hidden))
        self.hidden, self.grad_hidden = recordings.buffers(hidden.detach())
        del hidden
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {"pool": pool.id, "stream": stream, "capture_error_mode": "thread_local"}  # NCCL has a thread of its own
        with torch.cuda.graph(self.forward, **how):
            hidden = forward()
            self.hidden.copy_(hidden.detach())
        with torch.cuda.graph(self.backward, **how):
            torch._foreach_add_(gradients, list(torch.autograd.grad(hidden, parameters, self.grad_hidden)))

    def fill(self, batch):
        """Copy one pass's host tensors to the graph's inputs; what is left over becomes one more row."""
        count = batch["input_ids"].shape[1]
        starts = torch.full((self.rows + 1,), self.tokens, dtype=torch.int32)
        starts[: len(batch["row_starts"])] = batch["row_starts"]
        self.starts.copy_(starts.pin_memory(), non_blocking=True)
        self.ids[:, :count].copy_(batch["input_ids"].pin_memory(), non_blocking=True)
        self.positions[:, :count].copy_(batch["position_ids"].pin_memory(), non_blocking=True)


class Recordings:
    """Passes recorded for a model, by their tokens, and what they share, since no two are in use at a time."""

    def __init__(self, device):
        self.graphs = {}
        gc.collect()  # an earlier model's pool must not go while this one's is in use
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream(device)
        self.hidden = self.grad_hidden = None

    def buffers(self, hidden):
        """Buffers in the shape of hidden, (1, tokens, width), for a pass's hidden states and their gradient."""
        tokens = hidden.shape[1]
        if self.hidden is None or self.hidden.shape[1] < tokens:
            self.hidden, self.grad_hidden = torch.zeros_like(hidden), torch.zeros_like(hidden)
        return self.hidden[:, :tokens], self.grad_hidden[:, :tokens]

    def release(self):
        """Give the memory back. PyTorch ends the process if the memory goes before the last graph that uses it."""
        for graph in self.graphs.values():
            graph.forward.reset()
            graph.backward.reset()
        self.graphs = {}
        self.pool = self.stream = self.hidden = self.grad_hidden = None


# ---- The step --------------------------------------------------------------------------------------------------------


class StepRunner:
    """Computes the passes of a step: forward, loss and backward, the gradients adding up in the parameters' .grad."""

    def __init__(
        self, model, checkpointing=False, dequantized=False, compiled=False, graphs=False, rows_a_pass=1, longest=1
    ):
        self.base = transformers_model(model)
        kernels = kernels_of(self.base)
        self.lora = FastLora(model) if kernels.fused_lora else None
        self.checkpointing, self.compiled = checkpointing, compiled
        self.dequantized = dequantized and self.lora is not None
        # else PyTorch's random state decides, which a checkpointed layer must then find again
        self.seeded_dropout = bool(self.lora and self.lora.covers_all) and not own_dropout(self.base)
        layers = decoder_layers(self.base) if checkpointing or compiled else []
        for layer in layers:
            wrap_layer(layer, self)
        if checkpointing and not layers:  # then transformers' own way
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:  # then the first layer's code is that of the others
            self.base.enable_input_require_grads()
        graphs = graphs and self.seeded_dropout and kernels.varlen and kernels.fused_loss
        self.recording, self.recordings = graphs, None
        self.rows_a_pass, self.longest = rows_a_pass, max(longest, GRAPH_TOKENS)  # what fills a pass up is a row too
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averaging = False  # whether several processes average their gradients
        self.flat = self.gradients = None

    def begin(self):
        """Start a step: no gradients yet, and the adapter as the optimizer left it."""
        if self.lora:
            self.lora.forget()
            self.lora.refresh()
        if self.dequantized:  # at the first step, where memory that runs out is dealt with
            self.lora.set_dequantized(True)
        self.release_gradients()
        if self.joined:
            self._join_gradients()

    @property
    def joined(self):
        """Whether all gradients are parts of one tensor: recorded passes add to it, several processes average it."""
        return self.recording or self.averaging

    def _join_gradients(self):
        if self.flat is None:
            sizes = [parameter.numel() for parameter in self.parameters]
            self.flat = torch.empty(sum(sizes), device=self.base.device)
            parts = zip(self.flat.split(sizes), self.parameters, strict=True)
            self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self.flat.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def clip(self, max_norm):
        """Scale the gradients down to max_norm if they are longer together; returns their norm before that."""
        if not self.joined:
            return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def run(self, model, rows, scale, backward):
        """One pass: add the gradients of scale times the sum of its losses; returns that product, detached."""
        if self.lora:
            self.lora.draw_dropout()
        with chosen_attention(self.base):  # also for the layers that the backward pass computes again
            if self.recording:
                return self._replay(rows, scale, backward)
            losses, _ = pass_losses(model, rows)
            loss = losses.sum() * scale
            backward(loss)
            return loss.detach()

    def _replay(self, rows, scale, backward):
        batch = build_pass(rows)
        graph = self._graph(batch["input_ids"].shape[1])
        graph.fill(batch)
        graph.forward.replay()
        batch = to_device({name: batch[name] for name in ("predicting", "targets")}, self.base.device)
        hidden = graph.hidden.detach().requires_grad_()
        weight = self.base.get_output_embeddings().weight
        losses = LinearCrossEntropy.apply(hidden[0].index_select(0, batch["predicting"]), weight, batch["targets"])
        loss = losses.sum() * scale
        backward(loss)
        graph.grad_hidden.copy_(hidden.grad)
        graph.backward.replay()
        return loss.detach()

    def _graph(self, count):
        """The recorded pass for so many tokens, recorded where it is the first of its length."""
        tokens = recorded_tokens(count)
        if self.recordings is None:
            self.recordings = Recordings(self.base.device)
            weakref.finalize(self, self.recordings.release)  # garbage collection keeps to no order
        graphs = self.recordings.graphs
        if tokens not in graphs:
            size = (tokens, self.rows_a_pass + 1, self.longest)
            usual = torch.cuda.current_stream()
            try:
                graphs[tokens] = PassGraph(self.base, self.parameters, self.gradients, *size, self.recordings)
            except RuntimeError as error:  # a recording that breaks off leaves its stream in place and hides the reason
                torch.cuda.set_stream(usual)
                reason = error.__context__
                raise reason if isinstance(reason, torch.OutOfMemoryError) else error from None
        return graphs[tokens]

    @contextlib.contextmanager
    def plain_passes(self):
        """Neither compiled nor recorded passes meanwhile."""
        recording, compiled = self.recording, self.compiled
        self.recording = self.compiled = False
        try:
            yield
        finally:
            self.recording, self.compiled = recording, compiled

    def simplify(self, error):
        """Do without what may have failed: recorded passes, then compiled layers; False if there is neither."""
        what = "recorded" if self.recording else "compiled" if self.compiled else None
        if what is None:
            return False
        reason = printable(f"{type(error).__name__}: {error}".split("\n")[0])
        say(
            f"This model's passes cannot be {what} ({reason}), which is slower and computes the same", each_process=True
        )
        if what == "compiled":
            self.compiled = False
        self.recording = False
        self.release()
        return True

    def give_up_dequantized(self):
        """Dequantize frozen weights in each pass, as what is recorded from here on does."""
        self.dequantized = False
        self.lora.set_dequantized(False)
        self.release()

    def release_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None

    def release(self):
        """Give back what recorded passes and gradients hold, after the memory ran out."""
        if self.lora:
            self.lora.forget()
        gc.collect()  # a recording that broke off lives on in the frames of its exception
        if self.recordings is not None:
            self.recordings.release()
            self.recordings = None
        self.release_cache()

    def release_cache(self):
        self.release_gradients()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()


StepFlags = namedtuple("StepFlags", "step rows loss flags wait")  # flags: how many processes met a fault, and a signal


def start_copy_to_host(tensor):
    """A copy on its way to the host, and what to call before it is read."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    copy, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copy, event.synchronize
