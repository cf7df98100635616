"""A report page in headless Chromium: it fits every width, fetches and runs nothing, and its figures show something."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

import lr_callback as lrc
from lr_callback import Allocation, Factorization
from lr_callback.observation.report import Stage
from lr_callback.page.facts import Facts, Missing
from lr_callback.page.page import page
from lr_callback.page.pictures import pictures_of

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
WIDTHS = (360, 390, 500, 800, 1600)
PHONES = (360, 390, 500)
EVIL = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&'\""
PROBE = """
<body><script>
const names = NAMES, result = {};
const seen = frame => {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth;
  const clipped = one => one.closest('.box');
  const rectangle = one => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  return {
    width, wide: root.scrollWidth, height: root.scrollHeight, title: page.title,
    beyond: [...page.body.querySelectorAll('*')].filter(one => !clipped(one) || one.matches('.box'))
      .filter(one => one.getBoundingClientRect().right > width + 0.5).map(one => one.outerHTML.slice(0, 80)),
    svgs: [...page.querySelectorAll('svg')].map(rectangle),
    drawn: [...page.querySelectorAll('svg')].map(one => { const b = one.getBBox(); return [b.width, b.height]; }),
    scripts: page.scripts.length, fetched: frame.contentWindow.performance.getEntriesByType('resource').length,
    scrolled: [...page.querySelectorAll('.box')].filter(one => one.scrollWidth > one.clientWidth + 1)
      .map(one => one.getAttribute('aria-label')),
    cells: [...page.querySelectorAll('.stages tbody tr > *')].map(rectangle),
    text: page.body.innerText,
  };
};
addEventListener('load', () => {
  document.querySelectorAll('iframe').forEach((frame, index) => { result[names[index]] = seen(frame); });
  const told = document.createElement('pre');
  told.id = 'result';
  told.textContent = JSON.stringify(result);
  document.body.replaceChildren(told);
});
</script>FRAMES</body>
"""


def chromium(folder, file, *flags):
    """Run Chromium on a file, with a profile of its own."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def looked_at(folder, pages):
    """Return what a browser says of each page at each width: name -> width -> facts."""
    names = [f"{name} {width}" for name in pages for width in WIDTHS]
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text, quote=True)}"></iframe>'
        for text in pages.values()
        for width in WIDTHS
    )
    probe = folder / "probe.html"
    text = "<!DOCTYPE html><meta charset=utf-8>" + PROBE.replace("NAMES", json.dumps(names)).replace("FRAMES", frames)
    probe.write_text(text, encoding="utf-8")
    dom = chromium(folder, probe, "--dump-dom", "--window-size=1700,1000")
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    return {name: {width: SimpleNamespace(**found[f"{name} {width}"]) for width in WIDTHS} for name in pages}


def pictures():
    """Return the figures of a small compression."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    analysis = lrc.analyze(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)))
    allocation = analysis.allocate(0.5)
    return pictures_of(allocation, analysis.curves(allocation))


def facts_of(layers, name="network.layer{}.0.conv1", **more):
    names = [name.format(index) for index in range(layers)]
    choice = Factorization("kernel_in_encoder", 2, 30, 0.4321, 40_000, 123_456)
    allocation = Allocation(
        {name: choice if index % 4 else None for index, name in enumerate(names)}, {"gru": "GRU is not among them"},
        {name: (512, 256, 3, 3) for name in names}, 25_000_000, 75_002_123, 25_000_001, 0.34,
    )  # fmt: skip
    before = Stage("dense, before", {"test_accuracy": 0.91}, 75_002_123, 4_781_670_400, 300_000_000, 1234.5)
    after = replace(before, name="this checkpoint", parameters=25_000_000, file_bytes=100_000_000, milliseconds=2345.6)
    code = "model = " + "Network(" * 30 + ")" * 30
    return Facts(
        "runs/last.ckpt", allocation, (before, replace(after, name="right after"), after), batch="64x3x224x224 float32",
        origin={"method": "ALDS(error='activation', foldings=['kernel_in_encoder'], power=4)", "path": "x" * 300},
        loading=code, commands={"A file": "lr-callback export --checkpoint " + "y" * 200}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return what a browser says of some pages."""
    missing = (Missing("figures", "matplotlib is not installed", "pip install matplotlib"),)
    evil = facts_of(5, name=EVIL + "{}", missing=(Missing(EVIL, EVIL, EVIL),))
    pages = {
        "usual": page(facts_of(8, pictures=pictures())),
        "large": page(facts_of(300, name="encoder.blocks.{}." + "very_long_name_" * 20)),
        "bare": page(facts_of(8, missing=missing)),
        "evil": page(replace(evil, name=EVIL, origin={EVIL: EVIL}, loading=EVIL)),
    }
    folder = tmp_path_factory.mktemp("browser")
    return SimpleNamespace(folder=folder, pages=pages, found=looked_at(folder, pages))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["usual", "large", "bare", "evil"])
