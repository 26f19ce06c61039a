"What the index notebook cannot say about itself: odd questions, other processes, servers, real text."
import contextlib, json, multiprocessing, os, shutil, signal, threading, warnings

import pytest
from fake_qdrant import FakeQdrant, real_qdrant
from nodes import environment, ray_nodes
from passages import DOCUMENTS, DRCD, MOUNTAIN, RAILWAY, RIVER, needs_drcd, split
from qdrant_client import QdrantClient, models

import kyara.collection
import kyara.index
from kyara.cluster import RayEngine
from kyara.core import UserError, read_rows, start_stage
from kyara.corpus import read_documents
from kyara.index import KnowledgeBase, build_index, gold_ranks, retrieval_quality, squad_questions

@pytest.fixture(scope='module')
def drcd():
    return split(read_documents(DRCD))[0]

WAIT = 900 # Seconds for another process, however slow the machine

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

def test_another_mean_length_writes_all_points_anew(tmp_path):
    KnowledgeBase.build(DOCUMENTS, tmp_path / 'kb').close()
    longer = [*DOCUMENTS, *({'doc_id': f'd{number}', 'title': '', 'text': f'第{number}篇。' + '嘉南平原的稻田一望無際。' * 20} for number in range(9))]
    with KnowledgeBase.build(longer, tmp_path / 'kb') as kb, KnowledgeBase.build(longer) as fresh:
        assert kb.state == fresh.state and kb.search('嘉義市的鐵路') == fresh.search('嘉義市的鐵路')
    state = json.loads((tmp_path / 'kb/index.json').read_text())
    (tmp_path / 'kb/index.json').write_text(json.dumps({**state, 'average': 0.0, 'complete': False}))
    with KnowledgeBase.build(longer, tmp_path / 'kb') as kb: assert kb.state == state, 'left off halfway'

def test_an_interrupted_build_is_refused_and_goes_on(tmp_path):
    def breaks_off():
        yield from DOCUMENTS[:2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): KnowledgeBase.build(breaks_off(), tmp_path)
    with pytest.raises(UserError, match='interrupted'): KnowledgeBase.open(tmp_path)
    assert len(KnowledgeBase.build(DOCUMENTS, tmp_path)) == 3

def many(count):
    return [{'doc_id': f'd{number}', 'title': f'第{number}號車站', 'text': f'第{number}號車站位於第{number // 7}區，{number}公尺長，附近有{title}。',
             'source': 'ab'[number % 2]} for number, title in zip(range(count), ['玉山', '濁水溪', '阿里山林業鐵路'] * count)]

def test_parts_that_other_processes_index_score_as_if_written_here(tmp_path, monkeypatch):
    documents, questions = many(250), [f'第{number}號車站在哪一區？' for number in range(0, 250, 5)]
    with KnowledgeBase.build(documents) as kb: expected, rows = kb.search(questions, k=3), list(kb.chunks())
    monkeypatch.setattr(kyara.index, 'PART', 30)
    monkeypatch.setattr(kyara.collection, 'SEGMENT', 60)
    with KnowledgeBase.build(documents, tmp_path, embedding='hashing:32') as kb:
        assert kb.search(questions, k=3, by='sparse') == expected and list(kb.chunks()) == rows
        assert len(list((tmp_path / 'shard/segments').iterdir())) >= 4 and not (tmp_path / 'parts').exists()
    with KnowledgeBase.open(tmp_path) as kb: assert gold_ranks(kb, [(question, f'd{5 * n}') for n, question in enumerate(questions)], 3, 'sparse').count(1) == 50
    with KnowledgeBase.build(documents, tmp_path / 'open') as kb, KnowledgeBase.build(documents[:150], tmp_path / 'open') as fewer:
        assert fewer.store is kb.store and len(list(fewer.chunks())) == 150
    with KnowledgeBase.build(documents[100:], tmp_path, embedding='hashing:32') as kb: assert list(kb.chunks()) == [row for row in rows if int(row['doc_id'][1:]) >= 100]

