"The report: one file, nothing loaded, nothing executed, readable on a phone."
import json, re, shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kyara.core import content_hash, dialogue, drop, finish_stage, pack_meta, start_stage, write_rows, write_text
from kyara.labels import Label, save_labels
from kyara.report import difference_table, judge_table, pair_table, report_html, retrieval_table, write_report

EVIL = '<script>alert("玉山")</script><img src=x onerror=alert(1)>"\'&lt;[[sections]]'
PATIENCE = 600_000 # Milliseconds
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
    write_text(curation / 'differences.json', json.dumps([{'benchmark': text, 'first': text, 'second': text, 'difference': 6.0, 'low': 1.0, 'high': 9.0, 'n': 10}]))
    write_text(curation / 'retrieval.json', json.dumps({'questions': 5, 'hit@1': 0.8, text: text}))
    pairs = {'pairs': 3, 'chosen': 14.9, 'rejected': 4.3, 'longer_wins': 1.0, 'margin': 1.0}
    known = {'judge': text, 'pairs': 4, 'accuracy': 1.0, 'low': 0.5, 'high': 1.0}
    judged = {'pairs': 4, 'won': 3, 'first_place': 0.5, 'length': {'biased': True}}
    reviewed = {'labels': 4, 'decided': 3, 'agreed': 2 / 3, 'low': 0.2, 'high': 0.9}
    write_text(curation / 'pairs.json', json.dumps({'origins': {text: pairs}, 'calibration': known, 'judging': judged, 'reviewed': {text: reviewed}}))
    write_text(curation / 'rewards.json', json.dumps({'accuracy': {text: {'pairs': 2, 'accuracy': 0.5}}}))
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
    assert re.findall('<h2 id=".*?">(.*?)</h2>', page) == ['Scores', 'Funnel', 'Quality', 'Pairs', 'Cost', 'Samples', 'Statistics', 'Training', 'Data card']
    assert f'href="#{row["id"]}-id_27025b13"' in page and f'id="{row["id"]}-id_27025b13"' in page, 'a citation leads to its document'
    assert 'class="verdict supported"' in page and 'class="verdict unknown_id"' in page and 'class="evidence"' in page

def test_pairs_and_differences_are_told(tmp_path):
    make_run(tmp_path / 'demo', '玉山')
    assert pair_table(tmp_path / 'demo')[0] == {'stage': 'curation', 'origin': '玉山', 'pairs': 3, 'characters chosen': 14.9, 'rejected': 4.3,
                                                'longer one chosen': '100%', 'margin': 1.0, 'reviewed': 4, 'reviewers agree': '67% (20% to 90%)',
                                                'held out': 2, 'learned': '50%'}
    assert judge_table(tmp_path / 'demo')[0]['right'] == '100% (50% to 100%)'
    assert difference_table(tmp_path / 'demo')[0]['difference'] == '6.0 (1.0 to 9.0)'
    assert retrieval_table(tmp_path / 'demo')[0]['hit@1'] == 0.8

def test_a_run_without_pairs_has_no_such_section(tmp_path):
    row = make_run(tmp_path / 'demo', '玉山')
    for path in (tmp_path / 'demo/curation').glob('*.json'):
        if path.name != 'manifest.json': path.unlink()
    headings = re.findall('<h2 id=".*?">(.*?)</h2>', report_html(tmp_path / 'demo'))
    assert 'Pairs' not in headings and 'Scores' not in headings and row['id'] in report_html(tmp_path / 'demo')

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
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'], timeout=PATIENCE)
        page = browser.new_page(viewport={'width': 390, 'height': 844}, is_mobile=True)
        page.set_default_timeout(PATIENCE)
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
