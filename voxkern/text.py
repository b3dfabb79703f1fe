"""Split texts: into parts for the model, and into sentences while a text arrives."""

import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import regex

MAX_CHARS = 400  # about 30 s of English
BYTE_ORDER_MARK = "\ufeff"
END_LOOKAHEAD = 3  # characters after the end of a sentence that must be known before the end is certain
NO_END = re.compile(r"[\w ,]*")  # texts in which no sentence ends, which need no analysis

# The classes of the characters around a place decide whether a text may be cut there. The name of a class is one ASCII
# character. A character of the text belongs to the first class that matches it. The properties in ``\p{..}`` are those
# of UAX #14 (lb, line breaks), UAX #29 (GCB, grapheme clusters) and Unicode.
CLASSES = {
    "n": r"\n-\r\x85\u2028\u2029",  # new lines
    "t": r"\t\x1c-\x1f",  # other control characters that are white space
    "g": r"\xa0\u2007\u202f",  # spaces that forbid a line break
    "s": r"\p{Zs}",  # other spaces
    "j": r"\u200d",  # the zero width joiner, as in emoji
    "x": r"\p{GCB=Extend}\p{GCB=SpacingMark}",  # combining marks, vowel signs, variation selectors
    "e": r"…‥⋯",
    "d": r".․",
    "D": r"．﹒",  # full-width full stops, which are also decimal points
    "!": r"!?",
    "T": r"\p{STerm}",  # other ends of sentences, such as 。！？ and the danda: no space needs to follow
    ",": r",;:،؛",
    "C": r"\p{Term}",  # other ends of clauses, such as 、，：； and the Tibetan shad: no space needs to follow
    ")": r"\p{lb=CP}\p{lb=IS}",
    "]": r"\p{lb=CL}\p{lb=EX}\p{Pe}",  # closing brackets of ideographic text
    "/": r"\p{lb=SY}",
    "f": r"\p{Pf}",  # quotation marks that close in most languages
    "i": r"\p{Pi}",  # quotation marks that open in most languages
    "q": r"\p{lb=QU}",  # undirected quotation marks: they open or close
    "O": r"（［｛｟「『【〈《〔〖〘〚｢",
    "o": r"\p{lb=OP}",
    "b": r"\p{lb=PR}\p{lb=BB}",  # signs that stand before a number or word, such as $
    "p": r"\p{lb=PO}",  # signs that stand after a number, such as %
    "z": r"\p{lb=ZW}",  # zero width space
    "w": r"\p{lb=GL}\p{lb=WJ}",  # characters that forbid a line break on both sides
    "m": r"\p{lb=B2}",  # em dash
    "k": r"\p{lb=NS}\p{lb=CJ}\p{lb=IN}",  # do not begin a line: small kana, prolonged sound and iteration marks
    "h": r"\p{lb=BA}\p{lb=HY}\p{Pd}\xad",  # hyphens, and marks between words such as the Tibetan tsheg
    "R": r"\p{RI}",  # halves of flag emoji
    "P": r"\p{GCB=Prepend}",  # marks that belong to the character after them
    "L": r"\p{lb=JL}",  # leading letters of Hangul syllables
    "V": r"\p{lb=JV}\p{lb=JT}",  # vowels and trailing letters of Hangul syllables
    "H": r"\p{lb=H2}\p{lb=H3}",  # Hangul syllables
    "I": r"\p{lb=ID}\p{lb=EB}\p{lb=EM}",  # ideographs, kana, emoji
    "A": r"\p{L}",
    "N": r"\p{N}",
    "a": r"\0-\U0010ffff",  # all other characters
}
WHITE, MARKS, CLOSERS = "ngst", "jx", ")]fiqg"
SENTENCE_MARKS, CLAUSE_MARKS = "edD!T", ",Cm"
NEVER_FIRST = WHITE + MARKS + "dD!T,C)]/"  # `_CutPlaces.allowed` forbids a cut before one of these
ATTACHED = "efhkpqwzV"  # `_CutPlaces.allowed` allows a cut before one of these only after white space

