"""The report: its tables are what the records give, and its page needs nothing beside it."""

import os
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench import figures, records, report, tables
from bench.__main__ import _parser, main
from bench.errors import BadRecord
from bench.page import page
from tests.bench import documents as bench_documents

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the path")


@pytest.fixture
def results(tmp_path):
    """A folder like bench/results, with an older document beside the folders of the devices."""
    folder = tmp_path / "results"
    documents = [bench_documents.mining(), bench_documents.mining("1536-hd", scale=4.2), bench_documents.picture()]
    for document in [*documents, bench_documents.mining("768", "bfloat16", "cuda", 1e-3)]:
        name = document["cases"][0]["name"].replace("/", "-")
        records.write(folder / records.device_name(document) / f"{name}.json", document)
    (folder / "mining-768-float32-cpu.json").write_text('{"name": "of an older schema"}')
    return folder


# ---- tables


def test_the_documents_are_what_the_records_give(capsys):
    """`python -m bench report --readme` mends them."""
    for path in report.DOCUMENTS:
        assert report.differences(path.read_text(encoding="utf-8"), figures.records_by_device()) == []
    assert main(["report", "--check"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_commands_of_the_records_can_be_run_today():
    """Readers copy the commands from docs/benchmarks.md."""
    commands = {
        document["command"]
        for cases in figures.records_by_device().values()
        for document in cases.values()
        if document.get("command")
    }
    assert commands
    for command in commands:
        program, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
        assert program == ["python", "-m", "bench"]
        _parser().parse_args(arguments)


def test_check_says_what_differs_and_how_to_mend_it(tmp_path, monkeypatch, capsys):
    copies = {tmp_path / path.name: path.read_text(encoding="utf-8") for path in report.DOCUMENTS}
    for copy, text in copies.items():
        changed = text.replace("<!-- bench:patch_mining -->\n", "<!-- bench:patch_mining -->\n41 times\n", 1)
        copy.write_text(changed.replace("**Measured on a CPU.", "**Measured on a GPU.", 1), encoding="utf-8")
    monkeypatch.setattr(report, "DOCUMENTS", tuple(copies))
    assert main(["report", "--check"]) == 1
    err = capsys.readouterr().err
    for name, table in (("README.md", "status"), ("benchmarks.md", "patch_mining")):
        told = f"{name}: the table {table!r} is not what bench/results gives: run `python -m bench report --readme`"
        assert told in err
    assert err.count("is not what") == 2
    assert main(["report", "--readme"]) == 0
    assert {copy: copy.read_text(encoding="utf-8") for copy in copies} == copies
    assert main(["report", "--check"]) == 0


@pytest.mark.parametrize(
    "text, said", [("no markers", "no marker"), ("<!-- bench:mine -->\n<!-- /bench -->", "a table called 'mine'")]
)
def test_a_readme_without_its_markers(text, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(report, "DOCUMENTS", (tmp_path / "README.md",))
    assert main(["report", "--readme"]) == 2
    assert said in capsys.readouterr().err


def test_nothing_but_the_tables_changes(results):
    text = "before\n\n<!-- bench:patch_mining -->\nold\n<!-- /bench -->\nbetween | with \\1 and $1\n"
    text += "<!-- bench:picture -->\n<!-- /bench -->\nafter"
    filled = report.fill(text, figures.records_by_device(results))
    assert filled.startswith("before\n\n<!-- bench:patch_mining -->\n| patch info mining by |")
    assert filled.endswith("<!-- /bench -->\nafter")
    assert (
        "<!-- /bench -->\nbetween | with \\1 and $1\n<!-- bench:picture -->\n| one picture" in filled
        and "old" not in filled
    )
    assert report.fill(filled, figures.records_by_device(results)) == filled


def cells(table, first):
    line = next(line for line in table.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_mining_table(results):
    table = tables.mining_table(figures.records_by_device(results))
    assert cells(table, "patch info mining by") == ["CPU, 768-b1-float32", "CPU, 1536-hd-b1-float32"] + [
        "nvidia-h200, 768-b1-bfloat16",
        "nvidia-h200, 1536-hd-b1-bfloat16",
    ]
    assert cells(table, "`reference`") == ["4.20 s, 1508 MiB", "17.6 s, 6334 MiB", "4.20 ms, 2 MiB", "not measured yet"]
    assert cells(table, "`torch`")[0] == "114 ms, 41 MiB (36.8 times)"
    # A slower or wrong provider stands there like the rest; one that cannot run does not.
    assert cells(table, "reference, SDPA")[0] == "4.70 s, 1720 MiB (slower: 0.89 times)"
    assert cells(table, "reference, compiled")[0].startswith("FAIL: wrong result: error 1e-2 / expected")
    assert "max-autotune" not in table and "triton" not in table
    told = " ".join(table.split())
    assert (
        "`patch_mining/768-b1-float32`: AMD EPYC avx2, 2 threads, 23.5 GiB of memory, torch 2.11.0, 2026-11-22, "
        "commit 0123456789ab, 7 turns" in told
    )
    assert "NVIDIA H200, driver 580.95, clocks 1980 MHz" in told and "load 0.4" in told
    assert "`python -m bench run patch_mining/768-b1-float32 --save`" in told
    assert "On a GPU: not measured yet" not in told


def test_picture_table(results):
    table = tables.picture_table(figures.records_by_device(results))
    # The columns are 768 in float32, HD, and 768 in bfloat16 on a CPU; then 768 and HD on a GPU.
    assert cells(table, "preprocess") == ["75.4 ms", "106 ms", *["not measured yet"] * 8]
    assert cells(table, "**patch info mining**")[:2] == ["5.59 s", "180 ms"]
    assert cells(table, "**all of it**")[:3] == [
        "**16.7 s, 1742 MiB**",
        "**8.05 s, 239 MiB (2.1 times)**",
        "not measured yet",
    ]


def test_nothing_recorded():
    for table in (tables.picture_table, tables.mining_table):
        made = table({})
        rows = [line for line in made.splitlines()[2:] if line.startswith("|")]
        assert rows and all(
            {cell.strip() for cell in line.strip("|").split("|")[1:]} == {"not measured yet"} for line in rows
        )
        assert "On a GPU: not measured yet." in " ".join(made.split())


def test_predictions():
    table = tables.predicted_table({})
    mining = cells(table, "patch info mining, 1536-hd")
    assert mining[0].startswith("2,181 GFLOP, 23,768 MB, 41 launches, 3,417 MiB") and mining[1] == mining[2]
    assert len(cells(table, "picture to tokens, 768")) == 3


def test_a_graph_is_told_beside_the_eager_time():
    row = bench_documents.row(
        "patch_mining/x", "torch", True, None, 1.5, 20.0, 3.0, graphed_ms=0.5, speedup_graphed=2.0
    )
    assert figures.figure(row) == "1.50 ms, 20 MiB (3.0 times; as CUDA graphs 0.50 ms, 2.0 times)"


def test_what_a_figure_must_not_be_read_without():
    row = bench_documents.row(
        "patch_mining/x", "torch", None, "accuracy unknown: out of memory", 1500.0, None, 3.0, halves_differ=0.3
    )
    assert (
        figures.figure(row)
        == "1.50 s (3.0 times; accuracy unknown: out of memory; unsteady: halves of the turns differ by 30%)"
    )


def test_a_busy_machine_is_told():
    document = bench_documents.document(
        [bench_documents.row("patch_mining/768-b1-float32", "reference", others=0.4, left_out=2)]
    )
    found = {"cpu": {"patch_mining/768-b1-float32": document}}
    told = " ".join(tables.mining_table(found).split())
    assert "7 turns, 2 disturbed ones left out, BUSY: other processes took 40% of the machine in every turn" in told
    assert "BUSY: other processes took 40%" in page(found)


def test_a_record_of_no_benchmark(results):
    (results / "cpu" / "odd.json").write_text("{}")
    with pytest.raises(BadRecord, match="odd.json"):
        figures.records_by_device(results)


def test_cases_are_in_the_registrys_order(results):
    document = bench_documents.document([bench_documents.row("gone/768", "reference")])
    records.write(results / "cpu" / "a.json", document)
    found = figures.records_by_device(results)
    assert list(found) == ["cpu", "nvidia-h200"]
    assert list(found["cpu"]) == [
        "patch_mining/768-b1-float32",
        "patch_mining/1536-hd-b1-float32",
        "picture/768-b1-float32",
        "gone/768",
    ]


# ---- the page


class Resources(HTMLParser):
    """The addresses that a page asks for, and its elements."""

    def __init__(self):
        super().__init__()
        self.asked, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset", "poster")]


PAGES = {
    "nothing": lambda results: {},
    "a CPU": lambda results: {"cpu": figures.records_by_device(results)["cpu"]},
    "both": figures.records_by_device,
}
pages = pytest.mark.parametrize("name", PAGES)


@pages
def test_page_stands_alone(name, results):
    html = page(PAGES[name](results))
    parser = Resources()
    parser.feed(html)
    # The page names an icon of its own; otherwise browsers ask the server for one.
    assert parser.asked == ["data:,"] and not {"script", "iframe", "img", "object"} & set(parser.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == parser.tags.count("svg") > 20
    for picture in pictures:
        for element in ElementTree.fromstring(picture).iter():
            numbers = [
                value
                for key, value in element.attrib.items()
                if key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")
            ]
            assert all(re.fullmatch(r"-?\d+(\.\d+)?%?", number) for number in numbers), (element.tag, element.attrib)
            percents = [float(number[:-1]) for number in numbers if number.endswith("%")]
            assert all(-0.01 <= percent <= 100.5 for percent in percents), element.attrib
    assert "predicted, not measured" in html and "floor from shapes, not measured" in html


def test_page_says_what_is_slower_and_what_failed(results):
    html = page(figures.records_by_device(results))
    assert "0.89x slower" in html and re.search(r'class="fail">FAIL</span> wrong result: error 1e-2 \| expected', html)
    assert "conditions, and 2 that did not run" in html and "not here: mode max-autotune is for GPUs" in html
    # A wrong result has no bar.
    assert html.count("<title>reference, compiled:") == 0 and html.count("<title>torch: 36.80x") == 3


def test_page_escapes_what_records_say(results):
    document = bench_documents.document(
        [bench_documents.row("mining/<b>", "<i>", False, "a < b & <script>")], cpu="<u>"
    )
    html = page({"cpu": {"mining/<b>": document}})
    assert (
        "<script>" not in html and "<i>" not in html and "<u>" not in html and "a &lt; b &amp; &lt;script&gt;" in html
    )


def test_page_of_no_data_says_so():
    html = page({})
    assert html.count("not measured yet") >= 4 and "nan" not in html.lower().replace("nanum", "")


def contrast(one, other):
    """The contrast of two colours as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(scheme):
    html = page({})
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    )
    colours = light if scheme == "light" else dark
    assert set(light) == set(dark) and light != dark
    of_text, of_shapes = ("text", "quiet", "slower", "fail", "ours"), ("plain", "third")
    for least, names in ((4.5, of_text), (3, of_shapes)):
        for name in names:
            assert contrast(colours[name], colours["page"]) >= least, name


def test_html_is_written(tmp_path, capsys):
    assert main(["report", "--html", str(tmp_path / "new" / "report.html")]) == 0
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# ---- in a browser

# A frame as wide as a phone, since headless windows are not narrower than 500 pixels.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="page" src="report.html" style="border:0;width:{width}px;height:{height}px"></iframe>"""


def browse(folder, file, *options):
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    words += [
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        (folder / file).as_uri(),
    ]
    # There is no such proxy: a request that would leave this machine fails, and the browser logs it.
    words.insert(1, "--proxy-server=127.0.0.1:9")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@needs_browser
@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_drawn_in_a_browser(scheme, width, results, tmp_path):
    (tmp_path / "report.html").write_text(page(figures.records_by_device(results)), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, height=3000))
    done = browse(
        tmp_path,
        "frame.html",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--window-size={max(width, 500)},3000",
        f"--screenshot={tmp_path / 'page.png'}",
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(tmp_path / "page.png") as picture:
        shown = picture.convert("RGB").crop((0, 0, width, 3000))
    colours = {"light": ((255, 255, 255), (11, 99, 197)), "dark": ((20, 24, 29), (108, 178, 255))}[scheme]
    counted = {colour: count for count, colour in shown.getcolors(shown.width * shown.height)}
    assert shown.getpixel((2, 2)) == colours[0] and counted[colours[0]] > 0.6 * shown.width * shown.height
    # There are bars, in the blue of this scheme.
    assert counted.get(colours[1], 0) > 1000
    # Something is drawn everywhere down the page.
    for top in range(0, 3000, 500):
        assert len(shown.crop((0, top, width, top + 500)).getcolors(width * 500)) > 5


PROBE = """<script>
  onload = () => document.title =
    [document.documentElement.scrollWidth, innerWidth, performance.getEntriesByType("resource").length].join()
</script>"""
READ = """<script>
  onload = () => setTimeout(() => document.title = document.getElementById("page").contentDocument.title, 50)
</script>"""


@needs_browser
@pytest.mark.parametrize("added, resources", [("", 0), ('<img src="http://localhost:9/picture.png">', 1)])
def test_nothing_is_asked_for_and_nothing_runs_over(added, resources, results, tmp_path):
    """The page is as wide as its window, on a phone too, and the browser's list of loaded resources stays empty."""
    html = page(figures.records_by_device(results)).replace("</body>", f"{added}{PROBE}</body>")
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=390, height=800) + READ)
    done = browse(tmp_path, "frame.html", "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom")
    width, window, asked = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", done.stdout).groups())
    assert window == 390 and width <= 390 and asked == resources
