"""Base set: every drop reason, every layout, planted duplicates and planted evaluation items"""
import gzip
import json
import pickle
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from kyara import base
from kyara.cluster import RayEngine
from kyara.core import UserError, dialogue, finish_stage, read_rows, write_rows
from kyara.zh import fold_script
from nodes import environment, ray_nodes

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
TALK = [{'from': 'human', 'value': '玉山多高'}, {'from': 'gpt', 'value': CHINESE}]
MAGPIE = {'uuid': 'u', 'model': 'Qwen/Qwen2-72B-Instruct', 'gen_input_configs': {'temperature': 1.0, 'top_p': 1.0, 'input_generator': 'q', 'seed': 7,
          'extract_input': ''}, 'instruction': '玉山多高', 'response': CHINESE, 'conversations': TALK, 'task_category': 'Information seeking',
          'other_task_category': [''], 'task_category_generator': 'q', 'difficulty': 'easy', 'intent': 'ask', 'knowledge': 'geography',
          'difficulty_generator': 'q', 'input_quality': 'good', 'quality_explanation': 'clear', 'quality_generator': 'q', 'llama_guard_2': 'safe',
          'reward_model': 'r', 'instruct_reward': 0.5, 'min_neighbor_distance': 0.2, 'repeat_count': 0, 'min_similar_uuid': 'u',
          'instruction_length': 4, 'response_length': 20, 'language': 'ZH'}
HERMES = {'custom_instruction': None, 'topic': None, 'model_name': None, 'model': None, 'skip_prompt_formatting': False, 'category': 'orca',
          'conversations': [{'from': 'human', 'value': 'Capital?', 'weight': None}, {'from': 'gpt', 'value': 'Tokyo.', 'weight': None}], 'views': None,
          'language': None, 'id': None, 'title': None, 'idx': None, 'hash': None, 'avatarUrl': None, 'system_prompt': None, 'source': 'airoboros2.2'}
TOME = {'dataset': 'infini', 'id': 1, 'conversations': [{'from': 'system', 'value': 'Be brief.'}, {'from': 'human', 'value': 'Capital?'},
                                                        {'from': 'gpt', 'value': 'Tokyo.'}]}
LAYOUTS = [
    ('teknium/OpenHermes-2.5', HERMES, 'en'),
    ('arcee-ai/The-Tome', TOME, 'en'),
    ('Magpie-Align/Magpie-Qwen2-Pro-200K-Chinese', MAGPIE, 'zh-CN'),
    ('hfl/stem_zh_instruction', {'instruction': '下列何者是鹼性？', 'input': 'A. 醋 B. 肥皂水', 'output': 'B. 肥皂水'}, 'zh-CN'),
    ('FreedomIntelligence/Evol-Instruct-Chinese-GPT4', {'id': '1', 'conversations': TALK}, 'zh-CN'),
    ('zake7749/kyara-chinese-math-sft-s0-30K', {'messages': [{'role': 'user', 'content': '1加1？'}, {'role': 'assistant', 'content': '答案：2'}]}, 'zh-TW'),
    ('my-alpaca', {'prompt': '玉山多高', 'completion': CHINESE}, 'zh-TW'),
]


@pytest.mark.parametrize('name, raw, lang', LAYOUTS, ids=[name for name, _, _ in LAYOUTS])
def test_layout_of_public_set(name, raw, lang):
    row = base.adapt(raw, name)
    assert [turn['role'] for turn in row['messages']][-2:] == ['user', 'assistant']
    assert 'drop_reason' not in row and row['meta']['lang'] == lang and row['meta']['source'] == name
    assert row['meta']['license'] == 'unknown' and base.adapt(raw, name, 'Apache-2.0')['meta']['license'] == 'Apache-2.0'


@pytest.mark.parametrize('raw', [
    {'messages': [{'role': 'user', 'content': '1加1？'}, {'role': 'assistant', 'content': '1 + 1 = 2'}]},
    {'conversations': [{'from': 'human', 'value': '1加1？'}, {'from': 'gpt', 'value': '1 + 1 = 2'}], 'id': 7},
    {'conversation': [{'human': '1加1？', 'assistant': '1 + 1 = 2'}]},
    {'prompt': [{'role': 'user', 'content': '1加1？'}], 'completion': [{'role': 'assistant', 'content': '1 + 1 = 2'}]},
    {'prompt': [{'role': 'user', 'content': '1加1？'}], 'response': '1 + 1 = 2'},
    {'problem': '1加1？', 'solution': '1 + 1 = 2', 'answer': '2', 'persona': '小學老師'},
    {'question': '1加1？', 'answer': '1 + 1 = 2'}, {'question_zh': '1加1？', 'answer_zh': '1 + 1 = 2', 'question': None},
    {'instruction': '1加1？', 'input': '', 'output': '1 + 1 = 2'}, {'input': '1加1？', 'output': '1 + 1 = 2'}, {'query': '1加1？', 'response': '1 + 1 = 2'},
], ids=lambda raw: ' '.join(raw))
def test_mathematics_of_kyara_in_any_layout(raw):
    "The columns of the real set are not public: whichever of the usual ones they are, its rows are read."
    row = base.adapt(raw, 'zake7749/kyara-chinese-math-sft-s0-30K')
    assert [turn['content'] for turn in row['messages']] == ['1加1？', '1 + 1 = 2'] and row['task'] == 'math' and 'drop_reason' not in row


