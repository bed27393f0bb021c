"""Scaling laws: loss against size, against stored bits, against size and tokens, with intervals.

Three forms, x being parameters, stored bits or any other size and D tokens:

    offset   L = A / x^alpha + E                     Spectra's equation 1 (arXiv 2407.12327)
    power    L = A / x^alpha                         its figure 19
    joint    L = A / x^alpha + B / D^beta + E        Chinchilla (arXiv 2203.15556, eq. 2); Spectra 1.1 (2506.23025)

Several groups (families, bit-widths) are fitted at once, with exponents or E shared or free.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import brentq, least_squares, minimize

from spectra_jax.errors import UserError, one_of

# Constants of each form: the terms c / x^e first, as pairs, then E.
FORMS = {"offset": ("A", "alpha", "E"), "power": ("A", "alpha"), "joint": ("A", "alpha", "B", "beta", "E")}
SHAREABLE = ("alpha", "beta", "E")
EXPONENTS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2)  # where fits start
Numbers = np.ndarray | pd.Series | Sequence[float] | float | int
DELTA = 1e-3  # of Huber's loss on log L, as in Chinchilla, appendix D.2


@dataclass(frozen=True)
class Law:
    """One form with the constants of every group: group -> constant -> value."""

    form: str
    constants: Mapping[str, Mapping[str, float]]

    def __call__(self, group: str, x: Numbers, tokens: Numbers | None = None) -> np.ndarray:
        """The loss at sizes `x`, and of the joint form at so many tokens."""
        c = self.constants[one_of(group, self.constants, "group")]
        loss = c["A"] * np.asarray(x, float) ** -c["alpha"] + c.get("E", 0.0)
        if "B" in c:
            if tokens is None:
                raise UserError("a joint law is of size and tokens; say how many tokens")
            loss = loss + c["B"] * np.asarray(tokens, float) ** -c["beta"]
        return np.asarray(loss)

    def size_within(
        self, worse: str, better: str, percent: float | int, tokens: float | int | None = None
    ) -> float:
        """The size from which on the loss of `worse` is at most so many per cent above that of `better` at equal size.

        NaN where that is at no size: not even without end, or already at any that matters (1 to 1e30).
        """

        def excess(log_x: float) -> float:
            x = np.exp(log_x)
            return float(self(worse, x, tokens) - (1 + percent / 100) * self(better, x, tokens))

        ends = 0.0, np.log(1e30)
        if not excess(ends[0]) > 0 > excess(ends[1]):
            return float("nan")
        return float(np.exp(brentq(excess, *ends, xtol=1e-12)))


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    constants: one row for every group and constant, with a 95 % interval; samples: the laws of the bootstrap.
    """

    law: Law
    x: str
    constants: pd.DataFrame
    points: pd.DataFrame
    residual: float  # standard deviation, degrees of freedom taken off: nats, with Huber's loss of log L
    samples: tuple[Law, ...]

    def band(self, group: str, x: Numbers, tokens: Numbers | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The middle 95 % of the bootstrap's losses at `x`."""
        low, high = np.percentile([law(group, x, tokens) for law in self.samples], (2.5, 97.5), axis=0)
        return np.asarray(low), np.asarray(high)

    def within(
        self, worse: str, better: str, percents: Sequence[float | int], tokens: float | int | None = None
    ) -> pd.DataFrame:
        """`Law.size_within` for each percentage, and the middle 95 % of the bootstrap's sizes.

        `never` is the share of the bootstrap's laws under which there is no such size; they count as infinite.
        """
        rows = []
        for k in percents:
            found = np.array([law.size_within(worse, better, k, tokens) for law in self.samples] or [np.nan])
            low, high = np.percentile(np.where(np.isnan(found), np.inf, found), (2.5, 97.5), method="nearest")
            size = self.law.size_within(worse, better, k, tokens)
            rows.append((k, size, low, high, float(np.isnan(found).mean())))
        return pd.DataFrame(rows, columns=["percent", self.x, "low", "high", "never"])


def fit(
    points: pd.DataFrame, form: str = "offset", *, x: str = "parameters", y: str = "loss", group: str = "family",
    shared: Sequence[str] = (), method: str = "lm", resamples: int = 400, seed: int = 0,
) -> Fit:
    """Fits a form to a table with columns `x`, `y`, `group`, and "tokens" for the joint form.

    Intervals are bootstrap-t: losses are drawn anew around the fit, with normal errors of the residuals' size, each
    draw is fitted, and its distance from the fit is taken in units of its own standard error.

    Args:
      points: one row for every model; repeated sizes (seeds) are points of their own.
      shared: exponents or E that all groups have in common.
      method: "lm", least squares by Levenberg-Marquardt; "huber", Huber's loss on log L (E is then positive).
      resamples: draws of the bootstrap; 0 for no intervals.

    Raises:
      UserError: an unknown form, method or column; too few points; losses that are missing; models of different data
        or tokenizers; models of different token counts where the form has no tokens.
    """
    names = FORMS[one_of(form, FORMS, "form")]
    if points.empty:
        raise UserError("there are no models to fit a law to")
    solve = {"lm": _least_squares, "huber": _huber}[one_of(method, ("lm", "huber"), "method")]
    for name in shared:
        one_of(name, [c for c in names if c in SHAREABLE], "shared constant")
    points = _checked(points, form, x, y, group)
    design = _Design.of(points, names, x, group, tuple(shared))
    if len(points) <= design.size:
        raise UserError(
            f"{len(points)} models ({', '.join(points[group].unique())}) are too few for the {design.size} constants "
            f"of the form {form!r}: it needs at least {design.size + 1}"
            + ("" if shared or design.groups == 1 else "; shared=['alpha'] saves a constant for every further group")
        )
    observed = points[y].to_numpy(float)
    theta, spread, error = solve(design, observed, design.starts(observed))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        noise = rng.normal(0.0, spread, observed.size)
        drawn = design.predict(theta) * np.exp(noise) if method == "huber" else design.predict(theta) + noise
        draws.append(solve(design, drawn, [theta]))
    law = Law(form, design.constants(theta))
    return Fit(
        law, x, _intervals(design, theta, error, draws), points, spread,
        tuple(Law(form, design.constants(drawn)) for drawn, _, _ in draws),
    )


def _checked(points: pd.DataFrame, form: str, x: str, y: str, group: str) -> pd.DataFrame:
    """The points, if they can stand in one fit."""
    needed = [x, y, group] + (["tokens"] if form == "joint" else [])
    for column in needed:
        if column not in points:
            raise UserError(f"no column {column!r} to fit; there are {', '.join(map(str, points.columns))}")
    label = points["run"] if "run" in points else points[group]
    for column in needed:
        if points[column].isna().any():
            raise UserError(f"{column!r} is missing for {', '.join(map(str, label[points[column].isna()]))}; finish or "
                            "evaluate these models, or leave them out")
    comparable(points, ("data", "tokenizer") + (() if form == "joint" else ("tokens",)))
    return points.reset_index(drop=True)


def comparable(points: pd.DataFrame, columns: Sequence[str] = ("data", "tokenizer")) -> None:
    """Raises UserError, naming the models, where the losses of a table are on no common scale."""
    label = points["run"] if "run" in points else points["family"]
    for column in columns:
        if column in points and points[column].nunique(dropna=False) > 1:
            kinds = "; ".join(f"{str(value)[:12]}: {', '.join(map(str, label[points[column] == value]))}"
                              for value in points[column].unique())
            remedy = "fit form='joint', or the models of one" if column == "tokens" else "fit those of one"
            raise UserError(f"losses of models of different {column} are on no common scale here ({kinds}); {remedy}")


@dataclass(frozen=True)
class _Design:
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
    def of(cls, points: pd.DataFrame, names: tuple[str, ...], x: str, group: str, shared: tuple[str, ...]) -> "_Design":
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
        return int(self.where.max()) + 1

    @property
    def groups(self) -> int:
        return len(self.labels)

    def predict(self, theta: Float[np.ndarray, "P"]) -> Float[np.ndarray, "n"]:
        c = theta[self.where[self.member]]
        loss = c[:, -1] if "E" in self.names else np.zeros(len(c))
        for i, log in enumerate(self.logs):
            loss = loss + np.exp(c[:, 2 * i] - c[:, 2 * i + 1] * log)
        return loss

    def jacobian(self, theta: Float[np.ndarray, "P"]) -> Float[np.ndarray, "n P"]:
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
        values = self.reported() @ theta
        return {
            label: {name: float(np.exp(v) if name in "AB" else v) for name, v in zip(self.names, row)}
            for label, row in zip(self.labels, values)
        }


Solved = tuple[np.ndarray, float, np.ndarray]  # the vector, the residuals' deviation, the vector's covariance


def _covariance(design: _Design, theta: np.ndarray, scale: np.ndarray | float, spread: float) -> np.ndarray:
    j = design.jacobian(theta) / np.reshape(scale, (-1, 1))
    return spread**2 * np.linalg.pinv(j.T @ j)


def _least_squares(design: _Design, y: Float[np.ndarray, "n"], starts: Sequence[np.ndarray]) -> Solved:
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


def _huber(design: _Design, y: Float[np.ndarray, "n"], starts: Sequence[np.ndarray]) -> Solved:
    """The vector's E stands for exp(E) while it is looked for, so that the log of a loss exists."""
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


def _intervals(
    design: _Design, theta: np.ndarray, covariance: np.ndarray, draws: Sequence[Solved]
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
