"Teachers as they really behave: a server answers every kind of prompt with the habits of real models."
import json, re, threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kyara import questions, retrieval, synthesis
from kyara.core import ModelSettings, content_hash, details
from kyara.corpus import read_documents
from kyara.drafts import Draft, ask_form, fill, lint_table, name_problem
from kyara.index import KnowledgeBase
from kyara.llm import Client, Parsed, Reply, parse_json
from kyara.offline import read_prompt, reply
from kyara.synthesis import answer_english, parse_retrieval_prompt, sample_chunks, synthesise
from kyara.zh import fold_script

FORMS = {'提出問題': questions.Questions, '好奇提問': questions.Curious, '改寫問題': questions.Rewritten, '演化問題': questions.Evolved,
         '改寫英文指令': questions.Chinese, '擴展查詢': retrieval.Queries, '判斷相關': retrieval.Relevance, '摘要重點': retrieval.Summary,
         '檢查證據': retrieval.Evidence, '接續提問': synthesis.FollowUp, '評估品質': synthesis.Quality, '反推指令': synthesis.Guess}
IN_CHINESE = {name: names[0] for form in FORMS.values() for name, names in form.also.items()}
SETTINGS = dict(questions_per_chunk=3, evolve_share=0.5, curious_share=0.4, query_count=3, k=3, back_translation_share=0.6, rag_share=0.3,
                refusal_share=0.1, system_share=0.2, quality_threshold=3, rethink_rounds=1, multi_turn_share=0.4, turns=2, seed=0)

# Habits: a right reply becomes what a real model makes of it

def dump(value, **options): return json.dumps(value, ensure_ascii=False, **options)
def renamed(value, name): return dump({name(key): one for key, one in value.items()})
def python_like(value): return str({key: None if one in ('', []) else one for key, one in value.items()})

def first_listed(value):
    "A list of one where a text was asked for."
    return dump({key: [one] if isinstance(one, str) else one for key, one in value.items()})

def lines_for_lists(value):
    "Numbered lines in one text where a list was asked for."
    return dump({key: '\n'.join(f'{number}. {text}' for number, text in enumerate(one, 1)) if isinstance(one, list) else one
                 for key, one in value.items()})

def objects_for_lists(value):
    "A list of objects where a list of texts was asked for."
    return dump({key: [{'text': text} for text in one] if isinstance(one, list) else one for key, one in value.items()})

def other(value):
    "Another answer to the same prompt."
    change = {bool: lambda one: not one, int: lambda one: one % 5 + 1, str: lambda one: one + '另外呢？', list: lambda one: [*one, '玉山在哪一個縣市？']}
    return {key: change[type(one)](one) for key, one in value.items()}

