"""What a prepared set holds: manifest.json, the one file that makes a folder a prepared set."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from spectra_jax.errors import UserError

FORMAT = 1
FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of `records` records."""
    file: str
    records: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split. `tokens` = records * T, the number of predicted tokens; `bytes` is the UTF-8
    size of the text those tokens stand for (an end-of-document token stands for none)."""
    shards: tuple[Shard, ...]
    records: int
    tokens: int
    bytes: int
    documents: int


@dataclass(frozen=True)
class Manifest:
    """A prepared set in `folder`: records of T + 1 little-endian tokens of type `dtype`.

    tokenizer: {"spec", "sha256", "file"}; sources: one {"path", "sha256", "bytes", "documents",
    "licence"} each, path being a name alone; dropped_tokens: those at the ends of parts that did
    not fill a record; settings: the remaining arguments of `prepare` that decide the data.
    """
    folder: Path
    T: int
    dtype: str
    vocab_size: int
    eod: int
    tokenizer: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    splits: Mapping[str, Split]
    dropped_tokens: int
    settings: Mapping[str, Any]

    @property
    def format(self) -> int:
        return FORMAT

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / self.tokenizer["file"]

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides the records: two sets with equal ones hold the same data."""
        decides = {"format": FORMAT, "T": self.T, "dtype": self.dtype,
                   "tokenizer": self.tokenizer["sha256"],
                   "shards": {name: [shard.sha256 for shard in split.shards]
                              for name, split in sorted(self.splits.items())}}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The content of manifest.json: the same bytes for the same set, wherever it lies."""
        content = asdict(self) | {"format": FORMAT, "fingerprint": self.fingerprint}
        del content["folder"]
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def load(folder: Path | str) -> "Manifest":
        """Read `folder`/manifest.json. Raises UserError when it is missing, damaged or edited."""
        folder = Path(folder)
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder} is no prepared set: it has no {FILE}; make it with "
                            "`spectra prepare`, or run that again if it was interrupted")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (found := content.pop("format")) != FORMAT:
                raise UserError(f"{path} has format {found}, this version reads {FORMAT}; "
                                "prepare the set again")
            stated = content.pop("fingerprint")
            content["splits"] = {
                name: Split(**split | {"shards": tuple(Shard(**s) for s in split["shards"])})
                for name, split in content["splits"].items()}
            content["sources"] = tuple(content["sources"])
            names = {field.name for field in fields(Manifest)} - {"folder"}
            manifest = Manifest(folder=folder, **{name: content[name] for name in names})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error!r}; copy it again or prepare the set "
                            "again with --overwrite") from error
        if manifest.fingerprint != stated:
            raise UserError(f"{path} states the fingerprint {stated[:12]}, its shards give "
                            f"{manifest.fingerprint[:12]}: it was edited or damaged; copy it again "
                            "or prepare the set again with --overwrite")
        return manifest


def write_text(path: Path, text: str, scratch: Path) -> None:
    """Write `text` to `path`, whole or not at all, through a temporary file in the folder
    `scratch` of the same file system. Raises OSError."""
    partial = scratch / f"{path.name}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
