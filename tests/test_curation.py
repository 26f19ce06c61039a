"""Curated set: tags, scorers, selection, rewriting, data card, and what becomes of every row"""
import json
from collections import Counter

import pytest
import yaml

from kyara import curation
from kyara.core import UserError, details, dialogue, read_rows
from kyara.labels import Label, save_labels
from kyara.llm import Client, Parsed, Reply
from kyara.reward import make_random_reward_model, open_reward_model

ROWS = 'tests/data/base_rows.jsonl'
DEFAULTS = dict(teacher='offline', judge='offline', reward_model='', max_rows=0, quotas={}, group_share=1.0, floor=0.1,
                min_tag_count=2, unrewritten='keep', seed=0)


def talk(question, answer, task='knowledge_qa', **meta):
    turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    return dialogue(turns, task, **{'license': 'CC0-1.0', 'lang': 'zh-TW', 'source': 'test', **meta})


def run(folder, sources=(ROWS,), **changes):
    return curation.curate(folder / 'curation', sources=[str(source) for source in sources], ledger=str(folder / 'ledger.sqlite'),
                           **{**DEFAULTS, **changes})


def candidates(rows, seed=0):
    "Rows of a name, a task, tags, scores and perhaps tokens, ready for selection."
    found = curation.Candidates(seed)
    for number, (name, *rest) in enumerate(rows): found.add(f'{name}{number}', *rest)
    curation.place_candidates(found)
    return found


class Scripted:
    "A client whose replies are written down."
    model, cost = 'scripted', 0.0

    def __init__(self, *texts):
        self.texts = list(texts)

    def ask(self, prompts, **sampling):
        return [Reply(f'call{number}', self.texts.pop(0), 'stop') for number, _ in enumerate(prompts)]

    def ask_json(self, prompts, schema, **sampling):
        replies = self.ask(prompts)
        return [Parsed(schema.model_validate_json(reply.text), reply) if reply.text.startswith('{') else Parsed(None, reply, 'unparsable')
                for reply in replies]


@pytest.mark.parametrize('written, final', [
    ('臺灣歷史', '歷史'), ('台灣歷史', '歷史'), ('Math', 'math'), ('MATH', 'math'), ('smart', 'smart'), ('art', 'art'), ('罕見', ''),
    ('歷史 ', '歷史'), ('world geography', 'geography')])
def test_tags_are_merged(written, final):
    counts = Counter({'歷史': 9, '臺灣歷史': 3, '台灣歷史': 1, 'math': 5, 'Math': 2, 'MATH': 1, 'smart': 2, 'art': 4, '罕見': 1, '歷史 ': 1,
                      'geography': 4, 'world geography': 1})
    assert curation.merge_tags(counts)[written] == final


@pytest.mark.parametrize('answer, fault', [
    ('好的，玉山高3,952公尺。', 'filler opening'), ('Sure! It is 3,952 m.', 'filler opening'), ('玉山高3,952公尺。希望對你有幫助！', 'filler closing'),
    ('玉山高3,952公尺，是臺灣', 'unfinished'), ('太棒了！好高！真的！', 'shouting'), ('請用鼠標點開視頻。', 'foreign words')])
def test_style_faults(answer, fault):
    assert list(curation.style_faults(talk('玉山多高？', answer))) == [fault]


def test_rows_without_readable_scores_are_dropped():
    rows = [talk('玉山多高？', '玉山海拔3,952公尺。'), talk('日月潭在哪裡？', '日月潭在南投縣。'), talk('臺灣多大？', '約3萬6千平方公里。')]
    teacher = Scripted('{"tags": ["地理"]}', '沒有標籤', '{"tags": ["地理"]}')
    judge = Scripted('{"reason": "好", "score": 9}', '{"reason": "好", "score": 9}', '{"reason": "好", "score": 99}')
    got = [row.get('drop_reason', '') for row in curation.score_rows(rows, teacher, judge)]
    assert got == ['', 'tags_unparsable', 'judge_unparsable']


