"""Text to speech: :func:`load` a checkpoint, then ``generate``, ``stream`` or ``submit`` texts."""

import copy
import itertools
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from .accelerate import accelerate
from .audio import Audio, join_parts
from .checkpoint import TOKENIZER, Checkpoint, find_folder, read_checkpoint
from .engine.engine import Engine
from .engine.kv_cache import PAGE_SIZE, PrefixKey
from .engine.make import MAX_FRAMES, fused_backbone_of, new_engine
from .engine.request import Request
from .engine.streaming import SpeechStream, chunk_sizes, iterate
from .generation_params import CFG_ALPHA, GenerationParams
from .packed.model import is_packed, pack
from .prompt import PromptEncoder, PromptMaker
from .reference import VoxtralTTS
from .reference.quantized import format_of
from .text import MAX_CHARS, split_text
from .validation import is_list, per_text, require_overlap, resolve_backend, resolve_device, resolve_dtype, to_int
from .voice import check_name, default_first, read_recording, voice_prefix

T = TypeVar("T")
Several = list[T] | tuple[T, ...] | np.ndarray | Tensor  # an argument with one value per text
DEMO = Path(__file__).with_name("demo")  # the checkpoint that comes with the package


def load(
    source: str | Path | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    max_batch: int = 1,
    cache_tokens: int | None = None,
    graphs: bool = True,
    quantize: str | None = None,
    overlap: bool = False,
) -> "TTS":
    """Load a checkpoint, and return a model that generates speech from text.

    The same seed gives the same sound on one machine, with the same number of CPU threads, backend, dtype, `max_batch`
    and package versions.

    Args:
        source: a checkpoint folder, or a Hugging Face hub id (OWNER/NAME), which is downloaded. None loads the demo
            voice, which comes with the package and speaks numbers, weekdays, months and greetings.
        device: "cpu", "cuda", "cuda:1", the torch device, or the index of a GPU. None takes the GPU if torch finds one,
            and the CPU otherwise.
        dtype: dtype of the weights: "bfloat16", "float16", "float32" or the torch dtype. None takes the dtype of most
            values in the checkpoint, or float32 if that dtype is float64.
        backend: "triton" runs the kernels. "packed" runs the reference modules with packed weights, on a CPU only.
            "torch" runs the reference modules as they are. If Triton is installed, "auto" takes the kernels on a GPU
            and in Triton's interpreter (TRITON_INTERPRET=1). In all other cases, "auto" takes "packed" on a CPU and
            "torch" on a GPU.
        max_batch: the most requests that run side by side, at most 64 on kernels. Other requests wait in a queue. A
            different `max_batch` may change the last bits of a sound, because products are summed in another order.
        cache_tokens: tokens of keys and values that all running requests together may reserve, at least 64. A request
            reserves its prompt's tokens plus `max_frames` tokens (80 ms each), in pages of 64, and waits until enough
            pages are free. None allows, for each of `max_batch` requests, 2560 tokens (or the model's `max_seq_len` if
            that is less) and one extra page for its voice. So `max_batch` requests of up to 2560 tokens each run side
            by side.
        graphs: True replays a frame's launches on a GPU as one CUDA graph. Each pair of steps and solver has graphs for
            1, 2, 4, .. and `max_batch` requests. They are captured when the first request with this pair starts. False
            launches the kernels one by one, which gives the same bits but is slower. `graphs` has no effect without
            kernels or on a CPU.
        quantize: "int8" or "fp8" keeps the large weights in 8 bits: 4.6 GB instead of 8.0 GB for the public model.
        overlap: True starts each kernel of a frame while the kernel before it still runs, which gives the same bits. It
            needs kernels on an NVIDIA GPU of compute capability 9.0 or newer. Overlap has not been run on a GPU.

    Raises:
        ValueError: an argument has a value that cannot be used; or the checkpoint cannot be used, in which case the
            error is a :class:`CheckpointError` or a :class:`ConfigError`.
        TypeError: `max_batch` or `cache_tokens` is not an integer, or `device` is of a wrong type.
        ModuleNotFoundError: `backend` is "triton", but Triton is not installed.
    """
    max_batch = to_int("max_batch", max_batch, 1, None)
    if cache_tokens is not None:
        cache_tokens = to_int("cache_tokens", cache_tokens, PAGE_SIZE, None)
    target = resolve_device(device)
    backend = resolve_backend(backend, target)
    if overlap:
        require_overlap(target, backend)
    settings = (max_batch, backend, cache_tokens, graphs, overlap)
    if quantize is not None:
        format_of(quantize)  # a wrong name must fail before the download
    folder = DEMO if source is None else find_folder(source)
    return TTS(read_checkpoint(folder, resolve_dtype(dtype), target, quantize), *settings)


