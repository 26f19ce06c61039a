"""How fast the engine asks, beside a bare aiohttp loop and the openai client, on one loopback server.

`python tests/bench_engine.py [--prompts 2000 10000] [--concurrency 64 256] [--latency fixed50 lognormal200]
[--repeat 3] [--only kyara aiohttp]` prints Markdown tables and the targets. Every contestant is a fresh process that
reads the same prompts and writes its replies; they take turns, and medians are shown. `--peers PYTHON` adds Bespoke
Curator and litellm, as far as that interpreter has them. This is no test: run it on a quiet machine.
"""
import asyncio
import json
import os
import sys
# All else is imported where it is used, so that the contestants, which are in this file too, start bare

LATENCIES = {'none': {}, 'fixed50': {'latency': 0.05}, 'lognormal200': {'latency': 0.2, 'sigma': 0.5, 'seed': 7}}
SENTENCE = '請用三句話說明臺灣的高山湖泊如何形成，並且舉出一個例子，說出它的位置、海拔和面積。'
MODEL = 'loopback'
SAMPLING = {'temperature': 0.0, 'max_tokens': 1024}

# Contestants: each asks a list of message lists and gives the texts


def ask_limit(prompts, url, concurrency):
    "A protocol that knows nothing but this server: as fast as anybody can be."
    import socket
    from urllib.parse import urlsplit
    place, texts, queue = urlsplit(url), [None] * len(prompts), iter(enumerate(prompts))
    head = f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b'.encode()

    class Caller(asyncio.Protocol):
        def connection_made(self, transport):
            transport.get_extra_info('socket').setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.transport, self.buffer, self.done = transport, b'', asyncio.get_running_loop().create_future()
            self.next()

        def next(self):
            self.number, messages = next(queue, (None, None))
            if messages is None: return self.done.set_result(None)
            body = json.dumps({'model': MODEL, 'messages': messages, **SAMPLING}).encode()
            self.transport.write(head % (len(body), body))

        def data_received(self, data):
            self.buffer += data
            top, _, body = self.buffer.partition(b'\r\n\r\n')
            if len(body) < int(top.rpartition(b': ')[2]): return
            texts[self.number] = json.loads(body)['choices'][0]['message']['content']
            self.buffer = b''
            self.next()

    async def main():
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(Caller, place.hostname, place.port) for _ in range(concurrency)]
        for _, caller in made: await caller.done
        for transport, _ in made: transport.close()
    run_fast(main())
    return texts


def ask_aiohttp(prompts, url, concurrency, start=asyncio.run):
    "A bare aiohttp loop."
    import aiohttp
    texts, queue = [None] * len(prompts), iter(enumerate(prompts))

    async def work(session):
        for number, messages in queue:
            body = {'model': MODEL, 'messages': messages, **SAMPLING}
            async with session.post(f'{url}/chat/completions', json=body) as reply:
                texts[number] = (await reply.json())['choices'][0]['message']['content']

    async def main():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(work(session) for _ in range(concurrency)))
    start(main())
    return texts


def ask_aiohttp_uvloop(prompts, url, concurrency): return ask_aiohttp(prompts, url, concurrency, run_fast)


def ask_openai_aiohttp(prompts, url, concurrency):
    "The openai client on its aiohttp transport, with a semaphore."
    import openai
    return ask_openai(prompts, url, concurrency, openai.DefaultAioHttpClient(), lambda call: call)


def ask_openai_tenacity(prompts, url, concurrency):
    "The openai client as it comes, with a semaphore and tenacity."
    import openai
    from tenacity import retry, stop_after_attempt, wait_random_exponential
    careful = retry(wait=wait_random_exponential(max=30), stop=stop_after_attempt(8), reraise=True)
    return ask_openai(prompts, url, concurrency, openai.DefaultAsyncHttpxClient(), careful)


def ask_openai(prompts, url, concurrency, transport, careful):
    import openai

    async def main():
        turn = asyncio.Semaphore(concurrency)
        async with openai.AsyncOpenAI(base_url=url, api_key='none', max_retries=0, http_client=transport) as client:
            @careful
            async def call(messages):
                reply = await client.chat.completions.create(model=MODEL, messages=messages, **SAMPLING)
                return reply.choices[0].message.content

            async def one(messages):
                async with turn: return await call(messages)
            return await asyncio.gather(*map(one, prompts))
    return asyncio.run(main())


