"""A request, and its state: what is to be generated, and how far that has come."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..audio import Audio, Timings
from .kv_cache import PrefixKey


@dataclass(frozen=True)
class Request:
    """One utterance to speak.

    Attributes:
        prompt: [T, dim], embeddings of voice and text.
        seed: of its noise.
        cfg_alpha: strength of the guidance.
        max_frames: where it is cut off.
        steps: evaluations of the velocity a frame.
        solver: "euler" or "ab2".
        prefix: what the prompt's first rows are made of; None for a prompt in one part.
    """

    prompt: Tensor
    seed: int
    cfg_alpha: float
    max_frames: int
    steps: int
    solver: str
    prefix: PrefixKey | None = None

    @property
    def n_tokens(self) -> int:
        """The most tokens that the request ever has in the KV cache."""
        return len(self.prompt) + self.max_frames


@dataclass(eq=False)
class RequestState:
    """A submitted request.

    Attributes:
        request: what is to be generated.
        sampling_rate: of the samples.
        n_codebooks: codes a frame.
        codes: int16 [n_codebooks] of each frame that was not taken yet.
        samples: float32 of each frame that was not taken yet.
        n_frames: generated so far, taken or not.
        ended: the model generated END.
        finished: nothing more will be generated.
        error: why, if something went wrong.
        slot: its place in the runner, or None.
        pages: of the KV cache that it holds.
        queue_seconds: of work for other requests before it was admitted.
        prefill_seconds: of its own prompt's work, that was not taken yet.
        frame_seconds: of frames, that was not taken yet.
        codec_seconds: of the codec, that was not taken yet.
    """

    request: Request
    sampling_rate: int
    n_codebooks: int
    codes: list[NDArray[np.int16]] = field(default_factory=list)
    samples: list[NDArray[np.float32]] = field(default_factory=list)
    n_frames: int = 0
    ended: bool = False
    finished: bool = False
    error: BaseException | None = None
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    frame_seconds: float = 0.0
    codec_seconds: float = 0.0

    def take(self, n: int | None = None) -> Audio:
        """Remove the next `n` frames, or all that there are; `ended` counts for the last of them all."""
        codes, self.codes = self.codes[:n], self.codes[len(self.codes[:n]) :]
        samples, self.samples = self.samples[:n], self.samples[len(self.samples[:n]) :]
        prefill, frames, codec = self.prefill_seconds, self.frame_seconds, self.codec_seconds
        self.prefill_seconds = self.frame_seconds = self.codec_seconds = 0.0
        return Audio(
            samples=np.concatenate([np.empty(0, np.float32), *samples]),
            sampling_rate=self.sampling_rate,
            codes=np.stack(codes, axis=1) if codes else np.empty((self.n_codebooks, 0), np.int16),
            seed=self.request.seed,
            ended=self.ended and not self.codes,
            timings=Timings(prefill, frames, codec, self.queue_seconds + prefill + frames + codec),
        )
