"""What a curation reports: numbers against a written-out computation, and its page in a browser without a network."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videofactory_train.curate.config import CurateConfig
from videofactory_train.curate.curation import SOURCES, Curation, source_schema
from videofactory_train.curate.decide import Rules
from videofactory_train.curate.report import LISTED, SCORES, write_report
from videofactory_train.curate.stage import Row
from videofactory_train.curate.work import schema

pytest.importorskip("pyarrow")

RULES = Rules()
# How bad a failed row's columns look; they count for nothing.
SPOILED = {"o_avg": 1e9, "o_md": 1e9, "ratio": 1e9, "affine_residual": 1e9, "text_edge": 1e9, "aesthetic": 1e9}
MARKUP = "<b>bold</b> \"><img src=x onerror=\"document.title='run'\"> &amp; 'quoted'"


@dataclass
class Drawn:
    """Rows as the stages write them, by the clip's id."""

    clips: dict[str, Row] = field(default_factory=dict)
    stages: dict[str, dict[str, Row]] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def write(self, folder: Path) -> Curation:
        """The curation that they are, in parts of 50 rows in no order."""
        config = CurateConfig(decide=RULES)
        curation = Curation(folder, config)
        curation.keep()
        keys, stages = curation.keys(), {stage.name: stage for stage in config.stages()}
        sources = [{"source_id": f"s{i}", "name": name} for i, (name, _) in enumerate(self.failed)]
        if sources:
            curation.store.write(SOURCES, sources, source_schema(), "source_id")
        scenes = [{"clip_id": clip_id, "status": "ok", **row} for clip_id, row in self.clips.items()]
        scenes += [
            {"clip_id": f"s{i}-error", "source_id": f"s{i}", "status": "error", "error": error}
            for i, (_, error) in enumerate(self.failed)
        ]
        found = {"scenes": scenes}
        for name, results in self.stages.items():
            found[name] = [{"clip_id": clip_id, "status": "ok", **row} for clip_id, row in results.items()]
        order = np.random.default_rng(1)
        for name, rows in found.items():
            mixed = [rows[i] for i in order.permutation(len(rows))]
            for first in range(0, len(mixed), 50):
                curation.store.write(keys[name], mixed[first : first + 50], schema(stages[name]), "clip_id")
        return curation


def picture(number: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 255, (9, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((20, 20, 1), np.uint8))).save(file, "JPEG")
    return file.getvalue()


def draw(number: int) -> Drawn:
    """Clips with all scores; for some a stage has failed, or has not been there."""
    random, drawn = np.random.default_rng(0), Drawn()
    results: dict[str, Any] = {
        "keyframe": lambda i: {"image": picture(i % 7)},
        "text": lambda i: {"text_edge": max(0.0, random.normal(0.2, 0.4))},
        "motion": lambda i: {
            "o_avg": random.gamma(1.2, 4.0),
            "o_md": random.gamma(1.5, 2.5),
            "ratio": None if i % 9 == 0 else random.gamma(1.0, 3.0),
            "affine_residual": random.gamma(1.0),
        },
        "aesthetics": lambda i: {"aesthetic": math.nan if i == 5 else random.normal(4.8, 1.0)},
        "caption": lambda i: {"caption_text": "" if i % 11 == 0 else "word " * random.integers(1, 30)},
    }
    for i in range(number):
        clip_id = f"{random.integers(1 << 40):010x}"
        start = random.uniform(0.0, 9.0)
        caption = "the caption of the source" if i % 4 == 0 else None
        name = f"{MARKUP} {i}" if i % 3 == 0 else f"{'folder/' * 12}clip{'x' * 60} {i}.mp4"
        drawn.clips[clip_id] = {"name": name, "start": start, "end": start + random.gamma(2.0, 4.0), "caption": caption}
        for stage, result in results.items():
            fate, row = random.random(), result(i)
            if fate < 0.04:
                columns = {key: value for key, value in SPOILED.items() if key in row}
                row = {**columns, "status": "error", "error": f"{stage} {MARKUP} {i % 5}"}
            if fate < 0.96:
                drawn.stages.setdefault(stage, {})[clip_id] = row
    drawn.failed = [(f"broken {MARKUP}", "it is no video"), ("empty.mp4", f"it has no frames {MARKUP}")]
    return drawn


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(320)


