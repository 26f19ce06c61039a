"""How fast, how large, how good: `python tests/bench_index.py [1000 10000 100000]`.

Passages are recombined from the sentences of ../shared/data, so that they are as varied as one likes, and lie in a file that
all contestants read. Each indexes them in a process of its own, so that its memory is its own; "beside" is the peak of the
largest process that it started, of which two run on two cores. Before that it indexes a hundred, so that imports and compilers
are not timed. Queries of the knowledge base and of the bare engine alternate in one process, block by block, and the best of
three rounds counts, because other work on the machine hits both.
Not part of the tests; `pip install bm25s numba tantivy` for the other contestants, which are left out where the Python that
runs this has them not.
"""
import argparse, gzip, importlib.util, json, random, resource, subprocess, sys, tempfile, time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import orjson

DATA = Path(__file__).parents[2] / 'shared/data'
DRCD = DATA / 'drcd/DRCD_dev.json.gz'
K, SINGLE, PATIENCE = 10, 300, 30 # Passages wanted; questions asked one by one, and for how many seconds at most

def read_paragraphs() -> list[dict]: # As documents
    "Read DRCD's paragraphs."
    articles = json.loads(gzip.decompress(DRCD.read_bytes()))['data']
    return [{'doc_id': paragraph['id'], 'title': article['title'], 'text': paragraph['context'], 'source': 'drcd'}
            for article in articles for paragraph in article['paragraphs']]

def read_questions() -> list[tuple[str, str]]: # Each with its paragraph's id
    "Read DRCD's questions."
    from kyara.index import squad_questions
    return squad_questions(DRCD)

def make_passages(
    count: int, # How many
) -> Iterator[dict]: # Documents of about 370 characters
    "Recombine sentences; a thousand are DRCD's own paragraphs."
    paragraphs = read_paragraphs()
    if count == 1000: return iter(paragraphs)
    references = [json.loads(line)['reference'] for line in gzip.open(DATA / 'alignbench/data_v1.1_release.jsonl.gz', 'rt')]
    return _recombine(paragraphs, references, count)

def _recombine(paragraphs, references, count):
    from kyara.zh import split_sentences
    texts = [paragraph['text'] for paragraph in paragraphs] + references
    sentences = [text[start:end] for text in texts for start, end in split_sentences(text)]
    drawn = random.Random(0)
    for number in range(count):
        text = ''
        while len(text) < 340: text += drawn.choice(sentences)
        title = drawn.choice(paragraphs)['title']
        yield {'doc_id': f'd{number}', 'title': title, 'text': text[:450], 'source': 'drcd'}

def seconds(work: Callable) -> float:
    "Time one call."
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

def read_passages(
    path: Path, # As `main` wrote it
) -> Iterator[dict]: # Documents
    "Read passages from a file."
    with open(path, 'rb') as lines: yield from map(orjson.loads, lines)

# Contestants: each indexes `passages` into `folder` and gives a function from questions to lists of doc_ids

def index_kyara(passages, folder):
    from kyara.index import KnowledgeBase
    kb = KnowledgeBase.build(passages, folder, chunk=False)
    return kb, lambda questions: [[hit.doc_id for hit in hits] for hits in kb.search(questions, k=K)]

def index_engine(passages, folder):
    "The bare engine on ready vectors of all pairs; making these is not timed."
    from kyara.core import batched
    shard, spent = open_shard(folder / 'shard', new=True), 0.0
    for number, batch in enumerate(batched(passages, 500)):
        vectors = ready_vectors([row['text'] for row in batch])
        spent += seconds(lambda: put_points(shard, number * 500, vectors, batch))
    spent += seconds(lambda: (shard.optimize(), shard.flush()))
    return spent, lambda questions: [[hit.payload['doc_id'] for hit in hits]
                                     for hits in ask_engine(shard, ready_vectors(questions))]

def open_shard(path, new=False):
    import qdrant_edge as edge
    if not new: return edge.EdgeShard.load(str(path))
    path.mkdir(parents=True)
    sparse = {'lexical': edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)}
    return edge.EdgeShard.create(str(path), edge.EdgeConfig(sparse_vectors=sparse))

