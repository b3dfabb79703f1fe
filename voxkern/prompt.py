"""Make the prompts of requests: the tokens of a text, with a voice's embeddings in place of the [AUDIO] tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import VoxtralTTS
from .text import PromptEncoder
from .voice import check_rows, default_first

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
