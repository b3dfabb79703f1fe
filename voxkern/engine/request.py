"""A request, and the state of a submitted request."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audio import Audio, Timings
from .kv_cache import PrefixKey


@dataclass(frozen=True)
class Request:
    """Describes one utterance to generate.

    Attributes:
        prompt: [T, dim], embeddings of voice and text in the model's dtype.
        seed: 0 .. 2^64 - 1, the seed of the noise.
        cfg_alpha: strength of the classifier-free guidance; 1 means no guidance.
        max_frames: the most frames to generate.
        steps: evaluations of the velocity network per frame.
        solver: "euler" or "ab2".
        prefix: key of the prompt's first rows, which requests with the same voice share; None shares nothing.
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
    """Holds what a submitted request has generated so far. A frame is taken once :meth:`take` has returned it.

    Attributes:
        request: the request itself.
        sampling_rate: samples per second.
        n_codebooks: codes per frame.
        codes: int16 [n_codebooks] of each frame that is not taken yet, without the +2 offset.
        samples: float32 [samples per frame] of each frame that is not taken yet.
        n_frames: number of frames generated so far, taken or not.
        ended: whether the model has generated END.
        finished: whether generation is over: by END, the frame limit, a cancel or an error.
        error: the error that the request's computation raised, or None.
        slot: the request's slot in the runner; None while it is not running.
        pages: the pages of the KV cache that the request holds.
        queue_seconds: seconds of frames for other requests while this request was queued.
        prefill_seconds: seconds of the prompt's prefill; :meth:`take` sets this and the next two to 0.
        frame_seconds: seconds of generating frames.
        codec_seconds: seconds of decoding frames.
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
        """Remove the next `n` frames, or all that are ready if these are fewer or `n` is None, and return them.

        ``Audio.ended`` is True only if END followed the last frame that is returned.
        """
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

    def not_finite(self) -> FloatingPointError:
        """Return the error for the case that the request's next frame has NaN or infinity."""
        dtype = self.request.prompt.dtype
        way_out = "check the weights, the voice's embeddings and cfg_alpha"
        if dtype == torch.float16:
            way_out = "try bfloat16 or float32"
        return FloatingPointError(
            f"frame {self.n_frames + 1} of the request with seed {self.request.seed} is not finite: the model's hidden "
            f"state, its logits or its latents hold NaN or infinity (dtype {str(dtype).removeprefix('torch.')}; "
            f"{way_out})"
        )