@pytest.mark.parametrize('raw', [{'text': '只有文章'}, {'question': '只有問題？'}, {'conversations': [{'speaker': 'a', 'text': '沒有角色'}]},
                                 {'messages': ['一串文字']}, {'prompt': ['一串文字'], 'answer': '2'}, {'messages': [{}]},
                                 {'conversations': [{'from': 'tool', 'value': '{}'}]}, {'question': [], 'answer': '2'}], ids=str)
def test_what_is_no_dialogue_says_so(raw):
    row = base.adapt(raw, 'somebody/set')
    assert row['drop_reason'] == 'unknown_layout' and json.loads(row['evidence']) == raw


@pytest.mark.parametrize('name, raw, lang', LAYOUTS[:6], ids=[name for name, _, _ in LAYOUTS[:6]])
def test_public_set_by_name_through_datasets(name, raw, lang, tmp_path, monkeypatch):
    "A local folder of the set's name stands in for the hub; the library that reads it is the real one."
    import pyarrow as pa
    import pyarrow.parquet as pq
    (tmp_path / name).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([raw] * 3), tmp_path / name / 'train-00000-of-00001.parquet')
    monkeypatch.chdir(tmp_path)
    rows = list(base.read_source(f'hf:{name}', 'MIT'))
    assert len(rows) == 3 and not any('drop_reason' in row for row in rows)
    assert {(row['meta']['source'], row['meta']['lang'], row['meta']['license']) for row in rows} == {(name, lang, 'MIT')}
    assert rows[0]['messages'] == base.adapt(raw, name)['messages']


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


DATA = Path('../shared/data')
REGISTRY = {'tmmluplus': 'tmmluplus/sample_questions_12.jsonl', 'gsm8k': 'gsm8k/test.jsonl.gz', 'crux': 'cruxeval/cruxeval.jsonl.gz',
            'truthfulqa': 'truthfulqa/mc_task_v1.json.gz', 'mt-bench': 'mt_bench', 'mt-bench-tw': 'mt_bench_tw', 'alignbench': 'alignbench'}
needs_data = pytest.mark.skipif(not (DATA / 'gsm8k').exists(), reason='needs ../shared/data')


