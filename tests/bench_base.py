"""How well and how fast near duplicates are found: `python tests/bench_base.py [10000 100000]`.

Dialogues are recombined from the sentences of ../shared/data/drcd; a thousand of them come again as planted repeats of each kind.
Every contestant works on the same rows in a process of its own, so that its memory is its own. Not part of the tests;
`pip install semhash` for that contestant, which is left out where it is missing. Its own models have to be fetched, so it is given
an encoder of hashed character 3-grams, and its column says how its search does, not its models.

Beside the time on the clock stands the time of the processor, which tells more where other work runs on the machine.
"""
import argparse, importlib.util, json, random, resource, subprocess, sys, time
from collections import Counter
from pathlib import Path

DRCD = Path(__file__).parents[2] / 'shared/data/drcd/DRCD_dev.json.gz'
PLANTED = 1000 # Of each kind
MUST = {'exact': 0.99, 'punctuation': 0.99, 'script': 0.99, 'changed 3 %': 0.99, 'reordered': 0.99, 'changed 8 %': 0.9, 'prefix': 0.0}

def change(text: str, share: float, drawn: random.Random, letters: str) -> str:
    "Replace a share of the characters."
    places = set(drawn.sample(range(len(text)), round(share * len(text))))
    return ''.join(drawn.choice(letters) if place in places else char for place, char in enumerate(text))

def vary(kind: str, sentences: list[str], drawn: random.Random, letters: str) -> str:
    "Make a repeat of a text."
    from kyara.zh import fold_script
    text = ''.join(sentences)
    if kind == 'exact': return text
    if kind == 'punctuation': return text.replace('，', ', ').replace('。', ' . ')
    if kind == 'script': return fold_script(text)
    if kind == 'reordered': return ''.join(drawn.sample(sentences, len(sentences)))
    if kind == 'prefix': return '好的，以下是為您整理的內容，希望對您有幫助：' + text
    return change(text, float(kind.split()[1]) / 100, drawn, letters)

def make_rows(count: int) -> tuple[list[dict], dict[str, str]]: # Dialogues; kind by the id of each planted repeat
    "Recombine sentences; repeats come last, mixed."
    from kyara.core import dialogue
    from kyara.corpus import read_documents
    from kyara.zh import split_sentences
    drawn = random.Random(0)
    texts = [document['text'] for document, _ in read_documents(DRCD) if document]
    sentences = [text[start:end] for text in texts for start, end in split_sentences(text) if end - start > 8]
    letters = ''.join(texts)
    def row(answer):
        return dialogue([{'role': 'user', 'content': '請介紹這件事。'}, {'role': 'assistant', 'content': answer}], 'public')
    originals = [drawn.sample(sentences, 8) for _ in range(count - PLANTED * len(MUST))]
    rows, kinds, again = [row(''.join(parts)) for parts in originals], {}, []
    for kind in MUST:
        for n in drawn.sample(range(len(originals)), PLANTED):
            again.append(row(vary(kind, originals[n], drawn, letters)))
            kinds[again[-1]['id']] = kind
    drawn.shuffle(again)
    return rows + again, kinds

# Contestants: each gives the ids of the rows that it drops

def near_kyara(rows):
    from kyara.base import drop_exact, drop_near
    return {row['id'] for row in drop_near(drop_exact(rows)) if 'drop_reason' in row}

def near_datasketch(rows):
    import zlib
    from datasketch import MinHash, MinHashLSH
    from kyara.base import compared_text
    index, gone = MinHashLSH(threshold=0.4, num_perm=128), set()
    signatures = {}
    for row in rows:
        text, signature = compared_text(row), MinHash(128, hashfunc=zlib.crc32)
        signature.update_batch([text[start:start + 3].encode() for start in range(len(text) - 2)])
        if any(signature.jaccard(signatures[other]) >= 0.55 for other in index.query(signature)): gone.add(row['id'])
        else:
            signatures[row['id']] = signature
            index.insert(row['id'], signature, check_duplication=False)
    return gone

