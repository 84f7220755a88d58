"""A step whose loss or gradient is not finite never reaches the optimizer, and what goes wrong is said in a sentence.

`GuardedSteps` stands before a `transformers.Trainer` in the bases of a class and needs nothing else of it.
"""

import json
import logging
import math
import os
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

logger = logging.getLogger(__name__)

BAD_STEPS = "bad_steps.jsonl"
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # of DDP, of compiling and of PEFT
TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())
TRACKER_PACKAGES = ("tensorboard", "trackio", "wandb")  # called as in `report_to`
NO_MEMORY = ("out of memory", "can't allocate memory")


class NoMemory(RuntimeError):
    """A step did not fit into the device's memory."""


def check_trackers(names: list[str]) -> None:
    """Raise for one that is not installed before anything is loaded, and in words."""
    found = get_available_reporting_integrations()
    if missing := next((name for name in names if name in TRACKER_PACKAGES and name not in found), None):
        raise ImportError(
            f"`report_to` is {missing!r}, which is not installed: pip install {missing}, or pass --report_to none"
        )


class GuardedSteps:
    """A mixin for trainers: `class MyTrainer(GuardedSteps, Trainer)`.

    A step that is not finite changes neither weights nor the optimizer's state.  It is counted in `bad_steps` (and in
    the logs), and `bad_steps.jsonl` in the output folder lists it with its samples and the modules where it was found.
    After `args.max_bad_steps` (5) of them in a row FloatingPointError is raised.

    current_sample_ids: the ids of the samples since the last optimizer step, which a subclass fills; emptied after it.
    """

    def __init__(self, *args, **kwargs):
        self.bad_steps, self.bad_steps_in_a_row = 0, 0
        self.current_sample_ids: list[str] = []
        self._losses: list[Tensor] = []  # of this step
        self._gradient_norms: dict[str, Tensor] = {}  # of this step, before clipping spreads what is not finite
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False  # it would show another loss and change nothing else

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.bad_steps_in_a_row, self._losses, self._first_step = 0, [], self.state.global_step
        self._good_loss, self._good_steps = 0.0, 0
        self.bad_steps = self._recall_bad_steps()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TRACKERS):
                for event in ("on_log", "on_evaluate", "on_save", "on_train_end"):
                    setattr(callback, event, partial(self._tell_tracker, callback, event))
        return prepared

    def training_step(self, model, inputs, *args, **kwargs):
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except RuntimeError as error:
            retried = self.args.auto_find_batch_size  # with a smaller batch, by the stock trainer
            if retried or not any(words in str(error).lower() for words in NO_MEMORY):
                raise
            raise NoMemory(self._explain_memory(inputs)) from error
        self._losses.append(loss.detach())
        return loss

    def _explain_memory(self, inputs) -> str:
        ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
        size = f"{self.args.per_device_train_batch_size} samples"
        if isinstance(ids, Tensor) and ids.ndim == 2:
            size = f"{ids.shape[0]} sequences of {ids.shape[1]} tokens"
        return (
            f"step {self.state.global_step + 1} ran out of memory on {self.args.device} with a batch of {size}: lower "
            "`per_device_train_batch_size` and raise `gradient_accumulation_steps` as much, set "
            "`gradient_checkpointing`, or allow fewer image tiles or a shorter `max_length`"
        )

    # Gradients

    def _clip_grad_norm(self, model):
        self._note_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """The last word before the optimizer: without gradients it touches neither weights nor its moments."""
        if grad_norm is None:
            self._note_gradients()
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack(self._losses).sum() if self._losses else torch.zeros(())
        bad = self._is_bad(loss, grad_norm)
        if bad:
            self._leave_out(model, float(loss), float(_whole(grad_norm)) if grad_norm is not None else math.nan)
        else:
            self.bad_steps_in_a_row = 0
            self._good_loss, self._good_steps = self._good_loss + loss, self._good_steps + 1
        self._losses, self._gradient_norms, self.current_sample_ids = [], {}, []
        return grad_norm

    def _note_gradients(self) -> None:
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        local = [getattr(grad, "to_local", lambda grad=grad: grad)() for grad in named.values()]
        self._gradient_norms = dict(zip(named, torch._foreach_norm(local), strict=True)) if local else {}

    def _is_bad(self, loss: Tensor, grad_norm) -> bool:
        """The same in every process, even where only one of them has seen the loss."""
        total = loss if grad_norm is None else loss + _whole(grad_norm)
        overflow = loss.isfinite() & ~total.isfinite()
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1 and overflow:
            return False  # fp16 finds its scale this way: the scaler leaves the step out itself
        if self.args.world_size <= 1:
            return not bool(total.isfinite())
        bad = (~total.isfinite()).int().to(self.args.device)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        return bool(bad)

    def _leave_out(self, model, loss: float, grad_norm: float) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        step, limit = self.state.global_step + 1, getattr(self.args, "max_bad_steps", 5)
        found = [(self.current_sample_ids, [n for n, norm in self._gradient_norms.items() if not norm.isfinite()])]
        if self.args.world_size > 1:
            found = gather_object(found)
        samples = [name for names, _ in found for name in names]
        modules = module_names(name for _, names in found for name in names)
        if self.is_world_process_zero():
            entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
            with open(Path(self.args.output_dir) / BAD_STEPS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, "modules": modules, "samples": samples}, ensure_ascii=False) + "\n")
            where = f", gradient in {', '.join(modules)}" if modules else ""
            logger.warning(
                f"step {step} is left out: loss {loss}, gradient norm {grad_norm}{where}; samples: "
                f"{', '.join(samples) or 'unknown'}"
            )
        if self.bad_steps_in_a_row >= limit:
            raise FloatingPointError(
                f"{self.bad_steps_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not "
                f"finite, expected fewer than {limit}: look at the samples in {BAD_STEPS}, lower `learning_rate`, or "
                "raise `max_bad_steps`, and resume from the last checkpoint, which is good"
            )

    def _recall_bad_steps(self) -> int:
        """How many there were up to the step that the run goes on from; later ones are struck off the list."""
        path = Path(self.args.output_dir) / BAD_STEPS
        if not path.is_file():
            return 0
        lines = path.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= self.state.global_step]
        if len(kept) < len(lines) and self.is_world_process_zero():
            half = path.with_name(f".{path.name}.incomplete")
            half.write_text("".join(kept), encoding="utf-8")
            os.replace(half, path)
        return len(kept)

    # Logs

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs["bad_steps"] = self.bad_steps
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The stock trainer empties its sum by subtracting it from itself, which does not rid it of NaN."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._tr_loss.zero_()

    def _finalize_training(self, *args, **kwargs):
        """The final `train_loss` is the mean over the good steps."""
        steps = self.state.global_step - self._first_step
        if 0 < self._good_steps < steps:
            mean = self._good_loss.to(self.args.device) / self._good_steps
            self._total_loss_scalar = self.accelerator.gather(mean).mean().item() * steps
            self._tr_loss.zero_()
        return super()._finalize_training(*args, **kwargs)

    def _tell_tracker(self, callback, event: str, *args, **kwargs):
        """A tracker that fails is dropped, not the run."""
        try:
            return getattr(type(callback), event)(callback, *args, **kwargs)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning(f"{type(callback).__name__} failed ({reason}) and is dropped: training goes on without it")
            # A new list: the handler is going through the old one.
            handler = self.callback_handler
            handler.callbacks = [other for other in handler.callbacks if other is not callback]
            return None


def module_names(parameters) -> list[str]:
    """What to call the modules of these parameters: one name for all that share their first two levels.

    >>> module_names(["model.mask_decoder.mlp.0.weight", "model.mask_decoder.mlp.2.bias", "lm_head.weight"])
    ['lm_head', 'model.mask_decoder.mlp']
    """
    groups: dict[tuple, list[str]] = {}
    for name in parameters:
        while wrapper := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None):
            name = name.removeprefix(wrapper)
        parts = name.split(".")[:-1] or [name]
        shared = groups.setdefault(tuple(parts[:2]), parts)
        groups[tuple(parts[:2])] = os.path.commonprefix([shared, parts])
    return sorted(".".join(parts) for parts in groups.values())


def _whole(grad_norm) -> Tensor:
    """Of a norm that may be a number, or spread over processes."""
    grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
    return torch.as_tensor(grad_norm).detach()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a torn line
