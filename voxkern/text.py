"""Encode text and voice to token ids, with mistral-common's tokenizer and speech request; split long texts."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from .weight_files import CheckpointError

MAX_CHARS = 400  # about 30 s of English
ENDS = (
    # ends of sentences, also in Arabic, Urdu and Hindi; in Chinese and Japanese no space follows an end
    re.compile(r"""[.!?…؟۔।]+["'”’»)\]]*\s+|[。！？]+["'”’»」』)）\]]*\s*|\n\s*"""),
    re.compile(r"[,;:،؛—]\s+|[，、；：]\s*"),  # ends of clauses
    re.compile(r"\s+"),  # ends of words
)


class PromptEncoder:
    """Encodes requests as ``[BOS] [BEGIN_AUDIO] [AUDIO] x N [NEXT_AUDIO_TEXT] text [REPEAT_AUDIO_TEXT] [BEGIN_AUDIO]``.

    The model later reads the voice's N embeddings in place of the [AUDIO] tokens. The text is not normalised.
    """

    def __init__(self, path: Path, voices: Mapping[str, int]) -> None:
        """Read a ``tekken.json``.

        Args:
            path: the file.
            voices: prefix length N of each voice. If the file has a length for a voice, both lengths must be equal.

        Raises:
            CheckpointError: the file is not a tokenizer for speech, or has another length for a voice.
            ImportError: mistral-common is not installed.
        """
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        try:
            self.tokenizer = MistralTokenizer.from_file(path).instruct_tokenizer
        except Exception as error:  # mistral-common raises many kinds of exception for a wrong file
            raise CheckpointError(f"{path}: cannot be read as a tekken tokenizer ({error!r})") from error
        encoder = self.tokenizer.audio_encoder
        if encoder is None:
            raise CheckpointError(f"{path}: has no 'audio' section, so it cannot encode speech requests")
        known = encoder.audio_config.voice_num_audio_tokens or {}
        for name, length in voices.items():
            if known.get(name, length) != length:
                raise CheckpointError(f"{path}: voice {name!r} has {known[name]} tokens, but {length} embeddings")
        # this object and the tokenizer share one dict, so that add() extends both
        self.voices = encoder.audio_config.voice_num_audio_tokens = dict(voices)

    def add(self, voice: str, length: int) -> None:
        """Add a voice with a prefix of `length` rows."""
        self.voices[voice] = length

    def encode(self, text: str, voice: str) -> list[int]:
        """Return the token ids of a request.

        Raises:
            ValueError: `text` is empty, or `voice` is unknown.
            TypeError: `text` is not a string.
        """
        from mistral_common.protocol.speech.request import SpeechRequest

        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("text is empty")
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is unknown; there are {', '.join(sorted(self.voices)) or 'none'}")
        tokenized = self.tokenizer.encode_speech_request(SpeechRequest(input=text, voice=voice))
        return list(tokenized.tokens)


def split_text(text: str, max_chars: int | None) -> list[str]:
    """Split a text at the ends of sentences, into as few parts as possible.

    A sentence that is too long for a part is split at the ends of its clauses, such as commas. A clause that is too
    long is split between words. A word is never split. An abbreviation's full stop counts as the end of a sentence, but
    the text is split there only if the part is full.

    Args:
        text: the text; it is returned as it is if it has at most `max_chars` characters.
        max_chars: most characters of a part, unless one word is longer; None does not split the text.

    Returns:
        One or more parts. The joined parts are the text, except for white space around each part.

    Raises:
        TypeError: `text` is not a string.
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
    """Cut `text` at the first kind of end, and pieces that are still too long at the next kinds."""
    if len(text.rstrip()) <= max_chars or not ends:
        return [text]
    cuts = [0, *(match.end() for match in ends[0].finditer(text)), len(text)]
    return [piece for a, b in pairwise(cuts) if a < b for piece in _pieces(text[a:b], max_chars, ends[1:])]