@pytest.fixture(scope="module")
def report(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the drawn rows, in a folder whose name is an address's trouble."""
    return write_report(drawn.write(tmp_path_factory.mktemp("report") / "100% of #1?"))


def numbers_of(report: Path) -> dict[str, Any]:
    return json.loads(report.with_name("report.json").read_text(encoding="utf-8"))


def joined(drawn: Drawn) -> list[tuple[Row, list[str]]]:
    """Every clip with what its stages found, and what went wrong."""
    found = []
    for clip_id in sorted(drawn.clips):
        row, errors = {"clip_id": clip_id, **drawn.clips[clip_id]}, []
        for stage, results in drawn.stages.items():
            result = results.get(clip_id, {})
            if result.get("status") == "error":
                errors.append(f"{stage}: {result['error']}")
            else:
                row |= result
        found.append((row, errors))
    return found


def broken_rules(row: Row) -> list[str]:
    broken = ["duration"] if row["end"] - row["start"] < 2.0 - 1e-6 else []
    if row.get("text_edge") is not None and row["text_edge"] >= 0.5:
        broken.append("text")
    if row.get("o_avg") is not None:
        a, d = row["o_avg"], row["o_md"]
        if not (a > 0.2 and (a / d < 2.0 or d > 6.0)):
            broken.append("motion")
    if row.get("aesthetic") is not None and not row["aesthetic"] >= 4.0:
        broken.append("aesthetics")
    return broken


def test_clips_are_joined_in_the_order_of_their_ids(report: Path, drawn: Drawn) -> None:
    found = list(Curation(report.parent, CurateConfig(decide=RULES)).clips())
    expected = joined(drawn)
    assert [row["clip_id"] for row, _ in found] == [row["clip_id"] for row, _ in expected]
    for (row, decision), (wanted, errors) in zip(found, expected, strict=True):
        for name in ("name", "start", "end", "caption", "caption_text", *SCORES):
            same = row[name] == wanted.get(name)
            assert same or math.isnan(row[name]), name
        assert list(decision.errors) == errors
        assert list(decision.removed_by) == broken_rules(wanted)
        assert "image" not in row


def test_numbers_are_those_of_a_written_out_computation(report: Path, drawn: Drawn) -> None:
    found, rows = numbers_of(report), joined(drawn)
    broken = [broken_rules(row) for row, _ in rows]
    kept = [row for (row, errors), rules in zip(rows, broken, strict=True) if not rules and not errors]
    assert (found["clips"], found["kept"]) == (320, len(kept))
    assert 0 < len(kept) < 320
    assert found["seconds"] == pytest.approx(sum(row["end"] - row["start"] for row, _ in rows), rel=1e-12)
    assert found["seconds_kept"] == pytest.approx(sum(row["end"] - row["start"] for row in kept), rel=1e-12)
    measured = {"duration": "end", "text": "text_edge", "motion": "o_avg", "aesthetics": "aesthetic"}
    for removal in found["removals"]:
        rule = removal["rule"]
        assert removal["alone"] == sum(rule in rules for rules in broken) > 0
        assert removal["in_order"] == sum(rules[:1] == [rule] for rules in broken)
        assert removal["measured"] == sum(row.get(measured[rule]) is not None for row, _ in rows)
    assert [removal["rule"] for removal in found["removals"]] == list(measured)
    seconds = [row["end"] - row["start"] for row, _ in rows]
    bounds = [0, 2, 5, 10, 20, 30, math.inf]
    expected = [sum(a <= value < b for value in seconds) for a, b in pairwise(bounds)]
    assert found["durations"]["counts"] == expected
    captions = [row.get("caption_text") or row["caption"] or "" for row, _ in rows]
    words = [len(caption.split()) for caption in captions if caption]
    bounds = [0, 6, 11, 16, 21, math.inf]
    expected = [sum(a <= value < b for value in words) for a, b in pairwise(bounds)]
    assert found["captions"]["counts"] == expected
    assert found["errors"] == [[row["name"], error] for row, errors in rows for error in errors]
    assert sorted(found["failed_sources"]) == sorted(map(list, drawn.failed))


@pytest.mark.parametrize("score", SCORES)
def test_histograms_count_every_number_in_its_bin(report: Path, drawn: Drawn, score: str) -> None:
    found = numbers_of(report)["scores"][score]
    values = [row[score] for row, _ in joined(drawn) if row.get(score) is not None and not math.isnan(row[score])]
    low, high, bins = found["low"], found["high"], len(found["counts"])
    assert sum(found["counts"]) == len(values)
    for i, number in enumerate(found["counts"]):
        # The last holds what lies beyond.
        begin, end = low + (high - low) * i / bins, low + (high - low) * (i + 1) / bins if i < bins - 1 else math.inf
        # At an edge rounding decides.
        certain = sum(begin + 1e-9 < value < end - 1e-9 for value in values)
        possible = sum(begin - 1e-9 < value < end + 1e-9 for value in values)
        assert certain <= number <= possible
    # So that what is rare does not take all room.
    assert sum(value > high for value in values) <= 0.02 * len(values)
    assert found["thresholds"] == ([getattr(RULES, score)] if hasattr(RULES, score) else [])


def test_pictures_are_those_of_the_clips_that_are_asked_for(report: Path, drawn: Drawn) -> None:
    curation = Curation(report.parent, CurateConfig(decide=RULES))
    expected = {name: row["image"] for name, row in drawn.stages["keyframe"].items() if "image" in row}
    chosen = [*list(expected)[::40], *(name for name in drawn.clips if name not in expected)]
    assert curation.pictures(chosen) == {name: expected[name] for name in chosen if name in expected}


@dataclass
class Opened:
    """A page from the disk, and what it says and asks for."""

    page: Any
    told: list[str]
    asked: list[str]

    def all(self, script: str, selector: str) -> list[Any]:
        """What a function makes of each element."""
        return self.page.locator(selector).evaluate_all(f"elements => elements.map({script})")

    def texts(self, selector: str) -> list[str]:
        return self.all("element => element.innerText", selector)

    def too_wide(self) -> list[str]:
        """What stands beyond the right edge of the window, unless it can be scrolled to where it is."""
        return self.page.evaluate("""() => {
            const inside = element => element.closest('.strip, .box') === null;
            const wide = [...document.body.querySelectorAll('*')].filter(
                element => inside(element) && element.getBoundingClientRect().right > innerWidth + 0.5);
            const page = document.documentElement;
            return [...wide.map(element => element.tagName), ...(page.scrollWidth > innerWidth ? ['page'] : [])];
        }""")


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file without a network."""
    contexts = []

    def open_page(path: Path, width: int = 1200, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page, told, asked = context.new_page(), [], []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return Opened(page, told, [url for url in asked if not url.startswith("data:")])

    yield open_page
    for context in contexts:
        context.close()


def rows_of_table(page: Opened, kind: str) -> list[list[str]]:
    rows = page.all("row => [...row.cells].map(cell => cell.innerText)", f"table.{kind} tr")
    return rows[1:]


def test_the_page_needs_nothing_but_its_file(report: Path, opened: Any) -> None:
    page = opened(report)
    assert page.told == []
    assert page.asked == [report.as_uri()]
    assert page.page.title() == "Curation"
    widths = page.all("image => image.complete && image.naturalWidth", "img")
    assert len(widths) > 100
    assert set(widths) == {160}
    assert page.page.locator("script, link, iframe").count() == 0
    # Some key frames failed.
    assert 0 < page.page.locator(".clip i").count() < 40


def test_the_tables_show_the_numbers(report: Path, opened: Any) -> None:
    found, page = numbers_of(report), opened(report)
    assert page.texts("h1") == [f"{found['kept']} of {found['clips']} clips kept"]
    left, expected = found["clips"], [["all clips", "", "", "", "320"]]
    for removal in found["removals"]:
        left -= removal["in_order"]
        share = f"{removal['alone'] / removal['measured']:.1%}\nof {removal['measured']}"
        expected.append([removal["rule"], str(removal["alone"]), share, str(removal["in_order"]), str(left)])
    expected.append(["errors", "", "", str(left - found["kept"]), str(found["kept"])])
    rows = rows_of_table(page, "rules")
    assert [[row[0].splitlines()[0], *row[1:]] for row in rows] == expected
    # The thresholds stand beside their rule.
    told = [row[0].splitlines()[1] for row in rows[1:5]]
    assert [name in text for name, text in zip(("2 s", "0.5", "0.2", "4"), told, strict=True)] == [True] * 4
    errors = [*found["errors"], *([name, f"scenes: {error}"] for name, error in found["failed_sources"])]
    assert f"Errors ({len(errors)})" in page.texts("h2")
    shown = {row[0]: row[1:] for row in rows_of_table(page, "errors")}
    assert set(shown) == {error for _, error in errors}
    for error, (number, names) in shown.items():
        where = [name for name, other in errors if other == error]
        assert number == str(len(where))
        assert set(names.splitlines()) <= {*where, f"and {len(where) - 3} more"}
        assert len(names.splitlines()) == min(len(where), 4)


def test_figures_have_their_bars_and_thresholds(report: Path, opened: Any) -> None:
    found, page = numbers_of(report), opened(report)
    figures = page.all(
        """figure => ({
            title: figure.querySelector('figcaption').innerText,
            counts: [...figure.querySelectorAll('rect title')].map(title => title.textContent.split(': ')[1]),
            heights: [...figure.querySelectorAll('rect')].map(bar => Number(bar.getAttribute('height'))),
            lines: [...figure.querySelectorAll('line.threshold')].map(line => Number(line.getAttribute('x1'))),
            marks: [...figure.querySelectorAll('text.threshold')].map(text => text.textContent),
            ticks: [...figure.querySelectorAll('text[y="195.0"]')].map(text => text.textContent),
            width: figure.querySelector('svg').viewBox.baseVal.width,
        })""",
        "figure",
    )
    assert [figure["title"] for figure in figures] == [
        "duration of the clips",
        "length of the captions",
        *SCORES.values(),
    ]
    for name, figure in zip(("durations", "captions"), figures, strict=False):
        assert figure["counts"] == [str(number) for number in found[name]["counts"]]
        assert figure["ticks"] == found[name]["labels"]
    for score, figure in zip(SCORES, figures[2:], strict=True):
        histogram = found["scores"][score]
        assert figure["counts"] == [str(number) for number in histogram["counts"]]
        assert figure["marks"] == [f"{threshold:g}" for threshold in histogram["thresholds"]]
        assert len(figure["marks"]) == (0 if score == "affine_residual" else 1)
        low, high = histogram["low"], histogram["high"]
        places = [(threshold - low) / (high - low) * figure["width"] for threshold in histogram["thresholds"]]
        assert figure["lines"] == pytest.approx(places, abs=0.1)
        assert 3 <= len(figure["ticks"]) <= 8
        assert all(low <= float(tick) <= high for tick in figure["ticks"])
        tallest = max(figure["heights"])
        for number, height in zip(histogram["counts"], figure["heights"], strict=True):
            exact = tallest * number / max(histogram["counts"])
            assert height == pytest.approx(max(exact, 1.0) if number else 0.0, abs=0.11)


def test_texts_of_a_figure_do_not_lie_on_each_other(report: Path, opened: Any) -> None:
    page = opened(report)
    figures = page.all(
        """svg => [...svg.querySelectorAll('text')].map(text => {
            const [box, whole] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
            return [box.left - whole.left, box.right - whole.left, box.top, box.bottom, whole.width];
        })""",
        "svg",
    )
    for boxes in figures:
        for i, (left, right, top, bottom, width) in enumerate(boxes):
            assert -0.5 <= left < right <= width + 0.5
            for other in boxes[:i]:
                assert right <= other[0] or other[1] <= left or bottom <= other[2] + 2 or other[3] <= top + 2


def test_strips_go_from_the_worst_to_the_best(report: Path, drawn: Drawn, opened: Any) -> None:
    page, rows = opened(report), joined(drawn)
    strips = page.all("strip => [...strip.querySelectorAll('small')].map(name => name.textContent)", ".strip")
    titles = page.texts("h4")
    assert len(strips) == len(titles) == 5 * len(SCORES)
    for i, score in enumerate(SCORES):
        ordered = sorted(
            (row for row, _ in rows if row.get(score) is not None and not math.isnan(row[score])),
            key=lambda row: row[score],
        )
        names = [row["name"] for row in ordered]
        assert strips[5 * i] == names[:8]
        assert strips[5 * i + 4] == names[-8:]
        assert titles[5 * i] == f"lowest: {ordered[0][score]:.3g} to {ordered[7][score]:.3g}"
        for part in range(1, 4):
            places = [names.index(name) for name in strips[5 * i + part]]
            assert places == sorted(places)
            assert part * len(names) // 5 <= places[0]
            assert places[-1] < (part + 1) * len(names) // 5
            assert 5 <= len(places) <= 8


def test_a_clip_says_what_becomes_of_it(report: Path, drawn: Drawn, opened: Any) -> None:
    page = opened(report)
    cells = page.all(
        "clip => [clip.querySelector('small').textContent, clip.querySelector('b').textContent, clip.className]",
        ".clip",
    )
    expected = {}
    for row, errors in joined(drawn):
        broken = broken_rules(row)
        reasons = [f"removed: {', '.join(broken)}"] if broken else []
        reasons += [f"{error.partition(':')[0]} failed" for error in errors]
        expected[row["name"]] = (", ".join(reasons) or "kept", "clip removed" if reasons else "clip")
    assert {expected[name] == (text, kind) for name, text, kind in cells} == {True}
    assert {text for _, text, _ in cells} > {"kept", "removed: motion"}


def test_markup_is_text(report: Path, opened: Any) -> None:
    page = opened(report)
    assert page.page.title() == "Curation"
    assert page.page.locator("small > *, td > *, span > *").count() == 0
    assert any(name.startswith(MARKUP) for name in page.all("name => name.textContent", "small"))
    assert any(MARKUP in text for text in page.texts("table.errors td"))


@pytest.mark.parametrize("width", [400, 700, 1600])
def test_nothing_stands_beyond_the_window(report: Path, opened: Any, width: int) -> None:
    assert opened(report, width).too_wide() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_on_their_ground(report: Path, opened: Any, scheme: str) -> None:
    """A contrast of 4.5 : 1, as WCAG 2 has it."""
    page = opened(report, scheme=scheme)

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ground = luminance(page.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.1) == (scheme == "dark")
    for selector, name in (("body", "color"), ("small", "color"), ("svg text", "fill"), ("text.threshold", "fill")):
        ink = luminance(page.all(f"element => getComputedStyle(element).{name}", selector)[0])
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, selector


def test_a_curation_of_nothing_has_a_page(tmp_path: Path, opened: Any) -> None:
    path = write_report(Drawn().write(tmp_path))
    page = opened(path, width=400)
    assert page.told == []
    assert page.texts("h1") == ["0 of 0 clips kept"]
    assert page.texts("h2") == ["Errors (0)"]
    assert page.page.locator("figure, img, table").count() == 0
    assert numbers_of(path)["kept"] == 0


@pytest.mark.parametrize("what", ["sources", "clips"])
def test_a_curation_where_everything_failed_says_so(tmp_path: Path, opened: Any, what: str) -> None:
    few = draw(12)
    if what == "sources":
        few = Drawn(failed=few.failed)
    else:
        bad = {"status": "error", "error": "no such thing"}
        few = Drawn(few.clips, {stage: dict.fromkeys(few.clips, bad) for stage in few.stages})
    path = write_report(few.write(tmp_path))
    page, found = opened(path, width=400), numbers_of(path)
    assert page.told == []
    assert page.too_wide() == []
    assert found["kept"] == 0
    assert page.page.locator("img").count() == 0
    if what == "sources":
        assert page.texts("h2") == ["Errors (2)"]
        assert {row[2] for row in rows_of_table(page, "errors")} == {name for name, _ in few.failed}
    else:
        assert page.texts("h2")[-1] == "Errors (60)"
        assert [row[1] for row in rows_of_table(page, "errors")] == ["12"] * 5
        # Nothing is known but how long they last.
        assert page.texts("figcaption") == ["duration of the clips", "length of the captions"]
        assert [row[2] for row in rows_of_table(page, "rules")[2:5]] == ["not measured"] * 3


def test_a_few_clips_stand_in_one_strip(tmp_path: Path, opened: Any) -> None:
    few = draw(5)
    page = opened(write_report(few.write(tmp_path)))
    strips = page.all("strip => strip.children.length", ".strip")
    measured = [sum(row.get(score) is not None for row, _ in joined(few)) for score in SCORES]
    assert strips == [number for number in measured if number]
    assert not any("est:" in title for title in page.texts("h4"))


def test_very_many_errors_leave_a_page_that_opens(tmp_path: Path, opened: Any) -> None:
    failed = [(f"{i}.mp4", f"{i}.mp4 is no video" if i < 1500 else "the disk is full") for i in range(3000)]
    path = write_report(Drawn(failed=failed).write(tmp_path))
    page = opened(path)
    assert len(numbers_of(path)["failed_sources"]) == 3000
    assert page.texts("h2") == ["Errors (3,000)"]
    assert "report.json has all" in page.texts("p")[-1]
    rows = rows_of_table(page, "errors")
    assert len(rows) == LISTED
    assert rows[0][:2] == ["scenes: the disk is full", "1,500"]
    assert "and 1,497 more" in rows[0][2]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("changes", [{"aesthetic": -2.0}, {"o_avg": 50.0, "o_md": 1000.0}])
def test_thresholds_far_from_all_values_are_drawn(
    drawn: Drawn, tmp_path: Path, opened: Any, changes: dict[str, float]
) -> None:
    curation = drawn.write(tmp_path)
    config = dataclasses.replace(curation.config, decide=Rules(**changes))
    page = opened(write_report(dataclasses.replace(curation, config=config)))
    lines = page.all("line => Number(line.getAttribute('x1')) / 440", "line.threshold")
    assert len(lines) == 5
    assert all(0 <= place <= 1 for place in lines)
    assert page.told == []
