"Judges that cannot be trusted, draws that must be fair, pairs that must not leak, and the layouts of public sets."
import itertools, json, math, random, subprocess, sys
from collections import Counter
from pathlib import Path

import pytest

from kyara.base import ItemIndex
from kyara.core import ModelSettings, Spool, UserError, content_hash, details, dialogue, model_settings, read_rows, write_rows
from kyara.judging import Judgement, conversation_text
from kyara.labels import Label, read_labels, save_labels
from kyara.llm import Client, Reply
from kyara.mixture import drop_repeated, held_out_prompts, review_summary, write_split
from kyara.pairs import ask_in_traditional, pair_in_traditional
from kyara.pool import ask_side_by_side, collect_answers
from kyara.preference import (adapt_pair, calibrate, candidate_pairs, check_weights, draw_models, draw_pairs, draw_prompts, draw_rows,
                              eligible_models, joint_verdict, length_regression, mix_pairs, pair_statistics, plot_pairs, pool_weights, preference,
                              read_pairs, read_public, read_verdict, require_calibrated, rlaif_pairs, same_family, spin_pairs, too_near)

ROOT = Path(__file__).parent.parent

turn = lambda role, content: {'role': role, 'content': content}

# A server on loopback that speaks as OpenAI's does. What a model is named decides how it judges.
SERVER = '''
import asyncio, re, socket
from aiohttp import web

asked, everybody = set(), asyncio.Event()
async def meet(model):
    "Wait until all three have been asked; whoever is asked after the first was answered would wait for nobody."
    asked.add(model)
    if len(asked) == 3: everybody.set()
    await asyncio.wait_for(everybody.wait(), 120)

def said(model, prompt):
    name, _, way = model.partition(':')
    if name == 'answer': return f'{way}的回答：' + way * 12
    answers = dict(re.findall(r'<answer_([ab])>\\n(.*?)\\n</answer_', prompt, re.S))
    if way in ('cut', 'filtered'): return '先算出答案，'
    if way == 'longest': return '理由。\\n[[' + ('A' if len(answers['a']) >= len(answers['b']) else 'B') + ']]'
    return {'A': '甲好。\\n[[A]]', 'tie': '一樣。\\n[[C]]', 'none': '很難說，各有優點。', 'both': '[[A]]？還是[[B]]。',
            'prefers': '[[A]]' if '乙' in answers['a'] else '[[B]]'}[way]

async def complete(request):
    body = await request.json()
    if 'broken' in body['model']: return web.json_response({'error': {'message': 'no'}}, status=400)
    if body['model'].startswith('meet:'): await meet(body['model'])
    text = said(body['model'].replace('meet:', 'answer:'), body['messages'][-1]['content'])
    ending = {'judge:cut': 'length', 'judge:filtered': 'content_filter'}.get(body['model'], 'stop')
    return web.json_response({'model': body['model'], 'usage': {'prompt_tokens': 1, 'completion_tokens': 1}, 'choices': [
        {'message': {'role': 'assistant', 'content': text}, 'finish_reason': ending}]})

app = web.Application()
app.router.add_post('/v1/chat/completions', complete)
listening = socket.create_server(('127.0.0.1', 0))
print(listening.getsockname()[1], flush=True)
web.run_app(app, sock=listening, print=None)
'''

@pytest.fixture(scope='module')
def server():
    "Start the server, give its address, end it. It listens before it names its port, so whoever comes early waits."
    process = subprocess.Popen([sys.executable, '-c', SERVER], stdout=subprocess.PIPE, text=True)
    yield f'http://127.0.0.1:{int(process.stdout.readline())}/v1'
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

JUDGES = ('A', 'tie', 'none', 'both', 'prefers', 'longest', 'broken', 'cut', 'filtered')
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
                                        ('broken', 'judge_error'), ('cut', 'judge_length'), ('filtered', 'judge_safety')])
def test_no_pair_comes_from_a_judge_without_a_verdict(clients, way, reason):
    pairs, dropped = judged(clients, way)
    assert pairs == [] and Counter(row['drop_reason'] for row in dropped) == {reason: 12} # 4 questions, 3 pairs of 3 answers
    assert all(row['prompt'] and row['chosen'] != row['rejected'] and row['evidence'] for row in dropped)

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

def test_the_pool_is_asked_side_by_side(server, settings, tmp_path):
    "No model of this pool answers before all of it have been asked; answers are in the order of prompts and models all the same."
    settings({f'model-{way}': {'provider': 'openai', 'model': f'meet:{way}', 'base_url': server, 'concurrency': 1} for way in '甲乙丙'})
    pool = {f'model-{way}': Client(f'model-{way}', tmp_path / 'ledger.sqlite') for way in '甲乙丙'}
    answers = collect_answers(QUESTIONS, pool, answers_per_prompt=3)
    assert [[(name, reply.text[0]) for name, reply in of_one.items()] for of_one in answers] == [[(f'model-{way}', way) for way in '甲乙丙']] * 4
    again = {name: Client(name, tmp_path / 'ledger.sqlite') for name in pool}
    assert [{name: reply.text for name, reply in of_one.items()} for of_one in collect_answers(QUESTIONS, again, answers_per_prompt=3)] \
        == [{name: reply.text for name, reply in of_one.items()} for of_one in answers] and not any(client.cost for client in again.values())

def test_a_model_that_cannot_be_asked_stops_the_others(server, settings, tmp_path):
    "Its neighbours finish what is under way and draw no more prompts."
    settings({'good': {'provider': 'openai', 'model': 'answer:甲', 'base_url': server, 'concurrency': 1},
              'bad': {'provider': 'openai', 'model': 'answer:乙', 'base_url': server, 'concurrency': 1}})
    class Refused(Client):
        def ask_each(self, *arguments): raise UserError('this model cannot be asked')
    drawn = []
    class Many(list):
        def __iter__(self):
            for prompt in super().__iter__():
                drawn.append(prompt)
                yield prompt
    many = Many([turn('user', f'第{number}題')] for number in range(20_000))
    with pytest.raises(UserError, match='cannot be asked'):
        ask_side_by_side([(Client('good', tmp_path / 'ledger.sqlite'), many), (Refused('bad', tmp_path / 'ledger.sqlite'), [QUESTIONS[0]['messages']])])
    assert len(drawn) < len(many)

