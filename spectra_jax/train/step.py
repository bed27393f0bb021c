"""One optimizer step as a pure function of (state, batch)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax.model.parameters import graphdef_of, init_parameters
from spectra_jax.model.transformer import compute_dtype
from spectra_jax.schema import Config
from spectra_jax.sharding import Rules
from spectra_jax.train.loss_scale import adapt, init_scaling, unscaled
from spectra_jax.train.objective import get_objective
from spectra_jax.train.optimizer import apply_updates, decay_mask, joined, make_optimizer, rate_factors, split
from spectra_jax.train.schedule import learning_rate, weight_decay
from spectra_jax.train.spikes import init_window, judge

State = dict[str, PyTree]


def init_state(config: Config, key: Array, rules: Rules = Rules(), parameters: PyTree | None = None) -> State:
    """Parameters, optimizer state, the number of steps done, recent losses, counts of skipped steps. To be jitted.

    With float16 also "scaling", the loss scale. Parameters are random unless they are given.
    """
    parameters = init_parameters(config.model, key, rules) if parameters is None else parameters
    state = {
        "step": jnp.zeros((), jnp.int32),
        "parameters": parameters,
        "optimizer": make_optimizer(config.optimizer).init(split(config.optimizer, parameters)[0]),
        "window": init_window(config.train),
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }
    return state | ({"scaling": init_scaling(config.train)} if compute_dtype(config.model) == jnp.float16 else {})


def make_step(config: Config, rules: Rules = Rules()) -> Callable[[State, Array], tuple[State, dict[str, Array]]]:
    """The training step: gradients over microbatches, a schedule, AdamW; a step that is skipped changes no weight.

    The returned function takes the state (donate it), records (batch, T + 1), and whatever else the objective reads;
    its metrics are scalars on device.
    "skipped" counts every step that was skipped, "skipped_in_a_row" those by no fault of float16's loss scale, which
    mends itself.
    """
    graphdef, optimizer = graphdef_of(config.model, rules), make_optimizer(config.optimizer)
    objective = get_objective(config, graphdef)

    def step(state: State, tokens: Int[Array, "B T1"], *given: PyTree) -> tuple[State, dict[str, Array]]:
        (parameters, fixed), scaling = split(config.optimizer, state["parameters"]), state.get("scaling")

        def loss_of(parameters: PyTree, tokens: Array) -> Array:
            return objective(joined(parameters, fixed), tokens, *given, scale=scaling and scaling["scale"])

        scaled = jax.value_and_grad(loss_of)
        loss, gradient = accumulate(scaled, parameters, tokens, config.train.accumulate)
        if scaling:
            gradient = unscaled(gradient, scaling["scale"])
        norm = optax.tree.norm(gradient)
        rate = learning_rate(config.schedule, config.steps, state["step"])
        decay = weight_decay(config.schedule, config.optimizer.weight_decay, config.steps, state["step"])
        direction, optimizer_state = optimizer.update(
            gradient, state["optimizer"], parameters, rate=rate, decay=decay, steps=config.steps
        )
        mask, factors = decay_mask(config.optimizer, parameters), rate_factors(config.optimizer, parameters)
        updated = {
            "parameters": apply_updates(parameters, direction, mask, rate, decay, factors),
            "optimizer": optimizer_state,
        }
        taken, window = judge(config.train, state["window"], loss, norm)
        before = {"parameters": parameters, "optimizer": state["optimizer"]}
        kept = jax.tree.map(partial(jnp.where, taken), updated, before)
        new = {
            **kept,
            "parameters": joined(kept["parameters"], fixed),
            "step": state["step"] + 1,
            "window": window,
            "skipped": state["skipped"] + ~taken,
            "skipped_in_a_row": jnp.where(taken, 0, state["skipped_in_a_row"] + 1),
        }
        if scaling:
            new["scaling"], excused = adapt(config.train, scaling, loss, norm)
            new["skipped_in_a_row"] = jnp.where(excused, state["skipped_in_a_row"], new["skipped_in_a_row"])
        metrics = {
            "loss": loss, "grad_norm": norm, "lr": rate, "weight_decay": decay,
            "skipped": new["skipped"], "skipped_in_a_row": new["skipped_in_a_row"],
            **({"loss_scale": scaling["scale"]} if scaling else {}),
        }
        return new, metrics

    return step


def accumulate(
    loss_and_gradient: Callable, parameters: PyTree, tokens: Int[Array, "B T1"], microbatches: int
) -> tuple[Float[Array, ""], PyTree]:
    """Loss and gradient averaged over equal microbatches: every `microbatches`-th record makes one.

    Striding keeps each microbatch spread over the devices as the batch is.
    """
    if microbatches == 1:
        return loss_and_gradient(parameters, tokens)

    def add(total: PyTree, i: Array) -> tuple[PyTree, None]:
        part = loss_and_gradient(parameters, stacked[:, i])
        return jax.tree.map(jnp.add, total, part), None

    stacked = tokens.reshape(tokens.shape[0] // microbatches, microbatches, -1)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
    total, _ = jax.lax.scan(add, zero, jnp.arange(microbatches))
    return jax.tree.map(lambda x: x / microbatches, total)
