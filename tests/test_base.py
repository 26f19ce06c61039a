"""Base set: every drop reason, every layout, planted duplicates and planted evaluation items"""
import json
import random
from collections import Counter

import pytest

from kyara import base
from kyara.core import UserError, dialogue, finish_stage, read_rows, write_rows
from kyara.zh import fold_script

PLAIN = '玉山主峰海拔3,952公尺，是臺灣最高的山峰，也是玉山國家公園的核心。'


def talk(question, answer, task='knowledge_qa', **meta):
    turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    return dialogue(turns, task, **{'stage': 'test', 'lang': 'zh-TW', 'license': 'CC0-1.0', **meta})


def run(out_dir, sources, **changes):
    settings = dict(weights={}, caps={}, licenses={}, held_out=[], limits={}, simplified='drop', near_threshold=0.55, semantic_threshold=0.95, embedding='', seed=0)
    return base.make_base(out_dir, [str(source) for source in sources], **{**settings, **changes})


def write_lines(path, rows):
    path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    return path


@pytest.mark.parametrize('reason, question, answer', [
    ('bad_length', '書法有幾種？', '五種'),
    ('bad_length', '請把全文抄一遍。', '山' + '水月花鳥風雲' * 12_000),
    ('broken_turns', '玉山多高？', '   '),
    ('broken_markup', '寫程式', '```python\nprint(1)\n'),
    ('broken_markup', '玉山多高？', '玉山海拔3,952公尺【id_27025b13。'),
    ('broken_markup', '玉山多高？', '玉山海拔<span class="n">3,952</span>公尺。'),
    ('broken_markup', '玉山多高？', '玉山海拔3,952公尺\ufffd\ufffd'),
    ('template_leftover', '玉山多高？', '<|im_start|>玉山海拔3,952公尺。'),
    ('template_leftover', '玉山多高？', '根據[[text]]，玉山海拔3,952公尺。'),
    ('template_leftover', '玉山多高？', '### Response: 玉山海拔3,952公尺。'),
    ('repetition', '介紹歌仔戲。', '歌仔戲是在臺灣形成的戲曲。' * 8),
    ('repetition', '笑一個。', '哈' * 40),
    ('refusal', '玉山多高？', '很抱歉，我無法回答這個問題。'),
    ('refusal', '玉山多高？', '參考文件缺乏與問題相關資訊'),
    ('refusal', 'How high is Yushan?', "I'm sorry, but I can't help with that."),
    ('simplified_script', '玉山多高？', '玉山的海拔为3952米，是台湾最高的山峰。'),
    ('language_mismatch', '玉山多高，又在哪裡？', 'Yushan is 3,952 metres high and lies in the middle of Taiwan.'),
    ('mainland_words', '怎麼上網比較快？', '請檢查網絡的帶寬，更新軟件，再看視頻。'),
])
def test_rule_finds_its_fault(reason, question, answer):
    assert base.quality_reason(talk(question, answer), base.LIMITS)[0] == reason


@pytest.mark.parametrize('question, answer, task', [
    ('玉山多高？', PLAIN, 'knowledge_qa'),
    ('小明有3顆芒果，又買4顆，共有幾顆？', '3 + 4 = 7\n答案：7', 'math'),
    ('紅檜可以活多久？', '參考文件缺乏與問題相關資訊', 'rag_refusal'),
    ('請把「玉山是臺灣最高的山」翻譯成英文。', 'Yushan, or Jade Mountain, is the highest mountain in Taiwan.', 'public'),
    ('寫一個網頁的標題。', '可以這樣寫：\n\n```html\n<div>玉山</div>\n```', 'public'),
    ('唱九九乘法表第一列。', '1、2、3、4、5、6、7、8、9。', 'public'),
])
def test_good_rows_pass(question, answer, task):
    assert base.quality_reason(talk(question, answer, task), base.LIMITS) == ('', '')


def test_limits_are_checked_and_used(tmp_path):
    source = write_lines(tmp_path / 'rows.jsonl', [talk('玉山多高？', PLAIN)])
    assert run(tmp_path / 'out', [source], limits={'min_chars': 500}) == {'bad_length': 1}
    with pytest.raises(UserError, match='min_char'):
        run(tmp_path / 'out', [source], limits={'min_char': 5})


