"""Second moments: the plain sum over all tokens, cached by content, and honest about what they saw."""

import logging
import random
import warnings

import pytest
import torch

from kedit import SecondMoments
from kedit.errors import ConfigError, KEditWarning, NonFiniteError, SingularMomentError
from kedit.keys.estimate import accumulate, cache_folder, estimate_moments
from kedit.keys.second_moment import RIDGE, Accumulator, Moment
from kedit.keys.settling import shuffled
from kedit.models import ModelArch
from kedit.models.hooks import on_input
from tiny_models import MODEL_TYPES, tiny_model, tokenizer

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Ada.",
    "",
    "It was a cold morning. The river is long, and the house is old. " * 3,
    "In the evening they play in the garden near the river.",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


def plain_sum(model, tok, layer, texts):
    """Σ k kᵀ in float64, text by text and token by token."""
    total, count = 0, 0
    for text in texts:
        ids = tok(text)["input_ids"]
        if not ids:
            continue
        seen = []
        with on_input(ModelArch(model).down(layer), lambda k, seen=seen: seen.append(k[0].double())), torch.no_grad():
            model(torch.tensor([ids]))
        for key in seen[0]:
            total = total + torch.outer(key, key)
            count += 1
    return total, count


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_accumulate_is_the_sum_over_all_tokens_and_no_padding(model_type):
    model, tok = tiny_model(model_type), tokenizer("bos")
    found = accumulate(ModelArch(model), tok, [1, 3], TEXTS, budget=10_000)
    assert set(found) == {1, 3}
    for layer, accumulator in found.items():
        total, count = plain_sum(model, tok, layer, TEXTS)
        assert sum(accumulator.counts) == count
        error = (accumulator.total.double() - total).norm() / total.norm()
        assert error < 1e-6


def test_several_batches_give_the_same_sum(monkeypatch):
    model, tok = tiny_model("llama"), tokenizer()
    monkeypatch.setattr("kedit.keys.estimate.TOKENS_PER_BATCH", 40)
    monkeypatch.setattr("kedit.keys.estimate.MAX_PIECE", 1000)
    [(_, found)] = accumulate(ModelArch(model), tok, [2], TEXTS, budget=10_000).items()
    total, count = plain_sum(model, tok, 2, TEXTS)
    assert min(found.counts) > 0
    assert sum(found.counts) == count
    assert (found.total.double() - total).norm() / total.norm() < 1e-6


def test_long_documents_are_cut_and_the_budget_is_kept(monkeypatch):
    model, tok = tiny_model("gpt2"), tokenizer()
    long = " ".join(["river"] * 400)
    assert len(tok(long)["input_ids"]) > 128, "longer than the context window"
    for budget in (1, 100, 300):
        found = accumulate(ModelArch(model), tok, [0], [long], budget=budget)
        assert sum(found[0].counts) == budget


def test_estimate_adds_the_relative_ridge():
    model, tok = tiny_model("gpt2", dtype=torch.float64), tokenizer()
    texts = TEXTS * 2
    total, count = plain_sum(model, tok, 2, texts)
    plain = total / count
    [(layer, moment)] = estimate_moments(ModelArch(model), tok, [2], texts, tokens=9_999).items()
    assert layer == 2
    assert moment.matrix.dtype == torch.float64
    expected = plain + RIDGE * plain.diagonal().mean() * torch.eye(len(plain), dtype=torch.float64)
    torch.testing.assert_close(moment.matrix, expected, atol=1e-12, rtol=1e-9)
    assert moment.tokens == count
    assert moment.ridge == RIDGE
    rank = plain.trace() ** 2 / plain.square().sum()
    assert moment.effective_rank == pytest.approx(float(rank), rel=1e-9)
    [(_, bare)] = estimate_moments(ModelArch(model), tok, [2], texts, tokens=9_999, ridge=0.0).items()
    torch.testing.assert_close(bare.matrix, plain, atol=1e-12, rtol=1e-9)