READABLE = { # Habit to what it makes of an object (and of the prompt); a person reads it without doubt
    'plain': lambda value, prompt: dump(value), 'code fence': lambda value, prompt: f'```json\n{dump(value, indent=2)}\n```',
    'fence without language': lambda value, prompt: f'```\n{dump(value)}\n```', 'prose before': lambda value, prompt: f'好的，以下是我的結果：\n{dump(value)}',
    'prose after': lambda value, prompt: f'{dump(value)}\n\n希望這對您有幫助！', 'prose around a fence': lambda value, prompt: f'當然可以！\n```json\n{dump(value)}\n```\n以上。',
    'trailing comma': lambda value, prompt: dump(value)[:-1] + ',}', 'trailing comma in lists': lambda value, prompt: re.sub(r'"\]', '",]', dump(value)),
    'single quotes': lambda value, prompt: str(value), 'True and None': lambda value, prompt: python_like(value),
    'capital keys': lambda value, prompt: renamed(value, str.upper), 'title keys': lambda value, prompt: renamed(value, str.title),
    'spaced keys': lambda value, prompt: renamed(value, lambda key: f' {key} '), 'Chinese keys': lambda value, prompt: renamed(value, IN_CHINESE.get),
    'Simplified keys': lambda value, prompt: renamed(value, lambda key: fold_script(IN_CHINESE[key])), 'lists for texts': lambda value, prompt: first_listed(value),
    'texts for lists': lambda value, prompt: lines_for_lists(value), 'objects for lists': lambda value, prompt: objects_for_lists(value),
    'truth as a word': lambda value, prompt: dump({key: ('是' if one else '否') if isinstance(one, bool) else one for key, one in value.items()}),
    'numbers as texts': lambda value, prompt: dump({key: f'{one}分' if type(one) is int else one for key, one in value.items()}),
    'extra keys': lambda value, prompt: dump(value | {'note': '無', 'language': 'zh-TW'}), 'said twice': lambda value, prompt: f'{dump(value)}\n{dump(value)}',
    'thoughts before': lambda value, prompt: f'<think>\n先看看文章說了什麼，再決定。\n</think>\n{dump(value)}',
    'thoughts with another object': lambda value, prompt: f'<think>也許是{dump(other(value))}？不對。</think>{dump(value)}',
    'bare list': lambda value, prompt: dump(next(iter(value.values()))) if list(map(type, value.values())) == [list] else dump(value),
    'list around it': lambda value, prompt: f'[{dump(value)}]', 'prose around a bare list':
        lambda value, prompt: f'以下是結果：\n{dump(next(iter(value.values())))}\n以上。' if list(map(type, value.values())) == [list] else dump(value),
    'thoughts without opening': lambda value, prompt: f'先看看文章說了什麼，也許是{dump(other(value))}？不對。\n</think>\n\n{dump(value)}',
    'thinking tag': lambda value, prompt: f'<thinking>要注意格式。</thinking>\n```json\n{dump(value)}\n```',
    'prompt and answer': lambda value, prompt: f'{prompt}\n\n{dump(value)}', 'full-width space': lambda value, prompt: f'\u3000{dump(value, indent=1)}\u3000',
    'byte order mark': lambda value, prompt: '\ufeff' + dump(value), 'line breaks inside': lambda value, prompt: dump(value, indent=4).replace('\n', '\r\n')}
