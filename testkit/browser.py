"""Open a page in a headless browser to run a script in it, read console messages, take screenshots, or print it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
DARK = "--blink-settings=preferredColorScheme=0"
TIMEOUT_S = 120
MIN_WINDOW = 500
"""Minimum width in px of the window of a headless browser; narrower pages are opened in a frame."""
PROBE = """<script>(async () => {
  const done = value => {
    const out = parent.document.createElement('pre'), text = unescape(encodeURIComponent(JSON.stringify(value)));
    out.textContent = 'PROBE' + btoa(text) + 'END';
    parent.document.body.appendChild(out);
  };
  for (let i = 0; i < 400 && !document.body.dataset.ready; i++) await new Promise(r => setTimeout(r, 25));
  try { SCRIPT } catch (error) { done({error: String(error.stack || error)}); }
})();</script>"""


def find_browser() -> str | None:
    """Return the path of an installed Chromium browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """Result of a script in a page."""

    result: Any
    """Value that the script passed to ``done``, or ``{"error": traceback}`` if it threw an error."""
    console: list[str]
    """Messages of the console and uncaught errors."""


def run_script(browser: str, page: Path, script: str, *, dark: bool = False, width: int = 1100) -> Opened:
    """Open a page and run a script in it when the page is ready.

    Parameters
    ----------
    browser
        Path of the browser.
    page
        An HTML file that sets ``document.body.dataset.ready``.
    script
        Body of an async function that calls ``done(value)``; the value must be JSON.
    dark
        Whether the system prefers a dark theme.
    width
        Width of the viewport in px.

    Raises
    ------
    AssertionError
        The script neither called ``done`` nor threw an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        text = page.read_text(encoding="utf-8").replace("</body>", PROBE.replace("SCRIPT", script) + "</body>")
        if width < MIN_WINDOW:
            frame = f'style="width:{width}px;height:1400px;border:0" srcdoc="{html.escape(text)}"'
            text = f'<!doctype html><meta name="color-scheme" content="light dark"><iframe {frame}></iframe>'
        copy.write_text(text, encoding="utf-8")
        size = f"--window-size={max(width, MIN_WINDOW)},1400"
        dump = _run(browser, [size, "--dump-dom", *([DARK] if dark else []), copy.as_uri()])
    found = re.search(r"PROBE([A-Za-z0-9+/=]+)END</pre>", dump.stdout)
    console = [line for line in dump.stderr.splitlines() if ":CONSOLE" in line]
    if found is None:
        raise AssertionError(f"the script did not finish; console: {console}; stderr: {dump.stderr[-500:]}")
    return Opened(json.loads(base64.b64decode(html.unescape(found.group(1)))), console)


def screenshot(
    browser: str, page: Path, out: Path, *, dark: bool = False, size: tuple[int, int] = (1100, 1400)
) -> None:
    """Write a PNG of the page, ``size`` (width, height) px, to ``out``."""
    window = f"--window-size={size[0]},{size[1]}"
    _run(browser, [window, f"--screenshot={out}", *([DARK] if dark else []), page.as_uri()])


def print_pdf(browser: str, page: Path, out: Path, *, dark: bool = False) -> None:
    """Print the page to the PDF ``out``."""
    _run(browser, ["--no-pdf-header-footer", f"--print-to-pdf={out}", *([DARK] if dark else []), page.as_uri()])


def _run(browser: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *fixed, f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
