"""Text and voice to the backbone's first input, by mistral-common's tokenizer and speech request."""

from collections.abc import Mapping
from pathlib import Path

from mistral_common.protocol.speech.request import SpeechRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from .checkpoint import CheckpointError


class Prompt:
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
