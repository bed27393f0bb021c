"""Text from a loaded model: prompts are read at once, and what follows comes a token at a time from a cache."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int32

from spectra_jax.errors import UserError, one_of
from spectra_jax.serve import programs
from spectra_jax.serve.head import HEADS, in_bytes
from spectra_jax.serve.layers import by_layer
from spectra_jax.serve.load import Loaded
from spectra_jax.serve.sampling import Sampling
from spectra_jax.serve.text import Row
from spectra_jax.weights.prepared import prepare

SECONDS = 0.1  # that a dispatch may take, if it has more than one token
BATCH_SLOTS = 16_384  # of the caches of one batch, on one device

Prompt = str | Sequence[int]


class Completion(NamedTuple):
    """What followed a prompt; `reason` is "end" (of the document), "stop" (a string of `stop`) or "length"."""

    text: str
    tokens: list[int]
    reason: str


@dataclass
class Speed:
    """Tokens and seconds so far: of prompts with their first new token, and of the tokens after it."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        rates = ((self.prefill_tokens, self.prefill_seconds), (self.decode_tokens, self.decode_seconds))
        prefill, decode = (f"{n:,} tokens, {n / seconds:,.1f}/s" if n else "no tokens" for n, seconds in rates)
        return f"prefill {prefill}; decode {decode}"


@dataclass
class _Batch:
    """Rows that run together, and the shapes that they are padded to."""

    owners: list[int]  # their places among the prompts
    prompts: list[list[int]]
    rows: list[Row]
    seeds: list[int]
    new_tokens: int
    shape: tuple[int, int]  # rows, and slots of their prompts
    capacity: int

    @property
    def done(self) -> Bool[np.ndarray, "B"]:
        """The rows that need no more tokens; those of padding never did."""
        found = np.ones(self.shape[0], bool)
        found[: len(self.rows)] = [row.reason is not None for row in self.rows]
        return found

    def push(self, tokens: Int32[np.ndarray, "B n"]) -> None:
        """New tokens of every row."""
        for row, new in zip(self.rows, tokens.tolist()):
            for token in new:
                row.push(token)


