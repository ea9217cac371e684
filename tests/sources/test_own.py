"""Networks of the user's own class by FILE.py:FACTORY: what builds them, how files fill them, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.sources import open_source

CODE = '''
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from own_widths import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        width = Sizes().width
        self.body = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])

    def forward(self, x):
        for layer in self.body:
            x = torch.relu(layer(x))
        return x

def small():
    return Net()

def broken():
    raise ValueError("first\\nsecond")

def needs(width):
    return Net()

def leaves():
    raise SystemExit("no weights")

def text():
    return "no network"

number = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_widths.py").write_text("WIDTH = 6\n")
    (tmp_path / "own_net.py").write_text(CODE)
    (tmp_path / "own_wrong.py").write_text("import no_such_package\n")
    shapes = {"weight": (6, 6, 3, 3), "bias": (6,)}
    state = {f"body.{i}.{leaf}": torch.randn(shape) for i in range(4) for leaf, shape in shapes.items()}
    torch.save(state, tmp_path / "net.pt")
    torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()}}, tmp_path / "trainer.pt")
    return tmp_path


def fails(source: Path, arch: str) -> str:
    with pytest.raises(SharefoldError) as error:
        open_source(source, arch=arch)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["Net", "small"])
@pytest.mark.parametrize("file", ["net.pt", "trainer.pt"])
def test_a_class_or_a_function_builds_what_a_file_fills(folder: Path, name: str, file: str) -> None:
    before = list(sys.path)
    opened = open_source(folder / file, arch=f"{folder / 'own_net.py'}:{name}")
    assert (opened.kind, opened.name, opened.base, opened.shared) == ("own", "Net", {}, False)
    assert sys.path == before and not opened.model.training
    state = torch.load(folder / "net.pt", weights_only=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in opened.model.state_dict().items())


def test_a_converted_network_is_built_again(folder: Path) -> None:
    arch = f"{folder / 'own_net.py'}:Net"
    net, images = open_source(folder / "net.pt", arch=arch).model, torch.randn(60, 6, 8, 8)
    sharefold.convert_(net, sharefold.plan(net, "60%", images), images)
    sharefold.save(net, folder / "shared")
    assert 'sharefold.load("path/to/this/directory", model=YourNetwork())' in (folder / "shared" / "README.md").read_text()
    opened = open_source(folder / "shared", arch=arch)
    assert opened.shared
    with torch.no_grad():
        assert torch.equal(opened.model(images), net(images))
    with pytest.raises(SharefoldError, match=r"of your own: .* --arch FILE.py:FACTORY"):
        open_source(folder / "shared")
    other = folder / "other.py"
    other.write_text("from torch import nn\nOther = lambda: nn.Conv2d(3, 3, 3)\n")
    with pytest.raises(SharefoldError):
        open_source(folder / "shared", arch=f"{other}:Other")


def test_what_is_wrong_with_the_code_is_told_in_one_line(folder: Path) -> None:
    file = folder / "own_net.py"
    assert "want FILE.py:FACTORY" in fails(folder / "net.pt", str(file))
    assert "want FILE.py:FACTORY" in fails(folder / "net.pt", f"{file}:")
    assert "there is no file" in fails(folder / "net.pt", f"{folder / 'missing.py'}:Net")
    assert "the file has no class or function Nat" in fails(folder / "net.pt", f"{file}:Nat")
    assert "the file has no class or function number" in fails(folder / "net.pt", f"{file}:number")
    broken = fails(folder / "net.pt", f"{file}:broken")
    assert "broken() fails (ValueError: first)" in broken and "arguments" not in broken
    needs = fails(folder / "net.pt", f"{file}:needs")
    assert "needs() fails (TypeError: needs() missing" in needs and "must need no arguments" in needs
    assert "leaves() fails (SystemExit: no weights)" in fails(folder / "net.pt", f"{file}:leaves")
    assert "text() gives a str: want the network" in fails(folder / "net.pt", f"{file}:text")
    wrong = fails(folder / "net.pt", f"{folder / 'own_wrong.py'}:Net")
    assert "the file fails (ModuleNotFoundError" in wrong and "own_wrong" not in sys.modules
    with pytest.raises(SharefoldError, match="--in-chans has no effect"):
        open_source(folder / "net.pt", arch=f"{file}:Net", in_chans=1)


def test_scripts_that_end_by_themselves_and_files_of_packages_are_told_of(folder: Path) -> None:
    script, inside = folder / "own_script.py", folder / "own_package" / "layers.py"
    script.write_text("raise SystemExit(0)\n")
    inside.parent.mkdir()
    inside.write_text("from .sizes import WIDTH\n")
    assert "the file fails (SystemExit: 0)" in fails(folder / "net.pt", f"{script}:Net")
    told = fails(folder / "net.pt", f"{inside}:Net")
    assert "from own_package.layers import" in told and not {"own_script", "layers"} & set(sys.modules)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 3).state_dict(), folder / "conv.pt")
    assert "does not fit" in fails(folder / "conv.pt", f"{folder / 'own_net.py'}:Net")


def test_a_stock_network_knows_its_architecture(folder: Path) -> None:
    text = fails(Path("timm:test_resnet"), f"{folder / 'own_net.py'}:Net")
    assert "leave --arch out" in text


def test_no_other_module_is_replaced(folder: Path) -> None:
    (folder / "json.py").write_text(CODE)
    json = sys.modules["json"]
    assert open_source(folder / "net.pt", arch=f"{folder / 'json.py'}:Net").name == "Net"
    assert sys.modules["json"] is json
