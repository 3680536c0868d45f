"""The Debian corpus: parsers on small hand-made files of each format, and fetching against stand-in programs."""

import bz2
import gzip
import io
import json
import lzma
import os
import sqlite3
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import apt, debian, load_corpus, store
from opus_jax.data.corpora.parsers.html import html_files, page_text
from opus_jax.data.corpora.parsers.plain import grouped, plain_files, tidy
from opus_jax.data.corpora.parsers.rdata import text_vectors
from opus_jax.data.corpora.parsers.reference_works import dictd, gene_ontology, licence_texts, novels, wordnet
from opus_jax.data.corpora.parsers.sword import plain_text, sword_modules
from opus_jax.data.documents import Document, Problems
from opus_jax.errors import ConfigError, UserError

PROSE = "It was a bright cold day, and the clocks of the town were striking one after another. "


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ------------------------------------------------------------------------------------------------ parsers

PAGE = f"""<!DOCTYPE html><html><head><title>T</title><style>p {{}}</style></head><body>
<div class="navheader"><div>Prev</div><table><tr><td>Up</td></tr></table></div>
<script>if (a < b) {{ hide(); }}</script>
<h2>Caf&eacute; &amp; <em>bar</em></h2><p>{PROSE}
 More&nbsp;text.<p>Second &lt;tag&gt;<ul><li>one<li><p>two</p></ul>
<pre>
  SELECT  *
        FROM t;
</pre><table><tr><td>a<td>b</tr><tr><td>c<td>d</tr></table>
<div class="menu mainmenu"><ul><li>Home</ul></div>end</body></html>"""


def test_pages_become_paragraphs():
    text = tidy(page_text(PAGE))
    for gone in ("Prev", "Up", "hide", "Home", "{}", "T\n"):
        assert gone not in text
    assert text.startswith("Café & bar\n\nIt was")
    assert "More text.\n\nSecond <tag>" in text
    assert "- one\n- two" in text
    assert "\n  SELECT  *\n        FROM t;\n" in text
    assert "a | b\nc | d" in text
    assert text.endswith("end")


def test_page_files_keep_package_and_file_and_skip_what_is_named(tmp_path):
    write(tmp_path / "usr/doc/a.html", PAGE)
    write(tmp_path / "usr/doc/index.html", PAGE)
    (tmp_path / "usr/linked").symlink_to("doc")
    found = list(html_files("usr/*/*.html", without="index")(tmp_path, "pack 1"))
    assert [d.source for d in found] == ["pack 1: doc/a.html"]


def sword_module(root: Path, name: str, entries: list[str], layout: str) -> None:
    """Two blocks; every second entry is linked to the one before, as in commentaries."""
    blocks, verses = [b"", b""], [struct.pack(layout, 0, 0, 0)]
    for i, entry in enumerate(entries):
        block = i * 2 // len(entries)
        raw = entry.encode()
        verses += [struct.pack(layout, block, len(blocks[block]), len(raw))] * 2
        blocks[block] += raw
    index, packed = b"", b""
    for raw in blocks:
        index += struct.pack("<III", len(packed), len(zlib.compress(raw)), len(raw))
        packed += zlib.compress(raw)
    folder = root / "usr/share/sword/modules/texts/ztext" / name
    for kind, content in (("s", index), ("z", packed), ("v", b"".join(verses))):
        write(folder / f"ot.bz{kind}", content)


@pytest.mark.parametrize("layout", ["<IIH", "<III"])
def test_scripture_comes_by_chapter(tmp_path, layout):
    verse = '<w lemma="strong:H1">{}</w> word<note placement="foot">a <b>note</b></note>, and more &amp; more. '
    entries = ["<milestone/>"]
    for chapter in ("Gen.1", "Gen.2"):
        entries.append(f'<chapter n="1" osisID="{chapter}" sID="x"/>')
        entries += [verse.format(f"{chapter}v{i}") for i in range(9)]
    sword_module(tmp_path, "web", entries, layout)
    found = list(sword_modules(tmp_path, "sword 1"))
    assert [d.source for d in found] == ["sword 1: Gen.1", "sword 1: Gen.2"]
    assert found[0].text.startswith("Gen.1v0 word, and more & more. Gen.1v1 word,")
    assert found[1].text.count("Gen.2v3") == 1