def test_models_in_folders_take_turns(settings):
    "They share one machine; two at once would need the memory of two."
    settings({name: {'provider': 'local', 'model': name} for name in ('first', 'second')})
    inside, most = [], []
    class Local(Client):
        def ask_each(self, requests, deliver, *_):
            inside.append(self.model)
            most.append(len(inside))
            for request in requests: deliver(Reply(request.messages[-1]['content'], self.model, 'stop'))
            inside.remove(self.model)
    jobs = [(Local(name, ':memory:'), [QUESTIONS[0]['messages']]) for name in ('first', 'second')]
    assert [[reply.text for reply in replies] for replies in ask_side_by_side(jobs)] == [['first'], ['second']] and most == [1, 1]

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
    usable, left_out = candidate_pairs(answers, model_settings('gemini-pro'), 0, 'key')
    assert {frozenset(pair) for pair in usable} == {frozenset(pair) for pair in (('qwen', 'yi'), ('plain', 'qwen'), ('plain', 'yi'))}
    assert len(left_out) == 3 and {reason for *_, reason in left_out} == {'judge_of_own_family'}
    assert len(candidate_pairs(answers, model_settings('plain'), 0, 'key')[0]) == 6 # No family stands for no family
    assert len(candidate_pairs(answers, model_settings('gemini-pro'), 0, 'key', judge_own_family=True)[0]) == 6

def test_a_judge_under_another_name_is_still_itself():
    one, other = (ModelSettings(name, 'openai', 'm', base_url='http://127.0.0.1:1/v1') for name in 'ab')
    assert same_family(one, other) and not same_family(one, ModelSettings('c', 'openai', 'm', base_url='http://127.0.0.1:2/v1'))
    assert not same_family(ModelSettings('a', 'offline', 'careful'), ModelSettings('b', 'offline', 'careful')) # Rules have no taste

def test_a_pool_that_cannot_be_compared_is_refused(settings):
    pool = {'flash': 'gemini', 'pro': 'gemini', 'qwen': 'qwen', 'yi': 'yi', 'off': ''}
    settings({name: {'provider': 'openai', 'model': name, 'family': family, 'weight': 0 if name == 'off' else 1} for name, family in pool.items()})
    judge = model_settings('pro')
    assert eligible_models(list(pool), judge, 2) == ['qwen', 'yi'] # Relatives are not even asked, nor models of weight 0
    assert eligible_models(list(pool), judge, 4, judge_own_family=True) == ['flash', 'pro', 'qwen', 'yi']
    with pytest.raises(UserError, match='2 models to ask .*flash, pro are of the family of judge pro'): eligible_models(list(pool), judge, 3)
    with pytest.raises(UserError, match='twice'): eligible_models(['qwen', 'qwen', 'yi'], judge, 2)
    with pytest.raises(UserError, match='at least two'): eligible_models(['qwen', 'yi'], judge, 1)

def test_answers_that_are_none_and_answers_alike_are_not_judged(settings):
    settings({**{name: {'provider': 'openai', 'model': name} for name in 'abcd'}, 'j': {'provider': 'offline'}})
    answers = {'a': reply('海拔3,952公尺。'), 'b': reply('海拔3,952公尺。'), 'c': reply('海拔約四千', 'length'), 'd': reply('', 'safety')}
    usable, left_out = candidate_pairs(answers, model_settings('j'), 0, 'key')
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
    shares = pool_weights(['much', 'some', 'little', 'never'])
    assert draw_models(list(shares), 3, 'key') == draw_models(list(shares), 3, 'key', weights=shares)
    first = Counter(draw_models(list(shares), 1, str(key), weights=shares)[0] for key in range(2000))
    assert first['never'] == 0 and [abs(first[name] / 2000 - share) < 0.04 for name, share in (('much', 0.6), ('some', 0.3), ('little', 0.1))] == [True] * 3
    second = Counter(draw_models(list(shares), 2, str(key), weights=shares)[1] for key in range(2000))
    expected = {'some': 0.6 * 0.75 + 0.1 * 3 / 9, 'much': 0.3 * 6 / 7 + 0.1 * 6 / 9, 'little': 0.6 * 0.25 + 0.3 / 7} # Without replacement
    assert all(abs(second[name] / 2000 - share) < 0.04 for name, share in expected.items()), second

def test_a_model_without_weight_is_never_drawn(settings):
    settings({name: {'provider': 'offline', 'weight': weight} for name, weight in {'some': 1, 'other': 1, 'never': 0}.items()})
    draws = [draw_models(['never', 'some', 'other'], 3, str(key)) for key in range(100)]
    assert all(sorted(drawn) == ['other', 'some'] for drawn in draws) # Not even when no other is left
    settings({name: {'provider': 'offline', 'weight': weight} for name, weight in {'some': 0, 'other': 0, 'never': 1}.items()})
    assert draw_models(['never', 'some', 'other'], 3, 'key') == ['never'] # settings.ini may change

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
    model, settings = 'student', ModelSettings('student', 'offline')
    def __init__(self, *replies): self.replies = [reply(*one) if isinstance(one, tuple) else reply(one) for one in replies]
    def ask(self, prompts, **sampling): return self.replies[:len(prompts)]
    def ask_each(self, requests, deliver, *_):
        for each, _ in zip(self.replies, requests): deliver(each)