def test_nothing_is_wider_than_the_window(seen, name, width):
    found = seen.found[name][width]
    assert (found.width, found.wide, found.beyond) == (width, width, [])


def test_on_a_phone_what_is_wide_scrolls_in_its_box(seen):
    assert {"Layers", "Spectra", "Code"} <= set(seen.found["usual"][360].scrolled)
    assert len(seen.found["usual"][1600].scrolled) < len(seen.found["usual"][360].scrolled)


@pytest.mark.parametrize("width", PHONES)
def test_what_a_person_looks_for_first_is_seen_on_a_phone_without_scrolling(seen, width):
    found = seen.found["usual"][width]
    assert not {"Stages side by side", "What each layer kept", "Error against size"} & set(found.scrolled)
    assert len(found.cells) == 5 * 4  # a name and three stages, of five rows
    assert all(left > 0 and left + size <= width and size > 0 for left, _, size, _ in found.cells)
    words = " ".join(found.text.split())
    assert "parameters 75,002,123 25,000,000 (33.3%) 25,000,000 (33.3%)" in words


def test_on_paper_nothing_is_cut_and_nothing_is_folded(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    usual = page(facts_of(8, pictures=pictures(), arguments="keep_ratio: 0.3"))
    on_paper = usual.replace("@media print", "@media all")
    found = looked_at(tmp_path, {"screen": usual, "paper": on_paper})
    assert found["screen"][800].scrolled and "keep_ratio" not in found["screen"][800].text
    assert (found["paper"][800].scrolled, found["paper"][800].beyond) == ([], [])
    assert "keep_ratio: 0.3" in found["paper"][800].text
    assert all(height < 800 for *_, height in found["paper"][800].svgs)  # a page has about 980


def test_nothing_is_fetched_or_run_and_names_are_shown_as_they_are(seen):
    for widths in seen.found.values():
        assert {(found.scripts, found.fetched) for found in widths.values()} == {(0, 0)}
    found = seen.found["evil"][800]
    assert found.title.startswith("Low-rank compression: ") and EVIL + "3" in found.text


def test_the_browser_would_tell_of_what_does_not_fit_and_what_is_fetched(tmp_path):
    text = page(facts_of(2)).replace("</main>", '<div style="width:900px">x</div></main>')
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("<main>", '<main><img src="http://127.0.0.1:9/a.png">')
    found = looked_at(tmp_path, {"wrong": text})["wrong"]
    assert found[360].wide > 360 and found[360].beyond and found[360].fetched == 1


def test_figures_have_room_and_something_in_it(seen):
    for width in WIDTHS:
        found = seen.found["usual"][width]
        assert len(found.svgs) == 3 and all(size > 100 for _, _, *sizes in found.svgs for size in sizes)
        assert all(size > 100 for sizes in found.drawn for size in sizes)


def test_figures_in_a_picture_of_the_page_are_not_empty(seen):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    file, shot = seen.folder / "usual.html", seen.folder / "usual.png"
    file.write_text(seen.pages["usual"], encoding="utf-8")
    found = seen.found["usual"][800]
    chromium(seen.folder, file, f"--screenshot={shot}", f"--window-size=800,{found.height}")
    with image.open(shot) as picture:
        assert picture.width == 800
        for left, top, width, height in found.svgs:
            part = picture.convert("RGB").crop((int(left), int(top), int(left + width), int(top + height)))
            colours = part.getcolors(part.width * part.height)
            assert len(colours) > 10 and max(count for count, _ in colours) < 0.97 * part.width * part.height
