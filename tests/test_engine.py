"""What the engine survives: each test asks a real server in another process, mostly by `kyara ask`."""
import itertools
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loopback import ECHO, GARBAGE, serve
from pydantic import BaseModel

from kyara.core import ModelSettings
from kyara.ledger import Ledger
from kyara.llm import Client

KYARA = str(Path(sys.executable).with_name('kyara'))
KEY = 'sk-planted-7d1f0c55aa09' # Found by no reader of anything we write


class Desk:
    "A folder with settings for one server, and the command at work in it."
    def __init__(self, folder, url, **settings):
        self.folder, self.ledger, self.out = folder, folder / 'calls.sqlite', folder / 'out.jsonl'
        self.settings = {'provider': 'openai', 'model': 'loopback', 'base_url': url, 'concurrency': 16, **settings}
        lines = ['[model.loopback]', *(f'{key} = {value}' for key, value in self.settings.items())]
        (folder / 'settings.ini').write_text('\n'.join(lines) + '\n')

    def write(self, texts, name='in.jsonl', **fields):
        "Write a file of prompts."
        rows = [{'id': f'p{number}', 'messages': [{'role': 'user', 'content': text}], **fields} for number, text in enumerate(texts)]
        (self.folder / name).write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')

    def start(self, *words, out='out.jsonl', before=(), prompts='in.jsonl', **more):
        "Start `kyara ask`."
        environment = {**os.environ, 'KYARA_SETTINGS': str(self.folder / 'settings.ini'), 'PLANTED_KEY': KEY, **more.pop('env', {})}
        command = [*before, KYARA, 'ask', '--model', 'loopback', '--in', prompts, '--out', out, '--ledger', self.ledger, *words]
        return subprocess.Popen([str(word) for word in command], cwd=self.folder, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)

    def ask(self, *words, **more):
        "Run `kyara ask` to its end."
        return finish(self.start(*words, **more))

    def replies(self, out='out.jsonl'):
        return [json.loads(line) for line in (self.folder / out).read_text(encoding='utf-8').split('\n') if line]

    def whole(self):
        "Tell whether the ledger is whole, as the command sees it."
        return subprocess.run([KYARA, 'ledger', 'verify', self.ledger], capture_output=True).returncode == 0

    def client(self, **options):
        settings = ModelSettings('loopback', **{'timeout': 60.0, **self.settings})
        return Client(settings, options.pop('ledger', self.ledger), **options)


def finish(process, seconds=300):
    "Wait for a process; one that hangs is a failure."
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f'still at work after {seconds} s: {out[-500:]} {err[-500:]}')
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def questions(count): return [f'第{number:04d}題：臺灣第{number + 1:04d}高的山是哪一座？' for number in range(count)]


def answered(desk, texts, out='out.jsonl'):
    "Tell whether every prompt got its own answer, in order."
    replies = desk.replies(out)
    assert [reply['id'] for reply in replies] == [f'p{number}' for number in range(len(texts))]
    wrong = [reply for reply, text in zip(replies, texts) if reply['error'] or reply['reply'] != ECHO + text]
    assert not wrong, (len(wrong), wrong[:2])
    return True


def one_line(done, code, *words):
    "Check that a command ended with one line that says what is wrong."
    assert done.returncode == code, (done.returncode, done.stderr[-1500:])
    lines = done.stderr.strip().splitlines()
    assert lines and lines[-1].startswith('kyara: ') and 'Traceback' not in done.stderr, done.stderr[-1500:]
    for word in words: assert word in lines[-1], lines[-1]
    assert KEY not in done.stdout + done.stderr
    return lines


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def paid_again(stats): return sum(count - 1 for count in stats.whole.values())

# Faults of the service


def test_fault_mix(tmp_path):
    texts = questions(2000)
    with serve(busy=0.05, broken=0.05, dropped=0.02, malformed=0.01, hung=0.01, seed=1) as server:
        desk = Desk(tmp_path, server.url, concurrency=128, timeout=5)
        desk.write(texts)
        done = desk.ask()
        stats = server.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert set(stats.whole.values()) == {1} and len(stats.whole) == 2000, paid_again(stats)
    faults = {name: stats.fates.get(name, 0) for name in ('busy', 'broken', 'dropped', 'malformed', 'hung')}
    assert min(faults.values()) > 10 and stats.requests == 2000 + sum(faults.values()), (faults, stats.requests)
    assert stats.early == 0


