"What the corpus notebook cannot say about itself: every reader, files that are broken, hard texts."
import gzip, json, random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kyara.core import UserError
from kyara.corpus import (chunk_document, chunk_documents, clean_text, make_document, read_documents, text_size,
                          unique_documents)
from kyara.index import point_id, squad_questions

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

# Readers

def test_jsonl_names_the_broken_line(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    lines = ['\ufeff' + json.dumps(MOUNTAIN), '{"title": "壞', '', '[1, 2]', '{"title": "無文"}', '{"text": 7}',
             json.dumps({'text': '\ud83d' + RIVER['text']})]
    path.write_bytes(gzip.compress('\n'.join(lines).encode()))
    documents, dropped = split(read_documents(path, license='CC0-1.0'))
    assert [document['text'] for document in documents] == [MOUNTAIN['text'], '\ufffd' + RIVER['text']], 'the rest of the file goes on'
    assert [(row['drop_reason'], row['evidence']) for row in dropped[:2]] == [('malformed_json', 'a.jsonl.gz line 2'),
                                                                             ('malformed_json', 'a.jsonl.gz line 4')]
    assert [row['drop_reason'] for row in dropped[2:]] == ['no_text', 'no_text']
    assert documents[0]['source'] == 'a.jsonl.gz' and documents[0]['license'] == 'CC0-1.0'

def test_wrong_encoding_is_dropped(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes('{"text": "玉山是臺灣最高的山"}\n'.encode('big5') + json.dumps(RIVER).encode())
    documents, dropped = split(read_documents(tmp_path / 'a.jsonl'))
    assert [document['doc_id'] for document in documents] == ['zhuoshui'] and len(dropped) == 1
    assert dropped[0]['drop_reason'] in ('bad_encoding', 'malformed_json'), 'depends on the bytes'

def test_title_in_meta_and_ids_that_are_not_unique():
    documents, _ = split(make_document({'id': 0, 'meta': meta, 'text': text}) for meta, text in [
        ({'title': '甲'}, '第一篇。'), ('{"title": "乙"}', '第二篇。'), ("not JSON", '第三篇。'), (None, '第四篇。')])
    assert [document['title'] for document in documents] == ['甲', '乙', '', ''] and documents[0]['doc_id'] == '0'
    kept = list(unique_documents(((document, None) for document in documents), []))
    assert [document['text'] for document in kept] == ['第一篇。', '第二篇。', '第三篇。', '第四篇。']
    assert len({document['doc_id'] for document in kept}) == 4

def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([MOUNTAIN, {**RIVER, 'text': None}]), tmp_path / 'a.parquet')
    documents, dropped = split(read_documents(tmp_path / 'a.parquet'))
    assert [document['doc_id'] for document in documents] == ['yushan'] and dropped[0]['drop_reason'] == 'no_text'

def test_squad_json(tmp_path):
    path = tmp_path / 'a.json'
    paragraphs = [{'context': RIVER['text'], 'id': 'p1', 'qas': [{'question': '濁水溪多長？'}]}, {'id': 'p2', 'qas': []}]
    path.write_text(json.dumps({'data': [{'title': '濁水溪', 'paragraphs': paragraphs}]}))
    documents, dropped = split(read_documents(path))
    assert [(document['doc_id'], document['title']) for document in documents] == [('p1', '濁水溪')]
    assert dropped[0]['drop_reason'] == 'no_text' and dropped[0]['doc_id'] == 'p2'
    assert squad_questions(path) == [('濁水溪多長？', 'p1')]

def test_folder_goes_on_after_unreadable_files(tmp_path):
    (tmp_path / 'a.txt').write_text(MOUNTAIN['text'], encoding='utf-8')
    (tmp_path / 'b.md').write_text('# 河\n' + RIVER['text'], encoding='utf-8')
    (tmp_path / 'c.txt').write_bytes('玉山'.encode('big5'))
    (tmp_path / 'd.parquet').write_bytes(b'PAR1 no')
    (tmp_path / 'e.jsonl.gz').write_bytes(gzip.compress(json.dumps(RAILWAY).encode() * 2000)[:-40])
    (tmp_path / 'f.rtf').write_text('{}')
    (tmp_path / 'g.json').write_text('{"data": ')
    (tmp_path / 'h.json').write_text('[]')
    (tmp_path / '.hidden').write_text('x')
    documents, dropped = split(read_documents(tmp_path))
    assert [document['title'] for document in documents] == ['a', 'b']
    reasons = {row['evidence'].split(':')[0].split()[0]: row['drop_reason'] for row in dropped}
    assert reasons == {'c.txt': 'unreadable_file', 'd.parquet': 'unreadable_file', 'e.jsonl.gz': 'unreadable_file', 'f.rtf': 'unknown_format',
                       'g.json': 'malformed_json', 'h.json': 'unknown_format'}

def test_hub_reader_streams_a_local_data_set(tmp_path):
    (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps(document) for document in DOCUMENTS), encoding='utf-8')
    documents, _ = split(read_documents(f'hf:{tmp_path}', max_documents=2))
    assert [document['doc_id'] for document in documents] == ['yushan', 'zhuoshui'] and documents[0]['source'] == f'hf:{tmp_path}'
    with pytest.raises(UserError, match='cannot be read'): list(read_documents(f'hf:{tmp_path}/missing/folder'))

