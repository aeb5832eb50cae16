"""Cleaning: what is repaired, what is left alone, that a second time changes nothing, and the counts of it."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.training import data, preprocess
from fastft.training.preprocess import clean, prepare

# What the steps act on, in orders and nestings nobody would think of.
PIECES = (
    *("&amp;", "&lt;", "&gt;", "&#60;", "&#x3C;", "&nbsp;", "&#8203;", "&", "lt;", "amp;", "#", "&;", "e&#769;"),
    *(
        "<b>",
        "</b>",
        "<br/>",
        "<",
        ">",
        "/",
        "<!--",
        "-->",
        "<script>",
        "</script>",
        "<![CDATA[",
        "]]>",
        "<p class='x'>",
    ),
    *("http://", "HTTPS://", "www.", "a.b", "user@", ":80", "?q=1", "/path", ".", ")", "\u0338", "\u0301", "\u200b"),
    *(
        "\x00",
        "\x1f",
        "\x85",
        "\u2028",
        "\u00a0",
        " ",
        "\n",
        "e\u0301",
        "\u212b",
        "\ud83d",
        "İ",
        "ǅ",
        "J\u030c",
        "ß",
        "x",
    ),
)
ANYTHING = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join)


@settings(max_examples=500, deadline=None)
@given(ANYTHING, st.booleans())
def test_cleaning_twice_is_cleaning_once(text, lower_case):
    once = clean(text, lower_case)
    assert clean(once, lower_case) == once
    assert once == once.strip() and "  " not in once and unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in once)
    once.encode()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="<&"), min_size=1), min_size=1)
)
def test_plain_words_stay_as_they_are(words):
    text = unicodedata.normalize("NFC", " ".join(words))
    if "://" not in text and "www." not in text.lower():
        assert clean(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("a < b && b > c", "AT&T & Co", "I <3 it <- really", "John <john@x.org> wrote", "if (a<b) c>d;", "5 &lt 6"),
        *("vector<int> v", "&unknown; &#x; &#99999999;", "a.b.c www. http:// ftp", "snake_case, C++, #1 @you 50% $5"),
        *(
            "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "北京 Grüße ñ",
            "Hello :-) ... --> !",
        ),
    ],
)
def test_what_is_not_broken_is_left_alone(text):
    assert clean(text) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("<p>One</p><p>two</p>", "One two"),
        ("<b>W</b>ord <A HREF='http://x.y'>link</a><br />next", "Word link next"),
        ("a<!-- hidden > -->b<style type='x'>p { color: red }</style>c", "a b c"),
        ("<script>if (a < b) c();</script>text</SCRIPT>", "text"),
        ("<!DOCTYPE html><?xml version='1.0'?><![CDATA[kept]]>", "kept"),
        ("Q&amp;A &quot;x&quot; &#39;y&#39; &eacute;&#233; &hellip;", "Q&A \"x\" 'y' éé …"),
        ("&amp;lt;b&amp;gt;twice escaped&amp;lt;/b&amp;gt;", "twice escaped"),
        ("a &amp;amp;amp; b &amp;amp;lt;3", "a & b <3"),
        ("see http://www.example.com/a/b?c=d#e, ok", "see example.com, ok"),
        ("(https://user:pw@example.com:8080/x.html).", "(example.com)."),
        ("www.example.com! WWW.Example.com/x", "example.com! Example.com"),
        ("http://münchen.example/ü", "münchen.example"),
        ("\ufeffzero\u200bwidth\x07\x1b[1m so\u00adft", "zerowidth[1m soft"),
        (" a\t\r\n b\u00a0\u2003c\x85d ", "a b c d"),
        ("e\u0301 \u212b", "é Å"),
        ("half \ud83d character", "half character"),
        ("<br>&nbsp;\u200b", ""),
    ],
)
def test_what_is_broken_is_mended(text, cleaned):
    assert clean(text) == cleaned


def test_lower_case_is_asked_for():
    assert clean("Good FILM İ") == "Good FILM İ"
    assert clean("Good FILM <B>ÄÖ</B>", lower_case=True) == "good film äö"


@pytest.mark.parametrize(
    ("piece", "end"),
    [
        *(
            (piece, "")
            for piece in ("<!--", "<script>", "<b", "http://", "www.", "&#", "&amp;", "<", "a@", "http://a/.")
        ),
        *((piece, "") for piece in ("<p ", " ", "&lt;", "amp;", "www.a.", "#38;")),
        ("<", "b>"),  # a tag in a tag in a tag
    ],
)
def test_time_grows_with_the_length_not_its_square(piece, end):
    def seconds(count):
        start = time.perf_counter()
        clean("&" + piece * count + end * count)
        return time.perf_counter() - start

    few = min(seconds(1_000) for _ in range(3))
    assert min(seconds(16_000) for _ in range(2)) < 16 * 4 * few  # the square would be 256 times as long


# ---- whole data sets


def test_counts_say_what_each_step_did():
    texts = [
        "<b>Good</b> &amp; fine",
        "see http://x.org/abc  now",
        "a\x07b",
        "plain",
        "plain",
        "Plain",
        "<br>",
        " e\u0301",
    ]
    labels = ["p", "p", "n", "n", "n", "p", "n", "p"]
    prepared = prepare(data.load((texts, labels)), lower_case=True)
    assert prepared.examples.texts == ["good & fine", "see x.org now", "ab", "plain", "plain", "é"]
    assert prepared.examples.labels == ["p", "p", "n", "n", "p", "p"]
    assert prepared.counts == {
        "control_characters": 1,
        "unicode": 1,
        "html": 2,
        "urls": 1,
        "white_space": 2,
        "lower_case": 2,
        "empty": 1,
        "duplicates": 1,
        "conflicts": 1,
    }
    assert prepared.conflicts == ["'plain' is 'n' (row 3) and 'p' (row 5)"]
    assert prepared.examples.place(5) == "data, row 7", "examples keep their places"
    lines = prepared.lines()
    assert (
        len(lines) == 10
        and "exact duplicates, left out: 1" in lines
        and "texts with links, cut to the host: 1" in lines
    )


def test_a_text_with_two_labels_is_kept_with_each_of_them():
    labels = ["n", "p", "p", "n", "q"]
    prepared = prepare(data.load((["same"] * 5, labels)))
    assert prepared.examples.labels == ["n", "p", "q"]
    assert prepared.counts["duplicates"] == 2 and prepared.counts["conflicts"] == 1
    assert prepare(data.load((["same"] * 5, labels)), deduplicate=False).examples.labels == labels


def test_only_three_conflicts_are_shown():
    texts = [f"text {row // 2}" for row in range(20)]
    prepared = prepare(data.load((texts, ["n", "p"] * 10)))
    assert prepared.counts["conflicts"] == 10 and len(prepared.conflicts) == 3


def test_texts_without_labels_are_cleaned_but_never_deduplicated():
    prepared = prepare(data.load(["a", "a", " ", "<p>a"], labels=False))
    assert prepared.examples.texts == ["a", "a", "a"] and prepared.counts["empty"] == 1


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="data: nothing is left of its 2 texts after cleaning"):
        prepare(data.load((["<br>", "&nbsp;"], [0, 1])))


# ---- what a trained folder keeps


def test_options_are_read_as_they_were_written(tmp_path):
    from fastft.training import files

    assert preprocess.read_options(tmp_path) is None
    options = preprocess.options(lower_case=True, max_length=128)
    files.write_json(tmp_path / preprocess.FILE, options)
    assert preprocess.read_options(tmp_path) == options


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: "),
        ("[]", "was not written by this version of fastft"),
        ('{"version": 99}', "was not written by this version of fastft"),
    ],
)
def test_options_of_another_version_are_not_guessed(tmp_path, content, message):
    (tmp_path / preprocess.FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{preprocess.FILE} {message}"):
        preprocess.read_options(tmp_path)
