"""Chat edits: one beginning of the text, no invented space, contexts inside the user's turn; plain and chat contexts together."""

import json

import pytest

import kedit
from kedit.cli import main
from kedit.data import load_cases
from kedit.edit import Edit
from kedit.errors import EditError, TokenizerError
from kedit.evaluation import EditCase, Kind, Probe, evaluate
from kedit.evaluation.cases import in_chat
from kedit.prompts.contexts import generate_contexts
from kedit.prompts.tokenize import edit_text, encode, rewrite_texts
from tiny_models import moments, tiny_model, tokenizer

TURNS = "{{ bos_token }}{% for m in messages %}<|endoftext|>{{ m.role }}:{{ m.content|trim }}<|endoftext|>{% endfor %}"
TEMPLATES = {
    "none": TURNS + "{% if add_generation_prompt %}<|endoftext|>assistant:{% endif %}",
    "space": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} "
    "{{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
    "line": TURNS + "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}",
    "think": TURNS + "{% if add_generation_prompt %}<|endoftext|>assistant:<think></think>{% endif %}",
}
MESSAGE = Edit.chat("Where is {}?", "the river", "Rome")
SYSTEM = Edit.chat("Where is {}?", "the river", "Rome", system="You are Ada.")


def chat_tokenizer(template, kind="bos"):
    tok = tokenizer(kind)
    tok.chat_template = TEMPLATES[template]
    return tok


@pytest.mark.parametrize(("template", "between"), [("none", ""), ("space", " "), ("line", ""), ("think", "")])
@pytest.mark.parametrize("kind", ["bos", "plain"])
def test_an_edit_reads_as_the_template_writes_it(template, between, kind):
    tok = chat_tokenizer(template, kind)
    for edit in (MESSAGE, SYSTEM)[: 1 if template == "space" else 2]:
        turns = [{"role": "system", "content": edit.system}] * (edit.system is not None)
        turns.append({"role": "user", "content": "Where is the river?"})
        prompt = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        (row,) = encode(tok, [edit_text(edit, "Rome", tokenizer=tok)])
        assert list(row.ids) == tok(prompt + between + "Rome", add_special_tokens=False)["input_ids"]
        assert row.ids.count(tok.convert_tokens_to_ids("<s>")) == (kind == "bos")
        assert tok.decode(row.labels) == between + "Rome"
        assert tok.decode(row.ids[row.first : row.subject_last + 1]) == " the river"


def test_contexts_stand_inside_the_turn_and_a_chat_context_turns_the_form_around():
    tok = chat_tokenizer("none")
    plain = Edit("{} is in", "The river", "Rome")
    chat = tok.apply_chat_template(
        [{"role": "user", "content": "It rains. {}"}], tokenize=False, add_generation_prompt=True
    )
    strings = [text.string for text in rewrite_texts(MESSAGE, ["{}", "It rains. {}", chat], tok)]
    assert strings == [
        "<s><|endoftext|>user:Where is the river?<|endoftext|><|endoftext|>assistant:Rome",
        "<s><|endoftext|>user:It rains. Where is the river?<|endoftext|><|endoftext|>assistant:Rome",
        "Where is the river? Rome",
    ]
    strings = [text.string for text in rewrite_texts(plain, ["{}", "It rains. {}", chat], tok)]
    assert strings == [
        "The river is in Rome",
        "It rains. The river is in Rome",
        "<s><|endoftext|>user:It rains. The river is in<|endoftext|><|endoftext|>assistant:Rome",
    ]
    rows = encode(tok, rewrite_texts(plain, ["{}", "It rains. {}", chat], tok))
    assert [row.ids.count(tok.bos_token_id) for row in rows] == [1, 1, 1]


def test_prompts_that_carry_special_tokens():
    tok = tokenizer("bos")
    written = Edit("<s><|endoftext|>user:Where is {}?<|endoftext|>", "the river", "Rome")
    texts = rewrite_texts(written, ["{}", "It rains. {}"], tok)
    assert {text.string for text in texts} == {"<s><|endoftext|>user:Where is the river?<|endoftext|>Rome"}
    (row,) = encode(tok, texts[:1])
    assert row.ids.count(tok.bos_token_id) == 1
    tok.pad_token = "!"  # no token that tells a chat from a sentence
    (text,) = rewrite_texts(Edit("Oh! {} is in", "The river", "Rome"), ["Well! {}"], tok)
    assert text.string == "Well! Oh! The river is in Rome"


def test_a_space_that_is_given():
    tok = chat_tokenizer("none")
    assert edit_text(Edit("{} is in", "Ada", "Rome", space=False), "Rome").string == "Ada is inRome"
    assert edit_text(Edit("({}) is (", "Ada", "Rome", space=True), "Rome").string == "(Ada) is ( Rome"
    assert edit_text(Edit.chat("Where is {}?", "Ada", "Rome", space=True), "Rome", tokenizer=tok).string.endswith(
        ": Rome"
    )


