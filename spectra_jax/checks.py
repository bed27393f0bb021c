"""The rules that a config obeys before any device or file is looked at."""

from dataclasses import fields, is_dataclass
from math import gcd, isfinite

from spectra_jax.errors import UserError, one_of
from spectra_jax.schema import Config, Distill, Model
from spectra_jax.values import parse_band, parse_rate, parse_set


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def check(config: Config) -> Config:
    """Returns `config` if every rule that needs no devices holds.

    Raises:
      UserError: with the numbers, the rule and a value that would do.
    """
    m, d, t, s, o = config.model, config.data, config.train, config.schedule, config.optimizer
    for section, names in (
        ("model", ("V", "D", "F", "L", "N", "K", "H", "scale_shards", "attention_blocks", "unroll")),
        ("data", ("T", "batch", "read_threads")),
        ("train", ("accumulate", "loss_chunks", "max_skipped", "skip_window", "heartbeat_seconds")),
        ("train", ("loss_scale_window",)),
        ("checkpoint", ("every_steps", "keep")),
        ("metrics", ("every_steps", "profile_steps")),
        ("quantize", ("samples", "batch", "block")),
        ("prune", ("samples", "multiple")),
    ):
        for name in names:
            value = getattr(getattr(config, section), name)
            _require(value >= 1, f"config.{section}.{name}={value} must be at least 1")
    _check_ranges(config)
    one_of(m.compute_dtype, ("auto", "float32", "bfloat16", "float16"), "config.model.compute_dtype")
    one_of(m.gradient_dtype, ("compute", "float32"), "config.model.gradient_dtype")
    one_of(m.gather, ("codes", "int8", "matrix"), "config.model.gather")
    one_of(s.shape, ("cosine", "linear"), "config.schedule.shape")
    one_of(s.lowering, ("jump", "continuous"), "config.schedule.lowering")
    _check_mixer(m)
    _require(
        not (m.quantized_head and m.tie_embeddings),
        "config.model.quantized_head=True: a head that is the embedding stays float; use tie_embeddings=False",
    )
    _require(m.H % 2 == 0, f"config.model.H={m.H} must be even: rotary embeddings turn pairs of dimensions")
    _require(m.N % m.K == 0, f"config.model.N={m.N} is not divisible by config.model.K={m.K} (query heads per kv head)")
    for name, size in (("F", m.F), ("N*H", m.N * m.H), ("K*H", m.K * m.H)):
        _require(
            size % m.scale_shards == 0,
            f"{name}={size} is not divisible by config.model.scale_shards={m.scale_shards}; a shard is a whole "
            f"number of rows or columns: use {_nearest_divisor(size, m.scale_shards)}",
        )
    _require(
        d.batch % t.accumulate == 0,
        f"config.data.batch={d.batch} is not divisible by config.train.accumulate={t.accumulate}; "
        f"use {_nearest_divisor(d.batch, t.accumulate)} microbatches",
    )
    _require(
        d.T % t.loss_chunks == 0,
        f"config.data.T={d.T} is not divisible by config.train.loss_chunks={t.loss_chunks}; "
        f"use {_nearest_divisor(d.T, t.loss_chunks)} chunks",
    )
    _require(
        t.loss_scale >= t.loss_scale_min > 0,
        f"config.train.loss_scale={t.loss_scale} must be at least loss_scale_min={t.loss_scale_min}, and that positive",
    )
    _require(t.steps + t.tokens > 0, f"config.train.steps={t.steps}, tokens={t.tokens}: nothing to train")
    for name, value in (("b1", o.b1), ("b2", o.b2)):
        _require(value < 1, f"config.optimizer.{name}={value} is a decay rate: at least 0, below 1")
    _require(o.clip > 0, f"config.optimizer.clip={o.clip} must be positive; a large value never clips")
    _require(
        2 <= config.quantize.bits <= 8, f"config.quantize.bits={config.quantize.bits}: from 2 to 8 are stored"
    )
    one_of(config.quantize.scale_dtype, ("float16", "bfloat16", "float32"), "config.quantize.scale_dtype")
    one_of(config.quantize.base_dtype, ("float16", "bfloat16", "float32"), "config.quantize.base_dtype")
    for text in config.quantize.bands:
        parse_band(text)
    for text in o.rates:
        parse_rate(text)
    _check_spiel(config)
    _check_distill(config.distill)
    _require(
        0 < config.prune.ratio < 1, f"config.prune.ratio={config.prune.ratio} is the share that goes: between 0 and 1"
    )
    _require(bool(config.name), "config.name is empty; runs are told apart by their names")
    _require(s.peak > 0, f"config.schedule.peak={s.peak} must be positive")
    _require(0 <= s.final <= 1, f"config.schedule.final={s.final} is a fraction of the peak: between 0 and 1")
    for name in ("lower_at", "remove_at"):
        value = getattr(s, name)
        _require(0 < value < 1, f"config.schedule.{name}={value} is a fraction of all steps: between 0 and 1")
    for text in d.sets:
        weight = parse_set(text)[1]
        _require(isfinite(weight) and weight > 0, f"config.data.sets: the weight in {text!r} must be positive")
    return config