def test_spin_drops_answers_that_teach_nothing():
    curated = ['玉山海拔3,952公尺。', '玉山海拔3,952公尺。', '3 + 4 = 7\n答案：7', '玉山海拔3,952公尺。', '濁水溪是臺灣最長的河川。', '玉山海拔3,952公尺。']
    own = ['玉山海拔3,952公尺。', '玉山海拔３９５２公尺。'.replace('３９５２', '３,９５２'), '4 + 3 = 7，所以答案：7', '', '我不知道這條河。', '玉山玉山玉山玉山']
    rows = [dialogue([turn('system', '你是小玉。'), turn('user', f'{number}：請說明。'), turn('assistant', text)], 'knowledge_qa', license='CC0-1.0', model='offline')
            for number, text in enumerate(curated)]
    pairs, dropped = spin_pairs(rows, Scripted(*own))
    assert [row['drop_reason'] for row in dropped] == ['near_identical', 'near_identical', 'same_result', 'empty_answer']
    assert dropped[0]['evidence'].startswith('1.00: ')
    assert [pair['chosen'][0]['content'] for pair in pairs] == curated[4:] and [pair['rejected'][0]['content'] for pair in pairs] == own[4:]
    assert pairs[0]['prompt'] == rows[4]['messages'][:-1] and pairs[0]['meta']['parent_ids'] == [rows[4]['id']] and pairs[0]['origin'] == 'spin'

def test_spin_counts_a_failed_call():
    row = dialogue([turn('user', '問'), turn('assistant', '答')], 'public')
    failed = Scripted('')
    failed.replies = [Reply('key', '', 'error', error='http 500')]
    pairs, dropped = spin_pairs([row], failed)
    assert pairs == [] and dropped[0]['drop_reason'] == 'no_reply' and dropped[0]['evidence'] == 'http 500'

def test_spin_asks_nothing_of_damaged_rows_and_takes_no_answer_of_another_model():
    good = dialogue([turn('user', '問'), turn('assistant', '好的答案')], 'public')
    bad = [dialogue(messages, 'public') for messages in ([], [turn('user', '問')], [turn('assistant', '答')], [turn('user', '問'), turn('assistant', ' ')])]
    student = Scripted(('別的模型說的話', 'rerouted'), ('被截斷的答', 'length'))
    pairs, dropped = spin_pairs([*bad, good, good], student)
    assert [row['drop_reason'] for row in dropped] == ['no_assistant_turn', 'no_assistant_turn', 'roles_out_of_order', 'empty_content', 'answer_rerouted']
    assert len(pairs) == 1 and details(pairs[0])['finish_reason'] == 'length' # Not to come to an end is a fault to learn from

@pytest.mark.parametrize('chosen,rejected,reason', [
    ('台灣的首都是臺北。', '台湾的首都是台北。', 'near_identical'), ('甲', '甲', 'near_identical'), ('甲', '乙', ''), ('是', '  ', 'empty_answer'),
    ('共1,200元\n答案：1200', '一千二\n答案：1,200元', 'same_result'), ('答案：7', '答案：8', ''), ('3 + 4 = 7\n答案：7', '3 + 4 = 8\n答案：8', ''),
    ('因為下雨，所以取消。', '因為颱風，所以取消活動並擇日再辦。', '')])
def test_pairs_that_teach_nothing(chosen, rejected, reason): assert too_near(chosen, rejected) == reason

# Setting pairs aside

def pair(prompt, number, origin='spin'):
    prompt = [turn('user', prompt)]
    return {'id': content_hash([prompt, number]), 'prompt': prompt, 'chosen': [turn('assistant', f'好{number}')], 'rejected': [turn('assistant', '壞')], 'origin': origin}

def test_the_same_prompts_are_held_out_in_any_order_and_of_growing_sets():
    pairs = [pair(f'第{prompt}題', number) for prompt in range(100) for number in range(prompt % 3 + 1)]
    chosen = held_out_prompts(pairs, 20)
    assert held_out_prompts(pairs[::-1], 20) == chosen and len(chosen & held_out_prompts(pairs[:180], 20)) > len(chosen) * 0.7

def test_few_pairs_are_not_all_held_out():
    pairs = [pair(f'第{prompt}題', 0) for prompt in range(7)]
    assert len(held_out_prompts(pairs, 50)) == 2 and held_out_prompts([], 5) == set()

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
    row = adapt_pair(LAYOUTS[layout], 'set', 'MIT')
    assert (row['prompt'], row['chosen'], row['rejected'], row['origin']) == ([ASK], [GOOD], [POOR], 'public:set')
    assert row['meta']['license'] == 'MIT' and row['meta']['source'] == 'set'

@pytest.mark.parametrize('row,reason', [
    ({}, 'unknown_layout'), ({'text': 'x'}, 'unknown_layout'), ({'chosen': 'a'}, 'unknown_layout'), ({'chosen': 'a', 'rejected': 'b'}, 'roles_out_of_order'),
    ({'prompt': 'q', 'chosen': '', 'rejected': 'b'}, 'unknown_layout'), ({'prompt': 'q', 'chosen': None, 'rejected': None}, 'unknown_layout'),
    ({'chosen': [ASK, GOOD], 'rejected': [turn('user', 'Another.'), POOR]}, 'different_prompts')])
def test_unknown_layouts_are_no_pairs(row, reason): assert adapt_pair(row, 'set')['drop_reason'] == reason

def test_a_prompt_of_messages_is_not_lost():
    "TRL's own layout: the prompt apart, the sides hold the answers only."
    row = adapt_pair({'prompt': [ASK], 'chosen': [GOOD], 'rejected': [POOR]}, 'set')
    assert (row['prompt'], row['chosen'], row['rejected']) == ([ASK], [GOOD], [POOR])

def test_roles_go_by_other_words_too():
    said = lambda text: [{'from': 'human', 'value': 'Name a river.'}, {'from': 'gpt', 'value': text}]
    row = adapt_pair({'chosen': said('The Danube.'), 'rejected': said('Paris.')}, 'set')
    assert (row['prompt'], row['chosen'], row['rejected']) == ([ASK], [GOOD], [POOR])

def test_rows_of_ours_stay_as_they_are():
    row = {**pair('題', 0, 'math_outcome'), 'meta': {'model': 'm'}}
    assert adapt_pair(row, 'set') == row