Mask = NDArray[np.bool_]


def split_text(text: str, max_chars: int | None) -> list[str]:
    """Split a text at the ends of sentences, into as few parts as possible.

    A sentence that is too long for a part is split at the ends of its clauses, such as commas. A clause that is too
    long is split between words. A word that is too long is split where Unicode allows a line break, such as between
    ideographs or after a hyphen. A piece that is still too long is split at any white space, and then between any
    grapheme clusters, which a reader sees as characters. The text is split only where a part is full. A new line and an
    abbreviation's full stop count as ends of sentences.

    A split leaves no closing mark at the start of a part, and no opening mark at the end of a part. Only splits at new
    lines, at any white space and between any grapheme clusters may break this rule.

    Time and memory grow linearly with the text.

    Args:
        text: the text; it is returned as it is if it has at most `max_chars` characters.
        max_chars: the most characters that a part may have, unless one grapheme cluster is longer. None does not split
            the text.

    Returns:
        One or more parts. Joined, they are the text, without the white space around each part. Parts of only byte
        order marks and white space are left out, because they are not spoken. A text of more than `max_chars`
        characters, all white space or byte order marks, gives ``[""]``.

    Raises:
        ValueError: `text` has a lone surrogate.
        TypeError: `text` is not a string.
    """
    check_text(text)
    if max_chars is None or len(text) <= max_chars:
        return [text]
    if is_blank(text):
        return [""]
    starts, ends = _pieces(text, max_chars)
    n_pieces = len(starts)
    # a part that begins with piece i ends before piece following[i]; a piece that is too long is a part by itself
    following = np.searchsorted(ends, starts + max_chars, side="right")
    following = np.maximum(following, np.arange(1, n_pieces + 1)).tolist()
    firsts, piece = [], 0
    while piece < n_pieces:
        firsts.append(piece)
        piece = following[piece]
    bounds = np.array([*firsts, n_pieces])
    parts = [text[a:b] for a, b in zip(starts[bounds[:-1]].tolist(), ends[bounds[1:] - 1].tolist(), strict=True)]
    return [part for part in parts if part[0] != BYTE_ORDER_MARK or not is_blank(part)]


def split_sentences(text: str) -> tuple[list[str], str]:
    """Return the sentences of a text that later text cannot change, and the rest of the text.

    The end of a sentence is certain when :data:`END_LOOKAHEAD` characters follow it. So the ends of sentences do not
    depend on the pieces in which a text arrives, if each piece is appended to the rest.

    Returns:
        The complete sentences without the white space around each, and the rest of the text.

    Raises:
        ValueError: `text` has a lone surrogate.
        TypeError: `text` is not a string.
    """
    check_text(text)
    sentences = []
    while len(text) >= END_LOOKAHEAD and NO_END.fullmatch(text) is None and (end := _first_end(text)):
        sentences.append(text[:end].strip())
        text = text[end:]
    return [sentence for sentence in sentences if not is_blank(sentence)], text


def _first_end(text: str) -> int:
    """Return the end of the first sentence, or 0 if no end is certain."""
    for n in _doubling(64, len(text)):  # so the time is in proportion to the sentence, not to the text
        places = _CutPlaces(text[:n])
        ends = np.flatnonzero(places.sentences()[:-END_LOOKAHEAD])
        ends = ends[ends > places.start]
        if len(ends):
            return int(ends[0])
    return 0


def _doubling(first: int, last: int) -> Iterator[int]:
    """Yield `first`, 2 `first`, 4 `first`, ..; stop after the first number that is at least `last`."""
    while first < last:
        yield first
        first *= 2
    yield first


