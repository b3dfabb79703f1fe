"""Text to speech: :func:`load` a checkpoint, then ``generate``, ``stream`` or ``submit`` texts."""

import itertools
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
from .generation_params import CFG_ALPHA, GenerationParams
from .reference import VoxtralTTS
from .text import MAX_CHARS, PromptEncoder, split_text
from .validation import check_int, per_text, resolve_device, resolve_dtype, use_kernels
from .voice import read_recording, voice_prefix

if TYPE_CHECKING:
    from .fused.backbone import FusedBackbone  # needs Triton

MAX_FRAMES = 2048  # 164 s, the limit of vLLM-Omni as well
PROMPT_TOKENS = 512  # tokens of voice and text that the KV cache's default size allows a request beside MAX_FRAMES
DEMO = Path(__file__).with_name("demo")  # the checkpoint that comes with the package


def load(
    source: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    max_batch: int = 1,
    cache_tokens: int | None = None,
    graphs: bool = True,
) -> "TTS":
    """Load a checkpoint, and return a model that generates speech from text.

    The same seed gives the same sound on one machine, with the same backend, dtype, `max_batch` and versions.

    Args:
        source: a checkpoint folder, or a Hugging Face hub id (OWNER/NAME), which is downloaded. None loads the demo
            voice, which comes with the package and speaks numbers, weekdays, months and greetings.
        device: such as "cpu" or "cuda". None takes the GPU if torch finds one, and the CPU otherwise.
        dtype: "bfloat16", "float16", "float32" or the torch dtype of the weights. None keeps the checkpoint's.
        backend: "triton" runs the kernels, "torch" the reference modules. "auto" takes the kernels on a GPU and in
            Triton's interpreter (TRITON_INTERPRET=1), if Triton is installed.
        max_batch: requests that run side by side, at most 64 on kernels. More requests wait in a queue. Another
            `max_batch` may change the last bits of a sound, because products are summed in another order.
        cache_tokens: tokens of keys and values that all running requests together may reserve, at least 64. A request
            reserves its prompt's tokens and one for each of its `max_frames` (80 ms), and waits until all are free.
            None allows 2560 for each of `max_batch` requests, or the model's length where that is less.
        graphs: True captures a frame on a GPU as one CUDA graph, when a request first uses its steps and solver. False
            launches the frame's kernels one by one: the same bits, slower. It has no effect without kernels.

    Raises:
        ValueError: an argument has a value that cannot be used; or the checkpoint cannot be used, in which case the
            error is a :class:`CheckpointError` or a :class:`ConfigError`.
        TypeError: `max_batch` or `cache_tokens` is not an integer.
        RuntimeError: `backend` is "triton", but Triton is not installed.
    """
    check_int("max_batch", max_batch, 1, None)
    if cache_tokens is not None:
        check_int("cache_tokens", cache_tokens, PAGE_SIZE, None)
    target = resolve_device(device)
    settings = (max_batch, use_kernels(backend, target), cache_tokens, graphs)
    folder = DEMO if source is None else find_folder(source)
    return TTS(read_checkpoint(folder, resolve_dtype(dtype), target), *settings)


