"""Fitting a law to points: the vector that is looked for, two ways to find it, and intervals.

What the laws are stands in scaling_laws.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import least_squares, minimize

EXPONENTS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2)  # where fits start
DELTA = 1e-3  # of Huber's loss on log L, as in Chinchilla (arXiv 2203.15556), appendix D.2


@dataclass(frozen=True)
class Design:
    """The points as arrays, and where every constant of every group stands in the vector that is fitted.

    The coefficients are fitted at the middle of the points, A / x0^alpha, for A itself is almost one with alpha.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    member: np.ndarray  # group of every point
    logs: tuple[np.ndarray, ...]  # ln(x / x0) and perhaps ln(D / D0) of every point
    middles: tuple[float, ...]  # ln x0, ln D0
    where: np.ndarray  # (groups, constants): index in the vector

    @classmethod
    def of(cls, points: pd.DataFrame, names: tuple[str, ...], x: str, group: str, shared: tuple[str, ...]) -> "Design":
        """Of a table with columns `x`, `group` and, for names with B, "tokens"."""
        labels = tuple(points[group].unique())
        columns = [x] + (["tokens"] if "B" in names else [])
        logs = [np.log(points[column].to_numpy(float)) for column in columns]
        middles = tuple(float(log.mean()) for log in logs)
        where, taken = np.zeros((len(labels), len(names)), int), 0
        for j, name in enumerate(names):
            for g in range(len(labels)):
                where[g, j] = where[0, j] if name in shared and g else taken
                taken += where[g, j] == taken
        member = np.array([labels.index(label) for label in points[group]])
        return cls(names, labels, member, tuple(log - m for log, m in zip(logs, middles)), middles, where)

    @property
    def size(self) -> int:
        """Numbers that are looked for."""
        return int(self.where.max()) + 1

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(self.labels)

    def predict(self, theta: Float[np.ndarray, "P"]) -> Float[np.ndarray, "n"]:
        """The loss of every point."""
        c = theta[self.where[self.member]]
        loss = c[:, -1] if "E" in self.names else np.zeros(len(c))
        for i, log in enumerate(self.logs):
            loss = loss + np.exp(c[:, 2 * i] - c[:, 2 * i + 1] * log)
        return loss

    def jacobian(self, theta: Float[np.ndarray, "P"]) -> Float[np.ndarray, "n P"]:
        """Its derivatives."""
        index = self.where[self.member]
        c, found, rows = theta[index], np.zeros((len(self.member), self.size)), np.arange(len(self.member))
        for i, log in enumerate(self.logs):
            term = np.exp(c[:, 2 * i] - c[:, 2 * i + 1] * log)
            found[rows, index[:, 2 * i]] += term
            found[rows, index[:, 2 * i + 1]] -= log * term
        if "E" in self.names:
            found[rows, index[:, -1]] += 1.0
        return found

    def starts(self, y: Float[np.ndarray, "n"]) -> list[Float[np.ndarray, "P"]]:
        """The best few of a grid of exponents, the rest being linear once they are fixed."""
        found = []
        for exponents in product(EXPONENTS, repeat=len(self.logs)):
            columns = [np.exp(-e * log) for e, log in zip(exponents, self.logs)]
            columns += [np.ones(len(y))] if "E" in self.names else []
            solved = np.linalg.lstsq(np.stack(columns, axis=1), y, rcond=None)[0]
            constants = []
            for e, c in zip(exponents, solved):
                constants += [np.log(max(c, 1e-3 * y.mean())), e]
            theta = np.zeros(self.size)
            theta[self.where] = np.array(constants + list(solved[len(self.logs):]))
            found.append((float(np.sum((self.predict(theta) - y) ** 2)), theta))
        return [theta for _, theta in sorted(found, key=lambda pair: pair[0])[:3]]

    def reported(self) -> Float[np.ndarray, "G C P"]:
        """The linear map from the vector to every group's (ln A, alpha, ...)."""
        found = np.zeros((*self.where.shape, self.size))
        for g, index in enumerate(self.where):
            found[g, np.arange(len(index)), index] = 1.0
            for i, middle in enumerate(self.middles):
                found[g, 2 * i, index[2 * i + 1]] += middle
        return found

    def constants(self, theta: Float[np.ndarray, "P"]) -> dict[str, dict[str, float]]:
        """Group -> constant -> value, as `Law` takes them."""
        values = self.reported() @ theta
        return {
            label: {name: float(np.exp(v) if name in "AB" else v) for name, v in zip(self.names, row)}
            for label, row in zip(self.labels, values)
        }