def test_a_part_whose_process_is_killed_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(kyara.index, 'PART', 100)
    monkeypatch.setattr(kyara.collection, 'SEGMENT', 100)
    monkeypatch.setattr(kyara.collection, 'usable_processors', lambda: 2)
    def stream():
        for number, document in enumerate(many(750)):
            if number == 650: os.kill(started[0].process.pid, signal.SIGKILL)
            yield document
    started, original = [], kyara.collection.Indexer.__init__
    monkeypatch.setattr(kyara.collection.Indexer, '__init__', lambda self, folder: (original(self, folder), started.append(self)) and None)
    with pytest.raises(UserError, match='a process that was indexing died') as failure: KnowledgeBase.build(stream(), tmp_path)
    assert failure.tb and not (tmp_path / 'parts').exists(), 'the store is still open here, and half a part is gone'
    assert all(indexer.process.poll() is not None for indexer in started), 'no process is left'
    with pytest.raises(UserError, match='interrupted'): KnowledgeBase.open(tmp_path)
    store, written = kyara.collection.open_store(tmp_path), []
    kept = len(list(store.rows()))
    for name in ('put', 'put_part'):
        monkeypatch.setattr(store, name, lambda rows, *more, put=getattr(store, name): written.extend(rows) or put(rows, *more))
    with KnowledgeBase.build(many(750), tmp_path) as kb: assert len(list(kb.chunks())) == 750
    assert kept in (400, 500) and len(written) == 750 - kept, 'what was finished is not done again'

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

@pytest.mark.parametrize(('largest', 'told'), [(2, ['a Qdrant server (qdrant:NAME) serves 3 chunks better']), (3, [])])
def test_a_corpus_too_large_for_a_folder_is_told_of_the_server_once(monkeypatch, largest, told):
    monkeypatch.setattr(kyara.index, 'LARGEST', largest)
    with warnings.catch_warnings(record=True) as caught: KnowledgeBase.build(DOCUMENTS).close()
    assert [str(warning.message) for warning in caught if 'server' in str(warning.message)] == told

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
        got = answer.get(timeout=WAIT)
        process.join()
        assert got == expected or expected in str(got), got
        kb.close()

# Without the engine, and with a server

def test_local_mode_stands_in_and_says_so(tmp_path, monkeypatch):
    KnowledgeBase.build(DOCUMENTS, tmp_path / 'edge').close()
    expected = [hit.id for hit in KnowledgeBase.build(DOCUMENTS).search('臺灣最長的河川')[0]]
    monkeypatch.setattr(kyara.collection, 'has_engine', lambda: False)
    with pytest.warns(UserWarning, match='local mode'), KnowledgeBase.build(DOCUMENTS, tmp_path / 'kb') as kb:
        assert [hit.id for hit in kb.search('臺灣最長的河川')[0]] == expected
    with pytest.warns(UserWarning, match='local mode'), KnowledgeBase.open(tmp_path / 'kb') as kb:
        assert len(kb) == len(list(kb.chunks())) == 3
        assert kb.search('？') == [[]] and [hit.doc_id for hit in kb.search('山', sources=['none'])[0]] == []
    with pytest.raises(UserError, match='made by qdrant-edge'): KnowledgeBase.open(tmp_path / 'edge')

@contextlib.contextmanager
def qdrant_server(kind, folder, monkeypatch):
    monkeypatch.setenv('KYARA_SETTINGS', str(folder / 'settings.ini'))
    (folder / 'settings.ini').write_text('[qdrant]\nurl = http://127.0.0.1:1\napi_key_env = KYARA_TEST_QDRANT\n')
    monkeypatch.setenv('KYARA_TEST_QDRANT', 'secret-7')
    if kind == 'real' and not shutil.which('qdrant'): pytest.skip('no server: there is no `qdrant` on PATH')
    if kind == 'real':
        with real_qdrant(folder / 'server', 'secret-7') as url: yield url
    else:
        with FakeQdrant('secret-7') as server: yield server.url

