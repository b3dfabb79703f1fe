"""The scheduler: many requests share a model, which runs frame by frame; requests join and leave between frames.

A caller that waits for a frame runs it for all requests, and the callers in other threads wait until that frame is
done. Calls from several threads are safe. For asyncio callers one thread waits; it runs only while they have requests.

Requests are admitted in order, and an admitted request at once gets all pages that it may ever need. So no request
holds pages while it waits for more. No request is overtaken, and all requests are served.
"""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audio import Audio
from ..reference.config import N_SPECIAL_CODES, NOT_FINITE
from .codec_runner import CodecRunner
from .frame_thread import FrameThread
from .kv_cache import PrefixCache
from .request import Request, RequestState
from .runner import FrameOutput, ModelRunner


class Engine:
    """Runs requests that share a model.

    Attributes:
        runner: runs the model's prompts and frames.
        codec: decodes frames to samples.
        prefix_cache: the prefixes of prompts in the KV cache.
        n_codebooks: codes per frame.
        running: admitted requests by slot.
        frame_thread: runs frames for asyncio callers.
    """

    def __init__(self, runner: ModelRunner, codec: CodecRunner, n_codebooks: int) -> None:
        self.runner, self.codec, self.n_codebooks = runner, codec, n_codebooks
        self.prefix_cache = PrefixCache(runner.kv_cache)
        self.running: dict[int, RequestState] = {}
        self._queue: deque[RequestState] = deque()
        self._cancelled: deque[RequestState] = deque()
        self._pending: list[OutputCopy] = []  # a frame's outputs that the host has not read yet
        self._idle_copies: list[OutputCopy] = []  # memory of outputs that were read, to be used again
        self._frame_lock = threading.Lock()  # held by the thread that runs a frame
        self._pid = os.getpid()  # the process in which the frame lock was taken last
        self._frame_done, self._epoch = threading.Condition(), 0
        self.frame_thread = FrameThread()

    @property
    def n_waiting(self) -> int:
        """Number of requests that are not admitted yet."""
        return len(self._queue)

    @property
    def n_running(self) -> int:
        """Number of requests that are admitted and not finished."""
        return len(self.running)

    def submit(self, request: Request) -> RequestState:
        """Queue a request, and return its state; the request runs whenever a caller waits for frames.

        Raises:
            ValueError: the request has more tokens than the runner allows, so it could never be admitted. The runner's
                limit is the smallest of three: the model's `max_seq_len`, the tokens of the KV cache and the kernels'
                limit.
        """
        if request.n_tokens > self.runner.max_seq_len:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_frames} frames are {request.n_tokens} "
                f"tokens, but a request may have {self.runner.max_seq_len} (the smallest of the "
                "model's max_seq_len, cache_tokens and the kernels' limit); split the text or lower max_frames"
            )
        state = RequestState(request, self.codec.sampling_rate, self.n_codebooks)
        self._queue.append(state)
        return state

    def cancel(self, state: RequestState) -> None:
        """Stop a request and free its memory: now, or at the end of the frame in flight.

        This method never waits, because the garbage collection of a stream may call it at any time, in any thread.
        """
        self._cancelled.append(state)
        self._free_cancelled()

    def generate(self, requests: Sequence[Request], on_frame: Callable[[int], None] | None = None) -> list[Audio]:
        """Run requests side by side until all are finished, and return their audio in order.

        If one request fails, all requests of this call are cancelled.

        Args:
            requests: the requests; those without a free slot wait in the queue.
            on_frame: called with 1, 2, 3, .. after each frame that this call, not another thread, has run.

        Raises:
            FloatingPointError: a frame of a request has NaN or infinity in the hidden state, the logits or the latents.
            BaseException: the error that the computation of a request raised.
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
        """Run frames until `n` frames of a request can be taken, or the request is finished.

        The error of a request is raised only after all frames before the error have been taken.

        Raises:
            FloatingPointError: the request's next frame has NaN or infinity.
            BaseException: the error that the request's computation raised.
        """
        self.run_until(lambda: state.finished or len(state.codes) >= n)
        if state.error is not None and not state.codes:
            raise state.error

    def run_until(self, ready: Callable[[], bool], on_frame: Callable[[], None] | None = None) -> None:
        """Run frames until `ready` returns True, and wait while another thread runs a frame.

        `on_frame` is called after each frame that this call, not another thread, has run.

        Raises:
            RuntimeError: no request is queued or running, but `ready` still returns False; or this process was forked
                while a thread of its parent ran a frame.
        """
        ran = False

        def run() -> None:
            nonlocal ran
            ran = not ready()  # called again under the lock: another thread's frame may have changed the result
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
            if self._pid != os.getpid():  # the lock's holder does not exist in this process
                raise RuntimeError(
                    "this process was forked while another thread generated speech: load the model again in the child, "
                    "fork while nothing runs, or start the process by spawn"
                )
            with self._frame_done:
                self._frame_done.wait_for(lambda: self._epoch != seen)  # noqa: B023, the lambda is called at once

    def _free_cancelled(self) -> None:
        """Drop cancelled requests; if a frame is running, they are dropped when it is done."""
        while self._cancelled and self._try_exclusively(self._drop_cancelled):
            pass

    def _try_exclusively(self, work: Callable[[], None]) -> bool:
        """Run `work` unless a thread, this one included, holds the frame lock; return whether it ran."""
        if not self._frame_lock.acquire(blocking=False):
            return False
        if self._pid != os.getpid():  # forked while nothing ran, but perhaps while a thread held the condition
            self._pid, self._frame_done = os.getpid(), threading.Condition()
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
        """Run one frame for all requests, whatever the caller's autocast and default device are.

        Cancelled requests are dropped and waiting ones are admitted. Then one frame of each running request is
        generated, decoded and delivered. If ``runner.deferred`` is True, a frame is delivered by the next call,
        unless it is the first frame of some request.
        """
        start = time.perf_counter()
        with torch.autocast(self.runner.kv_cache.kv.device.type, enabled=False):
            self._drop_cancelled()
            self._admit()
            if self.running:
                try:
                    self._generate_and_deliver(start)
                except BaseException as error:  # the running requests share this work, so its error ends each of them
                    for state in list(self.running.values()):
                        self._finish(state, error)
                    if not isinstance(error, Exception):
                        raise
        for state in list(self._queue):
            state.queue_seconds += time.perf_counter() - start

    def _generate_and_deliver(self, start: float) -> None:
        """Generate and decode a frame of each running request, and deliver the frames that are not deferred.

        `start` is the time when the frame began, in seconds of ``time.perf_counter``.
        """
        new, codec_seconds = [], 0.0
        for output in self.runner.generate_frame():
            samples, generated = output.samples, time.perf_counter()
            if samples is None:
                samples = self.codec.decode(output)
                codec_seconds += time.perf_counter() - generated
            copy = self._idle_copies.pop() if self._idle_copies else OutputCopy(output, samples)
            copy.start({slot: self.running[slot] for slot in output.slots}, output, samples)
            new.append(copy)
        # The next call reads a deferred runner's frame, because reading it now would make the CPU wait for the device.
        # But if the frame is the first of some request, it is read now, so that the request's sound starts earlier.
        deferred = self.runner.deferred and all(state.n_frames for state in self.running.values())
        ready, self._pending = (self._pending, new) if deferred else (self._pending + new, [])
        read = [line for copy in ready for line in copy.read()]
        self._idle_copies += ready
        seconds = time.perf_counter() - start
        for state in self.running.values():
            state.frame_seconds += seconds - codec_seconds
            state.codec_seconds += codec_seconds
        for state, is_valid, codes, frame_samples in read:
            if not state.finished:  # otherwise the request was over before this frame
                self._deliver(state, is_valid, codes, frame_samples)

    def _deliver(
        self, state: RequestState, is_valid: bool, codes: NDArray[np.int16], samples: NDArray[np.float32]
    ) -> None:
        if not is_valid and codes[0] == NOT_FINITE - N_SPECIAL_CODES:
            self._finish(state, state.not_finite())
            return
        state.ended = not is_valid
        if is_valid:
            state.n_frames += 1
            state.samples.append(samples)
            state.codes.append(codes)
        if state.ended or state.n_frames == state.request.max_frames:
            self._finish(state)

    def _admit(self) -> None:
        """Admit requests in the queue's order, until the slots are full or the first request must wait for pages."""
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
                # the first frame's time, added later, includes the prefill, which must not be counted twice
                state.frame_seconds = -state.prefill_seconds
            self._queue.remove(state)

    def _start(self, state: RequestState) -> bool:
        """Allocate a request's pages, run its prompt and put it into a slot; return False if too few pages are free."""
        request, runner = state.request, self.runner
        if not self.running:
            self.codec.refresh_weights()  # first, because graphs of the runner may use the codec's memory
            runner.refresh_weights()
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
        """Finish a queued or running request, and free its pages and its slot."""
        self.runner.kv_cache.free(state.pages)
        state.pages, slot, state.slot = [], state.slot, None
        try:
            if slot is not None:
                del self.running[slot]
                self.runner.remove(slot)
            if not self.running:
                self._idle_copies += self._pending
                self._pending = []
        finally:  # runs even if the GPU is lost, so that no caller waits forever
            state.error, state.finished = error, True  # `finished` last, because other threads wait for it


