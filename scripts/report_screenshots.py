r"""Takes the pictures of the report that docs/report.md shows.

    python scripts/report_screenshots.py /tmp/svamp /tmp/cqa --output_dir=docs/images

Makes the report of the given evaluations (as scripts/report.py does) in a temporary folder, opens
it in Chromium without a window, and writes

    report-table.png     the best checkpoints
    report-curves.png    the learning curves
    report-examples.png  the examples that a student has wrong, on a dark ground
    report-phone.png     the top of the page on a phone

Needs Playwright (pip install -e '.[browser]') and Chromium: that on the PATH, else that which
`playwright install chromium` fetched.
"""

import os
import pathlib
import shutil
import tempfile

from absl import app, flags

from distill import configure, report

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "docs/images", "Folder of the pictures.")

WIDE, PHONE = {"width": 1180, "height": 860}, {"width": 390, "height": 780}


def launch(playwright):
    """Returns a running Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    # Chromium's sandbox does not run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=path, args=arguments)


def run(argv):
    from playwright import sync_api

    if len(argv) < 2:
        raise configure.ConfigError("Give the evaluations to show, as to scripts/report.py.")
    made = report.build(argv[1:])
    output = pathlib.Path(_OUTPUT_DIR.value)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as playwright:
        address = pathlib.Path(str(report.write(made, folder))).resolve().as_uri()
        browser = launch(playwright)

        def shoot(name, fragment="", section=None, **options):
            page = browser.new_page(**options)
            page.goto(f"{address}#{fragment}")
            if section:
                page.locator(section).evaluate("node => node.scrollIntoView()")
            page.wait_for_timeout(300)  # curves follow the width of the window
            page.screenshot(path=output / f"report-{name}.png")
            page.close()
            print(output / f"report-{name}.png")

        shoot("table", viewport=WIDE)
        shoot("curves", section="#curves", viewport={"width": 1180, "height": 440})
        dark = {"viewport": WIDE, "color_scheme": "dark"}
        shoot("examples", "show=errors", "#examples", **dark)
        shoot("phone", viewport=PHONE, device_scale_factor=2)
        browser.close()


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
