"""What the commands share around transformers.Trainer: fitting, selection by dev, resuming, the folder of a run."""

from .folder import RunFolder, write_whole
from .scores import evaluate, predict_logits, score
from .text import (
    Columns,
    TextTask,
    calibration_batches,
    file_digest,
    predictions,
    prepare,
    results,
    typical_batch,
    write_results,
)
from .trainer import Fit, InterruptedTraining, Settings, TaskData, Trial, fit

__all__ = [
    "Columns",
    "Fit",
    "InterruptedTraining",
    "RunFolder",
    "Settings",
    "TaskData",
    "TextTask",
    "Trial",
    "calibration_batches",
    "evaluate",
    "file_digest",
    "fit",
    "predict_logits",
    "predictions",
    "prepare",
    "results",
    "score",
    "typical_batch",
    "write_results",
    "write_whole",
]
