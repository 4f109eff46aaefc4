"""README, pages and charts are what the CSVs say, and --check notices where they are not."""

import csv
from types import SimpleNamespace

import pytest

from . import conftest, machine, report, results, targets
from .machine import sources_digest
from .timing import COPY, Row

_STAMP = {"device": "cpu", "machine": "a machine, 2 cores", "isa": "avx2", "threads": "2", "torch": "2.13.0", "triton": "none",
          "compiler": "GCC", "commit": "abc1234", "sources": sources_digest("cpu"), "date": "2026-11-23"}


def _rows() -> list[dict]:
    def row(contender, median, **values):
        own = Row("adamw", "resnet50", contender, 25_557_032, 161, 7, median, median - 1, median + 1.5, copy_gb_s=20.0,
                  **values)
        return {**vars(own), **_STAMP}

    return [
        row("spg float32", 1200.0, bytes_per_parameter=32, copy_share=0.95),
        row("spg 8-bit", 1040.0, bytes_per_parameter=29, copy_share=0.97, vs_float32=0.87),
        row("unmasked fused", 1000.0, bytes_per_parameter=28, copy_share=0.9, vs_float32=1 / 1.2, vs_8bit=1 / 1.04),
        row(COPY, 500.0),
    ]


def _write(path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "results").mkdir()
    _write(tmp_path / "results" / "machine.csv", _rows())
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    return ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]


def test_check_notices_each_stale_file(places, tmp_path, capsys):
    assert report.main(["--check", *places]) == 1
    assert report.main(places) == 0
    assert report.main(["--check", *places]) == 0
    for name in ("README.md", "results/machine.md"):
        path = tmp_path / name
        text = path.read_text()
        assert "1.200 (1.199 to 1.202)" in text
        path.write_text(text.replace("1.200 (", "0.900 ("))
        assert report.main(["--check", *places]) == 1
        assert f"{path} is not what" in capsys.readouterr().err
        path.write_text(text)
    _write(tmp_path / "results" / "machine.csv", _rows()[:-1])
    assert report.main(["--check", *places]) == 1
    assert "machine.png" in capsys.readouterr().err


def test_readme_keeps_what_is_around_the_markers(places, tmp_path):
    report.main(places)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"\n{report.END}\nafter\n")
    with pytest.raises(ValueError, match="bench:begin"):
        report.with_section("no markers", "text")


def test_a_machine_has_one_section_and_a_line_for_each_other_record(places, tmp_path):
    _write(tmp_path / "results" / "a-machine-capped.csv", [{**row, "isa": "baseline"} for row in _rows()[:-1]])
    report.main(places)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| pass |") == text.count(".png") == 1 and "![machine]" in text
    assert "baseline, 2 threads**" in text and "Of 2 targets 1 are met: [bench/results/a-machine-capped.md]" in text


def test_a_record_of_the_sources_as_they_are_goes_before_a_fuller_one(places, tmp_path):
    old = [{**row, "sources": "0" * 16} for row in _rows()]
    _write(tmp_path / "results" / "machine.csv", old)
    _write(tmp_path / "results" / "new.csv", _rows()[:-1])
    report.main(places)
    text = (tmp_path / "README.md").read_text()
    assert "![new]" in text and "[bench/results/machine.md]" in text and text.count("| pass |") == 1


def test_rows_of_older_sources_are_marked(places, tmp_path):
    report.main(places)
    assert "†" not in (tmp_path / "README.md").read_text()
    _write(tmp_path / "results" / "machine.csv", [{**row, "sources": "0" * 16} for row in _rows()])
    assert report.main(["--check", *places]) == 1
    report.main(places)
    assert "† measured at abc1234 (2026-11-23)" in (tmp_path / "README.md").read_text()


def test_verdicts_met_and_missed():
    found = {(v.target.ours, v.set_name): v for v in targets.verdicts(_rows(), "cpu")}
    eight_bit, full = found["spg 8-bit", "resnet50"], found["spg float32", "resnet50"]
    assert eight_bit.met and eight_bit.measured == pytest.approx(1.04)
    assert not full.met and full.measured == pytest.approx(1.2)


def test_a_record_replaces_its_own_cases_only(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "stamp", lambda device: _STAMP)
    adamw = [Row("adamw", "resnet18", "spg float32", 11_689_512, 62, 7, 1.5, 1.25, 2.0)]
    results.record(adamw + [Row("sgd", "resnet18", "spg float32", 11_689_512, 62, 7, 3.0, 3.0, 3.0)], "cpu", tmp_path)
    again = Row("adamw", "resnet18", "spg float32", 11_689_512, 62, 7, 1.0, 1.0, 1.0, extra_mib=0.5)
    path = results.record([again], "cpu", tmp_path)
    rows = {row["pass_name"]: row for row in results.load(path)}
    assert rows["adamw"]["median_us"] == 1 and rows["adamw"]["extra_mib"] == 0.5 and rows["adamw"]["host_us"] is None
    assert rows["sgd"]["median_us"] == 3 and len(rows) == 2


@pytest.mark.parametrize(("device", "backend"), [("cpu", "native"), ("cuda", "triton")])
def test_nothing_is_recorded_without_the_kernels(device, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(machine.ops, "why_unavailable", {backend: "it is missing"}.get)
    options = {"--record": tmp_path, "--device": device}
    config = SimpleNamespace(stash={}, option=SimpleNamespace(), getoption=options.get)
    with pytest.raises(pytest.UsageError, match="plain PyTorch .*: it is missing"):
        conftest.pytest_configure(config)


@pytest.mark.parametrize(("ours", "torchs", "unequal"), [
    ("avx2", "AVX2", False), ("avx2", "AVX512", True), ("baseline", "AVX2", True), ("baseline", "DEFAULT", False),
    ("baseline", "SVE256", False), ("avx512vbmi", "AVX512", False), ("avx512vbmi", "AVX2", True)])
def test_instruction_sets_that_do_not_compare(ours, torchs, unequal, monkeypatch):
    monkeypatch.setattr(machine, "_isa", lambda: ours)
    monkeypatch.setattr(machine.native, "unavailable", lambda: None)
    monkeypatch.setattr(machine.torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    assert bool(machine.unequal_isas()) == unequal
