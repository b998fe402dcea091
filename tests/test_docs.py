"""What the README and docs/ show is what happens: code runs, output is what is printed, links lead somewhere."""

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from pages import ROOT, Block, anchors_of, blocks_of, left_on_terminal, links_of, pages, play, prose_of, stage, words_of

import cylora

DOCS = ROOT / "docs"
REFERENCE = DOCS / "api.md"  # made from the sources: nothing in it is for a reader to run
PAGES = [page for page in pages() if page != REFERENCE]
NAMED = {"example", "install-and-train", "test"}  # the README's, which test_readme.py and .ci/run look for
RUN_BY_CI = {"install-and-train", "test"}
MARKS = NAMED | {"interop", "file", "not run", "output", "terminal", "numbers vary"}
OF_OTHERS = {"LoraFA", "PyMemoryView_FromMemory", "TrainerState"}
WITH_TORCH = {"CyloraAdamW"}  # of cylora.integrations, which needs more than these tests have
LANGUAGES = {"python", "sh", "text", "math", "json", "toml", "cython", "c"}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_left_to_ci(block: Block) -> bool:
    return bool(RUN_BY_CI & block.marks.keys())


def played(page: Path, *, interop: bool) -> list[Block]:
    """Return the blocks of a page that the tests of one stage go through."""
    return [block for block in stage(blocks_of(page), interop=interop) if not is_left_to_ci(block)]


def check_page(page: Path, folder: Path, *, interop: bool) -> None:
    """Go through a page in an empty folder and compare what it prints with the outputs it shows."""
    blocks = played(page, interop=interop)
    folder.mkdir()
    beside = folder.parent / "output"
    beside.mkdir(exist_ok=True)
    printed = dict(zip(blocks, play(blocks, folder), strict=True))
    last = None
    for block in blocks:
        if block.language != "text":
            last = block if block.action in ("python", "sh") else last
            continue
        if command := block.marks.get("output"):
            (got,) = play([Block(page, block.line, "sh", command, {})], beside)
        elif command := block.marks.get("terminal"):
            got = left_on_terminal(command, beside)
        else:
            assert last is not None, f"{block} is the output of nothing"
            got = printed[last]
        view = words_of if "numbers vary" in block.marks else str.strip
        assert view(block.text) == view(got), f"{block} is not what is printed"


with_code = [page for page in PAGES if any(block.action != "read" for block in played(page, interop=False))]
with_extra = [page for page in PAGES if played(page, interop=True)]


@pytest.mark.parametrize("page", with_code, ids=named)
def test_page_does_what_it_shows(page, tmp_path):
    check_page(page, tmp_path / "reader", interop=False)


@pytest.mark.interop
@pytest.mark.parametrize("page", with_extra, ids=named)
def test_page_with_torch_does_what_it_shows(page, tmp_path):
    check_page(page, tmp_path / "reader", interop=True)


def test_every_block_of_code_is_run_in_one_of_the_stages():
    """Counted without the parser, so that a block it does not see is missed here."""
    seen = 0
    for page in PAGES:
        run = {*played(page, interop=False), *played(page, interop=True)}
        blocks = blocks_of(page)
        left = [block for block in blocks if block not in run]
        assert all(is_left_to_ci(block) for block in left), left
        assert not [b for b in run if b.language == "python" and b.action == "read"], "Python is always run"
        seen += sum(block.language in ("python", "sh") for block in blocks)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert seen == len(re.findall(r"^\W*(?:python|py|pycon|sh|bash|shell|console)\b *$", text, re.MULTILINE))
    assert "-m 'interop and not nightly'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_blocks_are_of_known_languages_and_marks():
    """A typo in either would make a block one that nobody runs."""
    for block in (block for page in PAGES for block in blocks_of(page)):
        assert block.language in LANGUAGES, block
        assert block.marks.keys() <= MARKS, block
        assert not NAMED & block.marks.keys() or block.page == ROOT / "README.md", block
        if block.language in ("cython", "c"):
            assert block.action == "file", f"{block} is compiled by nobody"
    text = "".join(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S) for page in PAGES)
    assert len(re.findall("<!--", text)) == len(re.findall(r"^<!-- .* -->$", text, re.MULTILINE))


def test_what_is_not_run_does_nothing_of_ours():
    """Only what installs or takes long; a command of cylora's would be run."""
    for block in (block for page in PAGES for block in blocks_of(page)):
        if "not run" in block.marks:
            assert block.language == "sh", block
            assert not re.search(r"^\s*cylora (?!bench)", block.text, re.MULTILINE), block


