"""Text to a prepared set: fixed-length token records in ArrayRecord shards, under a manifest.

The stream of documents is cut into parts of about the same amount of text. Each part becomes its
own shards, whoever makes it, so the folder's bytes depend on the arguments alone: not on the
number of workers, and not on how often the run was killed and started again.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra_jax.data import manifest as manifests
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.data.manifest import Manifest, Shard, Split
from spectra_jax.data.parts import SCRATCH, SPLITS, Job, Part, Stream, file_sha256, run
from spectra_jax.data.sources import expand, fingerprint
from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError

__all__ = ["Manifest", "Shard", "Split", "prepare"]

OURS = re.compile(rf"manifest\.json|tokenizer\.json|{re.escape(SCRATCH)}|"
                  r"(train|validation)-\d{5,}\.arrayrecord")
SETTINGS = "settings.json"
INTERVAL = 10.0  # seconds between progress lines outside a terminal


def prepare(
    sources: Sequence[str | Path], out: Path | str, *, tokenizer: str, T: int,
    validation_percent: float | int = 1.0, text_key: str = "text", separator: str = "<|endoftext|>",
    licence: str | Mapping[str, str], workers: int | None = None, part_bytes: int = 16 << 20,
    train_bytes: int = 64 << 20, eod: str | None = None, overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenize `sources` into the prepared set `out` and return its manifest.

    Args:
        sources: files, folders, patterns or TFDS names (`sources.expand`).
        tokenizer: `neox`, `neox:FILE`, a tokenizer.json, or `train:8192` (`tokenizer.load`).
        T: context length; a record holds T + 1 tokens and shares one with its neighbour.
        validation_percent: share of the documents, picked by hash, that form the validation split;
            0 makes no such split, 100 makes nothing else.
        text_key, separator: where rows keep their text; the line that ends a document in .txt.
        licence: of the texts; a mapping names it by source (file name, or as given), "*" is the
            rest.
        workers: processes, by default one per available core. 1 works in this process.
        part_bytes: text per shard (the last document of a part is never cut).
        train_bytes: text that a `train:N` tokenizer learns from, spread evenly over the stream.
        eod: name of the end-of-document token, where it is none of the usual ones.
        overwrite: remove the prepared set that is already in `out`.
        progress: report on stderr.

    A killed run is resumed by the same call. On a finished set the same call checks the files and
    returns. Raises UserError for unusable sources, arguments or folders; what is then in `out` is
    complete under its name, and has no manifest.
    """
    _check(T, validation_percent, part_bytes, train_bytes, workers)
    paths, out = expand(sources), Path(out)
    trained = tokenizer.startswith("train:")
    chosen = None if trained else tokenizers.load(tokenizer, eod=eod)
    settings = {
        "T": T, "tokenizer": tokenizer if trained else chosen.sha256, "eod": eod,
        "validation_percent": float(validation_percent), "text_key": text_key,
        "separator": separator, "part_bytes": part_bytes,
        "train_bytes": train_bytes if trained else None,
        "sources": _describe(paths, licence)}
    try:
        if (manifest := _open_folder(out, settings, overwrite)) is not None:
            return manifest
        stream, report = Stream(paths, settings), _Progress(progress)
        saved = out / SCRATCH / manifests.TOKENIZER_FILE
        if chosen is None and saved.is_file():
            chosen = tokenizers.load(str(saved), eod=eod)
        elif chosen is None:
            chosen = tokenizers.load(tokenizer, stream.sample(train_bytes, report.sampled), eod=eod)
        chosen.save(saved)
        decides = {key: value for key, value in settings.items() if key != "sources"}
        job = Job(out, _digest([decides, chosen.sha256]), T, _dtype(chosen), eod,
                  float(validation_percent))
        results = []
        for part, result, fresh in run(job, stream.parts(), workers or _cores()):
            results.append(result["splits"])
            report.tokenized(part, result["splits"], fresh)
        report.close()
        manifest = _manifest(out, settings, tokenizer, chosen, stream.counts, results)
        _finish(manifest)
    except OSError as error:
        raise UserError(f"{out}: cannot write there: {error.strerror or error}; give a folder "
                        "that can be written, or make room, and run the same command") from error
    return manifest