@pytest.mark.parametrize('kind', ['imitation', 'real'])
def test_a_server_gives_what_the_folder_gives(tmp_path, monkeypatch, kind):
    documents = [{**MOUNTAIN, 'source': 'a'}, {**RIVER, 'source': 'b'}, {**RAILWAY, 'source': 'b'}]
    questions = ['最高的山', '铁路的轨距', '臺灣', '？']
    with KnowledgeBase.build(documents, embedding='hashing:64') as kb:
        expected = {way: [[hit.id for hit in hits] for hits in kb.search(questions, by=way)] for way in kb.ways()}
        filtered = kb.search('臺灣', sources=['b'])[0]
    with qdrant_server(kind, tmp_path, monkeypatch) as url:
        place = f'{url}/kyara'
        KnowledgeBase.build(documents, place, embedding='hashing:64').close()
        with KnowledgeBase.open(place) as kb:
            assert {way: [[hit.id for hit in hits] for hits in kb.search(questions, by=way)] for way in kb.ways()} == expected
            assert [(hit.id, hit.text) for hit in kb.search('臺灣', sources=['b'])[0]] == [(hit.id, hit.text) for hit in filtered]
        with monkeypatch.context() as forbidding:
            forbidding.setattr(kyara.collection.ClientStore, 'write_state', None) # Would be called before and after each write
            KnowledgeBase.build(documents, place, embedding='hashing:64').close()
        with KnowledgeBase.build(documents[:2], place, embedding='hashing:64') as kb: assert len(list(kb.chunks())) == len(kb) == 2
        with pytest.warns(UserWarning, match='insecure'): theirs = QdrantClient(url=url, api_key='secret-7', check_compatibility=False)
        theirs.create_collection('theirs', {}, sparse_vectors_config={})
        theirs.upsert('theirs', [models.PointStruct(id=7, vector={}, payload={'text': '別人的資料'})])
        with pytest.raises(UserError, match='theirs .* that Kyara did not make'): KnowledgeBase.build(documents, f'{url}/theirs')
        assert theirs.count('theirs').count == 1, 'nobody else loses anything'
        with pytest.raises(UserError, match='no collection other'): KnowledgeBase.open(f'{url}/other')
        monkeypatch.setenv('KYARA_TEST_QDRANT', 'wrong')
        with pytest.raises(UserError, match='refuses the key') as error: KnowledgeBase.open(place)
        assert 'wrong' not in str(error.value)
    with pytest.raises(UserError, match='no Qdrant server answers'): KnowledgeBase.open('http://127.0.0.1:9/kyara')

@pytest.mark.parametrize('kind', ['imitation', 'real'])
def test_a_server_holds_a_larger_corpus_as_a_folder_does(tmp_path, monkeypatch, kind):
    documents, questions = many(1500), [f'第{number}號車站在哪一區？' for number in range(0, 1500, 100)]
    with KnowledgeBase.build(documents) as kb: expected = kb.search(questions, k=1), list(kb.chunks())
    with qdrant_server(kind, tmp_path, monkeypatch) as url, KnowledgeBase.build(documents, f'{url}/kyara') as kb:
        assert list(kb.chunks()) == expected[1], 'batches in any order'
        assert [hits[0].id for hits in kb.search(questions, k=1)] == [hits[0].id for hits in expected[0]]

def test_batches_for_a_server_are_under_way_together_but_not_without_bound(tmp_path):
    together = threading.Barrier(kyara.collection.UPSERTS)
    def trouble(number, moment): # Number 1 is the state; then a full round of batches waits for each other
        if moment == 'before' and 2 <= number <= 1 + kyara.collection.UPSERTS: together.wait(timeout=120)
    with FakeQdrant(trouble=trouble) as server, KnowledgeBase.build(many(2000), f'{server.url}/kyara') as kb:
        assert len(list(kb.chunks())) == 2000 and server.most == kyara.collection.UPSERTS
        assert server.upserts == 12, 'ten batches, and the state before and after'

def test_what_a_broken_connection_swallowed_is_sent_again(tmp_path, monkeypatch):
    monkeypatch.setattr(kyara.collection, 'PAUSES', (0.01,) * 5)
    breaks = {(1, 'before'): True, (3, 'before'): True, (4, 'after'): True, (6, 'after'): True, (7, 'before'): 503}
    with KnowledgeBase.build(many(900)) as kb: expected = list(kb.chunks())
    with FakeQdrant(trouble=lambda number, moment: breaks.get((number, moment))) as server:
        with KnowledgeBase.build(many(900), f'{server.url}/kyara') as kb: assert list(kb.chunks()) == expected
        assert server.upserts == 7 + len(breaks), 'five batches, the state twice, and what broke off'
    with FakeQdrant(trouble=lambda number, moment: number > 3) as server:
        with pytest.raises(UserError, match='no Qdrant server answers'): KnowledgeBase.build(many(900), f'{server.url}/kyara')
        with pytest.raises(UserError, match='interrupted; run it again'): KnowledgeBase.open(f'{server.url}/kyara')
        server.trouble = lambda number, moment: None
        with KnowledgeBase.build(many(900), f'{server.url}/kyara') as kb: assert list(kb.chunks()) == expected
        server.trouble = lambda number, moment: 507
        with pytest.raises(UserError, match=r'refuses upsert on kyara \(507\)'): KnowledgeBase.build(many(9), f'{server.url}/kyara')

