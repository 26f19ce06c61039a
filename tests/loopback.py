"""A loopback server that speaks OpenAI's form, in a process of its own, with the faults it is told to have.

As a script: `python tests/loopback.py --latency 0.2 --sigma 0.5 --busy 0.05`; it prints its port.
In a test: `with serve(latency=0.02) as server: ...; server.stats()`; `server.reset(...)` forgets and sets flags anew.

The reply to a prompt is ECHO and the last user's text, so that each reply can be checked; with `response_format`, or
`[[json]]` in the prompt, it is an object of the same with the key "answer". A prompt is told from others by its first
user's text. Marks in it: `[[garbage]]` never gets an object, `[[garbage once]]` not at the first call, `[[length]]`,
`[[filter]]`, `[[empty]]` and `[[rerouted]]` get a reply of that kind, `[[bad]]` gets 400, `[[slow]]` nothing at all.
"""
import argparse
import asyncio
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

ECHO, GARBAGE = 'echo: ', '這不是物件：'
LENGTH = re.compile(rb'\r\ncontent-length: *(\d+)', re.IGNORECASE)
KEY = re.compile(rb'\r\nauthorization: *([^\r]*)', re.IGNORECASE)
MARK = re.compile(r'\[\[(length|filter|empty|rerouted|bad|slow)\]\]')
WORDS = {200: 'OK', 400: 'Bad Request', 401: 'Unauthorized', 404: 'Not Found', 429: 'Too Many Requests',
         500: 'Internal Server Error', 503: 'Service Unavailable'}


@dataclass
class Flags:
    "How the server behaves; each field is a flag of the script."
    port: int = 0 # 0: a free one
    latency: float = 0.0 # Seconds to a reply; the median, if there is a `sigma`
    sigma: float = 0.0 # Spread of a lognormal latency; a prompt's latency is always the same
    seed: int = 0 # Of latencies and faults
    busy: float = 0.0 # Share of calls that get 429
    broken: float = 0.0 # ... 500
    dropped: float = 0.0 # ... half of the body, then the end of the connection
    malformed: float = 0.0 # ... half of the JSON, with status 200
    hung: float = 0.0 # ... nothing
    retry_after: float = 0.1 # Seconds that a 429 asks for; 0: it names none
    idle: float = 0.0 # Seconds after which a connection that carries no call is closed without a word; 0: never
    allow: int = 0 # So many calls may be under way, more get 429; 0: any number
    key: str = '' # Other keys get 401
    model: str = '' # Other models get 404
    answer_model: str = '' # Model that the replies name; '': the one that was asked for
    echo_key: bool = False # Errors repeat the Authorization header
    dead_from: float = 0.0 # Seconds after the first request
    dead_for: float = 0.0 # Seconds; 0: never dead
    healthy: bool = False # Marks in prompts mean nothing
    dead_how: str = 'reset' # 'reset' ends connections, 'refuse' takes none, 'hang' never answers, '503' says so
    with_parent: bool = False # End when standard input ends


@dataclass
class Counts:
    "What the server has seen."
    requests: int = 0
    under_way: int = 0
    most_under_way: int = 0
    cut: int = 0 # Calls whose connection ended before their reply
    early: int = 0 # Calls of a prompt before the time that a 429 had asked for
    first: float = 0.0 # Time of the first request
    last: float = 0.0 # Time of the last whole reply
    fates: Counter = field(default_factory=Counter) # What calls got, by name
    busy_at: list = field(default_factory=list) # How many replies were out at each 429
    calls: Counter = field(default_factory=Counter) # Requests by prompt
    whole: Counter = field(default_factory=Counter) # Replies sent whole, by prompt
    answered: int = 0 # Replies sent whole
    tokens: int = 0 # Of the whole replies and their prompts


class Connection(asyncio.Protocol):
    "One connection; a request at a time."
    def __init__(self, server): self.server, self.buffer, self.timer, self.counts = server, b'', None, None

    def connection_made(self, transport):
        self.transport = transport
        self.server.connections.add(self)

    def connection_lost(self, error):
        self.server.connections.discard(self)
        if self.counts: self.counts.cut += 1
        self.leave()
        if self.timer: self.timer.cancel()

    def leave(self):
        if self.counts: self.counts.under_way -= 1
        self.counts, idle = None, self.server.flags.idle
        if idle and not self.transport.is_closing():
            self.timer = asyncio.get_running_loop().call_later(idle, self.transport.close)

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(b'\r\n\r\n')
        if end < 0: return
        length = LENGTH.search(self.buffer, 0, end)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self.buffer) < whole: return
        head, body, self.buffer = self.buffer[:end], self.buffer[end + 4:whole], self.buffer[whole:]
        if head.startswith(b'POST /v1/chat/completions'): self.server.take(self, head, body)
        else: self.server.manage(self, head.split(b' ')[1], body)

    def send(self, status, body, headers='', share=1.0):
        "Answer with a part of a body, and end the connection if it is not the whole."
        self.leave()
        if self.transport.is_closing(): return False
        head = f'HTTP/1.1 {status} {WORDS[status]}\r\nContent-Type: application/json\r\n{headers}Content-Length: '
        self.transport.write(b'%b%d\r\n\r\n%b' % (head.encode(), len(body), body[:int(share * len(body))]))
        if share < 1: self.transport.close()
        return True


