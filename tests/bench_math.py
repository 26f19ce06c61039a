"""Speed of kyara.answers and the sandbox: `python tests/bench_math.py`, best of five rounds on one core."""
import gzip, json, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from kyara.answers import final_answer, plain_answer, readings, same_answer
from test_math import DIFFERENT, GSM, SAME, needs_symbols


def best(work, rounds=5):
    "Give the shortest time of a few rounds, each with empty memory."
    times = []
    for _ in range(rounds):
        plain_answer.cache_clear(), readings.cache_clear()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(pairs):
    for a, b in pairs: same_answer(a, b)


def report(name, count, seconds): print(f'{name:58} {count / seconds:10,.0f} a second')


if __name__ == '__main__':
    table = [(a, b) for a, b, _ in SAME + DIFFERENT]
    ours = [pair for pair in table if not needs_symbols(*pair)]
    report(f'same_answer, {len(ours)} hard cases, nothing remembered', len(ours), best(lambda: compare(ours)))
    other = [pair for pair in table if needs_symbols(*pair)]
    same_answer(*other[0])
    report(f'same_answer, {len(other)} cases for the symbolic engine', len(other), best(lambda: compare(other), rounds=2))
    if GSM.is_dir():
        with gzip.open(GSM / 'gemma-2-2b-it.jsonl.gz', 'rt', encoding='utf-8') as lines: items = [json.loads(line) for line in lines]
        outputs = [item['output'] for item in items]
        report('final_answer, GSM8K outputs of gemma-2-2b-it', len(items), best(lambda: [final_answer(text) for text in outputs]))
        pairs = [(final_answer(item['output']) or '', item['answer'].replace('#', '')) for item in items]
        report('same_answer, GSM8K answers of gemma-2-2b-it', len(pairs), best(lambda: compare(pairs)))
    from kyara.confine import confinement, run_program
    if not confinement()[1]:
        report('run_program, one at a time', 10, best(lambda: [run_program('print(1)') for _ in range(10)], rounds=2))
