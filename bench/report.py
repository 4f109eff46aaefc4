"""`python -m bench.report`: the committed CSVs become the README's tables, `results/<device>.md` and a chart each.

`--check` writes nothing, and fails if any of them is not what the CSVs say.
"""

import argparse
import sys
from pathlib import Path

from . import chart, results, tables
from .machine import ROOT

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def section(folder: Path) -> str:
    """What belongs between the README's markers: of each machine one record whole, and a line of every other.

    Whole is the fullest record of the sources as they are; where there is none, the fullest.
    """
    records = sorted(((results.load(path), path.stem) for path in sorted(folder.glob("*.csv"))),
                     key=lambda each: (any(map(results.is_old, each[0])), -len(each[0])))
    if not records:
        return "No measurements are recorded yet."
    parts, machines = [tables.LEGEND], set()
    for rows, name in records:
        known = rows[0]["machine"] in machines
        parts.append((tables.readme_line if known else tables.readme_section)(rows, name))
        machines.add(rows[0]["machine"])
    return "\n\n".join(parts)


def with_section(readme: str, text: str) -> str:
    """`readme` with `text` between the markers. ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def texts(readme: Path, folder: Path) -> dict[Path, str]:
    """Every text file of the report, as it must be."""
    pages = {path.with_suffix(".md"): tables.full_page(results.load(path), path.stem)
             for path in sorted(folder.glob("*.csv"))}
    return {readme: with_section(readme.read_text(encoding="utf-8"), section(folder)), **pages}


def stale(readme: Path, folder: Path) -> list[Path]:
    """The files that are not what the CSVs say."""
    old = [path for path, text in texts(readme, folder).items()
           if not path.exists() or path.read_text(encoding="utf-8") != text]
    return old + [path.with_suffix(".png") for path in sorted(folder.glob("*.csv"))
                  if chart.drawn_from(path.with_suffix(".png")) != chart.digest(path)]


def write(readme: Path, folder: Path) -> None:
    for path, text in texts(readme, folder).items():
        path.write_text(text, encoding="utf-8")
    for path in sorted(folder.glob("*.csv")):
        chart.draw(results.load(path), path, path.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true",
                        help="write nothing; fail if README, pages or charts are not what the CSVs say")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.readme, options.results)
        return 0
    old = stale(options.readme, options.results)
    for path in old:
        print(f"{path} is not what {options.results}/*.csv says: run python -m bench.report", file=sys.stderr)
    return bool(old)


if __name__ == "__main__":
    sys.exit(main())