def check_text(text: object) -> None:
    """Raise an error if `text` is not a string, or if UTF-8 cannot encode it."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"text has a lone surrogate, U+{code:04X}, at position {error.start}") from None


def is_blank(text: str) -> bool:
    """Return whether a text has only white space and byte order marks."""
    return not text.replace(BYTE_ORDER_MARK, "").strip()


def _pieces(text: str, max_chars: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a text into the pieces that parts are made of.

    At first, the whole text is one piece. Pieces that are too long are cut at all places of the first kind, pieces that
    are still too long at all places of the second kind, and so on.

    Returns:
        The start of each piece, and its end before any trailing white space.
    """
    places = _CutPlaces(text)
    start, end = places.start, int(places.solid_end[-1])
    cuts = np.array([start, end])
    is_cut = np.zeros(len(text) + 1, np.bool_)
    is_cut[cuts] = True
    for find in places.kinds():
        too_long = places.solid_end[cuts[1:]] - cuts[:-1] > max_chars
        if not too_long.any():
            break
        is_cut[start:end] |= find()[start:end] & np.repeat(too_long, np.diff(cuts))
        cuts = np.flatnonzero(is_cut)
    return cuts[:-1], places.solid_end[cuts[1:]]


class _CutPlaces:
    """Finds the places where a text of T characters may be cut, from the ends of sentences to grapheme clusters.

    Position p lies before character p. All arrays have one entry per position, [T + 1]. Each kind of place takes a
    fixed number of passes over the text, so that the time does not depend on the text's content.

    Attributes:
        before, after: class of the character before and after each position; the text's edges count as new lines.
        solid_end: for each position p, the end of the last character before p that is not white space; 0 if all
            characters before p are white space.
        spaced: whether white space stands before each position.
        start: position of the first character that is not white space.
    """

    def __init__(self, text: str) -> None:
        classes = _classify(text)
        self.text = text
        self.before, self.after = np.insert(classes, 0, ord("n")), np.append(classes, np.uint8(ord("n")))
        self.solid_end = _last(~_is_in(self.before, WHITE))
        self.spaced = self.solid_end < np.arange(len(text) + 1)
        self.start = int(np.argmin(_is_in(self.after, WHITE)))

    def kinds(self) -> list[Callable[[], Mask]]:
        """Return the functions that find the places of each kind, the best kind first."""
        return [
            self.sentences, self.clauses, self.words, self.line_breaks, self.spaces, self.neat_clusters, self.clusters,
        ]  # fmt: skip

    def sentences(self) -> Mask:
        """Find the ends of sentences. A new line is one too, unless a closing bracket or a mark such as 。 follows."""
        point = _is_in(self.before, "D") & ~_is_in(self.after, "N")
        ellipsis = _is_in(self.before, "e")
        sure = _is_in(self.before, "T") | point | (ellipsis & np.roll(ellipsis, 1))
        line = (_last(_is_in(self.before, "n")) > self.solid_end) & ~_is_in(self.after, WHITE + MARKS + "TC)]")
        return self._ends(SENTENCE_MARKS, sure) | line

    def clauses(self) -> Mask:
        return self._ends(CLAUSE_MARKS, _is_in(self.before, "C"))

    def words(self) -> Mask:
        return (_last(_is_in(self.before, "nst")) > self.solid_end) & self.allowed

    def line_breaks(self) -> Mask:
        """Find where UAX #14 allows a line break without a space, such as around ideographs and after hyphens."""
        base = _last(~_is_in(self.before, MARKS))
        pairs: Mask = _break_pairs()[self.before[base], self.after] & (self.before != ord("j"))
        word = _is_in(np.roll(self.before, 1), MARKS + "AN/")
        return pairs | (word & _is_in(self.before, "h/") & _is_in(self.after, "A"))

    def spaces(self) -> Mask:
        """Find the ends of all white space, also before a closing mark. Spaces that forbid a line break count too."""
        return self.spaced & ~_is_in(self.after, WHITE + MARKS)

    def neat_clusters(self) -> Mask:
        """Find the starts of grapheme clusters at which a cut is `allowed`."""
        return self.cluster_starts & self.allowed

    def clusters(self) -> Mask:
        return self.cluster_starts

    @cached_property
    def cluster_starts(self) -> Mask:
        """Whether a grapheme cluster other than white space begins at each position."""
        is_start = np.ones(len(self.after), np.bool_)
        if _is_in(self.after, MARKS + "LPRV").any():  # without these, each character is a cluster
            lengths = np.fromiter(map(len, _patterns()[1].findall(self.text)), np.int64)
            is_start[:] = False
            is_start[np.cumsum(lengths)] = True
        return is_start & ~_is_in(self.after, WHITE)

    @cached_property
    def allowed(self) -> Mask:
        """Whether a cut is allowed at each position.

        No part may begin with a closing mark or end with an opening mark. Without white space between them, characters
        that belong together, such as a number and its percent sign, are not cut apart.
        """
        outside = _is_in(np.roll(self.after, -1), NEVER_FIRST)
        closing = _is_in(self.after, NEVER_FIRST) | (_is_in(self.after, "f") & outside)
        outside = _is_in(np.roll(self.before, 1), WHITE + "oO")
        opening = _is_in(self.before, "oO") | (_is_in(self.before, "i") & outside)
        attached = ~self.spaced & (_is_in(self.after, ATTACHED) | _is_in(self.before, "biw"))
        return ~(closing | opening[self.solid_end] | attached)

    def _ends(self, marks: str, sure: Mask) -> Mask:
        """Find where a run of `marks` ends a sentence or clause; closing quotation marks and brackets may follow it.

        White space must follow, unless the run has a mark that needs none. `sure` is true at the position directly
        after each such mark.
        """
        run_end = _last(~_is_in(self.before, CLOSERS + MARKS))[self.solid_end]
        run_start = _last(~_is_in(self.before, marks))[run_end]
        return (run_start < run_end) & (self.spaced | (_last(sure)[run_end] > run_start)) & self.allowed


