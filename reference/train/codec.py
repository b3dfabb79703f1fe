"""Train the demo voice's codec (first stage), with semantic codes that identify a word and a frame of that word."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import AudioTokenizer
from ..config import Config
from .data import FRAME, VOICES, WordBank, make_bank, random_words
from .params import PARAMS
from .stage import TrainingStage, arguments

CROP = 32  # frames per example
BATCH = 4
SILENCED = 0.15  # share of examples that are decoded without their acoustic codes
NOISE = 0.12  # standard deviation of the noise on acoustic latents; their levels are 0.1 apart
FLOOR = 1e-3  # RMS below which sound counts as silence; full scale is 1
WINDOWS = (2048, 1024, 512, 256, 128)  # samples


class CodecTrainer(nn.Module):
    """The codec in training, with the semantic codebook as a parameter that the optimiser trains.

    The codec itself has buffers for the codebook, because the public model's codebook was trained by moving averages.
    :meth:`store` writes the trained codebook to these buffers.
    """

    def __init__(self, codec: AudioTokenizer) -> None:
        super().__init__()
        self.codec = codec
        self.codebook = nn.Parameter(torch.randn_like(codec.quantizer.semantic_codebook.embedding_sum))

    def forward(self, sound: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode sound to codes, decode the codes, and compute the loss of the semantic codes.

        Args:
            sound: [B, 1, n].
            labels: int64 [B, T], the right semantic code of each frame.

        Returns:
            The decoded sound, fp32 [B, 1, n]; the cross-entropy of the semantic codes, []; and the share of right
            semantic codes, [].
        """
        dim = self.codebook.shape[1]
        latents = self.codec.latents(sound).float()
        semantic, acoustic = latents[:, :dim].transpose(1, 2), latents[:, dim:].tanh()
        with torch.autocast("cpu", enabled=False):
            logits = (2 * semantic @ self.codebook.T - self.codebook.square().sum(1)) / math.sqrt(dim)
        codes = logits.argmax(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.01)
        half = (self.codec.quantizer.levels - 1) / 2
        rounded = acoustic + (((acoustic * half).round() / half) - acoustic).detach()
        # noise makes the decoder robust to acoustic codes that are one or two levels off; some examples get no acoustic
        # latents, so that the sound of the semantic codes alone becomes intelligible
        noisy = rounded + NOISE * torch.randn_like(rounded)
        kept = (torch.rand(len(sound), 1, 1) > SILENCED).float()
        quantised = torch.cat((self.codebook[codes].transpose(1, 2), noisy * kept), dim=1)
        return self.codec.synthesize(quantised).float(), loss, (codes == labels).float().mean()

    @torch.no_grad()
    def store(self) -> AudioTokenizer:
        """Write the trained codebook to the codec's buffers and return the codec."""
        book = self.codec.quantizer.semantic_codebook
        book.embedding_sum.copy_(self.codebook)
        book.cluster_usage.fill_(1.0)
        return self.codec


def spectral_loss(a: Tensor, b: Tensor, step: int) -> Tensor:
    """Return the difference of the magnitude spectra of `a` and `b` (the loss of arXiv 1910.11480).

    The loss is the mean absolute difference of log magnitudes plus the relative L2 error of magnitudes.

    Args:
        a: decoded sound, [B, n].
        b: the original sound, [B, n].
        step: number of the step, which selects two of the five window lengths.

    Returns:
        [], the mean over the two window lengths.
    """
    total = a.new_zeros(())
    # only two window lengths per step, because two already take half of the step's time
    lengths = np.random.default_rng(step).permutation(WINDOWS)[:2].tolist()
    for n in lengths:
        window = torch.hann_window(n)
        x, y = (torch.stft(s, n, n // 4, window=window, return_complex=True) for s in (a, b))
        # expected power of a bin for white noise of RMS FLOOR, as the squares of a Hann window sum to 0.375 n
        floor = FLOOR**2 * 0.375 * n
        x, y = (torch.sqrt(z.real.square() + z.imag.square() + floor) for z in (x, y))
        total = total + (x.log() - y.log()).abs().mean() + (x - y).norm() / y.norm()
    return total / len(lengths)


def batch(bank: WordBank, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return the sound and labels of BATCH random strings of words, each cut or padded with silence to CROP frames.

    Returns:
        Sounds [BATCH, CROP * FRAME] and labels int64 [BATCH, CROP].
    """
    sounds, labels = [], []
    for _ in range(BATCH):
        sound, label = bank.speak(int(generator.integers(len(VOICES))), random_words(generator, CROP // 6))
        if generator.random() < 0.3:
            n_quiet = int(generator.integers(1, 4))
            sound, label = F.pad(sound, (n_quiet * FRAME, 0)), F.pad(label, (n_quiet, 0))
        missing = max(0, CROP - len(label))
        sounds.append(F.pad(sound, (0, missing * FRAME))[: CROP * FRAME])
        labels.append(F.pad(label, (0, missing))[:CROP])
    return torch.stack(sounds), torch.stack(labels)


def main() -> None:
    """Train for the given minutes, starting from the saved state if there is one, and write ``codec.pt``."""
    args = arguments(__doc__, minutes=25)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    trainer = CodecTrainer(AudioTokenizer(Config.from_params(PARAMS).codec, encoder=True))
    stage = TrainingStage(args.folder / "codec_training.pt", trainer, args.minutes, rate=1.5e-3)
    bank, generator = make_bank(), np.random.default_rng(stage.step)
    while not stage.ended:
        sound, labels = batch(bank, generator)
        with torch.autocast("cpu", torch.bfloat16):
            again, semantic, right = trainer(sound.unsqueeze(1), labels)
        again = again.squeeze(1)
        spectral, wave = spectral_loss(again, sound, stage.step), (again - sound).abs().mean() / sound.abs().mean()
        loss = spectral + 0.3 * wave + 0.3 * semantic
        if stage.learn(loss, {"spectral": spectral, "wave": wave, "semantic": semantic, "right": right}):
            torch.save(trainer.store().state_dict(), args.folder / "codec.pt")


if __name__ == "__main__":
    main()
