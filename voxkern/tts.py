"""Text to speech: ``load`` a checkpoint, ``generate`` or ``stream`` sound."""

import itertools
import math
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .accelerate import accelerate
from .audio import Audio
from .checkpoint import TOKENIZER, Checkpoint, find_folder, read_checkpoint
from .engine.codec_runner import CodecRunner
from .engine.cuda_graphs import capture_for
from .engine.engine import Engine
from .engine.kv_cache import PAGE_SIZE, KVCache, PrefixKey, pages_for
from .engine.request import Request
from .engine.runner import TorchRunner
from .engine.streaming import SpeechStream, chunk_sizes, iterate_in_thread
from .reference import VoxtralTTS
from .reference.solver import MAX_STEPS, SOLVERS
from .text import MAX_CHARS, PromptEncoder, split_text
from .validation import check_int, per_text, resolve_device, resolve_dtype, use_kernels
from .voice import read_recording, voice_prefix

if TYPE_CHECKING:
    from .fused.backbone import FusedBackbone  # needs Triton

MAX_FRAMES = 2048  # 164 s: where vLLM-Omni cuts off as well
PROMPT_TOKENS = 512  # of voice and text, for which the KV cache has memory beside MAX_FRAMES by default
CFG_ALPHA = 1.2
DEMO = Path(__file__).with_name("demo")  # the voice that comes with the package


def load(
    source: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    max_batch: int = 1,
    cache_tokens: int | None = None,
    graphs: bool = True,
) -> "TTS":
    """Load a model.

    Args:
        source: a checkpoint folder or a hub id; None takes the demo voice, which says numbers, days, months and
            greetings.
        device: None takes the GPU if there is one.
        dtype: "bfloat16", "float16", "float32" or a torch dtype; None keeps the checkpoint's.
        backend: "triton", the kernels; "torch", the reference modules; "auto" takes the kernels on a GPU, and in
            Triton's interpreter (TRITON_INTERPRET=1) too.
        max_batch: requests that run side by side, up to 64 on kernels. A sound belongs to its seed, backend, dtype and
            this number: with another one products are made in another order.
        cache_tokens: of keys and values that all requests together may have, 80 ms each; a request waits while they are
            short. None is 2560 for each of `max_batch`, or the model's length where that is less.
        graphs: on a GPU, a frame is one CUDA graph, captured when its steps and solver are first asked for. False makes
            its launches one by one: the same bits, slower.

    Raises:
        ValueError: an argument, or a checkpoint (:class:`CheckpointError`, :class:`ConfigError`), that cannot be used.
        RuntimeError: "triton" without Triton.
    """
    check_int("max_batch", max_batch, 1, None)
    if cache_tokens is not None:
        check_int("cache_tokens", cache_tokens, PAGE_SIZE, None)
    target = resolve_device(device)
    settings = (max_batch, use_kernels(backend, target), cache_tokens, graphs)
    folder = DEMO if source is None else find_folder(source)
    return TTS(read_checkpoint(folder, resolve_dtype(dtype), target), *settings)