def test_no_scorer_picks_alone():
    rows = candidates(('r', 'qa', ['地理'], {'judge': n, 'style': 1.0 if n < 9 else 0.0}) for n in range(10))
    verdicts = dict(zip((f'r{n}' for n in range(10)), curation.select(rows, floor=0.2)))
    assert verdicts['r9'] == ('few_votes', 'judge 1.00, style 0.10'), 'the best of the judge, the worst of the rules'
    assert verdicts['r0'][0] == 'few_votes' and verdicts['r8'] == ('', '')


def test_selection_balances_groups_and_keeps_quotas():
    kinds = [('m', 'math', ['數學'], 50), ('g', 'qa', ['地理', '查詢'], 5), ('h', 'qa', ['歷史', '查詢'], 5)]
    names = [f'{name}{n}' for name, _, _, count in kinds for n in range(count)]
    def pick(seed=0, score=float, **how):
        rows = candidates(((name, task, tags, {'judge': score(n), 'style': score(n)}) for name, task, tags, count in kinds for n in range(count)), seed)
        return [name for name, (reason, _) in zip(names, curation.select(rows, floor=0.0, **how), strict=True) if not reason]
    assert Counter(name[0] for name in pick(max_rows=12)) == {'m': 4, 'g': 4, 'h': 4}
    assert 'm49' in pick(max_rows=3) and 'm0' not in pick(max_rows=12)
    assert Counter(name[0] for name in pick(quotas={'math': 2, '歷史': 1})) == {'m': 2, 'g': 5, 'h': 1}
    assert Counter(name[0] for name in pick(group_share=0.2))['m'] == 12
    equal = [pick(seed, lambda n: 5, max_rows=20) for seed in (4, 4, 5)]
    assert equal[0] == equal[1] != equal[2] and len(equal[2]) == 20, 'a seed decides between equals'


SYSTEM = dialogue([{'role': 'system', 'content': '回答結尾一律加上『謝謝光臨』。'}, {'role': 'user', 'content': '幾點開門？'},
                   {'role': 'assistant', 'content': '每天上午九點開門。謝謝光臨'}], 'system_prompt', lang='zh-TW')
CITED = talk('凍頂烏龍茶產於哪裡？', '凍頂烏龍茶產於南投縣鹿谷鄉【id_d1d2d3d4】。', 'rag_answer')


@pytest.mark.parametrize('row, answer, problem', [
    (CITED, '鹿谷鄉是凍頂烏龍茶的產地【id_d1d2d3d4】。', ''),
    (CITED, '鹿谷鄉是凍頂烏龍茶的產地。', 'lost_citations'),
    (CITED, '鹿谷鄉是凍頂烏龍茶的產地【id_00000000】。', 'lost_citations'),
    (CITED, ' \n', 'empty'),
    (CITED, '凍頂烏龍茶在1980年產於鹿谷鄉【id_d1d2d3d4】。', 'new_numbers'),
    (CITED, '冻顶乌龙茶产于南投县鹿谷乡，那里的气候适合种茶【id_d1d2d3d4】。', 'simplified_script'),
    (talk('3加4？', '3 + 4 = 7\n答案：7', 'math'), '三加四，也就是 3 + 4 = 7。\n答案：7', ''),
    (talk('3加4？', '3 + 4 = 7\n答案：7', 'math'), '3 + 4 = 8\n答案：8', 'changed_answer'),
    (talk('3加4？', '3 + 4 = 7\n答案：7', 'math'), '我不確定。', 'changed_answer'),
    (SYSTEM, '上午九點開門。謝謝光臨', ''),
    (SYSTEM, '上午九點開門。', 'lost_rule'),
    (talk('分幾類？', '- 一般垃圾\n- 廚餘', 'system_prompt'), '一般垃圾與廚餘。', 'lost_rule'),
    (talk('玉山多高？', '玉山高3,952公尺。'), '1. 玉山高3952公尺。\n2. 它是臺灣最高的山。', ''),
])
def test_rewrites_are_checked(row, answer, problem):
    assert curation.rewrite_problem(row, answer) == problem