CHINESE = '玉山是臺灣最高的山，海拔3,952公尺。'
LAYOUTS = [
    ('teknium/OpenHermes-2.5', {'custom_instruction': None, 'topic': None, 'idx': None, 'system_prompt': None, 'language': None, 'source': 'x',
                                'conversations': [{'from': 'human', 'value': 'Capital?', 'weight': 0.0}, {'from': 'gpt', 'value': 'Tokyo.', 'weight': 1.0}]}, 'en'),
    ('arcee-ai/The-Tome', {'dataset': 'infini', 'conversations': [{'from': 'system', 'value': 'Be brief.'}, {'from': 'human', 'value': 'Capital?'},
                                                                   {'from': 'gpt', 'value': 'Tokyo.'}]}, 'en'),
    ('Magpie-Align/Magpie-Qwen2-Pro-200K-Chinese', {'uuid': 'u', 'instruction': '玉山多高', 'response': CHINESE, 'conversations': [
        {'from': 'human', 'value': '玉山多高'}, {'from': 'gpt', 'value': CHINESE}], 'intent': 'ask'}, 'zh-CN'),
    ('hfl/stem_zh_instruction', {'instruction': '下列何者是鹼性？', 'input': 'A. 醋 B. 肥皂水', 'output': 'B. 肥皂水'}, 'zh-CN'),
    ('FreedomIntelligence/Evol-Instruct-Chinese-GPT4', {'id': '1', 'conversations': [{'from': 'human', 'value': '玉山多高'}, {'from': 'gpt', 'value': CHINESE}]}, 'zh-CN'),
    ('zake7749/kyara-chinese-math-sft-s0-30K', {'messages': [{'role': 'user', 'content': '1加1？'}, {'role': 'assistant', 'content': '答案：2'}]}, 'zh-TW'),
    ('my-alpaca', {'prompt': '玉山多高', 'completion': CHINESE}, 'zh-TW'),
]


@pytest.mark.parametrize('name, raw, lang', LAYOUTS, ids=[name for name, _, _ in LAYOUTS])
def test_layout_of_public_set(name, raw, lang):
    row = base.adapt(raw, name)
    assert [turn['role'] for turn in row['messages']][-2:] == ['user', 'assistant']
    assert 'drop_reason' not in row and row['meta']['lang'] == lang and row['meta']['source'] == name
    assert row['meta']['license'] == 'unknown' and base.adapt(raw, name, 'Apache-2.0')['meta']['license'] == 'Apache-2.0'


def test_no_row_is_lost(tmp_path):
    good = [talk(f'第{n}座山多高？', f'{name}是這座山的名字。') for n, name in enumerate(['玉山', '雪山', '南湖大山', '大霸尖山', '奇萊主山'])]
    source = tmp_path / 'mixed.jsonl'
    lines = [json.dumps(row, ensure_ascii=False) for row in good] + ['{"messages": [', '[1, 2]', '{"text": "只有文章"}', '{"messages": [1]}']
    source.write_text('\n'.join(lines), encoding='utf-8')
    counts = run(tmp_path / 'out', [source], near_threshold=1.1, semantic_threshold=0)
    assert counts == {'kept': 5, 'malformed': 2, 'unknown_layout': 2}
    dropped = list(read_rows(tmp_path / 'out', 'dropped'))
    assert len(list(read_rows(tmp_path / 'out'))) + len(dropped) == len(lines)
    assert [row['evidence'][:6] for row in dropped if row['drop_reason'] == 'malformed'] == ['line 6', 'line 7']
    assert len({row['id'] for row in dropped}) == 4


def test_sources_of_every_kind(tmp_path):
    stage, parquet = tmp_path / 'synthesis', tmp_path / 'public'
    write_rows([talk('玉山多高？', PLAIN)], stage / 'dialogue', 'dialogue')
    finish_stage(stage, 'kyara.core', {}, [], ['dialogue'], {})
    import pyarrow as pa, pyarrow.parquet as pq
    parquet.mkdir()
    pq.write_table(pa.Table.from_pylist([LAYOUTS[3][1]]), parquet / 'train.parquet')
    (tmp_path / 'array.json').write_text(json.dumps([LAYOUTS[4][1]], ensure_ascii=False), encoding='utf-8')
    for location, task in [(stage, 'knowledge_qa'), (parquet, 'public'), (tmp_path / 'array.json', 'public'), ('sample:dialogues_en', 'public')]:
        row = next(iter(base.read_source(str(location))))
        assert row['task'] == task and row['messages'][-1]['role'] == 'assistant', location
    with pytest.raises(UserError, match='nowhere'):
        list(base.read_source(str(tmp_path / 'nowhere.jsonl')))


def test_sampling_and_caps(tmp_path):
    rows = [talk(f'第{n}題', f'這是第{n}題的回答，寫得夠長。') for n in range(200)]
    source = write_lines(tmp_path / 'many.jsonl', rows)
    counts = run(tmp_path / 'a', [source], weights={'many': 0.5}, caps={'many': 60}, near_threshold=1.1, semantic_threshold=0)
    assert counts['kept'] == 60 and 70 < counts['not_sampled'] < 130 and counts.total() == 200
    run(tmp_path / 'b', [source], weights={'many': 0.5}, caps={'many': 60}, near_threshold=1.1, semantic_threshold=0)
    kept = [[row['id'] for row in read_rows(tmp_path / name)] for name in 'ab']
    assert kept[0] == kept[1]
    with pytest.raises(UserError, match='mayn'):
        run(tmp_path / 'c', [source], weights={'mayn': 0.5})