def test_default_budget_is_fifty_keys_per_dimension():
    model, tok = tiny_model("llama"), tokenizer()
    text = " ".join(["the river is long and"] * 400)
    [(_, moment)] = estimate_moments(ModelArch(model), tok, [0], [text] * 20, cache=False).items()
    assert moment.tokens == 50 * 80


def test_split_half_difference_tells_even_from_uneven_corpora():
    generator = torch.Generator().manual_seed(0)
    even, uneven = (Accumulator(8, torch.device("cpu"), torch.float64) for _ in range(2))
    scale = torch.linspace(0.1, 3, 8, dtype=torch.float64)
    for i in range(40):
        keys = torch.randn(100, 8, generator=generator, dtype=torch.float64)
        even.add(keys)
        uneven.add(keys * (scale if i % 2 else scale.flip(0)))
    assert even.moment(0).split_half < 0.15
    assert uneven.moment(0).split_half > 0.8
    single = Accumulator(8, torch.device("cpu"), torch.float64)
    single.add(keys)
    assert single.moment(0).split_half is None


def count_passes(model, monkeypatch):
    """Count the forward passes of the model from here on."""
    runs = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: (runs.append(1), forward(*args, **kwargs))[1])
    return runs


@pytest.fixture
def setting():
    """A model, its parts, and texts enough for its width."""
    model = tiny_model("llama")
    return model, ModelArch(model), tokenizer(), TEXTS * 3


def test_cache_hits_on_the_same_content(setting, monkeypatch, cache):
    model, arch, tok, texts = setting
    first = estimate_moments(arch, tok, [1, 2], texts, tokens=300)
    assert len(list(cache.iterdir())) == 2
    runs = count_passes(model, monkeypatch)
    again = estimate_moments(ModelArch(model), tokenizer(), [2, 1], list(texts), tokens=300)
    assert not runs
    assert list(again) == [1, 2]
    for layer in (1, 2):
        assert torch.equal(again[layer].matrix, first[layer].matrix)
        assert again[layer].statistics() == first[layer].statistics()
    twin = tiny_model("llama")
    twin_runs = count_passes(twin, monkeypatch)
    estimate_moments(ModelArch(twin), tok, [1], texts, tokens=300)
    assert not twin_runs, "another object with the same weights"
    estimate_moments(arch, tok, [1, 2, 3], texts, tokens=300)
    assert runs, "layer 3 was not there"
    assert len(list(cache.iterdir())) == 3


def test_cache_misses_on_any_other_content(setting, monkeypatch, cache):
    model, arch, tok, texts = setting
    estimate_moments(arch, tok, [1], texts, tokens=300)
    runs = count_passes(model, monkeypatch)
    changes = [
        lambda: estimate_moments(arch, tok, [1], [*texts, "more"], tokens=300),
        lambda: estimate_moments(arch, tok, [1], texts, tokens=301),
        lambda: estimate_moments(arch, tok, [1], texts, tokens=300, ridge=1e-3),
        lambda: estimate_moments(arch, tokenizer("bos"), [1], texts, tokens=300),
    ]
    for number, change in enumerate(changes, start=2):
        before = len(runs)
        change()
        assert len(runs) > before
        assert len(list(cache.iterdir())) == number
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    before = len(runs)
    estimate_moments(arch, tok, [1], texts, tokens=300)
    assert len(runs) > before, "the weights changed"


def test_tokenizers_state_of_the_last_call_is_no_content(setting, monkeypatch, cache):
    model, arch, tok, texts = setting
    estimate_moments(arch, tok, [1], texts, tokens=300)
    tok(["a", "b b"], padding=True, truncation=True, max_length=7)
    runs = count_passes(model, monkeypatch)
    estimate_moments(arch, tok, [1], texts, tokens=300)
    assert not runs


