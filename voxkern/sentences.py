"""Long text in parts that can be spoken one after the other. Nothing in it is changed."""

import re
from itertools import pairwise

MAX_CHARS = 400  # some 30 s of English
ENDS = (
    # of sentences, Arabic, Urdu and Hindi ones too; after Chinese and Japanese ones there is no space
    re.compile(r"""[.!?…؟۔।]+["'”’»)\]]*\s+|[。！？]+["'”’»」』)）\]]*\s*|\n\s*"""),
    re.compile(r"[,;:،؛—]\s+|[，、；：]\s*"),  # of clauses
    re.compile(r"\s+"),  # of words
)


def split_text(text: str, max_chars: int | None) -> list[str]:
    """Parts of a text, cut at the ends of sentences; as few as fit.

    A sentence that is too long by itself is cut after commas and the like, and a clause between words; a word never.
    An abbreviation's full stop counts as an end, which matters only where a part is full there.

    Args:
        text: to be split where it is longer than `max_chars`.
        max_chars: of a part; None never splits.

    Returns:
        At least one part. But for the space between parts, they are the text.

    Raises:
        TypeError: `text` is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    if max_chars is None or len(text) <= max_chars:
        return [text]
    parts = [""]
    for piece in _pieces(text.strip(), max_chars, ENDS):
        if parts[-1] and len((parts[-1] + piece).rstrip()) > max_chars:
            parts.append("")
        parts[-1] += piece
    return [part.rstrip() for part in parts]


def _pieces(text: str, max_chars: int, ends: tuple[re.Pattern[str], ...]) -> list[str]:
    """Cut at the first kind of end, and what is still too long at the next."""
    if len(text.rstrip()) <= max_chars or not ends:
        return [text]
    cuts = [0, *(match.end() for match in ends[0].finditer(text)), len(text)]
    return [piece for a, b in pairwise(cuts) if a < b for piece in _pieces(text[a:b], max_chars, ends[1:])]
