"""How agreement is told to people: never without its interval, the part of the images and their number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharefold.calibration.calibrate import Calibration
    from sharefold.convert import Conversion


# Share of the images below which a network is not of use.
MOST = 0.5


def share_text(agreement: float, interval: tuple[float, float] | None) -> str:
    """``98.67% (95.3 to 99.6%)``."""
    return f"{agreement:.2%}" if interval is None else f"{agreement:.2%} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}%)"


def agreement_text(done: Conversion, cal: Calibration, procedural: bool = False) -> str:
    """One sentence about the agreement of what ``done`` tells, or about why it was not measured."""
    from sharefold.calibration.parts import FEWEST_IMAGES

    if not cal.comparable:
        return "not compared with the original: nothing that the network returns can be compared"
    if not done.report_images:
        many = "1 image" if len(cal.images) == 1 else f"{len(cal.images)} images"
        return f"agreement not measured: only {many}, {FEWEST_IMAGES} or more are needed"
    kind = "procedural images" if procedural else "calibration images"
    text = f"compared on {done.report_images} {kind} kept for the report (95 % intervals)"
    if done.agreement_interval is not None:
        told = share_text(done.agreement, done.agreement_interval)
        text = f"top-1 agreement {told} on {done.report_images} {kind} kept for the report (95 % interval)"
    if done.agreement < MOST:
        text += "; on most images it says something else: allow more"
    if procedural:
        return f"{text}; on real images it may be lower"
    if done.seen_before and done.new_agreement is not None:
        new = share_text(done.new_agreement, done.new_agreement_interval)
        text += f"; the network knows these images from its training: of new ones expect {new}, by mild views of them"
    return text
