"""Writes the measured tables into README.md and pages of docs/, between ``<!-- table: NAME -->`` and ``<!-- end -->``.

python benchmarks/tables.py            # from benchmarks/results/*.json
python benchmarks/tables.py --demo sharefold-demo    # takes the figures of that demonstration first
python benchmarks/tables.py --check    # exit 1 when a page is out of date

Every table says on which day its figures were taken: results/dates.json keeps that day with a checksum of the file, and a
file with another checksum is of today.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_tables import converted_on_gpu, latency_on_gpu, tuning_recipes, tuning_steps
from speed_tables import growth, speed
from table_parts import DATES, RESULTS, ROOT, dates, earlier, machine, named, read, table, taken
from task_tables import trained_tasks


def demo() -> str | None:
    data = read("demo.json")
    if data is None:
        return None
    rows = [
        [r["method"], r["step"], f"{r['params']:,}", f"{r['size']:.1%}", f"{100 * r['top1']:.2f}",
         "" if r["agreement"] is None else f"{100 * r['agreement']:.1f}"]
        for r in data["rows"]
    ]  # fmt: skip
    note = "\n\n`sharefold demo`, seed 0, 359 test images of scikit-learn's digits; averaging does not reach 8 %. "
    note += taken("demo.json")
    return table(["method", "step", "parameters", "kept", "top-1 [%]", "agreement [%]"], rows) + note


def methods() -> str | None:
    data = read("methods_cifar.json")
    if data is None:
        return None
    parts = []
    for network in sorted({r["network"] for r in data}):
        records = [r for r in data if r["network"] == network]
        original = next(r for r in records if r["method"] == "original")
        columns = sorted({(r["calib"], r["size"]) for r in records if r["method"] != "original"}, reverse=True)
        found = {(r["method"], r["calib"], r["size"]): r for r in records}
        rows = []
        for name in dict.fromkeys(r["method"] for r in records if r["method"] != "original"):
            cells = [_method_cell(found.get((name, *column))) for column in columns]
            rows.append([f"`{name}`", *cells])
        head = [
            "method",
            *(f"top-1 [%] at {size}" + (", no data" if calib == "none" else "") for calib, size in columns),
        ]
        title = f"{named(network)} on CIFAR-10, original {100 * original['top1']:.2f} %"
        title += f" with {original['params_after']:,} parameters:"
        parts.append(title + "\n\n" + table(head, rows))
    seed, images = data[-1].get("seed", 0), data[-1]["images"]
    note = (f"In brackets the parameters kept and, for codebooks, kB of integer codes beside them. "
            "`python benchmarks/methods_cifar.py`, "
            f"seed {seed}, {images:,} test images, {machine(data[-1]['hardware'])}. {taken('methods_cifar.json')}")  # fmt: skip
    return "\n\n".join([*parts, note])


def _method_cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if "refused" in record:
        floor = re.search(r"the floor is [\d,]+ parameters \(([\d.]+%)\)", record["refused"])
        return f"floor {floor[1]}" if floor else "not possible"
    codes = f" + {record['code_bytes'] / 1000:.0f} kB" if record["code_bytes"] else ""
    return f"{100 * record['top1']:.2f} ({record['kept']:.1%}{codes})"


def finetune() -> str | None:
    data = read("finetune_cifar.json")
    if not data:
        return None
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in data:
        cases.setdefault((record["case"], record["epochs"]), []).append(record)
    rows = []
    for (case, epochs), records in sorted(cases.items()):
        top1 = [100 * r["top1"] for r in records]
        spread = f" ± {statistics.stdev(top1):.2f} ({len(top1)} seeds)" if len(top1) > 1 else ""
        first = records[0]
        rows.append([
            case, f"{first['params_before']:,} -> {first['params_after']:,}", str(epochs),
            f"{100 * first['top1_dense']:.2f}",
            f"{100 * first['top1_converted']:.2f}", f"{statistics.mean(top1):.2f}{spread}",
            f"{statistics.mean(r['finetune_seconds'] for r in records) / 60:.1f}",
            (f"{first['processes']} processes, each " if first.get("processes", 1) > 1 else "") + machine(first["hardware"]),
        ])  # fmt: skip
    head = ["case", "parameters", "epochs", "original [%]", "converted [%]", "tuned [%]", "minutes", "on"]
    note = "`benchmarks/finetune_cifar.py`, CIFAR-10, 10,000 test images; minutes are those of fine-tuning, evaluation included. "
    if any(record["hardware"]["gpu"] for record in data):
        note += "On the GPU training images came as AVIF of 41.5 dB. "
    note += taken(rows=data)
    return table(head, rows) + "\n\n" + note


def recipes() -> str | None:
    data = read("recipes_cifar.json")
    if not data:
        return None
    parts = []
    for network in sorted({r["network"] for r in data}):
        records = [r for r in data if r["network"] == network]
        original = next(r for r in records if r["recipe"] == "original")
        rows = []
        for r in sorted((r for r in records if r["recipe"] != "original"), key=lambda r: -r["params_after"]):
            steps = [f"{100 * r['top1'][s]:.2f}" if s in r["top1"] else "" for s in ("converted", "refined", "finetuned")]
            published = "" if r["top1_published"] is None else f"{100 * r['top1_published']:.2f}"
            rows.append([f"`{r['recipe']}`", f"{r['params_after']:,}", *steps, published])
        head = ["recipe", "parameters", "converted", "refined, no labels", "fine-tuned", "published, from scratch"]
        first = next(r for r in records if r["recipe"] != "original")
        title = f"{named(network)} on CIFAR-10, top-1 [%] of {first['test_images']:,} test images; "
        title += f"the original has {100 * original['top1']['original']:.2f} with {original['params_after']:,} parameters:"
        note = (f"Refined: {first['refine_epochs']} epochs on {first['calibration_images']:,} images without labels. "
                f"Fine-tuned: {first['finetune_epochs']} epoch(s) on {first['finetune_images']:,} labelled ones; the "
                "published figures took 300 epochs on 50,000.")  # fmt: skip
        parts.append(title + "\n\n" + table(head, rows) + "\n\n" + note)
    first = data[0]
    note = f"`python benchmarks/recipes_cifar.py`, seed {first['seed']}, {machine(first['hardware'])}. "
    note += taken("recipes_cifar.json")
    return "\n\n".join([*parts, note])


def ablation() -> str | None:
    data = read("finetune_ablation.json")
    if data is None:
        return None
    first = data["rows"][0]["top1"]
    rows = [
        [row["part"], f"{100 * row['top1']:.2f}" + (f" ± {100 * row['stdev']:.2f}" if row["stdev"] else ""),
         f"{100 * (row['top1'] - first):+.2f}"]
        for row in data["rows"]
    ]  # fmt: skip
    note = (f"`python benchmarks/finetune_ablation.py`: {data['source']} converted to {data['params_after']:,} parameters "
            f"(method basis), {data['epochs']} epoch(s) on {data['train_images']:,} images, {data['test_images']:,} test "
            f"images, {data['seeds']} seed(s), {machine(data['hardware'])}. {taken('finetune_ablation.json')}")  # fmt: skip
    return table(["run", "top-1 [%]", "change"], rows) + "\n\n" + note


def objectives() -> str | None:
    data = read("objectives_cifar.json")
    if data is None:
        return None
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in data["rows"]:
        cell = found.setdefault((row["network"], row["size"]), {})
        cell.setdefault(row["objective"], []).append((row["top1"], row["kl_test"]))
    names = list(dict.fromkeys(row["objective"] for row in data["rows"]))
    rows = []
    for (network, size), cell in found.items():
        cells = [f"{100 * statistics.mean(t for t, _ in cell[n]):.2f} ({statistics.mean(k for _, k in cell[n]):.3f})"
                 if n in cell else "" for n in names]  # fmt: skip
        rows.append([named(network), size, *cells])
    count = len({row["seed"] for row in data["rows"]})
    note = (f"Top-1 [%] of 10,000 CIFAR-10 test images straight after conversion, in brackets KL(original || converted) of 2,000 "
            f"of them; {data['rows'][0]['images']:,} calibration images, {count} seed(s). "
            f"`python benchmarks/objectives_cifar.py`, {machine(data['hardware'])}. "
            + taken("objectives_cifar.json"))  # fmt: skip
    return table(["network", "size", *[f"`{n}`" for n in names]], rows) + "\n\n" + note


def across() -> str | None:
    data = read("across_shapes.json")
    if data is None:
        return None
    ways = ("across", "per shape", "svd", "spatial")
    rows = [[row["network"].replace("resnet", "ResNet-"), f"{row['share']:.0%}", *(f"{row[way]:.3f}" for way in ways)]
            for row in data["rows"]]  # fmt: skip
    note = (f"Mean relative output error of the 3x3 convolutions of all stages, at so many of their parameters; "
            f"{data['rows'][0]['images']:,} images, seed {data['rows'][0]['seed']}. `python benchmarks/across_shapes.py`, "
            f"{machine(data['hardware'])}. {taken('across_shapes.json')}")  # fmt: skip
    head = ["network", "kept", "one bank for all widths", "a bank a shape", "low rank", "spatial low rank"]
    return table(head, rows) + "\n\n" + note


def forms() -> str | None:
    data = read("forms.json")
    if data is None:
        return None
    names = list(dict.fromkeys(row["form"] for row in data["rows"]))
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in data["rows"]:
        found.setdefault((row["network"], f"{row['group']}, {row['layers']} layers", row["kept"]), {})[row["form"]] = row["error"]
    rows = []
    for (network, group, kept), cell in found.items():
        best = min(cell.values())
        cells = [f"**{cell[n]:.4f}**" if cell[n] == best else f"{cell[n]:.4f}" for n in names]
        rows.append([named(network), group, f"{kept:.0%}", *cells])
    first = data["rows"][0]
    note = (f"Mean relative output error of a group's layers that keep so many of their parameters; {first['images']:,} images, "
            f"seed {first['seed']}, nothing repaired. `python benchmarks/forms.py`, {machine(data['hardware'])}. "
            + taken("forms.json"))  # fmt: skip
    return table(["network", "group", "kept", *names], rows) + "\n\n" + note


def label_free() -> str | None:
    data = read("label_free.json")
    if data is None:
        return None
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    refined: dict[tuple[str, str], list[float]] = {}
    dense_macs = {row["network"]: row["macs"] for row in data["rows"] if row["method"] == "original" and "macs" in row}
    macs: dict[tuple[str, int, str], list[float]] = {}
    days: dict[tuple[str, int, str], dict[str, set[str]]] = {}
    for row in data["rows"]:
        if row["method"] == "auto" and not row["refine"] and "macs" in row and row["network"] in dense_macs:
            share = 100 * row["macs"] / dense_macs[row["network"]]
            macs.setdefault((row["network"], row["images"], row["size"]), []).append(share)
        if row["size"] and "top1" in row:
            column = row["method"] + (" + refine" if row["refine"] else "")
            key = row["network"], row["images"], row["size"]
            found.setdefault(key, {}).setdefault(column, []).append(100 * row["top1"])
            days.setdefault(key, {}).setdefault(column, set()).add(row["date"])
        if row["refine"] and "top1" in row:
            effort = row["refine"] + (" epochs" if row["refine"].isdigit() else "") + ("" if row["images"] else " without images")
            spent = sum(row["seconds_by_step"].get(step, 0) for step in ("refine", "refine codes"))
            refined.setdefault((row["network"].replace("resnet", "ResNet-"), effort), []).append(spent)
    columns = [column for column in _RIVALS if any(column in cell for cell in found.values())]
    most = max(images for _, images, _ in found)

    def place(key: tuple[str, int, str]) -> tuple[str, bool, int, float]:
        network, images, size = key
        return network, size.endswith("B"), -images, -_amount(size)

    rows = []
    for network, images, size in sorted(found, key=place):
        cells = found[network, images, size]
        shown = size + ("" if images == most else f", {images:,} images" if images else ", no images")
        own = macs.get((network, images, size))
        share = [f"{sum(own) / len(own):.0f} %" if own else ""] if macs else []
        own_days = days[network, images, size]
        figures = [_mean_cell(cells.get(c, [])) + (earlier(c, own_days) if c in cells else "") for c in columns]
        rows.append([named(network), shown, *figures, *share])
    names = {"auto": "**sharefold**", "auto + refine": "**`--refine`**", "svd": "low rank", "spatial": "spatial low rank"}
    rounded = dict.fromkeys(
        f"{row['network'].replace('resnet', 'ResNet-')} {row['method'].partition('-')[2]} bits {100 * row['top1']:.2f} "
        f"({row['bytes'] / 1e6:.2f} MB)" for row in data["rows"] if row["method"].startswith("quantize")
    )  # fmt: skip
    dense = ", ".join(
        f"{row['network'].replace('resnet', 'ResNet-')} {100 * row['top1']:.2f} ({row['bytes'] / 1e6:.2f} MB)"
        for row in data["rows"] if row["method"] == "original"
    )  # fmt: skip
    times = "; ".join(f"{network} {effort}, at most {max(seconds):.0f} s" for (network, effort), seconds in refined.items())
    note = (f"Top-1 [%] of 10,000 test images, {most:,} training images without labels where nothing else is said; the mean, and "
            "where there is one the number of seeds behind a spread. Sizes in % are of the parameters, in MB "
            f"of the whole file. Refined: {times}. The originals: {dense}; rounded to nearest, a scale a row: "
            + ", ".join(rounded) + f". `python benchmarks/label_free.py`, {machine(data['hardware'])}. "
            + taken(rows=data["rows"]))  # fmt: skip
    head = ["network", "size", *[names.get(c, c) for c in columns], *(["MACs"] if macs else [])]
    return table(head, rows) + "\n\n" + note


def onnx() -> str | None:
    path = RESULTS / "onnx.csv"
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    passed = [row for row in rows if not row["reason"]]
    worst = max(float(row["difference"]) / max(1.0, float(row["largest"])) for row in passed)
    ratio = max(float(row["size_ratio"]) for row in passed)
    reasons = Counter(row["reason"].partition(":")[0] for row in rows if row["reason"])
    others = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return (f"Tried on the smallest architecture of each of {len(rows)} families of timm and torchvision, at half its "
            f"parameters: {len(passed)} pass ({others}). onnxruntime is within {worst:.1e} of PyTorch, relative to the "
            f"largest output where that is above 1; no file is more than {100 * ratio - 100:.0f} % larger than the "
            "safetensors file. `python benchmarks/onnx_families.py`, rows in `benchmarks/results/onnx.csv`. "
            + taken("onnx.csv"))  # fmt: skip


def files() -> str | None:
    """Small files beside those of the codec of the standard."""
    data = read("bytes.json")
    if data is None:
        return None
    rows = []
    for row in sorted(data["rows"], key=lambda row: (row["network"], -row["bytes"])):
        ours = row["sharefold_bytes"]
        if ours is not None:
            sizes = [f"{row['bytes'] / 1e3:.0f}", f"{ours / 1e3:.0f}", f"{100 * ours / row['bytes']:.0f} %"]
            rows.append([named(row["network"]), f"{100 * row['top1']:.2f}", *sizes])
    head = ["network", "top-1 [%]", "NNCodec [kB]", "sharefold [kB]", "share"]
    first = data["rows"][0]
    note = (f"Whole files of the same accuracy: {first['codec'].replace('nncodec', 'NNCodec')}, dependent quantisation, no "
            "images, and sharefold with 2,000 images without labels, between the points of the table above, dated there "
            f"(linear in the logarithm of the size). `python benchmarks/bytes.py`, {machine(first['hardware'])}. "
            + taken(rows=data["rows"]))  # fmt: skip
    return table(head, rows) + "\n\n" + note


def claims() -> str | None:
    """What conversions say of their agreement on new images, beside what it is."""
    data = read("agreement.json")
    if data is None:
        return None
    found = []
    for row in data["rows"]:
        kind, images = ("new_", "mild views") if row["seen_before"] else ("", "report images")
        said, interval = row[f"{kind}agreement"], row[f"{kind}agreement_interval"]
        found.append((row["network"], row["size"], images, said, interval, row["test_agreement"]))
    imagenet = [
        row for row in (read("imagenet.json") or {}).get("rows", [])
        if row["said_interval"] and not row["refine"] and not row.get("classes") and row["size"].endswith("%")
    ]  # fmt: skip
    keys = ("said_agreement", "said_interval", "agreement")
    found += [(row["network"], row["size"], "report images", *(row[key] for key in keys)) for row in imagenet]
    inside = [low <= truth <= high for *_, (low, high), truth in found]
    rows = [
        [named(network), size, images, f"{100 * said:.1f} ({100 * low:.1f} to {100 * high:.1f})", f"{100 * truth:.1f}",
         "yes" if within else "no"]
        for (network, size, images, said, (low, high), truth), within in zip(found, inside, strict=True)
    ]  # fmt: skip
    text = (f"Agreement with the original [%] as the command says it, with its interval, and on test images (10,000 of CIFAR-10, "
            f"1,300 of ImageNet); {sum(inside)} of {len(rows)} lie inside. `python benchmarks/agreement.py` and "
            f"`python benchmarks/imagenet.py`, seed 0, {machine(data['hardware'])}. "
            + taken("agreement.json", rows=imagenet))  # fmt: skip
    return table(["network", "size", "measured on", "said", "on test images", "inside"], rows) + "\n\n" + text


# Rows of the short table, where they were measured: networks, and sizes of parameters or files.
SHORT = {"resnet20": ("50%", "0.08MB"), "resnet56": ("50%", "25%", "0.33MB")}


def results() -> str | None:
    """A few rows of everything that was measured: CIFAR, ImageNet, files, architectures."""
    rows = []
    cifar = (read("label_free.json") or {}).get("rows", [])
    for network, sizes in SHORT.items():
        rows += _result_rows("CIFAR-10", [r for r in cifar if r["network"] == network and r["images"]], sizes)
    measured = [row for row in cifar if row["images"] and row["size"] in SHORT.get(row["network"], ())]
    imagenet = [row for row in (read("imagenet.json") or {}).get("rows", []) if not row.get("classes")]
    for network, calib in dict.fromkeys((row.get("network", ""), row.get("calib", "images")) for row in imagenet):
        found = [row for row in imagenet if (row.get("network", ""), row.get("calib", "images")) == (network, calib)]
        sizes = {r["size"] for r in found if r.get("size") and "top1" in r and r.get("method", "auto") == "auto"}
        where = "ImageNet" + (", no images" if calib == "none" else "")
        rows += _result_rows(where, found, tuple(sorted(sizes, key=_amount, reverse=True)))
    measured += imagenet
    if not rows:
        return None
    note = ("Top-1 [%] on images that nothing was fitted to, the mean over seeds; no labels. Sizes in % are of the parameters, "
            "in MB of the whole file. Converted: by default, which has five epochs of refinement among the repairs where layers "
            "share and images are small. Refined: with `--refine` for a few minutes, where it was run.")  # fmt: skip
    covered = RESULTS / "coverage.csv"
    if covered.exists():
        with covered.open(newline="") as file:
            lines = list(csv.DictReader(file))
        ends = Counter(_end(row) for row in lines)
        *most, last = sorted({LIBRARIES[row["library"]] for row in lines})
        half = sum(bool(row["reduced_to"]) and float(row["reduced_to"]) <= 0.5 for row in lines)
        note += (f" Of {sum(ends.values()):,} architectures of {', '.join(most)} and {last} {ends['converted']:,} convert, "
                 f"{half:,} of them to half of their parameters, {ends['converted'] - half} to a floor above; "
                 f"{ends['left out']} are left out with the reason, {ends['failed'] or 'none'} failed.")  # fmt: skip
        measured += lines
    head = ["network", "size", "original", "converted", "refined", "low rank a layer"]
    return table(head, rows) + "\n\n" + note + " " + taken(rows=measured)


LIBRARIES = {
    "timm": "timm", "torchvision": "torchvision", "smp": "segmentation_models_pytorch", "ultralytics": "ultralytics",
}  # fmt: skip


def _end(row: dict[str, str]) -> str:
    """What came of an architecture in the coverage sweep; those that only reach their floor count as converted."""
    if row["reason"].startswith(("failed", "timeout")):
        return "failed"
    return "converted" if row["reduced_to"] else "left out"


def _result_rows(data: str, found: list[dict[str, Any]], sizes: tuple[str, ...]) -> list[list[str]]:
    """One row a size that was measured: original, converted, refined, and what low rank a layer gives at this size."""
    originals = [row.get("top1_dense", row.get("top1") if row.get("method") == "original" else None) for row in found]
    dense = next((value for value in originals if value is not None), None)
    rows = []
    for size in sizes:
        cells: dict[str, list[float]] = {}
        days: dict[str, set[str]] = {}
        for row in found:
            if row.get("size") == size and "top1" in row:
                column = row.get("method", "auto") + (" + refine" if row.get("refine") else "")
                cells.setdefault(column, []).append(100 * row["top1"])
                days.setdefault(column, set()).add(row["date"])
        if "auto" in cells:
            columns = ("auto", "auto + refine", "svd")
            means = [f"{statistics.mean(cells[c]):.2f}{earlier(c, days)}" if c in cells else "" for c in columns]
            first = f"{named(found[0]['network'])}, {data}"
            rows.append([first, size.replace("MB", " MB"), "" if dense is None else f"{100 * dense:.2f}", *means])
    return rows


def _amount(size: str) -> float:
    """``65%`` or ``0.15MB`` as a number that orders them."""
    from sharefold.budget import parse_budget

    return parse_budget(size).value


_RIVALS = ["auto", "auto + refine", "basis", "spatial", "svd", "pruning", "average"]


def _mean_cell(top1: list[float]) -> str:
    if not top1:
        return ""
    return f"{statistics.mean(top1):.2f}" + (f" ± {statistics.stdev(top1):.2f} ({len(top1)})" if len(top1) > 1 else "")


TABLES: dict[str, Callable[[], str | None]] = {
    "demo": demo, "methods": methods, "finetune": finetune, "ablation": ablation, "recipes": recipes,
    "objectives": objectives, "across": across, "label_free": label_free, "onnx": onnx, "forms": forms,
    "results": results, "speed": speed, "growth": growth, "bytes": files, "agreement": claims,
    "gpu": converted_on_gpu, "latency": latency_on_gpu,
    "steps": tuning_steps, "tuning": tuning_recipes, "tasks": trained_tasks,
}  # fmt: skip
DOCS = ROOT / "docs"
NAMED = ("results", "fine-tuning", "planning", "using", "figures", "tasks")
PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in NAMED))
PAGES += (DOCS / "methods" / "recipes.md", DOCS / "methods" / "hybrid.md")


def render(text: str) -> str:
    """``text`` with every table anew; a table without results says how to get them."""

    def fill(match: re.Match[str]) -> str:
        content = TABLES[match[1]]() or "Not measured yet: see `benchmarks/`."
        return f"<!-- table: {match[1]} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path, help="the folder that `sharefold demo` wrote")
    options = parser.parse_args()
    check = options.check
    if options.demo:
        record = json.loads((options.demo / "demo.json").read_text())
        del record["output"]
        (RESULTS / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    known = json.dumps(dates(), indent=1) + "\n"
    stale = int(not DATES.exists() or DATES.read_text() != known)
    if not check:
        DATES.write_text(known)
    for path in PAGES:
        text = path.read_text()
        new = render(text)
        stale |= int(new != text)
        if not check:
            path.write_text(new)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main())
