"""Train the demo voice's backbone and flow head (second stage) on the codec's codes of random strings of words."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import rope_table, rotate
from ..codec import AudioTokenizer
from ..config import EMPTY_AUDIO, END_AUDIO, N_SPECIAL_CODES, Config
from ..model import VoxtralTTS
from .data import VOICES, WORDS, WordBank, make_bank, random_words
from .params import PARAMS, word_id
from .stage import TrainingStage, arguments

BATCH = 16
MAX_WORDS = 7
VARIANTS = 5  # code sequences per voice and word; the first one is for a word at the start of a text
PREFIX = (13, 20)  # numbers of frames of the shortest and the longest voice clip
DRAWS = 640  # number of random frames per step that the flow loss is computed on
GUIDED = (2, 3)  # in these layers the first two heads are trained to attend to the current word's token
COUNTING = 1  # index of the layer after which the index of the current word is predicted
BOS, AUDIO, BEGIN_AUDIO, REPEAT, NEXT = 1, 24, 25, 35, 36


@dataclass(frozen=True)
class Batch:
    """The inputs and targets of B texts, each with S positions.

    Attributes:
        ids: int64 [B, S], token ids; AUDIO at the positions of frames.
        codes: int64 [B, S, 37] with the +2 offset, the frames at the positions with AUDIO.
        next: int64 [B, S, 37] with the +2 offset, the frame to generate after each position; EMPTY where no frame is
            generated.
        word: int64 [B, S], index of a word in the text. At a text token, it is the index of the token's word. At a
            position after which a frame is generated, it is the index of the word that the frame belongs to. It is the
            number of words at the token after the text and at the position before END. Elsewhere it is -1.
        pointer: int64 [B, S], a position. At a position after which a frame is generated, it is the position of the
            text token of the frame's word. At the position before END, it is the position of the token after the text.
            Elsewhere it is -1.
    """

    ids: Tensor
    codes: Tensor
    next: Tensor
    word: Tensor
    pointer: Tensor


@torch.no_grad()
def code_bank(codec: AudioTokenizer, bank: WordBank, generator: np.random.Generator) -> list[list[list[Tensor]]]:
    """Encode VARIANTS variants of every word in every voice.

    In variant 0, the word is at the start of a text. In the other variants, it follows a random word.

    Returns:
        [voice][word][variant]: codes, int64 [n, 37] with the +2 offset.
    """
    out = []
    for voice in range(len(VOICES)):
        of_voice = []
        for word in range(len(WORDS)):
            variants = []
            for i in range(VARIANTS):
                before = [] if i == 0 else random_words(generator, 1)
                sound, _ = bank.speak(voice, [*before, word])
                n = len(bank.labels(voice, word))
                codes = codec.encode(sound.view(1, 1, -1))[0].T + N_SPECIAL_CODES
                variants.append(codes[-n:])
            of_voice.append(variants)
        out.append(of_voice)
    return out


def prompt_and_frames(
    codes: list[list[list[Tensor]]], words: list[int], voice: int, generator: np.random.Generator
) -> tuple[list[int], list[Tensor], list[int]]:
    """Build the prompt and the frames of one example.

    Args:
        codes: from :func:`code_bank`.
        words: the text, as indices into WORDS.
        voice: index of the voice in VOICES.
        generator: random generator, which selects the voice's clip and the variants.

    Returns:
        The prompt's token ids. Then two tensors of frames, each int64 [n, 37] with an END frame as its last: the
        voice's clip and the text. Then, for each frame of the text, the index in the text of the frame's word.
    """
    clip = torch.cat([codes[voice][w][1] for w in random_words(generator, 3)])
    start = int(generator.integers(0, 8))
    clip = clip[start : start + int(generator.integers(PREFIX[0], PREFIX[1] + 1))]
    end = torch.full((1, 37), EMPTY_AUDIO)
    end[0, 0] = END_AUDIO
    spoken = [codes[voice][w][0 if i == 0 else int(generator.integers(1, VARIANTS))] for i, w in enumerate(words)]
    number = [i for i, s in enumerate(spoken) for _ in range(len(s))]
    head = [BOS, BEGIN_AUDIO] + [AUDIO] * (len(clip) + 1) + [NEXT]
    ids = [*head, *(word_id(w) for w in words), REPEAT, BEGIN_AUDIO]
    return ids, [torch.cat((clip, end)), torch.cat((*spoken, end))], number


def make_batch(codes: list[list[list[Tensor]]], generator: np.random.Generator) -> Batch:
    """Build a batch of BATCH random texts, which all have the same random number of words."""
    n_words = int(generator.integers(1, MAX_WORDS + 1))
    examples = []
    for _ in range(BATCH):
        voice, words = int(generator.integers(len(VOICES))), random_words(generator, n_words)
        examples.append(prompt_and_frames(codes, words, voice, generator))
    S = max(len(ids) + len(number) for ids, _, number in examples)
    ids = torch.zeros(BATCH, S, dtype=torch.int64)
    frames = torch.zeros(BATCH, S, 37, dtype=torch.int64)
    next_codes = torch.zeros(BATCH, S, 37, dtype=torch.int64)
    word, pointer = torch.full((BATCH, S), -1), torch.full((BATCH, S), -1)
    for i, (tokens, (clip, spoken), number) in enumerate(examples):
        n, stop = len(tokens), len(tokens) + len(number)
        text = n - 2 - n_words
        ids[i, :n] = torch.tensor(tokens)
        ids[i, n:stop] = AUDIO
        frames[i, 2 : 2 + len(clip)] = clip
        frames[i, n:stop] = spoken[:-1]
        next_codes[i, n - 1 : stop] = spoken
        numbers = torch.tensor([*number, n_words])
        word[i, text : n - 1] = torch.arange(n_words + 1)
        word[i, n - 1 : stop] = numbers
        pointer[i, n - 1 : stop] = numbers + text
    return Batch(ids, frames, next_codes, word, pointer)


def corrupt(codes: Tensor) -> Tensor:
    """Return a copy of codes with random errors, like the errors in codes that a model has generated.

    In most frames, some acoustic codes are changed by a few levels. In 6 % of the frames, the semantic code is replaced
    by a random one. END and EMPTY frames are not changed.

    Args:
        codes: int64 [B, S, 37] with the +2 offset.
    """
    strength = torch.rand(codes.shape[:2]).unsqueeze(-1) * 0.5
    off = (torch.randn(codes.shape) * 1.5).round().long() * (torch.rand(codes.shape) < strength)
    noisy = (codes + off).clamp(N_SPECIAL_CODES, 20 + N_SPECIAL_CODES)
    n_semantic = PARAMS["multimodal"]["audio_model_args"]["semantic_codebook_size"]
    wrong = torch.rand(codes.shape[:2]) < 0.06
    other = torch.randint(N_SPECIAL_CODES, n_semantic + N_SPECIAL_CODES, codes.shape[:2])
    noisy[..., 0] = torch.where(wrong, other, codes[..., 0])
    return torch.where(codes[..., 1:2] == EMPTY_AUDIO, codes, noisy)


class SpeechTrainer(nn.Module):
    """The model in training, with two auxiliary heads that are discarded afterwards.

    The head `count` predicts the index of the current word from the output of layer COUNTING. The head `acoustic`
    predicts the next frame's acoustic latents from the backbone's hidden state.
    """

    def __init__(self, model: VoxtralTTS) -> None:
        super().__init__()
        self.model = model
        dim = model.config.backbone.dim
        self.count = nn.Linear(dim, MAX_WORDS + 1)
        self.acoustic = nn.Linear(dim, model.config.audio.n_acoustic_codebook)

    def embed(self, batch: Batch) -> Tensor:
        """Embed a batch's tokens and frames, with errors added by :func:`corrupt`, and return [B, S, dim]."""
        model = self.model
        table = model.mm_audio_embeddings.audio_codebook_embeddings
        is_frame = batch.ids == AUDIO
        u = model.embed_tokens(batch.ids)
        rows = corrupt(batch.codes)[is_frame] + table.offsets
        return u.masked_scatter(
            is_frame.unsqueeze(-1), F.embedding_bag(rows, table.embeddings.weight, mode="sum").to(u.dtype)
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses by name, and under "right" the share of right semantic codes, each a scalar tensor.

        "look" is the loss of attention to the current word's token. "count" and "frame" are the losses of the heads
        `count` and `acoustic`. "semantic" and "flow" are the losses of the flow head.
        """
        model = self.model
        u = self.embed(batch)
        S, config = u.shape[1], model.backbone_config
        cos, sin = rope_table(torch.arange(S), config.head_dim, config.rope_theta)
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        losses: dict[str, Tensor] = {"look": u.new_zeros(())}
        asked = batch.pointer >= 0

        def guided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            groups = q.shape[2] // k.shape[2]
            k, v = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
            scores = (q.transpose(1, 2) @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            p = scores.masked_fill(~causal, -torch.inf).softmax(-1)  # [B, H, S, S]
            mass = p[:, :2].gather(-1, batch.pointer.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, -1))
            seen = mass.squeeze(-1).clamp(min=1e-6).log()
            losses["look"] = losses["look"] - seen.mean(1)[asked].mean() / len(GUIDED)
            o: Tensor = p.to(v.dtype) @ v
            return o.transpose(1, 2)

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        for i_layer, layer in enumerate(model.layers):
            u = layer(u, guided if i_layer in GUIDED else plain)
            if i_layer == COUNTING:
                numbered = batch.word >= 0
                losses["count"] = F.cross_entropy(self.count(u[numbered]).float(), batch.word[numbered])
        h, next_codes = model.norm(u)[asked], batch.next[asked]  # [N, dim], [N, 37]
        logits = model.acoustic_transformer.semantic_logits(h)
        losses["semantic"] = F.cross_entropy(logits, next_codes[:, 0])
        spoken = next_codes[:, 0] != END_AUDIO
        h, x = h[spoken], next_codes[spoken][:, 1:].float().sub(N_SPECIAL_CODES) / 10 - 1
        losses["frame"] = (self.acoustic(h).float() - x).square().mean()
        losses["flow"] = flow_loss(model, h, x)
        losses["right"] = (logits.argmax(-1) == next_codes[:, 0]).float().mean().detach()
        return losses


def flow_loss(model: VoxtralTTS, h: Tensor, x: Tensor) -> Tensor:
    """Return the mean squared error of the velocity at DRAWS random frames (arXiv 2210.02747).

    The target is ``x - noise``, the velocity on the straight line from noise to x. For 10 % of the random frames, the
    hidden state is set to zero, which trains the unconditional branch of the guidance.

    Args:
        model: the model.
        h: [N, dim], the backbone's hidden states.
        x: [N, K], the acoustic latents, in -1..1, of the frame to generate from each hidden state.
    """
    i = torch.randint(len(h), (DRAWS,))
    h, x = h[i] * (torch.rand(DRAWS, 1) > 0.1), x[i]
    noise, t = torch.randn_like(x), torch.rand(DRAWS)
    v: Tensor = model.acoustic_transformer.velocity(noise + t.unsqueeze(1) * (x - noise), t, h)
    return (v - (x - noise)).square().mean()


def main() -> None:
    """Train for the given minutes, starting from the saved state if there is one, and write ``speech.pt``."""
    args = arguments(__doc__, minutes=40)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = VoxtralTTS(Config.from_params(PARAMS), encoder=True)
    model.audio_tokenizer.load_state_dict(torch.load(args.folder / "codec.pt"))
    model.audio_tokenizer.requires_grad_(False)
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    with torch.no_grad():
        # a frame's embedding sums 1 semantic row and 36 of these acoustic rows, which would outweigh the semantic one
        table[model.config.audio.embedding_offsets[1] :] *= 0.15
    trainer = SpeechTrainer(model)
    stage = TrainingStage(args.folder / "speech_training.pt", trainer, args.minutes, rate=1e-3)
    generator = np.random.default_rng(stage.step)
    codes = code_bank(model.audio_tokenizer, make_bank(), generator)
    while not stage.ended:
        # MATH is the faster backend for attention of the flow head's three tokens, measured with the backward pass
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses = trainer(make_batch(codes, generator))
        loss = losses["semantic"] + losses["flow"] + losses["frame"] + 0.3 * losses["look"] + 0.3 * losses["count"]
        if stage.learn(loss, losses):
            torch.save(model.state_dict(), args.folder / "speech.pt")


if __name__ == "__main__":
    main()