def test_cache_can_be_left_alone(setting, cache):
    _, arch, tok, texts = setting
    estimate_moments(arch, tok, [1], texts, tokens=300, cache=False)
    estimate_moments(arch, tok, [1], iter(texts), tokens=300)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["truncate", "empty", "foreign", "nan", "figures"])
def test_damaged_cache_file_is_computed_again(setting, cache, caplog, damage):
    from safetensors.torch import load_file, save_file

    _, arch, tok, texts = setting
    good = estimate_moments(arch, tok, [1], texts, tokens=300)[1].matrix
    [path] = cache.iterdir()
    content = path.read_bytes()
    match damage:
        case "truncate":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            save_file({"x": torch.ones(2)}, path)
        case "nan":
            save_file({"moment": load_file(path)["moment"] * torch.nan}, path, metadata={"figures": '{"tokens": 3}'})
        case "figures":
            save_file(load_file(path), path, metadata={"figures": '{"nonsense": 1}'})
    with caplog.at_level(logging.WARNING, "kedit"):
        again = estimate_moments(arch, tok, [1], texts, tokens=300)[1].matrix
    assert "is damaged" in caplog.text
    assert torch.equal(again, good)
    assert path.read_bytes() == content, "and written anew"


def test_cache_that_cannot_be_written_is_no_error(setting, tmp_path, monkeypatch, caplog):
    _, arch, tok, texts = setting
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("KEDIT_CACHE", str(blocked))
    with caplog.at_level(logging.WARNING, "kedit"):
        found = estimate_moments(arch, tok, [1], texts, tokens=300)
    assert "could not be kept" in caplog.text
    assert found[1].tokens == 300
    assert blocked.read_text() == "in the way"


