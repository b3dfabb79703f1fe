"""Text and voice to the backbone's first input, by mistral-common's tokenizer and speech request."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from .checkpoint import CheckpointError

MAX_CHARS = 400  # some 30 s of English
ENDS = (
    # of sentences, Arabic, Urdu and Hindi ones too; after Chinese and Japanese ones there is no space
    re.compile(r"""[.!?…؟۔।]+["'”’»)\]]*\s+|[。！？]+["'”’»」』)）\]]*\s*|\n\s*"""),
    re.compile(r"[,;:،؛—]\s+|[，、；：]\s*"),  # of clauses
    re.compile(r"\s+"),  # of words
)


class PromptEncoder:
    """Encodes requests as ``[BOS] [BEGIN_AUDIO] [AUDIO] x N [NEXT_AUDIO_TEXT] text [REPEAT_AUDIO_TEXT] [BEGIN_AUDIO]``.

    The N rows of [AUDIO] are where the voice's N embeddings go. The text is encoded as it is: nothing is normalised.
    """

    def __init__(self, path: Path, voices: Mapping[str, int]) -> None:
        """Read a ``tekken.json``.

        Args:
            path: the file.
            voices: prefix length N of each voice; where the file knows the voice it must agree.

        Raises:
            CheckpointError: no tokenizer for speech, or another length of a voice.
        """
        try:
            self.tokenizer = MistralTokenizer.from_file(path).instruct_tokenizer
        except Exception as error:  # mistral-common raises whatever a wrong file makes it stumble over
            raise CheckpointError(f"{path}: cannot be read as a tekken tokenizer ({error!r})") from error
        encoder = self.tokenizer.audio_encoder
        if encoder is None:
            raise CheckpointError(f"{path}: has no 'audio' section, so it encodes no speech requests")
        known = encoder.audio_config.voice_num_audio_tokens or {}
        for name, length in voices.items():
            if known.get(name, length) != length:
                raise CheckpointError(f"{path}: voice {name!r} has {known[name]} tokens, its embedding {length} rows")
        self.voices = encoder.audio_config.voice_num_audio_tokens = dict(voices)  # one dict, which add() writes to

    def add(self, voice: str, length: int) -> None:
        """Know one more voice, of `length` rows."""
        self.voices[voice] = length

    def encode(self, text: str, voice: str) -> list[int]:
        """Token ids of a request.

        Raises:
            ValueError: an empty text, or an unknown voice.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("text is empty")
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is unknown; there are {', '.join(sorted(self.voices)) or 'none'}")
        tokenized = self.tokenizer.encode_speech_request(SpeechRequest(input=text, voice=voice))
        return list(tokenized.tokens)


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