def test_a_server_must_be_named(tmp_path, monkeypatch):
    settings = tmp_path / 'settings.ini'
    settings.write_text('[qdrant]\napi_key_env = KYARA_TEST_MISSING_KEY\n')
    monkeypatch.setenv('KYARA_SETTINGS', str(settings))
    with pytest.raises(UserError, match='names no server'): KnowledgeBase.open('qdrant:kyara')
    settings.write_text('[qdrant]\nurl = http://127.0.0.1:9\napi_key_env = KYARA_TEST_MISSING_KEY\n')
    with pytest.raises(UserError, match='KYARA_TEST_MISSING_KEY'): KnowledgeBase.open('qdrant:kyara')
    settings.write_text('')
    for url in ('http://[::1', 'http://127.0.0.1:99999'):
        with pytest.raises(UserError, match='is no address'): KnowledgeBase.open(f'{url}/kyara')

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

def test_the_stage_keeps_what_is_indexed_and_starts_anew_with_other_settings(tmp_path, monkeypatch):
    source, out = tmp_path / 'a.jsonl', tmp_path / 'out'
    written = []
    monkeypatch.setattr(kyara.collection, 'put_points', lambda shard, rows, *more, put=kyara.collection.put_points:
                        (written.extend(row['title'] for row in rows), put(shard, rows, *more)))
    def stage(documents, chunk_size=400):
        source.write_text('\n'.join(json.dumps(document) for document in documents), encoding='utf-8')
        written.clear()
        build_index([str(source)], start_stage(out, keep=('qdrant',)), chunk_size=chunk_size)
        return written[:]
    assert stage(DOCUMENTS) == ['玉山', '濁水溪', '阿里山林業鐵路'] and stage(DOCUMENTS) == []
    before = (out / 'knowledge_base.json').read_bytes()
    assert stage([MOUNTAIN, RIVER, {**RAILWAY, 'text': RAILWAY['text'].replace('762', '763')}]) == ['阿里山林業鐵路']
    assert (out / 'knowledge_base.json').read_bytes() != before
    assert stage(DOCUMENTS) == ['阿里山林業鐵路'] and (out / 'knowledge_base.json').read_bytes() == before
    assert len(stage(DOCUMENTS, chunk_size=20)) == 6
    with KnowledgeBase.open(out) as kb: assert kb.state['settings']['chunk_size'] == 20
    with KnowledgeBase.open(out) as kb, pytest.raises(SystemExit):
        answer = multiprocessing.get_context('spawn').Queue()
        process = multiprocessing.get_context('spawn').Process(target=_stage_elsewhere, args=(source, out, answer))
        process.start()
        assert 'open in another process' in answer.get(timeout=WAIT)
        process.join()
        assert len(list(kb.chunks())) == 6, 'nothing was removed'
        raise SystemExit

def _stage_elsewhere(source, out, answer):
    try: build_index([str(source)], out)
    except UserError as error: answer.put(str(error))

def test_hostile_text_is_indexed_and_found(tmp_path):
    texts = ['第一列\x00\x07有控制字元的玉山文章。', '半個代理字 \ud83d 的濁水溪文章。', '臺灣台湾混用兩種字體的阿里山文章。',
             'مرحبا بالعالم שלום 右到左的日月潭文章。', '一行很長的嘉南大圳文章，' + ''.join(f'第{number}區稻田' for number in range(600_000))]
    source = tmp_path / 'a.jsonl'
    source.write_text('\n'.join(json.dumps({'doc_id': str(number), 'text': text}) for number, text in enumerate(texts)))
    counts = build_index([str(source)], start_stage(tmp_path / 'out'))
    assert counts['kept'] == 4 and counts['chunks'] > 4000 and len(texts[4].encode()) > 10_000_000
    assert [row['drop_reason'] for row in read_rows(tmp_path / 'out', 'dropped')] == ['bad_encoding'], 'half a surrogate pair'
    with KnowledgeBase.open(tmp_path / 'out') as kb:
        found = kb.search(['玉山\ud83d', '阿里山', 'שלום', '嘉南大圳', '\u202e日月潭\x00', '第345678區'], k=1)
        assert [hits[0].doc_id for hits in found] == ['0', '2', '3', '4', '3', '4'] and '345678' in found[5][0].text