def test_paragraphs_and_lines_of_verse_are_kept():
    osis = '<title>Song</title><l sID="a"/>One<l eID="a"/><l sID="b"/>two <l eID="b"/><div sID="g" type="x-p"/> End .'
    assert plain_text(osis).strip() == "Song\n\nOne\ntwo\n\nEnd."


def r_text(value: str) -> bytes:
    return struct.pack(">ii", 9 | 1 << 18, len(value.encode())) + value.encode()


def r_vector(values: list[str]) -> bytes:
    return struct.pack(">ii", 16, len(values)) + b"".join(map(r_text, values))


def r_numbers(values: list[int]) -> bytes:
    return struct.pack(">ii", 13, len(values)) + struct.pack(f">{len(values)}i", *values)


def r_list(items: dict[str, bytes]) -> bytes:
    names = struct.pack(">ii", 2 | 1024, 1) + r_text("names") + r_vector(list(items)) + struct.pack(">i", 254)
    return struct.pack(">ii", 19 | 512, len(items)) + b"".join(items.values()) + names


def r_serialised(item: bytes, version: int) -> bytes:
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">iii", version, 0x40303, 0x30500) + encoding + item


def lzma_raw(data: bytes) -> bytes:
    return b"Z" + lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])


def r_database(folder: Path, variables: dict[str, bytes], pack, version: int) -> Path:
    body, places = b"", {}
    for name, item in variables.items():
        raw = r_serialised(item, version)
        blob = struct.pack(">i", len(raw)) + pack(raw)
        places[name] = r_numbers([len(body), len(blob)])
        body += blob
    index = r_list({"variables": r_list(places), "compressed": r_numbers([1])})
    write(folder / "Rdata.rdx", zlib.compress(r_serialised(index, version)))
    return write(folder / "Rdata.rdb", body)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("pack", [zlib.compress, lambda raw: b"2" + bz2.compress(raw), lzma_raw])
def test_text_vectors_of_r_are_read(tmp_path, pack, version):
    items = {"emma": r_vector(["CHAPTER I", "", "Émma"]), "years": r_numbers([1815]), "a": r_vector(["x"])}
    assert list(text_vectors(r_database(tmp_path, items, pack, version))) == [
        ("a", ["x"]),
        ("emma", ["CHAPTER I", "", "Émma"]),
    ]


def test_novels_come_by_chapter(tmp_path):
    lines = ["EMMA", "", "CHAPTER I", *[PROSE] * 20, "CHAPTER II", *[PROSE.upper()] * 30]
    r_database(tmp_path / "usr/lib/R/site-library/books/data", {"emma": r_vector(lines)}, zlib.compress, 3)
    assert [(d.source, d.text[:10]) for d in novels(tmp_path, "r 1")] == [
        ("r 1: emma 1", "CHAPTER I\n"),
        ("r 1: emma 2", "CHAPTER II"),
    ]


