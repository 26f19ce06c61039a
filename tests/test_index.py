"What the index notebook cannot say about itself: odd questions, other processes, servers, real text."
import json, multiprocessing, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import kyara.index
from kyara.core import UserError, read_rows, start_stage
from kyara.corpus import read_documents
from kyara.index import KnowledgeBase, build_index, retrieval_quality, squad_questions

DRCD = Path(__file__).parents[2] / 'shared/data/drcd/DRCD_dev.json.gz'
needs_drcd = pytest.mark.skipif(not DRCD.exists(), reason=f'no DRCD data at {DRCD}')
MOUNTAIN = {'doc_id': 'yushan', 'title': '玉山', 'text': '玉山是臺灣最高的山，主峰海拔3,952公尺。玉山國家公園成立於1985年。'}
RIVER = {'doc_id': 'zhuoshui', 'title': '濁水溪', 'text': '濁水溪是臺灣最長的河川，全長約186公里。濁水溪注入臺灣海峽。'}
RAILWAY = {'doc_id': 'alishan', 'title': '阿里山林業鐵路', 'text': '阿里山林業鐵路連接嘉義市與阿里山。鐵路的軌距為762公釐。'}
DOCUMENTS = [MOUNTAIN, RIVER, RAILWAY]

def split(pairs):
    pairs = list(pairs)
    return [document for document, _ in pairs if document], [row for _, row in pairs if row]

@pytest.fixture(scope='module')
def drcd():
    return split(read_documents(DRCD))[0]

# Search

def test_search_finds_in_either_script_and_reopens(tmp_path):
    with KnowledgeBase.build(DOCUMENTS, tmp_path / 'kb') as kb: before = list(kb.chunks())
    with KnowledgeBase.open(tmp_path / 'kb') as kb:
        assert list(kb.chunks()) == before and len(kb) == 3
        found = kb.search(['铁路的轨距是多少？', '最長的河川', 'ＹＵＳＨＡＮ 1985年'], k=100)
        assert [hits[0].doc_id for hits in found] == ['alishan', 'zhuoshui', 'yushan'], 'Simplified, Traditional, full width'
        hit = found[1][0]
        assert RIVER['text'][hit.start:hit.end] == hit.text

def test_odd_questions():
    kb = KnowledgeBase.build(DOCUMENTS)
    assert kb.search(['', '？！……', '\ud800', 'zzzz'], k=3) == [[], [], [], []] and kb.search([]) == []
    assert kb.search('玉山' * 500_000, k=1)[0][0].doc_id == 'yushan', 'a question of 1 MB'
    assert kb.search('什麼是什麼？') is not None
    with pytest.raises(UserError, match='k is 0'): kb.search('玉山', k=0)

def test_whole_documents_keep_their_doc_id_and_sources_filter():
    kb = KnowledgeBase.build([{**MOUNTAIN, 'source': 'a'}, {**RIVER, 'source': 'b'}, {**RAILWAY, 'source': 'b'}], chunk=False)
    assert {hit.text for hit in kb.search('臺灣', k=9)[0]} == {MOUNTAIN['text'], RIVER['text']}
    assert [hit.doc_id for hit in kb.search('臺灣', k=9, sources=['b'])[0]] == ['zhuoshui']
    assert retrieval_quality(kb, [('最高的山', 'yushan'), ('軌距', 'alishan'), ('軌距', 'nobody')], 2) == {
        'questions': 3, 'hit@1': 0.6667, 'hit@2': 0.6667, 'mrr@2': 0.6667}

def test_the_same_corpus_changes_nothing_and_removed_documents_go(tmp_path):
    KnowledgeBase.build(DOCUMENTS, tmp_path).close()
    before = (tmp_path / 'index.json').read_bytes()
    with KnowledgeBase.build(DOCUMENTS, tmp_path) as kb: kb.store.put = None
    assert (tmp_path / 'index.json').read_bytes() == before
    with KnowledgeBase.build([MOUNTAIN, {**RIVER, 'text': '濁水溪改了內文。'}], tmp_path) as kb:
        assert sorted(row['text'] for row in kb.chunks()) == sorted([MOUNTAIN['text'], '濁水溪改了內文。'])

def test_an_interrupted_build_is_refused_and_goes_on(tmp_path):
    def breaks_off():
        yield from DOCUMENTS[:2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): KnowledgeBase.build(breaks_off(), tmp_path)
    with pytest.raises(UserError, match='interrupted'): KnowledgeBase.open(tmp_path)
    assert len(KnowledgeBase.build(DOCUMENTS, tmp_path)) == 3

def test_other_settings_or_another_version_are_refused(tmp_path):
    KnowledgeBase.build(DOCUMENTS, tmp_path).close()
    with pytest.raises(UserError, match=r'chunk_size=400 \(asked for: 100\); remove it'):
        KnowledgeBase.build(DOCUMENTS, tmp_path, chunk_size=100)
    state = json.loads((tmp_path / 'index.json').read_text())
    for change in ({'format': 0}, {'terms': 'of another tokeniser'}):
        (tmp_path / 'index.json').write_text(json.dumps({**state, **change}))
        with pytest.raises(UserError, match='another version'): KnowledgeBase.open(tmp_path)

