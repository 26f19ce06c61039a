"""How fast the ledger is, and whether it stays so: python tests/bench_ledger.py --entries 1000000

Writes small entries in batches, and looks random ones up while the ledger grows. The folder is removed at the end."""
import argparse, random, resource, sys, tempfile, time
from pathlib import Path

from kyara.core import content_hash
from kyara.ledger import Entry, Ledger

def call_id(number): return content_hash(number, 64)

def entry(number):
    "Make a small entry: about 300 bytes."
    request = {'messages': [{'role': 'user', 'content': f'玉山和第{number}高的山差多少公尺？'}], 'temperature': 0.0}
    raw = f'{{"choices":[{{"message":{{"content":"差{number}公尺。"}}}}]}}'
    return Entry(call_id(number), 'openai', 'qwen3-32b', request, f'差{number}公尺。', raw, input_tokens=20, output_tokens=5,
                 latency=0.2, cost=1e-6, time=time.time(), stage='synthesis', run='bench')

def fill(ledger, first, last, size):
    "Write entries; give seconds and CPU seconds of the writing alone."
    seconds = cpu = 0
    for start in range(first, last, size):
        entries = [entry(number) for number in range(start, min(start + size, last))]
        before, cpu_before = time.perf_counter(), time.process_time()
        ledger.put_many(entries)
        seconds, cpu = seconds + time.perf_counter() - before, cpu + time.process_time() - cpu_before
    return seconds, cpu

def lookups(ledger, first, last, whole, count=20_000, size=100):
    "Look random entries up, a hundred at a time; give lookups a second and how many were there."
    ids = [call_id(random.randrange(first, last)) for _ in range(count)]
    before, found = time.perf_counter(), 0
    for start in range(0, count, size): found += len(ledger.get_many(ids[start:start + size], whole))
    return count / (time.perf_counter() - before), found

def report(ledger, done, line):
    "Print one line of figures."
    hits, found = lookups(ledger, 0, done, whole=False)
    whole, _ = lookups(ledger, 0, done, whole=True)
    misses, none = lookups(ledger, 10**9, 2 * 10**9, whole=False)
    assert found > 19_000 and none == 0, (found, none)
    files = [path.stat().st_size for path in ledger.path.parent.glob(f'{ledger.path.name}*')]
    size, rss = sum(files) / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rss /= 2**20 if sys.platform == 'darwin' else 2**10
    print(f'{done:>11,} {line} {hits:>9,.0f} {whole:>9,.0f} {misses:>9,.0f} {size:>8,.0f} {rss:>8,.0f}', flush=True)

def run(folder, size, steps):
    "Let one ledger grow."
    print(f'\nbatches of {size:,}\n    entries  written/s  µs CPU      hits  hits+raw    misses  disk MB  peak MB')
    with Ledger(folder / f'{size}.sqlite') as ledger:
        done = 0
        for step in steps:
            seconds, cpu = fill(ledger, done, step, size)
            report(ledger, step, f'{(step - done) / seconds:>10,.0f} {cpu / (step - done) * 1e6:>7.1f}')
            done = step

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--entries', type=int, default=1_000_000, help='size of the largest ledger')
    parser.add_argument('--batch', type=int, nargs='+', default=[1000, 128], help='entries a commit')
    parser.add_argument('--folder', default=tempfile.gettempdir(), help='where the ledgers are made and removed again')
    arguments = parser.parse_args()
    steps = sorted({step for step in (10_000, 100_000, 1_000_000, 3_000_000) if step < arguments.entries} | {arguments.entries})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for size in arguments.batch: run(Path(folder), size, steps)

if __name__ == '__main__': main()
