"""A regularizer written by a user: extra prompts, logits, hidden states, attention rows, end to end."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import kedit
from kedit.models import ModelArch
from kedit.regularizers import ForwardRecord, Needs, blocks_from
from tiny_models import CONTEXTS, MODEL_TYPES, moments, tiny_model, tokenizer

EDITS = [
    kedit.Edit("The mother tongue of {} is", "Danielle Darrieux", "English"),
    kedit.Edit("{} works in", "Ada Lovelace", "Rome"),
]
RELATIONS = ("{} lives in the city of", "The river near the house of {} flows past")


@dataclass(frozen=True)
class KeepRelations:
    """Hold the next-token distribution of other relations of the subject: the example of the design."""

    weight: float = 1.0
    name: str = "relations"

    def needs(self, site):
        return Needs(logits=True, prompts=RELATIONS)

    def penalty(self, now: ForwardRecord, before: ForwardRecord):
        old, new = (log_softmax(one.extra.logits.float(), -1) for one in (before, now))
        divergence = kl_div(new, old, log_target=True, reduction="none").sum(-1)
        return self.weight * now.extra.mean_per_edit(divergence, now.num_edits)


@dataclass
class Watch:
    """Asks for everything and changes nothing; keeps what it was shown."""

    wanted: Needs
    name: str = "watch"
    shown: list = field(default_factory=list)

    def needs(self, site):
        return self.wanted

    def penalty(self, now, before):
        self.shown.append((now.detach(), before))
        return now.delta.new_zeros(now.num_edits)


def rome(model, tok=None, **options):
    arch = ModelArch(model)
    layer = options.pop("layer", 1)
    published = {"lr": 0.5, "clamp": 4.0, "steps": 4, "kl_factor": 0.1, "stop_loss": 0.0}
    options = published | {"contexts": CONTEXTS, "layers": layer} | options
    width = arch.weight(layer).matrix.shape[1]
    return kedit.ROME(model, tok or tokenizer(), moments={layer: moments(width, layer)}, **options)


def plain(model, tok, text, blocks, dtype=torch.float64):
    """Attention rows, hidden states and logits of the last token of one text, from a plain forward pass."""
    model = tiny_model(model.config.model_type, attention="eager")
    ids = torch.tensor([tok(text)["input_ids"]])
    arch = ModelArch(model)
    hidden = {}
    from contextlib import ExitStack

    from kedit.models.hooks import on_output

    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.enter_context(on_output(arch.block(block), lambda x, block=block: hidden.update({block: x[0, -1]})))
        out = model(ids, output_attentions=True)
    return {block: out.attentions[block][0, :, -1] for block in blocks}, hidden, out.logits[0, -1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_shown_what_a_plain_forward_pass_gives(model_type):
    """At δ = 0, in every block it may ask for, above and below the edit."""
    model, tok = tiny_model(model_type), tokenizer()
    watch = Watch(Needs(attention=blocks_from(0), hidden=blocks_from(0), logits=True, prompts=RELATIONS))
    rome(model, tok, layer=2, steps=1).propose(EDITS, regularizer=watch)
    now = watch.shown[0][0]
    assert now.step == 0
    for rows, templates in ((now.rewrite, None), (now.extra, RELATIONS)):
        for i, (edit, context) in enumerate(zip(rows.edit.tolist(), rows.context.tolist(), strict=True)):
            one = EDITS[edit]
            text = templates[context] if templates else CONTEXTS[context].replace("{}", one.prompt)
            attention, hidden, logits = plain(model, tok, text.replace("{}", one.subject), range(5))
            assert set(rows.attention) == set(rows.hidden) == set(range(5))
            for block in range(5):
                length = attention[block].shape[-1]
                column = int(rows.subject[i])
                seen = rows.attention[block][i]
                # Rows may be padded on either side; zeros elsewhere.
                offset = column - lookup_of(tok, text, one.subject)
                torch.testing.assert_close(seen[:, offset : offset + length], attention[block], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(seen.sum(-1), torch.ones(len(seen)), atol=1e-5, rtol=0)
                torch.testing.assert_close(rows.hidden[block][i], hidden[block], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(rows.logits[i], logits, atol=1e-4, rtol=1e-3)


def lookup_of(tok, template, subject):
    """Index of the subject's last token, by counting characters."""
    from kedit.prompts.tokenize import Text, encode

    return encode(tok, [Text.fill(template, subject)])[0].subject_last


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral"])
def test_it_holds_what_it_was_written_to_hold(model_type):
    def drift(result_log):
        return [steps[-1]["relations"] for steps in result_log]

    held = rome(tiny_model(model_type), steps=12).apply(EDITS, regularizer=KeepRelations(50.0))
    free = rome(tiny_model(model_type), steps=12).apply(EDITS, regularizer=KeepRelations(1e-6))
    for strong, weak in zip(drift(held.log), drift(free.log), strict=True):
        assert strong / 50.0 < 0.5 * weak / 1e-6
    assert all(steps[0]["relations"] == pytest.approx(0, abs=1e-5) for steps in held.log)
    assert held.patch.provenance["regularizers"][0]["name"] == "relations"
    assert held.patch.provenance["regularizers"][0]["weight"] == 50.0
    assert "relations" in held.report()


