"""`kedit ui` over HTTP in this process: edits, undoing, the patch, and who is refused."""

import http.client
import json
import re
import threading

import pytest
import torch

import kedit
from kedit.cli import main
from kedit.cli.ui import server as serving
from kedit.cli.ui.server import HEADER, Server
from kedit.cli.ui.session import Session, _Running
from kedit.errors import ArchitectureError

FACT = {"prompt": "{} works as a", "subject": "Hulqui Gossam", "target_new": "pilot"}
OTHER = {"prompt": "{} lives in", "subject": "Nil Macor", "target_new": "<b>Lodz</b>"}


def load(name):
    if name is not None:
        raise ArchitectureError(f"no model {name!r}")
    return kedit.load()


@pytest.fixture(scope="module")
def server():
    session = Session(load, lambda model, tokenizer, _: (kedit.ROME(model, tokenizer, steps=6), ["a note"]))
    session.load(None)
    with Server(session) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    """POST as the page does; the model has no edits before and after a test."""

    def send(path, body=None, method="POST", raw=None, **headers):
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        own = {
            "Content-Type": "application/json",
            HEADER: server.token,
            "Origin": f"http://{server.server_address[0]}:{server.server_address[1]}",
        }
        sent = {key: value for key, value in {**own, **headers}.items() if value is not None}
        connection.request(method, path, json.dumps(body or {}) if raw is None else raw, sent)
        reply = connection.getresponse()
        content, kind = reply.read(), reply.headers.get_content_type()
        connection.close()
        return reply.status, json.loads(content) if kind == "application/json" else content, reply.headers

    yield send
    server.session.load(None)


def weights(server):
    return [parameter.detach().clone() for parameter in server.session.model.parameters()]


def test_an_edit_is_shown_kept_downloaded_and_undone(server, ask, tmp_path):
    before = weights(server)
    status, state, _ = ask("/edit", {**FACT, "questions": ["Nil Macor works as a", " "]})
    assert status == 200
    shown = state["pending"]
    assert [cells[0] for cells in shown["answers"]] == ["Hulqui Gossam works as a", "Nil Macor works as a"]
    assert shown["probability"][1] > shown["probability"][0]
    first, last = shown["subject"]
    assert "".join(shown["tokens"][first : last + 1]).strip() == "Hulqui Gossam"
    maps = torch.tensor(shown["attention"])
    assert maps.shape == (2, 6, len(shown["tokens"]))
    assert not torch.equal(maps[0], maps[1])
    assert state["notes"] == ["a note"]
    assert ask("/edit", OTHER)[:2] == (400, {"error": "An edit waits to be kept or undone. Do that first."})
    assert ask("/keep")[1]["kept"] == ["Hulqui Gossam works as a → pilot"]
    assert ask("/edit", OTHER)[1]["pending"]["target"] == "<b>Lodz</b>"
    ask("/keep")
    status, data, headers = ask("/patch")
    assert (status, headers["Content-Disposition"]) == (200, 'attachment; filename="edit.safetensors"')
    (tmp_path / "edit.safetensors").write_bytes(data)
    patch = kedit.EditPatch.load(tmp_path / "edit.safetensors")
    assert [edit["target_new"] for edit in patch.provenance["edits"]] == ["pilot", "<b>Lodz</b>"]
    model = kedit.load()[0]
    patch.apply(model)
    assert all(map(torch.equal, model.parameters(), weights(server)))
    assert ask("/undo", {"number": 0})[1]["kept"] == ["Nil Macor lives in → <b>Lodz</b>"]
    ask("/undo", {"number": 0})
    assert all(map(torch.equal, before, weights(server)))
    assert ask("/patch")[:2] == (400, {"error": "No edit is kept, so there is no patch. Keep one first."})


def test_the_edit_that_waits_is_undone(server, ask):
    before = weights(server)
    answer = ask("/ask", {"prompt": "Hulqui Gossam works as a"})[1]
    assert ask("/edit", FACT)[0] == 200
    assert not all(map(torch.equal, before, weights(server)))
    assert ask("/undo")[1]["pending"] is None
    assert all(map(torch.equal, before, weights(server)))
    assert ask("/ask", {"prompt": "Hulqui Gossam works as a"})[1] == answer
    assert ask("/undo")[0] == 400
    assert ask("/undo", {"number": 7})[0] == 400