@pytest.mark.parametrize('seconds', [0.3, 0], ids=['retry_after', 'no_header'])
def test_too_many_under_way(tmp_path, seconds):
    "The crowd finds the size that the server bears, and stays about there."
    texts = questions(500)
    with serve(allow=8, latency=0.04, retry_after=seconds) as server:
        desk = Desk(tmp_path, server.url, concurrency=64)
        desk.write(texts)
        done = desk.ask()
        stats = server.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    second = sum(whole > 250 for whole in stats.busy_at)
    assert second <= 50, (len(stats.busy_at), second)
    assert paid_again(stats) == 0 and stats.early == 0, stats.early


def test_retry_after_is_obeyed(tmp_path):
    texts = questions(60)
    with serve(busy=0.2, retry_after=0.7, seed=3) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        stats = server.stats()
    assert stats.fates['busy'] > 5 and stats.early == 0, (stats.fates, stats.early)


def test_busy_for_ever(tmp_path):
    "A service that turns everybody away is no better than a dead one."
    with serve(busy=1.0, retry_after=0.1) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(questions(500))
        one_line(desk.ask('--patience', 2), 2, '429')
        assert server.stats().requests <= 200


@pytest.mark.parametrize('share', [0.05, 1.0], ids=['some', 'all'])
def test_retry_after_of_an_hour(tmp_path, share):
    "Nobody waits in silence for longer than patience lasts; what could be answered is."
    texts = questions(100)
    with serve(busy=share, retry_after=3600, seed=1) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        done = desk.ask('--patience', 2)
        stats = server.stats()
        assert done.returncode in (2, 3) and stats.early == 0, done.stderr
        said = done.stderr + (desk.out.read_text() if desk.out.exists() else '')
        assert '429' in said and '3600' in said and 'Traceback' not in said, said[-1000:]
        if share < 1: assert done.returncode == 3 and sum(not reply['error'] for reply in desk.replies()) == len(stats.whole) > 80


@pytest.mark.parametrize('how, seconds', [('reset', 2.2), ('503', 2.2), ('refuse', 0.7), ('hang', 0.7)])
def test_dead_for_a_while(tmp_path, how, seconds):
    "The engine pauses, says so, spends few calls on the dead service, and goes on."
    texts = questions(400)
    with serve(latency=0.05, dead_from=0.4, dead_for=seconds, dead_how=how) as server:
        desk = Desk(tmp_path, server.url, timeout=2)
        desk.write(texts)
        done = desk.ask()
        stats = server.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert stats.fates.get('dead', 0) <= 5 * 16, stats.fates
    assert 'pausing' in done.stderr and server.url in done.stderr, done.stderr[-1000:]
    assert paid_again(stats) == 0


def test_dead_for_good(tmp_path):
    "Patience ends; what was paid is kept, and the rest is asked when the service is back."
    texts = questions(300)
    with serve(latency=0.05, dead_from=0.4, dead_for=600, dead_how='503') as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        lines = one_line(desk.ask('--patience', 2), 2, server.url, 'does not answer', 'kept')
        assert len(lines) < 10, lines
        first = server.stats()
        server.reset()
        server.reset(latency=0.02)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().requests == 300 - len(first.whole) and 16 < len(first.whole) < 300, len(first.whole)


def test_nobody_there(tmp_path):
    with socket.socket() as place:
        place.bind(('127.0.0.1', 0))
        desk = Desk(tmp_path, f'http://127.0.0.1:{place.getsockname()[1]}/v1')
        desk.write(questions(40))
        one_line(desk.ask('--patience', 2), 2, 'does not answer', 'unreachable')


def test_no_such_host(tmp_path):
    desk = Desk(tmp_path, 'http://kyara.invalid:9/v1')
    desk.write(questions(3))
    one_line(desk.ask('--patience', 1), 2, 'kyara.invalid')


def test_wrong_key_stops_at_once(tmp_path):
    with serve(key='another', echo_key=True, latency=0.05) as server:
        desk = Desk(tmp_path, server.url, api_key_env='PLANTED_KEY')
        desk.write(questions(500))
        assert len(one_line(desk.ask(), 2, 'PLANTED_KEY', '401')) == 1
        assert server.stats().requests <= 16


def test_unknown_model_stops_at_once(tmp_path):
    with serve(model='loopback-2', latency=0.05) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(questions(500))
        assert len(one_line(desk.ask(), 2, "'loopback'", '404')) == 1
        assert server.stats().requests <= 16


def test_few_open_files(tmp_path):
    "More calls at once than the system gives files: all are answered, or a line says why not."
    texts = questions(300)
    with serve(latency=0.1) as server:
        desk = Desk(tmp_path, server.url, concurrency=200)
        desk.write(texts)
        done = desk.ask(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)))
    if done.returncode: one_line(done, 2, 'open files')
    else: assert answered(desk, texts)


