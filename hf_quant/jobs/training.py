"""One model, one scheme: train the model rounded to it, then do what `compress` does with a result."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.data.calibration import Calibration
from hf_quant.data.held_windows import held_out
from hf_quant.disk.atomic import write_json
from hf_quant.disk.folders import discard
from hf_quant.disk.journal import is_journal, open_journal
from hf_quant.errors import PlanError
from hf_quant.evaluation.reference import Progress
from hf_quant.evaluation.yardstick import Base
from hf_quant.hf import HfQuantConfig, load
from hf_quant.hf.auto import hub_options, tokenizer_of
from hf_quant.hf.trainable import begin_from, computes_in
from hf_quant.jobs.beginning import trainable
from hf_quant.jobs.compress import Job, compress
from hf_quant.jobs.outputs import RECIPE, work_folder
from hf_quant.jobs.texts import needs_calibration
from hf_quant.training.distillation import divergence, hidden_error, hidden_states, refuse_other_shape
from hf_quant.training.loop import Loss, Settings, State, Steps
from hf_quant.training.modules import compute_wide

HELD, JUDGED = 16, 64  # of so many windows one is held out; at most about that many windows are
CALIBRATED_ON = 65536  # tokens of the training text, where training begins from the codes of a calibrated method


@dataclass(frozen=True)
class Training:
    """What to train on, and how.

    Attributes:
        text: What to train on.
        settings: How.
        teacher: The model whose distributions are learned; None learns the text itself.
        hidden_weight: Of the error of hidden states, beside the divergence from the teacher's distributions.
        start: Method whose codes training begins from.
        checkpoint: Quantized model that it begins from in their place.
        float32: Whether training computes in float32, whatever the result will be in.
        seconds: From one checkpoint to the next.
        watch: Wraps the states of a training, which know how many there will be, for a progress bar.
    """

    text: Calibration
    settings: Settings
    teacher: Base | None
    hidden_weight: float = 0.0
    start: str = "rtn"
    checkpoint: Base | None = None
    float32: bool = False
    seconds: float = 300.0
    watch: Progress = iter

    def windows(self) -> tuple[Tensor, Tensor]:
        """The windows that are trained on and those held out, ``[S, T]`` and ``[H, T]``."""
        held = held_windows(len(self.text.ids))
        return self.text.ids[~held], self.text.ids[held]

    def to_dict(self) -> dict[str, Any]:
        """For the recipe."""
        return {
            "held_out": int(held_windows(len(self.text.ids)).sum()),
            "loss": "cross-entropy with the text" if self.teacher is None else "KL divergence to the teacher",
            "hidden_weight": self.hidden_weight, "float32": self.float32,
            "teacher": None if self.teacher is None else _name(self.teacher.model),
            "start": self.start, "checkpoint": None if self.checkpoint is None else _name(self.checkpoint.model),
            "settings": self.settings.to_dict(), "text": self.text.to_dict(),
        }  # fmt: skip


def held_windows(total: int) -> Tensor:
    """Which windows of a training text are held out, bool ``[total]``."""
    return held_out(total, max(HELD, total // JUDGED))


def train_model(job: Job, training: Training, config: HfQuantConfig, out: Path) -> dict[str, Any]:
    """Train with one scheme and check what was written; it appears as ``out``, or as ``out-failed`` past the gate.

    Args:
        job: As for `hf_quant.jobs.compress.compress`.
        training: What to train on, and how.
        config: The scheme, and the layers that have it; ``method`` is left at its default.
        out: The folder that shall appear. Checkpoints lie in ``out.work`` until it does.

    Raises:
        HfQuantError: As `compress`, or the training cannot go on; says why.
    """
    refuse_other_vocabulary(job, training.teacher)
    if training.teacher is not None and training.hidden_weight:
        refuse_other_shape(job.base().config(), training.teacher.config())
    values = {member.name: getattr(job, member.name) for member in fields(Job)}
    train_job = _TrainJob(
        **values | {"overwrite": job.overwrite or _appeared(out, training)}, training=training, out=out
    )
    row = compress(replace(train_job, finish=train_job.finished), config, out)
    if is_journal(work_folder(out)):
        discard(work_folder(out), out)
    return row


@dataclass(frozen=True)
class _TrainJob(Job):
    """A `Job` whose model is trained, of one output folder."""

    training: Training = field(kw_only=True)
    out: Path = field(kw_only=True)
    became: dict[str, Any] = field(default_factory=dict)  # of the training, for the recipe

    def quantized(self, config: HfQuantConfig) -> Any:
        """The trained model, quantized, in memory."""
        training, work = self.training, work_folder(self.out)
        with open_journal(work, self._plan(config), self.say) as log:
            model = self._trainable(config)
            dtype = computes_in(model)
            if training.float32:
                compute_wide(model)
            ids, held = training.windows()
            count = len(ids) // training.settings.batch
            loss: Loss = text_loss
            if training.teacher is not None:
                teacher = training.teacher.load(torch.float32 if training.float32 else dtype)
                loss = distilled(teacher, training.hidden_weight)
            steps = Steps(model, ids, held, loss, training.settings, log, training.seconds, self.say)
            *_, state = training.watch(steps)
            self.became.update(
                tokens=len(state.losses) * training.settings.batch * training.text.ids.shape[1], epochs=state.step / count,
                losses=_ends(state), skipped=state.skipped, learning_rates=state.rates,
                kept=_kept(state),
            )  # fmt: skip
            with tempfile.TemporaryDirectory(dir=work) as folder:
                model.save_pretrained(folder)
                plan = model.hf_quantizer.plan
                del model
                saved = load(folder, dtype=dtype, **self.options("device_map", "trust_remote_code")).eval()
                saved.hf_quantizer.plan = plan
                return saved

    def _trainable(self, config: HfQuantConfig) -> Any:
        (ids, _), checkpoint = self.training.windows(), self.training.checkpoint
        slugs = [config.scheme, *(slug for slug in config.overrides.values() if slug is not None)]
        looks = needs_calibration(self.training.start, slugs, None)
        calibration = ids[: max(2, CALIBRATED_ON // ids.shape[1])] if looks else None
        requested = trainable(config, self.training.start, calibration)
        model = load(self.model, quantization_config=requested, **self.load)
        if checkpoint is not None:
            begin_from(model, checkpoint.load(computes_in(model)))
        return model

    def _plan(self, config: HfQuantConfig) -> dict[str, Any]:
        """All that decides what becomes of a training."""
        base, others = self.base(), (self.training.teacher, self.training.checkpoint)
        return self.training.to_dict() | {
            "config": config.to_dict(), "dtype": str(self.load.get("dtype")), "base": base.identity(),
            "circumstances": base.circumstances(), "identities": [other and other.identity() for other in others],
        }  # fmt: skip

    def finished(self, stage: Path, row: dict[str, Any]) -> dict[str, Any]:
        """Write into the recipe what was trained."""
        recipe = json.loads((stage / RECIPE).read_text(encoding="utf-8"))
        write_json(stage / RECIPE, recipe | {"training": self.training.to_dict() | self.became})
        return self.finish(stage, row) | {"training": self.became["kept"] | {"steps": self.training.settings.steps}}


def refuse_other_vocabulary(job: Job, teacher: Base | None) -> None:
    """Refuse a teacher that numbers tokens in another way.

    Raises:
        PlanError: Says how the vocabularies differ.
    """
    if teacher is None or teacher.model == job.model:
        return
    vocabulary, other = job.base().vocabulary(), teacher.vocabulary()
    if vocabulary != other:
        raise PlanError(
            f"teacher {teacher.model}: a vocabulary of {other} tokens, and the model has one of {vocabulary}"
        )
    tokenizers = [job.tokenizer, tokenizer_of(teacher.model, **hub_options(vars(teacher)))]
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise PlanError(f"teacher {teacher.model}: its tokenizer has other tokens than that of the model")


def _name(model: str) -> str:
    """Of a folder its name, since its path may be private."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def text_loss(model: Any, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens of ``rows [B, T]``, in nats."""
    rows = rows.to(model.device)
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def distilled(teacher: Any, hidden_weight: float) -> Loss:
    """A loss per token: the mean KL divergence from the teacher in nats; in training, with ``hidden_weight`` times `hidden_error`."""

    def loss(model: Any, rows: Tensor) -> Tensor:
        rows = rows.to(model.device)
        hidden = bool(hidden_weight) and model.training
        with torch.no_grad():
            expected = teacher(input_ids=rows.to(teacher.device), use_cache=False, output_hidden_states=hidden)
        given = model(input_ids=rows, use_cache=False, output_hidden_states=hidden)
        nats = divergence(given.logits[:, :-1], expected.logits[:, :-1].to(model.device)).mean()
        if not hidden:
            return nats
        states = [state.to(model.device) for state in hidden_states(expected)]
        return nats + hidden_weight * hidden_error(hidden_states(given), states).mean()

    return loss


def _ends(state: State) -> dict[str, float | None]:
    """Mean loss of the first and of the last twentieth of the steps."""
    count = max(1, len(state.losses) // 20)
    parts = {"first": state.losses[:count], "last": state.losses[-count:]}
    finite = {name: [loss for loss in losses if math.isfinite(loss)] for name, losses in parts.items()}
    return {name: sum(losses) / len(losses) if losses else None for name, losses in finite.items()}


def _kept(state: State) -> dict[str, Any]:
    """The state that is written: its step, and the loss on the windows held out before training and in it."""
    assert state.best is not None  # there is a look before the first step
    return {name: getattr(state.best, name) for name in ("step", "before", "after")}


def _appeared(out: Path, training: Training) -> bool:
    """Whether ``out`` is the result of this training already: its process was killed before it could remove the checkpoints."""
    try:
        recipe: Mapping[str, Any] = json.loads((out / RECIPE).read_text(encoding="utf-8"))
        stored = recipe["training"]
        return is_journal(work_folder(out)) and all(
            stored[name] == value for name, value in training.to_dict().items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
