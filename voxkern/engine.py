"""Many requests share the machine, frame by frame: they join and leave between frames.

There is no thread behind it. Whoever waits for something to be said does a step for everybody, one at a time, and the
others wait for its end: calls from several threads are safe, and there is nothing to shut down.

Requests are admitted in their order, each with all pages that it may ever need: nobody holds pages while waiting for
more, and nobody is overtaken, so all are served.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .audio import Audio, Timings
from .cache import Prefixes
from .reference.config import N_SPECIAL_CODES
from .slots import Request, Said, Slots


class Sounds(Protocol):
    """The codec, for as many requests as there are slots.

    Attributes:
        sampling_rate: of what it makes.
    """

    sampling_rate: int

    def begin(self) -> None:
        """Nobody is there: the codec's weights are looked at anew."""

    def restart(self, slot: int) -> None:
        """Another request begins in a slot."""

    def decode(self, said: Said, slots: list[int]) -> Tensor:
        """The sound of a frame, [slots, samples]; rows other than of `slots` mean nothing."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        request: what is asked.
        codes: int16 [37] of each frame that was not taken yet.
        sound: float32 of each frame that was not taken yet.
        n_frames: said so far, taken or not.
        ended: the model said END.
        over: nothing more will be said.
        error: why, if something went wrong.
        slot: its place, or None.
        pages: of the cache that it holds.
        waited: seconds of work for others before it was admitted.
        prefill: seconds of its own prompt's work, that nobody took yet.
        speaking: seconds of frames.
        decoding: seconds of the codec.
    """

    request: Request
    _engine: "Engine" = field(repr=False)
    codes: list[NDArray[np.int16]] = field(default_factory=list)
    sound: list[NDArray[np.float32]] = field(default_factory=list)
    n_frames: int = 0
    ended: bool = False
    over: bool = False
    error: BaseException | None = None
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    waited: float = 0.0
    prefill: float = 0.0
    speaking: float = 0.0
    decoding: float = 0.0

    def cancel(self) -> None:
        """Say nothing more, and give the memory back: now, or at the end of the frame that is being made."""
        self._engine.cancel(self)

    def wait(self, n: int) -> None:
        """Work until `n` frames are there to be taken, or it is over.

        Raises:
            BaseException: what its own computation raised.
        """
        self._engine.work(lambda: self.over or len(self.codes) >= n)
        if self.error is not None:
            raise self.error

    def take(self, n: int | None = None) -> Audio:
        """The next `n` frames, or all that are there; `ended` counts for the last of them all."""
        codes, self.codes = self.codes[:n], self.codes[len(self.codes[:n]) :]
        sound, self.sound = self.sound[:n], self.sound[len(self.sound[:n]) :]
        prefill, speaking, decoding = self.prefill, self.speaking, self.decoding
        self.prefill = self.speaking = self.decoding = 0.0
        return Audio(
            samples=np.concatenate([np.empty(0, np.float32), *sound]),
            sampling_rate=self._engine.sounds.sampling_rate,
            codes=np.stack(codes, axis=1) if codes else np.empty((self._engine.n_codebooks, 0), np.int16),
            seed=self.request.seed,
            ended=self.ended and not self.codes,
            timings=Timings(prefill, speaking, decoding, self.waited + prefill + speaking + decoding),
        )