def test_rewritten_rows_keep_their_origin():
    old = talk('玉山多高？', '好的，玉山高3,952公尺。', model='teacher-b', source_ids=['id_1'], call_ids=['first'], tags=['地理'])
    refusal = talk('紅檜可以活多久？', '參考文件缺乏與問題相關資訊', 'rag_refusal')
    new, same, bad, kept = curation.rewrite_rows([old, CITED, talk('臺灣多大？', '約3萬6千平方公里。'), refusal],
                                                 Scripted('玉山海拔3,952公尺。', CITED['messages'][-1]['content'], '約99萬平方公里。'))
    assert new['meta'] | {'details': ''} == {**old['meta'], 'stage': 'curation', 'parent_ids': [old['id']], 'call_ids': ['first', 'call0'],
                                             'model': 'scripted', 'details': ''}
    assert details(new) == {'old_answer': '好的，玉山高3,952公尺。', 'old_model': 'teacher-b', 'rewrite': 'done'} and new['id'] != old['id']
    assert details(same)['rewrite'] == 'nothing to change' and 'model' not in same['meta']
    assert details(bad)['rewrite'] == 'new_numbers' and bad['messages'][-1]['content'] == '約3萬6千平方公里。'
    assert kept['messages'] == refusal['messages'] and kept['meta']['parent_ids'] == [refusal['id']]
    [gone] = curation.rewrite_rows([old], Scripted(''), unrewritten='drop')
    assert gone['drop_reason'] == 'rewrite_empty' and gone['id'] == old['id']


def test_stage_loses_no_row_and_repeats_itself(tmp_path):
    report = run(tmp_path / 'a', max_rows=12)
    folder = tmp_path / 'a' / 'curation'
    kept, dropped = list(read_rows(folder)), list(read_rows(folder, 'dropped'))
    sources = {row['id']: row for row in read_rows(ROWS)}
    assert {row['meta']['parent_ids'][0] for row in kept} | {row['id'] for row in dropped} == sources.keys()
    assert len(kept) == 12 == report['counts']['kept'] and len(kept) + len(dropped) == len(sources)
    for row in kept:
        origin = sources[row['meta']['parent_ids'][0]]['meta']
        assert (row['meta'].get('source_ids'), row['meta']['license']) == (origin.get('source_ids'), origin['license'])
        assert row['meta']['score_judge'] and len(row['meta']['call_ids']) >= 2
    assert not (folder / 'scored').exists()
    assert run(tmp_path / 'b', max_rows=12) == report
    assert list(read_rows(tmp_path / 'b' / 'curation')) == kept


def test_tokens_can_be_limited_too():
    kinds = [('m', 'math', ['數學'], 40), ('g', 'qa', ['地理'], 100)]
    rows = candidates((name, task, tags, {'judge': n, 'style': n}, tokens) for name, task, tags, tokens in kinds for n in range(20))
    reasons = [reason for reason, _ in curation.select(rows, floor=0.0, max_tokens=500)]
    assert 460 < sum(tokens for tokens, reason in zip(rows.tokens, reasons) if not reason) <= 500
    assert '' in reasons[:20] and '' in reasons[20:] and set(reasons) == {'', 'over_max_tokens'}


def test_tokens_are_counted_by_the_tokenizer(tmp_path, reward_folder):
    report = run(tmp_path, max_tokens=2000, tokenizer=str(reward_folder))
    rows = list(read_rows(tmp_path / 'curation'))
    counted = curation.read_candidates([{**row, 'meta': {**row['meta'], 'score_judge': 5.0}} for row in rows], str(reward_folder)).tokens
    assert report['counts']['over_max_tokens'] and 1000 < sum(counted) <= 2200, 'rewriting may change a few'