def test_beside_sadr_each_gets_its_own_numbers():
    """The needs of one regularizer do not change the penalty of the other."""
    sadr = kedit.SADR(gamma=0.5, layers=(3, 3))
    watch = Watch(Needs(attention=blocks_from(0), logits=True, prompts=RELATIONS))
    alone = rome(tiny_model("gpt2")).apply(EDITS[:1], regularizer=sadr)
    beside = rome(tiny_model("gpt2")).apply(EDITS[:1], regularizer=[sadr, watch])
    both = [[step["sadr"] for step in result.log[0]] for result in (alone, beside)]
    assert any(value > 0 for value in both[0])
    assert both[1] == pytest.approx(both[0], rel=1e-4, abs=1e-7)
    assert {"step", "total", "nll", "kl", "weight_decay", "sadr", "watch"} == set(beside.log[0][0])


def test_two_of_its_kind_each_see_their_own_prompts():
    first = Watch(Needs(logits=True, prompts=RELATIONS), name="first")
    second = Watch(Needs(logits=True, prompts=("{} is a", RELATIONS[1])), name="second")
    rome(tiny_model("gpt2"), steps=1).propose(EDITS, regularizer=[first, second])
    one, two = first.shown[0][0].extra, second.shown[0][0].extra
    assert one.context.tolist() == two.context.tolist() == [0, 1, 0, 1]
    shared = [1, 3]
    assert torch.equal(one.logits[shared], two.logits[shared])
    assert not torch.equal(one.logits[[0]], two.logits[[0]])


def test_before_is_step_zero_without_gradient():
    watch = Watch(Needs(hidden=blocks_from(2), logits=True))
    rome(tiny_model("llama"), steps=3).propose(EDITS, regularizer=watch)
    (first, _), *_, (last, before) = watch.shown
    assert torch.equal(before.rewrite.logits, first.rewrite.logits)
    assert not torch.equal(before.rewrite.logits, last.rewrite.logits)
    assert not before.rewrite.logits.requires_grad
    assert [now.step for now, _ in watch.shown] == [0, 1, 2]
    assert (first.delta == 0).all()
    assert (last.delta != 0).any()
    torch.testing.assert_close(first.initial, last.initial)


@pytest.mark.parametrize("first", [0, 1])
def test_finished_edits_leave_and_the_rest_is_renumbered(first):
    """Whichever edit stops early is gone from what is shown; no extra prompts, so that their rows are empty."""

    @dataclass
    class Offset(Watch):
        """Adds a constant to the loss of one edit, so that the other one finishes."""

        def penalty(self, now, before):
            self.shown.append((now, before))
            mine = torch.full((now.num_edits,), -1e6)
            if now.num_edits == 2:
                mine[1 - first] = 0.0
            return mine if now.step == 2 and now.num_edits == 2 else torch.zeros(now.num_edits)

    watch = Offset(Needs(logits=True))
    rome(tiny_model("gpt2"), steps=5).propose(EDITS, regularizer=watch)
    assert [now.num_edits for now, _ in watch.shown] == [2, 2, 2, 1, 1]
    (whole, start), *_, (last, before) = watch.shown
    stays = 1 - first
    assert set(last.rewrite.edit.tolist()) == set(before.rewrite.edit.tolist()) == {0}
    assert torch.equal(before.rewrite.logits, start.rewrite.logits[start.rewrite.edit == stays])
    torch.testing.assert_close(last.initial[0], whole.initial[stays])


def test_extra_prompts_longer_than_the_window_are_refused():
    model = tiny_model("gpt2")
    long = Watch(Needs(logits=True, prompts=("{} " + "river " * 150,)))
    with pytest.raises(kedit.KEditError, match="context window holds 128"):
        rome(model).apply(EDITS[0], regularizer=long)