# Meaning

def test_an_embedding_model_adds_a_dense_vector(tmp_path):
    sentence_transformers = pytest.importorskip('sentence_transformers')
    from transformers import BertConfig, BertModel, BertTokenizer
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *dict.fromkeys(''.join(row['title'] + row['text'] for row in DOCUMENTS))]
    (tmp_path / 'bert').mkdir()
    (tmp_path / 'bert/vocab.txt').write_text('\n'.join(words))
    BertTokenizer(str(tmp_path / 'bert/vocab.txt')).save_pretrained(tmp_path / 'bert')
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(tmp_path / 'bert')
    from sentence_transformers.sentence_transformer import modules
    transformer = modules.Transformer(str(tmp_path / 'bert'))
    sentence_transformers.SentenceTransformer(modules=[transformer, modules.Pooling(32)]).save(str(tmp_path / 'model'))
    with KnowledgeBase.build(DOCUMENTS, tmp_path / 'kb', embedding=str(tmp_path / 'model'), dimensions=16) as kb:
        assert kb.ways() == ['sparse', 'dense', 'fused'] and kb.state['settings']['dimensions'] == 16
        assert len(kb.search('最高的山', by='dense')[0]) == 3 and kb.search('？！', by='dense') == [[]]
        assert [hit.doc_id for hit in kb.search(DOCUMENTS[1]['title'] + '\n' + DOCUMENTS[1]['text'])[0]][0] == 'zhuoshui'
    with KnowledgeBase.open(tmp_path / 'kb') as kb, pytest.raises(UserError, match='sparse, dense, fused'): kb.search('山', by='meaning')
    with pytest.raises(UserError, match='no/such/model cannot be loaded'): KnowledgeBase.build(DOCUMENTS, embedding=str(tmp_path / 'no/such/model'))

def test_every_passage_gets_its_own_vector():
    documents = many(600) # More than one shard
    pairs = [(f"{row['title']}\n{row['text']}", row['doc_id']) for row in documents[::40]]
    with KnowledgeBase.build(documents, embedding='hashing:256') as kb: assert set(gold_ranks(kb, pairs, 1, 'dense')) == {1}

def test_workers_of_a_cluster_make_the_same_vectors(tmp_path, monkeypatch):
    pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    worked, real = [], RayEngine.map
    monkeypatch.setattr(RayEngine, 'map', lambda engine, *rest, **how: worked.append(engine) or real(engine, *rest, **how))
    def meanings():
        with KnowledgeBase.build(many(600), embedding='hashing:16') as kb:
            return kb.search([row['text'] for row in many(600)[::60]], k=3, by='dense')
    here = meanings()
    with ray_nodes(tmp_path) as nodes, environment(KYARA_ENGINE=json.dumps({'name': 'ray', 'workers': 2, 'address': nodes.address})):
        assert not worked and meanings() == here and len(worked) == 1

def test_fused_ranks_stand_between_both_lists():
    with KnowledgeBase.build(many(60), embedding='hashing:256') as kb:
        by = {way: [hit.id for hit in kb.search('第17號車站附近的玉山', k=10, by=way)[0]] for way in kb.ways()}
    assert set(by['fused'][:5]) <= set(by['sparse'] + by['dense']) and by['sparse'] != by['dense']
    assert by['fused'][0] in (by['sparse'][0], by['dense'][0])

@needs_drcd
def test_quality_on_drcd(drcd):
    with KnowledgeBase.build(drcd, chunk=False) as kb: got = retrieval_quality(kb, squad_questions(DRCD))
    assert got['questions'] == 3524 and got['hit@1'] >= 0.960 and got['hit@10'] >= 0.998 and got['mrr@10'] >= 0.976, got