def texts(count, seed=7):
    words = [line['content'] for row in base.read_source('sample:dialogues_en') for line in row['messages']]
    assert words
    corpus = [json.loads(line)['text'] for line in base.resolve_path('sample:corpus').read_text(encoding='utf-8').splitlines()]
    chance, sentences = random.Random(seed), [part + '。' for text in corpus for part in text.replace('\n', '').split('。') if len(part) > 12]
    return [''.join(chance.sample(sentences, 6)) for _ in range(count)]


def change(text, share, chance):
    words = [place for place, char in enumerate(text) if not char.isdigit()]
    places = set(chance.sample(words, round(share * len(text))))
    return ''.join(chr(chance.randrange(0x4e00, 0x9000)) if place in places else char for place, char in enumerate(text))


def test_planted_duplicates_are_found():
    from kyara.zh import to_traditional
    chance, originals = random.Random(3), texts(60)
    variants = {'spaces': lambda text: text.replace('，', ' , ').replace('。', '. '), 'script': lambda text: to_traditional(fold_script(text)),
                'three percent': lambda text: change(text, 0.03, chance), 'prefix': lambda text: '以下說明這件事。' + text,
                'reordered': lambda text: '。'.join(sorted(text.split('。')))}
    first = [talk('請介紹這件事。', text) for text in originals]
    rows = list(base.drop_near(base.drop_exact([*first, *(talk('請介紹這件事。', vary(text)) for vary in variants.values() for text in originals)])))
    assert not any('drop_reason' in row for row in rows[:60]), Counter(row.get('drop_reason') for row in rows[:60])
    for number, name in enumerate(variants, 1):
        found = [row for row, one in zip(rows[60 * number:], first) if one['id'] in row.get('evidence', '')]
        assert len(found) >= 58, (name, len(found))
    reasons = [row.get('drop_reason') for row in rows[60:180]]
    assert reasons.count('duplicate') >= 110, Counter(reasons)


def test_other_thresholds_need_no_other_comparison(tmp_path):
    chance, originals = random.Random(3), texts(40)
    rows = [talk('請介紹這件事。', text) for text in [*originals, *(change(text, 0.1, chance) for text in originals)]]
    source = write_lines(tmp_path / 'rows.jsonl', rows)
    tried = {}
    for threshold in (0.5, 0.6, 0.7):
        counts = run(tmp_path / str(threshold), [source], near_threshold=threshold, semantic_threshold=0)
        tried[threshold] = counts['near_duplicate']
        assert base.try_thresholds(tmp_path / str(threshold) / 'near_pairs.parquet', [0.5, 0.6, 0.7])[threshold] == counts['near_duplicate']
    assert base.try_thresholds(tmp_path / '0.7/near_pairs.parquet', [0.5, 0.6, 0.7]) == tried and tried[0.5] > tried[0.7]
    assert all(abs(similarity - 0.6) < 0.2 for similarity, *_ in base.borderline_pairs(tmp_path / '0.7/near_pairs.parquet', 0.6, 5))


def test_what_means_the_same_goes_in_the_third_pass():
    first, rest = texts(40), texts(40, seed=8)
    turned = ['。'.join(reversed(text.rstrip('。').split('。'))) + '。' for text in first]
    rows = [talk('請介紹這件事。', text) for text in [*first, *turned, *rest]]
    got = [row.get('drop_reason', '') for row in base.drop_semantic(rows, embedding='hashing:512')]
    assert got[:40] == [''] * 40 and got[40:80] == ['semantic_duplicate'] * 40 and got[80:].count('semantic_duplicate') <= 1
    assert list(base.drop_semantic(rows, threshold=0)) == rows
    with pytest.raises(UserError, match='hashing:256'): list(base.drop_semantic(rows, embedding='hashing:none'))


def test_problems_with_other_numbers_are_no_duplicates():
    rows = [talk(f'小明有{a}顆芒果，媽媽又給他{b}顆，他現在有幾顆？', f'{a} + {b} = {a + b}\n答案：{a + b}', 'math') for a in range(1, 9) for b in range(1, 9)]
    assert not [row for row in base.drop_near(base.drop_exact(rows)) if 'drop_reason' in row]


