"""Networks against the truth: masks, images and boxes (:func:`evaluate_task`); of classes see :mod:`sharefold.measure`."""

from __future__ import annotations

from sharefold.tasks.evaluate_task import TaskOptions, TaskReport, evaluate_task
from sharefold.tasks.truth_scores import Part, TruthFigure

__all__ = ["Part", "TaskOptions", "TaskReport", "TruthFigure", "evaluate_task"]