def written(tmp_path, name, rows):
    "Write rows as a public set may lie on a disk."
    import pyarrow as pa
    import pyarrow.parquet as pq
    path = tmp_path / name
    if path.suffix == '.parquet': pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == '.json': path.write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    else: path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    return str(path)

def test_ultrafeedback_is_read_with_its_ratings(tmp_path):
    "argilla/ultrafeedback-binarized-preferences: texts under names of its own."
    rows = [{'source': 'evol_instruct', 'instruction': f'Name river {number}.', 'chosen_response': 'The Danube.', 'rejected_response': 'Paris.',
             'chosen_avg_rating': 4.75, 'rejected_avg_rating': 4.75 - number, 'chosen_model': 'wizardlm-70b'} for number in range(3)]
    kept, dropped = read_public(written(tmp_path, 'ultrafeedback.parquet', rows), 'MIT')
    assert len(kept) == 3 and not dropped and {row['meta']['model'] for row in kept} == {'wizardlm-70b'}
    assert {details(row)['margin'] for row in kept} == {0.0, 1.0, 2.0} and {details(row)['subset'] for row in kept} == {'evol_instruct'}
    gone = Spool()
    assert sum(1 for _ in mix_pairs(kept, gone, [ItemIndex([])], {}, min_margin=1.0)) == 1
    assert Counter(row['drop_reason'] for row in gone) == {'small_margin': 2}

def test_math_step_dpo_is_read_as_whole_solutions(tmp_path):
    "xinlai/Math-Step-DPO-10K: chosen and rejected are one step each; the steps before stand apart."
    steps = "Let's think step by step.\nStep 1: 7 × 8 = 56.\nStep 2:"
    row = {'dataset': 'GSM8K', 'prompt': 'What is 7 × 8 + 4?', 'initial_reason_steps': steps, 'chosen': ' 56 + 4 = 60.', 'rejected': ' 56 + 4 = 64.',
           'full_chosen': ' 56 + 4 = 60.\nStep 3: The answer is 60.', 'full_rejected': ' 56 + 4 = 64.\nStep 3: The answer is 64.', 'answer': '60'}
    whole = {**row, 'prompt': 'Again?', 'full_chosen': steps + row['full_chosen'], 'full_rejected': steps + row['full_rejected']}
    first = {**row, 'prompt': 'From the start?', 'initial_reason_steps': ''}
    kept, dropped = read_public(written(tmp_path, 'math_step.json', [row, whole, first]))
    said = {pair['prompt'][0]['content']: (pair['chosen'][0]['content'], pair['rejected'][0]['content']) for pair in kept}
    assert said['What is 7 × 8 + 4?'] == said['Again?'] == (f'{steps} 56 + 4 = 60.\nStep 3: The answer is 60.', f'{steps} 56 + 4 = 64.\nStep 3: The answer is 64.')
    assert said['From the start?'][0].startswith('56 + 4') and not dropped and details(kept[0])['reference'] == '60'

def test_infinity_preference_is_read_in_its_languages(tmp_path):
    "BAAI/Infinity-Preference: message lists that hold the prompt too; some rows are Chinese, in Simplified characters."
    talk = lambda asked, said: [turn('user', asked), turn('assistant', said)]
    row = lambda number, asked, good, bad: {'id': number, 'task': 'qa', 'prompt': asked, 'chosen': talk(asked, good), 'rejected': talk(asked, bad)}
    rows = [row(1, 'Name a river.', 'The Danube.', 'Paris.'), row(2, '这个软件怎么安装？', '请先下载安装包，然后双击运行它。', '不知道。')]
    kept, dropped = read_public(written(tmp_path, 'infinity.jsonl', rows))
    by_language = {pair['meta']['lang']: pair for pair in kept}
    assert sorted(by_language) == ['en', 'zh-CN'] and not dropped
    taiwan = pair_in_traditional(by_language['zh-CN'])
    assert taiwan['prompt'][0]['content'] == '這個軟體怎麼安裝？' and taiwan['id'] != by_language['zh-CN']['id'] and taiwan['meta']['lang'] == 'zh-TW'
    assert pair_in_traditional(by_language['zh-CN'], 'drop')['drop_reason'] == 'simplified_script'
    assert pair_in_traditional(by_language['en']) is by_language['en']

def test_lines_that_are_no_pairs_are_dropped_and_counted(tmp_path):
    path = tmp_path / 'broken.jsonl'
    good = {'question': 'Name a river.', 'system': 'Be brief.', 'chosen': 'The Danube.', 'rejected': 'Paris.'}
    path.write_text('\n'.join([json.dumps(good), '{"torn', '[1]', json.dumps({**good, 'rejected': 'The Danube. '}), json.dumps({'text': 'x'}),
                               json.dumps({**good, 'chosen': 3, 'rejected': 4}), json.dumps({'id': 'x', 'origin': 'spin', 'prompt': [], 'chosen': [], 'rejected': []})]))
    kept, dropped = read_public(str(path))
    assert [pair['prompt'] for pair in kept] == [[turn('system', 'Be brief.'), turn('user', 'Name a river.')]]
    assert [row['drop_reason'] for row in dropped] == ['malformed', 'malformed', 'identical_answers', 'unknown_layout', 'unknown_layout', 'no_assistant_turn']
    write_rows(dropped, tmp_path / 'dropped', 'preference', dropped=True) # What was damaged fits the form all the same

def test_rows_that_are_not_drawn_are_dropped(tmp_path):
    rows = [{'prompt': f'Name river {number}.', 'chosen': 'The Danube.', 'rejected': 'Paris.'} for number in range(20)]
    kept, dropped = read_public(written(tmp_path, 'many.jsonl', rows), max_rows=6)
    assert len(kept) == 6 and Counter(row['drop_reason'] for row in dropped) == {'not_drawn': 14}
    assert {row['id'] for row in kept} | {row['id'] for row in dropped} == {row['id'] for row in read_pairs(str(tmp_path / 'many.jsonl'))}

