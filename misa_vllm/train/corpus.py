"""Makes the training text: free documentation from Debian packages and Python's own library, cleaned and tokenised.

    python -m misa_vllm.train.corpus .cache/corpus

Needs apt-get, dpkg and the `tokenizers` package, and no GPU. It writes into the folder

    tokenizer.json   byte-level BPE, every digit a token of its own, trained on the text
    train.bin        uint16 token ids, documents one after the other, each closed by the end token
    heldout.bin      the same for documents that training never sees
    heldout.txt      some of those, of packages whose licence lets them be passed on without conditions on the rest
    corpus.json      where the text came from: package, version, documents, bytes
    bundle.tar.xz    what training needs of the above, packed to travel

Everything comes from Debian's main archive, so all of it is free text (DFSG); the text itself is not shipped.
"""

import argparse
import gzip
import html
import html.parser
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from misa_vllm.eval.needles import ADJECTIVES, NOUNS
from misa_vllm.train.bpe import END, PATTERN, SPECIAL_TOKENS

VOCABULARY = 4096
HELD_OUT_SHARE = 50  # one document in so many
TASK_WORD_REPEATS = 2000
PERMISSIVE_BYTES = 280_000  # of heldout.txt


@dataclass(frozen=True)
class Source:
    """A Debian package and how much of its text is taken, in megabytes, so that no subject crowds out the others."""

    package: str
    megabytes: float
    permissive: bool = False
    """Whether its licence (public domain, BSD, PSF, Apache, PostgreSQL) lets excerpts be shipped with this project."""


SOURCES = (
    Source("dict-gcide", 16),
    Source("anarchism", 10),
    Source("dict-foldoc", 6),
    Source("dict-jargon", 2, permissive=True),
    Source("dict-devil", 1, permissive=True),
    Source("fortunes", 3),
    Source("fortune-anarchism", 1),
    Source("miscfiles", 1),
    Source("debian-handbook", 4),
    Source("debian-history", 2),
    Source("debian-policy", 2),
    Source("debian-reference-en", 2),
    Source("debian-faq", 1),
    Source("developers-reference", 1),
    Source("maint-guide", 1),
    Source("doc-debian", 1),
    Source("installation-guide-amd64", 3),
    Source("aptitude-doc-en", 1),
    Source("python3.11-doc", 7.5, permissive=True),
    Source("python-django-doc", 4.5, permissive=True),
    Source("python-sqlalchemy-doc", 3),
    Source("twisted-doc", 3),
    Source("postgresql-doc-15", 6, permissive=True),
    Source("sqlite3-doc", 6, permissive=True),
    Source("apache2-doc", 5, permissive=True),
    Source("git-doc", 4),
    Source("mercurial-common", 2),
    Source("linux-doc-6.1", 9),
    Source("manpages", 2),
    Source("manpages-dev", 4),
    Source("perl-doc", 6),
    Source("vim-doc", 3),
    Source("zsh-doc", 2),
    Source("bash-doc", 1),
    Source("postfix-doc", 3),
    Source("maxima-doc", 3),
    Source("octave-doc", 3),
    Source("libstdc++-12-doc", 2),
    Source("racket-doc", 2),
    Source("haskell98-report", 1),
    Source("python-pandas-doc", 3),
    Source("gnupg", 0.5),
)
PYTHON_MEGABYTES = 3.5
PYTHON = "python-library"

SKIP_NAMES = re.compile(
    r"changelog|copyright|license|genindex|/search|bookindex|/news\.|/todo|contributors|\.(js|css|png|svg|gif|jpe?g|"
    r"dat|u8|pdf|ps|info|json|inv|map|xsl|c|h|java|hs|el|exe|index|tex|so|gmo)(\.gz)?$",
    re.IGNORECASE,
)
DEBIAN_LANGUAGES = re.compile(r"\.(ar|cs|da|de|el|es|fa|fr|he|hr|hu|id|it|ja|ko|nb|nl|pl|pt|pt-br|ro|ru|sv|tr|vi|zh)\b")
TYPOGRAPHY = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2026": "...",
    "\u00a0": " ", "\u2022": "*", "\u200b": "", "\u00ad": "", "\ufeff": "", "\u00b6": "", "\u2192": "->",
})  # fmt: skip
ENGLISH = frozenset(
    "the of and to in is a that it for on as with be by this are or not from an at which if can will you".split()
)


# ---------------------------------------------------------------- reading files


class _PageText(html.parser.HTMLParser):
    """The text of a page: paragraphs on lines of their own, code as it stands, menus and scripts left out."""

    HIDDEN = frozenset(("script", "style", "head", "nav", "footer", "header", "button", "select", "svg"))
    BREAKS = frozenset(
        "p div br li tr dt dd h1 h2 h3 h4 h5 h6 pre table ul ol dl blockquote section article hr td".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0
        self.literal = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        self.literal += tag == "pre"
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.literal -= tag == "pre" and self.literal > 0
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.literal else re.sub(r"\s+", " ", data))