class TTS:
    """Generates speech with a loaded model; :func:`load` makes one.

    Its methods may be called from several threads at once: their requests then run side by side.

    Attributes:
        model: the :class:`VoxtralTTS` module that holds the weights.
        voices: by name, the embeddings of each voice in a prompt: [N, dim] in the model's dtype.
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
        """The backend in use: "triton" while the model is accelerated, "torch" otherwise."""
        return "torch" if self._fused_backbone is None else "triton"

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the generated sound."""
        return self.model.config.codec.sampling_rate

    def add_voice(self, name: str, path: str | Path) -> None:
        """Make a voice from a recording, and add it to ``voices`` under a name.

        Args:
            name: the new voice's name, in lower case like the checkpoint's. It must not be taken.
            path: a sound file of 1 to 60 s. Its channels are averaged, and another sampling rate is resampled.

        Raises:
            ValueError: the name is empty, not in lower case or taken; the file cannot be used (see
                :func:`read_recording`); or the checkpoint has no codec encoder, which the public one lacks.
            TypeError: `name` is not a string.
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
        """Generate speech for one text, or for a list of texts side by side.

        With a list of texts, `voice`, `seed`, `cfg_alpha` and `max_frames` may be lists of the same length. A text is
        spoken as it is: numbers and abbreviations are not written out. A text longer than `max_chars` is split into
        parts at the ends of sentences. Each part is generated like a text of its own, with the text's seed, and their
        sounds are joined without a pause. All arguments are checked before anything runs.

        Args:
            text: the text to speak, or a list of texts.
            voice: name of the voice, one of ``voices``. None takes the checkpoint's first.
            seed: 0 .. 2^64 - 1. The same seed gives the same sound, alone or beside other texts. None draws one for
                each text and reports it in ``Audio.seed``.
            steps: evaluations of the velocity network per frame, 1..64. None takes the checkpoint's number (7).
            solver: "euler", or "ab2", the two-step Adams-Bashforth method, which needs fewer steps.
            cfg_alpha: strength of the classifier-free guidance; 1 is none.
            max_frames: most frames of a part, 80 ms each; longer speech is cut off. None allows 2048, or as many as the
                model's length leaves after the prompt.
            max_chars: most characters of a part, see :func:`split_text`. None never splits.
            on_frame: called after each frame that this call runs, with the number of those frames so far.

        Returns:
            One Audio for a text; for a list, a list of them in the same order.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names it.
            TypeError: an argument has the wrong type; the message names it.
        """
        if isinstance(text, str):
            single = {"voice": voice, "seed": seed, "cfg_alpha": cfg_alpha, "max_frames": max_frames}
            for name, value in single.items():
                if isinstance(value, list):
                    raise TypeError(f"{name} is a list but text is one string")
        elif not isinstance(text, list):
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else text
        params = [
            GenerationParams(*of_text, steps, solver, max_chars)
            for of_text in zip(
                per_text("voice", voice, len(texts)),
                per_text("seed", seed, len(texts)),
                per_text("cfg_alpha", cfg_alpha, len(texts)),
                per_text("max_frames", max_frames, len(texts)),
                strict=True,
            )
        ]
        requests = [self._make_requests(*one) for one in zip(texts, params, strict=True)]
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
        """Generate speech for one text, and return it in chunks while it is generated.

        The chunks, joined, equal the sound of :meth:`generate` to the last bit. The first chunk has `first_chunk`
        frames, and each next one twice as many, up to `chunk`. The last chunk of a text, or of a part of it, may have
        fewer, and the text's last may be empty. All arguments are checked by this call; generation starts when the
        first chunk is requested. Closing or dropping the iterator stops the generation and frees its memory.

        Args:
            text: the text to speak. It and the arguments up to `max_chars` are described at :meth:`generate`.
            voice: name of the voice; None takes the checkpoint's first.
            seed: 0 .. 2^64 - 1; None draws one.
            steps: evaluations of the velocity network per frame, 1..64.
            solver: "euler" or "ab2".
            cfg_alpha: strength of the classifier-free guidance; 1 is none.
            max_frames: most frames of a part, 80 ms each.
            max_chars: most characters of a part; None never splits.
            first_chunk: frames of the first chunk, at least 1.
            chunk: most frames of a chunk, at least `first_chunk`.

        Returns:
            An iterator of Audio, with a ``close()`` method. The ``timings`` of a chunk are its own, but ``first_sound``
            is the first chunk's in all of them. ``ended`` is the text's in the last chunk, and False before.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names it.
            TypeError: an argument has the wrong type; the message names it.
        """
        check_int("first_chunk", first_chunk, 1, None)
        check_int("chunk", chunk, first_chunk, None)
        params = GenerationParams(voice, seed, cfg_alpha, max_frames, steps, solver, max_chars)
        requests = self._make_requests(text, params)
        return SpeechStream(self.engine, requests, chunk_sizes(first_chunk, chunk))

    async def submit(
        self, text: str, voice: str | None = None, seed: int | None = None, **arguments: Any
    ) -> AsyncIterator[Audio]:
        """Generate speech for one text in chunks, for asyncio: ``async for chunk in await tts.submit(text)``.

        This is :meth:`stream` as an async iterator of the same chunks. Each iterator has a thread of its own, so the
        event loop never waits for a frame; one of these threads at a time runs a frame for all requests. Leaving the
        iteration early, or cancelling the task that iterates, stops the generation and frees its memory.

        Args:
            text: the text to speak.
            voice: name of the voice; None takes the checkpoint's first.
            seed: 0 .. 2^64 - 1; None draws one.
            **arguments: the keyword arguments of :meth:`stream`, from `steps` to `chunk`.

        Returns:
            An async iterator of Audio.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names it. Nothing has run then.
            TypeError: an argument has the wrong type, or is unknown; the message names it.
        """
        return iterate_in_thread(self.stream(text, voice, seed, **arguments))

    @property
    def engine(self) -> Engine:
        """The engine that runs the requests; a new one if the model was accelerated, restored, cast or moved since."""
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
        """Most tokens of a request: the model's length, or what its fused backbone is prepared for if that is less."""
        positions = self.model.config.backbone.max_seq_len
        return positions if self._fused_backbone is None else min(positions, self._fused_backbone.max_seq_len)

    def _make_requests(self, text: str, params: GenerationParams) -> list[Request]:
        """Make one request for each part of a text, in order; a missing seed is drawn for all of them."""
        seed = secrets.randbits(64) if params.seed is None else params.seed
        steps = self.model.config.acoustic_transformer.n_decoding_steps if params.steps is None else params.steps
        return [self._make_request(part, params, seed, steps) for part in split_text(text, params.max_chars)]

    def _make_request(self, text: str, params: GenerationParams, seed: int, steps: int) -> Request:
        """Embed the prompt of one part of a text, and check what depends on the prompt's length."""
        voice = self._default_voice() if params.voice is None else params.voice
        tokens = self._prompt.encode(text, voice)
        positions = self.engine.runner.max_seq_len
        n_left = positions - len(tokens)
        if n_left < 1:
            raise ValueError(
                f"text is too long: its prompt of {len(tokens)} tokens leaves none for a frame, since a request may "
                f"have {positions} (the model's length, or cache_tokens); split the text or lower max_chars"
            )
        max_frames = min(MAX_FRAMES, n_left) if params.max_frames is None else params.max_frames
        check_int("max_frames", max_frames, 1, n_left)
        voice_rows, audio = self.voices[voice], self.model.config.audio.audio_token_id
        n_shared = tokens.index(audio) + len(voice_rows)  # all prompts of a voice are equal up to its last row
        prefix_key = PrefixKey.of(voice_rows, self.engine.runner.weights_version(), n_shared)
        prompt = self._embed_prompt(tokens, voice_rows)
        return Request(prompt, seed, float(params.cfg_alpha), max_frames, steps, params.solver, prefix_key)

    def _default_voice(self) -> str:
        """Return the first of the config's voices that the checkpoint has, or else its first voice."""
        if not self.voices:
            raise ValueError("the checkpoint has no voices (no files in voice_embedding)")
        named = [name for name in self.model.config.voices if name in self.voices]
        return named[0] if named else next(iter(self.voices))

    @property
    def _fused_backbone(self) -> "FusedBackbone | None":
        return vars(self.model).get("hidden_states")

    def _embed_prompt(self, tokens: list[int], prefix: Tensor) -> Tensor:
        """Return the prompt's embeddings, [T, dim]; the voice's embeddings `prefix` replace the rows of [AUDIO]."""
        ids = torch.tensor(tokens, device=prefix.device)
        vocabulary = self.model.config.backbone.vocab_size
        if max(tokens) >= vocabulary:
            raise ValueError(f"the tokenizer gives id {max(tokens)}, but the model's vocab_size is {vocabulary}")
        rows = self.model.embed_tokens(ids).clone()
        rows[ids == self.model.config.audio.audio_token_id] = prefix
        return rows


def _joined(parts: list[Audio]) -> Audio:
    """Join the parts of a text; ``first_sound`` lasts until the last part is done, as no part is returned earlier."""
    joined, first = Audio.join(parts), parts[0].timings
    waited = first.first_sound - first.total  # seconds in the queue before the first part was admitted
    timings = replace(joined.timings, first_sound=waited + joined.timings.total)
    return replace(joined, ended=all(part.ended for part in parts), timings=timings)