def test_a_draw_holds_no_rows():
    alive, most = 0, 0
    class Row(dict):
        def __init__(self, number):
            nonlocal alive, most
            super().__init__(id=str(number))
            alive, most = alive + 1, max(most, alive + 1)
        def __del__(self):
            nonlocal alive
            alive -= 1
    reasons = Counter()
    drawn = list(draw_rows((Row(number) for number in range(2000)), 50, lambda row: reasons.update([row['drop_reason']])))
    assert len(drawn) == 50 and reasons == {'not_drawn': 1950} and most < 10

# Prompts

def test_prompts_are_asked_without_their_answers_and_in_traditional(tmp_path):
    rows = [{'instruction': '这个软件怎么安装？', 'output': '请先下载安装包。'}, {'prompt': '臺灣最高的山是？'},
            {'messages': [turn('user', '你好'), turn('assistant', '你好！'), turn('user', '再見')]}, {'instruction': '', 'output': '答'}, {'nothing': 1}]
    dropped = Spool()
    drawn = list(draw_prompts([written(tmp_path, 'prompts.jsonl', rows)], 10, 'rlaif', dropped, [ItemIndex([])]))
    asked = {row['messages'][0]['content']: row for row in drawn}
    assert sorted(asked) == sorted(['這個軟體怎麼安裝？', '臺灣最高的山是？', '你好'])
    assert Counter(row['drop_reason'] for row in dropped) == {'empty_content': 1, 'unknown_layout': 1}
    assert conversation_text(asked['你好']['messages']) == '使用者：你好\n\n助理：你好！\n\n使用者：再見'
    assert ask_in_traditional(asked['臺灣最高的山是？']) is asked['臺灣最高的山是？']

CHINESE_SETS = {
    'Magpie-Align/Magpie-Qwen2-Pro-200K-Chinese': {'uuid': 'u', 'model': 'Qwen/Qwen2-72B-Instruct', 'instruction': '这个软件怎么安装？', 'response': '请先下载。',
        'conversations': [{'from': 'human', 'value': '这个软件怎么安装？'}, {'from': 'gpt', 'value': '请先下载。'}], 'task_category': 'Advice seeking'},
    'hfl/stem_zh_instruction': {'input': '这个软件怎么安装？', 'output': '请先下载。', 'instruction': ''},
    'FreedomIntelligence/Evol-Instruct-Chinese-GPT4': {'id': 1, 'conversations': [{'from': 'human', 'value': '这个软件怎么安装？'}, {'from': 'gpt', 'value': '请先下载。'}]},
}

@pytest.mark.parametrize('name', CHINESE_SETS)
def test_the_three_chinese_sets_give_prompts(tmp_path, name):
    dropped = Spool()
    drawn = list(draw_prompts([written(tmp_path, 'set.parquet', [CHINESE_SETS[name]])], 10, 'rlaif', dropped, []))
    assert [row['messages'][0]['content'].strip() for row in drawn] == ['這個軟體怎麼安裝？'], list(dropped)

def test_an_evaluation_item_is_never_asked_of_the_pool(tmp_path):
    item = '小美有3顆芭樂，又買了2顆，現在共有幾顆？'
    rows = [{'prompt': text} for text in (item, '請問：小美有3顆芭樂，又買了2顆，現在共有幾顆？請列式。', '小美有8顆芭樂，又買了6顆，現在共有幾顆？')]
    dropped = Spool()
    drawn = list(draw_prompts([written(tmp_path, 'prompts.jsonl', rows)], 10, 'rlaif', dropped, [ItemIndex([('held-out/7', item)])]))
    assert [row['messages'][0]['content'] for row in drawn] == [rows[2]['prompt']]
    assert [(row['drop_reason'], row['evidence']) for row in dropped] == [('contaminated', 'held-out/7')] * 2

def test_other_tasks_and_second_copies_are_told_apart(tmp_path):
    rows = [dialogue([turn('user', f'問{number}'), turn('assistant', '答')], task) for number, task in enumerate(['math', 'public', 'public'])]
    path, dropped = written(tmp_path, 'rows.jsonl', rows), Spool()
    drawn = list(draw_prompts([path, path], 10, 'spin', dropped, [ItemIndex([])], tasks=['public']))
    assert len(drawn) == 2 and Counter(row['drop_reason'] for row in dropped) == {'other_task': 2, 'duplicate': 2}

# Pairs of other stages

def test_outcome_and_repair_pairs_come_from_stage_folders(tmp_path):
    ask = [turn('user', '小美有3顆芭樂，又買了2顆，現在共有幾顆？')]
    right, wrong, same = ('3 + 2 = 5\n答案：5', '3 + 2 = 6\n答案：6', '2 + 3 = 5，所以答案：5')
    write_rows([preference(ask, right, wrong, 'math_outcome'), preference(ask, right, same, 'math_outcome')], tmp_path / 'math/preference', 'preference')
    mended = preference(ask, '濁水溪是臺灣最長的河川【id_0000000a】。', '濁水溪是臺灣最長的河川【id_0000000b】。', 'repair', details={'reason': 'wrong_source'})
    write_rows([mended], tmp_path / 'synthesis/preference', 'preference')
    dropped = Spool()
    pairs = list(draw_pairs([str(tmp_path / 'math'), str(tmp_path / 'synthesis')], 10, dropped))
    assert sorted(row['origin'] for row in pairs) == ['math_outcome', 'repair'] # A repair may change no more than a citation
    assert [row['drop_reason'] for row in dropped] == ['same_result']

# Mixing

def test_sources_that_repeat_or_contradict_each_other_count_once():
    ask = [turn('user', '臺灣最長的河川是？')]
    rows = [preference(ask, '濁水溪。', '淡水河。', 'math_outcome'), preference(ask, '浊水溪。', '淡水河。 ', 'public:set'),
            preference(ask, '淡水河。', '濁水溪。', 'rlaif'), preference(ask, '濁水溪。', '高屏溪。', 'rlaif')]
    found = list(drop_repeated(rows))
    assert [row.get('drop_reason') for row in found] == [None, 'duplicate', 'contradicts', None]
    assert found[1]['evidence'] == found[2]['evidence'] == f"{rows[0]['id']} (math_outcome)"

