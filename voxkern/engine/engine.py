"""The scheduler: many requests share a model, frame by frame, and join and leave between frames.

There is no thread behind it. A caller that waits for a frame runs it for all requests; the callers in other threads
wait until that frame is done. Calls from several threads are safe, and there is nothing to shut down.

Requests are admitted in their order, each with all pages that it may ever need: no request holds pages while it waits
for more, and none is overtaken, so all are served.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audio import Audio
from ..reference.config import N_SPECIAL_CODES
from .codec_runner import CodecRunner
from .kv_cache import PrefixCache
from .request import Request, RequestState
from .runner import FrameOutput, ModelRunner


class Engine:
    """Requests that share a model.

    Attributes:
        runner: runs the model's frames.
        codec: decodes frames to samples.
        prefix_cache: prompts' prefixes in the KV cache.
        n_codebooks: codes a frame.
        running: admitted requests by slot.
    """

    def __init__(self, runner: ModelRunner, codec: CodecRunner, n_codebooks: int) -> None:
        """No request is queued or running."""
        self.runner, self.codec, self.n_codebooks = runner, codec, n_codebooks
        self.prefix_cache = PrefixCache(runner.kv_cache)
        self.running: dict[int, RequestState] = {}
        self._queue: deque[RequestState] = deque()
        self._cancelled: deque[RequestState] = deque()
        self._pending: list[PendingOutput] = []  # one at the most
        self._frame_lock = threading.Lock()  # held by the thread that runs a frame
        self._frame_done, self._epoch = threading.Condition(), 0

    @property
    def n_waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._queue)

    @property
    def n_running(self) -> int:
        """Requests that are admitted."""
        return len(self.running)

    def submit(self, request: Request) -> RequestState:
        """Queue a request; it runs while a caller waits.

        Raises:
            ValueError: it could never be admitted.
        """
        if request.n_tokens > self.runner.max_seq_len:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_frames} frames are {request.n_tokens} "
                f"tokens, but a request may have {self.runner.max_seq_len} (cache_tokens); split the text or lower "
                "max_frames"
            )
        state = RequestState(request, self.codec.sampling_rate, self.n_codebooks)
        self._queue.append(state)
        return state

    def cancel(self, state: RequestState) -> None:
        """Stop a request and free its memory: now, or at the end of the frame that is being run.

        Never waits: a collected iterator may call it at any time, in any thread.
        """
        self._cancelled.append(state)
        self._free_cancelled()

    def generate(self, requests: Sequence[Request], on_frame: Callable[[int], None] | None = None) -> list[Audio]:
        """Run requests until they are finished; where one fails, all are cancelled.

        Args:
            requests: to run side by side.
            on_frame: called with the number of frames run, after each.

        Raises:
            BaseException: what the computation of a request raised.
        """
        states: list[RequestState] = []
        n_frames = itertools.count(1)
        try:
            for request in requests:
                states.append(self.submit(request))
            self.run_until(
                lambda: all(state.finished for state in states) or any(state.error for state in states),
                None if on_frame is None else lambda: on_frame(next(n_frames)),
            )
            for state in states:
                if state.error is not None:
                    raise state.error
        finally:
            for state in states:
                self.cancel(state)
        return [state.take() for state in states]

    def wait(self, state: RequestState, n: int) -> None:
        """Run frames until `n` of a request's can be taken, or it is finished.

        Raises:
            BaseException: what its own computation raised.
        """
        self.run_until(lambda: state.finished or len(state.codes) >= n)
        if state.error is not None:
            raise state.error

    def run_until(self, ready: Callable[[], bool], on_frame: Callable[[], None] | None = None) -> None:
        """Run frames, or wait while another thread runs one, until `ready`; `on_frame` is called after each own frame.

        Raises:
            RuntimeError: no request is queued or running, and `ready` is still false.
        """
        ran = False

        def run() -> None:
            nonlocal ran
            ran = not ready()  # looked at again: another thread's frame may have ended it just now
            if ran and not self.running and not self._queue:
                raise RuntimeError("no request is queued or running, but the awaited frames are missing")
            if ran:
                self.run_frame()

        while not ready():
            seen = self._epoch
            if self._try_exclusively(run):
                self._free_cancelled()
                if on_frame is not None and ran:
                    on_frame()
                continue
            with self._frame_done:
                self._frame_done.wait_for(lambda: self._epoch != seen)  # noqa: B023, it is called at once

    def _free_cancelled(self) -> None:
        """Drop cancelled requests, unless another thread runs a frame: it does so when the frame is done."""
        while self._cancelled and self._try_exclusively(self._drop_cancelled):
            pass

    def _try_exclusively(self, work: Callable[[], None]) -> bool:
        """Do some work, unless another thread does some; whether it was done."""
        if not self._frame_lock.acquire(blocking=False):
            return False
        try:
            work()
        finally:
            self._frame_lock.release()
            with self._frame_done:
                self._epoch += 1
                self._frame_done.notify_all()
        return True

    @torch.inference_mode()
    def run_frame(self) -> None:
        """Drop cancelled requests, admit waiting ones, generate, decode and deliver one frame of each running one."""
        start = time.perf_counter()
        self._drop_cancelled()
        self._admit()
        if self.running:
            try:
                self._generate_and_deliver(start)
            except BaseException as error:  # of work that all requests share: it cannot be laid to one of them
                for state in list(self.running.values()):
                    self._finish(state, error)
                if not isinstance(error, Exception):
                    raise
        for state in list(self._queue):
            state.queue_seconds += time.perf_counter() - start

    def _generate_and_deliver(self, start: float) -> None:
        """One frame of every running request, from codes to delivery; `start` is when the engine's frame began."""
        output = self.runner.generate_frame()
        generated = time.perf_counter()
        samples = self.codec.decode(output, sorted(self.running))
        pending = [*self._pending, PendingOutput(dict(self.running), output, samples)]
        # a request's first frame is read at once, which is worth a wait for the device
        deferred = self.runner.deferred and all(state.n_frames for state in self.running.values())
        self._pending = [pending.pop()] if deferred else []
        read = [line for one in pending for line in one.read()]
        end = time.perf_counter()
        for state in self.running.values():
            state.frame_seconds += generated - start
            state.codec_seconds += end - generated
        for state, codes, frame_samples in read:
            if not state.finished:  # it may have been cancelled, or have ended, before this frame
                self._deliver(state, codes, frame_samples)

    def _deliver(self, state: RequestState, codes: NDArray[np.int16] | None, samples: NDArray[np.float32]) -> None:
        state.ended = codes is None
        if codes is not None:
            state.n_frames += 1
            state.samples.append(samples)
            state.codes.append(codes)
        if state.ended or state.n_frames == state.request.max_frames:
            self._finish(state)

    def _admit(self) -> None:
        """Admit the next requests in the queue, while there are slots, and pages for the first of them."""
        while self._queue and len(self.running) < self.runner.n_slots:
            state, start = self._queue[0], time.perf_counter()
            try:
                if not self._start(state):
                    return
            except BaseException as error:
                self._finish(state, error)
                if not isinstance(error, Exception):
                    raise
            else:
                state.prefill_seconds = time.perf_counter() - start
                state.frame_seconds = -state.prefill_seconds  # which the frame's own time has in it
            self._queue.remove(state)

    def _start(self, state: RequestState) -> bool:
        """Give a request its pages, run its prompt, and give it a slot; False if it must wait for pages."""
        request, runner = state.request, self.runner
        if not self.running:
            runner.refresh_weights()
            self.codec.refresh_weights()
        n_shared = request.prefix.n_tokens if request.prefix is not None else 0
        shared, own = request.prompt[:n_shared], request.prompt[n_shared:]

        def run_shared(pages: list[int]) -> None:
            if n_shared:
                runner.prefill(shared, pages, 0)

        pages = self.prefix_cache.allocate_request(
            request.prefix, request.n_tokens, runner.weights_version(), run_shared
        )
        if pages is None:
            return False
        state.pages = pages
        hidden = runner.prefill(own, pages, n_shared)
        state.slot = min(set(range(runner.n_slots)) - self.running.keys())
        self.running[state.slot] = state
        self.codec.restart(state.slot)
        runner.add(state.slot, request, hidden, pages)
        return True

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        while self._cancelled:
            state = self._cancelled.popleft()
            if state in self._queue:
                self._queue.remove(state)
            if not state.finished:
                self._finish(state)

    def _finish(self, state: RequestState, error: BaseException | None = None) -> None:
        """Finish a request, queued or running, and free what it holds."""
        self.runner.kv_cache.free(state.pages)
        state.pages, slot, state.slot = [], state.slot, None
        try:
            if slot is not None:
                del self.running[slot]
                self.runner.remove(slot)
            if not self.running:
                self._pending = []
        finally:  # even on a GPU that is lost no caller waits for ever
            state.error, state.finished = error, True  # the last: another thread may be looking


class PendingOutput:
    """A frame's output on its way from the device to the CPU; reading it waits for the copy."""

    def __init__(self, states: dict[int, RequestState], output: FrameOutput, samples: Tensor) -> None:
        """`states` by slot, as they were when the frame was generated."""
        self._states = states
        self._on_host = [_to_host(x) for x in (output.codes - N_SPECIAL_CODES, output.valid, samples)]
        self._ready = torch.cuda.Event() if samples.is_cuda else None  # type: ignore[no-untyped-call]
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(samples.device))

    def read(self) -> list[tuple[RequestState, NDArray[np.int16] | None, NDArray[np.float32]]]:
        """Each request's codes, None for an END, and samples."""
        if self._ready is not None:
            self._ready.synchronize()
        codes, valid, samples = (x.numpy() for x in self._on_host)
        return [
            (state, codes[i].astype(np.int16) if valid[i] else None, samples[i].astype(np.float32))
            for i, state in self._states.items()
        ]


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()  # the next frame may write over it before it is read
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