def page_text(page: str) -> str:
    """The readable text of an HTML page."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def manual_text(source: str) -> str:
    """The readable text of a manual page in roff."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".\\\"", "'\\\"", ".de", ".ig", ".TH", ".Dd", ".if", ".ie", ".el", ".nr", ".ds", "..")):
            continue
        if line.startswith((".SH", ".SS")):
            lines.append("\n" + line[3:].strip().strip('"'))
        elif line.startswith((".PP", ".P", ".LP", ".IP", ".TP", ".sp", ".HP")):
            lines.append("")
            words = line.split(maxsplit=1)
            if len(words) > 1 and words[0] == ".IP":
                lines.append(words[1].strip('"'))
        elif line.startswith((".B", ".I", ".R", ".SM")) and " " in line:
            lines.append(line.split(maxsplit=1)[1].replace('" "', "").replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\&|\\/|\\,|\\c|\\:|\\%", "", text)
    text = re.sub(r"\\\((?:aq|cq|oq)|\\\[aq\]", "'", text)
    text = re.sub(r"\\\((?:lq|rq|dq)", '"', text)
    text = re.sub(r"\\\((?:bu|em|en|hy)", "-", text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\").replace("\\(", "(").replace("\\~", " ")


def read(path: Path) -> str | None:
    """The text of a file by its kind; None for one that holds no text."""
    name = path.name
    try:
        data = path.read_bytes()
        if name.endswith((".gz", ".dz")):
            data = gzip.decompress(data)
            name = name.rsplit(".", 1)[0] + (".dict" if path.suffix == ".dz" else "")
    except (OSError, EOFError, zlib.error):
        return None
    if b"\0" in data[:4096]:
        return None
    text = data.decode("utf-8", errors="replace")
    if re.search(r"\.x?html?(\.en)?$", name):
        return page_text(text)
    if re.search(r"\.[1-9][a-z]*$", name):
        return manual_text(text)
    if name.endswith(".pod"):
        text = re.sub(r"^=(head\d|item|over|back|cut|pod|encoding|for|begin|end)\b *", "", text, flags=re.MULTILINE)
        return re.sub(r"[BCEFILSXZ]<+ ?([^<>]*?) ?>+", r"\1", text)
    return text


# ---------------------------------------------------------------- cleaning


def clean(text: str) -> str:
    """ASCII punctuation, no control characters, no runs of spaces inside lines or of empty lines."""
    text = text.translate(TYPOGRAPHY).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+$", "", re.sub(r"[\x00-\x08\x0b-\x1f\x7f\t]", " ", text), flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)  +", " ", re.sub(r"^ +(?=\S)", lambda m: m.group()[:16], text, flags=re.MULTILINE))
    text = re.sub(r"(\W)\1{5,}", lambda m: m.group(1) * 4, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def is_english(text: str) -> bool:
    """Whether enough of the words are the commonest English ones and nearly all characters ASCII."""
    sample = text[:40_000]
    words = re.findall(r"[a-z]+", sample.lower())
    ascii_share = sum(character < "\x80" for character in sample) / max(1, len(sample))
    return len(words) >= 60 and ascii_share > 0.97 and sum(word in ENGLISH for word in words) > 0.14 * len(words)


class Deduplicator:
    """Drops paragraphs that some earlier document had: menus, licences, the same page in two packages."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in text.split("\n"):
            squeezed = re.sub(r"\W+", "", paragraph)
            if len(squeezed) >= 40:
                key = hash(squeezed)
                if key in self.seen:
                    continue
                self.seen.add(key)
            kept.append(paragraph)
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def in_parts(text: str, size: int = 48_000) -> Iterator[str]:
    """A long text in documents of about `size` characters, cut at empty lines; whole where there are none."""
    start = 0
    while len(text) - start > 2 * size:
        end = text.find("\n\n", start + size)
        if end < 0:
            break
        yield text[start:end] + "\n"
        start = end + 2
    yield text[start:]


# ---------------------------------------------------------------- packages


def download(package: str, folder: Path) -> tuple[Path, str]:
    """Unpack a Debian package; returns where, and its version.

    Raises:
        RuntimeError: apt-get or dpkg failed; the message says what to run.
    """
    target = folder / package
    target.mkdir(parents=True, exist_ok=True)
    archives = list(folder.glob(f"{package}_*.deb"))
    if not archives:
        subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, check=False)
        archives = list(folder.glob(f"{package}_*.deb"))
    if not archives:
        raise RuntimeError(f"apt-get cannot download {package}: run apt-get update, or take it out of SOURCES")
    if subprocess.run(["dpkg", "-x", archives[0], target], capture_output=True, check=False).returncode:
        raise RuntimeError(f"dpkg cannot unpack {archives[0].name}: delete it and try again")
    return target, archives[0].name.split("_")[1]


def documents(root: Path, limit: int, drop_repeated: Deduplicator, code: bool = False) -> Iterator[str]:
    """Cleaned documents under `root`, at most `limit` characters of them, spread over its files."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    # in an order that has nothing to do with names, or a limit would keep the first subjects only
    files.sort(key=lambda path: zlib.crc32(str(path.relative_to(root)).encode()))
    taken = 0
    for path in files:
        name = str(path.relative_to(root))
        if SKIP_NAMES.search(name) or (not code and DEBIAN_LANGUAGES.search(name)) or path.stat().st_size > 60e6:
            continue
        text = read(path)
        if not text or (not code and not is_english(text)):
            continue
        for part in in_parts(drop_repeated(clean(text))):
            if len(part) >= 400 and (code or is_english(part)):
                yield part
                taken += len(part)
                if taken >= limit:
                    return


def collect(folder: Path, log=print) -> tuple[list[tuple[str, str]], list[dict]]:
    """All documents as (source, text), and one line of provenance per source."""
    drop_repeated = Deduplicator()
    found: list[tuple[str, str]] = []
    provenance = []
    for source in SOURCES:
        root, version = download(source.package, folder)
        texts = list(documents(root, int(source.megabytes * 1e6), drop_repeated))
        found += [(source.package, text) for text in texts]
        provenance.append({"source": source.package, "version": version, "documents": len(texts)})
        provenance[-1]["bytes"] = sum(map(len, texts))
        log("{source:28} {version:24} {documents:5} documents {bytes:10} bytes".format(**provenance[-1]))
    library = Path(json.__file__).parent.parent
    texts = []
    for text in documents(library, int(PYTHON_MEGABYTES * 1e6), drop_repeated, code=True):
        if text.count("\n") > 10:
            texts.append(text)
    found += [(PYTHON, text) for text in texts]
    version = ".".join(map(str, sys.version_info[:3]))
    provenance.append({"source": PYTHON, "version": version, "documents": len(texts), "bytes": sum(map(len, texts))})
    log("{source:28} {version:24} {documents:5} documents {bytes:10} bytes".format(**provenance[-1]))
    return found, provenance


# ---------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str], vocabulary: int):
    """A byte-level BPE tokenizer trained on `texts`: digits single, words with the space before them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def task_words() -> str:
    """The words that needles are named with, often enough that each becomes one token."""
    return "".join(f" {word}" for word in (*ADJECTIVES, *NOUNS)) * TASK_WORD_REPEATS


def write(
    folder: Path, vocabulary: int = VOCABULARY, cache: Path | None = None, log=print, tokenizer: Path | None = None
) -> dict:
    """Collect, tokenise and pack everything into `folder`; returns what corpus.json says.

    tokenizer: of a trained model, to be used instead of a new one.
    """
    import numpy as np
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found, provenance = collect(cache or Path(scratch), log)
    order = sorted(range(len(found)), key=lambda i: zlib.crc32(f"{i}/{found[i][1][:200]}".encode()))
    found = [found[i] for i in order]
    if tokenizer:
        tokenizer = Tokenizer.from_file(str(tokenizer))
    else:  # it sees every fourth document: a quarter of the text fixes 4096 tokens well enough
        tokenizer = train_tokenizer([text for _, text in found[::4]] + [task_words()], vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    split = {"train": [], "heldout": []}
    permissive = {source.package for source in SOURCES if source.permissive}
    shown: list[str] = []
    for source, text in found:
        held_out = zlib.crc32(text[:1000].encode()) % HELD_OUT_SHARE == 0
        if held_out and source in permissive and sum(map(len, shown)) + len(text) <= PERMISSIVE_BYTES:
            shown.append(text)
        split["heldout" if held_out else "train"].append(text)
    (folder / "heldout.txt").write_text("\n".join(shown), encoding="utf-8")
    report = {"vocabulary": tokenizer.get_vocab_size(), "sources": provenance}
    for name, texts in split.items():
        with open(folder / f"{name}.bin", "wb") as file:
            count = 0
            for i in range(0, len(texts), 256):
                for encoding in tokenizer.encode_batch_fast(texts[i : i + 256]):
                    ids = np.array([*encoding.ids, end], dtype=np.uint16)
                    file.write(ids.tobytes())
                    count += len(ids)
        report[name] = {"documents": len(texts), "bytes": sum(map(len, texts)), "tokens": count}
        log(f"{name}: {report[name]}")
    (folder / "corpus.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with tarfile.open(folder / "bundle.tar.xz", "w:xz", preset=9) as bundle:
        for name in ("tokenizer.json", "train.bin", "heldout.bin", "corpus.json"):
            bundle.add(folder / name, name)
    log(f"bundle.tar.xz: {(folder / 'bundle.tar.xz').stat().st_size / 1e6:.1f} MB")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m misa_vllm.train.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the corpus goes")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=f"tokens, default {VOCABULARY}")
    parser.add_argument("--cache", type=Path, help="keep the downloaded packages here")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of a trained model, to train it further")
    options = parser.parse_args(arguments)
    try:
        if options.tokenizer and not options.tokenizer.is_file():
            raise OSError(f"there is no {options.tokenizer}: name a model's tokenizer.json")
        if options.cache:
            options.cache.mkdir(parents=True, exist_ok=True)
        write(options.folder, options.vocabulary, options.cache, tokenizer=options.tokenizer)
    except (RuntimeError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
