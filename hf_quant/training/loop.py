"""Training that can be killed at any time: what it continues from is on disk, and it ends with the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.disk.journal import Journal
from hf_quant.errors import HfQuantError
from hf_quant.training.masters import Masters
from hf_quant.training.modules import SUFFIXES, FakeQuant
from hf_quant.training.rate import usual_rate

Loss = Callable[[Any, Tensor], Tensor]  # of a model and some windows [B, T]: the mean per token
PATIENCE = 3  # losses in a row that are not finite
LOOKS = 10  # times that the loss on the windows held out is measured
LAST = 0.05  # share of the learning rate that is left at the end (EfficientQAT, arXiv:2407.11062)


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Updates of the weights.
        batch: Windows of text in each.
        lr: Learning rate of AdamW, of weights; it falls along a cosine. None for the usual one of a model (`usual_rate`).
        ranges: Share of it that scales and offsets have: each moves all the weights of its group.
        warmup: Share of the steps in which it rises to that.
        clip: Norm that the gradient is cut down to.
        seed: Of the order of the windows, and of dropout.
        everything: Whether all other parameters of the model are trained too: embeddings, norms, biases.
    """

    steps: int
    batch: int
    lr: float | None = None
    ranges: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 0
    everything: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        assert self.lr is not None  # since `Steps` knows the model
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.lr * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)

    def windows(self, step: int, count: int) -> Tensor:
        """Numbers of the windows of a step, of ``count``: each comes once before any comes again."""
        at = range(step * self.batch, (step + 1) * self.batch)
        orders = {epoch: self._order(epoch, count) for epoch in {i // count for i in at}}
        return torch.stack([orders[i // count][i % count] for i in at])

    def looks(self, step: int) -> bool:
        """Whether the loss on the windows held out is measured after ``step`` steps: `LOOKS` times, and after the last."""
        return step in {round(look * self.steps / LOOKS) for look in range(1, LOOKS + 1)}

    def _order(self, epoch: int, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))

    def to_dict(self) -> dict[str, Any]:
        """What must be the same for a training to go on: all but the learning rate."""
        return {name: value for name, value in asdict(self).items() if name != "lr"}


@dataclass
class Best:
    """The state with the least loss on the windows held out.

    Attributes:
        step: Steps that were done; 0 is the model before training.
        before: Loss before training.
        after: Loss of this state.
        parameters: The trained parameters then, float32, on the CPU.
    """

    step: int
    before: float
    after: float
    parameters: dict[str, Tensor]


@dataclass
class State:
    """Where a training is.

    Attributes:
        step: Steps that are done.
        losses: Of each of them; NaN of those that were skipped.
        rates: Steps from which a learning rate held, and that rate: a training may go on with another.
        best: The best state so far; None before the first look.
    """

    step: int
    losses: list[float]
    rates: list[tuple[int, float]]
    best: Best | None = None

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        return sum(not math.isfinite(loss) for loss in self.losses)


@dataclass(frozen=True)
class Steps:
    """A training of the rounded weights of a model, or of all of it; iterating trains, and yields the state after each step.

    At the end the model is in the state with the least loss on the windows held out, which may be that before the first step.

    Attributes:
        model: Trainable (`hf_quant.training.FakeQuant`).
        ids: What is trained on, int64 ``[S, T]``.
        held: Windows held out, int64 ``[H, T]``, H at least 1.
        loss: Mean loss per token of some windows ``[B, T]``.
        settings: How.
        journal: Of the work folder; a training that is in it goes on.
        seconds: From one checkpoint to the next; 0 writes one after every step.
        say: Is told of the losses at each look, and of each step that is skipped.
    """

    model: nn.Module
    ids: Tensor
    held: Tensor
    loss: Loss
    settings: Settings
    journal: Journal
    seconds: float
    say: Callable[[str], None]

    def __len__(self) -> int:
        return self.settings.steps - self._done() + 1

    def _done(self) -> int:
        return int(self.journal.parts[-1]["step"]) if self.journal.parts else 0

    def __iter__(self) -> Iterator[State]:
        """The first state is that before any step, or of a training that goes on.

        Raises:
            HfQuantError: The loss or its gradient was not finite several times in a row, or the loss before the first step.
        """
        settings = self.settings
        if settings.lr is None:
            settings = replace(settings, lr=usual_rate(self.model, settings.steps))
            self.say(f"learning rate {settings.lr:g}, chosen by the distance between codes")
        assert settings.lr is not None
        masters = Masters(_trained(self.model, settings.everything))
        optimizer = _optimizer(masters.values, settings)
        torch.manual_seed(settings.seed)
        state = _restore(self.journal, masters, optimizer)
        if not state.rates or state.rates[-1][1] != settings.lr:
            state.rates.append((state.step, settings.lr))
        if state.best is None:
            self._look(state, masters)
        yield state
        self.model.train()
        written = time.monotonic()
        while state.step < settings.steps:
            rows = self.ids[settings.windows(state.step, len(self.ids))]
            state.losses.append(_update(self.model, rows, self.loss, masters, optimizer, settings, state.step))
            state.step += 1
            if settings.looks(state.step):
                self._look(state, masters)
            if not math.isfinite(state.losses[-1]):
                _refuse_divergence(state, self.journal, self.say)
            elif time.monotonic() - written >= self.seconds or state.step == settings.steps:
                _write(self.journal, state, masters, optimizer)
                written = time.monotonic()
            yield state
        masters.set(_best(state).parameters)
        self.model.eval()

    def _look(self, state: State, masters: Masters) -> None:
        """Measure the loss on the windows held out, and remember the state if none was better."""
        training = self.model.training
        held = _held_out_loss(self.model.eval(), self.held, self.loss, self.settings.batch)
        self.model.train(training)
        if state.best is None and not math.isfinite(held):
            raise HfQuantError("training: the loss of the model before the first step is not finite")
        if state.best is None or held < state.best.after:
            before = held if state.best is None else state.best.before
            state.best = Best(state.step, before, held, masters.copied())
        loss = f"loss {state.losses[-1]:.4f}, " if state.losses else ""
        self.say(f"step {state.step} of {self.settings.steps}: {loss}held-out loss {held:.4f}")


def _trained(model: nn.Module, everything: bool) -> dict[str, nn.Parameter]:
    """By name, what is shared once; what is not trained is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(everything and parameter.is_floating_point())
    for module in model.modules():
        if isinstance(module, FakeQuant):
            for values in map(module.parameters_of, module.trained()):
                for parameter in values.values():
                    parameter.requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    ranges = [parameter for name, parameter in parameters.items() if name.endswith(SUFFIXES[1:])]
    weights = [parameter for name, parameter in parameters.items() if not name.endswith(SUFFIXES[1:])]
    groups = [{"params": weights, "share": 1.0}, {"params": ranges, "share": settings.ranges}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


@torch.no_grad()
def _held_out_loss(model: nn.Module, ids: Tensor, loss: Loss, batch: int) -> float:
    """Mean loss per token of ``ids [H, T]``."""
    return sum(loss(model, rows).item() * len(rows) for rows in ids.split(batch)) / len(ids)


def _best(state: State) -> Best:
    assert state.best is not None  # there is a look before the first step
    return state.best


def _update(
    model: nn.Module, rows: Tensor, loss: Loss, masters: Masters, optimizer: torch.optim.Optimizer, settings: Settings,
    step: int,
) -> float:  # fmt: skip
    """One step; returns its loss, or NaN where that or the gradient was not finite and nothing was changed."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step) * group["share"]
    batch_loss = loss(model, rows)
    value = batch_loss.item()
    if math.isfinite(value):
        batch_loss.backward()
        masters.take_gradients()
        norm = nn.utils.clip_grad_norm_(masters.values.values(), settings.clip)
        value = value if bool(norm.isfinite()) else math.nan
    if math.isfinite(value):
        optimizer.step()
        masters.round()
    optimizer.zero_grad()
    return value if math.isfinite(value) else math.nan


def _refuse_divergence(state: State, journal: Journal, say: Callable[[str], None]) -> None:
    say(f"step {state.step}: the loss or its gradient is not finite, so the step is skipped")
    if len(state.losses) >= PATIENCE and not any(map(math.isfinite, state.losses[-PATIENCE:])):
        raise HfQuantError(
            f"training: the loss or its gradient was not finite in {PATIENCE} steps in a row, up to step {state.step}; "
            f"{journal.folder} holds the last good state, from which a lower learning rate can go on"
        )


def _write(journal: Journal, state: State, masters: Masters, optimizer: torch.optim.Optimizer) -> None:
    content = {
        "parameters": {name: master.detach() for name, master in masters.values.items()},
        "optimizer": optimizer.state_dict(),
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())],
        "losses": state.losses, "rates": state.rates, "best": vars(_best(state)),
    }  # fmt: skip
    journal.replace(f"step-{state.step:08d}.pt", lambda draft: torch.save(content, draft), {"step": state.step})


def _restore(journal: Journal, masters: Masters, optimizer: torch.optim.Optimizer) -> State:
    """Go on from the last checkpoint, if there is one."""
    if not journal.parts:
        return State(0, [], [])
    stored: Any = torch.load(_file(journal), map_location="cpu", weights_only=True)
    masters.set(stored["parameters"])
    optimizer.load_state_dict(stored["optimizer"])
    torch.set_rng_state(stored["random"][0])
    if torch.cuda.is_available() and len(stored["random"]) > 1:
        torch.cuda.set_rng_state_all(stored["random"][1:])
    return State(journal.parts[-1]["step"], stored["losses"], stored["rates"], Best(**stored["best"]))


def _file(journal: Journal) -> Path:
    return journal.folder / str(journal.parts[-1]["file"])