Solved = tuple[np.ndarray, float, np.ndarray]  # the vector, the residuals' deviation, the vector's covariance


def _covariance(design: Design, theta: np.ndarray, scale: np.ndarray | float, spread: float) -> np.ndarray:
    j = design.jacobian(theta) / np.reshape(scale, (-1, 1))
    return spread**2 * np.linalg.pinv(j.T @ j)


def by_least_squares(design: Design, y: Float[np.ndarray, "n"], starts: Sequence[np.ndarray]) -> Solved:
    """The best of the fits that begin at `starts`, by Levenberg-Marquardt."""

    def residual(theta: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # a step too far; it is taken back
            return np.minimum(design.predict(theta), 1e150) - y

    def jacobian(theta: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.clip(design.jacobian(theta), -1e150, 1e150)

    found = [least_squares(residual, start, jacobian, method="lm", max_nfev=200) for start in starts]
    best = min(found, key=lambda one: one.cost)
    spread = float(np.sqrt(2 * best.cost / (y.size - design.size)))
    return best.x, spread, _covariance(design, best.x, 1.0, spread)


def by_huber(design: Design, y: Float[np.ndarray, "n"], starts: Sequence[np.ndarray]) -> Solved:
    """The smallest Huber loss on log L (DELTA), by BFGS from each of `starts`.

    The vector's E stands for exp(E) while it is looked for, so that the log of a loss exists.
    """
    log_y, last = np.log(y), design.where[:, -1] if "E" in design.names else np.array([], int)

    def inside(theta: np.ndarray) -> np.ndarray:
        return _with(theta, last, lambda e: np.exp(np.minimum(e, 50.0)))

    def cost(theta: np.ndarray) -> tuple[float, np.ndarray]:
        at = inside(theta)
        loss = design.predict(at)
        r = (np.log(loss) - log_y) / DELTA
        slope = np.clip(r, -1.0, 1.0) @ (design.jacobian(at) / loss[:, None]) / DELTA
        value = np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5).sum()
        return float(value), _with(slope, last, lambda s: s * at[last])

    with np.errstate(over="ignore", invalid="ignore"):
        found = [
            minimize(cost, _with(start, last, lambda e: np.log(np.maximum(e, 1e-3))), jac=True, method="BFGS",
                     options={"gtol": 1e-6, "maxiter": 2000})
            for start in starts
        ]
    theta = inside(min(found, key=lambda one: one.fun).x)
    r = np.log(design.predict(theta)) - log_y
    # By the median, which outliers do not move, taken for a normal distribution's; without the smallest residuals, for
    # so steep a loss makes as many as there are constants all but 0.
    spread = 1.4826 * float(np.median(np.sort(np.abs(r))[design.size:]))
    return theta, spread, _covariance(design, theta, design.predict(theta), spread)


def _with(values: np.ndarray, index: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    changed = values.copy()
    changed[index] = change(values[index])
    return changed


def intervals(
    design: Design, theta: np.ndarray, covariance: np.ndarray, draws: Sequence[Solved]
) -> pd.DataFrame:
    """Every constant with its bootstrap-t interval; without draws the interval is NaN."""
    into = design.reported()
    value = into @ theta
    error = _errors(into, covariance)
    low = high = np.full_like(value, np.nan)
    if draws:
        t = np.stack([(into @ x - value) / np.maximum(_errors(into, c), 1e-300) for x, _, c in draws])
        below, above = np.percentile(t, (2.5, 97.5), axis=0)
        low, high = value - above * error, value - below * error
    rows = []
    for g, j in np.ndindex(*value.shape):
        name, alone = design.names[j], (design.where[:, j] == design.where[g, j]).sum() == 1
        v, a, b = (np.exp(v[g, j]) if name in "AB" else v[g, j] for v in (value, low, high))
        rows.append((design.labels[g], name, v, a, b, not alone))
    return pd.DataFrame(rows, columns=["group", "constant", "value", "low", "high", "shared"])


def _errors(into: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.einsum("gcp,pq,gcq->gc", into, covariance, into), 0.0))
