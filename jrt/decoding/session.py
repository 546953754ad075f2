"""Sessions: a session is a step with buffers for a fixed number of rows, on a GPU captured as a CUDA graph.

Shapes: B rows, V vocabulary rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from jrt.cache import ModelState
from jrt.decoding.choice import Choice
from jrt.decoding.plain import PlainStep
from jrt.decoding.step import Step
from jrt.model import LanguageModel

RUN = 16  # steps between two checks for end tokens, each of which waits for the GPU
KEPT = 2  # sessions that a model keeps; each has its own buffers for states
ROUND = 1024  # capacities are rounded up to multiples of this, so that texts of similar lengths share a session
WARM_UP = 2  # steps before a capture: libraries and Triton initialise themselves in them

log = logging.getLogger(__name__)


class Session:
    """A step that is run call by call, on a CPU."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def start(self, state: ModelState) -> None:
        """Copies `state` into the step's buffers; the next token continues from there."""
        self.step.load(state)

    def read(self, tokens: Tensor) -> Tensor:
        """Reads one token for each row, (B,), and returns the logits (B, V) of the next; the next call overwrites
        them."""
        logits = self.step.advance(tokens)
        self.step.position.seen += 1
        return logits


@dataclass
class Graph:
    """A captured function; a replay overwrites `output`."""

    cuda: torch.cuda.CUDAGraph
    output: Tensor
    choice: Choice | None = None  # its tensors are inputs of the graph


class CapturedSession(Session):
    """A step as one CUDA graph, which also contains the choice of the next token if `Choice.key` allows it."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        device = step.position.column.device
        self.tokens = torch.zeros(step.rows, dtype=torch.long, device=device)  # (B,) the tokens to read next
        self.unfinished = torch.ones(step.rows, dtype=torch.bool, device=device)
        self.chosen = torch.zeros(step.rows, RUN, dtype=torch.long, device=device)  # tokens chosen since `run` began
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # how many columns of `chosen` are filled
        self.reading: Graph | None = None
        self.choosing: dict[tuple, Graph] = {}

    def prepare(self, choice: Choice | None) -> None:
        """Captures the graph that `run` needs for this choice, or that `read` needs if None, unless there is one
        already.

        Call it before `start`, because a capture overwrites the states.
        """
        key = None if choice is None else choice.key()
        if choice is None:
            if self.reading is None:
                self._rewind()
                self.reading = _capture(lambda: self.step.advance(self.tokens), self.tokens.device)
        elif key not in self.choosing:
            assert key is not None
            self._rewind()
            self.choosing.clear()
            own = replace(choice, end_tokens=_own(choice.end_tokens), pad_token=_own(choice.pad_token))
            self.choosing[key] = _capture(lambda: self._choose(own), self.tokens.device)
            self.choosing[key].choice = own
        else:
            captured = self.choosing[key].choice
            assert captured is not None
            for mine, given in ((captured.end_tokens, choice.end_tokens), (captured.pad_token, choice.pad_token)):
                if mine is not None and given is not None:
                    mine.copy_(given)

    def read(self, tokens: Tensor) -> Tensor:
        assert self.reading is not None
        self.tokens.copy_(tokens)
        self.reading.cuda.replay()
        self.step.position.seen += 1
        return self.reading.output

    def run(self, choice: Choice, tokens: Tensor, unfinished: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Reads the tokens (B,) and decodes `steps` more, at most RUN, without waiting for the GPU.

        Returns:
            The new tokens (B, steps), and which rows are unfinished after them, (B,) bool. The next call overwrites
            both.
        """
        key = choice.key()
        assert key is not None
        graph = self.choosing[key]
        self.tokens.copy_(tokens)
        self.unfinished.copy_(unfinished)
        self.count.zero_()
        for _ in range(steps):
            graph.cuda.replay()
        self.step.position.seen += steps
        return self.chosen[:, :steps], self.unfinished

    def _rewind(self) -> None:
        """Sets the position to the start of a text, so that the steps of a capture stay inside the buffers."""
        self.step.position.load(0, torch.zeros_like(self.tokens))
        self.tokens.zero_()
        self.count.zero_()

    def _choose(self, choice: Choice) -> Tensor:
        logits = self.step.advance(self.tokens)
        if choice.is_of_the_likeliest():
            tokens = self.step.likeliest(logits)
        else:
            chosen, scores = cast(torch.LongTensor, self.chosen), cast(torch.FloatTensor, logits.float())
            tokens = choice.pick(choice.processors(chosen, scores))
        tokens = choice.padded(tokens, self.unfinished)
        self.chosen.index_copy_(1, self.count, tokens[:, None])
        self.count.add_(1)
        self.tokens.copy_(tokens)
        if choice.end_tokens is not None:
            is_end = (tokens[:, None] == choice.end_tokens).any(1)  # torch.isin may wait for the GPU
            self.unfinished.logical_and_(is_end.logical_not_())
        return tokens


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _capture(function: Callable[[], Tensor], device: torch.device) -> Graph:
    """Captures the function as a CUDA graph; the state of the random generator is restored."""
    stream = torch.cuda.Stream(device)
    with torch.random.fork_rng([device]), torch.inference_mode(False), torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function()
    return Graph(graph, output)