def ask_litellm(prompts, url, concurrency):
    "litellm with a semaphore."
    import litellm
    litellm.telemetry, litellm.suppress_debug_info = False, True

    async def main():
        turn = asyncio.Semaphore(concurrency)

        async def one(messages):
            async with turn:
                reply = await litellm.acompletion(f'openai/{MODEL}', messages, api_base=url, api_key='none', **SAMPLING)
            return reply.choices[0].message.content
        return await asyncio.gather(*map(one, prompts))
    return asyncio.run(main())


def ask_curator(prompts, url, concurrency):
    "Bespoke Curator, its own cache on."
    import importlib.util
    tokenizers = os.path.join(*importlib.util.find_spec('litellm').submodule_search_locations, 'litellm_core_utils/tokenizers')
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', tokenizers) # It counts tokens with a vocabulary from the network otherwise
    from bespokelabs import curator
    options = {'base_url': url, 'max_concurrent_requests': concurrency, 'max_requests_per_minute': 10**7,
               'max_tokens_per_minute': 10**10, 'api_key': 'none'}
    model = curator.LLM(model_name=MODEL, backend='openai', backend_params=options, generation_params=SAMPLING)
    replies = model(prompts)
    rows = getattr(replies, 'dataset', replies)
    return list(rows[rows.column_names[-1]])


def run_fast(work):
    try: from uvloop import run
    except ImportError: run = asyncio.run
    return run(work)


CONTESTANTS = {'bare protocol (the limit)': ask_limit, 'bare aiohttp loop': ask_aiohttp,
               'bare aiohttp loop, uvloop': ask_aiohttp_uvloop, 'openai client on aiohttp': ask_openai_aiohttp,
               'openai client, semaphore, tenacity': ask_openai_tenacity}
PEERS = {'Bespoke Curator': ask_curator, 'litellm, semaphore': ask_litellm}
NEEDS = {ask_aiohttp: ['aiohttp'], ask_aiohttp_uvloop: ['aiohttp', 'uvloop'], ask_openai_aiohttp: ['openai', 'aiohttp'],
         ask_openai_tenacity: ['openai', 'tenacity'], ask_curator: ['bespokelabs.curator'], ask_litellm: ['litellm']}
KYARA = 'kyara ask'
# Wall seconds of the fastest complete peer where it was measured first, for runs without --peers
FASTEST_PEER = {(2000, 256, 'lognormal200'): 11.3, (10000, 256, 'lognormal200'): 39.7}


def compete(name, prompts_file, replies_file, url, concurrency):
    "Be a contestant."
    with open(prompts_file, encoding='utf-8') as lines: prompts = [json.loads(line)['messages'] for line in lines]
    texts = {**CONTESTANTS, **PEERS}[name](prompts, url, concurrency)
    with open(replies_file, 'w', encoding='utf-8') as lines:
        for text in texts: lines.write(json.dumps({'reply': text}, ensure_ascii=False) + '\n')


def replay_inside(prompts_file, ledger):
    "Answer from the ledger and print the seconds that `ask` took."
    import time
    from kyara.llm import Request, ask
    with open(prompts_file, encoding='utf-8') as lines:
        requests = [Request(json.loads(line)['messages']) for line in lines]
    started = time.perf_counter()
    replies = ask(requests, MODEL, ledger=ledger)
    seconds = time.perf_counter() - started
    assert len(replies) == len(requests) and all(reply.ok and reply.cached for reply in replies)
    print(seconds)

# The benchmark


def main():
    import tempfile
    options = parse_options()
    contestants = find_contestants(options)
    compile_package()
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {'KYARA_SETTINGS': f'{folder}/settings.ini', 'KYARA_PROGRESS': '0', 'TELEMETRY_ENABLED': 'false',
                       'CURATOR_CACHE_DIR': f'{folder}/curator', 'HF_HUB_OFFLINE': '1', 'LITELLM_LOCAL_MODEL_COST_MAP': 'True'}
        for latency in options.latency:
            for concurrency in options.concurrency:
                for count in options.prompts:
                    verdicts += compare(contestants, (count, concurrency, latency), options.repeat, folder)
    print('\n| target | measured | |\n|---|---|---|')
    for target, measured, passed in verdicts: print(f'| {target} | {measured} | {"pass" if passed else "FAIL"} |')
    return 0 if all(passed for _, _, passed in verdicts) else 1


