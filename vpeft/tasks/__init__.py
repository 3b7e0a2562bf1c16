"""Tasks: each package here is one, whole: data, model, loss and metric, prediction, pictures.

The modules beside them hold what tasks do alike. No task's package imports another's.
"""

from .protocol import PredictOptions, Task, TaskModel
from .registry import TASKS, get_task
from .step import Step, training_loss

__all__ = ["TASKS", "PredictOptions", "Step", "Task", "TaskModel", "get_task", "training_loss"]
