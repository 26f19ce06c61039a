"The report: one file, nothing loaded, nothing executed, readable on a phone."
import json, re, shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kyara.core import content_hash, dialogue, drop, finish_stage, pack_meta, start_stage, write_rows, write_text
from kyara.labels import Label, save_labels
from kyara.report import report_html, write_report

EVIL = '<script>alert("玉山")</script><img src=x onerror=alert(1)>"\'&lt;[[sections]]'
CHROMIUM = next((path for name in ('chromium', 'chromium-browser') if (path := shutil.which(name))), None)

def make_run(folder, text):
    "Write a run in which every text of a corpus, a model or a user is `text`."
    chunk = {'id': 'id_27025b13', 'doc_id': text, 'title': text, 'text': f'{text}。玉山主峰海拔3,952公尺。', 'start': 0, 'end': 9,
             'source': text, 'license': text}
    turns = [{'role': 'system', 'content': text}, {'role': 'user', 'content': text},
             {'role': 'assistant', 'content': f'{text}玉山主峰海拔3,952公尺【id_27025b13】。玉山有4,000公尺【id_00000000】。'}]
    meta = {'source': text, 'license': text, 'lang': text, 'model': text, 'tags': [text], 'source_ids': ['id_27025b13']}
    row = dialogue(turns, text, stage='synthesis', **meta)
    pair = {'id': content_hash([text]), 'prompt': turns[:2], 'chosen': turns[2:], 'rejected': turns[2:], 'origin': text, 'meta': pack_meta(**meta)}
    index, synthesis, curation = (start_stage(folder / name) for name in ('index', 'synthesis', 'curation'))
    write_rows([chunk], index / 'chunk', 'chunk')
    finish_stage(index, 'kyara.core', {}, [], ['chunk'], {'kept': 1, 'chunks': 1})
    write_rows([row], synthesis / 'dialogue', 'dialogue')
    write_rows([pair], synthesis / 'preference', 'preference')
    write_rows([drop(row, text, text)], synthesis / 'dropped', 'dialogue', dropped=True)
    finish_stage(synthesis, 'kyara.core', {}, [], ['dialogue', 'preference', 'dropped'], {'kept': 1, 'dropped': 1})
    write_text(curation / 'README.md', f'# {text}')
    write_text(curation / 'statistics.json', json.dumps({'tasks': {text: 3}, 'languages_by_source': {text: {text: 3}}}))
    write_text(curation / 'log.json', json.dumps({'train': [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}], 'eval': []}))
    write_text(curation / 'scores.json', json.dumps({text: {text: {'score': 8.0, 'low': 2.0, 'high': 9.0, 'n': 10}}}))
    finish_stage(curation, 'kyara.core', {}, [], ['README.md', 'statistics.json', 'log.json', 'scores.json'], {'kept': 1})
    write_text(folder / 'run.json', json.dumps({'name': text, 'description': text}))
    save_labels(folder / 'labels', [Label(row['id'], 'synthesis', 'dialogue', 'accept', 'mei')])
    return row

class Elements(HTMLParser):
    "Collect the elements of a page and their attributes."
    def __init__(self):
        super().__init__()
        self.found = []
    def handle_starttag(self, tag, attributes): self.found.append((tag, dict(attributes)))

def elements(page):
    "Parse a page."
    parser = Elements()
    parser.feed(page)
    return parser.found

def test_whatever_a_corpus_holds_is_text(tmp_path):
    make_run(tmp_path / 'evil', EVIL)
    make_run(tmp_path / 'good', '玉山')
    found, expected = (elements(report_html(tmp_path / name)) for name in ('evil', 'good'))
    assert {tag for tag, _ in found} == {tag for tag, _ in expected}, 'a text made an element'
    assert not {'script', 'iframe', 'link', 'object', 'form', 'svg'} & {tag for tag, _ in found}
    assert not [name for _, attributes in found for name in attributes if name.startswith('on')]
    assert all(attributes['src'].startswith('data:image/png;base64,') for tag, attributes in found if tag == 'img')

def test_the_page_loads_nothing(tmp_path):
    make_run(tmp_path / 'demo', '玉山')
    page = write_report(tmp_path / 'demo').read_text(encoding='utf-8')
    assert not re.search(r'(?:src|href|action)="(?!data:|#)|url\(|@import|https?://', page)
    assert "default-src 'none'" in page

def test_every_part_is_there(tmp_path):
    row = make_run(tmp_path / 'demo', '玉山')
    page = report_html(tmp_path / 'demo')
    assert re.findall('<h2 id=".*?">(.*?)</h2>', page) == ['Scores', 'Funnel', 'Quality', 'Cost', 'Samples', 'Statistics', 'Training', 'Data card']
    assert f'href="#{row["id"]}-id_27025b13"' in page and f'id="{row["id"]}-id_27025b13"' in page, 'a citation leads to its document'
    assert 'class="verdict supported"' in page and 'class="verdict unknown_id"' in page and 'class="evidence"' in page

def test_a_run_reports_the_same_twice(tmp_path):
    make_run(tmp_path / 'demo', '玉山')
    assert report_html(tmp_path / 'demo') == report_html(tmp_path / 'demo')

@pytest.mark.skipif(not CHROMIUM, reason='there is no chromium; apt-get install chromium')
def test_page_on_a_phone(tmp_path):
    "Nothing sticks out at 390 pixels, no script runs, nothing is asked of the network, a citation opens its document."
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    make_run(tmp_path / 'demo', EVIL)
    path, asked = write_report(tmp_path / 'demo'), []
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 390, 'height': 844}, is_mobile=True)
        page.on('request', lambda request: asked.append(request.url))
        page.on('dialog', lambda dialog: asked.append('a script ran: ' + dialog.message))
        page.goto(path.as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        assert page.evaluate("getComputedStyle(document.body).fontSize") == '16px'
        page.locator('.sample').first.evaluate("sample => { sample.closest('details').open = true }")
        citation = page.locator('.sample a.cites').first
        citation.click()
        document = page.locator('[id="' + citation.get_attribute('href')[1:] + '"]')
        assert document.evaluate("document => document.closest('details').open"), 'the citation opens its document'
        assert [one for one in asked if not one.startswith(('file:', 'data:'))] == []
        browser.close()
