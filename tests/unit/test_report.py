"""The report page: whole for any run directory, readable in both schemes, and nothing in it escapes or reaches out."""

from __future__ import annotations

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from steep.core.blank_lines import fold_blank_lines
from steep.core.files import write_json, write_text
from steep.evaluation.forgetting import forgetting_report
from steep.reporting.curves import Curve, curve, downsample, smooth
from steep.reporting.page import report_page, write_report
from steep.reporting.palette import DARK, LIGHT, TEXT_STYLES
from steep.reporting.plots import loss_plot, memory_plot, write_training_loss
from steep.reporting.run_files import RunFiles, read_run
from steep.trackers.backends import jsonl

VOID = {"meta", "br", "img", "hr", "link", "input"}
HOSTILE = (
    "</p></div></html><script>alert(1)</script><img src='http://evil.example/x'>&amp; \x00\x1b[2J \ud800 🦜 \u202e"
)


class Page(HTMLParser):
    """Elements, attributes and text of a page; unbalanced tags are errors, as in XML."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def write_run(directory: Path, steps: int = 40, sample: str = " is used to wrap a block.") -> Path:
    """A run directory as a run leaves it, its metrics written by the tracker."""
    tracker = jsonl.build()
    tracker.start(directory, {})
    for step in range(steps):
        if step % max(1, steps // 4) == 0:
            write_scores(tracker, step, steps)
        tracker.log({"kind": "train", "step": step, "loss": 3.0 - step / steps + 0.1 * math.sin(7 * step),
                     "learning_rate": 5e-5, "tokens_per_second": 800.0 + step % 7, "tokens": 2048 * (step + 1),
                     "memory_bytes": 2**31, "mfu": None, "time": 1.79e9 + step})  # fmt: skip
    write_scores(tracker, steps, steps)
    tracker.log({"kind": "sample", "step": 0, "prompt": "The with statement", "text": " before"})
    tracker.log({"kind": "sample", "step": steps, "prompt": "The with statement", "text": sample})
    tracker.close()
    parts = {"weights": 2**29, "gradients": 2**29, "optimizer": 2**30, "activations": 2**27, "logits": 2**26}
    write_json(directory / "plan.json", {
        "model": {"name": "SmolLM2-135M", "parameters": 134515008}, "steps": steps,
        "data": {"sequence_length": 256, "sources": [{"name": "topics", "documents": 78, "tokens": 182331,
                                                       "epochs": 0.362, "sequences": 712}]},
        "memory": {**parts, "total": sum(parts.values())}})  # fmt: skip
    write_json(directory / "ledger.json", {"sources": [
        {"name": name, "records_read": 82, "documents_kept": 78, "dropped": {"empty": 4}, "tokens": 182331,
         "tokens_held_out": 9120, "tokens_per_epoch": 173211, "tokens_trained": 65000, "epochs": 0.375}
        for name in ("topics", "docstrings")], "padding_tokens": 1234})  # fmt: skip
    write_json(directory / "summary.json", {"status": "done", "seconds": 131.2, "tokens_per_second": 811.3,
                                            "peak_memory_bytes": 2.41 * 2**30})  # fmt: skip
    write_json(directory / "environment.json", {"python": "3.11", "packages": {"torch": "2.13.0+cpu"}})
    write_text(directory / "config.yaml", "model:\n  pretrained: a <b> & c\n")
    return directory


def write_scores(tracker: jsonl.JsonlTracker, step: int, steps: int) -> None:
    for text, nats, bits, gain in (("general", 2.7, 0.95, 0.01), ("domain", 3.0, 0.91, -0.1)):
        factor = 1 + gain * step / steps
        tracker.log({"kind": "evaluate", "step": step, "text": text, "nats_per_token": nats * factor,
                     "perplexity": math.exp(nats * factor), "bits_per_byte": bits * factor})  # fmt: skip


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "manuals")


@pytest.fixture(scope="module")
def page(run_directory: Path) -> Page:
    return Page(write_report(run_directory).read_text(encoding="utf-8"))


def test_the_page_says_what_the_run_did(page: Page) -> None:
    for words in (
        "manuals learned the domain text and forgot little of the general text",
        "On domain it is 10.0 % better (from 0.9100 to 0.8190 bits per byte).",
        "On general it is 1.0 % worse (from 0.9500 to 0.9595 bits per byte).",
        "40 of 40", "81.9k", "2 min 11 s", "2.4 GiB", "SmolLM2-135M", "135M parameters", "started 2026-09-21",
        "Training loss: 3.000 at step 0", "The with statement before", "is used to wrap a block.",
        "a <b> & c", "packages.torch", "2.13.0+cpu", "all sources", "364,662", "empty", "Padding: 1,234 tokens.",
    ):  # fmt: skip
        assert words in page.words


def test_the_page_needs_nothing_but_itself(run_directory: Path, page: Page) -> None:
    text = (run_directory / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|@font-face|xmlns", text)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#")
    assert re.findall(r"url\((.)", text) == ["#"] * text.count("url(")


def test_every_picture_has_a_title_a_description_and_its_own_ids(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 6  # loss and memory, wide and narrow; learning rate; throughput
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    for _, attributes in page.elements:
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids  # type: ignore[index]


def test_pictures_take_their_colours_and_font_from_the_page(run_directory: Path) -> None:
    text = write_report(run_directory).read_text(encoding="utf-8")
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--train)" in pictures
    assert "var(--first)" in pictures
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) <= {"#000000"}
    assert "DejaVu" not in pictures
    assert re.search(r"font: 12px var\(--sans\)|font-family: var\(--sans\)", pictures)
    assert text.count("prefers-color-scheme: dark") == 1


def test_text_of_a_model_stays_text(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "<b>&amp; run", steps=6, sample=HOSTILE)
    text = write_report(directory).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "</p></div></html><script>alert(1)</script>" in page.words
    assert "🦜" in page.words
    assert "<b>&amp; run" in page.words


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "plan.json", "ledger.json"])
def test_a_missing_file_is_named_where_its_content_would_be(run_directory: Path, tmp_path: Path, missing: str) -> None:
    copy = Path(shutil.copytree(run_directory, tmp_path / "copy"))
    (copy / missing).unlink()
    page = Page(report_page(read_run(copy)))
    assert f"{missing} is not in the run directory." in page.words


def test_an_empty_directory_and_broken_files_still_make_a_page(tmp_path: Path) -> None:
    assert "no summary yet" in Page(write_report(tmp_path).read_text(encoding="utf-8")).words
    (tmp_path / "plan.json").write_text('{"model": ', encoding="utf-8")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "ledger.json").write_text("[]", encoding="utf-8")
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words
    assert "plan.json cannot be read" in words
    assert "config.yaml cannot be read" in words
    assert "ledger.json cannot be read" in words
    assert write_training_loss(tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_stopped_at_once_has_a_page(tmp_path: Path) -> None:
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    tracker.log({"kind": "evaluate", "step": 0, "text": "wiki", "nats_per_token": 3.0, "bits_per_byte": None})
    tracker.log({"kind": "train", "step": 0, "loss": math.nan})
    tracker.close()
    write_json(tmp_path / "summary.json", {"status": "failed", "error": "the loss is nan\nat <step> 0"})
    words = Page(write_report(tmp_path).read_text(encoding="utf-8")).words
    assert "failed the loss is nan at <step> 0" in words
    assert "learned" not in words, "one score is no change"
    (tmp_path / "summary.json").unlink()
    assert "has no verdict" in Page(report_page(read_run(tmp_path))).words
    assert "1 training lines have no finite loss" in words


def test_scores_of_the_summary_come_before_those_of_the_lines(run_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_directory, tmp_path / "copy"))
    scores = {"domain": {"before": {"bits_per_byte": 2.0, "nats_per_token": 5.0}, "after": {"bits_per_byte": 1.5}},
              "general": {"before": None, "after": {"bits_per_byte": 1.0}}}  # fmt: skip
    write_json(copy / "summary.json", {"status": "interrupted", "texts": scores})
    words = Page(report_page(read_run(copy))).words
    assert "copy learned the domain text On domain it is 25.0 % better (from 2.0000 to 1.5000 bits per byte)." in words
    assert "interrupted, can be resumed" in words
    assert "general–1.0000–––" in words


def test_the_same_run_gives_the_same_bytes(run_directory: Path) -> None:
    first, picture = write_report(run_directory).read_bytes(), write_training_loss(run_directory).read_bytes()
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30, "svg.fonttype": "path"}):
        assert write_report(run_directory).read_bytes() == first, "the user's matplotlib settings do not leak in"
        assert write_training_loss(run_directory).read_bytes() == picture
        assert matplotlib.rcParams["font.size"] == 30


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "long", steps=30_000)
    assert write_report(directory).stat().st_size < 400_000


def test_a_line_written_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    tracker = jsonl.build()
    tracker.start(tmp_path, {})
    for loss in (3.0, 2.0):
        tracker.log({"kind": "train", "step": 7, "loss": loss})
        tracker.log({"kind": "evaluate", "step": 7, "text": "domain", "nats_per_token": loss})
    tracker.close()
    run = read_run(tmp_path)
    assert [record["loss"] for record in run.train] == [2.0]
    assert [record["nats_per_token"] for record in run.evaluate] == [2.0]


# ── the verdict ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("domain", "general", "headline"),
    [
        (0.90, 1.00, "learned the domain text and forgot none of the general text"),
        (0.90, 0.90, "learned the domain text and forgot none of the general text"),
        (0.90, 1.01, "learned the domain text and forgot little of the general text"),
        (0.90, 1.05, "learned the domain text but forgot some of the general text"),
        (1.00, 1.00, "learned nothing measurable of the domain text and forgot none of the general text"),
        (1.10, 1.00, "got worse on the domain text and forgot none of the general text"),
    ],
)
def test_the_verdict_in_words(domain: float, general: float, headline: str) -> None:
    scores = {text: {"before": {"bits_per_byte": 1.0}, "after": {"bits_per_byte": after}}
              for text, after in (("general", general), ("domain", domain))}  # fmt: skip
    assert forgetting_report(scores).headline == headline


# ── curves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_downsampling_keeps_every_extreme() -> None:
    values = [math.sin(i / 500) for i in range(50_000)]
    values[12_345], values[40_001] = 9.0, -9.0
    few = downsample(Curve(range(50_000), values), 2000)
    assert len(few.steps) <= 2000
    assert list(few.steps) == sorted(set(few.steps))
    assert (max(few.values), min(few.values)) == (9.0, -9.0)
    assert all(values[int(step)] == value for step, value in zip(few.steps, few.values, strict=True))
    short = Curve([1, 2], [3.0, 4.0])
    assert downsample(short) is short


def test_smoothing_by_hand() -> None:
    assert list(smooth(Curve(range(5), [0.0, 3.0, 6.0, 0.0, 3.0]), 3).values) == [1.5, 3.0, 3.0, 3.0, 1.5]
    import numpy

    noise = numpy.random.default_rng(0).normal(size=400)
    inner = numpy.convolve(noise, numpy.ones(21) / 21, mode="valid")
    assert numpy.allclose(smooth(Curve(range(400), noise.tolist()), 21).values[10:-10], inner, atol=1e-12)


def test_a_curve_leaves_out_what_is_no_number() -> None:
    records = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2}, {"step": 3, "loss": 2}]
    assert curve(records, "loss") == Curve([0, 3], [1.0, 2])


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_memory_bar_holds_every_part_in_order() -> None:
    figure = memory_plot(
        {"logits": 1.0, "weights": 4.0, "total": 99.0, "other": 2.0, "gradients": 0}, measured_bytes=8.0
    )
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0.0, 4.0), (4.0, 1.0), (5.0, 2.0), (0.0, 8.0)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["weights", "logits", "other"]
    assert memory_plot({}).axes
    [axes] = memory_plot({"model": 1.0}, 2.0, labels=("added by stage", "peak")).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["added by stage", "peak"]


def test_loss_figure_shows_what_was_logged(run_directory: Path) -> None:
    lines = {line.get_label(): line for line in loss_plot(read_run(run_directory)).axes[0].lines}
    assert set(lines) == {"training", "mean of 5 steps", "held-out general", "held-out domain"}
    assert list(lines["training"].get_xdata()) == list(range(40))
    assert list(lines["held-out domain"].get_xdata()) == [0, 10, 20, 30, 40]
    styles = {(line.get_linestyle(), line.get_marker()) for name, line in lines.items() if name.startswith("held")}
    assert len(styles) == 2, "no two curves differ by colour alone"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough(scheme: dict[str, str]) -> None:
    def contrast(name: str) -> float:
        bright, dim = sorted((luminance(scheme[name]), luminance(scheme["paper"])), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    assert set(scheme) == set(LIGHT)
    assert min(contrast(name) for name in ("ink", "faint")) >= 4.5
    assert min(contrast(name) for name in ("train", *(style[0] for style in TEXT_STYLES))) >= 3
    assert len(set(LIGHT.values())) == len(LIGHT), "a drawn colour must name one variable"


def test_blank_lines_of_a_sample_are_folded() -> None:
    assert fold_blank_lines("one\n\ntwo") == "one\n\ntwo"
    assert fold_blank_lines("one\n\n \n\ntwo\n\n\n") == "one\n[3 blank lines]\ntwo\n[3 blank lines]"
    sample = {"kind": "sample", "step": 0, "prompt": "The", "text": " start" + 40 * "\n" + "<end>"}
    page = report_page(RunFiles(name="r", samples=[sample]))
    assert "<b>The</b> start\n[39 blank lines]\n&lt;end&gt;</p>" in page


def test_a_picture_alone_has_the_name_of_its_run() -> None:
    records = [{"step": step, "loss": 3.0} for step in range(9)]
    figure = loss_plot(RunFiles(name="manuals", train=records), title="manuals: loss")
    assert figure.get_suptitle() == "manuals: loss"
    assert loss_plot(RunFiles(name="manuals", train=records)).get_suptitle() == ""