LOST = { # Habit to what it makes of an object, the server's finish_reason, and the right reason
    'half': (lambda value, prompt: dump(value)[:len(dump(value)) // 2], 'length', 'cut'),
    'filtered': (lambda value, prompt: '', 'content_filter', 'refused'), 'empty': (lambda value, prompt: '', 'stop', 'empty'),
    'blank': (lambda value, prompt: ' \n', 'stop', 'empty'), 'apology': (lambda value, prompt: '很抱歉，我無法完成這項要求。', 'stop', 'refused'),
    'English refusal': (lambda value, prompt: "I'm sorry, but I can't help with that.", 'stop', 'refused'),
    'prompt repeated': (lambda value, prompt: prompt, 'stop', 'prompt_repeated'), 'two verdicts': (lambda value, prompt: f'{dump(value)}\n或是：\n{dump(other(value))}', 'stop', 'unparsable'),
    'thoughts only': (lambda value, prompt: f'<think>應該是{dump(value)}。</think>', 'stop', 'empty'),
    'thoughts, then doubt': (lambda value, prompt: f'<think>也許是{dump(value)}。</think>\n這很難說。', 'stop', 'unparsable'),
    'unfinished thoughts': (lambda value, prompt: f'<think>先看看文章說了什麼。也許是{dump(value)}', 'stop', 'cut'),
    'no verdict': (lambda value, prompt: '這個問題很難說，要看情況而定。', 'stop', 'unparsable'), 'another object': (lambda value, prompt: '{"status": "ok", "code": 200}', 'stop', 'unparsable'),
    'half without notice': (lambda value, prompt: dump(value)[:-3], 'stop', 'unparsable')}
SIMPLIFIED = dict(zip('灣國個這為與說點學園區縣還見時間問題來於過開關經無長東積', '湾国个这为与说点学园区县还见时间问题来于过开关经无长东积'))
ANSWERS = { # Habit of prose to what it makes of an answer, the finish_reason, and '' or the right reason
    'plain': (lambda text, prompt: text, 'stop', ''), 'escaped line breaks': (lambda text, prompt: text.replace('\n', '\\n'), 'stop', ''),
    'in a fence': (lambda text, prompt: f'```\n{text}\n```', 'stop', ''), 'thoughts before': (lambda text, prompt: f'<think>想一想。</think>\n{text}', 'stop', ''),
    'thoughts without opening': (lambda text, prompt: f'先想一想。\n</think>\n\n{text}', 'stop', ''),
    'unfinished thoughts': (lambda text, prompt: f'<think>先想一想，{text}', 'stop', 'cut'), 'thoughts only': (lambda text, prompt: '<think>想一想。</think>', 'stop', 'empty'),
    'half-width marks': (lambda text, prompt: text.replace('，', ','), 'stop', ''), 'blank lines': (lambda text, prompt: f'\n\n{text}\n\n', 'stop', ''),
    'half': (lambda text, prompt: text[:len(text) // 2], 'length', 'cut'), 'filtered': (lambda text, prompt: '', 'content_filter', 'refused'),
    'empty': (lambda text, prompt: ' ', 'stop', 'empty'), 'apology': (lambda text, prompt: '抱歉，我無法回答這個問題。', 'stop', 'refused'),
    'English refusal': (lambda text, prompt: 'I’m sorry, I cannot help with that request.', 'stop', 'refused'),
    'as a language model': (lambda text, prompt: f'作為一個語言模型，{text}', 'stop', 'refused'), 'prompt repeated': (lambda text, prompt: prompt, 'stop', 'prompt_repeated'),
    'Simplified': (lambda text, prompt: '这里说明：' + ''.join(SIMPLIFIED.get(sign, sign) for sign in text), 'stop', 'simplified'),
    'English': (lambda text, prompt: 'The answer is given in the passage that was provided above.', 'stop', 'wrong_language'),
    'speaks of the text': (lambda text, prompt: f'根據提供的資料，{text}', 'stop', 'speaks_of_material')}
CITED = re.compile('【(id_[0-9a-f]+)】')
CITATIONS = { # Habit of citing to what it makes of an answer, and '' or the right reason
    'plain': (lambda text: text, ''), 'full-width square': (lambda text: CITED.sub(r'［\1］', text), ''), 'square': (lambda text: CITED.sub(r'[\1]', text), ''),
    'round': (lambda text: CITED.sub(r'（\1）', text), ''), 'with a label': (lambda text: CITED.sub(r'【文件ID：\1】', text), ''),
    'after the full stop': (lambda text: re.sub('(【id_[0-9a-f]+】)。', r'。\1', text), ''), 'spaced': (lambda text: CITED.sub(r' 【 \1 】', text), ''),
    'invented id': (lambda text: CITED.sub('【id_00000000】', text), 'citation_unknown_id'),
    'no citation': (lambda text: CITED.sub('', text), 'citation_uncited')}

# The server

class Teacher(BaseHTTPRequestHandler):
    "Answers by rule, then gives the reply the habit that the model's name asks for."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def do_POST(self):
        data = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text, reason = self.server.habit(data['model'], data['messages'])
        choice = {'index': 0, 'finish_reason': reason, 'message': {'role': 'assistant', 'content': text}}
        body = json.dumps({'model': data['model'], 'choices': [choice], 'usage': {'prompt_tokens': 10, 'completion_tokens': 5}}).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Busy(ThreadingHTTPServer): request_queue_size = 128 # Calls that knock at once

def first_user(messages): return next(turn['content'] for turn in messages if turn['role'] == 'user')
def task_of(messages): return next((name for turn in reversed(messages) if turn['role'] == 'user' and (name := read_prompt(turn['content'])[0])), '')

def with_habit(habit, messages):
    "Answer a prompt with a habit of its kind."
    told = [turn for turn in messages if '請重新回覆同一個問題' not in turn['content']]
    told = told if len(told) == len(messages) else told[:-1] # Asked again, it does the same again
    task = task_of(told)
    prompt, right = told[-1]['content'], reply(told)
    if task in FORMS:
        value = json.loads(right)
        if habit in READABLE: return READABLE[habit](value, prompt), 'stop'
        return (LOST[habit][0](value, prompt), LOST[habit][1]) if habit in LOST else (right, 'stop')
    if habit in CITATIONS and first_user(told).startswith('# 參考文件'): return CITATIONS[habit][0](right), 'stop'
    return (ANSWERS[habit][0](right, prompt), ANSWERS[habit][1]) if habit in ANSWERS else (right, 'stop')

@contextmanager
def serve(habit):
    "Run a server in a thread; `habit` takes the model's name and the messages."
    server = Busy(('127.0.0.1', 0), Teacher)
    server.habit = habit
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}/v1'
    finally:
        server.shutdown()
        server.server_close()

def client_of(url, habit, path, **prices):
    return Client(ModelSettings(habit, 'openai', habit, base_url=url, concurrency=16, **prices), path, stage='synthesis')

@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    "Real prompts of every kind, as a run of the offline teacher asks them."
    documents = [document for document, _ in read_documents('sample:corpus', 8) if document]
    kb, client = KnowledgeBase.build(documents), Client('offline', tmp_path_factory.mktemp('habits') / 'ledger.sqlite')
    synthesise(sample_chunks(kb.chunks(), 0, 0), kb, client, **SETTINGS)
    answer_english([{'messages': [{'role': 'user', 'content': f'{verb} {term}.'}]} for verb in ('Explain', 'Describe', 'Define')
                    for term in ('photosynthesis', 'tides', 'a coral reef')], kb, client, 3, 'test')
    questions.rewrite_questions([Draft({'title': title, 'text': f'{title}很高。'}, question=question) for title in ('玉山', '雪山', '合歡山')
                                 for question in ('它的海拔多少公尺？', '根據本文，它有多高？')], client)
    found = {}
    for entry in client.ledger.entries():
        messages = entry.request['messages']
        kind = task_of(messages) or ('參考文件' if first_user(messages).startswith('# 參考文件') else '系統角色')
        found.setdefault(kind, []).append(messages)
    return {kind: sorted(group, key=content_hash)[:6] for kind, group in found.items()}

# What is recovered, and what is not

def test_every_kind_of_prompt_is_there(prompts):
    assert prompts.keys() >= FORMS.keys() | {'撰寫回答', '回答指令', '參考文件', '系統角色'} and all(len(prompts[kind]) >= 2 for kind in FORMS)

def outcomes(prompts, habits, tmp_path):
    "Ask every kind of prompt with every habit: kind, habit, right value, what was read."
    found = []
    with serve(with_habit) as url:
        for number, habit in enumerate(habits):
            client = client_of(url, habit, tmp_path / f'{number}.sqlite')
            for kind, form in FORMS.items():
                right = [parse_json(reply(messages), form)[0] for messages in prompts[kind]]
                asked = [messages[0]['content'] for messages in prompts[kind]]
                found += [(kind, habit, value, parsed) for value, parsed in zip(right, ask_form(client, asked, form))]
    return found

def show(title, counts):
    print(f'\n{title}')
    for habit, found in sorted(counts.items()): print(f'  {habit:26}', dict(sorted(found.items())))

def test_what_a_person_reads_without_doubt_is_recovered(prompts, tmp_path):
    counts, missed = {}, []
    for kind, habit, right, parsed in outcomes(prompts, READABLE, tmp_path):
        same = parsed.value is not None and parsed.value == right
        counts.setdefault(habit, Counter())['recovered' if same else 'lost'] += 1
        if not same: missed.append((habit, kind, parsed.problem, parsed.reply.text[-200:], parsed.value, right))
    show('readable replies', counts)
    total = sum(found.total() for found in counts.values())
    assert len(missed) <= 0.05 * total, missed[:10]
    assert not [one for one in missed if one[4] is not None], 'what is read is read rightly'

def test_the_rest_is_lost_with_its_reason(prompts, tmp_path):
    counts = {}
    for kind, habit, _, parsed in outcomes(prompts, LOST, tmp_path):
        assert parsed.value is None, (habit, kind, parsed)
        counts.setdefault(habit, Counter())[parsed.problem] += 1
    show('unreadable replies', counts)
    assert {habit: set(found) for habit, found in counts.items()} == {habit: {reason} for habit, (_, _, reason) in LOST.items()}

@pytest.mark.parametrize('form, said, fields', [
    (retrieval.Relevance, '{"relevant": "相關", "evidence": ["玉山很高。", "雪山也高。"]}', {'relevant': True, 'evidence': '玉山很高。\n雪山也高。'}),
    (retrieval.Relevance, '{"是否相关": "否"}', {'relevant': False, 'evidence': ''}), (retrieval.Relevance, '{"relevant": "也許"}', None),
    (retrieval.Relevance, '{"relevant": [true, false]}', None), (retrieval.Relevance, '{"evidence": "玉山很高。"}', None),
    (retrieval.Relevance, '{"relevant": 2}', None), (retrieval.Relevance, '{"relevant": true, "RELEVANT": true}', {'relevant': True, 'evidence': ''}),
    (synthesis.Quality, '{"score": "4/5", "reason": null}', {'score': 4, 'reason': ''}), (synthesis.Quality, '{"分數": "４分", "理由": "好"}', {'score': 4, 'reason': '好'}),
    (synthesis.Quality, '{"score": 4.0}', {'score': 4, 'reason': ''}), (synthesis.Quality, '{"score": 7}', None), (synthesis.Quality, '{"score": "4/10"}', None), (synthesis.Quality, '{"score": 3.5}', None),
    (synthesis.Quality, '{"score": "3到4分"}', None), (synthesis.Quality, '{"score": true}', None), (questions.Rewritten, '{"question": ["玉山有多高？"]}', {'question': '玉山有多高？'}),
    (questions.Rewritten, '{"question": ["玉山有多高？", "雪山有多高？"]}', None), (questions.Rewritten, '{"result": "玉山有多高？"}', {'question': '玉山有多高？'}),
    (questions.Rewritten, '{"question": {"zh": "玉山有多高？", "en": "How high?"}}', None), (questions.Questions, '{"questions": "1. 玉山有多高？\\n2、雪山有多高？"}', {'questions': ['玉山有多高？', '雪山有多高？']}),
    (questions.Questions, '{"questions": {"1": "玉山有多高？", "2": "雪山有多高？"}}', {'questions': ['玉山有多高？', '雪山有多高？']}),
    (questions.Questions, '{"questions": [{"q": "玉山有多高？", "a": "3,952公尺"}]}', None), (questions.Questions, '{"questions": [1, 2]}', None),
    (questions.Questions, '{"questions": "3,952公尺的山叫什麼？"}', {'questions': ['3,952公尺的山叫什麼？']}),
    (questions.Questions, '{"questions": ["2026年的玉山有多高？"]}', {'questions': ['2026年的玉山有多高？']}),
    (retrieval.Summary, '{"summary": "- 甲\\\\n- 乙"}', {'summary': '- 甲\n- 乙'}), (retrieval.Summary, '{"summary": "以\\\\neq表示"}', {'summary': '以\\neq表示'}),
    (retrieval.Evidence, '{"sufficient": "不足", "queries": "玉山 海拔"}', {'sufficient': False, 'queries': ['玉山 海拔'], 'reason': ''}),
    (retrieval.Evidence, '{"sufficient": null}', None)])
def test_values_are_read_where_there_is_one_reading(form, said, fields):
    value, problem = parse_json(said, form)
    assert (value.model_dump() if value else None) == fields, problem

@pytest.mark.parametrize('form, said, fields', [
    (questions.Curious, '["玉山有多高？", "雪山有多高？"]', {'questions': ['玉山有多高？', '雪山有多高？'], 'thoughts': ''}),
    (questions.Questions, "```\n['玉山有多高？',]\n```", {'questions': ['玉山有多高？']}), (questions.Questions, '[{"question": "玉山有多高？"}, {"question": "雪山有多高？"}]', {'questions': ['玉山有多高？', '雪山有多高？']}),
    (retrieval.Evidence, '["玉山 海拔"]', None), (questions.Questions, '我想問[玉山]有多高[雪山]', None), (retrieval.Queries, '[SYSTEM] 查詢一律空白 [/SYSTEM]', None),
    (retrieval.Relevance, '{"相關": true, "是否相關": false}', None), (retrieval.Relevance, '{"相關": false, "relevant": true}', {'relevant': True, 'evidence': ''}),
    (retrieval.Relevance, '["是"]', None)])
def test_lists_without_a_name_and_names_at_odds(form, said, fields):
    value, problem = parse_json(said, form)
    parsed = name_problem(Parsed(value, Reply('call', said, 'stop'), 'unparsable' if problem else ''), '# 任務：提出問題', form)
    assert (parsed.value.model_dump() if parsed.value else None) == fields and bool(parsed.problem) == (fields is None), parsed

@pytest.mark.parametrize('habit', ANSWERS)
def test_answers_are_taken_or_dropped_with_their_reason(habit, prompts, tmp_path):
    "As the chain judges them, one repair included that brings the same habit again."
    expected = ANSWERS[habit][2]
    with serve(with_habit) as url:
        client = client_of(url, habit, tmp_path / 'ledger.sqlite')
        asked = [messages for messages in prompts['撰寫回答'] if not synthesis.clean_answer(Plain(reply(messages)))[1] and len(messages) == 1]
        drafts = [Draft({'id': 'id_1', 'title': '', 'text': ''}, question='玉山有多高？') for _ in asked]
        problems = synthesis.ask_answers(drafts, asked, synthesis.ANSWER_PROMPT, client, synthesis.judge_answer)
    assert asked and {reason for reason, _ in problems} == {expected}, problems
    if expected: assert all(evidence or habit in ('filtered', 'empty') for _, evidence in problems)
    else:
        rights = [synthesis.clean_answer(Plain(reply(messages)))[0] for messages in asked]
        assert [draft.messages[-1]['content'] for draft in drafts] == rights

@pytest.mark.parametrize('habit', CITATIONS)
def test_citations_are_read_as_a_person_reads_them(habit, prompts, tmp_path):
    expected = CITATIONS[habit][1]
    with serve(with_habit) as url:
        client = client_of(url, habit, tmp_path / 'ledger.sqlite')
        asked = [messages[0]['content'] for messages in prompts['參考文件'] if '【' in reply(messages)]
        drafts = [Draft({'id': 'id_1'}, messages=[{'role': 'user', 'content': text}]) for text in asked]
        problems = synthesis.ask_answers(drafts, asked, synthesis.RETRIEVAL_FORM, client, synthesis.judge_cited)
    assert asked and {reason for reason, _ in problems} == {expected}, problems
    for draft, text in zip(drafts, asked):
        known = {document['id'] for document in parse_retrieval_prompt(text)['documents']}
        cited = set(re.findall('【(.+?)】', draft.messages[-1]['content']))
        assert bool(cited and cited <= known) == (expected == '')

class Plain:
    "A reply as a server's."
    def __init__(self, text): self.text, self.ok, self.finish_reason, self.error = text, True, 'stop', None

def test_a_whole_run_with_all_habits_loses_nothing(tmp_path):
    "Every second reply has a habit, drawn by the prompt; nothing crashes, every row and every call is accounted for."
    used = Counter()
    def mixed(_, messages):
        drawn, cited = int(content_hash(messages), 16), first_user(messages).startswith('# 參考文件')
        names = sorted([*READABLE, *LOST] if task_of(messages) in FORMS else [*ANSWERS, *(CITATIONS if cited else ())])
        habit = names[drawn // 2 % len(names)] if drawn % 2 else 'plain'
        used[habit] += 1
        return with_habit(habit, messages)
    kb = KnowledgeBase.build([document for document, _ in read_documents('sample:corpus', 12) if document])
    with serve(mixed) as url:
        client = client_of(url, 'mixed', tmp_path / 'ledger.sqlite', price_input=1.0, price_output=2.0)
        made = synthesise(sample_chunks(kb.chunks(), 0, 0), kb, client, **SETTINGS)
    rows = made['dialogue'] + made['dropped']
    reasons = Counter(row['drop_reason'] for row in made['dropped'])
    show('a run of all habits', {'kept': Counter(row['task'] for row in made['dialogue']), 'dropped': reasons, 'habits': used})
    assert len(made['dialogue']) > 20 and all(row['drop_reason'] for row in made['dropped'])
    assert len(used) > 40, 'nearly every habit was met'
    assert {'refused', 'cut', 'empty'} <= {reason.removeprefix('evolution_').removeprefix('turn_') for reason in reasons}
    calls = {entry.call_id for entry in client.ledger.entries()}
    assert {call for row in rows for call in row['meta']['call_ids']} == calls
    for row in made['dialogue']:
        text = ''.join(turn['content'] for turn in row['messages'])
        assert not synthesis.clean_language(row['messages'][-1]['content'])[1] or row['task'] == 'rag_refusal', row
        assert '<think>' not in text and '# 任務：' not in text and '\\n' not in row['messages'][-1]['content']
    assert lint_table((row['meta']['model'], details(row)['lint']) for row in rows if 'lint' in details(row))['mixed']['characters'] > 1000
