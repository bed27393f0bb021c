"""What the plug-ins cost a run that uses none: nothing. Its step is the program that is written out here."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import TERNARY, tiny

from spectra_jax.model.parameters import apply, graphdef_of
from spectra_jax.train.loss import mean_loss
from spectra_jax.train.schedule import learning_rate, weight_decay
from spectra_jax.train.spikes import judge
from spectra_jax.train.step import accumulate, init_state, make_step


def plain_step(config):
    """AdamW on the loss of the next token, and no more."""
    graphdef, o = graphdef_of(config.model), config.optimizer
    optimizer = optax.chain(optax.clip_by_global_norm(o.clip), optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps))

    def loss_of(parameters, tokens):
        model = apply(graphdef, parameters)
        chunks = config.train.loss_chunks
        return mean_loss(model.hidden(tokens[:, :-1]), model.head_matrix(), tokens[:, 1:], chunks, model.rules, None)

    def step(state, tokens):
        old = {name: state[name] for name in ("parameters", "optimizer")}
        loss, gradient = accumulate(
            jax.value_and_grad(loss_of), old["parameters"], tokens, config.train.accumulate
        )
        norm = optax.tree.norm(gradient)
        rate = learning_rate(config.schedule, config.steps, state["step"])
        decay = weight_decay(config.schedule, o.weight_decay, config.steps, state["step"])
        direction, adam = optimizer.update(gradient, old["optimizer"], old["parameters"])

        def move(path, p, d):
            return p - rate * (d if "norm" in jax.tree_util.keystr(path) else d + decay * p)

        moved = jax.tree_util.tree_map_with_path(move, old["parameters"], direction)
        taken, window = judge(config.train, state["window"], loss, norm)
        kept = jax.tree.map(partial(jnp.where, taken), {"parameters": moved, "optimizer": adam}, old)
        new = {
            **kept, "step": state["step"] + 1, "window": window, "skipped": state["skipped"] + ~taken,
            "skipped_in_a_row": jnp.where(taken, 0, state["skipped_in_a_row"] + 1),
        }
        metrics = {
            "loss": loss, "grad_norm": norm, "lr": rate, "weight_decay": decay,
            "skipped": new["skipped"], "skipped_in_a_row": new["skipped_in_a_row"],
        }
        return new, metrics

    return step


@pytest.mark.parametrize("overrides", [(), TERNARY, (*TERNARY, "train.accumulate=2")], ids=["float", "tri", "micro"])
def test_a_plain_step_is_the_program_without_plug_ins(overrides):
    config = tiny(*overrides)
    state = jax.eval_shape(partial(init_state, config), jax.random.key(0))
    records = jax.ShapeDtypeStruct((config.data.batch, config.data.T + 1), "int32")
    ours, plain = (jax.jit(step(config), donate_argnums=0).lower(state, records) for step in (make_step, plain_step))
    assert ours.as_text() == plain.as_text()


def test_a_step_with_a_plug_in_is_another_program():
    """So that the comparison can fail."""
    config = tiny(*TERNARY, "optimizer.rates=mlp=0.5")
    state = jax.eval_shape(partial(init_state, config), jax.random.key(0))
    records = jax.ShapeDtypeStruct((config.data.batch, config.data.T + 1), "int32")
    ours, plain = (jax.jit(step(config), donate_argnums=0).lower(state, records) for step in (make_step, plain_step))
    assert ours.as_text() != plain.as_text()
