"""How fast the linter is, and what it finds in text from Taiwan: python tests/bench_zh.py

Paragraphs from Taiwan (few findings), the labelled sentences (a finding each), and a Simplified text (a finding in every phrase)."""
import argparse, gzip, json, time
from collections import Counter
from pathlib import Path

from kyara.zh import findings_per_thousand, judge_findings, lint_taiwan, precision_recall

SHARED, LABELLED = Path(__file__).parents[2] / 'shared' / 'data', Path(__file__).parent / 'data'

def labelled(name):
    "Read labelled sentences."
    return [json.loads(line) for line in (LABELLED / f'lint_{name}.jsonl').read_text(encoding='utf-8').splitlines()]

def paragraphs():
    "Read paragraphs that were published in Taiwan."
    data = json.loads(gzip.decompress((SHARED / 'drcd' / 'DRCD_dev.json.gz').read_bytes()))['data']
    return [paragraph['context'] for article in data for paragraph in article['paragraphs']]

def texts():
    "Give each kind of text, as a list of strings."
    yield 'labelled sentences', [row['text'] for name in ('tuned', 'held_out') for row in labelled(name)] * 10
    if not SHARED.exists(): return
    yield 'paragraphs from Taiwan', paragraphs()
    yield 'Simplified text', [gzip.decompress((SHARED / 'opencc' / 'us_constitution_zhs.txt.gz').read_bytes()).decode()] * 20

def speed(strings, repeat):
    "Give megabytes of UTF-8 a second, the best of several rounds."
    size, best = sum(len(text.encode()) for text in strings) / 1e6, 0
    for _ in range(repeat):
        started = time.process_time()
        for text in strings: lint_taiwan(text)
        best = max(best, size / (time.process_time() - started))
    return size, best

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeat', type=int, default=3)
    started = time.process_time()
    lint_taiwan('这个软件的质量')
    print(f'first call: {time.process_time() - started:.2f} s of CPU')
    for name, strings in texts():
        size, best = speed(strings, parser.parse_args().repeat)
        rate = findings_per_thousand(strings)['all']
        print(f'{name:24}{size:6.2f} MB {best:6.2f} MB/s {rate:8.2f} findings in a thousand characters')
    for name in ('tuned', 'held_out'):
        for written in ('before the rules', 'after the rules'):
            counts = judge_findings(row for row in labelled(name) if row['written'] == written)['all']
            precision, recall = precision_recall(counts)
            print(f'{name:9} {written:17} precision {precision:.3f} recall {recall:.3f} {dict(counts)}')
    if SHARED.exists(): print(Counter(finding.text for text in paragraphs() for finding in lint_taiwan(text)).most_common(12))

if __name__ == '__main__': main()