@pytest.mark.parametrize("language", ["json", "toml"])
def test_settings_that_are_shown_parse(language):
    parse = {"json": json.loads, "toml": tomllib.loads}[language]
    for block in (block for page in PAGES for block in blocks_of(page) if block.language == language):
        parse(block.text)


def test_equations_survive_markdown():
    """GitHub takes a backslash before punctuation for Markdown's, and an underscore after punctuation for emphasis."""
    seen = 0
    for page in PAGES:
        for math in re.findall(r"\$([^$]+)\$", re.sub(r"`[^`]*`", "", prose_of(page))):
            seen += 1
            assert not re.search(r"\\[^A-Za-z]|[^\w\s]_|\*|^\s|\s$|\n", math), f"{named(page)}: ${math}$"
            assert math.count("{") == math.count("}"), f"{named(page)}: ${math}$"
        for block in blocks_of(page):
            if block.language == "math":
                assert block.text.count("{") == block.text.count("}"), block
                assert re.findall(r"\\begin\{(\w+)\}", block.text) == re.findall(r"\\end\{(\w+)\}", block.text), block
    assert seen > 20


# ------------------------------------------------------------------ that the tests above can fail

FALSE = [
    ("```python\n1 + 1  # -> 3\n```", r"page.md:2 gives \{'2'\}, not '3'"),
    ("```python\nx = [\n    1,\n]\n# -> [1,\n#     2]\n```", r"page.md:2 gives \{'\[1\]'\}, not '\[1, 2\]'"),
    ("```python\nprint('a b')  # -> 'a b'\n```", r"""gives \{'a b'\}, not "'a b'\""""),
    ("```python\nint('a')  # raises ValueError: no\n```", "page.md:2 raises .*invalid literal.* not 'ValueError: no'"),
    ("```python\n1  # raises ValueError: no\n```", "page.md:2 raises nothing, not 'ValueError: no'"),
    ("```python\nfor i in (1,):\n    i  # -> 1\n```", "-> follows an expression or an assignment"),
    ("```python\nif True:\n    1  # -> 1\n    2\n```", "no statement of the block's top level"),
    ("```python\na = 1  # -> 1\n# -> 1\n```", "two claims on one statement"),
    ("```python\nx = 1\n```\n\n```python\n\n1 / 0\n```", 'page.md", line 7, in <module>'),
    ("```python\nimport warnings\nwarnings.warn('old')\n```", "UserWarning: old"),
    ("```python\nimport sys\n_ = sys.stderr.write('careful')\n```", "careful"),
    ("```sh\nfalse | true\n```", "page.md:2: "),
    ("```sh\necho 1\n```\n\n```text\n2\n```", "page.md:6 is not what is printed"),
    ("```python\nprint(1)\n```\n\n<!-- numbers vary -->\n```text\n2 s\n```", "page.md:7 is not what is printed"),
    ("```sh\necho 1\n```\n\n<!-- output: echo 2 -->\n```text\n1\n```", "page.md:7 is not what is printed"),
    ("<!-- terminal: sh -c 'echo 1 >&2' -->\n```text\n2\n```", "page.md:3 is not what is printed"),
    ("```text\n1\n```", "page.md:2 is the output of nothing"),
    ("```python\n1", "page.md:1: a block has no end"),
    ("- ```python\n  1\n  ```\n\n  ```python\n  1\n  ```", "page.md:3: a block begins at the line's beginning"),
]


@pytest.mark.parametrize(("text", "complaint"), FALSE)
def test_page_that_is_wrong_is_found_out(tmp_path, text, complaint):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=complaint):
        check_page(page, tmp_path / "reader", interop=False)


