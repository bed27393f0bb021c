"""Plans as rows: what `spectra plan` prints of the arithmetic, without compiling anything."""

from collections.abc import Sequence
from typing import Any

from spectra_jax.plan import estimate
from spectra_jax.plan.roofline import bound
from spectra_jax.plan.search import Candidate, search
from spectra_jax.plan.topology import GIB, Topology, parse
from spectra_jax.schema import Config
from spectra_jax.sharding import abstract_mesh, checked_shape


def rows(config: Config, names: Sequence[str], *, best: int = 0) -> list[dict[str, Any]]:
    """One row for each topology, or of each the `best` so many plans of a search.

    Keys: name, topology, chips, mesh (slice x data x model), batch, accumulate, remat, attention; memory (GiB a device,
    about), of (GiB there are), fits; step (seconds at least), limit, mfu (at most), tokens_per_second, days and
    chip_hours (at least, for the whole run), changes (of the config, as on the command line).

    Raises:
      UserError: an unknown topology, a config that does not divide, or nothing that fits in a search.
    """
    found = []
    for topology in map(parse, names):
        candidates = search(config, topology)[:best] if best else [_as_it_is(config, topology)]
        found += [_row(one, topology) for one in candidates]
    return found


def _as_it_is(config: Config, topology: Topology) -> Candidate:
    shape = checked_shape(config, topology.devices)
    mesh = abstract_mesh(config, topology.devices)
    return Candidate(config, (), shape, estimate.peak(config, shape), bound(config, mesh, topology))


def _row(one: Candidate, topology: Topology) -> dict[str, Any]:
    c, b, tokens = one.config, one.bound, one.config.steps * one.config.tokens_per_step
    return {
        "name": c.name, "topology": topology.name, "chips": topology.chips, "mesh": " x ".join(map(str, one.shape)),
        "batch": c.data.batch, "accumulate": c.train.accumulate, "remat": c.model.remat, "attention": c.model.attention,
        "memory": one.memory / GIB, "of": topology.family.memory, "fits": one.memory <= topology.family.memory * GIB,
        "step": b.step, "limit": b.limit, "mfu": b.mfu, "tokens_per_second": b.tokens_per_second,
        "days": b.days(tokens), "chip_hours": b.days(tokens) * 24 * b.chips, "changes": " ".join(one.changes),
    }
