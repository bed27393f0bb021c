"""The public-domain English text that ships with the package, and where it came from."""

import json
from pathlib import Path

SEPARATOR = "<|endoftext|>"  # a line of its own between two documents of corpus.txt.xz
_HERE = Path(__file__).resolve().parent


def path() -> Path:
    """Path of `corpus.txt.xz`: UTF-8 text, documents separated by a line `<|endoftext|>`."""
    return _HERE / "corpus.txt.xz"


def manifest() -> dict:
    """Manifest of the corpus.

    Keys: `separator`, `raw_bytes` and `raw_sha256` of the decompressed text, `documents`, and
    `sources`, in the order in which their documents stand in the text. A source has `name`,
    `title`, `package`, `registry`, `licence`, `ground`, `documents` and `bytes` (UTF-8, without
    the separators).
    """
    return json.loads((_HERE / "manifest.json").read_text(encoding="utf-8"))