def near_semhash(rows):
    from kyara.base import compared_text
    from semhash import SemHash
    import numpy as np
    class Grams: # Its models cannot be fetched everywhere; hashed character 3-grams stand in
        def encode(self, texts, **_):
            from kyara.near import hash_grams
            hashes, starts = hash_grams(list(texts))
            places = np.repeat(np.arange(len(texts)), np.diff(starts, append=len(hashes))) * 512 + (hashes >> 1) % 512
            return np.bincount(places, 1.0 - 2.0 * (hashes & 1), len(texts) * 512).reshape(-1, 512).astype(np.float32)
    records = [{'text': compared_text(row), 'number': number} for number, row in enumerate(rows)]
    result = SemHash.from_records(records, columns=['text'], model=Grams()).self_deduplicate(threshold=0.75)
    kept = {record['number'] for record in result.selected}
    return {row['id'] for number, row in enumerate(rows) if number not in kept}

def measure_contamination(count: int) -> str:
    "Look for ten thousand evaluation items in all rows: DRCD's questions, some with the beginning of a row."
    import gzip
    from kyara.base import ItemIndex, drop_contaminated
    rows, _ = make_rows(count)
    articles = json.loads(gzip.decompress(DRCD.read_bytes()))['data']
    asked = [question['question'] for article in articles for paragraph in article['paragraphs'] for question in paragraph['qas']]
    planted = [row['messages'][1]['content'][:80] for row in rows[:len(rows) // 20]]
    items = [(f'item{n}', asked[n % len(asked)] if n >= len(planted) else planted[n]) for n in range(10_000)]
    started, worked = time.perf_counter(), time.process_time()
    found = sum('drop_reason' in row for row in drop_contaminated(rows, ItemIndex(items)))
    return (f'{count:>7}  contamination: {time.perf_counter() - started:.1f} s ({time.process_time() - worked:.1f} s of a processor) '
            f'against {len(items)} items, {found} rows dropped; '
            f'{len(planted)} items were cut from rows; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB')

CONTESTANTS = {'kyara': near_kyara, 'datasketch': near_datasketch, 'semhash': near_semhash}

def measure(name: str, count: int) -> dict:
    "Let a contestant find the repeats; in a process of its own."
    rows, kinds = make_rows(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, worked = time.perf_counter(), time.process_time()
    gone = CONTESTANTS[name](rows)
    spent, worked = time.perf_counter() - started, time.process_time() - worked
    found = Counter(kinds[row] for row in gone if row in kinds)
    return {'rate': len(rows) / spent, 'cpu_rate': len(rows) / worked, 'before': before, 'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            'recall': {kind: found[kind] / PLANTED for kind in MUST}, 'precision': sum(row in kinds for row in gone) / max(1, len(gone))}

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('counts', nargs='*', type=int, default=[10_000, 100_000])
    parser.add_argument('--only', nargs='*', default=list(CONTESTANTS))
    parser.add_argument('--child', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == 'contamination': return print(measure_contamination(arguments.counts[0]))
    if arguments.child: return print(json.dumps(measure(arguments.child, arguments.counts[0])))
    print(f"{'rows':>7}  {'contestant':11} {'rows/s':>7} {'a CPU s':>7} {'peak MB':>8} (rows alone) {'precision':>9}  recall of {', '.join(MUST)}")
    for count in arguments.counts:
        for name in arguments.only:
            if name == 'semhash' and not importlib.util.find_spec('semhash'):
                print(f'{count:>7}  {name:11} left out: pip install semhash')
                continue
            done = subprocess.run([sys.executable, __file__, str(count), '--child', name], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{count:>7}  {name:11} {row['rate']:7.0f} {row['cpu_rate']:7.0f} {row['peak']:8.0f} {row['before']:12.0f} {row['precision']:9.4f}  "
                  + ' '.join(f'{share:.3f}' for share in row['recall'].values()), flush=True)
        subprocess.run([sys.executable, __file__, str(count), '--child', 'contamination'], check=True)

if __name__ == '__main__': main()
