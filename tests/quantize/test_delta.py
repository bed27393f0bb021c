"""Compressed deltas: against SVD and GPTQ in float64 numpy, from two checkpoints to a run, and what is refused."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, copy_of, data, logits, prepare_set, same_bits, tiny, trained

from spectra_jax import cli
from spectra_jax import config as configs
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.made import write_made
from spectra_jax.model.matrices import MATRICES
from spectra_jax.model.parameters import apply, block_matrices, init_parameters
from spectra_jax.quantize import pipeline
from spectra_jax.quantize.blocks import INPUT_OF, Blocks
from spectra_jax.quantize.delta import Band, bands_of, compress, delta_block
from spectra_jax.quantize.grids import GRIDS
from spectra_jax.record import make_record
from spectra_jax.schema import Config, Quantize
from spectra_jax.serve.load import load
from spectra_jax.serve.pack import pack
from spectra_jax.weights.delta import Delta, dense
from spectra_jax.weights.form import describe, is_form

SIZES = ("group=16", "block=16", "samples=16", "batch=8")


def settings(preset: str, *overrides: str) -> Config:
    """The shipped presets for tiny matrices and few samples."""
    return configs.load(f"{ROOT}/configs/delta.py:{preset}", [f"quantize.{text}" for text in (*SIZES, *overrides)])


def pair() -> tuple[str, str]:
    """A base and what came of it: two checkpoints of one run."""
    return f"{trained()}@4", str(trained())


def layer_of(checkpoint: str) -> tuple:
    """A model on one device, and the parameters of its first block."""
    model = load(checkpoint, devices=jax.devices()[:1])
    return model, jax.tree.map(lambda leaf: leaf[0], model.parameters["blocks"])


def first_block(q: Quantize) -> tuple:
    """Blocks, the base's and the fine-tuned first block, and what goes into it; within a mesh."""
    _, base = layer_of(pair()[0])
    source, tuned = layer_of(pair()[1])
    tokens, _ = pipeline.calibration(source, q)
    embedding = np.asarray(source.parameters["embedding"])
    batches = [jax.device_put(embedding[np.asarray(ids)], jax.P()) for ids in tokens]
    return Blocks(source.config.model), base, tuned, batches