class TTS:
    """Generates speech with a loaded model; :func:`load` returns such an object.

    Several threads may call the methods at once. The requests of all threads then run side by side.

    Attributes:
        model: the :class:`VoxtralTTS` module that holds the weights.
        max_batch: the most requests that run side by side.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_batch: int = 1,
        backend: str = "torch",
        cache_tokens: int | None = None,
        graphs: bool = True,
        overlap: bool = False,
    ) -> None:
        self.model: VoxtralTTS = checkpoint.model
        self.max_batch = max_batch
        self._cache_tokens, self._graphs, self._overlap = cache_tokens, graphs, overlap
        self._engine: tuple[Hashable, Engine] | None = None
        self._engine_lock, self._pid = threading.Lock(), os.getpid()
        if backend == "triton":
            accelerate(self.model, max_batch)
        elif backend == "packed":
            pack(self.model)
        lengths = {name: len(voice) for name, voice in checkpoint.voices.items()}
        config = self.model.config
        encoder = PromptEncoder(checkpoint.folder / TOKENIZER, lengths, config.audio, config.backbone.vocab_size)
        self._prompts = PromptMaker(self.model, encoder, dict(checkpoint.voices))

    @property
    def backend(self) -> str:
        """The backend in use: "triton" or "packed" while the model is accelerated, "torch" otherwise."""
        if fused_backbone_of(self.model) is not None:
            return "triton"
        return "packed" if is_packed(self.model) else "torch"

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the generated sound."""
        return self.model.config.codec.sampling_rate

    @property
    def voices(self) -> Mapping[str, Tensor]:
        """Maps each voice's name to its embeddings in a prompt, [N, dim]; the default voice is the first.

        :meth:`add_voice` adds a voice. The mapping is read-only, and does not change when a voice is added later.
        """
        voices = self._prompts.voices
        return MappingProxyType({name: voices[name] for name in default_first(voices, self.model.config.voices)})

    def add_voice(self, name: str, recording: str | Path | Tensor) -> None:
        """Make a voice from a recording or from embeddings, and add it to ``voices`` under a name.

        Args:
            name: the new voice's name, in lower case like the checkpoint's names. No other voice may have this name.
            recording: a sound file of 1 to 60 s; its channels are averaged, and sound at another sampling rate is
                resampled. Or the embeddings of a voice in a prompt, a floating-point tensor [N, dim].

        Raises:
            ValueError: the name is empty, not in lower case, has spaces at its ends or is taken; the file cannot be
                used (see :func:`read_recording`); the checkpoint has no codec encoder (the public checkpoint has none);
                or the embeddings have another shape or dtype, or a value that is not finite in the model's dtype.
            TypeError: `name` is not a string, or `recording` is neither a path nor a tensor.
        """
        check_name(name, self._prompts.voices)
        if not isinstance(recording, str | Path | Tensor):
            kind = type(recording).__name__
            raise TypeError(f"recording must be the path of a sound file or a tensor of embeddings, got {kind}")
        if not isinstance(recording, Tensor):
            recording = voice_prefix(self.model, read_recording(recording, self.sampling_rate))
        self._prompts.add(name, recording)

    def remove_voice(self, name: str) -> None:
        """Remove a voice. Requests that were made with this voice keep it, even if they still wait in the queue.

        Raises:
            ValueError: no voice has this name.
        """
        self._prompts.remove(name)

    def count_tokens(self, text: str, voice: str | None = None) -> int:
        """Return the number of tokens of a text's prompts, with its voice's tokens; a long text has several prompts.

        Raises:
            ValueError: the text is empty or has a character that cannot be encoded, or the voice is unknown.
            TypeError: `text` is not a string.
        """
        return sum(self._prompts.count_tokens(part, voice) for part in split_text(text, MAX_CHARS))

    def reset(self) -> None:
        """Drop all that was derived from the weights: prefixes in the KV cache, prepared weights and CUDA graphs.

        This is needed only after weights or voices were written in a way that PyTorch's version counters do not record:
        through ``.data``, or in inference mode. Running requests keep their KV cache and may read the new weights.
        """
        fused_backbone = fused_backbone_of(self.model)
        if fused_backbone is not None:
            accelerate(self.model, fused_backbone.max_batch)
        elif is_packed(self.model):
            pack(self.model)
        with self._engine_lock:
            self._engine = None

    def close(self) -> None:
        """End all requests of :meth:`submit`, and free the memory of the engine: its KV cache and CUDA graphs.

        The iterators of these requests raise a RuntimeError. This method waits for the frame in flight, and for the
        end of the thread that runs frames for asyncio. Calls of `generate` and `stream` in other threads continue, and
        keep the memory until their end. The model can still be used: the next call makes a new engine.
        """
        with self._engine_lock:
            current, self._engine = self._engine, None
        if current is not None:
            current[1].frame_thread.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TTS":
        """Return an independent copy with its own model and voices; running requests stay with the original."""
        new = copy.copy(self)
        new.model, new._prompts = copy.deepcopy((self.model, self._prompts), memo)
        new._engine, new._engine_lock = None, threading.Lock()
        return new

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
        text: Several[str],
        voice: str | Several[str] | None = None,
        seed: int | Several[int] | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float | Several[float] = CFG_ALPHA,
        max_frames: int | Several[int] | None = None,
        max_chars: int | None = MAX_CHARS,
        on_frame: Callable[[int], None] | None = None,
    ) -> list[Audio]: ...

    def generate(
        self,
        text: str | Several[str],
        voice: str | Several[str] | None = None,
        seed: int | Several[int] | None = None,
        *,
        steps: int | None = None,
        solver: str = "euler",
        cfg_alpha: float | Several[float] = CFG_ALPHA,
        max_frames: int | Several[int] | None = None,
        max_chars: int | None = MAX_CHARS,
        on_frame: Callable[[int], None] | None = None,
    ) -> Audio | list[Audio]:
        """Generate speech for one text, or for a list of texts side by side.

        With a list of texts, `voice`, `seed`, `cfg_alpha` and `max_frames` may be lists of the same length. Tuples,
        arrays and tensors count as lists, and numbers may be of any integer or real type, such as NumPy's. A text is
        spoken as it is: numbers and abbreviations are not written out. A text longer than `max_chars` is split into
        parts at the ends of sentences. Each part is generated as a separate text with the same seed, and the parts'
        sounds are joined without a pause. All arguments are checked before anything runs.

        Args:
            text: the text to speak, or a list of texts.
            voice: name of the voice, one of ``voices``. None takes the first voice of ``params.json`` that the
                checkpoint has, or else the first of ``voices``.
            seed: 0 .. 2^64 - 1. The same seed gives the same sound, alone or beside other texts. None draws a random
                seed for each text; ``Audio.seed`` has the seed.
            steps: evaluations of the velocity network per frame, 1..64. None takes the checkpoint's number (7).
            solver: "euler", or "ab2", the two-step Adams-Bashforth method, which needs fewer steps.
            cfg_alpha: strength of the classifier-free guidance; 1 means no guidance.
            max_frames: the most frames that a part may have, 80 ms each; longer speech is cut off. None allows 2048, or
                fewer if the model's `max_seq_len`, `cache_tokens` or the kernels' limit of 16,384 tokens leaves fewer
                after the prompt.
            max_chars: the most characters that a part may have, see :func:`split_text`. None does not split the text.
            on_frame: called with 1, 2, 3, .. after each frame that this call has run. Frames that another thread has
                run are not counted.

        Returns:
            One Audio for a text, or a list of Audio in the same order for a list of texts.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names it.
            TypeError: an argument has the wrong type; the message names it.
            FloatingPointError: a frame of a text has NaN or infinity; the other texts of this call are cancelled.
        """
        if isinstance(text, str):
            single = {"voice": voice, "seed": seed, "cfg_alpha": cfg_alpha, "max_frames": max_frames}
            for name, value in single.items():
                if is_list(value):
                    raise TypeError(f"{name} is a list but text is one string")
        elif not is_list(text):
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
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
        joined = [join_parts([next(audios) for _ in of_text]) for of_text in requests]
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

        The joined chunks equal the sound of :meth:`generate` to the last bit. The first chunk has `first_chunk` frames,
        and each next chunk has twice as many, up to `chunk`. The last chunk of a text or of a part may have fewer
        frames. If the model ends the last part exactly after a full chunk, one more chunk follows, without frames. At
        the end of any other part, this empty chunk is left out, but the size doubles all the same: a chunk of 1 frame
        is then followed by one of 4, not 2.

        All arguments are checked by this call; generation starts when the first chunk is requested. Closing or dropping
        the iterator stops the generation and frees the memory in use.

        Args:
            text: the text to speak. For this and the arguments up to `max_chars`, see :meth:`generate`.
            voice: name of the voice; None takes the default.
            seed: 0 .. 2^64 - 1; None draws a random seed.
            steps: evaluations of the velocity network per frame, 1..64; None takes the checkpoint's number.
            solver: "euler" or "ab2".
            cfg_alpha: strength of the classifier-free guidance; 1 means no guidance.
            max_frames: the most frames that a part may have, 80 ms each; None takes the default.
            max_chars: the most characters that a part may have; None does not split the text.
            first_chunk: frames of the first chunk, at least 1.
            chunk: the most frames that a chunk may have, at least `first_chunk`.

        Returns:
            An iterator of Audio, with a ``close()`` method. The ``timings`` of a chunk count the work since the chunk
            before it, except ``first_sound``, which has the first chunk's value in all chunks. In the last chunk,
            ``ended`` applies to the whole text; in earlier chunks, ``ended`` is False.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names it.
            TypeError: an argument has the wrong type; the message names it.
            FloatingPointError: raised by the iterator: a frame has NaN or infinity.
        """
        first_chunk = to_int("first_chunk", first_chunk, 1, None)
        chunk = to_int("chunk", chunk, first_chunk, None)
        params = GenerationParams(voice, seed, cfg_alpha, max_frames, steps, solver, max_chars)
        requests = self._make_requests(text, params)
        return SpeechStream(self.engine, requests, chunk_sizes(first_chunk, chunk))

    async def submit(
        self, text: str, voice: str | None = None, seed: int | None = None, **arguments: Any
    ) -> AsyncGenerator[Audio, None]:
        """Generate speech for one text in chunks, for asyncio: ``async for chunk in await tts.submit(text)``.

        The chunks are those of :meth:`stream`. One thread runs the frames of all iterators, so the event loop never
        waits for a frame. The thread starts when the first chunk is requested, and ends when no stream is left.
        Chunks that are not read yet stay in memory. Leaving the iteration early, or cancelling the task that iterates,
        stops the generation and frees the memory in use.

        Args:
            text: the text to speak.
            voice: name of the voice; None takes the default.
            seed: 0 .. 2^64 - 1; None draws a random seed.
            **arguments: the keyword arguments of :meth:`stream`, from `steps` to `chunk`.

        Returns:
            An async iterator of Audio.

        Raises:
            ValueError: an argument has a value that cannot be used; the message names the argument. The error is
                raised before anything runs.
            TypeError: an argument has the wrong type, or is unknown; the message names it.
            FloatingPointError: raised by the iterator: a frame has NaN or infinity.
            RuntimeError: raised by the iterator: the model was closed.
        """
        return iterate(self.stream(text, voice, seed, **arguments))

    @property
    def engine(self) -> Engine:
        """The engine that runs the requests.

        A new engine is made after the model was accelerated, restored, cast or moved, or `max_batch` was changed.
        """
        weights = [next(part.parameters()) for part in self.model.children()]
        key = (
            fused_backbone_of(self.model),
            self.backend,
            self.max_batch,
            *((w.dtype, w.device) for w in weights),
        )
        if self._pid != os.getpid():  # after a fork, the lock may be held by a thread that runs only in the parent
            self._engine_lock, self._pid = threading.Lock(), os.getpid()
        with self._engine_lock:
            if self._engine is None or self._engine[0] != key:
                engine = new_engine(self.model, self.max_batch, self._cache_tokens, self._graphs, self._overlap)
                self._engine = (key, engine)
            return self._engine[1]

    def _make_requests(self, text: str, params: GenerationParams) -> list[Request]:
        """Make one request for each part of a text, in order; if the seed is None, draw one seed for all parts."""
        seed = secrets.randbits(64) if params.seed is None else params.seed
        steps = self.model.config.acoustic_transformer.n_decoding_steps if params.steps is None else params.steps
        return [self._make_request(part, params, seed, steps) for part in split_text(text, params.max_chars)]

    def _make_request(self, text: str, params: GenerationParams, seed: int, steps: int) -> Request:
        """Make the request for one part of a text; check that the prompt leaves tokens for `max_frames`."""
        runner = self.engine.runner
        prompt = self._prompts.make(text, params.voice, runner.max_seq_len)
        n_left = runner.max_seq_len - len(prompt.embeddings)
        max_frames = min(MAX_FRAMES, n_left) if params.max_frames is None else params.max_frames
        max_frames = to_int("max_frames", max_frames, 1, n_left)
        prefix = PrefixKey.of(prompt.voice, runner.weights_version(), prompt.n_shared)
        return Request(prompt.embeddings, seed, params.cfg_alpha, max_frames, steps, params.solver, prefix)