def test_odd_texts(tmp_path):
    texts = ['', '\x00', 'a\ud800b', '山' * 300_000, '"\\\n\r\u2028']
    rows = [{'id': f'p{number}', 'messages': [{'role': 'user', 'content': text}]} for number, text in enumerate(texts)]
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    texts[2] = 'a?b' # No file and no database takes a lone surrogate
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        for _ in range(2): assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().requests == 5


def test_one_bad_prompt_harms_no_other(tmp_path):
    "A prompt that is refused is asked once; one that is never answered a few times; a rerun asks only these."
    texts = questions(100)
    texts[10], texts[60] = '[[bad]] 這一題不行', '[[slow]] 這一題沒有回音'
    with serve() as server:
        desk = Desk(tmp_path, server.url, timeout=1)
        desk.write(texts)
        done = desk.ask()
        replies, stats = desk.replies(), server.stats()
        assert done.returncode == 3 and '98 answered, 2 failed' in done.stdout, done.stdout + done.stderr
        assert {number: reply['error'] for number, reply in enumerate(replies) if reply['error']}.keys() == {10, 60}
        assert '400' in replies[10]['error'] and 'seconds' in replies[60]['error'] and not replies[60]['reply'], replies[60]
        assert stats.calls[texts[10]] == 1 and 1 < stats.calls[texts[60]] <= 8
        server.reset(healthy=True)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().calls.keys() == {texts[10], texts[60]}


@pytest.mark.parametrize('limit', ['requests_per_minute', 'tokens_per_minute'])
def test_pace(tmp_path, limit):
    "Twenty calls a second, by requests and by tokens."
    texts = questions(30)
    tokens = len(texts[0]) * 2 + len(ECHO)
    with serve() as server:
        desk = Desk(tmp_path, server.url, **{limit: 1200 * (1 if limit == 'requests_per_minute' else tokens)})
        desk.write(texts, max_tokens=4 * (tokens - len(texts[0]))) # So the guess before the first reply is right
        assert desk.ask().returncode == 0
        stats = server.stats()
    assert stats.last - stats.first > 0.8 * 29 / 20, stats.last - stats.first


def test_connections_that_a_server_closes_are_paid_once(tmp_path):
    "A call every 20 ms, on connections that the server closes after 20 ms: some are lost on the way, none is paid twice."
    texts = questions(100)
    with serve(idle=0.02) as server:
        desk = Desk(tmp_path, server.url, requests_per_minute=3000, concurrency=4)
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().calls == dict.fromkeys(texts, 1)


# Several servers behind one name


def test_servers_share_calls_by_load(tmp_path):
    "Each has about as many under way, so the one that takes fifty times as long answers far less."
    texts = questions(600)
    with serve(latency=0.02) as fast, serve(latency=1.0) as slow:
        desk = Desk(tmp_path, f'{fast.url} {slow.url}', concurrency=32)
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        stats = fast.stats(), slow.stats()
        assert sum(one.requests for one in stats) == 600 and stats[0].requests > 2 * stats[1].requests, [one.requests for one in stats]
        assert stats[1].requests >= 8 and max(one.most_under_way for one in stats) <= 32
        desk = Desk(tmp_path, fast.url) # The address is no part of a call's key
        assert desk.ask().returncode == 0 and sum(one.stats().requests for one in (fast, slow)) == 600


def test_one_of_three_servers_is_killed(tmp_path):
    "The other two take over; twice is paid at most what was under way on the dead one."
    texts = questions(1200)
    with serve(latency=0.15) as one, serve(latency=0.15) as two, serve(latency=0.15) as three:
        desk = Desk(tmp_path, f'{one.url} {two.url} {three.url}', concurrency=48)
        desk.write(texts)
        process = desk.start()
        wait_until(lambda: len(two.stats().whole) >= 60)
        two.process.kill()
        before = [len(server.stats().whole) for server in (one, three)]
        done = finish(process)
        stats = one.stats(), three.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert all(set(one.whole.values()) == {1} for one in stats) and not stats[0].whole.keys() & stats[1].whole.keys()
    assert 1200 - sum(len(one.whole) for one in stats) >= 60 - 48 and max(before) < 1140, before
    assert f'{two.url} does not answer' in done.stderr and 'pausing' not in done.stderr, done.stderr


