"Adapters against real servers: OpenAI's form, Gemini's REST and gRPC, batch jobs, and `transformers serve`."
import asyncio, json, os, signal, socket, subprocess, sys, threading, time, urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_gemini import ECHO, KEY, Fake, error, serve_grpc, serve_rest
from test_wire import absent

from kyara import gemini
from kyara.core import ModelSettings, UserError, read_settings, model_settings
from kyara.gemini import Threads, gemini_schema
from kyara.ledger import Ledger
from kyara.llm import CallFailure, Refused, Request, ask
from kyara.local import load_local
from kyara.openai import read_openai, strict_schema
from kyara.providers import BATCHES, CALLS, check_request
from kyara.wire import environment_proxy

SECRET = 'sk-planted-0123456789abcdef'
PATIENCE = 300 # Seconds that a call may take on however slow a machine
turns = lambda text: [{'role': 'system', 'content': '用繁體中文回答。'}, {'role': 'user', 'content': text}]

@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('OPENAI_TEST_KEY', SECRET)
    monkeypatch.setenv('GEMINI_TEST_KEY', KEY)
    monkeypatch.setenv('WRONG_TEST_KEY', 'wrong-' + KEY)

def send(settings, *requests):
    "Make calls, all at once, in one session; failures come in the place of replies."
    async def main():
        async with CALLS[settings.provider](settings) as call:
            return await asyncio.gather(*map(call, requests), return_exceptions=True)
    return asyncio.run(main())

