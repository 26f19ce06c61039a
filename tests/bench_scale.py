"""What Ray gives and costs, on real nodes as processes of this machine.

`python tests/bench_scale.py [--only speed ceiling memory kill shards] [--calls 4000] [--rows 1000000] [--problems 4000]` prints a Markdown table a part. The loopback
server answers after 50 ms. This is no test: run it on a quiet machine.
"""
import argparse
import functools
import json
import tempfile
import threading
import time
from pathlib import Path

from loopback import serve
from nodes import environment, ray_nodes, whereabouts

from kyara.cluster import RayEngine, Store, ask_in_shards, caller, open_office, over_shards, read_engine, shard_table
from kyara.core import ModelSettings, content_hash
from kyara.ledger import Entry, entry_row
from kyara.llm import Request, ask_each


def requests(count, mark):
    return (Request([{'role': 'user', 'content': f'第{number:06d}題{mark}：臺灣第{number + 1}高的山是哪一座？'}]) for number in range(count))


def settings(server, workers=1): return ModelSettings('loopback', 'openai', 'loopback', server.url, concurrency=64 * workers)


def timed(function):
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def speed(folder, calls):
    "Rows a second alone and with 1, 2 and 4 workers, 64 calls at once each; the same without latency, where only overhead counts."
    list(RayEngine(4).map(whereabouts, [1.0] * 8))
    print(f'\n| latency | engine | seconds for {calls:,} calls | calls a second | seconds more than local per 1,000 calls |\n|---|---|---|---|---|')
    for latency in (0.05, 0.0):
        with serve(latency=latency) as server:
            for workers in (0, 1, 2, 4):
                name, got = f'{latency}-{workers}', []
                asked, common = requests(calls, name), dict(ledger=folder / f'{name}.sqlite', total=calls)
                if workers: work = lambda: ask_in_shards(asked, settings(server, workers), got.append, engine=RayEngine(workers), shard_size=250, **common)
                else: work = lambda: ask_each(asked, settings(server), got.append, **common)
                seconds = timed(work)
                if not workers: alone = seconds
                assert len(got) == calls and all(reply.ok for reply in got)
                print(f'| {latency * 1000:.0f} ms | {f"Ray, workers: {workers}" if workers else "local"} | {seconds:.1f} | {calls / seconds:,.0f} '
                      f'| {(seconds - alone) / calls * 1000:.2f} |', flush=True)


def ceiling(folder, calls, size=256, threads=4):
    "Calls a second that the office can look up, claim and keep, for several who ask at once."
    call, place = caller(open_office()), str(folder / 'ceiling.sqlite')
    def ask(number):
        name = f'ceiling/{number}'
        call('begin', place, name, 'x')
        for rows in batches[number]:
            known, ours = call('look_up', place, name, 'x', [row[0] for row in rows])
            assert len(ours) == len(rows) and not known
            assert call('keep', place, name, 'x', rows) == len(rows)
    entry = lambda key: Entry(content_hash(key, 64), 'openai', 'loopback', {'messages': [{'role': 'user', 'content': f'{key}題'}]}, '好' * 200, '{"raw": 1}' * 50)
    rounds = max(1, calls // size // threads)
    batches = [[[entry_row(entry((number, turn, place))) for place in range(size)] for turn in range(rounds)] for number in range(threads)]
    crew = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    seconds = timed(lambda: [[one.start() for one in crew], [one.join() for one in crew]])
    print(f'\nThe office looks up, claims and keeps {rounds * size * threads / seconds:,.0f} calls a second ({threads} callers, batches of {size}).', flush=True)


def weigh(rows):
    "Do what a cheap stage does to a shard; give ids and this worker's peak memory in MB."
    import resource
    return [(content_hash(row, 16), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) for row in rows]


def working(nodes, workers, store=''):
    "Work as a stage does that was started with so many workers; 0 for none but this process."
    engine = {'name': 'ray', 'address': nodes.address, 'workers': workers} if workers else {}
    return environment(KYARA_ENGINE=json.dumps(read_engine({**engine, 'store': str(store)})))


def memory(nodes, most):
    "Peak memory of the largest worker and of this process, for ever more rows."
    print('\n| rows | largest worker, MB | this process, MB | seconds |\n|---|---|---|---|')
    import resource
    for count in [size for size in (10_000, 100_000, 1_000_000) if size <= most]:
        rows = ({'text': f'第{number}列' * 20} for number in range(count))
        before, done, peak = time.perf_counter(), 0, 0.0
        with working(nodes, 2):
            for _, megabytes in over_shards(weigh, rows, size=1000): done, peak = done + 1, max(peak, megabytes)
        assert done == count
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f'| {count:,} | {peak:.0f} | {own:.0f} | {time.perf_counter() - before:.0f} |', flush=True)