class TTS:
    """A loaded model.

    Attributes:
        model: the module, a reference :class:`VoxtralTTS`.
        voices: the prefix of each voice, [N, dim].
        max_batch: requests that run side by side.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_batch: int = 1,
        use_kernels: bool = False,
        cache_tokens: int | None = None,
        graphs: bool = True,
    ) -> None:
        """Use :func:`load`."""
        self.model: VoxtralTTS = checkpoint.model
        self.voices = checkpoint.voices
        self.max_batch = max_batch
        self._cache_tokens, self._graphs = cache_tokens, graphs
        self._engine: tuple[Hashable, Engine] | None = None
        self._engine_lock = threading.Lock()
        if use_kernels:
            accelerate(self.model, max_batch)
        self._prompt = PromptEncoder(
            checkpoint.folder / TOKENIZER, {name: len(voice) for name, voice in checkpoint.voices.items()}
        )

    @property
    def backend(self) -> str:
        """ "triton" while the model is accelerated, "torch" otherwise."""
        return "torch" if self._fused_backbone is None else "triton"

    @property
    def sampling_rate(self) -> int:
        """Samples a second of what is generated."""
        return self.model.config.codec.sampling_rate

    def add_voice(self, name: str, path: str | Path) -> None:
        """Make a voice of a recording, which `generate` then knows by its name.

        Args:
            name: lower case, as the checkpoint's voices are; a name that is taken is an error.
            path: a sound file of 1 to 60 s; its channels are averaged and another rate is resampled.

        Raises:
            ValueError: the name is empty or taken, the file cannot be used (see :func:`read_recording`), or the
                checkpoint has no codec encoder, as the public one has none.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if not name or name != name.lower().strip():
            raise ValueError(f"name must be in lower case and not empty, got {name!r}")
        if name in self.voices:
            raise ValueError(f"name is {name!r}, and there is such a voice already")
        prefix = voice_prefix(self.model, read_recording(path, self.sampling_rate))
        self.voices[name] = prefix
        self._prompt.add(name, len(prefix))

    @overload
    def generate(
        self,
        text: str,
        voice: str | None = None,
        seed: int | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float = CFG_ALPHA,
        max_frames: int | None = None,
        max_chars: int | None = MAX_CHARS,
        on_frame: Callable[[int], None] | None = None,
    ) -> Audio: ...

    @overload
    def generate(
        self,
        text: list[str],
        voice: str | list[str] | None = None,
        seed: int | list[int] | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float | list[float] = CFG_ALPHA,
        max_frames: int | list[int] | None = None,
        max_chars: int | None = MAX_CHARS,
        on_frame: Callable[[int], None] | None = None,
    ) -> list[Audio]: ...

    def generate(
        self,
        text: str | list[str],
        voice: str | list[str] | None = None,
        seed: int | list[int] | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float | list[float] = CFG_ALPHA,
        max_frames: int | list[int] | None = None,
        max_chars: int | None = MAX_CHARS,
        on_frame: Callable[[int], None] | None = None,
    ) -> Audio | list[Audio]:
        """Speak one text, or a list of them side by side.

        Beside a list of texts, `voice`, `seed`, `cfg_alpha` and `max_frames` may be lists of the same length. Texts
        are spoken as they are: no numbers or abbreviations are written out. A long one is split at the ends of
        sentences into parts, which are spoken like texts of their own, each with the text's seed, and joined with
        nothing between. Nothing runs if any argument is wrong.

        Args:
            text: what to say.
            voice: whose voice; None takes the checkpoint's first.
            seed: 0 .. 2^64 - 1; None draws one for each text, found in ``Audio.seed``.
            steps: evaluations of the velocity a frame, 1..64; None takes the checkpoint's (7).
            solver: "euler", or "ab2", the two-step Adams-Bashforth method, which asks for fewer steps.
            cfg_alpha: strength of the guidance; 1 is none.
            max_frames: 80 ms each, where a part is cut off; None is 2048, or what the model's length leaves.
            max_chars: of a part, see :func:`split_text`; None never splits.
            on_frame: called with the number of frames done after each.

        Returns:
            An Audio for a text, a list of them for a list.

        Raises:
            ValueError: an argument out of range, named.
            TypeError: an argument of the wrong kind, named.
        """
        if isinstance(text, str):
            single = {"voice": voice, "seed": seed, "cfg_alpha": cfg_alpha, "max_frames": max_frames}
            for name, value in single.items():
                if isinstance(value, list):
                    raise TypeError(f"{name} is a list but text is one string")
        elif not isinstance(text, list):
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else text
        n_steps = self._steps(steps, solver)
        requests = [
            self._make_requests(*arguments, max_chars, n_steps, solver)
            for arguments in zip(
                texts,
                per_text("voice", voice, len(texts)),
                per_text("seed", seed, len(texts)),
                per_text("cfg_alpha", cfg_alpha, len(texts)),
                per_text("max_frames", max_frames, len(texts)),
                strict=True,
            )
        ]
        audios = iter(self.engine.generate(list(itertools.chain(*requests)), on_frame))
        joined = [_joined([next(audios) for _ in of_text]) for of_text in requests]
        return joined[0] if isinstance(text, str) else joined

    def stream(
        self,
        text: str,
        voice: str | None = None,
        seed: int | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float = CFG_ALPHA,
        max_frames: int | None = None,
        max_chars: int | None = MAX_CHARS,
        first_chunk: int = 1,
        chunk: int = 25,
    ) -> SpeechStream:
        """Speak one text in chunks, as they are made. Joined, they are what :meth:`generate` says, to the last bit.

        Chunks have `first_chunk` frames, then twice as many each time up to `chunk`. The last may be empty; its `ended`
        is the text's. Closing the iterator, or dropping it, ends the work and frees its memory.

        Args:
            text: what to say; see :meth:`generate` for it and what is not named here.
            voice: whose voice.
            seed: 0 .. 2^64 - 1.
            steps: evaluations of the velocity a frame.
            solver: "euler" or "ab2".
            cfg_alpha: strength of the guidance.
            max_frames: where a part is cut off.
            max_chars: of a part.
            first_chunk: frames of the first chunk, 1 or more; 80 ms each.
            chunk: frames of a chunk, at most; not less than `first_chunk`.

        Returns:
            An iterator of Audio, with ``close()``. Each one's timings are its own, but for ``first_sound``.

        Raises:
            ValueError: an argument out of range, named, before anything runs.
            TypeError: an argument of the wrong kind, named.
        """
        n_steps = self._steps(steps, solver)
        check_int("first_chunk", first_chunk, 1, None)
        check_int("chunk", chunk, first_chunk, None)
        requests = self._make_requests(text, voice, seed, cfg_alpha, max_frames, max_chars, n_steps, solver)
        return SpeechStream(self.engine, requests, chunk_sizes(first_chunk, chunk))

    async def submit(
        self, text: str, voice: str | None = None, seed: int | None = None, **arguments: Any
    ) -> AsyncIterator[Audio]:
        """:meth:`stream` for asyncio: the same arguments, and an async iterator of the same chunks.

        The work is done in threads, for all requests by one of them at a time. Leaving the iteration early, or
        cancelling the task that is in it, ends the work and frees its memory.

        Raises:
            ValueError: an argument out of range, named, before anything runs.
            TypeError: an argument of the wrong kind, named.
        """
        return iterate_in_thread(self.stream(text, voice, seed, **arguments))

    @property
    def engine(self) -> Engine:
        """What runs the requests; another one where the model was accelerated, restored or moved since."""
        fused_backbone, weight = self._fused_backbone, self.model.norm.weight
        key = (fused_backbone, self.max_batch, weight.dtype, weight.device)
        with self._engine_lock:
            if self._engine is None or self._engine[0] != key:
                self._engine = (key, self._new_engine())
            return self._engine[1]

    def _new_engine(self) -> Engine:
        fused_backbone, weight, config = self._fused_backbone, self.model.norm.weight, self.model.config
        n = self.max_batch if fused_backbone is None else min(self.max_batch, fused_backbone.max_batch)
        n_pages = pages_for(self._cache_tokens or n * min(self._positions, MAX_FRAMES + PROMPT_TOKENS))
        kv_cache = KVCache(config.backbone, n_pages, weight.dtype, weight.device)
        longest = min(self._positions, n_pages * PAGE_SIZE)
        if fused_backbone is None:
            return Engine(
                TorchRunner(self.model, n, kv_cache, longest), CodecRunner(self.model, n), config.audio.n_codebooks
            )
        from .engine.fused_runner import FusedRunner  # needs Triton

        capture = capture_for(weight.device) if self._graphs else None
        runner = FusedRunner(self.model, n, kv_cache, longest, capture)
        return Engine(runner, CodecRunner(self.model, n, capture), config.audio.n_codebooks)

    @property
    def _positions(self) -> int:
        """Tokens that the model is made, and prepared, for."""
        positions = self.model.config.backbone.max_seq_len
        return positions if self._fused_backbone is None else min(positions, self._fused_backbone.max_seq_len)

    def _steps(self, steps: int | None, solver: str) -> int:
        """Check how the flow is to be solved; the number of steps."""
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        n_steps = self.model.config.acoustic_transformer.n_decoding_steps if steps is None else steps
        check_int("steps", n_steps, 1, MAX_STEPS)
        return n_steps

    def _make_requests(
        self,
        text: str,
        voice: str | None,
        seed: int | None,
        cfg_alpha: float,
        max_frames: int | None,
        max_chars: int | None,
        steps: int,
        solver: str,
    ) -> list[Request]:
        """Make the requests of a text's parts, which are spoken one after the other."""
        if max_chars is not None:
            check_int("max_chars", max_chars, 1, None)
        seed = secrets.randbits(64) if seed is None else seed
        return [
            self._make_request(part, voice, seed, cfg_alpha, max_frames, steps, solver)
            for part in split_text(text, max_chars)
        ]

    def _make_request(
        self,
        text: str,
        voice: str | None,
        seed: int,
        cfg_alpha: float,
        max_frames: int | None,
        steps: int,
        solver: str,
    ) -> Request:
        """Check one request's arguments and embed its prompt."""
        if voice is None:
            if not self.voices:
                raise ValueError("the checkpoint has no voices (no files in voice_embedding)")
            named = [name for name in self.model.config.voices if name in self.voices]
            voice = named[0] if named else next(iter(self.voices))
        tokens = self._prompt.encode(text, voice)
        check_int("seed", seed, 0, 2**64 - 1)
        if isinstance(cfg_alpha, bool) or not isinstance(cfg_alpha, int | float) or not math.isfinite(cfg_alpha):
            raise ValueError(f"cfg_alpha must be a finite number, got {cfg_alpha!r}")
        positions = self.engine.runner.max_seq_len
        n_left = positions - len(tokens)
        if n_left < 1:
            raise ValueError(
                f"text is too long: its prompt of {len(tokens)} tokens leaves no frame in the model's {positions} "
                "positions; split it"
            )
        if max_frames is None:
            max_frames = min(MAX_FRAMES, n_left)
        check_int("max_frames", max_frames, 1, n_left)
        voice_rows, audio = self.voices[voice], self.model.config.audio.audio_token_id
        n_shared = tokens.index(audio) + len(voice_rows)  # up to the voice's last row, prompts of a voice are the same
        prefix_key = PrefixKey.of(voice_rows, self.engine.runner.weights_version(), n_shared)
        prompt = self._embed_prompt(tokens, voice_rows)
        return Request(prompt, seed, float(cfg_alpha), max_frames, steps, solver, prefix_key)

    @property
    def _fused_backbone(self) -> "FusedBackbone | None":
        return vars(self.model).get("hidden_states")

    def _embed_prompt(self, tokens: list[int], prefix: Tensor) -> Tensor:
        """The prompt's embeddings, [T, dim]: the [AUDIO] rows are the voice's."""
        ids = torch.tensor(tokens, device=prefix.device)
        vocabulary = self.model.config.backbone.vocab_size
        if max(tokens) >= vocabulary:
            raise ValueError(f"the tokenizer gives id {max(tokens)}, but the model's vocab_size is {vocabulary}")
        rows = self.model.embed_tokens(ids).clone()
        rows[ids == self.model.config.audio.audio_token_id] = prefix
        return rows


def _joined(parts: list[Audio]) -> Audio:
    """A text's parts as one sound, in which nothing is heard before all of it is there."""
    joined, first = Audio.join(parts), parts[0].timings
    waited = first.first_sound - first.total  # for a place, before anything was done for it
    timings = replace(joined.timings, first_sound=waited + joined.timings.total)
    return replace(joined, ended=all(part.ended for part in parts), timings=timings)
