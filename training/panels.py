"""What the model says of a few held-out pictures at each evaluation, as pictures for people."""

import logging
from pathlib import Path

import torch
from PIL import Image

from ..drawing import draw_result
from ..pipeline_perceptio import PerceptioPipeline
from ..processing_perceptio import load_picture

logger = logging.getLogger(__name__)
FOLDER = "panels"
LONGEST_ANSWER = 64  # tokens; an untrained model does not end by itself


@torch.no_grad()
def draw_panels(trainer, records) -> list[Image.Image]:
    """Photo with mask, depth, and answer beside the expected one, for the first question of each record."""
    wrapped = trainer.accelerator.unwrap_model(trainer.model)
    model = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    was_training = model.training
    model.eval()
    pipe = PerceptioPipeline(model=model, processor=trainer.processing_class, device=trainer.args.device)
    try:
        with trainer.compute_loss_context_manager():
            return [panel for record in records if (panel := _panel(pipe, record)) is not None]
    finally:
        model.train(was_training)


def _panel(pipe: PerceptioPipeline, record: dict) -> Image.Image | None:
    turns = [message for message in record["messages"] if message["role"] in ("user", "assistant")]
    if record["image"] is None or [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return None
    question, expected = turns[0]["content"], turns[1]["content"]
    picture = load_picture(record["image"]["bytes"])
    room = pipe.processor.span_length + LONGEST_ANSWER
    found = pipe(image=picture, text=question, perception=turns[1]["perception"] or "none", max_new_tokens=room)
    masks = None if found["masks"] is None else [mask["mask"] for mask in found["masks"]]
    depth = None if found["predicted_depth"] is None else found["predicted_depth"].float().cpu().numpy()
    notes = (f"expected: {expected}",) if expected != found["generated_text"] else ()
    return draw_result(picture, question, found["generated_text"], masks=masks, depth=depth, notes=notes)


def show_panels(trainer, name: str, panels: list[Image.Image]) -> None:
    """Write them into the output folder, and to the trackers that take pictures."""
    folder, step = Path(trainer.args.output_dir) / FOLDER, trainer.state.global_step
    folder.mkdir(parents=True, exist_ok=True)
    for index, panel in enumerate(panels):
        panel.save(folder / f"{name}-step-{step:08d}-{index}.png")
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback).__name__
        if kind in SENDERS:
            try:
                SENDERS[kind](callback, name, panels, step)
            except Exception as error:  # whatever a tracker raises, the training goes on
                logger.warning("%s took no pictures (%s: %s)", kind, type(error).__name__, error)


def _to_tensorboard(callback, name: str, panels: list[Image.Image], step: int) -> None:
    if callback.tb_writer is not None:
        for index, panel in enumerate(panels):
            pixels = torch.frombuffer(bytearray(panel.tobytes()), dtype=torch.uint8).view(*panel.size[::-1], 3)
            callback.tb_writer.add_image(f"{FOLDER}/{name}/{index}", pixels, step, dataformats="HWC")


def _to_wandb(callback, name: str, panels: list[Image.Image], step: int) -> None:
    import wandb

    wandb.log({f"{FOLDER}/{name}": [wandb.Image(panel) for panel in panels], "train/global_step": step})


def _to_trackio(callback, name: str, panels: list[Image.Image], step: int) -> None:
    import trackio

    trackio.log({f"{FOLDER}/{name}/{index}": trackio.Image(panel) for index, panel in enumerate(panels)}, step=step)


SENDERS = {"TensorBoardCallback": _to_tensorboard, "WandbCallback": _to_wandb, "TrackioCallback": _to_trackio}
