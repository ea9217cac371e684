"""Pages and plots about a plan or a converted network."""

from __future__ import annotations

from sharefold.report.facts import Facts, LayerFact, facts_of, spectrum
from sharefold.report.page import page

__all__ = ["Facts", "LayerFact", "facts_of", "page", "spectrum"]
