"""GPTQ of one matrix, from calibration inputs to codes: ours, the published loop in PyTorch, and qwix.

    python benchmarks/quantize.py [--sizes=99m] [--rounds=3] [--peers=torch]

For each size of the suite the three kinds of matrix of a block (D x D, D x F, F x D), 4 bits, groups of 128, no zero
points, on twice as many inputs as the Hessian is wide. Each peer runs in a process of its own, on the same arrays,
which are given and taken in its own kind and layout, with as many threads as there are cores. Times are medians over
rounds after a first call, which is also given: it compiles.
qwix (--peers=torch,qwix; pip install qwix) unrolls its loop over inputs; only small sizes end in reasonable time.

Errors are those of the outputs, |x(W' - W)| / |xW|; peaks are of the process, less what it took after its imports.
The last line of the output is JSON.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from spectra_jax.suite import SIZES

BITS, GROUP, BLOCK, DAMP = 4, 128, 128, 0.01


def arrays(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (2m, m) whose dims differ in size and depend on each other, and weights (m, n)."""
    rng = np.random.default_rng(m + n)
    x = rng.standard_normal((2 * m, m), np.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x * np.exp(rng.standard_normal(m)).astype(np.float32), rng.standard_normal((m, n), np.float32) * 0.02


Peer = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]  # what is timed, and its result as an array (m, n)


def ours(x: np.ndarray, w: np.ndarray) -> Peer:
    """What `spectra quantize` calls."""
    import jax
    import jax.numpy as jnp

    from spectra_jax.quantize.gptq import gptq
    from spectra_jax.quantize.hessian import products
    from spectra_jax.schema import Quantize

    q = Quantize(method="gptq", bits=BITS, group=GROUP, block=BLOCK, damp=DAMP, scale_dtype="float32")
    inputs, weights = jnp.asarray(x)[None], jnp.asarray(w)
    return lambda: jax.block_until_ready(gptq(weights, products(inputs), q)), lambda grid: grid.dequantize()


def torch(x: np.ndarray, w: np.ndarray) -> Peer:
    """Algorithm 1 of the paper with its lazy updates, in the layout and with the calls of the published code."""
    import torch

    inputs, weights = torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(w.T))

    def run() -> torch.Tensor:
        w, h = weights.clone(), inputs.T @ inputs
        h.diagonal().add_(DAMP * h.diagonal().mean())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        fixed, scale = torch.zeros_like(w), None
        for start in range(0, w.shape[1], BLOCK):
            stop = min(start + BLOCK, w.shape[1])
            v, u = w[:, start:stop].clone(), upper[start:stop, start:stop]
            errors = torch.zeros_like(v)
            for k in range(stop - start):
                if (start + k) % GROUP == 0:
                    scale = w[:, start + k : start + k + GROUP].abs().amax(1) / (2 ** (BITS - 1) - 0.5)
                chosen = scale * torch.clamp(torch.round(v[:, k] / scale), -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
                error = (v[:, k] - chosen) / u[k, k]
                v[:, k:] -= error[:, None] @ u[k : k + 1, k:]
                fixed[:, start + k], errors[:, k] = chosen, error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        return fixed

    return run, lambda fixed: fixed.T.numpy()


def qwix(x: np.ndarray, w: np.ndarray) -> Peer:
    """Google's library for quantization in JAX."""
    import jax
    import jax.numpy as jnp
    from qwix.contrib import gptq_core
    from qwix.contrib.gptq_core import qarray

    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=[0], tiled_axes={1: GROUP}, calibration_method="absmax")
    inputs, weights = jnp.asarray(x.T), jnp.asarray(w.T)

    def run() -> qarray.QArray:
        h = gptq_core.compute_hessian(inputs)
        return jax.block_until_ready(gptq_core.quantize_weight(weights, h, how, blocksize=BLOCK, percdamp=DAMP)[0])

    return run, lambda found: qarray.dequantize(found).T


PEERS = {"ours": ours, "torch": torch, "qwix": qwix}


def measure(peer: str, m: int, n: int, rounds: int) -> dict[str, float]:
    """Seconds, error and peak memory of one peer at one shape, in this process."""
    x, w = arrays(m, n)
    run, as_array = PEERS[peer](x, w)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    y = x.astype(np.float64)[: min(len(x), 2048)]
    error = np.linalg.norm(y @ (np.asarray(as_array(found)) - w)) / np.linalg.norm(y @ w)
    return {"first": times[0], "seconds": statistics.median(times[1:]), "error": float(error), "peak MiB": peak / 1024}


def main() -> None:
    """Prints the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="99m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="torch")
    args = parser.parse_args()
    rows, context = [], multiprocessing.get_context("spawn")
    peers = ["ours", *args.peers.split(",")]
    print(f"{'size':>6} {'in':>6} {'out':>6} {'peer':>6} {'s/M weights':>11} {'first/later':>11} {'peer/ours':>10} "
          f"{'error':>8} {'peak MiB':>9}")
    for size in args.sizes.split(","):
        D, F = SIZES[size].D, SIZES[size].F
        for m, n in ((D, D), (D, F), (F, D)):
            base = None
            for peer in peers:
                with context.Pool(1) as pool:
                    found = pool.apply(measure, (peer, m, n, args.rounds))
                base = base or found
                row = {"size": size, "in": m, "out": n, "peer": peer, "ratio": found["seconds"] / base["seconds"],
                       "s/M weights": found["seconds"] / (m * n / 1e6), **found}
                rows.append(row)
                print(f"{size:>6} {m:>6} {n:>6} {peer:>6} {row['s/M weights']:>11.3f} "
                      f"{row['first'] / row['seconds']:>11.1f} {row['ratio']:>10.2f} {row['error']:>8.4f} "
                      f"{row['peak MiB']:>9.0f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