def test_tags_that_come_together_are_found_and_joined():
    tags = [['數學', '應用題']] * 20 + [['地理', '河流']] * 8 + [['地理', '高山']] * 7 + [['歷史', '地理']] * 2 + [['歷史']] * 8
    rows = curation.Candidates()
    for n, names in enumerate(tags): rows.add(f'r{n}', 'qa', names, {'judge': n, 'style': n})
    found = curation.place_candidates(rows)
    assert {(one['tag'], one['implies'], one['mutual']) for one in found} == {
        ('數學', '應用題', True), ('應用題', '數學', True), ('河流', '地理', False), ('高山', '地理', False)}
    joined = list(rows.tag_lists())
    assert joined[0] == ['應用題'] and joined[20] == ['地理', '河流'] and joined[-1] == ['歷史'], 'only what is mutual is joined'


def test_tags_that_mean_the_same_are_joined(tmp_path, monkeypatch):
    import numpy as np
    meanings = {'演算法': [1, 0], '算法設計': [0.98, 0.2], '地理': [0, 1]}
    class Embedder:
        def encode(self, texts): return np.array([meanings[text] for text in texts], np.float32)
    monkeypatch.setattr(curation, 'open_embedder', lambda name: Embedder())
    assert curation.merge_meanings(Counter({'演算法': 5, '算法設計': 3, '地理': 4}), 'a model') == {'演算法': '演算法', '地理': '地理', '算法設計': '演算法'}


def test_one_voice_takes_the_mixture_away():
    plain = ['玉山主峰海拔3,952公尺。', '雪山是第二高峰。', '合歡山冬天會下雪。', '大霸尖山形狀像酒桶。', '奇萊山以多變的天氣聞名。', '南湖大山有冰河留下的圈谷。']
    rivers = [('濁水溪', '最長'), ('高屏溪', '流域最廣'), ('淡水河', '流過臺北盆地'), ('曾文溪', '有最大的水庫'), ('大甲溪', '發電最多'), ('秀姑巒溪', '可以泛舟')]
    old = [talk(f'說說第{n}座山。', text, model='teacher-a') for n, text in enumerate(plain)]
    old += [talk(f'介紹{name}。', f'好的，以下是我的回答：\n\n- 名稱：{name}\n- 特色：{what}\n\n希望對你有幫助！', model='teacher-b') for name, what in rivers]
    new = [text.replace('。', '，值得一去。') for text in plain] + [f'{name}{what}。' for name, what in rivers]
    meters = curation.StyleMeter(), curation.StyleMeter()
    for row, style in zip(old, curation.answer_styles(old)): meters[0].add(row['meta']['model'], style)
    written = list(curation.rewrite_rows(old, Scripted(*new)))
    for row, style in zip(written, curation.answer_styles(written)): meters[1].add(details(row)['old_model'], style)
    before, after = (curation.style_spread(meter.table()) for meter in meters)
    assert before == {'lists': 1.0, 'fillers': 1.0, 'same opening': 0.83, 'template': 1.0}, before
    assert after == {'lists': 0.0, 'fillers': 0.0, 'same opening': 0.0, 'template': 0.0}, after
    assert ('好的以下是我的回', 1.0) in meters[0].templates('teacher-b')


def test_a_candidate_takes_a_hundred_bytes():
    import tracemalloc
    row = talk('玉山多高？', '玉山海拔3,952公尺。', tags=['地理', '高山', '數字'], score_judge=8.0, score_reward=0.5, details={'style': 1.0})
    rows = ({**json.loads(json.dumps(row)), 'id': f'{number:016x}'} for number in range(4000))
    tracemalloc.start()
    found = curation.read_candidates(rows)
    curation.place_candidates(found)
    verdicts = curation.select(found, max_rows=100)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(verdicts) == len(found) == 4000 and used / len(found) < 150


