"""Tests of the engine: requests join, leave, fail and wait; no page is lost, and each request gets its own codes.

The fake model runner computes nothing. It writes each token into a page of the request. In every frame, it compares the
pages of each request with the request's tokens, so the content reveals a page that is shared wrongly.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from voxkern.engine.engine import Engine
from voxkern.engine.kv_cache import PAGE_SIZE, KVCache, PrefixKey
from voxkern.engine.request import Request, RequestState
from voxkern.engine.runner import FrameOutput
from voxkern.reference.config import END_AUDIO, N_SPECIAL_CODES

N_PAGES, N_SLOTS = 12, 4
SHARED = {
    0: 5,
    1: 64,
    2: 70,
    3: 150,
    4: 0,
    5: 70,
}  # voice -> how many of a prompt's first rows are shared
BAD_VOICE = 5
BROKEN = -1.0  # prefill raises for a prompt with a row of this value
REQUESTS = st.tuples(  # voice, tokens of text, frames, seed, broken
    st.sampled_from([None, *SHARED]),
    st.integers(1, 90),
    st.integers(1, 300),
    st.integers(0, 10**6),
    st.integers(0, 7).map(lambda n: n == 7),
)


def token(seed: int, i: int) -> int:
    """Return the token that a request with this seed generates in frame `i`; 0 means END."""
    return 0 if i == seed % 97 else 1 + (seed * 31 + i * 7) % 1000


@dataclass
class FakeRunner:
    """A model runner that writes each token where its keys and values would be stored."""

    deferred: bool
    n_slots: int = N_SLOTS
    max_seq_len: int = N_PAGES * PAGE_SIZE
    weights: int = 0
    fails: bool = False
    running: dict[int, SimpleNamespace] = field(default_factory=dict)
    engine: Engine | None = None
    cancelled_during_frame: list[RequestState] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=1)
        self.kv_cache = KVCache(config, N_PAGES, torch.float64, torch.device("cpu"))
        self.rows = self.kv_cache.kv.numpy()[0, :, 0, 0, :, 0]  # [pages, PAGE_SIZE]

    def refresh_weights(self) -> None:
        assert not self.running

    def weights_version(self) -> int:
        return self.weights

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        values = embeddings[:, 0].numpy()
        if (values == BROKEN).any():
            raise ArithmeticError("a broken prompt")
        for i, value in enumerate(values, n_past):
            self.rows[pages[i // PAGE_SIZE], i % PAGE_SIZE] = value + self.weights
        return embeddings[-1]

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        assert slot not in self.running
        tokens = list(request.prompt[:, 0].numpy() + self.weights)
        assert hidden[0] == request.prompt[-1, 0]
        self.running[slot] = SimpleNamespace(request=request, pages=pages, tokens=tokens, n=0, finished=False)

    def remove(self, slot: int) -> None:
        del self.running[slot]

    def generate_frame(self) -> Iterator[FrameOutput]:
        if self.fails:
            self.fails = False
            raise ArithmeticError("a broken frame")
        codes = torch.full((self.n_slots, 2), END_AUDIO - N_SPECIAL_CODES)
        valid = torch.zeros(self.n_slots, dtype=torch.int64)
        for slot, one in self.running.items():
            if one.finished:
                continue
            cached = self.rows[one.pages].ravel()[: len(one.tokens)]
            assert np.array_equal(cached, one.tokens), "another request wrote to a page of this one"
            value = token(one.request.seed, one.n)
            if value:
                codes[slot], valid[slot] = value, 1
                self.rows[one.pages[len(one.tokens) // PAGE_SIZE], len(one.tokens) % PAGE_SIZE] = value
                one.tokens.append(value)
                one.n += 1
            one.finished = not value or one.n == one.request.max_frames
        for state in self.cancelled_during_frame:
            self.engine.cancel(state)
        self.cancelled_during_frame.clear()
        yield FrameOutput(sorted(self.running), codes, valid)


class FakeCodecRunner:
    """A codec runner that decodes a frame to one sample."""

    sampling_rate = 1
    fails = False

    def refresh_weights(self) -> None:
        pass

    def restart(self, slot: int) -> None:
        assert slot in range(N_SLOTS)

    def decode(self, output: FrameOutput) -> Tensor:
        if self.fails:
            self.fails = False
            raise ArithmeticError("a broken codec")
        return output.codes[:, :1].double()


class Traffic(RuleBasedStateMachine):
    """Calls the engine in any order, as its callers may, and checks it after each frame."""

    events: ClassVar[Counter[str]] = Counter()

    @initialize(deferred=st.booleans())
    def begin(self, deferred: bool) -> None:
        self.runner = FakeRunner(deferred)
        self.engine = self.runner.engine = Engine(self.runner, FakeCodecRunner(), 2)
        self.voices = {voice: torch.full((1, 1), float(voice)) for voice in SHARED}
        self.states: list[RequestState] = []  # in the order of submission; finished ones are removed after each frame
        self.taken: dict[RequestState, list[int]] = {}
        self.short: set[RequestState] = set()  # the requests that had to wait for pages, each counted once

    def count(self, event: str, n: int = 1) -> None:
        type(self).events[event] += n

    @rule(asked=st.lists(REQUESTS, min_size=1, max_size=8))
    def submit(self, asked: list[tuple[int | None, int, int, int, bool]]) -> None:
        for voice, n_text, max_frames, seed, broken in asked:
            n_shared = SHARED.get(voice, 0)
            rows = torch.arange(n_shared + n_text, dtype=torch.float64).unsqueeze(1) + 0.25
            rows[:n_shared] += 0 if voice is None else float(self.voices[voice]) * 1000
            rows[n_shared:] += seed * 1e5
            if voice == BAD_VOICE:
                rows[0] = BROKEN
            if broken:
                rows[-1] = BROKEN
            shared = None if voice is None else PrefixKey.of(self.voices[voice], self.runner.weights, n_shared)
            state = self.engine.submit(Request(rows, seed, 1.0, max_frames, 1, "euler", shared))
            self.states.append(state)
            self.taken[state] = []
            self.count("joins")
            self.count("failures", broken or voice == BAD_VOICE)

    @rule()
    def submit_what_never_fits(self) -> None:
        request = Request(torch.zeros(10, 1), 0, 1.0, N_PAGES * PAGE_SIZE - 9, 1, "euler")
        with pytest.raises(ValueError, match=r"769 tokens, but a request may have 768 \(.*cache_tokens"):
            self.engine.submit(request)
        self.count("refusals")

    @precondition(lambda self: self.states)
    @rule(data=st.data(), during=st.booleans())
    def cancel(self, data: st.DataObject, during: bool) -> None:
        state = data.draw(st.sampled_from(self.states))
        if during and self.runner.running:
            self.runner.cancelled_during_frame.append(state)
        else:
            self.engine.cancel(state)
            assert state.finished
        self.count("cancels")

    @rule(n=st.integers(1, 40))
    def run(self, n: int) -> None:
        for _ in range(n):
            self._run_frame()

    @precondition(lambda self: self.runner.running)
    @rule(codec=st.booleans())
    def fail(self, codec: bool) -> None:
        """An error in shared work ends the running requests, and not the waiting ones."""
        running = set(self.engine.running.values())
        (self.engine.codec if codec else self.runner).fails = True
        self._run_frame()
        assert all(state.finished and isinstance(state.error, ArithmeticError) for state in running)
        assert not self.runner.running
        assert not any(state.finished for state in self.engine._queue)
        self.count("failures")

    @rule()
    def change_weights(self) -> None:
        """Running requests keep the old prefixes; later requests share none of them."""
        self.runner.weights += 1

    @rule(voice=st.sampled_from([*SHARED]), in_place=st.booleans())
    def change_voice(self, voice: int, in_place: bool) -> None:
        if in_place:
            self.voices[voice] += 10
        else:
            self.voices[voice] = self.voices[voice] + 10

    def _run_frame(self) -> None:
        before = {state: state.n_frames for state in self.engine.running.values()}
        # in a frame that fails, the fake runner raises before it cancels these requests, so they are not cancelled
        cancelled = [] if self.runner.fails else list(self.runner.cancelled_during_frame)
        self.engine._try_exclusively(self.engine.run_frame)
        self.engine._free_cancelled()
        for state, n in before.items():
            assert state.finished or state.n_frames == n + 1 or self.runner.deferred  # one more frame for each request
            assert state.finished or n >= 1  # the first frame is delivered by the call that admits the request
        assert all(state.finished for state in cancelled)  # cancelled during the frame, finished when it is done
        if self.engine.n_waiting and self.engine.n_running < N_SLOTS:
            self.count("page shortages", self.engine._queue[0] not in self.short)
            self.short.add(self.engine._queue[0])
        for state in self.states:
            self.taken[state] += [int(codes[0]) for codes in state.take().codes.T[:, :1]]
            if state.finished:
                self._check_finished(state)
        self.states = [state for state in self.states if not state.finished]

    def _check_finished(self, state: RequestState) -> None:
        self.count("leaves")
        seed, said = state.request.seed, self.taken.pop(state)
        assert said == [token(seed, i) for i in range(len(said))]
        assert 0 not in said
        if state.ended:
            assert len(said) == seed % 97
        assert len(said) <= state.request.max_frames
        assert state.error is None or isinstance(state.error, ArithmeticError)
        assert not state.pages
        assert state.slot is None

    @invariant()
    def every_page_has_as_many_references_as_users(self) -> None:
        engine, kv_cache = self.engine, self.runner.kv_cache
        ref_counts = [0] * N_PAGES
        for holder in (*engine.running.values(), *engine.prefix_cache.entries.values()):
            assert len(set(holder.pages)) == len(holder.pages)
            for page in holder.pages:
                ref_counts[page] += 1
        assert kv_cache.ref_counts == ref_counts
        assert sorted(kv_cache._free) == [page for page, n in enumerate(ref_counts) if not n]
        assert engine.running.keys() == self.runner.running.keys()
        partly = [p.pages[-1] for p in engine.prefix_cache.entries.values() if p.key.n_tokens % PAGE_SIZE]
        # requests copy a prefix's partly filled page, so only the cache holds it
        assert all(ref_counts[page] == 1 for page in partly)

    @invariant()
    def requests_are_admitted_in_order(self) -> None:
        alive = [state for state in self.states if not state.finished]
        admitted = [state.slot is not None for state in alive]
        assert admitted == sorted(admitted, reverse=True)
        assert self.engine.n_waiting == admitted.count(False)

    def teardown(self) -> None:
        """All requests end within a known number of frames. When the cached prefixes are gone, all pages are free."""
        if not hasattr(self, "runner"):
            return
        most = sum(state.request.max_frames + 2 for state in self.states) + 1
        for _ in range(most):
            if not self.states:
                break
            self._run_frame()
        assert not self.states
        assert not self.engine._pending
        assert not self.engine._cancelled
        assert not self.runner.running
        self.engine.prefix_cache.clear()
        assert self.runner.kv_cache.n_free == N_PAGES


def _run(examples: int, steps: int) -> Counter[str]:
    Traffic.events = Counter()
    few = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Traffic, settings=few)
    print(dict(Traffic.events))
    return Traffic.events


def test_traffic() -> None:
    events = _run(60, 40)
    assert sum(events.values()) > 2000
    assert min(events.values()) > 50, events


@pytest.mark.slow
def test_much_traffic() -> None:
    events = _run(1200, 60)
    assert sum(events.values()) - events["refusals"] > 100_000


def test_a_request_that_another_thread_has_just_finished_is_finished() -> None:
    """One thread waits for a request while another frees the request's slot, before the request is marked finished."""
    runner = FakeRunner(False)
    engine = Engine(runner, FakeCodecRunner(), 2)
    state = engine.submit(Request(torch.zeros(1, 1, dtype=torch.float64) + 0.25, 5, 1.0, 1, 1, "euler"))
    leaving, looked = threading.Event(), threading.Event()
    leave = runner.remove

    def slow_leave(slot: int) -> None:
        leaving.set()
        looked.wait(0.2)  # meanwhile the main thread waits for the same request
        leave(slot)

    runner.remove = slow_leave  # type: ignore[method-assign]
    worker = threading.Thread(target=engine.wait, args=(state, 1))
    worker.start()
    leaving.wait(10)
    engine.wait(state, 1)
    looked.set()
    worker.join(10)
    assert state.finished
    assert state.error is None


def test_a_request_is_finished_even_if_it_cannot_be_removed() -> None:
    runner = FakeRunner(False)
    engine = Engine(runner, FakeCodecRunner(), 2)
    state = engine.submit(Request(torch.zeros(1, 1, dtype=torch.float64) + 0.25, 5, 1.0, 9, 1, "euler"))
    engine.wait(state, 1)
    with mock.patch.object(runner, "remove", side_effect=ArithmeticError("a lost GPU")):  # noqa: SIM117
        with pytest.raises(ArithmeticError, match="a lost GPU"):
            engine.cancel(state)
    assert state.finished
