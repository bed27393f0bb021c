"""Mix endless streams by weight: which stream gives row i, without reading rows 0 .. i-1."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

from spectra_jax.errors import UserError


def proportions(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Smallest integers in the ratio of `weights`, each weight read as the decimal it prints as.

    (0.3, 0.7) gives (3, 7), and so does (6, 14): the mixture depends on the ratio alone.

    Raises: UserError if a weight is not a positive finite number.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"mixture weights {list(weights)} contain {weight}; each must be a positive "
                "number: leave a set out instead of giving it the weight 0"
            )
    exact = [Fraction(str(float(weight))) for weight in weights]
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    divisor = math.gcd(*whole)
    return tuple(n // divisor for n in whole)


class Interleave:
    """Maps row i of the mixture to (stream, row of that stream), as grain's selection maps do.

    Among the first n rows stream k has its share n * parts[k] / sum(parts) to within
    len(parts) rows, for every n, and each stream is read in order without gaps. (grain's own
    `MapDataset.mix` rounds the weights, by up to 1 % of the smallest one.)
    """

    def __init__(self, parts: Sequence[int]):
        self.parts = tuple(parts)
        self.total = sum(parts)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        # Of the n rows that belong to streams 0..k, the first floor(n * rest / total) go to the
        # streams before k. Where that count does not grow from n to n + 1, row n is stream k's.
        total = self.total
        for stream in range(len(self.parts) - 1, 0, -1):
            rest = total - self.parts[stream]
            before, after = row * rest // total, (row + 1) * rest // total
            if before == after:
                return stream, row - before
            row, total = before, rest
        return 0, row
