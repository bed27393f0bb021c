"""Rules that tie settings to one another: what breaks each is refused in words that name it."""

import pytest

from spectra_jax.checks import check
from spectra_jax.errors import UserError
from spectra_jax.schema import Checkpoint, Config, Data, Mesh, Model, Optimizer, Schedule, Train


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Config(model=Model(L=0)), r"config\.model\.L=0 must be at least 1"),
        (Config(model=Model(N=-8)), r"config\.model\.N=-8 must be at least 1"),
        (Config(data=Data(batch=0)), r"config\.data\.batch=0 must be at least 1"),
        (Config(checkpoint=Checkpoint(keep=0)), r"config\.checkpoint\.keep=0 must be at least 1"),
        (Config(model=Model(H=7)), r"config\.model\.H=7 must be even"),
        (Config(model=Model(K=3)), r"config\.model\.N=8 is not divisible by config\.model\.K=3"),
        (
            Config(model=Model(scale_shards=3)),
            r"F=1280 is not divisible by .*scale_shards=3;.* use (2|4)$",
        ),
        (
            Config(model=Model(K=2, H=6, scale_shards=8)),
            r"K\*H=12 is not divisible by .*scale_shards=8;.* use 6$",
        ),
        (
            Config(train=Train(accumulate=3)),
            r"batch=512 is not divisible by .*accumulate=3; use (2|4) microbatches",
        ),
        (Config(data=Data(T=4)), r"config\.data\.T=4 is not divisible by .*loss_chunks=8; use 4 chunks"),
        (Config(train=Train(loss_chunks=7)), r"T=2048 is not divisible by .*loss_chunks=7; use (4|8) chunks"),
        (Config(train=Train(tokens=0)), "nothing to train"),
        (Config(train=Train(steps=-1)), r"config\.train\.steps=-1 must be a finite number, not negative"),
        (
            Config(model=Model(compute_dtype="float8")),
            r"compute_dtype='float8' is not one of auto, float32, bfloat16, float16; did you mean float32\?",
        ),
        (
            Config(model=Model(gradient_dtype="bfloat16")),
            r"gradient_dtype='bfloat16' is not one of compute, float32",
        ),
        (
            Config(train=Train(loss_scale=0.5)),
            r"train\.loss_scale=0\.5 must be at least loss_scale_min=1\.0, and that positive",
        ),
        (Config(train=Train(loss_scale_min=0.0)), r"at least loss_scale_min=0\.0, and that positive"),
        (Config(train=Train(loss_scale_window=0)), r"config\.train\.loss_scale_window=0 must be at least 1"),
        (
            Config(schedule=Schedule(shape="cosin")),
            r"shape='cosin' is not one of cosine, linear; did you mean cosine\?",
        ),
        (
            Config(schedule=Schedule(lowering="jmup")),
            r"lowering='jmup' is not one of .*; did you mean jump\?",
        ),
        (Config(schedule=Schedule(peak=0.0)), r"config\.schedule\.peak=0\.0 must be positive"),
        (
            Config(schedule=Schedule(peak=float("nan"))),
            r"config\.schedule\.peak=nan must be a finite number",
        ),
        (
            Config(schedule=Schedule(final=1.5)),
            r"config\.schedule\.final=1\.5 is a fraction of the peak",
        ),
        (
            Config(schedule=Schedule(warmup=-1.0)),
            r"config\.schedule\.warmup=-1\.0 must be a finite number, not negative",
        ),
        (
            Config(schedule=Schedule(lower_at=1.0)),
            r"config\.schedule\.lower_at=1\.0 is a fraction of all steps",
        ),
        (
            Config(schedule=Schedule(remove_at=0.0)),
            r"config\.schedule\.remove_at=0\.0 is a fraction of all steps",
        ),
        (
            Config(data=Data(sets=("web=lots",))),
            r"'web=lots' is not PATH or PATH=WEIGHT; 'lots' is not a number",
        ),
        (Config(data=Data(sets=("web=0",))), r"the weight in 'web=0' must be positive"),
        (Config(data=Data(sets=("web=nan",))), r"the weight in 'web=nan' must be positive"),
    ],
)
def test_rules(broken, message):
    with pytest.raises(UserError, match=message):
        check(broken)


def test_the_defaults_obey_the_rules():
    assert check(Config()) == Config(optimizer=Optimizer(), mesh=Mesh())
