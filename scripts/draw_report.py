"""A picture of a report for the documentation: its answers and its curves, in headless Chromium, 256 colours.

Usage: python scripts/draw_report.py REPORT.html OUT.png

Needs Chromium, chromedriver and selenium. What names paths ("What was trained", "How", places of networks) is left
out, and all that follows six curves.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTH = 1000
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
LEAVE_OUT = """
for (const heading of document.querySelectorAll("[id$=-trained], [id$=-how], #compare")) {
  const level = heading.tagName;
  while (heading.nextElementSibling && heading.nextElementSibling.tagName != level) heading.nextElementSibling.remove();
  heading.remove();
}
for (const heading of [...document.querySelectorAll("article > h2")].filter((h) => /^s[0-9]+$/.test(h.id))) {
  while (heading.nextElementSibling && heading.nextElementSibling.tagName != "H3") heading.nextElementSibling.remove();
  heading.remove();
}
const charts = document.querySelectorAll("figure.chart");
return Math.ceil(charts[Math.min(5, charts.length - 1)].getBoundingClientRect().bottom + window.scrollY) + 16;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    for switch in SWITCHES:
        options.add_argument(switch)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.set_window_size(WIDTH, 1000)
        browser.get(args.report.resolve().as_uri())
        height = browser.execute_script(LEAVE_OUT)
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        drawn = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    finally:
        browser.quit()
    drawn.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {drawn.width} x {drawn.height}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