@pytest.mark.parametrize('how', ['refuse', 'hang'])
def test_one_of_two_servers_is_away_for_a_while(tmp_path, how):
    "It costs few calls, nothing pauses, and when it is back it gets its share again."
    texts = questions(1200)
    with serve(latency=0.05) as steady, serve(latency=0.05, dead_from=0.4, dead_for=1.0, dead_how=how) as shaky:
        desk = Desk(tmp_path, f'{shaky.url} {steady.url}', concurrency=16, timeout=2)
        desk.write(texts)
        done = desk.ask()
        stats = shaky.stats(), steady.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert 'pausing' not in done.stderr and stats[0].fates.get('dead', 0) <= 16 + 8, (stats[0].fates, done.stderr)
    assert paid_again(stats[0]) + paid_again(stats[1]) == 0 and stats[0].last > stats[0].first + 1.4


def test_one_of_two_servers_has_another_model(tmp_path):
    "That is no fault to work around: the run stops and names the server."
    with serve(latency=0.05) as right, serve(latency=0.05, model='another') as wrong:
        desk = Desk(tmp_path, f'{right.url} {wrong.url}')
        desk.write(questions(200))
        assert len(one_line(desk.ask(), 2, wrong.url, '404')) == 1
        assert wrong.stats().requests <= 16


def test_all_servers_are_gone(tmp_path):
    with socket.socket() as one, socket.socket() as two:
        for place in (one, two): place.bind(('127.0.0.1', 0))
        urls = [f'http://127.0.0.1:{place.getsockname()[1]}/v1' for place in (one, two)]
        desk = Desk(tmp_path, ' '.join(urls))
        desk.write(questions(40))
        one_line(desk.ask('--patience', 2), 2, 'does not answer', 'unreachable', *urls)


def test_a_busy_server_gives_its_calls_to_another(tmp_path):
    "And is left alone for as long as it has asked."
    texts = questions(400)
    with serve(latency=0.05, allow=4, retry_after=0.4) as small, serve(latency=0.05) as large:
        desk = Desk(tmp_path, f'{small.url} {large.url}', concurrency=32)
        desk.write(texts)
        done = desk.ask()
        stats = small.stats(), large.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert stats[0].early == 0 and stats[0].fates['busy'] > 0 and len(stats[0].whole) > 0, stats[0].fates
    assert stats[1].most_under_way > 16 and stats[0].requests + stats[1].requests == 400 + stats[0].fates['busy']


def test_faults_of_several_servers(tmp_path):
    texts = questions(1000)
    faults = dict(busy=0.05, broken=0.05, dropped=0.02, malformed=0.01, hung=0.01)
    with serve(**faults, seed=1) as one, serve(**faults, seed=2) as two:
        desk = Desk(tmp_path, f'{one.url} {two.url}', concurrency=64, timeout=5)
        desk.write(texts)
        done = desk.ask()
        stats = one.stats(), two.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr[-1000:]
    assert sum((list(one.whole.values()) for one in stats), []) == [1] * 1000 and 'pausing' not in done.stderr
    assert min(len(one.whole) for one in stats) > 200, [len(one.whole) for one in stats]


# Outcomes that are no answers


def test_outcomes_have_names(tmp_path):
    texts = ['好', '[[length]] 很長的一題', '[[filter]] 不安全的一題', '[[empty]] 空的一題', '[[rerouted]] 換了模型的一題']
    names = ['stop', 'length', 'safety', 'empty', 'rerouted']
    accept = lambda *outcomes: [word for outcome in outcomes for word in ('--accept', outcome)]
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        assert desk.ask().returncode == 3
        replies = desk.replies()
        assert [reply['finish_reason'] for reply in replies] == names
        assert [reply['error'] for reply in replies] == [None, *names[1:]]
        assert replies[4]['model_version'] == 'another-model'
        assert desk.ask(*accept('length', 'rerouted')).returncode == 3
        assert [reply['error'] for reply in desk.replies()] == [None, None, 'safety', 'empty', None]
        assert desk.ask(*accept('length', 'rerouted', 'safety', 'empty')).returncode == 0
        got = desk.client().ask(texts)
        assert [reply.ok for reply in got] == [True, False, False, False, False] and all(reply.cached for reply in got)
        assert server.stats().requests == 5


def test_another_model_answers_everything(tmp_path):
    with serve(answer_model='cheaper') as server:
        desk = Desk(tmp_path, server.url)
        desk.write(questions(20))
        assert desk.ask().returncode == 3
        assert {(reply['error'], reply['model_version']) for reply in desk.replies()} == {('rerouted', 'cheaper')}
    with serve(answer_model='loopback-2026-05-01') as server:
        desk = Desk(tmp_path, server.url)
        desk.ledger = tmp_path / 'other.sqlite'
        assert desk.ask().returncode == 0

