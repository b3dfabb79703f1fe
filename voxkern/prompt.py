"""Make the prompts of requests: the tokens of a text, with a voice's embeddings in place of the [AUDIO] tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .reference import VoxtralTTS
from .reference.config import AudioModelConfig
from .text import BYTE_ORDER_MARK, check_text, is_blank
from .voice import check_rows, default_first
from .weight_files import CheckpointError

N_TEMPLATE = 5  # tokens of a prompt besides the voice and the text


@dataclass(frozen=True)
class Prompt:
    """Holds a request's prompt.

    Attributes:
        embeddings: [T, dim], what the backbone reads.
        voice: [N, dim], the voice's embeddings. All prompts of a voice hold the same tensor, not copies, because the
            prefix cache identifies a voice by its tensor.
        n_shared: number of rows at the start that all prompts of the voice share.
    """

    embeddings: Tensor
    voice: Tensor
    n_shared: int


class PromptEncoder:
    """Encodes requests as ``[BOS] [BEGIN_AUDIO] [AUDIO] x N [NEXT_AUDIO_TEXT] text [REPEAT_AUDIO_TEXT] [BEGIN_AUDIO]``.

    The model later reads the voice's N embeddings in place of the [AUDIO] tokens. The text is not normalised.
    """

    def __init__(self, path: Path, voices: Mapping[str, int], audio: AudioModelConfig, vocab_size: int) -> None:
        """Read a ``tekken.json``.

        Args:
            path: the file.
            voices: maps each voice's name to N, the number of its embeddings. If the file gives a number of tokens for
                a voice, that number must be N.
            audio: the model's configuration, for the ids of [AUDIO] and [BEGIN_AUDIO].
            vocab_size: number of token ids that the model can embed.

        Raises:
            CheckpointError: the file is not a tokenizer for speech, gives a voice another number of tokens than N, has
                other ids of [AUDIO] and [BEGIN_AUDIO] than the model, or has more ids than the model can embed.
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
        ids, n_ids = encoder.special_ids, self.tokenizer.tokenizer.n_words
        for token, key, of_file, of_model in (
            ("[AUDIO]", "audio_token_id", ids.audio, audio.audio_token_id),
            ("[BEGIN_AUDIO]", "begin_audio_token_id", ids.begin_audio, audio.begin_audio_token_id),
        ):
            if of_file != of_model:
                raise CheckpointError(f"{path}: {token} has id {of_file}, but the model's {key} is {of_model}")
        if n_ids > vocab_size:
            raise CheckpointError(f"{path}: has {n_ids} token ids, but the model's vocab_size is {vocab_size}")
        known = encoder.audio_config.voice_num_audio_tokens or {}
        for name, length in voices.items():
            if known.get(name, length) != length:
                raise CheckpointError(
                    f"{path}: gives voice {name!r} {known[name]} tokens, but the voice's file has {length} embeddings"
                )
        # this object and the tokenizer share one dict, so that add() and remove() change both
        self.voices = encoder.audio_config.voice_num_audio_tokens = dict(voices)

    def add(self, voice: str, length: int) -> None:
        """Add a voice that has `length` embeddings."""
        self.voices[voice] = length

    def remove(self, voice: str) -> None:
        """Remove a voice."""
        del self.voices[voice]

    def encode(self, text: str, voice: str) -> list[int]:
        """Return the token ids of a request. Byte order marks at the start of the text are left out.

        Raises:
            ValueError: `text` is empty or has a lone surrogate, or `voice` is unknown.
            TypeError: `text` is not a string.
        """
        from mistral_common.protocol.speech.request import SpeechRequest

        check_text(text)
        if is_blank(text):
            raise ValueError("text is empty")
        if voice not in self.voices:
            raise ValueError(f"voice {voice!r} is unknown; known voices: {', '.join(sorted(self.voices)) or 'none'}")
        request = SpeechRequest(input=text.lstrip(BYTE_ORDER_MARK), voice=voice)
        return list(self.tokenizer.encode_speech_request(request).tokens)


class PromptMaker:
    """Makes the prompts of a model with voices.

    Attributes:
        voices: maps each voice's name to its embeddings, [N, dim].
    """

    def __init__(self, model: VoxtralTTS, encoder: PromptEncoder, voices: dict[str, Tensor]) -> None:
        self.voices = voices
        self._model, self._encoder = model, encoder

    def add(self, name: str, rows: Tensor) -> None:
        """Add a voice with the given embeddings, [N, dim], converted to the model's dtype and device.

        Raises:
            ValueError: the embeddings have another shape, are not floating-point, or have a value that is not finite in
                the model's dtype.
        """
        self.voices[name] = self._converted(
            name, check_rows(rows, self._model.config.backbone.dim, _named(name))
        ).clone()
        self._encoder.add(name, len(rows))

    def remove(self, name: str) -> None:
        """Remove a voice; prompts that were made stay as they are.

        Raises:
            ValueError: no voice has this name.
        """
        if name not in self.voices:
            raise ValueError(f"name is {name!r}, but no voice has this name")
        self._encoder.remove(name)
        del self.voices[name]

    def count_tokens(self, text: str, voice: str | None) -> int:
        """Return the number of tokens of the prompt for one part of a text; the errors are those of :meth:`make`."""
        return len(self._encoder.encode(text, self._default() if voice is None else voice))

    def make(self, text: str, voice: str | None, positions: int) -> Prompt:
        """Make the prompt for one part of a text.

        Args:
            text: the text.
            voice: name of the voice; None takes the default.
            positions: the most tokens that the prompt and the frames may have together.

        Raises:
            ValueError: the text is empty or too long, or the voice is unknown or leaves no tokens for a text.
            TypeError: `text` is not a string.
        """
        voice = self._default() if voice is None else voice
        tokens = self._encoder.encode(text, voice)
        rows = self.voices[voice] = self._converted(voice, self.voices[voice])
        if len(tokens) >= positions:
            raise ValueError(_too_long(voice, len(rows), len(tokens), positions))
        audio = self._model.config.audio.audio_token_id
        ids = torch.tensor(tokens, dtype=torch.int64, device=rows.device)
        embeddings = self._model.embed_tokens(ids).clone()
        embeddings[ids == audio] = rows
        return Prompt(embeddings, rows, tokens.index(audio) + len(rows))

    def _converted(self, name: str, rows: Tensor) -> Tensor:
        """Return a voice in the model's dtype and on its device. A user may have cast or moved the model."""
        weight = self._model.norm.weight
        if (rows.dtype, rows.device) == (weight.dtype, weight.device):
            return rows
        return check_rows(rows.to(weight), rows.shape[1], _named(name))

    def _default(self) -> str:
        if not self.voices:
            raise ValueError(
                "the model has no voices: the checkpoint has no files in voice_embedding, or all voices were removed"
            )
        return default_first(self.voices, self._model.config.voices)[0]


def _named(voice: str) -> str:
    return f"voice {voice!r}"


def _too_long(voice: str, n_voice: int, n_tokens: int, positions: int) -> str:
    limit = (
        f"prompt and frames may have {positions} tokens together (the smallest of the model's max_seq_len, "
        "cache_tokens and the kernels' limit)"
    )
    if n_voice + N_TEMPLATE + 1 >= positions:
        return f"voice {voice!r} leaves no tokens for a text: it has {n_voice} embeddings, and {limit}"
    return f"text is too long: its prompt has {n_tokens} tokens, and {limit}. Split the text or lower max_chars"
