"Judges that cannot be trusted, draws that must be fair, pairs that must not leak, and the layouts of public sets."
import json, socket, subprocess, sys, time
from collections import Counter

import pytest

from kyara.core import UserError, content_hash, dialogue
from kyara.llm import Client, Reply
from kyara.preference import (candidate_pairs, draw_models, joint_verdict, public_pair, read_verdict, rlaif_pairs, spin_pairs,
                              split_pairs, too_near)

turn = lambda role, content: {'role': role, 'content': content}

# A server on loopback that speaks as OpenAI's does. What a model is named decides how it judges.
SERVER = '''
import re, sys
from aiohttp import web

def said(model, prompt):
    name, _, way = model.partition(':')
    if name == 'answer': return f'{way}的回答：' + way * 12
    answers = dict(re.findall(r'<answer_([ab])>\\n(.*?)\\n</answer_', prompt, re.S))
    if way == 'longest': return '理由。\\n[[' + ('A' if len(answers['a']) >= len(answers['b']) else 'B') + ']]'
    return {'A': '甲好。\\n[[A]]', 'tie': '一樣。\\n[[C]]', 'none': '很難說，各有優點。', 'both': '[[A]]？還是[[B]]。',
            'prefers': '[[A]]' if '乙' in answers['a'] else '[[B]]'}[way]

async def complete(request):
    body = await request.json()
    if 'broken' in body['model']: return web.json_response({'error': {'message': 'no'}}, status=400)
    text = said(body['model'], body['messages'][-1]['content'])
    return web.json_response({'model': body['model'], 'usage': {'prompt_tokens': 1, 'completion_tokens': 1}, 'choices': [
        {'message': {'role': 'assistant', 'content': text}, 'finish_reason': 'stop'}]})

app = web.Application()
app.router.add_post('/v1/chat/completions', complete)
async def tell(app): print('ready', flush=True)
app.on_startup.append(tell)
web.run_app(app, host='127.0.0.1', port=int(sys.argv[1]), print=None)
'''

@pytest.fixture(scope='module')
def server():
    "Start the server, give its address, end it."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, '-c', SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0: break
        time.sleep(0.05)
    yield f'http://127.0.0.1:{port}/v1'
    process.kill()
    process.wait()

@pytest.fixture
def settings(tmp_path, monkeypatch):
    "Write a settings.ini that Kyara reads; {name: {key: value}}."
    def write(models):
        text = '\n'.join(f'[model.{name}]\n' + ''.join(f'{key} = {value}\n' for key, value in keys.items()) for name, keys in models.items())
        (tmp_path / 'settings.ini').write_text(text, encoding='utf-8')
        monkeypatch.setenv('KYARA_SETTINGS', str(tmp_path / 'settings.ini'))
    return write

JUDGES = ('A', 'tie', 'none', 'both', 'prefers', 'longest', 'broken')
QUESTIONS = [dialogue([turn('user', f'第{number}題：什麼是第{number}號景點？'), turn('assistant', '不知道')], 'public', license='CC0-1.0') for number in range(4)]

@pytest.fixture
def clients(server, settings, tmp_path):
    "Open the pool of three and a judge of each kind."
    section = lambda model: {'provider': 'openai', 'model': model, 'base_url': server}
    settings({**{f'model-{way}': section(f'answer:{way}') for way in '甲乙丙'}, **{f'judge-{way}': section(f'judge:{way}') for way in JUDGES}})
    return lambda name: Client(name, tmp_path / 'ledger.sqlite', 'preference', 'test')

def judged(clients, way, **options):
    "Let a judge compare the answers of all models to all questions."
    options = {'answers_per_prompt': 3, 'pairs_per_prompt': 0, **options}
    pool = {f'model-{name}': clients(f'model-{name}') for name in '甲乙丙'}
    return rlaif_pairs(QUESTIONS, pool, clients(f'judge-{way}'), **options)

# The judge

@pytest.mark.parametrize('way,reason', [('A', 'order_decides'), ('tie', 'tie'), ('none', 'unreadable_verdict'), ('both', 'unreadable_verdict'),
                                        ('broken', 'unreadable_verdict')])
def test_no_pair_comes_from_a_judge_without_a_verdict(clients, way, reason):
    pairs, dropped = judged(clients, way)
    assert pairs == [] and Counter(row['drop_reason'] for row in dropped) == {reason: 12} # 4 questions, 3 pairs of 3 answers
    assert all(row['prompt'] and row['chosen'] != row['rejected'] for row in dropped)