# Replies that have to fit a schema


class Answer(BaseModel):
    "What the server writes for prompts marked [[json]]."
    answer: str


def half_garbage(count=500): return [text + (' [[garbage]]' if number % 5 == 0 else ' [[json]]') for number, text in enumerate(questions(count))]


def test_garbage_for_a_schema(tmp_path):
    texts = half_garbage()
    with serve() as server:
        desk = Desk(tmp_path, server.url, concurrency=64)
        parsed = desk.client().ask_json(texts, Answer)
        stats = server.stats()
        good = [one.value is not None and one.value.answer == ECHO + text for one, text in zip(parsed, texts)]
        assert good == [number % 5 != 0 for number in range(500)]
        assert all(one.problem == 'unparsable' and GARBAGE in one.reply.text for one in parsed[::5])
        assert {stats.calls[text] for text in texts[::5]} == {2} and {stats.calls[text] for text in texts[1::5]} == {1}
        with Ledger(desk.ledger) as ledger: raw = [json.loads(entry.raw) for entry in ledger.entries()]
        assert sum(GARBAGE in one['choices'][0]['message']['content'] for one in raw) == 200


def test_garbage_is_asked_anew_on_a_healthy_server(tmp_path):
    texts = half_garbage(100)
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.client().ask_json(texts, Answer, json_mode=True, heal=True)
        server.reset(healthy=True)
        parsed = desk.client().ask_json(texts, Answer, json_mode=True, heal=True)
        stats = server.stats()
        assert [one.value.answer for one in parsed] == [ECHO + text for text in texts]
        assert stats.calls == dict.fromkeys(texts[::5], 1)


def test_garbage_once_is_mended(tmp_path):
    texts = [text + ' [[json]] [[garbage once]]' for text in questions(40)]
    with serve() as server:
        parsed = Desk(tmp_path, server.url).client().ask_json(texts, Answer)
        assert [one.value.answer for one in parsed] == [ECHO + text for text in texts]
        assert set(server.stats().calls.values()) == {2}


def test_schema_by_command(tmp_path):
    texts = half_garbage()
    with serve() as server:
        desk = Desk(tmp_path, server.url, concurrency=64)
        desk.write(texts)
        (tmp_path / 'schema.json').write_text(json.dumps(Answer.model_json_schema()))
        done = desk.ask('--schema', 'schema.json')
        assert done.returncode == 3, done.stderr
        replies, stats = desk.replies(), server.stats()
        assert '400 answered, 100 failed' in done.stdout, done.stdout + done.stderr
        assert all(bool(reply['error']) == (number % 5 == 0) for number, reply in enumerate(replies))
        assert all(GARBAGE in json.dumps(reply, ensure_ascii=False) for reply in replies[::5]), replies[0]
        assert all(read_answer(reply) == ECHO + text for reply, text in zip(replies, texts) if not reply['error'])
        assert max(stats.calls.values()) == 2 and stats.requests == 600
        server.reset(healthy=True)
        done = desk.ask('--schema', 'schema.json')
        assert done.returncode == 0 and server.stats().calls == dict.fromkeys(texts[::5], 1), done.stdout


def read_answer(reply):
    value = reply['reply']
    return (json.loads(value) if isinstance(value, str) else value)['answer']

# Paying once


def test_kill_9_three_times(tmp_path):
    "Each rerun pays again at most what was under way, and as many replies that were not yet written."
    texts, lost = questions(600), []
    with serve(latency=0.1) as server:
        desk = Desk(tmp_path, server.url, concurrency=32)
        desk.write(texts)
        for mark in (150, 300, 450):
            process = desk.start()
            wait_until(lambda: len(server.stats().whole) >= mark)
            process.kill()
            finish(process)
            with Ledger(desk.ledger) as ledger: lost.append(len(server.stats().whole) - sum(1 for _ in ledger.entries()))
            assert desk.whole()
        done = desk.ask()
        stats = server.stats()
    assert done.returncode == 0 and answered(desk, texts), done.stderr
    assert max(lost) <= 2 * 32 and paid_again(stats) == sum(lost), (lost, paid_again(stats))


