"How fast pairs are mixed and in how much memory, and what generating SPIN's answers in batches saves."
import argparse, random, resource, tempfile, time
from pathlib import Path

from kyara.core import Spool, read_rows, resolve_path
from kyara.mixture import item_indexes, mix_pairs, pair_statistics, write_split
from kyara.pairs import adapt_pair

def public_rows(count, seed=0):
    "Make rows of UltraFeedback's layout from pieces of the sample corpus."
    text = ''.join(row['text'] for row in read_rows(resolve_path('sample:corpus'), 'document'))
    draw = random.Random(seed)
    piece = lambda length: text[(start := draw.randrange(len(text) - length)):start + length]
    for number in range(count):
        yield {'instruction': f'{number}：{piece(60)}', 'chosen_response': piece(400), 'rejected_response': piece(350),
               'chosen_avg_rating': 4.5, 'rejected_avg_rating': 3.0}

def mix(count, items):
    "Mix, split and describe pairs."
    indexes, dropped, started = item_indexes(items), Spool(), time.process_time()
    kept = mix_pairs((adapt_pair(row, 'x/ultra') for row in public_rows(count)), dropped, indexes, {'public:x/ultra': 0.8})
    mixed = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder: sides = write_split(kept, 1000, folder)
    pair_statistics(kept)
    spent, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'{count:,} pairs: {sides[0]:,} kept, {sides[1]:,} held out; mixed at {count / mixed:,.0f} a second of processor time, '
          f'all at {count / spent:,.0f}; peak {peak:,.0f} MB', flush=True)

def spin(count, sizes=(1, 16, 64)):
    "Answer prompts with a tiny untrained model, in batches of several sizes."
    from kyara.core import dialogue
    from kyara.llm import Client
    from kyara.preference import spin_pairs
    from kyara.sft import make_student
    rows = [dialogue([{'role': 'user', 'content': row['instruction'][:40]}, {'role': 'assistant', 'content': row['chosen_response'][:60]}], 'public')
            for row in public_rows(count)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_student((turn['content'] for row in rows for turn in row['messages']), Path(folder) / 'student', vocab_size=1500)
        for size in sizes:
            client = Client(str(model), ':memory:', concurrency=size)
            spin_pairs(rows[:2], client, max_tokens=4) # Loads the model
            started = time.perf_counter()
            spin_pairs(rows, client, max_tokens=48)
            print(f'batches of {size}: {count / (time.perf_counter() - started):,.1f} answers a second', flush=True)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', type=int, nargs='+', default=[10_000, 30_000])
    parser.add_argument('--items', nargs='*', default=['tests/data/math_held_out.jsonl'], help='evaluation items to look for')
    parser.add_argument('--answers', type=int, default=128)
    arguments = parser.parse_args()
    for number in arguments.pairs: mix(number, arguments.items)
    if arguments.answers: spin(arguments.answers)
