"""Make the demo voice's checkpoint from trained weights: ``python -m bench demo_voice WORK FOLDER``."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.command_line import parser_of
from voxkern.checkpoint import write_checkpoint
from voxkern.random_checkpoint import byte_tokenizer
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.train.data import VOICES, WORDS, make_bank
from voxkern.reference.train.params import PARAMS, spellings, word_id
from voxkern.voice import voice_prefix

CLIP = tuple(range(3))  # indices of the words in a voice's clip
CLIP_FRAMES = 16
WORD_PATTERN = r"\s?\p{L}+|(?s:.)"  # matches a word with the space before it, or one character


def tokenizer(voices: dict[str, int]) -> dict[str, Any]:
    """Return ``tekken.json``: the byte tokenizer with one more token for every spelling of every word.

    Args:
        voices: name -> number of rows in the voice's prefix.
    """
    tekken = byte_tokenizer(voices)
    for word in WORDS:
        for text in spellings(word):
            token = base64.b64encode(text.encode()).decode()
            tekken["vocab"].append({"rank": len(tekken["vocab"]), "token_bytes": token, "token_str": text})
    n = len(tekken["vocab"])
    n_special = tekken["config"]["default_num_special_tokens"]
    tekken["config"].update(pattern=WORD_PATTERN, num_vocab_tokens=n, default_vocab_size=n + n_special)
    return tekken


@torch.no_grad()
def write(work: Path, folder: Path) -> None:
    """Read ``speech.pt`` in the training folder `work`, and write the checkpoint to `folder`, in bf16."""
    model = VoxtralTTS(Config.from_params(PARAMS), encoder=True)
    model.load_state_dict(torch.load(work / "speech.pt"))
    rows = model.mm_audio_embeddings.tok_embeddings.weight
    for i in range(len(WORDS)):  # training used only the first spelling of a word; the others get that embedding
        first, n = word_id(i), len(spellings(""))
        rows[first + 1 : first + n] = rows[first]
    model.bfloat16()
    bank = make_bank()
    voices = {
        name: voice_prefix(model, bank.speak(i, list(CLIP))[0][: CLIP_FRAMES * 1920].numpy())
        for i, name in enumerate(VOICES)
    }
    lengths = {name: len(prefix) for name, prefix in voices.items()}
    write_checkpoint(folder, PARAMS, model.state_dict(), json.dumps(tokenizer(lengths)), voices)
    print(f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main(arguments: Sequence[str]) -> int:
    """Write the checkpoint of the trained weights in WORK to FOLDER."""
    parser = parser_of("demo_voice", __doc__)
    parser.add_argument("work", type=Path, help="the training folder, with speech.pt")
    parser.add_argument("folder", type=Path, help="the folder of the checkpoint to write")
    args = parser.parse_args(arguments)
    write(args.work, args.folder)
    return 0
