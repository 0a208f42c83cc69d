"""The report in headless Chromium: no errors, nothing fetched, nothing too wide, every image, the slider, paper.

One browser for all tests; skipped where Chromium, its driver or selenium are missing.
"""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_runs
from report_runs import NAUGHTY, make_run

from stylegan_rooted import report, watch
from stylegan_rooted.report import Wanted
from torch_utils import images
from training.config import MetricConfig

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra `dev`)")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--mute-audio", "--no-default-browser-check"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser without a network of its own; it ends with the module."""
    driver = shutil.which("chromedriver")
    binary = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if driver is None or binary is None:
        pytest.skip("Chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        started.set_page_load_timeout(30)
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of one run, and of two runs and a network, with hostile words in all that a user can name."""
    place = tmp_path_factory.mktemp("browser")
    data = report_runs.save_data(place / "data")
    (data / "0.png").rename(data / "<script>alert(1)<%2fscript> & \"'.png")
    (data / "dataset.json").write_text('{"labels": null}')
    report_runs.save_features(place / "features.npz")
    run = make_run(place / "00000-<b>&amp;", data=data, augment__aug="ada", runtime__desc=NAUGHTY)
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()[:-1]]
    report_runs.write_lines(run / "stats.jsonl", rows)
    environment = json.loads((run / "environment.json").read_text())
    environment["resume"]["path"] = f"/x/{NAUGHTY}"
    environment["command"] = ["stylegan-rooted", NAUGHTY]
    (run / "environment.json").write_text(json.dumps(environment))
    report_runs.write_lines(run / "history.jsonl", [{"event": NAUGHTY, "reason": NAUGHTY, "nimg": 0, "timestamp": 0}])
    other = make_run(place / ("00001-" + "long" * 40), data=data, values=(9.0, 8.0))
    network = report_runs.save_network(place / "a.pkl", 1)
    metric = MetricConfig(num=14, detector_file=str(place / "features.npz"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEGAN_ROOTED_CACHE", str(place / "cache"))
        config = Wanted(data=data, metric_config=metric, device="cpu", title=NAUGHTY, credits=[NAUGHTY])
        report.write(place / "one", [run], config)
        report.write(place / "many", [run, other, network], config)
    return {name: place / name / "report.html" for name in ("one", "many")}


def open_page(browser: Any, path: Path, width: int = 800) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_is_wider_than_the_page_and_every_image_loads(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    open_page(browser, pages[name], width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"
    )
    assert wide == []
    images = browser.execute_script("return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt])")
    assert len(images) > 6 and all(loaded and alt for loaded, alt in images)


@pytest.mark.parametrize("name", ["one", "many"])
def test_no_errors_nothing_fetched_and_hostile_words_are_text(browser: Any, pages: dict[str, Path], name: str) -> None:
    open_page(browser, pages[name])
    assert browser.execute_script("return document.querySelectorAll('main script, main b, main iframe').length") == 0
    assert browser.execute_script("return document.body.innerText").count("onerror=alert(1)") >= 3
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.get_log("browser") == []
    # and the policy of the page would not have let anything else in
    blocked = browser.execute_async_script(
        "const done = arguments[0]; const i = new Image(); i.onerror = () => done(true); i.onload = () => done(false);"
        "i.src = 'http://127.0.0.1:9/x.png';"
    )
    assert blocked and any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_slider_is_worked_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["one"])
    slider = browser.find_element("css selector", "[data-stages] input")

    def shown() -> tuple[list[str], str, str]:
        return browser.execute_script(
            "const box = document.querySelector('[data-stages]');"
            "return [[...box.querySelectorAll('img')].filter(i => i.offsetHeight > 0).map(i => i.dataset.label),"
            " box.querySelector('output').textContent, box.querySelector('input').getAttribute('aria-valuetext')]"
        )

    assert shown() == [["after 4 kimg"], "after 4 kimg", "after 4 kimg"]
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown() == [["after 2 kimg"], "after 2 kimg", "after 2 kimg"]
    slider.send_keys(Keys.HOME)
    assert shown() == [["at the start"], "at the start", "at the start"]
    slider.send_keys(Keys.END)
    assert shown()[0] == ["after 4 kimg"]
    label = browser.execute_script("return document.querySelector('[data-stages] input').labels[0].textContent")
    assert label.startswith("Shown:")
    summary = browser.find_element("css selector", ".chart summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('.chart details').open")


def test_without_scripts_the_last_grid_is_shown(browser: Any, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, pages["one"])
        slider = browser.find_element("css selector", "[data-stages] .control")
        frames = browser.find_elements("css selector", "[data-stages] img")
        assert not slider.is_displayed() and [f.is_displayed() for f in frames] == [False, False, True]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_live_page_follows_the_run_and_keeps_what_the_reader_chose(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-live", history=("started",))
    server = watch.serve(watch.Watched(run, refresh_sec=0), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        browser.get_log("browser")
        browser.get(server.url)
        slider = browser.find_element("css selector", "[data-stages] input")
        slider.send_keys(Keys.ARROW_LEFT)
        browser.find_element("css selector", "#s0-1-table summary").click()
        report_runs.write_lines(run / "metric-fd.jsonl", [report_runs.metric_row("fd", 4.0, 1.234)])
        images.save_grid(run / "fakes000006.png", report_runs.tiles(40, 9), (8, 5))
        WebDriverWait(browser, 15, 0.05).until(lambda b: "1.234" in b.find_element("tag name", "body").text)
        shown = browser.execute_script("return document.querySelector('[data-stages] output').textContent")
        assert shown == "after 2 kimg"
        assert browser.execute_script("return document.querySelector('#s0-1-table').open")
        assert browser.execute_script("return document.querySelectorAll('[data-stages] img').length") == 4
        assert browser.get_log("browser") == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    WebDriverWait(browser, 15, 0.05).until(lambda b: "no longer changes" in b.find_element("id", "news").text)
    browser.get("about:blank")


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["one"])
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    document = base64.b64decode(printed["data"])
    assert document.startswith(b"%PDF-") and document.count(b"/Type /Page\n") >= 2


def test_words_can_be_told_from_their_ground_in_light_and_dark(browser: Any, pages: dict[str, Path]) -> None:
    script = """
    const number = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(
        v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (c !== 'rgba(0, 0, 0, 0)') { return c; } } return 'rgb(255, 255, 255)'; };
    const words = 'p, strong, td, th, h1, h2, h3, a, summary, li, figcaption, .soft, .mark';
    return [...document.querySelectorAll(words)].map(e => {
        const [a, b] = [number(getComputedStyle(e).color), number(ground(e))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 120)]; }).filter(x => x[0] < 4.5);
    """
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        open_page(browser, pages["one"])
        assert browser.execute_script(script) == [], scheme  # WCAG 2, level AA
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