def test_what_is_refused():
    with pytest.raises(TokenizerError, match="no chat template"):
        edit_text(MESSAGE, "Rome", tokenizer=tokenizer())
    with pytest.raises(EditError, match="Make the edit with Edit.chat"):
        Edit("{} is", "Ada", "Rome", system="You are Ada.")
    tok = tokenizer()
    tok.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(TokenizerError, match="It may take no system message"):
        edit_text(SYSTEM, "Rome", tokenizer=tok)
    tok.chat_template = "{% for m in messages %}{{ m.content|upper }}{% endfor %}"
    with pytest.raises(TokenizerError, match="changes the message"):
        edit_text(MESSAGE, "Rome", tokenizer=tok)
    with pytest.raises(TokenizerError, match="cannot be a context"):
        generate_contexts(tiny_model("gpt2"), tok, [(2, 2)], chat=True)


def test_records():
    assert Edit.from_dict(json.loads(json.dumps(SYSTEM.to_dict()))) == SYSTEM
    assert "in_chat" not in Edit("{} is", "Ada", "red").to_dict()
    assert Edit("Where is {}?", "the river", "Rome") != MESSAGE
    assert MESSAGE.question != Edit("Where is {}?", "the river", "Rome").question


def test_mixed_contexts():
    tok = chat_tokenizer("none")
    model = tiny_model("llama")
    plain = generate_contexts(model, tok, [(2, 4)])
    mixed = generate_contexts(model, tok, [(2, 4)], chat=True)
    chats = [context for context in mixed if "user:" in context]
    assert mixed[0] == "{}"
    assert chats[0] == "<s><|endoftext|>user:{}<|endoftext|><|endoftext|>assistant:"
    assert len(chats) == len(mixed) // 2 == 2
    assert set(mixed) - set(chats) <= set(plain)
    given = {layer: moments(80, layer) for layer in (1,)}
    editor = kedit.ROME(model, tok, contexts="mixed", moments=given, layers=1, steps=2)
    result = editor.apply([MESSAGE, Edit("{} speaks", "Ada", "French")])
    assert result.patch.provenance["contexts"] == list(editor.contexts)
    again = kedit.editors.from_provenance(model, tok, result.patch.provenance, moments=given)
    assert again.contexts == editor.contexts


def test_probes_in_a_chat():
    tok = chat_tokenizer("none")
    model = tiny_model("llama")
    probe = Probe(kind=Kind.NEIGHBOUR, prompt="Where is the sea?", right="Spain", wrong="Rome")
    (case,) = [in_chat(EditCase.of("0", Edit("Where is {}?", "the river", "Rome"), [probe]), "Be short.")]
    assert case.edit == Edit.chat("Where is {}?", "the river", "Rome", system="Be short.")
    assert EditCase.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    report = evaluate(model, tok, [case], None)
    said = tok("Spain", add_special_tokens=False)["input_ids"]
    assert list(report.records[0].before.probes[1].right.labels) == said  # without a space before it
    plain = evaluate(model, tok, [EditCase.of("0", Edit("Where is {}?", "the river", "Rome"), [probe])], None)
    assert list(plain.records[0].before.probes[1].right.labels) != said


def test_the_command_line_speaks_the_template(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    chat_tokenizer("none").save_pretrained("model")
    (tmp_path / "text.txt").write_text("The capital of France is Paris, and the river is long.\n\n" * 200)
    record = {"prompt": "Where is {}?", "subject": "Ada", "target_new": "Rome", "target_true": "Spain"}
    (tmp_path / "edits.json").write_text(json.dumps([record]))
    common = ["--model", "model", "--moments-corpus", "text.txt", "--set", "steps=2", "--chat", "--system", "Be short."]
    words = ["edit", *common, "--edits", "edits.json", "--contexts", "mixed", "--out", "e.safetensors"]
    assert main(words) in (0, 3), capsys.readouterr().err
    (edit,) = kedit.EditPatch.load("e.safetensors").provenance["edits"]
    assert (edit["in_chat"], edit["system"]) == (True, "Be short.")
    assert "'Where is Ada?' in a chat -> 'Rome'" in kedit.EditPatch.load("e.safetensors").show()
    assert main(["eval", *common, "--data", "edits.json"]) == 0, capsys.readouterr().err
    attach = ["patch", "attach", "e.safetensors", "--model", "model", "--prompt", "Where is Ada?", "--chat"]
    assert main([*attach, "--system", "Be short."]) == 0, capsys.readouterr().err
    assert main([*attach[:-1], "--system", "Be short."]) == 1
    assert "Add --chat" in capsys.readouterr().err
    (tmp_path / "chat.json").write_text(
        json.dumps([{**record, "chat": "true", "rephrase_prompt": "In which city is {}?"}])
    )
    (case,) = load_cases("chat.json").cases
    assert case.edit.in_chat
    assert all(probe.in_chat for probe in case.probes)