def test_a_scorer_may_be_silent():
    "Rows that an earlier stage scored, and others, in one set."
    rows = candidates([('a', 'qa', [], {'judge': 1, 'style': 1}), ('b', 'qa', [], {'judge': 2, 'style': 0.5, 'reward': 3}),
                       ('c', 'qa', [], {'judge': 3, 'style': 0.2, 'reward': 1})])
    assert [rows.told(n) for n in range(3)] == ['judge 0.33, style 1.00', 'judge 0.67, reward 1.00, style 0.67', 'judge 1.00, reward 0.50, style 0.33']
    assert [reason for reason, _ in curation.select(rows, floor=0.4)] == ['few_votes', '', '']
    assert curation.agreement(rows)['judge and reward']['rank_correlation'] == -1.0
    assert curation.select(candidates([])) == []


class Hub:
    "Takes down what it is asked to do."
    def __init__(self):
        self.calls = []

    def create_repo(self, *args, **named):
        self.calls.append(('create_repo', args, named))

    def upload_folder(self, **named):
        self.calls.append(('upload_folder', (), named))
        return 'https://hub.invalid/commit/1'


def test_publishing_is_offered_and_never_done_by_itself(tmp_path, monkeypatch):
    import inspect
    import huggingface_hub
    def refuse(*args, **named): raise AssertionError('the stage spoke to the hub')
    for name in ('create_repo', 'upload_folder'): monkeypatch.setattr(huggingface_hub.HfApi, name, refuse)
    report = run(tmp_path, max_rows=10)
    monkeypatch.undo()
    folder, hub = tmp_path / 'curation', Hub()
    with pytest.raises(UserError, match='manifest.json, README.md'): curation.push_to_hub(folder, 'a/b', hub=hub)
    rows = list(read_rows(folder))
    (folder / 'README.md').write_text(curation.data_card('x', curation.describe_rows(rows), report, rows[:1]), encoding='utf-8')
    (folder / 'manifest.json').write_text('{}')
    assert hub.calls == [] and curation.push_to_hub(folder, 'a/b', hub=hub) == 'https://hub.invalid/commit/1'
    (first, args, named), (second, _, sent) = hub.calls
    assert (first, args, named['private'], named['repo_type']) == ('create_repo', ('a/b',), True, 'dataset')
    assert second == 'upload_folder' and sent['allow_patterns'] == ['README.md', 'dialogue/*.parquet']
    for name, args, named in hub.calls: inspect.signature(getattr(huggingface_hub.HfApi, name)).bind(None, *args, **named)


def test_no_card_is_freer_than_its_rows(tmp_path):
    report = run(tmp_path, max_rows=10)
    rows = list(read_rows(tmp_path / 'curation'))
    mixed = [{**row, 'meta': {**row['meta'], 'license': name}} for row, name in zip(rows, ['CC-BY-SA-4.0', 'CC-BY-NC-4.0', 'MIT'] * 4)]
    statistics = curation.describe_rows(mixed)
    head = curation.data_card('x', statistics, report, rows[:1]).split('---\n')[1]
    assert yaml.safe_load(head)['license'] == ['cc-by-nc-4.0', 'cc-by-sa-4.0'], 'both, as neither includes the other'
    for stated, offender in [('MIT', 'CC-BY-NC-4.0'), ('CC-BY-SA-4.0', 'CC-BY-NC-4.0'), ('CC-BY-NC-4.0', 'CC-BY-SA-4.0')]:
        with pytest.raises(UserError, match=f'license {stated} is freer than {offender}'): curation.data_card('x', statistics, report, rows[:1], stated)
    assert yaml.safe_load(curation.data_card('x', statistics, report, rows[:1], 'CC-BY-NC-SA-4.0').split('---\n')[1])['license'] == ['cc-by-nc-sa-4.0']
    unknown = curation.describe_rows([{**rows[0], 'meta': {**rows[0]['meta'], 'license': 'unknown'}}])
    with pytest.raises(UserError, match='freer than unknown'): curation.data_card('x', unknown, report, rows[:1], 'MIT')