def _is_in(classes: NDArray[np.uint8], letters: str) -> Mask:
    members = np.zeros(128, np.bool_)
    members[[*letters.encode()]] = True
    return members[classes]


def _last(mask: Mask) -> NDArray[np.int64]:
    """Return, for each position p, the last position <= p at which `mask` is true, or 0."""
    return np.maximum.accumulate(np.where(mask, np.arange(len(mask)), 0))


@cache
def _break_pairs() -> Mask:
    """Return a table of class pairs: whether a line may break between the two classes without white space (UAX #14).

    The table is indexed [before, after]. It allows no break between two letters (A), between a letter and a number (N),
    or at an undirected quotation mark (q).
    """
    may = np.zeros((128, 128), np.bool_)
    for before in "CHIL!TVekmz]":
        may[ord(before), [*b"AHILNOPRabimo"]] = True
    for before in CLASSES:
        if before not in WHITE + MARKS + "OPbioqw":
            may[ord(before), [*b"HILO"]] = True
    may[ord("L"), [*b"HL"]] = False  # a leading letter forms one Hangul syllable with the letter or syllable after it
    may[ord("m"), ord("m")] = False
    return may


@cache
def _patterns() -> tuple["regex.Pattern[str]", "regex.Pattern[str]"]:
    """Return two patterns: one for a character, with a group for each class, and one for a grapheme cluster."""
    import regex  # imported late, because the package must be importable without it

    classes = "|".join(f"([{members}])" for members in CLASSES.values())
    # \p{RI}{2} matches a flag. For each flag in a run, a plain \X counts again from the start of the run, which takes
    # quadratic time.
    return regex.compile(classes), regex.compile(r"\p{RI}{2}[\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}]*+|\X")


def _classify(text: str) -> NDArray[np.uint8]:
    """Return the class of each character; a space before a combining mark or joiner gets the class "a" (others)."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    is_used = np.zeros(codes.max() + 1, np.bool_)
    is_used[codes] = True
    used = np.flatnonzero(is_used)
    letters = np.frombuffer("".join(CLASSES).encode(), np.uint8)
    groups = [match.lastindex - 1 for match in _patterns()[0].finditer("".join(map(chr, used.tolist())))]
    table = np.zeros(len(is_used), np.uint8)
    table[used] = letters[groups]
    classes: NDArray[np.uint8] = table[codes]
    carries = _is_in(classes[:-1], "gs") & _is_in(classes[1:], MARKS)
    classes[:-1][carries] = ord("a")
    return classes
