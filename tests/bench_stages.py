"""What so many rows take of a stage's memory: `python tests/bench_stages.py [10000 100000] [--only base preference]`.

One line for each stage and number of rows, each in a process of its own: seconds of the processor, the highest memory, what it was before
the stage, and the difference in bytes a row. A stage over a million rows should stay under 2 GB. Not part of the tests.

`base` sends short rows through the base stage, `candidates` ranks and selects rows for the curated set and does nothing else, `math` and
`synthesis` make rows with the offline teacher. `curation`, `preference` and `evaluation` are the cells of their notebooks, from the parameters
to the end: rows tagged, scored and rewritten; pairs of all four origins, each prompt paid for in the ledger; half as many items answered by
two models. All of them read files, and write what the stage writes.
"""
import argparse, gzip, importlib, itertools, json, os, random, resource, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRCD = ROOT.parent / 'shared/data/drcd/DRCD_dev.json.gz'

def write_lines(path: Path, rows) -> str: # The path
    "Write rows one by one."
    with open(path, 'w', encoding='utf-8') as file:
        for row in rows: file.write(json.dumps(row, ensure_ascii=False) + '\n')
    return str(path)

def short_sentences() -> list[str]:
    "Give DRCD's sentences of less than 60 characters."
    from kyara.corpus import read_documents
    from kyara.zh import split_sentences
    texts = [document['text'] for document, _ in read_documents(DRCD) if document]
    return [text[start:end] for text in texts for start, end in split_sentences(text) if 8 < end - start < 60]

def write_short_rows(count: int, folder: Path) -> list[str]: # Paths of rows and of held-out items
    "Write rows of two sentences, a tenth of them repeats, and DRCD's questions."
    drawn, sentences = random.Random(1), short_sentences()
    def rows():
        for number in range(count):
            if number % 10 == 9: row = {**row, 'output': row['output'] + '這件事很多人都知道。'}
            else:
                first, second = drawn.sample(sentences, 2)
                row = {'instruction': f'請介紹{first[:6]}。', 'output': first + second}
            yield row
    articles = json.loads(gzip.decompress(DRCD.read_bytes()))['data']
    asked = (question for article in articles for paragraph in article['paragraphs'] for question in paragraph['qas'])
    items = ({'id': question['id'], 'question': question['question']} for question in asked)
    return [write_lines(folder / 'rows.jsonl', rows()), write_lines(folder / 'items.jsonl', items)]

def problems(start: int, count: int):
    "Give so many different sums and their results."
    for number in range(start, start + count):
        first, second = 2 + number % 9973, 3 + number // 9973
        yield f'小美有{first}顆芭樂，又買了{second}顆，現在共有幾顆？', first, second

def solved(start: int, count: int):
    "Give sums as dialogue rows."
    for question, first, second in problems(start, count):
        answer = f'{first} + {second} = {first + second}\n答案：{first + second}'
        turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        yield {'id': f'{start:x}-{first:x}-{second:x}', 'messages': turns, 'task': 'math', 'meta': {'stage': 'math', 'license': 'CC0-1.0', 'lang': 'zh-TW'}}

