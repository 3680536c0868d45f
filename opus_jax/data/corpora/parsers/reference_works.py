"""Works made of short entries: novels in an R package, dictionaries, an ontology, a collection of licences."""

import gzip
import re
import sqlite3
import zipfile
from collections.abc import Iterator
from pathlib import Path

from opus_jax.data.corpora.parsers.plain import documents, files, grouped
from opus_jax.data.corpora.parsers.rdata import text_vectors
from opus_jax.data.documents import Document

_CHAPTER = re.compile(r"^(?=(?:CHAPTER|Chapter|VOLUME) [IVXLC\d]+)", re.MULTILINE)
_PROVENANCE = re.compile(
    r"^\s*\[(?:1913 Webster|Webster 1913 Suppl\.|PJC|WordNet [\d.]+|Century Dict[^\]]*)\]\n", re.MULTILINE
)
_BASE64 = {
    character: i for i, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def novels(root: Path, package: str) -> Iterator[Document]:
    """The books of a data package of R, one document for each chapter."""
    for rdb in files(root, "usr/lib/R/site-library/*/data/Rdata.rdb"):
        for name, lines in text_vectors(rdb):
            for number, chapter in enumerate(_CHAPTER.split("\n".join(lines))):
                yield from documents(chapter, f"{package}: {name} {number}")


def dictd(root: Path, package: str) -> Iterator[Document]:
    """A dictionary of the DICT server: neighbouring entries together. Editors' marks of provenance are left out."""
    for index in files(root, "usr/share/dictd/*.index"):
        text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
        rows = (line.split("\t") for line in index.read_text("utf-8").splitlines())
        spans = sorted({(_number(row[1]), _number(row[2])) for row in rows if not row[0].startswith("00")})
        entries = (text[start : start + size].decode("utf-8", "replace") for start, size in spans)
        yield from grouped((_PROVENANCE.sub("", entry) for entry in entries), package)


def wordnet(root: Path, package: str) -> Iterator[Document]:
    """WordNet's synsets as `words: gloss`, neighbours together."""
    for path in files(root, "usr/share/wordnet/data.*"):
        lines = path.read_text("utf-8", "replace").splitlines()
        yield from grouped(map(_synset, (line for line in lines if line[:1].isdigit())), f"{package}: {path.name}")


def gene_ontology(root: Path, package: str) -> Iterator[Document]:
    """Terms of the Gene Ontology with their definitions, neighbours in the same branch together."""
    for path in files(root, "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"):
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            query = "SELECT ontology, term, definition FROM go_term WHERE definition <> '' ORDER BY ontology, go_id"
            rows = connection.execute(query).fetchall()
        finally:
            connection.close()
        for branch in sorted({row[0] for row in rows}):
            terms = (f"{term}: {definition}" for ontology, term, definition in rows if ontology == branch)
            yield from grouped(terms, f"{package}: {branch}")


def licence_texts(wheel: Path, package: str) -> Iterator[Document]:
    """The licence texts of a scancode-toolkit wheel, read in place, without their metadata."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"licensedcode/data/licenses/[^/]+\.LICENSE", name):
                text = archive.read(name).decode("utf-8", "replace")
                yield from documents(
                    re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL), f"{package}: {Path(name).stem}"
                )


def _synset(line: str) -> str:
    fields, _, gloss = line.partition(" | ")
    part = fields.split(" ")
    words = [word.replace("_", " ").partition("(")[0] for word in part[4 : 4 + 2 * int(part[3], 16) : 2]]
    return f"{', '.join(words)}: {gloss.strip()}"


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64[digit]
    return value
