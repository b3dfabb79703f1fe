"""Speak texts with a Voxtral-class model, inspect and make checkpoints, and compile kernels in advance."""

import contextlib
import importlib
import io
import logging
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from soundfile import SoundFile

from . import __version__
from .audio import Audio, least_sound, sound_format, to_int16
from .checkpoint import find_folder, quantize_checkpoint, read_params, read_voices
from .engine.kv_cache import cache_bytes
from .generation_params import CFG_ALPHA
from .output_file import check_target, replacing
from .plain_errors import err, plain_errors
from .random_checkpoint import TINY_MOE, make_checkpoint, public_params
from .reference import Config
from .reference.config import BackboneConfig
from .reference.quantized import format_of
from .serve.command import serve
from .tts import DEMO, load
from .validation import has_triton, is_interpreted, resolve_backend, to_int
from .voice import default_first
from .weight_files import tensor_table, usual_dtype

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(serve)
out = Console()


@app.callback()
def main() -> None:
    """Set up logging for all commands."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)])


@app.command()
def say(
    text: Annotated[str | None, typer.Argument(help="Text to speak; '-' or no text reads standard input.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Output file: .wav, .flac or .ogg.")] = Path("out.wav"),
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the text from this file.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the demo voice.")] = None,
    voice: Annotated[
        str | None, typer.Option(help="Name of the voice; default: the first voice that `voxkern info` lists.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Speak with the voice of this recording (1 to 60 s).")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same sound; default: random.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Evaluations of the velocity network per frame, 1..64; default: the model's, 7.")
    ] = None,
    solver: Annotated[str, typer.Option(help="euler, or ab2, which needs fewer steps.")] = "euler",
    cfg: Annotated[float, typer.Option(help="Strength of the guidance; 1 means no guidance.")] = CFG_ALPHA,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if torch finds one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="triton (kernels), packed (CPU), torch, or auto.")] = "auto",
    max_frames: Annotated[
        int | None,
        typer.Option(
            help="The most frames (80 ms each), by default 2048. The limit applies to each part of a long text."
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write the file while the speech is generated.")] = False,
    play: Annotated[bool, typer.Option("--play", help="Play the speech too, while it is generated.")] = False,
) -> None:
    """Generate speech for a text, and write it to a sound file.

    The exit status is 0, or 1 after an error, 2 after a wrong option, or 3 if the model ends before any sound.
    """
    with plain_errors():
        words = _text(text, file)
        if voice is not None and clip is not None:
            raise ValueError("give --voice or --clip, not both")
        sound_format(output)  # a wrong output must fail before the work, not after it
        check_target(output)
        for option, path in (("--clip", clip), ("--file", file)):
            if path is not None and output.exists() and path.exists() and output.samefile(path):
                raise ValueError(f"{output} is the file of {option}: choose another output with -o")
        with err.status("loading"):
            tts = load(model, device=device, dtype=dtype, backend=backend)
            if clip is not None:
                voice = f"clip:{clip.name.lower()}"
                tts.add_voice(voice, clip)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with _started_later(Progress(*columns, console=err)) as progress:
            task = progress.add_task("frames", total=max_frames)
            if stream or play:
                chunks = tts.stream(
                    words, voice, seed, steps=steps, solver=solver, cfg_alpha=cfg, max_frames=max_frames
                )
                with contextlib.nullcontext(output) if stream else replacing(output) as path:
                    audio = _write_chunks(chunks, path, tts.sampling_rate, play, lambda n: _advance(progress, task, n))
            else:
                audio = tts.generate(
                    words,
                    voice,
                    seed,
                    steps=steps,
                    solver=solver,
                    cfg_alpha=cfg,
                    max_frames=max_frames,
                    on_frame=lambda n: _advance(progress, task, n - progress.tasks[task].completed),
                )
                audio.save(output)
            progress.update(task, total=audio.codes.shape[1], completed=audio.codes.shape[1])
    if not len(audio.samples):
        err.print(f"{output} holds no sound: the model generated END at once", style="red", soft_wrap=True)
        raise typer.Exit(3)
    err.print(
        f"{output}: {audio.seconds:.2f} s of sound in {audio.timings.total:.2f} s, "
        f"first sound ready after {audio.timings.first_sound:.2f} s, "
        f"real-time factor {audio.real_time_factor:.2f}, seed {audio.seed}"
        + ("" if audio.ended else "; cut off at the frame limit, before the model generated END"),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def info(
    source: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id; default: the demo voice.")] = None,
    batch: Annotated[int, typer.Option(help="Requests that run side by side.")] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds of speech per request.")] = 60.0,
) -> None:
    """Show the content of a checkpoint and the memory that it needs; for the demo voice, also the words it can say."""
    with plain_errors():
        to_int("batch", batch, 1, 10**6)
        if not 0 < seconds <= 10**9:  # false for NaN too
            raise ValueError(f"seconds must be more than 0 and at most 10^9, got {seconds}")
        folder = DEMO if source is None else find_folder(source)
        config = Config.from_params(read_params(folder))
        tensors = tensor_table(folder)
        voices = read_voices(folder, config.backbone.dim)
        dtype = usual_dtype(tensors.values())
    weights = sum(t.numel * t.dtype.itemsize for t in tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    n_tokens = int(seconds * config.frame_rate) + max((len(v) for v in voices.values()), default=0)
    cache = batch * cache_bytes(config.backbone, n_tokens, dtype)
    table = Table(show_header=False, box=None)
    for name, value in (
        ("parameters", f"{sum(t.numel for t in tensors.values()):,} in {len(tensors)} tensors"),
        ("dtype", ", ".join(dtypes)),
        ("backbone", f"{config.backbone.n_layers} layers of {config.backbone.dim}{_experts(config.backbone)}"),
        ("flow head", f"{config.acoustic_transformer.n_layers} layers of {config.acoustic_transformer.dim}"),
        ("codes", f"{config.audio.n_codebooks} a frame, {config.frame_rate:g} frames a second"),
        ("voices", ", ".join(default_first(voices, config.voices)) or "none"),
        ("weights", _size(weights)),
        ("KV cache", f"{_size(cache)} for {batch} x ({seconds:g} s and a voice)"),
        ("memory", f"{_size(weights + cache)} plus activations"),
    ):
        table.add_row(name, value)
    if source is None:
        from .reference.train.data import WORDS

        table.add_row(f"{len(WORDS)} words", ", ".join(WORDS))
    out.print(table)


@app.command()
def doctor() -> None:
    """Show this machine's hardware and software versions, and the backend that would be used."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    triton = has_triton()
    table = Table(show_header=False, box=None)
    for name, value in (
        ("voxkern", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, threads: {torch.get_num_threads()}"),
        ("triton", importlib.import_module("triton").__version__ if triton else "not installed"),
        ("GPU", gpu),
        ("backend", _backend()),
    ):
        table.add_row(name, value)
    out.print(table)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    full: Annotated[bool, typer.Option("--full", help="Use the public model's shapes: 8.0 GB in bf16.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    encoder: Annotated[bool, typer.Option("--encoder", help="Include the codec's encoder.")] = False,
    moe: Annotated[bool, typer.Option("--moe", help="Use a mixture of experts in the tiny backbone.")] = False,
    velocity_mlp: Annotated[bool, typer.Option("--velocity-mlp", help="Use an AdaLN MLP as the flow head.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is in the folder.")] = False,
) -> None:
    """Write a checkpoint with random weights, in the public checkpoint's format. The model generates noise."""
    with plain_errors(), err.status("drawing weights"):
        if moe and full:
            raise ValueError("give --full or --moe, not both: the public model has no experts")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder")
        if folder.exists() and any(folder.iterdir()) and not force:
            raise ValueError(f"{folder}: is not empty; --force replaces the checkpoint in it, and deletes its voices")
        overrides = {"moe": TINY_MOE} if moe else None
        make_checkpoint(folder, full, seed, encoder=encoder, overrides=overrides, velocity_mlp=velocity_mlp)
    _print_size(folder)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, without 8-bit weights.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be missing or empty.")],
    format_: Annotated[str, typer.Option("--format", help="int8 or fp8 (e4m3), with a scale for each row.")] = "int8",
) -> None:
    """Write a checkpoint with its large weights in 8 bits (the public model: 4.6 GB instead of 8.0 GB)."""
    with plain_errors():
        format_of(format_)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: is not an empty folder")
        found = find_folder(source)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with _started_later(Progress(*columns, console=err)) as progress:
            task = progress.add_task("weights", total=sum(t.numel for t in tensor_table(found).values()))
            quantize_checkpoint(found, folder, format_, lambda n: _advance(progress, task, n))
    _print_size(folder)


@app.command()
def warmup(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id; default: the public model's shapes.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="GPU architecture such as sm_90; default: this GPU's.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run side by side, as for load().")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    quantize: Annotated[str | None, typer.Option(help="int8 or fp8, as for load().")] = None,
    overlap: Annotated[bool, typer.Option("--overlap", help="For load(overlap=True); needs sm_90 or newer.")] = False,
) -> None:
    """Compile all kernels of a model in advance, also for a GPU that this machine lacks. The weights are not read."""
    from .warmup import warm_up

    with plain_errors():
        if is_interpreted():
            raise ValueError("kernels are not compiled in Triton's interpreter: unset TRITON_INTERPRET")
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if dtype not in dtypes:
            raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
        if arch is None:
            if not torch.cuda.is_available():
                raise ValueError("this machine has no GPU: name one with --arch, such as --arch sm_90")
            properties = torch.cuda.get_device_properties(0)  # an AMD architecture's name has features after a colon
            amd = torch.version.hip is not None
            arch = properties.gcnArchName.split(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
        params = public_params() if source is None else read_params(find_folder(source))
        with err.status("compiling") as status:
            n = warm_up(
                Config.from_params(params),
                arch,
                max_batch,
                dtypes[dtype],
                lambda name: status.update(f"ready: {name}"),
                quantize,
                overlap,
            )
    err.print(f"{n} kernels are ready for {arch}, max_batch {max_batch}, {dtype}", highlight=False)


def _backend() -> str:
    """Return the backend that load() takes by default, with the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve_backend("auto", device)
    if backend == "torch":
        return "torch: triton is not installed"
    if backend == "packed":
        return "packed: PyTorch with packed weights, as no GPU was found for the kernels"
    if device.type == "cpu":
        return "triton: the kernels, in Triton's interpreter (slow, for tests)"
    return "triton: the kernels"


@contextlib.contextmanager
def _started_later(progress: Progress) -> Iterator[Progress]:
    """Stop a progress bar at the end, if it was started.

    The first call of :func:`_advance` starts the bar, so that an argument error shows no bar.
    """
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


def _advance(progress: Progress, task: TaskID, n_frames: float) -> None:
    progress.start()
    progress.advance(task, n_frames)


def _write_chunks(
    chunks: Iterator[Audio], path: Path, sampling_rate: int, play: bool, on_chunk: Callable[[int], None]
) -> Audio:
    """Write each chunk to a file as it arrives, and play it if `play` is true; return the joined chunks.

    `on_chunk` is called with the number of frames of each chunk.
    """
    spoken = []
    with contextlib.ExitStack() as stack:
        player = stack.enter_context(_player(sampling_rate)) if play else None
        file = stack.enter_context(SoundFile(path, "w", sampling_rate, 1, format=sound_format(path)))
        for chunk in chunks:
            file.write(to_int16(chunk.samples))
            file.flush()
            if player is not None:
                player.write(chunk.samples)
            spoken.append(chunk)
            on_chunk(chunk.codes.shape[1])
        audio = Audio.join(spoken)
        if not len(audio.samples):
            file.write(to_int16(least_sound(audio.samples, file.format)))
    return audio


def _player(sampling_rate: int) -> Any:
    try:
        import sounddevice
    except ImportError:
        raise ValueError(
            "--play needs sounddevice, which is not installed: pip install 'voxkern[play]', or '.[play]' in a clone"
        ) from None
    try:
        return sounddevice.OutputStream(sampling_rate, channels=1, dtype="float32")  # type: ignore[no-untyped-call, unused-ignore]
    except sounddevice.PortAudioError as error:
        raise ValueError(f"--play found no sound device that it can use ({error})") from None


def _experts(backbone: BackboneConfig) -> str:
    moe = backbone.moe
    if moe is None:
        return ""
    shared = f" and {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    n_layers = sum(map(moe.in_layer, range(backbone.n_layers)))
    return f", {n_layers} with {moe.num_experts} experts: a token uses {moe.num_experts_per_tok}{shared}"


def _text(text: str | None, file: Path | None) -> str:
    if file is not None and text is not None:
        raise ValueError("give the text or --file, not both")
    if file is None and text not in (None, "-"):
        return str(text)
    if file is None and sys.stdin.isatty():
        raise ValueError("no text: give it as an argument, with --file, or on standard input")
    # utf-8-sig leaves out a byte order mark
    with io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig") if file is None else file.open(encoding="utf-8-sig") as source:
        try:
            return source.read().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file or 'standard input'}: is not UTF-8 text ({error.reason})") from None


def _print_size(folder: Path) -> None:
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    err.print(f"{folder}: {_size(n_bytes)}", highlight=False)


def _size(n_bytes: int) -> str:
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