def ready_vectors(texts):
    import qdrant_edge as edge
    from kyara.terms import passage_vectors
    return [edge.SparseVector(*vector) for vector in passage_vectors([''] * len(texts), texts, 350.0)]

def put_points(shard, first, vectors, rows):
    import qdrant_edge as edge
    points = [edge.Point(number, {'lexical': vector}, row) for number, (vector, row) in enumerate(zip(vectors, rows), first)]
    shard.update(edge.UpdateOperation.upsert_points(points))

def ask_engine(shard, vectors, single=False):
    import qdrant_edge as edge
    requests = [edge.QueryRequest(limit=K, with_payload=True, query=edge.Query.Nearest(vector, using='lexical')) for vector in vectors]
    return list(map(shard.query, requests)) if single else shard.query_batch(edge.QueryBatchRequest(requests))

def index_bm25s(passages, folder):
    import bm25s
    ids, terms, known = [], [], {}
    for row in passages:
        ids.append(row['doc_id'])
        terms.append([known.setdefault(term, len(known)) for term in pairs_of(f"{row['title']} {row['text']}")])
    index = bm25s.BM25(k1=0.9, b=0.75, backend='numba' if importlib.util.find_spec('numba') else 'numpy')
    index.index(bm25s.tokenization.Tokenized(ids=terms, vocab=known), show_progress=False)
    def search(questions):
        asked = [[known[term] for term in pairs_of(question) if term in known] or [0] for question in questions]
        found = index.retrieve(asked, k=K, show_progress=False, n_threads=min(2, len(asked))) # Numbers, for with words it reads all it knows
        return [[ids[number] for number in row] for row in found.documents]
    return index, search

def pairs_of(text):
    from kyara.zh import tokens
    return [term for term in tokens(text) if len(term) > 1]

def index_tantivy(passages, folder):
    import tantivy
    schema = tantivy.SchemaBuilder().add_text_field('doc_id', stored=True, tokenizer_name='raw')
    schema = schema.add_text_field('body', stored=False, tokenizer_name='whitespace').build()
    folder.mkdir(parents=True)
    index = tantivy.Index(schema, str(folder))
    writer = index.writer(heap_size=128 << 20, num_threads=2)
    for row in passages:
        body = ' '.join(pairs_of(f"{row['title']} {row['text']}"))
        writer.add_document(tantivy.Document(doc_id=row['doc_id'], body=body))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()
    def search(questions):
        asked = [tantivy.Query.boolean_query([(tantivy.Occur.Should, tantivy.Query.term_query(schema, 'body', term))
                                              for term in dict.fromkeys(pairs_of(question))]) for question in questions]
        return [[searcher.doc(address)['doc_id'][0] for _, address in searcher.search(query, K).hits] for query in asked]
    return searcher, search

def index_local(passages, folder):
    "qdrant-client's local mode, as on systems without the engine."
    import warnings
    import kyara.index
    warnings.simplefilter('ignore')
    kyara.collection.has_engine = lambda: False
    return index_kyara(passages, folder)

CONTESTANTS = {'kyara': index_kyara, 'qdrant-edge, bare': index_engine, 'bm25s': index_bm25s, 'tantivy': index_tantivy,
               'local mode': index_local}

def measure(name, count, folder) -> dict:
    "Index, and ask DRCD's questions; in a process of its own."
    file, got = folder.parent / 'passages.jsonl', []
    CONTESTANTS[name](islice(read_passages(file), 100), folder.parent / 'first' / name)[1](['玉山'])
    spent = seconds(lambda: got.append(CONTESTANTS[name](read_passages(file), folder)))
    first, search = got[0]
    questions = read_questions() if count == 1000 else read_questions()[::4]
    if name == 'local mode': questions = questions[::50]
    search([question for question, _ in questions[:5]])
    answers = []
    asking = seconds(lambda: answers.extend(search([question for question, _ in questions])))
    singly = ask_singly(search, [question for question, _ in questions[:SINGLE]])
    row = {'index': count / (first if isinstance(first, float) else spent), 'batched': len(questions) / asking,
           'single': len(singly) / sum(singly), 'asked': len(singly), 'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
           'beside': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}
    if count > 1000: return row
    ranks = [answer.index(gold) + 1 if gold in answer else 0 for answer, (_, gold) in zip(answers, questions)]
    return row | {'hit@1': ranks.count(1) / len(ranks), 'hit@10': sum(map(bool, ranks)) / len(ranks),
                  'mrr@10': sum(1 / rank for rank in ranks if rank) / len(ranks)}

