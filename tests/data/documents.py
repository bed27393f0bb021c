"""Documents with all that UTF-8 holds, for the tests of prepared sets."""

import numpy as np


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["the", "whale", "said", "naïve", "1729", "😀", "of", "ocean\n", "(and)", "café"]
    return [f"{seed}.{n} " + " ".join(rng.choice(words, rng.integers(5, 120)))
            for n in range(count)]