def _check(T: int, percent: float | int, part_bytes: int, train_bytes: int,
           workers: int | None) -> None:
    if T < 1:
        raise UserError(f"--context={T}: a record predicts at least one token; use for example "
                        "2048")
    if not 0 <= percent <= 100:
        raise UserError(f"--validation-percent={percent} is not in 0..100; use for example 1")
    for name, value in (("part-bytes", part_bytes), ("train-bytes", train_bytes),
                        ("workers", 1 if workers is None else workers)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name(source: str) -> str:
    return source if source.startswith("tfds:") else Path(source).name


def _describe(paths: Sequence[str], licence: str | Mapping[str, str]) -> list[dict[str, Any]]:
    if isinstance(licence, str):
        licence = {"*": licence}
    used, described = set(), []
    for path in paths:
        key = next((key for key in (path, _name(path), "*") if key in licence), None)
        if key is None:
            raise UserError(f"{path}: its licence is not stated; name it under {_name(path)!r}, or "
                            "that of all the rest under '*'")
        used.add(key)
        digest, size = fingerprint(path)
        described.append({"path": _name(path), "sha256": digest, "bytes": size,
                          "licence": licence[key]})
    if unused := sorted(set(licence) - used - {"*"}):
        raise UserError(f"licences are stated for {', '.join(unused)}, which is not among the "
                        f"sources ({', '.join(map(_name, paths))})")
    return described


def _open_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Manifest | None:
    """The finished set with these settings in `out`, or None when `out` is ready for work."""
    out.mkdir(parents=True, exist_ok=True)
    if strangers := sorted(path.name for path in out.iterdir() if not OURS.fullmatch(path.name)):
        raise UserError(f"{out} holds other files ({', '.join(strangers[:3])}); give a new or "
                        "empty folder")
    scratch, there = out / SCRATCH, None
    if overwrite:
        _remove(out)
    elif (out / manifests.FILE).exists():
        manifest = Manifest.load(out)
        there = manifest.settings | {
            "T": manifest.T, "sources": [{key: value for key, value in source.items()
                                          if key != "documents"} for source in manifest.sources]}
        _agree(out, "prepared set", there, settings, there == settings)
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            if (found := file_sha256(out / shard.file)) != shard.sha256:
                raise UserError(f"{out / shard.file} is {'damaged' if found else 'missing'}; "
                                "--overwrite prepares the set again")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a run killed at its very end
        return manifest
    elif (scratch / SETTINGS).exists():
        there = json.loads((scratch / SETTINGS).read_text(encoding="utf-8"))
        # A source whose content changed (a repaired line) costs only the parts it changes.
        _agree(out, "unfinished set", there, settings, _named(there) == _named(settings))
    scratch.mkdir(exist_ok=True)
    if there != settings:
        (scratch / manifests.TOKENIZER_FILE).unlink(missing_ok=True)  # trained on other text
        manifests.write_text(scratch / SETTINGS, json.dumps(settings), scratch)
    return None


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "sources": [source["path"] for source in settings["sources"]]}


def _agree(out: Path, what: str, there: Mapping[str, Any], here: Mapping[str, Any],
           same: bool) -> None:
    if not same:
        raise UserError(f"{out} holds a {what} with other settings: {_difference(there, here)}; "
                        "give another folder, or --overwrite to replace it")


def _remove(out: Path) -> None:
    (out / manifests.FILE).unlink(missing_ok=True)  # first: without it the rest is no set
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    for path in out.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink()