def compile_package():
    "Give this package the compiled files that the installed contestants have."
    import compileall
    from pathlib import Path
    import kyara
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
    compileall.compile_dir(Path(kyara.__file__).parent, quiet=1)


def parse_options():
    import argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--prompts', type=int, nargs='+', default=[2000, 10000])
    parser.add_argument('--concurrency', type=int, nargs='+', default=[64, 256])
    parser.add_argument('--latency', nargs='+', choices=LATENCIES, default=['fixed50', 'lognormal200'])
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--only', nargs='+', metavar='WORD', help='contestants whose name holds one of these')
    parser.add_argument('--peers', metavar='PYTHON', help='interpreter that has bespokelabs-curator or litellm')
    return parser.parse_args()


def find_contestants(options):
    "Give the interpreter of each contestant that can run, and say who cannot."
    import subprocess
    found = {KYARA: sys.executable}
    for names, python in [(CONTESTANTS, sys.executable), (PEERS, options.peers)]:
        for name, function in names.items():
            needs = NEEDS.get(function, [])
            code = f'import importlib.util as u; exit(not all(map(u.find_spec, {needs})))'
            there = python and not subprocess.run([python, '-c', code], stderr=subprocess.DEVNULL).returncode
            if there: found[name] = python
            elif python: print(f'{name} is left out: {" or ".join(needs)} is not installed', flush=True)
    wanted = options.only or ['']
    return {name: python for name, python in found.items() if any(word in name for word in wanted)}


def compare(contestants, case, repeat, folder):
    "Let the contestants take turns; print a table and give the verdicts."
    import shutil
    from loopback import serve
    count, concurrency, latency = case
    texts = [f'第{number:05d}題：{SENTENCE}' for number in range(count)]
    with open(f'{folder}/in.jsonl', 'w', encoding='utf-8') as lines:
        for number, text in enumerate(texts):
            row = {'id': f'p{number}', 'messages': [{'role': 'user', 'content': text}]}
            lines.write(json.dumps(row, ensure_ascii=False) + '\n')
    runs, replays, names = {name: [] for name in contestants}, [], list(contestants)
    with serve(**LATENCIES[latency]) as server:
        section = f'[model.{MODEL}]\nprovider = openai\nmodel = {MODEL}\nbase_url = {server.url}\nconcurrency = {concurrency}\n'
        with open(f'{folder}/settings.ini', 'w') as settings: settings.write(section)
        for turn in range(repeat):
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                ledger = f'{folder}/{case}-{turn}.sqlite'
                runs[name].append(measure(name, contestants[name], server, case, folder, ledger, texts))
                if name == KYARA: replays.append(replay(server, folder, ledger, count))
                for path in [f'{ledger}{end}' for end in ('', '-wal', '-shm', '.claims')]:
                    if os.path.isdir(path): shutil.rmtree(path)
                    elif os.path.exists(path): os.remove(path)
    return show(case, repeat, runs, replays)


def measure(name, python, server, case, folder, ledger, texts):
    "Run a contestant once."
    count, concurrency, _ = case
    server.reset()
    place = [f'{folder}/in.jsonl', f'{folder}/out.jsonl']
    if name == KYARA: command = kyara_command(folder, ledger)
    else: command = [python, __file__, 'contestant', name, *place, server.url, str(concurrency)]
    result = timed(command)
    stats = server.stats(brief=True)
    from loopback import ECHO
    with open(place[1], encoding='utf-8') as lines:
        right = sum(json.loads(line)['reply'] == ECHO + text for line, text in zip(lines, texts))
    os.remove(place[1])
    return {'wall': result['wall'], 'requesting': stats.last - stats.first, 'rate': count / (stats.last - stats.first),
            'cpu': result['cpu'] / count * 1000, 'peak': result['peak'], 'first': stats.first - result['started'], 'right': right}


def kyara_command(folder, ledger):
    kyara = os.path.join(os.path.dirname(sys.executable), 'kyara')
    return [kyara, 'ask', '--model', MODEL, '--in', f'{folder}/in.jsonl', '--out', f'{folder}/out.jsonl', '--ledger', ledger]


