"""The runner: it computes optimizer steps as a StepPlan has it, and lowers the plan where it has to.

Everything here changes the speed and the memory of a step and nothing else. What a model, a machine or a run is not fit
for is left out, and the plain way through transformers and peft remains.
"""

import gc
import math
import time
import weakref
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType

import torch
import torch._functorch.config as functorch_config
from torch.utils.checkpoint import checkpoint

from engine_blocks import KeepLittle, fuse_blocks
from engine_lora import FastLora, try_lora
from engine_passes import (
    GRAPH_TOKENS,
    PLAIN,
    LinearCrossEntropy,
    Patches,
    attention_arguments,
    autocast,
    block_mask_tokens,
    build_pass,
    chosen_attention,
    count_tokens,
    count_trained_tokens,
    cut_into_passes,
    decoder_layers,
    lengths_in_use,
    longest_pass,
    mixes_rows,
    own_dropout,
    pass_losses,
    planned_length,
    probe_backward,
    probe_losses,
    probe_rows,
    recorded_tokens,
    same_losses,
    score_rows,
    stores_scores,
    to_device,
    transformers_model,
)
from message_utils import UserError, printable, say

# ---- Decoder layers --------------------------------------------------------------------------------------------------
# A compiled layer's backward pass computes again what takes no matrix product, the normalized inputs and the product of
# gate and up: 44 of the 136 KB that a layer of Mistral-7B keeps of each token, for one or two percent of its time.
RECOMPUTE_CHEAP = partial(functorch_config.patch, ban_recompute_materialized_backward=False)


def layer_forward(layer, runner, last):
    """A forward for a decoder layer that checkpoints and compiles it while it trains, as the runner's plan has it.

    What the last layer keeps is needed next, and is not computed again: memory is needed for one layer's in any case.
    """
    plain = MethodType(type(layer).forward, layer)
    compiled = MethodType(torch.compile(type(layer).forward, dynamic=True), layer) if runner.plan.compiled else plain

    def forward(*args, **kwargs):
        if not layer.training or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        inner = compiled if runner.plan.compiled else plain
        with RECOMPUTE_CHEAP():
            if last or not runner.plan.checkpointing:
                with KeepLittle() if runner.plan.blocks else nullcontext():
                    return inner(*args, **kwargs)
            how = {"use_reentrant": False, "preserve_rng_state": not runner.seeded_dropout}
            if not (runner.plan.offloaded and args):
                return checkpoint(inner, *args, **how, **kwargs)
            hidden = OffloadedInput(args[0])
            # checkpoint() looks for the device, and its random state, among the tensors that it is given
            out = checkpoint(hidden.call, inner, args[0].new_empty(0), *args[1:], **how, **kwargs)
            hidden.offload()
            return out

    return forward


class OffloadedInput:
    """The input of a checkpointed layer, (1, tokens, width), which waits on the host until it is computed again.

    It is copied on the stream that computes, so that the memory is used anew only behind the copy.
    """

    def __init__(self, hidden):
        self.hidden, self.device, self.trained, self.away = hidden, hidden.device, hidden.requires_grad, False

    def call(self, layer, _, *args, **kwargs):
        hidden = self.hidden
        if self.away:
            hidden = hidden.to(self.device, non_blocking=True).detach().requires_grad_(self.trained)
        return layer(hidden, *args, **kwargs)

    def offload(self):
        self.away = True
        host = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, pin_memory=self.device.type == "cuda")
        self.hidden = host.copy_(self.hidden.detach(), non_blocking=True)


# ---- Recorded passes -------------------------------------------------------------------------------------------------
SCORED_ROW_TOKENS = 16  # passes of rows that are shorter on average are scored without a recording