def solved(count):
    "Make problems with three solutions each, as the offline teachers write them."
    from kyara.families import MATH_FAMILIES, solve_problem, write_problem
    for number in range(count):
        family = MATH_FAMILIES[number % len(MATH_FAMILIES)]
        problem, _ = write_problem(f'第{number}位居民', family.name, family.difficulty, number)
        text, answer = solve_problem(problem) or ('', None)
        solutions = [{'text': f'{text}\n答案：{answer}', 'answer': answer, 'model': 'offline', 'call_id': str(turn)} for turn in range(3)]
        yield {'problem': problem, 'solutions': solutions}


def shards(folder, nodes, count):
    "Problems a second that the mathematics weighs, here and on workers, and again from the store."
    from kyara.evidence import weigh_problems
    problems, results = list(solved(count)), []
    work = functools.partial(weigh_problems, min_agreement=0.6, max_pairs=1)
    with working(nodes, 4): list(over_shards(work, problems[:256], size=16)) # Workers import what it takes
    print(f'\n| engine | seconds for {count:,} problems | problems a second |\n|---|---|---|')
    for workers, store in ((0, ''), (1, ''), (2, ''), (4, ''), (2, folder / 'store'), (2, folder / 'store')):
        with working(nodes, workers, store): seconds = timed(lambda: results.append(list(over_shards(work, problems, size=64))))
        kept = f', {"kept" if len(results) == 5 else "taken from the store"}' if store else ''
        print(f'| {f"Ray, workers: {workers}" if workers else "local"}{kept} | {seconds:.1f} | {count / seconds:,.0f} |', flush=True)
    assert all(result == results[0] for result in results)
    print('The same results each time;', *(f'{row["shards"]} shards, {row["bytes"]:,} bytes kept' for row in shard_table(Store(str(folder / 'store')))))


def kill(folder, nodes, calls):
    "Kill a node with SIGKILL in the middle; a call is in flight until the office has kept its reply."
    victim, got, alone = nodes.add(), [], []
    nodes.warm(victim, 5)
    with serve(latency=0.05) as server:
        common = dict(engine=RayEngine(5), ledger=folder / 'kill.sqlite', shard_size=500)
        with nodes.killing(victim, server, calls // 3) as killed:
            seconds = timed(lambda: ask_in_shards(requests(calls, '殺'), settings(server), got.append, **common))
        stats = server.stats()
        ask_each(requests(calls, '殺'), settings(server), alone.append, ledger=folder / 'alone.sqlite')
    same = [(a.call_id, a.text, a.finish_reason) for a in got] == [(b.call_id, b.text, b.finish_reason) for b in alone]
    asked, answered = (sum(count - 1 for count in counts.values()) for counts in (stats.calls, stats.whole))
    share = 64 // 5
    print(f'\nA node killed after {killed[0]:,} of {calls:,} replies: {len(got):,} rows, '
          f'{"the same as" if same else "OTHER THAN"} the local run; {seconds:.0f} s. In flight on it, and so asked twice, were {asked} calls '
          f'(at most {share} under way and {share // 4} beside them may be): {stats.cut} that the server saw end unanswered, and {answered} '
          'answered, so paid twice: to a node that was dead by then, or before the office had kept the reply.', flush=True)


PARTS = ['speed', 'ceiling', 'memory', 'kill', 'shards']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--calls', type=int, default=4000)
    parser.add_argument('--killed', type=int, default=20_000, help='calls of the run that loses a node')
    parser.add_argument('--problems', type=int, default=4000, help='problems that are weighed by shards')
    parser.add_argument('--rows', type=int, default=1_000_000, help='rows of the largest stage')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_nodes(Path(folder), others=1, cpus=3) as nodes:
        folder = Path(folder)
        if 'ceiling' in arguments.only: ceiling(folder, 20_000)
        if 'speed' in arguments.only: speed(folder, arguments.calls)
        if 'memory' in arguments.only: memory(nodes, arguments.rows)
        if 'shards' in arguments.only: shards(folder, nodes, arguments.problems)
        if 'kill' in arguments.only: kill(folder, nodes, arguments.killed)


if __name__ == '__main__': main()
