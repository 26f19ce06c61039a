"""How well and how fast near duplicates are found: `python tests/bench_base.py [10000 100000]`.

Dialogues are recombined from the sentences of ../shared/data/drcd; a thousand of them come again as planted repeats of each kind.
Every contestant works on the same rows in a process of its own, so that its memory is its own. Not part of the tests;
`pip install semhash` for that contestant, which is left out where it is missing. Its own models have to be fetched, so it is given
an encoder of hashed character 3-grams, and its column says how its search does, not its models.

`python tests/bench_base.py 1000000 --stage` sends so many short rows through the whole base stage, `--stage candidates` through the selection
of the curated set; `--stage math` and `--stage synthesis` make rows with the offline teacher. Beside the time on the clock
stands the time of the processor, which tells more where other work runs on the machine.
"""
import argparse, importlib.util, json, random, resource, subprocess, sys, tempfile, time
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

def write_short_rows(count: int, folder: Path) -> list[str]: # Paths of rows and of held-out items
    "Write rows of two sentences, a tenth of them repeats, and DRCD's questions."
    import gzip
    from kyara.corpus import read_documents
    from kyara.zh import split_sentences
    drawn = random.Random(1)
    texts = [document['text'] for document, _ in read_documents(DRCD) if document]
    sentences = [text[start:end] for text in texts for start, end in split_sentences(text) if 8 < end - start < 60]
    with open(folder / 'rows.jsonl', 'w', encoding='utf-8') as file:
        for number in range(count):
            if number % 10 == 9: row = {**row, 'output': row['output'] + '這件事很多人都知道。'}
            else:
                first, second = drawn.sample(sentences, 2)
                row = {'instruction': f'請介紹{first[:6]}。', 'output': first + second}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    articles = json.loads(gzip.decompress(DRCD.read_bytes()))['data']
    asked = [question for article in articles for paragraph in article['paragraphs'] for question in paragraph['qas']]
    lines = [json.dumps({'id': question['id'], 'question': question['question']}, ensure_ascii=False) for question in asked]
    (folder / 'items.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    return [str(folder / name) for name in ('rows.jsonl', 'items.jsonl')]

def measure_stage(count: int) -> str:
    "Send short rows through the whole base stage."
    from kyara.base import describe_rows, make_base
    from kyara.core import read_rows
    with tempfile.TemporaryDirectory() as folder:
        rows, items = write_short_rows(count, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started, worked = time.perf_counter(), time.process_time()
        counts = make_base(Path(folder, 'base'), [rows], weights={}, caps={}, licenses={}, held_out=[items], limits={}, simplified='drop',
                           near_threshold=0.55, semantic_threshold=0.95, embedding='', seed=0)
        statistics = describe_rows(read_rows(Path(folder, 'base')))
        spent, worked = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (f'{count:>7}  stage: {spent:.0f} s ({worked:.0f} s of a processor), {statistics["tokens"] / statistics["dialogues"]:.0f} characters a row, '
            f'peak {peak:.0f} MB (before {before:.0f}); {json.dumps(dict(counts.most_common()))}')

def measure_candidates(count: int) -> str:
    "Rank and select scored rows that are made as they are read: what they take in memory."
    from kyara.curation import place_candidates, read_candidates, select
    drawn, words = random.Random(0), [f'{chr(0x4E00 + number)}{chr(0x5E00 + number)}' for number in range(2000)]
    def make():
        for _ in range(count):
            tags = [words[int(drawn.triangular(0, 2000, 0))] for _ in range(drawn.randint(2, 5))]
            meta = {'tags': tags, 'score_judge': drawn.randint(1, 10), 'score_reward': drawn.random(), 'details': json.dumps({'style': drawn.choice([1.0, 0.75])})}
            turns = [{'role': 'user', 'content': '問' * 40}, {'role': 'assistant', 'content': '答' * drawn.randint(20, 300)}]
            yield {'id': f'{drawn.getrandbits(64):016x}', 'messages': turns, 'task': drawn.choice(['knowledge_qa', 'math', 'public']), 'meta': meta}
    before, worked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    candidates = read_candidates(make())
    place_candidates(candidates)
    selected = sum(not reason for reason, _ in select(candidates, max_rows=count // 7))
    return memory_line('candidates', count, before, worked, {'selected': selected})

def measure_math(count: int) -> str:
    "Make mathematics with the offline teacher: what so many problems take in memory."
    from kyara.ledger import Ledger
    from kyara.llm import Client
    from kyara.mathgen import make_math
    personas = [{'persona': f'住在第{number}戶、喜歡散步的退休老師', 'source': 'bench', 'license': 'CC0-1.0'} for number in range(max(1, count // 5))]
    before, worked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        teacher = Client('offline', Ledger(Path(folder, 'ledger.sqlite')), stage='math')
        _, funnel = make_math(personas, teacher, [teacher], teacher, teacher, held_out=10, samples=1, routes=['majority', 'equations'], run_programs='never',
                              min_agreement=0.6, max_pairs=1, seed=0, max_problems=count, kinds=[], difficulty={'簡單': 2, '中等': 2, '困難': 1},
                              evolve=0.0, max_similarity=0.75, shard_size=10_000)
    return memory_line('math', count, before, worked, funnel)

def measure_synthesis(count: int) -> str:
    "Make rows from so many passages with the offline teacher: what they take in memory."
    from kyara.core import content_hash
    from kyara.corpus import read_documents
    from kyara.index import KnowledgeBase
    from kyara.ledger import Ledger
    from kyara.llm import Client
    from kyara.synthesis import synthesise_shards, write_part
    from kyara.zh import split_sentences
    documents = [document for document, _ in read_documents(DRCD, 200) if document]
    kb = KnowledgeBase.build(documents)
    known, drawn = list(kb.chunks()), random.Random(0)
    sentences = [chunk['text'][start:end] for chunk in known for start, end in split_sentences(chunk['text']) if end - start > 8]
    chunks = ({**known[0], 'id': content_hash(number), 'text': ''.join(drawn.sample(sentences, 5))} for number in range(count))
    settings = dict(questions_per_chunk=3, evolve_share=0.0, query_count=1, k=1, back_translation_share=0.1, rag_share=0.25, refusal_share=0.1, system_share=0.15,
                    quality_threshold=4)
    before, worked, written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        teacher = Client('offline', Ledger(Path(folder, 'ledger.sqlite')), stage='synthesis')
        for number, made in enumerate(synthesise_shards(chunks, kb, teacher, 0, 1000, 0, **settings)): written.update(write_part(made, Path(folder), number))
    return memory_line('synthesis', count, before, worked, dict(written))

def memory_line(name: str, count: int, before: int, worked: float, told: dict) -> str:
    "Say what a stage took."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (f'{count:>7}  {name}: {time.process_time() - worked:.0f} s of a processor, peak {peak / 1024:.0f} MB (before {before / 1024:.0f}): '
            f'{1024 * (peak - before) / count:.0f} bytes a row; {json.dumps(told, ensure_ascii=False)}')

STAGES = {'base': measure_stage, 'candidates': measure_candidates, 'math': measure_math, 'synthesis': measure_synthesis}
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
    parser.add_argument('--stage', nargs='?', const='base', choices=STAGES)
    arguments = parser.parse_args()
    if arguments.stage: return print(STAGES[arguments.stage](arguments.counts[0]), flush=True)
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
