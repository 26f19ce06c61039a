"What the review panel keeps: labels that survive, pages that scale, pairs that stay blind."
import threading
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
import pytest

from kyara.core import UserError, content_hash, dialogue, finish_stage, pack_meta, row_schema, start_stage, write_rows
from kyara.forms import retrieval_prompt
from kyara.labels import Label, all_labels, apply_labels, read_labels, save_labels

PASSAGES = [{'id': 'id_27025b13', 'doc_id': 'yushan', 'title': '玉山', 'start': 0, 'end': 29, 'source': 'sample', 'license': 'CC0-1.0',
             'text': '玉山位於臺灣中部。玉山主峰海拔3,952公尺，是臺灣最高的山。'},
            {'id': 'id_5c1d09aa', 'doc_id': 'xueshan', 'title': '雪山', 'start': 0, 'end': 21, 'source': 'sample', 'license': 'CC0-1.0',
             'text': '雪山主峰海拔3,886公尺，是臺灣第二高的山。'}]

def row_of(question, answer, task):
    "Make a dialogue of one turn."
    turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    return dialogue(turns, task, stage='synthesis', source_ids=['id_27025b13', 'id_5c1d09aa'], model='offline', license='CC0-1.0')

def pair_of(better, worse):
    "Make a preference row."
    prompt, turn = [{'role': 'user', 'content': '玉山有多高？'}], lambda text: [{'role': 'assistant', 'content': text}]
    return {'id': content_hash([prompt, better, worse]), 'prompt': prompt, 'chosen': turn(better), 'rejected': turn(worse),
            'origin': 'rlaif', 'meta': pack_meta(stage='preference', model='secret-model')}

def make_run(folder):
    "Write a run with dialogues and pairs."
    asked = retrieval_prompt(PASSAGES, '玉山和雪山各有多高？')
    rows = [row_of(asked, '玉山主峰海拔3,952公尺【id_27025b13】。雪山主峰海拔3,868公尺【id_5c1d09aa】。', 'rag_answer'),
            row_of('玉山的位置？', '這個軟件的質量很好。', 'knowledge_qa'), row_of('玉山在哪裡？', '玉山位於臺灣中部。', 'knowledge_qa')]
    pairs = [pair_of('玉山主峰海拔3,952公尺。', '很高。'), pair_of('約3,952公尺。', '約3,592公尺。')]
    for stage, kind, made in (('index', 'chunk', PASSAGES), ('synthesis', 'dialogue', rows), ('preference', 'preference', pairs)):
        write_rows(made, start_stage(folder / stage) / kind, kind)
        finish_stage(folder / stage, 'kyara.core', {}, [], [kind], {'kept': len(made)})
    return rows, pairs

@pytest.fixture
def run(tmp_path):
    rows, pairs = make_run(tmp_path / 'demo')
    return tmp_path / 'demo', rows, pairs

review = pytest.importorskip('kyara.review', reason='anywidget is not installed: pip install "kyara[lab]"', exc_type=ImportError)

# A hundred thousand rows

def test_a_hundred_thousand_rows_are_paged(tmp_path):
    "Only the row group on the desk is in memory, and any row is reached by its number."
    stage = start_stage(tmp_path / 'big/synthesis')
    (stage / 'dialogue').mkdir()
    schema, total = row_schema('dialogue'), 100_000
    for shard in range(5):
        numbers = range(shard * 20_000, shard * 20_000 + 20_000)
        turns = [[{'role': 'user', 'content': f'第{number}題？'}, {'role': 'assistant', 'content': f'答案{number}。'}] for number in numbers]
        columns = {'id': [f'{number:016x}' for number in numbers], 'messages': turns, 'task': ['math'] * 20_000, 'meta': [None] * 20_000}
        pq.write_table(pa.table(columns, schema=schema), stage / f'dialogue/part-{shard:05d}.parquet')
    finish_stage(stage, 'kyara.core', {}, [], ['dialogue'], {'kept': total})
    desk = review.Desk(tmp_path / 'big', page_size=12)
    for place in (0, 99_999, 20_000, 54_321):
        review.act(desk, {'do': 'show', 'place': place})
        seen = review.view(desk)
        assert seen['row']['answer'] == f'答案{place}。' and len(seen['page']) <= 12 and seen['total'] == total
    assert len(desk.rows.read) <= 2
    review.act(desk, {'do': 'label', 'row': f'{54_321:016x}', 'verdict': 'accept'})
    assert review.view(desk)['labelled'] == 1 and len(read_labels(tmp_path / 'big')) == 1
    review.act(desk, {'do': 'filter', 'task': 'math', 'state': 'open'})
    assert review.view(desk)['visible'] == total - 1

# Labels