def test_pairs_that_differ_in_script_only_teach_the_script():
    ask, good, bad = [turn('user', '介紹玉山。')], '玉山是臺灣最高的山。', '玉山是台湾最高的山。'
    rows = [preference(ask, good, bad, 'rlaif'), preference(ask, good, bad, 'public:set'), preference(ask, bad, good, 'public:set')]
    assert [row.get('drop_reason') for row in drop_repeated(rows)] == [None, 'duplicate', 'contradicts']

# What people said

def test_people_outrank_the_judge(clients, tmp_path):
    "Blind choices of two reviewers, saved as the panel saves them: as it was, turned, tie, neither, edited, nobody looked."
    pairs, _ = judged(clients, 'prefers')
    said = dict(zip(('chosen', 'rejected', 'tie', 'reject', 'edit'), pairs))
    label = lambda verdict, reviewer, row, **more: Label(row['id'], 'preference', 'preference', verdict, reviewer, order='BA', **more)
    for reviewer in ('mei', 'jun'):
        labels = [label(verdict, reviewer, row, **({'edited': '人寫的答案'} if verdict == 'edit' else {})) for verdict, row in said.items()]
        save_labels(tmp_path / 'run/labels', labels)
    dropped, reviewed = Spool(), []
    kept = list(mix_pairs(pairs, dropped, [ItemIndex([])], {}, labels=read_labels(tmp_path / 'run'), reviewed=reviewed))
    assert Counter(row['drop_reason'] for row in dropped) == {'reviewer_tie': 1, 'reviewer_reject': 1} and len(kept) == len(pairs) - 2
    assert kept[0] == pairs[0] and kept[3:] == pairs[5:]
    for new, old in zip(kept[1:3], (said['rejected'], said['edit'])):
        assert new['id'] != old['id'] == new['meta']['parent_ids'][-1] and any(tag.startswith('reviewed:') for tag in new['meta']['tags'])
        assert not {'margin', 'win_rate'} & json.loads(new['meta']['details']).keys() # The judge's; of the pair as it was
    turned, details = kept[1], [json.loads(row['meta']['details']) for row in (kept[1], said['rejected'])]
    assert (turned['chosen'], turned['rejected']) == (said['rejected']['rejected'], said['rejected']['chosen'])
    assert (turned['meta']['model'], details[0]['rejected_model']) == (details[1]['rejected_model'], said['rejected']['meta']['model'])
    assert kept[2]['chosen'][0]['content'] == '人寫的答案' and len(reviewed) == 5
    found = review_summary(reviewed)['rlaif']
    assert found['decided'] == 2 and found['agreed'] == 0.5 and found['low'] < 0.5 < found['high'] and found['said']['tie'] == 1

def test_a_person_is_not_outranked_by_a_margin():
    "A turned pair would have a margin below nothing, and leave."
    pair = preference([turn('user', '問')], '好', '壞', 'rlaif', model='甲', details={'margin': 0.5, 'rejected_model': '乙'})
    label = Label(pair['id'], 'preference', 'preference', 'rejected', 'mei', order='AB')
    assert [row['chosen'][0]['content'] for row in mix_pairs([pair], Spool(), [ItemIndex([])], {}, 0.2, labels={pair['id']: label})] == ['壞']

def test_no_pair_gives_an_evaluation_item_away():
    item = '下列何者為臺灣最長的河川？(A)高屏溪 (B)濁水溪 (C)淡水河 (D)大甲溪'
    clean = preference([turn('user', '介紹濁水溪。')], '濁水溪很長。', '不知道。', 'rlaif')
    rows = [preference([turn('user', item)], 'B', 'A', 'public:set'), preference([turn('user', '出一題地理題。')], '不會。', f'好：{item}', 'rlaif'), clean]
    dropped = Spool()
    assert [row['id'] for row in mix_pairs(rows, dropped, [ItemIndex([('tmmlu/17', item)])], {})] == [clean['id']]
    assert [(row['drop_reason'], row['evidence']) for row in dropped] == [('contaminated', 'tmmlu/17')] * 2

def test_weights_are_shares_and_wrong_ones_are_refused():
    rows = [preference([turn('user', f'第{number}題')], f'{origin}的答案', '壞', origin) for number in range(300) for origin in ('spin', 'rlaif')]
    count = lambda weights: Counter(row['origin'] for row in mix_pairs(rows, Spool(), [ItemIndex([])], weights))
    assert count({}) == {'spin': 300, 'rlaif': 300} and count({'rlaif': 0}) == {'spin': 300}
    half = count({'spin': 0.5})
    assert 105 < half['spin'] < 195 and half['rlaif'] == 300 # Five deviations
    for weights, message in (({'spim': 1}, 'spim, but the origins are'), ({'spin': 2}, 'from 0 to 1'), ({'spin': '1'}, 'from 0 to 1')):
        with pytest.raises(UserError, match=message): check_weights(weights, ['spin', 'rlaif'])

def test_written_sides_hold_every_pair_once(tmp_path):
    spool = Spool()
    for number in range(60): spool.append({**pair(f'第{number % 25}題', number), 'meta': {}})
    assert sum(write_split(spool, 20, tmp_path)) == 60
    train, held_out = (list(read_rows(tmp_path, name)) for name in ('preference', 'held_out'))
    assert len(train) + len(held_out) == 60 and 20 <= len(held_out) < 24
    assert not {content_hash(row['prompt']) for row in train} & {content_hash(row['prompt']) for row in held_out} # None on both sides