def test_a_judge_with_an_opinion_makes_pairs_in_both_orders(clients):
    pairs, dropped = judged(clients, 'prefers')
    assert len(pairs) == 8 and Counter(row['drop_reason'] for row in dropped) == {'order_decides': 4} # 甲 against 丙: neither is 乙
    assert {row['meta']['model'] for row in pairs} == {'model-乙'} and all('乙' in row['chosen'][0]['content'] for row in pairs)
    for row in pairs:
        assert row['origin'] == 'rlaif' and row['prompt'] == [turn('user', row['prompt'][0]['content'])]
        assert len(set(row['meta']['call_ids'])) == 4 and row['meta']['license'] == 'CC0-1.0'
        assert json.loads(row['meta']['details'])['judge'] == 'judge-prefers'
    assert {row['meta']['parent_ids'][0] for row in pairs} == {row['id'] for row in QUESTIONS}

def test_every_pair_of_answers_is_kept_or_dropped(clients):
    pairs, dropped = judged(clients, 'prefers', pairs_per_prompt=1)
    assert len(pairs) + len(dropped) == 12 and Counter(row['drop_reason'] for row in dropped)['over_pairs_per_prompt'] == 8
    assert [row['id'] for row in judged(clients, 'prefers', pairs_per_prompt=1)[0]] == [row['id'] for row in pairs]

def test_a_finished_run_asks_nobody_again(clients, server):
    first = judged(clients, 'prefers')
    judge = clients('judge-prefers')
    assert judged(clients, 'prefers') == first
    assert all(entry['calls'] for entry in judge.ledger.stats()) and judge.cost == 0

@pytest.mark.parametrize('text,verdict', [('理由\n[[A]]', 'A'), ('[[B]]', 'B'), ('[[C]]', 'C'), ('[[A]] … [[A]]', 'A'), ('[[A]] [[B]]', ''), ('', ''),
                                          ('[A]', ''), ('[[D]]', ''), ('[[a]]', ''), ('答案是A', ''), ('A 較好寫 [[A]]，B 較好寫 [[B]]', '')])
def test_verdicts_are_read_or_refused(text, verdict): assert read_verdict(text) == verdict

@pytest.mark.parametrize('both,joint', [('AB', ('first', '')), ('BA', ('second', '')), ('CC', ('', 'tie')), ('AA', ('', 'order_decides')),
                                        ('BB', ('', 'order_decides')), ('AC', ('', 'order_decides')), ('CB', ('', 'order_decides')),
                                        (' B', ('', 'unreadable_verdict')), ('A ', ('', 'unreadable_verdict'))])
def test_verdicts_of_both_orders_must_agree(both, joint): assert joint_verdict(*(one.strip() for one in both)) == joint

def reply(text, reason='stop'): return Reply(content_hash(text), text, reason)

def test_nobody_judges_the_own_family(settings):
    models = {'gemini-flash': 'gemini', 'gemini-pro': 'gemini', 'qwen': 'qwen', 'yi': 'yi', 'plain': ''}
    settings({name: {'provider': 'offline', 'family': family} for name, family in models.items()})
    answers = {name: reply(name * 4) for name in ('gemini-flash', 'qwen', 'yi', 'plain')}
    usable, left_out = candidate_pairs(answers, 'gemini', 0, 'key')
    assert {frozenset(pair) for pair in usable} == {frozenset(pair) for pair in (('qwen', 'yi'), ('plain', 'qwen'), ('plain', 'yi'))}
    assert len(left_out) == 3 and {reason for *_, reason in left_out} == {'judge_of_own_family'}
    assert len(candidate_pairs(answers, '', 0, 'key')[0]) == 6 # No family stands for no family

def test_answers_that_are_none_and_answers_alike_are_not_judged(settings):
    settings({name: {'provider': 'offline'} for name in 'abcdj'})
    answers = {'a': reply('海拔3,952公尺。'), 'b': reply('海拔3,952公尺。'), 'c': reply('海拔約四千', 'length'), 'd': reply('', 'safety')}
    usable, left_out = candidate_pairs(answers, 'j', 0, 'key')
    assert usable == [] and {names: reason for *names, reason in [(f'{one}{other}', reason) for one, other, reason in left_out] for names in names} == {
        'ab': 'near_identical', 'ac': 'answer_length', 'ad': 'answer_safety', 'bc': 'answer_length', 'bd': 'answer_safety', 'cd': 'answer_length'}

