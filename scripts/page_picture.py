"""Open a page in headless Chromium and write a picture of it once its script is done.

python scripts/page_picture.py "http://127.0.0.1:8000/?prompt=एक चूहा&temperature=0.7&run=1" page.png
python scripts/page_picture.py "http://127.0.0.1:8000/?prompt=a mouse&run=1" page.png --height 700
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mooshak.command_line import command_parser
from mooshak.errors import command, require
from mooshak.files import write_atomically

CHROMIUM = shutil.which("chromium")


@command
def main() -> None:
    parser = command_parser("scripts/page_picture.py", __doc__, "URL FILE [--width N] [--height N]")
    parser.add_argument("url", metavar="URL", help="page whose body gets the attribute data-done")
    parser.add_argument("file", metavar="FILE", type=Path, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1100, metavar="N", help="pixels")
    parser.add_argument("--height", type=int, default=860, metavar="N", help="pixels")
    args = parser.parse_args()
    url = quote(args.url, safe=":/?&=%#")
    with tempfile.TemporaryDirectory() as profile, open_page(url, Path(profile)) as page:
        write_atomically(args.file, page.picture(args.width, args.height))


@dataclass
class Page:
    """An open page."""

    call: Callable[..., Any]
    """Call a method of the DevTools protocol."""

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        options = {"expression": expression, "returnByValue": True}
        return self.call("Runtime.evaluate", **options)["result"].get("value")

    def picture(self, width: int, height: int) -> bytes:
        """Return a PNG of the page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    """Open a page; yield it once its script sets `data-done`.

    Chromium's DevTools protocol by its pipes, files 3 and 4 of its process: JSON ended by a zero.
    `--dump-dom` does not wait for streams.
    """
    require(CHROMIUM is not None, "chromium is not installed")
    (its_input, to), (back, its_output) = os.pipe(), os.pipe()
    words = f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe"
    words += f" --user-data-dir={profile} 3<&{its_input} 4>&{its_output}"
    process = subprocess.Popen(
        ["bash", "-c", words], pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
    )
    os.close(its_input)
    os.close(its_output)
    numbers = itertools.count(1)
    with open(to, "wb", buffering=0) as writer, open(back, "rb") as reader:

        def call(method: str, session: str | None = None, **params: Any) -> Any:
            message = {"id": next(numbers), "method": method, "params": params}
            message |= {"sessionId": session} if session else {}
            writer.write(json.dumps(message).encode() + b"\0")
            while True:
                data = b""
                while not data.endswith(b"\0"):
                    data += (letter := reader.read(1))
                    assert letter, "Chromium has ended"
                if (found := json.loads(data[:-1])).get("id") == message["id"]:
                    return found["result"]

        try:
            target = call("Target.createTarget", url=url)["targetId"]
            session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            opened = Page(partial(call, session=session))
            end = time.monotonic() + 30
            while opened.evaluate("document.body?.dataset.done") != "true":
                require(time.monotonic() < end, f"{url} is not done after 30 seconds")
                time.sleep(0.05)
            yield opened
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