def test_page_that_is_right_is_believed(tmp_path):
    """Files, one namespace, both languages, continued claims, numbers and hashes that vary, other stages' blocks."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: one.py -->\n```python\nvalue = 'a b'\n```\n```python\nimport one\none.value  # -> a b\n"
        "int('a')\n# raises ValueError: invalid literal for int()\n#     with base 10: 'a'\n```\n"
        "```python\nprint(one.value)\n```\n```text\na b\n```\n```sh\necho x@v1-12345678, 1.5e-3 s; echo no >&2\n```\n"
        "<!-- numbers vary -->\n```text\nx@v22-abcdef01, 200 s\n```\n<!-- output: echo 2 -->\n```text\n2\n```\n"
        "<!-- terminal: sh -c 'printf \"9\\n\\033[1A1 |█▃  |\" >&2' -->\n<!-- numbers vary -->\n```text\n2 |▎|\n```\n"
        "<!-- interop -->\n```python\n1 / 0\n```\n",
        encoding="utf-8",
    )
    check_page(page, tmp_path / "reader", interop=False)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_page(page, tmp_path / "other reader", interop=True)


def test_mark_on_the_first_line_is_for_the_whole_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- interop -->\n# Title\n\n```python\n1\n```\n\n```sh\ntrue\n```\n", encoding="utf-8")
    assert played(page, interop=False) == []
    assert [block.line for block in played(page, interop=True)] == [5, 9]


def test_anchors_and_links_are_found_as_github_does(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b.c_d` and [e](f.md): g!\n## Twice\n## Twice\n```sh\n# no heading\n```\n"
        "[x](#twice) `[y](z)` [`v`](w.md#u), [`t`](s.md)\n[out](https://example.org/a#b)\n",
        encoding="utf-8",
    )
    assert anchors_of(page) == {"a-bc_d-and-e-g", "twice", "twice-1"}
    assert links_of(page) == [
        ((tmp_path / "f.md").resolve(), ""),
        (page, "twice"),
        ((tmp_path / "w.md").resolve(), "u"),
        ((tmp_path / "s.md").resolve(), ""),
    ]


# ------------------------------------------------------------------ what the text names


@pytest.mark.parametrize("page", [*PAGES, REFERENCE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=named)
def test_links_inside_the_repository_lead_somewhere(page):
    for path, anchor in links_of(page):
        assert path.exists(), f"{named(page)} links to {path}"
        assert path.is_relative_to(ROOT), f"{named(page)} links to {path}"
        if anchor:
            assert anchor in anchors_of(path), f"{named(page)} links to {path}#{anchor}"


def test_every_page_is_in_the_table_of_contents():
    contents = {path for path, _ in links_of(DOCS / "README.md")}
    assert contents >= {*DOCS.rglob("*.md")} - {DOCS / "README.md"}
    assert DOCS / "README.md" in {path for path, _ in links_of(ROOT / "README.md")}


def test_commands_in_the_text_have_their_options(run):
    """Also those in tables and sentences, which nothing runs."""
    helps: dict[str, str] = {}
    seen = 0
    commands = re.compile(r"\bcylora ((?:train|bench|info|inspect|verify|export|plot)\b[^`\n|]*)")
    for page in PAGES:
        for line in commands.findall(page.read_text(encoding="utf-8")):
            command = line.split()[0]
            if command not in helps:
                helps[command] = run(command, "--help").out
            for option in re.findall(r"--[a-z][a-z-]*[a-z]", line):
                seen += 1
                assert re.search(rf"{re.escape(option)}(?![\w-])", helps[command]), f"{named(page)}: {line}"
    assert seen > 5


def test_names_in_the_text_exist():
    seen = 0
    for page in PAGES:
        for dotted in re.findall(r"`(cylora(?:\.\w+)+)", prose_of(page)):
            if not dotted.startswith("cylora.integrations"):  # which needs more than these tests have
                seen += 1
                assert exists(dotted), f"{named(page)} names {dotted}"
        for name in re.findall(r"`([A-Z][a-z]+[A-Z]\w+)", prose_of(page)):
            seen += 1
            places = ("cylora", "cylora.formats", "cylora.serving", "cylora.tasks.protocol", "cylora.trackers")
            is_known = name in OF_OTHERS | WITH_TORCH or any(exists(f"{place}.{name}") for place in places)
            assert is_known, f"{named(page)}: {name}"
        for path in re.findall(r"(?<![\w/])((?:bench|tests|src)/[\w/]+\.\w+)", prose_of(page)):
            assert (ROOT / path).exists(), f"{named(page)} names {path}"
    assert seen > 20


def exists(dotted: str) -> bool:
    names = dotted.split(".")
    for cut in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:cut]))
        except ModuleNotFoundError:
            continue
        for name in names[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


# ------------------------------------------------------------------ the reference


@pytest.fixture(scope="module")
def generate_api():
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_reference_is_what_the_sources_say(generate_api):
    """After a change of a signature or a docstring: python docs/generate_api.py."""
    assert REFERENCE.read_text(encoding="utf-8") == generate_api.reference()


def test_reference_leaves_out_what_is_internal_and_still_there(generate_api):
    """A name that is gone from the package must go from the list too: it may come back as something public."""
    text = REFERENCE.read_text(encoding="utf-8")
    for owner, names in generate_api.INTERNAL.items():
        for name in names:
            assert callable(getattr(getattr(cylora, owner), name))
            assert f"`{owner}.{name}`" not in text
    assert "run_step" not in text  # of the compiled class that Adam inherits from