def test_a_disk_slower_than_the_model_holds_the_calls_back(tmp_path):
    "While nothing can be written, no more is asked than a kill may lose; then everything goes on."
    texts = questions(600)
    with serve(latency=0.01) as server:
        desk = Desk(tmp_path, server.url, concurrency=32)
        desk.write(texts)
        with Ledger(desk.ledger): pass
        lock = sqlite3.connect(desk.ledger)
        lock.execute('begin immediate')
        process = desk.start()
        wait_until(lambda: len(server.stats().whole) >= 2 * 32)
        time.sleep(1)
        unwritten = len(server.stats().whole)
        lock.rollback()
        lock.close()
        finish(process)
        stats = server.stats()
    assert unwritten == 2 * 32 and process.returncode == 0 and answered(desk, texts)
    assert stats.calls == dict.fromkeys(texts, 1)


def test_two_processes_on_one_ledger(tmp_path):
    texts = questions(400)
    with serve(latency=0.05) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        both = [desk.start(out=f'{name}.jsonl') for name in 'ab']
        done = [finish(process) for process in both]
        stats = server.stats()
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert answered(desk, texts, 'a.jsonl') and answered(desk, texts, 'b.jsonl') and desk.whole()
    assert (paid_again(stats), stats.requests) == (0, 400)


def test_one_of_two_processes_is_killed(tmp_path):
    "Nobody waits for a dead process's calls."
    texts = questions(400)
    with serve(latency=0.05) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        first, second = desk.start(), desk.start(out='b.jsonl')
        wait_until(lambda: len(server.stats().whole) >= 150)
        first.kill()
        finish(first)
        done, stats = finish(second), server.stats()
    assert done.returncode == 0 and answered(desk, texts, 'b.jsonl') and desk.whole(), done.stderr
    assert paid_again(stats) <= 2 * 16, paid_again(stats)


def test_equal_prompts_are_sent_once(tmp_path):
    texts = questions(50)
    with serve(latency=0.02) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts * 4)
        assert desk.ask().returncode == 0 and answered(desk, texts * 4)
        assert server.stats().requests == 50


@pytest.mark.parametrize('shared', [True, False], ids=['one_ledger', 'two_ledgers'])
def test_equal_prompts_of_two_threads_are_sent_once(tmp_path, shared):
    texts, got = questions(100), {}
    with serve(latency=0.05) as server:
        desk = Desk(tmp_path, server.url)
        ledgers = [Ledger(desk.ledger)] * 2 if shared else [Ledger(desk.ledger) for _ in range(2)]
        clients = [desk.client(ledger=ledger) for ledger in ledgers]
        crew = [threading.Thread(target=lambda n=n: got.update({n: clients[n].ask(texts)})) for n in range(2)]
        for thread in crew: thread.start()
        for thread in crew: thread.join(300)
        stats = server.stats()
        for ledger in ledgers: ledger.close()
    assert [[reply.text for reply in got[n]] for n in range(2)] == [[ECHO + text for text in texts]] * 2
    assert stats.requests == 100
    assert abs(sum(client.cost for client in clients)) == 0 and sum(not reply.cached for n in got for reply in got[n]) == 100


def test_order_and_one_changed_prompt(tmp_path):
    texts = questions(300)
    with serve(latency=0.02, sigma=1.0) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        texts[123] = '換成這一題'
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().requests == 301


def test_replay(tmp_path):
    texts = questions(200)
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        assert desk.ask(out='first.jsonl').returncode == 0
        server.reset()
        assert desk.ask(out='second.jsonl', env={'KYARA_REPLAY': '1'}).returncode == 0
        desk.write([*texts, '新的一題'], name='more.jsonl')
        one_line(desk.ask(prompts='more.jsonl', out='third.jsonl', env={'KYARA_REPLAY': '1'}), 2, 'KYARA_REPLAY', '新的一題')
        assert server.stats().requests == 0
    assert desk.ask(out='fourth.jsonl', env={'KYARA_REPLAY': '1'}).returncode == 0 # The server is gone
    first = (tmp_path / 'first.jsonl').read_bytes()
    assert answered(desk, texts, 'first.jsonl') and not (tmp_path / 'third.jsonl').exists()
    assert (tmp_path / 'second.jsonl').read_bytes() == first == (tmp_path / 'fourth.jsonl').read_bytes()


@pytest.fixture
def interruptible():
    "What is started hears Ctrl-C, even if these tests run in the background, where it is ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['ctrl_c', 'sigterm'])
def test_interrupted(tmp_path, number, interruptible):
    texts = questions(400)
    with serve(latency=0.1) as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        process = desk.start()
        wait_until(lambda: len(server.stats().whole) >= 150)
        process.send_signal(number)
        one_line(finish(process), 130, 'interrupted')
        assert desk.whole() and desk.ask().returncode == 0 and answered(desk, texts)
        assert paid_again(server.stats()) <= 16, paid_again(server.stats())

# Money


