"""The arguments of ``generate``, ``stream`` and ``submit`` that all requests of one text share."""

from dataclasses import dataclass

from .reference.solver import MAX_STEPS, SOLVERS
from .validation import to_float, to_int

CFG_ALPHA = 1.2  # default strength of the classifier-free guidance
LIMITS: dict[str, tuple[int, int | None]] = {  # the smallest and the largest value of each integer argument
    "steps": (1, MAX_STEPS), "seed": (0, 2**64 - 1), "max_chars": (1, None), "max_frames": (1, None),
}  # fmt: skip


@dataclass(frozen=True)
class GenerationParams:
    """Holds the arguments of one text; :meth:`voxkern.TTS.generate` describes the arguments in full.

    A text longer than `max_chars` is split into parts, and each part is one request with these arguments.

    Attributes:
        voice: name of the voice; None takes the default.
        seed: 0 .. 2^64 - 1; None draws a random seed.
        cfg_alpha: strength of the classifier-free guidance; 1 means no guidance.
        max_frames: the most frames that a part may have; None takes the default.
        steps: evaluations of the velocity network per frame, 1..64; None takes the checkpoint's number.
        solver: "euler" or "ab2".
        max_chars: the most characters that a part may have; None does not split the text.
    """

    voice: str | None
    seed: int | None
    cfg_alpha: float
    max_frames: int | None
    steps: int | None
    solver: str
    max_chars: int | None

    def __post_init__(self) -> None:
        if self.voice is not None and not isinstance(self.voice, str):
            raise TypeError(f"voice must be a string, got {type(self.voice).__name__}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        # the class is frozen, so numbers of NumPy are replaced by Python's through object.__setattr__
        for name, (low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, to_int(name, value, low, high))
        object.__setattr__(self, "cfg_alpha", to_float("cfg_alpha", self.cfg_alpha))
