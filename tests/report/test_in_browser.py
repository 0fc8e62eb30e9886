"""The page in a real browser without a network: nothing asked for, nothing complained of, nothing cut off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}

# The least contrast (WCAG) of an element's own text with what is behind it, and which text that is.
CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length && (found.length < 4 || found[3] === 1)) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  let least = [99, ""];
  for (const element of document.querySelectorAll("main *")) {
    const texts = [...element.childNodes].filter(node => node.nodeType === 3);
    const own = texts.map(node => node.textContent.trim()).join("");
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, own.slice(0, 60)];
  }
  return least;
}"""


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: object, file: Path, size: tuple[int, int], **context: object) -> None:
        self.context = browser.new_context(  # type: ignore[attr-defined]
            viewport={"width": size[0], "height": size[1]}, offline=True, **context
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if not Path(CHROMIUM).exists():
        pytest.fail(f"there is no browser {CHROMIUM}: install chromium, or set CHROMIUM to where it is")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def open_page(browser, made) -> Iterator[object]:
    opened: list[Opened] = []

    def open_as(kind: str, **context: object) -> Opened:
        opened.append(Opened(browser, made / "index.html", SIZES[kind], **context))
        return opened[-1]

    yield open_as
    for one in opened:
        one.context.close()


@pytest.mark.parametrize("kind", SIZES)
def test_it_asks_for_nothing_complains_of_nothing_and_fits_the_window(open_page, kind, tmp_path):
    shown = open_page(kind)
    page = shown.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the window"
    wide = page.evaluate(
        "[...document.querySelectorAll('main > *, figure, img')].filter(one => one.checkVisibility() && "
        "!one.closest('.strip') && one.getBoundingClientRect().right > innerWidth + 1)"
        ".map(one => one.outerHTML.slice(0, 99))"
    )
    assert wide == []
    images = page.evaluate(
        "async () => { const all = [...document.images]; "
        "await Promise.all(all.map(one => one.decode().catch(() => 0)));"
        " return all.map(one => [one.naturalWidth, one.alt]); }"
    )
    assert len(images) > 50
    assert [alt for width, alt in images if width == 0 or not alt.strip()] == []
    page.screenshot(path=str(tmp_path / f"{kind}.png"), full_page=True)
    with Image.open(tmp_path / f"{kind}.png") as shot:
        assert shot.width == SIZES[kind][0]
        assert shot.height > 5000
        assert len(shot.convert("RGB").resize((200, 2000)).getcolors(1 << 20)) > 100, "there is something on it"
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith(("file://", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(open_page, scheme, tmp_path):
    page = open_page("desktop", color_scheme=scheme).page
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    figure = page.evaluate("getComputedStyle(document.querySelector('.panel img')).backgroundColor")
    assert figure == "rgb(255, 255, 255)", "figures are drawn for white"
    page.screenshot(
        path=str(tmp_path / f"{scheme}.png"), clip={"x": 0, "y": 0, "width": 1280, "height": 2400}, full_page=True
    )
    assert (tmp_path / f"{scheme}.png").stat().st_size > 20_000


def test_buttons_choose_which_maps_are_seen_and_without_a_script_all_are(open_page):
    page = open_page("desktop").page
    maps = page.locator('[data-choose="Coloured"] .panel')
    assert maps.count() == 3 * 2 * 2  # methods, techniques, labels
    seen = lambda: page.locator('[data-choose="Coloured"] .panel:visible').count()  # noqa: E731
    assert seen() == 6
    page.get_by_role("button", name="by organ").click()
    assert seen() == 6
    assert page.locator('[data-choice="by organ"]:visible').count() == 6
    assert page.get_by_role("button", name="by organ").get_attribute("aria-pressed") == "true"
    bare = open_page("desktop", java_script_enabled=False).page
    assert bare.locator('[data-choose="Coloured"] .panel:visible').count() == 12
    assert bare.locator(".choose").count() == 0


def test_on_paper_every_figure_is_whole_and_no_button_is_left(open_page, tmp_path):
    page = open_page("desktop").page
    page.emulate_media(media="print")
    for control in ("nav", ".choose", ".files"):
        assert page.locator(f"{control}:visible").count() == 0, control
    assert page.locator('[data-choose="Coloured"] .panel:visible').count() == 12
    assert set(
        page.evaluate("[...document.querySelectorAll('.panel')].map(one => getComputedStyle(one).breakInside)")
    ) == {"avoid"}
    page.screenshot(
        path=str(tmp_path / "print.png"), clip={"x": 0, "y": 0, "width": 1280, "height": 2400}, full_page=True
    )
    assert (tmp_path / "print.png").stat().st_size > 20_000
    pdf = page.pdf(path=str(tmp_path / "print.pdf"), format="A4")
    assert pdf.count(b"/Type /Page\n") > 4
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0, "folded again after printing"


def test_tables_scroll_in_their_own_box_on_a_phone(open_page):
    page = open_page("phone").page
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(one => [one.scrollWidth > one.clientWidth, "
                          "getComputedStyle(one).overflowX, one.tabIndex])")  # fmt: skip
    assert any(scrolls for scrolls, _, _ in boxes)
    assert {(overflow, tab) for _, overflow, tab in boxes} == {("auto", 0)}