def test_statistics_show_who_wins_by_length():
    rows = [preference([turn('user', f'第{number}題')], '好' * (200 if number < 8 else 10), '壞' * 100, 'rlaif', license='MIT', model='m', lang='zh-TW',
                       details={'margin': number / 2, 'rejected_model': 'n'}) for number in range(10)]
    found = pair_statistics(rows)['rlaif']
    assert found['longer_wins'] == 0.8 and found['length_differences'] == {'-100': 2, '100': 8} and found['margin'] == 2.25
    assert found['models'] == {'m': 10} and found['rejected_models'] == {'n': 10} and found['licenses'] == {'MIT': 10}
    assert json.loads(json.dumps(found)) == found
    panels = plot_pairs({'rlaif': found}).axes
    assert len(panels) == 3 and sum(bar.get_height() for bar in panels[0].patches) == 10 and plot_pairs({}).axes

# Judges, measured

def known_pairs(count):
    return [preference([turn('user', f'第{number}題')], '乙' * (8 + number % 9), '甲' * (8 + (number * 5) % 9), 'math_outcome') for number in range(count)]

def test_a_good_judge_is_told_from_a_bad_one(clients):
    good, always, broken = (calibrate(known_pairs(12), clients(f'judge-{way}')) for way in ('prefers', 'A', 'broken'))
    assert (good['accuracy'], good['right_share'], good['right']) == (1.0, 1.0, 12) and 0.7 < good['low'] < 0.8
    assert always['accuracy'] is None and always['right_share'] == 0.0 and always['order_decides'] == 12
    assert broken['judge_error'] == 12 and broken['right_share'] == 0.0
    require_calibrated(good, 0.9)
    for bad in (always, broken):
        with pytest.raises(UserError, match='right on 0%.*least_right asks for 60%'): require_calibrated(bad, 0.6)
    with pytest.raises(UserError, match='no pair to calibrate on'): require_calibrated({'right_share': None}, 0.6)

def test_a_judge_that_looks_at_length_is_found_out(clients):
    longest, fair = (calibrate(known_pairs(40), clients(f'judge-{way}')) for way in ('longest', 'prefers'))
    assert longest['accuracy_right_is_longer'] == 1.0 and longest['accuracy_right_is_shorter'] == 0.0
    assert longest['length']['biased'] and longest['length']['slope'] > 2 and not fair['length']['biased']
    assert fair['length']['truth'] > 3 * fair['length']['truth_error'] > abs(fair['length']['slope'])

def test_the_regression_finds_what_was_planted():
    "Verdicts drawn from known odds: a first place worth 0.5, a doubling worth 0.8, the truth worth 1.5."
    draw = random.Random(7)
    def planted():
        lengths, verdicts = (draw.randint(50, 800), draw.randint(50, 800)), []
        for side in (1, -1):
            odds = 0.5 + side * (0.8 * math.log2((lengths[0] + 1) / (lengths[1] + 1)) + 1.5)
            verdicts.append('A' if draw.random() < 1 / (1 + math.exp(-odds)) else 'B')
        return Judgement('', '', tuple(verdicts), (), lengths)
    found = length_regression([planted() for _ in range(1500)], first_is_right=True)
    for name, value in (('position', 0.5), ('slope', 0.8), ('truth', 1.5)):
        assert abs(found[name] - value) < 4 * found[f'{name}_error'] and found[f'{name}_error'] < 0.12, (name, found)
    assert found['biased'] and found['verdicts'] == 3000

def test_judgements_without_lengths_or_verdicts_give_no_slope():
    assert length_regression([]) == {'verdicts': 0}
    assert length_regression([Judgement('', 'order_decides', ('A', 'A'), (), (5, 5))]) == {'verdicts': 2}
    assert length_regression([Judgement('', 'judge_error', ('', ''), (), (5, 50))]) == {'verdicts': 0}

def test_a_judge_that_goes_round_in_circles_gives_no_pairs(settings, tmp_path):
    "甲 beats 乙, 乙 beats 丙, 丙 beats 甲: each answer wins half, so no margin is left."
    settings({name: {'provider': 'offline'} for name in 'abcj'})
    judge, beats = Client('j', tmp_path / 'ledger.sqlite'), {'甲': '乙', '乙': '丙', '丙': '甲'}
    def ask(prompts, **sampling):
        sides = [[prompt.split(f'<answer_{side}>\n')[1][0] for side in 'ab'] for prompt in prompts]
        return [reply('[[A]]' if beats[first] == second else '[[B]]') for first, second in sides]
    judge.ask = ask
    pairs, _ = rlaif_pairs(QUESTIONS[:1], {'a': Scripted('甲' * 9), 'b': Scripted('乙' * 9), 'c': Scripted('丙' * 9)}, judge, 3, 0)
    assert len(pairs) == 3 and all(details(row)['win_rate'] == {'chosen': 0.5, 'rejected': 0.5} for row in pairs)
    assert not list(mix_pairs(pairs, Spool(), [ItemIndex([])], {}))

# SPPO, and rounds

def test_trl_has_the_hard_form_of_sppo_and_reads_no_rate(tmp_path):
    from kyara.dpo import train_dpo
    from kyara.sft import make_student
    rows = [preference([turn('user', f'第{number}題')], '好的答案。', '不知道。', 'rlaif', details={'win_rate': {'chosen': 1.0, 'rejected': 0.0}}) for number in range(8)]
    texts = [row[part][0]['content'] for row in rows for part in ('prompt', 'chosen', 'rejected')]
    student = make_student(texts, tmp_path / 'student', vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    log = train_dpo(rows, [], student, tmp_path / 'out', 64, num_train_epochs=6, learning_rate=0.002, per_device_train_batch_size=8,
                    loss_type=['sppo_hard'], beta=0.1, logging_steps=1)
    losses = [entry['loss'] for entry in log['train']]
    assert losses[0] == pytest.approx(2 * (0.5 / 0.1) ** 2, rel=1e-3) and losses[-1] < losses[0] # Both sides miss ±1/(2β) at first
    assert log['train'][-1]['rewards/margins'] > log['train'][0]['rewards/margins']

def test_the_recipe_of_two_rounds_starts_each_from_the_last(monkeypatch):
    from kyara.run import load_recipe
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage.params for stage in load_recipe(ROOT / 'runs/spin.yaml').stages}
    assert stages['spin_2']['model'].endswith('dpo_1/model') and stages['dpo_2']['model'] == stages['spin_2']['model'] != stages['spin_1']['model']
    assert any(location.endswith('spin_1/held_out') for location in stages['spin_2']['held_out_items']) and stages['spin_2']['held_out'] == 0
    assert stages['dpo_2']['held_out_sources'] == stages['dpo_1']['held_out_sources']