def test_a_folder_may_judge(settings, tmp_path):
    settings({name: {'provider': 'offline'} for name in 'ab'})
    (tmp_path / 'judge').mkdir()
    (tmp_path / 'judge/config.json').write_text('{}')
    judge = Client(str(tmp_path / 'judge'), tmp_path / 'ledger.sqlite')
    judge.ask = lambda prompts, **sampling: [reply('[[A]]' if '甲' in prompt.split('<answer_a>')[1].split('</answer_a>')[0] else '[[B]]') for prompt in prompts]
    pool = {'a': Scripted('甲' * 9), 'b': Scripted('乙' * 9)}
    assert len(rlaif_pairs(QUESTIONS[:1], pool, judge, 2)[0]) == 1

# The pool

def test_weights_decide_how_often_a_model_is_drawn(settings):
    settings({name: {'provider': 'offline', 'weight': weight} for name, weight in {'much': 6, 'some': 3, 'little': 1, 'never': 0}.items()})
    first = Counter(draw_models(['much', 'some', 'little', 'never'], 1, str(key))[0] for key in range(2000))
    assert first['never'] == 0 and [abs(first[name] / 2000 - share) < 0.04 for name, share in (('much', 0.6), ('some', 0.3), ('little', 0.1))] == [True] * 3
    second = Counter(draw_models(['much', 'some', 'little', 'never'], 2, str(key))[1] for key in range(2000))
    expected = {'some': 0.6 * 0.75 + 0.1 * 3 / 9, 'much': 0.3 * 6 / 7 + 0.1 * 6 / 9, 'little': 0.6 * 0.25 + 0.3 / 7} # Without replacement
    assert all(abs(second[name] / 2000 - share) < 0.04 for name, share in expected.items()), second

def test_draws_repeat_and_reach_every_order(settings):
    settings({name: {'provider': 'offline'} for name in 'abcde'})
    draws = [draw_models(list('abcde'), 3, str(key)) for key in range(200)]
    assert draws == [draw_models(list('abcde'), 3, str(key)) for key in range(200)] != [draw_models(list('abcde'), 3, str(key), seed=1) for key in range(200)]
    assert all(len(set(drawn)) == 3 for drawn in draws) and {drawn[0] for drawn in draws} == set('abcde')
    with pytest.raises(UserError, match='at least two'): draw_models(['a'], 2, 'key')

def test_small_weights_are_as_good_as_large_ones(settings):
    settings({name: {'provider': 'offline', 'weight': 0.0001} for name in 'abc'})
    first = Counter(draw_models(list('abc'), 1, str(key))[0] for key in range(600))
    assert min(first[name] for name in 'abc') > 150, first

# SPIN

class Scripted:
    "A client that says what it was told to say."
    model = 'student'
    def __init__(self, *replies): self.replies = [reply(*one) if isinstance(one, tuple) else reply(one) for one in replies]
    def ask(self, prompts, **sampling): return self.replies[:len(prompts)]

def test_spin_drops_answers_that_teach_nothing():
    curated = ['玉山海拔3,952公尺。', '玉山海拔3,952公尺。', '3 + 4 = 7\n答案：7', '玉山海拔3,952公尺。', '濁水溪是臺灣最長的河川。', '玉山海拔3,952公尺。']
    own = ['玉山海拔3,952公尺。', '玉山海拔３９５２公尺。'.replace('３９５２', '３,９５２'), '4 + 3 = 7，所以答案：7', '', '我不知道這條河。', '玉山玉山玉山玉山']
    rows = [dialogue([turn('system', '你是小玉。'), turn('user', f'{number}：請說明。'), turn('assistant', text)], 'knowledge_qa', license='CC0-1.0', model='offline')
            for number, text in enumerate(curated)]
    pairs, dropped = spin_pairs(rows, Scripted(*own))
    assert [row['drop_reason'] for row in dropped] == ['near_identical', 'near_identical', 'same_result', 'empty_answer']
    assert [pair['chosen'][0]['content'] for pair in pairs] == curated[4:] and [pair['rejected'][0]['content'] for pair in pairs] == own[4:]
    assert pairs[0]['prompt'] == rows[4]['messages'][:-1] and pairs[0]['meta']['parent_ids'] == [rows[4]['id']] and pairs[0]['origin'] == 'spin'

def test_spin_counts_a_failed_call():
    row = dialogue([turn('user', '問'), turn('assistant', '答')], 'public')
    failed = Scripted('')
    failed.replies = [Reply('key', '', 'error', error='http 500')]
    pairs, dropped = spin_pairs([row], failed)
    assert pairs == [] and dropped[0]['drop_reason'] == 'no_reply' and dropped[0]['evidence'] == 'http 500'

