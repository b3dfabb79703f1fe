"""Tests of the fused backbone against the reference backbone, and of whole utterances on kernels."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import CPU, with_reference_codec
from fresh_process import run_python
from poison import poison_pages
from torch import Tensor

import voxkern
from bench.static.counters import counting, launches_only
from voxkern.checkpoint import read_checkpoint
from voxkern.engine.request import Request, RequestState
from voxkern.fused.backbone import FusedBackbone, TokenBatch
from voxkern.reference import VoxtralTTS
from voxkern.reference.attention import PagedCache


@pytest.fixture
def model(tiny_folder: Path, device: torch.device) -> VoxtralTTS:
    """Return a model in fp32 that the test may change."""
    return read_checkpoint(tiny_folder, device=device).model


def embeddings(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device = CPU) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def empty_cache(
    requests: int, pages: int, page: int = 64, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Return a KV cache of 2 layers full of NaN, and a block table of shuffled pages; it leaves 3 pages unused."""
    kv = torch.full((2, requests * pages + 3, 2, 2, page, 16), torch.nan, dtype=dtype, device=device)
    order = torch.randperm(requests * pages + 3, generator=torch.Generator().manual_seed(1))
    return kv, order[: requests * pages].view(requests, pages).int().to(device)


@torch.inference_mode()
@pytest.mark.parametrize("page", [16, 64])
def test_hidden_states_equal_the_modules(model: VoxtralTTS, device: torch.device, page: int) -> None:
    """Prompts of different lengths are prefilled together, then the requests are decoded token by token.

    One request has length 0 in one step.
    """
    lengths, u = [1, 65, 30], embeddings(3, 100, device=device)
    whole = model.hidden_states(u)
    fused = FusedBackbone(model, 4)
    kv, table = empty_cache(3, -(-100 // page), page, device=device)
    prompts = torch.cat([row[:n] for row, n in zip(u, lengths, strict=True)])
    states = fused.prefill(prompts, TokenBatch.of(lengths, lengths, u.device), kv, table)
    expected = torch.cat([row[:n] for row, n in zip(whole, lengths, strict=True)])
    torch.testing.assert_close(model.norm(states), expected, rtol=1e-4, atol=1e-5)
    for step in range(4):
        lengths = [n + 1 for n in lengths]
        there = [0 if step == 2 and i == 1 else n for i, n in enumerate(lengths)]
        now = torch.stack([u[i, n - 1] for i, n in enumerate(lengths)])
        h = fused.decode(now, kv, table, torch.tensor(there, dtype=torch.int32, device=device))
        for i, n in enumerate(there):
            if n:
                torch.testing.assert_close(h[i], whole[i, n - 1], rtol=1e-4, atol=1e-5)
        lengths[1] -= step == 2
    unused = poison_pages(kv.transpose(0, 1).clone(), table)
    assert torch.equal(unused.isnan(), kv.transpose(0, 1).isnan())  # nothing but the requests' pages was written


@torch.inference_mode()
@pytest.mark.interpreter("the addresses of all lanes are recorded")
@pytest.mark.parametrize(
    "page", [pytest.param(16, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow), 128]
)
def test_the_last_page_may_pass_max_tokens(model: VoxtralTTS, page: int) -> None:
    """The pages for 100 tokens have space for 112 tokens if a page has 16, and for 128 if a page has 64 or 128.

    The tokens after the 100th are right too, and no lane reads past the table of rotations.
    """
    pages = -(-100 // page)
    T, (kv, table) = pages * page, empty_cache(1, pages, page)
    u = embeddings(1, T)
    whole = model.hidden_states(u)[0]
    fused = FusedBackbone(model, 1, max_seq_len=100)
    with counting(whole=True):
        states = fused.prefill(u[0, : T - 1], TokenBatch.of([T - 1], [T - 1], u.device), kv, table)
        last = fused.decode(u[:, -1].clone(), kv, table, torch.tensor([T], dtype=torch.int32))
    torch.testing.assert_close(torch.cat((model.norm(states), last)), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"block_table has {pages + 1} pages of {page} tokens"):
        fused.decode(u[:, 0].clone(), kv, table.new_zeros(1, pages + 1), torch.tensor([T], dtype=torch.int32))


@torch.inference_mode()
def test_one_token_is_a_decode(model: VoxtralTTS, device: torch.device) -> None:
    """A call with one token gives the bits of ``decode``, even if this token is the last part of a prompt."""
    fused, u = FusedBackbone(model, 2), embeddings(1, 5, device=device)
    kv, table = empty_cache(1, 1, device=device)
    fused(u[:, :4], PagedCache(kv, table, torch.tensor([4], device=device)))
    length = torch.tensor([5], dtype=torch.int32, device=device)
    again = fused.decode(u[:, 4].clone(), kv.clone(), table, length)
    assert torch.equal(fused(u[:, 4:], PagedCache(kv, table, length))[:, 0], again)


@torch.inference_mode()
def test_accelerated_hidden_states_takes_the_modules_arguments(model: VoxtralTTS, device: torch.device) -> None:
    """``hidden_states`` of an accelerated model runs without a cache, with an int64 block table, and on one token."""
    u = embeddings(2, 21, device=device)
    plain = copy.deepcopy(model)
    voxkern.accelerate(model, 2)
    torch.testing.assert_close(model.hidden_states(u), plain.hidden_states(u), rtol=1e-4, atol=1e-5)
    mine, theirs = empty_cache(2, 1, device=device), empty_cache(2, 1, device=device)
    for start, stop in ((0, 9), (9, 20), (20, 21)):
        length = torch.tensor([stop, stop], device=device)
        h = model.hidden_states(u[:, start:stop], PagedCache(mine[0], mine[1].long(), length))
        expected = plain.hidden_states(u[:, start:stop], PagedCache(*theirs, length))
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_alone_in_a_batch_and_in_parts(tiny_folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A prompt gives the same bits alone, in a batch and in parts of odd sizes.

    The token that is decoded after the prompt gives the same bits too.
    """
    fused = FusedBackbone(read_checkpoint(tiny_folder, dtype, device).model, 5)
    lengths, u = [70, 3, 33], embeddings(3, 71, dtype=dtype, device=device)
    kv, table = empty_cache(3, 2, dtype=dtype, device=device)
    prompts = torch.cat([row[:n] for row, n in zip(u, lengths, strict=True)])
    together = fused.prefill(prompts, TokenBatch.of(lengths, lengths, u.device), kv, table).split(lengths)
    step = u[:, 70].clone()
    after = fused.decode(step, kv, table, torch.tensor(lengths, dtype=torch.int32, device=device) + 1).clone()
    for i in (0, 2):
        again, own = empty_cache(1, 2, dtype=dtype, device=device)
        parts, done = [], 0
        for part in (17, lengths[i] - 18, 1) if i == 0 else (lengths[i],):
            done += part
            rows = TokenBatch.of([part], [done], u.device)
            parts.append(fused.prefill(u[i, done - part : done], rows, again, own))
        assert torch.equal(torch.cat(parts), together[i])
        length = torch.tensor([lengths[i] + 1], dtype=torch.int32, device=device)
        assert torch.equal(fused.decode(step[i : i + 1], again, own, length)[0], after[i])


@torch.inference_mode()
@pytest.mark.interpreter("launches are recorded")
def test_a_frame_is_launches_and_nothing_else(tiny_folder: Path) -> None:
    tts = with_reference_codec(voxkern.load(tiny_folder, backend="triton", max_batch=3))
    runner = tts.engine.runner
    for slot, n in ((0, 5), (2, 8)):
        prompt = embeddings(n, seed=n)
        pages = runner.kv_cache.allocate(1)
        runner.add(slot, Request(prompt, n, 1.2, 9, 2, "euler"), runner.prefill(prompt, pages, 0), pages)
    next(runner.generate_frame())
    (batch,) = runner._batches.values()
    with launches_only() as launches:
        batch.launch(3)
    # the flow head has 4 launches, and in each of 2 steps 4 for the first layer, 5 for the second and 1 for the solver
    # the decode state has 1, and the backbone has 5 for each of 2 layers and 1 for the norm
    assert len(launches) == 4 + 2 * (4 + 5 + 1) + 1 + 2 * 5 + 1
    assert batch.n_frames.tolist() == [2, 0, 2]
    assert batch.lengths.tolist() == [7, 0, 10]


def test_speaks_as_the_torch_backend_does(tiny_folder: Path, device: torch.device) -> None:
    """Two requests with different seeds and frame limits get the codes of the reference modules."""
    arguments = {"text": ["a", "hello"], "voice": ["ada", "bob"], "seed": [1, 2**64 - 1], "max_frames": [3, 6]}
    arguments |= {"steps": 2}
    mine = with_reference_codec(voxkern.load(tiny_folder, device=device, backend="triton", max_batch=2))
    theirs = voxkern.load(tiny_folder, device=device, backend="torch", max_batch=2)
    for one, other in zip(mine.generate(**arguments), theirs.generate(**arguments), strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_allclose(one.samples, other.samples, rtol=1e-4, atol=1e-4)
        assert (one.ended, one.seed) == (other.ended, other.seed)
        assert one.timings.total > 0


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_speaks_as_the_torch_backend_does_for_long(tiny_folder: Path, device: torch.device, solver: str) -> None:
    """Three requests of up to 60 frames get the codes of the reference modules, with the default number of steps.

    They fill more than a page and end at different frames.
    """
    arguments = {"text": ["a", "hello", "x" * 50], "seed": [1, 2, 3], "max_frames": [60, 40, 60]}
    mine = voxkern.load(tiny_folder, device=device, backend="triton", max_batch=3).generate(**arguments, solver=solver)
    theirs = voxkern.load(tiny_folder, device=device, backend="torch", max_batch=3).generate(**arguments, solver=solver)
    for one, other in zip(mine, theirs, strict=True):
        # a code on a rounding edge would change all later frames; none of these 1,700 codes is on one
        np.testing.assert_array_equal(one.codes, other.codes)


def test_a_request_that_ends_leaves_the_others_alone(tiny_folder: Path, device: torch.device) -> None:
    """Requests that generate END or reach their frame limit give the same audio together as alone.

    The audio has no frame for END.
    """
    tts = voxkern.load(tiny_folder, device=device, backend="triton", max_batch=3)
    del tts.model.audio_tokenizer.stream  # decode with the reference codec; test_fused_codec.py tests the fused one
    with torch.no_grad():
        tts.model.acoustic_transformer.semantic_codebook_output.weight[1] *= 4  # END comes soon
    requests = [
        Request(embeddings(4, seed=seed, device=device), seed, 1.2, limit, 1, "euler")
        for seed, limit in ((3, 9), (4, 2), (5, 9))
    ]

    def speak(requests: list[Request]) -> list[RequestState]:
        states = [tts.engine.submit(request) for request in requests]
        tts.engine.run_until(lambda: all(state.finished for state in states))
        return states

    together = speak(requests)
    assert {state.ended for state in together} == {True, False}
    assert len({state.n_frames for state in together}) > 1
    for request, both in zip(requests, together, strict=True):
        (alone,) = speak([request])
        assert alone.ended == both.ended
        one, other = alone.take(), both.take()
        assert one.codes.shape[1] == both.n_frames
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.samples, other.samples)
        assert (one.codes[0] >= 0).all()


def test_errors(model: VoxtralTTS, device: torch.device) -> None:
    fused, (kv, table) = FusedBackbone(model, 2, max_seq_len=128), empty_cache(3, 2, device=device)
    u, lengths = embeddings(3, device=device), torch.ones(3, dtype=torch.int32, device=device)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=r"max_batch must be in 1..64"):
            FusedBackbone(model, wrong)
    with torch.inference_mode():
        for arguments, error, message in (
            ((u, kv, table, lengths), ValueError, r"u has 3 rows, the backbone is prepared for 1..2"),
            ((u[:2], kv[:1], table[:2], lengths[:2]), ValueError, r"kv must be \[layers"),
            ((u[:2], kv[:, :, :, :, :24], table[:2], lengths[:2]), ValueError, "pages of 24 tokens but must"),
            ((u[:2], kv, table[:2].long(), lengths[:2]), ValueError, "must be int32"),
            ((u[:2], kv, table[:2].repeat(1, 2), lengths[:2]), ValueError, r"\(max_seq_len\)"),
            ((u[:2].bfloat16(), kv, table[:2], lengths[:2]), TypeError, "u is torch.bfloat16"),
            ((u[:2, :63], kv, table[:2], lengths[:2]), ValueError, r"u must be contiguous \[rows, 64\]"),
        ):
            with pytest.raises(error, match=message):
                fused.decode(*arguments)
        with pytest.raises(ValueError, match=r"u must be \[B, T, 64\]"):
            fused(u[:2])
    model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="an accelerated backbone computes no gradients"):
        fused.decode(u[:1], kv, table[:1], lengths[:1])


def test_limits_are_known_before_anything_runs(tiny_folder: Path, device: torch.device) -> None:
    tts = voxkern.load(tiny_folder, device=device, backend="triton")
    tts.model.hidden_states = FusedBackbone(tts.model, 1, max_seq_len=100)
    spoken: list[int] = []
    with pytest.raises(ValueError, match=r"max_frames must be in 1..\d\d, got 200"):
        tts.generate(["a", "b"], max_frames=[1, 200], on_frame=spoken.append)
    assert not spoken


def test_accelerated_and_restored_between_calls(tiny_folder: Path, device: torch.device) -> None:
    """generate() uses the model as it is at the call: restored, or accelerated for batches of at most 2."""
    tts = voxkern.load(tiny_folder, device=device, backend="torch", max_batch=3)
    arguments = {"text": ["a", "b", "c"], "seed": [1, 2, 3], "max_frames": 3, "steps": 1}
    before = tts.generate(**arguments)
    voxkern.accelerate(tts.model, 2)
    assert tts.backend == "triton"
    during = with_reference_codec(tts).generate(**arguments)
    voxkern.restore(tts.model)
    assert tts.backend == "torch"
    for first, second, third in zip(before, during, tts.generate(**arguments), strict=True):
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first.samples, third.samples)


def test_what_cannot_run_says_so(tiny_folder: Path, model: VoxtralTTS, device: torch.device) -> None:
    code = (
        "import sys, torch, voxkern\n"
        "model = voxkern.load(sys.argv[1], device='cpu', backend='torch').model.to('meta')\n"
        "voxkern.accelerate(model)\n"
        "model.to_empty(device='cpu')\n"
        "with torch.inference_mode():\n"
        "    for call in (model.hidden_states, lambda u: model.acoustic_transformer(u[0], torch.ones(1))):\n"
        "        try: call(torch.zeros(1, 1, 64))\n"
        "        except RuntimeError as error: print(error)"
    )
    answer = run_python("-c", code, str(tiny_folder))
    assert "the accelerated backbone: tensors are on the CPU" in answer
    assert "the accelerated flow head: tensors are on the CPU" in answer
    voxkern.accelerate(model.double())
    with torch.inference_mode(), pytest.raises(TypeError, match=r"weights are torch.float64 but must be torch.float32"):
        model.hidden_states(embeddings(1, 1, device=device).double())


@pytest.mark.interpreter("on a CPU, the backend depends on the interpreter")
def test_the_backend_is_chosen_by_what_is_here(tiny_folder: Path) -> None:
    assert voxkern.load(tiny_folder).backend == "triton"  # on a CPU, kernels run in the interpreter
    assert voxkern.load(tiny_folder, backend="torch").backend == "torch"
    code = (
        "import sys, voxkern\n"
        "print(voxkern.load(sys.argv[1]).backend)\n"
        "try: voxkern.load(sys.argv[1], backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    answer = run_python("-c", code, str(tiny_folder))
    assert answer.startswith("packed\n")
    assert "set TRITON_INTERPRET=1" in answer
