"""Recorded rows: `bench/results/<device>.csv`, every row with the stamp of its own measurement."""

import csv
from dataclasses import asdict, fields
from pathlib import Path

from .machine import device_name, sources_digest, stamp
from .timing import Row

FOLDER = Path(__file__).with_name("results")
_KEY = ("pass_name", "set_name", "contender")
STAMP = ("device", "machine", "isa", "threads", "torch", "triton", "compiler", "commit", "sources", "date")
COLUMNS = (*(field.name for field in fields(Row)), *STAMP)
_NUMBERS = {field.name for field in fields(Row)} - set(_KEY)


def record(rows: list[Row], device_type: str, folder: Path = FOLDER) -> Path:
    """Write the rows of a case, in place of its earlier ones; other cases keep what they have."""
    path = folder / f"{device_name(device_type)}.csv"
    own_stamp = stamp(device_type)
    new = [{**asdict(row), **own_stamp} for row in rows]
    cases = {(row["pass_name"], row["set_name"]) for row in new}
    kept = [row for row in (load(path) if path.exists() else []) if (row["pass_name"], row["set_name"]) not in cases]
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted(kept + new, key=lambda row: (row["pass_name"], row["set_name"])):
            writer.writerow({key: _text(row[key]) for key in COLUMNS})
    return path


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def load(path: Path) -> list[dict]:
    """Rows as dictionaries, numbers as numbers, blanks as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str):
    if key not in _NUMBERS:
        return text
    if text == "":
        return None
    return int(text) if text.isdigit() else float(text)


def is_old(row: dict) -> bool:
    """Whether what runs on its device, in spg_kernels/ and csrc/, has changed since."""
    return row["sources"] != sources_digest(row["device"])