def _manifest(out: Path, settings: Mapping[str, Any], spec: str, tokenizer: Tokenizer,
              counts: Sequence[int], results: Sequence[Mapping[str, Any]]) -> Manifest:
    splits, dropped = {}, 0
    for name in SPLITS:
        found = [result[name] for result in results]
        shards = tuple(Shard(part["file"], part["records"], part["sha256"])
                       for part in found if part["records"])
        totals = {key: sum(part[key] for part in found)
                  for key in ("records", "tokens", "bytes", "documents")}
        splits[name] = Split(shards, **totals)
        dropped += sum(part["dropped_tokens"] for part in found)
    percent, T = settings["validation_percent"], settings["T"]
    for name, wanted in zip(SPLITS, (percent < 100, percent > 0)):
        if wanted and not splits[name].records:
            _remove(out)  # no other settings could use it
            raise UserError(
                f"the {name} split has no record: {splits[name].documents} of {sum(counts)} "
                f"documents fell to it, and in none of the {len(results)} parts they fill one "
                f"record of T={T} tokens; give more text, a smaller --context, or another "
                f"--validation-percent than {percent:g} (0: no validation split, 100: nothing "
                "else)")
    sources = tuple({**source, "documents": count}
                    for source, count in zip(settings["sources"], counts))
    return Manifest(
        folder=out, T=T, dtype=_dtype(tokenizer), vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod, tokenizer={
            "spec": spec if spec.startswith("train:") else
            "neox" if spec.startswith("neox:") else Path(spec).name,
            "sha256": tokenizer.sha256, "file": manifests.TOKENIZER_FILE},
        sources=sources, splits=splits, dropped_tokens=dropped,
        settings={key: value for key, value in settings.items() if key not in ("T", "sources")})


def _finish(manifest: Manifest) -> None:
    """Make the folder a prepared set: everything else in place first, the manifest last."""
    out, scratch = manifest.folder, manifest.folder / SCRATCH
    named = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in out.glob("*.arrayrecord"):
        if path.name not in named:
            path.unlink()  # of a source that has changed since
    os.replace(scratch / manifests.TOKENIZER_FILE, manifest.tokenizer_file)
    manifests.write_text(out / manifests.FILE, manifest.to_json(), scratch)
    shutil.rmtree(scratch)


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    lines = [f"{key} is {there.get(key)!r} there and {here[key]!r} here"
             for key in here if key != "sources" and there.get(key) != here[key]]
    old, new = ({source["path"]: source for source in side["sources"]} for side in (there, here))
    for path in [*old, *(path for path in new if path not in old)]:
        if path not in new or path not in old:
            lines.append(f"source {path} is only {'there' if path in old else 'here'}")
        else:
            lines += [f"source {path}: {key} is {old[path][key]!r} there and {new[path][key]!r} "
                      "here" for key in new[path] if old[path][key] != new[path][key]]
    return "; ".join(lines or ["the order of the sources"])


class _Progress:
    """One line about the work so far on stderr: redrawn on a terminal, else one per interval."""

    def __init__(self, enabled: bool):
        self._enabled, self._terminal = enabled, sys.stderr.isatty()
        self._start = self._shown = time.monotonic()
        self._documents = self._tokens = self._bytes = 0
        self._before = 0.0  # share of the sources in parts that an earlier run made
        self._line = ""

    def sampled(self, fraction: float) -> None:
        self._show(f"prepare: reading text for the tokenizer, {fraction:.0%}")

    def tokenized(self, part: Part, splits: Mapping[str, Mapping[str, Any]], fresh: bool) -> None:
        found = splits.values()
        self._documents += sum(split["documents"] for split in found)
        self._tokens += sum(split["tokens"] for split in found)
        if fresh:
            self._bytes += sum(split["bytes"] for split in found)
        else:  # made by an earlier run: speed and remaining time are of this one
            self._before, self._start = part.fraction, time.monotonic()
        seconds = max(time.monotonic() - self._start, 1e-6)
        done = part.fraction - self._before
        left = f"{seconds * (1 - part.fraction) / done:.0f} s" if done > 0 else "?"
        self._show(f"prepare: {self._documents:,} documents, {self._tokens:,} tokens, "
                   f"{self._bytes / seconds / 1e6:.2f} MB/s, {part.fraction:.0%}, {left} left")

    def close(self) -> None:
        self._draw()
        if self._enabled and self._terminal:
            print(file=sys.stderr, flush=True)

    def _show(self, line: str) -> None:
        self._line = line
        if time.monotonic() - self._shown >= (0.1 if self._terminal else INTERVAL):
            self._draw()

    def _draw(self) -> None:
        self._shown = time.monotonic()
        if self._enabled and self._line:
            print(f"\r\x1b[K{self._line}" if self._terminal else self._line, file=sys.stderr,
                  flush=True, end="" if self._terminal else "\n")
        self._line = ""
