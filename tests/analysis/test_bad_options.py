"""Options of the analysis functions that make no sense: one sentence, before anything runs."""

import pytest

import kedit
from analysis_common import FACTS, TOKENIZER, tiny_case, tiny_patch
from kedit.analysis.activation_patching import patch_activations
from kedit.errors import ConfigError
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", layers=3)


@pytest.fixture
def _nothing_runs(model):
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    yield
    handle.remove()


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 1.5}, "samples must be a whole number of at least 1, not 1.5"),
        ({"samples": True}, "samples must be a whole number"),
        ({"noise": "x"}, "noise must be a finite number above 0, not 'x'"),
        ({"noise": float("inf")}, "noise must be a finite number above 0, not inf"),
        ({"noise": float("nan")}, "noise must be a finite number above 0, not nan"),
        ({"window": 1.5}, "window must be a whole number"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"kinds": (3,)}, "kinds are some of"),
    ],
)
def test_tracing(model, options, words):
    with pytest.raises(ConfigError, match=words):
        kedit.trace(model, TOKENIZER, FACTS[0], known_only=False, **options)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("bogus",)}, "no kind of probe 'bogus'. The kinds are rewrite"),
        ({"kinds": "relation"}, r"kinds is a list of kinds of probes, like \('relation',\), not 'relation'"),
        ({"kinds": 3}, "kinds is a list"),
        ({"kinds": ()}, "kinds is empty"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, not 0"),
    ],
)
def test_drift(model, options, words):
    with pytest.raises(ConfigError, match=words):
        kedit.drift(model, TOKENIZER, tiny_case(), tiny_patch(model), **options)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "bogus"}, "no kind of probe 'bogus'"),
        ({"heads": [(0, 1)]}, "heads are named sets"),
        ({"chunk": 0}, "chunk must be a whole number"),
        ({"tokens": 1.0}, "tokens must be a whole number"),
    ],
)
def test_patching(model, options, words):
    with pytest.raises(ConfigError, match=words):
        patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), **options)


@pytest.mark.parametrize("pair", [3, (1,), (0, "a"), (0, True)])
def test_heads_that_are_no_pairs(model, pair):
    with pytest.raises(ConfigError, match=r"no pair \(block, head\) of whole numbers"):
        patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), heads={"mine": [pair]})


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("editor", [3, None, ["rome"]])
def test_what_is_no_editor(model, editor):
    with pytest.raises(ConfigError, match="editor is an editor's name, an editor, a patch or a patch per case id, not"):
        kedit.drift(model, TOKENIZER, tiny_case(), editor)


def test_a_result_asked_for_a_kind_that_is_none(model):
    found = kedit.drift(model, TOKENIZER, tiny_case(), tiny_patch(model))
    with pytest.raises(ConfigError, match="no kind of probe 'bogus'"):
        found.of("bogus")
