"""Checkpoints that are written whole or not at all, and checked before a run goes on from one.

    output_dir/
        .lock                        locked as long as a run trains here
        .checkpoint-12.incomplete/   being written; what a killed run leaves is finished or removed at the next start
        checkpoint-12/               whole: `manifest.json` lists every file, the step and the facts of the run

`SafeCheckpoints` stands before a `transformers.Trainer` in the bases of a class and needs nothing else of it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments

from ..data.manifest import write_json
from ..hub.manifest import MANIFEST_NAME, verify_manifest, write_manifest

logger = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75 is EX_TEMPFAIL: schedulers queue such a job again
LOCK = ".lock"
STATE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = {"weights": ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*"), "state": (STATE,)}
REST = {
    "optimizer": ("optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random numbers": ("rng_state*.pth",),
}


class SafeCheckpoints:
    """A mixin for trainers: `class MyTrainer(SafeCheckpoints, Trainer)`.

    `train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint.  A subclass may define
    `run_facts()`, a flat dict of what decides the result; a run only goes on from a checkpoint with the same facts,
    unless `args.resume_anyway`.  After SIGTERM or SIGINT a checkpoint is written at the end of the step, `train`
    returns, and `interrupted` is the number of the signal (see `EXIT_CODES`); a second one ends the process at once.
    """

    def __init__(self, *args, **kwargs):
        self.interrupted: int | None = None
        self._signal = 0  # received by this process, and perhaps not yet by the others
        self._half: Path | None = None  # stands for the output folder while a checkpoint is written
        config = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
        if config is not None and config.should_save:
            os.close(_open_lock(Path(config.output_dir)))
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self.interrupted, self._signal = None, 0
        with contextlib.ExitStack() as stack:

            def choose() -> str | None:
                stack.enter_context(only_run(self.args.output_dir))
                return self._choose_checkpoint(resume_from_checkpoint)

            path = self._together(choose, self.is_world_process_zero())
            stack.enter_context(self._note_signals())
            return super().train(path, *args, **kwargs)

    def _choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The folder to go on from, as `wanted` by the caller of `train`, or None to start anew."""
        output_dir, model_only = Path(self.args.output_dir), self.args.save_only_model
        finish_leftovers(output_dir)
        if not wanted:
            _warn_of_later(output_dir, 0)
            return None
        if wanted is True:
            path, skipped = find_checkpoint(output_dir, model_only)
            for folder, reason in skipped:
                logger.warning(f"{folder} is skipped: {reason}")
            if path is None:
                logger.warning(f"{output_dir} has no whole checkpoint: training starts anew")
                return None
        else:
            path = Path(wanted)
            if problem := find_problem(path, model_only):
                raise ValueError(
                    f"{path} cannot be resumed: {problem}; name a whole checkpoint, or True for the newest"
                )
            _warn_of_later(output_dir, _read_manifest(path)["step"])
        self._check_facts(path)
        logger.warning(f"training goes on from {path}")
        return str(path)

    def _facts(self) -> dict:
        """As JSON gives them back."""
        return json.loads(json.dumps(getattr(self, "run_facts", dict)(), default=str))

    def _check_facts(self, path: Path) -> None:
        found, wanted = _read_manifest(path).get("facts", {}), self._facts()
        different = next((name for name in {**wanted, **found} if found.get(name) != wanted.get(name)), None)
        if different is None:
            return
        message = (
            f"{path} was written with `{different}` {found.get(different)!r}, but this run has "
            f"{wanted.get(different)!r}: go on with the same value, or name another output folder"
        )
        if not getattr(self.args, "resume_anyway", False):
            raise ValueError(f"{message}, or set `resume_anyway`")
        logger.warning(f"{message}; `resume_anyway` is set")

    def _run_epoch(self, *args, **kwargs):
        """A run that was killed after its last checkpoint has nothing left to do; the stock loop would do a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs):
        """With processes that leave signals to this one: a scheduler, or a terminal, sends them to all at once."""
        loader = super()._get_dataloader(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)  # accelerate's stands before torch's
        if getattr(base, "num_workers", 0):
            base.worker_init_fn = partial(_leave_signals, base.worker_init_fn)
        return loader

    # Writing

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._half is None else str(self._half)

    def _save_checkpoint(self, model, trial):
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        half = folder / f".{name}.incomplete"
        self._together(lambda: check_finite(self.model))
        try:
            self._together(lambda: shutil.rmtree(half, ignore_errors=True), self.args.should_save)
            self._together(lambda: self._write_parts(half, folder, model, trial))
            self._together(lambda: self._publish(half / name, folder / name), self.args.should_save)
        except OSError as error:
            if self.args.should_save:
                shutil.rmtree(half, ignore_errors=True)
            raise OSError(self._explain(folder / name, error)) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _write_parts(self, half: Path, folder: Path, model, trial) -> None:
        """What the stock trainer writes, below `half`; the state never names that folder.

        The stock trainer would look for the best checkpoint there, and wait for the other processes before it does,
        forever if one of them has failed; so it is not told of one.
        """
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        self._half, self.state.best_global_step = half, None
        try:
            super()._save_checkpoint(model, trial)
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, SafetensorError) or "inline_container" in str(error):  # of torch.save
                raise OSError(str(error).splitlines()[0]) from error
            raise
        finally:
            self._half, self.state.best_global_step = None, best
        if self.args.should_save:
            self.state.save_to_json(str(half / f"checkpoint-{self.state.global_step}" / STATE))

    def _publish(self, half: Path, final: Path) -> None:
        _sync_all(half)
        manifest = write_manifest(half)
        content = json.loads(manifest.read_text("utf-8"))
        write_json(manifest, {**content, "step": self.state.global_step, "facts": self._facts()})
        _put_in_place(half, final)
        best = self.state.best_model_checkpoint
        rotate(final, self.args.save_total_limit, keep=[Path(best)] if best else [])

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._half is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _explain(self, path: Path, error: OSError) -> str:
        reason = " ".join((error.strerror or str(error)).split())
        free = shutil.disk_usage(path.parent).free
        known = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for values in self.optimizer.state.values() if self.optimizer is not None else ():
            known += [value for value in values.values() if isinstance(value, torch.Tensor)]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in known)
        return (
            f"{path} could not be written ({reason}): {free:,} bytes are free there and at least {needed:,} are "
            "needed; make room, lower `save_total_limit` or name another output folder, and resume from the last "
            "whole checkpoint"
        )

    def _together(self, function, mine: bool = True):
        """Call `function` in the processes where it is `mine`; all have the first one's result, or all fail."""
        result, failure = None, None
        try:
            result = function() if mine else None
        except (OSError, ValueError, FloatingPointError, RuntimeError) as error:
            failure = error
        if self.args.world_size > 1:
            outcomes = gather_object([(result, failure)])
            result = outcomes[0][0]
            failure = failure or next((other for _, other in outcomes if other is not None), None)
        if failure is not None:
            raise failure
        return result

    # Signals

    @contextlib.contextmanager
    def _note_signals(self):
        """Handlers may only be set in the main thread; elsewhere the signals are its business."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            self._signal = number
            for each in EXIT_CODES:
                signal.signal(each, signal.SIG_DFL)

        before = {number: signal.signal(number, note) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _agreed_signal(self) -> int:
        """A signal that reached any process reaches all of them at the same step."""
        if self.args.world_size <= 1:
            return self._signal
        highest = torch.tensor(self._signal, device=self.args.device)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return int(highest)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Called after every step, and once more at the end of an epoch, when an interrupted run has been saved."""
        if self.interrupted:
            return
        if number := self._agreed_signal():
            self.interrupted = number
            logger.warning(f"{signal.Signals(number).name}: a checkpoint is written, then training stops")
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # the checkpoint comes first: there may be little time
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        """The stock trainer would load the best checkpoint and, with a limit of one, delete the one just written."""
        best = self.state.best_model_checkpoint
        if self.interrupted:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best


def _leave_signals(then: Callable[[int], None] | None, number: int) -> None:
    """In a process that loads data: it ends when its trainer does."""
    for one in EXIT_CODES:
        signal.signal(one, signal.SIG_IGN)
    if then is not None:
        then(number)


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Folders with the name of a checkpoint, by step.  Clocks and time stamps play no part."""
    folders = (path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=_step)


def find_checkpoint(
    output_dir: str | os.PathLike, save_only_model: bool = False
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The whole checkpoint with the highest step, if any, and those above it with why they are not whole."""
    skipped = []
    for path in reversed(checkpoints(output_dir)):
        problem = find_problem(path, save_only_model)
        if problem is None:
            return path, skipped
        skipped.append((path, problem))
    return None, skipped


def find_problem(folder: Path, save_only_model: bool = False) -> str | None:
    """Why `folder` is no whole checkpoint, naming the file; None if it is one.  Reads every byte.

    With `save_only_model` neither optimizer nor scheduler nor the state of the random numbers is asked for.
    """
    try:
        if problems := verify_manifest(folder):
            return problems[0]
        for part, patterns in (WEIGHTS if save_only_model else {**WEIGHTS, **REST}).items():
            if not any(any(folder.rglob(pattern)) for pattern in patterns):
                return f"the {part} ({patterns[0]}) is missing"
        step = _read_manifest(folder).get("step")
        if not isinstance(step, int) or (NAME.fullmatch(folder.name) and step != _step(folder)):
            return f"{MANIFEST_NAME}: is of step {step}, expected that of the folder"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def rotate(newest: Path, limit: int | None, keep: list[Path] = ()) -> None:
    """Delete checkpoints beside `newest`, which was just verified and stays, until there are `limit` of them.

    Those with a higher step go first: the run did not go on from them.  Then those with the lowest step.
    """
    if not limit or limit < 1:
        return
    found = checkpoints(newest.parent)
    kept = {path.resolve() for path in (newest, *keep)}
    candidates = [path for path in found if path.resolve() not in kept]
    candidates.sort(key=lambda path: (_step(path) < _step(newest), _step(path)))
    for path in candidates[: max(0, len(found) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def finish_leftovers(output_dir: Path) -> None:
    """What a killed run was writing: put in place if only that was missing, else removed."""
    for outer in sorted(output_dir.glob(".checkpoint-*.incomplete")):
        half = outer / outer.name[1 : -len(".incomplete")]
        if half.is_dir() and find_problem(half) is None:
            _put_in_place(half, output_dir / half.name)
        shutil.rmtree(outer, ignore_errors=True)


def check_finite(model: nn.Module) -> None:
    """FloatingPointError with the name of the first trainable parameter or saved buffer that is not finite."""
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                named[name] = buffer
    named = {name: tensor.detach() for name, tensor in named.items() if tensor.is_floating_point()}
    flags = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)().isfinite().all() for tensor in named.values()]
    if flags and not torch.stack([flag.to(flags[0].device) for flag in flags]).all():
        name = next(name for name, flag in zip(named, flags, strict=True) if not flag)
        raise FloatingPointError(
            f"`{name}` holds values that are not finite, so no checkpoint is written: resume from the last whole one "
            "with a lower learning rate, or look for the samples that bring them"
        )


@contextlib.contextmanager
def only_run(output_dir: str | os.PathLike):
    """Hold the lock of a folder.  The kernel releases it when the process ends, in whatever way."""
    file = _open_lock(Path(output_dir))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 20, 0).decode("ascii", "replace").strip()
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning(f"{output_dir} cannot be locked ({error.strerror}): start no second run there")
            yield
            return
        raise OSError(
            f"{output_dir} is in use by the run with the process number {holder}: wait for its end, stop it, or name "
            "another output folder"
        ) from error
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(file)


def _open_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}), expected a folder for checkpoints: name another output "
            "folder or change its permissions"
        ) from error


def _warn_of_later(output_dir: Path, step: int) -> None:
    found = checkpoints(output_dir)
    if found and _step(found[-1]) > step:
        logger.warning(
            f"{output_dir} holds {found[-1].name} of another run, which this one, from step {step} on, does not use "
            "but a later resume would: remove it, or name another output folder"
        )


def _put_in_place(half: Path, final: Path) -> None:
    """Half of it is never seen under the final name; a former folder there was damaged, or is of the same step."""
    shutil.rmtree(final, ignore_errors=True)
    os.rename(half, final)
    _sync(final.parent)
    half.parent.rmdir()


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST_NAME).read_text("utf-8"))


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])