class OutputCopy:
    """Copies a frame's output from the device to the host, without a wait, and holds it until the host reads it.

    On a GPU, the host's memory is pinned. The memory is allocated once, because allocating pinned memory takes long.
    """

    def __init__(self, output: FrameOutput, samples: Tensor) -> None:
        """Allocate memory for outputs of this form."""
        device = samples.device
        self._on_host = [
            torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=device.type == "cuda")
            for x in (output.codes, output.valid, samples)
        ]
        self._arrays = [x.numpy() for x in self._on_host]
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._states: dict[int, RequestState] = {}

    def start(self, states: dict[int, RequestState], output: FrameOutput, samples: Tensor) -> None:
        """Start to copy an output.

        Work that is launched later on the same stream may overwrite the output, because that work runs after the copy.

        Args:
            states: the output's requests by slot.
            output: the output.
            samples: the output's sound, fp32 [slots, samples_per_frame].
        """
        self._states = states
        for target, source in zip(self._on_host, (output.codes, output.valid, samples), strict=True):
            target.copy_(source, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(samples.device))

    def read(self) -> list[tuple[RequestState, bool, NDArray[np.int16], NDArray[np.float32]]]:
        """Wait for the copy; return each request's state, whether the frame is valid, codes and samples.

        The codes are int16 [37] without the +2 offset, see :class:`FrameOutput`.
        """
        if self._copied is not None:
            self._copied.synchronize()
        states, self._states = self._states, {}
        codes, valid, samples = self._arrays
        return [
            (state, bool(valid[i]), codes[i].astype(np.int16), samples[i].astype(np.float32))
            for i, state in states.items()
        ]
