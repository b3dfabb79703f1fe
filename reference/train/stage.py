"""The code that both training stages use: command line, time limit, learning rate and saved state."""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

SHOWN_EVERY = 100  # steps between two printed lines; the state is saved at the same steps
WARM_UP = 100  # steps over which the learning rate rises linearly


def arguments(description: str | None, minutes: float) -> argparse.Namespace:
    """Parse the command line of a training stage; `minutes` is the default of ``--minutes``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="folder for the files of both stages, outside the repository")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="minutes of processor time in total, earlier runs included"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class TrainingStage:
    """Trains a module with AdamW for a number of minutes of processor time.

    The learning rate follows a cosine of the processor time spent, so other load on the machine does not change the
    schedule. If `path` exists, training continues from the state saved there.

    Args:
        path: file in which the state is saved.
        trainer: the module to train.
        minutes: limit of the processor time in total, earlier runs included.
        rate: the highest learning rate.

    Attributes:
        step: number of steps done, earlier runs included.
    """

    def __init__(self, path: Path, trainer: nn.Module, minutes: float, rate: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.step, self._seconds, self._limit = 0, 0.0, minutes * 60
        self._path, self._trainer, self._rate = path, trainer, rate
        self._parameters = [p for p in trainer.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        self._sums: dict[str, float] = {}
        if path.exists():
            saved = torch.load(path)
            trainer.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.step, self._seconds = saved["step"], saved["spent"]
        torch.manual_seed(self.step)
        size = sum(p.numel() for p in self._parameters) / 1e6
        print(f"{size:.2f} M parameters, step {self.step}, {self._seconds / 60:.1f} min spent", flush=True)
        self._clock = time.process_time()

    @property
    def ended(self) -> bool:
        """Whether the limit of the processor time is reached."""
        return self._seconds >= self._limit

    def learn(self, loss: Tensor, figures: dict[str, Tensor]) -> bool:
        """Take one optimiser step on `loss`, and print the means of `figures` every SHOWN_EVERY steps.

        Args:
            loss: the loss to minimise, a scalar tensor.
            figures: values of this step by name, each a scalar tensor.

        Returns:
            Whether the state was saved, which happens every SHOWN_EVERY steps and at the end.
        """
        progress = self._seconds / self._limit
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, (self.step + 1) / WARM_UP) * cosine
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self.step += 1
        now = time.process_time()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item() / SHOWN_EVERY
        if self.step % SHOWN_EVERY == 0:
            means = "  ".join(f"{name} {mean:.3f}" for name, mean in self._sums.items())
            print(f"step {self.step}, {self._seconds / 60:.1f} of {self._limit / 60:g} min  {means}", flush=True)
            self._sums = {}
        if self.step % SHOWN_EVERY and not self.ended:
            return False
        state = {"model": self._trainer.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save({**state, "step": self.step, "spent": self._seconds}, self._path)
        return True
