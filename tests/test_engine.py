"""The engine: whatever joins, leaves, fails or waits, no page is lost and nobody starves; and the sound stays the same.

Bookkeeping is proved on slots that compute nothing but write each token into its page, and look at all pages of a
request in every frame: a page that is shared wrongly is seen by its content.
"""

import threading
from collections import Counter
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

from voxkern.cache import PAGE, PagePool, Voice
from voxkern.engine import Engine, Job
from voxkern.reference.config import END_AUDIO, N_SPECIAL_CODES
from voxkern.slots import Request, Said

N_PAGES, N_SLOTS = 12, 4
SHARED = {0: 5, 1: 64, 2: 70, 3: 150, 4: 0, 5: 70}  # rows of a prompt that are its voice's
BAD_VOICE = 5
BROKEN = -1.0  # a row that makes its prompt's pass fail
REQUESTS = st.tuples(  # voice, tokens of text, frames, seed, broken
    st.sampled_from([None, *SHARED]),
    st.integers(1, 90),
    st.integers(1, 300),
    st.integers(0, 10**6),
    st.integers(0, 7).map(lambda n: n == 7),
)


def token(seed: int, i: int) -> int:
    """What a request says as its frame `i`; 0 is its end."""
    return 0 if i == seed % 97 else 1 + (seed * 31 + i * 7) % 1000