def run_cells(notebook: str, module: str, **given) -> dict: # Names and values as the last cell leaves them
    "Run a stage notebook's cells here, from its parameters on, with some of them replaced."
    cells = json.loads((ROOT / 'nbs' / f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    start = next(place for place, cell in enumerate(cells) if 'parameters' in cell['metadata'].get('tags', []))
    names = {**vars(importlib.import_module('kyara.core')), **vars(importlib.import_module(module)), 'display': lambda *_: None}
    exec(''.join(cells[start]['source']), names)
    unknown = given.keys() - names.keys()
    assert not unknown, unknown
    names.update(given)
    for cell in cells[start + 1:]:
        if cell['cell_type'] == 'code': exec(''.join(cell['source']), names)
    return names

def begin() -> tuple[int, float]: # Highest memory and time of the processor so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()

def told(name: str, count: int, begun: tuple[int, float], found: dict) -> str: # A line
    "Say what a stage took since `begin`."
    (before, worked), (peak, ended) = begun, begin()
    return (f'{count:>7}  {name}: {ended - worked:.0f} s of a processor, peak {peak / 1024:.0f} MB (before {before / 1024:.0f}): '
            f'{1024 * (peak - before) / count:.0f} bytes a row; {json.dumps(found, ensure_ascii=False)}')

# Stages: each is given a number of rows and an empty folder

def measure_base(count: int, folder: Path) -> str:
    "Send short rows through the whole base stage."
    from kyara.base import describe_rows, make_base
    from kyara.core import read_rows
    rows, items = write_short_rows(count, folder)
    begun = begin()
    counts = make_base(folder / 'base', [rows], weights={}, caps={}, licenses={}, held_out=[items], limits={}, simplified='drop',
                       near_threshold=0.55, semantic_threshold=0.95, embedding='', seed=0)
    statistics = describe_rows(read_rows(folder / 'base'))
    return told('base', count, begun, {**counts, 'characters a row': round(statistics['tokens'] / statistics['dialogues'])})

def measure_candidates(count: int, folder: Path) -> str:
    "Rank and select scored rows that are made as they are read."
    from kyara.curation import place_candidates, read_candidates, select
    drawn, words = random.Random(0), [f'{chr(0x4E00 + number)}{chr(0x5E00 + number)}' for number in range(2000)]
    def make():
        for _ in range(count):
            tags = [words[int(drawn.triangular(0, 2000, 0))] for _ in range(drawn.randint(2, 5))]
            meta = {'tags': tags, 'score_judge': drawn.randint(1, 10), 'score_reward': drawn.random(), 'details': json.dumps({'style': drawn.choice([1.0, 0.75])})}
            turns = [{'role': 'user', 'content': '問' * 40}, {'role': 'assistant', 'content': '答' * drawn.randint(20, 300)}]
            yield {'id': f'{drawn.getrandbits(64):016x}', 'messages': turns, 'task': drawn.choice(['knowledge_qa', 'math', 'public']), 'meta': meta}
    begun = begin()
    candidates = read_candidates(make())
    place_candidates(candidates)
    selected = sum(not reason for reason, _ in select(candidates, max_rows=count // 7))
    return told('candidates', count, begun, {'selected': selected})

def measure_curation(count: int, folder: Path) -> str:
    "Tag, score, select and rewrite rows of three tasks; a seventh is kept, as of Kyara's base set."
    drawn, sentences, tasks = random.Random(0), short_sentences(), ('knowledge_qa', 'rag_answer', 'public')
    def rows():
        for number in range(count):
            first, *others = drawn.sample(sentences, 1 + drawn.randint(1, 4))
            turns = [{'role': 'user', 'content': f'請介紹{first[:12]}（{number}）。'}, {'role': 'assistant', 'content': ''.join(others)}]
            yield {'id': f'{number:016x}', 'messages': turns, 'task': tasks[number % 3], 'meta': {'stage': 'base', 'license': 'CC0-1.0', 'lang': 'zh-TW'}}
    path = write_lines(folder / 'rows.jsonl', rows())
    begun = begin()
    names = run_cells('14_curation', 'kyara.curation', sources=[path], max_rows=count // 7, quotas={}, group_share=0.8,
                      out_dir=str(folder / 'curation'), ledger=str(folder / 'ledger.sqlite'))
    return told('curation', count, begun, names['counts'])

def measure_math(count: int, folder: Path) -> str:
    "Make so many problems of mathematics."
    from kyara.ledger import Ledger
    from kyara.llm import Client
    from kyara.mathgen import make_math
    personas = [{'persona': f'住在第{number}戶、喜歡散步的退休老師', 'source': 'bench', 'license': 'CC0-1.0'} for number in range(max(1, count // 5))]
    begun = begin()
    teacher = Client('offline', Ledger(folder / 'ledger.sqlite'), stage='math')
    _, funnel = make_math(personas, teacher, [teacher], teacher, teacher, held_out=10, samples=1, routes=['majority', 'equations'], run_programs='never',
                          min_agreement=0.6, max_pairs=1, seed=0, max_problems=count, kinds=[], difficulty={'簡單': 2, '中等': 2, '困難': 1},
                          evolve=0.0, max_similarity=0.75, shard_size=10_000)
    return told('math', count, begun, funnel)

def measure_synthesis(count: int, folder: Path) -> str:
    "Make rows from so many passages, each about something else, so that no question comes twice."
    from kyara import synthesis
    from kyara.core import content_hash
    from kyara.corpus import read_documents
    from kyara.index import KnowledgeBase
    from kyara.ledger import Ledger
    from kyara.llm import Client
    kb = KnowledgeBase.build(document for document, _ in read_documents(DRCD, 200) if document)
    known, drawn, sentences = next(iter(kb.chunks())), random.Random(0), short_sentences()
    def passages():
        for number in range(count):
            name = ''.join(chr(0x4E00 + number // 97 ** place % 97 * 53) for place in range(4)) + '館'
            facts = [f'{name}位於臺南市。', f'{name}在{1600 + number % 400}年完工。', f'{name}的面積約為{10 + number % 9000}公頃。']
            yield {**known, 'id': content_hash(number), 'title': name, 'text': ''.join(facts + drawn.sample(sentences, 3))}
    settings = dict(questions_per_chunk=3, evolve_share=0.0, query_count=1, k=1, back_translation_share=0.1, rag_share=0.25, refusal_share=0.1, system_share=0.15,
                    quality_threshold=4)
    tables, synthesise = [], synthesis.synthesise
    synthesis.synthesise = lambda *given, seen, **more: tables.append(seen) or synthesise(*given, seen=seen, **more)
    begun, written = begin(), Counter()
    teacher = Client('offline', Ledger(folder / 'ledger.sqlite'), stage='synthesis')
    for number, made in enumerate(synthesis.synthesise_shards(passages(), kb, teacher, 0, 1000, 0, **settings)):
        written.update(synthesis.write_part(made, folder, number))
    return told('synthesis', count, begun, {**written, 'questions': len(tables[-1])})

def measure_preference(count: int, folder: Path) -> str:
    "Make one set of pairs of all origins: three tenths outcomes, a quarter SPIN, a twentieth RLAIF, the rest public."
    drawn, sentences = random.Random(0), short_sentences()
    spin, asked, outcomes = count // 4, count // 20, 3 * count // 10
    def outcome_pairs():
        for row, (question, first, second) in zip(solved(0, outcomes), problems(0, outcomes)):
            wrong = f'{first} + {second} = {first + second + 1}\n答案：{first + second + 1}'
            yield {'id': row['id'], 'prompt': row['messages'][:1], 'chosen': row['messages'][1:], 'rejected': [{'role': 'assistant', 'content': wrong}],
                   'origin': 'math_outcome', 'meta': row['meta']}
    def public_pairs():
        for number in range(count - spin - asked - outcomes):
            first, *others = drawn.sample(sentences, 6)
            yield {'prompt': f'請介紹{first[:6]}（{number}）。', 'chosen': ''.join(others[:3]), 'rejected': ''.join(others[3:]),
                   'chosen-rating': drawn.randint(3, 5), 'rejected-rating': drawn.randint(1, 2)}
    write = lambda name, rows: write_lines(folder / f'{name}.jsonl', rows)
    given = dict(sources=[write('curated', solved(outcomes, spin))], prompts=[write('prompts', solved(outcomes + spin, asked))],
                 outcomes=[write('outcomes', outcome_pairs())], public=[write('public', public_pairs())])
    begun = begin()
    names = run_cells('16_preference', 'kyara.preference', **given, model='offline-careless', pool=['offline', 'offline-brief', 'offline-careless'],
                      calibration=[str(ROOT / 'tests/data/known_pairs.jsonl')], held_out_items=[str(ROOT / 'tests/data/base_held_out.jsonl')],
                      max_spin=spin, max_prompts=asked, max_outcomes=outcomes, out_dir=str(folder / 'preference'), ledger=str(folder / 'ledger.sqlite'))
    return told('preference', count, begun, {**names['counts'], **{origin: found['pairs'] for origin, found in names['statistics']['origins'].items()}})

def measure_evaluation(count: int, folder: Path) -> str:
    "Have two models answer half as many items: so many transcripts, their scores and differences."
    items = write_lines(folder / 'items.jsonl', solved(0, count // 2))
    begun = begin()
    names = run_cells('18_evaluation', 'kyara.evaluate', models={'careful': 'offline', 'careless': 'offline-careless'}, benchmarks={'math-held-out': items},
                      out_dir=str(folder / 'evaluation'), ledger=str(folder / 'ledger.sqlite'))
    return told('evaluation', count, begun, {**names['counts'], **{model: own['math-held-out']['score'] for model, own in names['scores'].items()}})

STAGES = {'base': measure_base, 'candidates': measure_candidates, 'curation': measure_curation, 'math': measure_math, 'synthesis': measure_synthesis,
          'preference': measure_preference, 'evaluation': measure_evaluation}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('counts', nargs='*', type=int, default=[10_000, 100_000])
    parser.add_argument('--only', nargs='+', choices=STAGES, default=list(STAGES))
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        os.environ |= {'KYARA_SETTINGS': str(ROOT / 'settings.ini'), 'MPLBACKEND': 'agg'}
        with tempfile.TemporaryDirectory() as folder: return print(STAGES[arguments.only[0]](arguments.counts[0], Path(folder)), flush=True)
    for count, name in itertools.product(arguments.counts, arguments.only):
        subprocess.run([sys.executable, __file__, str(count), '--only', name, '--child'], check=True)

if __name__ == '__main__': main()