def _check_distill(d: Distill) -> None:
    _require(
        not d.teacher or d.next_token + d.logits + d.features > 0,
        "config.distill: next_token, logits and features are all 0, so that the teacher teaches nothing",
    )
    _require(d.temperature > 0, f"config.distill.temperature={d.temperature} must be positive")


def _check_mixer(m: Model) -> None:
    heads = gcd(m.N, m.D)
    _require(
        m.mixer != "mlgru" or (m.N * m.H == m.D and m.K == m.N),
        f"config.model.N={m.N}, K={m.K}, H={m.H}: the state of mlgru is as wide as the model and its heads are all "
        f"alike, so that N*H must be D={m.D} and K must be N; use N=K={heads} and H={m.D // heads}",
    )


def _check_spiel(config: Config) -> None:
    """What SpIEL's selection can work with."""
    m, o, s = config.model, config.optimizer, config.optimizer.spiel
    _require(0 < s.density <= 1, f"config.optimizer.spiel.density={s.density} is a share: above 0, at most 1")
    _require(0 <= s.replaced <= 1, f"config.optimizer.spiel.replaced={s.replaced} is a share: between 0 and 1")
    _require(
        1 <= s.collect <= s.every - 2,
        f"config.optimizer.spiel.collect={s.collect} must be at least 1 and at most every - 2 ({s.every - 2}): "
        "a selection ends before the next begins",
    )
    _require(s.seed >= 0, f"config.optimizer.spiel.seed={s.seed} must not be negative")
    if o.name == "spiel":
        smallest = m.D * min(m.K * m.H, m.F)
        _require(
            s.density * smallest >= 1,
            f"config.optimizer.spiel.density={s.density} is not one weight of the smallest block matrix, which has "
            f"{smallest}; use {1.05 / smallest:.2g} or more",
        )
        _require(not o.rates, "config.optimizer.rates is not for spiel, which has one learning rate; leave it empty")
        _require(not o.keep_zeros, "config.optimizer.keep_zeros is not for spiel, which chooses its weights itself")


def _check_ranges(config: Config) -> None:
    """Numbers are finite, and none is negative but for the -1 of the mesh."""
    for section in fields(config):
        values = getattr(config, section.name)
        named = {f.name: getattr(values, f.name) for f in fields(values)} if is_dataclass(values) else {"": values}
        for name, value in named.items():
            key = f"config.{section.name}{'.' if name else ''}{name}"
            if isinstance(value, int | float) and section.name != "mesh":
                _require(isfinite(value) and value >= 0, f"{key}={value} must be a finite number, not negative")


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - wanted))