def ask_singly(search, questions) -> list[float]: # Seconds of each
    "Ask one question after another, as long as patience lasts."
    spent = []
    while len(spent) < len(questions) and sum(spent) < PATIENCE: spent.append(seconds(lambda: search([questions[len(spent)]])))
    return spent

def compare(folder, count) -> str:
    "Let knowledge base and bare engine answer the same questions in turn."
    from kyara.index import KnowledgeBase
    opened = []
    opening = seconds(lambda: opened.append(KnowledgeBase.open(folder / 'kyara')))
    kb, shard = opened[0], open_shard(folder / 'qdrant-edge, bare' / 'shard')
    questions = [question for question, _ in read_questions()][::7]
    kb.search(questions[:1]), seconds(lambda: ready_vectors(questions[:1]))
    sums = {}
    for first in range(0, len(questions), 50):
        block = questions[first:first + 50]
        vectors = ready_vectors(block)
        ways = {'kyara single': lambda: [kb.search(question, k=K) for question in block],
                'bare single': lambda: ask_engine(shard, vectors, single=True),
                'kyara batched': lambda: kb.search(block, k=K), 'bare batched': lambda: ask_engine(shard, vectors)}
        best = {}
        for _ in range(3):
            for way, work in ways.items(): best[way] = min(best.get(way, 9.9), seconds(work))
        for way in ways: sums[way] = sums.get(way, 0.0) + best[way]
    rates = {way: len(questions) / spent for way, spent in sums.items()}
    return (f"{count:>7}  opening {opening:.2f} s; queries a second: " + ', '.join(f'{way} {rate:.0f}' for way, rate in rates.items())
            + f"; kyara / bare: single {rates['kyara single'] / rates['bare single']:.2f}, "
              f"batched {rates['kyara batched'] / rates['bare batched']:.2f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('counts', nargs='*', type=int, default=[1000, 10_000, 100_000])
    parser.add_argument('--only', nargs='*', default=list(CONTESTANTS))
    parser.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], arguments.counts[0], Path(arguments.child[1]))))
        return
    print(f"{'passages':>8}  {'contestant':18} {'indexed/s':>9} {'batched/s':>9} {'single/s':>9} {'peak MB':>8} {'beside':>6}  hit@1  hit@10 mrr@10")
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / 'passages.jsonl', 'wb') as file: file.writelines(orjson.dumps(row) + b'\n' for row in make_passages(count))
            for name in arguments.only: print_row(name, count, Path(folder) / name)
            if {'kyara', 'qdrant-edge, bare'} <= set(arguments.only):
                call = [sys.executable, '-c', 'import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); import bench_index; '
                        'print(bench_index.compare(Path(sys.argv[1]), int(sys.argv[2])))', folder, str(count), str(Path(__file__).parent)]
                print(subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip(), flush=True)

def print_row(name, count, folder):
    if name == 'local mode' and count > 1000: return
    missing = {'bm25s': 'bm25s', 'tantivy': 'tantivy'}.get(name)
    if missing and not importlib.util.find_spec(missing):
        print(f'{count:>8}  {name:18} left out: {sys.executable} has no {missing}')
        return
    call = [sys.executable, __file__, str(count), '--child', name, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    row = json.loads(done.stdout.splitlines()[-1])
    quality = ' '.join(f'{row[key]:.4f}' for key in ('hit@1', 'hit@10', 'mrr@10') if key in row)
    if row['asked'] < SINGLE: quality += f" ({row['asked']} asked singly)"
    print(f"{count:>8}  {name:18} {row['index']:9.0f} {row['batched']:9.0f} {row['single']:9.0f} {row['peak']:8.0f} {row['beside']:6.0f}  {quality}", flush=True)

if __name__ == '__main__': main()