class Generator:
    """A model that writes. On a mesh of several devices, rows are spread over the data axes and heads over "model".

    A row's text depends on its prompt and its seed, not on the other rows; but where two tokens are equally likely to
    the last digits, another size of batch or cache may choose the other one. (LLM.int8() looks at all tokens of a
    batch to tell which dims are outliers, so that there other rows do matter.)
    """

    def __init__(
        self, model: Loaded, *, weights: str = "dense", head: str = "dense", cache: str = "auto", release: bool = False
    ):
        """Makes its own arrangement of the weights (`serve/layers.py`).

        Args:
          weights: "dense" multiplies by matrices in the compute dtype, "packed" by ternary and binary ones at 2 bits,
            with the first implementation of `pallas_kernels` that serves here; or the name of one.
          head: "dense" multiplies by it in the compute dtype, "int8" in 8 bits, on CPUs.
          cache: "auto" holds keys and values in the compute dtype, "int8" in 8 bits; a recurrent state has "auto" only.
          release: takes the weights from `model`, which cannot be used afterwards: half the memory.

        Raises:
          UserError: another kind of cache or head, or weights that cannot be had; the message says why.
        """
        self.config, self.mesh, self.tokenizer = model.config, model.mesh, model.tokenizer
        self.speed = Speed()
        kinds = programs.CACHES[self.config.model.mixer].STORED
        self._cache, self._graphdef = one_of(cache, kinds, "cache"), model.graphdef
        with jax.set_mesh(self.mesh):
            parameters, self.weights = prepare(model.parameters, weights)
            self._parameters = by_layer(self.config.model, parameters, release=release)
            if one_of(head, HEADS, "head") == "int8":
                self._parameters["head"] = in_bytes(self._parameters, release=release)
        self._compiled: set[tuple] = set()

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0, **sampling: int | float,
    ) -> list[Completion]:
        """What follows each prompt, in batches of prompts of about one length.

        Args:
          prompts: texts, or token ids.
          stop: a row ends before the first of these strings.
          seed: of the random choices, one for each prompt; or that of the first prompt, whose next has the next.
          sampling: temperature, top_k, top_p, min_p, repetition_penalty; defaults as in `Sampling`.

        Raises:
          UserError: an empty prompt, one that leaves no room in the context, or a number out of its range.
        """
        how, found = Sampling(**sampling).checked(), [None] * len(prompts)
        for batch in self._batches(prompts, max_new_tokens, stop, seed):
            for _ in self._run(batch, how):
                pass
            for i, row in zip(batch.owners, batch.rows):
                found[i] = Completion(row.text, row.tokens, row.reason)
        return found

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 64, stop: Sequence[str] = (), seed: int = 0,
        **sampling: int | float,
    ) -> Iterator[str]:
        """The text that `generate` gives for this prompt and these options, in pieces as they come."""
        how, given = Sampling(**sampling).checked(), 0
        (batch,) = self._batches([prompt], max_new_tokens, stop, seed)
        for _ in self._run(batch, how):
            text = batch.rows[0].text
            if len(text) > given:
                yield text[given:]
            given = len(text)

    def warm_up(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> float:
        """Compiles what `generate` runs for such prompts, by reading them once; how many seconds it took."""
        started, how = time.perf_counter(), Sampling().checked()
        for batch in self._batches(prompts, max_new_tokens, (), 0):
            if (batch.shape, batch.capacity) not in self._compiled:
                state, _ = self._prefill(batch, how)
                self._decode(batch, state, how, 0)
                self._compiled.add((batch.shape, batch.capacity))
        return time.perf_counter() - started

    def _batches(
        self, prompts: Sequence[Prompt], new_tokens: int, stop: Sequence[str], seed: int | Sequence[int]
    ) -> list[_Batch]:
        """The longest prompts first."""
        if isinstance(prompts, str) or isinstance(stop, str):
            raise UserError("prompts and stop are lists; write [text] for one text")
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each, or one number")
        texts = iter(self.tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
        ids = [[int(t) for t in (next(texts) if isinstance(prompt, str) else prompt)] for prompt in prompts]
        for prompt in ids:
            self._check(prompt, new_tokens)
        order, batches = sorted(range(len(ids)), key=lambda i: -len(ids[i])), []
        devices = self.mesh.shape["slice"] * self.mesh.shape["data"]
        while order:
            padded = min(rounded_up(len(ids[order[0]])), self.config.data.T)
            capacity = padded + rounded_up(new_tokens)
            some = order[: devices * max(BATCH_SLOTS // capacity, 1)]
            order = order[len(some) :]
            rows = devices * (1 << (-(-len(some) // devices) - 1).bit_length())  # a power of two on each device
            batches.append(_Batch(
                some, [ids[i] for i in some], [Row(self.tokenizer, ids[i], new_tokens, stop) for i in some],
                [seeds[i] for i in some], new_tokens, (rows, padded), capacity,
            ))
        return batches

    def _check(self, prompt: list[int], new_tokens: int) -> None:
        T, V, n = self.config.data.T, self.tokenizer.vocab_size, len(prompt)
        if not prompt:
            raise UserError("the prompt is empty; give at least one character")
        if new_tokens < 1:
            raise UserError(f"{new_tokens} new tokens; ask for at least 1")
        if n + new_tokens - 1 > T:  # the last new token is never read
            raise UserError(f"{n} prompt tokens and {new_tokens} new ones exceed the context of {T}; ask for at most "
                            f"{max(T + 1 - n, 0)} or shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise UserError(f"the prompt has token ids from {min(prompt)} to {max(prompt)}; they go from 0 to {V - 1}")

    def _run(self, batch: _Batch, how: Sampling) -> Iterator[None]:
        """Fills the batch's rows, and pauses whenever there are new tokens."""
        started, steps, made = time.perf_counter(), 1, 1
        state, tokens = self._prefill(batch, how)
        self.speed.prefill_seconds += time.perf_counter() - started
        self.speed.prefill_tokens += sum(map(len, batch.prompts))
        batch.push(tokens)
        yield
        while not batch.done.all():
            steps, before = min(steps, batch.new_tokens - made), sum(len(row.tokens) for row in batch.rows)
            started = time.perf_counter()
            state, tokens = self._decode(batch, state, how, steps)
            seconds = time.perf_counter() - started
            batch.push(tokens)
            made += steps
            self.speed.decode_seconds += seconds
            self.speed.decode_tokens += sum(len(row.tokens) for row in batch.rows) - before
            steps = max(1, min(programs.CHUNK, int(SECONDS * steps / seconds)))
            yield

    def _prefill(self, batch: _Batch, how: Sampling) -> tuple[programs.State, Int32[np.ndarray, "B 1"]]:
        """Every row's first new token."""
        B, count = batch.shape[0], len(batch.prompts)
        tokens, seen = np.zeros(batch.shape, np.int32), np.zeros((B, self.config.model.V), bool)
        lengths, seeds = np.ones(B, np.int32), np.zeros(B, np.uint32)
        lengths[:count] = [len(prompt) for prompt in batch.prompts]
        seeds[:count] = [seed % 2**32 for seed in batch.seeds]
        for b, prompt in enumerate(batch.prompts):
            tokens[b, : len(prompt)] = prompt
            seen[b, prompt] = True
        with jax.set_mesh(self.mesh):
            rows = partial(NamedSharding, self.mesh)
            tokens = jax.device_put(tokens, rows(P(("slice", "data"), None)))
            lengths = jax.device_put(lengths, rows(P(("slice", "data"))))
            state = programs.prefill(
                self._graphdef, self._parameters, tokens, lengths, seen, seeds, how,
                vocabulary=self.tokenizer.vocab_size, capacity=batch.capacity, stored=self._cache,
            )
            return state, np.asarray(state.token)[:, None]

    def _decode(
        self, batch: _Batch, state: programs.State, how: Sampling, steps: int
    ) -> tuple[programs.State, Int32[np.ndarray, "B steps"]]:
        """Every row's next tokens, which do not matter where a row is done."""
        with jax.set_mesh(self.mesh):
            state, tokens = programs.decode(
                self._graphdef, self._parameters, state, batch.done, steps, how, self.tokenizer.eod,
                vocabulary=self.tokenizer.vocab_size,
            )
            return state, np.asarray(tokens)[:, :steps]


def rounded_up(n: int) -> int:
    """The first of 16, 32, 48, 64, 96, 128, 192, 256, ... that is not below `n`: few shapes to compile."""
    step = max(16, 1 << max((n - 1).bit_length() - 2, 0))
    return -(-n // step) * step
