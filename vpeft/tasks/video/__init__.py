"""Action recognition."""

from .model import FramewiseModel, inflate, joint_vit, load_videomae

__all__ = ["FramewiseModel", "inflate", "joint_vit", "load_videomae"]