def test_max_documents_counts_kept_ones(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": ""}\n' + '\n'.join(map(json.dumps, DOCUMENTS)), encoding='utf-8')
    documents, dropped = split(read_documents(tmp_path / 'a.jsonl', max_documents=2))
    assert len(documents) == 2 and len(dropped) == 1

@pytest.mark.parametrize('location', ['', 'no/such/file.jsonl', 'sample:nothing'])
def test_missing_corpus_is_one_line(location):
    with pytest.raises(UserError) as error: list(read_documents(location))
    assert '\n' not in str(error.value)

# Chunks

HARD_TEXTS = ['', '。', '玉山' * 3000, 'a' * 9000, '玉山\u202eעברית العربية؟ mixed 混合。\n' * 50,
              '第一句。\r\n\r\n第二句！\r第三句？' * 30, '\x00\ud83d半\x07句。' * 20,
              '# 標題\n## 小節\n內文在此。\n### 空\n', '「他說：『好。』」然後走了。' * 60, '\u3000\u3000段首空格。\n\n\n' * 40]

@pytest.mark.parametrize('chunk_size', [20, 57, 400])
@pytest.mark.parametrize('text', HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_offsets_and_nothing_lost_on_hard_text(text, chunk_size):
    document = {'text': clean_text(text)}
    assert len(document['text']) == len(text) and clean_text(document['text']) == document['text']
    check_chunks(document, chunk_size)

def check_chunks(document, chunk_size):
    text, rows = document['text'], chunk_document(document, chunk_size)
    covered = 0
    for row in rows:
        assert text[row['start']:row['end']] == row['text'], 'the offsets give the chunk'
        assert row['start'] >= covered, 'chunks do not overlap and keep their order'
        gap = [line for line in text[covered:row['start']].splitlines() if line.strip()]
        assert all(line.startswith('#') for line in gap), f'lost between chunks: {gap}'
        assert text_size(row['text']) <= chunk_size, 'the budget holds'
        covered = row['end']
    assert all(line.startswith('#') for line in text[covered:].splitlines() if line.strip()), 'lost at the end'

def test_no_stumps():
    text = ''.join(f'這是第{number}句話，長短並不相同{"，有時還要再加上一段" * (number % 4)}。' for number in range(200))
    sizes = [text_size(row['text']) for row in chunk_document({'text': text}, 200)]
    assert min(sizes) > 100, sizes

@needs_drcd
def test_offsets_on_drcd(drcd):
    for number, document in enumerate(random.Random(0).sample(drcd, 200)): check_chunks(document, (60, 150, 400)[number % 3])

def test_one_line_of_ten_megabytes():
    document = {'text': '玉山是臺灣最高的山，' * 350_000}
    rows = chunk_document(document, 400)
    assert ''.join(row['text'] for row in rows) == document['text'] and max(len(row['text']) for row in rows) <= 400

def test_ids_do_not_depend_on_company():
    alone = [row['id'] for row in chunk_documents([RIVER], [])]
    assert alone == [row['id'] for row in chunk_documents(DOCUMENTS, []) if row['doc_id'] == 'zhuoshui']
    assert point_id(alone[0]) != point_id(alone[0] + '00'), 'a lengthened id is another point'

def test_repeated_passages_are_dropped_with_the_first_one_named():
    dropped = []
    rows = list(chunk_documents([{**RIVER, 'text': RIVER['text'] + '\n' + '同一段話在此重複出現兩次而已。\n' * 2}], dropped, chunk_size=20))
    assert len({row['id'] for row in rows}) == len(rows)
    assert [row['drop_reason'] for row in dropped] == ['duplicate_chunk']