def surgeon(w: np.ndarray, h: np.ndarray, bits: int, group: int, damp: float = 0.01) -> np.ndarray:
    """GPTQ from its root, optimal brain surgery: w (in, out), one input after the other, the one with the largest
    diagonal first; after each, the rest by the inverse Hessian, from which that input is then eliminated."""
    w, h, m = w.astype(np.float64), h.astype(np.float64), len(w)
    dead = np.diag(h) == 0
    h[dead, dead], w[dead] = 1.0, 0.0
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(m))
    order, done = np.argsort(-np.diag(h), kind="stable"), np.zeros_like(w)
    for place, i in enumerate(order):
        if place % group == 0:
            rows = w[order[place : place + group]]
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            low, high = np.where(high == low, -1, low), np.where(high == low, 1, high)
            scale = np.float64(np.float32((high - low) / (2**bits - 1)))
            zero = np.round(-low / scale)
        done[i] = scale * (np.clip(np.round(w[i] / scale) + zero, 0, 2**bits - 1) - zero)
        w = w - np.outer(inverse[:, i] / inverse[i, i], w[i] - done[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # never looked at again
        inverse[i, order[place + 1 :]] = inverse[order[place + 1 :], i] = 0
    return done


@pytest.mark.slow
def test_a_block_is_what_the_equations_give():
    """Every matrix of the first block: SVD, V on its inputs, U on what V makes of them, the next band on the sum."""
    config = settings("delta-come", "bands=8:1,8:1,2:rest", "delta_bits=0", "float64=True", "scale_dtype=float32")
    q = config.quantize
    with jax.set_mesh(load(pair()[1], devices=jax.devices()[:1]).mesh):
        blocks, base, tuned, batches = first_block(q)
        found, errors = delta_block(blocks, base, tuned, batches, q, "layer 0")
        current = jax.tree.map(np.asarray, tuned)
        target = {key: np.float64(tuned[key[0]][key[1]]["w"]) for key in MATRICES}
        below = {key: np.float64(np.asarray(base[key[0]][key[1]]["w"]).astype(np.float16)) for key in MATRICES}
        w = dict(below)
        svd = {key: np.linalg.svd(target[key] - w[key], full_matrices=False) for key in MATRICES}
        for bits, start, count in ((8, 0, 1), (8, 1, 1), (2, 2, 99)):
            for keys in pipeline.STAGES:
                for module, name in MATRICES:
                    current[module][name] = {"w": np.float32(w[module, name])}
                inputs = [blocks.inputs(current, x) for x in batches]
                for key in keys:
                    x = np.concatenate([np.float64(seen[INPUT_OF[key]]) for seen in inputs]).reshape(-1, len(w[key]))
                    v, s, u = (np.float64(np.float32(part)) for part in svd[key])
                    v, s, u = v[:, start : start + count], s[start : start + count], u[start : start + count]
                    group = {30: 15}.get(len(s), len(s))  # the divisor nearest to 16
                    down = surgeon(v, x.T @ x, bits, 16)
                    z = x @ down * s
                    w[key] = w[key] + down * s @ surgeon(u, z.T @ z, bits, group)
    for key in MATRICES:
        form = found[key[0]][key[1]]["w"]
        off = np.abs(form.dequantize() - w[key]).max() / np.abs(target[key] - below[key]).max()
        x = np.concatenate([np.float64(seen[INPUT_OF[key]]) for seen in inputs]).reshape(-1, len(w[key]))
        error = np.linalg.norm(x @ (w[key] - target[key])) / np.linalg.norm(x @ (below[key] - target[key]))
        print(".".join(key), f"largest difference {off:.1e} of the delta's largest; error {error:.3%}")
        assert off < 1e-5, f"{key}: {off:.2e}"
        assert errors[".".join(key)] == pytest.approx(error, rel=1e-2)


def test_bands_fill_the_bits_of_the_paper():
    q = Quantize()
    assert bands_of(4096, 4096, q, "q") == [Band(8, 0, 2), Band(3, 2, 34), Band(2, 34, 1002)]  # 2, 32, 968
    for m, n in ((4096, 11008), (1024, 4096), (512, 512), (300, 20), (64, 64)):
        found = bands_of(m, n, q, "w")
        spent = sum(b.bits * (b.stop - b.start) for b in found) * (m + n)
        assert spent <= m * n and (found[-1].stop == min(m, n) or spent + 8 * (m + n) > m * n)
        assert [b.start for b in found[1:]] == [b.stop for b in found[:-1]]
    explicit = replace(q, bands=("8:2", "3:32", "2:1428"), delta_bits=0.0)
    assert bands_of(4096, 11008, explicit, "up")[-1] == Band(2, 34, 1462)
    assert bands_of(100, 48, explicit, "up")[-1] == Band(2, 34, 48)  # no more than the rank
    with pytest.raises(UserError, match="up: .*delta_bits=0.5 .* no singular vector of a 32 x 16 .*=0.75 or"):
        bands_of(32, 16, replace(q, bands=("8:2", "8:rest"), delta_bits=0.5), "up")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every singular vector in 8 bits, as the pipeline writes it; and the parameters that it wrote."""
    out, written, write = tmp_path_factory.mktemp("delta") / "whole", [], pipeline.write_made
    config = settings("delta-come", "bands=8:2,8:rest", "delta_bits=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_made", lambda *a, **k: (written.append(jax.device_get(a[2])), write(*a, **k)))
        said = compress(*pair(), config, out)
    return out, written[0], said


def test_all_bands_in_eight_bits_are_nearly_the_fine_tuned_model(whole):
    out, written, said = whole
    loaded = load(str(out))
    assert same_bits(jax.device_get(loaded.parameters), written) and describe(loaded.parameters) == describe(written)
    matrices = block_matrices(loaded.parameters)
    assert all(isinstance(w, Delta) for w in matrices.values())
    assert all(w.base.base.dtype == jnp.float16 for w in matrices.values())
    tokens = Loader([(data(), 1.0)], split="validation", T=16, B=8, V=304, seed=0).records(0, 8)[:, :-1]
    new, tuned, base = (logits(run, tokens) for run in (out, trained(), pair()[0]))
    off, far = np.abs(new - tuned).max(), np.abs(base - tuned).max()
    print(f"{said}; logits move by {off:.4f}, from the base by {far:.2f}")
    assert off < 0.02 < 1 < far


def test_each_band_brings_every_matrix_and_the_outputs_nearer(whole):
    """The stored bands, taken off one after the other."""
    model, tuned = load(str(whole[0])), block_matrices(load(pair()[1]).parameters)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 300, (8, 16)))
    wanted, before = logits(trained(), np.asarray(tokens)), None
    for take in (lambda w: w, lambda w: w.base, lambda w: w.base.base.astype(jnp.float32)):
        parameters = jax.tree.map(lambda x: take(x) if is_form(x) else x, model.parameters, is_leaf=is_form)
        with jax.set_mesh(model.mesh):
            outputs = np.asarray(apply(model.graphdef, parameters)(tokens))
        whole_ = {key: jax.vmap(dense)(w) for key, w in block_matrices(parameters).items()}
        errors = [np.linalg.norm(np.asarray(whole_[key]) - np.asarray(w)) for key, w in tuned.items()]
        errors.append(np.linalg.norm(outputs - wanted))
        assert before is None or all(more > 1.2 * less for more, less in zip(errors, before)), (errors, before)
        before = errors


def test_bits_are_those_of_what_is_stored(whole):
    model = load(str(whole[0]))
    matrices = block_matrices(model.parameters)
    weights = sum(w.weights for w in matrices.values())
    bits = 0
    for w in matrices.values():
        for part in (w.part, w.base.part):
            for factor in (part.down, part.up):  # two layers of each
                bits += 8 * factor.codes.size + 16 * factor.scales.size + 8 * factor.zeros.size
                bits += 0 if factor.groups is None else 32 * factor.groups.size
            bits += 32 * part.values.size
    record = model.record["quantized"]
    assert record["delta_bits"] == bits and f"{bits / weights:.3f} stored bits" in whole[2]
    rest = 2 * 304 * 32 + (2 * 2 + 1) * 32
    assert record["stored_bits"] == bits + 16 * weights + 16 * rest
    assert (record["base"], record["of"], record["base_step"]) == (*pair(), 4)


def test_signs_and_their_mean(tmp_path, capsys):
    """BitDelta by the command line, against its two formulas; then as a run like any other."""
    out = tmp_path / "signs"
    cli.run(["delta", *pair(), f"--config={ROOT}/configs/delta.py:bit-delta", f"--out={out}"])
    weights = load(str(out)).record["quantized"]["delta_bits"]
    found, base, tuned = (block_matrices(load(text).parameters) for text in (str(out), *pair()))
    for key, form in found.items():
        assert form.base.dtype == jnp.float16
        delta = np.float64(tuned[key]) - np.float64(np.asarray(base[key]).astype(np.float16))
        np.testing.assert_allclose(form.part.scales[:, 0], np.abs(delta).mean((1, 2)), rtol=1e-6)
        np.testing.assert_array_equal(form.part.codes, np.where(delta < 0, -1, 1))
    assert weights == sum(form.weights + 2 * 32 for form in found.values())
    assert "takes 1.0" in capsys.readouterr().out
    cli.run(["compare", *pair(), str(out), "--sets", str(data())])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    loss = [float(row[5]) for row in rows]
    assert rows[2][0] == "signs" and 17.0 < float(rows[2][2]) < 17.1
    assert loss[1] < loss[2] < loss[0]
    cli.run(["generate", f"--checkpoint={out}", "--prompt=the whale", "--tokens=3"])
    assert capsys.readouterr().out.startswith("the whale")
    pack(str(out), tmp_path / "packed", dtype="float32")
    packed = load(str(tmp_path / "packed"))
    assert same_bits(jax.device_get(packed.parameters), jax.device_get(load(str(out)).parameters))
    assert packed.record["arrays"]["parameters"]["blocks.mlp.up.w.part.codes.data"][:2] == ["uint8", [2, 32 // 8, 64]]


@pytest.mark.slow
def test_against_the_baselines_at_one_bit_of_codes():
    """What the paper claims: with as many bits of codes, outputs nearer than by BitDelta and by plain low rank.

    A bit per weight of 32 x 32 are 7 vectors in 3 and 2 bits; one in 16 bits takes 1.5 of 32 x 16.
    """
    bands = "bands=3:2,2:rest"
    cases = (
        ("delta-come", bands), ("bit-delta",), ("delta-come", bands, "delta_bits=1.5"), ("low-rank", "delta_bits=1.5"),
    )
    found = {}
    with jax.set_mesh(load(pair()[1], devices=jax.devices()[:1]).mesh):
        blocks, base, tuned, batches = first_block(settings("delta-come").quantize)
        for preset, *options in cases:
            q = settings(preset, *options).quantize
            got, _ = delta_block(blocks, base, tuned, batches, q, "layer 0")
            wanted = [blocks.forward(tuned, x) for x in batches]
            off = np.concatenate([blocks.forward(got, x) - y for x, y in zip(batches, wanted)])
            far = np.concatenate([blocks.forward(base, x) - y for x, y in zip(batches, wanted)])
            found[preset, q.delta_bits] = np.linalg.norm(off) / np.linalg.norm(far)
    print(found)
    assert found["delta-come", 1.0] < found["bit-delta", 1.0]
    assert found["delta-come", 1.5] < found["low-rank", 1.5]


def test_what_no_delta_is_made_of(whole, tmp_path):
    base, tuned = pair()
    config, narrow = tiny("model.F=32"), str(tmp_path / "narrow")
    fresh = init_parameters(config.model, jax.random.key(0))
    text = (trained() / "tokenizer.json").read_text("utf-8")
    write_made(Path(narrow), config, fresh, make_record(configs.to_dict(config), 0, ""), text)
    foreign = copy_of(trained(), tmp_path / "foreign")
    other = prepare_set(tmp_path / "other", tokenizer="train:290", seed=3)
    (foreign / "tokenizer.json").write_text((other / "tokenizer.json").read_text("utf-8"), "utf-8")
    signs, come = (lambda *o: settings("bit-delta", *o)), (lambda *o: settings("delta-come", *o))
    for pair_, config, message in (
        ((base, narrow), signs(), "@4 has F=64 and .* has F=32: a delta is between models of one shape"),
        ((base, str(foreign)), signs(), "have different tokenizers"),
        ((tuned, tuned), signs(), "hold the same blocks: there is no delta"),
        ((str(whole[0]), tuned), signs(), r"is quantized already \(Delta\); a delta is taken between float models"),
        ((base, str(whole[0])), signs(), "is quantized already"),
        (("nowhere", tuned), signs(), "nowhere holds no run"),
        ((base, tuned), signs("method=gptq"), "'gptq' is not one of delta_come, bit_delta"),
        ((base, tuned), come("grid=gptk"), "did you mean gptq"),
        ((base, tuned), come("bands=8:rest", "delta_bits=0.25"), "layer 0, attention.q: .*leave no singular vector"),
        ((base, tuned), come("bands=2:rest", "group=20"), "group=20 does not divide the 32 inputs of layer 0, attenti"),
        ((base, tuned), come(f"sets={other}"), "tokenized with another tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            compress(*pair_, config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists, and nothing that was made is ever replaced"):
        compress(base, tuned, signs(), tmp_path)


def test_bands_and_settings_that_mean_nothing():
    for bands in ("8", "9:2", "1:2", "2:0", "2:all", "2:-1", "16:"):
        with pytest.raises(UserError, match="is not BITS:COUNT"):
            settings("delta-come", f"bands={bands}")
    with pytest.raises(UserError, match="base_dtype.*float61"):
        settings("delta-come", "base_dtype=float61")
    with pytest.raises(UserError, match="config.model.L=3: model and data are the checkpoints'"):
        cli.run(["delta", "a", "b", f"--config={ROOT}/configs/delta.py", "--out=c", "--config.model.L=3"])
    with pytest.raises(UserError, match="did you mean bit-delta"):
        cli.run(["delta", "a", "b", f"--config={ROOT}/configs/delta.py:bitdelta", "--out=c"])


def test_weights_that_are_not_finite():
    with jax.set_mesh(load(pair()[1], devices=jax.devices()[:1]).mesh):
        _, base = layer_of(pair()[0])
        _, tuned = layer_of(pair()[1])
        base["mlp"]["up"]["w"] = base["mlp"]["up"]["w"] * jnp.nan
        q = settings("bit-delta").quantize
        with pytest.raises(UserError, match="layer 1, mlp.up: NaN or infinite weights in the base model"):
            delta_block(Blocks(tiny().model), base, tuned, [], q, "layer 1")


def test_presets_name_methods_and_grids_that_exist():
    from spectra_jax.quantize.delta import METHODS

    for name in configs.run_config_file(f"{ROOT}/configs/delta.py", "presets"):
        q = configs.load(f"{ROOT}/configs/delta.py:{name}").quantize
        assert q.method in METHODS and q.grid in GRIDS
