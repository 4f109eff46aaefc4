"""The README's compatibility table, from the tests' `compatibility` marks: `python -m tests.frameworks.table` writes it."""

import importlib
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent.parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- compatibility:begin -->\n", "<!-- compatibility:end -->"


def rows() -> list[tuple[str, str, str, str]]:
    """(what, tested with, outcome, note) of every marked test, in the order of the files."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py"), key=lambda path: (path.parent != TESTS, path)):
        if "mark.compatibility(" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(".".join(("tests", *path.relative_to(TESTS).with_suffix("").parts)))
            marks = (mark for test in vars(module).values() for mark in getattr(test, "pytestmark", ()))
            for what, package, outcome, *note in (mark.args for mark in marks if mark.name == "compatibility"):
                found.append((what, f"{package} {version(package).partition('+')[0]}", outcome, "".join(note)))
    return found


def table() -> str:
    lines = [("framework or feature", "tested with", "outcome", "note"), ("---",) * 4, *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(readme: str) -> str:
    """`readme` with today's table between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN.strip()} ... {END}")
    return f"{before}{begin}{table()}{end}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
