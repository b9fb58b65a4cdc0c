"""Texts of strangers are shown as the texts they are: in pages, in CSV and in JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

Bbn = Callable[..., Any]
Forge = Callable[..., Any]

TEXTS = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "' onmouseover='alert(1)", '" autofocus="',
    "javascript:alert(1)", "{{ 7 * 7 }}{% include 'x' %}", "=cmd()|'/c calc'!A1", "+1+1", "-1+1", "@SUM(A1)",
    r"\input{/etc/passwd}", r"$\write18{id}$", "a,b;c\"d'e", "&lt;b&gt;", "‹ä木马›",
]  # fmt: skip

TEXT_THAT_IS_A_LINK = "https://example.org/?a=1&b=2"


class Page(HTMLParser):
    """What a browser makes of a page: its tags, their attributes, and its texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def write_everywhere(forged: Any, text: str) -> Path:
    """A submission with `text` wherever a stranger may write one."""
    forged.manifest["defense"] |= {"name": text, "label": text, "params": {text: text}}
    forged.manifest |= {"authors": text, "paper": text, "code": text}
    for cell in forged.keys:
        record = forged.record(cell)
        for axis in record["axes"].values():
            axis["label"] = axis["name"] = text
        forged.write_record(cell, record)
    folder: Path = forged.seal()
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_texts(text: str, forge: Forge, bbn: Bbn) -> None:
    """Pages have the tags and attributes that they have for a harmless text, and show this one."""
    pages = {}
    for name, shown in (("harmless", "harmless"), ("hostile", text)):
        said = bbn("leaderboard", "build", write_everywhere(forge(to=name), shown), "--output", f"of {name}")
        assert (said.code, said.err) == (0, "")
        paths = sorted(Path(f"of {name}").rglob("*.html"), key=lambda page: (page.name != "index.html", page.parts))
        assert all(re.fullmatch(r"[a-z0-9-]+", page.stem) for page in paths)
        pages[name] = [Page(page.read_text()) for page in paths]
    assert len(pages["hostile"]) == 3
    for harmless, hostile in zip(*pages.values(), strict=True):
        assert hostile.tags == harmless.tags
        assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
        links = [value for name, value in hostile.attributes if name == "href"]
        assert all(re.fullmatch(r"#main|[a-z0-9./-]+\.(html|csv|json)", link) for link in links)
    for page in pages["hostile"][1:]:
        assert any(text in shown for shown in page.texts)
    rows = list(csv.reader(io.StringIO((Path("of hostile") / "tiny-v1" / "standings.csv").read_text())))
    assert rows[1][1] == (f"'{text}" if text[0] in "=+-@" else text)
    assert json.loads((Path("of hostile") / "tiny-v1" / "standings.json").read_text())[0]["defense"] == text


@pytest.mark.parametrize("text", [TEXT_THAT_IS_A_LINK, "https://a b", "https://x'y", "http://x", "https:x"])
def test_links_lead_to_the_web_only(text: str, forge: Forge, bbn: Bbn) -> None:
    assert bbn("leaderboard", "build", write_everywhere(forge(), text)).code == 0
    (page,) = (page for page in Path("site/tiny-v1").glob("*.html") if page.stem != "index")
    links = [value for name, value in Page(page.read_text()).attributes if name == "href" and "//" in value]
    assert links == ([text] * 3 if text == TEXT_THAT_IS_A_LINK else [])