@pytest.mark.parametrize('chosen,rejected,reason', [
    ('台灣的首都是臺北。', '台湾的首都是台北。', 'near_identical'), ('甲', '甲', 'near_identical'), ('甲', '乙', ''), ('是', '  ', 'empty_answer'),
    ('共1,200元\n答案：1200', '一千二\n答案：1,200元', 'same_result'), ('答案：7', '答案：8', ''), ('3 + 4 = 7\n答案：7', '3 + 4 = 8\n答案：8', ''),
    ('因為下雨，所以取消。', '因為颱風，所以取消活動並擇日再辦。', '')])
def test_pairs_that_teach_nothing(chosen, rejected, reason): assert too_near(chosen, rejected) == reason

# Setting pairs aside

def pair(prompt, number, origin='spin'):
    prompt = [turn('user', prompt)]
    return {'id': content_hash([prompt, number]), 'prompt': prompt, 'chosen': [turn('assistant', f'好{number}')], 'rejected': [turn('assistant', '壞')], 'origin': origin}

def test_no_prompt_is_on_both_sides():
    pairs = [pair(f'第{prompt}題', number) for prompt in range(40) for number in range(prompt % 5 + 1)]
    train, held_out = split_pairs(pairs, 20)
    prompts = lambda rows: {row['prompt'][0]['content'] for row in rows}
    assert not prompts(train) & prompts(held_out) and len(train) + len(held_out) == len(pairs) and 20 <= len(held_out) < 25
    assert split_pairs(pairs[::-1], 20)[1] == sorted(held_out, key=pairs[::-1].index)

def test_growing_sets_keep_what_was_held_out():
    pairs = [pair(f'第{prompt}題', 0) for prompt in range(100)]
    before, after = ({row['id'] for row in split_pairs(pairs[:count], 20)[1]} for count in (90, 100))
    assert len(before & after) >= 15

def test_double_pairs_count_once_and_few_pairs_are_not_all_held_out():
    pairs = [pair('同一題', 0)] * 3 + [pair('另一題', 0), pair('第三題', 0)]
    train, held_out = split_pairs(pairs, 50)
    assert len(train) == 2 and len(held_out) == 1 and split_pairs([], 5) == ([], [])

# Public sets

ASK, GOOD, POOR = turn('user', 'Name a river.'), turn('assistant', 'The Danube.'), turn('assistant', 'Paris.')
LAYOUTS = {
    'messages in both sides (ultrafeedback-binarized)': {'prompt': 'Name a river.', 'chosen': [ASK, GOOD], 'rejected': [ASK, POOR], 'score_chosen': 9.0},
    'messages with other keys': {'chosen': [{**ASK, 'turn': 1}, {**GOOD, 'turn': 2}], 'rejected': [{**ASK, 'turn': 1}, {**POOR, 'turn': 2}]},
    'texts (orca, py-dpo)': {'prompt': 'Name a river.', 'chosen': 'The Danube.', 'rejected': 'Paris.'},
    'whole answers (Math-Step-DPO-10K)': {'prompt': 'Name a river.', 'chosen': 'D', 'rejected': 'P', 'full_chosen': 'The Danube.', 'full_rejected': 'Paris.'},
}

@pytest.mark.parametrize('layout', LAYOUTS)
def test_public_layouts_become_pairs(layout):
    row = public_pair(LAYOUTS[layout], 'set', 'MIT')
    assert (row['prompt'], row['chosen'], row['rejected'], row['origin']) == ([ASK], [GOOD], [POOR], 'public:set')
    assert row['meta']['license'] == 'MIT' and row['meta']['source'] == 'set'

@pytest.mark.parametrize('row', [{}, {'text': 'x'}, {'chosen': 'a'}, {'chosen': 'a', 'rejected': 'b'}, {'prompt': 'q', 'chosen': '', 'rejected': 'b'},
                                 {'chosen': [ASK, GOOD], 'rejected': [turn('user', 'Another.'), POOR]}, {'prompt': 'q', 'chosen': None, 'rejected': None}])
def test_unknown_layouts_are_no_pairs(row): assert public_pair(row, 'set') is None

def test_a_prompt_of_messages_is_not_lost():
    "TRL's own layout: the prompt apart, the sides hold the answers only."
    row = public_pair({'prompt': [ASK], 'chosen': [GOOD], 'rejected': [POOR]}, 'set')
    assert row is None or row['prompt'] == [ASK], row['prompt']

def test_other_words_for_roles_are_no_reason_to_fall():
    said = lambda text: [{'from': 'human', 'value': 'Name a river.'}, {'from': 'gpt', 'value': text}]
    row = public_pair({'chosen': said('The Danube.'), 'rejected': said('Paris.')}, 'set')
    assert row is None or row['prompt'] == [ASK]

def test_rows_of_ours_stay_as_they_are():
    row = pair('題', 0, 'math_outcome')
    assert public_pair(row, 'set') is row