@pytest.fixture(scope='module')
def registry():
    "Items of the benchmarks that this project can run, a few hundred of each."
    from kyara.evaluate import item_texts
    found = {name: list(item_texts({name: str(DATA / path)}).items()) for name, path in REGISTRY.items()}
    items = {'/'.join(key): text for rows in found.values() for key, text in rows[::-(-len(rows) // 250)]}
    index = base.ItemIndex(items.items())
    return {name: text for name, text in items.items() if name not in set(index.too_short)}, index, len(items)


CHINESE_WORDS = [('請問', ''), ('请问', ''), ('下列', '以下'), ('何者', '哪一個'), ('如果', '假如'), ('因為', '由於'), ('因为', '由于'), ('可以', '能夠'),
                 ('以及', '和'), ('並且', '而且'), ('什么', '啥'), ('请', '麻烦'), ('請', '麻煩'), ('一個', '一項'), ('一个', '一项'), ('怎么', '如何'),
                 ('哪些', '哪幾種'), ('的', '之'), ('给出', '提供'), ('需要', '必須'), ('是', '乃是'), ('有', '具有')]
ENGLISH_WORDS = [('What is', "What's"), ('What are', 'Which are'), ('How many', 'What number of'), ('how many', 'what number of'), (' that ', ' which '),
                 (' can ', ' could '), (' also ', ' additionally '), ('Please ', ''), (' each ', ' every '), (' buys ', ' purchases '),
                 (' makes ', ' produces '), (' gets ', ' receives '), (' and ', ' as well as '), (' the ', ' that '), (' has ', ' owns '),
                 ('Write', 'Please write'), (' in ', ' within '), (' if ', ' when '), ('Who ', 'Which person '), (' to ', ' in order to ')]


def reword(text, chance):
    "Change a word in 25 Chinese characters or 90 Latin letters: by another of the same meaning, or by a particle put in."
    chinese = len(re.findall('[一-鿿]', text)) > len(text) / 4
    changes, words = max(1, len(text) // (25 if chinese else 90)), list(CHINESE_WORDS if chinese else ENGLISH_WORDS)
    chance.shuffle(words)
    for old, new in [pair for pair in words if pair[0] in text][:changes]:
        text, changes = text.replace(old, new, 1), changes - 1
    for _ in range(changes):
        places = [place.end() for place in re.finditer('[一-鿿](?=[一-鿿])' if chinese else ' ', text)] or [0]
        place = chance.choice(places)
        text = text[:place] + (chance.choice('了也就') if chinese else chance.choice(['really ', 'actually ', 'exactly '])) + text[place:]
    return text


@needs_data
def test_planted_items_of_the_registry_are_found(registry):
    from kyara.zh import to_traditional
    items, index, count = registry
    assert len(items) > 0.98 * count, 'hardly any is too short to look for'
    around = '這裡先說明背景。' + PLAIN * 8
    ways = {'verbatim': str, 'folded': fold_script, 'Traditional': to_traditional, 'in a text': lambda text: around + text + around,
            'in lines': lambda text: f'{around}\n\n{text}\n\n{around}'}
    for way, vary in ways.items():
        found = dict(zip(items, index.find_all([vary(text) for text in items.values()]), strict=True))
        assert not [name for name in found if not found[name]], way
    chance, worded = random.Random(5), [text for name, text in items.items() if not name.startswith('crux/')] # Code has no other words
    found = index.find_all([reword(text, chance) for text in worded])
    assert sum(map(bool, found)) >= 0.9 * len(worded), sum(map(bool, found)) / len(worded)


@needs_data
def test_shuffled_options_are_found():
    from kyara.score import read_outputs
    raw, chance = read_outputs(DATA / 'tmmluplus/sample_questions_12.jsonl'), random.Random(2)
    rows = [{'question': row['question'], 'choices': [row[letter] for letter in 'ABCD']} for row in raw]
    truthful = json.loads(gzip.decompress((DATA / 'truthfulqa/mc_task_v1.json.gz').read_bytes()))[:300]
    rows += [{'question': row['question'], 'choices': list(row['mc1_targets'])} for row in truthful]
    index = base.ItemIndex((str(number), base.item_text(row)) for number, row in enumerate(rows))
    asked = []
    for row in rows:
        options = chance.sample(row['choices'], len(row['choices']))
        asked.append('\n'.join([row['question'], *(f'({letter}) {option}' for letter, option in zip('ABCDEFGHIJKLM', options))]))
    assert not index.too_short and all(index.find_all(asked)), [rows[n] for n, name in enumerate(index.find_all(asked)) if not name]


@needs_data
def test_other_texts_are_no_items(registry):
    "The questions and paragraphs of DRCD have nothing to do with the benchmarks: at most one in a thousand may be taken for an item."
    articles = json.loads(gzip.decompress((DATA / 'drcd/DRCD_dev.json.gz').read_bytes()))['data']
    paragraphs = [paragraph for article in articles for paragraph in article['paragraphs']]
    clean = [paragraph['context'] for paragraph in paragraphs] + [asked['question'] for paragraph in paragraphs for asked in paragraph['qas']]
    found = list(filter(None, registry[1].find_all(clean)))
    assert len(clean) > 4000 and len(found) < 0.001 * len(clean), found


def test_items_in_other_words_are_found_by_a_model(tmp_path):
    item = '臺灣最長的河流是哪一條河流，它的長度是多少公里？'
    turned = '哪一條河流是臺灣最長的河流，多少公里是它的長度？'
    held_out = write_lines(tmp_path / 'items.jsonl', [{'id': 'river', 'question': item}])
    source = write_lines(tmp_path / 'rows.jsonl', [talk(turned, '濁水溪是臺灣最長的河流。'), talk('玉山多高？', PLAIN)])
    meanings = base.MeaningIndex([('river', item)], 'hashing:512', least=0.6)
    assert meanings.find_all([turned, '玉山多高？'])[0].startswith('river 0.') and not meanings.find_all(['玉山多高？'])[0]
    [row, other] = base.drop_contaminated(base.read_source(str(source)), meanings)
    assert row['drop_reason'] == 'contaminated' and row['evidence'].startswith('river 0.') and 'drop_reason' not in other
    assert run(tmp_path / 'out', [source], held_out=[str(held_out)], embedding='hashing:512')['kept'] >= 1


def test_passes_say_what_they_kept_and_dropped(tmp_path):
    chance, originals = random.Random(3), texts(30)
    rows = [talk('請介紹這件事。', text) for text in [*originals, *originals[:4], *(change(text, 0.05, chance) for text in originals[:9])]]
    counts = run(tmp_path / 'out', [write_lines(tmp_path / 'rows.jsonl', rows)])
    report = json.loads((tmp_path / 'out/passes.json').read_text())
    exact, near, semantic = report['passes']
    assert (exact['dropped'], near['dropped'], semantic['dropped']) == tuple(counts[name] for name in ('duplicate', 'near_duplicate', 'semantic_duplicate'))
    assert exact['dropped'] == 4 and exact['kept'] == 39 and near['kept'] == 30 and semantic['kept'] == counts['kept']
    assert 0.55 <= near['similarity'][0] <= near['similarity'][-1] <= 1


class Counted(dict):
    "A row that knows how many of its kind are alive."
    alive = most = 0

    def __init__(self, row):
        super().__init__(row)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_rows_are_not_held_in_memory(monkeypatch):
    "Through all three passes, which read twice, at most a few batches of rows are there at a time."
    class CountedSpool(base.Spool):
        def __iter__(self):
            return map(Counted, super().__iter__())
    monkeypatch.setattr(base, 'Spool', CountedSpool)
    rows = (Counted(talk(f'第{number}件事是什麼？', f'{number * 7919}號的事是{number * 104729}。')) for number in range(3000))
    kept = sum('drop_reason' not in row for row in base.drop_semantic(base.drop_near(base.drop_exact(rows), 1.1), 1.0))
    assert kept == 3000 and Counted.most < 1000, Counted.most


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


def test_indexes_travel_as_their_items():
    items = [(f'i{n}', text[:60] + '？') for n, text in enumerate(texts(50))]
    for index in (base.ItemIndex(items), base.MeaningIndex(items, 'hashing:512', 0.8)):
        sent = pickle.dumps(index)
        there = pickle.loads(sent)
        assert there is pickle.loads(sent), 'made once in a process'
        assert len(sent) < 2 * sum(len(pickle.dumps(item)) for item in items), 'no tables of n-grams, no vectors'
        asked = [text for _, text in items[:20]] + ['玉山多高？']
        assert there.find_all(asked) == index.find_all(asked) and there.find_all(asked)[3].startswith('i3') and not there.find_all(asked)[-1]


def test_a_cluster_writes_the_same_files(tmp_path, monkeypatch):
    "The base set, and what a reward model says, by two Ray workers and by none."
    from kyara.reward import make_random_reward_model, open_reward_model, reward_scores
    from kyara.cluster import over_shards
    chance, originals = random.Random(4), texts(500)
    rows = [talk('請介紹這件事。', text) for text in [*originals, *originals[:20], *(change(text, 0.05, chance) for text in originals[:40])]]
    rows += [talk('为什么要分类？', '垃圾分类可以让资源循环利用，减少焚烧对环境的影响。', lang='zh-CN'), talk('笑一個。', '哈' * 40), {'text': '只有文章'}]
    source = write_lines(tmp_path / 'rows.jsonl', rows)
    held_out = write_lines(tmp_path / 'items.jsonl', [{'id': f'i{n}', 'question': text[:90] + '？'} for n, text in enumerate(originals[:9])])
    make_random_reward_model(tmp_path / 'reward')
    worked, real = [], RayEngine.map
    monkeypatch.setattr(RayEngine, 'map', lambda engine, function, *rest, **how: worked.append(function) or real(engine, function, *rest, **how))
    def made(name):
        counts = run(tmp_path / name, [source], held_out=[str(held_out)], simplified='convert')
        score = partial(reward_scores, open_reward_model(tmp_path / 'reward'))
        files = sorted(path for path in (tmp_path / name).rglob('*') if path.is_file())
        return counts, {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}, list(over_shards(score, rows[:20], size=8))
    alone = made('alone')
    assert not worked and {'contaminated', 'near_duplicate', 'duplicate', 'repetition', 'unknown_layout'} < alone[0].keys() and len(alone[1]) == 5
    with ray_nodes(tmp_path) as nodes, environment(KYARA_ENGINE=json.dumps({'name': 'ray', 'address': nodes.address, 'workers': 2})):
        together = made('together')
    assert len(worked) == 7 and together == alone