class PassGraph:
    """Forward and backward of the decoder for passes of one length, recorded as CUDA graphs and replayed.

    A recorded pass costs the host a few launches instead of thousands. Shapes are fixed: a shorter pass is filled up
    with more rows, from which nothing is learned. The output layer and the loss stay outside. `most_rows` is how many
    rows a pass may have, and `trained` whether there is a backward pass.
    """

    def __init__(self, runner, tokens, most_rows, trained):
        base, recordings, parameters = runner.base, runner.recordings, runner.parameters
        self.tokens, device = tokens, base.device
        self.longest = longest = max(runner.plan.longest_row, GRAPH_TOKENS)
        self.rows = rows = most_rows + math.ceil(tokens / longest)
        self.ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self.positions = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self.starts = torch.full((rows + 1,), tokens, dtype=torch.int32, device=device)
        self.starts[0] = 0
        arguments = attention_arguments(runner.plan.kernels, {"row_starts": self.starts, "longest": longest})
        decoder = base.get_decoder()

        def forward():
            return decoder(
                input_ids=self.ids, position_ids=self.positions, use_cache=False, **arguments
            ).last_hidden_state

        pool, stream = recordings.pool, recordings.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):  # compiles and loads what this length needs
            hidden = forward()
            if trained:
                with torch.autograd.set_multithreading_enabled(False):  # another thread would not allocate in the pool
                    torch.autograd.grad(hidden, parameters, torch.zeros_like(hidden))
        self.hidden, self.grad_hidden = recordings.buffers(hidden.detach())
        del hidden
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph() if trained else None
        how = {"pool": pool.id, "stream": stream, "capture_error_mode": "thread_local"}  # NCCL has a thread of its own
        with torch.cuda.graph(self.forward, **how):
            hidden = forward()
            self.hidden.copy_(hidden.detach())
        if trained:
            with torch.cuda.graph(self.backward, **how):
                torch._foreach_add_(runner.gradients, list(torch.autograd.grad(hidden, parameters, self.grad_hidden)))

    def fill(self, batch):
        """Copy one pass's host tensors to the graph's inputs; what is left over becomes more rows."""
        count = batch["input_ids"].shape[1]
        starts = fill_up(batch["row_starts"], self.tokens, self.longest, self.rows)
        self.starts.copy_(starts.pin_memory(), non_blocking=True)
        self.ids[:, :count].copy_(batch["input_ids"].pin_memory(), non_blocking=True)
        self.positions[:, :count].copy_(batch["position_ids"].pin_memory(), non_blocking=True)
        self.positions[:, count:].zero_()  # rope_type "longrope" looks for the longest position of a pass

    def reset(self):
        for graph in (self.forward, self.backward):
            if graph is not None:
                graph.reset()


def fill_up(row_starts, tokens, longest, rows):
    """Where so many rows start, and where the last ends, (rows + 1,) int32, in a pass that is filled up to `tokens`.

    row_starts: of the rows that are there. What fills it up are rows of at most `longest` tokens, since attention reads
    no further; the others are empty.
    """
    starts = torch.full((rows + 1,), tokens, dtype=torch.int32)
    more = torch.arange(int(row_starts[-1]), tokens, longest)
    starts[: len(row_starts) - 1 + len(more)] = torch.cat([row_starts[:-1], more])
    return starts


class Recordings:
    """Passes recorded for a model, and what they share, since no two are in use at a time.

    `graphs` are the trained ones by their tokens, `scores` those that are only scored.
    """

    def __init__(self, device):
        self.graphs, self.scores = {}, {}
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
        for graph in [*self.graphs.values(), *self.scores.values()]:
            graph.reset()
        self.graphs, self.scores = {}, {}
        self.pool = self.stream = self.hidden = self.grad_hidden = None


def first_line(error):
    """The first line of an exception of another library, as it may be shown."""
    return printable(f"{type(error).__name__}: {error}".split("\n")[0])


def alike(found, expected):
    """Whether a gradient is another one but for rounding; one that is not a number is not."""
    return bool(torch.linalg.vector_norm(found - expected) <= 0.3 * torch.linalg.vector_norm(expected))


# ---- The step --------------------------------------------------------------------------------------------------------
# the tokens of the longest pass, the seconds that it takes, those that recording one more length takes, and those that
# the host takes to launch a pass which is not recorded
Rehearsal = namedtuple("Rehearsal", "tokens seconds recording_seconds launch_seconds")