@pytest.mark.parametrize("where", ["second moments", "optimisation steps", "checking", "last"])
def test_a_cancelled_edit_leaves_the_model_as_it_was(server, ask, monkeypatch, tmp_path, where):
    before, seen, told = weights(server), [], []
    watch, finish = _Running.watch, _Running.finish

    def cancel():
        assert ask("/state")[1]["busy"]
        seen.append(ask("/progress")[1]["progress"])
        assert ask("/cancel")[:2] == (200, {"progress": "cancelling"})

    def watched(self, what, done, total):
        try:
            watch(self, what, done, total)
        finally:
            told.append((what, done))
            late = where != "checking" or ("optimisation steps", 0) in told  # it checks before and after it writes
            if what == where and late and not seen and done == (3 if where == "optimisation steps" else 0):
                cancel()

    def finished(self):
        if where == "last":
            cancel()
        finish(self)

    monkeypatch.setattr(_Running, "watch", watched)
    monkeypatch.setattr(_Running, "finish", finished)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))  # so that the second moments are estimated
    status, state, _ = ask("/edit", FACT)
    assert (status, state["cancelled"], state["pending"], state["kept"]) == (200, True, None, [])
    assert len(seen) == 1
    assert where == "last" or seen[0].startswith(f"{where}: ")
    assert all(map(torch.equal, before, weights(server)))
    assert not kedit.Ledger.of(server.session.model).owners
    assert ask("/progress")[1] == {"progress": None}
    assert ask("/cancel")[0] == 400
    monkeypatch.undo()
    status, state, _ = ask("/edit", FACT)  # the same session goes on
    assert (status, "cancelled" in state) == (200, False)
    assert state["pending"]["probability"][1] > 0.5


def test_the_page_has_no_foreign_part_and_tells_its_token_to_its_reader_alone(server, ask):
    assert ask("/", method="GET", Origin=None)[0] == 403
    assert ask("/?token=x", method="GET")[0] == 403
    assert ask("/other", method="GET")[0] == 404
    status, page, headers = ask(f"/?token={server.token}", method="GET", Origin=None)
    text = page.decode()
    assert status == 200
    assert text.count(server.token) == 1
    assert "@" not in re.sub(r"@media", "", text)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert f'<script nonce="{nonce}">' in text
    assert not re.search(r"(src|href)=\"(?!data:)|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert nonce not in ask(f"/?token={server.token}", method="GET", Origin=None)[1].decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({HEADER: None}, 403),
        ({HEADER: "wrong"}, 403),
        ({HEADER: "\xe9"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Length": "99999999"}, 400),
        ({"Content-Length": "-1"}, 400),
        ({"Origin": None}, 200),
    ],
    ids=str,
)
def test_others_are_refused(ask, headers, status):
    assert ask("/state", **headers)[0] == status


def test_requests_that_are_none(ask):
    for raw in ("[", "[]", "[" * 50_000, "3"):
        assert ask("/state", raw=raw)[0] == 400
    assert ask("/nothing")[0] == 400
    assert ask("/state", method="OPTIONS")[0] == 501
    assert ask("/edit", {**FACT, "subject": 3})[:2] == (400, {"error": "subject is missing. Fill the field."})
    assert ask("/edit", {**FACT, "questions": "x"})[0] == 400
    assert "chat template" in ask("/edit", {**FACT, "chat": True})[1]["error"]
    assert ask("/load", {"name": "none"})[:2] == (400, {"error": "no model 'none'"})
    assert ask("/state")[1]["model"].startswith("kedit-embedded")


def test_one_at_a_time(server, ask):
    with server.session._alone():
        assert ask("/edit", FACT)[:2] == (409, {"error": "The model is at work. Wait until it has finished."})
        assert ask("/state")[1]["busy"] is True


def test_an_unforeseen_error_is_told_without_its_details(server, ask, monkeypatch, caplog):
    monkeypatch.setitem(serving._ACTIONS, "/keep", lambda *_: 1 / 0)
    assert ask("/keep")[:2] == (500, {"error": "This failed; the terminal says why."})
    assert "ZeroDivisionError" in caplog.text


def test_the_command_serves_on_this_machine_until_it_is_interrupted(monkeypatch, capsys):
    made = []

    def serve(server):
        made.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", serve)
    assert main(["-q", "ui", "--port", "0"]) == 0
    assert re.search(r"page: http://127\.0\.0\.1:\d+/\?token=[\w-]{32}\n", capsys.readouterr().out)
    assert made[0].server_address[0] == "127.0.0.1"
    assert main(["-q", "ui", "--port", "70000"]) == 1
    assert "--port is a number" in capsys.readouterr().err