class Loopback:
    "Answers, or fails as it is told to."
    def __init__(self, flags):
        self.connections, self.clocks, self.port = set(), [], flags.port
        self.set(flags)

    def set(self, flags):
        "Forget everything and behave in another way."
        chance = random.Random(flags.seed)
        self.flags, self.counts, self.not_before, self.is_dead = flags, Counts(), {}, False
        self.latencies = [flags.latency * chance.lognormvariate(0, flags.sigma) for _ in range(4096)]
        self.faults = [(name, getattr(flags, name)) for name in ('busy', 'broken', 'dropped', 'malformed', 'hung')]
        self.faulty = any(share for _, share in self.faults)
        for clock in self.clocks: clock.cancel()
        self.clocks = []

    def take(self, connection, head, body):
        "Take a call."
        flags, counts, now = self.flags, self.counts, time.time()
        if not counts.first: self.begin(now)
        counts.requests += 1
        counts.under_way += 1
        counts.most_under_way = max(counts.most_under_way, counts.under_way)
        connection.counts = counts
        if connection.timer: connection.timer.cancel()
        data = json.loads(body)
        users = [turn['content'] for turn in data['messages'] if turn['role'] == 'user'] or ['']
        prompt = users[0]
        counts.calls[prompt] += 1
        counts.early += now < self.not_before.get(prompt, 0) - 0.002 # Clocks of event loops are that coarse
        fate = self.fate(head, data, prompt)
        counts.fates[fate] += 1
        latency = 0.0
        if flags.latency and fate not in ('busy', 'dead'):
            latency = self.latencies[zlib.crc32(prompt.encode()) % 4096] if flags.sigma else flags.latency
        answer = getattr(self, fate)
        if not latency: return answer(connection, head, data, prompt, users[-1])
        loop = asyncio.get_running_loop()
        connection.timer = loop.call_later(latency, answer, connection, head, data, prompt, users[-1])

    def begin(self, now):
        self.counts.first, loop = now, asyncio.get_running_loop()
        if not self.flags.dead_for: return
        span = {self.flags.dead_from: self.die, self.flags.dead_from + self.flags.dead_for: self.rise}
        self.clocks = [loop.call_later(seconds, turn) for seconds, turn in span.items()]

    def die(self):
        self.is_dead = True
        if self.flags.dead_how in ('503', 'hang'): return
        if self.flags.dead_how == 'refuse': self.listener.close()
        for connection in list(self.connections): connection.transport.abort()

    def rise(self):
        self.is_dead = False
        if self.flags.dead_how == 'refuse': self.task = asyncio.get_running_loop().create_task(self.listen())

    async def listen(self):
        make, loop = lambda: Connection(self), asyncio.get_running_loop()
        self.listener = await loop.create_server(make, '127.0.0.1', self.port, backlog=1024)
        self.port = self.listener.sockets[0].getsockname()[1]

    def fate(self, head, data, prompt):
        "Say what a call gets."
        flags, mark = self.flags, self.mark(prompt)
        if self.is_dead: return 'dead'
        if flags.key and KEY.search(head)[1] != b'Bearer ' + flags.key.encode(): return 'wrong_key'
        if flags.model and data['model'] != flags.model: return 'unknown_model'
        if flags.allow and self.counts.under_way > flags.allow: return 'busy'
        if self.faulty:
            name = f'{flags.seed}:{self.counts.calls[prompt]}:{prompt}'.encode()
            drawn = int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), 'big') / 256 ** 6
            for fault, share in self.faults:
                drawn -= share
                if drawn < 0: return fault
        return {'bad': 'bad', 'slow': 'hung'}.get(mark and mark[1], 'answered')

    def mark(self, prompt): return None if self.flags.healthy else MARK.search(prompt)

    def answered(self, connection, head, data, prompt, text):
        body, tokens = self.reply(data, prompt, text)
        if not connection.send(200, body): return
        self.counts.whole[prompt] += 1
        self.counts.answered += 1
        self.counts.tokens += tokens
        self.counts.last = time.time()

    def reply(self, data, prompt, text):
        "Write a reply and count its tokens, a character each."
        mark, content, reason, model = self.mark(prompt), ECHO + text, 'stop', self.flags.answer_model or data['model']
        wanted = 'response_format' in data or '[[json]]' in prompt
        once = '[[garbage once]]' in prompt and self.counts.calls[prompt] == 1
        if ('[[garbage]]' in prompt or once) and not self.flags.healthy: content = GARBAGE + prompt
        elif wanted: content = json.dumps({'answer': ECHO + prompt}, ensure_ascii=False)
        if mark:
            content = {'length': content[:8], 'filter': '', 'empty': ' '}.get(mark[1], content)
            reason = {'length': 'length', 'filter': 'content_filter'}.get(mark[1], 'stop')
            model = 'another-model' if mark[1] == 'rerouted' else model
        asked = sum(len(turn['content']) for turn in data['messages'])
        body = ('{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":%s,"choices":[{"index":0,'
                '"message":{"role":"assistant","content":%s},"logprobs":null,"finish_reason":"%s"}],"usage":{'
                '"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}')
        body %= (json.dumps(model), json.dumps(content), reason, asked, len(content), asked + len(content))
        return body.encode(), asked + len(content)

    def busy(self, connection, head, data, prompt, text):
        seconds = self.flags.retry_after
        self.counts.busy_at.append(self.counts.whole.total())
        if seconds: self.not_before[prompt] = time.time() + seconds
        self.error(connection, head, 429, 'too many requests', f'Retry-After: {seconds:g}\r\n' if seconds else '')

    def broken(self, connection, head, data, prompt, text): self.error(connection, head, 500, 'something broke')
    def bad(self, connection, head, data, prompt, text): self.error(connection, head, 400, 'this prompt is refused')
    def wrong_key(self, connection, head, data, prompt, text): self.error(connection, head, 401, 'wrong key')

    def unknown_model(self, connection, head, data, prompt, text):
        self.error(connection, head, 404, f'there is no model {data["model"]}')

    def dropped(self, connection, head, data, prompt, text):
        connection.send(200, self.reply(data, prompt, text)[0], share=0.5)

    def malformed(self, connection, head, data, prompt, text):
        body = self.reply(data, prompt, text)[0]
        connection.send(200, body[:len(body) // 2])

    def hung(self, connection, head, data, prompt, text): pass

    def dead(self, connection, head, data, prompt, text):
        if self.flags.dead_how == '503': self.error(connection, head, 503, 'closed for a while')
        elif self.flags.dead_how != 'hang': connection.transport.abort()

    def error(self, connection, head, status, text, headers=''):
        key = KEY.search(head)
        if self.flags.echo_key and key: text += f' for {key[1].decode()}'
        connection.send(status, json.dumps({'error': {'message': text}}).encode(), headers)

    def manage(self, connection, path, body):
        "Answer what is no call."
        if path == b'/reset':
            self.set(Flags(**(asdict(self.flags) if body == b'same' else json.loads(body or b'{}'))))
            connection.send(200, b'{}')
        elif path in (b'/stats', b'/stats/brief'):
            counts = dict(vars(self.counts))
            if path == b'/stats/brief': counts = {key: counts[key] for key in counts.keys() - {'calls', 'whole', 'busy_at'}}
            connection.send(200, json.dumps(counts).encode())
        else: self.error(connection, b'', 404, 'no such page')


async def main(flags):
    "Serve until the process is ended."
    server = Loopback(flags)
    await server.listen()
    print(server.port, flush=True)
    ended = asyncio.Event()
    if flags.with_parent: asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()


def run(work):
    "Run a coroutine on uvloop, if it is there."
    try: from uvloop import run as run_fast
    except ImportError: run_fast = asyncio.run
    return run_fast(work)


class Server:
    "A handle on the server's process."
    def __init__(self, port, process):
        self.host, self.process = f'http://127.0.0.1:{port}', process
        self.url = f'{self.host}/v1'
        self.port = port

    def stats(self, brief=False):
        "Give what the server has seen."
        return argparse.Namespace(**self.get('/stats/brief' if brief else '/stats'))

    def reset(self, **flags):
        "Forget everything; without flags behave as before."
        self.get('/reset', json.dumps(flags).encode() if flags else b'same')

    def get(self, path, body=None):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.host + path, body), timeout=30) as reply: return json.load(reply)


@contextmanager
def serve(**flags):
    "Start a server in a process of its own; end it by its own id."
    words = [f'--{name.replace("_", "-")}' + ('' if value is True else f'={value}') for name, value in flags.items() if value is not False]
    command = [sys.executable, __file__, '--with-parent', *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try: yield Server(int(process.stdout.readline()), process)
    finally:
        process.kill()
        process.communicate()


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in fields(Flags):
        kind = {'action': 'store_true'} if one.type is bool else {'type': one.type, 'default': one.default}
        parser.add_argument(f'--{one.name.replace("_", "-")}', **kind)
    return Flags(**vars(parser.parse_args()))


if __name__ == '__main__': run(main(parse_flags()))