class StepRunner:
    """Computes optimizer steps on a model as a StepPlan has it; the gradients add up in the parameters' .grad.

    It alone carries the plan out, and lowers it (`plan` is always what is in force) where a kernel does not serve the
    model, a pass cannot be compiled or recorded, or the memory runs out. None of this changes a result beyond rounding.
    What it sets on the model, and on the Accelerator that it is given, is taken back by close().
    """

    def __init__(self, model, plan, accelerator=None):
        self.model, self.base, self.plan, self.accelerator = model, transformers_model(model), plan, accelerator
        self.processes = accelerator.num_processes if accelerator else 1
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = self.gradients = self.recordings = self.lora = None
        self.recording_seconds = 0.0  # of the newest recorded pass
        self.patches = Patches()
        try:
            self._try_kernels()
            self._change_model()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Take back all that was set on the model, and give back what recorded passes hold."""
        self.release()
        self.patches.close()
        self.lora = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def lower(self, **changes):
        self.plan = self.plan._replace(**changes)

    # ---- The plan against the model ----
    def _try_kernels(self):
        """Keep of the planned kernels those that compute what the model computes by itself; say what is used."""
        planned, kernels = self.plan.kernels, PLAIN
        if planned.lora and try_lora(self.base.device, self.model.dtype):
            kernels = kernels._replace(lora=True)
        for name in ("attention", "loss"):
            more = kernels._replace(**{name: True})
            if getattr(planned, name) and self._serves(more):
                kernels = more
        self.lower(kernels=kernels)
        if planned.attention and not kernels.attention:
            self.lower(max_pass_tokens=min(self.plan.max_pass_tokens, block_mask_tokens(self.base)))
        if self.base.device.type == "cuda":
            masked = f"{'eager' if stores_scores(self.base) else 'SDPA'} with a block mask"
            attention = "varlen flash attention" if kernels.attention else masked
            say(f"Attention: {attention}; loss: {'fused with' if kernels.loss else 'after'} the output layer")
        if self.plan.max_pass_tokens and mixes_rows(self.model, kernels, self.plan.longest_row):
            say("This model mixes rows that are laid end to end, so each row is computed by itself, which is slower")
            self.lower(max_pass_tokens=0)

    def _serves(self, kernels):
        """Whether kernels give the model's own losses and finite gradients, tried on two short rows."""
        rows = probe_rows(self.model)
        expected = probe_losses(self.model, rows[1:])
        try:
            same = same_losses(self.model, probe_losses(self.model, rows, kernels), expected)
            return same and probe_backward(self.model, rows, kernels)
        except Exception:  # noqa: BLE001  whatever a kernel does not serve: head sizes, soft caps, attention sinks
            return False

    def _change_model(self):
        """Set on the model what the plan asks for."""
        kernels, layers = self.plan.kernels, decoder_layers(self.base)
        if kernels.lora:
            compute_once = partial(probe_losses, self.model, probe_rows(self.model), kernels)
            self.lora = FastLora(self.model, compute_once, self.patches)
        # whether seeds that are drawn before a pass decide all of its dropout, and not PyTorch's random state
        self.seeded_dropout = bool(self.lora and self.lora.covers_all) and not own_dropout(self.base)
        recorded = self.plan.recorded and self.seeded_dropout and all(kernels)
        as_planned = recorded == self.plan.recorded and kernels.attention and kernels.loss
        self.lower(
            dequantized=self.plan.dequantized and self.lora is not None,
            recorded=recorded,
            scores_recorded=self.plan.scores_recorded and as_planned,
        )
        self.lower(blocks=self.plan.blocks and kernels.lora and not self.plan.compiled)
        if self.plan.blocks:
            training = self.model.training
            self.model.eval()
            fuse_blocks(self.base, self.patches, trained=True)
            self.model.train(training)
        if self.plan.checkpointing or self.plan.compiled or self.plan.blocks:
            for layer in layers:
                self.patches.set(layer, "forward", layer_forward(layer, self, last=layer is layers[-1]))
        if self.plan.checkpointing and not layers:  # transformers' own way is left
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
            self.patches.callback(self.base.gradient_checkpointing_disable)
        if self.plan.compiled:
            # the first layer's input then needs a gradient, as the others' do, and all layers share their code
            embeddings = self.base.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
            self.patches.callback(hook.remove)
        if self.accelerator:
            # Module.zero_grad walks through all modules
            self.patches.set(self.model, "zero_grad", lambda **_: self.release_gradients())
            # evaluation_mode: no DDP, which would average in each pass, and whose hooks on a stream break recording
            prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.patches.set(self.accelerator, "prepare_model", prepare)

    # ---- Steps ----
    def step(self, rows):
        """Forward and backward over the rows of a step; returns their mean loss a trained token, in nats.

        The trained tokens are those of all processes. Each process returns its share of the loss times the number of
        processes, so that the mean over the processes is the step's loss; the gradients are averaged likewise.
        """
        if not (self.model.training and self.base.training):  # a loaded base comes in eval mode
            self.model.train()
        trained, passes = count_trained_tokens(rows), 0
        if self.plan.shards > 1:
            passes = len(cut_into_passes(rows, self.plan.max_pass_tokens))
            counts = self.accelerator.gather(torch.tensor([[trained, passes]], device=self.base.device))
            trained, passes = counts[:, 0].sum(), int(counts[:, 1].max())
        elif self.processes > 1:
            trained = self.accelerator.reduce(torch.tensor(trained, device=self.base.device), "sum")
        loss = self.forward_backward(rows, self.processes / trained, passes)
        if self.processes > 1:
            self.flat.copy_(self.accelerator.reduce(self.flat, "mean"))
        return loss

    def forward_backward(self, rows, scale, passes=0):
        """All passes of a step; returns scale times the sum of the losses, and adds up its gradients.

        Out of memory first gives up dequantized weights, then halves the ceiling of the passes. Each try begins with
        the same random numbers of the CPU. No process waits for another in here; step() averages the gradients. Where
        the weights are sharded, each process gathers those of a layer from the others: then there are `passes` passes,
        as many as in the process that has most, and running out of memory ends the run.
        """
        random_state = torch.get_rng_state()
        while True:
            torch.set_rng_state(random_state)
            try:
                return self._run_passes(rows, scale, passes)
            except torch.OutOfMemoryError as error:
                if self.plan.shards > 1:
                    raise self._too_large(rows) from error
                largest = None if self.plan.dequantized else self._largest_pass(rows, error)
            except Exception as error:
                if not self._simplify(error):
                    raise
                continue
            # recover outside `except`: there the exception's traceback keeps the failed pass's tensors alive
            if largest is None:
                self._give_up_dequantized()
            else:
                self._halve_passes(largest)

    def _run_passes(self, rows, scale, passes=0):
        self.begin()
        loss = torch.zeros((), device=self.base.device)
        groups = cut_into_passes(rows, self.plan.max_pass_tokens, lengths_in_use(self.plan))
        for indices in groups:
            loss += self.run_pass([rows[index] for index in indices], scale)
        for _ in range(passes - len(groups)):
            self.run_pass(probe_rows(self.model)[:1], 0.0)
        return loss

    def begin(self):
        """Begin a step: without gradients, and with the adapter as the optimizer left it."""
        if self.lora:
            self.lora.forget()
            self.lora.refresh()
        if self.plan.dequantized:  # dequantized in the first step, where memory that runs out is dealt with
            self.lora.set_dequantized(True)
        self.release_gradients()
        if self.plan.recorded or self.processes > 1:  # recorded passes add to one tensor, processes average one tensor
            self._join_gradients()

    def _join_gradients(self):
        """Make all gradients parts of one tensor, which is zero."""
        if self.flat is None:
            sizes = [parameter.numel() for parameter in self.parameters]
            self.flat = torch.empty(sum(sizes), device=self.base.device)
            parts = zip(self.flat.split(sizes), self.parameters, strict=True)
            self.gradients = [part.view_as(parameter) for part, parameter in parts]
        self.flat.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def run_pass(self, rows, scale):
        """One pass: returns scale times the sum of its losses, detached, and adds the gradients of that."""
        if self.lora:
            self.lora.draw_dropout()
        with chosen_attention(self.base, self.plan.kernels):  # also for layers that the backward pass computes again
            if self.plan.recorded:
                return self._replay(rows, scale)
            losses, _ = pass_losses(self.model, rows, self.plan.kernels)
            loss = losses.sum() * scale
            self._backward(loss)
            return loss.detach()

    def _backward(self, loss):
        """Accelerate scales the loss of float16."""
        if self.accelerator:
            self.accelerator.backward(loss)
        else:
            loss.backward()

    def _replay(self, rows, scale):
        batch = build_pass(rows)
        graph = self._graph(batch["input_ids"].shape[1])
        hidden, losses = self._replayed_losses(graph, batch)
        loss = losses.sum() * scale
        self._backward(loss)
        graph.grad_hidden.copy_(hidden.grad)
        graph.backward.replay()
        return loss.detach()

    def _replayed_losses(self, graph, batch):
        """The hidden states of a pass by a recorded one, (1, tokens, width), as a leaf, and its losses, (targets,)."""
        graph.fill(batch)
        graph.forward.replay()
        batch = to_device({name: batch[name] for name in ("predicting", "targets")}, self.base.device)
        hidden = graph.hidden.detach().requires_grad_()
        weight = self.base.get_output_embeddings().weight
        losses = LinearCrossEntropy.apply(hidden[0].index_select(0, batch["predicting"]), weight, batch["targets"])
        return hidden, losses

    def _graph(self, count):
        """The recorded pass that serves so many tokens; it is recorded when the first pass of its length comes."""
        tokens, graphs = planned_length(self.plan, count), self._have_recordings().graphs
        if tokens not in graphs:
            graphs[tokens] = self._record(tokens, self.plan.rows_a_step)
        return graphs[tokens]

    def _have_recordings(self):
        if self.recordings is None:
            self.recordings = Recordings(self.base.device)
            weakref.finalize(self, self.recordings.release)  # garbage collection keeps to no order
        return self.recordings

    def _record(self, tokens, most_rows, trained=True):
        usual, started = torch.cuda.current_stream(), time.perf_counter()
        try:
            graph = PassGraph(self, tokens, most_rows, trained)
            self.recording_seconds = time.perf_counter() - started
            return graph
        except RuntimeError as error:  # a recording that breaks off leaves its stream in place and hides the reason
            torch.cuda.set_stream(usual)
            reason = error.__context__
            raise reason if isinstance(reason, torch.OutOfMemoryError) else error from None

    # ---- Falling back ----
    def _simplify(self, error):
        """Do without what may have failed: recorded passes, then compiled layers; False where there is neither."""
        what = "recorded" if self.plan.recorded else "compiled" if self.plan.compiled else None
        if what is None:
            return False
        say(
            f"This model's passes cannot be {what} ({first_line(error)}), which is slower and computes the same",
            each_process=True,
        )
        self.lower(recorded=False, scores_recorded=False, compiled=self.plan.compiled and what != "compiled")
        self.release()
        return True

    def _give_up_dequantized(self):
        say(
            "Out of memory; from here on frozen weights are dequantized in each pass: slower, the same result",
            each_process=True,
        )
        self.lower(dequantized=False)
        self.lora.set_dequantized(False)
        self.release()  # what is recorded from here on dequantizes in each pass too

    def _halve_passes(self, largest):
        self.release()
        say(
            f"Out of memory with a pass of {largest:,} tokens; from here on at most {largest // 2:,}, which takes"
            " more passes and gives the same result",
            each_process=True,
        )
        self.lower(max_pass_tokens=largest // 2)

    def _too_large(self, rows):
        tokens = count_tokens(longest_pass(rows, self.plan.max_pass_tokens))
        return UserError(
            f"out of memory with a pass of {tokens:,} tokens, and a process cannot make its passes smaller alone where"
            " the weights are shared out; halve --batch_size and double --gradient_accumulation_steps, or switch on"
            " --gradient_checkpointing",
            each_process=True,
        )

    def _largest_pass(self, rows, error):
        """The tokens of a step's largest pass, which did not fit; a UserError where passes cannot be made smaller."""
        group = longest_pass(rows, self.plan.max_pass_tokens, lengths_in_use(self.plan))
        largest = count_tokens(group)
        if len(group) == 1:
            raise UserError(
                f"out of memory with a single row of {largest:,} tokens; lower --max_seq_length, or switch on"
                " --gradient_checkpointing or --use_4bit_quantization",
                each_process=True,
            ) from error
        return largest

    def release_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None

    def release(self):
        """Give back what recorded passes and gradients hold."""
        if self.lora:
            self.lora.forget()
        gc.collect()  # a recording that broke off lives on in the frames of its exception
        if self.recordings is not None:
            self.recordings.release()
            self.recordings = None
        self.release_gradients()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- Before the first step ----
    def rehearse(self, longest, usual):
        """Compute the longest pass that these rows ask for, and leave no trace; returns what it takes, a Rehearsal.

        longest: the longest rows, as many as a step has. usual: two rows of usual length, by whose gradients compiled
        layers and recorded passes are compared with plain ones.
        """
        cuda, expected, launch_seconds = self.base.device.type == "cuda", None, 0.0
        if cuda:
            torch.cuda.empty_cache()  # what loading left
        with torch.random.fork_rng([self.base.device] if cuda else []):
            if self.plan.compiled or self.plan.recorded:
                with self._plainly():
                    expected = self._gradient(usual)
                    launch_seconds = self._time_launching(usual)
                self.release()  # plain passes have memory of their own, which recorded ones cannot use
            tokens, seconds = self._rehearse_longest(longest)
            if (self.plan.compiled or self.plan.recorded) and not alike(self._gradient(usual), expected):
                what = "Compiled layers" if self.plan.compiled else "Recorded passes"
                say(f"{what} have other gradients than plain ones; none is used, which is slower", each_process=True)
                self.lower(compiled=False)
                self.record_nothing()
                tokens, seconds = self._rehearse_longest(longest)
        self.release_gradients()
        # recorded last was the length of the usual rows, for which nothing had to be compiled or loaded any more
        return Rehearsal(tokens, seconds, self.recording_seconds, launch_seconds)

    @contextmanager
    def _plainly(self):
        """Neither compiled layers nor recorded passes inside."""
        used = self.plan
        self.lower(compiled=False, recorded=False)
        yield
        self.lower(compiled=used.compiled, recorded=used.recorded)

    def _gradient(self, rows):
        """The gradient of rows with the same dropout each time, (trained parameters,), on the host, which has room."""
        torch.manual_seed(0)
        self.forward_backward(rows, 1e-4)  # a small factor, since that of float16's loss scaling comes on top
        return torch.cat([parameter.grad.cpu().flatten() for parameter in self.parameters])

    def _time_launching(self, rows):
        """The seconds of a plain pass over few rows, which have been computed so before; mostly the host's."""
        started = time.perf_counter()
        self.forward_backward(rows, 1e-4).item()
        return (time.perf_counter() - started) / len(cut_into_passes(rows, self.plan.max_pass_tokens))

    def record_nothing(self):
        """From here on launch the kernels of each pass one by one."""
        self.lower(recorded=False, scores_recorded=False)
        self.release()

    def _rehearse_longest(self, rows):
        """The tokens of the longest pass, and the seconds that it takes once nothing is left to be made ready."""
        again = self.plan.compiled or self.base.device.type != "cpu"  # the first try compiles, records, loads kernels
        while True:
            before, started = self.plan, time.perf_counter()
            group = longest_pass(rows, self.plan.max_pass_tokens)
            self.forward_backward(group, 1e-3).item()
            seconds, lowered = time.perf_counter() - started, before != self.plan
            if not (again or lowered):
                return count_tokens(group), seconds
            again = lowered

    def time_passes(self, rows, enough):
        """(tokens, seconds) of passes over these rows, at least one, and more until `enough` seconds went by; no trace.

        The longest pass was rehearsed before, so that kernels are loaded.
        """
        cuda, tokens, seconds = self.base.device.type == "cuda", 0, 0.0
        passes = cut_into_passes(rows, self.plan.max_pass_tokens)
        with torch.random.fork_rng([self.base.device] if cuda else []):
            for indices in passes:
                group, started = [rows[index] for index in indices], time.perf_counter()
                self.forward_backward(group, 1e-3).item()
                tokens, seconds = tokens + count_tokens(group), seconds + time.perf_counter() - started
                if seconds >= enough or self.plan.shards > 1:  # all processes must compute equally many
                    break
        self.release_gradients()
        return tokens, seconds

    # ---- Scores and clipping ----
    def score(self, rows, before_pass=lambda: None, max_pass_tokens=None, what="Evaluating", passes=0):
        """score_rows by the plan's kernels, in passes of its size unless another is given.

        passes: those of the process that has most; before_pass is called so often, and sharded weights are gathered so
        often.
        """
        size = self.plan.max_pass_tokens if max_pass_tokens is None else max_pass_tokens
        compute = partial(self._score_pass, size) if self.plan.scores_recorded and size else pass_losses
        scores = score_rows(self.model, rows, size, self.plan.kernels, before_pass, what, compute)
        for _ in range(passes - len(cut_into_passes(rows, size))):
            before_pass()
            if self.plan.shards > 1:
                score_rows(self.model, probe_rows(self.model)[:1], 0, self.plan.kernels)
        return scores

    def _score_pass(self, size, model, rows, kernels):
        """pass_losses, by the recorded pass of `size` tokens for a pass that takes at least half of them."""
        tokens, count, most_rows = recorded_tokens(size), count_tokens(rows), size // SCORED_ROW_TOKENS
        if not (self.plan.scores_recorded and count <= tokens <= 2 * count and len(rows) <= most_rows):
            return pass_losses(model, rows, kernels)
        scores, failure = self._have_recordings().scores, None
        if tokens not in scores:
            try:
                # copies of the adapter that autocast kept from before would stay as they are now
                with chosen_attention(self.base, kernels), autocast(model, cached=False):
                    scores[tokens] = self._record(tokens, most_rows, trained=False)
            except Exception as error:  # noqa: BLE001  whatever cannot be recorded
                failure = first_line(error)
        if failure:  # outside `except`, where the failed recording's tensors are gone
            say(f"This model's scores cannot be recorded ({failure}), which is slower and gives the same")
            self.lower(scores_recorded=False)
            self.release()
            return pass_losses(model, rows, kernels)
        batch = build_pass(rows)
        _, losses = self._replayed_losses(scores[tokens], batch)
        return losses, batch["row_of_target"]

    def clip(self, max_norm):
        """Scale the gradients so that they are no longer than max_norm together; returns their norm before that."""
        if self.flat is None or self.parameters[0].grad is not self.gradients[0]:
            return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


# ---- Whether steps were finite ---------------------------------------------------------------------------------------
StepFlags = namedtuple("StepFlags", "step rows loss faults stopping")  # the last two: in how many processes


class StepCheck:
    """Whether steps were finite, which the host learns one step later: it prepares a step while the GPU computes one.

    An optimizer with a fused kernel leaves out a step that was flagged. Whatever logs, evaluates or saves reads first.
    """

    def __init__(self, runner):
        self.runner = runner
        self.pending = None  # the newest step's StepFlags, its flags on their way to the host, and what to wait for

    def note(self, step, rows, loss, finite, stopping, optimizer):
        """Flag a step that is not finite, and whether this process is to stop; returns the StepFlags of the one before.

        finite: a tensor that holds a truth value. optimizer: the one that is to leave out this step, or None.
        """
        # one message for both flags; all processes must decide alike
        flags = torch.stack([~finite, torch.full_like(finite, stopping)]).int()
        if self.runner.processes > 1:
            flags = self.runner.accelerator.reduce(flags, "sum")
        before = self.read()
        self.pending = (StepFlags(step, rows, loss, 0, 0), *start_copy_to_host(flags))
        if optimizer is not None:
            self.runner.patches.set(optimizer, "found_inf", flags[0].clamp(max=1).float())
        return before

    def read(self):
        """The StepFlags of the newest step that was not read yet, or None."""
        if self.pending is None:
            return None
        (found, flags, wait), self.pending = self.pending, None
        wait()
        faults, stopping = flags.tolist()
        return found._replace(faults=faults, stopping=stopping)


def start_copy_to_host(tensor):
    """A copy on its way to the host, and what to call before it is read."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), lambda: None
    copy, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return copy, event.synchronize
