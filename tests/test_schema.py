"""Numbers that a config implies: steps, checkpoints for good, the mixture."""

import pytest

from spectra_jax.schema import Checkpoint, Config, Data, Train


def run(**changed) -> Config:
    """100 tokens per step."""
    return Config(
        data=Data(T=10, batch=10),
        train=Train(tokens=changed.pop("tokens", 1000), steps=changed.pop("steps", 0)),
        checkpoint=Checkpoint(**changed),
    )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"tokens": 1000}, 10),
        ({"tokens": 1001}, 11),
        ({"tokens": 1}, 1),
        ({"tokens": 1000, "steps": 3}, 3),
    ],
)
def test_steps(settings, steps):
    assert run(**settings).tokens_per_step == 100
    assert run(**settings).steps == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"permanent_tokens": 250}, (3, 5, 8, 10)),
        ({"permanent_tokens": 300}, (3, 6, 9, 10)),
        ({"permanent_tokens": 300, "permanent_final": False}, (3, 6, 9)),
        ({"permanent_tokens": 0}, (10,)),
        ({"permanent_tokens": 0, "permanent_final": False}, ()),
        (
            {"permanent_tokens": 30, "tokens": 200},
            (1, 2),
        ),  # several marks within a step: one checkpoint
        ({"permanent_tokens": 5000}, (10,)),
        ({"permanent_tokens": 400, "tokens": 950}, (4, 8, 10)),
        ({"permanent_tokens": 1000, "tokens": 950}, (10,)),  # the last step ends at 1000 tokens
    ],
)
def test_permanent_steps(settings, steps):
    assert run(**settings).permanent_steps == steps


def test_the_suites_intermediate_checkpoints():
    c = Config(data=Data(batch=528), train=Train(), checkpoint=Checkpoint())
    # 300e9 tokens of 528 x 2048: 30 marks 10e9 apart, at 1e10 k / 1081344 rounded up
    assert len(c.permanent_steps) == 30
    assert (
        c.permanent_steps[:3] == (9_248, 18_496, 27_744)
        and c.permanent_steps[-1] == 277_433 == c.steps
    )


def test_mixture():
    c = Config(data=Data(sets=("web=3", "a/b", "books=0.5", "odd=name=2")))
    assert c.mixture == (("web", 3.0), ("a/b", 1.0), ("books", 0.5), ("odd=name", 2.0))
