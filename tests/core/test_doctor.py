"""``doctor`` finds what works and what does not, and says it in lines for a bug report."""

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks.ascend_stand_ins import ascend
from pixart_nb.cli import app
from pixart_nb.core import backend, doctor
from pixart_nb.core.backend import ms


@pytest.fixture
def checks(monkeypatch):
    """A function that runs some checks."""

    def run(*networks):
        monkeypatch.setattr(doctor, "NETWORKS", {name: doctor.NETWORKS[name] for name in networks})
        return {check.name: check for check in doctor.device_checks()}

    return run


def test_every_check_passes_on_this_machine(checks):
    networks = [name for name in doctor.NETWORKS if name not in (doctor.COMPILED, "VAE decoder, tiles")]
    results = checks(*networks)
    assert list(results)[3:] == [
        f"{name}, {dtype}" for name in ("matrix product", *networks) for dtype in ("fp32", "fp16")
    ]
    judged = {name: check for name, check in results.items() if name not in ("bfloat16 products", "free memory")}
    assert [check for check in judged.values() if not check.passed] == []


@pytest.mark.parametrize(
    ("dtype", "networks"), [("fp32", tuple(doctor.NETWORKS)), ("fp16", tuple(doctor.NETWORKS)[:4])]
)
def test_the_ascend_path_gives_the_stored_numbers(checks, monkeypatch, dtype, networks):
    monkeypatch.setattr(doctor, "TOLERANCES", {dtype: {"fp32": 1e-5, "fp16": 2e-2}[dtype]})
    monkeypatch.setattr(ms.hal, "get_device_name", lambda number: "Ascend910B2")
    monkeypatch.setattr(ms.hal, "get_device_properties", lambda number: SimpleNamespace(free_memory=60 * 10**9))
    monkeypatch.setattr(ms, "jit", lambda function, **options: function)
    with ascend():
        results = checks(*networks)
    assert results["free memory"].result == "60.0 GB"
    assert "Ascend910B2" in results["device"].result
    assert [name for name, check in results.items() if check.passed is False] == []


def test_an_ascend_host_without_the_environment_of_cann_is_told_so(monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(doctor.Path, "glob", lambda path, pattern: [path / "davinci1", path / "davinci0"])
    results = {check.name: check for check in doctor.environment()}
    assert results["Ascend devices"].result == "davinci0, davinci1"
    assert results["CANN's environment"].passed is False
    assert "source CANN's set_env.sh" in results["CANN's environment"].result
    assert set(doctor.CANN_PACKAGES) <= set(results)


def test_what_fails_is_named_and_the_rest_is_still_checked(monkeypatch):
    def broken(dtype):
        raise RuntimeError("\n---\nthe kernel is missing\nC++ call stack")

    monkeypatch.setattr(doctor, "NETWORKS", {"broken": broken, "text encoder": lambda dtype: doctor._random(2, 20, 32)})
    monkeypatch.setattr(doctor, "EXPECTED", doctor.EXPECTED | {"broken": (1.0,) * 7})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAILED  broken, fp32: RuntimeError: the kernel is missing\n" in result.stdout
    assert "FAILED  text encoder, fp32: relative error" in result.stdout
    assert result.stdout.endswith("failed: broken, fp32; broken, fp16; text encoder, fp32; text encoder, fp16\n")
    assert "mindspore: 2." in result.stdout


@pytest.mark.parametrize("name", ["Ascend910A", "Ascend310P3"])
def test_a_device_before_a2_is_refused(name, monkeypatch):
    with ascend(), pytest.raises(ValueError, match=rf"{name} is not supported: flash attention needs Atlas A2"):
        backend.check_device("Ascend", name)
    with ascend():
        backend.check_device("Ascend", "Ascend910B4")


def test_another_device_than_the_one_that_is_open_is_refused():
    with pytest.raises(ValueError, match=r"device_target is Ascend, but MindSpore was started on CPU; set PIXART_NB"):
        backend.check_device("Ascend")


def test_versions_of_cann_are_read_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler/version.info").write_text("Version=8.0.0.1\nversion_dir=8.0.RC1\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    version, accepted = backend.cann_versions()
    assert version == "8.0"
    assert version not in accepted
    assert "8.5" in accepted
