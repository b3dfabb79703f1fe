"""The arguments of ``generate``, ``stream`` and ``submit`` that all requests of one text share."""

import math
from dataclasses import dataclass

from .reference.solver import MAX_STEPS, SOLVERS
from .validation import check_int

CFG_ALPHA = 1.2  # default strength of the classifier-free guidance


@dataclass(frozen=True)
class GenerationParams:
    """Holds the arguments of one text; :meth:`voxkern.TTS.generate` describes the arguments in full.

    A text longer than `max_chars` is split into parts, and each part is one request with these arguments.

    Attributes:
        voice: name of the voice; None takes the default.
        seed: 0 .. 2^64 - 1; None draws a random seed.
        cfg_alpha: strength of the classifier-free guidance; 1 means no guidance.
        max_frames: most frames of a part; None takes the default.
        steps: evaluations of the velocity network per frame, 1..64; None takes the checkpoint's number.
        solver: "euler" or "ab2".
        max_chars: most characters of a part; None does not split the text.
    """

    voice: str | None
    seed: int | None
    cfg_alpha: float
    max_frames: int | None
    steps: int | None
    solver: str
    max_chars: int | None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        limits = {"steps": (1, MAX_STEPS), "seed": (0, 2**64 - 1), "max_chars": (1, None)}
        for name, (low, high) in limits.items():
            if (value := getattr(self, name)) is not None:
                check_int(name, value, low, high)
        alpha = self.cfg_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"cfg_alpha must be a finite number, got {alpha!r}")