def test_cache_folder_has_a_default(monkeypatch):
    monkeypatch.delenv("KEDIT_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "kedit")


def test_too_few_keys_warn_also_from_the_cache(setting, cache):
    _, arch, tok, texts = setting
    for _ in range(2):
        with pytest.warns(KEditWarning, match="layer 1 saw 79 keys of width 80"):
            estimate_moments(arch, tok, [1], texts, tokens=79)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_moments(arch, tok, [1], texts, tokens=80)


def test_no_default_corpus_is_a_clear_error(setting, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    _, arch, tok, _ = setting
    with pytest.raises(ConfigError, match="Wikipedia"):
        estimate_moments(arch, tok, [1])


@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_corpus_without_text(setting, texts, cache):
    _, arch, tok, _ = setting
    with pytest.raises(ConfigError, match="holds no text"):
        estimate_moments(arch, tok, [1], texts)
    assert not cache.exists()


def test_bad_numbers(setting):
    _, arch, tok, texts = setting
    for options in ({"tokens": 0}, {"tokens": -5}, {"ridge": -1.0}, {"ridge": float("nan")}):
        with pytest.raises(ConfigError, match="must be"):
            estimate_moments(arch, tok, [1], texts, **options)
    with pytest.raises(ConfigError, match="out of range"):
        estimate_moments(arch, tok, [5], texts)


def test_broken_model_is_not_cached(setting, cache):
    model, arch, tok, texts = setting
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="second moment of layer 1"):
        estimate_moments(arch, tok, [1], texts, tokens=300)
    assert not cache.exists()


def test_dead_layer_is_singular(setting, cache):
    model, arch, tok, texts = setting
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(SingularMomentError, match="keys of layer 1 are 0"):
        estimate_moments(arch, tok, [1], texts, tokens=300)


def test_model_is_left_as_it_was_also_after_interruption(setting, monkeypatch):
    model, arch, tok, texts = setting
    model.train()
    model.model.layers[2].eval()
    flags = [module.training for module in model.modules()]

    def interrupted():
        yield from texts
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_moments(arch, tok, [1], interrupted(), tokens=10**6)
    estimate_moments(arch, tok, [1], texts, tokens=300)
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_interrupted_estimate_goes_on_with_the_same_result(setting, monkeypatch, cache):
    model, arch, tok, texts = setting
    monkeypatch.setattr("kedit.keys.estimate.TOKENS_PER_BATCH", 50)
    whole = estimate_moments(arch, tok, [1, 3], texts, tokens=400, cache=False)
    forward, runs = model.forward, []

    def interrupted(*args, **kwargs):
        runs.append(1)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimate_moments(arch, tok, [1, 3], texts, tokens=400)
    assert len(list(cache.iterdir())) == 1
    before = len(runs)
    rest = estimate_moments(arch, tok, [1, 3], texts, tokens=400)
    passes = len(runs) - before
    assert all(
        torch.equal(rest[i].matrix, whole[i].matrix) and rest[i].statistics() == whole[i].statistics() for i in (1, 3)
    )
    runs.clear()
    runs += [1] * 10
    estimate_moments(arch, tok, [1, 3], texts, tokens=400, cache=False)
    assert len(runs) - 10 == passes + 3, "the first three batches were not run again"
    assert len(list(cache.iterdir())) == 2, "what was kept for going on is gone"


@pytest.mark.parametrize("layer", [1, 3])
def test_interruption_in_the_middle_of_a_sum_is_not_kept(setting, monkeypatch, cache, layer):
    """Ctrl-C during a matrix product arrives right after it: the batch is in the sum then."""
    _, arch, tok, texts = setting
    monkeypatch.setattr("kedit.keys.estimate.TOKENS_PER_BATCH", 50)
    whole = estimate_moments(arch, tok, [1, 3], texts, tokens=400, cache=False)
    addmm, calls = torch.Tensor.addmm_, []

    def interrupted(*args):
        calls.append(1)
        addmm(*args)
        if len(calls) == (5 if layer == 1 else 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "addmm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimate_moments(arch, tok, [1, 3], texts, tokens=400)
    again = estimate_moments(arch, tok, [1, 3], texts, tokens=400)
    assert all(torch.equal(again[i].matrix, whole[i].matrix) for i in (1, 3))


def test_only_blocks_up_to_the_highest_layer_run(setting):
    _, arch, tok, texts = setting
    ran = []
    for number in range(5):
        arch.block(number).register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    accumulate(arch, tok, [0, 2], texts, 200)
    assert set(ran) == {0, 1, 2}


def test_mapping_of_tensors_and_moments():
    matrix = torch.eye(80)
    moments = SecondMoments({3: matrix, 1: Moment(2 * matrix, tokens=5)})
    assert len(moments) == 2
    assert moments[3].matrix is matrix
    assert moments[3].statistics() == {"tokens": None, "ridge": 0.0, "split_half": None, "effective_rank": None}
    assert moments[1].tokens == 5
    factor = moments.factor(1)
    torch.testing.assert_close(factor @ factor.T, 2 * matrix.double())
    assert moments.factor(1) is factor, "computed once"


def test_check_names_what_does_not_fit():
    arch = ModelArch(tiny_model("llama"))
    moments = SecondMoments({1: torch.eye(80), 2: torch.eye(48), 3: torch.ones(80, 79)})
    moments.check(arch, (1,))
    with pytest.raises(ConfigError, match=r"no second moment for layer 0; given are layers \[1, 2, 3\]"):
        moments.check(arch, (0,))
    with pytest.raises(ConfigError, match=r"layer 2 is \(48, 48\).*\(80, 80\)"):
        moments.check(arch, (1, 2))
    with pytest.raises(ConfigError, match=r"layer 3 is \(80, 79\)"):
        moments.check(arch, (3,))
    with pytest.raises(ConfigError, match="layer 1 is list"):
        SecondMoments({1: [[1.0]]}).check(arch, (1,))
    skew = torch.eye(80)
    skew[0, 5] = 0.5
    with pytest.raises(ConfigError, match="layer 1 is not symmetric"):
        SecondMoments({1: skew}).check(arch, (1,))


def test_singular_moment_names_the_layer():
    with pytest.raises(SingularMomentError, match="of layer 4 is not positive definite"):
        SecondMoments({4: torch.zeros(3, 3)}).factor(4)


def test_a_short_corpus_has_two_halves_and_says_where_it_ended(caplog):
    caplog.set_level(logging.INFO, logger="kedit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few keys
        found = estimate_moments(ModelArch(tiny_model("gpt2")), tokenizer(), [1], TEXTS, tokens=10_000)
        alone = estimate_moments(ModelArch(tiny_model("gpt2")), tokenizer(), [1], TEXTS[:1], tokens=10_000)
    assert 0 < found[1].split_half < 2
    assert alone[1].split_half is None
    assert f"The corpus ended after {found[1].tokens} of 10,000 tokens." in caplog.text


def test_in_half_precision_they_are_close_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    arch, tok = ModelArch(tiny_model("llama")), tokenizer()
    texts = ["The capital of France is Paris, and the capital of Italy is Rome."] * 30
    exact = estimate_moments(arch, tok, [1, 2], texts, tokens=300)
    half = estimate_moments(arch, tok, [1, 2], texts, tokens=300, compute_dtype="bfloat16")
    assert len(list((tmp_path / "moments").glob("*.safetensors"))) == 4
    for layer in (1, 2):
        one, other = exact[layer].matrix, half[layer].matrix
        assert other.dtype == one.dtype
        assert 0 < float((one - other).norm() / one.norm()) < 0.05


def settling_from(texts, tolerance, arch, tok, **options):
    return estimate_moments(arch, tok, [1, 3], texts, tokens=4000, tolerance=tolerance, **options)


@pytest.fixture
def long_texts(setting, monkeypatch):
    monkeypatch.setattr("kedit.keys.estimate.TOKENS_PER_BATCH", 50)
    _, arch, tok, texts = setting
    words, generator = " ".join(texts).split(), random.Random(0)
    return [" ".join(generator.choices(words, k=12)) for _ in range(400)], arch, tok


def test_text_is_read_until_directions_settle(long_texts, cache):
    texts, arch, tok = long_texts
    loose = settling_from(texts, 0.9, arch, tok)
    tight = settling_from(texts, 0.2, arch, tok)
    whole = settling_from(texts, None, arch, tok)
    assert 2 * 5 * 80 <= loose[1].tokens < tight[1].tokens < whole[1].tokens == 4000
    assert loose[1].tokens == loose[3].tokens
    probes = torch.randn(8, 80, generator=torch.Generator().manual_seed(0))
    off = [1 - torch.cosine_similarity(m.whiten(1, probes), whole.whiten(1, probes)).mean() for m in (loose, tight)]
    assert off[1] < off[0]
    assert len(list(cache.iterdir())) == 6, "each is kept apart"
    assert torch.equal(settling_from(texts, 0.9, arch, tok, cache=False)[1].matrix, loose[1].matrix)


def test_a_short_corpus_ends_before_it_settles(long_texts):
    texts, arch, tok = long_texts
    few = settling_from(texts[:40], 1e-9, arch, tok, cache=False)
    assert few[1].tokens < 4000


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf")])
def test_no_tolerance(setting, tolerance):
    _, arch, tok, texts = setting
    with pytest.raises(ConfigError, match="tolerance must be a positive number or None"):
        estimate_moments(arch, tok, [1], texts, tolerance=tolerance)


def test_shuffled_texts_are_all_texts_in_a_seeded_order(monkeypatch):
    monkeypatch.setattr("kedit.keys.settling.SHUFFLED", 4)
    texts = [str(number) for number in range(10)]
    order = list(shuffled(texts))
    assert order == list(shuffled(iter(texts))) != texts
    assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [texts[i : i + 4] for i in (0, 4, 8)]
