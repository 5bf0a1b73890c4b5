"""Names for things that plug in: lookup, suggestions, outsiders, collisions."""

import sys

import pytest

from kedit.editors import EDITORS, get_editor
from kedit.errors import KEditError, UnknownNameError
from kedit.regularizers import REGULARIZERS
from kedit.utils.registry import Registry


def publish(folder, monkeypatch, name, *entries, group="kedit.widgets"):
    """Put a package on the path whose metadata offers entry points, as an installed distribution would."""
    module = folder / f"{name}_module.py"
    module.write_text("class Widget:\n    pass\n\n\nclass Other:\n    pass\n")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{entry}\n" for entry in entries))
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(folder)


def test_target_is_imported_only_when_asked_for():
    registry = Registry("widget", {"queue": "queue:Queue", "broken": "no.such.module:Thing"})
    assert registry.names() == ["broken", "queue"]
    assert "broken" in registry
    import queue

    assert registry["queue"] is queue.Queue
    assert registry["QUEUE"] is queue.Queue
    with pytest.raises(ModuleNotFoundError):
        registry["broken"]


def test_register_and_collisions():
    registry = Registry("widget", {"queue": "queue:Queue"})
    thing = object()
    assert registry.register("Mine", thing) is thing
    assert registry["mine"] is thing
    assert list(registry) == ["mine", "queue"]
    for taken in ("mine", "MINE", "queue"):
        with pytest.raises(ValueError, match="taken"):
            registry.register(taken, object())
    assert registry["mine"] is thing


@pytest.mark.parametrize(("wrong", "near"), [("quwue", "queue"), ("QEUE", "queue"), ("stack_", "stack")])
def test_did_you_mean(wrong, near):
    registry = Registry("widget", {"queue": "queue:Queue", "stack": "queue:LifoQueue"})
    with pytest.raises(UnknownNameError, match=f"no widget called '{wrong}'. Did you mean '{near}'"):
        registry[wrong]
    assert wrong not in registry


def test_nothing_near_lists_all():
    registry = Registry("widget", {"queue": "queue:Queue", "stack": "queue:LifoQueue"})
    for wrong in ("zzzzz", "", 7):
        with pytest.raises(UnknownNameError, match="Known: queue, stack"):
            registry[wrong]
    assert 7 not in registry


def test_entry_point_of_another_distribution(tmp_path, monkeypatch):
    registry = Registry("widget", {"queue": "queue:Queue"})
    publish(tmp_path, monkeypatch, "plugin", "Fancy = plugin_module:Widget")
    import plugin_module

    assert "fancy" in registry
    assert registry.names() == ["fancy", "queue"]
    assert registry["FANCY"] is plugin_module.Widget
    with pytest.raises(UnknownNameError, match="Did you mean 'fancy'"):
        registry["fanzy"]
    with pytest.raises(ValueError, match="taken"):
        registry.register("fancy", object())


def test_entry_point_cannot_take_over_a_name_of_ours(tmp_path, monkeypatch):
    import queue

    publish(tmp_path, monkeypatch, "thief", "queue = thief_module:Widget")
    assert Registry("widget", {"queue": "queue:Queue"})["queue"] is queue.Queue


def test_two_distributions_with_one_name_are_refused(tmp_path, monkeypatch):
    registry = Registry("widget")
    publish(tmp_path, monkeypatch, "left", "same = left_module:Widget", "own = left_module:Other")
    publish(tmp_path, monkeypatch, "right", "same = right_module:Widget")
    with pytest.raises(UnknownNameError, match="2 installed packages.*left_module:Widget.*right_module:Widget"):
        registry["same"]
    assert registry["own"].__name__ == "Other"


def test_regularizer_and_editor_groups(tmp_path, monkeypatch):
    publish(tmp_path, monkeypatch, "alpha", "alphapenalty = alpha_module:Widget", group="kedit.regularizers")
    publish(tmp_path, monkeypatch, "beta", "betaeditor = beta_module:Widget", group="kedit.editors")
    import alpha_module
    import beta_module

    assert REGULARIZERS["alphapenalty"] is alpha_module.Widget
    assert EDITORS["betaeditor"] is beta_module.Widget
    REGULARIZERS._objects.pop("alphapenalty")
    EDITORS._objects.pop("betaeditor")


def test_every_shipped_name_resolves_to_its_own():
    for name in EDITORS:
        assert EDITORS[name].name == name
    for name in REGULARIZERS:
        assert REGULARIZERS[name]().name == name


def test_unknown_editor_is_found_before_the_model_is_looked_at():
    with pytest.raises(KEditError, match="no editor called 'romee'. Did you mean 'rome'"):
        get_editor("romee", None, None)
