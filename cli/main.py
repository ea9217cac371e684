"""The ``sharefold`` command. Verbs load on use, so that help is instant and never imports torch."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from .boundary import BoundedGroup
from .heap import CHOICES, VARIABLE, keep_freed_memory

# Verb -> (module with a `command`, one line of help).
VERBS: dict[str, tuple[str, str]] = {
    "inspect": ("inspect", "Show which layers of a network can share, in which groups, and which cannot."),
    "convert": ("convert", "Turn a pretrained network into a smaller one whose layers share parameters."),
    "eval": ("eval", "Measure accuracy on a labelled data set."),
    "finetune": ("finetune", "Recover what sharing cost, with a teacher."),
    "round": ("round", "Store the weights of a converted network in fewer bits, after fine-tuning for instance."),
    "bench": ("bench", "Time dense against shared: latency, throughput, memory, load time."),
    "export": ("export", "Write ONNX, a torch.export archive or a dense checkpoint."),
    "expand": ("expand", "Write the dense checkpoint of the stock architecture."),
    "report": ("report", "Draw one self-contained page about a plan or a checkpoint."),
    "verify": ("verify", "Recompute what a saved network claims of itself."),
    "sweep": ("sweep", "Convert at several budgets and plot accuracy against size."),
    "demo": ("demo", "Convert, tune and save a small embedded network; needs nothing else."),
    "env": ("env", "Say which versions, devices and optional parts are present."),
}


def available() -> dict[str, tuple[str, str]]:
    """The verbs whose module is part of this installation."""
    return {verb: entry for verb, entry in VERBS.items() if find_spec(f"{__package__}.{entry[0]}") is not None}


class LazyGroup(BoundedGroup):
    """A group whose commands are imported when invoked; its own help needs the table only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(available())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in available():
            return None
        return importlib.import_module(f".{VERBS[cmd_name][0]}", __package__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in available().items()])


def _version() -> str:
    try:
        return version("sharefold")
    except PackageNotFoundError:
        from sharefold import __version__

        return __version__


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="SOURCE is timm:NAME, tv:NAME, smp:NAME, yolo:FILE, hf-hub:ID, a sharefold directory or file, or a checkpoint "
    "(.pt .pth .th .safetensors). DATA is imagefolder:DIR, npz:FILE, tensors:FILE (inputs of any shape, .npz, .npy or "
    ".safetensors), cifar10:DIR, cifar100:DIR, fashionmnist:DIR, timm:NAME or digits.",
)
@click.version_option(_version(), prog_name="sharefold", message="%(prog)s %(version)s")
@click.option(
    "--heap", type=click.Choice(CHOICES), default=CHOICES[0], envvar=VARIABLE, show_envvar=True,
    help="keep: freed memory stays with the process, which is much faster on large images (Linux); system: as everywhere.",
)  # fmt: skip
@click.pass_context
def cli(ctx: click.Context, heap: str) -> None:
    """Turn a pretrained CNN into a smaller one whose layers share parameters."""
    if heap == "keep":
        keep_freed_memory()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
