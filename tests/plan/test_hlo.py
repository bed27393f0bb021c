"""Collectives read off programs whose collectives are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax.plan import hlo, topology


def program(devices, turns):
    """A sum over devices in every turn of a loop, and one gathering before it."""
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def run(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)

        def turn(i, y):
            return jnp.sin(jax.lax.psum(y, "data"))

        return x + jnp.sum(whole) + jax.lax.fori_loop(0, turns, turn, x)

    x = jax.ShapeDtypeStruct((len(devices) * 256, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return jax.jit(run).lower(x).compile().as_text()


@pytest.mark.parametrize("where", ["here", "v5e:4x4"])
def test_a_loop_counts_with_its_turns(where):
    devices = jax.devices() if where == "here" else topology.devices(topology.parse(where))
    found = hlo.collectives(program(devices, 7))
    sums, gathers = ([one for one in found if one.kind == kind] for kind in ("all-reduce", "all-gather"))
    assert sum(one.total for one in sums) == 7 * 256 * 128 * 4 and sum(one.times for one in sums) == 7
    assert sum(one.total for one in gathers) == len(devices) * 256 * 128 * 4
    assert hlo.by_kind(found)["all-reduce", "f32"] == (7, 7 * 256 * 128 * 4)
    assert {one.dtype for one in found} == {"f32"} and "all_gather" in gathers[0].source


def test_one_that_is_spread_over_fusions_counts_once():
    text = """HloModule m

%begin (p: u8[4,8]) -> u8[16,8] {
  ROOT %g = u8[16,8]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%end (p: u8[4,8]) -> u8[16,8] {
  ROOT %g = u8[16,8]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

ENTRY %main (p: u8[4,8]) -> u8[16,8] {
  %p = u8[4,8]{1,0} parameter(0)
  %a = u8[16,8]{1,0} fusion(%p), kind=kCustom, calls=%begin
  ROOT %b = u8[16,8]{1,0} fusion(%a), kind=kCustom, calls=%end
}
"""
    assert hlo.collectives(text) == [hlo.Collective("all-gather", "u8", 128, 1, True, "")]


def test_an_instruction_of_several_lines():
    """As kernels are; and one that is no part of a fusion counts by itself, whatever its channel."""
    text = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %k = bf16[4,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"a": {
"b": 1
}}, metadata={op_name="x"}
  %r = bf16[4,8]{1,0} all-reduce(%k), channel_id=1, to_apply=%add
  ROOT %s = bf16[4,8]{1,0} all-reduce(%r), channel_id=1, to_apply=%add
}
"""
    assert [one.total for one in hlo.collectives(text)] == [64, 64]


def test_what_is_started_counts_what_comes_out():
    text = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}, metadata={op_name="a/b"}
  %c = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1}}
  ROOT %d = bf16[16,8]{1,0} all-gather-done(%s)
}
"""
    gather, permute = hlo.collectives(text)
    assert gather == hlo.Collective("all-gather", "bf16", 256, 1, True, "a/b")
    assert permute == hlo.Collective("collective-permute", "f32", 64, 1, True, "")
