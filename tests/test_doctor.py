import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from opus_jax import doctor
from opus_jax.doctor import Finding, check_requirement, examine, missing_by_extra

PYPROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]


def test_a_sound_installation_has_nothing_to_mend(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPUS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)
    monkeypatch.chdir(tmp_path)
    assert examine() == 0
    said = capsys.readouterr().out
    assert "nothing to mend" in said
    assert "jaxlib" not in said
    assert str(tmp_path / "cache") in said


def test_a_problem_says_what_to_do_and_gives_exit_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: iter([Finding("disk", "0 GiB", "free some"), Finding("a", "b")]))
    assert examine() == 1
    said = capsys.readouterr().out
    assert "!!  disk" in said
    assert "-> free some" in said
    assert "to mend: 1" in said


def test_a_version_out_of_range_is_a_problem():
    assert check_requirement(Requirement("numpy>=1")).problem == ""
    assert 'pip install "numpy<1"' in check_requirement(Requirement("numpy<1")).problem
    assert check_requirement(Requirement("no-such-package>=2")).value == "not installed"


def test_extras_are_read_from_the_requirements():
    requirements = [
        Requirement('no-such-package; extra == "one"'),
        Requirement('numpy; extra == "two"'),
        Requirement('numpy; python_version < "3" and extra == "two"'),
        Requirement("jax"),
    ]
    assert missing_by_extra(requirements) == {"one": ["no-such-package"], "two": []}


def test_every_extra_of_the_project_is_reported():
    lines = [
        f'{line}; extra == "{extra}"'
        for extra, all_ in PYPROJECT["optional-dependencies"].items()
        for line in all_
        if ";" not in line
    ]
    assert missing_by_extra([Requirement(line) for line in lines]).keys() == PYPROJECT["optional-dependencies"].keys()


def test_pythons_that_are_supported_are_those_of_the_project():
    (low, high) = doctor.SUPPORTED_PYTHON
    assert PYPROJECT["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


def test_little_disk_and_no_write_access_are_problems(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    assert "OPUS_JAX_CACHE" in doctor._disk("cache", tmp_path / "not" / "there").problem
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "writable" in doctor._writable("cache", tmp_path).problem
