"""The page and a browser's EventSource, in a real browser where one is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from layerwise.serve import http
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack
from tests.serve.browser import BROWSER, Browser
from tests.serve.served import Served
from tests.serve.test_http import call

browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser")
EVENTS = """<pre id=out></pre><script>
const out = document.getElementById("out"), source = new EventSource("/v1/stream?prompt=Hi&max_tokens=40")
source.onmessage = event => {
  if (event.data === "[DONE]") { source.close(); document.title = "done" }
  else out.textContent += JSON.parse(event.data).choices[0].delta.content ?? ""
}
source.onerror = () => { source.close(); document.title = "error" }
</script>"""


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    status, found, headers = call(f"{served.url}/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", found["text"]) and "http" not in found["text"]


@browser
def test_the_page_holds_a_conversation(served: Served, tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]], tokens: int) -> str:
        given: Any = messages
        [choice] = served.client().chat.completions.create(
            model="tiny", messages=given, temperature=0, max_tokens=tokens).choices
        return choice.message.content or ""

    first = [{"role": "user", "content": "Hi <b>"}]
    with Browser(tmp_path) as page:
        page.open(f"{served.url}/")
        page.until("document.title == 'tiny'")
        for said in ("Hi <b>", "and?"):
            page.value("document.getElementById('state').textContent = '', document.getElementById('most').value = 16, "
                       f"document.getElementById('say').value = '{said}', document.getElementById('send').click()")
            page.until("document.getElementById('state').textContent.includes('tokens/s')")
            page.value("document.getElementById('most').value = 0, document.getElementById('say').value = 'lost', "
                       "document.getElementById('send').click()")
            page.until("document.querySelector('.turn.error') !== null && !document.getElementById('send').disabled")
            assert page.value("document.getElementById('say').value") == "lost"
            page.value("document.querySelectorAll('.turn.error').forEach(turn => turn.remove())")
        shown = page.value("[...document.querySelectorAll('.turn')].map(turn => turn.textContent)")
        page.open(f"{served.url}/?ask=Hi")
        page.until("document.querySelector('.turn.assistant')?.textContent != ''")
    one = answer(first, 16)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "and?"}]
    assert shown == ["Hi <b>", one, "lost", "and?", answer(second, 16), "lost"]


@browser
def test_eventsource_streams(
    served: Served, talker: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.html").write_text(EVENTS)
    monkeypatch.setattr(http, "PAGE", tmp_path / "page.html")
    [expected] = Engine(talker, cache_tokens=1024).generate(["[user]Hi\n[assistant]"], Params(max_tokens=40))
    with Browser(tmp_path / "profile") as page:
        page.open(served.url)
        page.until("document.title != ''")
        assert page.value("document.title") == "done"
        assert page.value("document.getElementById('out').textContent") == expected.text != ""