def test_planted_items_are_found(tmp_path):
    from kyara.zh import to_traditional
    items = [text[:90] + '？' for text in texts(40, seed=11)]
    held_out = write_lines(tmp_path / 'items.jsonl', [{'id': f'i{n}', 'question': item} for n, item in enumerate(items)])
    index, chance = base.ItemIndex(base.read_items([str(held_out)])), random.Random(5)
    assert not index.too_short
    for vary, least in [(str, 40), (fold_script, 40), (lambda text: to_traditional(fold_script(text)), 40),
                        (lambda text: f'先想一想。{PLAIN * 5}{text}\n請列出理由。', 40), (lambda text: change(text, 0.04, chance), 36)]:
        found = [index.find(vary(item)) for item in items]
        assert sum(name == f'items/i{n}' for n, name in enumerate(found)) >= least, found
    clean = texts(300, seed=99)
    contained = [text for text in clean if index.find(text)]
    shared = [text for text in contained if not any(len(set(item.split('。')) & set(text.split('。'))) >= 1 for item in items)]
    assert not shared, shared


def test_contaminated_rows_go_with_the_name_of_the_item(tmp_path):
    question = '九份老街一串魚丸有4顆，小美買了7串和朋友一起分享，請問總共買到幾顆魚丸？'
    other = question.replace('4', '6').replace('7', '5')
    source = write_lines(tmp_path / 'rows.jsonl', [talk(question, '4 * 7 = 28\n答案：28', 'math'), talk(other, '6 * 5 = 30\n答案：30', 'math')])
    write_rows([talk(question, '答案：28', 'math')], tmp_path / 'math' / 'held_out', 'dialogue')
    assert run(tmp_path / 'out', [source], held_out=[str(tmp_path / 'math')]) == {'kept': 1, 'contaminated': 1}
    [row] = read_rows(tmp_path / 'out', 'dropped')
    assert row['evidence'].startswith('math/') and row['messages'][0]['content'] == question


def test_options_in_another_order_are_the_same_item():
    index = base.ItemIndex([('a', '下列何者是臺灣最長的河流？\nA. 濁水溪\nB. 高屏溪\nC. 淡水河\nD. 大甲溪')])
    assert index.find('下列何者是臺灣最長的河流？(A) 大甲溪 (B) 濁水溪 (C) 高屏溪 (D) 淡水河') == 'a'
    assert index.find('下列何者是日本最長的河流？(A) 信濃川 (B) 利根川') == ''


def test_simplified_rows_can_be_converted(tmp_path):
    row = talk('为什么要分类？', '垃圾分类可以让资源循环利用，减少焚烧对环境的影响。', lang='zh-CN')
    source = write_lines(tmp_path / 'rows.jsonl', [row])
    assert run(tmp_path / 'a', [source]) == {'simplified_script': 1}
    assert run(tmp_path / 'b', [source], simplified='convert') == {'kept': 1}
    [got] = read_rows(tmp_path / 'b')
    assert got['meta']['lang'] == 'zh-TW' and got['meta']['parent_ids'] == [row['id']] and got['meta']['license'] == 'CC0-1.0'
    with pytest.raises(UserError, match='simplified'):
        run(tmp_path / 'c', [source], simplified='maybe')


def test_shards_hold_the_rows_in_order(tmp_path):
    rows = [talk(f'第{n}題', f'第{n}題的回答。') for n in range(25)]
    marked = [base.drop(row, 'test', '') if n % 5 == 0 else row for n, row in enumerate(rows)]
    assert base.split_rows(marked, tmp_path, shard_size=8) == {'kept': 20, 'test': 5}
    assert len(list((tmp_path / 'dialogue').glob('*.parquet'))) == 3
    assert [row['id'] for row in read_rows(tmp_path)] == [row['id'] for n, row in enumerate(rows) if n % 5]


def test_statistics(tmp_path):
    multi = dialogue([{'role': role, 'content': '民國紀年'} for role in ('user', 'assistant') * 3], 'public', lang='en', source='x', license='MIT')
    got = base.describe_rows([talk('玉山多高？', PLAIN, source='synthesis'), multi])
    assert got['dialogues'] == 2 and got['rounds'] == {'1': 1, '3': 1} and got['languages_by_source'] == {'synthesis': {'zh-TW': 1}, 'x': {'en': 1}}
    assert got['licenses'] == {'CC0-1.0': 1, 'MIT': 1} and got['unit'] == 'characters'
    with pytest.raises(UserError, match='tokenizer'):
        base.describe_rows([multi], str(tmp_path))


def test_a_sentence_that_answers_an_item_is_no_leak():
    index = base.ItemIndex([('a', '何人呼籲在繁殖季節立法禁止狩獵來保護動物？')])
    assert index.find('他呼籲在繁殖季節立法禁止狩獵來保護動物，法案後來通過。') == ''
    assert index.find('請回答：何人曾經呼籲在繁殖季節立法禁止狩獵來保護動物？') == 'a'