def test_many_panels_of_one_reviewer_lose_nothing(tmp_path):
    "Each save reads what others wrote, behind a lock."
    def save(part):
        for number in range(10): save_labels(tmp_path, [Label(f'row{part}-{number}', 's', 'dialogue', 'accept', 'mei')])
    threads = [threading.Thread(target=save, args=(part,)) for part in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(read_labels(tmp_path)) == 40

def test_a_crash_while_writing_leaves_the_old_labels(tmp_path, monkeypatch):
    save_labels(tmp_path, [Label('row', 's', 'dialogue', 'accept', 'mei')])
    def crash(*_, **__): raise OSError('the disk is full')
    monkeypatch.setattr(pq, 'write_table', crash)
    with pytest.raises(OSError): save_labels(tmp_path, [Label('row', 's', 'dialogue', 'reject', 'mei')])
    assert read_labels(tmp_path)['row'].verdict == 'accept'

@pytest.mark.parametrize('reviewer', ['', '../mei', 'a/b', 'x' * 65, '梅 子'])
def test_a_reviewer_cannot_name_a_foreign_file(tmp_path, reviewer):
    with pytest.raises(UserError, match='cannot name a file'): save_labels(tmp_path, [Label('row', 's', 'dialogue', 'accept', reviewer)])

def test_damaged_labels_are_named(tmp_path):
    (tmp_path / 'mei.parquet').write_bytes(b'no')
    with pytest.raises(UserError, match='mei.parquet is damaged'): all_labels(tmp_path)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no labels'): read_labels(tmp_path / 'empty')
    assert read_labels('') == {}

def test_a_turned_pair_is_a_new_row_with_its_parent(run):
    folder, _, pairs = run
    label = Label(pairs[0]['id'], 'preference', 'preference', 'rejected', 'mei')
    turned, same = apply_labels(pairs, {pairs[0]['id']: label})
    assert (turned['chosen'], turned['rejected']) == (pairs[0]['rejected'], pairs[0]['chosen']) and same is pairs[1]
    assert turned['meta']['parent_ids'] == [pairs[0]['id']] and turned['id'] != pairs[0]['id']
    schema = row_schema('preference')
    assert turned.keys() <= set(schema.names) and turned['meta'].keys() <= {field.name for field in schema.field('meta').type}

@pytest.mark.parametrize('verdict', ['tie', 'reject'])
def test_a_pair_that_teaches_nothing_goes_with_a_reason(run, verdict):
    _, _, pairs = run
    gone = next(apply_labels(pairs, {pairs[0]['id']: Label(pairs[0]['id'], 'preference', 'preference', verdict, 'mei', note='差不多')}))
    assert (gone['drop_reason'], gone['evidence']) == (f'reviewer_{verdict}', 'mei: 差不多')

def test_labels_survive_a_crash_in_the_middle_of_a_merge(tmp_path, monkeypatch):
    "The large file is written before the small one goes; between the two both hold the same."
    labels = [Label(f'row{number}', 's', 'dialogue', 'accept', 'mei') for number in range(501)]
    save_labels(tmp_path, labels[:500])
    def crash(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', crash)
        with pytest.raises(KeyboardInterrupt): save_labels(tmp_path, labels[500:])
    assert len(read_labels(tmp_path)) == 501
    save_labels(tmp_path, [Label('row0', 's', 'dialogue', 'reject', 'mei')])
    assert read_labels(tmp_path)['row0'].verdict == 'reject' and len(read_labels(tmp_path)) == 501

# The desk

def test_nothing_sent_to_the_browser_tells_which_answer_is_preferred(run):
    folder, _, pairs = run
    desk = review.Desk(folder, 'preference', reviewer='mei')
    for place in range(2):
        review.act(desk, {'do': 'show', 'place': place})
        review.act(desk, {'do': 'trace', 'row': desk.row()['id']})
        seen = str(review.view(desk))
        assert 'chosen' not in seen and 'rejected' not in seen and 'secret-model' not in seen

def test_without_blinding_a_is_the_chosen_answer(run):
    folder, _, pairs = run
    desk = review.Desk(folder, 'preference', reviewer='jun', blind=False)
    for pair in pairs: review.act(desk, {'do': 'label', 'row': pair['id'], 'verdict': 'A'})
    found = read_labels(folder)
    assert [(found[pair['id']].verdict, found[pair['id']].order) for pair in pairs] == [('chosen', '')] * 2

def test_a_second_thought_after_the_names_were_told_is_not_blind(run):
    folder, _, pairs = run
    desk = review.Desk(folder, 'preference', reviewer='mei')
    review.act(desk, {'do': 'label', 'row': pairs[0]['id'], 'verdict': 'tie'})
    assert read_labels(folder)[pairs[0]['id']].order in ('AB', 'BA')
    review.act(desk, {'do': 'label', 'row': pairs[0]['id'], 'verdict': 'A'})
    assert read_labels(folder)[pairs[0]['id']].order == ''

def test_what_the_browser_sends_is_checked(run):
    folder, rows, _ = run
    desk = review.Desk(folder, 'synthesis', reviewer='mei')
    for message in ({}, {'do': 'rm'}, {'do': 'label', 'row': 'other', 'verdict': 'accept'}, {'do': 'label', 'row': rows[0]['id'], 'verdict': 'A+'},
                    {'do': 'label', 'row': rows[0]['id'], 'verdict': 'edit', 'edited': ' '}, {'do': 'show', 'place': -5}, {'do': 'show', 'place': 10 ** 9},
                    {'do': 'filter', 'task': 'none', 'state': 'x'}):
        review.act(desk, message)
        review.view(desk)
    assert not (folder / 'labels').exists()

def test_document_that_nobody_knows(run):
    folder, rows, _ = run
    desk = review.Desk(folder, 'synthesis')
    assert review.document_side(desk, rows[0], 'id_00000000')['title'] == '沒有這份文件'
