"""Dependency groups: which parts of a block go together, which of them go, and the matrices without them.

LLM-Pruner (arXiv 2305.11627), section 3.1, block-wise, for the blocks of model/transformer.py. A head goes with its
columns of q, k and v and its rows of o (our matrices are (in, out)); a channel of the MLP with its column of gate and
of up and its row of down. With fewer key-value heads than query heads a group is a key-value head with all queries that
read it. Everything here is small, and in float64 on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from spectra_jax.errors import UserError, one_of
from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.schema import Model, Prune

# Of the importances of a channel in each matrix of its group, stacked (M, ...). The matrix that the reference's groups
# begin with is the first of `Group.keys`.
REDUCTIONS: dict[str, Callable] = {
    "sum": lambda each: each.sum(0), "max": lambda each: each.max(0), "mean": lambda each: each.mean(0),
    "prod": lambda each: each.prod(0), "first": lambda each: each[0],
}


@dataclass(frozen=True)
class Group:
    """The groups of one kind in every layer: `count` of them, each of `width` channels in the narrowest matrix."""

    name: str
    keys: tuple[Key, ...]
    count: int
    width: int

    def importance(self, channels: Mapping[Key, Float[np.ndarray, "L C"]], reduction: str) -> Float[np.ndarray, "L G"]:
        """Of each group: its matrices are brought together channel by channel, then its channels are added up.

        Args:
          channels: of every matrix, along the dim that is cut. Query heads that share a key-value head are added up.
        """
        each = [np.asarray(channels[key], np.float64) for key in self.keys]
        each = [c.reshape(len(c), self.count, -1, self.width).sum(2) for c in each]
        return REDUCTIONS[reduction](np.stack(each)).sum(-1)

    def kept(self, importance: Float[np.ndarray, "L G"], p: Prune) -> Int[np.ndarray, "L R"]:
        """The groups that stay in each layer, ascending: equally many in all, which one scan runs over.

        Of C channels int(C (1 - ratio)) stay; a head that would be cut apart stays whole.

        Raises:
          UserError: none would stay, or importance is not finite.
        """
        if not np.isfinite(importance).all():
            raise UserError(f"importance of {self.name} is NaN or infinite, as weights or gradients must be; look at "
                            "the checkpoint, or choose another config.prune.criterion")
        channels = self.count * self.width
        stay = self.count - (channels - int(channels * (1 - p.ratio))) // self.width
        multiple = p.multiple if self.width == 1 else 1
        stay = min(-(-stay // multiple) * multiple, self.count)
        if stay < 1:
            raise UserError(f"config.prune.ratio={p.ratio} leaves none of {self.count} {self.name} a layer; use at "
                            f"most {1 - 1 / channels:.3g}")
        order = np.argsort(importance, axis=1, kind="stable")
        return np.sort(order[:, self.count - stay:], axis=1)

    def cut(self, w: Float[np.ndarray, "L m n"], key: Key, kept: Int[np.ndarray, "L R"]) -> Float[np.ndarray, "L _ _"]:
        """The stacked matrix of this kind with what stays."""
        axis = 1 + MATRICES[key]
        per = w.shape[axis] // self.count
        channels = (kept[:, :, None] * per + np.arange(per)).reshape(len(kept), -1)
        return np.take_along_axis(w, np.expand_dims(channels, 3 - axis), axis)


def groups_of(m: Model) -> tuple[Group, Group]:
    """Those of attention and those of the MLP."""
    return (
        Group("key-value heads", tuple(("attention", name) for name in "qkvo"), m.K, m.H),
        Group("channels of the MLP", tuple(("mlp", name) for name in ("gate", "up", "down")), m.F, 1),
    )


def smaller(m: Model, kept: Sequence[Int[np.ndarray, "L _"]]) -> Model:
    """The shape of what is left, from `kept` of both groups. D and H stay.

    Raises:
      UserError: nothing would go.
    """
    K, F = (each.shape[1] for each in kept)
    if (K, F) == (m.K, m.F):
        raise UserError(f"nothing would go: of {m.K} key-value heads and {m.F} channels of the MLP all stay; use a "
                        "larger config.prune.ratio, or a smaller config.prune.multiple")
    return replace(m, K=K, N=K * (m.N // m.K), F=F)


def check_names(p: Prune, criteria: Sequence[str]) -> None:
    """Raises UserError for a criterion or a reduction that is not known."""
    one_of(p.criterion, criteria, "config.prune.criterion")
    one_of(p.reduction, REDUCTIONS, "config.prune.reduction")
