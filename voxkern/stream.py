"""Sound as it is made: codes go through the codec as they come, and what was decoded once is never decoded again.

``generate`` decodes in the same units, so that a stream's chunks, whatever their sizes, are its sound to the last bit.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from .audio import Audio, Timings
from .generate import Request, Utterance
from .reference import VoxtralTTS
from .reference.config import N_SPECIAL_CODES

Speak = Callable[[Request, Iterator[int]], Generator[Sequence[Utterance]]]  # of a request, and when it is looked at


class Decoder:
    """Decodes one utterance's frames as they come."""

    def __init__(self, model: VoxtralTTS) -> None:
        """Begin an utterance."""
        self._config, self._stream = model.config, model.audio_tokenizer.stream()

    @torch.inference_mode()
    def decode(self, frames: list[Tensor], seed: int, ended: bool, prefill: float, speaking: float) -> Audio:
        """The sound of the next frames.

        Args:
            frames: int64 [37] each with the +2 offset; none give an empty sound.
            seed: see :class:`Audio`, also for `ended`.
            ended: the model said END.
            prefill: seconds that the prompt took, where it belongs to these frames.
            speaking: seconds that the frames took.
        """
        start = time.perf_counter()
        samples, codes = torch.empty(0), torch.empty(self._config.audio.n_codebooks, 0, dtype=torch.int64)
        if frames:
            codes = torch.stack(frames, dim=1) - N_SPECIAL_CODES  # [37, T]
            units = torch.split(codes.unsqueeze(0), self._stream.unit, dim=2)
            samples = torch.cat([self._stream.decode(unit).flatten() for unit in units]).float().cpu()
        decoding = time.perf_counter() - start
        return Audio(
            samples=samples.numpy(),
            sampling_rate=self._config.codec.sampling_rate,
            codes=codes.to(torch.int16).cpu().numpy(),
            seed=seed,
            ended=ended,
            timings=Timings(prefill, speaking, decoding, prefill + speaking + decoding),
        )


def chunk_sizes(first: int, most: int) -> Iterator[int]:
    """Frames of each chunk: `first`, then twice as many each time, up to `most`.

    So that the first is heard soon, and a next one is ready before the last is over if a frame takes less than half of
    its own length.
    """
    while True:
        yield first
        first = min(2 * first, most)


def stream_parts(model: VoxtralTTS, parts: list[Request], speak: Speak, sizes: Iterator[int]) -> Iterator[Audio]:
    """Speak parts one after the other, in chunks; the last chunk may be empty, and says how the whole ended.

    Args:
        model: the host.
        parts: at least one.
        speak: gives a request's utterance after as many frames as it is asked for, and at its end.
        sizes: frames of each chunk; a part's last may have fewer.
    """
    ended, first_sound = True, None
    for part in parts:
        decoder, n_done, prefill = Decoder(model), 0, 0.0
        clock = time.perf_counter()
        with closing(speak(part, accumulate(sizes))) as speaking:
            for (utterance,) in speaking:
                prefill = 0.0 if n_done else utterance.prefill_seconds
                over = utterance.ended or len(utterance.frames) == part.max_frames
                ended = ended and (utterance.ended or not over)
                frames, last = utterance.frames[n_done:], over and part is parts[-1]
                if frames or last:
                    speaking_for = time.perf_counter() - clock - prefill
                    chunk = decoder.decode(frames, part.seed, last and ended, prefill, speaking_for)
                    first_sound = chunk.timings.total if first_sound is None else first_sound
                    yield replace(chunk, timings=replace(chunk.timings, first_sound=first_sound))
                    n_done, clock = len(utterance.frames), time.perf_counter()
                if over:
                    break