def test_data_card_is_read_by_the_hub(tmp_path):
    report = run(tmp_path, max_rows=10)
    rows = list(read_rows(tmp_path / 'curation'))
    card = curation.data_card('Kyara curated set', curation.describe_rows(rows), report, rows[:2])
    _, head, body = card.split('---\n', 2)
    assert yaml.safe_load(head)['license'] == ['cc0-1.0'] and yaml.safe_load(head)['language'] == ['zh']
    assert f"| over_max_rows | {report['counts']['over_max_rows']} |" in body and '[[' not in body.split('## Examples')[0]


def test_data_card_tells_of_the_base_set(tmp_path):
    from kyara.base import make_base
    base = tmp_path / 'base'
    counts = make_base(base, [ROWS], weights={}, caps={}, licenses={}, held_out=['tests/data/base_held_out.jsonl'], limits={}, simplified='drop',
                       near_threshold=0.55, semantic_threshold=0.95, embedding='', seed=0)
    (base / 'statistics.json').write_text(json.dumps({'dropped': {name: counts[name] for name in counts if name != 'kept'}}))
    report = run(tmp_path, sources=[base], max_rows=10)
    rows = list(read_rows(tmp_path / 'curation'))
    card = curation.data_card('x', curation.describe_rows(rows), report, rows[:1])
    assert '3 items were looked for, 0 are too short to look for; 1 rows were dropped.' in card and '| contaminated | 1 |' in card


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match='unrewritten'):
        run(tmp_path, unrewritten='maybe')
    with pytest.raises(UserError, match='nowhere'):
        run(tmp_path, sources=['nowhere.jsonl'])
    with pytest.raises(UserError, match='reward_model'):
        run(tmp_path, reward_model=str(tmp_path))


@pytest.fixture(scope='module')
def reward_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp('reward')
    tokenizer = Tokenizer(models.BPE(unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(['玉山是臺灣最高的山。'], trainers.BpeTrainer(vocab_size=300, special_tokens=['<unk>', '<pad>', '</s>'],
                                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>', pad_token='<pad>', eos_token='</s>')
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                       num_attention_heads=2, num_labels=1))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_reward_model_scores_the_last_token_whatever_the_padding(reward_folder):
    import torch
    from transformers import LlamaForSequenceClassification
    rows = [talk('玉山多高？', '3,952公尺。'), talk('介紹玉山。', '玉山是臺灣最高的山，海拔3,952公尺，終年涼爽。'), SYSTEM]
    reward = open_reward_model(reward_folder)
    together, model = reward.score(rows), LlamaForSequenceClassification.from_pretrained(reward_folder).eval()
    for row, score in zip(rows, together):
        text = ''.join(f"{turn['role']}: {turn['content']}</s>" for turn in row['messages'])
        ids = torch.tensor([reward.tokenizer(text, add_special_tokens=False)['input_ids']])
        with torch.no_grad(): expected = model.score(model.model(ids).last_hidden_state[0, -1]).item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len(set(together)) == 3


def test_the_mixture_is_the_published_formula(tmp_path):
    "Computed again with numpy from the tensors, one row at a time, without padding."
    import numpy as np
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModel
    make_random_reward_model(tmp_path, objectives=5, seed=3)
    (tmp_path / 'modeling_custom.py').write_text('raise SystemExit("code from a hub was run")')
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'auto_map': {'AutoModel': 'modeling_custom.Mine',
                                                                            'AutoModelForSequenceClassification': 'modeling_custom.Mine'}}))
    rows = [talk('玉山多高？', '3,952公尺。'), talk('介紹玉山。', '玉山是臺灣最高的山，終年涼爽。' * 3),
            {**SYSTEM, 'messages': [*SYSTEM['messages'], {'role': 'user', 'content': '再說一次。'}, {'role': 'assistant', 'content': '好。'}]}]
    reward, tensors, model = open_reward_model(tmp_path), load_file(tmp_path / 'model.safetensors'), AutoModel.from_pretrained(tmp_path).eval()
    for row, score in zip(rows, reward.score(rows)):
        ids = reward.tokenizer(reward.tokenizer.apply_chat_template(row['messages'], tokenize=False), add_special_tokens=False)['input_ids']
        before = reward.tokenizer.apply_chat_template(row['messages'][:-1], tokenize=False)
        question = len(reward.tokenizer(before, add_special_tokens=False)['input_ids']) - 1
        with torch.no_grad(): states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        gate = states[question]
        for layer in range(3):
            gate = tensors[f'gating.layers.{layer}.weight'] @ gate + tensors[f'gating.layers.{layer}.bias']
            if layer < 2: gate = np.maximum(gate, 0)
        gate = np.exp(gate / 10) / np.exp(gate / 10).sum() * tensors['gating.logit_scale'][0]
        expected = gate @ (tensors['reward_transform_matrix'].T @ (tensors['regression_layer.weight'] @ states[-1]))
        assert score == pytest.approx(expected, abs=1e-4)
    assert reward.score(rows, max_length=4) == [None] * 3, 'the question fills it'
    del tensors['gating.layers.0.weight']
    from safetensors.numpy import save_file
    save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match='hold no regression and gating layers'): open_reward_model(tmp_path)