def timed(command):
    "Run a process; give its wall time, its CPU time and its largest size."
    import subprocess, tempfile, threading, time
    with tempfile.TemporaryFile() as said:
        started = time.time()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        watch = threading.Timer(900, process.kill)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall, process.returncode = time.time() - started, os.waitstatus_to_exitcode(status)
        watch.cancel()
        said.seek(0)
        text = said.read().decode('utf-8', 'replace')
    if process.returncode: sys.exit(f'{command} ended with {process.returncode}:\n{text[-2000:]}')
    return {'started': started, 'wall': wall, 'cpu': usage.ru_utime + usage.ru_stime, 'peak': usage.ru_maxrss / 1024, 'said': text}


def replay(server, folder, ledger, count):
    "Ask the same again, by the command and by the function; nobody may be asked."
    server.reset()
    whole = timed(kyara_command(folder, ledger))['wall']
    inside = timed([sys.executable, __file__, 'inside', f'{folder}/in.jsonl', ledger])['said'].split()[-1]
    assert not server.stats(brief=True).requests
    os.remove(f'{folder}/out.jsonl')
    return {'command': count / whole, 'inside': count / float(inside)}


def middle(rows):
    "Give the median of every column."
    from statistics import median
    return {key: median(row[key] for row in rows) for key in rows[0]} if rows else {}


def show(case, repeat, runs, replays):
    "Print one case and give its verdicts."
    count, concurrency, latency = case
    print(f'\n**{count:,} prompts, concurrency {concurrency}, {latency}** (median of {repeat})\n')
    print('| | wall s | requesting s | requests/s | CPU s per 1,000 | peak MB | first request s | right |\n|---|---|---|---|---|---|---|---|')
    table = {name: middle(rows) for name, rows in runs.items()}
    for name, row in table.items():
        print(f'| {name} | {row["wall"]:.2f} | {row["requesting"]:.2f} | {row["rate"]:.0f} | {row["cpu"]:.2f} | {row["peak"]:.0f} | '
              f'{row["first"]:.2f} | {min(one["right"] for one in runs[name]):,} |')
    ours, again = table.get(KYARA), middle(replays)
    if not ours: return []
    print(f'\nAgain from the ledger: {again["command"]:,.0f} replies/s by the command, {again["inside"]:,.0f} inside `ask`.', flush=True)
    return list(judge(case, table, ours, again))


def judge(case, table, ours, again):
    "Hold one case against the targets."
    count, concurrency, latency = case
    where, bare = f'{count:,} / {concurrency} / {latency}', table.get('bare aiohttp loop')
    if bare:
        for key, limit in [('requesting', 1.15), ('cpu', 2.0)]:
            yield f'{where}: {key} at most {limit} times the bare aiohttp loop', f'{ours[key] / bare[key]:.2f}', ours[key] <= limit * bare[key]
    yield f'{where}: peak at most 150 MB', f'{ours["peak"]:.0f} MB', ours['peak'] <= 150
    yield f'{where}: first request within 1.0 s', f'{ours["first"]:.2f} s', ours['first'] <= 1
    yield f'{where}: all right', f'{ours["right"]:,.0f}', ours['right'] == count
    peers = {name: table[name]['wall'] for name in PEERS if name in table and table[name]['right'] == count}
    known = min(peers.values(), default=FASTEST_PEER.get(case))
    source = min(peers, key=peers.get) if peers else 'Bespoke Curator as measured before'
    if known:
        limit = table.get('bare protocol (the limit)')
        measured = f'{known / ours["wall"]:.2f}' + (f' (the limit itself {known / limit["wall"]:.2f})' if limit else '')
        yield f'{where}: wall 4 times as fast as {source} ({known:.1f} s)', measured, ours['wall'] * 4 <= known
    for key in again: yield f'{where}: 5,000 replies/s from the ledger ({key})', f'{again[key]:,.0f}', again[key] >= 5000


if __name__ == '__main__':
    if sys.argv[1:2] == ['contestant']: compete(*sys.argv[2:6], int(sys.argv[6]))
    elif sys.argv[1:2] == ['inside']: replay_inside(*sys.argv[2:])
    else: sys.exit(main())
