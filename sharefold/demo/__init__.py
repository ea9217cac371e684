"""The embedded example: a small network on handwritten digits, through every step of the main job."""

from sharefold.demo.results import Demo, DemoOptions, Row
from sharefold.demo.run import run_demo

__all__ = ["Demo", "DemoOptions", "Row", "run_demo"]