def test_three_scorers_agree_or_not(tmp_path, reward_folder):
    report = run(tmp_path, reward_model=str(reward_folder))
    assert all(pair.keys() == {'rank_correlation', 'kappa'} for pair in report['agreement'].values())
    assert report['agreement'].keys() == {'judge and reward', 'judge and style', 'reward and style'}
    assert all('score_reward' in row['meta'] for row in read_rows(tmp_path / 'curation'))
    assert report['models']['reward model'] == reward_folder.name


def test_offline_teacher_answers_every_prompt():
    client = Client('offline', ':memory:')
    [row] = curation.score_rows([CITED], client, client)
    assert row['meta']['tags'] and 1 <= row['meta']['score_judge'] <= 10
    [new] = curation.rewrite_rows([row], client)
    assert details(new)['rewrite'] in ('done', 'nothing to change') and '【id_d1d2d3d4】' in new['messages'][-1]['content']


def test_reviewers_are_obeyed(tmp_path):
    "A rejected row goes with the reviewer's words; an answer that a person wrote is not written anew."
    run(tmp_path / 'before')
    before = list(read_rows(tmp_path / 'before' / 'curation'))
    written = [row for row in before if details(row)['rewrite'] != 'kept as it is']
    rejected, edited = (row['meta']['parent_ids'][0] for row in written[:2])
    answer = '這個回答是審閱的人自己寫的。' + written[1]['messages'][-1]['content']
    save_labels(tmp_path / 'labels', [Label(rejected, 'base', 'dialogue', 'reject', 'mei', note='答非所問'),
                                      Label(edited, 'base', 'dialogue', 'edit', 'mei', edited=answer)])
    report = run(tmp_path / 'after', labels=str(tmp_path / 'labels'))
    kept, gone = (list(read_rows(tmp_path / 'after' / 'curation', *part)) for part in ((), ('dropped',)))
    assert report['counts']['reviewer_reject'] == 1 and len(kept) + len(gone) == sum(report['counts'].values())
    assert [row['evidence'] for row in gone if row['drop_reason'] == 'reviewer_reject'] == ['mei: 答非所問']
    [mended] = [row for row in kept if row['messages'][-1]['content'] == answer]
    assert details(mended)['reviewers'] == ['reviewed:mei'] and details(mended)['rewrite'] == 'kept as it is'
