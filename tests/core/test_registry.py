import sys

import pytest

from nnssl_ext.core.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "zoo_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from nnssl_ext.core.registry import Registry\nANIMALS = Registry('animal', 'zoo_of_tests')\n"
    )
    (folder / "cat.py").write_text("from zoo_of_tests import ANIMALS\n@ANIMALS.register\nclass Cat: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "zoo_of_tests"
    for name in [n for n in sys.modules if n.startswith("zoo_of_tests")]:
        del sys.modules[name]


def test_modules_are_imported_when_a_name_is_asked_for(package):
    import zoo_of_tests

    assert "zoo_of_tests.cat" not in sys.modules
    assert zoo_of_tests.ANIMALS.names() == ["Cat"]
    assert zoo_of_tests.ANIMALS.get("Cat").__module__ == "zoo_of_tests.cat"


@pytest.mark.parametrize("name", ["Cot", "CAT"])
def test_an_unknown_name_suggests_the_nearest(package, name):
    import zoo_of_tests

    with pytest.raises(ValueError, match=rf"no animal called '{name}'\. Did you mean Cat\? Valid: Cat"):
        zoo_of_tests.ANIMALS.get(name)


def test_two_classes_of_one_name_are_refused():
    registry: Registry = Registry("thing", "nowhere")
    registry.register(type("Same", (), {"__module__": "a"}))
    with pytest.raises(ValueError, match="in a and b"):
        registry.register(type("Same", (), {"__module__": "b"}))