def base64_number(value: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64_number(value // 64) if value >= 64 else "") + digits[value % 64]


def test_dictionary_entries_come_once_without_marks_of_provenance(tmp_path):
    info = "00-database-info\n   not this\n\n"
    entries = [f"Wörd{i} \\W{i}\\, n.\n   {PROSE}\n   [1913 Webster]\n\n" for i in range(200)]
    text, rows, start = info, [f"00-database-info\tA\t{base64_number(len(info))}"], len(info.encode())
    for i, entry in enumerate(entries):
        size = base64_number(len(entry.encode()))
        rows += [f"word{i}\t{base64_number(start)}\t{size}", f"other{i}\t{base64_number(start)}\t{size}"]
        start += len(entry.encode())
        text += entry
    write(tmp_path / "usr/share/dictd/d.index", "\n".join(sorted(rows)))
    write(tmp_path / "usr/share/dictd/d.dict.dz", gzip.compress(text.encode()))
    found = list(dictd(tmp_path, "dict 1"))
    joined = "\n\n".join(d.text for d in found)
    assert joined.count("Wörd") == 200
    assert "Webster" not in joined
    assert "not this" not in joined
    assert len(found) > 2
    assert all(1000 < len(d.text) < 50_000 for d in found)
    assert found[0].source == "dict 1: Wörd0"


def test_glosses_give_words_and_meaning(tmp_path):
    lines = ["  1 This software", '1 29 v 02 take_a_breath 0 dry(p) 0 002 * 5 v 0000 01 + 02 00 | draw air; "deep"  ']
    lines += [f"{i} 03 n 01 thing{i} 0 000 | {PROSE}" for i in range(3)]
    write(tmp_path / "usr/share/wordnet/data.verb", "\n".join(lines))
    (document,) = wordnet(tmp_path, "wn 3")
    assert document.text.startswith('take a breath, dry: draw air; "deep"\n\nthing0: It was')


def test_terms_come_with_definitions_by_branch(tmp_path):
    file = tmp_path / "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
    file.parent.mkdir(parents=True)
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE go_term (go_id, term, ontology, definition)")
    rows = [(f"GO:{i}", f"term {i}", "MF" if i % 2 else "BP", PROSE) for i in range(4)] + [("GO:9", "none", "BP", "")]
    connection.executemany("INSERT INTO go_term VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    first, second = gene_ontology(tmp_path, "go 1")
    assert first.text == "\n\n".join(f"term {i}: {PROSE.strip()}" for i in (0, 2))
    assert "term 1: " in second.text
    assert list(tmp_path.rglob("*-journal")) == []


def test_licences_are_read_inside_the_wheel_without_their_metadata(tmp_path):
    wheel = tmp_path / "scancode_toolkit_mini-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("licensedcode/data/licenses/mit.LICENSE", f"---\nkey: mit\n---\n\n{PROSE * 3}\n---\nend")
        archive.writestr("licensedcode/data/rules/other.RULE", PROSE * 3)
        archive.writestr("../escape.LICENSE", PROSE * 3)
    (document,) = licence_texts(wheel, "scancode 1.0")
    assert document.text == f"{(PROSE * 3).strip()}\n---\nend"
    assert document.source == "scancode 1.0: mit"
    assert [p.name for p in tmp_path.parent.glob("*.LICENSE")] == []


def test_plain_files_are_tidied_and_links_are_not_followed(tmp_path):
    write(tmp_path / "pack/usr/a/one.txt", f"\ufeff{PROSE * 2}  \r\nsoft\u00adhyphen\u00a0x\n\n\n\n\nend")
    write(tmp_path / "pack/usr/a/skip/two.txt", PROSE * 2)
    write(tmp_path / "pack/usr/a/short.txt", "short")
    secret = write(tmp_path / "outside/secret.txt", PROSE * 2)
    (tmp_path / "pack/usr/a/link.txt").symlink_to(secret)
    (tmp_path / "pack/usr/b").symlink_to(secret.parent)
    (document,) = plain_files("usr/*/**/*.txt", without="/skip/")(tmp_path / "pack", "p 1")
    assert document == Document(f"{(PROSE * 2).strip()}\nsofthyphen x\n\n\nend", "p 1: a/one.txt")


def test_entries_are_grouped_in_order():
    found = list(grouped((f"entry {i}: {PROSE}" for i in range(100)), "s", 1000))
    assert "\n\n".join(d.text for d in found).count("entry ") == 100
    assert all(d.source.startswith("s: entry ") for d in found)


# ----------------------------------------------------------------------------------------------- fetching


def deb_of(folder: Path, files: dict[str, str]) -> None:
    """The payload that the stand-in for apt-get delivers; the stand-in for dpkg-deb unpacks it with tar."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))
        link = tarfile.TarInfo("usr/lib/python3.9/leak.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (folder / "payload.tar").write_bytes(buffer.getvalue())


PROGRAMS = {
    "apt-get": """
case "$*" in
  *update*) echo update >> "$FAKE/log" ;;
  *) for last; do :; done
     echo "download $last" >> "$FAKE/log"
     if [ -e "$FAKE/broken" ]; then echo "E: Unable to fetch" >&2; exit 100; fi
     cp "$FAKE/payload.tar" "${last}_1%3a3.9.2-1_amd64.deb" ;;
esac""",
    "apt-cache": 'printf "libpython3.9-stdlib - old\\nlibpython3.11-stdlib - new\\nlibpython3.11-stdlib-dbg - x\\n"',
    "dpkg-deb": 'tar -x -f "$2" -C "$3"',
}


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine whose apt-get, apt-cache and dpkg-deb are scripts."""
    programs = tmp_path / "bin"
    for name, script in PROGRAMS.items():
        file = write(programs / name, f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    fake = tmp_path / "fake"
    deb_of(
        fake, {"usr/lib/python3.9/rivers.py": f"# {PROSE * 3}\n", "usr/lib/python3.9/sub/hills.py": f"# {PROSE * 5}\n"}
    )
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return fake


def config(tmp_path, domains=("python-code",)) -> CorpusConfig:
    return CorpusConfig(name="debian", domains=list(domains), cache_dir=str(tmp_path / "cache"))


def test_a_domain_is_fetched_once_by_pattern_and_remembered(system, tmp_path):
    corpus = load_corpus(config(tmp_path))
    (domain,) = corpus.domains
    found = list(domain.documents())
    assert [d.source for d in found] == [
        "libpython3.11-stdlib 1:3.9.2-1: python3.9/rivers.py",
        "libpython3.11-stdlib 1:3.9.2-1: sub/hills.py",
    ]
    assert "root:" not in "".join(d.text for d in found)
    manifest = json.loads((tmp_path / "cache/debian/manifest.json").read_text())
    (entry,) = manifest.values()
    archive = tmp_path / "cache/debian/archives" / entry["file"]
    assert entry["sha256"] == apt.sha256(archive)
    assert corpus.versions["libpython3.11-stdlib"] == f"1:3.9.2-1 sha256:{entry['sha256']}"
    again = load_corpus(config(tmp_path))
    assert list(again.domains[0].documents()) == found
    assert again.versions == corpus.versions
    assert (system / "log").read_text().split("\n")[:-1] == ["update", "download libpython3.11-stdlib"]


def test_an_interrupted_fetch_leaves_nothing_and_goes_on(system, tmp_path):
    (system / "broken").touch()
    with pytest.raises(UserError, match=r"downloading libpython3\.11-stdlib failed.*E: Unable to fetch"):
        load_corpus(config(tmp_path))
    assert not list((tmp_path / "cache/debian").rglob("*.deb"))
    (system / "broken").unlink()
    assert list(load_corpus(config(tmp_path)).domains[0].documents())


def test_a_damaged_archive_is_noticed(system, tmp_path):
    load_corpus(config(tmp_path))
    (archive,) = (tmp_path / "cache/debian/archives").iterdir()
    archive.write_bytes(archive.read_bytes()[:-1] + b"!")
    for parsed in (tmp_path / "cache/debian/documents").iterdir():
        parsed.unlink()
    with pytest.raises(UserError, match=r"\.deb is not what was downloaded.*delete it"):
        load_corpus(config(tmp_path))
    archive.unlink()
    assert list(load_corpus(config(tmp_path)).domains[0].documents())


def test_a_release_without_a_package_says_which(system, tmp_path):
    with pytest.raises(UserError, match=r"no package named 'dict-gcide'.*corpus\.domains"):
        load_corpus(config(tmp_path, ["dictionary"]))


def test_an_unknown_domain_is_refused_before_anything_is_fetched(system, tmp_path):
    with pytest.raises(ConfigError, match=r"'fictoin'.*nearest is 'fiction'"):
        load_corpus(config(tmp_path, ["fictoin"]))
    assert not (system / "log").exists()


def test_where_apt_is_absent_the_alternatives_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs the program apt-get.*corpus\.name = python-env"):
        load_corpus(config(tmp_path))


def test_there_are_twelve_domains_with_a_licence_each():
    assert len(debian.SOURCES) == 12
    assert all(source.licence and source.packages for source in debian.SOURCES.values())


def test_stored_documents_come_back_and_damage_is_noticed(tmp_path):
    documents = [Document(f"text {i}\n\u2028é", f"source {i}") for i in range(2000)]
    file = tmp_path / "documents.jsonl.zst"
    store.save(documents, file)
    assert list(store.read(file)) == documents
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], whole[:40] + b"\0" + whole[41:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged: delete"):
            list(store.read(file))


def test_a_failed_save_leaves_no_file(tmp_path):
    def failing():
        yield Document("a", "b")
        raise RuntimeError

    for make in (
        lambda: store.save(failing(), tmp_path / "x.jsonl.zst"),
        lambda: store.partition((("d", document) for document in failing()), tmp_path / "folder", Problems()),
    ):
        with pytest.raises(RuntimeError):
            make()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_packages_can_be_fetched_and_read(tmp_path):
    """Needs the network and Debian or Ubuntu."""
    corpus = load_corpus(config(tmp_path, ["fiction", "glosses"]))
    sizes = {d.name: sum(len(x.text) for x in d.documents()) for d in corpus.domains}
    assert sizes["fiction"] > 3_500_000
    assert sizes["glosses"] > 8_000_000
