"""Documents out of files, folders and data set names: one at a time, in a fixed order."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from spectra_jax.data import formats
from spectra_jax.data.formats import OnFraction
from spectra_jax.errors import UserError

TFDS = "tfds:"
COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = {".txt": "text", ".jsonl": "lines", ".json": "lines", ".parquet": "parquet",
         ".arrow": "arrow"}
# JSON files that describe a Hugging Face folder and hold no documents.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)(?=[-_.])")


def expand(sources: Sequence[str | Path]) -> list[str]:
    """The files and TFDS names behind `sources`, in a fixed order.

    A source is a file, a pattern (`data/*.jsonl.zst`, sorted), a folder (its data files, sorted
    by path; one that `datasets.save_to_disk` wrote gives its shards in their order) or a name
    `tfds:NAME[:VERSION][:SPLIT]`. Raises UserError for what is missing, named twice, or would mix
    file types or splits without the user having said so.
    """
    found: list[str] = []
    for source in map(str, sources):
        if source.startswith(TFDS):
            formats.tfds_parts(source)
            found.append(source)
        elif os.path.isdir(source):
            found += _folder(Path(source))
        elif os.path.isfile(source):
            found.append(source)
        else:
            matches = sorted(path for path in glob.glob(source, recursive=True)
                             if os.path.isfile(path))
            if not matches:
                raise UserError(f"{source}: no such file, folder or match; a source is a file, a "
                                "folder, a quoted pattern like 'data/*.jsonl.zst' or tfds:NAME")
            found += matches
    if not found:
        raise UserError("no sources given; name files, folders, patterns or tfds:NAME")
    seen: set[str] = set()
    for path in found:
        if (place := path if path.startswith(TFDS) else os.path.abspath(path)) in seen:
            raise UserError(f"{path} is named twice; name each source once, and weight it by a "
                            "mixture of prepared sets")
        seen.add(place)
        if not path.startswith(TFDS):
            _kind(path)
    return found


def documents(path: str | Path, *, text_key: str = "text", separator: str = "<|endoftext|>",
              on_fraction: OnFraction = lambda fraction: None) -> Iterator[str]:
    """The documents of one item of `expand`, in stored order, never all in memory.

    A .txt file is cut at lines equal to `separator`, or is one document without such a line; the
    other formats hold a document per row under `text_key`. Documents of white space alone are
    left out. `on_fraction` is told the share of the source read so far, in [0, 1].

    Raises UserError, naming the file and the line, row or byte, for a source that is missing,
    empty, truncated, damaged or not UTF-8, or a row without text.
    """
    path, count = str(path), 0
    if path.startswith(TFDS):
        stream = formats.tfds_documents(path, text_key, on_fraction)
    else:
        with formats.reading(path):
            if os.stat(path).st_size == 0:
                raise UserError(f"{path} is empty (0 bytes); remove it from the sources")
        kind = _kind(path)
        if kind == "text":
            stream = formats.text_documents(path, separator, on_fraction)
        elif kind == "lines":
            stream = formats.json_documents(path, text_key, on_fraction)
        else:
            stream = formats.table_documents(path, kind, text_key, on_fraction)
    for text in stream:
        if text and not text.isspace():
            count += 1
            yield text
    if count == 0:
        raise UserError(f"{path} holds no document, only white space; remove it from the sources")


def fingerprint(source: str) -> tuple[str, int]:
    """(sha256, bytes) over the stored files of an item of `expand`; for TFDS with its name."""
    digest, size = hashlib.sha256(), 0
    files = [source]
    if source.startswith(TFDS):
        digest.update(source.encode())
        files = formats.tfds_files(source)
    for path in files:
        with formats.reading(path), open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    if size == 0:
        raise UserError(f"{source} is empty (0 bytes); remove it from the sources")
    return digest.hexdigest(), size


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def _kind(path: str) -> str:
    plain = _without_compression(Path(path))
    kind = KINDS.get(plain.suffix.lower())
    if kind is None or (kind in ("parquet", "arrow") and plain != Path(path)):
        raise UserError(f"{path}: unknown file type; known are .txt, .jsonl and .json (each also "
                        "with .gz, .xz or .zst), .parquet and .arrow")
    return kind


def _folder(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one of them, "
                        f"for example {folder / (splits or ['train'])[0]}")
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        plain = _without_compression(path)
        if plain.suffix.lower() in KINDS and plain.name not in DESCRIPTIONS and not hidden:
            files.append(str(path))
    if not files:
        raise UserError(f"{folder}: no .txt, .jsonl, .json, .parquet or .arrow file in it")
    for what, found in (("file types", [_kind(path) for path in files]),
                        ("splits", [match[1] for path in files
                                    if (match := SPLIT_NAME.match(Path(path).name))])):
        if len(counts := {name: found.count(name) for name in sorted(set(found))}) > 1:
            raise UserError(f"{folder} mixes {what} ({counts} files); name those you mean by a "
                            f"quoted pattern, for example '{Path(files[0]).parent}/train*'")
    return files


def _saved_dataset(folder: Path) -> list[str]:
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = [str(folder / entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the state of a saved Hugging Face data set: "
                        f"{error!r}") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} is a view on reordered rows; write it with "
                        "dataset.flatten_indices().save_to_disk(...)")
    if not files:
        raise UserError(f"{folder} is empty: its state.json names no data file")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{file} is missing, and {path} names it; copy the folder again")
    return files