class Sessions:
    """The sessions that one model keeps, the last used one last. A copied or pickled model starts without sessions."""

    def __init__(self) -> None:
        self.kept: list[tuple[tuple, Session]] = []

    def __reduce__(self) -> tuple:
        return Sessions, ()

    def find(self, model: LanguageModel, rows: int, columns: int) -> Session | None:
        """A kept session for this number of rows and at least `columns` columns; None if there is none.

        Sessions whose weights are no longer the model's are dropped."""
        weights = _addresses(model)
        self.kept = [entry for entry in self.kept if entry[0] == weights]
        for entry in reversed(self.kept):
            step = entry[1].step
            if step.rows == rows and columns <= step.capacity <= 4 * max(columns, ROUND):
                self.kept.remove(entry)
                self.kept.append(entry)
                return entry[1]
        return None

    def make(self, model: LanguageModel, rows: int, columns: int) -> Session:
        """A new session; on a GPU it is kept for later calls."""
        device = model.embedding.weight.device
        with torch.inference_mode(False), torch.no_grad():  # later calls outside inference mode may write these buffers
            if device.type != "cuda":
                return Session(PlainStep(model, rows, columns, whole=False))
            self.kept = self.kept[1 - KEPT :]
            session = CapturedSession(_captured_step(model, rows, -(-columns // ROUND) * ROUND))
        self.kept.append((_addresses(model), session))
        return session


def _captured_step(model: LanguageModel, rows: int, capacity: int) -> Step:
    """The fastest step for this model on its GPU."""
    reason: str | None = "no Triton, or a self-contained folder, which has no kernels"
    if __name__.startswith("jrt.") and importlib.util.find_spec("triton") is not None:
        fused = importlib.import_module("jrt.decoding.fused")  # by name: transformers asks for all that `import` names
        reason = fused.unsupported(model)
        if reason is None:
            return fused.FusedStep(model, rows, capacity)
    log.debug("decoding without Triton kernels: %s", reason)
    return PlainStep(model, rows, capacity, whole=True)


def _addresses(model: LanguageModel) -> tuple:
    """Identifies the memory of all parameters and buffers: it changes if one is replaced or moved, not if its values
    change. Of the decay it identifies the values too, because a step copies them."""
    decay = model.log_decay
    version = None if decay is None or decay.is_inference() else decay._version
    tensors = [*model.parameters(), *model.buffers()]
    places = ((id(t), t.dtype, t.data_ptr() if type(t) in (torch.nn.Parameter, Tensor) else 0) for t in tensors)
    return version, *places