# The stage

@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    "Run the stage by a recipe of its own, twice from one ledger."
    from kyara.run import run_recipe
    folder = tmp_path_factory.mktemp('workspace')
    (folder / 'runs').mkdir()
    recipe = folder / 'runs/pairs.yaml'
    recipe.write_text(json.dumps({'description': 'pairs', 'stages': {'pairs': {
        'notebook': '16_preference', 'outcomes': ['../tests/data/known_pairs.jsonl'], 'max_outcomes': 10, 'max_prompts': 8,
        'held_out_items': ['../tests/data/math_held_out.jsonl'], 'prompts': ['../tests/data/math_held_out.jsonl', 'sample:dialogues_en'],
        'ledger': str(folder / 'ledger.sqlite'), 'max_public': 30, 'weights': {'public:preferences_en': 0.5}, 'least_right': 0.9}}}), encoding='utf-8')
    made = []
    for _ in range(2):
        run_recipe(recipe, fresh=True, nbs=ROOT / 'nbs', runs=folder / 'runs')
        out = folder / 'runs/pairs/pairs'
        made.append((out, {name: list(read_rows(out / name)) for name in ('preference', 'held_out', 'dropped')}, (out / 'pairs.json').read_bytes()))
    return made

def test_every_row_of_the_stage_is_kept_or_dropped(stage):
    _, rows, _ = stage[0]
    kept, dropped = rows['preference'] + rows['held_out'], rows['dropped']
    by_origin = lambda origin: Counter(row.get('drop_reason', 'kept') for row in [*kept, *dropped] if row['origin'] == origin)
    assert by_origin('math_outcome') == {'kept': 10, 'not_drawn': 6}
    public = by_origin('public:preferences_en')
    assert public.total() == 40 and public['not_drawn'] == 10 and public['not_sampled'] + public['kept'] == 30 and public['not_sampled'] > 4
    rlaif = by_origin('rlaif')
    assert rlaif['contaminated'] >= 20 # No held-out problem is asked
    assert rlaif['not_drawn'] == 60 - rlaif['contaminated'] - 8 and rlaif.total() == rlaif['contaminated'] + rlaif['not_drawn'] + 8 * 3
    assert all(row['evidence'] for row in dropped if row['drop_reason'] != 'empty_answer')

def test_the_stage_repeats_itself_byte_for_byte(stage):
    (_, first, counted), (_, second, counted_again) = stage
    assert first == second and counted == counted_again

def test_the_stage_tells_what_it_measured(stage):
    out, rows, text = stage[0]
    found, manifest = json.loads(text), json.loads((out / 'manifest.json').read_text())
    assert found['calibration']['right_share'] == 1.0 and found['models_asked'] == ['offline', 'offline-brief', 'offline-careless']
    assert sum(group['pairs'] for group in found['origins'].values()) == manifest['counts']['kept'] + manifest['counts']['held_out']
    assert sum(sum(reasons.values()) for reasons in found['dropped'].values()) == manifest['counts']['dropped'] == len(rows['dropped'])
    assert 'pairs.json' in manifest['outputs'] and found['judging']['pairs'] >= found['judging'].get('won', 0)

# Real judges and real items

DATA = ROOT.parent / 'shared/data'

def test_verdicts_of_gpt_4_are_read_as_its_users_read_them():
    import gzip
    path = DATA / 'mt_bench/judgments/Stefanstud__FastChat.gpt-4_pair.jsonl.gz'
    if not path.exists(): pytest.skip(f'{path.name} is not on this machine')
    rows = [json.loads(line) for line in gzip.open(path, 'rt', encoding='utf-8')]
    sides = {'g1': {'model_1': 'A', 'model_2': 'B', 'tie': 'C', 'error': ''}, 'g2': {'model_1': 'B', 'model_2': 'A', 'tie': 'C', 'error': ''}}
    read = {game: [read_verdict(row[f'{game}_judgment']) for row in rows] for game in sides}
    for game, names in sides.items(): assert read[game] == [names[row[f'{game}_winner']] for row in rows], game
    joined = Counter(winner or reason for winner, reason in map(joint_verdict, read['g1'], read['g2']))
    assert joined['first'] == 8 and joined['second'] == 11 and joined['unreadable_verdict'] == 1 # As published
    assert joined['tie'] + joined['order_decides'] == 17

def test_public_pairs_about_gsm8k_test_problems_are_dropped():
    from kyara.preference import item_indexes
    path = DATA / 'gsm8k/test.jsonl.gz'
    if not path.exists(): pytest.skip(f'{path.name} is not on this machine')
    from kyara.core import read_jsonl
    questions = [row['question'] for _, row, _ in itertools.islice(read_jsonl(path), 200)]
    steps = lambda question: {'dataset': 'GSM8K', 'prompt': question, 'initial_reason_steps': "Let's think step by step.\nStep 1:",
                              'full_chosen': ' It is right.', 'full_rejected': ' It is wrong.', 'answer': '1'}
    changed = [''.join(str((int(sign) + 3) % 10) if sign.isdigit() else sign for sign in question) for question in questions]
    rows = [adapt_pair(steps(question), 'xinlai/Math-Step-DPO-10K') for question in questions + changed]
    dropped = Spool()
    kept = list(mix_pairs(rows, dropped, item_indexes([str(path)]), {}))
    gone = {row['prompt'][0]['content'] for row in dropped if row['drop_reason'] == 'contaminated'}
    assert len(gone & set(questions)) >= 198, sorted(set(questions) - gone)[:2]
    assert sum(row['prompt'][0]['content'] in changed for row in kept) >= 190 # Other numbers make another problem