class Engine:
    """Requests that share a model.

    Attributes:
        slots: that run them.
        sounds: that make them heard.
        prefixes: of voices, in the cache.
        n_codebooks: of a frame.
    """

    def __init__(self, slots: Slots, sounds: Sounds, n_codebooks: int) -> None:
        """Nobody is there."""
        self.slots, self.sounds, self.n_codebooks = slots, sounds, n_codebooks
        self.prefixes = Prefixes(slots.pool)
        self._queue: deque[Job] = deque()
        self._cancelled: deque[Job] = deque()
        self._there: dict[int, Job] = {}  # by slot
        self._late: list[Report] = []  # one at the most
        self._turn = threading.Lock()  # of whoever works
        self._news, self._n_turns = threading.Condition(), 0

    @property
    def n_waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._queue)

    @property
    def n_running(self) -> int:
        """Requests that are."""
        return len(self._there)

    def submit(self, request: Request) -> Job:
        """Queue a request; it runs while somebody waits.

        Raises:
            ValueError: it could never be admitted.
        """
        if request.n_tokens > self.slots.max_tokens:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_frames} frames are {request.n_tokens} "
                f"tokens, but a request may have {self.slots.max_tokens} (cache_tokens); split the text or lower "
                "max_frames"
            )
        job = Job(request, self)
        self._queue.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """See :meth:`Job.cancel`. Never waits: a collected iterator may call it at any time, in any thread."""
        self._cancelled.append(job)
        self._sweep()

    def work(self, ready: Callable[[], bool], on_step: Callable[[], None] | None = None) -> None:
        """Step, or wait for who is stepping, until `ready`; `on_step` is called after each own step.

        Raises:
            RuntimeError: nobody is left, and still it is not.
        """
        stepped = False

        def step() -> None:
            nonlocal stepped
            stepped = not ready()  # looked at again: another thread's turn may have ended it just now
            if stepped and not self._there and not self._queue:
                raise RuntimeError("nobody is left to say what is waited for")
            if stepped:
                self._step()

        while not ready():
            seen = self._n_turns
            if self._take_turn(step):
                self._sweep()
                if on_step is not None and stepped:
                    on_step()
                continue
            with self._news:
                self._news.wait_for(lambda: self._n_turns != seen)  # noqa: B023, it is called at once

    def _sweep(self) -> None:
        """Free what was cancelled, unless somebody is at work, who then does it."""
        while self._cancelled and self._take_turn(self._drop_cancelled):
            pass

    def _take_turn(self, work: Callable[[], None]) -> bool:
        """Do some work, if nobody else is at it."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            work()
        finally:
            self._turn.release()
            with self._news:
                self._n_turns += 1
                self._news.notify_all()
        return True

    @torch.inference_mode()
    def _step(self) -> None:
        """Who was cancelled leaves, who is next joins, everybody says a frame, which is decoded and delivered."""
        start = time.perf_counter()
        self._drop_cancelled()
        self._admit()
        if self._there:
            try:
                self._frame(start)
            except BaseException as error:  # in what is everybody's: nobody can say whose fault it was
                for job in list(self._there.values()):
                    self._finish(job, error)
                if not isinstance(error, Exception):
                    raise
        for job in list(self._queue):
            job.waited += time.perf_counter() - start

    def _frame(self, start: float) -> None:
        """A frame of everybody; `start` is when the step began."""
        said = self.slots.frame()
        spoken = time.perf_counter()
        reports = [*self._late, Report(dict(self._there), said, self.sounds.decode(said, sorted(self._there)))]
        # somebody's first sound is worth a wait of the host's
        late = self.slots.late and all(job.n_frames for job in self._there.values())
        self._late = [reports.pop()] if late else []
        read = [line for report in reports for line in report.read()]
        end = time.perf_counter()
        for job in self._there.values():
            job.speaking += spoken - start
            job.decoding += end - spoken
        for job, codes, sound in read:
            if not job.over:  # it may have been cancelled, or have ended, before this frame
                self._deliver(job, codes, sound)

    def _deliver(self, job: Job, codes: NDArray[np.int16] | None, sound: NDArray[np.float32]) -> None:
        job.ended = codes is None
        if codes is not None:
            job.n_frames += 1
            job.sound.append(sound)
            job.codes.append(codes)
        if job.ended or job.n_frames == job.request.max_frames:
            self._finish(job)

    def _admit(self) -> None:
        """The next ones in the queue, while there are slots and pages for the first of them."""
        while self._queue and len(self._there) < self.slots.n:
            job, start = self._queue[0], time.perf_counter()
            try:
                if not self._join(job):
                    return
            except BaseException as error:
                self._finish(job, error)
                if not isinstance(error, Exception):
                    raise
            else:
                job.prefill = time.perf_counter() - start
                job.speaking = -job.prefill  # which the step's own time has in it
            self._queue.remove(job)

    def _join(self, job: Job) -> bool:
        """Give a request its pages, run its prompt, and give it a slot; False if it must wait for pages."""
        request, slots = job.request, self.slots
        if not self._there:
            slots.begin()
            self.sounds.begin()
        n_shared = request.voice.n_tokens if request.voice is not None else 0
        shared, own = request.prompt[:n_shared], request.prompt[n_shared:]

        def run_shared(pages: list[int]) -> None:
            if n_shared:
                slots.prefill(shared, pages, 0)

        pages = self.prefixes.pages(request.voice, request.n_tokens, slots.stamp(), run_shared)
        if pages is None:
            return False
        job.pages = pages
        state = slots.prefill(own, pages, n_shared)
        job.slot = min(set(range(slots.n)) - self._there.keys())
        self._there[job.slot] = job
        self.sounds.restart(job.slot)
        slots.join(job.slot, request, state, pages)
        return True

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        while self._cancelled:
            job = self._cancelled.popleft()
            if job in self._queue:
                self._queue.remove(job)
            if not job.over:
                self._finish(job)

    def _finish(self, job: Job, error: BaseException | None = None) -> None:
        """Nothing more of a request, wherever it stands; what it held is free."""
        self.slots.pool.give_back(job.pages)
        job.pages, slot, job.slot = [], job.slot, None
        try:
            if slot is not None:
                del self._there[slot]
                self.slots.leave(slot)
            if not self._there:
                self._late = []
        finally:  # even on a GPU that is lost nobody waits for ever
            job.error, job.over = error, True  # the last: another thread may be looking


class Report:
    """What a frame said, on its way to the host: on a GPU it is waited for when it is read."""

    def __init__(self, jobs: dict[int, Job], said: Said, samples: Tensor) -> None:
        """`jobs` by slot, as they were when it was said."""
        self._jobs = jobs
        self._on_host = [_to_host(x) for x in (said.codes - N_SPECIAL_CODES, said.kept, samples)]
        self._ready = torch.cuda.Event() if samples.is_cuda else None  # type: ignore[no-untyped-call]
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(samples.device))

    def read(self) -> list[tuple[Job, NDArray[np.int16] | None, NDArray[np.float32]]]:
        """Each job's codes, None for an END, and sound."""
        if self._ready is not None:
            self._ready.synchronize()
        codes, kept, samples = (x.numpy() for x in self._on_host)
        return [
            (job, codes[i].astype(np.int16) if kept[i] else None, samples[i].astype(np.float32))
            for i, job in self._jobs.items()
        ]


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()  # the next frame may write over it before it is read
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
