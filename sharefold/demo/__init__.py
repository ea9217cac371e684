"""The embedded example: a small network on handwritten digits, through every step of the main job."""

from sharefold.demo.run import Demo, Row, run_demo

__all__ = ["Demo", "Row", "run_demo"]
