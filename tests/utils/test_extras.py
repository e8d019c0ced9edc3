"""Optional packages: the error for a missing one names its extra."""

import sys

import pytest

from tensormask.utils.errors import UserError
from tensormask.utils.extras import require


def test_a_package_that_is_installed():
    assert require("os.path", extra="report") is sys.modules["os.path"]


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hidden_package", None)
    for name in ("not_a_package", "not_a_package.inside", "hidden_package"):
        package = name.partition(".")[0]
        with pytest.raises(UserError, match=rf"package {package}: .* 'tensormask\[report\]'"):
            require(name, extra="report")


def test_what_a_package_itself_lacks_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import not_a_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_a_package"):
        require("half_installed", extra="report")