@dataclass
class FakeSlots:
    """Every token is written where its keys and values would be."""

    late: bool
    n: int = N_SLOTS
    max_tokens: int = N_PAGES * PAGE
    weights: int = 0
    fails: bool = False
    there: dict[int, SimpleNamespace] = field(default_factory=dict)
    meanwhile: list[Job] = field(default_factory=list)  # cancelled by somebody else during a frame

    def __post_init__(self) -> None:
        config = SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=1)
        self.pool = PagePool(config, N_PAGES, torch.float64, torch.device("cpu"))
        self.rows = self.pool.pool.numpy()[0, :, 0, 0, :, 0]  # [pages, PAGE]

    def begin(self) -> None:
        assert not self.there

    def stamp(self) -> int:
        return self.weights

    def prefill(self, rows: Tensor, pages: list[int], past: int) -> Tensor:
        values = rows[:, 0].numpy()
        if (values == BROKEN).any():
            raise ArithmeticError("a broken prompt")
        for i, value in enumerate(values, past):
            self.rows[pages[i // PAGE], i % PAGE] = value + self.weights
        return rows[-1]

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        assert slot not in self.there
        said = list(request.prompt[:, 0].numpy() + self.weights)
        assert state[0] == request.prompt[-1, 0]
        self.there[slot] = SimpleNamespace(request=request, pages=pages, tokens=said, n=0, over=False)

    def leave(self, slot: int) -> None:
        del self.there[slot]

    def frame(self) -> Said:
        if self.fails:
            self.fails = False
            raise ArithmeticError("a broken frame")
        codes = torch.full((self.n, 2), END_AUDIO)
        kept = torch.zeros(self.n, dtype=torch.int64)
        for slot, one in self.there.items():
            if one.over:
                continue
            cached = self.rows[one.pages].ravel()[: len(one.tokens)]
            assert np.array_equal(cached, one.tokens), "a page of its own was written by somebody else"
            value = token(one.request.seed, one.n)
            if value:
                codes[slot], kept[slot] = value + N_SPECIAL_CODES, 1
                self.rows[one.pages[len(one.tokens) // PAGE], len(one.tokens) % PAGE] = value
                one.tokens.append(value)
                one.n += 1
            one.over = not value or one.n == one.request.max_frames
        for job in self.meanwhile:
            job.cancel()
        self.meanwhile.clear()
        return Said(codes, kept)


class FakeSounds:
    """A sample a frame."""

    sampling_rate = 1
    fails = False

    def begin(self) -> None:
        pass

    def restart(self, slot: int) -> None:
        assert slot in range(N_SLOTS)

    def decode(self, said: Said, slots: list[int]) -> Tensor:
        if self.fails:
            self.fails = False
            raise ArithmeticError("a broken codec")
        return said.codes[:, :1].double()


class Traffic(RuleBasedStateMachine):
    """Whatever callers may do, in any order."""

    events: ClassVar[Counter[str]] = Counter()

    @initialize(late=st.booleans())
    def begin(self, late: bool) -> None:
        self.slots = FakeSlots(late)
        self.engine = Engine(self.slots, FakeSounds(), 2)
        self.voices = {voice: torch.full((1, 1), float(voice)) for voice in SHARED}
        self.jobs: list[Job] = []  # in the order of their admission, but for those that are over
        self.heard: dict[Job, list[int]] = {}
        self.short: set[Job] = set()  # for pages were too few at some time

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
            shared = None if voice is None else Voice.of(self.voices[voice], self.slots.weights, n_shared)
            job = self.engine.submit(Request(rows, seed, 1.0, max_frames, 1, "euler", shared))
            self.jobs.append(job)
            self.heard[job] = []
            self.count("joins")
            self.count("failures", broken or voice == BAD_VOICE)

    @rule()
    def submit_what_never_fits(self) -> None:
        request = Request(torch.zeros(10, 1), 0, 1.0, N_PAGES * PAGE - 9, 1, "euler")
        with pytest.raises(ValueError, match=r"769 tokens, but a request may have 768 \(cache_tokens\)"):
            self.engine.submit(request)
        self.count("refusals")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), during=st.booleans())
    def cancel(self, data: st.DataObject, during: bool) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if during and self.slots.there:
            self.slots.meanwhile.append(job)
        else:
            job.cancel()
            assert job.over
        self.count("cancels")

    @rule(n=st.integers(1, 40))
    def step(self, n: int) -> None:
        for _ in range(n):
            self._step()

    @precondition(lambda self: self.slots.there)
    @rule(codec=st.booleans())
    def fail(self, codec: bool) -> None:
        """In what is everybody's: who is there gets the error, who waits does not."""
        there = set(self.engine._there.values())
        (self.engine.sounds if codec else self.slots).fails = True
        self._step()
        assert all(job.over and isinstance(job.error, ArithmeticError) for job in there)
        assert not self.slots.there
        assert not any(job.over for job in self.engine._queue)
        self.count("failures")

    @rule()
    def change_weights(self) -> None:
        """Whoever is there keeps what the old ones made; whoever comes shares none of it."""
        self.slots.weights += 1

    @rule(voice=st.sampled_from([*SHARED]), in_place=st.booleans())
    def change_voice(self, voice: int, in_place: bool) -> None:
        if in_place:
            self.voices[voice] += 10
        else:
            self.voices[voice] = self.voices[voice] + 10

    def _step(self) -> None:
        before = {job: job.n_frames for job in self.engine._there.values()}
        cancelled = [] if self.slots.fails else list(self.slots.meanwhile)  # a broken frame comes to none of them
        self.engine._take_turn(self.engine._step)
        self.engine._sweep()
        for job, n in before.items():
            assert job.over or job.n_frames == n + 1 or self.slots.late  # a frame each, every time
            assert job.over or job.n_frames >= 1  # and the first at once
        assert all(job.over for job in cancelled)  # during the frame: gone with its end
        if self.engine.n_waiting and self.engine.n_running < N_SLOTS:
            self.count("page shortages", self.engine._queue[0] not in self.short)
            self.short.add(self.engine._queue[0])
        for job in self.jobs:
            self.heard[job] += [int(codes[0]) for codes in job.take().codes.T[:, :1]]
            if job.over:
                self._look_at_what_is_over(job)
        self.jobs = [job for job in self.jobs if not job.over]

    def _look_at_what_is_over(self, job: Job) -> None:
        self.count("leaves")
        seed, said = job.request.seed, self.heard.pop(job)
        assert said == [token(seed, i) for i in range(len(said))]
        assert 0 not in said
        if job.ended:
            assert len(said) == seed % 97
        assert len(said) <= job.request.max_frames
        assert job.error is None or isinstance(job.error, ArithmeticError)
        assert not job.pages
        assert job.slot is None

    @invariant()
    def pages_are_held_by_whom_they_should_be(self) -> None:
        engine, pool = self.engine, self.slots.pool
        holders = [0] * N_PAGES
        for holder in (*engine._there.values(), *engine.prefixes.known.values()):
            assert len(set(holder.pages)) == len(holder.pages)
            for page in holder.pages:
                holders[page] += 1
        assert pool.holders == holders
        assert sorted(pool._free) == [page for page, n in enumerate(holders) if not n]
        assert engine._there.keys() == self.slots.there.keys()
        partly = [p.pages[-1] for p in engine.prefixes.known.values() if p.voice.n_tokens % PAGE]
        assert all(holders[page] == 1 for page in partly)  # what is written to is nobody else's

    @invariant()
    def nobody_is_overtaken(self) -> None:
        alive = [job for job in self.jobs if not job.over]
        admitted = [job.slot is not None for job in alive]
        assert admitted == sorted(admitted, reverse=True)
        assert self.engine.n_waiting == admitted.count(False)

    def teardown(self) -> None:
        """Everybody is served, in no more frames than there are to be said; then everything is free."""
        if not hasattr(self, "slots"):
            return
        most = sum(job.request.max_frames + 2 for job in self.jobs) + 1
        for _ in range(most):
            if not self.jobs:
                break
            self._step()
        assert not self.jobs
        assert not self.engine._late
        assert not self.engine._cancelled
        assert not self.slots.there
        self.engine.prefixes.clear()
        assert self.slots.pool.n_free == N_PAGES


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


def test_what_another_thread_has_just_ended_is_over() -> None:
    """A waiter looks between the moment in which nobody is left and that in which its request counts as over."""
    slots = FakeSlots(False)
    engine = Engine(slots, FakeSounds(), 2)
    job = engine.submit(Request(torch.zeros(1, 1, dtype=torch.float64) + 0.25, 5, 1.0, 1, 1, "euler"))
    leaving, looked = threading.Event(), threading.Event()
    leave = slots.leave

    def slow_leave(slot: int) -> None:
        leaving.set()
        looked.wait(0.2)  # the other waits for this turn's end, and does not say so
        leave(slot)

    slots.leave = slow_leave  # type: ignore[method-assign]
    worker = threading.Thread(target=job.wait, args=(1,))
    worker.start()
    leaving.wait(10)
    job.wait(1)
    looked.set()
    worker.join(10)
    assert job.over
    assert job.error is None


def test_who_cannot_leave_is_over_all_the_same() -> None:
    slots = FakeSlots(False)
    engine = Engine(slots, FakeSounds(), 2)
    job = engine.submit(Request(torch.zeros(1, 1, dtype=torch.float64) + 0.25, 5, 1.0, 9, 1, "euler"))
    job.wait(1)
    with mock.patch.object(slots, "leave", side_effect=ArithmeticError("a lost GPU")):  # noqa: SIM117
        with pytest.raises(ArithmeticError, match="a lost GPU"):
            job.cancel()
    assert job.over
