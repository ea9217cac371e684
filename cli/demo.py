"""``sharefold demo``: every step of the main job on a small network that comes with sharefold."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Run, shared_options


@click.command("demo")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("sharefold-demo"), show_default=True,
              help="Folder for the network, the picture and the figures.")  # fmt: skip
@click.option("--budget", default="20%", show_default=True, metavar="SIZE", help="Where methods are compared.")
@click.option("--small", default="8%", show_default=True, metavar="SIZE", help="Size of the network that is tuned.")
@click.option("--epochs", type=click.IntRange(min=1), default=4, show_default=True, help="Epochs of tuning.")
@click.option("--force", is_flag=True, help="Replace a folder that no demo wrote.")
@shared_options
def command(run: Run, output: Path, budget: str, small: str, epochs: int, force: bool) -> None:
    """Convert a small network, compare methods at one size, tune it, save it, reload it, draw a picture.

    The network reads scikit-learn's 8x8 digits and comes with sharefold; nothing is downloaded.

    \b
    sharefold demo -o sharefold-demo
    """
    run.setup()
    from sharefold.demo import run_demo

    with run.progress() as progress:
        demo = run_demo(
            output, budget=budget, small=small, epochs=epochs, seed=run.seed, force=force, progress=progress
        )  # fmt: skip
    run.table(
        ["method", "step", "parameters", "kept", "top-1", "agreement", "seconds"],
        [
            [row.method, row.step, row.params, f"{row.size:.1%}", f"{row.top1:.2%}",
             None if row.agreement is None else f"{row.agreement:.1%}", f"{row.seconds:.1f}"]
            for row in demo.rows
        ],
        title="digits_resnet on 359 test images",
    )  # fmt: skip
    run.say("Averaging the kernels of a trained stage costs accuracy; a shared basis of the same size costs next to none.")
    run.say(
        f"Saved and reloaded in one call: logits {'equal bit for bit' if demo.identical else 'DIFFER'}; "
        f"expanded to the stock architecture: within {demo.expanded_difference:.0e}."
    )
    run.say(
        f"{demo.output}: digits-shared/ ({demo.file_bytes / 1e3:.0f} kB, dense {demo.dense_bytes / 1e3:.0f} kB), "
        f"demo.png, demo.json; {demo.seconds:.0f} s in all."
    )
    run.result(demo.to_dict())