@pytest.mark.parametrize('make', [lambda: KnowledgeBase.build(DOCUMENTS, size=3), lambda: KnowledgeBase.build(DOCUMENTS, chunk_size=0),
                                  lambda: KnowledgeBase.build([]), lambda: KnowledgeBase.open('no/such/folder')])
def test_mistakes_are_one_line(make):
    with pytest.raises(UserError) as error: make()
    assert '\n' not in str(error.value)

def _open_elsewhere(folder, answer):
    try: answer.put(len(KnowledgeBase.open(folder)))
    except UserError as error: answer.put(str(error))

def test_a_folder_open_in_another_process_is_refused(tmp_path):
    kb = KnowledgeBase.build(DOCUMENTS, tmp_path)
    assert len(KnowledgeBase.open(tmp_path)) == 3, 'the same process may open it again'
    context = multiprocessing.get_context('spawn')
    answer = context.Queue()
    for expected in ('is open in another process', 3):
        process = context.Process(target=_open_elsewhere, args=(tmp_path, answer))
        process.start()
        got = answer.get(timeout=60)
        process.join()
        assert got == expected or expected in str(got), got
        kb.close()

# Without the engine, and with a server

def test_local_mode_stands_in_and_says_so(tmp_path, monkeypatch):
    KnowledgeBase.build(DOCUMENTS, tmp_path / 'edge').close()
    expected = [hit.id for hit in KnowledgeBase.build(DOCUMENTS).search('臺灣最長的河川')[0]]
    monkeypatch.setattr(kyara.index, 'has_engine', lambda: False)
    with pytest.warns(UserWarning, match='local mode'), KnowledgeBase.build(DOCUMENTS, tmp_path / 'kb') as kb:
        assert [hit.id for hit in kb.search('臺灣最長的河川')[0]] == expected
    with pytest.warns(UserWarning, match='local mode'), KnowledgeBase.open(tmp_path / 'kb') as kb:
        assert len(kb) == len(list(kb.chunks())) == 3
        assert kb.search('？') == [[]] and [hit.doc_id for hit in kb.search('山', sources=['none'])[0]] == []
    with pytest.raises(UserError, match='made by qdrant-edge'): KnowledgeBase.open(tmp_path / 'edge')

class Forbidding(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.end_headers()
    def log_message(self, *_): pass

def test_a_server_that_is_down_or_refuses_the_key():
    with pytest.raises(UserError, match='no Qdrant server answers'): KnowledgeBase.open('http://127.0.0.1:9/kyara')
    server = HTTPServer(('127.0.0.1', 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UserError, match='refuses the key'): KnowledgeBase.open(f'http://127.0.0.1:{server.server_port}/kyara')
    server.shutdown()

def test_a_server_must_be_named(tmp_path, monkeypatch):
    settings = tmp_path / 'settings.ini'
    settings.write_text('[qdrant]\napi_key_env = KYARA_TEST_MISSING_KEY\n')
    monkeypatch.setenv('KYARA_SETTINGS', str(settings))
    with pytest.raises(UserError, match='names no server'): KnowledgeBase.open('qdrant:kyara')
    settings.write_text('[qdrant]\nurl = http://127.0.0.1:9\napi_key_env = KYARA_TEST_MISSING_KEY\n')
    with pytest.raises(UserError, match='KYARA_TEST_MISSING_KEY'): KnowledgeBase.open('qdrant:kyara')

# The stage, and real text

@pytest.mark.parametrize('content', ['', '{"text": ""}\n', 'nonsense\n'])
def test_corpus_without_text_is_refused(tmp_path, content):
    (tmp_path / 'a.jsonl').write_text(content)
    with pytest.raises(UserError, match='no document with a text'):
        build_index([str(tmp_path / 'a.jsonl')], start_stage(tmp_path / 'out'))

def test_stage_writes_what_it_says_and_every_record_has_a_place(tmp_path):
    source = tmp_path / 'a.jsonl'
    source.write_text('\n'.join(json.dumps(document) for document in [*DOCUMENTS, MOUNTAIN]) + '\nbroken\n', encoding='utf-8')
    counts = build_index([str(source)], start_stage(tmp_path / 'out'), chunk_size=20)
    rows = {kind: list(read_rows(tmp_path / 'out', kind)) for kind in ('document', 'chunk', 'dropped')}
    assert counts == {'kept': 3, 'chunks': len(rows['chunk']), 'dropped': 2}
    assert sorted(row['drop_reason'] for row in rows['dropped']) == ['duplicate', 'malformed_json']
    with KnowledgeBase.open(tmp_path / 'out') as kb:
        assert sorted(row['id'] for row in kb.chunks()) == sorted(row['id'] for row in rows['chunk'])
        assert kb.search('軌距', k=1)[0][0].doc_id == 'alishan'

@needs_drcd
def test_quality_on_drcd(drcd):
    with KnowledgeBase.build(drcd, chunk=False) as kb: got = retrieval_quality(kb, squad_questions(DRCD))
    assert got['questions'] == 3524 and got['hit@1'] >= 0.95 and got['hit@10'] >= 0.995 and got['mrr@10'] >= 0.968, got