@pytest.mark.parametrize('limit', ['--max-cost', '--max-tokens'])
def test_budget(tmp_path, limit):
    "Never more than allowed, everything paid is kept, and a rerun pays only the rest."
    texts = questions(300)
    tokens = len(texts[0]) * 2 + len(ECHO)
    with serve(latency=0.02) as server:
        desk = Desk(tmp_path, server.url, price_input=1.0, price_output=1.0)
        desk.write(texts)
        done = desk.ask(limit, 100.5 * tokens / 1e6 if limit == '--max-cost' else int(100.5 * tokens))
        replies, stats = desk.replies(), server.stats()
        assert done.returncode == 3, done.stderr
        assert stats.requests == 100 and stats.tokens == 100 * tokens
        assert sum(reply['error'] is None for reply in replies) == 100
        assert {reply['error'] for reply in replies} == {None, limit.strip('-').replace('-', '_')}
        assert sum(reply['cost'] for reply in replies if not reply['error']) == pytest.approx(100 * tokens / 1e6)
        assert desk.ask(limit, 1 if limit == '--max-cost' else 10**6).returncode == 0 and answered(desk, texts)
        assert server.stats().requests == 300


def test_ask_until(tmp_path):
    with serve() as server:
        desk = Desk(tmp_path, server.url, price_input=1.0, price_output=1.0)
        endless = lambda: (f'第{number:06d}題' for number in itertools.count())
        even = lambda reply: int(re.search(r'\d+', reply.text)[0]) % 2 == 0
        client = desk.client()
        got = client.ask_until(endless(), even, target=200)
        assert [place for place, _ in got.rows] == list(range(0, 400, 2)) and got.ended == 'target'
        assert [reply.text for _, reply in got.rows] == [f'{ECHO}第{place:06d}題' for place, _ in got.rows]
        seen = server.stats().requests
        assert seen == got.asked <= 1000
        assert client.ask_until(endless(), even, target=200).rows[-1][0] == 398 and server.stats().requests == seen
        few = desk.client().ask_until([f'甲{number}' for number in range(10)], lambda reply: '3' in reply.text, target=5)
        assert (len(few.rows), few.asked, few.ended) == (1, 10, 'prompts')
        poor = desk.client(max_cost=client.cost / 10).ask_until((f'乙{n:06d}' for n in itertools.count()), even, target=10**6)
        assert poor.ended == 'max_cost' and 0 < len(poor.rows) < 200

# Places that cannot be written


def no_room(size): return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_namespace(script):
    "Give words that run a command after some mounts of its own; skip where that is not allowed."
    if subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode: pytest.skip('no mounts allowed here')
    return ['unshare', '-m', 'sh', '-c', f'{script} && exec "$@"', 'sh']


@pytest.mark.parametrize('how', ['limit', 'tmpfs'])
def test_full_disk(tmp_path, how):
    "The engine stops paying for what it cannot keep, says so in a line, and goes on where there is room."
    texts, place = questions(2000), tmp_path / 'disk'
    place.mkdir()
    with serve(latency=0.01) as server:
        desk = Desk(tmp_path, server.url)
        desk.ledger = place / 'calls.sqlite'
        desk.write(texts)
        if how == 'limit': done = desk.ask(preexec_fn=no_room(600_000))
        else:
            save = f'cp -a {place}/. {tmp_path}/saved/'
            (tmp_path / 'saved').mkdir()
            mounted = in_namespace(f'mount -t tmpfs -o size=1m none {place}')
            done = desk.ask(before=[*mounted, 'sh', '-c', f'"$@"; code=$?; {save}; exit $code', 'sh'])
            desk.ledger = tmp_path / 'saved/calls.sqlite'
        one_line(done, 2, 'calls.sqlite', 'cannot be written')
        paid = len(server.stats().whole)
        with Ledger(desk.ledger) as ledger: kept = sum(1 for _ in ledger.entries())
        assert kept > 50 and desk.whole(), kept
        assert paid < 2000 and paid - kept <= 400, (paid, kept)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert paid_again(server.stats()) == paid - kept


def test_ledger_that_cannot_be_written(tmp_path):
    "Nothing is asked that could not be kept; a replay from it works."
    texts, place = questions(50), tmp_path / 'place'
    place.mkdir()
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.ledger = place / 'calls.sqlite'
        desk.write(texts)
        assert desk.ask(out='first.jsonl').returncode == 0
        desk.write([*texts, '新的一題'], name='more.jsonl')
        before = in_namespace(f'mount --bind {place} {place} && mount -o remount,ro,bind {place}')
        server.reset()
        one_line(desk.ask(prompts='more.jsonl', before=before), 2, 'calls.sqlite')
        assert desk.ask(out='second.jsonl', before=before, env={'KYARA_REPLAY': '1'}).returncode == 0
        desk.ledger = place / 'new.sqlite'
        one_line(desk.ask(before=before), 2, 'new.sqlite')
        assert server.stats().requests == 0
    assert (tmp_path / 'first.jsonl').read_bytes() == (tmp_path / 'second.jsonl').read_bytes()


