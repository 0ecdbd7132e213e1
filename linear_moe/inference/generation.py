"""Generation: prompts of any lengths in one pack, piece by piece, then one token of every sequence a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from linear_moe.inference.sampling import Sampling, sample
from linear_moe.mcore.inference import InferenceContext, Limits, forward, limits, without_sequence_parallel

PIECE = 4096  # tokens of prompts in one forward pass
WARM_UP = 3  # steps without a CUDA graph: kernels are compiled and tuned in them

Stop = Iterable[int | Sequence[int]]
Stream = Callable[[int, int], None]


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Stop = (),
    seed: int | None = None,
    stream: Stream | None = None,
) -> list[list[int]]:
    """What the model writes behind each prompt.

    Args:
        model: Megatron's with our layers, as from `linear_moe.build_model` or `load_model`; in a run of several
            processes all of a tensor-parallel group call this alike.
        prompts: token ids, of any lengths. max_new_tokens: of each sequence, fewer where the model's positions end.
        temperature, top_k, top_p, repetition_penalty: see `Sampling`; by default the likeliest token is taken.
        stop: token ids, or lists of them, behind which a sequence ends. seed: of the sampling; None: another each time.
        stream: called with (sequence, token) for each new token.

    Returns:
        The new tokens of each prompt, what it stopped at included.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a prompt longer than the model's positions,
            sampling values out of range, or pipeline parallelism; before any work.
    """
    prompts = [list(prompt) for prompt in prompts]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    if not prompts:
        return []
    check_prompts(prompts, limits(model))
    length = max(map(len, prompts)) + max_new_tokens
    session = Session(model, len(prompts), length, sampling=sampling, stop=stop, seed=seed)
    return session.reply(prompts, max_new_tokens, stream)


def check_prompts(prompts: Sequence[Sequence[int]], limits: Limits) -> None:
    """Refuses what a model cannot go on from.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a prompt longer than the model's positions.
    """
    for n, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {n} is empty: give at least one token")
        wrong = next((token for token in prompt if not 0 <= token < limits.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"prompt {n} has token id {wrong}, outside the vocabulary of {limits.vocabulary}")
        if limits.positions is not None and len(prompt) > limits.positions:
            raise ValueError(f"prompt {n} has {len(prompt)} tokens, more than the model's {limits.positions} positions")


def stop_lists(stop: Stop) -> list[list[int]]:
    """Each stop as a list of tokens.

    Raises:
        ValueError: an empty list.
    """
    found = [[tokens] if isinstance(tokens, int) else [*tokens] for tokens in stop]
    if not all(found):
        raise ValueError("stop has an empty list of tokens")
    return found


class Session:
    """N sequences of one model: their states, how they go on, and what that took.

    Args:
        model: as for `generate`. N: how many sequences. max_length: the most tokens of one.
        sampling, stop, seed: as for `generate`. cuda_graph: decode steps under one; None: where the model is on a GPU.

    Attributes:
        prefill_tokens, decode_tokens: how many the model has read in prompts and in steps so far; the first token of
            a reply is drawn behind its prompt, and the last is read with the next. prefill_seconds, decode_seconds.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        N: int,
        max_length: int,
        *,
        sampling: Sampling | None = None,
        stop: Stop = (),
        seed: int | None = None,
        cuda_graph: bool | None = None,
    ):
        self.model, self.N, self.limits = model, N, limits(model)
        self.sampling = sampling or Sampling()
        self.stops = stop_lists(stop)
        if self.sampling.temperature > 0 and seed is None and self.limits.ranks > 1:
            raise ValueError("sampling needs a seed under tensor parallelism, so that all ranks draw the same tokens")
        self.context, self.cuda_graph = InferenceContext(N, max_length), cuda_graph
        self.generator = torch.Generator(self.context.device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.reset()
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the sequences' states, by kind: see `InferenceContext.nbytes`."""
        return self.context.nbytes

    @property
    def tokens(self) -> int:
        """How many tokens the longest sequence has."""
        return max(self.context.counts) + (self.pending is not None)

    def reset(self) -> None:
        """Forgets what was said."""
        self.context.reset()
        self.step = Step(self.model, self.context, self.cuda_graph)
        self.used: Tensor | None = None
        self.pending: Tensor | None = None  # drawn last, and not yet seen by the model

    @torch.no_grad()
    def reply(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stream: Stream | None = None):
        """What follows behind all that was said and these prompts; see `generate`.

        Where sequences end at different times, those that have ended run on unheard until the last has, so that only a
        session of one sequence goes on as if nothing had happened.

        Raises:
            ValueError: as `generate`, and more tokens than max_length.
        """
        if len(prompts) != self.N:
            raise ValueError(f"{len(prompts)} prompts for {self.N} sequences")
        check_prompts(prompts, self.limits)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
        rooms = [max_new_tokens] * self.N
        said = [count + (self.pending is not None) + len(p) for count, p in zip(self.context.counts, prompts)]
        if self.limits.positions is not None:
            rooms = [min(room, 1 + self.limits.positions - n) for room, n in zip(rooms, said)]
        if min(rooms) < 1:
            raise ValueError(f"{max(said)} tokens are more than the model's {self.limits.positions} positions")
        if max(said) + max(rooms) - 1 > self.context.max_sequence_length:
            most = self.context.max_sequence_length
            raise ValueError(f"{max(said)} tokens and {max(rooms)} new ones are more than the session's {most}")
        training = self.model.training
        self.model.eval()
        try:
            with without_sequence_parallel(self.model), self._timed("prefill"):
                logits = self._read(prompts)
            with without_sequence_parallel(self.model), self._timed("decode"):
                return self._write(logits, rooms, stream)
        finally:
            self.model.train(training)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``[N, vocab]`` behind the prompts."""
        device = self.context.device
        new = [torch.tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
        if self.pending is not None:
            new = [torch.cat([last, prompt]) for last, prompt in zip(self.pending[:, None], new)]
        lengths = [len(prompt) for prompt in new]
        self.prefill_tokens += sum(lengths)
        kept, done = None, [0] * self.N
        for piece in pieces(lengths, PIECE):
            pack = torch.cat([prompt[start : start + n] for prompt, start, n in zip(new, done, piece)])
            logits = forward(self.model, self.context, pack[None], piece)
            done = [start + n for start, n in zip(done, piece)]
            kept = torch.zeros_like(logits) if kept is None else kept
            over = [i for i, n in enumerate(piece) if n and done[i] == lengths[i]]
            kept[over] = logits[over]
        if self.used is None:
            self.used = torch.zeros(kept.shape, dtype=torch.bool, device=device)
        for row, prompt in zip(self.used, new):
            row[prompt] = True
        return kept

    def _write(self, logits: Tensor, rooms: list[int], stream: Stream | None) -> list[list[int]]:
        """New tokens behind logits, as many as there is room for or until a stop."""
        if not (self.stops or stream):
            rows = [self._draw(logits)]
            while len(rows) < max(rooms):
                rows.append(self._draw(self._next(self.pending)))
            return [row[:room] for row, room in zip(torch.stack(rows, 1).tolist(), rooms)]
        written, open_ = [[] for _ in rooms], set(range(self.N))
        drawn = self._draw(logits)
        while True:
            for n, token in enumerate(drawn.tolist()):
                if n not in open_:
                    continue
                written[n].append(token)
                if stream:
                    stream(n, token)
                stopped = any(written[n][-len(stop) :] == stop for stop in self.stops)
                if stopped or len(written[n]) == rooms[n]:
                    open_.remove(n)
            if not open_:
                return written
            drawn = self._draw(self._next(drawn))

    def _next(self, tokens: Tensor) -> Tensor:
        self.decode_tokens += self.N
        return self.step(tokens)

    def _draw(self, logits: Tensor) -> Tensor:
        logits = logits[:, : self.limits.vocabulary]  # behind that is padding
        drawn = sample(logits, self.sampling, self.used[:, : logits.shape[1]], self.generator)
        self.used.scatter_(1, drawn[:, None], True)
        self.pending = drawn
        return drawn

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        seconds = f"{kind}_seconds"
        setattr(self, seconds, getattr(self, seconds) + time.perf_counter() - start)


def pieces(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Prompts of those lengths in packs of at most ``size`` tokens: of each sequence how many come next."""
    left = list(lengths)
    while any(left):
        room, piece = size, []
        for n in left:
            piece.append(min(n, room))
            room -= piece[-1]
        yield piece
        left = [n - taken for n, taken in zip(left, piece)]


class Step:
    """One token of each sequence through the model: int64 ``[N]`` -> logits ``[N, vocab]``.

    On a GPU the first steps run as they are and the next is captured as a CUDA graph, which the others replay: then
    softmax layers look back over all places of their caches.
    """

    def __init__(self, model: torch.nn.Module, context: InferenceContext, cuda_graph: bool | None = None):
        self.model, self.context = model, context
        self.wanted = context.device.type == "cuda" if cuda_graph is None else cuda_graph
        self.taken, self.graph = 0, None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.taken += 1
        if self.graph is None and self.wanted and self.taken > WARM_UP:
            self._capture(tokens)
        elif self.graph is not None:
            self.context.count()
        if self.graph is None:
            return forward(self.model, self.context, tokens[:, None])
        self.tokens.copy_(tokens[:, None])
        self.graph.replay()
        return self.logits

    def _capture(self, tokens: Tensor) -> None:
        """Captures this step, which nothing runs until it is replayed."""
        counts = self.context.counts
        self.tokens, graph = tokens[:, None].clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits = forward(self.model, self.context, self.tokens, span=self.context.max_sequence_length)
        except RuntimeError as error:
            self.wanted, self.context.counts = False, counts
            first = str(error).splitlines()[0]
            warnings.warn(f"decoding without a CUDA graph, since the model cannot be captured: {first}", stacklevel=2)
            return
        self.graph = graph
