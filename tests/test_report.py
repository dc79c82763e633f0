from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.cli import main as cli
from dino_fast.engine import train
from dino_fast.engine.config import build_config
from dino_fast.engine.run_dir import read_metrics
from dino_fast.report import render_report
from dino_fast.report.curves import HEIGHT, WIDTH, Curve, chart, points, ticks
from dino_fast.report.pictures import _untrained

MODEL: dict[str, Any] = {
    "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8,
    "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "batch_size": 8, "epochs": 3,
    "warmup_epochs": 1, "knn_every": 1, "save_every": 1, "workers": 0, "device": "cpu",
}  # fmt: skip
SECTIONS = [
    "Curves", "Attention", "Nearest neighbors", "Map of the features", "Messages", "Configuration", "Environment",
]  # fmt: skip
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "circle"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Every element with its attributes, and what lies between the tags; complains of tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        return [a for name, a in self.found if name == tag and style in [*(a.get("class") or "").split(" "), ""]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on two classes; one has a name that would be a tag."""
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("<b>light", 128)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(22):
            pixels = random.integers(low, low + 128, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return train(build_config({**MODEL, "data": str(root / "images"), "out": str(root / "run")}))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render_report(run, device="cpu")


def test_the_page_is_whole_and_loads_nothing(run: Path, page: str) -> None:
    parsed = Page(page)
    assert parsed.text["h2"] == SECTIONS
    assert len(parsed.all("figure", "chart")) == 6
    for tag, attributes in parsed.found:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "form")
    styles = "".join(parsed.text["style"]) + "".join(a.get("style") or "" for _, a in parsed.found)
    assert "url(" not in styles and "@import" not in styles and not re.search(r"https?://", page)
    assert "default-src 'none'" in page
    assert "<b>light" not in page and "&lt;b&gt;light" in page
    assert "64" in parsed.text["dd"] and "out_dim" in parsed.text["dt"]
    assert any("torch" in text for text in parsed.text["pre"])
    assert 20_000 < len(page) < 2_000_000


def test_the_curves_are_the_metrics(run: Path, page: str) -> None:
    rows = read_metrics(run)
    drawn = {
        curve["name"]: curve["points"]
        for plot in Page(page).all("div", "plot")
        for curve in json.loads(plot["data-curves"] or "")["curves"]
    }
    names = {
        "loss": "loss", "entropy": "teacher_entropy", "KL": "kl", "lr": "lr", "images/s": "images_per_second",
        "teacher": "knn", "student": "knn_student",
    }  # fmt: skip
    assert drawn.keys() == names.keys()
    for name, metric in names.items():
        expected = [[row["step"], row[metric]] for row in rows if metric in row]
        assert len(expected) > 2
        scale = 100 if metric.startswith("knn") else 1
        np.testing.assert_allclose(drawn[name], np.array(expected) * [1, scale], rtol=1e-5)
    assert f"ln K = {math.log(64):.4g}" in page


def test_the_line_lies_where_the_numbers_are() -> None:
    rows = [{"step": i, "a": value} for i, value in enumerate([0.0, 4.0, None, 2.0, 1.0])]
    html = chart("A", [Curve("a", points(rows, "a"))], level=("top", 8.0))
    lines = re.findall(r'class="line c1" d="M([^"]*)"', html)
    assert len(lines) == 2  # cut where it was not finite
    found = [[float(x) for x in point.split()] for line in lines for point in line.split("L")]
    expected = [[i / 4 * WIDTH, (8 - v) / 8 * HEIGHT] for i, v in ((0, 0), (1, 4), (3, 2), (4, 1))]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert '<path class="level" d="M0 0H1000"/>' in html
    assert chart("A", [Curve("a", points([{"step": 0, "a": None}], "a"))]) == ""


def test_long_curves_keep_their_means_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=10_007)
    values[5000] = 40.0
    found = points([{"step": i, "a": float(v)} for i, v in enumerate(values)], "a", shown=400)
    assert 300 < len(found) <= 400
    each = math.ceil(len(values) / 400)
    assert found[0].value == pytest.approx(values[:each].mean()) and found[0].step == (each - 1) / 2
    assert max(p.high for p in found) == 40 and min(p.low for p in found) == values.min()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.4, 3.4), (0, 0), (-2e-5, 7e-5), (1199, 1311), (0.0, 4992)])
def test_ticks_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_pictures_are_of_the_run(run: Path, page: str) -> None:
    """4 images at the untrained weights and each kept checkpoint, 6 neighbors of each, and thumbnails."""
    parsed = Page(page)
    images = parsed.all("img")
    named = [image["alt"] or "" for image in images]
    assert sum(name == "attention, untrained" for name in named) == 4
    assert "among 40 of 40 other training images" in page and "Held-out" not in page  # nothing was kept from training
    kept = {int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")}  # how many depends on the clock
    assert len(kept) > 1
    found = {name.removesuffix(" (best)") for name in named if name.startswith("attention, step")}
    assert found == {f"attention, step {step}" for step in kept}
    assert sum("best" in text for text in parsed.text["b"]) == 1
    assert len(parsed.all("figure", "same")) + len(parsed.all("figure", "other")) == 4 * 6
    assert len(parsed.all("circle")) == 40
    assert all(
        (image["src"] or "").startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for image in images
    )


def test_untrained_weights_are_those_the_run_began_with(run: Path) -> None:
    from dino_fast.engine.build import build_train_state
    from dino_fast.engine.config import load_config
    from dino_fast.eval.common.backbone import open_backbone

    config = load_config(run / "config.yaml")
    found = _untrained(config, open_backbone(run))
    assert found is not None
    first = build_train_state(config, 3, torch.device("cpu"), "fp32").teacher.backbone.state_dict()
    again = found.backbone.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_the_same_pictures_every_time(run: Path, page: str) -> None:
    again = render_report(run, device="cpu")
    assert re.sub(r"drawn [-\d]+ [:\d]+", "", again) == re.sub(r"drawn [-\d]+ [:\d]+", "", page)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--out", str(out), "--device", "cpu"]) == 0
    assert str(out) in capsys.readouterr().out
    assert Page(out.read_text()).text["h2"] == SECTIONS


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{run}x"], ["runx does not exist", "run)"]),
        (["{run}/config.yaml"], ["is a file", "directory of a run"]),
        (["{run}/../images"], ["is not a run", "metrics.jsonl"]),
        (["{run}", "--images", "1"], ["--images is 1"]),
        (["{run}", "--out", "{run}/log.txt/x.html"], ["--out", "is a file, not a folder"]),
        (["{run}", "--out", "{run}"], ["--out", "cannot be written"]),
    ],
)
def test_errors_are_for_people(
    run: Path, words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *(word.format(run=run) for word in words)]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error


def test_a_run_that_has_only_begun(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    parsed = Page(render_report(tmp_path))
    assert parsed.text["h2"] == SECTIONS
    notes = " ".join(parsed.text["p"])
    assert "No metrics yet" in notes and "no complete checkpoint yet" in notes and "no log.txt" in notes
    (tmp_path / "config.yaml").write_text("batch_sze: 4\nlr: <3\n")
    assert "batch_sze: 4\nlr: &lt;3" in render_report(tmp_path)


def test_images_that_moved(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    settings = (copy / "config.yaml").read_text()
    images = re.findall(r"^data: (.*)", settings)[0]
    (copy / "config.yaml").write_text(settings.replace(images, "/nowhere/images"))
    parsed = Page(render_report(copy, device="cpu"))
    assert parsed.all("img") == [] and len(parsed.all("figure", "chart")) == 6
    assert "/nowhere/images does not exist" in " ".join(parsed.text["p"]) and "--data PATH" in " ".join(
        parsed.text["p"]
    )
    assert len(Page(render_report(copy, images, device="cpu")).all("img")) > 40
    damaged = copy / "checkpoints"
    for file in damaged.glob("*/tensors.safetensors"):
        file.write_bytes(b"short")
    assert "no complete checkpoint" in render_report(copy, images, device="cpu")


def test_a_page_with_pictures_is_not_replaced_by_one_without(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink(missing_ok=True)
    settings = (copy / "config.yaml").read_text()
    images = re.findall(r"^data: (.*)", settings)[0]
    (copy / "config.yaml").write_text(settings.replace(images, "/nowhere/images"))
    command = ["report", str(copy), "--device", "cpu"]
    assert cli.main(command) == 0  # nothing is lost
    assert cli.main([*command, "--data", images]) == 0
    before = (copy / "report.html").read_bytes()
    capsys.readouterr()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "report.html is left as it is" in error and "--data PATH" in error
    assert (copy / "report.html").read_bytes() == before


# ---- a real browser ----

# Looks into the page as a phone or a desk would show it, points at its first curve, and writes down what it found.
_FRAME = """<!DOCTYPE html><iframe src="page.html" style="width:{width}px;height:844px;border:0"></iframe><pre></pre>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, plot = page.querySelector(".plot");
  const box = plot.querySelector("svg").getBoundingClientRect(), said = plot.parentElement.querySelector(".value");
  const before = said.textContent;
  plot.dispatchEvent(new PointerEvent("pointermove", {{clientX: box.left, clientY: box.top + 5}}));
  const pointed = said.textContent;
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  const images = [...page.images];
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth, scroll: page.documentElement.scrollWidth, before, pointed,
    after: said.textContent, broken: images.filter((image) => !image.naturalWidth).length, images: images.length,
    plot: box.width,
    smallest: Math.min(...[...page.querySelectorAll(".maps:not(.near) img")].map((i) => i.clientWidth)),
  }});
}});</script>"""


def _browse(folder: Path, width: int) -> tuple[dict[str, Any], list[str]]:
    """What the page says of itself at this width, and the lines of the browser's console."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    (folder / "frame.html").write_text(_FRAME.format(width=width))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"),
            *("--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert said, done.stdout[-2000:]
    return json.loads(said[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(run: Path, page: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(page)
    found, console = _browse(tmp_path, width)
    assert console == []
    assert found["scroll"] <= found["width"] <= width and found["width"] > width - 20  # less a scroll bar
    assert found["images"] > 40 and found["broken"] == 0 and found["plot"] > 250
    rows = read_metrics(run)
    assert found["pointed"] == f"step 0: loss {rows[0]['loss']:.4g}"
    assert found["before"] == found["after"] == f"step {rows[-1]['step']}: loss {rows[-1]['loss']:.4g}"


def test_maps_of_many_checkpoints_can_be_seen_on_a_phone(page: str, tmp_path: Path) -> None:
    many, changed = re.subn(r'(class="maps" style="--columns:)\d+', r"\g<1>9", page)
    assert changed == 1
    (tmp_path / "page.html").write_text(many)
    found, _ = _browse(tmp_path, 390)
    assert found["smallest"] >= 84  # they scroll inside their section
    assert found["scroll"] <= found["width"]


def test_the_browser_would_tell(page: str, tmp_path: Path) -> None:
    """The same look finds a script that fails, a picture from elsewhere that the policy stops, and a wide block."""
    wrong = "<script>undefinedName()</script><img src='http://127.0.0.1:9/x.png'><div style='width:2000px'>wide</div>"
    (tmp_path / "page.html").write_text(page.replace("</main>", wrong + "</main>"))
    found, console = _browse(tmp_path, 390)
    assert any("undefinedName" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
    assert found["scroll"] > 1900 and found["broken"] == 1
