"""Reads a model and changes nothing: layers, stages, roles, groups, repeated blocks and channel freedom."""

from sharefold.graph.analysis import analyze
from sharefold.graph.groups import find_groups
from sharefold.graph.records import Group, LayerRecord, NetworkGraph, Repeat, Space

__all__ = ["Group", "LayerRecord", "NetworkGraph", "Repeat", "Space", "analyze", "find_groups"]
