"""A headless Chromium for tests."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SCREENSHOTS = os.environ.get("GPTLIT_SCREENSHOTS")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",  # which is small in containers; the renderer dies when it is full
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)


@contextmanager
def chromium(profile: Path, patience: float) -> Iterator[Any]:
    """Start Chromium with a fresh profile; yields selenium's driver, which waits `patience` seconds for a page."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(patience)
    driver.set_script_timeout(patience)
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int, dark: bool = False) -> None:
    """Give the page a size and a colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def keep_screenshot(driver: Any, name: str) -> None:
    """Keep a small picture of the page, when GPTLIT_SCREENSHOTS names a folder for it."""
    if not SCREENSHOTS:
        return
    from PIL import Image

    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    if image.width > 1000:
        image = image.resize((1000, round(1000 * image.height / image.width)), Image.Resampling.LANCZOS)
    Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
    palette = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)
