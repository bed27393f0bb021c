"""Values of a config that are texts with a form of their own."""

from spectra_jax.errors import UserError


def parse_set(text: str) -> tuple[str, float]:
    """PATH or PATH=WEIGHT.

    Raises:
      UserError: WEIGHT is no number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UserError(
            f"config.data.sets: {text!r} is not PATH or PATH=WEIGHT; {weight!r} is not a number"
        ) from None


def parse_band(text: str) -> tuple[int, int | None]:
    """BITS:COUNT; the count is None for "rest".

    Raises:
      UserError: it is not of this form, or codes of so many bits are not stored.
    """
    bits, _, count = text.partition(":")
    if bits.isdecimal() and int(bits) in (*range(2, 9), 16) and (count == "rest" or count.isdecimal() and int(count)):
        return int(bits), None if count == "rest" else int(count)
    raise UserError(
        f"config.quantize.bands: {text!r} is not BITS:COUNT with 2 to 8 or 16 bits and a count of at least 1, or "
        '"rest" for all that is left'
    )


def parse_rate(text: str) -> tuple[str, float]:
    """PART=FACTOR.

    Raises:
      UserError: it is not of this form.
    """
    part, _, factor = text.rpartition("=")
    try:
        if part and 0 <= float(factor) < float("inf"):
            return part, float(factor)
    except ValueError:
        pass
    raise UserError(f"config.optimizer.rates: {text!r} is not PART=FACTOR with a factor of at least 0")