def test_ledger_in_no_folder(tmp_path):
    (tmp_path / 'file').write_text('這是檔案')
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.write(questions(5))
        for place in (tmp_path / 'file/calls.sqlite', tmp_path / 'file', tmp_path):
            desk.ledger = place
            one_line(desk.ask(), 2, place.name)
        assert server.stats().requests == 0 and (tmp_path / 'file').read_text() == '這是檔案'

# Keys


def test_key_is_nowhere(tmp_path):
    "A planted key, and a server that repeats it in every error: it is in nothing that was written or said."
    texts = [*questions(100), '[[bad]] 這一題不行', '[[filter]] 這一題不安全']
    said = []
    with serve(echo_key=True, key=KEY, busy=0.1, broken=0.1, dropped=0.05, malformed=0.05, seed=2) as server:
        desk = Desk(tmp_path, server.url, api_key_env='PLANTED_KEY', timeout=5)
        desk.write(texts)
        said.append(desk.ask('--patience', 2))
        assert said[-1].returncode == 3 and '100 answered' in said[-1].stdout, said[-1]
        for flags in ({'key': 'other'}, {'model': 'other'}, {'broken': 0.4, 'dropped': 0.3, 'malformed': 0.3}):
            server.reset(echo_key=True, **flags)
            desk.write([f'{flags} {number}' for number in range(12)])
            said.append(desk.ask('--patience', 1))
            assert said[-1].returncode in (2, 3), said[-1]
    said.append(desk.ask('--patience', 0))
    assert not [one for one in said if KEY in one.stdout + one.stderr]
    assert found(KEY, tmp_path) == [] and found(ECHO, tmp_path), 'the search itself has to find something'


def test_key_is_nowhere_in_a_run(tmp_path):
    "The same for stages, their notebooks and what they say when they fail."
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'runs').mkdir()
    write_stage(tmp_path / 'nbs/30_ask.ipynb')
    (tmp_path / 'runs/tiny.yaml').write_text('stages:\n  ask:\n    notebook: 30_ask\n    teacher: loopback\n')
    with serve(echo_key=True, key=KEY) as server:
        Desk(tmp_path, server.url, api_key_env='PLANTED_KEY')
        environment = {**os.environ, 'KYARA_SETTINGS': str(tmp_path / 'settings.ini'), 'PLANTED_KEY': KEY}
        for right, code in [('another', 2), (KEY, 0)]:
            server.reset(echo_key=True, key=right)
            done = subprocess.run([KYARA, 'run', 'runs/tiny.yaml'], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert server.stats().requests and done.returncode == code, done.stdout + done.stderr
            assert KEY not in done.stdout + done.stderr and ('PLANTED_KEY' in done.stderr) == (code == 2), done.stderr
            assert found(KEY, tmp_path) == [] and found('loopback', tmp_path / 'runs')


def write_stage(path):
    "Write the notebook of a stage that asks one question."
    import nbformat
    parameters = """out_dir: str = '../runs/_notebook/ask'  # where
ledger: str = '../runs/_notebook/ask.sqlite'  # replies
teacher: str = 'offline'  # who"""
    code = """from kyara.core import start_stage, finish_stage, write_text
from kyara.llm import open_client
folder = start_stage(out_dir)
reply = open_client(teacher, ledger, out_dir).ask(['你好'])[0]
write_text(folder / 'reply.txt', reply.text)
print(reply)
finish_stage(folder, 'kyara.llm', {'teacher': teacher}, [], ['reply.txt'], {'kept': 1}, reply.cost)"""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(code)]
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'python3'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def found(text, folder):
    return [path for path in folder.rglob('*') if path.is_file() and text.encode() in path.read_bytes()]


def test_one_changed_prompt_in_a_thousand_costs_one_call(tmp_path):
    texts = questions(1000)
    with serve() as server:
        desk = Desk(tmp_path, server.url)
        desk.write(texts)
        assert desk.ask().returncode == 0
        texts[500] = '改過的一題'
        desk.write(texts)
        assert desk.ask().returncode == 0 and answered(desk, texts)
        assert server.stats().requests == 1001
