"""The quickstart's small models: FloatLM, TriLM, BiLM or BitNet of one shape on the shipped corpus.

Command:  spectra quickstart, or one alone on the set that it prepared:
          spectra train --config=configs/quickstart.py:TriLM --workdir=runs/tri --config.data.sets=runs/quickstart/data
Chips:    2 CPU cores, about two minutes a model
Loss:     see the table in README.md, which is what `spectra quickstart` printed
Answers:  nothing in the paper: it shows that the two families' curves fall together, TriLM a little above
"""

from spectra_jax import quickstart


def get_config(family: str = "TriLM"):
    """The quickstart's config of one family."""
    return quickstart.get_config(family)
