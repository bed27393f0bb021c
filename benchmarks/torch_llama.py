"""The peer of the speed benchmark: the same Llama-shaped model and the same AdamW step in PyTorch.

Written the way a PyTorch user would: fused scaled-dot-product attention, fused AdamW, autocast for
bfloat16. It takes the numbers of a `spectra_jax` config and the weights of a `spectra_jax` model,
and knows no JAX.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from spectra_jax.schema import Config, Model


class RMSNorm(nn.Module):
    """x / rms(x) * gain, statistics in float32."""

    def __init__(self, gain: np.ndarray, eps: float):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.tensor(gain)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x."""
        return F.rms_norm(x.float(), self.gain.shape, self.gain, self.eps).to(x.dtype)


def linear(w: np.ndarray) -> nn.Linear:
    """A Linear with the matrix (in, out), which PyTorch stores as (out, in)."""
    layer = nn.Linear(*w.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(w.T)))
    return layer


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, N, T, H): dim i is paired with dim i + H/2, in float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, m: Model, weights: Mapping[str, np.ndarray]):
        """`weights` are those of one layer by their path in the block, such as "attention.q.w"."""
        super().__init__()
        self.N = m.N
        self.attention_norm = RMSNorm(weights["attention_norm.gain"], m.norm_eps)
        self.mlp_norm = RMSNorm(weights["mlp_norm.gain"], m.norm_eps)
        self.q, self.k, self.v, self.o = (linear(weights[f"attention.{n}.w"]) for n in "qkvo")
        self.gate, self.up, self.down = (
            linear(weights[f"mlp.{n}.w"]) for n in ("gate", "up", "down")
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The residual stream (B, T, D) after the block."""
        h = self.attention_norm(x)
        heads = (f(h).unflatten(-1, (self.N, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Records of T + 1 tokens to their mean loss."""

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray]):
        """`weights` are our parameters by their dotted path, with blocks stacked over layers.

        Raises:
          ValueError: the config asks for something that this peer does not have.
        """
        super().__init__()
        m, T = config.model, config.data.T
        if m.weight != "float" or m.tie_embeddings or m.K != m.N:
            raise ValueError(
                f"weight={m.weight}, tie_embeddings={m.tie_embeddings}, K={m.K}, N={m.N}: the peer "
                "is a float model with untied embeddings and as many kv heads as query heads"
            )
        self.embedding = nn.Parameter(torch.tensor(weights["embedding"]))
        start = "blocks."
        stacked = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        self.blocks = nn.ModuleList(
            Block(m, {name: w[i] for name, w in stacked.items()}) for i in range(m.L)
        )
        self.norm = RMSNorm(weights["norm.gain"], m.norm_eps)
        self.head = linear(weights["head"])
        self.low = m.compute_dtype == "bfloat16"
        frequency = m.rope_base ** (-torch.arange(0, m.H, 2, dtype=torch.float32) / m.H)
        angle = torch.arange(T, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of (B, T + 1) tokens, from logits in float32."""
        x = F.embedding(tokens[:, :-1], self.embedding)
        if self.low:  # autocast alone would keep the residual stream in float32; ours is low too
            x = x.bfloat16()
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def absent() -> str | None:
    """Why there is no GPU for PyTorch; None if there is one."""
    if torch.cuda.is_available():
        return None
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    return f"PyTorch {torch.__version__} sees no GPU (it {built})"


class Torch:
    """A contender: model, optimizer and the step, at a constant learning rate."""

    def __init__(
        self, config: Config, weights: Mapping[str, np.ndarray], device: str, compiled: bool
    ):
        """`device` is PyTorch's name of it; `compiled` is whether torch.compile sees the model."""
        o = config.optimizer
        self.device, self.clip = device, o.clip
        self.model = Llama(config, weights).to(device)
        groups = {o.weight_decay: [], 0.0: []}
        for name, parameter in self.model.named_parameters():
            kept = any(part in name for part in o.no_decay)
            groups[0.0 if kept else o.weight_decay].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
            lr=config.schedule.peak, betas=(o.b1, o.b2), eps=o.eps, fused=True,
        )
        self.loss = torch.compile(self.model) if compiled else self.model

    def about(self) -> dict:
        """The device and what computes on it."""
        if self.device == "cpu":
            return {"device": "cpu", "software": f"torch {torch.__version__}"}
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        return {"device": torch.cuda.get_device_name(), "software": f"torch {torch.__version__} ({versions})"}

    def batch(self, tokens: np.ndarray) -> torch.Tensor:
        """Records (B, T + 1) on the device."""
        return torch.from_numpy(tokens).long().to(self.device)

    def steps(self, batches: Sequence[torch.Tensor]) -> list[float]:
        """Trains on the batches and returns their losses when all is done."""
        losses = []
        for tokens in batches:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.model.low):
                loss = self.loss(tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if self.device == "cuda":
            torch.cuda.synchronize()
        return [loss.item() for loss in losses]

    def gpu_bytes(self) -> int:
        """The most that tensors ever took on the GPU."""
        return torch.cuda.max_memory_allocated()

    def peak(self, side: int = 1024, runs: int = 20) -> float | None:
        """FLOP/s of this CPU: the best of some square matmuls, as `spectra_jax.hardware` does it.

        None on a GPU, whose peak is in a table.
        """
        if self.device == "cuda":
            return None
        x, best = torch.ones(side, side), float("inf")
        for _ in range(runs):
            start = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - start)
        return 2 * side**3 / best