@contextmanager
def serve(answer):
    "Run a server; `answer` takes its handler and the JSON body, and gives status, body and headers."
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *_): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            status, reply, *headers = answer(self, body)
            raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in headers: self.send_header(name, value)
            self.send_header('Content-Length', str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        def handle_error(self, *_): pass
    server = Server(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()

def openai_settings(url, **more):
    return ModelSettings('qwen', 'openai', 'qwen3-32b', url + '/v1', 'OPENAI_TEST_KEY', **{'timeout': PATIENCE, **more})

def good(text='三千九百五十二公尺。', reason='stop', **message):
    return {'model': 'qwen3-32b', 'choices': [{'message': {'content': text, **message}, 'finish_reason': reason}],
            'usage': {'prompt_tokens': 9, 'completion_tokens': 5}}

# OpenAI-compatible servers

def test_openai_sends_everything_that_was_asked_for():
    bodies = []
    with serve(lambda handler, body: (bodies.append((handler.path, handler.headers['Authorization'], body)), (200, good()))[1]) as url:
        schema = {'type': 'object', 'properties': {'answer': {'type': 'string'}}}
        request = Request(turns('玉山有多高？'), 0.5, 0.9, 64, ('\n',), 7, schema, 2)
        reply, = send(openai_settings(url), request)
    path, key, body = bodies[0]
    assert (path, key) == ('/v1/chat/completions', f'Bearer {SECRET}')
    form = body.pop('response_format')['json_schema']
    assert form['strict'] and form['schema']['required'] == ['answer']
    assert body == {'model': 'qwen3-32b', 'messages': turns('玉山有多高？'), 'temperature': 0.5, 'top_p': 0.9, 'max_tokens': 64, 'stop': ['\n'], 'seed': 9}
    assert (reply.text, reply.input_tokens, reply.output_tokens, reply.model_version) == ('三千九百五十二公尺。', 9, 5, 'qwen3-32b')

def test_newer_models_name_the_limit_otherwise_and_are_asked_twice_only_at_first():
    seen = []
    def answer(handler, body):
        seen.append('max_tokens' in body)
        return (400, {'error': {'message': "Use 'max_completion_tokens' instead.", 'code': 'unsupported_parameter'}}) if seen[-1] else (200, good())
    async def main(settings):
        async with CALLS['openai'](settings) as call:
            first = await asyncio.gather(*(call(Request(turns(str(n)))) for n in range(8)))
            return first + [await call(Request(turns('later')))]
    with serve(answer) as url: replies = asyncio.run(main(openai_settings(url)))
    assert len(replies) == 9 and sum(seen) <= 8 and not any(seen[-1:]), seen

@pytest.mark.parametrize('status, reply, kind, said', [
    (401, {'error': {'message': f'bad key {SECRET}'}}, Refused, 'OPENAI_TEST_KEY'),
    (404, {'error': {'message': 'no such model'}}, Refused, 'knows no model'),
    (402, {}, Refused, 'money'),
    (429, {'error': {'code': 'insufficient_quota'}}, Refused, 'money'),
    (308, {}, Refused, 'moved to'),
    (400, {'error': {'code': 'unsupported_value', 'message': "Unsupported value: 'temperature' does not support 0 with this model."}}, UserError, 'temperature'),
    (400, {'error': {'code': 'invalid_request_error', 'message': '`temperature` is deprecated for this model.'}}, UserError, 'deprecated'),
    (400, {'error': {'message': 'This prompt of max_tokens is too long'}}, CallFailure, 'http 400'),
    (400, {'error': {'message': f'too long {SECRET}'}}, CallFailure, 'http 400'),
    (429, {'error': {'message': f'slow down {SECRET}'}}, CallFailure, 'http 429'),
    (500, b'<html>oops', CallFailure, 'http 500'),
    (200, b'<html>welcome', CallFailure, 'malformed reply'),
    (200, b'\xff\xfe\x00', CallFailure, 'malformed reply'),
    (200, good(reason='abort'), CallFailure, 'broke off'),
], ids=str)
def test_openai_failures_have_names_and_hide_the_key(status, reply, kind, said):
    with serve(lambda handler, body: (status, reply, ('Location', 'http://elsewhere'), ('Retry-After', '3'))) as url:
        failure, = send(openai_settings(url), Request(turns('玉山')))
    assert type(failure) is kind and said in (str(failure) + getattr(failure, 'reason', '')), failure
    assert SECRET not in repr(failure)
    if status == 429 and kind is CallFailure: assert failure.wait == 3 and failure.busy

@pytest.mark.parametrize('reply, ending, text', [
    (good('三千', 'length'), 'length', '三千'), (good('', 'content_filter'), 'safety', ''), (good(None, refusal='不行'), 'safety', ''),
    (good('三千', reasoning_content='先查資料'), 'stop', '三千'), (good([{'type': 'thinking', 'thinking': []}, {'type': 'text', 'text': '三千'}]), 'stop', '三千'),
    (good(None, 'tool_calls'), 'other', ''), (good('三千', None), 'stop', '三千'), ({**good(), 'usage': None}, 'stop', '三千九百五十二公尺。'),
    (good(f'鑰匙 {SECRET}'), 'stop', '鑰匙 [key]'),
], ids=str)
def test_openai_endings(reply, ending, text):
    got = read_openai(json.dumps(reply).encode(), SECRET)
    assert (got.finish_reason, got.text) == (ending, text) and SECRET not in got.raw

@pytest.mark.parametrize('reply', [[], {}, {'choices': []}, {'choices': [{}]}, {'choices': [{'message': None}]}, {'choices': [{'message': {'content': 7}}]},
                                   {'choices': 'none'}, {**good(), 'usage': {'prompt_tokens': 'many'}}, {'error': {'message': 'x'}}, 'text', 1], ids=str)
def test_garbage_of_an_openai_server_is_named(reply):
    with pytest.raises(CallFailure, match='malformed reply'): read_openai(json.dumps(reply).encode())

def test_a_filter_that_refuses_the_prompt_is_an_outcome_not_a_failure():
    with serve(lambda *_: (400, {'error': {'code': 'content_filter', 'message': 'no'}})) as url: reply, = send(openai_settings(url), Request(turns('x')))
    assert (reply.finish_reason, reply.text) == ('safety', '')

def test_stop_texts_that_a_server_leaves_in_are_cut():
    with serve(lambda *_: (200, good('三千\n\n問：'))) as url: reply, = send(openai_settings(url), Request(turns('x'), stop=('\n\n',)))
    assert reply.text == '三千'

def test_silence_a_dropped_body_and_nobody_there_are_told_apart():
    over = threading.Event()
    def answer(handler, body):
        prompt = body['messages'][-1]['content']
        if prompt == 'silence': over.wait(PATIENCE)
        if prompt == 'dropped':
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"half')
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        return 200, good()
    with serve(answer) as url:
        silent, = send(openai_settings(url, timeout=0.5), Request(turns('silence')))
        over.set()
        dropped, = send(openai_settings(url), Request(turns('dropped')))
    with absent() as url: nobody, = send(openai_settings(url.removesuffix('/v1')), Request(turns('x')))
    assert silent.reason == 'no reply in 0.5 seconds' and dropped.reason.startswith('connection lost'), (silent, dropped)
    assert nobody.reason.startswith('unreachable'), nobody

def test_a_proxy_of_the_environment_is_used(monkeypatch):
    paths = []
    with serve(lambda handler, body: (paths.append(handler.path), (200, good()))[1]) as proxy:
        monkeypatch.setenv('http_proxy', proxy)
        reply, = send(openai_settings('http://models.example'), Request(turns('玉山')))
    assert reply.text and paths == ['http://models.example/v1/chat/completions']
    monkeypatch.setenv('https_proxy', 'socks5://user:secret@proxy.example:1080')
    with pytest.raises(UserError, match='socks5://proxy.example|speaks no HTTP') as caught: environment_proxy('https://models.example/v1', 'qwen')
    assert 'secret' not in str(caught.value)

@pytest.mark.parametrize('url', ['models.example/v1', 'ftp://models.example', 'http://', '127.0.0.1:8000', 'http://models..example/v1', 'http://127.0.0.1:99999/v1',
                                 'http://127.0.0.1:0/v1', 'http://127.0.0.1:80a/v1', 'http://[::1/v1', f'http://{"m" * 64}.example/v1'])
def test_an_address_that_is_none_is_said_at_once(url):
    with pytest.raises(UserError, match='is no address'): send(ModelSettings('m', 'openai', 'm', url), Request(turns('x')))
    with pytest.raises(UserError, match='is no address'): send(gemini_settings(url.replace('http', 'grpc', 1)), Request(turns('x')))

@pytest.mark.parametrize('url', [f'http://user:{SECRET}@models.example/v1', f'http://models.example/v1?key={SECRET}', f'http://models.example/v1#{SECRET}'])
def test_an_address_takes_no_key_with_it(url):
    "What follows a question mark would be lost besides."
    with pytest.raises(UserError, match='into the environment') as caught: send(ModelSettings('m', 'openai', 'm', url), Request(turns('x')))
    assert SECRET not in str(caught.value)

def test_strict_schemas_close_what_pydantic_leaves_open():
    from enum import Enum
    from pydantic import BaseModel, Field
    class Kind(str, Enum): A = 'a'; B = 'b'
    class Part(BaseModel): default: str = 'x'; kind: Kind = Field(Kind.A, description='哪一種')
    class Whole(BaseModel): parts: list[Part]; best: Part | None = None; child: 'Whole | None' = None
    strict = strict_schema(Whole.model_json_schema())
    text = json.dumps(strict)
    assert '"default":' not in text.replace('"default": {', '') and text.count('"additionalProperties": false') == 3 # a field may be named default
    assert strict['required'] == ['parts', 'best', 'child'] and strict['$defs']['Part']['required'] == ['default', 'kind']
    assert strict['$defs']['Part']['properties']['kind'] == {'enum': ['a', 'b'], 'title': 'Kind', 'type': 'string', 'description': '哪一種'}

# Gemini

def gemini_settings(url, **more):
    return ModelSettings('flash', 'gemini', more.pop('model', 'gemini-3-flash'), url, more.pop('key', 'GEMINI_TEST_KEY'), **{'timeout': PATIENCE, **more})

@pytest.mark.parametrize('start', [serve_rest, serve_grpc], ids=['rest', 'grpc'])
def test_gemini_over_both_wires(start):
    fake, marks = Fake(), ['玉山', 'length', 'safety', 'blocked', 'empty', 'rerouted', 'odd', 'bad', 'busy', 'broken']
    with start(fake) as url:
        replies = dict(zip(marks, send(gemini_settings(url), Request(turns('玉山')), *(Request(turns(f'[[{mark}]]')) for mark in marks[1:]))))
        replies['slow'], = send(gemini_settings(url, timeout=1), Request(turns('[[slow]]')))
    assert (replies['玉山'].text, replies['玉山'].model_version) == (ECHO + '玉山', 'gemini-3-flash-001')
    endings = {mark: replies[mark].finish_reason for mark in marks[:7]}
    assert endings == {'玉山': 'stop', 'length': 'length', 'safety': 'safety', 'blocked': 'safety', 'empty': 'stop', 'rerouted': 'stop', 'odd': 'other'}
    assert replies['rerouted'].model_version == 'gemini-9-nano' and (replies['玉山'].input_tokens, replies['玉山'].output_tokens) == (2, 5)
    assert replies['busy'].wait == 0.25 and replies['busy'].busy and replies['busy'].reason == 'http 429: quota (wait 0.25 s)', replies['busy']
    assert replies['bad'].attempts == 1 and KEY not in repr(replies['bad']) and '[key]' in replies['bad'].reason, replies['bad']
    assert replies['broken'].reason == 'http 500: oops' and replies['slow'].reason == 'no reply in 1 seconds', replies
    assert set(fake.keys) == {KEY}

@pytest.mark.parametrize('start', [serve_rest, serve_grpc], ids=['rest', 'grpc'])
def test_gemini_refusals(start, monkeypatch):
    fake = Fake()
    monkeypatch.setenv('GEMINI_API_KEY', 'a-key-of-somebody-else')
    with start(fake) as url:
        for settings, said in ((gemini_settings(url, key='WRONG_TEST_KEY'), 'WRONG_TEST_KEY'), (gemini_settings(url, key=''), 'names none'), (gemini_settings(url, model='gone'), "knows no model 'gone'")):
            failure, = send(settings, Request(turns('x')))
            assert isinstance(failure, Refused) and said in str(failure) and KEY not in str(failure), failure
    assert 'a-key-of-somebody-else' not in fake.keys # the library would take it from the environment
    with absent() as url: failure, = send(gemini_settings(url.removesuffix('/v1').replace('http', 'grpc' if start is serve_grpc else 'http')), Request(turns('x')))
    assert failure.reason.startswith('unreachable'), failure

@pytest.mark.parametrize('start', [serve_rest, serve_grpc], ids=['rest', 'grpc'])
def test_gemini_is_given_the_seed_that_its_library_does_not_know(start):
    fake = Fake()
    with start(fake) as url:
        replies = send(gemini_settings(url), Request(turns('甲'), seed=0), Request(turns('乙'), seed=300, sample=2), Request(turns('丙')))
    assert {call['contents'][0]['parts'][0]['text']: call['generationConfig'].get('seed') for call in fake.calls} == {'甲': 0, '乙': 302, '丙': None}
    assert all(reply.finish_reason == 'stop' for reply in replies)

def test_gemini_sends_everything_that_was_asked_for():
    from typing import Literal
    from pydantic import BaseModel, Field
    class Part(BaseModel): kind: Literal['山', '湖']; height: float | None = None
    class Judgement(BaseModel): score: int = Field(ge=1, le=5, description='分數'); parts: list[Part]
    fake = Fake()
    with serve_rest(fake) as url:
        request = Request(turns('玉山'), 0.0, 0.9, 64, ('甲', '乙'), schema=Judgement.model_json_schema(), safety='few')
        check_request(request, gemini_settings(url))
        send(gemini_settings(url), request)
    body = fake.calls[0]
    assert body['systemInstruction']['parts'] == [{'text': '用繁體中文回答。'}] and len(body['contents']) == 1
    assert {setting['threshold'] for setting in body['safetySettings']} == {3} and len(body['safetySettings']) == 4
    config = body['generationConfig']
    schema = config.pop('responseSchema')
    assert config == {'temperature': 0.0, 'topP': 0.9, 'maxOutputTokens': 64, 'stopSequences': ['甲', '乙'], 'responseMimeType': 'application/json'}, config
    part = schema['properties']['parts']['items']
    assert schema['properties']['score']['description'] == '分數; at least 1; at most 5'
    assert part['properties']['kind']['enum'] == ['山', '湖'] and part['properties']['height']['nullable'] and part['required'] == ['kind']

@pytest.mark.parametrize('schema', [
    {'type': 'object'}, {'anyOf': [{'type': 'string'}, {'type': 'integer'}]}, {'type': 'integer', 'enum': [1, 2]}, {'$ref': '#/$defs/Gone'},
    {'type': 'object', 'properties': {'a': {'type': 'object', 'additionalProperties': {'type': 'string'}}}}, {'type': 'array', 'prefixItems': []}, {}], ids=str)
def test_schemas_that_gemini_cannot_be_held_to_are_refused(schema):
    with pytest.raises(UserError, match='Gemini cannot be held to'): gemini_schema(schema)

def test_sessions_with_gemini_share_nothing():
    one, two = Fake(), Fake()
    async def main(first, second):
        async with CALLS['gemini'](first) as call, CALLS['gemini'](second) as other:
            await asyncio.gather(*(ask(Request(turns(str(n)))) for n in range(20) for ask in (call, other)), return_exceptions=True)
    with serve_rest(one) as first, serve_rest(two) as second: asyncio.run(main(gemini_settings(first), gemini_settings(second, key='')))
    assert len(one.calls) == 20 and set(one.keys) == {KEY} and not two.calls and set(two.keys) == {None}

@pytest.mark.parametrize('start', [serve_rest, serve_grpc], ids=['rest', 'grpc'])
def test_gemini_cancelled_in_the_moment_of_its_reply_stays_cancelled(start):
    "In Python 3.11 `asyncio.wait_for` gave the reply instead, and the worker went on."
    fake = Fake()
    async def main(settings):
        async with CALLS['gemini'](settings) as call:
            task = asyncio.ensure_future(call(Request(turns('玉山'))))
            while not fake.calls: await asyncio.sleep(0)
            time.sleep(1) # The reply comes in while nobody looks
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
    with start(fake) as url: asyncio.run(main(gemini_settings(url)))

def test_a_hanging_call_keeps_no_interrupted_program_alive():
    code = '''import asyncio, time
from kyara.gemini import Threads
async def main():
    threads = Threads(4, time.sleep)
    try: await asyncio.wait_for(threads(3600), 0.2)
    except asyncio.TimeoutError: threads.close()
asyncio.run(main())'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=PATIENCE)

def test_threads_are_as_many_as_needed_and_pass_errors_on():
    together = threading.Barrier(3)
    def work(number):
        if number < 3: together.wait(PATIENCE)
        return 1 / number
    async def main():
        threads = Threads(3, work)
        try: return await asyncio.gather(*map(threads, (1, 2, 0, 4)), return_exceptions=True), threads.started
        finally: threads.close()
    (one, half, error, quarter), started = asyncio.run(main())
    assert (one, half, quarter, started) == (1, 0.5, 0.25, 3) and isinstance(error, ZeroDivisionError)

# Gemini in batches

@pytest.fixture
def batch(tmp_path):
    "A batch service, settings for it, and a ledger."
    pytest.importorskip('google.genai')
    fake = Fake()
    with serve_rest(fake) as url:
        settings = ModelSettings('patient', 'gemini-batch', 'gemini-3-flash', url, 'GEMINI_TEST_KEY', timeout=PATIENCE, price_input=1, price_output=10)
        yield fake, settings, tmp_path/'ledger.sqlite'

def questions(*texts, **more): return [Request(turns(text), **more) for text in texts]

def test_a_batch_answers_and_names_what_it_cannot(batch, capsys):
    fake, settings, ledger = batch
    asked = ['玉山', '[[bad]]', '[[length]]', '[[blocked]]', '[[empty]]', '[[rerouted]]', '[[thought]]']
    replies = ask(questions(*asked, seed=3, safety='most'), settings, ledger=ledger)
    assert [reply.finish_reason for reply in replies] == ['stop', 'error', 'length', 'safety', 'empty', 'rerouted', 'stop']
    assert replies[1].error == 'batch error 3: no such thing' and replies[6].text == ECHO + '[[thought]]'
    assert replies[6].usage == {'input_tokens': 11, 'output_tokens': 45} and replies[0].cost == pytest.approx((2 + 50) / 1e6)
    config = fake.jobs[0]['items'][0]['request']
    assert config['generationConfig']['seed'] == 3 and config['safetySettings'][0]['threshold'] == 'BLOCK_LOW_AND_ABOVE'
    again = ask(questions(*asked, seed=3, safety='most'), settings, ledger=ledger)
    assert [len(job['items']) for job in fake.jobs] == [7, 1] and again[0].cached # only the one that failed
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')
    told = capsys.readouterr().err
    assert 'patient: job of 7 sent' in told and 'jobs 1 succeeded' in told and KEY not in told

PROGRAM = '''import sys
from kyara.core import ModelSettings
from kyara.llm import Request, ask
settings = ModelSettings('patient', 'gemini-batch', 'gemini-3-flash', sys.argv[1], 'GEMINI_TEST_KEY', timeout=300)
ask([Request([{'role': 'user', 'content': str(number)}]) for number in range(30)], settings, ledger=sys.argv[2])'''

def kill_when(fake, settings, ledger, ready):
    "Start a program that asks 30 questions, and kill it when `ready()`."
    program = subprocess.Popen([sys.executable, '-c', PROGRAM, settings.base_url, str(ledger)], stderr=subprocess.PIPE)
    limit = time.time() + PATIENCE
    while not ready() and program.poll() is None and time.time() < limit: time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    _, told = program.communicate(timeout=PATIENCE)
    assert program.returncode == -signal.SIGKILL, told.decode()

thirty = [Request([{'role': 'user', 'content': str(number)}]) for number in range(30)]

@pytest.mark.parametrize('moment', ['sent', 'sending'])
def test_kill_9_pays_no_batch_twice(batch, moment, monkeypatch):
    "Between submission and collection, and before the service has answered the submission."
    fake, settings, ledger = batch
    fake.work = 10 ** 9
    monkeypatch.setattr(gemini, 'SETTLE', PATIENCE) # The job shows up before, however slow the machine
    if moment == 'sending':
        fake.lag, taken, submit = 2.0, threading.Event(), fake.submit
        def slow_submit(*job):
            reply = submit(*job)
            taken.set()
            time.sleep(1)
            return reply
        fake.submit = slow_submit
        ready = taken.is_set
    else: ready = lambda: fake.jobs and fake.jobs[0]['looks'] > 0
    kill_when(fake, settings, ledger, ready)
    fake.work = 0
    replies = ask(thirty, settings, ledger=ledger)
    assert [reply.text for reply in replies] == [ECHO + str(number) for number in range(30)]
    assert len(fake.jobs) == 1
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')

def test_a_job_that_never_reached_the_service_is_sent_after_a_while(batch, monkeypatch):
    fake, settings, ledger = batch
    monkeypatch.setattr(gemini, 'SETTLE', 1.0)
    from kyara.llm import call_key
    with Ledger(ledger) as opened: opened.open_job('kyara-lost', 'gemini-batch', 'gemini-3-flash', [call_key(request, settings) for request in thirty])
    replies = ask(thirty, settings, ledger=ledger)
    assert all(reply.ok for reply in replies) and len(fake.jobs) == 1
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')

def test_a_submission_whose_answer_is_lost_is_found_not_repeated(batch):
    fake, settings, ledger = batch
    fake.faults = [error(429, 'RESOURCE_EXHAUSTED', 'quota', {'@type': 'type.googleapis.com/google.rpc.RetryInfo', 'retryDelay': '0.1s'}), 'lost']
    assert all(reply.ok for reply in ask(thirty, settings, ledger=ledger)) and len(fake.jobs) == 1

def test_a_submission_that_the_service_does_not_understand_fails_by_name(batch):
    fake, settings, ledger = batch
    fake.faults = [error(400, 'INVALID_ARGUMENT', 'bad schema')]
    replies = ask(thirty, settings, ledger=ledger)
    assert {reply.error.partition(' {')[0] for reply in replies} == {"http 400: 400 INVALID_ARGUMENT."} or 'bad schema' in replies[0].error
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')

@pytest.mark.parametrize('state', ['FAILED', 'EXPIRED', 'CANCELLED'])
def test_a_job_that_ends_badly_is_named_and_can_be_asked_again(batch, state):
    fake, settings, ledger = batch
    fake.ending = f'BATCH_STATE_{state}'
    assert {reply.error for reply in ask(thirty, settings, ledger=ledger)} == {f'the batch job {state.lower()} without a reply'}
    fake.ending = 'BATCH_STATE_SUCCEEDED'
    assert all(reply.ok for reply in ask(thirty, settings, ledger=ledger)) and len(fake.jobs) == 2

def test_replies_that_only_others_want_stay_to_be_collected(batch):
    fake, settings, ledger = batch
    fake.work = 10 ** 9
    kill_when(fake, settings, ledger, lambda: fake.jobs and fake.jobs[0]['looks'] > 0)
    fake.work = 0
    assert all(reply.ok for reply in ask(thirty[:3], settings, ledger=ledger))
    with Ledger(ledger) as opened: assert len(opened.jobs('gemini-batch', 'gemini-3-flash')) == 1
    assert all(reply.ok for reply in ask(thirty, settings, ledger=ledger)) and len(fake.jobs) == 1
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')

def test_a_budget_bounds_the_first_job_by_the_most_it_can_cost(batch):
    "A reply of at most 100 tokens costs at most 0.001 here, and 50 millionths in truth."
    fake, settings, ledger = batch
    replies = ask([Request([{'role': 'user', 'content': f'{number:02d}'}], max_tokens=100) for number in range(40)], settings, ledger=ledger, max_cost=0.0021)
    assert [len(job['items']) for job in fake.jobs] == [2, 38] and all(reply.ok for reply in replies)
    replies = ask([Request([{'role': 'user', 'content': f'{number:02d}!'}], max_tokens=100) for number in range(40)], settings, ledger=ledger, max_cost=0.0011)
    assert sum(reply.cost for reply in replies) <= 0.0011 and {reply.error for reply in replies} == {None, 'max_cost'}

def test_batch_wrong_key_and_missing_package(batch, monkeypatch):
    import google
    fake, settings, ledger = batch
    wrong = ModelSettings('patient', 'gemini-batch', 'gemini-3-flash', settings.base_url, 'WRONG_TEST_KEY', timeout=PATIENCE)
    with pytest.raises(Refused, match='WRONG_TEST_KEY'): ask(thirty, wrong, ledger=ledger)
    with Ledger(ledger) as opened: assert not opened.jobs('gemini-batch', 'gemini-3-flash')
    monkeypatch.delattr(google, 'genai', raising=False)
    monkeypatch.setitem(sys.modules, 'google.genai', None)
    with pytest.raises(UserError, match=r'^model patient needs google-genai: pip install "kyara\[genai\]"$'): ask(thirty, settings, ledger=ledger)

# In this process

@pytest.mark.parametrize('provider', list(BATCHES))
def test_no_request_needs_no_model(provider):
    BATCHES[provider]({}, ModelSettings('nothing', provider, 'does-not-exist'), None)

TAUGHT = {'用臺灣用語回答。': '玉山高三千九百五十二公尺。', '只說英文。': 'Yushan is high.'}

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A two-layer Gemma-2 that has learnt what to say to one question under two system prompts."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from kyara.sft import make_student
    folder = make_student([*TAUGHT, *TAUGHT.values(), '玉山有多高？'] * 5, tmp_path_factory.mktemp('models')/'tiny', vocab_size=300, hidden_size=32,
                          intermediate_size=64, num_hidden_layers=2, max_position_embeddings=256)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for system, answer in TAUGHT.items():
        asked = [{'role': 'system', 'content': system}, {'role': 'user', 'content': '玉山有多高？'}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*asked, {'role': 'assistant', 'content': answer}], tokenize=False)
        ids, skip = tokenizer(whole, add_special_tokens=False)['input_ids'], len(tokenizer(prompt, add_special_tokens=False)['input_ids'])
        rows.append((torch.tensor([ids]), torch.tensor([[-100] * skip + ids[skip:]])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(60):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.do_sample = True # else the server takes the likeliest token whatever the temperature
    model.save_pretrained(folder)
    return folder

def asked(system='用臺灣用語回答。', **sampling): return Request([{'role': 'system', 'content': system}, {'role': 'user', 'content': '玉山有多高？'}], **{'max_tokens': 40, **sampling})

def test_a_local_model_does_what_it_is_asked(tiny, tmp_path):
    settings = ModelSettings('tiny', 'local', str(tiny), concurrency=4)
    requests = [asked(), asked('只說英文。'), asked(max_tokens=4), asked(stop=('九百',)), asked(temperature=6.0, seed=1), asked(temperature=6.0, seed=2),
                Request([{'role': 'user', 'content': ''.join(map(chr, range(0x4e00, 0x4e80)))}])]
    replies = ask(requests, settings, ledger=tmp_path/'a.sqlite')
    assert [reply.text for reply in replies[:4]] == [*TAUGHT.values(), replies[2].text, '玉山高三千'] and replies[2].finish_reason == 'length'
    assert replies[4].text != replies[5].text and replies[6].error.startswith('prompt too long'), replies
    alone = ask(requests[4:5], settings, ledger=tmp_path/'b.sqlite')[0]
    assert alone.text == replies[4].text, 'a reply depends on its neighbours'
    load_local.cache_clear()

def test_a_local_budget_ends_with_a_name(tiny, tmp_path):
    settings = ModelSettings('tiny', 'local', str(tiny), concurrency=4)
    replies = ask([asked(sample=number) for number in range(20)], settings, ledger=tmp_path/'a.sqlite', max_tokens=300)
    used = sum(sum(reply.usage.values()) for reply in replies if reply.ok)
    assert 0 < used <= 300 and {reply.error for reply in replies} == {None, 'max_tokens'}
    load_local.cache_clear()

@pytest.fixture(scope='module')
def tiny_server(tiny):
    "`transformers serve` on loopback, a process of its own."
    pytest.importorskip('fastapi')
    pytest.importorskip('uvicorn')
    log, limit, ports = tiny.with_name('server.log'), time.time() + 2 * PATIENCE, 3
    with open(log, 'w') as told:
        server, url = start_serving(tiny, told)
        try:
            while not healthy(url):
                if time.time() > limit or not ports: pytest.fail(log.read_text()[-2000:])
                if server.poll() is not None: ports, (server, url) = ports - 1, start_serving(tiny, told) # Somebody else has taken the port
                time.sleep(0.2)
            yield ModelSettings('served', 'openai', str(tiny), f'{url}/v1', timeout=PATIENCE, concurrency=1), server
        finally:
            server.kill()
            server.wait()

def start_serving(model, log):
    "Start a server on a port that is free now; give its process and address."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-c', 'from transformers.cli.transformers import main; main()', 'serve', str(model), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'HF_HUB_OFFLINE': '1'}), f'http://127.0.0.1:{port}'

def healthy(url):
    try: urllib.request.urlopen(f'{url}/health', timeout=10).close()
    except OSError: return False
    return True

def test_transformers_serve_answers_and_the_second_run_asks_nothing(tiny_server, tmp_path):
    settings, server = tiny_server
    requests = [asked(), asked('只說英文。'), asked(max_tokens=4), asked(stop=('九百',)), asked(temperature=6.0, seed=1), asked(temperature=6.0, seed=2), asked(temperature=6.0, top_p=0.01, seed=3)]
    replies = ask(requests, settings, ledger=tmp_path/'a.sqlite')
    assert all(reply.finish_reason != 'error' for reply in replies), replies
    assert [reply.text for reply in replies[:4]] == [*TAUGHT.values(), replies[2].text, '玉山高三千'], replies
    assert replies[2].finish_reason == 'length' and replies[2].usage['output_tokens'] == 4
    assert replies[0].finish_reason == 'stop' and replies[0].model_version == settings.model # neither cut nor rerouted
    assert replies[4].text != replies[5].text and replies[6].text == TAUGHT['用臺灣用語回答。'] # seeds tell; top_p leaves the likeliest
    fresh = ask(requests[4:5], settings, ledger=tmp_path/'b.sqlite')[0]
    assert not fresh.cached and fresh.text == replies[4].text # the same seed, the same reply
    server.kill()
    server.wait()
    again = ask(requests, settings, ledger=tmp_path/'a.sqlite')
    assert [reply.text for reply in again] == [reply.text for reply in replies] and all(reply.cached for reply in again)

# What cannot be asked

@pytest.mark.parametrize('provider, more', [
    ('openai', {'safety': 'none'}), ('gemini', {'schema': {}}), ('gemini', {'safety': 'lots'}), ('gemini', {'stop': tuple('甲乙丙丁戊己')}),
    ('gemini-batch', {'safety': 'lots'}), ('gemini', {'messages': [{'role': 'system', 'content': 'x'}]}), ('gemini', {'messages': [*turns('x'), *turns('y')]}),
    ('gemini', {'messages': [{'role': 'tool', 'content': 'x'}]}), ('local', {'schema': {'type': 'object'}}), ('local', {'safety': 'few'}),
    ('offline', {'schema': {'type': 'object'}}), ('offline', {'safety': 'few'})], ids=str)
def test_what_a_provider_cannot_do_is_refused_before_anything_is_paid(provider, more, tmp_path):
    settings, request = ModelSettings('any', provider, 'careful'), Request(**{'messages': turns('x'), **more})
    with pytest.raises(UserError): check_request(request, settings)
    with pytest.raises(UserError): ask([Request(turns('x')), request], settings, ledger=tmp_path/'ledger.sqlite')

@pytest.mark.parametrize('provider', [*CALLS, *BATCHES])
def test_ordinary_requests_pass(provider):
    check_request(Request(turns('玉山有多高？'), 0.7, 0.9, stop=('\n',), seed=1), ModelSettings('any', provider, 'any'))

# settings.ini

def test_every_model_of_the_settings_is_valid_and_priced(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    names = [section.removeprefix('model.') for section in read_settings().sections() if section.startswith('model.')]
    for name in names:
        settings = model_settings(name)
        assert settings.provider in CALLS | BATCHES and settings.weight >= 0, name
        if settings.provider not in ('local', 'offline') and settings.api_key_env: assert settings.price_output > 0, name
        assert (settings.api_key_env == '') == (settings.provider in ('local', 'offline') or 'localhost' in settings.base_url or '127.0.0.1' in settings.base_url), name

def test_the_weights_of_the_pool_are_its_shares(monkeypatch):
    from kyara.preference import draw_models
    monkeypatch.chdir(Path(__file__).parent.parent)
    nine = ['gpt-4o', 'gpt-4', 'gpt-3.5', 'claude-3.5-sonnet', 'yi-large', 'mixtral-8x22b', 'gemini-1.5-flash', 'qwen2-72b', 'deepseek-v2']
    weights = {name: model_settings(name).weight for name in nine}
    firsts = [draw_models(nine, 4, str(number))[0] for number in range(150)]
    strong = [name for name in nine if weights[name] == 2]
    assert len(strong) == 3 and abs(sum(name in strong for name in firsts) / 150 - 6 / sum(weights.values())) < 0.17 # four deviations
